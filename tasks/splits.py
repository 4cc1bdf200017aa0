"""Which prepared splits a run can be asked: those in its tokenizer's tokens, whose images are like its own."""

from pathlib import Path

from plumbing.flags import UserError
from plumbing.shards import Shard


def name_datasets(data, split, shards_dir):
    """The datasets of --data, or else all that have the split. UserError for a weight and a missing split."""
    if not data:
        return sorted(folder.parent.name for folder in Path(shards_dir).glob(f"[!.]*/{split}"))
    names = [name.strip() for name in data.split(",")]
    for name in names:
        if not name or ":" in name:
            raise UserError(f"--data={data}: names with commas between, without weights")
        there = sorted(path.parent.name for path in Path(shards_dir).glob(f"{name}/[!.]*/manifest.json"))
        if there and split not in there:
            raise UserError(f"--split={split}: {Path(shards_dir) / name} has no such split; it has "
                            f"{', '.join(there)}")
    return list(dict.fromkeys(names))


def find_misfit(shard, tokenizer, image):
    """Why a run with this tokenizer and these settings of images cannot be asked a shard's questions; or ""."""
    mend = f"run `python prepare/all.py --only={shard.folder.parent.name}"
    if shard.manifest["tokenizer_sha256"] != tokenizer.sha256:
        return f"made with another tokenizer than the run; {mend} --tokenizer={tokenizer.path}`"

    def flags(settings):
        return f"--image_size={settings['size']} --resize={settings['resize']}"

    here = shard.manifest["image"]
    if image and len(shard.image_index) and flags(here) != flags(image):
        return f"images made by {flags(here)}, the run's by {flags(image)}; {mend} {flags(image)}`"
    return ""


def open_splits(data, split, shards_dir, tokenizer, image=None):
    """
    The Shards of a split that `data` names, with commas between, or else all that ask about images, in this
    tokenizer's tokens, and with images of the settings `image` where it is given. Raises UserError for one
    that is named and does not fit, and where none is left; of the others it prints why they do not.
    """
    shards, left_out = [], []
    for name in name_datasets(data, split, shards_dir):
        shard = Shard(Path(shards_dir) / name / split)
        misfit = find_misfit(shard, tokenizer, image)
        if data:
            shard.require_questions()
            if misfit:
                raise UserError(f"{shard.folder}: {misfit}")
        elif shard.manifest["kind"] != "image questions" or not len(shard):
            continue
        elif misfit:
            left_out.append(f"{shard.folder}, {misfit}")
            continue
        shards.append(shard)
    if not shards:
        but = f", but {left_out[0]}" if left_out else "; run `python prepare/all.py --only=path_vqa " \
            f"--tokenizer={tokenizer.path}`"
        raise UserError(f"{shards_dir}: no {split} split of questions about images{but}")
    for why in left_out:
        print(f"not answered: {why}")
    return shards
