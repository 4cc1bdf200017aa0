"""
Write what a train_vlm.py run has learnt as folders that other libraries load as they are.

    python extras/export.py --run=out/sample                  all of it, into out/sample/export
    python extras/export.py --run=out/paper --only=language --dtype=bfloat16

    vision/     timm.create_model("local-dir:<folder>", pretrained=True); open_clip's TimmModel
    language/   transformers: AutoModelForCausalLM and AutoTokenizer; LoRA is merged
    adapter/    PEFT: PeftModel.from_pretrained(base, <folder>); vision_adapter/, that of the encoder
    vlm/        a run that needs nothing beside it: python eval_vqa.py --run=<folder>
    README.md   a model card, of what the run's own files say

Two things are not there, since they would not be this model. transformers' LLaVA has two layers where
we have one projection, and its ViT leaves out the last norm. open_clip's whole models have a text
tower, which nobody trained here: its TimmModel is the image tower alone. What comes back from those
libraries is read by --vision_weights and --language_weights of train_vlm.py and by lora.load_adapter.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, not extras/

import json
import shutil
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import train_vlm
from data import BOS, EOS, Tokenizer, read_settings
from eval_vqa import METRICS, newest_run
from model import ADAPTERS, CLIP_MEAN, CLIP_STD, VLM, ViT, read_tensor, tensor_shapes, tensors_of
from plumbing.files import newest_checkpoint, read_manifest, seal, sync
from plumbing.flags import UserError, parse_command_line, run
from prepare.datasets import DATASETS
from prepare.weights import WEIGHTS


@dataclass(frozen=True)
class Config:
    run: str = ""  # folder of a train_vlm.py run; none: the newest in out/
    folder: str = ""  # where the parts go; none: export/ in the run's folder
    only: str = ""  # parts, of vision, language, adapter, vlm, card; none: all
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of language/; others are as trained
    shard_gigabytes: float = 5.0  # largest file of language/, and about the memory that writing it takes
    shards_dir: str = "shards"  # where the training data are, which the card describes


def write_part(target, write, *arguments):
    """write(*arguments, path) under a hidden name, which becomes the target once all is on the disk."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        write(*arguments, partial)
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        partial.rename(target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{target}: not written: {error}; see to it, then run it again") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{target} written")


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------- vision

def write_vision(checkpoint, how, folder):
    """The encoder, its LoRA merged, and the config.json by which timm builds and fills it."""
    folder.mkdir()
    vit = ViT.load(checkpoint)
    config, size = vit.config, vit.config.image_size
    save_file(tensors_of(vit), folder / "model.safetensors", metadata={"format": "pt"})
    crop_mode = {"squash": "squash", "crop": "center", "pad": "border"}[how]  # ours pads with black
    write_json(folder / "config.json", {
        "architecture": "vit_base_patch32_clip_quickgelu_224" if config.clip else "vit_base_patch16_224",
        "num_classes": 0, "num_features": config.width, "global_pool": "token",
        "model_args": {"img_size": size, "patch_size": config.patch_size, "embed_dim": config.width,
                       "depth": config.depth, "num_heads": config.heads},
        "pretrained_cfg": {
            "input_size": [3, size, size], "fixed_input_size": True, "pool_size": None, "num_classes": 0,
            "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": crop_mode, "mean": CLIP_MEAN,
            "std": CLIP_STD, "first_conv": "patch_embed.proj", "classifier": "head"}})


# ----------------------------------------------------------------------------- language

def write_language(checkpoint, tokenizer, dtype, shard_bytes, folder):
    """The language model, LoRA merged, in the hub's layout; no more than a file of it is in memory."""
    folder.mkdir()
    model = VLM.load(checkpoint, device="meta")  # no values, but a check that all are there and fit
    base, adapter = Path(model.weights["language"] or checkpoint / "language"), {}
    index = base / "model.safetensors.index.json"
    files = (read_settings(index)["weight_map"] if index.is_file() else
             dict.fromkeys(tensor_shapes(base / "model.safetensors"), "model.safetensors"))
    if settings := model.lora.get("language"):
        adapter = load_file(checkpoint / ADAPTERS["language"] / "adapter_model.safetensors")

    def read(name):
        tensor = read_tensor(base / files[name], name)
        A, B = (adapter.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight")
                for side in "AB")
        if A is not None:  # as LoRALinear.merge does
            tensor = tensor.float() + settings["alpha"] / settings["r"] * (B @ A)
        tensor = tensor.to(dtype)
        if not tensor.isfinite().all():
            raise UserError(f"{base}: {name} has values past those of {dtype}; try --dtype=bfloat16")
        return tensor

    sizes = {name.replace(".base.", "."): tensor.numel() * dtype.itemsize for name, tensor in
             model.language.state_dict().items() if ".lora_" not in name}
    parts, room, weight_map = [[]], shard_bytes, {}
    for name, size in sizes.items():
        if size > room and parts[-1]:
            parts, room = [*parts, []], shard_bytes
        parts[-1].append(name)
        room -= size
    for number, names in enumerate(parts, start=1):
        file = "model" + f"-{number:05}-of-{len(parts):05}" * (len(parts) > 1) + ".safetensors"
        save_file({name: read(name) for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(parts) > 1:
        write_json(folder / index.name,
                   {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
    # Where none is said, LLaMA 1's, which is transformers' own default, too
    longest = read_settings(base / "config.json").get("max_position_embeddings") or 2048
    write_json(folder / "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", **asdict(model.language.config),
        "max_position_embeddings": longest, "hidden_act": "silu", "tie_word_embeddings": False,
        "bos_token_id": BOS, "eos_token_id": EOS, "torch_dtype": str(dtype).removeprefix("torch.")})
    write_tokenizer(tokenizer, longest, folder)


def write_tokenizer(tokenizer, longest, folder):
    """
    tokenizer.model, and a tokenizer.json that gives any text the ids of data.Tokenizer.encode. What
    transformers makes of tokenizer.model does not: it keeps runs of spaces, and reads "</s>" as <eos>.
    Raises UserError where the model is not BPE with bytes, as all of LLaMA's are.
    """
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
    write_json(folder / "tokenizer.json", {
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
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True, "unk_token": unk,
        "bos_token": bos, "eos_token": eos, "model_max_length": longest,
        "clean_up_tokenization_spaces": False})


# ----------------------------------------------------------------------------- the whole

def write_vlm(checkpoint, flags, folder):
    """A run of this checkpoint alone, with the weights files that it takes from elsewhere in it."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.model"):
        shutil.copyfile(checkpoint.parent / name, folder / name)
    step, config = folder / "partial", read_settings(checkpoint / "config.json")
    shutil.copytree(checkpoint, step, ignore=shutil.ignore_patterns("optimizer.*", "manifest.json"))
    if vision := config["weights"]["vision"]:
        shutil.copyfile(vision, step / "vision.safetensors")
    if language := config["weights"]["language"]:
        (step / "language").mkdir()
        for source in [*Path(language).glob("*.json"), *Path(language).glob("*.safetensors")]:
            shutil.copyfile(source, step / "language" / source.name)
    write_json(step / "config.json", {**config, "weights": {"vision": "", "language": ""}})
    seal(step, folder / checkpoint.name, step=int(checkpoint.name[5:]), flags=flags)


# ----------------------------------------------------------------------------- the card

# Flags that the card shows at their defaults, too
SHOWN = {"model", "vision", "projector", "language", "batch_size", "epochs", "learning_rate", "seed"}
CARD = """---
license: unknown
pipeline_tag: visual-question-answering
tags: [medical, nanomedq]
base_model: {bases}
datasets: {datasets}
---

# {name}

A vision-language model for questions about medical images, made by nanoMedQ at commit {commit}: a ViT
of {vision:,} parameters ({vit.tokens} tokens for an image of {vit.image_size} pixels), one linear
projection of {projector:,}, a LLaMA of {language:,} with {llama.vocab_size:,} pieces.

**Not for clinical use.** It is meant for research on visual question answering. It answers one question
about one image, `Question: ...\\nAnswer:`, briefly and in the words of its training data. An answer may
be wrong without looking so. Answers were compared with the references of datasets, if at all, and with
nothing else; other kinds of images, questions and languages than those below are untested.

## Results

{results}

## Training data

| dataset (: weight) | licence | samples | images | samples whose image a test split has |
|---|---|--:|--:|--:|
{data}

Of these samples, about {held_out:,} were held out. Training images were compared with {tests}.
What is unknown was not there when this card was written, or not as the run found it.

## Recipe

{steps:,} steps of AdamW on the cross-entropy of the answers' tokens; the last loss logged is {loss} nats
a token, on held-out samples {held_out_loss}. Machine: {device}, {threads} threads, torch {torch}, Python
{python}. The main flags of train_vlm.py, and those that differ from its defaults:

    {flags}

## Licence

None was chosen for these weights. They were trained on the data above, each under its own licence.
{starts}
"""


def training_data(trained, shards_dir):
    """
    Of each training split: entry of --data, manifest, how many of its samples have an image of a test
    split, and what the run says of those. {} and "unknown" where it is not here or not as it was then.
    """
    for entry in map(str.strip, trained["flags"]["data"].split(",")):
        name, count = entry.partition(":")[0], "unknown"
        guard = trained.get("leaks", {}).get(name, {"leaks": "unknown", "tests": {}})
        manifest, leaks = (read_manifest(Path(shards_dir) / name / "train", file) or {}
                           for file in ("manifest.json", "leaks.json"))
        if (manifest and leaks and manifest["checksum"] == trained.get("shards", {}).get(name)
                and leaks["train"] == manifest["checksum"]
                and guard["tests"].items() <= leaks["tests"].items()):
            # Not those of test splits that were prepared since; known sources need no test split
            count = len({number for test, reasons in leaks["found"].items()
                         if test in guard["tests"] or test not in leaks["tests"]
                         for numbers in reasons.values() for number in numbers})
        yield entry, {} if count == "unknown" else manifest, count, guard


def describe_results(run, checkpoint):
    """The tables of results.json as Markdown, or why there are none."""
    found = read_settings(run / "results.json") if (run / "results.json").is_file() else {}
    if found.get("checkpoint") != checkpoint.name:
        return f"Unknown: eval_vqa.py has not evaluated {checkpoint.name}."
    limit, machine = found["flags"]["limit"], found["machine"]
    lines = ["Percent, with 95% intervals over images, by eval_vqa.py at commit "
             f"{machine['commit'] or 'unknown'} on {machine['device'].strip()}"
             f"{f', from the first {limit:,} questions alone' if limit else ''}.",
             "*image shuffled* is this model with the images exchanged among the questions,",
             "*question only* the most frequent training answer to the same words. Neither sees the",
             "right image: a score is worth what it has above them."]
    for name, tables in found["results"].items():
        for title, table in (("all questions", tables["all"]), ("those new to the run", tables["new"])):
            if isinstance(table, str):  # why it is not known
                lines += ["", f"{name}, {title}: {table}"]
                continue
            lines += ["", f"| {name}, {title}: {table['questions']:,} | {' | '.join(METRICS)} |",
                      "|---|" + "--:|" * len(METRICS)]
            for row, cells in table["rows"].items():
                texts = ["-" if None in cell else "{:.1f} [{:.1f} {:.1f}]".format(*cell)
                         for cell in map(cells.get, METRICS)]
                lines.append(f"| {row} | {' | '.join(texts)} |")
    return "\n".join(lines)


def write_card(checkpoint, trained, data, path):
    """The card, with the hub's front matter. What neither the run nor a manifest says is unknown."""
    model, flags, step = VLM.load(checkpoint, device="meta"), trained["flags"], int(checkpoint.name[5:])
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    starts, bases, rows, hub, tests, default = [], [], [], [], set(), asdict(train_vlm.Config())
    for part, of_the_paper in (("vision", "biomedclip.safetensors"), ("language", "pmc_llama_7b")):
        weights = flags[f"{part}_weights"]
        if weights == "auto":
            weights = of_the_paper if flags["model"] == "paper" else "none"
        start = Path(weights).name  # by its name, one that prepare/all.py has brought
        if entry := next((entry for entry in WEIGHTS.values() if entry.target == start), None):
            bases.append(entry.hub)
        origin = f"{entry.page}, licence: {entry.licence}" if entry else "origin and licence unknown"
        start = "random values" if weights == "none" else f"{start} ({origin})"
        starts.append(f"The {part} model started from {start}.")
    for entry, manifest, count, guard in data:
        known = DATASETS.get(entry.partition(":")[0])
        licence = manifest.get("licence", known.licence if known else "unknown")
        done = {"drop": "left out", "keep": "kept"}.get(guard["leaks"], "unknown whether left out")
        cells = (entry, licence, *(manifest.get(key, "unknown") for key in ("samples", "images")))
        rows.append(f"| {' | '.join(map(str, cells))} | {count}, {done} |")
        hub += [known.hub] if known and known.hub else []
        tests |= guard["tests"].keys()
    log, last = checkpoint.parent / "log.jsonl", {"loss": "unknown", "held_out_loss": "unknown"}
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    for entry in (json.loads(line) for line in lines if line.endswith("}")):  # the last may be torn
        last |= {key: f"{entry[key]:.3f}" for key in last if key in entry and entry["step"] <= step}
    shown = [f"--{key}={value}" for key, value in flags.items() if key in SHOWN or not (
             key in train_vlm.FREE_ON_RESUME or key.endswith("_weights") or value == default.get(key))]
    path.write_text(CARD.format(
        **sizes, **last, vit=model.vision.config, llama=model.language.config, steps=step,
        **{key: str(value).strip() or "unknown" for key, value in trained["machine"].items()},
        name=checkpoint.parent.resolve().name, flags="\n    ".join(shown), held_out=flags["held_out"],
        data="\n".join(rows), tests=", ".join(sorted(tests)) or "no test split",
        bases=json.dumps(bases), datasets=json.dumps([*dict.fromkeys(hub)]), starts="\n".join(starts),
        results=describe_results(checkpoint.parent, checkpoint)), encoding="utf-8")


def main(config):
    if config.shard_gigabytes <= 0:
        raise UserError(f"--shard_gigabytes={config.shard_gigabytes}: more than 0")
    source = Path(config.run) if config.run else newest_run()
    checkpoint, trained = newest_checkpoint(source), read_settings(source / "config.json")
    tokenizer, folder = Tokenizer(source / "tokenizer.model"), Path(config.folder or source / "export")
    data = list(training_data(trained, config.shards_dir))
    lora = read_settings(checkpoint / "config.json")["lora"]
    parts = {  # part -> its files or folders, and what write_part is to call for each
        "vision": {"vision": (write_vision, checkpoint, trained.get("resize", "squash"))},
        "language": {"language": (write_language, checkpoint, tokenizer, getattr(torch, config.dtype),
                                  config.shard_gigabytes * 1e9)},
        "adapter": {ADAPTERS[part]: (shutil.copytree, checkpoint / ADAPTERS[part]) for part in lora},
        "vlm": {"vlm": (write_vlm, checkpoint, trained["flags"])},
        "card": {"README.md": (write_card, checkpoint, trained, data)}}
    only = [part.strip() for part in config.only.split(",")] if config.only else list(parts)
    for part in only:
        if part not in parts:
            raise UserError(f"--only={part}: no such part; there are {', '.join(parts)}")
        if config.only and not parts[part]:
            raise UserError(f"--only={part}: {source} has no LoRA; leave it out")
    jobs = {folder / name: job for part in only for name, job in parts[part].items()}
    for target in jobs:
        if target.exists():
            raise UserError(f"{target}: there already; remove it, or choose another --folder")
    folder.mkdir(parents=True, exist_ok=True)
    for target, job in jobs.items():
        write_part(target, *job)


if __name__ == "__main__":
    run(main, parse_command_line(Config))
