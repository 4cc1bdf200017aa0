"""
LoRA in files, as PEFT writes it: a folder with adapter_config.json and adapter_model.safetensors.

    base_model.model.layers.0.self_attn.q_proj.lora_A.weight      of a LLaMA; of an encoder without "layers."
    base_model.model.model.language_model.layers.0. ...           of the text part of a Qwen3-VL
    base_model.model.model.visual.blocks.0.attn.qkv. ...          of its tower
    base_model.model.model.layers.0.mlp.experts. ...              of a gpt-oss's experts, all of a layer together

PEFT calls the last target_parameters. Of E experts A is (E r, in), one expert's rows after the other's, and B
(out, r E), in which the experts take turns. Where both matrices of experts have LoRA, the first is named base_layer.

A run keeps a folder of each part. One that PEFT has written for a Qwen3-VL may have both parts in it: the names
tell which tensor is whose. Every tensor has to find its place.
"""

import re
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lora import add_lora, lora_layers
from plumbing.claims import lfs_pointer, read_adapter_config
from plumbing.files import write_settings
from plumbing.flags import UserError
from plumbing.tensors import plain_names

ADAPTERS = {"vision": "vision_adapter", "language": "adapter"}  # part -> its folder in a VLM's
TOWER = "base_model.model.model.visual."
MERGERS = re.escape(TOWER) + r"(merger|deepstack_merger_list)\."
EXPERT = re.compile(r"(.*\.mlp\.experts\.)\d+\.(gate_up_proj|down_proj)\.(lora_[AB]\.weight)")


def adapter_parameters(model):
    """{PEFT's name: parameter} of a model's LoRA."""
    prefix = "base_model.model." + getattr(model, "prefix", "")
    return {f"{prefix}{name}.lora_{side}.weight": getattr(layer, f"lora_{side}")
            for name, layer in lora_layers(model).items() for side in "AB"}


def peft_parameters(model):
    """{PEFT's name: parameters of the one matrix, or of a layer's experts in order} of a model's LoRA."""
    groups, matrices = defaultdict(list), adapted_experts(model)
    for key, parameter in adapter_parameters(model).items():
        if match := EXPERT.fullmatch(key):
            inner = "base_layer." * (match[2] == "gate_up_proj" and len(matrices) == 2)
            key = f"{match[1]}{inner}{match[3]}"
        groups[key].append(parameter)
    return groups


def adapted_experts(model):
    """Which matrices of a model's experts have LoRA, in the order in which PEFT wraps them."""
    return sorted({match[2] for key in adapter_parameters(model) if (match := EXPERT.fullmatch(key))}, reverse=True)


def stack(key, parameters):
    """One tensor of those of a layer's experts, or of one matrix alone."""
    return torch.cat(parameters) if "lora_A" in key else torch.stack(parameters, dim=2).flatten(1)


def unstack(key, tensor, count):
    """The tensors that `stack` made one of."""
    return tensor.chunk(count) if "lora_A" in key else tensor.unflatten(1, (-1, count)).unbind(2)


@torch.no_grad()
def save_adapter(model, folder, base_name, targets, r, alpha, dropout):
    """Write adapter_config.json and adapter_model.safetensors as PEFT does."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: stack(key, parameters).contiguous() for key, parameters in peft_parameters(model).items()}
    names, experts = [name.strip() for name in targets.split(",")], adapted_experts(model)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM" if hasattr(model, "embed") else None,
              "base_model_name_or_path": base_name, "r": r, "lora_alpha": alpha,
              "lora_dropout": dropout * (not experts),  # which PEFT has not for experts
              "target_modules": [name for name in names if name.split(".")[-1] not in experts],
              "target_parameters": [f"mlp.experts.{name}" for name in experts] or None,
              "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "modules_to_save": None,
              "use_rslora": False, "use_dora": False, "init_lora_weights": True,
              "rank_pattern": {}, "alpha_pattern": {}}
    write_settings(folder / "adapter_config.json", config)


def read_tensors(folder):
    """(path, {name: tensor}) of an adapter's folder. Raises UserError where they cannot be read."""
    path = Path(folder) / "adapter_model.safetensors"
    if not path.is_file():
        pickled = path.with_suffix(".bin").is_file()
        raise UserError(f"{path}: not there" + "; its .bin is a pickle, which PEFT's save_pretrained writes "
                        "as safetensors" * pickled)
    try:
        return path, load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: {lfs_pointer(path) or f'not a whole safetensors file ({error})'}") from None


def read_adapter(folder):
    """
    {part: add_lora's settings} of an adapter's folder, ours or PEFT's. Raises UserError where it cannot be read,
    or holds what has no LoRA here.
    """
    settings, (path, tensors) = read_adapter_config(folder), read_tensors(folder)
    if merger := next((key for key in sorted(tensors) if re.match(MERGERS, key)), None):
        raise UserError(f"{path}: {merger} adapts a merger, which has no LoRA here: leave mergers out of PEFT's "
                        "target_modules, and train them by --projector=full")
    layers = {"vision": set(), "language": set()}
    for key in tensors:
        layers["vision" if key.startswith(TOWER) else "language"].add(re.sub(r"\.lora_[AB]\.weight$", "", key))
    targets = settings["targets"].split(",")
    of_part = {part: [target for target in targets if any(name.endswith(f".{target}") for name in names)]
               for part, names in layers.items()}
    # One without tensors is the language part's, which will miss them
    of_part["language"] += [target for target in targets if target not in sum(of_part.values(), [])]
    return {part: settings | {"targets": ",".join(own)} for part, own in of_part.items() if own}


def load_adapters(model, folder):
    """Put all of an adapter's folder into a VLM: LoRA where it has none yet, and the tensors of each part."""
    for part, settings in read_adapter(folder).items():
        if part not in model.lora:
            add_lora(getattr(model, part), **settings)
            model.lora[part] = settings
        load_adapter(getattr(model, part), folder, of_both=True)


@torch.no_grad()
def load_adapter(model, folder, of_both=False):
    """
    Copy an adapter's tensors into a model that add_lora has prepared. of_both: those of the other part of a
    Qwen3-VL, too, are in the folder.

    Raises UserError unless its tensors and the model's LoRA layers match one to one. Tensors of the base
    that PEFT has saved beside them have to equal the model's.
    """
    path, tensors = read_tensors(folder)
    groups = peft_parameters(model)
    wanted = {key: stack(key, parameters) for key, parameters in groups.items()}
    if of_both:
        own = min(wanted).startswith(TOWER)
        tensors = {key: tensor for key, tensor in tensors.items() if key.startswith(TOWER) == own}
    drop_base(path, tensors, model)
    wrong = sorted(wanted.keys() ^ tensors.keys()) or sorted(
        key for key in wanted if wanted[key].shape != tensors[key].shape
        or not tensors[key].is_floating_point())
    if wrong and tensors and not wanted.keys() & tensors.keys():
        raise UserError(f"{path}: its tensors have other names, as {min(tensors)}, than this model's, as "
                        f"{min(wanted)}: of another model, or named by another library than PEFT on transformers")
    if wrong:
        tensor = tensors.get(wrong[0])
        here = "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise UserError(f"{path}: {len(wrong)} tensors do not fit, the first {wrong[0]} (here {here})")
    for key, parameters in groups.items():
        for parameter, tensor in zip(parameters, unstack(key, tensors[key], len(parameters))):
            parameter.copy_(tensor)


def drop_base(path, tensors, model):
    """
    Take out of an adapter's tensors those of the base, which PEFT saves whole where it adapts or may have
    resized an embedding. Raises UserError where one is not the model's own.
    """
    state = model.state_dict()
    names = plain_names(state)
    for key in list(tensors):
        name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if name not in names:
            continue
        theirs, ours = tensors.pop(key), state[names[name]]
        if theirs.shape != ours.shape or not ours.is_meta and not torch.equal(theirs.to(ours), ours):
            raise UserError(f"{path}: {key} is not the base's {name}: trained with it, or on another base")
