"""
The embedded sample: drawn pictures with exact answers, so that a first run downloads nothing.

    kind         finding       asked if present            label with and without
    head CT      a bleed       side: left or right         ct_bleed, ct_no_bleed
    blood smear  white cells   count: one, two or three    smear_white_cell, smear_no_white_cell
    chest film   an effusion   side: left or right         film_effusion, film_no_effusion
    ultrasound   cysts         count: one, two or three    ultrasound_cyst, ultrasound_no_cyst

Left and right are those of the image, as the questions say; by radiological convention an image's
left is the patient's right. The pictures are sketches to learn the pipeline from, not anatomy.

A finding's boxes are the bounds of the pixels that it is painted on.

A study is a patient's chest film, with another of before and its report or without. An effusion has one of three
sizes in either film, whatever it has in the other, and no report says which: what has become of it, two films tell.

In each split every question sees each of its answers equally often: its words give nothing away.
A picture of 448 pixels is that of 224, drawn with sharper edges and finer grain.
The same seed gives the same bytes wherever numpy's generator gives the same numbers: all else is
+, -, *, / and square roots, which are exactly rounded on every machine, unlike exp or cos.

    python prepare/sample.py assets/sample.png      draws a contact sheet of test images
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # a script sees its own folder first; `data` lies one level up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import functools
import io
import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data import Record, View

SIZE = 224  # pixels, height and width, at which edges are as wide as they are written here
SPLITS = {"train": 150, "test": 30}  # images a class; multiples of 6 keep every answer balanced


# ----------------------------------------------------------------------------- drawing tools

@functools.cache
def grid(size):
    """(y, x) of size x size pixels, each (H, W) float32 from -1 to 1; y grows down."""
    return (np.mgrid[0:size, 0:size] / (size / 2) - 1).astype(np.float32)


def clouds(rng, cells, size):
    """Smooth noise in -1..1, (H, W): `cells` random values along each side, linear between."""
    table = rng.random((cells + 2, cells + 2), np.float32) * 2 - 1
    place = np.arange(size) * cells / size
    low = place.astype(int)
    part = (place - low).astype(np.float32)[:, None]
    for _ in range(2):  # along y, then along x
        table = (table[low] + part * (table[low + 1] - table[low])).T
    return table


def place_frame(rng, bend, size):
    """Coordinates (x, y) of a picture slightly shifted, scaled and bent: no two look alike."""
    y, x = grid(size)
    x, y = (axis / rng.uniform(0.94, 1.03) + rng.uniform(-0.04, 0.04) for axis in (x, y))
    return x + bend * clouds(rng, 6, size), y + bend * clouds(rng, 6, size)


def ramp(distance, edge=0.03):
    """1 where distance is positive, 0 where negative, and a soft edge of that width at SIZE pixels between."""
    return np.clip(distance / (edge * (SIZE / len(distance))) + 0.5, 0, 1)


def ellipse(x, y, centre, radii, edge=0.03):
    """A soft-edged mask, 1 inside the ellipse and 0 outside."""
    radius = np.sqrt(np.square((x - centre[0]) / radii[0]) + np.square((y - centre[1]) / radii[1]))
    return ramp(1 - radius, edge / min(radii))


def paint(image, mask, value):
    """Cover the image with a grey value, or with a colour, where the mask is 1."""
    mask = mask[..., None] if image.ndim == 3 else mask
    return image + mask * (np.asarray(value, np.float32) - image)


def ignore(mask):
    """What is done with the mask of a finding whose place nobody asks for."""


def bounds(mask):
    """The box (x1, y1, x2, y2), shares of the image's sides, around the pixels of a mask that exceed 0.5."""
    (y1, y2), (x1, x2) = (np.flatnonzero((mask > 0.5).any(axis))[[0, -1]] for axis in (1, 0))
    return tuple((np.array((x1, y1, x2 + 1, y2 + 1)) / len(mask)).tolist())


# ----------------------------------------------------------------------------- the four kinds
# Each calls `show` with the mask of every finding that it paints: (H, W), from 0 to 1.

def draw_ct(rng, side, size, show=ignore):
    """An axial head CT, forehead up; side is -1 or 1 for a bleed left or right, 0 for none."""
    x, y = place_frame(rng, 0.03, size)
    image = np.full_like(x, 0.02)
    for radii, grey in (((0.74, 0.91), 0.30), ((0.71, 0.88), 1.0), ((0.61, 0.78), 0.15)):
        image = paint(image, ellipse(x, y, (0, 0), radii), grey)  # scalp, skull, fluid
    brain = ellipse(x, y, (0, 0), (0.59, 0.76))
    image = paint(image, brain, 0.46 + 0.03 * clouds(rng, 40, size))
    cortex = brain * (1 - ellipse(x, y, (0, 0), (0.46, 0.62), 0.1))
    folds = ramp(0.10 - np.abs(clouds(rng, 12, size)), 0.15)  # where smooth noise crosses 0: thin curves
    image = paint(image, cortex * folds, 0.27)
    out = np.abs(x)  # distance from the midline: draws both halves at once
    image = paint(image, ramp(0.012 - out, 0.02) * ramp(np.abs(y) - 0.36) * brain, 0.62)
    for middle, slant, radii in ((-0.17, 0.45, (0.06, 0.19)), (0.24, -0.5, (0.05, 0.16))):
        horn = ellipse(out + slant * (y - middle), y, (0.13, middle), radii)
        image = paint(image, horn, 0.17)  # front, then back horns of the ventricles
    if side:
        centre = side * rng.uniform(0.30, 0.35), rng.uniform(-0.16, 0.22)
        radii = rng.uniform(0.20, 0.23), rng.uniform(0.24, 0.32)
        ragged = x + 0.05 * clouds(rng, 14, size)
        for growth, grey in ((1.3, 0.32), (1.0, 0.90)):  # a dark rim of swelling, then blood
            blob = ellipse(ragged, y, centre, (radii[0] * growth, radii[1] * growth))
            image = paint(image, blob * brain, grey)
        show(blob * brain)
    return image


def draw_smear(rng, count, size, show=ignore):
    """A stained blood smear: red cells with pale centres, and `count` larger white cells."""
    x, y = place_frame(rng, 0.025, size)
    cells = []  # (x, y, radius); white cells come first, each in a quadrant of its own
    for quadrant in rng.permutation(4).tolist()[:count]:
        cx, cy = quadrant % 2 * 0.84 - 0.42, quadrant // 2 * 0.84 - 0.42
        cells.append((cx + rng.uniform(-0.12, 0.12), cy + rng.uniform(-0.12, 0.12), 0.285))
    wanted, radius = count + int(rng.integers(28, 36)), rng.uniform(0.125, 0.135)
    for cx, cy in rng.uniform(-1.05, 1.05, (300, 2)).tolist():  # a dart lands where there is room
        if len(cells) < wanted and all((cx - x2) ** 2 + (cy - y2) ** 2 > (radius + other) ** 2
                                       for x2, y2, other in cells):
            cells.append((cx, cy, radius))
    red, white, lobes = (np.full_like(x, 9) for _ in range(3))  # (distance / radius) squared
    for number, (cx, cy, radius) in enumerate(cells):
        u, v = (x - cx) * (1.05 / radius), (y - cy) * (1.05 / radius)
        nearest = white if number < count else red
        np.minimum(nearest, u * u + v * v, out=nearest)
        if number < count:
            show(ramp(1 - (u * u + v * v), 0.3))
        tilt = rng.uniform(-0.6, 0.6)
        for lobe in (-1, 0, 1) if number < count else ():  # the nucleus: joined lobes on an arc
            a, b = u - 0.45 * lobe, v - 0.45 * tilt * lobe + 0.25 * (lobe == 0) - 0.1
            np.minimum(lobes, (a * a + b * b) / (0.42 * 0.42), out=lobes)
    image = np.full((size, size, 3), (0.96, 0.91, 0.88), np.float32)
    image = paint(image, ramp(1 - red, 0.3), (0.86, 0.54, 0.52))
    image = paint(image, 0.8 * ramp(0.22 - red, 0.36), (0.96, 0.82, 0.79))
    image = paint(image, ramp(1 - white, 0.3), (0.80, 0.73, 0.87))
    image = paint(image, ramp(1 - lobes, 0.5), (0.36, 0.13, 0.55))
    return image + 0.03 * clouds(rng, 60, size)[..., None]


def draw_film(rng, side, size, show=ignore, top=None):
    """
    A frontal chest film; side is -1 or 1 for an effusion left or right, 0 for none; top: how high up it reaches, by
    chance where none is given.
    """
    x, y = place_frame(rng, 0.02, size)
    out = np.abs(x)  # distance from the midline
    body = ramp(0.20 + 0.75 * np.sqrt(np.clip((y + 0.92) / 0.45, 0, 1)) - out, 0.06)
    above = ramp(0.46 + 0.03 * x + 1.5 * np.square(out - 0.36) - y)  # the diaphragm's domes
    image = paint(np.full_like(x, 0.03), body, 0.66 - 0.12 * above)
    lungs = ellipse(out, y, (0.43, -0.02), (0.34, 0.72)) * above
    image = paint(image, lungs, 0.13 + 0.05 * clouds(rng, 9, size) + 0.04 * clouds(rng, 30, size))
    root = ellipse(out, y, (0.16, 0), (0.22, 0.28), 0.2) * ramp(clouds(rng, 22, size), 0.5)
    image = paint(image, lungs * root, 0.42)  # vessels
    chest = ellipse(x, y, (0, 0), (0.84, 0.86), 0.06) * above * ramp(out - 0.09)
    for slope, width, grey in ((0.45, 0.27, 0.13), (-0.75, 0.22, 0.06)):  # back, front ribs
        turns = (y - slope * out) * 5
        image = image + grey * chest * ramp(width - np.abs(turns - np.floor(turns) - 0.5), 0.12)
    clavicles = ramp(0.035 - np.abs(y + 0.72 - 0.3 * out + 0.12 * out * out)) * ramp(0.72 - out)
    image = image + 0.18 * clavicles * ramp(out - 0.06)
    image = paint(image, ellipse(x, y, (0.10, -0.30), (0.10, 0.12), 0.06), 0.64)  # the aorta
    image = paint(image, ellipse(x, y, (0.15, 0.30), (0.34, 0.27), 0.06), 0.68)  # the heart
    discs = ramp(0.1 - np.abs(y * 7 - np.floor(y * 7) - 0.5))  # between the vertebrae
    image = paint(image, ramp(0.075 - out) * body, 0.74 - 0.10 * discs)
    if side:  # fluid fills the base and climbs along the chest wall: the meniscus
        top = rng.uniform(-0.22, -0.02) if top is None else top
        level = top - 2.2 * np.square(np.maximum(out - 0.36, 0))
        fluid = lungs * ramp(y - level, 0.05) * ramp(side * x - 0.08)
        image = paint(image, fluid, 0.82)
        show(fluid)
    return image


def draw_ultrasound(rng, count, size, show=ignore):
    """Liver under a curved probe, with `count` cysts: black, with bright tissue behind them."""
    x, y = place_frame(rng, 0.012, size)
    apex = -1.45  # where the beams would meet, above the image
    depth = np.sqrt(np.square(x) + np.square(y - apex))  # 0.60 at the probe, 2.35 at the far end
    beam = np.clip(x / (y - apex), -0.7, 0.7)  # slope of the beam through a pixel
    image = 0.62 - 0.07 * depth + 0.04 * clouds(rng, 7, size)
    for layer, grey in ((0.64, 0.75), (0.72, 0.25), (0.76, 0.65), (rng.uniform(2.1, 2.2), 0.85)):
        image = paint(image, ramp(0.03 - np.abs(depth - layer)), grey)  # skin, ..., diaphragm
    for share in rng.permutation(3).tolist()[:count]:  # of the beams: no cyst hides another
        slope = 0.36 * (share - 1) + rng.uniform(-0.03, 0.03)
        radius, down = rng.uniform(0.18, 0.19), rng.uniform(1.32, 1.65)
        cx, cy = slope * down, apex + down
        behind = ramp(radius / down - np.abs(beam - slope), 0.04) * ramp(y - cy)
        image = paint(image, 0.6 * behind * ramp(cy + 0.55 - y, 0.4), 0.80)
        wall = ellipse(x, y, (cx + 0.03 * slope, cy + 0.03), (radius, radius)) * ramp(y - cy)
        image = paint(image, wall, 1.0)
        cyst = ellipse(x, y, (cx, cy), (radius, radius))
        image = paint(image, cyst, 0.02)
        show(cyst)
    speckle = 0.46  # grains are cells of (depth, beam), so they widen with depth
    for fineness, strength in ((40, 0.60), (80, 0.45)):
        row, column = (depth * fineness).astype(int), ((beam + 0.7) * fineness).astype(int)
        speckle = speckle + strength * rng.random((300, 300), np.float32)[row, column]
    sector = ramp(depth - 0.60) * ramp(2.35 - depth) * ramp(0.62 - np.abs(beam), 0.02)
    return image * speckle * sector


# ----------------------------------------------------------------------------- the questions

SIDES = {-1: "left", 1: "right"}  # what a drawing function is given: the answer
COUNTS = {1: "one", 2: "two", 3: "three"}
KINDS = {  # drawer, modality, organ, finding, its details, impression without and with the finding
    "ct": (draw_ct, "ct scan", "brain", "bleed", SIDES, "normal brain", "brain bleed"),
    "smear": (draw_smear, "light microscopy", "blood", "white cell", COUNTS, "only red cells",
              "white cells"),
    "film": (draw_film, "radiograph", "chest", "effusion", SIDES, "clear lungs",
             "pleural effusion"),
    "ultrasound": (draw_ultrasound, "ultrasound", "liver", "cyst", COUNTS, "normal liver",
                   "liver cysts")}
# A class's image number `case` takes the side case % 2, the count case % 3 and the wording
# case % (number of wordings): 3 for sides and 2 for counts, so that all pairs are equally frequent.
WORDINGS = {
    "modality": ("what kind of image is this?", "how was this image made?"),
    "organ": ("which organ or tissue is shown?", "what part of the body is this?"),
    "finding": ("is there {a} {finding} in the image?", "can you see {a} {finding}?"),
    "impression": ("what does this show?", "what is the impression?"),
    "side": ("on which side of the image is the {finding}?", "which half of the image shows the "
             "{finding}?", "is the {finding} on the left or right of the image?"),
    "count": ("how many {finding}s are there?", "what is the number of {finding}s?")}


def encode(rng, image):
    """Vary contrast, brightness and grain; return the image as the bytes of a binary PPM file."""
    image = 0.5 + (image - 0.5) * rng.uniform(0.85, 1.05) + rng.uniform(-0.04, 0.04)
    shape = image.shape[:2]
    grain = rng.random(shape, np.float32) + rng.random(shape, np.float32) - 1
    image = (image.T + rng.uniform(0.03, 0.09) * grain.T).T  # .T: the grain is that of all colours
    pixels = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert("RGB").save(stream, format="PPM")
    return stream.getvalue()


def read_case(number):
    """What a class's image of that number shows: its kind's name, side or count, 0 without a finding, and case."""
    case, has_finding, name = number // 8, number % 2, list(KINDS)[number % 8 // 2]
    details = list(KINDS[name][4])
    return name, details[case % len(details)] if has_finding else 0, case


def draw_image(split, number, seed=0, size=SIZE, show=ignore):
    """The bytes of an image file of size x size pixels. Odd numbers show their kind's finding."""
    name, value, _ = read_case(number)
    rng = np.random.default_rng([seed, list(SPLITS).index(split), number])
    return encode(rng, KINDS[name][0](rng, value, size, show))


def image_records(split, number, image):
    """Yield the records of an image, which may be None where their words suffice."""
    name, value, case = read_case(number)
    _, modality, organ, finding, details, *impressions = KINDS[name]
    answers = {"modality": modality, "organ": organ, "finding": "yes" if value else "no",
               "impression": impressions[value != 0]}
    if value:
        answers["side" if details is SIDES else "count"] = details[value]
    image_name = f"sample_{split}_{number:06d}"
    label = f"{name}_{'' if value else 'no_'}{finding}".replace(" ", "_")
    words = {"a": "an" if finding[0] in "aeiou" else "a", "finding": finding}
    for type, answer in answers.items():
        question = WORDINGS[type][case % len(WORDINGS[type])].format(**words)
        yield Record(f"{image_name}_{type}", question, answer, image, f"{image_name}.ppm",
                     type=type, labels=(label,))


def write_caption(number):
    """One phrase for all that the questions ask: "ct scan of the brain with a bleed on the left"."""
    name, value, _ = read_case(number)
    _, modality, organ, finding, details, *_ = KINDS[name]
    a = "an" if finding[0] in "aeiou" else "a"
    if details is SIDES:
        shown = f"with {a} {finding} on the {details[value]}" if value else f"without {a} {finding}"
    else:
        shown = f"with {details[value]} {finding}{'s' * (value > 1)}" if value else f"without {finding}s"
    return f"{modality} of the {organ} {shown}"


def numbers():
    """Yield (split, number) of every image, the splits in turns: who wants the first of each has them soon."""
    for number in range(max(SPLITS.values()) * 2 * len(KINDS)):
        yield from ((split, number) for split, cases in SPLITS.items() if number < cases * 2 * len(KINDS))


def records(size=SIZE, seed=0):
    """Yield (split, Record): the questions of an image one after another."""
    for split, number in numbers():
        for record in image_records(split, number, draw_image(split, number, seed, size)):
            yield split, record


def caption_records(question, size=SIZE, seed=1):
    """Yield (split, Record): a caption an image, drawn with another seed than the images of the questions."""
    for split, number in numbers():
        name = f"sample_captions_{split}_{number:06d}"
        yield split, Record(name, question, write_caption(number), draw_image(split, number, seed, size),
                            f"{name}.ppm")


def box_records(ask, size=SIZE, seed=2):
    """Yield (split, Record): where an image's finding is, if it has one; drawn with a seed of their own."""
    for split, number in numbers():
        name, finding, masks = f"sample_boxes_{split}_{number:06d}", KINDS[read_case(number)[0]][3], []
        image = draw_image(split, number, seed, size, masks.append)
        boxes = {finding: tuple(sorted(map(bounds, masks)))}
        yield split, Record(name, ask(finding), image=image, image_name=f"{name}.ppm", type=finding, boxes=boxes)


# ----------------------------------------------------------------------------- studies in time

TOPS = {1: 0.22, 2: -0.07, 3: -0.36}  # of an effusion by its size: 32 pixels of 224 apart; the dome is at 0.46
INDICATIONS = ("cough", "fever", "chest pain", "weight loss", "leg pain")
STUDY_CASES = [  # (side, size before or 0 or None without a film of before, size now): each change 6 times, none 12
    (side, before, now) for side in SIDES for before in (None, 0, *TOPS) for now in (0, *TOPS)
    for _ in range(1 if before or now else 3)]
STUDY_WORDS = {  # change: findings, impression
    "present": ("there is an effusion on the {side}.", "effusion on the {side}."),
    "absent": ("there is no effusion.", "no effusion."),
    "new": ("the effusion on the {side} is new.", "new effusion on the {side}."),
    "resolved": ("the effusion on the {side} has resolved.", "resolved effusion on the {side}."),
    "larger": ("the effusion on the {side} is larger than before.", "larger effusion on the {side}."),
    "smaller": ("the effusion on the {side} is smaller than before.", "smaller effusion on the {side}."),
    "unchanged": ("the effusion on the {side} is unchanged.", "unchanged effusion on the {side}.")}


def name_change(before, now):
    """What has become of an effusion, by its size in both films, 0 for none; before: None without a film."""
    if not now:
        return "resolved" if before else "absent"
    if not before:
        return "present" if before is None else "new"
    return "larger" if now > before else "smaller" if now < before else "unchanged"


def read_study_case(number):
    """What a study of that number shows, as in STUDY_CASES; any 48 that follow one another are all of them."""
    return STUDY_CASES[number * 7 % len(STUDY_CASES)]


def write_study(side, before, now):
    """{section: text} of the report on a study."""
    findings, impression = (words.format(side=SIDES[side]) for words in STUDY_WORDS[name_change(before, now)])
    return {"findings": findings, "impression": impression}


def draw_study_film(split, number, film, side, effusion, seed=3, size=SIZE):
    """The bytes of a patient's film 0, of before, or 1: one body, two exposures, an effusion of a size in TOPS or 0."""
    place = [seed, list(SPLITS).index(split), number]
    body, rng = np.random.default_rng(place), np.random.default_rng([*place, film])
    top = TOPS.get(effusion, 0) + rng.uniform(-0.04, 0.04)
    return encode(rng, draw_film(body, side if effusion else 0, size, top=top))


def study_records(write, size=SIZE, seed=3):
    """
    Yield (split, Record): a study of a patient each. write: what makes a Record of a name, its group, its sections,
    its Views, and by their names of the prior study's sections and Views and of the type.
    """
    for split, number in numbers():
        side, before, now = read_study_case(number)
        name, sections = f"sample_studies_{split}_{number:06d}", write_study(side, before, now)
        sections["indication"] = INDICATIONS[number // len(STUDY_CASES) % len(INDICATIONS)]
        view, type, prior = (View(draw_study_film(split, number, 1, side, now, seed, size), f"{name}.ppm", "frontal"),
                             "no prior", ((), ()))
        if before is not None:
            type, film = name_change(before, now), draw_study_film(split, number, 0, side, before, seed, size)
            prior = write_study(side, None, before), [View(film, f"{name}_before.ppm", "frontal")]
        yield split, write(name, name, sections, [view], prior=prior, type=type)


def contact_sheet(path):
    """Write a PNG of 24 test images, a row a kind, each over one of its questions and answers."""
    side, height = 148, 210  # pixels, of a picture and of a row
    sheet = Image.new("RGB", (6 * (side + 4), 4 * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for place in range(24):
        row, column = divmod(place, 6)  # columns 0, 2 and 4 have the finding
        number = 8 * (column // 2) + 2 * row + 1 - column % 2
        record = list(image_records("test", number, draw_image("test", number)))[(4, 0, 4, 1, 2, 3)[column]]
        left, top = column * (side + 4) + 2, row * height + 2
        picture = Image.open(io.BytesIO(record.image))
        sheet.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (left, top))
        lines = textwrap.wrap(record.question, 24)
        draw.text((left, top + side + 1), "\n".join(lines), "black", font, spacing=1)
        draw.text((left, top + side + 1 + 15 * len(lines)), record.answer, "#0b5fa5", font)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(96, Image.Quantize.FASTOCTREE, dither=0).save(path, optimize=True)


if __name__ == "__main__":
    contact_sheet(sys.argv[1])
