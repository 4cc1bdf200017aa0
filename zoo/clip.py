"""
CLIP's and SigLIP's image towers by the names that others give their tensors: the hub's (transformers) and OpenAI's,
both brought to timm's, which are model.ViT's.

    timm                          the hub, with or without vision_model.        OpenAI, and open_clip
    cls_token                     embeddings.class_embedding                    visual.class_embedding
    pos_embed                     embeddings.position_embedding.weight          visual.positional_embedding
    patch_embed.proj.*            embeddings.patch_embedding.*                  visual.conv1.weight
    norm_pre.*, norm.*            pre_layrnorm.* (as it is), post_layernorm.*   visual.ln_pre.*, visual.ln_post.*
    blocks.0.norm1.*, norm2.*     encoder.layers.0.layer_norm1.*, ...           visual.transformer.resblocks.0.ln_1.*
    blocks.0.attn.qkv.*           ....self_attn.q_proj.*, k_proj.*, v_proj.*    ....attn.in_proj_weight, in_proj_bias
    blocks.0.attn.proj.*          ....self_attn.out_proj.*                      ....attn.out_proj.*
    blocks.0.mlp.fc1.*, fc2.*     ....mlp.fc1.*, fc2.*                          ....mlp.c_fc.*, c_proj.*

SigLIP has no class token and no norm before its blocks, and a bias where patches are embedded (zoo/siglip.py).
"""

import re
import zipfile
from pathlib import Path

import torch

from plumbing.flags import UserError

LAYOUTS = (  # a tensor by which a layout is known, and what of its files is not of the tower
    (r"visual\.class_embedding", r"(?!visual\.).*|visual\.proj"),
    (r"(vision_model\.)?embeddings\.patch_embedding\.weight",
     r"(text_model|text_projection|visual_projection)\..*|logit_(scale|bias)|"
     r"(vision_model\.)?(embeddings\.position_ids|head\..*)"))

TO_TIMM = (
    (r"^(vision_model|visual)\.", ""), (r"^(embeddings\.)?class_embedding$", "cls_token"),
    (r"^(embeddings\.position_embedding\.weight|positional_embedding)$", "pos_embed"),
    (r"^(embeddings\.patch_embedding|conv1)\.", "patch_embed.proj."),
    (r"^(pre_layrnorm|ln_pre)\.", "norm_pre."), (r"^(post_layernorm|ln_post)\.", "norm."),
    (r"^(encoder\.layers|transformer\.resblocks)\.", "blocks."),
    (r"\.(layer_norm|ln_)([12])\.", r".norm\2."), (r"\.(self_)?attn\.out_proj\.", ".attn.proj."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."), (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."), (r"\.mlp\.c_proj\.", ".mlp.fc2."))


def timm_names(keys):
    """{key: timm's name} of the tower in a file of one of LAYOUTS, queries, keys and values apart; {} of any other."""
    for known, dropped in LAYOUTS:
        if any(re.fullmatch(known, key) for key in keys):
            names = {key: key for key in keys if not re.fullmatch(dropped, key)}
            for pattern, replacement in TO_TIMM:
                names = {key: re.sub(pattern, replacement, name) for key, name in names.items()}
            return names
    return {}


def gather(source, names, read):
    """
    {timm's name: tensor} of a file's {key: timm's name}, by read(key): queries, keys and values joined, and what one
    has for all images, class token and positions, with a dimension for these. UserError where two keys have one name.
    """
    tensors = {}
    for key, name in names.items():
        if name in tensors:
            raise UserError(f"{source}: {key} comes twice, under another name")
        tensors[name] = read(key)
    for name in [name for name in tensors if ".attn.q." in name]:
        parts = [tensors.pop(name.replace(".q.", f".{part}."), None) for part in "qkv"]
        try:
            tensors[name.replace(".q.", ".qkv.")] = torch.cat([part for part in parts if part is not None])
        except RuntimeError:
            raise UserError(f"{source}: {name} does not fit its keys and values") from None
    for name in tensors.keys() & {"cls_token", "pos_embed"}:
        tensors[name] = tensors[name][(None,) * (3 - tensors[name].dim())]  # (C,) or (N, C) -> (1, N, C)
    return tensors


def require_no_program(file):
    """Raise UserError where a file is TorchScript, as OpenAI publishes CLIP: a program, which reading it would run."""
    if Path(file).suffix == ".pt" and zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise UserError(f"{file}: TorchScript, a program, which is not run here; `python prepare/all.py "
                                "--only=clip_l_336` takes the same weights from the hub, pytorch_model.bin of "
                                "openai/clip-vit-large-patch14-336")
