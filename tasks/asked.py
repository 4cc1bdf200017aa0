"""
Questions that have no prepared split: a table of them with a folder of images, or one question about every image.

    image,question            1.png,is there a fracture?      several images with | between them; none: a text question
    {"images": ["a.png", "b.png"], "question": "what has changed?"}

Tables are those of plumbing/tables.py, and images those of formats/pictures.py, by whatever name they find them.
Whatever cannot be asked stays in the table of answers, with the reason.
"""

import contextlib
import hashlib
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

from formats.frames import ScanSettings, find_scans, settings_of
from formats.pictures import Pictures, file_of, plain
from plumbing.files import lock, require_writable, write_whole
from plumbing.flags import UserError
from plumbing.own import clean, printable
from plumbing.tables import (IMAGES, JSONS, NO_WORDS, QUESTIONS, SEPARATED, WORKBOOKS, column_of_files, find_roles,
                             image_columns, image_names, read_items, text_of)
from tasks.seen import open_trained
from tasks.summary import write_csv
from tasks.wording import Familiar

ANSWERED = ("image", "question", "answer", "probability", "cut", "repeated", "empty", "remark", "error")


@dataclass
class Row:
    """A question, and what is to be known of its answer."""
    image: str  # names of its images, as the table has them
    question: str
    pictures: tuple = ()  # (source, label) of each, as formats.frames has them
    error: str = ""  # why it was not answered
    answer: str = ""
    facts: dict = field(default_factory=dict)  # the other columns of ANSWERED


# ----------------------------------------------------------------------------- images

def open_image(path, settings=ScanSettings()):
    """The (source, label) pairs of the one image or scan in a file. Raises UserError where it cannot be read."""
    path = Path(path)
    scans, refused = find_scans([path], settings)
    if refused and not scans:
        raise UserError(f"{path}: not an image that can be read ({next(iter(refused.values()))})")
    if len(scans) > 1:
        raise UserError(f"{path}: {len(scans)} images or series are in it; name one of their files")
    return pairs_of(scans[0]) if scans else ((path, ""),)  # no image: that is said where it is decoded


def pairs_of(scan):
    return tuple(zip(scan.sources, scan.labels, strict=True))


def look_up(pictures, where, name):
    """(the (source, label) pairs of the image or scan that is called so, why there are none)."""
    try:
        if scan := pictures.find(where, name):
            return pairs_of(scan), ""
    except UserError as error:
        return (), str(error)
    last = plain(name).rpartition("/")[2].casefold()
    why = next((why for file, why in pictures.refused.items() if plain(file.name).casefold() == last),
               f"no such image in {pictures.folder}")
    return (), f"{name}: {why}"


# ----------------------------------------------------------------------------- questions

def is_table(ask):
    """Whether --ask names a table, and is no question."""
    return Path(ask).suffix.lower() in (*SEPARATED, *JSONS, *WORKBOOKS)


def read_questions(ask, images, settings=ScanSettings()):
    """
    The Rows of --ask: of a table's questions, or of one question about every image of the folder; what is worth a look
    is said on stderr. Raises UserError where there is no such table or folder, and no column of questions.
    """
    path, notes, table = Path(ask), [], is_table(ask)
    if not table and not images:
        raise UserError("--ask: a question about every image of a folder; name it with --images=")
    if table and not path.is_file():
        raise UserError(f"--ask={ask}: no such file; name a csv with the columns image and question")
    if images and not Path(images).is_dir():
        raise UserError(f"--images={images}: no such folder; name the one that holds the images")
    pictures = Pictures(Path(images or path.parent), settings)
    rows = table_rows(path, pictures, notes) if table else folder_rows(clean(ask), pictures)
    for note in (*notes, *pictures.notes()):
        print(note, file=sys.stderr)
    return rows


def table_rows(path, pictures, notes):
    """The Rows of a table of questions. notes: as plumbing.tables.read_items takes them."""
    columns, table = read_items(path, notes)
    roles = find_roles(path, columns, {"image": IMAGES, "question": QUESTIONS}, {})
    if "question" not in roles:
        raise UserError(f"{path}: no column of questions ({printable(', '.join(columns)) or 'it is empty'}); name one "
                        "question")
    several, rows = () if "image" in roles else image_columns(columns), []
    if "image" not in roles and not several:
        several = column_of_files([name for name in columns if name not in roles.values()], [row for _, row in table])
    for where, row in table:
        names, question = image_names(row, roles, several), text_of(row.get(roles["question"]), NO_WORDS)
        found = [look_up(pictures, where, name) for name in names]
        rows.append(Row("|".join(names), question, tuple(pair for pairs, _ in found for pair in pairs),
                        next((why for _, why in found if why), "" if question else "no question")))
    return rows


def folder_rows(question, pictures):
    """The Rows of one question about every image of a folder. Raises UserError where it has none."""
    rows = [Row(scan.name, question, pairs_of(scan)) for scan in pictures.scans_at(pictures.folder)]
    rows += [Row(pictures.name_of(file), question, error=why) for file, why in pictures.refused.items()]
    if not rows:
        raise UserError(f"--images={pictures.folder}: no image or scan in it; name the folder that holds them")
    return sorted(rows, key=lambda row: row.image)


def open_rows(config, record):
    """
    The Rows of eval_vqa.py's --ask, or the one of its --question, each with what tasks.wording says of its question.
    record: what the run's checkpoint was sealed with. Raises UserError.
    """
    given = {name: getattr(config, name, usual) for name, usual in vars(ScanSettings()).items()
             if getattr(config, name, usual) != usual}
    settings = replace(settings_of(record["image"]), **given)  # else scans are shown as they were to the run
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
    """
    The file of answers: --answers, or beside a table of questions, or else in out/. Raises UserError, also where a file
    is there that holds no answers: it would be lost.
    """
    table = Path(ask) if is_table(ask) else None
    place = Path(answers or (table.with_name(f"{table.stem}_answers.csv") if table else "out/answers.csv"))
    if table and place.resolve() == table.resolve():
        raise UserError(f"--answers={answers}: the table of questions itself; name another file")
    if place.exists() and not (place.is_file() and place.read_bytes().startswith(write_csv(ANSWERED, ()))):
        raise UserError(f"--answers={place}: there already, and no csv of answers; name another file, or move it away")
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
