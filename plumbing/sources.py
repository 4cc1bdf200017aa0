"""What a run begins with: weights files, the parts of another run, or an adapter."""

from pathlib import Path

from plumbing.claims import tokenizer_mismatch
from plumbing.files import find_run, read_manifest
from plumbing.flags import UserError


def weights_of(config, tokenizer):
    """The weights files of vision and language part, "" for none. UserError where the tokenizer is another's."""
    paper = {"vision": "weights/biomedclip.safetensors", "language": "weights/pmc_llama_7b"}
    chosen = {"vision": config.vision_weights, "language": config.language_weights}
    for part, name in chosen.items():
        chosen[part] = {"auto": paper[part] if config.model == "paper" else "", "none": ""}.get(name, name)
    if Path(chosen["language"], "config.json").is_file():
        pieces = [tokenizer.model.id_to_piece(token) for token in range(tokenizer.vocab_size)]
        problem, unknown = tokenizer_mismatch(chosen["language"], pieces)
        if problem:
            raise UserError(problem)
        if unknown:
            print(f"{chosen['language']}: not known whether its tokenizer is the shards': {unknown}")
    return chosen["vision"], chosen["language"]


def find_start(config, tokenizer):
    """What --start names: (a checkpoint, None), or (None, an adapter folder); (None, None) without it."""
    if not config.start:
        return None, None
    if Path(config.start, "adapter_config.json").is_file():
        return None, Path(config.start)
    begun = find_run(config.start)[1]
    if (config.vision_weights, config.language_weights) != ("auto", "auto"):
        raise UserError(f"--start={config.start}: brings all parts; leave out --vision_weights and --language_weights")
    if read_manifest(begun).get("inputs", {}).get("tokenizer") != tokenizer.sha256:
        raise UserError(f"--start={config.start}: has another tokenizer than the data; prepare them with "
                        f"`python prepare/all.py --tokenizer={begun.parent}/tokenizer.model`")
    return begun, None
