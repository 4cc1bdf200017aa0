"""
Which prepared splits a run can be asked, those in its tokenizer's tokens whose images are like its own, and
their questions in groups that share what they begin with.
"""

import shlex
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plumbing.flags import UserError
from plumbing.pixels import resize_flags
from plumbing.shards import Shard
from tasks import boxes, choices, reports, vqa
from tasks.vqa import exchange_images

QUESTIONS_PER_ROW = 32  # that share the keys and values of what they begin with; more of them start another row


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


def tokenizer_flags(tokenizer):
    """The flags of prepare/all.py that write data in a run's words."""
    system = f" --system={shlex.quote(tokenizer.system)}" if tokenizer.system else ""
    return f"--tokenizer={tokenizer.path}{system}"


def find_misfit(shard, tokenizer, image):
    """Why a run with this tokenizer and these settings of images cannot be asked a shard's questions; or ""."""
    mend = f"run `python prepare/all.py --only={shard.folder.parent.name}"
    if shard.manifest["tokenizer_sha256"] != tokenizer.sha256:
        return f"made with another tokenizer than the run; {mend} {tokenizer_flags(tokenizer)}`"

    if (system := shard.manifest.get("system", "")) != tokenizer.system:
        return (f"made with the system message {system!r}, the run with {tokenizer.system!r}; {mend} "
                f"{tokenizer_flags(tokenizer)}`")
    here, runs = resize_flags(shard.manifest["image"]), resize_flags(image or shard.manifest["image"])
    if len(shard.image_index) and here != runs:
        return f"images made by {here}, the run's by {runs}; {mend} {runs}`"
    return ""


def open_splits(data, split, shards_dir, tokenizer, image=None):
    """
    The Shards of a split that `data` names, with commas between, or all that ask about images, or with data="all"
    whatever has questions, in this tokenizer's tokens, and with images of the settings `image` where it is given.
    Raises UserError for one that is named and does not fit, and where none is left; of the others it prints why
    they do not.
    """
    shards, left_out = [], []
    kinds = ("image questions", "boxes", *(("text questions", "captions", "reports") if data == "all" else ()))
    for name in name_datasets("" if data == "all" else data, split, shards_dir):
        shard = Shard(Path(shards_dir) / name / split)
        misfit = find_misfit(shard, tokenizer, image)
        if data not in ("", "all"):
            shard.require_questions()
            if misfit:
                raise UserError(f"{shard.folder}: {misfit}")
        elif shard.manifest["kind"] not in kinds or not len(shard):
            continue
        elif misfit:
            left_out.append(f"{shard.folder}, {misfit}")
            continue
        shards.append(shard)
    if not shards:
        but = f", but {left_out[0]}" if left_out else "; run `python prepare/all.py --only=path_vqa " \
            f"{tokenizer_flags(tokenizer)}`"
        raise UserError(f"{shards_dir}: no {split} split of questions about images{but}")
    for why in left_out:
        print(f"not answered: {why}")
    return shards


# ----------------------------------------------------------------------------- the questions of a shard

def task_of(shard):
    """The module that scores a shard's answers, guesses them blindly, and prints the tables."""
    kind = shard.manifest.get("task") or shard.manifest["kind"]
    return {"boxes": boxes, "choices": choices, "reports": reports, "captions": reports}.get(kind, vqa)


def answer_limit(shard, config):
    """
    Tokens that an answer may have: --max_new_tokens, else 32 to a plain question, of boxes half more than the split's
    longest answer has, and of choices and reports the larger of both.
    """
    least = 0 if task_of(shard) is boxes else 32
    if config.max_new_tokens or task_of(shard) is vqa:
        return config.max_new_tokens or least
    first, images, spans = (shard.samples[name].astype(np.int64) for name in ("parts", "images", "spans"))
    begin = first + images + 2 * (spans - 1)  # (n,) where parts.bin has each last answer's span
    return max(least, 3 * int((shard.parts[begin + 1] - shard.parts[begin]).max()) // 2)


def count_questions(shard, config):
    """How many of a shard's questions eval_vqa.py's flags ask."""
    return min(config.limit or len(shard), len(shard))


def show_images(shard, count, config):
    """
    {row of the table: (I,) the image that is shown in place of each of the shard's}. UserError where --blind=shuffle
    has no two to exchange.
    """
    own = np.arange(len(shard.image_index))
    sample, image = shard.image_pairs()
    asked = sample < count
    related = shard.connect()[sample[asked]]
    shown = {} if config.blind == "shuffle" else {"model": own}
    if config.blind != "none" and len(np.unique(related)) > 1:
        shown["image shuffled"] = exchange_images(len(own), image[asked], related, config.seed)
    if not shown:
        raise UserError(f"--blind=shuffle: {shard.folder} has no two images to exchange; leave --blind "
                        "out, or name other --data")
    return shown


@dataclass
class Question:
    """One that is to be asked, for a row of a table of scores."""
    row: str
    number: int  # of its sample in the shard
    prompt: list  # token ids; image number n of the shard as -1 - n


def exchanged(prompt, images):
    """A prompt, (L,) int64 with image number n as -1 - n, with image images[n] in the place of each n; images: (I,)."""
    prompt, is_image = prompt.copy(), prompt < 0
    prompt[is_image] = -1 - images[-1 - prompt[is_image]]
    return prompt


def group_questions(shard, count, shown, more=()):
    """
    A shard's first `count` questions as groups for generate(), lists of Questions that begin with the same
    images or context, longest first. shown: {row: (I,) the image to show in place of each of the shard's}; more:
    Questions in other words.
    """
    samples, alike = [shard.read_sample(number) for number in range(count)], defaultdict(list)
    asked = [Question(row, number, exchanged(sample.prompt(), images).tolist())
             for row, images in shown.items() for number, sample in enumerate(samples)] + list(more)
    for question in asked:
        last = max((place for place, token in enumerate(question.prompt) if token < 0), default=-1)
        begin = tuple(question.prompt[:last + 1]) or int(shard.samples["prefix"][question.number])
        alike[begin].append(question)
    groups = [questions[begin:begin + QUESTIONS_PER_ROW] for questions in alike.values()
              for begin in range(0, len(questions), QUESTIONS_PER_ROW)]
    return sorted(groups, key=lambda questions: -sum(len(question.prompt) for question in questions))


def read_groups(shard, groups):
    """Yield (images, prompts) of such groups, as generate() takes them."""
    for questions in groups:
        numbers = list(dict.fromkeys(-1 - token for token in questions[0].prompt if token < 0))
        own = {-1 - number: -1 - place for place, number in enumerate(numbers)}
        yield ([shard.read_image(number) for number in numbers],
               [[own.get(token, token) for token in question.prompt] for question in questions])
