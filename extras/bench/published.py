"""
Folders in the exact layout of published models, with random values in them or with none, for benchmarks: what a
model takes in time and memory does not depend on its numbers.
"""

import json
import math
import struct

import torch

from model import LLaMA, LlamaConfig
from zoo.llama_files import hub_config
from zoo.qwen3_files import CONFIGS, PARTS, write_config
from zoo.qwen3_vl import TextConfig, VisionConfig

LARGEST = 5e9  # bytes of a file: a larger model is in several
WORDS = 151936  # rows of the embedding


def qwen(width, hidden, layers, heads, tied=True):
    """The sizes of a Qwen3-VL; that of which the embedding is not tied, the 8B, has a larger tower than others."""
    tower = VisionConfig() if not tied else VisionConfig(24, 1024, 4096, 16, out_hidden_size=width,
                                                         deepstack_visual_indexes=(5, 11, 17))
    return tower, TextConfig(WORDS, width, hidden, layers, heads, 8, head_dim=128, rope_theta=5e6,
                             tie_word_embeddings=tied)


QWEN = {"qwen3_vl_2b": qwen(2048, 6144, 28, 16), "qwen3_vl_4b": qwen(2560, 9728, 36, 32),
        "qwen3_vl_8b": qwen(4096, 12288, 36, 32, tied=False), **CONFIGS}  # name -> sizes of tower and text


def write_folder(name, folder, values=True):
    """
    Write a hub folder of QWEN's sizes, or of LLaMA-7B's, in bfloat16, as many files as their sizes ask for: random
    values, and norms of one. values: else the files have holes in their place, which take no room on a disk.
    Gives the folder's path back, as text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {}
    with torch.device("meta"):
        if name in QWEN:
            vision, text = QWEN[name]
            configs = {"vision": vision, "projector": vision, "language": text}
            for part, (kind, prefix, _) in PARTS.items():
                shapes |= {prefix + key: tensor.shape for key, tensor in kind(configs[part]).state_dict().items()}
        else:
            shapes = {key: tensor.shape for key, tensor in LLaMA(LlamaConfig()).state_dict().items()}
    files, size = [{}], 0
    for key, shape in shapes.items():
        size += 2 * math.prod(shape)
        if size > LARGEST:
            files.append({})
            size = 2 * math.prod(shape)
        files[-1][key] = shape
    names = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    for file, tensors in zip(names, files):
        write_file(folder / file, tensors, values)
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {key: file for file, tensors in zip(names, files) for key in tensors}}))
    if name in QWEN:  # last, since with it a folder is a model's
        write_config(folder, vision, text)
    else:
        wrong_ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}  # as in PMC-LLaMA's own file
        (folder / "config.json").write_text(json.dumps({**hub_config(LlamaConfig()), **wrong_ids}, indent=2))
    return str(folder)


def write_file(path, shapes, values):
    """A safetensors file of bfloat16 tensors, written one by one: never two of them are in memory."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items() if values else ():
            tensor = (torch.ones(shape) if "norm" in name and name.endswith("weight")
                      else torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.035, 0.035))
            file.write(tensor.bfloat16().reshape(-1).view(torch.uint8).numpy())
        file.truncate(8 + len(text) + end)
