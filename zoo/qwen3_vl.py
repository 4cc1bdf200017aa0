"""
Qwen3-VL, the model of MedMO, by hand: a vision tower that reads images in their own shapes, mergers, and a
decoder that is a LLaMA with three changes. It takes the place of model.py's parts in the same VLM.

    image (H, W, 3) -> patches of 16 -> 24 or 27 blocks -> 2 x 2 patches to one token -> merger -----> embeddings
                                         |  |  '-> DeepStack merger 2 -> added behind the text's layer 2
                                         |  '----> DeepStack merger 1 -> added behind layer 1
                                         '-------> DeepStack merger 0 -> added behind layer 0

The formulas are those of transformers' modeling_qwen3_vl.py, to which tests/test_qwen3_vl.py holds this file;
names of parameters are the checkpoint's, which qwen3_files.py reads.

In 32 bits, whatever the weights are: angles, cosines and sines (a position of 1,000 has no exact bf16), the
rotation of the vision tower, the statistics of norms, and the interpolation of positions.

Letters: T tokens of a sequence, I images, H, W their height and width, P patch size, m patches along a side of
a token, N tokens of an image or of all images, so that an image has N m^2 patches, D width of the tower, C
width of the text, nh heads, hs head size, K: what leaves the tower, and what each DeepStack layer adds.
The 8B's sizes: D=1152 nh=16 hs=72, C=4096 nh=32 nkv=8 hs=128, K=4.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from lora import token_keys
from model import (LLaMA, LlamaAttention, LlamaBlock, LlamaConfig, RMSNorm, attend, half_split, init_weights, rotate,
                   run_block)
from plumbing.flags import UserError
from plumbing.kernels import Linear

EPS, THETA = 1e-6, 10000.0  # of the tower's layer norms and angles: they stand in no config.json


# ----------------------------------------------------------------------------- vision tower

@dataclass
class VisionConfig:
    """The fields of the hub's config.json, and how many pixels preprocessor_config.json lets an image have."""
    depth: int = 27
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_heads: int = 16
    patch_size: int = 16  # pixels
    spatial_merge_size: int = 2  # patches along each side of a token
    num_position_embeddings: int = 2304  # of a square grid
    out_hidden_size: int = 4096
    deepstack_visual_indexes: tuple = (8, 16, 24)  # blocks whose output is tapped
    min_pixels: int = 1 << 16
    max_pixels: int = 1 << 24
    merge = 1  # of train_vlm.py, which would come on top

    @property
    def side(self):
        """Pixels along each side of a token."""
        return self.patch_size * self.spatial_merge_size

    @property
    def merged_width(self):
        return self.hidden_size * self.spatial_merge_size ** 2


def in_blocks(grid, m):
    """(..., rows, columns) -> (..., rows * columns), the m x m of a token end to end, tokens row by row."""
    grid = grid.unflatten(-1, (-1, m)).unflatten(-3, (-1, m))  # (..., rows/m, m, columns/m, m)
    return grid.transpose(-3, -2).flatten(-4)


class PatchEmbed(nn.Module):
    """
    As a product of matrices: a convolution is slow on many GPUs. A still image is two equal frames to the
    checkpoint, so that the two halves of its weight are added, and each patch is embedded once.
    """

    def __init__(self, config):
        super().__init__()
        self.m, self.P = config.spatial_merge_size, config.patch_size
        self.proj = nn.Conv3d(3, config.hidden_size, (2, self.P, self.P))

    def forward(self, images):
        x = images.unfold(2, self.P, self.P).unfold(3, self.P, self.P)  # (I, 3, rows, columns, P, P)
        x = in_blocks(x.permute(0, 1, 4, 5, 2, 3), self.m)  # (I, 3, P, P, N m^2)
        weight = self.proj.weight.float().sum(2).flatten(1).to(self.proj.weight.dtype)  # (D, 3 P^2)
        return F.linear(x.flatten(1, 3).transpose(1, 2), weight, self.proj.bias)  # (I, N m^2, D)


class VisionAttention(nn.Module):
    """Every patch sees every other of its image."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.num_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, cos, sin):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # each (I, N m^2, nh, hs)
        q, k, v = (x.transpose(1, 2) for x in (*(rotate(x.float(), cos, sin).to(v.dtype) for x in (q, k)), v))
        y = F.scaled_dot_product_attention(q, k, v)  # (I, nh, N m^2, hs)
        return self.proj(y.transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.linear_fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))  # the mergers have the exact one


class VisionBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, EPS)
        self.attn = VisionAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, EPS)
        self.mlp = VisionMLP(config)

    def forward(self, x, cos, sin):
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class Vision(nn.Module):
    """The tower without its mergers: of each token the m^2 patches, as they leave it and as they pass the taps."""

    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # of the pixels that it reads
    recomputed = 0  # blocks, from the first on, that are run again in the backward pass
    dropout_keys = None  # add_lora's, where it drops anything
    prefix = "model.visual."  # of its names in the checkpoint

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.apply(init_weights)

    @property
    def output_width(self):
        return (1 + len(self.config.deepstack_visual_indexes)) * self.config.merged_width

    def tokens(self, height, width):
        """Tokens of an image of so many pixels, numbers or arrays."""
        return (height // self.config.side) * (width // self.config.side)

    def extent(self, height, width):
        """How many positions an image takes: the tokens of its longer side."""
        return max(height, width) // self.config.side

    def place(self, positions, group, branch, image_at, images):
        """
        (T,) positions that count one a token, in a data.Batch -> (T, 3): time, row and column. Text has three of
        the same. The tokens of an image share the time at which it begins, and count rows and columns from there;
        what stands behind it in its sample comes earlier by what it saves, its tokens less its extent.
        """
        placed = positions[:, None].repeat(1, 3)
        if not images:
            return placed
        rows, columns = (torch.tensor([image.shape[axis] // self.config.side for image in images],
                                      device=positions.device) for axis in (0, 1))  # (I,)
        count = rows * columns
        image = torch.arange(len(images), device=count.device).repeat_interleave(count)  # (N,)
        within = torch.arange(len(image), device=count.device) - (count.cumsum(0) - count)[image]
        first = image_at[count.cumsum(0) - count]  # (I,)
        behind = (group[:, None] == group[first]) & (positions[:, None] >= positions[first] + count)  # (T, I)
        behind &= (branch[first] == 0) | (branch[:, None] == branch[first])
        placed -= (behind * (count - torch.maximum(rows, columns))).sum(1, keepdim=True)
        grid = torch.stack([0 * within, within // columns[image], within % columns[image]], dim=1)  # (N, 3)
        placed[image_at] = placed[first[image]] + grid
        return placed

    def require_shapes(self, name, sizes):
        """Raise UserError where images of these sizes, (I,) with height and width, are none that it reads."""
        side, least, most = self.config.side, self.config.min_pixels, self.config.max_pixels
        for height, width in sorted({*zip(sizes["height"].tolist(), sizes["width"].tolist())}):
            if height % side or width % side or not least <= height * width <= most:
                raise UserError(f"{name}: an image has {height} x {width} pixels; this model reads multiples of "
                                f"{side}, {least:,} to {most:,} pixels in all: prepare with --resize=fit "
                                f"--max_pixels={min(most, 1 << 20)}")

    def positions(self, rows, columns):
        """
        Of each patch, in blocks: its embedding, (rows * columns, D) float32, between the four of the square
        grid that are next to it, the corners on the corners; and cos and sin of its angles, (.., 1, hs), the
        first half of a head's pairs by its row, the other by its column.
        """
        side, m = round(self.config.num_position_embeddings ** 0.5), self.config.spatial_merge_size
        table = self.pos_embed.weight.float().T.unflatten(1, (side, side))[None]  # (1, D, side, side)
        table = F.interpolate(table, (rows, columns), mode="bilinear", align_corners=True)[0]
        place = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
        place = in_blocks(place, m).T.to(table.device)  # (rows * columns, 2)
        quarter = self.config.hidden_size // self.config.num_heads // 4
        speed = THETA ** -(torch.arange(quarter, device=table.device) / quarter)
        return in_blocks(table, m).T, *half_split((place[..., None] * speed).flatten(1))

    def forward(self, images, keys=None):
        """(I, 3, H, W) normalised pixels -> (I, N, K m^2 D). keys: (I, N) int32, by which LoRA drops."""
        def run(x, block):
            if self.dropout_keys:  # anew where a block is recomputed: images of other shapes have run by then
                self.dropout_keys.set(keys)
            return block(x, cos, sin)

        embedded, cos, sin = self.positions(*(side // self.config.patch_size for side in images.shape[2:]))
        x = self.patch_embed(images) + embedded.to(self.pos_embed.weight.dtype)  # (I, N m^2, D)
        if keys is not None:  # the patches of a token have one between them, so each gets its own by the image's first
            keys = token_keys(keys[:, :1], torch.arange(x.shape[1], device=x.device))
        taps = []
        for number, block in enumerate(self.blocks):
            x = run_block(run, number < self.recomputed, x, block)
            if number in self.config.deepstack_visual_indexes:
                taps.append(x)
        return torch.cat([x.unflatten(1, (-1, self.config.spatial_merge_size ** 2)).flatten(2)
                          for x in (x, *taps)], dim=-1)


class Merger(nn.Module):
    """(N, m^2 D) -> (N, C). The main one normalises each patch, those of DeepStack a token's patches together."""

    def __init__(self, config, normed_width):
        super().__init__()
        self.norm = nn.LayerNorm(normed_width, EPS)
        self.linear_fc1 = Linear(config.merged_width, config.merged_width)
        self.linear_fc2 = Linear(config.merged_width, config.out_hidden_size)

    def forward(self, x):
        x = self.norm(x.unflatten(-1, (-1, *self.norm.normalized_shape))).flatten(-2)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))


class Mergers(nn.Module):
    """The projector of a VLM: (N, K m^2 D) -> (N, K, C), an image's tokens and what DeepStack adds to them."""

    def __init__(self, config):
        super().__init__()
        self.merger = Merger(config, config.hidden_size)
        self.deepstack_merger_list = nn.ModuleList(
            Merger(config, config.merged_width) for _ in config.deepstack_visual_indexes)
        self.apply(init_weights)

    def forward(self, x):
        mergers = (self.merger, *self.deepstack_merger_list)
        return torch.stack([merge(tap) for merge, tap in zip(mergers, x.chunk(len(mergers), dim=-1))], dim=1)


# ----------------------------------------------------------------------------- text

@dataclass
class TextConfig(LlamaConfig):
    """The fields of the hub's config.json."""
    mrope_section: tuple = (24, 20, 20)  # pairs of channels that turn by time, row and column
    tie_word_embeddings: bool = False


class TextAttention(LlamaAttention):
    """LLaMA's, but that each head of queries and keys is normalised before it is rotated."""

    def __init__(self, config):
        super().__init__(config)
        self.q_norm = RMSNorm(self.hs, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.hs, config.rms_norm_eps)

    def forward(self, x, cos, sin, mask, cache=None, layer=0):
        q, k, v = (proj(x).unflatten(-1, (-1, self.hs)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        y = cache.attend(layer, q, k, v) if cache else attend(q, k, v, mask)  # (T, nh, hs)
        return self.o_proj(y.flatten(1))


def interleaved_angles(positions, config):
    """
    (T, 3) positions, or (T,) where all three are the same -> cos and sin, each (T, 1, hs) float32.

    Pair k of channels turns by position / theta^(2k / hs): by the row where k mod 3 is 1, by the column where
    it is 2, as long as mrope_section lasts; all others by time.
    """
    pair = torch.arange(config.head_size // 2, device=positions.device)
    last = torch.tensor([0, *config.mrope_section[1:]], device=pair.device)[pair % 3]
    axis = torch.where(pair < 3 * last, pair % 3, 0)  # (hs/2,)
    positions = positions if positions.dim() == 2 else positions[:, None].expand(-1, 3)
    return half_split(positions[:, axis].float() / config.rope_theta ** (2 * pair / config.head_size))


class TextBlock(LlamaBlock):
    Attention = TextAttention


class Text(LLaMA):
    """The decoder: a LLaMA with norms of queries and keys, positions of three axes, and DeepStack."""

    Block = TextBlock

    def __init__(self, config):
        super().__init__(config)
        self.model = nn.ModuleDict(dict(language_model=self.model))  # as the checkpoint names it
        if config.tie_word_embeddings:
            del self.lm_head

    @property
    def blocks(self):
        return self.model.language_model.layers

    def embed(self, tokens, image_tokens=None, image_at=None):
        """(T,) token ids -> (T, C) embeddings, the first of (N, K, C) image tokens over those at image_at, (N,)."""
        x = self.model.language_model.embed_tokens(tokens).to(self.model.language_model.norm.weight.dtype)
        return x if image_tokens is None else x.index_copy(0, image_at, image_tokens[:, 0].to(x.dtype))

    def forward(self, tokens, positions=None, mask=None, wanted=None, image_tokens=None, image_at=None,
                cache=None, keys=None):
        """
        As model.LLaMA's, but that positions may be (T, 3), and image_tokens are (N, K, C): number j + 1 of the K
        is added to what layer j gives at image_at.
        """
        if self.dropout_keys:
            self.dropout_keys.set(keys, wanted)
        if positions is None:
            positions = torch.arange(len(tokens), device=tokens.device)
        mask = [(len(tokens), None, 0)] if mask is None else mask
        x = self.embed(tokens, image_tokens, image_at)
        cos, sin = interleaved_angles(positions, self.config)
        deepstack = () if image_tokens is None else image_tokens.unbind(1)[1:]
        # The last block may leave out what is not wanted, unless DeepStack adds to all of it
        last = len(self.blocks) - 1 if len(deepstack) < len(self.blocks) else None
        for layer in range(len(self.blocks)):
            x = self.run_layer(layer, x, cos, sin, mask, cache, wanted if layer == last else None)
            if layer < len(deepstack):
                x = x.index_add(0, image_at, deepstack[layer].to(x.dtype))
        x = x if wanted is None or last is not None else x[wanted]
        x = self.model.language_model.norm(x)
        if self.config.tie_word_embeddings:
            return F.linear(x, self.model.language_model.embed_tokens.weight.to(x.dtype)).float()
        return self.lm_head(x).float()
