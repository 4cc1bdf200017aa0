"""The command line: types from the dataclass, mistakes answered in one line."""

import errno
import gc
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from plumbing.flags import (Count, Datasets, Device, ShareBelow1, UserError, parse_command_line, parse_flags,
                            run)

ROOT = Path(__file__).resolve().parent.parent


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
    (["--how=lora"], {"how": "lora"}), (["--resume"], {"resume": True}),
    (["--resume", "--steps=2"], {"resume": True, "steps": 2}),
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
    ("--resume=1", "--resume"), ("--resume=", "--resume")])
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
        parse_command_line(Config)
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "train_vlm.py: unknown flag '--stepz=1': did you mean --steps?\n")


@pytest.mark.parametrize("error, told", [
    (OSError(errno.ENOSPC, "No space left on device", "out/log"),
     "[Errno 28] No space left on device: 'out/log'; make space, then run it again"),
    (OSError(errno.EROFS, "Read-only file system", "out/log"),
     "out/log: Read-only file system; see to it, then run it again"),
    (UserError("a: b\nc"), "a: b c"), (OSError("of ours"), None), (ValueError("of ours"), None)])
def test_what_a_user_can_mend_is_one_line_and_a_fault_of_ours_is_not(error, told, capsys, monkeypatch):
    def main(config):
        raise error

    monkeypatch.setattr("sys.argv", ["x.py"])
    with pytest.raises(SystemExit if told else type(error)) as stop:
        run(main, Config())
    assert not told or (stop.value.code == 2 and capsys.readouterr().err == f"x.py: {told}\n")


@dataclass(frozen=True)
class Ranged:
    rows: Count = 1  # rows
    free: int = 0  # any number
    beta: ShareBelow1 = 0.9  # a share
    rate: float = 0.1  # any rate
    name: str = "x"  # a name
    data: Datasets = "a,b:2"  # datasets
    device: Device = "auto"  # where


@pytest.mark.parametrize("argument, told", [
    ("--rows=0", "--rows=0: 1 or more"), ("--rows=-5", "1 or more"), (f"--rows={2 ** 63}", "1 or more"),
    (f"--free={2 ** 31}", "from -2147483647 to 2147483647"), (f"--free={'9' * 5000}", "--free: invalid int value"),
    ("--beta=1", "--beta=1.0: from 0 to below 1"), ("--beta=nan", "--beta=nan: from 0 to below 1"),
    ("--beta=-0.1", "below 1"), ("--rate=nan", "a finite number"), ("--rate=inf", "a finite number"),
    ("--rate=1e999", "a finite number"), ("--name=" + "x" * 300, "at most 255 bytes a name"),
    ("--name=" + "é" * 200, "at most 255 bytes a name"), ("--name=" + "x/" * 3000, "4095 in all"),
    ("--name=a\nb", "without line breaks"), ("--data=,", "names with commas between"),
    ("--data=a,,b", "names with commas between"), ("--data=", "names with commas between"),
    ("--device=tpu", "auto, cpu, mps, cuda or cuda:0"), ("--device=cuda:x", "cuda:0"),
    (["--rows=--"], "--rows=--: -- is no value"), (["--name=--"], "--name=--: -- is no value"),
    (["--rows=1", "--rows=1"], "--rows: given twice"), (["--name=", "--rows=2", "--name=a"], "--name: given twice")])
def test_a_value_out_of_its_range_is_named_in_one_line(argument, told):
    with pytest.raises(UserError, match=re.escape(told)) as error:
        parse_flags(Ranged, argument if isinstance(argument, list) else [argument])
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("argument, value", [
    ("--rows=2147483647", 2147483647), ("--free=-3", -3), ("--beta=0", 0.0), ("--rate=-1e30", -1e30),
    ("--name=", ""), ("--name=" + "x" * 255, "x" * 255), ("--data=a", "a"), ("--data=a:0.5,b", "a:0.5,b"),
    ("--device=cuda:7", "cuda:7")])
def test_the_ends_of_a_range_are_in_it(argument, value):
    name = argument.split("=")[0].lstrip("-")
    assert getattr(parse_flags(Ranged, [argument]), name) == value


def run_without(packages, script, *arguments):
    """A script that runs where these packages, separated by blanks, are not there to be imported."""
    code = (f"import sys, runpy; sys.modules |= dict.fromkeys({packages.split()!r}); sys.path.insert(0, '.'); "
            f"sys.argv = [{script!r}, *{arguments!r}]; runpy.run_path({script!r}, run_name='__main__')")
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("script", ["train_vlm.py", "train_cls.py", "eval_vqa.py", "train_grpo.py", "prepare/all.py",
                                    "extras/share/demo.py"])
def test_help_and_a_typo_are_answered_before_any_package_is_imported(script):
    packages = "torch numpy PIL safetensors sentencepiece tokenizers tqdm sklearn streamlit"
    done = run_without(packages, script, "--xyzzy=1")
    assert done.returncode == 2 and done.stderr == f"{Path(script).name}: unknown flag '--xyzzy=1': see --help\n"
    done = run_without(packages, script, "--help")
    assert done.returncode == 0 and not done.stderr and f"usage: {Path(script).name}" in done.stdout


def test_the_list_of_datasets_needs_no_torch():
    done = run_without("torch safetensors.torch sklearn pydicom pyarrow huggingface_hub", "prepare/all.py", "--list")
    assert done.returncode == 0 and not done.stderr and "path_vqa" in done.stdout


ANSWERS = """
import sys
import numpy as np
import eval_vqa
from generate import generate
from weights import build_vlm, load_vlm, save_vlm
for name in ("sample", "gpt_oss_sample"):
    folder = f"{sys.argv[1]}/{name}"
    save_vlm(build_vlm(name, 300), folder)
    list(generate(load_vlm(folder).eval(), [([np.zeros((224, 224, 3), np.uint8)], [[1, -1, 5]])], 2))
print(*sorted({name.partition(".")[0] for name in sys.modules} & {
    "sklearn", "scipy", "transformers", "pydicom", "nibabel", "sympy", "streamlit", "matplotlib"}),
    *sorted(sys.modules.keys() & {"torch._dynamo", "torch._inductor", "torch.distributed.tensor"}))
"""


def test_a_model_is_loaded_and_answers_without_torchs_compiler(tmp_path):
    """Nor with any other package whose import takes long."""
    done = subprocess.run([sys.executable, "-c", ANSWERS, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "\n", done.stdout + done.stderr


def test_garbage_is_collected_again_once_a_script_runs(monkeypatch):
    monkeypatch.setattr("sys.argv", ["x.py"])
    config, enabled = parse_command_line(Config), gc.isenabled()
    run(lambda config: None, config)
    assert not enabled and gc.isenabled()


SCRIPT = """
import os
from dataclasses import dataclass
from plumbing.flags import parse_command_line, run

@dataclass(frozen=True)
class Config:
    lines: int = 1  # to print

def main(config):
    if config.lines < 0:
        reader, writer = os.pipe()
        os.close(reader)
        os.write(writer, b"x")
    print(*["a line"] * config.lines, sep="\\n")

run(main, parse_command_line(Config))
"""


@pytest.mark.parametrize("argument, code, told", [
    ("--lines=1", 0, ""), ("--lines=100000", 141, ""), ("--help", 0, ""), ("--lines=-1", 1, "BrokenPipeError")])
def test_a_reader_that_goes_away_is_no_fault_but_another_broken_pipe_is(argument, code, told, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    reader, writer = os.pipe()
    os.close(reader)  # as head does once it has its lines
    try:
        done = subprocess.run([sys.executable, tmp_path / "script.py", argument], text=True,
                              stdout=subprocess.PIPE if told else writer, stderr=subprocess.PIPE,
                              env={"PYTHONPATH": str(ROOT)})
    finally:
        os.close(writer)
    assert done.returncode == code and told in done.stderr and bool(done.stderr) == bool(told)
