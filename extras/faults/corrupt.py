"""
Spoil what is prepared, saved or loaded, one place at a time, and see whether it is used.

    python extras/faults/corrupt.py --flips=4000

A small dataset, checkpoint, adapter and weights are written as prepare/ and train_vlm.py write them.
Then bits are flipped, files are cut, lengthened, zeroed in part, removed, copied over one another and
exchanged, and mixed with those of an older version. What uses them has then to refuse, by a UserError
or by falling back to the older checkpoint, or to give exactly what it gave before; one in ten is asked
again and has to do the same again.

What nothing could tell is counted apart. Prepared weights have the hash of each tensor in the file, so that
a whole file of an older version in the place of one is all that is not told. An adapter that lies alone has
none: PEFT's format knows none, and a second entry beside its "format" would come in any order, so that
the same adapter had not the same bytes. Of it, as of others' weights, the structure is verified (every
tensor is there, of its shape, of numbers that are weights, and no other); its numbers are not.

It found, with the flags above:   found  harmless  not told  MISSED
    dataset, 17 files            38,485         8         0       0
    checkpoint, 12 files         42,640         3         0       0
    adapter, 2 files              4,686     1,126     1,935       0
    weights, 5 files             17,049     1,915         2       0
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import contextlib
import functools
import io
import itertools
import json
import random
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Callable

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from data import Mixture, Record, Tokenizer
from extras.bench.progress import Progress
from lora import add_lora, lora_layers
from model import VLM, LLaMA, LlamaConfig, ViT, ViTConfig, init_weights
from plumbing.claims import read_adapter_config
from plumbing.files import checkpoints, newest_checkpoint, seal
from plumbing.flags import UserError, parse_command_line, run
from plumbing.leaks import read_leaked_images
from plumbing.shards import PROMPT_VERSION, SHARD_VERSION, Shard
from plumbing.sources import open_shards
from prepare.all import print_table
from prepare.datasets import Dataset
from prepare.leaks import Split, guard
from prepare.questions import train_sample_tokenizer
from prepare.shards import write_dataset
from prepare.weights import Weights, write_llama, write_tensors
from weights import load_encoder, load_llama, save_vlm
from zoo.adapters import load_adapter, save_adapter

OUTCOMES = ("found", "harmless", "not told", "MISSED")  # what may be said of a damage
VIT = ViTConfig(image_size=16, patch_size=8, width=64, depth=1)
LLAMA = LlamaConfig(64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                    num_attention_heads=2, num_key_value_heads=2)
LORA = {"targets": "q_proj,v_proj", "r": 2, "alpha": 4.0, "dropout": 0.0}


@dataclass(frozen=True)
class Config:
    kinds: str = "dataset,checkpoint,adapter,weights"  # what to spoil
    flips: int = 4000  # bits to flip in each file, drawn; all of a file that has fewer
    places: int = 200  # where each file is cut, or zeroed for 512 bytes, and others in its stead, drawn
    mixes: int = 1000  # with an older version, drawn; all where there are fewer
    seed: int = 0  # of what is drawn


@dataclass
class Target:
    """What is spoiled: files in a folder, an older version of them, and what uses them."""
    folder: Path
    older: Path
    use: Callable  # -> a value that is equal as long as the same is used; UserError: nothing is
    sealed: bool = True  # whether a manifest vouches for every byte


# ----------------------------------------------------------------------------- what is spoiled

def write_toy(shards_dir, seed, tokenizer):
    """A dataset of two splits that share an image, compared with one another."""
    def picture(number):
        stream = io.BytesIO()
        pixels = np.random.default_rng([seed, number]).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(stream, "PNG")
        return stream.getvalue()

    records = [(split, Record(f"{split} {number}", f"is it {seed + number}?", answer, picture(image)))
               for split, first in (("train", 0), ("test", 2))
               for number, (answer, image) in enumerate([
                   ("yes", first), ("no", first), ("a lung", first + 1), ("it is", first + 2)])]
    toy = Dataset(name="toy", read=lambda raw: iter(records), kind="image questions", licence="none",
                  access="open", megabytes=0, page="", layouts=(), counts={"train": 4, "test": 4})
    facts = {"dataset": "toy", "shard_version": SHARD_VERSION, "prompt_version": PROMPT_VERSION,
             "limit": 0, "licence": "none",
             "image": {"size": 8, "resize": "squash", "codec": "png", "quality": 0}}
    with contextlib.redirect_stderr(io.StringIO()):
        write_dataset(shards_dir / "toy", toy, shards_dir, {}, tokenizer, facts, 1)
    guard(shards_dir, "")


def use_dataset(shards_dir):
    """All that training, the leak guard and an evaluation read of it."""
    mixture = Mixture(**open_shards("toy", shards_dir, "train"), count_tokens=lambda heights, widths: 0 * heights + 1)
    tokenizer = Tokenizer(shards_dir / "toy" / "tokenizer.model")
    train, test = mixture.shards[0], Shard(shards_dir / "toy" / "test")
    if tokenizer.sha256 != train.manifest["tokenizer_sha256"]:
        raise UserError("another tokenizer than its shards'")
    return [mixture.leaks[0][1].tolist(), read_leaked_images(train, test).tolist(), tokenizer.sha256, [
        (shard.read_records(), shard.samples.tobytes(), Split(shard.folder).fingerprints.tobytes(),
         [(sample.tokens.tolist(), sample.spans.tolist(), sample.head)
          for sample in map(shard.read_sample, range(len(shard)))],
         [shard.read_image(number).tobytes() for number in range(len(shard.image_index))])
        for shard in (train, test)]]


def spoil_dataset(folder):
    tokenizer = train_sample_tokenizer()
    for name, seed in (("now", 0), ("older", 1)):
        (folder / name).mkdir()
        write_toy(folder / name, seed, tokenizer)
    return [Target(folder / "now" / "toy", folder / "older" / "toy",
                   functools.partial(use_dataset, folder / "now"))]


def spoil_checkpoint(folder):
    """The newest of two checkpoints of a run, and the older one whose files have the same sizes."""
    for step in (1, 2):
        torch.manual_seed(step)
        model = VLM(ViT(VIT), LLaMA(LLAMA))
        for part in ("vision", "language"):
            settings = LORA | {"targets": {"vision": "qkv"}.get(part, LORA["targets"])}
            add_lora(getattr(model, part), **settings)
            model.lora[part] = settings
        model.apply(init_weights)
        partial = folder / f"partial_{step}"
        save_vlm(model, partial)
        moments = {f"{name}:exp_avg": parameter.detach() for name, parameter in model.named_parameters()
                   if ".lora_" in name}
        save_file(moments, partial / "optimizer.safetensors")
        seal(partial, folder / f"step_{step:06d}", step=step)
    newest, older = checkpoints(folder)

    def use():
        with contextlib.redirect_stderr(io.StringIO()):
            chosen = newest_checkpoint(folder)
        if chosen == older:
            raise UserError("the older one")
        return {path.relative_to(chosen).as_posix(): path.read_bytes() if path.name != "manifest.json"
                else json.loads(path.read_text()) for path in chosen.rglob("*") if path.is_file()}

    return [Target(newest, older, use)]


def tensors_of(model):
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def spoil_adapter(folder):
    """An adapter's folder alone, as it may come from somebody else."""
    for name, seed in (("now", 1), ("older", 2)):
        torch.manual_seed(seed)
        model = LLaMA(LLAMA)
        add_lora(model, **LORA)
        save_adapter(model.apply(init_weights), folder / name, "base", **LORA)

    def use():
        with torch.device("meta"):
            model = LLaMA(LLAMA)
            settings = read_adapter_config(folder / "now")
            names = add_lora(model, **settings)
        for layer in lora_layers(model).values():
            layer.to_empty(device="cpu")
        load_adapter(model, folder / "now")
        return settings, names, [tensors_of(layer.eval())["lora_A"] + tensors_of(layer)["lora_B"]
                                 for layer in lora_layers(model).values()]

    return [Target(folder / "now", folder / "older", use, sealed=False)]


def spoil_weights(folder):
    """An image encoder's file and a language model's folder, as prepare/weights.py writes them."""
    known = Weights(name="toy", licence="none", access="open", megabytes=0, page="nowhere", layouts=(),
                    target="", write=write_tensors)
    source = folder / "pytorch_model.bin"
    source.write_bytes(b"")
    for name, seed in (("now", 1), ("older", 2)):
        torch.manual_seed(seed)
        raw, vision = folder / f"raw_{name}", folder / name / "vision"
        raw.mkdir()
        vision.mkdir(parents=True)
        write_tensors(known, source, ViT(VIT).state_dict(), vision / "encoder.safetensors", heads="1",
                      activation="gelu")
        tensors = list(LLaMA(LLAMA).state_dict().items())
        for number in (0, 1):
            torch.save(dict(tensors[number::2]), raw / f"pytorch_model-{number + 1:05}-of-00002.bin")
        (raw / "config.json").write_text(json.dumps(asdict(LLAMA) | {"model_type": "llama", "hidden_act": "silu"}))
        write_llama(known, raw, folder / name / "language")

    def use_vision():
        model = load_encoder(folder / "now" / "vision" / "encoder.safetensors")
        return model.config, tensors_of(model)

    def use_language():
        model = load_llama(folder / "now" / "language")
        return model.config, tensors_of(model)

    return [Target(folder / "now" / name, folder / "older" / name, use, sealed=False)
            for name, use in (("vision", use_vision), ("language", use_language))]


# ----------------------------------------------------------------------------- how it is spoiled

def flipped(content, bit):
    return content[:bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1:]


def harms(files, older, draw, config):
    """Yield (harm, {name: what it holds then, or None for nothing}) of two versions of some files."""
    names = sorted(files)
    for name, content in files.items():
        bits = range(8 * len(content))
        for bit in bits if len(bits) <= config.flips else sorted(draw.sample(bits, config.flips)):
            yield "flipped", {name: flipped(content, bit)}
        lengths = draw.sample(range(len(content)), min(len(content), config.places))
        for length in [0, len(content) - 1, *lengths]:
            yield "cut", {name: content[:length]}
        for more in (b"\0", b"\n", b" ", b"}", bytes(512), content[:64], content):
            yield "lengthened", {name: content + more}
        begins = range(0, len(content), 512)
        for begin in draw.sample(begins, min(len(begins), config.places)):
            size = min(512, len(content) - begin)
            yield "zeroed", {name: content[:begin] + bytes(size) + content[begin + size:]}
        yield "removed", {name: None}
        others = [other for other in names if other != name]
        for other in draw.sample(others, min(len(others), config.places)):
            yield "overwritten", {name: files[other]}
            yield "exchanged", {name: files[other], other: content}
    folders = sorted({name.split("/")[0] for name in names if "/" in name})
    for one, other in itertools.permutations(folders, 2):  # the splits of a dataset, for one
        pairs = [(name, name.replace(f"{one}/", f"{other}/"))
                 for name in names if name.startswith(f"{one}/")]
        there = {name: files[twin] for name, twin in pairs if twin in files}
        yield "overwritten", there
        yield "exchanged", there | {twin: files[name] for name, twin in pairs if twin in files}
    changed = [name for name in names if files[name] != older.get(name)]
    subsets = range(1, 2 ** len(changed) - 1)
    for subset in subsets if len(subsets) <= config.mixes else draw.sample(subsets, config.mixes):
        yield "mixed with older", {name: older.get(name) for number, name in enumerate(changed)
                                   if subset >> number & 1}


def read_files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def put(folder, files):
    for name, content in files.items():
        if content is None:
            (folder / name).unlink(missing_ok=True)
        else:
            (folder / name).write_bytes(content)


def header(content):
    """What a safetensors file says of its tensors, whose metadata come in any order."""
    try:
        return json.loads(content[8:8 + int.from_bytes(content[:8], "little")]) | {"__metadata__": {}}
    except ValueError:
        return None


def cannot_be_told(files, spoiled):
    """Whether without a manifest nothing is wrong here: numbers alone differ, or a JSON's values."""
    return all(name.endswith(".json") or content and header(content) == header(files[name])
               for name, content in spoiled.items())


def outcome(target, right, files, spoiled, times):
    """Which of OUTCOMES a damage has, and what was raised where that was no UserError."""
    seen, reason = [], ""
    for _ in range(times):
        try:
            seen.append("harmless" if target.use() == right else "other")
        except UserError:
            seen.append("found")
        except Exception as error:
            seen.append("raised")
            reason = f"{type(error).__name__}: {error!s:.60}"
    if len(set(seen)) == 1 and seen[0] in ("found", "harmless"):
        return seen[0], ""
    if set(seen) == {"other"} and not target.sealed and cannot_be_told(files, spoiled):
        return "not told", ""
    return "MISSED", reason or " then ".join(seen)


def show(tally):
    """Print a kind's tally by file, then by harm."""
    for column, place in (("file", 1), ("harm", 2)):
        counts = Counter()
        for key, count in tally.items():
            counts[key[place], key[3]] += count
        rows = [[name, *(f"{counts[name, result]:,}" for result in OUTCOMES)]
                for name in dict.fromkeys(name for name, _ in counts)]
        print_table([[f"{next(iter(tally))[0]}: {column}", *OUTCOMES], *rows])
        print(flush=True)


def main(config):
    draw, tally, missed, begin = random.Random(config.seed), Counter(), {}, time.perf_counter()
    progress = Progress(0, "damages", pause=10)
    makers = {name.removeprefix("spoil_"): make for name, make in globals().items()
              if name.startswith("spoil_")}
    for kind in config.kinds.split(","):
        if kind not in makers:
            raise UserError(f"--kinds: {kind} is none of {', '.join(makers)}")
        with tempfile.TemporaryDirectory() as folder:
            for target in makers[kind](Path(folder)):
                files, older, right = read_files(target.folder), read_files(target.older), target.use()
                for harm, spoiled in harms(files, older, draw, config):
                    if all(files.get(name) == content for name, content in spoiled.items()):
                        continue
                    put(target.folder, spoiled)
                    times = 2 if tally.total() % 10 == 0 else 1
                    result, reason = outcome(target, right, files, spoiled, times)
                    put(target.folder, dict.fromkeys(spoiled) | {
                        name: files[name] for name in spoiled if name in files})
                    name = next(iter(spoiled)) if len(spoiled) == 1 else "several files"
                    tally[kind, name, harm, result] += 1
                    progress.row(f"{kind}, {name}, {harm}")
                    if result == "MISSED":
                        place = kind, name, harm, reason.split(":")[0]
                        missed.setdefault(place, (reason, *sorted(spoiled)[:5]))
                assert target.use() == right, "what was spoiled was not put back"
        show({key: count for key, count in tally.items() if key[0] == kind})
    for (*place, _), example in missed.items():
        print("MISSED:", *place, "such as:", *example)
    total = Counter()
    for key, count in tally.items():
        total[key[3]] += count
    print(f"{sum(total.values()):,} damages in {time.perf_counter() - begin:,.0f} s: "
          + ", ".join(f"{total[result]:,} {result}" for result in OUTCOMES))
    if total["MISSED"]:
        sys.exit(1)


if __name__ == "__main__":
    run(main, parse_command_line(Config))
