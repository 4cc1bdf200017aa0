"""
How good predicted classes are: F1, AUROC and the rest of train_cls.py's numbers, and how sure they are.

`actual` and `predicted` are (n, m) bool: n images, m classes. Where each image has one class, a row of
either has one True.
"""

import itertools
import math

import numpy as np

from tasks.stats import resampled_sums


def tally(predicted, actual):
    """(n, 3m) 0 or 1: is each class predicted and there, predicted, there. F1 is made of the sums of these."""
    return np.hstack([predicted & actual, predicted, actual]).astype(np.float64)


def f1_of(sums):
    """(..., m) F1 of each class and whether it occurs, else F1 is 0, of (..., 3m) sums of a tally."""
    both, predicted, actual = np.split(sums, 3, axis=-1)
    either = predicted + actual  # 2 tp + fp + fn
    return 2 * both / np.maximum(either, 1), either > 0


def macro_f1(predicted, actual, multi_label):
    """
    Mean of the classes' F1.

    Where an image has one class, over those that occur in the labels or predictions, which is
    scikit-learn's average="macro". Where it has several labels, each label counts as two classes,
    having it and not having it: with one label this is the macro-F1 of a task with two classes.
    """
    return float(macro_f1_of(tally_all(predicted, actual, multi_label).sum(0), multi_label))


def tally_all(predicted, actual, multi_label):
    """The tally for macro-F1, (n, 3m); with several labels that of not having them stands behind it, (n, 6m)."""
    return np.hstack([tally(predicted, actual), *([tally(~predicted, ~actual)] if multi_label else [])])


def macro_f1_of(sums, multi_label):
    """(...) macro-F1 of sums of a tally_all."""
    if multi_label:
        having, lacking = (f1_of(part)[0] for part in np.split(sums, 2, axis=-1))
        return (having + lacking).mean(-1) / 2
    f1, occurs = f1_of(sums)
    return (f1 * occurs).sum(-1) / np.maximum(occurs.sum(-1), 1)  # a resample may have none


def positive_f1(predicted, actual):
    """The other macro-F1 of several labels: the mean over labels of the F1 of having it."""
    return float(f1_of(tally(predicted, actual).sum(0))[0].mean())


def auroc(scores, actual):
    """Area under the ROC curve of (n,) scores, how often a positive is above a negative; or NaN."""
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # from 1; the same scores share the mean
    positives, negatives = actual.sum(), (~actual).sum()
    if not positives or not negatives:
        return math.nan
    return float((ranks[actual].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def tune_thresholds(probabilities, actual):
    """(m,) the threshold of each label at which its F1 is best; 0.5 for one that never occurs."""
    thresholds = np.full(actual.shape[1], 0.5)
    for label in np.flatnonzero(actual.any(0)):
        order = np.argsort(-probabilities[:, label], kind="stable")
        sorted_probabilities = probabilities[order, label]
        taken = np.arange(1, len(order) + 1)
        f1 = 2 * np.cumsum(actual[order, label]) / (taken + actual[:, label].sum())
        lower = np.append(sorted_probabilities[1:], -1e-9)  # one may be 0
        best = np.argmax(np.where(sorted_probabilities > lower, f1, -1))  # not between the same two
        thresholds[label] = (sorted_probabilities[best] + lower[best]) / 2
    return thresholds


def decide(probabilities, thresholds):
    """(n, m) bool: the most probable class, or every label that reaches its threshold, if there are any."""
    if thresholds is not None:
        return probabilities >= thresholds
    return np.arange(probabilities.shape[1]) == probabilities.argmax(1)[:, None]


def guess_blindly(learnt, count, multi_label):
    """
    (count, m) bool: what one says who has seen the training labels alone, (n, m), and no image: the most
    frequent class; with several labels those that more than half of the images have.
    """
    guess = learnt.mean(0) > 0.5 if multi_label else np.arange(learnt.shape[1]) == learnt.sum(0).argmax()
    return np.broadcast_to(guess, (count, len(guess)))


def interval_of(predicted, actual, multi_label, groups):
    """The macro-F1's 95% interval by bootstrap, [low, high]; None where there is one group alone."""
    if len(set(groups)) < 2:
        return None
    sums = resampled_sums(tally_all(predicted, actual, multi_label), groups)
    return np.quantile(macro_f1_of(sums, multi_label), [0.025, 0.975]).tolist()


def score(probabilities, actual, thresholds, classes, groups=None):
    """
    All metrics of a split as a dict.

    thresholds: (m,), tuned elsewhere; None: an image has one class. groups: (n,) names, such as each
    image's patient; None: every image is one of its own.
    """
    multi_label, n = thresholds is not None, len(actual)
    groups = list(range(n)) if groups is None else groups
    predicted = decide(probabilities, thresholds)
    f1, _ = f1_of(tally(predicted, actual).sum(0))
    recall = (predicted & actual).sum(0) / np.maximum(actual.sum(0), 1)
    areas = [auroc(column, truth) for column, truth in zip(probabilities.T, actual.T)]
    if multi_label:
        without = (~predicted & ~actual).sum(0) / np.maximum((~actual).sum(0), 1)
        balanced = (recall + without).mean() / 2
    else:
        balanced = recall[actual.any(0)].mean()
    scores = {"macro_f1": macro_f1(predicted, actual, multi_label),
              "interval": interval_of(predicted, actual, multi_label, groups),
              "groups": len(set(groups)),  # what the interval's draws are of
              "accuracy": float((predicted == actual).mean() if multi_label else
                                (predicted & actual).any(1).mean()),
              "balanced_accuracy": float(balanced),
              "auroc": float(np.nanmean(areas)) if not np.isnan(areas).all() else None,
              "images": n,
              "classes": {name: {"f1": float(f1[k]), "recall": float(recall[k]),
                                 "auroc": None if math.isnan(areas[k]) else areas[k],  # NaN is no JSON
                                 "images": int(actual[:, k].sum())} for k, name in enumerate(classes)}}
    if multi_label:
        plain = decide(probabilities, 0.5)
        scores |= {"macro_f1_at_0.5": macro_f1(plain, actual, True),
                   "positive_f1": positive_f1(predicted, actual),
                   "positive_f1_at_0.5": positive_f1(plain, actual),
                   "thresholds": thresholds.tolist()}
    else:  # rows: labels, columns: predictions
        scores["confusion"] = (actual.T.astype(int) @ predicted.astype(int)).tolist()
    return scores


# ----------------------------------------------------------------------------- two systems

def sign_flip(differences):
    """
    How often paired differences would have a mean as far from 0 if each had either sign with the
    same chance: a two-sided p, exact up to 16 of them, else by 100,000 draws.
    """
    differences, count = np.array(differences), len(differences)
    signs = (np.array(list(itertools.product((1, -1), repeat=count))) if count <= 16 else
             np.random.default_rng(0).choice((1, -1), (100_000, count)))
    signs[0] = 1  # what was measured is one of the draws
    return float((np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12).mean())
