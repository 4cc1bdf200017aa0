"""
Datasets of chest radiographs with the reports that radiologists wrote about them.

An answer is the findings and the impression, each after its name, of those that the report has.
De-identification left marks where words were: XXXX in IU X-Ray, ___ in MIMIC-CXR. They stay,
because a sentence whose gap is closed says something that nobody wrote: "no XXXX effusion" may
have been about a large one. A section of nothing but marks counts as absent.
"""

import difflib
import functools
import itertools
import re
from pathlib import PurePosixPath
from xml.etree import ElementTree

from data import Record
from plumbing.flags import UserError
from prepare.datasets import dataset, find_folder, open_zip, read_csv, read_member, read_named_image, read_tar

REPORT_QUESTIONS = {  # by the sections that the answer has, so that none is asked for in vain
    "findings and impression": "write the findings and the impression of this chest radiograph.",
    "findings": "write the findings of this chest radiograph.",
    "impression": "write the impression of this chest radiograph.",
    "last paragraph": "write a report of this chest radiograph.",
    "": "write a report of this chest radiograph."}
LARGEST_REPORT = 1 << 20  # bytes of one XML: real ones have a few thousand
MARKS = re.compile(r"XXXX|_+")


def has_words(text):
    """Whether a section has more than marks."""
    return bool(re.search("[A-Za-z]", MARKS.sub("", text)))


def join_sections(sections):
    """The answer that a report's sections make, and its type: their names; both "" without any."""
    texts = {name: text for name, text in sections.items() if has_words(text)}
    if "last paragraph" in texts:
        return texts["last paragraph"], "last paragraph"
    names = [name for name in ("findings", "impression") if name in texts]
    return " ".join(f"{name.capitalize()}: {texts[name]}" for name in names), " and ".join(names)


# ----------------------------------------------------------------------------- IU X-Ray

def read_files(path, suffix):
    """(stem, bytes) of an archive's files of one kind, but for those that claim to lie outside it."""
    for name, content in read_tar(path):
        name = PurePosixPath(name)
        if name.suffix == suffix and ".." not in name.parts and not name.is_absolute():
            yield name.stem, content


def read_study(content):
    """Image ids and sections of one study's XML. Raises ValueError, or SyntaxError from the parser."""
    text = content.decode("utf-8")
    # Entities, which may nest or name other files, are declared in a DOCTYPE. A NUL is a part of
    # UTF-16, which the parser would recognise, and which could hide one.
    if "<!DOCTYPE" in text or "\0" in text:
        raise ValueError("it has a DOCTYPE or is no UTF-8")
    if len(content) > LARGEST_REPORT:
        raise ValueError(f"it has {len(content)} bytes")
    root = ElementTree.fromstring(text)
    sections = {}
    for element in root.iter("AbstractText"):
        name, words = (element.get("Label") or "").lower(), "".join(element.itertext()).split()
        sections[name] = " ".join([sections.get(name, ""), *words]).strip()
    return [image.get("id", "") for image in root.iter("parentImage")], sections


def read_studies(raw):
    """Yield (study, ids of its images, sections) of every XML that can be read."""
    for study, content in read_files(raw / "NLMCXR_reports.tgz", ".xml"):
        try:
            yield study, *read_study(content)
        except (ValueError, SyntaxError) as error:
            print(f"{raw.name}: {study + '.xml'!r}: passed over ({error})", flush=True)


@dataset(kind="reports", licence="CC-BY-NC-ND-4.0", access="open", megabytes=1400,
         page="https://openi.nlm.nih.gov", counts={"train": 7470},
         urls=("https://openi.nlm.nih.gov/imgs/collections/NLMCXR_reports.tgz",
               "https://openi.nlm.nih.gov/imgs/collections/NLMCXR_png.tgz"),
         layouts=(("NLMCXR_reports.tgz", "NLMCXR_png.tgz"),))
def iu_xray(raw):
    """
    IU X-Ray (Demner-Fushman et al. 2016): a sample an image, with the report of its whole study.

    No split was published: all is "train". An id is study/image, so that a study can be kept together.
    """
    reports = {}  # image -> (record id, answer, type)
    for study, images, sections in read_studies(raw):  # the images of others have no report: empty answers
        answer, type = join_sections(sections)
        reports.update((image, (f"{study}/{image}", answer, type)) for image in images)
    for image, content in read_files(raw / "NLMCXR_png.tgz", ".png"):
        name, answer, type = reports.pop(image, (image, "", ""))
        yield "train", Record(name, REPORT_QUESTIONS[type], answer, content, f"{image}.png", type=type)
    for image, (name, answer, type) in reports.items():  # named in a report, not in the archive
        yield "train", Record(name, REPORT_QUESTIONS[type], answer, None, f"{image}.png", type=type)


# ----------------------------------------------------------------------------- MIMIC-CXR

# The rest of a header's own line is not searched: what looks like a header there is its text.
HEADER = re.compile(r"^ ?([A-Z ()/,-]+):(?:\s.*|$)", re.M)
UNDERLINE = re.compile(r"^ *_{20,} *$", re.M)  # ends an addendum; ___ alone is a word that was taken out
HEADERS = {
    "conclusion": "impression", "clinical indication": "indication",
    "reason for exam": "indication", "reason for examination": "indication",
    "clinical information": "history", "pfi": "history",  # provisional: the final report follows
    "exam": "examination", "type of examination": "examination", "reference exam": "comparison",
    "recommendation": "recommendations", "recommendation(s)": "recommendations",
    "wetread": "wet read"}
VIEWS = re.compile(r"chest|portable|ribs|bone window|\b(ap|pa|one|two|frontal|lateral) views?\b|"
                   r"\b(ap|pa) and lat|lateral and (ap|pa)\b|frontal (and|upright|semi-upright)")


@functools.cache
def name_section(header):
    """The section that a header begins: "FINDNGS" and "CHEST, TWO VIEWS" both begin the findings."""
    header = header.strip().lower()
    if header in HEADERS:
        return HEADERS[header]
    for name in ("impression", "findings", "history", "comparison", "addendum"):
        if name in header:
            return name
    if VIEWS.search(header):
        return "findings"
    known = ("impression", "findings", "comparison", "indication")
    return (difflib.get_close_matches(header, known, n=1, cutoff=0.84) or [header])[0]


def report_sections(text):
    """
    {section: its text on one line} of a MIMIC-CXR report, by the rules of its authors.

    An upper-case header at the start of a line begins a section; what precedes the first is the
    "preamble". The last of several counts, empty ones do not. Where there are neither findings nor
    an impression, what follows the first paragraph of the last section is the "last paragraph".
    """
    pieces = []  # (section, its lines)
    for part in UNDERLINE.split(text):
        headers = list(HEADER.finditer(part))
        names = ["preamble", *(name_section(header[1]) for header in headers)]
        begins = [0, *(header.end(1) + 2 for header in headers)]  # behind the colon and one space
        ends = [*(header.start() for header in headers), len(part)]
        pieces += zip(names, (part[begin:end] for begin, end in zip(begins, ends)))
    pieces = [(name, lines) for name, lines in pieces if lines.strip()]
    if pieces and not {"findings", "impression"} & {name for name, _ in pieces}:
        name, lines = pieces.pop()
        pieces += zip((name, "last paragraph"), re.split(r"\n[ \t]*\n", lines, maxsplit=1))
    return {name: " ".join(lines.split()) for name, lines in pieces if lines.strip()}


@dataset(kind="reports", licence="PhysioNet Credentialed Health Data License",
         access="PhysioNet credential and data use agreement", megabytes=570000,
         page="https://physionet.org/content/mimic-cxr-jpg/2.1.0 (reports: "
              "https://physionet.org/content/mimic-cxr/2.1.0)",
         layouts=(("mimic-cxr-2.0.0-split.csv.gz", "mimic-cxr-reports.zip",
                   "mimic-cxr-2.0.0-metadata.csv.gz"),
                  ("mimic-cxr-2.0.0-split.csv.gz", "mimic-cxr-reports.zip")),
         counts={"train": 368960, "validation": 2991, "test": 5159})
def mimic_cxr(raw):
    """
    MIMIC-CXR (Johnson et al. 2019), its JPG release: a sample an image, with its study's report.

    With the metadata table the view is the context. The authors' exceptions for 54 studies are left out.
    """
    splits, views = {"train": "train", "validate": "validation", "test": "test"}, {}
    metadata, table = raw / "mimic-cxr-2.0.0-metadata.csv.gz", raw / "mimic-cxr-2.0.0-split.csv.gz"
    if metadata.is_file():  # 80 MB for all images; the two tables need not have the same order
        views = {row["dicom_id"]: row["ViewPosition"]
                 for row in read_csv(metadata, ("dicom_id", "ViewPosition"))}
    rows = read_csv(table, ("dicom_id", "study_id", "subject_id", "split"))
    with open_zip(raw / "mimic-cxr-reports.zip") as archive:
        find_folder(archive, "files/")
        for (subject, study), images in itertools.groupby(
                rows, lambda row: (row["subject_id"], row["study_id"])):
            folder = f"files/p{subject[:2]}/p{subject}/s{study}"
            report = read_member(archive, f"{folder}.txt") or b""
            answer, type = join_sections(report_sections(report.decode("utf-8", "replace")))
            for image in images:
                if image["split"] not in splits:
                    raise UserError(f"{table}: {image['split']!r:.80} is none of {', '.join(splits)}")
                name, view = f"{folder}/{image['dicom_id']}.jpg", views.get(image["dicom_id"])
                yield splits[image["split"]], Record(
                    f"s{study}/{image['dicom_id']}", REPORT_QUESTIONS[type], answer,
                    read_named_image(raw, name), name, f"view: {view}" if view else "", type)
