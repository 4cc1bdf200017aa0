"""
Write onto a disk that is too small by more or less, and see what is there afterwards.

    python extras/faults/full_disk.py --sizes=20
    python extras/faults/full_disk.py --sizes=20 --parts=prepare --dataset=path_vqa

    save      a checkpoint, by train_vlm.py
    prepare   a dataset's shards, by prepare/all.py
    download  a file, by prepare/download.py from a server on this machine: of stated length, of
              unstated length, and while others fill the disk that had room for it

The disk is a tmpfs in a name space of the process itself, with room for 0.2 to 1.2 of what is to be
written, or for all but a block of it. That succeeds, or is refused in one line: the old checkpoint is as
it was, and nothing half-written has the name of a dataset or file (a dataset may lack its leaks.json,
without which nobody trains on it). Once there is room, the same command brings the same bytes.

Of 20 saves 4 succeeded, of 40 times prepare/all.py 8 (20 with --dataset=path_vqa), of 60 downloads 12.
All others were refused as they have to be, but for something that has been mended since: where just the
block for leaks.json was missing, prepare/all.py ended with a traceback.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import contextlib
import ctypes
import hashlib
import os
import random
import subprocess
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from extras.faults.tiny import (AFTER, ROOT, SUCCESS, USER_ERROR, NotHere, OneSave, fork, hashes,
                                leftovers, newest_step, try_parts, wait)
from extras.faults.tiny import prepare as prepare_sample
from plumbing.flags import Count, UserError, parse_command_line, run
from prepare import download

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
CONTENT = random.Random(0).randbytes(3_000_000)  # of the file that is downloaded


@dataclass(frozen=True)
class Config:
    parts: str = "save,prepare,download"  # what is written
    sizes: Count = 20  # of the disk, from `smallest` to `largest`, and one that lacks a block
    smallest: float = 0.2  # of what is to be written, that there is room for
    largest: float = 1.2  # the same on the largest disk
    dataset: str = "sample"  # what is prepared
    raw_dir: str = "raw"  # where its files are; the sample needs none
    limit: int = 64  # of its samples a split
    shards_dir: str = ""  # of the sample at 32 pixels, to train on; none: they are prepared first


# ----------------------------------------------------------------------------- small disks

def own_disk(folder):
    """
    A folder in this one on which this process may mount a disk that it alone sees, root or not. Raises
    NotHere where that is refused.
    """
    user, group, disk = os.getuid(), os.getgid(), folder / "disk"
    disk.mkdir(exist_ok=True)
    try:
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS | CLONE_NEWUSER):
            raise OSError(ctypes.get_errno(), "unshare")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        with mounted(disk):
            return disk
    except (OSError, subprocess.CalledProcessError):
        raise NotHere("no disk can be mounted here, even in a name space of its own") from None


def mount(options, *what):
    subprocess.run(["mount", "-o", options, *what], check=True)


@contextlib.contextmanager
def mounted(disk):
    """An empty disk with room for all."""
    mount("size=64m", "-t", "tmpfs", "tmpfs", str(disk))
    yield
    subprocess.run(["umount", str(disk)], check=True)


def used(disk):
    """Bytes that are taken of a disk."""
    state = os.statvfs(disk)
    return (state.f_blocks - state.f_bfree) * state.f_bsize


def leave_room(disk, room):
    """Let whole blocks of a disk be free, of so many bytes at most, but one block of an empty disk."""
    block = os.statvfs(disk).f_bsize
    size = max(used(disk) + int(room) // block * block, block)  # a tmpfs of size 0 would have no limit
    mount(f"remount,size={size}", str(disk))


def rooms(config, needed):
    """Bytes that are free on each disk; on the last one a block less than is needed."""
    shares = np.linspace(config.smallest, config.largest, config.sizes - 1)
    return [*(needed * shares), needed - 1]


def outcome(share, code, wrong):
    """(what came of a disk with room for this share, in words; what is wrong)."""
    return ("refused" if code else "had room"), [f"room for {share:.3f} of it: {line}" for line in wrong]


# ----------------------------------------------------------------------------- what is written
# Each part yields the outcome of each disk.

def try_save(config, folder):
    disk = own_disk(folder)
    one = OneSave(config.shards_dir or prepare_sample(folder / "shards"), folder)
    checkpoint = sum(facts["bytes"] for facts in one.right[AFTER].values())
    for room in rooms(config, checkpoint):
        with mounted(disk):
            copy = one.copy(below=disk)
            leave_room(disk, room)
            code = wait(fork(one.save, copy, AFTER))
            wrong = one.violations(copy, code)
            if leftovers(copy):
                wrong.append(f"{leftovers(copy)} stay")
            if (code == SUCCESS) != (newest_step(copy) == AFTER):
                wrong.append(f"exit code {code}, step {newest_step(copy)} loads")
            mount("remount,size=64m", str(disk))
            wrong += one.violations_of_the_next(copy)
        yield outcome(room / checkpoint, code, wrong)


def try_prepare(config, folder):
    disk = own_disk(folder)
    command = [sys.executable, "prepare/all.py", f"--only={config.dataset}", f"--limit={config.limit}",
               f"--raw_dir={Path(config.raw_dir).absolute()}", f"--shards_dir={disk}", "--workers=1"]
    target = disk / config.dataset

    def prepare():
        done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)
        return done.returncode, done.stdout

    with mounted(disk):
        code, text = prepare()
        if code:
            raise UserError(f"{' '.join(command)}: {text}")
        right, size = hashes(target), used(disk)
    # What no training reads, since it was not compared with the test splits
    not_compared = {name: digest for name, digest in right.items() if not name.endswith("leaks.json")}
    for room in rooms(config, size):
        with mounted(disk):
            leave_room(disk, room)
            code, text = prepare()
            wrong, there = [], {name: digest for name, digest in hashes(target).items()
                                if not name.endswith(".partial")}
            lines = [line for line in text.splitlines() if "o space left" in line]
            if code not in (SUCCESS, 1, USER_ERROR) or "Traceback" in text or len(lines) != bool(code):
                wrong.append(f"exit code {code}: ...{text[-300:]}")
            if there not in ((right,) if code == SUCCESS else ({}, right, not_compared)):
                wrong.append(f"exit code {code}, there is {sorted(there)}, or with other bytes")
            if others := sorted(path.name for path in disk.iterdir() if path != target):
                wrong.append(f"{others} stay")
            mount("remount,size=64m", str(disk))
            again, text = prepare()
            if again or hashes(target) != right or list(disk.iterdir()) != [target]:
                wrong.append(f"with room exit code {again}, {sorted(hashes(disk))}: ...{text[-300:]}")
        yield outcome(room / size, code, wrong)


def serve(asked):
    """
    The address of a server of CONTENT in this process, which knows ranges, and states a length only when
    asked for /stated; `asked` gets the byte at which each answer begins.
    """
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            start = int((self.headers["Range"] or "bytes=0-")[len("bytes="):-1])
            asked.append(start)
            self.send_response(206 if start else 200)
            self.send_header("ETag", "1")
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
            if self.path == "/stated":
                self.send_header("Content-Length", str(len(CONTENT) - start))
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # the client's disk is full
                self.wfile.write(CONTENT[start:])

        def log_message(self, *words):
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def fetch(url, path, crowded):
    """Download CONTENT; `crowded`: the room that there is at first is taken by others meanwhile."""
    os.environ["no_proxy"] = "*"
    download.PAUSE = 0
    if crowded:
        download.require_space = lambda name, folder, needed: None
    try:
        download.fetch(url, path, hashlib.sha256(CONTENT).hexdigest())
    except UserError as error:
        assert "\n" not in str(error)
        raise


def try_download(config, folder):
    disk, asked = own_disk(folder), []
    server, path = serve(asked), disk / "file.bin"
    partial = path.with_name(".file.bin.partial")
    for way in ("stated", "unstated", "crowded"):
        url = f"{server}/{'un' * (way == 'unstated')}stated"
        for room in rooms(config, len(CONTENT)):
            with mounted(disk):
                leave_room(disk, room)
                code = wait(fork(fetch, url, path, way == "crowded"))
                wrong = [] if code in (SUCCESS, USER_ERROR) else [f"exit code {code}"]
                if (path.read_bytes() if path.exists() else b"") != CONTENT * (code == SUCCESS):
                    wrong.append(f"exit code {code}, {'other bytes' if path.exists() else 'no file'}")
                mount("remount,size=64m", str(disk))
                arrived = partial.stat().st_size if partial.exists() else 0
                asked.clear()
                if again := wait(fork(fetch, url, path, False)):
                    wrong.append(f"with room exit code {again}")
                elif hashes(disk) != {"file.bin": hashlib.sha256(CONTENT).hexdigest()}:
                    wrong.append(f"with room {sorted(hashes(disk))}, or other bytes")
                if asked[:1] != [arrived] * (code != SUCCESS):
                    wrong.append(f"goes on at {asked}, while {arrived} bytes were there")
            yield outcome(room / len(CONTENT), code, [f"{way}: {line}" for line in wrong])


def main(config):
    try_parts({"save": try_save, "prepare": try_prepare, "download": try_download}, config, Path)


if __name__ == "__main__":
    run(main, parse_command_line(Config))
