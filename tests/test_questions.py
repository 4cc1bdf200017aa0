"""The question sets of prepare/questions.py, from tiny copies of their published files."""

import json
import os
import shutil
import zipfile
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data import Record
from plumbing.flags import UserError
from plumbing.shards import PROMPT_VERSION, SHARD_VERSION, Shard
from prepare.datasets import DATASETS
from prepare.questions import references, train_sample_tokenizer
from prepare.shards import read_manifests, write_dataset
from test_prepare import picture, write_parquet

ROOT = Path(__file__).resolve().parent.parent
RAW = Path(os.environ.get("NANOMEDQ_RAW", ROOT / "raw"))


def read(name, raw):
    return list(DATASETS[name].read(raw))


def write_zip(path, files):
    """Members are stored, not deflated, so that a test can alter one in place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def write_files(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def refused(name, raw, *words):
    """Reading must end with a UserError of one line that has all of these words."""
    with pytest.raises(UserError) as error:
        read(name, raw)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


# ----------------------------------------------------------------------------- SLAKE

def slake_row(number, image, question, answer, kind, language="en"):
    return {"img_id": image, "img_name": f"xmlab{image}/source.jpg", "question": question,
            "answer": answer, "q_lang": language, "location": "Lung", "modality": "CT",
            "answer_type": "OPEN", "base_type": "vqa", "content_type": kind,
            "triple": ["vhead", "_", "_"], "qid": number}


SLAKE = {
    "train.json": [slake_row(0, 1, "What modality is used?", "MRI", "Modality"),
                   slake_row(1, 1, "How many kidneys are there?", 2, "Quantity"),
                   slake_row(1622, 2, "What is the largest organ?", "", "Size"),
                   slake_row(5000, 3, "这是什么器官?", "肺", "Organ", "zh")],
    "validation.json": [slake_row(9, 4, "Is the lung healthy?", "No", "Abnormality")],
    "test.json": [slake_row(6000, 1, "图像是什么模态?", "MRI", "Modality", "zh"),
                  slake_row(12, 3, "Which organs are shown?", "Liver, Spleen", "Organ")]}
SLAKE_IMAGES = {f"imgs/xmlab{number}/source.jpg": picture(number) for number in (1, 2, 3)}  # no 4


def slake_records(images):
    return [
        ("train", Record("0", "What modality is used?", "MRI", images.get("imgs/xmlab1/source.jpg"),
                         "xmlab1/source.jpg", type="Modality")),
        ("train", Record("1", "How many kidneys are there?", "2", images.get("imgs/xmlab1/source.jpg"),
                         "xmlab1/source.jpg", type="Quantity")),
        ("train", Record("1622", "What is the largest organ?", "", images.get("imgs/xmlab2/source.jpg"),
                         "xmlab2/source.jpg", type="Size")),
        ("validation", Record("9", "Is the lung healthy?", "No", None, "xmlab4/source.jpg",
                              type="Abnormality")),
        ("test", Record("12", "Which organs are shown?", "Liver, Spleen",
                        images.get("imgs/xmlab3/source.jpg"), "xmlab3/source.jpg", type="Organ"))]


def write_slake(raw):
    """The questions, still without images."""
    write_files(raw, {name: json.dumps(rows, ensure_ascii=False) for name, rows in SLAKE.items()})


@pytest.fixture
def slake(tmp_path):
    write_slake(tmp_path / "slake")
    return tmp_path / "slake"


def test_slake_is_read_in_english_from_its_zip_or_its_folder(slake):
    questions = sorted(SLAKE)
    assert read("slake", slake) == slake_records({})
    assert sorted(DATASETS["slake"].find(slake.parent)) == questions
    extras = {"__MACOSX/imgs/xmlab1/._source.jpg": b"", "imgs/xmlab1/mask.png": picture(9)}
    write_zip(slake / "imgs.zip", SLAKE_IMAGES | extras)
    assert read("slake", slake) == slake_records(SLAKE_IMAGES)
    assert sorted(DATASETS["slake"].find(slake.parent)) == ["imgs.zip", *questions]
    write_files(slake, {"imgs/xmlab3/source.jpg": SLAKE_IMAGES["imgs/xmlab3/source.jpg"]})
    assert read("slake", slake) == slake_records(SLAKE_IMAGES)  # unpacked in part
    (slake / "imgs.zip").unlink()
    write_files(slake, SLAKE_IMAGES)
    (slake / "validation.json").rename(slake / "validate.json")  # the older name
    assert read("slake", slake) == slake_records(SLAKE_IMAGES)
    assert sorted(DATASETS["slake"].find(slake.parent)) == [*SLAKE_IMAGES, "test.json", "train.json",
                                                            "validate.json"]


def test_slake_refuses_damaged_files_by_name(slake):
    write_zip(slake / "imgs.zip", SLAKE_IMAGES)
    whole = (slake / "imgs.zip").read_bytes()
    altered = whole.replace(SLAKE_IMAGES["imgs/xmlab2/source.jpg"], b"\0" * len(picture(2)))
    (slake / "imgs.zip").write_bytes(altered)
    assert [record.image for _, record in read("slake", slake)][:3] == [picture(1), picture(1), b""]
    (slake / "imgs.zip").write_bytes(whole[:len(whole) // 2])
    refused("slake", slake, f"{slake}/imgs.zip: damaged zip", "fetch it again")
    (slake / "imgs.zip").unlink()
    (slake / "test.json").write_bytes(json.dumps(SLAKE["test.json"], ensure_ascii=False).encode("gbk"))
    refused("slake", slake, f"{slake}/test.json: damaged or not JSON")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("change, words", [
    ("folder", ("no folder imgs/ in it, the first name is 'SLAKE/imgs/xmlab1/source.jpg'", "pack it anew so")),
    ("method", ("'imgs/xmlab1/source.jpg' is packed by method 9 (deflate64), which is not read here", "unpack it")),
    ("encrypted", ("'imgs/xmlab1/source.jpg' is encrypted, which is not read here",)),
    ("pointer", ("damaged zip: a git-lfs pointer, not the file; run `git lfs pull`",))])
def test_a_zip_that_cannot_be_read_is_refused_with_the_reason_and_the_first_name(change, words, slake):
    top = "SLAKE/" * (change == "folder")
    write_zip(slake / "imgs.zip", {f"{top}{name}": content for name, content in SLAKE_IMAGES.items()})
    content = bytearray((slake / "imgs.zip").read_bytes())
    entry = content.find(b"PK\1\2")
    if change == "method":
        content[8] = content[entry + 10] = 9
    if change == "encrypted":
        content[6], content[entry + 8] = 1, 1
    (slake / "imgs.zip").write_bytes(POINTER if change == "pointer" else content)
    refused("slake", slake, f"{slake}/imgs.zip: ", *words)
    write_files(slake, SLAKE_IMAGES)  # unpacked beside it, there is no need of the zip but for what is missing
    if change != "pointer":
        write_files(slake, {"imgs/xmlab4/source.jpg": picture(4)})
        assert all(record.image for _, record in read("slake", slake))


def test_a_pointer_in_place_of_an_image_or_a_table_is_named(slake):
    write_files(slake, SLAKE_IMAGES | {"imgs/xmlab2/source.jpg": POINTER})
    refused("slake", slake, f"{slake}/imgs/xmlab2/source.jpg: a git-lfs pointer, not the file; run `git lfs pull`")
    (slake / "train.json").write_bytes(POINTER)
    refused("slake", slake, f"{slake}/train.json: damaged file: a git-lfs pointer")


def test_a_language_that_is_not_slake_s_is_refused(slake):
    rows = [slake_row(0, 1, "What modality is used?", "MRI", "Modality", "English")]
    (slake / "train.json").write_text(json.dumps(rows))
    refused("slake", slake, f"{slake}/train.json: q_lang of '0' 'English' is none of en, zh")


def test_a_phrase_type_that_says_no_split_is_refused(tmp_path):
    row = {"qid": 7, "image_name": "", "question": "q", "answer": "a", "question_type": "", "phrase_type": "Test_para"}
    write_files(tmp_path, {"VQA_RAD Dataset Public.json": json.dumps([row])})
    refused("vqa_rad", tmp_path, "phrase_type of '7' 'Test_para' is none of freeform, para, test_freeform")


@pytest.mark.parametrize("name", ["0000.parquet", "val-00000-of-00001.parquet"])
def test_a_parquet_named_after_no_split_is_refused(name, tmp_path):
    rows = [{"image": {"bytes": picture(1), "path": None}, "question": "q?", "answer": "a"}]
    write_parquet(tmp_path / "data/train-00000-of-00001.parquet", rows)
    write_parquet(tmp_path / f"data/{name}", rows)
    for dataset in ("path_vqa", "roco", "med_mcqa"):
        refused(dataset, tmp_path, f"{tmp_path}/data: {name} is named after none of its splits, train, validation, "
                                   "test; rename it as train-00000-of-00001.parquet is")


# ----------------------------------------------------------------------------- VQA-Med 2019

TRAINING, VALIDATION = "ImageClef-2019-VQA-Med-Training", "ImageClef-2019-VQA-Med-Validation"
ANSWERS = "VQAMed2019_Test_Questions_w_Ref_Answers.txt"
PARTS = {
    TRAINING: {
        "All_QA_Pairs_train.txt": "synpic1|what modality is shown?|xr - plain film\n"
                                  "synpic1|what plane is this?|pa\n"
                                  "synpic2|what organ system is this?|lung, mediastinum, pleura\n"
                                  "synpic2|is this normal?|\n"
                                  "synpic3|what is abnormal?|abscess\n"
                                  "synpic3|what is new?|an answer | with a bar\n\n",
        "QAPairsByCategory/C1_Modality_train.txt": "synpic1|what modality is shown?|xr - plain film\n",
        "QAPairsByCategory/C2_Plane_train.txt": "synpic1|what plane is this?|pa\n",
        "QAPairsByCategory/C3_Organ_train.txt": "synpic2|what organ system is this?|"
                                                "lung, mediastinum, pleura\n",
        "QAPairsByCategory/C4_Abnormality_train.txt": "synpic2|is this normal?|\n"
                                                      "synpic3|what is abnormal?|abscess\n",
        "train_ImageIDs.txt": "synpic1\nsynpic2\nsynpic3\n",
        "Train_images/synpic1.jpg": picture(1), "Train_images/synpic2.jpg": picture(2)},
    VALIDATION: {
        "All_QA_Pairs_val.txt": "synpic4|what plane is this?|axial\r\n",
        "QAPairsByCategory/C1_Modality_val.txt": "synpic5|is this a ct?|yes\r\n",
        "QAPairsByCategory/C2_Plane_val.txt": "synpic4|what plane is this?|axial\r\n",
        "QAPairsByCategory/C3_Organ_val.txt": "synpic5|what organ is this?|breast\r\n",
        "QAPairsByCategory/C4_Abnormality_val.txt": "synpic5|what is wrong?|a cyst\r\n",
        "val_ImageIDs.txt": "synpic4\n", "Val_images/synpic4.jpg": picture(4)},
    "VQAMed2019Test": {
        "README-VQA-Med-2019-TestSet.txt": "Test Set\n",
        "VQAMed2019_Test_Questions.txt": "synpic6|what modality is shown?\n"
                                         "synpic7|what organ is this?\n",
        ANSWERS: "synpic6|modality|what modality is shown?|ct w/contrast (iv)\n"
                 "synpic7|organ|what organ is this?|face, sinuses, and neck#skull and contents\n"}}
TEST_IMAGES = {"VQAMed2019_Test_Images/synpic6.jpg": picture(6)}  # that of synpic7 is missing
MODALITY, PLANE = "what modality is shown?", "what plane is this?"
VQA_MED_TRAINING = [
    ("train", Record("train_000000", MODALITY, "xr - plain film", picture(1), "synpic1.jpg",
                     type="modality")),
    ("train", Record("train_000001", PLANE, "pa", picture(1), "synpic1.jpg", type="plane")),
    ("train", Record("train_000002", "what organ system is this?", "lung, mediastinum, pleura",
                     picture(2), "synpic2.jpg", type="organ")),
    ("train", Record("train_000003", "is this normal?", "", picture(2), "synpic2.jpg",
                     type="abnormality")),
    ("train", Record("train_000004", "what is abnormal?", "abscess", None, "synpic3.jpg",
                     type="abnormality")),
    ("train", Record("train_000005", "what is new?", "an answer | with a bar", None, "synpic3.jpg")),
    ("validation", Record("validation_000000", PLANE, "axial", picture(4), "synpic4.jpg", type="plane"))]


def vqa_med_test(image):
    iv = ("ct w/contrast (iv)", "ct w/contrast iv", "ct w/contrast")
    organs = ("face, sinuses, and neck", "skull and contents")
    return [("test", Record("test_000000", MODALITY, "ct w/contrast (iv)", image, "synpic6.jpg",
                            type="modality", references=iv)),
            ("test", Record("test_000001", "what organ is this?", "#".join(organs), None, "synpic7.jpg",
                            type="organ", references=organs))]


def write_vqa_med(raw):
    """The three zips, as published; the test images are zipped twice."""
    write_zip(raw.parent / "images.zip", TEST_IMAGES)
    for folder, files in PARTS.items():
        if folder == "VQAMed2019Test":
            files = files | {"VQAMed2019_Test_Images.zip": (raw.parent / "images.zip").read_bytes()}
        write_zip(raw / f"{folder}.zip",
                  {f"{folder}/{name}": content for name, content in files.items()})


@pytest.fixture
def vqa_med(tmp_path):
    write_vqa_med(tmp_path / "vqa_med_2019")
    return tmp_path / "vqa_med_2019"


def unpack(raw, folder):
    with zipfile.ZipFile(raw / f"{folder}.zip") as archive:
        archive.extractall(raw)
    (raw / f"{folder}.zip").unlink()


def test_vqa_med_2019_is_read_from_its_zips_or_its_folders(vqa_med):
    dataset = DATASETS["vqa_med_2019"]
    everything = VQA_MED_TRAINING + vqa_med_test(picture(6))
    assert read("vqa_med_2019", vqa_med) == everything
    assert sorted(dataset.find(vqa_med.parent)) == [f"{name}.zip" for name in PARTS]
    assert {url.rsplit("/", 1)[1] for url in dataset.urls} == {f"{name}.zip" for name in PARTS}
    for folder in PARTS:
        unpack(vqa_med, folder)
        assert read("vqa_med_2019", vqa_med) == everything
    assert sorted(dataset.find(vqa_med.parent)) == [
        f"{TRAINING}/All_QA_Pairs_train.txt", f"{VALIDATION}/All_QA_Pairs_val.txt",
        f"VQAMed2019Test/{ANSWERS}"]
    test = vqa_med / "VQAMed2019Test"
    (test / "VQAMed2019_Test_Images.zip").unlink()
    assert read("vqa_med_2019", vqa_med) == VQA_MED_TRAINING + vqa_med_test(None)
    write_files(test, TEST_IMAGES)
    assert read("vqa_med_2019", vqa_med) == everything


def test_the_test_set_of_vqa_med_2019_is_read_on_its_own(vqa_med):
    for part in (TRAINING, VALIDATION):
        (vqa_med / f"{part}.zip").unlink()
    unpack(vqa_med, "VQAMed2019Test")
    assert read("vqa_med_2019", vqa_med) == vqa_med_test(picture(6))
    assert list(DATASETS["vqa_med_2019"].find(vqa_med.parent)) == [f"VQAMed2019Test/{ANSWERS}"]
    (vqa_med / "VQAMed2019Test" / ANSWERS).rename(vqa_med / ANSWERS)
    shutil.rmtree(vqa_med / "VQAMed2019Test")
    assert read("vqa_med_2019", vqa_med) == vqa_med_test(None)
    assert list(DATASETS["vqa_med_2019"].find(vqa_med.parent)) == [ANSWERS]


def test_vqa_med_2019_refuses_damaged_files_by_name(vqa_med):
    packed, test = vqa_med / f"{TRAINING}.zip", vqa_med / "VQAMed2019Test"
    whole = packed.read_bytes()
    packed.write_bytes(whole[:-40])
    refused("vqa_med_2019", vqa_med, f"{packed}: damaged zip")
    packed.write_bytes(whole.replace(b"plane is this?|pa\nsynpic2",  # its checksum is then wrong
                                     b"plane is this?|ap\nsynpic2"))
    refused("vqa_med_2019", vqa_med, str(vqa_med / TRAINING), "no All_QA_Pairs_train.txt", "damaged")
    packed.write_bytes(whole.replace(b"C4_Abnormality", b"C4_abnormality"))
    refused("vqa_med_2019", vqa_med, str(vqa_med / TRAINING),
            "no QAPairsByCategory/C4_Abnormality_train.txt")
    packed.write_bytes(whole)
    unpack(vqa_med, TRAINING)
    write_files(vqa_med / TRAINING, {"All_QA_Pairs_train.txt": "synpic1|what?|mri\nsynpic1|why?\n"})
    refused("vqa_med_2019", vqa_med, "All_QA_Pairs_train.txt: row 2 has 2 columns, not 3")
    write_files(vqa_med / TRAINING, {"All_QA_Pairs_train.txt": b"synpic1|what?|m\xe9lanome\n"})
    refused("vqa_med_2019", vqa_med, f"{vqa_med / TRAINING}/All_QA_Pairs_train.txt: not UTF-8")
    shutil.rmtree(vqa_med / TRAINING)
    unpack(vqa_med, "VQAMed2019Test")
    (test / "VQAMed2019_Test_Images.zip").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused("vqa_med_2019", vqa_med, f"{test}/VQAMed2019_Test_Images.zip: a git-lfs pointer, not the file")


@pytest.mark.parametrize("answer, right", [
    ("mri", ("mri",)), (" pet  - positron emission ", ("pet - positron emission",)), ("", ()),
    ("esophageal spasm#diverticulum", ("esophageal spasm", "diverticulum")),
    ("a#b#a# #", ("a", "b")), ("#", ()),
    ("noncontrast (mri)", ("noncontrast (mri)", "noncontrast mri", "noncontrast")),
    ("ct (with gi and iv contrast)",
     ("ct (with gi and iv contrast)", "ct with gi and iv contrast", "ct")),
    ("(staging burkitt) lymphoma",
     ("(staging burkitt) lymphoma", "staging burkitt lymphoma", "lymphoma")),
    ("dermoid tumor (inclusion cyst) of cns",
     ("dermoid tumor (inclusion cyst) of cns", "dermoid tumor inclusion cyst of cns",
      "dermoid tumor of cns")),
    ("(peri)hilar mass#hilar mass", ("(peri)hilar mass", "perihilar mass", "hilar mass")),
    ("a (b) c (d)", ("a (b) c (d)", "a b c d", "a c")),
    ("a (b (c) d) e", ("a (b (c) d) e", "a b c d e", "a e")),
    ("(iv)", ("(iv)", "iv")), ("a ( ) b", ("a ( ) b", "a b")), ("()", ("()",)),
    ("ct (iv", ("ct (iv", "ct iv")), ("ct) iv (gi", ("ct) iv (gi", "ct iv gi")),
    ("a (b#c) d", ("a (b", "a b", "c) d", "c d"))])
def test_what_counts_as_right_by_an_answer(answer, right):
    assert references(answer) == right


def test_references_are_written_where_the_answer_is_not_all(vqa_med, tmp_path):
    images = {f"VQAMed2019_Test_Images/synpic{n}.jpg": picture(n) for n in (6, 7, 8)}
    write_zip(tmp_path / "images.zip", images)
    unpack(vqa_med, "VQAMed2019Test")
    test = vqa_med / "VQAMed2019Test"
    (tmp_path / "images.zip").rename(test / "VQAMed2019_Test_Images.zip")
    (test / ANSWERS).write_text(PARTS["VQAMed2019Test"][ANSWERS] + "synpic8|plane|what plane?| axial \n")
    facts = {"dataset": "vqa_med_2019", "shard_version": SHARD_VERSION, "prompt_version": PROMPT_VERSION,
             "limit": 0, "licence": "none",
             "image": {"size": 32, "resize": "squash", "codec": "png", "quality": 0}}
    target, dataset = tmp_path / "shards/vqa_med_2019", DATASETS["vqa_med_2019"]
    write_dataset(target, dataset, vqa_med, {}, train_sample_tokenizer(), facts, 1)
    records = Shard(target / "test").read_records()
    organs = ["face, sinuses, and neck", "skull and contents"]
    assert [(record["answer"], record.get("references")) for record in records] == [
        ("ct w/contrast (iv)", ["ct w/contrast (iv)", "ct w/contrast iv", "ct w/contrast"]),
        ("#".join(organs), organs), ("axial", None)]
    assert not any("references" in record for record in Shard(target / "train").read_records())


# ----------------------------------------------------------------------------- facts and shards

@pytest.mark.parametrize("name, listing, wanted", [
    ("slake", "KG.zip README.md imgs.zip mask.txt test.json train.json validation.json",
     "imgs.zip test.json train.json validation.json"),
    ("med_qa", "README.md phrases_no_exclude_test.jsonl phrases_no_exclude_train.jsonl",
     "phrases_no_exclude_test.jsonl phrases_no_exclude_train.jsonl"),
    ("med_mcqa", "README.md data/test-00000-of-00001.parquet data/train-00000-of-00001.parquet "
                 "data/validation-00000-of-00001.parquet",
     "data/train-00000-of-00001.parquet data/validation-00000-of-00001.parquet"),
    ("med_xpert_qa_mm", "MM/dev.jsonl MM/test.jsonl README.md Text/dev.jsonl Text/test.jsonl images.zip",
     "MM/test.jsonl images.zip"),
    ("med_xpert_qa_text", "MM/test.jsonl README.md Text/dev.jsonl Text/test.jsonl images.zip", "Text/test.jsonl"),
    ("med_frame_qa", "README.md data/test-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
    ("pubmed_qa_artificial", "README.md pqa_artificial/train-1.parquet pqa_labeled/train-1.parquet",
     "pqa_artificial/train-1.parquet")])
def test_what_is_fetched_from_the_hub_is_what_is_read(name, listing, wanted, tmp_path):
    dataset = DATASETS[name]
    fetched = [file for file in listing.split()
               if any(fnmatch(file, pattern) for pattern in dataset.hub_files)]
    write_files(tmp_path / name, dict.fromkeys(fetched, ""))
    assert sorted(dataset.find(tmp_path)) == fetched == wanted.split()


def test_what_cannot_be_used_is_counted(slake, tmp_path):
    facts = {"dataset": "slake", "shard_version": SHARD_VERSION, "prompt_version": PROMPT_VERSION,
             "limit": 0, "licence": "none",
             "image": {"size": 32, "resize": "squash", "codec": "png", "quality": 0}}
    dataset, target = DATASETS["slake"], tmp_path / "shards/slake"
    with pytest.raises(UserError, match=r"no sample of it could be used \(1 empty answer, 4 image missing\)"):
        write_dataset(target, dataset, slake, dataset.find(tmp_path), train_sample_tokenizer(), facts, 1)
    assert not target.exists()  # nothing that the next run would call up to date
    write_zip(slake / "imgs.zip", SLAKE_IMAGES)
    write_dataset(target, dataset, slake, dataset.find(tmp_path), train_sample_tokenizer(), facts, 1)
    assert {split: (manifest["samples"], manifest["skipped"])
            for split, manifest in read_manifests(target).items()} == {
        "train": (2, {"empty answer": 1}), "validation": (0, {"image missing": 1}), "test": (1, {})}


# ----------------------------------------------------------------------------- real data

def real(name, pattern):
    return pytest.mark.skipif(not any((RAW / name).glob(pattern)),
                              reason=f"no {name} in {RAW}; set NANOMEDQ_RAW to a folder that has it")


@real("slake", "train.json")
def test_real_slake_has_the_published_counts():
    records = read("slake", RAW / "slake")
    assert Counter(split for split, _ in records) == DATASETS["slake"].counts
    assert [record.id for _, record in records if not record.answer] == ["1622"]
    images = {split: {record.image_name for owner, record in records if owner == split}
              for split in ("train", "validation", "test")}
    assert {split: len(names) for split, names in images.items()} == {
        "train": 450, "validation": 96, "test": 96}
    assert len(set.union(*images.values())) == 642  # no image is in two splits


@real("vqa_med_2019", "**/" + ANSWERS)
def test_real_vqa_med_2019_has_the_published_test_set():
    records = [record for split, record in read("vqa_med_2019", RAW / "vqa_med_2019") if split == "test"]
    assert Counter(record.type for record in records) == dict.fromkeys(
        ("modality", "plane", "organ", "abnormality"), 125)
    assert len({record.image_name for record in records}) == 500
    assert sum("#" in record.answer for record in records) == 12
    several = [record for record in records if record.references != (record.answer,)]
    assert len(several) == 32 and Counter(len(r.references) for r in several) == {2: 9, 3: 22, 4: 1}
    assert not any("#" in text for record in records for text in record.references)
    assert all(record.question and record.answer for record in records)
