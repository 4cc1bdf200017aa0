"""Two sets of answers compared in pairs (tasks/compare.py), and answers from anybody's file (tasks/foreign.py)."""

import itertools
import json
import math
import re

import numpy as np
import pytest
from scipy import stats

from plumbing.flags import UserError
from tasks import choices
from tasks.compare import (EXACT, compare, flip_signs, holm, match_lines, mcnemar, p_text, print_comparison,
                           read_answers)
from tasks.evaluations import write_evaluation
from tasks.foreign import read_foreign
from tasks.labels import sign_flip

# ----------------------------------------------------------------------------- p


def test_flipped_signs_are_scipys_permutations():
    def wanted_of(values, resamples=np.inf):
        return stats.permutation_test(
            (values, np.zeros(len(values))), lambda a, b, axis: np.sum(a - b, axis=axis), n_resamples=resamples,
            vectorized=True, permutation_type="samples", rng=1).pvalue

    generator = np.random.default_rng(0)
    for count in (2, 3, 7, 12):
        values = generator.normal(0.4, 1, count)
        wanted = wanted_of(values)
        assert flip_signs(values) == pytest.approx(wanted, abs=1e-12)
    many = generator.normal(0.1, 1, 60)
    wanted = wanted_of(many, 50_000)
    assert 0.005 < wanted < 0.3 and flip_signs(many) == pytest.approx(wanted, abs=4 * math.sqrt(wanted / 10_000))


def test_flipped_signs_of_equal_sizes_are_the_binomial_test():
    """All of one size: the number of positive ones is binomial, and ties count as far."""
    for positive, negative in ((30, 12), (25, 24), (300, 240), (40, 0), (9, 3)):
        wanted = stats.binomtest(positive, positive + negative).pvalue
        found = flip_signs([100 / 3] * positive + [-100 / 3] * negative + [0.0] * 50)
        assert found == pytest.approx(wanted, abs=4 * math.sqrt(wanted / 10_000) + 2e-4), (positive, negative)
    assert flip_signs([0.1] * 3 + [-0.1] * 3 + [0.7, -0.7] * 10) == 1  # a sum of 0, but for rounding
    assert flip_signs([0.1, 0.2, -0.3] * 9) == 1 and flip_signs([0.0] * 40) == flip_signs([]) == 1
    assert flip_signs([1.0] * 400) == 1 / 10_001  # never 0
    large = [1e9 / 3] * 9 + [-1e9 / 3] * 3  # rounded by more than small ones
    assert flip_signs(large) == pytest.approx(stats.binomtest(9, 12).pvalue, abs=1e-12)


def test_exact_and_drawn_signs_agree_where_they_meet():
    values = np.random.default_rng(3).normal(0.5, 1, EXACT)
    drawn = flip_signs(np.append(values, 1e-9))  # one more, that hardly matters
    exact = flip_signs(np.append(values, [0, 0]))
    assert exact == sign_flip(values) and drawn == pytest.approx(exact, abs=4 * math.sqrt(exact / 10_000))
    assert flip_signs(values * 1e6) == exact == flip_signs(-values)


def test_mcnemar_is_scipys_binomial_test():
    for one, other in [*itertools.product(range(6), repeat=2), (40, 61), (700, 620), (12_000, 11_500)]:
        wanted = stats.binomtest(one, one + other).pvalue if one + other else 1.0
        assert mcnemar(one, other) == mcnemar(other, one) == pytest.approx(wanted, rel=1e-9), (one, other)


def test_holm_is_scipys_order_of_bonferroni():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1, 1] and holm([0.2]) == [0.2] and holm([]) == []
    values = np.random.default_rng(1).random(9) ** 3
    order = np.argsort(values)
    wanted = [min(1, max(values[order[k]] * (9 - k) for k in range(place + 1))) for place in range(9)]
    assert [holm(values)[place] for place in order] == pytest.approx(wanted)


# ----------------------------------------------------------------------------- two runs

def test_a_run_and_itself_do_not_differ():
    scores = np.random.default_rng(0).random(200) * 100
    same = compare(scores, scores, np.arange(200) // 2)
    assert same["difference"] == [0, 0, 0] and same["p"] == 1 and same["alone"] is same["mcnemar"] is None
    right = compare(100 * (scores > 50), 100 * (scores > 50), np.arange(200))
    assert right["alone"] == [0, 0] and right["mcnemar"] == right["p"] == 1


def test_the_difference_is_the_firsts_above_the_seconds():
    first, second = np.array([100, 100, 100, 0, 100]), np.array([0, 100, 0, 0, 0])
    found = compare(first, second, [5, 5, 9, 9, 2], "patients")
    assert (found["first"], found["second"], found["difference"][0]) == (80, 20, 60)
    assert found["alone"] == [3, 0] and found["mcnemar"] == 0.25 and found["p"] == 0.25  # three patients, all up
    assert found["questions"] == 5 and found["unit"] == "patients"
    back = compare(second, first, [5, 5, 9, 9, 2])
    assert back["difference"][0] == -60 and back["alone"] == [0, 3]
    assert compare(first / 100, second / 100, range(5))["alone"] == [3, 0]
    assert compare([50.0, 100], [0, 100], [0, 1])["alone"] is None  # neither right nor wrong


def test_questions_about_one_image_count_once():
    """Ten copies of each question say no more than one, though McNemar's test takes them for ten."""
    generator = np.random.default_rng(2)
    first, second = 100.0 * (generator.random((2, 40)) < [[0.7], [0.5]])
    once = compare(first, second, np.arange(40))
    ten = compare(np.repeat(first, 10), np.repeat(second, 10), np.repeat(np.arange(40), 10))
    assert ten["p"] == once["p"] and ten["difference"] == pytest.approx(once["difference"])
    assert ten["mcnemar"] < once["mcnemar"] / 10
    alone = compare(first, second, np.zeros(40))
    assert alone["p"] is None and alone["difference"][1:] == [None, None]


def test_the_interval_holds_the_truth_as_often_as_it_says(monkeypatch):
    """200 tables of 80 units of 1 to 4 questions; scores of one unit go together, and so do both runs'."""
    monkeypatch.setattr("tasks.compare.DRAWS", 400)
    generator, held, small, trials = np.random.default_rng(5), 0, 0, 200
    for _ in range(trials):
        units = np.repeat(np.arange(80), generator.integers(1, 5, 80))
        hard, gain = generator.normal(0, 20, 80), generator.normal(4, 10, 80)
        second = hard[units] + generator.normal(0, 5, len(units))
        first = hard[units] + gain[units] + generator.normal(0, 5, len(units))
        found = compare(first, second, units)
        held += found["difference"][1] <= 4 <= found["difference"][2]
        small += flip_signs(np.bincount(units, (first - second - 4))) < 0.05
    assert 0.91 < held / trials < 0.985
    assert 0.02 < small / trials < 0.09  # where there is no difference, p is below 0.05 so often


def test_pairing_narrows_the_interval():
    generator = np.random.default_rng(7)
    hard = generator.random(300) * 100
    low, high = compare(hard + generator.normal(3, 5, 300), hard, np.arange(300))["difference"][1:]
    assert high - low < 2 and low > 0


def test_the_table_says_how_two_runs_differ(capsys):
    generator = np.random.default_rng(0)
    first, second = 100.0 * (generator.random((2, 90)) < [[0.8], [0.5]])
    found = {"a/test": compare(first, second, np.arange(90)),
             "b/test": compare(generator.random(30), generator.random(30), np.zeros(30), "patients"),
             "c/test": compare(second, second, np.arange(90))}
    print_comparison(("out/x", "answers.jsonl"), found, {"a/test": "accuracy", "b/test": "F-IoU", "c/test": "accuracy"})
    rows = [re.split(r" {2,}", row.strip()) for row in capsys.readouterr().out.splitlines()]
    assert ["A: out/x"] in rows and ["B: answers.jsonl"] in rows
    one = found["a/test"]
    [a], [b], [c] = ([row for row in rows if row[0] == name] for name in found)
    assert a[:6] == ["a/test", "accuracy", "90", "images", f"{one['first']:.1f}", f"{one['second']:.1f}"]
    assert a[6] == "{:.1f} [{:.1f} {:.1f}]".format(*one["difference"])
    assert a[7:] == [p_text(one["p"]), p_text(2 * one["p"]), *map(str, one["alone"]), p_text(one["mcnemar"])]
    assert b[3] == "patients" and b[6].endswith("[- -]") and b[7:] == ["-"] * 5
    assert c[6:] == ["0.0 [0.0 0.0]", "1.000", "1.000", "0", "0", "1.000"]
    assert p_text(0.00099) == "<0.001" and p_text(0.0011) == "0.001" and p_text(None) == "-"


# ----------------------------------------------------------------------------- the same questions

def asked(*names, question="what is it?", dataset="scans/test"):
    return [{"dataset": dataset, "id": name, "question": question, "prediction": f"{name}!"} for name in names]


def test_answers_are_matched_by_dataset_id_and_question():
    first, second = asked("1", "2", "3"), asked("3", "1", "2")
    assert [line["id"] for line in match_lines(first, second, "x")] == ["1", "2", "3"]
    for other, said in ((asked("1", "2"), "1 are not in it (id '3')"),
                        (asked("1", "2", "3", "4"), "1 are in it alone (id '4')"),
                        (asked("1", "2", "3", question="what was it?"), "3 are not in it (id '1', '2', '3')"),
                        (asked("1", "2", "3", dataset="scans/train"), "3 are not in it"),
                        (asked("1", "2", "3", "3"), "1 questions are answered twice")):
        with pytest.raises(UserError, match=re.escape(said)) as caught:
            match_lines(first, other, "out/y")
        assert str(caught.value).startswith("out/y: ") and "\n" not in str(caught.value)


def test_a_runs_answers_are_read_whole_and_of_the_newest(tmp_path):
    for name in ("scans", "slides"):
        write_evaluation(tmp_path / "eval" / name, {"stands_on": {"checkpoint": "0"}, "results": {f"{name}/test": {}}},
                         {"model": asked("1", "2", dataset=f"{name}/test"), "image shuffled": asked("9")})
    found = read_answers(tmp_path)
    assert found == {f"{name}/test": asked("1", "2", dataset=f"{name}/test") for name in ("scans", "slides")}
    assert read_answers(tmp_path / "eval/scans").keys() == {"scans/test"}
    with open(tmp_path / "eval/scans/predictions.jsonl", "a") as file:
        file.write("{}\n")
    with pytest.raises(UserError, match="damaged"):
        read_answers(tmp_path)


# ----------------------------------------------------------------------------- anybody's answers

RECORDS = [{"id": f"q_{n}", "question": f"which? A. x{n} B. y", "answer": "B. y", "choices": [f"x{n}", "y"]}
           for n in range(5)]
LINES = [{"id": record["id"], "prediction": f"answer {record['id']}"} for record in RECORDS]
LIKELY = {"letter": [-1.5, -0.25], "whole": [-3, -1.0], "tokens": [2, 4]}


def read(path, lines, records=None):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return read_foreign(path, records or {"scans/test": RECORDS})


def test_answers_come_in_the_order_of_the_records(tmp_path, capsys):
    texts, notes = read(tmp_path / "a.jsonl", [*LINES[::-1], ""])["scans/test"]
    assert texts == [line["prediction"] for line in LINES] and notes == [{}] * 5
    assert "a.jsonl: 5 answers, from 'prediction' of each line\n" in capsys.readouterr().out
    assert read(tmp_path / "a.jsonl", [line | {"prediction": ""} for line in LINES])["scans/test"][0] == [""] * 5
    numbers = [{**record, "id": str(n)} for n, record in enumerate(RECORDS)]
    lines = [{"id": n, "prediction": f"{n}"} for n in range(5)]
    assert read(tmp_path / "a.jsonl", lines, {"x/test": numbers})["x/test"][0] == list("01234")


@pytest.mark.parametrize("keys, taken", [
    (("text", "output", "response", "prediction"), "prediction"), (("text", "output", "response"), "response"),
    (("text", "output"), "output"), (("answer", "text"), "text")])
def test_the_answer_is_under_the_first_key_that_all_lines_have(tmp_path, capsys, keys, taken):
    lines = [{"id": line["id"], **{key: f"{key} {line['id']}" for key in keys}} for line in LINES]
    if taken != "prediction":
        lines[2]["prediction"] = "of one line alone"
    texts, _ = read(tmp_path / "a.jsonl", lines)["scans/test"]
    assert texts == [f"{taken} {line['id']}" for line in LINES] and repr(taken) in capsys.readouterr().out


def test_a_file_may_answer_several_datasets(tmp_path):
    records = {"scans/test": RECORDS, "slides/test": RECORDS[:2]}
    named = [{**line, "dataset": "scans/test"} for line in LINES] + [
        {**line, "dataset": "slides", "prediction": "slide"} for line in LINES[:2]]
    found = read(tmp_path / "a.jsonl", named[::-1], records)
    assert found["scans/test"][0] == [line["prediction"] for line in LINES] and found["slides/test"][0] == ["slide"] * 2
    for lines, said in ((LINES, "5 lines are of no dataset that is asked for (scans/test, slides/test): line 1: ''"),
                        ([{**line, "dataset": "scan/test"} for line in LINES], "line 1: 'scan/test'"),
                        ([{**line, "dataset": ["scans"]} for line in LINES], r"line 1: ['scans']")):
        with pytest.raises(UserError, match=re.escape(said)):
            read(tmp_path / "a.jsonl", lines, records)


def test_what_eval_vqa_wrote_is_such_a_file(tmp_path):
    likely = {"as asked": LIKELY, "turned 1": LIKELY | {"order": [1, 0]}}
    lines = [{"dataset": "scans/test", **record, "seen": "", "prediction": "B", "likelihoods": likely}
             for record in RECORDS]
    write_evaluation(tmp_path / "eval/scans", {"stands_on": {}, "results": {"scans/test": {}}}, {"model": lines})
    texts, notes = read_foreign(tmp_path / "eval/scans/predictions.jsonl", {"scans/test": RECORDS})["scans/test"]
    assert texts == ["B"] * 5 and notes == [{"likelihoods": likely}] * 5
    scored = choices.score(RECORDS[0] | notes[0], texts[0])
    assert scored[choices.MAIN] == scored["letter"] == 100


def test_likelihoods_of_the_options_alone_are_those_as_asked(tmp_path):
    lines = [line | {"likelihoods": LIKELY} for line in LINES]
    _, notes = read(tmp_path / "a.jsonl", lines)["scans/test"]
    assert notes == [{"likelihoods": {"as asked": LIKELY}}] * 5
    with pytest.raises(UserError, match="2 answers to scans/test are without likelihoods, .* of the line: 4, 5"):
        read(tmp_path / "a.jsonl", lines[:3] + LINES[3:])


BAD_LIKELIHOODS = [
    [1, 2], {}, "x", {"letter": [1, 2]}, LIKELY | {"more": [1, 2]}, LIKELY | {"letter": [-1]},
    LIKELY | {"whole": [-1, -2, -3]}, LIKELY | {"whole": [-1, math.nan]}, LIKELY | {"letter": [-math.inf, -1]},
    LIKELY | {"letter": [-1, "-2"]}, LIKELY | {"letter": [-1, True]}, LIKELY | {"letter": [-1, None]},
    LIKELY | {"letter": -1}, LIKELY | {"tokens": [0, 1]}, LIKELY | {"whole": [-1, 10 ** 400]},
    {"as asked": LIKELY, "turned 1": LIKELY | {"order": [0, 0]}}, {"turned 1": LIKELY}, {"as asked": None}]


@pytest.mark.parametrize("likelihoods", BAD_LIKELIHOODS, ids=range(len(BAD_LIKELIHOODS)))
def test_likelihoods_that_do_not_fit_the_options_are_refused(tmp_path, likelihoods):
    lines = [*LINES[:2], LINES[2] | {"likelihoods": likelihoods}, *LINES[3:]]
    with pytest.raises(UserError, match="a.jsonl: line 3: the likelihoods ") as caught:
        read(tmp_path / "a.jsonl", lines)
    assert "\n" not in str(caught.value)


def test_likelihoods_of_no_choice_are_refused(tmp_path):
    records = [{name: value for name, value in record.items() if name != "choices"} for record in RECORDS]
    with pytest.raises(UserError, match="line 1: the likelihoods belong to no multiple choice"):
        read(tmp_path / "a.jsonl", [LINES[0] | {"likelihoods": LIKELY}, *LINES[1:]], {"scans/test": records})


def changed(number, **changes):
    return [*LINES[:number], LINES[number] | changes, *LINES[number + 1:]]


BAD = [  # the lines of a file, what is said of them
    ([], "no answers in it"), (["", " "], "no answers in it"), ([*LINES[:3], "{", *LINES[3:]], "line 4 is no JSON"),
    ([LINES[0], "[1]"], "line 2 is no JSON object"), (["[" * 100_000], "line 1 is no JSON object"),
    (changed(1, id="q_11"), "1 ids are of no question: 'q_11' (nearest: 'q_1'); take them"),
    ([*LINES, {"id": "q_5", "prediction": ""}], "1 ids are of no question: 'q_5'"),
    (LINES[1:4], "2 of 5 questions have no answer: 'q_0', 'q_4'; answer each"),
    ([*LINES, LINES[2]], "1 lines repeat an id: 'q_2' in line 6; keep one"),
    (changed(3, id=None), "1 lines without an id, by number: 4;"), (changed(3, id=1.5), "by number: 4;"),
    (changed(3, prediction=None), "1 lines whose prediction is no text, by number: 4"),
    (changed(3, prediction=["B"]), "by number: 4"),
    (changed(3, question="what?"), "1 questions are worded otherwise than in the prepared data: 'q_3' in line 4"),
    ([{"id": line["id"], "answer": "x"} for line in LINES], "no key for the answer that all 5 lines have (prediction"),
    ([{"id": LINES[0]["id"], "text": "x"}, *LINES[1:]], "(prediction in 4, response in 0, output in 0, text in 1)")]


@pytest.mark.parametrize("lines, said", BAD, ids=range(len(BAD)))
def test_files_that_do_not_answer_the_questions_are_refused_in_a_line(tmp_path, lines, said):
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        read(tmp_path / "a.jsonl", lines)
    assert str(caught.value).startswith(f"{tmp_path}/a.jsonl: ") and "\n" not in str(caught.value)


def test_what_cannot_be_told_apart_or_read_is_refused(tmp_path):
    with pytest.raises(UserError, match="scans/test: 1 questions have another's id"):
        read(tmp_path / "a.jsonl", LINES, {"scans/test": [*RECORDS, RECORDS[0]]})
    with pytest.raises(UserError, match="none.jsonl: No such file"):
        read_foreign(tmp_path / "none.jsonl", {"scans/test": RECORDS})
    (tmp_path / "a.jsonl").write_bytes(b'{"id": "q_0", "prediction": "\xff"}\n')
    with pytest.raises(UserError, match="line 1 is no JSON"):
        read_foreign(tmp_path / "a.jsonl", {"scans/test": RECORDS})
