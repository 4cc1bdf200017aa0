"""What README.md and docs/ say can be run, and their links and names are there."""

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest

import prepare.classify
import prepare.questions
import train_vlm
from data import Record, write_plain
from plumbing.flags import parse_flags
from prepare.datasets import DATASETS
from prepare.leaks import FINGERPRINT
from prepare.shards import SplitWriter

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text()
         for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
SCRIPTS = [path.relative_to(ROOT).as_posix() for pattern in ("*.py", "prepare/*.py", "extras/*/*.py")
           for path in ROOT.glob(pattern)]


def commands():
    """(file that says so, command) of every command in README.md, docs/ and the scripts' docstrings."""
    texts = PAGES | {name: ast.get_docstring(ast.parse((ROOT / name).read_text())) or "" for name in SCRIPTS}
    found = []
    for name, text in texts.items():
        lines = re.findall(r"`((?:python|torchrun|streamlit|sbatch|pip) [^`\n]+)`", text)
        blocks = re.findall(r"^```\n(.*?)^```", re.sub(r"^```python\n.*?^```\n", "", text, flags=re.M | re.S),
                            re.M | re.S) if name in PAGES else [
            re.sub(r"(\S)  +.*", r"\1", line) for line in re.findall(r"^    \w.*", text, re.M)]
        for line in [*lines, *"\n".join(blocks).splitlines()]:
            for command in line.split("#")[0].split("&&"):
                if re.match(r" *(python3?|torchrun|streamlit|sbatch|pip) ", command):
                    found.append((name, " ".join(command.split())))
    return sorted(set(found))


def test_commands_are_found():
    """So that no other test passes because nothing was read."""
    counts = Counter(source for source, _ in commands())
    assert sum(counts[name] for name in PAGES) > 60 and counts["README.md"] > 15 and len(counts) > 25


@pytest.mark.parametrize("source, command", commands())
def test_a_command_is_one_that_its_script_takes(source, command, monkeypatch):
    """The script is there, its flags are, and their values are of their types."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("plumbing.flags.recorded_flags", lambda Config, known: {})  # of runs that are not here
    program, *words = shlex.split(command)
    if program == "torchrun":
        words = words[words.index("--") + 1:]
    if program in ("streamlit", "pip"):
        words = [word for word in words if word not in ("run", "install", "-q", "-r")]
    words = [word for word in words if word != "--"]
    if words[0] in ("-m", "-"):  # a module, such as venv or pytest
        assert words[1] in ("venv", "pytest") and all(any(ROOT.glob(word)) for word in words[2:] if "/" in word)
        return
    assert (ROOT / words[0]).is_file()
    if program in ("python", "python3", "torchrun", "streamlit"):
        script = importlib.import_module(words[0].removesuffix(".py").replace("/", "."))
        if words[0] in ("extras/look/scales.py", "prepare/sample.py"):  # which take files, too
            words = [word for word in words if word.startswith("--") or word == words[0]]
        if words[1:]:
            parse_flags(script.Config, words[1:])
    elif program == "sbatch":
        parse_flags(train_vlm.Config, words[1:])


def test_ci_runs_the_line_of_the_readme_and_the_tests_of_extras():
    line = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert line.endswith(" pytest tests") and f"\n{line}/*.py\n" in PAGES["README.md"]


def test_links_of_the_pages_lead_somewhere():
    links = 0
    for page, text in PAGES.items():
        for target, _, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(#([^)\s]+))?\)", text):
            path = (ROOT / page).parent / target if target else ROOT / page
            assert path.is_file(), (page, target)
            heads = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-")
                     for head in re.findall(r"^#+ (.*)", path.read_text() if anchor else "", re.M)]
            assert not anchor or anchor in heads, (page, anchor)
            links += 1
    assert links > 30


def test_mix_is_the_table_that_the_script_prints(tmp_path):
    """Published counts and sums; what is prepared depends on the machine."""
    done = subprocess.run([sys.executable, "extras/look/mix.py", f"--shards_dir={tmp_path}"], cwd=ROOT,
                          text=True, capture_output=True, check=True)
    lines = [line.split("|")[1:3] for line in done.stdout.splitlines()]
    page = PAGES["docs/data.md"].splitlines()
    begin = page.index(done.stdout.splitlines()[0])
    assert [line.split("|")[1:3] for line in page[begin:begin + len(lines)]] == lines and len(lines) > 20


def test_python_of_the_pages_names_what_there_is():
    """The blocks compile, and what they import is there."""
    blocks = re.findall(r"```python\n(.*?)```", "".join(PAGES.values()), re.S)
    imports = [line for block in blocks for line in block.splitlines() if re.match("(from|import) ", line)]
    for block in blocks:
        compile(block, "README.md and docs/", "exec")
    exec("\n".join(imports), {})
    assert len(blocks) == 10 and len(imports) == 20  # all of them were seen


def test_own_data_goes_in_by_the_blocks_of_docs(tmp_path, monkeypatch):
    section = PAGES["docs/data.md"].split("## Your own data")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.S)
    assert len(blocks) == 2 and max(block.count("\n") for block in blocks) <= 20
    monkeypatch.setattr(prepare.datasets, "DATASETS", DATASETS.copy())
    for block, module in zip(blocks, (prepare.questions, prepare.classify)):
        exec(block, vars(module).copy())
    scans, wrists = (prepare.datasets.DATASETS[name] for name in ("my_scans", "our_wrists"))
    for number in range(40):
        (tmp_path / f"{number}.png").write_bytes(b"image %d" % number)
    (tmp_path / "questions.json").write_text(json.dumps([
        {"split": "test", "id": number, "question": "is it broken?", "answer": "yes", "file": file}
        for number, file in ((7, "3.png"), (8, ""), (9, None), (10, "gone.png"), (11, "../3.png"))]))
    (tmp_path / "labels.csv").write_text("file,patient,label\n" + "".join(
        f"{n}.png,{n // 2},{'no_fracture' if n % 4 < 2 else 'fracture'}\n" for n in range(40)))
    (split, first), *others = scans.read(tmp_path)
    assert (split, first) == ("test", Record("7", "is it broken?", "yes", b"image 3", "3.png"))
    encoded = Future()
    encoded.set_result((b"jpeg", (224, 224), 0.0, bytes(FINGERPRINT.itemsize)))
    writer = SplitWriter(tmp_path / "test", scans, SimpleNamespace(
        vocab_size=9, write=lambda record: write_plain(record, lambda text: [3])), lambda content: encoded, 4)
    for _, record in (("test", first), *others):
        writer.add(record)
    writer.write_next()  # a question whose row names no image, or none that is there, is not asked without one
    assert (writer.samples, writer.skipped) == (1, {"image missing": 4})
    found = list(wrists.read(tmp_path))
    assert {record.image for _, record in found} == {b"image %d" % n for n in range(40)}
    assert Counter(split for split, _ in found) == {"train": 28, "validation": 4, "test": 8}
    assert len({split for split, _ in found[:2]}) == 1 and {r.labels[0] for _, r in found} == set(wrists.classes)
