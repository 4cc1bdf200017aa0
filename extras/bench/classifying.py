"""
How fast train_cls.py fine-tunes, beside what one would otherwise write.

    python extras/bench/classifying.py --data=busi --model=small

Ours is train_cls.train_epoch. The peer is a DataLoader with a worker a core, which decodes, resizes
and augments image files with Pillow, and transformers' ViTModel with the same head, weights, images
and labels. The third is our step on images that lie there ready: it is the model's share of ours, and
the rest that of the data, and of the look at whether the gradient is finite. A round is an epoch of
each, in turns, so that a machine's moods meet all of them. Needs tests/requirements.txt.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

from plumbing.flags import require_packages

if __name__ == "__main__":
    require_packages("tests/requirements.txt", "transformers")

import os
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from PIL import Image, ImageEnhance, ImageOps
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from extras.bench.preparing import enlarge
from extras.bench.progress import Progress, tell
from extras.scripts import load_script
from model import CLIP_MEAN, CLIP_STD, CONFIGS, ViT, normalise
from plumbing.devices import autocast_to, pick_device
from plumbing.flags import Count, Device, Range, Threads, UserError, parse_command_line, run
from plumbing.pixels import FORMATS
from plumbing.shards import Shard
from plumbing.tensors import tensors_of
from prepare.datasets import DATASETS
from run import make_optimizer
from tasks.labelled import read_split
from zoo.classifier import Classifier

train_cls = load_script("train_cls.py")  # the script, whose epoch is measured
RENAMED = {"attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense",
           "mlp.fc2": "output.dense", "norm1": "layernorm_before", "norm2": "layernorm_after",
           "norm": "layernorm", "patch_embed.proj": "embeddings.patch_embeddings.projection",
           "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}


@dataclass(frozen=True)
class Config:
    data: str = "busi"  # prepared dataset with labels, whose raw files are there, too
    raw_dir: str = "raw"  # as prepare/all.py's; none: the peer reads PNG files of the prepared images
    enlarge: Annotated[int, Range(1, 16)] = 1  # times along each side, to stand for larger files; the peer's
    shards_dir: str = "shards"  # where prepare/all.py put the datasets
    model: Literal["paper", "small", "sample"] = "small"  # sizes of the ViT
    batch_size: Count = 64  # images in an optimiser step
    steps: Count = 8  # of an epoch; images come again where there are too few
    rounds: Count = 5  # epochs of each
    workers: Threads = 0  # the peer's; 0: one a core
    peak_tflops: Annotated[float, Range(1e-9, 1e9)] = 790.0  # of the GPU in bfloat16, about an H200's
    device: Device = "auto"  # cuda, mps or cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where the GPU has it


# ----------------------------------------------------------------------------- the peer

class ImageFiles(Dataset):
    """Image files as anybody reads them: decoded, resized, augmented and normalised one at a time."""

    def __init__(self, paths, labels, size, augmented):
        self.paths, self.labels, self.size, self.augmented = paths, labels, size, augmented

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, number):
        image = Image.open(self.paths[number], formats=FORMATS).convert("RGB")
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        if self.augmented:
            image = augment(image)
        pixels = torch.from_numpy(np.asarray(image, np.float32) / 255)
        pixels = (pixels - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
        return pixels.permute(2, 0, 1), self.labels[number]


def augment(image):
    """As zoo.classifier.augment, by Pillow."""
    angle, scale, right, down, bright, contrast = (2 * torch.rand(6) - 1).tolist()
    if torch.rand(()) < 0.5:
        image = ImageOps.mirror(image)
    angle, scale, half = np.radians(10 * angle), 1 + 0.1 * scale, image.width / 2
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    image = image.transform(image.size, Image.Transform.AFFINE, (
        cos, -sin, half * (1 - cos + sin + 0.1 * right), sin, cos, half * (1 - cos - sin + 0.1 * down)),
        Image.Resampling.BILINEAR)
    image = ImageEnhance.Brightness(image).enhance(1 + 0.15 * bright)
    return ImageEnhance.Contrast(image).enhance(1 + 0.15 * contrast)


def make_vit(ours):
    """transformers' ViT with the weights of a model.ViT."""
    sizes, tensors = ours.config, {}
    for key, tensor in tensors_of(ours).items():
        name, kind = (key, "") if key in RENAMED else key.rsplit(".", 1)
        block = ""
        if name.startswith("blocks."):
            _, number, name = name.split(".", 2)
            block = f"encoder.layer.{number}."
        if name == "attn.qkv":
            for which, third in zip(("query", "key", "value"), tensor.chunk(3)):
                tensors[f"{block}attention.attention.{which}.{kind}"] = third.clone()
        else:
            tensors[f"{block}{RENAMED[name]}.{kind}".rstrip(".")] = tensor
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, f"{folder}/model.safetensors", {"format": "pt"})
        transformers.ViTConfig(
            image_size=sizes.image_size, patch_size=sizes.patch_size, hidden_size=sizes.width,
            num_hidden_layers=sizes.depth, num_attention_heads=sizes.heads,
            intermediate_size=4 * sizes.width, layer_norm_eps=sizes.eps).save_pretrained(folder)
        return transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False)


class Peer(nn.Module):
    """transformers' ViT and the head of zoo.classifier.Classifier, with the weights of one."""

    def __init__(self, ours):
        super().__init__()
        self.encoder = make_vit(ours.encoder)
        self.head = nn.Linear(2 * ours.encoder.config.width, ours.head.out_features)
        self.head.load_state_dict(ours.head.state_dict())

    def forward(self, images):
        tokens = self.encoder(pixel_values=images).last_hidden_state
        return self.head(torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1))


def write_files(split, config, folder):
    """Paths of the Split's images as files in the folder: raw, as they are or enlarged, or else as prepared."""
    if not config.raw_dir:
        paths = [folder / f"{number}.png" for number in range(len(split.names))]
        for path, pixels in zip(paths, split.pixels):
            Image.fromarray(pixels).save(path)
        return paths
    dataset = DATASETS.get(config.data)
    if dataset is None or not dataset.find(config.raw_dir):
        raise UserError(f"--data: no raw files of {config.data!r} in {config.raw_dir}")
    places = {name: folder / str(number) for number, name in enumerate(split.names)}
    for _, record in dataset.read(dataset.raw(config.raw_dir)):
        if record.image_name in places:
            content = enlarge(record.image, config.enlarge) if config.enlarge > 1 else record.image
            places[record.image_name].write_bytes(content)
    missing = [name for name, path in places.items() if not path.is_file()]
    if missing:
        raise UserError(f"{config.raw_dir}: no {missing[0]!r}, which the prepared {config.data} has")
    return list(map(places.get, split.names))


# ----------------------------------------------------------------------------- the measurement

def loss_of(logits, labels, multi_label):
    return (F.binary_cross_entropy_with_logits(logits.float(), labels.float()) if multi_label else
            F.cross_entropy(logits.float(), labels.int().argmax(1)))


def train_steps(model, optimizer, batches, multi_label, device, autocast):
    """An optimiser step for each (images, labels), as anybody writes it."""
    for images, labels in batches:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with autocast:
            logits = model(images)
        loss_of(logits, labels, multi_label).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def require_equal(ours, peer, split, files, multi_label, device):
    """Stop unless both, of as many parameters, make of the same images the same loss, in float32."""
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (ours, peer)]
    assert sizes[0] == sizes[1], sizes
    prepared = normalise(torch.from_numpy(split.pixels).to(device))
    decoded = torch.stack([files[number][0] for number in range(len(files))]).to(device)
    labels = torch.from_numpy(split.labels).to(device)
    losses = [loss_of(model(images), labels, multi_label).item()
              for model, images in ((ours, prepared), (peer, decoded))]
    apart = (prepared - decoded).abs().mean().item() * np.mean(CLIP_STD) * 255
    print(f"both: {sizes[0]:,} parameters; first loss, not augmented: ours {losses[0]:.5f}, peer "
          f"{losses[1]:.5f}; a prepared pixel is {apart:.2f} grey levels from the file's, on average")
    assert abs(losses[0] - losses[1]) < 1e-3 and apart < 3, (losses, apart)


def flops_an_image(encoder):
    """
    Forward and backward, which is twice the forward: each weight of a matrix multiplies and adds once
    a token, 2 * parameters * N, and attention takes two products of (N, N) with C channels a block.
    """
    side, C, depth = encoder.config.image_size, encoder.config.width, encoder.config.depth
    N = encoder.tokens(side, side)
    weights = sum(parameter.numel() for parameter in encoder.parameters() if parameter.dim() in (2, 4))
    return 3 * (2 * weights * N + depth * 2 * 2 * N * N * C)


def print_rates(seconds, flops, config, device):
    """The table; seconds: {way: of each epoch, the first one to warm up}; flops: of an image."""
    images, median = config.steps * config.batch_size, {}
    print(f"{'':20}  steps/s, median   best   images/s, median   best   TFLOP/s")
    for name, times in seconds.items():
        median[name], best = np.median(times[1:]), min(times[1:])
        rate = flops * images / median[name] / 1e12
        print(f"{name:20}  {config.steps / median[name]:15.2f} {config.steps / best:6.2f} "
              f"{images / median[name]:18.1f} {images / best:6.1f} {rate:9.3f}"
              + f", {rate / config.peak_tflops:.1%} of the bound" * (device.type == "cuda"))
    print(f"ours / peer: {median['peer'] / median['ours']:.2f}; the data's share of our step: "
          f"{1 - median['ours, images ready'] / median['ours']:.1%}")


def main(config):
    transformers.utils.logging.disable_progress_bar()
    device, dtype = pick_device(config.device, config.dtype)
    autocast = autocast_to(device, dtype)
    shard = Shard(Path(config.shards_dir) / config.data / "train")
    if not shard.manifest["classes"]:
        raise UserError(f"--data: {config.data} has no labelled images")
    split, _ = read_split(shard)
    split.read_pixels()
    multi_label = bool((split.labels.sum(1) != 1).any())
    settings = train_cls.Config(epochs=config.rounds + 1, batch_size=config.batch_size)
    workers = config.workers or os.cpu_count()
    torch.manual_seed(0)
    ours = Classifier(ViT(CONFIGS[config.model][0]), split.labels.shape[1], multi_label).to(device)
    peer = Peer(ours).to(device)
    size = ours.encoder.config.image_size
    images = config.steps * config.batch_size
    numbers = np.resize(np.random.default_rng(0).permutation(len(split.names)), images)
    with tempfile.TemporaryDirectory() as folder:
        paths = np.array(write_files(split, config, Path(folder)))
        few = numbers[:config.batch_size]
        plain = ImageFiles(paths[few], split.labels[few], size, augmented=False)
        require_equal(ours, peer, split.take(few), plain, multi_label, device)
        split = split.take(numbers)
        files = ImageFiles(paths[numbers], split.labels, size, augmented=True)
        # Workers that live on: without persistent_workers each epoch would have to start them anew.
        loader = DataLoader(files, config.batch_size, shuffle=True, num_workers=workers,
                            persistent_workers=True, pin_memory=device.type == "cuda")
        optimizer = make_optimizer(ours.rates(settings.layer_decay), settings.weight_decay)
        usual = torch.optim.AdamW(peer.parameters(), lr=settings.learning_rate, weight_decay=0.01)
        ready = [(normalise(torch.from_numpy(split.pixels[:config.batch_size]).to(device)).contiguous(),
                  torch.from_numpy(split.labels[:config.batch_size]).to(device))] * config.steps
        how = multi_label, device, autocast
        epochs = {
            "ours": lambda number: train_cls.train_epoch(ours, optimizer, split, number, settings, autocast),
            "ours, images ready": lambda number: train_steps(ours, optimizer, ready, *how),
            "peer": lambda number: train_steps(peer, usual, loader, *how)}
        seconds = defaultdict(list)
        progress = Progress((config.rounds + 1) * len(epochs), "epochs")
        tell(f"{len(epochs)} ways x {config.rounds} rounds of {config.steps} steps, and a first one to warm up")
        for number in range(config.rounds + 1):
            for name, epoch in epochs.items():
                start = time.perf_counter()
                epoch(number)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - start)
                progress.row(f"{name}, {seconds[name][-1]:.2f} s")
    print(f"{config.data}, {config.model} ViT on {device} in {str(dtype)[6:]}: {config.rounds} rounds "
          f"of {config.steps} steps of {config.batch_size} images; {workers} workers; load "
          f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print_rates(seconds, flops_an_image(ours.encoder), config, device)


if __name__ == "__main__":
    run(main, parse_command_line(Config))
