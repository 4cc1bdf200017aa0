"""
The writer of shards, whose format plumbing/shards.py describes.

A dataset is written into <shards_dir>/.<name>.partial and renamed when all of it is on the disk,
so that a run killed at any moment leaves the dataset as it was, absent, or whole. Images are
decoded, resized and encoded by worker processes and written in the order of the records: the
files are the same, byte for byte, whatever the number of workers.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import shutil
import threading
import zlib
from array import array
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace

import numpy as np
from PIL import Image, ImageChops
from tqdm import tqdm

from data import View
from formats.frames import ScanSettings, decode_picture, picture_key
from plumbing.files import TOKENIZERS, differences, hash_file, lock, manifest_checksum, read_manifest
from plumbing.flags import UserError
from plumbing.own import clean
from plumbing.pixels import (DEEP_PIXELS, SMART_LEAST, Unreadable, enough_pixels, most_tiles, one_channel,
                             resize_image)
from plumbing.shards import IMAGE, SAMPLE, hash_words, sample_checksum
from prepare.augment import altered
from prepare.download import hub_revision
from prepare.looks import fingerprint
from tasks import boxes, reasoning
from tasks.choices import right_of
from zoo.chatml import open_tokenizer

FILES = ("tokens.bin", "samples.bin", "parts.bin", "images.bin", "images.idx", "fingerprints.bin", "records.jsonl")
RECORDS_AHEAD = 4096  # read but not written yet; bounds memory where many share an image
IMAGES_AHEAD = 4  # images under way, per worker


@dataclass(frozen=True)
class ImageSettings:
    """How images are stored; what size says depends on resize, see resize_image."""
    size: int
    resize: str
    codec: str
    quality: int  # of JPEG, 1 to 100; 0 for PNG, which is lossless
    deep: str = DEEP_PIXELS  # what becomes of more than 8 bits, in words, so that another rule is noticed
    window: str = ""  # of scans, as the flags say; none: there are no scans among them
    slices: str = ""
    tiles: str = ""

    def facts(self):
        """As a dict for manifests, without what does not apply."""
        return {name: value for name, value in asdict(self).items() if value or not hasattr(ScanSettings, name)}


def encode_image(content, settings):
    """
    Decode, resize and encode one image file, or a Frame of one, in a worker process.

    Returns the encoded bytes, the image's (height, width), their pixel error, which is the mean absolute
    difference in grey levels (0 to 255) that the codec makes, and the image's fingerprint; where it cannot
    be used, the reason alone, in words.
    """
    try:
        source = decode_picture(content, enough_pixels(settings.size, settings.resize))
        fewer = one_channel(source)
        image = resize_image(fewer, settings.size, settings.resize).convert("RGB")
        mark = fingerprint(source, fewer)
    except Unreadable as error:
        return str(error)
    except MemoryError:
        return "too large for the memory"
    image.info.clear()  # Pillow would write a comment or profile into the file, which may name a patient
    stream = io.BytesIO()
    if settings.codec == "png":
        image.save(stream, "PNG")
    else:  # colour at full resolution: halving it costs stains more than a lower quality does
        image.save(stream, "JPEG", quality=settings.quality, subsampling="4:4:4")
    altered_by = ImageChops.difference(Image.open(stream, formats=("JPEG", "PNG")), image)
    pixel_error = float(np.asarray(altered_by).mean())
    return stream.getvalue(), (image.height, image.width), pixel_error, mark


def end_with_parent():
    """Start of a worker: without this it would wait for work for ever once its parent is killed."""
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def clean_record(record, box_format="medmo"):
    """A Record with all of its texts clean; its boxes in whole thousandths, its answer written from them."""
    parts = tuple(clean(part) if isinstance(part, str) else replace(part, role=clean(part.role))
                  for part in record.parts)
    units = record.boxes and {clean(label): boxes.to_units(some) for label, some in record.boxes.items()}
    choices = tuple(clean(choice) for choice in record.choices)
    answer = record.answer if units is None else boxes.write(units, box_format)
    return replace(record, question=clean(record.question), answer=clean(answer), reasoning=clean(record.reasoning),
                   context=clean(record.context), parts=parts, boxes=units, choices=choices,
                   turns=tuple((clean(question), clean(answer)) for question, answer in record.turns))


def with_reasoning(record, place):
    """A Record as a template writes it: its reasoning where prepare/all.py --reasoning puts it, or left out."""
    return record if place == "analysis" else replace(
        record, reasoning="", answer=reasoning.write(record.answer, record.reasoning, place))


def words_of(record, reasoning="none"):
    """
    A clean Record's line in records.jsonl, as a dict; what it has none of is left out. reasoning: where that stands in
    what is trained on, "before" or "after" the answer, in its channel "analysis", or "none".
    """
    words = {"id": record.id, "question": record.question, "answer": record.answer, "type": record.type,
             "image": record.image_name or next((view.name for view in record.views()), "")}
    references = list(dict.fromkeys(filter(None, map(clean, record.references))))
    more = {"context": record.context, "turns": [list(turn) for turn in record.turns],
            "parts": [{"image": part.name, "role": part.role} if isinstance(part, View) else part
                      for part in record.parts],
            "references": references if references != [record.answer] else [], "group": record.group,
            "study": record.study, "boxes": record.boxes, "choices": list(record.choices),
            "reasoning": reasoning != "none" and record.reasoning and {"place": reasoning, "text": record.reasoning}}
    words |= {name: value for name, value in more.items() if value}
    return words | ({"labels": list(record.labels)} if record.labels is not None else {})


class HashedFile:
    """A new file that knows its size and hash, and is on the disk once it is closed."""

    def __init__(self, path):
        self.file, self.hash, self.bytes = open(path, "xb"), hashlib.sha256(), 0

    def write(self, content):
        self.file.write(content)
        self.hash.update(content)
        self.bytes += len(content)

    def close(self):
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {"bytes": self.bytes, "sha256": self.hash.hexdigest()}


@dataclass
class Waiting:
    """A checked record without its images, which are being encoded."""
    words: dict  # its line in records.jsonl
    tokens: list
    spans: list
    cut: tuple  # begin and end of the text that may be cut
    texts: list  # its context, and what stands before and between its images
    images: list  # sha256 of each
    futures: dict  # sha256 -> future of encode_image, of those that no earlier record has


class SplitWriter:
    """Writes one split, a record at a time. `encode` submits an image file and gives a future."""

    def __init__(self, folder, dataset, tokenizer, encode, images_ahead, box_format=None, reasoning="none"):
        folder.mkdir()
        self.box_format, self.reasoning = box_format, reasoning
        self.folder, self.tokenizer = folder, tokenizer
        self.kind, self.asks, self.classes = dataset.kind, dataset.asks, dataset.classes
        self.multi_label = dataset.multi_label
        self.encode, self.images_ahead = encode, images_ahead
        self.files = {name: HashedFile(folder / name) for name in FILES}
        self.vocab_size = tokenizer.vocab_size if dataset.asks else 0
        self.token_dtype = np.dtype(np.uint16 if self.vocab_size < 65536 else np.uint32)  # the last: an image
        self.samples = self.tokens = self.parts = self.images = self.pixel_error = 0
        self.skipped, self.first_skipped = Counter(), {}  # reason -> samples; -> the first one's name
        self.image_numbers = {}  # sha256 of a source image -> its place in images.idx, or why it has none
        self.first_alone = array("q")  # of each image the first sample that has nothing else to share, or -1
        self.prefixes = {}  # hash of all else that samples can share -> the first that has it
        self.groups = {}  # name -> number, from 1
        self.images_hash = hashlib.sha256()  # over those sha256, in the order of images.idx
        self.waiting, self.images_waiting = deque(), 0

    def add(self, record):
        """Check and tokenize a record and send its images to be encoded, those that are new."""
        record = clean_record(record, self.box_format)
        written = with_reasoning(record, self.reasoning)
        tokens, spans, cut = self.tokenizer.write(written) if self.asks else ([], [], (0, 0))
        if reason := self.find_fault(record, spans):
            return self.skip(reason, words_of(record, self.reasoning))
        assert max(tokens, default=-1) < self.vocab_size, record.id
        texts = [record.context, *(part if isinstance(part, str) else part.role for part in record.parts)]
        images, futures = [], {}
        for view in record.views():
            images.append(picture_key(view.image))
            if images[-1] not in self.image_numbers:
                self.image_numbers[images[-1]] = None
                futures[images[-1]] = self.encode(view.image)
        self.waiting.append(Waiting(words_of(record, self.reasoning), tokens, spans, cut, texts, images, futures))
        self.images_waiting += len(futures)
        while len(self.waiting) > RECORDS_AHEAD or self.images_waiting > self.images_ahead:
            self.write_next()

    def find_fault(self, record, spans):
        """Why a clean record cannot be used, in words; "" where it can."""
        assert not isinstance(record.references, str), record.id  # one text is no tuple of texts
        assert not (record.parts and record.image), record.id  # the image would not be shown
        assert not (record.turns and (record.boxes or record.choices)), record.id  # of which answer is not known
        labels, views = set(record.labels or ()), record.views()
        questions, answers = zip((record.question, record.answer), *record.turns)
        imageless = self.kind == "text questions" and not record.image_name
        return ("empty question" if self.asks and not all(questions) else
                "empty answer" if self.asks and (
                    not all(answers) or any(end - begin == 1 for begin, end in spans)) else  # <eos> alone, of LLaMA's
                "no label" if record.labels is None and not self.asks else
                "no label" if record.labels == () and not self.multi_label else
                "several labels" if len(labels) > 1 and not self.multi_label else
                "image missing" if not views and not imageless or any(view.image is None for view in views) else
                "unknown label" if labels - set(self.classes) else
                "answer that is none of its choices" if record.choices and right_of(words_of(record)) < 0 else
                "boxes that cannot be read back" if record.boxes is not None and not boxes.same(
                    boxes.read(record.answer), record.boxes) else "")

    def skip(self, reason, words):
        """Count a sample that is left out, and keep the name of the first for each reason."""
        self.skipped[reason] += 1
        self.first_skipped.setdefault(reason, clean(str(words["image"] or words["id"])))

    def write_next(self):
        """Write the longest-waiting sample, after those of its images that it is the first to have."""
        waiting = self.waiting.popleft()
        self.images_waiting -= len(waiting.futures)
        for key, future in waiting.futures.items():
            self.write_image(key, future.result())
        images = [self.image_numbers[key] for key in waiting.images]
        unreadable = [image for image in images if isinstance(image, str)]
        if unreadable:  # its other images stay, for others may show them
            return self.skip(f"image unreadable: {unreadable[0]}", waiting.words)
        self.write_sample(waiting, images)

    def write_sample(self, waiting, images):
        """Write a sample that shows the stored images of these numbers."""
        words, tokens, spans = waiting.words, waiting.tokens, waiting.spans
        (head, prompt), place_of_image = waiting.cut, np.iinfo(self.token_dtype).max
        stored = np.array([place_of_image if token < 0 else token for token in tokens], self.token_dtype)
        parts = np.array([*images, *itertools.chain(*spans)], "<i4")
        turns = [(words["question"], words["answer"]), *words.get("turns", ())]
        group = self.groups.setdefault(words["group"], len(self.groups) + 1) if "group" in words else 0
        row = np.array((self.tokens, len(tokens), self.parts, len(images), len(spans), images[0] if images else -1,
                        head, prompt, self.first_alike(images, waiting.texts), group,
                        hash_words(*("\n".join(texts) for texts in zip(*turns))), 0), SAMPLE)
        row["checksum"] = sample_checksum(row, stored, parts)
        line = json.dumps(words, ensure_ascii=False) + "\n"
        for name, content in (("samples.bin", row.tobytes()), ("tokens.bin", stored.tobytes()),
                              ("parts.bin", parts.tobytes()),
                              ("records.jsonl", line.encode("utf-8", "replace"))):
            self.files[name].write(content)
        self.tokens += len(tokens)
        self.parts += len(parts)
        self.samples += 1

    def first_alike(self, images, texts):
        """Number of the first sample that has these images and texts; it may be the one to be written."""
        if not any(texts):
            if not images:  # nothing to share
                return self.samples
            if len(images) == 1:  # as most have: 8 bytes an image
                if self.first_alone[images[0]] < 0:
                    self.first_alone[images[0]] = self.samples
                return self.first_alone[images[0]]
        key = hashlib.sha256(json.dumps([images, texts]).encode()).digest()[:8]
        return self.prefixes.setdefault(key, self.samples)

    def write_image(self, key, encoded):
        if isinstance(encoded, str):
            self.image_numbers[key] = encoded
            return
        content, shape, pixel_error, mark = encoded
        entry = np.array([(self.files["images.bin"].bytes, len(content), zlib.crc32(content), *shape)], IMAGE)
        self.files["images.bin"].write(content)
        self.files["images.idx"].write(entry.tobytes())
        self.files["fingerprints.bin"].write(mark)
        self.image_numbers[key] = self.images
        self.first_alone.append(-1)
        self.images_hash.update(key)
        self.images += 1
        self.pixel_error += pixel_error

    def close(self, facts):
        """Write what is waiting, then the manifest: these facts and the writer's own."""
        while self.waiting:
            self.write_next()
        files = {name: file.close() for name, file in self.files.items()}
        count = max(self.images, 1)
        manifest = facts | {
            "split": self.folder.name, "kind": self.kind, "classes": list(self.classes),
            "multi_label": self.multi_label,
            "samples": self.samples, "images": self.images,
            "skipped": dict(sorted(self.skipped.items())),
            "first_skipped": dict(sorted(self.first_skipped.items())), "token_dtype": self.token_dtype.name,
            "vocab_size": self.vocab_size,
            "pixel_error": round(self.pixel_error / count, 4),
            "mean_image_bytes": round(files["images.bin"]["bytes"] / count),
            "images_sha256": self.images_hash.hexdigest(), "files": files}
        manifest["checksum"] = manifest_checksum(manifest)
        file = HashedFile(self.folder / "manifest.json")
        file.write((json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())
        file.close()


# ----------------------------------------------------------------------------- a whole dataset

@contextlib.contextmanager
def locked(target, doing):
    """
    Hold, while the block runs, the lock that lies beside a file or folder; another process that holds it is
    waited for. Where nothing can be written, as in what others have prepared, nothing is locked either.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(target.parent, os.W_OK):
        yield
        return
    with lock(target.with_name(f".{target.name}.lock"), doing, wait=True):
        yield


def leftovers(target):
    """Where a dataset is written, and where its last version is while the new one takes its place."""
    return [target.with_name(f".{target.name}.{end}") for end in ("partial", "old")]


def recover(target):
    """
    Remove what a killed run left beside a dataset's folder; keep the last whole version. To be called with
    its lock alone: what lies there is then no living process's.
    """
    partial, old = leftovers(target)
    if old.is_dir() and not target.exists():
        old.rename(target)  # killed between the two renames of write_dataset
    for folder in (partial, old):
        if folder.exists():
            shutil.rmtree(folder)
    return partial, old


def why_stale(target, facts, sources):
    """
    Why a dataset must be prepared, in a few words; "" where it is there, with these facts.

    sources: {name: path} of the files it would be read from; empty once they were deleted, which
    is no reason to prepare it again.
    """
    sizes = {name: path.stat().st_size for name, path in sources.items()}
    manifests = read_manifests(target)
    if not manifests:
        return "not prepared yet" if not target.exists() else "a manifest is missing or damaged"
    if "tokenizer_sha256" not in facts and (target / TOKENIZERS[1]).exists():
        return "it was prepared with a chat model's tokenizer"
    for split, manifest in manifests.items():
        for name, value in {"system": "", **facts}.items():
            before = manifest.get(name, "")
            if before != value and isinstance(value, dict):
                return ", ".join(differences(before or {}, value, name))
            if before != value:
                return f"{name} was {before or 'none'}, now {value or 'none'}"
        if sizes and sizes != {name: file["bytes"] for name, file in manifest["sources"].items()}:
            return "its raw files have changed"
        for name, expected in manifest["files"].items():
            path = target / split / name
            if not path.is_file() or path.stat().st_size != expected["bytes"]:
                return f"{split}/{name} is missing or cut short"
        wanted, tokenizers = manifest["tokenizer_sha256"], [target / name for name in TOKENIZERS]
        if wanted and wanted not in [hash_file(path) for path in tokenizers if path.is_file()]:
            return "its tokenizer is missing or altered"
    return ""


def read_manifests(target):
    """{split: manifest} of a dataset, or {} unless all of its splits have a valid one."""
    folders = sorted(path for path in target.glob("*") if path.is_dir())
    manifests = {folder.name: read_manifest(folder) for folder in folders}
    whole = all(manifest and manifest.get("splits") == sorted(manifests)
                for manifest in manifests.values())
    return manifests if whole else {}


def limited(records, limit, splits):
    """The first `limit` records of each split, as (split, record); ends once all splits have them."""
    seen = Counter()
    for split, record in records:
        seen[split] += 1
        if seen[split] <= limit or not limit:
            yield split, record
        if limit and splits and all(seen[name] >= limit for name in splits):
            return


def require_samples(where, writers):
    """Raise UserError, which counts the reasons, where the SplitWriters have not one sample."""
    if not any(writer.samples for writer in writers):
        skipped = sum((writer.skipped for writer in writers), Counter())
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
        raise UserError(f"{where}: no sample of it could be used ({reasons or 'there is none'}), so "
                        "nothing is written; what was prepared before stays")


def write_dataset(target, dataset, raw, sources, tokenizer, facts, workers, needed=()):
    """
    Prepare a dataset into the folder `target`, in place of what is there; with its lock, see `locked`.

    tokenizer: content of a SentencePiece model or a tokenizer.json; a dataset that asks nothing needs none.
    facts: what every manifest is to say; needed: splits without which the others are of no use. On any
    error, such as that no sample could be used, the folder keeps what it held. Raises UserError,
    OSError, and BrokenProcessPool if a worker died.
    """
    partial, old = recover(target)
    partial.mkdir(parents=True)
    limit, image = facts["limit"], ImageSettings(**facts["image"])
    try:
        if dataset.asks:
            model = HashedFile(partial / TOKENIZERS[tokenizer[:1] == b"{"])
            model.write(tokenizer)
            model.close()
        tokenizer = open_tokenizer(partial, facts.get("system", "")) if dataset.asks else None
        hashes = {name: {"bytes": path.stat().st_size, "sha256": hash_file(path)}
                  for name, path in sources.items()}
        facts = facts | {"tokenizer_sha256": tokenizer.sha256 if tokenizer else "",
                         "sources": hashes, "hub_revision": hub_revision(raw)}
        writers = {}
        spawn = multiprocessing.get_context("spawn")  # a fork would copy the parent's threads' locks
        with ProcessPoolExecutor(workers, spawn, end_with_parent) as pool:
            encode = functools.partial(pool.submit, encode_image, settings=image)
            tiles = math.isqrt(most_tiles(image.resize)) or 1  # along a side of a drawn image
            side = math.isqrt(SMART_LEAST) if image.resize == "smart" else tiles * image.size
            read = dataset.read(raw, side) if dataset.drawn else dataset.read(raw)
            records = altered(limited(read, limit, dataset.counts), facts.get("augment", 0))
            total = sum(min(limit or count, count) for count in dataset.counts.values())
            for split, record in tqdm(records, dataset.name, total, unit=" samples"):
                if split not in writers:
                    if split not in ("train", "validation", "test"):  # it becomes a folder
                        raise UserError(f"{raw}: split {split!r:.80} is none of train, validation, test")
                    writers[split] = SplitWriter(partial / split, dataset, tokenizer, encode,
                                                 IMAGES_AHEAD * workers, facts.get("box_format"),
                                                 facts.get("reasoning", "none"))
                writers[split].add(record)
            for writer in writers.values():
                writer.close(facts | {"splits": sorted(writers)})
        if not writers:
            layouts = " or ".join(" + ".join(layout) for layout in dataset.layouts)
            raise UserError(f"{raw}: its files hold no sample; it is read from {layouts or 'what is there'}")
        require_samples(raw, writers.values())
        for split in needed:
            require_samples(f"{raw}: {split}", [writers[split]] if split in writers else [])
        for split in writers:  # of another shard, but it says what was asked for: to drop or to keep
            if (target / split / "leaks.json").exists():
                shutil.copy(target / split / "leaks.json", partial / split)
        with locked(target.with_name("leaks.json"), "comparing training with test images"):
            if target.exists():  # which is not there for a moment
                target.rename(old)
            partial.rename(target)
    finally:
        recover(target)
