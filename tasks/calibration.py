"""
How far a classifier's probabilities can be trusted: the temperature that makes them fit, the error that is left, which
images are uncertain, and thresholds for a wanted sensitivity or specificity.

All of it is chosen on validation images and measured on test images. n images, m classes: `logits` and `probabilities`
are (n, m) floats, `actual` (n, m) bool, of which a row has one True where an image has one class. `groups` are (n,)
names, such as patients: intervals draw these.
"""

import math

import numpy as np

from tasks.labels import decide
from tasks.stats import resampled_sums

BINS = 15  # as Guo et al. 2017 (arXiv 1706.04599), but of as many images each: theirs are mostly empty of a few hundred
COVERAGE = 0.9  # of images whose true labels are to be among those that conform
COLDEST, HOTTEST = 1 / 20, 20.0  # temperatures that are looked at
FEWEST = 20  # images that may choose one: of fewer it is mostly chance, and true probabilities would be spoilt by it
Z = 1.959963984540054  # of a 95% interval


# ----------------------------------------------------------------------------- one temperature

def probabilities_of(logits, temperature, multi_label):
    """Softmax, or of several labels the sigmoid, of logits over a temperature; None: as they are, 1. float64."""
    logits = np.asarray(logits, np.float64) / (temperature or 1)
    if multi_label:
        return 0.5 * (1 + np.tanh(logits / 2))  # the sigmoid, which cannot overflow
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def surprise(logits, actual, multi_label):
    """(n,) negative log-likelihood of each image's labels, in nats; of several labels their mean."""
    if multi_label:
        return np.logaddexp(0, np.where(actual, -logits, logits)).mean(1)
    return np.logaddexp.reduce(logits, 1) - logits[actual]


def fit_temperature(logits, actual, multi_label):
    """
    The temperature at which the mean surprise is lowest (Guo et al. 2017), one for all labels: it is a number that a
    few dozen images can tell. None where they are fewer than FEWEST, and where all are right: the colder the better
    then, without an end.

    The surprise is convex in 1 / temperature, so that a golden-section search finds its lowest place.
    """
    logits = np.asarray(logits, np.float64)
    if len(actual) < FEWEST or ((logits > 0 if multi_label else decide(logits, None)) == actual).all():
        return None
    low, high, part = math.log(COLDEST), math.log(HOTTEST), (math.sqrt(5) - 1) / 2

    def value(place):
        return surprise(logits / math.exp(place), actual, multi_label).mean()

    while high - low > 1e-6:
        one, other = high - part * (high - low), low + part * (high - low)
        low, high = (low, other) if value(one) < value(other) else (one, high)
    return math.exp((low + high) / 2)


# ----------------------------------------------------------------------------- the error that is left

def pair_up(probabilities, actual, multi_label):
    """
    Confidences and whether each is right, both (n, k): of the predicted class, k = 1; of several labels of each of
    them, k = m, how probable it is and whether it is there.
    """
    if multi_label:
        return probabilities, actual
    best = probabilities.argmax(1)[:, None]
    return np.take_along_axis(probabilities, best, 1), np.take_along_axis(actual, best, 1)


def bins_of(confidences):
    """The bin of each confidence, 0 to BINS - 1, of as many each; the same numbers are in one bin."""
    edges = np.quantile(confidences, np.arange(1, BINS) / BINS)
    return np.searchsorted(edges, confidences, side="right")


def reliability(probabilities, actual, multi_label):
    """[mean confidence, share that is right, count] of each bin that holds any, as lists."""
    confidences, right = pair_up(probabilities, actual, multi_label)
    bins = bins_of(confidences)
    return [[float(confidences[bins == place].mean()), float(right[bins == place].mean()), int((bins == place).sum())]
            for place in range(BINS) if (bins == place).any()]


def error_columns(logits, actual, multi_label):
    """(n, BINS + 3) of each image: gaps of confidence by bin, surprise, Brier score, 1. errors_of reads their sums."""
    probabilities = probabilities_of(logits, None, multi_label)
    confidences, right = pair_up(probabilities, actual, multi_label)
    gaps = np.zeros((len(logits), BINS))
    rows = np.broadcast_to(np.arange(len(logits))[:, None], confidences.shape)
    np.add.at(gaps, (rows, bins_of(confidences)), (confidences - right) / confidences.shape[1])
    squares = (probabilities - actual) ** 2
    brier = squares.mean(1) if multi_label else squares.sum(1)
    return np.column_stack([gaps, surprise(logits, actual, multi_label), brier, np.ones(len(logits))])


def errors_of(sums):
    """(..., 3) expected calibration error, mean surprise and Brier score of (..., BINS + 3) sums of error_columns."""
    ece = np.abs(sums[..., :BINS]).sum(-1)
    return np.stack([ece, sums[..., BINS], sums[..., BINS + 1]], -1) / sums[..., -1:]


def measure_errors(logits, actual, multi_label, groups):
    """
    {"ece", "nll", "brier": {"value", "interval"}} of logits, with 95% intervals by bootstrap, None of one group alone;
    and "ece_by_chance", that of labels drawn from the probabilities themselves: few images have an error although
    every probability is true, and the bootstrap's bounds lie too high by as much.
    """
    logits = np.asarray(logits, np.float64)
    columns = error_columns(logits, actual, multi_label)
    bounds = [None] * 3
    if len(set(groups)) > 1:
        drawn = errors_of(resampled_sums(columns, groups))
        bounds = np.quantile(drawn, [0.025, 0.975], axis=0).T.tolist()
    values = errors_of(columns.sum(0)).tolist()
    confidences, _ = pair_up(probabilities_of(logits, None, multi_label), actual, multi_label)
    return {name: {"value": value, "interval": interval}
            for name, value, interval in zip(("ece", "nll", "brier"), values, bounds)} | {
                "ece_by_chance": chance_error(confidences.ravel())}


def chance_error(confidences, draws=200):
    """The expected calibration error of confidences (n,) that are true, a mean over draws of what is right."""
    generator, bins = np.random.default_rng(0), bins_of(confidences)
    gaps = [np.abs(np.bincount(bins, confidences - (generator.random(len(bins)) < confidences))).sum()
            for _ in range(draws)]
    return float(np.mean(gaps) / len(bins))


def compare_errors(logits, actual, temperature, multi_label, groups):
    """measure_errors of logits as they are, "before", and over the temperature, "after"."""
    return {name: measure_errors(np.asarray(logits, np.float64) / (number or 1), actual, multi_label, groups)
            for name, number in (("before", None), ("after", temperature))}


# ----------------------------------------------------------------------------- which images are uncertain

def quantile_beyond(scores, share):
    """
    The lowest of (n,) scores that a new one of their kind does not exceed with a chance of `share` or more: split
    conformal prediction's (Angelopoulos and Bates, arXiv 2107.07511, section 1). None where they are too few for it.
    """
    rank = math.ceil((len(scores) + 1) * share - 1e-9)
    return float(np.sort(scores)[rank - 1]) if rank <= len(scores) else None


def strangeness(probabilities, actual, multi_label):
    """(n,) 1 - the probability of what is true (LAC: Sadinle et al. 2019); of several labels that of the worst one."""
    if multi_label:
        return (1 - np.where(actual, probabilities, 1 - probabilities)).max(1)
    return 1 - probabilities[actual]


def are_uncertain(probabilities, predicted, threshold, multi_label):
    """
    (n,) bool: whether the labels that conform, whose strangeness is at most the threshold, are others than exactly the
    predicted ones: several classes or none; of several labels one that may as well be there as not, or neither.
    """
    wrong = ((1 - probabilities <= threshold) != predicted).any(1)
    return wrong | ((probabilities <= threshold) == predicted).any(1) if multi_label else wrong


def conform(probabilities, actual, test, multi_label):
    """
    The threshold of strangeness by validation's (n, m) probabilities and labels, and what it is worth on `test`,
    (probabilities, actual, predicted) of other images, as a dict; None in place of what too few images tell.
    """
    threshold = quantile_beyond(strangeness(probabilities, actual, multi_label), COVERAGE)
    facts = {"coverage": COVERAGE, "threshold": threshold, "validation_images": len(actual)}
    if threshold is None:
        return facts
    probabilities, actual, predicted = test
    flagged = are_uncertain(probabilities, predicted, threshold, multi_label)
    right = (predicted == actual).mean(1) if multi_label else (predicted & actual).any(1)

    def accuracy(some):
        return float(right[some].mean()) if some.any() else None

    return facts | {"covered": float((strangeness(probabilities, actual, multi_label) <= threshold).mean()),
                    "flagged": int(flagged.sum()), "accuracy_flagged": accuracy(flagged),
                    "accuracy_others": accuracy(~flagged)}


# ----------------------------------------------------------------------------- operating points

def wilson(hits, count):
    """Wilson's 95% interval of a share, [low, high]."""
    share, square = hits / count, Z * Z / count
    middle = (share + square / 2) / (1 + square)
    half = Z * math.sqrt(share * (1 - share) / count + square / count / 4) / (1 + square)
    return [max(middle - half, 0.0), min(middle + half, 1.0)]


def share_of(hits, groups):
    """
    {"value", "interval", "images", "groups"} of a share of (n,) hits, bool. The interval is Wilson's where no two are
    of one group; else groups are drawn, or, where all hits are alike, which a draw cannot change, counted for n.
    """
    count = len(set(groups))
    if not len(hits):
        return {"value": None, "interval": None, "images": 0, "groups": 0}
    share = float(np.mean(hits))
    if count == len(hits) or share in (0, 1):
        interval = wilson(share * count, count)
    elif count == 1:
        interval = None
    else:
        sums = resampled_sums(np.column_stack([hits, np.ones(len(hits))]), groups)
        interval = np.quantile(sums[:, 0] / sums[:, 1], [0.025, 0.975]).tolist()
    return {"value": share, "interval": interval, "images": len(hits), "groups": count}


def choose_point(scores, actual, of, wanted):
    """
    The threshold of (n,) scores of one class, there or not by (n,) actual, at or above which it is said to be there,
    so that a new image of the class is found ("sensitivity"), or one of another left out ("specificity"), with a
    chance of `wanted` or more. None where too few images could tell it: for 0.95 it takes 19.
    """
    if of == "sensitivity":
        edge = quantile_beyond(-scores[actual], wanted)
        return None if edge is None else -edge
    edge = quantile_beyond(scores[~actual], wanted)
    return None if edge is None else float(np.nextafter(edge, np.inf))


def operate(threshold, scores, actual, groups):
    """Sensitivity and specificity of a threshold on (n,) scores, each as share_of gives it."""
    said, groups = scores >= threshold, np.array(groups)
    return {"sensitivity": share_of(said[actual], groups[actual].tolist()),
            "specificity": share_of(~said[~actual], groups[~actual].tolist())}
