"""What train_cls.py trains: an image encoder with a linear head, and the probabilities that it gives."""

import torch
import torch.nn as nn

from model import normalise
from plumbing.devices import to_device


class Classifier(nn.Module):
    """An encoder and a linear head on its class token beside the mean of its patch tokens."""

    def __init__(self, encoder, classes):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(2 * encoder.config.width, classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images):
        """(I, 3, H, W) normalised pixels -> (I, m) logits, float32."""
        tokens = self.encoder(images)  # (I, N, C)
        features = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)  # (I, 2C)
        return self.head(features).float()


@torch.no_grad()
def predict(model, pixels, multi_label, batch_size, device, autocast):
    """(n, m) float32 probabilities of (n, H, W, 3) uint8 images."""
    probabilities = []
    for begin in range(0, len(pixels), batch_size):
        images = to_device(pixels[begin:begin + batch_size], device)
        with autocast:
            logits = model(normalise(images))
        probabilities.append(logits.sigmoid() if multi_label else logits.softmax(1))
    return torch.cat(probabilities).cpu().numpy()
