"""
DICOM files through pydicom: what each picture's header says of units, windows, place and orientation is done to its
pixels, and no more of the header leaves this file than a Scan and a Frame hold.

- Stored numbers become physical ones (PS3.3 C.11.1), then greys (C.11.2); MONOCHROME1 is inverted; padding is black.
- Slices of CT, MR and others with a position lie as they are shown: axial ones from below, the patient's right at the
  image's left; coronal ones from the front; sagittal ones face left. They are in order from feet to head, from front
  to back or from right to left, whatever the files are called. Films stay as they are stored, as viewers show them.
- One series in one folder is one Scan, but for pictures of another size, orientation or ImageType, such as scouts;
  each film is a Scan of its own.
"""

import functools
import logging
import math
import operator
import struct
import warnings
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np
from PIL import Image

from formats.frames import Frame, choose_slices, keep_last, make_scan, size_of
from formats.windows import apply_window, named_windows, show, windows_of
from plumbing.files import hash_file
from plumbing.flags import UserError
from plumbing.pixels import DAMAGED, EVEN, TOO_LARGE, Unreadable

# Reasons, each without names and numbers, so that few kinds are counted
NO_PIXELS = "no pixels: a report, an index, a plan or the like"
COPY = "a copy of another file of its series"
NO_PICTURE = "a segmentation or dose, no picture"
DEFLATED = "a deflated DICOM file, which is not read; save it uncompressed"
INSTALL = "pip install pydicom pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"

STACKED = ("CT", "MR", "PT")  # modalities whose series are volumes, even where no position is given
OVERLAID = ("US", "IVUS", "OT", "SC", "ES", "XC")  # whose pictures may show letters
MOST_FRAMES = 1 << 16
MOST_NUMBERS = 1 << 17  # between the least and the greatest stored one, to look at each once
TYPES = (b"OB", b"OW", b"OF", b"OD", b"UN")  # of pixels, where a file writes them
SAME_PLANE = 0.02  # difference of direction cosines: one degree
DEFLATED_SYNTAX = b"1.2.840.10008.1.2.1.99"
SEGMENTATION, DOSE = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.481.2"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"

# All that is read of a header. Of what a Scan says and of where a slice lies something may be written wrongly
PLACES = ["SOPClassUID", "Modality", "ImageType", "PatientID", "IssuerOfPatientID", "StudyInstanceUID",
          "SeriesInstanceUID", "StudyDate", "StudyTime", "AcquisitionDate", "AcquisitionTime", "ContentDate",
          "ContentTime", "BurnedInAnnotation", "RecognizableVisualFeatures", "PatientOrientation",
          "ImageOrientationPatient", "ImagePositionPatient", "SliceLocation", "InstanceNumber"]
PICTURE = ["SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
           "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration",
           "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "ExtendedOffsetTable",
           "ExtendedOffsetTableLengths",
           "RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence", "WindowCenter", "WindowWidth",
           "VOILUTFunction", "VOILUTSequence",
           *(f"{kind}PixelPadding{end}" for kind in ("", "Float", "DoubleFloat") for end in ("Value", "RangeLimit")),
           *(name for colour in ("RedPaletteColorLookupTable", "GreenPaletteColorLookupTable",
                                 "BluePaletteColorLookupTable")
             for name in (f"{colour}Descriptor", f"{colour}Data", f"Segmented{colour}Data"))]
PIXELS = {b"\x08\0": "FloatPixelData", b"\x09\0": "DoubleFloatPixelData", b"\x10\0": "PixelData"}
MACROS = ("PixelValueTransformationSequence", "FrameVOILUTSequence", "PlaneOrientationSequence",
          "PlanePositionSequence")


@functools.cache
def open_pydicom():
    """pydicom, which says nothing: its words name values of a header. Raises UserError where it is missing."""
    try:
        import pydicom
        import pydicom.pixels
    except ImportError:
        raise UserError(f"a DICOM file is among these, and pydicom, which reads them, is missing: {INSTALL}") from None
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    for name in ("pydicom", "pylibjpeg", "libjpeg", "openjpeg"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", module="pydicom")
    return pydicom


# ----------------------------------------------------------------------------- headers

def facts_of(header, index):
    """A header as a dataset, with what a frame's functional groups say of it laid over what all frames share."""
    facts = open_pydicom().Dataset()
    facts.update(header)
    shared, own = (header.get(f"{kind}FunctionalGroupsSequence") or [] for kind in ("Shared", "PerFrame"))
    for groups in (*shared[:1], *own[index:index + 1]):
        for macro in MACROS:
            for item in (groups.get(macro) or [])[:1]:
                facts.update(item)
    return facts


def numbers(facts, name, count):
    """An element's numbers as a tuple of floats, () unless there are so many, all finite."""
    try:
        value = facts.get(name)
        values = tuple(map(float, () if value is None else [value] if isinstance(value, (int, float, str)) else value))
    except (TypeError, ValueError):
        return ()
    return values[:count] if len(values) >= count and all(map(math.isfinite, values[:count])) else ()


@keep_last(2)
def read_header(file, sha256):
    """
    (a file's header as a dataset, the name of its element of pixels, where that begins). Raises Unreadable where there
    are no pixels, or as pydicom does. sha256 tells it from another at its path.
    """
    with file.open("rb") as content:
        if DEFLATED_SYNTAX in content.read(1024):  # a few bytes of it may fill the memory
            raise Unreadable(DEFLATED)
        content.seek(0)
        header = open_pydicom().dcmread(content, stop_before_pixels=True, force=True, specific_tags=PLACES + PICTURE)
        require_values(header)
        if not header.get("Rows") or not header.get("Columns"):
            raise Unreadable(NO_PIXELS if header.get("SOPClassUID") else DAMAGED)
        implicit, little = header.original_encoding
        group, element, kind = (content.read(2) for _ in range(3))
        if not little:
            group, element = group[::-1], element[::-1]
        if group != b"\xe0\x7f" or element not in PIXELS:
            raise Unreadable(DAMAGED)
        # Some files are written without types although they say otherwise, which pydicom notices and does not tell
        return header, PIXELS[element], content.tell() + (6 if kind in TYPES and not implicit else 2)


def require_values(header):
    """Take from a header what cannot be read of its PLACES. Raises as pydicom does where it is of its PICTURE."""
    for name in PLACES:
        try:
            header.get(name)
        except Exception:  # a word where a number should be, or a type that is none
            del header[name]
    for name in PICTURE:
        header.get(name)


def syntax_of(header):
    """The transfer syntax of a file, as pydicom has found it where the file does not say it."""
    uid = open_pydicom().uid
    return header.file_meta.get("TransferSyntaxUID") or (
        uid.ImplicitVRLittleEndian if header.original_encoding[0] else uid.ExplicitVRLittleEndian)


def require_readable(header, size):
    """Raise Unreadable where a header is no picture's, or claims what its `size` bytes of pixels cannot hold."""
    frames, samples = (int(header.get(name) or 1) for name in ("NumberOfFrames", "SamplesPerPixel"))
    if header.get("SOPClassUID") in (SEGMENTATION, DOSE):
        raise Unreadable(NO_PICTURE)
    if header.Rows * header.Columns > Image.MAX_IMAGE_PIXELS or frames > MOST_FRAMES or samples > 4:
        raise Unreadable(TOO_LARGE)
    syntax, pydicom = syntax_of(header), open_pydicom()
    if not syntax.is_compressed:
        bits = header.Rows * header.Columns * frames * samples * header.BitsAllocated
        half_colour = header.get("PhotometricInterpretation") == "YBR_FULL_422"
        if 8 * size < bits * (2 if half_colour else 3) // 3:
            raise Unreadable(DAMAGED)
        return
    if size < 8 * frames:  # what introduces a frame's bytes
        raise Unreadable(DAMAGED)
    try:
        able = pydicom.pixels.get_decoder(syntax).is_available
    except NotImplementedError:
        able = False
    if not able:
        raise Unreadable(f"compressed as {syntax.name}, which needs another decoder: {INSTALL}")


# ----------------------------------------------------------------------------- scans

class About(NamedTuple):
    """What a Scan says of its header, which itself may be large."""
    patient: str
    study: str
    time: str
    stacked: bool  # whether several are slices of a volume, wherever they lie
    warnings: tuple


class Shot(NamedTuple):
    """One frame and its place."""
    frame: Frame
    orientation: tuple  # direction cosines of a row and of a column; () where there are none
    position: float | None  # along the normal, in mm
    location: float | None  # SliceLocation, which is less sure
    order: tuple  # where neither tells


def orientation_of(facts):
    """Direction cosines of a row and of a column, () where there are none."""
    cosines = numbers(facts, "ImageOrientationPatient", 6)
    return cosines if cosines and np.linalg.norm(np.cross(cosines[:3], cosines[3:])) > 0.5 else ()


def position_of(facts, orientation):
    """Where a slice lies, in mm towards the head, the back or the left; None where that is not said."""
    place = numbers(facts, "ImagePositionPatient", 3)
    if not orientation or not place:
        return None
    normal = np.cross(orientation[:3], orientation[3:])
    return round(float(normal @ place * np.sign(normal[np.abs(normal).argmax()])), 2)


def shots_of(path, sha256, header, window):
    """The Shots of a file, in its own order."""
    shots = []
    for index in range(int(header.get("NumberOfFrames") or 1)):
        facts = facts_of(header, index)
        orientation = orientation_of(facts)
        location = numbers(facts, "SliceLocation", 1)
        shots.append(Shot(Frame(path, sha256, "dicom", (index,), window), orientation, position_of(facts, orientation),
                          location[0] if location else None, (numbers(facts, "InstanceNumber", 1), path.name, index)))
    return shots


def find(files, settings, name_of):
    """([Scan], {file: why}) of DICOM files, as formats.frames.find_scans says; name_of: a path's name."""
    stacks, about, planes, refused, seen = defaultdict(list), {}, defaultdict(list), {}, set()
    for path in files:
        try:
            if path.name.lower() == "dicomdir":
                raise Unreadable(NO_PIXELS)
            sha256 = hash_file(path)
            header, _, start = read_header(path, sha256)
            require_readable(header, size_of(path) - start)
            shots = shots_of(path, sha256, header, settings.window)
            told = About(patient_of(header), str(header.get("StudyInstanceUID") or ""), time_of(header),
                         header.get("Modality") in STACKED, tuple(warnings_of(header, settings.window)))
            key = stack_of(path, header, shots, planes)
            if (key, sha256) in seen:
                raise Unreadable(COPY)
        except (MemoryError, UserError):
            raise
        except Exception as error:  # such as a word where a number should be
            refused[path] = str(error) if isinstance(error, Unreadable) else DAMAGED
            continue
        seen.add((key, sha256))
        stacks[key] += shots
        before = about.setdefault(key, told)
        about[key] = before._replace(warnings=tuple(dict.fromkeys(before.warnings + told.warnings)))
    volumes = [(about[key], volume) for key, shots in stacks.items() for volume in divide(shots)]
    in_folder = Counter(shots[0].frame.file.parent for _, shots in volumes if len(files_of(shots)) > 1)
    return [scan_of(told, shots, settings.slices, name_of, in_folder) for told, shots in volumes], refused


def stack_of(path, header, shots, planes):
    """What the files of one stack of slices have in common; a file that is a Scan of its own: its path."""
    series = header.get("SeriesInstanceUID")
    if not series or len(shots) > 1 or shots[0].position is None and header.get("Modality") not in STACKED:
        return path
    key = (path.parent, series, patient_of(header), str(header.get("StudyInstanceUID")), header.Rows, header.Columns,
           str(header.get("ImageType")))
    mine = shots[0].orientation
    for number, plane in enumerate(planes[key]):
        if len(plane) == len(mine) and all(abs(one - other) < SAME_PLANE for one, other in zip(plane, mine)):
            return *key, number
    planes[key].append(mine)
    return *key, len(planes[key]) - 1


def files_of(shots):
    return {shot.frame.file for shot in shots}


def divide(shots):
    """
    Lists of Shots, each a volume in order: where each position has as many slices, as in a series of several phases or
    echoes, the first of each position are a volume, and so are the second ones.
    """
    if None in {shot.position for shot in shots}:
        locations = {shot.location for shot in shots} - {None}
        by = "location" if len(locations) == len(shots) else "order"
        return [sorted(shots, key=operator.attrgetter(by))]
    places = defaultdict(list)
    for shot in sorted(shots, key=lambda shot: shot.order):
        places[shot.position].append(shot)
    if len(files_of(shots)) > 1 and len({len(some) for some in places.values()}) == 1:
        return [sorted(volume, key=lambda shot: shot.position) for volume in zip(*places.values())]
    return [sorted(shots, key=lambda shot: (turned(shot.orientation), shot.position, shot.order))]


def turned(orientation):
    """Direction cosines in hundredths, by which a file's planes are told apart."""
    return tuple(round(100 * cosine) for cosine in orientation)


def scan_of(told, shots, slices, name_of, in_folder):
    """The Scan of a volume's Shots, which are in order. in_folder: how many volumes of several files each has."""
    first, count = shots[0].frame.file, len(shots)
    whole = len(files_of(shots)) > 1 and in_folder[first.parent] == 1
    kind = "slice" if shots[0].position is not None or told.stacked else "frame"
    labelled = [(shot.frame, f"{kind} {number} of {count}" if count > 1 else "")
                for number, shot in enumerate(shots, 1)]
    places = {(turned(shot.orientation), shot.position) for shot in shots}
    warnings = told.warnings
    if count > 1 and None in {shot.position for shot in shots}:
        warnings += ("have no positions: their slices are in the order of SliceLocation, or else of InstanceNumber",
                     ) * told.stacked
    elif len(places) < count:
        warnings += "have several slices at one position, and not as many at each",
    return make_scan(name_of(first.parent if whole else first), labelled, choose_slices(labelled, slices),
                     told.patient, told.study, told.time, warnings)


def patient_of(header):
    """PatientID, and behind a backslash, which is in no id, who issued it; "" where there is none."""
    patient, issuer = (str(header.get(name) or "").strip() for name in ("PatientID", "IssuerOfPatientID"))
    return f"{patient}\\{issuer}" if patient and issuer else patient


def time_of(header):
    """When the study was made, as far as its header says, in a form that sorts."""
    for kind in ("Study", "Acquisition", "Content"):
        if header.get(f"{kind}Date"):
            return f"{header[f'{kind}Date'].value} {header.get(f'{kind}Time') or ''}".strip()
    return ""


def warnings_of(header, window):
    """Kinds of what somebody should look at, as the header alone tells them."""
    burned_in = str(header.get("BurnedInAnnotation") or "")
    if burned_in == "YES":
        yield "have text burned in, as their header says"
    elif burned_in != "NO" and (header.get("Modality") in OVERLAID or
                                str(header.get("SOPClassUID")).startswith(SECONDARY_CAPTURE)):
        yield "may have text burned in"
    if header.get("RecognizableVisualFeatures") == "YES":
        yield "show a face or the like, as their header says"
    along, down = [*(header.get("PatientOrientation") or ()), "", ""][:2]
    if not orientation_of(header) and ("R" in along[:1] or "H" in down[:1]):
        yield "are stored mirrored or upside down, as their header says, and left so"
    if named_windows(window) and not in_hounsfield(header):
        yield f"are not in Hounsfield units: shown as --window=auto in place of {window}"


# ----------------------------------------------------------------------------- pictures

def in_hounsfield(facts):
    """Whether the numbers of a picture are Hounsfield units."""
    return facts.get("RescaleType") == "HU" or facts.get("Modality") == "CT"


def decode(frame):
    """A Frame's picture, upright 8-bit RGB; raises Unreadable, with the reason."""
    try:
        facts, stored = read_pixels(frame)
        shown = colours(stored, facts) if stored.ndim == 3 or facts.PhotometricInterpretation == "PALETTE COLOR" else (
            greys(stored, facts, frame.window))
        shown = upright(shown, orientation_of(facts))
    except (Unreadable, MemoryError, UserError):
        raise
    except Exception as error:  # each decoder has its own ways to fail on a broken file
        raise Unreadable(DAMAGED) from error
    alone = (facts.get("NumberOfFrames") or 1) == 1 and facts.get("Modality") not in STACKED
    if alone and (stored == stored[0, 0]).all():  # a slice may be empty
        raise Unreadable(EVEN)
    return Image.fromarray(np.ascontiguousarray(shown)).convert("RGB")


def read_pixels(frame):
    """(facts of its header, stored numbers (H, W) or RGB (H, W, 3)) of a Frame; no other frame is decoded."""
    pydicom, (index,) = open_pydicom(), frame.place
    header, name, start = read_header(frame.file, frame.sha256)
    facts, syntax = facts_of(header, index), syntax_of(header)
    options = pydicom.pixels.as_pixel_options(header, pixel_keyword=name, transfer_syntax_uid=syntax)
    spare = 0  # bits below the stored ones
    if name == "PixelData" and "HighBit" in facts and not syntax.is_compressed:
        spare = max(facts.HighBit + 1 - facts.BitsStored, 0)
        options["bits_stored"] = facts.BitsStored + spare
    with frame.file.open("rb") as content:
        content.seek(start)
        if syntax.is_compressed:
            require_size(pydicom.encaps.get_frame(
                content, index, number_of_frames=options["number_of_frames"],
                extended_offsets=options.get("extended_offsets")), header)
            content.seek(start)
        stored, _ = pydicom.pixels.get_decoder(syntax).as_array(content, index=index, **options)
    return facts, stored >> spare if spare else stored


def require_size(codestream, header):
    """Raise Unreadable where a frame of JPEG, JPEG-LS or JPEG 2000 says that it is larger than its header."""
    size = 0, 0
    if codestream[:4] == b"\xff\x4f\xff\x51":  # JPEG 2000, whose size is where its last pixel is
        size = struct.unpack_from(">II", codestream, 8)[::-1]
    elif codestream[:2] == b"\xff\xd8":
        place = 2
        while place + 9 <= len(codestream) and size == (0, 0):
            marker, length = struct.unpack_from(">HH", codestream, place)
            if marker == 0xFFF7 or 0xFFC0 <= marker <= 0xFFCF and marker not in (0xFFC4, 0xFFC8, 0xFFCC):
                size = struct.unpack_from(">HH", codestream, place + 5)
            place += 2 + length
    if size[0] > header.Rows or size[1] > header.Columns:
        raise Unreadable(DAMAGED)


def colours(stored, facts):
    """RGB of 8 bits, (H, W, 3), of colours (H, W, 3) or numbers (H, W) of a palette's."""
    most = (1 << facts.BitsStored) - 1
    if stored.ndim == 2:
        stored = open_pydicom().pixels.apply_color_lut(stored, facts)[..., :3]
        most = 255 if stored.max() < 256 else 65535  # whatever the header says, as many write it wrongly
    return stored.astype(np.uint8) if most == 255 else (stored * (255 / most)).round().astype(np.uint8)


def greys(stored, facts, window):
    """uint8, (H, W) or for three windows (H, W, 3), of stored numbers (H, W) in a --window."""
    padded, low, high = is_padding(stored, facts), stored.min(), stored.max()
    # Many pixels have few numbers: each number is looked at once
    few = stored.dtype.kind in "iu" and int(high) - int(low) < MOST_NUMBERS
    places = stored.astype(np.intp) - int(low) if few else ...
    values = rescale(np.arange(int(low), int(high) + 1) if few else stored, facts)
    own, counted = own_window(facts), None
    if named_windows(window) and not in_hounsfield(facts):
        window = "auto"
    windows = windows_of(window)
    if own is None and "auto" in windows:
        counted = values[places][~padded]
    shown = show(values, windows, own, counted)
    shown = shown[places]
    if facts.PhotometricInterpretation == "MONOCHROME1":
        shown = 255 - shown
    shown[padded] = 0
    return shown


def is_padding(stored, facts):
    """Where stored numbers stand for no pixel, (H, W) bool: PixelPaddingValue, or from it to its range limit."""
    kind = "" if stored.dtype.kind in "iu" else "Float" if stored.itemsize == 4 else "DoubleFloat"
    ends = [numbers(facts, f"{kind}PixelPadding{end}", 1) for end in ("Value", "RangeLimit")]
    ends = [signed_like(end[0], facts) for end in ends if end]
    return (stored >= min(ends)) & (stored <= max(ends)) if ends else np.zeros(stored.shape, bool)


def signed_like(number, facts):
    """A number that a header may have written without its sign, or with one that the pixels do not have."""
    signed, range_of = facts.get("PixelRepresentation") == 1, 1 << (facts.get("BitsAllocated") or 16)
    if signed and number >= range_of / 2:
        return number - range_of
    return number + range_of if number < 0 and not signed and facts.get("PixelRepresentation") == 0 else number


def rescale(stored, facts):
    """Physical numbers of stored ones, of any shape: by the table of their header, or slope and intercept."""
    if table := (facts.get("ModalityLUTSequence") or [None])[0]:
        return look_up(stored, table, facts)[0]
    factors = []
    for name, default in (("RescaleSlope", 1), ("RescaleIntercept", 0)):
        factors.append((numbers(facts, name, 1) or (math.nan,))[0] if facts.get(name) is not None else default)
    slope, intercept = factors
    if not slope or math.isnan(slope + intercept):
        raise Unreadable(DAMAGED)
    return stored * slope + intercept


def look_up(values, table, facts):
    """(numbers of a header's table for whole numbers, the greatest that the table may hold), see PS3.3 C.11.1.1."""
    count, first, bits = table.LUTDescriptor
    count = count or 1 << 16
    content = table.LUTData
    if isinstance(content, bytes):
        order = "<" if facts.original_encoding[1] is not False else ">"
        content = np.frombuffer(content, np.uint8 if len(content) < 2 * count else f"{order}u2")
    content = np.atleast_1d(np.asarray(content, np.int64))[:count]
    return content[np.clip(np.asarray(values).round().astype(np.int64) - int(signed_like(first, facts)), 0,
                           len(content) - 1)], (1 << bits) - 1


def own_window(facts):
    """A function that shows physical numbers as their header says; None where it says nothing."""
    if table := (facts.get("VOILUTSequence") or [None])[0]:
        def by_table(values):
            grey, most = look_up(values, table, facts)
            return np.clip(grey * 255 / most, 0, 255).round().astype(np.uint8)

        return by_table
    centre, width = (numbers(facts, f"Window{name}", 1) for name in ("Center", "Width"))
    function = str(facts.get("VOILUTFunction") or "LINEAR").upper()
    if centre and width and width[0] > 0:
        return functools.partial(apply_window, window=(*centre, *width, function))
    bits = facts.get("BitsStored") or 16
    if bits <= 8 and facts.get("PixelRepresentation") == 0 and facts.get("Modality") not in STACKED:
        most = (1 << bits) - 1  # as other pictures of 8 bits, which are never stretched
        return functools.partial(apply_window, window=(most / 2, most, "LINEAR_EXACT"))
    return None


def upright(pixels, orientation):
    """
    Pixels (H, W) or (H, W, 3) turned and mirrored as a slice of these direction cosines, of a row and of a column, is
    shown: see the top of this file. () leaves them.
    """
    if not orientation:
        return pixels
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    # Of x to the left, y to the back and z to the head: which way an image's right and its lower edge lie
    right, down = {0: ((0, 1, 0), (0, 0, -1)), 1: ((1, 0, 0), (0, 0, -1)), 2: ((1, 0, 0), (0, 1, 0))}[
        int(np.abs(np.cross(row, column)).argmax())]
    if abs(row @ right) < abs(column @ right):
        pixels, row, column = pixels.swapaxes(0, 1), column, row
    pixels = pixels[:, ::-1] if row @ right < 0 else pixels
    return pixels[::-1] if column @ down < 0 else pixels
