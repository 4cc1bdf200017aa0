"""
Train the vision-language model: images and questions in, next-token cross-entropy on the answers.

    python train_vlm.py --batch_size=64                          the paper's recipe (section 3)
    python train_vlm.py --model=sample --data=sample --language=full      from scratch, on a laptop
    python train_vlm.py --start=out/captions --data=path_vqa     begin with another run's parts
    python train_vlm.py --config=out/sample/config.json          the flags of another run, once more
    python train_vlm.py --data=own --seeds=3 --run=out/own       three runs, in out/own/seed_0 and so on

A run is a folder, see run.py; eval_vqa.py loads its checkpoints. The same command with --resume=true goes
on from the newest, bit for bit: the samples of a step, and any random number it draws, depend on seed and
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
    questions_per_image: Whole = 1  # samples of a step that may share one copy of what they begin with; 0: all
    max_length: Annotated[int, Range(16, 1 << 20)] = 3584  # tokens of a sample; a longer prompt is cut at its front
    micro_batch_tokens: Count = 8192  # tokens of a forward pass; trades memory for speed, not results
    recompute: Share = 0.0  # share of the blocks whose activations are computed twice, to save memory
    compile: bool = True  # the blocks' small operations into few kernels, on a GPU; takes a minute at first
    held_out: Whole = 512  # samples kept from training for the validation loss
    workers: Threads = 0  # that read and decode ahead of the trainer; 0: one a core, of a process's share
    start: str = ""  # run, checkpoint or adapter folder whose parts this run begins with
    model: str = "paper"  # paper, small, sample; gpt_oss_small, qwen_small, ..._sample; or a Qwen3-VL's folder
    vision_weights: str = "auto"  # file or hub folder of an encoder; auto: BiomedCLIP for the paper's; none: random
    vision_layer: Literal["auto", "normed", "-1", "-2"] = "auto"  # of the encoder, taken; auto: --start's, or normed
    vision_tokens: Literal["auto", "all", "patches"] = "auto"  # all: a class token, too; auto: --start's or all
    language_weights: str = "auto"  # hub folder; auto: PMC-LLaMA for the paper's; none: random
    merge: Annotated[int, Range(0, 4)] = 0  # this times this patches become one token; 0: as --start has it, or 1
    vision: Literal["auto", "full", "lora", "frozen"] = "auto"  # what trains of the ViT; auto: full, a Qwen's frozen
    projector: Literal["full", "frozen"] = "full"  # what trains of the projection
    projector_type: Literal["auto", "linear", "mlp", "mlp1"] = "auto"  # LLaVA's mlp, InternVL's mlp1; auto: --start's
    language: Literal["lora", "full", "frozen"] = "lora"  # what trains of the language model
    base_bits: Literal[0, 16, 8, 4] = 0  # of the frozen base's matrices in memory; 0: as --dtype
    lora_targets: str = "auto"  # matrices of the language model with LoRA; auto: q_proj,v_proj, or more of the zoo's
    lora_vision_targets: str = "qkv"  # matrices of the vision transformer with --vision=lora
    lora_r: Annotated[int, Range(1, 1 << 16)] = 8  # rank
    lora_alpha: Scale = 16.0  # the update is scaled by alpha / r
    lora_dropout: ShareBelow1 = 0.0  # on the input of the update
    epochs: Annotated[float, Range(1e-6, 1e6)] = 15.0  # passes over the data
    max_steps: Whole = 0  # stop after so many steps; 0: after the epochs
    learning_rate: Scale = 5e-5  # peak
    vision_rate: Scale = 1.0  # learning rate of the vision transformer, as a multiple
    projector_rate: Scale = 1.0  # learning rate of the projection, as a multiple
    warmup: Share = 0.03  # share of the steps in which it rises from 0
    final_learning_rate: Scale = 0.0  # where the cosine ends
    weight_decay: Scale = 0.01  # of matrices; biases, norms, class token and positions have none
    beta2: ShareBelow1 = 0.999  # AdamW's second-moment decay
    loss_weight: Literal["mean", "square"] = "mean"  # square: a sample counts by the root of its answers; held out, too
    clip: Scale = 1.0  # largest norm of the gradient; 0: no clipping
    seed: Whole = 0  # of initialisation, order and dropout
    seeds: Annotated[int, Range(1, 1000)] = 1  # runs, in seed_0, seed_1, ... of --run, of this seed and those behind it
    device: Device = "auto"  # cuda, mps or cpu
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: on a GPU bfloat16, else float16
    run: str = ""  # folder of this run; none: out/<model>_<date>
    resume: bool = False  # go on from the newest checkpoint of the run, with its flags where none are given
    config: str = ""  # config.json of a run whose flags count where none are given
    log_every: Count = 10  # steps
    evaluate_every: Count = 500  # steps
    save_minutes: Scale = 30.0  # between two checkpoints; 0: by steps alone
    save_every: Whole = 0  # also after so many steps; 0: by minutes alone
    keep: Count = 2  # newest checkpoints that stay, beside the best by held-out loss
    shard: bool = False  # torchrun's processes split the language model between them, to save memory
    rank_timeout: Seconds = 600  # that torchrun's processes wait for one another, and for a save, before all end
    wandb: bool = False  # also log to Weights & Biases, if installed


if __name__ == "__main__":
    CONFIG = parse_command_line(Config)  # before torch is imported: --help and a typo are answered at once

import contextlib
import math
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import Mixture
from plumbing.devices import (LossScale, agree, autocast_to, gather, join_group, pick_device,
                              split_among_ranks, sum_of_ranks, to_device, usable_cores)
from plumbing.files import lock, lowest_held_out_loss, read_manifest, sync
from plumbing.runs import (FREE_ON_RESUME, choose_folders, describe_run, image_settings, learnt_before, open_log,
                           open_run, require_same_inputs, write_run)
from plumbing.signals import agree_on_stop, between_runs, catch_signals, end_stopped
from plumbing.sources import find_start, open_shards, settle, weights_of
from run import (device_of, even_out, learning_rate_at, load_optimizer, lora_settings, make_optimizer,
                 make_trainable, require_images, save_checkpoint, update)
from weights import build_vlm, load_vlm, save_vlm
from zoo.adapters import load_adapters, read_adapter
from zoo.chatml import tokenizer_of
from zoo.encoders import features_by, require_features

RESTATED = ("epochs", "max_steps")  # of a finished run that goes on


# ----------------------------------------------------------------------------- data and model

def open_data(config, opened, vision, device, rank=0, ranks=1):
    """The Mixture of what open_shards has opened, for a vision part. UserError where it cannot read the images."""
    mixture = Mixture(
        **opened, count_tokens=vision.tokens, batch_size=config.batch_size,
        questions_per_image=config.questions_per_image, max_length=config.max_length,
        micro_batch_tokens=config.micro_batch_tokens, seed=config.seed, held_out=config.held_out, rank=rank,
        ranks=ranks, loss_weight=config.loss_weight,
        multiple=128 if device.type == "cuda" else 1)  # the blocks of FlexAttention
    parts = zip(mixture.shards, mixture.train, mixture.validation, mixture.leaks)
    for shard, train, validation, (leaks, numbers) in parts:
        vision.require_shapes(shard.folder, shard.image_index)
        guarded = f", {len(numbers):,} {'left out' if leaks == 'drop' else 'kept'} whose image a test split has"
        print(f"{shard.folder}: {len(train):,} samples to train on, {len(validation):,} held out"
              + guarded * bool(len(numbers)))
    if mixture.cut or mixture.too_long:
        print(f"samples of {config.max_length} tokens: {mixture.cut:,} prompts cut at the front, "
              f"{mixture.too_long:,} samples left out because their answer does not fit")
    require_images(config, mixture)
    return mixture


def load_parts(config, tokenizer, image, checkpoint, device, dtype):
    """The VLM, from a checkpoint of this run, what --start names, or the weights files; a line for each part."""
    begun, adapter = (checkpoint, None) if checkpoint else find_start(config, tokenizer)
    split = split_among_ranks if config.shard else None
    # Trained weights stay in float32; autocast rounds them in use, never where they are summed up
    trained = [part for part in ("vision", "projector", "language") if getattr(config, part) == "full"]
    dtype = torch.float32 if config.language == "full" else dtype
    if begun:
        model = load_vlm(begun, dtype, device, split, trained, config.base_bits)
    else:
        lora = lora_settings(config, config.lora_targets) if config.language == "lora" else None
        vision, language = weights_of(config, tokenizer)
        lora = read_adapter(adapter).get("language") if adapter else lora
        model = build_vlm(config.model, tokenizer.vocab_size, vision, language, dtype, device,
                          features_by(config, image), config.projector_type, lora, split, trained, config.base_bits)
    if adapter:
        load_adapters(model, adapter)
    require_features(model, config, image, begun or config.model)
    for part in ("vision", "projector", "language"):
        source = begun or model.weights.get(part) or "random"
        print(f"{part:9} from {source}{f' and {adapter}' if adapter and part in model.lora else ''}")
    return model


def trained_parameters(model, config):
    """(name, parameter, multiple of the learning rate) of each, as make_optimizer takes them."""
    rates = {"vision": config.vision_rate, "projector": config.projector_rate}
    return [(name, parameter, rates.get(name.partition(".")[0], 1.0)) for name, parameter in model.named_parameters()]


# ----------------------------------------------------------------------------- training

def train_step(model, optimizer, step, rate, config, autocast, scale=None):
    """
    One update from all micro-batches of a data.Step, of all ranks; its loss and gradient norm as floats.

    The loss is the sum over the step's targets, each times its weight, divided by step.divisor, however
    they are cut into micro-batches. Raises FloatingPointError as run.update does.
    """
    total = torch.zeros((), device=device_of(model))
    for batch in step.batches:
        with autocast:
            loss = model.loss(to_device(batch, total.device)) / step.divisor
        if loss.requires_grad:  # not where images alone train, and there is none
            (loss * scale.scale if scale else loss).backward()
        total += loss.detach()
    return update(optimizer, rate, total, config.clip, scale)


@torch.no_grad()
def held_out_loss(model, mixture, config, autocast):
    """Mean cross-entropy over the supervised tokens of the held-out samples, in nats; by --loss_weight, too."""
    model.eval()
    device = device_of(model)
    total = divisor = 0.0
    for step in mixture.held_out_steps():
        for batch in even_out(step.batches, device) if config.shard else step.batches:
            with autocast:
                total += model.loss(to_device(batch, device)).item()
        divisor += step.divisor
    model.train()
    return sum_of_ranks(total) / max(divisor, 1)


def main(config):
    device, dtype = pick_device(config.device, config.dtype)
    rank, ranks, device = join_group(device, config.rank_timeout)
    if config.shard and (ranks == 1 or config.language == "frozen"):
        raise UserError("--shard=true: for torchrun's processes, with --language=full or --language=lora")
    config = settle(config)
    runs = agree(lambda: choose_folders(config.run, Path(config.model).name, config.resume, config.seeds))
    for number, folder in enumerate(runs):
        with lock(folder / ".lock", "training") if rank == 0 else contextlib.nullcontext():
            one = replace(config, seed=config.seed + number, seeds=1)
            stopped = train(one, folder, rank, ranks, device, dtype)
        if folder != runs[-1]:
            between_runs(folder, stopped)


def train(config, folder, rank, ranks, device, dtype):
    """All steps of a run, or those that are left of it. Returns the number of a signal that came in the last one."""
    torch.manual_seed(config.seed)
    checkpoint = agree(lambda: open_run(folder, config, FREE_ON_RESUME, RESTATED))
    opened = open_shards(config.data, config.shards_dir, "train")  # what is wrong with them is told
    image, tokenizer = image_settings(opened["shards"]), tokenizer_of(opened["shards"][0])  # before weights are read
    model = load_parts(config, tokenizer, image, checkpoint, device, dtype)
    mixture = open_data(config, opened, model.vision, device, rank, ranks)
    make_trainable(model, config, checkpoint)
    record = describe_run(config, mixture, image, tokenizer, model, device)
    if checkpoint:
        record = require_same_inputs(checkpoint, record["inputs"])
        record["flags"] |= {name: getattr(config, name) for name in RESTATED}
    else:
        record |= learnt_before(config.start)
    optimizer = make_optimizer(trained_parameters(model, config), config.weight_decay, config.beta2)
    scale = LossScale() if dtype == torch.float16 else None
    steps = config.max_steps or max(1, int(config.epochs * mixture.samples_per_epoch / config.batch_size))
    first = int(checkpoint.name[5:]) if checkpoint else 0
    if checkpoint:
        load_optimizer(optimizer, model, checkpoint)
        scale = scale and LossScale(**read_manifest(checkpoint).get("loss_scale", {}))
    print(f"{folder}: steps {first} to {steps} of {config.batch_size} samples on {device}, {dtype}, "
          f"{ranks} process(es)")
    if first >= steps:
        return print(f"finished already; now run `python eval_vqa.py --run={folder}`, or go on with more --epochs")
    if rank == 0:
        write_run(folder, record, tokenizer, checkpoint)
    log = open_log(folder, first, config.wandb and asdict(config)) if rank == 0 else lambda entry: None
    return take_steps(config, folder, model, mixture, optimizer, scale, record, first, steps, log, dtype)


def take_steps(config, folder, model, mixture, optimizer, scale, record, first, steps, log, dtype):
    """Train from step `first` on, with log entries, held-out losses and checkpoints when they are due."""
    device, rank = device_of(model), mixture.rank
    autocast, signals = autocast_to(device, dtype), catch_signals()
    bar = tqdm(total=steps, initial=first, unit="step", dynamic_ncols=True, disable=rank > 0)
    losses, since, validation, best = [], time.perf_counter(), "", agree(lambda: lowest_held_out_loss(folder))
    saved = since
    model.train()
    for step in mixture.steps(first, steps, config.workers or usable_cores()):
        rate = learning_rate_at(step.number, steps, config.learning_rate, config.warmup, config.final_learning_rate)
        if config.shard:
            step.batches = even_out(step.batches, device)
        try:
            loss, norm = train_step(model, optimizer, step, rate, config, autocast, scale)
        except FloatingPointError as error:
            raise explain(step, error, folder, log) from None
        done = step.number + 1
        bar.update()
        losses.append(loss)
        if not math.isfinite(norm):
            log({"step": done, "skipped": "a gradient overflowed", "loss_scale": scale.scale})
        if done % config.log_every == 0 or done == steps:
            speed = len(losses) * config.batch_size / (time.perf_counter() - since)
            log({"step": done, "loss": sum(losses) / len(losses), "learning_rate": rate,
                 "gradient_norm": norm if math.isfinite(norm) else None, "samples_per_second": round(speed, 2),
                 "padded": round(step.padded, 4)})
            bar.set_postfix_str(f"loss {sum(losses) / len(losses):.3f}{validation}, {speed:.1f} samples/s")
            losses, since = [], time.perf_counter()
        pause, held_out = time.perf_counter(), None
        due, stopped = agree_on_stop(signals, 0 < 60 * config.save_minutes < pause - saved, device)
        if any(map(len, mixture.validation)) and (done % config.evaluate_every == 0 or done == steps):
            held_out = held_out_loss(model, mixture, config, autocast)
            log({"step": done, "held_out_loss": held_out})
            validation, due = f", held out {held_out:.3f}", due or held_out < best
            best = min(best, held_out)
        if due or stopped or done == steps or (config.save_every and done % config.save_every == 0):
            save(config, folder, model, optimizer, scale, record, done, held_out)
            saved = time.perf_counter()
        if stopped and done < steps:
            bar.close()
            end_stopped(folder, done, stopped)
        since += time.perf_counter() - pause  # samples/s are those of training alone
    bar.close()
    print(f"{folder}: finished{validation}; now run `python eval_vqa.py --run={folder}`")
    return stopped


def explain(step, error, folder, log):
    """The UserError for a step that was not finite; its samples are in the log."""
    samples = [f"{shard.folder}:{number}" for shard, number in step.samples]
    log({"step": step.number, "error": str(error), "samples": samples})
    return UserError(f"step {step.number}: {error}, from {samples[0]} ... {samples[-1]}, all "
                     f"named in {folder}/log.jsonl; try a lower --learning_rate")


def save(config, folder, model, optimizer, scale, record, step, held_out):
    """Write a checkpoint: by the first rank, or together where the language model is split."""
    if dist.is_initialized() and dist.get_rank() and not config.shard:
        return
    if not dist.is_initialized() or dist.get_rank() == 0:
        sync(folder / "log.jsonl")  # resumed from there, its steps up to here do not come again
    record = record | ({"loss_scale": vars(scale)} if scale else {})
    record |= {"held_out_loss": held_out} if held_out is not None else {}
    language = gather(model.language.state_dict()) if config.shard and config.language == "full" else None
    save_checkpoint(folder, step, lambda partial: save_vlm(model, partial, language), model, optimizer, record,
                    config.keep)


if __name__ == "__main__":
    run(main, CONFIG)
