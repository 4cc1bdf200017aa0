"""One command for all prepared tests: stopped and gone on with, anybody's answers in a run's place, runs compared."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import eval_vqa
from data import Mixture, Record, Tokenizer, View
from eval_vqa import Config
from generate import Answer
from plumbing.flags import UserError
from plumbing.shards import Shard
from plumbing.sources import open_shards
from prepare import sample
from prepare.datasets import multiple_choice
from prepare.leaks import guard
from prepare.reports import join_sections
from prepare.studies import study_record
from tasks.evaluations import find_evaluations, read_evaluation
from tasks.scoring import conclude
from tasks.splits import open_splits
from test_eval import drawing, encoded, write_questions
from test_evaluations import make_run
from test_ranks import together

ROOT = Path(__file__).resolve().parent.parent
DRUGS = ("aspirin", "heparin", "nothing")
BOX = {"cell": ((0.1, 0.1, 0.5, 0.5),)}


def film(seed, role):
    return View(encoded(drawing(seed)), f"{seed}.png", role)


def a_study(number):
    """A Record of a study, every other one with an earlier one."""
    prior = (film(900 + number, "prior frontal"), "Prior report: there is an effusion.") if number % 2 else ()
    findings = "there is no effusion on the left." if number % 3 else "the effusion is larger."
    return Record(f"s{number}", "write the findings of this study.", findings, group=f"p{number}", type="findings",
                  parts=("Indication: cough", *prior, film(800 + number, "frontal")))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(shards, run): five prepared tests of five kinds, and a tiny model that answers at random."""
    folder = tmp_path_factory.mktemp("harness")
    shards = folder / "shards"
    quiz = [Record(str(number), *multiple_choice(f"which of {number}?", DRUGS, number % 3), choices=DRUGS)
            for number in range(9)]
    write_questions(shards, "learn", {"train": [("is it large?", "yes", 1), ("which organ?", "a lung", 2)],
                                      "test": [("is it large?", "no", 11), ("which organ?", "a lung", 12)]})
    write_questions(shards, "quiz", {"train": quiz[:4], "test": quiz[4:]}, "text questions", task="choices")
    write_questions(shards, "studies", {"train": [a_study(n) for n in range(4)],
                                        "test": [a_study(n) for n in range(4, 10)]}, "reports")
    write_questions(shards, "found", {split: [
        Record(f"{split}{seed}", "detect cell", "", encoded(drawing(seed)), f"{seed}.png", boxes=BOX)
        for seed in seeds] for split, seeds in (("train", (70, 71)), ("test", (72, 73)))}, "boxes")
    write_questions(shards, "captions", {split: [("what does this figure show?", f"a cell {seed} of the lung", seed)
                                                 for seed in seeds]
                                         for split, seeds in (("train", (60, 61)), ("test", (62, 63)))}, "captions")
    guard(shards, "drop")
    return shards, make_run(folder / "run", shards)


def evaluate(made, **flags):
    eval_vqa.main(Config(**{"run": str(made[1]), "shards_dir": str(made[0]), "data": "all", "max_new_tokens": 3,
                            **flags}))


TABLES = ("table.txt", "table.csv", "table.tex", "published.csv")


def tables_in(out):
    return {name: (out / name).read_bytes() for name in TABLES}


# ----------------------------------------------------------------------------- all of them

def test_all_prepared_tests_are_answered_and_in_one_table(made, tmp_path, capsys):
    evaluate(made, out=str(tmp_path / "a"))
    text = capsys.readouterr().out
    names = {next(iter(read_evaluation(folder)["results"])) for folder in find_evaluations(tmp_path / "a")}
    assert names == {f"{name}/test" for name in ("learn", "quiz", "studies", "found", "captions")}
    table = (tmp_path / "a/table.txt").read_text()
    for name, metric in (("learn", "BLEU-1"), ("quiz", "accuracy"), ("studies", "ROUGE-L"), ("found", "F-IoU")):
        assert any(name in line and metric in line for line in table.splitlines()), (name, table)
    assert "seconds" in text and "seconds" not in table
    before = tables_in(tmp_path / "a")
    evaluate(made, out=str(tmp_path / "a"))
    assert capsys.readouterr().out.count("there already") == 5
    assert tables_in(tmp_path / "a") == before


def test_a_kill_in_the_middle_leaves_the_same_table_to_the_byte(made, tmp_path):
    command = [sys.executable, ROOT / "eval_vqa.py", f"--run={made[1]}", f"--shards_dir={made[0]}", "--data=all",
               "--max_new_tokens=3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*command, f"--out={tmp_path}/cut"], env=environment, stdout=subprocess.PIPE,
                          text=True) as run:
        for line in run.stdout:
            if line.startswith("scores in"):
                run.kill()
                break
    some = len(find_evaluations(tmp_path / "cut"))
    assert 1 <= some < 5 and not (tmp_path / "cut/table.txt").exists()
    again = subprocess.run([*command, f"--out={tmp_path}/cut"], env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.count("there already") >= 1
    evaluate(made, out=str(tmp_path / "whole"))
    assert tables_in(tmp_path / "cut") == tables_in(tmp_path / "whole")


@pytest.mark.parametrize("spoil", ["predictions", "results"])
def test_what_is_damaged_is_answered_again(made, tmp_path, capsys, spoil):
    evaluate(made, out=str(tmp_path), blind="none")
    before = tables_in(tmp_path)
    (folder,) = [folder for folder in find_evaluations(tmp_path) if "_quiz_" in folder.name]
    path = folder / ("predictions.jsonl" if spoil == "predictions" else "results.json")
    path.write_bytes(path.read_bytes().replace(b"a", b"b", 1))
    capsys.readouterr()
    evaluate(made, out=str(tmp_path), blind="none")
    assert capsys.readouterr().out.count("there already") == 4
    assert tables_in(tmp_path) == before


def test_other_code_or_other_flags_answer_again(made, tmp_path, capsys, monkeypatch):
    evaluate(made, out=str(tmp_path), limit=1, blind="none")
    monkeypatch.setattr(eval_vqa, "describe_machine", lambda device: {"commit": "other", "device": "cpu"})
    capsys.readouterr()
    evaluate(made, out=str(tmp_path), limit=1, blind="none")
    assert "there already" not in capsys.readouterr().out
    evaluate(made, out=str(tmp_path), limit=1, blind="none", seed=1)
    assert "there already" not in capsys.readouterr().out


def test_all_leaves_out_what_the_run_cannot_be_asked(made, tmp_path, capsys):
    tokenizer = Tokenizer(made[1] / "tokenizer.model")
    names = {data: {shard.folder.parent.name for shard in open_splits(data, "test", made[0], tokenizer)}
             for data in ("all", "")}
    assert names == {"all": {"learn", "quiz", "studies", "found", "captions"}, "": {"learn", "found"}}
    other = shutil.copytree(made[0], tmp_path / "shards")
    write_questions(other, "wide", {"test": [("is it large?", "no", 1)]}, size=64)
    run_images = Shard(made[0] / "learn/test").manifest["image"]
    shards = open_splits("all", "test", other, tokenizer, run_images)
    assert {shard.folder.parent.name for shard in shards} == names["all"]
    assert "not answered:" in capsys.readouterr().out


def test_the_first_of_two_processes_knows_what_is_there(made, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_vqa, "is_done", lambda *_: torch.distributed.get_rank() == 1)
    told = together(2, Config(run=str(shutil.copytree(made[1], tmp_path / "run")), shards_dir=str(made[0]), data="all",
                              max_new_tokens=3, limit=1, blind="none"), eval_vqa.main)
    assert told.count("scores in") == 5 and "there already" not in told


# ----------------------------------------------------------------------------- studies

def test_a_study_is_asked_without_its_prior_and_with_films_exchanged(made, tmp_path, capsys):
    evaluate(made, out=str(tmp_path), data="studies")
    text = capsys.readouterr().out
    assert "3 of them of a patient with an earlier study" in text and "constant report" in text
    (folder,) = find_evaluations(tmp_path)
    assert {path.name for path in folder.glob("*.jsonl")} == {
        f"predictions{row}.jsonl" for row in ("", "_image_shuffled", "_prior_left_out", "_order_swapped",
                                              "_constant_report")}
    rows = [[json.loads(line) for line in (folder / name).read_text().splitlines()]
            for name in ("predictions.jsonl", "predictions_prior_left_out.jsonl")]
    for number, (own, without) in enumerate(zip(*rows, strict=True)):
        assert number % 2 or own == without and own["cut"]  # those of even numbers have no earlier study


# What a perfect reader of drawn studies would say: by the films that it is shown, in the order in which they are shown


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """(shards, run, {pixels of a film: (side, size of its effusion)}) of 96 drawn studies, each case twice."""
    folder = tmp_path_factory.mktemp("drawn")
    records = [record for split, record in itertools.islice(sample.study_records(study_record), 96)]
    write_questions(folder / "shards", "drawn", {"train": records[:2], "test": records}, "reports", size=64)
    guard(folder / "shards", "drop")
    shard, films = Shard(folder / "shards/drawn/test"), {}
    for number, record in enumerate(records):
        side, before, now = sample.read_study_case(int(record.id[-6:]))
        tokens = shard.read_sample(number).tokens
        sizes = [now] if before is None else [before, now]
        for image, size in zip((-1 - tokens[tokens < 0]).tolist(), sizes, strict=True):
            films[shard.read_image(image).tobytes()] = side, size
    return folder / "shards", make_run(folder / "run", folder / "shards", "drawn", size=64), films


@pytest.mark.parametrize("reads_prior", [True, False])
def test_a_model_that_reads_the_prior_loses_what_it_should(drawn, tmp_path, monkeypatch, capsys, reads_prior):
    shards, run, films = drawn
    tokenizer = Tokenizer(run / "tokenizer.model")

    def generate(model, groups, *rest, **more):
        for group, (images, prompts) in enumerate(groups):
            (side, now), *_ = [films[image.tobytes()] for image in images[::-1]]
            before = films[images[0].tobytes()][1] if len(images) > 1 and reads_prior else None
            side = side if now else films[images[0].tobytes()][0]
            text, _ = join_sections(sample.write_study(side, before, now))
            yield [Answer(group, place, len(prompts), None, tokenizer.encode(text), done=True, stop=2)
                   for place in range(len(prompts))]

    monkeypatch.setattr(eval_vqa, "generate", generate)
    evaluate((shards, run), out=str(tmp_path), data="drawn", max_new_tokens=0)
    (folder,) = find_evaluations(tmp_path)
    rows = {row: {name: cell[0] for name, cell in cells.items()} for row, cells in read_evaluation(folder)[
        "results"]["drawn/test"]["with a prior"]["rows"].items()}
    if not reads_prior:  # the films of today alone: without the earlier one it says the same
        assert rows["prior left out"] == rows["model"] and rows["the prior adds"]["temporal F1"] == 0
        assert rows["model"]["temporal F1"] == 0
        return
    assert rows["model"]["ROUGE-L"] == rows["model"]["findings F1"] == rows["model"]["temporal F1"] == 100
    assert rows["prior left out"]["temporal F1"] == 0 and rows["the prior adds"]["temporal F1"] == 100
    assert 0 < rows["order swapped"]["temporal F1"] < 60  # unchanged and absent stay right, larger becomes smaller
    texts = {name: [json.loads(line) for line in (folder / f"predictions{name}.jsonl").read_text().splitlines()]
             for name in ("", "_order_swapped")}
    kinds = {"larger": "smaller than before", "smaller": "larger than before", "new": "has resolved",
             "resolved": "is new", "unchanged": "is unchanged"}
    for own, swapped in zip(*texts.values(), strict=True):
        if own["type"] in kinds:
            assert kinds[own["type"]] in swapped["prediction"] and own["prediction"] == own["answer"]


# ----------------------------------------------------------------------------- anybody's answers

def write_answers(made, path, change=lambda line: line, key="prediction", names=("quiz", "learn")):
    lines = []
    for name in names:
        for record in Shard(made[0] / name / "test").read_records():
            lines.append(change({"dataset": f"{name}/test", "id": record["id"], key: record["answer"]}))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines if line))
    return path


def test_anybodys_answers_get_the_same_tables(made, tmp_path, capsys):
    path = write_answers(made, tmp_path / "theirs.jsonl", key="response")
    eval_vqa.main(Config(predictions=str(path), shards_dir=str(made[0])))
    text = capsys.readouterr().out
    assert "7 answers, from 'response' of each line" in text
    folders = {folder.name: read_evaluation(folder) for folder in find_evaluations(tmp_path)}
    assert set(folders) == {"theirs_quiz_test", "theirs_learn_test"}
    quiz = folders["theirs_quiz_test"]["results"]["quiz/test"]
    assert quiz["all"]["rows"]["model"]["accuracy"][0] == 100 and "image shuffled" not in quiz["all"]["rows"]
    assert quiz["all"]["rows"]["model"]["letter"] == [None] * 3 and quiz["summary"]["leaks"] is None
    learn = folders["theirs_learn_test"]["results"]["learn/test"]
    assert learn["all"]["rows"]["question only"]["exact match"][0] == 50  # what the training split here would say
    table = (tmp_path / "eval/table.txt").read_text()
    assert "100 [100 100]" in table and "seconds" not in table
    capsys.readouterr()
    evaluate(made, out=str(tmp_path / "own"), data="quiz")
    own = json.loads((find_evaluations(tmp_path / "own")[0] / "results.json").read_text())["results"]["quiz/test"]
    eval_vqa.main(Config(predictions=str(find_evaluations(tmp_path / "own")[0] / "predictions.jsonl"),
                         shards_dir=str(made[0]), out=str(tmp_path / "again")))
    again = read_evaluation(find_evaluations(tmp_path / "again")[0])["results"]["quiz/test"]
    assert again["all"]["rows"] == own["all"]["rows"] and again["orders"] == own["orders"]


@pytest.mark.parametrize("change, message", [
    (lambda line: line | {"id": line["id"] + "x"}, "7 ids are of no question"),
    (lambda line: None if line["id"] == "5" else line, "of 7 questions have no answer: '5'"),
    (lambda line: line | {"dataset": "nothing/test"}, "nothing/test: not prepared"),
    (lambda line: {"id": line["id"], "prediction": ""}, "its lines name no dataset"),
    (lambda line: line | {"likelihoods": {"whole": [1], "letter": [1], "tokens": [1]}},
     "line 1: the likelihoods have not 3"),
    (lambda line: line | ({"likelihoods": dict.fromkeys(("whole", "letter", "tokens"), [1, 1, 1])}
                          if line["id"] == "5" else {}), "4 answers to quiz/test are without likelihoods"),
    (lambda line: line | {"prediction": 3}, "lines whose prediction is no text")])
def test_answers_that_do_not_fit_are_refused_in_one_line(made, tmp_path, change, message):
    path = write_answers(made, tmp_path / "theirs.jsonl", change)
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as refused:
        eval_vqa.main(Config(predictions=str(path), shards_dir=str(made[0])))
    assert len(str(refused.value).splitlines()) == 1 and not (tmp_path / "eval").exists()


def test_all_datasets_that_the_lines_name_are_scored(made, tmp_path):
    path = write_answers(made, tmp_path / "theirs.jsonl")
    eval_vqa.main(Config(predictions=str(path), shards_dir=str(made[0]), data="all"))
    assert {folder.name for folder in find_evaluations(tmp_path)} == {"theirs_quiz_test", "theirs_learn_test"}


# ----------------------------------------------------------------------------- two runs

def test_two_runs_are_compared_question_by_question(made, tmp_path, capsys):
    runs = [shutil.copytree(made[1], tmp_path / name) for name in "ab"]
    shutil.rmtree(runs[1])
    make_run(runs[1], made[0], seed=5)
    for run in runs:
        evaluate((made[0], run), data="quiz,studies")
    capsys.readouterr()
    eval_vqa.main(Config(run=str(runs[0]), against=str(runs[0]), shards_dir=str(made[0])))
    text = capsys.readouterr().out
    assert "0.0 [0.0 0.0]" in text and "quiz/test" in text and "ROUGE-L" in text
    eval_vqa.main(Config(run=str(runs[0]), against=str(runs[1]), shards_dir=str(made[0])))
    assert f"B: {runs[1]}" in capsys.readouterr().out
    eval_vqa.main(Config(run=str(runs[0]), against=str(runs[1]), shards_dir=str(made[0]), data="studies"))
    assert "quiz" not in (text := capsys.readouterr().out) and "corrected for 1 dataset" in text
    assert "other flags" not in text
    evaluate((made[0], runs[1]), data="quiz", temperature=0.7)
    eval_vqa.main(Config(run=str(runs[0]), against=str(runs[1]), shards_dir=str(made[0])))
    assert "quiz/test: answered with other flags: A --max_new_tokens=3, B --max_new_tokens=3 --temperature=0.7" in (
        capsys.readouterr().out)
    with pytest.raises(UserError, match="one at a time"):
        eval_vqa.main(Config(run=str(runs[0]), against=str(runs[1]), predictions="theirs.jsonl"))
    evaluate((made[0], runs[1]), data="learn")
    evaluate((made[0], runs[0]), data="quiz", limit=2)
    with pytest.raises(UserError, match="answers to other questions"):
        eval_vqa.main(Config(run=str(runs[0]), against=str(runs[1]), shards_dir=str(made[0])))


def test_answers_of_before_the_data_had_choices_are_compared(made, tmp_path, capsys):
    old = shutil.copytree(made[0], tmp_path / "old")
    quiz = [Record(record["id"], record["question"], record["answer"])
            for record in Shard(old / "quiz/test").read_records()]
    write_questions(old, "quiz", {"train": quiz, "test": quiz}, "text questions")
    guard(old, "drop")
    evaluate((old, made[1]), data="quiz,learn", out=str(tmp_path / "a"))
    assert capsys.readouterr().out.count("quiz/test: multiple choice that was prepared without its options") == 1
    evaluate(made, data="quiz", out=str(tmp_path / "b"))
    assert "without its options" not in capsys.readouterr().out
    eval_vqa.main(Config(run=str(tmp_path / "a"), against=str(tmp_path / "b"), shards_dir=str(made[0])))
    assert "accuracy" in capsys.readouterr().out


# ----------------------------------------------------------------------------- patients

KINDS = {"image questions": {}, "choices": {"choices": DRUGS}, "boxes": {"boxes": BOX}, "reports": {}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("patients, unit", [(1, "patients"), (0, "images")])
def test_every_task_draws_patients_where_records_name_them(tmp_path, kind, patients, unit):
    """Of one patient nothing is known about others, however many images of it there are."""
    quiz, facts = [multiple_choice(f"which of {n}?", DRUGS, n % 3) for n in range(6)], KINDS[kind]
    asked = {"choices": lambda n: quiz[n], "boxes": lambda n: ("detect cell", "")}.get(
        kind, lambda n: (f"what is {n}?", "no effusion" if n % 2 else "a large heart"))
    records = [Record(str(n), *asked(n), encoded(drawing(n)), f"{n}.png",
                      group=f"patient {n % patients}" if patients else "", **facts) for n in range(6)]
    write_questions(tmp_path, "own", {"test": records}, "image questions" if kind == "choices" else kind,
                    **({"task": "choices"} if kind == "choices" else {}))
    shard = Shard(tmp_path / "own/test")
    answers = [record["answer"] if number % 3 else "none" for number, record in enumerate(shard.read_records())]
    results, _ = conclude(shard, {"model": answers}, {"model": [{}] * 6}, "nothing is known", None, Config())
    tables = results["own/test"]
    score, low, high = tables["summary"]["lines"][0]["score"]
    assert tables["drawn"] == unit and score is not None
    assert (low is None) == (high is None) == (patients == 1)


def test_a_patient_is_never_divided_between_training_and_the_held_out_part(tmp_path):
    write_questions(tmp_path, "own", {"train": [
        Record(str(n), f"what is {n}?", "a lung", encoded(drawing(n)), f"{n}.png", group=f"patient {n % 10}")
        for n in range(40)]})
    guard(tmp_path, "drop")
    for seed in range(3):
        mixture = Mixture(**open_shards("own", tmp_path, "train"), count_tokens=lambda height, width: 0 * height + 1,
                               held_out=12, seed=seed)
        train, out = ({number % 10 for number in part[0].tolist()} for part in (mixture.train, mixture.validation))
        assert train and out and not train & out and len(mixture.validation[0]) == 12
