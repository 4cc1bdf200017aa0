"""extras/bench/gpu.sh from end to end on a CPU, and its list of what a GPU alone runs."""

import ast
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from test_house import SOURCES

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = (ROOT / "extras/bench/gpu.sh").read_text()
PARTS = re.findall(r'^    "(\w+)\|(\d+)\|', SCRIPT, re.M)
FEW = ["openmedq", "classifying"]  # what is cut and broken, and mended


def run_script(folder, *flags):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # this python3
                   "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "extras/bench/gpu.sh", f"--out={folder}/out", f"--scratch={folder}/scratch",
                           "--device=cpu", "--tiny", "--seconds=3000", *flags], cwd=ROOT, text=True,
                          capture_output=True, env=environment)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    return folder, run_script(folder)


def results_of(folder):
    """{part: its .md, and when it was written}."""
    return {path.stem.partition("_")[2]: (path, path.stat().st_mtime_ns) for path in folder.glob("out/*_*.md")}


def test_all_parts_run_and_stand_in_the_table(rehearsed):
    folder, done = rehearsed
    table = (folder / "out/table.md").read_text()
    assert done.returncode == 0, done.stderr + table
    assert re.findall(r"^## \d+\. (\w+)$", table, re.M) == [name for name, _ in PARTS]
    assert "not begun" not in table and "**" not in table and "FAILED" not in table
    assert "| LLaMA + ViT, bfloat16: all gradients |" in table and "| Qwen3-VL: greedy answers, tokens that " in table
    assert table.count("| all questions share an image |") == 5 and table.count("| transformers + PEFT |") == 3
    assert "computed 54.4 GB, measured on a GPU alone" in table and "ours / peer" in table
    assert sum(int(seconds) for _, seconds in PARTS) <= 480 and {*FEW} < results_of(folder).keys()


def test_what_is_there_stays_and_what_breaks_leaves_the_others(rehearsed):
    folder, _ = rehearsed
    before = results_of(folder)
    assert run_script(folder).returncode == 0 and results_of(folder) == before
    for name in FEW:
        before.pop(name)[0].unlink()
    labelled = folder / "scratch/shards_tiny/labelled"
    (labelled / "train/manifest.json").rename(labelled / "kept")
    cut = run_script(folder, "--seconds=6")
    table = (folder / "out/table.md").read_text()
    assert cut.returncode == 1 and "## 3. openmedq\n\n**cut after " in table and table.count("not begun") == 1
    broken = run_script(folder)
    table = (folder / "out/table.md").read_text()
    assert broken.returncode == 1 and "## 11. classifying\n\n**failed, exit code 2**" in table
    assert "labelled/train/manifest.json: missing or damaged" in table and "not begun" not in table
    (labelled / "kept").rename(labelled / "train/manifest.json")
    assert run_script(folder).returncode == 0
    after = results_of(folder)
    assert {name: after[name] for name in before} == before and len(after) == len(PARTS)


# ----------------------------------------------------------------------------- its parts, pretended

FAKE = """#!/bin/sh
case "$*" in
    *find_spec*) echo false ;;
    *made_up*) exit $MADE ;;
    *gpu_checks*) echo a row; exec sleep $SLEEP ;;
    *answering*) exit 1 ;;
    *training*) for flag; do case $flag in --out=*.md) f=${flag#--out=}; echo {} > "${f%.md}.json" ;; esac; done ;;
esac
"""


@pytest.fixture
def pretend(tmp_path):
    """The script in a folder of its own, as a function that starts it; a Python there that does nothing."""
    for name, text in (("bin/python3", FAKE), ("extras/bench/gpu.sh", SCRIPT)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "bin/python3").chmod(0o755)

    def start(*flags, sleep=0, made=0):
        environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLEEP": str(sleep),
                       "MADE": str(made)}
        return subprocess.Popen(["bash", tmp_path / "extras/bench/gpu.sh", f"--scratch={tmp_path}/scratch", *flags],
                                cwd=tmp_path, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                                env=environment)

    return start


def begun(process):
    """[(part, its most seconds)] in their order, and the exit code."""
    words = process.communicate()[1]
    return [(name, int(most)) for name, most in re.findall(r"^\d+\. (\w+), at most (\d+) s$", words, re.M)], \
        process.returncode


def test_a_rehearsal_keeps_nothing_from_being_measured(pretend, tmp_path):
    assert len(begun(pretend("--device=cpu", "--tiny"))[0]) == len(PARTS)
    assert len(begun(pretend())[0]) == len(PARTS)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"gpu", "gpu_tiny"}
    assert len([*tmp_path.glob("out/gpu/*.json")]) == 5  # of each step that was trained


def test_time_that_is_left_goes_to_what_needs_it_and_what_failed_comes_last(pretend, tmp_path):
    given, code = begun(pretend(made=1))  # no dataset: the others run all the same
    most = {name: int(seconds) for name, seconds in PARTS}
    assert [name for name, _ in given] == list(most) and code == 1
    assert all(most[name] <= seconds <= 2 * most[name] for name, seconds in given)
    assert given[-1] == ("classifying", 2 * most["classifying"])
    [gone] = tmp_path.glob("out/gpu/*_limits.md")
    gone.unlink()
    assert begun(pretend())[0] == [("limits", 2 * most["limits"]), ("answers", 2 * most["answers"])]
    gone.unlink()
    assert [name for name, _ in begun(pretend(f"--seconds={most['answers'] - 1}"))[0]] == ["limits"]
    assert "**failed, exit code 1**" in (tmp_path / "out/gpu/table.md").read_text()


def test_a_signal_leaves_the_table(pretend, tmp_path):
    process, partial = pretend(sleep=60), tmp_path / "out/gpu/1_checks.partial"
    while not (partial.is_file() and partial.read_text()):
        time.sleep(0.05)
    begin = time.monotonic()
    process.terminate()
    assert process.wait() == 143 and time.monotonic() - begin < 10
    table = (tmp_path / "out/gpu/table.md").read_text()
    assert "## 1. checks\n\n**ended from outside**\na row\n" in table and table.count("not begun") == len(PARTS) - 1
    process.communicate()  # which ends where nobody holds its pipe any more: the part is gone, too


@pytest.mark.parametrize("flag", ["--device=tpu", "--tiny=no", "--seconds=ten", "--seconds=", "--out=", "more"])
def test_a_wrong_flag_gets_a_line(flag, tmp_path):
    done = subprocess.run(["bash", ROOT / "extras/bench/gpu.sh", flag], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 2 and done.stderr.startswith(f"{flag}: ") and done.stderr.count("\n") == 1


# ----------------------------------------------------------------------------- the list

WORDS = {"HAS_TRITON", "BlockMask", "pin_memory", "is_cuda", "compile_blocks", "compiled_flex_attention",
         "compiled_create_block_mask", "fused", "cuda"}


def functions_of_a_gpu(source):
    """Names of functions that ask for a GPU, or do what a GPU alone does; "top" for what stands in none."""
    found = set()

    def visit(node, name):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.Import, ast.ImportFrom)):
                continue
            inner = name
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                inner = f"{name}.{child.name}" if name else child.name
            words = [getattr(child, field, None) for field in ("id", "attr", "arg")]
            if isinstance(child, ast.Compare):  # with the name of a kind of device
                words += ["cuda" for part in ast.walk(child) if isinstance(part, ast.Constant)
                          and part.value in ("cpu", "cuda")]
            if WORDS & {*words}:
                found.add(name or "top")
            visit(child, inner)

    visit(ast.parse(source), "")
    return found


def test_what_a_gpu_alone_runs_is_found():
    source = ("import torch.cuda\ndef f(x):\n    if x.device.type != 'cpu':\n        pass\nclass A:\n    def g(self):\n"
              "        torch.cuda.sync()\ndef h(cuda_like, text='cuda'):\n    return [text]\nx = HAS_TRITON\n")
    assert functions_of_a_gpu(source) == {"f", "A.g", "top"}


def test_the_list_is_whole_and_names_tests_that_are_there():
    listed = dict(re.findall(r"^#   (\w[\w/.]+\.py:[\w.]+) +(.*)$", SCRIPT, re.M))
    found = {f"{name}:{function}" for name, text in SOURCES.items() if not name.startswith("extras/")
             for function in functions_of_a_gpu(text)}
    assert listed.keys() == found
    for name, words in listed.items():
        tests = re.findall(r"(test_\w+\.py)::(\w+)", words)
        assert tests or words.startswith("nothing: "), name
        for file, test in tests:
            assert f"def {test}(" in (ROOT / "tests" / file).read_text(), (name, test)
