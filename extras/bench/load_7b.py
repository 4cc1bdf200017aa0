"""
Load a LLaMA-7B and a ViT-B/16 of random values in the exact layouts of PMC-LLaMA and BiomedCLIP,
and answer one question about an image: what it takes in seconds and memory, without the download.

    python extras/bench/load_7b.py --folder=weights/random_7b --tokenizer=weights/llama_tokenizer/tokenizer.model

The files (13.5 GB in three shards, and 0.3 GB) are written once and may be deleted afterwards. The
answer is noise, the cost is real.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import json
import multiprocessing
import resource
import time
from dataclasses import dataclass
from typing import Annotated

import torch
from safetensors.torch import save_file

from data import BOS, Tokenizer, format_prompt
from generate import finished_groups, generate
from model import LLaMA, LlamaConfig, ViT, ViTConfig
from plumbing.flags import Range, UserError, parse_command_line, run
from weights import build_vlm, hub_config


@dataclass(frozen=True)
class Config:
    folder: str = "weights/random_7b"  # where the synthetic checkpoints are written
    tokenizer: str = "weights/llama_tokenizer/tokenizer.model"  # LLaMA's
    shards: Annotated[int, Range(1, 99)] = 3  # files of the language model
    new_tokens: Annotated[int, Range(1, 2048)] = 8  # tokens to answer with


def write_checkpoints(folder, shards):
    """Random bf16 weights in the hub's layout with PMC-LLaMA's config.json, and BiomedCLIP's tower."""
    (folder / "vision").mkdir(parents=True, exist_ok=True)  # where no config.json of a LLaMA lies beside it
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in LLaMA(LlamaConfig()).state_dict().items()}
        vision = {name: t.shape for name, t in ViT(ViTConfig()).state_dict().items()}
    torch.manual_seed(0)
    names, weight_map = list(shapes), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[shard * len(names) // shards:(shard + 1) * len(names) // shards]
        tensors = {name: torch.ones(shapes[name], dtype=torch.bfloat16) if "norm" in name
                   else torch.empty(shapes[name], dtype=torch.bfloat16).uniform_(-0.035, 0.035)
                   for name in part}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    wrong_ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}  # as PMC-LLaMA's own file
    (folder / "config.json").write_text(json.dumps(
        {**hub_config(LlamaConfig()), **wrong_ids}, indent=2))
    tower = {f"visual.trunk.{name}": 0.02 * torch.randn(shape) for name, shape in vision.items()}
    save_file(tower, folder / "vision/biomedclip.safetensors")


def peak_gigabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main(config):
    folder, tokenizer = Path(config.folder), Tokenizer(config.tokenizer)
    if not (folder / "vision/biomedclip.safetensors").is_file():  # it is the last to be written
        # In a process of its own: its memory must not count into the peak below.
        writer = multiprocessing.get_context("spawn").Process(
            target=write_checkpoints, args=(folder, config.shards))
        writer.start()
        writer.join()
        if writer.exitcode:
            raise UserError(f"{folder}: not written, see above; 14 GB have to be free there")
    begin = time.perf_counter()
    model = build_vlm("paper", tokenizer.vocab_size, folder / "vision/biomedclip.safetensors", folder,
                      dtype=torch.bfloat16).eval()
    seconds = time.perf_counter() - begin
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    print(f"loaded {weights:.2f} GB of weights in {seconds:.1f} s; peak memory {peak_gigabytes():.2f} GB, "
          f"Python and torch included: {peak_gigabytes() / weights:.3f}x the weights")
    prompt = [BOS, -1, *tokenizer.encode(format_prompt("what does the image show?"))]
    image = torch.randint(0, 256, (224, 224, 3), dtype=torch.uint8).numpy()
    begin = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        [(_, [reply])] = finished_groups(generate(model, [([image], [prompt])], config.new_tokens))
    print(f"answered {len(reply.tokens)} tokens in {time.perf_counter() - begin:.1f} s: "
          f"{tokenizer.decode(reply.tokens)!r}; peak memory {peak_gigabytes():.2f} GB")


if __name__ == "__main__":
    run(main, parse_command_line(Config))
