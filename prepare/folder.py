"""
A folder of your own images, or a csv that lists them, as a prepared classification dataset.

    scans/benign/1.png  scans/malignant/2.png          a folder a class; the split is made here
    scans/benign/ann/1.png  scans/malignant/bob/2.png  with a folder a patient in each
    scans/train/benign/1.png  scans/test/benign/2.png  the same in train, test and perhaps validation
    scans/benign/ct_1/*.dcm  scans/malignant/2.nii.gz  scans, of which each slice is an image
    scans.csv                                          path,label and perhaps split, patient and study

Class folders are searched to any depth. A csv's paths start at its own folder or at /; formats/pictures.py
says what else may stand there. Several labels are joined by | or ;, and beside images with several one without
any has no finding; where no image has several, a row without one is skipped. A patient may also be called
subject, case, study or group, or patient_id etc.; where neither folders nor a column name any, headers do.

Where no split is given, one is made, 70 : 10 : 20 in each class: by patient, or where none is named
so that images that are alike stay together. A split that is given needs train and test; where it
has no validation, train_cls.py holds out a part of train, and divides no patient for that either.

Patients and studies are written as hashes, see plumbing/own.py, also where their ids are a part of a file's name.
"""

import contextlib
import hashlib
import os
import re
from collections import Counter, defaultdict
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from data import Record
from formats.pictures import file_of
from plumbing.flags import UserError
from plumbing.own import clean, origins, own_path, printable
from plumbing.pixels import SUFFIXES
from plumbing.shards import PROMPT_VERSION, SHARD_VERSION, Shard
from prepare.classify import group_alike, split_by_group
from prepare.datasets import DATASETS, Dataset
from prepare.leaks import guard, report_lines
from prepare.listing import SPLITS, read_folder, read_table
from prepare.own import Wanted
from prepare.own_page import write_page
from prepare.own_pictures import read_source
from prepare.own_splits import SHARES, divide, fold_targets, group_names, hash_names, hide
from prepare.shards import ImageSettings, locked, recover, why_stale, write_dataset

LONGEST_NAME = 50  # letters of a dataset's name: four bytes each at most, of the 255 that a disk takes


# ----------------------------------------------------------------------------- what is refused

def bare(name):
    """A class's name without capitals, the spaces around it and the zeros around a whole number."""
    name = printable(name).casefold()
    return re.sub(r"^0*(\d+)(\.0*)?$", r"\1", name)


def require_names(path, names):
    """Raise UserError where two classes have all but the same name, or one has none."""
    names_of = {}
    for name in sorted(names):
        if not bare(name):
            raise UserError(f"{path}: a class without a name; give it one")
        other = names_of.setdefault(bare(name), name)
        if other != name:
            raise UserError(f"{path}: classes {other!r} and {name!r} differ in spaces, capitals or zeros "
                            "alone; give them one name")


def require_classes(path, items, names):
    """Raise UserError where, by the splits that the Items have, there is nothing to learn or test."""
    if not items:
        raise UserError(f"{path}: no image in it that has a class ({' '.join(SUFFIXES)})")
    given = any(item.split for item in items)
    for item in items:
        if given and item.split not in SPLITS.values():
            raise UserError(f"{path}: {item.name:.80} is of split {item.split[:80]!r}, none of train, "
                            "validation and test; give it one, or take it away")
    for split in ("train", "test") if given else ("",):
        labels = {item.labels for item in items if item.split == split}
        if not labels:
            raise UserError(f"{path}: no {split} images; bring some, or give no split and one is made")
        if len(labels) == 1:
            raise UserError(f"{path}: all {split or 'its'} images are of class "
                            f"{'|'.join(*labels) or 'none'!r}; bring some of another")
    learnt = {label for item in items for label in item.labels if item.split in ("", "train")}
    for name in sorted(names):
        if printable(name) not in learnt:
            raise UserError(f"{path}: no image of class {name!r} to train on; bring some, or drop it")


# ----------------------------------------------------------------------------- groups and splits

def give_groups(items, grouped_by):
    """
    Each Item's group, which is never divided: its patient, or where none is named what it is alike. The middle
    slice stands for all of its scan.

    Says how many images are alike, and how many of them have other labels than those.
    """
    scans = defaultdict(list)
    for item in items:
        scans[item.scan or item.name].append(item)
    shown = [some[len(some) // 2] for some in scans.values()]
    number_of = dict(zip(scans, group_alike([item.source for item in shown])))
    alike, owners = defaultdict(list), {}
    for item in shown:
        number = number_of[item.scan or item.name]
        alike[number].append(item)
        if item.patient:
            owners.setdefault(number, item.patient)
    say_alike(alike)
    unnamed = sum(not item.patient for item in items) if grouped_by else 0
    if unnamed:
        print(f"  {unnamed:,} images name no patient: each stays with those that it is like")
    numbers = [number_of[item.scan or item.name] for item in items]
    patients = [item.patient or owners.get(number, "") for item, number in zip(items, numbers)]
    return [f"patient {patient}" if patient else f"like {alike[number][0].name}"
            for patient, number in zip(patients, numbers)]


def say_alike(alike):
    """Say how many images are alike, and how many of those have other labels. alike: number -> its Items."""
    count = sum(len(group) for group in alike.values() if len(group) > 1)
    print(f"  {count:,} images are like another one")
    crossing = [group for group in alike.values() if len({item.labels for item in group}) > 1]
    if crossing:
        one = crossing[0][0]
        other = next(item for item in crossing[0] if item.labels != one.labels)
        print(f"  {sum(map(len, crossing)):,} of them are like one with another label, {printable(one.name)} and "
              f"{printable(other.name)} the first: what is one image has one label")


def keep_split(path, items, grouped_by):
    """Raise UserError where the split that is given divides a patient."""
    places = {}  # patient -> split
    for item in items:
        if item.patient and places.setdefault(item.patient, item.split) != item.split:
            raise UserError(f"{path}: patient {item.patient:.80} (by {grouped_by}) is in "
                            f"{places[item.patient]} and in {item.split}; keep to one, or give no split, and "
                            "one is made by patient")


def how_divided(grouped_by):
    return f"by patient ({grouped_by})" if grouped_by else "alike images on one side"


def make_split(path, items, names, groups, grouped_by):
    """The Items in train, validation and test, 70 : 10 : 20. Raises UserError where that cannot be."""
    print(f"  a split is made, 70 : 10 : 20, {how_divided(grouped_by)}")
    splits = split_by_group(groups, [item.labels for item in items], SHARES)
    items = [item._replace(split=split) for item, split in zip(items, splits)]
    try:
        require_classes(path, items, names)
    except UserError:
        classes = {label: {} for item in items for label in item.labels}  # class -> group -> its images
        for item, group in zip(items, groups):
            for label in item.labels:
                classes[label][group] = classes[label].get(group, 0) + 1
        label = min(sorted(classes), key=lambda label: len(classes[label]))
        count, images = len(classes[label]), sum(classes[label].values())
        if grouped_by:
            why = (f"the images of class {label!r} are of {count} patient{'s' * (count > 1)}, by {grouped_by}: "
                   "too few to divide; bring more")
        elif count < images:
            why = (f"all {images:,} images of class {label!r} are alike" if count == 1 else
                   f"the {images:,} images of class {label!r} are {count} groups of alike ones: too few to "
                   "divide"
                   ) + "; name patients"
        else:
            why = f"class {label!r} has {images} image{'s' * (images > 1)}: too few to divide; bring more"
        raise UserError(f"{path}: {why}, or give a split") from None
    return items


# ----------------------------------------------------------------------------- what is written

def digest(items):
    """A text that changes with any label, split or file, by the files' sizes and times alone."""
    checksum = hashlib.sha256()
    for item in items:
        file = file_of(item.source)
        state = os.stat(file) if os.path.isfile(file) else None
        checksum.update(ascii((*item, state and (state.st_size, state.st_mtime_ns))).encode())
    return f"{len(items):,} images, {checksum.hexdigest()[:16]}"


def records_of(path, items, groups):
    """
    Yield (split, Record) of Items, which have patients' and studies' hashes in place of their ids. groups: as
    give_groups names them; splits are made by these, so that they are the same whatever the secret is.
    """
    named = group_names(path, [group[8:] if group.startswith("patient ") else "" for group in groups])
    patients = hash_names(path, [item.patient for item in items])
    studies = hash_names(path, [item.study for item in items])
    headers = hash_names(path, [item.header and item.name for item in items])
    for item, hashed, group, patient, study, header in zip(items, named, groups, patients, studies, headers):
        name = f"scan {header}" if header else hide(item.name, item.patient, patient)
        if item.labels is None:  # skipped and counted
            yield item.split or "train", Record(name, image_name=name)
        else:
            yield item.split, Record(name, image=read_source(item.source), image_name=name, labels=item.labels,
                                     group=hashed or group, study=study)


def arrange(path, listing, facts):
    """The Items of a Listing with their splits, as they are given, or by folds, or made; and their groups."""
    items, folds = listing.items, facts.get("folds")
    if given := any(item.split for item in items):
        keep_split(path, items, listing.grouped_by)
    groups = give_groups(items, listing.grouped_by)
    if folds:
        splits = divide(path, groups, [item.labels for item in items], [item.split for item in items], folds["folds"],
                        folds["fold"])
        items = [item._replace(split=split) for item, split in zip(items, splits)]
        require_classes(path, items, listing.names)
        print(f"  fold {folds['fold']} of {folds['folds']} is the test split, {how_divided(listing.grouped_by)}")
    elif not given:
        items = make_split(path, items, listing.names, groups, listing.grouped_by)
    return items, groups


def skipped_of(shard):
    """How many samples were left out of a shard, by reason, in words; "" where none was."""
    first = {why: printable(name)[:80] for why, name in shard.manifest["first_skipped"].items()}
    return "".join(f"; skipped: {n:,} {why} ({first[why]} the first)" for why, n in shard.manifest["skipped"].items())


def write(target, path, listing, facts, workers):
    """Say what is listed, split and write it, and say what each split then holds of each class, and skipped."""
    labels = Counter(label or "of none" for item in listing.items for label in item.labels or [""])
    print(f"  {len(listing.items):,} pictures: "
          + ", ".join(f"{count:,} {printable(label):.40}" for label, count in labels.most_common(12)))
    for note in listing.notes:
        print(f"  {note}", flush=True)
    items, groups = arrange(path, listing, facts)
    counts = Counter(item.split for item in items)
    more = listing.unlabelled
    dataset = Dataset(name=target.name, read=lambda raw: records_of(path, items + more, groups + [""] * len(more)),
                      kind="classification", licence=facts["licence"], access="yours", megabytes=0, page="", layouts=(),
                      counts=counts, classes=tuple(sorted(map(printable, listing.names))),
                      multi_label=listing.multi_label)
    # Each worker first loads what the running script does, such as torch: too much for few images.
    workers = workers or min(os.cpu_count(), 1 + len(items) // 200)
    write_dataset(target, dataset, path, {}, b"", facts, workers, needed=("train", "test"))
    for split in filter(counts.get, ("train", "validation", "test")):
        shard = Shard(target / split)
        labels = Counter(label for record in shard.read_records() for label in record["labels"] or [""])
        classes = ", ".join(f"{count:,} {label or 'of none'}" for label, count in sorted(labels.items()))
        print(f"  {split}: {len(shard):,} images, {classes}{skipped_of(shard)}")


# ----------------------------------------------------------------------------- which dataset it is

def names_for(path):
    """Names for the dataset of a folder or csv: its own, made safe; and with a hash, where another has that."""
    name = re.sub(r"\W+", "_", path.name if path.is_dir() else path.stem).strip("_") or "images"
    hashed = f"{name[:LONGEST_NAME]}_{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"
    return [hashed] if name.lower() in DATASETS or len(name) > LONGEST_NAME else [name, hashed]


def is_anothers(target, path):
    """Whether a dataset is there that was not made of this folder or csv."""
    return target.exists() and clean(str(path)) not in origins(target)


def prepare_listing(path, shards_dir, facts, write, name="", ending=""):
    """
    Have write(target, facts) prepare what a folder or csv lists, unless it is there with these facts. Returns
    the dataset's name: the given one, or else the path's, with this ending, such as that of a fold.
    """
    if name.lower() in DATASETS:
        raise UserError(f"--name={name}: a public dataset is called so; choose another")
    facts = {"shard_version": SHARD_VERSION, "prompt_version": PROMPT_VERSION, "limit": 0, "licence": "yours",
             "path": clean(str(path)), "patients": "hashed", **facts}
    for base in [name] if name else names_for(path):
        name = base + ending
        if "folds" in facts:
            facts["folds"] = {"of": base} | facts["folds"]
        target, reason = shards_dir / name, ""
        if is_anothers(target, path):
            continue
        if why_stale(target, {"dataset": name, **facts}, {}):  # asked again once no other process is at it
            with locked(target, f"preparing {name}"):
                recover(target)
                if is_anothers(target, path):
                    continue
                reason = why_stale(target, {"dataset": name, **facts}, {})
                if reason:
                    print(f"{name}: {reason}", flush=True)
                    write(target, {"dataset": name, **facts})
        if not reason:
            print(f"{name}: up to date", flush=True)
        return name
    raise UserError(f"{path}: {target} is another's; delete it, or choose another --shards_dir")


def require_apart(path, shards_dir):
    """Raise UserError where what is written would be read as one's own, or is."""
    mine, theirs = path.resolve(), shards_dir.resolve()
    if mine.is_dir() and (mine.is_relative_to(theirs) or theirs.is_relative_to(mine)):
        raise UserError(f"{path}: the prepared datasets in {shards_dir} would be read as images of one's own; choose "
                        "another --shards_dir, or move the images into a folder of their own")


@contextlib.contextmanager
def compared(path, shards_dir, dry_run=False):
    """
    Run the block that prepares a folder or csv, then compare its images with all test splits in shards_dir, unless in a
    dry run nothing is prepared.
    Whatever it raises because of files becomes a UserError of one line.
    """
    try:
        if not path.exists():
            raise UserError(f"{path}: no folder and no csv there")
        require_apart(path, shards_dir)
        yield
        if not dry_run:
            with locked(shards_dir / "leaks.json", "comparing training with test images"):
                report = guard(shards_dir, "")
            mine = [split for split in report if not is_anothers((shards_dir / split).parent, path)]
            for line in report_lines({split: report[split] for split in mine}):
                print(f"  {line}")
    except (OSError, BrokenProcessPool) as error:
        raise UserError(f"{path}: {printable(str(error))}") from None
    except UserError as error:  # names of files may hold line breaks
        raise UserError(printable(str(error))) from None


def prepare_folder(path, shards_dir, wanted=Wanted()):
    """
    Prepare a folder or a csv into shards_dir, unless it is there unchanged, and compare it with all
    test splits there. Returns the dataset's name, of several folds the last one's.

    Few images are decoded by fewer processes than there are cores. Raises UserError.
    """
    path, shards_dir = own_path(path), Path(shards_dir)
    with compared(path, shards_dir, wanted.dry_run):
        listing = read_folder(path, wanted.scans) if path.is_dir() else read_table(path, wanted.scans, wanted.columns)
        require_names(path, listing.names)
        require_classes(path, listing.items, listing.names)
        facts = wanted.facts(item.source for item in listing.items) | {
            "listing": digest(listing.items + listing.unlabelled),
            "grouped_by": listing.grouped_by or "alike images", "multi_label": listing.multi_label}
        for ending, number in fold_targets("", wanted.folds, wanted.fold):
            facts |= wanted.facts_of_fold(number)
            if wanted.dry_run:
                return show(path, listing, facts, wanted.name)
            name = prepare_listing(path, shards_dir, facts, lambda target, facts: write(
                target, path, listing, facts, wanted.workers), wanted.name, ending)
        return name


def show(path, listing, facts, name):
    """Write the page of --dry_run. Returns the dataset's name, were it prepared."""
    for note in listing.notes:
        print(f"  {note}", flush=True)
    items, groups = arrange(path, listing, facts)
    labels = Counter(label for item in items for label in item.labels or ("of none",))
    counts = dict(Counter(item.split for item in items)) | dict(sorted(labels.items()))
    spread = slice(None, None, max(len(items) // 10, 1))  # so that each class is seen
    page = write_page(name or names_for(path)[0], path, ImageSettings(**facts["image"]), listing.notes, counts,
                      records_of(path, items[spread], groups[spread]))
    print(f"  {page}: some samples; nothing is prepared")
    return name or names_for(path)[0]
