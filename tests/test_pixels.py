"""
Every cell of the table in docs/images.md, by files of each kind, written here byte by byte where Pillow
cannot.
"""

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import plumbing.pixels
import prepare.shards
from data import Record
from formats.frames import pixels_of
from plumbing.flags import UserError
from plumbing.pixels import (DEEP_PIXELS, FIT_STEP, FORMATS, SMART_LEAST, SMART_MOST, SUFFIXES, Unreadable,
                             load_image, one_channel, open_stored, resize_flags, resize_image, smart_shape, stretch,
                             tails)
from prepare.folder import read_folder
from prepare.shards import ImageSettings, encode_image
from test_prepare import write_toy

RANDOM = np.random.default_rng(0)
GREY = np.asarray(Image.fromarray(RANDOM.integers(0, 256, (6, 8), np.uint8)).resize((32, 24)))
COLOUR = np.asarray(Image.fromarray(RANDOM.integers(0, 256, (6, 8, 3), np.uint8)).resize((32, 24)))
FILM = GREY.astype(np.uint16) * 16 + 7  # 12 bits in 16
SLIDE = COLOUR.astype(np.uint16) * 16 + 7
GREYS = np.repeat(GREY[..., None], 3, -1)
REASONS = [value for value in vars(plumbing.pixels).values() if isinstance(value, str)]


# ----------------------------------------------------------------------------- files

def saved(pixels, form, mode=None, **settings):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    stream = io.BytesIO()
    (image.convert(mode) if mode else image).save(stream, form, **settings)
    return stream.getvalue()


def png(pixels, *chunks):
    """A PNG of uint16, (H, W) or (H, W, C): 2 channels are grey and alpha. Chunks go before its pixels."""
    H, W, C = np.atleast_3d(pixels).shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", W, H, 16, {1: 0, 2: 4, 3: 2, 4: 6}[C], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")))


def tiff(*pages, order="<", packed=False):
    """A TIFF of pages: arrays (H, W[, C]) of any type, each with a dict of tags, None to take one away."""
    content = (b"II*\0" if order == "<" else b"MM\0*") + bytes(4)
    link = 4  # where the place of the next page's tags is to be written
    for pixels, tags in pages:
        H, W, C = np.atleast_3d(pixels).shape
        body = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
        body = zlib.compress(body) if packed else body
        tags = {256: W, 257: H, 258: (8 * pixels.itemsize,) * C, 259: 8 if packed else 1,
                262: 1 if C < 3 else 2, 273: len(content), 277: C, 278: H, 279: len(body),
                339: ({"u": 1, "i": 2, "f": 3}[pixels.dtype.kind],) * C} | tags
        content += body
        fields = b""
        for tag, value in sorted(tags.items()):
            values = value if isinstance(value, tuple) else () if value is None else (value,)
            packed_values = struct.pack(f"{order}{len(values)}I", *values)
            if len(values) > 1:
                content, packed_values = content + packed_values, struct.pack(order + "I", len(content))
            fields += struct.pack(order + "HHI", tag, 4, len(values)) + packed_values if values else b""
        content = content[:link] + struct.pack(order + "I", len(content)) + content[link + 4:]
        link = len(content) + 2 + len(fields)
        content += struct.pack(order + "H", len(fields) // 12) + fields + bytes(4)
    return content


def tiffs(pixels, **tags):
    """The same page in both orders of bytes, compressed and not."""
    tags = {int(name[1:]): value for name, value in tags.items()}
    return [tiff((pixels, tags), order=order, packed=packed) for order in "<>" for packed in (False, True)]


def stretched(values, counted=None):
    """What values of more than 8 bits become, as (H, W, 3): percentiles 0.5 and 99.5 become 0 and 255."""
    values = values.astype(np.float64)
    counted = values if counted is None else counted.astype(np.float64)
    low, high = np.percentile(counted[np.isfinite(counted)], (0.5, 99.5))
    with np.errstate(invalid="ignore"):
        grey = np.nan_to_num(np.rint(((values - low) * 255 / (high - low)).clip(0, 255)))
    return grey if grey.ndim == 3 else np.repeat(grey[..., None], 3, -1)


def with_alpha(pixels, opaque):
    """The pixels with an alpha channel: nothing can be seen of four rows, and of two the half."""
    alpha = np.full(pixels.shape[:2], opaque, pixels.dtype)
    alpha[:4], alpha[4:6] = 0, opaque // 2
    return np.dstack([pixels, alpha])


def over_black(rgb):
    rgb = rgb.astype(np.float64)
    rgb[:4], rgb[4:6] = 0, rgb[4:6] / 2
    return rgb


def turned(form, pixels, **settings):
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(pixels, form, exif=exif, **settings)


def all_forms(pixels, *others, tolerance=0):
    """{column: cases} of 8-bit pixels that Pillow writes in every format."""
    wanted = np.asarray(Image.fromarray(pixels).convert("RGB"))
    return {"PNG": [(saved(pixels, "PNG"), wanted, 0)],
            "TIFF": [(content, wanted, 0) for content in (saved(pixels, "TIFF"), *tiffs(pixels))],
            "other formats": [(saved(pixels, form, **settings), wanted, tolerance)
                              for form, settings in others]}


FINE = {"quality": 100, "subsampling": 0}
LOSSLESS = [("BMP", {}), ("PPM", {}), ("WEBP", {"lossless": True}), ("JPEG2000", {})]
PALETTE = Image.fromarray(COLOUR).quantize(64)
COLOURS = np.array(PALETTE.getpalette()).reshape(-1, 3)
PAINTED = np.asarray(PALETTE.convert("RGB"))
MAP = tuple(np.pad(COLOURS, ((0, 256 - len(COLOURS)), (0, 0))).T.flatten().tolist())  # reds first
PALE = COLOUR // 4 + 96  # colours that LAB holds
WHITE = COLOUR.copy()
WHITE[:8] = 255
FLOATS = FILM / np.float32(1000) - 2
HOLES = FLOATS.copy()
HOLES[:3], HOLES[3, 0], HOLES[3, 1] = np.nan, np.inf, -np.inf
DEEP_LA, DEEP_RGBA = with_alpha(FILM, 65535), with_alpha(SLIDE, 65535)
SEEN_LA, SEEN_RGBA = (over_black(stretched(values, values[4:])) for values in (FILM, SLIDE))


def refused(**contents):
    """{column: cases} of files that are refused."""
    return {name.replace("_", " "): [(content, None, 0) for content in files]
            for name, files in contents.items()}


def shallow_kinds():
    """{row of the table: {column: [(file, wanted pixels or None, tolerance)]}} of up to 8 bits a channel."""
    ones = np.asarray(Image.fromarray(GREY).convert("1"))
    bilevel = np.repeat(ones[..., None], 3, -1) * 255
    white_ones = tiff((np.packbits(ones, axis=1), {256: 32, 258: 1, 262: 0}))
    colours, greys = all_forms(COLOUR, *LOSSLESS, ("JPEG", FINE), tolerance=9), all_forms(GREY, *LOSSLESS)
    cmyk, ycbcr = Image.fromarray(COLOUR).convert("CMYK"), Image.fromarray(COLOUR).convert("YCbCr")
    return {
        "1 bit": {
            "PNG": [(saved(ones, "PNG"), bilevel, 0)],
            "TIFF": [(saved(ones, "TIFF", compression=name), bilevel, 0) for name in (None, "group4")],
            "other formats": [(saved(ones, form), bilevel, 0) for form in ("BMP", "PPM")]},
        "8-bit grey or RGB": {column: colours[column] + greys[column] for column in colours},
        "signed 8-bit numbers": refused(TIFF=tiffs((GREY.astype(int) - 128).astype(np.int8))[:2]),
        "zero is white, up to 8 bits": {
            "TIFF": [(content, 255 - GREYS, 0) for content in tiffs(GREY, _262=0)]
            + [(white_ones, 255 - bilevel, 0)]},
        "nothing said of which is white": refused(TIFF=tiffs(GREY, _262=None) + tiffs(FILM, _262=None)),
        "a palette": {
            "PNG": [(saved(PALETTE, "PNG"), PAINTED, 0)],
            "TIFF": [(saved(PALETTE, "TIFF", compression=name), PAINTED, 0) for name in (None, "tiff_lzw")]
            + [(tiff((np.asarray(PALETTE), {262: 3, 320: tuple(257 * value for value in MAP)}), order=order),
                PAINTED, 0) for order in "<>"],
            "other formats": [(saved(PALETTE, form), PAINTED, 0) for form in ("GIF", "BMP")]},
        "a palette of 8-bit colours in 16-bit places": {
            "TIFF": [(tiff((np.asarray(PALETTE), {262: 3, 320: MAP})), PAINTED, 0)]},
        "CMYK": {
            "TIFF": [(saved(cmyk, "TIFF", compression=name), COLOUR, 1) for name in (None, "tiff_lzw")],
            "other formats": [(saved(cmyk, "JPEG", quality=100), COLOUR, 12)]},
        "YCbCr": {
            "TIFF": [(saved(ycbcr, "TIFF"), COLOUR, 4),
                     (saved(COLOUR, "TIFF", compression="jpeg", quality=100), COLOUR, 9),
                     *((content, COLOUR, 4) for content in tiffs(np.asarray(ycbcr), _262=6, _530=(1, 1)))],
            "other formats": [(saved(COLOUR, "JPEG", **FINE), COLOUR, 9)]},
        "YCbCr, uncompressed, colour at half resolution": refused(
            TIFF=[tiff((COLOUR, {262: 6, 530: (2, 2)})), tiff((COLOUR, {262: 6}))]),  # the same, by default
        "LAB": {"TIFF": [(saved(PALE, "TIFF", mode="LAB", compression=name), PALE, 6)
                         for name in (None, "tiff_lzw")]}}


def deep_kinds():
    """The same, of more than 8 bits a channel."""
    low_alpha = np.dstack([FILM, np.full_like(FILM, 4095)])
    low_cases = tiffs(np.dstack([FILM, np.full_like(FILM, 65535)]), _262=0, _338=2)
    long = (GREY.astype(np.uint64) * 0x01010101).astype(np.uint32)
    signed = (long.astype(np.int64) - (1 << 31)).astype(np.int32)
    doubles = FLOATS.astype(np.float64)
    lit = {"TIFF": [(content, stretched(HOLES), 0) for content in tiffs(HOLES)]}
    unlit = np.where(np.isnan(HOLES)[..., None], 0, 255 - stretched(HOLES))
    return {
        "16-bit grey, or 12 bits in 16": {
            "PNG": [(png(FILM), stretched(FILM), 0)],
            "TIFF": [(content, stretched(FILM), 0) for content in tiffs(FILM)],
            "other formats": [(saved(FILM, "JPEG2000"), stretched(FILM), 0), *(
                (b"P5\n32 24\n%d\n" % most + FILM.astype(">u2").tobytes(), stretched(FILM), 1)
                for most in (65535, 4095))]},
        "16-bit RGB": {
            "PNG": [(png(SLIDE), stretched(SLIDE), 0)],
            "TIFF": [(content, stretched(SLIDE), 0) for content in tiffs(SLIDE)],
            **refused(other_formats=[b"P6\n32 24\n65535\n" + SLIDE.astype(">u2").tobytes(),
                                     b"P3\n1 2\n4095\n1 2 3 4 5 6\n", jpeg_2000_of_16_bits()])},
        "16-bit grey with alpha": {
            "PNG": [(png(DEEP_LA), SEEN_LA, 1), (png(low_alpha), stretched(FILM), 0)],
            "TIFF": [(content, SEEN_LA, 1) for content in tiffs(DEEP_LA, _338=2)]
            + [(content, stretched(FILM), 0) for content in tiffs(DEEP_LA, _338=0)]},
        "16-bit RGB with alpha": {
            "PNG": [(png(DEEP_RGBA), SEEN_RGBA, 1)],
            "TIFF": [(content, SEEN_RGBA, 1) for content in tiffs(DEEP_RGBA, _338=2)]
            + [(content, stretched(SLIDE), 0) for content in tiffs(DEEP_RGBA, _338=0)]},
        "16-bit CMYK, planes apart, or colour times alpha": refused(
            TIFF=tiffs(DEEP_RGBA, _262=5) + tiffs(DEEP_RGBA, _338=1) + tiffs(SLIDE, _284=2)[1::2]),
        "signed 16-bit numbers": {
            "TIFF": [(content, stretched(FILM), 0) for content in tiffs(FILM.astype(np.int16) - 2000)]},
        "32-bit numbers, signed or not, beyond 2^31 too": {
            "TIFF": [(content, stretched(GREY), 0) for content in tiffs(long) + tiffs(signed)]},
        "floats of 32 or 64 bits": {
            "TIFF": [(content, stretched(pixels), 0) for pixels in (FLOATS, doubles)
                     for content in tiffs(pixels)],
            "other formats": [(b"Pf\n32 24\n-1.0\n" + FLOATS[::-1].astype("<f4").tobytes(),
                               stretched(FLOATS), 0)]},
        "floats, some of them NaN or infinite": lit,
        "floats, all of them NaN": refused(TIFF=tiffs(np.full_like(HOLES, np.nan))),
        "floats of 16 bits, numbers of 64 bits": refused(
            TIFF=[*tiffs(FLOATS.astype(np.float16)), *tiffs(FILM.astype(np.uint64))]),
        "zero is white, 16 bits, 32 bits or float": {
            "TIFF": [*((content, 255 - stretched(pixels), 0)
                       for pixels in (FILM, FILM.astype(np.int16), long, signed, FLOATS, doubles)
                       for content in tiffs(pixels, _262=0)),
                     *((content, 255 - stretched(FILM), 0) for content in low_cases),
                     *((content, unlit, 0) for content in tiffs(HOLES, _262=0))]}}


def turned_and_clear_kinds():
    """The same, of files that lie on their side or can be seen through."""
    rgba, la = with_alpha(COLOUR, 255), with_alpha(GREY, 255)
    half_seen = PAINTED.astype(np.float64)  # nothing of the palette's colour 0, and half of colour 1
    half_seen[np.asarray(PALETTE) == 0] = 0
    half_seen[np.asarray(PALETTE) == 1] /= 2
    exif = (b"eXIf", b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0")
    deep = ((SLIDE, stretched(SLIDE), None), (DEEP_LA, SEEN_LA, 2), (DEEP_RGBA, SEEN_RGBA, 2))
    return {
        "EXIF says that it lies on its side": {
            "PNG": [(turned("PNG", COLOUR), np.rot90(COLOUR, -1), 0),
                    (turned("PNG", FILM), np.rot90(stretched(FILM), -1), 0),
                    *((png(pixels, exif), np.rot90(wanted, -1), 1) for pixels, wanted, _ in deep)],
            "TIFF": [(content, np.rot90(wanted, -1), 1) for pixels, wanted, extra in (
                (COLOUR, COLOUR, None), (FILM, stretched(FILM), None), (HOLES, stretched(HOLES), None), *deep)
                for content in tiffs(pixels, _274=6, _338=extra)],
            "other formats": [(turned("JPEG", GREY), np.rot90(GREYS, -1), 12),
                              (turned("WEBP", COLOUR, lossless=True), np.rot90(COLOUR, -1), 0)]},
        "an alpha channel": {
            "PNG": [(saved(rgba, "PNG"), over_black(COLOUR), 1), (saved(la, "PNG"), over_black(GREYS), 1),
                    (saved(PALETTE, "PNG", transparency=bytes([0, 128] + [255] * 62)), half_seen, 1)],
            "TIFF": [(content, over_black(wanted), 1) for pixels, wanted in ((rgba, COLOUR), (la, GREYS))
                     for content in tiffs(pixels, _338=2)],
            "other formats": [(saved(rgba, "WEBP", lossless=True), over_black(COLOUR), 1)]},
        "one colour is declared transparent": {
            "PNG": [(saved(WHITE[..., 0], "PNG", transparency=255), np.repeat(WHITE[..., :1], 3, -1), 0),
                    (saved(WHITE, "PNG", transparency=(255, 255, 255)), WHITE, 0),
                    (png(FILM, (b"tRNS", struct.pack(">H", FILM.max()))), stretched(FILM), 0),
                    (png(SLIDE, (b"tRNS", struct.pack(">HHH", *SLIDE[0, 0]))), stretched(SLIDE), 0),
                    (saved(PALETTE, "PNG", transparency=3), PAINTED, 0)],
            "other formats": [(saved(PALETTE, "GIF", transparency=3), PAINTED, 0)]}}


def odd_kinds():
    """The same, of several pages, of nothing to see, and of files that are not whole or no images."""
    several = {"save_all": True, "append_images": [Image.fromarray(COLOUR[::-1]), Image.fromarray(WHITE)]}
    thumbnail, mask = (GREY[::4, ::4], {254: 1}), (GREY, {254: 4})
    preview = saved(COLOUR, "MPO", save_all=True, append_images=[Image.fromarray(GREYS[::2, ::2])])
    even = np.full((24, 32), 900, np.uint16)
    rows = {"_257": 240, "_278": 240}  # ten times as many as there are
    return {
        "several pages or frames": refused(
            PNG=[saved(COLOUR, "PNG", **several)],
            TIFF=[saved(COLOUR, "TIFF", **several), tiff((FILM, {}), (FILM[::-1], {}), order=">"),
                  tiff((FILM, {254: 2}), (FILM[::-1], {254: 2})),
                  tiff((GREY, {254: 1}), (GREY[::-1], {254: 1}))],
            other_formats=[saved(COLOUR, "GIF", **several), saved(COLOUR, "WEBP", **several)]),
        "one page, and its thumbnail, overview or mask": {
            "TIFF": [(tiff((COLOUR, {}), thumbnail, mask), COLOUR, 0),
                     (tiff(thumbnail, (COLOUR, {})), COLOUR, 0),
                     (tiff(thumbnail, (SLIDE, {}), mask, order=">", packed=True), stretched(SLIDE), 0),
                     (tiff((COLOUR, {}), (GREY[::2], {255: 2})), COLOUR, 0),
                     (tiff((GREY, {254: 1})), GREYS, 0)],
            "other formats": [(preview, np.asarray(Image.open(io.BytesIO(preview)).convert("RGB")), 0)]},
        "pixels that are all alike": refused(
            PNG=[saved(GREY * 0 + 9, "PNG"), png(even), png(np.dstack([even] * 3)), png(with_alpha(FILM, 0)),
                 saved(with_alpha(COLOUR, 0), "PNG")],
            TIFF=tiffs(even) + tiffs(even.astype(np.float32)) + tiffs(even.astype(np.int32), _262=0),
            other_formats=[saved(COLOUR * 0 + 200, form) for form in ("JPEG", "BMP", "GIF", "WEBP", "PPM")]),
        "less than its header says": refused(
            PNG=[saved(COLOUR, "PNG")[:-600], png(SLIDE)[:-900]],
            TIFF=[*tiffs(COLOUR, **rows), *tiffs(SLIDE, **rows), *tiffs(FILM, **rows),
                  tiff((COLOUR, {}))[:-4] + b"\xff\xff\0\0"],  # there would be a further page
            other_formats=[saved(COLOUR, form)[:-90] for form in ("JPEG", "WEBP", "BMP", "JPEG2000")]),
        "more than 89 million pixels": refused(
            PNG=[claims(saved(COLOUR, "PNG"), 9500, 9500), claims(png(SLIDE), 8000, 7500),
                 claims(png(DEEP_RGBA), 7000, 6500), claims(saved(COLOUR, "PNG"), 60000, 60000)],
            TIFF=[tiff((COLOUR, {256: 9500, 257: 9500}))],
            other_formats=[b"P5\n9500 9500\n255\n" + bytes(99)]),
        "no image, or another format, such as DICOM": refused(
            other_formats=[b"", b"a text", bytes(128) + b"DICM" + bytes(99), saved(COLOUR, "EPS")])}


# ----------------------------------------------------------------------------- odd files

def jpeg_2000_of_16_bits():
    """The head of a codestream of three channels, all that is looked at before it is refused."""
    size = struct.pack(">HHIIIIIIIIH", 47, 0, 32, 24, 0, 0, 32, 24, 0, 0, 3) + b"\x0f\1\1" * 3
    return b"\xff\x4f\xff\x51" + size + b"\xff\xd9"


def claims(content, width, height):
    """A PNG whose header says another size."""
    header = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


# ----------------------------------------------------------------------------- the table

def read_table():
    """[(row, column, cell)] of the first table of docs/images.md, where the cell says something."""
    text = (Path(__file__).parent.parent / "docs/images.md").read_text(encoding="utf-8")
    table = next(block for block in text.split("\n\n") if block.startswith("|"))
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [(row[0], column, cell) for row in rows
            for column, cell in zip(head[1:], row[1:], strict=True) if cell]


KINDS = shallow_kinds() | deep_kinds() | turned_and_clear_kinds() | odd_kinds()


@pytest.mark.parametrize("row, column, cell", read_table(), ids=lambda text: text)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_each_kind_of_file_becomes_what_the_table_says(row, column, cell):
    cases = KINDS[row][column]
    assert cases
    for content, wanted, tolerance in cases:
        assert (cell in REASONS) == (wanted is None)
        if wanted is None:
            with pytest.raises(Unreadable, match=f"^{re.escape(cell)}$"):
                load_image(content)
            assert encode_image(content, ImageSettings(16, "squash", "png", 0)) == cell
        else:
            image = load_image(content, 16)
            assert image.mode == "RGB" and np.asarray(image).shape == wanted.shape
            assert np.abs(np.asarray(image) - wanted.astype(np.float64)).max() <= tolerance


def test_the_table_names_every_kind_that_is_tried():
    assert {(row, column) for row, column, _ in read_table()} == {
        (row, column) for row, columns in KINDS.items() for column in columns}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :16] = 255  # bright at the top left, whatever way the camera was held
    undo = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
            5: lambda a: a.transpose(1, 0, 2), 6: np.rot90,
            7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a, -1)}
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = np.asarray(load_image(saved(stored, "JPEG", quality=100, exif=exif))).astype(int)
    assert found.shape == upright.shape and np.abs(found - upright).max() < 10


# ----------------------------------------------------------------------------- range, names, stored images

def test_a_dead_pixel_darkens_nothing_and_a_few_bright_spots_are_seen():
    film = np.tile(np.linspace(0, 4095, 64).astype(np.uint16), (64, 1))  # 12 bits in 16
    grey = np.asarray(load_image(png(film)))
    dead = film.copy()
    dead[5, 7] = 65535
    assert (grey[0, 0, 0], grey[0, 32, 0], grey[0, -1, 0]) == (0, 130, 255)
    assert (np.asarray(load_image(png(dead))) != grey).sum() == 3  # that pixel alone
    spots = np.full((64, 64), 100, np.uint16)
    spots[5, 7:9] = 3000, 900
    found = np.asarray(load_image(png(spots)))[..., 0]
    assert (found[5, 7], found[5, 8], found[0, 0]) == (255, 70, 0) and (found > 0).sum() == 2


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint16, np.int16])
def test_numbers_that_are_counted_have_the_same_range_as_others(kind):
    least, most = np.iinfo(kind).min, np.iinfo(kind).max
    for size in (1, 2, 100, 5000):
        numbers = RANDOM.integers(least, most + 1, size).astype(kind)
        assert tails(numbers) == np.percentile(numbers.astype(np.float64), (0.5, 99.5)).tolist()
    film = RANDOM.integers(least, most + 1, (300, 300)).astype(kind)  # of so many each number is looked at once
    assert np.array_equal(stretch(film), stretch(film.astype(np.int32)))
    assert np.array_equal(stretch(film, inverted=True), 255 - stretch(film.astype(np.int32)))


def test_the_channels_of_a_colour_keep_their_proportion():
    slide = np.zeros((32, 32, 3), np.uint16)
    slide[..., 0], slide[..., 1] = np.arange(32) * 100, np.arange(32) * 50
    found = np.asarray(load_image(png(slide))).astype(int)
    assert found[..., 0].max() == 255 and np.abs(found[..., 0] - 2 * found[..., 1]).max() <= 1
    assert not found[..., 2].any()


def test_the_range_of_a_large_image_is_that_of_all_its_parts(monkeypatch):
    film = np.add.outer(40 * np.arange(64), 20 * np.arange(64)).astype(np.uint16)  # darkest at the top left
    whole = np.asarray(load_image(png(film))).astype(int)
    monkeypatch.setattr(plumbing.pixels, "SAMPLED", 256)
    assert np.abs(np.asarray(load_image(png(film))) - whole).max() <= 12


def test_every_format_has_names_and_a_folder_takes_them(tmp_path):
    forms = Image.registered_extensions()
    assert {forms[name] for name in SUFFIXES} == set(FORMATS)
    for number, name in enumerate([*SUFFIXES, ".JFIF", ".dcm", ".eps"]):
        (tmp_path / "scans" / "abc"[number % 3]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "scans" / "abc"[number % 3] / f"{number}{name}").write_bytes(b"")
    items, *_ = read_folder(tmp_path / "scans")
    assert {item.source.suffix for item in items} == {*SUFFIXES, ".JFIF"}


def test_a_stored_image_is_a_jpeg_or_png_of_the_size_that_was_stored():
    square = COLOUR[:, :24]
    assert np.array_equal(open_stored(saved(square, "PNG"), 24, 24), square)
    assert open_stored(saved(square, "JPEG"), 24, 24).shape == (24, 24, 3)
    whole = saved(square, "PNG")
    for content in (saved(square, "EPS"), saved(square, "TIFF"), saved(square, "GIF"), b"", whole[:-40],
                    saved(COLOUR, "PNG"), saved(square[..., 0], "PNG"), claims(whole, 50_000, 50_000)):
        with pytest.raises((ValueError, OSError, Image.DecompressionBombError)):
            open_stored(content, 24, 24)
    assert np.array_equal(open_stored(saved(COLOUR, "PNG"), *COLOUR.shape[:2]), COLOUR)
    with pytest.raises(ValueError):
        open_stored(saved(COLOUR, "PNG"), *COLOUR.shape[1::-1])


SHAPES = [(640, 480), (480, 640), (100, 100), (1024, 1), (1, 1024), (1, 1), (3, 5), (5000, 300), (31, 97), (225, 224)]


@pytest.mark.parametrize("size", [16, 32, 100, 224, 240, 448])
@pytest.mark.parametrize("width, height", SHAPES)
def test_fit_keeps_the_aspect_in_steps_and_never_exceeds_the_size(width, height, size):
    image = Image.fromarray(RANDOM.integers(0, 256, (height, width, 3), np.uint8))
    fitted = resize_image(image, size, "fit")
    longest, largest = max(width, height), max(size // FIT_STEP, 1) * FIT_STEP
    assert max(fitted.size) == largest <= max(size, FIT_STEP)
    for side, wanted in zip(fitted.size, (width, height)):
        exact = wanted * largest / longest
        assert side % FIT_STEP == 0 and side > 0
        assert abs(side - exact) <= FIT_STEP / 2 or side == FIT_STEP > exact
    assert (fitted.width >= fitted.height) == (width >= height) or abs(width - height) * largest < FIT_STEP * longest


@pytest.mark.parametrize("how", ["squash", "crop", "pad", "fit", "smart"])
@pytest.mark.parametrize("coloured", [None, (0, 0), (128, 20), (149, 69)])
def test_grey_is_resized_as_one_channel_to_the_same_and_a_single_coloured_pixel_counts(how, coloured):
    pixels = np.repeat(RANDOM.integers(0, 256, (150, 70, 1)).astype(np.uint8), 3, 2)
    if coloured:
        pixels[coloured] = pixels[coloured] ^ (0, 0, 255)
    image = Image.fromarray(pixels)
    assert (one_channel(image) is not image) == (coloured is None)
    size = SMART_MOST if how == "smart" else 64
    each = [np.asarray(resize_image(channel, size, how)) for channel in image.split()]
    resized = resize_image(image, size, how)
    assert resized.mode == "RGB" and np.array_equal(np.asarray(resized), np.dstack(each))


def test_a_new_image_is_brought_to_size_as_those_that_are_stored(tmp_path):
    (tmp_path / "large.jpg").write_bytes(saved(Image.fromarray(COLOUR).resize((520, 390)), "JPEG"))
    content, *_ = encode_image((tmp_path / "large.jpg").read_bytes(), ImageSettings(32, "pad", "png", 97))
    assert np.array_equal(pixels_of(tmp_path / "large.jpg", 32, "pad"), open_stored(content, 32, 32))


def test_what_is_stored_of_grey_is_the_same_to_the_byte(monkeypatch):
    contents = [saved(GREY, "PNG"), saved(GREY, "JPEG"), tiff((FILM, {}))]
    settings = [ImageSettings(32, how, codec, 97) for how in ("squash", "pad") for codec in ("jpeg", "png")]
    stored = [encode_image(content, how) for content in contents for how in settings]
    for module in (plumbing.pixels, prepare.shards):
        monkeypatch.setattr(module, "one_channel", lambda image: image)
    assert stored == [encode_image(content, how) for content in contents for how in settings]


@pytest.mark.parametrize("codec", ["jpeg", "png"])
def test_nothing_but_pixels_is_stored(codec):
    """Of a file whose comment, EXIF, XMP, profile and text name somebody; it is the file without them, to the byte."""
    exif, text = Image.Exif(), PngInfo()
    exif[0x010E] = "Jane Doe"
    text.add_text("Comment", "Jane Doe")
    name = b"Jane Doe"
    named = {"JPEG": {"comment": name, "exif": exif, "xmp": name, "icc_profile": name, "quality": 95},
             "PNG": {"pnginfo": text, "exif": exif, "icc_profile": name},
             "TIFF": {"description": "Jane Doe", "icc_profile": name}}
    for form, settings in named.items():
        content = saved(COLOUR, form, **settings)
        assert name in content or form == "PNG"  # where it is compressed
        stored = encode_image(content, ImageSettings(32, "squash", codec, 97))
        assert name not in stored[0] and not Image.open(io.BytesIO(stored[0])).info.keys() & {
            "comment", "exif", "xmp", "icc_profile"}
        plain = saved(COLOUR, form, **{"quality": 95} if form == "JPEG" else {})
        assert stored == encode_image(plain, ImageSettings(32, "squash", codec, 97))


def test_fit_neither_cuts_nor_turns():
    """A frame of four colours stays where it is, in a tall and in a wide image."""
    for height, width in (300, 120), (120, 300):
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[:20], pixels[-20:], pixels[20:-20, :20], pixels[20:-20, -20:] = 250, 200, 150, 100
        fitted = np.asarray(resize_image(Image.fromarray(pixels), 224, "fit")).astype(int)
        assert fitted.shape == ((224, 96, 3) if height > width else (96, 224, 3))
        middle = fitted.shape[0] // 2, fitted.shape[1] // 2
        for colour, edge in ((250, fitted[2]), (200, fitted[-3]), (150, fitted[middle[0] - 9:middle[0] + 9, 2]),
                             (100, fitted[middle[0] - 9:middle[0] + 9, -3])):
            assert np.abs(edge - colour).max() <= 2
        assert fitted[middle].tolist() == [0, 0, 0]


def test_images_keep_their_shapes_in_a_shard_and_squares_are_asked_for_by_name(tmp_path):
    shapes = [(48, 64), (64, 48), (50, 50), (1, 90)]
    records = [("train", Record(str(n), image=saved(RANDOM.integers(0, 256, (*shape, 3), np.uint8), "PNG"),
                                image_name=f"{n}.png", labels=("big",))) for n, shape in enumerate(shapes)]
    shard = write_toy(tmp_path, records, b"", kind="classification", size=224, resize="fit")
    stored = [(160, 224), (224, 160), (224, 224), (32, 224)]
    assert [shard.read_image(n).shape[:2] for n in range(4)] == stored
    assert list(zip(shard.image_index["height"].tolist(), shard.image_index["width"].tolist())) == stored
    assert shard.manifest["image"]["resize"] == "fit" and shard.describe()["image"]["size"] == 224
    for n, (height, width) in enumerate(stored):
        pixels = Image.open(io.BytesIO(records[n][1].image)).resize((width, height), Image.Resampling.BICUBIC)
        assert np.array_equal(shard.read_image(n), np.asarray(pixels))  # png loses nothing
    with pytest.raises(UserError) as error:
        shard.require_image_size(224)
    assert str(error.value) == (
        f"{shard.folder}: images of different shapes, but the model reads 224; "
        "run `python prepare/all.py --only=toy --image_size=224 --resize=squash`")


def test_the_rule_for_deep_pixels_stands_in_the_image_settings():
    assert ImageSettings(224, "squash", "jpeg", 97).deep == DEEP_PIXELS
    assert "0.5" in DEEP_PIXELS and "99.5" in DEEP_PIXELS


# ----------------------------------------------------------------------------- Qwen's own sizes

@pytest.fixture(scope="module")
def theirs():
    """transformers' image processor that works with Pillow, as Qwen3-VL's checkpoints set it up."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    return Qwen2VLImageProcessorPil(patch_size=16, temporal_patch_size=2, merge_size=2, image_mean=[0.5] * 3,
                                    image_std=[0.5] * 3)


def patches_of(pixels):
    """What Qwen3-VL reads of pixels (H, W, 3) uint8: (patches, 1536), four that are merged side by side."""
    values = ((pixels * (1 / 255)).astype(np.float32) - np.float32(0.5)) / np.float32(0.5)
    rows, columns = pixels.shape[0] // 32, pixels.shape[1] // 32
    values = values.reshape(rows, 2, 16, columns, 2, 16, 3).transpose(0, 3, 1, 4, 6, 2, 5)  # R C i j channel y x
    return np.stack([values] * 2, 5).reshape(-1, 1536)  # each twice: a still image is two moments of time


def noise(height, width, channels=3):
    pixels = np.random.default_rng(height * width).integers(0, 256, (height // 3 + 2, width // 3 + 2, 3), np.uint8)
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image if channels == 3 else image.convert("L"))


def kinds_of_images():
    """30 files: of all depths and formats, tiny ones, long ones, and such as each cap makes smaller."""
    grey, colour = noise(300, 421, 1), noise(336, 500)
    deep = grey.astype(np.uint16) * 16 + 7
    alpha = np.dstack([colour, np.tile(np.linspace(0, 255, 500).astype(np.uint8), (336, 1))])
    files = [saved(grey, "PNG"), saved(grey, "JPEG"), saved(grey, "PNG", "1"), saved(deep, "PNG"),
             tiff((deep, {}), order=">"), tiff((deep.astype(np.float32), {262: 0})), png(np.dstack([deep] * 3)),
             saved(alpha, "PNG"), saved(alpha, "WEBP", lossless=True), saved(np.dstack([grey, grey]), "PNG"),
             saved(Image.fromarray(colour).quantize(64), "GIF"), saved(colour, "JPEG", "CMYK"),
             saved(colour, "BMP"), saved(colour, "JPEG2000"), turned("JPEG", colour), turned("PNG", colour),
             turned("TIFF", colour)]
    shapes = [(1, 3), (5, 5), (28, 28), (31, 17), (80, 2000), (3000, 48), (16, 3200), (448, 448), (1008, 80),
              (1280, 720), (1500, 2000), (255, 257), (768, 768)]
    return files + [saved(noise(*shape), "PNG" if min(shape) < 300 else "JPEG") for shape in shapes]


@pytest.mark.parametrize("most", [SMART_LEAST, 1280 * 784, SMART_MOST])
def test_pixels_of_all_kinds_are_those_that_qwen_reads(theirs, most, tmp_path):
    files, shapes = kinds_of_images(), set()
    assert len(files) == 30
    theirs.size = {"shortest_edge": SMART_LEAST, "longest_edge": most}
    for content in files:
        (tmp_path / "image").write_bytes(content)
        ours = pixels_of(tmp_path / "image", most, "smart")
        shapes.add(ours.shape)
        read = theirs(load_image(content), return_tensors="np")
        assert read["image_grid_thw"].tolist() == [[1, ours.shape[0] // 16, ours.shape[1] // 16]]
        assert np.abs(read["pixel_values"] - patches_of(ours)).max() == 0.0
    assert len(shapes) >= 10


def test_smart_sizes_are_the_published_examples():
    for height, width, wanted in [
            (224, 224, (256, 256)), (100, 100, (256, 256)), (28, 28, (256, 256)), (448, 448, (448, 448)),
            (512, 512, (512, 512)), (768, 768, (768, 768)), (1280, 1280, (1280, 1280)), (336, 500, (320, 512)),
            (2000, 3000, (1984, 3008)), (5000, 5000, (4096, 4096)), (80, 3200, (64, 3200))]:  # 2.5 steps: to even
        assert smart_shape(height, width, SMART_MOST) == wanted
    assert smart_shape(2000, 3000, 1 << 20) == (832, 1248)


def test_an_image_of_200_to_1_is_read_and_a_longer_one_is_not():
    assert resize_image(Image.new("RGB", (2000, 10)), SMART_MOST, "smart").size == (3648, 32)
    for size in ((2001, 10), (10, 2001), (201, 1)):
        with pytest.raises(Unreadable, match="more than 200 times"):
            resize_image(Image.new("RGB", size), SMART_MOST, "smart")
    content = saved(noise(4, 801), "PNG")
    settings = ImageSettings(SMART_MOST, "smart", "png", 0)
    assert encode_image(content, settings) == plumbing.pixels.TOO_LONG  # so it is skipped, and counted


def test_a_large_jpeg_is_decoded_whole_for_a_size_in_pixels(tmp_path):
    pixels = noise(1500, 2000)
    (tmp_path / "a.jpg").write_bytes(content := saved(pixels, "JPEG", quality=90))
    height, width = smart_shape(1500, 2000, SMART_LEAST)
    whole = Image.open(io.BytesIO(content)).resize((width, height), Image.Resampling.BICUBIC)
    assert np.array_equal(pixels_of(tmp_path / "a.jpg", SMART_LEAST, "smart"), np.asarray(whole))
    stored = encode_image(content, ImageSettings(SMART_LEAST, "smart", "png", 0))
    assert np.array_equal(open_stored(stored[0], *stored[1]), np.asarray(whole))


def test_flags_are_told_back_as_they_were_given():
    assert resize_flags({"size": 100352, "resize": "smart", "codec": "jpeg"}) == "--resize=fit --max_pixels=100352"
    assert resize_flags({"size": 224, "resize": "fit"}) == "--image_size=224 --resize=fit"
