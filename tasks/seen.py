"""
What a run was trained on, as it was written down then: which questions of a test split are new to it,
and which training answers it could learn from. What is prepared today may be other data, and says nothing
about the run; then the reason is given in place of a number.
"""

from pathlib import Path

from plumbing.files import hash_json, read_manifest
from plumbing.leaks import read_leaked_images, read_leaks
from plumbing.shards import Shard, hash_words


def open_trained(trained, shards_dir):
    """
    {dataset: (Shard of its training split, numbers of its samples that were left out, or None where that
    is not known)} of a run, or the reason, as a str, why nothing is known: a split is gone, or is another
    one now.

    trained: what the checkpoint was sealed with, see train_vlm.py's describe_run. The samples that the run
    held out count as trained on: its loss on them was watched.
    """
    splits, recorded = {}, trained.get("shards", {})
    for entry in trained["flags"]["data"].split(","):
        name = entry.partition(":")[0].strip()
        folder = Path(shards_dir) / name / "train"
        if not folder.is_dir():
            return f"{folder}, which the run was trained on, is not here"
        train = Shard(folder)
        if name not in recorded:
            return f"the run does not say which training split of {name} it was trained on"
        if train.manifest["checksum"] != recorded[name]:
            return f"the training split of {name} is another one now than the run was trained on"
        splits[name] = train, left_out(train, trained)
    return splits


def left_out(train, trained):
    """
    The set of the numbers of a training split's samples that a run left out because a test split has
    their image; None where that is not known, for the test splits of then, or how they are compared, are
    others now.
    """
    name = train.folder.parent.name
    guard = trained.get("leaks", {}).get(name, {})
    if guard.get("leaks") != "drop":
        return set()
    train.read_leaks()  # raises UserError where leaks.json is not that of these shards
    leaks = read_manifest(train.folder, "leaks.json")
    numbers = {number for test, reasons in leaks["found"].items() for numbers in reasons.values()
               for number in numbers if guard["tests"].get(test) == leaks["tests"].get(test)}
    recorded = trained.get("inputs", {}).get("data", {}).get(name, {}).get("leaked_sha256")
    return numbers if recorded in (None, hash_json(sorted(numbers))) else None


def find_seen(test, records, splits, trained):
    """
    For each record of a test split why it is not new to the run, "words", "image", "words and image"
    or "" where it is; or the reason, as a str, why that is not known.

    words: the question with its answer occurs in what was trained on. image: it was trained on, too,
    the same or one alike, by the leaks.json beside the training split. splits: what open_trained gives.
    """
    def words_of(record):
        return tuple(" ".join(record[part].lower().split()) for part in ("question", "answer"))

    name, split = test.folder.parent.name, test.folder.name
    if isinstance(splits, str):
        return splits
    if split != "test":
        return "the run was trained on this split" if split == "train" and name in splits else \
            "training splits are compared with test splits alone"
    words, images = set(), set()
    for dataset, (train, missing) in splits.items():
        words |= {words_of(record) for number, record in enumerate(train.read_records())
                  if number not in (missing or ())}
        guard = trained.get("leaks", {}).get(dataset, {})
        compared = guard.get("leaks") == "drop" and missing is not None and guard["tests"].get(f"{name}/test")
        if compared != test.manifest["checksum"]:  # so that nothing was left out for this test's sake
            images |= set(train.read_leaked_images(test).tolist())
    return [" and ".join(["words"] * (words_of(record) in words) + ["image"] * (int(image) in images))
            for record, image in zip(records, test.samples["image"])]


def training_records(splits, dataset):
    """
    The records that a run could learn answers to a dataset's questions from: of the dataset itself where
    it trained on that, else of all that it trained on.
    """
    names = [dataset] if dataset in splits else list(splits)
    return [record for name in names for number, record in enumerate(splits[name][0].read_records())
            if number not in (splits[name][1] or ())]
