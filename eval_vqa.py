"""
Answer the questions of test splits with a trained model, and score the answers.

    python eval_vqa.py                       the newest run, on every prepared test split of questions
    python eval_vqa.py --run=out/x --data=path_vqa --blind=none
    python eval_vqa.py --image=scan.png --question="what is shown?"       one answer, without scores

Every score stands beside two that see no image: the same model with the images exchanged among the
questions, and the most frequent training answer to the same question. What the model gains over
them is what it saw. It stands twice: over all questions, and over those whose words and image were
not trained on. Writes results.json and predictions*.jsonl into the run's folder, where
extras/scales.py (other conventions) and extras/browse.py (a page to look at) find them.

BLEU-1 is the convention of the PathVQA authors' own code: lower-cased, split at spaces, clipped
unigram precision times the brevity penalty, averaged over questions. Other published scales give
other figures for the same answers, by up to 40 points.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from plumbing.flags import Batch, Device, Range, Text, UserError, Whole, parse_command_line, run


@dataclass(frozen=True)
class Config:
    run: str = ""  # folder of a train_vlm.py run; none: the newest in out/
    image: str = ""  # with --question: the image file that it is about; none: it is about none
    question: Text = ""  # to answer instead of test splits
    data: str = ""  # prepared datasets; none: all that ask about images
    split: str = "test"  # split to answer
    shards_dir: str = "shards"  # where prepare/all.py put them
    blind: Literal["both", "none", "shuffle"] = "both"  # images: right and exchanged, right, exchanged
    batch_size: Batch = 32  # images answered together, with all their questions
    max_new_tokens: Annotated[int, Range(1, 1 << 16)] = 32  # longest answer
    temperature: Annotated[float, Range(0, 1e3)] = 0.0  # 0: greedy
    limit: Whole = 0  # only the first so many questions of a dataset; 0: all
    seed: Whole = 0  # of the exchange, of sampling and of the intervals
    device: Device = "auto"  # cuda, mps or cpu
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: on a GPU bfloat16, or float16 if it has none


if __name__ == "__main__":
    CONFIG = parse_command_line(Config)  # before torch is imported: --help and a typo are answered at once

import itertools
import json
import math
import time
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import Shard, Tokenizer, format_prompt, load_image, resize_image
from model import VLM
from plumbing.files import newest_checkpoint, write_whole
from plumbing.machine import autocast_to, describe_machine, join_group, pick_device

QUESTIONS_PER_ROW = 32  # that share an image's keys and values; more of them start another row
METRICS = ("BLEU-1", "exact match", "token F1", "closed accuracy", "open recall")
TYPES_SHOWN = 10


# ----------------------------------------------------------------------------- metrics

def bleu1(prediction, reference):
    """
    Sentence BLEU-1 in 0..1 (Papineni et al. 2002, unigrams only, no smoothing).

    >>> round(bleu1("lung", "left lung"), 3)  # precision 1, brevity penalty exp(1 - 2/1)
    0.368
    """
    predicted, wanted = prediction.lower().split(), reference.lower().split()
    if not predicted:
        return 0.0
    matches = sum((Counter(predicted) & Counter(wanted)).values())  # each word at most as often
    brevity = min(1.0, math.exp(1 - len(wanted) / len(predicted)))
    return brevity * matches / len(predicted)


def exact_match(prediction, reference):
    """1.0 where both are the same words, case aside."""
    return float(prediction.lower().split() == reference.lower().split())


def open_recall(prediction, reference):
    """The share of the reference's words that the prediction has, each at most as often, in 0..1."""
    predicted, wanted = Counter(prediction.lower().split()), Counter(reference.lower().split())
    return (predicted & wanted).total() / max(wanted.total(), 1)


def token_f1(prediction, reference):
    """Harmonic mean of recall and precision over words, in 0..1 (Rajpurkar et al. 2016)."""
    recall, precision = open_recall(prediction, reference), open_recall(reference, prediction)
    return 2 * recall * precision / (recall + precision) if recall else 0.0


def is_closed(reference):
    return reference.lower().strip() in ("yes", "no")


def score(record, prediction):
    """
    One answer's METRICS in percent, the best over all references that count as right; closed
    accuracy of a yes/no question alone and open recall of any other, nan where it has none.
    """
    references = record.get("references") or [record["answer"]]
    closed = all(map(is_closed, references))
    functions = (bleu1, exact_match, token_f1, exact_match if closed else None,
                 None if closed else open_recall)
    return [100 * max(function(prediction, reference) for reference in references) if function
            else math.nan for function in functions]


def bootstrap(values, groups, resamples=1000, seed=0):
    """
    Means over resampled questions, (resamples, K), of (n, K) values, nan where one does not apply.

    groups: (n,) the image of each question. Images are drawn, not questions: what is asked about one
    image is right or wrong together, and intervals that overlook it are too narrow.
    """
    _, groups = np.unique(groups, return_inverse=True)
    count = groups.max() + 1
    sums, counts = np.zeros((2, count, values.shape[1]))
    np.add.at(sums, groups, np.nan_to_num(values))
    np.add.at(counts, groups, ~np.isnan(values))
    generator, means = np.random.default_rng(seed), []
    for _ in range(resamples):
        drawn = np.bincount(generator.integers(count, size=count), minlength=count)
        with np.errstate(invalid="ignore"):  # a resample may hold no closed question at all
            means.append(drawn @ sums / (drawn @ counts))
    return np.stack(means)


# ----------------------------------------------------------------------------- answers

def question_only_answers(train, test):
    """
    The most frequent training answer to the same question, else to questions with the same first
    3, 2, 1 words, else to any. Looks at no image: what a score is worth without one.
    """
    def keys(question):
        words = question.lower().split()
        return [" ".join(words), *(" ".join(words[:n]) + " ..." for n in (3, 2, 1)), ""]

    answers = defaultdict(Counter)
    for record in train:
        for key in keys(record["question"]):
            answers[key][record["answer"].lower()] += 1
    return [next(answers[key].most_common(1)[0][0] for key in keys(record["question"])
                 if key in answers) for record in test]


def shuffled_images(image_of, seed):
    """For each question another image than its own, (n,): the images change places in a random cycle."""
    images, index = np.unique(image_of[image_of >= 0], return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(images))
    other = np.empty_like(order)
    other[order] = np.roll(order, 1)
    shown = image_of.copy()
    shown[image_of >= 0] = images[other[index]]
    return shown


def answer(model, tokenizer, shard, shown, config):
    """
    The model's answers to a shard's first n questions, as text, {row of the table: list of n}.

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

    given = []  # (row, number, answer)
    torch.manual_seed(config.seed)
    with tqdm(total=sum(len(asked) for _, asked in groups), unit="question", leave=False,
              desc=shard.folder.parent.name, disable=rank > 0) as progress:
        for group, replies in model.generate(inputs(), config.max_new_tokens, config.temperature,
                                             config.batch_size):
            for (row, number), tokens in zip(groups[group][1], replies, strict=True):
                given.append((row, number, tokenizer.decode(tokens)))
            progress.update(len(replies))
    parts = [given] * ranks
    if ranks > 1:
        dist.all_gather_object(parts, given)
    answers = {row: [""] * len(images) for row, images in shown.items()}
    for row, number, text in itertools.chain(*parts):
        answers[row][number] = text
    return answers


def ask(model, tokenizer, question, image="", resize="squash", max_new_tokens=32, temperature=0.0):
    """
    The answer to one question, as text. image: path of an image file, "" for none; resize: how it is
    made square, as the training images were (data.resize_image). Raises UserError when it is no image.
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


def find_seen(test, records, trained, config):
    """
    For each record of a test split why it is not new to the run, "words", "image", "words and image"
    or "" where it is; or the reason, as a str, why that is not known.

    words: the question with its answer occurs in what was trained on. image: it was trained on, too,
    the same or one alike, by the leaks.json beside the training split.
    """
    def words_of(record):
        return tuple(" ".join(record[part].lower().split()) for part in ("question", "answer"))

    if config.split != "test":
        return "training splits are compared with test splits alone"
    words, images = set(), set()
    for entry in trained["flags"]["data"].split(","):
        folder = Path(config.shards_dir) / entry.partition(":")[0].strip() / "train"
        if not folder.is_dir():
            return f"{folder}, which the run was trained on, is not here"
        train, guard = Shard(folder), trained.get("leaks", {}).get(folder.parent.name, {})
        drop = guard.get("leaks") == "drop"
        left_out = set(train.read_leaks()[1].tolist()) if drop else ()
        words |= {words_of(record) for number, record in enumerate(train.read_records())
                  if number not in left_out}
        compared = drop and guard["tests"].get(f"{test.folder.parent.name}/test")
        if compared != test.manifest["checksum"]:  # so that nothing was left out for this test's sake
            images |= set(train.read_leaked_images(test).tolist())
    return [" and ".join(["words"] * (words_of(record) in words) + ["image"] * (int(image) in images))
            for record, image in zip(records, test.samples["image"])]


# ----------------------------------------------------------------------------- tables

def summarise(scores, images, seed):
    """
    {row: {metric: [mean, low, high]}} of {row: (n, 5) scores}: means over the questions with 95%
    intervals, None where there is none. "model" and "image shuffled" are joined by a row of their
    difference, question by question.
    """
    rows = dict(scores)
    if {"model", "image shuffled"} <= rows.keys():
        rows["the image adds"] = rows["model"] - rows["image shuffled"]
    values = np.concatenate(list(rows.values()), axis=1)  # (n, rows * 5)
    with np.errstate(invalid="ignore"):
        means = np.nansum(values, axis=0) / (~np.isnan(values)).sum(axis=0)
    interval = np.percentile(bootstrap(values, images, seed=seed), (2.5, 97.5), axis=0)
    cells = iter([None if math.isnan(number) else number for number in cell]
                 for cell in np.stack([means, *interval], axis=1).tolist())
    return {row: {metric: next(cells) for metric in METRICS} for row in rows}


def print_cells(label, cells):
    """One line of a table, each cell a text or [mean, low, high]."""
    def number(value):
        return "100" if value >= 99.95 else f"{value:.1f}"

    texts = [cell if isinstance(cell, str) else "-" if None in cell else
             "{} [{} {}]".format(*map(number, cell)) for cell in cells]
    print(f"{label[:16]:16}" + "".join(f"{text:>17}" for text in texts))


def report(name, scores, images, types, seen, seed):
    """
    Print a dataset's tables: all questions, those that are new to the run, BLEU-1 by question type.
    Returns the same as a dict. scores: {row: (n, 5)}; seen: what find_seen gives.
    """
    new = np.array([not reason for reason in seen]) if isinstance(seen, list) else None
    tables = {}
    print(f"\n{name}: {len(images):,} questions about {len(np.unique(images)):,} images; percent, with "
          "95% intervals over images")
    for title, chosen in (("all", np.full(len(images), True)), ("new", new)):
        if chosen is None or not chosen.any():
            tables[title] = seen if chosen is None else "every question's words or image were trained on"
            print(f"questions new to the run: {'not known, ' * (chosen is None)}{tables[title]}")
            continue
        part = {row: values[chosen] for row, values in scores.items()}
        closed, opened = (~np.isnan(next(iter(part.values()))[:, 3:])).sum(axis=0).tolist()
        if title == "new":
            print(f"{chosen.sum():,} of them new to the run, in words and image:")
        print_cells("", (*METRICS[:3], f"closed ({closed:,})", f"open ({opened:,})"))
        tables[title] = {"questions": int(chosen.sum()), "closed": closed, "open": opened,
                         "rows": summarise(part, images[chosen], seed)}
        for row, cells in tables[title]["rows"].items():
            print_cells(row, cells.values())
    tables["types"] = {}
    for kind, questions in Counter(types).most_common():
        chosen = np.array([one == kind for one in types])
        rows = summarise({row: values[chosen] for row, values in scores.items()}, images[chosen], seed)
        tables["types"][kind] = {"questions": questions, "rows": rows}
    if len(tables["types"]) > 1:
        print_cells("BLEU-1 by type", ("questions", *rows))
        for kind, table in list(tables["types"].items())[:TYPES_SHOWN]:
            print_cells(kind or "none", (f"{table['questions']:,}",
                                         *(cells["BLEU-1"] for cells in table["rows"].values())))
        if (more := len(tables["types"]) - TYPES_SHOWN) > 0:
            print(f"and {more} rarer types, in results.json")
    return tables


# ----------------------------------------------------------------------------- one run

def newest_run():
    runs = sorted(Path("out").glob("*/step_*[0-9]"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError("no run in out/; run `python train_vlm.py`")
    return runs[-1].parent


def open_shards(config, tokenizer):
    """The splits that --data names, or else all that ask about images in this tokenizer's tokens."""
    names = [name.strip() for name in config.data.split(",")] if config.data else sorted(
        folder.parent.name for folder in Path(config.shards_dir).glob(f"[!.]*/{config.split}"))
    shards, left_out = [], []
    for name in dict.fromkeys(names):
        shard = Shard(Path(config.shards_dir) / name / config.split)
        other_tokens = shard.manifest["tokenizer_sha256"] != tokenizer.sha256
        if config.data:
            shard.require_questions()
            if other_tokens:
                raise UserError(f"{shard.folder}: made with another tokenizer than the run; run `python "
                                f"prepare/all.py --only={name} --tokenizer={tokenizer.path}`")
        elif shard.manifest["kind"] != "image questions" or not len(shard):
            continue
        elif other_tokens:
            left_out.append(name)
            continue
        shards.append(shard)
    mend = f"run `python prepare/all.py --only={','.join(left_out) or 'path_vqa'} " \
           f"--tokenizer={tokenizer.path}`"
    made = f"made with another tokenizer than the run ({', '.join(left_out)})"
    if not shards:
        raise UserError(f"{config.shards_dir}: no {config.split} split of questions about images"
                        f"{f', but those {made}' if left_out else ''}; {mend}")
    if left_out:
        print(f"not answered: those {made}; for them, {mend}")
    return shards


def main(config):
    if config.image and not config.question:
        raise UserError("--image: give a --question about it, too")
    folder = Path(config.run) if config.run else newest_run()
    checkpoint = newest_checkpoint(folder)
    trained = json.loads((folder / "config.json").read_text())
    tokenizer = Tokenizer(folder / "tokenizer.model")
    device, dtype = pick_device(config.device, config.dtype)
    if config.question:
        model = VLM.load(checkpoint, dtype, device).eval()
        torch.manual_seed(config.seed)
        with autocast_to(device, dtype):
            return print(ask(model, tokenizer, config.question, config.image, trained.get("resize", "squash"),
                             config.max_new_tokens, config.temperature))
    shards = open_shards(config, tokenizer)
    rank, _, device = join_group(device)
    model = VLM.load(checkpoint, dtype, device).eval()
    for shard in shards:
        shard.require_image_size(model.vision.config.image_size)
    print(f"{checkpoint} on {device}, {dtype}")

    results, lines = {}, defaultdict(list)  # lines: row of the table -> its answers
    for shard in shards:
        name = f"{shard.folder.parent.name}/{config.split}"
        records = shard.read_records()[:config.limit or None]
        images = shard.samples["image"][:len(records)].astype(np.int64)
        seen = find_seen(shard, records, trained, config)
        shown = {} if config.blind == "shuffle" else {"model": images}
        if config.blind != "none" and len(np.unique(images[images >= 0])) > 1:
            shown["image shuffled"] = shuffled_images(images, config.seed)
        begin = time.perf_counter()
        with autocast_to(device, dtype):
            answers = answer(model, tokenizer, shard, shown, config)
        seconds = time.perf_counter() - begin
        if rank:
            continue
        if (train := shard.folder.parent / "train").is_dir():
            answers["question only"] = question_only_answers(Shard(train).read_records(), records)
        scores = {row: np.array([score(*pair) for pair in zip(records, replies, strict=True)])
                  for row, replies in answers.items()}
        # A question about no image is a group of its own
        groups = np.where(images >= 0, images, -1 - np.arange(len(images)))
        tables = report(name, scores, groups, [record["type"] for record in records], seen, config.seed)
        asked = len(records) * len(shown)
        print(f"{asked:,} answers in {seconds:.1f} s, {asked / seconds:.0f} a second"
              + ("" if train.is_dir() else f"; no row of question only: {train} is not here"))
        results[name] = {"seconds": seconds, "manifest": shard.manifest["checksum"], **tables}
        first_name = dict(zip(reversed(images.tolist()), reversed(records)))  # one name for each image
        for number, record in enumerate(records):
            about = {"image": first_name[images[number]]["image"]} if images[number] >= 0 else {}
            about |= {"seen": seen[number]} if isinstance(seen, list) else {}
            for row, replies in answers.items():
                lines[row].append({"dataset": name, **record, **about, "prediction": replies[number]})
    if rank:
        return
    for path in folder.glob("predictions*.jsonl"):  # of an evaluation with other flags, perhaps
        path.unlink()
    for row in lines:
        path = folder / ("predictions.jsonl" if row == "model" else
                         f"predictions_{row.replace(' ', '_')}.jsonl")
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines[row])
        write_whole(path, text.encode())
    write_whole(folder / "results.json", (json.dumps(
        {"checkpoint": checkpoint.name, "flags": asdict(config), "machine": describe_machine(device),
         "training": trained, "results": results}, indent=2) + "\n").encode())
    print(f"\nanswers in {folder}/predictions*.jsonl, scores in {folder}/results.json")


if __name__ == "__main__":
    run(main, CONFIG)
