"""
Write what a train_vlm.py run has learnt as folders that other libraries load as they are.

    python extras/share/export.py --run=out/sample                  all of it, into out/sample/export
    python extras/share/export.py --run=out/paper --only=language --dtype=bfloat16

    vision/     timm.create_model("local-dir:<folder>", pretrained=True); open_clip's TimmModel
    language/   transformers: AutoModelForCausalLM and AutoTokenizer; LoRA is merged, but not that of experts
    model/      of a Qwen3-VL, in place of both: transformers' Qwen3VLForConditionalGeneration, and vLLM
    adapter/    PEFT: PeftModel.from_pretrained(base, <folder>), of a Qwen3-VL of both parts; else vision_adapter/
                is that of the encoder
    vlm/        a run that needs nothing beside it: python eval_vqa.py --run=<folder>
    README.md   a model card, of what the run's own files say

All of it is of one checkpoint, whole and unaltered, even where the run trains on meanwhile: its name is
printed, and exported_from.json in each folder has its checksum. What is written names neither private
datasets nor places on this machine. The tokenizer and the base weights have to be those of the training.

Two things are not there, since they would not be this model. transformers' LLaVA has two layers where
--projector_type=linear has one, and its ViT has no norm behind the layer that it takes. open_clip's whole
models have a text tower, which nobody trained here: its TimmModel is the image tower alone. What comes back
from those libraries is read by --vision_weights, --language_weights, --model and --start of train_vlm.py.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import shutil
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn as nn
from safetensors import SafetensorError

from data import BOS, EOS
from extras.share.card import make_public, write_card
from extras.share.hub import (base_name, copy_beside, count_bytes, is_coded, language_dtype, language_tensors,
                              lora_updates, read_merged, write_adapters, write_base, write_model, write_tensors)
from plumbing.files import (find_tokenizer, hash_file, lock, read_settings, require_writable, seal, sync,
                            write_manifest, write_settings)
from plumbing.flags import Range, UserError, parse_command_line, run
from run import open_trained_run
from weights import hub_config, load_trained_encoder, load_vlm, read_vlm_config, save_module
from zoo.encoders import load_vit
from zoo.adapters import ADAPTERS, adapted_experts
from zoo.gpt_oss import GptOss
from zoo.qwen3_vl import Text
from zoo.siglip import SiglipConfig

SOURCE = "exported_from.json"  # in each folder: which checkpoint it is of


@dataclass(frozen=True)
class Config:
    run: str = ""  # folder of a train_vlm.py run; none: the newest in out/
    checkpoint: str = ""  # of the run: best, by held-out loss, or a name such as step_000500; none: the newest
    folder: str = ""  # where the parts go; none: export/ in the run's folder
    only: str = ""  # of vision, language, adapter, vlm, card, a Qwen3-VL's of model, adapter, vlm, card; none: all
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of language/ and model/; auto: see write_*
    shard_gigabytes: Annotated[float, Range(1e-6, 1e6)] = 5.0  # largest of their files; so much memory, too


# ----------------------------------------------------------------------------- one checkpoint

def look(checkpoint, record):
    """{file: what tells it from another one} of a checkpoint's files; None for one that is not there."""
    facts = {}
    for name in ["manifest.json", *record["files"]]:
        try:
            stat = (checkpoint / name).stat()
            facts[name] = stat.st_ino, stat.st_size, stat.st_mtime_ns
        except OSError:
            facts[name] = None
    return facts


def require_same(checkpoint, record, before):
    """Raise UserError unless a checkpoint's files are still those that were there before."""
    if look(checkpoint, record) != before or None in before.values():
        raise UserError(f"{checkpoint}: removed or altered while it was exported, as by a run that trains on "
                        "(train_vlm.py --keep); nothing of another one was taken: run it again")


def require_free(folder, targets, record):
    """Raise UserError where a target is there already, or a folder has parts of another checkpoint."""
    for target in targets:
        if target.exists():
            raise UserError(f"{target}: there already; remove it, or choose another --folder")
    for path in sorted(folder.glob(f"[!.]*/{SOURCE}")):
        other = read_settings(path)
        if other.get("manifest") != record["checksum"]:
            raise UserError(f"{path.parent}: is of {other.get('checkpoint')}, another checkpoint than this "
                            f"{record['name']}; choose another --folder, or remove it")


def require_room(folder, checkpoint, model, parts, dtype):
    """Raise UserError where a disk has less room than these parts take, about: others write there, too."""
    count = {part: sum(p.numel() for name, p in getattr(model, part).named_parameters()
                       if ".lora_" not in name) for part in ("vision", "projector", "language")}
    own = sum(path.stat().st_size for path in checkpoint.rglob("*") if "optimizer" not in path.name)
    bases = [Path(path) for path in {*model.weights.values()} if path]
    files = [file for base in bases for file in ([base] if base.is_file() else base.glob("*.safetensors"))]
    sizes = {"vision": 4 * count["vision"], "adapter": 0,
             "model": (dtype or torch.float32).itemsize * sum(count.values()),
             "vlm": own + sum(file.stat().st_size for file in files), "card": 0}
    if "language" in parts:
        tensors = language_tensors(checkpoint, model)
        sizes["language"] = sum(count_bytes(tensors, dtype or language_dtype(tensors)).values())
    wanted, free = sum(sizes[part] for part in parts), shutil.disk_usage(folder).free
    if wanted > free:
        raise UserError(f"{folder}: {wanted / 1e9:,.3f} GB are to be written, {free / 1e9:,.3f} GB are free; "
                        "make space, choose another --folder, or some parts by --only")


def write_part(target, write, *arguments, unchanged=lambda: None):
    """
    write(*arguments, path) under a hidden name, which becomes the target once all is on the disk and
    unchanged() has not raised UserError.
    """
    partial = target.with_name(f".{target.name}.partial")
    remove(partial)  # of a process that was killed
    try:
        write(*arguments, partial)
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        unchanged()
        partial.rename(target)
        sync(target.parent)
    except (UserError, OSError, SafetensorError) as error:
        unchanged()  # what the run has removed is why
        if isinstance(error, UserError):
            raise
        raise UserError(f"{target}: not written: {error}; see to it, then run it again") from None
    finally:
        remove(partial)
    print(f"{target} written", flush=True)


def remove(path):
    """Remove a file or a folder, where it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


# ----------------------------------------------------------------------------- vision

def write_vision(checkpoint, image, folder):
    """
    The encoder, its LoRA merged, and the config.json by which timm builds and fills it, for images of the
    run's settings, or for its tiles. What --merge makes of its patches is not in it, as the projection is not. Of a
    --vision_layer without a norm timm's has none either; a SigLIP's pool is the mean of its patches.
    """
    folder.mkdir()
    vit = load_trained_encoder(checkpoint)
    config, size = vit.config, image["size"]
    vit.pos_embed = nn.Parameter(vit.positions(*[size // config.patch_size] * 2).detach())
    config.image_size = size
    save_module(vit, folder / "model.safetensors")
    crop_mode = {"crop": "center", "pad": "border"}.get(image["resize"], "squash")  # ours pads with black
    siglip = isinstance(config, SiglipConfig)
    pool = "avg" if siglip else "token"
    own = {"mlp_ratio": (config.hidden + 0.5) / config.width,  # timm rounds its product with the width down
           "global_pool": pool, "fc_norm": False} if siglip else {}
    write_settings(folder / "config.json", {
        "architecture": ("vit_so400m_patch14_siglip_384" if siglip else
                         "vit_base_patch32_clip_224" if config.clip else "vit_base_patch16_224"),
        "num_classes": 0, "num_features": config.width, "global_pool": pool,
        "model_args": {"img_size": size, "patch_size": config.patch_size, "embed_dim": config.width,
                       "depth": config.depth, "num_heads": config.heads, "act_layer": config.gelu, **own,
                       **({} if config.layer == "normed" else {"final_norm": False})},
        "pretrained_cfg": {
            "input_size": [3, size, size], "fixed_input_size": True, "pool_size": None, "num_classes": 0,
            "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": crop_mode, "mean": vit.mean,
            "std": vit.std, "first_conv": "patch_embed.proj", "classifier": "head"}})


# ----------------------------------------------------------------------------- language

def write_language(checkpoint, tokenizer, dtype, shard_bytes, folder):
    """
    The language model, LoRA merged, in the hub's layout; no more than a file of it is in memory. A gpt-oss's experts
    stay as they lie, byte for byte where they are in MXFP4.
    """
    folder.mkdir()
    model = load_vlm(checkpoint, device="meta", bits=0)  # no values, but a check that all are there and fit
    base, tensors = Path(model.weights["language"] or checkpoint / "language"), language_tensors(checkpoint, model)
    updates = lora_updates(checkpoint, {part: model.lora[part] for part in model.lora if part == "language"})
    dtype = dtype or language_dtype(tensors)
    write_tensors(count_bytes(tensors, dtype), lambda name: read_merged(tensors[name][0], name, dtype,
                                                                        updates.get(name)), shard_bytes, folder)
    # Where none is said, LLaMA 1's, which is transformers' own default, too
    longest = read_settings(base / "config.json").get("max_position_embeddings") or 2048
    settings = hub_config(model.language.config) | {"max_position_embeddings": longest}
    if isinstance(model.language, GptOss):
        write_settings(folder / "generation_config.json", {"eos_token_id": [*tokenizer.stops]})
        copy_beside(base, folder)
        settings = read_settings(folder / "config.json")
        settings.pop("dtype", None)
        if any(map(is_coded, tensors)) and not settings.get("quantization_config"):
            settings["quantization_config"] = {"quant_method": "mxfp4"}
    write_settings(folder / "config.json", settings | {"torch_dtype": str(dtype).removeprefix("torch.")})
    write_tokenizer(tokenizer, longest, folder)


def write_tokenizer(tokenizer, longest, folder):
    """
    tokenizer.model, and a tokenizer.json that gives any text the ids of data.Tokenizer.encode. What
    transformers makes of tokenizer.model does not: it keeps runs of spaces, and reads "</s>" as <eos>.
    Raises UserError where the model is not BPE with bytes, as all of LLaMA's are. A chat model's tokenizer.json
    stays as it is.
    """
    if tokenizer.path.suffix == ".json":
        shutil.copyfile(tokenizer.path, folder / "tokenizer.json")
        return
    model = tokenizer.model
    vocabulary = {model.id_to_piece(token): token for token in range(tokenizer.vocab_size)}
    special = unk, bos, eos = [model.id_to_piece(token) for token in (model.unk_id(), BOS, EOS)]
    score = {piece: model.get_score(token) for piece, token in vocabulary.items()
             if not (model.is_byte(token) or piece in special)}
    # A BPE piece's score is the rank of its merge, a whole number; those of other kinds are not
    if len(vocabulary) - len(score) != 256 + len(special) or any(value % 1 for value in score.values()):
        raise UserError(f"{tokenizer.path}: no BPE with bytes; --only has parts that need no tokenizer")
    # SentencePiece joins the pair whose piece scores highest; a list of merges, the first pair in it
    pairs = sorted((-value, vocabulary[piece[:cut]], vocabulary[piece[cut:]])
                   for piece, value in score.items() for cut in range(1, len(piece))
                   if {piece[:cut], piece[cut:]} <= vocabulary.keys())
    spaces = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if c.isspace() and c != "\n")
    first, *texts = [{kind: {"id": name, "type_id": number}} for kind, name, number in (
        ("SpecialToken", bos, 0), ("Sequence", "A", 0), ("Sequence", "B", 1))]

    def replace(kind, pattern, content):
        return {"type": "Replace", "pattern": {kind: pattern}, "content": content}

    shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
    write_settings(folder / "tokenizer.json", {
        "version": "1.0",
        "added_tokens": [{"id": vocabulary[piece], "content": piece, "special": True, **dict.fromkeys(
            ("single_word", "lstrip", "rstrip", "normalized"), False)} for piece in special],
        "normalizer": {"type": "Sequence", "normalizers": [
            replace("Regex", f"[{spaces}]+", " "),
            replace("Regex", rf"\A[{spaces}\n]+|[{spaces}\n]+\z", ""),
            {"type": "Prepend", "prepend": "▁"}, replace("String", " ", "▁")]},
        "post_processor": {
            "type": "TemplateProcessing", "single": [first, texts[0]], "pair": [first, *texts],
            "special_tokens": {bos: {"id": bos, "ids": [BOS], "tokens": [bos]}}},
        "decoder": {"type": "Sequence", "decoders": [
            replace("String", "▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "unk_token": unk, "fuse_unk": True, "byte_fallback": True,
                  "vocab": vocabulary,
                  "merges": [[model.id_to_piece(token) for token in pair] for _, *pair in pairs]}})
    write_settings(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True, "unk_token": unk,
        "bos_token": bos, "eos_token": eos, "model_max_length": longest,
        "clean_up_tokenization_spaces": False})


# ----------------------------------------------------------------------------- the whole

def write_adapter(checkpoint, part, folder):
    """PEFT's folder of a part. The base model's place was one on this machine, and is its last name here."""
    shutil.copytree(checkpoint / ADAPTERS[part], folder)
    settings = read_settings(folder / "adapter_config.json")
    write_settings(folder / "adapter_config.json", {
        **settings, "base_model_name_or_path": base_name(settings.get("base_model_name_or_path"))})


def write_vlm(checkpoint, model, told, folder):
    """
    A run of this checkpoint alone, with the weights files that it takes from elsewhere in it. model: the run's, on
    the meta device.
    """
    folder.mkdir()
    tokenizer = find_tokenizer(checkpoint.parent)
    shutil.copyfile(tokenizer, folder / tokenizer.name)
    write_manifest(folder, "config.json", told)
    step, config = folder / "partial", read_settings(checkpoint / "config.json")
    parts = {ADAPTERS[part]: part for part in config["lora"]}
    shutil.copytree(checkpoint, step, ignore=shutil.ignore_patterns("optimizer.*", "manifest.json", *parts))
    for name, part in parts.items():
        write_adapter(checkpoint, part, step / name)
    weights = read_vlm_config(checkpoint)["weights"]  # where they are, and are what they were
    if isinstance(model.language, Text):
        write_base(model, step)
    elif weights["vision"]:
        save_module(load_vit(weights["vision"]), step / "vision.safetensors")
    if weights["language"] and not isinstance(model.language, Text):
        (step / "language").mkdir()
        base = Path(weights["language"])
        for source in [*base.glob("*.safetensors"), *base.glob("model.safetensors.index.json")]:
            shutil.copyfile(source, step / "language" / source.name)
        settings = read_settings(base / "config.json")
        write_settings(step / "language/config.json", {key: value for key, value in settings.items()
                                                   if key != "_name_or_path"})  # a place on a disk, often
        index = step / "language/model.safetensors.index.json"
        if index.is_file() and "config" in ((settings := read_settings(index)).get("metadata") or {}):
            settings["metadata"]["config"] = hash_file(step / "language/config.json")  # LLaMA compares it
            write_settings(index, settings)
    write_settings(step / "config.json", {**config, "weights": dict.fromkeys(config["weights"], "")})
    seal(step, folder / checkpoint.name, step=int(checkpoint.name[5:]), **told)


def write_with_source(write, record, *arguments):
    """write(*arguments), whose last is a folder, and into it which checkpoint it is of."""
    write(*arguments)
    write_settings(arguments[-1] / SOURCE, {"checkpoint": record["name"], "manifest": record["checksum"]})


def choose_parts(config, run, model, tokenizer, image):
    """The parts to write, in order. Raises UserError for one that is not there, or that no other library reads."""
    whole = isinstance(model.language, Text)
    parts = [*(["model"] if whole else ["vision", "language"]), "adapter", "vlm", "card"]
    only = [part.strip() for part in config.only.split(",")] if config.only else parts
    for part in only:
        if part not in parts:
            raise UserError(f"--only={part}: no such part; there are {', '.join(parts)}")
        if config.only and part == "adapter" and not model.lora:
            raise UserError(f"--only={part}: {run} has no LoRA; leave it out")
        if part == "vision" and image["resize"] in ("fit", "smart"):
            raise UserError(f"{run}: by --resize=fit its images have different shapes, and timm's config.json has "
                            "one; leave out vision, as with --only=language,vlm,card")
        if part == "language" and isinstance(model.language, GptOss) and adapted_experts(model.language):
            raise UserError(f"{run}: LoRA on a gpt-oss's experts is not merged into them; leave out language, as with "
                            "--only=vision,adapter,vlm,card: PEFT puts adapter/ beside the base")
        if part == "model" and tokenizer.path.suffix != ".json":
            raise UserError(f"{run}: its tokenizer has no <|image_pad|>, by which transformers knows where an "
                            "image stands; leave out model, as with --only=vlm,card, or train "
                            "with a tokenizer.json")
    return list(dict.fromkeys(only))


def main(config):
    run, checkpoint, record, tokenizer = open_trained_run(config.run, config.checkpoint)
    before = look(checkpoint, record)
    require_same(checkpoint, record, before)
    model = load_vlm(checkpoint, device="meta", bits=0)  # no values, but its base is that of the training
    whole, dtype = isinstance(model.language, Text), getattr(torch, config.dtype, None)
    public, folder = make_public(record), Path(config.folder or run / "export")
    jobs = {  # part -> its files or folders, and what write_part is to call for each
        "vision": {"vision": (write_vision, checkpoint, record["image"])},
        "language": {"language": (write_language, checkpoint, tokenizer, dtype, config.shard_gigabytes * 1e9)},
        "model": {"model": (write_model, checkpoint, model, tokenizer, record["image"], dtype,
                            config.shard_gigabytes * 1e9)},
        "adapter": {ADAPTERS[part]: (write_adapter, checkpoint, part) for part in model.lora},
        "vlm": {"vlm": (write_vlm, checkpoint, model, public)}}
    if whole and model.lora:
        jobs["adapter"] = {"adapter": (write_adapters, checkpoint, model)}
    parts = choose_parts(config, run, model, tokenizer, record["image"])
    jobs = {folder / name: (write_with_source, job[0], record, *job[1:]) for part in parts
            for name, job in jobs.get(part, {}).items()}
    if "card" in parts:
        jobs[folder / "README.md"] = write_card, checkpoint, public
    require_free(folder, jobs, record)
    require_writable(folder, "folder")
    require_room(folder, checkpoint, model, parts, dtype)
    with lock(folder / ".lock", "exporting"):
        require_free(folder, jobs, record)  # another export may have ended since
        print(f"of {checkpoint}, into {folder}:", flush=True)
        for target, job in jobs.items():
            write_part(target, *job, unchanged=lambda: require_same(checkpoint, record, before))


if __name__ == "__main__":
    run(main, parse_command_line(Config))
