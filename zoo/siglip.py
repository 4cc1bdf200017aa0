"""
SigLIP's image tower (arXiv 2303.15343), of which MedSigLIP is one: so400m with patches of 14 pixels.

A ViT in timm's layout without a class token: each patch has a position, MLPs are of a width of their own (4,304, not
four times 1,152) with GELU by its tanh approximation, and the last norm is every token's. 384 pixels are 27 patches
along a side and 6 pixels that no patch covers. The attention pool behind it, by which SigLIP compares an image with a
text, is not built.
"""

from dataclasses import dataclass

import torch.nn as nn
import torch.nn.functional as F

from model import ViT, ViTConfig, init_weights
from plumbing.kernels import Linear


@dataclass
class SiglipConfig(ViTConfig):
    """so400m-patch14-384; MedSigLIP's images have 448 pixels."""
    image_size: int = 384
    patch_size: int = 14
    width: int = 1152
    depth: int = 27
    head_size: int = 72
    activation: str = "gelu_tanh"
    class_token: bool = False
    hidden: int = 4304  # channels inside its MLPs


class SiglipMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = Linear(config.width, config.hidden)
        self.fc2 = Linear(config.hidden, config.width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Siglip(ViT):
    mean = std = (0.5, 0.5, 0.5)

    def __init__(self, config):
        super().__init__(config)
        del self.cls_token
        self.pos_embed = nn.Parameter(self.pos_embed[:, 1:].detach().clone())
        for block in self.blocks:
            block.mlp = SiglipMLP(config).apply(init_weights)

    def embed(self, images):
        """(I, 3, H, W) normalised pixels -> (I, N, C), what enters the blocks."""
        rows, columns = (side // self.config.patch_size for side in images.shape[2:])
        return self.patch_embed(images) + self.positions(rows, columns)
