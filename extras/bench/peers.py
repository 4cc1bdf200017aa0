"""
What the benchmarks measure beside: the same weights in transformers' models, with PEFT's LoRA, used as usual.

    LlavaPeer    ViTModel, a Linear and LlamaForCausalLM, as LLaVA-style code puts them together
    QwenPeer     Qwen3VLForConditionalGeneration, as TRL's SFTTrainer trains it and its users ask it

Each sample is a row with its image, padded to the longest of its batch. What a collator does beforehand is done
beforehand here, too, and what a trainer counts besides the loss is left out.

Letters: B rows, T tokens of a row, N tokens of an image or of all images.
"""

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import peft
import torch
import torch.nn as nn
import transformers

from extras.bench.classifying import make_vit
from model import ViT, normalise
from plumbing.flags import UserError
from plumbing.shards import Shard
from plumbing.tensors import plain_names
from weights import hub_config, is_trained
from zoo.adapters import adapter_parameters
from zoo.chatml import tokenizer_of
from zoo.qwen3_files import PARTS, write_config
from zoo.qwen3_vl import in_blocks


# ----------------------------------------------------------------------------- ours

def open_questions(config, split):
    """The shard of a split of --data, whose questions are about one image each, and its tokenizer."""
    shard = Shard(Path(config.shards_dir) / config.data / split)
    shard.require_questions()
    if (shard.samples["images"] != 1).any():
        raise UserError(f"--data: {config.data} asks about no image, or several, too, which the benchmarks do not")
    return shard, tokenizer_of(shard)


def require_shapes(model, shard):
    """Raise UserError where our model or its peer cannot read the images of a shard."""
    if isinstance(model.vision, ViT) and not model.vision.config.tiled:  # transformers' has one size
        shard.require_image_size(model.vision.config.image_size)
    model.vision.require_shapes(shard.folder, shard.image_index)


# ----------------------------------------------------------------------------- rows

@dataclass
class Rows:
    """A padded batch of B samples; what follows an answer's tokens is predicted, as -100 it is not."""
    tokens: torch.Tensor  # (B, T) int64, 0 where an image or padding stands
    seen: torch.Tensor  # (B, T) int64, 0 where padding stands, else 1
    labels: torch.Tensor  # (B, T) int64
    pictured: torch.Tensor  # (B, T) bool, where images stand
    images: list  # of all rows, in order, each (H, W, 3) uint8
    supervised: int  # tokens
    patches: torch.Tensor | None = None  # Qwen's processor's, see patches_of
    grids: torch.Tensor | None = None


def lay_out(shard, numbers, vision, device, prompts=False):
    """These samples of a shard as Rows, padded behind; prompts: without their last answers, padded before."""
    rows, images = [], []
    for number in numbers:
        sample = shard.read_sample(number)
        tokens = sample.prompt() if prompts else sample.tokens
        labels, counts = np.full(len(tokens), -100), np.ones(len(tokens), np.int64)
        for begin, end in sample.spans.tolist()[:0 if prompts else None]:
            labels[begin:end] = tokens[begin:end]
        for place in np.flatnonzero(tokens < 0):
            images.append(shard.read_image(int(-1 - tokens[place])))
            counts[place] = vision.tokens(*images[-1].shape[:2])
        columns = np.maximum(tokens, 0), np.ones_like(tokens), labels, tokens < 0
        rows.append([np.repeat(column, counts) for column in columns])
    T = max(len(tokens) for tokens, *_ in rows)

    def pad(column, value):
        sides = [(T - len(row[column]), 0) if prompts else (0, T - len(row[column])) for row in rows]
        return torch.as_tensor(np.stack([np.pad(row[column], side, constant_values=value)
                                         for row, side in zip(rows, sides)]), device=device)

    tokens, seen, labels, pictured = (pad(column, value) for column, value in enumerate((0, 0, -100, False)))
    return Rows(tokens, seen, labels, pictured, [torch.from_numpy(image).to(device) for image in images],
                int((labels >= 0).sum()))


# ----------------------------------------------------------------------------- peers

def with_lora(model, ours, targets):
    """A model with PEFT's LoRA on `targets`, equal to that of ours; as it is where ours has none."""
    if not targets:
        return model
    settings = next(iter(ours.lora.values()))
    return peft.get_peft_model(model, peft.LoraConfig(r=settings["r"], lora_alpha=settings["alpha"],
                                                      target_modules=targets))


class Peer(nn.Module):
    """What both have: `model` of transformers, and which of its parameters are which of ours."""

    def pair(self, ours):
        """[(name, parameter of ours, the peer's)] of those that have a name which both know: LoRA above all."""
        theirs = {name.replace(".default.", "."): p for name, p in self.model.named_parameters()}
        return [(name, parameter, theirs[name]) for name, parameter in self.name(ours).items()]

    @torch.no_grad()
    def take(self, ours):
        """Train the same parameters as our model does, from the same values."""
        for _, parameter, theirs in self.pair(ours):
            theirs.requires_grad_(parameter.requires_grad).copy_(parameter)
        return self.to(next(ours.projector.parameters()).device)

    def collate(self, rows):
        """What is done to Rows before the model sees them."""
        return rows

    def forward(self, rows):
        """The mean cross-entropy over supervised tokens, times their number: summed, as ours."""
        return self.model(**self.inputs(rows), labels=rows.labels).loss * rows.supervised

    def answer(self, rows, new_tokens):
        """Greedy answers to Rows of prompts: B lists of token ids."""
        inputs = self.inputs(rows)
        tokens = self.model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens)
        return tokens[:, rows.tokens.shape[1] if "input_ids" in inputs else 0:].tolist()


class LlavaPeer(Peer):
    """
    transformers' LLaMA behind an image encoder. encode: from (H, W, 3) uint8 images to their tokens, (N, C); else
    transformers' ViT and a Linear, with the weights of ours.
    """

    def __init__(self, ours, stops, encode=None):
        super().__init__()
        sizes, weight = ours.language.config, ours.language.lm_head.weight
        with torch.device(weight.device):  # 7B weights are soon made there
            language = transformers.LlamaForCausalLM._from_config(transformers.LlamaConfig(
                **hub_config(sizes) | {"head_dim": sizes.head_size, "eos_token_id": list(stops)}, pad_token_id=0),
                dtype=weight.dtype, attn_implementation="sdpa")
        state = ours.language.state_dict()
        language.load_state_dict({name: state[inside] for name, inside in plain_names(state).items()})
        lora = ours.lora.get("language", {"targets": ""})["targets"]
        self.model = with_lora(language, ours, lora and lora.split(","))
        self.own_encode = encode
        if not encode:
            self.vision = make_vit(ours.vision)
            self.projector = nn.Linear(ours.projector.in_features, ours.projector.out_features)
            self.projector.load_state_dict(ours.projector.state_dict())
            self.vision.requires_grad_("vision" not in ours.lora and is_trained(ours.vision))

    def name(self, ours):
        return adapter_parameters(ours.language) or dict(ours.language.named_parameters())

    def encode(self, images):
        if self.own_encode:
            return self.own_encode(images)
        seen = self.vision(pixel_values=normalise(torch.stack(images))).last_hidden_state
        return self.projector(seen).flatten(0, 1)

    def inputs(self, rows):
        x = self.model.get_input_embeddings()(rows.tokens)
        x = x.masked_scatter(rows.pictured[..., None], self.encode(rows.images).to(x.dtype))
        return {"inputs_embeds": x, "attention_mask": rows.seen}


class QwenPeer(Peer):
    """transformers' Qwen3-VL. picture: the token id that stands for an image, and for nothing else."""

    def __init__(self, ours, stops, picture):
        super().__init__()
        with tempfile.TemporaryDirectory() as folder:
            write_config(Path(folder), ours.vision.config, ours.language.config)
            settings = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        settings["text_config"] |= {"eos_token_id": list(stops), "pad_token_id": 0}
        config = transformers.Qwen3VLConfig.from_dict(settings | {"image_token_id": picture})
        weight = next(ours.language.blocks.parameters())
        with torch.device(weight.device):
            model = transformers.Qwen3VLForConditionalGeneration._from_config(
                config, dtype=weight.dtype, attn_implementation="sdpa")
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = list(stops), 0
        tensors = {}
        for part, (_, prefix, _) in PARTS.items():
            state = getattr(ours, part).state_dict()
            tensors |= {prefix + name: state[inside] for name, inside in plain_names(state).items()}
        if config.tie_word_embeddings:
            tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"]
        model.load_state_dict(tensors)
        model.requires_grad_(False)
        targets = [name for settings in ours.lora.values() for name in settings["targets"].split(",")]
        self.model, self.picture = with_lora(model, ours, targets), picture

    def name(self, ours):
        lora, before = {}, "base_model.model." if ours.lora else ""
        for part in ("vision", "language"):
            lora |= adapter_parameters(getattr(ours, part))
        return lora | {f"{before}{prefix}{name}": parameter for part, (_, prefix, _) in PARTS.items()
                       if part not in ours.lora for name, parameter in getattr(ours, part).named_parameters()}

    def collate(self, rows):
        patches, grids = patches_of(rows.images, self.model.config.vision_config)
        return replace(rows, patches=patches, grids=grids)

    def inputs(self, rows):
        return {"input_ids": rows.tokens.masked_fill(rows.pictured, self.picture), "attention_mask": rows.seen,
                "mm_token_type_ids": rows.pictured.int(), "pixel_values": rows.patches,
                "image_grid_thw": rows.grids, "use_cache": not self.training}


def patches_of(images, config):
    """Images as Qwen's processor gives them: (N m^2, 1536) float32 patches, (I, 3) their grids."""
    P, patches, grids = config.patch_size, [], []
    for image in images:
        x = ((image / 255 - 0.5) / 0.5).permute(2, 0, 1)
        x = x.unfold(1, P, P).unfold(2, P, P)  # (3, rows, columns, P, P)
        grids.append((1, *x.shape[1:3]))
        x = in_blocks(x.permute(0, 3, 4, 1, 2), config.spatial_merge_size).permute(3, 0, 1, 2)
        patches.append(x[:, :, None].expand(-1, -1, config.temporal_patch_size, -1, -1).flatten(1))
    return torch.cat(patches), torch.tensor(grids, device=patches[0].device)


def make_peer(ours, shard, stops, encode=None):
    """The peer of a VLM. encode: see LlavaPeer."""
    if isinstance(ours.vision, ViT):
        return LlavaPeer(ours, stops, encode).take(ours)
    # 0 stands for padding
    unused = np.setdiff1d(np.arange(1, ours.language.config.vocab_size), shard.tokens)
    return QwenPeer(ours, stops, int(unused[0])).take(ours)
