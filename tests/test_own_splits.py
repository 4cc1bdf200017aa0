"""Splits and folds by patient, hashed names, and what is refused."""

import csv
import re
from collections import Counter

import pytest

from plumbing.flags import UserError
from plumbing.own import HASHED, SECRET, hash_id, secret_of
from prepare.own_splits import complete_names, divide, fold_targets, group_names, hash_names, hide

GROUPS = [f"patient {number // 3}" for number in range(60)]  # 20 patients, of three samples each
LABELS = [("cyst",) if number % 4 else () for number in range(60)]


def sides(splits):
    """{group: its splits}"""
    return {group: {split for other, split in zip(GROUPS, splits) if other == group} for group in GROUPS}


def test_a_split_is_made_by_group():
    splits = divide("own", GROUPS, LABELS, [""] * 60)
    assert Counter(splits) == {"train": 42, "validation": 6, "test": 12}
    assert all(len(some) == 1 for some in sides(splits).values())
    assert splits == divide("own", GROUPS, LABELS, [""] * 60)  # the same for the same


def test_folds_are_parts_of_all_by_group():
    tested = [divide("own", GROUPS, LABELS, [""] * 60, 5, fold) for fold in range(5)]
    for splits in tested:
        assert set(splits) == {"train", "test"} and all(len(some) == 1 for some in sides(splits).values())
        assert splits.count("test") == 12
    assert [Counter(splits)["test"] for splits in zip(*tested)] == [1] * 60  # each sample is tested with once
    with pytest.raises(UserError, match="20 patients or groups are too few for --folds=30; give --folds=20"):
        divide("own", GROUPS, LABELS, [""] * 60, 30, 0)
    with pytest.raises(UserError, match="it gives a split, and --folds makes others"):
        divide("own", GROUPS, LABELS, ["train"] * 60, 5, 0)


def test_given_splits_are_kept_or_refused():
    given = ["train"] * 30 + ["validation"] * 15 + ["test"] * 15
    assert divide("own", GROUPS, LABELS, given) == given
    with pytest.raises(UserError, match=r"patient 0 is in train \(sample 1\) and in test \(sample 2\)"):
        divide("own", GROUPS, LABELS, ["train", "test", *given[2:]])
    assert divide("own", ["like 1"] * 60, LABELS, given) == given  # the leak guard leaves copies out of train
    with pytest.raises(UserError, match="1 of 60 samples are of none"):
        divide("own", GROUPS, LABELS, ["", *given[1:]])
    with pytest.raises(UserError, match="split 'fold 2' is none of train"):
        divide("own", GROUPS, LABELS, ["fold 2", *given[1:]])
    with pytest.raises(UserError, match="2 samples of 1 patients or groups are too few"):
        divide("own", GROUPS[:2], LABELS[:2], ["", ""])


def test_patients_are_hashed_with_the_folders_own_secret(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first = group_names(tmp_path / "a", ["P1", "", "p1", "P2"])
    assert first[0] == first[2] != first[3] and first[1] == "" and re.fullmatch("patient [0-9a-f]{16}", first[0])
    assert first == group_names(tmp_path / "a", ["P1", "", "p1", "P2"])
    assert first[0] != group_names(tmp_path / "b", ["P1"])[0]
    (tmp_path / "c").mkdir()
    assert hash_names(tmp_path / "c", ["", ""]) == ["", ""] and not (tmp_path / "c" / SECRET).exists()


@pytest.mark.parametrize("name, patient, hidden", [
    ("films/P1/a.png", "P1", "films/#/a.png"), ("films/P10/a.png", "P1", "films/P10/a.png"), ("P1.png", "p1", "#.png"),
    ("films/MRN0042_left.png", "MRN0042", "films/#_left.png"), ("x\\12\\a.png", "12", "x\\#\\a.png"),
    ("12/112.png", "12", "#/112.png"), ("a.png", "", "a.png"), ("1.2.3/a.png", "1.2", "1.2.3/a.png"),
    ("P1_0.png", "P1", "#_0.png"), ("ct-7_left 2.png", "7", "ct-#_left 2.png"),
    ("a slice 7 of 9", "7", "a slice 7 of 9"),
    ("P1a_xP1.png", "P1", "P1a_xP1.png")])
def test_a_patients_id_in_a_name_is_hidden(name, patient, hidden):
    assert hide(name, patient, "#") == hidden


def test_headers_name_a_patient_where_a_cell_is_empty():
    notes = []
    assert complete_names(["X1", "", "x1", "", ""], ["p1", "p1", "p1", "p2", ""], notes) == ["X1", "x1", "x1", "p2", ""]
    assert notes == []  # capitals make no other patient
    assert complete_names(["X1", "X2", ""], ["p1", "p1", "p2"], notes) == ["X1", "X2", "p2"]
    assert len(notes) == 1 and "1 patients of headers have several names in the table, X1 and X2" in notes[0]
    assert complete_names(["X1", "X2", ""], ["ANON"] * 3, notes) == ["X1", "X2", "ANON"] and len(notes) == 1
    assert complete_names(["007", "7", "a-01", "10", "100"], [""] * 5, notes)[:2] == ["007", "7"]
    assert "1 patients have names that differ in zeros before them alone, 007 and 7 the first" in notes[1]


def test_folds_have_names():
    assert fold_targets("ct", 0, -1) == [("ct", None)]
    assert fold_targets("ct", 3, 1) == [("ct_fold_1_of_3", 1)]
    assert [number for _, number in fold_targets("ct", 3, -1)] == [0, 1, 2]


def test_whose_a_hash_is_stands_in_the_folder_alone(tmp_path):
    first = hash_names(tmp_path, ["P1", "", "Müller, Ann"])
    (tmp_path / "table.csv").write_text("")
    again = hash_names(tmp_path / "table.csv", ["P2"])  # beside a table
    rows = dict(csv.reader(open(tmp_path / HASHED, encoding="utf-8", newline="")))
    assert rows == {"hash": "name", first[0]: "P1", first[2]: "Müller, Ann", again[0]: "P2"}
    assert first[0] == hash_id(secret_of(tmp_path), "P1") == hash_id(secret_of(tmp_path), "p1")
    before = (tmp_path / HASHED).stat().st_mtime_ns
    assert hash_names(tmp_path, ["P1"]) == first[:1] and (tmp_path / HASHED).stat().st_mtime_ns == before
