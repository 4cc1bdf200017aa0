"""
Measure how far the comparison of images can be trusted, and look at what the leak guard finds.

    python extras/look/leaks.py                                   drawn images, and real ones where raw/ has them
    python extras/look/leaks.py --folder=eyes                     a folder of images of which no two are one
    python extras/look/leaks.py --train=path_vqa --test=path_vqa  draws the pairs of two prepared splits

The first two print for each set of images how many pairs of it are called alike, and which share of altered
copies is found again, by the hash of 255 bits alone, as it was done once (at most 48 of them differ), and as
prepare/looks.py does it. docs/leaks.md says what came of it.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import io
import time
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from plumbing.flags import Count, UserError, Whole, parse_command_line, run
from plumbing.pixels import load_image
from plumbing.shards import Shard
from prepare.datasets import DATASETS
from prepare.looks import FINGERPRINT, alike, fingerprint, propose, whole


@dataclass(frozen=True)
class Config:
    train: str = ""  # prepared dataset with a training split; none: measure
    test: str = ""  # prepared dataset with a test split
    folder: str = ""  # of images to measure in place of the drawn ones and those in raw/
    raw_dir: str = "raw"  # where real images may be
    shards_dir: str = "shards"  # where prepare/all.py put them
    images: Count = 300  # to draw of each kind
    copied: Count = 60  # images of each set of which copies are made
    pairs: Count = 24  # to draw, spread evenly over those found
    output: str = "out/leaks.png"  # the drawing; its pairs are printed, too
    seed: Whole = 0  # of the drawn images and of those that are copied


def jpeg(image, quality):
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream).convert("RGB")


def cut(image, share, sides="left top right bottom"):
    """The image without this share of it on each of these sides."""
    left, top, right, bottom = (share * (side in sides) for side in ("left", "top", "right", "bottom"))
    width, height = image.size
    return image.crop((round(left * width), round(top * height), width - round(right * width),
                       height - round(bottom * height)))


COPIES = {
    "half as large, jpeg 60": lambda image: jpeg(image.reduce(2), 60),
    "112 x 112": lambda image: image.resize((112, 112), Image.Resampling.BICUBIC),
    "jpeg 30": lambda image: jpeg(image, 30),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "15% brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "20% more contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.2),
    "gamma 0.7": lambda image: image.point(lambda value: 255 * (value / 255) ** 0.7),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(image.width / 200)),
    "1% cut off each side": lambda image: cut(image, 0.01),
    "3% cut off each side": lambda image: cut(image, 0.03),
    "5% cut off each side": lambda image: cut(image, 0.05),
    "8% cut off each side": lambda image: cut(image, 0.08),
    "10% cut off the left": lambda image: cut(image, 0.1, "left"),
    "mirrored": ImageOps.mirror,
    "turned by 90 degrees": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "turned by 180 degrees": lambda image: image.transpose(Image.Transpose.ROTATE_180),
    "mirrored, 3% cut, jpeg 60": lambda image: jpeg(cut(ImageOps.mirror(image), 0.03), 60),
    "framed in black": lambda image: ImageOps.expand(image, (0, image.width // 6)),
    "framed in white, jpeg 70": lambda image: jpeg(
        ImageOps.expand(image, (image.width // 6, 0), "white"), 70),
    "turned by 2 degrees": lambda image: image.rotate(2, Image.Resampling.BICUBIC)}


# ----------------------------------------------------------------------------- drawn images of one pattern

def draw_eye(rng, size=192):
    """A photograph of the back of an eye: one lit disc, vessels of its own."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    side, far = rng.choice([-1, 1]), np.hypot(x, y)
    disc_x, disc_y = side * rng.uniform(0.19, 0.25), rng.uniform(-0.04, 0.04)
    light = rng.uniform(0.5, 0.74) + rng.uniform(-0.2, 0.2) * x + rng.uniform(-0.2, 0.2) * y
    light += 0.35 * np.exp(-((x - disc_x) ** 2 + (y - disc_y) ** 2) / 0.003)
    light -= rng.uniform(0.2, 0.6) * far ** 2
    image = Image.fromarray((light * 255).clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for vessel in range(10):
        at, course = np.array([disc_x + 0.5, disc_y + 0.5]) * size, (-1) ** vessel * rng.uniform(0.3, 1.4)
        for step in range(70):
            course += rng.normal(0, 0.12)
            to = at + 1.6 * np.array([-side * np.cos(course), np.sin(course)])
            pen.line((*at, *to), fill=90, width=max(1, 3 - step // 25))
            at = to
    return Image.fromarray((np.asarray(image) * (far < 0.48)).astype(np.uint8)).convert("RGB")


def draw_oct(rng, size=192):
    """A slice through a retina (optical coherence tomography): layers below a dent, a few cysts, speckle."""
    x, y = np.arange(size) / size, np.arange(size)[:, None] / size
    dent = rng.uniform(0.05, 0.12) * np.exp(-((x - rng.uniform(0.45, 0.55)) / 0.12) ** 2)
    depth = rng.uniform(0.29, 0.41) + rng.uniform(-0.08, 0.08) * (x - 0.5) + dent
    image = np.zeros((size, size))
    for level, thick in zip((0.75, 0.4, 0.55, 0.3, 0.5, 0.25, 0.9, 0.95, 0.5),
                            (0.02, 0.05, 0.03, 0.03, 0.03, 0.05, 0.015, 0.02, 0.1)):
        wavy = np.interp(x, np.linspace(0, 1, 12), rng.normal(0, 0.004, 12))
        below = depth + thick * rng.uniform(0.8, 1.2) + wavy
        image = np.where((y >= depth) & (y < below), level, image)
        depth = below
    for _ in range(rng.integers(0, 5)):
        cyst = ((x - rng.uniform(0.1, 0.9)) / 1.5) ** 2 + (y - rng.uniform(0.4, 0.6)) ** 2
        image = np.where(cyst < rng.uniform(0.01, 0.05) ** 2, 0.1, image)
    image = (image + 0.06) * rng.gamma(6, 1 / 6, (size, size))
    return Image.fromarray((image * 255).clip(0, 255).astype(np.uint8)).convert("RGB")


def draw_smear(rng, size=192):
    """A blood smear: red cells at random, and up to two white ones."""
    image = Image.new("RGB", (size, size), (225, 210, 205))
    pen = ImageDraw.Draw(image)
    cells = [((9, 12), (205, 140, 140), (215, 165, 165))] * rng.integers(30, 60)
    for radii, rim, heart in cells + [((16, 22), (170, 140, 190), (95, 50, 130))] * rng.integers(0, 3):
        x, y, radius = *rng.uniform(0, size, 2), rng.uniform(*radii)
        for r, colour in ((radius, rim), (radius / 2, heart)):
            pen.ellipse((x - r, y - r, x + r, y + r), colour)
    return image


# ----------------------------------------------------------------------------- sets of images

REAL = {"bccd": "BCCD/JPEGImages/*", "busi": "Dataset_BUSI_with_GT/*/*.png",
        "nih_cxr14": "images/*.png", "vqa_rad": "VQA_RAD Image Folder/*", "dental_xray_cv": "data/*/images/*"}


def image_sets(config):
    """(name, function that gives {name: image}) of each set."""
    def read(paths):
        return {path.name: load_image(path.read_bytes(), 448) for path in sorted(paths)}

    if config.folder:
        paths = [path for path in Path(config.folder).rglob("*") if path.is_file()]
        yield Path(config.folder).name, lambda: read(paths)
        return
    for name, draw in (("drawn eyes", draw_eye), ("drawn OCT", draw_oct), ("drawn smears", draw_smear)):
        yield name, lambda: {str(number): draw(np.random.default_rng([config.seed, number]))
                             for number in range(config.images)}
    for name, pattern in REAL.items():
        paths = [path for path in (Path(config.raw_dir) / name).glob(pattern) if "_mask" not in path.stem]
        if paths:
            yield name, lambda: read(paths)


def hash_alone(images):
    """The hashes of images as they were once: frequencies above their median or not, (n, 255) of 1, -1."""
    cosines = np.cos(np.pi / 64 * np.arange(16)[:, None] * (np.arange(64) + 0.5))
    grey = np.stack([np.asarray(image.convert("L").resize((64, 64), Image.Resampling.BOX), float)
                     for image in images])
    frequencies = (cosines @ grey @ cosines.T).reshape(len(images), 256)[:, 1:]
    middle = np.median(frequencies, axis=1, keepdims=True)
    return np.where(frequencies > middle, np.float32(1), np.float32(-1))


def looks_of(images):
    return np.frombuffer(b"".join(map(fingerprint, images)), FINGERPRINT)["look"]


def measure(name, images, config):
    """Print a set's rows: pairs called alike before and now, then the copies found before and now."""
    names, images, start = list(images), list(images.values()), time.perf_counter()
    looks_of([alter(images[0]) for alter in COPIES.values()])
    seconds = config.copied * (time.perf_counter() - start) + 0.02 * len(images)
    print(f"{name}: about {seconds:.0f} s", flush=True)
    hashes, looks = hash_alone(images), looks_of(images)
    before = np.argwhere(np.triu(hashes @ hashes.T >= 255 - 2 * 48, 1))
    proposed, clock = len(propose(looks, looks, whole)[0]), time.process_time()
    now = alike(looks, looks)
    clock, now = time.process_time() - clock, now[now[:, 0] < now[:, 1]]
    print(f"{name}: {len(images):,} images; pairs called alike (images in them): before {len(before):,} "
          f"({len(np.unique(before)):,}), now {len(now):,} ({len(np.unique(now)):,}); proposed {proposed:,}, "
          f"{1e3 * clock / max(proposed, 1):.2f} ms each", flush=True)
    if name == "dental_xray_cv":  # the name before .rf. is the film's, of which there are augmented copies
        films = np.array([path.partition(".rf.")[0] for path in names])
        same = np.argwhere(np.triu(films[:, None] == films, 1))
        for when, pairs in (("before", before), ("now", now)):
            true = (films[pairs[:, 0]] == films[pairs[:, 1]]).sum() if len(pairs) else 0
            print(f"  pairs of one film, {when}: {true} of {len(same)} found; of two: {len(pairs) - true}")
    some = np.random.default_rng(config.seed).permutation(len(images))[:config.copied]
    for kind, alter in COPIES.items():
        copies, rows = [alter(images[number]) for number in some], np.arange(len(some))
        hits_before = (hash_alone(copies) * hashes[some]).sum(1) >= 255 - 2 * 48
        pairs = alike(looks_of(copies), looks[some])
        hits = np.isin(rows, pairs[pairs[:, 0] == pairs[:, 1], 0])
        print(f"  {kind:26} before {hits_before.mean():4.0%}  now {hits.mean():4.0%}", flush=True)
    print(f"  {time.perf_counter() - start:.0f} s", flush=True)


def measure_path_vqa(raw):
    """Print how many images of PathVQA's training part its test part has, too, before and now."""
    files = {"train": {}, "test": {}}
    for split, record in DATASETS["path_vqa"].read(raw):
        files.get(split, {})[record.image] = None
    images = {split: [load_image(content, 448) for content in contents] for split, contents in files.items()}
    before = np.argwhere(hash_alone(images["train"]) @ hash_alone(images["test"]).T >= 255 - 2 * 48)
    now = alike(looks_of(images["train"]), looks_of(images["test"]))
    both = {tuple(pair) for pair in before.tolist()} & {tuple(pair) for pair in now.tolist()}
    print(f"path_vqa: {len(images['train']):,} training images, {len(images['test']):,} test images; pairs "
          f"called alike: before {len(before)}, now {len(now)}, both {len(both)}", flush=True)


# ----------------------------------------------------------------------------- prepared splits

def draw_pairs(pairs, train, test, output):
    """A sheet of pairs, the training image on the left of each."""
    columns, size = 4, 168
    sheet = Image.new("RGB", (columns * (2 * size + 12), -(-len(pairs) // columns) * (size + 28)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (one, other) in enumerate(pairs):
        x, y = place % columns * (2 * size + 12), place // columns * (size + 28)
        for shift, image in ((0, train.read_image(one)), (size, test.read_image(other))):
            sheet.paste(Image.fromarray(image).resize((size, size)), (x + shift, y))
        pen.text((x + 4, y + size + 4), f"train {one}, test {other}", "black")
    output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(output)


def show_pairs(config):
    """Print how many images of a training and of a test split are one, and draw some of them."""
    train, test = (Shard(Path(config.shards_dir) / name / split)
                   for name, split in ((config.train, "train"), (config.test, "test")))
    pairs = alike(*(np.frombuffer(shard.read_verified("fingerprints.bin"), FINGERPRINT)["look"]
                    for shard in (train, test)))
    of_train, of_test = (len(np.unique(column)) for column in pairs.T)
    print(f"{len(pairs)} pairs alike: {of_train} training images, {of_test} test images")
    if len(pairs):
        shown = np.unique(np.linspace(0, len(pairs) - 1, config.pairs).round().astype(int))
        draw_pairs(pairs[shown], train, test, Path(config.output))
        print(f"{len(shown)} of them drawn in {config.output}")


def main(config):
    if bool(config.train) != bool(config.test):
        raise UserError("--train and --test: name both, or neither to measure")
    if config.train:
        return show_pairs(config)
    for name, read in image_sets(config):
        measure(name, read(), config)
    raw = Path(config.raw_dir) / "path_vqa"
    if not config.folder and raw.is_dir():
        print("path_vqa: a minute or so", flush=True)
        measure_path_vqa(raw)


if __name__ == "__main__":
    CONFIG = parse_command_line(Config)
    run(main, CONFIG)
