"""
Image files of several pages: TIFF, GIF, APNG and WebP. Each page is a picture, decoded as plumbing/pixels.py says; a
TIFF's thumbnails and masks are none.
"""

from PIL import Image, TiffImagePlugin

from formats.frames import Frame, choose_slices, make_scan
from plumbing.files import hash_file
from plumbing.pixels import DAMAGED, SEVERAL, Unreadable, load_image, whole_pages

MOST_PAGES = 1 << 12


def pages_of(file):
    """Numbers of an image file's pages. Raises Unreadable, or as Pillow does."""
    with file.open("rb") as content:
        if content.read(4) in TiffImagePlugin.PREFIXES:
            return whole_pages(file.read_bytes(), MOST_PAGES)
        with Image.open(content, formats=("PNG", "GIF", "WEBP")) as image:
            return range(image.n_frames)


def find(files, settings, name_of):
    """([Scan], {file: why}) of files of several pages, as formats.frames.find_scans says; name_of: a path's name."""
    scans, refused = [], {}
    for path in files:
        try:
            pages = pages_of(path)
        except Exception as error:  # each decoder has its own ways to fail on a broken file
            refused[path] = str(error) if isinstance(error, Unreadable) else DAMAGED
            continue
        if len(pages) > MOST_PAGES:
            refused[path] = SEVERAL
            continue
        sha256 = hash_file(path)
        pictures = [(Frame(path, sha256, "pages", (page,), ""), f"page {number} of {len(pages)}")
                    for number, page in enumerate(pages, 1)]
        scans.append(make_scan(name_of(path), pictures, choose_slices(pictures, settings.slices)))
    return scans, refused


def decode(frame):
    """A Frame's page, upright 8-bit RGB; raises Unreadable, with the reason."""
    return load_image(frame.file.read_bytes(), page=frame.place[0])
