"""
What a folder of images, or a csv that lists them, says: each image's labels, its split and its patient.

Nothing is decoded here. What can only be a slip is refused; what was understood in one of several ways is
said, in the Listing's notes.
"""

import os
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from plumbing.flags import UserError
from plumbing.own import files_below, printable, written
from plumbing.pixels import FORMATS, SUFFIXES
from prepare.datasets import require_columns
from prepare.own_tables import NOTHING, find_column, read_rows

SPLITS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation",
          "val": "validation", "test": "test", "testing": "test"}
PATHS, LABELS = ("path", "file", "image", "filename"), ("label", "labels")  # names that a column may have,
PATIENTS = ("patientid", "patient", "pid", "mrn", "subjectid", "subject", "caseid", "case", "studyid",
            "study", "groupid", "group")  # without capitals, spaces and signs; the first that is there counts


class Item(NamedTuple):
    """An image as a folder or a csv lists it."""
    split: str  # "" where none is given
    name: str  # its path in the folder or the csv
    file: Path
    labels: tuple
    patient: str = ""  # "" where none is named


class Listing(NamedTuple):
    """What a folder or a csv says."""
    items: list  # of Item
    unlabelled: list  # Items whose class is not known
    names: set  # of its classes, as they are written
    multi_label: bool  # an image may have several labels, or none
    grouped_by: str  # where patients come from; "" where none is named
    notes: list  # lines about how it was understood


# ----------------------------------------------------------------------------- folders

def folders_in(folder):
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def is_image(file):
    """Whether a file is an image by its name or, where the end of that says nothing, by its first bytes."""
    if file.name[0] == "." or not os.path.isfile(file):
        return False
    if file.suffix.lower() in SUFFIXES:
        return True
    try:
        with Image.open(file, formats=FORMATS):
            return True
    except Exception:  # each decoder has its own ways to fail on another file
        return False


def read_folder(folder):
    """The Listing of a folder with one a class, perhaps in train and test, perhaps with one a patient in it."""
    splits = [path for path in folders_in(folder) if path.name.lower() in SPLITS]
    items, others, depth = [], [], 1 if splits else 0
    inside = defaultdict(set)  # split and class -> names of the folders in it
    for file in files_below(folder):
        parts = [written(part) for part in file.relative_to(folder).parts]
        if len(parts) <= depth + 1 or not is_image(file):
            others.append(printable("/".join(parts)))
            continue
        split = SPLITS.get(parts[0].lower(), parts[0]) if splits else ""
        patient = printable(parts[depth + 1]).casefold() if len(parts) > depth + 2 else ""
        items.append(Item(split, "/".join(parts), file, (printable(parts[depth]),), patient))
        inside[split, parts[depth]].add(patient)
    notes, grouped_by, patients = [], "", set().union(*inside.values()) - {""}
    if others:
        notes.append(f"{len(others):,} files passed over, {others[0]:.80} the first: hidden, no image, or in "
                     "no class's folder")
    if len(patients) > 1 and all(names - {""} for names in inside.values()):
        grouped_by = "folders inside classes"
        notes.append(f"folders inside classes are taken for patients: {len(patients):,} of them")
    else:  # one layer for all of them, or classes of which some have folders in them
        items = [item._replace(patient="") for item in items]
    names = {written(path.name) for top in splits or [folder] for path in folders_in(top)}
    return Listing(items, [], names, False, grouped_by, notes)


# ----------------------------------------------------------------------------- tables

def read_patients(path, header, rows):
    """Each row's patient, "" where none is named; the place of the column, or None; and what is to be said."""
    def column(place):
        cells = [printable(cells[place]).casefold() for _, cells in rows]
        cells = [re.sub(r"^(\d+)\.0+$", r"\1", cell) for cell in cells]  # pandas's beside an empty cell
        return ["" if cell in NOTHING else cell for cell in cells]

    places = [find_column(path, header, [name]) for name in PATIENTS]
    columns = {place: column(place) for place in places if place is not None}
    columns = {place: cells for place, cells in columns.items() if any(cells)}
    if not columns:
        return [""] * len(rows), None, []
    chosen, *rest = columns
    notes = []
    for place in rest:
        owners = defaultdict(set)
        for cell, patient in zip(columns[place], columns[chosen]):
            owners[cell].add(patient)
        shared = [cell for cell, patients in owners.items() if cell and len(patients - {""}) > 1]
        if shared:
            notes.append(f"{len(shared):,} of {printable(header[place])!r} are of several patients, "
                         f"{shared[0]:.40} the first: {printable(header[chosen])!r} is what counts")
    return columns[chosen], chosen, notes


def read_labels(rows, place):
    """Each row's labels, None where they are not known; whether it may have several; what is to be said."""
    cells = [[printable(part) for part in re.split("[|;]", row[place])] for _, row in rows]
    labels = [tuple(sorted({part for part in parts if part.casefold() not in NOTHING})) for parts in cells]
    counts = Counter(min(len(classes), 2) for classes in labels)
    multi_label, notes = counts[2] > 0, []
    # Beside images with several labels an empty cell is one without a finding; a "?" is none even there.
    unknown = [not classes and not (multi_label and not any(parts)) for parts, classes in zip(cells, labels)]
    if multi_label:
        notes.append(f"an image may have several labels: {counts[2]:,} have several, {counts[1]:,} have one, "
                     f"{counts[0] - sum(unknown):,} have none, which counts as no finding")
    if any(unknown):
        first = unknown.index(True)
        what = repr("|".join(cells[first])) if any(cells[first]) else "empty"
        notes.append(f"{sum(unknown):,} of {len(rows):,} rows have no label, row {rows[first][0]} ({what:.40}) "
                     "the first: skipped")
    return [None if lost else classes for classes, lost in zip(labels, unknown)], multi_label, notes


def read_table(path):
    """The Listing of a csv."""
    header, rows = read_rows(path)
    places = {kind: find_column(path, header, known)
              for kind, known in (("path", PATHS), ("label", LABELS), ("split", ["split"]))}
    require_columns(path, header, [kind for kind in ("path", "label") if places[kind] is None])
    labels, multi_label, notes = read_labels(rows, places["label"])
    patients, chosen, more = read_patients(path, header, rows)
    used = {*places.values(), chosen}
    unused = [printable(name) or "one without a name" for place, name in enumerate(header) if place not in used]
    if unused:
        notes.append(f"columns that are not used: {', '.join(unused):.500}")
    items = []
    for (_, cells), classes, patient in zip(rows, labels, patients):
        name, split = (cells[places[kind]] if places[kind] is not None else "" for kind in ("path", "split"))
        items.append(Item(SPLITS.get(split.lower(), split), name, path.parent / name, classes, patient))
    for place, count in Counter(os.path.normpath(item.file) for item in items).items():
        if count > 1:
            name = next(item.name for item in items if os.path.normpath(item.file) == place)
            raise UserError(f"{path}: {count} rows of {name:.80}; give it one, its labels joined by |")
    known = [item for item in items if item.labels is not None]
    if rows and not known:
        raise UserError(f"{path}: none of its {len(rows):,} rows has a label")
    missing = [item.file for item in known if not os.path.isfile(item.file)]
    if missing and 10 * len(missing) >= len(known):  # fewer are skipped and counted
        raise UserError(f"{path}: {len(missing):,} of its {len(known):,} files are not there, the first "
                        f"{str(missing[0]):.200}; paths start at the folder of the csv")
    names = {label for item in known for label in item.labels}
    if len(names) > 10 and 2 * len(names) > len(known):
        raise UserError(f"{path}: {len(names):,} classes for {len(known):,} images, {min(names)!r:.40} among "
                        "them; put what is measured, or said in words, into few classes")
    grouped_by = "" if chosen is None else f"column {printable(header[chosen])}"
    return Listing(known, [item for item in items if item.labels is None], names, multi_label, grouped_by,
                   notes + more)
