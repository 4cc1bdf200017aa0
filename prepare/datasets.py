"""
What a dataset is, and how the raw files of datasets are read.

The datasets themselves are in questions.py, choices.py, reports.py, studies.py, figures.py, boxes.py and
classify.py. A dataset is one decorated function, from its raw folder to (split, Record) pairs:

    @dataset(kind="image questions", licence="CC-BY-4.0", access="open", megabytes=120,
             page="https://example.org/toy", urls=("https://example.org/toy.json",),
             layouts=(("toy.json",),), counts={"train": 1800, "test": 450})
    def toy(raw):
        for row in read_json(raw / "toy.json", [("split", "id", "question", "answer", "file")]):
            yield row["split"], Record(row["id"], row["question"], row["answer"],
                                       read_named_image(raw, row["file"]), row["file"])

A reader cleans nothing and skips nothing: prepare/shards.py does both, and counts what it skips.
It says what form it expects of a file (see `expect`); one that has another is refused by name.
"""

import contextlib
import csv
import gzip
import itertools
import json
import os
import re
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from data import Record
from plumbing.claims import lfs_pointer
from plumbing.flags import UserError
from prepare.download import Source
from tasks.choices import LETTERS, letter_options

LARGEST_MEMBER = 1 << 28  # bytes of one file in an archive: a larger one is no image
READ_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others zipfile inflates without a bound
LARGEST_LINE = 1 << 20  # characters of a table's line; bytes of what a tar says of a member
HUB_IMAGE = {"bytes": bytes, "path": str}  # the form of an image in the hub's files
CAPTION_QUESTION = "what does this figure show?"
NO_NAME = "no name"  # an image's, in place of "", which is the name of an archive's own folder
DATASETS = {}  # name -> Dataset, in the order in which they are prepared


@dataclass(frozen=True, kw_only=True)
class Dataset(Source):
    """What is known about a dataset, and how it is read."""
    read: Callable  # raw folder -> iterator of (split, Record)
    kind: str  # image questions, text questions, captions, reports or classification
    counts: dict  # split -> published number of samples
    classes: tuple = ()  # names of the labels, in the order of a classifier's outputs
    multi_label: bool = False  # an image may have several of them, or none; else each has exactly one
    shared_ids: str = ""  # a collection whose ids its image names, or those of its texts, are
    drawn: bool = False  # its reader draws the images; its second argument is their size in pixels
    sections: bool = False  # its reader takes --report, the sections of an answer, as report=
    task: str = ""  # "choices" where each question has options to choose from; none: what its kind says
    one_pattern: bool = False  # its images are drawn so alike that their looks do not tell them apart
    known_leaks: tuple = ()  # (part of an image's name, the dataset whose test split has such images)
    train_tokenizer: Callable | None = None  # makes its own SentencePiece model, as bytes
    only_by_name: bool = False  # another version of a dataset: left out unless --only names it

    @property
    def asks(self):
        """Whether it has words to be tokenized; a dataset for classification has none."""
        return self.kind != "classification"


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
            names = " ".join(", ".join(found).split())  # on one line, whatever they are
            raise UserError(f"{where}: no column {column!r} among its columns {names:.500}")


def expect(where, value, form):
    """
    A value of JSON or of a parquet, in the form that is expected; raises UserError at any other.

    form: str, bytes, or dict for an object with any names; [form] for a list; {name: form} for an
    object that has these names, others being left out; (name, ...) where all of them are texts.
    A number is a text, too. Null is what is empty, or no bytes at all: such a sample is not
    refused but skipped, and counted as lacking what it lacks.
    """
    if isinstance(form, tuple):
        form = dict.fromkeys(form, str)
    kind = type(form) if isinstance(form, (list, dict)) else form
    if value is None or value != value:  # NaN, which pandas writes for null
        if kind is bytes:
            return None
        value = dict.fromkeys(form) if isinstance(form, dict) else kind()
    if kind is str and isinstance(value, (int, float)):
        value = str(value)
    if not isinstance(value, kind):
        raise UserError(f"{where}: {type(value).__name__} found where {kind.__name__} was expected")
    if isinstance(form, dict):
        require_columns(where, value, form)
        return {name: expect(f"{where}: {name}", value[name], form[name]) for name in form}
    if isinstance(form, list):
        return [expect(f"{where}: item {number}", item, form[0]) for number, item in enumerate(value, 1)]
    return value


@contextlib.contextmanager
def refuse_damage(path, what):
    """A UserError that names the file, in place of whatever its parser raises."""
    if isinstance(path, Path) and (pointer := lfs_pointer(path)):
        raise UserError(f"{path}: damaged {what}: {pointer}")
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: missing; fetch it again") from None
    except Exception as error:  # each parser has its own ways to fail on a broken file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: damaged {what} ({reason}); fetch it again") from None


def parse_json(where, content, form):
    """The value in a JSON text, which has the form that `expect` describes and is not empty."""
    with refuse_damage(where, "or not JSON"):
        value = json.loads(content)
    if not value:
        raise UserError(f"{where}: empty; fetch it again")
    return expect(where, value, form)


def read_json(path, form):
    with refuse_damage(path, "file"):
        content = Path(path).read_bytes()
    return parse_json(path, content, form)


def read_csv(path, columns, delimiter=","):
    """Yield a table's rows as dicts; the file may be gzipped. Refuses one that lacks a column."""
    def lines(file):
        while line := file.readline(LARGEST_LINE):  # a bomb's only line would fill the memory
            if len(line) == LARGEST_LINE:
                raise csv.Error(f"a line of more than {LARGEST_LINE} characters")
            yield line

    path = Path(path)
    opener = gzip.open if path.suffix == ".gz" else open
    with refuse_damage(path, "table"), opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(lines(file), delimiter=delimiter, restval="")
        require_columns(path, rows.fieldnames or (), columns)
        yield from rows


def open_zip(path, file=None):
    """A zip archive, to be read in place with read_member; `file` is its content, if it is open."""
    with refuse_damage(path, "zip"):
        archive = zipfile.ZipFile(file or path)
    archive.filename = str(path)
    return archive


def find_folder(archive, *folders):
    """
    The first of these folders ("name/") in which a zip archive has a member; UserError if there is none,
    or if a member is packed as read_member reads none.
    """
    prefix = next((folder for folder in folders
                   if any(member.filename.startswith(folder) for member in archive.infolist())), None)
    if prefix is None:
        first = next((member.filename for member in archive.infolist() if not member.is_dir()), "nothing")
        raise UserError(f"{archive.filename}: no folder {' or '.join(folders)} in it, the first name is "
                        f"{first!r:.120}; pack it anew so, or unpack it beside the zip")
    for member in archive.infolist():
        method = member.compress_type
        why = (f"packed by method {method} ({zipfile.compressor_names.get(method, 'unknown')})"
               if method not in READ_METHODS else "encrypted" if member.flag_bits & 1 else "")
        if why:
            raise UserError(f"{archive.filename}: {member.filename!r:.120} is {why}, which is not read here; "
                            "unpack it, and pack it anew with `zip -r` or leave it unpacked")
    return prefix


def read_member(archive, name):
    """A member's bytes; None where there is none; b"" where it is damaged or past all reason large."""
    try:
        member = archive.getinfo(name)
    except KeyError:
        return None
    if member.file_size > LARGEST_MEMBER or member.compress_type not in READ_METHODS:
        return b""
    try:
        with archive.open(member) as file:
            return file.read(member.file_size)  # no more than it claims to have
    except Exception:  # see refuse_damage
        return b""


class TarHeader(tarfile.TarInfo):
    """What a tar says of a member: tarfile reads a name into memory whole, however long it is."""

    @classmethod
    def frombuf(cls, *arguments):
        header = super().frombuf(*arguments)
        if header.type in b"xgXLK" and header.size > LARGEST_LINE:  # of attributes and long names
            raise tarfile.ReadError(f"a header of {header.size} bytes")
        return header


def read_tar(path):
    """Yield (name, bytes) of the plain files in a gzipped tar archive, in its order."""
    with refuse_damage(path, "archive"), gzip.open(path) as file:
        with tarfile.open(fileobj=file, mode="r|", tarinfo=TarHeader) as archive:
            for member in archive:
                if member.isreg():  # links and devices are passed over; nothing is ever unpacked
                    small = member.size <= LARGEST_MEMBER
                    yield member.name, archive.extractfile(member).read() if small else b""
        while file.read(1 << 20):  # the checksum stands at the end
            pass


def place(value, values):
    """Where a value stands in a list; -1 where it does not."""
    return values.index(value) if value in values else -1


def count_from(where, numbers, size):
    """
    0 or 1: from which number a column counts its `size` options or classes, of which both are published.
    Its own numbers, as texts, prove it. UserError where they have both 0 and `size`, or, being 20 or more,
    neither.
    """
    seen, last = set(numbers), str(size)
    if {"0", last} <= seen or (len(numbers) >= 20 and not {"0", last} & seen):
        which = "both" if "0" in seen else "neither"
        raise UserError(f"{where}: has {which} of 0 and {last}, so whether it counts {size} from 0 or from 1 "
                        "is not known; fetch the file as it was published")
    return int(last in seen)


def require_known(where, value, known):
    """Refuse a value that is none of those that say what a row is."""
    if value not in known:
        raise UserError(f"{where} {value!r:.80} is none of {', '.join(known)}; fetch the file as it was "
                        "published")


def multiple_choice(question, options, right):
    """
    A question with its lettered options, and the letter and text of the right one, given by its place.

    An empty question stays so, and one without a right option gets an empty answer: either is
    counted as what it is when it is skipped.
    """
    if not question.strip() or not 0 <= right < len(options) <= len(LETTERS) or not options[right]:
        return question, ""
    lettered = letter_options(options)
    return f"{question} {' '.join(lettered)}", lettered[right]


def lettered(identifier, question, options, right, **more):
    """The Record of a question and the texts of its options, of which the right one is at the place `right`."""
    asked, answer = multiple_choice(question, options, right)
    return Record(identifier, asked, answer, choices=tuple(options), **more)


def read_json_lines(path, form, **optional):
    """
    Yield the values of a file that holds one JSON value a line, each in the form expected; optional: names
    that a value may lack, and what stands in for them.
    """
    with refuse_damage(path, "file"), open(path, "rb") as file:
        empty = True
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}: line {number}"
                yield expect(where, optional | parse_json(where, line, dict) if optional else
                             parse_json(where, line, form), form)
                empty = False
        if empty:
            raise UserError(f"{path}: empty; fetch it again")


def read_image(path):
    """An image file's bytes, or None, which counts as "image missing", where there is no file."""
    content = path.read_bytes() if os.path.isfile(path) else None  # a name may be none that a disk takes
    if content is not None and (pointer := lfs_pointer(content)):
        raise UserError(f"{path}: {pointer}")
    return content


def read_named_image(folder, name):
    """read_image of a file that a dataset's text names: none outside of the folder, whatever it says."""
    inside = not os.path.isabs(name) and ".." not in Path(name).parts
    return read_image(folder / name) if inside else None


def read_parquet(path, form):
    """Yield a parquet file's rows as dicts, a few at a time: a row may hold a whole image."""
    import pyarrow.parquet

    with (refuse_damage(path, "parquet"),
          pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file):
        require_columns(path, file.schema_arrow.names, form)
        batches = file.iter_batches(batch_size=32, columns=list(form))
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        for number, row in enumerate(rows, start=1):
            yield expect(f"{path}: row {number}", row, form)


def require_splits(folder, *splits):
    """Refuse parquets whose names say no split that is read: they would be passed over without a word."""
    for path in sorted(folder.glob("*.parquet")):
        if path.name.partition("-")[0] not in splits and not path.name.startswith("."):
            raise UserError(f"{folder}: {path.name} is named after none of its splits, {', '.join(splits)}; "
                            f"rename it as {splits[0]}-00000-of-00001.parquet is, or remove it")


def read_parquets(folder, split, form):
    """Yield the rows of the hub's <split>-*.parquet, whose names say how many they are: all or none."""
    paths = sorted(folder.glob(f"{split}-*.parquet"))
    count = re.search(r"-of-(\d{5})", paths[-1].name) if paths else None
    wanted = [f"{split}-{number:05d}{count[0]}" for number in range(int(count[1]))] if count else []
    for name in wanted:
        if not any(path.name.startswith(name) for path in paths):
            raise UserError(f"{folder}: no {name}*.parquet among its {len(paths)} files; fetch it again")
    if count and len(paths) != len(wanted):
        raise UserError(f"{folder}: {len(paths)} files {split}-*.parquet, not {len(wanted)}, as they "
                        "say; remove those of another download")
    for path in paths:
        yield from read_parquet(path, form)
