"""
What attention takes on a CPU where branches share a prefix: in bundles, as model.py has it, beside one square a group.

    python extras/bench/attention.py

The square is what one would write first: every token of a group is compared with every other, and a mask takes out what
branches would have to do with one another. Both give the same numbers, forward and backward, which is checked; they are
timed in turns, on one group of each shape.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import time
from dataclasses import dataclass

import numpy as np
import torch

from model import attend, packed_mask
from plumbing.flags import Count, parse_command_line, run

SHAPES = {  # what it is: tokens of the prefix, branches, tokens of each
    "an image of PathVQA, 8 questions": (200, 8, 20), "an image of SLAKE, 22 questions": (200, 22, 20),
    "a text, 8 questions": (500, 8, 30), "GRPO, 8 answers of 48 tokens": (256, 8, 48),
    "GRPO, 8 answers of 256 tokens": (256, 8, 256), "10 images, 16 questions": (1970, 16, 20)}
SAME = 1e-5  # relative error


@dataclass(frozen=True)
class Config:
    heads: Count = 4  # of queries, keys and values
    head_size: Count = 64  # channels of a head
    rounds: Count = 15  # of both ways, in turns


def pack(prefix, branches, tokens):
    """group and branch, both (T,), of one group."""
    branch = torch.arange(1, branches + 1).repeat_interleave(tokens)
    branch = torch.cat([torch.zeros(prefix, dtype=torch.long), branch])
    return torch.zeros_like(branch), branch


def main(config):
    print("| a group | tokens | square, ms | bundles, ms | times |\n|---|--:|--:|--:|--:|")
    for name, shape in SHAPES.items():
        torch.manual_seed(0)
        group, branch = pack(*shape)
        seen = (branch[None] == 0) | (branch[:, None] == branch[None])
        inputs = [torch.randn(len(group), config.heads, config.head_size, requires_grad=True) for _ in range(3)]
        upstream, seconds, outputs = torch.randn_like(inputs[0]), {"square": [], "bundles": []}, {}
        for _ in range(config.rounds + 1):
            for way, masks in (("square", [(len(seen), seen.tril(), 0)]), ("bundles", packed_mask(group, branch))):
                begin = time.perf_counter()
                y = attend(*inputs, masks)
                outputs[way] = [y.detach(), *torch.autograd.grad(y, inputs, upstream)]
                seconds[way].append(time.perf_counter() - begin)
        for one, other in zip(*outputs.values()):
            assert (one - other).norm() < SAME * one.norm(), name
        square, bundles = (1e3 * np.median(times[1:]) for times in seconds.values())
        print(f"| {name} | {len(group):,} | {square:.1f} | {bundles:.1f} | {square / bundles:.2f} |", flush=True)


if __name__ == "__main__":
    run(main, parse_command_line(Config))
