"""Boxes as text, and their scores beside a second statement of each, SciPy and pycocotools."""

import contextlib
import io
import itertools
import json
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from extras.look import blind_boxes
from tasks import boxes
from tasks.boxes import assign, guess_blindly, iou, iou_of_unions, read, report, score, to_units, write
from tasks.box_tables import average_precision, rank_labels, resample, tabulate

ROOT = Path(__file__).resolve().parent.parent
RAW = Path(os.environ.get("NANOMEDQ_RAW", ROOT / "raw"))
LABELS = ("white cell", "red cell", "platelet")


def draw_boxes(generator, most=4, step=40):
    """Up to `most` boxes in thousandths on a grid, as lists."""
    lows = generator.integers(0, 1000 // step - 2, (generator.integers(0, most + 1), 2))
    sizes = generator.integers(1, 1000 // step // 2, lows.shape)
    return (step * np.hstack([lows, np.minimum(lows + sizes, 1000 // step)])).tolist()


def near(generator, some):
    """A guess at these boxes: some moved, left out, twice, or made up, in any order."""
    moved = [np.array(box) + 40 * generator.integers(-1, 2, 4) * (generator.random() < 0.6) for box in some
             if generator.random() < 0.8]
    moved = [box.tolist() for box in moved] + draw_boxes(generator, 1) + some[:1] * (generator.random() < 0.2)
    return [moved[place] for place in generator.permutation(len(moved))]


def draw_answers(count, seed=0, most=4, labels_asked=1):
    """(records, texts) of `count` questions, the answers near, empty, unreadable or of other labels, too."""
    generator, records, texts = np.random.default_rng(seed), [], []
    for number in range(count):
        asked = [LABELS[(number + more) % 3] for more in range(labels_asked)]
        truth = {label: sorted(draw_boxes(generator, most)) for label in asked}
        answer = {label: near(generator, some) for label, some in truth.items()}
        if generator.random() < 0.1:
            answer[LABELS[generator.integers(3)]] = draw_boxes(generator, 2)
        text = write(answer, "qwen" if generator.random() < 0.3 else "medmo")
        records.append({"question": "?", "answer": write(truth), "type": asked[0], "boxes": truth})
        texts.append(text + " so" if generator.random() < 0.05 else text)
    return records, texts


# ----------------------------------------------------------------------------- text

def test_an_answer_in_either_form():
    assert boxes.ask("white cell") == "detect white cell"
    answer = {"white cell": [[10, 20, 30, 40], [50, 60, 70, 80]], "platelet": []}
    medmo = "white cell <box>[[10, 20, 30, 40], [50, 60, 70, 80]]</box> platelet <box>[]</box>"
    assert write(answer) == medmo and read(medmo) == answer
    qwen = write(answer, "qwen")
    assert json.loads(qwen) == [{"bbox_2d": box, "label": "white cell"} for box in answer["white cell"]]
    assert qwen.startswith('[{"bbox_2d": [10, 20, 30, 40], "label": "white cell"}, ')
    for text in (qwen, f"```json\n{qwen}\n```", f"```{qwen}```", f"  {qwen}\n"):
        assert read(text) == {"white cell": answer["white cell"]}
    assert write({"a": []}, "qwen") == "[]" and read("[]") == {} and read("<box>[]</box>") == {"": []}
    assert read('[{"bbox_2d": [1, 2, 3, 4]}]') == read("<box>[[1, 2, 3, 4]]</box>") == {"": [[1, 2, 3, 4]]}
    assert read("A  B\n<box>[[1,2,3,4]]</box> a b<box>[[5.5,-6,7,8e1]]</box>") == {
        "a b": [[1, 2, 3, 4], [5.5, -6, 7, 80]]}


def test_what_is_written_is_read():
    generator = np.random.default_rng(0)
    for _ in range(300):
        answer = {label: draw_boxes(generator, 6) for label in LABELS[:generator.integers(1, 4)]}
        assert read(write(answer)) == answer
        assert read(write(answer, "qwen")) == {label: some for label, some in answer.items() if some}


def test_shares_become_thousandths():
    assert to_units([(0.5, 0.25, 0.75, 1), (0, 0, 0.0001, 0.2504)]) == [[0, 0, 1, 250], [500, 250, 750, 1000]]
    assert to_units([(1, 1, 1, 1), (-0.1, 0.3, 1.2, 0.3)]) == [[0, 300, 1000, 301], [999, 999, 1000, 1000]]
    assert to_units([]) == [] and all(type(edge) is int for edge in to_units([np.array([0.1, 0.2, 0.3, 0.4])])[0])


UNREADABLE = [
    "", "   ", "white cell", "no boxes", "[[1, 2, 3, 4]]", "white cell <box>", "white cell <box>[[1, 2, 3, 4]]",
    "<box>[[1, 2, 3, 4]]</box> and that is all", "<box>[[1, 2, 3]]</box>", "<box>[[1, 2, 3, 4, 5]]</box>",
    "<box>[1, 2, 3, 4]</box>", "<box>[[1, 2, 3, true]]</box>", "<box>[[1, 2, 3, null]]</box>", "<box></box>",
    "<box>[[1, 2, 3, NaN]]</box>", "<box>[[1, 2, 3, Infinity]]</box>", "<box>[[-Infinity, 2, 3, 4]]</box>",
    "<box>[[1, 2, 3, 1e999]]</box>", f"<box>[[1, 2, 3, {'9' * 5000}]]</box>", f"<box>[[1, 2, 3, {'9' * 4000}]]</box>",
    '<box>[[1, 2, 3, "4"]]</box>', "<box>[[1, 2, 3, ٤]]</box>", "<box>[[1, 2, 3, 4],]</box>", "<box>null</box>",
    "<box>{}</box>", "<box>7</box>", "<box>[[1 2 3 4]]</box>", "</box>[[1, 2, 3, 4]]<box>", "<box>[]</box></box>",
    "<box><box>[[1, 2, 3, 4]]</box></box>", "a</box> <box>[]</box>", "<box>[[1, 2, 3, [4]]]</box>",
    "[" * 60_000, "<box>" + "[" * 60_000, "<box>" + "[" * 30_000 + "]" * 30_000 + "</box>", "{" * 60_000,
    "<box>" * 13_000, "<box>[" + " " * 65_000 + "</box>", "```" + " " * 65_000, "```json\n[]", "``````", "`````",
    "[1]", "[null]", '{"bbox_2d": [1, 2, 3, 4], "label": "a"}', '[{"bbox_2d": [1, 2, 3], "label": "a"}]',
    '[{"label": "a"}]', '[{"bbox_2d": [1, 2, 3, 4], "label": 7}]', '[{"bbox_2d": [[1, 2, 3, 4]], "label": "a"}]',
    '[{"bbox_2d": [1, 2, 3, 4], "label": "a"}', '[] so', '[{"bbox_2d": [1, 2, 3, 4], "label": "a"}] <box>[]</box>',
    "a <box>[]</box>" + " " * 65_536 + "b <box>[]</box>", "\x00", "\ud800", "٣" * 1000]


@pytest.mark.parametrize("text", UNREADABLE, ids=lambda text: f"{text[:30]!r}")
def test_what_cannot_be_read_is_no_answer(text):
    assert read(text) is None
    assert score({"boxes": {"a": []}}, text)["F-IoU"] == score({"boxes": {"a": [[1, 2, 3, 4]]}}, text)["F-IoU"] == 0


def test_what_can_be_read_at_the_edge():
    assert read("a <box>[]</box>" + " " * 60_000) == {"a": []}
    assert read("\ud800 ٤ <box>[[1, 2, 3, 4]]</box>") == {"\ud800 ٤": [[1, 2, 3, 4]]}
    many = ", ".join(["[1, 2, 3, 4]"] * 4000)
    assert len(read(f"<box>[{many}]</box>")[""]) == 4000
    assert read("<box>[[1e308, -1e308, 3, 4]]</box>") == {"": [[1e308, -1e308, 3, 4]]}
    assert read("a" * 65_526 + "<box>[]</box>") is None and read("a" * 65_520 + "<box>[]</box>") is not None


def mutate(rng, text):
    """A text with a few characters or slices of it gone, twice, exchanged or replaced."""
    pieces = ("[", "]", "<box>", "</box>", ",", "-", "NaN", "1e999", "null", "```", '"', "{", "}", "\ud800", "٤", " ")
    for _ in range(rng.randint(1, 4)):
        first, last = sorted(rng.choices(range(len(text) + 1), k=2))
        last = last if rng.random() < 0.3 else min(first + rng.randint(0, 3), len(text))
        middle = rng.choice(("", text[first:last] * 2, text[first:last][::-1], rng.choice(pieces)))
        text = text[:first] + middle + text[last:]
    return text


def test_the_reader_takes_any_text():
    rng, readable = random.Random(0), 0
    records, texts = draw_answers(200, labels_asked=2)
    for number in range(5000):
        record, text = records[number % 200], mutate(rng, texts[number % 200])
        answer = read(text)
        readable += answer is not None
        found = [box for some in (answer or {}).values() for box in some]
        assert all(len(box) == 4 and all(map(math.isfinite, box)) for box in found)
        if number % 5 == 0:
            assert 0 <= score(record, text)["F-IoU"] <= 100
    assert 500 < readable < 4500


# ----------------------------------------------------------------------------- assignment

def test_the_assignment_is_that_of_trying_all():
    """10,000 random cases: many ties and zeros, negative gains, no rows or no columns."""
    generator, orders = np.random.default_rng(0), {}
    for number in range(10_000):
        few, many = sorted(map(int, generator.integers(0, 6 if number % 4 == 0 else 5, 2)))
        gains = (generator.normal(size=(few, many)), generator.integers(0, 3, (few, many)) / 2,
                 generator.random((few, many)) * (generator.random((few, many)) < 0.4))[number % 3]
        if (few, many) not in orders:
            every = list(itertools.permutations(range(many), few))
            orders[few, many] = np.array(every, int).reshape(len(every), few)
        best = gains[np.arange(few), orders[few, many]].sum(1).max()
        for turned in (gains, gains.T):
            rows, columns = assign(turned)
            assert len(set(rows)) == len(set(columns)) == len(rows) == len(columns) == few
            assert turned[rows, columns].sum() == pytest.approx(best, abs=1e-12)


def test_the_assignment_is_scipys():
    generator = np.random.default_rng(1)
    shapes = [tuple(generator.integers(1, 60, 2)) for _ in range(150)] + [(6000, 36), (36, 6000), (150, 150)]
    for number, shape in enumerate(shapes):
        gains = generator.random(shape) if number % 2 else generator.integers(0, 4, shape) / 3
        if number % 3 == 0:  # all want the same columns
            gains = gains + generator.random(shape[1])
        there = linear_sum_assignment(gains, maximize=True)
        assert gains[assign(gains)].sum() == pytest.approx(gains[there].sum(), abs=1e-9)


# ----------------------------------------------------------------------------- a second statement of each score

def slow_iou(first, second):
    if min(first[2] - first[0], first[3] - first[1], second[2] - second[0], second[3] - second[1]) <= 0:
        return 0.0
    wide = max(0, min(first[2], second[2]) - max(first[0], second[0]))
    high = max(0, min(first[3], second[3]) - max(first[1], second[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return wide * high / (sum(areas) - wide * high)


def slow_matching(predicted, true, worth):
    """The matching's pairs (predicted, true) with the most worth, by trying all."""
    best, found = -1, []
    for order in itertools.permutations([*range(len(predicted)), *[None] * len(true)], len(true)):
        pairs = [(predicted[place], box) for place, box in zip(order, true) if place is not None]
        if (total := sum(worth(*pair) for pair in pairs)) > best:
            best, found = total, pairs
    return best, found


def cells_under(some):
    return {(x, y) for left, top, right, bottom in some for x in range(max(left, 0) // 40, min(right, 1000) // 40)
            for y in range(max(top, 0) // 40, min(bottom, 1000) // 40)}


def slow_scores(records, texts):
    """{score: value} of all questions together, in loops; one label is asked of each."""
    f_iou, matched, true, predicted, hits, small = [], 0, 0, 0, {0.3: 0, 0.5: 0, 0.75: 0}, {}
    errors, unreadable, there, empty, unions, firsts = [], 0, [], [], [], []
    for record, text in zip(records, texts):
        (label, wanted), = record["boxes"].items()
        answer = read(text)
        named = [] if answer is None else answer.get(label, []) + answer.get("", [])
        other = sum(len(some) for name, some in (answer or {}).items() if name not in (label, ""))
        best, pairs = slow_matching(named, wanted, slow_iou)
        count = len(named) + other + len(wanted)
        f_iou.append(0 if answer is None else 100 if not count else 200 * best / count)
        matched, true, predicted = matched + best, true + len(wanted), predicted + len(named) + other
        for cut in hits:
            hits[cut] += slow_matching(named, wanted, lambda *pair: int(slow_iou(*pair) >= cut))[0]
        for box in wanted:
            area = (box[2] - box[0]) * (box[3] - box[1])
            size = "small" if area < 10_000 else "medium" if area < 100_000 else "large"
            small.setdefault(size, []).append(sum(slow_iou(*pair) for pair in pairs if pair[1] is box))
        errors.append(abs(len(named) + other - len(wanted)))
        unreadable += answer is None
        if wanted:
            there.append(bool(named))
            others = [some for name, some in (answer or {}).items() if name not in (label, "")]
            everything = named + sum(others, [])
            one, two = cells_under(everything), cells_under(wanted)
            unions.append(len(one & two) / len(one | two))
            firsts.append(slow_iou(everything[0], wanted[0]) if everything else 0)
        else:
            empty.append(answer is not None and not named and not other)

    def mean(some):
        return 100 * sum(some) / len(some)

    return {"F-IoU": mean(f_iou) / 100, "mean IoU": 100 * matched / true, "count error": mean(errors) / 100,
            **{f"F1 at {cut}": 200 * hits[cut] / (predicted + true) for cut in hits},
            "unreadable": 100 * unreadable / len(texts), "sensitivity": mean(there), "specificity": mean(empty),
            "IoU of unions": mean(unions), "IoU of firsts": mean(firsts), "AP50": slow_ap(records, texts),
            **{size: mean(some) for size, some in small.items()}}


def slow_ap(records, texts):
    """AP50 with all scores alike, in loops."""
    averages = []
    for label in LABELS:
        total, hits = 0, []
        for record, text in zip(records, texts):
            left = list(record["boxes"].get(label, []))
            total += len(left)
            answer = read(text) or {}
            bare = answer.get("", []) if list(record["boxes"]) == [label] else []
            for box in (answer.get(label, []) + bare)[:100]:
                best = max(left, key=lambda other: slow_iou(box, other), default=None)
                hits.append(best is not None and slow_iou(box, best) >= 0.5)
                if hits[-1]:
                    left.remove(best)
        if total:
            points = [(sum(hits[:n + 1]) / total, sum(hits[:n + 1]) / (n + 1)) for n in range(len(hits))]
            averages.append(sum(max((precision for recall, precision in points if recall >= at), default=0)
                                for at in np.linspace(0, 1, 101)) / 101)
    return 100 * sum(averages) / len(averages)


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_those_of_plain_loops(seed):
    records, texts = draw_answers(150, seed, most=3)
    texts[0] = "<box>[[0, 0, 400, 400]]</box>"
    scored = [score(*pair) for pair in zip(records, texts)]
    table = tabulate({"model": scored}, np.full(150, True), np.arange(150), 0)["rows"]["model"]
    expected = slow_scores(records, texts)
    assert table.keys() == expected.keys() and 0 < expected["AP50"] < 100
    for name, value in expected.items():
        assert table[name][0] == pytest.approx(value, abs=1e-9), name
        assert table[name][1] <= value <= table[name][2]


def test_a_resample_is_scored_as_its_questions_would_be():
    records, texts = draw_answers(60, 7, most=1)
    texts = [text if len(next(iter((read(text) or {"": ()}).values()), ())) < 2 else "<box>[]</box>" for text in texts]
    units = np.repeat(np.arange(20), 3)
    scored = [score(*pair) for pair in zip(records, texts)]
    table = resample({"model": scored}, units, seed=3)["model"]
    generator = np.random.default_rng(3)
    for number in range(1, 6):
        counts = np.bincount(generator.integers(20, size=20), minlength=20)[units]
        drawn = np.repeat(np.arange(60), counts)
        expected = slow_scores([records[place] for place in drawn], [texts[place] for place in drawn])
        for name, value in expected.items():
            assert table[name][number] == pytest.approx(value, abs=1e-9), name


def cocos_ap50(records, texts):
    """pycocotools' AP50 with all scores 1, each question an image."""
    coco, evaluation = (pytest.importorskip(f"pycocotools.{name}") for name in ("coco", "cocoeval"))

    def entry(number, label, box):
        wide, high = box[2] - box[0], box[3] - box[1]
        return {"image_id": number, "category_id": LABELS.index(label), "bbox": [box[0], box[1], wide, high],
                "area": wide * high, "iscrowd": 0, "score": 1.0}

    truths = [entry(number, label, box) for number, record in enumerate(records)
              for label, some in record["boxes"].items() for box in some]
    found = []
    for number, (record, text) in enumerate(zip(records, texts)):
        for label, some in (read(text) or {}).items():
            found += [entry(number, label or list(record["boxes"])[0], box) for box in some]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO()
        truth.dataset = {"images": [{"id": number} for number in range(len(records))], "categories": [
            {"id": number, "name": label} for number, label in enumerate(LABELS)],
            "annotations": [{**one, "id": number + 1} for number, one in enumerate(truths)]}
        truth.createIndex()
        run = evaluation.COCOeval(truth, truth.loadRes(found), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return 100 * run.stats[1]


@pytest.mark.parametrize("seed, most, labels_asked", [(0, 4, 1), (1, 12, 1), (2, 8, 2), (3, 30, 3), (4, 1, 1)])
def test_ap50_is_that_of_pycocotools(seed, most, labels_asked):
    records, texts = draw_answers(120, seed, most, labels_asked)
    for number, text in enumerate(texts):  # pycocotools forgives an inverted box
        upright = {label: [[*np.minimum(box[:2], box[2:]).tolist(), *np.maximum(box[:2], box[2:]).tolist()]
                           for box in some] for label, some in (read(text) or {}).items()}
        texts[number] = write(upright)
    for number in range(0, 120, 15):  # more boxes than COCO counts, the right ones at the end
        label, some = next(iter(records[number]["boxes"].items()))
        texts[number] = write({label: [[0, 0, 40, 40]] * (98 + number // 15) + some})
    for number in range(1, 120, 15):  # the same box again, and a true one twice
        label, some = next(iter(records[number]["boxes"].items()))
        records[number]["boxes"][label] = some + some
        texts[number] = write({label: some + some + some})
    scored = [score(*pair) for pair in zip(records, texts)]
    ours = average_precision(list(rank_labels(scored)), np.ones(120))
    assert ours == pytest.approx(cocos_ap50(records, texts), abs=1e-9) and 0 < ours < 100
    if labels_asked == 1 and most < 10:
        assert ours == pytest.approx(slow_ap(records, texts), abs=1e-9)


# ----------------------------------------------------------------------------- by hand

def test_scores_by_hand():
    truth = {"boxes": {"White  cell": [[0, 0, 100, 100], [500, 500, 600, 600]]}}
    half = "white cell <box>[[0, 0, 100, 50]]</box>"  # IoU 0.5 with one of two
    one = score(truth, half)
    assert one["F-IoU"] == pytest.approx(200 * 0.5 / 3) and one["matched"] == 0.5
    assert (one["predicted"], one["true"], one["hits 0.3"], one["hits 0.5"], one["hits 0.75"]) == (1, 2, 1, 1, 0)
    assert one["unions"] == 0.25 and one["first"] == 0.5 and one["any"] and not one["none"]
    assert one["ranked"]["white cell"][0].tolist() == [True] and one["medium true"] == 2 and one["medium"] == 0.5
    assert score(truth, half + half)["F-IoU"] == pytest.approx(200 * 0.5 / 4)  # two answers are two boxes
    assert score(truth, half.replace("white cell", ""))["F-IoU"] == one["F-IoU"]
    other = score(truth, half.replace("white", "red"))
    assert other["F-IoU"] == 0 and other["predicted"] == 1 and not other["any"] and not other["none"]
    none = {"boxes": {"white cell": []}}
    assert score(none, "white cell <box>[]</box>")["F-IoU"] == score(none, "[]")["F-IoU"] == 100
    assert score(none, half)["F-IoU"] == score(none, "")["F-IoU"] == score(truth, "[]")["F-IoU"] == 0
    both = {"boxes": {"a": [[0, 0, 10, 10]], "b": [[0, 0, 10, 10]]}}
    assert score(both, "b <box>[[0, 0, 10, 10]]</box> a <box>[[0, 0, 10, 10]]</box>")["F-IoU"] == 100
    assert score(both, "a <box>[[0, 0, 10, 10], [0, 0, 10, 10]]</box>")["F-IoU"] == 50
    assert score(both, "<box>[[0, 0, 10, 10], [0, 0, 10, 10]]</box>")["F-IoU"] == 0  # of which label?


def test_iou_of_boxes_without_area_and_of_huge_ones():
    odd = np.array([[10, 10, 0, 0], [5, 5, 5, 9], [0, 0, 10, 10], [-1e308, -1e308, 1e308, 1e308], [0, 0, 1e308, 0]])
    assert iou(odd, np.array([[0, 0, 10, 10]]))[:, 0] == pytest.approx([0, 0, 1, 0, 0], abs=1e-12)
    assert iou(odd, odd)[0].tolist() == [0] * 5 and np.isfinite(iou(odd, odd)).all()
    assert iou(np.zeros((0, 4)), odd).shape == (0, 5) and iou(odd, np.zeros((0, 4))).shape == (5, 0)
    assert iou_of_unions(odd[:1], odd[2:3]) == iou_of_unions(odd[:0], odd[2:3]) == 0
    assert iou_of_unions(np.array([[0, 0, 500, 1000], [400, 0, 1000, 1000]]), np.array([[0, 0, 1000, 500]])) == 0.5


MOVES = {
    "flip": lambda x1, y1, x2, y2: (1000 - x2, y1, 1000 - x1, y2), "upside down": lambda x1, y1, x2, y2: (
        x1, 1000 - y2, x2, 1000 - y1), "quarter turn": lambda x1, y1, x2, y2: (1000 - y2, x1, 1000 - y1, x2),
    "crop": lambda x1, y1, x2, y2: (2 * x1 - 100, 3 * y1 - 60, 2 * x2 - 100, 3 * y2 - 60),
    "pad": lambda x1, y1, x2, y2: (x1 / 2 + 130, y1 / 4 + 500, x2 / 2 + 130, y2 / 4 + 500)}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_scores_stay_when_image_and_answer_are_moved_together(move):
    generator = np.random.default_rng(3)
    for _ in range(60):
        truth = {"a": [[100 + box[0] // 4, 60 + box[1] // 4, 100 + box[2] // 4, 60 + box[3] // 4]
                       for box in draw_boxes(generator, 6)]}
        answer = {"a": near(generator, truth["a"])}
        before, after = (score({"boxes": one}, write(other)) for one, other in (
            (truth, answer), ({"a": [move(*box) for box in truth["a"]]}, {"a": [move(*box) for box in answer["a"]]})))
        for name in ("F-IoU", "matched", "predicted", "true", "hits 0.3", "hits 0.5", "hits 0.75", "first"):
            assert before[name] == pytest.approx(after[name], abs=1e-9), name
        assert before["ranked"]["a"][0].tolist() == after["ranked"]["a"][0].tolist()


def test_scores_move_when_the_answer_alone_is_moved():
    truth, answer = {"boxes": {"a": [[100, 100, 300, 200]]}}, "a <box>[[100, 100, 300, 200]]</box>"
    assert score(truth, answer)["F-IoU"] == 100
    assert score(truth, write({"a": [MOVES["flip"](100, 100, 300, 200)]}))["F-IoU"] == 0


# ----------------------------------------------------------------------------- without an image, and the tables

def test_the_medoid_is_the_answer_with_the_best_mean():
    generator = np.random.default_rng(5)
    texts = [write({"a": draw_boxes(generator, 3)}) for _ in range(40)]
    train = [("Detect  a", text) for text in texts] + [("detect b", "b <box>[]</box>"), ("detect a", "unreadable")]

    def mean(text):
        return np.mean([score({"boxes": read(other)}, text)["F-IoU"] for other in texts])

    a, b, c = guess_blindly(train, ["detect a", "detect b", "detect c"])
    assert mean(a) == max(map(mean, texts)) > min(map(mean, texts)) and b == "b <box>[]</box>"
    assert set(read(c)) == {""}  # of no label, so that it counts as the one that is asked
    assert guess_blindly(train, ["detect a"]) == [a] and guess_blindly([], ["detect a"]) == [""]
    assert guess_blindly([("q", "no boxes")], ["q", "r"]) == ["", ""]


def test_the_report_has_every_row(capsys):
    records, texts = draw_answers(90, 1)
    scored = {"model": [score(*pair) for pair in zip(records, texts)],
              "image shuffled": [score(*pair) for pair in zip(records, texts[3:] + texts[:3])],
              "question only": [score(record, "<box>[[0, 0, 1000, 1000]]</box>") for record in records]}
    seen = ["words"] * 60 + [""] * 30
    tables = report("toy/test", scored, 45, records, seen, np.repeat(np.arange(45), 2))
    assert json.loads(json.dumps(tables)) == tables and tables["new"]["questions"] == 30
    rows = tables["all"]["rows"]
    assert list(rows) == [*scored, "the image adds"] and set(tables["types"]) == set(LABELS)
    for name, cell in rows["the image adds"].items():
        assert cell[0] == pytest.approx(rows["model"][name][0] - rows["image shuffled"][name][0], abs=1e-9)
    assert tables["all"]["boxes"] == sum(len(some) for record in records for some in record["boxes"].values())
    text = capsys.readouterr().out
    assert "90 questions about 45 images" in text and "30 of them about images that are new" in text
    assert text.count("the image adds") == 7 and "F-IoU by label" in text and "AP50" in text
    assert report("toy/test", scored, 45, records, ["words"] * 90, np.zeros(90, int))["all"]["rows"]["model"][
        "F-IoU"][1:] == [None, None]  # of one image nobody knows how others differ


def test_without_an_empty_question_nothing_is_said_of_them(capsys):
    records = [{"question": "?", "type": "a", "boxes": {"a": [[0, 0, 500, 500]]}}] * 3
    flood = "a <box>" + json.dumps([[0, 0, 500, 500]] * 400) + "</box>"
    tables = report("toy/test", {"model": [score(record, flood) for record in records]}, 3, records, "x", np.arange(3))
    assert tables["all"]["rows"]["model"]["specificity"] == [None] * 3
    assert tables["all"]["rows"]["model"]["mean IoU"][0] == 100 and tables["all"]["rows"]["model"]["F-IoU"][0] < 1
    assert "399.0 [399.0 399.0]" in capsys.readouterr().out


needs_nih = pytest.mark.skipif(not (RAW / "nih_cxr14/BBox_List_2017.csv").is_file(),
                               reason=f"no NIH boxes in {RAW}; set NANOMEDQ_RAW to a folder that has them")
needs_rsna = pytest.mark.skipif(not (RAW / "rsna_pneumonia/stage_2_train_labels.csv").is_file(),
                                reason=f"no RSNA boxes in {RAW}; set NANOMEDQ_RAW to a folder that has them")


@needs_nih
def test_what_nih_is_worth_without_an_image():
    nih = blind_boxes.read_boxes(RAW / "nih_cxr14/BBox_List_2017.csv", 2)
    assert len(nih) == 984 and {len(some) for some in nih.values()} == {1}
    means, heart = [], []
    for seed in range(3):
        answers = blind_boxes.answer_halves(nih, blind_boxes.medoids, seed)
        matched = {key: score({"boxes": {key[1]: nih[key]}}, text)["matched"] for key, text in zip(nih, answers)}
        means.append(100 * np.mean(list(matched.values())))
        heart.append(100 * np.mean([value for key, value in matched.items() if key[1] == "Cardiomegaly"]))
    assert np.mean(means) == pytest.approx(20.1, abs=0.5) and np.mean(heart) == pytest.approx(63, abs=1.5)


@needs_rsna
def test_what_rsna_is_worth_without_an_image():
    films = blind_boxes.read_boxes(RAW / "rsna_pneumonia/stage_2_train_labels.csv", 1)
    rsna = {key: some for key, some in films.items() if some}
    assert (len(films), len(rsna), sum(map(len, rsna.values()))) == (26_684, 6_012, 9_555)
    answers = blind_boxes.answer_halves(rsna, blind_boxes.lung_means, 0)
    scored = [score({"boxes": {"pneumonia": some}}, text) for some, text in zip(rsna.values(), answers)]
    assert 100 * np.mean([one["matched"] / one["true"] for one in scored]) == pytest.approx(33.1, abs=0.1)
    assert 100 * sum(one["matched"] for one in scored) / (2 * len(scored)) == pytest.approx(26.6, abs=0.1)
