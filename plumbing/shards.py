"""
The stored form of the data, as prepare/ writes it and the loader reads it.

A shard is one split of one dataset, a folder of files that are mapped, never loaded whole:

    tokens.bin        the tokens of all samples, end to end (uint16 or uint32); the type's largest number
                      is the place of an image
    samples.bin       one SAMPLE record a sample
    parts.bin         of each sample the numbers of its images, then begin and end of each span (int32)
    images.bin        the encoded images, end to end, each stored once however many ask about it
    images.idx        one IMAGE record an image
    fingerprints.bin  one record an image, by which prepare/leaks.py finds it again elsewhere
    records.jsonl     the words: id, question, answer, type, image name, one line a sample; and where
                      there are any: context, parts, turns, labels, references, group, boxes, choices,
                      reasoning
    manifest.json     written last: counts, settings, licence, and the size and hash of each file
    leaks.json        beside a training or validation split, see plumbing/leaks.py

Letters: L tokens of a sample, an image being one; H, W pixels.
"""

import hashlib
import json
import mmap
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plumbing.files import hash_file, read_manifest
from plumbing.flags import UserError
from plumbing.leaks import how_to_prepare
from plumbing.order import whole_type
from plumbing.pixels import open_stored

PROMPT_VERSION = 2  # raised when a template (data.py, zoo/chatml.py) changes: older shards are refused
SHARD_VERSION = 6
SMALL = 1 << 24  # bytes of an index file that is read, not mapped
PIECE = 1 << 18  # samples that are gone through at a time, so that memory does not grow with a shard
SAMPLE = np.dtype([
    ("offset", "<u8"), ("length", "<u4"),  # of its tokens in tokens.bin, an image being one
    ("parts", "<u8"), ("images", "<u2"), ("spans", "<u2"),  # in parts.bin: its first number there, and counts
    ("image", "<i4"),  # the number of its first image; -1: none
    ("head", "<u4"), ("prompt", "<u4"),  # tokens[head:prompt] is the text behind the last image that a person
    # has written before the first answer: where a long prompt is cut, from its front
    ("prefix", "<u4"),  # the first sample of the shard with the same images and texts before the question
    ("group", "<u4"),  # the number of its group, such as a patient, from 1; 0: none
    ("words", "<u8"),  # hash_words of its question and answer
    ("checksum", "<u4")])
IMAGE = np.dtype([("offset", "<u8"), ("length", "<u4"), ("checksum", "<u4"),  # bytes
                  ("height", "<u2"), ("width", "<u2")])  # pixels


def hash_words(question, answer):
    """64 bits that tell whether a question and its answer occur elsewhere, case and spaces aside."""
    words = "\0".join(" ".join(text.lower().split()) for text in (question, answer))
    return int.from_bytes(hashlib.sha256(words.encode("utf-8", "replace")).digest()[:8], "little")


def sample_checksum(sample, tokens, parts):
    """CRC-32 over a SAMPLE record, but for its last field, its tokens and its parts."""
    fields = sample.tobytes()[:-SAMPLE["checksum"].itemsize]
    return zlib.crc32(np.ascontiguousarray(parts), zlib.crc32(np.ascontiguousarray(tokens), zlib.crc32(fields)))


@dataclass
class Sample:
    """The tokens of a sample and what is supervised of them."""
    tokens: np.ndarray  # (L,) int64, <bos> first; the image of number n in its shard is -1 - n
    spans: np.ndarray  # (turns, 2) int64, begin and end of each answer, its <eos> included
    head: int  # where a prompt that is too long is cut: count tokens from there on, see SAMPLE
    key: int = 0  # random, by which dropout tells samples apart
    weight: float = 1.0  # of its cross-entropy in the loss

    def prompt(self):
        """The tokens before its last answer: what a model is asked."""
        return self.tokens[:self.spans[-1, 0]]

    def cut(self, count):
        """The sample without `count` tokens at the front of its prompt's text."""
        if not count:
            return self
        tokens = np.delete(self.tokens, slice(self.head, self.head + count))
        return Sample(tokens, self.spans - count, self.head, self.key, self.weight)


class Shard:
    """
    One prepared split, memory-mapped. Index files are verified when it is opened, samples and
    images as they are read.

    Raises UserError when the shard is absent, cut short, altered, or written by another version.
    """

    mapped = ()  # mmaps of its files; a shard in memory, such as tests make, has none

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
        recorded = {name: self.manifest.get(name, here) for name, here in place.items()}
        if recorded != place:  # such as train in the place of test
            raise UserError(f"{self.folder}: holds {'/'.join(recorded.values())}; move it back, or {again}")
        for name, expected in self.manifest["files"].items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != expected["bytes"]:
                raise UserError(f"{path}: missing, or not its {expected['bytes']} bytes; {again}")
        self.again, self.mend = again, f"delete {self.folder.parent} and {again}"
        self.mapped = []
        self.samples, self.parts, self.image_index = (self.map(name, dtype, verify=True) for name, dtype in (
            ("samples.bin", SAMPLE), ("parts.bin", "<i4"), ("images.idx", IMAGE)))
        self.tokens = self.map("tokens.bin", self.manifest["token_dtype"])
        self.place_of_image = np.iinfo(self.tokens.dtype).max
        self.pixels = self.map("images.bin", np.uint8)

    def __len__(self):
        return len(self.samples)

    def map(self, name, dtype, verify=False):
        """
        A file as a plain array, of which a slice takes microseconds less than of a memmap's. One that is to be
        verified, and is small, is read: each mapped file stays open, and systems allow few.
        """
        path = self.folder / name
        if verify and path.stat().st_size <= SMALL:
            return np.frombuffer(self.read_verified(name), dtype)
        if verify:
            self.require_hash(name, hash_file(path))
        if not path.stat().st_size:
            return np.zeros(0, dtype)
        with open(path, "rb") as file:
            self.mapped.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return np.frombuffer(self.mapped[-1], dtype)

    def release(self):
        """Let go of the pages read so far: they count as this process's memory, but stay in the kernel's if it can."""
        for file in self.mapped if hasattr(mmap, "MADV_DONTNEED") else ():  # not on Windows
            file.madvise(mmap.MADV_DONTNEED)

    def pieces(self):
        """Slices of its samples, end to end; what was read in one is let go of before the next."""
        for begin in range(0, len(self), PIECE):
            yield slice(begin, min(begin + PIECE, len(self)))
            self.release()

    def column(self, name):
        """(n,) of one field of the samples, in memory of its own."""
        values = np.empty(len(self), SAMPLE[name])
        for piece in self.pieces():
            values[piece] = self.samples[name][piece]
        return values

    def require_hash(self, name, sha256):
        if sha256 != self.manifest["files"][name]["sha256"]:
            raise UserError(f"{self.folder / name}: damaged; {self.mend}")

    def read_verified(self, name):
        content = (self.folder / name).read_bytes()
        self.require_hash(name, hashlib.sha256(content).hexdigest())
        return content

    def read_sample(self, number):
        """The Sample of that number. Raises UserError where it is not what was stored."""
        row = self.samples[number]
        begin, first, images = int(row["offset"]), int(row["parts"]), int(row["images"])
        stored = self.tokens[begin:begin + int(row["length"])]
        parts = self.parts[first:first + images + 2 * int(row["spans"])]
        if sample_checksum(row, stored, parts) != row["checksum"]:
            raise UserError(f"{self.folder}/tokens.bin: sample {number} is damaged; {self.mend}")
        tokens, parts = stored.astype(np.int64), parts.astype(np.int64)
        if images:
            tokens[tokens == self.place_of_image] = -1 - parts[:images]
        if tokens.max(initial=0) >= self.manifest.get("vocab_size", np.inf):  # no model has those
            raise UserError(f"{self.folder}/tokens.bin: sample {number} has tokens past the vocabulary; "
                            f"{self.mend}")
        return Sample(tokens, parts[images:].reshape(-1, 2), int(row["head"]))

    def read_image(self, number):
        """Pixels of an image: (H, W, 3) uint8. Raises UserError where it is not what was stored."""
        entry = self.image_index[number]
        begin = int(entry["offset"])
        content = self.pixels[begin:begin + int(entry["length"])].tobytes()
        if zlib.crc32(content) != entry["checksum"]:
            raise UserError(f"{self.folder}/images.bin: image {number} is damaged; {self.mend}")
        try:
            return open_stored(content, int(entry["height"]), int(entry["width"]))
        except Exception as error:  # a checksum proves no good will, and each decoder fails in its own way
            raise UserError(f"{self.folder}/images.bin: image {number} is none that prepare/ stores "
                            f"({error}); {self.mend}") from None

    def image_pairs(self, piece=slice(None)):
        """
        Which sample has which image: numbers of samples and of images, both (pairs,) int64, in order. piece: of
        these samples alone, numbered from the first of them.
        """
        samples = self.samples[piece]
        counts = samples["images"].astype(np.int64)
        sample = np.repeat(np.arange(len(samples)), counts)
        within = np.arange(len(sample)) - np.repeat(np.cumsum(counts) - counts, counts)
        return sample, self.parts[samples["parts"][sample].astype(np.int64) + within].astype(np.int64)

    def lengths(self, image_tokens):
        """(n,) int64, the tokens of each sample before the model. image_tokens: (images,) of each image."""
        lengths = np.empty(len(self), np.int64)
        for piece in self.pieces():
            samples, (sample, image) = self.samples[piece], self.image_pairs(piece)
            lengths[piece] = np.bincount(sample, image_tokens[image], len(samples))
            lengths[piece] += samples["length"].astype(np.int64) - samples["images"] - 1  # the last is no input
        return lengths

    def connect(self):
        """(n,) whole numbers, the same for samples that share an image, a prefix or a group, at any remove."""
        n, images = len(self), len(self.image_index)
        label = np.arange(images + n + int(self.column("group").max(initial=0)), dtype=whole_type(images + 2 * n))
        least, smaller = np.empty(n, label.dtype), True
        while smaller:  # each takes the least label of what it is connected with
            smaller = False
            for piece in self.pieces():
                sample, image = self.image_pairs(piece)
                samples = self.samples[piece]
                grouped = np.flatnonzero(samples["group"])
                sample = np.concatenate([sample, np.arange(len(samples)), grouped])
                shared = np.concatenate([image, images + samples["prefix"].astype(np.int64),
                                         images + n - 1 + samples["group"][grouped].astype(np.int64)])
                least[piece] = len(label)
                np.minimum.at(least[piece], sample, label[shared])
                smaller |= bool((least[piece][sample] < label[shared]).any())
                np.minimum.at(label, shared, least[piece][sample])
        return least

    def describe(self):
        """What a run that reads this shard records of it, to know it again: a dict."""
        return {"checksum": self.manifest["checksum"], "samples": len(self), "images": len(self.image_index),
                "images_sha256": self.manifest["images_sha256"], "image": self.manifest["image"]}

    def require_questions(self):
        """Raise UserError where there is nothing to ask: labels alone, or nothing that could be used."""
        name = self.folder.parent.name
        if self.manifest["kind"] == "classification":
            raise UserError(f"--data: {name} has labels but no questions")
        if not len(self):
            raise UserError(f"{self.folder}: no question of it could be used; its manifest.json counts "
                            "why each was skipped")

    def require_image_size(self, size):
        """Raise UserError where the shard's images are not squares of this size, in pixels."""
        sides = {*self.image_index["height"].tolist(), *self.image_index["width"].tolist()}
        if sides - {size}:
            stored = f"{max(sides)} pixels" if len(sides) == 1 else "different shapes"
            flag = "" if "path" in self.manifest else f" --image_size={size}"  # train_cls.py needs none
            flag += " --resize=squash" if len(sides) > 1 else ""
            raise UserError(f"{self.folder}: images of {stored}, but the model reads {size}; "
                            f"{self.again[:-1]}{flag}`")

    def read_records(self):
        """The words of every sample, as a list of dicts in the order of samples.bin."""
        return [json.loads(line) for line in self.read_verified("records.jsonl").splitlines()]
