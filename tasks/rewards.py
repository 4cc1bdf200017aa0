"""
Rewards of train_grpo.py: what an answer is worth in training, in [0, 1], by its words or boxes alone.

A reward is a function (record, text, progress): a line of records.jsonl, an answer to its question, and the share
of the training's steps that is done. It is None where the record is none for it. A sampled answer may be any text,
and training finds whatever pays: docs/boxes.md has the answers that cheat, and which reward each of them deceives.
"""

import difflib
import re

import numpy as np

from plumbing.flags import UserError
from tasks import findings
from tasks.boxes import THRESHOLDS, assign, compare, iou, match, pair_up, read
from tasks.choices import read as read_choice, right_of
from tasks.ngrams import lcs_f1
from tasks.reasoning import answer_of
from tasks.vqa import exact_match, references_of, token_f1

HEAVIEST = 1000  # a reward's weight
LONG_TEXT = 8  # words of an answer from which on it is a report
SIDE = 1000  # of an image, in the thousandths that boxes are written in


# ----------------------------------------------------------------------------- boxes

def reward_boxes(record, text, progress):
    """F-IoU: 2 x matched IoU by the number of predicted and true boxes; a box too many costs as one too few."""
    if record.get("boxes") is None:
        return None
    found = read(text)
    return 0.0 if found is None else compare(found, record["boxes"]) / 100


def reward_iou(record, text, progress):
    """
    F1 of the boxes at an IoU threshold that rises with progress: one that is high from the start rewards nothing
    (MedLoc-R1).
    """
    if record.get("boxes") is None:
        return None
    if (found := read(text)) is None:
        return 0.0
    pairs = pair_up(found, record["boxes"]).values()
    threshold = THRESHOLDS[0] + (THRESHOLDS[-1] - THRESHOLDS[0]) * progress
    hits = sum(match((iou(*pair) >= threshold) * 1.0).sum() for pair in pairs)
    boxes = sum(len(side) for pair in pairs for side in pair)
    return float(2 * hits / boxes) if boxes else 1.0


def giou(first, second):
    """Generalised IoU in -1..1 of each pair, (P, G), of boxes (P, 4) and (G, 4) (Rezatofighi et al. 2019, Alg. 1)."""
    first, second = (np.clip(boxes, -1e9, 1e9) for boxes in (first, second))
    around = np.maximum(first[:, None, 2:], second[:, 2:]) - np.minimum(first[:, None, :2], second[:, :2])
    around = around.clip(0).prod(2)  # (P, G)
    one, other = ((boxes[:, 2:] - boxes[:, :2]).clip(0).prod(1) for boxes in (first, second))
    overlap = iou(first, second)
    union = (one[:, None] + other) / (1 + overlap)  # one + other = union + shared, shared = overlap x union
    return overlap - np.where(around > 0, (around - union) / np.where(around > 0, around, 1), 1).clip(0, 1)


def reward_medmo(record, text, progress):
    """
    MedMO's box reward without its optional penalties (arXiv 2602.06965): the mean over the true boxes of
    s = (5 (1 - L1) + 2 (GIoU + 1) / 2) / 7 of the predicted box that each is matched with, at the least cost
    5 L1 + 2 (1 - GIoU). L1 is the sum of the corners' distances by twice the image's diagonal, at most 1.

    Undefined in the paper without a true box: here 1 for an answer without boxes, and 0 for any other. Boxes too
    many cost nothing, so flooding pays; it is here to compare with.
    """
    if record.get("boxes") is None:
        return None
    if (found := read(text)) is None:
        return 0.0
    pairs = pair_up(found, record["boxes"]).values()
    true = sum(len(pair[1]) for pair in pairs)
    if not true:
        return float(not any(len(pair[0]) for pair in pairs))
    quality = 0.0
    for predicted, wanted in pairs:
        distance = np.abs(np.clip(predicted, -1e9, 1e9)[:, None] - wanted).sum(2) / (2 * np.hypot(SIDE, SIDE))  # (P, G)
        overlap = giou(predicted, wanted)
        matched = assign(-5 * distance - 2 * (1 - overlap))
        quality += ((5 * (1 - distance.clip(0, 1)) + overlap + 1) / 7)[matched].sum()
    return float(min(quality / true, 1.0))


# ----------------------------------------------------------------------------- words

def letter_of(text):
    """The letter of "B", "B." or "B. text"; "" of anything else."""
    found = re.match(r"([A-J])(?:\.\s|\.?$)", text.strip())
    return found[1] if found else ""


def reward_letter(record, text, progress):
    """Whether the option is a multiple choice's right one, by its letter or its text, as tasks/choices.py reads it."""
    if record.get("choices"):
        return float(read_choice(record, text) == right_of(record))
    if record.get("boxes") is not None or not re.match(r"[A-J]\. ", record["answer"]):
        return None
    return float(letter_of(text) == letter_of(record["answer"]))


def read_labels(text):
    return {" ".join(label.lower().split()) for label in text.split(",")} - {""}


def reward_labels(record, text, progress):
    """F1 of the sets of labels between the commas, case aside: 2 x labels in both by the sum of their numbers."""
    if record.get("boxes") is not None:
        return None
    given, wanted = read_labels(text), read_labels(record["answer"])
    return 2 * len(given & wanted) / (len(given) + len(wanted)) if given or wanted else 1.0


def best(function, record, text):
    """The best of function(text, reference) over what counts as right; None of a record of boxes."""
    if record.get("boxes") is not None:
        return None
    return max(function(text, reference) for reference in references_of(record))


def reward_exact(record, text, progress):
    """Whether the words are exactly those of the answer, case aside."""
    return best(exact_match, record, text)


def reward_f1(record, text, progress):
    """Token F1: the harmonic mean of recall and precision over words."""
    return best(token_f1, record, text)


def rouge_l(prediction, reference):
    """ROUGE-L in 0..1 (Lin 2004): F1 over the longest common subsequence of what stands between spaces, case aside."""
    return lcs_f1(prediction.lower().split(), reference.lower().split())


def reward_report(record, text, progress):
    """ROUGE-L of a long text, None of an answer with less than 8 words."""
    return best(rouge_l, record, text) if len(record["answer"].split()) >= LONG_TEXT else None


def findings_f1(prediction, reference):
    """F1 of what both say of CheXpert's findings, in 0..1, as findings.compare counts it."""
    counts = findings.compare(prediction, reference)
    return findings.f1(counts["matched"], counts["predicted"], counts["true"])


def reward_findings(record, text, progress):
    """F1 of a report's findings, each with its status and side; None of an answer that is short or has no finding."""
    if len(record["answer"].split()) < LONG_TEXT or not findings.read(record["answer"]):
        return None
    return best(findings_f1, record, text)


REWARDS = {"boxes": reward_boxes, "iou": reward_iou, "medmo": reward_medmo, "letter": reward_letter,
           "labels": reward_labels, "exact": reward_exact, "f1": reward_f1, "report": reward_report,
           "findings": reward_findings}


# ----------------------------------------------------------------------------- together

def parse(text):
    """
    [(name, function, weight), ...] of the flag --reward, such as "boxes:1,letter:0.5"; without a weight it is 1.
    Raises UserError for an unknown name, one given twice, or weights that are not in 0..1000 or are all 0.
    """
    chosen = []
    for part in text.split(","):
        name, colon, weight = part.strip().partition(":")
        if name not in REWARDS:
            near = difflib.get_close_matches(name, REWARDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(REWARDS)}"
            raise UserError(f"--reward: no reward is named {name!r:.60}; {hint}")
        try:
            value = float(weight) if colon else 1.0
        except ValueError:
            value = -1.0
        if not 0 <= value <= HEAVIEST:
            raise UserError(f"--reward: {part.strip()!r:.60}: a weight is from 0 to {HEAVIEST}, as in {name}:1")
        if name in (other for other, _, _ in chosen):
            raise UserError(f"--reward: {name} is given twice; give it once, with one weight")
        chosen.append((name, REWARDS[name], value))
    if not any(weight for _, _, weight in chosen):
        raise UserError("--reward: all weights are 0; give one reward a weight, as in boxes:1")
    return chosen


def reward(chosen, record, text, progress):
    """The weighted mean of those rewards that the record is for, in [0, 1]; None where it is for none of them."""
    text = answer_of(record, text)
    pairs = [(function(record, text, progress), weight) for _, function, weight in chosen if weight]
    pairs = [(value, weight) for value, weight in pairs if value is not None]
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs) if pairs else None


def balance(value, median):
    """
    A reward mapped to [0, 1] so that its task's median becomes 0.5, by two straight lines: where several tasks are
    trained together on raw rewards, the one with the larger differences takes over (MedGRPO).

    >>> [balance(value, 0.8) for value in (0, 0.4, 0.8, 0.9, 1)]
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    if value < median:
        return 0.5 * value / median
    return 0.5 + 0.5 * (value - median) / (1 - median) if median < 1 else 0.5
