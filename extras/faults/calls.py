"""
Let every single system call of one save and its pruning be the last one, or fail, and see what loads.

    python extras/faults/calls.py                  all calls, in every way; needs strace (a few minutes)
    python extras/faults/calls.py --only=fsync,renameat,write
    python extras/faults/calls.py --sweep=true     of the sweep with which a killed run goes on, instead

A first save under strace tells which calls there are. Then, for each call, another process does the
same save: once it is killed right before that call; then the call fails with each error, once, and
once more together with all later calls of its kind. At last files may not grow beyond some size, so
that writes are cut short. Afterwards the old or the new checkpoint has to load, an error must not have
been taken for success, and the run has to go on: it sweeps, and saves its next checkpoint.

2,230 saves, 438 calls in five ways and 40 limits, found nothing. The sweep had two faults: an error in
reading the newest checkpoint ended the run, where it should pass on to an older one, and one in reading
its manifest a second time was a TypeError. Both are mended; still, an error that would not come again
is taken for damage, and a checkpoint is set aside, not removed, that could be read a moment later.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import ctypes
import os
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass

from extras.bench.progress import Progress
from extras.faults.tiny import (AFTER, OS_ERROR, SUCCESS, USER_ERROR, NotHere, OneSave, conclude, fork, newest_step,
                                prepare, shrink, wait)
from plumbing.flags import UserError, parse_command_line
from plumbing.flags import run as run_script

ENDS = {SUCCESS: "success", USER_ERROR: "UserError", OS_ERROR: "OSError", -signal.SIGKILL: "killed"}
PR_SET_PTRACER, ANY = 0x59616D61, ctypes.c_ulong(-1)


@dataclass(frozen=True)
class Config:
    only: str = ""  # system calls to try, by name, separated by commas; none: all that a save makes
    errors: str = "ENOSPC,EIO"  # that they fail with, once and for ever
    limits: int = 40  # sizes that files are not allowed to exceed, for writes cut short
    sweep: bool = False  # of a resumed run, with leftovers of each kind, in place of a save
    every: int = 1  # try the 1st, the n + 1st, ... of a call's kind alone
    shards_dir: str = ""  # of the sample at 32 pixels; none: they are prepared first


def traced(log, options, function, *arguments):
    """The exit code of a function in a process of its own; strace sees this function alone."""
    def begin():
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, ANY)  # some systems let parents alone trace a process
        signal.sigwait({signal.SIGUSR1})
        function(*arguments)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # before the fork: none must be missed
    child = fork(begin)
    time.sleep(0.005)  # time for the prctl
    tracer = subprocess.Popen(["strace", "-p", str(child), "-o", str(log), *options],
                              stderr=subprocess.PIPE, text=True)
    line = tracer.stderr.readline()
    if "attached" not in line:
        os.kill(child, signal.SIGKILL)
        wait(child)
        raise NotHere(f"strace cannot trace here: {line.strip()}")
    os.kill(child, signal.SIGUSR1)
    code = wait(child)
    tracer.communicate()
    return code


def act_with_a_limit(act, run, limit):
    """Writes are cut short at this size of a file; beyond it they fail. Python ignores the signal."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    act(run)


def ways_to_fail(errors):
    """{how a system call fails: strace's words for it, with a place for the number of the call}."""
    ways = {"killed": "signal=KILL:when={}"}
    for error in errors:
        ways[f"{error} once"] = f"error={error}:when={{}}"
        ways[f"{error} for ever"] = f"error={error}:when={{}}+"
    return ways


def main(config):
    if not shutil.which("strace"):
        raise NotHere("strace is not here; install it: `apt-get install strace`")
    shrink()
    ends, loaded, tried, wrong, begin = Counter(), Counter(), 0, [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        one = OneSave(config.shards_dir or prepare(folder / "shards"), folder)
        log = folder / "strace.log"
        if config.sweep:
            copy, act, violations = one.copy_with_leftovers, one.sweep, one.violations_of_a_sweep
        else:
            copy, act, violations = one.copy, lambda run: one.save(run, AFTER), one.violations

        def check(run, what, code, kind):
            nonlocal tried
            tried += 1
            try:
                problems = violations(run, code)
            except UserError as error:
                problems = [str(error)]
            ends[kind, ENDS.get(code, code)] += 1
            if not problems:
                loaded[kind, newest_step(run)] += 1
                problems = one.violations_of_the_next(run)
            wrong.extend(f"{what}: {line}" for line in problems)
            shutil.rmtree(run)
            progress.row(what)

        if traced(log, ["-e", "trace=%file,%desc"], act, copy()) != SUCCESS:
            raise UserError("the undisturbed save failed")
        calls = Counter(re.findall(r"^(\w+)\(", log.read_text(), re.M))
        calls = {name: count for name, count in calls.items()
                 if name in config.only.split(",") or not config.only}
        numbers = {name: range(1, count + 1, config.every) for name, count in calls.items()}
        ways = ways_to_fail(config.errors.split(","))
        progress = Progress(len(ways) * sum(map(len, numbers.values())) + config.limits, "faults", pause=5)
        for name, counted in numbers.items():
            for number in counted:
                for kind, way in ways.items():
                    what, run = f"{name} {number}: {kind}", copy()
                    options = ["-e", f"trace={name}", "-e", f"inject={name}:{way.format(number)}"]
                    code = traced(log, options, act, run)
                    check(run, what, code, kind)
        largest = max(facts["bytes"] for facts in one.right[AFTER].values())
        for number in range(config.limits):  # more of the small sizes, where most files are
            run, limit = copy(), int(largest ** ((number + 1) / config.limits))
            code = wait(fork(act_with_a_limit, act, run, limit))
            check(run, f"files of {limit} bytes at most", code, "cut short")
    what = "sweep" if config.sweep else "save"
    print(f"{sum(calls.values())} system calls in a {what}: "
          + ", ".join(f"{count} {name}" for name, count in Counter(calls).most_common()))
    for kind in dict.fromkeys(kind for kind, _ in ends):
        ended = [f"{count} {end}" for (of, end), count in ends.items() if of == kind]
        then = [f"step {step} {count} times" for (of, step), count in loaded.items() if of == kind]
        print(f"{kind:16} {', '.join(ended)}; then loads {', '.join(then)}")
    print(f"{tried} times in {time.perf_counter() - begin:.0f} s")
    conclude(wrong)


if __name__ == "__main__":
    run_script(main, parse_command_line(Config))
