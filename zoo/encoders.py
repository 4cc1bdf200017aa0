"""
Image encoders in files, and what of one a VLM is given: safetensors in timm's layout (BiomedCLIP, PubMedCLIP) or in
OpenAI CLIP's (PMC-CLIP's ResNet).
"""

import re
from dataclasses import replace

import torch

from model import ViT, ViTConfig
from plumbing.claims import vit_facts, vit_problem
from plumbing.flags import UserError
from plumbing.tensors import load_exactly, read_metadata, tensor_shapes
from zoo.projectors import kind_of
from zoo.resnet import load_resnet

# What a VLM is given of an encoder, and what it is unless a flag says otherwise: fields of ViTConfig
FEATURES = {"merge": 1, "class_token": True, "layer": "normed", "tiled": False}


def features_of(vision):
    """What a vision part gives of its encoder, {field of ViTConfig: value}."""
    return {name: getattr(vision.config, name, value) for name, value in FEATURES.items()}


def features_by(config, image):
    """The same by train_vlm.py's settled flags, and by how its images are stored, a dict of a run's record."""
    return {"merge": config.merge, "class_token": config.vision_tokens == "all" and config.merge == 1,
            "layer": config.vision_layer, "tiled": image["resize"].startswith("tiles")}


def require_features(model, config, image, source):
    """
    Raise UserError where a VLM from `source` takes of its encoder what the flags do not say, or has another projector.
    Whether images are tiles is up to the data: a run may begin with a model that has seen none.
    """
    here, wanted = features_of(model.vision), features_by(config, image)
    model.vision.config.tiled = here["tiled"] = wanted["tiled"]
    here["projector"] = kind_of(model.projector.state_dict())
    wanted["projector"] = config.projector_type
    for said in (here, wanted):
        said["class_token"] = "all" if said["class_token"] else "patches"
    for name, flag in (("merge", "merge"), ("layer", "vision_layer"), ("class_token", "vision_tokens"),
                       ("projector", "projector_type")):
        if here[name] != wanted[name] and (here[name] or wanted[name] != "linear"):
            raise UserError(f"--{flag}={getattr(config, flag)}: {source} has {here[name] or 'its own'}; "
                            + ("give that" if here[name] else "leave it out"))


def load_vit(file, dtype=torch.float32, device="cpu", **features):
    """
    A ViT from a safetensors file: timm's keys as they are, or under BiomedCLIP's `visual.trunk.`, whose
    projection head and text tower are dropped. Sizes are read from the shapes, and CLIP's variant is known by
    norm_pre. Heads and activation are told by the file's own metadata or a config beside it; without that,
    heads of Ti, S, B and L are of 64 channels. features: of FEATURES.

    Raises UserError when they are not known, or what is told is not done here, and as load_exactly does.
    """
    shapes = {key.removeprefix("visual.trunk."): shape for key, shape in tensor_shapes(file).items()}
    try:
        (width, _, P, _), grid = shapes["patch_embed.proj.weight"], shapes["pos_embed"][1] - 1
    except (KeyError, ValueError):
        raise UserError(f"{file}: no ViT in timm's layout (patch_embed.proj.weight, pos_embed); "
                        "docs/interchange.md says which files fit") from None
    depth = len([key for key in shapes if re.fullmatch(r"blocks\.\d+\.norm1\.weight", key)])
    config = ViTConfig(round(grid ** 0.5) * P, P, width, depth, "norm_pre.weight" in shapes, **features)
    facts, problem = vit_facts(file, read_metadata(file))
    if problem := problem or vit_problem(facts, width, depth, config.clip):
        raise UserError(f"{file}: {problem}")
    activation = facts.get("activation", config.gelu)
    config = replace(config, head_size=width // facts.get("heads", width // 64),
                     activation="" if activation == config.gelu else activation)
    config, behind = cut_depth(config, "norm.weight" in shapes)
    with torch.device("meta"):
        model = ViT(config)
    return load_exactly(model, [file], dtype, device, prefix="visual.trunk.",
                        dropped=rf"visual\.head\.proj\.weight|text\..*|logit_scale|(visual\.trunk\.)?({behind})")


def cut_depth(config, whole):
    """
    A ViTConfig without the blocks that its `layer` leaves out, and a pattern of the tensors that go with them. whole:
    the file has all blocks and the norm behind them; one that a run has written has what it kept.
    """
    if config.layer == "normed" or not whole:
        return config, "(?!)"
    depth = config.depth - (config.layer == "-2")
    return replace(config, depth=depth), rf"blocks\.{depth}\..*|norm\.(weight|bias)"


def load_encoder(file, dtype=torch.float32, device="cpu", **features):
    """The image encoder that a safetensors file holds: a ViT or a ResNet. UserError if neither."""
    if "attnpool.c_proj.weight" in tensor_shapes(file):
        if features.items() - FEATURES.items():
            raise UserError(f"{file}: a ResNet, of which a VLM is given all tokens; leave out --merge and the like")
        return load_resnet(file, dtype, device)
    return load_vit(file, dtype, device, **features)
