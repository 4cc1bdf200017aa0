"""
Follow one question from its raw file to its loss and its answer, naming each function on the way.

    python extras/look/follow.py --run=out/path_vqa --data=path_vqa --split=test --number=0

README.md's "How it works" is this script's output.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import io
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image

from data import Batch, Mixture, Shard, format_prompt
from eval_vqa import open_run
from model import VLM, normalise
from plumbing.flags import UserError, Whole, parse_command_line, run
from plumbing.pixels import FORMATS
from prepare.datasets import DATASETS
from tasks.vqa import bleu1


@dataclass(frozen=True)
class Config:
    run: str = "out/path_vqa"  # folder of a train_vlm.py run
    data: str = "path_vqa"  # prepared dataset
    split: str = "test"  # one of its splits
    number: Whole = 0  # sample of the split
    raw_dir: str = "raw"  # where prepare/all.py read it
    shards_dir: str = "shards"  # where prepare/all.py put it


def require_sample(shard, tokenizer, config):
    """Raise UserError unless the split has this number, about an image, in the run's own tokens."""
    shard.require_questions()
    if config.number >= len(shard):
        raise UserError(f"--number={config.number}: {shard.folder} has samples 0 to {len(shard) - 1:,}")
    if shard.samples[config.number]["image"] < 0:
        raise UserError(f"--number={config.number}: asks about no image in {shard.folder}; choose another one")
    if shard.manifest["tokenizer_sha256"] != tokenizer.sha256:
        raise UserError(f"{shard.folder}: made with another tokenizer than the run's {tokenizer.path}; "
                        f"{shard.again[:-1]} --tokenizer={tokenizer.path}`")


def find_record(name, config):
    """The Record of this id as the dataset's raw files have it. Raises UserError where they do not."""
    dataset = DATASETS.get(config.data)
    if dataset is None or not dataset.find(config.raw_dir):
        raise UserError(f"--data: no raw files of {config.data!r} in {config.raw_dir}; name their folder with "
                        "--raw_dir")
    for split, record in dataset.read(dataset.raw(config.raw_dir)):
        if split == config.split and record.id == name:
            return record
    raise UserError(f"{config.raw_dir}: no {name!r} in {config.data}'s {config.split} split; these are not the "
                    f"files that {config.shards_dir} was prepared from")


def main(config):
    shard = Shard(Path(config.shards_dir) / config.data / config.split)
    _, checkpoint, _, tokenizer = open_run(config.run)
    require_sample(shard, tokenizer, config)
    words, sample = shard.read_records()[config.number], shard.samples[config.number]
    record = find_record(words["id"], config)
    image = Image.open(io.BytesIO(record.image), formats=FORMATS)
    print(f"{config.data + '(raw)':16} Record {record.id!r}: {record.question!r} -> {record.answer!r}, "
          f"{image.format} {image.mode} {image.size}, {len(record.image):,} bytes")

    prompt, answer = shard.read_tokens(config.number)
    text = format_prompt(words["question"], words.get("context", ""))
    if (tokenizer.encode(text), tokenizer.encode(words["answer"])) != (prompt.tolist(), answer.tolist()):
        raise UserError(f"{shard.folder}: the tokens of sample {config.number} are not those of its words; "
                        f"{shard.again}")
    pixels = shard.read_image(sample["image"])
    print(f"format_prompt    {text!r}")
    print(f"Tokenizer.encode {prompt.tolist()} | {answer.tolist()}")
    print(f"SplitWriter.add  samples.bin[{config.number}] = {dict(zip(sample.dtype.names, sample.tolist()))}")
    print(f"encode_image     images.bin, {int(shard.image_index[sample['image']]['length']):,} bytes of "
          f"{shard.manifest['image']['codec']}")
    print(f"Shard.read_image {pixels.shape} {pixels.dtype}, mean {pixels.mean():.1f}")

    model = VLM.load(checkpoint).eval()
    shard.require_image_size(model.vision.config.image_size)
    N = model.vision.config.tokens
    mixture = Mixture([shard], N, batch_size=1, row_length=1 + N + len(prompt) + len(answer))
    step = mixture.pack(0, [config.number], [0])
    batch = Batch(**{name: torch.from_numpy(value) for name, value in vars(step.batches[0]).items()})
    print(f"Mixture.pack     tokens {tuple(batch.tokens.shape)}: <bos>, {N} image tokens, {len(prompt)} of "
          f"prompt, {len(answer)} of answer; supervised at {batch.answer_at.tolist()}: {batch.targets.tolist()}")
    with torch.no_grad():
        image = normalise(batch.images)
        print(f"normalise        {tuple(image.shape)}, mean {image.mean():.3f}, std {image.std():.3f}")
        tokens = model.vision(image)
        print(f"ViT              {tuple(tokens.shape)}")
        print(f"VLM.projector    {tuple(model.projector(tokens).shape)}")
        x = model.splice(batch.tokens, model.projector(tokens), batch.image_at)
        print(f"VLM.splice       {tuple(x.shape)}")
        logits = model(batch)
        print(f"VLM.forward      logits {tuple(logits.shape)}")
        for token, loss in zip(batch.targets, F.cross_entropy(logits, batch.targets, reduction="none")):
            print(f"  loss of {tokenizer.model.id_to_piece(int(token))!r:12} {loss:.3f} nats")
        print(f"VLM.loss         {model.loss(batch) / step.supervised:.3f} nats a token")
        [(_, [reply])] = model.generate([(batch.images[0].numpy(), [prompt.tolist()])])
        print(f"VLM.generate     {reply}")
        print(f"Tokenizer.decode {tokenizer.decode(reply)!r}")
        print(f"bleu1            {bleu1(tokenizer.decode(reply), words['answer']):.2f}")


if __name__ == "__main__":
    run(main, parse_command_line(Config))
