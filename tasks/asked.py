"""
Questions that have no prepared split: a table of them with a folder of images, or one question about every image.

    image,question            1.png,is there a fracture?      several images with | between them; none: a text question
    {"images": ["a.png", "b.png"], "question": "what has changed?"}

Images are image files and scans below the folder, named by their path from there, by their file's name, or by that
without its end. Whatever cannot be asked stays in the table of answers, with the reason.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import sys
import unicodedata
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from plumbing.files import lock, require_writable, write_whole
from plumbing.flags import UserError
from plumbing.own import clean, files_below
from plumbing.own import written as as_written
from plumbing.pixels import resize_image
from scans.frames import Frame, ScanSettings, decode_picture, find_scans
from tasks.foreign import read_objects
from tasks.seen import open_trained
from tasks.summary import write_csv
from tasks.wording import Familiar

SEPARATED, LINES = (".csv", ".tsv"), (".jsonl", ".ndjson")
IMAGES = ("image", "images", "imagepath", "imagename", "imagefile", "filename", "file", "path", "img", "scan", "series")
QUESTIONS = ("question", "query", "prompt", "instruction", "frage", "pregunta")
ANSWERED = ("image", "question", "answer", "probability", "cut", "repeated", "empty", "remark", "error")


@dataclass
class Row:
    """A question, and what is to be known of its answer."""
    image: str  # names of its images, as the table has them
    question: str
    pictures: tuple = ()  # (source, label) of each, as scans.frames has them
    error: str = ""  # why it was not answered
    answer: str = ""
    facts: dict = field(default_factory=dict)  # the other columns of ANSWERED


# ----------------------------------------------------------------------------- images

def pixels_of(source, size, how):
    """Pixels of a scan's source, (H, W, 3) uint8, brought to size as prepare/ brings them. Raises Unreadable."""
    return np.array(resize_image(decode_picture(source, 2 * size), size, how))


def open_image(path, settings=ScanSettings()):
    """The (source, label) pairs of the one image or scan in a file. Raises UserError where it cannot be read."""
    path = Path(path)
    scans, refused = find_scans([path], settings)
    if refused and not scans:
        raise UserError(f"{path}: not an image that can be read ({next(iter(refused.values()))})")
    if len(scans) > 1:
        raise UserError(f"{path}: {len(scans)} images or series are in it; name one of their files")
    return pairs_of(scans[0]) if scans else ((path, ""),)  # whose name does not say that it is an image


def pairs_of(scan):
    return tuple(zip(scan.sources, scan.labels, strict=True))


def name_key(name):
    """A name as it is compared: small letters, é one letter, / between folders."""
    return unicodedata.normalize("NFC", name.replace("\\", "/")).casefold().strip("/")


def without_end(name):
    return re.sub(r"(\.nii)?\.[a-z][a-z0-9]{1,4}$", "", name)


def file_of(source):
    return source.file if isinstance(source, Frame) else source


class Folder:
    """The images below a folder, and what they are called."""

    def __init__(self, folder, settings=ScanSettings()):
        """Raises UserError where it is no folder, or has no image."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"--images={folder}: no such folder; name the one that holds the images")
        files = [path for path in files_below(self.folder) if path.name[0] != "." and path.is_file()]
        self.scans, self.refused = find_scans(files, settings, self.folder)
        self.called = [defaultdict(dict) for _ in range(3)]  # by path, file's name, and that without its end
        for scan in self.scans:
            self.enter(scan.name, pairs_of(scan))
            for file in {file_of(source) for source in scan.sources} if len(scan.sources) > 1 else ():
                self.enter(self.name_of(file), tuple(pair for pair in pairs_of(scan) if file_of(pair[0]) == file))
        if not self.scans and not self.refused:
            raise UserError(f"--images={folder}: no image or scan in it; name the folder that holds them")

    def name_of(self, file):
        return as_written(os.path.relpath(file, self.folder))

    def enter(self, name, pairs):
        key = name_key(name)
        last = key.rpartition("/")[2]
        for level, some in zip(self.called, (key, last, without_end(last))):
            level[some][pairs] = name

    def find(self, name):
        """(the (source, label) pairs of the image or scan that is called so, why there are none)."""
        key = name_key(name)
        last = key.rpartition("/")[2]
        for level, some in zip(self.called, (key, last, without_end(last))):
            if len(found := level.get(some, {})) > 1:
                return (), f"{len(found)} images are called {name}: name it by its path"
            if found:
                return next(iter(found)), ""
        for file, why in self.refused.items():
            if name_key(self.name_of(file)).endswith(last):
                return (), f"{name}: {why}"
        return (), f"{name}: no such image in {self.folder}"


# ----------------------------------------------------------------------------- questions

def read_table(path):
    """[{column: text or list}] of a csv, tsv or file of JSON lines, columns in small letters without signs."""
    if path.suffix.lower() in LINES:
        rows = [line for _, line in read_objects(path)]
    else:
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not a csv in UTF-8 ({error}); save it as one") from None
        sign = max(",;\t", key=text.partition("\n")[0].count)
        try:
            rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=sign))
        except csv.Error as error:
            raise UserError(f"{path}: not a csv in UTF-8 ({error}); save it as one") from None
    return [{re.sub(r"[\W_]", "", str(name)).lower(): cell for name, cell in row.items()} for row in rows]


def read_questions(ask, images, settings=ScanSettings()):
    """
    The Rows of --ask: of a table's questions, or of one question about every image of the folder. Raises UserError
    where there is no such table or folder, and no column of questions.
    """
    path = Path(ask)
    if path.suffix.lower() not in (*SEPARATED, *LINES):
        if not images:
            raise UserError("--ask: a question about every image of a folder; name it with --images=")
        folder = Folder(images, settings)
        rows = [Row(scan.name, clean(ask), pairs_of(scan)) for scan in folder.scans]
        rows += [Row(folder.name_of(file), clean(ask), error=why) for file, why in folder.refused.items()]
        return sorted(rows, key=lambda row: row.image)
    if not path.is_file():
        raise UserError(f"--ask={ask}: no such file; name a csv with the columns image and question")
    table = read_table(path)
    columns = {name for row in table for name in row}
    question, image = (next((name for name in known if name in columns), None) for known in (QUESTIONS, IMAGES))
    if question is None:
        raise UserError(f"{path}: no column of questions ({', '.join(sorted(columns)) or 'it is empty'}); name one "
                        "question")
    rows = [Row(names, clean(str(row.get(question) or "")))
            for row in table for names in [row.get(image) or ""]]
    folder = Folder(images or path.parent, settings) if any(row.image for row in rows) else None
    for row in rows:
        names = row.image if isinstance(row.image, list) else str(row.image).split("|")
        names = [name.strip() for name in map(str, names) if name.strip()]
        found = [folder.find(name) for name in names]
        row.image = "|".join(names)
        row.pictures = tuple(pair for pairs, _ in found for pair in pairs)
        row.error = next((why for _, why in found if why), "" if row.question else "no question")
    return rows


def open_rows(config, record):
    """
    The Rows of eval_vqa.py's --ask, or the one of its --question, each with what tasks.wording says of its question.
    record: what the run's checkpoint was sealed with. Raises UserError.
    """
    window = record["image"].get("window", "auto") if config.window == "auto" else config.window
    settings = ScanSettings(window, config.slices)
    if config.question:
        if config.image and not Path(config.image).is_file():
            what = "a folder" if Path(config.image).is_dir() else "no such file"
            raise UserError(f"--image={config.image}: {what}; name one image file")
        rows = [Row(config.image, config.question, open_image(config.image, settings) if config.image else ())]
    else:
        rows = read_questions(config.ask, config.images, settings)
    familiar = Familiar(open_trained(record, config.shards_dir))
    for row in rows:
        row.facts["remark"] = "not known" if familiar.unknown else familiar.remark(row.question)
    if familiar.unknown:
        print(familiar.remark(""), file=sys.stderr)
    return rows


# ----------------------------------------------------------------------------- answers

def yes_no(fact):
    return "yes" if fact else "no"


def place_of_answers(ask, answers):
    """The file of answers: --answers, or beside a table of questions, or else in out/. Raises UserError."""
    table = Path(ask) if Path(ask).suffix.lower() in (*SEPARATED, *LINES) else None
    place = Path(answers or (table.with_name(f"{table.stem}_answers.csv") if table else "out/answers.csv"))
    if table and place.resolve() == table.resolve():
        raise UserError(f"--answers={answers}: the table of questions itself; name another file")
    require_writable(place.parent, "answers")
    return place


def facts_of(rows, answerer):
    """What answers stand on, as a text: the questions, their images as they lie on the disk, and what answers."""
    stats = {file: (file.stat().st_size, file.stat().st_mtime_ns)
             for file in {file_of(source) for row in rows for source, _ in row.pictures}}
    asked = [(row.image, row.question, [(str(source), stats[file_of(source)], label) for source, label in row.pictures])
             for row in rows]
    return hashlib.sha256(json.dumps([asked, answerer]).encode()).hexdigest()


class Kept:
    """The answers so far, a line each in a file beside the one that is to be, so that a killed run goes on."""

    def __init__(self, path, rows, facts):
        """Answers of before are put into the rows where they stand on the same facts; `done` are their numbers."""
        self.path, self.rows, self.done = path, rows, set()
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        for line in lines[1:] if lines[:1] == [facts] else []:
            with contextlib.suppress(ValueError):  # the last one may be torn
                number, *known = json.loads(line)
                rows[number].answer, rows[number].error, rows[number].facts = known
                self.done.add(number)
        write_whole(self.path, "".join([f"{facts}\n", *map(self.line, sorted(self.done))]).encode())
        self.file = open(self.path, "a", encoding="utf-8")

    def line(self, number):
        row = self.rows[number]
        return json.dumps([number, row.answer, row.error, row.facts]) + "\n"

    def note(self, number):
        """Keep what a row has by now."""
        self.file.write(self.line(number))
        self.file.flush()


@contextlib.contextmanager
def written(config, rows, answerer):
    """
    A block that answers the Rows of --ask, into a csv, which is written whole at its end, or that of --question, which
    is printed. Yields the Kept, which is to be told of each row. answerer: what the answers depend on beside the flags.
    """
    if config.question:
        yield SimpleNamespace(done=(), note=lambda number: None)  # nothing is kept of a single answer
        return print_answer(rows[0])
    place = place_of_answers(config.ask, config.answers)
    flags = [getattr(config, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "base_bits")]
    with lock(place.with_name(f".{place.name}.lock"), "answering"):
        kept = Kept(place.with_name(f".{place.name}.so_far"), rows, facts_of(rows, [*answerer, *flags]))
        yield kept
        write_answers(place, rows)
        kept.file.close()
        kept.path.unlink()


def print_answer(row):
    """Print an answer, and what is remarked of its question beside it. Raises UserError where there is none."""
    if row.error:
        raise UserError(f"--question: {row.error}")
    print(row.answer)
    if row.facts["remark"] not in ("", "not known"):
        print(f"this question is {row.facts['remark']}", file=sys.stderr)


def write_answers(place, rows):
    """Write the csv of answers, whole, and say how many there are and how many questions have none."""
    cells = [[row.image, row.question, row.answer, *(row.facts.get(name) for name in ANSWERED[3:-1]), row.error]
             for row in rows]
    write_whole(place, write_csv(ANSWERED, cells))
    failed = [row for row in rows if row.error]
    print(f"{place}: {len(rows) - len(failed):,} answers" + (
        f", and {len(failed):,} questions without one, with the reason, such as: {failed[0].error}" if failed else ""))
