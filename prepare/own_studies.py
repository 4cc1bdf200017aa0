"""
Studies of one's own with their reports: a folder each, or a csv.

    scans/ann/2019-05-01/1.dcm  2.dcm  report.txt   a folder a study, perhaps in one a patient
    scans/study_7/film.png  findings.txt  impression.txt
    reports.csv                                     study, image, findings, impression; perhaps patient, date, view
    reports.csv  projections.csv                    the same in two tables, joined by their study (as IU X-Ray's)

A csv has a row a study or a row an image. The study before is the last of the same patient of an earlier day: by a
column, by the date in a folder's name, or by headers. How a study is written is prepare/studies.py's.
"""

import itertools
import re
from collections import defaultdict
from dataclasses import replace

from data import View
from formats.pictures import ENDING, is_left_by_programs
from plumbing.flags import UserError
from plumbing.own import TABLES, clean, files_below, printable, written
from plumbing.tables import NO_WORDS, find_roles, list_of, read_items, text_of
from prepare.box_files import decode_text
from prepare.listing import PATIENTS, SPLITS, is_mask
from prepare.own import Draft, Own
from prepare.own_boxes import split_of
from prepare.own_splits import complete_names, hash_names, several_of
from prepare.reports import report_sections
from prepare.studies import ROLES as VIEWS
from prepare.studies import Study, mimic_role, timed_records

ROLES = {  # what a column is for -> names that it may have, without capitals, spaces and signs; the first counts
    "study": ("studyid", "study", "studyinstanceuid", "examid", "exam", "accession", "accessionnumber", "reportid",
              "uid"),
    "image": ("image", "images", "imagepath", "imagepaths", "imagename", "imageindex", "filename", "filenames", "file",
              "files", "path", "pathtoimage", "film", "series", "dicom", "dicomid", "imageid"),
    "findings": ("findings", "finding", "befund", "sectionfindings"),
    "impression": ("impression", "impressions", "conclusion", "beurteilung", "sectionimpression"),
    "report": ("report", "reporttext", "reports", "radiologyreport", "fullreport"),
    "indication": ("indication", "clinicalindication", "history", "clinicalhistory", "fragestellung"),
    "comparison": ("comparison",),
    "patient": tuple(name for name in PATIENTS if not re.match("study|group", name)),
    "date": ("studydate", "date", "examdate", "acquisitiondate", "followup", "followupnumber", "visit", "timepoint"),
    "view": ("view", "viewposition", "projection", "role"), "split": ("split",)}
TOLD = ("findings", "impression", "report")
SECTIONS = ("findings", "impression", "indication", "comparison", "history")  # each of which may be a text of its own
TEXTS = (".txt", ".md")
NO_REPORTS = re.compile(r"(readme|licen[cs]e|classes|notes?|changelog|labels?|requirements)\b", re.I)
HEADERS = {"findings": "FINDINGS", "impression": "IMPRESSION", "conclusion": "IMPRESSION", "indication": "INDICATION",
           "history": "HISTORY", "clinical history": "HISTORY", "comparison": "COMPARISON", "technique": "TECHNIQUE",
           "befund": "FINDINGS", "beurteilung": "IMPRESSION", "fragestellung": "INDICATION"}
HEADER = re.compile(rf"(?:^|(?<=[.;\n])[ \t]*)[ \t#*]*({'|'.join(HEADERS)})[ \t*]*:[ \t*]*", re.I | re.M)
DATE = re.compile(r"(?<!\d)((?:19|20)\d\d)[-_./]?(0[1-9]|1[0-2])[-_./]?(0[1-9]|[12]\d|3[01])(?!\d)")


# ----------------------------------------------------------------------------- reports

def sections_of(text):
    """{section: text} of a report; one without findings and impression is its "last paragraph", whole."""
    lines = HEADER.sub(lambda match: f"\n{HEADERS[match[1].lower()]}: ", text.replace("\r", ""))
    sections = report_sections(lines)
    return sections if {"findings", "impression"} & sections.keys() else {"last paragraph": clean(text)}


def role_of(text):
    """The role of a view as a table calls it: PA and AP are frontal, LL is lateral, others stay what they are."""
    text = text.strip()
    known = mimic_role(text.upper())
    return text.lower() if text.lower() in VIEWS or known == "view" else known


# ----------------------------------------------------------------------------- dates

def day_of(text):
    """A date in a text as a number that grows as days do; None where there is none."""
    found = DATE.search(text)
    return found and float("".join(found.groups()))


def days_of(where, texts):
    """
    Each text of a column as a number that grows as days do, None for "": dates, the year first or last, or numbers.
    Raises UserError where there is another, or where day and month cannot be told.
    """
    if all(re.fullmatch(r"-?\d{1,7}(\.\d+)?", text) for text in texts if text):
        return [float(text) if text else None for text in texts]
    last = [re.match(r"(\d\d?)([./-])(\d\d?)\2(\d{4})", text) for text in texts]
    firsts, seconds = ({int(match[group]) for match in last if match} for group in (1, 3))
    day_first = max(firsts, default=0) > 12 or any(match and match[2] == "." for match in last)
    if any(last) and day_first == (max(seconds, default=0) > 12):
        first = next(match[0] for match in last if match)
        raise UserError(f"{where}: whether {first} begins with its day or its month is not known; write dates as "
                        "2020-01-31")
    days = []
    for text, match in zip(texts, last):
        if match:
            day, month = (match[1], match[3]) if day_first else (match[3], match[1])
            text = f"{match[4]}-{month:0>2}-{day:0>2}"
        day = day_of(text)
        if text and day is None:
            raise UserError(f"{where}: {printable(text)!r:.40} is no date; write dates as 2020-01-31")
        days.append(day)
    return days


def time_of(scans):
    """(day, time) of the first of Scans whose header says when it was made; (None, 0.0) where none does."""
    for scan in scans:
        if scan and (day := day_of(scan.time.partition(" ")[0])) is not None:
            seconds = re.match(r"[\d.]*", scan.time.partition(" ")[2])[0]
            return day, float(seconds) if re.fullmatch(r"\d+(\.\d*)?", seconds) else 0.0
    return None, 0.0


# ----------------------------------------------------------------------------- what is there

def tables_of(path, columns):
    """[(file, {role: column}, rows)] of the tables in a folder, or of a file and the tables beside it."""
    given = dict(entry.partition(":")[::2] for entry in columns.replace(" ", "").split(",") if entry)
    given = {role: name for role, name in given.items() if role in ROLES}
    found = []
    for file in sorted((path if path.is_dir() else path.parent).iterdir()):
        if file.suffix.lower() in TABLES and file.is_file() and not is_left_by_programs(file):
            try:
                names, rows = read_items(file, [])
                found.append((file, find_roles(file, names, ROLES, given), rows))
            except UserError:  # of the tables in a folder one may be no table, or not the one that --columns is for
                if file == path:
                    raise
    return found


def is_reports(roles):
    return any(role in roles for role in TOLD) and bool(roles.keys() & {"study", "image"})


def texts_of(path):
    """{folder of a study: its texts} of a folder in which studies lie, each with its report."""
    texts, pictured = defaultdict(list), set()
    for file in files_below(path):
        if is_left_by_programs(file):
            continue
        if file.suffix.lower() in TEXTS:
            if not NO_REPORTS.match(file.name):
                texts[file.parent].append(file)
        else:
            pictured |= {file.parent, *file.parent.parents}
    found = {}
    for folder, some in texts.items():
        named = [text for text in some if text.stem.lower() in (*SECTIONS, "report")]
        some = named or some
        if folder != path and folder in pictured and (named or len(some) == 1) and any(
                re.search("[^\\W\\d_]{3}", decode_text(text, text.read_bytes()[:1 << 20])) for text in some):
            found[folder] = some
    return found


def names_files(tables, file, roles):
    """Whether the column of images in a table of reports has names of files; IU X-Ray's has words."""
    rows = next(rows for other, _, rows in tables if other == file)
    cells = [name for _, row in rows[:99] for name in list_of(row.get(roles.get("image")))]
    return any(ENDING.search(cell) or (file.parent / cell[:255]).exists() for cell in cells)


def find_studies(path, columns=""):
    """The files that say what was reported of studies, of a folder or csv; [] where it is none of studies."""
    if path.is_file() and path.suffix.lower() not in TABLES:
        return []
    tables = tables_of(path, columns)
    reports = [(file, roles) for file, roles, _ in tables if is_reports(roles) and path in (file, file.parent)]
    joined = [file for file, roles, _ in tables if {"study", "image"} <= roles.keys() and not is_reports(roles)]
    if len(reports) == 1 and "study" in reports[0][1]:
        named = names_files(tables, *reports[0])
        return [reports[0][0], *([] if named else joined)]
    if reports:
        return [file for file, roles in reports if "image" in roles]
    return sorted(itertools.chain(*texts_of(path).values())) if path.is_dir() else []


# ----------------------------------------------------------------------------- a csv

def rows_of(sources, columns):
    """(rows of reports, rows of their images) of tables: dicts {role: cell, "where": for messages}."""
    told, shown = [], []
    for file, roles, rows in tables_of(sources[0], columns):
        if file in sources:
            more = {"beside": file.parent, "split": split_of(re.split(r"[\W_]+", file.stem))}
            some = [more | {role: row.get(name) for role, name in roles.items()} | {"where": where}
                    for where, row in rows]
            (told if is_reports(roles) else shown).extend(some)
    return told, shown


def study_of(row, number):
    """What tells a study from others: its id within its patient, else the day, else the row itself."""
    study, patient, date = (text_of(row.get(role)) for role in ("study", "patient", "date"))
    return f"{patient} {study}".strip() if study else f"{patient} {date}" if patient and date else f"row {number}"


def read_table_studies(path, sources, pictures, columns, notes):
    """[(Study, its sections, its Scans)] of a csv, or of two that are joined."""
    told, shown = rows_of(sources, columns)
    views = shown or told
    days = days_of(sources[0], [text_of(row.get("date")) for row in told])
    studies, sections, differing, gone = {}, {}, set(), []
    for number, (row, day) in enumerate(zip(told, days), 1):
        key = study_of(row, number)
        text = {role: text_of(row.get(role), NO_WORDS) for role in SECTIONS}
        if text_of(row.get("report"), NO_WORDS):
            text = sections_of(row["report"]) | {role: words for role, words in text.items() if words}
        if sections.setdefault(key, text) != text:
            differing.add(key)
        split = text_of(row.get("split")).lower()
        studies.setdefault(key, Study(key, text_of(row.get("patient")), SPLITS.get(split, split), day, 0.0, []))
    by_study = {text_of(row.get("study")): study_of(row, number) for number, row in enumerate(told, 1)} if shown else {}
    for number, row in enumerate(views, 1):
        key = by_study.get(text_of(row.get("study"))) if shown else study_of(row, number)
        for name in list_of(row.get("image")) if key in studies else ():
            place = pictures.place(row["where"], name, row["beside"])
            if place is None:
                gone.append(name)
            film = role_of(text_of(row.get("view"))), pictures.name_of(place) if place else name
            if film not in studies[key].films:
                studies[key].films.append(film)
    if differing:
        notes.append(f"{len(differing):,} studies have rows with other words, {printable(min(differing)):.40} the "
                     "first: those of the first row count")
    if gone:
        notes.append(f"{len(gone):,} images are not there, {printable(gone[0]):.80} the first")
    return [(study, sections[key]) for key, study in studies.items()]


# ----------------------------------------------------------------------------- folders

def read_folder_studies(path, pictures):
    """[(Study, its sections)] of a folder in which each study has one."""
    texts, studies = texts_of(path), []
    names = [written(folder.relative_to(path).as_posix()) for folder in texts]
    for (folder, some), name, hashed in zip(texts.items(), names, hash_names(path, names)):
        parts = name.split("/")
        split = SPLITS.get(parts[0].lower(), "")
        patient = parts[-2] if len(parts) > 1 + bool(split) else ""
        words = {text.stem.lower(): decode_text(text, text.read_bytes()) for text in some}
        sections = {name: clean(text) for name, text in words.items() if name in SECTIONS}
        for text in (text for name, text in words.items() if name not in SECTIONS):
            sections = sections_of(text) | sections
        files = [file for file in files_below(folder) if file.suffix.lower() not in TEXTS
                 and not is_left_by_programs(file) and not any(
                     other in texts for other in file.parents if other != folder and other.is_relative_to(folder))]
        there, films = set(files), []
        scans = pictures.read_files([file for file in files if not is_mask(file, there)])
        for scan in sorted(scans, key=lambda scan: len(scan.sources) > 1):  # films, then volumes
            films.append(("", f"{hashed}/{len(films) + 1}"))  # a folder may be called by a name or a date
            pictures.entered[films[-1][1]] = scan
        studies.append((Study(name, patient, split, day_of(parts[-1]), 0.0, films), sections))
    if len({study.patient for study, _ in studies}) == 1:  # what holds all of them
        for study, _ in studies:
            study.patient = ""
    return studies


# ----------------------------------------------------------------------------- in time

def complete(studies, pictures, notes, tables):
    """
    Fill in of each Study what headers say, where nothing else does: its patient, its day and its time. Folders around
    studies, unlike a column of tables, are no patients where headers say otherwise.
    """
    scans_of = [[pictures.find(study.name, name) for _, name in study.films] for study, _ in studies]
    headers = [next((scan.patient for scan in scans if scan and scan.patient), "") for scans in scans_of]
    names = [study.patient for study, _ in studies]
    by_header = not any(names)
    if not tables and len(set(headers) - {""}) > 1 and (several_of(names, headers) or several_of(headers, names)):
        notes.append("folders around studies are no patients: headers say otherwise, and count")
        by_header = True
    patients = [header or name for name, header in zip(names, headers)] if by_header else \
        complete_names(names, headers, notes) if tables else names
    for (study, _), scans, patient in zip(studies, scans_of, patients):
        study.patient = patient
        if study.day is None:
            study.day, study.time = time_of(scans)
    of = defaultdict(list)
    for study, _ in studies:
        of[study.patient].append(study)
    several = [some for patient, some in of.items() if patient and len(some) > 1]
    undated = [study for some in several for study in some if study.day is None]
    if undated:
        notes.append(f"{len(undated):,} studies of patients with several have no date, "
                     f"{printable(undated[0].name):.40} the first: they have no earlier study, and are none")
    return ("the headers of scans" if by_header else "") if any(of.keys() - {""}) else None


def drafts_of(path, studies, pictures, report):
    """The Drafts of (Study, its sections), patient after patient in time."""
    told = {study.name: sections for study, sections in studies}
    patients = {study.name: study.patient for study, _ in studies}
    for number, (study, _) in enumerate(studies):  # an order needs a patient and a day
        if not study.patient or study.day is None:
            study.patient, study.day = f"\0{number:09}", 0.0
    records = timed_records([study for study, _ in studies], lambda study: told[study.name], lambda name: None, report)
    hashes = dict(zip(told, hash_names(path, told)))
    for split, record in records:
        parts = tuple(part for part in record.parts if not is_prior_volume(part, pictures))
        yield Draft(replace(record, id=f"study {hashes[record.id]}", group="", study=record.id, parts=parts), split,
                    patients[record.id], record.id)


def is_prior_volume(part, pictures):
    """Whether a part is an earlier study's picture of several slices, of which the report alone is shown."""
    if not isinstance(part, View) or not part.role.startswith("prior"):
        return False
    scan = pictures.find(part.name, part.name)
    return bool(scan) and len(scan.sources) > 1


def read_studies(path, sources, pictures, report="both", columns=""):
    """
    The Own, of kind "reports", of what find_studies found. pictures: formats.pictures.Pictures, which say when DICOM
    studies were made; report: as --report. Drafts name their pictures by their path; Record.id is a hash.
    Raises UserError.
    """
    notes, tables = [], sources[0].suffix.lower() in TABLES
    studies = read_table_studies(path, sources, pictures, columns, notes) if tables else \
        read_folder_studies(path, pictures)
    by_header = complete(studies, pictures, notes, tables)
    named = "" if by_header is None else by_header or ("a column" if tables else "folders around studies")
    dated = sum(study.day is not None for study, _ in studies)
    notes.insert(0, f"{len(studies):,} studies, {dated:,} with a date; their reports are taken as they are: a name in "
                    "their words stays")
    form = f"studies with reports in {' and '.join(file.name for file in sources[:2])}" if tables else \
        "studies with reports, a folder each"
    drafts = list(drafts_of(path, studies, pictures, report))
    return Own(form, "reports", "", sources, drafts, named, notes)
