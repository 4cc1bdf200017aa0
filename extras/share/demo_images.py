"""
From a visitor's files, which stay in memory, to pictures: what a file holds, which of its slices is shown, and in
which window its numbers become greys. Of a header nothing is shown but the place of a slice.
"""

import hashlib
import io
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, TiffImagePlugin

from extras.share.demo_draw import part_of
from plumbing.flags import UserError
from plumbing.pixels import DAMAGED, TOO_LARGE, Unreadable, resize_image, whole_pages
from scans import dicom
from scans.frames import DICOM, Frame, Scan, decode_picture
from scans.pages import MOST_PAGES
from scans.windows import WINDOWS

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
    ([Scan], {name: why it cannot be used}) of [(name, bytes)]: what scans.frames.find_scans says of files on a disk, of
    which a Scan keeps no name or date of its header. at_least: as read_picture takes it. Raises UserError where the
    files are too large.
    """
    if sum(len(content) for _, content in files) > MOST_BYTES:
        raise UserError(f"These files have more than {MOST_BYTES >> 20} MB together, the most that are read.")
    scans, refused, dicoms = {}, {}, {}
    for number, (name, content) in enumerate(files):
        if content[128:132] == b"DICM" or name.lower().endswith(DICOM):
            dicoms[Path(f"{number:05} {Path(name).name}")] = content
            continue
        if name.lower().endswith((".nii", ".nii.gz")):
            refused[name] = "A NIfTI file is not read from memory: upload its DICOM files, or slices as images."
            continue
        try:
            scans[number] = find_pages(name, content, at_least)
        except UserError as error:
            refused[name] = str(error)
    found, why = find_dicoms(dicoms, window)
    return [scan for _, scan in sorted((scans | found).items())], refused | why


def find_pages(name, content, at_least):
    """The Scan of an image file's bytes, which may be of several pages. Raises UserError where it is no image."""
    try:
        if content[:4] in TiffImagePlugin.PREFIXES:
            pages = whole_pages(content, MOST_PAGES)
        else:
            with Image.open(io.BytesIO(content), formats=("PNG", "GIF", "WEBP")) as image:
                pages = range(image.n_frames)
    except Exception:  # as of one page it is read, or refused with the reason
        pages = ()
    sources, labels = (content,), ("",)
    if len(pages) > 1:
        sha256 = hashlib.sha256(content).hexdigest()
        sources = tuple(Frame(content, sha256, "pages", (page,), "") for page in pages)
        labels = tuple(f"page {number} of {len(pages)}" for number in range(1, len(pages) + 1))
    read_picture(sources[0], at_least)
    return Scan(name, sources, labels)


def find_dicoms(files, window):
    """({number of its first file: Scan}, {name: why}) of DICOM files, {Path that is on no disk: bytes}."""
    stacks, warnings, planes, refused = defaultdict(list), defaultdict(list), defaultdict(list), {}
    for path, content in files.items():
        try:
            sha256 = hashlib.sha256(content).hexdigest()
            header, _, start = dicom.read_header(content, sha256)
            dicom.require_readable(header, len(content) - start)
            shots = dicom.shots_of(path, sha256, header, window)
            told, key = list(dicom.warnings_of(header, window)), dicom.stack_of(path, header, shots, planes)
        except (MemoryError, UserError):
            raise
        except Exception as error:  # such as a word where a number should be
            why = error if isinstance(error, Unreadable) else DAMAGED
            refused[path.name[6:]] = f"This file is not an image that can be read: {why}."
            continue
        stacks[key] += shots
        warnings[key] += told
    scans = {}
    for key, shots in stacks.items():
        for volume in dicom.divide(shots):
            kind = "frame" if volume[0].position is None else "slice"
            labels = [f"{kind} {place} of {len(volume)}" for place in range(1, len(volume) + 1)]
            frames = [replace(shot.frame, file=files[shot.frame.file]) for shot in volume]
            first = min(int(shot.frame.file.name[:5]) for shot in volume)
            scans[first] = Scan("", tuple(frames), tuple(labels), warnings=tuple(dict.fromkeys(warnings[key])))
    return scans, refused


def read_picture(source, at_least):
    """The RGB image of one of a Scan's sources. Raises UserError, in one sentence, where there is none."""
    try:
        return decode_picture(source, at_least)
    except Unreadable as error:
        if str(error) == TOO_LARGE:
            raise UserError(f"This image has more than {Image.MAX_IMAGE_PIXELS // 10 ** 6} million "
                            "pixels, the most that are read.") from None
        raise UserError(f"This file is not an image that can be read: {error}.") from None


# ----------------------------------------------------------------------------- windows

def units_of(source):
    """
    (least, greatest, whether they are Hounsfield units) of the physical numbers of one of a Scan's sources; None where
    it has no such numbers, as colours and images of 8 bits, or but one.
    """
    if not isinstance(source, Frame) or source.kind != "dicom":
        return None
    try:
        facts, stored = dicom.read_pixels(source)
    except Exception:  # which read_picture says in a sentence
        return None
    if stored.ndim == 3 or facts.PhotometricInterpretation == "PALETTE COLOR":
        return None
    ends = dicom.rescale(np.array([stored.min(), stored.max()]), facts)
    low, high = float(ends.min()), float(ends.max())
    return (low, high, dicom.in_hounsfield(facts)) if high > low else None


def name_windows(hounsfield, trained):
    """The windows to choose from, as --window writes them; the one that the run was trained in is the first."""
    return list(dict.fromkeys([trained, "auto", "file", *(WINDOWS if hounsfield else ())]))


# ----------------------------------------------------------------------------- what is shown

def show(image, role, size, how, stored=False, classes=None):
    """
    The Shown of an RGB image as the model takes it, see resize_image. stored: it is one that was prepared; where that
    cropped or padded it, what the whole one was is not known. Raises UserError where it cannot be brought to size.
    """
    try:
        seen = np.array(resize_image(image, size, how))
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
