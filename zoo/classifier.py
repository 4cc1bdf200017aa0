"""
An image encoder with a linear head, which tells what class an image is of (OpenMedQ, arXiv 2606.12953).

Letters as in model.py; m classes.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import CLIP_MEAN, CLIP_STD, normalise
from plumbing.devices import to_device
from tasks.calibration import probabilities_of
from zoo.encoders import features_of


class Classifier(nn.Module):
    """
    An encoder, a ViT or a ResNet, and a linear head on its class token beside the mean of its patch tokens. A SigLIP
    has no class token: its head reads that mean alone. The attention pool that it was trained with is not loaded.
    """

    def __init__(self, encoder, classes, multi_label=False):
        super().__init__()
        self.encoder = encoder
        self.class_token = features_of(encoder)["class_token"]
        self.head = nn.Linear((1 + self.class_token) * encoder.config.width, classes)
        self.multi_label = multi_label  # an image may have several labels, or none
        self.temperature = None  # of its probabilities, see tasks/calibration.py; None: 1, not calibrated
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images):
        """(I, 3, H, W) normalised pixels -> (I, m) logits, float32."""
        tokens = self.encoder(images)  # (I, N, C)
        features = tokens[:, int(self.class_token):].mean(1)  # (I, C)
        features = torch.cat([tokens[:, 0], features], dim=1) if self.class_token else features  # (I, 2C) or (I, C)
        return self.head(features).float()

    def normalise(self, images):
        """(I, H, W, 3) uint8 -> (I, 3, H, W) float32 by its encoder's mean and std, which are CLIP's of a ResNet."""
        return normalise(images, getattr(self.encoder, "mean", CLIP_MEAN), getattr(self.encoder, "std", CLIP_STD))

    def loss(self, images, labels):
        """Mean cross-entropy of (I, 3, H, W) normalised pixels and (I, m) bool labels."""
        logits = self(images)
        if self.multi_label:
            return F.binary_cross_entropy_with_logits(logits, labels.float())
        return F.cross_entropy(logits, labels.int().argmax(1))

    @torch.no_grad()
    def judge(self, pixels, batch_size, autocast):
        """(n, m) float32 logits of (n, H, W, 3) uint8 images; arrays of numpy."""
        logits = []
        for begin in range(0, len(pixels), batch_size):
            images = self.normalise(to_device(pixels[begin:begin + batch_size], self.head.weight.device))
            with autocast:
                logits.append(self(images))
        return torch.cat(logits).cpu().numpy()

    def predict(self, pixels, batch_size, autocast):
        """(n, m) float64 probabilities, at its temperature, of (n, H, W, 3) uint8 images; arrays of numpy."""
        return probabilities_of(self.judge(pixels, batch_size, autocast), self.temperature, self.multi_label)

    def rates(self, layer_decay):
        """
        (name, parameter, multiple of the learning rate) of each, as run.make_optimizer takes them: a stage of
        the encoder has layer_decay times the rate of the next one; the head belongs to the last.
        """
        stages = self.encoder.stages()
        rates = {parameter: layer_decay ** (len(stages) - 1 - number)
                 for number, stage in enumerate(stages) for parameter in stage}
        return [(name, parameter, rates.get(parameter, 1.0)) for name, parameter in self.named_parameters()]


def augment(images, generator):
    """
    (I, 3, H, W) normalised pixels -> as many, each turned by up to 10 degrees, scaled by up to a
    tenth, shifted by up to a twentieth, mirrored left to right or not, brighter or darker by up to
    0.15 of a standard deviation, and with up to 15% more or less contrast.

    generator is the CPU's, so that the numbers are the same on any device.
    """
    count = len(images)
    angle, scale, right, down, bright, contrast = (
        2 * torch.rand(6, count, generator=generator) - 1).to(images.device)
    mirrored = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0).to(images.device)
    angle, scale = angle * math.radians(10), 1 + 0.1 * scale
    turn = torch.stack([mirrored * scale * angle.cos(), -scale * angle.sin(), 0.1 * right,
                        mirrored * scale * angle.sin(), scale * angle.cos(), 0.1 * down], 1)
    grid = F.affine_grid(turn.view(count, 2, 3), images.shape, align_corners=False)
    images = F.grid_sample(images, grid, align_corners=False)  # what comes from outside is 0, the mean
    return images.mul_((1 + 0.15 * contrast).view(-1, 1, 1, 1)).add_(0.15 * bright.view(-1, 1, 1, 1))
