"""
Write one page to look at a model's answers: each image, its questions, and what was answered to them.

    python extras/look/browse.py --run=out/path_vqa

needs an evaluation by `python eval_vqa.py`, and the prepared data for the images; of several it shows
the newest of each dataset, and one alone where --run is its folder. The page is a single file that any
browser opens and that loads nothing. It filters by right and wrong, dataset, type, words and F-IoU, and by
whether the image helped; boxes are drawn over their image, true ones dashed; of a multiple choice the right
option is marked, and which one the model takes by each reading; a report stands beside its reference. It
contains the images: pass it on only where you may pass on the data. How it looks and works is in
extras/look/browse.html.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import base64
import hashlib
import io
import json
import re
from dataclasses import dataclass

from PIL import Image

from plumbing.flags import UserError, parse_command_line, run
from plumbing.shards import Shard
from tasks import boxes, choices, reports
from tasks.evaluations import choose_evaluations, file_of, find_evaluations, read_predictions
from tasks.foreign import read_note
from tasks.reasoning import answer_of
from tasks.splits import task_of
from tasks.vqa import as_asked, bleu1, exact_match, references_of

SIZE, QUALITY = 224, 80  # of the images: pixels of the longer side at most, and of the JPEG
FIELDS = ("id", "dataset", "image", "question", "answer", "prediction", "type")
OTHERS = ("image shuffled", "prior left out", "order swapped", "question only", "constant report", "commonest option",
          "longest option")  # rows of eval_vqa.py's tables beside the model's


@dataclass(frozen=True)
class Config:
    run: str = ""  # folder of a run, or of one evaluation; none: the run in out/ that was evaluated last
    shards_dir: str = "shards"  # where prepare/all.py put the images
    limit: int = 0  # only the first so many questions; 0: all
    out: str = ""  # the page; none: answers.html in the run's folder


# ----------------------------------------------------------------------------- what was answered

def what_is_wrong(text):
    """With a line of a file of answers; "" where nothing is."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return "no JSON"
    if not isinstance(line, dict):
        return "no JSON object"
    strings = {name: line.get(name) for name in FIELDS} | {"seen": line.get("seen", "")}
    odd = [name for name, value in strings.items() if not isinstance(value, str)]
    references = line.get("references", [])
    if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
        odd.append("references")
    if odd:
        return f"without {', '.join(odd)}, or not as text"
    return "" if re.fullmatch(r"[\w.-]+/[\w.-]+", line["dataset"]) else \
        f"dataset {line['dataset']!r} is not <name>/<split>"


def read_lines(path):
    """{(dataset, id): line} of a file that eval_vqa.py wrote, in its order."""
    again, lines = "write it with `python eval_vqa.py`", {}
    for number, text in enumerate(read_predictions(path).splitlines(), start=1):
        if wrong := what_is_wrong(text):
            raise UserError(f"{path}: line {number}: {wrong}; {again}")
        line = json.loads(text)
        if (key := (line["dataset"], line["id"])) in lines:
            raise UserError(f"{path}: line {number}: repeats id {key[1]!r} of {key[0]}; {again}")
        lines[key] = line
    if not lines:
        raise UserError(f"{path}: empty; {again}")
    return lines


def some(keys):
    """How many and the first of them: 12 (id 'test_1', 'test_2', 'test_3', ...)"""
    ids = [repr(name) for _, name in dict.fromkeys(key[:2] for key in keys)]
    return f"{len(ids):,} (id {', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''})"


def asked(lines):
    """What two files about the same questions have in common."""
    return {(*key, line["question"], line["answer"]) for key, line in lines.items()}


def read_blind(path, lines):
    """A baseline's lines: all questions of each dataset that it has, for eval_vqa.py may skip one."""
    blind = read_lines(path)
    datasets = {dataset for dataset, _ in blind}
    wanted = {key: line for key, line in lines.items() if key[0] in datasets}
    if odd := sorted(asked(blind) ^ asked(wanted)):
        raise UserError(f"{path}: other questions than in predictions.jsonl, {some(odd)}; write both "
                        "with `python eval_vqa.py`, or delete it")
    return blind


def find_folders(place):
    """Those of the newest evaluation of each dataset; or a folder of answers alone, perhaps not ours."""
    if place and not find_evaluations(place) and (Path(place) / "predictions.jsonl").exists():
        return [Path(place)]
    return [folder for folder, _ in choose_evaluations(place).values()]


def read_rows(folders):
    """{row of the table: {(dataset, id): line}} of evaluations, the model's first."""
    rows = {"model": {}}
    for folder in folders:
        lines = read_lines(folder / file_of("model"))
        rows["model"] |= lines
        for row in OTHERS:
            if (folder / file_of(row)).exists():
                rows.setdefault(row, {}).update(read_blind(folder / file_of(row), lines))
    return {row: rows[row] for row in ("model", *OTHERS) if row in rows}


def find_samples(lines, shards_dir, folder):
    """{(dataset, id): (Shard, number of its sample, its record as it was asked)}"""
    samples_of = {}
    for name in dict.fromkeys(dataset for dataset, _ in lines):
        shard = Shard(Path(shards_dir) / name)
        shard.require_questions()
        samples = {(record["id"], record["question"]): (shard, number, record)
                   for number, record in enumerate(map(as_asked, shard.read_records()))}
        keys = {key: (key[1], line["question"]) for key, line in lines.items() if key[0] == name}
        if odd := [key for key, question in keys.items() if question not in samples]:
            raise UserError(f"{shard.folder}: lacks {some(odd)} of {len(keys):,} questions answered; "
                            f"answer those that it has with `python eval_vqa.py --run={folder}`")
        samples_of |= {key: samples[question] for key, question in keys.items()}
    return samples_of


# ----------------------------------------------------------------------------- the page

def scored_boxes(text, record):
    """F-IoU, and the boxes of the answer, [label, corners] of each; None where it is unreadable."""
    found = boxes.read(text)
    pairs = boxes.pair_up(found or {}, record["boxes"])
    return {"f_iou": round(boxes.score(record, text)[boxes.MAIN], 2), "boxes": None if found is None
            else [[label, *box] for label, (some, _) in pairs.items() for box in some.clip(-9999, 9999).tolist()]}


def scored_choice(line, record):
    """The place of the option that an answer names, None where it names none, and {reading: that of the likeliest}."""
    place = choices.read(record, answer_of(line, line["prediction"]))
    note = read_note(line["dataset"], repr(line["id"]), line, record)
    return {"option": place, "exact": place == choices.right_of(record),
            "readings": choices.choose(note["likelihoods"]["as asked"]) if note else {}}


def scored(line, record, task):
    """An answer as the page shows it, by its task. Of several references the best counts, for each score."""
    text, references = line["prediction"], references_of(line)
    if "boxes" in record:
        return {"text": text} | scored_boxes(text, record)
    if task is choices and record.get("choices"):
        return {"text": text} | scored_choice(line, record)
    if task is reports:
        return {"text": text, "rouge_l": round(reports.score(line, text)[reports.MAIN], 2)}
    return {"text": text, "bleu1": round(max(bleu1(text, other) for other in references), 4),
            "exact": any(exact_match(text, other) for other in references)}


def options_of(record):
    """A multiple choice as the page shows it: its question without options, the options, the right one's place."""
    stem, lettered = choices.stem_of(record)
    options = choices.letter_options(record["choices"]) if lettered else record["choices"]
    return {"stem": stem, "options": options, "right": choices.right_of(record)}


def true_boxes(record, shard, numbers):
    """[label, corners] of each true box of a question, thousandths; None where its image is not stored whole."""
    if len(numbers) != 1 or shard.manifest["image"]["resize"] in ("crop", "pad"):
        return None
    return [[boxes.plain(label), *box] for label, some in record["boxes"].items() for box in some]


def jpeg(images):
    """Images, each (H, W, 3) uint8, side by side, as base64 of a JPEG."""
    images, stream = list(map(Image.fromarray, images)), io.BytesIO()
    for image in images:
        image.thumbnail((SIZE, SIZE), Image.Resampling.BICUBIC)
    page = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)))
    for number, image in enumerate(images):
        page.paste(image, (sum(before.width for before in images[:number]), 0))
    page.save(stream, "JPEG", quality=QUALITY, optimize=True)
    return base64.b64encode(stream.getvalue()).decode()


def words_before(record):
    """What stood before a question, beside images: texts and roles, context and earlier turns, as one text."""
    parts = [part if isinstance(part, str) else part["role"] and f"[{part['role']}]"
             for part in record.get("parts", [])]
    turns = [f"{question} {answer}" for question, answer in record.get("earlier", [])]
    return "\n".join(filter(None, [*parts, record.get("context", ""), *turns]))


def fill_in(template, content):
    """The page: the data in their place, and the one script that may run named by its hash."""
    script = re.search(r"<script>(.*?)</script>", template, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Without "<" no text can end the element that holds it, or open a comment.
    text = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    before, after = template.replace("SCRIPT_HASH", f"sha256-{digest}").split('id="data">null<')
    return f'{before}id="data">{text}<{after}'


def main(config):
    if config.limit < 0:
        raise UserError(f"--limit={config.limit}: 0 or more")
    folders = find_folders(config.run)
    folder = Path(config.run) if config.run else folders[0].parent.parent  # the run
    rows = read_rows(folders)
    lines = rows["model"]
    samples = find_samples(lines, config.shards_dir, folder)

    images, questions = {}, []  # images: (dataset, numbers of those that are asked about) -> (place, base64)
    for key in list(lines)[:config.limit or None]:
        line, (shard, number, record) = lines[key], samples[key]
        tokens = shard.read_sample(number).tokens
        numbers = (-1 - tokens[tokens < 0]).tolist()
        shown = key[0], tuple(numbers)
        if numbers and shown not in images:
            images[shown] = len(images), jpeg([shard.read_image(image) for image in numbers])
        questions.append({
            "id": line["id"], "dataset": line["dataset"], "type": line["type"], "name": line["image"],
            "image": images[shown][0] if numbers else -1, "context": words_before(record),
            "question": line["question"], "references": references_of(line), "seen": line.get("seen"),
            "boxes": true_boxes(record, shard, numbers) if "boxes" in record else None,
            "choice": options_of(record) if task_of(shard) is choices and record.get("choices") else None,
            "answers": [scored(answered[key], record, task_of(shard)) if key in answered else None
                        for answered in rows.values()]})
    page = fill_in(Path(__file__).with_name("browse.html").read_text(encoding="utf-8"), {
        "run": folder.resolve().name, "rows": list(rows),
        "images": [content for _, content in images.values()], "questions": questions})

    out = Path(config.out) if config.out else folder / "answers.html"
    partial = out.parent / f".{out.name}.partial"  # the page is there whole or not at all
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(page, encoding="utf-8", newline="\n")
        partial.replace(out)
    except OSError as error:
        if partial.exists():
            partial.unlink()
        raise UserError(f"{out}: {error.strerror}") from None
    print(f"{out}: {len(questions):,} questions about {len(images):,} images, {len(page) / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main, parse_command_line(Config))
