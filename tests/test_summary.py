"""tasks/summary.py, the one table of all evaluations, and the published scores that stand below it."""

import csv
import itertools
import re
from collections import defaultdict

import pytest

from tasks.published import FIGURES, Figure, describe, published_for
from tasks.summary import HEADS, escape, write_summary


def line(metric="BLEU-1", **changes):
    return {"metric": metric, "score": [48.94, 47.5, 50.06], "blind": ["question only", [49.26, 48.04, 50.6]],
            "adds": [2.06, 1.26, 2.76], "unreadable": None} | changes


def evaluation(name, *lines, n=1234, unit="images", leaks=None, folder="", faults=None, **changes):
    tables = {"summary": {"n": n, "unit": unit, "leaks": leaks, "lines": list(lines)}} if lines else {"all": {}}
    tables |= {"answers": {"model": faults, "question only": {"cut": 99}}} if faults else {}
    return folder or f"eval/step_000120_{name.replace('/', '_')}", {
        "checkpoint": "step_000120", "seconds": 77.77, "unusual_flags": {}, "results": {name: tables},
        "machine": {"commit": "0a1b2c3", "device": "cpu"},
        "stands_on": {"dtype": "float32", "flags": {"limit": 0, "seed": 0, "max_new_tokens": len(name)}}} | changes


EVALUATIONS = [
    evaluation("slake/test", line(), line("exact match", blind=None, adds=None), leaks=0),
    evaluation("bccd/test", line("F-IoU", score=[None] * 3, unreadable=12.34), n=36),
    evaluation("path_vqa/test", line(), leaks=1040, faults={"cut": 7, "empty": 0, "repeating": 1100}),
    evaluation("med_qa/test", line("accuracy", adds=None, unreadable=0.0), unit="questions",
               faults={"cut": None, "empty": 0, "repeating": 2}),
    evaluation("own_data/test", line("accuracy", score=[41.5, None, None], blind=["commonest option", [None] * 3]))]
ORDER = ["path_vqa/test", "slake/test", "", "bccd/test", "med_qa/test", "own_data/test"]  # by metric, then by name


@pytest.fixture
def written(tmp_path, capsys):
    """written(evaluations) -> {file's name: text}, and under "" what was printed."""
    def write(evaluations):
        write_summary(tmp_path / "run/eval", evaluations)
        return {path.name: path.read_bytes().decode() for path in (tmp_path / "run/eval").iterdir()} | {
            "": capsys.readouterr().out}

    return write


def cells(row):
    return re.split(r" {2,}", row.strip())


# ----------------------------------------------------------------------------- the table

def test_the_table_has_each_score_once_and_a_dash_where_there_is_none(written):
    head, *rows = written(EVALUATIONS)["table.txt"].splitlines()
    assert cells(head) == [*HEADS, "published"]
    score, blind, adds = "48.9 [47.5 50.1]", "question only 49.3 [48.0 50.6]", "2.1 [1.3 2.8]"
    assert [cells(row) for row in rows[:6]] == [
        ["path_vqa/test", "1,234", "BLEU-1", score, blind, adds, "-", "7", "0", "1,100", "1,040", "below"],
        ["slake/test", "1,234", "BLEU-1", score, blind, adds, "-", "-", "-", "-", "0", "below"],
        ["exact match", score, "-", "-", "-"],
        ["bccd/test", "36", "F-IoU", "-", blind, adds, "12.3%", "-", "-", "-", "?", "-"],
        ["med_qa/test", "1,234", "accuracy", score, blind, "-", "0.0%", "-", "0", "2", "?", "below"],
        ["own_data/test", "1,234", "accuracy", "41.5 [- -]", "commonest option -", adds, "-", "-", "-", "-", "?", "-"]]
    for name in ("questions", "score", "image adds", "leaks"):  # to the right
        end = head.index(name) + len(name)
        assert all(row[end - 1] != " " and row[end:end + 1] in (" ", "") for row in rows[:2]), name
    assert rows[2].index("exact match") == head.index("metric")


def test_seconds_are_printed_and_are_in_a_file_of_their_own(written):
    files = written(EVALUATIONS)
    printed, table = files.pop(""), files["table.txt"].splitlines()
    head, first = printed.splitlines()[1:3]
    assert cells(head)[-1] == "seconds" and cells(first)[-1] == "77.8"
    assert printed.splitlines()[8:-1] == table[7:] and "run/eval/table.txt" in printed.splitlines()[-1]
    assert list(csv.reader(files["seconds.csv"].splitlines())) == [
        ["dataset", "seconds"], *([name, "77.8"] for name in ORDER if name)]
    assert [name for name, text in files.items() if "77." in text] == ["seconds.csv"]
    assert not [name for name in files if name.startswith(".")]


def test_no_two_evaluations_write_the_table_at_once(written, monkeypatch):
    held = []
    monkeypatch.setattr("tasks.summary.write_whole", lambda path, _: held.append((path.parent / ".lock").exists()))
    written([evaluation("slake/test", line())])
    assert held == [True] * 5


def test_answers_that_were_given_elsewhere_took_no_known_time(written):
    files = written([evaluation("slake/test", line(), seconds=None)])
    assert cells(files[""].splitlines()[2])[-1] == "-" and files["seconds.csv"] == "dataset,seconds\nslake/test,-\n"


def test_the_same_answers_give_the_same_bytes_in_whatever_order_and_time(written):
    files = written(EVALUATIONS)
    again = written([(folder, results | {"seconds": 99.9}) for folder, results in EVALUATIONS[::-1]])
    assert files.keys() == again.keys()
    assert {name for name in files if files[name] != again[name]} == {"", "seconds.csv"}
    assert {"table.txt", "table.csv", "table.tex", "seconds.csv", "published.csv"} == files.keys() - {""}


def test_every_number_of_the_csv_is_in_a_column_of_its_own(written):
    rows = list(csv.DictReader(written(EVALUATIONS)["table.csv"].splitlines()))
    assert [row["dataset"] for row in rows] == [name or "slake/test" for name in ORDER]  # on every row
    assert list(rows[0].items())[1:] == [
        ("questions", "1234"), ("metric", "BLEU-1"), ("score", "48.94"), ("score low", "47.5"),
        ("score high", "50.06"), ("blind row", "question only"), ("blind", "49.26"), ("blind low", "48.04"),
        ("blind high", "50.6"), ("adds", "2.06"), ("adds low", "1.26"), ("adds high", "2.76"),
        ("unreadable percent", ""), ("cut", "7"), ("empty", "0"), ("repeating", "1100"), ("leaks", "1040")]
    assert [row["cut"] for row in rows] == ["7", "", "", "", "", ""]  # not known of answers from elsewhere
    assert [row["leaks"] for row in rows] == ["1040", "0", "0", "", "", ""]
    assert [row["score"] for row in rows][3:] == ["", "48.94", "41.5"] and rows[3]["unreadable percent"] == "12.34"
    assert rows[2]["blind row"] == rows[2]["blind"] == rows[2]["adds high"] == ""


def test_the_tabular_is_latex(written):
    odd = r"a_b/50%&#{}$\~^<>"
    tex = written([*EVALUATIONS, evaluation(odd, line("accuracy"))])["table.tex"]
    body = [row for row in tex.splitlines() if not row.startswith("%")]
    assert body[0] == r"\begin{tabular}{lrlrlrrrrrr}" and body[-1] == r"\end{tabular}"
    assert [row for row in body if "rule" in row] == [r"\toprule", r"\midrule", r"\bottomrule"]
    rows = [row for row in body if row.endswith(r" \\")]
    assert len(rows) == 8 and {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {10}
    assert rows[1].startswith(r"path\_vqa/test & 1,234 & BLEU-1 & 48.9 [47.5 50.1] & ")
    assert r"12.3\% & - & - & - & ? \\" in tex
    assert escape(odd) in "".join(rows) and "12.3 " not in tex
    assert escape(odd) == (r"a\_b/50\%\&\#\{\}\$\textbackslash{}\textasciitilde{}\textasciicircum{}"
                           r"\textless{}\textgreater{}")


# ----------------------------------------------------------------------------- notes

def test_notes_say_what_intervals_are_over_and_what_leaks_are(written):
    table = written(EVALUATIONS)["table.txt"]
    assert ("intervals by resampling images (path_vqa/test, slake/test, bccd/test, own_data/test); "
            "questions (med_qa/test)\n") in table
    assert "by resampling images\n" in written(EVALUATIONS[:1])["table.txt"]
    assert "leaks: questions that are not new to the run" in table and "not of one" not in table
    assert "evaluate again" not in table


@pytest.mark.parametrize("changes, said", [
    ({"machine": {"commit": "f00", "device": "cpu"}}, "commit: 0a1b2c3 (path_vqa/test); f00 (slake/test)"),
    ({"machine": {"commit": "", "device": "cpu"}}, "commit: 0a1b2c3 (path_vqa/test); unknown (slake/test)"),
    ({"machine": {"commit": "0a1b2c3", "device": "H200"}}, "device: cpu (path_vqa/test); H200 (slake/test)"),
    ({"checkpoint": "step_9"}, "checkpoint: step_000120 (path_vqa/test); step_9 (slake/test)"),
    ({"stands_on": {"dtype": "float32", "flags": {"limit": 50, "seed": 0}}},
     "limit: 0 (path_vqa/test); 50 (slake/test)"),
    ({"stands_on": {"dtype": "float32", "flags": {"limit": 0, "seed": 0, "top_k": 5}}},
     "top_k: not there (path_vqa/test); 5 (slake/test)"),
    ({"stands_on": {"dtype": "bfloat16", "flags": {"limit": 0, "seed": 0}}},
     "dtype: float32 (path_vqa/test); bfloat16 (slake/test)")])
def test_evaluations_of_another_make_are_told_apart(written, changes, said):
    files = written([EVALUATIONS[2], evaluation("slake/test", line(), **changes)])
    assert [row for row in files["table.txt"].splitlines() if "not of one" in row] == [f"not of one {said}"]
    assert f"% not of one {said}\n" in files["table.tex"]


def test_one_dataset_evaluated_twice_has_its_flags_beside_its_name(written):
    both = [evaluation("slake/test", line(), unusual_flags={"limit": 50}, n=50), EVALUATIONS[0]]
    files = written(both)
    assert [cells(row)[:2] for row in files["table.txt"].splitlines()[1:4:1]] == [
        ["slake/test", "1,234"], ["exact match", "48.9 [47.5 50.1]"], ["slake/test --limit=50", "50"]]
    assert files["table.txt"].count("\nslake\n") == 1  # its published scores stand once


def test_evaluations_without_a_summary_are_named_and_no_row(written):
    files = written([evaluation("vqa_rad/test"), EVALUATIONS[0], evaluation("old/test")])
    assert "so evaluate again: vqa_rad/test, old/test\n" in files["table.txt"] and "vqa_rad" not in files["table.csv"]
    assert "\nvqa_rad\n" not in files["table.txt"] and "again: vqa_rad/test" in files[""]
    alone = written([evaluation("vqa_rad/test")])
    assert alone["table.txt"].endswith("evaluate again: vqa_rad/test\n") and alone["table.txt"].count("\n") == 1


def test_a_failed_write_leaves_the_former_file(written, tmp_path, monkeypatch):
    before = written(EVALUATIONS)
    monkeypatch.setattr("plumbing.files.sync", lambda path: (_ for _ in ()).throw(OSError(28, "no space", str(path))))
    with pytest.raises(OSError, match="no space"):
        write_summary(tmp_path / "run/eval", EVALUATIONS[:1])
    assert {name: (tmp_path / "run/eval" / name).read_text() for name in before if name} == {
        name: text for name, text in before.items() if name}


# ----------------------------------------------------------------------------- published scores

def test_published_scores_stand_apart_and_in_no_row(written):
    files = written(EVALUATIONS)
    table, _, block = files["table.txt"].partition("\npublished, by their authors, on other scales")
    values = {one.value for name in ("path_vqa", "slake", "med_qa") for one in published_for(name)}
    assert not values & set(re.split(r"[ \n\[\]]+", table)) and not any(value in files["table.csv"] for value in values)
    rows = block.splitlines()
    assert [row for row in rows if re.fullmatch(r"\w+", row)] == ["path_vqa", "slake", "med_qa"]
    place, slake = rows.index("slake"), published_for("slake")
    for row, one in zip(rows[place + 1:], slake):
        number = re.search(rf"^    {one.value}\*? {one.metric}: {re.escape(one.system)} \[(\d+)\]", row)[1]
        assert f"[{number}] {one.source}; {one.protocol}" in rows
    assert not rows[place + 1 + len(slake)].startswith("    ")
    found = list(csv.reader(files["published.csv"].splitlines()))
    assert found[0] == list(Figure._fields) and len(found) == 1 + sum(
        len(published_for(name)) for name in ("path_vqa", "slake", "med_qa"))
    bare = written([EVALUATIONS[1]])
    assert "published, by" not in bare["table.txt"] and bare["published.csv"].count("\n") == 1


def test_published_scores_are_of_a_dataset_and_not_of_its_training():
    assert published_for("med_qa/test") == published_for("med_qa") != []
    assert published_for("med_mcqa/validation")  # where its answers are public
    assert not published_for("med_mcqa/train") and not published_for("med/test")


def test_published_scores_are_numbers_with_a_source_and_stand_once():
    keys = [(one.dataset, one.metric, one.system, one.source) for one in FIGURES]
    assert len(set(keys)) == len(keys) == len(FIGURES)
    assert all(0 <= float(one.value) <= 200 and one.source and one.protocol and one.system for one in FIGURES)
    assert {one.dataset for one in FIGURES} == {
        "path_vqa", "slake", "vqa_rad", "vqa_med_2019", "pmc_vqa", "omni_med_vqa", "med_qa", "med_mcqa", "mmlu_med",
        "pubmed_qa", "medbullets_4", "medbullets_5", "med_xpert_qa_text", "med_xpert_qa_mm", "med_frame_qa",
        "iu_medevalkit", "mimic_studies", "chexpert_plus", "nih_boxes", "deeplesion"}


def test_sources_that_do_not_agree_are_in_doubt():
    same = defaultdict(list)
    for one in FIGURES:
        same[one.dataset, one.metric, one.system].append(one)
    differ = [some for some in same.values() if len({one.value for one in some}) > 1]
    assert len(differ) == 7 and all(one.doubt for one in itertools.chain(*differ))
    assert "; in doubt: " in describe(differ[0])[1]
    [quoted] = [one for one in FIGURES if one.value == "52.2"]
    dataset, line, source, note = describe([quoted])
    assert line.startswith("    52.2* RaTEScore: MedGPT-oss 20B [1]") and source.startswith(f"[1] {quoted.source}; ")
    assert note == "* second-hand: not read in its source itself"
