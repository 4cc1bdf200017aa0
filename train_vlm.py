"""
Train the vision-language model: images and questions in, next-token cross-entropy on the answers.

    python train_vlm.py --batch_size=64                          the paper's recipe (section 3)
    python train_vlm.py --model=sample --data=sample --language=full      from scratch, on a laptop

A run is a folder: config.json (flags, what it stands on, versions), tokenizer.model, log.jsonl, and
step_N/ with the newest checkpoints, which eval_vqa.py loads. The same command with --resume=true goes
on from there, bit for bit: the samples of a step, and any random number it draws, depend on seed and
step alone. It is refused where the data, the tokenizer or the base weights are others by then.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from plumbing.flags import (BatchSize, Count, Datasets, Device, Range, Scale, Seconds, Share, ShareBelow1,
                            Threads, UserError, Whole, parse_command_line, run)


@dataclass(frozen=True)
class Config:
    data: Datasets = "path_vqa,vqa_rad,pubmed_qa"  # prepared datasets, each with an optional weight: name:2
    shards_dir: str = "shards"  # where prepare/all.py put them
    batch_size: BatchSize = 64  # samples in an optimiser step
    questions_per_image: Whole = 1  # questions of a step that may share one copy of their image; 0: all
    row_length: Annotated[int, Range(16, 1 << 20)] = 3584  # tokens of a packed row
    micro_batch_tokens: Count = 8192  # tokens of a forward pass; trades memory for speed, not results
    recompute: Share = 0.0  # share of the blocks whose activations are computed twice, to save memory
    compile: bool = True  # the blocks' small operations into few kernels, on a GPU; takes a minute at first
    held_out: Whole = 512  # samples kept from training for the validation loss
    workers: Threads = 0  # that read and decode ahead of the trainer; 0: one a core, of a process's share
    model: Literal["paper", "small", "sample"] = "paper"  # sizes of parts that have no weights file
    vision_weights: str = "auto"  # safetensors file; auto: BiomedCLIP for the paper's; none: random
    language_weights: str = "auto"  # hub folder; auto: PMC-LLaMA for the paper's; none: random
    vision: Literal["full", "lora", "frozen"] = "full"  # what trains of the vision transformer
    projector: Literal["full", "frozen"] = "full"  # what trains of the projection
    language: Literal["lora", "full", "frozen"] = "lora"  # what trains of the language model
    lora_targets: str = "q_proj,v_proj"  # matrices of the language model with LoRA
    lora_vision_targets: str = "qkv"  # matrices of the vision transformer with --vision=lora
    lora_r: Annotated[int, Range(1, 1 << 16)] = 8  # rank
    lora_alpha: Scale = 16.0  # the update is scaled by alpha / r
    lora_dropout: ShareBelow1 = 0.0  # on the input of the update
    epochs: Annotated[float, Range(1e-6, 1e6)] = 15.0  # passes over the data
    max_steps: Whole = 0  # stop after so many steps; 0: after the epochs
    learning_rate: Scale = 5e-5  # peak
    warmup: Share = 0.03  # share of the steps in which it rises from 0
    final_learning_rate: Scale = 0.0  # where the cosine ends
    weight_decay: Scale = 0.01  # of matrices; biases, norms, class token and positions have none
    beta2: ShareBelow1 = 0.999  # AdamW's second-moment decay
    clip: Scale = 1.0  # largest norm of the gradient; 0: no clipping
    seed: Whole = 0  # of initialisation, order and dropout
    device: Device = "auto"  # cuda, mps or cpu
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: on a GPU bfloat16, or float16 if it has none
    run: str = ""  # folder of this run; none: out/<model>_<date>
    resume: bool = False  # go on from the newest checkpoint of the run
    log_every: Count = 10  # steps
    evaluate_every: Count = 500  # steps
    save_minutes: Scale = 30.0  # between two checkpoints; 0: by steps alone
    save_every: Whole = 0  # also after so many steps; 0: by minutes alone
    keep: Count = 2  # newest checkpoints that stay
    shard: bool = False  # torchrun's processes split the language model between them, to save memory
    rank_timeout: Seconds = 600  # that torchrun's processes wait for one another, and for a save, before all end
    wandb: bool = False  # also log to Weights & Biases, if installed


if __name__ == "__main__":
    CONFIG = parse_command_line(Config)  # before torch is imported: --help and a typo are answered at once

import contextlib
import json
import math
import shutil
import signal
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

from data import Batch, Tokenizer, open_mixture
from lora import add_lora
from model import CONFIGS, HAS_TRITON, VLM, compile_blocks, is_trained
from plumbing.claims import tokenizer_mismatch
from plumbing.files import (checkpoints, differences, find_damage, hash_json, lock, nearest_run,
                            newest_checkpoint, read_manifest, require_writable, seal, sync, write_manifest,
                            write_whole)
from plumbing.devices import LossScale, autocast_to, describe_machine, join_group, pick_device, usable_cores
from plumbing.devices import agree

FREE_ON_RESUME = {"workers", "recompute", "compile", "device", "resume", "run", "log_every",
                  "evaluate_every", "save_every", "save_minutes", "keep", "shard", "rank_timeout", "wandb",
                  "shards_dir",  # up to here what changes no number, from here on its rounding alone
                  "micro_batch_tokens", "row_length"}  # as far as require_same_samples lets it


def learning_rate_at(step, steps, config):
    """Linear warm-up, then a cosine down to final_learning_rate."""
    warmup_steps = config.warmup * steps
    if step < warmup_steps:
        return config.learning_rate * (step + 1) / (warmup_steps + 1)
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(steps - warmup_steps, 1)))
    return config.final_learning_rate + cosine * (config.learning_rate - config.final_learning_rate)


def choose_folder(config):
    """The run's folder, which is there when this returns."""
    folder = Path(config.run or Path("out") / f"{config.model}_{time.strftime('%Y%m%d_%H%M%S')}")
    if config.resume and not config.run:
        runs = sorted(Path("out").glob("*/config.json"), key=lambda path: path.stat().st_mtime)
        if not runs:
            raise UserError("--resume=true: no run in out/; leave it out to start one")
        folder = runs[-1].parent
    if (folder / "manifest.json").exists():
        raise UserError(f"--run={folder}: this is a checkpoint or a shard; a run is the folder that it lies in")
    if config.resume and not folder.exists():  # as when a scheduler gives the same command every time
        near = nearest_run(folder)
        print(f"{folder}: no run here yet, a new one begins" + f"; did you mean {near}?" * bool(near))
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    require_writable(folder, "run")
    for path in {folder, *new}:
        sync(path.absolute().parent)  # else a power cut may take the whole run along
    return folder


def open_run(config, folder):
    """The checkpoint to go on from, or None."""
    if checkpoints(folder) and not config.resume:
        raise UserError(f"{folder}: holds a run already; add --resume=true to go on with it, or "
                        "choose another --run")
    newest = None  # a run that was stopped before its first checkpoint starts anew
    if checkpoints(folder):
        newest = newest_checkpoint(folder)
        manifest = read_manifest(newest)
        if manifest is None:
            raise UserError(f"{newest}: whole a moment ago, now not to be read; see to the disk, then try again")
        for item in fields(config):  # one that the run does not know came later, with a default that it had
            value, before = getattr(config, item.name), manifest["flags"].get(item.name, item.default)
            if item.name not in FREE_ON_RESUME and before != value:
                raise UserError(f"--{item.name}={value}: the run in {folder} has {before}; resume it with "
                                "the flags it was started with")
    sweep(folder, newest)
    return newest


def sweep(folder, newest):
    """Remove what a killed run was writing or removing; set aside what is damaged: its step comes again."""
    for leftover in [*folder.glob("partial_step_*"), *folder.glob("removed_step_*")]:
        shutil.rmtree(leftover)
    for damaged in checkpoints(folder)[:checkpoints(folder).index(newest)] if newest else []:
        damaged.rename(folder / f"damaged_{time.time_ns()}_{damaged.name}")


def open_data(config, rank=0, ranks=1):
    """The Mixture of the training splits, and the tokenizer that they were made with."""
    mixture = open_mixture(
        config.data, config.shards_dir, "train", image_tokens=CONFIGS[config.model][0].tokens,
        batch_size=config.batch_size, questions_per_image=config.questions_per_image,
        row_length=config.row_length, seed=config.seed, held_out=config.held_out, rank=rank, ranks=ranks,
        rows_per_batch=max(1, config.micro_batch_tokens // config.row_length))
    for shard, train, held, (leaks, numbers) in zip(mixture.shards, mixture.train, mixture.held_out,
                                                    mixture.leaks):
        told = f", {len(numbers):,} {'left out' if leaks == 'drop' else 'kept'} whose image a test split has"
        print(f"{shard.folder}: {len(train):,} samples to train on, {len(held):,} held out"
              f"{told if len(numbers) else ''}")
    if mixture.cut or mixture.too_long:
        print(f"rows of {config.row_length} tokens: {mixture.cut:,} prompts cut at the front, "
              f"{mixture.too_long:,} samples left out because their answer does not fit")
    if config.language == "frozen" and not mixture.has_images():
        raise UserError(f"--language=frozen: no sample of --data={config.data} has an image, so that nothing "
                        "would train; choose --language=lora, or data with images")
    dataset = mixture.shards[0].folder.parent
    tokenizer = Tokenizer(dataset / "tokenizer.model")
    if tokenizer.sha256 != mixture.shards[0].manifest["tokenizer_sha256"]:
        raise UserError(f"{tokenizer.path}: not the one its shards were made with; run "
                        f"`python prepare/all.py --only={dataset.name}`")
    return mixture, tokenizer


def require_same_samples(mixture, config, checkpoint):
    """Raise UserError where rows of another length than before the checkpoint would change what a sample is."""
    before = read_manifest(checkpoint)["flags"]["row_length"]
    if not mixture.fits_alike(before):
        raise UserError(f"--row_length={config.row_length}: the run in {checkpoint.parent} has {before}, at which "
                        "other answers fit or prompts are cut elsewhere; resume it with that")


def make_model(config, tokenizer, checkpoint, device, dtype):
    """The VLM with the flagged parts trainable, from a checkpoint or from the weights files."""
    # Trained weights stay in float32; autocast rounds them in use, never where they are summed up.
    language_dtype = torch.float32 if config.language == "full" else dtype
    if checkpoint:
        model = VLM.load(checkpoint, language_dtype, device)
    else:
        def weights(flag, of_the_paper):
            return {"auto": of_the_paper if config.model == "paper" else "", "none": ""}.get(flag, flag)

        language = weights(config.language_weights, "weights/pmc_llama_7b")
        if Path(language, "config.json").is_file():
            pieces = [tokenizer.model.id_to_piece(token) for token in range(tokenizer.vocab_size)]
            problem, unknown = tokenizer_mismatch(language, pieces)
            if problem:
                raise UserError(problem)
            if unknown:
                print(f"{language}: not known whether its tokenizer is the shards': {unknown}")
        model = VLM.build(config.model, tokenizer.vocab_size,
                          weights(config.vision_weights, "weights/biomedclip.safetensors"),
                          language, language_dtype, device)
    for part, targets in [("vision", config.lora_vision_targets), ("projector", ""),
                          ("language", config.lora_targets)]:
        module, how = getattr(model, part), getattr(config, part)
        if how != "lora":
            module.requires_grad_(how == "full")
        elif part not in model.lora:
            model.lora[part] = {"targets": targets, "r": config.lora_r, "alpha": config.lora_alpha,
                                "dropout": config.lora_dropout}
            add_lora(module, **model.lora[part])
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        total = sum(p.numel() for p in module.parameters())
        source = model.weights.get(part) or "random"
        print(f"{part:9} {total:13,} parameters, {trained:13,} trained ({how}), from "
              f"{checkpoint or source}")
        if part in model.weights and not checkpoint and source == "random" and how != "full":
            print(f"{part:9} is random and stays so under --{part}={how}: did you mean "
                  f"--{part}=full, or --{part}_weights=...?")
    if not is_trained(model):
        raise UserError("every part is frozen: set --vision, --projector or --language")
    vision_blocks, language_blocks = model.vision.blocks, model.language.model.layers
    model.vision.recomputed = math.ceil(config.recompute * len(vision_blocks))
    model.language.recomputed = math.ceil(config.recompute * len(language_blocks))
    model.flex = config.compile
    if config.compile and device.type == "cuda" and HAS_TRITON:
        compile_blocks([*vision_blocks, *language_blocks])
    return model


def shard_language(model, config):
    """
    Leave each process a part of the language model (FSDP2), its gradients and moments. A module's weights
    are gathered when it runs and freed behind it. LoRA, which is small, stays whole everywhere.
    """
    if not dist.is_initialized() or config.language == "frozen" or (
            config.language == "lora" and not model.weights["language"]):
        raise UserError("--shard=true: for torchrun's processes, with --language=full, or with "
                        "--language=lora and a language model from a weights file")
    from torch.distributed.fsdp import fully_shard  # whose import takes as long as half of torch's

    language, lora = model.language, config.language == "lora"
    for module in [*language.model.layers, language.model.embed_tokens, language.lm_head]:
        fully_shard(module, reshard_after_forward=True, ignored_params={
            p for p in module.parameters() if lora and p.requires_grad})
        module.set_force_sum_reduction_for_comms(True)  # by plain sums, as train_step sums the others
        module.set_gradient_divide_factor(1.0)
    parameters = [p for p in language.parameters() if not lora or not p.requires_grad]
    here = sum((p.to_local() if is_split(p) else p).numel() for p in parameters)
    print(f"language  {sum(p.numel() for p in parameters):13,} split, {here:13,} of them on each process")


def is_split(tensor):
    """Whether a tensor is a DTensor, of which each process has a part: --shard=true makes them."""
    return hasattr(tensor, "full_tensor")


def gather(tensors):
    """
    A dict of tensors with those that the processes have split put together, on the first one's CPU. All
    have to take part; the others get nothing.
    """
    found = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if is_split(tensor) else tensor
        if dist.get_rank() == 0:
            found[name] = whole.cpu()
    return found


def whole_and_split(parameters):
    """Two lists: the parameters that are whole on each process, and those that --shard=true has split."""
    return [[p for p in parameters if is_split(p) == split] for split in (False, True)]


def make_optimizer(model, config):
    """AdamW on what trains; matrices and the patch convolution decay, nothing else."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() in (2, 4)]
    others = [p for p in trained if p.dim() not in (2, 4)]  # biases, norms, class token, positions
    groups = [{"params": part, "weight_decay": decay}  # AdamW wants whole and split ones apart
              for params, decay in ((matrices, config.weight_decay), (others, 0.0))
              for part in whole_and_split(params) if part]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, config.beta2), fused=True)


def save_checkpoint(model, optimizer, step, run, config, record):
    """
    Write run/step_N whole or not at all, sealed with the run's record; once it is found to be whole on the
    disk, remove the oldest beyond the config.keep newest. Raises UserError when that fails; what was
    there stays. With --shard=true all processes have to take part; the first one writes.
    """
    folder = run / f"step_{step:06d}"
    partial = run / f"partial_{folder.name}"
    names = {parameter: name for name, parameter in model.named_parameters()}
    moments = {f"{names[parameter]}:{key}": value.contiguous()
               for parameter, state in optimizer.state.items() for key, value in state.items()}
    language = None
    if config.shard and config.language == "full":
        language, moments = gather(model.language.state_dict()), gather(moments)
    if dist.is_initialized() and dist.get_rank():
        return
    try:
        model.save(partial, language)
        save_file(moments, partial / "optimizer.safetensors")
        seal(partial, folder, step=step, **record)
        if damage := find_damage(folder):
            raise OSError(f"{damage} right after it was written")
        for old in checkpoints(run)[config.keep:]:
            removed = run / f"removed_{old.name}"  # at once for who looks, file by file on the disk
            old.rename(removed)
            shutil.rmtree(removed)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{folder}: not saved: {error}; see to the disk, then --resume=true goes on from "
                        "the newest checkpoint") from None


def load_optimizer(optimizer, model, checkpoint):
    """Put the moments of a checkpoint into an optimizer; of split parameters each process keeps its part."""
    parameters = dict(model.named_parameters())
    with safe_open(checkpoint / "optimizer.safetensors", "pt") as file:
        for key in file.keys():
            name, _, kind = key.rpartition(":")
            parameter, value = parameters[name], file.get_tensor(key)
            value = value.to(parameter.device, copy=True)
            if is_split(parameter) and kind != "step":
                from torch.distributed.tensor import distribute_tensor
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            optimizer.state[parameter][kind] = value


def to_device(batch, device):
    """A data.Batch of numpy arrays as one of tensors."""
    arrays = {item.name: torch.from_numpy(getattr(batch, item.name)) for item in fields(Batch)}
    if device.type == "cuda":  # from pinned memory, copies wait for nothing that the GPU has yet to do
        arrays = {name: tensor.pin_memory() for name, tensor in arrays.items()}
    return Batch(**{name: tensor.to(device, non_blocking=True) for name, tensor in arrays.items()})


@torch.no_grad()
def held_out_loss(model, mixture, config, device, autocast):
    """Mean cross-entropy over the supervised tokens of the held-out samples, in nats."""
    model.eval()
    total = supervised = 0
    for step in mixture.held_out_steps():
        for batch, weight in even_out(step.batches, config, device):
            with autocast:
                total += weight * model.loss(to_device(batch, device)).item()
        supervised += step.supervised
    model.train()
    if dist.is_initialized():
        parts = [0.0] * dist.get_world_size()
        dist.all_gather_object(parts, total)
        total = sum(parts)
    return total / max(supervised, 1)


def describe_run(config, mixture, tokenizer, model, device):
    """
    What config.json and each checkpoint's manifest say of the run: its flags, its inputs, which are the
    same whenever it goes on, the test splits that its data were compared with, and the machine.
    """
    data, tests = {}, {}
    for shard, (leaks, numbers) in zip(mixture.shards, mixture.leaks):
        name = shard.folder.parent.name
        data[name] = {**shard.describe(), "leaks": leaks, "leaked": len(numbers),
                      "leaked_sha256": hash_json(numbers.tolist())}
        tests[name] = read_manifest(shard.folder, "leaks.json")["tests"]
    inputs = {"data": data, "tokenizer": tokenizer.sha256, "weights": model.hashes}
    return {"flags": asdict(config), "inputs": inputs, "tests": tests, "machine": describe_machine(device),
            "resize": mixture.shards[0].manifest["image"]["resize"],
            "tokenizer_sha256": tokenizer.sha256,
            "shards": {name: facts["checksum"] for name, facts in data.items()},
            "leaks": {name: {"leaks": facts["leaks"], "tests": tests[name]} for name, facts in data.items()}}


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
    return {name: fact for name, fact in record.items() if name not in ("checksum", "files", "name", "step")}


def write_run(folder, record, tokenizer, checkpoint):
    """What a run's folder holds beside its checkpoints and its log; the record stays as it was at the start."""
    write_whole(folder / "tokenizer.model", tokenizer.path.read_bytes())
    if checkpoint is None or read_manifest(folder, "config.json") is None:
        write_manifest(folder, "config.json", record)


def open_log(config, folder, first):
    """
    A function that appends an entry to log.jsonl and, with --wandb=true, to Weights & Biases. Entries
    behind step `first`, which a killed run left, are dropped: those steps come again.
    """
    path, kept = folder / "log.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # the last line may be torn
            kept += [line + "\n"] if json.loads(line)["step"] <= first else []
    write_whole(path, "".join(kept).encode())
    log = open(path, "a", encoding="utf-8")
    if config.wandb:
        try:
            import wandb
        except ImportError:
            raise UserError("--wandb=true: run `pip install wandb` first") from None
        wandb.init(project="nanomedq", name=folder.name, config=asdict(config), dir=str(folder))

    def write_log(entry):
        log.write(json.dumps(entry) + "\n")
        log.flush()
        if config.wandb:
            wandb.log(entry, step=entry["step"])

    return write_log


def even_out(batches, config, device):
    """
    (batch, 1) for each of this rank's micro-batches; with --shard=true also (an empty one, 0) until all
    ranks have as many, since they gather weights together and so have to run equally often.
    """
    pairs = [(batch, 1) for batch in batches]
    if config.shard:
        count = torch.tensor(len(batches), device=device)
        dist.all_reduce(count, dist.ReduceOp.MAX)
        token, index = np.zeros((1, 1), np.int64), np.zeros(1, np.int64)
        empty = Batch(token, token, token.astype(np.int32), token.astype(np.int32),
                      np.zeros((0, 0, 0, 3), np.uint8), index[:0], index, index, token.astype(np.int32))
        pairs += [(empty, 0)] * (count.item() - len(batches))
    return pairs


def sum_over_ranks(parameters, loss):
    """
    Sum the gradients of n parameters and the loss of all ranks, in one message: the same bits on every rank.
    Returns the loss and, (n,), how many ranks have reached each parameter; none: its gradient is 0.
    """
    reached = torch.tensor([float(p.grad is not None) for p in parameters], device=loss.device)
    flat = torch.cat([*((torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters),
                      reached, loss[None]])
    dist.all_reduce(flat)
    *gradients, reached, loss = flat.split([*(p.numel() for p in parameters), len(reached), 1])
    for p, gradient in zip(parameters, gradients):
        p.grad = gradient.view_as(p)
    return loss[0], reached


def train_step(model, optimizer, step, config, device, autocast, scale=None):
    """
    One update from all micro-batches of a step, of all ranks; its loss and gradient norm as floats.

    The loss is the mean over all supervised tokens of the step, however they are cut. A parameter that no
    sample of it has reached, such as the ViT's where none has an image, stays as it is, its moments and its
    count of steps too: a gradient of zero would let weight decay and old momentum move it, by what it was not
    shown. Any number of ranks agrees on which those are. With a LossScale a step whose gradient overflows is left
    out, its norm infinite or nan. Raises FloatingPointError, on every rank, before anything is updated when the
    loss is not finite or, without a LossScale, the gradient.
    """
    factor = scale.scale if scale else 1.0
    total = torch.zeros((), device=device)
    for batch, weight in even_out(step.batches, config, device):
        with autocast:
            loss = weight * model.loss(to_device(batch, device)) / step.supervised
        if loss.requires_grad:  # not where images alone train, and there is none
            (factor * loss).backward()
        total += loss.detach()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    whole, reached = [], total.new_zeros(0)
    if dist.is_initialized():
        whole = whole_and_split(trained)[0]
        total, reached = sum_over_ranks(whole, total)
    trained = [p for p in trained if p.grad is not None]
    if scale:
        for p in trained:
            p.grad.div_(factor)
    parts = [part for part in whole_and_split(trained) if part]
    norms = [get_total_norm([p.grad for p in part]) for part in parts]
    norms = [norm.full_tensor() if is_split(norm) else norm for norm in norms]
    norm = torch.stack(norms).norm() if len(norms) > 1 else norms[0] if norms else torch.zeros_like(total)
    for part in parts:
        clip_grads_with_norm_(part, config.clip or math.inf, norm)
    # The one place where the step waits for the GPU
    total, norm, *reached = torch.cat([total[None], norm[None], reached]).tolist()
    overflowed = not math.isfinite(norm)
    if not math.isfinite(total) or (overflowed and not scale):
        raise FloatingPointError(f"loss {total}, gradient norm {norm}")
    for p, ranks in zip(whole, reached):
        p.grad = p.grad if ranks else None
    if scale:
        scale.note(overflowed)
    if not overflowed:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm


def catch_signals():
    """
    A list that SIGTERM and SIGINT enter their number into, so that the run can finish its step and save.

    Schedulers and torchrun may send one twice, to a group and to each process of it. So only a SIGINT
    that comes more than two seconds after the first signal, from a person, ends the run at once.
    """
    signals, began = [], time.monotonic()

    def enter(number, frame):
        nonlocal began
        if not signals:
            began = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - began > 2:
            raise KeyboardInterrupt
        signals.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, enter)
    return signals


def main(config):
    device, dtype = pick_device(config.device, config.dtype)
    rank, ranks, device = join_group(device, config.rank_timeout)
    folder = agree(lambda: choose_folder(config))
    with lock(folder / ".lock", "training") if rank == 0 else contextlib.nullcontext():
        train(config, folder, rank, ranks, device, dtype)


def train(config, folder, rank, ranks, device, dtype):
    """All steps of a run, or those that are left of it."""
    autocast = autocast_to(device, dtype)
    torch.manual_seed(config.seed)
    checkpoint = agree(lambda: open_run(config, folder))
    mixture, tokenizer = open_data(config, rank, ranks)
    model = make_model(config, tokenizer, checkpoint, device, dtype)
    if model.vision.config.tokens != mixture.image_tokens:
        raise UserError(f"--vision_weights: {model.vision.config.tokens} tokens an image, while "
                        f"--model={config.model} has {mixture.image_tokens}; choose the one that fits")
    for shard in mixture.shards:
        shard.require_image_size(model.vision.config.image_size)
    if config.shard:
        shard_language(model, config)
    record = describe_run(config, mixture, tokenizer, model, device)
    if checkpoint:
        record = require_same_inputs(checkpoint, record["inputs"])
    optimizer = make_optimizer(model, config)
    scale = LossScale() if dtype == torch.float16 else None
    steps = config.max_steps or max(1, int(config.epochs * mixture.samples_per_epoch / config.batch_size))
    first = 0
    if checkpoint:
        require_same_samples(mixture, config, checkpoint)
        load_optimizer(optimizer, model, checkpoint)
        first = int(checkpoint.name[5:])
        scale = scale and LossScale(**read_manifest(checkpoint).get("loss_scale", {}))
    print(f"{folder}: steps {first} to {steps} of {config.batch_size} samples on {device}, {dtype}, "
          f"{ranks} process(es)")
    if first == steps:
        return print(f"finished already; now run `python eval_vqa.py --run={folder}`")

    if rank == 0:
        write_run(folder, record, tokenizer, checkpoint)
    write_log = open_log(config, folder, first) if rank == 0 else lambda entry: None

    model.train()
    bar = tqdm(total=steps, initial=first, unit="step", dynamic_ncols=True, disable=rank > 0)
    losses, padded, since, validation = [], [], time.perf_counter(), ""
    signals, saved = catch_signals(), since
    for step in mixture.steps(first, steps, config.workers or usable_cores()):
        rate = learning_rate_at(step.number, steps, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        try:
            loss, norm = train_step(model, optimizer, step, config, device, autocast, scale)
        except FloatingPointError as error:
            samples = [f"{shard.folder}:{number}" for shard, number in step.samples]
            write_log({"step": step.number, "error": str(error), "samples": samples})
            raise UserError(f"step {step.number}: {error}, from {samples[0]} ... {samples[-1]}, all "
                            f"named in {folder}/log.jsonl; try a lower --learning_rate") from None
        if not math.isfinite(norm):
            write_log({"step": step.number + 1, "skipped": "a gradient overflowed", "loss_scale": scale.scale})
        losses.append(loss)
        padded.append(step.padded)
        done = step.number + 1
        bar.update()
        if done % config.log_every == 0 or done == steps:
            seconds = time.perf_counter() - since
            speed = len(losses) * config.batch_size / seconds
            entry = {"step": done, "loss": sum(losses) / len(losses), "learning_rate": rate,
                     "gradient_norm": norm if math.isfinite(norm) else None, "samples_per_second": round(speed, 2),
                     "padded": round(sum(padded) / len(padded), 4)}
            write_log(entry)
            bar.set_postfix_str(f"loss {entry['loss']:.3f}{validation}, {speed:.1f} samples/s, "
                                f"{entry['padded']:.0%} padding")
            losses, padded, since = [], [], time.perf_counter()
        pause = time.perf_counter()
        due = 0 < 60 * config.save_minutes < pause - saved
        stopped = max(signals, default=0)
        if ranks > 1:  # what one of them has met, all have
            agreed = torch.tensor([int(due), stopped], device=device)
            dist.all_reduce(agreed, dist.ReduceOp.MAX)
            due, stopped = agreed.tolist()
        if config.held_out and (done % config.evaluate_every == 0 or done == steps):
            held_out = held_out_loss(model, mixture, config, device, autocast)
            write_log({"step": done, "held_out_loss": held_out})
            validation = f", held out {held_out:.3f}"
        due = due or (config.save_every and done % config.save_every == 0)
        if due or stopped or done == steps:
            if rank == 0:
                sync(folder / "log.jsonl")  # resumed from there, its steps up to here do not come again
            if rank == 0 or config.shard:
                scaled = {"loss_scale": vars(scale)} if scale else {}
                save_checkpoint(model, optimizer, done, folder, config, record | scaled)
            saved = time.perf_counter()
        if stopped and done < steps:
            bar.close()
            print(f"{folder}: stopped by {signal.Signals(stopped).name} and saved at step {done}; the same "
                  "command with --resume=true goes on")
            sys.exit(128 + stopped)
        since += time.perf_counter() - pause  # samples/s are those of training alone
    bar.close()
    print(f"{folder}: finished{validation}; now run `python eval_vqa.py --run={folder}`")


if __name__ == "__main__":
    run(main, CONFIG)
