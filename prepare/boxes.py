"""
The datasets of boxes: where in an image something is, asked label by label.

A set of few labels is asked for each of them in every image. Of a set of many, an image is asked for the labels
that it has, and for one that it has not, which its name picks: that there is none is to be learnt, too.
All are prepared by name alone; prepare/box_files.py reads their files. megabytes=0 means that no size is known.
"""

import functools
import hashlib
import io
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import PurePosixPath

import numpy as np
from PIL import Image

from data import Record
from plumbing.flags import UserError
from plumbing.pixels import FORMATS, decode
from prepare.box_files import (from_corner, gather, image_size, number, read_coco, read_voc, read_yolo,
                               to_shares)
from prepare.classify import group_alike, read_lines, split_by_group
from prepare.datasets import (NO_NAME, dataset, parse_json, read_csv, read_image, read_json,
                              read_named_image, read_tar, require_known)
from prepare.questions import open_folder
from tasks.boxes import ask, iou

FEW = 4  # labels of a set that is asked for all of them in every image
SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}  # of a set without a published split
AGREE = 0.5  # IoU above which two readers' boxes are of one finding
SPECK = 0.01  # of a mask's largest patch: what is smaller was left by a hand that slipped
LARGEST_MASK = 1 << 24  # pixels


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

@dataset(only_by_name=True, kind="boxes", licence="MIT", access="open", megabytes=0,
         page="https://github.com/Shenggan/BCCD_Dataset", counts={"train": 615, "validation": 261, "test": 216},
         layouts=(("BCCD/Annotations/*.xml", "BCCD/ImageSets/Main/train.txt", "BCCD/ImageSets/Main/val.txt",
                   "BCCD/ImageSets/Main/test.txt", "BCCD/JPEGImages/*.jpg"),))
def bccd(raw):
    """
    BCCD, blood smears: red and white cells and platelets; the published split.

    Some fields were labelled in part: of 328 images 12 have three boxes or fewer and many more cells.
    """
    words, folder = {"RBC": "red blood cell", "WBC": "white blood cell", "Platelets": "platelet"}, raw / "BCCD"

    def rows(path):
        for name in read_lines(path):
            where, content = folder / f"Annotations/{name}.xml", read_named_image(folder, f"Annotations/{name}.xml")
            if content is None:
                raise UserError(f"{path}: {name!r:.80} has no file in {where.parent}; fetch both again")
            *_, boxes = read_voc(where, content)
            yield name, "", None
            for label, box in boxes:
                require_known(f"{where}: name", label, words)
                yield name, words[label], box

    for split, file in (("train", "train"), ("validation", "val"), ("test", "test")):
        found = gather(f"bccd {split}", rows(folder / f"ImageSets/Main/{file}.txt"))
        for name, labels in found.items():
            image = read_named_image(folder, f"JPEGImages/{name}.jpg")
            for record in ask_image(f"{name}.jpg", image, labels, words.values()):
                yield split, record


@dataset(only_by_name=True, kind="boxes", licence="CC-BY-4.0", access="open", megabytes=0, counts={},
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
         access="an account at Kaggle", megabytes=0, folder="rsna_pneumonia",
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
CHESTX = {"only_by_name": True, "kind": "boxes", "access": "open", "megabytes": 0,
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
        found = gather(f"{raw.name}/{table}", rows(raw / table))
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


def merge_readers(marked):
    """
    The boxes that at least two readers agree on, of [(reader, box)] for one label in one image.

    A box joins the mean box with which its IoU is largest, if that is above AGREE and has no box of its reader;
    else it begins another. The means of two and more are kept, in the order of their first boxes.
    """
    groups = []  # of {reader: box}
    for reader, box in marked:
        means = np.array([np.mean(list(group.values()), 0) for group in groups]).reshape(-1, 4)
        gains = iou(np.array([box]), means)[0] * [reader not in group for group in groups]
        if gains.size and gains.max() > AGREE:
            groups[gains.argmax()][reader] = box
        else:
            groups.append({reader: box})
    return [tuple(np.mean(list(group.values()), 0).tolist()) for group in groups if len(group) > 1]


def read_vindr(raw, table, sizes):
    """
    {image: {label: boxes}} of a table of VinDr-CXR. Where it names readers, their boxes are merged; a label on
    which no two agree stays without any. sizes: image -> (width, height) of the film that was marked.
    """
    named = "rad_id" in next(iter(read_csv(table, ())), ())
    sides, marked = ("x_min", "y_min", "x_max", "y_max"), defaultdict(lambda: defaultdict(list))
    for row, cells in enumerate(read_csv(table, ("image_id", "class_name", *sides, *["rad_id"] * named)), 2):
        labels, label = marked[cells["image_id"]], cells["class_name"].strip().lower()
        size = sizes(cells["image_id"])
        if label != "no finding" and cells["x_min"].strip() and size:
            where = f"{table}: row {row}"
            box = to_shares(where, [number(where, cells[side]) for side in sides], *size)
            if max(box) > 1.02:
                raise UserError(f"{where}: a box beyond its film of {size[0]} x {size[1]} pixels; if the "
                                "films were made smaller, put train_meta.csv with their first sizes beside it")
            labels[label].append((cells.get("rad_id", ""), box))
    if not named:  # a consensus already
        return gather(table.name, ((image, label, box) for image, labels in marked.items() for label, boxes in
                                   [("", [("", None)]), *labels.items()] for _, box in boxes))
    return {image: {label: merge_readers(boxes) for label, boxes in labels.items()} for image, labels in marked.items()}


@dataset(only_by_name=True, kind="boxes", licence="PhysioNet Credentialed Health Data License; Kaggle: its rules",
         access="PhysioNet credential, or an account at Kaggle", megabytes=0, counts={},
         page="https://physionet.org/content/vindr-cxr/1.0.0 or "
              "https://www.kaggle.com/c/vinbigdata-chest-xray-abnormalities-detection",
         layouts=(("annotations/annotations_train.csv", "annotations/annotations_test.csv"), ("train.csv",)))
def vindr_cxr(raw):
    """
    VinDr-CXR (Nguyen et al. 2022): 22 findings in 15,000 films of three readers each, merged by merge_readers,
    and 3,000 test films with the consensus of five. A film is not asked for a label that one reader alone marked.

    DICOM is not read here: convert the films to train/ and test/ of the same names and .png, in their full size,
    or with Kaggle's train_meta.csv. Kaggle's table has no test films: 70 : 10 : 20, for no patient is named.
    """
    def read_film(split, name):
        return read_named_image(raw, f"{split}/{name}.png")

    meta = raw / "train_meta.csv"
    known = {row["image_id"]: (number(meta, row["dim1"]), number(meta, row["dim0"]))
             for row in read_csv(meta, ("image_id", "dim0", "dim1"))} if meta.is_file() else {}
    whole, tables = raw / "annotations", {}
    for split in ("train", "test") if whole.is_dir() else ("train",):
        path = whole / f"annotations_{split}.csv" if whole.is_dir() else raw / "train.csv"
        sizes = functools.cache(lambda name, split=split: known.get(name) or image_size(read_film(split, name)))
        tables[split] = read_vindr(raw, path, sizes)
    labels = sorted({label for found in tables.values() for boxes in found.values() for label in boxes})
    for split, found in tables.items():
        made = {} if whole.is_dir() else divide(found, {name: name for name in found})
        for name, boxes in found.items():
            for record in ask_image(f"{split}/{name}.png", read_film(split, name), boxes, labels):
                yield made.get(name, split), record


@dataset(only_by_name=True, kind="boxes", licence="PhysioNet Credentialed Health Data License",
         access="PhysioNet credential and data use agreement", megabytes=1, folder="mimic_cxr", counts={},
         page="https://physionet.org/content/ms-cxr, its JSON beside the files/ of MIMIC-CXR-JPG",
         layouts=(("MS_CXR_Local_Alignment_v*.json",),))
def ms_cxr(raw):
    """
    MS-CXR (Boecking et al. 2022): a phrase of a report and where it is in a film of MIMIC-CXR; type: its finding.

    Split: made here, by patient.
    """
    path = sorted(raw.glob("MS_CXR_Local_Alignment_v*.json"))[-1:] or [raw / "MS_CXR_Local_Alignment_v1.0.0.json"]
    images, rows = read_coco(path[0], "path", "label_text")
    findings = {(images[image][0], phrase): finding for image, finding, phrase, _ in rows}
    found = gather("ms_cxr", ((images[image][0], phrase, box) for image, _, phrase, box in rows))
    patients = {name: next((part for part in name.split("/") if part[:1] == "p" and len(part) > 3), name)
                for name in found}
    for name, split in divide(found, patients).items():
        image = read_named_image(raw, name or NO_NAME)
        for record in ask_image(name or NO_NAME, image, found[name], list(found[name]), patients[name]):
            yield split, replace(record, type=findings[name, record.type].lower())


# ----------------------------------------------------------------------------- CT and several organs

def window(content, low, high):
    """A slice of DeepLesion's, of 16 bits, 32768 being 0 Hounsfield units, as a PNG: low is black, high is white."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            grey = (np.asarray(image, np.float32) - 32768 - low) / max(high - low, 1)
        stream = io.BytesIO()
        Image.fromarray((np.clip(grey, 0, 1) * 255 + 0.5).astype(np.uint8)).save(stream, "PNG")
        return stream.getvalue()
    except Exception:  # each decoder has its own ways to fail on a broken file, which is counted as unreadable
        return content


@dataset(only_by_name=True, kind="boxes", licence="no restriction, NIH asks to be named", access="open",
         megabytes=0, page="https://nihcc.app.box.com/v/DeepLesion", counts={},
         layouts=(("DL_info.csv", "Images_png/*/*.png"), ("DL_info.csv",)))
def deeplesion(raw):
    """
    DeepLesion (Yan et al. 2018): lesions in CT slices, shown in the window of the slice's first row; the split is
    the published one. A box has 5 pixels on each side of the measured diameters, so it is never tight.
    """
    table, splits = raw / "DL_info.csv", {"1": "train", "2": "validation", "3": "test"}
    about = {}  # slice -> (split, patient, low, high)

    def rows():
        for row, cells in enumerate(read_csv(table, ("File_name", "Patient_index", "Bounding_boxes", "Image_size",
                                                     "DICOM_windows", "Train_Val_Test")), 2):
            where = f"{table}: row {row}"
            box, size, levels = ([number(where, cell) for cell in cells[name].split(",")]
                                 for name in ("Bounding_boxes", "Image_size", "DICOM_windows"))
            if (len(box), len(size), len(levels)) != (4, 2, 2):
                raise UserError(f"{where}: its box, size and window have {len(box)}, {len(size)} and {len(levels)} "
                                "numbers, not 4, 2 and 2; fetch the file again")
            require_known(f"{where}: Train_Val_Test", cells["Train_Val_Test"], splits)
            about.setdefault(cells["File_name"], (splits[cells["Train_Val_Test"]], cells["Patient_index"], *levels))
            yield cells["File_name"], "lesion", to_shares(where, box, *size)

    for name, boxes in gather("deeplesion", rows()).items():
        split, patient, low, high = about[name]
        folder, _, file = name.rpartition("_")
        content = read_named_image(raw, f"Images_png/{folder}/{file}")
        image = content and window(content, low, high)
        for record in ask_image(name, image, boxes, ["lesion"] * bool(boxes["lesion"]), f"patient {patient}"):
            yield split, record


@dataset(only_by_name=True, kind="boxes", licence="CC-BY-4.0", access="open", megabytes=216, folder="slake", counts={},
         page="https://huggingface.co/datasets/BoKelvin/SLAKE or https://www.med-vqa.com/slake",
         hub="BoKelvin/SLAKE", hub_files=("train.json", "validat*.json", "test.json", "imgs.zip"),
         layouts=(("train.json", "validat*.json", "test.json", "imgs.zip"),
                  ("train.json", "validat*.json", "test.json", "imgs/*/detection.json")))
def slake_boxes(raw):
    """SLAKE's organs and lesions (Liu et al. 2021), each image in the split of its English questions."""
    splits, found, sizes = {}, {}, {}
    for split, pattern in (("train", "train.json"), ("validation", "validat*.json"), ("test", "test.json")):
        for path in sorted(raw.glob(pattern)):
            for row in read_json(path, [("img_name", "q_lang")]):
                if row["q_lang"] == "en":
                    splits.setdefault(row["img_name"] or NO_NAME, split)

    with open_folder(raw / "imgs") as read:
        def rows():
            for name in splits:
                size, file = image_size(read(name)), f"{name.rpartition('/')[0]}/detection.json"
                content, where = read(file), f"{raw / 'imgs'}/{file:.120}"
                yield name, "", None
                if content is None or size is None or content.strip() == b"[]":
                    sizes[name] = size if content is not None else None
                    continue
                sizes[name] = size
                for entry in parse_json(where, content, [dict]):
                    for label, box in entry.items():
                        if not isinstance(box, list) or len(box) != 4:
                            raise UserError(f"{where}: {label!r:.40} has no four numbers; fetch the file again")
                        box = from_corner([number(where, value) for value in box])
                        yield name, " ".join(label.lower().split()), to_shares(where, box, *size)

        found = gather("slake_boxes", rows())
        labels = sorted({label for boxes in found.values() for label in boxes})
        for name, boxes in found.items():
            for record in ask_image(name, read(name) if sizes[name] else None, boxes, labels):
                yield splits[name], record


# ----------------------------------------------------------------------------- breast

def bound_patches(mask):
    """(pixels, (x1, y1, x2, y2)) of each patch of a mask (H, W), joined along sides or corners; x2, y2 beyond it."""
    patches, roots, above = [], [], []  # [pixels, x1, y1, x2, y2] and its patch's number; runs of the line before

    def root(place):
        while roots[place] != place:
            roots[place] = place = roots[roots[place]]
        return place

    for y, line in enumerate(mask):
        edges = np.flatnonzero(np.diff(np.pad(line.astype(np.int8), 1)))
        runs, first = [], 0
        for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist()):
            mine = len(patches)
            patches.append([end - begin, begin, y, end, y + 1])
            roots.append(mine)
            while first < len(above) and above[first][1] < begin:
                first += 1
            for other in above[first:]:
                if other[0] > end:
                    break
                one, two = sorted((root(other[2]), root(mine)))
                if one != two:
                    roots[two], (a, b) = one, (patches[one], patches[two])
                    patches[one] = [a[0] + b[0], min(a[1], b[1]), min(a[2], b[2]), max(a[3], b[3]), max(a[4], b[4])]
            runs.append((begin, end, mine))
        above = runs
    return [(patches[n][0], tuple(patches[n][1:])) for n in range(len(patches)) if root(n) == n]


def bound_mask(content):
    """The boxes, in shares, around the white patches of a mask's file, without specks; none of an unreadable one."""
    try:
        white = np.asarray(decode(content, 0).convert("L")) > 127
    except Exception:  # each decoder has its own ways to fail on a broken file
        return []
    patches, (height, width) = bound_patches(white) if white.size <= LARGEST_MASK else [], white.shape
    least = SPECK * max((pixels for pixels, _ in patches), default=0)
    return [(x1 / width, y1 / height, x2 / width, y2 / height)
            for pixels, (x1, y1, x2, y2) in patches if pixels >= least]


@dataset(only_by_name=True, kind="boxes", licence="CC-BY-4.0 (of its article)", access="open", megabytes=0,
         page="https://doi.org/10.1016/j.dib.2019.104863", folder="busi",
         layouts=(("Dataset_BUSI_with_GT/benign/*_mask*.png", "Dataset_BUSI_with_GT/malignant/*_mask*.png"),),
         counts={"train": 546, "validation": 78, "test": 156})
def busi_boxes(raw):
    """
    BUSI, breast ultrasound (Al-Dhabyani et al. 2020): the bounds of the lesions' masks, of which an image may
    have several. Split: that of the dataset busi.
    """
    paths = [path for path in sorted((raw / "Dataset_BUSI_with_GT").glob("*/*.png")) if "_mask" not in path.stem]
    splits = split_by_group(group_alike(paths), [(path.parent.name,) for path in paths], SHARES)

    for path, split in zip(paths, splits):
        name, image = f"{path.parent.name}/{path.name}", read_image(path)
        masks = [read_image(mask) for mask in sorted(path.parent.glob("*_mask*.png"))
                 if re.fullmatch(re.escape(path.stem) + r"_mask(_\d+)?", mask.stem)]
        boxes = tuple(box for mask in masks for box in bound_mask(mask))
        known = path.parent.name == "normal" or boxes  # without its mask: an empty answer, and counted as one
        yield split, Record(name, ask("lesion"), image=image, image_name=name, type="lesion",
                            boxes={"lesion": boxes} if known else None)
