"""
Prepared datasets of random pixels and tokens, for machines without any: as long, and with as many questions about an
image, as PathVQA's.

    python extras/bench/made_up.py --shards_dir=out/gpu/shards           about 130 MB in all, 15 s on a core
    python extras/bench/made_up.py --shards_dir=out/gpu/shards --tiny=true

A dataset that is there stays as it is. The tokenizer beside them knows numbers alone.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import hashlib
import io
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
from PIL import Image

from data import BOS, EOS, Record
from extras.bench.progress import tell
from plumbing.devices import usable_cores
from plumbing.flags import parse_command_line, run
from plumbing.shards import PROMPT_VERSION, SHARD_VERSION
from prepare.leaks import guard
from prepare.shards import ImageSettings, SplitWriter, encode_image

# Of PathVQA's test, every twentieth part of them and both ends: of the train split they are nearly the same
QUESTIONS = (1, 3, 3, 4, 4, 4, 5, 6, 7, 7, 7, 7, 8, 8, 8, 10, 11, 12, 13, 16, 28)  # about an image
PROMPT = (8, 9, 9, 9, 9, 9, 10, 11, 11, 11, 12, 13, 14, 16, 17, 20, 22, 25, 28, 34, 62)  # tokens behind the image
ANSWER = (1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 3, 3, 4, 5, 5, 7, 11, 47)  # tokens
BEFORE, BEHIND, FIRST = [4, 5], [6, 7, 8], 100  # of each prompt, as "Question:" and "Answer:"; of other tokens
CLASSES = ("one", "another", "a third")


@dataclass(frozen=True)
class Config:
    shards_dir: str = "shards"  # where they are written
    tiny: bool = False  # small images, few of them, and 512 tokens in the vocabulary


@dataclass(frozen=True)
class Sizes:
    """Of a dataset: its images by split, their sides, and how they are said to be brought to them."""
    images: dict
    sides: tuple  # height and width in pixels
    resize: str = "squash"
    size: int = 224  # that resize is about


def datasets(tiny):
    """{name: Sizes}; of images with labels alone the name is "labelled"."""
    if tiny:
        return {"vqa": Sizes({"train": 6, "test": 4}, (224, 224)), "labelled": Sizes({"train": 24}, (224, 224)),
                "vqa_448": Sizes({"train": 4}, (64, 96), "fit", 96),
                "vqa_1280": Sizes({"train": 3}, (96, 128), "fit", 128),
                "vqa_tiles": Sizes({"train": 4}, (64, 96), "tiles:12", 32)}
    return {"vqa": Sizes({"train": 240, "test": 858}, (224, 224)), "labelled": Sizes({"train": 512}, (224, 224)),
            "vqa_448": Sizes({"train": 48}, (448, 448), "fit", 448),
            "vqa_1280": Sizes({"train": 16}, (1280, 1280), "fit", 1280),
            "vqa_tiles": Sizes({"train": 16}, (1008, 1344), "tiles:12", 336)}


def draw(rng, parts):
    """A number between the ends of twenty equally likely parts."""
    return round(float(np.interp(rng.random(), np.linspace(0, 1, len(parts)), parts)))


def draw_image(rng, sides):
    """A JPEG file of soft spots, some ten pixels wide, and grain."""
    height, width = sides
    spots = Image.fromarray(rng.integers(0, 256, (height // 10 + 2, width // 10 + 2, 3), np.uint8))
    pixels = np.asarray(spots.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    pixels = pixels + rng.integers(-5, 6, (height, width, 1), np.int16)
    stream = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=95)
    return stream.getvalue()


class Numbers:
    """A tokenizer of texts of numbers, each the token of that id."""

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    @staticmethod
    def write(record):
        prompt, answer = ([int(number) for number in text.split()] for text in (record.question, record.answer))
        tokens = [BOS, -1, *prompt, *answer, EOS]
        return tokens, [(2 + len(prompt), len(tokens))], (2, 2 + len(prompt))


def draw_records(rng, sizes, split, vocab_size, labelled):
    """The Records of a split."""
    def words(count):
        return rng.integers(min(FIRST, vocab_size // 2), vocab_size, max(count, 1)).tolist()

    for number in range(sizes.images[split]):
        image, name = draw_image(rng, sizes.sides), f"{split}_{number}"
        if labelled:
            yield Record(name, image=image, image_name=name, labels=(CLASSES[number % len(CLASSES)],))
        for question in range(0 if labelled else draw(rng, QUESTIONS)):
            prompt = [*BEFORE, *words(draw(rng, PROMPT) - len(BEFORE + BEHIND)), *BEHIND]
            yield Record(f"{name}_{question}", " ".join(map(str, prompt)), " ".join(map(str, words(draw(rng, ANSWER)))),
                         image, name)


def tokenizer_file(vocab_size):
    """The bytes of a SentencePiece model, as protobuf writes them, whose pieces are numbers, each that of its id."""
    def field(number, content):
        length = bytes([len(content) & 127 | 128, len(content) >> 7]) if len(content) > 127 else bytes([len(content)])
        return bytes([number << 3 | 2]) + length + content

    def piece(text, kind):  # its text, score and kind: 1 plain, 2 unknown, 3 control
        return field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", -1.0) + bytes([0x18, kind]))

    ends = piece("<unk>", 2), piece("<s>", 3), piece("</s>", 3)
    return b"".join([*ends, *(piece(f"\u2581{number}", 1) for number in range(len(ends), vocab_size))])


def write(folder, sizes, vocab_size, pool):
    """Write a dataset into a folder, which is there once all of it is."""
    labelled, partial_folder = folder.name == "labelled", folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    content = tokenizer_file(vocab_size)
    if not labelled:
        (partial_folder / "tokenizer.model").write_bytes(content)
    image = ImageSettings(sizes.size, sizes.resize, "jpeg", 97)
    kind = SimpleNamespace(kind="classification" if labelled else "image questions", asks=not labelled,
                           classes=CLASSES if labelled else (), multi_label=False)
    for number, split in enumerate(sizes.images):
        writer = SplitWriter(partial_folder / split, kind, Numbers(vocab_size),
                             partial(pool.submit, encode_image, settings=image), 64)
        for record in draw_records(np.random.default_rng([number, *sizes.sides]), sizes, split, vocab_size, labelled):
            writer.add(record)
        writer.close({"dataset": folder.name, "shard_version": SHARD_VERSION, "prompt_version": PROMPT_VERSION,
                      "image": image.facts(), "splits": sorted(sizes.images),
                      "tokenizer_sha256": "" if labelled else hashlib.sha256(content).hexdigest()})
    partial_folder.rename(folder)


def main(config):
    with ThreadPoolExecutor(usable_cores()) as pool:  # Pillow lets go of the interpreter's lock
        for name, sizes in datasets(config.tiny).items():
            folder = Path(config.shards_dir) / name
            if not folder.is_dir():
                write(folder, sizes, 512 if config.tiny else 32000, pool)
                tell(f"{folder}: written")
    guard(config.shards_dir, "keep")  # whoever trains wants them compared with the test split


if __name__ == "__main__":
    run(main, parse_command_line(Config))
