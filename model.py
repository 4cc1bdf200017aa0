"""
The model: a vision transformer, one linear projection and a LLaMA, written out in full.

    image (224, 224, 3) -> ViT -> 197 tokens of 768 -> Linear -> 197 tokens of 4096 --.
                                                                                      v
    <bos> image ... image | prompt answer   -> embeddings, image tokens spliced in -> LLaMA -> loss

Two more image encoders have BiomedCLIP's ViT compared with them, as classifiers: PubMedCLIP's, the
same ViT with the few differences of CLIP's own, and PMC-CLIP's, a ResNet-50.

Each part's parameters carry the names of the checkpoint that it is initialised from: timm's for the
ViT (BiomedCLIP's visual.trunk.*), OpenAI CLIP's for the ResNet, the Hugging Face hub's for LLaMA
(PMC-LLaMA). Loading is therefore a plain copy, and what we save is read by those libraries.

Letters: R rows, T tokens in a row, C width, nh heads, nkv key-value heads, hs head size,
I images, H, W their height and width, N tokens of an image (class token + patches), P patch size,
V vocabulary, M supervised positions, B prompts, S slots of the key-value cache.
The paper's sizes: ViT-B/16 C=768 nh=12 N=197; LLaMA-7B C=4096 nh=nkv=32 hs=128 V=32000.
The others': ViT-B/32 C=768 nh=12 N=50; ResNet-50 C=2048 nh=32 N=50, its outputs of width 768.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from data import BOS, EOS, read_settings
from lora import add_lora, load_adapter, lora_layers, save_adapter, token_keys
from plumbing.claims import lfs_pointer, llama_refusal, vit_facts, vit_problem
from plumbing.files import find_run, hash_file, hash_json, sort_metadata
from plumbing.flags import UserError
from plumbing.devices import describe_machine, join_group, pick_device  # noqa: F401, for who asks here

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


HAS_TRITON = find_spec("triton") is not None  # which torch.compile needs on a GPU
# Compiled when they are first called, on a GPU alone, for rows of any length. Elsewhere nothing calls them, and
# the compiler, whose import takes longer than torch's own, stays out
compiled_flex_attention, compiled_create_block_mask = (
    torch.compile(function, dynamic=True) if HAS_TRITON else function
    for function in (flex_attention, create_block_mask))


# ----------------------------------------------------------------------------- matrix products

class Linear(nn.Linear):
    """
    nn.Linear, on a CPU with AVX-512 by way of a convolution of one pixel. oneDNN computes that with
    these instructions; F.linear leaves its product to MKL, which on AMD's CPUs does without them and
    takes twice as long.
    """

    def forward(self, x):
        T = x.numel() // x.shape[-1]
        if (x.device.type != "cpu" or T < 128 or torch.get_num_threads() == 1
                or torch.backends.cpu.get_cpu_capability() != "AVX512"):
            return super().forward(x)
        pixels = x.reshape(1, T, 1, x.shape[-1]).permute(0, 3, 1, 2)  # (1, C, T, 1), channels last
        y = F.conv2d(pixels, self.weight[:, :, None, None], self.bias)
        return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


# ----------------------------------------------------------------------------- vision transformer

@dataclass
class ViTConfig:
    image_size: int = 224  # pixels
    patch_size: int = 16  # pixels
    width: int = 768
    depth: int = 12
    clip: bool = False  # as OpenAI's CLIP has it, and PubMedCLIP from there
    head_size: int = 64  # channels of a head, from Ti to L
    activation: str = ""  # gelu or quick_gelu; none: OpenAI's quick one where clip, else the exact one

    @property
    def tokens(self):
        """Tokens of an image: one per patch and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def eps(self):
        return 1e-5 if self.clip else 1e-6

    @property
    def heads(self):
        return self.width // self.head_size

    @property
    def gelu(self):
        return self.activation or ("quick_gelu" if self.clip else "gelu")


def run_block(block, recomputed, *inputs):
    """A block's output; recomputed: nothing but its inputs is kept for the backward pass."""
    if recomputed and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def compile_blocks(blocks, **settings):
    """
    torch.compile each block, for a GPU: small operations become few kernels. Blocks of a kind share what is
    compiled, once for each kind of input: with gradients and without, one row or image and several, and the
    last block, which goes on with wanted tokens alone. Lengths are no kind of their own (dynamic).
    """
    torch._dynamo.config.recompile_limit = 64  # torch's 8 are fewer than these kinds, and would end it silently
    for block in blocks:
        block.compile(dynamic=True, **settings)


class PatchEmbed(nn.Module):
    def __init__(self, config):
        super().__init__()
        P = config.patch_size
        self.proj = nn.Conv2d(3, config.width, kernel_size=P, stride=P, bias=not config.clip)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)  # (I, 3, H, W) -> (I, N-1, C)


class ViTAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.qkv = Linear(config.width, 3 * config.width)
        self.proj = Linear(config.width, config.width)

    def forward(self, x):
        I, N, C = x.shape
        qkv = self.qkv(x).view(I, N, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (I, nh, N, hs)
        y = F.scaled_dot_product_attention(q, k, v)  # (I, nh, N, hs): every token sees every other
        return self.proj(y.transpose(1, 2).reshape(I, N, C))


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


class ViTMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = Linear(config.width, 4 * config.width)
        self.fc2 = Linear(4 * config.width, config.width)
        # The exact GELU, not its tanh approximation
        self.gelu = quick_gelu if config.gelu == "quick_gelu" else F.gelu

    def forward(self, x):
        return self.fc2(self.gelu(self.fc1(x)))


class ViTBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, config.eps)
        self.attn = ViTAttention(config)
        self.norm2 = nn.LayerNorm(config.width, config.eps)
        self.mlp = ViTMLP(config)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """
    Vision transformer (arXiv 2010.11929) in timm's layout, without a head.

    With config.clip it is CLIP's (arXiv 2103.00020): another norm before the blocks, quick GELU (LAION's
    CLIPs have the plain one), another eps, and no bias where patches are embedded.
    """

    recomputed = 0  # blocks, from the first on, that are run again in the backward pass
    dropout_keys = None  # add_lora's, where it drops anything

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.empty(1, config.tokens, config.width).normal_(std=0.02))
        self.norm_pre = nn.LayerNorm(config.width, config.eps) if config.clip else nn.Identity()
        self.blocks = nn.ModuleList(ViTBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, config.eps)
        self.apply(init_weights)

    def forward(self, images, keys=None):
        """
        (I, 3, H, W) normalised pixels -> (I, N, C) tokens after the final norm, class token first.
        keys: (I, N) int32, by which LoRA drops.
        """
        if self.dropout_keys:
            self.dropout_keys.set(keys)
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (I, N, C)
        x = self.norm_pre(x + self.pos_embed)
        for number, block in enumerate(self.blocks):
            x = run_block(block, number < self.recomputed, x)
        return self.norm(x)  # CLIP norms its class token alone; here patches come to the same scale

    @classmethod
    def from_pretrained(cls, file, dtype=torch.float32, device="cpu"):
        """
        Build and load from a safetensors file: timm's keys as they are, or under BiomedCLIP's
        `visual.trunk.`, whose projection head and text tower are dropped. Sizes are read from the
        shapes, and CLIP's variant is known by norm_pre. Heads and activation are told by the file's own
        metadata or a config beside it; without that, heads of Ti, S, B and L are of 64 channels. Raises
        UserError when they are not known, or what is told is not done here, and when a tensor is missing,
        unknown or of another shape.
        """
        shapes = {key.removeprefix("visual.trunk."): shape for key, shape in tensor_shapes(file).items()}
        try:
            (width, _, P, _), grid = shapes["patch_embed.proj.weight"], shapes["pos_embed"][1] - 1
        except (KeyError, ValueError):
            raise UserError(f"{file}: no ViT in timm's layout (patch_embed.proj.weight, pos_embed); "
                            "docs/interchange.md says which files fit") from None
        depth = len([key for key in shapes if re.fullmatch(r"blocks\.\d+\.norm1\.weight", key)])
        config = ViTConfig(round(grid ** 0.5) * P, P, width, depth, "norm_pre.weight" in shapes)
        facts, problem = vit_facts(file, read_metadata(file))
        if problem := problem or vit_problem(facts, width, depth, config.clip):
            raise UserError(f"{file}: {problem}")
        activation = facts.get("activation", config.gelu)
        config = replace(config, head_size=width // facts.get("heads", width // 64),
                         activation="" if activation == config.gelu else activation)
        with torch.device("meta"):
            model = cls(config)
        return load_exactly(model, [file], dtype, device, prefix="visual.trunk.",
                            dropped=r"visual\.head\.proj\.weight|text\..*|logit_scale")

    @classmethod
    def from_run(cls, run, device="cpu"):
        """The encoder of a train_vlm.py run, from its newest checkpoint."""
        return cls.load(find_run(run)[1], device)

    @classmethod
    def load(cls, folder, device="cpu"):
        """The encoder alone of what VLM.save() wrote, its LoRA, where it has one, merged into its weights."""
        folder = Path(folder)
        config = read_settings(folder / "config.json")
        base = config["weights"]["vision"]
        base = find_weights(base, config.get("hashes", {}).get("vision")) if base else folder / "vision.safetensors"
        model = cls.from_pretrained(base, device=device)
        if "vision" not in config["lora"]:
            return model
        plain = cls(model.config).to(device)
        add_lora(model, **config["lora"]["vision"])
        load_adapter(model, folder / ADAPTERS["vision"])
        for layer in lora_layers(model).values():
            layer.merge()
        plain.load_state_dict({name.replace(".base.", "."): tensor for name, tensor in
                               model.state_dict().items() if ".lora_" not in name})
        return plain


# ----------------------------------------------------------------------------- residual network

@dataclass
class ResNetConfig:
    """PMC-CLIP's ResNet-50 (arXiv 2303.07240)."""
    image_size: int = 224  # pixels
    stem: int = 64  # channels after the stem; a stage's last has 4, 8, 16 and 32 times as many
    layers: tuple = (3, 4, 6, 3)  # blocks of each stage
    width: int = 768  # of an output

    @property
    def tokens(self):
        """Outputs for an image: one per place of the last map and their attention-pooled mean."""
        return (self.image_size // 32) ** 2 + 1


class Bottleneck(nn.Module):
    """Residual block whose stride is an average pool, which does not alias."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = nn.Identity() if inputs == 4 * width else nn.Sequential(
            nn.Conv2d(inputs, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(F.avg_pool2d(y, self.stride)))  # (I, 4 width, H/stride, W/stride)
        return F.relu(y + self.downsample(F.avg_pool2d(x, self.stride)))


def stage(blocks, inputs, width, stride):
    return nn.Sequential(Bottleneck(inputs, width, stride),
                         *(Bottleneck(4 * width, width, 1) for _ in range(blocks - 1)))


class AttentionPool(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = 32 * config.stem
        self.positional_embedding = nn.Parameter(torch.randn(config.tokens, C) / C ** 0.5)
        self.q_proj, self.k_proj, self.v_proj = (Linear(C, C) for _ in range(3))
        self.c_proj = Linear(C, config.width)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)  # (I, C, H, W) -> (I, N-1, C)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding  # (I, N, C)
        # Heads of 64 channels, 32 in all, as PMC-CLIP was trained. No shape tells: with 8 heads, as in
        # loaders often copied, the same file loads and gives other features.
        q, k, v = (proj(x).unflatten(-1, (-1, 64)).transpose(1, 2)  # each (I, nh, N, 64)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.c_proj(y.transpose(1, 2).flatten(2))  # (I, N, width)


class ResNet(nn.Module):
    """CLIP's ResNet (arXiv 2103.00020): three convolutions first, an attention pool last."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        C, (one, two, three, four) = config.stem, config.layers
        self.conv1 = nn.Conv2d(3, C // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(C // 2)
        self.conv2 = nn.Conv2d(C // 2, C // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(C // 2)
        self.conv3 = nn.Conv2d(C // 2, C, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(C)
        self.layer1 = stage(one, C, C, stride=1)
        self.layer2 = stage(two, 4 * C, 2 * C, stride=2)
        self.layer3 = stage(three, 8 * C, 4 * C, stride=2)
        self.layer4 = stage(four, 16 * C, 8 * C, stride=2)
        self.attnpool = AttentionPool(config)

    def forward(self, images):
        """
        (I, 3, H, W) normalised pixels -> (I, N, width) outputs. The first is PMC-CLIP's feature of
        the image; it leaves out the others, which the places of the last map get by the same pool.
        """
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)  # (I, stem, H/4, W/4)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (I, C, H/32, W/32)
        return self.attnpool(x)

    @classmethod
    def from_pretrained(cls, file, dtype=torch.float32, device="cpu"):
        """
        Build and load from a safetensors file under CLIP's keys, as ViT.from_pretrained does; in
        eval mode, where batch norms use the statistics of the file.
        """
        shapes = tensor_shapes(file)
        try:
            stem, width = shapes["conv3.weight"][0], shapes["attnpool.c_proj.weight"][0]
            grid = shapes["attnpool.positional_embedding"][0] - 1
        except (KeyError, IndexError):
            raise UserError(f"{file}: no ResNet in CLIP's layout (conv3.weight, attnpool.*); "
                            "docs/interchange.md says which files fit") from None
        layers = [len([key for key in shapes if re.fullmatch(rf"layer{n}\.\d+\.bn1\.weight", key)])
                  for n in (1, 2, 3, 4)]
        with torch.device("meta"):
            model = cls(ResNetConfig(round(grid ** 0.5) * 32, stem, tuple(layers), width))
        return load_exactly(model, [file], dtype, device).eval()


def load_encoder(file, dtype=torch.float32, device="cpu"):
    """The image encoder that a safetensors file holds: a ViT or a ResNet. UserError if neither."""
    kind = ResNet if "attnpool.c_proj.weight" in tensor_shapes(file) else ViT
    return kind.from_pretrained(file, dtype, device)


# ----------------------------------------------------------------------------- LLaMA

@dataclass
class LlamaConfig:
    """LLaMA-7B (arXiv 2302.13971); the fields are those of the hub's config.json."""
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    @property
    def head_size(self):
        return self.hidden_size // self.num_attention_heads


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the statistics in float32 whatever x is (arXiv 1910.07467)."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * wide.to(x.dtype)


def rotary_angles(positions, head_size, theta):
    """(R, T) positions -> cos and sin of the rotary embedding, each (R, 1, T, hs) float32."""
    channel = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32)
    angle = positions[:, None, :, None].float() / theta ** (channel / head_size)  # (R, 1, T, hs/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x, cos, sin):
    """
    Rotate (R, nh, T, hs) queries or keys by their positions (arXiv 2104.09864).

    The hub's half-split layout: channel j turns with channel j + hs/2. Meta's own files pair
    neighbours instead; the hub's q and k rows are permuted to match, so nothing is permuted here.
    """
    return x * cos.to(x.dtype) + x.roll(x.shape[-1] // 2, dims=-1) * sin.to(x.dtype)


def attend(q, k, v, mask):
    """
    Attention of (R, nh, T, hs) queries to (R, nkv, S, hs) keys and values -> (R, nh, T, hs).

    The one place that knows the ways in which it is computed. They give the same numbers, and what the
    mask is decides:

    - a BlockMask, for packed rows on a GPU: FlexAttention, which leaves out every block of 128 x 128 in
      which nobody sees anybody;
    - a list of (length, mask), for packed rows elsewhere: one group of tokens after the other, so that
      what different groups would have to do with one another is not computed to be masked out;
    - a tensor, (R, 1, T, S), True or 0 where a query may look: dense, for generation.
    """
    gqa = q.shape[1] != k.shape[1]  # several queries' heads share one of keys and values
    if isinstance(mask, BlockMask):
        return compiled_flex_attention(q, k, v, block_mask=mask, enable_gqa=gqa)
    if isinstance(mask, torch.Tensor):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)
    lengths = [length for length, _ in mask]
    groups = zip(*(x.transpose(1, 2).flatten(0, 1).split(lengths) for x in (q, k, v)), mask)
    y = [F.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in (q_of, k_of, v_of)),  # (1, nh, length, hs)
            attn_mask=mask_of, is_causal=mask_of is None, enable_gqa=gqa)
         for q_of, k_of, v_of, (_, mask_of) in groups]
    return torch.cat(y, dim=2)[0].transpose(0, 1).unflatten(0, (len(q), -1)).transpose(1, 2)


class LlamaAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.nh, self.nkv = config.num_attention_heads, config.num_key_value_heads
        self.hs = config.head_size
        self.q_proj = Linear(config.hidden_size, self.nh * self.hs, bias=False)
        self.k_proj = Linear(config.hidden_size, self.nkv * self.hs, bias=False)
        self.v_proj = Linear(config.hidden_size, self.nkv * self.hs, bias=False)
        self.o_proj = Linear(self.nh * self.hs, config.hidden_size, bias=False)

    def forward(self, x, cos, sin, mask, cache=None, layer=0):
        R, T, C = x.shape
        q = self.q_proj(x).view(R, T, self.nh, self.hs).transpose(1, 2)  # (R, nh, T, hs)
        k = self.k_proj(x).view(R, T, self.nkv, self.hs).transpose(1, 2)  # (R, nkv, T, hs)
        v = self.v_proj(x).view(R, T, self.nkv, self.hs).transpose(1, 2)  # (R, nkv, T, hs)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache:
            q, k, v = cache.part(q), *cache.store(layer, k, v)
        y = attend(q, k, v, mask)
        if cache:
            y = cache.join(y)
        return self.o_proj(y.transpose(1, 2).reshape(R, T, C))


class LlamaMLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LlamaAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, x, cos, sin, mask, cache=None, layer=0, wanted=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, layer)
        if wanted is not None:  # others have given their keys and values, and are done
            x = x.flatten(0, 1)[wanted]  # (R, T, C) -> (M, C)
        return x + self.mlp(self.post_attention_layernorm(x))


class LLaMA(nn.Module):
    """LLaMA 1 and 2, and what shares their layout: grouped-query attention, other widths and thetas."""

    recomputed = 0  # blocks, from the first on, that are run again in the backward pass
    dropout_keys = None  # add_lora's, where it drops anything

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
            layers=nn.ModuleList(LlamaBlock(config) for _ in range(config.num_hidden_layers)),
            norm=RMSNorm(config.hidden_size, config.rms_norm_eps)))
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(init_weights)

    def embed(self, tokens):
        return self.model.embed_tokens(tokens)  # (R, T) -> (R, T, C)

    def transform(self, x, positions, mask, wanted=None, cache=None, keys=None):
        """
        (R, T, C) embeddings -> (R, T, C) after the final norm, or (M, C) of those that are wanted:
        indices into R * T, which spares the others the last block's larger half. mask: (R, 1, T, T),
        True where a query (second last) may attend to a key (last); with a Cache what its place()
        has returned. keys: (R, T) int32, by which LoRA drops.
        """
        if self.dropout_keys:
            self.dropout_keys.set(keys, wanted)
        cos, sin = rotary_angles(positions, self.config.head_size, self.config.rope_theta)
        last = len(self.model.layers) - 1
        for layer, block in enumerate(self.model.layers):
            # With a cache never compiled: that would be anew for each length. Else all have the number 0
            run, number = (block.forward, layer) if cache else (block, 0)
            x = run_block(run, layer < self.recomputed, x, cos, sin, mask, cache, number,
                          wanted if layer == last else None)
        return self.model.norm(x)

    def forward(self, tokens):
        """(R, T) tokens -> (R, T, V) logits, each token seeing itself and those before it."""
        R, T = tokens.shape
        positions = torch.arange(T, device=tokens.device).expand(R, T)
        mask = torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril()
        return self.lm_head(self.transform(self.embed(tokens), positions, mask[None, None]))

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu"):
        """
        Build and load from a hub folder: config.json and model.safetensors, whole or sharded.

        Tensor by tensor from a memory map into dtype on device, so that the peak of memory is the
        weights themselves. Raises UserError when the folder is incomplete or a tensor does not fit.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}/config.json: not there; `python prepare/all.py "
                            "--only=pmc_llama_7b` brings the paper's")
        hub = read_settings(folder / "config.json")
        ropes = [rope for rope in map(hub.get, ("rope_parameters", "rope_scaling")) if isinstance(rope, dict)]
        config = LlamaConfig(**{item.name: hub[item.name] for item in fields(LlamaConfig)
                                if hub.get(item.name) is not None})
        config.num_key_value_heads = hub.get("num_key_value_heads") or config.num_attention_heads
        config.rope_theta = next((rope["rope_theta"] for rope in ropes if rope.get("rope_theta")),
                                 config.rope_theta)
        impossible = [f"{name} {value!r:.50}" for name, value in asdict(config).items()
                      if type(value) not in (int, type(getattr(LlamaConfig, name)))
                      or not 0 < value < (1e30 if isinstance(value, float) else 1 << 24)]
        if impossible or (config.hidden_size % config.num_attention_heads
                     or config.num_attention_heads % config.num_key_value_heads):
            raise UserError(f"{folder}/config.json: {', '.join(impossible) or 'its sizes'} cannot be")
        if refused := llama_refusal(hub, config.head_size):
            raise UserError(f"{folder}/config.json: {refused}")
        files = language_files(folder)
        if config.num_hidden_layers > sum(len(tensor_shapes(file)) for file in files):
            raise UserError(f"{folder}/config.json: {config.num_hidden_layers} layers are more than the "
                            "tensors beside it")  # and would take for ever to build
        with torch.device("meta"):
            model = cls(config)
        return load_exactly(model, files, dtype, device,
                            dropped=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


class Cache:
    """
    Keys and values of R rows of S slots in every layer, for generation.

    A row is an image and the questions about it. Tokens of many rows are run through the model end to
    end, (1, T, C), so that none is padding; for attention alone they are parted by row into K lanes.
    """

    def __init__(self, config, rows, dtype, device):
        self.used = np.zeros(rows, np.int64)  # slots of each row that are in use, from the first on
        self.question = torch.zeros(rows, 0, dtype=torch.long, device=device)  # of a slot; 0: for all
        self.layers = [[torch.zeros(rows, config.num_key_value_heads, 0, config.head_size, dtype=dtype,
                                    device=device) for _ in ("keys", "values")]
                       for _ in range(config.num_hidden_layers)]

    def place(self, row, question):
        """
        Give the next T tokens their slots. row, question: (T,) int, those of each token.

        Returns the mask (R, 1, K, S), 0 where a lane may look and -inf elsewhere: a token sees what
        stands before it in its row, if that is shared or of its own question.
        """
        R, device = len(self.used), self.question.device
        order = np.argsort(row, kind="stable")
        rows, first, index, count = np.unique(row[order], return_index=True, return_inverse=True,
                                              return_counts=True)
        lane = np.empty_like(row)
        lane[order] = np.arange(len(row)) - first[index]
        slot = self.used[row] + lane
        self.used[rows] += count
        K, S = count.max(), -(-self.used.max() // 64) * 64
        if (more := S - self.question.shape[1]) > 0:
            self.question = F.pad(self.question, (0, more))  # store() makes the layers as long
        # All rows as they lie, or a copy of the few that these tokens are of
        few = 2 * len(rows) < R
        self.rows = torch.from_numpy(rows).to(device) if few else slice(None)
        self.shape = (len(rows) if few else R, K)
        lane += (np.searchsorted(rows, row) if few else row) * K
        self.row, self.slot, self.lane, question = (
            torch.from_numpy(array).to(device) for array in (row, slot, lane, question))
        self.question[self.row, self.slot] = question
        self.S = -(-int(self.used[rows].max()) // 8) * 8  # what lies behind is in nobody's sight
        own, last = torch.zeros(2, self.shape[0] * K, dtype=torch.long, device=device)
        own[self.lane], last[self.lane] = question, self.slot
        of_slot = self.question[self.rows, None, :self.S]  # (R, 1, S)
        seen = (of_slot == 0) | (of_slot == own.view(self.shape)[:, :, None])  # (R, K, S)
        seen &= torch.arange(self.S, device=device) <= last.view(self.shape)[:, :, None]
        mask = torch.zeros(seen.shape, dtype=self.layers[0][0].dtype, device=device)
        return mask.masked_fill_(~seen, -torch.inf)[:, None]

    def store(self, layer, k, v):
        """Write (1, nkv, T, hs) keys and values into their slots; all in sight come back, (R, nkv, S, hs)."""
        tensors, slots = self.layers[layer], self.question.shape[1]
        for number, new in enumerate((k, v)):
            if (more := slots - tensors[number].shape[2]) > 0:  # one by one: never all of them twice
                tensors[number] = F.pad(tensors[number], (0, 0, 0, more))
            tensors[number][self.row, :, self.slot] = new[0].transpose(0, 1).to(tensors[number].dtype)
        return [tensor[self.rows, :, :self.S] for tensor in tensors]

    def part(self, q):
        """Queries (1, nh, T, hs) -> (R, nh, K, hs), each row's own."""
        parted = q.new_zeros(self.shape[0] * self.shape[1], q.shape[1], q.shape[3])
        parted[self.lane] = q[0].transpose(0, 1)
        return parted.unflatten(0, self.shape).transpose(1, 2)

    def join(self, y):
        """What attention gives, (R, nh, K, hs) -> (1, nh, T, hs)."""
        return y.transpose(1, 2).flatten(0, 1)[self.lane].transpose(0, 1)[None]


# ----------------------------------------------------------------------------- the whole

CONFIGS = {  # name -> sizes of the parts that are not loaded from a weights file
    "paper": (ViTConfig(), LlamaConfig()),
    "small": (ViTConfig(width=192, depth=6),
              LlamaConfig(hidden_size=256, intermediate_size=688, num_hidden_layers=6,
                          num_attention_heads=4, num_key_value_heads=4)),
    "sample": (ViTConfig(patch_size=32, width=128, depth=4),
               LlamaConfig(hidden_size=128, intermediate_size=344, num_hidden_layers=4,
                           num_attention_heads=2, num_key_value_heads=2)),
}


ADAPTERS = {"vision": "vision_adapter", "language": "adapter"}  # part -> folder in a checkpoint


def normalise(images):
    """
    (I, H, W, 3) uint8 -> (I, 3, H, W) float32 with CLIP's mean and standard deviation, which all of
    BiomedCLIP, PubMedCLIP and PMC-CLIP were trained with.
    """
    mean = torch.tensor(CLIP_MEAN, device=images.device) * 255
    std = torch.tensor(CLIP_STD, device=images.device) * 255
    return (images - mean).div_(std).permute(0, 3, 1, 2)


def packed_mask(group, question, flex=True):
    """
    Who may attend to whom in packed rows, two (R, T): what attend() wants on their device. flex: by
    FlexAttention, which is compiled, on a GPU.

    A token sees what stands before it in its own group: the shared part (question 0) and its own
    question. Padding (group -1) sees padding, so that no token sees nothing.
    """
    return (block_mask if flex and group.is_cuda and HAS_TRITON else group_masks)(group, question)


def block_mask(group, question):
    """packed_mask as a BlockMask of FlexAttention."""
    def sees(r, head, at, other):
        own = (question[r, other] == 0) | (question[r, other] == question[r, at])
        return (group[r, at] == group[r, other]) & own & (other <= at)

    R, T = group.shape
    return compiled_create_block_mask(sees, R, None, T, T, device=group.device)


def group_masks(group, question):
    """packed_mask as a list of (tokens, (tokens, tokens) bool, or None for causal), one for each group."""
    R, T = group.shape
    begins = torch.ones(R, T, dtype=torch.bool, device=group.device)
    begins[:, 1:] = group[:, 1:] != group[:, :-1]
    ends = [*begins.flatten().nonzero()[1:, 0].tolist(), R * T]
    masks = []
    for begin, end in zip([0, *ends], ends):
        own = question.flatten()[begin:end]
        seen = (own[None] == 0) | (own[None] == own[:, None])
        masks.append((end - begin, seen.tril() if own.max() > 1 else None))
    return masks


@dataclass
class Answer:
    """An answer that is being generated, to one of the questions of a row of the cache."""
    row: int
    question: int  # 1, 2, ... within the row
    position: int  # rotary, of its newest token
    tokens: list = field(default_factory=list)
    done: bool = False


class VLM(nn.Module):
    """A ViT, a linear projection and a LLaMA (OpenMedQ, arXiv 2606.12953)."""

    flex = True  # attention over packed rows by FlexAttention, on a GPU

    def __init__(self, vision, language):
        super().__init__()
        self.vision = vision
        self.projector = Linear(vision.config.width, language.config.hidden_size)
        self.language = language
        self.lora = {}  # part -> settings of its LoRA: r, alpha, dropout, targets
        self.weights = {"vision": "", "language": ""}  # part -> weights file or folder that it equals,
        # LoRA aside; none: made from scratch or trained in full, so that save() writes it
        self.hashes = {"vision": "", "language": ""}  # part -> hash_weights of what it began with
        self.projector.apply(init_weights)

    @classmethod
    def build(cls, name, vocab_size, vision_weights="", language_weights="", dtype=torch.float32,
              device="cpu"):
        """A model of CONFIGS[name]; a part with a weights file is loaded from it, sizes and all."""
        vision_config, language_config = CONFIGS[name]
        with torch.device(device):
            vision = (ViT.from_pretrained(vision_weights, device=device) if vision_weights
                      else ViT(vision_config))
            language = (LLaMA.from_pretrained(language_weights, dtype, device) if language_weights
                        else LLaMA(replace(language_config, vocab_size=vocab_size)).to(dtype))
            if language.config.vocab_size < vocab_size:
                raise UserError(f"{language_weights}: its {language.config.vocab_size} tokens are fewer "
                                f"than the tokenizer's {vocab_size}; prepare with its own tokenizer")
            model = cls(vision, language)
        for part, path in (("vision", vision_weights), ("language", language_weights)):
            if path:  # absolute: a run is also read from other folders than the one it was started in
                model.weights[part], model.hashes[part] = os.path.abspath(path), hash_weights(path)
        return model

    def encode_images(self, images, keys=None):
        """(I, H, W, 3) uint8 -> (I, N, C) image tokens in the language model's width."""
        return self.projector(self.vision(normalise(images), keys))

    def where(self, image_at):
        """(I,) flat indices of the images' first tokens -> (I, N) of all."""
        return image_at[:, None] + torch.arange(self.vision.config.tokens, device=image_at.device)

    def splice(self, tokens, image_tokens, image_at):
        """Embed (R, T) tokens and write (I, N, C) image tokens over them from flat index image_at on."""
        x = self.language.embed(tokens)
        if not len(image_tokens):
            return x
        R, T, C = x.shape
        at = self.where(image_at)  # (I, N)
        x = x.reshape(R * T, C).index_copy(0, at.flatten(), image_tokens.flatten(0, 1).to(x.dtype))
        return x.view(R, T, C)

    def forward(self, batch):
        """
        Logits of a packed data.Batch of tensors: (M, V) float32, at the supervised positions alone.
        """
        keys = image_keys = None
        if self.training and (self.vision.dropout_keys or self.language.dropout_keys):
            keys = token_keys(batch.key, batch.positions)  # (R, T)
            image_keys = keys.flatten()[self.where(batch.image_at)]  # (I, N)
        images = self.encode_images(batch.images, image_keys) if len(batch.images) else batch.images
        x = self.splice(batch.tokens, images, batch.image_at)
        mask = packed_mask(batch.group, batch.question, self.flex)
        x = self.language.transform(x, batch.positions, mask, batch.answer_at, keys=keys)  # (M, C)
        return self.language.lm_head(x).float()

    def loss(self, batch):
        """Cross-entropy of a data.Batch summed over its supervised positions: a scalar."""
        return F.cross_entropy(self(batch), batch.targets, reduction="sum")

    def run_through(self, cache, inputs, wanted=(), images=(), image_at=()):
        """
        Put T inputs (token, position, row, question) into a Cache; returns what the language model
        makes of those that are wanted, (M, C). images: (H, W, 3) uint8, whose tokens stand in for the
        inputs from image_at on.
        """
        device = self.projector.weight.device
        tokens, positions, row, question = np.array(inputs).T
        mask = cache.place(row, question)
        tokens, positions, wanted, image_at = (
            torch.as_tensor(array, dtype=torch.long, device=device)
            for array in (tokens[None], positions[None], wanted, image_at))
        if images:
            images = self.encode_images(torch.from_numpy(np.stack(images)).to(device))
        x = self.splice(tokens, images, image_at)  # (1, T, C)
        return self.language.transform(x, positions, mask, wanted, cache)

    @torch.no_grad()
    def generate(self, groups, max_new_tokens=32, temperature=0.0, rows=64):
        """
        Answer questions; greedy at temperature 0, else sampled with torch's generator.

        groups: an iterable of (image, prompts): an image (H, W, 3) uint8, or None, and the questions
        about it as lists of token ids. Yields (number of a group, its answers as lists of token ids up
        to <eos>) as they are finished. A group is a row of the cache: <bos>, the image and the words
        with which all its prompts begin are computed once for all of them. `rows` groups are under way
        at a time; whenever a quarter of the rows is free, as many new groups are taken in.
        """
        N, embedding = self.vision.config.tokens, self.language.model.embed_tokens.weight
        groups = iter(groups)
        first = list(itertools.islice(groups, rows))
        rows, waiting = len(first), enumerate(itertools.chain(first, groups))
        cache = Cache(self.language.config, rows, embedding.dtype, embedding.device)
        at_once, free, under_way, live = max(rows // 4, 1), list(range(rows)), {}, []
        while True:
            new = list(itertools.islice(waiting, at_once)) if len(free) >= at_once else []
            shared, images, image_at = [], [], []  # shared, inputs: (token, position, row, question)
            inputs, asked, last = [], [], []  # the answers that get a token more, what predicts it
            for number, (image, prompts) in new:
                r, prefix = free.pop(), [BOS]
                cache.used[r] = 0
                if image is not None:
                    images.append(image)
                    image_at.append(len(shared) + 1)
                    prefix = [BOS] + [0] * N
                common = os.path.commonprefix(prompts)[:min(map(len, prompts)) - 1]
                prefix += common
                shared += [(token, position, r, 0) for position, token in enumerate(prefix)]
                for q, prompt in enumerate(prompts, start=1):
                    inputs += [(token, position, r, q) for position, token
                               in enumerate(prompt[len(common):], start=len(prefix))]
                    asked.append(Answer(r, q, position=inputs[-1][1]))
                    last.append(len(inputs) - 1)
                under_way[r] = number, asked[-len(prompts):]
            if new:
                self.run_through(cache, shared, (), images, image_at)
            elif live:
                asked, last = live, list(range(len(live)))
                inputs = [(answer.tokens[-1], answer.position, answer.row, answer.question)
                          for answer in live]
            else:
                return
            logits = self.language.lm_head(self.run_through(cache, inputs, last)).float()  # (asked, V)
            if temperature > 0:
                chosen = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)[:, 0]
            else:
                chosen = logits.argmax(dim=-1)
            for answer, token in zip(asked, chosen.tolist()):
                answer.position += 1
                if token != EOS:
                    answer.tokens.append(token)
                answer.done = token == EOS or len(answer.tokens) == max_new_tokens
            live = [answer for answer in (live + asked if new else asked) if not answer.done]
            for r in under_way.keys() - {answer.row for answer in live}:
                number, answers = under_way.pop(r)
                free.append(r)
                yield number, [answer.tokens for answer in answers]

    def save(self, folder, language=None):
        """
        Write what no weights file holds: adapters, and parts trained in full or made from scratch.
        language: the tensors of the language model, where processes have split them.

        vision.safetensors (timm's layout), projector.safetensors, language/ (the hub's layout),
        vision_adapter/ and adapter/ (PEFT's layout), config.json.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors_of(self.projector), folder / "projector.safetensors")
        weights = dict(self.weights)
        for part in weights:
            module = getattr(self, part)
            if part in self.lora:
                save_adapter(module, folder / ADAPTERS[part], weights[part], **self.lora[part])
            elif is_trained(module):
                weights[part] = ""
            if weights[part]:
                continue
            tensors = language if part == "language" and language else tensors_of(module)
            tensors = {name.replace(".base.", "."): tensor for name, tensor in tensors.items()
                       if ".lora_" not in name}
            for name, layer in lora_layers(module).items():
                if layer.unmerged is not None:
                    tensors[f"{name}.weight"] = layer.unmerged
            if part == "vision":
                save_file(tensors, folder / "vision.safetensors", metadata=metadata_of(module))
                sort_metadata(folder / "vision.safetensors")
            else:
                where = folder / "language"
                where.mkdir(exist_ok=True)
                save_file(tensors, where / "model.safetensors", metadata={"format": "pt"})
                hub = {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
                       **asdict(module.config), "hidden_act": "silu", "bos_token_id": BOS,
                       "eos_token_id": EOS, "tie_word_embeddings": False}
                (where / "config.json").write_text(json.dumps(hub, indent=2) + "\n")
        (folder / "config.json").write_text(
            json.dumps({"weights": weights, "hashes": self.hashes, "lora": self.lora}, indent=2) + "\n")

    @classmethod
    def load(cls, folder, dtype=torch.float32, device="cpu"):
        """The model that save() wrote. Raises UserError when a file is missing or does not fit."""
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: no model here; run `python train_vlm.py`")
        config = read_settings(folder / "config.json")
        hashes = config.get("hashes", {})
        weights = {part: path and find_weights(path, hashes.get(part)) for part, path in config["weights"].items()}
        vision = ViT.from_pretrained(weights["vision"] or folder / "vision.safetensors", device=device)
        language = LLaMA.from_pretrained(weights["language"] or folder / "language", dtype, device)
        with torch.device("meta"):
            model = cls(vision, language)
        load_exactly(model.projector, [folder / "projector.safetensors"], torch.float32, device)
        model.weights, model.hashes, model.lora = weights, model.hashes | hashes, config["lora"]
        for part, settings in model.lora.items():
            add_lora(getattr(model, part), **settings)
            load_adapter(getattr(model, part), folder / ADAPTERS[part])
        return model

    @classmethod
    def from_run(cls, folder, dtype=torch.float32, device="cpu"):
        """The model of a train_vlm.py run, from its newest checkpoint."""
        return cls.load(find_run(folder)[1], dtype, device)


# ----------------------------------------------------------------------------- weights

def language_files(folder):
    """The safetensors files of a hub folder, as its index names them; UserError where some are missing."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.is_file():
        if not whole.is_file() and (pickles := sorted(folder.glob("pytorch_model*.bin"))):
            raise UserError(f"{folder}: its weights are pickles, {pickles[0].name} the first; `python "
                            f"prepare/all.py --convert={folder}` writes them as safetensors into weights/")
        return [whole]
    settings = read_settings(index)
    weight_map, facts = settings.get("weight_map"), settings.get("metadata")
    if isinstance(facts, dict) and facts.get("config") not in (None, hash_file(folder / "config.json")):
        raise UserError(f"{folder}/config.json: was altered; delete {folder}, and prepare/all.py "
                        "makes it anew")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise UserError(f"{index}: does not say which files beside it hold the weights")
    names = sorted(set(names))
    if whole.is_file() and whole.name not in names:
        raise UserError(f"{folder}: both {whole.name} and the files of {index.name} are there; remove one of "
                        "the two")
    count = re.search(r"-of-(\d{5})\.safetensors$", names[0])
    if count and len(names) != int(count[1]):
        raise UserError(f"{folder}: {len(names)} of {int(count[1])} files of the weights are in its index; "
                        "fetch the others, then delete what prepare/all.py made of these and run it again")
    return [folder / name for name in names]


def read_metadata(file):
    """What a safetensors file says beside its tensors, texts by name."""
    with safe_open(file, "pt") as tensors:
        return tensors.metadata() or {}


def metadata_of(module):
    """What a safetensors file of a module is to say that its tensors do not, see plumbing/claims.py."""
    facts = {"format": "pt"}
    if isinstance(module, ViT):
        facts |= {"heads": str(module.config.heads), "activation": module.config.gelu}
    return facts


def init_weights(module):
    """Normal with standard deviation 0.02, biases zero: what both parts are made with from scratch."""
    if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d)):
        nn.init.normal_(module.weight, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


def is_trained(module):
    return any(parameter.requires_grad for parameter in module.parameters())


def tensors_of(module):
    return {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}


def tensor_shapes(file):
    """Names and shapes of a safetensors file's tensors, without reading them."""
    if not Path(file).is_file():
        raise UserError(f"{file}: no such weights file; `python prepare/all.py --only=biomedclip,"
                        "pmc_llama_7b` brings the paper's")
    try:
        with safe_open(file, "pt") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: {lfs_pointer(file) or f'not a whole safetensors file ({error})'}") from None


def tensor_hashes(tensors):
    """SHA-256 of each tensor's bytes, as a safetensors file's metadata for read_tensor to check."""
    return {"tensors": json.dumps({name: tensor_hash(tensor) for name, tensor in tensors.items()})}


def tensor_hash(tensor):
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy()).hexdigest()


def hash_weights(path):
    """
    SHA-256 that tells a weights file, or a hub folder of them, from others, by the configs beside it, too. Of
    a file that holds the hash of each of its tensors, which read_tensor checks, the header says all; of
    others every byte is read.
    """
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    configs = [files[0].parent / name for name in ("config.json", "open_clip_config.json")] if files else []
    return hash_json({file.name: hash_tensors(file) for file in files}
                     | {config.name: hash_file(config) for config in configs if config.is_file()})


def hash_tensors(path):
    """hash_weights of one file, whatever lies beside it."""
    if path.suffix == ".safetensors":
        with open(path, "rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
        with contextlib.suppress(ValueError, AttributeError):
            tensors = json.loads(header)
            facts = tensors.pop("__metadata__", {})
            if json.loads(facts.get("tensors", "{}")).keys() == tensors.keys():
                return hash_json([facts, tensors])  # safetensors writes the facts in any order
    return hash_file(path)


def find_weights(path, sha256):
    """
    Where the base weights of a run are: where they were when it was saved, or in the folder weights/ here.
    Raises UserError when they are in neither place, or are others than they were.
    """
    places = [Path(path), Path("weights") / Path(path).name]
    place = next((place for place in places if place.exists()), None)
    if place is None:
        raise UserError(f"{path}: the run's base weights are not there; bring them back, or put them into "
                        f"{places[1]}")
    if sha256 is None:
        print(f"{place}: not known whether these are the base weights that the run was trained on: it was "
              "saved before that was recorded", file=sys.stderr)
    elif hash_weights(place) != sha256:
        raise UserError(f"{place}: not the base weights that the run was trained on; bring those back, or put "
                        f"them into {places[1]}" if place == places[0] else
                        f"{place}: not the base weights that the run was trained on, which were in {path}")
    return str(place)


def read_tensor(file, key):
    """
    A tensor of a safetensors file, in memory of its own. Raises UserError where it is not the one whose
    hash the file's metadata has, as those of prepare/ do; others have none.
    """
    # Opened anew for each: pages of an open map would count as memory until its end
    with safe_open(file, "pt") as tensors:
        tensor = tensors.get_tensor(key).clone()
        try:
            wanted = json.loads((tensors.metadata() or {}).get("tensors", "{}")).get(key)
        except (ValueError, AttributeError):
            wanted = "damaged"
    if wanted and wanted != tensor_hash(tensor):
        raise UserError(f"{file}: {key} was altered since it was written; fetch or make the file anew")
    return tensor


def load_exactly(model, files, dtype, device, prefix="", dropped=r"(?!)"):
    """
    Fill a model built on the meta device from safetensors files, in both directions completely. On the
    meta device again nothing is read but names and shapes.

    prefix is taken off the files' keys; keys that fully match `dropped` are left out. Raises
    UserError with the first offenders when a key is unknown, missing, repeated or misshapen.
    """
    state = model.state_dict()
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    found, problems = {}, []
    for file in files:
        for key, shape in tensor_shapes(file).items():
            name = key.removeprefix(prefix)
            if re.fullmatch(dropped, key):
                continue
            if name not in wanted:
                problems.append(f"{key} is unknown")
            elif name in found:
                problems.append(f"{key} comes twice")
            elif shape != wanted[name]:
                problems.append(f"{key} is {shape}, not {wanted[name]}")
            found[name] = (file, key)
    problems += [f"{name} is missing" for name in wanted if name not in found]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{files[0]}: does not fit this model: {'; '.join(problems[:3])}{more}")
    loaded = {}
    for name, (file, key) in found.items():
        kind = dtype if state[name].is_floating_point() else state[name].dtype  # counts stay whole
        if str(device) == "meta":
            loaded[name] = state[name].to(kind)
            continue
        tensor = read_tensor(file, key)
        if tensor.is_floating_point() != state[name].is_floating_point():
            raise UserError(f"{file}: {key} is {tensor.dtype}, which holds no weights")
        loaded[name] = tensor.to(device, kind)
    model.load_state_dict(loaded, assign=True)
    return model
