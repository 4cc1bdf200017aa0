"""
Harm a run of train_cls.py, and see that it ends in one line or in the very bytes of an undisturbed one.

    python extras/faults/kill_cls.py                        all of it (half an hour)
    python extras/faults/kill_cls.py --parts=full --sizes=14

    kill   it is killed by SIGKILL at random moments and started again until it finishes
    full   its disk, a tmpfs, has room for 0.1 to 1.1 of what it writes; then there is room for all, and the
           same command goes on
    flip   one bit is flipped in each region of each file that a stopped or a finished run leaves, and
           the same command, --report and --predict are asked to use it

The run is the real one as the command line starts it, of a tiny encoder, in a forked child. What may be said
of each harm is "refused" (exit code 2 and one line on stderr) or "the same" (exit code 0 and the same bytes).

100 kills in 16 runs, 14 disks, 10 of them too small, and 96 flipped bits (8 regions of each of 12 files), used by
160 commands, of which 64 refused: no violation.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import contextlib
import functools
import io
import os
import random
import shutil
import signal
import time
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from extras.faults import tiny
from extras.faults.corrupt import flipped
from extras.faults.full_disk import leave_room, mount, mounted, own_disk, used
from extras.faults.tiny import SUCCESS, USER_ERROR, bits_of, hashes, try_parts, wait
from plumbing.files import checkpoints, find_damage, hash_json, read_manifest
from plumbing.flags import Count, UserError, parse_command_line, run
from prepare.folder import prepare_folder
from prepare.own import Wanted
from prepare.shards import ImageSettings
from tasks import labelled

train_cls = tiny.load_script("train_cls.py")


@dataclass(frozen=True)
class Config:
    parts: str = "kill,full,flip"  # what is tried
    kills: Count = 300  # runs are repeated until there were so many
    sizes: Count = 14  # of the disk
    regions: Count = 24  # of each file, in each of which a bit is flipped
    seed: int = 0  # of the moments and the bits


# ----------------------------------------------------------------------------- a tiny run

def write_images(folder):
    """Two classes of drawn noise, one darker than the other, as a dataset of 32 pixels."""
    draw = np.random.default_rng(0)
    for place, name in enumerate(("dark", "light")):
        (folder / "scans" / name).mkdir(parents=True)
        for number in range(24):
            pixels = draw.integers(0, 160, (32, 32, 3)) + 60 * place
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "scans" / name / f"{number}.png")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return prepare_folder(folder / "scans", folder / "shards",
                              Wanted(ImageSettings(32, "squash", "jpeg", 97), workers=1))


def start(config, told):
    """The process id of a child that does what the command line does; the file `told` gets its stderr."""
    def call():
        for module in (train_cls, labelled):
            module.tqdm = functools.partial(module.tqdm, disable=True)
        run(train_cls.main, config)

    return tiny.start(call, f"{told}.out", told)


def finished(folder):
    """{file: what has to be the same} of a finished run; its seconds, its machine and its lock may differ."""
    result = read_manifest(folder, "result.json")
    if result is None:
        return None
    return hashes(folder) | {"result.json": hash_json({
        key: value for key, value in result.items() if key not in ("seconds", "machine", "checksum")})}


class Trial:
    """The run to harm, what it makes undisturbed, and how a child of it ended."""

    def __init__(self, folder):
        self.folder, self.told = folder, folder / "told"
        name = write_images(folder)
        self.config = train_cls.Config(
            dataset=name, encoder="scratch", model="sample", epochs=6, save_every=2, batch_size=16,
            learning_rate=1e-3, shards_dir=str(folder / "shards"), out=str(folder / "undisturbed"), device="cpu")
        self.path = Path(name) / "scratch" / "seed_0"
        for _ in range(2):  # the first one is slower than all that follow
            shutil.rmtree(self.config.out, ignore_errors=True)
            begin = time.perf_counter()
            self.require(self.config)
            self.seconds = time.perf_counter() - begin
        self.right = finished(Path(self.config.out) / self.path)

    def require(self, config):
        if code := wait(start(config, self.told)):
            raise UserError(f"an undisturbed run ends with exit code {code}: {self.told.read_text()[-300:]}")

    def ended(self, code):
        """What is wrong with an end that is neither success nor one line on stderr and exit code 2."""
        lines = [line for line in self.told.read_text().splitlines() if ": not used: " not in line]
        if code == SUCCESS and not any("Traceback" in line for line in lines):
            return []
        one_line = code == USER_ERROR and len(lines) == 1
        return [] if one_line else [f"exit code {code}, {len(lines)} lines: {lines[-1:]}"]


# ----------------------------------------------------------------------------- what is done to it
# Each part yields (what came of a harm, in words; what is wrong).

def try_kill(config, trial):
    draw, before = random.Random(config.seed), 0
    settings = replace(trial.config, out=str(trial.folder / "killed"))
    target, kills = trial.folder / "killed" / trial.path, 0
    while kills < config.kills or target.exists():
        child = start(settings, trial.told)
        if kills < config.kills:
            time.sleep(draw.uniform(0, trial.seconds))
            os.kill(child, signal.SIGKILL)  # without effect on one that has ended
        code = wait(child)
        if code == -signal.SIGKILL:
            kills += 1
            newest = next(iter(checkpoints(target)), None)
            removing = (target / "result.json").exists()  # of a finished run, which needs none of them
            damage = newest and not removing and find_damage(newest)
            wrong = [f"newest checkpoint {newest.name}: {damage}"] if damage else []
            now = int(newest.name[5:]) if newest else 0
            if now < before and not removing:
                wrong.append(f"went back from epoch {before} to {now}")
            before = max(now, before)
            yield "killed", wrong
            continue
        wrong = trial.ended(code)
        if code != SUCCESS or finished(target) != trial.right:
            wrong.append(f"exit code {code}, finished with other bytes: {trial.told.read_text()[-200:]}")
        shutil.rmtree(target)
        before = 0
        yield "finished", wrong


def try_full(config, trial):
    disk = own_disk(trial.folder)
    settings = replace(trial.config, out=str(disk))
    with mounted(disk):
        trial.require(replace(settings, epochs=2))
        needed = 9 * used(disk)  # two checkpoints are the most that is there at once, each of four times the weights
    for room in np.linspace(0.1 * needed, 1.1 * needed, config.sizes):
        with mounted(disk):
            leave_room(disk, room)
            code = wait(start(settings, trial.told))
            wrong = trial.ended(code)
            left = [path.name for path in disk.rglob(".*.partial") if path.is_dir()]
            if left:
                wrong.append(f"{left} stay")
            mount("remount,size=64m", str(disk))
            again = wait(start(settings, trial.told))
            if again != SUCCESS or finished(disk / trial.path) != trial.right:
                wrong.append(f"with room exit code {again}, or other bytes: {trial.told.read_text()[-200:]}")
        yield "refused, then the same" if code else "had room", wrong


def stopped_run(trial):
    """A run that was killed once it had its checkpoint of epoch 4."""
    settings = replace(trial.config, out=str(trial.folder / "stopped"))
    target = trial.folder / "stopped" / trial.path
    while not (there := checkpoints(target)) or there[0].name < "step_000004":
        shutil.rmtree(target, ignore_errors=True)
        child = start(settings, trial.told)
        while not (target / "step_000004").exists() and not (target / "result.json").exists():
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        wait(child)
    return settings, target


def try_flip(config, trial):
    draw = random.Random(config.seed)
    new = trial.folder / "scans" / "dark"
    whole = Path(trial.config.out) / trial.path
    asks = {"again": trial.config, "report": replace(trial.config, report=True),
            "predict": replace(trial.config, predict=str(new))}
    right = {}
    for name, settings in asks.items():
        trial.require(settings)
        right[name] = (trial.folder / "told.out").read_text()
    table = next(whole.glob("predicted_*.csv"))
    predicted = table.read_bytes()
    stopped, target = stopped_run(trial)
    copy = trial.folder / "copy"
    shutil.copytree(target, copy)
    for older in checkpoints(copy)[1:]:  # to which a run with a damaged checkpoint would go back
        shutil.rmtree(older)
    for path in sorted(path for path in whole.rglob("*") if path.is_file() and path != table):
        for bit in bits_of(path, draw, config.regions):
            content = path.read_bytes()
            path.write_bytes(flipped(content, bit))
            name = path.relative_to(whole).as_posix()
            for ask in ("again", "report") if name == "result.json" else ("again", "predict"):
                code = wait(start(asks[ask], trial.told))
                wrong = trial.ended(code)
                said = (trial.folder / "told.out").read_text()
                if ask == "report" and "left out: " in said:
                    code = USER_ERROR
                elif code == SUCCESS and (said != right[ask] or table.read_bytes() != predicted):
                    wrong.append(f"{name}, bit {bit}, {ask}: other output, no word")
                yield f"{name}: {'refused' if code else 'the same'}", wrong
            path.write_bytes(content)
    for path in sorted(path for path in copy.rglob("*") if path.is_file()):
        for bit in bits_of(path, draw, config.regions):
            name = path.relative_to(copy)
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(copy, target)
            (target / name).write_bytes(flipped(path.read_bytes(), bit))
            code = wait(start(stopped, trial.told))
            wrong = trial.ended(code)
            if code == SUCCESS and finished(target) != trial.right:
                wrong.append(f"{name}, bit {bit}: other bytes, no word")
            yield f"stopped, {name}: {'refused' if code else 'the same'}", wrong


def main(config):
    try_parts({"kill": try_kill, "full": try_full, "flip": try_flip}, config, Trial)


if __name__ == "__main__":
    run(main, parse_command_line(Config))
