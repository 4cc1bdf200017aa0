"""Studies with reports of one's own: which files say what, what is earlier, and how a report is read."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from formats.frames import ScanSettings
from formats.pictures import Pictures
from plumbing.flags import UserError
from plumbing.own import hash_id, secret_of
from prepare.own_studies import days_of, find_studies, read_studies, role_of, sections_of
from test_box_data import put

RAW = Path(os.environ.get("NANOMEDQ_RAW", Path(__file__).resolve().parent.parent / "raw"))


def picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8)).astype(np.uint8)).save(path)


def read(path, report="both", columns="", **settings):
    """(the Own, {number of a study in its name or report: its Draft})"""
    pictures = Pictures(path if path.is_dir() else path.parent, ScanSettings(**settings))
    return read_studies(path, find_studies(path, columns), pictures, report, columns), pictures


def told(draft):
    """[(role, name)] of a draft's pictures, and its other parts."""
    parts = draft.record.parts
    return [(part.role, part.name) for part in parts if not isinstance(part, str)], [
        part for part in parts if isinstance(part, str)]


# ----------------------------------------------------------------------------- words

@pytest.mark.parametrize("text, wanted", [
    ("FINDINGS: Clear lungs.\nIMPRESSION: Normal.", {"findings": "Clear lungs.", "impression": "Normal."}),
    ("Findings:\nClear\n lungs.\n\nImpression:\nNormal.\n", {"findings": "Clear lungs.", "impression": "Normal."}),
    ("Indication: cough. Findings: clear. Conclusion: normal.",
     {"indication": "cough.", "findings": "clear.", "impression": "normal."}),
    ("## Befund: klar.\r\n**Beurteilung:** normal.", {"findings": "klar.", "impression": "normal."}),
    ("Clear lungs.\n\nNone in the findings: no.", {"last paragraph": "Clear lungs. None in the findings: no."}),
    ("CHEST, TWO VIEWS: clear.", {"findings": "clear."})])
def test_a_report_is_read_whatever_its_headers_look_like(text, wanted):
    assert sections_of(text) == wanted


def test_views_are_called_as_a_table_calls_them():
    assert [role_of(text) for text in ("PA", "ap", "LL", "Lateral", "Frontal", "MLO", "")] == [
        "frontal", "frontal", "lateral", "lateral", "frontal", "mlo", ""]


@pytest.mark.parametrize("texts, wanted", [
    (["2020-01-31", "20200131", "", "2020/02/01 10:30"], [20200131, 20200131, None, 20200201]),
    (["31.01.2020", "1.2.2020"], [20200131, 20200201]), (["1/31/2020", "2/1/2020"], [20200131, 20200201]),
    (["31/1/2020"], [20200131]), (["0", "7", "10", ""], [0, 7, 10, None]), (["-3", "1.5"], [-3, 1.5])])
def test_days_are_in_order_however_they_are_written(texts, wanted):
    assert days_of("t.csv", texts) == wanted


@pytest.mark.parametrize("texts, wanted", [
    (["1/2/2020", "3/4/2020"], "whether 1/2/2020 begins with its day or its month is not known"),
    (["31/1/2020", "1/31/2020"], "is not known"), (["yesterday"], "'yesterday' is no date")])
def test_days_that_cannot_be_told_are_refused(texts, wanted):
    with pytest.raises(UserError, match=f"^t.csv: .*{wanted}"):
        days_of("t.csv", texts)


# ----------------------------------------------------------------------------- folders

def test_a_folder_a_study_in_one_a_patient_in_the_order_of_dates(tmp_path):
    for patient, days in (("ann", ("2020-03-01", "2019_12_31", "20200215")), ("bob", ("2020-01-01",))):
        for number, day in enumerate(days):
            picture(tmp_path / patient / f"ct {day}" / "1.png", number)
            put(tmp_path / patient / f"ct {day}" / "report.txt", f"FINDINGS: seen on {day}.")
    own, pictures = read(tmp_path)
    assert own.kind == "reports" and own.grouped_by == "folders around studies" and len(own.sources) == 4
    assert "4 studies, 4 with a date" in own.notes[0]
    assert [(draft.patient, draft.record.answer[-11:-1]) for draft in own.drafts] == [
        ("ann", "2019_12_31"), ("ann", "n 20200215"), ("ann", "2020-03-01"), ("bob", "2020-01-01")]
    names = [hash_id(secret_of(tmp_path), f"ann/ct {day}") for day in ("2019_12_31", "20200215", "2020-03-01")]
    assert told(own.drafts[0]) == ([("", f"{names[0]}/1")], [])
    assert told(own.drafts[2]) == ([("prior", f"{names[1]}/1"), ("", f"{names[2]}/1")],
                                   ["Prior report: Findings: seen on 20200215."])
    assert [draft.record.id for draft in own.drafts[:3]] == [f"study {name}" for name in names]
    assert pictures.find("", f"{names[0]}/1").sources == (tmp_path / "ann/ct 2019_12_31/1.png",)


def test_sections_may_be_files_and_pictures_lie_in_folders_of_the_study(tmp_path):
    for number in range(3):
        folder = tmp_path / ("train", "val", "test")[number] / f"s{number}"
        for name in ("1.png", "series/2.png", "1_mask.png", "Thumbs.db"):
            picture(folder / name, number) if name.endswith("png") else put(folder / name, "x")
        put(folder / "findings.txt", f"clear {number}")
        put(folder / "impression.md", "normal")
        put(folder / "indication.txt", "cough")
    own, _ = read(tmp_path)
    assert [draft.split for draft in own.drafts] == ["test", "train", "validation"] and own.grouped_by == ""
    assert own.drafts[1].record.answer == "Findings: clear 0 Impression: normal"
    pictures, texts = told(own.drafts[0])
    assert len(pictures) == 2 and texts == ["Indication: cough"]
    assert read(tmp_path, report="impression")[0].drafts[0].record.answer == "Impression: normal"


def test_other_folders_are_no_studies(tmp_path):
    for name in ("classes/a/1.png", "classes/b/2.png", "yolo/images/1.png", "flat/1.png", "two/s/1.png"):
        picture(tmp_path / name)
    for name, text in (("classes/a/readme.txt", "a class"), ("yolo/labels/1.txt", "0 .5 .5 .5 .5"),
                       ("flat/1.txt", "of no study"), ("two/s/1.txt", "one of them"), ("two/s/2.txt", "or another"),
                       ("empty/s/report.txt", "without a picture")):
        put(tmp_path / name, text)
    for name in ("classes", "yolo", "flat", "two", "empty"):
        assert find_studies(tmp_path / name) == [], name
    put(tmp_path / "two/s/report.txt", "this one counts")
    assert [file.name for file in find_studies(tmp_path / "two")] == ["report.txt"]


def test_headers_say_who_and_when_where_folders_do_not(tmp_path):
    pytest.importorskip("pydicom")
    from test_dicom import AXIAL, I16, made, save

    for number in range(4):  # of two patients, the later study first
        for place in range(2):
            (tmp_path / f"s{number}").mkdir(exist_ok=True)
            save(tmp_path / f"s{number}/IM{place}", made(
                I16 + place, PatientID="AB"[number % 2], StudyDate=f"2020010{9 - number}", StudyTime="101112",
                SeriesInstanceUID=f"1.{number}", ImageOrientationPatient=AXIAL, ImagePositionPatient=[0, 0, place]))
        put(tmp_path / f"s{number}/report.txt", f"Findings: {number} of them.")
    own, pictures = read(tmp_path)
    assert own.grouped_by == "the headers of scans" and [draft.patient for draft in own.drafts] == ["A", "A", "B", "B"]
    assert [draft.record.answer for draft in own.drafts] == [f"Findings: {n} of them." for n in (2, 0, 3, 1)]
    assert told(own.drafts[1])[1] == ["Prior report: Findings: 2 of them."]
    shown, = told(own.drafts[1])[0]  # of a volume before its report alone
    assert shown[0] == "" and pictures.find("", shown[1]).labels == ("slice 1 of 2", "slice 2 of 2")


def test_folders_of_sites_are_no_patients_where_headers_say_otherwise(tmp_path):
    pytest.importorskip("pydicom")
    from test_dicom import I16, made, save

    for number in range(4):
        folder = tmp_path / "north south".split()[number % 2] / f"s{number}"
        folder.mkdir(parents=True)
        save(folder / "1.dcm", made(I16, PatientID="AABC"[number], StudyDate=f"2020010{number + 1}", Modality="CR"))
        put(folder / "report.txt", f"Findings: {number} of them.")
    own, _ = read(tmp_path)
    assert own.grouped_by == "the headers of scans" and "headers say otherwise" in own.notes[1]
    assert [draft.patient for draft in own.drafts] == ["A", "A", "B", "C"]
    assert [len(told(draft)[1]) for draft in own.drafts] == [0, 1, 0, 0]  # no report of another patient is a prior


# ----------------------------------------------------------------------------- tables

def test_a_csv_has_a_row_an_image_or_a_row_a_study(tmp_path):
    for number in range(6):
        picture(tmp_path / f"films/{number}.png", number)
    rows = [f"s{n // 2},{n}.png,{'PA' if n % 2 else 'Lateral'},p{n // 4},{n // 2},Clear {n // 2}.,Normal."
            for n in reversed(range(6))]
    put(tmp_path / "a.csv", "\n".join(["Study ID,Image,View Position,Patient,Follow-up #,Findings,Impression", *rows]))
    rows = [f"s{n},films/{2 * n}.png|films/{2 * n + 1}.png,p{n // 2},2020-0{n + 1}-01,Findings: clear {n}."
            for n in range(3)]
    put(tmp_path / "b.csv", "\n".join(["study,images,mrn,date,report", *rows]))
    own, _ = read(tmp_path / "a.csv")
    assert len(own.drafts) == 3 and [draft.patient for draft in own.drafts] == ["p0", "p0", "p1"]
    assert told(own.drafts[1]) == (
        [("prior frontal", "films/1.png"), ("frontal", "films/3.png"), ("lateral", "films/2.png")],
        ["Prior report: Findings: Clear 0. Impression: Normal."])
    put(tmp_path / "labels.csv", "study,image,label\ns0,films/5.png,a\n")  # which is no part of it
    own, _ = read(tmp_path / "b.csv")
    assert told(own.drafts[1]) == ([("prior", "films/0.png"), ("", "films/2.png"), ("", "films/3.png")],
                                   ["Prior report: Findings: clear 0."])
    assert [told(draft)[0][0][0] for draft in own.drafts] == ["", "prior", ""]


def test_what_is_odd_in_a_csv_is_said(tmp_path):
    picture(tmp_path / "1.png")
    put(tmp_path / "a.csv", "study,image,findings,patient,date\ns1,1.png,clear,p,\ns1,gone.png,not clear,p,\n"
                            "s2,1.png,nan,p,2020-01-01\ns3,1.png,none,,\n")
    own, _ = read(tmp_path / "a.csv")
    notes = "\n".join(own.notes)
    for words in ("3 studies, 1 with a date", "1 studies have rows with other words, p s1 the first",
                  "1 images are not there, gone.png the first",
                  "1 studies of patients with several have no date, p s1"):
        assert words in notes
    answers = {draft.where: draft.record.answer for draft in own.drafts}
    assert answers == {"p s1": "Findings: clear", "p s2": "", "s3": "Findings: none"}  # of which the empty is counted
    assert all(not told(draft)[1] for draft in own.drafts)  # nothing is earlier than what has no date


def test_tables_of_a_folder_may_be_its_splits(tmp_path):
    picture(tmp_path / "1.png")
    for split in ("train", "valid"):
        put(tmp_path / f"{split}.csv", f"image,report\n1.png,{split} words here\n")
    own, _ = read(tmp_path)
    assert [(draft.split, draft.record.answer) for draft in own.drafts] == [
        ("train", "train words here"), ("validation", "valid words here")]


@pytest.mark.parametrize("header", ["image,question,answer", "image,label", "findings,impression", "study,image"])
def test_other_tables_are_no_studies(header, tmp_path):
    put(tmp_path / "a.csv", f"{header}\n" + ",".join("x" * len(header.split(","))))
    assert find_studies(tmp_path / "a.csv") == []


# ----------------------------------------------------------------------------- real data

@pytest.fixture
def real(tmp_path):
    """real(folder, *names) -> a folder of links to real data"""
    def link(*names):
        for name in names:
            if not (RAW / name).exists():
                pytest.skip(f"no real data in {RAW}; set NANOMEDQ_RAW to a folder of it")
            (tmp_path / Path(name).name).symlink_to(RAW / name)
        return tmp_path

    return link


def test_indiana_s_two_tables_are_joined(real):
    """The counts are those of the published tables: 3,851 reports, 3,331 with both sections, 7,466 views."""
    folder = real("iu_xray/indiana_reports.csv", "iu_xray/indiana_projections.csv")
    own, _ = read(folder)
    assert [file.name for file in own.sources] == ["indiana_reports.csv", "indiana_projections.csv"]
    assert Counter(draft.record.type for draft in own.drafts) == {
        "findings and impression": 3331, "impression": 489, "findings": 6, "": 25}
    roles = Counter(view.role for draft in own.drafts for view in draft.record.views())
    assert roles == {"frontal": 3818, "lateral": 3648}
    assert "7,466 images are not there, 1_IM-0001-4001.dcm.png the first" in own.notes


def test_nih_s_films_are_in_the_order_of_their_follow_up_numbers(real):
    """Of patient 3 the file with the number 000 is the last film and not the first."""
    folder = real("nih_cxr14/images")
    header, *rows = (RAW / "nih_cxr14/Data_Entry_2017_v2020.csv").read_text().splitlines()
    rows = [row for row in rows if (folder / "images" / row.split(",")[0]).exists()]
    put(folder / "list.csv", "\n".join([header, *rows]))
    own, _ = read(folder / "list.csv", columns="findings:Finding Labels")
    films = [told(draft)[0] for draft in own.drafts if draft.patient == "3"]
    order = [f"images/00000003_00{number}.png" for number in (1, 2, 3, 4, 5, 6, 7, 0)]
    assert [name for *_, (_, name) in films] == order
    assert [before for film in films for role, before in film if role == "prior frontal"] == order[:-1]
    assert len(own.drafts) == 24 and Counter(draft.patient for draft in own.drafts)["5"] == 8
    assert sum(len(told(draft)[0]) for draft in own.drafts) == 24 + 2 + 7 + 7
