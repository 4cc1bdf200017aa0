"""
What leaks.json says: which samples of a training split have an image that a split to test on has, too.

prepare/leaks.py writes it beside each training and validation split; here it is read, and refused where it
is not about these very splits. A shard is anything with a folder, a manifest and `again`, what to run anew.
"""

import shlex
from pathlib import Path

import numpy as np

from plumbing.files import read_manifest
from plumbing.flags import UserError


def how_to_prepare(folder):
    """What to run for a dataset's folder in shards/; where it is of somebody's own images, a split says so."""
    for split in sorted(Path(folder).glob("*")):
        path = (read_manifest(split) or {}).get("path")
        if path:
            return f"run `python train_cls.py --dataset={shlex.quote(path)}`"
    return f"run `python prepare/all.py --only={Path(folder).name}`"


def splits_to_guard(folder):
    """
    {name: manifest} of the prepared splits that the split in this folder must share no image with: its own
    dataset's test split; of a training split also its validation split and the test splits of public
    datasets. What somebody prepared of their own, whose manifest names a path, is nobody else's affair.
    """
    folder, names = Path(folder), ["test"]
    others = []
    if folder.name == "train":
        names.append("validation")
        others = sorted(folder.parent.parent.glob("[!.]*/test"))
    manifests = {path: read_manifest(path) for path in [*(folder.parent / name for name in names), *others]}
    return {f"{path.parent.name}/{path.name}": manifest for path, manifest in manifests.items()
            if manifest and (path.parent == folder.parent or "path" not in manifest)}


def read_leaks(shard):
    """
    What is to be done about the samples with an image that a split to test on has, too, "drop" or "keep",
    and their numbers. Of a training split its own validation split counts as one, see splits_to_guard.

    Raises UserError where the shard was not compared with each of those splits beside it.
    """
    leaks = read_manifest(shard.folder, "leaks.json")
    if leaks is None or leaks.get("train") != shard.manifest["checksum"]:
        raise UserError(f"{shard.folder}: not compared with the test splits; {shard.again}")
    for name, manifest in splits_to_guard(shard.folder).items():
        if manifest["checksum"] != leaks["tests"].get(name):
            again = shard.again
            if manifest.get("shard_version") != shard.manifest["shard_version"]:  # it is passed by till then
                again = how_to_prepare(shard.folder.parent.parent / name.partition("/")[0])
            raise UserError(f"{shard.folder}: not compared with {name}; {again}")
    numbers = [some for test in leaks["found"].values() for some in test.values()]
    return leaks["leaks"], np.unique(np.array(sum(numbers, []), dtype=np.int64))


def read_leaked_images(shard, test):
    """
    Numbers of the images of another split, `test`, that this one has, too: by their pixels, look or id. A
    known source says nothing about a single image of the other.

    Raises UserError where the two were not compared as they are now.
    """
    leaks = read_manifest(shard.folder, "leaks.json")
    name = f"{test.folder.parent.name}/{test.folder.name}"
    checksums = (shard.manifest["checksum"], test.manifest["checksum"])
    if (leaks is None or "test_images" not in leaks
            or (leaks["train"], leaks["tests"].get(name)) != checksums):
        raise UserError(f"{shard.folder}: not compared with {test.folder}; {shard.again}")
    return np.array(leaks["test_images"].get(name, []), dtype=np.int64)
