"""
Pretrained weights: published as pickles, kept here as safetensors, which hold numbers and no code. What is
published as safetensors, Qwen3-VL, MedMO and gpt-oss, is downloaded into weights/ and used as it is, once checked.

A pickle is read with weights_only=True, which can build tensors and numbers and nothing else, and
through a memory map. Values are kept (float16 of an image encoder as float32, which is exact), names
become those of model.py; each file's metadata says what it was made from.
"""

import json
import re
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from plumbing.claims import lfs_pointer, vit_facts
from plumbing.files import TENSOR_HASHES, hash_file, sort_metadata, sync
from plumbing.flags import UserError
from prepare.download import Source, hub_revision


@dataclass(frozen=True, kw_only=True)
class Weights(Source):
    """What is known about a set of weights, and how it is written."""
    target: str  # file or folder below weights/
    write: Callable  # (Weights, raw folder, target) -> None
    hub_type: str = "model"
    activation: str = ""  # of a ViT, which no tensor tells: gelu, quick_gelu or gelu_tanh
    only_by_name: bool = False  # not of the paper's model, and large: left out unless --only names it

    def is_prepared(self, weights_dir):
        return (Path(weights_dir) / self.target / (TENSOR_HASHES if self.in_place else "")).exists()


ENCODERS = {  # raw file -> keys dropped, as no part of the image encoder, and what is taken off the others
    "open_clip_pytorch_model.bin": (r"visual\.head\.proj\.weight|text\..*|logit_scale", ""),
    "image_encoder(resnet50).pth": (r"(?!)", ""), "checkpoint.pt": (r"module\.(?!visual\.).*", "module.visual.")}


def read_pickle(source):
    """The tensors of a pickle by name; of a training's checkpoint, those under state_dict."""
    import numpy as np
    import torch  # takes a second, which a run over prepared datasets need not wait

    # PMC-CLIP's learning rate is a number of numpy's, under the name that numpy 1 had for its maker.
    make = np.float64().__reduce__()[0]
    numbers = [make, (make, "numpy.core.multiarray.scalar"), np.dtype, type(np.dtype("float64"))]
    if pointer := lfs_pointer(source):
        raise UserError(f"{source}: {pointer}")
    try:  # only a zip can be mapped; torch.save made no zips before version 1.6
        with torch.serialization.safe_globals(numbers):
            state = torch.load(source, "cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
    except Exception as error:  # a broken pickle fails wherever its next instruction leads
        raise UserError(f"{source}: damaged, or it holds more than tensors "
                        f"({str(error).strip().partition(chr(10))[0]}); fetch it again") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    tensors = {name: tensor for name, tensor in state.items() if torch.is_tensor(tensor)}
    if not tensors:
        raise UserError(f"{source}: no tensors by name in it; is it the right file?")
    return tensors


def write_tensors(weights, source, tensors, target, **facts):
    from plumbing.tensors import tensor_hashes
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, target, metadata={
        "format": "pt", "source": hub_revision(source.parent) or weights.page,
        "source_sha256": hash_file(source), **facts} | tensor_hashes(tensors))
    sort_metadata(target)
    sync(target)


def write_encoder(weights, raw, target):
    """An image encoder alone, of the first layout that is there; refused if model.py cannot load it."""
    import torch
    from plumbing.tensors import read_tensor, tensor_shapes
    from weights import load_encoder
    from zoo.clip import gather, require_no_program, timm_names

    source = next(raw / files[-1] for files in weights.layouts if (raw / files[-1]).is_file())
    require_no_program(source)
    stored = tensor_shapes(source) if source.suffix == ".safetensors" else read_pickle(source)
    dropped, prefix = ENCODERS.get(source.name, ("(?!)", ""))
    names = timm_names(stored) or {key: key.removeprefix(prefix) for key in stored if not re.fullmatch(dropped, key)}

    def read(key):
        tensor = read_tensor(source, key) if source.suffix == ".safetensors" else stored[key]
        return tensor.float() if tensor.dtype == torch.float16 else tensor

    tensors = gather(source, names, read)
    partial = target.with_name(f".{target.name}.partial")
    write_tensors(weights, source, tensors, partial, **encoder_facts(weights, source, tensors))
    try:
        load_encoder(partial)
    except UserError as error:
        raise UserError(f"{source}: {str(error).removeprefix(f'{partial}: ')}") from None
    partial.replace(target)


def encoder_facts(weights, source, tensors):
    """What no tensor of a ViT tells, as metadata: by a config beside its file, or known of it."""
    from zoo.encoders import read_config, untold

    if not weights.activation:
        return {}
    known = {} if "activation" in vit_facts(source, {})[0] else {"activation": weights.activation}
    shapes = {name.removeprefix("visual.trunk."): tuple(tensor.shape) for name, tensor in tensors.items()}
    return untold(read_config(source, shapes, known))


def llama_pickles(raw):
    """A LLaMA's pickles in a raw folder, as many as their own names say; UserError where some are missing."""
    sources = sorted(raw.glob("pytorch_model*.bin"))
    if not sources:
        raise UserError(f"{raw}: no pytorch_model*.bin in it")
    count = re.search(r"-of-(\d{5})\.bin$", sources[-1].name)
    wanted = [f"pytorch_model-{number:05}-of-{count[1]}.bin" for number in range(1, int(count[1]) + 1)
              ] if count else ["pytorch_model.bin"]
    names = [source.name for source in sources]
    if missing := [name for name in wanted if name not in names]:
        raise UserError(f"{raw}: {missing[0]} is missing, {len(missing)} of {len(wanted)} files; fetch them "
                        "into it and run it again")
    if other := [name for name in names if name not in wanted]:
        raise UserError(f"{raw}: {other[0]} is of another download than {wanted[0]}; remove one of the two")
    return sources


def write_llama(weights, raw, target):
    """
    A folder in the hub's layout, a safetensors file for each pickle, and the tokenizer where there is
    one; refused if model.py cannot load it, which is tried without its values.
    """
    from weights import load_llama

    sources = llama_pickles(raw)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    weight_map = {}
    for source in sources:
        name = source.name.replace("pytorch_model", "model").replace(".bin", ".safetensors")
        tensors = read_pickle(source)
        write_tensors(weights, source, tensors, partial / name)
        weight_map |= dict.fromkeys(tensors, name)
    for name in ("config.json", "tokenizer.model", "tokenizer.json"):
        if name == "config.json" or (raw / name).is_file():
            shutil.copy(raw / name, partial / name)
    (partial / "model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {"config": hash_file(raw / "config.json")}, "weight_map": weight_map}))
    try:
        load_llama(partial, device="meta")
    except UserError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(str(error).replace(str(partial), str(raw))) from None
    partial.rename(target)


def check_qwen(weights, raw, target):
    """Check a Qwen3-VL's hub folder, see check_folder."""
    import torch
    from zoo.qwen3_files import PARTS, load_qwen

    model = load_qwen(dict.fromkeys(PARTS, target), torch.bfloat16, "meta")
    check_folder(weights, target, model, model.language)


def check_gpt_oss(weights, raw, target):
    """Check a gpt-oss's hub folder, see check_folder."""
    import torch
    from zoo.gpt_oss_files import load_gpt_oss

    model = load_gpt_oss(target, torch.bfloat16, "meta", trained=True)  # so that each weight is counted as one
    check_folder(weights, target, model, model)


def check_folder(weights, target, model, language):
    """
    Once a hub folder's model was loaded without its values, which names what does not fit, hold its tokenizer against
    the language part, and write the hashes of its tensors into it. Nothing else in it changes, so that it may be a
    link to where the files have always been.
    """
    from plumbing.tensors import write_hashes
    from zoo.chatml import open_tokenizer

    words, rows = open_tokenizer(target).vocab_size, language.config.vocab_size
    if words > rows:
        raise UserError(f"{target}: tokenizer.json has {words:,} tokens and config.json {rows:,}; is one of "
                        "the two another model's?")
    print(f"{weights.name}: {sum(p.numel() for p in model.parameters()):,} parameters in place; reading them for "
          "their hashes", flush=True)
    try:
        write_hashes(target)
    except OSError as error:
        raise UserError(f"{target}: fits, but {TENSOR_HASHES} cannot be written into it ({error.strerror}), so "
                        f"that each run will read it once more; --model={target} works all the same") from None


def convert_llama(folder, weights_dir):
    """A hub folder of one's own whose weights are pickles -> the folder that is made of it in weights_dir."""
    folder = Path(folder).resolve()
    target = Path(weights_dir) / folder.name
    if not (folder / "config.json").is_file():
        raise UserError(f"--convert={folder}: no config.json in it; name a folder as the hub has them")
    if target.exists():
        raise UserError(f"{target}: there already; remove it, or choose another --weights_dir")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_llama(Weights(name=folder.name, licence="unknown", access="", megabytes=0, page=str(folder),
                        layouts=(), target=folder.name, write=write_llama), folder, target)
    return target


QWEN_FILES = (
    "config.json", "model*.safetensors", "model.safetensors.index.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "processor_config.json", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.json", "chat_template.jinja")


def qwen(name, hub, parameters):
    """A Qwen3-VL on the hub. Its size is that of bfloat16, in which Qwen's are; MedMO's are taken to be, too."""
    return Weights(name=name, licence="Apache-2.0", access="open", megabytes=round(2 * parameters / 1e6) + 12,
                   page=f"https://huggingface.co/{hub}", hub=hub, hub_files=QWEN_FILES, only_by_name=True,
                   layouts=(("config.json", "model*.safetensors", "tokenizer.json"),), in_place=True,
                   target=name, write=check_qwen)


def siglip(name, hub, licence, access, megabytes):
    """A SigLIP on the hub, of whose file the image tower is written: heads and pixels are told by the config beside."""
    files = ("config.json", "model.safetensors")
    return Weights(name=name, licence=licence, access=access, megabytes=megabytes, only_by_name=True,
                   page=f"https://huggingface.co/{hub}", hub=hub, hub_files=files, layouts=(files,),
                   target=f"{name}.safetensors", write=write_encoder, activation="gelu_tanh")


GPT_OSS_FILES = (  # neither original/ nor metal/, which hold the same numbers
    "config.json", "model*.safetensors", "model.safetensors.index.json", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

WEIGHTS = {weights.name: weights for weights in (
    Weights(name="biomedclip", licence="MIT", access="open", megabytes=784,
            page="https://huggingface.co/microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
            hub="microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
            hub_files=("open_clip_pytorch_model.bin",), layouts=(("open_clip_pytorch_model.bin",),),
            target="biomedclip.safetensors", write=write_encoder, activation="gelu"),
    Weights(name="pmc_llama_7b", licence="LLaMA's", access="open", megabytes=26954,
            page="https://huggingface.co/chaoyi-wu/PMC_LLAMA_7B", hub="chaoyi-wu/PMC_LLAMA_7B",
            hub_files=("config.json", "pytorch_model*.bin", "tokenizer.model"),
            layouts=(("config.json", "pytorch_model*.bin"),),
            target="pmc_llama_7b", write=write_llama),
    Weights(name="pubmedclip", licence="MIT", access="open", megabytes=605,
            page="https://huggingface.co/flaviagiammarino/pubmed-clip-vit-base-patch32",
            hub="flaviagiammarino/pubmed-clip-vit-base-patch32", hub_files=("pytorch_model.bin",),
            # or its authors' own, to be brought by hand from https://huggingface.co/sarahESL/PubMedCLIP
            layouts=(("pytorch_model.bin",), ("PubMedCLIP_ViT32.pth",)),
            target="pubmedclip.safetensors", write=write_encoder, activation="quick_gelu"),
    Weights(name="clip_l_336", licence="MIT", access="open", megabytes=1711,
            page="https://huggingface.co/openai/clip-vit-large-patch14-336",
            hub="openai/clip-vit-large-patch14-336", hub_files=("pytorch_model.bin",),
            # or OpenAI's own, which is refused: it is known which file to take instead
            layouts=(("pytorch_model.bin",), ("ViT-L-14-336px.pt",)), only_by_name=True,
            target="clip_l_336.safetensors", write=write_encoder, activation="quick_gelu"),
    siglip("siglip_so400m", "google/siglip-so400m-patch14-384", "Apache-2.0", "open", 3512),
    siglip("medsiglip", "google/medsiglip-448", "Health AI Developer Foundations",
           "an account at Hugging Face and Google's terms", 0),
    Weights(name="pmc_clip", licence="OpenRAIL", access="open", megabytes=151,
            page="https://huggingface.co/datasets/axiong/pmc_oa", hub="axiong/pmc_oa",
            hub_type="dataset", hub_files=("image_encoder(resnet50).pth",),
            layouts=(("image_encoder(resnet50).pth",), ("checkpoint.pt",)),  # alone, or all of training
            target="pmc_clip.safetensors", write=write_encoder),
    Weights(name="pmc_llama_13b", licence="OpenRAIL", access="open",
            megabytes=0,  # not known: 26,032 if float16, twice as many if float32
            page="https://huggingface.co/axiong/PMC_LLaMA_13B", hub="axiong/PMC_LLaMA_13B",
            hub_files=("config.json", "pytorch_model*.bin", "tokenizer.model"),
            layouts=(("config.json", "pytorch_model*.bin"),), only_by_name=True,
            target="pmc_llama_13b", write=write_llama),
    qwen("qwen3_vl_2b", "Qwen/Qwen3-VL-2B-Instruct", 2_127_532_032),
    qwen("qwen3_vl_4b", "Qwen/Qwen3-VL-4B-Instruct", 4_437_815_808),
    qwen("qwen3_vl_8b", "Qwen/Qwen3-VL-8B-Instruct", 8_767_123_696),
    qwen("medmo_4b", "MBZUAI/MedMO-4B", 4_437_815_808),
    qwen("medmo_8b", "MBZUAI/MedMO-8B", 8_767_123_696),
    qwen("medmo_4b_next", "MBZUAI/MedMO-4B-Next", 4_437_815_808),
    qwen("medmo_8b_next", "MBZUAI/MedMO-8B-Next", 8_767_123_696),
    Weights(name="gpt_oss_20b", licence="Apache-2.0", access="open", megabytes=13_761 + 28,
            page="https://huggingface.co/openai/gpt-oss-20b", hub="openai/gpt-oss-20b", hub_files=GPT_OSS_FILES,
            layouts=(("config.json", "model*.safetensors", "tokenizer.json"),), in_place=True, only_by_name=True,
            target="gpt_oss_20b", write=check_gpt_oss))}
