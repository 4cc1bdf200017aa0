"""
LoRA (arXiv 2106.09685): a frozen matrix W plus a trained product of two thin ones.

    y = x W^T + alpha / r * dropout(x) A^T B^T      W: (out, in)   A: (r, in)   B: (out, r)

A starts Kaiming-uniform and B zero, so that training starts from the frozen model exactly.
Adapters are saved and loaded in PEFT's own folder format and key names.
"""

import json
import math
import zlib
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data import read_settings
from plumbing.claims import lfs_pointer, lora_refusal
from plumbing.flags import UserError


def scramble(x):
    """Hash int32s, each bit of the result by every bit of x: Murmur3's finalizer. Products wrap."""
    x = (x ^ (x >> 16 & 0xFFFF)) * -2048144789
    x = (x ^ (x >> 13 & 0x7FFFF)) * -1028477387
    return x ^ (x >> 16 & 0xFFFF)


def token_keys(key, position):
    """(R, T) int32 keys of samples and positions in them -> (R, T) int32, one for each token."""
    return scramble(scramble(key) + position.to(torch.int32))


class DropoutKeys:
    """
    Which tokens a model is being run on, for its LoRALinears to drop by: int32 keys of all, (R, T), and
    of those that are wanted behind the last attention, (M,). None: by torch's generator.

    What is dropped is thereby a function of sample, token, layer and channel, however samples are packed, cut
    and divided among processes. A block that is recomputed asks again: run backward before the next forward.
    """

    all = wanted = None

    def set(self, keys, wanted=None):
        self.all, self.wanted = keys, keys if keys is None or wanted is None else keys.flatten()[wanted]


class LoRALinear(nn.Module):
    """
    A frozen nn.Linear, kept as `base`, with a trained low-rank update beside it. name: its path in the
    model, by which layers drop different channels; keys: the DropoutKeys of the model.
    """

    def __init__(self, base, r, alpha, dropout=0.0, name="", keys=None):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / r
        self.dropout, self.keys = dropout, keys or DropoutKeys()
        # A tensor, since torch.compile takes another number for another program
        salt = torch.tensor(zlib.crc32(name.encode()) >> 1, dtype=torch.int32, device=base.weight.device)
        self.register_buffer("salt", salt, persistent=False)
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, device=device))  # float32 even
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=device))  # on a bf16 base
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.unmerged = None  # the base's own weight while the update is merged into it

    def forward(self, x):
        y = self.base(x)
        if self.unmerged is not None:
            return y
        if self.dropout and self.training:
            x = self.drop(x)
        x = self.scale * (x @ self.lora_A.to(x.dtype).T)  # (..., in) -> (..., r)
        return y + (x @ self.lora_B.to(x.dtype).T).to(y.dtype)  # (..., r) -> (..., out)

    def drop(self, x):
        """Inputs (..., in) with a share of `dropout` of them 0 and the others raised to make up for it."""
        keys = self.keys.all if x.dim() == 3 else self.keys.wanted  # (R, T) or (M,)
        if keys is None:
            return F.dropout(x, self.dropout)
        channel = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
        random = scramble(keys[..., None] ^ scramble(channel + self.salt))  # (..., in), -2^31 to 2^31 - 1
        dropped = random < int(self.dropout * 2 ** 32) - 2 ** 31
        return x.masked_fill(dropped, 0) / (1 - self.dropout)

    @torch.no_grad()
    def merge(self):
        """Add the update to the base's weight; a second call changes nothing."""
        if self.unmerged is None:
            self.unmerged = self.base.weight.data
            update = self.scale * (self.lora_B @ self.lora_A)  # (out, in)
            self.base.weight.data = (self.unmerged.float() + update).to(self.unmerged.dtype)

    @torch.no_grad()
    def unmerge(self):
        """Put the base's own weight back: kept, not recomputed, hence the same bits."""
        if self.unmerged is not None:
            self.base.weight.data = self.unmerged
            self.unmerged = None


def add_lora(model, targets, r=8, alpha=16, dropout=0.0):
    """
    Freeze a model and put a LoRALinear around each nn.Linear whose name ends in one of `targets`
    (comma-separated, such as "q_proj,v_proj"). Returns their names.
    """
    suffixes = [target.strip() for target in targets.split(",")]
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for suffix in suffixes:
        if not any(("." + name).endswith("." + suffix) for name in linear):
            raise UserError(f"LoRA target {suffix!r} names no matrix of the {type(model).__name__}; it "
                            f"has {', '.join(sorted({name.split('.')[-1] for name in linear}))}")
    chosen = [name for name in sorted(linear)
              if any(("." + name).endswith("." + suffix) for suffix in suffixes)]
    model.requires_grad_(False)
    model.dropout_keys = DropoutKeys() if dropout else None
    for name in chosen:
        parent, _, child = name.rpartition(".")
        wrapped = LoRALinear(model.get_submodule(name), r, alpha, dropout, name, model.dropout_keys)
        setattr(model.get_submodule(parent), child, wrapped)
    return chosen


def lora_layers(model):
    """Name -> LoRALinear."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def save_adapter(model, folder, base_name, targets, r, alpha, dropout):
    """Write adapter_config.json and adapter_model.safetensors as PEFT does."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, layer in lora_layers(model).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A.detach().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B.detach().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    language = hasattr(model, "lm_head")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM" if language else None,
              "base_model_name_or_path": base_name, "r": r, "lora_alpha": alpha,
              "lora_dropout": dropout, "target_modules": [name.strip() for name in targets.split(",")],
              "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "modules_to_save": None,
              "use_rslora": False, "use_dora": False, "init_lora_weights": True,
              "rank_pattern": {}, "alpha_pattern": {}}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_adapter_config(folder):
    """
    The add_lora settings of an adapter folder, ours or PEFT's.

    Raises UserError when it is absent or uses what this file does not do.
    """
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise UserError(f"{path}: not there; an adapter folder has it beside adapter_model.safetensors")
    config = read_settings(path)
    if refused := lora_refusal(config):
        raise UserError(f"{path}: {refused}")
    targets, r, alpha, dropout = (
        config.get(key) for key in ("target_modules", "r", "lora_alpha", "lora_dropout"))
    sound = {"target_modules": isinstance(targets, list) and all(isinstance(t, str) for t in targets),
             "r": type(r) is int and 0 < r < 1 << 16,
             "lora_alpha": type(alpha) in (int, float) and abs(alpha) < 1e9,
             "lora_dropout": type(dropout) in (int, float) and 0 <= dropout < 1}
    if not all(sound.values()):
        wrong = ", ".join(f"{key} {config.get(key)!r:.50}" for key in sound if not sound[key])
        raise UserError(f"{path}: {wrong} cannot be")
    return {"targets": ",".join(sorted(targets)), "r": r, "alpha": alpha, "dropout": dropout}


def load_adapter(model, folder):
    """
    Copy an adapter's tensors into a model that add_lora has prepared.

    Raises UserError unless its tensors and the model's LoRA layers match one to one. Tensors of the base
    that PEFT has saved beside them have to equal the model's.
    """
    path = Path(folder) / "adapter_model.safetensors"
    if not path.is_file():
        pickled = path.with_suffix(".bin").is_file()
        raise UserError(f"{path}: not there" + "; its .bin is a pickle, which PEFT's save_pretrained writes "
                        "as safetensors" * pickled)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: {lfs_pointer(path) or f'not a whole safetensors file ({error})'}") from None
    drop_base(path, tensors, model)
    wanted = {}
    for name, layer in lora_layers(model).items():
        wanted[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A
        wanted[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B
    wrong = sorted(wanted.keys() ^ tensors.keys()) or sorted(
        key for key in wanted if wanted[key].shape != tensors[key].shape
        or not tensors[key].is_floating_point())
    if wrong:
        tensor = tensors.get(wrong[0])
        here = "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise UserError(f"{path}: {len(wrong)} tensors do not fit, the first {wrong[0]} (here {here})")
    with torch.no_grad():
        for key, parameter in wanted.items():
            parameter.copy_(tensors[key])


def drop_base(path, tensors, model):
    """
    Take out of an adapter's tensors those of the base, which PEFT saves whole where it adapts or may have
    resized an embedding. Raises UserError where one is not the model's own.
    """
    base = {name.replace(".base.", "."): tensor for name, tensor in model.state_dict().items()
            if ".lora_" not in name}
    for key in list(tensors):
        name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if name not in base:
            continue
        theirs, ours = tensors.pop(key), base[name]
        if theirs.shape != ours.shape or not ours.is_meta and not torch.equal(theirs.to(ours), ours):
            raise UserError(f"{path}: {key} is not the base's {name}: trained with it, or on another base")
