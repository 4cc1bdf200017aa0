"""
What a run was trained on, as it was written down then: which questions of a test split are new to it,
and which training answers it could learn from. What is prepared today may be other data, and says nothing
about the run; then the reason is given in place of a number.
"""

from pathlib import Path

import numpy as np

from plumbing.files import hash_json, read_manifest
from plumbing.leaks import read_leaked_images, read_leaks
from plumbing.shards import Shard
from tasks.vqa import turns_of


def learnt(trained):
    """What a run, and the runs that it began with, learnt from: two dicts by dataset, as describe_run has them."""
    before = trained.get("before", {"data": {}, "tests": {}})
    return before["data"] | trained["inputs"]["data"], before["tests"] | trained["tests"]


def open_trained(trained, shards_dir):
    """
    {dataset: (Shard of its training split, numbers of its samples that were left out, or None where that
    is not known)} of a run, or the reason, as a str, why nothing is known: a split is gone, or is another
    one now.

    trained: what the checkpoint was sealed with, see plumbing/runs.py's describe_run. The samples that the run
    held out count as trained on: its loss on them was watched.
    """
    splits, (data, _) = {}, learnt(trained)
    own = [entry.partition(":")[0].strip() for entry in trained["flags"]["data"].split(",")]
    for name in dict.fromkeys([*own, *trained.get("before", {"data": ()})["data"]]):
        folder = Path(shards_dir) / name / "train"
        if not folder.is_dir():
            return f"{folder}, which the run was trained on, is not here"
        train = Shard(folder)
        recorded = data.get(name)
        if recorded is None:
            return f"the run does not say which training split of {name} it was trained on"
        if train.manifest["checksum"] != recorded["checksum"]:
            return f"the training split of {name} is another one now than the run was trained on"
        splits[name] = train, left_out(train, trained)
    return splits


def left_out(train, trained):
    """
    The numbers of a training split's samples that a run left out because a test split has their image,
    sorted; None where that is not known, for the test splits of then, or how they are compared, are others
    now.
    """
    name = train.folder.parent.name
    recorded, tests = (facts[name] for facts in learnt(trained))
    if recorded["leaks"] != "drop":
        return []
    read_leaks(train)  # raises UserError where leaks.json is not that of these shards
    leaks = read_manifest(train.folder, "leaks.json")
    numbers = {number for test, reasons in leaks["found"].items() for some in reasons.values()
               for number in some if tests.get(test) == leaks["tests"].get(test)}
    return sorted(numbers) if recorded["leaked_sha256"] == hash_json(sorted(numbers)) else None


def find_seen(test, splits, trained):
    """
    For each sample of a test split why it is not new to the run, "words", "image", "words and image" or ""
    where it is; or the reason, as a str, why that is not known.

    words: all its questions with their answers occur in what was trained on, as one sample. image: one of
    its images was trained on, too, the same or one alike, by the leaks.json beside the training split.
    splits: what open_trained gives.
    """
    name, split = test.folder.parent.name, test.folder.name
    if isinstance(splits, str):
        return splits
    if split != "test":
        return "the run was trained on this split" if split == "train" and name in splits else \
            "training splits are compared with test splits alone"
    words, images = np.zeros((2, len(test)), bool)
    data, tests = learnt(trained)
    sample, image = test.image_pairs()
    for dataset, (train, missing) in splits.items():
        if test.manifest["kind"] != "boxes":  # "there is none" is an answer of every label
            words |= np.isin(test.samples["words"], np.delete(train.samples["words"], missing or []))
        compared = missing is not None and data[dataset]["leaks"] == "drop" and (
            tests[dataset].get(f"{name}/test"))
        if compared != test.manifest["checksum"]:  # so that nothing was left out for this test's sake
            images[sample[np.isin(image, read_leaked_images(train, test))]] = True
    return [" and ".join(["words"] * same_words + ["image"] * same_image)
            for same_words, same_image in zip(words.tolist(), images.tolist())]


def training_answers(splits, dataset):
    """
    The (question, answer) pairs that a run could learn a dataset's answers from: of the dataset itself where
    it trained on that, else of all that it trained on.
    """
    pairs = []
    for name in [dataset] if dataset in splits else splits:
        train, missing = splits[name]
        missing = set(missing or ())
        pairs += [turn for number, record in enumerate(train.read_records()) if number not in missing
                  for turn in turns_of(record)]
    return pairs
