"""
The images that classifiers learn from and are asked about: what is read of a prepared dataset's splits, held out
for validation, and left out; and new images and scans, in files.
"""

import os
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from formats.frames import ScanSettings, find_scans, pixels_of, settings_of
from formats.pictures import file_of
from plumbing.devices import usable_cores
from plumbing.files import differences, hash_json, read_manifest
from plumbing.flags import UserError
from plumbing.leaks import read_leaks
from plumbing.order import random_keys
from plumbing.own import files_below, find_prepared, hash_id, only_dataset_of, prepare_own, secret_of, written
from plumbing.shards import Shard
from tasks.encoders import EIGHT

SCANNED = tuple(item.name for item in fields(ScanSettings))


@dataclass
class Split:
    """Images of one split, and their labels."""
    labels: np.ndarray  # (n, m) bool
    names: list
    groups: list  # such as each image's patient; a name that no two images share where none is known
    images: np.ndarray  # (n,) int64, their numbers in the shard
    shard: Shard | None = None
    pixels: np.ndarray | None = None  # (n, H, W, 3) uint8, once read_pixels has read them

    def take(self, numbers):
        """The Split of these of its images."""
        return replace(self, labels=self.labels[numbers], names=[self.names[n] for n in numbers],
                       groups=[self.groups[n] for n in numbers], images=self.images[numbers],
                       pixels=None if self.pixels is None else self.pixels[numbers])

    def read_pixels(self):
        """Read the images, unless they are there."""
        if self.pixels is not None:
            return
        size = self.shard.manifest["image"]["size"]
        pixels = np.empty((len(self.images), size, size, 3), np.uint8)
        with ThreadPoolExecutor(usable_cores()) as pool:  # Pillow lets go of the interpreter lock
            images = pool.map(self.shard.read_image, self.images.tolist())
            for number, image in enumerate(tqdm(images, str(self.shard.folder), len(pixels), leave=False)):
                pixels[number] = image
        self.pixels = pixels

    def describe(self):
        """How many images it has, and a hash of all that is used of them."""
        stored = self.shard.manifest["files"]["images.bin"]["sha256"]
        return {"images": len(self.names), "sha256": hash_json([
            stored, self.images.tolist(), self.labels.astype(int).tolist(), self.names, self.groups])}


def read_split(shard, leaks="recorded"):
    """
    The Split that a shard holds, without pixels, and what is left out of it: each image once, however many
    questions are asked about it. leaks: "drop" or "keep" images that a test split has, too; or as "recorded".
    """
    left_out, facts = set(), {}
    if shard.folder.name != "test":  # validation may have images of its test split
        recorded, numbers = read_leaks(shard)
        facts = {"decision": recorded if leaks == "recorded" else leaks, "left out": 0}
        if facts["decision"] == "drop" and len(numbers):
            left_out = set(numbers.tolist())
            facts |= {"left out": len(left_out), "sha256": hash_json(sorted(left_out))}
            print(f"{shard.folder}: {len(left_out):,} images left out, which a split to test on has")
    rows = {}  # (image number, its labels) -> its name and its group
    for number, (record, image) in enumerate(zip(shard.read_records(), shard.samples["image"].tolist())):
        if number not in left_out and "labels" in record:
            rows.setdefault((image, tuple(record["labels"])),
                            (record["image"], record.get("group") or f"image {image}"))
    if not rows:
        raise UserError(f"{shard.folder}: a test split has all of its images, too, so that none is left; "
                        "bring others" if left_out else
                        f"{shard.folder}: no image in it; its manifest.json counts why")
    classes = shard.manifest["classes"]
    labels = np.array([[name in given for name in classes] for _, given in rows], bool)
    names, groups = map(list, zip(*rows.values()))
    images = np.array([image for image, _ in rows], np.int64)
    return Split(labels.reshape(-1, len(classes)), names, groups, images, shard), facts


def hold_out(split):
    """
    A training Split in nine tenths and one tenth of each combination of labels, always the same.

    No group is divided. One of fewer than 6 groups is held out where they have 6 images or more, and
    none of fewer images.
    """
    images, combinations = {}, defaultdict(list)  # of a group; groups by the labels of their first image
    for number in np.argsort(random_keys(0, 0, 0, len(split.names))).tolist():
        if split.groups[number] not in images:
            combinations[tuple(split.labels[number])].append(split.groups[number])
        images.setdefault(split.groups[number], []).append(number)
    out = []
    for groups in combinations.values():
        chosen = groups[5::10]
        if 1 < len(groups) < 6 <= sum(len(images[group]) for group in groups):
            chosen = [min(groups, key=lambda group: len(images[group]))]
        out += [number for group in chosen for number in images[group]]
    rest = np.setdiff1d(np.arange(len(split.names)), out)
    return split.take(rest), split.take(np.sort(out).astype(int))


def choose_few(split, count, seed):
    """So many training images of each class, and of none where there are such, drawn with the seed."""
    labels = np.column_stack([split.labels, ~split.labels.any(1)])
    counts, chosen = np.zeros(labels.shape[1], int), []
    for number in np.argsort(random_keys(seed, 1, 0, len(labels))):
        if (counts[labels[number]] < count).any():
            counts += labels[number]
            chosen.append(number)
    return split.take(np.sort(chosen))


def require_learnable(folder, splits, classes, images_per_class):
    """Raise UserError where there is nothing that could be learnt or tested."""
    counts = splits["train"].labels.sum(0)
    if not counts.all():
        raise UserError(f"{folder}/train: no image of class {classes[int(np.argmin(counts))]!r} to train on; "
                        "bring some, or leave the class out")
    for name, split in splits.items():
        if name != "validation" and len(classes) > 1 and (split.labels == split.labels[0]).all():
            raise UserError(f"{folder}/{name}: all of its {len(split.names)} images have the same label: "
                            "nothing to tell apart")
    if images_per_class > counts.max():
        raise UserError(f"--images_per_class={images_per_class}: {folder}/train has at most {counts.max()} "
                        "of a class; choose fewer, or leave it out")
    for name, count in zip(classes, counts):
        if count < images_per_class:
            print(f"{folder}/train: class {name!r} has {count} images, fewer than --images_per_class: all of "
                  "them are used")


def find_datasets(wanted, shards_dir, image_size):
    """The names of the prepared datasets that --dataset names; a folder or csv of one's own is prepared."""
    if wanted == "all":
        return list(EIGHT)
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    if not names:
        raise UserError("--dataset: name one, or a folder or csv of your own")
    return list(dict.fromkeys(find_prepared(name, shards_dir) or prepare_own(name, shards_dir, image_size)
                              for name in names))


def find_model_datasets(wanted, shards_dir):
    """The same for --predict, which needs no look at the images of a folder or csv of one's own."""
    if wanted == "all":
        return list(EIGHT)
    names = []
    for name in filter(None, map(str.strip, wanted.split(","))):
        found = find_prepared(name, shards_dir) or only_dataset_of(name, shards_dir)
        if not found:
            raise UserError(f"--dataset={name}: no dataset in {shards_dir} is made of it; run the same command without "
                            "--predict first, or name the dataset as it is called in --out")
        names.append(found)
    return list(dict.fromkeys(names))


def image_facts(image):
    """What of a manifest's image settings new images are brought to size with: window and the like only of scans."""
    return {name: image[name] for name in ("size", "resize", *SCANNED) if name in image}


def open_dataset(folder, image_size, leaks="recorded", images_per_class=0):
    """
    {name: Split} of train, validation and test, without pixels, and what a run on them stands on, as nested
    facts to compare. Without a validation split a part of train is held out for it. leaks: as in read_split.
    Raises UserError where there is nothing to learn or to test, or images are of another size, in pixels.
    """
    folder, splits, left_out = Path(folder), {}, {}
    for name in ("train", "validation", "test"):
        if name == "validation" and not (folder / name).is_dir():
            continue
        shard = Shard(folder / name)
        if not shard.manifest["classes"]:
            raise UserError(f"--dataset: {folder.name} has no labels; those with labels: {', '.join(EIGHT)}")
        shard.require_image_size(image_size)
        splits[name], left_out[name] = read_split(shard, leaks)
    given = "validation" in splits
    if not given:
        splits["train"], splits["validation"] = hold_out(splits["train"])
        if not splits["validation"].names:
            raise UserError(f"{folder}/train: fewer than 6 images of each class, or all of one patient, too "
                            "few to hold some out for validation; bring more, or a validation split")
    manifest = splits["train"].shard.manifest
    require_learnable(folder, splits, manifest["classes"], images_per_class)
    facts = {name: split.describe() for name, split in splits.items()} | {
        "classes": manifest["classes"], "image": image_facts(manifest["image"]),
        "multi_label": manifest["multi_label"], "leaks": left_out["train"], "held out of train": not given}
    return splits, facts | ({"folds": manifest["folds"]} if "folds" in manifest else {})


# ----------------------------------------------------------------------------- new images

class Picture(NamedTuple):
    """A picture that --predict names: an image file, or one of a scan's."""
    name: str  # in the csv: the file's, and which of its pictures
    source: object  # as formats.frames.decode_picture takes it
    study: str  # what is judged together: a hash of the header's study, or the name of its file or series
    patient: str  # a hash of the header's; "" where none is known


def image_files(source):
    """The files of --predict, a folder or a file; hidden ones are passed over."""
    if source.is_dir():
        files = [path for path in files_below(source) if path.name[0] != "."]
        if not files:
            raise UserError(f"--predict={source}: an empty folder")
        return files
    if not os.path.lexists(source):
        raise UserError(f"--predict={source}: no such folder or file")
    return [source]


def find_pictures(source, image, folder):
    """
    The Pictures of --predict, a folder or a file; why other files cannot be read, lines that are printed, too; and the
    files that are no pictures. image: settings as image_facts gives them. folder: the run's, in which the secret lies
    that patients are hashed with where `source` cannot be written to.
    """
    files = image_files(source)
    scans, reasons = find_scans(files, settings_of(image), source if source.is_dir() else source.parent)
    secret = None
    if any(scan.patient or scan.study for scan in scans):
        try:
            secret = secret_of(source)
        except UserError:
            secret = secret_of(folder)
    pictures, used = [], set(reasons)
    for scan in scans:
        study = hash_id(secret, scan.study) if scan.study else scan.name
        patient = hash_id(secret, scan.patient) if scan.patient else ""
        for label, picture in zip(scan.labels, scan.sources):
            pictures.append(Picture(f"{scan.name} {label}".strip(), picture, study, patient))
            used.add(file_of(picture))
    unreadable = [unreadable_line(path, why) for path, why in reasons.items()]
    return pictures, unreadable, [path for path in files if path not in used]


def unreadable_line(name, why):
    """Say that a file or picture cannot be read; returns the line."""
    line = f"{written(name)}: not an image that can be read ({why})"
    print(line)
    return line


def read_picture(source, image):
    """(size, size, 3) uint8 pixels of a Picture's source, or why it cannot be read, in words."""
    try:
        return pixels_of(source, image["size"], image["resize"])
    except Exception as error:  # each decoder has its own ways to fail on a broken file
        return str(error)


def read_pictures(pictures, image, batch_size):
    """
    Yield, a batch at a time, the Pictures that can be read, their (n, size, size, 3) uint8 pixels, and why others
    cannot, which is printed, too. Threads read the next two batches while one is worked on.
    """
    batches = [pictures[begin:begin + batch_size] for begin in range(0, len(pictures), batch_size)]
    with ThreadPoolExecutor(usable_cores()) as pool, tqdm(total=len(pictures), unit=" images", leave=False) as bar:
        ahead = deque()
        for number, batch in enumerate(batches):
            while len(ahead) < min(3, len(batches) - number):
                ahead.append([pool.submit(read_picture, picture.source, image)
                              for picture in batches[number + len(ahead)]])
            read = [future.result() for future in ahead.popleft()]
            good = [place for place, pixels in enumerate(read) if not isinstance(pixels, str)]
            why = [unreadable_line(picture.name, pixels) for picture, pixels in zip(batch, read)
                   if isinstance(pixels, str)]
            yield [batch[place] for place in good], np.array([read[place] for place in good]), why
            bar.update(len(batch))


def require_same_dataset(name, shards_dir, facts):
    """Raise UserError where a model has other classes or image settings than its dataset, if that is here."""
    if manifest := read_manifest(Path(shards_dir) / name / "train"):
        now = {"classes": manifest["classes"], "image": image_facts(manifest["image"])}
        if changed := differences({key: facts[key] for key in now}, now):
            raise UserError(f"--predict: of the model's dataset {name} {', '.join(changed)}; train again "
                            "under another --name")
