"""
The leak guard: which training samples show an image that a test split has, too.

Each stored image has a FINGERPRINT, made of it as it was decoded, before it is resized: a hash of
its pixels, and 256 bits of its look, which hardly change when an image is rescaled, encoded again
or made brighter. Every training split is compared with the test split of every dataset, its own
among them, by

    same pixels   the hash
    alike         at most ALIKE bits of the look differ
    same id       of datasets whose images bear the ids of one collection (Dataset.shared_ids)
    known source  what is known of the files that a dataset was made of (Dataset.known_leaks)

and the samples found are written beside its manifest, into leaks.json, which the loader obeys; so are
the test split's images that they show, for an evaluation that tells them from the others. Shards
are never written anew for it: another test split is compared alone, and a rerun is free.
"""

import functools
import hashlib
import json
from collections import defaultdict
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from data import SHARD_VERSION, Shard
from plumbing.files import manifest_checksum, read_manifest, write_whole
from prepare.datasets import DATASETS

FINGERPRINT = np.dtype([("pixels", "<u8"), ("look", "u1", 32)])
ALIKE = 48  # bits of 256. extras/leaks.py measures how often copies and strangers come that close;
# a false alarm costs a training sample, a missed copy an honest score
REASONS = ("same pixels", "alike", "same id", "known source")


# ----------------------------------------------------------------------------- one image

def cosines():
    """The rows of the discrete cosine transform of 64 values that vary least: (16, 64)."""
    return np.cos(np.pi / 64 * np.arange(16)[:, None] * (np.arange(64) + 0.5))


COSINES = cosines()


def fingerprint(image):
    """
    The FINGERPRINT of an RGB image, as bytes.

    A bit of the look says whether one of the 255 lowest frequencies of the image, in grey, at 64 x
    64 pixels, is above their median (Zauner 2010, with 256 bits in place of 64). An image that is
    all but even has no look: its bits are 0, and nothing is like it.
    """
    pixels = hashlib.sha256(str(image.size).encode() + image.tobytes()).digest()[:8]
    grey = np.asarray(image.convert("L").resize((64, 64), Image.Resampling.BOX), np.float64)
    frequencies = (COSINES @ grey @ COSINES.T).flatten()[1:]  # the first is the mean brightness
    bits = frequencies > np.median(frequencies) if grey.std() >= 1 else np.zeros(255, bool)
    return pixels + np.packbits(bits).tobytes()


def alike(these, those, bits=ALIKE):
    """
    Pairs of two arrays of looks, (n, 32) and (m, 32) uint8, that differ in no more than these bits:
    (k, 2) numbers of rows, in order.
    """
    def signs(looks):
        return np.unpackbits(looks, axis=1).astype(np.float32) * 2 - 1

    pairs = [np.zeros((0, 2), np.int64)]
    for first in range(0, len(these), 4096):
        left = these[first:first + 4096]
        left_signs = signs(left)
        for other in range(0, len(those), 4096):
            right = those[other:other + 4096]
            near = left_signs @ signs(right).T >= 256 - 2 * bits  # equal bits less unequal ones
            near &= left.any(axis=1)[:, None] & right.any(axis=1)
            pairs.append(np.argwhere(near) + (first, other))
    pairs = np.concatenate(pairs)
    return pairs[np.lexsort(pairs.T[::-1])]


# ----------------------------------------------------------------------------- two splits

class Split:
    """What is compared of one split of a prepared dataset. Raises UserError where it is damaged."""

    def __init__(self, folder):
        shard, self.dataset = Shard(folder), DATASETS.get(folder.parent.name)
        self.fingerprints = np.frombuffer(shard.read_verified("fingerprints.bin"), FINGERPRINT)
        self.image_of = shard.samples["image"]
        self.names, self.ids = [], defaultdict(list)  # image name of each sample; id -> samples
        if self.dataset and (self.dataset.shared_ids or self.dataset.known_leaks):
            for number, record in enumerate(shard.read_records()):
                self.names.append(record["image"])
                self.ids[PurePosixPath(record["image"]).stem or record["id"]].append(number)

    def samples_of(self, images):
        """Numbers of the samples that show one of these images."""
        return np.flatnonzero(np.isin(self.image_of, images)).tolist()


def compare(train, test):
    """
    {reason: numbers of the training split's samples whose image the test split has}, and the numbers
    of those images of the test split.
    """
    these, those = train.fingerprints, test.fingerprints
    same = np.flatnonzero(np.isin(these["pixels"], those["pixels"]))
    near = np.zeros((0, 2), np.int64)
    if not (train.dataset and train.dataset.one_pattern):
        near = alike(these["look"], those["look"])
    found = {"same pixels": train.samples_of(same),
             "alike": train.samples_of(np.setdiff1d(near[:, 0], same))}
    images = [*np.flatnonzero(np.isin(those["pixels"], these["pixels"])), *near[:, 1]]
    if train.dataset and test.dataset and train.dataset.shared_ids == test.dataset.shared_ids != "":
        names = train.ids.keys() & test.ids.keys()
        found["same id"] = sorted(n for name in names for n in train.ids[name])
        images += [test.image_of[n] for name in names for n in test.ids[name]]
    images = sorted(set(map(int, images)) - {-1})  # -1: a sample without an image
    return {reason: numbers for reason, numbers in found.items() if numbers}, images


def from_known_sources(train, known_leaks):
    """{test split: numbers of samples} by what is known of the training split's own sources."""
    found = defaultdict(list)
    for part, dataset in known_leaks:
        found[f"{dataset}/test"] += [n for n, name in enumerate(train.names) if part in name]
    return {test: numbers for test, numbers in found.items() if numbers}


# ----------------------------------------------------------------------------- all of them

def guard(shards_dir, leaks):
    """
    Compare every prepared training split with every prepared test split; write their leaks.json.

    leaks: "drop", or "keep" to train on the published mix; it is written down either way. "" leaves
    it as it was, or else drops. Returns {training split: its leaks.json as a dict}. Raises
    UserError where a shard is damaged.
    """
    manifests = {f"{folder.name}/{split}": read_manifest(folder / split)
                 for folder in sorted(Path(shards_dir).glob("[!.]*")) for split in ("train", "test")}
    checksums = {name: manifest["checksum"] for name, manifest in manifests.items()
                 if manifest and manifest.get("shard_version") == SHARD_VERSION}
    tests = {name: checksum for name, checksum in checksums.items() if name.endswith("/test")}
    open_split = functools.cache(lambda name: Split(Path(shards_dir) / name))
    report = {}
    for train in checksums.keys() - tests.keys():
        folder, dataset = Path(shards_dir) / train, DATASETS.get(train.split("/")[0])
        report[train] = read_manifest(folder, "leaks.json") or {}
        facts = {"leaks": leaks or report[train].get("leaks", "drop"), "train": checksums[train],
                 "alike": ALIKE, "tests": tests,
                 "known_leaks": [list(pair) for pair in dataset.known_leaks] if dataset else []}
        whole = "test_images" in report[train]  # which an earlier version did not write
        if whole and facts == {name: report[train].get(name) for name in facts}:
            continue
        old = report[train] if whole and report[train]["train"] == checksums[train] else {"tests": {}}
        found, images = {}, {}
        for test, checksum in tests.items():
            if old["tests"].get(test) == checksum and old["alike"] == ALIKE:
                found[test] = dict(old["found"].get(test, {}))
                found[test].pop("known source", None)
                images[test] = old["test_images"].get(test, [])
            else:
                found[test], images[test] = compare(open_split(train), open_split(test))
        for test, numbers in from_known_sources(open_split(train), facts["known_leaks"]).items():
            found.setdefault(test, {})["known source"] = numbers
        report[train] = facts | {"found": {test: reasons for test, reasons in found.items() if reasons},
                                 "test_images": {test: n for test, n in images.items() if n}}
        report[train]["checksum"] = manifest_checksum(report[train])
        write_whole(folder / "leaks.json", json.dumps(report[train]).encode())
    return dict(sorted(report.items()))


def report_rows(report):
    """Rows of a table of what was found: a training split with each test split, then both counts."""
    rows = []
    for train, leaks in report.items():
        for test, found in leaks["found"].items():
            counts = [len(found.get(reason, ())) for reason in REASONS]
            rows.append((train, test, *(f"{count:,}" if count else "" for count in counts)))
    return rows
