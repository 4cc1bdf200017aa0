"""Files from outside run no code, and few scripts connect: the sources are searched. git may be missing."""

import ast
from pathlib import Path

import pytest
import torch

from plumbing.devices import describe_machine

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [path for pattern in ("*.py", "plumbing/*.py", "prepare/*.py", "tasks/*.py", "zoo/*.py", "extras/[!f]*/*.py")
           for path in sorted(ROOT.glob(pattern))]
RUNNING = {"eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "yaml.load", "marshal.load"}
NETWORK = {"requests", "urllib", "http", "httpx", "aiohttp", "ftplib", "smtplib", "huggingface_hub", "wandb"}
MAY_CONNECT = {"prepare/download.py": {"urllib", "http", "huggingface_hub"}, "plumbing/runs.py": {"wandb"}}


def dotted(node):
    """The name of what is called, as in torch.load."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join([*([node.id] if isinstance(node, ast.Name) else [""]), *names[::-1]])


def find_dangers(source):
    """What in a source may run code that a file brings: (line, what)."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        given = {word.arg: getattr(word.value, "value", "?") for word in node.keywords}
        if name in RUNNING:
            yield node.lineno, name
        if name == "torch.load" and given.get("weights_only") is not True:
            yield node.lineno, "torch.load without weights_only=True"
        if name in ("np.load", "numpy.load") and given.get("allow_pickle"):
            yield node.lineno, "np.load of pickles"
        if name == "Image.open" and "formats" not in given:  # some of Pillow's formats run programs
            yield node.lineno, "Image.open without formats"
        if given.get("shell"):
            yield node.lineno, "a shell"
        if name.endswith((".extractall", ".extract")):
            yield node.lineno, "an archive's own paths"


@pytest.mark.parametrize("source, danger", [
    ("eval(x)", "eval"), ("torch.load(x)", "torch.load without weights_only=True"),
    ("np.load(x, allow_pickle=True)", "np.load of pickles"),
    ("Image.open(x)", "Image.open without formats"), ("subprocess.run(x, shell=True)", "a shell"),
    ("archive.extractall(x)", "an archive's own paths")])
def test_a_danger_is_found(source, danger):
    assert list(find_dangers(source)) == [(1, danger)]


OWN = {"extras/look/leaks.py", "prepare/sample.py"}  # which open images that they have made themselves


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_runs_what_a_file_brings(path):
    found = [danger for danger in find_dangers(path.read_text(encoding="utf-8"))
             if not (path.relative_to(ROOT).as_posix() in OWN and danger[1] == "Image.open without formats")]
    assert found == []


def test_none_but_downloads_and_wandb_may_connect():
    connecting = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [
                node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in {name.partition(".")[0] for name in names} & NETWORK:
                connecting.setdefault(path.relative_to(ROOT).as_posix(), set()).add(name)
    assert connecting == MAY_CONNECT


def test_a_machine_without_git_is_described(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = describe_machine(torch.device("cpu"))
    assert facts["commit"] == "" and facts["torch"] == torch.__version__
