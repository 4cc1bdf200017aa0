"""
Folders in the exact layout of published models, with random values in them or with none, for benchmarks: what a
model takes in time and memory does not depend on its numbers.
"""

import json
import math
import struct

import torch

from model import LLaMA, LlamaConfig
from zoo import gpt_oss_files
from zoo.gpt_oss import GptOss, GptOssConfig
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
# What else config.json of openai/gpt-oss-20b says
GPT_OSS = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": [
    "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]}, "eos_token_id": 200002,
    "pad_token_id": 199999, "initial_context_length": 4096, "attention_dropout": 0.0, "initializer_range": 0.02,
    "experts_per_token": 4, "router_aux_loss_coef": 0.9, "output_router_logits": False, "use_cache": True}


def gpt_oss_shapes(config):
    """{name: shape} of the tensors of a gpt-oss on the hub, whose experts' matrices are in MXFP4."""
    shapes = {name: tensor.shape for name, tensor in GptOss(config).state_dict().items() if ".experts." not in name}
    return shapes | {f"model.layers.{layer}.mlp.experts.{name}": shape for layer in range(config.num_hidden_layers)
                     for name, shape in gpt_oss_files.expert_shapes(config, packed=True).items()}


def write_folder(name, folder, values=True, layers=0):
    """
    Write a hub folder of QWEN's sizes, of gpt-oss-20b's, or of LLaMA-7B's, as many files as their sizes ask for:
    random values, and norms of one. values: else the files have holes in their place, which take no room on a disk.
    layers: of a gpt-oss, the first ones alone; 0: all. Gives the folder's path back, as text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shapes, first = {}, 1
    with torch.device("meta"):
        if name == "gpt_oss_20b":
            config, first = GptOssConfig(num_hidden_layers=layers or 24), 0  # its files count from 0 to "of" so many
            shapes = gpt_oss_shapes(config)
        elif name in QWEN:
            vision, text = QWEN[name]
            configs = {"vision": vision, "projector": vision, "language": text}
            for part, (kind, prefix, _) in PARTS.items():
                shapes |= {prefix + key: tensor.shape for key, tensor in kind(configs[part]).state_dict().items()}
        else:
            shapes = {key: tensor.shape for key, tensor in LLaMA(LlamaConfig()).state_dict().items()}
    files, size = [{}], 0
    for key, shape in shapes.items():
        size += length(key, shape)
        if size > LARGEST:
            files.append({})
            size = length(key, shape)
        files[-1][key] = shape
    last = first + len(files) - 1
    names = [f"model-{number:05}-of-{last:05}.safetensors" for number in range(first, last + 1)]
    for file, tensors in zip(names, files):
        write_file(folder / file, tensors, values)
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {key: file for file, tensors in zip(names, files) for key in tensors}}))
    if name == "gpt_oss_20b":  # last, since with it a folder is a model's
        (folder / "config.json").write_text(json.dumps(gpt_oss_files.hub_config(config) | GPT_OSS, indent=2))
    elif name in QWEN:
        write_config(folder, vision, text)
    else:
        wrong_ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}  # as in PMC-LLaMA's own file
        (folder / "config.json").write_text(json.dumps({**hub_config(LlamaConfig()), **wrong_ids}, indent=2))
    return str(folder)


def coded(name):
    """Whether a tensor holds bytes, of MXFP4; all others are in bfloat16."""
    return name.endswith(("_blocks", "_scales"))


def length(name, shape):
    """Bytes of a tensor."""
    return math.prod(shape) * (1 if coded(name) else 2)


def random_values(name, shape):
    """Random values for a tensor of a name; scales of MXFP4 as large as OpenAI's are."""
    if coded(name):
        least, most = (118, 124) if name.endswith("_scales") else (0, 255)
        return torch.randint(least, most + 1, shape, dtype=torch.uint8)
    if "norm" in name and name.endswith("weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)


def write_file(path, shapes, values):
    """A safetensors file, its tensors written one by one: never two of them are in memory."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + length(name, shape)
        header[name] = {"dtype": "U8" if coded(name) else "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items() if values else ():
            file.write(random_values(name, shape).reshape(-1).view(torch.uint8).numpy())
        file.truncate(8 + len(text) + end)
