"""
Fine-tune an image encoder with a linear head to classify images, and compare encoders that way.

    python train_cls.py --dataset=chaoyang --encoder=biomedclip     one run: 100 epochs, then the test
    python train_cls.py --dataset=path/to/folder --encoder=scratch  your own images, a folder a class
    python train_cls.py --report=true                               the table of all runs made so far
    torchrun --standalone --nproc_per_node=8 -- train_cls.py --dataset=all --seeds=3    eight at a time

The head reads the class token and the mean of the patch tokens side by side, Linear(2d, classes) (OpenMedQ, arXiv
2606.12953), see zoo/classifier.py. One recipe serves all encoders. The epoch that is best on the validation split is
the one that is tested. A run that was killed goes on where it stopped when the same command is given again, and one
that is finished is not made twice.

Each run is a folder <out>/<dataset>/<name>/seed_<n>: model/ (encoder, head, classes, temperature), log.jsonl,
validation.csv and test.csv (calibrated probabilities) and, written last, result.json (scores). What a run stands on,
its images, labels and encoder, is written down with it, and a command that finds it changed is refused.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from plumbing.flags import (BatchSize, Count, Device, Name, Range, Scale, Share, UserError, Whole,
                            parse_command_line, run)

Encoder = Literal["openmedq", "biomedclip", "pubmedclip", "pmc_clip", "clip_l_336", "siglip_so400m", "medsiglip",
                  "scratch"]


@dataclass(frozen=True)
class Config:
    dataset: str = "chaoyang"  # prepared, several with commas; all: the paper's eight; or your folder
    encoder: Encoder = "biomedclip"  # to start from; clip_l_336 sees 336 pixels, SigLIPs 384 and 448, others 224
    run: str = ""  # with --encoder=openmedq: the train_vlm.py run whose encoder it is
    model: Literal["paper", "small", "sample"] = "paper"  # with --encoder=scratch: sizes of the ViT
    name: Name = ""  # under which the run is filed and reported; none: the encoder's
    seeds: Annotated[int, Range(1, 10_000)] = 1  # runs, each with another seed
    seed: Whole = 0  # the first one's: of the head, the order and the augmentation
    epochs: Annotated[int, Range(1, 1_000_000)] = 100  # passes over the training images
    batch_size: BatchSize = 64  # images in an optimiser step, or predicted at a time
    learning_rate: Scale = 5e-5  # peak
    warmup: Share = 0.05  # share of the steps in which it rises from 0; then a cosine down to 0
    weight_decay: Scale = 0.01  # of matrices and convolutions
    layer_decay: Share = 1.0  # learning rate of each block, as a multiple of the next one's
    clip: Scale = 1.0  # largest norm of the gradient; 0: no clipping
    augment: Literal["light", "none"] = "light"  # light: shifted, turned, mirrored sideways
    frozen: bool = False  # train the head alone (linear probe)
    patience: Whole = 0  # stop after so many epochs without a better one; 0: never
    images_per_class: Whole = 0  # train on only so many, another choice for each seed; 0: all
    leaks: Literal["recorded", "drop", "keep"] = "recorded"  # training images that a test split has, too
    shards_dir: str = "shards"  # where prepare/all.py put the datasets
    weights_dir: str = "weights"  # where it put the encoders
    out: str = "out/cls"  # where runs go
    save_every: Count = 10  # epochs between two states from which a killed run goes on
    device: Device = "auto"  # cuda, mps or cpu
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: on a GPU the half that it has
    report: bool = False  # print the table of all runs and stop
    predict: str = ""  # folder or file of new images or scans: write csv files of probabilities and stop


if __name__ == "__main__":
    CONFIG = parse_command_line(Config)  # before torch is imported: --help and a typo are answered at once

import contextlib
import copy
import hashlib
import itertools
import json
import os
import shutil
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from model import CONFIGS, ViT
from plumbing.devices import (LossScale, agree, autocast_to, describe_machine, join_group, pick_device, to_device,
                              together)
from plumbing.order import random_keys
from plumbing.files import checkpoints, find_run, read_manifest, require_writable, sealed, write_manifest, write_whole
from plumbing.tensors import hash_weights, on_meta, tensors_of
from run import learning_rate_at, load_optimizer, make_optimizer, save_checkpoint, update
from tasks.calibration import compare_errors, conform, fit_temperature, probabilities_of
from tasks.encoders import (Run, open_run, print_run, report, require_its_model, run_folder, write_predictions,
                            write_split)
from tasks.labelled import (choose_few, find_datasets, find_model_datasets, find_pictures, open_dataset,
                            read_pictures, require_same_dataset)
from tasks.labels import decide, guess_blindly, macro_f1, score, tune_thresholds
from weights import load_classifier, load_encoder, load_trained_encoder, save_classifier
from zoo.classifier import Classifier, augment

FREE = ("seeds", "leaks", "shards_dir", "weights_dir", "out", "save_every", "device", "report",
        "predict")  # flags that change no number, or whose effect is among what a run stands on


# ----------------------------------------------------------------------------- what is asked for

def make_encoder(config):
    """
    The encoder to start from, float32 on the CPU, from scratch without weights, and what it is, nested facts.
    """
    if config.encoder == "scratch":
        with on_meta():
            encoder = ViT(CONFIGS[config.model][0])
        return encoder, {"sizes": {name: size for name, size in asdict(encoder.config).items()
                                   if name not in ("class_token", "layer", "tiled")}}  # earlier runs have none
    if config.encoder == "openmedq":
        if not config.run:
            raise UserError("--encoder=openmedq: name the train_vlm.py run that it is of with --run")
        _, checkpoint = find_run(config.run)
        encoder, manifest = load_trained_encoder(checkpoint), read_manifest(checkpoint)
        if manifest is None:
            raise UserError(f"{checkpoint}: gone while it was read; run the same command again")
        return encoder, {"checkpoint": checkpoint.name, "sha256": manifest["checksum"]}
    file = Path(config.weights_dir) / f"{config.encoder}.safetensors"
    if not file.is_file():
        raise UserError(f"{file}: not there; run `python prepare/all.py --only={config.encoder}`")
    return load_encoder(file), {"sha256": hash_weights(file)}


def plan(names, encoder_facts, image_size, config, locks):
    """
    Every run that is asked for, opened: a list of them for each dataset. What is to be refused is refused
    here, before the first image is read. names: [(dataset, seeds)].
    """
    plans = []
    for name, seeds in names:
        splits, facts = open_dataset(Path(config.shards_dir) / name, image_size, config.leaks,
                                     config.images_per_class)
        shards = {split: images.shard.manifest["checksum"] for split, images in splits.items()}
        shards["tests"] = read_manifest(splits["train"].shard.folder, "leaks.json")["tests"]
        inputs = json.loads(json.dumps({**facts, "encoder": encoder_facts}))  # as it will be read again
        plans.append([])
        for seed in seeds:
            flags = {key: value for key, value in asdict(config).items() if key not in FREE}
            flags |= {"dataset": name, "seed": seed}
            folder = run_folder(config.out, name, config.name or config.encoder, seed)
            run = Run(replace(config, seed=seed), folder, splits, flags, inputs, shards)
            open_run(run, locks, {item.name: item.default for item in fields(Config)})
            plans[-1].append(run)
    return plans


# ----------------------------------------------------------------------------- one run

def train_epoch(model, optimizer, split, epoch, config, autocast, scale=None):
    """
    One pass over a Split's images, in an order that seed and epoch give. Returns the mean loss. Raises
    FloatingPointError as run.update does.
    """
    device, count = model.head.weight.device, len(split.names)
    order = np.argsort(random_keys(config.seed, 2, epoch, count))
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    steps, total = -(-count // config.batch_size), 0.0
    for step in range(steps):
        chosen = np.sort(order[step * config.batch_size:(step + 1) * config.batch_size])
        images = model.normalise(to_device(split.pixels[chosen], device))
        if config.augment == "light":
            images = augment(images, generator)
        with autocast:
            loss = model.loss(images, to_device(split.labels[chosen], device))
        (loss * scale.scale if scale else loss).backward()
        rate = learning_rate_at(epoch * steps + step, config.epochs * steps, config.learning_rate, config.warmup)
        loss, _ = update(optimizer, rate, loss.detach(), config.clip, scale, alone=True)
        total += loss * len(chosen)
    return total / count


def copy_of(model):
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}


def train(model, run, few, autocast, scale=None):
    """
    All epochs on the Split `few`, or those that are left of a run that was stopped. The model ends with the
    weights of the best one; returns that epoch's number and its macro-F1 on validation.
    """
    config, folder, validation = run.config, run.folder, run.splits["validation"]
    optimizer = make_optimizer(model.rates(config.layer_decay), config.weight_decay)
    epoch, best, best_epoch, best_weights, log = 0, -1.0, 0, None, []
    if run.checkpoint:
        record = read_manifest(run.checkpoint)
        epoch, best, best_epoch, log = (record[name] for name in ("step", "best", "best_epoch", "log"))
        scale = scale and LossScale(**record["loss_scale"])
        model.load_state_dict(load_file(run.checkpoint / "model.safetensors"))
        best_weights = load_file(run.checkpoint / "best.safetensors")
        load_optimizer(optimizer, model, run.checkpoint)

    def write(partial):
        save_file(tensors_of(model), partial / "model.safetensors")
        save_file(best_weights, partial / "best.safetensors")

    write_whole(folder / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in log).encode())
    bar = tqdm(total=config.epochs, initial=epoch, desc=str(folder), unit=" epochs")
    while epoch < config.epochs and not 0 < config.patience <= epoch - best_epoch:
        try:
            loss = train_epoch(model, optimizer, few, epoch, config, autocast, scale)
        except FloatingPointError as error:
            raise UserError(f"{folder}: epoch {epoch + 1}: {error}; try a lower --learning_rate") from None
        epoch += 1
        probabilities = model.predict(validation.pixels, config.batch_size, autocast)
        thresholds = tune_thresholds(probabilities, validation.labels) if model.multi_label else None
        value = macro_f1(decide(probabilities, thresholds), validation.labels, model.multi_label)
        if value > best:
            best, best_epoch, best_weights = value, epoch, copy_of(model)
        bar.set_postfix_str(f"loss {loss:.3f}, validation {value:.3f}, best {best:.3f}")
        bar.update()
        log.append({"epoch": epoch, "loss": loss, "validation": value})
        with open(folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(log[-1]) + "\n")
        if epoch % config.save_every == 0:
            record = {"flags": run.flags, "inputs": run.inputs, "best": best, "best_epoch": best_epoch, "log": log,
                      "loss_scale": scale and vars(scale)}
            save_checkpoint(folder, epoch, write, model, optimizer, record, keep=1, alone=True)
    bar.close()
    model.load_state_dict(best_weights)
    return best_epoch, best


def evaluate(model, splits, config, autocast):
    """
    The Classifier's scores on the test split, {split: its probabilities} of validation and test, and what is chosen on
    validation, facts of the model: its temperature, thresholds, and where an image is uncertain.
    """
    (validation, known), (test, actual) = ((model.judge(split.pixels, config.batch_size, autocast), split.labels)
                                           for split in (splits["validation"], splits["test"]))
    several, classes, groups = model.multi_label, splits["test"].shard.manifest["classes"], splits["test"].groups
    model.temperature = fit_temperature(validation, known, several)
    before, probabilities = (probabilities_of(logits, model.temperature, several) for logits in (validation, test))
    thresholds = tune_thresholds(before, known) if several else None
    blind = guess_blindly(splits["train"].labels, len(actual), several)
    scores = score(probabilities, actual, thresholds, classes, groups)
    scores |= {"blind_macro_f1": macro_f1(blind, actual, several),
               "calibration": {"temperature": model.temperature, "validation_images": len(known),
                               **compare_errors(test, actual, model.temperature, several, groups)},
               "conformal": conform(before, known, (probabilities, actual, decide(probabilities, thresholds)), several)}
    chosen = {"thresholds": None if thresholds is None else thresholds.tolist(), "temperature": model.temperature,
              "conformal": {name: scores["conformal"][name] for name in ("coverage", "threshold", "validation_images")}}
    return scores, {"validation": before, "test": probabilities}, chosen


def remove_checkpoints(folder):
    """Remove what a finished run no longer needs."""
    for leftover in [*folder.glob("damaged_*"), *checkpoints(folder)]:
        shutil.rmtree(leftover, ignore_errors=True)


def make_run(run, encoder, device, dtype):
    """Train and test, unless that was done; returns what result.json holds."""
    if run.result:
        print(f"{run.folder}: finished already")
        remove_checkpoints(run.folder)  # one that was killed as it did so
        return run.result
    config, folder, splits, start = run.config, run.folder, run.splits, time.perf_counter()
    classes = run.inputs["classes"]
    for split in splits.values():
        split.read_pixels()
    torch.manual_seed(config.seed)
    with torch.device(device):
        encoder = ViT(encoder.config) if config.encoder == "scratch" else copy.deepcopy(encoder)
    model = Classifier(encoder, len(classes), run.inputs["multi_label"]).to(device)
    # No part of an encoder acts otherwise in training, but for batch norms, which keep their statistics.
    model.eval().encoder.requires_grad_(not config.frozen)
    few = splits["train"]
    if config.images_per_class:
        few = choose_few(few, config.images_per_class, config.seed)
    write_manifest(folder, "config.json", {"flags": run.flags, "inputs": run.inputs, "shards": run.shards})
    autocast, scale = autocast_to(device, dtype), LossScale() if dtype == torch.float16 else None
    best_epoch, best = train(model, run, few, autocast, scale)
    scores, probabilities, chosen = evaluate(model, splits, config, autocast)
    entry = {"dataset": run.flags["dataset"], "name": folder.parent.name, "seed": config.seed,
             "best_epoch": best_epoch, "validation": best, "test": scores, "train_images": len(few.names),
             "seconds": round(time.perf_counter() - start, 1), "flags": run.flags, "inputs": run.inputs,
             "shards": run.shards, "machine": describe_machine(device)}
    with sealed(folder / "model") as partial:
        save_classifier(model, partial, {"classes": classes, "image": run.inputs["image"], **chosen})
        shutil.rmtree(folder / "model", ignore_errors=True)  # of a run that was killed before its result
    entry["model"] = read_manifest(folder / "model")["checksum"]
    for name, some in probabilities.items():
        write_split(folder / f"{name}.csv", splits[name], some, classes)
    write_manifest(folder, "result.json", entry)
    remove_checkpoints(folder)
    return entry


# ----------------------------------------------------------------------------- new images

def predict_new(dataset, config, device, dtype):
    """Write a trained model's probabilities for the images or scans that --predict names, or all below it."""
    folder = run_folder(config.out, dataset, config.name or config.encoder, config.seed)
    model, facts = load_classifier(folder, device)
    require_its_model(folder)
    require_same_dataset(dataset, config.shards_dir, facts)
    source, autocast = Path(config.predict), autocast_to(device, dtype)
    try:
        require_writable(folder, "out")
    except UserError as error:
        raise UserError(f"{error}, with a copy of the run in it") from None
    pictures, unreadable, others = find_pictures(source, facts["image"], folder)
    read, probabilities = [], []
    for batch, pixels, why in read_pictures(pictures, facts["image"], config.batch_size):
        read += batch
        unreadable += why
        if batch:
            probabilities.append(model.predict(pixels, config.batch_size, autocast))
    if not read:
        raise UserError(f"--predict={source}: {len(unreadable) + len(others):,} files, none of them an image that can "
                        f"be read, the first: {(unreadable + others)[0]}")
    # Two folders of the same name are told apart by a hash of where they are
    where = hashlib.sha256(os.fsencode(source.resolve())).hexdigest()[:8]
    target = folder / f"predicted_{source.resolve().stem}_{where}.csv"
    write_predictions(target, read, np.concatenate(probabilities), facts)
    if unreadable or others:
        print(f"{len(unreadable):,} could not be read" + ", see above" * bool(unreadable)
              + f"; {len(others):,} files are no pictures" + (f", such as {others[0]}" if others else ""))


def main(config):
    if config.report:
        return report(config.out)
    device, dtype = pick_device(config.device, config.dtype)
    rank, ranks, device = join_group(device, timeout=30 * 24 * 3600)  # each is done when it is done
    if config.predict:
        names = agree(lambda: find_model_datasets(config.dataset, config.shards_dir))
        return together(lambda: [predict_new(name, config, device, dtype) for name in names[rank::ranks]])
    encoder, encoder_facts = together(lambda: make_encoder(config))
    image_size = encoder.config.image_size
    names = agree(lambda: find_datasets(config.dataset, config.shards_dir, image_size))
    pairs = list(itertools.product(names, range(config.seed, config.seed + config.seeds)))
    mine = [(name, [seed for _, seed in group])
            for name, group in itertools.groupby(pairs[rank::ranks], key=lambda pair: pair[0])]
    with contextlib.ExitStack() as locks:
        for runs in together(lambda: plan(mine, encoder_facts, image_size, config, locks)):
            for planned in runs:
                print_run(make_run(planned, encoder, device, dtype))
            for split in runs[0].splits.values():
                split.pixels = None  # the memory is the next dataset's
    together(lambda: None)  # until all have made their runs
    if len(pairs) > 1 and rank == 0:
        print()
        report(config.out)


if __name__ == "__main__":
    run(main, CONFIG)
