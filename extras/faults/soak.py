"""
Does training leak? Watches the memory, open files and threads of train_vlm.py while it runs.

    python extras/faults/soak.py --minutes=40 --flags="--model=small --data=path_vqa --language=full"

A line a minute; at the end the slope of the process's own resident memory over the second half, by least
squares, and what is left when the run has been stopped by SIGTERM: no process of it, no shared memory. Pages
of the mapped shards are not its own: the system takes them back when it wants them. Linux, by /proc.
"""

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
sys.path[0] = str(ROOT)  # the repository, not extras/faults/

import numpy as np

from data import UserError, run


@dataclass(frozen=True)
class Config:
    flags: str = "--model=sample --data=sample --language=full"  # of train_vlm.py; --run aside
    minutes: float = 40.0  # of training
    every: float = 5.0  # seconds between two looks


def look(process):
    """Megabytes resident without mapped files, open files, threads, child processes."""
    folder = Path(f"/proc/{process}")
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    children = (folder / "task" / str(process) / "children").read_text().split()
    own = sum(int(status[kind].split()[0]) for kind in ("RssAnon", "RssShmem"))
    return (own / 1e3, len(os.listdir(folder / "fd")), int(status["Threads"]),
            len(children))


def main(config):
    if not Path("/proc/self/status").is_file():
        raise UserError("soak.py: needs Linux's /proc")
    shared = set(os.listdir("/dev/shm"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = subprocess.Popen(
            [sys.executable, "train_vlm.py", *shlex.split(config.flags), "--max_steps=100000000",
             f"--run={folder}/run"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seen, began = [], time.monotonic()
        while (passed := time.monotonic() - began) < 60 * config.minutes:
            time.sleep(config.every)
            if trainer.poll() is not None:
                raise UserError(f"train_vlm.py ended with code {trainer.returncode}; try its --flags alone")
            minute = int(passed // 60)
            seen.append((passed, *look(trainer.pid)))
            if minute > int((passed - config.every) // 60):
                print("minute {:3}: {:,.0f} MB, {} files, {} threads, {} children".format(
                    minute, *seen[-1][1:]), flush=True)
        log = (Path(folder) / "run/log.jsonl").read_text().splitlines()
        trainer.send_signal(signal.SIGTERM)
        code = trainer.wait(timeout=300)
    half = np.array(seen[len(seen) // 2:])
    slope = np.polyfit(half[:, 0] / 3600, half[:, 1], 1)[0]
    print(f"{config.minutes:g} minutes, {len(log):,} entries in the log: resident memory {half[:, 1].min():,.0f} to "
          f"{half[:, 1].max():,.0f} MB in the second half, slope {slope:+.1f} MB an hour; files "
          f"{seen[len(seen) // 2][2]} to {seen[-1][2]}, threads {seen[len(seen) // 2][3]} to {seen[-1][3]}; "
          f"ended with code {code}; shared memory left: {len(set(os.listdir('/dev/shm')) - shared)}")


if __name__ == "__main__":
    run(main, Config)
