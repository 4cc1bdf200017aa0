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

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data import Mixture, Tokenizer
from generate import Sampling, finished_groups, generate
from model import normalise
from plumbing.devices import to_device
from plumbing.flags import UserError, Whole, parse_command_line, run
from plumbing.pixels import FORMATS
from plumbing.shards import Shard
from prepare.datasets import DATASETS
from prepare.shards import clean_record, with_reasoning
from run import open_trained_run
from tasks.splits import find_misfit
from tasks import boxes
from tasks.vqa import bleu1
from weights import load_vlm

SHOWN = ("offset", "length", "image", "head", "prompt", "prefix")  # of a sample's entry


@dataclass(frozen=True)
class Config:
    run: str = "out/path_vqa"  # folder of a train_vlm.py run
    data: str = "path_vqa"  # prepared dataset
    split: str = "test"  # one of its splits
    number: Whole = 0  # sample of the split
    raw_dir: str = "raw"  # where prepare/all.py read it
    shards_dir: str = "shards"  # where prepare/all.py put it


def require_sample(shard, tokenizer, config):
    """Raise UserError unless the split has this number, one question about one image, in the run's own tokens."""
    shard.require_questions()
    if config.number >= len(shard):
        raise UserError(f"--number={config.number}: {shard.folder} has samples 0 to {len(shard) - 1:,}")
    if (shard.samples[config.number]["images"], shard.samples[config.number]["spans"]) != (1, 1):
        raise UserError(f"--number={config.number}: not one question about one image in {shard.folder}; choose "
                        "another one")
    if misfit := find_misfit(shard, tokenizer, None):
        raise UserError(f"{shard.folder}: {misfit}")


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
    _, checkpoint, _, tokenizer = open_trained_run(config.run)
    require_sample(shard, tokenizer, config)
    words, entry = shard.read_records()[config.number], shard.samples[config.number]
    record = clean_record(find_record(words["id"], config), shard.manifest.get("box_format"))
    [view] = record.views()
    image = Image.open(io.BytesIO(view.image), formats=FORMATS)
    print(f"{config.data + '(raw)':16} Record {record.id!r}: {record.question!r} -> {record.answer!r}, "
          f"{image.format} {image.mode} {image.size}, {len(view.image):,} bytes")

    written = with_reasoning(record, shard.manifest.get("reasoning", "none"))
    tokens, [(begin, end)], (head, cut) = tokenizer.write(written)
    if tokens != np.maximum(shard.read_sample(config.number).tokens, -1).tolist():  # its one image is -1
        raise UserError(f"{shard.folder}: the tokens of sample {config.number} are not those of its words; "
                        f"{shard.again}")
    pixels = shard.read_image(entry["image"])
    prompt, answer = tokens[head:cut], tokenizer.encode(written.answer.strip())
    if isinstance(tokenizer, Tokenizer):
        template, before, between, behind = "write_plain", "<bos>, the image", "", "<eos>"
        print(f"format_prompt    {tokenizer.decode(prompt)!r}")
    else:
        after = next(count for count in range(end) if tokens[end - count - len(answer):end - count] == answer)
        template, before, behind = "write", f"{head} up to the image's end", f"{after} that end it"
        between = f"{end - after - len(answer) - cut} up to the answer, "
    print(f"Tokenizer.encode {prompt} | {answer}")
    print(f"{template:16} {end} tokens: {before}, {len(prompt)} of prompt, {between}{len(answer)} of answer, "
          f"{behind}; supervised: {begin} to {end - 1}")
    print(f"SplitWriter.add  samples.bin[{config.number}] = {({name: int(entry[name]) for name in SHOWN})}")
    print(f"encode_image     images.bin, {int(shard.image_index[entry['image']]['length']):,} bytes of "
          f"{shard.manifest['image']['codec']}")
    print(f"Shard.read_image {pixels.shape} {pixels.dtype}, mean {pixels.mean():.1f}")
    follow_model(config, shard, load_vlm(checkpoint).eval(), tokenizer, words, end - begin)


@torch.no_grad()
def follow_model(config, shard, model, tokenizer, words, length):
    """Print what the model makes of the sample, from its pixels to the score of its answer."""
    model.vision.require_shapes(shard.folder, shard.image_index)
    mixture = Mixture([shard], model.vision.tokens, batch_size=1, max_length=1 << 20)
    step = mixture.pack(0, [config.number], [0])
    batch = to_device(step.batches[0], torch.device("cpu"))
    print(f"Mixture.pack     tokens {tuple(batch.tokens.shape)}, {len(batch.image_at)} of them of the image; "
          f"supervised at {batch.answer_at.tolist()}: {batch.targets.tolist()}")
    images = normalise(torch.stack(batch.images), model.vision.mean, model.vision.std)
    print(f"normalise        {tuple(images.shape)}, mean {images.mean():.3f}, std {images.std():.3f}")
    print(f"{type(model.vision).__name__:16} {tuple(model.vision(images).shape)}")
    image_tokens = model.encode_images(batch.images)
    projector = type(model.projector).__name__
    print(f"{'VLM.projector' if projector == 'Linear' else projector:16} {tuple(image_tokens.shape)}")
    positions = model.vision.place(batch.positions, batch.group, batch.branch, batch.image_at, batch.images)
    if positions.dim() == 2:
        first, last = positions[batch.image_at[[0, -1]]].tolist()
        print(f"{type(model.vision).__name__ + '.place':16} time, row, column: the image from {first} to {last}, "
              f"the last token at {positions[-1].tolist()}")
    embedded = model.language.embed(batch.tokens, image_tokens, batch.image_at)
    print(f"{type(model.language).__name__ + '.embed':16} {tuple(embedded.shape)}")
    logits = model(batch)
    print(f"VLM.forward      logits {tuple(logits.shape)}")
    for token, loss in zip(batch.targets, F.cross_entropy(logits, batch.targets, reduction="none")):
        print(f"  loss of {tokenizer.piece(int(token))!r:12} {loss:.3f} nats")
    print(f"VLM.loss         {model.loss(batch) / step.divisor:.3f} nats a token")
    prompt = [max(token, -1) for token in shard.read_sample(config.number).prompt().tolist()]  # one image: -1
    [(_, [reply])] = finished_groups(generate(model, [([batch.images[0].numpy()], [prompt])], max(length, 32),
                                           sampling=Sampling(stops=tokenizer.stops, vocab_size=tokenizer.vocab_size)))
    print(f"generate         {reply.tokens}")
    print(f"Tokenizer.decode {tokenizer.decode(reply.tokens)!r}")
    text = tokenizer.decode(reply.tokens)
    if "boxes" in words:
        print(f"boxes.score      F-IoU {boxes.score(words, text)[boxes.MAIN]:.1f}")
    else:
        print(f"bleu1            {bleu1(text, words['answer']):.2f}")


if __name__ == "__main__":
    run(main, parse_command_line(Config))
