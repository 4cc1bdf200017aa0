"""
Tables as people have them: csv, tsv, JSON and JSON lines, in the encodings and with the signs that programs write.

Columns are found whatever their capitals, spaces and signs are; what programs write for nothing is "".
"""

import ast
import csv
import difflib
import io
import json
import re

from plumbing.claims import lfs_pointer
from plumbing.flags import UserError
from plumbing.own import clean, printable

SEPARATED, JSONS = (".csv", ".tsv", ".txt"), (".json", ".jsonl", ".ndjson")
WORKBOOKS = (".xlsx", ".xls", ".xlsm", ".ods", ".numbers")
NOTHING = ("", "nan", "null", "none", "-", "?", "n/a", "#n/a", "<na>")  # what programs write for nothing
NO_WORDS = ("", "nan", "null", "#n/a", "<na>")  # the same where words are expected: "none" may be an answer
IMAGES = ("image", "images", "imagepath", "imagepaths", "imagename", "imagenames", "imgname", "imagefile", "filename",
          "filenames", "file", "files", "path", "filepath", "img", "imgpath", "picture", "film", "figurepath", "series",
          "seriespath", "dicom", "dicompath", "scan", "slide", "imageid", "imgid")  # columns of a question's images
QUESTIONS = ("question", "query", "prompt", "instruction", "questiontext", "q", "frage", "pregunta")
PICTURE = re.compile(r"\.(png|jpe?g|tiff?|bmp|webp|gif|jp2|dcm|dicom|ima|nii|nii\.gz|svs|ndpi)$", re.I)
LARGEST_CELL = 1 << 24  # characters: a report has thousands


# ----------------------------------------------------------------------------- files

def decode(path, content, notes):
    """The text of a table's bytes: UTF-8, UTF-16, or the old encoding of Windows, which is said."""
    if pointer := lfs_pointer(content):
        raise UserError(f"{path}: {pointer}")
    wide = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else {b"\0": "utf-16-be"}.get(
        content[:1], "utf-16-le" if content[1:2] == b"\0" else "")
    try:
        text = content.decode(wide or "utf-8-sig")
    except UnicodeDecodeError as error:
        try:
            if wide or b"\0" in content:
                raise error
            text = content.decode("cp1252")
            notes.append(f"{path.name}: no UTF-8, read as Windows-1252; where a letter is wrong, save it as UTF-8")
        except UnicodeDecodeError:
            raise UserError(f"{path}: not a csv in UTF-8 ({error}); save it as one") from None
    return text


def read_separated(path, text):
    """A csv's header and rows: ([text], [(number of the row, [text])]), rows without a cell left out."""
    first, _, rest = text.partition("\n")
    declared = re.fullmatch(r'"?sep=(.)"?\s*', first, re.I)  # what Excel reads, and writes
    text = rest if declared else text
    line = text.lstrip("\r\n").partition("\n")[0]
    sign = declared[1] if declared else max(",;\t|", key=lambda sign: len(next(csv.reader([line], delimiter=sign), [])))
    csv.field_size_limit(LARGEST_CELL)
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text, newline=""), delimiter=sign)]
    except csv.Error as error:
        raise UserError(f"{path}: not a csv in UTF-8 ({error}); save it as one") from None
    numbered = [(number, row) for number, row in enumerate(rows, 2 if declared else 1) if any(row)]
    (_, header), *numbered = numbered or [(1, [])]
    width = len(header)
    for number, row in numbered:
        if any(row[width:]):
            raise UserError(f"{path}: row {number} has {len(row)} cells, but there are {width} columns; "
                            "quote a cell that has the sign between cells in it")
    return header, [(number, (row + [""] * width)[:width]) for number, row in numbered]


def items_of(path, text):
    """The objects of a JSON text, [(number, dict)]: a list, an object of them by id or split, or one a line."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        try:
            items = [(number, json.loads(line)) for number, line in lines]
        except (ValueError, RecursionError):
            raise UserError(f"{path}: not JSON ({printable(str(error)):.100}); write it anew") from None
    else:
        lists = {name: some for name, some in value.items() if isinstance(some, list) and some and all(
            isinstance(item, dict) for item in some)} if isinstance(value, dict) else {}
        if isinstance(value, list):
            items = list(enumerate(value, 1))
        elif lists and len(lists) > 1 and all(isinstance(some, list) for some in value.values()):  # by split
            items = list(enumerate(({"split": name, **item} for name, some in lists.items() for item in some), 1))
        elif len(lists) == 1 and "conversations" not in lists and "messages" not in lists:
            items = list(enumerate(next(iter(lists.values())), 1))
        elif isinstance(value, dict) and value and all(isinstance(item, dict) for item in value.values()):  # by id
            items = list(enumerate(({"id": name, **item} for name, item in value.items()), 1))
        else:
            items = [(1, value)]
    for number, item in items:
        if not isinstance(item, dict):
            raise UserError(f"{path}: item {number} is {type(item).__name__}, no object with names; write a list of "
                            '{"image": ..., "question": ..., "answer": ...}')
    return items


def refuse_workbook(path):
    if path.suffix.lower() in WORKBOOKS:
        raise UserError(f"{path}: a workbook, which is not read; save its sheet as csv, and name that")


def read_items(path, notes):
    """
    The columns of a table and its rows: ([name, as it is written], [(where, {name: value})]); values of a csv are
    texts. notes: a list, to which lines are added that are to be said. Raises UserError.
    """
    suffix = path.suffix.lower()
    refuse_workbook(path)
    if suffix not in (*SEPARATED, *JSONS, ""):
        raise UserError(f"{path}: no table ({' '.join((*SEPARATED, *JSONS))}); name one, or the folder that it is in")
    text = decode(path, path.read_bytes(), notes)
    if suffix in JSONS:
        rows = [(f"{path.name}: item {number}", item) for number, item in items_of(path, text)]
        return list(dict.fromkeys(name for _, item in rows for name in item)), rows
    header, cells = read_separated(path, text)
    named = [name or f"column {place}" for place, name in enumerate(header, 1)]
    require_different(path, [plain_name(name) for name in named])
    return named, [(f"{path.name}: row {number}", dict(zip(named, row))) for number, row in cells]


def read_rows(path, notes=None):
    """A table's header, in small letters, and its rows that are not empty: (number of the row, its cells as texts)."""
    notes = [] if notes is None else notes
    if path.suffix.lower() in JSONS:
        columns, rows = read_items(path, notes)
        return [name.lower() for name in columns], [
            (number, ["|".join(list_of(item.get(name))) for name in columns])
            for number, (_, item) in enumerate(rows, 1)]
    refuse_workbook(path)
    header, rows = read_separated(path, decode(path, path.read_bytes(), notes))
    return [name.lower() for name in header], rows


# ----------------------------------------------------------------------------- columns

def plain_name(name):
    """A column's name without capitals, spaces and signs."""
    return re.sub(r"[\W_]", "", name).lower()


def require_different(path, names):
    """Refuse a header in which a name stands twice."""
    for name in names:
        if name and names.count(name) > 1:
            raise UserError(f"{path}: {names.count(name)} columns are named {name!r}; leave one of them")


def find_column(path, header, known):
    """The place of the first of these columns that the header has, or None; refused where it is there twice."""
    names = list(map(plain_name, header))
    for name in known:
        require_different(path, [other for other in names if other == name])
        if name in names:
            return names.index(name)
    return None


def find_roles(path, columns, roles, given):
    """
    {role: column} of a table. roles: {role: names that its column may have, in small letters, without signs; the first
    that is there counts}; given: {role: column}, by --columns. Raises UserError where a column is not there.
    """
    places = {plain_name(name): name for name in reversed(columns)}
    for role, name in given.items():
        if plain_name(name) not in places:
            near = difflib.get_close_matches(name, columns, n=1, cutoff=0.0)
            raise UserError(f"--columns={role}:{name}: {path.name} has no such column; did you mean "
                            f"{printable(near[0]) if near else 'another file'}?")
    found = {role: places[plain_name(name)] for role, name in given.items()}
    taken = set(found.values())
    for role, known in roles.items():
        name = next((places[name] for name in known if name in places and places[name] not in taken), None)
        if role not in found and name is not None:
            found[role] = name
            taken.add(name)
    return found


def image_columns(columns):
    """Columns image1, image2, ... of one image each."""
    numbered = [(int(match[1]), name) for name in columns
                if (match := re.fullmatch(r"(?:image|img|picture)(?:path)?(\d{1,2})", plain_name(name)))]
    return [name for _, name in sorted(numbered)]


def column_of_files(columns, rows):
    """[name] of the first of these columns whose cells, but for empty ones, end as files of pictures do; else []."""
    for name in columns:
        cells = [cell for row in rows for cell in list_of(row.get(name))]
        if cells and all(map(PICTURE.search, cells)):
            return [name]
    return []


def parse_columns(text, roles):
    """{role: column} of --columns=image:filename,question:q. Raises UserError where there is no such role."""
    given = {}
    for entry in filter(None, map(str.strip, text.split(","))):
        role, sign, name = (part.strip() for part in entry.partition(":"))
        if role not in roles or not name:
            near = difflib.get_close_matches(role, roles, n=1, cutoff=0.0)[0]
            raise UserError(f"--columns={entry:.80}: " + (
                f"no column is {role!r:.40}; did you mean {near}? There are {', '.join(roles)}" if role not in roles
                else f"name the column, as {role}:name"))
        if role in given:
            raise UserError(f"--columns: {role} is named twice")
        given[role] = name
    return given


# ----------------------------------------------------------------------------- cells

def text_of(value, nothing=NOTHING):
    """A cell as a clean text; "" where it says nothing. An object or a list is written as JSON."""
    if value is None or value != value:
        return ""
    text = clean(json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict, bool)) else str(value))
    return "" if text.casefold() in nothing else text


def without_zeros(texts):
    """A column's texts, whole numbers without the ".0" that pandas adds to all of them beside an empty cell."""
    there = [text for text in texts if text]
    added = len(there) < len(texts) and all(re.fullmatch(r"-?\d+\.0", text) for text in there)
    return [text.removesuffix(".0") for text in texts] if added else texts


def value_of(cell):
    """What a cell holds: a text that is a list or an object in JSON or in Python's way is that."""
    if not isinstance(cell, str) or not re.fullmatch(r"\s*(\[.*\]|\{.*\})\s*", cell, re.S) or len(cell) > LARGEST_CELL:
        return cell
    for parse in (json.loads, ast.literal_eval):  # of which the latter reads values alone, and runs nothing
        try:
            return parse(cell.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            pass
    return cell


def list_of(cell, signs="|;"):
    """The texts in a cell: a list, or texts with one of these signs between them."""
    value = value_of(cell)
    if isinstance(value, dict):
        return [text_of(value)]
    some = value if isinstance(value, (list, tuple)) else re.split(f"[{signs}]", value) if isinstance(
        value, str) and signs else [value]
    return [text for text in map(text_of, some) if text]


def image_names(row, roles, several):
    """The names of a row's images. several: its columns, as image_columns gives them; roles: as find_roles does."""
    cells = [row.get(name) for name in several] if "image" not in roles else [row.get(roles["image"])]
    if "image" in roles and not list_of(cells[0]):  # rows of one image may say "image", those of several "images"
        cells = [cell for name, cell in row.items() if plain_name(name) in ("image", "images")]
    found = []
    for cell in cells:
        value = value_of(cell)
        if isinstance(value, (list, tuple)):
            found += [name for item in value for name in (
                [text_of(next((item[key] for key in ("image_path", "path", "image", "file_name", "url") if key in item),
                              None))] if isinstance(item, dict) else [text_of(item)])]
        else:
            found += list_of(value)
    return [name for name in found if name]
