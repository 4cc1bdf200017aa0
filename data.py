"""
Everything that comes in from outside: text, pixels, and the shards that prepare/ writes.

A shard is one split of one dataset, a folder of files that are mapped, never loaded whole:

    tokens.bin      token ids of every sample, prompt then answer, end to end (uint16 or uint32)
    samples.bin     one SAMPLE record a sample: where its tokens are, which image it asks about
    images.bin      the encoded images, end to end, each stored once however many ask about it
    images.idx      one IMAGE record an image
    fingerprints.bin  one record an image, by which prepare/leaks.py finds it again elsewhere
    records.jsonl   the words: id, question, answer, type, image name, one line a sample; and where
                    there are any: context, labels, references, group
    manifest.json   written last: counts, settings, licence, and the size and hash of each file
    leaks.json      beside a training or validation split: the samples whose image a split to test on has,
                    too, and those images of that split

The loader packs the samples of a step into rows of T tokens. A group is one image with up to
`questions_per_image` questions about it, or one text-only sample:

    <bos> image image ... image | prompt answer | prompt answer | ...
    0     1     2         N       N+1 ...         N+1 ...            <- rotary positions

A question attends to the image and to itself, so a group's loss and gradients are those of its
samples run one at a time. The last token of a prompt predicts the answer's first token, and the
last token of the answer predicts <eos>, which therefore never has to be an input.

Letters: B samples in a step, R rows, T tokens in a row, I images, H height, W width,
M supervised positions. This file needs no torch: arrays leave it as numpy.
"""

import functools
import hashlib
import json
import re
import shlex
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import sentencepiece

from plumbing.files import read_manifest
from plumbing.flags import UserError
from plumbing.pixels import load_image, open_stored, resize_image  # noqa: F401 - two of them for others

BOS, EOS = 1, 2  # LLaMA's ids; PMC-LLaMA's config.json says 0 and 1, which its tokenizer contradicts
PROMPT_VERSION = 1  # raised when format_prompt changes, so that older shards are refused
SHARD_VERSION = 5
SAMPLE = np.dtype([("offset", "<u8"), ("prompt", "<u4"), ("answer", "<u4"),
                   ("image", "<i4"), ("checksum", "<u4")])  # lengths in tokens; image -1: none
IMAGE = np.dtype([("offset", "<u8"), ("length", "<u4"), ("checksum", "<u4")])  # bytes


# ----------------------------------------------------------------------------- text

def read_settings(path):
    """The JSON object in a file that came with weights or an adapter. UserError where it holds none."""
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, or not JSON ({error})") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: no JSON object in it")
    return settings


@dataclass
class Record:
    """
    One question about one image, or about none, as prepare/ reads it from a dataset; for
    classification an image and its labels, without a question.
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


def format_prompt(question, context=""):
    """The text before an answer. It never ends in a space: see Tokenizer.encode."""
    context = f"Context: {context}\n" if context else ""
    return f"{context}Question: {question}\nAnswer:"


class Tokenizer:
    """A SentencePiece model whose <bos> is 1 and <eos> is 2, as in every LLaMA."""

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
        self.vocab_size = self.model.get_piece_size()

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


# ----------------------------------------------------------------------------- shards

def sample_checksum(sample, tokens):
    """CRC-32 over a SAMPLE record's own fields and its tokens."""
    header = np.array([sample["offset"], sample["prompt"], sample["answer"], sample["image"]],
                      dtype="<i8")
    return zlib.crc32(np.ascontiguousarray(tokens), zlib.crc32(header))


def how_to_prepare(folder):
    """What to run for a dataset's folder in shards/; where it is of somebody's own images, a split says so."""
    for split in sorted(folder.glob("*")):
        path = (read_manifest(split) or {}).get("path")
        if path:
            return f"run `python train_cls.py --dataset={shlex.quote(path)}`"
    return f"run `python prepare/all.py --only={folder.name}`"


def splits_to_guard(folder):
    """
    {name: manifest} of the prepared splits that the split in this folder must share no image with: its own
    dataset's test split; of a training split also its validation split and the test splits of public
    datasets. What somebody prepared of their own, whose manifest names a path, is nobody else's affair.
    """
    folder, names = Path(folder), ["test"]
    others = []
    if folder.name == "train":
        names.append("validation")
        others = sorted(folder.parent.parent.glob("[!.]*/test"))
    manifests = {path: read_manifest(path) for path in [*(folder.parent / name for name in names), *others]}
    return {f"{path.parent.name}/{path.name}": manifest for path, manifest in manifests.items()
            if manifest and (path.parent == folder.parent or "path" not in manifest)}


class Shard:
    """
    One prepared split, memory-mapped. Index files are verified when it is opened, samples and
    images as they are read.

    Raises UserError when the shard is absent, cut short, altered, or written by another version.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        again = how_to_prepare(self.folder.parent)
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: not prepared; {again}")
        self.manifest = read_manifest(self.folder)
        if self.manifest is None:
            raise UserError(f"{self.folder}/manifest.json: missing or damaged; {again}")
        versions = (self.manifest.get("shard_version"), self.manifest.get("prompt_version"))
        if versions != (SHARD_VERSION, PROMPT_VERSION):
            raise UserError(f"{self.folder}: written by another version of this code; {again}")
        place = {"dataset": self.folder.parent.name, "split": self.folder.name}
        held = {name: self.manifest.get(name, here) for name, here in place.items()}
        if held != place:  # such as train in the place of test
            raise UserError(f"{self.folder}: holds {'/'.join(held.values())}; move it back, or {again}")
        for name, expected in self.manifest["files"].items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != expected["bytes"]:
                raise UserError(f"{path}: missing, or not its {expected['bytes']} bytes; {again}")
        self.again, self.mend = again, f"delete {self.folder.parent} and {again}"
        self.samples = np.frombuffer(self.read_verified("samples.bin"), SAMPLE)
        self.image_index = np.frombuffer(self.read_verified("images.idx"), IMAGE)
        self.tokens = self.map("tokens.bin", self.manifest["token_dtype"])
        self.pixels = self.map("images.bin", np.uint8)

    def __len__(self):
        return len(self.samples)

    def map(self, name, dtype):
        path = self.folder / name
        return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)

    def read_verified(self, name):
        content = (self.folder / name).read_bytes()
        if hashlib.sha256(content).hexdigest() != self.manifest["files"][name]["sha256"]:
            raise UserError(f"{self.folder / name}: damaged; {self.mend}")
        return content

    def read_tokens(self, number):
        """Token ids of a sample: prompt and answer, neither with <bos> or <eos>."""
        sample = self.samples[number]
        begin = int(sample["offset"])
        middle = begin + int(sample["prompt"])
        tokens = self.tokens[begin:middle + int(sample["answer"])]
        if sample_checksum(sample, tokens) != sample["checksum"]:
            raise UserError(f"{self.folder}/tokens.bin: sample {number} is damaged; {self.mend}")
        if tokens.size and tokens.max() >= self.manifest.get("vocab_size", np.inf):  # no model has those
            raise UserError(f"{self.folder}/tokens.bin: sample {number} has tokens past the vocabulary; "
                            f"{self.mend}")
        return tokens[:middle - begin], tokens[middle - begin:]

    def read_image(self, number):
        """Pixels of an image: (H, W, 3) uint8. Raises UserError where it is not what was stored."""
        entry = self.image_index[number]
        begin = int(entry["offset"])
        content = self.pixels[begin:begin + int(entry["length"])].tobytes()
        if zlib.crc32(content) != entry["checksum"]:
            raise UserError(f"{self.folder}/images.bin: image {number} is damaged; {self.mend}")
        try:
            return open_stored(content, self.manifest["image"]["size"])
        except Exception as error:  # a checksum proves no good will, and each decoder fails in its own way
            raise UserError(f"{self.folder}/images.bin: image {number} is none that prepare/ stores "
                            f"({error}); {self.mend}") from None

    def describe(self):
        """What a run that reads this shard records of it, to know it again: a dict."""
        return {"checksum": self.manifest["checksum"], "samples": len(self), "images": len(self.image_index),
                "images_sha256": self.manifest["images_sha256"], "image": self.manifest["image"]}

    def read_leaks(self):
        """
        What is to be done about the samples whose image a split to test on has, too, "drop" or "keep",
        and their numbers. Of a training split its own validation split counts as one, see splits_to_guard.

        Raises UserError where the shard was not compared with each of those splits beside it.
        """
        leaks = read_manifest(self.folder, "leaks.json")
        if leaks is None or leaks.get("train") != self.manifest["checksum"]:
            raise UserError(f"{self.folder}: not compared with the test splits; {self.again}")
        for name, manifest in splits_to_guard(self.folder).items():
            if manifest["checksum"] != leaks["tests"].get(name):
                again = self.again
                if manifest.get("shard_version") != SHARD_VERSION:  # prepare/leaks.py passes it by till then
                    again = how_to_prepare(self.folder.parent.parent / name.partition('/')[0])
                raise UserError(f"{self.folder}: not compared with {name}; {again}")
        found = [numbers for test in leaks["found"].values() for numbers in test.values()]
        return leaks["leaks"], np.unique(np.array(sum(found, []), dtype=np.int64))

    def read_leaked_images(self, test):
        """
        Numbers of the images of another split, a Shard, that this one has, too: by their pixels, look or
        id. A known source says nothing about a single image of the other.

        Raises UserError where the two were not compared as they are now.
        """
        leaks = read_manifest(self.folder, "leaks.json")
        name = f"{test.folder.parent.name}/{test.folder.name}"
        checksums = (self.manifest["checksum"], test.manifest["checksum"])
        if (leaks is None or "test_images" not in leaks
                or (leaks["train"], leaks["tests"].get(name)) != checksums):
            raise UserError(f"{self.folder}: not compared with {test.folder}; {self.again}")
        return np.array(leaks["test_images"].get(name, []), dtype=np.int64)

    def require_questions(self):
        """Raise UserError where there is nothing to ask: labels alone, or nothing that could be used."""
        name = self.folder.parent.name
        if self.manifest["kind"] == "classification":
            raise UserError(f"--data: {name} has labels but no questions")
        if not len(self):
            raise UserError(f"{self.folder}: no question of it could be used; its manifest.json counts "
                            "why each was skipped")

    def require_image_size(self, size):
        """Raise UserError where the shard's images are not of this size, in pixels."""
        found = self.manifest["image"]["size"]
        if len(self.image_index) and found != size:
            flag = "" if "path" in self.manifest else f" --image_size={size}"  # train_cls.py needs none
            raise UserError(f"{self.folder}: images of {found} pixels, but the model reads {size}; "
                            f"{self.again[:-1]}{flag}`")

    def read_records(self):
        """The words of every sample, as a list of dicts in the order of samples.bin."""
        return [json.loads(line) for line in self.read_verified("records.jsonl").splitlines()]


# ----------------------------------------------------------------------------- the packed loader

@dataclass
class Batch:
    """A micro-batch of R packed rows of T tokens. The arrays are numpy here, tensors in model.py."""
    tokens: np.ndarray  # (R, T) int64; 0 where an image token or padding stands
    positions: np.ndarray  # (R, T) int64, rotary
    group: np.ndarray  # (R, T) int32, number of the group in its row; -1 in padding
    question: np.ndarray  # (R, T) int32; 0 in the part that a group's questions share, then 1, 2, ...
    images: np.ndarray  # (I, H, W, 3) uint8
    image_at: np.ndarray  # (I,) int64, index into the R * T tokens of an image's first token
    answer_at: np.ndarray  # (M,) int64, index into the R * T tokens of what predicts a target
    targets: np.ndarray  # (M,) int64, the token to predict
    key: np.ndarray  # (R, T) int32, random; a sample's own in its question, the group's first in what is shared


@dataclass
class Step:
    """All that one optimiser step needs."""
    number: int
    batches: list  # of Batch, those of this rank
    supervised: int  # answer and <eos> tokens of all ranks: what the loss is a mean over
    padded: float  # share of the rows' tokens that is padding
    samples: list = field(default_factory=list)  # (shard, sample number) of each


def random_keys(seed, purpose, lap, count):
    """uint64 random keys, a pure function of the arguments; NumPy promises this stream for good."""
    return np.random.Philox(key=[seed, purpose], counter=[0, 0, 0, lap]).random_raw(count)


class Mixture:
    """
    Samples of several shards in a training order that is a pure function of (seed, step).

    shards: list of Shard; weights: how often each is seen in an epoch (2: twice; 0.5: half of it,
    the other half in the next epoch). questions_per_image: how many questions of a step may share
    one copy of their image; 1 is plain sampling, 0 sets no limit. held_out: about how many samples
    to keep for validation, whole images at a time. leaks: for each shard what Shard.read_leaks says;
    what is to be dropped is left out. So are samples whose answer does not fit into a row, counted
    in `too_long`; those whose prompt is cut are counted in `cut`. Of several processes each packs its
    own part of a step, by its rank; which samples a step has does not depend on how many there are.
    """

    def __init__(self, shards, image_tokens, batch_size=64, weights=None, questions_per_image=1,
                 row_length=1024, rows_per_batch=1, seed=0, held_out=0, leaks=None, rank=0, ranks=1):
        self.shards, self.image_tokens, self.seed, self.leaks = shards, image_tokens, seed, leaks
        self.batch_size, self.questions_per_image = batch_size, questions_per_image
        self.row_length, self.rows_per_batch = row_length, rows_per_batch
        self.rank, self.ranks = rank, ranks
        self.starts = np.cumsum([0] + [len(shard) for shard in shards])  # number of each first sample
        self.train, self.held_out, self.group_ids = [], [], []
        self.too_long = self.cut = 0
        for index, shard in enumerate(shards):
            samples = shard.samples
            room = self.room(shard, row_length)
            usable = room >= 1
            if leaks and leaks[index][0] == "drop":
                usable[leaks[index][1]] = False
            self.too_long += int((room < 1).sum())
            self.cut += int(((room >= 1) & (samples["prompt"] > room)).sum())
            # A text-only sample is a group of its own: numbered after the images.
            images = len(shard.image_index)
            groups = np.where(samples["image"] >= 0, samples["image"],
                              images + np.arange(len(samples)))
            keys = random_keys(seed, 2 * index, 0, images + len(samples))[groups]
            count = min(round(held_out * len(samples) / self.starts[-1]), int(usable.sum()))
            kept_back = keys <= np.partition(keys[usable], count - 1)[count - 1] if count else keys < 0
            self.train.append(np.flatnonzero(usable & ~kept_back))
            self.held_out.append(np.flatnonzero(usable & kept_back))
            self.group_ids.append(groups)
        self.counts = [round(weight * len(train))
                       for weight, train in zip(weights or [1] * len(shards), self.train)]
        self.samples_per_epoch = sum(self.counts)
        if self.samples_per_epoch < 1:
            raise UserError("no sample to train on: all are held out, weighted 0 or too long")
        self.epoch_order = functools.lru_cache(maxsize=2)(self.epoch_order)

    def room(self, shard, row_length):
        """(n,) tokens of a row that the image and the answer of each sample leave to its prompt."""
        prefix = np.where(shard.samples["image"] >= 0, 1 + self.image_tokens, 1)
        return row_length - prefix - shard.samples["answer"].astype(np.int64)

    def fits_alike(self, row_length):
        """Whether rows of another length leave out the same samples, and all prompts as long as they are."""
        def kept(shard, row_length):  # tokens of each prompt; -1 where the sample is left out
            room = self.room(shard, row_length)
            return np.where(room < 1, -1, np.minimum(shard.samples["prompt"], room))

        return all((kept(shard, row_length) == kept(shard, self.row_length)).all() for shard in self.shards)

    def has_images(self):
        return any((shard.samples["image"][train] >= 0).any() for shard, train in zip(self.shards, self.train))

    def epoch_order(self, epoch):
        """
        One epoch's samples in training order and the group that each belongs to: two (n,) int64.

        Each dataset walks through permutations of its own, so that a weight of 0.5 sees every
        sample once in two epochs. Then groups, not samples, are shuffled over all datasets.
        """
        samples, groups, group_count = [], [], 0
        for index, (train, count) in enumerate(zip(self.train, self.counts)):
            begin, end = epoch * count, (epoch + 1) * count
            picked = [train[:0]]
            for lap in range(begin // max(len(train), 1), -(-end // max(len(train), 1))):
                order = np.argsort(random_keys(self.seed, 2 * index + 1, lap, len(train)))
                picked.append(train[order][max(begin - lap * len(train), 0):end - lap * len(train)])
            picked = np.concatenate(picked)
            # Sort by image, keeping the random order within one, and cut into groups. A sample that comes
            # again, by a weight above 1, is in another group: never twice behind one copy of its image.
            images = self.group_ids[index][picked]
            images = images + count_before(picked) * (images.max(initial=0) + 1)
            by_image = np.argsort(images, kind="stable")
            rank = count_before(images)[by_image]
            limit = self.questions_per_image or len(picked) + 1
            samples.append(picked[by_image] + self.starts[index])
            groups.append(np.cumsum(rank % limit == 0) - 1 + group_count)
            group_count += int((rank % limit == 0).sum())
        samples, groups = np.concatenate(samples), np.concatenate(groups)
        keys = random_keys(self.seed, 2 * len(self.shards) + 1, epoch, group_count)
        order = np.argsort(keys[groups], kind="stable")
        return samples[order], groups[order]

    def step(self, number):
        """The Step of that number: exactly batch_size samples, the same on every machine."""
        begin, end = number * self.batch_size, (number + 1) * self.batch_size
        samples, groups = [], []
        for epoch in range(begin // self.samples_per_epoch, -(-end // self.samples_per_epoch)):
            start = epoch * self.samples_per_epoch
            order, group = self.epoch_order(epoch)
            window = slice(max(begin - start, 0), end - start)
            samples += order[window].tolist()
            groups += [(epoch, int(g)) for g in group[window]]
        return self.pack(number, samples, groups)

    def held_out_steps(self):
        """Steps over the held-out samples, each once, in a fixed order; all questions share."""
        samples = np.concatenate([kept + start for kept, start in zip(self.held_out, self.starts)])
        images = np.concatenate([ids[kept] + start for ids, kept, start in
                                 zip(self.group_ids, self.held_out, 2 * self.starts)])
        order = np.argsort(images, kind="stable")
        for number, begin in enumerate(range(0, len(samples), self.batch_size)):
            window = order[begin:begin + self.batch_size]
            yield self.pack(number, samples[window].tolist(), images[window].tolist())

    def pack(self, number, samples, groups):
        """Read the samples, put this rank's groups into rows, largest first, and cut into micro-batches."""
        pieces, names, first = {}, [], {}  # (group, copy) -> (shard, image, [(prompt, answer, key), ...], key)
        keys = random_keys(self.seed, 2 * len(self.shards) + 2, number, len(samples)) >> np.uint64(33)
        for sample, group, key in zip(samples, groups, keys.tolist()):
            index = int(np.searchsorted(self.starts, sample, side="right")) - 1
            shard, local = self.shards[index], sample - int(self.starts[index])
            names.append((shard, local))
            prompt, answer = shard.read_tokens(local)
            image = int(shard.samples[local]["image"])
            prefix = 1 + self.image_tokens if image >= 0 else 1
            prompt = prompt[-(self.row_length - prefix - len(answer)):]  # cut at the front
            length = len(prompt) + len(answer)
            copy = 0  # where a row cannot hold a whole group, its image is repeated
            while sum(map(len_of, pieces.get((group, copy), (0, 0, []))[2])) + prefix + length \
                    > self.row_length:
                copy += 1
            piece = pieces.setdefault((group, copy), (shard, image, [], first.setdefault(group, key)))
            piece[2].append((prompt, answer, key))

        lengths = {key: sum(map(len_of, questions)) + (1 + self.image_tokens if image >= 0 else 1)
                   for key, (_, image, questions, _) in pieces.items()}
        rows, free = [], []  # first fit, decreasing
        loads = [0] * self.ranks  # tokens of each rank: the next group goes to the one with fewest
        for key in sorted(pieces, key=lambda key: -lengths[key]):
            rank = loads.index(min(loads))
            loads[rank] += lengths[key]
            if rank != self.rank:
                continue
            row = next((r for r, space in enumerate(free) if space >= lengths[key]), len(rows))
            if row == len(rows):
                rows.append([])
                free.append(self.row_length)
            rows[row].append(pieces[key])
            free[row] -= lengths[key]
        batches = []
        for first in range(0, len(rows), self.rows_per_batch):
            some = slice(first, first + self.rows_per_batch)
            batches.append(self.fill(rows[some], self.row_length - min(free[some])))
        supervised = sum(len(answer) + 1 for piece in pieces.values() for _, answer, _ in piece[2])
        padding = sum(int((batch.group < 0).sum()) for batch in batches)
        size = sum(batch.group.size for batch in batches)
        return Step(number, batches, supervised, padding / max(size, 1), names)

    def fill(self, rows, longest):
        """Write packed rows, of `longest` tokens at most, out as the arrays of a Batch."""
        R, T = len(rows), min(-(-longest // 128) * 128, self.row_length)  # one of few shapes
        tokens, positions = np.zeros((R, T), np.int64), np.zeros((R, T), np.int64)
        group, question = np.full((R, T), -1, np.int32), np.zeros((R, T), np.int32)
        keys = np.zeros((R, T), np.int32)
        images, image_at, answer_at, targets = [], [], [], []
        for r, row in enumerate(rows):
            at = 0
            for g, (shard, image, questions, key) in enumerate(row):
                begin, prefix = at, 1
                tokens[r, at] = BOS
                if image >= 0:
                    images.append(shard.read_image(image))
                    image_at.append(r * T + at + 1)
                    prefix += self.image_tokens
                positions[r, at:at + prefix] = np.arange(prefix)
                keys[r, at:at + prefix] = key
                at += prefix
                for q, (prompt, answer, key) in enumerate(questions, start=1):
                    end = at + len(prompt) + len(answer)
                    tokens[r, at:end] = np.concatenate([prompt, answer])
                    positions[r, at:end] = np.arange(prefix, prefix + end - at)
                    question[r, at:end] = q
                    keys[r, at:end] = key
                    answer_at.extend(range(r * T + end - len(answer) - 1, r * T + end))
                    targets.extend([*answer, EOS])
                    at = end
                group[r, begin:at] = g
        images = np.stack(images) if images else np.zeros((0, 0, 0, 3), np.uint8)
        return Batch(tokens, positions, group, question, images, np.array(image_at, np.int64),
                     np.array(answer_at, np.int64), np.array(targets, np.int64), keys)

    def steps(self, first, last, workers):
        """Yield the Steps first..last-1, read and decoded by `workers` threads ahead of time."""
        with ThreadPoolExecutor(workers) as pool:  # Pillow and zlib let go of the interpreter lock
            ahead = deque()
            for number in range(first, last):
                self.epoch_order(number * self.batch_size // self.samples_per_epoch)  # not by each thread
                ahead.append(pool.submit(self.step, number))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()


def count_before(values):
    """How often each of (n,) int64 has come before it, (n,) int64."""
    order = np.argsort(values, kind="stable")
    number = np.arange(len(values))
    first = np.diff(values[order], prepend=-1) != 0
    count = np.empty_like(number)
    count[order] = number - np.maximum.accumulate(np.where(first, number, 0))
    return count


def len_of(question):
    """Tokens of a (prompt, answer, key)."""
    return len(question[0]) + len(question[1])


def open_mixture(names, shards_dir, split, **settings):
    """
    The Mixture of "path_vqa,vqa_rad:2": prepared datasets by name, each with an optional weight.

    Raises UserError when a dataset is not prepared or the datasets' tokenizers differ.
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
        leaks.append(shards[-1].read_leaks())
    tokenizers = {shard.manifest["tokenizer_sha256"] for shard in shards}
    if len(tokenizers) > 1:
        raise UserError(f"--data: {names} were prepared with different tokenizers; prepare them "
                        "with one: `python prepare/all.py --tokenizer=...`")
    return Mixture(shards, weights=weights, leaks=leaks, **settings)
