"""
Pretrained weights: published as pickles, kept here as safetensors, which hold numbers and no code.

A pickle is read with weights_only=True, which can build tensors and nothing else, and through a
memory map. Values are copied bit for bit; each file's metadata says what it was made from.
"""

import json
import os
import pickle
import re
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from data import UserError
from prepare.download import Source, hash_file


@dataclass(frozen=True, kw_only=True)
class Weights(Source):
    """What is known about a set of weights, and how it is written."""
    target: str  # file or folder below weights/
    write: Callable  # (Weights, raw folder, target) -> None
    hub_type: str = "model"


def convert(weights, source, target, keep=r".*"):
    """Write the tensors of a pickle whose names match `keep` as safetensors; returns the names."""
    import torch  # takes a second, which a run over prepared datasets need not wait
    from safetensors.torch import save_file

    try:  # only a zip can be mapped; torch.save made no zips before version 1.6
        state = torch.load(source, weights_only=True, mmap=zipfile.is_zipfile(source))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{source}: damaged, or it holds more than tensors "
                        f"({str(error).strip().partition(chr(10))[0]}); fetch it again") from None
    tensors = {name: tensor.contiguous() for name, tensor in state.items() if re.fullmatch(keep, name)}
    if not tensors:
        raise UserError(f"{source}: no tensor named like {keep} among {', '.join(list(state)[:3])}, ...")
    save_file(tensors, target, metadata={"format": "pt", "source": weights.page,
                                         "source_sha256": hash_file(source)})
    with open(target, "rb") as file:
        os.fsync(file.fileno())
    return list(tensors)


def write_biomedclip(weights, raw, target):
    """The visual tower alone, under its own names."""
    partial = target.with_name(f".{target.name}.partial")
    convert(weights, raw / "open_clip_pytorch_model.bin", partial, r"visual\.trunk\..*")
    partial.replace(target)


def write_llama(weights, raw, target):
    """A folder in the hub's layout, a safetensors file for each pickle."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    weight_map = {}
    for source in sorted(raw.glob("pytorch_model*.bin")):
        name = source.name.replace("pytorch_model", "model").replace(".bin", ".safetensors")
        weight_map |= dict.fromkeys(convert(weights, source, partial / name), name)
    (partial / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map}))
    shutil.copy(raw / "config.json", partial / "config.json")
    partial.rename(target)


WEIGHTS = {weights.name: weights for weights in (
    Weights(name="biomedclip", licence="MIT", access="open", megabytes=784,
            page="https://huggingface.co/microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
            hub="microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
            hub_files=("open_clip_pytorch_model.bin",), layouts=(("open_clip_pytorch_model.bin",),),
            target="biomedclip.safetensors", write=write_biomedclip),
    Weights(name="pmc_llama_7b", licence="LLaMA's", access="open", megabytes=26954,
            page="https://huggingface.co/chaoyi-wu/PMC_LLAMA_7B", hub="chaoyi-wu/PMC_LLAMA_7B",
            hub_files=("config.json", "pytorch_model*.bin"),
            layouts=(("config.json", "pytorch_model*.bin"),),
            target="pmc_llama_7b", write=write_llama))}
