"""Models of random weights for the benchmarks, each made where it is to be: in seconds on a GPU, whatever its size."""

from dataclasses import replace

import torch

from extras.bench import published
from model import VLM, ViT, ViTConfig
from quantize import LowLinear, store_low
from weights import build_vlm
from zoo.gpt_oss import GptOss, GptOssConfig
from zoo.gpt_oss_files import MATRICES
from zoo.mxfp4 import BLOCK, MXLinear
from zoo.projectors import make_projector
from zoo.qwen3_vl import Mergers, Text, TextConfig, Vision, VisionConfig

QWEN = {  # name -> sizes that the benchmarks have besides those of model.CONFIGS, with a head of their own or tied
    "qwen_40m": (VisionConfig(6, 256, 1024, 4, num_position_embeddings=196, out_hidden_size=384,
                              deepstack_visual_indexes=(1, 2, 3), min_pixels=1024),
                 TextConfig(32000, 384, 1152, 8, 6, 3, head_dim=64, rope_theta=5e6, mrope_section=(12, 10, 10),
                            tie_word_embeddings=True))}
PUBLISHED = {name: sizes for name, sizes in published.QWEN.items() if name.startswith("qwen3_vl")}
MEDGPT = {  # name -> sizes of a tower that sees tiles, and of a gpt-oss, whose experts are in MXFP4
    "medgpt": (ViTConfig(336, 14, 1024, 24, clip=True, merge=2, layer="-1", tiled=True), GptOssConfig()),
    "medgpt_sample": (ViTConfig(32, 8, 64, 2, clip=True, merge=2, layer="-1", tiled=True),
                      GptOssConfig(512, 128, 128, 4, 4, 2, 32, num_local_experts=8))}


def build(name, vocab_size, dtype, device, bits=0):
    """
    A VLM of random weights, made on its device: of QWEN, PUBLISHED or MEDGPT, or of what weights.build_vlm knows by a
    name. bits: of the matrices in its blocks, see quantize.py; 0: all are of dtype, but for experts in MXFP4. Published
    sizes have a vocabulary of their own.
    """
    torch.manual_seed(0)
    with torch.device("meta"):
        if name in MEDGPT:
            tower, text = MEDGPT[name]
            vision, language = ViT(tower), GptOss(text).to(dtype)
            for expert in (expert for block in language.blocks for expert in block.mlp.experts):
                for matrix in MATRICES:
                    setattr(expert, matrix, MXLinear(getattr(expert, matrix)))
            model = VLM(vision, language, make_projector("mlp1", vision.output_width, text.hidden_size))
        elif name in QWEN or name in PUBLISHED:
            tower, text = (QWEN | PUBLISHED)[name]
            text = replace(text, vocab_size=vocab_size) if name in QWEN else text
            model = VLM(Vision(tower), Text(text), Mergers(tower)).to(dtype)
        else:
            model = build_vlm(name, vocab_size, dtype=dtype, device="meta")
        for part in (model.vision, model.language) if bits else ():
            store_low(part.blocks, bits)
    return fill(model, device)


@torch.no_grad()
def fill(model, device):
    """A model of the meta device with random weights on another one, where each of them is made."""
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not parameter.is_meta:
            parameter.normal_(std=0.02)
        elif not parameter.is_meta:  # of norms 1, biases and sinks 0
            parameter.fill_(name.endswith("weight"))
    for layer in (module for module in model.modules() if isinstance(module, LowLinear)):
        rows, columns = layer.weight.shape
        if isinstance(layer, MXLinear):
            codes = {"dtype": torch.uint8, "device": device}
            layer.hold(torch.randint(0, 256, (rows, columns // BLOCK, BLOCK // 2), **codes),
                       torch.randint(118, 122, (rows, columns // BLOCK), **codes))
        else:
            layer.store(torch.empty(rows, columns, dtype=torch.bfloat16, device=device).normal_(std=0.02))
    return model
