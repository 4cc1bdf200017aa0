"""
Loading and saving: how the parts of a model lie in files, and what of a file belongs to which part.

    encoders     safetensors, see zoo/encoders.py
    LLaMA        a hub folder, see zoo/llama_files.py; other families: zoo/gpt_oss_files.py, qwen3_files.py
    LoRA         PEFT's folder, see zoo/adapters.py
    a VLM        a folder of those, with projector.safetensors and a config.json that names its parts
    a classifier encoder.safetensors, head.safetensors and a config.json with its classes

Every file is read in both directions completely: a tensor that is unknown, missing, repeated or of another shape stops
loading with one line. plumbing/claims.py holds what tensors do not tell against configs.
"""

import difflib
import os
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from lora import add_lora, lora_layers
from model import CONFIGS, VLM, LLaMA, ViT
from plumbing.files import find_damage, find_run, read_settings, sort_metadata, write_settings
from plumbing.flags import UserError
from plumbing.tensors import find_weights, hash_weights, load_exactly, on_meta, plain_names, tensors_of
from zoo import gpt_oss_files, qwen3_files
from zoo.adapters import ADAPTERS, load_adapter, save_adapter
from zoo.classifier import Classifier
from zoo.encoders import FEATURES, cut_depth, features_of, load_encoder, untold
from zoo.gpt_oss import GptOss, GptOssConfig
from zoo.gpt_oss_files import is_gpt_oss, load_gpt_oss, save_gpt_oss
from zoo.llama_files import hub_config, load_llama
from zoo.projectors import make_projector, projector_like
from zoo.qwen3_files import build_qwen, is_qwen, load_qwen, write_config
from zoo.qwen3_vl import Text


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
        facts |= untold(module.config)
    save_file(tensors, file, metadata=facts)
    sort_metadata(file)


# ----------------------------------------------------------------------------- image encoders with a head

def save_classifier(model, folder, facts):
    """Write encoder.safetensors, head.safetensors, and config.json: facts such as "classes", the encoder's layer."""
    save_module(model.encoder, folder / "encoder.safetensors")
    save_module(model.head, folder / "head.safetensors")
    write_settings(folder / "config.json", facts | {"layer": features_of(model.encoder)["layer"]})


def load_classifier(folder, device="cpu"):
    """The Classifier in a folder of train_cls.py, in eval mode, and its facts. UserError where it is not whole."""
    path = Path(folder) / "model"
    if not path.is_dir():
        raise UserError(f"{folder}: no trained model; run the same command without --predict first")
    if damage := find_damage(path):
        raise UserError(f"{path}: {damage}; delete {folder} and train again")
    facts = read_settings(path / "config.json")
    encoder = load_encoder(path / "encoder.safetensors", layer=facts.get("layer", "normed"))
    model = Classifier(encoder, len(facts["classes"]), facts["thresholds"] is not None)
    load_exactly(model.head, [path / "head.safetensors"], torch.float32, "cpu")
    model.temperature = facts.get("temperature")  # None, too, of an earlier version's
    return model.to(device).eval(), facts


# ----------------------------------------------------------------------------- language models

def save_llama(module, folder, state=None):
    """Write a LLaMA as a hub folder, which transformers reads. state: as save_module takes it."""
    folder.mkdir(exist_ok=True)
    save_module(module, folder / "model.safetensors", state)
    write_settings(folder / "config.json", hub_config(module.config))


def load_language(folder, dtype, device, lora=None, split=None, bits=0, trained=()):
    """The LLaMA or gpt-oss of a hub folder, the rest as build_vlm takes it."""
    if not is_gpt_oss(folder):
        return load_llama(folder, dtype, device, lora, split, bits)
    if split:
        raise UserError("--shard=true: processes do not split a gpt-oss; leave it out")
    return load_gpt_oss(folder, dtype, device, lora, bits, "language" in trained)


# ----------------------------------------------------------------------------- the whole

def build_vlm(name, vocab_size, vision_weights="", language_weights="", dtype=torch.float32, device="cpu",
              features=FEATURES, projector="linear", lora=None, split=None, trained=(), bits=0):
    """
    A VLM of CONFIGS[name], or of the zoo's; a part with a weights file is loaded from it, sizes and all: of a
    Qwen3-VL all from one folder. features: what is taken of the encoder, see zoo/encoders.py; projector: of
    zoo/projectors.py; lora, split, bits: of the language part, as load_llama takes them; trained: names of the parts
    that are to be trained in full, in float32.
    """
    sizes = CONFIGS | gpt_oss_files.CONFIGS
    if name in qwen3_files.CONFIGS or is_qwen(language_weights):
        if vision_weights != language_weights or (features, projector) != (FEATURES, "linear"):
            raise UserError("--vision_weights, --language_weights, --merge, --vision_layer and the like: a Qwen3-VL is "
                            "loaded as a whole; name its folder with --model, leave them out, and prepare its images "
                            "without --max_tiles")
        model = build_qwen(name, vocab_size, language_weights, dtype, device, lora, split, trained, bits)
        return note_weights(model, dict.fromkeys(model.weights, language_weights), bits)
    if name not in sizes:
        near = difflib.get_close_matches(name, [*sizes, *qwen3_files.CONFIGS], n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"--model={name}: no such sizes, and no folder with a config.json, here or in weights/; {meant}"
                        "`python prepare/all.py --only=medmo_4b` brings MedMO's")
    vision_config, language_config = sizes[name]
    with torch.device(device):
        vision = (load_encoder(vision_weights, device=device, **features) if vision_weights
                  else ViT(cut_depth(replace(vision_config, **features), True)[0]))
        if language_weights:
            language = load_language(language_weights, dtype, device, lora, split, bits, trained)
        elif bits:
            raise UserError(f"--base_bits={bits}: no base; name one with --language_weights or --start")
        else:
            kind = GptOss if isinstance(language_config, GptOssConfig) else LLaMA
            language = kind(replace(language_config, vocab_size=vocab_size)).to(dtype)
            if lora:
                add_lora(language, **lora)
            if split:
                split(language)
        if language.config.vocab_size < vocab_size:
            raise UserError(f"{language_weights}: its {language.config.vocab_size} tokens are fewer "
                            f"than the tokenizer's {vocab_size}; prepare with its own tokenizer")
        model = VLM(vision, language, make_projector(projector, vision.output_width, language.config.hidden_size))
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
        elif isinstance(module, GptOss):
            save_gpt_oss(module, folder / "language")
        else:
            save_llama(module, folder / "language", language)
    write_settings(folder / "config.json", {"weights": weights, "hashes": model.hashes, "lora": model.lora,
                                            **features_of(model.vision), "base_bits": model.base_bits})


def read_vlm_config(folder, parts=("vision", "projector", "language")):
    """What save_vlm wrote, the weights of these parts where they are now. Raises UserError if it is no VLM's."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no model here; run `python train_vlm.py`")
    config = read_settings(folder / "config.json")
    hashes = config.get("hashes", {})
    paths = {part: config["weights"].get(part, "") for part in parts}
    places = {path: find_weights(path, hashes.get(part)) for part, path in paths.items() if path}
    weights = {part: places.get(path, "") for part, path in paths.items()}
    return {**FEATURES, "base_bits": 0, **config, "weights": weights, "hashes": hashes}


def load_vision(folder, config, device):
    """The vision part of what save_vlm wrote, config its read_vlm_config, with its LoRA."""
    file = config["weights"]["vision"] or folder / "vision.safetensors"
    model = load_encoder(file, device=device, **{name: config[name] for name in FEATURES})
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
        language = load_language(source, dtype, device, lora.get("language"), split, bits, trained)
        if "language" in lora:
            load_adapter(language, folder / ADAPTERS["language"])
        vision, file = load_vision(folder, config, device), folder / "projector.safetensors"
        with on_meta():
            model = VLM(vision, language, projector_like(file, vision.output_width, language.config.hidden_size))
        load_exactly(model.projector, [file], torch.float32, device)
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
    model = load_vision(folder, {**config, **FEATURES, "layer": config["layer"]}, device)
    for name, layer in lora_layers(model).items():
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base)
    return model.requires_grad_(True)
