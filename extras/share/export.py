"""
Write what a train_vlm.py run has learnt as folders that other libraries load as they are.

    python extras/share/export.py --run=out/sample                  all of it, into out/sample/export
    python extras/share/export.py --run=out/paper --only=language --dtype=bfloat16

    vision/     timm.create_model("local-dir:<folder>", pretrained=True); open_clip's TimmModel
    language/   transformers: AutoModelForCausalLM and AutoTokenizer; LoRA is merged
    adapter/    PEFT: PeftModel.from_pretrained(base, <folder>); vision_adapter/, that of the encoder
    vlm/        a run that needs nothing beside it: python eval_vqa.py --run=<folder>
    README.md   a model card, of what the run's own files say

All of it is of one checkpoint, whole and unaltered, even where the run trains on meanwhile: its name is
printed, and exported_from.json in each folder has its checksum. What is written names neither private
datasets nor places on this machine. The tokenizer and the base weights have to be those of the training.

Two things are not there, since they would not be this model. transformers' LLaVA has two layers where
we have one projection, and its ViT leaves out the last norm. open_clip's whole models have a text
tower, which nobody trained here: its TimmModel is the image tower alone. What comes back from those
libraries is read by --vision_weights and --language_weights of train_vlm.py and by lora.load_adapter.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import json
import shutil
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import eval_vqa
import train_vlm
from data import BOS, EOS, Tokenizer, read_settings
from model import (ADAPTERS, CLIP_MEAN, CLIP_STD, VLM, ViT, metadata_of, read_metadata, read_tensor,
                   tensor_shapes, tensors_of)
from plumbing.files import (find_run, hash_file, lock, read_manifest, require_writable, seal, sort_metadata,
                            sync, write_manifest)
from plumbing.flags import Range, UserError, parse_command_line, run
from prepare.datasets import DATASETS
from prepare.weights import WEIGHTS
from tasks.evaluations import find_evaluations, read_evaluation
from tasks.vqa import METRICS, cell_text

SOURCE = "exported_from.json"  # in each folder: which checkpoint it is of


@dataclass(frozen=True)
class Config:
    run: str = ""  # folder of a train_vlm.py run; none: the newest in out/
    folder: str = ""  # where the parts go; none: export/ in the run's folder
    only: str = ""  # parts, of vision, language, adapter, vlm, card; none: all
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of language/; others are as trained
    shard_gigabytes: Annotated[float, Range(1e-6, 1e6)] = 5.0  # largest file of language/; its memory, too


# ----------------------------------------------------------------------------- one checkpoint

def look(checkpoint, record):
    """{file: what tells it from another one} of a checkpoint's files; None for one that is not there."""
    found = {}
    for name in ["manifest.json", *record["files"]]:
        try:
            stat = (checkpoint / name).stat()
            found[name] = stat.st_ino, stat.st_size, stat.st_mtime_ns
        except OSError:
            found[name] = None
    return found


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
                       if ".lora_" not in name) for part in ("vision", "language")}
    own = sum(path.stat().st_size for path in checkpoint.rglob("*") if "optimizer" not in path.name)
    bases = [Path(path) for path in model.weights.values() if path]
    files = [file for base in bases for file in ([base] if base.is_file() else base.glob("*.safetensors"))]
    sizes = {"vision": 4 * count["vision"], "language": dtype.itemsize * count["language"], "adapter": 0,
             "vlm": own + sum(file.stat().st_size for file in files), "card": 0}
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


# ----------------------------------------------------------------------------- what may be told

def is_public(name):
    """Whether a dataset is one of those that anybody may know to be there."""
    known = DATASETS.get(name)
    return known is not None and known.licence != "private" and known.access not in ("ours", "yours")


def make_public(record):
    """
    What a run wrote down of itself, without what concerns nobody else: private datasets are called
    private_1, private_2, ..., those that it was only compared with are not named; of paths the last name
    is left, and the command is not there.
    """
    trained = [entry.partition(":")[0].strip() for entry in record["flags"]["data"].split(",")]
    private = [name for name in dict.fromkeys(trained) if not is_public(name)]
    alias = {name: f"private_{number}" for number, name in enumerate(private, start=1)}

    def renamed(facts):
        return {alias.get(name, name): fact for name, fact in facts.items()}

    def compared(tests):
        """Test splits by their names; of private ones that did not take part, only that they were there."""
        names = {test: test.partition("/")[0] for test in tests}
        told = {alias.get(name, name) + test[len(name):]: tests[test] for test, name in names.items()
                if name in trained or is_public(name)}
        more = len(tests) - len(told)
        return told | ({f"{more} private": ""} if more else {})

    flags = {name: Path(value).name if isinstance(value, str) and name not in ("data", "device") else value
             for name, value in record["flags"].items()}
    entries = [entry.strip().partition(":") for entry in record["flags"]["data"].split(",")]
    flags |= {"data": ",".join(alias.get(name.strip(), name.strip()) + colon + weight
                               for name, colon, weight in entries)}
    told = {name: record[name] for name in ("resize", "tokenizer_sha256") if name in record}
    machine = {name: fact for name, fact in record["machine"].items() if name != "command"}
    told |= {"flags": flags, "machine": machine,
             "shards": renamed(record.get("shards", {})),
             "leaks": {name: guard | {"tests": compared(guard["tests"])}
                       for name, guard in renamed(record.get("leaks", {})).items()}}
    if "inputs" in record:
        told["inputs"] = record["inputs"] | {"data": renamed(record["inputs"]["data"])}
    if "tests" in record:
        told["tests"] = {name: compared(tests) for name, tests in renamed(record["tests"]).items()}
    return told


def open_tokenizer(run, record):
    """A run's tokenizer. Raises UserError where it is not the one that the run was trained with."""
    tokenizer = Tokenizer(run / "tokenizer.model")
    recorded = {record.get("tokenizer_sha256"), record.get("inputs", {}).get("tokenizer")} - {None}
    if recorded - {tokenizer.sha256}:
        raise UserError(f"{tokenizer.path}: altered, or not the one that the run was trained with; bring "
                        "that back, as from shards/<dataset>/tokenizer.model")
    if not recorded:
        print(f"{tokenizer.path}: not known whether the run was trained with it: it does not say",
              file=sys.stderr)
    return tokenizer


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------- vision

def write_vision(checkpoint, how, folder):
    """The encoder, its LoRA merged, and the config.json by which timm builds and fills it."""
    folder.mkdir()
    vit = ViT.load(checkpoint)
    config, size = vit.config, vit.config.image_size
    save_file(tensors_of(vit), folder / "model.safetensors", metadata=metadata_of(vit))
    sort_metadata(folder / "model.safetensors")
    crop_mode = {"squash": "squash", "crop": "center", "pad": "border"}[how]  # ours pads with black
    write_json(folder / "config.json", {
        "architecture": "vit_base_patch32_clip_224" if config.clip else "vit_base_patch16_224",
        "num_classes": 0, "num_features": config.width, "global_pool": "token",
        "model_args": {"img_size": size, "patch_size": config.patch_size, "embed_dim": config.width,
                       "depth": config.depth, "num_heads": config.heads, "act_layer": config.gelu},
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

def write_adapter(checkpoint, part, folder):
    """PEFT's folder of a part. The base model's place was one on this machine, and is its last name here."""
    shutil.copytree(checkpoint / ADAPTERS[part], folder)
    settings = read_settings(folder / "adapter_config.json")
    base = Path(settings.get("base_model_name_or_path") or "").name
    hub = next((entry.hub for entry in WEIGHTS.values() if entry.target == base), base)
    write_json(folder / "adapter_config.json", {**settings, "base_model_name_or_path": hub})


def write_vlm(checkpoint, told, folder):
    """A run of this checkpoint alone, with the weights files that it takes from elsewhere in it."""
    folder.mkdir()
    shutil.copyfile(checkpoint.parent / "tokenizer.model", folder / "tokenizer.model")
    write_manifest(folder, "config.json", told)
    step, config = folder / "partial", read_settings(checkpoint / "config.json")
    weights = VLM.load(checkpoint, device="meta").weights  # where they are, and are what they were
    parts = {ADAPTERS[part]: part for part in config["lora"]}
    shutil.copytree(checkpoint, step, ignore=shutil.ignore_patterns("optimizer.*", "manifest.json", *parts))
    for name, part in parts.items():
        write_adapter(checkpoint, part, step / name)
    if vision := weights["vision"]:
        facts = metadata_of(ViT.from_pretrained(vision, device="meta"))  # a config beside may tell them
        save_file(load_file(vision), step / "vision.safetensors", {**read_metadata(vision), **facts})
        sort_metadata(step / "vision.safetensors")
    if weights["language"]:
        (step / "language").mkdir()
        base = Path(weights["language"])
        for source in [*base.glob("*.safetensors"), *base.glob("model.safetensors.index.json")]:
            shutil.copyfile(source, step / "language" / source.name)
        settings = read_settings(base / "config.json")
        write_json(step / "language/config.json", {key: value for key, value in settings.items()
                                                   if key != "_name_or_path"})  # a place on a disk, often
        index = step / "language/model.safetensors.index.json"
        if index.is_file() and "config" in ((settings := read_settings(index)).get("metadata") or {}):
            settings["metadata"]["config"] = hash_file(step / "language/config.json")  # LLaMA compares it
            write_json(index, settings)
    write_json(step / "config.json", {**config, "weights": {"vision": "", "language": ""}})
    seal(step, folder / checkpoint.name, step=int(checkpoint.name[5:]), **told)


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
What is not known the run did not record.

## Recipe

{steps:,} steps of AdamW on the cross-entropy of the answers' tokens; the last loss logged is {loss} nats
a token, on held-out samples {held_out_loss}. Machine: {device}, {threads} threads, torch {torch}, Python
{python}. The main flags of train_vlm.py, and those that differ from its defaults:

    {flags}

## Licence

None was chosen for these weights. They were trained on the data above, each under its own licence.
{starts}
"""


def training_rows(told):
    """Of each training split a row of the card's table: what the run recorded of it, and nothing newer."""
    for entry in told["flags"]["data"].split(","):
        name = entry.partition(":")[0]
        facts = told.get("inputs", {}).get("data", {}).get(name, {})
        known, guard = DATASETS.get(name), told.get("leaks", {}).get(name, {})
        done = {"drop": "left out", "keep": "kept"}.get(guard.get("leaks"), "not known whether left out")
        cells = entry, known.licence if known else "not known", *(
            facts.get(key, "not known") for key in ("samples", "images", "leaked"))
        yield f"| {' | '.join(map(str, cells))}, {done} |"


def describe_results(run, checkpoint):
    """The tables of all evaluations of a run's checkpoint as Markdown, or why there are none."""
    manifest = read_manifest(checkpoint)
    found = [results for results in map(read_evaluation, sorted(find_evaluations(run)))
             if results["stands_on"]["checkpoint"] == manifest["checksum"]]
    if not found:
        return f"Unknown: eval_vqa.py has not evaluated {checkpoint.name}."
    machine = found[0]["machine"]
    lines = ["Percent, with 95% intervals by resampling, by eval_vqa.py at commit "
             f"{machine['commit'] or 'unknown'} on {machine['device'].strip()}.",
             "*image shuffled* is this model with the images exchanged among the questions,",
             "*question only* the most frequent training answer to the same words. Neither sees the",
             "right image: a score is worth what it has above them."]
    for results in found:
        flags = [f"--{flag}={value}" for flag, value in results["stands_on"]["flags"].items()
                 if value != getattr(eval_vqa.Config, flag)]
        ((name, tables),) = results["results"].items()
        name = " ".join([name if is_public(name.partition("/")[0]) else "a private dataset", *flags])
        for title, table in (("all questions", tables["all"]), ("those new to the run", tables["new"])):
            if isinstance(table, str):  # the reason names places and data
                lines += ["", f"{name}, {title}: not known"]
                continue
            lines += ["", f"| {name}, {title}: {table['questions']:,}, over {tables['drawn']} | "
                      f"{' | '.join(METRICS)} |", "|---|" + "--:|" * len(METRICS)]
            for row, cells in table["rows"].items():
                lines.append(f"| {row} | {' | '.join(cell_text(cells[metric]) for metric in METRICS)} |")
    return "\n".join(lines)


def describe_starts(told):
    """What each part started from, a line each; the hub's names of those that have one."""
    starts, bases, flags = [], [], told["flags"]
    for part, of_the_paper in (("vision", "biomedclip.safetensors"), ("language", "pmc_llama_7b")):
        start = flags[f"{part}_weights"]
        if start == "auto":
            start = of_the_paper if flags["model"] == "paper" else "none"
        # by its name, one that prepare/all.py has brought
        if entry := next((entry for entry in WEIGHTS.values() if entry.target == start), None):
            bases.append(entry.hub)
        origin = f"{entry.page}, licence: {entry.licence}" if entry else "origin and licence not known"
        starts.append(f"The {part} model started from "
                      f"{'random values' if start == 'none' else f'{start} ({origin})'}.")
    return starts, bases


def last_losses(run, step):
    """The newest losses in a run's log up to a step, as text."""
    log, last = run / "log.jsonl", {"loss": "not known", "held_out_loss": "not known"}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []:
        try:
            entry = json.loads(line)
            last |= {key: f"{entry[key]:.3f}" for key in last if key in entry and entry["step"] <= step}
        except (ValueError, TypeError, KeyError, RecursionError):  # torn, or not by train_vlm.py
            continue
    return last


def write_card(checkpoint, told, path):
    """The card, with the hub's front matter. What the run did not record is not known."""
    model, flags, step = VLM.load(checkpoint, device="meta"), told["flags"], int(checkpoint.name[5:])
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    default, (starts, bases) = asdict(train_vlm.Config()), describe_starts(told)
    known = [DATASETS.get(entry.partition(":")[0]) for entry in flags["data"].split(",")]
    hub = [dataset.hub for dataset in known if dataset and dataset.hub]
    tests = {test for guard in told.get("leaks", {}).values() for test in guard["tests"]}
    shown = [f"--{key}={value}" for key, value in flags.items() if key in SHOWN or not (
             key in train_vlm.FREE_ON_RESUME or key.endswith("_weights") or value == default.get(key))]
    path.write_text(CARD.format(
        **sizes, **last_losses(checkpoint.parent, step), vit=model.vision.config, llama=model.language.config,
        **{key: str(value).strip() or "not known" for key, value in told["machine"].items()}, steps=step,
        name=checkpoint.parent.resolve().name, flags="\n    ".join(shown), held_out=flags["held_out"],
        data="\n".join(training_rows(told)), tests=", ".join(sorted(tests)) or "no test split",
        bases=json.dumps(bases), datasets=json.dumps([*dict.fromkeys(hub)]), starts="\n".join(starts),
        results=describe_results(checkpoint.parent, checkpoint)), encoding="utf-8")


def write_with_source(write, record, *arguments):
    """write(*arguments), whose last is a folder, and into it which checkpoint it is of."""
    write(*arguments)
    write_json(arguments[-1] / SOURCE, {"checkpoint": record["name"], "manifest": record["checksum"]})


def choose_parts(config, run, lora):
    """The parts to write, in order. Raises UserError for one that is not there."""
    parts = ["vision", "language", "adapter", "vlm", "card"]
    only = [part.strip() for part in config.only.split(",")] if config.only else parts
    for part in only:
        if part not in parts:
            raise UserError(f"--only={part}: no such part; there are {', '.join(parts)}")
        if config.only and part == "adapter" and not lora:
            raise UserError(f"--only={part}: {run} has no LoRA; leave it out")
    return list(dict.fromkeys(only))


def main(config):
    run, checkpoint = find_run(config.run)
    sealed = read_manifest(checkpoint)
    before = look(checkpoint, sealed)
    require_same(checkpoint, sealed, before)
    record = read_settings(run / "config.json") | sealed  # what it was sealed with counts
    lora, dtype = read_settings(checkpoint / "config.json")["lora"], getattr(torch, config.dtype)
    tokenizer, told = open_tokenizer(run, record), make_public(record)
    folder = Path(config.folder or run / "export")
    jobs = {  # part -> its files or folders, and what write_part is to call for each
        "vision": {"vision": (write_vision, checkpoint, record.get("resize", "squash"))},
        "language": {"language": (write_language, checkpoint, tokenizer, dtype,
                                  config.shard_gigabytes * 1e9)},
        "adapter": {ADAPTERS[part]: (write_adapter, checkpoint, part) for part in lora},
        "vlm": {"vlm": (write_vlm, checkpoint, told)}}
    parts = choose_parts(config, run, lora)
    jobs = {folder / name: (write_with_source, job[0], sealed, *job[1:]) for part in parts
            for name, job in jobs.get(part, {}).items()}
    if "card" in parts:
        jobs[folder / "README.md"] = write_card, checkpoint, told
    require_free(folder, jobs, sealed)
    model = VLM.load(checkpoint, device="meta")  # no values, but its base weights are those of the training
    require_writable(folder, "folder")
    require_room(folder, checkpoint, model, parts, dtype)
    with lock(folder / ".lock", "exporting"):
        require_free(folder, jobs, sealed)  # another export may have ended since
        print(f"of {checkpoint}, into {folder}:", flush=True)
        for target, job in jobs.items():
            write_part(target, *job, unchanged=lambda: require_same(checkpoint, sealed, before))


if __name__ == "__main__":
    run(main, parse_command_line(Config))
