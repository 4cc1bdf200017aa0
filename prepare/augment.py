"""
More training images with boxes: mirrored and cropped copies, whose boxes and words follow the pixels.

A copy is drawn by a hash of its image: the questions about one image share its copies, whatever their order. What
a mirror makes of "left" and "right" is exchanged in all of a record's words.
"""

import functools
import io
import re
from dataclasses import replace

import numpy as np
from PIL import ImageOps

from formats.frames import decode_picture, picture_key
from plumbing.pixels import Unreadable

LEAST_SIDE = 0.7  # of a crop, as a share of the image's side
LEAST_AREA = 0.5  # of a box that a crop has to leave; else the box is dropped
OTHER = {"left": "right", "right": "left"}


def exchange(text):
    """
    Left and right exchanged, whole words, in the case that they are written in.

    >>> exchange("Left-sided, upright, to the RIGHT")
    'Right-sided, upright, to the LEFT'
    """
    def other(match):
        word = OTHER[match[0].lower()]
        return word.upper() if match[0].isupper() else word.capitalize() if match[0][0].isupper() else word

    return re.sub(r"(?<![^\W_])(left|right)(?![^\W_])", other, text, flags=re.I)


@functools.lru_cache(maxsize=16)  # the questions about an image follow one another
def redraw(content, mirror, corner, size):
    """
    A picture's part from `corner` on, of `size`, both shares (x, y), mirrored or not, as a PNG's bytes, and
    what was cut, to whole pixels: (x1, y1, x2, y2) in shares. Raises Unreadable.
    """
    image = decode_picture(content)
    sides = np.array(image.size)
    low = np.floor(np.array(corner) * sides).astype(int)
    high = np.minimum(low + np.maximum(np.ceil(np.array(size) * sides).astype(int), 1), sides)
    image = image.crop((*low.tolist(), *high.tolist()))
    stream = io.BytesIO()
    (ImageOps.mirror(image) if mirror else image).save(stream, "PNG", compress_level=1)
    return stream.getvalue(), tuple(np.concatenate((low / sides, high / sides)).tolist())


def move(box, mirror, part):
    """A box within a part of the image, (x1, y1, x2, y2) in shares, mirrored or not; None where too little is left."""
    low, high = np.array(part[:2]), np.array(part[2:])
    corners = np.array(box).reshape(2, 2)
    cut = np.clip(corners, low, high)
    if np.prod(cut[1] - cut[0]) < LEAST_AREA * np.prod(corners[1] - corners[0]):
        return None
    (x1, y1), (x2, y2) = ((cut - low) / (high - low)).tolist()
    return (1 - x2, y1, 1 - x1, y2) if mirror else (x1, y1, x2, y2)


def change(record, mirror, corner=(0.0, 0.0), size=(1.0, 1.0)):
    """The Record of a part of its image, mirrored or not, see redraw. Raises Unreadable."""
    image, part = redraw(record.image, mirror, corner, size)
    words = exchange if mirror else str
    moved = {words(label): [move(box, mirror, part) for box in some] for label, some in record.boxes.items()}
    return replace(
        record, image=image, question=words(record.question), answer=words(record.answer), type=words(record.type),
        context=words(record.context), labels=record.labels and tuple(map(words, record.labels)),
        references=tuple(map(words, record.references)),
        turns=tuple((words(question), words(answer)) for question, answer in record.turns),
        boxes={label: tuple(box for box in some if box) for label, some in moved.items()})


def alter(record, rng):
    """
    A mirrored copy, a cropped one or one that is both, of a Record with boxes and an image; rng: numpy's Generator.

    Boxes are those of the same pixels, cut where the crop cuts them; one of which less than half is left is
    dropped. Raises Unreadable.
    """
    kind = rng.integers(3)  # mirrored, cropped, both
    size = rng.uniform(LEAST_SIDE, 1, 2) if kind else np.ones(2)
    corner = rng.uniform(0, 1, 2) * (1 - size)
    return change(record, kind != 1, tuple(corner.tolist()), tuple(size.tolist()))


def altered(records, copies, seed=0):
    """
    Yield (split, Record)s and, behind each of the training split that has boxes, `copies` altered copies of it.

    A record without a group is of its image's, as its copies are: validation never has a copy of what is trained
    on. Of an unreadable image there are no copies.
    """
    for split, record in records:
        if split != "train" or not copies or record.boxes is None or record.image is None:
            yield split, record
            continue
        record = replace(record, group=record.group or f"image {record.image_name}")
        yield split, record
        drawn = int.from_bytes(picture_key(record.image)[:8], "big")
        for number in range(copies):
            try:
                copy = alter(record, np.random.default_rng([seed, drawn, number]))
            except Unreadable:
                break
            yield split, replace(copy, id=f"{record.id}/copy {number + 1}",
                                 image_name=f"{record.image_name}/copy {number + 1}")
