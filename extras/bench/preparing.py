"""
How fast images are prepared, on one core, step by step, and what that means for the whole mix.

    python extras/bench/preparing.py --data=path_vqa,vqa_rad

reads up to --images image files of each dataset's raw folder, times each step of
prepare/shards.encode_image on all of them, and beside it what plain Pillow takes to decode and
resize the same files. The steps run in turns, so that a machine's moods meet all of them.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import io
import tempfile
import time
from collections import defaultdict
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from PIL import Image

from extras.bench.progress import Progress
from plumbing.flags import Count, Range, UserError, parse_command_line, run
from plumbing.pixels import FORMATS, load_image, resize_image
from prepare.datasets import DATASETS
from prepare.looks import fingerprint
from prepare.shards import ImageSettings, SplitWriter, encode_image
from zoo.chatml import open_tokenizer

SETTINGS = ImageSettings(224, "squash", "jpeg", 97)  # prepare/all.py's defaults
CORES = 16


@dataclass(frozen=True)
class Config:
    data: str = "path_vqa,vqa_rad"  # datasets whose raw files are there
    raw_dir: str = "raw"  # as prepare/all.py's
    tokenizer: str = "weights/llama_tokenizer/tokenizer.model"  # as prepare/all.py's
    images: Count = 300  # of each dataset, no two the same
    enlarge: Annotated[int, Range(1, 16)] = 1  # times along each side, to stand for larger files
    rounds: Count = 3  # over all images; the fastest counts


def read_records(name, config):
    """The records of a dataset up to its so many-th image."""
    dataset = DATASETS.get(name)
    if dataset is None or not dataset.find(config.raw_dir):
        raise UserError(f"--data: no raw files of {name!r} in {config.raw_dir}")
    records, images = [], set()
    for _, record in dataset.read(dataset.raw(config.raw_dir)):
        images.update(view.image for view in record.views())
        if len(images) > config.images:
            break
        records.append(record)
    return records


def enlarge(content, times):
    """The image as a larger JPEG, of quality 90."""
    image, stream = load_image(content), io.BytesIO()
    image.resize((image.width * times, image.height * times), Image.Resampling.BICUBIC).save(
        stream, "JPEG", quality=90)
    return stream.getvalue()


def plain_pillow(content):
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    return image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)


def time_steps(contents, rounds):
    """{step: seconds an image}, each the fastest of the rounds."""
    seconds, progress = defaultdict(lambda: [0.0] * rounds), Progress(rounds, "rounds")
    for number in range(rounds):
        for content in contents:
            def timed(step, do, *arguments, **settings):
                start = time.perf_counter()
                result = do(*arguments, **settings)
                seconds[step][number] += time.perf_counter() - start
                return result

            timed("plain Pillow, decode and resize", plain_pillow, content)
            image = timed("decode", load_image, content, at_least=2 * SETTINGS.size)
            small = timed("resize", resize_image, image, SETTINGS.size, SETTINGS.resize)
            timed("hash", fingerprint, image)
            timed("encode", lambda: small.save(io.BytesIO(), "JPEG", quality=97, subsampling="4:4:4"))
            timed("encode_image, all of it", encode_image, content, SETTINGS)
        progress.row(f"{len(contents)} images, {sum(times[number] for times in seconds.values()):.1f} s")
    return {step: min(times) / len(contents) for step, times in seconds.items()}


def alter(contents):
    """Mean difference in grey levels that decoding at reduced scale makes at 224 pixels, and how often."""
    errors = []
    for content in contents:
        whole, reduced = load_image(content), load_image(content, at_least=2 * SETTINGS.size)
        if reduced.size != whole.size:
            one, other = (np.asarray(resize_image(image, 224), np.int16) for image in (whole, reduced))
            errors.append(np.abs(one - other).mean())
    return np.mean(errors) if errors else 0.0, len(errors)


def time_writer(name, records, tokenizer):
    """Seconds a sample of the one process that hashes, tokenizes and writes what the others encode."""
    ready = Future()
    first = next(view.image for record in records for view in record.views() if view.image)
    ready.set_result(encode_image(first, SETTINGS))
    with tempfile.TemporaryDirectory() as folder:
        writer = SplitWriter(Path(folder) / "train", DATASETS[name], tokenizer, lambda content: ready, 4)
        start = time.perf_counter()
        for record in records:
            writer.add(record)
        writer.close({})
        return (time.perf_counter() - start) / len(records)


def main(config):
    tokenizer = open_tokenizer(config.tokenizer)
    totals, writers = [], []
    for name in config.data.split(","):
        records = read_records(name, config)
        contents = list({view.image: None for record in records for view in record.views() if view.image})
        if config.enlarge > 1:
            contents = [enlarge(content, config.enlarge) for content in contents]
        sizes = [load_image(content).size for content in contents]
        seconds = time_steps(contents, config.rounds)
        plain, total = seconds["plain Pillow, decode and resize"], seconds["encode_image, all of it"]
        print(f"{name}: {len(contents)} images, {np.mean([w * h for w, h in sizes]) / 1e6:.2f} megapixels "
              "on average; images/s on one core")
        for step, each in seconds.items():
            print(f"  {step:32} {1 / each:8,.0f}   {plain / each:5.2f} of plain Pillow")
        error, reduced = alter(contents)
        print(f"  {reduced} were decoded at reduced scale, which alters a pixel by {error:.2f} grey levels")
        writers.append(time_writer(name, records, tokenizer))
        print(f"  the one process that writes: {1 / writers[-1]:,.0f} samples/s")
        totals.append(total)
    samples = sum(dataset.counts.get("train", 0) for dataset in DATASETS.values()
                  if dataset.kind != "classification" and not dataset.only_by_name and not dataset.drawn)
    images = samples * np.mean(totals) / CORES / 3600
    print(f"All pretraining, {samples:,} published training samples, at most one image each, at the mean "
          f"of these rates: {images:.1f} hours of images on {CORES} cores, "
          f"{samples * np.mean(writers) / 3600:.1f} hours of writing beside them (an estimate)")


if __name__ == "__main__":
    run(main, parse_command_line(Config))
