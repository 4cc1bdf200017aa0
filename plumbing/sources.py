"""What a run begins with: prepared datasets, weights files, the parts of another run, or an adapter."""

import json
from dataclasses import replace
from pathlib import Path

from plumbing.claims import tokenizer_mismatch
from plumbing.files import find_run, find_tokenizer, read_manifest
from plumbing.flags import UserError
from plumbing.leaks import read_leaks
from plumbing.shards import Shard

SEVEN = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"  # matrices of a block
FOUR = "q_proj,k_proj,v_proj,o_proj"  # those of a gpt-oss block's attention
SUFFIXES = {"llama": ".model", "qwen3_vl": ".json", "gpt_oss": ".json"}  # of the tokenizer, by config.json's model_type
AUTO = {"vision": "full", "lora_targets": "q_proj,v_proj", "vision_layer": "normed", "vision_tokens": "all",
        "projector_type": "linear", "merge": 1}  # flags that can be "auto" or 0, and what that is of OpenMedQ's


def open_shards(names, shards_dir, split):
    """
    {"shards", "weights", "leaks"}, as a Mixture takes them, of "path_vqa,vqa_rad:2": prepared datasets by name,
    each with an optional weight. Raises UserError when one is not prepared or their tokenizers differ.
    """
    shards, weights, leaks = [], [], []
    for entry in names.split(","):
        name, _, weight = entry.strip().partition(":")
        try:
            weights.append(float(weight or 1))
        except ValueError:
            raise UserError(f"--data: {weight!r} is no weight; write name:2 or name") from None
        if not 0 <= weights[-1] <= 1000:
            raise UserError(f"--data: a weight of {weight} for {name}: from 0 to 1000")
        shards.append(Shard(Path(shards_dir) / name / split))
        if shards[-1].folder in [shard.folder for shard in shards[:-1]]:
            raise UserError(f"--data: {name} is named twice; write {name}:2 to see it twice as often")
        shards[-1].require_questions()
        leaks.append(read_leaks(shards[-1]))
    if len({(shard.manifest["tokenizer_sha256"], shard.manifest.get("system", "")) for shard in shards}) > 1:
        raise UserError(f"--data: {names} were prepared with different tokenizers or system messages; prepare "
                        "them with one: `python prepare/all.py --tokenizer=... --system=...`")
    return {"shards": shards, "weights": weights, "leaks": leaks}


def hub_folder(name):
    """The hub folder of a whole model that --model names, as it is or in weights/; "" where it names sizes."""
    return next((str(path) for path in (Path(name), Path("weights", name)) if (path / "config.json").is_file()), "")


def settle(config):
    """
    train_vlm.py's flags with "auto" replaced: of a pretrained Qwen3-VL the tower is frozen, and LoRA is on all seven
    matrices of a block; of a gpt-oss on the four of its attention. What is taken of the encoder, and the kind of
    projector, are those of --start. A run that goes on keeps what it had.
    """
    before = read_manifest(Path(config.run), "config.json") if config.resume and config.run else None
    if before:
        settled = AUTO | before["flags"]
    else:
        begun, settled = {"model": config.model, "language_weights": config.language_weights}, AUTO
        if config.start and not Path(config.start, "adapter_config.json").is_file():
            begun |= read_manifest(find_run(config.start)[1]).get("flags", {})
            settled = AUTO | {flag: begun[flag] for flag in ("vision_layer", "vision_tokens", "projector_type", "merge")
                              if flag in begun}
        if hub_folder(begun["model"]):
            settled = settled | {"vision": "frozen", "lora_targets": SEVEN}
        elif begun["model"].startswith("gpt_oss") or family_of(begun["language_weights"]) == "gpt_oss":
            settled = settled | {"lora_targets": FOUR}
    return replace(config, **{flag: settled[flag] for flag in AUTO if getattr(config, flag) in ("auto", 0)})


def weights_of(config, tokenizer):
    """The weights files of vision and language part, "" for none. UserError where the tokenizer is another's."""
    paper = {"vision": "weights/biomedclip.safetensors", "language": "weights/pmc_llama_7b"}
    chosen = {"vision": config.vision_weights, "language": config.language_weights}
    whole = hub_folder(config.model)
    if (family := whole and family_of(whole)) in ("llama", "gpt_oss"):
        raise UserError(f"--model={config.model}: a {family}, which has no encoder; name it with --language_weights, "
                        "and sizes of an encoder with --model, or the file of one with --vision_weights")
    if whole and {*chosen.values()} != {"auto"}:
        raise UserError(f"--model={config.model}: brings all parts; leave out --vision_weights and --language_weights")
    for part, name in chosen.items():
        chosen[part] = {"auto": paper[part] if config.model == "paper" else whole, "none": ""}.get(name, name)
    if Path(chosen["language"], "config.json").is_file():
        require_own_tokenizer(chosen["language"], tokenizer)
    return chosen["vision"], chosen["language"]


def family_of(folder):
    """The model_type of a hub folder, None where it cannot be read: whoever loads it says what is wrong."""
    try:
        return json.loads(Path(folder, "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None


def require_own_tokenizer(folder, tokenizer):
    """
    Raise UserError where a model's hub folder is of another family than the tokenizer of the shards, or has
    another tokenizer beside it. Where it has none, that is printed.
    """
    family = family_of(folder)
    if SUFFIXES.get(family, tokenizer.path.suffix) != tokenizer.path.suffix:
        raise UserError(f"{folder}: of another family ({family}) than the shards' {tokenizer.path}; prepare the data "
                        f"anew with `python prepare/all.py --only=... --tokenizer={find_tokenizer(folder)}`")
    problem, unknown = tokenizer_mismatch(folder, [tokenizer.piece(token) for token in range(tokenizer.vocab_size)])
    if problem:
        raise UserError(problem)
    if unknown:
        print(f"{folder}: not known whether its tokenizer is the shards': {unknown}")


def find_start(config, tokenizer):
    """What --start names: (a checkpoint, None), or (None, an adapter folder); (None, None) without it."""
    if config.base_bits and (config.shard or config.language == "full"):
        raise UserError(f"--base_bits={config.base_bits}: for a frozen language model in one piece; leave it out, or "
                        "--language=full and --shard")
    if not config.start:
        return None, None
    if Path(config.start, "adapter_config.json").is_file():
        return None, Path(config.start)
    if (config.vision_weights, config.language_weights) != ("auto", "auto"):
        raise UserError(f"--start={config.start}: brings all parts; leave out --vision_weights and --language_weights")
    return checkpoint_of(config.start, tokenizer), None


def checkpoint_of(start, tokenizer):
    """The checkpoint that --start names. UserError where its tokenizer is not that of the data."""
    begun = find_run(start)[1]
    if read_manifest(begun).get("inputs", {}).get("tokenizer") != tokenizer.sha256:
        raise UserError(f"--start={start}: has another tokenizer than the data; prepare them with "
                        f"`python prepare/all.py --tokenizer={find_tokenizer(begun.parent)}`")
    return begun
