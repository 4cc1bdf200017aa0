"""
A folder of your own images, or a csv that lists them, as a prepared classification dataset.

    scans/benign/1.png  scans/malignant/2.png          a folder a class; the split is made here
    scans/train/benign/1.png  scans/test/benign/2.png  the same in train, test and perhaps validation
    scans.csv                                          path,label and perhaps split and patient

Class folders are searched to any depth. A csv's paths start at its own folder or at /. Several
labels are joined by | or ;, and beside images with several one without any has no finding.

Where no split is given, one is made, 70 : 10 : 20 in each class: by patient, or where none is named
so that images that are alike stay together. A split that is given needs train and test; where it
has no validation, train_cls.py holds out a part of train.
"""

import csv
import hashlib
import os
import re
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from data import PROMPT_VERSION, SHARD_VERSION, Record, Shard
from plumbing.files import read_manifest
from plumbing.flags import UserError
from plumbing.pixels import SUFFIXES
from prepare.classify import group_alike, split_by_group
from prepare.datasets import DATASETS, Dataset, read_image, require_columns
from prepare.leaks import guard
from prepare.shards import ImageSettings, clean, recover, why_stale, write_dataset

SPLITS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation",
          "val": "validation", "test": "test", "testing": "test"}
COLUMNS = {"path": ("path", "file", "image", "filename"), "label": ("label", "labels"),
           "split": ("split",), "patient": ("patient", "group")}  # and the names they may have


class Item(NamedTuple):
    """An image as a folder or a csv lists it."""
    split: str  # "" where none is given
    name: str  # its path in the folder or the csv
    file: Path
    labels: tuple
    patient: str = ""  # "" where none is named


# ----------------------------------------------------------------------------- what is listed

def folders_in(folder):
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def files_below(folder, above=()):
    """Every file below a folder; links are followed, but not back to a folder that they lie in."""
    real = folder.resolve()
    for path in sorted(folder.iterdir()) if real not in above else ():
        if path.is_dir() and path.name[0] != ".":
            yield from files_below(path, (*above, real))
        else:  # a hidden folder counts as one file
            yield path


def read_folder(folder):
    """The Items of a folder, and the names of its class folders; says what is passed over."""
    splits = [path for path in folders_in(folder) if path.name.lower() in SPLITS]
    items, others, depth = [], [], 1 if splits else 0
    for file in files_below(folder):
        name = file.relative_to(folder)
        if (len(name.parts) > depth + 1 and file.suffix.lower() in SUFFIXES and file.name[0] != "."
                and file.is_file()):
            split = name.parts[0] if splits else ""
            items.append(Item(SPLITS.get(split.lower(), split), name.as_posix(), file,
                              (clean(name.parts[depth]),)))
        else:
            others.append(clean(name.as_posix()))
    if others:
        print(f"{len(others):,} files passed over, {others[0]} the first: hidden, no image, or in no "
              "class's folder")
    return items, {path.name for top in splits or [folder] for path in folders_in(top)}


def read_table(path):
    """The Items of a csv, and the names of its classes."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            delimiter = max(",;\t", key=file.readline().count)  # Excel's depends on the country
            file.seek(0)
            table = csv.DictReader(file, restval="", delimiter=delimiter)
            table.fieldnames = [name.strip().lower() for name in table.fieldnames or ()]
            names = [next((name for name in known if name in table.fieldnames), column)
                     for column, known in COLUMNS.items()]
            require_columns(path, table.fieldnames, names[:2])
            rows = [[row.get(name, "").strip() for name in names] for row in table if any(row.values())]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a csv in UTF-8 ({error}); save it as one") from None
    items = []
    for name, cell, split, patient in rows:
        labels = {clean(label) for label in re.split("[|;]", cell) if label.strip()}
        items.append(Item(SPLITS.get(split.lower(), split), name, path.parent / name,
                          tuple(sorted(labels)), patient))
    for name, count in Counter(item.name for item in items).items():
        if count > 1:
            raise UserError(f"{path}: {count} rows of {name}; give it one, its labels joined by |")
    missing = [item.file for item in items if not item.file.is_file()]
    if missing and 10 * len(missing) >= len(items):  # fewer are skipped and counted
        raise UserError(f"{path}: {len(missing):,} of its {len(items):,} files are not there, the first "
                        f"{missing[0]}; paths start at the folder of the csv")
    return items, {label for item in items for label in item.labels}


# ----------------------------------------------------------------------------- what is made of it

def require_classes(path, items, names):
    """Raise UserError where, by the splits that the Items have, there is nothing to learn or test."""
    if not items:
        raise UserError(f"{path}: no image in it that has a class ({' '.join(SUFFIXES)})")
    given = any(item.split for item in items)
    for item in items:
        if given and item.split not in SPLITS.values():
            raise UserError(f"{path}: {item.name} is of split {item.split!r}, none of train, validation "
                            "and test; give it one, or take it away")
    bare = {}  # a class without capitals and spaces around it -> its name
    for name in sorted(names):
        other = bare.setdefault(clean(name).casefold(), name)
        if other != name:
            raise UserError(f"{path}: classes {other!r} and {name!r} differ in spaces or capitals "
                            "alone; give them one name")
    for split in ("train", "test") if given else ("",):
        found = {item.labels for item in items if item.split == split}
        if not found:
            raise UserError(f"{path}: no {split} images; bring some, or give no split and one is made")
        if len(found) == 1:
            raise UserError(f"{path}: all {split or 'its'} images are of class "
                            f"{'|'.join(*found) or 'none'!r}; bring some of another")
    learnt = {label for item in items for label in item.labels if item.split in ("", "train")}
    for name in sorted(names):
        if clean(name) not in learnt:
            raise UserError(f"{path}: no image of class {name!r} to train on; bring some, or drop it")


def give_splits(path, items):
    """The Items with a split each: the one that is given, or one made here."""
    places = {}  # patient -> split
    for item in items:
        if item.patient and places.setdefault(item.patient, item.split) != item.split:
            raise UserError(f"{path}: patient {item.patient} is in {places[item.patient]} and in "
                            f"{item.split}; keep to one, or give no split, and one is made by patient")
    if items[0].split:
        return items
    if places:
        print("  a split is made, 70 : 10 : 20, by patient")
        groups = [f"patient {item.patient}" if item.patient else f"image {item.name}" for item in items]
    else:
        print("  a split is made, 70 : 10 : 20, alike images on one side", flush=True)
        groups = [items[number].name for number in group_alike([item.file for item in items])]
        print(f"  {sum(n for n in Counter(groups).values() if n > 1):,} images are like another one")
    made = split_by_group(groups, [item.labels for item in items],
                          {"train": 0.7, "validation": 0.1, "test": 0.2})
    return [item._replace(split=split) for item, split in zip(items, made)]


def listing(items):
    """A text that changes with any label, split or file, by the files' sizes and times alone."""
    digest = hashlib.sha256()
    for item in items:
        state = item.file.stat() if item.file.is_file() else None
        digest.update(ascii((*item, state and (state.st_size, state.st_mtime_ns))).encode())
    return f"{len(items):,} images, {digest.hexdigest()[:16]}"


def name_for(path, shards_dir):
    """The dataset's name: the path's own, made safe; with a hash of it where another has that name."""
    name = re.sub(r"\W+", "_", path.name if path.is_dir() else path.stem).strip("_") or "images"
    target = shards_dir / name
    recover(target)
    owners = [(read_manifest(split) or {}).get("path") for split in target.glob("*")]
    if name.lower() in DATASETS or target.exists() and clean(str(path)) not in owners:
        name += "_" + hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    return name


def write(target, path, items, classes, facts, workers):
    """Write the Items, and say what each split then holds of each class, and what was skipped."""
    def records(raw):
        for item in items:
            yield item.split, Record(item.name, image=read_image(item.file), image_name=item.name,
                                     labels=item.labels)

    counts = Counter(item.split for item in items)
    dataset = Dataset(name=target.name, read=records, kind="classification", licence=facts["licence"],
                      access="yours", megabytes=0, page="", layouts=(), counts=counts, classes=classes)
    # Each worker first loads what the running script does, such as torch: too much for few images.
    workers = workers or min(os.cpu_count(), 1 + len(items) // 200)
    write_dataset(target, dataset, path, {}, b"", facts, workers)
    for split in filter(counts.get, ("train", "validation", "test")):
        shard = Shard(target / split)
        found = Counter(label for record in shard.read_records() for label in record["labels"] or [""])
        held = ", ".join(f"{count:,} {label or 'of none'}" for label, count in sorted(found.items()))
        skipped = "".join(f"; skipped: {n:,} {why} ({shard.manifest['first_skipped'][why]} the first)"
                          for why, n in shard.manifest["skipped"].items())
        print(f"  {split}: {len(shard):,} images, {held}{skipped}")


def prepare_folder(path, shards_dir, image_size=224, workers=0):
    """
    Prepare a folder or a csv into shards_dir, unless it is there unchanged, and compare it with all
    test splits there. Returns the dataset's name.

    workers: processes that decode images; 0: one a core, or fewer for few images. Raises UserError.
    """
    path, shards_dir = Path(os.path.abspath(Path(path).expanduser())), Path(shards_dir)
    try:
        if not path.exists():
            raise UserError(f"{path}: no folder and no csv there")
        items, names = (read_folder if path.is_dir() else read_table)(path)
        require_classes(path, items, names)
        name, classes = name_for(path, shards_dir), tuple(sorted(map(clean, names)))
        facts = {"dataset": name, "shard_version": SHARD_VERSION, "prompt_version": PROMPT_VERSION,
                 "limit": 0, "licence": "yours", "path": clean(str(path)), "listing": listing(items),
                 "image": asdict(ImageSettings(image_size, "squash", "jpeg", 97))}  # as prepare/all.py
        reason = why_stale(shards_dir / name, facts, {})
        print(f"{name}: {reason or 'up to date'}", flush=True)
        if reason:
            items = give_splits(path, items)
            require_classes(path, items, names)
            write(shards_dir / name, path, items, classes, facts, workers)
        guard(shards_dir, "")
    except (OSError, BrokenProcessPool) as error:
        raise UserError(f"{path}: {error}") from None
    return name
