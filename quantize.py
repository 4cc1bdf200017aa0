"""
A frozen base in few bits: matrices stored low, and brought back one at a time where they are multiplied.

    y = x W^T + b,   dx = dy W      W: (out, in), made from its codes for each of the two, and dropped again

    16   bfloat16, 2 bytes a weight
     8   int8 times a float32 of its row: W[i, j] = codes[i, j] * scale[i]
     4   nf4 of QLoRA (arXiv 2305.14314), in the layout and with the numbers of bitsandbytes: the flattened
         matrix in blocks of 64, W = BOOK[code] * scale of its block, two codes a byte, the first of them high.
         Scales are stored less their mean, in 8 bits, in groups of 256: scale = MAP[code] * step of its group
         + mean. In all 4.13 bits a weight.

Only x gets a gradient. What trains beside such a matrix is LoRA's, in float32, see lora.py: embeddings, norms and
heads stay as they are. Products are computed in autocast's dtype, elsewhere in that of x.
"""

import torch
import torch.nn as nn

from plumbing.kernels import linear

BLOCK, GROUP = 64, 256  # weights that share a scale, and scales that share a step
PIECE = 1 << 22  # weights that are brought to nf4 at a time, to save memory

# Where a normal distribution has as much on either side, scaled to [-1, 1], with a zero: the paper's appendix E
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)


def code_books(device):
    """nf4's codes (16,), pairs of them by the byte that holds two (256, 2), and the map of scales (256,); float32."""
    book = torch.tensor(NF4, device="cpu")
    # Dynamic: seven decades, each with twice as many steps as the one below it (arXiv 1511.04561)
    edges = [torch.linspace(0.1, 1, 2 ** decade + 1, device="cpu") for decade in range(7)]
    decades = [10.0 ** (decade - 6) * (edge[:-1] + edge[1:]) / 2 for decade, edge in enumerate(edges)]
    ends = torch.tensor([0.0, 1.0], device="cpu")
    scales = torch.cat([*decades, *(-decade for decade in decades), ends]).sort().values
    return book.to(device), torch.cartesian_prod(book, book).to(device), scales.to(device)


def nearest(values, book):
    """Each value's nearest entry of a sorted book, as int32; of two as near the lower one."""
    return torch.bucketize(values, (book[1:] + book[:-1]) / 2, out_int32=True)


def in_rows(values, length):
    """(n,) -> (rows, length), with zeros behind the last."""
    return nn.functional.pad(values, (0, -len(values) % length)).view(-1, length)


def to_nf4(weight):
    """
    (out, in) -> codes (blocks, 32) uint8; the codes of the blocks' scales (blocks,) uint8, with their steps
    (groups,) and mean (), float32; and the two books that bring them back.
    """
    book, pairs, scales = code_books(weight.device)
    codes, largest = [], []
    for piece in weight.reshape(-1).split(PIECE):
        piece = in_rows(piece.float(), BLOCK)
        largest.append(piece.abs().amax(1))
        code = nearest(piece * (1 / largest[-1].clamp(min=1e-38)[:, None]), book).to(torch.uint8)
        codes.append(code[:, ::2] << 4 | code[:, 1::2])
    scale = torch.cat(largest)
    mean = scale.mean()
    groups = in_rows(scale - mean, GROUP)
    step = groups.abs().amax(1)
    code = nearest(groups * (1 / step.clamp(min=1e-38)[:, None]), scales).to(torch.uint8)
    return torch.cat(codes), code.view(-1)[:len(scale)].clone(), step, mean, pairs, scales


def from_nf4(codes, scale, step, mean, pairs, scales, shape):
    """What to_nf4 gives -> the float32 (out, in) that it stands for."""
    groups = in_rows(scales.index_select(0, scale.int()), GROUP) * step[:, None]
    scale = groups.view(-1)[:len(scale)] + mean
    values = pairs.index_select(0, codes.view(-1).int()).view(-1, BLOCK).mul_(scale[:, None])
    return values.view(-1)[:shape.numel()].view(shape)


def to_int8(weight):
    """(out, in) -> codes (out, in) int8, and what each row of them is multiplied by, (out, 1) float32."""
    scale = (weight.abs().amax(1, keepdim=True).float() / 127).clamp(min=1e-30)
    return (weight / scale).round_().to(torch.int8), scale


def dequantise(stored, bits, shape, dtype):
    """The weight (out, in) that a LowLinear's buffers stand for, in a dtype."""
    if bits == 4:
        return from_nf4(*stored, shape).to(dtype)
    return stored[0].to(dtype) if bits == 16 else stored[0].float().mul_(stored[1]).to(dtype)


# Closed to torch.compile, which would see that forward and backward make the same weight, and keep it in between
@torch.library.custom_op("nanomedq::multiply", mutates_args=())
def multiply(x: torch.Tensor, stored: list[torch.Tensor], bits: int, shape: list[int], transposed: bool,
             bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b, or x W: transposed."""
    weight = dequantise(stored, bits, torch.Size(shape), x.dtype)
    return linear(x, weight.T if transposed else weight, bias)


@multiply.register_fake
def _(x, stored, bits, shape, transposed, bias=None):
    return x.new_empty(*x.shape[:-1], shape[transposed])


class Product(torch.autograd.Function):
    """x W^T + b of a LowLinear. W is made again for the backward pass: nothing of its size is kept until then."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return layer.multiply(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.layer.multiply(gradient, transposed=True), None


class LowLinear(nn.Linear):
    """
    A frozen nn.Linear in 16, 8 or 4 bits, filled by store(). `weight` has its shape alone, on the meta device, and
    stays there; the codes are buffers that no file gets: the base is loaded from its own.
    """

    def __init__(self, plain, bits):
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        self.bits, self.bias = bits, plain.bias
        self.requires_grad_(False)

    def store(self, weight):
        """Keep an (out, in) weight of any dtype, in few bits, on its device."""
        stored = {16: lambda: [weight.to(torch.bfloat16)], 8: lambda: to_int8(weight), 4: lambda: to_nf4(weight)}
        for name, tensor in zip(("codes", "scale", "step", "mean", "pairs", "scales"), stored[self.bits]()):
            self.register_buffer(name, tensor, persistent=False)

    def dequantise(self, dtype=torch.float32):
        """The weight (out, in) that is stored, in a dtype."""
        return dequantise([*self.buffers()], self.bits, self.weight.shape, dtype)

    def bias_in(self, dtype):
        return None if self.bias is None else self.bias.to(dtype)

    def multiply(self, x, transposed=False):
        """x W^T + b, or x W: transposed."""
        return multiply(x, [*self.buffers()], self.bits, self.weight.shape, transposed,
                        None if transposed else self.bias_in(x.dtype))

    def forward(self, x):
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return Product.apply(x.to(dtype), self)

    def _apply(self, function, recurse=True):
        """nn.Module's, by which `.to` moves: a shape has no values to be moved."""
        shape, self.weight = self.weight, None
        super()._apply(function, recurse)
        self.weight = shape
        return self


def store_low(module, bits):
    """Put a LowLinear in place of each nn.Linear inside a module on the meta device. 0 bits: leave it as it is."""
    for parent in [*module.modules()] if bits else []:
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, LowLinear(child, bits))
