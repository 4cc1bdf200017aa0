"""
Image encoders in files, and what of one a VLM is given: safetensors in timm's layout (BiomedCLIP, PubMedCLIP, and all
that a run writes), CLIP's and SigLIP's as the hub and OpenAI name them, and OpenAI's of a ResNet (PMC-CLIP).
"""

import re
from dataclasses import replace
from pathlib import Path

import torch

from model import ViT, ViTConfig
from plumbing.claims import vit_facts, vit_problem
from plumbing.flags import UserError
from plumbing.tensors import load_exactly, on_meta, read_metadata, read_tensor, tensor_shapes
from zoo.clip import gather, require_no_program, timm_names
from zoo.projectors import kind_of
from zoo.resnet import load_resnet
from zoo.siglip import Siglip, SiglipConfig

# What a VLM is given of an encoder, and what it is unless a flag says otherwise: fields of ViTConfig
FEATURES = {"merge": 1, "class_token": True, "layer": "normed", "tiled": False}


def features_of(vision):
    """What a vision part gives of its encoder, {field of ViTConfig: value}."""
    return {name: getattr(vision.config, name, value) for name, value in FEATURES.items()}


def features_by(config, image):
    """The same by train_vlm.py's settled flags, and by how its images are stored, a dict of a run's record."""
    assert config.merge and "auto" not in (config.vision_layer, config.vision_tokens), "flags are not settled"
    return {"merge": config.merge, "class_token": config.vision_tokens == "all" and config.merge == 1,
            "layer": config.vision_layer, "tiled": image["resize"].startswith("tiles")}


def require_features(model, config, image, source):
    """
    Raise UserError where a VLM from `source` takes of its encoder what the flags do not say, or has another projector.
    Whether images are tiles is up to the data: a run may begin with a model that has seen none.
    """
    here, wanted = features_of(model.vision), features_by(config, image)
    size = getattr(model.vision.config, "image_size", 0)
    if wanted["tiled"] and image["size"] != size:
        raise UserError(f"--data: its images are tiles of {image['size']} pixels; {source} sees "
                        + (f"tiles of {size}: prepare with --image_size={size} --max_tiles=12" if size else
                           "images in one piece: prepare without --max_tiles"))
    model.vision.config.tiled = here["tiled"] = wanted["tiled"]
    if isinstance(model.vision, Siglip):  # its patches are all that it has
        here["class_token"] = wanted["class_token"]
    if wanted["tiled"] and here["merge"] > 1 and model.vision.config.grid % here["merge"]:
        raise UserError(f"--merge={here['merge']}: {source} sees tiles of {model.vision.config.grid} patches along a "
                        "side, which that does not divide; leave it out")
    here["projector"] = kind_of(model.projector.state_dict())
    wanted["projector"] = config.projector_type
    for said in (here, wanted):
        said["class_token"] = "all" if said["class_token"] else "patches"
    for name, flag in (("merge", "merge"), ("layer", "vision_layer"), ("class_token", "vision_tokens"),
                       ("projector", "projector_type")):
        if here[name] != wanted[name] and (here[name] or wanted[name] != "linear"):
            raise UserError(f"--{flag}={getattr(config, flag)}: {source} has {here[name] or 'its own'}; "
                            + ("give that" if here[name] else "leave it out"))


def untold(config):
    """What the tensors of a ViT do not tell, as a file's metadata: the pixels, too, where some are in no patch."""
    return {"heads": str(config.heads), "activation": config.gelu,
            **({"image_size": str(config.image_size)} if config.image_size % config.patch_size else {})}


def load_vit(source, dtype=torch.float32, device="cpu", **features):
    """
    A ViT from a safetensors file, or from a hub folder with one: timm's keys as they are, or under BiomedCLIP's
    `visual.trunk.`, or the layouts of zoo/clip.py; heads, projections and text towers are dropped. Sizes are read from
    the shapes; CLIP's variant is known by norm_pre, a SigLIP by having no class token. Heads and activation are told
    by the file's own metadata or a config beside it; without that, heads of Ti, S, B and L are of 64 channels.
    features: of FEATURES.

    Raises UserError when they are not known, or what is told is not done here, and as load_exactly does.
    """
    file = find_file(source)
    stored = tensor_shapes(file)
    names = timm_names(stored)
    if names:
        empty = gather(file, names, lambda key: torch.empty(stored[key], device="meta"))
        shapes = {name: tuple(tensor.shape) for name, tensor in empty.items()}
    else:
        shapes = {key.removeprefix("visual.trunk."): shape for key, shape in stored.items()}
    config = read_config(file, shapes, read_metadata(file), **features)
    config, behind = cut_depth(config, "norm.weight" in shapes)
    with on_meta():
        model = Siglip(config) if isinstance(config, SiglipConfig) else ViT(config)
    if names:
        kept = {key: name for key, name in names.items() if not re.fullmatch(behind, name)}
        return load_renamed(model, file, kept, stored, dtype, device)
    return load_exactly(model, [file], dtype, device, prefix="visual.trunk.",
                        dropped=r"visual\.head\.proj\.weight|text\..*|logit_scale|"
                                rf"(visual\.trunk\.)?(attn_pool\..*|{behind})")


def find_file(source):
    """The safetensors file that a path is, or that the hub folder there holds. UserError where there is none."""
    path = Path(source)
    if path.is_dir():
        path = path / "model.safetensors"
        if not path.is_file():
            raise UserError(f"{source}: no model.safetensors in it; the hub's pickles of CLIP are rewritten by `python "
                            "prepare/all.py --only=clip_l_336`")
    require_no_program(path)
    return path


def read_config(file, shapes, metadata, **features):
    """The ViTConfig of a file by {timm's name: shape}, by its metadata and by the configs beside it."""
    try:
        (width, _, P, _), positions = shapes["patch_embed.proj.weight"], shapes["pos_embed"][1]
        hidden = shapes["blocks.0.mlp.fc1.weight"][0]
    except (KeyError, ValueError):
        raise UserError(f"{file}: no ViT in timm's layout (patch_embed.proj.weight, pos_embed) or with CLIP's or "
                        "SigLIP's names; docs/interchange.md says which files fit") from None
    depth = len([key for key in shapes if re.fullmatch(r"blocks\.\d+\.norm1\.weight", key)])
    clip, siglip = "norm_pre.weight" in shapes, "cls_token" not in shapes
    side = round((positions - (not siglip)) ** 0.5)
    facts, problem = vit_facts(file, metadata)
    problem = problem or vit_problem(facts, {
        "width": width, "depth": depth, "clip": clip, "siglip": siglip, "MLP width": hidden, "patch size": P,
        "patches": side, "last norm": "norm.weight" in shapes})
    if problem:
        raise UserError(f"{file}: {problem}")
    config = ViTConfig(facts.get("image_size", side * P), P, width, depth, clip,
                       width // facts.get("heads", width // 64), **features)
    if siglip:
        return SiglipConfig(**vars(config) | {"activation": facts["activation"], "class_token": False}, hidden=hidden)
    activation = facts.get("activation", config.gelu)
    return replace(config, activation="" if activation == config.gelu else activation)


def load_renamed(model, file, names, shapes, dtype, device):
    """
    Fill a model on the meta device from a file with {key: timm's name}, completely; on the meta device again nothing is
    read. Raises UserError when a key is unknown, missing or misshapen.
    """
    def read(key):
        if str(device) == "meta":
            return torch.empty(shapes[key], dtype=dtype, device="meta")
        tensor = read_tensor(file, key)
        if not tensor.is_floating_point():
            raise UserError(f"{file}: {key} is {tensor.dtype}, which holds no weights")
        return tensor.to(device, dtype)

    try:
        model.load_state_dict(gather(file, names, read), assign=True)
    except RuntimeError as error:
        raise UserError(f"{file}: does not fit this model: {' '.join(str(error).split()[6:])[:300]}") from None
    return model


def cut_depth(config, whole):
    """
    A ViTConfig without the blocks that its `layer` leaves out, and a pattern of the tensors that go with them. whole:
    the file has all blocks and the norm behind them; one that a run has written has what it kept.
    """
    if config.layer == "normed" or not whole:
        return config, "(?!)"
    depth = config.depth - (config.layer == "-2")
    if not depth:
        raise UserError("--vision_layer=-2: the encoder has one block, so that nothing would be left of it")
    return replace(config, depth=depth), rf"blocks\.{depth}\..*|norm\.(weight|bias)"


def load_encoder(source, dtype=torch.float32, device="cpu", **features):
    """The image encoder that a safetensors file, or a hub folder, holds: a ViT or a ResNet. UserError if neither."""
    file = find_file(source)
    if "attnpool.c_proj.weight" in tensor_shapes(file):
        if features.items() - FEATURES.items():
            raise UserError(f"{file}: a ResNet, of which a VLM is given all tokens; leave out --merge and the like")
        return load_resnet(file, dtype, device)
    return load_vit(file, dtype, device, **features)
