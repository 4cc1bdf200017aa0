"""
How fast eval_vqa.py answers, beside transformers' generate on the same weights and questions.

    python extras/bench/answering.py --run=out/path_vqa --limit=500
    python extras/bench/answering.py --model=paper --new_tokens=8 --rounds=1     random weights, on a GPU
    python extras/bench/answering.py --model=qwen_40m --limit=500                a Qwen3-VL of random weights

Ours is generate.py with all questions of an image in a row of its cache. It is timed twice: with the
right images alone, and as eval_vqa.py runs it, where each question is asked about a second image, too,
which costs little since that image's row is there. The peer is transformers' generate as evaluations call
it (peers.py): questions in their order, each with its image encoded, in padded batches. A round is each of
them once, in turns. Needs tests/requirements.txt.

With random weights no answer ends by itself: all have --new_tokens tokens. In float32 the answers are the same,
token for token, unless two tokens tie: how near they were is told, in 16 bits of a few.

The limit is what the same work would take at the speeds of this machine's own matrix product and
copy, measured first: for each pass the larger of its arithmetic and of one reading of the weights.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

from plumbing.flags import require_packages

if __name__ == "__main__":
    require_packages("tests/requirements.txt", "peft", "transformers")

import itertools
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from extras.bench.limits import clock, measure_limits
from extras.bench.peers import lay_out, make_peer, open_questions, require_shapes
from extras.bench.progress import Progress, tell
from extras.bench.sizes import build
from generate import Cache, Piece, Sampling, finished_groups, generate, run_pieces
from plumbing.devices import autocast_to, describe_machine, pick_device
from plumbing.flags import Count, Device, Whole, parse_command_line, run
from tasks.splits import group_questions, read_groups
from tasks.vqa import exchange_images
from weights import load_run

FEW = 20  # answers in 16 bits that are other than transformers', of which is told how near they were
TIE = 1e-4  # of the logits' standard deviation: float32 may choose either of two tokens that are so near


@dataclass(frozen=True)
class Config:
    run: str = ""  # folder of a train_vlm.py run; none: random weights of --model
    model: str = "small"  # sizes of random weights: paper, small, sample, qwen_sample, qwen_small or qwen_40m
    data: str = "path_vqa"  # prepared dataset
    shards_dir: str = "shards"  # where prepare/all.py put it
    limit: Whole = 0  # only the first so many questions; 0: all
    new_tokens: Count = 32  # longest answer; with random weights of every answer
    batch_size: Count = 32  # images answered together, as eval_vqa.py's
    peer_batch_size: Count = 32  # questions
    peer: bool = True  # time the peer, too
    peer_limit: Whole = 0  # only the first so many questions for the peer; 0: as many as ours
    rounds: Count = 3  # of each
    device: Device = "auto"  # cuda, mps or cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where the GPU has it


@torch.no_grad()
def answer_by_peer(peer, model, shard, count, stops, config):
    """Token ids of the answers to the first `count` questions, batch by batch, padded on the left."""
    device, answers = next(model.projector.parameters()).device, []
    for begin in range(0, count, config.peer_batch_size):
        numbers = range(begin, min(begin + config.peer_batch_size, count))
        rows = peer.collate(lay_out(shard, numbers, model.vision, device, prompts=True))
        answers += [list(itertools.takewhile(lambda token: token not in stops, reply))
                    for reply in peer.answer(rows, config.new_tokens)]
    return answers


def answer(model, shard, count, stops, shown, config):
    """{row: token ids of the answers to the first `count` questions}; shown: as group_questions takes it."""
    groups, answers = group_questions(shard, count, shown), {row: [()] * count for row in shown}
    passes = generate(model, read_groups(shard, groups), config.new_tokens, rows=config.batch_size,
                      sampling=Sampling(stops=stops), log_probabilities=False)
    for number, finished in finished_groups(passes):
        for question, reply in zip(groups[number], finished, strict=True):
            answers[question.row][question.number] = reply.tokens
    return answers


@torch.no_grad()
def distance(model, shard, number, ours, theirs, stop):
    """Where two answers first differ, how far apart the logits of their tokens are, in standard deviations."""
    place, pair = next((place, list(pair)) for place, pair in enumerate(
        itertools.zip_longest(ours, theirs, fillvalue=stop)) if pair[0] != pair[1])
    prompt = [*np.maximum(shard.read_sample(number).prompt(), -1).tolist(), *ours[:place]]
    image, weight = shard.read_image(int(shard.samples["image"][number])), next(model.language.blocks.parameters())
    cache = Cache(model.language.config, 1, weight.dtype, weight.device)
    logits = run_pieces(model, cache, [Piece(0, 1, 0, prompt, [image])])[0]
    return float((logits[pair[0]] - logits[pair[1]]).abs() / logits.std())


def compare(model, shard, ours, theirs, stop, dtype):
    """A line that tells how many of `theirs` ours are. Raises AssertionError where more than a tie parts them."""
    ours = ours[:len(theirs)]
    other = [number for number, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]]
    looked_at = other if dtype == torch.float32 else other[:FEW]  # each is a pass of the model
    apart = max((distance(model, shard, number, ours[number], theirs[number], stop) for number in looked_at),
                default=0.0)
    assert dtype != torch.float32 or apart < TIE, f"answers differ by {apart:.1e} of the logits' deviation"
    line = f"{len(ours) - len(other):,} of {len(ours):,} answers are the same as transformers'"
    return line + (f"; in {len(looked_at)} of the others two tokens are no more than {apart:.0e} of the logits' "
                   "standard deviation apart" if other else "")


def count_work(model, passes):
    """
    Let each pass through the language model enter its work into `passes`: FLOP of its matrix products,
    and of the image encoder's before it; bytes of the weights that it reads. Attention is left out.
    """
    def count(module):
        parameters = list(module.parameters())
        return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)

    blocks, block_bytes = count(model.language.blocks)
    parts = getattr(model.language.model, "language_model", model.language.model)
    head = parts.embed_tokens.weight  # as large as the head, where that is not the same
    images = []  # FLOP of those that this pass shows

    def saw_images(module, inputs, output):
        weights = patches_of_token(module) * count(module)[0] + count(model.projector)[0]
        images.append(2 * output.shape[0] * output.shape[1] * weights)

    def embedded(module, inputs, output):
        passes.append([sum(images) + 2 * len(output) * blocks, block_bytes])
        images.clear()

    def predicted(module, inputs, output):
        passes[-1][0] += 2 * len(output) * head.numel()
        passes[-1][1] += head.numel() * head.element_size()

    return [module.register_forward_hook(hook) for module, hook in (
        (model.vision, saw_images), (parts.embed_tokens, embedded), (parts.norm, predicted))]


def patches_of_token(vision):
    """How many patches become one token of a vision part."""
    return getattr(vision.config, "spatial_merge_size", vision.config.merge) ** 2


def open_model(config, tokenizer, dtype, device):
    """The model of --run, or random weights of --model, whose answers do not end by themselves."""
    if config.run:
        model = load_run(config.run, dtype, device)
    else:
        model = build(config.model, tokenizer.vocab_size, dtype, device)
        head = getattr(model.language, "lm_head", None) or model.language.model.language_model.embed_tokens
        with torch.no_grad():
            head.weight[list(tokenizer.stops)] = 0  # never the largest of so many random logits
    return model.eval().requires_grad_(False)


def measure(ways, model, config, device, dtype):
    """({way: its seconds}, {way: its answers}, the passes of count_work) of --rounds in turns."""
    seconds, answers, passes = defaultdict(list), {}, []
    progress = Progress(len(ways) * config.rounds, "passes")
    tell(f"{len(ways)} ways x {config.rounds} rounds over all questions; a line for each")
    for number in range(config.rounds):
        for way, run_once in ways.items():
            hooks = count_work(model, passes) if way == "ours" and number == 0 else []
            begin = clock(device)
            with autocast_to(device, dtype):
                answers[way] = run_once()
            seconds[way].append(clock(device) - begin)
            progress.row(f"{way}, {seconds[way][-1]:.2f} s")
            for hook in hooks:
                hook.remove()
    return seconds, answers, passes


def main(config):
    device, dtype = pick_device(config.device, config.dtype)
    shard, tokenizer = open_questions(config, "test")
    model, stops = open_model(config, tokenizer, dtype, device), tokenizer.stops
    require_shapes(model, shard)
    count = min(config.limit or len(shard), len(shard))
    images, own = shard.samples["image"][:count].astype(np.int64), np.arange(len(shard.image_index))
    other = exchange_images(len(own), images, images, 0)
    peer = make_peer(model, shard, stops, model.encode_images).eval() if config.peer else None
    fewer = min(config.peer_limit or count, count)  # questions of the peer

    print(", ".join(f"{name} {value}" for name, value in describe_machine(device).items()))
    flops, bandwidth = measure_limits(device, dtype)
    print(f"{count:,} questions about {len(np.unique(images)):,} images of {config.data}, {dtype}; "
          f"{sum(p.numel() for p in model.parameters()) / 1e6:,.1f}M parameters; a matrix product runs at "
          f"{flops / 1e12:.2f} TFLOP/s, a copy at {bandwidth / 1e9:.0f} GB/s")
    ways = {"ours": lambda: answer(model, shard, count, stops, {"model": own}, config),
            "ours, with a second image": lambda: answer(
                model, shard, count, stops, {"model": own, "image shuffled": other}, config)}
    if peer:
        ways["transformers' generate"] = lambda: {
            "model": answer_by_peer(peer, model, shard, fewer, stops, config)}
    seconds, answers, passes = measure(ways, model, config, device, dtype)
    medians = {way: float(np.median(times)) for way, times in seconds.items()}
    for way, median in medians.items():
        asked = sum(map(len, answers[way].values()))
        line = (f"{way:26}{asked:7,} answers {median:8.2f} s ({min(seconds[way]):.2f} to {max(seconds[way]):.2f}) "
                f"{asked / median:8.1f} a second")
        if peer:
            last = medians["transformers' generate"] * asked / fewer
            line += f" {last / median:6.2f}x"
        print(line)
    compute, memory = (sum(numbers) for numbers in zip(*[(flop / flops, size / bandwidth)
                                                         for flop, size in passes]))
    limit = sum(max(flop / flops, size / bandwidth) for flop, size in passes)
    print(f"limit of ours {limit:.2f} s ({compute:.2f} s of arithmetic, {memory:.2f} s of reading weights "
          f"in {len(passes)} passes): {limit / medians['ours']:.0%} of it reached")
    if peer:
        print(compare(model, shard, answers["ours"]["model"], answers["transformers' generate"]["model"], stops[0],
                      dtype))


if __name__ == "__main__":
    run(main, parse_command_line(Config))
