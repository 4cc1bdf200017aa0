"""
Kill prepare/all.py at random moments and see what it leaves: a dataset that is absent, or whole.

    python extras/faults/kill_prepare.py --data=path_vqa --times=30

First the dataset is prepared undisturbed, which says how long that takes and which bytes are right.
Then it is started again and again in one folder, killed by SIGKILL after a random part of that time,
and at last left to finish.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass

from extras.bench.progress import Progress
from extras.faults.tiny import hashes
from plumbing.flags import UserError, parse_command_line, run


@dataclass(frozen=True)
class Config:
    data: str = "sample"  # dataset to prepare
    raw_dir: str = "raw"  # as prepare/all.py's
    times: int = 30  # kills
    seed: int = 0  # of their moments


def start(config, folder):
    return subprocess.Popen(
        [sys.executable, "prepare/all.py", f"--only={config.data}", f"--raw_dir={Path(config.raw_dir).resolve()}",
         f"--shards_dir={folder}"], cwd=sys.path[0], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main(config):
    draw, states = random.Random(config.seed), Counter()
    with tempfile.TemporaryDirectory() as folder:
        undisturbed, killed = Path(folder) / "undisturbed", Path(folder) / "killed"
        begin = time.perf_counter()
        if start(config, undisturbed).wait():
            raise UserError(f"{config.data} cannot be prepared; run `python prepare/all.py "
                            f"--only={config.data}` and read what it says")
        seconds = time.perf_counter() - begin
        right, progress = hashes(undisturbed / config.data), Progress(config.times, "kills")
        for _ in range(config.times):
            process = start(config, killed)
            try:
                process.wait(draw.uniform(0, seconds))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
            digests = hashes(killed / config.data)
            # leaks.json is compared and written after the dataset itself.
            whole = {**digests, "train/leaks.json": ""} == {**right, "train/leaks.json": ""}
            states["absent" if not digests else "whole" if whole else "neither"] += 1
            progress.row()
            if digests:  # so that the next one has something to do
                shutil.rmtree(killed / config.data)
        start(config, killed).wait()
        digests, rest = hashes(killed / config.data), [path.name for path in killed.glob(".*")]
        print(f"{config.times} kills within {seconds:.1f} s, after each the dataset was: "
              + ", ".join(f"{state} {count} times" for state, count in sorted(states.items())))
        print(f"then finished: {'the same' if digests == right else 'OTHER'} bytes in {len(right)} files, "
              f"{'nothing' if not rest else ', '.join(rest)} left over")
        if digests != right or rest or states["neither"]:
            sys.exit(1)


if __name__ == "__main__":
    run(main, parse_command_line(Config))
