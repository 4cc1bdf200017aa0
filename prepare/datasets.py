"""
What a dataset is, and how the raw files of datasets are read.

The datasets themselves are in questions.py, reports.py, figures.py and classify.py. A dataset is
one decorated function, from its raw folder to (split, Record) pairs:

    @dataset(kind="image questions", licence="CC-BY-4.0", access="open", megabytes=120,
             page="https://example.org/toy", urls=("https://example.org/toy.json",),
             layouts=(("toy.json",),), counts={"train": 1800, "test": 450})
    def toy(raw):
        for row in read_json(raw / "toy.json"):
            yield row["split"], Record(row["id"], row["question"], row["answer"],
                                       read_image(raw / row["file"]), row["file"])

A reader cleans nothing and skips nothing: prepare/shards.py does both, and counts what it skips.
"""

import csv
import gzip
import json
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from data import UserError
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
    only_by_name: bool = False  # another version of a dataset: left out unless --only names it


def dataset(**facts):
    """Enter the decorated reader in DATASETS, under its own name, with these facts."""
    def register(read):
        DATASETS[read.__name__] = Dataset(name=read.__name__, read=read, **facts)
        return read
    return register


# ----------------------------------------------------------------------------- raw files

def require_columns(where, found, columns):
    """Refuse a table that lacks a column; `where` names it, `found` are the names that it has."""
    for column in columns:
        if column not in found:
            raise UserError(f"{where}: no column {column!r} among its columns {', '.join(found)}")


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
            require_columns(path, rows.fieldnames or (), columns)
            yield from rows
    except (UnicodeDecodeError, csv.Error, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged table ({error}); fetch it again") from None


def open_zip(path):
    """A zip archive, to be read in place with read_member."""
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError) as error:
        raise UserError(f"{path}: damaged zip ({error}); fetch it again") from None


def read_member(archive, name):
    """A member's bytes; None where there is none; b"" where it is damaged or past all reason large."""
    try:
        member = archive.getinfo(name)
        return archive.read(member) if member.file_size <= LARGEST_MEMBER else b""
    except KeyError:
        return None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, UnicodeDecodeError, RuntimeError):
        return b""


def read_tar(path):
    """Yield (name, bytes) of the plain files in a gzipped tar archive, in its order."""
    try:
        with gzip.open(path) as file, tarfile.open(fileobj=file, mode="r|") as archive:
            for member in archive:
                if member.isreg():  # links and devices are passed over; nothing is ever unpacked
                    small = member.size <= LARGEST_MEMBER
                    yield member.name, archive.extractfile(member).read() if small else b""
            while file.read(1 << 20):  # the checksum stands at the end
                pass
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged archive ({error}); fetch it again") from None


def multiple_choice(question, options, right):
    """
    A question with its lettered options, and the letter and text of the right one, given by its place.

    An empty question stays so, and one without a right option gets an empty answer: either is
    counted as what it is when it is skipped.
    """
    letters = "ABCDEFGHIJ"
    if not question.strip() or not 0 <= right < len(options) <= len(letters) or not options[right]:
        return question, ""
    lettered = [f"{letter}. {option}" for letter, option in zip(letters, options)]
    return f"{question} {' '.join(lettered)}", lettered[right]


def read_json_lines(path):
    """Yield the values of a file that holds one JSON value a line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield json.loads(line)
            except ValueError:
                raise UserError(f"{path}: line {number} is damaged or not JSON; fetch it again") from None


def read_image(path):
    """An image file's bytes, or None, which counts as "image missing", where there is no file."""
    return path.read_bytes() if path.is_file() else None


def read_parquet(path, columns):
    """Yield a parquet file's rows as dicts, a few at a time: a row may hold a whole image."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            require_columns(path, file.schema_arrow.names, columns)
            for batch in file.iter_batches(batch_size=32, columns=list(columns)):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: damaged parquet ({str(error).splitlines()[0]}); "
                        "fetch it again") from None
