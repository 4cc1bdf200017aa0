"""extras/look/boxes.py: which answers its sheet shows, in which order, and where on the image their boxes lie."""

import io

import numpy as np
import pytest
from PIL import Image, ImageColor

from data import Record
from extras.look import boxes as sheet
from plumbing.flags import UserError
from plumbing.shards import PROMPT_VERSION, SHARD_VERSION, Shard
from prepare.datasets import Dataset
from prepare.questions import train_sample_tokenizer
from prepare.shards import write_dataset
from tasks.boxes import write
from tasks.evaluations import write_evaluation

TRUE = [200, 250, 400, 750]
ANSWERS = 25  # each a little farther from the truth than the one before, and the last three without any box


def write_shard(shards_dir, name="cells", resize="fit", shape=(64, 32)):
    """A test split of grey images, all with the box TRUE but the last three; its records."""
    records = []
    for number in range(ANSWERS):
        stream, pixels = io.BytesIO(), np.full((*shape[::-1], 3), 90, np.uint8)
        pixels[0, number] = 91
        Image.fromarray(pixels).save(stream, "PNG")
        true = () if number >= ANSWERS - 3 else (tuple(np.array(TRUE) / 1000),)
        records.append(("test", Record(f"id{number}", "detect cell", "", stream.getvalue(), f"{number}.png",
                                       type="cell", boxes={"cell": true})))
    dataset = Dataset(name=name, read=lambda raw: iter(records), kind="boxes", licence="none", access="open",
                      megabytes=0, page="", layouts=(), counts={})
    write_dataset(shards_dir / name, dataset, shards_dir, {}, train_sample_tokenizer(), {
        "dataset": name, "shard_version": SHARD_VERSION, "prompt_version": PROMPT_VERSION, "limit": 0,
        "licence": "none", "image": {"size": 64, "resize": resize, "codec": "png", "quality": 0}}, 1)
    return Shard(shards_dir / name / "test").read_records()


def write_answers(run, records):
    """An evaluation: of the first 22 the box moved 8 thousandths a number, of the others none, an odd text, and one."""
    lines = [{"dataset": "cells/test", **record, "prediction": write({"Cell": [[TRUE[0] + 8 * number, TRUE[1],
              TRUE[2] + 8 * number, TRUE[3]]]})} for number, record in enumerate(records)]
    lines[-3]["prediction"], lines[-2]["prediction"] = "cell <box>[]</box>", "a cell"
    write_evaluation(run / "eval/cells", {"stands_on": {"checkpoint": "0"}, "results": {"cells/test": {}}},
                     {"model": [lines[number] for number in np.random.default_rng(0).permutation(len(lines))]})


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """drawn(**flags) -> (the sheet's pixels, the texts on it)"""
    write_answers(tmp_path / "run", write_shard(tmp_path / "shards"))
    texts, text = [], sheet.ImageDraw.ImageDraw.text
    monkeypatch.setattr(sheet.ImageDraw.ImageDraw, "text", lambda self, place, words, *rest: (
        texts.append((place, words)), text(self, place, words, *rest)))

    def draw(**flags):
        texts.clear()
        out = tmp_path / "deep/sheet.png"
        sheet.main(sheet.Config(**{"run": str(tmp_path / "run"), "shards_dir": str(tmp_path / "shards"),
                                   "out": str(out)} | flags))
        return np.asarray(Image.open(out)), sorted(texts, key=lambda one: one[0][::-1])

    return draw


def test_rows_are_the_best_the_median_and_the_worst_of_those_with_something_to_show(drawn):
    pixels, texts = drawn()
    words = [text for _, text in texts]
    assert "25 questions; 24 have boxes to show" in words[0]
    ids = [text for text in words if text.startswith("id")]
    assert ids[:6] == [f"id{n}" for n in range(6)] and ids[6:12] == [f"id{n}" for n in range(9, 15)]
    assert ids[12:16] == [f"id{n}" for n in range(18, 22)] and set(ids[16:]) == {"id23", "id24"}  # both 0, in any order
    assert words.count("best: cell") == words.count("median: cell") == words.count("worst: cell") == 6
    assert "F-IoU 100: 1 predicted, 1 true" in words and "F-IoU 0: unreadable, 0 true" in words
    assert "F-IoU 0: 1 predicted, 0 true" in words
    again, _ = drawn()
    assert (again == pixels).all()


def test_boxes_lie_where_they_are_on_an_image_that_is_not_square(drawn):
    pixels, texts = drawn()
    (x, y), _ = next(one for one in texts if one[1] == "id12")
    tile = pixels[y - 58 - sheet.SIDE:y - 58, x:x + sheet.SIDE].astype(int)
    assert (tile[:74] == 255).all() and (tile[-74:] == 255).all() and (tile[76] != 255).any()  # 300 x 150 in the middle
    for colour, moved in ((sheet.FOUND, 8 * 12), (sheet.TRUE, 0)):
        rows, columns = np.nonzero((tile == ImageColor.getrgb(colour)).all(-1))
        left, top, right, bottom = np.array(TRUE) / 1000 * [300, 150, 300, 150] + [0, 75, 0, 75]
        shift = moved * 0.3
        assert [columns.min(), columns.max(), rows.min(), rows.max()] == pytest.approx(
            [left + shift, right + shift, top, bottom], abs=3)


def test_true_boxes_are_dashed():
    image = np.zeros((200, 200, 3), np.uint8)
    boxes = np.array([[100, 200, 800, 900]])
    ink = [np.count_nonzero((np.asarray(sheet.draw_answer(image, {"cell": pair})) != 0).any(-1))
           for pair in ((boxes, boxes[:0]), (boxes[:0], boxes))]
    assert 0.4 < ink[1] / ink[0] < 0.7


@pytest.mark.parametrize("flags, message", [
    ({"data": "other"}, "no boxes of other here; run `python eval_vqa.py`"),
    ({"run": "{}/none"}, "none: no predictions.jsonl of an evaluation here"),
    ({"out": "{}/sheet.none"}, "--out="), ({"out": "{}/run/eval/cells/results.json/x.png"}, "--out=")])
def test_mistakes_get_one_line(flags, message, drawn, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        drawn(**{name: value.format(tmp_path) for name, value in flags.items()})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("resize", ["crop", "pad"])
def test_images_that_are_not_stored_whole_are_refused(resize, tmp_path):
    write_answers(tmp_path / "run", write_shard(tmp_path, resize=resize))
    with pytest.raises(UserError, match="not one whole image a question; run .*--resize=squash`"):
        sheet.main(sheet.Config(run=str(tmp_path / "run"), shards_dir=str(tmp_path), out=str(tmp_path / "x.png")))
    assert not (tmp_path / "x.png").exists()


def test_an_evaluation_of_words_is_passed_over(tmp_path):
    write_evaluation(tmp_path / "eval/words", {"stands_on": {"checkpoint": "0"}, "results": {"words/test": {}}}, {
        "model": [{"dataset": "words/test", **dict.fromkeys(("id", "image", "question", "answer", "type"), "x"),
                   "prediction": "x"}]})
    with pytest.raises(UserError, match="no boxes of any data here"):
        sheet.main(sheet.Config(run=str(tmp_path), out=str(tmp_path / "x.png")))
