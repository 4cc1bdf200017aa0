"""
Whether two images are one: copies that were encoded again, rescaled, made brighter or grey, mirrored, turned
by a right angle, cut or framed a little.

Each image has a look, itself in grey at 48 x 48 pixels, which prepare/shards.py stores. A hash of the looks,
the signs of their lowest frequencies, proposes pairs, by one product of matrices; what is mirrored or turned
has the same frequencies in another order, with other signs. Hashes of images of one kind, such as photographs
of eyes, are as near to one another as those of copies, so that a closer comparison decides: it aligns two
looks and correlates what is fine in them. `python extras/look/leaks.py` measures both; see docs/leaks.md.
"""

import functools
import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

SIDE = 48  # pixels of a look; at 32 some eyes of different people correlate as copies do
FINGERPRINT = np.dtype([("pixels", "<u8"), ("look", "u1", (SIDE, SIDE))])
# extras/look/leaks.py measures how often copies and strangers come how close; docs/leaks.md has the numbers.
BITS = 90  # of 255 that differ at most between a pair of looks that is proposed
CLOSEST = 16  # pairs proposed at most for one image, those of the fewest bits
SAME = 0.84  # correlation from which two looks are of one image


# ----------------------------------------------------------------------------- one image

def fingerprint(image, grey=None):
    """
    The FINGERPRINT of an RGB image, as bytes. grey: the same as "L", where it is at hand.

    The look is stretched to 0..255. An image that is all but even has none: it is 0, and nothing is like it.
    """
    pixels = hashlib.sha256(str(image.size).encode())
    pixels.update(image.tobytes())
    grey = np.asarray((grey or image).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)
    look = (grey - grey.min()) * (255 / max(np.ptp(grey), 1)) if grey.std() >= 1 else np.zeros_like(grey)
    return pixels.digest()[:8] + look.round().astype(np.uint8).tobytes()


def whole(looks):
    """Looks as float32: (n, SIDE, SIDE)."""
    return looks.astype(np.float32)


def borders(looks):
    """
    How wide even borders are, in pixels: (n, 4) float32, above, below, left and right. None is wider than
    a third, and a border that is no whole number of pixels wide counts half of its last.
    """
    widths = []
    for lines in (looks, looks[:, ::-1], looks.swapaxes(1, 2), looks.swapaxes(1, 2)[:, ::-1]):
        lines = lines[:, :SIDE // 3 + 1].astype(np.int16)
        even = (np.ptp(lines, axis=2) <= 12) & (abs(lines[:, :, 0] - lines[:, :1, 0]) <= 12)
        even[:, -1] = False
        widths.append(even.argmin(1))
    widths = np.stack(widths, 1).astype(np.float32)
    return widths + 0.5 * (widths > 0)


def inside(looks):
    """What is within the borders of looks, as large as a look: (n, SIDE, SIDE) float32."""
    above, below, left, right = borders(looks).T / SIDE
    frame = [1 - above - below, above - below, 1 - left - right, left - right]
    return resample(whole(looks), np.stack(frame, 1))[0]


# ----------------------------------------------------------------------------- proposing pairs

def turned(looks, way, mirror=lambda looks: looks[..., ::-1]):
    """Looks in one of the eight orientations of a square, way 0 to 7. mirror: what mirrors each row."""
    if way & 1:
        looks = mirror(looks)
    if way & 2:
        looks = mirror(looks.swapaxes(-1, -2)).swapaxes(-1, -2)
    return looks.swapaxes(-1, -2) if way & 4 else looks


def frequency_signs(looks):
    """
    Signs of the 255 lowest frequencies of each look (n, SIDE, SIDE), a perceptual hash of numbers 1 and -1:
    (n, 16, 16) float32. The first, the mean brightness, is 0.
    """
    cosines = np.cos(np.pi / SIDE * np.arange(16)[:, None] * (np.arange(SIDE) + 0.5)).astype(np.float32)
    signs = np.where(cosines @ looks @ cosines.T > 0, np.float32(1), np.float32(-1))
    signs[:, 0, 0] = 0
    return signs


def propose(these, those, view):
    """
    Pairs of two arrays of looks that differ in at most BITS in one of the eight orientations: numbers of
    these, numbers of those and the way to turn these by, (k,) int64 each. For each of these the CLOSEST.

    view: what to compare of the looks, `whole` or `inside`.
    """
    if not len(these) or not len(those):
        return np.zeros((3, 0), np.int64)
    blocks = [frequency_signs(view(those[n:n + 4096])).reshape(-1, 256) for n in range(0, len(those), 4096)]
    signs = np.concatenate(blocks).T  # (256, m)
    blank = ~those.any((1, 2))
    alternate = np.where(np.arange(16) % 2, np.float32(-1), np.float32(1))  # how a mirror changes cosines
    rows, pairs = max(1, 2 ** 22 // max(len(those), 1)), []
    for first in range(0, len(these), rows):
        block = these[first:first + rows]
        ways = [turned(frequency_signs(view(block)), way, lambda signs: signs * alternate).reshape(-1, 256)
                for way in range(8)]
        equal = (np.concatenate(ways) @ signs).reshape(8, len(block), -1)  # equal bits less unequal ones
        way, equal = equal.argmax(0), equal.max(0)
        equal[:, blank] = equal[~block.any((1, 2))] = -255
        if len(those) > CLOSEST:
            least = np.partition(equal, -CLOSEST, axis=1)[:, -CLOSEST, None]
        else:
            least = -255
        row, column = np.nonzero((equal >= least) & (equal >= 255 - 2 * BITS))
        pairs.append(np.stack([row + first, column, way[row, column]]))
    return np.concatenate(pairs, axis=1)


# ----------------------------------------------------------------------------- deciding on them

@functools.cache
def blur(side, width):
    """(side, side) float32 that blurs a look along one side, by a Gaussian of `width` pixels."""
    distance = np.subtract.outer(np.arange(side), np.arange(side))
    weights = np.exp(-distance ** 2 / (2 * width ** 2)).astype(np.float32)
    return weights / weights.sum(1, keepdims=True)


def detail(looks, fine, coarse):
    """
    Looks (n, S, S) without what is larger than `coarse` or smaller than `fine` pixels, of one strength
    everywhere: a bright edge that all images of a kind have must not outweigh what tells them apart.
    """
    fine, coarse = blur(looks.shape[1], fine), blur(looks.shape[1], coarse)
    looks = fine @ looks @ fine.T
    looks = looks - coarse @ looks @ coarse.T
    strength = np.sqrt(np.maximum(coarse @ (looks * looks) @ coarse.T, 0))
    return looks / (strength + 1.5)  # of 255 grey levels: what is weaker is noise


def resample(looks, frame):
    """
    What looks (n, S, S) show in a frame, and where it lies on them, as 0 and 1: (n, S, S) float32 each.

    frame: (n, 4), scale and shift from above to below, then from left to right; a look goes from -1 to 1.
    """
    side = looks.shape[1]
    places = (np.arange(side, dtype=np.float32) + 0.5) * (2 / side) - 1
    places = frame[:, 0::2, None] * places + frame[:, 1::2, None]  # (n, 2, S)
    pixels = ((places + 1) * (side / 2) - 0.5).clip(0, side - 1)
    weights = np.maximum(1 - abs(pixels[..., None] - np.arange(side, dtype=np.float32)), 0)
    within = (abs(places) <= 1).astype(np.float32)
    return (weights[:, 0] @ looks @ weights[:, 1].swapaxes(1, 2),
            within[:, 0, :, None] * within[:, 1, None, :])


def align(these, those, frame, steps):
    """The frame, refined by Gauss-Newton steps, in which those (n, S, S) show what these do."""
    side = these.shape[1]
    places = (np.arange(side, dtype=np.float32) + 0.5) * (2 / side) - 1
    for _ in range(steps):
        seen, within = resample(those, frame)
        down, right = (slope * within * (side / 2) for slope in np.gradient(seen, axis=(1, 2)))
        slopes = np.stack([down * places[:, None], down, right * places, right], 1)
        slopes = slopes.reshape(-1, 4, side * side)
        error = ((these - seen) * within).reshape(-1, side * side, 1)
        curvature = slopes @ slopes.swapaxes(1, 2)
        damping = 1e-3 * np.trace(curvature, axis1=1, axis2=2)[:, None, None] + 1e-6
        step = np.linalg.solve(curvature + damping * np.eye(4, dtype=np.float32), slopes @ error)[..., 0]
        frame = frame + step.clip(-0.08, 0.08)
        frame = frame.clip([0.75, -0.25] * 2, [1.33, 0.25] * 2).astype(np.float32)
    return frame


def agreement(these, those):
    """How much two aligned looks correlate in their details, -1 to 1: (n,) of two (n, SIDE, SIDE) float32."""
    frame = np.tile(np.float32([1, 0, 1, 0]), (len(these), 1))
    half_these, half_those = (looks.reshape(-1, SIDE // 2, 2, SIDE // 2, 2).mean((2, 4))
                              for looks in (these, those))
    for fine, coarse in ((1.5, 4.5), (0.7, 2)):  # what is large first: a step finds what overlaps already
        frame = align(detail(half_these, fine, coarse), detail(half_those, fine, coarse), frame, 3)
    frame = align(detail(these, 1, 3), detail(those, 1, 3), frame, 1)
    seen, within = resample(detail(those, 0.5, 1.5), frame)
    return correlation(detail(these, 0.5, 1.5), seen, within)


def correlation(these, those, within):
    """Pearson's correlation of each pair of (n, S, S), where `within` is 1."""
    count = within.sum((1, 2), keepdims=True)
    these, those = ((looks - (looks * within).sum((1, 2), keepdims=True) / count) * within
                    for looks in (these, those))
    power = (these * these).sum((1, 2)) * (those * those).sum((1, 2))
    return (these * those).sum((1, 2)) / np.sqrt(power + 1e-6)


def alike(these, those):
    """
    Pairs of two arrays of looks, (n, SIDE, SIDE) and (m, SIDE, SIDE) uint8, that are of one image: (k, 2)
    numbers of rows, in order.
    """
    pairs = [np.zeros((0, 2), np.int64)]
    framed = any(borders(looks[n:n + 4096]).any()
                 for looks in (these, those) for n in range(0, len(looks), 4096))
    for view in (whole, inside) if framed else (whole,):
        left, right, way = propose(these, those, view)

        def decide(some):
            looks = view(these[left[some]])
            for number, turn in enumerate(way[some]):
                looks[number] = turned(looks[number], turn)
            return agreement(looks, view(those[right[some]])) >= SAME

        with ThreadPoolExecutor() as pool:  # NumPy lets go of the interpreter lock
            same = list(pool.map(decide, [slice(n, n + 256) for n in range(0, len(left), 256)]))
        pairs += [np.stack([left, right], 1)[np.concatenate(same)]] if same else []
    return np.unique(np.concatenate(pairs), axis=0)

