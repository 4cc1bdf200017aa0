"""
What all trainers share: the optimizer and its schedule, one update, and a run's folder.

A run is a folder: config.json (flags, what it stands on, versions), tokenizer.model, log.jsonl, and
step_<n>/, its checkpoints: the newest, and the best by held-out loss. Each is sealed with the run's record
(plumbing/files.py), so that going on from it can be refused where flags or inputs are others by then.
"""

import contextlib
import json
import math
import shutil
import time
from collections import defaultdict
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from data import Batch, Tokenizer
from plumbing.devices import fill, gather, is_split, sum_over_ranks, whole_and_split
from plumbing.files import (best_checkpoint, checkpoints, differences, find_damage, find_run, nearest_run,
                            newest_checkpoint, read_manifest, require_writable, sealed, sync, write_manifest,
                            write_whole)
from plumbing.flags import UserError

# ----------------------------------------------------------------------------- one update

def learning_rate_at(step, steps, peak, warmup, final=0.0):
    """Linear warm-up over a share of the steps, then a cosine from peak down to final."""
    warmup_steps = warmup * steps
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(steps - warmup_steps, 1)))
    return final + cosine * (peak - final)


def make_optimizer(parameters, weight_decay, beta2=0.999):
    """
    AdamW on what trains; matrices and convolutions decay, nothing else: biases, norms, class token and
    positions do not. parameters: (name, parameter, its learning rate as a multiple of the schedule's).
    """
    groups = defaultdict(list)
    for name, parameter, rate in parameters:
        if parameter.requires_grad:
            decays = parameter.dim() in (2, 4) and not name.endswith("positional_embedding")
            groups[rate, decays, is_split(parameter)].append(parameter)  # AdamW wants whole and split ones apart
    return torch.optim.AdamW([{"params": params, "rate": rate, "weight_decay": weight_decay if decays else 0.0}
                              for (rate, decays, _), params in groups.items()],
                             lr=0.0, betas=(0.9, beta2), fused=True)


def update(optimizer, rate, loss, clip=0.0, scale=None, alone=False):
    """
    One update of all weights from their gradients, summed over all ranks; returns the loss, so summed, and
    the gradient's norm, as floats. rate: the schedule's; loss: a scalar tensor, of this rank; clip: largest
    norm, 0 for none; scale: the LossScale by which the gradients were multiplied; alone: the other ranks train
    models of their own.

    A parameter that no sample has reached, such as the ViT's where none has an image, stays as it is, its
    moments and its count of steps too: a gradient of zero would let weight decay and old momentum move it, by
    what it was not shown. Any number of ranks agrees on which those are. With a LossScale a step whose gradient
    overflows is left out, its norm infinite or nan. Raises FloatingPointError, on every rank, before anything
    is updated when the loss is not finite or, without a LossScale, the gradient.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    whole, reached = [], loss.new_zeros(0)
    if dist.is_initialized() and not alone:
        whole = whole_and_split(trained)[0]
        loss, reached = sum_over_ranks(whole, loss)
    trained = [p for p in trained if p.grad is not None]
    if scale:
        for p in trained:
            p.grad.div_(scale.scale)
    parts = [part for part in whole_and_split(trained) if part]
    norms = [get_total_norm([p.grad for p in part]) for part in parts]
    norms = [norm.full_tensor() if is_split(norm) else norm for norm in norms]
    norm = torch.stack(norms).norm() if len(norms) > 1 else norms[0] if norms else torch.zeros_like(loss)
    for part in parts:
        clip_grads_with_norm_(part, clip or math.inf, norm)
    # The one place where a step waits for the GPU
    loss, norm, *reached = torch.cat([loss[None], norm[None], reached]).tolist()
    overflowed = not math.isfinite(norm)
    if not math.isfinite(loss) or (overflowed and not scale):
        raise FloatingPointError(f"loss {loss}, gradient norm {norm}")
    for p, ranks in zip(whole, reached):
        p.grad = p.grad if ranks else None
    if scale:
        scale.note(overflowed)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate"]
    if not overflowed:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


def even_out(batches, device):
    """
    This rank's micro-batches, and empty ones until all ranks have as many: where the language model is split
    they gather its weights together, and so have to run equally often.
    """
    count = torch.tensor(len(batches), device=device)
    dist.all_reduce(count, dist.ReduceOp.MAX)
    token, none = np.zeros(1, np.int64), np.zeros(0, np.int64)
    empty = Batch(token, token, token.astype(np.int32), token.astype(np.int32), [], none, none, none,
                  none.astype(np.float32), token.astype(np.int32))
    return batches + [empty] * (count.item() - len(batches))


# ----------------------------------------------------------------------------- the folder of a run

def choose_folder(run, name, resume):
    """The folder of --run, else out/<name>_<date>; it is there when this returns."""
    folder = Path(run or Path("out") / f"{name}_{time.strftime('%Y%m%d_%H%M%S')}")
    if resume and not run:
        raise UserError("--resume=true: no run in out/; leave it out to start one")
    if (folder / "manifest.json").exists():
        raise UserError(f"--run={folder}: this is a checkpoint or a shard; a run is the folder that it lies in")
    if resume and not folder.exists():  # as when a scheduler gives the same command every time
        near = nearest_run(folder)
        print(f"{folder}: no run here yet, a new one begins" + f"; did you mean {near}?" * bool(near))
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    require_writable(folder, "run")
    for path in {folder, *new}:
        sync(path.absolute().parent)  # else a power cut may take the whole run along
    return folder


def open_run(folder, config, free=(), restated=()):
    """
    The checkpoint to go on from, or None. Flags have to be those of before, but for the `free`, and for the
    `restated` ones, of which the difference is printed. Raises UserError where a run must not go on.
    """
    if not checkpoints(folder):
        sweep(folder, None)
        return None  # also of a run that was stopped before its first checkpoint
    if not config.resume:
        raise UserError(f"{folder}: holds a run already; add --resume=true to go on with it, or "
                        "choose another --run")
    newest = newest_checkpoint(folder)
    manifest = read_manifest(newest)
    if manifest is None:
        raise UserError(f"{newest}: whole a moment ago, now not to be read; see to the disk, then try again")
    for item in fields(config):  # one that the run does not know came later, with a default that it had
        value, before = getattr(config, item.name), manifest["flags"].get(item.name, item.default)
        if item.name in restated and before != value:
            print(f"{folder}: --{item.name} was {before}, is {value} from here on: the schedule is another one")
        elif item.name not in free and before != value:
            raise UserError(f"--{item.name}={value}: the run in {folder} has {before}; resume it with "
                            "the flags it was started with")
    sweep(folder, newest)
    return newest


def open_trained_run(name="", checkpoint=""):
    """
    (folder, checkpoint, the record that it was sealed with, Tokenizer) of a train_vlm.py run, for whoever uses
    its model; name and checkpoint: as plumbing.files.find_run takes them. Raises UserError where one of them
    is missing, damaged, or not the run's.
    """
    folder, chosen = find_run(name, checkpoint)
    record, tokenizer = read_manifest(chosen), Tokenizer(folder / "tokenizer.model")
    if record is None:
        raise UserError(f"{chosen}: whole a moment ago, now not to be read; see to the disk")
    if "image" not in record:
        raise UserError(f"{chosen}: saved by another version of this code; run `python train_vlm.py` anew")
    if record["inputs"]["tokenizer"] != tokenizer.sha256:
        raise UserError(f"{tokenizer.path}: not the one that the run was trained with; bring that back")
    return folder, chosen, record, tokenizer


def sweep(folder, newest):
    """Remove what a killed run was writing or removing; set aside what is damaged: its step comes again."""
    for leftover in [*folder.glob(".step_*.partial"), *folder.glob("removed_step_*")]:
        shutil.rmtree(leftover)
    for damaged in checkpoints(folder)[:checkpoints(folder).index(newest)] if newest else []:
        damaged.rename(folder / f"damaged_{time.time_ns()}_{damaged.name}")


def require_same_inputs(checkpoint, inputs):
    """The record that a checkpoint was sealed with. Raises UserError where its inputs are others by now."""
    record = read_manifest(checkpoint)
    if "inputs" not in record:
        raise UserError(f"{checkpoint}: saved before runs recorded what they were trained on, so that nobody "
                        "knows whether these are the same data; start another --run")
    if changes := differences(record["inputs"], inputs):
        more = f", and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise UserError(f"{checkpoint.parent}: cannot go on, since it stands on other inputs: "
                        f"{'; '.join(changes[:3])}{more}; bring those back, or start another --run")
    return {name: fact for name, fact in record.items()
            if name not in ("checksum", "files", "name", "step", "held_out_loss")}


def write_run(folder, record, tokenizer, checkpoint):
    """What a run's folder holds beside its checkpoints and its log: as at the start, but for restated flags."""
    write_whole(folder / "tokenizer.model", tokenizer.path.read_bytes())
    if checkpoint is None or (read_manifest(folder, "config.json") or {}).get("flags") != record["flags"]:
        write_manifest(folder, "config.json", record)


def open_log(folder, first, wandb_settings=None):
    """
    A function that appends an entry to log.jsonl and, with wandb_settings, to Weights & Biases. Entries
    behind step `first`, which a killed run left, are dropped: those steps come again.
    """
    path, lines = folder / "log.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # the last line may be torn
            lines += [line + "\n"] if json.loads(line)["step"] <= first else []
    write_whole(path, "".join(lines).encode())
    log = open(path, "a", encoding="utf-8")
    if wandb_settings:
        try:
            import wandb
        except ImportError:
            raise UserError("--wandb=true: run `pip install wandb` first") from None
        wandb.init(project="nanomedq", name=folder.name, config=wandb_settings, dir=str(folder))

    def write_log(entry):
        log.write(json.dumps(entry) + "\n")
        log.flush()
        if wandb_settings:
            wandb.log(entry, step=entry["step"])

    return write_log


# ----------------------------------------------------------------------------- checkpoints

def save_checkpoint(run, step, write, model, optimizer, record, keep, alone=False):
    """
    Write run/step_<n> whole or not at all, sealed with the run's record: what write(folder) writes, and the
    optimizer's moments. Once it is found to be whole on the disk, remove older ones, but the `keep` newest and
    the best. Raises UserError when that fails; what was there stays. Where processes have split the model,
    all have to take part; the first one writes. alone: each rank has a run of its own, and writes it.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    moments = {f"{names[parameter]}:{key}": value.contiguous()
               for parameter, state in optimizer.state.items() for key, value in state.items()}
    if dist.is_initialized() and not alone:
        moments = gather(moments)
        if dist.get_rank():
            return
    folder = run / f"step_{step:06d}"
    with sealed(folder, step=step, **record) as partial:
        write(partial)
        save_file(moments, partial / "optimizer.safetensors")
    if damage := find_damage(folder):
        raise UserError(f"{folder}: not saved: {damage} right after it was written; see to the disk, then go on "
                        "from the newest checkpoint")
    for old in {*checkpoints(run)[keep:]} - {best_checkpoint(run)}:
        removed = run / f"removed_{old.name}"  # at once for who looks, file by file on the disk
        old.rename(removed)
        shutil.rmtree(removed)


@torch.no_grad()
def load_optimizer(optimizer, model, checkpoint):
    """Put the moments of a checkpoint into an optimizer; of split parameters each process keeps its part."""
    parameters = dict(model.named_parameters())
    with safe_open(checkpoint / "optimizer.safetensors", "pt") as file:
        for key in file.keys():
            name, _, kind = key.rpartition(":")
            parameter, value = parameters[name], file.get_tensor(key)
            if is_split(parameter) and kind != "step":
                moment = torch.zeros_like(parameter)
                fill(moment, value)
            else:
                moment = value.to(parameter.device, copy=True)
            optimizer.state[parameter][kind] = moment
