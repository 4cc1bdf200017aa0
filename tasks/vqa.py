"""
How answers to questions about images are scored: five metrics, what words alone are worth, the tables.

BLEU-1 is the convention of the PathVQA authors' own code: lower-cased, split at spaces, clipped
unigram precision times the brevity penalty, averaged over questions. Other published scales give
other figures for the same answers, by up to 40 points; extras/look/scales.py has them.
"""

import math
import re
from collections import Counter, defaultdict

import numpy as np

from tasks.stats import intervals

METRICS = ("BLEU-1", "exact match", "token F1", "closed accuracy", "open recall")
TYPES_SHOWN = 10
MANY_CUT = 0.01  # share of the answers from which on a longer limit is advised
MANY_LACKING = 0.05  # share of the resamples without any such question, from which on it is said


# ----------------------------------------------------------------------------- metrics

def bleu1(prediction, reference):
    """
    Sentence BLEU-1 in 0..1 (Papineni et al. 2002, unigrams only, no smoothing).

    >>> round(bleu1("lung", "left lung"), 3)  # precision 1, brevity penalty exp(1 - 2/1)
    0.368
    """
    predicted, wanted = prediction.lower().split(), reference.lower().split()
    if not predicted:
        return 0.0
    matches = sum((Counter(predicted) & Counter(wanted)).values())  # each word at most as often
    brevity = min(1.0, math.exp(1 - len(wanted) / len(predicted)))
    return brevity * matches / len(predicted)


def exact_match(prediction, reference):
    """1.0 where both are the same words, case aside."""
    return float(prediction.lower().split() == reference.lower().split())


def open_recall(prediction, reference):
    """The share of the reference's words that the prediction has, each at most as often, in 0..1."""
    predicted, wanted = Counter(prediction.lower().split()), Counter(reference.lower().split())
    return (predicted & wanted).total() / max(wanted.total(), 1)


def token_f1(prediction, reference):
    """Harmonic mean of recall and precision over words, in 0..1 (Rajpurkar et al. 2016)."""
    recall, precision = open_recall(prediction, reference), open_recall(reference, prediction)
    return 2 * recall * precision / (recall + precision) if recall else 0.0


def is_closed(reference):
    return reference.lower().strip() in ("yes", "no")


def score(record, prediction):
    """
    One answer's METRICS in percent, the best over all references that count as right; closed
    accuracy of a yes/no question alone and open recall of any other, nan where it has none.
    """
    references = record.get("references") or [record["answer"]]
    closed = all(map(is_closed, references))
    functions = (bleu1, exact_match, token_f1, exact_match if closed else None,
                 None if closed else open_recall)
    return [100 * max(function(prediction, reference) for reference in references) if function
            else math.nan for function in functions]


def repeats(answer):
    """
    Whether an answer goes round in a loop: a word or phrase three times in a row, case and punctuation
    aside, or up to eight characters eight times in a row.

    >>> [repeats(text) for text in ("no, no, no", "left and left", "the cell of the cell of the cell of")]
    [True, False, True]
    """
    words = np.unique(re.findall(r"\w+", answer.lower()), return_inverse=True)[1]
    for length in range(1, len(words) // 3 + 1):
        same = words[length:] == words[:-length]  # a phrase three times: twice its length of these
        runs = np.diff(np.flatnonzero(~np.concatenate([[False], same, [False]]))) - 1
        if runs.max() >= 2 * length:
            return True
    return re.search(r"(\S{1,8}?)\1{7}", answer) is not None


# ----------------------------------------------------------------------------- what words alone are worth

def question_only_answers(train, test):
    """
    The most frequent training answer to the same question, else to questions with the same first
    3, 2, 1 words, else to any. Looks at no image: what a score is worth without one.
    """
    def keys(question):
        words = question.lower().split()
        return [" ".join(words), *(" ".join(words[:n]) + " ..." for n in (3, 2, 1)), ""]

    answers = defaultdict(Counter)
    for record in train:
        for key in keys(record["question"]):
            answers[key][record["answer"].lower()] += 1
    return [next(answers[key].most_common(1)[0][0] for key in keys(record["question"])
                 if key in answers) for record in test]


def shuffled_images(image_of, seed):
    """For each question another image than its own, (n,): the images change places in a random cycle."""
    images, index = np.unique(image_of[image_of >= 0], return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(images))
    other = np.empty_like(order)
    other[order] = np.roll(order, 1)
    shown = image_of.copy()
    shown[image_of >= 0] = images[other[index]]
    return shown


# ----------------------------------------------------------------------------- tables

def summarise(scores, units, seed):
    """
    {row: {metric: [mean, low, high]}} of {row: (n, 5) scores}: means over the questions with 95%
    intervals, None where there is none; and {metric: share of the resamples without such a question}.
    units: (n,) what the bootstrap draws. "model" and "image shuffled" are joined by a row of their
    difference, question by question.
    """
    rows = dict(scores)
    if {"model", "image shuffled"} <= rows.keys():
        rows["the image adds"] = rows["model"] - rows["image shuffled"]
    cells, lacking = intervals(np.concatenate(list(rows.values()), axis=1), units, seed)
    cells = iter([None if math.isnan(number) else number for number in cell] for cell in cells.tolist())
    table = {row: {metric: next(cells) for metric in METRICS} for row in rows}
    return table, dict(zip(METRICS, lacking.tolist()))


def cell_text(cell):
    """"mean [low high]" of [mean, low, high]; "-" where nothing is known, "mean [- -]" of one image alone."""
    def number(value):
        return "-" if value is None else "100" if value >= 99.95 else f"{value:.1f}"

    return "-" if cell[0] is None else "{} [{} {}]".format(*map(number, cell))


def print_cells(label, cells):
    """One line of a table, each cell a text or [mean, low, high]."""
    texts = [cell if isinstance(cell, str) else cell_text(cell) for cell in cells]
    print(f"{label[:16]:16}" + "".join(f"{text:>17}" for text in texts))


def print_lacking(lacking, unit):
    """Say which intervals rest on part of the resamples alone, for want of such questions."""
    for metric, share in lacking.items():
        if MANY_LACKING < share < 1:
            print(f"{metric}: {share:.0%} of the resamples of {unit} hold no such question; its interval "
                  "rests on the others, and is a rough one")


def report(name, scores, images, types, seen, seed, unit="images", units=None):
    """
    Print a dataset's tables: all questions, those that are new to the run, BLEU-1 by question type.
    Returns the same as a dict.

    scores: {row: (n, 5)}; images: (n,) number of each question's image, -1 for none; seen: for each
    question why it is not new, "" where it is, or as a str why that is not known; units: (n,) what the
    bootstrap draws, if not images, and `unit` its name.
    """
    units = images if units is None else units
    new = np.array([not reason for reason in seen]) if isinstance(seen, list) else None
    tables = {"drawn": unit}
    print(f"\n{name}: {len(images):,} questions about {len(np.unique(images[images >= 0])):,} images; "
          f"percent, with 95% intervals over {unit}")
    for title, chosen in (("all", np.full(len(images), True)), ("new", new)):
        if chosen is None or not chosen.any():
            tables[title] = seen if chosen is None else "every question's words or image were trained on"
            print(f"questions new to the run: {'not known: ' * (chosen is None)}{tables[title]}")
            continue
        part = {row: values[chosen] for row, values in scores.items()}
        closed, opened = (~np.isnan(next(iter(part.values()))[:, 3:])).sum(axis=0).tolist()
        if title == "new":
            print(f"{chosen.sum():,} of them new to the run, in words and image:")
        print_cells("", (*METRICS[:3], f"closed ({closed:,})", f"open ({opened:,})"))
        rows, lacking = summarise(part, units[chosen], seed)
        tables[title] = {"questions": int(chosen.sum()), "closed": closed, "open": opened, "rows": rows,
                         "resamples_without": lacking}
        for row, cells in rows.items():
            print_cells(row, cells.values())
        print_lacking(lacking, unit)
    tables["types"] = report_types(scores, units, types, seed)
    return tables


def report_types(scores, units, types, seed):
    """Print BLEU-1 by question type, where there are several; returns all scores of all types as a dict."""
    tables = {}
    for kind, questions in Counter(types).most_common():
        chosen = np.array([one == kind for one in types])
        part = {row: values[chosen] for row, values in scores.items()}
        rows, lacking = summarise(part, units[chosen], seed)
        tables[kind] = {"questions": questions, "rows": rows, "resamples_without": lacking}
    if len(tables) > 1:
        print_cells("BLEU-1 by type", ("questions", *rows))
        for kind, table in list(tables.items())[:TYPES_SHOWN]:
            print_cells(kind or "none", (f"{table['questions']:,}",
                                         *(cells["BLEU-1"] for cells in table["rows"].values())))
        if (more := len(tables) - TYPES_SHOWN) > 0:
            print(f"and {more} rarer types, in results.json")
    return tables


def report_faults(answers, cut, max_new_tokens):
    """
    Print how many answers of each row end at the limit of --max_new_tokens, are empty, or repeat a word
    or phrase over and over; returns {row: {"cut": ..., "empty": ..., "repeating": ...}}.

    answers: {row: n texts}; cut: {row: n booleans}, for the rows that the model gave.
    """
    counts = {row: {"cut": sum(cut.get(row, ())), "empty": sum(not text for text in texts),
                    "repeating": sum(map(repeats, texts))} for row, texts in answers.items()}
    print_cells("answers", (f"cut at {max_new_tokens} tokens", "empty", "repeating"))
    for row, numbers in counts.items():
        print_cells(row, [f"{number:,}" for number in numbers.values()])
    worst = max((sum(cut[row]) / len(cut[row]) for row in cut), default=0)
    if worst > MANY_CUT:
        print(f"up to {worst:.0%} of a row's answers were cut, and scored as they are; a larger "
              f"--max_new_tokens, such as {4 * max_new_tokens}, lets them end by themselves")
    return counts
