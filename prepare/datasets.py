"""
The datasets: where each comes from, what was published about it, and how its files are read.

A dataset is one decorated function, from its raw folder to (split, Record) pairs:

    @dataset(kind="image questions", licence="CC-BY-4.0", access="open", megabytes=120,
             page="https://example.org/toy", urls=("https://example.org/toy.json",),
             layouts=(("toy.json",),), counts={"train": 1800, "test": 450})
    def toy(raw):
        for row in read_json(raw / "toy.json"):
            yield row["split"], Record(row["id"], row["question"], row["answer"],
                                       read_image(raw / row["file"]), row["file"])

A reader cleans nothing and skips nothing: prepare/shards.py does both, and counts what it skips.
"""

import contextlib
import csv
import gzip
import io
import itertools
import json
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from data import Record, UserError, format_prompt
from prepare.download import Source

LARGEST_MEMBER = 1 << 28  # bytes of one file in an archive: a larger one is no image
DATASETS = {}  # name -> Dataset, in the order in which they are prepared


@dataclass(frozen=True, kw_only=True)
class Dataset(Source):
    """What is known about a dataset, and how it is read."""
    read: Callable  # raw folder -> iterator of (split, Record)
    kind: str  # image questions, text questions, captions, reports or classification
    counts: dict  # split -> published number of samples
    classes: tuple = ()  # names of the labels, in the order of a classifier's outputs
    train_tokenizer: Callable | None = None  # makes its own SentencePiece model, as bytes


def dataset(**facts):
    """Enter the decorated reader in DATASETS, under its own name, with these facts."""
    def register(read):
        DATASETS[read.__name__] = Dataset(name=read.__name__, read=read, **facts)
        return read
    return register


# ----------------------------------------------------------------------------- raw files

def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged or not JSON ({error}); fetch it again") from None


def read_csv(path, columns, delimiter=","):
    """Yield a table's rows as dicts; the file may be gzipped. Refuses one that lacks a column."""
    path = Path(path)
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, delimiter=delimiter)
            for column in columns:
                if column not in (rows.fieldnames or ()):
                    raise UserError(f"{path}: no column {column!r} among its columns "
                                    f"{', '.join(rows.fieldnames or ())}")
            yield from rows
    except (UnicodeDecodeError, csv.Error, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged table ({error}); fetch it again") from None


@contextlib.contextmanager
def open_zip(path):
    """A zip archive, to be read in place with read_member."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except zipfile.BadZipFile as error:
        raise UserError(f"{path}: damaged zip ({error}); fetch it again") from None


def read_member(archive, name):
    """A member's bytes; None where there is none; b"" where it is damaged or past all reason large."""
    try:
        member = archive.getinfo(name)
        return archive.read(member) if member.file_size <= LARGEST_MEMBER else b""
    except KeyError:
        return None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError):
        return b""


def read_tar(path):
    """Yield (name, bytes) of the plain files in a tar archive, gzipped or not, in its order."""
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                if member.isreg():  # links and devices are passed over; nothing is ever unpacked
                    small = member.size <= LARGEST_MEMBER
                    yield member.name, archive.extractfile(member).read() if small else b""
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged archive ({error}); fetch it again") from None


def multiple_choice(question, options, right):
    """A question with its lettered options, and the letter and text of the right one (a number)."""
    lettered = [f"{letter}. {option}" for letter, option in zip("ABCDEFGHIJ", options, strict=False)]
    return f"{question} {' '.join(lettered)}", lettered[right]


def read_image(path):
    """An image file's bytes, or None, which counts as "image missing", where there is no file."""
    return path.read_bytes() if path.is_file() else None


def read_parquet(path, columns):
    """Yield a parquet file's rows as dicts, a few at a time: a row may hold a whole image."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            for column in columns:
                if column not in file.schema_arrow.names:
                    raise UserError(f"{path}: no column {column!r} among its columns "
                                    f"{', '.join(file.schema_arrow.names)}")
            for batch in file.iter_batches(batch_size=32, columns=list(columns)):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: damaged parquet ({str(error).splitlines()[0]}); "
                        "fetch it again") from None


def read_hub_questions(raw, type_of):
    """(split, Record)s of the hub's VQA parquets: data/<split>-*.parquet, one image a row."""
    for split in ("train", "validation", "test"):
        rows = itertools.chain.from_iterable(
            read_parquet(path, ("image", "question", "answer"))
            for path in sorted((raw / "data").glob(f"{split}-*.parquet")))
        for number, row in enumerate(rows):
            question, answer = row["question"] or "", row["answer"] or ""
            name, image = f"{split}_{number:06d}", row["image"] or {}
            yield split, Record(name, question, answer, image.get("bytes"),
                                image.get("path") or name, type=type_of(question, answer))


# ----------------------------------------------------------------------------- the sample

def train_sample_tokenizer():
    """A tokenizer of 512 pieces with the settings of LLaMA's, as a SentencePiece model."""
    import sentencepiece

    from prepare import sample

    # Wordings and answers recur every 6 images of a class: the first 1,000 records hold them all.
    records = [record for _, record in itertools.islice(sample.records(), 1000)]
    # Line by line, so that a line break stays a byte, as in LLaMA's vocabulary.
    lines = [line for record in records
             for line in (*format_prompt(record.question).split("\n"), record.answer)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=512,
        hard_vocab_limit=False, byte_fallback=True, split_digits=True, add_dummy_prefix=True,
        remove_extra_whitespaces=False, normalization_rule_name="identity", unk_id=0, bos_id=1,
        eos_id=2, pad_id=-1, character_coverage=0.99995, num_threads=1, minloglevel=2)
    return model.getvalue()


@dataset(kind="image questions", licence="MIT", access="part of this repository", megabytes=0,
         page="prepare/sample.py", folder=Path(__file__).parent, layouts=(("sample.py",),),
         counts={"train": 5400, "test": 1080}, train_tokenizer=train_sample_tokenizer,
         classes=("ct_no_bleed", "ct_bleed", "smear_no_white_cell", "smear_white_cell",
                  "film_no_effusion", "film_effusion", "ultrasound_no_cyst", "ultrasound_cyst"))
def sample(raw):
    """Drawn pictures with exact answers; it brings a tokenizer of its own."""
    from prepare import sample as drawn

    yield from drawn.records()


# ----------------------------------------------------------------------------- pretraining

@dataset(kind="image questions", licence="MIT (hub card; textbook publishers hold the images)",
         access="open", megabytes=785, page="https://huggingface.co/datasets/flaviagiammarino/path-vqa",
         hub="flaviagiammarino/path-vqa", hub_files=("data/*.parquet",),
         layouts=(("data/*.parquet",),), counts={"train": 19654, "validation": 6259, "test": 6719})
def path_vqa(raw):
    """PathVQA (He et al. 2020), the hub's cleaned copy: pathology textbook figures."""
    words = ("what", "where", "how", "why", "when", "who", "whose", "which")

    def type_of(question, answer):
        if answer.strip().lower() in ("yes", "no"):
            return "yes/no"
        first = question.lower().split()[:1]
        return first[0] if first and first[0] in words else "other"

    yield from read_hub_questions(raw, type_of)


@dataset(kind="image questions", licence="CC0-1.0", access="open", megabytes=35,
         page="https://osf.io/89kps or https://huggingface.co/datasets/flaviagiammarino/vqa-rad",
         hub="flaviagiammarino/vqa-rad", hub_files=("data/*.parquet",),
         layouts=(("VQA_RAD Dataset Public.json",),
                  ("data/train-*.parquet", "data/test-*.parquet")),
         counts={"train": 1797, "test": 451})
def vqa_rad(raw):
    """
    VQA-RAD (Lau et al. 2018), as published on OSF, or the hub's copy where that is not there.

    The hub's copy has no question types and four training rows fewer: it dropped duplicates.
    """
    questions = raw / "VQA_RAD Dataset Public.json"
    if not questions.is_file():
        yield from read_hub_questions(raw, lambda question, answer: "")
        return
    for row in read_json(questions):
        split = "test" if row["phrase_type"].startswith("test_") else "train"
        image = read_image(raw / "VQA_RAD Image Folder" / row["image_name"])
        yield split, Record(str(row["qid"]), row["question"], str(row["answer"]), image,
                            row["image_name"], type=row["question_type"])


@dataset(kind="text questions", licence="MIT", access="open", megabytes=3,
         page="https://github.com/pubmedqa/pubmedqa", counts={"train": 500, "test": 500},
         urls=("https://raw.githubusercontent.com/pubmedqa/pubmedqa/master/data/ori_pqal.json",
               "https://raw.githubusercontent.com/pubmedqa/pubmedqa/master/data/"
               "test_ground_truth.json"),
         layouts=(("ori_pqal.json", "test_ground_truth.json"),))
def pubmed_qa(raw):
    """PubMedQA (Jin et al. 2019), the 1,000 expert-labelled questions; answers yes, no, maybe."""
    held_out = read_json(raw / "test_ground_truth.json")
    for identifier, row in read_json(raw / "ori_pqal.json").items():
        yield ("test" if identifier in held_out else "train",
               Record(identifier, row["QUESTION"], row["final_decision"],
                      context=" ".join(row["CONTEXTS"]), type="yes/no/maybe"))
