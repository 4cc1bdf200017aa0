"""The tables of tasks/boxes.py: scores of all questions together, with 95% intervals by resampling."""

import itertools
import math

import numpy as np

from tasks.stats import draw_counts
from tasks.vqa import print_cells, print_lacking

THRESHOLDS = (0.3, 0.5, 0.75)  # of F1
SIZES = {"small": 1, "medium": 10, "large": 100}  # of a true box: below so many percent of the image; large: any
RECALLS = np.linspace(0, 1, 101)  # at which COCO reads precision


def ratios(one):
    """
    Each score as a (numerator, denominator) of one question, {score: pair}: over several questions it is the sum
    of the first by the sum of the second. All are in percent but the count error, in boxes.
    """
    boxes, empty, there = one["predicted"] + one["true"], one["true"] == 0, one["true"] > 0
    return {"F-IoU": (one["F-IoU"], 1), "mean IoU": (100 * one["matched"], one["true"]),
            **{f"F1 at {cut}": (200 * one[f"hits {cut}"], boxes) for cut in THRESHOLDS},
            "count error": (abs(one["predicted"] - one["true"]), 1), "unreadable": (100 * one["unreadable"], 1),
            "sensitivity": (100 * (one["any"] and there), there),
            "specificity": (100 * (one["none"] and empty), empty),
            "IoU of unions": (100 * one["unions"], there), "IoU of firsts": (100 * one["first"], there),
            **{size: (100 * one[size], one[f"{size} true"]) for size in SIZES}}


SCORES = ("F-IoU", "mean IoU", "F1 at 0.3", "F1 at 0.5", "F1 at 0.75", "AP50")  # of the first table
MORE = ("count error", "unreadable", "sensitivity", "specificity", "IoU of unions", "IoU of firsts")  # of the second


def precision_at_recalls(hits, weights, true):
    """
    COCO's average precision in percent: the mean at 101 recalls of the best precision at that recall or above; nan
    without a true box. hits, weights: (D,) of each box in order, and how often it counts; true: how many there are.
    """
    if not true:
        return math.nan
    found, boxes = np.cumsum(hits * weights), np.cumsum(weights)
    precision = np.maximum.accumulate((found / np.maximum(boxes, 1))[::-1])[::-1]
    place = np.searchsorted(found / true, RECALLS)
    return 100 * np.append(precision, 0)[place].mean()


def rank_labels(some):
    """
    Of each label with true boxes, from what `score` gave of n questions: whether each of its boxes is a hit, and of
    which question it is, (D,) of each in order, and (n,) how many true boxes each question has.
    """
    names = dict.fromkeys(label for one in some for label, (_, true) in one["ranked"].items() if true)
    for label in names:
        ranked = [one["ranked"].get(label, ((), 0)) for one in some]
        yield (np.concatenate([hits for hits, _ in ranked]).astype(float),
               np.repeat(np.arange(len(some)), [len(hits) for hits, _ in ranked]),
               np.array([true for _, true in ranked]))


def average_precision(labels, weights):
    """AP50 in percent, the mean over the labels that occur, or nan. weights: (n,) how often each question counts."""
    each = [precision_at_recalls(hits, weights[question], weights @ true) for hits, question, true in labels]
    each = [value for value in each if not math.isnan(value)]
    return sum(each) / len(each) if each else math.nan


def resample(scored, units, seed):
    """
    Every score of the questions as they are and of each resample of their units, {row: {score: (1 + resamples,)}}.
    Where a resample holds no question for a score, it is nan. units: (n,).
    """
    _, units = np.unique(units, return_inverse=True)
    count, table = units.max() + 1, {}
    for row, some in scored.items():
        pairs, labels = [ratios(one) for one in some], list(rank_labels(some))
        sums = np.zeros((count, len(pairs[0]), 2))  # of each unit, over and below the line
        np.add.at(sums, units, np.array([list(each.values()) for each in pairs], np.float64))
        totals, averages = [], []
        for counts in itertools.chain([np.ones(count, int)], draw_counts(count, seed=seed)):
            totals.append(np.tensordot(counts, sums, 1))
            averages.append(average_precision(labels, counts[units]))
        with np.errstate(invalid="ignore"):
            shares = np.divide(*np.moveaxis(totals, 2, 0))  # (1 + resamples, scores)
        table[row] = dict(zip(pairs[0], shares.T)) | {"AP50": np.array(averages)}
    if {"model", "image shuffled"} <= table.keys():
        table["the image adds"] = {name: values - table["image shuffled"][name]
                                   for name, values in table["model"].items()}
    return table


def cell_of(values, one_unit):
    """[score, low, high] of a score and its resamples, (1 + resamples,); None where there is none."""
    bounds = [math.nan] * 2 if one_unit or np.isnan(values[1:]).all() else np.nanpercentile(values[1:], (2.5, 97.5))
    return [None if math.isnan(number) else float(number) for number in (values[0], *bounds)]


def tabulate(scored, chosen, units, seed):
    """
    The table of the questions `chosen`, (n,) bool, as a dict: how many they are, how many have boxes, how many true
    boxes they have, {row: {score: [value, low, high]}}, and the share of the resamples without a question for it.
    """
    part = {row: [one for one, taken in zip(some, chosen) if taken] for row, some in scored.items()}
    first, units = part[list(part)[0]], units[chosen]
    table, there = resample(part, units, seed), np.array([one["true"] > 0 for one in first])
    alone = {name: len(np.unique(units[of])) < 2 for name, of in (
        ("sensitivity", there), ("specificity", ~there), ("IoU of unions", there), ("IoU of firsts", there),
        *((size, np.array([one[f"{size} true"] > 0 for one in first])) for size in SIZES))}
    return {"questions": len(first), "with boxes": int(there.sum()), "boxes": sum(one["true"] for one in first),
            **{size: sum(one[f"{size} true"] for one in first) for size in SIZES},
            "rows": {row: {name: cell_of(values, alone.get(name, len(set(units.tolist())) < 2))
                           for name, values in scores.items()} for row, scores in table.items()},
            "resamples_without": {name: float(np.isnan(values[1:]).mean())
                                  for name, values in table[list(table)[0]].items()}}


def print_table(table, unit):
    """Print a table in three parts, and which intervals rest on part of the resamples, for want of such questions."""
    some, none = table["with boxes"], table["questions"] - table["with boxes"]
    heads = {"mean IoU": f"IoU ({table['boxes']:,})", "sensitivity": f"a box ({some:,})",
             "specificity": f"no box ({none:,})", **{size: f"{size} ({table[size]:,})" for size in SIZES}}
    for title, names in (("", SCORES), ("", MORE), ("IoU by size", SIZES)):
        print_cells(title, [heads.get(name, name) for name in names])
        for row, cells in table["rows"].items():
            print_cells(row, [cells[name] for name in names])
    print_lacking(table, unit)
