"""
How written reports and captions are scored: by their words, by their findings, beside a text that sees no image.

Reports are alike, so that one constant report scores high by its words: ROUGE-L and BLEU are read beside that row,
and a report's findings count by themselves (tasks/findings.py). BLEU and CIDEr-D are pycocoevalcap's of the whole
corpus, CIDEr-D times 100; ROUGE-L is the plain F1 over words, and stands twice more on the scales of published
figures (tasks/ngrams.py). Of several references that count as right each metric takes what its authors take.
docs/reports.md has the scores.
"""

import random
from collections import defaultdict

import numpy as np

from tasks.box_tables import cell_of
from tasks.findings import FINDINGS, compare_findings
from tasks.ngrams import bleu, cider_d, count_matches, lcs_f1, meteor, rouge_l_coco, rouge_l_sets, words_of
from tasks.stats import resampled_sums
from tasks.vqa import (cell_text, plain, print_cells, print_lacking, references_of, report_new, report_types,
                       summary)

MAIN = "ROUGE-L"
WORDS = (MAIN, "BLEU-1", "BLEU-4", "METEOR", "CIDEr-D")  # of the first table
CLINICAL = ("findings F1", "macro F1", "temporal F1")  # of the second, where the references have findings
SCALES = ("BLEU-2", "BLEU-3", "mean BLEU-4", "ROUGE-L coco", "ROUGE-L of sets", "words")  # of the last
MEANS = (MAIN, "METEOR", "ROUGE-L coco", "ROUGE-L of sets", "words")  # over reports, as `score` has them
ADDED = {"the image adds": "image shuffled", "the prior adds": "prior left out"}  # the row that the model is above
ROWS_BY_TYPE = ("model", "image shuffled", "constant report")
CANDIDATES, OTHERS = 256, 64  # reports among which the medoid is searched, and that each is compared with


# ----------------------------------------------------------------------------- score

def f1(matched, predicted, true):
    """2 x matched / (predicted + true) in percent, nan where there are neither; of numbers or arrays."""
    counted = np.asarray(predicted) + true
    return np.where(counted > 0, 200 * np.asarray(matched) / np.maximum(counted, 1), np.nan)


def score(record, prediction):
    """
    What the scores of one text are made of, as a dict. record: a line of records.jsonl.

    The MEANS but "words" are in percent; "counts" are count_matches' 9 numbers, "text" its words, for CIDEr-D, and
    "findings" what tasks/findings.py counts.
    """
    references = references_of(record)
    predicted, wanted = words_of(prediction), list(map(words_of, references))
    return {MAIN: 100 * max(lcs_f1(predicted, each) for each in wanted), "METEOR": 100 * meteor(predicted, wanted),
            "ROUGE-L coco": 100 * rouge_l_coco(predicted, wanted),
            "ROUGE-L of sets": 100 * max(rouge_l_sets(prediction, reference) for reference in references),
            "words": len(predicted), "counts": count_matches(predicted, wanted), "text": predicted,
            "findings": compare_findings(prediction, references)}


# ----------------------------------------------------------------------------- other ways to ask

def is_prior(part):
    """Whether a part of a study is of the one before: a film by its role, or its report."""
    return part.startswith("Prior report:") if isinstance(part, str) else part["role"].startswith("prior ")


def has_prior(record):
    return any(map(is_prior, record.get("parts", ())))


def ways_of(record):
    """
    Other ways to put a study that has an earlier one, {row of the table: (its line of records.jsonl, order)}: "prior
    left out" is without the earlier films and report, in "order swapped" the earlier frontal film and the present one
    have changed places. order: which of its images stand where. {} of a study without.
    """
    parts = record.get("parts", ())
    roles = [part["role"] for part in parts if isinstance(part, dict)]
    if not has_prior(record):
        return {}
    own = [part for part in parts if not is_prior(part)]
    ways = {"prior left out": ({**record, "parts": own},
                               [place for place, role in enumerate(roles) if not role.startswith("prior ")])}
    if {"frontal", "prior frontal"} <= set(roles):
        order, (now, before) = list(range(len(roles))), map(roles.index, ("frontal", "prior frontal"))
        order[now], order[before] = before, now
        ways["order swapped"] = record, order
    return ways


# ----------------------------------------------------------------------------- without an image

def medoid(answers, generator, alike=lcs_f1, split=words_of):
    """The text among a list of them with the best mean ROUGE-L to a draw of all; "" of none."""
    others = list(map(split, generator.sample(answers, min(len(answers), OTHERS))))
    candidates = dict.fromkeys(generator.sample(answers, min(len(answers), CANDIDATES)))

    def worth(text):
        words = split(text)
        return sum(alike(words, other) for other in others)

    return max(candidates, key=worth, default="")


def learn_constants(train, seed):
    """{question: the medoid of its answers}, and under "" that of all. train: (question, answer) pairs."""
    answers, generator = defaultdict(list), random.Random(seed)
    for question, answer in train:
        answers[plain(question)].append(answer)
        answers[""].append(answer)
    return {question: medoid(some, generator) for question, some in answers.items()}


def cut_in_half(records, seed):
    """Which half, 0 or 1, each record is in at random, (n,); a group is in one, or else a study, as the id says."""
    names = [record.get("group") or record["id"].split("/")[0] for record in records]
    _, units = np.unique(names, return_inverse=True)
    return (np.random.default_rng(seed).permutation(units.max(initial=0) + 1) % 2)[units]


def blind_rows(train, records, seed=0):
    """
    {"constant report": n texts}: of each question the training answer with the best mean ROUGE-L to the others, and of
    one that training did not ask, that of all. Where train is None, the records themselves stand for it, in two halves,
    each answered with the other's. Prints which of the two it is. train: (question, answer) pairs.
    """
    if train is not None:
        print("constant report: the training answer that is most like the others")
        halves, constants = np.zeros(len(records), int), [learn_constants(train, seed)]
    else:
        print("constant report: training is not known; each half of this split with the other half's most typical one")
        halves = cut_in_half(records, seed)
        constants = [learn_constants([(record["question"], references_of(record)[0]) for record, half in
                                      zip(records, halves) if half != own], seed) for own in (0, 1)]
    texts = [constants[half].get(plain(record["question"]), constants[half].get("", ""))
             for record, half in zip(records, halves)]
    return {"constant report": texts}


# ----------------------------------------------------------------------------- sums and what is made of them

def stack(some, consensus):
    """
    The numbers whose sums the scores of n reports are made of, {name: (n, width)}: 1, the means, BLEU's counts, and
    (matched, predicted, true) of findings and of words of change, and the same of each finding that is "positive".

    some: what `score` gave; consensus: (n,) CIDEr-D in 0..10.
    """
    counts, found = np.array([one["counts"] for one in some]), [one["findings"] for one in some]
    sums = ("matched", "predicted", "true")
    pairs = np.array([[[status == "positive" for status in one["by finding"].get(name, ("", ""))]
                       for name in FINDINGS] for one in found]).reshape(-1, len(FINDINGS), 2)
    return {"one": np.ones((len(some), 1)),
            "means": np.column_stack([*([one[name] for one in some] for name in MEANS), 100 * consensus,
                                      100 * bleu(counts)[:, -1]]),
            "counts": counts, "found": np.array([[one[name] for name in sums] for one in found]),
            "change": np.array([[one[f"temporal {name}"] for name in sums] for one in found]),
            "each": np.concatenate([pairs.all(2), pairs[..., 0], pairs[..., 1]], axis=1)}


def scores_of(sums):
    """{score: (R,)} of the sums of stack's numbers over R draws of reports, {name: (R, width)}."""
    means = dict(zip((*MEANS, "CIDEr-D", "mean BLEU-4"), (sums["means"] / sums["one"]).T))
    corpus = {f"BLEU-{number}": values for number, values in enumerate(100 * bleu(sums["counts"]).T, 1)}
    each = f1(*np.split(sums["each"], 3, axis=1))  # (R, findings)
    there = ~np.isnan(each)
    macro = np.where(there.any(1), np.nansum(each, axis=1) / np.maximum(there.sum(1), 1), np.nan)
    return means | corpus | {"findings F1": f1(*sums["found"].T), "macro F1": macro,
                             "temporal F1": f1(*sums["change"].T)}


def resample(stacked, units, seed):
    """Every score of the reports as they are and of each resample of their units, {row: {score: (1 + resamples,)}}."""
    table = {}
    for row, blocks in stacked.items():
        values = np.hstack(list(blocks.values())).astype(np.float64)
        drawn = np.vstack([values.sum(0), resampled_sums(values, units, seed=seed)])
        edges = np.cumsum([block.shape[1] for block in blocks.values()])[:-1]
        table[row] = scores_of(dict(zip(blocks, np.split(drawn, edges, axis=1))))
    for row, without in ADDED.items():
        if {"model", without} <= table.keys():
            table[row] = {name: values - table[without][name] for name, values in table["model"].items()}
    return table


def tabulate(stacked, chosen, units, seed):
    """
    The table of the reports `chosen`, (n,) bool, as a dict: how many they are, {row: {score: [value, low, high]}}, and
    the share of the resamples without a report for a score. stacked: {row: stack's numbers}.
    """
    part = {row: {name: block[chosen] for name, block in blocks.items()} for row, blocks in stacked.items()}
    table, alone = resample(part, units[chosen], seed), len(np.unique(units[chosen])) < 2
    return {"questions": int(chosen.sum()),
            "rows": {row: {name: cell_of(values, alone) for name, values in scores.items()}
                     for row, scores in table.items()},
            "resamples_without": {name: float(np.isnan(values[1:]).mean())
                                  for name, values in next(iter(table.values())).items()}}


# ----------------------------------------------------------------------------- tables

def fit(cell):
    """A cell's text, in whole numbers where it would touch its neighbour: CIDEr-D may be above 100."""
    text = cell_text(cell)
    return text if len(text) < 17 else "{:.0f} [{:.0f} {:.0f}]".format(*cell)


def print_table(table, unit, parts):
    """Print a table in parts, [(title, names of its scores)]."""
    for title, names in parts:
        print_cells(title, names)
        for row, cells in table["rows"].items():
            print_cells(row, [fit(cells[name]) for name in names])
    print_lacking(table, unit)


def report_texts(scored, seen, consensus):
    """Print and return what is to be known of the texts beside their scores."""
    empty = {row: sum(not one["text"] for one in some) for row, some in scored.items()}
    known = None if isinstance(seen, str) else sum("words" in reason for reason in seen)
    if known is not None:
        print(f"{known:,} of the {len(seen):,} references occur word for word in training, with their question")
    if any(empty.values()):
        print("empty: " + ", ".join(f"{count:,} of {row}" for row, count in empty.items() if count))
    if "order swapped" in scored:
        print("order swapped: the earlier study in place of the later one; a model that tells them apart scores less")
    full = {row: np.array([bool(one["text"]) for one in some]) for row, some in scored.items()}
    return {"word for word in training": known, "empty": empty, "CIDEr-D of answers that are not empty": {
        row: float(100 * values[full[row]].mean()) if full[row].any() else None for row, values in consensus.items()}}


def report(name, scored, images, records, seen, units, unit="images", seed=0):
    """
    Print a dataset's tables: all texts, those that are new to the run, ROUGE-L by type. Returns the same as a dict.
    Parameters as in tasks/vqa.py.

    CIDEr-D weighs words by how rare they are in the references of all these records, in every part and resample.
    """
    consensus = cider_d({row: [one["text"] for one in some] for row, some in scored.items()},
                        [list(map(words_of, references_of(record))) for record in records])
    stacked = {row: stack(some, consensus[row]) for row, some in scored.items()}
    clinical = any(one["findings"]["true"] for one in next(iter(scored.values())))
    what = f"{'reports' if clinical else 'texts'}{f' about {images:,} images' if images else ''}"
    print(f"\n{name}: {len(records):,} {what}; percent, CIDEr-D x 100, with 95% intervals over {unit}")

    parts = [("", WORDS), *([("findings", CLINICAL)] if clinical else [])]
    tables = {"drawn": unit, "all": tabulate(stacked, np.full(len(records), True), units, seed)}
    print_table(tables["all"], unit, [*parts, ("other scales", SCALES)])
    tables["texts"] = report_texts(scored, seen, consensus)
    tables["new"] = report_new(seen, lambda chosen: tabulate(stacked, chosen, units, seed),
                               lambda table: print_table(table, unit, parts))
    if (later := np.array(list(map(has_prior, records)))).any():
        tables["with a prior"] = tabulate(stacked, later, units, seed)
        print(f"{tables['with a prior']['questions']:,} of them of a patient with an earlier study:")
        print_table(tables["with a prior"], unit, parts)
    few = {row: stacked[row] for row in stacked if row in ROWS_BY_TYPE}
    tables["types"] = report_types(records, lambda chosen: tabulate(few, chosen, units, seed), MAIN)
    added = next((row for row in ADDED if row in tables["all"]["rows"]), "")
    metrics = (MAIN, "BLEU-4", "CIDEr-D", *CLINICAL[:2 * clinical])
    tables["summary"] = summary(tables, seen, metrics, "constant report", added)
    return tables
