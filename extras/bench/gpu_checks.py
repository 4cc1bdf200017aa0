"""
Whether a GPU computes what this project's CPU does, and compiles no more than it has to: tiny models of all families.

    python extras/bench/gpu_checks.py --device=cuda      a minute or two, most of it torch.compile's
    python extras/bench/gpu_checks.py --device=cpu       a rehearsal: the same ways, by dynamo and its backend "eager"

A row each: what is compared, the error, the most that it may be. Compared is with float32 on the CPU, group after
group, where the GPU has FlexAttention over the packed sequence and compiled blocks: the packed batch has prefixes that
branches share, several groups, padding, and more tokens of a group than a sliding window. An error in 16 bits may be
three times the CPU's in the same 16 bits. A check that fails stops no other one; then the exit code is 1.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import contextlib
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal
from unittest.mock import patch

import numpy as np
import torch
import torch.nn as nn

from data import BOS, EOS, Group, make_batch, shared_prefix
from extras.bench.sizes import build
from extras.scripts import load_script
from generate import Sampling, finished_groups, generate
from lora import LoRALinear, add_lora, token_keys
from plumbing import kernels
from plumbing.devices import LossScale, autocast_to, describe_machine, find_device, to_device
from plumbing.flags import Device, parse_command_line, run
from plumbing.shards import Sample
from plumbing.sources import FOUR
from quantize import LowLinear, dequantise
from run import make_optimizer
from zoo.classifier import augment
from zoo.mxfp4 import decode

CPU, WORDS = torch.device("cpu"), 512
FAMILIES = {"LLaMA + ViT": "sample", "Qwen3-VL": "qwen_sample", "gpt-oss": "gpt_oss_sample"}
EXACT = 1e-3  # relative error of float32 on another device
SETTINGS = SimpleNamespace(clip=1.0)  # of train_vlm.train_step


@dataclass(frozen=True)
class Config:
    device: Device = "auto"  # cuda, or cpu, which rehearses
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16: what is compiled alone, and nothing else
    only: Literal["all", "sample", "qwen_sample", "gpt_oss_sample"] = "all"  # families


# ----------------------------------------------------------------------------- a model and its batches

def make_model(name):
    """A tiny VLM on the CPU that trains as train_vlm.py's: LoRA with dropout in the language model, else in full."""
    model = build(name, WORDS, torch.float32, CPU)
    add_lora(model.language, FOUR, r=4, alpha=8, dropout=0.1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("lora_B", "sinks")):
                nn.init.normal_(parameter, std=0.5 if key.endswith("sinks") else 0.1)
    return model.train()


def draw_images(model, rng, count):
    """So many images of shapes that the model reads, (H, W, 3) uint8."""
    size = getattr(model.vision.config, "image_size", 0)
    sides = [(size, size)] if size else [(64, 96), (96, 96), (128, 64)]
    return [rng.integers(0, 256, (*sides[number % len(sides)], 3), np.uint8) for number in range(count)]


def draw_groups(model, seed):
    """data.Groups: a shared image and text of more than a window, a question alone, two without an image, one long."""
    rng, images, groups = np.random.default_rng(seed), [], []
    for prefix, questions, pictured in ((150, 3, True), (20, 1, True), (40, 2, False), (180, 1, False)):
        shared = [BOS, *([-1 - len(images)] * pictured), *rng.integers(20, WORDS, prefix + seed).tolist()]
        images += draw_images(model, rng, 1) * pictured
        samples = []
        for number in range(questions):  # no two begin alike
            own = [3 + number, *rng.integers(20, WORDS, int(rng.integers(8, 30))).tolist(), EOS]
            end = len(shared) + len(own)
            samples.append(Sample(np.array(shared + own), np.array([[end - 6, end]]), 1, int(rng.integers(1 << 30))))
        counts = np.array([model.vision.tokens(*image.shape[:2]) for image in images], np.int64)
        groups.append(Group(samples, shared_prefix(samples), int(rng.integers(1 << 30)), counts, images.__getitem__))
    return groups


def draw_batch(model, seed):
    """A data.Batch of them, padded as on a GPU."""
    return make_batch(draw_groups(model, seed), 128)


@contextlib.contextmanager
def ways_of(device):
    """While it is open a model takes a GPU's ways, on a CPU too; gives what compile_blocks takes besides."""
    if device.type == "cuda":
        yield {}
        return
    flex = torch.compile(kernels.flex_attention, backend="eager", dynamic=True)
    import model as model_file  # whose names are replaced

    with (patch("model.packed_mask", lambda group, branch, flex: model_file.block_mask(group, branch)),
          patch("model.compiled_flex_attention", flex),
          patch("torch.nn.attention.flex_attention._validate_device", lambda q, k, v: None),  # no backward on a CPU
          patch("plumbing.kernels.Linear.forward", nn.Linear.forward)):  # which asks a CPU for its threads
        yield {"backend": "eager"}


def learn(model, batch, dtype=torch.float32, scale=1.0):
    """The loss of a Batch of tensors, and all gradients in one row, float64 on the CPU."""
    with autocast_to(batch.tokens.device, dtype):
        loss = model.loss(batch) / len(batch.targets)
    (loss * scale).backward()
    gradient = torch.cat([p.grad.flatten().cpu().double() for p in model.parameters() if p.grad is not None]) / scale
    model.zero_grad(set_to_none=True)
    return loss.detach().cpu().double(), gradient


def apart(ours, wanted):
    """Relative error of a tensor."""
    return float((ours.double().cpu() - wanted.double().cpu()).norm() / wanted.double().norm().clamp(min=1e-30))


# ----------------------------------------------------------------------------- the checks: rows of (what, error, bound)

def check_family(device, name, dtype):
    """A family's training, compiled: loss and gradients, three steps, and what other lengths are compiled for anew."""
    model = make_model(name)
    batch, others = draw_batch(model, 0), [draw_batch(model, seed) for seed in range(1, 6)]
    exact, same = (learn(model, to_device(batch, CPU), kind) for kind in (torch.float32, dtype))
    half, bounds = dtype != torch.float32, (0.02, 3 * apart(same[1], exact[1]))
    steps = take_steps(deepcopy(model), [batch, *others[:2]], CPU, dtype)
    torch._dynamo.reset()
    fail = torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)  # else blocks go on uncompiled behind it
    with fail, ways_of(device) as settings:
        ours, counters = deepcopy(model).to(device), torch._dynamo.utils.counters
        kernels.compile_blocks([*ours.vision.blocks, *ours.language.blocks], **settings)
        for what, mine, wanted, bound in zip(("loss", "all gradients"), learn(ours, to_device(batch, device), dtype),
                                             exact, bounds):
            yield what, apart(mine, wanted), bound if half else EXACT
        error = apart(take_steps(ours, [batch, *others[:2]], device, dtype), steps)
        yield "losses of three steps", error, 0.02 if half else EXACT
        graphs = counters["stats"]["unique_graphs"]
        for other in others[2:]:
            learn(ours, to_device(other, device), dtype)
        yield "graphs compiled for three other lengths", counters["stats"]["unique_graphs"] - graphs, 0


def take_steps(model, batches, device, dtype):
    """The losses of train_vlm.train_step on one Batch after the other, (n,)."""
    optimizer = make_optimizer([(name, p, 1.0) for name, p in model.named_parameters()], 0.01)
    losses = []
    for number, batch in enumerate(batches):
        step = SimpleNamespace(number=number, batches=[batch], divisor=len(batch.targets))
        losses.append(train_vlm.train_step(model, optimizer, step, 1e-3, SETTINGS, autocast_to(device, dtype)))
    return torch.tensor([loss for loss, _ in losses])


def check_answers(device, name):
    """Greedy and sampled answers by the cache, float32, to questions about images and without: tokens that differ."""
    model, rng = make_model(name).eval(), np.random.default_rng(1)
    images = draw_images(model, rng, 2)
    asked = [[[BOS, -1, *rng.integers(20, WORDS, length).tolist()] for length in (9, 140)] for _ in images]
    groups = [([image], prompts) for image, prompts in zip(images, asked)]
    groups.append(([], [[BOS, *rng.integers(20, WORDS, 30).tolist()]]))
    draws = [rng.random((len(prompts), 12)) for _, prompts in groups]
    for what, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        answers = []
        for place in (CPU, device):
            passes = generate(deepcopy(model).to(place), groups, 12, Sampling(temperature, stops=()),
                              draws=draws if temperature else None)
            answers.append([reply.tokens for _, replies in sorted(finished_groups(passes), key=lambda pair: pair[0])
                            for reply in replies])
        yield f"{what} answers, tokens that differ", sum(mine != its for pair in zip(*answers)
                                                         for mine, its in zip(*pair, strict=True)), 0


def check_bits(device):
    """A base in few bits: what is stored, what it stands for, and its products."""
    torch.manual_seed(0)
    plain, x = nn.Linear(256, 192), torch.randn(70, 256)
    for bits in (16, 8, 4):
        there, here = (LowLinear(deepcopy(plain).to(place), bits) for place in (device, CPU))
        there.store(plain.weight.detach().to(device))
        here.store(plain.weight.detach())
        codes = (there.codes.cpu() != here.codes).float().mean()
        yield f"base in {bits} bits: share of codes that differ", float(codes), 1e-3
        same = dequantise([tensor.to(device) for tensor in here.buffers()], bits, here.weight.shape, torch.float32)
        yield f"base in {bits} bits: weights of the same codes", apart(same, here.dequantise()), 0
        results = []
        for layer, place in ((there, device), (here, CPU)):
            given = x.to(place, copy=True).requires_grad_()  # else the CPU's would be x itself
            y = layer(given)
            y.square().sum().backward()
            results.append((y.detach(), given.grad))
        for what, ours, wanted in zip(("product", "gradient"), *results):
            yield f"base in {bits} bits: {what}", apart(ours, wanted), EXACT


def check_exact(device):
    """What has to have the same bits anywhere."""
    blocks = torch.arange(256, dtype=torch.uint8).repeat(255, 1).view(255, 16, 16)
    scales = torch.arange(255, dtype=torch.uint8)[:, None].expand(255, 16).contiguous()
    for dtype in (torch.float32, torch.bfloat16):
        weights = [decode(blocks.to(place), scales.to(place), dtype).cpu() for place in (CPU, device)]
        yield f"MXFP4 in {str(dtype)[6:]}: weights that differ", int((weights[0] != weights[1]).sum()), 0
    keys = torch.randint(-2 ** 31, 2 ** 31, (500,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    layer, dropped = LoRALinear(nn.Linear(64, 8), 4, 8, 0.3, "a.name"), []
    for place in (CPU, device):
        layer = layer.to(place)
        layer.keys.set(token_keys(keys.to(place), torch.arange(500, device=place)))
        dropped.append((layer.drop(torch.ones(500, 64, device=place)) == 0).cpu())
    yield "LoRA's dropout: inputs that differ", int((dropped[0] != dropped[1]).sum()), 0
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    turned = [augment(images.to(place), torch.Generator().manual_seed(1)).cpu() for place in (CPU, device)]
    yield "augmented images", apart(turned[1], turned[0]), EXACT


def check_float16(device):
    """float16, not compiled: loss and gradients by a scale, and a loss that overflows, whose step is left out."""
    model, scale = make_model("sample"), LossScale(2.0 ** 24)
    batch, results = draw_batch(model, 0), {}
    for place in (CPU, device):
        for dtype in (torch.float32, torch.float16):
            model.flex = False
            results[place.type, dtype] = learn(model.to(place), to_device(batch, place), dtype, 1024.0)
    (loss, gradient), (exact_loss, exact) = results[device.type, torch.float16], results["cpu", torch.float32]
    yield "float16: loss", apart(loss, exact_loss), 0.02
    yield "float16: all gradients", apart(gradient, exact), 3 * apart(results["cpu", torch.float16][1], exact)
    optimizer = make_optimizer([(name, p, 1.0) for name, p in model.named_parameters()], 0.0)
    step, before = SimpleNamespace(batches=[batch], divisor=1), model.projector.weight.detach().clone()
    model.projector.weight.register_hook(lambda gradient: gradient * torch.inf)
    train_vlm.train_step(model, optimizer, step, 1e-3, SETTINGS, autocast_to(device, torch.float16), scale)
    yield "float16: weights that an overflow changed", int((model.projector.weight != before).sum()), 0
    yield "float16: the scale behind it, less half of it", scale.scale - 2.0 ** 23, 0


# ----------------------------------------------------------------------------- the table

def report(rows, about, counts):
    """Print a check's rows as they come, and count those that are well; whatever it raises is a row that is not."""
    try:
        for what, error, bound in rows:
            well = error <= bound
            counts["ok" if well else "FAILED"] += 1
            print(f"| {about}{what} | {error:.1e} | {bound:.1e} | {'ok' if well else 'FAILED'} |", flush=True)
    except Exception as error:  # of any kind, so that the others are still checked
        counts["FAILED"] += 1
        words = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"| {about or 'a check '}ended | {words[:300]} | | FAILED |", flush=True)


def main(config):
    device = find_device(config.device)
    torch.backends.cudnn.allow_tf32 = False  # by default a convolution has ten bits of a fraction
    print(", ".join(f"{name} {fact}" for name, fact in describe_machine(device).items()), "\n", flush=True)
    print("| what | error | at most | |\n|---|--:|--:|---|", flush=True)
    counts = Counter()
    families = {family: name for family, name in FAMILIES.items() if config.only in ("all", name)}
    if config.dtype == "float32":
        for check in (check_exact, check_bits, check_float16):
            report(check(device), "", counts)
        for family, name in families.items():
            report(check_answers(device, name), f"{family}: ", counts)
    for family, name in families.items():
        report(check_family(device, name, getattr(torch, config.dtype)), f"{family}, {config.dtype}: ", counts)
    print(f"\n{counts['ok']} ok, {counts['FAILED']} failed", flush=True)
    sys.exit(1 if counts["FAILED"] else 0)


train_vlm = load_script("train_vlm.py")  # whose step is taken

if __name__ == "__main__":
    run(main, parse_command_line(Config))
