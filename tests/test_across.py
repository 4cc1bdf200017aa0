"""The report of all runs: means over seeds and folds by hand, what is left out and why, who is better."""

import re
from pathlib import Path

import numpy as np
import pytest

import eval_vqa
from eval_vqa import Config
from plumbing.flags import UserError
from prepare.leaks import guard
from tasks.across import HEADS, PAIRS, name_run, units_of
from tasks.compare import compare, p_text
from tasks.evaluations import find_evaluations, write_evaluation
from tasks.stats import intervals
from tasks.summary import markdown
from tasks.vqa import cell_text
from test_eval import write_questions
from test_evaluations import QUESTIONS, make_run

WORDS = ("yes", "no", "left", "right", "heart")


def evaluate(folder, right, dataset="own/test", seed=0, n=20, patients=0, run_flags={}, flags={}, faults=(1, 0, 2),
             step=9, **stands):
    """
    An evaluation of n questions in a run's folder, of which those numbers in `right` are answered rightly, one image
    each, or of so many patients.
    """
    lines = [{"dataset": dataset, "id": str(number), "image": f"{number}.png", "question": f"what is {number}?",
              "answer": WORDS[number % 5], "prediction": WORDS[number % 5] if number in right else "lung",
              "type": "", **({"group": f"p{number % patients}"} if patients else {})} for number in range(n)]
    score = 100 * len(right) / n
    tables = {"summary": {"n": n, "unit": "patients" if patients else "images", "leaks": 0, "lines": [
        {"metric": "BLEU-1", "score": [score, 0, 100], "blind": ["question only", [score / 2, 0, 100]], "adds": None,
         "unreadable": None}]},
        "answers": {"model": dict(zip(("cut", "empty", "repeating"), faults))}}
    facts = {"data": dataset, "flags": {"limit": 0, "blind": "both", "seed": 0, "temperature": 0.0, **flags},
             "checkpoint": str(folder), "dtype": "float32", "base_bits": "0", **stands}
    name = f"step_{step:06d}_{dataset.replace('/', '_')}{f'_first_{n}' * bool(facts['flags']['limit'])}"
    write_evaluation(Path(folder) / "eval" / name, {
        "checkpoint": f"step_{step:06d}",
        "stands_on": facts, "unusual_flags": {}, "results": {dataset: tables}, "training": {
            "flags": {"data": dataset.partition("/")[0], "epochs": 3, "seed": seed, "run": str(folder), **run_flags},
            "inputs": {"data": dataset}}}, {"model": lines})


def report(capsys, **flags):
    """(rows of the table, rows of the comparisons, all that was printed), each a dict by its heads."""
    eval_vqa.main(Config(report=True, **flags))
    text = capsys.readouterr().out
    tables = []
    for heads in (HEADS, PAIRS):
        places = [row for row in text.splitlines() if re.split(" {2,}", row) == list(heads)]
        if not places:
            tables.append([])
            continue
        lines = Path(flags.get("out") or "out").joinpath("report.md").read_text().splitlines()
        begin = lines.index("| " + " | ".join(heads) + " |") + 2
        rows = []
        for line in lines[begin:]:
            if not line.startswith("|"):
                break
            rows.append(dict(zip(heads, line[2:-2].split(" | "), strict=True)))
        tables.append(rows)
    return *tables, text


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ----------------------------------------------------------------------------- means

def test_seeds_stand_in_one_row_with_their_mean_and_deviation(capsys):
    right = [set(range(10)), set(range(14)), set(range(4, 16))]
    for seed, some in enumerate(right):
        evaluate(f"out/x/seed_{seed}", some, seed=seed, faults=(seed, 0, 20))
    evaluate("out/y", set(range(5)))
    (x, y), _, text = report(capsys)
    means = np.mean([[number in some for number in range(20)] for some in right], axis=0) * 100
    assert (x["dataset"], x["run"], x["questions"], x["seeds"], x["folds"]) == ("own/test", "x", "20", "3", "-")
    assert x["score"] == cell_text(intervals(means[:, None], np.arange(20))[0][0].tolist())
    assert x["score"].startswith("60.0 [")
    assert x["± seeds"] == f"{np.std([50, 70, 60], ddof=1):.1f}" and x["± folds"] == y["± seeds"] == "-"
    assert x["blind answers"] == "question only 30.0" and y["blind answers"] == "question only 12.5"
    assert [x[f"{fault} %"] for fault in ("cut", "empty", "repeating")] == ["5.0", "0.0", "100.0"]
    assert y["run"] == "y" and y["score"].startswith("25.0 [") and y["seeds"] == "1"
    assert "no test is made" in text and "by resampling images (own/test)" in text and "left out" not in text


def test_folds_are_one_row_in_which_each_question_counts_once(capsys):
    for fold, (n, rights) in enumerate([(20, (10, 16)), (10, (1, 2))]):
        for seed, right in enumerate(rights):
            evaluate(f"out/own_fold_{fold}/seed_{seed}", set(range(right)), f"own_fold_{fold}_of_2/test", seed, n)
    ((row,), pairs, _) = report(capsys)
    assert (row["dataset"], row["run"], row["questions"], row["seeds"], row["folds"]) == (
        "own/test", "own", "30", "2", "2 of 2")
    assert row["score"].startswith(f"{(13 + 1.5) / 30 * 100:.1f} [") and not pairs
    assert row["± seeds"] == f"{np.std([11 / 30, 18 / 30], ddof=1) * 100:.1f}"
    assert row["± folds"] == f"{np.std([13 / 20, 1.5 / 10], ddof=1) * 100:.1f}"


def test_a_fold_that_is_missing_is_seen(capsys):
    evaluate("out/own_fold_3", {1}, "own_fold_3_of_5/test")
    ((row,), _, _) = report(capsys)
    assert row["folds"] == "1 of 5" and row["± folds"] == "-"


@pytest.mark.parametrize("folder, name", [
    ("out/x", "x"), ("out/x/seed_2", "x"), ("out/a/b/seed_0", "a/b"), ("out/own_fold_1_of_5/seed_0", "own"),
    ("out/own/fold_3", "own"), ("out/own-fold_1", "own"), ("out/manifold_1/seed_0", "manifold_1"),
    ("else/where", "else/where"), ("out/fold_1", "fold_1"), ("out/seedling", "seedling")])
def test_names_of_runs(folder, name):
    assert name_run(Path(folder)) == name


# ----------------------------------------------------------------------------- what is left out

@pytest.mark.parametrize("odd, why", [
    (dict(data="another"), "data was own/test, now another"), (dict(flags={"limit": 5}), "limit was 0, now 5"),
    (dict(flags={"temperature": 0.7}), "temperature was 0.0, now 0.7"), (dict(dtype="bfloat16"), "dtype was float32"),
    (dict(base_bits="4"), "base_bits was 0, now 4"), (dict(run_flags={"epochs": 9}), "flags.epochs was 3, now 9"),
    (dict(run_flags={"start": "out/b/seed_1"}), "flags.start was , now out/b/seed_*")])
def test_a_seed_that_stands_on_something_else_is_left_out_and_named(capsys, odd, why):
    for seed in range(3):
        evaluate(f"out/x/seed_{seed}", {1, 2}, seed=seed, **(odd if seed == 1 else {}))
    ((row,), _, text) = report(capsys)
    assert row["seeds"] == "2" and row["score"].startswith("10.0 [")
    (line,) = [line for line in text.splitlines() if line.startswith("left out")]
    assert line.startswith("left out: out/x/seed_1/eval/") and why in line
    assert line in Path("out/report.md").read_text() and line[10:30] in Path("out/report.tex").read_text()


def test_what_changes_no_number_leaves_nothing_out(capsys):
    for seed in range(2):
        evaluate(f"out/x/seed_{seed}", {1}, seed=seed, flags={"blind": ("both", "none")[seed]},
                 run_flags={"workers": seed, "device": ("cpu", "cuda")[seed], "shards_dir": str(seed),
                            "start": f"out/before/seed_{seed}"})  # each from its own stage before
    ((row,), _, text) = report(capsys)
    assert row["seeds"] == "2" and "left out" not in text


def test_other_questions_of_another_run_are_not_compared(capsys):
    evaluate("out/a", {1}), evaluate("out/b", {2}), evaluate("out/c", {3}, data="anew")
    rows, pairs, text = report(capsys)
    assert [row["run"] for row in rows] == ["a", "b"] and len(pairs) == 1 and "left out: out/c/eval/" in text


def test_a_seed_that_is_there_twice_counts_once_and_what_is_damaged_not_at_all(capsys):
    evaluate("out/x/seed_0", {1}, seed=4), evaluate("out/x/seed_1", {1, 2}, seed=4), evaluate("out/z", {1})
    (path,) = Path("out/z/eval").glob("*/results.json")
    path.write_text(path.read_text().replace("float32", "float64"))
    ((row,), _, text) = report(capsys)
    assert row["seeds"] == "1" and row["score"].startswith("5.0 [")
    assert "the same run, seed and dataset as out/x/seed_0" in text and "left out: out/z/eval" in text


def test_a_first_look_at_some_questions_does_not_stand_in_for_all_of_them(capsys):
    for seed in range(2):
        evaluate(f"out/x/seed_{seed}", {1, 2}, seed=seed)
    evaluate("out/x/seed_0", {1, 2}, seed=0, n=4, flags={"limit": 4})  # the newest
    for n, limit in ((20, 0), (4, 4)):  # of as many runs, the one with the most questions
        evaluate("out/x/seed_0", {1, 2}, "more/test", n=n, flags={"limit": limit})
    ((more, row), _, text) = report(capsys)
    assert (row["questions"], row["seeds"]) == ("20", "2") and more["questions"] == "20" and "left out" not in text


def test_seeds_that_were_stopped_at_different_steps_are_named(capsys):
    evaluate("out/x/seed_0", {1}, seed=0, step=12), evaluate("out/x/seed_1", {1}, seed=1, step=5)
    evaluate("out/y_fold_0", {1}, "own_fold_0_of_2/test", step=12)
    evaluate("out/y_fold_1", {1}, "own_fold_1_of_2/test", step=13)  # of folds that is no wonder
    _, _, text = report(capsys)
    assert [line for line in text.splitlines() if line.startswith("not of one")] == [
        "not of one step: x on own/test: step_000012 (seed 0); step_000005 (seed 1)"]


# ----------------------------------------------------------------------------- comparisons

def test_runs_are_compared_question_by_question_over_the_means_of_their_seeds(capsys):
    evaluate("out/a/seed_0", set(range(12)), seed=0, patients=5)
    evaluate("out/a/seed_1", set(range(4, 18)), seed=1, patients=5)
    evaluate("out/b", set(range(3)), patients=5), evaluate("out/c", set(range(20)), patients=5)
    _, pairs, text = report(capsys, seed=3)
    assert [(one["run A"], one["run B"]) for one in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    ours = 50.0 * np.array([(n < 12) + (4 <= n < 18) for n in range(20)])
    wanted = compare(ours, 100.0 * (np.arange(20) < 3), np.arange(20) % 5 + 20, "patients", 3)
    assert pairs[0]["A - B"] == cell_text(wanted["difference"]) and pairs[0]["units"] == "patients"
    assert pairs[0]["p"] == p_text(wanted["p"]) and (pairs[0]["A"], pairs[0]["B"]) == ("65.0", "15.0")
    assert all(float(one["p, Holm"].lstrip("<")) >= float(one["p"].lstrip("<")) for one in pairs)


def test_units_are_patients_else_images_else_questions():
    lines = [{"id": "1", "image": "a"}, {"id": "2", "image": "a"}, {"id": "3", "image": "b"}]
    unit, units = units_of(lines)
    assert unit == "images" and units[0] == units[1] != units[2]
    unit, units = units_of([line | {"group": group} for line, group in zip(lines, ("p", "q", "q"))])
    assert unit == "patients" and units[0] != units[1] == units[2]
    unit, units = units_of([{"id": "1"}, {"id": "2", "context": "text"}, {"id": "3", "context": "text"}])
    assert unit == "questions" and units[0] != units[1] == units[2]


# ----------------------------------------------------------------------------- files and places

def test_the_report_is_text_markdown_and_latex(capsys):
    evaluate("out/a_b", {1, 2}), evaluate("out/c", {1})
    _, _, text = report(capsys)
    written = Path("out/report.txt").read_text()
    assert text == written + "the report is in out/report.txt, .md and .tex\n"
    tex = Path("out/report.tex").read_text()
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == 2 and r"own/test & a\_b & 20 & 1" in tex
    assert not [path for path in Path("out").iterdir() if path.name.startswith(".")]
    assert markdown(["dataset", "n"], [["a|b", "3"]]) == ["| dataset | n |", "| --- | --: |", r"| a\|b | 3 |"]


def test_some_runs_and_datasets_of_several(capsys, tmp_path):
    for run in "abc":
        evaluate(f"out/{run}", {1}), evaluate(f"out/{run}", {1}, "more/test")
    rows, pairs, _ = report(capsys, run="out/a, out/c,", data="more", out=str(tmp_path / "else"))
    assert [(row["dataset"], row["run"]) for row in rows] == [("more/test", "a"), ("more/test", "c")]
    assert len(pairs) == 1 and not Path("out/report.txt").exists()
    with pytest.raises(UserError, match="nowhere: no evaluation to report"):
        eval_vqa.main(Config(report=True, run="nowhere"))
    with pytest.raises(UserError, match="out: no evaluation of mine to report"):
        eval_vqa.main(Config(report=True, data="mine"))


def test_seeds_are_compared_in_the_report_and_not_one_by_one():
    evaluate("out/x/seed_0", {1}), evaluate("out/y/seed_0", {1})
    Path("out/x/seed_0/step_000009").mkdir()
    with pytest.raises(UserError, match="out/x: runs of a seed each; name one, such as out/x/seed_0, or take all"):
        eval_vqa.main(Config(run="out/x", against="out/y"))


def test_the_evaluations_of_all_seeds_of_a_run_are_in_the_report(capsys, tmp_path):
    """From the models to the report: each seed of --run is evaluated, and all of them are reported."""
    write_questions(tmp_path / "shards", "learn", QUESTIONS)
    guard(tmp_path / "shards", "drop")
    for seed in range(2):
        make_run(tmp_path / f"out/x/seed_{seed}", tmp_path / "shards", seed=seed)
    (tmp_path / "out/x/seed_2").mkdir()  # begun, without a checkpoint
    eval_vqa.main(Config(run="out/x", max_new_tokens=3))
    assert [len(find_evaluations(f"out/x/seed_{seed}")) for seed in range(3)] == [1, 1, 0]
    eval_vqa.main(Config(run="out/x", max_new_tokens=3, out="else"))
    assert sorted(path.name for path in Path("else").iterdir()) == ["seed_0", "seed_1"]
    capsys.readouterr()
    ((row, *_), _, text) = report(capsys)
    assert row["dataset"] == "learn/test --max_new_tokens=3" and row["questions"] == "8"
