"""Reports by studies: films, priors and texts, from small copies of each layout and, where there are, real files."""

import csv
import gzip
import json
import os
import re
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

import prepare.all as all_py
from data import Record, View
from plumbing.flags import UserError
from plumbing.shards import Shard
from prepare.all import select
from prepare.datasets import DATASETS
from prepare.questions import train_sample_tokenizer
from prepare.reports import read_studies
from prepare.studies import (MIMIC_METADATA, MIMIC_REPORTS, MIMIC_SPLIT, STUDY_QUESTIONS, SUMMARY_QUESTION,
                             Study, image_key, iu_reports, iu_roles, mimic_role, study_record, with_priors)
from test_classify import put
from test_prepare import picture, write_toy
from test_reports import study_xml, write_tar

RAW = Path(os.environ.get("NANOMEDQ_RAW", "raw"))
BOTH, FINDINGS, IMPRESSION, LAST, NONE = STUDY_QUESTIONS.values()
NAMES = ("iu_studies", "iu_medevalkit", "iu_summaries", "mimic_studies", "mimic_summaries", "chexpert_plus")


def read(name, raw, **flags):
    return list(DATASETS[name].read(raw, **flags))


def shown(record):
    """The parts of a Record in short: its texts, and of each View the role and the name."""
    return [part if isinstance(part, str) else (part.role, part.name.rpartition("/")[2]) for part in record.parts]


@pytest.mark.parametrize("name", NAMES)
def test_studies_are_prepared_only_by_name(name):
    facts = DATASETS[name]
    assert facts.only_by_name and name not in select("") and name in select(name)
    kind = ("text questions", "reports") if name.endswith("summaries") else ("reports", "")
    assert (facts.kind, facts.task) == kind


# ----------------------------------------------------------------------------- a record

SECTIONED = {"findings": "Small heart.", "impression": "Normal.", "indication": "Cough.", "comparison": "Film of ___."}
FILMS = [View(b"2", "l.png", "lateral"), View(b"3", "x.png", "view"), View(b"1", "f.png", "frontal")]


def test_a_study_is_told_and_shown_in_a_fixed_order():
    prior = SECTIONED | {"findings": "Large heart.", "impression": "___"}, [View(b"0", "before.png", "frontal")]
    assert study_record("s", "p", SECTIONED, FILMS, prior=prior) == Record(
        "s", BOTH, "Findings: Small heart. Impression: Normal.", group="p", type="findings and impression", parts=(
            "Indication: Cough.", "Comparison: Film of ___.", View(b"0", "before.png", "prior frontal"),
            "Prior report: Findings: Large heart.", FILMS[2], FILMS[0], FILMS[1]))


@pytest.mark.parametrize("indication", ["", "None.", "none", "NONE available", "XXXX, XXXX.", "___"])
def test_what_is_not_given_is_not_told(indication):
    record = study_record("s", "p", {"findings": "a", "indication": indication, "comparison": indication}, [])
    assert record.parts == ()
    told = {"indication": indication, "history": "Nonetheless a cough"}
    assert study_record("s", "p", told, []).parts == ("Indication: Nonetheless a cough",)


@pytest.mark.parametrize("report, sections, question, answer", [
    ("both", {"findings": "a", "impression": "b"}, BOTH, "Findings: a Impression: b"),
    ("findings", {"findings": "a", "impression": "b"}, FINDINGS, "Findings: a"),
    ("impression", {"findings": "a", "impression": "b"}, IMPRESSION, "Impression: b"),
    ("both", {"findings": "XXXX", "impression": "b"}, IMPRESSION, "Impression: b"),
    ("findings", {"impression": "b"}, NONE, ""), ("impression", {"last paragraph": "c"}, NONE, ""),
    ("both", {"last paragraph": "c", "indication": "d"}, LAST, "c")])
def test_the_flag_says_what_the_answer_has_and_the_question_asks_for_it(report, sections, question, answer):
    record = study_record("s", "p", sections, [], report)
    assert (record.question, record.answer) == (question, answer)


def test_the_prior_of_a_study_is_the_last_one_of_an_earlier_day():
    times = {"d": ("p", 20, 5), "b": ("p", 20, 83000), "a": ("p", 20, 213000.5), "c": ("p", 3, 9), "e": ("p", 100, 0),
             "f": ("o", 50, 0), "g": ("q", 19, 0)}
    studies = [Study(name, patient, "train", day, time, []) for name, (patient, day, time) in times.items()]
    assert [(study.name, prior and prior.name) for study, prior in with_priors(studies)] == [
        ("f", None), ("c", None), ("d", "c"), ("b", "c"), ("a", "c"), ("e", "a"), ("g", None)]


# ----------------------------------------------------------------------------- IU X-Ray

XMLS = {
    1: study_xml(1, ["CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001"], COMPARISON="None.", INDICATION="Cough",
                 FINDINGS="Small heart.", IMPRESSION="Normal chest x-XXXX."),
    11: study_xml(11, ["CXR11_IM-0067-1001"], FINDINGS="Clear lungs.", IMPRESSION="XXXX."),
    3: study_xml(3, ["CXR3_IM-1384-1001", "CXR3_IM-1384-2001"], IMPRESSION="Its lateral is gone."),
    4: study_xml(4, ["CXR4_IM-2050-1001"], COMPARISON="XXXX", INDICATION="Cough"),
    6: study_xml(6, [], FINDINGS="No image.", IMPRESSION="None.")}
IMAGES = ["CXR1_1_IM-0001-4001", "CXR3_IM-1384-1001", "CXR99_IM-1-1", "CXR11_IM-0067-1001", "CXR4_IM-2050-1001",
          "CXR1_1_IM-0001-3001"]
TABLE = ("uid,filename,projection\n1,1_IM-0001-4001.dcm.png,Frontal\n1,1_IM-0001-3001.dcm.png,Lateral\n"
         "11,11_IM-0067-1001.dcm.png,Frontal\n3,3_IM-1384-1001.dcm.png,Lateral\n")
SPLIT = {"train": [{"id": "CXR1_1_IM-0001", "report": "x"}], "val": [{"id": "CXR11_IM-0067"}],
         "test": [{"id": "CXR3_IM-1384"}]}


def write_iu(raw):
    put(raw / "indiana_projections.csv", TABLE)
    put(raw / "r2gen/annotation.json", json.dumps(SPLIT))
    write_tar(raw / "NLMCXR_reports.tgz", {f"ecgen-radiology/{number}.xml": xml for number, xml in XMLS.items()})
    write_tar(raw / "NLMCXR_png.tgz", {f"{name}.png": picture(number) for number, name in enumerate(IMAGES)})


@pytest.fixture
def iu(tmp_path):
    write_iu(tmp_path / "iu_xray")
    return tmp_path / "iu_xray"


def test_iu_studies_are_read_in_full(iu):
    first = ("train", Record(
        "1", BOTH, "Findings: Small heart. Impression: Normal chest x-XXXX.", group="1", type="findings and impression",
        parts=("Indication: Cough", View(picture(0), "CXR1_1_IM-0001-4001.png", "frontal"),
               View(picture(5), "CXR1_1_IM-0001-3001.png", "lateral"))))
    second = ("validation", Record("11", FINDINGS, "Findings: Clear lungs.", group="11", type="findings", parts=(
        View(picture(3), "CXR11_IM-0067-1001.png", "frontal"),)))
    third = ("test", Record("3", IMPRESSION, "Impression: Its lateral is gone.", group="3", type="impression", parts=(
        View(picture(1), "CXR3_IM-1384-1001.png", "lateral"), View(None, "CXR3_IM-1384-2001.png", "view"))))
    assert read("iu_studies", iu) == [second, first, third]  # as their last images come, and what lacks one
    assert len(DATASETS["iu_studies"].find(iu.parent)) == 4
    assert [record.answer for _, record in read("iu_studies", iu, report="impression")] == [
        "", "Impression: Normal chest x-XXXX.", "Impression: Its lateral is gone."]


def test_iu_studies_are_read_from_a_folder_under_either_name(iu):
    wanted = sorted(read("iu_studies", iu), key=lambda pair: pair[1].id)
    (iu / "NLMCXR_png.tgz").unlink()
    for number, name in enumerate(IMAGES):
        put(iu / "NLMCXR_png" / (f"{image_key(name)}.dcm.png" if number % 2 else f"{name}.png"), picture(number))
    assert sorted(read("iu_studies", iu), key=lambda pair: pair[1].id) == wanted
    assert len(DATASETS["iu_studies"].find(iu.parent)) == 3 + len(IMAGES)


def test_without_the_split_and_the_table_all_is_train_and_no_view_is_known(iu):
    (iu / "r2gen/annotation.json").unlink()
    (iu / "indiana_projections.csv").unlink()
    records = read("iu_studies", iu)
    assert {split for split, _ in records} == {"train"} and len(records) == len(XMLS) and len(
        DATASETS["iu_studies"].find(iu.parent)) == 2
    assert {view.role for _, record in records for view in record.views()} == {"view"}
    write_toy(iu.parent, records, train_sample_tokenizer(), kind="reports")
    manifest = Shard(iu.parent / "toy/train").manifest
    assert (manifest["samples"], manifest["images"]) == (2, 3)
    assert manifest["skipped"] == {"empty answer": 1, "image missing": 2}


class Film(bytes):
    """Bytes that count how many like them there are."""
    alive = 0

    def __new__(cls, content):
        cls.alive += 1
        return super().__new__(cls, content)

    def __del__(self):
        Film.alive -= 1


def test_a_study_is_let_go_of_once_it_is_whole(iu, monkeypatch):
    """An archive whose images come study after study holds those of one study at a time."""
    names = sorted(name for name in IMAGES if "CXR3_" not in name)  # of a study that never is whole
    monkeypatch.setattr("prepare.studies.iu_images", lambda raw: ((image_key(name), Film(b"x")) for name in names))
    alive = []
    for _, record in DATASETS["iu_studies"].read(iu):
        alive.append((record.id, Film.alive, len(record.views())))
        del record
    assert alive == [("11", 1, 1), ("1", 2, 2), ("3", 1, 2)]  # the last that was read


def test_an_image_that_an_archive_has_twice_makes_no_second_sample(iu):
    names = [*IMAGES, *IMAGES]
    once = read("iu_studies", iu)
    members = {f"{number}/{name}.png": picture(number % len(IMAGES)) for number, name in enumerate(names)}
    write_tar(iu / "NLMCXR_png.tgz", members)
    assert read("iu_studies", iu) == once


def write_iu_medevalkit(raw):
    write_iu(raw)
    put(raw / "medevalkit/datas/IU_XRAY/test.json", json.dumps([
        {"id": "open_i_1", "image": ["CXR1_1_IM-0001-3001.png", "CXR1_1_IM-0001-4001.png"], "findings": "Small heart.",
         "impression": "Normal chest x-XXXX."}]))



def test_medevalkits_studies_have_its_texts_and_images(iu):
    write_iu_medevalkit(iu)
    assert read("iu_medevalkit", iu) == [("test", Record(
        "open_i_1", BOTH, "Findings: Small heart. Impression: Normal chest x-XXXX.", group="open_i_1",
        type="findings and impression", parts=(View(picture(0), "CXR1_1_IM-0001-4001.png", "frontal"),
                                               View(picture(5), "CXR1_1_IM-0001-3001.png", "lateral"))))]
    assert len(DATASETS["iu_medevalkit"].find(iu.parent)) == 3


def test_summaries_of_findings_need_no_image(iu):
    (iu / "NLMCXR_png.tgz").unlink()
    records = read("iu_summaries", iu)
    assert records[0] == ("train", Record("1", SUMMARY_QUESTION, "Normal chest x-XXXX.", context="Small heart.",
                                          group="1", type="impression"))
    assert [(split, record.question, record.answer) for split, record in records[1:]] == [
        ("validation", SUMMARY_QUESTION, ""), ("test", "", "Its lateral is gone.")]


@pytest.mark.parametrize("name, content, message", [
    ("indiana_projections.csv", TABLE.replace("Lateral", "Other"), "projection 'other' is none of frontal, lateral"),
    ("indiana_projections.csv", TABLE.replace("filename", "file"), "no column 'filename'"),
    ("r2gen/annotation.json", json.dumps(SPLIT).replace("test", "    "), "no column 'test'")])
def test_damaged_files_of_iu_are_refused_by_name(name, content, message, iu):
    put(iu / name, content)
    with pytest.raises(UserError, match=f"{name}: {message}"):
        read("iu_studies", iu)


def test_another_report_flag_prepares_a_study_anew_and_no_other_dataset(iu, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train_sample_tokenizer())
    config = all_py.Config(raw_dir=str(tmp_path), shards_dir=str(tmp_path / "shards"), workers=1, image_size=32,
                           tokenizer=str(tmp_path / "tokenizer.model"))
    answers = []
    for report in ("both", "both", "findings"):
        told = replace(config, report=report)
        status = [all_py.prepare_dataset(DATASETS[name], told)[0] for name in ("iu_studies", "iu_summaries")]
        shard = Shard(tmp_path / "shards/iu_studies/train")
        assert shard.manifest["report"] == report and len(shard) == 1
        answers.append((*status, next(iter(shard.read_records()))["answer"]))
    both = "Findings: Small heart. Impression: Normal chest x-XXXX."
    assert answers == [("ready", "ready", both), ("up to date", "up to date", both),
                       ("ready", "up to date", "Findings: Small heart.")]
    assert "report" not in Shard(tmp_path / "shards/iu_summaries/train").manifest


# ----------------------------------------------------------------------------- MIMIC-CXR

STUDIES = [  # patient, study, split, day, time, films: (dicom, position), report; in no order of time
    ("10000032", "59999999", "train", "21800506", "213014.531", [("z1", "PA"), ("a1", "LATERAL")],
     " INDICATION:  Cough.\n\n FINDINGS:  First.\n\n IMPRESSION:  One.\n"),
    ("10000032", "50000001", "train", "21800626", "83045.062", [("b2", "LL"), ("c2", "")],
     " FINDINGS:  Third, early that day.\n"),
    ("10000032", "50000002", "train", "21800626", "213000.5", [("d3", "AP"), ("e3", "PA")],
     " IMPRESSION:  Fourth, late that day.\n"),
    ("10000032", "50000000", "train", "21810101", "0.0", [("f4", "AP AXIAL")], " HISTORY:  Pain.\n FINDINGS:  Last.\n"),
    ("10000032", "50000003", "train", "21800507", "0.0", [("g5", "PA")], None),
    ("11000003", "50000004", "validate", "21700101", "1", [("h6", "SWIMMERS")], " FINAL REPORT\n\n Clear.\n"),
    ("12000004", "50000005", "test", "21990101", "1", [("i7", "AP")], " FINDINGS:  Alone.\n")]


def write_gzip(path, rows):
    with gzip.open(path, "wt", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_mimic(raw):
    raw.mkdir(parents=True, exist_ok=True)
    rows = []
    with zipfile.ZipFile(raw / MIMIC_REPORTS, "w") as archive:
        for patient, study, split, day, time, films, report in STUDIES:
            folder = f"files/p{patient[:2]}/p{patient}/s{study}"
            if report:
                archive.writestr(f"{folder}.txt", report)
            for dicom, position in films:
                put(raw / folder / f"{dicom}.jpg", dicom.encode())
                rows.append({"dicom_id": dicom, "study_id": study, "subject_id": patient, "split": split,
                             "ViewPosition": position, "StudyDate": day, "StudyTime": time})
    write_gzip(raw / MIMIC_SPLIT, [{name: row[name] for name in list(row)[:4]} for row in rows])
    write_gzip(raw / MIMIC_METADATA, [{name: row[name] for name in row if name != "split"} for row in rows])


@pytest.fixture
def mimic(tmp_path):
    write_mimic(tmp_path / "mimic_cxr")
    return tmp_path / "mimic_cxr"


def test_mimics_studies_have_their_films_and_what_was_before(mimic):
    records = read("mimic_studies", mimic)
    assert [(split, record.id, record.group, record.answer, shown(record)) for split, record in records] == [
        ("train", "s59999999", "p10000032", "Findings: First. Impression: One.", [
            "Indication: Cough.", ("frontal", "z1.jpg"), ("lateral", "a1.jpg")]),
        ("train", "s50000003", "p10000032", "", [
            ("prior frontal", "z1.jpg"), "Prior report: Findings: First. Impression: One.", ("frontal", "g5.jpg")]),
        ("train", "s50000001", "p10000032", "Findings: Third, early that day.", [  # the one before has no report
            ("prior frontal", "g5.jpg"), ("lateral", "b2.jpg"), ("view", "c2.jpg")]),
        ("train", "s50000002", "p10000032", "Impression: Fourth, late that day.", [
            ("prior frontal", "g5.jpg"), ("frontal", "d3.jpg"), ("frontal", "e3.jpg")]),
        ("train", "s50000000", "p10000032", "Findings: Last.", [
            "Indication: Pain.", ("prior frontal", "d3.jpg"), "Prior report: Impression: Fourth, late that day.",
            ("frontal", "f4.jpg")]),
        ("validation", "s50000004", "p11000003", "Clear.", [("view", "h6.jpg")]),
        ("test", "s50000005", "p12000004", "Findings: Alone.", [("frontal", "i7.jpg")])]
    for _, record in records:
        assert all(view.image == view.name.rpartition("/")[2][:2].encode() for view in record.views())
    assert read("mimic_studies", mimic, report="findings")[3][1].answer == ""
    assert sum(DATASETS["mimic_studies"].counts.values()) == 227835


def test_a_prior_without_a_frontal_film_is_told_alone(mimic):
    rows = list(csv.DictReader(gzip.open(mimic / MIMIC_METADATA, "rt")))
    for row in rows:
        row["ViewPosition"] = "LATERAL" if row["study_id"] == "59999999" else row["ViewPosition"]
    write_gzip(mimic / MIMIC_METADATA, rows)
    assert shown(read("mimic_studies", mimic)[1][1]) == ["Prior report: Findings: First. Impression: One.",
                                                         ("frontal", "g5.jpg")]


def test_a_report_and_a_film_are_read_once_though_the_next_study_shows_them_again(mimic, monkeypatch):
    opened, read_member = [], zipfile.ZipFile.open
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda archive, member: opened.append(member) or read_member(
        archive, member))
    films = []
    monkeypatch.setattr("prepare.studies.read_named_image", lambda raw, name: films.append(name) or b"x")
    read("mimic_studies", mimic)
    assert len(opened) == 6 and len(films) == len(set(films)) == 10


def test_mimics_summaries_are_by_study(mimic):
    records = read("mimic_summaries", mimic)
    assert [record.id for _, record in records] == [f"s{study}" for _, study, *_ in STUDIES]
    assert records[0] == ("train", Record("s59999999", SUMMARY_QUESTION, "One.", context="First.", group="p10000032",
                                          type="impression"))
    assert [split for split, record in records if record.question and record.answer] == ["train"]


@pytest.mark.parametrize("table, column, value, message", [
    (MIMIC_SPLIT, "split", "../x", "split '../x' is none of train, validate, test"),
    (MIMIC_SPLIT, "study_id", "7", f"{MIMIC_METADATA}: study '59999999' of '10000032' is not in"),
    (MIMIC_METADATA, "StudyDate", "unknown", "StudyDate: 'unknown' is no number"),
    (MIMIC_METADATA, "StudyTime", "nan", "StudyTime: 'nan' is no number"),
    (MIMIC_METADATA, "ViewPosition", None, "no column 'ViewPosition'")])
def test_damaged_tables_of_mimic_are_refused_by_name(table, column, value, message, mimic):
    rows = list(csv.DictReader(gzip.open(mimic / table, "rt")))
    write_gzip(mimic / table, [{name: cell for name, cell in row.items() if name != column} for row in rows]
               if value is None else [rows[0] | {column: value}] + [row for row in rows[2:]])
    with pytest.raises(UserError, match=message):
        read("mimic_studies", mimic)


@pytest.mark.parametrize("role, positions", [
    ("frontal", "PA|AP|AP AXIAL|PA LLD|AP RLD"), ("lateral", "LATERAL|LL|XTABLE LATERAL"),
    ("view", "|LPO|RAO|SWIMMERS|LAO")])
def test_positions_of_mimic_are_roles(role, positions):
    assert {mimic_role(position) for position in positions.split("|")} == {role}


# ----------------------------------------------------------------------------- CheXpert Plus

def chexpert_row(patient, study, view, order, split="train", side="Frontal", **sections):
    return {"path_to_image": f"{split}/patient{patient}/study{study}/view{view}_{side.lower()}.jpg",
            "frontal_lateral": side, "ap_pa": "AP", "deid_patient_id": f"patient{patient}",
            "patient_report_date_order": order, "split": split, "report": "NARRATIVE:\nall of it",
            **{f"section_{name}": sections.get(name, "") for name in (
                "clinical_history", "history", "comparison", "findings", "impression")}}


CHEXPERT = [chexpert_row("7", "1", 1, "10", findings="Tenth.", impression="Ten\nlines.", history="Fall."),
            chexpert_row("7", "3", 1, "9", impression="Ninth.", clinical_history="Cough.", history="Fall."),
            chexpert_row("7", "3", 2, "9", side="Lateral", impression="Ninth, worded anew."),
            chexpert_row("64600", "1", 1, "1", "valid", findings="Test.", comparison="None.")]


def write_chexpert(raw):
    raw.mkdir(parents=True, exist_ok=True)
    with open(raw / "df_chexpert_plus_240401.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, CHEXPERT[0])
        writer.writeheader()
        writer.writerows(CHEXPERT)
    for number, row in enumerate(CHEXPERT):
        path = Path(row["path_to_image"])
        put(raw / "PNG" / path.with_suffix(".png") if number else raw / path, str(number).encode())


@pytest.fixture
def chexpert(tmp_path):
    write_chexpert(tmp_path / "chexpert_plus")
    return tmp_path / "chexpert_plus"


def only(write, *unread):
    """A function that writes what another does, but for the files that a dataset does not read."""
    def write_read(raw):
        write(raw)
        for name in unread:
            (raw / name).unlink()
    return write_read


WRITERS = {
    "iu_studies": write_iu, "iu_summaries": only(write_iu, "NLMCXR_png.tgz", "indiana_projections.csv"),
    "iu_medevalkit": only(write_iu_medevalkit, "NLMCXR_reports.tgz", "r2gen/annotation.json"),
    "mimic_studies": write_mimic, "mimic_summaries": only(write_mimic, MIMIC_METADATA), "chexpert_plus": write_chexpert}


def test_chexpert_plus_is_read_in_full(chexpert):
    records = read("chexpert_plus", chexpert)
    assert [(split, record.id, record.group, record.answer, shown(record)) for split, record in records] == [
        ("test", "valid/patient64600/study1", "patient64600", "Findings: Test.", [("frontal", "view1_frontal.jpg")]),
        ("train", "train/patient7/study3", "patient7", "Impression: Ninth.", [
            "Indication: Cough.", ("frontal", "view1_frontal.jpg"), ("lateral", "view2_lateral.jpg")]),
        ("train", "train/patient7/study1", "patient7", "Findings: Tenth. Impression: Ten\nlines.", [
            "Indication: Fall.", ("prior frontal", "view1_frontal.jpg"), "Prior report: Impression: Ninth.",
            ("frontal", "view1_frontal.jpg")])]
    assert [view.image for _, record in records for view in record.views()] == [b"3", b"1", b"2", b"1", b"0"]


def test_damaged_tables_of_chexpert_plus_are_refused_by_name(chexpert):
    path = chexpert / "df_chexpert_plus_240401.csv"
    text = path.read_text()
    for old, new, message in ((",9,", ",x,", "patient_report_date_order: 'x' is no number"),
                              ("valid,", "test,", "split 'test' is none of train, valid"),
                              ("section_findings", "findings", "no column 'section_findings'")):
        path.write_text(text.replace(old, new))
        with pytest.raises(UserError, match=message):
            read("chexpert_plus", chexpert)
    put(chexpert / "df_chexpert_plus_250101.csv", text)
    with pytest.raises(UserError, match="2 tables df_chexpert_plus"):
        read("chexpert_plus", chexpert)


# ----------------------------------------------------------------------------- real files

@pytest.fixture(scope="module")
def real_iu():
    if not (RAW / "iu_xray/NLMCXR_reports.tgz").is_file():
        pytest.skip("needs iu_xray in the folder that NANOMEDQ_RAW names")
    return RAW / "iu_xray"


def test_r2gens_split_of_the_real_reports_has_the_published_counts(real_iu):
    reports = list(iu_reports(real_iu))
    assert Counter(split for _, split, *_ in reports) == DATASETS["iu_studies"].counts
    images = [image_key(image) for _, _, images, _ in reports for image in images]
    assert len(images) == len(set(images)) == 6091
    roles = iu_roles(real_iu)
    assert Counter(roles.get(image, "view") for image in images) == {"frontal": 3055, "lateral": 3032, "view": 4}
    every = [image_key(image) for _, names, _ in read_studies(real_iu) for image in names]
    assert len(every) == 7470 and len(roles) == 7466 and set(roles) < set(every)


def test_the_real_sections_are_those_of_the_table(real_iu):
    with open(real_iu / "indiana_reports.csv", newline="", encoding="utf-8") as file:
        table = {row["uid"]: row for row in csv.DictReader(file)}
    reports = list(iu_reports(real_iu))
    assert len(reports) == 2955
    for study, _, _, sections in reports:
        for name in ("findings", "impression", "indication", "comparison"):
            told = " ".join(table[study][name].split())
            assert sections.get(name, "") == told or told == "#NAME?", (study, name)  # a spreadsheet's doing


def test_test_reports_that_stand_in_train_are_as_many_as_were_counted(real_iu):
    findings = {split: [record.context for each, record in read("iu_summaries", real_iu) if each == split]
                for split in ("train", "validation", "test")}
    plain = {split: [" ".join(re.findall("[a-z0-9]+", text.lower())) for text in texts]
             for split, texts in findings.items()}
    for texts, wanted in ((findings, {"validation": 65, "test": 274}), (plain, {"validation": 66, "test": 277})):
        assert {split: sum(text in set(texts["train"]) for text in texts[split]) for split in wanted} == wanted


def test_the_real_medevalkit_is_r2gens_validation_split(real_iu):
    records = [record for split, record in read("iu_medevalkit", real_iu) if split == "test"]
    answers = {split: {record.id: record.answer for each, record in read("iu_studies", real_iu) if each == split}
               for split in ("validation", "test")}
    assert {record.id.removeprefix("open_i_"): record.answer for record in records} == answers["validation"]
    assert Counter(len(record.views()) for record in records) == {2: 282, 3: 13, 4: 1}
    assert sum(record.parts[0].role != "frontal" for record in records) == 2  # they have none
    trained = set(map(str, json.loads((real_iu / "radrestruct/train_ids.json").read_text())))
    assert sum(record.id.removeprefix("open_i_") in trained for record in records) == 225


def test_six_of_the_real_studies_have_no_impression(real_iu):
    counts = Counter((split, bool(record.answer)) for split, record in read("iu_summaries", real_iu))
    assert counts == {("train", True): 2063, ("train", False): 6, ("validation", True): 296, ("test", True): 590}
