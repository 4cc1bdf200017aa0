"""Rewards by hand and beside second statements, and what eleven ways to cheat are worth under those of boxes."""

import csv
import itertools
import os
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from plumbing.flags import UserError
from tasks.boxes import ask, guess_blindly, to_units, write
from tasks.rewards import REWARDS, balance, parse, reward, reward_iou, reward_medmo, rouge_l

ROOT = Path(__file__).resolve().parent.parent
RAW = Path(os.environ.get("NANOMEDQ_RAW", ROOT / "raw"))
BOX_REWARDS = ("boxes", "iou", "medmo")


def record_of(answer, **more):
    return {"question": "?", "answer": answer, "type": "", **more}


# ----------------------------------------------------------------------------- words

@pytest.mark.parametrize("answer, text, expected", [
    ("B. left lung", "B. left lung", 1), ("B. left lung", "B", 1), ("B. left lung", "B.", 1),
    ("B. left lung", " B. x\n", 1), ("B. left lung", "(B)", 0), ("B. left lung", "B.left", 0),
    ("B. left lung", "A. left lung", 0), ("B. left lung", "left lung", 0), ("B. left lung", "b", 0),
    ("B. left lung", "Both", 0), ("B. left lung", "A or B", 0), ("B. left lung", "AB", 0), ("B. left lung", "B C", 0),
    ("B. left lung", "A B C D", 0), ("B. left lung", "", 0),
    ("left lung", "B", None), ("B cell", "B", None), ("B.", "B", None), ("K. no letter", "K", None)])
def test_only_the_letter_counts(answer, text, expected):
    assert REWARDS["letter"](record_of(answer), text, 0) == expected


@pytest.mark.parametrize("answer, text, expected", [
    ("Mass, Nodule", "nodule,mass", 1), ("mass, nodule", "mass", 2 / 3), ("mass", "mass, nodule, edema", 2 / 4),
    ("mass", "mass, mass, mass", 1), ("mass", "", 0), ("mass", "a mass", 0),
    ("pleural  effusion", "Pleural effusion ,", 1)])
def test_labels_are_sets(answer, text, expected):
    assert REWARDS["labels"](record_of(answer), text, 0) == pytest.approx(expected)


def test_words_by_hand():
    assert REWARDS["exact"](record_of("Left lung"), "left  lung", 0) == 1
    assert REWARDS["exact"](record_of("left lung"), "left lung .", 0) == 0
    assert REWARDS["f1"](record_of("left lung"), "the left lung", 0) == pytest.approx(0.8)
    several = record_of("ct#mri", references=["ct", "mri"])
    assert REWARDS["exact"](several, "mri", 0) == REWARDS["f1"](several, "ct", 0) == 1
    assert rouge_l("police kill the gunman", "police killed the gunman") == 0.75  # Lin's example, S2
    assert rouge_l("the gunman kill police", "police killed the gunman") == 0.5  # S3
    assert rouge_l("", "a") == rouge_l("a", "") == rouge_l("", "") == rouge_l("b", "a") == 0


def test_the_longest_common_subsequence_is_that_of_a_table():
    generator = np.random.default_rng(0)
    for _ in range(300):
        one, other = (generator.choice(list("abcde"), generator.integers(1, 30)).tolist() for _ in "12")
        table = np.zeros((len(one) + 1, len(other) + 1), int)
        for (i, first), (j, second) in itertools.product(enumerate(one), enumerate(other)):
            table[i + 1, j + 1] = table[i, j] + 1 if first == second else max(table[i, j + 1], table[i + 1, j])
        assert rouge_l(" ".join(one), " ".join(other)) == pytest.approx(2 * table[-1, -1] / (len(one) + len(other)))


def test_a_short_answer_is_no_report():
    assert REWARDS["report"](record_of("one two three four five six seven"), "x", 0) is None
    assert REWARDS["report"](record_of("one two three four five six seven eight"), "one eight", 0) == pytest.approx(0.4)


def test_a_reward_leaves_out_what_it_is_not_for():
    boxes, words = record_of("a <box>[]</box>", boxes={"a": []}), record_of("B. left", boxes=None)
    assert {name for name in REWARDS if REWARDS[name](boxes, "a <box>[]</box>", 0) is not None} == set(BOX_REWARDS)
    assert {name for name in REWARDS if REWARDS[name](words, "B", 0) is not None} == {"letter", "labels", "exact", "f1"}


# ----------------------------------------------------------------------------- boxes

def test_boxes_by_hand():
    truth = record_of("", boxes={"a": [[0, 0, 100, 100], [500, 500, 600, 600]]})
    half = "a <box>[[0, 0, 100, 50]]</box>"
    assert REWARDS["boxes"](truth, half, 0) == pytest.approx(2 * 0.5 / 3)
    for progress, expected in ((0, 2 / 3), (0.4, 2 / 3), (0.5, 0), (1, 0)):  # the threshold goes from 0.3 to 0.75
        assert reward_iou(truth, half, progress) == pytest.approx(expected)
    assert reward_iou(truth, write(truth["boxes"]), 1) == REWARDS["boxes"](truth, write(truth["boxes"]), 1) == 1
    none = record_of("", boxes={"a": []})
    for name in BOX_REWARDS:
        assert REWARDS[name](none, "a <box>[]</box>", 0) == REWARDS[name](none, "[]", 0) == 1
        assert REWARDS[name](none, half, 0) == REWARDS[name](none, "none", 0) == REWARDS[name](truth, "no", 0) == 0


def test_medmos_reward_by_hand():
    """One box that is moved by a third of its width: L1 = 2 d / (2 sqrt(2) 1000), IoU = GIoU = 1/2."""
    truth = record_of("", boxes={"a": [[0, 0, 300, 300]]})
    distance = 200 / (2 * 2 ** 0.5 * 1000)
    expected = (5 * (1 - distance) + 2 * (0.5 + 1) / 2) / 7
    assert reward_medmo(truth, "a <box>[[100, 0, 400, 300]]</box>", 0) == pytest.approx(expected)
    apart = (5 * (1 - 2000 / (2 * 2 ** 0.5 * 1000)) + 2 * (-0.5 + 1) / 2) / 7  # half of the box around both is empty
    truth = record_of("", boxes={"a": [[0, 0, 500, 500]]})
    assert reward_medmo(truth, "<box>[[500, 500, 1000, 1000]]</box>", 0) == pytest.approx(apart)


def slow_quality(box, other):
    """(cost, s) of a predicted and a true box, as the paper writes them."""
    distance = min(sum(abs(a - b) for a, b in zip(box, other)) / (2 * (1000 ** 2 + 1000 ** 2) ** 0.5), 1)
    wide, high = (max(0, min(box[k + 2], other[k + 2]) - max(box[k], other[k])) for k in (0, 1))
    around = np.prod([max(box[k + 2], other[k + 2]) - min(box[k], other[k]) for k in (0, 1)])
    union = sum((one[2] - one[0]) * (one[3] - one[1]) for one in (box, other)) - wide * high
    giou = wide * high / union - (around - union) / around
    return 5 * distance + 2 * (1 - giou), (5 * (1 - distance) + 2 * (giou + 1) / 2) / 7


def test_medmos_reward_is_that_of_trying_all_matchings():
    generator = np.random.default_rng(0)
    for _ in range(300):
        found, wanted = (draw_boxes(generator, 1, 4) for _ in "12")
        pairs = [list(zip(order, wanted)) for order in itertools.permutations(found, len(wanted))] or [
            list(zip(found, order)) for order in itertools.permutations(wanted, len(found))]
        best = min(pairs, key=lambda some: sum(slow_quality(*pair)[0] for pair in some))
        expected = sum(slow_quality(*pair)[1] for pair in best) / len(wanted)
        assert reward_medmo(record_of("", boxes={"a": wanted}), write({"a": found}), 0) == pytest.approx(expected)


# ----------------------------------------------------------------------------- ways to cheat

def draw_boxes(generator, least, most):
    lows = generator.uniform(0, 0.8, (generator.integers(least, most + 1), 2))
    return to_units(np.hstack([lows, lows + generator.uniform(0.05, 0.35, lows.shape)]).clip(0, 1))


def half_right(truth):
    """Each box moved by a third of its width, so that its IoU is about 0.5; the number of boxes is right."""
    moved = []
    for x1, y1, x2, y2 in truth:
        step = round((x2 - x1) / 3) * (1 if x2 <= 800 else -1)
        moved.append([x1 + step, y1, x2 + step, y2])
    return moved


def grid(sides, overlap):
    """Square boxes all over the image, each overlapping the next by a share of its side."""
    steps = {side: range(0, 1001 - side, round(side * (1 - overlap))) for side in sides}
    return [[x, y, x + side, y + side] for side, places in steps.items() for x in places for y in places]


def cheats(label, truth, blind, labels):
    """{how: answer} of eleven ways to earn without looking better; those with "honest" know the half-right answer."""
    honest = half_right(truth)
    answer = write({label: honest})
    return {"honest, half right": answer,
            "flooding: 595 boxes": write({label: grid((100, 150, 200, 300, 450), 0.5)}),
            "one huge box": write({label: [[0, 0, 1000, 1000]]}),
            "the medoid": blind[label],
            "honest, each box five times": write({label: honest * 5}),
            "medoids of all labels": " ".join(blind[other] for other in labels),
            "empty": write({label: []}),
            "2,500 boxes": write({label: grid((20,), 0)}),
            "honest, inverted": write({label: [[x2, y2, x1, y1] for x1, y1, x2, y2 in honest]}),
            "off the image": write({label: [[-9000, -9000, 9000, 9000]]}),
            "honest, text after it": f"{answer} and that is all",
            "honest, then the medoid": f"{answer} {blind[label]}"}


def earn(questions):
    """
    {how: {reward: mean in percent}} of [(label, true boxes)], MedMO's over those with boxes, for which alone it is
    defined. The medoids are learnt from the questions themselves.
    """
    labels = sorted({label for label, _ in questions})
    train = [(ask(label), write({label: truth})) for label, truth in questions]
    blind = dict(zip(labels, guess_blindly(train, [ask(label) for label in labels])))
    table = defaultdict(lambda: {name: [] for name in BOX_REWARDS})
    for label, truth in questions:
        record = record_of("", boxes={label: truth})
        for how, text in cheats(label, truth, blind, labels).items():
            for name in BOX_REWARDS:
                if truth or name != "medmo":
                    table[how][name].append(REWARDS[name](record, text, 0))
    return {how: {name: 100 * float(np.mean(values)) for name, values in row.items()} for how, row in table.items()}


def require_honesty(table):
    """Under F-IoU, and F1 at an IoU of 0.3, nothing comes near the half-right answer; under MedMO's some do."""
    honest, *others = table.values()
    assert len(others) == 11
    for name in ("boxes", "iou"):
        assert all(row[name] < 0.85 * honest[name] for row in others), name
    for how in ("flooding: 595 boxes", "honest, each box five times", "honest, then the medoid"):
        assert table[how]["medmo"] > honest["medmo"] - 1
    assert table["honest, inverted"]["medmo"] > 0.5 * honest["medmo"]


def test_no_cheat_beats_an_honest_answer():
    generator = np.random.default_rng(0)
    require_honesty(earn([("abc"[number % 3], draw_boxes(generator, 0 if number % 5 == 0 else 1, 6))
                          for number in range(45)]))


def read_bccd():
    """[(label, boxes)] of every label and sixth image of BCCD's xml files."""
    questions = []
    for path in sorted((RAW / "bccd/BCCD/Annotations").glob("*.xml"))[::6]:
        root = ElementTree.parse(path).getroot()
        boxes = {"RBC": [], "WBC": [], "Platelets": []}
        for item in root.iter("object"):
            edges = [float(item.find(f"bndbox/{edge}").text) for edge in ("xmin", "ymin", "xmax", "ymax")]
            boxes[item.find("name").text].append(edges / np.array([640, 480, 640, 480]))
        questions += [(label, to_units(some)) for label, some in boxes.items()]
    return questions


def read_nih():
    """[(label, boxes)] of every sixth line of NIH's csv file, a box each."""
    with open(RAW / "nih_cxr14/BBox_List_2017.csv", encoding="utf-8", newline="") as file:
        rows = [(row[1], *map(float, row[2:6])) for row in list(csv.reader(file))[1::6]]
    return [(label, to_units([np.array([x, y, x + w, y + h]) / 1024])) for label, x, y, w, h in rows]


@pytest.mark.skipif(not ((RAW / "bccd/BCCD").is_dir() and (RAW / "nih_cxr14/BBox_List_2017.csv").is_file()),
                    reason=f"no BCCD and NIH boxes in {RAW}; set NANOMEDQ_RAW to a folder that has them")
def test_no_cheat_beats_an_honest_answer_on_real_truths():
    tables = {"BCCD": earn(read_bccd()), "NIH": earn(read_nih())}
    print("\n| answer |" + "".join(f" {name}, `{some}` |" for name in tables for some in BOX_REWARDS))
    for how in tables["NIH"]:
        values = [value for table in tables.values() for value in table[how].values()]
        print(f"| {how} | {' | '.join(f'{value:.1f}' for value in values)} |")
    for table in tables.values():
        require_honesty(table)


# ----------------------------------------------------------------------------- together

def test_rewards_are_parsed():
    assert [(name, weight) for name, _, weight in parse("boxes:1,letter:0.5, f1")] == [
        ("boxes", 1), ("letter", 0.5), ("f1", 1)]
    assert all(function is REWARDS[name] for name, function, _ in parse("medmo:0,iou:1000"))


@pytest.mark.parametrize("text, message", [
    ("boxs:1", "did you mean boxes"), ("Boxes", "did you mean boxes"), ("xyz", "one of boxes, iou"),
    ("", "one of boxes"),
    ("boxes:1,", "one of"), ("boxes:-1", "from 0 to 1000"), ("boxes:1001", "from 0 to"), ("boxes:nan", "from 0 to"),
    ("boxes:", "from 0 to"), ("boxes:a", "from 0 to"), ("boxes:1:2", "from 0 to"), ("boxes:0", "all weights are 0"),
    ("boxes,boxes", "given twice")])
def test_a_mistake_in_rewards_is_named(text, message):
    with pytest.raises(UserError, match=message):
        parse(text)


def test_rewards_together():
    boxes, words = record_of("", boxes={"a": []}), record_of("B. left lung")
    chosen = parse("boxes:3,letter:3,f1:1,exact:0")
    assert reward(chosen, boxes, "[]", 0) == 1  # of the others there is none
    assert reward(chosen, words, "B", 0) == pytest.approx((3 + 0) / 4)
    assert reward(chosen, words, "B. left lung", 0) == 1
    assert reward(parse("boxes,report"), words, "B", 0) is reward(parse("boxes,f1:0"), words, "B", 0) is None


def test_a_balanced_reward_has_its_median_at_half():
    values = np.linspace(0, 1, 101)
    for median in (0, 0.01, 0.3, 0.5, 0.99, 1):
        mapped = [balance(value, median) for value in values]
        assert balance(median, median) == 0.5 and 0 <= min(mapped) <= max(mapped) <= 1
        assert all(np.diff(mapped) > 0)
    assert [balance(value, 0.5) for value in values] == pytest.approx(values.tolist())
    assert (balance(0, 0.3), balance(1, 0.3), balance(0.65, 0.3)) == pytest.approx((0, 1, 0.75))


def test_any_text_has_a_reward():
    nasty = ("", "[" * 60_000, "<box>[[1e308, -1e308, 1e308, 1e308]]</box>", "a, b," * 9000, "\ud800", "B" * 9999,
             "x " * 9000, "<box>[[9, 9, 1, 1]]</box>", "<box>[[5, 5, 5, 5]]</box>", "```",
             "a <box>[[0, 0, 1e999, 1]]</box>")
    records = (record_of("B. left"), record_of("a b c d e f g h i"), record_of("", boxes={"a": []}),
               record_of("", boxes={"a": [[0, 0, 10, 10]]}))
    for text, record, function in itertools.product(nasty, records, REWARDS.values()):
        value = function(record, text, 0.5)
        assert value is None or 0 <= value <= 1
