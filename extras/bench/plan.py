"""
What a training run takes in hours, network, disk and checkpoints, worked out before it begins.

    python extras/bench/plan.py                               the paper's run, and one with ten times the data
    python extras/bench/plan.py --mfu=0.35 --tflops=312       on other GPUs, or as training.py measured on yours
    python extras/bench/plan.py --model=weights/medmo_8b --image_size=448     a Qwen3-VL, by its config.json
    python extras/bench/plan.py --model=gpt_oss_20b --image_size=1008         behind CLIP, images of 3 x 3 tiles

Counted: the products that a step cannot do without (as training.py counts them), the bytes of what trains.
Measured here, on this machine's disk: how long a checkpoint of that size takes to save and verify.
Assumed, by flags: the GPU's peak and the share of it that training reaches, and the network between GPUs.
several.py says what several GPUs take in more detail: memory, split models, samples that fall unevenly, dollars.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

from plumbing.flags import require_packages

if __name__ == "__main__":
    require_packages("tests/requirements.txt", "peft", "transformers")

import tempfile
import time
from dataclasses import dataclass
from typing import Annotated, Literal
from types import SimpleNamespace

import numpy as np
import torch

from extras.bench.memory import flags_of, read_numbers, write_parts
from extras.bench.memory import make as make_parts
from extras.bench.training import count_flop
from lora import add_lora, lora_layers
from model import CONFIGS, VLM
from plumbing.flags import Count, Range, UserError, parse_command_line, run
from plumbing.shards import SAMPLE
from plumbing.sources import SEVEN
from prepare.datasets import DATASETS
from run import make_optimizer, save_checkpoint
from weights import build_vlm, is_trained, save_vlm
from zoo.qwen3_files import read_config
from zoo.qwen3_vl import Mergers, Text, Vision

Positive = Annotated[float, Range(1e-9, 1e9)]
# What trains, by train_vlm.py's defaults: of the paper's model, and of a Qwen3-VL
RECIPE = SimpleNamespace(vision="full", projector="full", language="lora")
QWEN_RECIPE = SimpleNamespace(vision="frozen", projector="full", language="lora")
LORA = {"targets": "q_proj,v_proj", "r": 8, "alpha": 16.0, "dropout": 0.0}
CHECKPOINTS = 4  # at most: the two newest, the best, and the one that is being written


@dataclass(frozen=True)
class Config:
    model: str = "paper"  # or gpt_oss_20b, or the folder of a Qwen3-VL, of which config.json is enough
    language: Literal["lora", "frozen"] = "lora"  # what trains of the language model
    image_size: Count = 224  # pixels of a side, as squares that are as large on average
    samples: Count = 3_350_000  # in the mix
    images: Count = 2_300_000  # among them, each stored once
    text_tokens: Count = 60  # of a sample, prompt and answer together
    answer_tokens: Count = 30  # among them
    image_bytes: Count = 43_000  # stored, at 224 pixels; PathVQA's as prepare/ measured
    epochs: Positive = 15.0  # passes
    batch_size: Count = 64  # samples in a step
    gpus: str = "1,8,64"  # numbers to work it out for
    tflops: Positive = 989.0  # peak of a GPU in bfloat16; H100 SXM's by its data sheet
    mfu: Annotated[float, Range(1e-6, 1)] = 0.35  # share of it that training reaches: assumed
    network: Positive = 50.0  # GB/s into and out of a GPU: 400 Gb/s InfiniBand
    save_minutes: Positive = 30.0  # between two checkpoints


def make(name, language, dtype):
    """A VLM without values in which its recipe's parts train, and that recipe. language: "lora" or "frozen"."""
    if language == "frozen" and name != "gpt_oss_20b":
        raise UserError(f"--language=frozen: worked out for gpt_oss_20b alone; of {name} LoRA trains")
    if name in CONFIGS:
        model = build_vlm(name, CONFIGS[name][1].vocab_size, dtype=dtype, device="meta", lora=LORA)
        model.weights["language"] = "weights/pmc_llama_7b"  # so that its frozen weights are not saved
        return model, RECIPE
    if name == "gpt_oss_20b":
        with tempfile.TemporaryDirectory(dir=".") as folder:
            flags = flags_of(name, write_parts(name, Path(folder)), base_bits=4, vision="full", language=language)
            return make_parts(flags, torch.device("meta"), dtype), flags
    vision, text = read_config(name)
    with torch.device("meta"):
        model = VLM(Vision(vision).to(dtype), Text(text).to(dtype), Mergers(vision))
        model.lora["language"] = LORA | {"targets": SEVEN}
        add_lora(model.language, **model.lora["language"])
    model.vision.requires_grad_(False)
    model.weights = dict.fromkeys(model.weights, name)
    return model, QWEN_RECIPE


def time_saving(model):
    """Seconds that run.save_checkpoint takes, and the checkpoint's bytes, with random content."""
    for part in (model.vision, model.projector):
        if is_trained(part):
            part.to_empty(device="cpu")
    for layer in lora_layers(model.language).values():
        for name in ("lora_A", "lora_B"):
            setattr(layer, name, torch.nn.Parameter(torch.empty_like(getattr(layer, name), device="cpu")))
    optimizer = make_optimizer([(name, p, 1.0) for name, p in model.named_parameters()], weight_decay=0.01)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            torch.nn.init.normal_(parameter)
            optimizer.state[parameter] = {name: torch.randn_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        begin = time.perf_counter()
        save_checkpoint(Path(folder), 1, lambda partial: save_vlm(model, partial), model, optimizer, {}, keep=1)
        seconds = time.perf_counter() - begin
        return seconds, sum(path.stat().st_size for path in Path(folder).rglob("*.*"))


def main(config):
    model, recipe = make(config.model, config.language, torch.bfloat16)
    N = model.vision.tokens(config.image_size, config.image_size)
    pictures = config.batch_size * config.images / config.samples
    tokens = config.batch_size * config.text_tokens + pictures * (N + 1)
    step = SimpleNamespace(images=range(round(pictures)), group=np.zeros(round(tokens)),
                           image_at=np.zeros(N * round(pictures)),
                           targets=range(config.batch_size * (config.answer_tokens + 1)))
    flop = count_flop(model, [step], recipe)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    compute = flop / (config.tflops * 1e12 * config.mfu)  # seconds of one GPU
    steps = config.epochs * config.samples / config.batch_size
    saving, size = time_saving(model)
    print(f"a step: {config.batch_size} samples, {tokens:,.0f} tokens, {flop / 1e12:,.0f} TFLOP; {trained / 1e6:,.1f}M "
          f"parameters train; {steps:,.0f} steps\n\n"
          "| GPUs | batch | samples | hours | GPU-hours | a step, ms | of which network | images read, MB/s "
          "| saving |\n"
          "|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for times in (1, 10):
        for gpus in read_numbers(config, "gpus", int, 1, 1_000_000):
            batch = config.batch_size * times  # steps as many, each of more samples
            # A ring's all-reduce sends and receives everything twice, less what stays in place
            network = 2 * (gpus - 1) / gpus * 4 * trained / (config.network * 1e9)
            seconds = compute * times / gpus + network
            hours = steps * seconds / 3600
            reading = pictures * times * config.image_bytes / seconds / 1e6
            print(f"| {gpus} | {batch:,} | {config.samples * times:,} | {hours:,.0f} | {hours * gpus:,.0f} | "
                  f"{1e3 * seconds:,.0f} | {network / seconds:.0%} | {reading:,.1f} | "
                  f"{saving / (60 * config.save_minutes + saving):.2%} |")
    raw = sum(dataset.megabytes for dataset in DATASETS.values() if dataset.kind != "classification"
              and not dataset.only_by_name) / 1e3
    entry = SAMPLE.itemsize + 12  # bytes, with the number of its image and the span of its answer
    shards = (config.images * config.image_bytes + config.samples * (2 * config.text_tokens + entry)) / 1e9
    print(f"\ndisk: {raw:,.0f} GB of downloads, {shards:,.0f} GB of shards ({10 * shards:,.0f} GB for ten times the "
          f"data); a checkpoint {size / 1e9:.2f} GB, {CHECKPOINTS} of them at most\n"
          f"saving one took {saving:.1f} s here, with both hashes and all syncs")


if __name__ == "__main__":
    run(main, parse_command_line(Config))
