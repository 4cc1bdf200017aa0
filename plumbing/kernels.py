"""
What computes the same numbers sooner on some machines: the code of model.py reads the same without it.
"""

import functools
from importlib.util import find_spec

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

BUNDLE = 128  # tokens of the branches that are computed together
HAS_TRITON = find_spec("triton") is not None  # which torch.compile needs on a GPU


@functools.cache
def compiled(function):
    """torch.compile's of a function. Not before it is called: the compiler's import takes as long as torch's own."""
    return torch.compile(function, dynamic=True)


def call_compiled(function, *inputs, **settings):
    """
    A function of FlexAttention on a GPU, which is compiled when it is first called, for sequences of any length, or as
    a part of a block that is compiled.
    """
    whole = HAS_TRITON and not torch.compiler.is_compiling()
    return (compiled(function) if whole else function)(*inputs, **settings)


compiled_flex_attention, compiled_create_block_mask = (
    functools.partial(call_compiled, function) for function in (flex_attention, create_block_mask))


def linear(x, weight, bias=None):
    """
    F.linear, on a CPU with AVX-512 by way of a convolution of one pixel. oneDNN computes that with
    these instructions; F.linear leaves its product to MKL, which on AMD's CPUs does without them and
    may take twice as long.
    """
    T = x.numel() // x.shape[-1]
    if (x.device.type != "cpu" or T < 128 or torch.get_num_threads() == 1
            or torch.backends.cpu.get_cpu_capability() != "AVX512"):
        return F.linear(x, weight, bias)
    in_full = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    product = Product.apply if in_full and weight.requires_grad else convolve
    return product(x.reshape(T, -1), weight, bias).view(*x.shape[:-1], -1)


def as_pixels(x):
    """(T, C) -> (1, C, T, 1), a column of pixels, channels last: a view."""
    return x[None, :, None].permute(0, 3, 1, 2)


def convolve(x, weight, bias=None):
    """F.linear of (T, in), by way of that convolution."""
    return F.conv2d(as_pixels(x), weight[:, :, None, None], bias).permute(0, 2, 3, 1).flatten(0, 2)  # (T, out)


class Product(torch.autograd.Function):
    """
    convolve() for a weight that trains. Its gradient is a plain product here: a convolution takes up to four times as
    long for it, by what divides T.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return convolve(x, weight, bias).detach()  # a view that autograd knows could not be altered in place

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (x, weight), wanted, dx = ctx.saved_tensors, ctx.needs_input_grad, None
        if wanted[0]:
            dx, *_ = torch.ops.aten.convolution_backward(as_pixels(dy), as_pixels(x), weight[:, :, None, None], None,
                                                         (1, 1), (0, 0), (1, 1), False, (0, 0), 1, (True, False, False))
            dx = dx.permute(0, 2, 3, 1).flatten(0, 2)  # (T, in)
        return dx, dy.T @ x if wanted[1] else None, dy.sum(0) if wanted[2] else None


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


def group_masks(group, branch):
    """
    model.packed_mask as a list of pieces of the sequence, (tokens, who sees whom, back). Who sees whom: (tokens,
    tokens) bool, or None for causal. Where back is not 0, the piece also sees the end of that which is so many before
    it, and who sees whom is (tokens, more than those). A group of several branches comes in its prefix, and behind
    that in some branches at a time, so that little is computed of what branches would have to do with one another.
    """
    group, branches = group.cpu(), branch.cpu()  # waits for a GPU here, not three times for each group
    ends = [*(1 + (group[1:] != group[:-1]).nonzero()[:, 0]).tolist(), len(group)]
    pieces = []
    for begin, end in zip([0, *ends], ends):
        number, counts = branches[begin:end].unique_consecutive(return_counts=True)
        if number.max() <= 1:
            pieces.append((end - begin, None, 0))
            continue
        prefix = int(counts[0]) if number[0] == 0 else 0
        pieces += [(prefix, None, 0)] * (prefix > 0)
        sizes = bundle(counts[prefix > 0:].tolist(), prefix)
        for back, own in enumerate(branch[begin + prefix:end].split(sizes), 1):
            seen = (own[None] == own[:, None]).tril()
            pieces.append((len(own), F.pad(seen, (prefix, 0), value=True), back * (prefix > 0)))
    return pieces


def bundle(counts, prefix):
    """Sizes of pieces of whole branches that have so many tokens each: about half of their prefix, or BUNDLE."""
    sizes, most = [0], max(BUNDLE, prefix // 2)
    for count in counts:
        if sizes[-1] and sizes[-1] + count > most:
            sizes.append(0)
        sizes[-1] += int(count)
    return sizes


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
