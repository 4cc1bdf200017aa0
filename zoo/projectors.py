"""
Projectors beside the linear one of OpenMedQ: two-layer MLPs, with the names of their checkpoints.

    linear    Linear                                  OpenMedQ
    mlp       Linear, GELU, Linear                    LLaVA-1.5's mm_projector.{0,2} (arXiv 2310.03744)
    mlp1      LayerNorm, Linear, GELU, Linear         InternVL's mlp1.{0,1,3} (arXiv 2404.16821)
"""

import torch.nn as nn

from model import init_weights
from plumbing.kernels import Linear
from plumbing.tensors import tensor_shapes


def make_projector(kind, width, hidden):
    """A projector from `width` channels of an encoder's tokens to `hidden` of a language model's, of a kind above."""
    first = Linear(width, hidden)
    if kind == "linear":
        return first.apply(init_weights)
    norm = [nn.LayerNorm(width)] if kind == "mlp1" else []
    return nn.Sequential(*norm, first, nn.GELU(), Linear(hidden, hidden)).apply(init_weights)


def kind_of(names):
    """Whether a projector is linear, mlp or mlp1, by the names of its tensors; "" of another family's."""
    last = {"weight": "linear", "2.weight": "mlp", "3.weight": "mlp1"}
    return next((kind for name, kind in reversed(last.items()) if name in names), "")


def projector_like(file, width, hidden):
    """A new projector of the kind that a safetensors file holds, or a linear one, which the file then does not fit."""
    return make_projector(kind_of(tensor_shapes(file)) or "linear", width, hidden)
