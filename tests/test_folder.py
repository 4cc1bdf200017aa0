"""A user's own folder or csv of images: prepared without code, refused in one line, never read twice."""

import io
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from formats.frames import ScanSettings
from formats.pictures import Pictures
from plumbing.flags import UserError
from plumbing.leaks import read_leaks
from plumbing.own import SECRET, find_prepared, hash_id, prepare_own, secret_of
from plumbing.pixels import SUFFIXES, load_image
from plumbing.shards import Shard
from prepare.all import Config, main
from prepare.folder import prepare_folder
from prepare.listing import read_folder, read_table
from prepare.own import Wanted
from prepare.shards import ImageSettings, locked, read_manifests, write_dataset
from tasks.labelled import open_dataset

ROOT = Path(__file__).resolve().parent.parent
RAW = Path(os.environ.get("NANOMEDQ_RAW", ROOT / "raw"))
NO_RAW = f"no real data in {RAW}; set NANOMEDQ_RAW to a folder of it"


def small(size=16, **wanted):
    return Wanted(ImageSettings(size, "squash", "jpeg", 97), **wanted)


def put(path, seed=None):
    """Write an image of 8 pixels, unlike any of another seed; by default its path's end is the seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".txt", ".db", ".dcm"):
        return path.write_text("no image")
    seed = list("/".join(path.parts[-3:]).encode()) if seed is None else seed
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(path, "JPEG" if path.suffix.lower() == ".jpg" else "PNG")


def put_classes(folder, count=10, classes=("a", "b")):
    for name in classes:
        for number in range(count):
            put(folder / name / f"{number}.png")
    return folder


def write_csv(folder, *lines, count=10):
    """A csv in a folder with images 0.png, 1.png, ...; they are the same whatever the csv says."""
    for number in range(count):
        put(folder / f"{number}.png", seed=number)
    (folder / "list.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "list.csv"


@pytest.fixture
def prepare(tmp_path, capsys):
    """prepare(path) -> (its name, {split: {image name: labels}}, what was printed)"""
    def prepare_and_read(path, image_size=16):
        name = prepare_folder(path, tmp_path / "shards", small(image_size))
        splits = {}
        for split in read_manifests(tmp_path / "shards" / name):
            records = Shard(tmp_path / "shards" / name / split).read_records()
            splits[split] = {record["image"]: tuple(record["labels"]) for record in records}
        return name, splits, capsys.readouterr().out

    return prepare_and_read


def sides(splits):
    """{image name: its split}"""
    return {name: split for split, labels in splits.items() for name in labels}


def state(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# ----------------------------------------------------------------------------- folders

def test_class_folders_become_a_dataset(prepare, tmp_path):
    scans = put_classes(tmp_path / "My scans (2024)", 8, ["benign tumour", "gesünd", "Zyste"])
    names = [path.relative_to(scans).as_posix() for path in scans.glob("*/*")]
    for name in ("Zyste/left eye/ü 1.PNG", "Zyste/left eye/deep/2.JPG", "gesünd/3.jpeg", "gesünd/4.TIF",
                 "benign tumour/5.bmp", "benign tumour/6.webp"):
        put(scans / name)
        names.append(name)
    for name in ("readme.txt", ".hidden/1.png", "in no class.png", "Zyste/.1.png", "Zyste/Thumbs.db"):
        put(scans / name)
    (scans / "Zyste/broken.gif").write_bytes(b"GIF89a")
    name, splits, printed = prepare(f"{scans}/")
    assert name == "My_scans_2024"
    found = {image: labels for split in splits.values() for image, labels in split.items()}
    assert found == {image: (image.split("/")[0],) for image in names}
    counts = Counter((split, label) for split in splits for label, in splits[split].values())
    for label in ("benign tumour", "gesünd", "Zyste"):  # 10 of each, and one that cannot be read
        assert counts["train", label] in (7, 6) and counts["validation", label] == 1
        assert counts["test", label] in (2, 3)
    shard = Shard(tmp_path / "shards" / name / "train")
    assert shard.manifest["classes"] == ["Zyste", "benign tumour", "gesünd"]
    assert shard.manifest["kind"] == "classification" and shard.read_image(0).shape == (16, 16, 3)
    assert read_leaks(shard)[0] == "drop" and not list((tmp_path / "shards").rglob("tokenizer.model"))
    assert "5 files passed over, .hidden the first" in printed and "not prepared yet" in printed
    assert "a split is made, 70 : 10 : 20, alike images on one side" in printed
    assert f"train: {len(splits['train'])} images, {counts['train', 'Zyste']} Zyste, " in printed
    assert printed.count("skipped: 1 image unreadable") == 1


@pytest.mark.parametrize("folders", [("train", "val", "test"), ("Training", "VALIDATION", "Testing"),
                                     ("train", "test")])
def test_splits_that_are_given_are_kept(folders, prepare, tmp_path):
    for folder in folders:
        put_classes(tmp_path / "scans" / folder, 2)
    put(tmp_path / "scans" / folders[-1] / "of no class.png")
    put(tmp_path / "scans/docs/figure.png")  # of none, too
    name, splits, printed = prepare(tmp_path / "scans")
    known = dict(zip(folders, ("train", "validation", "test") if len(folders) == 3 else folders))
    assert splits == {known[folder]: {f"{folder}/{label}/{number}.png": (label,)
                                      for label in "ab" for number in (0, 1)} for folder in folders}
    assert "a split is made" not in printed and "2 files passed over" in printed


def test_nothing_is_done_twice_and_any_change_is_seen(prepare, tmp_path, monkeypatch):
    scans = put_classes(tmp_path / "scans")
    first = prepare(scans)
    before = state(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} is read again")
                      if path.suffix == ".png" else open(path, "rb").read())
        again = prepare(scans)
    assert again[:2] == first[:2] and again[2] == "scans: up to date\n" and state(tmp_path) == before

    def changed(wanted):
        name, splits, printed = prepare(scans)
        assert name == "scans" and wanted in printed
        assert "up to date" in prepare(scans)[2]
        return {image: labels for split in splits.values() for image, labels in split.items()}

    (scans / "a/3.png").rename(scans / "b/moved.png")  # its size and times stay what they were
    assert changed("listing was 20 images")["b/moved.png"] == ("b",)
    times = (scans / "a/4.png").stat()
    put(scans / "a/4.png", seed=99)
    os.utime(scans / "a/4.png", ns=(times.st_atime_ns, times.st_mtime_ns + 10**6))
    changed("listing was 20 images")
    (scans / "a/5.png").unlink()
    assert len(changed("now 19 images")) == 19
    assert "image.size was 16, now 24" in prepare(scans, image_size=24)[2]
    assert Shard(tmp_path / "shards/scans/test").read_image(0).shape == (24, 24, 3)


def test_images_that_are_alike_stay_on_one_side(prepare, tmp_path):
    scans = put_classes(tmp_path / "scans", 2)
    for number in range(10, 22):
        path = scans / "ab"[number % 2] / f"{number}.png"
        put(path)
        for copy in range(3):
            larger = Image.open(path).resize((32 + 8 * copy, 32), Image.Resampling.NEAREST)
            larger.save(path.with_name(f"{number}_{copy}.png"))
    _, splits, printed = prepare(scans)
    side = sides(splits)
    assert "  48 images are like another one\n" in printed and len(side) == 52
    assert set(side.values()) == {"train", "validation", "test"}
    groups = {}
    for name, split in side.items():
        groups.setdefault(name.split(".")[0].split("_")[0], set()).add(split)
    assert len(groups) == 16 and all(len(splits) == 1 for splits in groups.values())


def test_images_of_a_given_test_split_are_found_in_train(prepare, tmp_path):
    for folder in ("train", "test"):
        put_classes(tmp_path / "scans" / folder, 3)
    put(tmp_path / "scans/train/a/1.png", seed=7)
    put(tmp_path / "scans/test/b/2.png", seed=7)
    name, splits, printed = prepare(tmp_path / "scans")
    numbers = read_leaks(Shard(tmp_path / "shards/scans/train"))[1].tolist()
    assert "  scans/train: 1 samples will be left out of it: scans/test has 1\n" in printed
    assert [list(splits["train"])[number] for number in numbers] == ["train/a/1.png"]


def test_links_are_followed_but_not_in_a_circle(prepare, tmp_path):
    scans, store = tmp_path / "scans", tmp_path / "store"
    put_classes(scans)
    put(store / "elsewhere.png")
    (scans / "a/linked.png").symlink_to(store / "elsewhere.png")
    (scans / "a/folder").symlink_to(store)
    (scans / "a/circle").symlink_to(scans)
    (scans / "a/itself.png").symlink_to("itself.png")
    (scans / "b/gone.png").symlink_to(store / "gone.png")
    _, splits, printed = prepare(scans)
    side = sides(splits)
    assert "2 files passed over" in printed and "skipped" not in printed
    assert len(side) == 22 and {"a/linked.png", "a/folder/elsewhere.png"} <= set(side)


def test_names_are_safe_and_nobody_elses(prepare, tmp_path):
    one = put_classes(tmp_path / "one/busi", 3)  # a benchmark's
    two, three = (put_classes(tmp_path / number / "scans", 3) for number in ("two", "three"))
    names = [prepare(path)[0] for path in (one, two, three)]
    assert names[0].startswith("busi_") and names[1] == "scans" and names[2].startswith("scans_")
    assert len(names[0]) == 13 and len(names[2]) == 14 and (names[0] + names[2]).isidentifier()
    before = state(tmp_path / "shards")
    assert [prepare(path)[0] for path in (one, two, three)] == names
    assert state(tmp_path / "shards") == before
    (tmp_path / "shards/scans").rename(tmp_path / "shards/.scans.old")  # killed before it was renamed
    assert prepare(three)[0] == names[2] and prepare(two)[0] == "scans"
    assert sorted(os.listdir(tmp_path / "shards")) == sorted(names)


# ----------------------------------------------------------------------------- tables

def test_a_csv_may_have_several_labels_and_its_own_split(prepare, tmp_path):
    put(tmp_path / "apart/10.png", seed=10)
    table = write_csv(tmp_path / "film", "Filename;Remark;Labels;Split", "0.png;;effusion | mass;train",
                      "1.png;;mass;Train", "2.png;;;train", "3.png;;nodule|mass;val",
                      "4.png;;nodule;test", f"{tmp_path}/apart/10.png;x; mass ;test",
                      " 5.png ;;nodule; train", ";;;")
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes().replace(b"\n", b"\r\n"))  # as Excel does
    name, splits, printed = prepare(table)
    assert name == "list" and splits == {
        "train": {"0.png": ("effusion", "mass"), "1.png": ("mass",), "2.png": (), "5.png": ("nodule",)},
        "validation": {"3.png": ("mass", "nodule")},
        "test": {"4.png": ("nodule",), f"{tmp_path}/apart/10.png": ("mass",)}}
    assert Shard(tmp_path / "shards/list/test").manifest["classes"] == ["effusion", "mass", "nodule"]
    assert "train: 4 images, 1 of none, 1 effusion, 2 mass, 1 nodule\n" in printed
    before = state(tmp_path)
    assert prepare(table)[2] == "list: up to date\n" and state(tmp_path) == before
    table.write_text(table.read_text().replace("4.png;;nodule", "4.png;;effusion"))
    assert prepare(table)[1]["test"]["4.png"] == ("effusion",)
    put(tmp_path / "film/0.png", seed=77)
    assert "listing was" in prepare(table)[2]


@pytest.mark.parametrize("column", [
    "patient", "Patient_ID", "PatientID", "patient id", "subject", "subject-id", "case", "Case_ID", "study",
    "STUDYID", "Group"])
def test_a_patient_is_never_divided(column, prepare, tmp_path):
    lines = [f"{n}.png,{'yes' if n % 8 < 4 else 'no'},{f'p{n // 4}' if n < 36 else ''}"
             for n in range(40)]
    _, splits, printed = prepare(write_csv(tmp_path, f"image,label,{column}", *lines, count=40))
    side = sides(splits)
    assert len(side) == 40 and set(side.values()) == {"train", "validation", "test"}
    assert all(len({side[f"{4 * p + n}.png"] for n in range(4)}) == 1 for p in range(9))
    assert len({side[f"{n}.png"] for n in range(36, 40)}) > 1  # of no patient: not one of their own
    assert f"a split is made, 70 : 10 : 20, by patient (column {column.lower()})" in printed
    assert "4 images name no patient: each stays with those that it is like" in printed
    secret = secret_of(tmp_path)
    for split in ("train", "test"):
        records = Shard(tmp_path / "shards/list" / split).read_records()
        assert all(record["group"] == (f"patient {hash_id(secret, f'p{number // 4}')}" if number < 36 else
                                       f"like {number}.png")
                   for record in records for number in [int(record["image"].split(".")[0])])


def test_few_missing_files_are_skipped_and_counted(prepare, tmp_path):
    lines = [f"{n}.png,{'ab'[n % 2]}" for n in range(20)]
    _, splits, printed = prepare(write_csv(tmp_path, "path,label", *lines, "gone.png,a", count=20))
    assert len(sides(splits)) == 20 and printed.count("skipped: 1 image missing") == 1


# ----------------------------------------------------------------------------- labels

def labels_of(prepare, tmp_path, cells, header="path,label"):
    """({number of an image: its labels}, the train split's manifest, what was printed) of a csv of 20 rows."""
    rows = [f"{number}.png,{cells.get(number, 'ab'[number % 2])}" for number in range(20)]
    name, splits, printed = prepare(write_csv(tmp_path / "film", header, *rows, count=20))
    found = {int(image.split(".")[0]): labels for split in splits.values() for image, labels in split.items()}
    return found, Shard(tmp_path / "shards" / name / "train").manifest, printed


@pytest.mark.parametrize("cell", ["", "  ", "|", "nan", "NaN", "NULL", "None", "-", "?", "N/A", "? ; nan"])
def test_where_no_image_has_several_labels_a_row_without_one_is_skipped(cell, prepare, tmp_path):
    found, manifest, printed = labels_of(prepare, tmp_path, {3: cell})
    assert found == {number: ("ab"[number % 2],) for number in range(20) if number != 3}
    assert manifest["multi_label"] is False and manifest["classes"] == ["a", "b"]
    assert manifest["skipped"] == {"no label": 1} and "1 of 20 rows have no label, row 5 (" in printed


@pytest.mark.parametrize("cell, wanted", [("a|a", ("a",)), ("a;", ("a",)), ("|a| a ", ("a",)), ("a|?", ("a",))])
def test_a_class_named_twice_is_one_label(cell, wanted, prepare, tmp_path):
    found, manifest, _ = labels_of(prepare, tmp_path, {3: cell})
    assert found[3] == wanted and len(found) == 20 and manifest["multi_label"] is False


@pytest.mark.parametrize("cell, wanted", [("", ()), (" ; ", ()), ("nan", None), ("?", None), ("none", None)])
def test_beside_several_labels_an_empty_cell_is_no_finding_and_a_question_mark_is_none(
        cell, wanted, prepare, tmp_path):
    found, manifest, printed = labels_of(prepare, tmp_path, {2: "a|b", 3: cell})
    assert found.get(3) == wanted and found[2] == ("a", "b") and manifest["multi_label"] is True
    empty = wanted == ()
    assert (f"an image may have several labels: 1 have several, 18 have one, {int(empty)} have none, which counts "
            "as no finding") in printed
    assert manifest["skipped"] == ({} if empty else {"no label": 1})


@pytest.mark.parametrize("one, other", [("0", "1"), ("0.0", "1.0"), ("True", "False"), ("TRUE", "FALSE"),
                                        ("2", "10"), ("1.5", "2.5")])
def test_numbers_and_truth_values_are_names_of_classes(one, other, prepare, tmp_path):
    found, manifest, _ = labels_of(prepare, tmp_path, {n: (one, other)[n % 2] for n in range(20)})
    assert found == {number: ((one, other)[number % 2],) for number in range(20)}
    assert manifest["classes"] == sorted([one, other]) and manifest["multi_label"] is False


def test_a_label_that_was_added_makes_it_anew(prepare, tmp_path):
    labels_of(prepare, tmp_path, {3: ""})
    found, manifest, printed = labels_of(prepare, tmp_path, {3: "a|b"})
    assert found[3] == ("a", "b") and manifest["multi_label"] is True and "up to date" not in printed


def test_an_image_under_two_classes_is_told(prepare, tmp_path):
    scans = put_classes(tmp_path / "scans", 12)
    for number in range(3):
        (scans / f"b/copy {number}.png").write_bytes((scans / f"a/{number}.png").read_bytes())
    larger = Image.open(scans / "b/7.png").resize((40, 40), Image.Resampling.NEAREST)  # alike, not the same
    larger.save(scans / "a/x.png")
    _, splits, printed = prepare(scans)
    assert "  8 images are like another one\n  8 of them are like one with another label, a/0.png and b/copy 0.png " \
        "the first" in printed
    side = sides(splits)
    assert all(side[f"a/{n}.png"] == side[f"b/copy {n}.png"] for n in range(3)) and side["a/x.png"] == side["b/7.png"]
    assert "another label" not in prepare(put_classes(tmp_path / "none", 4))[2]


def test_under_a_split_that_is_given_two_labels_of_an_image_are_told_too(prepare, tmp_path):
    lines = [f"{n}.png,{'ab'[n % 2]},{'train' if n < 14 else 'test'},p{n}" for n in range(20)]
    table = write_csv(tmp_path, "path,label,split,patient", *lines, count=20)
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes())
    assert "2 of them are like one with another label, 0.png and 1.png the first" in prepare(table)[2]


# ----------------------------------------------------------------------------- patients

def patients_table(folder, header, row, count=40):
    """A csv of 40 images of two classes; row(number) gives the cells behind path and label."""
    return write_csv(folder, f"path,label,{header}",
                     *(f"{n}.png,{'ab'[n // 4 % 2]},{row(n)}" for n in range(count)), count=count)


def divided(splits, patient_of):
    """The patients that are in more than one split."""
    places = {}
    for name, split in sides(splits).items():
        places.setdefault(patient_of(int(name.split(".")[0])), set()).add(split)
    return [patient for patient, found in places.items() if len(found) > 1]


@pytest.mark.parametrize("header", ["study,subject_id,age,patient_id", "Patient ID,Case,Sex,Study ID"])
def test_the_patient_counts_before_the_subject_and_the_study(header, prepare, tmp_path):
    """Studies and cases are numbered within a patient, whose images they would divide or join."""
    names = header.split(",")
    patient = next(place for place, name in enumerate(names) if name.lower().startswith("patient"))

    def row(number):
        return ",".join(f"P{number // 4}" if place == patient else str(number % 4) for place in range(4))

    _, splits, printed = prepare(patients_table(tmp_path, header, row))
    assert divided(splits, lambda number: number // 4) == []
    assert f"by patient (column {names[patient].lower()})" in printed
    unused = [name.lower() for name in names if name != names[patient] and "stud" not in name.lower()]
    assert f"columns that are not used: {', '.join(unused)}\n" in printed
    assert f"are of several patients, 0 the first: {names[patient].lower()!r} is what counts" in printed


def test_a_column_without_a_single_patient_is_passed_over(prepare, tmp_path):
    table = patients_table(tmp_path, "patient,subject", lambda n: f"nan,{n // 4}.0")
    assert "by patient (column subject)" in prepare(table)[2]
    records = Shard(tmp_path / "shards/list/train").read_records()
    known = {f"patient {hash_id(secret_of(tmp_path), str(number))}" for number in range(10)}  # 0.0 is 0
    assert {record["group"] for record in records} <= known


def test_capitals_make_no_other_patient(prepare, tmp_path):
    table = patients_table(tmp_path, "patient", lambda n: f"{'Pp'[n % 2]}{n // 4}")
    assert divided(prepare(table)[1], lambda number: number // 4) == []
    table = patients_table(tmp_path, "patient,split", lambda n: f"{'Pp'[n % 2]}{n // 4},{'test' if n % 2 else 'train'}")
    with pytest.raises(UserError, match="patient p0 .by column patient. is in train and in test"):
        prepare(table)


def test_an_image_without_a_patient_goes_where_its_copy_is(prepare, tmp_path):
    table = patients_table(tmp_path, "patient", lambda n: f"p{n // 4}" if n < 36 else "-")
    for copy, original in ((36, 0), (37, 9), (39, 38)):
        (tmp_path / f"{copy}.png").write_bytes((tmp_path / f"{original}.png").read_bytes())
    _, splits, printed = prepare(table)
    side = sides(splits)
    assert side["36.png"] == side["0.png"] == side["3.png"] and side["37.png"] == side["9.png"]
    assert side["38.png"] == side["39.png"] and "4 images name no patient" in printed


@pytest.mark.parametrize("deeper", ["", "monday/"])
def test_folders_inside_classes_are_patients(deeper, prepare, tmp_path):
    scans = tmp_path / "scans"
    for patient in range(12):  # of whom every third is in both classes
        for number in range(4):
            name = "ab"[patient % 2] if number < 3 or patient % 3 else "ab"[(patient + 1) % 2]
            put(scans / name / f"P {patient}" / f"{deeper}{number}.png")
    name, splits, printed = prepare(scans)
    assert "folders inside classes are taken for patients: 12 of them" in printed
    places = {}
    for image, split in sides(splits).items():
        places.setdefault(image.split("/")[1], set()).add(split)
    assert len(places) == 12 and all(len(found) == 1 for found in places.values())
    record = Shard(tmp_path / "shards/scans/train").read_records()[0]
    assert record["group"] == f"patient {record['image'].split('/')[1].lower()}"


@pytest.mark.parametrize("files", [
    [f"{c}/images/{n}.png" for c in "ab" for n in range(10)],  # one layer for all
    [f"a/p{n % 5}/{n}.png" for n in range(10)] + [f"b/{n}.png" for n in range(10)]])  # and in one class alone
def test_folders_that_not_every_class_has_are_no_patients(files, prepare, tmp_path):
    for name in files:
        put(tmp_path / "scans" / name)
    printed = prepare(tmp_path / "scans")[2]
    assert "patient" not in printed and "alike images on one side" in printed


def open_splits(tmp_path, name):
    return open_dataset(tmp_path / "shards" / name, 16)


@pytest.mark.parametrize("patients", [True, False])
def test_what_is_held_out_of_train_divides_neither_patients_nor_alike_images(patients, prepare, tmp_path):
    header = "path,label,split" + ",subject" * patients
    lines = [f"{n}.png,{'ab'[n // 4 % 2]},{'train' if n < 80 else 'test'}" + f",s{n // 4}" * patients
             for n in range(100)]
    table = write_csv(tmp_path, header, *lines, count=100)
    if not patients:
        for number in range(100):
            first = Image.open(tmp_path / f"{number // 4 * 4}.png")
            first.resize((8 + 8 * (number % 4),) * 2, Image.Resampling.NEAREST).save(tmp_path / f"{number}.png")
    name, _, _ = prepare(table)
    splits = open_splits(tmp_path, name)[0]
    held, kept = ({int(image.split(".")[0]) // 4 for image in splits[split].names} for split in ("validation", "train"))
    assert held and not held & kept and len(held | kept) == 20
    assert set(splits["validation"].groups).isdisjoint(splits["train"].groups)
    assert len(set(splits["test"].groups)) == 5  # by which the bootstrap draws


# ----------------------------------------------------------------------------- files

def test_what_load_image_reads_is_an_image_in_a_class_folder_too(prepare, tmp_path):
    """Whatever its name ends in: by that, or by its first bytes."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))
    forms = Image.registered_extensions()
    for suffix in SUFFIXES:
        stream, mode = io.BytesIO(), {".pfm": "F", ".pgm": "L", ".pbm": "1"}.get(suffix, "RGB")
        picture.convert(mode).save(stream, forms[suffix])
        load_image(stream.getvalue())
        put(tmp_path / "scans/b" / f"other{suffix}.png")
        for name in (f"1{suffix}", f"2{suffix.upper()}", f"3{suffix}.0021", f"no suffix{suffix[1:]}"):
            (tmp_path / "scans/a").mkdir(exist_ok=True, parents=True)
            (tmp_path / "scans/a" / name).write_bytes(stream.getvalue())
    assert len(Pictures(tmp_path / "scans/a").files) == 4 * len(SUFFIXES)
    for name, content in (("a.dcm", b"\0" * 128 + b"DICM"), ("notes", b"P4 is a format"), (".x.png", b"")):
        (tmp_path / "scans/a" / name).write_bytes(content)
    assert len(Pictures(tmp_path / "scans/a").files) == 4 * len(SUFFIXES)


def test_names_that_no_screen_and_no_text_takes_are_no_trouble(prepare, tmp_path):
    scans = put_classes(tmp_path / "sc\nans", 8, ("a", "b"))
    picture = (scans / "a/0.png").read_bytes()
    for name in (b"a/caf\xe9.png", b"a/caf\xe8.png", b"a/two\nlines.png", b"b/bell\x07\x1b[2J.png",
                 b"b/" + b"x" * 250 + b".png", b"b/\xff.txt"):
        with open(os.path.join(os.fsencode(scans), name), "wb") as file:
            file.write(picture + name)  # nothing behind its end is read
    os.mkdir(os.path.join(os.fsencode(scans), b"caf\xe9"))
    for number in range(8):
        put(Path(os.fsdecode(os.path.join(os.fsencode(scans), b"caf\xe9", b"%d.png" % number))), seed=[number, 99])
    name, splits, printed = prepare(scans)
    printed.encode("utf-8")  # as a terminal has to
    assert printed.isprintable() or "\x1b" not in printed and "\x07" not in printed
    images = {image: labels for split in splits.values() for image, labels in split.items()}
    assert images["a/caf\\xe9.png"] == ("a",) and "a/caf\\xe8.png" in images and "a/two\nlines.png" in images
    assert images["caf\\xe9/0.png"] == ("caf\\xe9",) and name == "sc_ans" and len(images) == 30
    assert prepare(scans)[2] == "sc_ans: up to date\n"


def test_cells_that_no_disk_takes_are_counted(prepare, tmp_path):
    long = "c" * 300
    lines = [f"{n}.png,{'a' if n % 2 else long}" for n in range(40)]
    table = write_csv(tmp_path, "path,label", *lines, "x" * 5000 + ".png,a", "\x00.png,a", '"two\nlines",a', count=40)
    name, splits, printed = prepare(table)
    assert sum(map(len, splits.values())) == 40 and max(map(len, printed.splitlines())) < 700
    assert sum(manifest["skipped"].get("image missing", 0)
               for manifest in read_manifests(tmp_path / "shards" / name).values()) == 3
    table.rename(tmp_path / f"{'y' * 200}.csv")
    assert prepare(tmp_path / f"{'y' * 200}.csv")[0].startswith("y" * 50 + "_")


# ----------------------------------------------------------------------------- which dataset is meant

@pytest.fixture
def find(tmp_path, monkeypatch, capsys):
    """find(name) -> (the dataset's name, its images, what was printed), asked in the folder `here`."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def find_and_read(name):
        shards = tmp_path / "shards"
        dataset = find_prepared(name, shards) or prepare_folder(name, shards, small())
        splits = read_manifests(shards / dataset)
        return dataset, sum(manifest["images"] for manifest in splits.values()), capsys.readouterr().out

    return find_and_read


@pytest.mark.parametrize("name", ["scans", "./scans", "scans/"])
def test_a_folder_is_looked_at_each_time_however_it_is_named(name, find, tmp_path):
    put_classes(tmp_path / "here/scans", 4)
    assert find(name)[:2] == ("scans", 8)
    put_classes(tmp_path / "here/scans", 6, ("a", "b", "c"))
    assert find(name)[:2] == ("scans", 18)
    assert find(name) == ("scans", 18, "scans: up to date\n")


def test_another_project_s_folder_of_that_name_is_not_this_one_s(find, tmp_path):
    prepare_folder(put_classes(tmp_path / "there/scans", 4, ("benign", "malignant")), tmp_path / "shards", small())
    put_classes(tmp_path / "here/scans", 6, ("fracture", "healthy"))
    name, count, _ = find("scans")
    assert name.startswith("scans_") and count == 12
    assert Shard(tmp_path / "shards" / name / "train").manifest["classes"] == ["fracture", "healthy"]


def test_without_a_folder_of_that_name_it_is_what_was_prepared_and_from_where_is_told(find, tmp_path):
    scans = put_classes(tmp_path / "there/scans", 4)
    prepare_folder(scans, tmp_path / "shards", small())
    name, count, printed = find("scans")
    assert (name, count) == ("scans", 8)
    assert f"scans: as it was prepared from {scans}; there is no folder of that name here" in printed
    assert find("nothing")[0] == "nothing"  # which train_cls.py says is not prepared


def test_a_benchmark_that_is_prepared_stays_itself_beside_a_folder_of_its_name(find, tmp_path):
    put_classes(tmp_path / "here/busi", 4)
    assert find("busi")[0].startswith("busi_")  # not prepared: one's own is meant
    (tmp_path / "shards/busi").mkdir()
    assert find("busi") == ("busi", 0, "busi: the dataset that prepare/all.py made; write ./busi for the folder of "
                            "that name here\n")
    assert find("./busi")[0].startswith("busi_")


def test_a_process_of_its_own_prepares_says_the_same_and_ends_with_the_reason(tmp_path, capfd):
    scans = put_classes(tmp_path / "my scans", 6)
    for wanted in ("my_scans: not prepared yet", "my_scans: up to date"):
        assert prepare_own(str(scans), str(tmp_path / "shards"), 16) == "my_scans"
        assert wanted in capfd.readouterr().out
    put_classes(tmp_path / "other/my scans", 4)
    hashed = prepare_own(tmp_path / "other/my scans", tmp_path / "shards", 16)
    assert hashed.startswith("my_scans_")
    (tmp_path / "empty").mkdir()
    capfd.readouterr()
    for path, reason in ((tmp_path / "empty", "not understood, it has no file"),
                         (tmp_path / "gone", "no folder and no csv")):
        with pytest.raises(UserError, match=f"^{path}: {reason}") as error:
            prepare_own(path, tmp_path / "shards", 16)
        assert "\n" not in str(error.value) and capfd.readouterr().err == ""


def test_what_is_damaged_of_one_s_own_is_made_anew_by_what_the_line_says(prepare, tmp_path):
    scans = put_classes(tmp_path / "my scans", 6)
    name = prepare(scans)[0]
    (tmp_path / "shards" / name / "train/manifest.json").unlink()
    with pytest.raises(UserError, match=f"train_cls.py --dataset='{scans}'`"):
        Shard(tmp_path / "shards" / name / "train")
    assert "a manifest is missing or damaged" in prepare(scans)[2]
    assert len(Shard(tmp_path / "shards" / name / "train"))


# ----------------------------------------------------------------------------- scans

def put_series(folder, patient, seed, count=5, study="", **header):
    """A CT series: water of some noise with a lesion that is 30 HU denser, in 32 x 32 pixels."""
    from test_dicom import AXIAL, made, save

    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng([seed, number]).normal(30, 2, (32, 32)).round().astype(np.int16)
        pixels[8:20, 8:20] += 30
        pixels[0] = header.pop("metal", -1000)  # air above
        save(folder / f"IM{number}.dcm", made(
            pixels, PatientID=patient, StudyInstanceUID=f"1.9.{seed}" if not study else study, RescaleType="HU",
            SeriesInstanceUID=f"1.8.{seed}", ImageOrientationPatient=AXIAL, InstanceNumber=number,
            ImagePositionPatient=[0, 0, 5 * number], **header))


def test_each_slice_of_a_series_is_an_image_of_its_class(prepare, tmp_path):
    pytest.importorskip("pydicom")
    for number in range(20):  # of 10 patients
        put_series(tmp_path / "scans" / "ab"[number // 2 % 2] / f"Meier {number}", f"P-{number // 2}", number, 2)
    put(tmp_path / "scans/a/Meier 0/report.txt")
    (tmp_path / "scans/b/Meier 2/IM2.dcm").write_bytes(bytes(128) + b"DICM")
    name, splits, printed = prepare(tmp_path / "scans")
    shard = Shard(tmp_path / "shards" / name / "train")
    assert sum(map(len, splits.values())) == 40 and shard.manifest["image"]["window"] == "auto"
    assert "no patients: 10 patients of headers have several, meier 0 and meier 1 the first; headers count" in printed
    assert "1 files cannot be used, b/Meier 2/IM2.dcm the first: " in printed
    assert "1 files passed over, a/Meier 0/report.txt the first: hidden, no image" in printed
    records = [record for split in splits for record in Shard(tmp_path / "shards" / name / split).read_records()]
    assert len({record["study"] for record in records}) == 20 and len({record["group"] for record in records}) == 10
    assert not any("meier" in record["image"].lower() or "P-" in str(record) for record in records)
    for path in list((tmp_path / "scans").glob("*/*")):  # no folders that could be patients
        for file in path.glob("IM*"):
            file.rename(path.parent / f"{path.name} {file.name}")
    name, splits, printed = prepare(tmp_path / "scans")
    assert "by patient (the headers of scans)" in printed and SECRET not in printed
    records = [record for split in splits for record in Shard(tmp_path / "shards" / name / split).read_records()]
    assert len({record["group"] for record in records}) == 10 and len({record["study"] for record in records}) == 20


def test_a_header_without_an_id_is_of_the_patient_of_its_study(tmp_path):
    pytest.importorskip("pydicom")
    for number in range(8):
        put_series(tmp_path / "ab"[number % 2] / str(number), "" if number > 3 else f"P{number}", number, 1,
                   f"1.9.{number % 4 + 1}")
        (tmp_path / "ab"[number % 2] / f"{number}/IM0.dcm").rename(tmp_path / "ab"[number % 2] / f"{number}.dcm")
    assert sorted(item.patient for item in read_folder(tmp_path).items) == sorted(f"P{n % 4}" for n in range(8))


def test_one_name_in_all_headers_is_no_patient(prepare, tmp_path):
    pytest.importorskip("pydicom")
    for number in range(12):
        folder = tmp_path / "scans" / "ab"[number % 2]
        put_series(folder, "ANON", number, 1)
        (folder / "IM0.dcm").rename(folder / f"{number}.dcm")
    _, splits, printed = prepare(tmp_path / "scans")
    assert "the headers of all scans name one patient" in printed and "12 studies count as patients" in printed
    assert splits.keys() == {"train", "validation", "test"}


def stored(name, shards, split="train"):
    """{image: (H, W) greys}"""
    shard = Shard(shards / name / split)
    return {record["image"]: shard.read_image(number)[..., 0].astype(int)
            for number, record in enumerate(shard.read_records())}


def lesion(pixels):
    """How much brighter a stored image of 32 pixels is within the lesion than beside it."""
    return pixels[10:18, 10:18].mean() - pixels[22:30, 22:30].mean()


@pytest.mark.parametrize("window, least, most", [("soft", 15, 25), ("-600/1500", 3, 8), ("45/60", 100, 160)])
def test_a_faint_lesion_is_seen_through_its_window(window, least, most, tmp_path):
    """30 HU of a width of 400 are 19 of 255 greys, of 1500 they are 5, and of 60 half of them."""
    pytest.importorskip("pydicom")
    lines = ["image,label,split,patient"]
    for number in range(4):
        put_series(tmp_path / f"film/ct{number}", "P", number, 5)
        lines.append(f"ct{number},{'ab'[number % 2]},{'train' if number < 2 else 'test'},{number}")
    (tmp_path / "film/list.csv").write_text("\n".join(lines))
    settings = ScanSettings(window)
    name = prepare_folder(tmp_path / "film/list.csv", tmp_path / "shards", small(32, scans=settings))
    before = stored(name, tmp_path / "shards")
    assert len(before) == 10 and all(least <= lesion(pixels) <= most for pixels in before.values())
    assert Shard(tmp_path / "shards/list/train").manifest["image"]["window"] == window
    put_series(tmp_path / "film/ct0", "P", 0, 1, metal=30000)  # one slice has metal in it
    prepare_folder(tmp_path / "film/list.csv", tmp_path / "shards", small(32, scans=settings))
    after = stored(name, tmp_path / "shards")
    assert max(abs(before[image][4:] - after[image][4:]).max() for image in before) <= 12  # JPEG, below the metal
    assert sum((before[image] != after[image]).any() for image in before) == 1


def test_another_window_or_choice_of_slices_makes_it_anew(tmp_path, capsys):
    pytest.importorskip("pydicom")
    for number in range(8):
        put_series(tmp_path / f"scans/{'ab'[number % 2]}/{number}", "P", number, 2)
    counts = []
    for settings in (ScanSettings(), ScanSettings("soft"), *[ScanSettings("soft", "middle")] * 2):
        name = prepare_folder(tmp_path / "scans", tmp_path / "shards", small(scans=settings))
        counts.append(sum(part["images"] for part in read_manifests(tmp_path / "shards" / name).values()))
    said = capsys.readouterr().out
    assert counts == [16, 16, 8, 8] and said.count("scans: up to date") == 1
    assert said.count("image.") == 2 and "8 slices or pages are left out by --slices=middle" in said
    assert "passed over" not in said


def test_a_folder_is_looked_at_again_by_the_flags_that_it_was_prepared_with(tmp_path, capfd):
    """As train_cls.py --dataset=scans does after prepare/all.py --own=scans --name=mine --codec=png."""
    scans = put_classes(tmp_path / "scans", 6)
    config = Config(own=str(scans), shards_dir=str(tmp_path / "shards"), image_size=16, name="mine", codec="png",
                    workers=1)
    main(config)
    capfd.readouterr()
    assert prepare_own(str(scans), str(tmp_path / "shards"), 16) == "mine"
    assert "mine: up to date" in capfd.readouterr().out
    main(replace(config, name="others"))
    with pytest.raises(UserError, match="several datasets were made of it, mine, others; name one, as --dataset=mine"):
        prepare_own(str(scans), str(tmp_path / "shards"), 16)


def test_masks_beside_their_images_are_no_images(prepare, tmp_path):
    """As in BUSI, whose masks are called benign (1)_mask.png and benign (1)_mask_1.png."""
    scans = put_classes(tmp_path / "scans", 6)
    for name in ("a/0_mask.png", "a/0_mask_1.png", "b/3_seg.png", "b/3-label.png", "b/4.seg.png", "b/alone_mask.png"):
        put(scans / name)
    _, splits, printed = prepare(scans)
    assert "5 masks passed over, a/0_mask.png the first: each is called as an image beside it" in printed
    assert len(sides(splits)) == 13 and "b/alone_mask.png" in sides(splits)


# ----------------------------------------------------------------------------- folds, names, columns, a page

def test_each_fold_tests_other_patients_and_all_of_them_once(tmp_path, capsys):
    table = patients_table(tmp_path, "patient", lambda n: f"P{n // 4}")
    prepare_folder(table, tmp_path / "shards", small(name="mine", folds=5))
    tested = []
    for fold in range(5):
        target = tmp_path / f"shards/mine_fold_{fold}_of_5"
        train, test = ({record["group"] for record in Shard(target / split).read_records()}
                       for split in ("train", "test"))
        assert not train & test and len(train | test) == 10
        assert Shard(target / "test").manifest["folds"] == {"of": "mine", "fold": fold, "folds": 5}
        tested += test
    assert len(tested) == len(set(tested)) == 10
    assert prepare_folder(table, tmp_path / "shards", small(name="mine", folds=5, fold=3)) == "mine_fold_3_of_5"
    assert "mine_fold_3_of_5: up to date" in capsys.readouterr().out


def test_columns_may_be_called_anything(prepare, tmp_path):
    lines = [f"{n},{'ab'[n % 2]},k{n // 4},s{n // 2}" for n in range(40)]
    table = write_csv(tmp_path, "Bild,Befund,Kind,Serie", *lines, count=40)
    with pytest.raises(UserError, match="--columns=label:Diagnose: .*did you mean"):
        prepare_folder(table, tmp_path / "shards", small(columns={"label": "Diagnose"}))
    name = prepare_folder(table, tmp_path / "shards", small(columns={
        "image": "Bild", "label": "befund", "patient": "Kind", "study": "Serie"}))
    records = Shard(tmp_path / "shards" / name / "train").read_records()
    known = {f"patient {hash_id(secret_of(tmp_path), f'k{n}')}" for n in range(10)}
    assert {record["group"] for record in records} <= known
    assert not any("study" in record for record in records)  # of two labels each


def test_images_of_a_study_are_named_as_such_where_they_have_one_label(prepare, tmp_path):
    name, *_ = prepare(patients_table(tmp_path, "patient,exam", lambda n: f"P{n // 8},{n // 4 % 2}"))
    for split in ("train", "test"):
        for record in Shard(tmp_path / "shards" / name / split).read_records():
            number = int(record["image"].split(".")[0])
            assert record["study"] == hash_id(secret_of(tmp_path), f"p{number // 8} {number // 4 % 2}")


def test_no_secret_is_made_where_no_one_is_named(prepare, tmp_path):
    prepare(put_classes(tmp_path / "scans", 4))
    assert not list(tmp_path.rglob(SECRET))


def test_a_folder_that_cannot_be_written_to_is_refused_where_patients_are_named(tmp_path, monkeypatch):
    def refuse(path, content):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("plumbing.own.write_whole", refuse)
    prepare_folder(put_classes(tmp_path / "scans", 4), tmp_path / "shards", small())
    table = patients_table(tmp_path / "film", "patient", lambda n: f"P{n // 4}")
    with pytest.raises(UserError, match=f"^{tmp_path}/film/.patients.key: patients are hashed with a secret in it, "):
        prepare_folder(table, tmp_path / "more", small())


def test_a_dry_run_writes_a_page_and_nothing_else(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    table = patients_table(tmp_path / "film", "patient", lambda n: f"P{n // 4}")
    assert prepare_folder(table, tmp_path / "shards", small(dry_run=True)) == "list"
    page = re.sub("base64,[^\"]*", "", (tmp_path / "out/own_list.html").read_text())
    assert not list((tmp_path / "shards").glob("*")) and "out/own_list.html: some samples" in capsys.readouterr().out
    assert page.count("<article>") == page.count("data:image/jpeg") == 10
    assert hash_id(secret_of(tmp_path / "film"), "p0") in page and "P0" not in page
    assert page.count(">b</dd>") and page.count(">a</dd>")  # of both classes


# ----------------------------------------------------------------------------- real data

@pytest.mark.skipif(not (RAW / "busi").exists(), reason=NO_RAW)
def test_busi_is_a_folder_a_class(tmp_path):
    listing = read_folder(RAW / "busi/Dataset_BUSI_with_GT")
    assert Counter(item.labels for item in listing.items) == {("benign",): 437, ("malignant",): 210, ("normal",): 133}
    assert listing.grouped_by == "" and listing.notes == []


@pytest.mark.skipif(not (RAW / "nih_cxr14").exists(), reason=NO_RAW)
def test_the_table_of_nih_is_read_as_it_is(tmp_path):
    """Its header has commas within brackets; its films lie in another folder, of the 904 rows 24 have one."""
    (tmp_path / "images").symlink_to(RAW / "nih_cxr14/images")
    header, *rows = (RAW / "nih_cxr14/Data_Entry_2017_v2020.csv").read_text().splitlines()
    (tmp_path / "all.csv").write_text("\n".join([header, *rows]))
    with pytest.raises(UserError, match="880 of its 904 files are not there"):
        read_table(tmp_path / "all.csv")
    rows = [row for row in rows if (RAW / "nih_cxr14/images" / row.split(",")[0]).exists()]
    (tmp_path / "list.csv").write_text("\n".join([header, *rows]))
    listing = read_table(tmp_path / "list.csv")
    assert len(listing.items) == 24 and listing.multi_label and listing.grouped_by == "column patient id"
    assert Counter(item.patient for item in listing.items) == {"1": 3, "3": 8, "5": 8, **dict.fromkeys("24678", 1)}
    item, = (item for item in listing.items if item.name == "images/00000003_003.png")
    assert item.labels == ("Hernia", "Infiltration") and item.source.is_file()


# ----------------------------------------------------------------------------- several at once

def test_of_two_at_once_one_prepares_and_the_other_finds_it_up_to_date(tmp_path, monkeypatch, capsys):
    scans, written, original = put_classes(tmp_path / "scans", 6), [], write_dataset

    def slowly(*arguments, **flags):
        written.append(threading.get_ident())
        time.sleep(0.3)
        return original(*arguments, **flags)

    monkeypatch.setattr("prepare.folder.write_dataset", slowly)
    with ThreadPoolExecutor(3) as pool:  # a lock is of an open file: to it threads are as strange as processes
        names = list(pool.map(lambda _: prepare_folder(scans, tmp_path / "shards", small()), range(3)))
    assert names == ["scans"] * 3 and len(written) == 1
    printed = capsys.readouterr().out
    assert "is preparing scans" in printed and printed.count("scans: up to date") == 2
    assert os.listdir(tmp_path / "shards") == ["scans"] and len(Shard(tmp_path / "shards/scans/train")) == 8


def test_what_a_living_process_has_begun_is_not_swept(tmp_path):
    scans, partial = put_classes(tmp_path / "scans", 4), tmp_path / "shards/.scans.partial"
    with ThreadPoolExecutor(1) as pool:
        with locked(tmp_path / "shards/scans", "preparing scans"):
            partial.mkdir()
            waiting = pool.submit(prepare_folder, scans, tmp_path / "shards", small())
            time.sleep(0.3)
            assert partial.is_dir() and not waiting.done()
        assert waiting.result() == "scans" and not partial.exists()  # no living process's any more


def test_where_nothing_can_be_written_what_is_prepared_is_found(tmp_path, monkeypatch):
    scans = put_classes(tmp_path / "scans", 4)
    prepare_folder(scans, tmp_path / "shards", small())
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    before = state(tmp_path)
    assert prepare_folder(scans, tmp_path / "shards", small()) == "scans" and state(tmp_path) == before


# ----------------------------------------------------------------------------- refusals

def refused(path, shards_dir, wanted):
    with pytest.raises(UserError) as error:
        prepare_folder(path, shards_dir)
    assert wanted in str(error.value) and len(str(error.value).splitlines()) == 1, error.value
    assert str(path) in str(error.value)
    assert not Path(shards_dir).exists() or not os.listdir(shards_dir)  # nothing that is up to date


@pytest.mark.parametrize("files, wanted", [
    ([], "no image in it that has a class (.png .jpg"),
    (["1.png", "a/2.txt", "a/.3.png"], "no image in it that has a class"),
    (["a/1.png", "a/2.png"], "all its images are of class 'a'; bring some of another"),
    (["a/1.png", "b/2.png", "c/3.dcm"], "no image of class 'c' to train on"),
    (["train/a/1.png", "train/b/2.png"], "no test images; bring some, or give no split and one"),
    (["train/a/1.png", "train/b/2.png", "val/a/1.png"], "no test images"),
    (["test/a/1.png", "test/b/2.png"], "no train images"),
    (["train/a/1.png", "train/b/2.png", "test/a/3.png"], "all test images are of class 'a'"),
    (["train/a/1.png", "train/a/2.png", "test/a/3.png", "test/b/4.png"],
     "all train images are of class 'a'"),
    (["train/a/1.png", "train/b/2.png", "test/a/3.png", "test/c/4.png"],
     "no image of class 'c' to train on"),
    (["train/a/1.png", "train/b/2.png", "val/d/3.png", "test/a/4.png", "test/b/5.png"],
     "no image of class 'd' to train on"),
    (["train/a/1.png", "train/b/2.png", "test/a/3.png", "hold out/a/4.png"],
     "hold out/a/4.png is of split 'hold out', none of train, validation and test"),
    (["a/1.png", "b/2.png", "b /3.png"], "classes 'b' and 'b ' differ in spaces, capitals or zeros alone"),
    (["a/1.png", "b/2.png", " /3.png"], "a class without a name"),
    (["1/1.png", "01/2.png", "b/3.png"], "classes '01' and '1' differ in spaces, capitals or zeros alone"),
    (["train/a/p1/1.png", "train/a/p2/2.png", "train/b/p3/2.png", "test/a/p4/3.png", "test/b/P1/4.png"],
     "patient p1 (by folders inside classes) is in test and in train; keep to one"),
    (["train/a/1.png", "train/B/2.png", "test/a/3.png", "test/b/4.png"], "classes 'B' and 'b' differ"),
    (["images/1.png", "masks/1.png"], "images and masks are no classes"),
    (["train/imagesTr/1.png", "train/labelsTr/1.png", "test/imagesTs/1.png"], "imagesTr and imagesTs")])
def test_a_folder_is_refused_in_one_line(files, wanted, tmp_path):
    (tmp_path / "scans").mkdir()
    for name in files:
        put(tmp_path / "scans" / name)
    refused(tmp_path / "scans", tmp_path / "shards", wanted)


@pytest.mark.parametrize("shards", ["scans/shards", "scans", "."])
def test_prepared_datasets_are_not_read_as_one_s_own(shards, tmp_path):
    put_classes(tmp_path / "scans", 3)
    with pytest.raises(UserError, match="would be read as images of one's own; choose another --shards_dir"):
        prepare_folder(tmp_path / "scans", tmp_path / shards)


@pytest.mark.parametrize("lines, wanted", [
    (["path,class", "0.png,a"], "no column 'label' among its columns path, class"),
    (["name;label", "0.png;a"], "no column 'image' among its columns name, label"),
    ([""], "no column 'image' among its columns"),
    (["path,label"], "no image in it"),
    (["path,label", "0.png,a", "x/gone.png,b", "lost.png,b", "1.png,b"],
     "2 of its 4 files are not there, the first {}/x/gone.png"),
    (["path,label", *(f"{n}.png,a" for n in range(9)), "lost.png,b"], "1 of its 10 files are not there"),
    (["path,label", "0.png,a", "1.png,a"], "all its images are of class 'a'"),
    (["path,label", "0.png,", "1.png,?"], "none of its 2 rows has a label"),
    (["path,label", "0.png,a", "1.png,b,c"], "row 3 has 3 cells, but there are 2 columns"),
    (["path,label,Label", "0.png,a,b", "1.png,b,a"], "2 columns are named 'label'"),
    (["path,label,patient,Patient", "0.png,a,1,1", "1.png,b,2,2"], "2 columns are named 'patient'"),
    (["path,label", "0.png,1", "1.png,0", "2.png,1.0"], "classes '1' and '1.0' differ"),
    (["path,label", *(f"{n}.png,{n}.{n}" for n in range(1, 10)), "0.png,7.7", "10.png,3.5", "11.png,2.4"],
     "11 classes for 12 images, '1.1' among them"),
    (["path,label", "0.png,a", "./0.png,b", "1.png,b"], "2 rows of 0.png; give it one"),
    (["path,label", "0.png,a|b", "1.png,b;a"], "all its images are of class 'a|b'"),
    (["path,label", "0.png,a", "1.png,b", "1.png,a"], "2 rows of 1.png; give it one"),
    (["path,label", "0.png,a", "1.png,b", "2.png,A"], "classes 'A' and 'a' differ"),
    (["path,label,split", "0.png,a,train", "1.png,b,train", "2.png,a,dev"], "2.png is of split 'dev'"),
    (["path,label,split", "0.png,a,train", "1.png,b,train", "2.png,a,"], "2.png is of split ''"),
    (["path,label,split", "0.png,a,train", "1.png,b,train"], "no test images"),
    (["path,label,split", "0.png,a,train", "1.png,b,train", "2.png,b,test", "4.png,c|a,test"],
     "no image of class 'c' to train on"),
    (["path,label,split,patient", "0.png,a,train,p1", "1.png,b,train,p2", "2.png,b,test,p2",
      "3.png,a,test,p3"], "patient p2 (by column patient) is in train and in test"),
    (["path,label", "0.png,a", "\x81.png,b"], "not a csv in UTF-8")])
def test_a_csv_is_refused_in_one_line(lines, wanted, tmp_path):
    table = write_csv(tmp_path / "film", *lines, count=12)
    if "UTF-8" in wanted:
        table.write_text(table.read_text(encoding="utf-8"), encoding="latin-1")
    refused(table, tmp_path / "shards", wanted.replace("{}", str(tmp_path / "film")))


@pytest.mark.parametrize("counts, wanted", [
    ((1, 1), "class 'a' has 1 image: too few to divide; bring more, or give a split"),
    ((8, 1), "class 'b' has 1 image: too few to divide")])
def test_too_few_images_to_make_a_split_are_refused(counts, wanted, tmp_path):
    for name, count in zip("ab", counts):
        put_classes(tmp_path / "scans", count, name)
    refused(tmp_path / "scans", tmp_path / "shards", wanted)


@pytest.mark.parametrize("table", [True, False])
def test_where_no_image_can_be_read_nothing_is_left_that_is_up_to_date(table, tmp_path):
    for number in range(8):
        path = tmp_path / "scans" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / "scans/list.csv").write_text("path,label\n" + "".join(
        f"{'ab'[n % 2]}/{n}.png,{'ab'[n % 2]}\n" for n in range(8)))
    path = tmp_path / "scans/list.csv" if table else tmp_path / "scans"
    for _ in range(2):
        refused(path, tmp_path / "shards", "no sample of it could be used (8 image unreadable: no image" if table else
                "no picture in it can be used: 8 files cannot be used, a/0.png the first: ")


def test_where_no_test_image_can_be_read_nothing_is_left_that_is_up_to_date(tmp_path):
    put_classes(tmp_path / "scans/train", 4)
    for number in range(4):
        path = put_classes(tmp_path / "scans/test", 4) / "ab"[number % 2] / f"{number}.png"
    for path in (tmp_path / "scans/test").rglob("*.png"):
        path.write_bytes(b"cut")
    for _ in range(2):
        refused(tmp_path / "scans", tmp_path / "shards", "scans: test: no sample of it could be used (8 image")


@pytest.mark.parametrize("frames, wanted", [
    ({"a": 1, "b": 1}, "all 12 images of class 'a' are alike; name patients, or give a split"),
    ({"a": 3, "b": 1}, "all 12 images of class 'b' are alike; name patients"),
    ({"a": 2, "b": 3}, "the 12 images of class 'a' are 2 groups of alike ones: too few to divide; name patients"),
    ({"a": 6, "b": 6}, "")])
def test_a_class_of_frames_of_one_film_cannot_be_divided(frames, wanted, tmp_path, capsys):
    """Each class has so many films, of 12 frames together."""
    for name, films in frames.items():
        for number in range(12):
            path = tmp_path / "scans" / name / f"{number}.png"
            put(path, seed=list(f"{name}{number % films}".encode()))
            image = Image.open(path).resize((16 + 8 * number,) * 2, Image.Resampling.NEAREST)
            image.save(path)
    if wanted:
        return refused(tmp_path / "scans", tmp_path / "shards", wanted)
    prepare_folder(tmp_path / "scans", tmp_path / "shards", small())
    assert "24 images are like another one" in capsys.readouterr().out


def test_patients_that_are_too_few_to_divide_are_counted(tmp_path):
    for name in ("a/ann", "a/bob", "b/eve"):
        put_classes(tmp_path / "scans", 3, [name])
    refused(tmp_path / "scans", tmp_path / "shards",
            "the images of class 'b' are of 1 patient, by folders inside classes: too few to divide")


def test_train_and_test_of_the_same_images_are_refused_by_that_reason(tmp_path):
    put_classes(tmp_path / "scans/train", 3)
    for path in (tmp_path / "scans/train").rglob("*.png"):
        copy = tmp_path / "scans/test" / path.relative_to(tmp_path / "scans/train")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    name = prepare_folder(tmp_path / "scans", tmp_path / "shards", small())
    with pytest.raises(UserError, match="train: a test split has all of its images, too, so that none is left"):
        open_splits(tmp_path, name)


def test_a_path_that_no_disk_takes_is_one_line(tmp_path):
    for name in ("x" * 5000, "a\nb/none.csv", "~nobody at all/scans", "nul\0"):
        with pytest.raises(UserError) as error:
            prepare_folder(tmp_path / name, tmp_path / "shards")
        assert len(str(error.value).splitlines()) == 1


def test_what_the_disk_refuses_is_one_line(tmp_path):
    refused(tmp_path / "nowhere", tmp_path / "shards", "no folder and no csv there")
    scans = put_classes(tmp_path / "scans", 3)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="scans: .*Not a directory"):
        prepare_folder(scans, tmp_path / "file" / "shards")


def test_importing_it_loads_no_torch():
    code = "import prepare.folder, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
