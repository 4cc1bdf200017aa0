"""
Slides of many resolutions, through openslide or, where that is missing, tifffile: an overview, or tiles of a level.

The overview is the smallest level of 1,024 pixels or more on its longer side. Tiles are those of --tiles=level:pixels
that show something, from the left above, row by row; the last of a row or column is moved in so far that it is whole.
One shows something where a tenth of its pixels on the overview is coloured: glass is grey. The label and the photograph
of the whole slide, which may show a name, are never read.
"""

import functools
import logging
import math

import numpy as np
from PIL import Image

from formats.frames import Frame, Scan, Upload
from plumbing.files import hash_file
from plumbing.pixels import DAMAGED, TOO_LARGE, Unreadable, lay_over_black

OVERVIEW = 1024  # pixels of its longer side, at least
MOST_PIXELS = 1 << 28  # of a level, which tifffile reads as a whole
COLOURED, SHARE = 20, 0.1  # greatest less least channel, of 255; of a tile's pixels
NO_LEVEL = "a slide without the level that --tiles names"
IN_MEMORY = "a slide, which is read from a disk alone"
EMPTY = "a slide of which no tile shows anything"
UNREAD = "a slide that another package reads: pip install openslide-python openslide-bin"


def with_openslide(path):
    """What open_slide gives, through openslide; None where that is missing or cannot read it."""
    try:
        import openslide
    except ImportError:
        return None
    if not openslide.OpenSlide.detect_format(path):
        return None
    slide = openslide.OpenSlide(path)

    def read(level, left, top, width, height):
        scale = slide.level_downsamples[level]  # a place is told in pixels of the largest level
        return lay_over_black(slide.read_region((round(left * scale), round(top * scale)), level, (width, height)))

    return slide.level_dimensions, read


def with_tifffile(path):
    """What open_slide gives, through tifffile. Raises Unreadable."""
    try:
        import tifffile
        logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)  # what is wrong is counted
    except ImportError:
        raise Unreadable(UNREAD) from None
    try:
        levels = tifffile.TiffFile(path).series[0].levels
        sizes = [(level.keyframe.imagewidth, level.keyframe.imagelength) for level in levels]
    except (tifffile.TiffFileError, IndexError):
        raise Unreadable(UNREAD) from None

    @functools.lru_cache(1)
    def whole(level):
        if math.prod(sizes[level]) > MOST_PIXELS:
            raise Unreadable(UNREAD)
        try:
            pixels = levels[level].asarray()
        except ValueError:  # it is packed as imagecodecs alone can read
            raise Unreadable(UNREAD) from None
        if pixels.dtype != np.uint8 or pixels.shape[2:] not in ((), (3,), (4,)):
            raise Unreadable(UNREAD)
        return pixels

    def read(level, left, top, width, height):
        return lay_over_black(Image.fromarray(np.ascontiguousarray(
            whole(level)[top:top + height, left:left + width])))

    return sizes, read


@functools.lru_cache(1)
def open_slide(path, sha256):
    """
    ((width, height) of each level, a function that reads a region (level, left, top, width, height) as 8-bit RGB) of
    a slide. sha256 tells it from another at its path.
    """
    return with_openslide(path) or with_tifffile(path)


def overview_of(sizes):
    """Number of the smallest level that is large enough; the largest level where none is."""
    return max([level for level, size in enumerate(sizes) if max(size) >= OVERVIEW] or [0])


def starts(length, size):
    """Where tiles of a size begin along a side, the last moved in."""
    return [min(first, max(length - size, 0)) for first in range(0, length, size)]


def tiles_of(sizes, read, level, size):
    """(left, top, width, height) of a level's tiles that show something."""
    (width, height), overview = sizes[level], overview_of(sizes)
    coloured = np.ptp(np.asarray(read(overview, 0, 0, *sizes[overview])), -1) >= COLOURED
    scale = sizes[overview][0] / width
    for top in starts(height, size):
        for left in starts(width, size):
            box = left, top, min(size, width), min(size, height)
            first, above, wide, high = (round(number * scale) for number in box)
            if coloured[above:above + max(high, 1), first:first + max(wide, 1)].mean() >= SHARE:
                yield box


def pictures_of(path, tiles):
    """Frames of a slide's overview, or of its tiles. Raises Unreadable, or as the slide's package does."""
    if isinstance(path, Upload):
        raise Unreadable(IN_MEMORY)
    sha256 = hash_file(path)
    sizes, read = open_slide(path, sha256)
    level, size = map(int, tiles.split(":")) if tiles else (overview_of(sizes), max(sizes[0]))
    if level >= len(sizes):
        raise Unreadable(NO_LEVEL)
    if min(size, sizes[level][0]) * min(size, sizes[level][1]) > Image.MAX_IMAGE_PIXELS:
        raise Unreadable(TOO_LARGE)
    boxes = list(tiles_of(sizes, read, level, size)) if tiles else [(0, 0, *sizes[level])]
    if not boxes:
        raise Unreadable(EMPTY)
    return [Frame(path, sha256, "slides", (level, *box)) for box in boxes]


def find(files, settings, name_of):
    """([Scan], {file: why}) of slides, as formats.frames.find_scans says; name_of: a path's name."""
    scans, refused = [], {}
    for path in files:
        try:
            pictures = pictures_of(path, settings.tiles)
        except MemoryError:
            raise
        except Exception as error:  # each package has its own ways to fail on a broken file
            refused[path] = str(error) if isinstance(error, Unreadable) else DAMAGED
            continue
        labels = [f"tile {number} of {len(pictures)}" for number in range(1, len(pictures) + 1)]
        scans.append(Scan(name_of(path), tuple(pictures), tuple(labels) if settings.tiles else ("",)))
    return scans, refused


def decode(frame):
    """A Frame's overview or tile, 8-bit RGB; raises Unreadable, with the reason."""
    try:
        _, read = open_slide(frame.file, frame.sha256)
        return read(*frame.place)
    except (Unreadable, MemoryError):
        raise
    except Exception as error:  # as in find
        raise Unreadable(DAMAGED) from error
