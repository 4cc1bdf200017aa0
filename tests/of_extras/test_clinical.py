"""extras/look/clinical.py: the findings of a reports evaluation by rules, by packages, and against MeSH terms."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support

from extras.look import clinical
from plumbing.flags import UserError
from tasks.evaluations import write_evaluation
from tasks.findings import FINDINGS, FIVE, compare, f1, read

RAW = Path(os.environ.get("NANOMEDQ_RAW", "raw"))
PAIRS = [("Cardiomegaly. No effusion.", "Enlarged heart. Left pleural effusion. No pneumothorax is seen."),
         ("Normal chest. Unchanged.", "The heart is normal and unchanged. No acute cardiopulmonary abnormality."),
         ("Possible pneumonia. Edema.", "There may be a pneumonia. No edema or effusion is seen."),
         ("", "Stable right pneumothorax and a fracture. The heart size is normal.")]


def write_answers(path, pairs=PAIRS, **more):
    path.write_text("".join(json.dumps({"prediction": prediction, "answer": answer, **more}) + "\n"
                            for prediction, answer in pairs))
    return str(path)


def test_means_are_those_of_sklearn():
    generator = np.random.default_rng(0)
    statuses = ("positive", "negative", "uncertain", "")
    labels = [tuple({finding: statuses[generator.integers(4)] for finding in FINDINGS[1:]} for _ in range(2))
              for _ in range(50)]
    table = clinical.tabulate(labels)
    for name, some in (("14", FINDINGS), ("5", FIVE)):
        predicted, true = (np.array([[pair[side].get(finding) in ("positive", "uncertain") for finding in some]
                                     for pair in labels]) for side in (0, 1))
        for mean in ("micro", "macro"):
            expected = precision_recall_fscore_support(true, predicted, average=mean, zero_division=0)[:3]
            assert table[f"{mean} {name}"] == (*map(pytest.approx, expected), true.sum())
    assert table[FINDINGS[0]] == (0, 0, 0, 0)


def test_a_file_of_answers_is_scored(tmp_path, capsys):
    path = write_answers(tmp_path / "answers.jsonl", [*PAIRS, ("short", "an effusion"), ("a", "the cat sat " * 5)])
    clinical.main(clinical.Config(run=path))
    printed = capsys.readouterr().out
    lines = {line[:28].strip(): line[28:].split() for line in printed.splitlines()}
    assert f"{path}: 4 reports, rules" in printed and "are a radiologist" in printed
    assert lines["Cardiomegaly"] == ["100.0", "100.0", "100.0", "1"]
    assert lines["Edema"] == ["0.0", "0.0", "0.0", "0"] and lines["Pleural Effusion"] == ["0.0", "0.0", "0.0", "1"]
    assert lines["macro 5"][2] == "20.0" and lines["micro 5"] == ["50.0", "50.0", "50.0", "2"]
    sums = [sum(compare(*pair)[name] for pair in PAIRS) for name in ("matched", "predicted", "true")]
    assert lines["findings F1"] == [f"{100 * f1(*sums):.1f}"] and lines["temporal F1"] == ["50.0"]


def test_each_row_of_an_evaluation_has_its_table(tmp_path, capsys):
    answers = {row: [{"prediction": text if row == "model" else "", "answer": answer} for text, answer in PAIRS]
               for row in ("model", "prior left out")}
    write_evaluation(tmp_path / "out/eval/step_1_studies_test", {
        "stands_on": {"checkpoint": "1"}, "results": {"studies/test": {}}}, answers)
    clinical.main(clinical.Config(run=str(tmp_path / "out")))
    printed = capsys.readouterr().out
    assert "studies/test, model: 4 reports" in printed and "studies/test, prior left out: 4 reports" in printed
    assert printed.count("micro 14") == 2


def test_of_several_references_the_nearest_counts():
    assert clinical.compare_findings("Edema.", ["No edema. Effusion.", "Edema. Effusion."])["matched"] == 1


def test_radeval_is_called_by_its_public_interface(tmp_path, capsys, monkeypatch):
    path = write_answers(tmp_path / "a.jsonl")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="no package radeval here; `pip install radeval`.*downloads the models"):
        clinical.main(clinical.Config(run=path, radeval=True))
    calls = []

    class RadEval:
        def __init__(self, metrics):
            calls.append(metrics)

        def __call__(self, refs, hyps):
            calls.append((refs, hyps))
            return {"radgraph_simple": 0.5, "radgraph_partial": 0.4, "radgraph_complete": 0.3, "ratescore": 0.25}

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "radeval", SimpleNamespace(RadEval=RadEval))
    clinical.main(clinical.Config(run=path, radeval=True))
    assert calls == [["radgraph", "ratescore"], tuple([pair[side] for pair in PAIRS] for side in (1, 0))]
    assert [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("ra")] == [
        ["radgraph_simple", "50.0"], ["radgraph_partial", "40.0"], ["radgraph_complete", "30.0"], ["ratescore", "25.0"]]


@pytest.mark.parametrize("content, words", [
    ('{"prediction": "x"}', "line 1 has no prediction and answer"), ("[1]", "line 1 has no"), ("{", "line 1 has no"),
    ('{"prediction": 1, "answer": "a"}', "line 1 has no"), ("[" * 100_000, "line 1 has no"),
    ('{"prediction": "x", "answer": "a b c"}', "no answer of 8 words or more names a finding"), ("", "no answer of 8")])
def test_what_is_no_report_is_refused(content, words, tmp_path):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=words):
        clinical.main(clinical.Config(run=str(tmp_path / "a.jsonl")))
    with pytest.raises(UserError, match="not there or not the table"):
        clinical.main(clinical.Config(mesh=str(tmp_path / "a.jsonl")))


# ----------------------------------------------------------------------------- real reports

def test_real_reports_agree_with_their_mesh_terms():
    if not (path := RAW / "iu_xray/indiana_reports.csv").is_file():
        pytest.skip("needs iu_xray/indiana_reports.csv in the folder that NANOMEDQ_RAW names")
    reports = clinical.read_mesh(path, half=1)
    table = {finding: clinical.count([(status == "positive", there) for status, there in pairs])
             for finding, pairs in clinical.pair_mesh(reports).items()}
    assert len(reports) == 1904 and table["Cardiomegaly"][3] == 174 and table["No Finding"][3] == 669
    floors = {"Cardiomegaly": 0.9, "Lung Opacity": 0.93, "Atelectasis": 0.9, "Pleural Effusion": 0.9,
              "Consolidation": 0.85, "Fracture": 0.85, "Support Devices": 0.8, "Pneumothorax": 0.75,
              "Pleural Other": 0.75, "Edema": 0.7, "Lung Lesion": 0.7, "Pneumonia": 0.5}
    assert {finding: table[finding][2] for finding, floor in floors.items() if table[finding][2] < floor} == {}
    assert table["No Finding"][1] > 0.96  # of the reports tagged normal
    wrong = sum(read(text).get(finding) == "negative" for wanted, text in reports for finding in wanted)
    assert wrong <= 16  # findings by MeSH that the rules take for denied, of 1,056
