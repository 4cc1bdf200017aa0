"""
Small image encoders with random weights, laid out as prepare/all.py writes the real ones into weights/: for a trial of
what reads such files.

    biomedclip                  a ViT of 16-pixel patches
    clip_l_336                  CLIP's: 14-pixel patches, a norm before the blocks, quick GELU
    siglip_so400m, medsiglip    SigLIP's: no class token, GELU by tanh; the first with pixels in no patch, as 384 has
"""

import torch

from model import ViT, ViTConfig
from weights import save_module
from zoo.siglip import Siglip, SiglipConfig

SIGLIP = {"patch_size": 14, "width": 144, "depth": 4, "hidden": 538}  # heads of 72 channels, as so400m's
STAND_INS = {"biomedclip": ViTConfig(112, 16, 128, 4), "clip_l_336": ViTConfig(126, 14, 128, 4, clip=True),
             "siglip_so400m": SiglipConfig(116, **SIGLIP), "medsiglip": SiglipConfig(140, **SIGLIP)}


def make_stand_in(folder, name):
    """Write <name>.safetensors into a folder, whole, with the same weights each time."""
    folder.mkdir(parents=True, exist_ok=True)
    config, partial = STAND_INS[name], folder / f".{name}.partial"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_module(Siglip(config) if isinstance(config, SiglipConfig) else ViT(config), partial)
    partial.rename(folder / f"{name}.safetensors")
