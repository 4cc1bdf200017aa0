"""
What all trainers share: which parameters train, the optimizer and its schedule, one update, and checkpoints.

A run's folder and what is written down of it: plumbing/runs.py.
"""

import math
import shutil
from collections import defaultdict

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from data import Batch
from lora import add_lora, lora_layers
from plumbing.devices import fill, gather, is_split, sum_over_ranks, whole_and_split
from plumbing.files import best_checkpoint, checkpoints, find_damage, find_run, read_manifest, sealed
from plumbing.flags import UserError
from plumbing.kernels import HAS_TRITON, compile_blocks
from weights import is_trained
from zoo.chatml import open_tokenizer

# ----------------------------------------------------------------------------- what trains

def lora_settings(config, targets):
    """LoRA of a part, by a script's flags, on the matrices that `targets` names; train_grpo.py never drops any."""
    return {"targets": targets, "r": config.lora_r, "alpha": config.lora_alpha,
            "dropout": getattr(config, "lora_dropout", 0.0)}


def make_trainable(model, config, checkpoint):
    """Let the flagged parts train: in full, their LoRA alone, or not at all."""
    for part, targets in [("vision", config.lora_vision_targets), ("projector", ""),
                          ("language", config.lora_targets)]:
        module, how = getattr(model, part), getattr(config, part)
        if how == "lora" and part not in model.lora:
            model.lora[part] = lora_settings(config, targets)
            add_lora(module, **model.lora[part])
        elif how == "full" and part in model.lora:
            raise UserError(f"--{part}=full: --start has LoRA in it; go on with --{part}=lora, or merge it first "
                            "with `python extras/share/export.py`")
        module.requires_grad_(how == "full")
        for layer in lora_layers(module).values() if how == "lora" else ():
            layer.lora_A.requires_grad_(True)
            layer.lora_B.requires_grad_(True)
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        total = sum(p.numel() for p in module.parameters())
        here = sum((p.to_local() if is_split(p) else p).numel() for p in module.parameters())
        print(f"{part:9} {total:13,} parameters, {trained:13,} trained ({how})"
              + f", {here:,} of them in each process" * (here < total))
        if how == "lora" and model.lora[part] != lora_settings(config, targets):
            print(f"{part:9} goes on with the LoRA of --start, not that of the flags: {model.lora[part]}")
        if not (checkpoint or config.start or model.weights[part]) and how != "full" and part != "projector":
            print(f"{part:9} is random and stays so under --{part}={how}: did you mean "
                  f"--{part}=full, or --{part}_weights=...?")
    if not is_trained(model):
        raise UserError("every part is frozen: set --vision, --projector or --language")
    model.vision.recomputed = math.ceil(config.recompute * len(model.vision.blocks))
    model.language.recomputed = math.ceil(config.recompute * len(model.language.blocks))
    model.flex = config.compile
    if config.compile and device_of(model).type == "cuda" and HAS_TRITON:
        compile_blocks([*model.vision.blocks, *model.language.blocks])


def require_images(config, mixture):
    """Raise UserError where a frozen language model leaves nothing to train, for no sample has an image."""
    if config.language == "frozen" and not mixture.has_images():
        raise UserError(f"--language=frozen: no sample of --data={config.data} has an image, so that nothing "
                        "would train; choose --language=lora, or data with images")


def device_of(model):
    return next(model.projector.parameters()).device


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


def open_trained_run(name="", checkpoint=""):
    """
    (folder, checkpoint, the record that it was sealed with, Tokenizer) of a train_vlm.py run, for whoever uses
    its model; name and checkpoint: as plumbing.files.find_run takes them. Raises UserError where one of them
    is missing, damaged, or not the run's.
    """
    folder, chosen = find_run(name, checkpoint)
    record = read_manifest(chosen)
    tokenizer = open_tokenizer(folder, (record or {}).get("system", ""))
    if record is None:
        raise UserError(f"{chosen}: whole a moment ago, now not to be read; see to the disk")
    if "image" not in record:
        raise UserError(f"{chosen}: saved by another version of this code; run `python train_vlm.py` anew")
    if record["inputs"]["tokenizer"] != tokenizer.sha256:
        raise UserError(f"{tokenizer.path}: not the one that the run was trained with; bring that back")
    return folder, chosen, record, tokenizer
