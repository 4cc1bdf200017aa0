"""extras/bench/gpu.sh from end to end on a CPU, and its list of what a GPU alone runs."""

import ast
import os
import re
import subprocess
import sys
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
