"""
extras/share/demo_draw.py and demo_images.py: where boxes and the map lie on a picture, what is said of boxes, files
that cannot be used, and windows.
"""

import hashlib
import io
import re
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from extras.share import demo_draw, demo_images, demo_page
from plumbing.flags import UserError
from plumbing.pixels import resize_image
from test_browse import chromium  # noqa: F401, the fixture
from test_demo_talk import N, SIZE, some_image

def map_of(image, looked):
    patches = demo_draw.patches_of(image, looked)
    return demo_draw.heat_map(image, patches, patches.min(), patches.max())


def test_the_map_colours_what_was_looked_at():
    image = np.full((SIZE, SIZE, 3), (30, 60, 90), np.uint8)
    grey = np.array(Image.fromarray(image).convert("RGB").convert("L"))[0, 0]
    looked = np.full(N, 0.01, np.float32)
    looked[[0, 1 + 6, 1 + 15]] = 0.9, 0.03, 0.02  # class token; row 1, column 2; row 3, column 3
    drawn = map_of(image, looked).astype(int)
    strong, half = (grey * (1 - share) + np.array(demo_draw.HEAT) * share for share in (0.75, 0.375))
    assert np.abs(drawn[8:16, 16:24] - strong).max() <= 1 and np.abs(drawn[24:, 24:] - half).max() <= 1
    drawn[8:16, 16:24] = drawn[24:, 24:] = grey
    assert (drawn == grey).all()
    assert (map_of(image, np.ones(N, np.float32)) == grey).all()


@pytest.mark.parametrize("height, width, rows, columns", [(224, 224, 14, 14), (448, 448, 14, 14), (96, 224, 3, 7)])
def test_patches_lie_where_they_are_in_any_shape_with_and_without_a_class_token(height, width, rows, columns):
    image, looked = np.zeros((height, width, 3), np.uint8), np.arange(rows * columns)
    for tokens in (looked, [1000, *looked]):
        assert (demo_draw.patches_of(image, np.array(tokens)) == looked.reshape(rows, columns)).all()


# ----------------------------------------------------------------------------- boxes

PAIRS = {"cyst": (np.array([[100, 200, 300, 400]]), np.array([[0, 0, 1000, 1000]])),
         "<b>x</b>": (np.array([[600, 50, 900, 1e300], [500, 500, 400, 600]]), np.zeros((0, 4)))}


@pytest.mark.parametrize("width, height", [(400, 200), (200, 400), (300, 300)])
@pytest.mark.parametrize("how, size", [("squash", 128), ("crop", 128), ("pad", 128), ("fit", 128), ("smart", 1 << 17),
                                       ("tiles:6", 64)])
def test_boxes_lie_on_what_the_model_sees_of_the_whole_image(how, size, width, height):
    """A box of thousandths of the whole image, and the same rectangle painted on it and seen as the model sees it."""
    box = np.array([400, 300, 600, 550])
    image = Image.new("RGB", (width, height))
    image.paste((255, 255, 255), tuple(np.round(box * [width, height, width, height] / 1000).astype(int)))
    seen = np.asarray(resize_image(image, size, how))[..., 0] > 127
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    [*found] = re.findall(r"(?:left|top|width|height):([-.\d]+)%", demo_draw.draw_boxes(
        "<img>", {"a": (box[None], np.zeros((0, 4)))}, demo_draw.part_of(width, height, how)))
    left, top, wide, high = np.array(found, float) * np.tile(seen.shape[::-1], 2) / 100
    assert [left, left + wide, top, top + high] == pytest.approx(
        [columns[0], columns[-1] + 1, rows[0], rows[-1] + 1], abs=1.01)


def test_boxes_are_drawn_where_they_are_with_their_labels(chromium):  # noqa: F811
    page = chromium.new_page()
    image = demo_draw.picture(some_image(), "it")
    page.set_content(demo_draw.STYLE + demo_draw.draw_boxes(image, PAIRS))
    frame = page.locator(".picture").bounding_box()
    places = page.locator(".box").evaluate_all("all => all.map(one => one.getBoundingClientRect())"
                                               ".map(box => [box.left, box.top, box.width, box.height])")
    places = (np.array(places) - [frame["x"], frame["y"], 0, 0]) * 1000 / frame["width"]
    assert frame["width"] == 352 and places[:2].tolist() == pytest.approx(
        np.array([[0, 0, 1000, 1000], [100, 200, 200, 200]]), abs=0.2)
    assert places[3][2] * 0.352 == pytest.approx(4, abs=0.1)  # an inverted box has but its borders
    assert page.locator(".box span").all_inner_texts() == ["cyst", "<b>x</b>", "<b>x</b>"]
    styles = page.locator(".box").evaluate_all("all => all.map(getComputedStyle)"
                                               ".map(style => [style.borderTopStyle, style.borderTopColor])")
    assert [style for style, _ in styles] == ["dashed", "solid", "solid", "solid"]
    assert styles[0][1] == styles[1][1] != styles[2][1] == styles[3][1]  # a colour a label
    page.close()
    many = {"cell": (np.repeat(PAIRS["cyst"][0], demo_draw.NAMED + 1, axis=0), PAIRS["cyst"][1])}
    assert demo_draw.draw_boxes(image, many).count("<span") == 0 and demo_draw.draw_boxes(image, {}) == image


@pytest.fixture
def shown(monkeypatch):
    """shown(...) -> (the pairs of demo_page.show_boxes, what it put on the page)."""
    said = []
    monkeypatch.setattr(demo_page, "st", SimpleNamespace(html=said.append))

    def show(*arguments, whole=some_image()):
        said.clear()
        one = demo_images.Shown("", some_image(), whole, (0, 0, 1000, 1000), {})
        pairs, number = demo_page.show_boxes(*arguments, [one])
        assert number == 0
        return pairs, "".join(said)

    return show


def test_what_is_said_of_boxes(shown):
    assert shown("what is this?", "a lung", "a lung") == ({}, "")
    pairs, said = shown("detect cyst", "<box>[[1, 2, 3, 4]]</box>", "Cyst <box>[[1, 2, 3, 4]]</box>")
    assert list(pairs) == ["cyst"] and said.count('class="box ') == 2 and "recorded</p>" in said
    assert "In the answer: cyst: 1. F-IoU with the recorded boxes: 100%." in said
    pairs, said = shown("where is it?", '[{"bbox_2d": [1, 2, 3, 4], "label": "<i>"}]', None)
    assert "&lt;i&gt;: 1." in said and "F-IoU" not in said and "recorded" not in said and "<i>:" not in said
    for question, answer in (("detect cyst", "a cyst"), ("where is it?", "cyst <box>[[1, 2, 3"), ("Detect it", "")):
        pairs, said = shown(question, answer, "cyst <box>[]</box>")
        assert "This answer cannot be read as boxes. F-IoU with the recorded boxes: 0%." in said
    assert "In the answer: no box." in shown("detect cyst", "[]", None)[1]
    pairs, said = shown("detect cyst", "cyst <box>[[1, 2, 3, 4]]</box>", None, whole=None)
    assert pairs == {} and "<img" not in said and "In the answer: cyst: 1." in said and "upload the image" in said


@pytest.mark.parametrize("how", ["crop", "pad", "squash", "fit"])
def test_the_whole_image_is_that_of_an_upload_and_of_an_example_stored_whole(how):
    one = demo_images.show(Image.new("RGB", (3000, 1500)), "prior", 64, how)
    assert one.whole.shape == (352, 704, 3) and one.part == demo_draw.part_of(3000, 1500, how) and one.role == "prior"
    one = demo_images.show(Image.fromarray(some_image()), "", SIZE, how, stored=True)
    assert (one.whole is None and one.part is None) == (how in ("crop", "pad"))
    assert (one.seen == some_image()).all()


# ----------------------------------------------------------------------------- bad images

def encoded(image, form="PNG"):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, form)
    return stream.getvalue()


def png_that_claims(width, height):
    content = encoded(some_image())
    header = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


@pytest.mark.parametrize("content, sentence", [
    (b"a text", "not an image"), (b"", "not an image"), (encoded(some_image())[:-600], "not an image"),
    (encoded(some_image(), "JPEG")[:300], "not an image"), (b"%PDF-1.4 not drawn", "not an image"),
    (png_that_claims(10_000, 9_000), "89 million pixels"),
    (png_that_claims(60_000, 60_000), "89 million pixels")])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images_are_answered_by_a_sentence(content, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        demo_images.read_picture(content, SIZE)
    assert re.fullmatch(r"[A-Z][^.\n]*\.", str(error.value))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "BMP", "WEBP"])
def test_the_types_that_are_offered_are_read(form):
    assert demo_images.read_picture(encoded(some_image(), form), SIZE).size == (SIZE, SIZE)


def test_pages_of_a_file_are_slices_and_bad_files_are_named():
    pages, stream = [Image.fromarray(some_image(seed)) for seed in range(3)], io.BytesIO()
    pages[0].save(stream, "TIFF", save_all=True, append_images=pages[1:])
    files = [("a.png", b"a text"), ("b.tif", stream.getvalue()), ("c.png", encoded(some_image())), ("d.dcm", b""),
             ("e.nii.gz", b"")]
    (several, one), refused = demo_images.find_in(files, "auto", SIZE)
    assert several.labels == ("page 1 of 3", "page 2 of 3", "page 3 of 3") and one.labels == ("",)
    for source, seed in zip((*several.sources, *one.sources), (0, 1, 2, 0), strict=True):
        assert (np.asarray(demo_images.read_picture(source, SIZE)) == some_image(seed)).all()
    assert list(refused) == ["a.png", "d.dcm", "e.nii.gz"]
    assert all(why.startswith("This file is not an image that can be read: ") for why in refused.values())
    assert [demo_images.units_of(source) for source in (several.sources[0], one.sources[0])] == [None, None]


def test_too_much_at_a_time_is_refused(monkeypatch):
    monkeypatch.setattr(demo_images, "MOST_BYTES", 3 << 20)
    with pytest.raises(UserError, match="more than 3 MB together"):
        demo_images.find_in([("a", bytes(2 << 20)), ("b", bytes(2 << 20))], "auto", SIZE)


# ----------------------------------------------------------------------------- scans

NAME, PATIENT, DATE = "Mustermann^Erika", "4711-0815", "20200229"  # of a header, never shown


def ct(number, series="1.2.3", **changes):
    """A CT slice as DICOM bytes: 32 x 32 numbers from -1000 to 23 HU, the first -1000 + number, 5 mm above the last."""
    pydicom = pytest.importorskip("pydicom", reason="no pydicom here")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = f"1.2.3.4.{number}"
    header = pydicom.dataset.FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
    numbers = (np.arange(SIZE * SIZE).reshape(SIZE, SIZE) + 24 + number).astype(np.uint16)
    values = dict(
        SOPClassUID=meta.MediaStorageSOPClassUID, SOPInstanceUID=meta.MediaStorageSOPInstanceUID, Modality="CT",
        PatientName=NAME, PatientID=PATIENT, StudyDate=DATE, StudyInstanceUID="1.2", SeriesInstanceUID=series,
        InstanceNumber=number, ImageOrientationPatient=[1, 0, 0, 0, 1, 0], ImagePositionPatient=[0, 0, 5 * number],
        Rows=SIZE, Columns=SIZE, SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2", BitsAllocated=16,
        BitsStored=12, HighBit=11, PixelRepresentation=0, RescaleIntercept=-1024, RescaleSlope=1, WindowCenter=-500,
        WindowWidth=1000, PixelData=numbers.tobytes())
    for keyword, value in (values | changes).items():
        setattr(header, keyword, value)
    stream = io.BytesIO()
    header.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def test_a_series_is_one_scan_in_the_order_of_position_whatever_the_order_of_its_files():
    order = [2, 0, 3, 1]
    files = [("x.png", encoded(some_image())), *((f"IM{number}", ct(number)) for number in order),
             ("y.png", encoded(some_image(1))), ("IM9", ct(7, series="1.2.4"))]
    scans, refused = demo_images.find_in(files, "auto", SIZE)
    assert refused == {} and [len(scan.sources) for scan in scans] == [1, 4, 1, 1]
    assert scans[1].labels == tuple(f"slice {number} of 4" for number in range(1, 5))
    assert [source.file.content for source in scans[1].sources] == [ct(number) for number in range(4)]
    assert {source.sha256 for source in scans[1].sources} == {hashlib.sha256(ct(n)).hexdigest() for n in range(4)}
    said = repr([(scan.name, scan.labels, scan.patient, scan.study, scan.time, scan.warnings) for scan in scans])
    assert not any(word in said for word in (NAME, "Erika", PATIENT, DATE, "1.2"))


def test_windows_are_of_physical_numbers():
    [[scan], _] = demo_images.find_in([("IM0", ct(0))], "auto", SIZE)
    [source] = scan.sources
    assert demo_images.units_of(source) == (-1000, 23, True)
    numbers = np.arange(SIZE * SIZE).reshape(SIZE, SIZE) - 1000.0  # as ct() says
    for window, low, high in (("-500/101", -550.5, -450.5), ("-700/401", -900.5, -500.5)):  # PS3.3 C.11.2.1.2
        shown = np.asarray(demo_images.read_picture(demo_images.in_window(source, window), SIZE))[..., 0]
        assert (shown[numbers <= low] == 0).all() and (shown[numbers >= high] == 255).all()
        inside = shown[(numbers > low + 2) & (numbers < high - 2)]
        assert inside.min() > 0 and inside.max() < 255 and (np.diff(inside.astype(int)) >= 0).all()
    greys = [np.asarray(demo_images.read_picture(demo_images.in_window(source, window), SIZE))
             for window in demo_images.name_windows(True, "-500/101")]
    assert len({grey.tobytes() for grey in greys}) >= 5


def test_a_nifti_volume_is_read_from_memory(tmp_path):
    nibabel = pytest.importorskip("nibabel", reason="no nibabel here")
    voxels = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6) - 1000
    colours = np.ones((4, 5, 6), [(name, "u1") for name in "RGB"])
    colours["R"] = np.arange(6)
    for name, some in (("a", voxels), ("rgb", colours)):
        nibabel.save(nibabel.Nifti1Image(some, np.eye(4)), tmp_path / f"{name}.nii.gz")
    files = [(path.name, path.read_bytes()) for path in sorted(tmp_path.iterdir())]
    (scan, coloured), refused = demo_images.find_in(files, "auto", SIZE)
    assert refused == {} and scan.labels == tuple(f"slice {number} of 6" for number in range(1, 7))
    assert demo_images.units_of(scan.sources[0]) == (-1000, -881, False)
    assert demo_images.units_of(coloured.sources[0]) is None
    shown = np.asarray(demo_images.read_picture(demo_images.in_window(scan.sources[0], "-940/60"), SIZE))[..., 0]
    assert shown.shape == (5, 4) and (shown[0, 0], shown[-1, -1]) == (255, 0)  # -886 at the right in front, -1000
    assert 0 < shown[0, 2] < 255  # -946


def test_windows_with_names_are_for_hounsfield_units_and_the_trained_one_is_first():
    [[scan], _] = demo_images.find_in([("IM0", ct(0, Modality="MR", RescaleIntercept=0))], "auto", SIZE)
    low, high, hounsfield = demo_images.units_of(scan.sources[0])
    assert (low, high, hounsfield) == (24, 1047, False)
    assert demo_images.name_windows(False, "auto") == ["auto", "file"]
    assert demo_images.name_windows(True, "soft") == ["soft", "auto", "file", "lung", "bone", "brain"]
    assert demo_images.name_windows(False, "0/2048,soft,brain")[0] == "0/2048,soft,brain"
