"""
Which layout a folder or file of one's own has, and its dataset: what `--own` of prepare/all.py runs.

Where a folder could be of several layouts, the first of these counts, and the others are named: conversations,
questions, boxes, studies with reports, images with labels.
"""

import functools
import hashlib
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from data import View
from formats.frames import Frame, ScanSettings, decode_picture
from formats.pictures import Pictures, file_of, is_left_by_programs
from plumbing.flags import UserError
from plumbing.own import TABLES, files_below, own_path, printable
from plumbing.shards import Shard
from plumbing.tables import JSONS, SEPARATED, WORKBOOKS, find_roles, parse_columns, plain_name, read_items
from prepare.choices import group_equals
from prepare.classify import group_alike
from prepare.datasets import Dataset
from prepare.folder import compared, names_for, prepare_folder, prepare_listing, skipped_of
from prepare.listing import ROLES as LISTED
from prepare.listing import SPLITS, folders_in
from prepare.own import Wanted
from prepare.own_boxes import LARGEST_JSON, find_sources, prepare_boxes
from prepare.own_boxes import ROLES as BOX_ROLES
from prepare.own_chats import ROLES as CHAT_ROLES
from prepare.own_chats import read_chats, turns_column
from prepare.own_page import write_page
from prepare.own_pictures import views_of, written_name
from prepare.own_questions import ROLES, read_questions, roles_of, split_of
from prepare.own_splits import LEAST_ID, complete_names, divide, fold_targets, hash_names, hide
from prepare.own_studies import ROLES as STUDY_ROLES
from prepare.own_studies import find_studies, read_studies
from prepare.shards import ImageSettings, write_dataset

MOST_TABLES = 64  # of a folder that are looked into: more are no tables of samples, but a file an image
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")
LABELS = {"image": (*LISTED["image"], *ROLES["image"]),
          "label": (*LISTED["label"], "class", "classes", "category", "diagnosis")}
MORE_ROLES = ("label", "findings", "impression", "report", "comparison", "indication", "view")  # of --columns
EXAMPLES = {  # layout -> (names of columns, or words for files, that it has; its first two rows)
    "questions": (("image", "question", "answer"), "image,question,answer | 1.png,what is shown?,a fracture"),
    "choices": (("question", "a", "b", "answer"), "question,A,B,answer | which drug?,aspirin,heparin,B"),
    "conversations": (("image", "conversations", "messages"),
                      '{"image": "1.png", "conversations": [{"from": "human", "value": "<image>what is shown?"}, | '
                      '{"from": "gpt", "value": "a fracture"}]}'),
    "labels": (("path", "image", "label", "class"), "path,label | 1.png,benign"),
    "boxes": (("image", "label", "x1", "y1", "x2", "y2", "x", "y", "w", "h"),
              "image,label,x1,y1,x2,y2 | 1.png,cyst,10,10,90,80"),
    "reports": (("study", "image", "findings", "impression", "report"),
                "study,image,findings,impression | s1,1.png,Clear lungs.,Normal."),
    "class folders": (("pictures", "folders"), "benign/1.png | malignant/2.png"),
    "study folders": (("pictures", "texts", "folders"), "ann/1.png | ann/report.txt"),
}


# ----------------------------------------------------------------------------- what is there

class Found(NamedTuple):
    """What may be samples in a folder or file."""
    tables: dict  # conversations, questions or labels -> [(file, columns, rows, split that its name says)]
    others: list  # (file, columns) of tables that are none of them
    notes: list  # lines about how they were read
    passed: list  # lines about tables that are passed over


def list_tables(path, passed):
    """The files that may be tables: the path, or those in its folder. passed: takes lines about those left out."""
    if path.is_file():
        return [path]
    files = [file for file in files_below(path) if not is_left_by_programs(file) and file.is_file()]
    all_tables = [file for file in files if file.suffix.lower() in (".csv", ".tsv", *JSONS)]
    tables = [file for file in all_tables if file.stat().st_size <= LARGEST_JSON]
    if large := [file for file in all_tables if file not in tables]:
        passed.append(f"{large[0].name}: a table of more than {LARGEST_JSON >> 20:,} MiB is not looked into; divide "
                      "it, as into train, validation and test")
    if len(tables) > MOST_TABLES:
        kept = [file for file in tables if file.parent == path][:MOST_TABLES]
        passed.append(f"{len(tables) - len(kept):,} of {len(tables):,} tables are not looked into, as there are more "
                      f"than {MOST_TABLES}; join them into one")
        tables = kept
    return tables


def kind_of(file, columns, given):
    """Whether a table is of conversations, questions or labels; "" where of none."""
    if turns_column(columns):
        return "conversations"
    there = {role: name for role, name in given.items() if plain_name(name) in map(plain_name, columns)}
    if len(there) < len(given):
        return ""
    if roles_of(file, columns, {role: name for role, name in there.items() if role in ROLES}):
        return "questions"
    return "labels" if len(find_roles(file, columns, LABELS, {role: there[role] for role in LABELS if role in there})
                           ) == 2 else ""


def look_into(path, given):
    """The Found of a folder or file. given: {role: column}. UserError for a file that is no table."""
    found = Found({}, [], [], [])
    for file in list_tables(path, found.passed):
        try:
            columns, rows = read_items(file, notes := [])
        except UserError as error:
            if path.is_file():
                raise
            found.passed.append(str(error))
            continue
        kind = kind_of(file, columns, given) if rows else ""
        if not kind:
            found.others.append((file, columns))
            continue
        names = [*file.relative_to(path).parent.parts, *re.split(r"[\W_]+", file.stem)] if file != path else []
        splits = (split_of(name.rstrip("0123456789")) for name in names)
        split = next((split for split in splits if split in SPLITS.values()), "")
        found.tables.setdefault(kind, []).append((file, columns, rows, split))
        found.notes.extend(notes)
    return found


def refuse(path, found):
    """Raise UserError for what is not understood: what is there, and the three layouts that are nearest to it."""
    files = [path] if path.is_file() else [file for file in files_below(path) if not is_left_by_programs(file)]
    ends = Counter(file.suffix.lower() for file in files)
    columns = [printable(name)[:40] for _, names in found.others for name in names]
    there = {"folders": path.is_dir() and folders_in(path), "texts": ends[".txt"],
             "pictures": ends.keys() - {*SEPARATED, *JSONS, *WORKBOOKS}}
    words = {*map(plain_name, columns), *(word for word in there if there[word])}
    nearest = sorted(EXAMPLES, key=lambda name: -len(words & set(EXAMPLES[name][0])))[:3]
    books = [file.name for file in files if file.suffix.lower() in WORKBOOKS]
    has = (f"columns {', '.join(columns):.200}" if columns else
           f"{printable(books[0])}, a workbook, which is to be saved as csv" if books else
           ", ".join(f"{count:,} files {end or 'without an end'}" for end, count in ends.most_common(3)) or "no file")
    archives = [f"unpack {printable(file.name)}" for file in files if file.suffix.lower() in ARCHIVES]
    has += "".join(f"; {printable(why):.200}" for why in [*found.passed, *archives][:1])
    raise UserError(f"{path}: not understood, it has {has}; the nearest layouts are "
                    + "; ".join(f"{name}: {EXAMPLES[name][1]}" for name in nearest)
                    + "; name columns as --columns=image:theirs,question:theirs")


def recognise(path, config, given):
    """
    (form, what its reader takes, notes) of a folder or file: tables of conversations, questions or labels, sources of
    boxes or studies, or the path of class folders. Says what else is there. Raises UserError.
    """
    found, boxes = look_into(path, given), find_sources(path, given)
    ways = {form: found.tables[form] for form in ("conversations", "questions") if form in found.tables}
    if boxes:
        ways["boxes"] = boxes
    if studies := find_studies(path, config.columns):
        ways["studies"] = studies
    folders = [folder.name.lower() for folder in folders_in(path)] if path.is_dir() else []
    if "labels" in found.tables and not boxes:
        ways["labels"] = found.tables["labels"]
    if len(folders) > 1 or SPLITS.keys() & set(folders):
        ways["class folders"] = path
    if not ways:
        refuse(path, found)
    for why in found.passed[:3]:
        print(f"  passed over: {printable(why)}")
    form, *others = ways
    others = [other for other in others if other != "class folders" or form == "labels"]  # images lie in folders
    if others:
        print(f"{printable(path.name)}: {form} count, and {' and '.join(others)} in it are passed over; for those name "
              "their file or folder as --own")
    return form, ways[form], found.notes


def require_used(form, source, given):
    """Raise UserError where what is read has no column of those that --columns names."""
    used = {"labels": LISTED, "boxes": BOX_ROLES, "studies": STUDY_ROLES, "questions": ROLES,
            "conversations": CHAT_ROLES, "class folders": ()}[form]
    if form == "boxes" and "csv" not in source or form == "studies" and source[0].suffix.lower() not in TABLES:
        used = ()
    if unused := [f"{role}:{name}" for role, name in given.items() if role not in used]:
        raise UserError(f"--columns={unused[0]}: " + (
            f"{form} have no column for that, but for {', '.join(used)}" if used else
            f"no table has it, and what was found, {form}, is none; correct it, or leave it out"))


# ----------------------------------------------------------------------------- patients and groups

class Shown(NamedTuple):
    """A Draft with the pictures that were found of it, and what stands for its patient and study."""
    record: object  # as the Draft's
    split: str
    scans: list  # Scan or None, of each View without bytes
    patient: str  # as it is written, or as a header says it
    hashes: tuple  # of patient and study


def named_views(record):
    """The Views of a Record that name a picture and do not hold it."""
    return [view for view in record.views() if view.image is None]


def find_pictures(path, own, pictures):
    """The Shown of each Draft, and where their patients come from; "" where none is named."""
    scans = [[pictures.find(f"{draft.where}", view.name) for view in named_views(draft.record)]
             for draft in own.drafts]
    named = [next((scan.patient for scan in some if scan and scan.patient), "") for some in scans]
    if len(set(named) - {""}) == 1:  # as programs write that take names out: their studies count
        named = [next((scan.study or scan.patient for scan in some if scan and scan.patient), "") for some in scans]
    patients = complete_names([draft.patient for draft in own.drafts], named, own.notes)
    studies = [draft.record.study for draft in own.drafts]
    hashes = zip(hash_names(path, patients), hash_names(path, studies))
    by = (own.grouped_by if any(draft.patient for draft in own.drafts) else "the headers of scans" if any(patients) else
          "studies" if any(studies) else "")
    return [Shown(draft.record, draft.split, *more) for draft, *more in zip(own.drafts, scans, patients, hashes)], by


def name_of(one):
    """What a Shown is never divided from, as it is called; "" where that is not known."""
    names = ("patient", one.patient), ("study", one.record.study)
    return next((f"{kind} {name.casefold()}" for kind, name in names if name), "")


def group_of(one):
    """The same as it is written: by the hash."""
    return next((f"{kind} {name}" for kind, name in zip(("patient", "study"), one.hashes) if name), "")


def give_groups(shown):
    """
    A name for each sample of what is never divided: its patient, else its study, else the samples whose images are like
    its own, or which ask the same about no image.
    """
    if all(map(name_of, shown)):  # no picture need be looked at
        return [name_of(one) for one in shown]
    sources = list(dict.fromkeys(source for one in shown for source in pictures_of(one)))  # many ask about one image
    alike = dict(zip(sources, group_alike(sources)))
    equal = group_equals([(str(number), one.record.question) for number, one in enumerate(shown)])
    groups, leader = [], {}

    def top(mark):
        while leader.setdefault(mark, mark) != mark:
            mark = leader[mark]
        return mark

    marks = []
    for number, one in enumerate(shown):
        own = [alike[source] for source in pictures_of(one)] or [f"text {equal[number] or number}"]
        named = [name_of(one)] if name_of(one) else []
        marks.append((named, own))
        for mark in own[1:] if not named else ():
            leader[top(mark)] = top(own[0])
    owners = {}
    for named, own in marks:
        for mark in own if named else ():
            owners.setdefault(top(mark), named[0])
    for named, own in marks:
        groups.append(named[0] if named else owners.get(top(own[0]), f"like {top(own[0])}"))
    return groups


def pictures_of(one):
    """The Scans' pictures and the bytes that a Shown has."""
    given = [view.image for view in one.record.views() if view.image is not None]
    return [*given, *(source for scan in one.scans if scan for source in scan.sources)]


def digest(shown):
    """A text that changes with any word, split or picture, by the files' sizes and times alone."""
    checksum, files = hashlib.sha256(), set()
    for one in shown:
        sources = [scan and scan.sources for scan in one.scans]
        checksum.update(ascii((one.record, one.split, one.patient, sources)).encode())
        files |= {file_of(source) for scan in one.scans if scan for source in scan.sources}
    for file in sorted(file for file in files if os.path.isfile(file)):
        checksum.update(ascii((os.stat(file).st_size, os.stat(file).st_mtime_ns)).encode())
    return f"{len(shown):,} samples, {checksum.hexdigest()[:16]}"


# ----------------------------------------------------------------------------- records

def to_shares(boxes, source, pixels):
    """A record's boxes in shares of its image; None where they are in pixels of one that is missing or unreadable."""
    if not boxes or not pixels:
        return boxes
    try:
        width, height = decode_picture(source).size
    except Exception:  # each decoder has its own ways to fail; it is counted as unreadable when it is written
        width = height = 1
    return {label: tuple((x1 / width, y1 / height, x2 / width, y2 / height) for x1, y1, x2, y2 in some)
            for label, some in boxes.items()}


def record_of(one, group, hashed, pixels=False):
    """
    The Record of a Shown with its pictures. group: of what is never divided; hashed: {name of a scan: hash};
    pixels: whether its boxes are.
    """
    (patient, study), scans, parts = one.hashes, iter(one.scans), []
    for part in one.record.parts:
        if isinstance(part, str) or part.image is not None:
            parts.append(part)
        else:
            scan = next(scans)
            name = hide(written_name(scan, part.name, hashed) if scan else part.name, one.patient, patient)
            parts += views_of(scan, name, part.role) if scan else [View(None, name, part.role)]
    more = {"id": hide(one.record.id, one.patient, patient), "study": study, "group": group, "parts": tuple(parts)}
    if len(parts) == 1 and isinstance(parts[0], View) and not parts[0].role:
        more |= {"parts": (), "image": parts[0].image, "image_name": parts[0].name}
    boxes = one.record.boxes
    if boxes is not None:
        source = next(iter(pictures_of(one)), None)
        boxes = to_shares(boxes, source, pixels and source is not None)
    return replace(one.record, boxes=boxes, **more)


# ----------------------------------------------------------------------------- what is said and written

def say(path, own, shown, grouped_by, settings):
    """What was recognised, and counts of it, before it is written; {what: number} of them."""
    views = [view for one in shown for view in one.record.views()]
    names = {view.name for view in views}
    frames = sum(isinstance(source, Frame) for one in shown for source in pictures_of(one))
    counts = {"samples": len(shown), "images": len(names), "pictures of scans": frames,
              "patients": len({one.patient for one in shown} - {""}),
              "conversations of several turns": sum(bool(one.record.turns) for one in shown),
              "of several images": sum(len(one.record.views()) > 1 for one in shown)}
    numbers = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
    print(f"{printable(path.name)}: {own.form}: {numbers}")
    splits = Counter(one.split for one in shown if one.split)
    kinds = Counter(one.record.type for one in shown if one.record.type)
    lost = lost_of(shown)
    lines = [f"splits are given: {', '.join(f'{n:,} {split}' for split, n in splits.items())}"] if splits else []
    lines += [f"types: {', '.join(f'{n:,} {printable(kind)}' for kind, n in kinds.most_common(12))}"] if kinds else []
    same = "show alike images" if views else "ask the same"
    lines += [f"patients are known by {printable(grouped_by)}; in what is written hashes stand for them" if grouped_by
              else f"no patient is named: samples that {same} stay on one side; a column that names them is given as "
              "--columns=patient:its name"]
    told = [one for one in shown if len(one.patient) >= LEAST_ID and one.patient.casefold() in " ".join(
        [one.record.context, one.record.question, one.record.answer, *sum(one.record.turns, ())]).casefold()]
    lines += [f"{len(told):,} samples have their patient's id in their words, {told[0].record.id} the first: words are "
              "written as they are"] if told else []
    lines += [f"{len(lost):,} of {len(views):,} images are not there, {printable(lost[0]):.120} the first: their "
              "samples are skipped"] if lost else []
    asked = [f"--{name}" for name, value in vars(settings).items() if value != getattr(ScanSettings(), name)]
    lines += [f"{' and '.join(asked)}: there is no scan here to which that applies"] if asked and not frames else []
    for line in own.notes + lines:
        print(f"  {printable(line)}", flush=True)
    return counts


def lost_of(shown):
    """The names of images that are not there."""
    return [view.name for one in shown for view, scan in zip(named_views(one.record), one.scans) if scan is None]


def require_there(path, shown):
    """Raise UserError where images are named, and not one of them is there."""
    lost = lost_of(shown)
    if lost and len(lost) == sum(len(one.record.views()) for one in shown):
        folder = path if path.is_dir() else path.parent
        archives = [file.name for file in files_below(folder) if file.suffix.lower() in ARCHIVES]
        what = ("nothing is fetched, so download them, and name their files" if re.match(r"\w+://", lost[0]) else
                f"unpack {printable(archives[0])}" if archives else "paths start at the table's folder")
        raise UserError(f"{path}: none of its {len(lost):,} images is there, {lost[0]:.120} the first; {what}")


def facts_of(config, own, shown, grouped_by, tokenizer):
    """What the manifests of a dataset say, and what makes it stale."""
    facts = {"listing": digest(shown), "grouped_by": grouped_by or "alike images",
             "tokenizer_sha256": tokenizer.sha256}
    facts |= {"system": tokenizer.system} if tokenizer.system else {}
    facts |= {"task": own.task} if own.task else {}
    facts |= {"reasoning": config.reasoning} if any(one.record.reasoning for one in shown) else {}
    facts |= {"box_format": config.box_format, "augment": config.augment} if own.kind == "boxes" else {}
    return facts | ({"report": config.report} if own.kind == "reports" else {})


def say_splits(target):
    """Say what each split of a dataset holds, and what was skipped of it."""
    for folder in (target / split for split in ("train", "validation", "test") if (target / split).is_dir()):
        shard = Shard(folder)
        print(f"  {folder.name}: {len(shard):,} samples of {shard.manifest['images']:,} images{skipped_of(shard)}")


def boxes_in_pixels(shown, notes):
    """Whether boxes are in pixels, not in shares of their image: the largest number says it, and notes say which."""
    edges = [abs(edge) for one in shown for some in (one.record.boxes or {}).values() for box in some for edge in box]
    pixels = max(edges, default=0) > 1.5  # shares of the image may lie a little beyond it
    if edges:
        notes.append(f"boxes are corners in {'pixels' if pixels else 'shares of the image'}: the largest number is "
                     f"{max(edges):g}")
    return pixels


def write(target, path, own, shown, groups, facts, tokenizer, workers, complete):
    """Split and write what was understood, and say what each split holds. complete: (Shown, group) -> Record."""
    part, given = facts.get("folds", {"folds": 0, "fold": 0}), [one.split for one in shown]
    if not any(given):
        print(f"  fold {part['fold']} of {part['folds']} is the test split, the others train" if part["folds"] else
              "  a split is made, 70 : 10 : 20")
    labels = [(one.record.type,) if one.record.type else () for one in shown]
    splits, sizes = divide(path, groups, labels, given, part["folds"], part["fold"]), Counter(groups)
    hashed = {name_of(one): group_of(one) for one in shown}
    written = [hashed.get(group, group) if sizes[group] > 1 or not group.startswith("like ") else ""
               for group in groups]
    dataset = Dataset(name=target.name, kind=own.kind, task=own.task, licence="yours", access="yours", megabytes=0,
                      page="", layouts=(), counts=Counter(splits), read=lambda raw: (
                          (split, complete(one, group)) for one, group, split in zip(shown, written, splits)))
    workers = workers or min(os.cpu_count(), 1 + len(shown) // 200)  # each first loads what the script does
    write_dataset(target, dataset, path, {}, tokenizer.path.read_bytes(), facts, workers,
                  needed=[split for split in ("train", "test") if split in splits])
    say_splits(target)


def prepare_samples(config, own, pictures, wanted, tokenizer):
    """Prepare what a reader understood, an Own, each fold that is wanted. Returns the last dataset's name."""
    path, shards_dir = own_path(config.own), Path(config.shards_dir)
    shown, grouped_by = find_pictures(path, own, pictures)
    own.notes.extend(pictures.notes())
    pixels = boxes_in_pixels(shown, own.notes)
    counts = say(path, own, shown, grouped_by, pictures.settings)
    require_there(path, shown)
    names = sorted({view.name for one in shown for view, scan in zip(named_views(one.record), one.scans)
                    if scan and (scan.patient or scan.study)})
    complete = functools.partial(record_of, hashed=dict(zip(names, hash_names(path, names))), pixels=pixels)
    facts = wanted.facts(source for one in shown for source in pictures_of(one))
    if wanted.dry_run:
        samples = [(one.split or "not divided yet", complete(one, group_of(one))) for one in shown[:10]]
        name = wanted.name or names_for(path)[0]
        page = write_page(name, path, ImageSettings(**facts["image"]), own.notes, counts, samples)
        print(f"  {page}: the first samples; nothing is prepared")
        return name
    groups = functools.cache(lambda: give_groups(shown))  # which takes a look at each picture, once for all folds
    facts |= facts_of(config, own, shown, grouped_by, tokenizer)
    for ending, fold in fold_targets("", wanted.folds, wanted.fold):
        name = prepare_listing(path, shards_dir, facts | wanted.facts_of_fold(fold), lambda target, facts: write(
            target, path, own, shown, groups(), facts, tokenizer, wanted.workers, complete), wanted.name, ending)
    return name


def require_one(path, form, tables, more=""):
    """Raise UserError where several tables are of one form."""
    if len(tables) > 1:
        raise UserError(f"{path}: {form} in {tables[0][0].name} and in {tables[1][0].name}; name one, as "
                        f"--own={tables[0][0]}{more}")


def read_own(path, form, source, config, given, pictures, notes):
    """The Own that the reader of a form gives."""
    if form == "studies":
        return read_studies(path, source, pictures, config.report, config.columns)
    if not all(split for *_, split in source):
        require_one(path, form, source, ", or call them after train, validation and test")
    if len(source) == 1:
        source = [(file, columns, rows, "") for file, columns, rows, _ in source]
    own = {"conversations": read_chats, "questions": read_questions}[form](path, source, {
        role: name for role, name in given.items() if role in ROLES})
    return own._replace(notes=notes + own.notes)


def prepare_any(config, image, flags, open_words):
    """
    Prepare a folder or file of one's own, whatever layout it has. config: of prepare/all.py; image: ImageSettings;
    flags: those that differ from the defaults, as they are written; open_words: gives the tokenizer, of which labels
    need none. Returns the name of the dataset. Raises UserError.
    """
    path, given = own_path(config.own), parse_columns(config.columns, [*ROLES, *MORE_ROLES])
    wanted = Wanted(image, ScanSettings(config.window, config.slices, config.tiles), config.name, given, config.folds,
                    config.fold, config.limit, config.workers, config.dry_run, flags)
    if not path.exists():
        raise UserError(f"{path}: no folder and no csv there")
    form, source, notes = recognise(path, config, given)
    require_used(form, source, given)
    if form == "labels":
        require_one(path, form, source)
        source, columns, *_ = source[0]
        given.update(find_roles(source, columns, LABELS, {role: given[role] for role in LABELS if role in given}))
    if form in ("labels", "class folders"):
        how = "in a table" if form == "labels" else "a folder for each class"
        print(f"{printable(path.name)}: images with labels, {how}")
        return prepare_folder(source, config.shards_dir, wanted)
    if form == "boxes":
        print(f"{printable(path.name)}: images with boxes, {' and '.join(source)}")
        return prepare_boxes(config.own, source, config.shards_dir, wanted, open_words(), config.box_format,
                             config.augment)
    with compared(path, Path(config.shards_dir), config.dry_run):
        pictures = Pictures(path if path.is_dir() else path.parent, wanted.scans)
        own = read_own(path, form, source, config, given, pictures, notes)
        return prepare_samples(config, own, pictures, wanted, open_words())
