"""
What boxes are worth on NIH and RSNA without a look at an image, from their public csv files alone.

    python extras/look/blind_boxes.py --raw_dir=raw

The images are split in half at random, and each half is answered with what the other half's boxes say: the medoid
answer of the question, which is eval_vqa.py's row "question only", and, for RSNA, the mean box of either lung.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import csv
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from plumbing.flags import UserError, Whole, parse_command_line, run
from tasks.box_tables import tabulate
from tasks.boxes import ask, guess_blindly, score, to_units, write
from tasks.vqa import print_cells

SIDE = 1024  # pixels of both sets' images
SCORES = ("F-IoU", "mean IoU", "F1 at 0.5")


@dataclass(frozen=True)
class Config:
    raw_dir: str = "raw"  # with nih_cxr14/BBox_List_2017.csv and rsna_pneumonia/stage_2_train_labels.csv
    seed: Whole = 0  # of the halves


def read_boxes(path, first):
    """{(image, label): boxes in thousandths} of a csv whose first column is the image, and `first` a box's x."""
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))[1:]
        boxes = defaultdict(list)
        for row in rows:
            x, y, width, height = (float(number or "nan") / SIDE for number in row[first:first + 4])
            boxes[row[0], row[1] if first > 1 else "pneumonia"] += [(x, y, x + width, y + height)] * (x == x)
    except (OSError, ValueError, IndexError):
        raise UserError(f"{path}: not there or not the table; --raw_dir names the folder of it") from None
    return {key: to_units(some) for key, some in boxes.items()}


def answer_halves(boxes, answer, seed):
    """The answers to all of {(image, label): boxes}, a half's by answer(the other half's boxes, the half's keys)."""
    images = sorted({image for image, _ in boxes})
    half, texts = dict(zip(images, np.random.default_rng(seed).permutation(len(images)) % 2)), {}
    for number in (0, 1):
        keys = [key for key in boxes if half[key[0]] == number]
        learnt = {key: some for key, some in boxes.items() if half[key[0]] != number}
        texts |= dict(zip(keys, answer(learnt, keys), strict=True))
    return [texts[key] for key in boxes]


def medoids(learnt, keys):
    train = [(ask(label), write({label: some})) for (_, label), some in learnt.items()]
    return guess_blindly(train, [ask(label) for _, label in keys])


def lung_means(learnt, keys):
    """The mean of all boxes whose centre is in the image's left half, and that of the others, to each question."""
    boxes = np.array([box for some in learnt.values() for box in some])
    left = boxes[:, 0] + boxes[:, 2] < 1000
    means = [np.rint(boxes[side].mean(0)).astype(int).tolist() for side in (left, ~left)]
    return [write({label: means}) for _, label in keys]


def show(title, boxes, answers):
    """Print a line of scores, and matched IoU by true box as the mean of images, and by predicted box."""
    scored = [score({"boxes": {label: some}}, text) for ((_, label), some), text in zip(boxes.items(), answers)]
    units = np.unique([image for image, _ in boxes], return_inverse=True)[1]
    cells = tabulate({"blind": scored}, np.full(len(scored), True), units, seed=0)["rows"]["blind"]
    shares = [one["matched"] / one["true"] for one in scored if one["true"]]
    matched, predicted = (sum(one[name] for one in scored) for name in ("matched", "predicted"))
    print_cells(title, [*(cells[name] for name in SCORES), f"{100 * np.mean(shares):.1f}",
                        f"{100 * matched / predicted:.1f}" if predicted else "-"])


def main(config):
    nih = read_boxes(Path(config.raw_dir) / "nih_cxr14/BBox_List_2017.csv", 2)
    films = read_boxes(Path(config.raw_dir) / "rsna_pneumonia/stage_2_train_labels.csv", 1)
    rsna = {key: some for key, some in films.items() if some}
    print_cells("", (*SCORES, "IoU, of images", "IoU / predicted"))
    answers = dict(zip(nih, answer_halves(nih, medoids, config.seed)))
    show("NIH medoids", nih, answers.values())
    for kind in sorted({label for _, label in nih}):
        part = {key: some for key, some in nih.items() if key[1] == kind}
        show(f"  {kind}", part, [answers[key] for key in part])
    for title, boxes, answer in (("RSNA medoid", rsna, medoids), ("RSNA two means", rsna, lung_means),
                                 ("RSNA, all films", films, medoids)):
        show(title, boxes, answer_halves(boxes, answer, config.seed))


if __name__ == "__main__":
    run(main, parse_command_line(Config))
