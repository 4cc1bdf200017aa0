"""
Load a large model of random values in the exact layout of a published one, ask it about an image, and take one
step of LoRA: what that takes in seconds and memory, without the download.

    python extras/bench/load_large.py --tokenizer=weights/medmo_4b/tokenizer.json      a Qwen3-VL-4B
    python extras/bench/load_large.py --model=llama_7b --base_bits=0 --dtype=bfloat16  PMC-LLaMA and BiomedCLIP
    python extras/bench/load_large.py --model=gpt_oss_20b --layers=4 --base_bits=4 --tokenizer=path/to/tokenizer.json
    python extras/bench/load_large.py --model=gpt_oss_20b --base_bits=4 --short=true --tokenizer=...      all 24 layers

The files (8.9 GB of the 4B, in two; of LLaMA 13.5 GB in three, and 0.3 GB; of gpt-oss 13.8 GB in three, and 1.2 GB)
are written once and may be deleted afterwards. With a gpt-oss comes CLIP's ViT-L/14 of 336 pixels, which sees an image
of 1024 x 768 pixels as twelve tiles and all of it once more: 13 times 144 tokens, by InternVL's projector. The answer
is noise, the cost is real. Each number of --base_bits is measured in a process of its own: it loads the model, all of
it frozen, answers, and takes a step of train_vlm.py's, of LoRA alone.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import contextlib
import multiprocessing
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import torch

from data import Group, Record, Step, make_batch
from extras.bench.memory import CLIP, MEDGPT, TILES, allocated, print_heads, print_row, train_vlm
from extras.bench.progress import tell
from extras.bench.published import write_folder
from generate import Sampling, finished_groups, generate
from model import ViT, ViTConfig
from plumbing.devices import autocast_to, describe_machine
from plumbing.files import find_tokenizer
from plumbing.flags import Range, UserError, Whole, parse_command_line, run
from plumbing.shards import Sample
from plumbing.sources import settle
from plumbing.tensors import write_hashes
from run import make_optimizer
from weights import save_module
from zoo.chatml import open_tokenizer

DEVICE = torch.device("cpu")
QUESTION, ANSWER = "what does the image show?", "a fracture of the left clavicle"
TOWERS = {"llama_7b": ViTConfig(), "gpt_oss_20b": CLIP}  # BiomedCLIP's, CLIP's
Sizes = Literal["qwen3_vl_2b", "qwen3_vl_4b", "qwen3_vl_8b", "qwen_sample", "llama_7b", "gpt_oss_20b"]


@dataclass(frozen=True)
class Config:
    model: Sizes = "qwen3_vl_4b"  # sizes
    layers: Whole = 0  # of a gpt-oss, the first ones alone; 0: all
    folder: str = ""  # where the files are written; none: weights/random_<model>
    tokenizer: str = "weights/llama_tokenizer/tokenizer.model"  # of the others a tokenizer.json; it is copied
    base_bits: str = "16,4"  # of the frozen base's matrices; 0: as --dtype
    dtype: Literal["float32", "bfloat16"] = "float32"  # that is computed in; on many CPUs bfloat16 is far slower
    image_size: Annotated[int, Range(32, 4096)] = 448  # pixels of a Qwen3-VL's image; the ViT's has 224
    new_tokens: Annotated[int, Range(1, 2048)] = 2  # to answer with
    short: bool = False  # answer a question without an image, and take no step


def write_all(name, folder, tokenizer, layers):
    """The folder of a model, with its tokenizer and its tensors' hashes; but of a Qwen3-VL with a tower beside it."""
    torch.manual_seed(0)
    write_folder(name, folder, layers=layers)
    shutil.copy(tokenizer, folder)
    if name in TOWERS:
        (folder / "vision").mkdir(exist_ok=True)  # where no config.json of a language model lies beside it
        save_module(ViT(TOWERS[name]), folder / "vision/tower.safetensors")
    write_hashes(folder)


# ----------------------------------------------------------------------------- measured in a process of its own

def new_peak():
    """Begin to measure the most memory that this process holds anew. Linux alone can."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(config, folder, bits):
    """What loading, an answer and a step of LoRA take: seconds, and bytes that are held, and were at most."""
    flags = {"model": str(folder)} if config.model not in TOWERS else {
        "vision_weights": str(folder / "vision/tower.safetensors"), "language_weights": str(folder)}
    flags |= MEDGPT if config.model == "gpt_oss_20b" else {}
    image = {"size": CLIP.image_size, "resize": "tiles:12" if config.model == "gpt_oss_20b" else "squash"}
    flags = settle(train_vlm.Config(base_bits=bits, compile=False, dtype=config.dtype, vision="frozen",
                                    projector="frozen", language="frozen", **flags))
    dtype, tokenizer, before = getattr(torch, config.dtype), open_tokenizer(folder), allocated()
    begin = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        model = train_vlm.load_parts(flags, tokenizer, image, None, DEVICE, dtype)
    facts = {"parts": parts_of(model), "loading": time.perf_counter() - begin, "resident": allocated() - before,
             "loading_peak": allocated(peak=True),
             "files": sum(path.stat().st_size for path in folder.rglob("*.safetensors"))}
    tell(f"loaded {sum(facts['parts'].values()) / 1e9:.2f} GB, {facts['loading']:.0f} s")
    for name, act in [("answering", answer), ("stepping", step)][:1 if config.short else 2]:
        new_peak()
        begin = time.perf_counter()
        tell(f"{name}: {act(config, flags, model, tokenizer, autocast_to(DEVICE, dtype))}")
        facts |= {name: time.perf_counter() - begin, f"{name}_peak": allocated(peak=True)}
    return facts


def parts_of(model):
    """Bytes of a VLM's tensors, {part: bytes}, the embedding and the head apart."""
    text = model.language
    ends = [child for name, child in text.named_modules() if name.endswith(("embed_tokens", "lm_head"))]
    parts = {"vision": [model.vision], "projector": [model.projector], "blocks": [text.blocks],
             "embedding and head": ends}
    return {part: sum(tensor.nbytes for module in modules for tensor in (*module.parameters(), *module.buffers())
                      if not tensor.is_meta) for part, modules in parts.items()}


def example(config, model, tokenizer):
    """An image, and the tokens of a question about it with its answer: (H, W, 3) uint8, a list, its spans."""
    sides = {"llama_7b": (224, 224), "gpt_oss_20b": TILES}.get(config.model, 2 * (config.image_size,))
    image = np.random.default_rng(0).integers(0, 256, (*sides, 3), np.uint8)
    return image, *tokenizer.write(Record("", QUESTION, ANSWER, image=None if config.short else b""))[:2]


def answer(config, flags, model, tokenizer, autocast):
    """Answer a question about an image; gives the answer."""
    image, tokens, spans = example(config, model.eval(), tokenizer)
    choice = Sampling(stops=(), vocab_size=tokenizer.vocab_size)
    passes = generate(model, [([image] * (not config.short), [tokens[:spans[0][0]]])], config.new_tokens, choice)
    with autocast:
        [(_, [reply])] = finished_groups(passes)
    return repr(tokenizer.decode(reply.tokens))


def step(config, flags, model, tokenizer, autocast):
    """Take a step of train_vlm.py's on one sample; gives loss and gradient."""
    flags = replace(flags, language="lora")
    with contextlib.redirect_stdout(sys.stderr):
        train_vlm.make_trainable(model.train(), flags, None)
    optimizer = make_optimizer(train_vlm.trained_parameters(model, flags), flags.weight_decay, flags.beta2)
    image, tokens, spans = example(config, model, tokenizer)
    count = np.array([model.vision.tokens(*image.shape[:2])])
    batch = make_batch([Group([Sample(np.array(tokens), np.array(spans), 2)], 0, 0, count, lambda number: image)])
    loss, norm = train_vlm.train_step(model, optimizer, Step(0, [batch], len(batch.targets)), flags.learning_rate,
                                      flags, autocast)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{len(batch.tokens)} tokens, {trained:,} parameters of LoRA, loss {loss:.3f}, gradient {norm:.3g}"


def apart(function, *given):
    """A function's result, from a process of its own, whose memory is nobody else's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *given).result()


# ----------------------------------------------------------------------------- the table

def main(config):
    folder = Path(config.folder or f"weights/random_{config.model}")
    bits = [int(number) for number in config.base_bits.split(",") if number in ("0", "16", "8", "4")]
    if len(bits) != config.base_bits.count(",") + 1:
        raise UserError(f"--base_bits={config.base_bits}: of 0, 16, 8 and 4, with commas between them")
    if not (folder / "tensors.json").is_file():  # it is the last to be written
        tell(f"writing {folder}")
        apart(write_all, config.model, folder, open_tokenizer(config.tokenizer).path, config.layers)
    if find_tokenizer(folder).suffix != {"llama_7b": ".model"}.get(config.model, ".json"):
        raise UserError(f"{folder}: has another model's tokenizer; delete it, and name --tokenizer")
    print(", ".join(f"{name} {fact}" for name, fact in describe_machine(DEVICE).items() if name != "python"), "\n")
    results = {}
    for number in bits:
        tell(f"base in {number} bits")
        results[number] = apart(measure, config, folder, number)
    show(results)


def show(results):
    """Print what was measured, {bits: facts}: GB, seconds, and shares of the first column."""
    first, totals = next(iter(results)), {bits: sum(facts["parts"].values()) for bits, facts in results.items()}
    rows = {f"{part}, GB": [facts["parts"][part] / 1e9 for facts in results.values()]
            for part in results[first]["parts"]}
    rows["all weights, GB"] = [total / 1e9 for total in totals.values()]
    rows["their share of the first column's"] = [total / totals[first] for total in totals.values()]
    for name, words in (("resident", "resident once loaded, less what it was before"),
                        ("loading_peak", "peak of loading, with Python and torch"),
                        ("answering_peak", "peak of answering"), ("stepping_peak", "peak of a step of LoRA")):
        rows |= {f"{words}, GB": [facts[name] / 1e9 for facts in results.values()]} if name in results[first] else {}
    rows["resident, share of the first column's"] = [
        facts["resident"] / results[first]["resident"] for facts in results.values()]
    rows["all files, GB"] = [facts["files"] / 1e9 for facts in results.values()]
    rows["peak of loading over the files"] = [facts["loading_peak"] / facts["files"] for facts in results.values()]
    rows["peak of loading over the weights"] = [
        facts["loading_peak"] / totals[bits] for bits, facts in results.items()]
    for name in ("loading", "answering", "stepping"):
        rows |= {f"{name}, s": [facts[name] for facts in results.values()]} if name in results[first] else {}
    print_heads("base", *(f"{bits} bits" for bits in results))
    for words, numbers in rows.items():
        print_row(words, *(f"{number:.{0 if words.endswith(', s') else 3}f}" for number in numbers))


if __name__ == "__main__":
    run(main, parse_command_line(Config))
