"""The datasets of boxes: each from a small copy of its layout and, where NANOMEDQ_RAW has them, from real files."""

import io
import json
import os
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from plumbing.flags import UserError
from prepare.box_files import gather, image_size, read_coco, read_voc, read_yolo
from prepare.boxes import asked_labels, bound_patches, merge_readers
from prepare.datasets import DATASETS
from test_classify import put, read, refused

RAW = Path(os.environ.get("NANOMEDQ_RAW", "raw"))
NAMES = [name for name, facts in DATASETS.items() if facts.kind == "boxes" and not facts.drawn]


def picture(width=40, height=20, seed=0, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, "PNG")
    return stream.getvalue()


def real(folder):
    """A folder of real files; the test is skipped where there is none."""
    if not (RAW / folder).is_dir():
        pytest.skip(f"needs {folder} in the folder that NANOMEDQ_RAW names")
    return RAW / folder


def boxes_of(records):
    """{(split, image name, label): boxes}, and a check that every question is asked of its label."""
    found = {}
    for split, record in records:
        assert (split, record.image_name, record.question) not in found and record.answer == ""
        (label, boxes), = record.boxes.items()
        assert record.question == f"detect {label}"
        found[split, record.image_name, label] = boxes
    return found


# ----------------------------------------------------------------------------- small copies

def voc(name, boxes, size=(40, 20), more=""):
    objects = "".join(f"<object><name>{label}</name><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax>"
                      f"<ymax>{y2}</ymax></bndbox></object>" for label, x1, y1, x2, y2 in boxes)
    return (f"{more}<annotation><filename>{name}</filename><size><width>{size[0]}</width><height>{size[1]}</height>"
            f"<depth>3</depth></size>{objects}</annotation>")


def write_bccd(raw):
    cells = [("RBC", 1, 1, 20, 10), ("RBC", 21, 11, 40, 20), ("WBC", 5, 5, 8, 8), ("RBC", 7, 9, 7, 9)]
    for number, (split, boxes) in enumerate((("train", cells), ("val", []), ("test", [("Platelets", 1, 1, 40, 20)]))):
        put(raw / f"BCCD/Annotations/B{number}.xml", voc(f"B{number}.jpg", boxes))
        put(raw / f"BCCD/JPEGImages/B{number}.jpg", picture(seed=number))
        put(raw / f"BCCD/ImageSets/Main/{split}.txt", f"B{number}\n")


def write_dental(raw):
    for number in range(12):  # three copies of each film, in three folders
        name = f"{number // 3:04}_jpg.rf.{number:032x}"
        folder = raw / "data" / ("train", "valid", "test")[number % 3]
        put(folder / f"images/{name}.jpg", picture(seed=number))
        put(folder / f"labels/{name}.txt", "1 0.5 0.5 0.2 0.4\n1 0.25 0.25 0.5 0.5\n3 0.1 0.2 0.1 0.1\n" * (number > 2))


def write_nih(raw):
    rows = ("00000001_000.png,Atelectasis,256,512,256,128,,,", "00000001_000.png,Infiltrate,0,0,1024,1024,,,",
            "00000001_001.png,Mass,1000,1000,48,12", "00000002_000.png,Nodule,10,10,20,20")
    put(raw / "BBox_List_2017.csv", "Image Index,Finding Label,Bbox [x,y,w,h],,,\n" + "\n".join(rows) + "\n")
    put(raw / "images/00000001_000.png", picture())


def write_rsna(raw):
    rows = ("a,,,,,0", "b,256,0,512,1024.0,1", "b,0,0,128,256,1", "c,,,,,0")
    put(raw / "stage_2_train_labels.csv", "patientId,x,y,width,height,Target\n" + "\n".join(rows) + "\n")
    put(raw / "stage_2_train_images/b.png", picture())


def write_chestx(*names):
    def write(raw):
        for name in names:
            rows = [{"file_name": "1.png", "syms": ["Mass", "Nodule", "Mass", "Mass"],
                     "boxes": [[0, 0, 512, 1024], [1, 2, 3, 4], [0, 0, 512, 1024], [512, 0, 1024, 512]],
                     "polygons": [[[0, 1]]]}, {"file_name": "2.png", "syms": [], "boxes": [], "polygons": []}]
            put(raw / name, json.dumps(rows))
        put(raw / "train_data/1.png", picture())
    return write


def write_vindr(raw):
    head = "image_id,rad_id,class_name,x_min,y_min,x_max,y_max\n"
    rows = ("f,R1,Mass,0,0,20,10", "f,R2,Mass,2,0,20,10", "f,R3,Mass,20,10,40,20", "f,R1,Nodule,0,0,4,4",
            "f,R2,No finding,,,,", "g,R1,No finding,,,,")
    put(raw / "annotations/annotations_train.csv", head + "\n".join(rows) + "\n")
    head = head.replace("rad_id,", "")
    put(raw / "annotations/annotations_test.csv", head + "h,Nodule,0,0,40,10\ni,No finding,,,,\n")
    for split, names in (("train", "fg"), ("test", "hi")):
        for name in names:
            put(raw / f"{split}/{name}.png", picture(seed=ord(name)))


def write_ms_cxr(raw):
    path = "files/p10/p10000032/s50414267/a.jpg"
    content = {"images": [{"id": 5, "file_name": "a.jpg", "path": path, "width": 40, "height": 20}],
               "categories": [{"id": 2, "name": "Pneumonia"}],
               "annotations": [{"image_id": 5, "category_id": 2, "bbox": [10, 5, 20, 10], "label_text": "left opacity"},
                               {"image_id": 5, "category_id": 2, "bbox": [0, 0, 4, 2], "label_text": "left opacity"}]}
    put(raw / "MS_CXR_Local_Alignment_v1.0.0.json", json.dumps(content))
    put(raw / path, picture())


def write_deeplesion(raw):
    head = "File_name,Patient_index,Bounding_boxes,Image_size,DICOM_windows,Train_Val_Test\n"
    row = '00008{}_01_01_037.png,8{},"128, 256, 256, 512","512, 512","-100, 100",{}\n'
    put(raw / "DL_info.csv", head + "".join(row.format(n, n, n) for n in (1, 2, 3)))
    slices = np.linspace(-200, 200, 64).round().reshape(8, 8) + 32768
    stream = io.BytesIO()
    Image.fromarray(slices.astype(np.uint16)).save(stream, "PNG")
    put(raw / "Images_png/000081_01_01/037.png", stream.getvalue())


def write_slake(raw):
    boxes = [{"Left Lung": [10, 5, 20, 10]}, {"Left Lung": [0, 0, 4, 2]}, {"Heart": [0, 0, 40, 20]}]
    for number, split in enumerate(("train", "validate", "test")):
        put(raw / f"{split}.json", json.dumps([{"img_name": f"xmlab{number}/source.jpg", "q_lang": "en"}]))
        put(raw / f"imgs/xmlab{number}/source.jpg", picture(seed=number))
        put(raw / f"imgs/xmlab{number}/detection.json", json.dumps(boxes[number:]))


def mask(*patches):
    pixels = np.zeros((100, 200), np.uint8)
    for x1, y1, x2, y2 in patches:
        pixels[y1:y2, x1:x2] = 255
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_busi(raw):
    folder = raw / "Dataset_BUSI_with_GT"
    for number, label in enumerate(("benign", "malignant", "normal")):
        put(folder / f"{label}/{label} (1).png", picture(200, 100, number))
    put(folder / "benign/benign (1)_mask.png", mask((20, 10, 60, 50), (60, 50, 80, 60), (100, 0, 102, 2)))
    put(folder / "benign/benign (1)_mask_1.png", mask((150, 50, 200, 100)))
    put(folder / "benign/benign (10)_mask.png", mask((0, 0, 200, 100)))  # another image's
    put(folder / "malignant/malignant (1)_mask.png", mask())
    put(folder / "normal/normal (1)_mask.png", mask())


WRITERS = {"bccd": write_bccd, "dental_xray_cv": write_dental, "nih_boxes": write_nih, "rsna_boxes": write_rsna,
           "chestx_det10": write_chestx("train.json", "test.json"),
           "chestx_det": write_chestx("ChestX_Det_train.json", "ChestX_Det_test.json"), "vindr_cxr": write_vindr,
           "ms_cxr": write_ms_cxr, "deeplesion": write_deeplesion, "slake_boxes": write_slake, "busi_boxes": write_busi}


@pytest.mark.parametrize("name", NAMES)
def test_small_copies_are_found_and_read_by_name_alone(name, tmp_path):
    facts = DATASETS[name]
    WRITERS[name](facts.raw(tmp_path))
    assert facts.find(tmp_path) and facts.only_by_name and facts.kind == "boxes" and facts.asks
    records = read(name, facts.raw(tmp_path))
    boxes_of((split, record) for split, record in records if record.boxes)
    assert len({record.id for _, record in records}) == len(records) > 1 or name == "ms_cxr"
    for _, record in records:
        for box in (record.boxes or {}).get(record.question.removeprefix("detect "), ()):
            assert 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1 and len(box) == 4


# ----------------------------------------------------------------------------- what each says

def test_bccds_corners_count_from_1_and_a_box_without_an_area_is_counted(tmp_path, capsys):
    write_bccd(tmp_path)
    found = boxes_of(read("bccd", tmp_path))
    assert found["train", "B0.jpg", "red blood cell"] == ((0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1))
    assert found["train", "B0.jpg", "white blood cell"] == ((4 / 40, 4 / 20, 8 / 40, 8 / 20),)
    assert found["train", "B0.jpg", "platelet"] == () and found["test", "B2.jpg", "platelet"] == ((0, 0, 1, 1),)
    assert [boxes for (split, *_), boxes in found.items() if split == "validation"] == [()] * 3 and len(found) == 9
    assert capsys.readouterr().out == "bccd train: boxes without an area, left out: 1, of B0 the first\n"


def test_copies_of_a_dental_film_are_in_one_split(tmp_path):
    write_dental(tmp_path)
    splits, found = defaultdict(set), read("dental_xray_cv", tmp_path)
    for split, record in found:
        splits[record.group].add(split)
    assert splits.keys() == {"0000_jpg", "0001_jpg", "0002_jpg", "0003_jpg"} and set(map(len, splits.values())) == {1}
    filling = next(record for _, record in found if record.group == "0002_jpg" and record.type == "filling")
    assert np.allclose(filling.boxes["filling"], [(0.4, 0.3, 0.6, 0.7), (0, 0, 0.5, 0.5)])
    assert len(found) == 12 * 4 and all(record.boxes[record.type] == () for _, record in found
                                        if record.group == "0000_jpg")


def test_nihs_header_has_one_name_over_four_columns_and_patients_are_not_divided(tmp_path, capsys):
    write_nih(tmp_path)
    records = read("nih_boxes", tmp_path)
    found = {key[1:]: boxes for key, boxes in boxes_of(records).items()}
    assert found == {("00000001_000.png", "atelectasis"): ((0.25, 0.5, 0.5, 0.625),),
                     ("00000001_000.png", "infiltration"): ((0, 0, 1, 1),),
                     ("00000001_001.png", "mass"): ((1000 / 1024, 1000 / 1024, 1, 1012 / 1024),),
                     ("00000002_000.png", "nodule"): ((10 / 1024, 10 / 1024, 30 / 1024, 30 / 1024),)}
    assert len({split for split, record in records if record.group == "00000001"}) == 1
    assert "boxes that reach beyond their image, cut: 1, of 00000001_001.png the first" in capsys.readouterr().out
    assert [record.image is None for _, record in records].count(False) == 2  # where the film is at hand


def test_films_without_a_box_are_asked_for_it_in_vain(tmp_path):
    write_rsna(tmp_path)
    found = {name: boxes for (_, name, label), boxes in boxes_of(read("rsna_boxes", tmp_path)).items()}
    assert found == {"stage_2_train_images/a.png": (), "stage_2_train_images/c.png": (),
                     "stage_2_train_images/b.png": ((0.25, 0, 0.75, 1), (0, 0, 0.125, 0.25))}
    path = tmp_path / "stage_2_train_labels.csv"
    put(path, path.read_text().replace("b,256", "b,"))
    refused("rsna_boxes", tmp_path, f"{path}: row 3: '' is no number")


@pytest.mark.parametrize("name", ["chestx_det10", "chestx_det"])
def test_chestx_det_asks_for_what_there_is_and_for_one_that_is_not(name, tmp_path, capsys):
    WRITERS[name](tmp_path)
    found = boxes_of(read(name, tmp_path))
    assert found["train", "train_data/1.png", "mass"] == ((0, 0, 0.5, 1), (0.5, 0, 1, 0.5))
    assert "boxes that stand there twice, left out once: 1, of 1.png the first" in capsys.readouterr().out
    asked = Counter((image, boxes == ()) for (split, image, _), boxes in found.items() if split == "test")
    assert asked == {("test_data/1.png", False): 2, ("test_data/1.png", True): 1, ("test_data/2.png", True): 1}


def test_absent_labels_are_asked_for_alike_often_and_of_a_label_without_a_known_box_nothing_is_asked():
    labels = list("abcdefgh")
    picked = Counter(asked_labels(f"{number}.png", {"a": [1], "b": []}, labels)[-1] for number in range(600))
    assert picked.keys() == set("cdefgh") and min(picked.values()) > 70
    assert all(asked_labels("x", {"a": [1], "b": []}, labels)[:-1] == ["a"] for _ in range(3))
    assert asked_labels("x", {"b": [], "c": [1]}, list("abcd")) == ["a", "c", "d"]


def test_of_three_readers_two_have_to_agree(tmp_path, capsys):
    a, b, c = (0.0, 0.0, 0.4, 0.4), (0.0, 0.0, 0.4, 0.3), (0.5, 0.5, 0.9, 0.9)
    assert np.allclose(merge_readers([("1", a), ("2", b), ("3", c)]), [(0, 0, 0.4, 0.35)])
    assert np.allclose(merge_readers([("1", a), ("2", c), ("2", b), ("3", c)]), [(0, 0, 0.4, 0.35), c])
    assert merge_readers([("1", a), ("1", b), ("2", c)]) == []  # one reader twice is one
    assert merge_readers([("1", a), ("2", (0.0, 0.0, 0.4, 0.2)), ("3", (0.3, 0.3, 0.4, 0.4))]) == []  # an IoU of 0.5
    write_vindr(tmp_path)
    found = boxes_of(read("vindr_cxr", tmp_path))
    assert found.pop(("train", "train/f.png", "mass")) == ((1 / 40, 0, 0.5, 0.5),)
    assert found.pop(("test", "test/h.png", "nodule")) == ((0, 0, 1, 0.5),)
    assert ("train", "train/f.png", "nodule") not in found  # of one reader alone: neither there nor absent
    assert set(found.values()) == {()} and {key[1] for key in found} == {"train/g.png", "test/h.png", "test/i.png"}


def test_films_that_were_made_smaller_need_their_first_sizes(tmp_path):
    write_vindr(tmp_path)
    put(tmp_path / "train/f.png", picture(20, 10))
    refused("vindr_cxr", tmp_path, "row 4: a box beyond its film of 20 x 10 pixels", "train_meta.csv")
    put(tmp_path / "train_meta.csv", "image_id,dim0,dim1\nf,20,40\n")
    assert boxes_of(read("vindr_cxr", tmp_path))["train", "train/f.png", "mass"] == ((1 / 40, 0, 0.5, 0.5),)


def test_a_phrase_of_ms_cxr_is_what_is_asked_for_and_its_finding_the_type(tmp_path):
    write_ms_cxr(tmp_path)
    (_, record), = read("ms_cxr", tmp_path)
    assert record.question == "detect left opacity" and record.type == "pneumonia" and record.group == "p10000032"
    assert record.boxes == {"left opacity": ((0.25, 0.25, 0.75, 0.75), (0, 0, 0.1, 0.1))}


def test_a_slice_is_shown_in_its_window(tmp_path):
    write_deeplesion(tmp_path)
    records = read("deeplesion", tmp_path)
    assert [(split, record.group, record.boxes) for split, record in records] == [
        (split, f"patient 8{n}", {"lesion": ((0.25, 0.5, 0.5, 1),)})
        for n, split in ((1, "train"), (2, "validation"), (3, "test"))]
    shown = np.asarray(Image.open(io.BytesIO(records[0][1].image)))
    expected = np.clip((np.linspace(-200, 200, 64).round() + 100) / 200, 0, 1) * 255
    assert np.abs(shown.ravel() - expected).max() <= 0.51 and records[1][1].image is None


def test_slakes_boxes_are_corner_and_size_and_its_splits_those_of_its_questions(tmp_path):
    write_slake(tmp_path)
    found = boxes_of(read("slake_boxes", tmp_path))
    assert found["train", "xmlab0/source.jpg", "left lung"] == ((0.25, 0.25, 0.75, 0.75), (0, 0, 0.1, 0.1))
    assert found["test", "xmlab2/source.jpg", "left lung"] == () and found["test", "xmlab2/source.jpg", "heart"]


def test_busis_boxes_bound_all_masks_of_an_image_but_no_specks(tmp_path):
    write_busi(tmp_path)
    records = {record.type + record.image_name: record for _, record in read("busi_boxes", tmp_path)}
    assert records["lesionbenign/benign (1).png"].boxes == {"lesion": ((0.1, 0.1, 0.4, 0.6), (0.75, 0.5, 1, 1))}
    assert records["lesionnormal/normal (1).png"].boxes == {"lesion": ()}
    without = records["lesionmalignant/malignant (1).png"]
    assert without.boxes is None and without.answer == ""  # an empty answer: skipped and counted


def test_patches_are_joined_along_sides_and_corners():
    drawn = np.array([[1, 0, 1, 0, 0], [1, 0, 1, 0, 1], [0, 1, 0, 0, 0], [0, 0, 0, 1, 1]], bool)
    assert sorted(bound_patches(drawn)) == [(1, (4, 1, 5, 2)), (2, (3, 3, 5, 4)), (5, (0, 0, 3, 3))]
    assert bound_patches(np.zeros((3, 4), bool)) == [] and bound_patches(np.ones((3, 4), bool)) == [(12, (0, 0, 4, 3))]


# ----------------------------------------------------------------------------- files

@pytest.mark.parametrize("content, words", [
    ("", "damaged XML"), ("<a/>", "outermost tag is 'a'"), ("<annotation>", "damaged XML"),
    (voc("a", [], more='<!DOCTYPE a [<!ENTITY b "c">]>'), "DOCTYPE"), ("<annotation>\0</annotation>", "DOCTYPE"),
    (voc("a", [("x", 1, 2, "nan", 4)]), "bndbox/xmax: 'nan' is no number"),
    (voc("a", [("x", 1, 2, "1e999", 4)]), "'1e999' is no number"), (voc("a", [], size=("", 2)), "'none' is no number"),
    (voc("a", [("x", 1, 2, 3, 4)], size=(0, 20)), "an image of 0 x 20 pixels"),
    ("x" * (1 << 21), "more than the boxes"),
    ("<annotation>" + "<b>" * 100_000, "damaged XML"), (b"\xff\xfe<\0a\0", "damaged text")])
def test_hostile_xml_is_refused_in_one_line(content, words):
    with pytest.raises(UserError, match=r"^a\.xml: [^\n]*$") as error:
        read_voc("a.xml", content if isinstance(content, bytes) else content.encode())
    assert words in str(error.value)


@pytest.mark.parametrize("line, words", [
    ("0 1 2 3", "line 2 has 4 numbers"), ("2 0 0 1 1", "line 2 is of class 2, but the classes are 0 to 1"),
    ("-1 0 0 1 1", "class -1"), ("0.5 0 0 1 1", "class 0.5"), ("0 0 0 inf 1", "'inf' is no number"), ("a", "no number"),
    ("0 0 0 1 1 1 1 1", "line 2 has 8 numbers"), ("0 " * 100_000, "numbers, not 5")])
def test_a_wrong_line_of_yolos_is_refused_by_its_number(line, words):
    with pytest.raises(UserError, match=r"^a\.txt: line 2[^\n]*$") as error:
        read_yolo("a.txt", f"1 .5 .5 .5 .5\n{line}\n".encode(), ["a", "b"])
    assert words in str(error.value)


def test_a_polygon_is_bounded():
    assert read_yolo("a", b"1 .1 .2 .5 .3 .4 .9\n\n", ["a", "b"]) == [("b", (0.1, 0.2, 0.5, 0.9))]


@pytest.mark.parametrize("change, words", [
    ({"image_id": 9}, "annotation 1: no image_id '9'"), ({"category_id": None}, "no category_id ''"),
    ({"bbox": [1, 2, 3]}, "a bbox of 3 numbers"), ({"bbox": "1234"}, "str found where list"),
    ({"bbox": [1, 2, 3, [4]]}, "list found where str"), ({"bbox": [1, 2, 3, True]}, "'True' is no number"),
    ({"bbox": [1, 2, float("inf"), 4]}, "'inf' is no number")])
def test_a_wrong_annotation_of_cocos_is_refused_by_its_number(change, words, tmp_path):
    row = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]} | change
    content = {"images": [{"id": 1, "file_name": "a", "width": 8, "height": 8}],
               "categories": [{"id": 1, "name": "x"}], "annotations": [row]}
    put(tmp_path / "a.json", json.dumps(content))
    with pytest.raises(UserError, match=r"a\.json: annotation 1[^\n]*$") as error:
        read_coco(tmp_path / "a.json")
    assert words in str(error.value)


def test_boxes_are_cut_to_their_image_and_a_label_without_one_stays(capsys):
    rows = [("a", "x", (-0.5, 0.2, 0.5, 1.5)), ("a", "y", (0.4, 0.4, 0.4, 0.9)), ("b", "", None),
            ("a", "x", (2, 2, 3, 3))]
    assert gather("set", rows) == {"a": {"x": [(0, 0.2, 0.5, 1)], "y": []}, "b": {}}
    assert capsys.readouterr().out.splitlines() == [
        "set: boxes that reach beyond their image, cut: 2, of a the first",
        "set: boxes without an area, left out: 2, of a the first"]


def test_an_images_size_is_that_of_what_is_shown():
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(stream, "JPEG", exif=exif)
    assert image_size(stream.getvalue()) == (20, 40) and image_size(picture()) == (40, 20)
    assert image_size(b"no image") is None and image_size(None) is None


# ----------------------------------------------------------------------------- real files

def counted(records):
    """{split: {label: boxes}} of records."""
    counts = defaultdict(Counter)
    for (split, _, label), boxes in boxes_of(records).items():
        counts[split][label] += len(boxes)
    return counts


def test_real_bccd(capsys):
    records = read("bccd", real("bccd"))
    images = {(split, record.image_name) for split, record in records}
    assert Counter(split for split, _ in images) == {"train": 205, "validation": 87, "test": 36}
    assert counted(records) == {  # the notes' 2,382 and 968 less the two that have no area
        "train": {"red blood cell": 2381, "white blood cell": 214, "platelet": 209},
        "validation": {"red blood cell": 967, "white blood cell": 87, "platelet": 83},
        "test": {"red blood cell": 406, "white blood cell": 36, "platelet": 31}}
    assert capsys.readouterr().out.count("boxes without an area, left out: 1") == 2
    assert all(record.image for _, record in records) and len(records) == 3 * 328


def test_real_dental_films_are_in_one_split_each():
    records = read("dental_xray_cv", real("dental_xray_cv"))
    splits = defaultdict(set)
    for split, record in records:
        splits[record.group].add(split)
    assert len(splits) == 179 and set(map(len, splits.values())) == {1} and len(records) == 4 * 357
    assert sum(counted(records).values(), Counter()) == {"cavity": 151, "filling": 1798, "impacted tooth": 140,
                                                         "implant": 563}


def test_real_nih_boxes():
    records = read("nih_boxes", real("nih_cxr14"))
    assert len(records) == 984 and len({record.image_name for _, record in records}) == 880
    assert sum(counted(records).values(), Counter()) == {
        "atelectasis": 180, "effusion": 153, "cardiomegaly": 146, "infiltration": 123, "pneumonia": 120,
        "pneumothorax": 98, "mass": 85, "nodule": 79}
    assert Counter(split for split, _ in records) == DATASETS["nih_boxes"].counts
    splits = defaultdict(set)
    for split, record in records:
        splits[record.image_name.split("_")[0]].add(split)
    assert set(map(len, splits.values())) == {1}
    sizes = [(x2 - x1) * (y2 - y1) for _, record in records if record.type == "nodule"
             for x1, y1, x2, y2 in record.boxes["nodule"]]
    assert np.median(sizes) == pytest.approx(0.0046, abs=1e-4)


def test_real_rsna_boxes():
    records = read("rsna_boxes", real("rsna_pneumonia"))
    counts = Counter(len(record.boxes["lung opacity"]) for _, record in records)
    assert counts == {0: 20672, 1: 2614, 2: 3266, 3: 119, 4: 13}
    assert Counter(split for split, _ in records) == DATASETS["rsna_boxes"].counts


@pytest.mark.parametrize("name, train, test", [("chestx_det10", 6862, 1476), ("chestx_det", 7904, 1734)])
def test_real_chestx_det(name, train, test, capsys):
    records = read(name, real(name))
    assert {split: counts.total() for split, counts in counted(records).items()} == {"train": train, "test": test}
    assert Counter(split for split, _ in records) == DATASETS[name].counts
    assert capsys.readouterr().out.count("left out once: 1") == 1  # the one repeat


def test_real_deeplesion():
    records = read("deeplesion", real("deeplesion"))
    assert len(records) == 152 and {split: counts.total() for split, counts in counted(records).items()} == {
        "train": 105, "validation": 18, "test": 35}


def test_real_busi_has_no_masks_here():
    records = read("busi_boxes", real("busi"))
    masks = list(real("busi").rglob("*_mask*"))
    assert len(records) == 780 and (masks or sum(record.boxes is None for _, record in records) == 647)
