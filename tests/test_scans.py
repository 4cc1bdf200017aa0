"""
Windows, the choice of slices, and scans that are no DICOM: NIfTI volumes, files of several pages, slides. What is
shown is worked out by hand, or is what was written.
"""

import gc
import gzip
import io
import multiprocessing
import struct
import sys
import weakref
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from PIL import Image

from formats.dicom import open_pydicom
from formats.frames import (Frame, Scan, ScanSettings, Upload, choose_slices, decode_picture, find_scans, kind_of,
                          picture_key)
from formats.nifti import NO_GREYS, read_volume
from formats.slides import EMPTY, IN_MEMORY, NO_LEVEL, open_slide, starts
from formats.windows import WINDOWS, apply_window, windows_of
from plumbing.flags import UserError
from plumbing.pixels import DAMAGED, SEVERAL, TOO_LARGE, Unreadable, load_image
from test_pixels import COLOUR, FILM, GREY, stretched, tiff


def found(path, **settings):
    scans, refused = find_scans([path], ScanSettings(**settings), path.parent)
    assert refused == {} and len(scans) == 1
    return scans[0]


def refusal(path, **settings):
    scans, refused = find_scans([path], ScanSettings(**settings), path.parent)
    assert scans == [] and list(refused) == [path]
    return refused[path]


def pixels_of(source):
    return np.asarray(decode_picture(source))


# ----------------------------------------------------------------------------- windows and slices

def test_a_window_is_the_standards():
    """PS3.3 C.11.2.1.2.1's own example of a width of 100 at 40: up to -10 black, above 89 white."""
    values = np.array([-11, -10, -9, 39, 40, 88, 89, 90, np.nan, np.inf])
    assert apply_window(values, (40, 100, "LINEAR")).tolist() == [0, 0, 3, 126, 129, 252, 255, 255, 0, 255]
    assert apply_window(values[:8], (40, 100, "LINEAR_EXACT")).tolist() == [0, 0, 3, 125, 128, 250, 252, 255]
    assert apply_window(np.array([3, 4, 5]), (4, 0.5, "LINEAR")).tolist() == [0, 128, 255]  # below 1: as it is
    assert apply_window(np.array([3, 4, 5]), (4, 0, "LINEAR")).tolist() == [0, 0, 255]


def test_soft_tissue_keeps_a_faint_lesion():
    greys = apply_window(np.array([40, 70]), windows_of("soft")[0]).tolist()
    assert greys[1] - greys[0] >= 20


def test_windows_are_read_as_they_are_written():
    assert windows_of("auto") == ("auto",) and windows_of("-600/1500") == (windows_of("lung"))
    assert windows_of("0/2048,soft,file") == ((0, 2048, "LINEAR"), (*WINDOWS["soft"], "LINEAR"), "file")


@pytest.mark.parametrize("count, slices, expected", [
    (40, "middle", [19]), (5, "middle", [2]), (1, "middle", [0]), (3, "all", [0, 1, 2]), (11, "every:5", [0, 5, 10]),
    (3, "7", [0, 1, 2]), (40, "1", [19]), (40, "2", [0, 39]), (11, "3", [0, 5, 10]), (10, "3", [0, 5, 9])])
def test_slices_are_chosen_at_even_distances(count, slices, expected):
    assert list(choose_slices(range(count), slices)) == expected


def test_each_number_of_slices_is_so_many():
    for count in range(1, 30):
        for wanted in range(1, count + 1):
            chosen = choose_slices(range(count), str(wanted))
            assert len(set(chosen)) == wanted and list(chosen) == sorted(chosen)


# ----------------------------------------------------------------------------- plain images

def test_a_plain_image_is_a_scan_of_one(tmp_path):
    path = tmp_path / "film.png"
    Image.fromarray(GREY).save(path)
    assert found(path) == Scan("film.png", (path,), ("",)) and kind_of(path) == "plain"
    assert np.array_equal(pixels_of(path)[..., 0], GREY)
    assert np.array_equal(pixels_of(path.read_bytes()), pixels_of(path))
    assert picture_key(path) == picture_key(path.read_bytes())
    for name, content in (("broken.png", b"no"), ("notes.txt", b"a text"), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
    scans, refused = find_scans(sorted(tmp_path.iterdir()), folder=tmp_path)
    assert [scan.name for scan in scans] == ["broken.png", "film.png"] and refused == {}  # refused where it is decoded
    assert list(find_scans([tmp_path / "gone.png"])[1].values()) == ["cannot be read: No such file or directory"]


# ----------------------------------------------------------------------------- NIfTI

nibabel = pytest.importorskip("nibabel")
VOXELS = np.arange(24, dtype=np.int16).reshape(2, 3, 4)  # to the right, the front, the head


def nifti(path, voxels, affine=(1, 1, 1, 1), slope=None, **header):
    affine = np.diag(affine) if np.ndim(affine) == 1 else np.array(affine)
    image = nibabel.Nifti1Image(voxels, affine.astype(float))
    for name, value in header.items():
        image.header[name] = value
    if slope:
        image.header.set_slope_inter(*slope)
    if header.get("sform_code") == 0:
        image.set_qform(None, 0)
        image.set_sform(None, 0)
    nibabel.save(image, path)
    return path


RANGE = {"cal_min": 0, "cal_max": 255}  # a window that leaves numbers as they are


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_slices_are_seen_from_below_from_feet_to_head(tmp_path, name):
    """The patient's right is at the image's left, the front above."""
    scan = found(nifti(tmp_path / name, VOXELS, **RANGE))
    assert scan.labels == tuple(f"slice {number} of 4" for number in (1, 2, 3, 4))
    assert kind_of(tmp_path / name) == "nifti"
    for height, frame in enumerate(scan.sources):
        assert pixels_of(frame)[..., 0].tolist() == [[voxel + height for voxel in row]
                                                     for row in ([20, 8], [16, 4], [12, 0])]


@pytest.mark.parametrize("turn", [
    lambda voxels: (voxels[::-1], [[-1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
    lambda voxels: (voxels.transpose(2, 0, 1), [[0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]]),
    lambda voxels: (voxels[:, :, ::-1], [[1, 0.02, 0, 0], [-0.02, 1, 0, 0], [0, 0, -1, 3], [0, 0, 0, 1]])])
def test_however_voxels_are_stored_they_are_shown_alike(tmp_path, turn):
    straight = found(nifti(tmp_path / "a.nii", VOXELS, **RANGE))
    stored, affine = turn(VOXELS)
    turned = found(nifti(tmp_path / "b.nii", stored, affine, **RANGE))
    assert [pixels_of(frame).tolist() for frame in turned.sources] == [
        pixels_of(frame).tolist() for frame in straight.sources]


@pytest.mark.parametrize("affine, count, expected", [
    ((5, 1, 1, 1), 2, [[14, 18, 22], [13, 17, 21], [12, 16, 20]]),  # sagittal: the left last; the front at the left
    ((1, 5, 1, 1), 3, [[12, 0], [13, 1]])])
def test_thick_slices_are_shown_as_they_were_taken(tmp_path, affine, count, expected):
    scan = found(nifti(tmp_path / "a.nii", VOXELS, affine, **RANGE))
    assert len(scan.sources) == count
    last = pixels_of(scan.sources[-1 if affine[1] == 5 else 0])[..., 0]
    if affine[0] == 5:  # of the right half, the head above and the front at the left
        assert last.tolist() == [[23, 19, 15], [22, 18, 14], [21, 17, 13], [20, 16, 12]]
    else:  # coronal, at the back, the head above
        assert last.tolist() == [[15, 3], [14, 2], [13, 1], [12, 0]]


def test_units_windows_and_ranges(tmp_path):
    path = nifti(tmp_path / "a.nii", VOXELS, slope=(10, -100))
    frame = found(path, window="soft").sources[0]
    hounsfield = VOXELS[::-1, ::-1, 0].T * 10.0 - 100
    assert pixels_of(frame)[..., 0].tolist() == apply_window(hounsfield, (40, 350, "LINEAR")).tolist()
    assert "Hounsfield" in found(path, window="soft").warnings[0] and found(path).warnings == ()
    assert pixels_of(found(path, window="soft,40/350,soft").sources[0]).tolist() == pixels_of(frame).tolist()
    low, high = np.percentile(VOXELS, (0.5, 99.5))  # of the whole volume
    expected = ((VOXELS[::-1, ::-1, 0].T - low) * 255 / (high - low)).clip(0, 255).round()
    assert pixels_of(found(path).sources[0])[..., 0].tolist() == expected.tolist()
    with pytest.raises(Unreadable, match="no window"):
        pixels_of(found(path, window="file").sources[0])


def test_floats_and_colours(tmp_path):
    voxels = VOXELS.astype(np.float32)
    voxels[0, 0, 0] = np.nan
    shown = pixels_of(found(nifti(tmp_path / "a.nii", voxels)).sources[0])[..., 0]
    assert shown[2, 1] == 0 and shown[0, 0] > 200
    colours = np.zeros((2, 3, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    colours["R"], colours["B"] = VOXELS, 200
    shown = pixels_of(found(nifti(tmp_path / "b.nii", colours)).sources[1])
    assert shown[2, 1].tolist() == [1, 0, 200] and shown[0, 0].tolist() == [21, 0, 200]


def test_volumes_follow_one_another(tmp_path):
    path = nifti(tmp_path / "a.nii.gz", np.stack([VOXELS, VOXELS + 100], -1), **RANGE)
    scan = found(path, slices="middle")
    assert scan.labels == ("volume 1 of 2, slice 2 of 4", "volume 2 of 2, slice 2 of 4")
    assert [pixels_of(frame)[2, 1, 0] for frame in scan.sources] == [1, 101]
    assert found(nifti(tmp_path / "b.nii", VOXELS[..., :1])).labels == ("",)
    path = nifti(tmp_path / "c.nii", np.stack([np.stack([VOXELS, VOXELS + 30], -1)] * 2, -1), **RANGE)
    assert [pixels_of(frame)[2, 1, 0] for frame in found(path, slices="1").sources] == [1, 31, 1, 31]


def test_what_says_nothing_of_sides_is_told(tmp_path):
    scan = found(nifti(tmp_path / "a.nii", VOXELS, sform_code=0, **RANGE))
    assert "which side is left" in scan.warnings[0]
    assert pixels_of(scan.sources[0])[..., 0].tolist() == [[8, 20], [4, 16], [0, 12]]


def test_nifti_that_cannot_be_used(tmp_path):
    path = nifti(tmp_path / "a.nii", VOXELS)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert refusal(path) == DAMAGED
    path.write_bytes(content[:40] + struct.pack("<4h", 3, 30000, 30000, 30000) + content[48:])
    assert refusal(path) == DAMAGED  # more than its bytes hold
    packed = tmp_path / "a.nii.gz"
    packed.write_bytes(gzip.compress(content[:40] + struct.pack("<4h", 3, 2000, 2000, 2000) + content[48:]))
    assert refusal(packed) == DAMAGED
    noise = np.random.default_rng(0).integers(0, 9999, (20, 20, 20)).astype(np.int16)
    packed.write_bytes(gzip.compress(nifti(path, noise).read_bytes())[:-999])
    with pytest.raises(Unreadable, match="damaged"):
        pixels_of(found(packed).sources[0])
    assert refusal(nifti(path, VOXELS, intent_code=1002)) == NO_GREYS
    assert refusal(nifti(path, VOXELS.astype(np.complex64))) == NO_GREYS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("formats.nifti.MOST_VOXELS", 23)
        assert refusal(nifti(path, VOXELS)) == TOO_LARGE


# ----------------------------------------------------------------------------- pages

def test_pages_are_pictures(tmp_path):
    path = tmp_path / "stack.tif"
    path.write_bytes(tiff((FILM, {}), (FILM[::2, ::2], {254: 1}), (FILM.T, {})))  # the second is a thumbnail
    scan = found(path)
    assert scan.labels == ("page 1 of 2", "page 2 of 2") and kind_of(path) == "pages"
    assert [pixels_of(frame).tolist() for frame in scan.sources] == [stretched(FILM).tolist(),
                                                                     stretched(FILM.T).tolist()]
    assert found(path, slices="middle").labels == ("page 1 of 2",)
    with pytest.raises(Unreadable, match=SEVERAL):
        load_image(path.read_bytes())
    path.write_bytes(tiff((FILM, {}), (FILM[::2, ::2], {254: 1})))
    assert found(path).sources == (path,)


def test_deep_colour_of_a_later_page(tmp_path):
    colour = np.stack([FILM, FILM.T.reshape(FILM.shape), FILM[::-1]], -1)
    path = tmp_path / "colour.tif"
    path.write_bytes(tiff((FILM, {}), (colour, {})))
    assert np.array_equal(pixels_of(found(path).sources[1]), stretched(colour))


@pytest.mark.parametrize("end", ["gif", "png", "webp", "apng"])
def test_frames_of_moving_pictures(tmp_path, end):
    path = tmp_path / f"cine.{end}"
    images = [Image.fromarray(np.full((8, 8, 3), 60 * number, np.uint8)) for number in range(4)]
    stream = io.BytesIO()
    images[0].save(stream, {"apng": "PNG"}.get(end, end), save_all=True, append_images=images[1:], lossless=True)
    path.write_bytes(stream.getvalue())
    scan = found(path)
    assert [pixels_of(frame)[0, 0].tolist() for frame in scan.sources] == [[60 * n] * 3 for n in range(4)]
    assert scan.labels[-1] == "page 4 of 4"


def test_pages_that_cannot_be_used(tmp_path):
    path = tmp_path / "stack.tif"
    path.write_bytes(tiff(*[(FILM, {})] * 5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("formats.pages.MOST_PAGES", 4)
        path.write_bytes(tiff(*[(FILM, {})] * 5))
        assert find_scans([path])[0][0].sources == (path,)  # a plain image, whose reading refuses it
    frame = Frame(Upload("a", tiff((FILM, {}), (FILM, {}))[:-900]), "0", "pages", (1,))
    with pytest.raises(Unreadable, match="damaged"):
        decode_picture(frame)


# ----------------------------------------------------------------------------- slides

def slide(path, tissue=(200, 60, 150)):
    """Three levels of glass whose left upper quarter, 1,024 x 512 pixels, is tissue."""
    tifffile = pytest.importorskip("tifffile")
    pixels = np.full((1100, 2048, 3), 240, np.uint8)
    pixels[:512, :1024] = tissue
    pixels[10, 20] = 1, 2, 3
    with tifffile.TiffWriter(path) as file:
        settings = {"tile": (256, 256), "photometric": "rgb"}
        file.write(pixels, subifds=2, **settings)
        for step in (2, 4):
            file.write(np.ascontiguousarray(pixels[::step, ::step]), subfiletype=1, **settings)
    return pixels


def test_a_slide_is_its_overview_or_tiles(tmp_path):
    path = tmp_path / "slide.svs"
    pixels = slide(path)
    scan = found(path)
    assert scan.labels == ("",) and np.array_equal(pixels_of(scan.sources[0]), pixels[::2, ::2])
    scan = found(path, tiles="0:500")
    # Tiles begin at 0, 500, 1000, 1500 and 1548; of the third column and the second row less than a tenth is tissue
    assert [frame.place for frame in scan.sources] == [(0, 0, 0, 500, 500), (0, 500, 0, 500, 500)]
    assert scan.labels == ("tile 1 of 2", "tile 2 of 2")
    assert np.array_equal(pixels_of(scan.sources[0]), pixels[:500, :500])
    assert found(path, tiles="2:99999").sources[0].place == (2, 0, 0, 512, 275)
    assert refusal(path, tiles="3:100") == NO_LEVEL
    slide(path, tissue=240)
    assert refusal(path, tiles="0:500") == EMPTY
    path.write_bytes(path.read_bytes()[:200])
    assert "slide" in refusal(path) or refusal(path) == DAMAGED


def test_tiles_reach_the_end_of_a_side():
    assert starts(1100, 500) == [0, 500, 600] and starts(1000, 500) == [0, 500] and starts(300, 500) == [0]


def test_a_slide_without_what_reads_it(tmp_path):
    slide(tmp_path / "slide.svs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tifffile", None)
        patch.setitem(sys.modules, "openslide", None)
        open_slide.cache_clear()
        assert "pip install openslide-python" in refusal(tmp_path / "slide.svs")


@pytest.mark.parametrize("name, package, content", [
    ("a.dcm", "pydicom", bytes(128) + b"DICM"), ("a.nii", "nibabel", bytes(400))])
def test_a_package_that_is_missing_is_named(tmp_path, name, package, content):
    (tmp_path / name).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=f"pip install {package}"):
        patch.setitem(sys.modules, package, None)
        open_pydicom.cache_clear()
        find_scans([tmp_path / name])


# ----------------------------------------------------------------------------- other processes

def test_frames_are_decoded_elsewhere(tmp_path):
    sources = [*found(nifti(tmp_path / "a.nii", VOXELS)).sources]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        elsewhere = [np.asarray(image) for image in pool.map(decode_picture, sources)]
    assert all(np.array_equal(there, pixels_of(here)) for there, here in zip(elsewhere, sources))


# ----------------------------------------------------------------------------- in memory

def upload(path, folder):
    return Upload(path.relative_to(folder).as_posix(), path.read_bytes())


def shown(scans):
    return [(scan.name, scan.labels, scan.patient, scan.study, scan.warnings,
             [pixels_of(source).tolist() for source in scan.sources]) for scan in scans]


def test_uploads_show_what_files_show_and_touch_no_disk(tmp_path):
    from test_own_pictures import put_series  # skips this test alone where pydicom is missing
    put_series(tmp_path / "ct", 3, PatientID="P1")
    put_series(tmp_path / "mr", 2, uid="1.2.9", Modality="MR")
    for name in ("a.nii", "b.nii.gz"):
        nifti(tmp_path / name, VOXELS, (-1, 1, 1, 1), slope=(2, 5))
    nibabel.save(nibabel.Nifti2Image(np.stack([VOXELS, VOXELS + 7], -1), np.eye(4)), tmp_path / "c.nii.gz")
    (tmp_path / "pages.tif").write_bytes(tiff((FILM, {}), (FILM[::-1], {})))
    Image.fromarray(COLOUR).save(tmp_path / "no end", "PNG")
    for name, content in (("bad.dcm", bytes(128) + b"DICM"), ("bad.nii.gz", b"no"), ("notes.txt", b"a text")):
        (tmp_path / name).write_bytes(content)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    there, refused = find_scans(files, ScanSettings(slices="2"), tmp_path)
    expected, watched, opened = shown(there), [False], []
    assert len(there) == 7 and len(refused) == 2

    def watch(event, facts):
        if watched[0] and event in ("open", "os.mkdir", "os.rename"):
            opened.append(facts[0])

    sys.addaudithook(watch)
    uploads = [upload(path, tmp_path) for path in files]
    watched[0] = True
    try:
        scans, why = find_scans(uploads, ScanSettings(slices="2"))
        assert shown(scans) == expected
    finally:
        watched[0] = False
    assert opened == []
    assert {file.name: reason for file, reason in why.items()} == {path.name: why for path, why in refused.items()}


def test_two_uploads_of_one_content_are_two_files():
    one, other = (Upload("a.png", b"what it holds") for _ in range(2))
    assert one != other and str(one) == "a.png" and "holds" not in repr(one)
    scans, _ = find_scans([one, other])
    assert [scan.sources for scan in scans] == [(one,), (other,)]


def test_of_an_upload_nothing_is_kept_once_it_is_gone(tmp_path):
    from test_own_pictures import put_series  # skips this test alone where pydicom is missing
    put_series(tmp_path, 1)
    content = (tmp_path / "IM0").read_bytes()
    others = sys.getrefcount(content)
    (scan,), _ = find_scans([Upload("IM0", content)])
    decode_picture(scan.sources[0])
    assert sys.getrefcount(content) > others
    del scan
    gc.collect()
    assert sys.getrefcount(content) == others
    (scan,), _ = find_scans([upload(nifti(tmp_path / "a.nii.gz", VOXELS), tmp_path)])
    frame = scan.sources[0]
    voxels = weakref.ref(read_volume(frame.file, frame.sha256, 0)[0])
    decode_picture(frame)
    assert read_volume(frame.file, frame.sha256, 0)[0] is voxels()  # so that the next slice is there at once
    del scan, frame
    gc.collect()
    assert voxels() is None


def test_what_an_upload_may_not_be(tmp_path):
    pyramid = Upload("a.svs", tiff((FILM, {})))
    assert find_scans([pyramid]) == ([], {pyramid: IN_MEMORY})
    volume = upload(nifti(tmp_path / "a.nii", VOXELS), tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("formats.nifti.MOST_UPLOADED", VOXELS.size - 1)
        assert find_scans([volume]) == ([], {volume: TOO_LARGE})
        assert found(tmp_path / "a.nii")


# ----------------------------------------------------------------------------- names that say nothing

@pytest.mark.parametrize("form, mode", [("PNG", "RGB"), ("JPEG", "RGB"), ("GIF", "L"), ("BMP", "RGB"), ("BMP", "1"),
                                        ("TIFF", "L"), ("WEBP", "RGB"), ("JPEG2000", "RGB"), ("PPM", "RGB"),
                                        ("PPM", "L"), ("PPM", "1")])
def test_an_image_without_an_end_is_known_by_its_first_bytes(tmp_path, form, mode):
    stream = io.BytesIO()
    Image.fromarray(COLOUR).convert(mode).save(stream, form)
    for name in ("image", "image.7", "image.bin"):
        (tmp_path / name).write_bytes(stream.getvalue())
        assert found(tmp_path / name).sources == (tmp_path / name,)
        assert np.array_equal(pixels_of(tmp_path / name), pixels_of(stream.getvalue()))
    (tmp_path / "cut").write_bytes(stream.getvalue()[:40])
    assert found(tmp_path / "cut").sources == (tmp_path / "cut",)  # to be refused with the reason


def test_pages_without_an_end_are_pages(tmp_path):
    (tmp_path / "pages").write_bytes(tiff((FILM, {}), (FILM[::-1], {})))
    assert found(tmp_path / "pages").labels == ("page 1 of 2", "page 2 of 2")


@pytest.mark.parametrize("content", [b"", b"P1 has two lesions", b"P2 2 of 3", b"BM is a patient", b"GIFs", b"II",
                                     b"RIFF....WAVE", b"a,b\n1,2\n", b"%PDF-1.4", b"\xff\xd9", b"<svg>", b"PK\3\4"])
def test_a_text_or_another_file_is_no_image(tmp_path, content):
    (tmp_path / "notes").write_bytes(content)
    assert find_scans([tmp_path / "notes"]) == ([], {})
