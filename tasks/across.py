"""
One table of all runs: of each dataset the mean over a run's seeds, how far they are apart, and who is better.

A run's seeds are the folders seed_0, seed_1, ... in it, and runs whose names differ in fold_<k> alone are one, which
has answered each fold of a dataset, <name>_fold_<k>_of_<n>: each question counts once. Evaluations stand in one row, or
are compared, only where they stand on the same; of the others it is said why they are left out.
"""

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from plumbing.files import differences, hash_json, lock, require_writable, write_whole
from plumbing.flags import UserError
from plumbing.runs import FREE_ON_RESUME
from tasks import boxes, choices, reasoning, reports, vqa
from tasks.compare import compare, holm, key_of, p_text
from tasks.encoders import deviation
from tasks.evaluations import RESULTS, file_of, find_evaluations, read_evaluation, read_predictions
from tasks.stats import draw_units, intervals
from tasks.summary import FAULTS, faults_of, line_up, markdown, name_of, summary_of, tabular
from tasks.vqa import cell_text

HEADS = ("dataset", "run", "questions", "seeds", "folds", "metric", "score", "± seeds", "± folds", "blind answers",
         *(f"{fault} %" for fault in FAULTS))
PAIRS = ("dataset", "metric", "run A", "run B", "questions", "units", "A", "B", "A - B", "p", "p, Holm")
TASKS = {task.MAIN: task for task in (boxes, choices, reports, vqa)}
NOTES = ("score: mean over seeds, each question once; ± seeds, ± folds: standard deviation, -: of one alone",
         "blind answers see no image; cut, empty, repeating: of the model's answers, in percent")
PAIR_NOTES = ("A - B: of the questions that both answered, the mean over seeds of each; p: the signs of whole units "
              "flipped; Holm: corrected for all rows",
              "p is about other patients or images: of so few seeds no test is made")


class Entry(NamedTuple):
    """An evaluation of one dataset by one seed of a run, on one fold."""
    run: str
    dataset: str  # "dataset/split", without the fold
    seed: int | None  # as it was trained with; None: answers that were given elsewhere
    fold: str  # "0 of 5"; "": there are none
    folder: Path
    results: dict  # of its results.json


# ----------------------------------------------------------------------------- which evaluations

def name_run(folder):
    """What a run's folder is called in the table: its path below out/, without seed and fold."""
    folder = folder.relative_to("out") if folder.is_relative_to("out") else folder
    parts = [re.sub(r"(^|[_-])fold_\d+(_of_\d+)?", "", part) for part in folder.parts
             if not re.fullmatch(r"seed_\d+", part)]
    return "/".join(filter(None, parts)) or folder.name


def find_entries(places):
    """
    ([Entry] of the evaluations by each run below these folders, of the checkpoint that was evaluated last, [lines about
    those that cannot be used]). Of a dataset that was asked in several ways, such as with a --limit, each is there.
    """
    runs = {path.parent.parent.parent: None for place in places
            for path in sorted(Path(place).glob(f"**/eval/*/{RESULTS}"))}
    entries, left_out = [], []
    for run in runs:
        try:
            results = {folder: read_evaluation(folder) for folder in find_evaluations(run)}
        except UserError as error:
            left_out.append(f"left out: {error}")
            continue
        some, last = {}, next(iter(results.values()))["stands_on"]["checkpoint"]
        for folder, one in results.items():
            if one["stands_on"]["checkpoint"] == last and file_of("model") in one["predictions"]:
                entry = open_entry(run, folder, one)
                some.setdefault((entry.dataset, entry.fold, hash_json(questions_of(entry))), entry)
        entries += some.values()
    return entries, left_out


def open_entry(run, folder, results):
    dataset, _, split = name_of(results).partition("/")
    fold = re.search(r"_fold_(\d+)_of_(\d+)$", dataset)
    return Entry(name_run(run), f"{dataset[:fold.start()] if fold else dataset}/{split}",
                 results["training"].get("flags", {}).get("seed"), f"{fold[1]} of {fold[2]}" if fold else "", folder,
                 results)


def questions_of(entry):
    """What the answers of all runs to one dataset have to stand on: its data, and how it was asked."""
    stands_on = entry.results["stands_on"]
    return {"data": stands_on["data"], **{name: value for name, value in stands_on["flags"].items() if name != "blind"}}


def training_of(entry):
    """What all seeds and folds of a run have to have in common."""
    flags = entry.results["training"].get("flags", {})
    flags = {name: value for name, value in flags.items() if name not in {*FREE_ON_RESUME, "seed", "seeds"}}
    flags["data"] = re.sub(r"_fold_\d+_of_", "_fold_*_of_", flags.get("data", ""))
    flags["start"] = re.sub(r"\bseed_\d+\b", "seed_*", flags.get("start", ""))  # each from its own stage before
    stands_on = entry.results["stands_on"]
    return {"flags": flags, "dtype": stands_on["dtype"], "base_bits": stands_on["base_bits"]}


def inputs_of(entry):
    """What all seeds of a run on one fold have to have in common."""
    return entry.results["training"].get("inputs", {})


def keep_alike(entries, group_of, facts_of):
    """
    (the Entries that stand on the same as most of their group, of as many on the one with the most questions, [lines
    about the runs that are not among these]).
    """
    groups, kept, left_out = defaultdict(list), [], []
    for entry in entries:
        groups[group_of(entry)].append(entry)
    for some in groups.values():
        hashes = [hash_json(facts_of(entry)) for entry in some]
        counts = Counter(hashes)
        most = max(range(len(some)), key=lambda place: (counts[hashes[place]], summary_of(some[place].results)["n"]))
        alike = {entry[:4] for entry, own in zip(some, hashes) if own == hashes[most]}
        for entry, own in zip(some, hashes):
            if own == hashes[most]:
                kept.append(entry)
            elif entry[:4] not in alike:
                changes = differences(facts_of(some[most]), facts_of(entry))
                left_out.append(f"left out: {entry.folder}: does not stand on the same as {some[most].folder}: "
                                f"{', '.join(changes[:3])}")
    return kept, left_out


def keep_first(entries):
    """(one Entry of each run, dataset, seed and fold, the first; [lines about the others])."""
    kept, left_out = {}, []
    for entry in entries:
        first = kept.setdefault(entry[:4], entry)
        if first is not entry:
            left_out.append(f"left out: {entry.folder}: the same run, seed and dataset as {first.folder}")
    return list(kept.values()), left_out


def comparable(entries):
    """The Entries that may stand in one table, and lines about the others."""
    lines = []
    for group_of, facts_of in ((lambda entry: (entry.dataset, entry.fold), questions_of),
                               (lambda entry: (entry.run, entry.dataset), training_of),
                               (lambda entry: (entry.run, entry.dataset, entry.fold), inputs_of)):
        entries, some = keep_alike(entries, group_of, facts_of)
        lines += some
    entries, some = keep_first(entries)
    some += name_steps(entries)
    return [entry._replace(dataset=label_of(entry)) for entry in entries], lines + some


def name_steps(entries):
    """A line for each run and dataset whose seeds were not evaluated at the same step: one may have been stopped."""
    groups = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        groups[entry.run, entry.dataset, entry.fold][entry.results.get("checkpoint")].append(str(entry.seed))
    return [f"not of one step: {run} on {dataset}{f', fold {fold}' * bool(fold)}: "
            + "; ".join(f"{step} (seed {', '.join(seeds)})" for step, seeds in steps.items())
            for (run, dataset, fold), steps in groups.items() if len(steps) > 1]


def label_of(entry):
    """A dataset's name, and the flags that it was asked with that are not as usual."""
    flags = entry.results.get("unusual_flags", {}).items()
    return " ".join([entry.dataset, *(f"--{flag}={value}" for flag, value in flags if flag != "blind")])


# ----------------------------------------------------------------------------- numbers

def over_seeds(entries, value_of):
    """
    (mean, deviation over seeds, deviation over folds) of value_of(results), a float or None, of a run's Entries on a
    dataset: of each fold the mean over its seeds, folds by their numbers of questions. None where a value is not known,
    nan where there is no deviation.
    """
    values, sizes = defaultdict(dict), {}
    for entry in entries:
        values[entry.fold][entry.seed] = value_of(entry.results)
        sizes[entry.fold] = summary_of(entry.results)["n"]
    if any(value is None for some in values.values() for value in some.values()):
        return None, np.nan, np.nan
    weights = list(sizes.values())
    folds = [np.mean(list(values[fold].values())) for fold in sizes]
    whole = [seed for seed in values[next(iter(sizes))] if all(seed in some for some in values.values())]
    seeds = [np.average([values[fold][seed] for fold in sizes], weights=weights) for seed in whole]
    return float(np.average(folds, weights=weights)), deviation(seeds), deviation(folds)


def question_scores(entries):
    """
    {(dataset, id, question): (the main score, the mean over seeds, and what a bootstrap draws it with: its patient,
    its image or itself)} of a run's Entries on a dataset.
    """
    scores, lines = defaultdict(list), {}
    for entry in entries:
        task = TASKS[summary_of(entry.results)["lines"][0]["metric"]]
        for text in read_predictions(entry.folder / file_of("model")).splitlines():
            line = json.loads(text)
            lines[key_of(line)] = line
            scores[key_of(line)].append(task.score(line, reasoning.answer_of(line, line["prediction"]))[task.MAIN])
    return {key: (float(np.mean(some)), lines[key]) for key, some in scores.items()}


def units_of(lines):
    """What a bootstrap is to draw of lines of answers, and the number of each one's, (n,): patients, else images."""
    names = [line.get("image") or line.get("context") or line["id"] for line in lines]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    unit, units = draw_units(np.array([numbers[name] for name in names]), [line.get("group", "") for line in lines])
    return unit if any(line.get("image") for line in lines) else "questions", units


def interval_of(scored, seed):
    """[mean, low, high] of what question_scores gave."""
    scores, lines = zip(*scored.values())
    cell = intervals(np.array(scores)[:, None], units_of(lines)[1], seed)[0][0].tolist()
    return [None if np.isnan(number) else number for number in cell]


def share_of(results, fault):
    """The percentage of an evaluation's answers that have a fault, that of this place in FAULTS, or None."""
    count = faults_of(results)[fault]
    return None if count is None else 100 * count / summary_of(results)["n"]


def number_text(value):
    return "-" if value is None or np.isnan(value) else f"{value:.1f}"


def rows_of(entries, scored, seed):
    """The rows of the table, texts in the order of HEADS, of a run's Entries on one dataset."""
    rows, folds = [], dict.fromkeys(entry.fold for entry in entries)
    sizes = {entry.fold: summary_of(entry.results)["n"] for entry in entries}
    counts = sorted({sum(entry.fold == fold for entry in entries) for fold in folds})
    of_folds = f"{len(folds)} of {next(iter(folds)).rpartition(' ')[2]}" if "" not in folds else "-"
    for place, line in enumerate(summary_of(entries[0].results)["lines"]):
        mean, of_seeds, between = over_seeds(entries, lambda results: summary_of(results)["lines"][place]["score"][0])
        blind = line["blind"] and over_seeds(
            entries, lambda results: summary_of(results)["lines"][place]["blind"][1][0])[0]
        score = number_text(mean) if place else cell_text(interval_of(scored, seed))
        faults = [""] * len(FAULTS) if place else [number_text(over_seeds(
            entries, lambda results: share_of(results, fault))[0]) for fault in range(len(FAULTS))]
        first = ["", "", "", "", ""] if place else [
            entries[0].dataset, entries[0].run, f"{sum(sizes.values()):,}", "-".join(map(str, counts)), of_folds]
        rows.append([*first, line["metric"], score, number_text(of_seeds), number_text(between),
                     f"{line['blind'][0]} {number_text(blind)}" if line["blind"] else "-", *faults])
    return rows


def compare_pairs(scored, seed):
    """
    The rows of the table of comparisons, texts in the order of PAIRS, of each two runs that have answered the same
    questions. scored: {(dataset, run, metric): what question_scores gave}.
    """
    pairs = []
    for number, ((dataset, first, metric), ours) in enumerate(scored.items()):
        for (_, second, _), theirs in list(scored.items())[number + 1:]:
            if keys := [key for key in ours if key in theirs]:  # a dataset's name is a part of them
                unit, units = units_of([ours[key][1] for key in keys])
                scores = [[some[key][0] for key in keys] for some in (ours, theirs)]
                pairs.append((dataset, metric, first, second, compare(*scores, units, unit, seed)))
    known = [one["p"] for *_, one in pairs if one["p"] is not None]
    corrected = iter(holm(known))
    return [[dataset, metric, first, second, f"{one['questions']:,}", one["unit"], f"{one['first']:.1f}",
             f"{one['second']:.1f}", cell_text(one["difference"]), p_text(one["p"]),
             p_text(None if one["p"] is None else next(corrected))] for dataset, metric, first, second, one in pairs]


# ----------------------------------------------------------------------------- the report

def report_runs(config):
    """
    Print the table of all runs in out/, or below the folders of --run, and the comparisons of those that have answered
    the same; write both into report.txt, .md and .tex, in out/ or --out. Raises UserError where there is none.
    """
    places = [place for place in map(str.strip, config.run.split(",")) if place] or ["out"]
    entries, left_out = find_entries(places)
    asked = [name.strip() for name in config.data.split(",")]
    entries = [entry for entry in entries if summary_of(entry.results) and (
        config.data in ("", "all") or entry.dataset.partition("/")[0] in asked)]
    if not entries:
        of = f" of {config.data}" if config.data not in ("", "all") else ""
        raise UserError(f"{', '.join(places)}: no evaluation{of} to report; make one with "
                        "`python eval_vqa.py --run=...`")
    entries, lines = comparable(entries)
    groups, drawn, rows, scored = defaultdict(list), defaultdict(list), [], {}
    for entry in sorted(entries, key=lambda entry: (entry.dataset, entry.run, entry.fold, entry.seed or 0)):
        groups[entry.dataset, entry.run].append(entry)
    for (dataset, run), some in groups.items():
        main = summary_of(some[0].results)["lines"][0]["metric"]
        scored[dataset, run, main] = question_scores(some)
        rows += rows_of(some, scored[dataset, run, main], config.seed)
        drawn[summary_of(some[0].results)["unit"]].append(dataset)
    units = "; ".join(f"{unit} ({', '.join(dict.fromkeys(names))})" for unit, names in drawn.items())
    pairs = compare_pairs(scored, config.seed)
    notes = [NOTES[0], f"[low high]: 95% intervals by resampling {units}", *NOTES[1:], *left_out, *lines]
    tables = [(HEADS, rows, notes)] + ([(PAIRS, pairs, PAIR_NOTES)] if pairs else [])
    text = "\n\n".join("\n".join([*line_up(heads, some), *below]) for heads, some, below in tables) + "\n"
    files = {"txt": text, "tex": "\n".join(tabular(*table) for table in tables),
             "md": "\n\n".join("\n".join([*markdown(heads, some), "", *(f"- {note}" for note in below)])
                               for heads, some, below in tables) + "\n"}
    print(text, end="")
    out = Path(config.out or "out")
    require_writable(out, "out")
    with lock(out / ".lock", "writing a report", wait=True):
        for end, content in files.items():
            write_whole(out / f"report.{end}", content.encode())
    print(f"the report is in {out}/report.txt, .md and .tex")
