"""
The model: a vision transformer, one linear projection and a LLaMA, written out in full.

    image (224, 224, 3) -> ViT -> 197 tokens of 768 -> Linear -> 197 tokens of 4096 --.
                                                                                      v
    <bos> image ... image | prompt answer   -> embeddings, image tokens spliced in -> LLaMA -> loss

Each part's parameters carry the names of the checkpoint that it is initialised from: timm's for the
ViT (BiomedCLIP's visual.trunk.*), the Hugging Face hub's for LLaMA (PMC-LLaMA). Loading is therefore a
plain copy, and what weights.py saves is read by those libraries. How answers are generated: generate.py.
What a VLM wants of other parts than these: docs/building.md.

Letters: T tokens of a sequence, C width, nh heads, nkv key-value heads, hs head size, I images, H, W
their height and width, N tokens of an image (class token + patches) or of all images, P patch size,
V vocabulary, M supervised positions.
The paper's sizes: ViT-B/16 C=768 nh=12 N=197; LLaMA-7B C=4096 nh=nkv=32 hs=128 V=32000.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask
from torch.utils.checkpoint import checkpoint

from lora import token_keys
from plumbing.flags import UserError
from plumbing.kernels import (HAS_TRITON, Linear, add_sink, compiled_create_block_mask, compiled_flex_attention,
                              group_masks)
from plumbing.tiles import count_tiles, cut_tiles

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(images, mean=CLIP_MEAN, std=CLIP_STD):
    """(I, H, W, 3) uint8 -> (I, 3, H, W) float32; BiomedCLIP, PubMedCLIP and PMC-CLIP have CLIP's mean and std."""
    mean, std = (torch.tensor(numbers, device=images.device) * 255 for numbers in (mean, std))
    return (images - mean).div_(std).permute(0, 3, 1, 2)


def init_weights(module):
    """Normal with standard deviation 0.02, biases zero: what both parts are made with from scratch."""
    if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d, nn.Conv3d)):
        nn.init.normal_(module.weight, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


def run_block(block, recomputed, *inputs):
    """A block's output; recomputed: nothing but its inputs is kept for the backward pass."""
    if recomputed and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


# ----------------------------------------------------------------------------- vision transformer

@dataclass
class ViTConfig:
    image_size: int = 224  # pixels, of the squares that its positions are for
    patch_size: int = 16  # pixels
    width: int = 768
    depth: int = 12
    clip: bool = False  # as OpenAI's CLIP has it, and PubMedCLIP from there
    head_size: int = 64  # channels of a head, from Ti to L
    activation: str = ""  # gelu or quick_gelu; none: OpenAI's quick one where clip, else the exact one
    merge: int = 1  # this times this patches become one token, for a VLM; 1: none do
    class_token: bool = True  # is among what leaves it; never beside merged patches
    layer: str = "normed"  # what leaves it: the last block's output behind a norm, or the last (-1) or the last but
    # one's (-2) as it is; blocks behind that are not among `depth`
    tiled: bool = False  # images are cut into squares of image_size, which it sees one by one, see plumbing/tiles.py

    def __post_init__(self):
        self.class_token &= self.merge == 1

    @property
    def grid(self):
        """Patches along each side, of which each has a position of its own."""
        return self.image_size // self.patch_size

    @property
    def eps(self):
        return 1e-5 if self.clip else 1e-6

    @property
    def heads(self):
        return self.width // self.head_size

    @property
    def gelu(self):
        return self.activation or ("quick_gelu" if self.clip else "gelu")


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

    mean, std = CLIP_MEAN, CLIP_STD  # of the pixels that it reads
    recomputed = 0  # blocks, from the first on, that are run again in the backward pass
    dropout_keys = None  # add_lora's, where it drops anything

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.empty(1, config.grid ** 2 + 1, config.width).normal_(std=0.02))
        self.norm_pre = nn.LayerNorm(config.width, config.eps) if config.clip else nn.Identity()
        self.blocks = nn.ModuleList(ViTBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, config.eps) if config.layer == "normed" else nn.Identity()
        self.apply(init_weights)

    def tokens(self, height, width):
        """Tokens of an image of so many pixels, numbers or arrays: patches, or merged ones, and a class token."""
        side, S, tiles = self.config.patch_size * self.config.merge, self.config.image_size, 1
        if self.config.tiled:
            tiles, height, width = count_tiles(height, width, S), S, S
        return tiles * ((height // side) * (width // side) + self.config.class_token)

    extent = tokens  # how many positions an image takes

    def place(self, positions, *_):
        """Positions of tokens, images' among them, from those that count one a token: the same here."""
        return positions

    def require_shapes(self, name, sizes):
        """Raise UserError where images of these sizes, (I,) with height and width, are not whole patches."""
        config, sides = self.config, {*sizes["height"].tolist(), *sizes["width"].tolist()}
        side, what = ((config.image_size, "tiles") if config.tiled else
                      (config.patch_size * config.merge, "patches"))
        own = config.image_size if config.grid % config.merge == 0 else 0  # its rest past the last patch is not seen
        if wrong := [pixels for pixels in sides if pixels % side and pixels != own]:
            raise UserError(f"{name}: an image has {min(wrong)} pixels along a side, no multiple of {side}, the "
                            f"model's {what}; prepare with " + ("--max_tiles=12" if config.tiled else
                            "--resize=squash") + f" and an --image_size that {'it has' if config.tiled else 'is one'}")

    @property
    def output_width(self):
        return self.config.width * self.config.merge ** 2

    def stages(self):
        """Its parameters in lists, from where images enter to the outputs: for learning rates by depth."""
        first = [p for name, p in self.named_parameters() if not name.startswith(("blocks.", "norm."))]
        return [first, *(list(part.parameters()) for part in (*self.blocks, self.norm))]

    def positions(self, rows, columns):
        """(1, N, C) position embeddings of so many patches, interpolated where the grid is not its own."""
        side = self.config.grid
        if (rows, columns) == (side, side):
            return self.pos_embed
        first, grid = self.pos_embed.tensor_split([-side * side], dim=1)  # a class token's, where there is one
        grid = grid.transpose(1, 2).unflatten(2, (side, side)).float()  # (1, C, side, side)
        grid = F.interpolate(grid, (rows, columns), mode="bicubic", antialias=True)
        return torch.cat([first, grid.flatten(2).transpose(1, 2).to(first.dtype)], dim=1)

    def embed(self, images):
        """(I, 3, H, W) normalised pixels -> (I, 1 + patches, C), class token first: what enters the blocks."""
        grid = (side // self.config.patch_size for side in images.shape[2:])
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), self.patch_embed(images)], dim=1)
        return self.norm_pre(x + self.positions(*grid))

    def forward(self, images, keys=None):
        """
        (I, 3, H, W) normalised pixels -> (I, N, output_width) tokens, what config says of what leaves the last
        block; of tiles one after the other. keys: (I, N) int32, by which LoRA drops.
        """
        def run(x, block):
            if self.dropout_keys:  # anew where a block is recomputed: images of other shapes have run by then
                self.dropout_keys.set(keys)
            return block(x)

        I, config = len(images), self.config
        images = cut_tiles(images, config.image_size) if config.tiled else images
        rows, columns = (side // config.patch_size for side in images.shape[2:])
        x = self.embed(images)  # (I * tiles, N, C)
        if keys is not None:  # merged patches have one between them, so each gets its own by the image's first
            number = torch.arange(x.shape[:2].numel() // I, device=x.device)
            keys = token_keys(keys[:, :1], number).view(x.shape[:2])
        for number, block in enumerate(self.blocks):
            x = run_block(run, number < self.recomputed, x, block)
        x = self.norm(x)  # CLIP norms its class token alone; here patches come to the same scale
        x = x if config.class_token else x[:, -rows * columns:]
        x = x if config.merge == 1 else merge_patches(x, rows, columns, config.merge)
        return x.reshape(I, -1, self.output_width)


def merge_patches(x, rows, columns, side):
    """(I, rows * columns, C) patches -> (I, N, side^2 C): each square of side x side end to end, space to depth."""
    x = x.unflatten(1, (rows // side, side, columns // side, side))
    return x.transpose(2, 3).flatten(3, 5).flatten(1, 2)


# ----------------------------------------------------------------------------- attention and its masks

def half_split(angles):
    """(T, hs/2) angles -> cos and sin as rotate() takes them, each (T, 1, hs)."""
    cos, sin = angles[:, None].cos(), angles[:, None].sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotary_angles(positions, head_size, theta):
    """(T,) positions -> cos and sin of the rotary embedding, each (T, 1, hs) float32."""
    channel = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32)
    return half_split(positions[:, None].float() / theta ** (channel / head_size))


def rotate(x, cos, sin):
    """
    Rotate (T, nh, hs) queries or keys by their positions (arXiv 2104.09864).

    The hub's half-split layout: channel j turns with channel j + hs/2. Meta's own files pair
    neighbours instead; the hub's q and k rows are permuted to match, so nothing is permuted here.
    """
    return x * cos.to(x.dtype) + x.roll(x.shape[-1] // 2, dims=-1) * sin.to(x.dtype)


def attend(q, k, v, mask, sinks=None):
    """
    Attention of (T, nh, hs) queries to (T, nkv, hs) keys and values -> (T, nh, hs). sinks: (nh,) scores of nothing,
    see add_sink, for models that have them.

    The one place that knows the ways in which it is computed. They give the same numbers, and what the
    mask is decides, see packed_mask:

    - a BlockMask, on a GPU: FlexAttention, which leaves out every block of 128 x 128 in which nobody sees
      anybody;
    - a list of pieces, elsewhere: some tokens after the others, so that what different groups would have to
      do with one another is not computed to be masked out.
    """
    gqa = q.shape[1] != k.shape[1]  # several queries' heads share one of keys and values
    if isinstance(mask, BlockMask):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, nh, T, hs)
        if sinks is None:
            return compiled_flex_attention(q, k, v, block_mask=mask, enable_gqa=gqa)[0].transpose(0, 1)
        y, aux = compiled_flex_attention(q, k, v, block_mask=mask, enable_gqa=gqa, return_aux=AuxRequest(lse=True))
        y = y * torch.sigmoid(aux.lse - sinks.float()[:, None])[..., None].to(y.dtype)  # lse has a gradient, too
        return y[0].transpose(0, 1)
    parts, y = [x.split([length for length, *_ in mask]) for x in (q, k, v)], []
    for number, (length, seen, back) in enumerate(mask):
        part = [x[number] for x in parts]
        if back:
            first = mask[number - back][0] + length - seen.shape[1]
            part[1:] = (torch.cat([x[number - back][first:], x[number]]) for x in parts[1:])
        part = [x.transpose(0, 1)[None] for x in part]  # (1, nh, length, hs)
        if sinks is not None:
            *part, seen = add_sink(*part, seen, sinks)
        group = F.scaled_dot_product_attention(*part, attn_mask=seen, is_causal=seen is None, enable_gqa=gqa,
                                               scale=q.shape[-1] ** -0.5)
        y.append(group[0, :, -length:, :q.shape[-1]].transpose(0, 1))
    return torch.cat(y)


def packed_mask(group, branch, flex=True):
    """
    Who may attend to whom in a data.Batch, group and branch (T,) int: what attend() wants on their device.
    flex: by FlexAttention, which is compiled, on a GPU.

    A token sees what stands before it in its own group: the prefix (branch 0) and its own branch.
    Padding (group -1) sees padding, so that no token sees nothing.
    """
    return (block_mask if flex and group.is_cuda and HAS_TRITON else group_masks)(group, branch)


def block_mask(group, branch):
    """packed_mask as a BlockMask of FlexAttention."""
    def sees(sequence, head, at, other):
        own = (branch[other] == 0) | (branch[other] == branch[at])
        return (group[at] == group[other]) & own & (other <= at)

    return compiled_create_block_mask(sees, None, None, len(group), len(group), device=group.device)


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
    head_dim: int = 0  # channels of a head; 0: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    @property
    def head_size(self):
        return self.head_dim or self.hidden_size // self.num_attention_heads


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
        T = len(x)
        q = self.q_proj(x).view(T, self.nh, self.hs)
        k = self.k_proj(x).view(T, self.nkv, self.hs)
        v = self.v_proj(x).view(T, self.nkv, self.hs)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = cache.attend(layer, q, k, v) if cache else attend(q, k, v, mask)  # (T, nh, hs)
        return self.o_proj(y.reshape(T, self.nh * self.hs))


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
    Attention, MLP, Norm = LlamaAttention, LlamaMLP, RMSNorm  # of which another family's are others

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = self.Norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = self.Attention(config)
        self.post_attention_layernorm = self.Norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = self.MLP(config)

    def forward(self, x, cos, sin, mask, cache=None, layer=0, wanted=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, layer)
        if wanted is not None:  # others have given their keys and values, and are done
            x = x[wanted]  # (T, C) -> (M, C)
        return x + self.mlp(self.post_attention_layernorm(x))


class LLaMA(nn.Module):
    """LLaMA 1 and 2, and what shares their layout: grouped-query attention, other widths and thetas."""

    Block = LlamaBlock
    recomputed = 0  # blocks, from the first on, that are run again in the backward pass
    dropout_keys = None  # add_lora's, where it drops anything

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
            layers=nn.ModuleList(self.Block(config) for _ in range(config.num_hidden_layers)),
            norm=self.Block.Norm(config.hidden_size, config.rms_norm_eps)))
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(init_weights)

    @property
    def blocks(self):
        return self.model.layers

    def embed(self, tokens, image_tokens=None, image_at=None):
        """(T,) token ids -> (T, C) embeddings, with (N, C) image tokens over those at image_at, (N,)."""
        x = self.model.embed_tokens(tokens)
        return x if image_tokens is None else x.index_copy(0, image_at, image_tokens.to(x.dtype))

    def angles(self, positions):
        """cos and sin by which queries and keys at (T,) positions are rotated, each (T, 1, hs) float32."""
        return rotary_angles(positions, self.config.head_size, self.config.rope_theta)

    def run_layer(self, layer, x, cos, sin, mask, cache, wanted):
        """A block's output, (T, C), or (M, C) of the wanted tokens; of the first `recomputed` nothing is kept."""
        # With a cache never compiled: that would be anew for each length. Else all have the number 0
        run, number = (self.blocks[layer].forward, layer) if cache else (self.blocks[layer], 0)
        return run_block(run, layer < self.recomputed, x, cos, sin, mask, cache, number, wanted)

    def forward(self, tokens, positions=None, mask=None, wanted=None, image_tokens=None, image_at=None,
                cache=None, keys=None):
        """
        (T,) tokens -> (T, V) logits, float32, or (M, V) of the `wanted` tokens, (M,): it spares the others
        the last block's larger half. image_tokens, image_at: as embed takes them.

        positions: (T,), else 0 to T - 1. mask: packed_mask's, else each token sees itself and those before it;
        a Cache of generate.py knows who sees whom. keys: (T,) int32, by which LoRA drops.
        """
        if self.dropout_keys:
            self.dropout_keys.set(keys, wanted)
        if positions is None:
            positions = torch.arange(len(tokens), device=tokens.device)
        mask = [(len(tokens), None, 0)] if mask is None else mask
        x = self.embed(tokens, image_tokens, image_at)
        cos, sin = self.angles(positions)
        last = len(self.blocks) - 1
        for layer in range(len(self.blocks)):
            x = self.run_layer(layer, x, cos, sin, mask, cache, wanted if layer == last else None)
        return self.lm_head(self.model.norm(x)).float()


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


class VLM(nn.Module):
    """A vision part, a linear projection and a language part (OpenMedQ, arXiv 2606.12953)."""

    flex = True  # attention over packed sequences by FlexAttention, on a GPU

    def __init__(self, vision, language, projector=None):
        super().__init__()
        self.vision = vision
        self.projector = projector or Linear(vision.output_width, language.config.hidden_size).apply(init_weights)
        self.language = language
        self.lora = {}  # part -> settings of its LoRA: r, alpha, dropout, targets
        self.weights = {"vision": "", "projector": "", "language": ""}  # part -> weights file or folder that it
        # equals, LoRA aside; none: made from scratch or trained in full, so that weights.py saves it
        self.hashes = {"vision": "", "language": ""}  # part -> hash_weights of what it began with
        self.base_bits = 0  # of frozen matrices in memory, see quantize.py; 0: of their dtype

    def encode_images(self, images, keys=None):
        """
        A list of I images, (H, W, 3) uint8, of any shapes -> (N, C) their tokens, image after image, in the
        language part's width, or what else a projector makes of them. keys: (N,) int32, by which LoRA drops.
        """
        same_shape, encoded = defaultdict(list), [None] * len(images)
        for number, image in enumerate(images):
            same_shape[image.shape].append(number)
        keys = None if keys is None else keys.split([self.vision.tokens(*image.shape[:2]) for image in images])
        for numbers in same_shape.values():
            pixels = normalise(torch.stack([images[n] for n in numbers]), self.vision.mean, self.vision.std)
            their_keys = None if keys is None else torch.stack([keys[n] for n in numbers])  # (I, N)
            for number, tokens in zip(numbers, self.vision(pixels, their_keys)):
                encoded[number] = tokens  # (N, C)
        return self.projector(torch.cat(encoded))

    def forward(self, batch):
        """Logits of a data.Batch of tensors: (M, V) float32, at the supervised positions alone."""
        keys = images = None
        if self.training and (self.vision.dropout_keys or self.language.dropout_keys):
            keys = token_keys(batch.key, batch.positions)  # (T,)
        if batch.images:
            images = self.encode_images(batch.images, None if keys is None else keys[batch.image_at])
        mask = packed_mask(batch.group, batch.branch, self.flex)
        positions = self.vision.place(batch.positions, batch.group, batch.branch, batch.image_at, batch.images)
        return self.language(batch.tokens, positions, mask, batch.answer_at, images, batch.image_at, keys=keys)

    def loss(self, batch):
        """The cross-entropies of a data.Batch, times their weights, summed: a scalar."""
        return (batch.weights * F.cross_entropy(self(batch), batch.targets, reduction="none")).sum()
