"""
Save onto a disk that is too small by more or less, and see what loads.

    python extras/faults/full_disk.py --sizes=20

The disk is a tmpfs in a name space of the process itself, where there is room for the run as it is and
for 0.2 to 1.2 of the checkpoint that it is about to save. The save either succeeds or raises, with the
old checkpoint as it was; once there is room, the run goes on and saves its next one. Nothing was found.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not extras/faults/

import ctypes
import os
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass

from data import UserError, run
from extras.faults.tiny import (AFTER, SUCCESS, OneSave, fork, leftovers, newest_step, prepare, shrink,
                                wait)

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000


@dataclass(frozen=True)
class Config:
    sizes: int = 20  # of the disk, from `smallest` to `largest` of a checkpoint beside what is there
    smallest: float = 0.2  # checkpoints
    largest: float = 1.2  # checkpoints
    shards_dir: str = ""  # of the sample at 32 pixels; none: they are prepared first


def own_mounts():
    """Let this process mount what it alone sees, root or not. Raises OSError where that is refused."""
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS | CLONE_NEWUSER):
        raise OSError(ctypes.get_errno(), "no name space of its own")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def mount(options, *what):
    subprocess.run(["mount", "-o", options, *what], check=True)


def try_sizes(config, one, disk, told):
    """The whole campaign, in a process that may mount; the file `told` gets what it has to say."""
    own_mounts()
    checkpoint = sum(facts["bytes"] for facts in one.right[AFTER].values())
    wrong, succeeded, begin = [], Counter(), time.perf_counter()
    for number in range(config.sizes):
        share = config.smallest + (config.largest - config.smallest) * number / max(config.sizes - 1, 1)
        mount("size=64m", "-t", "tmpfs", "tmpfs", str(disk))
        copy = one.copy(below=disk)
        used = os.statvfs(disk).f_blocks - os.statvfs(disk).f_bfree
        block = os.statvfs(disk).f_bsize
        mount(f"remount,size={used * block + int(share * checkpoint)}", str(disk))
        code = wait(fork(one.save, copy, AFTER))
        found = one.violations(copy, code)
        if leftovers(copy):
            found.append(f"{leftovers(copy)} stay")
        if (code == SUCCESS) != (newest_step(copy) == AFTER):
            found.append(f"exit code {code}, step {newest_step(copy)} loads")
        mount("remount,size=64m", str(disk))
        found += one.violations_of_the_next(copy)
        subprocess.run(["umount", str(disk)], check=True)
        succeeded[code == SUCCESS] += 1
        wrong += [f"room for {share:.2f} checkpoints: {line}" for line in found]
    told.write_text(
        f"{config.sizes} disks with room for {config.smallest} to {config.largest} checkpoints: "
        f"{succeeded[True]} saves succeeded, {succeeded[False]} raised, in "
        f"{time.perf_counter() - begin:.0f} s\n{len(wrong)} violations"
        + "".join(f"\n  {line}" for line in wrong[:20]))
    if wrong:
        raise UserError  # for the exit code; what it has to say is written down


def main(config):
    shrink()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        one = OneSave(config.shards_dir or prepare(folder / "shards"), folder)
        disk, told = folder / "disk", folder / "told"
        disk.mkdir()
        code = wait(fork(try_sizes, config, one, disk, told))
        if not told.exists():
            raise UserError("no disk can be mounted here, even in a name space of its own")
        print(told.read_text())
    if code:
        sys.exit(1)


if __name__ == "__main__":
    run(main, Config)
