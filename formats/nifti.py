"""
NIfTI files through nibabel: slices of a volume, upright, in physical numbers.

Slices are axial, seen from below with the patient's right at the image's left, from feet to head; of a volume whose
voxels are half as long again in another direction the slices are those across it, as formats/dicom.py shows them.
Pixels are the voxels, whatever their size.
"""

import functools
import gzip
import logging
import math

import numpy as np
from PIL import Image

from formats.frames import Frame, Upload, choose_slices, keep_last, make_scan, size_of
from formats.windows import apply_window, named_windows, show, windows_of
from plumbing.files import hash_file
from plumbing.flags import UserError
from plumbing.pixels import DAMAGED, TOO_LARGE, Unreadable

MOST_VOXELS = 1 << 28  # of one volume: 512 x 512 x 1,024
MOST_UPLOADED = 1 << 26  # the same of an Upload, beside which there may be others'
MOST_VOLUMES = 1 << 12
MOST_PACKED = 1032  # times as many bytes as before is what gzip can make
SAMPLED = 1 << 18  # voxels of a volume that give its range
NO_GREYS = "a segmentation, or numbers that are no greys"
LABEL = 1002  # the NIfTI intent of a segmentation


def open_volume(path):
    """A NIfTI file as nibabel opens it, without its voxels. Raises Unreadable, and UserError without nibabel."""
    try:
        import nibabel
        logging.getLogger("nibabel.global").setLevel(logging.CRITICAL + 1)  # what is wrong is counted
    except ImportError:
        raise UserError(f"{path}: nibabel, which reads NIfTI files, is missing: pip install nibabel") from None
    try:
        image = load_upload(path) if isinstance(path, Upload) else nibabel.load(path)
        kind, shape = image.header.get_data_dtype(), image.shape
        size = size_of(path) * (MOST_PACKED if path.suffix.lower() == ".gz" else 1) - image.dataobj.offset
    except Exception as error:  # of many kinds
        raise Unreadable(DAMAGED) from error
    if int(image.header["intent_code"]) == LABEL or not (kind.names in (("R", "G", "B"), ("R", "G", "B", "A")) or
                                                         kind.kind in "iuf"):
        raise Unreadable(NO_GREYS)
    if min(shape, default=0) < 1 or len(shape) < 2 or math.prod(shape) * kind.itemsize > size:
        raise Unreadable(DAMAGED)
    most = MOST_UPLOADED if isinstance(path, Upload) else MOST_VOXELS
    if math.prod(shape[:3]) > most or math.prod(shape[3:]) > MOST_VOLUMES:
        raise Unreadable(TOO_LARGE)
    return image


def load_upload(file):
    """An Upload as nibabel.load opens a file of its name; of a packed one no more is unpacked than is read."""
    import nibabel
    content = file.open("rb")
    content = gzip.GzipFile(fileobj=content) if file.suffix.lower() == ".gz" else content
    second = content.read(4) in (b"\x1c\x02\0\0", b"\0\0\x02\x1c")  # 540, the length of NIfTI-2's header
    content.seek(0)
    return (nibabel.Nifti2Image if second else nibabel.Nifti1Image).from_stream(content)


def slices_of(image):
    """(axis of the body across which its slices lie, 0 from left, 1 from back, 2 from below; how many there are)."""
    import nibabel
    to_body = nibabel.io_orientation(image.affine)[:, 0]
    lengths = np.linalg.norm(image.affine[:3, :3], axis=0)
    length_of, count_of = {}, {}
    for place, axis in enumerate(to_body):
        length_of[int(axis)] = lengths[place]
        count_of[int(axis)] = image.shape[place] if place < len(image.shape) else 1
    longest = max((2, 0, 1), key=length_of.get)
    axis = longest if length_of[longest] > 1.5 * length_of[2] else 2
    return axis, count_of[axis]


def find(files, settings, name_of):
    """([Scan], {file: why}) of NIfTI files, as formats.frames.find_scans says; name_of: a path's name."""
    scans, refused = [], {}
    for path in files:
        try:
            image = open_volume(path)
            axis, count = slices_of(image)
        except Unreadable as error:
            refused[path] = str(error)
            continue
        except (ValueError, KeyError, np.linalg.LinAlgError):  # a matrix that turns nothing into anything
            refused[path] = DAMAGED
            continue
        volumes, sha256, pictures, chosen = math.prod(image.shape[3:]), hash_file(path), [], []
        for volume in range(volumes):
            of = f"volume {volume + 1} of {volumes}, " if volumes > 1 else ""
            some = [(Frame(path, sha256, "nifti", (volume, axis, number), settings.window),
                     f"{of}slice {number + 1} of {count}" if count * volumes > 1 else "") for number in range(count)]
            pictures += some
            chosen += choose_slices(some, settings.slices)
        scans.append(make_scan(name_of(path), pictures, chosen, "", "", "", tuple(warnings_of(image, settings))))
    return scans, refused


def warnings_of(image, settings):
    """Kinds of what somebody should look at."""
    if not int(image.header["sform_code"]) and not int(image.header["qform_code"]):
        yield "do not say which side is left: taken as if the first voxel were at the right"
    if named_windows(settings.window):
        yield f"do not say their units: shown in --window={settings.window} as if these were Hounsfield units"


@keep_last(1)
def read_volume(path, sha256, number):
    """
    (voxels (X, Y, Z) or (X, Y, Z, 3) with axes to the right, the front and the head, numbers that give their range,
    the window that the header states or None) of a file's volume. sha256 tells a file from another at its path.
    """
    import nibabel
    image = open_volume(path)
    place = np.unravel_index(number, image.shape[3:], order="F") if image.shape[3:] else ()
    voxels = np.asanyarray(image.dataobj[(..., *map(int, place))])
    voxels = voxels.reshape(voxels.shape + (1,) * (3 - voxels.ndim))
    voxels = nibabel.apply_orientation(voxels, nibabel.io_orientation(image.affine))
    if voxels.dtype.names:
        voxels = np.stack([voxels[name] for name in "RGB"], -1)
    flat = voxels.reshape(-1)
    low, high = (float(image.header[name]) for name in ("cal_min", "cal_max"))
    window = ((low + high) / 2, high - low, "LINEAR_EXACT") if high > low else None
    return voxels, flat[::-(-flat.size // SAMPLED)], window


def decode(frame):
    """A Frame's picture, upright 8-bit RGB; raises Unreadable, with the reason."""
    number, axis, place = frame.place
    try:
        voxels, counted, window = read_volume(frame.file, frame.sha256, number)
    except (Unreadable, MemoryError, UserError):
        raise
    except Exception as error:  # whatever the bytes make of gzip, NumPy or nibabel
        raise Unreadable(DAMAGED) from error
    # The body's axes lead to the right, the front and the head, a picture's to the left, the back and the feet
    pixels = voxels.take(place if axis == 2 else voxels.shape[axis] - 1 - place, axis)[::-1, ::-1].swapaxes(0, 1)
    if pixels.ndim == 2:
        own = functools.partial(apply_window, window=window) if window else None
        pixels = show(pixels, windows_of(frame.window), own, counted)
    return Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")
