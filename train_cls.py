"""
Fine-tune an image encoder with a linear head to classify images, and compare encoders that way.

    python train_cls.py --dataset=chaoyang --encoder=biomedclip     one run: 100 epochs, then the test
    python train_cls.py --dataset=path/to/folder --encoder=scratch  your own images, a folder a class
    python train_cls.py --report=true                               the table of all runs made so far
    torchrun --standalone --nproc_per_node=8 -- train_cls.py --dataset=all --seeds=3    eight at a time

The head reads the class token and the mean of the patch tokens side by side, Linear(2d, classes)
(OpenMedQ, arXiv 2606.12953). One recipe serves all encoders. The epoch that is best on the
validation split is the one that is tested. A run that was killed goes on where it stopped when the
same command is given again, and one that is finished is not made twice.

Each run is a folder <out>/<dataset>/<name>/seed_<n>: model/ (encoder, head, classes), log.jsonl, test.csv
(probabilities) and, written last, result.json (scores).
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from plumbing.flags import (Batch, Count, Device, Range, Scale, Share, UserError, Whole, parse_command_line,
                            run)


@dataclass(frozen=True)
class Config:
    dataset: str = "chaoyang"  # prepared, several with commas; all: the paper's eight; or your folder
    encoder: Literal["openmedq", "biomedclip", "pubmedclip", "pmc_clip", "scratch"] = "biomedclip"  # to start from
    run: str = ""  # with --encoder=openmedq: the train_vlm.py run whose encoder it is
    model: Literal["paper", "small", "sample"] = "paper"  # with --encoder=scratch: sizes of the ViT
    name: str = ""  # under which the run is filed and reported; none: the encoder's
    seeds: Annotated[int, Range(1, 10_000)] = 1  # runs, each with another seed
    seed: Whole = 0  # the first one's: of the head, the order and the augmentation
    epochs: Annotated[int, Range(1, 1_000_000)] = 100  # passes over the training images
    batch_size: Batch = 64  # images in an optimiser step
    learning_rate: Scale = 5e-5  # peak
    warmup: Share = 0.05  # share of the steps in which it rises from 0; then a cosine down to 0
    weight_decay: Scale = 0.01  # of matrices and convolutions
    layer_decay: Share = 1.0  # learning rate of each block, as a multiple of the next one's
    clip: Scale = 1.0  # largest norm of the gradient; 0: no clipping
    augment: Literal["light", "none"] = "light"  # light: shifted, turned, mirrored sideways
    frozen: bool = False  # train the head alone (linear probe)
    patience: Whole = 0  # stop after so many epochs without a better one; 0: never
    images_per_class: Whole = 0  # train on only so many, another choice for each seed; 0: all
    shards_dir: str = "shards"  # where prepare/all.py put the datasets
    weights_dir: str = "weights"  # where it put the encoders
    out: str = "out/cls"  # where runs go
    save_every: Count = 10  # epochs between two states from which a killed run goes on
    device: Device = "auto"  # cuda, mps or cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where the GPU has it
    report: bool = False  # print the table of all runs and stop
    predict: str = ""  # folder of new images: write a csv of the trained model's probabilities and stop


if __name__ == "__main__":
    CONFIG = parse_command_line(Config)  # before torch is imported: --help and a typo are answered at once

import csv
import itertools
import json
import math
import os
import shutil
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from data import Shard, load_image, random_keys, resize_image
from model import (CONFIGS, ViT, describe_machine, join_group, load_encoder, normalise, pick_device,
                   tensors_of)
from plumbing.files import checkpoints, find_damage, newest_checkpoint, seal, write_whole

EIGHT = ("cxr8", "med_fmc_chest", "med_fmc_colon", "med_fmc_endo", "busi", "chaoyang", "cbis_ddsm",
         "mendeley_cxray")
MEAN = "mean of the eight"
PAPER = {"openmedq": 0.757, "biomedclip": 0.745, "pubmedclip": 0.746, "pmc_clip": 0.745,
         "scratch": 0.616}  # the paper's mean macro-F1 over the eight


# ----------------------------------------------------------------------------- metrics
# actual and predicted are (n, m) bool: n images, m classes. Where each image has one class, a row of
# either has one True. weights (..., n): how often each image counts, for the bootstrap.

def f1_scores(predicted, actual, weights):
    """(..., m) F1 of each class, 0 for one that does not occur, and whether it occurs at all."""
    both = weights @ (predicted & actual)
    either = weights @ predicted + weights @ actual  # 2 tp + fp + fn
    return 2 * both / np.maximum(either, 1), either > 0


def macro_f1(predicted, actual, multi_label, weights=None):
    """
    Mean of the classes' F1: (...).

    Where an image has one class, over those that occur in the labels or predictions, which is
    scikit-learn's average="macro". Where it has several labels, each label counts as two classes,
    having it and not having it: with one label this is the macro-F1 of a task with two classes.
    """
    weights = np.ones(len(actual)) if weights is None else weights
    f1, occurs = f1_scores(predicted, actual, weights)
    if multi_label:
        return (f1 + f1_scores(~predicted, ~actual, weights)[0]).mean(-1) / 2
    return (f1 * occurs).sum(-1) / occurs.sum(-1)


def positive_f1(predicted, actual):
    """The other macro-F1 of several labels: the mean over labels of the F1 of having it."""
    return f1_scores(predicted, actual, np.ones(len(actual)))[0].mean()


def auroc(scores, actual):
    """Area under the ROC curve of (n,) scores, how often a positive is above a negative; or NaN."""
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # from 1; the same scores share the mean
    positives, negatives = actual.sum(), (~actual).sum()
    if not positives or not negatives:
        return math.nan
    return float((ranks[actual].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def tune_thresholds(probabilities, actual):
    """(m,) the threshold of each label at which its F1 is best; 0.5 for one that never occurs."""
    thresholds = np.full(actual.shape[1], 0.5)
    for label in np.flatnonzero(actual.any(0)):
        order = np.argsort(-probabilities[:, label], kind="stable")
        sorted_probabilities = probabilities[order, label]
        taken = np.arange(1, len(order) + 1)
        f1 = 2 * np.cumsum(actual[order, label]) / (taken + actual[:, label].sum())
        lower = np.append(sorted_probabilities[1:], -1e-9)  # one may be 0
        best = np.argmax(np.where(sorted_probabilities > lower, f1, -1))  # not between the same two
        thresholds[label] = (sorted_probabilities[best] + lower[best]) / 2
    return thresholds


def decide(probabilities, thresholds):
    """(n, m) bool: the most probable class, or every label that reaches its threshold, if there are any."""
    if thresholds is not None:
        return probabilities >= thresholds
    return np.arange(probabilities.shape[1]) == probabilities.argmax(1)[:, None]


def score(probabilities, actual, thresholds, classes):
    """All metrics of a split as a dict. thresholds: (m,), tuned elsewhere; None: an image has one class."""
    multi_label, n = thresholds is not None, len(actual)
    predicted = decide(probabilities, thresholds)
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=1000)  # images, drawn anew
    resampled = macro_f1(predicted, actual, multi_label, draws.astype(np.float32))
    f1, _ = f1_scores(predicted, actual, np.ones(n))
    recall = (predicted & actual).sum(0) / np.maximum(actual.sum(0), 1)
    areas = [auroc(column, truth) for column, truth in zip(probabilities.T, actual.T)]
    if multi_label:
        without = (~predicted & ~actual).sum(0) / np.maximum((~actual).sum(0), 1)
        balanced = (recall + without).mean() / 2
    else:
        balanced = recall[actual.any(0)].mean()
    found = {"macro_f1": float(macro_f1(predicted, actual, multi_label)),
             "interval": np.quantile(resampled, [0.025, 0.975]).tolist(),
             "accuracy": float((predicted == actual).mean() if multi_label else
                               (predicted & actual).any(1).mean()),
             "balanced_accuracy": float(balanced),
             "auroc": float(np.nanmean(areas)) if not np.isnan(areas).all() else None,
             "images": n,
             "classes": {name: {"f1": float(f1[k]), "recall": float(recall[k]),
                                "auroc": None if math.isnan(areas[k]) else areas[k],  # NaN is no JSON
                                "images": int(actual[:, k].sum())} for k, name in enumerate(classes)}}
    if multi_label:
        plain = decide(probabilities, 0.5)
        found |= {"macro_f1_at_0.5": float(macro_f1(plain, actual, True)),
                  "positive_f1": float(positive_f1(predicted, actual)),
                  "positive_f1_at_0.5": float(positive_f1(plain, actual)),
                  "thresholds": thresholds.tolist()}
    else:  # rows: labels, columns: predictions
        found["confusion"] = (actual.T.astype(int) @ predicted.astype(int)).tolist()
    return found


# ----------------------------------------------------------------------------- images and labels

@dataclass
class Split:
    """Images of one split in memory, and their labels."""
    pixels: np.ndarray  # (n, H, W, 3) uint8
    labels: np.ndarray  # (n, m) bool
    names: list
    groups: list  # such as each image's patient; a name that no two images share where none is known

    def take(self, numbers):
        return Split(self.pixels[numbers], self.labels[numbers], [self.names[n] for n in numbers],
                     [self.groups[n] for n in numbers])


def read_split(shard):
    """The Split that a shard holds: each image once, however many questions are asked about it."""
    classes = shard.manifest["classes"]
    left_out = set()
    if shard.folder.name == "train":
        leaks, numbers = shard.read_leaks()
        left_out = set(numbers.tolist()) if leaks == "drop" else set()
        if left_out:
            print(f"{shard.folder}: {len(left_out):,} images left out, which a test split has")
        if left_out and len(left_out) == len(shard):
            raise UserError(f"{shard.folder}: a test split has all of its {len(shard):,} images, too, so "
                            "that none is left to train on; bring others")
    rows = {}  # (image number, its labels) -> its name and its group
    for number, (record, image) in enumerate(zip(shard.read_records(), shard.samples["image"].tolist())):
        if number not in left_out and "labels" in record:
            rows.setdefault((image, tuple(record["labels"])),
                            (record["image"], record.get("group") or f"image {image}"))
    numbers = [image for image, _ in rows]
    size = shard.manifest["image"]["size"]
    pixels = np.empty((len(numbers), size, size, 3), np.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow lets go of the interpreter lock
        images = pool.map(shard.read_image, numbers)
        for place, image in enumerate(tqdm(images, str(shard.folder), len(numbers), leave=False)):
            pixels[place] = image
    labels = np.array([[name in found for name in classes] for _, found in rows], bool)
    return Split(pixels, labels.reshape(-1, len(classes)), [name for name, _ in rows.values()],
                 [group for _, group in rows.values()])


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


def open_dataset(name, config, image_size):
    """
    {split: Split} of train, validation and test, and the manifest that says of what.

    Raises UserError where there is nothing that could be learnt or tested.
    """
    folder = Path(config.shards_dir) / name
    shards = {split: Shard(folder / split) for split in ("train", "validation", "test")
              if split != "validation" or (folder / split).is_dir()}
    classes = shards["train"].manifest["classes"]
    if not classes:
        raise UserError(f"--dataset: {name} has no labels; those with labels: {', '.join(EIGHT)}")
    for shard in shards.values():
        shard.require_image_size(image_size)
    splits = {split: read_split(shard) for split, shard in shards.items()}
    for split, found in splits.items():
        if not len(found.names):
            raise UserError(f"{folder}/{split}: no image in it; its manifest.json counts why")
    if "validation" not in splits:
        splits["train"], splits["validation"] = hold_out(splits["train"])
        if not len(splits["validation"].names):
            raise UserError(f"{folder}/train: fewer than 6 images of each class, or all of one patient, too "
                            "few to hold some out for validation; bring more, or a validation split")
    present = splits["train"].labels.any(0)
    if not present.all():
        raise UserError(f"{folder}/train: no image of class {classes[int(np.argmin(present))]!r}; bring "
                        "some, or leave the class out")
    for split in ("train", "test"):
        if len(classes) > 1 and (splits[split].labels == splits[split].labels[0]).all():
            raise UserError(f"{folder}/{split}: all of its {len(splits[split].names)} images have the "
                            "same label: nothing to tell apart")
    return splits, shards["train"].manifest


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


def make_encoder(config, device):
    """The encoder that is asked for, in float32."""
    if config.encoder == "openmedq":
        if not config.run:
            raise UserError("--encoder=openmedq: name the train_vlm.py run that it is of with --run")
        return ViT.from_run(config.run, device)
    if config.encoder == "scratch":
        with torch.device(device):
            return ViT(CONFIGS[config.model][0])
    file = Path(config.weights_dir) / f"{config.encoder}.safetensors"
    if not file.is_file():
        raise UserError(f"{file}: not there; run `python prepare/all.py --only={config.encoder}`")
    return load_encoder(file, device=device)


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


def train_epoch(model, optimizer, split, epoch, multi_label, config, device, autocast):
    """
    One pass over the training images, in an order that seed and epoch give. Returns the mean loss.

    Raises FloatingPointError at its end if a gradient was not finite.
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
        loss.backward()
        finite &= nn.utils.clip_grad_norm_(trained, config.clip or math.inf).isfinite()
        rate = learning_rate_at(epoch * per_epoch + number, config.epochs * per_epoch, config)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += loss.detach() * len(chosen)
    if not finite:  # asked once an epoch, as each answer would wait for the GPU
        raise FloatingPointError("the gradient is not finite")
    return (total / count).item()


def save_state(folder, **state):
    """Write what a killed run goes on from, whole or not at all, and remove what was there before."""
    partial = folder / "partial_state"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    torch.save(state, partial / "state.pt")
    seal(partial, folder / f"step_{state['epoch']:06d}")
    for old in checkpoints(folder)[1:]:
        shutil.rmtree(old)


def load_state(folder, device):
    """The state of a killed run, verified."""
    newest = newest_checkpoint(folder)
    for other in checkpoints(folder):
        if other != newest:  # older, or damaged and to be made again
            shutil.rmtree(other)
    return torch.load(newest / "state.pt", map_location=device, weights_only=True)


def copy_of(model):
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}


def save_model(folder, model, facts):
    """Write folder/model: encoder.safetensors, head.safetensors, and config.json with these facts."""
    partial = folder / "model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for part in ("encoder", "head"):
        save_file(tensors_of(getattr(model, part)), partial / f"{part}.safetensors", {"format": "pt"})
    (partial / "config.json").write_text(json.dumps(facts, indent=2) + "\n")
    shutil.rmtree(folder / "model", ignore_errors=True)
    seal(partial, folder / "model")


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
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


FREE = ("seeds", "shards_dir", "weights_dir", "out", "save_every", "device", "report", "predict")


def read_results(config):
    """The result.json of every run that is finished, {(dataset, name, seed): result}."""
    entries = [json.loads(path.read_text()) for path in Path(config.out).glob("*/*/seed_*/result.json")]
    return {(entry["dataset"], entry["name"], entry["seed"]): entry for entry in entries}


def train(model, splits, few, multi_label, folder, config, device, autocast):
    """
    All epochs, or those that are left of a run that was stopped. The model ends with the weights of
    the best one; returns that epoch's number and its macro-F1 on validation.
    """
    optimizer = make_optimizer(model, config)
    log_file = folder / "log.jsonl"
    first, best, best_epoch, best_weights, lines = 0, -1.0, 0, None, []
    if checkpoints(folder):
        state = load_state(folder, device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, best, best_epoch = state["epoch"], state["best"], state["best_epoch"]
        best_weights = state["best_weights"]
        lines = log_file.read_text(encoding="utf-8").splitlines(keepends=True)[:first]
    actual = splits["validation"].labels
    with open(log_file, "w", encoding="utf-8") as log:
        log.writelines(lines)
        for epoch in (bar := tqdm(range(first, config.epochs), str(folder), unit=" epochs")):
            try:
                loss = train_epoch(model, optimizer, few, epoch, multi_label, config, device, autocast)
            except FloatingPointError as error:
                raise UserError(f"{folder}: epoch {epoch + 1}: {error}; try a lower "
                                "--learning_rate") from None
            found = predict(model, splits["validation"].pixels, multi_label, config, device, autocast)
            thresholds = tune_thresholds(found, actual) if multi_label else None
            validation = float(macro_f1(decide(found, thresholds), actual, multi_label))
            if validation > best:
                best, best_epoch, best_weights = validation, epoch + 1, copy_of(model)
            bar.set_postfix_str(f"loss {loss:.3f}, validation {validation:.3f}, best {best:.3f}")
            log.write(json.dumps({"epoch": epoch + 1, "loss": loss, "validation": validation}) + "\n")
            log.flush()
            if config.patience and epoch + 1 - best_epoch >= config.patience:
                break
            if (epoch + 1) % config.save_every == 0:
                save_state(folder, model=model.state_dict(), optimizer=optimizer.state_dict(),
                           epoch=epoch + 1, best=best, best_epoch=best_epoch, best_weights=best_weights)
    model.load_state_dict(best_weights)
    return best_epoch, best


def make_run(dataset, splits, manifest, config, device, dtype):
    """Train and test with one seed, unless that was done; returns what result.json holds."""
    name, classes = config.name or config.encoder, manifest["classes"]
    folder = Path(config.out) / dataset / name / f"seed_{config.seed}"
    flags = {key: value for key, value in asdict(config).items() if key not in FREE}
    flags["dataset"] = dataset
    done = read_results(config).get((dataset, name, config.seed))
    before = done["flags"] if done else (json.loads((folder / "config.json").read_text())
                                         if checkpoints(folder) else flags)
    for key, value in flags.items():
        if before.get(key) != value:
            raise UserError(f"--{key}={value}: the run in {folder} has {before.get(key)}; choose another "
                            "--name")
    if done:
        print(f"{folder}: finished already")
        return done

    start = time.perf_counter()
    torch.manual_seed(config.seed)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    model = Classifier(make_encoder(config, device), len(classes)).to(device)
    # No part of an encoder acts otherwise in training, but for batch norms, which keep their statistics.
    model.eval().encoder.requires_grad_(not config.frozen)
    few = splits["train"]
    if config.images_per_class:
        few = choose_few(few, config.images_per_class, config.seed)
    multi_label = manifest["multi_label"]
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "config.json", (json.dumps(flags, indent=2) + "\n").encode())
    best_epoch, best = train(model, splits, few, multi_label, folder, config, device, autocast)

    validation, test = (predict(model, splits[split].pixels, multi_label, config, device, autocast)
                        for split in ("validation", "test"))
    actual = splits["test"].labels
    thresholds = tune_thresholds(validation, splits["validation"].labels) if multi_label else None
    entry = {"dataset": dataset, "name": name, "seed": config.seed, "best_epoch": best_epoch,
             "validation": best, "test": score(test, actual, thresholds, classes),
             "train_images": len(few.names), "seconds": round(time.perf_counter() - start, 1),
             "flags": flags, "shards": manifest["images_sha256"], "machine": describe_machine(device)}
    save_model(folder, model, {
        "classes": classes, "image": manifest["image"],
        "thresholds": None if thresholds is None else thresholds.tolist()})
    write_csv(folder / "test.csv", ["image", "labels", *classes], [
        [image, "|".join(np.array(classes)[labels]), *(f"{p:.6f}" for p in probabilities)]
        for image, labels, probabilities in zip(splits["test"].names, actual, test)])
    write_whole(folder / "result.json", (json.dumps(entry, indent=2) + "\n").encode())
    for state in [folder / "partial_state", *checkpoints(folder)]:
        shutil.rmtree(state, ignore_errors=True)
    return entry


def print_run(entry):
    """A run's metrics, its classes, and, where an image has one class, its confusion matrix."""
    test = entry["test"]
    low, high = test["interval"]
    print(f"\n{entry['dataset']}, {entry['name']}, seed {entry['seed']}: {test['images']:,} test "
          f"images, epoch {entry['best_epoch']}\n"
          f"  macro-F1 {test['macro_f1']:.3f} ({low:.3f} to {high:.3f}), "
          f"accuracy {test['accuracy']:.3f}, balanced {test['balanced_accuracy']:.3f}, "
          f"AUROC {math.nan if test['auroc'] is None else test['auroc']:.3f}")
    if "positive_f1" in test:
        print(f"  at thresholds of 0.5: {test['macro_f1_at_0.5']:.3f}; of having a label alone: "
              f"{test['positive_f1']:.3f}, at 0.5 {test['positive_f1_at_0.5']:.3f}")
    width = max(map(len, test["classes"]))
    confusion = test.get("confusion", [[]] * len(test["classes"]))
    taken_for = "   taken for, in this order" * bool(confusion[0])
    print(f"  {'':{width}}     F1  recall  AUROC  images{taken_for}")
    for (name, found), counts in zip(test["classes"].items(), confusion):
        row = "  ".join(f"{count:4}" for count in counts)
        area = math.nan if found["auroc"] is None else found["auroc"]
        print(f"  {name:{width}}  {found['f1']:.3f}   {found['recall']:.3f}  {area:.3f}  "
              f"{found['images']:6,}   {row}")


# ----------------------------------------------------------------------------- all runs

def sign_flip(differences):
    """
    How often paired differences would have a mean as far from 0 if each had either sign with the
    same chance: a two-sided p, exact up to 16 of them, else by 100,000 draws.
    """
    differences, count = np.array(differences), len(differences)
    signs = (np.array(list(itertools.product((1, -1), repeat=count))) if count <= 16 else
             np.random.default_rng(0).choice((1, -1), (100_000, count)))
    signs[0] = 1  # what was found is one of the draws
    return float((np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12).mean())


def measured(results):
    """
    {group: {encoder: (macro-F1 on test, its standard deviation over seeds)}}, a group being a dataset or
    the mean of the eight, and the names of the encoders, each in the order in which they are shown.

    What was not run is not among them. The mean of the eight is there for encoders that were run on all
    of them; its deviation is that of the means of the seeds that all of them have. A deviation is
    NaN where there is one seed.
    """
    scores = defaultdict(lambda: defaultdict(dict))
    for (dataset, name, seed), entry in results.items():
        scores[dataset][name][seed] = entry["test"]["macro_f1"]
    names = sorted({name for _, name, _ in results}, key=lambda name: ([*PAPER, name].index(name), name))
    groups = {}
    for dataset in [*filter(scores.get, EIGHT), *sorted(scores.keys() - set(EIGHT))]:
        cells = {name: list(scores[dataset][name].values()) for name in names if name in scores[dataset]}
        groups[dataset] = {name: (np.mean(values), deviation(values)) for name, values in cells.items()}
    whole = [name for name in names if all(name in groups.get(dataset, {}) for dataset in EIGHT)]
    if whole:
        groups[MEAN] = {}
    for name in whole:
        common = set.intersection(*(set(scores[dataset][name]) for dataset in EIGHT))
        means = [np.mean([scores[dataset][name][seed] for dataset in EIGHT]) for seed in common]
        groups[MEAN][name] = np.mean([groups[dataset][name][0] for dataset in EIGHT]), deviation(means)
    return groups, names


def deviation(values):
    return np.std(values, ddof=1) if len(values) > 1 else math.nan


def report(config):
    """Print the runs made so far as a table, the paper's means beside it, and what differs reliably."""
    results = read_results(config)
    if not results:
        raise UserError(f"{config.out}: no run yet; make one with --dataset and --encoder")
    groups, names = measured(results)
    means = groups.pop(MEAN, {})
    rows = [["macro-F1 on test", *names]]
    for group, found in groups.items():
        cells = {name: f"{mean:.3f}" + ("" if math.isnan(spread) else f" ± {spread:.3f}")
                 for name, (mean, spread) in found.items()}
        rows.append([group, *(cells.get(name, "") for name in names)])
    rows += [[MEAN, *(f"{means[name][0]:.3f}" if name in means else "" for name in names)],
             ["the paper's mean", *(f"{PAPER[name]:.3f}" if name in PAPER else "" for name in names)]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())
    print("mean over seeds ± their standard deviation; a mean of the eight where all eight were run")
    for other in names[1:]:
        differences = [entry["test"]["macro_f1"] - results[dataset, other, seed]["test"]["macro_f1"]
                       for (dataset, name, seed), entry in results.items()
                       if name == names[0] and (dataset, other, seed) in results]
        if differences:
            print(f"{names[0]} - {other}: {np.mean(differences):+.3f} over {len(differences)} pairs of "
                  f"dataset and seed, higher in {sum(d > 0 for d in differences)}, "
                  f"p = {sign_flip(differences):.3f} (signs flipped)")


# ----------------------------------------------------------------------------- new images

def predict_folder(dataset, config, device, dtype):
    """Write a csv of a trained model's probabilities for every image file below --predict."""
    folder = Path(config.out) / dataset / (config.name or config.encoder) / f"seed_{config.seed}"
    model, facts = load_model(folder, device)
    source = Path(config.predict)
    files = sorted(path for path in source.rglob("*") if path.is_file() and path.name[0] != ".")
    if not files:
        raise UserError(f"--predict={source}: no file there")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    size, thresholds, rows, unreadable = facts["image"]["size"], facts["thresholds"], [], 0
    for path in tqdm(files, unit=" images", leave=False):
        try:
            image = resize_image(load_image(path.read_bytes(), 2 * size), size, facts["image"]["resize"])
        except Exception as error:  # each decoder has its own ways to fail on a broken file
            unreadable += 1
            print(f"{path}: not an image that can be read ({error})")
            continue
        found = predict(model, np.asarray(image)[None], thresholds is not None, config, device, autocast)
        said = decide(found, None if thresholds is None else np.array(thresholds))[0]
        rows.append([path.relative_to(source).as_posix(), "|".join(np.array(facts["classes"])[said]),
                     *(f"{p:.6f}" for p in found[0])])
    target = folder / f"predicted_{source.resolve().name}.csv"
    write_csv(target, ["image", "predicted", *facts["classes"]], rows)
    print(f"{target}: {len(rows):,} images, {unreadable:,} files that could not be read")


def find_datasets(config, image_size):
    """The names of the prepared datasets that --dataset names; a folder or csv of one's own is prepared."""
    names = EIGHT if config.dataset == "all" else [name.strip() for name in config.dataset.split(",")]
    found = []
    for name in names:
        if "/" in name or Path(name).suffix == ".csv" or (
                Path(name).is_dir() and not (Path(config.shards_dir) / name).is_dir()):
            from prepare.folder import prepare_folder  # prepared like any other dataset, on the spot

            name = prepare_folder(name, config.shards_dir, image_size)
        found.append(name)
    return found


def main(config):
    if config.report:
        return report(config)
    device, dtype = pick_device(config.device, config.dtype)
    rank, ranks, device = join_group(device, timeout=30 * 24 * 3600)  # each is done when it is done
    image_size = make_encoder(config, "meta" if config.encoder == "scratch" else "cpu").config.image_size
    names = [find_datasets(config, image_size) if rank == 0 else None]
    if ranks > 1:
        dist.broadcast_object_list(names)
    if config.predict:
        for name in names[0][rank::ranks]:
            predict_folder(name, config, device, dtype)
        return
    runs = list(itertools.product(names[0], range(config.seed, config.seed + config.seeds)))
    for name, mine in itertools.groupby(runs[rank::ranks], key=lambda pair: pair[0]):
        splits, manifest = open_dataset(name, config, image_size)
        for _, seed in mine:
            print_run(make_run(name, splits, manifest, replace(config, seed=seed), device, dtype))
    if ranks > 1:
        dist.barrier()
    if len(runs) > 1 and rank == 0:
        print()
        report(config)


if __name__ == "__main__":
    run(main, CONFIG)
