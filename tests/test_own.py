"""--own from a folder to shards: what is recognised and said, patients, folds, names, and what is refused."""

import base64
import io
import json
import random
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

from plumbing.files import read_manifest
from plumbing.flags import UserError, parse_flags
from plumbing.own import SECRET
from plumbing.shards import Shard
from prepare.all import Config, main
from prepare.own_forms import look_into, read_own
from prepare.questions import train_sample_tokenizer
from prepare.shards import read_manifests
from test_box_data import picture, put

COUNT = 12


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_sample_tokenizer())
    return path


@pytest.fixture
def prepare(tmp_path, tokenizer, capsys):
    """prepare(path, **flags) -> ({dataset/split: lines of records.jsonl}, what was printed)"""
    def prepare_and_read(path, **flags):
        capsys.readouterr()
        main(Config(own=str(path), shards_dir=str(tmp_path / "shards"), tokenizer=str(tokenizer), image_size=16,
                    workers=1, **flags))
        folders = sorted(path.parent for path in (tmp_path / "shards").glob("[!.]*/*/manifest.json"))
        return {f"{folder.parent.name}/{folder.name}": Shard(folder).read_records() for folder in folders
                }, capsys.readouterr().out
    return prepare_and_read


def put_pictures(folder, count=COUNT, name="{}.png"):
    for number in range(count):
        put(folder / name.format(number), picture(16, 16, seed=number))


def put_questions(folder, head="image,question,answer", row="{0}.png,what is {0}?,finding {0}"):
    put(folder / "questions.csv", "\n".join([head, *map(row.format, range(COUNT))]))
    put_pictures(folder)
    return folder / "questions.csv"


def words(splits):
    return sorted((record["image"], record["question"], record["answer"])
                  for some in splits.values() for record in some)


# ----------------------------------------------------------------------------- recognised, and said

def test_questions_are_prepared_and_said_and_then_up_to_date(prepare, tmp_path):
    path = put_questions(tmp_path / "own")
    splits, printed = prepare(path)
    assert words(splits) == sorted((f"{n}.png", f"what is {n}?", f"finding {n}") for n in range(COUNT))
    assert splits.keys() == {f"questions/{split}" for split in ("train", "validation", "test")}
    for line in ("questions.csv: csv of questions: 12 samples, 12 images", "image is 'image', question is 'question'",
                 "no patient is named: samples that show alike images stay on one side",
                 "a split is made, 70 : 10 : 20"):
        assert line in printed
    assert printed.index("12 samples") < printed.index("not prepared yet") and not (tmp_path / "own" / SECRET).exists()
    assert "questions: up to date" in prepare(path)[1]
    put(tmp_path / "own/3.png", picture(16, 16, seed=99))
    assert "listing was 12 samples" in prepare(path)[1]


def test_a_dataset_is_named_and_limited(prepare, tmp_path):
    path = put_questions(tmp_path / "own")
    splits, _ = prepare(path, name="ct.2024", limit=1)
    assert {name: len(some) for name, some in splits.items()} == {
        "ct.2024/train": 1, "ct.2024/validation": 1, "ct.2024/test": 1}
    with pytest.raises(UserError, match="--name=VQA_RAD: a public dataset"):
        prepare(path, name="VQA_RAD")
    for number in range(COUNT):
        put(tmp_path / f"labels/{'ab'[number % 2]}/{number}.png", picture(16, 16, seed=number))
    splits, printed = prepare(tmp_path / "labels", limit=2, codec="png")
    assert len(splits["labels/train"]) == 2
    assert read_manifest(tmp_path / "shards/labels/train")["image"]["codec"] == "png"


def test_choices_boxes_and_conversations_are_tasks(prepare, tmp_path):
    put(tmp_path / "mcq.csv", "question,A,B,answer\n" + "".join(
        f"which {n}?,cyst,mass,{'AB'[n % 2]}\n" for n in range(COUNT)))
    put_pictures(tmp_path)
    put(tmp_path / "boxes.jsonl", "\n".join(json.dumps({
        "image": f"{n}.png", "question": "detect cyst", "boxes": [[4, 4, 12, 12]]}) for n in range(COUNT)))
    url = "data:image/png;base64," + base64.b64encode(picture(16, 16, seed=5)).decode()
    put(tmp_path / "chat.json", json.dumps([{"messages": [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url if n == 5 else f"{n}.png"}},
                                     {"type": "text", "text": f"what is {n}?"}]},
        {"role": "assistant", "content": "a cyst"}, {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "yes"}]} for n in range(COUNT)]))
    for name in ("mcq.csv", "boxes.jsonl", "chat.json"):
        splits, _ = prepare(tmp_path / name)
    facts = {name: read_manifests(tmp_path / "shards" / name)["train"] for name in ("mcq", "boxes", "chat")}
    assert [(some["kind"], some.get("task", "")) for some in facts.values()] == [
        ("text questions", "choices"), ("boxes", ""), ("image questions", "")]
    first = splits["mcq/test"][0]
    assert first["choices"] == ["cyst", "mass"] and " A. cyst B. mass" in first["question"]
    assert {json.dumps(record["boxes"]) for record in splits["boxes/train"]} == {'{"cyst": [[250, 250, 750, 750]]}'}
    assert splits["chat/train"][0]["turns"] == [["sure?", "yes"]]
    assert {record["image"] for some in splits.values() for record in some if "turns" in record} == {
        *(f"{n}.png" for n in range(COUNT) if n != 5), "image 1 of chat.json: item 6"}


def test_a_folder_of_tables_named_after_splits(prepare, tmp_path):
    put_pictures(tmp_path / "own/images")
    for name, numbers in (("train2024.json", range(8)), ("my_validate.json", (8, 9)), ("TEST.json", (10, 11))):
        put(tmp_path / f"own/{name}", json.dumps([
            {"img_name": f"C:\\data\\{n}.png", "question": "what?", "answer": f"is {n}"} for n in numbers]))
    put(tmp_path / "own/notes.csv", "a,b\n1,2\n")
    put(tmp_path / "own/._train.json", b"\0\5\x16\7")
    splits, printed = prepare(tmp_path / "own")
    assert {name: len(some) for name, some in splits.items()} == {"own/train": 8, "own/validation": 2, "own/test": 2}
    assert "splits are given: 2 test, 2 validation, 8 train" in printed
    put(tmp_path / "own/more.json", json.dumps([{"question": "a?", "answer": "b"}]))
    with pytest.raises(UserError, match=r"questions in TEST.json and in more.json; name one, as --own="):
        prepare(tmp_path / "own")


def test_what_counts_first_is_said(prepare, tmp_path):
    for number in range(COUNT):
        put(tmp_path / f"own/{'ab'[number % 2]}/{number}.png", picture(16, 16, seed=number))
    put(tmp_path / "own/labels.csv", "path,class\n" + "".join(f"{n}.png,{'xy'[n % 2]}\n" for n in range(COUNT)))
    splits, printed = prepare(tmp_path / "own")
    assert "own: labels count, and class folders in it are passed over" in printed
    assert {label for some in splits.values() for record in some for label in record["labels"]} == {"x", "y"}
    put(tmp_path / "own/q.csv", "image,question,answer\n" + "".join(f"{n}.png,what?,is {n}\n" for n in range(COUNT)))
    assert "own: questions count, and labels in it are passed over" in prepare(tmp_path / "own")[1]


def test_missing_images_and_scans_that_are_not_there_are_said(prepare, tmp_path):
    path = put_questions(tmp_path / "own")
    (tmp_path / "own/3.png").unlink()
    splits, printed = prepare(path, slices="middle")
    assert len(words(splits)) == COUNT - 1 and "1 of 12 images are not there, 3.png the first" in printed
    assert "1 image missing (3.png the first)" in printed
    assert "--slices: there is no scan here to which that applies" in printed


# ----------------------------------------------------------------------------- patients

PATIENTS = ("image,question,answer,patient,study,id",
            "MRN00{1}/{0}.png,what is {0}?,finding {0},mrn00{1},S{1},MRN00{1}-{0}")


def put_patients(folder):
    rows = [PATIENTS[1].format(n, n // 2) for n in range(COUNT)]
    put(folder / "q.csv", "\n".join([PATIENTS[0], *rows]))
    for number in range(COUNT):
        put(folder / f"MRN00{number // 2}/{number}.png", picture(16, 16, seed=number))
    return folder / "q.csv"


def test_patients_stay_on_one_side_and_are_written_as_hashes(prepare, tmp_path):
    splits, printed = prepare(put_patients(tmp_path / "own"))
    sides = defaultdict(set)
    for name, some in splits.items():
        for record in some:
            sides[record["group"]].add(name)
            patient = record["group"].removeprefix("patient ")
            assert record["image"].startswith(f"{patient}/") and record["id"].startswith(f"{patient}-")
            assert len(record["study"]) == 16
    assert len(sides) == 6 and all(len(some) == 1 for some in sides.values())
    assert "12 samples, 12 images, 6 patients" in printed and "patients are known by column patient" in printed
    secret = (tmp_path / "own" / SECRET).read_bytes().strip()
    for path in (tmp_path / "shards").rglob("*"):
        content = path.read_bytes().lower() if path.is_file() else b""
        assert b"mrn00" not in content and secret not in content


def test_folds_are_datasets_by_patient(prepare, tmp_path):
    path = put_patients(tmp_path / "own")
    splits, printed = prepare(path, folds=3)
    tested = [record["question"] for name, some in splits.items() if name.endswith("/test") for record in some]
    assert sorted(tested) == sorted(f"what is {n}?" for n in range(COUNT))
    assert splits.keys() == {f"q_fold_{n}_of_3/{split}" for n in range(3) for split in ("train", "test")}
    facts = [read_manifests(tmp_path / f"shards/q_fold_{n}_of_3")["test"]["folds"] for n in range(3)]
    assert facts == [{"of": "q", "fold": n, "folds": 3} for n in range(3)]
    assert printed.count("is the test split, the others train") == 3
    only, _ = prepare(path, folds=2, fold=1, name="mine")
    assert only.keys() - splits.keys() == {"mine_fold_1_of_2/train", "mine_fold_1_of_2/test"}


def test_a_torn_patient_is_refused(prepare, tmp_path):
    rows = [f"{n}.png,what?,is {n},p{n // 3},{'test' if n > 6 else 'train'}" for n in range(COUNT)]
    put(tmp_path / "q.csv", "\n".join(["image,question,answer,subject,split", *rows]))
    put_pictures(tmp_path)
    with pytest.raises(UserError, match=r"is in train \(sample 7\) and in test \(sample 8\)"):
        prepare(tmp_path / "q.csv")


def test_alike_images_and_equal_questions_stay_on_one_side(prepare, tmp_path):
    put(tmp_path / "q.csv", "\n".join(["image,question,answer", *(f"{n}.jpg,what?,is {n}" for n in range(2 * COUNT))]))
    for number in range(2 * COUNT):  # each twice, as JPEGs of other qualities
        pixels = np.random.default_rng(number // 2).integers(0, 256, (12, 12, 3), np.uint8)
        stream = io.BytesIO()
        image = Image.fromarray(pixels).resize((96, 96), Image.Resampling.BICUBIC)
        image.save(stream, "JPEG", quality=70 + 20 * (number % 2))
        put(tmp_path / f"{number}.jpg", stream.getvalue())
    put(tmp_path / "t.csv", "\n".join(["question,answer", *(
        f"What is {n // 2}{'?' * (n % 2)},x" for n in range(2 * COUNT))]))
    prepare(tmp_path / "q.csv")
    splits, _ = prepare(tmp_path / "t.csv")
    side = {(name[0], record["image"] or record["question"].rstrip("?"), record["id"]): name
            for name, some in splits.items() for record in some}
    pairs = defaultdict(set)
    for (table, text, number), name in side.items():
        pairs[table, (int(number) - 1) // 2].add(name)
    assert len(pairs) == 2 * COUNT and all(len(some) == 1 for some in pairs.values())


# ----------------------------------------------------------------------------- refused

ITEMS = [{"image": ["a.png", "b.png"], "question": "what?", "answer": "x", "choices": ["x", "y"], "patient": "P1",
          "study": "S", "date": "2020-01-01", "references": ["x"], "boxes": {"x": [[1, 2, 3, 4]]}},
         {"image": "a.png", "conversations": [{"from": "human", "value": "<image>what?"},
                                              {"from": "gpt", "value": "x"}]},
         {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:;base64,QUJD"}}, {
             "type": "text", "text": "what?"}]}, {"role": "assistant", "content": "x"}]}]
ODD = [None, 1, 1.5, float("nan"), True, "", [], {}, [None], [[1]], {"a": None}, "[1,2", "\ud800", "{'a': 1}"]


@pytest.mark.parametrize("item", ITEMS, ids=("question", "conversation", "messages"))
def test_a_spoiled_item_is_read_or_refused_in_one_line(item, tmp_path):
    draw, path, read = random.Random(0), tmp_path / "items.json", 0

    def spoiled(value):
        if draw.random() < 0.08:
            return draw.choice(ODD)
        return ({name: spoiled(some) for name, some in value.items()} if isinstance(value, dict) else
                list(map(spoiled, value)) if isinstance(value, list) else value)

    for _ in range(200):
        path.write_text(json.dumps([spoiled(item), item]))
        try:
            for form, tables in look_into(path, {}).tables.items():
                own = read_own(path, form, tables, Config(), {}, None, [])
                read += len(own.drafts)
                assert all(isinstance(text, str) for draft in own.drafts for text in (
                    draft.record.question, draft.record.answer, draft.patient, *(v.name for v in draft.record.views())))
        except UserError as error:
            assert "\n" not in str(error) and "items.json" in str(error)
    assert read > 100


@pytest.mark.parametrize("files, wanted", [
    ({"own/t.csv": "bild,frage\n1.png,was?\n"}, "it has columns bild, frage; the nearest layouts are"),
    ({"own/t.csv": "question,A,B\nwhich?,x,y\n"}, "choices: question,A,B,answer | which drug?,aspirin,heparin,B"),
    ({"own/t.csv": "study,image,view\n1,a,b\n"}, "reports: study,image,findings,impression | s1,1.png"),
    ({"own/t.xlsx": b"PK"}, "t.xlsx, a workbook, which is to be saved as csv"),
    ({"own/1.dat": b"\1"}, "it has 1 files .dat"), ({"own/1.zip": b"PK"}, "1 files .zip; unpack 1.zip"),
    ({"own/.DS_Store": b"\0"}, "it has no file"),
    ({}, "no folder and no csv there")])
def test_what_is_not_understood_is_refused_with_the_nearest_layouts(files, wanted, prepare, tmp_path):
    for name, content in files.items():
        put(tmp_path / name, content)
    with pytest.raises(UserError) as error:
        prepare(tmp_path / "own")
    assert wanted in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 900
    assert not (tmp_path / "shards/own").exists()


@pytest.mark.parametrize("columns, files, wanted", [
    ("patient:pid", ("a/1.png", "b/2.png"), "patient:pid: no table has it, and what was found, class folders, is none"),
    ("patient:pid", ("1.png", "1.xml"), "patient:pid: no table has it, and what was found, boxes, is none"),
    ("view:pid", ("1.png", "q.csv"), "view:pid: questions have no column for that, but for image, question")])
def test_a_column_that_nothing_reads_is_refused(columns, files, wanted, prepare, tmp_path):
    words = {".xml": "<annotation></annotation>", ".csv": "image,question,answer,pid\n1.png,what?,this,7\n"}
    for name in files:
        put(tmp_path / "own" / name, words.get(name[-4:]) or picture(16, 16))
    with pytest.raises(UserError) as error:
        prepare(tmp_path / "own", columns=columns)
    assert str(error.value).startswith(f"--columns={wanted}")


@pytest.mark.parametrize("row, more, wanted", [
    ("https://a.org/x{0}.png,what is {0}?,this", "", "nothing is fetched, so download them, and name their files"),
    ("other/x{0}.png,what is {0}?,this", "", "paths start at the table's folder"),
    ("other/x{0}.png,what is {0}?,this", "films.zip", "unpack films.zip")])
def test_where_no_image_is_there_that_is_the_reason(row, more, wanted, prepare, tmp_path):
    put_questions(tmp_path / "own", row=row)
    if more:
        put(tmp_path / "own" / more, b"PK")
    with pytest.raises(UserError, match=f"none of its 12 images is there, .* the first; {wanted}$"):
        prepare(tmp_path / "own")


def test_a_table_that_cannot_be_read_is_said(prepare, tmp_path):
    put_questions(tmp_path / "own", row="{0}.png,what, is {0}?,finding {0}")
    with pytest.raises(UserError, match=r"not understood.*questions.csv: row 2 has 4 cells, but there are 3 columns"):
        prepare(tmp_path / "own")
    for name in "ab":
        put_pictures(tmp_path / "own" / name)
    assert "passed over: " in (printed := prepare(tmp_path / "own")[1]) and "row 2 has 4 cells" in printed
    for number in range(65):
        put(tmp_path / "many" / "s" / f"{number}.json", json.dumps({"question": "what?", "answer": f"this {number}"}))
    with pytest.raises(UserError, match="65 of 65 tables are not looked into, as there are more than 64; join them"):
        prepare(tmp_path / "many")


@pytest.mark.parametrize("flags, wanted", [
    (("--name=x",), "--name: with --own=path alone"), (("--folds=3",), "--folds: with --own"),
    (("--slices=middle",), "--slices: with --own"), (("--dry_run",), "--dry_run: with --own"),
    (("--own=x", "--only=sample"), "--own: without --only"), (("--own=x", "--fold=0"), "--folds=0 --fold=0: two folds"),
    (("--own=x", "--folds=3", "--fold=3"), "one of them, from 0 to 2"), (("--own=x", "--folds=1"), "two folds or more"),
    (("--own=x", "--name=.x"), "--name=.x: letters"), (("--own=x", "--name=a b"), "--name=a b: letters")])
def test_flags_that_do_not_go_together_are_refused(flags, wanted):
    with pytest.raises(UserError) as error:
        main(parse_flags(Config, flags))
    assert wanted in str(error.value)


def test_a_dry_run_prepares_nothing(prepare, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    splits, printed = prepare(put_patients(tmp_path / "own"), dry_run=True)
    assert splits == {} and "the first samples; nothing is prepared" in printed and not (tmp_path / "shards").exists()
    page, = (tmp_path / "out").glob("own_*.html")
    assert "what is 3?" in page.read_text() and "mrn00" not in page.read_text().lower()
