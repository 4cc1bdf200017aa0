"""look/follow.py, bench/progress.py and what the scripts in extras/ need: what goes wrong is one line."""

import re

import pytest

from data import Shard, Tokenizer
from extras.bench import progress
from extras.look import follow
from plumbing.flags import UserError, parse_flags, require_packages
from prepare import sample
from test_eval import TOKENIZER, write_questions


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("follow")
    write_questions(folder, "scans", {"test": [("what is this?", "a lung", 1), ("why?", "no", 2)]})
    (folder / "tokenizer.model").write_bytes(TOKENIZER)
    shard = Shard(folder / "scans" / "test")
    shard.samples = shard.samples.copy()
    shard.samples["image"][1] = -1  # as of a question about a text
    return shard, Tokenizer(folder / "tokenizer.model")


@pytest.mark.parametrize("argument, told", [
    ("--number=2", "--number=2: .*scans/test has samples 0 to 1"), ("--number=5000", "has samples 0 to 1"),
    ("--number=-1", "--number=-1: 0 or more"), ("--number=1", "--number=1: asks about no image")])
def test_a_number_that_is_not_there_is_told_in_one_line(argument, told, split):
    with pytest.raises(UserError, match=told) as caught:
        follow.require_sample(*split, parse_flags(follow.Config, [argument]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flags, told", [
    (["--data=xyzzy"], "--data: no raw files of 'xyzzy' in raw"),
    (["--data=path_vqa", "--raw_dir=nowhere"], "--data: no raw files of 'path_vqa' in nowhere"),
    (["--data=sample", "--split=test"], "raw: no 'xyzzy' in sample's test split")])
def test_a_sample_that_the_raw_files_have_not_is_told_in_one_line(flags, told, monkeypatch):
    monkeypatch.setattr(sample, "SPLITS", {"train": 1, "test": 1})  # images a class, each of which is drawn
    with pytest.raises(UserError, match=re.escape(told)):
        follow.find_record("xyzzy", parse_flags(follow.Config, flags))


def test_progress_tells_each_row_and_what_is_left(capsys, monkeypatch):
    clock = iter([0, 60, 120, 180])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    rows = progress.Progress(3, "rows")
    for name in "abc":
        rows.row(name)
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [
        "1 of 3 rows: a; about 2 minutes to go", "2 of 3 rows: b; about 60 seconds to go", "3 of 3 rows: c"]


def test_many_rows_are_told_now_and_then(capsys, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    rows = progress.Progress(0, "states", pause=10)
    for _ in range(25):
        rows.row()
    assert capsys.readouterr().err.splitlines() == ["1 states", "11 states", "21 states"]


def test_a_missing_package_is_told_with_what_to_run(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["training.py"])
    require_packages("tests/requirements.txt", "json")
    with pytest.raises(SystemExit) as stopped:
        require_packages("tests/requirements.txt", "json", "xyzzy")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "training.py: no xyzzy here; run `pip install -r tests/requirements.txt`\n"
