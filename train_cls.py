"""
Fine-tune an image encoder with a linear head to classify images, and compare encoders that way.

    python train_cls.py --dataset=chaoyang --encoder=biomedclip     one run: 100 epochs, then the test
    python train_cls.py --dataset=path/to/folder --encoder=scratch  your own images, a folder a class
    python train_cls.py --report=true                               the table of all runs made so far
    torchrun --standalone --nproc_per_node=8 -- train_cls.py --dataset=all --seeds=3    eight at a time

The head reads the class token and the mean of the patch tokens side by side, Linear(2d, classes)
(OpenMedQ, arXiv 2606.12953). One recipe serves all encoders. The epoch that is best on the
validation validation split is the one that is tested. A run that was killed goes on where it stopped when the
same command is given again, and one that is finished is not made twice.

Each run is a folder <out>/<dataset>/<name>/seed_<n>: model/ (encoder, head, classes), log.jsonl, test.csv
(probabilities) and, written last, result.json (scores). What a run stands on, its images, labels and
encoder, is written down with it, and a command that finds it changed is refused.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from plumbing.flags import (BatchSize, Count, Device, Form, Range, Scale, Share, UserError, Whole,
                            parse_command_line, run)


@dataclass(frozen=True)
class Config:
    dataset: str = "chaoyang"  # prepared, several with commas; all: the paper's eight; or your folder
    encoder: Literal["openmedq", "biomedclip", "pubmedclip", "pmc_clip", "scratch"] = "biomedclip"  # to start from
    run: str = ""  # with --encoder=openmedq: the train_vlm.py run whose encoder it is
    model: Literal["paper", "small", "sample"] = "paper"  # with --encoder=scratch: sizes of the ViT
    name: Annotated[str, Form(r"(?!\.{1,2}$)[^/]*", "a name without /")] = ""  # under which the run is filed and reported; none: the encoder's
    seeds: Annotated[int, Range(1, 10_000)] = 1  # runs, each with another seed
    seed: Whole = 0  # the first one's: of the head, the order and the augmentation
    epochs: Annotated[int, Range(1, 1_000_000)] = 100  # passes over the training images
    batch_size: BatchSize = 64  # images in an optimiser step
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
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: on a GPU bfloat16, or float16 if it has none
    report: bool = False  # print the table of all runs and stop
    predict: str = ""  # folder or file of new images: write a csv of the model's probabilities and stop


if __name__ == "__main__":
    CONFIG = parse_command_line(Config)  # before torch is imported: --help and a typo are answered at once

import contextlib
import copy
import csv
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from data import Shard, load_image, random_keys, resize_image
from model import CONFIGS, ViT, hash_weights, load_encoder, metadata_of, normalise, tensors_of
from plumbing.files import (checkpoints, differences, find_damage, find_run, hash_json, lock, read_manifest,
                            require_writable, sealed, sort_metadata, write_manifest, write_whole)
from plumbing.devices import (LossScale, autocast_to, describe_machine, join_group, pick_device,
                              usable_cores)
from plumbing.devices import agree, together
from tasks.encoders import EIGHT, newest_state, print_run, read_result, report, require_same, run_folder
from tasks.labels import decide, macro_f1, score, tune_thresholds
from prepare.folder import find_dataset
from prepare.listing import files_below, written


# ----------------------------------------------------------------------------- images and labels

@dataclass
class Split:
    """Images of one split, and their labels."""
    labels: np.ndarray  # (n, m) bool
    names: list
    groups: list  # such as each image's patient; a name that no two images share where none is known
    images: np.ndarray  # (n,) int64, their numbers in the shard
    pixels: np.ndarray | None = None  # (n, H, W, 3) uint8, once read_pixels has read them

    def take(self, places):
        return Split(self.labels[places], [self.names[n] for n in places],
                     [self.groups[n] for n in places], self.images[places],
                     None if self.pixels is None else self.pixels[places])

    def read_pixels(self, shard):
        """Read the images from the Shard that they are of."""
        size = shard.manifest["image"]["size"]
        self.pixels = np.empty((len(self.images), size, size, 3), np.uint8)
        with ThreadPoolExecutor(usable_cores()) as pool:  # Pillow lets go of the interpreter lock
            images = pool.map(shard.read_image, self.images.tolist())
            for place, image in enumerate(tqdm(images, str(shard.folder), len(self.images), leave=False)):
                self.pixels[place] = image

    def describe(self, shard):
        """How many images it has, and a hash of all that is used of them."""
        pixels = shard.manifest["files"]["images.bin"]["sha256"]
        return {"images": len(self.names), "sha256": hash_json([
            pixels, self.images.tolist(), self.labels.astype(int).tolist(), self.names, self.groups])}


def read_split(shard, leaks="recorded"):
    """
    The Split that a shard holds, without pixels, and what is left out of it: each image once, however many
    questions are asked about it. leaks: as --leaks.
    """
    classes, left_out, facts = shard.manifest["classes"], set(), {}
    if shard.folder.name != "test":  # validation may have images of its test split
        recorded, numbers = shard.read_leaks()
        facts = {"told": recorded if leaks == "recorded" else leaks, "left out": 0}
        if facts["told"] == "drop" and len(numbers):
            left_out = set(numbers.tolist())
            facts |= {"left out": len(left_out), "sha256": hash_json(sorted(left_out))}
            print(f"{shard.folder}: {len(left_out):,} images left out, which a split to test on has")
    rows = {}  # (image number, its labels) -> its name and its group
    for number, (record, image) in enumerate(zip(shard.read_records(), shard.samples["image"].tolist())):
        if number not in left_out and "labels" in record:
            rows.setdefault((image, tuple(record["labels"])),
                            (record["image"], record.get("group") or f"image {image}"))
    if not rows:
        raise UserError(f"{shard.folder}: a test split has all of its images, too, so that none is left; "
                        "bring others" if left_out else
                        f"{shard.folder}: no image in it; its manifest.json counts why")
    labels = np.array([[name in given for name in classes] for _, given in rows], bool)
    names, groups = map(list, zip(*rows.values()))
    images = np.array([image for image, _ in rows], np.int64)
    return Split(labels.reshape(-1, len(classes)), names, groups, images), facts


def hold_out(split):
    """
    A training Split in nine tenths and one tenth of each combination of labels, always the same.

    No group is divided. One of fewer than 6 groups is held out where they have 6 images or more, and
    none of fewer images.
    """
    images, combinations = {}, defaultdict(list)  # of a group; groups by the labels of their first image
    for number in np.argsort(random_keys(0, 0, 0, len(split.names))).tolist():
        if split.groups[number] not in images:
            combinations[tuple(split.labels[number])].append(split.groups[number])
        images.setdefault(split.groups[number], []).append(number)
    held = []
    for groups in combinations.values():
        chosen = groups[5::10]
        if 1 < len(groups) < 6 <= sum(len(images[group]) for group in groups):
            chosen = [min(groups, key=lambda group: len(images[group]))]
        held += [number for group in chosen for number in images[group]]
    kept = np.setdiff1d(np.arange(len(split.names)), held)
    return split.take(kept), split.take(np.sort(held).astype(int))


def choose_few(split, count, seed):
    """So many training images of each class, and of none where there are such, drawn with the seed."""
    labels = np.column_stack([split.labels, ~split.labels.any(1)])
    taken, chosen = np.zeros(labels.shape[1], int), []
    for number in np.argsort(random_keys(seed, 1, 0, len(labels))):
        if (taken[labels[number]] < count).any():
            taken += labels[number]
            chosen.append(number)
    return split.take(np.sort(chosen))


def require_learnable(folder, splits, classes, images_per_class):
    """Raise UserError where there is nothing that could be learnt or tested."""
    counts = splits["train"].labels.sum(0)
    if not counts.all():
        raise UserError(f"{folder}/train: no image of class {classes[int(np.argmin(counts))]!r} to train on; "
                        "bring some, or leave the class out")
    for split, images in splits.items():
        if split != "validation" and len(classes) > 1 and (images.labels == images.labels[0]).all():
            raise UserError(f"{folder}/{split}: all of its {len(images.names)} images have the same label: "
                            "nothing to tell apart")
    if images_per_class > counts.max():
        raise UserError(f"--images_per_class={images_per_class}: {folder}/train has at most {counts.max()} "
                        "of a class; choose fewer, or leave it out")
    for name, count in zip(classes, counts):
        if count < images_per_class:
            print(f"{folder}/train: class {name!r} has {count} images, fewer than --images_per_class: all of "
                  "them are used")


def open_dataset(name, config, image_size):
    """
    {split: Split} of train, validation and test, without pixels; {split: its Shard}; and what a run on
    them stands on, as nested facts to compare. Raises UserError where there is nothing to learn or to test.
    """
    folder = Path(config.shards_dir) / name
    shards = {split: Shard(folder / split) for split in ("train", "validation", "test")
              if split != "validation" or (folder / split).is_dir()}
    manifest = shards["train"].manifest
    classes = manifest["classes"]
    if not classes:
        raise UserError(f"--dataset: {name} has no labels; those with labels: {', '.join(EIGHT)}")
    splits, facts = {}, {}
    for split, shard in shards.items():
        shard.require_image_size(image_size)
        splits[split], facts[split] = read_split(shard, config.leaks)
    made = "validation" not in splits
    if made:
        splits["train"], splits["validation"] = hold_out(splits["train"])
        shards["validation"] = shards["train"]
        if not splits["validation"].names:
            raise UserError(f"{folder}/train: fewer than 6 images of each class, or all of one patient, too "
                            "few to hold some out for validation; bring more, or a validation split")
    require_learnable(folder, splits, classes, config.images_per_class)
    facts = {split: images.describe(shards[split]) for split, images in splits.items()} | {
        "classes": classes, "image": {key: manifest["image"][key] for key in ("size", "resize")},
        "multi_label": manifest["multi_label"],
        "leaks": facts["train"], "held out of train": made}
    return splits, shards, facts


# ----------------------------------------------------------------------------- the model

class Classifier(nn.Module):
    """An encoder and a linear head on its class token beside the mean of its patch tokens."""

    def __init__(self, encoder, classes):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(2 * encoder.config.width, classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images):
        """(I, 3, H, W) normalised pixels -> (I, m) logits, float32."""
        tokens = self.encoder(images)  # (I, N, C)
        features = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)  # (I, 2C)
        return self.head(features).float()


def make_encoder(config):
    """
    The encoder to start from, in float32 on the CPU, and what it is, as nested facts to compare. One from
    scratch has no weights yet: each run draws its own.
    """
    if config.encoder == "scratch":
        with torch.device("meta"):
            encoder = ViT(CONFIGS[config.model][0])
        return encoder, {"sizes": asdict(encoder.config)}
    if config.encoder == "openmedq":
        if not config.run:
            raise UserError("--encoder=openmedq: name the train_vlm.py run that it is of with --run")
        _, checkpoint = find_run(config.run)
        encoder, manifest = ViT.load(checkpoint), read_manifest(checkpoint)
        if manifest is None:
            raise UserError(f"{checkpoint}: gone while it was read; run the same command again")
        return encoder, {"checkpoint": checkpoint.name, "sha256": manifest["checksum"]}
    file = Path(config.weights_dir) / f"{config.encoder}.safetensors"
    if not file.is_file():
        raise UserError(f"{file}: not there; run `python prepare/all.py --only={config.encoder}`")
    return load_encoder(file), {"sha256": hash_weights(file)}


def augment(images, generator):
    """
    (I, 3, H, W) normalised pixels -> as many, each turned by up to 10 degrees, scaled by up to a
    tenth, shifted by up to a twentieth, mirrored left to right or not, brighter or darker by up to
    0.15 of a standard deviation, and with up to 15% more or less contrast.

    generator is the CPU's, so that the numbers are the same on any device.
    """
    count = len(images)
    angle, scale, right, down, bright, contrast = (
        2 * torch.rand(6, count, generator=generator) - 1).to(images.device)
    mirrored = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0).to(images.device)
    angle, scale = angle * math.radians(10), 1 + 0.1 * scale
    turn = torch.stack([mirrored * scale * angle.cos(), -scale * angle.sin(), 0.1 * right,
                        mirrored * scale * angle.sin(), scale * angle.cos(), 0.1 * down], 1)
    grid = F.affine_grid(turn.view(count, 2, 3), images.shape, align_corners=False)
    images = F.grid_sample(images, grid, align_corners=False)  # what comes from outside is 0, the mean
    return images.mul_((1 + 0.15 * contrast).view(-1, 1, 1, 1)).add_(0.15 * bright.view(-1, 1, 1, 1))


def make_optimizer(model, config):
    """AdamW; matrices and convolutions decay, nothing else. "scale" is a group's, of the learning rate."""
    def depth_of(name):
        """0 where images enter, then a block each; the head and the norm before it come last."""
        parts = name.split(".")
        if parts[0] == "head" or parts[1] in ("norm", "attnpool"):
            return blocks + 1
        digits = "".join(filter(str.isdigit, parts[2] if parts[1] == "blocks" else parts[1][5:]))
        return int(digits) + (parts[1] == "blocks") if digits else 0

    names = [name for name, _ in model.encoder.named_modules()]
    blocks = max([int(name.split(".")[1]) + 1 for name in names if name.startswith("blocks.")] or [4])
    groups = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() in (2, 4) and not name.endswith("positional_embedding")
            groups[blocks + 1 - depth_of(name), decays].append(parameter)
    return torch.optim.AdamW([
        {"params": parameters, "scale": config.layer_decay ** steps,
         "weight_decay": config.weight_decay if decays else 0.0}
        for (steps, decays), parameters in groups.items()], lr=0.0, fused=True)


def learning_rate_at(step, steps, config):
    """Linear warm-up, then a cosine down to 0."""
    warmup = config.warmup * steps
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


# ----------------------------------------------------------------------------- one run

def to_device(array, device):
    """A numpy array as a tensor. A GPU does not wait for its copy."""
    tensor = torch.from_numpy(array)
    tensor = tensor.pin_memory() if device.type == "cuda" else tensor
    return tensor.to(device, non_blocking=True)


@torch.no_grad()
def predict(model, pixels, multi_label, config, device, autocast):
    """(n, m) float32 probabilities of (n, H, W, 3) uint8 images."""
    found = []
    for begin in range(0, len(pixels), config.batch_size):
        images = to_device(pixels[begin:begin + config.batch_size], device)
        with autocast:
            logits = model(normalise(images))
        found.append(logits.sigmoid() if multi_label else logits.softmax(1))
    return torch.cat(found).cpu().numpy()


def train_epoch(model, optimizer, split, epoch, multi_label, config, device, autocast, scale=None):
    """
    One pass over the training images, in an order that seed and epoch give. Returns the mean loss.

    Raises FloatingPointError at its end if a gradient was not finite. With a LossScale a step whose
    gradient overflows float16 is left out instead.
    """
    count = len(split.names)
    order = np.argsort(random_keys(config.seed, 2, epoch, count))
    per_epoch = -(-count // config.batch_size)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    total, finite = torch.zeros((), device=device), torch.ones((), dtype=torch.bool, device=device)
    for number in range(per_epoch):
        chosen = np.sort(order[number * config.batch_size:(number + 1) * config.batch_size])
        images = normalise(to_device(split.pixels[chosen], device))
        if config.augment == "light":
            images = augment(images, generator)
        labels = to_device(split.labels[chosen], device)
        with autocast:
            logits = model(images)
        loss = (F.binary_cross_entropy_with_logits(logits, labels.float()) if multi_label else
                F.cross_entropy(logits, labels.int().argmax(1)))
        (loss if scale is None else scale.scale * loss).backward()
        for parameter in trained if scale else ():
            if parameter.grad is not None:
                parameter.grad.div_(scale.scale)
        usable = nn.utils.clip_grad_norm_(trained, config.clip or math.inf).isfinite()
        if scale:
            scale.note(overflowed=not usable)  # float16 alone waits for the GPU at each step
        else:
            finite &= usable
        rate = learning_rate_at(epoch * per_epoch + number, config.epochs * per_epoch, config)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        if scale is None or usable:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += loss.detach() * len(chosen)
    if not finite:  # asked once an epoch, as each answer would wait for the GPU
        raise FloatingPointError("the gradient is not finite")
    return (total / count).item()


def save_state(folder, model, optimizer, best_weights, **facts):
    """Write what a killed run goes on from, whole or not at all, and remove what was there before."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {f"model:{name}": tensor for name, tensor in tensors_of(model).items()}
    tensors |= {f"best:{name}": tensor for name, tensor in best_weights.items()}
    tensors |= {f"{key}:{names[parameter]}": value.contiguous()
                for parameter, moments in optimizer.state.items() for key, value in moments.items()}
    with sealed(folder / f"step_{facts['epoch']:06d}", **facts) as partial:
        save_file(tensors, partial / "state.safetensors")
    for old in checkpoints(folder)[1:]:
        shutil.rmtree(old)


def load_state(state, model, optimizer):
    """Put what save_state wrote back into model and optimizer. Returns the weights of the best epoch."""
    parts = defaultdict(dict)
    for name, tensor in load_file(state / "state.safetensors").items():
        part, name = name.split(":", 1)
        parts[part][name] = tensor
    model.load_state_dict(parts.pop("model"))
    best_weights, parameters = parts.pop("best"), dict(model.named_parameters())
    for key, moments in parts.items():
        for name, value in moments.items():
            optimizer.state[parameters[name]][key] = value.to(parameters[name].device, copy=True)
    return best_weights


def copy_of(model):
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}


def save_model(folder, model, facts):
    """
    Write folder/model: encoder.safetensors, head.safetensors, and config.json with these facts. Returns its
    manifest's checksum.
    """
    with sealed(folder / "model") as partial:
        for part in ("encoder", "head"):
            module = getattr(model, part)
            save_file(tensors_of(module), partial / f"{part}.safetensors", metadata_of(module))
            sort_metadata(partial / f"{part}.safetensors")
        (partial / "config.json").write_text(json.dumps(facts, indent=2) + "\n")
        shutil.rmtree(folder / "model", ignore_errors=True)
    return read_manifest(folder / "model")["checksum"]


def load_model(folder, device):
    """The Classifier that save_model wrote, and its facts."""
    path = folder / "model"
    if not path.is_dir():
        raise UserError(f"{folder}: no trained model; run the same command without --predict first")
    if damage := find_damage(path):
        raise UserError(f"{path}: {damage}; delete {folder} and train again")
    facts = json.loads((path / "config.json").read_text())
    model = Classifier(load_encoder(path / "encoder.safetensors"), len(facts["classes"]))
    model.head.load_state_dict(load_file(path / "head.safetensors"))
    return model.to(device).eval(), facts


def write_csv(path, header, rows):
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    write_whole(path, text.getvalue().encode("utf-8", "backslashreplace"))  # a file's name need not be UTF-8


FREE = ("seeds", "leaks", "shards_dir", "weights_dir", "out", "save_every", "device", "report",
        "predict")  # flags that change no number, or whose effect is among what a run stands on


@dataclass
class Run:
    """One dataset, one encoder and one seed: what is asked for, and what there is of it."""
    config: Config
    folder: Path
    splits: dict  # {split: Split}
    flags: dict
    inputs: dict  # what it stands on: nested facts of its images, labels and encoder
    shards: dict  # checksums of its shards, and of the test splits that they were compared with; no reason
    # to refuse: one made anew may hold the same images, and another dataset may have none of them
    result: dict | None = None  # of a finished run
    state: Path | None = None  # of a stopped one


def open_run(run, held):
    """
    Find what there is of a Run: its result, or else its newest state. One that is not finished is locked,
    until `held` closes, and known to be writable. Raises UserError where what there is stands on something
    else than is asked for now: nothing recorded is ever rewritten.
    """
    run.result = read_result(run.folder)
    if run.result is None:
        require_writable(run.folder, "out")
        held.enter_context(lock(run.folder.with_name(f".{run.folder.name}.lock"),
                                f"training {run.folder.name}"))
        run.result = read_result(run.folder)  # another process may have ended just now
    if run.result is None:
        run.state = newest_state(run.folder)
    if record := run.result or run.state and read_manifest(run.state):
        defaults = {item.name: item.default for item in fields(Config)}
        require_same(run.folder, record, run.flags, run.inputs, defaults)


def train(model, run, few, device, autocast, scale=None):
    """
    All epochs, or those that are left of a run that was stopped. The model ends with the weights of
    the best one; returns that epoch's number and its macro-F1 on validation.
    """
    config, folder, multi_label = run.config, run.folder, run.inputs["multi_label"]
    optimizer, validation = make_optimizer(model, config), run.splits["validation"]
    epoch, best, best_epoch, best_weights, log = 0, -1.0, 0, None, []
    if run.state:
        facts = read_manifest(run.state)
        best_weights = load_state(run.state, model, optimizer)
        epoch, best, best_epoch, log = (facts[key] for key in ("epoch", "best", "best_epoch", "log"))
        scale = scale and LossScale(**facts["loss_scale"])
    write_whole(folder / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in log).encode())
    bar = tqdm(total=config.epochs, initial=epoch, desc=str(folder), unit=" epochs")
    while epoch < config.epochs and not 0 < config.patience <= epoch - best_epoch:
        try:
            loss = train_epoch(model, optimizer, few, epoch, multi_label, config, device, autocast, scale)
        except FloatingPointError as error:
            raise UserError(f"{folder}: epoch {epoch + 1}: {error}; try a lower --learning_rate") from None
        epoch += 1
        probabilities = predict(model, validation.pixels, multi_label, config, device, autocast)
        thresholds = tune_thresholds(probabilities, validation.labels) if multi_label else None
        value = float(macro_f1(decide(probabilities, thresholds), validation.labels, multi_label))
        if value > best:
            best, best_epoch, best_weights = value, epoch, copy_of(model)
        bar.set_postfix_str(f"loss {loss:.3f}, validation {value:.3f}, best {best:.3f}")
        bar.update()
        log.append({"epoch": epoch, "loss": loss, "validation": value})
        with open(folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(log[-1]) + "\n")
        if epoch % config.save_every == 0:
            save_state(folder, model, optimizer, best_weights, epoch=epoch, best=best, best_epoch=best_epoch,
                       log=log, flags=run.flags, inputs=run.inputs, loss_scale=scale and vars(scale))
    bar.close()
    model.load_state_dict(best_weights)
    return best_epoch, best


def make_run(run, encoder, device, dtype):
    """Train and test, unless that was done; returns what result.json holds."""
    if run.result:
        print(f"{run.folder}: finished already")
        return run.result
    config, folder, splits, facts = run.config, run.folder, run.splits, run.inputs
    start, classes, multi_label = time.perf_counter(), facts["classes"], facts["multi_label"]
    torch.manual_seed(config.seed)
    autocast = autocast_to(device, dtype)
    with torch.device(device):
        encoder = ViT(encoder.config) if config.encoder == "scratch" else copy.deepcopy(encoder)
    model = Classifier(encoder, len(classes)).to(device)
    # No part of an encoder acts otherwise in training, but for batch norms, which keep their statistics.
    model.eval().encoder.requires_grad_(not config.frozen)
    few = splits["train"]
    if config.images_per_class:
        few = choose_few(few, config.images_per_class, config.seed)
    write_manifest(folder, "config.json", {"flags": run.flags, "inputs": facts, "shards": run.shards})
    scale = LossScale() if dtype == torch.float16 else None
    best_epoch, best = train(model, run, few, device, autocast, scale)

    validation, test = (predict(model, splits[split].pixels, multi_label, config, device, autocast)
                        for split in ("validation", "test"))
    actual = splits["test"].labels
    thresholds = tune_thresholds(validation, splits["validation"].labels) if multi_label else None
    entry = {"dataset": run.flags["dataset"], "name": folder.parent.name, "seed": config.seed,
             "best_epoch": best_epoch, "validation": best,
             "test": score(test, actual, thresholds, classes, splits["test"].groups),
             "train_images": len(few.names), "seconds": round(time.perf_counter() - start, 1),
             "flags": run.flags, "inputs": facts, "shards": run.shards, "machine": describe_machine(device)}
    entry["model"] = save_model(folder, model, {
        "classes": classes, "image": facts["image"],
        "thresholds": None if thresholds is None else thresholds.tolist()})
    write_csv(folder / "test.csv", ["image", "labels", *classes], [
        [image, "|".join(np.array(classes)[labels]), *(f"{p:.6f}" for p in probabilities)]
        for image, labels, probabilities in zip(splits["test"].names, actual, test)])
    write_manifest(folder, "result.json", entry)
    for state in [*folder.glob(".*.partial"), *folder.glob("damaged_*"), *checkpoints(folder)]:
        shutil.rmtree(state, ignore_errors=True)
    return entry


# ----------------------------------------------------------------------------- new images

def image_files(source):
    """The files of --predict, a folder or a file, as (name in the csv, path); hidden ones are passed over."""
    if source.is_dir():
        files = [(written(path.relative_to(source).as_posix()), path) for path in files_below(source)
                 if path.name[0] != "."]
        if not files:
            raise UserError(f"--predict={source}: an empty folder")
        return files
    if not os.path.lexists(source):
        raise UserError(f"--predict={source}: no such folder or file")
    return [(source.name, source)]


def predict_new(dataset, config, device, dtype):
    """Write a csv of a trained model's probabilities for the image that --predict names, or all below it."""
    folder = run_folder(config.out, dataset, config.name or config.encoder, config.seed)
    source = Path(config.predict)
    model, facts = load_model(folder, device)
    result = read_result(folder)
    if result is None or result["model"] != read_manifest(folder / "model")["checksum"]:
        raise UserError(f"{folder}: model/ is not the one that its result.json is of; run the same command "
                        "without --predict first, or restore it")
    require_same_classes(dataset, config, facts)
    files = image_files(source)
    try:
        require_writable(folder, "out")
    except UserError as error:
        raise UserError(f"{error}, with a copy of the run in it") from None
    autocast = autocast_to(device, dtype)
    size, thresholds, rows, unreadable = facts["image"]["size"], facts["thresholds"], [], []
    for name, path in tqdm(files, unit=" images", leave=False):
        try:
            if not path.is_file():
                raise ValueError("no file, or a link to none")
            image = resize_image(load_image(path.read_bytes(), 2 * size), size, facts["image"]["resize"])
        except Exception as error:  # each decoder has its own ways to fail on a broken file
            unreadable.append(f"{written(path)}: not an image that can be read ({error})")
            print(unreadable[-1])
            continue
        [found] = predict(model, np.array(image)[None], thresholds is not None, config, device, autocast)
        said = decide(found[None], None if thresholds is None else np.array(thresholds))[0]
        rows.append([name, "|".join(np.array(facts["classes"])[said]), *(f"{p:.6f}" for p in found)])
    if not rows:
        raise UserError(f"--predict={source}: {len(files):,} files, none of them an image that can be read, "
                        f"the first: {unreadable[0]}")
    # Two folders of the same name are told apart by a hash of where they are
    where = hashlib.sha256(os.fsencode(source.resolve())).hexdigest()[:8]
    target = folder / f"predicted_{source.resolve().stem}_{where}.csv"
    write_csv(target, ["image", "predicted", *facts["classes"]], rows)
    print(f"{target}: {len(rows):,} images, {len(unreadable):,} files that could not be read"
          + ", see above" * bool(unreadable))


def require_same_classes(dataset, config, facts):
    """Raise UserError where a model has other classes or image settings than its dataset, if that is here."""
    manifest = read_manifest(Path(config.shards_dir) / dataset / "train")
    if manifest:
        image = {key: manifest["image"][key] for key in ("size", "resize")}
        before = {"classes": facts["classes"], "image": {key: facts["image"][key] for key in image}}
        if changed := differences(before, {"classes": manifest["classes"], "image": image}):
            raise UserError(f"--predict: of the model's dataset {dataset} {', '.join(changed)}; train again "
                            "under another --name")


def find_datasets(config, image_size):
    """The names of the prepared datasets that --dataset names; a folder or csv of one's own is prepared."""
    if config.dataset == "all":
        return list(EIGHT)
    names = [name.strip() for name in config.dataset.split(",") if name.strip()]
    if not names:
        raise UserError("--dataset: name one, or a folder or csv of your own")
    return list(dict.fromkeys(find_dataset(name, config.shards_dir, image_size) for name in names))


def plan(names, encoder_facts, image_size, config, held):
    """
    Every run that is asked for, opened: [(its dataset's shards, its Run)]. What is to be refused is refused
    here, before the first image is read. names: [(dataset, seeds)].
    """
    runs = []
    for name, seeds in names:
        splits, shards, facts = open_dataset(name, config, image_size)
        checksums = {split: shard.manifest["checksum"] for split, shard in shards.items()}
        checksums["tests"] = read_manifest(shards["train"].folder, "leaks.json")["tests"]
        inputs = json.loads(json.dumps({**facts, "encoder": encoder_facts}))  # as it will be read again
        for seed in seeds:
            flags = {key: value for key, value in asdict(config).items() if key not in FREE}
            folder = run_folder(config.out, name, config.name or config.encoder, seed)
            run = Run(replace(config, seed=seed), folder, splits, flags | {"dataset": name, "seed": seed},
                      inputs, checksums)
            open_run(run, held)
            runs.append((shards, run))
    return runs


def main(config):
    if config.report:
        return report(config.out)
    device, dtype = pick_device(config.device, config.dtype)
    rank, ranks, device = join_group(device, timeout=30 * 24 * 3600)  # each is done when it is done
    encoder, encoder_facts = together(lambda: make_encoder(config))
    image_size = encoder.config.image_size
    names = agree(lambda: find_datasets(config, image_size))
    if config.predict:
        return together(lambda: [predict_new(name, config, device, dtype) for name in names[rank::ranks]])
    pairs = list(itertools.product(names, range(config.seed, config.seed + config.seeds)))
    mine = [(name, [seed for _, seed in group]) for name, group in
            itertools.groupby(pairs[rank::ranks], key=lambda pair: pair[0])]
    with contextlib.ExitStack() as held:
        runs = together(lambda: plan(mine, encoder_facts, image_size, config, held))
        for number, (shards, run) in enumerate(runs):
            for split, images in run.splits.items():
                if not run.result and images.pixels is None:
                    images.read_pixels(shards[split])
            print_run(make_run(run, encoder, device, dtype))
            if number + 1 == len(runs) or runs[number + 1][1].splits is not run.splits:
                for images in run.splits.values():
                    images.pixels = None  # the memory is the next dataset's
    together(lambda: None)  # until all have made their runs
    if len(pairs) > 1 and rank == 0:
        print()
        report(config.out)


if __name__ == "__main__":
    run(main, CONFIG)
