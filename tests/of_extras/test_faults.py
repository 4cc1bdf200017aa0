"""The campaigns of extras/faults in short, and the harm that they cannot do from outside."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import plumbing.files
from extras.faults import mutants
from plumbing.files import newest_checkpoint
from plumbing.flags import UserError
from run import save_checkpoint
from test_checkpoints import make_checkpoint, write_folder

ROOT = Path(__file__).resolve().parent.parent.parent
CAMPAIGNS = '''
import contextlib, io, json, sys
from extras.faults import calls, full_disk, fuzz_flags, kill, kill_cls, kill_outputs, lost_writes, ranks, tiny

shards, told = tiny.prepare(sys.argv[1]), {}
for module, settings in [(kill, dict(kills=25, steps=8)),
                         (full_disk, dict(sizes=5, parts="save,download")),
                         (lost_writes, dict(unfinished=False)),
                         (calls, dict(only="fsync,renameat,rename,unlinkat", errors="EIO", every=6,
                                      limits=4)),
                         (ranks, dict(ranks="2", places="backward,save", faults="kill",
                                      torchrun=False)),
                         (fuzz_flags, dict(cases=16, seed=1, patience=300)),
                         (kill_cls, dict(kills=4, sizes=2, regions=1)),
                         (kill_outputs, dict(parts="kill,full", kills=2, sizes=2))]:
    code, text = 0, io.StringIO()
    with contextlib.redirect_stdout(text):
        try:
            if module not in (fuzz_flags, kill_cls, kill_outputs):  # which make a place of their own
                settings["shards_dir"] = shards
            module.main(module.Config(**settings))
        except SystemExit as error:
            code = error.code
        except tiny.NotHere as error:
            code, text = "not here", io.StringIO(str(error))
        except tiny.UserError as error:
            code, text = 2, io.StringIO(str(error))
    told[module.__name__.split(".")[-1]] = code, text.getvalue()
print(json.dumps(told))
'''


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """{campaign: (its exit code, what it printed)}; in one process without threads, which it forks."""
    folder = tmp_path_factory.mktemp("faults") / "shards"
    done = subprocess.run([sys.executable, "-c", CAMPAIGNS, str(folder)], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("campaign, counted", [
    ("kill", "25 kills"), ("full_disk", "download: 12 refused, 3 had room"),
    ("lost_writes", "states that a crash may leave"), ("calls", "system calls in a save"),
    ("ranks", "3 groups"), ("fuzz_flags", "16 commands"), ("kill_cls", "4 killed"),
    ("kill_outputs", "full: 1 eval_vqa.py refused, then the same")])
def test_promises_hold(told, campaign, counted):
    code, text = told[campaign]
    if code == "not here":
        pytest.skip(text)
    assert code == 0 and "0 violations" in text, text
    if refusal := re.search("not tried: .*", text):  # where no disk may be mounted
        pytest.skip(refusal[0])
    assert counted in text, text


@pytest.mark.parametrize("what, file, changes, test", mutants.MUTANTS, ids=[mutant[0] for mutant in mutants.MUTANTS])
def test_a_planted_bug_still_fits_the_code(what, file, changes, test):
    """mutants.py takes half an hour; that its words are still in the code is known at once."""
    text = (ROOT / file).read_text()
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    compile(text, file, "exec")
    if "::" in test:
        name, function = test.split("::")
        assert f"def {function}" in (ROOT / "tests" / name).read_text()
    else:
        assert (ROOT / "extras/faults" / test.split()[0]).is_file()


def test_a_million_steps_are_more_than_ten(tmp_path):
    for step in (10, 1_000_000, 999_999):
        make_checkpoint(tmp_path, step)
    assert newest_checkpoint(tmp_path).name == "step_1000000"


def test_an_unreadable_checkpoint_is_passed_over(tmp_path, monkeypatch, capsys):
    older, newer = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    hash_file = plumbing.files.hash_file

    def bad_sector(path):
        if path.parent == newer:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return hash_file(path)

    monkeypatch.setattr(plumbing.files, "hash_file", bad_sector)
    assert newest_checkpoint(tmp_path) == older
    assert "vision.safetensors cannot be read: [Errno 5]" in capsys.readouterr().err


def test_what_a_disk_alters_while_it_is_saved_is_told_at_once(tmp_path, monkeypatch):
    seal, older = plumbing.files.seal, make_checkpoint(tmp_path, 1)

    def seal_on_a_bad_disk(partial, folder, **facts):
        seal(partial, folder, **facts)
        os.truncate(folder / "vision.safetensors", 100)

    monkeypatch.setattr(plumbing.files, "seal", seal_on_a_bad_disk)
    nothing = SimpleNamespace(named_parameters=list, state={})
    with pytest.raises(UserError, match="step_000002: not saved: vision.safetensors has 100 bytes"):
        save_checkpoint(tmp_path, 2, write_folder, nothing, nothing, {}, keep=1)
    assert newest_checkpoint(tmp_path) == older
