"""
How fast train_vlm.py trains: each thing that it leaves out, and the usual way beside it.

    python extras/bench/training.py                       the small model, 64 real questions a step
    python extras/bench/training.py --model=paper         the paper's sizes, random weights, on a GPU

A step is the same --batch_size questions of a prepared training split in every row of the table: they
are read and packed first, and only forward, backward and update are timed. Rows go from what one would
write first to what train_vlm.py does, and then share an image among more and more of its questions. The
peer is the step as LLaVA-style code builds it from transformers and PEFT: ViTModel, a Linear,
LlamaForCausalLM with its LoRA, every question with its image in a row padded to the longest, logits and
labels at all positions. A round is two steps of each row, in turns, of which the second is timed: the
first brings the row's memory back. Then the loader alone, which has to keep ahead of the fastest row; then
extras/bench/answering.py times answers and, with --raw_dir, extras/bench/preparing.py the way from raw files to
shards. Needs tests/requirements.txt.

MFU is the share of the machine's own matrix product (measured first, or --peak_tflops) that a step
reaches with the products it cannot do without: 2 FLOP a weight and token, twice where the weight is
frozen and thrice where it is trained, without padding, attention and what is computed again.

Writes a table in Markdown, and a json beside it with what machine, versions and commit made it.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

from plumbing.flags import require_packages

if __name__ == "__main__":
    require_packages("tests/requirements.txt", "peft", "transformers")

import json
import math
import os
import subprocess
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Literal

import numpy as np
import peft
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers

from data import BOS, EOS, Batch, Mixture
from extras.bench.answering import clock, measure_limits, open_questions
from extras.bench.classifying import make_vit
from extras.bench.progress import Progress, about, tell
from lora import add_lora
from model import VLM, normalise
from plumbing.devices import autocast_to, describe_machine, pick_device, to_device
from plumbing.flags import Count, Device, Range, Whole, parse_command_line, run
from plumbing.kernels import HAS_TRITON
from plumbing.leaks import read_leaks
from run import make_optimizer
from weights import build_vlm


@dataclass(frozen=True)
class Config:
    model: Literal["paper", "small", "sample"] = "small"  # sizes; weights are random
    data: str = "path_vqa"  # prepared dataset
    shards_dir: str = "shards"  # where prepare/all.py put it
    batch_size: Count = 64  # questions in a step
    vision: Literal["full", "lora", "frozen"] = "full"  # what trains of the vision transformer
    language: Literal["lora", "full", "frozen"] = "lora"  # what trains of the language model
    dense_row_length: Count = 448  # tokens of a row in which attention is computed for all of it
    micro_batch_tokens: Count = 4096  # tokens of a forward pass
    rounds: Count = 3  # timed steps of each row
    peer: bool = True  # time the peer, too
    questions: Whole = 500  # of the test split that are answered, 4 tokens each; 0: all of it
    raw_dir: str = ""  # raw files whose preparation is timed, too; none: it is not
    peak_tflops: Annotated[float, Range(0, 1e6)] = 0.0  # that MFU is a share of; 0: of one that is measured
    out: str = "out/bench.md"  # the table; the json stands beside it
    device: Device = "auto"  # cuda, mps or cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where the GPU has it


# ----------------------------------------------------------------------------- ours

def join(batches):
    """Several Batches end to end, as one that is computed in one pass, groups numbered in each from 0."""
    starts = np.cumsum([0] + [len(batch.tokens) for batch in batches])
    columns = {name: [getattr(batch, name) + (start if name.endswith("_at") else 0)
                      for batch, start in zip(batches, starts)] for name in (
        "tokens", "positions", "group", "branch", "image_at", "answer_at", "targets", "weights", "key")}
    return Batch(images=[image for batch in batches for image in batch.images],
                 **{name: np.concatenate(arrays) for name, arrays in columns.items()})


def dense_masks(batch, length):
    """model.packed_mask as one would write it first: rows of so many tokens, in each who may look at whom."""
    masks = []
    for group, branch in zip(batch.group.split(length), batch.branch.split(length)):
        own = (branch[None] == 0) | (branch[:, None] == branch[None])  # (length, length)
        masks.append((length, ((group[:, None] == group[None]) & own).tril()))
    return masks


def dense_loss(model, batch, length):
    """VLM.loss with that mask: every token's attention to its whole row is computed."""
    logits = model.language(batch.tokens, batch.positions, dense_masks(batch, length), batch.answer_at,
                            model.encode_images(batch.images), batch.image_at)
    return F.cross_entropy(logits, batch.targets, reduction="sum")


def loss_at_every_position(model, batch, length):
    """The same with the logits of all tokens, of which most are then ignored."""
    logits = model.language(batch.tokens, batch.positions, dense_masks(batch, length), None,
                            model.encode_images(batch.images), batch.image_at)  # (T, V)
    targets = torch.full((len(logits),), -100, device=logits.device)
    targets[batch.answer_at] = batch.targets
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


def update(model, optimizer, loss_of, batches, supervised, autocast):
    """One optimiser step, as train_vlm.train_step takes it; the loss."""
    total = 0.0
    for batch in batches:
        with autocast:
            loss = loss_of(model, batch) / supervised
        loss.backward()
        total = total + loss.detach()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total.item()


def pack(shard, numbers, questions_per_image, length, config, count_tokens):
    """
    (micro-batches, share of their tokens that is padding, supervised tokens) of these samples, each image
    shared by so many of its questions. length: of rows that are padded to it; 0: one sequence, as it comes.
    """
    mixture = Mixture([shard], count_tokens, batch_size=len(numbers), max_length=1 << 20,
                      micro_batch_tokens=length or config.micro_batch_tokens, multiple=length or 1)
    groups, asked = [], defaultdict(int)
    for number in numbers:
        image = int(shard.samples[number]["image"])
        groups.append((image, asked[image] // (questions_per_image or len(numbers))))
        asked[image] += 1
    step, rows = mixture.pack(0, numbers, groups), max(1, config.micro_batch_tokens // length) if length else 1
    batches = [join(step.batches[at:at + rows]) for at in range(0, len(step.batches), rows)]
    return batches, step.padded, step.divisor


# ----------------------------------------------------------------------------- the peer

class Peer(nn.Module):
    """The same model from transformers' parts, its language model with PEFT's LoRA."""

    def __init__(self, ours, lora):
        super().__init__()
        sizes = ours.language.config
        self.vision = make_vit(ours.vision)
        self.projector = nn.Linear(ours.projector.in_features, ours.projector.out_features)
        self.projector.load_state_dict(ours.projector.state_dict())
        language = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            **asdict(sizes) | {"head_dim": sizes.head_size}, bos_token_id=BOS, eos_token_id=EOS,
            attn_implementation="sdpa"))
        language.load_state_dict({name.replace(".base.", "."): tensor for name, tensor
                                  in ours.language.state_dict().items() if ".lora_" not in name})
        language.to(ours.language.lm_head.weight.dtype)
        self.language = peft.get_peft_model(language, peft.LoraConfig(
            r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])) if lora else language

    def forward(self, tokens, seen, labels, images, N):
        x = self.language.get_input_embeddings()(tokens)
        image_tokens = self.projector(self.vision(pixel_values=normalise(images)).last_hidden_state)
        x = torch.cat([x[:, :1], image_tokens.to(x.dtype), x[:, 1 + N:]], dim=1)
        return self.language(inputs_embeds=x, attention_mask=seen, labels=labels).loss


def peer_batches(shard, numbers, N, size, device):
    """
    (tokens, seen, labels, images, supervised, N) of the samples, each a row padded to the longest of
    its batch; and how many tokens are supervised in all.
    """
    batches = []
    for begin in range(0, len(numbers), size):
        rows = []
        for number in numbers[begin:begin + size]:
            sample = shard.read_sample(number)  # <bos>, the image, prompt and answer
            begin, tokens = int(sample.spans[0, 0]), sample.tokens.tolist()
            rows.append(([BOS] + [0] * N + tokens[2:begin], tokens[begin:], int(shard.samples[number]["image"])))
        T = max(len(prompt) + len(answer) for prompt, answer, _ in rows)
        padding = [T - len(prompt) - len(answer) for prompt, answer, _ in rows]
        arrays = ([p + a + [EOS] * more for (p, a, _), more in zip(rows, padding)],
                  [[1] * (T - more) + [0] * more for more in padding],
                  [[-100] * len(p) + a + [-100] * more for (p, a, _), more in zip(rows, padding)],
                  np.stack([shard.read_image(image) for _, _, image in rows]))
        batches.append((*(torch.as_tensor(array, device=device) for array in arrays),
                        sum(len(answer) for _, answer, _ in rows), N))
    return batches, sum(supervised for *_, supervised, _ in batches)


def loss_of_peer(model, batch):
    """Summed over supervised positions, so that it is ours."""
    *inputs, supervised, N = batch
    return model(*inputs, N) * supervised


# ----------------------------------------------------------------------------- measurement

def count_kept(model, optimizer, loss_of, batches, supervised, autocast):
    """Bytes that the first micro-batch keeps for its backward pass, beside the parameters."""
    sizes, own = {}, {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        loss_of(model, batches[0])
    return sum(sizes.values())


def choose_questions(shard, count):
    """Numbers of so many samples: all questions about one image, then about another, drawn at random."""
    image_of = shard.samples["image"]
    order = np.random.default_rng(0).permutation(int(image_of.max()) + 1)
    numbers = np.concatenate([np.flatnonzero(image_of == image) for image in order[:count]])
    return numbers[:count].tolist()


def count_flop(model, steps, config):
    """FLOP that a step cannot do without: matrix products of its tokens, no padding, no attention."""
    def flop(module, tokens, trained):
        weights = sum(parameter.numel() for name, parameter in module.named_parameters()
                      if parameter.dim() > 1 and ".lora" not in name)
        return 2 * weights * tokens * (3 if trained else 2)

    language, whole = model.language, config.language == "full"
    image_tokens = sum(len(batch.image_at) for batch in steps)
    tokens = sum(int((batch.group >= 0).sum()) for batch in steps)
    wanted = sum(len(batch.targets) for batch in steps)
    return (flop(language.model.layers, tokens, whole) + flop(language.lm_head, wanted, whole)
            - flop(language.model.layers[-1].mlp, tokens - wanted, whole)
            + flop(model.vision.blocks, image_tokens, config.vision == "full"))


def time_loader(shard, count_tokens, questions_per_image, config):
    """(samples/s, images/s) of train_vlm.py's loader on its own, over 20 steps after the first 5."""
    mixture = Mixture([shard], count_tokens, config.batch_size, questions_per_image=questions_per_image,
                      micro_batch_tokens=config.micro_batch_tokens, leaks=[read_leaks(shard)])
    images = 0
    for number, step in enumerate(mixture.steps(0, 25, os.cpu_count())):
        if number == 4:
            begin = time.perf_counter()
        if number > 4:
            images += sum(len(batch.images) for batch in step.batches)
    seconds = time.perf_counter() - begin
    return 20 * config.batch_size / seconds, images / seconds


def run_beside(script, **flags):
    """What another of the benchmarks prints, run as a process of its own."""
    command = [sys.executable, Path(__file__).with_name(script)]
    command += [f"--{name}={str(value).lower()}" if isinstance(value, bool) else f"--{name}={value}"
                for name, value in flags.items()]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def write_tables(rows, loader, others, peak, config, device, dtype):
    """The tables in Markdown, printed and written; the same and more as json beside it."""
    seconds = {name: float(np.median(row["seconds"])) for name, row in rows.items()}
    peer = seconds.get("transformers + PEFT", math.nan)
    lines = ["| a training step | samples/s | times the peer | tokens/s | MFU | padded | kept, MB "
             "| peak, GB | loss |", "|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for name, row in rows.items():
        cells = (name, f"{config.batch_size / seconds[name]:.1f}", f"{peer / seconds[name]:.2f}",
                 f"{row['tokens'] / seconds[name]:,.0f}", f"{row['flop'] / seconds[name] / peak:.0%}",
                 f"{row['padded']:.0%}", f"{row['kept'] / 1e6:,.0f}",
                 f"{row['peak'] / 1e9:.1f}" if row["peak"] else "not measured", f"{row['loss']:.4f}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| the loader alone | samples/s | images/s |", "|---|--:|--:|"]
    lines += [f"| {name} | {samples:,.0f} | {images:,.0f} |" for name, (samples, images) in loader.items()]
    for text in others:
        lines += ["", "```", text.strip(), "```"]
    machine = describe_machine(device)
    head = (f"{config.batch_size} questions a step, {config.model} model, {dtype}; MFU of "
            f"{peak / 1e12:.2f} TFLOP/s; "
            + ", ".join(f"{name} {fact}" for name, fact in machine.items()))
    text = "\n".join([head, "", *lines, ""])
    print(text)
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    facts = {name: {key: value for key, value in row.items() if key != "run"}
             for name, row in rows.items()}
    out.with_suffix(".json").write_text(json.dumps(
        {"flags": asdict(config), "machine": machine, "peak": peak, "rows": facts, "loader": loader,
         "others": others}, indent=2) + "\n")


def ladder(config, longest, on_gpu):
    """[(name, questions that share an image, length of rows or 0, loss, recomputed?, compiled?)] of our rows."""
    short, every = config.dense_row_length, partial(loss_at_every_position, length=config.dense_row_length)
    return [
        ("padded, logits everywhere, recomputed", 1, longest, partial(loss_at_every_position, length=longest), True,
         False),
        ("packed", 1, short, every, True, False),
        ("logits at answers", 1, short, partial(dense_loss, length=short), True, False),
        ("attention within groups", 1, 0, VLM.loss, True, False),
        *([("compiled", 1, 0, VLM.loss, True, True)] if on_gpu else []),
        ("nothing recomputed", 1, 0, VLM.loss, False, on_gpu),
        *((f"{count} questions share an image", count, 0, VLM.loss, False, on_gpu) for count in (2, 4, 8)),
        ("all questions share an image", 0, 0, VLM.loss, False, on_gpu)]


def peer_row(model, batches, supervised, config, device, autocast):
    """The peer's row, of the weights of our model: its step, how much is padding, its tokens."""
    peer = Peer(model, config.language == "lora").to(device).train()
    peer.vision.requires_grad_(config.vision == "full")
    trained = [p for p in peer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)
    tokens = sum(tokens.numel() for tokens, *_ in batches)
    return {"run": lambda function=update: function(peer, optimizer, loss_of_peer, batches, supervised, autocast),
            "padded": 1 - sum(int(seen.sum()) for _, seen, *_ in batches) / tokens, "tokens": tokens}


def measure(rows, rounds, device):
    """Run each row's step, and add to the row its loss, its seconds, the bytes that it keeps and its peak."""
    warm_up, forward = Progress(len(rows), "rows warmed up"), 0
    for row in rows.values():  # the learning rate is 0, so that all have the same weights and loss
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        row["loss"], row["seconds"] = row["run"](), []
        row["peak"] = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        begin = clock(device)
        row["kept"] = row["run"](count_kept)
        warm_up.row(f"{clock(device) - begin:.2f} s")
        forward += clock(device) - begin
    tell(f"{about(6 * rounds * forward)}: {len(rows)} rows x {rounds} rounds, then the others")
    measured = Progress(rounds * len(rows), "steps")
    for _ in range(rounds):
        for name, row in rows.items():
            row["run"]()
            begin = clock(device)
            row["run"]()
            row["seconds"].append(clock(device) - begin)
            measured.row(f"{name}, {row['seconds'][-1]:.2f} s")


def make(config, vocab_size, dtype, device):
    """The model, of random weights, with what trains as train_vlm.py's flags of these names have it."""
    torch.manual_seed(0)
    lora = {"r": 8, "alpha": 16.0, "dropout": 0.0}
    model = build_vlm(config.model, vocab_size, dtype=torch.float32 if config.language == "full" else dtype,
                      device=device, lora={"targets": "q_proj,v_proj", **lora} if config.language == "lora" else None)
    if config.language == "frozen":
        model.language.requires_grad_(False)
    if config.vision == "lora":
        add_lora(model.vision, "qkv", **lora)
    if config.vision == "frozen":
        model.vision.requires_grad_(False)
    return model.train()  # flex: the blocks alone are not compiled in most rows


def main(config):
    device, dtype = pick_device(config.device, config.dtype)
    autocast = autocast_to(device, dtype)
    shard, tokenizer = open_questions(config, "train")
    model = make(config, tokenizer.vocab_size, dtype, device)
    side = model.vision.config.image_size
    shard.require_image_size(side)
    N, numbers = model.vision.tokens(side, side), choose_questions(shard, config.batch_size)
    longest = N - 2 + max(len(shard.read_sample(number).tokens) for number in numbers)  # the last is no input
    blocks = [*model.vision.blocks, *model.language.blocks]
    on_gpu = device.type == "cuda" and HAS_TRITON
    compiled = [torch.compile(block.forward) for block in blocks] if on_gpu else []
    peak = config.peak_tflops * 1e12 or measure_limits(device, dtype)[0]
    optimizer, rows = make_optimizer([(name, p, 1.0) for name, p in model.named_parameters()], 0.01), {}
    for name, count, length, loss_of, recomputed, fused in ladder(config, longest, on_gpu):
        batches, padded, supervised = pack(shard, numbers, count, length, config, model.vision.tokens)
        batches = [to_device(batch, device) for batch in batches]

        def run_step(function=update, batches=batches, supervised=supervised, loss_of=loss_of,
                     recomputed=recomputed, fused=fused):
            for part, parts in (model.vision, model.vision.blocks), (model.language, blocks):
                part.recomputed = len(parts) if recomputed else 0
            for block, forward in zip(blocks, compiled):
                block.__dict__.pop("forward", None)
                if fused:
                    block.forward = forward
            return function(model, optimizer, loss_of, batches, supervised, autocast)

        rows[name] = {"run": run_step, "padded": padded, "flop": count_flop(model, batches, config),
                      "tokens": sum(batch.tokens.numel() for batch in batches)}
    if config.peer:
        batches, supervised = peer_batches(shard, numbers, N, max(1, config.micro_batch_tokens // longest), device)
        rows["transformers + PEFT"] = peer_row(model, batches, supervised, config, device, autocast) | {
            "flop": rows["nothing recomputed"]["flop"]}
    measure(rows, config.rounds, device)
    tell("then the loader, the answers and the preparation")
    loader = {"each question with its image": time_loader(shard, model.vision.tokens, 1, config),
              "all questions share an image": time_loader(shard, model.vision.tokens, 0, config)}
    others = [run_beside("answering.py", model=config.model, data=config.data, limit=config.questions,
                         shards_dir=config.shards_dir, new_tokens=4, rounds=config.rounds,
                         peer=config.peer, device=config.device, dtype=config.dtype)]
    if config.raw_dir:
        others.append(run_beside("preparing.py", data=config.data, raw_dir=config.raw_dir))
    write_tables(rows, loader, others, peak, config, device, dtype)


if __name__ == "__main__":
    run(main, parse_command_line(Config))
