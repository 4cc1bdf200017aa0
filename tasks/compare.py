"""
Two sets of answers to the same questions: is one better, or is that chance?

Every question is answered twice, so it is differences of a question's two scores that count. Their interval draws
patients or images, and their p flips the signs of whole ones, as what is asked about one of them is right or wrong
together. McNemar's test of right and wrong stands beside it, as most papers print it; it takes every question for
independent of the others. Of several datasets each p stands corrected for their number, too (Holm 1979).
"""

import json

import numpy as np

from plumbing.flags import UserError
from tasks.evaluations import choose_evaluations, file_of, read_predictions
from tasks.labels import sign_flip
from tasks.stats import intervals
from tasks.summary import line_up
from tasks.vqa import cell_text

HEADS = ("dataset", "metric", "questions", "units", "A", "B", "A - B", "p", "p, Holm", "only A", "only B", "McNemar")
EXACT = 16  # differences up to which all signs are tried
DRAWS, BLOCK = 10_000, 1 << 22  # beyond: draws of signs, and numbers of them that are in memory at once


# ----------------------------------------------------------------------------- the same questions

def read_answers(place):
    """{"dataset/split": lines of the model's answers} of a run, or one evaluation's folder, the newest of each."""
    return {name: [json.loads(line) for line in read_predictions(folder / file_of("model")).splitlines()]
            for name, (folder, _) in choose_evaluations(place).items()}


def key_of(line):
    return line["dataset"], line["id"], line["question"]


def match_lines(first, second, where):
    """
    The second's lines in the order of the first's, each a list of dicts with dataset, id and question. Raises
    UserError, which begins with `where`, unless both answer the same questions, each once.
    """
    ours, theirs = ({key_of(line): line for line in lines} for lines in (first, second))
    for lines, some in ((first, ours), (second, theirs)):
        if len(lines) > len(some):
            raise UserError(f"{where}: {len(lines) - len(some):,} questions are answered twice; keep one answer each")
    odd = [f"{len(keys):,} {what} (id {', '.join(repr(key[1]) for key in keys[:3])})" for what, keys in (
        ("are not in it", [key for key in ours if key not in theirs]),
        ("are in it alone", [key for key in theirs if key not in ours])) if keys]
    if odd:
        raise UserError(f"{where}: answers to other questions: {' and '.join(odd)}; compare evaluations of the same "
                        "data, with the same --limit")
    return [theirs[key] for key in ours]


# ----------------------------------------------------------------------------- is it chance?

def flip_signs(differences, seed=0):
    """
    How often a sum of (n,) differences would be as far from 0, had each either sign with the same chance: a two-sided
    p, exact up to EXACT that are not 0, else of DRAWS, of which what was measured is one more (Phipson and Smyth 2010).
    Differences of one size are drawn together: how many of them are positive is binomial.
    """
    differences = np.asarray(differences, np.float64)
    differences = differences[differences != 0]
    differences /= max(np.abs(differences).sum(), 1e-300)  # so that rounding is of one size
    if len(differences) <= EXACT:
        return sign_flip(differences)
    sizes, counts = np.unique(np.abs(differences), return_counts=True)
    generator, rows, far = np.random.default_rng(seed), max(1, BLOCK // len(sizes)), 0
    least = abs(differences.sum()) - 1e-9  # in another order the same numbers' sum is rounded otherwise
    for begin in range(0, DRAWS, rows):
        positive = generator.binomial(counts, 0.5, (min(rows, DRAWS - begin), len(sizes)))
        far += int((np.abs((2 * positive - counts) @ sizes) >= least).sum())
    return (1 + far) / (1 + DRAWS)


def mcnemar(first_alone, second_alone):
    """
    McNemar's exact two-sided p: of the questions that one alone has right, each is either's with the same chance.

    >>> mcnemar(1, 5)  # 2 x (1 + 6) / 2 ** 6
    0.21875
    """
    count, fewer = first_alone + second_alone, min(first_alone, second_alone)
    term = total = 1
    for k in range(fewer):
        term = term * (count - k) // (k + 1)
        total += term
    return min(1.0, 2 * total / 2 ** count)


def holm(values):
    """Holm's corrected p of each of several."""
    values, corrected = np.asarray(values, np.float64), np.zeros(len(values))
    order = np.argsort(values, kind="stable")
    corrected[order] = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    return np.minimum(corrected, 1).tolist()


def compare(first, second, units, unit="images", seed=0):
    """
    How the first's scores differ from the second's, as a dict: "questions", "unit", the means "first" and "second",
    "difference" [mean, low, high], "p", and of scores that are right or wrong "alone", [how many the first alone has
    right, the second], and "mcnemar", its p; None of others.

    first, second: (n,) a question's MAIN scores; units: (n,) what the bootstrap draws, and `unit` its name.
    """
    first, second = (np.asarray(scores, np.float64) for scores in (first, second))
    assert first.shape == second.shape == np.shape(units) and np.isfinite(first).all() and np.isfinite(second).all()
    difference = first - second
    cell = intervals(difference[:, None], units, seed)[0][0]
    sums = np.bincount(np.unique(units, return_inverse=True)[1], difference)
    alone = None
    if {*np.unique(first), *np.unique(second)} in ({0, 100}, {0, 1}, {0}, {100}):
        alone = [int((difference > 0).sum()), int((difference < 0).sum())]
    return {"questions": len(first), "unit": unit, "first": float(first.mean()), "second": float(second.mean()),
            "difference": [None if np.isnan(number) else float(number) for number in cell],
            "p": flip_signs(sums, seed) if len(sums) > 1 else None, "alone": alone,
            "mcnemar": mcnemar(*alone) if alone else None}


def p_text(p):
    return "-" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def print_comparison(names, comparisons, metrics):
    """
    Print what compare gave of each dataset.

    names: of the two, a run's or a file's each; comparisons: {dataset: what compare gave}; metrics: {dataset: the
    name of its score}.
    """
    known = [dataset for dataset, one in comparisons.items() if one["p"] is not None]
    corrected = dict(zip(known, holm([comparisons[dataset]["p"] for dataset in known])))
    rows = []
    for dataset, one in comparisons.items():
        alone = [f"{count:,}" for count in one["alone"]] if one["alone"] else ["-", "-"]
        rows.append([dataset, metrics[dataset], f"{one['questions']:,}", one["unit"], f"{one['first']:.1f}",
                     f"{one['second']:.1f}", cell_text(one["difference"]), p_text(one["p"]),
                     p_text(corrected.get(dataset)), *alone, p_text(one["mcnemar"])])
    print(f"\nA: {names[0]}\nB: {names[1]}")
    print("\n".join(line_up(HEADS, rows)))
    print("A - B: mean [low high], 95% interval by resampling whole units with both answers; p: their signs flipped; "
          f"Holm: corrected for {len(known)} dataset(s);\nonly A, only B: questions that one alone has right; "
          "McNemar: exact, takes every question for independent of the others")
