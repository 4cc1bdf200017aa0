"""
Harm eval_vqa.py and extras/share/export.py: their output is whole or absent, and what they read is unharmed.

    python extras/faults/kill_outputs.py                        all of it
    python extras/faults/kill_outputs.py --parts=full --sizes=14

    kill   they are killed by SIGKILL at random moments, then the same command is given again
    full   the disk that they write on, a tmpfs, has room for 0.1 to 1.5 of it, then for all
    flip   one bit is flipped in each region of each file that they read: of the checkpoint, of the run, of
           the shards, and of an evaluation, which the export's card reports

The commands are the real ones as the command line starts them, of a tiny run, in a forked child. A command
ends with exit code 0 and the very bytes of an undisturbed one (but for its seconds), or with one line, exit
code 2 and nothing but whole parts of them. log.jsonl is not harmed: nothing vouches for it, since a run
writes on in it, and the card takes its last losses from there.

200 commands were killed, 60 of them too late; of 28 disks 20 were too small; 240 flipped bits were met by
480 commands, of which 250 refused. One fault was found: what a killed export had left could stop the next
one. It is mended.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import json
import os
import random
import shutil
import signal
import time
from dataclasses import dataclass

import numpy as np

from extras.faults.corrupt import flipped
from extras.faults.full_disk import leave_room, mount, mounted, own_disk, used
from extras.faults.fuzz_flags import COMMANDS, find_fault, make_place, start
from extras.faults.tiny import SUCCESS, bits_of, hashes, try_parts, wait
from plumbing.files import hash_json
from plumbing.flags import Count, UserError, parse_command_line, run

PLACE = {"eval_vqa.py": ("out", "results"), "extras/share/export.py": ("folder", "exported")}  # its flag and value


@dataclass(frozen=True)
class Config:
    parts: str = "kill,full,flip"  # what is tried
    kills: Count = 100  # of each command
    sizes: Count = 14  # of the disk
    regions: Count = 8  # of each file, in each of which a bit is flipped
    seed: int = 0  # of the moments and the bits


def written(folder):
    """{file: what has to be the same} below a folder; seconds and checksum of an evaluation may differ."""
    files = {name: digest for name, digest in hashes(folder).items() if Path(name).name != ".lock"}
    for name in files:
        if Path(name).name == "results.json":
            results = json.loads((folder / name).read_text())
            results["flags"].pop("out")
            files[name] = hash_json({key: results[key] for key in results.keys() - {"seconds", "checksum", "machine"}})
    return files


class Trial:
    """A run in a folder `place`, and what each command makes of it undisturbed."""

    def __init__(self, folder):
        self.folder, self.log = folder, folder / "said"
        self.place = make_place(folder / "place", language="lora")
        self.seconds, self.right = {}, {}
        for script, (_, name) in PLACE.items():
            for _ in range(2):  # the first one is slower than all that follow
                begin = time.perf_counter()
                shutil.rmtree(self.place / name, ignore_errors=True)
                if self.call(script):
                    raise UserError(f"{script}, undisturbed: {self.log.read_text()[-300:]}")
                self.seconds[script] = time.perf_counter() - begin
            self.right[script] = written(self.place / name)

    def begin(self, script, out=""):
        """The process id of a command, which writes to `out`, or to its usual place."""
        flag, name = PLACE[script]
        return start(script, {key: str(value) for key, value in COMMANDS[script][1].items()}
                     | {flag: str(out or name)}, self.place, self.log)

    def call(self, script, out=""):
        return wait(self.begin(script, out))

    def faults(self, script, code, out):
        """What is wrong, in words, with how a command ended and with what is there then."""
        wrong = [fault] if (fault := find_fault(script, code, self.log.read_text(errors="replace"), (), {})) else []
        there, right = written(out), self.right[script]
        if code == SUCCESS and there != right or not there.items() <= right.items():
            wrong.append(f"exit code {code}, with other files: {sorted(there.items() ^ right.items())[:3]}")
        parts = {name.split("/")[0] for name in there}  # each of which is whole
        if missing := [name for name in right if name.split("/")[0] in parts and name not in there]:
            wrong.append(f"a part without {missing[:3]}")
        return [f"{script}: {line}" for line in wrong]

    def again(self, script, out):
        """What is wrong, in words, when the command is given again; an export overwrites nothing."""
        if script == "extras/share/export.py":
            for path in out.glob("[!.]*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return self.faults(script, self.call(script, out), out)


# ----------------------------------------------------------------------------- what is done to them
# Each part yields (what came of a harm, in words; what is wrong).

def try_kill(config, trial):
    draw = random.Random(config.seed)
    for script in PLACE:
        for _ in range(config.kills):
            out = trial.folder / "killed"
            child = trial.begin(script, out)
            time.sleep(draw.uniform(0, trial.seconds[script]))
            os.kill(child, signal.SIGKILL)  # without effect on one that has ended
            code = wait(child)
            there = {name: digest for name, digest in written(out).items() if not name.startswith(".")}
            wrong = [] if there.items() <= trial.right[script].items() else [f"{script}: killed, with other files"]
            yield f"{script} {'killed' if code else 'finished'}", wrong + trial.again(script, out)
            shutil.rmtree(out)


def try_full(config, trial):
    disk = own_disk(trial.folder)
    for script in PLACE:
        with mounted(disk):
            trial.call(script, disk / "out")
            needed = used(disk)
        for room in np.linspace(0.1 * needed, 1.5 * needed, config.sizes):
            with mounted(disk):
                leave_room(disk, room)
                code = trial.call(script, disk / "out")
                wrong = trial.faults(script, code, disk / "out")
                mount("remount,size=64m", str(disk))
                wrong += trial.again(script, disk / "out")
            yield f"{script} {'refused, then the same' if code else 'had room'}", wrong


def try_flip(config, trial):
    draw, out = random.Random(config.seed), trial.folder / "flipped"
    trial.call("eval_vqa.py", trial.place / "run/eval")  # for the card
    shutil.rmtree(trial.place / "exported")
    trial.call("extras/share/export.py")
    trial.right["extras/share/export.py"] = written(trial.place / "exported")
    files = [path for name in ("run", "shards") for path in sorted((trial.place / name).rglob("*"))
             if path.is_file() and path.name not in ("log.jsonl", ".lock")]
    for path in files:
        content, name = path.read_bytes(), path.relative_to(trial.place).as_posix()
        for bit in bits_of(path, draw, config.regions):
            path.write_bytes(flipped(content, bit))
            for script in PLACE:
                code = trial.call(script, out)
                wrong = [f"{name}, bit {bit}: {line}" for line in trial.faults(script, code, out)]
                yield f"{script} {'refused' if code else 'the same'}", wrong
                shutil.rmtree(out, ignore_errors=True)
        path.write_bytes(content)


def main(config):
    try_parts({"kill": try_kill, "full": try_full, "flip": try_flip}, config, Trial)


if __name__ == "__main__":
    run(main, parse_command_line(Config))
