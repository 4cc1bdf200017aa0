"""
Pictures that are not simply an image file: slices of a volume, frames of a DICOM file, pages of a TIFF, tiles of a
slide. `find_pictures` lists what a file holds; each is decoded where it is needed, with the window that is wanted.

    scans/dicom.py    DICOM through pydicom: physical units, windows, orientation, series in the order of position
    scans/nifti.py    NIfTI through nibabel
    scans/pages.py    TIFF, GIF, APNG and WebP of several pages
    scans/slides.py   pyramidal slides through tifffile or openslide

Nothing of a header leaves this room but pixels, the place of a slice, and what a Scan says to group by.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from plumbing.pixels import load_image


@dataclass(frozen=True)
class Frame:
    """One picture of a file that holds several, or whose pixels are no 8-bit colours."""
    file: Path | bytes  # where it is, or what it holds
    sha256: str  # of the file's content
    kind: str  # dicom, nifti, pages or slides: the module that decodes it
    place: tuple = ()  # which of the file's pictures, as that module counts
    window: str = "auto"  # as --window says

    def key(self):
        """What tells it from other pictures, as bytes."""
        return repr((self.sha256, self.kind, self.place, self.window)).encode()


def picture_key(source):
    """sha256 of what a picture is, bytes of an image file or a Frame: two with one key are one picture."""
    return hashlib.sha256(source.key() if isinstance(source, Frame) else source).digest()


def decode_picture(source, at_least=0):
    """
    An upright 8-bit RGB PIL image of bytes of an image file or of a Frame; at_least: as plumbing.pixels.load_image
    takes it. Raises Unreadable, with the reason.
    """
    if not isinstance(source, Frame):
        return load_image(source, at_least)
    raise NotImplementedError(source.kind)


@dataclass(frozen=True)
class ScanSettings:
    """What of a volume or slide is shown, and how its numbers become grey: flags of prepare/all.py."""
    window: str = "auto"
    slices: str = "all"
    tiles: str = ""


@dataclass(frozen=True)
class Scan:
    """What is one to a person, a photograph, a film or a volume, in a file or in a series of files."""
    name: str  # of its file, or of the folder of its series, from where was looked
    sources: tuple  # its pictures in the order of position: Path of a plain image file, or Frame
    labels: tuple  # of each: "" where it is the only one, else "slice 3 of 40", "page 2 of 5"
    patient: str = ""  # as the header says it: to group by, hashed before it is written
    study: str = ""  # the same
    time: str = ""  # of the study, to put studies in order; never written
    warnings: tuple = ()  # kinds that are counted: "may have text burned in"


def find_scans(files, settings=ScanSettings(), folder=None):
    """
    ([Scan], {Path: why it cannot be used}) of these files; those of one DICOM series become one Scan. folder: names
    are relative to it. A file that is no picture at all is not mentioned in either.
    """
    raise NotImplementedError
