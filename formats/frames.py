"""
Pictures that are not simply an image file: slices of a volume, frames of a DICOM file, pages of a TIFF, tiles of a
slide. `find_scans` lists what files hold; each picture is decoded where it is needed, with the window that is wanted.

    formats/windows.py   numbers to greys
    formats/dicom.py     DICOM through pydicom: physical units, windows, orientation, series in the order of position
    formats/nifti.py     NIfTI through nibabel
    formats/pages.py     TIFF, GIF, APNG and WebP of several pages
    formats/slides.py    pyramidal slides through tifffile or openslide
    formats/pictures.py whatever a table calls a picture

Nothing of a header leaves this room but pixels, the place of a slice, and what a Scan says to group by.
"""

import functools
import hashlib
import importlib
import io
import os
import re
import weakref
from collections import defaultdict
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
from PIL import Image, TiffImagePlugin

from plumbing.own import written
from plumbing.pixels import SUFFIXES, enough_pixels, load_image, resize_image

EXPLICIT = (b"CS", b"UI", b"UL", b"DA", b"LO", b"SH", b"OB", b"US")  # types of a DICOM file's first element
DICOM = (".dcm", ".dicom", ".ima")
SLIDES = (".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide")
TILE_WIDTH = 322  # number of a TIFF's tag
STARTS = re.compile(  # of image files, as far as no text begins so
    rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a|RIFF.{4}WEBP|\0\0\0\x0cjP  |\xff\x4f\xff\x51|BM.{12}[\x0c(48@l|]\0\0\0|"
    rb"P[1-6f]\s+(#|\d+\s+\d+\s)|" + b"|".join(map(re.escape, TiffImagePlugin.PREFIXES)), re.S)


@dataclass(frozen=True, eq=False)
class Upload:
    """A file in memory, with what of a Path is needed to read it. Two of one content are two files."""
    name: str
    content: bytes = field(repr=False)

    def __str__(self):
        return self.name

    @property
    def suffix(self):
        return Path(self.name).suffix

    @property
    def parent(self):
        return Path(self.name).parent

    def open(self, mode):
        return io.BytesIO(self.content)

    def read_bytes(self):
        return self.content


@dataclass(frozen=True)
class Frame:
    """One picture of a file that holds several, or whose pixels are no 8-bit colours."""
    file: Path | Upload
    sha256: str  # of the file's content
    kind: str  # dicom, nifti, pages or slides: the module that decodes it
    place: tuple = ()  # which of the file's pictures, as that module counts
    window: str = "auto"  # as --window says

    def key(self):
        """What tells it from other pictures, as bytes."""
        return repr((self.sha256, self.kind, self.place, self.window)).encode()


def picture_key(source):
    """
    sha256 of what a picture is, an image file (bytes, Path or Upload) or a Frame: two with one key are one picture.
    """
    return hashlib.sha256(source.key() if isinstance(source, Frame) else content_of(source)).digest()


def content_of(file):
    """The bytes of an image file: bytes, Path or Upload."""
    return file if isinstance(file, bytes) else file.read_bytes()


def decode_picture(source, at_least=0):
    """
    An upright 8-bit RGB PIL image of an image file (bytes, Path or Upload) or of a Frame; at_least: as
    plumbing.pixels.load_image takes it. Raises Unreadable, with the reason.
    """
    if isinstance(source, Frame):
        return module_of(source.kind).decode(source)
    return load_image(content_of(source), at_least)


def pixels_of(source, size, how):
    """
    What decode_picture gives, brought to size as prepare/ brings it, see plumbing.pixels.resize_image: (H, W, 3) uint8.
    Raises Unreadable, with the reason.
    """
    return np.array(resize_image(decode_picture(source, enough_pixels(size, how)), size, how))


def module_of(kind):
    """The module of this folder that reads files of a kind. It imports this one, and so is imported late."""
    return importlib.import_module(f"formats.{kind}")


def size_of(file):
    """Bytes of a Path's or an Upload's content."""
    with file.open("rb") as content:
        return content.seek(0, os.SEEK_END)


def keep_last(most):
    """functools.lru_cache of a function of a file, and more; of an Upload nothing is kept once that is gone."""
    def decorate(function):
        @functools.lru_cache(most)
        def kept(file, *rest):
            return function(file() if isinstance(file, weakref.ref) else file, *rest)

        @functools.wraps(function)
        def call(file, *rest):
            key = weakref.ref(file, lambda _: kept.cache_clear()) if isinstance(file, Upload) else file
            return kept(key, *rest)

        return call

    return decorate


@dataclass(frozen=True)
class ScanSettings:
    """What of a volume or slide is shown, and how its numbers become grey: flags of prepare/all.py."""
    window: str = "auto"
    slices: str = "all"
    tiles: str = ""


def settings_of(image):
    """The ScanSettings that a manifest's image settings have, where there are scans; else those without a flag."""
    return ScanSettings(**{item.name: image[item.name] for item in fields(ScanSettings) if item.name in image})


@dataclass(frozen=True)
class Scan:
    """What is one to a person, a photograph, a film or a volume, in a file or in a series of files."""
    name: str  # of its file, or of the folder of its series, from where was looked
    sources: tuple  # its pictures in the order of position: a Path or Upload of a plain image file, or Frame
    labels: tuple  # of each: "" where it is the only one, else "slice 3 of 40", "page 2 of 5"
    patient: str = ""  # as the header says it: to group by, hashed before it is written
    study: str = ""  # the same
    time: str = ""  # of the study, to put studies in order; never written
    warnings: tuple = ()  # kinds that are counted: "may have text burned in"
    left_out: tuple = ()  # sources that --slices does not show


def make_scan(name, pictures, chosen, *more):
    """The Scan of a volume's (source, label)s, of which the chosen are shown; more: the fields behind its labels."""
    shown = {source for source, _ in chosen}
    return Scan(name, *zip(*chosen), *more, left_out=tuple(source for source, _ in pictures if source not in shown))


def choose_slices(pictures, slices):
    """
    Of a volume's pictures, in order, those that --slices says, as a tuple: all; the middle, of an even number the
    one before it; every:5, the first and each fifth after it; a number, so many at even distances, the first and
    the last among them, but for one alone, which is the middle.
    """
    count, last = len(pictures), len(pictures) - 1
    if slices.startswith("every:"):
        return tuple(pictures[::int(slices[6:])])
    if slices == "all" or slices != "middle" and int(slices) >= count:
        return tuple(pictures)
    if slices in ("middle", "1"):
        return tuple(pictures[last // 2:last // 2 + 1])
    wanted = int(slices) - 1
    return tuple(pictures[(2 * number * last + wanted) // (2 * wanted)] for number in range(wanted + 1))


def kind_of(file):
    """
    Of which kind the pictures of a Path or an Upload are: "dicom", "nifti", ..., "plain" for an image file, "" where it
    has none.
    """
    name = file.name.lower()
    with file.open("rb") as content:
        head = content.read(132)
    if head[128:] == b"DICM" or name == "dicomdir" or name.endswith(DICOM):
        return "dicom"
    if name.endswith((".nii", ".nii.gz")):
        return "nifti"
    if name.endswith(SLIDES):
        return "slides"
    if file.suffix.lower() in SUFFIXES or STARTS.match(head):
        return kind_of_image(file, head)
    # Old files begin with their first element, of group 2 or 8, whose type or length is small
    bare = head[:2] in (b"\2\0", b"\x08\0") and (head[4:6] in EXPLICIT or head[5:8] == bytes(3))
    return "dicom" if bare else ""


def kind_of_image(file, head):
    """kind_of of an image file that begins with `head`: "plain", "pages" or "slides"."""
    if not head.startswith((*TiffImagePlugin.PREFIXES, b"GIF8", b"\x89PNG", b"RIFF")):
        return "plain"
    try:
        with file.open("rb") as content, Image.open(content, formats=("TIFF", "PNG", "GIF", "WEBP")) as image:
            if image.format != "TIFF":
                return "pages" if image.is_animated else "plain"
            if image.width * image.height > Image.MAX_IMAGE_PIXELS and TILE_WIDTH in image.tag_v2:
                return "slides"
            return "pages" if image.n_frames > 1 and len(module_of("pages").pages_of(file)) > 1 else "plain"
    except Image.DecompressionBombError:
        return "slides" if head[:4] in TiffImagePlugin.PREFIXES else "plain"
    except Exception:  # as a plain image it is refused with the reason
        return "plain"


def find_scans(files, settings=ScanSettings(), folder=None):
    """
    ([Scan], {file: why it cannot be used}) of files, Paths or Uploads; those of one DICOM series in one folder become
    one Scan. folder: names are relative to it. A file that is no picture at all is not mentioned in either. Raises
    UserError where a package that reads them is missing.
    """
    def name_of(file):
        name = Path(os.path.relpath(file, folder)).as_posix() if folder else str(file)
        return written(os.path.basename(os.path.abspath(folder)) if folder and name == "." else name)

    of_kind, refused = defaultdict(list), {}
    for file in files:
        try:
            of_kind[kind_of(file)].append(file)
        except OSError as error:
            refused[file] = f"cannot be read: {error.strerror}"
    of_kind.pop("", None)
    scans = [Scan(name_of(file), (file,), ("",)) for file in of_kind.pop("plain", ())]
    for kind, some in of_kind.items():
        found, why = module_of(kind).find(some, settings, name_of)
        scans += found
        refused |= why
    return sorted(scans, key=lambda scan: scan.name), refused
