"""
Kill train_vlm.py at random moments: no step is lost twice, and what is finished at last is, byte for
byte, what an undisturbed run makes.

    python extras/faults/kill.py --kills=1000

A tiny run is started, killed by SIGKILL at a random moment of its expected life, started again with
--resume=true and so on until it finishes; then the next run begins. It is the real train_vlm.main in
a process of its own, forked so that torch is imported once.

1,000 kills, 548 of them in training, 258 in saving, 159 at the start and 35 in pruning: 331 runs
finished, all like the undisturbed one. One checkpoint more than --keep stays where the last save was
complete and its pruning not.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass

from extras.bench.progress import Progress
from extras.faults.tiny import (SUCCESS, conclude, contents, flags, fork, leftovers, newest_step, prepare, shrink,
                                to_stay, train_vlm, wait)
from plumbing.files import checkpoints, find_damage
from plumbing.flags import Count, UserError, parse_command_line, run


@dataclass(frozen=True)
class Config:
    kills: Count = 1000  # runs are repeated until there were so many
    steps: Count = 24  # of a run
    save_every: Count = 2  # steps
    shards_dir: str = ""  # of the sample at 32 pixels; none: they are prepared first
    seed: int = 0  # of the kills' moments


def read_losses(folder):
    """[(step, loss), ...] as the log has them, without a line that a kill has torn."""
    path, losses = folder / "log.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if "loss" in entry:
            losses.append((entry["step"], entry["loss"]))
    return losses


def log_identity(folder):
    """Changes as soon as a started run has read its checkpoint and goes on with its log."""
    path = folder / "log.jsonl"
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None


def phase(folder, log_before):
    """What a run was about when it was killed, as far as its leftovers tell."""
    left = leftovers(folder)
    if log_identity(folder) == log_before:
        return "starting"
    if any(name.endswith(".partial") for name in left):
        return "saving"
    return "pruning" if left else "training"


def violations(folder, before, save_every):
    """What is wrong with a killed run, in words."""
    wrong = [f"{path.name}: {damage}" for path in checkpoints(folder) if (damage := find_damage(path))]
    try:
        now = newest_step(folder)
    except UserError as error:
        return [*wrong, str(error)]
    logged = [step for step, _ in read_losses(folder)]
    if now < before:
        wrong.append(f"went back from step {before} to {now}")
    if logged != list(range(1, len(logged) + 1)):
        wrong.append(f"log of steps {logged}")
    if not now <= len(logged) <= now + save_every:
        wrong.append(f"checkpoint of step {now}, while step {len(logged)} was done")
    return wrong


def main(config):
    shrink()
    draw, begin = random.Random(config.seed), time.perf_counter()
    phases, wrong, finished = Counter(), [], 0
    with tempfile.TemporaryDirectory() as folder:
        shards = config.shards_dir or prepare(Path(folder) / "shards")
        undisturbed, killed = Path(folder) / "undisturbed", Path(folder) / "killed"
        for _ in range(2):  # the first one is slower than all that follow
            shutil.rmtree(undisturbed, ignore_errors=True)
            started = time.perf_counter()
            settings = dict(max_steps=config.steps, save_every=config.save_every)
            if wait(fork(train_vlm.main, flags(shards, undisturbed, **settings))) != SUCCESS:
                raise UserError("the undisturbed run failed")
            seconds = time.perf_counter() - started
        right = contents(undisturbed, config.steps), read_losses(undisturbed)
        before, resumed, progress = 0, 0, Progress(config.kills, "kills", pause=5)
        while sum(phases.values()) < config.kills or killed.exists():
            log_before = log_identity(killed)
            child = fork(train_vlm.main, flags(shards, killed, **settings))
            if sum(phases.values()) < config.kills:
                time.sleep(draw.uniform(0, seconds))
                os.kill(child, signal.SIGKILL)  # without effect on one that has ended
            code = wait(child)
            if code == -signal.SIGKILL:
                phases[phase(killed, log_before)] += 1
                progress.row()
                wrong += violations(killed, before, config.save_every)
                resumed += (before := newest_step(killed)) > 0
                continue
            if code != SUCCESS:
                wrong.append(f"exit code {code}")
            if (contents(killed, config.steps), read_losses(killed)) != right:
                wrong.append("finished with OTHER bytes or losses")
            # One too many stays where the last save was complete, but its pruning was not
            more = len(checkpoints(killed)) - len(to_stay(killed, train_vlm.Config.keep))
            if leftovers(killed) or more not in (0, 1):
                wrong.append(f"left {leftovers(killed)}, {len(checkpoints(killed))} checkpoints")
            shutil.rmtree(killed)
            finished, before = finished + 1, 0
    print(f"{sum(phases.values())} kills within {seconds:.2f} s of a start, "
          + ", ".join(f"{count} while {name}" for name, count in phases.most_common())
          + f"; after {resumed} of them a checkpoint was there")
    print(f"{finished} runs of {config.steps} steps finished, each compared with the undisturbed one in "
          f"{len(right[0])} files and {len(right[1])} losses, in {time.perf_counter() - begin:.0f} s")
    conclude(wrong)


if __name__ == "__main__":
    run(main, parse_command_line(Config))
