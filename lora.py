"""
LoRA (arXiv 2106.09685): a frozen matrix W plus a trained product of two thin ones.

    y = x W^T + alpha / r * dropout(x) A^T B^T      W: (out, in)   A: (r, in)   B: (out, r)

A starts Kaiming-uniform and B zero, so that training starts from the frozen model exactly.
"""

import math
import zlib

import torch
import torch.nn as nn
import torch.nn.functional as F

from plumbing.flags import UserError


def scramble(x):
    """Hash int32s, each bit of the result by every bit of x: Murmur3's finalizer. Products wrap."""
    x = (x ^ (x >> 16 & 0xFFFF)) * -2048144789
    x = (x ^ (x >> 13 & 0x7FFFF)) * -1028477387
    return x ^ (x >> 16 & 0xFFFF)


def token_keys(key, position):
    """(T,) int32 keys of samples and positions in them -> (T,) int32, one for each token."""
    return scramble(scramble(key) + position.to(torch.int32))


class DropoutKeys:
    """
    Which tokens a model is being run on, for its LoRALinears to drop by: int32 keys of all, (T,) or of
    images (I, N), and of those that are wanted behind the last attention, (M,). None: by torch's generator.

    What is dropped is thereby a function of sample, token, layer and channel, however samples are packed, cut
    and divided among processes. A block that is recomputed asks again: run backward before the next forward.
    """

    all = wanted = None

    def set(self, keys, wanted=None):
        self.all, self.wanted = keys, keys if keys is None or wanted is None else keys[wanted]


class LoRALinear(nn.Module):
    """
    A frozen nn.Linear, kept as `base`, with a trained low-rank update beside it. name: its path in the
    model, by which layers drop different channels; keys: the DropoutKeys of the model.
    """

    def __init__(self, base, r, alpha, dropout=0.0, name="", keys=None):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / r
        self.dropout, self.keys = dropout, keys or DropoutKeys()
        device, self.name = next(iter([*base.buffers(), base.weight])).device, name
        # A tensor, since torch.compile takes another number for another program
        self.register_buffer("salt", torch.zeros((), dtype=torch.int32, device=device), persistent=False)
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, device=device))  # float32 even
        self.lora_B = nn.Parameter(torch.empty(base.out_features, r, device=device))  # on a bf16 base
        self.unmerged = None  # the base's own weight while the update is merged into it
        self.reset()

    @torch.no_grad()
    def reset(self):
        """Begin anew, with an update of zero."""
        self.salt.fill_(zlib.crc32(self.name.encode()) >> 1)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x):
        y = self.base(x)
        if self.unmerged is not None:
            return y
        if self.dropout and self.training:
            x = self.drop(x)
        x = self.scale * (x @ self.lora_A.to(x.dtype).T)  # (..., in) -> (..., r)
        return y + (x @ self.lora_B.to(x.dtype).T).to(y.dtype)  # (..., r) -> (..., out)

    def drop(self, x):
        """Inputs (..., in) with a share of `dropout` of them 0 and the others raised to make up for it."""
        keys = self.keys.all
        if keys is None:
            return F.dropout(x, self.dropout)
        keys = keys if keys.shape == x.shape[:-1] else self.keys.wanted  # (T,) or (I, N); behind the last: (M,)
        channel = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
        random = scramble(keys[..., None] ^ scramble(channel + self.salt))  # (..., in), -2^31 to 2^31 - 1
        return x.masked_fill(random < int(self.dropout * 2 ** 32) - 2 ** 31, 0) / (1 - self.dropout)

    @torch.no_grad()
    def merge(self):
        """Add the update to the base's weight; a second call changes nothing."""
        if self.unmerged is None:
            if self.base.weight.is_meta:
                raise UserError("LoRA is not merged into a base of few bits; load that with --base_bits=0")
            self.unmerged = self.base.weight.data
            update = self.scale * (self.lora_B @ self.lora_A)  # (out, in)
            self.base.weight.data = (self.unmerged.float() + update).to(self.unmerged.dtype)

    @torch.no_grad()
    def unmerge(self):
        """Put the base's own weight back: kept, not recomputed, hence the same bits."""
        if self.unmerged is not None:
            self.base.weight.data = self.unmerged
            self.unmerged = None


def add_lora(model, targets, r=8, alpha=16, dropout=0.0):
    """
    Freeze a model and put a LoRALinear around each nn.Linear whose name ends in one of `targets`
    (comma-separated, such as "q_proj,v_proj"). Returns their names.
    """
    suffixes = [target.strip() for target in targets.split(",")]
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for suffix in suffixes:
        if not any(("." + name).endswith("." + suffix) for name in linear):
            raise UserError(f"LoRA target {suffix!r} names no matrix of the {type(model).__name__}; it "
                            f"has {', '.join(sorted({name.split('.')[-1] for name in linear}))}")
    chosen = [name for name in sorted(linear)
              if any(("." + name).endswith("." + suffix) for suffix in suffixes)]
    model.requires_grad_(False)
    model.dropout_keys = DropoutKeys() if dropout else None
    for name in chosen:
        parent, _, child = name.rpartition(".")
        wrapped = LoRALinear(model.get_submodule(name), r, alpha, dropout, name, model.dropout_keys)
        setattr(model.get_submodule(parent), child, wrapped)
    return chosen


def lora_layers(model):
    """Name -> LoRALinear."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
