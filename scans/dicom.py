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
import io
import logging
import math
import warnings
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np
from PIL import Image

from plumbing.files import hash_file
from plumbing.flags import UserError
from plumbing.pixels import DAMAGED, EVEN, TOO_LARGE, Unreadable
from scans.frames import Frame, Scan, choose_slices
from scans.windows import apply_window, named_windows, show, windows_of

# Reasons, each without names and numbers, so that few kinds are counted
NO_PIXELS = "no pixels: a report, an index, a plan or the like"
NO_PICTURE = "a segmentation or dose, no picture"
DEFLATED = "a deflated DICOM file, which is not read; save it uncompressed"
INSTALL = "pip install pydicom pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"

STACKED = ("CT", "MR", "PT", "NM")  # modalities whose series are volumes, even where no position is given
OVERLAID = ("US", "IVUS", "OT", "SC", "ES", "XC")  # whose pictures may show letters
MOST_FRAMES = 1 << 16
DEFLATED_SYNTAX = b"1.2.840.10008.1.2.1.99"
SEGMENTATION, DOSE = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.481.2"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"

# What is read of a header besides its group 0028
PLACES = ["Modality", "ImageOrientationPatient", "ImagePositionPatient", "SliceLocation", "InstanceNumber",
          "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "SOPClassUID"]
HEADER = [*PLACES, "ImageType", "PatientID", "IssuerOfPatientID", "StudyInstanceUID", "SeriesInstanceUID", "StudyDate",
          "StudyTime", "AcquisitionDate", "AcquisitionTime", "ContentDate", "ContentTime", "AcquisitionNumber",
          "PatientOrientation", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated", "RescaleType",
          "PhotometricInterpretation", "BurnedInAnnotation", "RecognizableVisualFeatures"]
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


def read_header(path):
    """A file's header as a dataset, without pixels. Raises Unreadable where it has none, or claims too many."""
    pydicom = open_pydicom()
    with open(path, "rb") as file:
        if DEFLATED_SYNTAX in file.read(1024):  # a few bytes of it may fill the memory
            raise Unreadable(DEFLATED)
        file.seek(0)
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=HEADER)
        except Exception as error:  # of many kinds
            raise Unreadable(DAMAGED) from error
        after = file.read(4)
    if not header.get("Rows") or not header.get("Columns"):
        raise Unreadable(NO_PIXELS)
    if header.get("SOPClassUID") in (SEGMENTATION, DOSE):
        raise Unreadable(NO_PICTURE)
    if b"\xe0\x7f" not in (after[:2], after[1::-1]):
        raise Unreadable(DAMAGED)
    frames, samples = (header.get(name) or 1 for name in ("NumberOfFrames", "SamplesPerPixel"))
    if header.Rows * header.Columns > Image.MAX_IMAGE_PIXELS or frames > MOST_FRAMES or samples > 4:
        raise Unreadable(TOO_LARGE)
    require_decoder(header, path.stat().st_size, frames * samples)
    return header


def require_decoder(header, size, planes):
    """Raise Unreadable where no decoder of a file is there, or where it is too small for so many planes."""
    pydicom = open_pydicom()
    syntax = header.file_meta.get("TransferSyntaxUID", pydicom.uid.ImplicitVRLittleEndian)
    if not syntax.is_compressed:
        if size < header.Rows * header.Columns * planes * (header.get("BitsAllocated") or 8) // 8 * 2 // 3:
            raise Unreadable(DAMAGED)  # two thirds: colour may be at half resolution
        return
    try:
        able = pydicom.pixels.get_decoder(syntax).is_available
    except NotImplementedError:
        able = False
    if not able:
        raise Unreadable(f"compressed as {syntax.name}, which needs another decoder: {INSTALL}")


# ----------------------------------------------------------------------------- scans

class Shot(NamedTuple):
    """One frame and its place."""
    frame: Frame
    plane: tuple  # orientation, two directions in hundredths; () where it has none
    position: float | None  # along the normal, in mm
    order: tuple  # where positions do not tell


def normal_of(orientation):
    """The direction in which slices follow one another, towards the head, the back or the left."""
    normal = np.cross(orientation[:3], orientation[3:])
    return normal * np.sign(normal[np.abs(normal).argmax()])


def shots_of(path, header, window):
    """The Shots of a file, in its own order."""
    sha256, shots = hash_file(path), []
    for index in range(int(header.get("NumberOfFrames") or 1)):
        facts = facts_of(header, index)
        orientation, place = (numbers(facts, f"Image{name}Patient", count)
                              for name, count in (("Orientation", 6), ("Position", 3)))
        position = float(np.dot(normal_of(orientation), place)) if orientation and place else None
        order = tuple(numbers(facts, name, 1) for name in ("AcquisitionNumber", "InstanceNumber"))
        shots.append(Shot(Frame(path, sha256, "dicom", (index,), window), tuple(round(100 * cosine) for cosine in
                          orientation), position, (*order, path.name, index)))
    return shots


def find(files, settings, name_of):
    """([Scan], {Path: why}) of DICOM files, as scans.frames.find_scans says; name_of: a path's name."""
    stacks, headers, refused = defaultdict(list), {}, {}
    for path in files:
        try:
            header = read_header(path)
            shots = shots_of(path, header, settings.window)
        except Unreadable as error:
            refused[path] = str(error)
            continue
        several = header.get("SeriesInstanceUID") and len(shots) == 1 and (
            header.get("Modality") in STACKED or shots[0].position is not None)
        key = (path.parent, header.SeriesInstanceUID, patient_of(header), str(header.get("StudyInstanceUID")),
               header.Rows, header.Columns, str(header.get("ImageType")), shots[0].plane) if several else path
        stacks[key] += shots
        headers.setdefault(key, header)
    volumes = [(headers[key], volume) for key, shots in stacks.items() for volume in divide(shots)]
    in_folder = Counter(shots[0].frame.file.parent for _, shots in volumes if len(files_of(shots)) > 1)
    return [scan_of(header, shots, settings, name_of, in_folder) for header, shots in volumes], refused


def files_of(shots):
    return {shot.frame.file for shot in shots}


def divide(shots):
    """
    Lists of Shots, each a volume in order: where each position has as many slices, as in a series of several phases or
    echoes, the first of each position are a volume, and so are the second ones.
    """
    places = defaultdict(list)
    for shot in sorted(shots, key=lambda shot: shot.order):
        places[shot.plane, shot.position].append(shot)
    if len(files_of(shots)) > 1 and (None not in {shot.position for shot in shots}) and len(
            {len(some) for some in places.values()}) == 1:
        return [sorted(volume, key=lambda shot: shot.position) for volume in zip(*places.values())]
    return [sorted(shots, key=lambda shot: (shot.plane, shot.position is None, shot.position or 0, shot.order))]


def scan_of(header, shots, settings, name_of, in_folder):
    """The Scan of a volume's Shots, which are in order."""
    first, count = shots[0].frame.file, len(shots)
    whole = len(files_of(shots)) > 1 and in_folder[first.parent] == 1
    kind = "slice" if shots[0].position is not None or header.get("Modality") in STACKED else "frame"
    labelled = [(shot.frame, f"{kind} {number} of {count}" if count > 1 else "")
                for number, shot in enumerate(shots, 1)]
    frames, labels = zip(*choose_slices(labelled, settings.slices))
    return Scan(name_of(first.parent if whole else first), frames, labels, patient_of(header),
                str(header.get("StudyInstanceUID") or ""), time_of(header), tuple(warnings_of(header, shots, settings)))


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


def warnings_of(header, shots, settings):
    """Kinds of what somebody should look at."""
    burned_in = str(header.get("BurnedInAnnotation") or "")
    if burned_in == "YES":
        yield "have text burned in, as their header says"
    elif burned_in != "NO" and (header.get("Modality") in OVERLAID or
                                str(header.get("SOPClassUID")).startswith(SECONDARY_CAPTURE)):
        yield "may have text burned in"
    if header.get("RecognizableVisualFeatures") == "YES":
        yield "show a face or the like, as their header says"
    if len(shots) > 1 and shots[0].position is None and header.get("Modality") in STACKED:
        yield "have no positions: their slices are in the order of InstanceNumber"
    if named_windows(settings.window) and not in_hounsfield(header):
        yield f"are not in Hounsfield units: shown as --window=auto in place of {settings.window}"


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
        shown = upright(shown, numbers(facts, "ImageOrientationPatient", 6))
    except (Unreadable, MemoryError, UserError):
        raise
    except Exception as error:  # each decoder has its own ways to fail on a broken file
        raise Unreadable(DAMAGED) from error
    alone = (facts.get("NumberOfFrames") or 1) == 1 and facts.get("Modality") not in STACKED
    if alone and (stored == stored.flat[0]).all():  # a slice may be empty
        raise Unreadable(EVEN)
    return Image.fromarray(np.ascontiguousarray(shown)).convert("RGB")


def read_pixels(frame):
    """(facts of its header, stored numbers (H, W) or RGB (H, W, 3)) of a Frame; no other frame is decoded."""
    pydicom = open_pydicom()
    header, (index,) = pydicom.Dataset(), frame.place
    with io.BytesIO(frame.file) if isinstance(frame.file, bytes) else open(frame.file, "rb") as file:
        head = file.read(132)
        options = {}
        if head[128:] != b"DICM" and head[:2] != b"\2\0":
            options["transfer_syntax_uid"] = pydicom.uid.ExplicitVRLittleEndian if head[4:6].isalpha() else (
                pydicom.uid.ImplicitVRLittleEndian)
        stored = pydicom.pixels.pixel_array(file, ds_out=header, index=index, specific_tags=[
            pydicom.datadict.tag_for_keyword(name) for name in PLACES], **options)
    return facts_of(header, index), stored


def colours(stored, facts):
    """RGB of 8 bits, (H, W, 3)."""
    if stored.ndim == 2:
        stored = open_pydicom().pixels.apply_color_lut(stored, facts)[..., :3]
        bits = 8 * stored.itemsize
    else:
        bits = facts.BitsStored
    return stored.astype(np.uint8) if bits == 8 else (stored * (255 / (2 ** bits - 1))).round().astype(np.uint8)


def greys(stored, facts, window):
    """uint8, (H, W) or for three windows (H, W, 3), of stored numbers (H, W) in a --window."""
    whole, padded = stored.dtype.kind in "iu", is_padding(stored, facts)
    low = int(stored.min()) if whole else 0
    # Many pixels have few numbers: each number is looked at once
    values = rescale(np.arange(low, int(stored.max()) + 1), facts) if whole else stored
    own, counted = own_window(facts, values), None
    if named_windows(window) and not in_hounsfield(facts):
        window = "auto"
    windows = windows_of(window)
    if own is None and "auto" in windows:
        counted = stored[~padded] if padded.any() else stored.reshape(-1)
        counted = values[counted - low] if whole else counted
    shown = show(values, windows, own, counted)
    shown = shown[stored - low] if whole else shown
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
    slope, intercept = (numbers(facts, f"Rescale{name}", 1) for name in ("Slope", "Intercept"))
    return stored * slope[0] + intercept[0] if slope and intercept and slope[0] else stored


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


def own_window(facts, values):
    """A function that shows physical numbers as their header says; None where it says nothing."""
    if table := (facts.get("VOILUTSequence") or [None])[0]:
        def by_table(values):
            grey, most = look_up(values, table, facts)
            return np.clip(grey * 255 / most, 0, 255).round().astype(np.uint8)

        return by_table
    centre, width = (numbers(facts, f"Window{name}", 1) for name in ("Center", "Width"))
    function = str(facts.get("VOILUTFunction") or "LINEAR")
    if centre and width and width[0] >= 1 - (function != "LINEAR") and width[0] > 0:
        return functools.partial(apply_window, window=(*centre, *width, function))
    if facts.BitsStored <= 8 and facts.get("PixelRepresentation") == 0 and facts.get("Modality") not in STACKED:
        most = (1 << facts.BitsStored) - 1  # as other pictures of 8 bits, which are never stretched
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
