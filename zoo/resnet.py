"""
PMC-CLIP's image encoder (arXiv 2303.07240), with which the paper compares BiomedCLIP's ViT: CLIP's ResNet-50.

Its parameters carry the names of OpenAI CLIP's checkpoints. Letters as in model.py; ResNet-50: C=2048
nh=32 N=50, its outputs of width 768.
"""

import re
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from plumbing.flags import UserError
from plumbing.kernels import Linear
from plumbing.tensors import load_exactly, on_meta, tensor_shapes


@dataclass
class ResNetConfig:
    """PMC-CLIP's ResNet-50 (arXiv 2303.07240)."""
    image_size: int = 224  # pixels
    stem: int = 64  # channels after the stem; a stage's last has 4, 8, 16 and 32 times as many
    layers: tuple = (3, 4, 6, 3)  # blocks of each stage
    width: int = 768  # of an output

    @property
    def tokens(self):
        """Outputs for an image: one per place of the last map and their attention-pooled mean."""
        return (self.image_size // 32) ** 2 + 1


class Bottleneck(nn.Module):
    """Residual block whose stride is an average pool, which does not alias."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = nn.Identity() if inputs == 4 * width else nn.Sequential(
            nn.Conv2d(inputs, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(F.avg_pool2d(y, self.stride)))  # (I, 4 width, H/stride, W/stride)
        return F.relu(y + self.downsample(F.avg_pool2d(x, self.stride)))


def stage(blocks, inputs, width, stride):
    return nn.Sequential(Bottleneck(inputs, width, stride),
                         *(Bottleneck(4 * width, width, 1) for _ in range(blocks - 1)))


class AttentionPool(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = 32 * config.stem
        self.positional_embedding = nn.Parameter(torch.randn(config.tokens, C) / C ** 0.5)
        self.q_proj, self.k_proj, self.v_proj = (Linear(C, C) for _ in range(3))
        self.c_proj = Linear(C, config.width)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)  # (I, C, H, W) -> (I, N-1, C)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding  # (I, N, C)
        # Heads of 64 channels, 32 in all, as PMC-CLIP was trained. No shape tells: with 8 heads, as in
        # loaders often copied, the same file loads and gives other features.
        q, k, v = (proj(x).unflatten(-1, (-1, 64)).transpose(1, 2)  # each (I, nh, N, 64)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.c_proj(y.transpose(1, 2).flatten(2))  # (I, N, width)


class ResNet(nn.Module):
    """CLIP's ResNet (arXiv 2103.00020): three convolutions first, an attention pool last."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        C, (one, two, three, four) = config.stem, config.layers
        self.conv1 = nn.Conv2d(3, C // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(C // 2)
        self.conv2 = nn.Conv2d(C // 2, C // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(C // 2)
        self.conv3 = nn.Conv2d(C // 2, C, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(C)
        self.layer1 = stage(one, C, C, stride=1)
        self.layer2 = stage(two, 4 * C, 2 * C, stride=2)
        self.layer3 = stage(three, 8 * C, 4 * C, stride=2)
        self.layer4 = stage(four, 16 * C, 8 * C, stride=2)
        self.attnpool = AttentionPool(config)

    def stages(self):
        """Its parameters in lists, from where images enter to the outputs: for learning rates by depth."""
        stem = [self.conv1, self.bn1, self.conv2, self.bn2, self.conv3, self.bn3]
        stages = [stem, [self.layer1], [self.layer2], [self.layer3], [self.layer4], [self.attnpool]]
        return [[p for part in parts for p in part.parameters()] for parts in stages]

    def forward(self, images):
        """
        (I, 3, H, W) normalised pixels -> (I, N, width) outputs. The first is PMC-CLIP's feature of
        the image; it leaves out the others, which the places of the last map get by the same pool.
        """
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)  # (I, stem, H/4, W/4)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (I, C, H/32, W/32)
        return self.attnpool(x)


def load_resnet(file, dtype=torch.float32, device="cpu"):
    """
    A ResNet from a safetensors file under CLIP's keys, in eval mode, where batch norms use the statistics
    of the file. Raises UserError as load_exactly does.
    """
    shapes = tensor_shapes(file)
    try:
        stem, width = shapes["conv3.weight"][0], shapes["attnpool.c_proj.weight"][0]
        grid = shapes["attnpool.positional_embedding"][0] - 1
    except (KeyError, IndexError):
        raise UserError(f"{file}: no ResNet in CLIP's layout (conv3.weight, attnpool.*); "
                        "docs/interchange.md says which files fit") from None
    layers = [len([key for key in shapes if re.fullmatch(rf"layer{n}\.\d+\.bn1\.weight", key)])
              for n in (1, 2, 3, 4)]
    with on_meta():
        model = ResNet(ResNetConfig(round(grid ** 0.5) * 32, stem, tuple(layers), width))
    return load_exactly(model, [file], dtype, device).eval()
