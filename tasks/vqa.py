"""
How answers to questions about images are scored: five metrics, what words alone are worth, the tables.

BLEU-1 is the convention of the PathVQA authors' own code: lower-cased, split at spaces, clipped
unigram precision times the brevity penalty, averaged over questions. Other published scales give
other figures for the same answers, by up to 40 points; extras/look/scales.py has them.
"""

import math
import re
import unicodedata
from collections import Counter, defaultdict

import numpy as np

from tasks.stats import intervals

METRICS = ("BLEU-1", "exact match", "token F1", "closed accuracy", "open recall")
MAIN = "BLEU-1"  # the one that a training watches
ENGLISH = ("yes", "no")
CLOSED = frozenset([*ENGLISH, *"ja nein oui non sí si sì sim não да нет 是 是的 有 否 不是 没有".split()])
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


def bare_word(text):
    """A yes or no as one is compared: case, how accents are encoded, and a point at its end aside."""
    return unicodedata.normalize("NFC", text).lower().strip().rstrip(".!。！")


def is_closed(reference):
    """Whether an answer is a yes or no, in one of the languages of CLOSED."""
    return bare_word(reference) in CLOSED


def closed_match(prediction, reference):
    """
    Whether an answer is the yes or no that is right, 1.0 or 0.0; "ja" is not "yes". A plain English one is compared
    as exact_match does, as published figures are; of others "Ja." is "ja".
    """
    if reference.lower().strip() in ENGLISH:
        return exact_match(prediction, reference)
    return float(bare_word(prediction) == bare_word(reference))


def plain(text):
    """A text as labels and questions are compared: case and the number of spaces aside."""
    return " ".join(text.lower().split())


def references_of(record):
    """Every answer that counts as right."""
    return record.get("references") or [record["answer"]]


def score(record, prediction):
    """
    One answer's METRICS in percent, {metric: score}, the best over all references that count as right;
    closed accuracy of a yes/no question alone and open recall of any other, nan where it has none.
    """
    references = references_of(record)

    def best(function):
        return 100 * max(function(prediction, reference) for reference in references)

    closed = all(map(is_closed, references))
    return {"BLEU-1": best(bleu1), "exact match": best(exact_match), "token F1": best(token_f1),
            "closed accuracy": best(closed_match) if closed else math.nan,
            "open recall": math.nan if closed else best(open_recall)}


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


# ----------------------------------------------------------------------------- records

def turns_of(record):
    """The (question, answer) pairs of a line of records.jsonl: one, or those of a conversation."""
    return [(record["question"], record["answer"]), *map(tuple, record.get("turns", ()))]


def as_asked(record):
    """A line of records.jsonl as it is asked and scored: of a conversation the last turn, behind the "earlier"."""
    if "turns" not in record:
        return record
    *earlier, (question, answer) = turns_of(record)
    rest = {name: value for name, value in record.items() if name not in ("turns", "references")}
    return rest | {"question": question, "answer": answer, "earlier": earlier}


# ----------------------------------------------------------------------------- what words alone are worth

def blind_rows(train, records):
    """{row of the table: answers that look at no image}; train: (question, answer) pairs, None where not known."""
    return question_only(guess_blindly, train, records)


def question_only(guess, train, records):
    """The row of guess(train, questions); none where training is not known."""
    return {} if train is None else {"question only": guess(train, [record["question"] for record in records])}


def guess_blindly(train, questions):
    """
    The most frequent training answer to the same question, else to questions with the same first
    3, 2, 1 words, else to any; "" without any. Looks at no image: what a score is worth without one.
    train: (question, answer) pairs.
    """
    def keys(question):
        words = question.lower().split()
        return [" ".join(words), *(" ".join(words[:n]) + " ..." for n in (3, 2, 1)), ""]

    answers = defaultdict(Counter)
    for question, answer in train:
        for key in keys(question):
            answers[key][answer.lower()] += 1

    def guess(question):
        for key in keys(question):
            if key in answers:
                return answers[key].most_common(1)[0][0]
        return ""

    return [guess(question) for question in questions]


def exchange_images(count, images, related, seed):
    """
    The image to show in place of each of a shard's `count`, (count,): those that are asked about change
    places in a random cycle, the others stay.

    images, related: (n,) each image that is asked about, once or more, and a number that images of one
    sample have in common. As far as no half of all images is related, none takes the place of one that it
    is related to, and those of a sample, such as its frontal and its lateral view, stay in their order.
    """
    images, first = np.unique(images, return_index=True)
    _, block, sizes = np.unique(related[first], return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(images))
    begin = np.full(len(sizes), len(images))  # of each block of related images in that order
    np.minimum.at(begin, block[order], np.arange(len(images)))
    order = np.lexsort((images, begin[block]))
    apart = sizes.max() if 2 * sizes.max() <= len(images) else 1
    shown = np.arange(count)
    shown[images[order]] = images[np.roll(order, apart)]
    return shown


# ----------------------------------------------------------------------------- tables

def add_difference(scores):
    """{row: {metric: (n,) scores}}, joined by what "model" has above "image shuffled", question by question."""
    if not {"model", "image shuffled"} <= scores.keys():
        return scores
    return scores | {"the image adds": {metric: scores["model"][metric] - scores["image shuffled"][metric]
                                        for metric in METRICS}}


def summarise(scores, units, seed):
    """
    {row: {metric: [mean, low, high]}} of {row: {metric: (n,) scores}}: means over the questions with 95%
    intervals, None where there is none; and {metric: share of the resamples without such a question}.
    units: (n,) what the bootstrap draws.
    """
    columns = {(row, metric): values for row, metrics in scores.items() for metric, values in metrics.items()}
    cells, lacking = intervals(np.stack(list(columns.values()), axis=1), units, seed)
    table = {row: {} for row in scores}
    for (row, metric), cell in zip(columns, cells.tolist()):
        table[row][metric] = [None if math.isnan(number) else number for number in cell]
    return table, {metric: share for (_, metric), share in zip(columns, lacking.tolist())}  # alike in all rows


def tabulate(scores, chosen, units, seed):
    """The table of the questions `chosen`, (n,) bool, as a dict: how many they are, and summarise's of them."""
    part = {row: {metric: values[chosen] for metric, values in metrics.items()} for row, metrics in scores.items()}
    rows, lacking = summarise(part, units[chosen], seed)
    metrics = part[list(part)[0]]  # which questions are closed is the same in every row
    return {"questions": int(chosen.sum()), "closed": int((~np.isnan(metrics["closed accuracy"])).sum()),
            "open": int((~np.isnan(metrics["open recall"])).sum()), "rows": rows, "resamples_without": lacking}


def cell_text(cell):
    """"mean [low high]" of [mean, low, high]; "-" where nothing is known, "mean [- -]" of one image alone."""
    def number(value):
        return "-" if value is None else "100" if 99.95 <= value <= 100 else f"{value:.1f}"

    return "-" if cell[0] is None else "{} [{} {}]".format(*map(number, cell))


def print_cells(label, cells):
    """One line of a table, each cell a text or [mean, low, high]."""
    texts = [cell if isinstance(cell, str) else cell_text(cell) for cell in cells]
    print(f"{label[:16]:16}" + "".join(f"{text:>17}" for text in texts))


def print_table(table, unit):
    """Print a table, and which of its intervals rest on part of the resamples, for want of such questions."""
    print_cells("", (*METRICS[:3], f"closed ({table['closed']:,})", f"open ({table['open']:,})"))
    for row, cells in table["rows"].items():
        print_cells(row, [cells[metric] for metric in METRICS])
    print_lacking(table, unit)


def print_lacking(table, unit):
    """Print which of a table's intervals rest on part of the resamples, for want of such questions."""
    for metric, share in table["resamples_without"].items():
        if MANY_LACKING < share < 1:
            print(f"{metric}: {share:.0%} of the resamples of {unit} hold no such question; its interval "
                  "rests on the others, and is a rough one")


def report(name, scored, images, records, seen, units, unit="images", seed=0):
    """
    Print a dataset's tables: all questions, those that are new to the run, BLEU-1 by question type.
    Returns the same as a dict.

    scored: {row: [what score gave, of n questions]}; images: how many they are about; records: n lines; seen: for each
    question why it is not new, "" where it is, or as a str why that is not known; units: (n,) what the
    bootstrap draws, and `unit` its name.
    """
    scores = add_difference({row: {metric: np.array([each[metric] for each in some]) for metric in METRICS}
                             for row, some in scored.items()})
    types = [record["type"] for record in records]
    print(f"\n{name}: {len(types):,} questions about {images:,} images; percent, with 95% intervals over {unit}")
    tables = {"drawn": unit, "all": tabulate(scores, np.full(len(types), True), units, seed)}
    print_table(tables["all"], unit)
    tables["new"] = report_new(seen, lambda chosen: tabulate(scores, chosen, units, seed),
                               lambda table: print_table(table, unit))
    tables["types"] = report_types(records, lambda chosen: tabulate(scores, chosen, units, seed), MAIN)
    tables["summary"] = summary(tables, seen, METRICS[:2])
    return tables


def report_new(seen, tabulate, show, what="new to the run, in words and image"):
    """
    Print the table of the questions that are new to the run, by show(table), and return it; or else why there is
    none. tabulate: (n,) bool, which questions are chosen -> their table; seen: as in report.
    """
    if isinstance(seen, str):
        print(f"questions new to the run: not known: {seen}")
        return seen
    if all(seen):
        print("questions new to the run: every question's words or image were trained on")
        return "every question's words or image were trained on"
    table = tabulate(np.array([not reason for reason in seen]))
    if not any(seen):
        print(f"all of them {what}")
        return table
    print(f"{table['questions']:,} of them {what}:")
    show(table)
    return table


def summary(tables, seen, metrics, blind="question only", added="the image adds", unreadable=None):
    """
    What a report's tables give to the one table of all evaluations (tasks/summary.py), as a dict: of each of the
    metrics the model's score, that of the blind row, what the image adds, and the percentage of unreadable answers.
    """
    rows, none = tables["all"]["rows"], [None] * 3

    def cell(row, metric):
        return rows.get(row, {}).get(metric, none)

    return {"n": tables["all"]["questions"], "unit": tables["drawn"],
            "leaks": None if isinstance(seen, str) else sum(map(bool, seen)),
            "lines": [{"metric": metric, "score": cell("model", metric),
                       "blind": [blind, cell(blind, metric)] if blind in rows else None,
                       "adds": cell(added, metric) if added in rows else None,
                       "unreadable": unreadable} for metric in metrics]}


def report_types(records, tabulate, metric):
    """
    Print one metric by question type, where there are several; returns the tables of all types as a dict. tabulate:
    (n,) bool, which questions are chosen -> their table.
    """
    types = np.array([record["type"] for record in records])
    tables = {kind: tabulate(types == kind) for kind, _ in Counter(types.tolist()).most_common()}
    print_types(tables, metric)
    return tables


def print_types(tables, metric, what="type"):
    """Print one metric by type, or by what else, where there are several. tables: {type: table}, the frequent first."""
    if len(tables) > 1:
        rows = next(iter(tables.values()))["rows"]
        print_cells(f"{metric} by {what}", ("questions", *rows))
        for kind, table in list(tables.items())[:TYPES_SHOWN]:
            cells = [row[metric] for row in table["rows"].values()]
            print_cells(kind or "none", (f"{table['questions']:,}", *cells))
        if (more := len(tables) - TYPES_SHOWN) > 0:
            print(f"and {more} rarer {what}s, in results.json")


def report_faults(answers, cut, max_new_tokens):
    """
    Print how many answers of each row end at the limit of --max_new_tokens, are empty, or repeat a word
    or phrase over and over; returns {row: {"cut": ..., "empty": ..., "repeating": ...}}.

    answers: {row: n texts}; cut: {row: n booleans}, for the rows that the model gave; None where that is not known.
    """
    counts = {row: {"cut": None if cut is None else sum(cut.get(row, ())), "empty": sum(not text for text in texts),
                    "repeating": sum(map(repeats, texts))} for row, texts in answers.items()}
    print_cells("answers", (f"cut at {max_new_tokens} tokens", "empty", "repeating"))
    for row, numbers in counts.items():
        print_cells(row, ["-" if number is None else f"{number:,}" for number in numbers.values()])
    worst = max((sum(some) / len(some) for some in (cut or {}).values()), default=0)
    if worst > MANY_CUT:
        print(f"up to {worst:.0%} of a row's answers were cut, and scored as they are; a larger "
              f"--max_new_tokens, such as {4 * max_new_tokens}, lets them end by themselves")
    return counts
