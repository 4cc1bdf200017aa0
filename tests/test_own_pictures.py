"""The pictures that a table names: found by whatever it calls them, never one in place of another."""

import unicodedata

import numpy as np
import pytest
from PIL import Image

from formats.frames import Frame, Scan, ScanSettings
from formats.pictures import Pictures, file_of
from plumbing.flags import UserError
from plumbing.own import SECRET
from prepare.own_pictures import views_of, written_name
from test_dicom import AXIAL, I16, made, save

FILES = ("images/0001.png", "images/Müller.PNG", "other/0002.jpg", "other/images/0003.png", "deep/0004.png",
         "deep/er/0004.png", "1.2.840.7.png", "Case.png", "case.png")


def put(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(path)


def put_series(folder, count=5, uid="1.2.3", **header):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        save(folder / f"IM{number}", made(I16 + number, ImageOrientationPatient=AXIAL, SeriesInstanceUID=uid,
                                          ImagePositionPatient=[0, 0, number], InstanceNumber=number, **header))


@pytest.fixture
def folder(tmp_path):
    for seed, name in enumerate(FILES):
        put(tmp_path / "data" / name, seed)
    return tmp_path / "data"


def found(pictures, called, **more):
    scan = pictures.find("t.csv: row 2", called, **more)
    return scan and pictures.name_of(file_of(scan.sources[0]))


@pytest.mark.parametrize("called, wanted", [
    ("images/0001.png", 0), ("./images/0001.png", 0), (" images/0001.png ", 0), ("0001.png", 0), ("0001", 0),
    ("0001.dcm", 0), ("images/0001.jpg", 0), ("images\\0001.png", 0), (r"C:\Users\ann\data\images\0001.png", 0),
    ("/old/place/images/0001.png", 0), ("{}/images/0001.png", 0), ("IMAGES/0001.PNG", 0),
    (unicodedata.normalize("NFD", "Müller.png"), 1), (unicodedata.normalize("NFC", "müller"), 1),
    ("0002.png", 2), ("images/0003.png", 3), ("/x/images/0003.png", 3), ("deep/0004.png", 4), ("deep/er/0004", 5),
    ("1.2.840.7", 6), ("Case.png", 7), ("case.png", 8), ("0005.png", None), ("", None), ("a\0b", None),
    ("no/folder", None),
    ("0001.2", None), ("1.2.840", None), (".", None), ("x" * 5000, None)])
def test_a_picture_is_found_by_whatever_it_is_called(folder, called, wanted):
    name = None if wanted is None else FILES[wanted]
    assert found(Pictures(folder), called.replace("{}", str(folder))) == name


@pytest.mark.parametrize("called", ["0004.png", "0004", "/elsewhere/0004.jpg", "CASE.png"])
def test_of_two_that_could_be_meant_none_is_taken(folder, called):
    with pytest.raises(UserError, match="^t.csv: row 2: 2 images are called .*; name it by its path$"):
        found(Pictures(folder), called)


def test_paths_start_beside_the_table_first(folder):
    pictures = Pictures(folder)
    assert found(pictures, "0004.png", beside=folder / "deep/er") == "deep/er/0004.png"
    assert found(pictures, "0004", beside=folder / "deep/er") == "deep/er/0004.png"
    assert found(pictures, "../0004.png", beside=folder / "deep/er") == "deep/0004.png"
    assert found(pictures, "images/0001.png", beside=folder / "deep/er") == "images/0001.png"


def test_a_path_out_of_the_folder_is_followed_where_that_is_allowed(folder, tmp_path):
    put(tmp_path / "apart/9.png")
    for called in (f"{tmp_path}/apart/9.png", "../apart/9.png"):
        assert found(Pictures(folder), called) == "../apart/9.png"
        assert found(Pictures(folder, outside=False), called) is None


def test_a_path_that_is_there_needs_no_look_at_all_others(folder, monkeypatch):
    monkeypatch.setattr("formats.pictures.files_below", lambda folder: pytest.fail("it is looked through"))
    assert found(Pictures(folder), "images/0001.png") == "images/0001.png"


def test_what_is_found_by_its_name_alone_is_said(folder):
    pictures = Pictures(folder)
    assert found(pictures, "deep/0001.png") == "images/0001.png" and found(pictures, "/a/images/0001.png")
    note, = pictures.notes()
    assert note == ("1 pictures are found by the name of their file alone: images/0001.png is taken for deep/0001.png, "
                    "the first")


def test_a_series_is_found_by_its_folder_and_a_slice_by_its_file(tmp_path):
    put_series(tmp_path / "ct_12/axial", uid="1.2.9")
    put_series(tmp_path / "ct_13", uid="1.2.8")
    pictures = Pictures(tmp_path, ScanSettings(slices="every:2"))
    for called in ("ct_12/axial", "ct_12", "axial", "/pacs/ct_12/axial", "C:\\ct_12\\axial"):
        scan = pictures.find("row", called)
        assert scan.labels == ("slice 1 of 5", "slice 3 of 5", "slice 5 of 5"), called
    one = pictures.find("row", "ct_13/IM1")  # which --slices leaves out of the whole series
    assert one.labels == ("",) and one.sources[0].file.name == "IM1"
    put_series(tmp_path / "ct_13", uid="1.2.7", PatientID="another")
    put_series(tmp_path / "two", uid="1.2.6")
    put(tmp_path / "two/key.png")
    with pytest.raises(UserError, match="row: 2 images or series are in 'two'; name one"):
        Pictures(tmp_path).find("row", "two")


def test_what_is_no_picture_is_passed_over_and_counted(folder):
    (folder / SECRET).write_text("a secret, of which nothing is said")
    for name in (".DS_Store", "images/._0001.png", "images/Thumbs.db", "desktop.ini", ".hidden/0001.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "notes.txt").write_text("none")
    (folder / "no end").write_bytes((folder / "images/0001.png").read_bytes())
    (folder / "gone.png").symlink_to(folder / "nowhere")
    (folder / "cut.dcm").write_bytes(bytes(128) + b"DICM")
    pictures = Pictures(folder)
    assert set(pictures.files) == {*FILES, "no end"}
    cut, hidden = pictures.notes()
    assert cut.startswith("1 files cannot be used, cut.dcm the first: ")
    assert hidden == "5 files passed over, .DS_Store the first: hidden, or left by programs"


def test_warnings_are_counted_once_a_scan(tmp_path):
    for number in range(3):
        save(tmp_path / f"{number}.dcm", made(I16, Modality="US", SeriesInstanceUID=f"1.{number}"))
    pictures = Pictures(tmp_path)
    for called in ("0.dcm", "0", "1.dcm", "2", "0.dcm"):
        pictures.find("row", called)
    assert pictures.notes() == ["3 scans may have text burned in, 0.dcm the first"]


def test_views_have_roles_places_and_names_that_tell_no_one(folder):
    scan = Scan("f", (folder / "images/0001.png", Frame(folder, "0", "dicom")), ("page 1 of 2", "page 2 of 2"))
    first, second = views_of(scan, "f.tif", "frontal")
    assert (first.name, first.role) == ("f.tif page 1 of 2", "frontal page 1 of 2")
    assert first.image == (folder / "images/0001.png").read_bytes() and second.image == scan.sources[1]
    assert views_of(Scan("f", (folder / "gone.png",), ("",)), "g")[0].image is None
    assert written_name(scan, "meier/1.dcm", {}) == "meier/1.dcm"
    for header in (Scan("f", (), (), "P1"), Scan("f", (), (), "", "1.2.3")):
        assert written_name(header, "meier/1.dcm", {"meier/1.dcm": "5a"}) == "scan 5a"
