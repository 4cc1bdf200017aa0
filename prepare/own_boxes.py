"""
A folder of your own images with boxes, or a csv of them, as a prepared dataset of kind "boxes".

    scans/1.png  scans/1.xml                       Pascal VOC, the XML beside its image or in a folder of its own
    scans/train/1.png  scans/train/coco.json       COCO, one JSON or one a split
    scans/images/1.png  scans/labels/1.txt         YOLO, with data.yaml or classes.txt
    scans.csv, or scans/boxes.csv                  image, label and x1, y1, x2, y2 or x, y, w, h

A csv's numbers are shares of the image where none is above 1.5, else pixels; a row without numbers is of an image
without a box, and a column for the patient, or for the split, may be there as in prepare/folder.py. An image is
asked for labels as prepare/boxes.py says. Where neither folders nor a csv name the splits, 80 : 20 are made by
patient, by the film that Roboflow's names tell (before ".rf."), or by a hash of the image.
"""

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from formats.frames import Frame, ScanSettings, decode_picture, picture_key
from formats.pictures import Pictures
from plumbing.flags import UserError
from plumbing.own import TABLES, files_below, own_path, printable, written
from plumbing.pixels import Unreadable
from plumbing.shards import Shard
from plumbing.tables import decode, find_column, find_roles, plain_name, read_rows, read_separated
from prepare.box_files import (LARGEST_TEXT, from_corner, gather, image_size, number, read_coco, read_voc, read_yolo,
                               to_shares)
from prepare.boxes import ask_image
from prepare.classify import read_lines, split_by_group
from prepare.datasets import Dataset, read_image, refuse_damage
from prepare.folder import compared, digest, names_for, prepare_listing, require_names, skipped_of
from prepare.listing import PATIENTS, SPLITS, Item, read_patients
from prepare.own_page import write_page
from prepare.own_pictures import read_source
from prepare.own_splits import complete_names, divide, fold_targets, hash_names, hide
from prepare.shards import ImageSettings, write_dataset

ROLES = {  # what a column is for -> names that it may have, without capitals, spaces and signs; the first counts
    "image": ("image", "path", "file", "filename", "imagepath", "imageid"),
    "label": ("label", "class", "name", "category"), "split": ("split",), "patient": PATIENTS}
CORNERS = (("x1", "y1", "x2", "y2"), ("xmin", "ymin", "xmax", "ymax"))
SIZES = (("x", "y", "w", "h"), ("x", "y", "width", "height"))
LARGEST_JSON = 1 << 28  # bytes that are looked into, whether they are COCO's


class Boxes(NamedTuple):
    """What a folder or a csv says."""
    form: str  # in words
    sources: list  # files that say where the boxes are
    rows: list  # (image's name, label, box in shares or None), as gather takes them
    pictures: dict  # image's name -> Path or Frame; None where it is missing
    splits: dict  # image's name -> split, where one is given
    patients: dict  # image's name -> patient, where one is named
    films: dict  # image's name -> film that it is a copy of, where names say so
    headers: set  # images whose header names a patient
    notes: list  # lines about how it was understood


# ----------------------------------------------------------------------------- what is there

def begins(path, words):
    """Whether a file's first bytes have these words in them."""
    with open(path, "rb") as file:
        return words in file.read(1 << 12)


def is_coco(path):
    if path.stat().st_size > LARGEST_JSON:
        if begins(path, b'"images"') or begins(path, b'"annotations"'):
            raise UserError(f"{path}: a JSON of more than {LARGEST_JSON >> 20:,} MiB, which may be COCO's and is not "
                            "looked into; divide it, as into train.json, validation.json and test.json")
        return False
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"images", "annotations", "categories"} <= content.keys()


def roles_of(given):
    """ROLES with the names of columns that are given, {role: column}."""
    return ROLES | {role: (plain_name(name),) for role, name in given.items() if role in ROLES}


def has_boxes(path, given):
    """Whether a csv's header names an image, a label and four numbers. given: {role: column}, by --columns."""
    with open(path, "rb") as file:
        start = file.read(LARGEST_TEXT)
    try:  # of UTF-8 whole lines, of UTF-16, which has zeros, all
        lines = decode(path, start if b"\0" in start else start[:start.rfind(b"\n") + 1] or start, []).split("\n")
        header, _ = read_separated(path, "\n".join(lines[:1 + bool(re.match('"?sep=', lines[0], re.I))]))
    except UserError:
        return False
    names, roles = set(map(plain_name, header)), roles_of(given)
    return all(names & set(roles[role]) for role in ("image", "label")) and any(
        set(sides) <= names for sides in CORNERS + SIZES)


def find_sources(path, given=None):
    """
    {form: files that say where boxes are} of a folder or csv; more than one form is for the caller to refuse. given:
    {role: column}, by --columns.
    """
    files = [path] if path.is_file() else list(files_below(path)) if path.is_dir() else []
    of = defaultdict(list)
    for file in (file for file in files if file.name[0] != "." and file.is_file()):
        suffix = file.suffix.lower()
        if suffix in TABLES and has_boxes(file, given or {}):
            of["csv"].append(file)
        elif suffix == ".xml" and begins(file, b"<annotation"):
            of["Pascal VOC"].append(file)
        elif suffix == ".json" and is_coco(file):
            of["COCO"].append(file)
        elif file.name.lower() in ("data.yaml", "data.yml", "classes.txt", "obj.names"):
            of["YOLO"].append(file)
    if of["YOLO"] and not any(file.suffix == ".txt" and file not in of["YOLO"] for file in files):
        del of["YOLO"]
    return {form: sorted(files) for form, files in of.items() if files}


# ----------------------------------------------------------------------------- images

class Images(Pictures):
    """The images below a folder, each of one picture, found by what a file of boxes calls them."""

    def called_so(self, where, called, beside):
        """The name of the image that a file of boxes calls so; what leads to none stands for itself."""
        place = self.place(where, called, beside)
        return self.name_of(place) if place else written(called.replace("\\", "/").strip()) or "no name"

    def scan(self, name):
        """The Scan of an image; None where there is none of this name."""
        return next(iter(self.scans_at(self.files[name])), None) if name in self.files else None

    def source(self, name):
        """The Path or Frame of an image; None where there is none of this name. UserError where it has several."""
        scan = self.scan(name)
        if scan and len(scan.sources) > 1:
            raise UserError(f"{self.folder / name}: {len(scan.sources)} pictures in it, and boxes do not say on which "
                            "of them they are; save each as a file of its own")
        return scan and scan.sources[0]

    def size(self, name):
        """(width, height) of an image as it is shown; None where it cannot be read."""
        source = self.source(name)
        if not isinstance(source, Frame):
            return image_size(source and read_image(source))
        try:
            return decode_picture(source).size
        except Unreadable:
            return None


def split_of(parts):
    """The split that the first of these names of folders says: train, val2017; "" where none does."""
    parts = [part.lower().rstrip("0123456789") for part in parts]
    return next((SPLITS[part] for part in parts if part in SPLITS), "")


# ----------------------------------------------------------------------------- each form

def from_voc(sources, images, notes):
    rows, odd = [], []
    for path in sources:
        called, width, height, boxes = read_voc(path, read_image(path))
        name = images.called_so(path, called or path.stem, path.parent)
        if name not in images.files and path.stem in images.called:  # many a program writes another name
            name = images.called_so(path, path.stem, path.parent)
        if name in images.files and is_odd(name, images.size(name), (width, height)):
            odd.append(name)
        rows += [(name, "", None), *((name, label or "no label", box) for label, box in boxes)]
    note_sizes(odd, notes)
    names, splits = {Path(name).stem: name for name, *_ in rows}, {}
    for path in sorted(images.folder.glob("**/ImageSets/Main/*.txt")):
        if path.stem.lower() in SPLITS:  # beside them are lists of several splits, and of each class
            splits |= {names[stem]: SPLITS[path.stem.lower()] for stem in read_lines(path) if stem in names}
    return rows, splits


def is_odd(name, upright, size):
    """
    Whether an image is of another (width, height) than its boxes' file says. UserError where that has the size before
    the image's EXIF tag turns it: then the boxes are of other pixels than those that are shown.
    """
    if upright and upright[0] != upright[1] and tuple(size) == upright[::-1]:
        raise UserError(f"{name}: shown upright it is {upright[0]} x {upright[1]} pixels, by its boxes' file "
                        f"{size[0]} x {size[1]}; turn the image, its EXIF tag and its boxes alike")
    return upright != tuple(size)


def note_sizes(odd, notes):
    if odd:
        notes.append(f"{len(odd):,} images have another size than their boxes' file says, {odd[0]:.80} the first: "
                     "boxes are taken as shares of the size that it says")


def from_coco(sources, images, notes):
    rows, odd, splits = [], [], {}
    for path in sources:
        about, boxes = read_coco(path)
        split = split_of([*path.relative_to(images.folder).parent.parts, *re.split(r"[\W_]+", path.stem)])
        names = {key: images.called_so(path, called, path.parent) for key, (called, *_) in about.items()}
        for key, name in names.items():
            if name in images.files and is_odd(name, images.size(name), about[key][1:]):
                odd.append(name)
            if split:
                splits[name] = split
        rows += [(name, "", None) for name in names.values()]
        rows += [(names[key], label, box) for key, label, _, box in boxes]
    note_sizes(odd, notes)
    return rows, splits


def class_names(path):
    """The names of YOLO's classes: classes.txt has a line each, data.yaml a list or numbers with names."""
    if path.suffix not in (".yaml", ".yml"):
        return read_lines(path)
    with refuse_damage(path, "text"):
        text = path.read_bytes()[:LARGEST_TEXT].decode("utf-8-sig")
    entry = re.search(r"^names[ \t]*:[ \t]*(?:[\[{]([^\]}]*)[\]}]|((?:\n[ \t]*(?:-|\d+[ \t]*:)[^\n]*)+))", text, re.M)
    if not entry:
        raise UserError(f"{path}: no list of `names:` in it; put them into classes.txt, a line each")
    inline, block = entry.groups()
    names = re.findall(r"""\s*(?:\d+\s*:\s*)?("[^"]*"|'[^']*'|[^,\s][^,]*),?""", inline or "") if block is None else [
        re.sub(r"^-?[ \t]*(?:\d+[ \t]*:)?", "", line.strip()).partition(" #")[0] for line in block.strip().splitlines()]
    return [name.strip("'\" \t\r\n") for name in names]


def from_yolo(sources, images, notes):
    lists = {tuple(class_names(path)) for path in sources}
    if len(lists) > 1:
        raise UserError(f"{sources[0]} and {sources[1]} name other classes; leave one of them")
    (names,), rows, without = lists, [], []
    for name, file in images.files.items():
        parts = list(file.relative_to(images.folder).with_suffix(".txt").parts)
        texts = [images.folder.joinpath(*parts)]
        if "images" in parts[:-1]:
            place = len(parts) - 2 - parts[-2::-1].index("images")
            texts.append(images.folder.joinpath(*parts[:place], "labels", *parts[place + 1:]))
        text = next((text for text in texts if text.is_file() and text not in sources), None)
        rows.append((name, "", None))
        if text is None:
            without.append(name)
        else:
            rows += [(name, label, box) for label, box in read_yolo(text, read_image(text), names)]
    if without:
        notes.append(f"{len(without):,} images have no file of boxes, {without[0]:.80} the first: they count as "
                     "without any")
    return rows, {}


def from_table(path, images, notes, given):
    """(rows, splits, patients) of a csv. given: {role: column}, by --columns."""
    (header, table), known = read_rows(path), roles_of(given)
    find_roles(path, header, {}, given)  # which refuses a column that is not there
    image, label, split = (find_column(path, header, known[role]) for role in ("image", "label", "split"))
    names = [re.sub(r"[\W_]", "", name) for name in header]
    sides = next(sides for sides in CORNERS + SIZES if set(sides) <= set(names))
    places = [find_column(path, header, [side]) for side in sides]
    people, chosen, more = read_patients(path, header, table, known["patient"])
    cells = [[row[place] for place in places] for _, row in table]
    boxes = [[number(f"{path}: row {place}", cell) for cell in some] if any(some) else None
             for (place, _), some in zip(table, cells)]
    largest = max((value for box in boxes if box for value in box), default=0)
    shares = largest <= 1.5  # of which some may lie a little beyond their image
    notes += [f"columns {', '.join(sides)} are taken for {'two corners' if sides in CORNERS else 'a corner and a size'}"
              f" in {'shares of the image' if shares else 'pixels'}: the largest is {largest:g}", *more]
    rows, splits, patients, sizes = [], {}, {}, {}
    for (place, row), box, patient in zip(table, boxes, people):
        where, name = f"{path}: row {place}", images.called_so(f"{path}: row {place}", row[image], path.parent)
        if box and sides in SIZES:
            box = from_corner(box)
        if box and not shares:
            if name not in sizes:
                sizes[name] = images.size(name)
            box = sizes[name] and to_shares(where, box, *sizes[name])  # else its image is missing or unreadable
        rows += [(name, "", None)] + ([(name, row[label], tuple(box))] if box else [])
        if patients.setdefault(name, patient) != patient:
            raise UserError(f"{where}: {name:.80} is of two patients; give it one")
        if split is not None and splits.setdefault(name, row[split]) != row[split]:
            raise UserError(f"{where}: {name:.80} is in two splits; give it one")
    splits = {name: SPLITS.get(given.lower(), given) for name, given in splits.items() if given}
    return rows, splits, {name: patient for name, patient in patients.items() if patient}


def read_boxes(path, sources, settings=ScanSettings(), given=None):
    """
    The Boxes of a folder or csv, from the files that find_sources found. given: {role: column}, by --columns. Raises
    UserError.
    """
    if len(sources) > 1:
        firsts = " and ".join(f"{files[0].name} ({form})" for form, files in sources.items())
        raise UserError(f"{path}: boxes in more than one form, {firsts}; leave one of them")
    (form, files), = sources.items()
    images, notes, patients = Images(path if path.is_dir() else path.parent, settings, outside=False), [], {}
    if form == "csv":
        if len(files) > 1:
            raise UserError(f"{path}: boxes in {files[0].name} and in {files[1].name}; name one as --own={files[0]}")
        rows, splits, patients = from_table(files[0], images, notes, given or {})
    else:
        rows, splits = {"Pascal VOC": from_voc, "COCO": from_coco, "YOLO": from_yolo}[form](files, images, notes)
    names = dict.fromkeys(name for name, *_ in rows)
    left = [name for name in images.files if name not in names]
    if left:
        notes.append(f"{len(left):,} images are in no file of boxes, {printable(left[0]):.80} the first: passed over")
    by_folder = {name: split_of(name.split("/")[:-1]) for name in names}
    splits = {name: split for name, split in (by_folder | splits).items() if split}
    films = {name: Path(name).name.split(".rf.")[0] for name in names if ".rf." in name}
    scans = {name: scan for name in names if (scan := images.scan(name)) and (scan.patient or scan.study)}
    headers = {name: scan.patient or f"study {scan.study}" for name, scan in scans.items()}
    if patients:
        whole = complete_names(*([some.get(name, "") for name in names] for some in (patients, headers)), notes)
        patients = {name: patient for name, patient in zip(names, whole) if patient}
    else:
        patients = headers
    pictures = {name: images.source(name) for name in names}
    return Boxes(form, files, rows, pictures, splits, patients, {} if patients else films, set(scans),
                 notes + images.notes())


# ----------------------------------------------------------------------------- splits

def divide_own(path, boxes, folds=0, fold=0):
    """{image: split} of Boxes, and a line that says how it came about. Raises UserError where it cannot be."""
    for name, split in boxes.splits.items():
        if split not in SPLITS.values():
            raise UserError(f"{path}: {name:.80} is of split {split!r:.40}, none of train, validation and test")
    lost = [name for name in boxes.pictures if boxes.splits and name not in boxes.splits]
    if lost:
        raise UserError(f"{path}: {lost[0]:.80} is in none of train, validation and test, though others are; give it "
                        "a split, or give none and one is made")
    groups = {name: group_of(boxes, name) for name in boxes.pictures}
    by = "patient" if boxes.patients else "film" if boxes.films else "a hash of each image"
    if folds or boxes.splits and boxes.patients:  # which are not divided
        named = [f"patient {boxes.patients[name]}" if name in boxes.patients else group
                 for name, group in groups.items()]
        parts = divide(path, named, [()] * len(named), [boxes.splits.get(name, "") for name in groups], folds, fold)
        splits = dict(zip(groups, parts))
        how = f"fold {fold} of {folds} is the test split, by {by}" if folds else "the split is the one that is given"
    elif boxes.splits:
        sides = defaultdict(set)
        for name, film in boxes.films.items():
            sides[film].add(boxes.splits[name])
        torn = [film for film, splits in sides.items() if len(splits) > 1]
        splits, how = boxes.splits, "the split is the one that is given"
        if torn:
            how += f"; {len(torn):,} films are in several of its parts, {printable(torn[0]):.40} the first"
    else:
        drawn = ["test" if bytes.fromhex(group)[0] % 5 == 0 else "train" for group in groups.values()]
        if boxes.patients or boxes.films:  # of few groups a hash might leave none to test with
            drawn = split_by_group(groups.values(), [()] * len(groups), {"train": 0.8, "test": 0.2})
        splits, how = dict(zip(groups, drawn)), f"a split is made, 80 : 20, by {by}"
    counts = Counter(splits.values())
    if not counts["train"] or not (counts["test"] or counts["validation"]):
        raise UserError(f"{path}: {counts['train']:,} images to train on and {counts['test']:,} to test with; bring "
                        "more, or name splits by folders or a column")
    return splits, how


def group_of(boxes, name):
    """The hash of what is not divided: an image's patient or film, or itself, so that equal ones stay together."""
    named, picture = boxes.patients.get(name) or boxes.films.get(name), boxes.pictures[name]
    if named or picture is None:
        return hashlib.sha256((named or name).encode("utf-8", "replace")).hexdigest()
    return picture_key(picture).hex()


# ----------------------------------------------------------------------------- what is written

def records_of(path, boxes, found, splits):
    """Yield (split, Record) of images with their boxes, which have patients' hashes in place of their ids."""
    labels, names = sorted({label for some in found.values() for label in some}), list(found)
    patients = hash_names(path, [boxes.patients.get(name, "") for name in names])
    headers = hash_names(path, [name if name in boxes.headers else "" for name in names])
    for name, patient, header in zip(names, patients, headers):
        shown = f"scan {header}" if header else hide(name, boxes.patients.get(name, ""), patient)
        content = boxes.pictures[name] and read_source(boxes.pictures[name])
        group = f"patient {patient}" if patient else boxes.films.get(name, "")
        for record in ask_image(shown, content, found[name], labels, group):
            yield splits[name], record


def write(target, path, boxes, found, splits, tokenizer, facts, workers):
    """Write what is gathered, {image: {label: boxes}}, and say what each split then holds, and skipped."""
    labels = sorted({label for some in found.values() for label in some})
    count = sum(len(some) for of_image in found.values() for some in of_image.values())
    print(f"  {boxes.form} in {len(boxes.sources):,} file{'s' * (len(boxes.sources) > 1)}: {count:,} boxes of "
          f"{len(labels):,} labels ({printable(', '.join(labels)):.200}) on {len(found):,} images")
    for note in boxes.notes:
        print(f"  {printable(note)}", flush=True)
    dataset = Dataset(name=target.name, read=lambda raw: records_of(path, boxes, found, splits), kind="boxes",
                      licence="yours", access="yours", megabytes=0, page="", layouts=(), counts={})
    workers = workers or min(os.cpu_count(), 1 + len(found) // 200)  # each first loads what the script does
    write_dataset(target, dataset, path, {}, tokenizer.path.read_bytes(), facts, workers, needed=("train",))
    for split in (split for split in ("train", "validation", "test") if split in splits.values()):
        shard = Shard(target / split)
        print(f"  {split}: {len(shard):,} questions about {shard.manifest['images']:,} images{skipped_of(shard)}")


def prepare_boxes(path, sources, shards_dir, wanted, tokenizer, box_format="medmo", augment=0):
    """
    Prepare a folder or csv of images with boxes into shards_dir, unless it is there unchanged, and compare it
    with all test splits there. Returns the dataset's name, of several folds the last one's.

    sources: what find_sources found; wanted: Wanted; tokenizer: of zoo.chatml.open_tokenizer; augment: altered copies
    of each training sample. Raises UserError.
    """
    path, shards_dir = own_path(path), Path(shards_dir)
    with compared(path, shards_dir, wanted.dry_run):
        boxes = read_boxes(path, sources, wanted.scans, wanted.columns)
        found = gather(path.name, boxes.rows)
        require_names(path, {label for some in found.values() for label in some})
        if not any(found.values()):
            raise UserError(f"{path}: {boxes.form}, but not one box in it")
        facts = wanted.facts(boxes.pictures.values()) | {"box_format": box_format, "augment": augment,
                                                         "tokenizer_sha256": tokenizer.sha256}
        facts |= {"system": tokenizer.system} if tokenizer.system else {}
        for ending, part in fold_targets("", wanted.folds, wanted.fold):
            splits, how = divide_own(path, boxes, wanted.folds, part)
            divided = boxes._replace(notes=[how, *boxes.notes])
            items = [Item(splits[name], name, boxes.pictures[name] or path / name, tuple(sorted(some.items())),
                          boxes.patients.get(name, "")) for name, some in found.items()]
            facts |= {"listing": digest(items)} | wanted.facts_of_fold(part)
            if wanted.dry_run:
                name = wanted.name or names_for(path)[0]
                page = write_page(name, path, ImageSettings(**facts["image"]), divided.notes, Counter(splits.values()),
                                  records_of(path, boxes, found, splits))
                print(f"  {page}: the first samples; nothing is prepared")
                return name
            name = prepare_listing(path, shards_dir, facts, lambda target, facts: write(
                target, path, divided, found, splits, tokenizer, facts, wanted.workers), wanted.name, ending)
        return name
