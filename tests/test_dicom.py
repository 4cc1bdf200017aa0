"""
formats/dicom.py on files that pydicom writes: the pixels of each are worked out by hand from the standard's formulas.
"""

import pickle
import random

import numpy as np
import pytest

from formats.dicom import DEFLATED, INSTALL, NO_PICTURE, NO_PIXELS
from formats.frames import ScanSettings, Upload, decode_picture, find_scans, kind_of, picture_key
from formats.windows import NO_WINDOW
from plumbing.pixels import DAMAGED, EVEN, TOO_LARGE, Unreadable
from prepare.shards import ImageSettings, encode_image

pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.uid import (ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian,  # noqa: E402
                         JPEG2000Lossless, RLELossless)

RAMP = np.arange(16).reshape(4, 4)  # stored numbers, each its place
CT, MR, CR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.1"
AXIAL = [1, 0, 0, 0, 1, 0]
FOUR = {"WindowCenter": 2, "WindowWidth": 4}  # 0, 1, 2, 3 become 0, 85, 170, 255
STEPS = [0, 85, 170, *[255] * 13]


def item(**elements):
    dataset = Dataset()
    for name, value in elements.items():
        setattr(dataset, name, value)
    return dataset


def made(pixels, syntax=ExplicitVRLittleEndian, **elements):
    """A dataset of pixels, (H, W), (F, H, W) with NumberOfFrames, or (H, W, 3), as CT unless elements say otherwise."""
    colour = elements.get("SamplesPerPixel") == 3
    shape = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    bits = 8 * pixels.itemsize
    facts = {"SOPClassUID": CT, "SOPInstanceUID": "1.2.3.4", "Modality": "CT", "SeriesInstanceUID": "1.2.3",
             "StudyInstanceUID": "1.2", "Rows": shape[0], "Columns": shape[1], "SamplesPerPixel": 1,
             "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": bits, "BitsStored": bits, "HighBit": bits - 1,
             "PixelRepresentation": int(pixels.dtype.kind == "i")} | elements
    dataset = item(**{name: value for name, value in facts.items() if value is not None})
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    content = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    name = {"f4": "FloatPixelData", "f8": "DoubleFloatPixelData"}.get(pixels.dtype.str[1:], "PixelData")
    setattr(dataset, name, content + bytes(len(content) % 2))
    if name == "PixelData":
        dataset["PixelData"].VR = "OB" if bits == 8 else "OW"
    return dataset


def save(path, dataset, packed=None):
    """Write a dataset as a DICOM file, compressed by a transfer syntax if one is given."""
    if packed:
        dataset.compress(packed, generate_instance_uid=False)
    dataset.save_as(path, enforce_file_format=True)
    return path


def scan_in(path, window="auto", **settings):
    """The one Scan of a file."""
    scans, refused = find_scans([path], ScanSettings(window, **settings), path.parent)
    assert refused == {} and len(scans) == 1
    return scans[0]


def shown(path, window="auto", number=0):
    return np.asarray(decode_picture(scan_in(path, window).sources[number]))


def grey(path, window="auto", number=0):
    """What a file is shown as, a list of the greys of its pixels, whose three channels are alike."""
    pixels = shown(path, window, number)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0].ravel().tolist()


def grey_of(tmp_path, pixels, window="auto", **elements):
    return grey(save(tmp_path / "file.dcm", made(np.asarray(pixels), **elements)), window)


def refusal(path, **settings):
    scans, refused = find_scans([path], ScanSettings(**settings), path.parent)
    assert scans == [] and list(refused) == [path]
    return refused[path]


U16, I16 = RAMP.astype(np.uint16), RAMP.astype(np.int16) - 8


# ----------------------------------------------------------------------------- numbers to greys

@pytest.mark.parametrize("elements, expected", [
    (FOUR, STEPS),
    ({"WindowCenter": [2, 9], "WindowWidth": [4, 1]}, STEPS),  # of several windows the first
    (FOUR | {"VOILUTFunction": "LINEAR_EXACT"}, [0, 64, 128, 191, *[255] * 12]),
    (FOUR | {"VOILUTFunction": "SIGMOID", "WindowCenter": 8, "WindowWidth": 16},  # 255 / (1 + exp(-(x - 8) / 4))
     [30, 38, 47, 57, 69, 82, 96, 112, 128, 143, 159, 173, 186, 198, 208, 217]),
    ({"WindowCenter": 5, "WindowWidth": 1}, [0] * 5 + [255] * 11),
    (FOUR | {"RescaleSlope": 2, "RescaleIntercept": -2}, [0, 0, 170, *[255] * 13]),
    (FOUR | {"RescaleSlope": -1, "RescaleIntercept": 15}, STEPS[::-1]),
    (FOUR | {"PhotometricInterpretation": "MONOCHROME1"}, [255 - step for step in STEPS]),
    (FOUR | {"RescaleSlope": 0.5, "RescaleIntercept": 0}, [0, 42, 85, 128, 170, 212, *[255] * 10])])
def test_greys_follow_the_header(tmp_path, elements, expected):
    assert grey_of(tmp_path, U16, **elements) == expected


def table(first, bits, *entries):
    lut = item(LUTDescriptor=[len(entries), first, bits], LUTData=list(entries), ModalityLUTType="US")
    lut["LUTData"].VR = "US"
    return [lut]


def test_a_modality_table_takes_the_place_of_slope_and_intercept(tmp_path):
    window = {"WindowCenter": 150, "WindowWidth": 300, "VOILUTFunction": "LINEAR_EXACT"}
    assert grey_of(tmp_path, U16, ModalityLUTSequence=table(10, 16, 100, 300, 200, 0), **window) == [
        *[85] * 11, 255, 170, 0, 0, 0]  # below the table its first entry, above it the last


def test_a_table_of_the_window_goes_before_centre_and_width(tmp_path):
    entries = table(1, 8, 0, 255, 128, 64)
    assert grey_of(tmp_path, U16, VOILUTSequence=entries, **FOUR) == [0, 0, 255, 128, *[64] * 12]
    assert grey_of(tmp_path, U16, "2/4", VOILUTSequence=entries) == STEPS
    entries = table(0, 12, 0, 819, 4095)
    assert grey_of(tmp_path, U16, VOILUTSequence=entries) == [0, 51, *[255] * 14]


def test_signed_numbers_and_their_tables(tmp_path):
    assert grey_of(tmp_path, I16, WindowCenter=-6, WindowWidth=4) == STEPS
    entries = table(-8, 8, *range(0, 256, 17))
    entries[0]["LUTDescriptor"].VR = "SS"
    assert grey_of(tmp_path, I16, VOILUTSequence=entries) == list(range(0, 256, 17))
    entries = table(-8 + 65536, 8, *range(0, 256, 17))  # as those write it who forget its sign
    entries[0]["LUTDescriptor"].VR = "US"
    assert grey_of(tmp_path, I16, VOILUTSequence=entries) == list(range(0, 256, 17))


@pytest.mark.parametrize("shift", [0, 4])
def test_bits_that_are_not_stored_are_nothing(tmp_path, shift):
    """Old files keep an overlay in them."""
    junk = 0xF000 if not shift else 0x000F
    assert grey_of(tmp_path, U16 << shift | junk, BitsStored=12, HighBit=11 + shift, **FOUR) == STEPS
    signed = ((I16 & 0xFFF).astype(np.uint16) << shift | junk).view(np.int16)
    assert grey_of(tmp_path, signed, BitsStored=12, HighBit=11 + shift, WindowCenter=-6, WindowWidth=4) == STEPS


def test_padding_is_black_and_gives_no_range(tmp_path):
    film = np.linspace(1000, 2000, 400).reshape(20, 20).astype(np.int16)
    padded = film.copy()
    padded[:4] = -2000
    alone = grey_of(tmp_path, film[4:])
    assert grey_of(tmp_path, padded, PixelPaddingValue=-2000) == [0] * 80 + alone
    padded[1] = -1990
    limit = {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1990}
    assert grey_of(tmp_path, padded, **limit) == [0] * 80 + alone
    inverted = grey_of(tmp_path, padded, PhotometricInterpretation="MONOCHROME1", **limit)
    assert inverted == [0] * 80 + [255 - level for level in alone]
    assert grey_of(tmp_path, padded, "1500/5000", **limit)[:80] == [0] * 80
    dataset = made(padded, **limit)
    for name in limit:  # as those write it who forget its sign
        dataset[name] = pydicom.DataElement(name, "US", limit[name] + 65536)
    assert grey(save(tmp_path / "unsigned.dcm", dataset)) == [0] * 80 + alone


def test_without_a_window_a_metal_pixel_changes_nothing(tmp_path):
    film = np.linspace(0, 1000, 400).reshape(20, 20).round().astype(np.int16)
    metal = film.copy()
    metal[10, 10] = 30000
    one, other = (np.array(grey_of(tmp_path, pixels, Modality="MR", SOPClassUID=MR)) for pixels in (film, metal))
    differ = np.flatnonzero(np.abs(one - other) > 1)
    assert differ.tolist() == [210] and other[210] == 255 and one.min() == 0 and one.max() == 255


def test_far_numbers_are_no_wrapped_ones(tmp_path):
    film = np.array([[-20000, -1], [0, 20000]], np.int16)  # their difference is more than its type holds
    assert grey_of(tmp_path, film, WindowCenter=0, WindowWidth=40000, VOILUTFunction="LINEAR_EXACT") == [
        0, 127, 128, 255]
    wide = np.array([[0, 1 << 30], [1 << 31, (1 << 32) - 1]], np.uint32)
    assert grey_of(tmp_path, wide, WindowCenter=2 ** 31, WindowWidth=2 ** 32, VOILUTFunction="LINEAR_EXACT") == [
        0, 64, 128, 255]


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_floats(tmp_path, kind):
    film = np.array([[0, 0.25], [0.5, np.nan]], kind)
    elements = {"BitsStored": None, "HighBit": None, "PixelRepresentation": None, "Modality": "MR"}
    window = {"WindowCenter": 0.25, "WindowWidth": 0.5, "VOILUTFunction": "LINEAR_EXACT"}
    assert grey_of(tmp_path, film, **elements, **window) == [0, 128, 255, 0]
    assert grey_of(tmp_path, film, **elements)[3] == 0


@pytest.mark.parametrize("window, expected", [
    ("soft", [128, 150]), ("lung", [236, 242]), ("bone", [77, 81]), ("brain", [129, 226]), ("file", [47, 255]),
    ("auto", [47, 255]), ("40/350", [128, 150]), ("70/1", [0, 255])])
def test_windows_by_name_and_number(tmp_path, window, expected):
    """Of 40 HU and, 30 HU brighter, a lesion: in soft they are 22 greys apart."""
    pixels = np.array([[1064, 1094]], np.uint16)
    elements = {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": 50, "WindowWidth": 31}
    assert grey_of(tmp_path, pixels, window, **elements) == expected


def test_three_windows_are_red_green_and_blue(tmp_path):
    path = save(tmp_path / "ct.dcm", made(np.array([[0, 1024, 1064, 2048]], np.uint16), RescaleSlope=1,
                                          RescaleIntercept=-1024))
    assert shown(path, "0/2048,soft,brain").tolist() == [[[0, 0, 0], [128, 99, 0], [133, 128, 129], [255, 255, 255]]]
    assert shown(path, "0/2048,soft,brain").dtype == np.uint8


def test_hounsfield_windows_are_for_hounsfield_units(tmp_path):
    path = save(tmp_path / "mr.dcm", made(U16, Modality="MR", SOPClassUID=MR, **FOUR))
    assert grey(path, "lung") == STEPS
    assert "Hounsfield" in scan_in(path, "lung").warnings[0] and scan_in(path, "3/4").warnings == ()
    assert grey(path, "3/4") == [0, 0, 85, 170, *[255] * 12]


def test_a_window_that_is_not_there(tmp_path):
    path = save(tmp_path / "ct.dcm", made(U16, WindowCenter=3, WindowWidth=0))
    with pytest.raises(Unreadable, match="no window"):
        grey(path, "file")
    assert grey(path) == [0, 16, 33, 50, 67, 85, 102, 119, 136, 153, 170, 188, 205, 222, 239, 255]
    assert "--window" in NO_WINDOW


def test_eight_bits_are_never_stretched(tmp_path):
    film = (RAMP + 100).astype(np.uint8)
    assert grey_of(tmp_path, film, Modality="US") == film.ravel().tolist()
    assert grey_of(tmp_path, film - 100, Modality="OT", BitsStored=4, HighBit=3) == list(range(0, 256, 17))


# ----------------------------------------------------------------------------- colours

RGB = np.array([[[255, 0, 0], [0, 255, 0], [9, 8, 7], [1, 2, 3]]], np.uint8)
IN_COLOUR = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "PhotometricInterpretation": "RGB", "Modality": "ES"}


def test_colours(tmp_path):
    path = save(tmp_path / "rgb.dcm", made(RGB, **IN_COLOUR))
    assert shown(path).tolist() == RGB.tolist()
    assert shown(path, "soft").tolist() == RGB.tolist()  # a window is for numbers
    dataset = made(RGB, **IN_COLOUR | {"PlanarConfiguration": 1})
    dataset.PixelData = RGB.transpose(2, 0, 1).tobytes()
    assert shown(save(tmp_path / "planes.dcm", dataset)).tolist() == RGB.tolist()
    deep = made(RGB.astype(np.uint16) * 257, **IN_COLOUR)
    assert shown(save(tmp_path / "deep.dcm", deep)).tolist() == RGB.tolist()


def test_luminance_and_chrominance(tmp_path):
    ybr = np.array([[[76, 85, 255], [100, 128, 128]]], np.uint8)
    dataset = made(ybr, **IN_COLOUR | {"PhotometricInterpretation": "YBR_FULL"})
    assert shown(save(tmp_path / "ybr.dcm", dataset)).tolist() == [[[254, 0, 0], [100, 100, 100]]]
    dataset = made(ybr, **IN_COLOUR | {"PhotometricInterpretation": "YBR_FULL_422"})
    dataset.PixelData = bytes([76, 150, 128, 128])  # two pixels of one colour
    assert shown(save(tmp_path / "422.dcm", dataset)).tolist() == [[[76] * 3, [150] * 3]]


@pytest.mark.parametrize("bits, entries", [(16, [0, 65535, 32896, 257]), (8, [0, 255, 128, 1])])
def test_a_palette(tmp_path, bits, entries):
    dataset = made(np.array([[0, 1, 2, 3]], np.uint8), PhotometricInterpretation="PALETTE COLOR", Modality="US")
    for number, name in enumerate(("Red", "Green", "Blue")):
        setattr(dataset, f"{name}PaletteColorLookupTableDescriptor", [4, 0, bits])
        setattr(dataset, f"{name}PaletteColorLookupTableData",
                np.roll(entries, number).astype("<u2" if bits == 16 else np.uint8).tobytes())
    assert shown(save(tmp_path / "palette.dcm", dataset)).tolist() == [
        [[0, 1, 128], [255, 0, 1], [128, 255, 0], [1, 128, 255]]]


# ----------------------------------------------------------------------------- packed

def smooth(channels=()):
    return np.random.default_rng(0).integers(0, 256, (32, 32, *channels)).astype(np.uint8)


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_what_is_compressed_without_loss_is_the_same(tmp_path, syntax):
    pytest.importorskip("openjpeg")
    deep = smooth().astype(np.uint16) * 16
    window = {"WindowCenter": 2040, "WindowWidth": 4080, "VOILUTFunction": "LINEAR_EXACT"}
    for number, (pixels, elements) in enumerate([(deep, {"BitsStored": 12, "HighBit": 11} | window),
                                                 (deep.astype(np.int16) - 2048, window | {"WindowCenter": -8})]):
        path = save(tmp_path / f"{number}.dcm", made(pixels, **elements), syntax)
        assert grey(path) == smooth().ravel().tolist()
    colour = {**IN_COLOUR, "PhotometricInterpretation": "YBR_RCT" if syntax == JPEG2000Lossless else "RGB"}
    path = save(tmp_path / "colour.dcm", made(smooth((3,)), **colour), syntax)
    assert np.array_equal(shown(path), smooth((3,)))


def test_jpeg(tmp_path):
    pytest.importorskip("libjpeg")
    import io

    from PIL import Image
    stream = io.BytesIO()
    picture = Image.fromarray(smooth((3,))[:4, :4]).resize((32, 32), Image.Resampling.BICUBIC)
    picture.save(stream, "JPEG", quality=95)
    dataset = made(smooth((3,)), "1.2.840.10008.1.2.4.50", **IN_COLOUR | {"PhotometricInterpretation": "YBR_FULL_422"})
    dataset.PixelData = pydicom.encaps.encapsulate([stream.getvalue() + bytes(len(stream.getvalue()) % 2)])
    pixels = shown(save(tmp_path / "jpeg.dcm", dataset))
    assert np.abs(pixels.astype(int) - np.asarray(Image.open(stream))).mean() < 2


def test_a_syntax_that_is_not_read_is_named(tmp_path):
    dataset = made(U16, "1.2.840.10008.1.2.4.102")
    dataset.PixelData = pydicom.encaps.encapsulate([bytes(100)])
    why = refusal(save(tmp_path / "film.dcm", dataset))
    assert "MPEG-4" in why and INSTALL in why and "pip install" in why


def test_other_frames_are_not_decoded(tmp_path):
    pytest.importorskip("openjpeg")
    frames = np.stack([smooth(), smooth().T])
    path = save(tmp_path / "two.dcm", made(frames, NumberOfFrames=2, Modality="US"), JPEG2000Lossless)
    content = path.read_bytes()
    second = content.rindex(b"\xff\x4f\xff\x51")
    path.write_bytes(content[:second + 30] + bytes(200) + content[second + 230:])
    assert grey(path) == smooth().ravel().tolist()
    with pytest.raises(Unreadable, match="damaged"):
        grey(path, number=1)


# ----------------------------------------------------------------------------- which way up

LETTERS = np.array([[0, 1, 2], [3, 4, 5]], np.uint16)


@pytest.mark.parametrize("directions, expected", [
    (AXIAL, LETTERS),
    ([0.97, 0.17, 0.17, -0.17, 0.98, 0.05], LETTERS),  # tilted
    ([-1, 0, 0, 0, 1, 0], LETTERS[:, ::-1]),  # from above
    ([-1, 0, 0, 0, -1, 0], LETTERS[::-1, ::-1]),  # prone
    ([0, 1, 0, 1, 0, 0], LETTERS.T),
    ([1, 0, 0, 0, 0, -1], LETTERS),  # coronal
    ([1, 0, 0, 0, 0, 1], LETTERS[::-1]),
    ([0, 0, 1, 1, 0, 0], LETTERS.T[::-1]),
    ([0, 1, 0, 0, 0, -1], LETTERS),  # sagittal
    ([0, -1, 0, 0, 0, -1], LETTERS[:, ::-1]),
    ([0, 0, -1, 0, 1, 0], LETTERS.T),
    ([0, 0, 0, 0, 0, 0], LETTERS)])  # no directions at all
def test_slices_lie_as_they_are_shown(tmp_path, directions, expected):
    path = save(tmp_path / "slice.dcm", made(LETTERS, ImageOrientationPatient=directions, WindowCenter=128,
                                             WindowWidth=256))
    assert shown(path)[..., 0].tolist() == expected.tolist()


def test_a_film_stays_as_it_is_stored(tmp_path):
    film = made(LETTERS, Modality="CR", SOPClassUID=CR, PatientOrientation=["R", "F"], WindowCenter=128,
                WindowWidth=256)
    path = save(tmp_path / "film.dcm", film)
    assert shown(path)[..., 0].tolist() == LETTERS.tolist()
    assert scan_in(path).warnings == ("are stored mirrored or upside down, as their header says, and left so",)


# ----------------------------------------------------------------------------- series

def slice_at(path, height, fill, **elements):
    """A slice whose one grey is `fill`."""
    pixels = np.full((4, 4), fill, np.uint16)
    elements = {"WindowCenter": 128, "WindowWidth": 256, "ImageOrientationPatient": AXIAL,
                "ImagePositionPatient": [-3, 7, height]} | elements
    path.parent.mkdir(exist_ok=True)
    return save(path, made(pixels, **elements))


def greys_of(scan):
    return [decode_picture(frame).getpixel((0, 0))[0] for frame in scan.sources]


def test_slices_are_in_the_order_of_position(tmp_path):
    """And not of names or InstanceNumber; 10 is above 9."""
    for number, height in enumerate([9, -20, 10, 0]):
        slice_at(tmp_path / "ct" / f"{number}", height, 100 + height, InstanceNumber=4 - number)
    (scan,), refused = find_scans(sorted((tmp_path / "ct").iterdir()), ScanSettings(), tmp_path)
    assert (scan.name, refused, scan.warnings) == ("ct", {}, ())
    assert greys_of(scan) == [80, 100, 109, 110]
    assert scan.labels == ("slice 1 of 4", "slice 2 of 4", "slice 3 of 4", "slice 4 of 4")
    slice_at(tmp_path / "ct" / "3", 0, 100, InstanceNumber=1, BurnedInAnnotation="YES")  # one of several says it
    (scan,), _ = find_scans(sorted((tmp_path / "ct").iterdir()), ScanSettings(), tmp_path)
    assert scan.warnings == ("have text burned in, as their header says",)
    (scan,), _ = find_scans(sorted((tmp_path / "ct").iterdir()), ScanSettings(slices="middle"), tmp_path / "ct")
    assert (scan.name, scan.labels, greys_of(scan)) == ("ct", ("slice 2 of 4",), [100])


@pytest.mark.parametrize("directions, heights", [
    ([1, 0, 0, 0, -1, 0], [30, 10, 20]),  # its normal points to the feet
    ([1, 0, 0, 0, 0.8, 0.6], [30, 10, 20])])  # a tilted gantry
def test_order_is_from_feet_to_head(tmp_path, directions, heights):
    for height in heights:
        slice_at(tmp_path / f"{height}.dcm", height, height, ImageOrientationPatient=directions)
    (scan,), _ = find_scans(sorted(tmp_path.iterdir()))
    assert greys_of(scan) == [10, 20, 30]


def test_slices_without_positions(tmp_path):
    for number, location, fill in ((3, 5.0, 10), (1, 2.5, 20), (2, 7.5, 30)):
        bare = {"ImagePositionPatient": None, "ImageOrientationPatient": None, "InstanceNumber": number}
        slice_at(tmp_path / "by_location" / f"{number}.dcm", 0, fill, SliceLocation=location, **bare)
        slice_at(tmp_path / "by_number" / f"{fill}.dcm", 0, fill, **bare)
    for folder, expected in (("by_location", [20, 10, 30]), ("by_number", [20, 30, 10])):
        (scan,), _ = find_scans(sorted((tmp_path / folder).iterdir()))
        assert greys_of(scan) == expected and "no positions" in scan.warnings[0]


def test_what_is_not_of_the_volume_is_a_scan_of_its_own(tmp_path):
    for height in (1, 2, 3):
        slice_at(tmp_path / "ct" / f"{height}", height, height)
    slice_at(tmp_path / "ct" / "scout", 0, 50, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    slice_at(tmp_path / "ct" / "across", 0, 60, ImageOrientationPatient=[1, 0, 0, 0, 0, -1])
    slice_at(tmp_path / "ct" / "other", 0, 70, SeriesInstanceUID="1.2.9")
    save(tmp_path / "ct" / "large", made(np.full((8, 8), 80, np.uint16), ImageOrientationPatient=AXIAL,
                                         ImagePositionPatient=[0, 0, 9]))
    scans, _ = find_scans(sorted((tmp_path / "ct").iterdir()), ScanSettings(), tmp_path)
    assert [(scan.name, len(scan.sources)) for scan in scans] == [
        ("ct", 3), ("ct/across", 1), ("ct/large", 1), ("ct/other", 1), ("ct/scout", 1)]


def test_two_views_are_two_scans(tmp_path):
    for view in ("frontal", "lateral"):
        save(tmp_path / view, made(U16, Modality="DX", SOPClassUID=CR))
    scans, _ = find_scans(sorted(tmp_path.iterdir()), ScanSettings(), tmp_path)
    assert [(scan.name, scan.labels) for scan in scans] == [("frontal", ("",)), ("lateral", ("",))]


def test_phases_of_a_series_are_volumes(tmp_path):
    for phase in (0, 1):
        for height in (2, 1):
            slice_at(tmp_path / f"{phase}{height}.dcm", height, 100 * phase + height,
                     InstanceNumber=10 * phase + height)
    scans, _ = find_scans(sorted(tmp_path.iterdir()), ScanSettings(), tmp_path)
    assert [greys_of(scan) for scan in scans] == [[1, 2], [101, 102]]
    assert len({scan.name for scan in scans}) == 2 and all(scan.warnings == () for scan in scans)
    slice_at(tmp_path / "22.dcm", 2, 202, InstanceNumber=22)
    (scan,), _ = find_scans(sorted(tmp_path.iterdir()), ScanSettings(), tmp_path)
    assert greys_of(scan) == [1, 101, 2, 102, 202] and "at one position" in scan.warnings[0]


def test_a_copied_slice_is_no_other_slice(tmp_path):
    for height in (1, 2):
        slice_at(tmp_path / f"{height}.dcm", height, height)
        (tmp_path / f"{height} (copy).dcm").write_bytes((tmp_path / f"{height}.dcm").read_bytes())
    (scan,), refused = find_scans(sorted(tmp_path.iterdir()), ScanSettings(), tmp_path)
    assert greys_of(scan) == [1, 2] and scan.warnings == () and len(refused) == 2
    assert set(refused.values()) == {"a copy of another file of its series"}


def test_frames_of_one_file(tmp_path):
    """Each has its own position, units and window; what they share counts where they say nothing."""
    def groups(height, slope, **window):
        return item(PlanePositionSequence=[item(ImagePositionPatient=[0, 0, height])],
                    PixelValueTransformationSequence=[item(RescaleSlope=slope, RescaleIntercept=0)],
                    **({"FrameVOILUTSequence": [item(**window)]} if window else {}))

    shared = item(PlaneOrientationSequence=[item(ImageOrientationPatient=[-1, 0, 0, 0, 1, 0])],
                  FrameVOILUTSequence=[item(**FOUR)])
    path = save(tmp_path / "enhanced.dcm", made(
        np.stack([U16, U16 + 1]), NumberOfFrames=2, SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=[groups(20, 1), groups(10, 2, WindowCenter=3, WindowWidth=4)]))
    scan = scan_in(path)
    assert scan.labels == ("slice 1 of 2", "slice 2 of 2") and [frame.place for frame in scan.sources] == [(1,), (0,)]
    upper = np.array(STEPS).reshape(4, 4)[:, ::-1].ravel().tolist()
    assert grey(path, number=1) == upper
    assert grey(path, number=0)[:4] == [255, 255, 255, 85]  # 2 x (1, 2, 3, 4), from 1 to 4, mirrored


def test_frames_of_a_film(tmp_path):
    scan = scan_in(save(tmp_path / "us.dcm", made(np.stack([U16] * 3).astype(np.uint8), NumberOfFrames=3,
                                                  Modality="US")))
    assert scan.labels == ("frame 1 of 3", "frame 2 of 3", "frame 3 of 3") and scan.name == "us.dcm"


def test_who_and_when(tmp_path):
    scan = scan_in(save(tmp_path / "a", made(U16, PatientID="p 1", StudyDate="20200102", StudyTime="0830")))
    assert (scan.patient, scan.study, scan.time) == ("p 1", "1.2", "20200102 0830")
    scan = scan_in(save(tmp_path / "b", made(U16, PatientID="p 1", IssuerOfPatientID="here", StudyInstanceUID=None,
                                             AcquisitionDate="20200103")))
    assert (scan.patient, scan.study, scan.time) == ("p 1\\here", "", "20200103")
    assert scan_in(save(tmp_path / "c", made(U16, PatientID=" ", IssuerOfPatientID="here"))).patient == ""


@pytest.mark.parametrize("elements, kinds", [
    ({}, ()), ({"BurnedInAnnotation": "YES"}, ("have text burned in, as their header says",)),
    ({"Modality": "US"}, ("may have text burned in",)), ({"Modality": "US", "BurnedInAnnotation": "NO"}, ()),
    ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, ("may have text burned in",)),
    ({"RecognizableVisualFeatures": "YES"}, ("show a face or the like, as their header says",))])
def test_what_should_be_looked_at(tmp_path, elements, kinds):
    assert scan_in(save(tmp_path / "a.dcm", made(U16, **elements))).warnings == kinds


# ----------------------------------------------------------------------------- files

@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_files_of_any_name_with_and_without_a_preamble(tmp_path, syntax):
    path = save(tmp_path / "1.2.840", made(U16, syntax, **FOUR, VOILUTFunction="LINEAR"))
    assert kind_of(path) == "dicom" and grey(path) == STEPS
    if syntax == ExplicitVRBigEndian:
        return
    bare, content = tmp_path / "IM0001", path.read_bytes()
    meta = int.from_bytes(content[140:144], "little") + 144  # where the file's own elements end
    bare.write_bytes(content[meta:])
    assert kind_of(bare) == "dicom" and grey(bare) == STEPS
    bare.write_bytes(content[132:])
    assert grey(bare) == STEPS


def test_elements_without_types_in_a_file_that_claims_them(tmp_path):
    """Of pydicom's own files SC_rgb_jpeg.dcm is so written."""
    path = save(tmp_path / "typeless", made(U16, ImplicitVRLittleEndian, **FOUR))
    content = path.read_bytes()
    claim = str(ExplicitVRLittleEndian).encode() + b"\0"  # longer than what it replaces, 1.2.840.10008.1.2, and even
    place = content.index(b"\2\0\x10\0UI")
    length = int.from_bytes(content[place + 6:place + 8], "little")
    more = len(claim) - length
    group = int.from_bytes(content[140:144], "little") + more
    path.write_bytes(content[:140] + group.to_bytes(4, "little") + content[144:place + 6]
                     + len(claim).to_bytes(2, "little") + claim + content[place + 8 + length:])
    assert grey(path) == STEPS


def test_what_is_no_dicom_is_not_mentioned(tmp_path):
    for name, content in (("notes.txt", b"a"), ("empty", b""), ("program", b"\x7fELF" + bytes(300)),
                          ("zeros", bytes(300)), ("two", b"\2\0" + b"abcdefgh" * 30)):
        (tmp_path / name).write_bytes(content)
    assert find_scans(sorted(tmp_path.iterdir())) == ([], {})


def test_objects_without_pixels_are_counted(tmp_path):
    report = made(U16, Modality="SR", SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11", Rows=None, Columns=None)
    del report.PixelData
    assert refusal(save(tmp_path / "report.dcm", report)) == NO_PIXELS
    (tmp_path / "DICOMDIR").write_bytes(bytes(200))
    assert refusal(tmp_path / "DICOMDIR") == NO_PIXELS
    mask = made(U16, Modality="SEG", SOPClassUID="1.2.840.10008.5.1.4.1.1.66.4")
    assert refusal(save(tmp_path / "mask.dcm", mask)) == NO_PICTURE


def test_damage_and_bombs(tmp_path):
    path = save(tmp_path / "film.dcm", made(U16, **FOUR))
    content = path.read_bytes()
    for cut in (0, 100, 140, 300, len(content) - 40, len(content) - 20, len(content) - 1):
        path.write_bytes(content[:cut])
        assert refusal(path) == DAMAGED
    del (bare := made(U16)).PixelData
    assert refusal(save(path, bare)) == DAMAGED
    assert refusal(save(path, made(U16, NumberOfFrames=1000))) == DAMAGED
    assert refusal(save(path, made(U16, NumberOfFrames=10 ** 9))) == TOO_LARGE
    assert refusal(save(path, made(U16, Rows=65535, Columns=65535))) == TOO_LARGE
    path.write_bytes(content[:132] + content[132:].replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99"))
    assert refusal(path) == DEFLATED


def test_a_header_with_words_in_place_of_numbers(tmp_path):
    """Where they would change greys they are refused, where they would only tell the order they are passed over."""
    path = save(tmp_path / "film.dcm", made(U16, RescaleSlope="2.50", RescaleIntercept="0.00", InstanceNumber="12",
                                            **FOUR))
    content = path.read_bytes()
    assert grey(path) == [0, *[212] * 1, *[255] * 14]
    path.write_bytes(content.replace(b"IS\2\0" + b"12", b"IS\2\0" + b"xx"))
    assert grey(path) == [0, 212, *[255] * 14]
    for wrong in (b"2,50", b"0.00", b" nan"):
        path.write_bytes(content.replace(b"2.50", wrong))
        if refused := find_scans([path])[1]:
            assert refused == {path: DAMAGED}
            continue
        with pytest.raises(Unreadable, match="damaged"):
            grey(path)


def test_a_codestream_larger_than_its_header_says(tmp_path):
    pytest.importorskip("openjpeg")
    dataset = made(smooth(), Modality="US")
    dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
    dataset.Rows = 16
    path = save(tmp_path / "bomb.dcm", dataset)
    decoder, decoded = pydicom.pixels.get_decoder(JPEG2000Lossless), []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Unreadable, match="damaged"):
        patch.setattr(type(decoder), "as_array", lambda *arguments, **options: decoded.append(path))
        grey(path)
    assert decoded == []


def test_an_even_film_shows_nothing_but_a_slice_may(tmp_path):
    even = np.full((4, 4), 7, np.uint16)
    with pytest.raises(Unreadable, match="alike"):
        grey(save(tmp_path / "film", made(even, Modality="CR", SOPClassUID=CR)))
    assert grey(save(tmp_path / "slice", made(even))) == [0] * 16
    assert EVEN.startswith("even")


def test_bytes_and_other_processes(tmp_path):
    path = save(tmp_path / "ct.dcm", made(U16, **FOUR))
    frame = scan_in(path).sources[0]
    again = pickle.loads(pickle.dumps(frame))
    assert again == frame and picture_key(again) == picture_key(frame)
    inside = type(frame)(Upload("a", path.read_bytes()), frame.sha256, "dicom", (0,))
    assert np.array_equal(decode_picture(inside), decode_picture(frame)) and inside.key() == frame.key()
    assert picture_key(scan_in(path, "2/4").sources[0]) != picture_key(frame)


# ----------------------------------------------------------------------------- what stays in the hospital

def test_nothing_of_a_header_is_in_a_picture(tmp_path):
    """200 files with names, ids, dates and addresses wherever a header has room."""
    choose = random.Random(0)
    secrets_of = {}
    for number in range(200):
        name, place = f"Zzyzx{number}^Quill", f"{number} Nightjar Lane"
        planted = [name, place, f"MRN-{number:04}-88", f"19{number % 100:02}1231", f"ACC{number:05}77", "Dr Wexcombe"]
        dataset = made(smooth().astype(np.uint16) + number, PatientName=name, PatientAddress=place,
                       PatientID=planted[2], PatientBirthDate=planted[3], AccessionNumber=planted[4],
                       ReferringPhysicianName=planted[5],
                       InstitutionName=place, ImageComments=" ".join(planted), PatientComments=name,
                       StudyDescription=name, SeriesDescription=planted[2], ProtocolName=name, StationName="WEX",
                       StudyDate=planted[3], SeriesInstanceUID=f"1.2.3.{number}", Modality=choose.choice(["CT", "MR"]),
                       BitsStored=12, HighBit=11)
        private = dataset.private_block(0x0011, "MAKER", create=True)
        private.add_new(1, "LO", name)
        private.add_new(2, "OB", name.encode() + b"\0" * (len(name) % 2))
        dataset.add_new(0x60000010, "US", 32)  # an overlay plane, whose bits spell the name
        dataset.add_new(0x60000011, "US", 32)
        dataset.add_new(0x60000022, "LO", name)
        dataset.add_new(0x60003000, "OW", (name.encode() * 10)[:128])
        secrets_of[save(tmp_path / f"{number:03}", dataset)] = planted
    scans, refused = find_scans(sorted(secrets_of), ScanSettings(), tmp_path)
    assert len(scans) == 200 and refused == {}
    settings = ImageSettings(32, "squash", "png", 0)
    for scan in scans:
        (frame,) = scan.sources
        written = b"\n".join([frame.key(), *map(str.encode, (scan.name, *scan.labels, *scan.warnings))])
        planted = secrets_of[frame.file]
        for text in written, encode_image(frame, settings)[0]:
            assert not any(secret.encode() in text for secret in planted)
    plain = made(smooth().astype(np.uint16), BitsStored=12, HighBit=11, Modality="CT", SeriesInstanceUID="1.2.3.0")
    assert grey(save(tmp_path / "plain", plain)) == grey(sorted(secrets_of)[0])
