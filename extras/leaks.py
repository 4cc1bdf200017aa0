"""
Look at what the leak guard finds, and measure how far it can be trusted.

    python extras/leaks.py --train=path_vqa --test=path_vqa

draws pairs of a training and a test image that prepare/leaks.py takes for the same one, and prints
how many bits of the look (of 256) differ between the images of the two splits, and between images
and altered copies of themselves. Of two datasets that have no image in common, every pair within
ALIKE bits is a false alarm.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, not extras/

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance

from data import Shard
from plumbing.flags import parse_command_line, run
from prepare.leaks import ALIKE, FINGERPRINT, alike, fingerprint

COPIES = {
    "half as large, jpeg 60": lambda image: jpeg(image.resize((112, 112), Image.Resampling.BICUBIC), 60),
    "1.7 times as large": lambda image: image.resize((380, 380), Image.Resampling.BILINEAR),
    "jpeg 30": lambda image: jpeg(image, 30),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "15% brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "20% more contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.2),
    "1% cut off each side": lambda image: image.crop((2, 2, 222, 222)),
    "3% cut off each side": lambda image: image.crop((7, 7, 217, 217)),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)}


@dataclass(frozen=True)
class Config:
    train: str = "path_vqa"  # prepared dataset with a training split
    test: str = "path_vqa"  # prepared dataset with a test split
    shards_dir: str = "shards"  # where prepare/all.py put them
    pairs: int = 24  # to draw, spread evenly from the most to the least alike
    output: str = "out/leaks.png"  # the drawing; its pairs are printed, too
    seed: int = 0  # of the images that are copied


def jpeg(image, quality):
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream).convert("RGB")


def distances(these, those):
    """Bits that differ, between looks of (..., 32) uint8."""
    return np.bitwise_count(these ^ those).sum(-1, dtype=np.int64)


def compare_splits(train, test):
    """Print how many pairs of images of the two splits are how far apart."""
    counts = np.zeros(257, np.int64)
    for look in test:
        counts += np.bincount(distances(train, look), minlength=257)
    total = counts.sum()
    print(f"{total:,} pairs of images; bits of 256 that differ:")
    for bits in (0, 16, 32, ALIKE, 64, 80, 96):
        near = counts[:bits + 1].sum()
        print(f"  at most {bits:3}: {near:9,} pairs, {near / total:.1e} of all")


def compare_copies(shard, seed):
    """Print how far altered copies of up to 500 images are from them."""
    count = len(shard.image_index)
    numbers = np.random.default_rng(seed).permutation(count)[:500]
    images = [Image.fromarray(shard.read_image(number)) for number in numbers]
    look = np.frombuffer(b"".join(map(fingerprint, images)), FINGERPRINT)["look"]
    print(f"{len(images)} images of {shard.folder} and their copies; bits that differ:")
    for name, alter in COPIES.items():
        copies = np.frombuffer(b"".join(fingerprint(alter(image)) for image in images), FINGERPRINT)
        bits = distances(look, copies["look"])
        print(f"  {name:23} median {np.median(bits):3.0f}, 99% {np.quantile(bits, 0.99):3.0f}, "
              f"found {np.mean(bits <= ALIKE):6.1%}")


def draw(pairs, bits, train, test, output):
    """A sheet of pairs, the training image on the left of each."""
    columns, size = 4, 168
    rows = -(-len(pairs) // columns)
    sheet = Image.new("RGB", (columns * (2 * size + 12), rows * (size + 28)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, ((one, other), differ) in enumerate(zip(pairs, bits)):
        x, y = place % columns * (2 * size + 12), place // columns * (size + 28)
        for shift, image in ((0, train.read_image(one)), (size, test.read_image(other))):
            sheet.paste(Image.fromarray(image).resize((size, size)), (x + shift, y))
        pen.text((x + 4, y + size + 4), f"train {one}, test {other}: {differ} bits differ", "black")
    output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(output)


def main(config):
    train, test = (Shard(Path(config.shards_dir) / name / split)
                   for name, split in ((config.train, "train"), (config.test, "test")))
    looks = [np.frombuffer(shard.read_verified("fingerprints.bin"), FINGERPRINT)["look"]
             for shard in (train, test)]
    compare_splits(*looks)
    compare_copies(train, config.seed)
    pairs = alike(*looks)
    bits = distances(looks[0][pairs[:, 0]], looks[1][pairs[:, 1]])
    found = [len(np.unique(column)) for column in pairs.T]
    print(f"{len(pairs)} pairs within {ALIKE} bits: {found[0]} training images, {found[1]} test images")
    if len(pairs):
        order = np.argsort(bits, kind="stable")
        shown = order[np.unique(np.linspace(0, len(order) - 1, config.pairs).round().astype(int))]
        draw(pairs[shown], bits[shown], train, test, Path(config.output))
        print(f"{len(shown)} of them drawn in {config.output}")


if __name__ == "__main__":
    run(main, parse_command_line(Config))
