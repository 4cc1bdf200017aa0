"""
Pixels: an image file's bytes as upright 8-bit RGB, or in words why they cannot be used.

What happens to each kind of file is the table in docs/images.md, whose rows tests/test_pixels.py
tries. Pillow decodes; this file adds what Pillow leaves out or gets wrong of pixels deeper than 8
bits: the low byte of 16-bit colour, the order of bytes in compressed big-endian TIFFs, numbers
beyond 2^31, and which of black and white is zero.
"""

import io
import math
import re
import struct
import sys

import numpy as np
from PIL import Image, ImageChops, ImageOps, TiffImagePlugin, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP", "JPEG2000", "PPM")  # others may run programs
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".gif", ".bmp", ".webp", ".apng",
            ".jp2", ".j2k", ".jpf", ".jpx", ".j2c", ".jpc", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm")

# A single dead pixel, marker or NaN would darken all others, if least and greatest value became 0 and
# 255. Half a percent at each end is what segmentation of CT has long cut off (nnU-Net's rule), and a
# film's own range of grey lies within.
TAIL = 0.5
DEEP_PIXELS = f"percentiles {TAIL:g} and {100 - TAIL:g} of the finite pixels become 0 and 255"  # in manifests
FIT_STEP = 32  # pixels: patches of 8, 16 and 32 fill such sides, and so do 2 x 2 of 16
SMART_LEAST, SMART_MOST = 1 << 16, 1 << 24  # pixels of an image: Qwen3-VL's own limits
SAMPLED = 1 << 22  # of a larger image, rows and columns at even distances give the percentiles

# Reasons, each without names and numbers, so that few kinds are counted.
EVEN = "even: all pixels alike"
DAMAGED = "damaged, cut short, or packed in a way that is not read"
TOO_LARGE = "too many pixels"
UNKNOWN = "no image, or of a format that is not read"
UNKNOWN_TIFF = "a damaged TIFF, or one of a kind that is not read; save it as PNG"
TOO_LONG = "more than 200 times as long as wide, or as wide as long"
SEVERAL = "several pages; save each as a file of its own"
NOT_FINITE = "no pixel has a finite value"
DEEP_COLOUR = "more than 8 bits a channel in a way that is not read; save it as PNG"
NO_ZERO = "a TIFF that does not say whether zero is black or white"
SIGNED_BYTES = "a TIFF of signed 8-bit numbers; save it as unsigned ones"
SUBSAMPLED = "a TIFF of uncompressed YCbCr; save it as RGB"

BITS, WHICH_IS_ZERO, PLANES, COLOUR_MAP = 258, 262, 284, 320  # numbers of TIFF's tags
EXTRA, SIGN, SUBSAMPLING = 338, 339, 530


class Unreadable(ValueError):
    """An image that cannot be used. Its message is the reason, one of few, for a person to read."""


def teach_pillow():
    """
    Name to Pillow those grey TIFFs whose pixels it can unpack, but whose tags it does not know:
    of big-endian ones and those where zero is white it knows only some, of doubles none. Grey with
    alpha of 16 bits is unpacked as if each byte were a channel.
    """
    for order, big in ((b"II", ""), (b"MM", "B")):
        for zero_is_black in (0, 1):
            for sign, bits, mode, raw in ((1, 16, f"I;16{big}", f"I;16{big}"), (2, 16, "I", f"I;16{big}S"),
                                          (1, 32, "I", f"I;32{big}"), (2, 32, "I", f"I;32{big}S"),
                                          (3, 32, "F", f"F;32{big}F"), (3, 64, "F", f"F;64{big}F")):
                TiffImagePlugin.OPEN_INFO[order, zero_is_black, (sign,), 1, (bits,), ()] = mode, raw
            for extra in (0, 1, 2):
                TiffImagePlugin.OPEN_INFO[order, zero_is_black, (1,), 1, (16, 16), (extra,)] = "RGBA", "RGBA"


teach_pillow()


# ----------------------------------------------------------------------------- a file's bytes

def load_image(content, at_least=0, page=None):
    """
    Decode an image file's bytes to an upright 8-bit RGB PIL image, whatever its mode.

    at_least: pixels along each side that suffice; a larger JPEG may be decoded at 1/2, 1/4 or 1/8
    of its size, which is several times as fast. page: the number of one of several, which may be all
    of one colour. Pixels of 8 bits are what they were. Deeper ones are
    stretched, as DEEP_PIXELS says. An alpha channel is laid over black, as a scan's surrounding is; a
    single colour that a file declares transparent stays that colour. Raises Unreadable, with the
    reason: what is broken, has several pages, or is all of one colour.
    """
    try:
        image = decode(content, at_least, page)
    except (Unreadable, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise Unreadable(TOO_LARGE) from None
    except Exception as error:  # each decoder has its own ways to fail on a broken file
        raise Unreadable(DAMAGED) from error
    # Nearly all images differ on their diagonal already; to look at all pixels takes longer.
    first = image.getpixel((0, 0))
    if page is None and all(image.getpixel((image.width * eighth // 8, image.height * eighth // 8)) == first
           for eighth in (4, 3, 5, 2, 6, 1, 7)) and all(low == high for low, high in image.getextrema()):
        raise Unreadable(EVEN)
    return image


def decode(content, at_least, page=None):
    """load_image without its check of the result; raises what Pillow raises, too."""
    image = open_page(content, page)
    tags = image.tag_v2 if image.format == "TIFF" else {}
    tile = image.tile[0] if image.format in ("PNG", "TIFF") and image.tile else None
    raw = "" if tile is None else tile.args if isinstance(tile.args, str) else tile.args[0]
    inverted = bool(tags) and tags[WHICH_IS_ZERO] == 0  # Pillow itself inverts up to 8 bits
    if re.search(r"[a-zA-Z]{2};16", raw) or tags.get(BITS) == (16, 16):
        if image.width * image.height * len(image.mode) > 2 * Image.MAX_IMAGE_PIXELS:  # twice as many bytes
            raise Unreadable(TOO_LARGE)
        pixels = stretch_channels(*read_channels(content, image, raw, page), inverted)
        return lay_over_black(Image.fromarray(pixels))
    if tags and tile.codec_name == "libtiff":  # which gives numbers in the machine's order of bytes
        unpack(image, re.sub(r"^([IF];(?:16|32|64))B?([SF]?)$", r"\1N\2", raw))
    if tags and image.mode in ("P", "PA") and max(tags[COLOUR_MAP]) < 256:  # 8-bit colours, by mistake
        colours = bytes(tags[COLOUR_MAP])
    else:
        colours = b""
    if at_least:
        image.draft(None, (at_least, at_least))  # JPEG alone; others are decoded whole
    image.load()  # decode now: a truncated file must fail here
    if colours:
        image.putpalette(colours, "RGB;L")
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith(("I", "F")):
        pixels = np.asarray(image)
        unsigned = image.mode == "I" and tags and tags.get(SIGN, (1,))[0] == 1
        image = Image.fromarray(stretch(pixels.view(np.uint32) if unsigned else pixels, inverted))
    return lay_over_black(image)


def open_page(content, page=None):
    """
    The one page of an image file, or that of a number, as a PIL image, not decoded yet. Raises Unreadable, or as
    Pillow does.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:  # Pillow's words name an object in memory
        raise Unreadable(UNKNOWN_TIFF if content[:4] in TiffImagePlugin.PREFIXES else UNKNOWN) from None
    if image.format == "TIFF":
        image.seek(only_page(content) if page is None else page)
        refuse_tiff(image)
    elif image.format in ("PNG", "GIF", "WEBP") and image.is_animated:  # a JPEG's further ones are previews
        if page is None:
            raise Unreadable(SEVERAL)
        if image.format == "PNG" and "16" in str(image.tile[0].args):  # Pillow lays the high bytes over one another
            raise Unreadable(DEEP_COLOUR)
        image.seek(page)
    elif image.format == "PPM" and image.mode == "RGB" and max(
            [value for value in image.tile[0].args if isinstance(value, int)], default=0) > 255:
        raise Unreadable(DEEP_COLOUR)
    elif image.format == "JPEG2000" and not image.mode.startswith("I"):
        depth = content.find(b"\xff\x4f\xff\x51") + 42  # of the first channel, in the codestream's header
        if content[depth] & 0x7f >= 8:
            raise Unreadable(DEEP_COLOUR)
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # Pillow itself refuses twice as many
        raise Unreadable(TOO_LARGE)
    return image


# ----------------------------------------------------------------------------- TIFF

def only_page(content):
    """
    Number of a TIFF's one page that is no thumbnail, overview or mask of another. Raises Unreadable
    where there are more, and as whole_pages does.
    """
    pages = whole_pages(content, most=64)  # no pyramid is that high, and each page takes time
    if len(pages) > 1:
        raise Unreadable(SEVERAL)
    return pages[0]


def whole_pages(content, most):
    """
    Numbers of a TIFF's pages that are no thumbnail, overview or mask of another; where all say that they are, of all
    of them. Raises Unreadable where it has more than `most`, and struct.error where the list of pages leads out of
    the file.
    """
    order, large = "<" if content[:2] == b"II" else ">", content[2] == 43  # large: a BigTIFF
    count_type, offset_type, field_size = ("Q", "Q", 20) if large else ("H", "I", 12)
    (place,) = struct.unpack_from(order + offset_type, content, 8 if large else 4)
    whole, places = [], []
    while place and place not in places:
        if len(places) == most:
            raise Unreadable(SEVERAL)
        (count,) = struct.unpack_from(order + count_type, content, place)
        first = place + struct.calcsize(order + count_type)
        end = first + field_size * count
        part = False
        for at in range(first, min(end, first + 8 * field_size), field_size):  # sorted: these come first
            tag, number_type = struct.unpack_from(order + "HH", content, at)
            value_at = at + field_size - struct.calcsize(order + offset_type)
            (value,) = struct.unpack_from(order + ("H" if number_type == 3 else "I"), content, value_at)
            part |= tag == 254 and value & 5 != 0 or tag == 255 and value == 2
        if not part:
            whole.append(len(places))
        places.append(place)
        (place,) = struct.unpack_from(order + offset_type, content, end)
    return whole or list(range(len(places))) or [0]


def refuse_tiff(image):
    """Raise Unreadable for a TIFF that Pillow would read wrongly."""
    tags, raw, kind = image.tag_v2, image.tile[0].args[0], image.tile[0].codec_name
    if tags.get(WHICH_IS_ZERO) is None:
        raise Unreadable(NO_ZERO)
    if image.mode == "L" and tags.get(SIGN, (1,))[0] == 2:
        raise Unreadable(SIGNED_BYTES)
    if image.mode == "YCbCr" and kind == "raw" and tuple(tags.get(SUBSAMPLING, (2, 2))) != (1, 1):
        raise Unreadable(SUBSAMPLED)
    channels = tags.get(BITS, (1,))
    if channels[0] == 16 and (raw.startswith("CMYK") or len(channels) > 1 and (
            tags.get(PLANES, 1) == 2 or tags.get(EXTRA, (2,))[0] == 1)):  # 1: multiplied by alpha
        raise Unreadable(DEEP_COLOUR)


# ----------------------------------------------------------------------------- more than 8 bits

def unpack(image, raw):
    """Let Pillow unpack an opened image as `raw` (its word for the order of bits and channels)."""
    image.tile = [tile._replace(args=raw if isinstance(tile.args, str) else (raw, *tile.args[1:]))
                  for tile in image.tile]
    return image


def read_channels(content, image, raw, page=None):
    """
    Channels of 16 bits: colour (H, W) or (H, W, 3) uint16, and alpha (H, W) uint16 or None.

    Pillow gives 8 bits of colour, the high byte. So it is decoded twice, for the low byte as if the
    bytes stood in the other order. Grey with alpha fits into Pillow's four channels of 8 bits.
    """
    tags = image.tag_v2 if image.format == "TIFF" else {}
    if raw in ("LA;16B", "RGBA"):
        order = "=" if image.tile[0].codec_name == "libtiff" else "<" if content[:2] == b"II" else ">"
        pixels = np.asarray(ImageOps.exif_transpose(unpack(image, "RGBA")))
        pixels = pixels.view(f"{order}u2").astype(np.uint16)
    else:
        other = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}[raw[-1]]
        pixels = np.asarray(ImageOps.exif_transpose(unpack(image, raw))).astype(np.uint16) << 8
        pixels |= np.asarray(ImageOps.exif_transpose(unpack(open_page(content, page), raw[:-1] + other)))
    if pixels.shape[-1] == 3:
        return pixels, None
    colour = pixels[..., 0] if pixels.shape[-1] == 2 else pixels[..., :3]
    return colour, None if tags.get(EXTRA, (2,))[0] == 0 else pixels[..., -1]  # 0: it is no alpha


def stretch_channels(colour, alpha, inverted):
    """What read_channels gives as uint8, stretched by the pixels that can be seen: (H, W[, channels])."""
    if alpha is None:
        return stretch(colour, inverted)
    seen = alpha > 0
    if not seen.any():
        raise Unreadable(EVEN)
    pixels = stretch(colour, inverted, colour[seen].reshape(-1))
    opaque = alpha.max()  # 4095 where somebody wrote 12 bits in 16
    return np.dstack([pixels, (alpha * np.uint32(255) // opaque).astype(np.uint8)])


def stretch(pixels, inverted=False, counted=None):
    """
    Numbers of any type, (H, W) or (H, W, C), as uint8: see DEEP_PIXELS. NaN becomes 0.

    inverted: zero is white. counted: the numbers that give the range, where not all do.
    """
    counted = pixels if counted is None else counted
    if pixels.dtype.kind in "iu" and pixels.itemsize <= 2 and pixels.size > 1 << 16:  # each number is looked at once
        first = int(pixels.min())
        table = stretch(np.arange(first, int(pixels.max()) + 1)[None], inverted, counted)
        return table[0, pixels.astype(np.intp) - first]
    step = -(-counted.size // SAMPLED)
    steps = (slice(None, None, step),) if counted.ndim == 1 else (slice(None, None, round(step ** 0.5)),) * 2
    some = counted[steps]
    some = some[np.isfinite(some)]
    low, high = tails(some) if some.size else (0, 0)
    if low == high:  # such as a few bright spots on an even ground
        every = counted[np.isfinite(counted)]
        if not every.size:
            raise Unreadable(NOT_FINITE)
        low, high = float(every.min()), float(every.max())
    width = high - low or 1.0
    stretched = np.empty(pixels.shape, np.uint8)
    for first in range(0, len(pixels), 64):  # a few rows at a time: it may have 89 million pixels
        with np.errstate(invalid="ignore"):  # some NaNs warn
            rows = pixels[first:first + 64].astype(np.float64)
        grey = np.nan_to_num(rows, nan=low, posinf=high, neginf=low) - low
        grey = np.clip(grey * 255 / width, 0, 255).round()
        grey = 255 - grey if inverted else grey
        stretched[first:first + 64] = np.where(np.isnan(rows), 0, grey)
    return stretched


def tails(numbers):
    """Percentiles TAIL and 100 - TAIL of some numbers, as np.percentile gives them of floats."""
    if numbers.dtype.kind not in "iu" or numbers.itemsize > 2:
        return np.percentile(numbers, (TAIL, 100 - TAIL)).tolist()
    first, ends = int(numbers.min()), []  # to count them takes a fifth of the time
    up_to = np.cumsum(np.bincount(numbers.reshape(-1).astype(np.intp) - first))
    for share in (TAIL, 100 - TAIL):
        part, place = math.modf((numbers.size - 1) * (share / 100))
        low, high = (first + int(number) for number in np.searchsorted(up_to, (place, place + 1), "right"))
        ends.append(low + (high - low) * part if part < 0.5 else high - (high - low) * (1 - part))
    return ends


def lay_over_black(image):
    """An image of 8 bits a channel as RGB, its alpha channel, or a palette's, laid over black."""
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.mode in ("LA", "PA", "RGBA") or isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")
    image.info.pop("transparency", None)  # one colour, which stays
    return image if image.mode == "RGB" else image.convert("RGB")


# ----------------------------------------------------------------------------- stored images

def open_stored(content, height, width):
    """
    Pixels of an image that prepare/ stored, (height, width, 3) uint8. Raises ValueError where the bytes
    are no RGB JPEG or PNG of that shape, whatever else they may be, or as Pillow does.
    """
    image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG"))
    if (image.size, image.mode) != ((width, height), "RGB"):
        raise ValueError(f"{image.mode} of {image.width} x {image.height} pixels")
    return np.array(image)


def one_channel(image):
    """An RGB image without colours as its red channel, mode "L"; one that has some as it is."""
    for some in (image.resize((32, 32), Image.Resampling.NEAREST), image):  # a few pixels show most colours
        red, green, blue = some.split()
        if ImageChops.difference(red, green).getbbox() or ImageChops.difference(green, blue).getbbox():
            return image
    return red


def resize_image(image, size, how="squash"):
    """
    Bring an RGB image, or one channel, to size x size pixels, bicubic and antialiased; fit and smart alone keep its
    shape, and tiles come near it.

    squash: the whole image, its aspect changed (the paper's "resized to 224x224");
    crop: shortest side to size, then the centre (BiomedCLIP's own); pad: black borders;
    fit: longest side to the largest multiple of FIT_STEP in size, the other to the multiple next to its
    aspect; both are FIT_STEP at least;
    smart: see smart_shape, size being the most pixels of the whole image. Raises Unreadable as that does;
    tiles:12: as many whole squares of size x size pixels, 12 at most, as tile_grid says.
    """
    bicubic = Image.Resampling.BICUBIC
    if image.mode == "RGB" and (grey := one_channel(image)) is not image:  # takes half the time, and becomes the same
        return resize_image(grey, size, how).convert("RGB")
    if how == "crop":
        return ImageOps.fit(image, (size, size), bicubic)
    if how == "pad":
        return ImageOps.pad(image, (size, size), bicubic)
    if how == "fit":
        scale = max(size // FIT_STEP, 1) / max(image.size)
        return image.resize([FIT_STEP * max(round(side * scale), 1) for side in image.size], bicubic)
    if how == "smart":
        height, width = smart_shape(image.height, image.width, size)
        return image.resize((width, height), bicubic)
    if most := most_tiles(how):
        rows, columns = tile_grid(image.height, image.width, size, most)
        return image.resize((columns * size, rows * size), bicubic)
    assert how == "squash", how
    return image.resize((size, size), bicubic)


def smart_shape(height, width, most):
    """
    Qwen's (height, width) for an image: the multiples of FIT_STEP next to its own, unless they make more
    than `most` pixels or fewer than SMART_LEAST; then those within, at its aspect. Raises Unreadable where
    one side is more than 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise Unreadable(TOO_LONG)
    sides = [FIT_STEP * round(side / FIT_STEP) for side in (height, width)]  # half to even, as Qwen's
    if math.prod(sides) > most:
        shrink = math.sqrt(height * width / most)
        sides = [max(FIT_STEP, FIT_STEP * math.floor(side / shrink / FIT_STEP)) for side in (height, width)]
    elif math.prod(sides) < SMART_LEAST:
        grow = math.sqrt(SMART_LEAST / (height * width))
        sides = [FIT_STEP * math.ceil(side * grow / FIT_STEP) for side in (height, width)]
    return tuple(sides)


def tile_grid(height, width, size, most):
    """
    InternVL's (rows, columns) of the tiles for an image (arXiv 2404.16821; dynamic_preprocess in its code): of all
    grids of `most` tiles or fewer the one whose aspect is nearest to the image's, in floats. Where two are as near,
    that of more tiles if the image has more than half of their pixels. Grids of as many tiles may stand in any order:
    between two of them lies one of fewer, so that never both are the nearest.
    """
    best, grid = math.inf, (1, 1)
    for tiles in range(1, most + 1):
        for columns in range(1, tiles + 1):
            rows, rest = divmod(tiles, columns)
            distance = abs(width / height - columns / rows)
            if not rest and (distance < best or distance == best and height * width > 0.5 * size ** 2 * tiles):
                best, grid = distance, (rows, columns)
    return grid


def most_tiles(how):
    """Of a way of resize_image so many tiles at most; 0: none are cut."""
    return int(how[6:]) if how.startswith("tiles:") else 0


def enough_pixels(size, how):
    """
    Pixels along each side at which a JPEG may be decoded for resize_image, as load_image takes them: twice the size
    alters a pixel less than the codec does. 0: all of it, where its own size says what becomes of it.
    """
    return 0 if how == "smart" or most_tiles(how) else 2 * size


def resize_flags(image):
    """The flags of prepare/all.py that bring images to size as these settings say, {"size", "resize", ...}."""
    if most := most_tiles(image["resize"]):
        return f"--image_size={image['size']} --max_tiles={most}"
    if image["resize"] == "smart":
        return f"--resize=fit --max_pixels={image['size']}"
    return f"--image_size={image['size']} --resize={image['resize']}"
