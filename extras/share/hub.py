"""
A trained model's tensors in the hub's files, LoRA merged, for export.py; and all of a Qwen3-VL's folder.

No more than one file's tensors are in memory. Of a Qwen3-VL the names are the checkpoint's, and so are the dtypes
where the run began with one: what trained in float32 is rounded to them once.
"""

import math
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from plumbing.files import read_settings, write_settings
from plumbing.flags import UserError
from plumbing.tensors import language_files, plain_names, read_tensor, tensor_shapes
from prepare.weights import WEIGHTS
from zoo.adapters import ADAPTERS
from zoo.gpt_oss import GptOss
from zoo.qwen3_files import PARTS, write_config

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # as safetensors calls them
BESIDE = set("""
    preprocessor_config.json video_preprocessor_config.json processor_config.json chat_template.json
    chat_template.jinja generation_config.json tokenizer_config.json special_tokens_map.json added_tokens.json
    vocab.json merges.txt""".split())  # of a base's folder, beside config.json and tokenizer.json
PLACES = ("_name_or_path", "name_or_path")  # of config files: often a place on somebody's disk

# What zoo/chatml.py writes, for a folder that began with none
CHAT_TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- for part in ([{'text': message.content}] if message.content is string else message.content) %}
{{- '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


# ----------------------------------------------------------------------------- tensors

def lora_updates(checkpoint, lora):
    """{name of a matrix in a file: (scale, A, B)} of a checkpoint's adapters. lora: {part: its settings}."""
    updates = {}
    for part, settings in lora.items():
        adapter = load_file(checkpoint / ADAPTERS[part] / "adapter_model.safetensors")
        names = {key.removesuffix(".lora_A.weight") for key in adapter if key.endswith(".lora_A.weight")}
        updates |= {f"{name.removeprefix('base_model.model.')}.weight": (
            settings["alpha"] / settings["r"], *(adapter[f"{name}.lora_{side}.weight"] for side in "AB"))
            for name in names}
    return updates


def is_coded(key):
    """Whether a tensor is of an expert in MXFP4, which is copied byte for byte."""
    return key.endswith(("_blocks", "_scales"))


def language_tensors(checkpoint, model):
    """{name: (file, shape)} of the language model's tensors as they lie, a gpt-oss's experts stacked; none of LoRA."""
    base = Path(model.weights["language"] or checkpoint / "language")
    places = {name: (file, shape) for file in language_files(base) for name, shape in tensor_shapes(file).items()}
    names = places if isinstance(model.language, GptOss) else plain_names(model.language.state_dict())
    return {name: places[name] for name in names}


def count_bytes(tensors, dtype):
    """{name: bytes} of language_tensors, as they are written in a dtype."""
    return {name: math.prod(shape) * (1 if is_coded(name) else dtype.itemsize)
            for name, (_, shape) in tensors.items()}


def language_dtype(tensors):
    """What language_tensors are written in by default: beside experts in MXFP4 in bfloat16, else in float32."""
    return torch.bfloat16 if any(map(is_coded, tensors)) else torch.float32


def read_merged(file, key, dtype, update=None):
    """A tensor of a file in a dtype, an update, (scale, A, B), added to it first, as LoRALinear.merge does."""
    tensor = read_tensor(file, key)
    if update:
        scale, A, B = update
        tensor = tensor.float() + scale * (B @ A)
    tensor = tensor if is_coded(key) else tensor.to(dtype)
    if not tensor.isfinite().all():
        raise UserError(f"{file}: {key} has values past those of {dtype}; try --dtype=bfloat16")
    return tensor


def write_tensors(sizes, read, file_bytes, folder):
    """
    read(name) of each name of `sizes`, {name: bytes}, into model.safetensors, or into several files of at most
    file_bytes and an index of them.
    """
    parts, room, weight_map = [[]], file_bytes, {}
    for name, size in sizes.items():
        if size > room and parts[-1]:
            parts, room = [*parts, []], file_bytes
        parts[-1].append(name)
        room -= size
    for number, names in enumerate(parts, start=1):
        file = "model" + f"-{number:05}-of-{len(parts):05}" * (len(parts) > 1) + ".safetensors"
        save_file({name: read(name) for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(parts) > 1:
        write_settings(folder / "model.safetensors.index.json",
                       {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})


def base_name(path):
    """What a base is called elsewhere: by its name on the hub, if it has one there, else by its last name here."""
    name = Path(path or "").name
    return next((entry.hub for entry in WEIGHTS.values() if entry.target == name), name)


# ----------------------------------------------------------------------------- a Qwen3-VL

def base_folder(model):
    """The hub folder that a Qwen3-VL began with, "" where all of it has trained or began here."""
    return next(filter(None, map(model.weights.get, PARTS)), "")


def locate(checkpoint, model, part):
    """{name in the hub's files: (file, key there, shape, dtype)} of a part, without its LoRA."""
    prefix, source = PARTS[part][1], model.weights[part]
    own = checkpoint / f"{part}.safetensors"
    files = [own] if not source and own.is_file() else language_files(Path(source or checkpoint / part))
    places = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            places |= {key: (file, key, tuple(entry.get_shape()), DTYPES.get(entry.get_dtype(), torch.float32))
                       for key in tensors.keys() for entry in [tensors.get_slice(key)]}
    return {prefix + name: places.get(prefix + name) or places[name]
            for name in plain_names(getattr(model, part).state_dict())}


def write_places(places, dtypes, updates, file_bytes, folder):
    """Write tensors that locate() gives, each in its dtype of dtypes, {name: dtype}, and with its update."""
    sizes = {name: torch.Size(shape).numel() * dtypes[name].itemsize for name, (_, _, shape, _) in places.items()}
    write_tensors(sizes, lambda name: read_merged(*places[name][:2], dtypes[name], updates.get(name)), file_bytes,
                  folder)


def write_model(checkpoint, model, tokenizer, image, dtype, file_bytes, folder):
    """
    A Qwen3-VL with its LoRA merged as the hub has it, for transformers and vLLM. model: the run's on the meta
    device; dtype: of all tensors; None: each has the base's, or its own where there is none.
    """
    folder.mkdir()
    base, places = base_folder(model), {}
    for part in PARTS:
        places |= locate(checkpoint, model, part)
    dtypes = {name: dtype or place[3] for name, place in places.items()}
    if base and not dtype:
        for file in language_files(Path(base)):
            with safe_open(file, "pt") as tensors:
                dtypes |= {key: DTYPES.get(tensors.get_slice(key).get_dtype(), torch.float32)
                           for key in dtypes.keys() & tensors.keys()}
    write_places(places, dtypes, lora_updates(checkpoint, model.lora), file_bytes, folder)
    copy_settings(base, folder, model) if base else describe(tokenizer, model, folder)
    shutil.copyfile(tokenizer.path, folder / "tokenizer.json")
    name = str(dtype or dtypes["model.language_model.norm.weight"]).removeprefix("torch.")
    settings = read_settings(folder / "config.json")
    for section in (settings, settings["text_config"], settings["vision_config"]):
        section.pop("torch_dtype", None)
        section["dtype"] = name
    write_settings(folder / "config.json", settings)
    if image["resize"] == "smart" and image["size"] < (most := model.vision.config.max_pixels):
        print(f"model: its preprocessor_config.json allows {most:,} pixels an image; those of the run had "
              f"{image['size']:,} at most: give that as size to whoever reads images for it")


def copy_settings(base, folder, model):
    """The files beside a base's tensors, without names of places on a disk."""
    write_config(folder, model.vision.config, model.language.config)  # where the base has no preprocessor's
    copy_beside(base, folder)


def copy_beside(base, folder):
    """config.json and the like of a hub folder, without names of places on a disk."""
    for path in sorted(Path(base).iterdir()):
        if path.name in BESIDE | {"config.json"}:
            shutil.copyfile(path, folder / path.name)
            settings = read_settings(path) if path.name.endswith("config.json") else {}
            if {*PLACES} & settings.keys():
                write_settings(folder / path.name, {key: value for key, value in settings.items()
                                                    if key not in PLACES})


def describe(tokenizer, model, folder):
    """The files that others want beside the tensors of a Qwen3-VL that began here."""
    write_config(folder, model.vision.config, model.language.config)
    ids = {f"{name}_token_id": tokenizer.model.token_to_id(f"<|{piece}|>") for name, piece in (
        ("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"),
        ("vision_end", "vision_end"))}
    end, of_text = tokenizer.stops
    write_settings(folder / "config.json", read_settings(folder / "config.json")
                   | {name: number for name, number in ids.items() if number is not None})
    write_settings(folder / "generation_config.json", {"eos_token_id": [end, of_text], "pad_token_id": of_text})
    write_settings(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.piece(end),
        "pad_token": tokenizer.piece(of_text), "clean_up_tokenization_spaces": False})
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def write_adapters(checkpoint, model, folder):
    """One PEFT folder with the LoRA of all parts of a Qwen3-VL that have some."""
    folder.mkdir()
    parts = [part for part in ("language", "vision") if part in model.lora]
    tensors = {part: load_file(checkpoint / ADAPTERS[part] / "adapter_model.safetensors") for part in parts}
    settings = [read_settings(checkpoint / ADAPTERS[part] / "adapter_config.json") for part in parts]
    targets = settings[0]["target_modules"] if parts[0] == "language" else []
    # Two names deep: `proj` alone is the patch embedding's, too, and `linear_fc1` the mergers'
    targets += sorted({".".join(key.split(".")[-4:-2]) for key in tensors.get("vision", ())})
    patterns = {}
    for name, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        if settings[-1][name] != settings[0][name]:
            patterns[pattern] = {r"visual\..+": settings[-1][name]}
    save_file({name: tensor for part in parts for name, tensor in tensors[part].items()},
              folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_settings(folder / "adapter_config.json", settings[0] | patterns | {
        "target_modules": targets, "base_model_name_or_path": base_name(base_folder(model))})
    if not model.weights["projector"]:
        print("adapter: without the mergers, which this run has trained, too: they are in model/ alone; train "
              "with --projector=frozen where the adapter is to say all")


def write_base(model, step):
    """What a checkpoint reads from its base, into the checkpoint's folder, as a run keeps parts of its own."""
    base = base_folder(model)
    for part in PARTS:
        if not model.weights[part]:
            continue
        places = locate(step, model, part)
        dtypes = {name: place[3] for name, place in places.items()}
        if part == "language":
            (step / part).mkdir()
            write_places(places, dtypes, {}, 5e9, step / part)
            copy_settings(base, step / part, model)
        else:
            prefix = PARTS[part][1]
            save_file({name.removeprefix(prefix): read_merged(*place[:2], dtypes[name]) for name, place in
                       places.items()}, step / f"{part}.safetensors", metadata={"format": "pt"})
