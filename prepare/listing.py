"""
What a folder of images, or a csv that lists them, says: each image's labels, its split and its patient.

No picture is decoded here. What can only be a slip is refused; what was understood in one of several ways is
said, in the Listing's notes.
"""

import os
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from formats.frames import Frame, ScanSettings
from formats.pictures import Pictures, file_of, is_left_by_programs
from plumbing.flags import UserError
from plumbing.own import OURS, files_below, printable, written
from plumbing.tables import NOTHING, find_column, find_roles, plain_name, read_rows
from prepare.datasets import require_columns
from prepare.own_splits import complete_names, several_of

SPLITS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation",
          "val": "validation", "test": "test", "testing": "test"}
PEOPLE = ("patientid", "patient", "pid", "mrn", "subjectid", "subject", "participantid", "participant", "patientenid",
          "patientennummer", "patientennr", "idpatient", "idpaciente", "paciente")
PATIENTS = (*PEOPLE, "caseid", "case", "studyid", "study", "groupid", "group")  # the first that is not empty counts
ROLES = {  # names that a column may have, without capitals, spaces and signs; the first that is there counts
    "image": ("path", "file", "image", "filename", "imageindex", "imagepath", "imagename", "imageid", "filepath"),
    "label": ("label", "labels", "findinglabels"), "split": ("split",), "patient": PATIENTS,
    "study": ("studyid", "study", "studyinstanceuid", "examid", "exam", "accession", "accessionnumber")}
MASK = re.compile(r"[ ._-](mask|seg|segmentation|gt|labels?|labelmap|roi)([ _-]?\d+)?(?=(\.nii)?\.[^.]+$)", re.I)
NO_CLASS = re.compile(r"(images?|imgs?|masks?|labels?|annotations?|segmentations?|ground_?truths?|gts?)([ _-]?t[rs])?",
                      re.I)  # names of folders that hold images or what was drawn on them


class Item(NamedTuple):
    """A picture as a folder or a csv lists it."""
    split: str  # "" where none is given
    name: str  # its path in the folder or the csv, and its place in its file
    source: Path | Frame
    labels: tuple
    patient: str = ""  # "" where none is named
    header: str = ""  # the patient, or study, that the file's header names
    study: str = ""  # whose pictures may be judged together
    scan: str = ""  # whose slices it is one of; "": a picture alone


class Listing(NamedTuple):
    """What a folder or a csv says."""
    items: list  # of Item
    unlabelled: list  # Items whose class is not known
    names: set  # of its classes, as they are written
    multi_label: bool  # an image may have several labels, or none
    grouped_by: str  # where patients come from; "" where none is named
    notes: list  # lines about how it was understood


# ----------------------------------------------------------------------------- pictures

def items_of(scan, name_of, split, labels, patient="", study=""):
    """The Items of a Scan's pictures. name_of: Path -> name of a file."""
    files = Counter(map(file_of, scan.sources))
    several = name_of(file_of(scan.sources[0])) if len(scan.sources) > 1 else ""
    header = scan.patient or scan.study and f"study {scan.study}"
    for source, label in zip(scan.sources, scan.labels):
        file = file_of(source)
        yield Item(split, name_of(file) if files[file] == 1 else f"{name_of(file)} {label}", source, labels, patient,
                   header, study or scan.study or several, several)


def group_by_headers(items, notes):
    """The Items with the patients that their headers name, and where those come from; "": none is named."""
    patients = {item.header for item in items} - {""}
    studies = {item.study for item in items if item.header}
    if len(patients) == 1 and len(studies) > 1:
        notes.append(f"the headers of all scans name one patient, as programs write it that take names out: their "
                     f"{len(studies):,} studies count as patients")
        items = [item._replace(header=item.header and f"study {item.study}") for item in items]
    if not patients:
        return items, ""
    of = {item.study: item.header for item in items
          if item.study and item.header and item.header != f"study {item.study}"}
    return [item._replace(patient=of.get(item.study, item.header) or item.patient) for item in items
            ], "the headers of scans"


def keep_studies(items, notes):
    """The Items, their study "" where it has one picture, or pictures of several labels or splits."""
    of = defaultdict(list)
    for item in items:
        of[item.study].append((item.labels, item.split))
    mixed = {study for study, some in of.items() if study and len(set(some)) > 1}
    if mixed:
        notes.append(f"{len(mixed):,} studies or scans have pictures of several labels: each of these is judged alone")
    return [item if len(of[item.study]) > 1 and item.study not in mixed else item._replace(study="") for item in items]


# ----------------------------------------------------------------------------- folders

def folders_in(folder):
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def is_mask(file, names):
    """Whether a file is called as the mask of an image that is beside it; names: of all files."""
    plain = MASK.sub("", file.name)
    return plain != file.name and file.with_name(plain) in names


def read_folder(folder, settings=ScanSettings()):
    """The Listing of a folder with one a class, perhaps in train and test, perhaps with one a patient in it."""
    splits = [path for path in folders_in(folder) if path.name.lower() in SPLITS]
    files = [file for file in files_below(folder) if file.name not in OURS]
    pictures, depth = Pictures(folder, settings), 1 if splits else 0
    names, masks, others, classes = set(files), [], [], defaultdict(list)
    for file in files:
        parts = tuple(written(part) for part in file.relative_to(folder).parts)
        masked = is_mask(file, names)
        if len(parts) <= depth + 1 or is_left_by_programs(file) or masked:
            (masks if masked else others).append(file)
        else:
            classes[parts[:depth + 1]].append(file)
    items, inside = [], defaultdict(set)  # split and class -> names of the folders in it
    for parts, some in classes.items():
        split, label = SPLITS.get(parts[0].lower(), parts[0]) if splits else "", printable(parts[depth])
        for scan in pictures.read_files(some):
            more = [written(part) for part in file_of(scan.sources[0]).relative_to(folder).parts[depth + 1:]]
            patient = printable(more[0]).casefold() if len(more) > 1 else ""
            items += items_of(scan, pictures.name_of, split, (label,), patient)
            inside[parts].add(patient)
    if not items and pictures.refused:
        raise UserError(f"{folder}: no picture in it can be used: {pictures.notes()[0]}")
    shown = {file_of(source) for source in (*(item.source for item in items), *pictures.left_out)}
    used = shown | set(masks) | pictures.refused.keys()
    others = [file for file in files if file not in used]
    notes, grouped_by, patients = [], "", set().union(*inside.values()) - {""}
    if others:
        notes.append(f"{len(others):,} files passed over, {printable(pictures.name_of(others[0])):.80} the first: "
                     "hidden, no image, or in no class's folder")
    if masks:
        notes.append(f"{len(masks):,} masks passed over, {printable(pictures.name_of(masks[0])):.80} the first: each "
                     "is called as an image beside it")
    inner = len(patients) > 1 and all(names - {""} for names in inside.values())
    headers = [item.header for item in items]
    several = several_of([item.patient for item in items], headers) if len(set(headers) - {""}) > 1 else {}
    if inner and not several:
        grouped_by = "folders inside classes"
        notes.append(f"folders inside classes are taken for patients: {len(patients):,} of them")
    else:  # one layer for all of them, or classes of which some have folders in them, or folders of series
        if inner:
            notes.append(f"folders inside classes are no patients: {len(several):,} patients of headers have several, "
                         f"{' and '.join(next(iter(several.values()))[:2]):.80} the first; headers count")
        else:
            items = [item._replace(patient="") for item in items]
        items, grouped_by = group_by_headers(items, notes)
    names = {written(path.name) for top in splits or [folder] for path in folders_in(top)}
    if len(names) > 1 and all(map(NO_CLASS.fullmatch, names)):
        raise UserError(f"{folder}: {' and '.join(sorted(names)):.80} are no classes, but images and what was drawn on "
                        "them; for labels, name the images' folder or a csv; for boxes in YOLO's way, add classes.txt")
    return Listing(keep_studies(items, notes), [], names, False, grouped_by, notes + pictures.notes())


# ----------------------------------------------------------------------------- tables

def read_patients(path, header, rows, known=PATIENTS):
    """
    Each row's patient, "" where none is named; the place of the column, or None; and what is to be said. known: names
    that the column may have.
    """
    def column(place):
        cells = [printable(cells[place]).casefold() for _, cells in rows]
        cells = [re.sub(r"^(\d+)\.0+$", r"\1", cell) for cell in cells]  # pandas's beside an empty cell
        return ["" if cell in NOTHING else cell for cell in cells]

    places = [find_column(path, header, [name]) for name in known]
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


def read_table(path, settings=ScanSettings(), given=None):
    """The Listing of a csv. given: {role: column}, by --columns."""
    (header, rows), notes = read_rows(path), []
    given = find_roles(path, header, {}, given or {})
    known = {role: [plain_name(given[role])] if role in given else names for role, names in ROLES.items()}
    places = {role: find_column(path, header, known[role]) for role in ("image", "label", "split", "study")}
    require_columns(path, header, [role for role in ("image", "label") if places[role] is None])
    labels, multi_label, more = read_labels(rows, places["label"])
    patients, places["patient"], still = read_patients(path, header, rows, known["patient"])
    unused = [printable(name) or "one without a name" for place, name in enumerate(header)
              if place not in places.values()]
    if unused:
        notes.append(f"columns that are not used: {', '.join(unused):.500}")
    items, pictures = [], Pictures(path.parent, settings)
    for (number, cells), classes, patient in zip(rows, labels, patients):
        name, split, study = (cells[places[role]] if places[role] is not None else ""
                              for role in ("image", "split", "study"))
        split, study = SPLITS.get(split.lower(), split), "" if study.lower() in NOTHING else f"{patient} {study}"
        items += table_items(pictures, f"{path}: row {number}", name, split, classes, patient, study)
    require_once(path, items)
    grouped_by = "" if places["patient"] is None else f"column {printable(header[places['patient']])}"
    if not grouped_by:
        items, grouped_by = group_by_headers(items, notes)
        notes += [] if grouped_by else ["no patient is named; a column that names them is given as "
                                        "--columns=patient:its name"]
    else:
        names = complete_names([item.patient for item in items], [item.header for item in items], notes)
        items = [item._replace(patient=name) for item, name in zip(items, names)]
    items = keep_studies(items, notes)
    known = [item for item in items if item.labels is not None]
    if rows and not known:
        raise UserError(f"{path}: none of its {len(rows):,} rows has a label")
    require_files(path, known)
    names = {label for item in known for label in item.labels}
    if len(names) > 10 and 2 * len(names) > len(known):
        raise UserError(f"{path}: {len(names):,} classes for {len(known):,} images, {min(names)!r:.40} among "
                        "them; put what is measured, or said in words, into few classes")
    return Listing(known, [item for item in items if item.labels is None], names, multi_label, grouped_by,
                   more + notes + still + pictures.notes())


def table_items(pictures, where, name, split, labels, patient, study):
    """The Items of the picture that a row names, or one whose file is not there."""
    scan = pictures.find(where, name, pictures.folder)
    if scan is None:
        return [Item(split, name, pictures.folder / name, labels, patient, "", study)]

    def name_of(file):
        return pictures.name_of(file) if file.is_relative_to(pictures.folder) else name

    return list(items_of(scan, name_of, split, labels, patient, study))


def require_once(path, items):
    """Raise UserError where two rows are of one picture."""
    places = [(os.path.normpath(file_of(item.source)), getattr(item.source, "place", ())) for item in items]
    counts = Counter(places)
    for item, place in zip(items, places):
        if counts[place] > 1:
            raise UserError(f"{path}: {counts[place]} rows of {item.name:.80}; give it one, its labels joined by |")


def require_files(path, items):
    """Raise UserError where a tenth of the files is not there; fewer are skipped and counted."""
    missing = [item.source for item in items if not os.path.isfile(file_of(item.source))]
    if missing and 10 * len(missing) >= len(items):
        raise UserError(f"{path}: {len(missing):,} of its {len(items):,} files are not there, the first "
                        f"{str(missing[0]):.200}; paths start at the folder of the csv")
