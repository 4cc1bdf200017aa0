"""
What the reports of an evaluation say of CheXpert's 14 findings, beside what they should say.

    python extras/look/clinical.py --run=out/x                              by the rules of tasks/findings.py
    python extras/look/clinical.py --run=answers.jsonl                      a file of prediction and answer suffices
    python extras/look/clinical.py --run=out/x --chexbert=weights/chexbert  by CheXbert, whose weights are yours
    python extras/look/clinical.py --run=out/x --radeval=true               RadGraph F1 and RaTEScore by RadEval
    python extras/look/clinical.py --mesh=raw/iu_xray/indiana_reports.csv   the rules beside IU X-Ray's MeSH terms

A finding counts as said where it is positive or uncertain, as the usual CheXbert F1 counts (the "rrg" mode of
f1chexbert). Micro is over all findings together, macro the mean over findings, with 0 for one that is nowhere; both
over all 14 and over the 5 that are often reported alone. "findings F1" is of triples of finding, status and side, and
"temporal F1" of words of change (tasks/findings.py), each over all reports together.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import csv
import hashlib
import importlib.util
import json
import time
from dataclasses import dataclass

from plumbing.flags import UserError, parse_command_line, run
from tasks.evaluations import choose_evaluations, read_predictions
from tasks.findings import FINDINGS, FIVE, compare_findings, f1, read
from tasks.rewards import LONG_TEXT

SAID = ("positive", "uncertain")
RADEVAL = ("radgraph_simple", "radgraph_partial", "radgraph_complete", "ratescore")
CAUTION = "Neither the rules nor CheXbert are a radiologist: these are agreements of texts, not of texts with films."


@dataclass(frozen=True)
class Config:
    run: str = ""  # a run's folder, an evaluation's, or a file of answers; none: the run evaluated last
    chexbert: str = ""  # a folder with chexbert.pth and vocab.txt; none: by rules
    radeval: bool = False  # RadGraph F1 and RaTEScore by the package radeval, which downloads models
    mesh: str = ""  # IU X-Ray's indiana_reports.csv: the rules beside its MeSH terms, and nothing else


# ----------------------------------------------------------------------------- answers

def read_lines(path):
    """[(prediction, references)] of the reports in a file of answers. Raises UserError where a line is not one."""
    pairs = []
    for number, line in enumerate(read_predictions(path).decode(errors="backslashreplace").splitlines(), 1):
        try:
            record = json.loads(line)
            references = record.get("references") or [record["answer"]]
            texts = [record["prediction"], *references]
            if not all(isinstance(text, str) for text in texts):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{path}: line {number} has no prediction and answer, both text; name a predictions.jsonl "
                            "of reports") from None
        if record.get("boxes") is None and len(references[0].split()) >= LONG_TEXT and read(references[0]):
            pairs.append((texts[0], references))
    return pairs


def find_rows(place):
    """{"dataset/split, row": [(prediction, references)]} of a run or a file, without those that hold no reports."""
    if Path(place).is_file():
        rows = {place: read_lines(place)}
    else:
        rows = {f"{name}, {row_of(file)}": read_lines(folder / file)
                for name, (folder, results) in choose_evaluations(place).items() for file in results["predictions"]}
    rows = {name: pairs for name, pairs in rows.items() if pairs}
    if not rows:
        raise UserError(f"{place or 'the run evaluated last'}: no answer of {LONG_TEXT} words or more names a finding; "
                        "name a run that was evaluated on reports")
    return rows


def row_of(file):
    """The row of the table that a file of answers has."""
    return file.removesuffix(".jsonl").removeprefix("predictions").removeprefix("_").replace("_", " ") or "model"


# ----------------------------------------------------------------------------- scores

def count(pairs):
    """(precision, recall, F1, number that have it) of n (found, there) booleans."""
    both, found, there = (sum(some) for some in zip(*((one and other, one, other) for one, other in pairs)))
    return both / max(found, 1), both / max(there, 1), f1(both, found, there) if found or there else 0.0, there


def tabulate(labels):
    """{finding or mean: count's four} of n (predicted, true) pairs of {finding: status}."""
    said = {finding: [tuple(one.get(finding) in SAID for one in pair) for pair in labels] for finding in FINDINGS}
    table = {finding: count(pairs) for finding, pairs in said.items()}
    for name, some in (("14", FINDINGS), ("5", FIVE)):
        together = count([pair for finding in some for pair in said[finding]])
        table |= {f"micro {name}": together,
                  f"macro {name}": (*(sum(table[one][place] for one in some) / len(some) for place in range(3)),
                                    together[3])}
    return table


def print_table(table):
    print(f"{'':28}{'precision':>11}{'recall':>9}{'F1':>7}{'reports':>9}")
    for name, (precision, recall, score, there) in table.items():
        print(f"{name:28}{100 * precision:11.1f}{100 * recall:9.1f}{100 * score:7.1f}{there:9,}")


def print_rules(pairs):
    counts = [compare_findings(*pair) for pair in pairs]
    print_table(tabulate([tuple({finding: both[side] for finding, both in one["by finding"].items()}
                                for side in (0, 1)) for one in counts]))
    for name, before in (("findings F1", ""), ("temporal F1", "temporal ")):
        sums = [sum(one[before + part] for one in counts) for part in ("matched", "predicted", "true")]
        print(f"{name:28}{100 * f1(*sums):27.1f}")


def print_chexbert(pairs, model):
    from zoo.chexbert import label
    print_table(tabulate(list(zip(label(model, [prediction for prediction, _ in pairs]),
                                  label(model, [references[0] for _, references in pairs])))))


def print_radeval(pairs, evaluator):
    scores = evaluator(refs=[references[0] for _, references in pairs], hyps=[prediction for prediction, _ in pairs])
    for name in RADEVAL:
        print(f"{name:28}{100 * scores[name]:27.1f}")


def load_radeval():
    """RadEval's evaluator of RadGraph F1 and RaTEScore. Raises UserError where the package is not installed."""
    if importlib.util.find_spec("radeval") is None:
        raise UserError("--radeval: no package radeval here; `pip install radeval`, version 2 or later, which brings "
                        "transformers and downloads the models of RadGraph and RaTEScore when it is first called")
    from radeval import RadEval
    return RadEval(metrics=["radgraph", "ratescore"])


# ----------------------------------------------------------------------------- MeSH

MESH = {  # finding: how the terms begin that IU X-Ray's annotators gave to a report that has it
    "Enlarged Cardiomediastinum": ("Mediastinum/prominent", "Mediastinum/enlarged"),
    "Cardiomegaly": ("Cardiomegaly", "Cardiac Shadow/enlarged", "Cardiac Shadow/borderline"),
    "Lung Opacity": ("Opacity", "Airspace Disease", "Infiltrate", "Markings/lung/interstitial"),
    "Lung Lesion": ("Nodule", "Mass", "Cavitation"),
    "Edema": ("Pulmonary Edema", "Pulmonary Congestion", "Heart Failure"),
    "Consolidation": ("Consolidation",), "Pneumonia": ("Pneumonia",), "Atelectasis": ("Pulmonary Atelectasis",),
    "Pneumothorax": ("Pneumothorax", "Hydropneumothorax", "Hemopneumothorax"),
    "Pleural Effusion": ("Pleural Effusion", "Hydropneumothorax"),
    "Pleural Other": ("Thickening/pleura", "Cicatrix/pleura", "Calcinosis/pleura"), "Fracture": ("Fractures, Bone",),
    "Support Devices": ("Catheters, Indwelling", "Implanted Medical Device", "Medical Device", "Tube, Inserted",
                        "Stents"),
    "No Finding": ("normal",)}


def read_mesh(path, half):
    """
    [(findings by MeSH terms, report)] of a half of indiana_reports.csv, by a hash of the report's number; the rules
    were written on half 0. Reports without words or without indexing are left out.
    """
    reports = []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                terms = [f"{term.strip()}/" for term in row["MeSH"].split(";")]
                text = f"Findings: {row['findings']} Impression: {row['impression']}"
                if (int(hashlib.sha256(row["uid"].encode()).hexdigest(), 16) % 2 == half
                        and terms != ["No Indexing/"] and (row["findings"] + row["impression"]).strip()):
                    reports.append(({finding for finding, heads in MESH.items() if any(
                        term.startswith(f"{head}/") for term in terms for head in heads)}, text))
    except (OSError, KeyError, ValueError, TypeError, AttributeError, csv.Error):
        reports = []
    if not reports:
        raise UserError(f"{path}: not there or not the table; --mesh names IU X-Ray's indiana_reports.csv")
    return reports


def pair_mesh(reports):
    """{finding: [(status by the rules or "", whether its MeSH terms say so)]} of what read_mesh gives."""
    found = [(read(text), there) for there, text in reports]
    return {finding: [(one.get(finding, ""), finding in there) for one, there in found] for finding in FINDINGS}


def print_mesh(path):
    for half, note in ((0, "the rules were written on it"), (1, "no report of it was read for the rules")):
        reports, begin = read_mesh(path, half), time.process_time()
        pairs = pair_mesh(reports)
        milliseconds = 1e3 * (time.process_time() - begin) / len(reports)
        print(f"\nhalf {half}: {len(reports):,} reports, {milliseconds:.2f} ms each; {note}; \"positive\" beside MeSH "
              "terms, percent")
        print_table({finding: count([(status == "positive", there) for status, there in some])
                     for finding, some in pairs.items()})
        print(f"{'':28}{'uncertain':>11}{'of MeSH':>9}{'negative':>10}{'of MeSH':>9}")
        for finding, some in pairs.items():
            marks = [some.count((status, there)) for status in ("uncertain", "negative") for there in (True, False)]
            print(f"{finding:28}{sum(marks[:2]):11,}{marks[0]:9,}{sum(marks[2:]):10,}{marks[2]:9,}")


# ----------------------------------------------------------------------------- main

def main(config):
    if config.mesh:
        return print_mesh(config.mesh)
    rows = find_rows(config.run)
    evaluator = load_radeval() if config.radeval else None
    if config.chexbert:
        from zoo.chexbert import load_chexbert
        model = load_chexbert(config.chexbert)
    for name, pairs in rows.items():
        print(f"\n{name}: {len(pairs):,} reports, {'CheXbert' if config.chexbert else 'rules'}; percent")
        if config.chexbert:
            print_chexbert(pairs, model)
        else:
            print_rules(pairs)
        if evaluator:
            print_radeval(pairs, evaluator)
    print(f"\n{CAUTION}")


if __name__ == "__main__":
    run(main, parse_command_line(Config))
