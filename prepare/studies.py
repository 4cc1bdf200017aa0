"""
Datasets of studies: a sample is all films of one examination, each behind its role, and the report to be written.

    Indication: cough  Comparison: ...  prior frontal: image  Prior report: ...  frontal: image  lateral: image

What is not given is left out. The prior study is the last one of an earlier day: studies of one day share it.
--report says which sections the answer has; prepare/reports.py joins them, and says why marks such as XXXX stay.
A study that has none of them is counted as an empty answer. A summary is an impression made of findings, without
a film.

A report may stand word for word in several splits. It is not removed here: an evaluation counts it as seen.
"""

import functools
import itertools
import math
import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from data import Record, View
from plumbing.flags import UserError
from prepare.datasets import (dataset, find_folder, open_zip, read_csv, read_image, read_json, read_member,
                              read_named_image, require_known)
from prepare.reports import has_words, join_sections, read_files, read_studies, report_sections

STUDY_QUESTIONS = {  # by the sections that the answer has
    "findings and impression": "write the findings and the impression of this study.",
    "findings": "write the findings of this study.",
    "impression": "write the impression of this study.",
    "last paragraph": "write a report of this study.",
    "": "write a report of this study."}
SUMMARY_QUESTION = "summarise these findings as an impression."
SECTIONS = {"both": ("findings", "impression", "last paragraph"), "findings": ("findings",),
            "impression": ("impression",)}  # by --report
ROLES = ("frontal", "lateral", "view")  # in the order in which a study shows its films; the last: not known


# ----------------------------------------------------------------------------- records

def is_given(text):
    """Whether a section says something: "None." and "None available" do not."""
    return has_words(text) and not re.match(r"none\b", text, re.I)


def study_record(name, group, sections, views, report="both", prior=((), ()), type=""):
    """
    The Record of a study. sections: {name: text} of its report; views: Views, first those whose roles are ROLES;
    report: which sections are the answer; prior: sections and Views of the study before.
    """
    answer, found = join_sections({section: sections.get(section, "") for section in SECTIONS[report]})
    asked = {title: next(filter(is_given, (sections.get(name, "") for name in names)), "")
             for title, names in (("Indication", ("indication", "history")), ("Comparison", ("comparison",)))}
    before, prior_views = prior
    told, _ = join_sections(dict(before))
    parts = (*(f"{title}: {text}" for title, text in asked.items() if text),
             *(View(view.image, view.name, f"prior {view.role}".strip()) for view in prior_views),
             *([f"Prior report: {told}"] if told else ()),
             *sorted(views, key=lambda view: ROLES.index(view.role) if view.role in ROLES else len(ROLES)))
    return Record(name, STUDY_QUESTIONS[found], answer, parts=parts, group=group, type=type or found)


def summary_record(name, group, sections):
    """The Record of findings whose impression is asked for; what has only one of them is counted as empty."""
    findings, impression = sections.get("findings", ""), sections.get("impression", "")
    return Record(name, SUMMARY_QUESTION if has_words(findings) else "", impression if has_words(impression) else "",
                  context=findings, group=group, type="impression")


# ----------------------------------------------------------------------------- studies in time

@dataclass(slots=True, eq=False)
class Study:
    """What is known of a study of a patient before its report and its films are read."""
    name: str
    patient: str
    split: str
    day: float  # a date, or a number that grows as dates do
    time: float  # within the day
    films: list  # (role, name of the file) of each


def with_priors(studies):
    """
    Yield (Study, its prior Study or None), patient after patient in time.

    The prior is the patient's last study of an earlier day (Libra, Zhang et al. 2024).
    """
    order = sorted(studies, key=lambda study: (study.patient, study.day, study.time, study.name))
    for _, some in itertools.groupby(order, lambda study: study.patient):
        last = prior = None
        for study in some:
            if last and study.day > last.day:
                prior = last
            yield study, prior
            last = study


def timed_records(studies, read_sections, read, report):
    """
    Yield (split, Record) of Studies, each with the report of its prior study and the first film of that which is
    frontal, or of which no role is known.

    read_sections: Study -> {name: text}; read: name of a film -> its bytes, or None.
    """
    read_sections, read = (functools.lru_cache(maxsize=8)(reader) for reader in (read_sections, read))  # a prior's

    def show(films):
        return [View(read(file), file, role) for role, file in films]

    for study, prior in with_priors(studies):
        frontal = [film for film in prior.films if film[0] in ("frontal", "")][:1] if prior else ()
        before = (read_sections(prior) if prior else (), show(frontal))
        yield study.split, study_record(study.name, study.patient, read_sections(study), show(study.films), report,
                                        before)


def read_number(where, text):
    """A finite number, by which something can be put in order."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where}: {text!r:.40} is no number; fetch the file as it was published")
    return number


# ----------------------------------------------------------------------------- IU X-Ray

IU_PAGE, IU_LICENCE = "https://openi.nlm.nih.gov", "CC-BY-NC-ND-4.0"
IU_REPORTS, ANNOTATION, PROJECTIONS = "NLMCXR_reports.tgz", "r2gen/annotation.json", "indiana_projections.csv"
MEDEVALKIT = "medevalkit/datas/IU_XRAY/test.json"
IU_IMAGES = ("NLMCXR_png.tgz", "NLMCXR_png/*.png")  # one of them
IU_URLS = tuple(f"{IU_PAGE}/imgs/collections/{name}" for name in (IU_REPORTS, IU_IMAGES[0]))


def image_key(name):
    """"1000_IM-0003-1001" of CXR1000_IM-0003-1001, and of the table's 1000_IM-0003-1001.dcm.png."""
    return re.sub(r"^CXR(1_(?=1_))?", "", name).removesuffix(".png").removesuffix(".dcm")  # study 1 is CXR1_1_IM-...


def iu_images(raw):
    """Yield (image_key, bytes) of the archive, or of the folder in its place."""
    archive, files = IU_IMAGES
    if (raw / archive).is_file():
        yield from ((image_key(name), content) for name, content in read_files(raw / archive, ".png"))
    else:
        yield from ((image_key(path.name), read_image(path)) for path in sorted(raw.glob(files)))


def iu_roles(raw):
    """{image_key: "frontal" or "lateral"} of the table of projections, if it is there."""
    path = raw / PROJECTIONS
    rows = read_csv(path, ("filename", "projection")) if path.is_file() else ()
    roles = {image_key(row["filename"]): row["projection"].lower() for row in rows}
    for role in set(roles.values()):
        require_known(f"{path}: projection", role, ROLES[:2])
    return roles


def iu_splits(raw):
    """{study: split} of the 2,955 studies that R2Gen (Chen et al. 2020) uses; None without its file."""
    if not (raw / ANNOTATION).is_file():
        return None
    names = {"train": "train", "val": "validation", "test": "test"}
    rows = read_json(raw / ANNOTATION, dict.fromkeys(names, [{"id": str}]))
    return {row["id"].removeprefix("CXR").partition("_")[0]: names[split]
            for split, some in rows.items() for row in some}


def iu_reports(raw):
    """Yield (study, split, its images' names, sections) of every report of R2Gen's split, or of all as train."""
    splits = iu_splits(raw)
    for study, images, sections in read_studies(raw):
        if splits is None or study in splits:
            yield study, "train" if splits is None else splits[study], images, sections


def iu_records(raw, studies, report):
    """
    Yield (split, Record) of each (study, split, its images' names, sections) once all of its images have come: of
    an archive in the order of names no more than a study's are held. What lacks one comes last.
    """
    roles, held, studies = iu_roles(raw), {}, list(studies)
    lacking = [set(map(image_key, images)) for _, _, images, _ in studies]
    study_of = {key: number for number, keys in enumerate(lacking) for key in keys}

    def make(number):
        name, split, images, sections = studies[number]
        keys = list(map(image_key, images))
        views = [View(held.pop(key, None), f"{image.removesuffix('.png')}.png", roles.get(key, "view"))
                 for key, image in zip(keys, images)]
        return split, study_record(name, name, sections, views, report)

    for key, content in iu_images(raw):
        number = study_of.get(key)
        if number is not None and key in lacking[number]:
            held[key] = content
            lacking[number].discard(key)
            if not lacking[number]:
                yield make(number)
    yield from (make(number) for number, keys in enumerate(lacking) if keys or not studies[number][2])


@dataset(only_by_name=True, kind="reports", sections=True, licence=IU_LICENCE, access="open", megabytes=1400,
         page=IU_PAGE, folder="iu_xray", urls=IU_URLS, counts={"train": 2069, "validation": 296, "test": 590},
         layouts=tuple((IU_REPORTS, images, *more) for more in (
             (ANNOTATION, PROJECTIONS), (ANNOTATION,), (PROJECTIONS,), ()) for images in IU_IMAGES))
def iu_studies(raw, report="both"):
    """
    IU X-Ray (Demner-Fushman et al. 2016) by studies, in R2Gen's split where r2gen/annotation.json is there.

    R2Gen takes two images a study and the findings alone; here a study has all of its films and sections. Without
    the file all 3,955 reports are "train". No patient links two studies, so none has a prior.
    """
    yield from iu_records(raw, iu_reports(raw), report)


@dataset(only_by_name=True, kind="reports", sections=True, licence=IU_LICENCE, access="open", megabytes=1400,
         page=IU_PAGE, folder="iu_xray", counts={"test": 296},
         layouts=tuple((MEDEVALKIT, images, *more) for more in ((PROJECTIONS,), ()) for images in IU_IMAGES))
def iu_medevalkit(raw, report="both"):
    """MedEvalKit's 296 studies of IU X-Ray, which are R2Gen's validation split; without indications, as it asks."""
    rows = read_json(raw / MEDEVALKIT, [{"id": str, "image": [str], "findings": str, "impression": str}])
    yield from iu_records(raw, ((row["id"], "test", row["image"], row) for row in rows), report)


@dataset(only_by_name=True, kind="text questions", task="reports", licence=IU_LICENCE, access="open", megabytes=2,
         page=IU_PAGE, folder="iu_xray", urls=IU_URLS[:1], layouts=((IU_REPORTS, ANNOTATION), (IU_REPORTS,)),
         counts={"train": 2069, "validation": 296, "test": 590})
def iu_summaries(raw):
    """IU X-Ray's findings, whose impression is asked for; in R2Gen's split where r2gen/annotation.json is there."""
    for study, split, _, sections in iu_reports(raw):
        yield split, summary_record(study, study, sections)


# ----------------------------------------------------------------------------- MIMIC-CXR

MIMIC = {"licence": "PhysioNet Credentialed Health Data License", "folder": "mimic_cxr",
         "access": "PhysioNet credential and data use agreement",
         "page": "https://physionet.org/content/mimic-cxr-jpg/2.1.0 (reports: "
                 "https://physionet.org/content/mimic-cxr/2.1.0)",
         "counts": {"train": 222758, "validation": 1808, "test": 3269}}
MIMIC_SPLIT, MIMIC_METADATA = "mimic-cxr-2.0.0-split.csv.gz", "mimic-cxr-2.0.0-metadata.csv.gz"
MIMIC_REPORTS = "mimic-cxr-reports.zip"


def mimic_splits(raw):
    """{(patient, study): split}."""
    names, path = {"train": "train", "validate": "validation", "test": "test"}, raw / MIMIC_SPLIT
    splits = {}
    for row in read_csv(path, ("study_id", "subject_id", "split")):
        require_known(f"{path}: split", row["split"], names)
        splits[row["subject_id"], row["study_id"]] = names[row["split"]]
    return splits


def mimic_folder(patient, study):
    return f"files/p{patient[:2]}/p{patient}/s{study}"


def mimic_sections(archive, folder):
    return report_sections((read_member(archive, f"{folder}.txt") or b"").decode("utf-8", "replace"))


def mimic_role(position):
    """The role of a ViewPosition: PA, AP and their oblique kin are frontal, LATERAL and LL lateral."""
    return ("frontal" if position[:2] in ("PA", "AP") else
            "lateral" if position == "LL" or "LATERAL" in position else "view")


def mimic_index(raw):
    """The Studies of the metadata table: some 260 MB for all 227,835."""
    splits, studies, path = mimic_splits(raw), {}, raw / MIMIC_METADATA
    columns = ("dicom_id", "subject_id", "study_id", "ViewPosition", "StudyDate", "StudyTime")
    for row in read_csv(path, columns):
        key = row["subject_id"], row["study_id"]
        if key not in splits:
            raise UserError(f"{path}: study {key[1]!r:.40} of {key[0]!r:.40} is not in {raw / MIMIC_SPLIT}; fetch both "
                            "anew")
        # A time of 8:30 is 83000.0, and less than 213000.5 as a number alone
        day, time = (read_number(f"{path}: {name}", row[name]) for name in columns[-2:])
        study = studies.setdefault(key, Study(f"s{key[1]}", f"p{key[0]}", splits[key], day, time, []))
        study.day, study.time = min((study.day, study.time), (day, time))
        study.films.append((mimic_role(row["ViewPosition"]), f"{mimic_folder(*key)}/{row['dicom_id']}.jpg"))
    return studies.values()


@dataset(only_by_name=True, kind="reports", sections=True, megabytes=570000,
         layouts=((MIMIC_SPLIT, MIMIC_REPORTS, MIMIC_METADATA),), **MIMIC)
def mimic_studies(raw, report="both"):
    """
    MIMIC-CXR (Johnson et al. 2019) by studies, each with the frontal film and report of its prior study.

    StudyDate and StudyTime put a patient's studies in order; ids and names of files are random.
    """
    with open_zip(raw / MIMIC_REPORTS) as archive:
        find_folder(archive, "files/")
        yield from timed_records(
            mimic_index(raw), lambda study: mimic_sections(archive, mimic_folder(study.patient[1:], study.name[1:])),
            functools.partial(read_named_image, raw), report)


@dataset(only_by_name=True, kind="text questions", task="reports", megabytes=140, layouts=(
    (MIMIC_SPLIT, MIMIC_REPORTS),), **MIMIC)
def mimic_summaries(raw):
    """MIMIC-CXR's findings, whose impression is asked for."""
    with open_zip(raw / MIMIC_REPORTS) as archive:
        find_folder(archive, "files/")
        for (patient, study), split in mimic_splits(raw).items():
            sections = mimic_sections(archive, mimic_folder(patient, study))
            yield split, summary_record(f"s{study}", f"p{patient}", sections)


# ----------------------------------------------------------------------------- CheXpert Plus

CHEXPERT_SECTIONS = ("history", "comparison", "findings", "impression")
CHEXPERT_COLUMNS = ("path_to_image", "frontal_lateral", "deid_patient_id", "patient_report_date_order", "split",
                    "section_clinical_history", *(f"section_{name}" for name in CHEXPERT_SECTIONS))


def chexpert_index(path):
    """(Studies, {name of a study: sections}) of CheXpert Plus's table, all of whose sections are held."""
    splits, roles = {"train": "train", "valid": "test"}, {"Frontal": "frontal", "Lateral": "lateral"}
    studies, sections = {}, {}
    for row in read_csv(path, CHEXPERT_COLUMNS):
        require_known(f"{path}: split", row["split"], splits)
        name = PurePosixPath(row["path_to_image"]).parent.as_posix()
        if name not in studies:  # the reports of a study's films differ in what was taken out alone: the first counts
            order = read_number(f"{path}: patient_report_date_order", row["patient_report_date_order"])
            studies[name] = Study(name, row["deid_patient_id"], splits[row["split"]], order, 0, [])
            sections[name] = {"indication": row["section_clinical_history"],
                              **{part: row[f"section_{part}"] for part in CHEXPERT_SECTIONS}}
        studies[name].films.append((roles.get(row["frontal_lateral"], "view"), row["path_to_image"]))
    return studies.values(), sections


@dataset(only_by_name=True, kind="reports", sections=True, licence="Stanford University Dataset Research Use Agreement",
         access="an account at Stanford AIMI and its agreement", megabytes=0,
         page="https://aimi.stanford.edu/datasets/chexpert-plus", layouts=(("df_chexpert_plus_*.csv",),),
         counts={"train": 187511, "test": 200})
def chexpert_plus(raw, report="both"):
    """
    CheXpert Plus (Chambon et al. 2024) by studies, each with the frontal film and report of its prior study.

    It has no test split: "valid", the 200 studies that results are published of, is the test split here.
    patient_report_date_order orders a patient's reports; no date proves it. Images are the PNGs, in PNG/, or the JPEGs
    of CheXpert itself, each under the name in path_to_image. Written by the published names of columns: the files
    themselves were not at hand.
    """
    paths = sorted(raw.glob("df_chexpert_plus_*.csv"))
    if len(paths) != 1:
        raise UserError(f"{raw}: {len(paths)} tables df_chexpert_plus_*.csv; leave the newest alone there")
    studies, sections = chexpert_index(paths[0])

    def read(name):
        png = read_named_image(raw, f"PNG/{name.rpartition('.')[0]}.png")
        return read_named_image(raw, name) if png is None else png

    yield from timed_records(studies, lambda study: sections[study.name], read, report)
