"""
Feed what reads files from outside with files that nobody means well, and see what it does.

    python extras/faults/hostile.py --images=100000 --files=5000

    images     files of eight formats, spoiled, through load_image and resize_image
    records    rows of a dataset with odd values, through its reader, the writer and back
    tensors    safetensors, adapters and configs, spoiled where it hurts, through what loads them
    tables     parquet and JSON, through a dataset's reader
    pickles    spoiled pickles and such that would run code, under all names that are read
    archives   members that escape, links, devices and bombs, through what reads archives

All of it runs in processes that may take so much memory and so many seconds a file. A file has to be
used, or refused by an error that is listed here; a process must neither die, hang nor grow. An image
may have 89 million pixels in few bytes: such a one takes 3 s and 1.4 GB.

It found nothing BAD in 100,000 images, of which 30,363 were used, 100,000 records, 100,000 tensors, 200,000
tables and 5,000 files of each other kind but for what has been mended since: names that led outside of a
dataset's folder, whole numbers in the place of weights, and broken pickles and settings that raised what
nobody expected.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import contextlib
import gzip
import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import tarfile
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from data import EOS, Tokenizer
from extras.bench.progress import Progress
from extras.faults.corrupt import flipped, spoil_adapter, spoil_weights
from plumbing.claims import read_adapter_config
from plumbing.flags import UserError, parse_command_line, run
from plumbing.pixels import FORMATS, Unreadable, load_image, resize_image
from plumbing.shards import PROMPT_VERSION, SHARD_VERSION, Shard
from prepare.all import print_table
from prepare.datasets import DATASETS, open_zip, read_member, read_tar
from prepare.questions import train_sample_tokenizer
from prepare.shards import ImageSettings, SplitWriter, encode_image
from prepare.weights import ENCODERS, WEIGHTS, read_pickle
from weights import load_encoder, load_llama

# What Pillow raises on a broken file, at a GIF's second frame among them, and struct on a TIFF's broken
# list of pages.
IMAGE_ERRORS = (OSError, ValueError, SyntaxError, IndexError, struct.error)


@dataclass(frozen=True)
class Config:
    parts: str = "images,records,tensors,tables,pickles,archives"  # what to do
    images: int = 20_000  # spoiled images
    files: int = 5_000  # spoiled files of each other kind
    gigabytes: float = 2.0  # that a process may take beyond what it starts with
    seconds: int = 20  # of a processor that one file may take
    seed: int = 0  # of what is drawn
    chunk: int = 1000  # files for one process


# ----------------------------------------------------------------------------- processes

def guarded(work, config, *arguments):
    """What work(*arguments), a Counter, gives in a process of its own, within the limits."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def child():
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + int(config.gigabytes * (1 << 30))
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGPROF, too_long)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what C libraries complain of
        sender.send(work(config, *arguments))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        result = Counter()
    process.join()
    if process.exitcode:
        result["BAD", f"process ended with {process.exitcode}, {arguments}"] += 1
    return result


class TooLong(BaseException):
    """Not an Exception, so that nobody takes it for what a parser raises."""


def too_long(number, frame):
    raise TooLong


def tried(config, use, listed=(), name=""):
    """(what became of it, details) of one use of a file: used, refused, or BAD."""
    signal.setitimer(signal.ITIMER_PROF, config.seconds)  # of computing: others may need the machine
    try:
        return use() or "used", name
    except (UserError, *listed) as error:
        return "refused", name if isinstance(error, UserError) else f"{name} {type(error).__name__}"
    except MemoryError:
        return "BAD", f"{name} out of memory"
    except TooLong:
        return "BAD", f"{name} took more than {config.seconds} s"
    except Exception as error:
        place = error.__traceback__
        while place.tb_next:
            place = place.tb_next
        return "BAD", (f"{name} {type(error).__name__}: {error!s:.60} "
                       f"({Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno})")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def resident():
    """Bytes of memory that the process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# ----------------------------------------------------------------------------- ways to spoil

NUMBERS = [0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0xffff, 0x10000, 0x7fffffff, 0x80000000,
           0xffffffff]


def mutated(content, draw, others=(b"",)):
    """A file with a few things wrong, as a fuzzer makes them."""
    for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
        size = max(len(content), 1)
        # Half of the time where headers are.
        place = draw.randrange(min(size, 64) if draw.random() < 0.5 else size)
        kind = draw.randrange(8)
        if kind <= 1 and content:
            content = flipped(content, 8 * place + draw.randrange(8))
        elif kind == 2:
            number = draw.choice(NUMBERS).to_bytes(4, draw.choice(("little", "big")))
            content = content[:place] + number + content[place + 4:]
        elif kind == 3:
            content = content[:place] + draw.randbytes(draw.choice((1, 2, 8, 64))) + content[place:]
        elif kind == 4:
            content = content[:place] + content[place + draw.choice((1, 2, 4, 64, 512)):]
        elif kind == 5:
            after = b"" if draw.random() < 0.3 else bytes(4) + content[place + 4:]
            content = content[:place] + after
        elif kind == 6:
            content = content[:place] + content[place // 2:]
        else:
            other = draw.choice(others)
            content = content[:place] + other[draw.randrange(max(len(other), 1)):]
    return content


# ----------------------------------------------------------------------------- images

def pictures():
    """(format, file) of each way to store an image that datasets use, small ones."""
    colour = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8))
    deep = Image.fromarray(np.random.default_rng(1).integers(0, 1 << 16, (24, 32), np.uint16))
    yield from deep_pictures()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    several = {"save_all": True, "append_images": [colour.rotate(90), colour.rotate(180)]}
    for form, image, settings in (
            *(("JPEG", colour.convert(mode), settings) for mode in ("RGB", "L", "CMYK")
              for settings in ({}, {"progressive": True, "exif": exif, "icc_profile": bytes(200)})),
            *(("PNG", colour.convert(mode), {}) for mode in ("RGB", "1", "L", "LA", "RGBA")),
            ("PNG", colour.convert("P"), {"transparency": 3}), ("PNG", colour, several),
            ("PNG", deep, {}),
            *(("BMP", colour.convert(mode), {}) for mode in ("RGB", "P", "1", "L")),
            *(("PPM", colour.convert(mode), {}) for mode in ("RGB", "1", "L")), ("PPM", deep, {}),
            *(("TIFF", image, {"compression": packing}) for image in (colour, deep, colour.convert("F"))
              for packing in (None, "tiff_lzw", "tiff_deflate")),
            ("TIFF", colour, {"compression": "jpeg"}), ("TIFF", colour, several),
            ("TIFF", colour.convert("1"), {"compression": "group4"}),
            ("GIF", colour, {}), ("GIF", colour, several),
            ("WEBP", colour, {}), ("WEBP", colour, {"lossless": True, **several}),
            ("JPEG2000", colour, {}), ("JPEG2000", deep, {})):
        stream = io.BytesIO()
        image.save(stream, form, **settings)
        yield form, stream.getvalue()


def deep_pictures():
    """(format, file) of what plumbing/pixels.py reads beyond Pillow: PNG and TIFF, written by hand."""
    draw = np.random.default_rng(2)
    for channels, kind in ((1, 0), (3, 2), (2, 4), (4, 6)):
        pixels = draw.integers(0, 1 << 16, (24, 32 * channels), np.uint16).astype(">u2")
        rows = b"".join(b"\0" + row.tobytes() for row in pixels)
        chunks = ((b"IHDR", struct.pack(">IIBBBBB", 32, 24, 16, kind, 0, 0, 0)),
                  (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
        yield "PNG", b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
            for name, body in chunks)
        for order in "<>":
            for packing in (1, 8):
                for sign, bits in ((1, 16), *(((1, 32), (2, 16), (3, 32), (3, 64)) if channels == 1 else ())):
                    for zero_is_black in (0, 1):
                        body = draw.bytes(24 * 32 * channels * bits // 8)
                        body = zlib.compress(body) if packing == 8 else body
                        tags = {256: 32, 257: 24, 258: bits, 259: packing,
                                262: 2 if channels > 2 else zero_is_black, 273: 8, 277: channels, 278: 24,
                                279: len(body), 339: sign} | ({} if channels % 2 else {338: 2})
                        if channels > 1:  # one value stands for all channels, as readers allow
                            tags.pop(339)
                        fields = b"".join(struct.pack(order + "HHII", tag, 4, 1, value)
                                          for tag, value in sorted(tags.items()))
                        yield "TIFF", ((b"II*\0" if order == "<" else b"MM\0*")
                                       + struct.pack(order + "I", 8 + len(body)) + body
                                       + struct.pack(order + "H", len(tags)) + fields + bytes(4))


def whole_chunks(content):
    """A PNG with the checksums that its chunks should have, so that a decoder goes on to read them."""
    chunks, at = [content[:8]], 8
    while at + 12 <= len(content):
        length = int.from_bytes(content[at:at + 4], "big")
        body = content[at + 4:at + 8 + length]
        chunks.append(content[at:at + 4] + body + zlib.crc32(body).to_bytes(4, "big"))
        at += 12 + length
    return b"".join(chunks)


def try_images(config, chunk, count, folder):
    warnings.simplefilter("ignore")
    draw, outcomes, begin = random.Random(f"{config.seed} {chunk}"), Counter(), 0
    files = list(pictures())
    forms = sorted({form for form, _ in files})
    assert set(forms) == set(FORMATS)
    for number in range(count):
        form = forms[number % len(forms)]
        content = mutated(draw.choice([file for other, file in files if other == form]), draw,
                          [file for _, file in files])
        if form == "PNG" and draw.random() < 0.7:
            content = whole_chunks(content)

        def use():
            try:
                image = resize_image(load_image(content, draw.choice((0, 16))), 16)
            except Unreadable as error:
                raise error.__cause__ or error  # what it was before it got words
            assert (image.size, image.mode) == ((16, 16), "RGB")

        now = time.process_time()
        outcomes[tried(config, use, IMAGE_ERRORS, form)] += 1
        outcomes["slowest", ""] = max(outcomes["slowest", ""], round(1e3 * (time.process_time() - now)))
        if time.process_time() - now > 2:
            outcomes["slow", form] += 1
        if number == count // 2:
            begin = resident()
    outcomes["grown by", ""] = (resident() - begin) >> 20
    outcomes["most memory", ""] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return outcomes


# ----------------------------------------------------------------------------- records

TEXTS = ["", " ", "\n\t", "\0", "a\0b", "\ud800", "x\udfff y", "</s>", "<s>", "<unk>", "<pad>", "<0x0A>",
         "<0x00>", "a</s>b<s>c", "[INST] x [/INST]", "\u2581</s>", "\u202eabc", "e\u0301" * 50, "\ufeff",
         "\uffff", "\U0010ffff", "\u0000</s>", "\U0001fac1" * 9, "x" * 5000, "</s>" * 999,
         " ".join(["</s>"] * 999), "../../etc/passwd", "/etc/passwd", "C:\\a", "x" * 300, "con", "a/b",
         "NaN", "-1", "\r\n", "\\ud800", '"', "Answer:", "a\nAnswer: b"]
VALUES = [None, True, False, 0, -1, 7.5, 1e300, float("inf"), float("nan"), 10 ** 18, 10 ** 400,
          -10 ** 4000, [], {}, [None], [[[]]], {"a": 1}, ["yes"], {"text": "yes"}, *TEXTS]


def now_future(content, settings):
    return SimpleNamespace(result=lambda: encode_image(content, settings))


def try_records(config, chunk, count, folder):
    """Rows of SLAKE with odd values; what was written comes back, and no word became a control token."""
    draw, outcomes, begin = random.Random(f"{config.seed} {chunk}"), Counter(), 0
    raw = folder / "raw"
    shutil.rmtree(raw, ignore_errors=True)
    (raw / "imgs").mkdir(parents=True)
    picture = next(pictures())[1]
    (raw / "imgs" / "a.jpg").write_bytes(picture)
    (folder / "tokenizer.model").write_bytes(train_sample_tokenizer())
    Image.new("RGB", (9, 9)).save(folder / "outside.png")
    tokenizer, settings = Tokenizer(folder / "tokenizer.model"), ImageSettings(16, "squash", "jpeg", 90)
    good = {"qid": 1, "question": "is it?", "answer": "yes", "img_name": "a.jpg", "content_type": "x",
            "q_lang": "en"}
    texts = TEXTS + ["../../outside.png", str(folder / "outside.png")]
    for number in range(count):
        row = dict(good)
        for name in draw.sample(sorted(good), draw.choice((1, 1, 2, 5))):
            row[name] = draw.choice(VALUES + texts)
        if draw.random() < 0.05:
            del row[draw.choice(sorted(row))]
        if number % 1000 == 500:  # long ones cost seconds
            text = draw.choice(("x" * 4, "a " * 2, "</s>", "\ud800" * 4, "\u00e9" * 2))
            row[draw.choice(("question", "answer"))] = text * 2_500_000
        text = json.dumps(row, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
        for split in ("train", "validate", "test"):
            (raw / f"{split}.json").write_bytes(b"[" + text + b"]" if split == "train" else
                                                json.dumps([good]).encode())
        shutil.rmtree(folder / "slake", ignore_errors=True)
        (folder / "slake").mkdir()

        def use():
            writer = SplitWriter(folder / "slake" / "train", DATASETS["slake"], tokenizer,
                                 lambda content: now_future(content, settings), 4)
            try:
                for split, record in DATASETS["slake"].read(raw):
                    if split == "train":
                        assert record.image in (None, picture), "read outside"
                        writer.add(record)
            finally:
                writer.close({"dataset": "slake", "shard_version": SHARD_VERSION,
                              "prompt_version": PROMPT_VERSION})
            shard = Shard(folder / "slake" / "train")
            for index, words in enumerate(shard.read_records()):
                sample = shard.read_sample(index)
                (begin, end), = sample.spans
                words_alone = [*sample.tokens[2:end - 1]]  # behind <bos> and the image, before <eos>
                assert sample.tokens[1] == -1 and min(words_alone) > EOS, "a control token was forged"
                written = words["answer"].replace("\u2581", " ").strip()  # its own mark of a space
                assert tokenizer.decode(sample.tokens[begin:end - 1]) == written, "another answer"
            return "used" if len(shard) else "skipped"

        outcomes[tried(config, use)] += 1
        if number == count // 2:
            begin = resident()
    outcomes["grown by", ""] = (resident() - begin) >> 20
    return outcomes


# ----------------------------------------------------------------------------- tensors

def spoiled_json(value, draw):
    """JSON with one value or name changed, anywhere in it; also such that no writer makes."""
    text = json.dumps(value)
    kind = draw.randrange(6)
    if kind == 0:
        return mutated(text.encode(), draw)
    if kind == 1:
        return draw.choice((b"[" * 100_000, b'{"a":' * 50_000, b"null", b"7", b"[]", b'"x"', b"{}", b"",
                            b"\xff\xfe{\0}\0", b"{\"a\": 1" + b"0" * 5000 + b"}"))
    if kind == 2:  # a name twice: the last one counts
        return (text[:-1] + ", " + text[1:]).encode()
    value = json.loads(text)
    node = value
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = draw.choice(keys)
        if not isinstance(node[key], (dict, list)) or not node[key] or draw.random() < 0.2:
            break
        node = node[key]
    numbers = [-1, 0, 1, 2, 3, 5, 64, 1 << 16, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 64, 10 ** 30, 0.5,
               1e300]
    others = [None, True, "", "x", [], {}, [1 << 40, 1 << 40], "F64", "I32", "U32", "BF16", "U8",
              "F8_E4M3", "../../a", "/etc/passwd", "\0", [[]], {"a": {}}]
    if kind == 3 and isinstance(node, dict):
        node[draw.choice(("", "x", "../x", "__metadata__", "\0", "x" * 9999))] = node.pop(key)
    else:
        node[key] = draw.choice(numbers + others)
    return json.dumps(value).encode()


def spoiled_safetensors(content, draw):
    length = int.from_bytes(content[:8], "little")
    if draw.random() < 0.2:
        size = draw.choice([0, 1, length - 1, length + 1, len(content), 1 << 20, 1 << 32, (1 << 63) - 1,
                            (1 << 64) - 1])
        return size.to_bytes(8, "little") + content[8:]
    if draw.random() < 0.2:
        return mutated(content[:8 + length], draw) + content[8 + length:]
    head = spoiled_json(json.loads(content[8:8 + length]), draw)
    return len(head).to_bytes(8, "little") + head + content[8 + length:]


def try_tensors(config, chunk, count, folder):
    torch.set_num_threads(1)
    draw, outcomes = random.Random(f"{config.seed} {chunk}"), Counter()
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "adapter").mkdir(parents=True)
    targets = [*spoil_adapter(folder / "adapter"), *spoil_weights(folder)]
    files = [(target, path, path.read_bytes(), target.use()) for target in targets
             for path in sorted(target.folder.iterdir())]
    for number in range(count):
        target, path, content, right = files[number % len(files)]
        changed = (spoiled_json(json.loads(content), draw) if path.suffix == ".json" else
                   spoiled_safetensors(content, draw))
        path.write_bytes(changed)

        def use():
            if target.use() == right:
                return "as before"
            # Another number in a config may be meant; another tensor under the same name is not.
            return "BAD" if path.suffix == ".safetensors" else "used"

        outcomes[tried(config, use, name=path.name)] += 1
        path.write_bytes(content)
    return outcomes


# ----------------------------------------------------------------------------- tables

def try_tables(config, chunk, count, folder):
    import pyarrow
    import pyarrow.parquet

    draw, outcomes = random.Random(f"{config.seed} {chunk}"), Counter()
    raw = folder / "tables"
    (raw / "data").mkdir(parents=True, exist_ok=True)
    rows = [{"image": {"bytes": next(pictures())[1][:300], "path": f"{n}.png"},
             "question": "what is it?" * 9, "answer": "lung"} for n in range(5)]
    contents = []
    for settings in ({}, {"compression": "zstd", "use_dictionary": False},
                     {"write_page_checksum": True}):
        stream = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream, **settings)
        contents.append(stream.getvalue())
    for split in ("train", "validation", "test"):
        (raw / "data" / f"{split}-00000-of-00001.parquet").write_bytes(contents[0])
    good = {"question": "q", "options": dict.fromkeys("ABCD", "x"), "answer_idx": "A", "meta_info": "s"}
    for split in ("train", "test"):
        (raw / f"phrases_no_exclude_{split}.jsonl").write_text(json.dumps(good) + "\n")
    for number in range(count):
        if number % 2:
            name, path = "path_vqa", raw / "data" / "train-00000-of-00001.parquet"
            content = draw.choice(contents)
            tail = draw.random() < 0.6  # where a parquet says what is in it
            changed = content[:-400] + mutated(content[-400:], draw) if tail else mutated(content, draw)
        else:
            name, path = "med_qa", raw / "phrases_no_exclude_train.jsonl"
            changed = spoiled_json(good, draw) + b"\n"
        path.write_bytes(changed)
        outcomes[tried(config, lambda: bool(list(DATASETS[name].read(raw))) and "used",
                       name=path.suffix)] += 1
    outcomes["most memory", ""] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return outcomes


# ----------------------------------------------------------------------------- pickles

class Canary:
    """Unpickled, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "it ran")


def pickles(payload):
    """The ways in which a pickle comes: alone, in torch.save's formats, old and new, and in numpy's."""
    state = {"a.weight": torch.ones(2), "x": payload}
    for protocol in (0, 2, 5):
        yield pickle.dumps(state, protocol)
        yield pickle.dumps(payload, protocol)
    for settings in ({}, {"_use_new_zipfile_serialization": False}):
        for value in (state, payload, {"state_dict": state}):
            stream = io.BytesIO()
            torch.save(value, stream, **settings)
            yield stream.getvalue()
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:  # torch.save's oldest
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(payload)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    yield stream.getvalue()
    for save in (np.save, np.savez):
        stream = io.BytesIO()
        save(stream, np.array([payload], dtype=object), allow_pickle=True)
        yield stream.getvalue()


def entries(folder):
    """(name, function of a file's content) of what loads weights, adapters, tokenizers and images."""
    def at(path, use):
        def load(content):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            return use()
        return path.name, load

    for name in [*ENCODERS, "pytorch_model-00001-of-00002.bin"]:
        path = folder / "pickles" / name
        yield at(path, lambda path=path: read_pickle(path) and "used")
    for weights in (entry for entry in WEIGHTS.values() if not entry.in_place):  # those are no pickles
        for layout in weights.layouts:
            raw = folder / weights.name / layout[-1].replace("*", "-1")
            (raw.parent).mkdir(exist_ok=True)
            (raw.parent / "config.json").write_text("{}")
            yield at(raw, lambda weights=weights, raw=raw: weights.write(
                weights, raw.parent, folder / f"{weights.name}.target") or "used")
    adapter, models = folder / "adapter" / "now", folder / "now"
    encoder = models / "vision" / "encoder.safetensors"
    yield at(encoder, lambda: load_encoder(encoder))
    for name in ("config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"):
        yield at(models / "language" / name, lambda: load_llama(models / "language"))
    yield at(adapter / "adapter_config.json", lambda: read_adapter_config(adapter))
    yield at(folder / "tokenizer.model", lambda: Tokenizer(folder / "tokenizer.model"))
    yield "an image", lambda content: load_image(content)


def try_pickles(config, chunk, count, folder):
    """Nothing in a pickle is called; a pickle that is spoiled is refused like one that is not whole."""
    torch.set_num_threads(1)
    draw, outcomes, marker = random.Random(f"{config.seed} {chunk}"), Counter(), folder / "marker"
    looked_up = []
    sys.addaudithook(lambda event, details: looked_up.append(details[1])
                     if event == "pickle.find_class" and armed else None)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "adapter").mkdir(parents=True)
    spoil_adapter(folder / "adapter")
    spoil_weights(folder)
    armed, hostile = False, list(pickles(Canary(marker)))
    armed = True
    for name, load in entries(folder) if not chunk else ():
        for content in hostile:
            listed = IMAGE_ERRORS if name == "an image" else ()
            became, details = tried(config, lambda: load(content) and "used", listed, f"canary: {name}")
            outcomes["BAD" if marker.exists() or became == "used" else became, details] += 1
            marker.unlink(missing_ok=True)
    stream = io.BytesIO()
    torch.save({"state_dict": {f"visual.{n}": torch.ones(3) for n in range(4)}, "epoch": 1}, stream)
    old = io.BytesIO()
    torch.save({"a": torch.ones(3)}, old, _use_new_zipfile_serialization=False)
    path = folder / "pytorch_model.bin"
    for number in range(count):
        path.write_bytes(mutated((stream, old)[number % 2].getvalue(), draw, hostile))
        outcomes[tried(config, lambda: read_pickle(path) and "used", name="spoiled pickle")] += 1
        if marker.exists():
            outcomes["BAD", "a spoiled pickle ran code"] += 1
    outcomes["BAD", f"looked up {looked_up[:3]}"] += len(looked_up)
    return +outcomes


# ----------------------------------------------------------------------------- archives

def try_archives(config, chunk, count, folder):
    """Archives are read in place: whatever is in them, no file appears, and none beside them is read."""
    draw, outcomes = random.Random(f"{config.seed} {chunk}"), Counter()
    shutil.rmtree(folder, ignore_errors=True)
    inside = folder / "inside"
    inside.mkdir(parents=True)
    (folder / "secret").write_bytes(b"secret")
    names = ["../a", "/tmp/hostile_archive_member", "..\\a", "C:\\a", "\\\\host\\a", "a\0b", "x" * 5000,
             "a/../../b", "\u2024\u2024/a", ".", "..", "", "con", "~/a", "./" * 2000 + "a", "good",
             "good", "../secret", "secret"]
    kinds = [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE,
             tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE]
    links = ["../secret", "/etc/passwd", "good", "."]
    wild = [folder / "a", folder / "b", Path("/tmp/hostile_archive_member")]
    for number in range(count):
        stream = io.BytesIO()
        members = [(draw.choice(names), draw.choice(kinds)) for _ in range(draw.choice((1, 3, 9)))]
        if number % 2:
            path = inside / "a.tgz"
            form = draw.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
            with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=1, format=form) as archive:
                for name, kind in members:
                    member = tarfile.TarInfo(name)
                    member.type, member.linkname = kind, draw.choice([*links, name])
                    member.size = 4 if kind in (tarfile.REGTYPE, tarfile.CONTTYPE) else 0
                    with contextlib.suppress(ValueError, UnicodeError):
                        archive.addfile(member, io.BytesIO(b"text"))
        else:
            path = inside / "a.zip"
            with zipfile.ZipFile(stream, "w") as archive, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for name, kind in members:
                    member = zipfile.ZipInfo(name[:5000])
                    member.external_attr = (0o120777 if kind == tarfile.SYMTYPE else 0o100644) << 16
                    archive.writestr(member, draw.choice((b"text", b"../secret", bytes(100_000))))
        content = stream.getvalue()
        if draw.random() < 0.5:
            content = (gzip.compress(mutated(gzip.decompress(content), draw), 1) if number % 2
                       else mutated(content, draw))
        path.write_bytes(content)

        def use():
            if number % 2:
                contents = [text for _, text in read_tar(path)]
            else:
                with open_zip(path) as archive:
                    contents = [read_member(archive, name) for name in archive.namelist()[:50]]
            assert not any(text and (b"root:" in text or text == b"secret") for text in contents)

        outcomes[tried(config, use, name=path.suffix)] += 1
        there = [*filter(os.path.lexists, wild), *(other for other in inside.iterdir() if other != path)]
        if there:
            outcomes["BAD", f"wrote {there}"] += 1
        path.unlink()
    return outcomes


# ----------------------------------------------------------------------------- all of it

def main(config):
    rows = [["part", "files", "used", "refused", "skipped or as before", "BAD", "seconds"]]
    bad, units = 0, {"slowest": "ms", "grown by": "MiB in half a process", "most memory": "MiB"}
    for part in config.parts.split(","):
        work = globals().get(f"try_{part}")
        if not work:
            raise UserError(f"--parts: {part} is none of {Config.parts}")
        begin, outcomes = time.perf_counter(), Counter()
        count = config.images if part == "images" else config.files
        progress = Progress(len(range(0, count, config.chunk)), f"chunks of {part}", pause=10)
        with tempfile.TemporaryDirectory() as folder:
            for chunk, first in enumerate(range(0, count, config.chunk)):
                result = guarded(work, config, chunk, min(config.chunk, count - first),
                                 Path(folder) / part)
                for measure in units:
                    outcomes[measure, ""] = max(outcomes[measure, ""], result.pop((measure, ""), 0))
                outcomes += result
                progress.row()
        worst = {measure: outcomes.pop((measure, ""), 0) for measure in units}
        kinds = Counter()
        for (kind, name), times in outcomes.items():
            kinds[kind] += times
        kinds.pop("slow", None)  # images that took more than 2 s, counted elsewhere, too
        rows.append([part, f"{sum(kinds.values()):,}", f"{kinds['used']:,}", f"{kinds['refused']:,}",
                     f"{kinds['skipped'] + kinds['as before']:,}", f"{kinds['BAD']:,}",
                     f"{time.perf_counter() - begin:,.0f}"])
        measures = [f"{measure} {worst[measure]:,} {unit}" for measure, unit in units.items()
                    if worst[measure]]
        print(f"{part}: {', '.join(measures)}")
        for (kind, name), times in sorted(outcomes.items()):
            print(f"    {kind:9}  {times:7,}  {name.strip()}")
        bad += kinds["BAD"]
        sys.stdout.flush()
    print()
    print_table(rows)
    if bad:
        sys.exit(1)


if __name__ == "__main__":
    run(main, parse_command_line(Config))
