"""
Answer the questions of test splits with a trained model, and score the answers.

    python eval_vqa.py                       the newest run, on every prepared test split about images
    python eval_vqa.py --data=all            on every prepared test split, in one table; goes on where it stopped
    python eval_vqa.py --run=out/x --data=path_vqa --blind=none
    python eval_vqa.py --image=scan.png --question="what is shown?"       one answer, without scores
    python eval_vqa.py --predictions=theirs.jsonl --data=med_qa           anybody's answers, in the same tables
    python eval_vqa.py --ask=questions.csv --images=folder                a table of questions, or one about each image
    python eval_vqa.py --run=out/x --against=out/y                        two runs, question by question
    python eval_vqa.py --report=true                                      all runs, means over their seeds and folds

Every score stands beside some that see no image: the same model with the images exchanged among the
questions, and what words alone give, such as the most frequent training answer. What the model gains over
them is what it saw. It stands twice: over all questions, and over those whose words and image were
not trained on. A sample may have several images, or none; of a conversation its last turn is asked.

Each dataset's evaluation is a folder in <run>/eval/, with results.json and predictions*.jsonl
(tasks/evaluations.py), where extras/look/scales.py (other conventions) and extras/look/browse.py (a page to
look at) find them. How answers are scored is in tasks/: vqa.py, choices.py, reports.py, boxes.py; what a run
has seen in tasks/seen.py.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from plumbing.flags import (BatchSize, Device, Range, Share, Slices, Text, UserError, Whole, Window,
                            parse_command_line, run)


@dataclass(frozen=True)
class Config:
    run: str = ""  # folder of a train_vlm.py run, of its seeds, or a checkpoint of one; none: the newest in out/
    checkpoint: str = ""  # of the run: best by held-out loss, or a name such as step_000500; none: the newest
    image: str = ""  # with --question: the image file or scan that it is about; none: it is about none
    question: Text = ""  # to answer instead of test splits
    ask: Text = ""  # csv or JSON lines of questions to answer, or one question about each of the --images
    images: str = ""  # folder of images and scans that --ask is about; none: that of its table
    answers: str = ""  # csv that --ask writes; none: beside its table, or out/answers.csv
    window: Window = "auto"  # of scans, as prepare/all.py --window says; auto: as the run's were prepared
    slices: Slices = "all"  # of a volume that is asked about: all, middle, every:5, or so many at even distances
    data: str = ""  # prepared datasets; none: all that ask about images; all: whatever has questions, and one table
    split: str = "test"  # split to answer
    predictions: str = ""  # score the answers of this file of JSON lines, anybody's, in place of a run's
    against: str = ""  # compare the run's evaluations with those of this run, question by question; answer nothing
    report: bool = False  # one table of all evaluations in out/, or below --run=a,b, over seeds; answer nothing
    shards_dir: str = "shards"  # where prepare/all.py put them
    out: str = ""  # where evaluations are written, a folder each; none: eval/ in the run's folder
    blind: Literal["both", "none", "shuffle"] = "both"  # images: right and exchanged, right, exchanged
    batch_size: BatchSize = 32  # images, or studies, answered together, with all their questions
    max_new_tokens: Annotated[int, Range(0, 1 << 16)] = 0  # longest answer; 0: 32, or what boxes and reports need
    temperature: Annotated[float, Range(0, 1e3)] = 0.0  # 0: greedy; else the batch counts, too
    top_k: Whole = 0  # with a temperature: among the so many likeliest tokens; 0: all
    top_p: Share = 1.0  # with a temperature: among the fewest likeliest tokens with this much of the probability
    limit: Whole = 0  # only the first so many questions of a dataset; 0: all
    seed: Whole = 0  # of the exchange, of sampling and of the intervals
    device: Device = "auto"  # cuda, mps or cpu
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: 16 bits on a GPU
    base_bits: Literal["auto", "0", "16", "8", "4"] = "auto"  # of the frozen base; auto: as trained; 0: as --dtype


if __name__ == "__main__":
    CONFIG = parse_command_line(Config)  # before torch is imported: --help and a typo are answered at once

import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from asking import answer_rows, rate_options, reword
from generate import Sampling, finished_groups, generate
from plumbing.devices import agree, autocast_to, describe_machine, join_group, pick_device, share_out, together
from plumbing.files import read_manifest
from run import open_trained_run
from tasks import choices
from tasks.across import report_runs
from tasks.asked import open_rows, written
from tasks.evaluations import (each_seed, is_done, name_evaluation, place_of, read_evaluation, require_answerable,
                               unusual_flags, write_evaluation)
from tasks.scoring import compare_runs, conclude, list_facts, score_predictions
from tasks.seen import open_trained
from tasks.splits import answer_limit, count_questions, group_questions, open_splits, read_groups, show_images, task_of
from tasks.summary import write_summary
from weights import load_vlm


# ----------------------------------------------------------------------------- answers

def answer_own(config):
    """Answer --question, about --image, and print that; or the questions of --ask, into a csv."""
    if config.image and not config.question.strip():
        raise UserError("--image: give a --question about it, too")
    _, checkpoint, record, tokenizer = open_trained_run(config.run, config.checkpoint)
    rows = open_rows(config, record)
    device, dtype = pick_device(config.device, config.dtype)
    model = load_vlm(checkpoint, dtype, device, bits=config.base_bits).eval()
    sampling = Sampling(config.temperature, config.top_k, config.top_p, tokenizer.stops, tokenizer.vocab_size)
    torch.manual_seed(config.seed)
    answerer = [read_manifest(checkpoint)["checksum"], str(dtype)]
    with autocast_to(device, dtype), written(config, rows, answerer) as kept:
        answer_rows(model, tokenizer, rows, record, sampling, config, kept)


def answer(model, tokenizer, shard, count, shown, config):
    """
    The model's answers to a shard's first `count` questions, as text, {row of the table: list of count}, and what
    there is to say about each, {row: dicts}: "cut" where it has as many tokens as an answer may have, and of a
    multiple choice the "likelihoods" of its options.

    shown: what show_images gives. A question is asked once a row, and all that is asked about the same
    images, in whatever row, shares what they give. Of several processes each answers a part of the
    questions, and all get all answers.
    """
    longest, more = answer_limit(shard, config), reword(shard, tokenizer, count) if "model" in shown else []
    groups = group_questions(shard, count, shown, more)

    def answer_part(groups, rank, ranks):
        given, sampling = [None] * len(groups), Sampling(
            config.temperature, config.top_k, config.top_p, tokenizer.stops, tokenizer.vocab_size)
        passes = generate(model, read_groups(shard, groups), longest, sampling, config.batch_size,
                          log_probabilities=False)
        with tqdm(total=sum(map(len, groups)), unit="question", leave=False, desc=shard.folder.parent.name,
                  disable=rank > 0) as progress:
            for group, answers in finished_groups(passes):
                given[group] = [(tokenizer.decode(answer.tokens), len(answer.tokens) == longest) for answer in answers]
                progress.update(len(answers))
        return given

    torch.manual_seed(config.seed)
    rows = dict.fromkeys([*shown, *(question.row for question in more)])
    answers, notes = {row: [None] * count for row in rows}, {row: [{} for _ in range(count)] for row in rows}
    for questions, given in zip(groups, share_out(groups, answer_part), strict=True):
        for question, (text, cut) in zip(questions, given, strict=True):
            answers[question.row][question.number] = text
            notes[question.row][question.number] = {"cut": True} if cut else {}
    for row in {*rows} - {*shown}:  # to a question that cannot be put in other words the answer is the same
        same = [text is None for text in answers[row]]
        for some in (answers, notes):
            some[row] = [own if alike else one for one, own, alike in zip(some[row], some["model"], same)]
    if task_of(shard) is choices:
        for row, entries in rate_options(model, tokenizer, shard, count, shown).items():
            notes[row] = [note | {"likelihoods": entry} for note, entry in zip(notes[row], entries, strict=True)]
    return answers, notes


# ----------------------------------------------------------------------------- evaluations

def open_all(config):
    """(checkpoint, record of its training, tokenizer, shards to answer, what it was trained on, place)."""
    folder, checkpoint, trained, tokenizer = open_trained_run(config.run, config.checkpoint)
    shards = open_splits(config.data, config.split, config.shards_dir, tokenizer, trained["image"])
    out = Path(config.out) if config.out else folder / "eval"
    require_answerable(shards, out, config)
    return checkpoint, trained, tokenizer, shards, open_trained(trained, config.shards_dir), out


def load(checkpoint, shards, device, dtype, bits):
    """The model of a checkpoint. Raises UserError where it cannot read the shards' images."""
    model = load_vlm(checkpoint, dtype, device, bits=bits).eval()
    for shard in shards:
        model.vision.require_shapes(shard.folder, shard.image_index)
    return model


def main(config):
    if (config.top_k or config.top_p < 1) and not config.temperature:
        raise UserError("--top_k and --top_p: for sampled answers; give a --temperature, too, such as 0.7")
    if sum(map(bool, (config.question or config.image, config.ask, config.predictions, config.against,
                      config.report))) > 1:
        raise UserError("--question, --ask, --predictions, --against and --report: one at a time")
    if (config.images or config.answers) and not config.ask:
        raise UserError("--images and --answers: with --ask; a --question is about the --image that it names")
    if config.question or config.image or config.ask:
        return answer_own(config)
    if config.predictions:
        return score_predictions(config)
    if config.against:
        return compare_runs(config)
    if config.report:
        return report_runs(config)
    device, dtype = pick_device(config.device, config.dtype)
    rank, _, device = join_group(device)
    for one in together(lambda: each_seed(config)):
        evaluate(one, rank, device, dtype)


def evaluate(config, rank, device, dtype):
    """Answer all that a run is asked, and write an evaluation of each dataset."""
    checkpoint, trained, tokenizer, shards, splits, out = together(lambda: open_all(config))
    model = together(lambda: load(checkpoint, shards, device, dtype, config.base_bits))
    print(f"{checkpoint} on {device}, {dtype}")

    def finish(shard, folder, facts, answers, notes, seconds):
        asked = sum(map(len, answers.values()))
        results, lines = conclude(shard, answers, notes, splits, trained, config)
        print(f"{asked:,} answers in {seconds:.1f} s, {asked / seconds:.0f} a second")
        write_evaluation(folder, {
            "checkpoint": checkpoint.name, "stands_on": facts, "flags": asdict(config),
            "unusual_flags": unusual_flags(config), "seconds": seconds,
            "machine": machine, "results": results, "training": {
                name: fact for name, fact in trained.items()
                if name not in ("files", "checksum", "name")}}, lines)
        print(f"scores in {folder}/results.json, answers in predictions*.jsonl beside it")

    folders, hash, machine = [], read_manifest(checkpoint)["checksum"], describe_machine(device)
    for shard in shards:
        count, begin = count_questions(shard, config), time.perf_counter()
        facts = list_facts(hash, shard, splits, config, device.type, str(dtype), model.base_bits)
        folders.append(agree(lambda: place_of(out, name_evaluation(checkpoint, shard, config), facts)))
        if config.data == "all" and agree(lambda: is_done(folders[-1], facts, machine)):
            print(f"{folders[-1]}: there already")
            continue
        with autocast_to(device, dtype):
            answers, notes = answer(model, tokenizer, shard, count, show_images(shard, count, config), config)
        seconds = time.perf_counter() - begin
        together(lambda: rank or finish(shard, folders[-1], facts, answers, notes, seconds))
    if config.data == "all":
        together(lambda: rank or write_summary(out, [(folder, read_evaluation(folder)) for folder in folders]))


if __name__ == "__main__":
    run(main, CONFIG)
