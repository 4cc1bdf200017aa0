"""
What the campaigns of this folder share: the real training loop at a size of milliseconds a step, in
forked children, so that torch is imported once for thousands of runs.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # noqa: F401, else each child imports it, with its first optimizer

from extras.scripts import load_script
from model import CONFIGS, LlamaConfig, ViTConfig
from plumbing.files import best_checkpoint, checkpoints, find_damage, hash_file, newest_checkpoint, read_manifest
from plumbing.flags import UserError
from plumbing.runs import open_run
from plumbing.sources import settle
from run import load_optimizer, make_optimizer, save_checkpoint
from weights import save_vlm

ROOT = Path(__file__).resolve().parent.parent.parent
SUCCESS, USER_ERROR, OS_ERROR, UNEXPECTED = 0, 2, 3, 4  # how a child ends


train_vlm = load_script("train_vlm.py")  # children that are forked have it imported already


class NotHere(UserError):
    """What a campaign needs, such as strace or the right to mount a disk, is not on this machine."""


def shrink():
    """Make --model=sample tiny, and torch single-threaded: threads would not survive a fork."""
    torch.set_num_threads(1)
    CONFIGS["sample"] = (ViTConfig(image_size=32, width=64, depth=1),
                         LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                     num_attention_heads=2, num_key_value_heads=2))


def prepare(folder, limit=64):
    """Shards of the sample's first questions, at 32 pixels, by the real command."""
    subprocess.run([sys.executable, "prepare/all.py", "--only=sample", f"--limit={limit}", "--image_size=32",
                    f"--shards_dir={folder}"], cwd=ROOT, check=True, capture_output=True)
    return folder


def flags(shards, run, **changes):
    """Every part trains in its own way, with dropout, so that each kind of state has to be restored."""
    return settle(train_vlm.Config(**{**dict(
        shards_dir=str(shards), run=str(run), data="sample", model="sample", language="lora",
        lora_dropout=0.3, batch_size=4, max_steps=12, max_length=256, micro_batch_tokens=512,
        held_out=4, questions_per_image=0, learning_rate=1e-3, save_every=2, keep=2, log_every=1,
        workers=1, evaluate_every=6, resume=True, device="cpu", dtype="float32"), **changes}))


def fork(function, *arguments):
    """The process id of a child that calls a function, silently; its exit code tells how that went."""
    child = os.fork()
    if child:
        return child
    code = UNEXPECTED
    try:
        loud = os.dup(2)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        function(*arguments)
        code = SUCCESS
    except UserError:
        code = USER_ERROR
    except OSError:
        code = OS_ERROR
    except BaseException:
        os.write(loud, traceback.format_exc().encode())
    finally:
        os._exit(code)


def start(function, out, errors):
    """
    The process id of a child that calls a function as a script would, loudly: the files `out` and `errors`,
    which may be one, get its stdout and stderr; its exit code is a script's.
    """
    child = os.fork()
    if child:
        return child
    code = 0
    try:
        for stream, path in ((1, out), (2, errors)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), stream)
        sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))  # not what replaced them
        function()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child):
    """The exit code of a child; minus the signal's number if that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def leftovers(run):
    """Names in a run's folder that a killed run has to sweep away when it goes on."""
    return sorted(path.name for path in [*run.glob(".step_*.partial"), *run.glob("removed_*")])


def to_stay(run, keep):
    """The checkpoints that stay in a run's folder: the newest ones, and the best."""
    return {*checkpoints(run)[:keep], best_checkpoint(run)} - {None}


def newest_step(run):
    """The newest step that loads; 0 without checkpoints. Raises UserError where none is whole."""
    with contextlib.redirect_stderr(io.StringIO()):
        return int(newest_checkpoint(run).name[5:]) if checkpoints(run) else 0


def contents(run, step):
    """{file: its size and hash} of a checkpoint, as its manifest, which was verified, has them."""
    return read_manifest(run / f"step_{step:06d}")["files"]


def open_saver(config, checkpoint):
    """The model and the optimizer of a checkpoint, ready to be saved again, on one thread."""
    model = train_vlm.load_parts(config, None, {"resize": "squash"}, checkpoint, torch.device("cpu"), torch.float32)
    train_vlm.make_trainable(model, config, checkpoint)
    optimizer = make_optimizer(train_vlm.trained_parameters(model, config), config.weight_decay, config.beta2)
    load_optimizer(optimizer, model, checkpoint)
    return model, optimizer


def hashes(folder):
    """{name: SHA-256} of all files below a folder, which may be absent."""
    return {path.relative_to(folder).as_posix(): hash_file(path)
            for path in sorted(folder.rglob("*")) if path.is_file()}


def bits_of(path, draw, regions):
    """A bit of each of so many regions of a file, or of each byte of a smaller one."""
    size = path.stat().st_size
    edges = np.linspace(0, size, min(regions, size) + 1).astype(int)
    return [8 * draw.randrange(begin, end) + draw.randrange(8) for begin, end in zip(edges, edges[1:])]


def try_parts(ways, config, Trial):
    """
    A whole campaign of --parts: print what came of each, and end with exit code 1 if something is wrong.

    ways: {part: function of config and the Trial, which is made of a folder; it yields what came of a harm,
    in words, and a list of what is wrong}. Each runs in a process of its own, so that it may mount what it
    alone sees.
    """
    names, violations = config.parts.split(","), []
    if not set(names) <= ways.keys():
        raise UserError(f"--parts={config.parts}: of {', '.join(ways)}")
    shrink()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        trial = Trial(folder)
        for name in names:
            report, begin = folder / f"{name}.json", time.perf_counter()
            child = os.fork()
            if not child:
                try:
                    report.write_text(json.dumps(try_part(ways[name](config, trial))))
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(0)
            wait(child)
            counts, wrong = (json.loads(report.read_text()) if report.exists() else
                             ({}, [f"{name}: ended by an error"]))
            violations += wrong
            print(f"{name}: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
                  + f"; {time.perf_counter() - begin:.0f} s", flush=True)
    conclude(violations)


def conclude(violations):
    """The end of a campaign: print what is wrong, and end with exit code 1 if something is."""
    print(f"{len(violations)} violations" + "".join(f"\n  {line}" for line in violations[:20]))
    if violations:
        sys.exit(1)


def try_part(harms):
    """[{what came of a harm: how often}, list of what is wrong] of one part."""
    counts, wrong = Counter(), []
    try:
        for outcome, faults in harms:
            counts[outcome] += 1
            wrong += faults
    except NotHere as error:
        return [{f"not tried: {error}": 1}, []]
    return [counts, wrong]


# ----------------------------------------------------------------------------- one save

BEFORE, AFTER = 4, 6  # steps of the checkpoints: 2 and 4 are there, 6 is saved, 2 is removed


class OneSave:
    """
    A run of a few steps, and what it takes to try its next save again and again: copies of its folder,
    the trained model and its optimizer, and what each checkpoint has to hold.
    """

    def __init__(self, shards, folder):
        folder = Path(folder)
        self.config = flags(shards, folder / "run", max_steps=BEFORE)
        if wait(fork(train_vlm.main, self.config)) != SUCCESS:
            raise UserError("the undisturbed run failed")
        self.original, self.copies, self.copied = folder / "run", folder, 0
        with contextlib.redirect_stdout(io.StringIO()):
            self.model, self.optimizer = open_saver(self.config, self.original / f"step_{BEFORE:06d}")
        sealed = read_manifest(self.original / f"step_{BEFORE:06d}")
        self.record = {name: sealed[name] for name in
                       sealed.keys() - {"checksum", "files", "name", "step", "held_out_loss"}}
        undisturbed = self.copy()
        self.save(undisturbed, AFTER)
        self.right = {step: contents(undisturbed, step) for step in (BEFORE, AFTER)}

    def copy(self, below=None):
        """A new copy of the run, in which nothing of step AFTER is."""
        self.copied += 1
        return Path(shutil.copytree(self.original, (below or self.copies) / f"copy_{self.copied}"))

    def copy_with_leftovers(self):
        """A copy with all that a resumed run sweeps: checkpoints unfinished, half removed, damaged."""
        run = self.copy()
        for name in (f".step_{AFTER:06d}.partial", "removed_step_000001", f"step_{AFTER:06d}"):
            shutil.copytree(run / f"step_{BEFORE:06d}", run / name)
            os.truncate(run / name / "optimizer.safetensors", 1000)
        return run

    def sweep(self, run):
        """What a resumed run does before it loads anything. Returns the step that it goes on from."""
        with contextlib.redirect_stderr(io.StringIO()):
            return int(open_run(run, self.config, train_vlm.FREE_ON_RESUME).name[5:])

    def save(self, run, step):
        save_checkpoint(run, step, lambda partial: save_vlm(self.model, partial), self.model, self.optimizer,
                        self.record, self.config.keep)

    def violations(self, run, code):
        """
        What is wrong, in words, after a save of step AFTER that ended with this exit code. Raises
        UserError when nothing loads.
        """
        now = newest_step(run)
        wrong = [f"{path.name}: {damage}" for path in checkpoints(run) if (damage := find_damage(path))]
        if now not in self.right or contents(run, now) != self.right[now]:
            wrong.append(f"step {now} is loaded, with other bytes than it should have")
        if code not in (SUCCESS, USER_ERROR, OS_ERROR, -signal.SIGKILL):
            wrong.append(f"exit code {code}")
        if code == SUCCESS and now != AFTER:
            wrong.append(f"success, but step {now} is the newest that loads")
        return wrong

    def violations_of_a_sweep(self, run, code):
        """
        The same after a sweep. If reading failed, it may have set aside what cannot be read just then; a
        kill moves nothing but what is damaged.
        """
        now = newest_step(run)
        if now != BEFORE and (code == -signal.SIGKILL or now != BEFORE - 2):
            return [f"step {now} is loaded"]
        return [] if code in (SUCCESS, USER_ERROR, OS_ERROR, -signal.SIGKILL) else [f"exit code {code}"]

    def violations_of_the_next(self, run):
        """What is wrong, in words, when the run goes on: it sweeps, then saves its next checkpoint."""
        step = self.sweep(run) + 2
        if leftovers(run):
            return [f"{leftovers(run)} stay"]
        self.save(run, step)
        if newest_step(run) != step or leftovers(run) or {*checkpoints(run)} != to_stay(run, self.config.keep):
            return [f"the next save leaves {sorted(path.name for path in run.iterdir())}"]
        return []
