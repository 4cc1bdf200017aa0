"""
Draw the best, the median and the worst answers of an evaluation of boxes on one sheet, beside the true boxes.

    python extras/look/boxes.py --run=out/boxes --data=bccd --out=sheet.png

needs an evaluation by `python eval_vqa.py`, and the prepared data for the images. Answers are ranked by F-IoU, equal
ones in the order of the split; those that rightly say that there is no box have nothing to show, and are left out.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from extras.look.browse import find_folders, find_samples, read_lines, true_boxes
from plumbing.flags import UserError, parse_command_line, run
from tasks.boxes import MAIN, as_array, pair_up, read, score
from tasks.evaluations import file_of

COLUMNS, SIDE, GAP, HEAD, FOOT = 6, 300, 24, 120, 110  # images a row; pixels: of an image, between, above, below
TRUE, FOUND, INK, font = "#56b4e9", "#ff9a00", "#1d2b33", ImageFont.load_default
DASH, LETTERS = 10, 32  # pixels of a true box's lines; letters, at most, of a line under an image


@dataclass(frozen=True)
class Config:
    run: str = ""  # folder of a run, or of one evaluation; none: the run in out/ that was evaluated last
    data: str = ""  # dataset of boxes; none: the one that was evaluated last
    shards_dir: str = "shards"  # where prepare/all.py put the images
    out: str = "out/boxes.png"  # the picture


def outline(draw, box, colour, dash=9999):
    """A rectangle in a colour on a dark rim, in dashes of so many pixels."""
    x1, y1, x2, y2 = map(round, box)
    pieces = [(x, y, min(x + dash, x2), y) for y in (y1, y2) for x in range(x1, x2 + 1, 2 * dash)]
    pieces += [(x, y, x, min(y + dash, y2)) for x in (x1, x2) for y in range(y1, y2 + 1, 2 * dash)]
    for width, ink in ((5, "#000000"), (3, colour)):
        for piece in pieces:
            draw.line(piece, ink, width)


def draw_answer(pixels, pairs):
    """An image (H, W, 3) uint8 in a square, the true boxes of {label: (predicted, true)} under the predicted ones."""
    image = ImageOps.contain(Image.fromarray(pixels), (SIDE, SIDE), Image.Resampling.BICUBIC)
    for which, look in ((1, (TRUE, DASH)), (0, (FOUND,))):
        for box in np.vstack([as_array(()), *(pair[which] for pair in pairs.values())]).clip(-100, 1100):
            outline(ImageDraw.Draw(image), box / 1000 * (np.tile(image.size, 2) - 1), *look)
    return ImageOps.pad(image, (SIDE, SIDE), color="white")


def find_answers(config):
    """The dataset's name and [(score, line, shard, number of the sample, record)], the best answers first."""
    for folder in find_folders(config.run):
        lines = read_lines(folder / file_of("model"))
        dataset = next(iter(lines))[0]
        if config.data in ("", dataset.partition("/")[0]) and all("boxes" in line for line in lines.values()):
            samples = find_samples(lines, config.shards_dir, folder)
            found = [(score(samples[key][2], line["prediction"]), line, *samples[key]) for key, line in lines.items()]
            return dataset, sorted(found, key=lambda answer: -answer[0][MAIN])
    raise UserError(f"{config.run or 'out'}: no boxes of {config.data or 'any data'} here; run `python eval_vqa.py`")


def main(config):
    dataset, answers = find_answers(config)
    shown = [answer for answer in answers if answer[0]["true"] + answer[0]["predicted"] + answer[0]["unreadable"]]
    count, mean = min(COLUMNS, -(-len(shown) // 3)), np.mean([answer[0][MAIN] for answer in answers])
    sheet = Image.new("RGB", (GAP + COLUMNS * (SIDE + GAP), HEAD + 3 * (SIDE + FOOT)), "white")
    draw = ImageDraw.Draw(sheet)
    title = f"{dataset}: mean F-IoU {mean:.1f} of {len(answers):,} questions; {len(shown):,} have boxes to show"
    draw.text((GAP, 18), title, INK, font(28))
    for x, words, look in ((GAP, "the model's boxes", (FOUND,)), (GAP + 300, "true boxes", (TRUE, DASH))):
        outline(draw, (x, 64, x + 40, 86), *look)
        draw.text((x + 54, 63), words, INK, font(20))
    begins = {"best": 0, "median": (len(shown) - count) // 2, "worst": len(shown) - count}
    for y, (name, begin) in zip(range(HEAD, sheet.height, SIDE + FOOT), begins.items()):
        for x, (numbers, line, shard, number, record) in zip(range(GAP, 9999, SIDE + GAP), shown[begin:][:count]):
            if true_boxes(record, shard, [0] * shard.samples["images"][number]) is None:
                raise UserError(f"{shard.folder}: not one whole image a question; {shard.again[:-1]} --resize=squash`")
            pairs = pair_up(read(line["prediction"]) or {}, record["boxes"])
            sheet.paste(draw_answer(shard.read_image(shard.samples["image"][number]), pairs), (x, y))
            said = f"{numbers['predicted']} predicted" if not numbers["unreadable"] else "unreadable"
            for dy, words, size in ((6, f"{name}: {', '.join(record['boxes'])}", 20), (58, line["id"], 15),
                                    (32, f"F-IoU {numbers[MAIN]:.0f}: {said}, {numbers['true']} true", 18)):
                draw.text((x, y + SIDE + dy), words[:LETTERS], INK, font(size))
    try:
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
        sheet.save(config.out)
    except (OSError, ValueError) as error:  # the latter at a suffix that Pillow does not know
        raise UserError(f"--out={config.out}: {error}") from None
    print(f"{config.out} drawn")


if __name__ == "__main__":
    run(main, parse_command_line(Config))
