"""How the house is built: which file imports which, and how long files, functions and lines are."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train_vlm", "train_cls", "eval_vqa", "train_grpo")
FLOORS = (  # from the ground up: files and folders, which import from lower floors alone
    ("plumbing",), ("formats",), ("tasks",), ("lora", "data", "quantize"), ("model",), ("zoo",),
    ("generate", "weights"), ("run", "grpo", "asking"), (*SCRIPTS, "prepare"), ("extras",))
ROOMS = ("plumbing", "formats", "tasks", "zoo", "prepare")  # folders whose files may import one another
EXTRAS = ("bench", "faults", "look", "share")  # folders, of which each may do so, and import SHARED
PROGRESS = "extras.bench.progress"
SHARED = (PROGRESS, "extras.scripts")
FLOOR_OF = {name: number for number, floor in enumerate(FLOORS) for name in floor}

CORE = ("model.py", "lora.py", "data.py", *(f"{name}.py" for name in SCRIPTS[:3]))
NINE = (*CORE, "generate.py", "weights.py", "run.py")
PACKAGES = {"torch", "safetensors", "sentencepiece", "numpy", "PIL", "tqdm", "sklearn"}
OPTIONAL = {"wandb"}  # train_vlm.py's, with --wandb=true

NOT_OURS = {"raw", "shards", "weights", "out", "wandb"}  # what commands write, and what they log
NAMES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
FILES = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES
         if name.split("/")[0] not in NOT_OURS and "/." not in f"/{name}"}
SOURCES = {name: text for name, text in FILES.items() if not name.startswith("tests/")}


def module_of(name):
    """extras.look.mix for extras/look/mix.py; plumbing for plumbing/__init__.py."""
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_of(name) for name in SOURCES}


def imports(source):
    """(line, module) of every import, those within functions, too; `from a import b` is a.b where that is a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            inner = [f"{module}.{alias.name}" for alias in node.names]
            yield from dict.fromkeys((node.lineno, name if name in MODULES else module) for name in inner)


def may_import(module, other):
    """Whether a module of ours may import another, which may be of the outside."""
    room, above = module.partition(".")[0], other.partition(".")[0]
    if above not in FLOOR_OF:
        return not other.startswith(".") and above != "tests"
    if room == above == "extras":
        return module.split(".")[1:2] == other.split(".")[1:2] or other in SHARED
    if room == above:
        return room in ROOMS
    return FLOOR_OF[above] < FLOOR_OF[room] and above not in SCRIPTS


@pytest.mark.parametrize("module, other, allowed", [
    ("plumbing.files", "plumbing.flags", True), ("prepare.all", "prepare.shards", True), ("data", "numpy", True),
    ("tasks.vqa", "plumbing.flags", True), ("plumbing.files", "tasks.vqa", False), ("tasks.vqa", "model", False),
    ("model", "lora", True), ("lora", "model", False), ("data", "weights", False), ("weights", "zoo.clip", True),
    ("zoo.clip", "weights", False),
    ("run", "generate", True), ("train_vlm", "run", True), ("run", "train_vlm", False), ("generate", "weights", False),
    ("train_cls", "train_vlm", False), ("train_cls", "prepare.all", False), ("prepare.all", "train_cls", False),
    ("extras.look.mix", "prepare.datasets", True), ("extras.look.mix", "train_vlm", False),
    ("extras.look.plot", "extras.look.mix", True), ("extras.look.plot", "extras.share.export", False),
    ("extras.faults.kill", PROGRESS, True), ("extras.faults.kill", "extras.bench.plan", False),
    ("data", ".files", False), ("data", "tests.test_x", False)])
def test_the_floors_are_in_this_order(module, other, allowed):
    assert may_import(module, other) == allowed


def test_imports_are_found_wherever_they_stand():
    source = "import os, data\nfrom plumbing import flags\ndef f():\n    from plumbing.files import x\nfrom . import y"
    assert sorted(imports(source)) == [
        (1, "data"), (1, "os"), (2, "plumbing.flags"), (4, "plumbing.files"), (5, ".")]


def test_every_file_is_in_a_room():
    assert {"plumbing/flags.py", "tasks/stats.py", "prepare/all.py", "extras/faults/kill.py", *CORE} <= FILES.keys()
    strangers = [name for name in SOURCES if name.split("/")[0].removesuffix(".py") not in FLOOR_OF
                 or name.startswith("extras/") and name != "extras/scripts.py" and (
                     name.count("/") != 2 or name.split("/")[1] not in EXTRAS)
                 or not name.startswith("extras/") and name.count("/") > 1]
    assert strangers == []


@pytest.mark.parametrize("name", SOURCES)
def test_imports_lead_down(name):
    against = [f"line {line}: {other}" for line, other in imports(SOURCES[name])
               if not may_import(module_of(name), other)]
    assert against == []


@pytest.mark.parametrize("name", CORE)
def test_core_imports_the_cards_packages_alone(name):
    imported = {other.partition(".")[0] for _, other in imports(SOURCES[name])}
    others = imported - PACKAGES - FLOOR_OF.keys() - set(sys.stdlib_module_names)
    assert others <= (OPTIONAL if name == "train_vlm.py" else set()) and len(imported) > 1


def lines_of(names):
    return sum(SOURCES[name].count("\n") for name in names)


def test_the_core_is_read_in_an_evening():
    assert lines_of(CORE) <= 2000
    assert set(NINE) <= SOURCES.keys() and lines_of(NINE) <= 2800
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("\n") <= 250


def long_functions(source, most):
    """(name, lines) of each function that is longer, from its `def` to its end, those in classes and functions, too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno >= most:
            yield node.name, node.end_lineno - node.lineno + 1


def test_a_function_fits_on_a_screen():
    assert list(long_functions("class A:\n    def f():\n        a\n        b\n        c", 3)) == [("f", 4)]
    assert [(name, *long) for name, source in SOURCES.items() for long in long_functions(source, 60)] == []


def test_lines_fit_on_a_screen():
    assert [(name, number) for name, text in FILES.items()
            for number, line in enumerate(text.splitlines(), 1) if len(line) > 120] == []
