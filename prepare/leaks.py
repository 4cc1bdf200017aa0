"""
The leak guard: which samples to learn from show an image that a split to test on has, too.

Each stored image has a FINGERPRINT, made of it as it was decoded, before it is resized: a hash of its
pixels, and its look, by which prepare/looks.py tells copies from other images. A training split is compared
with the test and validation splits of its own dataset and with the test splits of public datasets, a
validation split with its own test split, by

    same pixels   the hash
    alike         the looks
    same id       of datasets whose images bear the ids of one collection (Dataset.shared_ids)
    known source  what is known of the files that a dataset was made of (Dataset.known_leaks)

A sample is found if any of its images is. The samples found are written into leaks.json beside the manifest,
which plumbing/leaks.py reads; so are the other split's images that they show. No dataset is compared with the
test images that somebody prepared of their own (prepare/folder.py), except that one itself. Shards are never
written anew, and a rerun is free.
"""

import functools
import itertools
import json
import re
from collections import defaultdict
from pathlib import Path, PurePosixPath

import numpy as np

from plumbing.files import hash_file, manifest_checksum, read_manifest, write_whole
from plumbing.flags import UserError
from plumbing.leaks import splits_to_guard
from plumbing.shards import SHARD_VERSION, Shard
from prepare.datasets import DATASETS
from prepare.looks import BITS, CLOSEST, FINGERPRINT, SAME, alike, fingerprint  # noqa: F401, kept together

REASONS = ("same pixels", "alike", "same id", "known source")


# ----------------------------------------------------------------------------- two splits

def image_names(record):
    """Names of the images of a line of records.jsonl, in their order; [""] where it has none."""
    return [part["image"] for part in record.get("parts", ()) if isinstance(part, dict)] or [record["image"]]


class Split:
    """What is compared of one split of a prepared dataset. Raises UserError where it is damaged."""

    def __init__(self, folder):
        shard, self.dataset = Shard(folder), DATASETS.get(folder.parent.name)
        path = folder / "fingerprints.bin"
        if hash_file(path) != shard.manifest["files"][path.name]["sha256"]:
            raise UserError(f"{path}: damaged; {shard.mend}")
        self.fingerprints = shard.map(path.name, FINGERPRINT)  # those of a large dataset fill gigabytes
        self.sample, self.image = shard.image_pairs()  # which sample shows which image
        self.origin = np.arange(len(shard.image_index))  # an image's number; a copy's, that of what it was cut from
        if shard.manifest.get("augment"):
            first = {}
            for record, image in zip(shard.read_records(), shard.samples["image"].tolist()):
                self.origin[image] = first.setdefault(re.sub(r"/copy \d+$", "", record["image"]), image)
        self.names = []  # (name of an image or "", number of its sample)
        self.ids = defaultdict(list)  # id -> (number of its sample, of the image or -1)
        if self.dataset and (self.dataset.shared_ids or self.dataset.known_leaks):
            images = iter(self.image.tolist())
            for number, (record, count) in enumerate(zip(shard.read_records(), shard.samples["images"].tolist())):
                names = image_names(record)
                numbers = list(itertools.islice(images, count)) or [-1]
                for name, image in zip(names, numbers, strict=True):
                    self.names.append((name, number))
                    self.ids[PurePosixPath(name).stem or record["id"]].append((number, image))

    def samples_of(self, images):
        """Numbers of the samples that show one of these images, or a copy of one (prepare/augment.py)."""
        return np.unique(self.sample[np.isin(self.origin[self.image], self.origin[images])]).tolist()


def compare(train, test):
    """
    {reason: numbers of the first split's samples whose image the second has}, and the numbers of those
    images of the second.
    """
    these, those = train.fingerprints, test.fingerprints
    same = np.flatnonzero(np.isin(these["pixels"], those["pixels"]))
    near = np.zeros((0, 2), np.int64)
    if not (train.dataset and train.dataset.one_pattern):
        near = alike(these["look"], those["look"])
    reasons = {"same pixels": train.samples_of(same),
               "alike": train.samples_of(np.setdiff1d(near[:, 0], same))}
    images = [*np.flatnonzero(np.isin(those["pixels"], these["pixels"])), *near[:, 1]]
    if train.dataset and test.dataset and train.dataset.shared_ids == test.dataset.shared_ids != "":
        names = train.ids.keys() & test.ids.keys()
        reasons["same id"] = sorted({sample for name in names for sample, _ in train.ids[name]})
        images += [image for name in names for _, image in test.ids[name] if image >= 0]
    images = sorted(set(map(int, images)))
    return {reason: numbers for reason, numbers in reasons.items() if numbers}, images


def from_known_sources(train, known_leaks):
    """{test split: numbers of samples} by what is known of the training split's own sources."""
    samples = defaultdict(list)
    for part, dataset in known_leaks:
        samples[f"{dataset}/test"] += sorted({sample for name, sample in train.names if part in name})
    return {test: numbers for test, numbers in samples.items() if numbers}


# ----------------------------------------------------------------------------- all of them

def guard(shards_dir, leaks="", named=None):
    """
    Compare every prepared training and validation split with the splits that it must have no image of
    (plumbing.leaks.splits_to_guard), and write their leaks.json.

    leaks: "drop", or "keep" to train on the published mix; it is written down either way, for the `named`
    datasets alone where any are. "" leaves it as it was, or else drops. Returns {split: its leaks.json as a
    dict}. Raises UserError where a shard is damaged.
    """
    open_split = functools.cache(lambda name: Split(Path(shards_dir) / name))
    report, choices = {}, {}
    for folder in sorted(Path(shards_dir).glob("[!.]*/*")):
        manifest, dataset = read_manifest(folder), DATASETS.get(folder.parent.name)
        if (folder.name not in ("train", "validation") or not manifest
                or manifest.get("shard_version") != SHARD_VERSION):
            continue
        name, before = folder.parent.name, read_manifest(folder, "leaks.json") or {}
        asked = leaks if named is None or name in named else ""
        choices[name] = asked or before.get("leaks") or choices.get(name, "drop")
        facts = {"leaks": choices[name], "train": manifest["checksum"],
                 "alike": [BITS, CLOSEST, SAME],
                 "tests": {test: other["checksum"] for test, other in splits_to_guard(folder).items()
                           if other.get("shard_version") == SHARD_VERSION},
                 "known_leaks": [list(pair) for pair in dataset.known_leaks]
                 if dataset and folder.name == "train" else []}
        split = f"{name}/{folder.name}"
        if facts != {key: before.get(key) for key in facts}:
            before = find_leaks(split, facts, before, open_split)
            write_whole(folder / "leaks.json", json.dumps(before).encode())
        report[split] = before
    return report


def find_leaks(split, facts, before, open_split):
    """The leaks.json of a split: these facts and what was found, as it was found before where that holds."""
    overlaps, images = {}, {}
    holds = all(before.get(name) == facts[name] for name in ("train", "alike"))
    for test, checksum in facts["tests"].items():
        if holds and before["tests"].get(test) == checksum:
            overlaps[test] = dict(before["found"].get(test, {}))
            overlaps[test].pop("known source", None)
            images[test] = before["test_images"].get(test, [])
        else:
            overlaps[test], images[test] = compare(open_split(split), open_split(test))
    if facts["known_leaks"]:
        for test, numbers in from_known_sources(open_split(split), facts["known_leaks"]).items():
            overlaps.setdefault(test, {})["known source"] = numbers
    leaks = facts | {"found": {test: reasons for test, reasons in overlaps.items() if reasons},
                     "test_images": {test: numbers for test, numbers in images.items() if numbers}}
    return leaks | {"checksum": manifest_checksum(leaks)}


def report_lines(report):
    """Of what guard returns a line for each split that has images of tests: how many samples, and what is done."""
    lines = []
    for split, leaks in report.items():
        met = {test: set().union(*reasons.values()) for test, reasons in leaks["found"].items()}
        if met:
            where = ", ".join(f"{test} has {len(numbers):,}" for test, numbers in met.items())
            lines.append(f"{split}: {len(set().union(*met.values())):,} samples "
                         f"{'kept all the same' if leaks['leaks'] == 'keep' else 'will be left out of it'}: {where}")
    return lines


def report_rows(report):
    """Rows of a table of what was found: a split with each that it was compared with, then both counts."""
    rows = []
    for split, leaks in report.items():
        for test, reasons in leaks["found"].items():
            counts = [len(reasons.get(reason, ())) for reason in REASONS]
            rows.append((split, test, *(f"{count:,}" if count else "" for count in counts)))
    return rows
