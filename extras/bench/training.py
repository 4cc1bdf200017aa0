"""
How fast train_vlm.py trains: each thing that it leaves out, and the usual way beside it.

    python extras/bench/training.py                       the small model, 64 real questions a step
    python extras/bench/training.py --model=paper         the paper's sizes, random weights, on a GPU
    python extras/bench/training.py --model=qwen_40m      a Qwen3-VL, its tower frozen, LoRA on all seven matrices
    python extras/bench/training.py --model=medgpt --peer=false --ladder=false --recompute=1    MedGPT-oss, on a GPU

A step is the same --batch_size questions of a prepared training split in every row of the table: they
are read and packed first, and only forward, backward and update are timed. Rows go from what one would
write first to what train_vlm.py does, and then share an image among more and more of its questions. The
peer is the step of transformers' model with PEFT's LoRA, as LLaVA-style code or TRL's SFTTrainer drives it
(peers.py): every question with its image in a row padded to the longest, logits and labels at all positions.
In float32 its loss and gradients are held against ours first. A round is two steps of each row, in turns,
of which the second is timed: the first brings the row's memory back. Then the loader alone, which has to
keep ahead of the fastest row; then
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
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import Batch, Mixture
from extras.bench.answering import patches_of_token
from extras.bench.limits import clock, measure_limits
from extras.bench.peers import Peer, lay_out, make_peer, open_questions, require_shapes
from extras.bench.progress import Progress, about, tell
from extras.bench.sizes import build
from lora import add_lora, lora_layers
from model import VLM, ViT
from plumbing.devices import autocast_to, describe_machine, pick_device, to_device
from plumbing.flags import Count, Device, Range, Scale, Share, UserError, Whole, parse_command_line, run
from plumbing.kernels import HAS_TRITON, compile_blocks
from plumbing.leaks import read_leaks
from plumbing.sources import FOUR, SEVEN
from run import make_optimizer
from zoo.gpt_oss import GptOss

SAME = 1e-4  # relative error of the peer's loss and gradients to ours, in float32

@dataclass(frozen=True)
class Config:
    model: str = "small"  # sizes: paper, small, qwen_40m, qwen3_vl_8b, medgpt and others; weights are random
    data: str = "path_vqa"  # prepared dataset
    shards_dir: str = "shards"  # where prepare/all.py put it
    batch_size: Count = 64  # questions in a step
    vision: Literal["auto", "full", "lora", "frozen"] = "auto"  # what trains; auto: all, of a Qwen3-VL nothing
    projector: Literal["full", "frozen"] = "full"  # what trains of the projection
    language: Literal["lora", "full", "frozen"] = "lora"  # what trains of the language model
    dense_row_length: Count = 448  # tokens of a row in which attention is computed for all of it
    micro_batch_tokens: Count = 4096  # tokens of a forward pass
    recompute: Share = 0.0  # share of the blocks that compute their activations twice, without --ladder
    base_bits: Literal[0, 16, 8, 4] = 0  # of the frozen base's matrices, without a peer; 0: as --dtype
    memory_gb: Scale = 0.0  # of the GPU that may be used, 1e9 bytes each; 0: all
    computed_gb: Scale = 0.0  # peak of a step without sharing, as extras/bench/memory.py computes it, to stand beside
    ladder: bool = True  # time the rows that lead to what train_vlm.py does, too
    rounds: Count = 3  # timed steps of each row
    peer: bool = True  # time the peer, too
    peer_batch_size: Whole = 0  # questions of its forward pass; 0: as many as fit into --micro_batch_tokens
    questions: Whole = 500  # of the test split that are answered, 4 tokens each; 0: all of it
    beside: bool = True  # measure the loader, answers and preparation behind it, too
    raw_dir: str = ""  # raw files whose preparation is timed, too; none: it is not
    peak_tflops: Annotated[float, Range(0, 1e6)] = 0.0  # that MFU is a share of; 0: of one that is measured
    out: str = "out/bench.md"  # the table; the json stands beside it
    device: Device = "auto"  # cuda, mps or cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where the GPU has it


# ----------------------------------------------------------------------------- ours

def join(batches):
    """Several Batches end to end, as one that is computed in one pass."""
    starts = np.cumsum([0] + [len(batch.tokens) for batch in batches])
    columns = {name: [getattr(batch, name) + (start if name.endswith("_at") else 0)
                      for batch, start in zip(batches, starts)] for name in (
        "tokens", "positions", "branch", "image_at", "answer_at", "targets", "weights", "key")}
    groups = np.cumsum([0] + [1 + batch.group.max() for batch in batches])
    columns["group"] = [np.where(batch.group < 0, -1, batch.group + first).astype(np.int32)
                        for batch, first in zip(batches, groups)]
    return Batch(images=[image for batch in batches for image in batch.images],
                 **{name: np.concatenate(arrays) for name, arrays in columns.items()})


def dense_masks(batch, length):
    """model.packed_mask as one would write it first: rows of so many tokens, in each who may look at whom."""
    masks = []
    for group, branch in zip(batch.group.split(length), batch.branch.split(length)):
        own = (branch[None] == 0) | (branch[:, None] == branch[None])  # (length, length)
        masks.append((length, ((group[:, None] == group[None]) & own).tril(), 0))
    return masks


def dense_logits(model, batch, length, wanted):
    """VLM.forward with that mask: every token's attention to its whole row is computed."""
    positions = model.vision.place(batch.positions, batch.group, batch.branch, batch.image_at, batch.images)
    return model.language(batch.tokens, positions, dense_masks(batch, length), wanted,
                          model.encode_images(batch.images), batch.image_at)


def dense_loss(model, batch, length):
    """VLM.loss from them."""
    return F.cross_entropy(dense_logits(model, batch, length, batch.answer_at), batch.targets, reduction="sum")


def loss_at_every_position(model, batch, length):
    """The same with the logits of all tokens, of which most are then ignored."""
    logits = dense_logits(model, batch, length, None)  # (T, V)
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


def pack(shard, numbers, questions_per_image, length, config, count_tokens, multiple=1):
    """
    (micro-batches, share of their tokens that is padding, supervised tokens) of these samples, each image
    shared by so many of its questions. length: of rows that are padded to it; 0: one sequence, of a multiple.
    """
    mixture = Mixture([shard], count_tokens, batch_size=len(numbers), max_length=1 << 20,
                      micro_batch_tokens=length or config.micro_batch_tokens, multiple=length or multiple)
    groups, asked = [], defaultdict(int)
    for number in numbers:
        image = int(shard.samples[number]["image"])
        groups.append((image, asked[image] // (questions_per_image or len(numbers))))
        asked[image] += 1
    step, rows = mixture.pack(0, numbers, groups), max(1, config.micro_batch_tokens // length) if length else 1
    batches = [join(step.batches[at:at + rows]) for at in range(0, len(step.batches), rows)]
    return batches, step.padded, step.divisor


# ----------------------------------------------------------------------------- the peer

def peer_row(peer, batches, autocast):
    """The peer's row: its step, how much is padding, its tokens."""
    optimizer = torch.optim.AdamW([p for p in peer.parameters() if p.requires_grad], lr=0.0, fused=True)
    supervised, tokens = sum(rows.supervised for rows in batches), sum(rows.seen.numel() for rows in batches)

    def run_step(function=update):
        return function(peer, optimizer, Peer.__call__, batches, supervised, autocast)

    seen = sum(int(rows.seen.sum()) for rows in batches)
    return {"run": run_step, "padded": 1 - seen / tokens, "tokens": tokens, "held": (peer, optimizer)}


def require_same(model, peer, ours, theirs):
    """
    Raise AssertionError unless our loss of Batches and the peer's of Rows, and their gradients, are the same.
    Returns the largest relative error.
    """
    for batch in ours:
        model.loss(batch).backward()
    for rows in theirs:
        peer(rows).backward()
    errors = {name: float((mine.grad - its.grad).norm() / mine.grad.norm())
              for name, mine, its in peer.pair(model) if mine.requires_grad}
    with torch.no_grad():
        mine, its = sum(map(model.loss, ours)), sum(map(peer, theirs))
    errors["loss"] = float((mine - its).abs() / mine)
    for module in (model, peer):
        module.zero_grad(set_to_none=True)
    worst = max(errors, key=errors.get)
    assert errors[worst] < SAME, f"the peer's {worst} differs by {errors[worst]:.1e}"
    return errors[worst]


# ----------------------------------------------------------------------------- measurement

def count_kept(model, optimizer, loss_of, batches, supervised, autocast):
    """Bytes that the first micro-batch keeps for its backward pass, beside the parameters."""
    if batches[0].tokens.is_cuda:  # whose allocator knows; under hooks blocks would be compiled anew
        before = torch.cuda.memory_allocated()
        with autocast:
            loss = loss_of(model, batches[0])
        return torch.cuda.memory_allocated() - before - loss.nbytes
    sizes, own = {}, {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        loss_of(model, batches[0])
    return sum(sizes.values())


def bytes_of(model, optimizer):
    """Bytes on a GPU of a model and of what its optimizer keeps."""
    moments = [moment for kept in optimizer.state.values() for moment in kept.values()]
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), *moments) if tensor.is_cuda)


def choose_questions(shard, count):
    """Numbers of so many samples: all questions about one image, then about another, drawn at random."""
    image_of = shard.samples["image"]
    order = np.random.default_rng(0).permutation(int(image_of.max()) + 1)
    numbers = np.concatenate([np.flatnonzero(image_of == image) for image in order[:count]])
    return numbers[:count].tolist()


def count_flop(model, steps, config):
    """
    FLOP that a step cannot do without: matrix products of its tokens, no padding, no attention. Each is done once
    forward, once more where a gradient passes through, and once more where the matrix itself trains.
    """
    def count(module):
        experts = getattr(model.language.config, "num_local_experts", 1)
        share = getattr(model.language.config, "num_experts_per_tok", 1) / experts  # of them that a token has
        return round(sum(parameter.numel() * (share if ".experts." in f".{name}" else 1)
                         for name, parameter in module.named_parameters()
                         if parameter.dim() > 1 and ".lora" not in name))

    def passes(how, before):
        return 1 + (how != "frozen" or before) + (how == "full")

    language, vision = model.language, config.vision != "frozen"
    head = getattr(language.model, "language_model", language.model).embed_tokens.weight.numel()  # it is as large
    image_tokens = sum(len(batch.image_at) for batch in steps)
    tokens = sum(int((batch.group >= 0).sum()) for batch in steps)
    wanted = sum(len(batch.targets) for batch in steps)
    text = count(language.blocks) * tokens + head * wanted - count(language.blocks[-1].mlp) * (tokens - wanted)
    patches = image_tokens * patches_of_token(model.vision)
    return 2 * (text * passes(config.language, vision or config.projector == "full")
                + count(model.vision.blocks) * patches * passes(config.vision, False)
                + count(model.projector) * image_tokens * passes(config.projector, vision))


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
    lines = ["| a training step | s, median and range | samples/s | times the peer | tokens/s | MFU | padded "
             "| kept, MB | peak, GB | loss |", "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for name, row in rows.items():
        cells = (name, f"{seconds[name]:.2f} ({min(row['seconds']):.2f} to {max(row['seconds']):.2f})",
                 f"{config.batch_size / seconds[name]:.1f}",
                 f"{peer / seconds[name]:.2f}" if config.peer else "no peer",
                 f"{row['tokens'] / seconds[name]:,.0f}", f"{row['flop'] / seconds[name] / peak:.0%}",
                 f"{row['padded']:.0%}", f"{row['kept'] / 1e6:,.0f}",
                 f"{row['peak'] / 1e9:.1f}" if row["peak"] else "not measured", f"{row['loss']:.4f}")
        lines.append(f"| {' | '.join(cells)} |")
    if config.computed_gb:
        measured = (rows[name_unshared(config)]["peak"] or 0) / 1e9
        lines += ["", f"Peak of {name_unshared(config)}: computed {config.computed_gb:.1f} GB, measured "
                  + (f"{measured:.1f}, {measured / config.computed_gb:.2f} of it" if measured else "on a GPU alone")]
    lines += ["", "| the loader alone | samples/s | images/s |", "|---|--:|--:|"] if loader else []
    lines += [f"| {name} | {samples:,.0f} | {images:,.0f} |" for name, (samples, images) in loader.items()]
    for text in others:
        lines += ["", "```", text.strip(), "```"]
    machine = describe_machine(device)
    trains = ", ".join(f"{part} {getattr(config, part)}" for part in ("vision", "projector", "language"))
    head = (f"{config.batch_size} questions a step, {config.model} model, {trains}, {dtype}; MFU of "
            f"{peak / 1e12:.2f} TFLOP/s; "
            + ", ".join(f"{name} {fact}" for name, fact in machine.items()))
    text = "\n".join([head, "", *lines, ""])
    print(text)
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    facts = {name: {key: value for key, value in row.items() if key not in ("run", "held")}
             for name, row in rows.items()}
    out.with_suffix(".json").write_text(json.dumps(
        {"flags": asdict(config), "machine": machine, "peak": peak, "rows": facts, "loader": loader,
         "others": others}, indent=2) + "\n")


def name_unshared(config):
    """The row of train_vlm.py's step where no questions share an image."""
    return f"{config.recompute:.0%} recomputed" if config.recompute else "nothing recomputed"


def ladder(config, longest, on_gpu):
    """[(name, questions that share an image, length of rows or 0, loss, share recomputed, compiled?)] of our rows."""
    short, everywhere, plain = config.dense_row_length, loss_at_every_position, (VLM.loss, config.recompute, on_gpu)
    unshared, shared = (name_unshared(config), 1, 0, *plain), ("all questions share an image", 0, 0, *plain)
    return [unshared, shared] if not config.ladder else [
        ("padded, logits everywhere, recomputed", 1, longest, partial(everywhere, length=longest), 1, False),
        ("packed", 1, short, partial(everywhere, length=short), 1, False),
        ("logits at answers", 1, short, partial(dense_loss, length=short), 1, False),
        ("attention within groups", 1, 0, VLM.loss, 1, False),
        *([("compiled", 1, 0, VLM.loss, 1, True)] if on_gpu else []),
        unshared, *((f"{count} questions share an image", count, 0, *plain) for count in (2, 4, 8)), shared]


def measure(rows, rounds, device):
    """Run each row's step, and add to the row its loss, its seconds, the bytes that it keeps and its peak."""
    warm_up, forward = Progress(len(rows), "rows warmed up"), 0
    for name, row in rows.items():  # the learning rate is 0, so that all have the same weights and loss
        begin = clock(device)
        row["loss"], row["seconds"], row["peak"] = row["run"](), [], None
        first, begin = clock(device) - begin, clock(device)
        row["kept"] = row["run"](count_kept)
        forward += clock(device) - begin
        warm_up.row(f"{name}, {first:.2f} s, loss {row['loss']:.4f}")
    tell(f"{about(6 * rounds * forward)}: {len(rows)} rows x {rounds} rounds, then the others")
    measured = Progress(rounds * len(rows), "steps")
    for _ in range(rounds):
        for name, row in rows.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            row["run"]()
            begin = clock(device)
            row["run"]()
            row["seconds"].append(clock(device) - begin)
            if device.type == "cuda":  # but for the other side, which lies there all the while
                others = {id(other["held"]): other["held"] for other in rows.values() if other["held"] != row["held"]}
                row["peak"] = torch.cuda.max_memory_allocated() - sum(bytes_of(*other) for other in others.values())
            measured.row(f"{name}, {row['seconds'][-1]:.2f} s, peak {(row['peak'] or 0) / 1e9:.1f} GB")


def make(config, vocab_size, dtype, device):
    """The model, of random weights, with what trains as train_vlm.py's flags have it; and the flags."""
    model = build(config.model, vocab_size, torch.float32 if config.language == "full" else dtype, device,
                  config.base_bits)
    vision, targets = ("full", "q_proj,v_proj") if isinstance(model.vision, ViT) else ("frozen", SEVEN)
    targets = FOUR if isinstance(model.language, GptOss) else targets
    config = replace(config, vision={"auto": vision}.get(config.vision, config.vision))
    for part, targets in (("vision", "qkv"), ("language", targets), ("projector", "")):
        module, how = getattr(model, part), getattr(config, part)
        if how == "full":
            module.float()  # in which train_vlm.py trains, whatever it computes in
        else:
            module.requires_grad_(False)
        if how == "lora":
            model.lora[part] = {"targets": targets, "r": 8, "alpha": 16.0, "dropout": 0.0}
            add_lora(module, **model.lora[part])
        for layer in lora_layers(module).values():
            nn.init.normal_(layer.lora_B, std=0.02)  # as if it had been trained: of zeros, A has no gradient
    return model.train(), config  # flex: the blocks alone are not compiled in most rows


def limit_memory(gigabytes, device):
    """Let this process have no more of a GPU's memory, 1e9 bytes each."""
    share = gigabytes * 1e9 / torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(share, 1.0), device.index)  # which wants a number, or None


def our_rows(model, shard, numbers, longest, config, device, autocast):
    """{name: row} of the ladder, each with its step and what it computes."""
    blocks = [*model.vision.blocks, *model.language.blocks]
    on_gpu = device.type == "cuda" and HAS_TRITON
    if on_gpu:
        compile_blocks(blocks)  # as train_vlm.py does; some rows are run without
    compiled = [block._compiled_call_impl for block in blocks]
    optimizer, rows = make_optimizer([(name, p, 1.0) for name, p in model.named_parameters()], 0.01), {}
    held = model, optimizer
    for name, count, length, loss_of, recomputed, fused in ladder(config, longest, on_gpu):
        batches, padded, supervised = pack(shard, numbers, count, length, config, model.vision.tokens,
                                           128 if device.type == "cuda" else 1)  # as train_vlm.py pads them
        batches = [to_device(batch, device) for batch in batches]

        def run_step(function=update, batches=batches, supervised=supervised, loss_of=loss_of,
                     recomputed=recomputed, fused=fused):
            for part in (model.vision, model.language):
                part.recomputed = math.ceil(recomputed * len(part.blocks))
            for block, call in zip(blocks, compiled):
                block._compiled_call_impl = call if fused else None
            return function(model, optimizer, loss_of, batches, supervised, autocast)

        rows[name] = {"run": run_step, "padded": padded, "flop": count_flop(model, batches, config), "held": held,
                      "tokens": sum(batch.tokens.numel() for batch in batches)}
    return rows


def main(config):
    device, dtype = pick_device(config.device, config.dtype)
    if config.base_bits and config.peer or config.recompute and config.ladder:
        raise UserError("--base_bits is for ours alone, with --peer=false; --recompute for --ladder=false")
    if config.memory_gb and device.type == "cuda":
        limit_memory(config.memory_gb, device)
    autocast = autocast_to(device, dtype)
    shard, tokenizer = open_questions(config, "train")
    model, config = make(config, tokenizer.vocab_size, dtype, device)
    require_shapes(model, shard)
    numbers = choose_questions(shard, config.batch_size)
    sizes = shard.image_index[shard.samples["image"][numbers]]
    image_tokens = model.vision.tokens(sizes["height"].astype(int), sizes["width"].astype(int))
    longest = int((image_tokens - 2 + shard.samples["length"][numbers]).max())  # the last token is no input
    peak = config.peak_tflops * 1e12 or measure_limits(device, dtype)[0]
    rows = our_rows(model, shard, numbers, longest, config, device, autocast)
    if config.peer:
        size = config.peer_batch_size or max(1, config.micro_batch_tokens // longest)
        peer = make_peer(model, shard, tokenizer.stops).train()
        batches = [peer.collate(lay_out(shard, numbers[at:at + size], model.vision, device))
                   for at in range(0, len(numbers), size)]
        if dtype == torch.float32:
            alone = pack(shard, numbers, 1, 0, config, model.vision.tokens)[0]
            error = require_same(model, peer, [to_device(batch, device) for batch in alone], batches)
            tell(f"the peer's loss and gradients are ours, to {error:.0e}")
        rows["transformers + PEFT"] = peer_row(peer, batches, autocast)
        rows["transformers + PEFT"]["flop"] = rows[name_unshared(config)]["flop"]
    measure(rows, config.rounds, device)
    if not config.beside:
        return write_tables(rows, {}, [], peak, config, device, dtype)
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
