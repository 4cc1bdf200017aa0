"""
The datasets of boxes: where in an image something is, asked label by label.

A set of few labels is asked for each of them in every image. Of a set of many, an image is asked for the labels
that it has, and for one that it has not, which its name picks: that there is none is to be learnt, too.
All are prepared by name alone; prepare/box_files.py reads their files.
"""

import hashlib
from pathlib import PurePosixPath

from data import Record
from plumbing.flags import UserError
from prepare.box_files import from_corner, gather, number, read_voc, read_yolo, to_shares
from prepare.classify import read_lines, split_by_group
from prepare.datasets import (dataset, read_csv, read_image, read_json, read_named_image, read_tar,
                              require_known)
from prepare.questions import open_folder
from tasks.boxes import ask

FEW = 4  # labels of a set that is asked for all of them in every image
SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}  # of a set without a published split


# ----------------------------------------------------------------------------- questions

def asked_labels(name, found, labels):
    """The labels that an image of this name, with {label: boxes}, is asked for, among all of a dataset's."""
    absent = [label for label in labels if label not in found]
    if len(labels) > FEW and absent:
        absent = [absent[int(hashlib.sha256(name.encode("utf-8", "replace")).hexdigest(), 16) % len(absent)]]
    return [label for label in labels if found.get(label) or label in absent]


def ask_image(name, image, found, labels, group=""):
    """Yield the Records of one image, a label each. found: {label: boxes}, as `gather` gives them."""
    for label in asked_labels(name, found, labels):
        yield Record(f"{name}/{label}", ask(label), image=image, image_name=name, type=label, group=group,
                     boxes={label: tuple(found.get(label, ()))})


def divide(found, groups):
    """{image: split}, 70 : 10 : 20 in each label, of {image: {label: boxes}} and {image: what is not divided}."""
    splits = split_by_group([groups[name] for name in found], [tuple(labels) for labels in found.values()], SHARES)
    return dict(zip(found, splits))


# ----------------------------------------------------------------------------- blood and teeth

@dataset(only_by_name=True, kind="boxes", licence="MIT", access="open", megabytes=8,
         page="https://github.com/Shenggan/BCCD_Dataset", counts={"train": 615, "validation": 261, "test": 216},
         layouts=(("BCCD/Annotations/*.xml", "BCCD/ImageSets/Main/train.txt", "BCCD/ImageSets/Main/val.txt",
                   "BCCD/ImageSets/Main/test.txt", "BCCD/JPEGImages/*.jpg"),))
def bccd(raw):
    """
    BCCD, blood smears: red and white cells and platelets; the published split.

    Some fields were labelled in part: of 328 images 12 have three boxes or fewer and many more cells.
    """
    words, folder = {"RBC": "red blood cell", "WBC": "white blood cell", "Platelets": "platelet"}, raw / "BCCD"

    def rows(names):
        for name in names:
            where = folder / f"Annotations/{name}.xml"
            *_, boxes = read_voc(where, read_named_image(folder, f"Annotations/{name}.xml"))
            yield name, "", None
            for label, box in boxes:
                require_known(f"{where}: name", label, words)
                yield name, words[label], box

    for split, file in (("train", "train"), ("validation", "val"), ("test", "test")):
        found = gather(f"bccd {split}", rows(read_lines(folder / f"ImageSets/Main/{file}.txt")))
        for name, labels in found.items():
            image = read_named_image(folder, f"JPEGImages/{name}.jpg")
            for record in ask_image(f"{name}.jpg", image, labels, words.values()):
                yield split, record


@dataset(only_by_name=True, kind="boxes", licence="CC-BY-4.0", access="open", megabytes=45, counts={},
         page="https://universe.roboflow.com/dental-uispo/-bhjcu",
         layouts=(("data/*/images/*.jpg", "data/*/labels/*.txt"),))
def dental_xray_cv(raw):
    """
    Panoramic dental films on Roboflow: cavities, fillings, impacted teeth, implants (root-filled teeth, too).

    Split: made here, by film. The published one has copies of a film, mirrored or turned, on several sides;
    a file's name before ".rf." is its film's.
    """
    names = ("cavity", "filling", "impacted tooth", "implant")
    images = [path.relative_to(raw) for path in sorted(raw.glob("data/*/images/*.jpg"))]

    def rows():
        for path in images:
            text = path.parent.with_name("labels") / f"{path.stem}.txt"
            yield path.as_posix(), "", None
            for label, box in read_yolo(raw / text, read_image(raw / text), names):
                yield path.as_posix(), label, box

    found = gather("dental_xray_cv", rows())
    films = {name: PurePosixPath(name).name.split(".rf.")[0] for name in found}
    for name, split in divide(found, films).items():
        for record in ask_image(name, read_image(raw / name), found[name], names, films[name]):
            yield split, record


# ----------------------------------------------------------------------------- chest films

def read_films(raw, names):
    """Yield (name, bytes) of ChestX-ray14's films, from its archives or unpacked; None where a film is missing."""
    left = dict.fromkeys(names)
    for archive in sorted(raw.glob("images_*.tar.gz")):
        for member, content in read_tar(archive):
            if (name := PurePosixPath(member).name) in left:
                del left[name]
                yield name, content
    unpacked = {path.name: path for path in raw.glob("images*/**/*.png")}
    for name in left:
        yield name, read_image(unpacked[name]) if name in unpacked else None


@dataset(only_by_name=True, kind="boxes", licence="no restriction, NIH asks to be named", access="open",
         megabytes=45000, page="https://nihcc.app.box.com/v/ChestXray-NIHCC", folder="cxr8",
         layouts=(("BBox_List_2017.csv", "images_*.tar.gz"), ("BBox_List_2017.csv", "images*/**/*.png")),
         counts={"train": 690, "validation": 97, "test": 197})
def nih_boxes(raw):
    """
    ChestX-ray14's 984 boxes on 880 films (Wang et al. 2017): at most one of a label in a film.

    No split was published for them: by patient, the first part of a film's name. A film is asked for what it
    has a box of, for of the rest it is not known whether it was looked for.
    """
    table = raw / "BBox_List_2017.csv"
    sides = ("Bbox [x", "y", "w", "h]")  # one name in brackets, with commas in it

    def rows():
        for row, cells in enumerate(read_csv(table, ("Image Index", "Finding Label", *sides)), 2):
            box = from_corner([number(f"{table}: row {row}", cells[side]) for side in sides])
            label = cells["Finding Label"].lower().replace("infiltrate", "infiltration")
            yield cells["Image Index"], label, to_shares(table, box, 1024, 1024)

    found = gather("nih_boxes", rows())
    patients = {name: name.split("_")[0] for name in found}
    splits = divide(found, patients)
    for name, image in read_films(raw, found):
        for record in ask_image(name, image, found[name], list(found[name]), patients[name]):
            yield splits[name], record


@dataset(only_by_name=True, kind="boxes", licence="RSNA's and Kaggle's terms, non-commercial research",
         access="an account at Kaggle", megabytes=3700, folder="rsna_pneumonia",
         page="https://www.kaggle.com/c/rsna-pneumonia-detection-challenge",
         layouts=(("stage_2_train_labels.csv", "stage_2_train_images/*.*"), ("stage_2_train_labels.csv",)),
         counts={"train": 18679, "validation": 2668, "test": 5337})
def rsna_boxes(raw):
    """
    RSNA's pneumonia challenge (Shih et al. 2019): lung opacities in 26,684 films, 6,012 of which have any.

    DICOM is not read here: convert stage_2_train_images to .png of the same names. Split: made here, a film
    alone, for the test boxes are not public and no patient is named.
    """
    table, sides = raw / "stage_2_train_labels.csv", ("x", "y", "width", "height")

    def rows():
        for row, cells in enumerate(read_csv(table, ("patientId", *sides, "Target")), 2):
            where = f"{table}: row {row}"
            require_known(f"{where}: Target", cells["Target"], ("0", "1"))
            yield cells["patientId"], "", None
            if cells["Target"] == "1":
                box = from_corner([number(where, cells[side]) for side in sides])
                yield cells["patientId"], "lung opacity", to_shares(table, box, 1024, 1024)

    found = gather("rsna_boxes", rows())
    for film, split in divide(found, {film: film for film in found}).items():
        name = f"stage_2_train_images/{film}.png"
        for record in ask_image(name, read_named_image(raw, name), found[film], ["lung opacity"]):
            yield split, record


CHESTX_LABELS = ("Atelectasis", "Calcification", "Consolidation", "Effusion", "Emphysema", "Fibrosis", "Fracture",
                 "Mass", "Nodule", "Pneumothorax")
CHESTX = {"only_by_name": True, "kind": "boxes", "access": "open", "megabytes": 2000,
          "page": "https://github.com/Deepwise-AILab/ChestX-Det-Dataset"}


def read_chestx(raw, tables, labels):
    """(split, Record)s of ChestX-Det's tables {split: (name, folder of its films)}, corners in 1024 pixels."""
    def rows(path):
        for place, row in enumerate(read_json(path, [{"file_name": str, "syms": [str], "boxes": [[str]]}]), 1):
            where = f"{path}: film {place}"
            if len(row["syms"]) != len(row["boxes"]) or any(len(box) != 4 for box in row["boxes"]):
                raise UserError(f"{where}: {len(row['syms'])} labels and {len(row['boxes'])} boxes, of 4 numbers each, "
                                "are not as many; fetch the file again")
            yield row["file_name"], "", None
            for label, box in zip(row["syms"], row["boxes"]):
                require_known(f"{where}: label", label, labels)
                box = [number(where, edge) for edge in box]
                yield row["file_name"], label.lower(), to_shares(where, box, 1024, 1024)

    for split, (table, folder) in tables.items():
        found = gather(table, rows(raw / table))
        with open_folder(raw / folder) as read:
            for name, boxes in found.items():
                for record in ask_image(f"{folder}/{name}", read(name), boxes, [label.lower() for label in labels]):
                    yield split, record


@dataset(**CHESTX, licence="none stated", counts={"train": 7369, "test": 1508},
         layouts=(("train.json", "test.json"),))
def chestx_det10(raw):
    """ChestX-Det10 (Liu et al. 2020): boxes of ten findings in 3,543 of ChestX-ray14's films; the published split."""
    yield from read_chestx(raw, {"train": ("train.json", "train_data"), "test": ("test.json", "test_data")},
                           CHESTX_LABELS)


@dataset(**CHESTX, licence="Apache-2.0", counts={"train": 8190, "test": 1725},
         layouts=(("ChestX_Det_train.json", "ChestX_Det_test.json"),))
def chestx_det(raw):
    """ChestX-Det (Lian et al. 2021): the films of ChestX-Det10 and 35 more, thirteen findings, some boxes moved."""
    tables = {split: (f"ChestX_Det_{split}.json", f"{split}_data") for split in ("train", "test")}
    yield from read_chestx(raw, tables, (*CHESTX_LABELS, "Cardiomegaly", "Diffuse Nodule", "Pleural Thickening"))
