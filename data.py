"""
What the model is trained on: records, how they become tokens, and the loader of packed micro-batches.

A sample is a stream of tokens in which an image is one place, and the spans of it that are supervised:

    <bos> image Question: what is shown? Answer: | a fracture <eos>        one image, one question
    <bos> frontal: image lateral: image Question: ... Answer: | ... <eos> Question: ... | ... <eos>

A micro-batch is one flat sequence of T tokens, groups of samples end to end. What the samples of a group
share (an image, a study of three views with its history, a long context) stands there once; each branch
behind it, one sample's own tokens, sees the shared prefix and itself:

    <bos> image ... image Question: what | is shown? Answer: a fracture | side? Answer: left | <bos> ...
    0     1         N     N+1 ...          N+4 ...                        N+4 ...              0   <- positions

What this costs: masks that are not plainly causal. What it gives: no padding, an image that 30 samples ask
about is encoded once, and a group's loss and gradients are those of its samples run one at a time.

Letters: L tokens of a stream, an image being one; T tokens that the model is given; I images; N tokens of
images; M supervised positions; H, W pixels. This file needs no torch: arrays leave it as numpy.
"""

import functools
import hashlib
import re
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import sentencepiece

from plumbing.order import (argsort_groups, argsort_numbers, count_before, in_background, pick, place_in_run,
                            random_keys, walk, whole_type)
from plumbing.flags import UserError

BOS, EOS = 1, 2  # LLaMA's ids; PMC-LLaMA's config.json says 0 and 1, which its tokenizer contradicts


# ----------------------------------------------------------------------------- records and their tokens

@dataclass
class View:
    """One of several images of a record."""
    image: bytes  # the encoded file; or a formats.frames.Frame, decoded where it is stored
    name: str = ""  # of the file
    role: str = ""  # in words, written before the image: "frontal", "prior frontal"


@dataclass
class Record:
    """
    A sample as prepare/ reads it from a dataset: one question about one image, or about none; for
    classification an image and its labels, without a question. `parts` are in place of `image` where there
    are several, or text between them; `turns` go on with the conversation.
    """
    id: str
    question: str = ""
    answer: str = ""
    image: bytes | None = None  # the encoded file; None for a text-only sample
    image_name: str = ""
    context: str = ""  # text that the question is about, such as an abstract
    type: str = ""  # question type, for the tables
    labels: tuple | None = None  # names of the image's classes, where a dataset has them
    references: tuple = ()  # every answer that counts as right, where `answer` is not the only one
    group: str = ""  # such as its patient: what is never divided when images are held out
    study: str = ""  # whose images a classifier may judge together, such as the slices of one scan
    parts: tuple = ()  # texts and Views, in their order, before the first question
    turns: tuple = ()  # (question, answer) of the turns behind the first
    boxes: dict | None = None  # label -> (x1, y1, x2, y2)s, shares of the image; the answer is written from them
    reasoning: str = ""  # that leads to the answer, see tasks/reasoning.py
    choices: tuple = ()  # texts of a multiple choice's options, which the question ends with, see tasks/choices.py

    def views(self):
        """Its Views, of which `image` is one."""
        if self.parts or self.image is None:
            return [part for part in self.parts if isinstance(part, View)]
        return [View(self.image, self.image_name)]


def format_prompt(question, context=""):
    """The text before an answer. It never ends in a space: see Tokenizer.encode."""
    context = f"Context: {context}\n" if context else ""
    return f"{context}Question: {question}\nAnswer:"


def write_plain(record, encode):
    """
    The template of plain language models such as LLaMA: the tokens of a record, its image number k as
    -1 - k, the (begin, end) of each answer with its <eos>, and the (begin, end) of what may be cut from its
    front where a sample is too long: the text behind the last image and before the first answer.

    This is the contract of a template, one function for a family of models: it alone knows <bos>, what
    ends an answer, and how roles, questions and turns are written. encode: Tokenizer.encode.
    """
    tokens, spans, images, head = [BOS], [], 0, 1
    for part in record.parts or record.views():
        text = part if isinstance(part, str) else part.role and f"{part.role}:"
        tokens += encode(text) if text else []
        if isinstance(part, View):
            tokens.append(-1 - images)
            images, head = images + 1, len(tokens)
    context = record.context
    for question, answer in ((record.question, record.answer), *record.turns):
        tokens += encode(format_prompt(question, context))
        begin, context = len(tokens), ""
        tokens += [*encode(answer), EOS]
        spans.append((begin, len(tokens)))
    return tokens, spans, (head, spans[0][0])


class Tokenizer:
    """A SentencePiece model whose <bos> is 1 and <eos> is 2, as in every LLaMA; zoo.chatml's has the same face."""

    stops, system, word_start, lead = (EOS,), "", "\u2581", ()  # ends answers; a system message; begins words; answers

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: no tokenizer here; run `python prepare/all.py "
                            "--only=tokenizer` or name yours with --tokenizer")
        content = self.path.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (RuntimeError, UnicodeDecodeError):  # the latter where its message quotes what is damaged
            raise UserError(f"{path}: not a SentencePiece model") from None
        if (self.model.bos_id(), self.model.eos_id()) != (BOS, EOS):
            raise UserError(f"{path}: <bos> and <eos> are {self.model.bos_id()} and "
                            f"{self.model.eos_id()}; LLaMA's are {BOS} and {EOS}")
        self.vocab_size, self.piece = self.model.get_piece_size(), self.model.id_to_piece

    def write(self, record):
        return write_plain(record, self.encode)

    def encode(self, text):
        """
        Token ids of a text, without <bos> and <eos>.

        Prompt and answer are encoded apart, then joined: each gets the piece of a word's start,
        and the boundary between them cannot move with what stands beside it. Runs of spaces are
        collapsed because transformers' and SentencePiece's own LLaMA tokenizers differ on them.
        """
        return self.model.encode(re.sub(r"[^\S\n]+", " ", text).strip())

    def decode(self, tokens):
        """The text of token ids; those past the vocabulary, such as PMC-LLaMA 13B's pad, have none."""
        return self.model.decode([int(token) for token in tokens if token < self.vocab_size]).strip()


# ----------------------------------------------------------------------------- micro-batches

@dataclass
class Batch:
    """A micro-batch: one sequence of T tokens. The arrays are numpy here, tensors in model.py."""
    tokens: np.ndarray  # (T,) int64; 0 where a token of an image or padding stands
    positions: np.ndarray  # (T,) int64, how many tokens its sample has before it
    group: np.ndarray  # (T,) int32, number of the group; -1 in padding
    branch: np.ndarray  # (T,) int32; 0 in the prefix that a group's samples share, then 1, 2, ...
    images: list  # of (H, W, 3) uint8, in the order in which they occur
    image_at: np.ndarray  # (N,) int64, where the tokens of the images go, image after image
    answer_at: np.ndarray  # (M,) int64, where what predicts a target stands
    targets: np.ndarray  # (M,) int64, the token to predict
    weights: np.ndarray  # (M,) float32, of each target's cross-entropy in the loss
    key: np.ndarray  # (T,) int32, random: a sample's own in its branch, its group's in the prefix


@dataclass
class Step:
    """All that one optimiser step needs."""
    number: int
    batches: list  # of Batch, those of this rank
    divisor: float  # of the summed loss: by default the supervised tokens of all ranks
    padded: float = 0.0  # share of the tokens that is padding
    samples: list = field(default_factory=list)  # (shard, sample number) of each


@dataclass
class Group:
    """Samples that begin alike, and how much of their tokens they share."""
    samples: list  # of Sample
    prefix: int  # shared tokens, an image being one; 0 where a sample stands alone
    key: int  # of the prefix
    image_tokens: np.ndarray  # (images of the shard,) tokens of each
    read_image: Callable  # number -> (H, W, 3) uint8

    def __post_init__(self):
        """Note how many tokens the model is given: of the prefix, and of each sample behind it but for its last."""
        self.first = int(self.lengths(self.samples[0].tokens[:self.prefix]).sum()) if self.samples else 0
        self.rest = [int(self.lengths(sample.tokens[self.prefix:-1]).sum()) for sample in self.samples]

    def lengths(self, tokens):
        """(L,) tokens of a stream -> how many each becomes before the model, (L,) int64."""
        lengths, is_image = np.ones(len(tokens), np.int64), tokens < 0
        if is_image.any():
            lengths[is_image] = self.image_tokens[-1 - tokens[is_image]]
        return lengths

    def cut(self, longest):
        """The group in several of at most so many tokens, the prefix in each; one sample may be longer."""
        parts, room = [], 0
        for sample, length in zip(self.samples, self.rest):
            if not parts or length > room:
                parts.append([])
                room = longest - self.first
            parts[-1].append(sample)
            room -= length
        return [replace(self, samples=samples) for samples in parts] if len(parts) > 1 else [self]


def shared_prefix(samples):
    """Tokens with which all samples begin, so that each keeps the last of its prompt for itself; 0 for one."""
    if len(samples) == 1:
        return 0
    longest = min(sample.spans[0, 0] for sample in samples) - 1
    first = samples[0].tokens[:longest]
    differs = np.any([sample.tokens[:longest] != first for sample in samples[1:]], axis=0)
    return int(differs.argmax()) if differs.any() else int(longest)


def make_batch(groups, multiple=1):
    """Write groups out, end to end, as the arrays of a Batch, padded to a multiple of so many tokens."""
    pieces, lengths, about, images = [], [], [], []  # about: (group, branch, key, first position) of each piece
    L, answers, targets, weights = 0, [], [], []  # answers: places in the stream of all pieces
    for number, group in enumerate(groups):
        own = [(sample.tokens[group.prefix:-1], sample.key, sample) for sample in group.samples]
        shared = [(group.samples[0].tokens[:group.prefix], group.key, None)] if group.prefix else []
        sizes = [group.first] * len(shared) + group.rest
        for branch, ((tokens, key, sample), size) in enumerate(zip(shared + own, sizes)):
            pieces.append(tokens)
            lengths.append(np.ones(size, np.int64) if size == len(tokens) else group.lengths(tokens))
            about.append((number, branch, key, group.first if sample else 0))
            if (tokens < 0).any():
                images += [group.read_image(int(image)) for image in -1 - tokens[tokens < 0]]
            for begin, end in sample.spans.tolist() if sample else ():
                answers.append(np.arange(begin - 1, end - 1) + (L - group.prefix))
                targets.append(sample.tokens[begin:end])
                weights.append(np.full(end - begin, sample.weight, np.float32))
            L += len(tokens)
    stream, lengths = np.concatenate(pieces), np.concatenate(lengths)  # (L,)
    ends = np.cumsum(lengths)  # (L,), behind the last token of each; the last of them is T
    piece_ends = ends[np.cumsum([len(piece) for piece in pieces]) - 1]
    piece_lengths = np.diff(piece_ends, prepend=0)
    group, branch, key, first = (np.repeat(column, piece_lengths) for column in np.array(about, np.int64).T)
    positions = np.arange(ends[-1]) - np.repeat(piece_ends - piece_lengths, piece_lengths) + first

    def pad(array, dtype, value=0):
        return np.pad(array.astype(dtype), (0, -len(array) % multiple), constant_values=value)

    return Batch(pad(np.repeat(np.maximum(stream, 0), lengths), np.int64), pad(positions, np.int64),
                 pad(group, np.int32, -1), pad(branch, np.int32), images,
                 np.flatnonzero(np.repeat(stream < 0, lengths)), ends[np.concatenate(answers)] - 1,
                 np.concatenate(targets), np.concatenate(weights), pad(key, np.int32))


# ----------------------------------------------------------------------------- the loader

HELD_OUT, ORDER = 0, 1  # purposes of random numbers, of each shard: its number is 2 * index + one of these
GROUPS, DROPOUT = 1, 2  # of all shards: 2 * shards + one of these


@dataclass
class Mixture:
    """
    Samples of several shards in a training order that is a pure function of (seed, step).

    `too_long` counts samples whose answers do not fit into max_length, and which are left out, `cut` those
    whose prompt is cut. Of several processes each packs its part of a step, the same step for any number.
    """
    shards: list  # of Shard
    count_tokens: Callable  # (heights, widths) of images, arrays of pixels -> tokens of each
    batch_size: int = 64  # samples in a step
    weights: list | None = None  # how often each shard is seen in an epoch: 2 twice; 0.5 half of it
    questions_per_image: int = 1  # samples of a step that may share one prefix; 0: all
    max_length: int = 1024  # tokens of a sample
    micro_batch_tokens: int = 8192  # tokens of a Batch, unless one sample has more
    seed: int = 0
    held_out: int = 0  # about how many samples to keep for validation, images never divided
    leaks: list | None = None  # of each shard what read_leaks says; what is to be dropped is left out
    rank: int = 0
    ranks: int = 1
    multiple: int = 1  # of tokens that a Batch is padded to
    loss_weight: str = "mean"  # of all targets; square: each counts 1 / root of how many its sample has (InternVL's)

    def __post_init__(self):
        self.starts = np.cumsum([0] + [len(shard) for shard in self.shards])  # number of each first sample
        self.train, self.validation, self.image_tokens, self.excess = [], [], [], []
        self.too_long = self.cut = 0
        for index, shard in enumerate(self.shards):
            sizes = shard.image_index
            tokens = np.asarray(self.count_tokens(sizes["height"].astype(int), sizes["width"].astype(int)), np.int32)
            self.image_tokens.append(tokens.reshape(-1))
            excess, usable = self.measure(index)
            self.excess.append(excess.astype(np.int32))
            self.too_long += int((~usable).sum())
            self.cut += int((usable & (excess > 0)).sum())
            if self.leaks and self.leaks[index][0] == "drop":
                usable[self.leaks[index][1]] = False
            out = np.zeros(len(shard), bool)
            if count := min(round(self.held_out * len(shard) / self.starts[-1]), int(usable.sum())):
                # The seed counts for nothing here: runs of all seeds are judged by the same samples
                keys = random_keys(0, 2 * index + HELD_OUT, 0, len(sizes) + len(shard))[shard.connect()]
                out = keys <= np.partition(keys[usable], count - 1)[count - 1]
            self.train.append(np.flatnonzero(usable & ~out).astype(whole_type(self.starts[-1])))
            self.validation.append(np.flatnonzero(usable & out))
        self.counts = [round(weight * len(train))
                       for weight, train in zip(self.weights or [1] * len(self.shards), self.train)]
        self.samples_per_epoch = sum(self.counts)
        if self.samples_per_epoch < 1:
            raise UserError("no sample to train on: all are held out, weighted 0 or too long")
        self.order = functools.lru_cache(maxsize=2)(functools.partial(in_background, self.epoch_order))

    def measure(self, index):
        """Of each sample of a shard: tokens beyond max_length, (n,) int64, and whether it can be cut to fit."""
        shard = self.shards[index]
        excess = shard.lengths(self.image_tokens[index]) - self.max_length
        text = shard.column("prompt").astype(np.int64) - shard.column("head")  # of which one token has to stay
        return excess, (excess <= 0) | (excess < text)

    def has_images(self):
        return any(shard.column("images")[train].any() for shard, train in zip(self.shards, self.train))

    def epoch_order(self, epoch):
        """
        One epoch's samples in training order and the group that each belongs to: two (n,) whole_type(n).

        Each dataset walks through permutations of its own, so that a weight of 0.5 sees every
        sample once in two epochs. Then groups, not samples, are shuffled over all datasets.
        """
        samples, begins = [], []
        for index, (train, count) in enumerate(zip(self.train, self.counts)):
            picked = walk(train, epoch * count, (epoch + 1) * count, self.seed, 2 * index + ORDER)
            # Sort by prefix, keeping the random order within one, and cut into groups. A sample that comes
            # again, by a weight above 1, is in another group: never twice behind one copy of its prefix.
            prefixes = self.shards[index].column("prefix")[picked]
            if count != len(train):
                prefixes = prefixes + count_before(picked) * (int(prefixes.max(initial=0)) + 1)
            by_prefix = argsort_numbers(prefixes)
            limit = self.questions_per_image or len(picked) + 1
            samples.append(picked[by_prefix] + int(self.starts[index]))
            begins.append(place_in_run(prefixes[by_prefix]) % limit == 0)
        samples, begins = np.concatenate(samples), np.concatenate(begins)
        order = argsort_groups(random_keys(  # no name, so that it is gone when the rest is laid out
            self.seed, 2 * len(self.shards) + GROUPS, epoch, int(begins.sum())), begins)
        samples, groups = pick(samples, order), np.cumsum(begins, dtype=whole_type(len(begins)))
        groups -= 1
        return samples, pick(groups, order)

    def chosen(self, number):
        """The samples of the step of that number, batch_size, and the group of each: the same on every machine."""
        begin, end = number * self.batch_size, (number + 1) * self.batch_size
        samples, groups = [], []
        for epoch in range(begin // self.samples_per_epoch, -(-end // self.samples_per_epoch)):
            start = epoch * self.samples_per_epoch
            order, group = self.order(epoch).result()
            window = slice(max(begin - start, 0), end - start)
            samples += order[window].tolist()
            groups += [(epoch, int(g)) for g in group[window]]
        return samples, groups

    def step(self, number):
        return self.pack(number, *self.chosen(number))

    def held_out_steps(self):
        """Steps over the held-out samples, each once, in a fixed order; all that can share do."""
        samples = np.concatenate([out + start for out, start in zip(self.validation, self.starts)])
        prefixes = np.concatenate([shard.samples["prefix"][out].astype(np.int64) + start for shard, out, start
                                   in zip(self.shards, self.validation, self.starts)])
        order = np.argsort(prefixes, kind="stable")
        for number, begin in enumerate(range(0, len(samples), self.batch_size)):
            window = order[begin:begin + self.batch_size]
            yield self.pack(number, samples[window].tolist(), prefixes[window].tolist())

    def read(self, number):
        """(index of its shard, number there, Sample, cut to fit) of a sample."""
        index = int(np.searchsorted(self.starts, number, side="right")) - 1
        local = number - int(self.starts[index])
        return index, local, self.shards[index].read_sample(local).cut(max(int(self.excess[index][local]), 0))

    def pack(self, number, samples, groups):
        """Read samples, (n,) numbers, put those of a group together, and this rank's part into micro-batches."""
        gathered, names, divisor = defaultdict(list), [], 0
        keys = random_keys(self.seed, 2 * len(self.shards) + DROPOUT, number, len(samples)) >> np.uint64(33)
        for sample, group, key in zip(samples, groups, keys.tolist()):
            index, local, read = self.read(sample)
            read.key = key
            length = int((read.spans[:, 1] - read.spans[:, 0]).sum())
            weight = length ** -0.5 if self.loss_weight == "square" else 1
            read.weight, divisor = read.weight * weight, divisor + weight * length
            gathered[group, index].append(read)
            names.append((self.shards[index], local))
        pieces = []
        for (_, index), some in gathered.items():
            group = Group(some, shared_prefix(some), some[0].key, self.image_tokens[index],
                          self.shards[index].read_image)
            pieces += group.cut(min(self.max_length, self.micro_batch_tokens))  # masks grow with the square
        batches = [make_batch(some, self.multiple) for some in self.divide(pieces)]
        padding = np.concatenate([batch.group for batch in batches] or [np.zeros(1)]) < 0
        return Step(number, batches, divisor, float(padding.mean()), names)

    def divide(self, pieces):
        """This rank's Groups in lists for a Batch each: largest first, each to the rank with the fewest tokens."""
        sizes = [piece.first + sum(piece.rest) for piece in pieces]
        loads, lists, room = [0] * self.ranks, [], 0
        for place in sorted(range(len(pieces)), key=lambda place: -sizes[place]):
            rank = loads.index(min(loads))
            loads[rank] += sizes[place]
            if rank != self.rank:
                continue
            if not lists or sizes[place] > room:
                lists.append([])
                room = self.micro_batch_tokens
            lists[-1].append(pieces[place])
            room -= sizes[place]
        return lists

    def steps(self, first, last, workers):
        """Yield the Steps first..last-1, read and decoded by `workers` threads ahead of time."""
        with ThreadPoolExecutor(workers) as pool:  # Pillow and zlib let go of the interpreter lock
            ahead = deque()
            for number in range(first, last):
                begin = number * self.batch_size
                self.order(begin // self.samples_per_epoch).result()  # not by each thread
                ahead_of_need = min(begin + self.samples_per_epoch // 16, last * self.batch_size - 1)
                self.order(ahead_of_need // self.samples_per_epoch)
                for shard in self.shards:
                    shard.release()
                ahead.append(pool.submit(self.step, number))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
