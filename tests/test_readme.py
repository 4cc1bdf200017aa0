"""What README.md says can be run, and the core imports no more than it promises."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = [name for name in ("model.py", "lora.py", "data.py", "train_vlm.py", "train_cls.py", "eval_vqa.py")
        if (ROOT / name).is_file()]
PACKAGES = {"torch", "safetensors", "sentencepiece", "numpy", "PIL", "tqdm", "sklearn"}
OPTIONAL = {"wandb"}  # train_vlm.py's, with --wandb=true
SCRIPTS = [*CORE, *(path.relative_to(ROOT).as_posix() for folder in ("prepare", "extras")
                    for path in (ROOT / folder).glob("*.py"))]


def commands():
    """(file that says so, script, flag) of every flag in README.md and in the scripts' docstrings."""
    texts = {"README.md": (ROOT / "README.md").read_text()}
    texts |= {name: ast.get_docstring(ast.parse((ROOT / name).read_text())) or "" for name in SCRIPTS}
    found = [(name, script, flag) for name, text in texts.items()
             for script, flags in re.findall(r"python (\S+\.py)((?: --\S+)*)", text)
             for flag in flags.split() or [""]]
    assert len(found) > 20
    return sorted(set(found))


@pytest.mark.parametrize("source, script, flag", commands())
def test_command_names_a_script_and_flags_that_it_has(source, script, flag):
    text = (ROOT / script).read_text()
    if flag:
        fields = re.findall(r"^    (\w+): .* = .*  # ", text.split("class Config:")[1].split("\n\n")[0], re.M)
        assert flag.removeprefix("--").split("=")[0] in fields


def test_ci_runs_the_line_of_the_readme():
    line = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert "pytest" in line and f"\n{line}\n" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", CORE)
def test_core_imports_its_packages_alone(name):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    allowed = PACKAGES | OPTIONAL | {"model", "lora", "data"} | set(sys.stdlib_module_names)
    assert imported <= allowed and len(imported) > 3
