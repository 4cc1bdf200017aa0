"""
Boxes as text: how they are asked for, written, read and scored, and what they are worth without an image.

An answer names a label and its boxes, corners in thousandths of the whole image's width and height:
`white cell <box>[[10, 20, 30, 40]]</box>` as MedMO writes it, or Qwen's JSON. Boxes of a question are matched
one to one with the greatest sum of IoU, and every box too many or too few lowers the score: F-IoU is
2 x matched IoU / (predicted + true boxes), the IoU's counterpart of F1. Each score stands beside that of an
answer that looks at no image. docs/boxes.md has the scores; their tables are in tasks/box_tables.py.
"""

import json
import random
import sys
from collections import defaultdict

import numpy as np

from tasks.box_tables import SCORES, SIZES, THRESHOLDS, print_table, tabulate
from tasks.vqa import plain, print_types, question_only, report_new, summary

MAIN = "F-IoU"
RANKED = 100  # boxes of one question and label that AP50 counts, COCO's limit
LONGEST = 65_536  # characters of an answer
CANDIDATES, OTHERS = 256, 64  # training answers among which the medoid is searched, and that each is compared with


# ----------------------------------------------------------------------------- text

def ask(label):
    return f"detect {label}"  # as PaliGemma is asked


def to_units(boxes):
    """
    Boxes (x1, y1, x2, y2) in shares of the image's width and height, as a sorted list of lists of thousandths:
    whole numbers from 0 to 1000, each box at least 1 wide and high.
    """
    def edges(low, high):
        low = min(max(round(1000 * low), 0), 999)
        return low, max(min(round(1000 * high), 1000), low + 1)

    spans = [(*edges(x1, x2), *edges(y1, y2)) for x1, y1, x2, y2 in boxes]
    return sorted([left, top, right, bottom] for left, right, top, bottom in spans)


def write(boxes, form="medmo"):
    """
    {label: boxes in thousandths} as an answer's text; form: "medmo" or "qwen".

    >>> write({"white cell": [[10, 20, 30, 40]], "platelet": []})
    'white cell <box>[[10, 20, 30, 40]]</box> platelet <box>[]</box>'
    """
    if form == "qwen":
        return json.dumps([{"bbox_2d": box, "label": label} for label, some in boxes.items() for box in some],
                          ensure_ascii=False)
    return " ".join(f"{label} <box>{json.dumps(some)}</box>".lstrip() for label, some in boxes.items())


def is_box(value):
    """Whether a value read from JSON is four finite numbers; true and false are none."""
    return isinstance(value, list) and len(value) == 4 and all(
        type(number) in (int, float) and abs(number) <= sys.float_info.max for number in value)


def read(text):
    """
    {label: [[x1, y1, x2, y2], ...]} of an answer in either form, labels as `plain` leaves them and "" where
    there is none, numbers as written; or None where the answer cannot be read.

    Takes any text, in time and memory that grow with its length, of which LONGEST characters are the most.
    Nothing is mended: text behind the last box, a tag left open or a box of three numbers make it unreadable.
    """
    text, boxes = text.strip() if len(text) <= LONGEST else "", defaultdict(list)
    try:
        pairs = list((read_qwen if text.startswith(("[", "```")) else read_medmo)(text))
    except (ValueError, RecursionError):
        return None
    for label, some in pairs:
        if not all(map(is_box, some)):
            return None
        boxes[plain(label)] += some
    return dict(boxes)


def read_medmo(text):
    """The (label, boxes) of MedMO's form, the boxes unchecked. Raises ValueError or RecursionError."""
    label, *parts = text.split("<box>")
    if not parts:
        raise ValueError("no box")
    for part in parts:
        inner, closed, after = part.partition("</box>")
        boxes = json.loads(inner)
        if not closed or "</box>" in label + after or not isinstance(boxes, list):
            raise ValueError("no list between a pair of tags")
        yield label, boxes
        label = after
    if label.strip():
        raise ValueError("text behind the last box")


def read_qwen(text):
    """The (label, boxes) of Qwen's form, the boxes unchecked. Raises ValueError or RecursionError."""
    if text.startswith("```"):
        if len(text) < 6 or not text.endswith("```"):
            raise ValueError("a fence left open")
        text = text[3:-3].removeprefix("json")
    items = json.loads(text)
    if not isinstance(items, list):
        raise ValueError("no list")
    for item in items:
        if not isinstance(item, dict) or not isinstance(item.get("label", ""), str):
            raise ValueError("no box with a label")
        yield item.get("label", ""), [item.get("bbox_2d")]


# ----------------------------------------------------------------------------- geometry

def as_array(boxes):
    return np.array(boxes, np.float64).reshape(-1, 4)


def iou(first, second):
    """
    Intersection over union of each pair, (P, G), of boxes (P, 4) and (G, 4) as corners x1, y1, x2, y2. A box
    without an area, such as an inverted one, has 0 with all.
    """
    first, second = (np.clip(boxes, -1e9, 1e9) for boxes in (first, second))  # so that no area overflows
    low, high = np.maximum(first[:, None, :2], second[:, :2]), np.minimum(first[:, None, 2:], second[:, 2:])
    shared = (high - low).clip(0).prod(2)  # (P, G)
    one, other = ((boxes[:, 2:] - boxes[:, :2]).clip(0).prod(1) for boxes in (first, second))
    union = one[:, None] + other - shared
    return shared / np.where(union > 0, union, 1)


def assign(gains):
    """
    The rows and columns, min(P, G) of each, of the one-to-one assignment with the greatest sum of (P, G) gains.

    Each of the fewer rows in turn takes the shortest augmenting path, with prices on rows and columns
    (Jonker and Volgenant 1987; Crouse 2016): P^2 G steps for P rows and G columns, P <= G.
    """
    gains = np.asarray(gains, np.float64)
    if gains.shape[0] > gains.shape[1]:
        columns, rows = assign(gains.T)
        return rows, columns
    count, width = gains.shape
    row_prices, column_prices, row_of = np.zeros(count), np.zeros(width), np.full(width, -1)
    for start in range(count):
        distances, before = np.full(width, np.inf), np.full(width, -1)
        row, column, base, left, path = start, -1, 0.0, np.full(width, True), []
        while row >= 0:
            reach = base - gains[row] - row_prices[row] - column_prices
            nearer = left & (reach < distances)
            distances[nearer], before[nearer] = reach[nearer], column
            column = np.where(left, distances, np.inf).argmin()
            base, row, left[column] = distances[column], row_of[column], False
            path.append(column)
        passed = np.array(path[:-1], int)
        row_prices[start] += base
        row_prices[row_of[passed]] += base - distances[passed]
        column_prices[passed] -= base - distances[passed]
        while column >= 0:  # each column on the way takes over the row of the one before it
            row_of[column] = start if before[column] < 0 else row_of[before[column]]
            column = before[column]
    columns = np.flatnonzero(row_of >= 0)
    return row_of[columns], columns


def match(gains):
    """The gain of each of G columns, (G,), in the best assignment of (P, G) gains; 0 where it gets no row."""
    rows, columns = assign(gains)
    matched = np.zeros(gains.shape[1])
    matched[columns] = gains[rows, columns]
    return matched


def rank(gains, threshold):
    """
    Whether each of P boxes in written order, (P,), is a hit: it takes the true box with the largest IoU that no
    earlier one took, if that IoU reaches the threshold. As pycocotools does it, of two alike the later one.
    """
    free, hits = gains.copy(), np.full(len(gains), False)
    for number in range(len(free) if free.shape[1] else 0):
        best = free.shape[1] - 1 - free[number, ::-1].argmax()
        if free[number, best] >= threshold:
            hits[number], free[:, best] = True, -1
    return hits


def iou_of_unions(predicted, true):
    """IoU of the areas that (P, 4) and (G, 4) boxes cover together, cut to the image and rounded to its thousandths."""
    if not len(predicted) or not len(true):
        return 0.0
    boxes = np.clip(np.rint(np.vstack([predicted, true])), 0, 1000)
    lines = [np.unique(boxes[:, axis::2]) for axis in (0, 1)]
    cells = [np.searchsorted(edges, boxes[:, axis::2]) for axis, edges in enumerate(lines)]  # two of (P + G, 2)
    covered = np.zeros((2, len(lines[0]), len(lines[1])), bool)
    for number, ((left, right), (top, bottom)) in enumerate(zip(*cells)):
        covered[int(number >= len(predicted)), left:right, top:bottom] = True
    areas = np.outer(*(np.diff(edges, append=edges[-1]) for edges in lines))
    union = areas[covered.any(0)].sum()
    return float(areas[covered.all(0)].sum() / union) if union else 0.0


# ----------------------------------------------------------------------------- score

def f_iou(matched, predicted, true):
    """2 x matched IoU / (predicted + true boxes) in percent; 100 where there are neither."""
    return float(200 * matched / (predicted + true)) if predicted + true else 100.0


def pair_up(found, asked):
    """
    {label: (predicted (P, 4), true (G, 4))} of all labels that were asked for or answered, from two dicts of
    lists of boxes. Boxes without a label are the asked label's where there is one alone.
    """
    found, asked = ({plain(label): boxes for label, boxes in some.items()} for some in (found, asked))
    if "" in found and len(asked) == 1:
        label = next(iter(asked))
        found[label] = found.get(label, []) + found.pop("") if label else found[""]
    return {label: (as_array(found.get(label, ())), as_array(asked.get(label, ()))) for label in {**asked, **found}}


def same(found, asked):
    """Whether what `read` gave are the boxes of a dict of lists of boxes, in their order."""
    return found is not None and all(np.array_equal(*pair) for pair in pair_up(found, asked).values())


def compare(found, asked):
    """F-IoU of two dicts of lists of boxes."""
    pairs = pair_up(found, asked).values()
    matched = sum(match(iou(*pair)).sum() for pair in pairs)
    return f_iou(matched, *(sum(len(pair[side]) for pair in pairs) for side in (0, 1)))


def score(record, prediction):
    """
    What the scores of one answer are made of, as a dict. record: a line of records.jsonl with "boxes".

    "F-IoU" is in percent, 0 where the answer is unreadable; "predicted" and "true" count boxes, those of labels
    that were not asked for among them; "matched" is the sum of matched IoU, and "hits 0.5" the number of pairs
    in the largest matching with that IoU; "small", "medium" and "large" are sums of matched IoU over true boxes of
    that size, "small true" their number; "ranked" is {label: (hits in written order, true boxes)}, for AP50.
    """
    answer = read(prediction)
    pairs = pair_up(answer or {}, record["boxes"])
    gains = {label: iou(*pair) for label, pair in pairs.items()}
    matched = np.concatenate([np.zeros(0), *map(match, gains.values())])  # one of each true box
    predicted = np.vstack([as_array(()), *(pair[0] for pair in pairs.values())])
    true = np.vstack([as_array(()), *(pair[1] for pair in pairs.values())])
    named = sum(len(pair[0]) for label, pair in pairs.items() if label in map(plain, record["boxes"]))
    numbers = {MAIN: 0.0 if answer is None else f_iou(matched.sum(), len(predicted), len(true)),
               "matched": float(matched.sum()), "predicted": len(predicted), "true": len(true),
               "unreadable": answer is None, "any": named > 0, "none": answer is not None and not len(predicted),
               "unions": iou_of_unions(predicted, true),
               "first": float(iou(predicted[:1], true[:1]).sum())}
    for threshold in THRESHOLDS:
        numbers[f"hits {threshold}"] = int(sum(match((each >= threshold) * 1.0).sum() for each in gains.values()))
    size = np.searchsorted(list(SIZES.values())[:-1], (true[:, 2:] - true[:, :2]).prod(1) / 1e4, side="right")
    for number, name in enumerate(SIZES):
        numbers |= {name: float(matched[size == number].sum()), f"{name} true": int((size == number).sum())}
    return numbers | {"ranked": {label: (rank(each[:RANKED], 0.5), each.shape[1]) for label, each in gains.items()}}


# ----------------------------------------------------------------------------- without an image

def blind_rows(train, records):
    """{row of the table: answers that look at no image}; train: (question, answer) pairs, None where not known."""
    return question_only(guess_blindly, train, records)


def medoid(answers, generator):
    """The text among [(text, its boxes)] with the best mean F-IoU to a draw of all of them."""
    candidates = list(dict(generator.sample(answers, min(len(answers), CANDIDATES))).items())
    others = [boxes for _, boxes in generator.sample(answers, min(len(answers), OTHERS))]

    def worth(candidate):
        return sum(compare(candidate[1], other) for other in others)

    return max(candidates, key=worth)[0] if candidates else ""


def guess_blindly(train, questions, seed=0):
    """
    Of each question the medoid of its training answers: the one with the best mean F-IoU to the others. Of a
    question that training did not ask, the medoid of all, its label left out; "" without any training answer.
    Looks at no image: what a score is worth without one. train: (question, answer's text) pairs.
    """
    answers, generator = defaultdict(list), random.Random(seed)
    for question, text in train:
        if (boxes := read(text)) is not None:
            answers[plain(question)].append((text, boxes))
            everything = [box for some in boxes.values() for box in some]
            answers[""].append((write({"": everything}), {"": everything}))
    guesses = {question: medoid(answers[question if question in answers else ""], generator)
               for question in dict.fromkeys(map(plain, questions))}
    return [guesses[plain(question)] for question in questions]


# ----------------------------------------------------------------------------- tables

def report(name, scored, images, records, seen, units, unit="images", seed=0):
    """
    Print a dataset's tables: all questions, those that are new to the run, F-IoU by label. Returns the same as
    a dict.

    scored: {row: what `score` gave, one a question}; images: how many the questions are about; records: n lines of
    records.jsonl; seen: for each question why it is not new, "" where it is, or as a str why that is not known;
    units: (n,) what the bootstrap draws, and `unit` its name.
    """
    print(f"\n{name}: {len(records):,} questions about {images:,} images; percent, with 95% intervals over {unit}")
    tables = {"drawn": unit, "all": tabulate(scored, np.full(len(records), True), units, seed)}
    print_table(tables["all"], unit)
    tables["new"] = report_new(seen, lambda chosen: tabulate(scored, chosen, units, seed),
                               lambda table: print_table(table, unit), "about images that are new to the run")
    labels = np.array([", ".join(record["boxes"]) for record in records])
    tables["types"] = {label: tabulate(scored, labels == label, units, seed)
                       for label in dict.fromkeys(labels.tolist())}
    print_types(dict(sorted(tables["types"].items(), key=lambda pair: -pair[1]["questions"])), MAIN, "label")
    unreadable = tables["all"]["rows"].get("model", {}).get("unreadable", [None])[0]
    tables["summary"] = summary(tables, seen, SCORES[:2], unreadable=unreadable)
    return tables
