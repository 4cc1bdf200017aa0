"""Your own images with boxes: what form they are in, how they are split, and what is refused."""

import io
import json
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from plumbing.flags import UserError
from plumbing.leaks import read_leaks
from plumbing.own import hash_id, secret_of
from plumbing.shards import Shard
from prepare.all import Config, prepare_own
from prepare.box_files import gather
from prepare.leaks import guard
from prepare.own_boxes import class_names, divide_own, find_sources, read_boxes
from prepare.questions import train_sample_tokenizer
from test_bad_input import spoiled
from test_box_data import picture, put, voc

RAW = Path(os.environ.get("NANOMEDQ_RAW", Path(__file__).resolve().parent.parent / "raw"))
SIZE = (40, 20)  # width and height of the pictures


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_sample_tokenizer())
    return path


def prepared(path, tokenizer, **flags):
    """{split: lines of records.jsonl} of a folder or csv."""
    shards = path.parent / "shards"
    config = Config(own=str(path), shards_dir=str(shards), tokenizer=str(tokenizer), image_size=16, workers=1,
                    **flags)
    name = prepare_own(config)
    return {folder.name: Shard(folder).read_records() for folder in (shards / name).iterdir() if folder.is_dir()}


def refused(path, tokenizer, *words):
    with pytest.raises(UserError) as error:
        prepared(path, tokenizer)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


def put_images(folder, count, ending=".png"):
    for number in range(count):
        put(folder / f"{number}{ending}", picture(*SIZE, seed=number))


def questions(records):
    return {(record["image"], record["type"]): record["boxes"][record["type"]]
            for some in records.values() for record in some}


# ----------------------------------------------------------------------------- the forms

def write_voc(folder, count=20):
    put_images(folder / "images", count)
    for number in range(count):
        boxes = [("lesion", 11, 6, 30, 15), ("nodule", 1, 1, 4, 2)][:number % 3]
        put(folder / f"xmls/{number}.xml", voc(f"C:\\old\\{number}.png", boxes))


def write_coco(folder, count=20):
    put_images(folder, count)
    images = [{"id": n, "file_name": f"{n}.png", "width": 40, "height": 20} for n in range(count)]
    boxes = [{"image_id": n, "category_id": 7 + k, "bbox": box} for n in range(count)
             for k, box in enumerate(([10, 5, 20, 10], [0, 0, 4, 2])[:n % 3])]
    put(folder / "anything.json", json.dumps({"images": images, "annotations": boxes, "categories": [
        {"id": 7, "name": "lesion"}, {"id": 8, "name": "nodule"}]}))


def write_yolo(folder, count=20):
    put_images(folder / "images", count)
    put(folder / "data.yaml", "train: ../a\nnc: 2\nnames: ['lesion', \"nodule\"]\n")
    for number in range(1, count):  # an image without a file has no box
        put(folder / f"labels/{number}.txt", "".join(("0 0.5 0.5 0.5 0.5\n", "1 0.05 0.05 0.1 0.1\n")[:number % 3]))


def write_table(corners, scale):
    def write(folder, count=20):
        put_images(folder / "images", count)
        rows = []
        for number in range(count):
            for label, box in (("lesion", (10, 5, 30, 15)), ("nodule", (0, 0, 4, 2)))[:number % 3] or [("", None)]:
                x1, y1, x2, y2 = np.array(box or 4 * [0]) / (SIZE * 2 if scale else 1)
                cells = (x1, y1, x2, y2) if corners else (x1, y1, x2 - x1, y2 - y1)
                rows.append(",".join([f"images/{number}.png", label, *(map(str, cells) if box else "   ")]))
        header = "Image,Label," + ("x1,y1,x2,y2" if corners else "x,y,w,h")
        put(folder / "boxes.csv", "\n".join([header, *rows]).replace(", , , ", ",,,,"))
    return write


FORMS = {"Pascal VOC": write_voc, "COCO": write_coco, "YOLO": write_yolo,
         "csv, two corners in pixels": write_table(True, False), "csv, two corners in shares": write_table(True, True),
         "csv, a corner and a size in pixels": write_table(False, False),
         "csv, a corner and a size in shares": write_table(False, True)}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_says_the_same_boxes(form, tmp_path, tokenizer, capsys):
    folder = tmp_path / "scans"
    FORMS[form](folder)
    records = prepared(folder, tokenizer)
    asked = questions(records)
    said = capsys.readouterr().out
    assert len(asked) == 40 and sum(map(len, records.values())) == 40  # of two labels each image is asked for both
    for (image, label), boxes in asked.items():
        number = int(image.rpartition("/")[2].partition(".")[0])
        there = number % 3 > (label == "nodule")
        assert boxes == ([[250, 250, 750, 750] if label == "lesion" else [0, 0, 100, 100]] if there else []), image
    name, _, how = form.partition(", ")
    assert f"{name} in 1 file: 19 boxes of 2 labels (lesion, nodule) on 20 images" in said.replace("20 files", "1 file")
    assert "a split is made, 80 : 20, by a hash of each image" in said
    assert not how or how.replace("shares", "shares of the image") in said
    assert records.keys() == {"train", "test"} and 1 <= len(records["test"]) / 2 <= 8
    answer = next(record["answer"] for record in records["train"] if record["boxes"].get("lesion"))
    assert answer == "lesion <box>[[250, 250, 750, 750]]</box>"
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "shards/scans").rglob("*")}
    assert prepared(folder, tokenizer).keys() == records.keys() and "up to date" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "shards/scans").rglob("*")}


def test_another_box_or_format_makes_the_dataset_stale(tmp_path, tokenizer, capsys):
    write_coco(tmp_path / "scans")
    prepared(tmp_path / "scans", tokenizer)
    records = prepared(tmp_path / "scans", tokenizer, box_format="qwen")
    assert "box_format was medmo, now qwen" in capsys.readouterr().out
    assert any('"bbox_2d": [250, 250, 750, 750]' in record["answer"] for record in records["train"])
    path = tmp_path / "scans/anything.json"
    put(path, path.read_text().replace("[10, 5, 20, 10]", "[10, 5, 20, 5]"))
    assert [250, 250, 750, 500] in sum(questions(prepared(tmp_path / "scans", tokenizer)).values(), [])


def test_copies_of_training_images_are_asked_about_too(tmp_path, tokenizer):
    write_coco(tmp_path / "scans")
    plain = prepared(tmp_path / "scans", tokenizer)
    more = prepared(tmp_path / "scans", tokenizer, augment=2)
    assert len(more["train"]) == 3 * len(plain["train"]) and len(more["test"]) == len(plain["test"])


@pytest.mark.parametrize("labels, said", [
    (("Cell", "cell"), "'Cell' and 'cell' differ"), (("", "cell"), "without a name")])
def test_labels_that_would_be_asked_for_in_the_same_words_are_refused(labels, said, tmp_path, tokenizer):
    put_images(tmp_path / "scans", 4)
    put(tmp_path / "scans/boxes.csv", "file,class,xmin,ymin,xmax,ymax\n" + "".join(
        f"{number}.png,{labels[number % 2]},1,1,9,9\n" for number in range(4)))
    refused(tmp_path / "scans", tokenizer, said)


def test_a_label_that_makes_an_answer_unreadable_is_counted(tmp_path, tokenizer):
    put_images(tmp_path / "scans", 4)
    put(tmp_path / "scans/boxes.csv", "file,class,xmin,ymin,xmax,ymax\n" + "".join(
        f"{number}.png,a<box>,1,1,9,9\n" for number in range(4)))
    refused(tmp_path / "scans", tokenizer, "boxes that cannot be read back")


def test_boxes_of_an_image_before_its_exif_tag_turns_it_are_refused(tmp_path, tokenizer):
    image, tag = Image.new("RGB", (40, 20)), Image.Exif()
    tag[0x0112] = 6
    (tmp_path / "scans").mkdir()
    image.save(tmp_path / "scans/0.jpg", exif=tag)
    put(tmp_path / "scans/0.xml", voc("0.jpg", [("lesion", 1, 1, 9, 9)]))
    refused(tmp_path / "scans", tokenizer, "shown upright it is 20 x 40 pixels", "EXIF")


def test_a_folder_named_copy_is_no_copy(tmp_path, tokenizer):
    for seed in range(4):
        put(tmp_path / f"scans/train/copy {seed}/x.png", picture(*SIZE, seed=seed))
        put(tmp_path / f"scans/train/copy {seed}/x.txt", "0 .5 .5 .5 .5\n")
    put(tmp_path / "scans/test/x.png", picture(*SIZE, seed=2))
    put(tmp_path / "scans/test/x.txt", "0 .5 .5 .5 .5\n")
    put(tmp_path / "scans/data.yaml", "names: [lesion]")
    assert len(prepared(tmp_path / "scans", tokenizer, augment=1)["train"]) == 8
    guard(tmp_path / "shards")
    assert len(read_leaks(Shard(next((tmp_path / "shards").glob("*/train"))))[1]) == 2


def test_copies_of_a_test_image_are_left_out_with_it(tmp_path, tokenizer):
    for split, seeds in (("train", (1, 2, 3)), ("test", (2,))):
        for seed in seeds:
            put(tmp_path / f"scans/{split}/{seed}.png", picture(*SIZE, seed=seed))
            put(tmp_path / f"scans/{split}/{seed}.txt", "0 .5 .5 .5 .5\n")
    put(tmp_path / "scans/data.yaml", "names: [lesion]")
    train = prepared(tmp_path / "scans", tokenizer, augment=3)["train"]
    guard(tmp_path / "shards")
    _, numbers = read_leaks(Shard(next((tmp_path / "shards").glob("*/train"))))
    found = [record["image"].partition("/copy")[0] for record in (train[number] for number in numbers)]
    assert len(train) == 12 and len(found) == 4 and {*found} == {"train/2.png"}


def test_images_with_labels_alone_have_no_boxes(tmp_path):
    for number, label in enumerate(("benign", "malignant")):
        put_images(tmp_path / "scans" / label, 3)
    put(tmp_path / "scans/notes.json", '{"images": 3}')
    put(tmp_path / "scans/readme.txt", "mine")
    put(tmp_path / "scans/feed.xml", "<rss></rss>")
    put(tmp_path / "scans/list.csv", "path,label\nbenign/0.png,benign\n")
    assert find_sources(tmp_path / "scans") == {} == find_sources(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["names: [a b, 'c, d']", "names:\n  - a b\n  - 'c, d'\nnc: 2",
                                  "names:\n- a b # x\n- c, d", "nc: 2\nnames:\n  0: a b\n  1: \"c, d\"\n",
                                  "names: {0: a b, 1: 'c, d'}"])
def test_yolos_names_are_read_in_each_form(text, tmp_path):
    put(tmp_path / "data.yaml", text)
    assert class_names(tmp_path / "data.yaml") == ["a b", "c, d"]
    put(tmp_path / "classes.txt", "a b\nc, d\n")
    assert class_names(tmp_path / "classes.txt") == ["a b", "c, d"]


# ----------------------------------------------------------------------------- splits

def test_folders_that_are_named_after_splits_are_the_split(tmp_path, tokenizer, capsys):
    for split, seed in (("train", 0), ("valid", 10), ("test", 20)):
        name = f"{seed}_jpg.rf.{seed}" if split != "test" else "0_jpg.rf.9"  # a copy of a film of train
        put(tmp_path / f"scans/{split}/images/{name}.png", picture(*SIZE, seed=seed))
        put(tmp_path / f"scans/{split}/labels/{name}.txt", "0 .5 .5 .5 .5\n")
    put(tmp_path / "scans/data.yaml", "names: [lesion]")
    records = prepared(tmp_path / "scans", tokenizer)
    assert {split: len(some) for split, some in records.items()} == {"train": 1, "validation": 1, "test": 1}
    assert "1 films are in several of its parts, 0_jpg the first" in capsys.readouterr().out


def test_a_json_a_split_is_the_split(tmp_path, tokenizer):
    put_images(tmp_path / "scans/all", 3)
    for number, split in enumerate(("train2017", "val2017", "test")):
        put(tmp_path / f"scans/annotations/instances_{split}.json", json.dumps({
            "images": [{"id": 0, "file_name": f"{number}.png", "width": 40, "height": 20}],
            "annotations": [{"image_id": 0, "category_id": 0, "bbox": [0, 0, 40, 10]}],
            "categories": [{"id": 0, "name": "lesion"}]}))
    records = prepared(tmp_path / "scans", tokenizer)
    assert {split: [record["image"] for record in some] for split, some in records.items()} == {
        "train": ["all/0.png"], "validation": ["all/1.png"], "test": ["all/2.png"]}


def test_films_and_patients_are_not_divided_and_equal_images_stay_together(tmp_path, tokenizer):
    for number in range(60):
        put(tmp_path / f"films/{number // 3}_jpg.rf.{number}.png", picture(*SIZE, seed=number))
        put(tmp_path / f"films/{number // 3}_jpg.rf.{number}.xml", voc("", [("lesion", 1, 1, 9, 9)]))
        put(tmp_path / f"equal/{number}.png", picture(*SIZE, seed=number // 2))
    put(tmp_path / "equal/boxes.csv", "file,class,xmin,ymin,xmax,ymax\n" + "".join(
        f"{number}.png,lesion,1,1,9,9\n" for number in range(60)))
    put(tmp_path / "people.csv", "file,class,xmin,ymin,xmax,ymax,patient\n" + "".join(
        f"equal/{number}.png,lesion,1,1,9,9,p{number // 2 % 15}\n" for number in range(60)))
    for name, of in (("films", lambda name: name.split("_jpg")[0]), ("equal", lambda name: int(name[:-4]) // 2),
                     ("people.csv", lambda name: int(name[6:-4]) // 2 % 15)):
        splits = {}
        for split, some in prepared(tmp_path / name, tokenizer).items():
            for record in some:
                splits.setdefault(of(record["image"]), set()).add(split)
                assert ("group" in record) == (name != "equal")
        assert set(map(len, splits.values())) == {1} and len(set().union(*splits.values())) == 2
        assert len(splits) == {"films": 20, "equal": 30, "people.csv": 15}[name]


def test_a_csv_may_name_splits(tmp_path, tokenizer):
    put_images(tmp_path, 3)
    lines = ["image,label,x,y,width,height,split", *(f"{n}.png,a,0,0,20,10,{split}"
                                                   for n, split in enumerate(("train", "val", "test")))]
    put(tmp_path / "scans.csv", "\n".join(lines))
    assert {split: len(some) for split, some in prepared(tmp_path / "scans.csv", tokenizer).items()} == {
        "train": 1, "validation": 1, "test": 1}
    put(tmp_path / "scans.csv", "\n".join([*lines, "0.png,b,0,0,1,1,test"]))
    refused(tmp_path / "scans.csv", tokenizer, "row 5: 0.png is in two splits")
    put(tmp_path / "scans.csv", "\n".join(lines).replace("val", ""))
    refused(tmp_path / "scans.csv", tokenizer, "1.png is in none of train, validation and test")
    put(tmp_path / "scans.csv", "\n".join(lines).replace("val", "fold 2"))
    refused(tmp_path / "scans.csv", tokenizer, "1.png is of split 'fold 2'")


def test_a_patient_in_two_given_splits_is_refused_and_folds_keep_patients_whole(tmp_path, tokenizer):
    put_images(tmp_path, 20)
    rows = [f"{n}.png,a,1,1,9,9,P{n // 2}" for n in range(20)]
    put(tmp_path / "scans.csv", "\n".join(["image,label,x1,y1,x2,y2,patient", *rows]))
    tested = []
    for fold in range(3):
        records = prepared(tmp_path / "scans.csv", tokenizer, folds=3, fold=fold)
        groups = {split: {record["group"] for record in some} for split, some in records.items()}
        assert not groups["train"] & groups["test"] and len(groups["train"] | groups["test"]) == 10
        tested += groups["test"]
    assert len(tested) == len(set(tested)) == 10
    assert set(tested) == {f"patient {hash_id(secret_of(tmp_path), f'p{n}')}" for n in range(10)}
    put(tmp_path / "scans.csv", "\n".join(["image,label,x1,y1,x2,y2,patient,split", *(
        f"{row},{'test' if n in (3, 4) else 'train'}" for n, row in enumerate(rows))]))
    refused(tmp_path / "scans.csv", tokenizer, "patient p1 is in train", "and in test")


def test_columns_may_be_called_anything_in_any_encoding(tmp_path, tokenizer):
    put_images(tmp_path, 12)
    rows = ["sep=;", "Bild;Befund;x1;y1;x2;y2;Fall", *(f"{n}.png;cyst;1;1;9;9;{n // 2}" for n in range(12))]
    (tmp_path / "scans.csv").write_text("\n".join(rows), encoding="utf-16")
    records = prepared(tmp_path / "scans.csv", tokenizer, columns="image:Bild,label:Befund,patient:Fall")
    sides = [{record["group"] for record in some} for some in records.values()]
    assert sum(map(len, sides)) == 6 == len(set.union(*sides))
    with pytest.raises(UserError, match="patient:nobody: scans.csv has no such column"):
        prepared(tmp_path / "scans.csv", tokenizer, columns="image:Bild,label:Befund,patient:nobody")


def test_what_is_too_large_to_look_into_is_said(tmp_path, tokenizer, monkeypatch):
    write_coco(tmp_path / "scans", 4)
    monkeypatch.setattr("prepare.own_boxes.LARGEST_JSON", 99)
    refused(tmp_path / "scans", tokenizer, ".json: a JSON of more than 0 MiB, which may be COCO's")


def test_the_lists_of_image_sets_are_the_split(tmp_path, tokenizer):
    write_voc(tmp_path / "scans", 6)
    for split, numbers in (("train", "0 1 2"), ("val", "3"), ("test", "4 5"), ("trainval", "0 1 2 3"),
                           ("cell_train", "5")):
        put(tmp_path / f"scans/ImageSets/Main/{split}.txt", "\n".join(numbers.split()))
    records = prepared(tmp_path / "scans", tokenizer)
    assert {split: {record["image"] for record in some} for split, some in records.items()} == {
        "train": {f"images/{n}.png" for n in (0, 1, 2)}, "validation": {"images/3.png"},
        "test": {"images/4.png", "images/5.png"}}


# ----------------------------------------------------------------------------- scans

def test_boxes_on_dicom_are_shares_of_the_pictures_size(tmp_path, tokenizer):
    pytest.importorskip("pydicom")
    from test_dicom import made, save

    rows = ["image,label,x1,y1,x2,y2"]
    (tmp_path / "scans").mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 100, (20, 40)).astype(np.int16)
        save(tmp_path / f"scans/{number}.dcm", made(
            pixels, PatientID=f"MRN{number // 2}", SeriesInstanceUID=f"1.{number}"))
        rows.append(f"{number}.dcm,lesion,10,5,30,15")
    put(tmp_path / "scans/boxes.csv", "\n".join(rows))
    records = prepared(tmp_path / "scans", tokenizer, window="soft", augment=1)
    every = [record for some in records.values() for record in some]
    assert all(record["boxes"]["lesion"] == [[250, 250, 750, 750]] for record in every if "copy" not in record["image"])
    assert len({record["group"] for record in every}) == 6 and not any("MRN" in str(record) for record in every)
    assert all(record["image"].startswith("scan ") for record in every)
    assert len(records["train"]) == 2 * (12 - len(records["test"]))
    manifest = Shard(next((tmp_path / "shards").glob("scans/train"))).manifest
    assert manifest["image"]["window"] == "soft"
    stream = io.BytesIO()
    pages = [Image.open(io.BytesIO(picture(*SIZE, seed=seed))) for seed in (1, 2)]
    pages[0].save(stream, "TIFF", save_all=True, append_images=pages[1:])
    put(tmp_path / "scans/0.tif", stream.getvalue())
    put(tmp_path / "scans/boxes.csv", "\n".join([*rows, "0.tif,lesion,10,5,30,15"]))
    refused(tmp_path / "scans", tokenizer, "0.tif: 2 pictures in it, and boxes do not say on which of them they are")


# ----------------------------------------------------------------------------- real data

@pytest.mark.parametrize("folder, splits, boxes, said", [
    ("bccd/BCCD", {"train": 205, "validation": 87, "test": 36}, {"RBC": 3754, "WBC": 337, "Platelets": 323}, ""),
    ("dental_xray_cv", {"train": 293, "validation": 34, "test": 30},
     {"Fillings": 1798, "Implant": 563, "Cavity": 151, "Impacted Tooth": 140}, "; 48 films are in several of its")])
def test_published_boxes_are_read_as_they_are(folder, splits, boxes, said):
    """The counts are those of the published files, less BCCD's two boxes without an area."""
    if not (RAW / folder).exists():
        pytest.skip(f"no real data in {RAW}; set NANOMEDQ_RAW to a folder of it")
    found = read_boxes(RAW / folder, find_sources(RAW / folder))
    gathered = gather(folder, found.rows)
    assert Counter(label for of in gathered.values() for label, some in of.items() for _ in some) == boxes
    divided, how = divide_own(RAW / folder, found)
    assert Counter(divided.values()) == splits and how.startswith(f"the split is the one that is given{said}")
    if found.films:  # the split that is given divides films, folds do not
        divided, how = divide_own(RAW / folder, found._replace(splits={}), folds=5, fold=0)
        sides = {(found.films[name], split) for name, split in divided.items()}
        assert len(sides) == len(set(found.films.values())) == 179 and how.endswith("by film")


# ----------------------------------------------------------------------------- what is said and refused

def test_what_is_odd_is_counted(tmp_path, tokenizer, capsys):
    folder = tmp_path / "scans"
    write_voc(folder)
    put(folder / "xmls/1.xml", voc("1.png", [("lesion", 11, 6, 30, 15), ("lesion", 3, 3, 3, 9)]))
    put(folder / "xmls/4.xml", voc("4.png", [("lesion", 11, 6, 99, 15)], size=(80, 40)))
    put(folder / "xmls/99.xml", voc("99.png", [("lesion", 11, 6, 30, 15)]))  # without an image
    put(folder / "images/more.png", picture(seed=77))  # without an XML
    records = prepared(folder, tokenizer)
    said = capsys.readouterr().out
    for words in ("scans: boxes that reach beyond their image, cut: 1, of images/4.png the first",
                  "scans: boxes without an area, left out: 1, of images/1.png the first",
                  "1 images have another size than their boxes' file says, images/4.png the first",
                  "1 images are in no file of boxes, images/more.png the first: passed over",
                  "skipped: 2 image missing (99.png the first)"):
        assert words in said, (words, said)
    assert questions(records)["images/1.png", "lesion"] == [[250, 250, 750, 750]]


def test_two_forms_or_none_that_can_be_read_are_refused(tmp_path, tokenizer):
    write_voc(tmp_path / "scans")
    write_coco(tmp_path / "scans/more")
    refused(tmp_path / "scans", tokenizer, "boxes in more than one form", "(Pascal VOC)", "anything.json (COCO)")
    write_coco(tmp_path / "few", 1)
    refused(tmp_path / "few", tokenizer, "not one box")
    write_yolo(tmp_path / "yolo")
    put(tmp_path / "yolo/labels/3.txt", "2 .5 .5 .1 .1")
    refused(tmp_path / "yolo", tokenizer, "labels/3.txt: line 1 is of class 2, but the classes are 0 to 1")
    put(tmp_path / "yolo/data.yaml", "nc: 2")
    refused(tmp_path / "yolo", tokenizer, "data.yaml: no list of `names:`")
    put_images(tmp_path / "table", 2)
    put(tmp_path / "table/a.csv", "image,label,x1,y1,x2,y2\n0.png,a,0,0,1\n")
    refused(tmp_path / "table", tokenizer, "a.csv: row 2: '' is no number")
    put(tmp_path / "table/b.csv", "image,label,x1,y1,x2,y2\n0.png,a,0,0,1,1\n")
    refused(tmp_path / "table", tokenizer, "a.csv", "b.csv", "--own=")


def test_a_name_that_is_two_images_is_refused_and_none_leads_out_of_the_folder(tmp_path, tokenizer):
    write_coco(tmp_path / "scans", 4)
    put(tmp_path / "scans/sub/0.png", picture(seed=50))
    boxes = read_boxes(tmp_path / "scans", find_sources(tmp_path / "scans"))
    assert len(boxes.pictures) == 4  # of two the one beside the JSON
    put(tmp_path / "scans/other/0.png", picture(seed=51))
    (tmp_path / "scans/0.png").unlink()
    refused(tmp_path / "scans", tokenizer, "2 images are called '0.png'; name it by its path")
    put(tmp_path / "secret.png", picture(seed=9))
    path = tmp_path / "scans/anything.json"
    put(path, path.read_text().replace('"0.png"', '"../secret.png"').replace('"1.png"', f'"{tmp_path}/secret.png"'))
    boxes = read_boxes(tmp_path / "scans", find_sources(tmp_path / "scans"))
    assert Counter(file is None for file in boxes.pictures.values()) == {True: 2, False: 2}


@pytest.mark.parametrize("form", list(FORMS)[:4])
def test_a_spoiled_file_is_refused_in_one_line_or_read(form, tmp_path):
    folder, draw = tmp_path / "scans", random.Random(form)
    FORMS[form](folder, 6)
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".png"):
        content = path.read_bytes()
        ways = list(spoiled(path.name, content, draw))
        for changed in draw.sample(ways, min(40, len(ways))):
            path.write_bytes(changed)
            try:
                if sources := find_sources(folder):
                    boxes = read_boxes(folder, sources)
                    divide_own(folder, boxes)
                    assert all(0 <= edge <= 1 for some in gather("scans", boxes.rows).values()
                               for of_label in some.values() for box in of_label for edge in box)
            except UserError as error:
                assert len(str(error)) < 1500 and str(folder) in str(error), error
        path.write_bytes(content)
