"""Mirrored and cropped copies: their boxes cover the same pixels, and their words follow."""

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data import Record
from plumbing.pixels import Unreadable, load_image
from prepare import sample
from prepare.augment import LEAST_AREA, alter, altered, change, exchange, move
from tasks.boxes import ask, to_units
from test_box_data import picture


def marked(boxes, size=(60, 40), **more):
    """A Record whose image is noise up to 199, but 255 in its boxes, given in pixels."""
    pixels = np.array(Image.open(io.BytesIO(picture(*size)))) % 200
    for x1, y1, x2, y2 in boxes:
        pixels[y1:y2, x1:x2] = 255
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    shares = tuple(tuple((np.array(box) / (size * 2)).tolist()) for box in boxes)
    return Record("a", ask("left lesion"), image=stream.getvalue(), image_name="a.png", type="left lesion",
                  boxes={"left lesion": shares}, **more)


def pixels_of(record):
    return np.asarray(load_image(record.image))


def test_left_and_right_are_exchanged_whole_and_in_their_case():
    assert exchange("Left lung, RIGHT-sided; upright bright lefty leftward left_lung (right)") == (
        "Right lung, LEFT-sided; upright bright lefty leftward right_lung (left)")
    assert exchange(exchange("a left Right LEFT")) == "a left Right LEFT" and exchange("à droite") == "à droite"


def test_mirrored_twice_is_the_first():
    record = marked([(3, 5, 20, 11), (50, 0, 60, 40)], answer="left", labels=("right_lung",), context="on the Left",
                    references=("right",), turns=(("left?", "RIGHT"),))
    once = change(record, True)
    assert once.question == "detect right lesion" and [once.type] == list(once.boxes) == ["right lesion"]
    assert (once.answer, once.labels, once.context, once.references, once.turns) == (
        "right", ("left_lung",), "on the Right", ("left",), (("right?", "LEFT"),))
    assert np.array_equal(pixels_of(once), pixels_of(record)[:, ::-1])
    assert np.allclose(once.boxes["right lesion"], [(40 / 60, 5 / 40, 57 / 60, 11 / 40), (0, 0, 10 / 60, 1)])
    twice = change(once, True)
    assert np.array_equal(pixels_of(twice), pixels_of(record)) and np.allclose(
        twice.boxes["left lesion"], record.boxes["left lesion"], atol=1e-12)
    assert to_units(twice.boxes["left lesion"]) == to_units(record.boxes["left lesion"])
    assert {**vars(twice), "image": 0, "boxes": 0} == {**vars(record), "image": 0, "boxes": 0}


def test_a_box_covers_the_same_pixels_in_every_copy():
    record, kinds = marked([(8, 6, 30, 19), (40, 20, 58, 38)]), Counter()
    for seed in range(60):
        copy = alter(record, np.random.default_rng(seed))
        pixels = pixels_of(copy)
        height, width, _ = pixels.shape
        inside = np.zeros((height, width), bool)
        (label, boxes), = copy.boxes.items()
        for box in boxes:
            x1, y1, x2, y2 = np.array(box) * (width, height, width, height)
            assert np.allclose((x1, y1, x2, y2), np.round((x1, y1, x2, y2)), atol=1e-6)  # no part of a pixel
            inside[round(y1):round(y2), round(x1):round(x2)] = True
        assert (pixels[inside] == 255).all()
        if len(boxes) == 2:
            assert (pixels[~inside] < 255).all()
        kinds[label, (width, height) == (60, 40), len(boxes)] += 1
        assert label == ("right lesion" if copy.question == "detect right lesion" else "left lesion")
        assert width >= 42 and height >= 28
    assert kinds["right lesion", True, 2] > 10 and kinds["right lesion", False, 2] and kinds["left lesion", False, 2]
    assert ("left lesion", True, 2) not in kinds  # some change is made each time


def test_a_box_of_which_less_than_half_is_left_is_dropped():
    part = (0.5, 0.0, 1.0, 1.0)
    assert move((0.0, 0.0, 0.4, 1.0), False, part) is None
    assert move((0.3, 0.2, 0.65, 0.4), False, part) is None  # 15 of 35
    assert np.allclose(move((0.4, 0.2, 0.7, 0.4), False, part), (0, 0.2, 0.4, 0.4))  # two thirds, cut
    assert np.allclose(move((0.4, 0.2, 0.7, 0.4), True, part), (0.6, 0.2, 1, 0.4)) and LEAST_AREA == 0.5
    record = change(marked([(0, 0, 10, 10)]), False, (0.5, 0.5), (0.5, 0.5))
    assert record.boxes == {"left lesion": ()}


def test_training_records_with_boxes_get_copies_and_no_others():
    boxed = marked([(3, 5, 20, 11)])
    records = [("train", boxed), ("train", Record("b", "why?", "so", picture(), "b.png")), ("test", boxed),
               ("validation", boxed), ("train", Record("c", ask("x"), image=None, image_name="c", boxes={"x": ()})),
               ("train", Record("d", ask("x"), image=b"no image", image_name="d", boxes={"x": ()}))]
    found = list(altered(records, 2))
    assert [record.id for _, record in found] == ["a", "a/copy 1", "a/copy 2", "b", "a", "a", "c", "d"]
    assert [record.group for _, record in found] == ["image a.png"] * 3 + [""] * 4 + ["image d"]
    assert len({record.image for _, record in found[:3]}) == len({record.image_name for _, record in found[:3]}) == 3
    assert list(altered(records, 0)) == records
    assert list(altered(records, 2)) == found != list(altered(records, 2, seed=1))
    group = next(altered([("train", marked([], group="patient 7"))], 1))[1].group
    assert group == "patient 7"
    with pytest.raises(Unreadable):
        change(records[-1][1], True)


def test_questions_about_one_image_share_its_copies():
    one, two = marked([(3, 5, 20, 11)]), marked([(3, 5, 20, 11)])
    two.id, two.boxes, two.question = "b", {"cyst": ()}, ask("cyst")
    apart = [record.image for _, record in altered([("train", two)], 3)]
    together = [record.image for _, record in altered([("train", one), ("train", two)], 3)]
    assert together == apart * 2 and len(set(apart)) == 4
    other = [record.image for _, record in altered([("train", marked([(9, 9, 20, 20)]))], 3)]
    assert [Image.open(io.BytesIO(image)).size for image in other] != [
        Image.open(io.BytesIO(image)).size for image in apart]  # each image has its own


def test_copies_of_a_drawn_image_show_its_finding(monkeypatch):
    monkeypatch.setattr(sample, "SPLITS", {"train": 2, "test": 0})
    bleeds = [record for _, record in sample.box_records(ask) if record.boxes.get("bleed")]
    for record in bleeds:
        for seed in range(6):
            copy = alter(record, np.random.default_rng(seed))
            for x1, y1, x2, y2 in copy.boxes["bleed"]:
                pixels = pixels_of(copy)
                height, width, _ = pixels.shape
                middle = pixels[round((y1 + y2) / 2 * height) - 4:, round((x1 + x2) / 2 * width) - 4:][:8, :8]
                assert middle.mean() > 190
