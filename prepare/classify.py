"""
The classification benchmarks: an image, its labels, and the split it belongs to.

Where a benchmark has an official split, that is used. A part that is missing is made by patient,
scan or study, so that no two pictures of one of them are on different sides; each docstring says
where its split comes from. None of them can be fetched without a person: they are put into their
folders by hand. megabytes=0 means that the owner states no size.
"""

import contextlib
import hashlib
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import Record
from formats.frames import decode_picture
from plumbing.flags import UserError
from plumbing.pixels import FORMATS
from prepare.datasets import (DATASETS, count_from, dataset, find_folder, open_zip, read_csv, read_image,
                              read_json, read_member, read_named_image, read_tar, refuse_damage)
from prepare.looks import FINGERPRINT, SIDE, alike, fingerprint

HELD_OUT = {"train": 0.9, "validation": 0.1}  # of a training part that has no validation split


# ----------------------------------------------------------------------------- splits

def split_by_group(groups, labels, shares, seed=0):
    """
    Each item's split: a pure function of the arguments, whatever the order of the items.

    groups: each item's patient, scan or study, which is never divided; labels: each item's tuple
    of class names; shares: {split: share of the items}, near which each class is divided too.
    """
    counts, totals, filled = {}, Counter(), {split: Counter() for split in shares}
    for group, names in zip(groups, labels, strict=True):
        present = Counter({None: 1}) + Counter(set(names))  # None counts the items themselves
        counts.setdefault(str(group), Counter()).update(present)
        totals.update(present)

    def turn(group):
        """Groups with the rarest class first, then large ones: what is common evens out the rest."""
        drawn = hashlib.sha256(f"{seed} {group}".encode()).digest()
        return min(totals[name] for name in counts[group]), -counts[group][None], drawn

    def cost(split):
        """How much the group adds to a split's chi-square distance from its share of each class."""
        return sum(count * (count + 2 * (filled[split][name] - shares[split] * totals[name]))
                   / totals[name] for name, count in added) / shares[split]

    chosen = {}
    for group in sorted(counts, key=turn):
        added = sorted(counts[group].items(), key=str)  # sums of floats depend on their order
        chosen[group] = min(shares, key=cost)
        filled[chosen[group]].update(counts[group])
    return [chosen[str(group)] for group in groups]


def group_alike(sources):
    """For each picture (Path, bytes or Frame) the number of the first of those that it is alike, and that they are."""
    def look(source):
        try:
            return np.frombuffer(fingerprint(decode_picture(source)), FINGERPRINT)["look"]
        except Exception:  # each decoder has its own ways to fail on a broken file
            return np.zeros((1, SIDE, SIDE), np.uint8)  # like no other

    with ThreadPoolExecutor() as pool:  # Pillow lets go of the interpreter lock
        seen = tqdm(pool.map(look, sources), "which images are alike", len(sources), unit=" images", leave=False,
                    disable=len(sources) < 200)
        looks = np.concatenate([np.zeros((0, SIDE, SIDE), np.uint8), *seen])
    group = np.arange(len(sources))
    for one, other in alike(looks, looks):
        group[group == group[other]] = group[one]
    return group.tolist()


def read_lines(path):
    """The lines of a list, without those that are empty."""
    with refuse_damage(path, "list"):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise UserError(f"{path}: empty; fetch it again")
    return lines


def require_zero(where, numbers, size):
    """Refuse labels, as texts, that do not count `size` classes from 0, as the published ones do."""
    if "0" not in numbers and count_from(f"{where}: its labels", numbers, size):
        raise UserError(f"{where}: its labels count {size} classes from 1, the published ones from 0; which "
                        "class each number means is not known")


# ----------------------------------------------------------------------------- chest films

@dataset(kind="classification", licence="no restriction, NIH asks to be named", access="open",
         megabytes=45000, page="https://nihcc.app.box.com/v/ChestXray-NIHCC",
         layouts=(("Data_Entry_2017*.csv", "train_val_list.txt", "test_list.txt", "images_*.tar.gz"),
                  ("Data_Entry_2017*.csv", "train_val_list.txt", "test_list.txt",
                   "images*/**/00000001_000.png")),
         counts={"train": 77872, "validation": 8652, "test": 25596},
         classes=("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule",
                  "Pneumonia", "Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis",
                  "Pleural_Thickening", "Hernia"), multi_label=True)
def cxr8(raw):
    """
    NIH ChestX-ray14 (Wang et al. 2017), its archives read in place or unpacked; multi-label.

    Split: the official lists, the patients of train_val_list.txt divided into train and validation.
    """
    table = (sorted(raw.glob("Data_Entry_2017*.csv")) or [raw / "Data_Entry_2017.csv"])[-1]
    findings = {row["Image Index"]: row["Finding Labels"].split("|")
                for row in read_csv(table, ("Image Index", "Finding Labels"))}
    training, test = read_lines(raw / "train_val_list.txt"), read_lines(raw / "test_list.txt")
    for path, names in (("train_val_list.txt", training), ("test_list.txt", test)):
        for name in names:
            if name not in findings:
                raise UserError(f"{raw / path}: {name[:80]!r} has no row in {table}; fetch them again")
    labels = {name: tuple(label for label in findings[name] if label != "No Finding")
              for name in training + test}
    patients = [name.split("_")[0] for name in training]
    divided = split_by_group(patients, [labels[name] for name in training], HELD_OUT)
    splits = dict(zip(training, divided)) | dict.fromkeys(test, "test")
    for archive in sorted(raw.glob("images_*.tar.gz")):
        for member, content in read_tar(archive):
            name = PurePosixPath(member).name
            if name in splits:
                yield splits.pop(name), Record(name[:-4], image=content, image_name=name,
                                               labels=labels[name])
    unpacked = {path.name: path for path in raw.glob("images*/**/*.png")}
    for name, split in splits.items():  # what no archive holds
        image = read_image(unpacked[name]) if name in unpacked else None
        yield split, Record(name[:-4], image=image, image_name=name, labels=labels[name])


@dataset(kind="classification", licence="CC-BY-4.0", access="open", megabytes=1150,
         page="https://data.mendeley.com/datasets/rscbjbr9sj",
         layouts=(("ChestXRay2017.zip",), ("ZhangLabData.zip",),
                  ("chest_xray/train/*/*.jpeg", "chest_xray/test/*/*.jpeg"),
                  ("CellData/chest_xray/train/*/*.jpeg", "CellData/chest_xray/test/*/*.jpeg")),
         counts={"train": 4709, "validation": 523, "test": 624}, classes=("normal", "pneumonia"))
def mendeley_cxray(raw):
    """
    Chest films of children (Kermany et al. 2018), its archive read in place or unpacked.

    Split: the official test; train divided by patient. The 16 films that a repackaging calls val
    were taken from train and go back to it. Bacterial and viral films of personN stay together.
    """
    form = re.compile(r"(?:CellData/)?chest_xray/(train|val|test)/([^/]+)/([^/.][^/]*)\.jpeg")
    archives = [raw / name for name in ("ChestXRay2017.zip", "ZhangLabData.zip")
                if (raw / name).is_file()]
    with open_zip(archives[0]) if archives else contextlib.nullcontext() as archive:
        if archive:
            find_folder(archive, "chest_xray/", "CellData/chest_xray/")
        names = archive.namelist() if archive else [
            path.relative_to(raw).as_posix() for path in raw.glob("**/chest_xray/*/*/*.jpeg")]
        films = [match for match in map(form.fullmatch, sorted(names)) if match]
        training = [film for film in films if film[1] != "test"]
        patients = [re.search(r"person\d+|(?:NORMAL2-)?IM-\d+|\d+|$", film[3])[0] or film[3]
                    for film in training]
        splits = dict(zip([film[0] for film in training], split_by_group(
            patients, [(film[2].lower(),) for film in training], HELD_OUT)))
        for film in films:
            image = read_member(archive, film[0]) if archive else read_image(raw / film[0])
            yield splits.get(film[0], "test"), Record(film[3], image=image, image_name=film[0],
                                                      labels=(film[2].lower(),))


# ----------------------------------------------------------------------------- MedFMC

def read_medfmc(raw, width, labels_of, group_of):
    """
    (split, Record)s of a MedFMC subset, whose lists give each image's name and `width` numbers.

    Split: the paper's, fewshot-pool.txt (divided by group) to train on and test.txt. The names
    hold spaces and dots, and none says whether its image is a .png or a .jpg.
    """
    form = re.compile(rf"(.+?)(?:\.png|\.jpg)?[ \t]+(-?\d+(?:[ ,]-?\d+){{{width - 1}}})")
    rows = {}  # file -> [(name, labels)]
    for file in ("fewshot-pool.txt", "test.txt"):
        matches = [(line, form.fullmatch(line)) for line in read_lines(raw / file)]
        for line, match in matches:
            if not match:
                raise UserError(f"{raw / file}: {line[:80]!r} is not a name and {width} numbers")
        numbers = [re.split("[ ,]", match[2]) for _, match in matches]
        require_zero(raw / file, [number for row in numbers for number in row], 2)
        rows[file] = [(match[1], labels_of(row)) for (_, match), row in zip(matches, numbers)]
    pool = rows["fewshot-pool.txt"]
    splits = split_by_group([group_of(name) for name, _ in pool],
                            [labels for _, labels in pool], HELD_OUT)
    splits += ["test"] * len(rows["test.txt"])
    images = {path.stem: path for path in sorted(raw.glob("images/*"))}
    for split, (name, labels) in zip(splits, pool + rows["test.txt"], strict=True):
        path = images.get(name)
        yield split, Record(name, image=path and read_image(path), labels=labels,
                            image_name=path.name if path else name)


def positive(classes, numbers):
    """The classes whose number is 1; a number that is neither 0 nor 1 stands for itself."""
    return tuple(name if number == "1" else number
                 for name, number in zip(classes, numbers) if number != "0")


MEDFMC = {"kind": "classification", "licence": "Apache-2.0 (as its page says)", "access": "open",
          "megabytes": 0, "layouts": (("fewshot-pool.txt", "test.txt", "images/*"),),
          "page": "https://doi.org/10.6084/m9.figshare.c.6476047.v1 (images) and "
                  "https://github.com/wllfore/MedFMC_fewshot_baseline (lists)"}


@dataset(**MEDFMC, multi_label=True, counts={"train": 881, "validation": 98, "test": 3869},
         classes=("pleural_effusion", "nodule", "pneumonia", "cardiomegaly", "hilar_enlargement",
                  "fracture_old", "fibrosis", "aortic_calcification", "tortuous_aorta",
                  "thickened_pleura", "TB", "pneumothorax", "emphysema", "atelectasis",
                  "calcification", "pulmonary_edema", "increased_lung_markings",
                  "elevated_diaphragm", "consolidation"))
def med_fmc_chest(raw):
    """ChestDR of MedFMC (Wang et al. 2023), multi-label; split: see read_medfmc, one film a patient."""
    classes = DATASETS["med_fmc_chest"].classes
    yield from read_medfmc(raw, 19, lambda numbers: positive(classes, numbers), lambda name: name)


@dataset(**MEDFMC, counts={"train": 1751, "validation": 196, "test": 8062},
         classes=("no_tumor", "tumor"))
def med_fmc_colon(raw):
    """
    ColonPath of MedFMC (Wang et al. 2023), patches of slides; split: see read_medfmc, by scan.

    The official test shares no region with the pool, but 58 scans, with 1,975 of its 8,062 patches.
    """
    names = {"0": "no_tumor", "1": "tumor"}
    yield from read_medfmc(raw, 1, lambda numbers: (names.get(numbers[0], numbers[0]),),
                           lambda name: name.split("-lv1-")[0])


@dataset(**MEDFMC, multi_label=True, counts={"train": 816, "validation": 113, "test": 2936},
         classes=("ulcer", "erosion", "polyp", "tumor"))
def med_fmc_endo(raw):
    """
    Endo of MedFMC (Wang et al. 2023), colonoscopies, multi-label; split: see read_medfmc, by study.

    The challenge's own test list has no tumor at all; the paper's, used here, has 28.
    """
    classes = DATASETS["med_fmc_endo"].classes
    yield from read_medfmc(raw, 4, lambda numbers: positive(classes, numbers), lambda name: name[:18])


# ----------------------------------------------------------------------------- breast

@dataset(kind="classification", licence="CC-BY-4.0 (of its article)", access="open", megabytes=0,
         page="https://doi.org/10.1016/j.dib.2019.104863",
         layouts=(("Dataset_BUSI_with_GT/benign/*.png", "Dataset_BUSI_with_GT/malignant/*.png",
                   "Dataset_BUSI_with_GT/normal/*.png"),),
         counts={"train": 546, "validation": 78, "test": 156},
         classes=("normal", "benign", "malignant"))
def busi(raw):
    """
    BUSI, breast ultrasound (Al-Dhabyani et al. 2020).

    Split: made here, 70 : 10 : 20 within each class. No patient is named, but images that are alike
    stay together: 320 of 780 are like another, eight groups of them published under two classes.
    """
    paths = [path for path in sorted((raw / "Dataset_BUSI_with_GT").glob("*/*.png"))
             if "_mask" not in path.stem]
    splits = split_by_group(group_alike(paths), [(path.parent.name,) for path in paths],
                            {"train": 0.7, "validation": 0.1, "test": 0.2})
    for path, split in zip(paths, splits):
        yield split, Record(path.stem, image=read_image(path), labels=(path.parent.name,),
                            image_name=f"{path.parent.name}/{path.name}")


def read_cbis_ddsm(raw):
    """
    (split, row, label) of each abnormality of CBIS-DDSM, from its four tables.

    Split: the official one, train divided by patient. Its masses and its calcifications were
    divided apart, so that 31 patients are on both sides: their training rows are left out.
    """
    columns = ("patient_id", "left or right breast", "image view", "pathology", "image file path",
               "cropped image file path", "ROI mask file path")
    names = {"BENIGN": "benign", "BENIGN_WITHOUT_CALLBACK": "benign", "MALIGNANT": "malignant"}
    tables = {"train": [], "test": []}
    for split, rows in tables.items():
        for kind in ("mass", "calc"):
            table = raw / f"csv/{kind}_case_description_{split}_set.csv"
            rows += [{column: row[column].strip() for column in columns}  # paths end in newlines
                     for row in read_csv(table, columns)]
    tested = {row["patient_id"] for row in tables["test"]}
    training = [row for row in tables["train"] if row["patient_id"] not in tested]
    labels = [names.get(row["pathology"], row["pathology"]) for row in training + tables["test"]]
    splits = split_by_group([row["patient_id"] for row in training],
                            [(label,) for label in labels[:len(training)]], HELD_OUT)
    yield from zip(splits + ["test"] * len(tables["test"]), training + tables["test"], labels)


def series_images(raw, *paths):
    """The images in the series that the tables' paths lie in: jpeg/<series>/*.jpg."""
    series = sorted({PurePosixPath(path).parent.name for path in paths if path})
    return [image for name in series for image in sorted((raw / "jpeg" / name).glob("*.jpg"))]


def film_record(raw, name, image, path, labels):
    """A Record of an image, or, where it is missing, of the series in which the table has it."""
    series = f"jpeg/{PurePosixPath(path).parent.name}"
    return Record(name, image=image and read_image(image), labels=labels,
                  image_name=image.relative_to(raw).as_posix() if image else series)


def pixels_of(path):
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.width * image.height
    except Exception:  # each decoder has its own ways to fail on a broken file
        return 0  # so that it is chosen, and counted as unreadable


CBIS_DDSM = {"kind": "classification", "licence": "CC-BY-3.0", "access": "open", "megabytes": 6000,
             "page": "https://www.kaggle.com/datasets/awsaf49/cbis-ddsm-breast-cancer-image-dataset",
             "folder": "cbis_ddsm",
             "layouts": (("csv/mass_case_description_train_set.csv",
                          "csv/mass_case_description_test_set.csv",
                          "csv/calc_case_description_train_set.csv",
                          "csv/calc_case_description_test_set.csv", "jpeg/*/*.jpg"),)}


def crop_record(raw, row, label):
    """The Record of an abnormality's crop."""
    path = row["cropped image file path"]
    # Crops and masks are mixed up here and there; but a mask is as large as the whole film.
    images = series_images(raw, path, row["ROI mask file path"])
    crop = min(images, key=pixels_of) if len(images) > 1 else None
    return film_record(raw, path.split("/")[0], crop, path, (label,))


@dataset(**CBIS_DDSM, counts={"train": 2503, "validation": 278, "test": 704},
         classes=("benign", "malignant"))
def cbis_ddsm(raw):
    """
    CBIS-DDSM (Lee et al. 2017), the crop of each abnormality; split: see read_cbis_ddsm.

    Benign without callback is benign.
    """
    for split, row, label in read_cbis_ddsm(raw):
        yield split, crop_record(raw, row, label)


@dataset(**CBIS_DDSM, only_by_name=True, counts={"train": 2503, "validation": 278, "test": 704},
         classes=("benign", "benign_without_callback", "malignant"))
def cbis_ddsm_three(raw):
    """CBIS-DDSM's crops in the same split, benign without callback being a class of its own."""
    for split, row, _ in read_cbis_ddsm(raw):
        yield split, crop_record(raw, row, row["pathology"].lower())


@dataset(**CBIS_DDSM, only_by_name=True, counts={"train": 2119, "validation": 237, "test": 641},
         classes=("benign", "malignant"))
def cbis_ddsm_whole(raw):
    """
    CBIS-DDSM (Lee et al. 2017), whole films; split: see read_cbis_ddsm.

    A film with any malignant abnormality is malignant.
    """
    films = {}  # name -> (split, path, labels of its abnormalities)
    for split, row, label in read_cbis_ddsm(raw):
        name = "_".join((row["patient_id"], row["left or right breast"], row["image view"]))
        films.setdefault(name, (split, row["image file path"], set()))[2].add(label)
    for name, (split, path, labels) in films.items():
        film = next(iter(series_images(raw, path)), None)
        worst = ("malignant",) if "malignant" in labels else tuple(sorted(labels))
        yield split, film_record(raw, name, film, path, worst)


# ----------------------------------------------------------------------------- colon

@dataset(kind="classification", licence="non-commercial, no redistribution",
         access="non-commercial use", megabytes=0, page="https://bupt-ai-cz.github.io/HSA-NRL",
         layouts=(("chaoyang-data/train.json", "chaoyang-data/test.json", "chaoyang-data/train/*.JPG",
                   "chaoyang-data/test/*.JPG"),),
         counts={"train": 3614, "validation": 407, "test": 2139},
         classes=("normal", "serrated", "adenocarcinoma", "adenoma"))
def chaoyang(raw):
    """Chaoyang, patches of colon slides (Zhu et al. 2021); split: official, train divided by slide."""
    folder, names = raw / "chaoyang-data", dict(zip("0123", DATASETS["chaoyang"].classes))
    tables = {split: read_json(folder / f"{split}.json", [("name", "label")]) for split in ("train", "test")}
    require_zero(folder, [row["label"] for table in tables.values() for row in table], 4)
    rows = {split: [(row["name"], (names.get(row["label"], row["label"]),)) for row in table]
            for split, table in tables.items()}
    splits = split_by_group([name.split("-IMG")[0] for name, _ in rows["train"]],
                            [labels for _, labels in rows["train"]], HELD_OUT)
    splits += ["test"] * len(rows["test"])
    for split, (name, labels) in zip(splits, rows["train"] + rows["test"]):
        yield split, Record(PurePosixPath(name).stem, image=read_named_image(folder, name), image_name=name,
                            labels=labels)
