"""
What computes the same numbers sooner on some machines: the code of model.py reads the same without it.
"""

from importlib.util import find_spec

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

HAS_TRITON = find_spec("triton") is not None  # which torch.compile needs on a GPU
# Compiled when they are first called, on a GPU alone, for sequences of any length. Elsewhere nothing calls
# them, and the compiler, whose import takes longer than torch's own, stays out
compiled_flex_attention, compiled_create_block_mask = (
    torch.compile(function, dynamic=True) if HAS_TRITON else function
    for function in (flex_attention, create_block_mask))


def linear(x, weight, bias=None):
    """
    F.linear, on a CPU with AVX-512 by way of a convolution of one pixel. oneDNN computes that with
    these instructions; F.linear leaves its product to MKL, which on AMD's CPUs does without them and
    takes twice as long.
    """
    T = x.numel() // x.shape[-1]
    if (x.device.type != "cpu" or T < 128 or torch.get_num_threads() == 1
            or torch.backends.cpu.get_cpu_capability() != "AVX512"):
        return F.linear(x, weight, bias)
    pixels = x.reshape(1, T, 1, x.shape[-1]).permute(0, 3, 1, 2)  # (1, C, T, 1), channels last
    y = F.conv2d(pixels, weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def add_sink(q, k, v, mask, sinks):
    """
    (R, nh, T, hs) queries, (R, nkv, S, hs) keys and values and their mask, such that all queries may also look at
    nothing: at a key and a value of zeros, which come first, and which a head's queries score as its sink, (nh,),
    says. One channel more makes that score, so that any kernel computes it, with its gradient. mask: (..., T, S), or
    None for causal, which then has a query more in front.
    """
    T, hs = q.shape[2:]
    scores = (sinks.to(q.dtype) * hs ** 0.5)[:, None, None].expand(*q.shape[:2], T, 1).reshape(*q.shape[:3], 1)
    q, k, v = torch.cat([q, scores], dim=-1), F.pad(k, (0, 1, 1, 0)), F.pad(v, (0, 1, 1, 0))
    k = k + F.pad(k.new_ones(1, 1), (hs, 0, 0, k.shape[2] - 1))  # (S + 1, hs + 1), 1 in the first key's last channel
    if mask is None:
        return F.pad(q, (0, 0, 1, 0)), k, v, None
    return q, k, v, F.pad(mask, (1, 0), value=mask.dtype == torch.bool)


class Linear(nn.Linear):
    """nn.Linear by the function above."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def compile_blocks(blocks, **settings):
    """
    torch.compile each block, for a GPU: small operations become few kernels. Blocks of a kind share what is
    compiled, once for each kind of input: with gradients and without, one image and several, and the last
    block, which goes on with wanted tokens alone. Lengths are no kind of their own (dynamic).
    """
    torch._dynamo.config.recompile_limit = 64  # torch's 8 are fewer than these kinds, and would end it silently
    for block in blocks:
        block.compile(dynamic=True, **settings)
