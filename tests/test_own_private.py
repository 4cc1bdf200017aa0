"""
What no shard may hold: 200 files with planted names, ids, dates and addresses in headers, in names of folders and in
columns are prepared, and every byte that was written is searched.
"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from plumbing.own import SECRET
from plumbing.shards import Shard
from prepare.all import Config, prepare_own
from prepare.questions import train_sample_tokenizer

pydicom = pytest.importorskip("pydicom")
from test_dicom import I16, item, made, save  # noqa: E402

COUNT, SIDE = 40, 16
PEOPLE = [("Plantmann", f"Q{number}uerida", f"PID{number:03}X") for number in range(8)]  # of whom each has 5 files


def planted(number):
    """What a header says of file `number`, {element: text}, of which no text may be written."""
    last, first, patient = PEOPLE[number // 5]
    return {"PatientName": f"{last}^{first}", "PatientID": patient, "PatientBirthDate": f"1931{number % 12 + 1:02}17",
            "PatientAddress": f"{number} Plantstreet", "AccessionNumber": f"ACCN{number:04}",
            "InstitutionName": "Plantham General", "ReferringPhysicianName": "Plantdoc^R", "StudyDate": "20171129",
            "StudyTime": f"1121{number:02}.123456", "StudyID": f"SID{number:05}",
            "StudyInstanceUID": f"1.2.77.{number // 5 + 1}.{number % 5 // 2}9",
            "SeriesInstanceUID": f"1.2.88.{number + 1}9", "SOPInstanceUID": f"1.2.99.{number + 1}9", "ImageComments":
            "seen by Plantnurse", "DeviceSerialNumber": f"DEV{number:04}Y", "OtherPatientIDs": f"OTHER{number:03}"}


def put_dicom(path, number, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng([seed, number]).integers(-100, 100, (SIDE, SIDE)).astype(I16.dtype)
    dataset = made(pixels, **planted(number))
    block = dataset.private_block(0x0011, "PLANTVENDOR", create=True)
    block.add_new(1, "LO", f"private Plantmann {number}")
    dataset.OtherPatientIDsSequence = [item(PatientID=f"NESTED{number:03}", IssuerOfPatientID="Plantissuer")]
    save(path, dataset)


def put_png(path, number, seed=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng([seed, number]).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def label_folders(folder):
    """Class folders of DICOM in folders that are called by names, in one class alone."""
    for number in range(COUNT):
        last, first, _ = PEOPLE[number // 5]
        place = f"benign/{last}_{first}_1931" if number // 5 % 2 else "malignant"
        put_dicom(folder / place / f"{last}{number}.dcm", number)
    return folder


def label_table(folder):
    """A csv of plain images whose names have the patient's id in them."""
    rows = ["filename,label,patient_id,name,birth date"]
    for number in range(COUNT):
        last, first, patient = PEOPLE[number // 5]
        put_png(folder / patient / f"{patient}_film{number}.png", number)
        rows.append(f"{patient}/{patient}_film{number}.png,{'ab'[number % 2]},{patient},{first} {last},17.04.1931")
    (folder / "list.csv").write_text("\n".join(rows))
    return folder / "list.csv"


def boxes(folder):
    """A csv of boxes on DICOM."""
    rows = ["image,label,x1,y1,x2,y2"]
    for number in range(COUNT):
        put_dicom(folder / f"Plantmann_{number}.dcm", number, seed=2)
        rows.append(f"Plantmann_{number}.dcm,cyst,1,1,9,{5 + number % 8}")
    (folder / "boxes.csv").write_text("\n".join(rows))
    return folder / "boxes.csv"


def questions(folder):
    """A csv of questions about DICOM, with columns that are not used."""
    rows = ["image,question,answer,MRN,physician,accession"]
    for number in range(COUNT):
        last, first, patient = PEOPLE[number // 5]
        put_dicom(folder / f"{last}, {first}/IM{number}.dcm", number, seed=3)
        rows.append(f'"{last}, {first}/IM{number}.dcm",what is image {number % 5}?,kept words {number},{patient},'
                    f"Plantdoc R,ACCN{number:04}")
    (folder / "questions.csv").write_text("\n".join(rows))
    return folder / "questions.csv"


def studies(folder):
    """A folder a study in one a patient, called by name and date, with a report."""
    for number in range(COUNT):
        last, first, _ = PEOPLE[number // 5]
        study = folder / f"{last}_{first}" / f"{number}_20171129"
        put_dicom(study / "IM1", number, seed=4) if number % 2 else put_png(study / "IM1.png", number, seed=4)
        (study / "report.txt").write_text(f"FINDINGS: kept words {number}.\nIMPRESSION: kept {number}.")
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """(folder of shards, planted texts, folder of the sources)"""
    folder = tmp_path_factory.mktemp("private")
    (folder / "tokenizer.model").write_bytes(train_sample_tokenizer())
    for make in (label_folders, label_table, boxes, questions, studies):
        prepare_own(Config(own=str(make(folder / "own" / make.__name__)), shards_dir=str(folder / "shards"),
                           tokenizer=str(folder / "tokenizer.model"), image_size=SIDE, workers=1))
    texts = {text for number in range(COUNT) for text in planted(number).values()}
    texts |= {part for person in PEOPLE for part in person}
    return folder / "shards", texts | {"PLANT", "NESTED", "17.04.1931", "OTHER0", "_1931"}, folder / "own"


def test_no_planted_text_is_in_any_byte_that_was_written(shards):
    folder, texts, own = shards
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(list(own.rglob("*.dcm")) + list(own.rglob("IM*")) + list(own.rglob("*.png"))) >= 200
    assert sum(len(Shard(path.parent)) for path in files if path.name == "manifest.json") >= 4 * COUNT
    found = [(path.relative_to(folder).as_posix(), text) for path in files for content in [path.read_bytes().lower()]
             for text in sorted(texts) for encoding in ("utf-8", "utf-16-le", "utf-16-be")
             if text.lower().encode(encoding) in content]
    assert found == []
    names = [path.relative_to(folder).as_posix().lower() for path in folder.rglob("*")]
    assert not any(text.lower() in name for name in names for text in texts)


def test_words_that_were_named_are_kept_and_patients_stay_together(shards):
    folder, *_ = shards
    for name, count in (("label_folders", 8), ("list", 8), ("boxes", 8), ("questions", 8), ("studies", 8)):
        records = [(split.name, record) for split in (folder / name).iterdir() if split.is_dir()
                   for record in Shard(split).read_records()]
        groups = {}
        for split, record in records:
            groups.setdefault(record["group"], set()).add(split)
        assert len(groups) == count and all(len(splits) == 1 for splits in groups.values()), (name, groups)
        assert len(records) == COUNT and all(group.startswith("patient ") for group in groups)
    assert any("kept words 7" in record["answer"] for record in
               (record for split in (folder / "studies").iterdir() if split.is_dir()
                for record in Shard(split).read_records()))


def test_the_secret_is_made_where_patients_are_named_and_stays_there(shards):
    folder, _, own = shards
    keys = sorted(path.relative_to(own).as_posix() for path in own.rglob(SECRET))
    assert keys == [f"{name}/{SECRET}" for name in ("boxes", "label_folders", "label_table", "questions", "studies")]
    secrets = {(own / key).read_text().strip() for key in keys}
    assert len(secrets) == 5 and not any(secret.encode() in path.read_bytes() for secret in secrets
                                         for path in folder.rglob("*") if path.is_file())
    assert not list(Path(folder).rglob(SECRET))
