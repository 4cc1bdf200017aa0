"""The task of reports: what a text's score is made of, the constant report, the tables."""

import json
import random

import numpy as np
import pytest

from extras.look import blind_texts
from plumbing.flags import UserError
from tasks import reports
from tasks.findings import FINDINGS, compare
from tasks.ngrams import bleu, cider_d, count_matches, words_of
from tasks.reports import (CLINICAL, MAIN, SCALES, WORDS, blind_rows, compare_findings, cut_in_half, f1, medoid,
                           report, score, ways_of)
from test_box_data import real

ASK = "write the findings."
PIECES = ("The heart is normal.", "No pneumothorax.", "Small left pleural effusion.", "The lungs are clear.",
          "Stable cardiomegaly.", "No effusion.", "Mild pulmonary edema, increased.", "There is a right rib fracture.")


def draw_texts(count, seed=0):
    generator = random.Random(seed)
    return [" ".join(generator.sample(PIECES, generator.randint(2, 5))) for _ in range(count)]


def records_of(texts, kind="findings", ask=ASK, **more):
    return [{"id": f"study{number}", "question": ask, "answer": text, "type": kind, **more}
            for number, text in enumerate(texts)]


def scored_by(records, rows):
    return {row: [score(*pair) for pair in zip(records, texts, strict=True)] for row, texts in rows.items()}


def made(rows, texts, seen="not known here", capsys=None, units=None, **more):
    """The report's tables of {row: texts} to records of these texts, and what it printed."""
    records = records_of(texts, **more)
    tables = report("iu/test", scored_by(records, rows), len(records), records, seen,
                    np.arange(len(records)) if units is None else units)
    return tables, capsys.readouterr().out if capsys else ""


# ----------------------------------------------------------------------------- score

def test_a_perfect_text_has_all():
    one = score(records_of(PIECES[2:3])[0], "small left pleural effusion")
    assert one[MAIN] == one["ROUGE-L coco"] == 100 and one["ROUGE-L of sets"] == pytest.approx(100, abs=1e-5)
    assert one["METEOR"] == pytest.approx(100 * (1 - 0.5 / 4 ** 3)) and one["words"] == 4
    assert one["text"] == ["small", "left", "pleural", "effusion"] and bleu(one["counts"])[-1] == pytest.approx(1)
    assert one["findings"]["matched"] == one["findings"]["true"] > 0


@pytest.mark.parametrize("text", ["", " . ", "\n"])
def test_an_empty_text_has_nothing(text):
    one = score(records_of(PIECES[:1])[0], text)
    assert [one[name] for name in (MAIN, "METEOR", "ROUGE-L coco", "ROUGE-L of sets", "words")] == [0] * 5
    assert bleu(one["counts"]) == pytest.approx([0] * 4) and not one["findings"]["matched"]


def test_the_best_of_several_references_counts():
    record = {"answer": "a b c d", "references": ["a b c d", "w x y z", "w x y z v"]}
    one = score(record, "W x y z.")
    assert one[MAIN] == one["ROUGE-L coco"] == 100 and one["ROUGE-L of sets"] > 99.99 and one["METEOR"] > 99
    assert one["counts"] == [4, 3, 2, 1, 4, 3, 2, 1, 4]


def test_findings_are_those_of_the_nearest_reference():
    effusion, none = "Small left pleural effusion.", "No pneumothorax."
    assert compare_findings(effusion, [none, effusion]) == compare(effusion, effusion) != compare(effusion, none)
    assert compare_findings("", [none, "The dog."]) == compare("", "The dog.")  # where neither says anything: the best
    assert score({"answer": none, "references": [none, effusion]}, effusion)["findings"]["matched"]


def test_f1():
    assert f1(1, 1, 3) == 50 and np.isnan(f1(0, 0, 0)) and f1(0, 0, 2) == 0
    assert f1(*np.array([[1, 0], [1, 0], [1, 0]])) == pytest.approx([100, np.nan], nan_ok=True)


# ----------------------------------------------------------------------------- without an image

def test_the_medoid_is_most_like_the_others():
    texts = ["a b x", "a b c d", "c d y", "p q"]
    assert medoid(texts, random.Random(0)) == medoid(texts[::-1], random.Random(1)) == "a b c d"
    assert medoid(["p q", *texts, "p q", "p q"], random.Random(0)) == "p q"  # as often as it is there
    assert medoid([], random.Random(0)) == ""


def test_the_constant_report_is_of_training_and_of_its_question(capsys):
    train = [(ASK, "a b c"), ("Write  the FINDINGS.", "a b d"), (ASK, "a b c d"), *zip(["caption?"] * 2, ["p q", "p"])]
    records = records_of(["z"] * 2) + records_of(["z"], ask="Caption?") + records_of(["z"], ask="what else?")
    rows = blind_rows(train, records)
    assert list(rows) == ["constant report"] and "training answer" in capsys.readouterr().out
    first, second, third, other = rows["constant report"]
    assert first == second == "a b c d" and third in ("p q", "p") and other == "a b c d"
    assert blind_rows([], records) == {"constant report": [""] * 4}


def test_without_training_each_half_is_answered_by_the_other(capsys):
    texts = [f"a b c {number}" for number in range(40)]
    records = records_of(texts)
    halves, answers = cut_in_half(records, 0), blind_rows(None, records)["constant report"]
    assert "not known" in capsys.readouterr().out
    own = dict(zip(texts, halves))
    assert len(set(answers)) == 2 and sorted(np.bincount(halves)) == [20, 20]
    assert all(own[answer] == 1 - half for answer, half in zip(answers, halves))
    assert blind_rows(None, records) == {"constant report": answers}
    assert blind_rows(None, records, seed=1)["constant report"] != answers


@pytest.mark.parametrize("keys", [[{"group": f"p{number // 4}"} for number in range(80)],
                                  [{"id": f"study{number // 4}/view{number}"} for number in range(80)]])
def test_no_study_is_in_both_halves(keys):
    halves = cut_in_half([{"id": f"x{number}", **key} for number, key in enumerate(keys)], seed=0).reshape(20, 4)
    assert (halves == halves[:, :1]).all() and 0 < halves[:, 0].sum() < 20


# ----------------------------------------------------------------------------- tables

def test_the_table_has_the_scores_of_the_corpus():
    texts, given = draw_texts(30), draw_texts(30, seed=1)
    rows = made({"model": given}, texts)[0]["all"]["rows"]["model"]
    predicted, wanted = list(map(words_of, given)), [[words_of(text)] for text in texts]
    counts = np.array(list(map(count_matches, predicted, wanted)))
    found = list(map(compare, given, texts))

    def total(name):
        return sum(one[name] for one in found)

    assert [rows[f"BLEU-{number}"][0] for number in (1, 2, 3, 4)] == pytest.approx(100 * bleu(counts.sum(0)))
    assert rows["mean BLEU-4"][0] == pytest.approx(100 * bleu(counts)[:, 3].mean())
    assert rows["CIDEr-D"][0] == pytest.approx(100 * cider_d({"": predicted}, wanted)[""].mean())
    assert rows["findings F1"][0] == pytest.approx(200 * total("matched") / (total("predicted") + total("true")))
    assert rows["temporal F1"][0] == pytest.approx(
        200 * total("temporal matched") / (total("temporal predicted") + total("temporal true")))
    assert rows["words"][0] == np.mean(list(map(len, predicted)))
    each = []
    for finding in FINDINGS:
        pairs = [one["by finding"].get(finding, ("", "")) for one in found]
        said = [sum(pair[side] == "positive" for pair in pairs) for side in (0, 1)]
        if sum(said):
            each.append(200 * pairs.count(("positive", "positive")) / sum(said))
    assert rows["macro F1"][0] == pytest.approx(np.mean(each)) and 2 < len(each) < 14
    assert set(rows) == {*WORDS, *CLINICAL, *SCALES}
    assert all(low <= value <= high for value, low, high in rows.values() if value is not None)


def test_what_the_image_and_the_prior_add(capsys):
    texts, given = draw_texts(30), draw_texts(30, seed=1)
    rows = {"model": texts, "image shuffled": given, "prior left out": draw_texts(30, seed=2),
            "order swapped": given, "constant report": [texts[0]] * 30}
    tables, printed = made(rows, texts, capsys=capsys)
    table = tables["all"]["rows"]
    for added, row in (("the image adds", "image shuffled"), ("the prior adds", "prior left out")):
        for name in (MAIN, "BLEU-4", "CIDEr-D", "findings F1"):
            assert table[added][name][0] == pytest.approx(table["model"][name][0] - table[row][name][0])
        assert table[added][MAIN][1] > 0
    assert "order swapped: " in printed and "the prior adds" in printed
    without, printed = made({"model": texts}, texts, capsys=capsys)
    assert list(without["all"]["rows"]) == ["model"] and "order swapped" not in printed


def test_summary():
    texts = draw_texts(30)
    rows = {"model": texts, "image shuffled": draw_texts(30, 1), "constant report": [texts[0]] * 30}
    tables, _ = made(rows, texts, seen=["words"] * 4 + ["words and image", "image"] + [""] * 24)
    summary, table = tables["summary"], tables["all"]["rows"]
    assert [summary[name] for name in ("n", "unit", "leaks")] == [30, "images", 6]
    assert [line["metric"] for line in summary["lines"]] == [MAIN, "BLEU-4", "CIDEr-D", "findings F1", "macro F1"]
    for line in summary["lines"]:
        name = line["metric"]
        assert line["score"] == table["model"][name] and line["adds"] == table["the image adds"][name]
        assert line["blind"] == ["constant report", table["constant report"][name]] and line["unreadable"] is None
    assert tables["texts"]["word for word in training"] == 5 and tables["new"]["questions"] == 24
    assert json.loads(json.dumps(tables)) == tables
    priors, _ = made({"model": texts, "prior left out": rows["image shuffled"]}, texts)
    assert priors["summary"]["lines"][0]["adds"] == priors["all"]["rows"]["the prior adds"][MAIN]
    assert priors["summary"]["leaks"] is None and priors["summary"]["lines"][0]["blind"] is None
    assert made({"image shuffled": texts}, texts)[0]["summary"]["lines"][0]["score"] == [None] * 3


def test_what_is_new_keeps_the_weights_of_all(capsys):
    """CIDEr-D's weights are those of all references, in the table of what is new, too."""
    texts, given = draw_texts(30), draw_texts(30, seed=1)
    seen = ["words"] * 20 + [""] * 10
    tables, printed = made({"model": given}, texts, seen=seen, capsys=capsys)
    each = cider_d({"": list(map(words_of, given))}, [[words_of(text)] for text in texts])[""]
    assert tables["new"]["rows"]["model"]["CIDEr-D"][0] == pytest.approx(100 * each[20:].mean())
    assert "20 of the 30 references occur word for word in training" in printed and "10 of them new" in printed
    unknown, printed = made({"model": given}, texts, capsys=capsys)
    assert unknown["new"] == "not known here" and unknown["texts"]["word for word in training"] is None
    assert "word for word" not in printed


def test_empty_answers_are_counted(capsys):
    texts = draw_texts(10)
    tables, printed = made({"model": [""] * 5 + texts[5:], "image shuffled": [""] * 10}, texts, capsys=capsys)
    assert tables["texts"]["empty"] == {"model": 5, "image shuffled": 10}
    assert "empty: 5 of model, 10 of image shuffled" in printed
    only = tables["texts"]["CIDEr-D of answers that are not empty"]
    assert only["image shuffled"] is None
    assert only["model"] == pytest.approx(2 * tables["all"]["rows"]["model"]["CIDEr-D"][0])
    assert tables["all"]["rows"]["model"][MAIN][0] == 50
    assert "empty" not in made({"model": texts}, texts, capsys=capsys)[1]


def test_captions_have_no_findings(capsys):
    texts = [f"a slide of stained tissue {number % 3}" for number in range(10)]
    tables, printed = made({"model": texts}, texts, capsys=capsys)
    assert "findings" not in printed and "10 texts about" in printed
    assert [line["metric"] for line in tables["summary"]["lines"]] == [MAIN, "BLEU-4", "CIDEr-D"]
    assert tables["all"]["rows"]["model"]["findings F1"] == [None] * 3
    assert "findings F1" in made({"model": texts}, draw_texts(10), capsys=capsys)[1]


def test_types_and_wide_cells(capsys):
    texts = draw_texts(20)
    records = records_of(texts[:10]) + records_of(texts[10:], kind="impression")
    tables = report("x", scored_by(records, {"model": texts}), 20, records, "unknown", np.arange(20))
    assert {kind: table["questions"] for kind, table in tables["types"].items()} == {"findings": 10, "impression": 10}
    printed = capsys.readouterr().out
    assert "ROUGE-L by type" in printed
    line = next(line for line in printed.splitlines() if line.startswith("model"))
    assert len(line) == 16 + 5 * 17 and reports.fit([300.14, 200.14, 400.14]) == "300 [200 400]"


def test_units_are_drawn_together():
    """Of one unit alone there is no interval; of reports that come in equal pairs it is as wide as of half of them."""
    texts, given = draw_texts(20) * 2, draw_texts(20, seed=1) * 2
    alone, _ = made({"model": given}, texts, units=np.zeros(40, int))
    assert alone["all"]["rows"]["model"][MAIN][1:] == [None, None]
    pairs, _ = made({"model": given}, texts, units=np.tile(np.arange(20), 2))
    half, _ = made({"model": given[:20]}, texts[:20])
    assert pairs["all"]["rows"]["model"][MAIN] == pytest.approx(half["all"]["rows"]["model"][MAIN])
    assert pairs["all"]["rows"]["model"]["BLEU-4"] == pytest.approx(half["all"]["rows"]["model"]["BLEU-4"], rel=1e-6)


def test_a_constant_report_scores_high_on_real_reports(tmp_path):
    """What makes the blind row necessary: MedEvalKit's 296 studies, on the scales of published figures."""
    with pytest.raises(UserError, match="no list of studies; --raw_dir"):
        blind_texts.read_studies(tmp_path / "test.json")
    records = blind_texts.read_studies(real("iu_xray") / blind_texts.IU.removeprefix("iu_xray/"))
    sets, points = (blind_texts.score_reports(records, blind_texts.answer_halves(records, pick, seed=0))
                    for pick in ("sets", "points"))
    assert 43 < sets["ROUGE-L of sets"] < 47 and 39 < points["ROUGE-L ."] < 42 and 10 < points["BLEU-4 ."] < 15
    assert 32 < sets[MAIN] < points[MAIN] < 37 and 60 < sets["findings F1"] < 75 and sets["macro F1"] < 10
    answers = blind_rows(None, records)["constant report"]
    assert 33 < np.mean([score(*pair)[MAIN] for pair in zip(records, answers)]) < 38


# ----------------------------------------------------------------------------- other ways to ask

def a_study(*parts):
    return {"id": "1", "question": "write the findings of this study.", "answer": "no effusion.", "type": "findings",
            "parts": list(parts)}


def test_a_study_is_put_without_its_prior_and_with_films_exchanged():
    parts = ("Indication: cough", {"image": "a", "role": "prior frontal"}, "Prior report: an effusion.",
             {"image": "b", "role": "frontal"}, {"image": "c", "role": "lateral"})
    ways = ways_of(a_study(*parts))
    assert list(ways) == ["prior left out", "order swapped"]
    assert ways["prior left out"] == (a_study(parts[0], *parts[3:]), [1, 2])
    assert ways["order swapped"] == (a_study(*parts), [1, 0, 2])
    assert ways_of(a_study(parts[0], *parts[3:])) == ways_of({**a_study(), "parts": []}) == {}
    told, film = "Prior report: clear.", {"image": "a", "role": "frontal"}  # of a study without a frontal film
    (way, (line, order)), = ways_of(a_study(told, film)).items()
    assert (way, line["parts"], order) == ("prior left out", [film], [0])
    lateral = ways_of(a_study({"image": "a", "role": "prior frontal"}, {"image": "c", "role": "lateral"}))
    assert list(lateral) == ["prior left out"]  # nothing of the same view to exchange it with
