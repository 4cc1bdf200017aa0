"""
Training on several GPUs, worked out before anybody rents them: speed, memory, network, hours and dollars.

    python extras/bench/several.py                                   LoRA of four models on 1 to 64 GPUs
    python extras/bench/several.py --language=full --recompute=1     every weight of the language model trains
    python extras/bench/several.py --measured=out/bench.json         at the speed that training.py measured on one GPU

Simulated: which samples each process gets, by data.Mixture itself, on a prepared dataset's lengths. Counted: products,
padding included, and bytes that are held and sent. Computed by memory.py: what a micro-batch keeps. Assumed, and
printed with a source: what a GPU and its network reach. A step has --batch_size samples, however many GPUs share it.

What is timed is what train_vlm.py does. "whole" (DDP): one message behind a step's products sums all gradients in
float32. "split" (--shard=true, FSDP2): in each micro-batch the weights of embeddings, blocks and head are gathered
forward and backward, as they are kept (float32 where they train), and their gradients are summed to their owners,
beside products; the first and the last message are waited for, and in each micro-batch all wait for the slowest. LoRA,
vision part and projector stay whole. A Qwen3-VL and a gpt-oss are not split yet: their rows say what it would take.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

from plumbing.flags import require_packages

if __name__ == "__main__":
    require_packages("tests/requirements.txt", "peft", "transformers")

import json
import tempfile
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Literal

import numpy as np
import torch

from data import Mixture
from extras.bench import memory
from extras.bench.progress import Progress
from extras.bench.training import count_flop
from plumbing.flags import BatchSize, Count, Range, Share, UserError, Whole, parse_command_line, run
from plumbing.sources import open_shards

Positive = Annotated[float, Range(1e-9, 1e9)]
NAMES = dict(paper="OpenMedQ 7B", qwen3_vl_4b="MedMO 4B", qwen3_vl_8b="MedMO 8B", gpt_oss_20b="MedGPT-oss 20B")
BLOCK = 128  # tokens that a micro-batch is padded to on a GPU, see train_vlm.open_data
UPDATE = 40  # bytes that an update reads and writes a parameter: AdamW 28, norm 4, clipping 8


@dataclass(frozen=True)
class Config:
    models: str = ",".join(NAMES)  # memory.py's sizes
    language: Literal["lora", "full"] = "lora"  # what trains of the language model; else train_vlm.py's defaults
    gpus: str = "1,2,4,8,16,32,64"  # numbers to work it out for
    data: str = "path_vqa"  # prepared datasets whose samples are divided
    shards_dir: str = "shards"  # where prepare/all.py put them
    image_size: Count = 448  # pixels along a side of a Qwen3-VL's images
    batch_size: BatchSize = 64  # samples in a step
    questions_per_image: Whole = 1  # of a step that share an image; 0: all
    micro_batch_tokens: Count = 8192  # tokens of a forward pass
    recompute: Share = 0.0  # share of the blocks whose activations are computed twice
    steps: Count = 20  # whose samples are divided
    samples: Count = 1_000_000  # that a run sees, for its hours and dollars
    measured: str = ""  # json files of training.py, with commas between them; other models: --mfu
    tflops: Positive = 989.0  # peak of a GPU in bfloat16, TFLOP/s
    mfu: Annotated[float, Range(1e-6, 1)] = 0.35  # share of it that training reaches
    hbm: Positive = 3350.0  # GB/s from a GPU's memory
    card: Positive = 80.0  # GB of it
    node: Count = 8  # GPUs in a machine
    within: Positive = 380.0  # GB/s of bus bandwidth between GPUs of a machine, as nccl-tests defines it
    across: Positive = 376.0  # GB/s of it between machines that have a 400 Gb/s network card a GPU
    latency_within: Positive = 18.0  # microseconds of the smallest message
    latency_across: Positive = 98.0  # microseconds
    dollars: Positive = 3.0  # a GPU and hour


SHEET = "NVIDIA's data sheet of the H100 SXM, as quoted at glennklockwood.com/garden/processors/h100"
BENCH = "github.com/stas00/ml-engineering, network/benchmarks/README.md"
SOURCES = {
    "tflops": f"{SHEET}, without sparsity",
    "mfu": "Llama 3.1 8B in full reaches 33% to 39% on 8 and 128 H100, github.com/pytorch/torchtitan, benchmarks/"
           "llama3_h100_202412_torchtitan.md; that we do, too, is assumed",
    "hbm": f"{SHEET}; a pass takes no less than to read all weights",
    "card": SHEET, "node": BENCH,
    "within": f"from one H100 to another, github.com/NVIDIA/nccl/issues/1264; 16 GiB on 8 H200 reach 482, {BENCH}",
    "across": f"an all-reduce of 16 GiB on 4 machines of 8 B200, {BENCH}; for H100, and for 8 machines, assumed",
    "latency_within": f"an all-reduce of 32 KiB on 8 H200 at 3.15 GB/s, {BENCH}; for every message assumed",
    "latency_across": f"the same on 4 machines of 8 B200 at 0.65 GB/s, {BENCH}; for every message assumed",
    "dollars": "2.49 to 3.99 on demand early in 2026, pricegpu.pages.dev/blog/h100-vs-a100-cloud-price"}


@dataclass
class Facts:
    """Of a model that trains: memory and messages in bytes."""
    units: list  # (weights, gradients) of what is gathered at once, where the model is split
    trained: int  # parameters that train, in float32
    message: tuple  # the sum of gradients at the end of a step, of a model that is whole, and of one that is split
    weights: int = 0
    image_tokens: int = 0  # of an image
    sizes: tuple = ()  # tokens of two micro-batches
    kept: tuple = ()  # at their peaks, beside weights, gradients and moments
    flop: np.ndarray | None = None  # of a token, of an image's token, of a target; what is done twice counted twice


def count_parts(model):
    """The Facts of parameters; units as plumbing.devices.split_among_ranks makes them."""
    language, trained = model.language, [p for p in model.parameters() if p.requires_grad]
    packed = {layer.weight for layer in language.modules() if hasattr(layer, "store")}  # once loaded, no parameters
    own, units = {p for name, p in language.named_parameters() if ".lora_" not in name} - packed, []
    whole = [p for p in trained if p not in own]
    embedding = getattr(language.model, "language_model", language.model).embed_tokens
    for module in [*language.blocks, embedding, getattr(language, "lm_head", embedding), language]:
        mine = own & {*module.parameters()}
        own -= mine
        units.append((sum(p.numel() * p.itemsize for p in mine), sum(4 * p.numel() for p in mine if p.requires_grad)))
    # With the gradients go how many ranks have reached each of them, and the loss
    message = tuple(4 * (sum(p.numel() for p in some) + len(some) + 1) for some in (trained, whole))
    return Facts([unit for unit in units if unit[0]], sum(p.numel() for p in trained), message)


def count_products(model, recipe):
    """FLOP of a token of text, of an image's token and of a target, (3,): what they are of a step adds up."""
    return np.array([count_flop(model, [SimpleNamespace(group=np.zeros(tokens), image_at=range(image), targets=range(
        target))], recipe) for tokens, image, target in np.eye(3, dtype=int).tolist()], float)


def study(name, config, progress):
    """The Facts of a model of these sizes."""
    qwen, forward = name in memory.QWEN, SimpleNamespace(vision="frozen", projector="frozen", language="frozen")
    with tempfile.TemporaryDirectory() as folder:
        folder = memory.write_parts(name, Path(folder)) if qwen or name == "gpt_oss_20b" else ""
        flags = memory.flags_of(name, folder, language=config.language, recompute=config.recompute)
        model = memory.make(flags, torch.device("meta"), torch.bfloat16)
        facts, side = count_parts(model), config.image_size if qwen else model.vision.config.image_size
        facts.image_tokens = model.vision.tokens(*(memory.TILES if name == "gpt_oss_20b" else (side, side)))
        facts.flop = count_products(model, flags) + config.recompute * count_products(model, forward) * [
            1, flags.vision != "frozen", 1]
        least = facts.image_tokens + 64  # tokens of a micro-batch, of one image and a question
        for size in (least, max(config.micro_batch_tokens, 2 * least)):
            batch = memory.pack(name, size, 1, config.image_size)
            facts.weights, peak = memory.compute(flags, batch, torch.bfloat16)
            facts.sizes += (len(batch.tokens),)
            facts.kept += (peak - facts.weights - 12 * facts.trained,)  # gradients, and two moments
            progress.row(f"{name}, {len(batch.tokens):,} tokens")
    return facts


def memory_of(facts, tokens, gpus, split):
    """Bytes at the peak of a GPU whose largest micro-batch has so many tokens."""
    (weights, gradients), away = np.sum(facts.units, axis=0), (1 - 1 / gpus) * split
    kept = np.interp(tokens, facts.sizes, facts.kept)
    if split:  # assumed: a unit, the next one and the message that it comes in; gradients of a unit twice
        kept += max(3 * unit[0] + 2 * unit[1] for unit in facts.units)
    message = facts.message[split] * (gpus > 1)  # a copy of gradients, when activations are gone
    return facts.weights + 12 * facts.trained - away * (weights + 3 * gradients) + max(kept, message)


class Divided(Mixture):
    """A Mixture that notes the groups of a step in place of packing them."""

    def divide(self, pieces):
        self.pieces = pieces
        return []


def divide(mixture, ranks):
    """Of the step read last, for each rank (micro-batches, 3) float64: tokens, those of images, targets."""
    def count(piece):
        tokens = [piece.samples[0].tokens[:piece.prefix], *(sample.tokens[piece.prefix:] for sample in piece.samples)]
        images = np.concatenate([-1 - some[some < 0] for some in tokens])
        return (piece.first + sum(piece.rest), piece.image_tokens[images].sum(),
                sum((sample.spans[:, 1] - sample.spans[:, 0]).sum() for sample in piece.samples))

    counts, mixture.ranks = {id(piece): count(piece) for piece in mixture.pieces}, ranks
    for mixture.rank in range(ranks):
        yield np.array([np.sum([counts[id(piece)] for piece in some], axis=0)
                        for some in Mixture.divide(mixture, mixture.pieces)], float).reshape(-1, 3)


def send(size, gpus, config):
    """Seconds of an all-gather or a reduce-scatter of so many bytes; an all-reduce is as one of twice as many."""
    near = gpus <= config.node
    bus, latency = (config.within, config.latency_within) if near else (config.across, config.latency_across)
    return ((gpus - 1) / gpus * size / (1e9 * bus) + 1e-6 * latency) * (gpus > 1 and size > 0)


def time_step(facts, divided, speed, split, config):
    """
    Seconds of a step, those of them in which GPUs wait for the network, and those in which a GPU waits for the slowest,
    on average. divided: of each rank its micro-batches, as divide gives them; speed: FLOP/s of a GPU.
    """
    gpus, read = len(divided), 1e9 * config.hbm
    products = np.zeros((gpus, max(map(len, divided))))
    for row, counts in zip(products, divided):
        padded = np.column_stack([-(-counts[:, 0] // BLOCK) * BLOCK, counts[:, 1:]])
        row[:len(counts)] = np.maximum(padded @ facts.flop / speed, (2 + config.recompute) * facts.weights / read)
    network, updated = send(2 * facts.message[split], gpus, config), facts.trained
    computed = products.max(0).sum() if split else products.sum(1).max()
    if split:
        gathered, summed = ([send(size, gpus, config) for size in sizes] for sizes in zip(*facts.units))
        network += sum(max(2 * sum(gathered) + sum(summed) - seconds, gathered[0] + summed[0])
                       for seconds in products.max(0))
        updated -= (1 - 1 / gpus) * sum(unit[1] for unit in facts.units) / 4
    return computed + network + UPDATE * updated / read, network, computed - products.sum(1).mean()


def read_speed(name, config):
    """(FLOP/s of one GPU, "measured" or "assumed"): by training.py's row that does what train_vlm.py does."""
    for path in filter(None, config.measured.split(",")):
        try:
            facts = json.loads(Path(path).read_text(encoding="utf-8"))
            flags, row = facts["flags"], facts["rows"]["nothing recomputed"]
            if (flags["model"], flags["language"]) == (name, config.language):
                return row["flop"] / float(np.median(row["seconds"])), "measured"
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"--measured={path}: no json file of extras/bench/training.py; run that first") from None
    return 1e12 * config.tflops * config.mfu, "assumed"


def show(name, facts, mixture, gpus, config):
    """Print a model's rows."""
    speed, known = read_speed(name, config)
    divided = []  # of each step, {GPUs: what each rank has}
    for number in range(config.steps):
        mixture.step(number)
        divided.append({count: [*divide(mixture, count)] for count in gpus})
    tokens = np.mean([sum(counts[:, 0].sum() for counts in step[gpus[0]]) for step in divided])
    for count, split in [(count, split) for count in gpus for split in (False, True)[:count]]:
        largest = max(counts[:, 0].max(initial=0) for step in divided for counts in step[count])
        held = memory_of(facts, largest, count, split) / 1e9
        seconds, network, waiting = np.mean([time_step(facts, step[count], speed, split, config)
                                             for step in divided], axis=0)
        hours = config.samples / config.batch_size * seconds / 3600
        memory.print_row(
            NAMES.get(name, name), count, "split" if split else "whole", f"{config.batch_size / seconds:,.1f}",
            f"{tokens / seconds:,.0f}", f"{held:,.0f}" if held <= config.card else f"**{held:,.0f}**",
            f"{waiting / seconds:.0%}", f"{network / seconds:.0%}", f"{hours:,.1f}", f"{hours * count:,.0f}",
            f"{hours * count * config.dollars:,.0f}", known)


def main(config):
    names, gpus = config.models.split(","), memory.read_numbers(config, "gpus", int, 1, 4096)
    if unknown := {*names} - {*memory.Sizes.__args__}:
        raise UserError(f"--models={','.join(unknown)}: {', '.join(memory.Sizes.__args__)}")
    opened, progress = open_shards(config.data, config.shards_dir, "train"), Progress(2 * len(names), "peaks")
    print("Assumed, each from the source behind it:\n")
    for flag, source in SOURCES.items():
        value = getattr(config, flag)
        print(f"- `--{flag}={value:g}`: {source if value == getattr(Config, flag) else 'given'}")
    print()
    memory.print_heads("model", "GPUs", "language model", "samples/s", "tokens/s", "GB a GPU", "for the slowest",
                       "for the network", "hours", "GPU-hours", "dollars", "speed of a GPU")
    for name in names:
        facts = study(name, config, progress)
        mixture = Divided(**opened, count_tokens=lambda heights, widths: np.full(len(heights), facts.image_tokens),
                          batch_size=config.batch_size, questions_per_image=config.questions_per_image,
                          max_length=3584, micro_batch_tokens=config.micro_batch_tokens)
        show(name, facts, mixture, gpus, config)


if __name__ == "__main__":
    run(main, parse_command_line(Config))
