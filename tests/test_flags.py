"""The command line: types from the dataclass, mistakes answered in one line."""

import errno
import os
import re
from dataclasses import dataclass
from typing import Literal

import pytest

import data
from data import UserError, parse_flags


@dataclass(frozen=True)
class Config:
    name: str = ""  # what to call it
    steps: int = 10  # how many, at 100% speed
    learning_rate: float = 5e-5  # peak
    resume: bool = False  # go on from before
    how: Literal["full", "lora"] = "full"  # what trains


@pytest.mark.parametrize("arguments, changed", [
    ([], {}), (["--steps=3"], {"steps": 3}), (["--steps", "-3"], {"steps": -3}),
    (["--learning_rate=1"], {"learning_rate": 1.0}), (["--learning_rate=3."], {"learning_rate": 3}),
    (["--name=a=b"], {"name": "a=b"}), (["--name="], {"name": ""}), (["--name=3"], {"name": "3"}),
    (["--resume=true"], {"resume": True}), (["--resume=False"], {"resume": False}),
    (["--how=lora"], {"how": "lora"}), (["--steps=1", "--steps=2"], {"steps": 2}),
    (["--name=a b", "--how=lora"], {"name": "a b", "how": "lora"})])
def test_flags_take_the_type_of_their_field(arguments, changed):
    config = parse_flags(Config, arguments)
    assert config == Config(**changed)
    assert [type(value) for value in vars(config).values()] == [str, int, float, bool, str]


@pytest.mark.parametrize("argument, message", [
    ("--step=3", "unknown flag '--step=3': did you mean --steps?"),
    ("--learning-rate=1", "did you mean --learning_rate?"),
    ("--resum=true", "did you mean --resume?"), ("lora", "unknown flag 'lora'"),
    ("--xyzzy=1", "unknown flag '--xyzzy=1': see --help"), ("--steps", "--steps"),
    ("--steps=1.5", "--steps: invalid int value: '1.5'"), ("--steps=", "--steps"),
    ("--learning_rate=fast", "--learning_rate: invalid float value: 'fast'"),
    ("--how=half", "--how: invalid choice: 'half'"), ("--resume=yes", "--resume"),
    ("--resume=1", "--resume"), ("--resume", "--resume")])
def test_mistaken_flag_is_named_in_one_line(argument, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        parse_flags(Config, [argument])
    assert "\n" not in str(error.value)


def test_help_lists_every_comment_and_exits_with_0(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_flags(Config, ["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("what to call it (default: none)", "how many, at 100% speed (default: 10)",
                  "peak (default: 5e-05)", "go on from before (default: False)",
                  "--how full|lora what trains (default: full)"):
        assert words in text


def test_user_error_exits_with_2_and_one_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_vlm.py", "--stepz=1"])
    with pytest.raises(SystemExit) as stop:
        data.run(lambda config: None, Config)
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "train_vlm.py: unknown flag '--stepz=1': did you mean --steps?\n")


@pytest.mark.parametrize("number, told", [
    (errno.ENOSPC, "x.py: [Errno 28] No space left on device: 'out/log'; make space, then run it again\n"),
    (errno.EIO, None)])
def test_a_full_disk_is_the_users_matter_and_a_broken_one_is_not(number, told, capsys, monkeypatch):
    def main(config):
        raise OSError(number, os.strerror(number), "out/log")

    monkeypatch.setattr("sys.argv", ["x.py"])
    with pytest.raises(SystemExit if told else OSError) as stop:
        data.run(main, Config)
    assert not told or (stop.value.code == 2 and capsys.readouterr().err == told)
