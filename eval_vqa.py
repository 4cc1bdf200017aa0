"""
Answer the questions of a test split and score the answers.

    python eval_vqa.py                       the newest run, on the datasets it was trained on
    python eval_vqa.py --run=out/x --data=path_vqa --blind=none

Every score stands beside two that see no image: the same model with the images shuffled among the
questions, and the most frequent training answer to the same question. What the model gains over
them is what it saw. Writes results.json and predictions.jsonl into the run's folder.

BLEU-1 is the convention of the PathVQA authors' own code: lower-cased, split at spaces, clipped
unigram precision times the brevity penalty, averaged over questions. Other published scales give
other figures for the same answers, by up to 40 points.
"""

import json
import math
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from data import Shard, Tokenizer, UserError, require_positive, run
from model import VLM, newest_checkpoint, pick_device


@dataclass(frozen=True)
class Config:
    run: str = ""  # folder of a train_vlm.py run; none: the newest in out/
    data: str = ""  # prepared datasets; none: those of the run that have the split
    split: str = "test"  # split to answer
    shards_dir: str = "shards"  # where prepare/all.py put them
    blind: Literal["both", "none", "shuffle"] = "both"  # images: right and shuffled, right, shuffled
    batch_size: int = 64  # questions answered together
    max_new_tokens: int = 32  # longest answer
    temperature: float = 0.0  # 0: greedy
    limit: int = 0  # only the first so many questions of a dataset; 0: all
    seed: int = 0  # of the shuffle and of sampling
    device: str = "auto"  # cuda, mps or cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where the GPU has it


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


def is_closed(reference):
    return reference.lower().strip() in ("yes", "no")


def score(records, predictions):
    """Means in percent over all questions, of exact match over the closed ones, and their counts."""
    bleu = [bleu1(p, r["answer"]) for r, p in zip(records, predictions, strict=True)]
    exact = [exact_match(p, r["answer"]) for r, p in zip(records, predictions, strict=True)]
    closed = [e for r, e in zip(records, exact) if is_closed(r["answer"])]
    return {"bleu1": 100 * float(np.mean(bleu)), "exact_match": 100 * float(np.mean(exact)),
            "closed_accuracy": 100 * float(np.mean(closed)) if closed else None,
            "questions": len(records), "closed_questions": len(closed)}


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


def shuffled_images(shard, seed):
    """For each image number another one's: a random cycle, so that none keeps its place."""
    order = np.random.default_rng(seed).permutation(len(shard.image_index))
    other = np.empty_like(order)
    other[order] = np.roll(order, 1)
    return other


def answer(model, tokenizer, shard, config, count, swap, device, autocast):
    """The model's answers to a shard's first `count` questions, as text. swap: image -> image shown."""
    torch.manual_seed(config.seed)
    image_of = shard.samples["image"][:count].astype(int)
    order = np.argsort(image_of, kind="stable")  # questions about an image share its tokens
    answers = [""] * count
    for begin in tqdm(range(0, count, config.batch_size), unit="batch", leave=False,
                      desc=f"{shard.folder.parent.name} {'shuffled' if swap is not None else ''}"):
        chosen = order[begin:begin + config.batch_size]
        shown, row = np.unique(image_of[chosen], return_inverse=True)
        if shown[0] < 0:  # text-only samples: np.unique has put their -1 first
            shown, row = shown[1:], row - 1
        pixels = [shard.read_image(n if swap is None else swap[n]) for n in shown]
        images = torch.from_numpy(np.stack(pixels)).to(device) if pixels else None
        prompts = [shard.read_tokens(n)[0].tolist() for n in chosen]
        with autocast:
            tokens = model.generate(prompts, images, row.tolist(), config.max_new_tokens,
                                    config.temperature)
        for number, reply in zip(chosen, tokens):
            answers[number] = tokenizer.decode(reply)
    return answers


# ----------------------------------------------------------------------------- tables

def score_types(records, predictions):
    """Question type -> scores, the most frequent type first."""
    types = Counter(record["type"] for record in records)
    chosen = {kind: [n for n, record in enumerate(records) if record["type"] == kind]
              for kind, _ in types.most_common()}
    return {kind: score([records[n] for n in numbers], [predictions[n] for n in numbers])
            for kind, numbers in chosen.items()}


def print_table(name, rows, types):
    """One dataset's scores, then by question type. rows, types: row name -> scores."""
    first = next(iter(rows.values()))
    print(f"\n{name}: {first['questions']:,} questions, {first['closed_questions']:,} of them closed")
    print(f"{'':16}{'BLEU-1':>10}{'exact':>10}{'closed':>10}")
    for row, scores in rows.items():
        cells = [scores[key] for key in ("bleu1", "exact_match", "closed_accuracy")]
        print(f"{row:16}" + "".join(f"{cell:10.1f}" if cell is not None else f"{'-':>10}"
                                    for cell in cells))
    kinds = next(iter(types.values()))
    if len(kinds) < 2:
        return
    print(f"{'BLEU-1 by type':16}" + "".join(f"{row:>16}" for row in rows) + f"{'questions':>12}")
    for kind in list(kinds)[:10]:
        print(f"{(kind or 'none')[:15]:16}" + "".join(f"{types[row][kind]['bleu1']:16.1f}" for row in rows)
              + f"{kinds[kind]['questions']:12,}")


def newest_run():
    runs = sorted(Path("out").glob("*/step_*[0-9]"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError("no run in out/; run `python train_vlm.py`")
    return runs[-1].parent


def main(config):
    require_positive(config, "batch_size", "max_new_tokens")
    folder = Path(config.run) if config.run else newest_run()
    checkpoint = newest_checkpoint(folder)
    trained = json.loads((folder / "config.json").read_text())
    tokenizer = Tokenizer(folder / "tokenizer.model")
    names = config.data or trained["flags"]["data"]
    folders = [Path(config.shards_dir) / name.partition(":")[0].strip() / config.split
               for name in names.split(",")]
    if not config.data:
        folders = [path for path in folders if path.is_dir()]
    shards = [shard for shard in map(Shard, folders) if config.data or len(shard)]
    if not shards:
        raise UserError(f"{config.shards_dir}: no {config.split} split of {names}; run "
                        f"`python prepare/all.py --only={names}`")
    for shard in shards:
        shard.require_questions()
        if shard.manifest["tokenizer_sha256"] != tokenizer.sha256:
            raise UserError(f"{shard.folder}: made with another tokenizer than {folder}; run `python "
                            f"prepare/all.py --tokenizer={folder}/tokenizer.model`")
    device, dtype = pick_device(config.device, config.dtype)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    model = VLM.load(checkpoint, dtype, device).eval()
    for shard in shards:
        shard.require_image_size(model.vision.config.image_size)
    print(f"{checkpoint} on {device}, {dtype}")

    results, lines = {}, defaultdict(list)  # lines: row of the table -> its answers
    for shard in shards:
        name = f"{shard.folder.parent.name}/{config.split}"
        count = min(config.limit or len(shard), len(shard))
        records, answers = shard.read_records()[:count], {}
        begin = time.perf_counter()
        if config.blind != "shuffle":
            answers["model"] = answer(model, tokenizer, shard, config, count, None, device, autocast)
        if config.blind != "none" and len(shard.image_index) > 1:
            swap = shuffled_images(shard, config.seed)
            answers["image shuffled"] = answer(model, tokenizer, shard, config, count, swap, device,
                                               autocast)
        seconds = time.perf_counter() - begin
        if (train := shard.folder.parent / "train").is_dir():
            answers["question only"] = question_only_answers(Shard(train).read_records(), records)
        rows = {row: score(records, predictions) for row, predictions in answers.items()}
        types = {row: score_types(records, predictions) for row, predictions in answers.items()}
        print_table(name, rows, types)
        results[name] = {"scores": rows, "types": types, "seconds": seconds,
                         "manifest": shard.manifest["checksum"]}
        for row, predictions in answers.items():
            lines[row] += [{"id": record["id"], "dataset": name, "image": record["image"],
                            "question": record["question"], "answer": record["answer"],
                            "prediction": prediction, "type": record["type"]}
                           for record, prediction in zip(records, predictions)]
    for row in lines:
        path = folder / ("predictions.jsonl" if row == "model" else
                         f"predictions_{row.replace(' ', '_')}.jsonl")
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines[row])
        path.write_text(text, encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(
        {"checkpoint": checkpoint.name, "flags": asdict(config), "training": trained,
         "results": results}, indent=2) + "\n")
    print(f"\nanswers in {folder}/predictions*.jsonl, scores in {folder}/results.json")


if __name__ == "__main__":
    run(main, Config)
