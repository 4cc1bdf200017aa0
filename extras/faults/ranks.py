"""
Do harm to one process of a group that trains together: the others end with it, soon, and the same
command goes on to the very bytes that an undisturbed group makes.

    python extras/faults/ranks.py --ranks=2,3

    kill    SIGKILL                      raise   a RuntimeError, which nobody expects
    stop    SIGSTOP, which hangs it      exit    os._exit(1)
    slow    it sleeps for 2 s, which has to change nothing

Each fault strikes rank 0, then rank 1, in a forward pass, a backward pass, between two gradients'
all-reduce, in the evaluation of the held-out samples, in a save (rank 0 alone saves) and while a
checkpoint is loaded. A group is torchrun's elastic agent with the real train_vlm.main in processes
forked from this one, so that torch is imported once; a few are started by torchrun itself.

115 groups of two and three processes, four at a time, with --rank_timeout=10: after a kill, an exception
or an exit the last process was gone in 2.2 s, after SIGSTOP in 41.4 s, of which torchrun's agent waits
30. With torchrun itself, whose processes take seconds to end on a busy machine, it was 9.8 and 48.4 s.
None outlived its group, no checkpoint was damaged, and all finished with an undisturbed group's bytes.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import ctypes
import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import run as run_file
from data import Mixture
from extras.faults.tiny import (ROOT, SUCCESS, USER_ERROR, conclude, contents, flags, fork, leftovers, newest_step,
                                prepare, shrink, train_vlm)
from model import VLM
from extras.bench.progress import Progress
from plumbing.files import checkpoints, find_damage
from plumbing.flags import Count, UserError, parse_command_line, run
from prepare.all import print_table

# What is struck: a function of a class or module, after so many of its calls in step STRUCK.
PLACES = {"forward": (VLM, "loss", 0), "backward": (torch.Tensor, "backward", 0),
          "all_reduce": (dist, "all_reduce", 0), "held_out": (Mixture, "held_out_steps", 0),
          "save": (run_file, "save_file", 0), "load": (train_vlm, "load_vlm", 0)}
FAULTS = {"kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
          "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
          "slow": lambda: time.sleep(2), "raise": lambda: fail(), "exit": lambda: os._exit(1)}
BEFORE, STRUCK, END = 2, 4, 6  # steps: with a checkpoint from the start, struck, and the last one
GRACE = 30  # seconds from torchrun's SIGTERM to its SIGKILL
SPARE = 15  # seconds more, for processes to end on a busy machine, with all that they have imported
PR_SET_CHILD_SUBREAPER = 36  # of prctl: orphans become this process's children


@dataclass(frozen=True)
class Config:
    ranks: str = "2,3"  # processes of a group
    places: str = ",".join(PLACES)  # where it is struck
    faults: str = ",".join(FAULTS)  # what strikes it
    rank_timeout: Count = 10  # seconds that a process waits for the others
    torchrun: bool = True  # also each fault once under torchrun itself, in the first of the places
    jobs: Count = 4  # groups at a time; they wait most of the time
    shards_dir: str = ""  # of the sample at 32 pixels; none: they are prepared first


# ----------------------------------------------------------------------------- one process

def fail():
    raise RuntimeError("planted")


def arm(place, fault, witness):
    """Make this process meet a fault in a place, once: the file `witness` then has the time of it."""
    owner, name, earlier = PLACES[place]
    function, train_step, step, calls = getattr(owner, name), train_vlm.train_step, 0, 0

    def note_step(model, optimizer, batches, *rest):
        nonlocal step
        step = batches.number + 1
        return train_step(model, optimizer, batches, *rest)

    def strike(*arguments, **settings):
        nonlocal calls
        calls += step == STRUCK or place == "load"
        if calls == earlier + 1 and not witness.exists():
            witness.write_text(str(time.monotonic()))  # the same clock in all processes
            FAULTS[fault]()
        return function(*arguments, **settings)

    train_vlm.train_step = note_step
    setattr(owner, name, strike)


def member(config):
    """train_vlm.main in a process of a group; FAULT says which process is to be struck, and how."""
    shrink()
    rank, place, fault, witness = os.environ["FAULT"].split(maxsplit=3)
    if os.environ["RANK"] == rank:
        arm(place, fault, Path(witness))
    train_vlm.main(config)


# ----------------------------------------------------------------------------- one group

def launch(ranks, config):
    """A group of forked processes below torchrun's agent. Raises UserError when one of them fails."""
    logs = DefaultLogsSpecs(f"{config.run}.logs")
    settings = LaunchConfig(1, 1, ranks, max_restarts=0, start_method="fork", logs_specs=logs,
                            rdzv_backend="c10d", rdzv_endpoint="localhost:0")
    try:
        elastic_launch(settings, member)(config)
    except ChildFailedError as error:
        raise UserError(str(error)) from None


def launch_torchrun(ranks, config):
    """The same by the command that people type, each process a program of its own."""
    words = [f"--{item.name}={getattr(config, item.name)}" for item in fields(config)
             if getattr(config, item.name) != item.default]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}",
                           "--standalone", f"--log-dir={config.run}.logs", "--", __file__, *words],
                          cwd=ROOT)
    if done.returncode:
        raise UserError(f"torchrun ended with code {done.returncode}")


def adopt():
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def children():
    """Process ids of what is left below this process."""
    return [int(number) for number in
            Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def train(start, ranks, config, fault):
    """
    (exit code of a group or None, when the last of its processes was gone, how many outlived it).
    `fault` is that of FAULT. This process adopts orphans, so that all are found among its children.
    """
    os.environ["FAULT"] = fault
    group, code, orphans = fork(start, ranks, config), None, 0
    limit = time.monotonic() + 2 * (config.rank_timeout + GRACE + SPARE)
    while children() and time.monotonic() < limit:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == group:
            code, orphans = os.waitstatus_to_exitcode(status), len(children())
        time.sleep(0.02)
    gone = time.monotonic()
    while left := children():  # of those that are killed, the children come here next
        os.kill(left[0], signal.SIGKILL)
        os.waitpid(left[0], 0)
    return code, gone, orphans


def try_case(start, begun, right, config, ranks, place, rank, fault):
    """(seconds from the fault until all processes were gone, what is wrong) of one group."""
    name = f"{start.__name__} {ranks} {place} {rank} {fault}"
    folder = begun.parent / name.replace(" ", "_")
    witness = folder.with_suffix(".struck")
    shutil.copytree(begun, folder)
    config = replace(config, run=str(folder))
    struck = f"{rank} {place} {fault} {witness}"
    code, gone, orphans = train(start, ranks, config, struck)
    if not witness.exists():
        return None, [f"{name}: was never struck"]
    seconds = gone - float(witness.read_text())
    wrong = [f"{path.name}: {damage}" for path in checkpoints(folder) if (damage := find_damage(path))]
    if (code, newest_step(folder)) != ((SUCCESS, END) if fault == "slow" else (USER_ERROR, BEFORE)):
        wrong.append(f"ended with code {code}, step {newest_step(folder)} loads")
    if orphans:
        wrong.append(f"{orphans} processes outlived their group")
    if seconds > config.rank_timeout + GRACE + SPARE:
        wrong.append(f"took {seconds:.0f} s to end")
    if fault != "slow" and train(start, ranks, config, struck)[0] != SUCCESS:  # it strikes only once
        wrong.append("the same command did not go on")
    if newest_step(folder) != END or contents(folder, END) != right or leftovers(folder):
        wrong.append("OTHER BYTES than those of an undisturbed group, or leftovers")
    shutil.rmtree(folder)
    return seconds, [f"{name}: {line}" for line in wrong]


# ----------------------------------------------------------------------------- all of them

def begin(ranks, config):
    """What an undisturbed group has in its last checkpoint; its run is cut back to step BEFORE."""
    if train(launch, ranks, config, "-1 none none none")[0] != SUCCESS:
        raise UserError(f"the undisturbed group of {ranks} failed")
    right = contents(Path(config.run), END)
    for checkpoint in checkpoints(config.run):
        if int(checkpoint.name[5:]) > BEFORE:
            shutil.rmtree(checkpoint)
    return right


def listed(flag, text, known):
    """The words of a flag. Raises UserError on one that is not known."""
    words = text.split(",")
    for word in words:
        if word not in known:
            raise UserError(f"--{flag}: {word!r} is none of {', '.join(known)}")
    return words


def main(config):
    places, faults = listed("places", config.places, PLACES), listed("faults", config.faults, FAULTS)
    groups = [int(word) for word in listed("ranks", config.ranks, ["2", "3", "4"])]
    shrink()
    started, seconds, wrong = time.monotonic(), {}, []
    fork_here = multiprocessing.get_context("fork")
    with (tempfile.TemporaryDirectory() as folder,
          ProcessPoolExecutor(config.jobs, fork_here, adopt) as pool):
        shards = config.shards_dir or prepare(Path(folder) / "shards")
        settings = {ranks: flags(shards, Path(folder) / f"of_{ranks}", max_steps=END, evaluate_every=2,
                                 keep=END, batch_size=12, max_length=64, micro_batch_tokens=64,
                                 rank_timeout=config.rank_timeout) for ranks in groups}
        right = {ranks: pool.submit(begin, ranks, settings[ranks]) for ranks in groups}
        cases = [(launch, ranks, place, rank, fault) for ranks in groups for place in places
                 for rank in (0, 1) if (place, rank) != ("save", 1) for fault in faults]
        if config.torchrun:
            cases += [(launch_torchrun, groups[0], places[0], 0, fault) for fault in faults]
        running = {case: pool.submit(try_case, case[0], Path(settings[case[1]].run),
                                     right[case[1]].result(), settings[case[1]], *case[1:])
                   for case in cases}
        progress = Progress(len(cases), "groups")
        for case, result in running.items():
            seconds[case], problems = result.result()
            wrong += problems
            progress.row(" ".join(map(str, case[1:])))
    rows = [["started by", "processes", "place", "rank", *faults]]
    for case in dict.fromkeys(case[:4] for case in cases):
        durations = [seconds[(*case, fault)] for fault in faults]
        rows.append([{launch: "fork", launch_torchrun: "torchrun"}[case[0]], *map(str, case[1:]),
                     *("" if number is None else f"{number:.1f}" for number in durations)])
    print("seconds from the fault until the last process of the group was gone")
    print_table(rows)
    print(f"\n{len(cases)} groups in {time.monotonic() - started:.0f} s; at most "
          f"{config.rank_timeout} + {GRACE} s are promised")
    conclude(wrong)


if __name__ == "__main__":
    if "FAULT" in os.environ:
        run(member, parse_command_line(train_vlm.Config))
    else:
        run(main, parse_command_line(Config))
