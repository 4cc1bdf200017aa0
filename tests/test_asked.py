"""Tables of questions about a folder of images: what is found, answered, refused with a reason, and gone on with."""

import csv
import json
import math
import unicodedata

import pytest
import torch

import asking
import eval_vqa
from data import Record
from eval_vqa import Config
from formats.frames import Scan, ScanSettings, pixels_of
from formats.pictures import Pictures
from generate import ask
from plumbing.flags import UserError, parse_flags
from prepare.leaks import guard
from tasks import asked
from tasks.asked import ANSWERED, look_up, open_image, read_questions
from test_eval import drawing, write_questions
from test_evaluations import QUESTIONS, make_run
from weights import load_run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(shards, run, folder of images) of a tiny model that answers at random; nobody changes them."""
    folder = tmp_path_factory.mktemp("asked")
    write_questions(folder / "shards", "learn", QUESTIONS)
    guard(folder / "shards", "drop")
    (folder / "images/deep").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.png", "deep/a.png", "deep/c.tif")):
        drawing(number).save(folder / "images" / name)
    (folder / "images/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "images/notes.txt").write_text("no image")
    (folder / "images/.hidden.png").write_bytes(b"")
    return folder / "shards", make_run(folder / "run", folder / "shards"), folder / "images"


def table_of(folder, *rows, name="q.csv", heads=("image", "question")):
    with open(folder / name, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([heads, *rows])
    return folder / name


def answers_of(made, ask, place, **flags):
    shards, run, images = made
    eval_vqa.main(Config(**{"run": str(run), "shards_dir": str(shards), "ask": str(ask), "images": str(images),
                            "answers": str(place), "max_new_tokens": 4, **flags}))
    with open(place, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# ----------------------------------------------------------------------------- images and tables

@pytest.mark.parametrize("name, file, why", [
    ("b.png", "b.png", ""), ("B.PNG", "b.png", ""), ("b", "b.png", ""), ("deep/c.tif", "deep/c.tif", ""),
    ("c.tif", "deep/c.tif", ""), ("deep\\c.tif", "deep/c.tif", ""), ("/data/old/c.tif", "deep/c.tif", ""),
    ("a.png", "a.png", ""), ("deep/a.png", "deep/a.png", ""),  # whose paths tell them apart
    ("a", "a.png", ""),  # as a path without its end
    ("z.png", "", "z.png: no such image in"), (".hidden.png", "", "no such image"), ("notes.txt", "", "no such image"),
    ("C:\\Users\\ann\\DEEP\\C.TIF", "deep/c.tif", "")])
def test_images_are_found_by_path_and_name(made, name, file, why):
    pictures, reason = look_up(Pictures(made[2]), "row 2", name)
    assert [source for source, _ in pictures] == ([made[2] / file] if file else []) and why in reason


def test_the_end_of_a_name_counts_where_names_differ_in_it_alone(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("x.png", "x.bmp"):
        drawing(0).save(tmp_path / "deep" / name)
    ((source, _),), _ = look_up(Pictures(tmp_path), "row 2", "x.bmp")
    assert source == tmp_path / "deep/x.bmp"
    assert look_up(Pictures(tmp_path), "row 2", "x") == ((), "row 2: 2 images are called 'x'; name it by its path")


def test_a_slice_of_a_series_is_found_by_its_own_file(tmp_path):
    from test_own_pictures import put_series  # skips this test alone where pydicom is missing
    put_series(tmp_path / "series", 2)
    (tmp_path / "bad.dcm").write_bytes(bytes(128) + b"DICM")
    pictures = Pictures(tmp_path, ScanSettings())
    pairs, _ = look_up(pictures, "row 2", "series")
    assert [label for _, label in pairs] == ["slice 1 of 2", "slice 2 of 2"]
    ((frame, label),), why = look_up(pictures, "row 2", "IM1")
    assert (frame, label, why) == (pairs[1][0], "", "") and open_image(tmp_path / "series/IM1") == ((frame, ""),)
    for name in ("bad.dcm", "/old/BAD.dcm"):
        assert look_up(pictures, "row 2", name) == ((), f"{name}: {pictures.refused[tmp_path / 'bad.dcm']}")


def test_umlauts_are_one_letter_however_they_are_written(tmp_path):
    drawing(0).save(tmp_path / unicodedata.normalize("NFD", "Müller.png"))
    table = table_of(tmp_path, (unicodedata.normalize("NFC", r"D:\scans\MÜLLER.png"), "what is shown?"))
    (row,) = read_questions(str(table), "")
    assert len(row.pictures) == 1 and row.error == ""


@pytest.mark.parametrize("content, name", [
    ("File_Name;Frage\na.png|b.png;was ist das?\n;und hier?\n", "q.csv"),
    ("\ufeffIMAGE\tQuestion\na.png | b.png\twas ist das?\n\tund hier?\n", "q.tsv"),
    ('{"images": ["a.png", "b.png"], "question": "was ist das?"}\n\n{"question": "und  hier?"}\n', "q.jsonl"),
    ('[{"image": "[\\"a.png\\", \\"b.png\\"]", "q": "was ist das?"}, {"q": "und hier?"}]', "q.json"),
    ("image_1,image_2,Pregunta\na.png,B.PNG,was ist das?\n,,und hier?\n", "q.txt"),
    ("Bild;Frage\n\"a.png;b.png\";was ist das?\n;und hier?\n", "q.csv")])
def test_tables_of_several_kinds(made, tmp_path, content, name):
    (tmp_path / name).write_text(content, encoding="utf-8")
    first, second = read_questions(str(tmp_path / name), made[2])
    assert (first.image.lower(), first.question, first.error) == ("a.png|b.png", "was ist das?", "")
    assert [source for source, _ in first.pictures] == [made[2] / "a.png", made[2] / "b.png"]
    assert (second.image, second.question, second.pictures, second.error) == ("", "und hier?", (), "")


@pytest.mark.parametrize("ask, images, message", [
    ("missing.csv", "", "--ask=missing.csv: no such file"), ("what is it?", "", "name it with --images="),
    ("what is it?", "missing", "--images=missing: no such folder"),
    ("columns.csv", "", "no column of questions .image, text"),
    ("latin.csv", "", "not a csv in UTF-8"), ("sheet.xlsx", "", "a workbook, which is not read"),
    ("what is it?", "empty", "no image or scan in it")])
def test_a_mistake_gets_one_line(tmp_path, monkeypatch, ask, images, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "columns.csv").write_text("image,text\na.png,what?\n")
    (tmp_path / "latin.csv").write_bytes(b"image,question\na.png,R\x81ntgen?\n")
    (tmp_path / "sheet.xlsx").write_bytes(b"PK")
    with pytest.raises(UserError, match=message):
        read_questions(ask, images)


def test_what_was_understood_in_one_of_several_ways_is_said(made, tmp_path, capsys):
    (tmp_path / "q.csv").write_bytes("image,question\nold/c.tif,Röntgen?\n".encode("cp1252"))
    (row,) = read_questions(str(tmp_path / "q.csv"), made[2])
    assert row.question == "Röntgen?" and [source for source, _ in row.pictures] == [made[2] / "deep/c.tif"]
    encoding, alone, _ = capsys.readouterr().err.splitlines()
    assert "read as Windows-1252" in encoding and "by the name of their file alone: deep/c.tif" in alone


# ----------------------------------------------------------------------------- answers

def test_every_row_has_its_answer_or_the_reason(made, tmp_path, capsys):
    long = "is it large? " * 200
    rows = answers_of(made, table_of(tmp_path, ("a.png", "is figure 3 large?"), ("broken.png", "is it large?"),
                                     ("b.png", "wie viel Grad?"), ("a.png", "which organ?"), ("", "is it large?"),
                                     ("z.png", "is it?"), ("b.png", ""), ("a.png|b.png", "is figure 3 large?"),
                                     ("a.png", long)), tmp_path / "out.csv")
    assert list(rows[0]) == list(ANSWERED) and len(rows) == 9
    reasons = [row["error"] for row in rows]
    assert [bool(reason) for reason in reasons] == [False, True, False, False, False, True, True, False, True]
    assert "broken.png: not an image that can be read" in reasons[1] and reasons[6] == "no question"
    assert "tokens; this model was trained on samples of 256, so ask a shorter question" in reasons[8]
    assert "5 answers, and 4 questions without one" in capsys.readouterr().out
    model, tokenizer = load_run(made[1]).eval(), eval_vqa.open_trained_run(str(made[1]))[3]
    for row in (rows[0], rows[2], rows[3]):
        assert row["answer"] == ask(model, tokenizer, row["question"], made[2] / row["image"], 32, max_new_tokens=4)
    assert rows[0]["remark"] == "" and rows[2]["remark"].startswith("unlike any question that it was trained on")
    assert all(0 < float(row["probability"]) <= 1 for row in rows if not row["error"])
    assert rows[1]["answer"] == rows[1]["probability"] == rows[1]["cut"] == ""


@torch.no_grad()
def test_a_probability_is_that_of_exactly_this_answer(made, tmp_path):
    """By another way: the whole sample in one pass, as in training."""
    (row,) = answers_of(made, table_of(tmp_path, ("a.png", "which organ?")), tmp_path / "out.csv", max_new_tokens=3)
    model, tokenizer = load_run(made[1]).eval(), eval_vqa.open_trained_run(str(made[1]))[3]
    tokens, [(begin, _)], _ = tokenizer.write(Record("", "which organ?", "", image=b""))
    image = torch.from_numpy(pixels_of(made[2] / "a.png", 32, "squash"))
    encoded, total = model.encode_images([image]), 0.0
    place, count = tokens.index(-1), model.vision.tokens(32, 32)
    flat = tokens[:place] + [0] * count + tokens[place + 1:begin]
    at = torch.arange(place, place + count)
    room = len(flat) + 3
    while len(flat) < room:
        logits = model.language(torch.tensor(flat), image_tokens=encoded, image_at=at)[-1][:tokenizer.vocab_size]
        token = int(logits.argmax())
        total += float(logits.log_softmax(-1)[token])
        flat.append(token)
        if token in tokenizer.stops:
            break
    assert float(row["probability"]) == pytest.approx(math.exp(total), rel=1e-3)
    assert row["cut"] == ("no" if token in tokenizer.stops else "yes")


def test_rows_of_one_image_and_of_several_may_name_their_columns_so(made, tmp_path):
    rows = [{"image": "b.png", "question": "is it?"},
            {"images": ["b.png", "deep/c.tif"], "question": "has it changed?"},
            {"image": "", "images": None, "question": "what is fever?"}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = read_questions(str(tmp_path / "q.jsonl"), str(made[2]))
    assert [(row.image, len(row.pictures), row.error) for row in asked] == [
        ("b.png", 1, ""), ("b.png|deep/c.tif", 2, ""), ("", 0, "")]


def test_one_question_about_every_image_of_a_folder(made, tmp_path):
    rows = answers_of(made, "is figure 3 large?", tmp_path / "out.csv")
    assert [row["image"] for row in rows] == ["a.png", "b.png", "broken.png", "deep/a.png", "deep/c.tif"]
    assert [bool(row["error"]) for row in rows] == [False, False, True, False, False]
    assert {row["question"] for row in rows} == {"is figure 3 large?"}


def test_questions_about_an_image_share_it(made, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(asking, "pixels_of", lambda source, *how: opened.append(source.name) or pixels_of(source, *how))
    answers_of(made, table_of(tmp_path, *[(name, f"is figure {n} large?") for n in range(3)
                                          for name in ("a.png", "b.png")]), tmp_path / "out.csv")
    assert sorted(opened) == ["a.png", "b.png"]


def test_a_killed_run_goes_on_and_ends_with_the_same_answers(made, tmp_path, monkeypatch):
    table = table_of(tmp_path, *[(name, f"is figure {n} large?") for n in range(3)
                                 for name in ("a.png", "b.png", "broken.png", "deep/c.tif")])
    whole = answers_of(made, table, tmp_path / "whole.csv", batch_size=1)
    note, noted = asked.Kept.note, []

    def die(kept, number):
        note(kept, number)
        noted.append(number)
        if len(noted) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(asked.Kept, "note", die)
        answers_of(made, table, tmp_path / "cut.csv", batch_size=1)
    assert not (tmp_path / "cut.csv").exists()
    partial = tmp_path / ".cut.csv.so_far"
    with open(partial, "a") as file:
        file.write('[7, "torn')
    monkeypatch.setattr(asked.Kept, "note", lambda kept, number: (note(kept, number), noted.append(number)))
    assert answers_of(made, table, tmp_path / "cut.csv", batch_size=1) == whole
    assert sorted(noted) == list(range(12)) and not partial.exists()  # none was answered twice
    partial.write_text('of other answers\n[0, "wrong", "", {}]\n')
    assert answers_of(made, table, tmp_path / "cut.csv", batch_size=1) == whole


def test_where_answers_go(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = table_of(tmp_path, ("", "is figure 3 large?"))
    flags = {"run": str(made[1]), "shards_dir": str(made[0]), "max_new_tokens": 2}
    eval_vqa.main(Config(ask=str(table), **flags))
    eval_vqa.main(Config(ask="is figure 3 large?", images=str(made[2]), **flags))
    assert (tmp_path / "q_answers.csv").is_file() and (tmp_path / "out/answers.csv").is_file()
    with pytest.raises(UserError, match="the table of questions itself"):
        eval_vqa.main(Config(ask=str(table), answers="q.csv", **flags))
    assert table.read_text().startswith("image,question")
    (tmp_path / "other.csv").write_text("image,question\na.png,is it large?\n")
    with pytest.raises(UserError, match="other.csv: there already, and no csv of answers; name another file"):
        eval_vqa.main(Config(ask=str(table), answers="other.csv", **flags))
    assert (tmp_path / "other.csv").read_text() == "image,question\na.png,is it large?\n"
    eval_vqa.main(Config(ask=str(table), **flags))  # answers of before make room


@pytest.mark.parametrize("flags", [{"images": "folder"}, {"answers": "a.csv"}, {"images": "folder", "question": ""}])
def test_a_folder_of_images_without_ask_is_not_passed_over(made, flags):
    with pytest.raises(UserError, match="--images and --answers: with --ask"):
        eval_vqa.main(Config(**{"run": str(made[1]), "question": "is it large?", **flags}))


# ----------------------------------------------------------------------------- --question

def test_a_question_has_its_remark_beside_the_answer_and_not_in_it(made, tmp_path, capsys):
    flags = {"run": str(made[1]), "shards_dir": str(made[0]), "image": str(made[2] / "a.png"), "max_new_tokens": 4}
    eval_vqa.main(Config(question="is figure 3 large?", **flags))
    (like, none) = capsys.readouterr()
    eval_vqa.main(Config(question="Wie hoch ist das Fieber?", **flags))
    unlike, remark = capsys.readouterr()
    assert like.count("\n") == unlike.count("\n") == 1 and none == ""
    assert remark.startswith("this question is unlike any question that it was trained on")
    eval_vqa.main(Config(question="is figure 3 large?", **flags | {"shards_dir": str(tmp_path)}))
    again, unknown = capsys.readouterr()
    assert again == like and "not known: " in unknown and "is not here" in unknown
    with pytest.raises(UserError, match="broken.png: not an image that can be read"):
        eval_vqa.main(Config(question="is it?", **flags | {"image": str(made[2] / "broken.png")}))
    with pytest.raises(UserError, match="a folder; name one image file"):
        eval_vqa.main(Config(question="is it?", **flags | {"image": str(made[2])}))


def test_a_scan_is_shown_by_the_runs_window_and_the_slices_that_are_named(made, monkeypatch, capsys):
    seen = []

    def find(files, settings, folder=None):
        seen.append(settings)
        return [Scan("ct", (made[2] / "a.png", made[2] / "b.png"), ("slice 1 of 2", "slice 2 of 2"))], {}

    monkeypatch.setattr(asked, "find_scans", find)
    flags = {"run": str(made[1]), "shards_dir": str(made[0]), "image": str(made[2] / "a.png"), "max_new_tokens": 4}
    eval_vqa.main(Config(question="is figure 3 large?", window="lung", slices="2", **flags))
    model, tokenizer = load_run(made[1]).eval(), eval_vqa.open_trained_run(str(made[1]))[3]
    assert capsys.readouterr().out == ask(model, tokenizer, "is figure 3 large?", made[2] / "a.png", 32,
                                          max_new_tokens=4) + "\n"
    assert (seen[0].window, seen[0].slices) == ("lung", "2") and (seen[1].window, seen[1].slices) == ("auto", "all")
    rows = asked.open_rows(Config(question="?", image=flags["image"], shards_dir="none"), {
        "image": {"window": "bone"}, "flags": {"data": "learn"}, "inputs": {"data": {}}, "tests": {}})
    assert seen[-1].window == "bone" and len(rows) == 1  # as the run's images were prepared
    for words in (["--window=red"], ["--slices=some"]):
        with pytest.raises(UserError, match=words[0]):
            parse_flags(Config, words)
    prompt = asking.prompt_of(tokenizer, "is it?", ("slice 1 of 2", "slice 2 of 2"))
    text = tokenizer.decode([token for token in prompt if token > 2])
    assert [token for token in prompt if token < 0] == [-1, -2] and "slice 1 of 2:" in text and "slice 2 of 2:" in text
    assert asking.prompt_of(tokenizer, "is it?", ("",)) == tokenizer.write(Record("", "is it?", image=b""))[0][:len(
        asking.prompt_of(tokenizer, "is it?", ("",)))]


def test_a_dicom_file_is_read_as_any_image(made, tmp_path, capsys):
    data = pytest.importorskip("pydicom.data")
    scan = data.get_testdata_file("CT_small.dcm")
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans/CT_small.dcm").write_bytes(open(scan, "rb").read())
    flags = {"run": str(made[1]), "shards_dir": str(made[0]), "max_new_tokens": 4}
    eval_vqa.main(Config(question="is figure 3 large?", image=scan, **flags))
    answer = capsys.readouterr().out
    eval_vqa.main(Config(ask="is figure 3 large?", images=str(tmp_path / "scans"), answers=str(tmp_path / "a.csv"),
                         **flags))
    (row,) = csv.DictReader((tmp_path / "a.csv").read_text().splitlines())
    assert row["image"] == "CT_small.dcm" and row["answer"] + "\n" == answer and row["error"] == ""
