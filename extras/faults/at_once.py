"""
Start the same command twice at once: one waits or is refused in one line, and what stays is whole.

    python extras/faults/at_once.py --times=60

train_vlm.py in one run's folder, train_cls.py in one run's folder, eval_vqa.py on one run,
extras/share/export.py of one run and prepare/all.py on one dataset, in turn, on a tiny sample; the second
starts up to a second after the first. A violation is a traceback, an exit code other than 0 and 2, no
command that succeeds, a checkpoint, model or shard that is damaged, a partial folder that stays, and a
third command that fails.

Of 60 pairs none was one: of train_vlm.py and export.py the second was always refused, of train_cls.py 3
times in 12; else both succeeded.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import random
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass

from extras.faults import tiny
from extras.faults.fuzz_flags import COMMANDS, find_fault, make_place, start
from plumbing.files import find_damage
from plumbing.flags import Count, UserError, Whole, parse_command_line, run
from plumbing.shards import Shard


@dataclass(frozen=True)
class Config:
    times: Count = 60  # pairs of commands
    seed: Whole = 0  # of the moments at which the second one starts


def damages(folder):
    """What is wrong, in words, with the checkpoints, models and shards in a folder."""
    wrong = [f"{path.name} stays" for path in folder.rglob("*partial*")]
    for manifest in folder.rglob("manifest.json"):
        if manifest.parent.parent.parent.name in ("shards", "prepared"):
            try:
                Shard(manifest.parent)
            except UserError as error:
                wrong.append(str(error))
        elif damage := find_damage(manifest.parent):
            wrong.append(f"{manifest.parent}: {damage}")
    return wrong


def try_pair(script, folder, pause):
    """The sorted exit codes of a command that is started twice, and what is wrong, in words."""
    words = {name: str(value) for name, value in COMMANDS[script][1].items()}
    if script == "train_vlm.py":
        words |= {"max_steps": "4", "save_every": "1"}
    logs = [folder / "first.log", folder / "second.log", folder / "third.log"]
    children = []
    for log in logs[:2]:
        children.append(start(script, words, folder, log))
        time.sleep(pause)
    codes = [tiny.wait(child) for child in children]
    wrong = [fault for code, log in zip(codes, logs) if (fault := find_fault(script, code, log.read_text(), (), words))]
    wrong += damages(folder) + ["neither succeeds"] * (0 not in codes)
    if script == "train_vlm.py":
        words["resume"] = "true"
    if script == "extras/share/export.py":
        words["folder"] = "exported again"  # what is there is not overwritten
    if tiny.wait(start(script, words, folder, logs[2])):
        wrong.append(f"the third: {logs[2].read_text().splitlines()[-1]}")
    return tuple(sorted(codes)), wrong


def main(config):
    tiny.shrink()
    draw, begin, ends, faults = random.Random(config.seed), time.perf_counter(), Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        place = make_place(Path(folder) / "place")
        for number in range(config.times):
            script = list(COMMANDS)[number % len(COMMANDS)]
            here = Path(shutil.copytree(place, Path(folder) / "here", symlinks=True))
            codes, wrong = try_pair(script, here, draw.uniform(0, 1))
            ends[script, codes] += 1
            faults += [f"{script}: {fault}" for fault in wrong]
            print(f"{number + 1} of {config.times}: {script} ended with {codes}; {'; '.join(wrong) or 'whole'}",
                  flush=True)
            shutil.rmtree(here)
    for (script, codes), count in sorted(ends.items()):
        print(f"{script:15} {codes}: {count}")
    print(f"{config.times} pairs in {time.perf_counter() - begin:.0f} s")
    tiny.conclude(faults)


if __name__ == "__main__":
    run(main, parse_command_line(Config))
