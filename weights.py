"""
Loading and saving: how the parts of a model lie in files, and what of a file belongs to which part.

    encoders     safetensors in timm's layout (BiomedCLIP, PubMedCLIP) or OpenAI CLIP's (PMC-CLIP's ResNet)
    LLaMA        a hub folder: config.json and model.safetensors, whole or in several files
    LoRA         PEFT's folder, see zoo/adapters.py
    a VLM        a folder of those, with projector.safetensors and a config.json that names its parts
    a classifier encoder.safetensors, head.safetensors and a config.json with its classes

Every file is read in both directions completely: a tensor that is unknown, missing, repeated or of another shape stops
loading with one line. plumbing/claims.py holds what tensors do not tell against configs. Qwen3-VL: zoo/qwen3_files.py.
"""

import difflib
import os
import re
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from data import BOS, EOS
from lora import add_lora, lora_layers
from model import CONFIGS, VLM, LLaMA, LlamaConfig, ViT, ViTConfig
from plumbing.claims import llama_refusal, vit_facts, vit_problem
from plumbing.files import find_damage, find_run, read_settings, sort_metadata, write_settings
from plumbing.flags import UserError
from plumbing.tensors import (find_weights, hash_weights, language_files, load_exactly, plain_names, read_metadata,
                              tensor_shapes, tensors_of)
from quantize import store_low
from zoo import qwen3_files
from zoo.adapters import ADAPTERS, load_adapter, save_adapter
from zoo.classifier import Classifier
from zoo.qwen3_files import build_qwen, is_qwen, load_qwen, write_config
from zoo.qwen3_vl import Text
from zoo.resnet import load_resnet


# ----------------------------------------------------------------------------- one module

def is_trained(module):
    return any(parameter.requires_grad for parameter in module.parameters())


def save_module(module, file, state=None):
    """
    Write a module's tensors and what they do not tell: without LoRA, and as before it was merged. state: its
    state_dict, where processes have split its tensors.
    """
    state = state or tensors_of(module)
    tensors = {name: state[inside] for name, inside in plain_names(state).items()}
    tensors |= {f"{name}.weight": layer.unmerged for name, layer in lora_layers(module).items()
                if layer.unmerged is not None}
    facts = {"format": "pt"}
    if isinstance(module, ViT):
        facts |= {"heads": str(module.config.heads), "activation": module.config.gelu}
    save_file(tensors, file, metadata=facts)
    sort_metadata(file)


# ----------------------------------------------------------------------------- image encoders

def load_vit(file, dtype=torch.float32, device="cpu", merge=1):
    """
    A ViT from a safetensors file: timm's keys as they are, or under BiomedCLIP's `visual.trunk.`, whose
    projection head and text tower are dropped. Sizes are read from the shapes, and CLIP's variant is known by
    norm_pre. Heads and activation are told by the file's own metadata or a config beside it; without that,
    heads of Ti, S, B and L are of 64 channels. merge: see ViTConfig.

    Raises UserError when they are not known, or what is told is not done here, and as load_exactly does.
    """
    shapes = {key.removeprefix("visual.trunk."): shape for key, shape in tensor_shapes(file).items()}
    try:
        (width, _, P, _), grid = shapes["patch_embed.proj.weight"], shapes["pos_embed"][1] - 1
    except (KeyError, ValueError):
        raise UserError(f"{file}: no ViT in timm's layout (patch_embed.proj.weight, pos_embed); "
                        "docs/interchange.md says which files fit") from None
    depth = len([key for key in shapes if re.fullmatch(r"blocks\.\d+\.norm1\.weight", key)])
    config = ViTConfig(round(grid ** 0.5) * P, P, width, depth, "norm_pre.weight" in shapes, merge=merge)
    facts, problem = vit_facts(file, read_metadata(file))
    if problem := problem or vit_problem(facts, width, depth, config.clip):
        raise UserError(f"{file}: {problem}")
    activation = facts.get("activation", config.gelu)
    config = replace(config, head_size=width // facts.get("heads", width // 64),
                     activation="" if activation == config.gelu else activation)
    with torch.device("meta"):
        model = ViT(config)
    return load_exactly(model, [file], dtype, device, prefix="visual.trunk.",
                        dropped=r"visual\.head\.proj\.weight|text\..*|logit_scale")


def load_encoder(file, dtype=torch.float32, device="cpu"):
    """The image encoder that a safetensors file holds: a ViT or a ResNet. UserError if neither."""
    load = load_resnet if "attnpool.c_proj.weight" in tensor_shapes(file) else load_vit
    return load(file, dtype, device)


def save_classifier(model, folder, facts):
    """Write encoder.safetensors, head.safetensors, and config.json with facts such as "classes"."""
    save_module(model.encoder, folder / "encoder.safetensors")
    save_module(model.head, folder / "head.safetensors")
    write_settings(folder / "config.json", facts)


def load_classifier(folder, device="cpu"):
    """The Classifier in a folder of train_cls.py, in eval mode, and its facts. UserError where it is not whole."""
    path = Path(folder) / "model"
    if not path.is_dir():
        raise UserError(f"{folder}: no trained model; run the same command without --predict first")
    if damage := find_damage(path):
        raise UserError(f"{path}: {damage}; delete {folder} and train again")
    facts = read_settings(path / "config.json")
    model = Classifier(load_encoder(path / "encoder.safetensors"), len(facts["classes"]),
                       facts["thresholds"] is not None)
    load_exactly(model.head, [path / "head.safetensors"], torch.float32, "cpu")
    model.temperature = facts.get("temperature")  # None, too, of an earlier version's
    return model.to(device).eval(), facts


# ----------------------------------------------------------------------------- LLaMA

def read_llama_config(folder):
    """The LlamaConfig of a hub folder. Raises UserError where it is of another model, or cannot be."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}/config.json: not there; `python prepare/all.py "
                        "--only=pmc_llama_7b` brings the paper's")
    hub = read_settings(folder / "config.json")
    ropes = [rope for rope in map(hub.get, ("rope_parameters", "rope_scaling")) if isinstance(rope, dict)]
    config = LlamaConfig(**{item.name: hub[item.name] for item in fields(LlamaConfig)
                            if hub.get(item.name) is not None})
    config.num_key_value_heads = hub.get("num_key_value_heads") or config.num_attention_heads
    config.rope_theta = next((rope["rope_theta"] for rope in ropes if rope.get("rope_theta")), config.rope_theta)
    impossible = [f"{name} {value!r:.50}" for name, value in asdict(config).items()
                  if type(value) not in (int, type(getattr(LlamaConfig, name)))
                  or not (name == "head_dim" and value == 0)
                  and not 0 < value < (1e30 if isinstance(value, float) else 1 << 24)]
    if impossible or (config.num_attention_heads % config.num_key_value_heads or config.head_size % 2
                      or not config.head_dim and config.hidden_size % config.num_attention_heads):
        raise UserError(f"{folder}/config.json: {', '.join(impossible) or 'its sizes'} cannot be")
    if refused := llama_refusal(hub, config.head_size):
        raise UserError(f"{folder}/config.json: {refused}")
    return config


def load_llama(folder, dtype=torch.float32, device="cpu", lora=None, split=None, bits=0):
    """
    A LLaMA from a hub folder. lora: the settings of its LoRA, newly made, if it is to have one; split: a
    function that divides the empty model among processes before it is filled; bits: of its blocks, see quantize.py.

    Raises UserError when the folder is incomplete or a tensor does not fit.
    """
    folder = Path(folder)
    config, files = read_llama_config(folder), language_files(folder)
    if config.num_hidden_layers > sum(len(tensor_shapes(file)) for file in files):
        raise UserError(f"{folder}/config.json: {config.num_hidden_layers} layers are more than the "
                        "tensors beside it")  # and would take for ever to build
    with torch.device("meta"):
        model = LLaMA(config).to(dtype)
        store_low(model.blocks, bits)
        if split and lora:
            add_lora(model, **lora)
    if split:
        split(model)
    load_exactly(model, files, dtype, device, dropped=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
    if split:
        for _, layer in sorted(lora_layers(model).items()):  # in add_lora's order: the same random numbers
            layer.reset()
    elif lora:
        add_lora(model, **lora)
    return model


def save_llama(module, folder, state=None):
    """Write a LLaMA as a hub folder, which transformers reads. state: as save_module takes it."""
    folder.mkdir(exist_ok=True)
    save_module(module, folder / "model.safetensors", state)
    write_settings(folder / "config.json", hub_config(module.config))


def hub_config(config):
    """A LlamaConfig as the hub's config.json has it, as a dict."""
    sizes = {name: value for name, value in asdict(config).items() if value or name != "head_dim"}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **sizes, "hidden_act": "silu",
            "bos_token_id": BOS, "eos_token_id": EOS, "tie_word_embeddings": False}


# ----------------------------------------------------------------------------- the whole

def build_vlm(name, vocab_size, vision_weights="", language_weights="", dtype=torch.float32, device="cpu",
              merge=1, lora=None, split=None, trained=(), bits=0):
    """
    A VLM of CONFIGS[name], or of zoo.qwen3_files'; a part with a weights file is loaded from it, sizes and all: of a
    Qwen3-VL all from one folder. merge: ViTConfig's; lora, split, bits: of the language part, as load_llama takes
    them; trained: names of the parts that are to be trained in full, in float32.
    """
    if name in qwen3_files.CONFIGS or is_qwen(language_weights):
        if vision_weights != language_weights:
            raise UserError("--vision_weights, --language_weights: a Qwen3-VL is loaded as a whole; name its folder "
                            "with --model, and leave both out")
        model = build_qwen(name, vocab_size, language_weights, dtype, device, lora, split, trained, bits)
        return note_weights(model, dict.fromkeys(model.weights, language_weights), bits)
    if name not in CONFIGS:
        near = difflib.get_close_matches(name, [*CONFIGS, *qwen3_files.CONFIGS], n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"--model={name}: no such sizes, and no folder with a config.json, here or in weights/; {meant}"
                        "`python prepare/all.py --only=medmo_4b` brings MedMO's")
    vision_config, language_config = CONFIGS[name]
    with torch.device(device):
        vision = (load_vit(vision_weights, device=device, merge=merge) if vision_weights
                  else ViT(replace(vision_config, merge=merge)))
        if language_weights:
            language = load_llama(language_weights, dtype, device, lora, split, bits)
        elif bits:
            raise UserError(f"--base_bits={bits}: no base; name one with --language_weights or --start")
        else:
            language = LLaMA(replace(language_config, vocab_size=vocab_size)).to(dtype)
            if lora:
                add_lora(language, **lora)
            if split:
                split(language)
        if language.config.vocab_size < vocab_size:
            raise UserError(f"{language_weights}: its {language.config.vocab_size} tokens are fewer "
                            f"than the tokenizer's {vocab_size}; prepare with its own tokenizer")
        model = VLM(vision, language)
    model.lora |= {"language": lora} if lora else {}
    return note_weights(model, {"vision": vision_weights, "language": language_weights}, bits)


def note_weights(model, sources, bits):
    """Note from which files, {part: path}, the parts of a new model come, "" for those made from scratch; its bits."""
    model.base_bits = bits
    hashes = {path: hash_weights(path) for path in {*sources.values()} if path}
    for part, path in sources.items():
        if path:  # absolute: a run is also read from other folders than the one it was started in
            model.weights[part], model.hashes[part] = os.path.abspath(path), hashes[path]
    return model


def save_vlm(model, folder, language=None):
    """
    Write what no weights file holds: adapters, and parts trained in full or made from scratch. language: the
    language part's state_dict, where processes have split its tensors.

    vision.safetensors (timm's layout), projector.safetensors, language/ (the hub's layout),
    vision_adapter/ and adapter/ (PEFT's layout), config.json.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(model.weights)
    for part in weights:
        module = getattr(model, part)
        if part in model.lora:
            save_adapter(module, folder / ADAPTERS[part], weights[part], **model.lora[part])
        elif is_trained(module):
            weights[part] = ""
        if weights[part]:
            continue
        if part != "language":
            save_module(module, folder / f"{part}.safetensors")
        elif isinstance(module, Text):
            (folder / "language").mkdir()
            save_module(module, folder / "language" / "model.safetensors")
            write_config(folder / "language", model.vision.config, module.config)
        else:
            save_llama(module, folder / "language", language)
    write_settings(folder / "config.json", {"weights": weights, "hashes": model.hashes, "lora": model.lora,
                                            "merge": model.vision.config.merge, "base_bits": model.base_bits})


def read_vlm_config(folder, parts=("vision", "projector", "language")):
    """What save_vlm wrote, the weights of these parts where they are now. Raises UserError if it is no VLM's."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no model here; run `python train_vlm.py`")
    config = read_settings(folder / "config.json")
    hashes = config.get("hashes", {})
    paths = {part: config["weights"].get(part, "") for part in parts}
    places = {path: find_weights(path, hashes.get(part)) for part, path in paths.items() if path}
    weights = {part: places.get(path, "") for part, path in paths.items()}
    return {"merge": 1, "base_bits": 0, **config, "weights": weights, "hashes": hashes}


def load_vision(folder, config, device):
    """The vision part of what save_vlm wrote, config its read_vlm_config, with its LoRA."""
    file = config["weights"]["vision"] or folder / "vision.safetensors"
    model = load_vit(file, device=device, merge=config["merge"])
    if "vision" in config["lora"]:
        add_lora(model, **config["lora"]["vision"])
        load_adapter(model, folder / ADAPTERS["vision"])
    return model


def load_vlm(folder, dtype=torch.float32, device="cpu", split=None, trained=(), bits="auto"):
    """
    The VLM that save_vlm wrote; split, trained, bits: see build_vlm; auto: as it was trained. Raises UserError when
    a file is missing or does not fit.
    """
    folder = Path(folder)
    config = read_vlm_config(folder)
    weights, lora = config["weights"], config["lora"]
    bits, source = config["base_bits"] if bits == "auto" else int(bits), weights["language"] or folder / "language"
    if bits and not weights["language"]:  # what another run has trained is the base, then, and stays where it is
        weights["language"], config["hashes"]["language"] = os.path.abspath(source), hash_weights(source)
    if is_qwen(source):
        own = {part: folder / f"{part}.safetensors" for part in ("vision", "projector")}
        sources = {part: path or own.get(part, folder / part) for part, path in weights.items()}
        trained = {*trained, *(part for part in own if not weights[part])}
        model = load_qwen(sources, dtype, device, trained, bits, split)
        for part in lora:
            add_lora(getattr(model, part), **lora[part])
            load_adapter(getattr(model, part), folder / ADAPTERS[part])
    else:
        language = load_llama(source, dtype, device, lora.get("language"), split, bits)
        if "language" in lora:
            load_adapter(language, folder / ADAPTERS["language"])
        with torch.device("meta"):
            model = VLM(load_vision(folder, config, device), language)
        load_exactly(model.projector, [folder / "projector.safetensors"], torch.float32, device)
    model.weights, model.hashes, model.lora = weights, model.hashes | config["hashes"], lora
    model.base_bits = bits
    return model


def load_run(name, dtype=torch.float32, device="cpu"):
    """The VLM of a train_vlm.py run, from its newest checkpoint, or of the checkpoint of that name."""
    return load_vlm(find_run(name)[1], dtype, device)


def load_trained_encoder(folder, device="cpu"):
    """The image encoder alone of what save_vlm wrote, its LoRA, where it has one, merged into its weights."""
    folder = Path(folder)
    config = read_vlm_config(folder, parts=["vision"])
    if any(map(is_qwen, [*read_settings(folder / "config.json")["weights"].values(), folder / "language"])):
        raise UserError(f"{folder}: the tower of a Qwen3-VL, which no classifier here is made of; choose the run of "
                        "another model, or another --encoder")
    model = load_vision(folder, {**config, "merge": 1}, device)
    for name, layer in lora_layers(model).items():
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base)
    return model.requires_grad_(True)
