"""Radiographs and their reports: what is read out of the original archives, and what damage does."""

import csv
import gzip
import io
import tarfile
import time
import zipfile

import pytest

from data import Record
from plumbing.flags import UserError
from plumbing.shards import Shard
from prepare.datasets import DATASETS
from prepare.questions import train_sample_tokenizer
from prepare.reports import (LARGEST_REPORT, REPORT_QUESTIONS, join_sections, name_section,
                             report_sections)
from test_prepare import picture, write_toy

BOTH, FINDINGS, IMPRESSION, LAST, NONE = REPORT_QUESTIONS.values()


# ----------------------------------------------------------------------------- IU X-Ray

def write_tar(path, members):
    """A gzipped tar of {name: bytes}; a value that is a tar header is entered without content."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
            else:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def link(name, target, kind=tarfile.SYMTYPE):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def study_xml(number, images, **sections):
    """One study as OpenI has it: uId, MedlineCitation/Article/Abstract, MeSH, then its images."""
    texts = "".join(f'<AbstractText Label="{label}">{text}</AbstractText>'
                    for label, text in sections.items())
    parents = "".join(f'<parentImage id="{image}"><figureId>F1</figureId>'
                      "<caption>Xray Chest PA and Lateral</caption></parentImage>" for image in images)
    return ('<?xml version="1.0" encoding="utf-8"?>\n'
            f'<eCitation><meta type="rr"/><uId id="CXR{number}"/>\n'
            '<MedlineCitation Owner="Indiana University"><Article PubModel="Electronic"><Abstract>'
            f"{texts}</Abstract></Article></MedlineCitation>\n"
            f"<MeSH><major>normal</major></MeSH>{parents}</eCitation>\n").encode()


def write_iu_xray(raw, reports, images):
    raw.mkdir()
    write_tar(raw / "NLMCXR_reports.tgz", {f"ecgen-radiology/{number}.xml": content
                                           for number, content in reports.items()})
    write_tar(raw / "NLMCXR_png.tgz", images)


IU_XRAY_REPORTS = {
    1: study_xml(1, ["CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001"], COMPARISON="None.",
                 INDICATION="Cough", FINDINGS="The heart is\n normal &amp; small.",
                 IMPRESSION="Normal chest x-XXXX."),
    2: study_xml(2, ["CXR2_IM-0652-1001"], COMPARISON="None.", FINDINGS="Clear lungs."),
    3: study_xml(3, ["CXR3_IM-1384-1001"], IMPRESSION="No XXXX effusion.", FINDINGS=""),
    4: study_xml(4, ["CXR4_IM-2050-1001"], COMPARISON="XXXX", INDICATION="Cough"),
    5: study_xml(5, ["CXR5_IM-2117-1003002"], FINDINGS="XXXX. 1. XXXX XXXX.",
                 IMPRESSION="<i>No</i> change."),
    6: study_xml(6, [], FINDINGS="A study without images."),
    7: study_xml(7, ["CXR7_IM-2263-1001"], FINDINGS="Its image is gone.")}
IU_XRAY_IMAGES = ["CXR2_IM-0652-1001", "CXR1_1_IM-0001-4001", "CXR3_IM-1384-1001", "CXR4_IM-2050-1001",
                  "CXR5_IM-2117-1003002", "CXR99_IM-9999-1001", "CXR1_1_IM-0001-3001"]


def test_iu_xray_is_read_in_full(tmp_path):
    images = {name: picture(number) for number, name in enumerate(IU_XRAY_IMAGES)}
    write_iu_xray(tmp_path / "iu_xray", IU_XRAY_REPORTS,
                  {f"{name}.png": image for name, image in images.items()})

    def record(identifier, question, answer, type):
        image = identifier.rsplit("/")[-1]
        return "train", Record(identifier, question, answer, images.get(image), f"{image}.png",
                               type=type)

    iu_xray = DATASETS["iu_xray"]
    first = "Findings: The heart is normal & small. Impression: Normal chest x-XXXX."
    assert list(iu_xray.read(tmp_path / "iu_xray")) == [  # in the order of the images
        record("2/CXR2_IM-0652-1001", FINDINGS, "Findings: Clear lungs.", "findings"),  # not study 1's
        record("1/CXR1_1_IM-0001-4001", BOTH, first, "findings and impression"),
        record("3/CXR3_IM-1384-1001", IMPRESSION, "Impression: No XXXX effusion.", "impression"),
        record("4/CXR4_IM-2050-1001", NONE, "", ""),
        record("5/CXR5_IM-2117-1003002", IMPRESSION, "Impression: No change.", "impression"),
        record("CXR99_IM-9999-1001", NONE, "", ""),  # an image without a report
        record("1/CXR1_1_IM-0001-3001", BOTH, first, "findings and impression"),
        record("7/CXR7_IM-2263-1001", FINDINGS, "Findings: Its image is gone.", "findings")]
    assert list(iu_xray.find(tmp_path)) == ["NLMCXR_reports.tgz", "NLMCXR_png.tgz"]
    assert [url.rsplit("/")[-1] for url in iu_xray.urls] == list(iu_xray.layouts[0])
    assert (iu_xray.kind, iu_xray.counts) == ("reports", {"train": 7470})


def test_what_a_report_or_an_image_lacks_is_counted(tmp_path):
    images = {f"{name}.png": picture(number) for number, name in enumerate(IU_XRAY_IMAGES)}
    write_iu_xray(tmp_path / "iu_xray", IU_XRAY_REPORTS, images)
    records = list(DATASETS["iu_xray"].read(tmp_path / "iu_xray"))
    write_toy(tmp_path, records, train_sample_tokenizer(), kind="reports")
    shard = Shard(tmp_path / "toy/train")
    assert (shard.manifest["samples"], shard.manifest["images"]) == (5, 5)
    assert shard.manifest["skipped"] == {"empty answer": 2, "image missing": 1}
    assert {record["question"] for record in shard.read_records()} == {BOTH, FINDINGS, IMPRESSION}


BOMB = ('<!DOCTYPE lolz [<!ENTITY a "lol"><!ENTITY b "&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;&b;">]>'
        '<a><AbstractText Label="FINDINGS">&c;</AbstractText><parentImage id="CXR1"/></a>')
THIEF = ('<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
         '<a><AbstractText Label="FINDINGS">&x;</AbstractText><parentImage id="CXR1"/></a>')


@pytest.mark.parametrize("broken", [
    BOMB.encode(), THIEF.encode(), BOMB.encode("utf-16"), BOMB.encode("utf-16-le"),
    BOMB.encode("utf-16-be"), BOMB.encode("utf-32-le"), b"", b"not XML",
    study_xml(1, ["CXR1"], FINDINGS="Clear.")[:-9], study_xml(1, ["CXR1"], FINDINGS="a < b"),
    study_xml(1, ["CXR1"], FINDINGS="&unknown;"),
    study_xml(1, ["CXR1"], FINDINGS="37\xb0").replace("\xb0".encode(), b"\xb0"), b"<a>\0</a>",
    study_xml(1, ["CXR1"], FINDINGS="a" * LARGEST_REPORT)])
def test_an_xml_that_cannot_be_trusted_stops_no_other(broken, tmp_path, capsys):
    write_iu_xray(tmp_path / "iu_xray", {1: broken, 2: study_xml(2, ["CXR2"], FINDINGS="Clear.")},
                  {"CXR1.png": b"one", "CXR2.png": b"two"})
    assert list(DATASETS["iu_xray"].read(tmp_path / "iu_xray")) == [
        ("train", Record("CXR1", NONE, "", b"one", "CXR1.png")),
        ("train", Record("2/CXR2", FINDINGS, "Findings: Clear.", b"two", "CXR2.png", type="findings"))]
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith("iu_xray: '1.xml': passed over (")


def test_deep_and_odd_xml_is_read(tmp_path):
    deep = b"<a>" * 100_000 + b"</a>" * 100_000
    odd = ("\ufeff<a><AbstractText>x</AbstractText><AbstractText Label='Impression'>y</AbstractText>"
           "<AbstractText Label='IMPRESSION'>z</AbstractText><parentImage/></a>").encode()
    declared = b'<?xml version="1.0" encoding="utf-7"?><a>+ADwAIQ-DOCTYPE<parentImage id="CXR3"/></a>'
    write_iu_xray(tmp_path / "iu_xray", {1: deep, 2: odd, 3: declared}, {"CXR3.png": b"three"})
    assert list(DATASETS["iu_xray"].read(tmp_path / "iu_xray")) == [
        ("train", Record("3/CXR3", NONE, "", b"three", "CXR3.png")),
        ("train", Record("2/", IMPRESSION, "Impression: y z", None, ".png", type="impression"))]


def test_members_that_are_links_or_lie_outside_are_passed_over(tmp_path):
    raw = tmp_path / "in" / "iu_xray"
    raw.mkdir(parents=True)
    report = study_xml(1, ["CXR1", "CXR2", "CXR3"], FINDINGS="Clear.")
    write_tar(raw / "NLMCXR_reports.tgz", {
        "ecgen-radiology": link("ecgen-radiology", "", tarfile.DIRTYPE), "ecgen-radiology/1.xml": report,
        "../../x.xml": study_xml(9, ["CXR9"], FINDINGS="x"),
        "/tmp/y.xml": study_xml(8, ["CXR8"], FINDINGS="y"),
        "ecgen-radiology/7.xml": link("ecgen-radiology/7.xml", "/etc/passwd"), "notes.txt": b"hello"})
    write_tar(raw / "NLMCXR_png.tgz", {
        "CXR1.png": link("CXR1.png", "/etc/passwd"),
        "CXR2.png": link("CXR2.png", "CXR3.png", tarfile.LNKTYPE),
        "../../x.png": b"x", "../CXR1.png": b"outside", "/CXR1.png": b"outside", "./CXR3.png": b"three",
        "pipe.png": link("pipe.png", "", tarfile.FIFOTYPE), "CXR3.txt": b"text"})
    before = sorted(tmp_path.rglob("*"))
    assert [(record.id, record.image) for _, record in DATASETS["iu_xray"].read(raw)] == [
        ("1/CXR3", b"three"), ("1/CXR1", None), ("1/CXR2", None)]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["NLMCXR_reports.tgz", "NLMCXR_png.tgz"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_damaged_archive_is_refused_by_name(name, damage, tmp_path):
    raw = tmp_path / "iu_xray"
    write_iu_xray(raw, IU_XRAY_REPORTS, {f"{name}.png": picture(7) for name in IU_XRAY_IMAGES})
    content = (raw / name).read_bytes()
    contents = {"cut": content[:len(content) // 2], "empty": b"", "text": b"<html>" * 200}
    (raw / name).write_bytes(contents[damage])
    with pytest.raises(UserError, match=f"{name}: damaged archive.*fetch it again") as error:
        list(DATASETS["iu_xray"].read(raw))
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------- MIMIC-CXR

FULL_REPORT = """\
                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ year old woman with a cough  // pneumonia?

 COMPARISON:  ___

 FINDINGS:

 The heart is not enlarged.  A small effusion on the left side is unchanged since
 ___.  There is no pneumothorax.

 IMPRESSION:

 Small left effusion
"""
ADDENDUM_REPORT = """\
                                 ADDENDUM
 The referring physician ___ was called.
 ADDENDUM:  Read again at 10:30.
______________________________________________________________________________
                                 FINAL REPORT
 HISTORY:  Cough.

 IMPRESSION:  No acute process.
"""
PLAIN_REPORT = """\
                                 FINAL REPORT
 INDICATION:  Fever.

 The heart is normal.

 The lungs are
 clear.
"""
MIMIC_STUDIES = [  # subject, study, report, split of each image
    ("10000032", "50414267", FULL_REPORT, ["train", "train", "train"]),
    ("10000032", "50000002", ADDENDUM_REPORT, ["train"]),
    ("11000003", "50000003", PLAIN_REPORT, ["validate"]),
    ("12000004", "50000004", None, ["test"]),
    ("12000004", "50000005", " FINAL REPORT\n FINDINGS:  Tilted by 5\xb0.\n\n IMPRESSION:  ___.\n",
     ["test", "test"]),
    ("19000006", "50000006", " FINAL REPORT\n INDICATION:  Cough.\n", ["train"])]


def write_table(path, rows):
    with gzip.open(path, "wt", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_mimic_cxr(raw, studies, without=()):
    """The JPG tree, its tables and the zip of reports; the bytes of image-n are its number."""
    raw.mkdir()
    rows, views = [], []
    with zipfile.ZipFile(raw / "mimic-cxr-reports.zip", "w") as archive:
        for subject, study, report, splits in studies:
            folder = f"files/p{subject[:2]}/p{subject}/s{study}"
            if report is not None:
                report = report.replace("\n\n", "\n \n")  # blank lines have a space there
                archive.writestr(f"{folder}.txt", report.encode("latin-1"))
            for split in splits:
                dicom = f"image-{len(rows)}"
                row = {"dicom_id": dicom, "study_id": study, "subject_id": subject, "split": split}
                view = ["PA", "LATERAL", "", "AP"][len(rows) % 4]
                rows.append(row)
                views.insert(0, row | {"ViewPosition": view})  # in another order
                if dicom not in without:
                    (raw / folder).mkdir(parents=True, exist_ok=True)
                    (raw / folder / f"{dicom}.jpg").write_bytes(dicom[6:].encode())
    write_table(raw / "mimic-cxr-2.0.0-split.csv.gz", rows)
    write_table(raw / "mimic-cxr-2.0.0-metadata.csv.gz", views)


def test_mimic_cxr_is_read_in_full(tmp_path):
    raw, mimic_cxr = tmp_path / "mimic_cxr", DATASETS["mimic_cxr"]
    write_mimic_cxr(raw, MIMIC_STUDIES, without=["image-2"])

    def record(number, folder, question, answer, type, view):
        study, image = folder.split("/")[1], str(number).encode()
        return Record(f"{study}/image-{number}", question, answer, None if number == 2 else image,
                      f"files/{folder[:3]}/{folder}/image-{number}.jpg", context=view, type=type)

    full = (BOTH, "Findings: The heart is not enlarged. A small effusion on the left side is unchanged "
            "since ___. There is no pneumothorax. Impression: Small left effusion",
            "findings and impression")
    plain = LAST, "The heart is normal. The lungs are clear.", "last paragraph"
    addendum = IMPRESSION, "Impression: No acute process.", "impression"
    tilted = FINDINGS, "Findings: Tilted by 5\ufffd.", "findings"  # it was no UTF-8
    wanted = [
        ("train", record(0, "p10000032/s50414267", *full, "view: PA")),
        ("train", record(1, "p10000032/s50414267", *full, "view: LATERAL")),
        ("train", record(2, "p10000032/s50414267", *full, "")),  # no jpg, and no view
        ("train", record(3, "p10000032/s50000002", *addendum, "view: AP")),
        ("validation", record(4, "p11000003/s50000003", *plain, "view: PA")),
        ("test", record(5, "p12000004/s50000004", NONE, "", "", "view: LATERAL")),  # no report
        ("test", record(6, "p12000004/s50000005", *tilted, "")),
        ("test", record(7, "p12000004/s50000005", *tilted, "view: AP")),
        ("train", record(8, "p19000006/s50000006", NONE, "", "", "view: PA"))]
    assert list(mimic_cxr.read(raw)) == wanted
    assert sorted(mimic_cxr.find(tmp_path)) == [
        "mimic-cxr-2.0.0-metadata.csv.gz", "mimic-cxr-2.0.0-split.csv.gz", "mimic-cxr-reports.zip"]

    (raw / "mimic-cxr-2.0.0-metadata.csv.gz").unlink()
    without = list(mimic_cxr.read(raw))
    assert {record.context for _, record in without} == {""}
    assert [(split, record.id, record.answer) for split, record in without] == [
        (split, record.id, record.answer) for split, record in wanted]
    assert sorted(mimic_cxr.find(tmp_path)) == ["mimic-cxr-2.0.0-split.csv.gz", "mimic-cxr-reports.zip"]
    assert not mimic_cxr.urls and not mimic_cxr.hub  # nothing that could be fetched without an agreement
    assert sum(mimic_cxr.counts.values()) == 377110


def test_a_report_is_read_once_a_study(tmp_path, monkeypatch):
    write_mimic_cxr(tmp_path / "mimic_cxr", MIMIC_STUDIES)
    names, opened = [], zipfile.ZipFile.open
    monkeypatch.setattr(zipfile.ZipFile, "open",
                        lambda archive, member: names.append(member) or opened(archive, member))
    assert len(list(DATASETS["mimic_cxr"].read(tmp_path / "mimic_cxr"))) == 9 and len(names) == 5


def test_damaged_mimic_files_are_refused_by_name(tmp_path):
    raw, read = tmp_path / "mimic_cxr", DATASETS["mimic_cxr"].read
    write_mimic_cxr(raw, MIMIC_STUDIES[:1])
    table = raw / "mimic-cxr-2.0.0-split.csv.gz"
    whole = table.read_bytes()
    row = {"dicom_id": "a", "study_id": "5", "subject_id": "1", "split": "train"}
    for column in row:
        write_table(table, [{name.replace(column, "other"): value for name, value in row.items()}])
        with pytest.raises(UserError, match=f"split.csv.gz: no column '{column}' among its .*other"):
            list(read(raw))
    write_table(table, [row | {"split": "../../x"}])
    with pytest.raises(UserError, match="split.csv.gz: '../../x' is none of train, validate, test"):
        list(read(raw))
    table.write_bytes(whole[:-12])
    with pytest.raises(UserError, match="split.csv.gz: damaged table"):
        list(read(raw))
    table.write_bytes(whole)
    write_table(raw / "mimic-cxr-2.0.0-metadata.csv.gz", [{"dicom_id": "a", "View": "PA"}])
    with pytest.raises(UserError, match="metadata.csv.gz: no column 'ViewPosition'"):
        list(read(raw))
    (raw / "mimic-cxr-2.0.0-metadata.csv.gz").unlink()
    reports = raw / "mimic-cxr-reports.zip"
    content = reports.read_bytes()
    place = content.index(b"FINAL REPORT")  # stored, not deflated: one flipped bit of one report
    reports.write_bytes(content[:place] + b"f" + content[place + 1:])
    assert [record.answer for _, record in read(raw)] == ["", "", ""]
    reports.write_bytes(content[:len(content) // 2])
    with pytest.raises(UserError, match="mimic-cxr-reports.zip: damaged zip"):
        list(read(raw))


# ----------------------------------------------------------------------------- sections

@pytest.mark.parametrize("text, sections", [
    ("", {}), (" \n \n", {}),
    (" FINAL REPORT\n Clear lungs.", {"preamble": "FINAL REPORT Clear lungs."}),
    (" FINDINGS:  Clear.", {"findings": "Clear."}), ("FINDINGS:  Clear.", {"findings": "Clear."}),
    (" FINDINGS:", {}), ("FINDINGS:Clear.", {"preamble": "FINDINGS:Clear."}),  # no space: no header
    (" FINDINGS:  Clear at\n both\tbases.\n \n No effusion.\n",
     {"findings": "Clear at both bases. No effusion."}),
    (" FINDINGS:\n \n Clear.\n \n IMPRESSION:\n \n Normal.\n",
     {"findings": "Clear.", "impression": "Normal."}),
    (" IMPRESSION:  1.  Normal.\n 2.  No change.\n", {"impression": "1. Normal. 2. No change."}),
    (" Findings:  Clear.\n", {"preamble": "Findings: Clear."}),  # only upper case is a header
    (" FINDINGS:  Clear. IMPRESSION:  Normal.\n",  # only at the start of a line
     {"findings": "Clear. IMPRESSION: Normal."}),
    (" FINDINGS:\n AP VIEW:  Clear.\n", {"findings": "AP VIEW: Clear."}),  # a header's own first line
    (" CHEST, PA LATERAL:\n \n INDICATION:  Cough.\n \n FINDINGS:  Clear.\n",
     {"indication": "Cough.", "findings": "Clear."}),  # an empty one, then the one with text
    (" FINDINGS:  Clear.\n \n FINDINGS:\n \n IMPRESSION:  Normal.\n",
     {"findings": "Clear.", "impression": "Normal."}),
    (" IMPRESSION:  Wet.\n \n IMPRESSION:  Dry.\n", {"impression": "Dry."}),  # the last one counts
    (" FINDINGS AND IMPRESSION:  Clear.\n", {"impression": "Clear."}),
    (" FINDNGS:  Clear.\n IMPRESSON:  Normal.\n", {"findings": "Clear.", "impression": "Normal."}),
    (" CONCLUSION:  Normal.\n REASON FOR EXAM:  Cough.\n",
     {"impression": "Normal.", "indication": "Cough."}),
    (" FINDINGS:  ___ line at ___:  unchanged.\n ___\n",
     {"findings": "___ line at ___: unchanged. ___"}),
    (" FINDINGS:  Clear.\r\n \r\n IMPRESSION:  Normal.\r\n",
     {"findings": "Clear.", "impression": "Normal."}),
    # neither: what follows the first paragraph of the last section
    (" INDICATION:  Cough.\n \n Clear.\n \n No effusion.\n",
     {"indication": "Cough.", "last paragraph": "Clear. No effusion."}),
    (" FINAL REPORT\n \n Clear.\n", {"preamble": "FINAL REPORT", "last paragraph": "Clear."}),
    (" CXR: \n \n Clear.\n", {"last paragraph": "Clear."}),
    (" INDICATION:  Cough.\n \n Clear.\n \n NOTIFICATION:\n",
     {"indication": "Cough.", "last paragraph": "Clear."}),
    (" INDICATION:  Cough.\n \n \n", {"indication": "Cough."}),
    (" INDICATION:  Cough.\n \n Old.\n \n FINDINGS:  Clear.\n",
     {"indication": "Cough. Old.", "findings": "Clear."}),
    # addenda
    (" ADDENDUM\n Called.\n" + "_" * 78 + "\n FINAL REPORT\n IMPRESSION:  Normal.\n",
     {"preamble": "FINAL REPORT", "impression": "Normal."}),
    (" ADDENDUM:  Called.\n IMPRESSION:  Changed.\n" + "_" * 78 + "\n FINAL REPORT\n"
     " IMPRESSION:  Normal.\n",
     {"addendum": "Called.", "preamble": "FINAL REPORT", "impression": "Normal."}),
    (" IMPRESSION:  Changed.\n " + "_" * 78 + " \n FINAL REPORT\n FINDINGS:  Clear.\n",
     {"impression": "Changed.", "preamble": "FINAL REPORT", "findings": "Clear."}),
    (" IMPRESSION:  Normal.\n" + "_" * 78 + "\n Signed.\n",
     {"impression": "Normal.", "preamble": "Signed."})])
def test_a_report_is_cut_into_sections(text, sections):
    assert report_sections(text) == sections


@pytest.mark.parametrize("section, headers", [
    ("findings", "FINDINGS|FINDING|FINDINS|FINIDNGS|REFERENCE FINDINGS|CHEST|CHEST, TWO VIEWS|AP VIEW|"
                 "PORTABLE AP CHEST|PA AND LATERAL VIEWS|LATERAL AND PA|FRONTAL AND LATERAL|BONE WINDOW|"
                 "RIBS, LEFT"),
    ("impression", "IMPRESSION|CONCLUSION|IMPRESSON|MPRESSION|IMORESSION|IMPRESSION AND RECOMMENDATION|"
                   "FINDINGS/IMPRESSION|FINDINGS/ IMPRESSION"),
    ("comparison", "COMPARISON|COMPARISONS|COMPARISON FILM|COMPARSION|REFERENCE EXAM"),
    ("indication", "INDICATION|IDICATION|CLINICAL INDICATION|REASON FOR EXAMINATION"),
    ("history", "HISTORY|CLINICAL HISTORY|PATIENT HISTORY|CLINICAL INFORMATION|PFI"),
    ("examination", "EXAM|EXAMINATION|TYPE OF EXAMINATION"), ("addendum", "ADDENDUM|FINAL ADDENDUM"),
    ("recommendations", "RECOMMENDATION(S)"), ("wet read", "WET READ|WETREAD"),
    ("medication", "MEDICATION"), ("technique", "TECHNIQUE"), ("picc line", "PICC LINE"), ("", " ")])
def test_many_headers_name_one_section(section, headers):
    assert {name_section(header) for header in headers.split("|")} == {section}


@pytest.mark.parametrize("sections, answer, type", [
    ({}, "", ""), ({"indication": "Cough."}, "", ""), ({"findings": "", "impression": "XXXX"}, "", ""),
    ({"impression": "b", "findings": "a"}, "Findings: a Impression: b", "findings and impression"),
    ({"findings": "___ 2. ___.", "impression": "b"}, "Impression: b", "impression"),
    ({"indication": "c", "last paragraph": "d"}, "d", "last paragraph"),
    ({"last paragraph": "___"}, "", "")])
def test_sections_are_joined_under_their_names(sections, answer, type):
    assert join_sections(sections) == (answer, type)
    assert type in REPORT_QUESTIONS


def test_long_hostile_reports_take_no_time():
    start = time.process_time()
    for text in ("A" * 10**6, " " * 10**6, " A:\n" * 10**5, "\n \n" * 10**5, "_" * 10**6 + "x",
                 " " * 10**6 + "_", "_" * 10**6, " FINDINGS: " * 10**5):
        report_sections(text)
    assert time.process_time() - start < 10
