"""
Files that say where something is in an image: Pascal VOC's XML, YOLO's texts, COCO's JSON, cells of a csv.

A box leaves here as (x1, y1, x2, y2), shares of its image's width and height, as far as the file goes: `gather`
cuts it to the image. A file of another form is refused in one line that names it and the row.
"""

import io
import math
from xml.etree import ElementTree

from PIL import Image

from plumbing.flags import UserError
from plumbing.pixels import FORMATS
from prepare.datasets import expect, read_json, refuse_damage

LARGEST_TEXT = 1 << 20  # bytes of one image's XML or txt: real ones have a few thousand
NO_AREA = (0.0, 0.0, 0.0, 0.0)


def number(where, text):
    """A finite number that a text is; UserError for any other text."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{where}: {' '.join(str(text).split())!r:.40} is no number; correct it or fetch it again")
    return value


def to_shares(where, corners, width, height):
    """Corners in pixels as shares of a width and height, which must be above 0."""
    if not (width > 0 and height > 0):
        raise UserError(f"{where}: an image of {width:g} x {height:g} pixels; give it its true size")
    x1, y1, x2, y2 = corners
    return x1 / width, y1 / height, x2 / width, y2 / height


def from_corner(box):
    """x, y, width and height as two corners."""
    x, y, width, height = box
    return x, y, x + width, y + height


def image_size(content):
    """(width, height) of an image file as it is shown, upright; None where it is no image."""
    try:
        with Image.open(io.BytesIO(content or b""), formats=FORMATS) as image:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return image.size[::-1] if turned else image.size
    except Exception:  # each decoder has its own ways to fail on another file
        return None


# ----------------------------------------------------------------------------- one file an image

def decode_text(where, content):
    """A small text file's content. UserError where it is missing, too large or no UTF-8."""
    if content is None:
        raise UserError(f"{where}: missing; fetch it again")
    if len(content) > LARGEST_TEXT:
        raise UserError(f"{where}: {len(content):,} bytes, more than the boxes of an image take")
    with refuse_damage(where, "text"):
        return content.decode("utf-8-sig")


def read_voc(where, content):
    """
    (file name, width, height, [(label, box)]) of Pascal VOC's XML, whose corners count pixels from 1 and
    belong to the box, all of them. One whose corners are in one row or column has no area. Raises UserError.
    """
    text = decode_text(where, content)
    # A DOCTYPE declares entities, which may nest or name other files; a NUL is a part of UTF-16, which could hide one
    if "<!DOCTYPE" in text or "\0" in text:
        raise UserError(f"{where}: has a DOCTYPE or is no UTF-8, and is not read; remove that")
    with refuse_damage(where, "XML"):
        root = ElementTree.fromstring(text)

    def read(element, path):
        return number(f"{where}: {path}", element.findtext(path) or "none")

    if root.tag != "annotation":
        raise UserError(f"{where}: its outermost tag is {root.tag!r:.40}, not 'annotation' as in Pascal VOC")
    width, height, found = read(root, "size/width"), read(root, "size/height"), []
    for element in root.iter("object"):
        x1, y1, x2, y2 = (read(element, f"bndbox/{edge}") for edge in ("xmin", "ymin", "xmax", "ymax"))
        box = to_shares(where, (x1 - 1, y1 - 1, x2, y2), width, height)
        found.append((" ".join((element.findtext("name") or "").split()), box if x1 < x2 and y1 < y2 else NO_AREA))
    return root.findtext("filename") or "", width, height, found


def read_yolo(where, content, names):
    """
    [(label, box)] of YOLO's text, a line a box: number of the class, centre, width and height as shares; a
    polygon in place of these four is bounded. Raises UserError.
    """
    found = []
    for row, line in enumerate(decode_text(where, content).splitlines(), 1):
        if not line.split():
            continue
        label, *values = (number(f"{where}: line {row}", cell) for cell in line.split())
        if label not in range(len(names)):
            raise UserError(f"{where}: line {row} is of class {label:g}, but the classes are 0 to {len(names) - 1}")
        if len(values) == 4:
            x, y, width, height = values
            box = from_corner((x - width / 2, y - height / 2, width, height))
        elif len(values) >= 6 and len(values) % 2 == 0:
            box = min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
        else:
            raise UserError(f"{where}: line {row} has {len(values) + 1} numbers, not 5 or those of a polygon")
        found.append((names[int(label)], box))
    return found


# ----------------------------------------------------------------------------- one file for all

def read_coco(path, name="file_name", text=""):
    """
    ({image id: (its name, width, height)}, [(image id, category, text, box)]) of COCO's JSON; name and text: the
    columns of images and annotations to be read, text where there is one. Raises UserError.
    """
    content = read_json(path, {"images": [{"id": str, name: str, "width": str, "height": str}],
                               "annotations": [dict], "categories": [("id", "name")]})
    categories = {row["id"]: row["name"] for row in content["categories"]}
    images = {row["id"]: (row[name], *(number(f"{path}: image {place}: {side}", row[side])
                                       for side in ("width", "height")))
              for place, row in enumerate(content["images"], 1)}
    form, found = {"image_id": str, "category_id": str, "bbox": [str]} | ({text: str} if text else {}), []
    for place, row in enumerate(content["annotations"], 1):
        where = f"{path}: annotation {place}"
        row = expect(where, row, form)
        for column, known in (("image_id", images), ("category_id", categories)):
            if row[column] not in known:
                raise UserError(f"{where}: no {column} {row[column]!r:.40} in the file; fetch it again")
        if len(row["bbox"]) != 4:
            raise UserError(f"{where}: a bbox of {len(row['bbox'])} numbers, not 4")
        box = from_corner([number(f"{where}: bbox", value) for value in row["bbox"]])
        found.append((row["image_id"], categories[row["category_id"]], row[text] if text else "",
                      to_shares(where, box, *images[row["image_id"]][1:])))
    return images, found


# ----------------------------------------------------------------------------- what is kept

def gather(name, rows):
    """
    {image: {label: [boxes]}} of (image, label, box)s, in their order; box None: the image has none there.

    Boxes are cut to their image. One without an area is left out, and so is one that stands there twice, and
    a line says how many and which is the first. A label that had no other box stays, with none: whether the
    image has it is not known.
    """
    found, odd = {}, {}
    for image, label, box in rows:
        labels = found.setdefault(image, {})
        if box is None:
            continue
        boxes = labels.setdefault(label, [])
        cut = tuple(min(max(edge, 0.0), 1.0) for edge in box)
        if max(abs(a - b) for a, b in zip(cut, box)) > 0.01:
            odd.setdefault("boxes that reach beyond their image, cut", []).append(image)
        if cut[0] >= cut[2] or cut[1] >= cut[3]:
            odd.setdefault("boxes without an area, left out", []).append(image)
        elif cut in boxes:
            odd.setdefault("boxes that stand there twice, left out once", []).append(image)
        else:
            boxes.append(cut)
    for what, images in odd.items():
        print(f"{name}: {what}: {len(images):,}, of {ascii(images[0])[1:-1]:.80} the first", flush=True)
    return found
