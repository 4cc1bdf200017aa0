"""
gpt-oss, the language model of MedGPT-oss (arXiv 2508.10925, 2603.00842), by hand: a LLaMA with biases and sinks in its
attention, of which every other layer sees no further than a window, and with experts in place of its MLP.

    x -> norm -> attention, every other within 128 positions -> + -> norm -> router -> 4 of 32 experts -> +

    attention     p_j = exp(l_j) / (exp(sink) + sum_k exp(l_k)): a head may look at nothing, more so by a higher sink
    router        the 4 experts with the largest logits, weighted by the softmax over those 4
    expert        (up + 1) * gate * sigmoid(1.702 gate), gate at most 7, up within -7 and 7; both with biases
    positions     YaRN (arXiv 2309.00071): slow channels turn 32 times slower, queries and keys grow by 1.35 each

The formulas are those of transformers' modeling_gpt_oss.py, to which tests/test_gpt_oss.py holds this file. The window
is measured in positions, not in places of the packed sequence, where the branches behind a shared prefix stand far from
its end. In 32 bits, whatever the weights are: the router, the statistics of norms, sines and cosines.

Letters: T tokens, C width, nh heads, nkv key-value heads, hs head size, E experts, K of them for a token, D width of an
expert. The 20B's sizes: C=2880 nh=64 nkv=8 hs=64 E=32 K=4 D=2880.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, and_masks

from model import LLaMA, LlamaBlock, LlamaConfig, RMSNorm, attend, half_split, rotate
from plumbing.kernels import Linear, compiled_create_block_mask

SLIDING, FULL = "sliding_attention", "full_attention"
PIECE = 256  # tokens of a group whose attention within a window is computed at a time


@dataclass
class GptOssConfig(LlamaConfig):
    """gpt-oss-20b; the fields are those of the hub's config.json, and of the YaRN in it."""
    vocab_size: int = 201088
    hidden_size: int = 2880
    intermediate_size: int = 2880  # of an expert
    num_hidden_layers: int = 24
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    head_dim: int = 64
    rms_norm_eps: float = 1e-5
    rope_theta: float = 150000.0
    num_local_experts: int = 32
    num_experts_per_tok: int = 4
    sliding_window: int = 128  # positions, a token's own among them
    layer_types: tuple = ()  # of each layer; none: sliding and full in turns
    swiglu_limit: float = 7.0
    factor: float = 32.0  # of YaRN: how many times longer than trained for
    beta_fast: float = 32.0  # channels that turn more often than this in the trained length stay as they are
    beta_slow: float = 1.0  # those that turn less often are slowed by the factor
    original_max_position_embeddings: int = 4096
    truncate: bool = False  # round the channels of both limits outwards

    def __post_init__(self):
        types = tuple(self.layer_types) or (SLIDING, FULL) * self.num_hidden_layers
        self.layer_types = types[:self.num_hidden_layers]

    def slides(self, layer):
        return self.layer_types[layer] == SLIDING


# ----------------------------------------------------------------------------- positions

def yarn_speeds(config, device=None):
    """(hs/2,) by how much each pair of channels turns from one position to the next, float32."""
    half, theta = config.head_size // 2, config.rope_theta
    pair = torch.arange(half, dtype=torch.float32, device=device)
    fast = theta ** (-pair / half)
    # The pair that turns so often in the trained length
    low, high = (half * math.log(config.original_max_position_embeddings / (turns * 2 * math.pi)) / math.log(theta)
                 for turns in (config.beta_fast, config.beta_slow))
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    slowed = ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)
    return fast * (1 - slowed) + fast / config.factor * slowed


def near_masks(mask, positions, window):
    """
    packed_mask's with a window: who may see whom, of those that are fewer than `window` positions away. positions:
    (T,), of a sample, in which a branch goes on where its prefix ends. A long group of one sample comes in pieces.
    """
    if isinstance(mask, BlockMask):
        def near(sequence, head, at, other):
            return positions[at] - positions[other] < window

        return compiled_create_block_mask(and_masks(mask.mask_mod, near), None, None, len(positions), len(positions),
                                          device=positions.device)
    masks, places = [], positions.split([length for length, *_ in mask])
    for number, ((length, seen, back), own) in enumerate(zip(mask, places)):
        shared = any(more[2] for more in mask[number + 1:number + 2])  # by branches, which want it in one piece
        if back:
            seen = seen & (own[:, None] - torch.cat([places[number - back], own]) < window)
            masks.append((length, seen, back))
        elif length <= window:  # nobody is far from anybody
            masks.append((length, seen, 0))
        elif seen is not None or shared:
            near = own[:, None] - own[None] < window
            masks.append((length, near & seen if seen is not None else near.tril(), 0))
        else:  # one token after the other: each piece sees itself and what is just before it
            size = max(PIECE, window)
            for at in range(0, length, size):
                ahead = own[at:at + size, None] - own[None, max(at - window + 1, 0):at + size]
                masks.append((len(ahead), (ahead >= 0) & (ahead < window), int(at > 0)))
    return masks


# ----------------------------------------------------------------------------- layers

class Norm(RMSNorm):
    """RMSNorm that multiplies by its weight before it rounds, where LLaMA's does so after."""

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight.float() * wide).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.hs = config, config.head_size
        inner, keys = (heads * self.hs for heads in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = Linear(config.hidden_size, inner)
        self.k_proj = Linear(config.hidden_size, keys)
        self.v_proj = Linear(config.hidden_size, keys)
        self.o_proj = Linear(inner, config.hidden_size)
        self.sinks = nn.Parameter(torch.zeros(config.num_attention_heads))

    def forward(self, x, cos, sin, mask, cache=None, layer=0):
        q, k, v = (proj(x).unflatten(-1, (-1, self.hs)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache:
            y = cache.attend(layer, q, k, v, self.sinks, near=self.config.slides(layer))
        else:
            y = attend(q, k, v, mask, self.sinks)  # (T, nh, hs)
        return self.o_proj(y.flatten(1))


class ClampedSwiGLU(torch.autograd.Function):
    """
    (T, 2D) of a gate and an up in turns -> (T, D) (up + 1) * gate * sigmoid(1.702 gate), both clamped. Its input alone
    is kept for the backward pass, where autograd's own would keep seven times as much. On a CPU a few rows at a time,
    so that what comes in between stays in the cache.
    """

    @staticmethod
    def parts(x, limit):
        """gate and up + 1, clamped, as new tensors."""
        return x[:, ::2].clamp(max=limit), x[:, 1::2].clamp(-limit, limit).add_(1)

    @staticmethod
    def forward(ctx, x, limit):
        ctx.save_for_backward(x)
        ctx.limit, ctx.rows = limit, 128 if x.device.type == "cpu" else max(len(x), 1)
        y = x.new_empty(len(x), x.shape[1] // 2)
        for some, target in zip(x.split(ctx.rows), y.split(ctx.rows)):
            gate, up = ClampedSwiGLU.parts(some, limit)
            torch.mul(up, gate, out=target)
            target.mul_(gate.mul_(1.702).sigmoid_())
        return y

    @staticmethod
    def backward(ctx, gradient):
        (x,), limit = ctx.saved_tensors, ctx.limit
        dx = torch.empty_like(x)
        for some, dy, target in zip(x.split(ctx.rows), gradient.split(ctx.rows), dx.split(ctx.rows)):
            gate, up = ClampedSwiGLU.parts(some, limit)
            share = torch.sigmoid(1.702 * gate)
            dy = dy * share
            target[:, 1::2] = (dy * gate).mul_(some[:, 1::2].abs() <= limit)
            slope = gate.mul_(1.702).mul_(1 - share).add_(1)  # of gate * sigmoid(1.702 gate), over the sigmoid
            target[:, ::2] = slope.mul_(up).mul_(dy).mul_(some[:, ::2] <= limit)
        return dx, None


class Expert(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.limit = config.swiglu_limit
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.down_proj(ClampedSwiGLU.apply(self.gate_up_proj(x), self.limit))


class Router(nn.Module):
    """Which experts a token has, and how much of each. No nn.Linear, so that it stays as it is beside LoRA."""

    def __init__(self, config):
        super().__init__()
        self.K = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.hidden_size).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(config.num_local_experts))

    def forward(self, x):
        """Of (T, C) tokens the weights of K experts each, (T, K) float32, and which they are, (T, K)."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float(), self.bias.float())  # (T, E)
        largest, chosen = logits.topk(self.K, dim=-1)
        return largest.softmax(-1), chosen


class Reorder(torch.autograd.Function):
    """
    x[order // K]: of (T, C) rows K copies each, as a permutation of all copies, (T K,), has them; back: that which
    undoes it. The gradient is gathered, too: indexing's own adds one row after the other.
    """

    @staticmethod
    def forward(ctx, x, order, back, K):
        ctx.back, ctx.K = back, K
        return x.index_select(0, order // K)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.index_select(0, ctx.back).unflatten(0, (-1, ctx.K)).sum(1), None, None, None


class Experts(nn.Module):
    """The router and what it chooses from. No token is dropped, and no auxiliary loss evens the choices out."""

    dropout_keys = None  # as GptOss's

    def __init__(self, config):
        super().__init__()
        self.router = Router(config)
        self.experts = nn.ModuleList(Expert(config) for _ in range(config.num_local_experts))

    def run(self, expert, x, rows, T):
        """What an expert makes of (n, C), those rows of T tokens; its LoRA drops by these tokens' keys."""
        keys = self.dropout_keys
        if not keys or keys.all is None:
            return expert(x)
        before = keys.all, keys.wanted
        keys.set((keys.all if len(keys.all) == T else keys.wanted)[rows])
        y = expert(x)
        keys.all, keys.wanted = before
        return y

    def forward(self, x):
        if not len(x):  # where a prefix is run for its keys and values alone
            return x
        weights, chosen = self.router(x)
        T, K = chosen.shape
        order = chosen.flatten().argsort(stable=True)  # (T K,): expert after expert
        back = order.argsort()
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        parts = zip(self.experts, Reorder.apply(x, order, back, K).split(counts), (order // K).split(counts))
        y = torch.cat([self.run(expert, part, rows, T) for expert, part, rows in parts if len(rows)])  # (T K, C)
        y = Reorder.apply(y, back, order, 1).unflatten(0, (T, K)) * weights[..., None]
        # Summed by token, in the order of its experts, which gives the same numbers on any device each time
        return y.sum(1).to(x.dtype)


class Block(LlamaBlock):
    Attention, MLP, Norm = Attention, Experts, Norm

    def compile(self, **settings):
        """As plumbing.kernels.compile_blocks has it, all but the experts: what each gets is known once it runs."""
        self.mlp.forward = torch.compiler.disable(self.mlp.forward)  # not before: see plumbing/kernels.py
        super().compile(**settings)


class GptOss(LLaMA):
    Block = Block

    def angles(self, positions):
        """cos and sin at (T,) positions, each (T, 1, hs) float32, by how much YaRN has queries and keys grow, too."""
        growth = 0.1 * math.log(self.config.factor) + 1 if self.config.factor > 1 else 1.0
        cos, sin = half_split(positions[:, None].float() * yarn_speeds(self.config, positions.device))
        return growth * cos, growth * sin

    def run_layer(self, layer, x, cos, sin, mask, cache, wanted):
        return super().run_layer(layer, x, cos, sin, mask[self.config.slides(layer)], cache, wanted)

    def forward(self, tokens, positions=None, mask=None, wanted=None, image_tokens=None, image_at=None, cache=None,
                keys=None):
        """As model.LLaMA's; positions, (T,), are those within a sample."""
        if positions is None:
            positions = torch.arange(len(tokens), device=tokens.device)
        mask = [(len(tokens), None, 0)] if mask is None else mask
        near = mask if cache else near_masks(mask, positions, self.config.sliding_window)  # a Cache has its own
        for block in self.blocks:
            block.mlp.dropout_keys = self.dropout_keys
        return super().forward(tokens, positions, (mask, near), wanted, image_tokens, image_at, cache, keys)
