"""
Does training leak? Watches the memory, open files and threads of train_vlm.py while it runs.

    python extras/faults/soak.py --minutes=40 --flags="--model=small --data=path_vqa --language=full"

A line a minute; at the end slopes over the second half, by least squares, and what is left when the run has
been stopped by SIGTERM: no process of it, no shared memory. Memory in use is what malloc has given out at the
end of a step, by glibc's mallinfo2: a leak is there. Resident is what the process holds, without pages of
the mapped shards; it also has what malloc keeps for later, which grows while batches come that are larger or
cut otherwise than all before. Linux, by /proc.

The small model on PathVQA, all questions of an image in one group, 40 minutes beside other work: in the second
half 519 to 523 MB in use (+2 MB an hour), 2,881 to 2,988 resident (+68 MB an hour), nothing left.
"""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[0] = str(ROOT)  # the repository, not this folder

import numpy as np

from extras.bench.progress import about, tell
from extras.faults.tiny import train_vlm
from plumbing.flags import UserError, parse_command_line, run


@dataclass(frozen=True)
class Config:
    flags: str = "--model=sample --data=sample --language=full"  # of train_vlm.py; --run aside
    minutes: float = 40.0  # of training
    every: float = 5.0  # seconds between two looks


class MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]


def train(config):
    """train_vlm.main, which notes behind each step how many megabytes are in use."""
    mallinfo, train_step = ctypes.CDLL(None).mallinfo2, train_vlm.train_step
    mallinfo.restype = MallInfo
    note = Path(os.environ["SOAK"])

    def train_step_and_note(*arguments):
        result, info = train_step(*arguments), mallinfo()
        note.write_text(str((info.uordblks + info.hblkhd) / 1e6))
        return result

    train_vlm.train_step = train_step_and_note
    train_vlm.main(config)


def look(process, note):
    """Megabytes in use at the last step, megabytes resident, open files, threads, child processes."""
    folder = Path(f"/proc/{process}")
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    children = (folder / "task" / str(process) / "children").read_text().split()
    own = sum(int(status[kind].split()[0]) for kind in ("RssAnon", "RssShmem"))
    text = note.read_text() if note.exists() else ""  # empty while it is written
    return (float(text or "nan"), own / 1e3, len(os.listdir(folder / "fd")), int(status["Threads"]),
            len(children))


def main(config):
    if not Path("/proc/self/status").is_file():
        raise UserError("soak.py: needs Linux's /proc")
    shared = set(os.listdir("/dev/shm"))
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "in_use"
        trainer = subprocess.Popen(
            [sys.executable, __file__, *shlex.split(config.flags), "--max_steps=100000000",
             f"--run={folder}/run"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "SOAK": str(note)})
        tell(f"{about(60 * config.minutes)}, a line a minute")
        seen, began = [], time.monotonic()
        while (passed := time.monotonic() - began) < 60 * config.minutes:
            time.sleep(config.every)
            if trainer.poll() is not None:
                raise UserError(f"train_vlm.py ended with code {trainer.returncode}; try its --flags alone")
            seen.append((passed, *look(trainer.pid, note)))
            if int(passed // 60) > int((passed - config.every) // 60):
                print("minute {:3}: {:,.0f} MB in use, {:,.0f} resident, {} files, {} threads, {} children".format(
                    int(passed // 60), *seen[-1][1:]), flush=True)
        log = (Path(folder) / "run/log.jsonl").read_text().splitlines()
        trainer.send_signal(signal.SIGTERM)
        code = trainer.wait(timeout=300)
    half = np.array(seen[len(seen) // 2:])
    print(f"{config.minutes:g} minutes, {len(log):,} entries in the log; in the second half:")
    for name, column in (("in use", 1), ("resident", 2)):
        known = half[~np.isnan(half[:, column])]
        slope = np.polyfit(known[:, 0] / 3600, known[:, column], 1)[0]
        print(f"{name:8} {known[:, column].min():,.0f} to {known[:, column].max():,.0f} MB, slope {slope:+,.0f} MB "
              "an hour")
    print(f"files {half[0, 3]:.0f} to {half[-1, 3]:.0f}, threads {half[0, 4]:.0f} to {half[-1, 4]:.0f}; "
          f"ended with code {code}; shared memory left: {len(set(os.listdir('/dev/shm')) - shared)}")


if __name__ == "__main__":
    if "SOAK" in os.environ:
        run(train, parse_command_line(train_vlm.Config))
    else:
        run(main, parse_command_line(Config))
