"""
MXFP4, in which gpt-oss's experts are published (OCP Microscaling Formats 1.0): matrices as they lie in the file, and
decoded one at a time where they are multiplied, forward and backward.

    W[r, 32 g + 2 b + n] = VALUES[nibble n of blocks[r, g, b], the low one first] * 2 ^ (scales[r, g] - 127)

A weight takes 4.25 bits. Each product of a value and a power of two is exact in bfloat16 and float32. blocks: (out,
in / 32, 16) uint8; scales: (out, in / 32) uint8, of which 255 stands for no number.
"""

import torch

from plumbing.flags import UserError
from plumbing.kernels import linear
from quantize import LowLinear

BLOCK = 32  # weights that share a scale
# By nibble: sign, two bits of exponent, one of mantissa
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def byte_pairs(dtype, device):
    """The two values of each byte, low nibble first, as one number of twice the size of dtype, (256,)."""
    values = torch.tensor(VALUES, dtype=dtype, device=device)
    pairs = torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=1)  # (256, 2)
    return pairs.view(torch.int64 if dtype == torch.float32 else torch.int32)[:, 0]


def powers_of_two(scales):
    """2 ^ (scale - 127) of uint8 scales, float32, NaN of 255: a float's exponent, of both ends with a fraction bit."""
    bits = scales.int()
    return (bits << 23 | (bits % 255 == 0).int() << 22).view(torch.float32)


def decode(blocks, scales, dtype=torch.float32):
    """(..., out, groups, 16) uint8 blocks, (..., out, groups) uint8 scales -> (..., out, 32 groups) weights."""
    exact = dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32
    pairs = byte_pairs(exact, blocks.device).index_select(0, blocks.flatten().int())
    values = pairs.view(exact).view(*scales.shape, BLOCK)
    return values.mul_(powers_of_two(scales).to(exact)[..., None]).flatten(-2).to(dtype)


def encode(weight):
    """(out, in) -> blocks and scales, each block's largest value within reach; of two values as near the lower one."""
    groups = weight.float().unflatten(-1, (-1, BLOCK))
    largest = groups.abs().amax(-1).clamp(min=2.0 ** -125)
    scales = largest.frexp().exponent.int() - 1 - 2 + 127  # 6, the largest value, has an exponent of 2
    shares = (groups / powers_of_two(scales.clamp(0, 254))[..., None]).contiguous()
    steps = torch.tensor(VALUES[:8], device=weight.device)
    codes = torch.bucketize(shares.abs(), (steps[1:] + steps[:-1]) / 2) + 8 * (shares < 0)
    codes = codes.to(torch.uint8).unflatten(-1, (-1, 2))
    return codes[..., 0] | codes[..., 1] << 4, scales.clamp(0, 254).to(torch.uint8)


class MXLinear(LowLinear):
    """A frozen nn.Linear whose weight is in MXFP4, filled by hold()."""

    def __init__(self, plain):
        super().__init__(plain, 4)

    def hold(self, blocks, scales):
        """Keep blocks and scales as they are: slices of what several matrices have in common take no room twice."""
        if scales.numel() and scales.max() == 255:
            raise UserError("a scale of 255, which stands for no number")
        self.register_buffer("codes", blocks, persistent=False)
        self.register_buffer("scale", scales, persistent=False)

    def store(self, weight):
        self.hold(*encode(weight))

    def dequantise(self, dtype=torch.float32):
        return decode(self.codes, self.scale, dtype)

    def multiply(self, x, transposed=False):
        weight = self.dequantise(x.dtype)
        return linear(x, weight.T) if transposed else linear(x, weight, self.bias_in(x.dtype))
