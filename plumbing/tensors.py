"""
Safetensors files, checked: names and shapes without reading them, tensors by their hashes, a model filled from
them completely, and what tells one file of weights from another.
"""

import contextlib
import hashlib
import json
import re
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.overrides import TorchFunctionMode

from plumbing.claims import lfs_pointer
from plumbing.devices import fill, is_split
from plumbing.files import TENSOR_HASHES, hash_file, hash_json, read_manifest, read_settings, write_manifest
from plumbing.flags import UserError


def tensor_shapes(file):
    """Names and shapes of a safetensors file's tensors, without reading them."""
    if not Path(file).is_file():
        raise UserError(f"{file}: no such weights file; `python prepare/all.py --only=biomedclip,"
                        "pmc_llama_7b` brings the paper's")
    try:
        with safe_open(file, "pt") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: {lfs_pointer(file) or f'not a whole safetensors file ({error})'}") from None


def read_metadata(file):
    """What a safetensors file says beside its tensors, texts by name."""
    with safe_open(file, "pt") as tensors:
        return tensors.metadata() or {}


def read_tensor(file, key):
    """
    A tensor of a safetensors file, in memory of its own. Raises UserError where it is not the one whose hash
    the file's metadata has, or write_hashes has put beside it; prepare/ sees to one of the two.
    """
    file = Path(file)
    # Opened anew for each: pages of an open map would count as memory until its end
    with safe_open(file, "pt") as tensors:
        tensor = tensors.get_tensor(key).clone()
        try:
            wanted = json.loads((tensors.metadata() or {}).get("tensors", "{}")).get(key)
        except (ValueError, AttributeError):
            wanted = "damaged"
    if wanted and wanted != tensor_hash(tensor):
        raise UserError(f"{file}: {key} was altered since it was written; fetch or make the file anew")
    beside = read_hashes(file.parent)
    if beside and beside["files"].get(file.name, {}).get("tensors", {}).get(key) != tensor_hash(tensor):
        raise UserError(f"{file}: {key} was altered since {TENSOR_HASHES} beside it was written; fetch the file "
                        f"anew or, if it is meant to be another, delete {TENSOR_HASHES}")
    return tensor


def tensor_hashes(tensors):
    """SHA-256 of each tensor's bytes, as a safetensors file's metadata for read_tensor to check."""
    return {"tensors": json.dumps({name: tensor_hash(tensor) for name, tensor in tensors.items()})}


def tensor_hash(tensor):
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy()).hexdigest()


def read_header(file):
    """The JSON text, in bytes, at the head of a safetensors file: names, shapes, places and metadata."""
    with open(file, "rb") as opened:
        return opened.read(int.from_bytes(opened.read(8), "little"))


def write_hashes(folder):
    """
    Write the hashes of a hub folder's files, of their tensors and of config.json beside them: files that are
    used as they came have none in themselves. From then on read_tensor checks each tensor, and hash_tensors
    knows a file without reading it. Reads every file twice.
    """
    files = {file.name: {"sha256": hash_file(file), "header": hashlib.sha256(read_header(file)).hexdigest(),
                         "tensors": {key: tensor_hash(read_tensor(file, key)) for key in tensor_shapes(file)}}
             for file in language_files(folder)}
    write_manifest(folder, TENSOR_HASHES, {"config": hash_file(folder / "config.json"), "files": files})


def read_hashes(folder):
    """What write_hashes has written into a folder, {} where it has not. Raises UserError where it was altered."""
    if not (folder / TENSOR_HASHES).is_file():
        return {}
    hashes = read_manifest(folder, TENSOR_HASHES)
    if hashes is None:
        raise UserError(f"{folder / TENSOR_HASHES}: damaged; delete it, and prepare/all.py writes it anew")
    return hashes


def tensors_of(module):
    """{name: tensor} of a module, as save_file takes them. Raises UserError where quantize.py has made it small."""
    state = module.state_dict()
    if any(tensor.is_meta for tensor in state.values()):
        raise UserError("a base of few bits is not saved: load it with --base_bits=0, to export or to merge it")
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


def plain_names(names):
    """{name in a file: name in a module}, LoRA's own left out: a wrapped matrix is the one that it wraps."""
    return {name.replace(".base.", "."): name for name in names if ".lora_" not in name}


class Undrawn(TorchFunctionMode):
    """Within it no normal numbers are drawn: a tensor stays as it is."""

    def __torch_function__(self, function, types, inputs=(), settings=None):
        if function in (torch.nn.init.normal_, torch.Tensor.normal_):
            return inputs[0] if inputs else settings["tensor"]
        return function(*inputs, **settings or {})


@contextlib.contextmanager
def on_meta():
    """
    Within it modules are made on the meta device, for load_exactly to fill. Nothing is drawn for them: torch would do
    so with the help of its compiler, whose import takes longer than its own.
    """
    with torch.device("meta"), Undrawn():
        yield


def load_exactly(model, files, dtype, device, prefix="", dropped=r"(?!)"):
    """
    Fill a model made within on_meta from safetensors files, in both directions completely, tensor by
    tensor: the peak of memory is the weights themselves. Of a model that processes have split, each fills its
    part; a LowLinear of quantize.py stores what it gets. On the meta device again nothing is read but names and
    shapes.

    dtype: of its floating tensors; None: as the empty model has them. prefix is taken off the files' keys; keys
    that fully match `dropped` are left out. Raises UserError with the first offenders when a key is unknown,
    missing, repeated or misshapen.
    """
    state, names = model.state_dict(), plain_names(model.state_dict())
    sources, problems = {}, []
    for file in files:
        for key, shape in tensor_shapes(file).items():
            name = key.removeprefix(prefix)
            if re.fullmatch(dropped, key):
                continue
            if name not in names:
                problems.append(f"{key} is unknown")
            elif name in sources:
                problems.append(f"{key} comes twice")
            elif shape != tuple(state[names[name]].shape):
                problems.append(f"{key} is {shape}, not {tuple(state[names[name]].shape)}")
            sources[name] = (file, key)
    problems += [f"{name} is missing" for name in names if name not in sources]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{files[0]}: does not fit this model: {'; '.join(problems[:3])}{more}")
    split, loaded = any(map(is_split, state.values())), {}
    low = {f"{name}.weight": module for name, module in model.named_modules() if hasattr(module, "store")}
    if split:
        state = model.to_empty(device=device).state_dict()
    for name, (file, key) in sources.items():
        target = state[names[name]]
        kind = dtype if dtype and target.is_floating_point() else target.dtype  # counts stay whole
        if str(device) == "meta":
            loaded[names[name]] = target.to(kind)
            continue
        tensor = read_tensor(file, key)
        if tensor.is_floating_point() != target.is_floating_point():
            raise UserError(f"{file}: {key} is {tensor.dtype}, which holds no weights")
        if names[name] in low:
            low[names[name]].store(tensor.to(device))
        elif split:
            with torch.no_grad():
                fill(target, tensor.to(kind))
        else:
            loaded[names[name]] = tensor.to(device, kind)
    if not split:
        model.load_state_dict(loaded, assign=True, strict=False)  # LoRA's own are not among the files'
    return model


def language_files(folder):
    """The safetensors files of a hub folder, as its index names them; UserError where some are missing."""
    known = read_hashes(folder).get("config")
    if known and known != hash_file(folder / "config.json"):
        raise UserError(f"{folder}/config.json: was altered since {TENSOR_HASHES} beside it was written; fetch it "
                        f"anew or, if it is meant to be another, delete {TENSOR_HASHES}")
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.is_file():
        if not whole.is_file() and (pickles := sorted(folder.glob("pytorch_model*.bin"))):
            raise UserError(f"{folder}: its weights are pickles, {pickles[0].name} the first; `python "
                            f"prepare/all.py --convert={folder}` writes them as safetensors into weights/")
        return [whole]
    settings = read_settings(index)
    weight_map, facts = settings.get("weight_map"), settings.get("metadata")
    if isinstance(facts, dict) and facts.get("config") not in (None, hash_file(folder / "config.json")):
        raise UserError(f"{folder}/config.json: was altered; delete {folder}, and prepare/all.py "
                        "makes it anew")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise UserError(f"{index}: does not say which files beside it hold the weights")
    names = sorted(set(names))
    if whole.is_file() and whole.name not in names:
        raise UserError(f"{folder}: both {whole.name} and the files of {index.name} are there; remove one of "
                        "the two")
    count = re.search(r"-(\d{5})-of-(\d{5})\.safetensors$", names[0])
    # gpt-oss-20b's three are 0 to 2 of 2: who counts from 0 names the last one
    if count and len(names) != (total := int(count[2]) + (int(count[1]) == 0)):
        raise UserError(f"{folder}: {len(names)} of {total} files of the weights are in its index; "
                        "fetch the others, then delete what prepare/all.py made of these and run it again")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"{folder}: {missing[0]} is missing, {len(missing)} of {len(names)} files that "
                        f"{index.name} names; fetch them into it")
    return [folder / name for name in names]


# ----------------------------------------------------------------------------- which weights they are

def hash_weights(path):
    """
    SHA-256 that tells a weights file, or a hub folder of them, from others, by the configs beside it, too. Of
    a file that holds the hash of each of its tensors, which read_tensor checks, the header says all; where
    write_hashes has put them beside it, these do; else every byte is read.
    """
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    configs = [files[0].parent / name for name in ("config.json", "open_clip_config.json")] if files else []
    return hash_json({file.name: hash_tensors(file) for file in files}
                     | {config.name: hash_file(config) for config in configs if config.is_file()})


def hash_tensors(path):
    """hash_weights of one file, whatever lies beside it."""
    if path.suffix == ".safetensors":
        header = read_header(path)
        with contextlib.suppress(ValueError, AttributeError):
            tensors = json.loads(header)
            facts = tensors.pop("__metadata__", {})
            if json.loads(facts.get("tensors", "{}")).keys() == tensors.keys():
                return hash_json([facts, tensors])  # safetensors writes the facts in any order
        beside = read_hashes(path.parent).get("files", {}).get(path.name, {})
        if beside.get("header") == hashlib.sha256(header).hexdigest():
            return beside["sha256"]  # what hash_file gives, with these tensors
    return hash_file(path)


def find_weights(path, sha256):
    """
    Where the base weights of a run are: where they were when it was saved, or in the folder weights/ here.
    Raises UserError when they are in neither place, or are others than they were.
    """
    places = [Path(path), Path("weights") / Path(path).name]
    place = next((place for place in places if place.exists()), None)
    if place is None:
        raise UserError(f"{path}: the run's base weights are not there; bring them back, or put them into "
                        f"{places[1]}")
    if sha256 is None:
        print(f"{place}: not known whether these are the base weights that the run was trained on: it was "
              "saved before that was recorded", file=sys.stderr)
    elif hash_weights(place) != sha256:
        raise UserError(f"{place}: not the base weights that the run was trained on; bring those back, or put "
                        f"them into {places[1]}" if place == places[0] else
                        f"{place}: not the base weights that the run was trained on, which were in {path}")
    return str(place)
