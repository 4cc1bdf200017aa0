"""A user's own folder or csv of images: prepared without code, refused in one line, never read twice."""

import io
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import prepare.folder
from data import Shard
from plumbing.flags import UserError
from plumbing.pixels import SUFFIXES, load_image
from prepare.folder import find_dataset, prepare_folder
from prepare.listing import files_below, is_image
from prepare.shards import locked, read_manifests

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """Images are encoded by threads here: that processes make the same bytes is test_prepare.py's."""
    monkeypatch.setattr("prepare.shards.ProcessPoolExecutor", lambda workers, *rest: ThreadPoolExecutor(workers))


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
        name = prepare_folder(path, tmp_path / "shards", image_size)
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
    assert shard.read_leaks()[0] == "drop" and not list((tmp_path / "shards").rglob("tokenizer.model"))
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
    assert "image was {'size': 16" in prepare(scans, image_size=24)[2]
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
    name, splits, _ = prepare(tmp_path / "scans")
    numbers = Shard(tmp_path / "shards/scans/train").read_leaks()[1].tolist()
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
    for split in ("train", "test"):
        records = Shard(tmp_path / "shards/list" / split).read_records()
        assert all(record["group"] == (f"patient p{number // 4}" if number < 36 else f"like {number}.png")
                   for record in records for number in [int(record["image"].split(".")[0])])


def test_few_missing_files_are_skipped_and_counted(prepare, tmp_path):
    lines = [f"{n}.png,{'ab'[n % 2]}" for n in range(20)]
    _, splits, printed = prepare(write_csv(tmp_path, "path,label", *lines, "gone.png,a", count=20))
    assert len(sides(splits)) == 20 and printed.count("skipped: 1 image missing") == 1


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
    (["train/a/1.png", "train/B/2.png", "test/a/3.png", "test/b/4.png"], "classes 'B' and 'b' differ")])
def test_a_folder_is_refused_in_one_line(files, wanted, tmp_path):
    (tmp_path / "scans").mkdir()
    for name in files:
        put(tmp_path / "scans" / name)
    refused(tmp_path / "scans", tmp_path / "shards", wanted)


@pytest.mark.parametrize("lines, wanted", [
    (["path,class", "0.png,a"], "no column 'label' among its columns path, class"),
    (["name;label", "0.png;a"], "no column 'path' among its columns name, label"),
    ([""], "no column 'path' among its columns"),
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
    (["path,label", "0.png,a", "é.png,b"], "not a csv in UTF-8")])
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


def test_what_the_disk_refuses_is_one_line(tmp_path):
    refused(tmp_path / "nowhere", tmp_path / "shards", "no folder and no csv there")
    scans = put_classes(tmp_path / "scans", 3)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="scans: .*Not a directory"):
        prepare_folder(scans, tmp_path / "file" / "shards")


def test_importing_it_loads_no_torch():
    code = "import prepare.folder, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
