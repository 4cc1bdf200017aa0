"""
How much memory a training step of train_vlm.py takes, and which GPUs it fits: computed, on any machine.

    python extras/bench/memory.py                    the paper's model (each takes two minutes on one core)
    python extras/bench/memory.py --model=qwen3_vl_4b --image_size=448,1280 --base_bits=16,8,4
    python extras/bench/memory.py --model=gpt_oss_20b --base_bits=4 --recompute=1 --micro_batch_tokens=4096,32768
    python extras/bench/memory.py --check=true       the small model on this machine, computed and measured

What runs is train_vlm.train_step itself, on fake tensors: they have a shape, a type and a storage, but
no content, so that LLaMA-7B takes no memory here and next to no time. A ledger adds the bytes of every
storage that an operation makes and takes them off when it dies; the table holds the most there ever
were. That is in a step's second micro-batch, beside AdamW's moments and the gradients of the first. A
micro-batch is full of images with one or more questions. Of a Qwen3-VL trains what train_vlm.py lets train of one
that is loaded: LoRA on seven matrices of a block, and the mergers. gpt_oss_20b is MedGPT-oss by its parts: behind CLIP
ViT-L/14@336, which sees an image of 4:3 as 13 tiles, 1,872 tokens after their merging, and a two-layer projector,
gpt-oss-20b, whose experts have as many tokens each.

The CPU plays the GPU, since autograd wants a device that is there. Types under autocast are the same,
and attention keeps what FlexAttention does: inputs, output, one number a query and head. Not counted
are what --compile=true saves, a micro-batch's pixels, and what holds no tensor: the CUDA context,
buffers of kernels, gaps. A card sold with 80 GB has 80 GiB, 7% more than the 80e9 bytes that are filled
here: those are for them.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[0] = str(ROOT)  # the repository, not this folder

import contextlib
import itertools
import os
import subprocess
import tempfile
import weakref
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Literal
from unittest.mock import patch

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from extras.scripts import load_script
from data import BOS, EOS, Group, make_batch, shared_prefix
from extras.bench import experts
from extras.bench.progress import Progress
from extras.bench.published import QWEN, write_file, write_folder
from model import CONFIGS, ViT, ViTConfig, group_masks
from plumbing.devices import autocast_to, describe_machine, pick_device, to_device
from plumbing.flags import UserError, parse_command_line, run
from plumbing.shards import Sample
from plumbing.sources import settle
from quantize import dequantise
from run import make_optimizer
from zoo import gpt_oss_files
from zoo.qwen3_vl import Vision

train_vlm = load_script("train_vlm.py")  # whose step is measured
DEVICE, DTYPE = pick_device("cuda" if torch.cuda.is_available() else "cpu", "auto")  # --check=true's
PROMPT, ANSWER = 17, 4  # tokens of a question; PathVQA's have 15.7 and 3.2 on average

CLIP = ViTConfig(336, 14, 1024, 24, clip=True)  # ViT-L/14@336
# What MedGPT-oss takes of it: its code is InternVL's, which merges patches and has a norm in its projector
MEDGPT = {"merge": 2, "vision_layer": "-1", "vision_tokens": "patches", "projector_type": "mlp1"}
TILES = 1008, 1344  # height and width in pixels of an image of 4:3, as it is stored in tiles of 336

Sizes = Literal["paper", "small", "sample", "qwen_small", "qwen3_vl_2b", "qwen3_vl_4b", "qwen3_vl_8b",
                "gpt_oss_small", "gpt_oss_20b"]


@dataclass(frozen=True)
class Config:
    model: Sizes = "paper"  # sizes
    image_size: str = "0"  # pixels along a side of a Qwen3-VL's images; 0: 448, and of others what they have
    base_bits: str = "0"  # of a loaded model's frozen matrices: 16, 8, 4; 0: as computed in, experts of MXFP4 as stored
    vision: Literal["auto", "full", "lora", "frozen"] = "auto"  # what trains of the vision part; as train_vlm.py's
    language: Literal["lora", "full", "frozen"] = "lora"  # what trains of the language model
    lora_targets: str = "auto"  # matrices of the language model with LoRA; as train_vlm.py's
    micro_batch_tokens: str = "1024,2048,4096,8192,16384"  # sizes of a micro-batch
    questions: str = "1,8"  # about an image, that share it
    recompute: str = "0,0.5,1"  # shares of the blocks whose activations are computed twice
    cards: str = "24,40,80,141"  # GB of a GPU's memory, as sold
    check: bool = False  # compare computed and measured steps of the small model instead


def flags_of(name, folder="", **given):
    """train_vlm.py's flags for a model of these sizes, or for the one whose parts lie in a folder."""
    parts = {"model": name, "vision_weights": "none", "language_weights": "none"}
    if name in QWEN:
        parts = {"model": folder} if folder else parts
    elif folder:
        parts |= {"model": "gpt_oss_small", "language_weights": folder}
        if name == "gpt_oss_20b":
            parts |= {"vision_weights": f"{folder}/vision/clip.safetensors", **MEDGPT}
    return settle(train_vlm.Config(**parts, compile=False, **given))


def write_parts(name, folder):
    """Write the folder of a model whose parts are loaded, without values; its path as text."""
    if name == "gpt_oss_20b":
        with torch.device("meta"):
            shapes = {key: tensor.shape for key, tensor in ViT(CLIP).state_dict().items()}
        (folder / "vision").mkdir()
        write_file(folder / "vision/clip.safetensors", shapes, values=False)
        (folder / "vision/config.json").write_text('{"architecture": "vit_large_patch14_clip_quickgelu_336"}')
    return write_folder(name, folder, values=False)


class Ledger(TorchDispatchMode):
    """
    Counts the bytes of storages that operations return while it is on: those alive, and their peak.
    (torch.distributed._tools.mem_tracker hooks onto every weight, which frozen ones do not allow.)
    """

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor):
                self.enter(tensor.untyped_storage())
        return outputs

    def enter(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:  # else it is that of a view, or of a result in place
            self.known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.strike, key, size)

    def strike(self, key, size):
        self.known.remove(key)
        self.live -= size


def pack(name, tokens, questions, side=0):
    """A data.Batch of black images, each with so many questions about it. side: in pixels, of a Qwen3-VL's."""
    with torch.device("meta"):
        vision = Vision(QWEN[name][0]) if name in QWEN else ViT(
            replace(CLIP, merge=2, tiled=True) if name == "gpt_oss_20b" else (CONFIGS | gpt_oss_files.CONFIGS)[name][0])
    side = (side or 448) if name in QWEN else vision.config.image_size
    shape = TILES if name == "gpt_oss_20b" else (side, side)
    count, black = vision.tokens(*shape), np.zeros((*shape, 3), np.uint8)
    images = tokens // (1 + count + questions * (PROMPT + ANSWER))
    if not images:
        raise UserError(f"--micro_batch_tokens={tokens}: too few for an image's {count} and "
                        f"{PROMPT + ANSWER} for each of --questions={questions}")
    begin = 2 + PROMPT
    sample = Sample(np.array([BOS, -1, *[0] * (PROMPT + ANSWER), EOS]), np.array([[begin, begin + ANSWER + 1]]), 2)
    samples = [sample] * questions
    group = Group(samples, min(shared_prefix(samples), 2), 0, np.array([count]), lambda number: black)
    return make_batch([group] * images)


def make(flags, device, dtype):
    """train_vlm.py's model with random weights, or those of the folder of a loaded one."""
    words = CONFIGS[flags.model][1].vocab_size if flags.model in CONFIGS else 0
    tokenizer = SimpleNamespace(vocab_size=words, sha256="", path=Path("tokenizer.json"), piece=str)
    image = {"resize": "tiles" if flags.merge == MEDGPT["merge"] else "squash", "size": CLIP.image_size}
    with contextlib.redirect_stdout(None), patch("weights.hash_weights", str):  # which would read them all
        model = train_vlm.load_parts(flags, tokenizer, image, None, device, dtype)
        train_vlm.make_trainable(model, flags, None)
    return model.train()


def train(model, flags, batch, device, dtype):
    """A step of two micro-batches, beside AdamW's moments, which an update without gradients has given it."""
    optimizer = make_optimizer(train_vlm.trained_parameters(model, flags), flags.weight_decay, flags.beta2)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    step = SimpleNamespace(number=0, batches=[batch, batch], divisor=len(batch.targets))
    train_vlm.train_step(model, optimizer, step, flags.learning_rate, flags, autocast_to(device, dtype))


class Attention(torch.autograd.Function):
    """What FlexAttention keeps: q, k, v, y, one number a query and head, which model.attend needs where sinks are."""

    @staticmethod
    def forward(ctx, q, k, v):
        y, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)  # (T, nh, hs), (T, nh)
        ctx.save_for_backward(q, k, v, y, lse)
        return y, lse

    @staticmethod
    def backward(ctx, gradient, of_lse):
        return (*map(torch.empty_like, ctx.saved_tensors[:3]),)


def attend(q, k, v, mask, sinks=None):
    """model.attend of a GPU, of which only what it keeps is there."""
    y, lse = Attention.apply(q, k, v)
    return y if sinks is None else y * torch.sigmoid(lse - sinks.float())[..., None].to(y.dtype)


def spread(chosen, minlength):
    """Tensor.bincount of the experts that tokens have chosen, which have no values here: as many for each."""
    counts = [len(chosen) // minlength + (expert < len(chosen) % minlength) for expert in range(minlength)]
    return SimpleNamespace(tolist=lambda: counts)


def hold(layer, weight):
    """MXLinear.store, whose numbers nobody needs."""
    rows, columns = weight.shape
    layer.register_buffer("codes", torch.empty(rows, columns // 32, 16, dtype=torch.uint8), persistent=False)
    layer.register_buffer("scale", torch.empty(rows, columns // 32, dtype=torch.uint8), persistent=False)


def multiply(x, stored, bits, shape, transposed, bias=None):
    """quantize.multiply, its steps one by one: the ledger sees the matrix that it makes."""
    weight = dequantise(stored, bits, torch.Size(shape), x.dtype)
    return F.linear(x, weight.T if transposed else weight, bias)


def compute(flags, batch, dtype, gpu=True):
    """Bytes of the weights, and of all there is at the peak of training: on a GPU, or on this CPU."""
    cpu = torch.device("cpu")
    model, real = make(flags, torch.device("meta"), dtype), to_device(batch, cpu)
    weights, masks = model.state_dict(), None if gpu else group_masks(real.group, real.branch)
    low = {f"{name}.weight": layer for name, layer in model.named_modules() if hasattr(layer, "store")}
    places = model.vision.place(real.positions, real.group, real.branch, real.image_at, real.images)
    stand_ins = {"model.packed_mask": lambda group, branch, flex: masks,  # for what asks for values
                 "zoo.qwen3_vl.Vision.place": lambda *given: places,
                 "torch._subclasses.FakeTensor.tolist": lambda tensor: [0.0] * len(tensor),
                 "torch._subclasses.FakeTensor.bincount": spread, "zoo.mxfp4.MXLinear.store": hold,
                 "quantize.multiply": multiply, "quantize.PIECE": 1 << 40}  # at once: no content takes no time
    if gpu:  # for ways that only a CPU has; a GPU's mask takes next to nothing
        stand_ins |= {"plumbing.kernels.Linear.forward": nn.Linear.forward, "zoo.mxfp4.linear": F.linear,
                      "zoo.gpt_oss.near_masks": lambda mask, positions, window: mask,
                      **{f"{module}.attend": attend for module in ("model", "zoo.qwen3_vl", "zoo.gpt_oss")}}
    with contextlib.ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(patch(name, stand_in))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        ledger = stack.enter_context(Ledger())
        model.load_state_dict({name: torch.empty_like(tensor, device=cpu) for name, tensor in weights.items()
                               if name not in low}, assign=True, strict=False)
        for layer in low.values():
            layer.store(torch.empty(layer.weight.shape, dtype=torch.bfloat16))
        loaded = ledger.live
        train(model, flags, batch, cpu, dtype)
        return loaded, ledger.peak


def allocated(peak=False):
    """Bytes that this process holds, or the most that it ever held: on the GPU, or resident."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0]) * 1024


def measure(name, tokens, recompute, folder="", bits=0):
    """
    Bytes at the peak of training over those before it; right once in a process. folder: of a loaded model of name's
    sizes, with its base in so many bits.
    """
    for model, size in [(name if folder else "sample", 256), (name, tokens)]:  # first libraries make their buffers
        flags = flags_of(model, folder, recompute=recompute, base_bits=bits)
        batch = pack(model, size, 1)
        before = allocated()
        train(make(flags, DEVICE, DTYPE), flags, batch, DEVICE, DTYPE)
    return allocated(peak=True) - before


def measure_afresh(*given):
    """measure() in a process of its own, in which what is freed goes back to the system at once."""
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}  # glibc's
    code = f"from extras.bench.memory import measure; print(measure(*{given}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **at_once},
                          stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout)


def print_row(*cells):
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def print_heads(*heads):
    print_row(*heads)
    print_row(*["--:"] * len(heads))


def write_small(name, folder):
    """Write the folder of a small model that is loaded, with values; its path as text, or "" of one that is not."""
    if name == "gpt_oss_small":
        experts.write_models(experts.Config(), folder)
        return str(folder / "packed")
    return write_folder(name, folder) if name in QWEN else ""


def check(name, bits):
    """Print what steps of a small model take on this machine: computed, measured."""
    if DEVICE.type == "cpu" and not Path("/proc/self/status").is_file():
        raise UserError("--check=true: on a CPU only where Linux tells the peak of a process, in /proc")
    facts = ", ".join(f"{about} {fact}" for about, fact in describe_machine(DEVICE).items())
    print(f"Peak of a step of {name}, {DTYPE}; {facts}\n")
    print_heads("base", "tokens", "recompute", "computed, MB", "measured, MB", "ratio")
    cases = list(itertools.product(bits, (4096, 8192), (0, 0.5, 1)))
    progress = Progress(len(cases), "steps")
    with tempfile.TemporaryDirectory() as folder:
        folder = write_small(name, Path(folder))
        for base, tokens, recompute in cases:
            flags = flags_of(name, folder, recompute=recompute, base_bits=base)
            _, computed = compute(flags, pack(name, tokens, 1), DTYPE, DEVICE.type == "cuda")
            measured = measure_afresh(name, tokens, recompute, folder, base)
            print_row(f"{base} bits" if base else DTYPE, f"{tokens:,}", recompute, f"{computed / 1e6:,.0f}",
                      f"{measured / 1e6:,.0f}", f"{computed / measured:.3f}")
            progress.row()


def read_numbers(config, name, kind, low, high):
    """The numbers that a flag lists, in order."""
    text = getattr(config, name)
    try:
        numbers = sorted(kind(number) for number in text.split(","))
    except ValueError:
        numbers = [high + 1]
    if not all(low <= number <= high for number in numbers):
        raise UserError(f"--{name}={text}: numbers from {low} to {high:,}, with commas between them")
    return numbers


def fit(sizes, peaks, room):
    """How large a micro-batch may be: peaks lie on a line, or on one that bends upwards."""
    if not peaks[0] <= room < peaks[-1]:
        return f"< {sizes[0]:,}" if room < peaks[0] else f">= {sizes[-1]:,}"
    return f"{np.interp(room, peaks, sizes) // 64 * 64:,.0f}"


def main(config):
    bits, shared = (read_numbers(config, name, int, least, most) for name, least, most in (
        ("base_bits", 0, 16), ("questions", 1, 1000)))
    loaded = config.model in QWEN or config.model.startswith("gpt_oss")
    if wrong := [number for number in bits if number not in (0, 4, 8, 16) or number and not loaded]:
        raise UserError(f"--base_bits={wrong[0]}: 16, 8 or 4, of a Qwen3-VL and a gpt-oss; 0 of every model")
    if config.check:
        return check(config.model if loaded else "small", bits)
    sizes = read_numbers(config, "micro_batch_tokens", int, 1, 1_000_000)
    shares = read_numbers(config, "recompute", float, 0, 1)
    cards = read_numbers(config, "cards", float, 1, 1000)
    sides = read_numbers(config, "image_size", int, 0, 4096)
    progress = Progress(len(shared) * len(bits) * len(sides) * len(sizes) * len(shares), "peaks")
    with tempfile.TemporaryDirectory() as folder:
        folder = (write_small(config.model, Path(folder)) if config.model == "gpt_oss_small" else
                  write_parts(config.model, Path(folder)) if loaded else "")
        flags = flags_of(config.model, folder, vision=config.vision, language=config.language,
                         lora_targets=config.lora_targets)
        for questions, side, base in itertools.product(shared, sides, reversed(bits)):
            print(f"Peak in GB by tokens of a micro-batch; questions that share an image: {questions}"
                  + f"; images of {side or 448} pixels" * (config.model in QWEN)
                  + f"; base in {base} bits" * loaded + "\n")
            show(config, replace(flags, base_bits=base), questions, side, sizes, shares, cards, progress)


def show(config, flags, questions, side, sizes, shares, cards, progress):
    """Print the two tables of one setting: peaks by size and share, and what fits on each card."""
    heads = [f"recompute {share:g}" for share in shares]
    print_heads("tokens", "images", "weights", *heads)
    peaks = []  # of each size, for each share
    for size in sizes:
        batch, computed = pack(config.model, size, questions, side), []
        for share in shares:
            computed.append(compute(replace(flags, recompute=share), batch, torch.bfloat16))
            progress.row(f"{size:,} tokens, recompute {share:g}")
        weights, peaks_now = zip(*computed)
        peaks.append(peaks_now)
        print_row(f"{size:,}", len(batch.images),
                  *(f"{count / 1e9:.1f}" for count in (weights[0], *peaks_now)))
    print("\nThe largest micro-batch, in tokens\n")
    print_heads("card", *heads)
    for card in cards:
        print_row(f"{card:g} GB", *(fit(sizes, column, card * 1e9) for column in zip(*peaks)))
    print()


if __name__ == "__main__":
    run(main, parse_command_line(Config))
