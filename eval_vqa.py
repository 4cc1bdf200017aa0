"""
Answer the questions of test splits with a trained model, and score the answers.

    python eval_vqa.py                       the newest run, on every prepared test split of questions
    python eval_vqa.py --run=out/x --data=path_vqa --blind=none
    python eval_vqa.py --image=scan.png --question="what is shown?"       one answer, without scores

Every score stands beside two that see no image: the same model with the images exchanged among the
questions, and the most frequent training answer to the same question. What the model gains over
them is what it saw. It stands twice: over all questions, and over those whose words and image were
not trained on.

Each dataset's evaluation is a folder in <run>/eval/, with results.json and predictions*.jsonl
(tasks/evaluations.py), where extras/look/scales.py (other conventions) and extras/look/browse.py (a page to
look at) find them. The metrics are in tasks/vqa.py, what a run has seen in tasks/seen.py.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from plumbing.flags import BatchSize, Device, Range, Text, UserError, Whole, parse_command_line, run


@dataclass(frozen=True)
class Config:
    run: str = ""  # folder of a train_vlm.py run, or one of its checkpoints; none: the newest in out/
    image: str = ""  # with --question: the image file that it is about; none: it is about none
    question: Text = ""  # to answer instead of test splits
    data: str = ""  # prepared datasets; none: all that ask about images
    split: str = "test"  # split to answer
    shards_dir: str = "shards"  # where prepare/all.py put them
    out: str = ""  # where evaluations are written, a folder each; none: eval/ in the run's folder
    blind: Literal["both", "none", "shuffle"] = "both"  # images: right and exchanged, right, exchanged
    batch_size: BatchSize = 32  # images answered together, with all their questions
    max_new_tokens: Annotated[int, Range(1, 1 << 16)] = 32  # longest answer; reports are longer
    temperature: Annotated[float, Range(0, 1e3)] = 0.0  # 0: greedy; else the batch counts, too
    limit: Whole = 0  # only the first so many questions of a dataset; 0: all
    seed: Whole = 0  # of the exchange, of sampling and of the intervals
    device: Device = "auto"  # cuda, mps or cpu
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: on a GPU bfloat16, or float16 if it has none


if __name__ == "__main__":
    CONFIG = parse_command_line(Config)  # before torch is imported: --help and a typo are answered at once

import itertools
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import Shard, Tokenizer, format_prompt, read_settings
from model import VLM
from plumbing.files import find_run, read_manifest
from plumbing.devices import autocast_to, describe_machine, join_group, pick_device
from plumbing.pixels import load_image, resize_image
from plumbing.devices import together
from tasks.evaluations import encode, place_of, require_room, write_evaluation
from tasks.seen import find_seen, open_trained, training_records
from tasks.stats import draw_units
from tasks.vqa import question_only_answers, report, report_faults, score, shuffled_images

QUESTIONS_PER_ROW = 32  # that share an image's keys and values; more of them start another row


# ----------------------------------------------------------------------------- answers

def answer(model, tokenizer, shard, shown, config):
    """
    The model's answers to a shard's first n questions, as text, {row of the table: list of n}, and
    whether each was cut, for it has config.max_new_tokens tokens: {row: list of n}.

    shown: {row: (n,) number of the image to show with each question, -1 for none}. A question is
    asked once a row, and all that is asked about an image, in whatever row, shares what it gives. Of
    several processes each answers a part, and all get all answers.
    """
    questions = defaultdict(list)  # image -> (row, number of the question)
    for row, images in shown.items():
        for number, image in enumerate(images.tolist()):
            questions[image if image >= 0 else -1 - number].append((row, number))
    groups = [(image, asked[begin:begin + QUESTIONS_PER_ROW]) for image, asked in questions.items()
              for begin in range(0, len(asked), QUESTIONS_PER_ROW)]
    prompt_length = shard.samples["prompt"]
    groups.sort(key=lambda group: -sum(int(prompt_length[number]) for _, number in group[1]))
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    groups = groups[rank::ranks]

    def inputs():
        for image, asked in groups:
            yield (shard.read_image(image) if image >= 0 else None,
                   [shard.read_tokens(number)[0].tolist() for _, number in asked])

    def generate():
        given = []  # (row, number, answer, whether it was cut)
        with tqdm(total=sum(len(asked) for _, asked in groups), unit="question", leave=False,
                  desc=shard.folder.parent.name, disable=rank > 0) as progress:
            for group, replies in model.generate(inputs(), config.max_new_tokens, config.temperature,
                                                 config.batch_size):
                for (row, number), tokens in zip(groups[group][1], replies, strict=True):
                    text, at_the_limit = tokenizer.decode(tokens), len(tokens) == config.max_new_tokens
                    given.append((row, number, text, at_the_limit))
                progress.update(len(replies))
        return given

    torch.manual_seed(config.seed)
    given = together(generate)
    parts = [given] * ranks
    if ranks > 1:
        dist.all_gather_object(parts, given)
    answers = {row: [""] * len(images) for row, images in shown.items()}
    cut = {row: [False] * len(images) for row, images in shown.items()}
    for row, number, text, at_the_limit in itertools.chain(*parts):
        answers[row][number], cut[row][number] = text, at_the_limit
    return answers, cut


def ask(model, tokenizer, question, image="", resize="squash", max_new_tokens=32, temperature=0.0):
    """
    The answer to one question, as text. image: path of an image file, "" for none; resize: how it is
    made square, as the training images were (plumbing.pixels.resize_image). Raises UserError when it is no image.
    """
    pixels = None
    if image:
        size = model.vision.config.image_size
        try:
            pixels = np.asarray(resize_image(load_image(Path(image).read_bytes(), 2 * size), size, resize))
        except Exception as error:  # each decoder has its own ways to fail on a broken file
            raise UserError(f"{image}: not an image that can be read ({error})") from None
    prompt = tokenizer.encode(format_prompt(question))
    ((_, (tokens,)),) = model.generate([(pixels, [prompt])], max_new_tokens, temperature)
    return tokenizer.decode(tokens)


def open_run(name):
    """
    (folder, checkpoint, what is written down of its training, tokenizer) of a run or checkpoint. What the
    checkpoint was sealed with counts more than config.json. Raises UserError where something is not right.
    """
    folder, checkpoint = find_run(name)
    sealed = read_manifest(checkpoint)
    if sealed is None:
        raise UserError(f"{checkpoint}: whole a moment ago, now not to be read; see to the disk")
    trained, tokenizer = read_settings(folder / "config.json") | sealed, Tokenizer(folder / "tokenizer.model")
    if trained.get("tokenizer_sha256", tokenizer.sha256) != tokenizer.sha256:
        raise UserError(f"{tokenizer.path}: not the one that the run was trained with; bring that back")
    return folder, checkpoint, trained, tokenizer


def answer_one(config):
    """The answer to --question, about --image where one is named. Raises UserError for a bad one."""
    if not config.question.strip():
        raise UserError("--image: give a --question about it, too")
    folder, checkpoint, trained, tokenizer = open_run(config.run)
    length, room = len(tokenizer.encode(format_prompt(config.question))), trained["flags"]["row_length"]
    if length > room:
        raise UserError(f"--question: {length:,} tokens; this model was trained on rows of {room:,}, so ask "
                        "a shorter one")
    if config.image and not Path(config.image).is_file():
        what = "a folder" if Path(config.image).is_dir() else "no such file"
        raise UserError(f"--image={config.image}: {what}; name one image file")
    device, dtype = pick_device(config.device, config.dtype)
    model = VLM.load(checkpoint, dtype, device).eval()
    torch.manual_seed(config.seed)
    with autocast_to(device, dtype):
        return ask(model, tokenizer, config.question, config.image, trained.get("resize", "squash"),
                   config.max_new_tokens, config.temperature)


# ----------------------------------------------------------------------------- which questions

def name_datasets(config):
    """The datasets of --data, or else all that have the split. UserError for a weight and a missing split."""
    shards_dir = Path(config.shards_dir)
    if not config.data:
        return sorted(folder.parent.name for folder in shards_dir.glob(f"[!.]*/{config.split}"))
    names = [name.strip() for name in config.data.split(",")]
    for name in names:
        if not name or ":" in name:
            raise UserError(f"--data={config.data}: names with commas between, without weights")
        there = sorted(path.parent.name for path in shards_dir.glob(f"{name}/[!.]*/manifest.json"))
        if there and config.split not in there:
            raise UserError(f"--split={config.split}: {shards_dir / name} has no such split; it has "
                            f"{', '.join(there)}")
    return names


def find_misfit(shard, tokenizer, resize):
    """Why a run of this tokenizer and resize cannot be asked a shard's questions, and what to run; or ""."""
    here = shard.manifest["image"]["resize"]
    mend = f"run `python prepare/all.py --only={shard.folder.parent.name}"
    if shard.manifest["tokenizer_sha256"] != tokenizer.sha256:
        return f"made with another tokenizer than the run; {mend} --tokenizer={tokenizer.path}`"
    if resize and here != resize and len(shard.image_index):
        return f"images made by --resize={here}, the run's by --resize={resize}; {mend} --resize={resize}`"
    return ""


def open_shards(config, tokenizer, resize=""):
    """
    The splits that --data names, or else all that ask about images in this tokenizer's tokens and, where
    `resize` is given, whose images were made square that way.
    """
    shards, left_out = [], []
    for name in dict.fromkeys(name_datasets(config)):
        shard = Shard(Path(config.shards_dir) / name / config.split)
        misfit = find_misfit(shard, tokenizer, resize)
        if config.data:
            shard.require_questions()
            if misfit:
                raise UserError(f"{shard.folder}: {misfit}")
        elif shard.manifest["kind"] != "image questions" or not len(shard):
            continue
        elif misfit:
            left_out.append(f"{shard.folder}, {misfit}")
            continue
        shards.append(shard)
    if not shards:
        but = f", but {left_out[0]}" if left_out else "; run `python prepare/all.py --only=path_vqa " \
            f"--tokenizer={tokenizer.path}`"
        raise UserError(f"{config.shards_dir}: no {config.split} split of questions about images{but}")
    for why in left_out:
        print(f"not answered: {why}")
    return shards


# ----------------------------------------------------------------------------- one evaluation

def name_evaluation(checkpoint, shard, config):
    """The name of its folder: checkpoint, dataset, split, and each flag that is not as usual."""
    words = {"limit": "first_{}", "blind": "blind_{}", "max_new_tokens": "{}_tokens",
             "temperature": "temperature_{}", "seed": "seed_{}", "dtype": "{}"}
    return "_".join([checkpoint.name, shard.folder.parent.name, shard.folder.name, *(
        word.format(getattr(config, flag)) for flag, word in words.items()
        if getattr(config, flag) != getattr(Config, flag))])


def list_facts(checkpoint, shard, splits, config, device, dtype):
    """What an evaluation's numbers stand on, as a dict: two of the same have the same results."""
    flags = ["limit", "blind", "max_new_tokens", "temperature", "seed"]
    flags += ["batch_size"] * (config.temperature > 0)
    return {"checkpoint": read_manifest(checkpoint)["checksum"], "data": shard.manifest["checksum"],
            "trained": splits if isinstance(splits, str) else {
                name: train.manifest["checksum"] for name, (train, _) in splits.items()},
            "flags": {flag: getattr(config, flag) for flag in flags},
            "device": device.type, "dtype": str(dtype)}


def show_images(shard, count, config):
    """{row of the table: (count,) number of the image that is shown with each question, -1 for none}."""
    images = shard.samples["image"][:count].astype(np.int64)
    shown = {} if config.blind == "shuffle" else {"model": images}
    if config.blind != "none" and len(np.unique(images[images >= 0])) > 1:
        shown["image shuffled"] = shuffled_images(images, config.seed)
    if not shown:
        raise UserError(f"--blind=shuffle: {shard.folder} has no two images to exchange; leave --blind "
                        "out, or name other --data")
    return shown


def require_answerable(shards, out, config):
    """Raise UserError where the lines of all answers do not fit into their place, were all answers empty."""
    needed = 0
    for shard in shards:
        records = shard.read_records()[:config.limit or None]
        rows = len(show_images(shard, len(records), config)) + 1
        needed += rows * len(encode({"dataset": shard.folder.parent.name, **record, "prediction": ""}
                                    for record in records))
    require_room(out, needed)


def conclude(shard, shown, answers, cut, splits, trained, config):
    """
    Score the answers to a shard's first questions and print the tables. Returns them as a dict, and
    {row: lines for its file of answers}.
    """
    name = f"{shard.folder.parent.name}/{shard.folder.name}"
    count = len(next(iter(answers.values())))
    records, images = shard.read_records()[:count], shard.samples["image"][:count].astype(np.int64)
    why = splits if isinstance(splits, str) else ""
    if not why:
        train = training_records(splits, shard.folder.parent.name)
        answers["question only"] = question_only_answers(train, records)
    scores = {row: np.array([score(*pair) for pair in zip(records, replies, strict=True)])
              for row, replies in answers.items()}
    seen = find_seen(shard, records, splits, trained)
    unit, units = draw_units(images, [record.get("group", "") for record in records])
    types = [record["type"] for record in records]
    tables = report(name, scores, images, types, seen, config.seed, unit, units)
    tables["answers"] = report_faults(answers, cut, config.max_new_tokens)
    if why:
        print(f"no row of question only: {why}")
    lines, first_name = defaultdict(list), dict(zip(reversed(images.tolist()), reversed(records)))
    for number, record in enumerate(records):  # one name for each image
        about = {"image": first_name[images[number]]["image"]} if images[number] >= 0 else {}
        about |= {"seen": seen[number]} if isinstance(seen, list) else {}
        for row, replies in answers.items():
            end = {"cut": True} if row in cut and cut[row][number] else {}
            lines[row].append({"dataset": name, **record, **about, "prediction": replies[number], **end})
    return {name: tables | {"manifest": shard.manifest["checksum"]}}, lines


def open_all(config):
    """(checkpoint, what its run wrote down, tokenizer, shards to answer, what it was trained on, place)."""
    folder, checkpoint, trained, tokenizer = open_run(config.run)
    shards = open_shards(config, tokenizer, trained.get("resize", ""))
    out = Path(config.out) if config.out else folder / "eval"
    require_answerable(shards, out, config)
    return checkpoint, trained, tokenizer, shards, open_trained(trained, config.shards_dir), out


def load(checkpoint, shards, device, dtype):
    """The model of a checkpoint. Raises UserError where it reads images of another size than the shards'."""
    model = VLM.load(checkpoint, dtype, device).eval()
    for shard in shards:
        shard.require_image_size(model.vision.config.image_size)
    return model


def main(config):
    if config.question or config.image:
        return print(answer_one(config))
    device, dtype = pick_device(config.device, config.dtype)
    rank, _, device = join_group(device)
    checkpoint, trained, tokenizer, shards, splits, out = together(lambda: open_all(config))
    model = together(lambda: load(checkpoint, shards, device, dtype))
    print(f"{checkpoint} on {device}, {dtype}")

    def finish(shard, shown, answers, cut, seconds):
        results, lines = conclude(shard, shown, answers, cut, splits, trained, config)
        asked = sum(map(len, shown.values()))
        print(f"{asked:,} answers in {seconds:.1f} s, {asked / seconds:.0f} a second")
        facts = list_facts(checkpoint, shard, splits, config, device, dtype)
        folder = place_of(out, name_evaluation(checkpoint, shard, config), facts)
        write_evaluation(folder, {
            "checkpoint": checkpoint.name, "stands_on": facts, "flags": asdict(config), "seconds": seconds,
            "machine": describe_machine(device), "results": results, "training": {
                name: fact for name, fact in trained.items()
                if name not in ("files", "checksum", "name")}}, lines)
        print(f"scores in {folder}/results.json, answers in predictions*.jsonl beside it")

    for shard in shards:
        shown = show_images(shard, min(config.limit or len(shard), len(shard)), config)
        begin = time.perf_counter()
        with autocast_to(device, dtype):
            answers, cut = answer(model, tokenizer, shard, shown, config)
        seconds = time.perf_counter() - begin
        together(lambda: rank or finish(shard, shown, answers, cut, seconds))


if __name__ == "__main__":
    run(main, CONFIG)
