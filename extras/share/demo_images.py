"""
From a visitor's files, which stay in memory, to pictures: what a file holds, which of its slices is shown, and in
which window its numbers become greys. Of a header nothing is shown but the place of a slice.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from extras.share.demo_draw import part_of
from formats.frames import Frame, ScanSettings, Upload, decode_picture, find_scans
from formats.pictures import file_of
from formats.windows import WINDOWS
from plumbing.flags import UserError
from plumbing.pixels import TOO_LARGE, UNKNOWN, Unreadable, resize_image
from formats import dicom, nifti

MOST = 8  # images of a conversation
MOST_BYTES = 100 << 20  # of a visitor's files, such as the slices of a series, at a time
SHARP = 704  # pixels of the longer side of a whole image that is drawn: twice what .picture is wide


@dataclass
class Shown:
    """An image of a conversation."""
    role: str  # what is written before it, such as "prior"
    seen: np.ndarray  # (H, W, 3) uint8, as the model sees it
    whole: np.ndarray | None  # (H, W, 3) uint8, to draw boxes on; None where what it was cut from is not known
    part: tuple | None  # what of the whole the model sees, as part_of gives it
    classes: dict  # {class: probability} of the classifier, where there is one


# ----------------------------------------------------------------------------- files

def find_in(files, window, at_least):
    """
    ([Scan], {name: why it cannot be used}) of [(name, bytes)], in their order: what formats.frames.find_scans says, of
    which a Scan keeps no name or date of its header. at_least: as read_picture takes it. Raises UserError where the
    files are too large.
    """
    if sum(len(content) for _, content in files) > MOST_BYTES:
        raise UserError(f"These files have more than {MOST_BYTES >> 20} MB together, the most that are read.")
    uploads, found = [Upload(name, content) for name, content in files], {}
    scans, refused = find_scans(uploads, ScanSettings(window))
    used = {file_of(source) for scan in scans for source in scan.sources}
    why = {file: sentence_of(refused.get(file, UNKNOWN)) for file in uploads if file not in used}
    for scan in scans:
        first = min(map(file_of, scan.sources), key=uploads.index)
        try:
            read_picture(scan.sources[0], at_least)
            found[first] = replace(scan, patient="", study="", time="")
        except UserError as error:
            why[first] = str(error)
    return [found[file] for file in uploads if file in found], {file.name: why[file] for file in uploads if file in why}


def sentence_of(reason):
    return f"This file is not an image that can be read: {reason}."


def read_picture(source, at_least):
    """The RGB image of one of a Scan's sources. Raises UserError, in one sentence, where there is none."""
    try:
        return decode_picture(source, at_least)
    except Unreadable as error:
        if str(error) == TOO_LARGE:
            raise UserError(f"This image has more than {Image.MAX_IMAGE_PIXELS // 10 ** 6} million "
                            "pixels, the most that are read.") from None
        raise UserError(sentence_of(error)) from None


# ----------------------------------------------------------------------------- windows

def units_of(source):
    """
    (least, greatest, whether they are Hounsfield units) of the physical numbers of one of a Scan's sources; None where
    it has no such numbers, as colours and images of 8 bits, or but one.
    """
    if not isinstance(source, Frame) or source.kind not in ("dicom", "nifti"):
        return None
    try:
        if source.kind == "nifti":
            voxels, ends, _ = nifti.read_volume(source.file, source.sha256, source.place[0])
            coloured, hounsfield = voxels.ndim > 3, False
        else:
            facts, stored = dicom.read_pixels(source)
            coloured = stored.ndim == 3 or facts.PhotometricInterpretation == "PALETTE COLOR"
            ends, hounsfield = dicom.rescale(np.array([stored.min(), stored.max()]), facts), dicom.in_hounsfield(facts)
        low, high = (float(end(ends[np.isfinite(ends)])) for end in (np.min, np.max))
    except Exception:  # which read_picture says in a sentence
        return None
    return (low, high, hounsfield) if high > low and not coloured else None


def name_windows(hounsfield, trained):
    """The windows to choose from, as --window writes them; the one that the run was trained in is the first."""
    return list(dict.fromkeys([trained, "auto", "file", *(WINDOWS if hounsfield else ())]))


# ----------------------------------------------------------------------------- what is shown

def show(image, role, size, how, stored=False, classes=None):
    """
    The Shown of an RGB image as the model takes it, see resize_image. stored: it is one that was prepared, and so of
    its size; where that cropped or padded it, what the whole one was is not known. Raises UserError where it cannot be
    brought to size.
    """
    try:
        seen = np.array(image if stored else resize_image(image, size, how))
    except Unreadable as error:
        raise UserError(f"This image cannot be used: {error}.") from None
    if stored and how in ("crop", "pad"):
        return Shown(role, seen, None, None, classes or {})
    part, whole = part_of(*image.size, how), image.copy()
    whole.thumbnail((SHARP, SHARP), Image.Resampling.BICUBIC)
    return Shown(role, seen, np.asarray(whole), part, classes or {})


def in_window(source, window):
    """One of a Scan's sources in another window."""
    return replace(source, window=window)
