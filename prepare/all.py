"""
Prepare datasets and weights: download what is missing, and write it as shards, which data.py
describes, and as safetensors.

    python prepare/all.py --only=sample            the drawn sample, without a network
    python prepare/all.py --only=path_vqa          one dataset, and LLaMA's tokenizer
    python prepare/all.py --list=true              what there is, and what of it is prepared

A dataset that is prepared, with the same settings, is left alone: run it again after anything.
It ends with a table; the exit code is 1 if a dataset failed, and the others are prepared all the
same.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder: `data` lies above it

from plumbing.flags import (Form, Name, Range, Slices, Text, Threads, UserError, Whole, Window, parse_command_line,
                            run)

Tiles = Annotated[str, Form(r"(\d{1,2}:[1-9]\d{1,4})?", "a level and pixels, as 1:512")]


@dataclass(frozen=True)
class Config:
    only: str = ""  # datasets, weights or "tokenizer", with commas between; all if none are named
    raw_dir: str = "raw"  # downloads, a folder a dataset or set of weights
    shards_dir: str = "shards"  # where prepared datasets go
    weights_dir: str = "weights"  # where prepared weights go
    tokenizer: str = "weights/llama_tokenizer/tokenizer.model"  # LLaMA's; or a chat model's tokenizer.json
    system: Text = ""  # message before each sample, with a chat model's tokenizer; none: there is none
    workers: Threads = 0  # processes that decode images; 0: one a core
    limit: Whole = 0  # take only the first so many samples of each split; 0: all
    image_size: Annotated[int, Range(1, 1 << 12)] = 224  # pixels, height and width of a stored image
    resize: Literal["squash", "crop", "pad", "fit"] = "squash"  # how an image becomes square; fit: keeps its shape
    max_pixels: Annotated[int, Range(0, 1 << 24)] = 0  # at most, with --resize=fit; 0: by --image_size
    max_tiles: Annotated[int, Range(0, 40)] = 0  # squares of --image_size that an image becomes, at most; 0: none
    box_format: Literal["medmo", "qwen"] = "medmo"  # how boxes are written: <box>[[...]]</box>, or JSON with bbox_2d
    report: Literal["both", "findings", "impression"] = "both"  # what of its report a study is answered with
    reasoning: Literal["none", "before", "after", "analysis"] = "none"  # a choice's explanation; analysis: with gpt-oss
    augment: Annotated[int, Range(0, 100)] = 0  # copies of each training image with boxes, mirrored or cropped
    codec: Literal["jpeg", "png"] = "jpeg"  # of stored images; png is lossless and twice as large
    quality: Annotated[int, Range(1, 100)] = 97  # of jpeg; 97 alters a pixel by 1.1 of 255 levels on average
    leaks: Literal["", "drop", "keep"] = ""  # test images in --only to train on; none: as it was, or drop
    own: str = ""  # a folder or file of your own images, questions or studies: prepare it, and stop
    name: Name = ""  # with --own: of its dataset; none: the folder's or file's
    columns: Text = ""  # with --own: what columns are, as image:filename,question:q; else by name
    window: Window = "auto"  # of CT and MR: auto, lung, soft, bone, brain or centre/width; three of them: as colours
    slices: Slices = "all"  # of a volume: all, middle, every:5, or so many at even distances
    tiles: Tiles = ""  # of a pyramidal slide: level:pixels, as 1:512; none: its overview
    folds: Annotated[int, Range(0, 100)] = 0  # with --own: parts by patient, each the test split of a dataset; 0: none
    fold: Annotated[int, Range(-1, 99)] = -1  # of these the one to prepare; -1: all
    dry_run: bool = False  # with --own: write a page of the first samples, and prepare nothing
    convert: str = ""  # a LLaMA's hub folder of pickles: write it as safetensors into weights_dir, and stop
    list: bool = False  # show the datasets and stop


if __name__ == "__main__":
    CONFIG = parse_command_line(Config)  # before torch is imported: --help and a typo are answered at once

import difflib
import functools
import os
import re
import time
import traceback
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

from PIL import Image

from plumbing.files import find_tokenizer, hash_file
from plumbing.pixels import SMART_LEAST, SMART_MOST
from plumbing.shards import PROMPT_VERSION, SHARD_VERSION
from prepare.datasets import DATASETS
from prepare.download import fetch, fetch_hub
from prepare.leaks import REASONS, guard, report_lines, report_rows
from prepare.own_forms import prepare_any
from prepare.shards import (ImageSettings, leftovers, locked, read_manifests, recover, why_stale,
                            write_dataset)
from prepare.weights import WEIGHTS, convert_llama
from zoo.chatml import open_tokenizer
from zoo.harmony import HarmonyTokenizer

TOKENIZER = "huggyllama/llama-7b"  # hub repository; its tokenizer.model is Meta's, unchanged
# Flags of --own that train_cls.py gives again, when it looks whether its folder is as it was
MADE_BY = ("name", "columns", "window", "slices", "tiles", "resize", "codec", "quality", "limit")
TOKENIZER_SHA256 = "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"


def select(only):
    """The names asked for, in the order in which they are prepared; first the tokenizer, if one needs it."""
    known = ["tokenizer", *DATASETS, *WEIGHTS]
    asked = [name.strip() for name in only.split(",") if name.strip()] or [
        name for name in known if name == "tokenizer" or not (DATASETS | WEIGHTS)[name].only_by_name]
    for name in asked:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise UserError(f"--only: there is no {name!r}; did you mean {near}? "
                            f"There are {', '.join(known)}")
    datasets = [DATASETS[name] for name in asked if name in DATASETS]
    if any(dataset.asks and not dataset.train_tokenizer for dataset in datasets):
        asked.append("tokenizer")
    return [name for name in known if name in asked]


def prepare_tokenizer(path):
    """Download LLaMA's tokenizer, unless a file is there. Returns status and message."""
    path = find_tokenizer(path)
    if path.is_file():
        return "up to date", "" if hash_file(path) == TOKENIZER_SHA256 else f"{path} is not LLaMA's"
    if path != Path(Config.tokenizer):
        raise UserError(f"{path}: no tokenizer here; without --tokenizer, LLaMA's is downloaded")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    with locked(path, "fetching the tokenizer"):
        fetch(f"{endpoint}/{TOKENIZER}/resolve/main/tokenizer.model", path, TOKENIZER_SHA256)
    return "ready", f"{path}, from {endpoint}/{TOKENIZER}"


def find_or_download(source, raw_dir):
    """The files of a dataset or of weights, or {} and the status and message that say why there are none."""
    files, raw = source.find(raw_dir), source.raw(raw_dir)
    if files:
        return files, "", ""
    looked = f"no {' or '.join(' + '.join(layout) for layout in source.layouts)} in {raw}"
    by_hand = f"download it from {source.page} into {raw} and run this again"
    if not source.urls and not source.hub:
        return {}, "manual", f"{looked}; {by_hand} (access: {source.access})"
    try:
        with locked(raw, f"downloading {raw}"):
            for url in source.urls:  # what another process has fetched in the meantime is not fetched again
                fetch(url, raw / url.rsplit("/", 1)[1])
            if source.hub and not source.find(raw_dir):
                fetch_hub(source.hub, source.hub_files, raw, source.hub_type, source.revision)
    except UserError as error:
        return {}, "missing", f"{looked}, and {error}; or {by_hand}"
    return source.find(raw_dir), "missing", f"{looked}, even after the download; {by_hand}"


def home_of(source, config):
    """The folder in which the downloads of a dataset or of weights lie, each in a folder of its own."""
    return config.weights_dir if source.in_place else config.raw_dir


def prepare_weights(weights, config):
    """Convert or check one set of weights unless it is there. Returns its status and a message."""
    target = Path(config.weights_dir) / weights.target
    if weights.is_prepared(config.weights_dir):
        return "up to date", ""
    home = home_of(weights, config)
    files, status, message = find_or_download(weights, home)
    if not files:
        return status, message
    with locked(target, f"preparing {weights.name}"):
        if weights.is_prepared(config.weights_dir):  # since another process has let go of the lock
            return "up to date", ""
        weights.write(weights, weights.raw(home), target)
    return "ready", str(target)


def names_chat_model(config):
    """Whether --tokenizer is a chat model's tokenizer.json."""
    return find_tokenizer(config.tokenizer).suffix == ".json"


def require_flags_that_fit(config):
    """Raise UserError where flags do not go together."""
    if config.system.strip() and not names_chat_model(config):
        raise UserError("--system: only a chat model's template has a place for it; name its tokenizer.json, as "
                        "--tokenizer=weights/medmo_4b/tokenizer.json")
    if config.reasoning == "analysis" and not (names_chat_model(config) and isinstance(
            open_tokenizer(config.tokenizer, config.system), HarmonyTokenizer)):
        raise UserError("--reasoning=analysis: only gpt-oss's template has this channel; name its tokenizer.json with "
                        "--tokenizer, or take --reasoning=before")
    if config.max_pixels and (config.resize, config.image_size) != ("fit", Config.image_size):
        raise UserError("--max_pixels: with --resize=fit and in place of --image_size; give "
                        f"--resize=fit --max_pixels={config.max_pixels} alone")
    if 0 < config.max_pixels < SMART_LEAST:
        raise UserError(f"--max_pixels={config.max_pixels}: from {SMART_LEAST} to {SMART_MOST}, pixels of a whole "
                        "image")
    if config.max_tiles and config.resize != "squash":
        raise UserError(f"--max_tiles={config.max_tiles}: leave out --resize={config.resize}; the tiles come near an "
                        "image's aspect")
    if config.max_tiles * config.image_size ** 2 > Image.MAX_IMAGE_PIXELS:
        raise UserError(f"--max_tiles={config.max_tiles}: of --image_size={config.image_size} at most "
                        f"{Image.MAX_IMAGE_PIXELS // config.image_size ** 2}, or an image is too large to be read")


def require_flags_of_own(config):
    """Raise UserError where flags of --own do not go together, or are given without it."""
    names = ("name", "columns", "window", "slices", "tiles", "folds", "fold", "dry_run")
    given = next((name for name in names if getattr(config, name) != getattr(Config, name)), "")
    if not config.own:
        if given:
            raise UserError(f"--{given}: with --own=path alone, data of your own")
        return
    if config.only or config.convert or config.list:
        raise UserError("--own: without --only, --convert and --list; run them one after another")
    if not re.fullmatch(r"(\w[\w.-]*)?", config.name):
        raise UserError(f"--name={config.name:.60}: letters, digits, _, - and points, and first none of these signs")
    if config.folds == 1 or config.fold >= config.folds > 0 or config.fold >= 0 == config.folds:
        raise UserError(f"--folds={config.folds} --fold={config.fold}: two folds or more, and one of them, from 0 to "
                        f"{max(config.folds, 2) - 1}, or none for all")


def image_settings(config):
    resize = "smart" if config.max_pixels else f"tiles:{config.max_tiles}" if config.max_tiles else config.resize
    return ImageSettings(config.max_pixels or config.image_size, resize, config.codec,
                         config.quality if config.codec == "jpeg" else 0)


def prepare_own(config):
    """Prepare a folder or file of one's own, whatever layout it has. Returns the name of its dataset."""
    def open_words():
        prepare_tokenizer(config.tokenizer)
        return open_tokenizer(config.tokenizer, config.system)

    flags = tuple(f"--{name}={getattr(config, name)}" for name in MADE_BY
                  if getattr(config, name) != getattr(Config, name))
    return prepare_any(config, image_settings(config), flags, open_words)


def prepare_dataset(dataset, config):
    """Prepare one dataset unless it is up to date. Returns its status and a message."""
    target, image = Path(config.shards_dir) / dataset.name, image_settings(config)
    facts = {"dataset": dataset.name, "shard_version": SHARD_VERSION,
             "prompt_version": PROMPT_VERSION, "limit": config.limit, "image": image.facts(),
             "licence": dataset.licence}
    facts |= {"task": dataset.task} if dataset.task else {}
    facts |= {"reasoning": config.reasoning} if dataset.task == "choices" else {}
    if dataset.kind == "boxes":
        facts |= {"box_format": config.box_format, "augment": config.augment}
    if dataset.sections:
        facts["report"] = config.report
        dataset = replace(dataset, read=functools.partial(dataset.read, report=config.report))
    own_words = dataset.train_tokenizer and not names_chat_model(config)  # which has to be asked in its words
    if dataset.asks and not own_words:
        tokenizer = open_tokenizer(config.tokenizer, config.system)
        facts["tokenizer_sha256"] = tokenizer.sha256
        facts |= {"system": tokenizer.system} if tokenizer.system else {}
    if any(path.exists() for path in leftovers(target)):  # a killed run's, or a living one's
        with locked(target, f"preparing {dataset.name}"):
            recover(target)
    reason = why_stale(target, facts, dataset.find(config.raw_dir))
    if not reason:
        return "up to date", ""
    print(f"{dataset.name}: {reason}", flush=True)
    sources, status, message = find_or_download(dataset, config.raw_dir)
    if not sources:
        return status, message
    model = dataset.train_tokenizer() if own_words else tokenizer.path.read_bytes() if dataset.asks else b""
    with locked(target, f"preparing {dataset.name}"):
        if not why_stale(target, facts, sources):  # since another process has let go of the lock
            return "up to date", ""
        write_dataset(target, dataset, dataset.raw(config.raw_dir), sources, model, facts,
                      config.workers or os.cpu_count())
    return "ready", ""


def attempt(name, config):
    """Prepare one item. Returns its status and a message, whatever happens: others follow."""
    try:
        if name == "tokenizer":
            return prepare_tokenizer(config.tokenizer)
        if name in WEIGHTS:
            return prepare_weights(WEIGHTS[name], config)
        return prepare_dataset(DATASETS[name], config)
    except BrokenProcessPool:
        return "failed", "a worker process died, perhaps of lack of memory; try fewer --workers"
    except (UserError, OSError) as error:
        return "failed", str(error)
    except Exception as error:  # a mistake in a reader: show where, and go on
        traceback.print_exc()
        return "failed", f"{type(error).__name__}: {error}"


# ----------------------------------------------------------------------------- what is printed

def table_rows(name, status, manifests, seconds):
    """A dataset's rows of the table: one a split, the time in the first."""
    if not manifests:
        return [(name, "", "", "", "", "", "", "", status)]
    rows = []
    images = sum(manifest["images"] for manifest in manifests.values())
    for split in sorted(manifests, key=["train", "validation", "test"].index):
        manifest = manifests[split]
        timed = status == "ready" and not rows
        skipped = ", ".join(f"{count} {why}" for why, count in manifest["skipped"].items())
        size = sum(file["bytes"] for file in manifest["files"].values()) / 1e6
        rows.append((name, split, f"{manifest['samples']:,}", f"{manifest['images']:,}",
                     f"{size:,.1f}", skipped, f"{seconds:.1f}" if timed else "",
                     f"{images / seconds:,.0f}" if timed and images else "",
                     status if manifest["samples"] else "empty"))
    return rows


def print_table(rows):
    """Print rows of texts in columns, those of numbers aligned on the right; the first is the header."""
    columns = list(zip(*rows))
    widths = [max(map(len, column)) for column in columns]
    numbers = [all(re.fullmatch(r"[\d,.]*", cell) for cell in column[1:]) for column in columns]
    for row in rows:
        cells = [cell.rjust(width) if number else cell.ljust(width)
                 for cell, width, number in zip(row, widths, numbers)]
        print("  ".join(cells).rstrip())


def compare_counts(dataset, manifests):
    """Say where what was found is not what was published."""
    for split, published in dataset.counts.items():
        manifest = manifests.get(split)
        samples = manifest["samples"] + sum(manifest["skipped"].values()) if manifest else 0
        if samples != published:
            print(f"{dataset.name} {split}: {published:,} samples were expected, "
                  f"{f'{samples:,}' if samples else 'none'} found")


def print_leaks(names, config):
    """Compare training and test splits, and say what they have in common and what is done about it."""
    if not Path(config.shards_dir).is_dir():
        return
    with locked(Path(config.shards_dir) / "leaks.json", "comparing training with test images"):
        report = guard(config.shards_dir, config.leaks, names if config.only else None)
    rows = report_rows(report)
    if rows:
        print()
        print_table([("samples of", "whose image is in", *REASONS), *rows])
    for line in report_lines(report):
        print(line)


def print_list(names, config):
    """Facts of each dataset and set of weights, and how far it is."""
    rows = [("dataset", "kind", "access", "MB", "samples", "status", "licence")]
    for source in (DATASETS.get(name) or WEIGHTS[name] for name in names if name != "tokenizer"):
        if source.name in DATASETS:
            kind, prepared = source.kind, read_manifests(Path(config.shards_dir) / source.name)
            counts = ", ".join(f"{split} {count:,}" for split, count in source.counts.items())
        else:
            kind, prepared, counts = "weights", source.is_prepared(config.weights_dir), ""
        status = ("prepared" if prepared else "downloaded" if source.find(home_of(source, config)) else
                  "to download" if source.urls or source.hub else "manual")
        rows.append((source.name, kind, source.access,
                     f"{source.megabytes:,}" if source.megabytes else "", counts, status, source.licence))
    print_table(rows)


def main(config):
    require_flags_that_fit(config)
    require_flags_of_own(config)
    if config.list:
        return print_list(select(config.only) if config.only else [*DATASETS, *WEIGHTS], config)
    if config.own:
        return prepare_own(config)
    if config.convert:
        with locked(Path(config.weights_dir) / Path(config.convert).resolve().name, "converting it"):
            target = convert_llama(config.convert, config.weights_dir)
        return print(f"{target} written, for --language_weights")
    names = select(config.only)
    rows = [("dataset", "split", "samples", "images", "MB", "skipped", "seconds", "images/s",
             "status")]
    datasets = {}  # dataset -> its manifests
    for name in names:
        start = time.perf_counter()
        status, message = attempt(name, config)
        if message:
            print(f"{name}: {status}: {message}", flush=True)
        if status in ("ready", "up to date") and name in DATASETS:
            datasets[name] = read_manifests(Path(config.shards_dir) / name)
        rows += table_rows(name, status, datasets.get(name), time.perf_counter() - start)
    print()
    print_table(rows)
    for name, manifests in datasets.items():
        for split, manifest in manifests.items():
            for reason, first in manifest["first_skipped"].items():
                print(f"{name} {split}: {reason}: {first} is the first of {manifest['skipped'][reason]:,}")
        if not config.limit and not config.augment:
            compare_counts(DATASETS[name], manifests)
    print_leaks(names, config)
    statuses = {}
    for name, *_, status in rows[1:]:
        statuses.setdefault(name, set()).add(status)
    if any(states <= {"failed", "missing", "empty"} for states in statuses.values()):
        sys.exit(1)  # of a whole dataset nothing can be used


if __name__ == "__main__":
    run(main, CONFIG)
