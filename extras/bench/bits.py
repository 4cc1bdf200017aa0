"""
What a base in few bits costs: in the outputs of its matrices, and in what LoRA learns on it.

    python extras/bench/bits.py --start=out/stage_2                          errors of outputs alone, in seconds
    python extras/bench/bits.py --start=out/stage_2 --data=sample    and learning, by train_vlm.py

The run that --start names, of train_vlm.py with --language=full, is the base. The matrices are its own and random
ones, inputs are normal; an error is |x W'^T - x W^T| / |x W^T|. Then LoRA on all seven kinds of matrices learns
--data on the base in 32, 8 and 4 bits, from the same seeds, the vision transformer frozen, and eval_vqa.py scores it
on the test split: what was trained on 4 bits also on the base in 32.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import itertools
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn as nn

from extras.bench.progress import Progress, tell
from extras.scripts import load_script
from plumbing.flags import Count, Scale, UserError, parse_command_line, run
from plumbing.sources import SEVEN
from quantize import LowLinear
from tasks.evaluations import find_evaluations, read_evaluation
from weights import load_run

BITS = (16, 8, 4)


@dataclass(frozen=True)
class Config:
    start: str = "out/stage_2"  # run of train_vlm.py whose language model was trained in full
    data: str = ""  # prepared dataset to learn; none: errors of outputs alone
    shards_dir: str = "shards"  # where prepare/all.py put it
    out: str = "out/bits"  # where the runs go
    steps: Count = 500  # of a run
    batch_size: Count = 16  # samples in a step
    seeds: Count = 3  # runs of each kind
    learning_rate: Scale = 3e-3  # peak
    lora_r: Count = 16  # rank; alpha is twice that


@torch.no_grad()
def output_error(weight, bits, inputs=256):
    """The relative error of x W^T with a weight (out, in) in few bits, for normal x."""
    with torch.device("meta"):
        low = LowLinear(nn.Linear(*reversed(weight.shape), bias=False), bits)
    low.store(weight)
    x = torch.randn(inputs, weight.shape[1], generator=torch.Generator().manual_seed(1))
    return ((low(x) - x @ weight.T).norm() / (x @ weight.T).norm()).item()


def matrices(model):
    """{kind: weights (out, in)}: random ones of LLaMA's width, and those of a model's blocks."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(4096, 1024, generator=generator)
    columns = torch.where(torch.rand(1024, generator=generator) < 0.01, 10.0, 1.0)
    tails = normal / (torch.randn(4, 4096, 1024, generator=generator).square().mean(0)).sqrt()  # Student's t, 4 degrees
    kinds = defaultdict(list, {"normal": [normal], "normal, 1% of the columns x 10": [normal * columns],
                               "heavy tails (t, 4 degrees)": [tails]})
    for name, module in model.language.blocks.named_modules():
        if isinstance(module, nn.Linear):
            kinds[f"trained {name.split('.')[-1]}"].append(module.weight.detach())
    return kinds


def show_errors(model):
    print(f"| matrices | {' | '.join(f'{bits} bits' for bits in BITS)} |\n|---|{'--:|' * len(BITS)}")
    for kind, weights in matrices(model).items():
        errors = [sum(output_error(weight, bits) for weight in weights) / len(weights) for bits in BITS]
        print(f"| {kind} | {' | '.join(f'{100 * error:.2f}%' for error in errors)} |", flush=True)


def learn(config, bits, seed):
    """{bits of the base that answers: (BLEU-1, exact match) in percent} after LoRA on a base of so many bits."""
    train_vlm, eval_vqa = load_script("train_vlm.py"), load_script("eval_vqa.py")
    folder = Path(config.out) / f"{bits}_bits_seed_{seed}"
    if not folder.exists():
        train_vlm.main(train_vlm.Config(
            data=config.data, shards_dir=config.shards_dir, start=config.start, run=str(folder), model="sample",
            vision="frozen", language="lora", base_bits=bits, lora_targets=SEVEN, lora_r=config.lora_r,
            lora_alpha=2 * config.lora_r, learning_rate=config.learning_rate, max_steps=config.steps,
            batch_size=config.batch_size, questions_per_image=0, held_out=128, seed=seed, workers=1))
    scores = {}
    for answering in {bits, 0} if bits == 4 else [bits]:
        eval_vqa.main(eval_vqa.Config(run=str(folder), shards_dir=config.shards_dir, data=config.data, blind="none",
                                      base_bits=str(answering)))
    for evaluation in find_evaluations(folder):
        results = read_evaluation(evaluation)
        [tables] = results["results"].values()
        row = tables["all"]["rows"]["model"]
        scores[results["stands_on"]["base_bits"]] = row["BLEU-1"][0], row["exact match"][0]
    return scores


def main(config):
    model = load_run(config.start)
    if model.weights["language"] or "language" in model.lora:
        raise UserError(f"--start={config.start}: its language model was not trained in full; name a run with "
                        "--language=full")
    show_errors(model)
    if not config.data:
        return
    jobs, rows = list(itertools.product(range(config.seeds), (0, 8, 4))), defaultdict(list)
    progress = Progress(len(jobs), "runs")
    for seed, bits in jobs:
        for answering, scores in learn(config, bits, seed).items():
            rows[bits, answering].append(scores)
            tell(f"seed {seed}, {bits} bits, answers on {answering}: BLEU-1 {scores[0]:.2f}, exact {scores[1]:.2f}")
        progress.row()
    print(f"\n| trained on | answers on | BLEU-1, {config.seeds} seeds | mean | exact match, mean |")
    print("|---|---|---|--:|--:|")
    for (bits, answering), scores in rows.items():
        bleu, exact = zip(*scores)
        each = ", ".join(f"{score:.1f}" for score in bleu)
        print(f"| {bits or 32} bits | {answering or 32} bits | {each} | {sum(bleu) / len(bleu):.2f} | "
              f"{sum(exact) / len(exact):.2f} |")


if __name__ == "__main__":
    run(main, parse_command_line(Config))
