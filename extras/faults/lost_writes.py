"""
Take the power away, on paper: every state that a disk could be in at any moment of a run, and what of
it loads.

    python extras/faults/lost_writes.py            needs strace

SIGKILL loses nothing that was written; a power cut does. So a run of three saves, resumed before the
last, which prunes, is logged call by call, and replayed on a model of a disk that keeps what was
synced, and of the rest what it likes: after each call any folder's list of names may be as it was
after any earlier call since its last fsync, and what a file has got since its last fsync may be there,
or absent, zeros of the same length, or cut in half, for all files or for one of them. Each state
is built and the run goes on in it. What a save had returned for has to load, or its successor; and
the log knows every step up to there. It is a model: what real file systems and drives do beyond it, it
does not tell.

It found that a new run's own folder could be lost, with all checkpoints in it, since the folder above
was never synced, and that the log could lack steps that the checkpoint has. Both are mended, and none
of 9,540 states is left in which a wrong checkpoint, or none, would be loaded.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import contextlib
import functools
import hashlib
import io
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field

from extras.bench.progress import Progress
from extras.faults.calls import traced
from extras.faults.kill import read_losses
from extras.faults.tiny import (OS_ERROR, SUCCESS, conclude, contents, flags, fork, leftovers, prepare, shrink,
                                train_vlm, wait)
from plumbing.flags import UserError, parse_command_line, run
from plumbing.runs import open_run

STEPS = 3  # each saved; with --keep=2 the last save removes the first checkpoint
CALLS = ("openat,open,creat,write,pwrite64,writev,ftruncate,truncate,fsync,fdatasync,sync_file_range,"
         "rename,renameat,renameat2,mkdir,mkdirat,unlink,unlinkat,rmdir,link,linkat,symlink,symlinkat,"
         "copy_file_range,sendfile,fallocate,readlink,lseek")
UNREAD = re.compile(r"/(\.step_\d+\.partial|removed_.*)/")
RETURNED = "/returned/"  # a link that is asked for, in vain, whenever a save has returned


@dataclass(frozen=True)
class Config:
    unfinished: bool = True  # also all states that differ in .*.partial and removed_* alone, swept unread
    shards_dir: str = ""  # of the sample at 32 pixels; none: they are prepared first


@dataclass(eq=False)
class File:
    now: bytes = b""
    synced: bytes = b""


@dataclass(eq=False)
class Folder:
    now: dict = field(default_factory=dict)  # name -> File or Folder
    past: list = field(default_factory=lambda: [{}])  # what `now` was, from the last fsync on


class Disk:
    """Files and folders below `root` as system calls leave them, with what is surely on the disk."""

    def __init__(self, root):
        self.top, self.root = Folder(), str(root)
        self.places = {}  # path of an open file -> where in it the next write goes; not there: its end

    def find(self, path):
        node = self.top
        for name in Path(path).relative_to(self.root).parts:
            node = node.now[name]
        return node

    def put(self, path, node):
        """Enter a node into its folder under a name, or with None take the name out."""
        folder, name = self.find(Path(path).parent), Path(path).name
        folder.past.append(dict(folder.now))
        folder.now.pop(name, None)
        if node is not None:
            folder.now[name] = node

    def replay(self, name, words, result):
        """Do what one line of the log says; False where that is nothing to a disk."""
        if name == "openat":
            self.places.pop(words[1], None)
            if "O_CREAT" in words[2] and Path(words[1]).name not in self.find(Path(words[1]).parent).now:
                self.put(words[1], File())
            elif "O_TRUNC" in words[2]:
                self.find(words[1]).now = b""
            else:
                return False
        elif name == "write":
            file = self.find(words[0])
            at = self.places.get(words[0], len(file.now))
            file.now = file.now[:at] + words[1] + file.now[at + len(words[1]):]
            if words[0] in self.places:
                self.places[words[0]] += len(words[1])
        elif name == "lseek":
            self.places[words[0]] = result
            return False
        elif name == "ftruncate":
            return False  # to the length that the following writes fill: zeros are among what is tried
        elif name == "fsync":
            node = self.find(words[0])
            if isinstance(node, File):
                node.synced = node.now
            else:
                node.past = [dict(node.now)]
        elif name in ("rename", "renameat"):
            source, target = words if name == "rename" else words[1::2]
            node = self.find(source)
            before, after = self.find(Path(source).parent), self.find(Path(target).parent)
            assert before is after, "a name that moves between folders is not modelled"
            before.past.append(dict(before.now))
            del before.now[Path(source).name]
            before.now[Path(target).name] = node
        elif name == "mkdir":
            self.put(words[0], Folder())
        elif name in ("unlink", "rmdir"):
            self.put(words[0], None)
        elif name == "unlinkat":
            self.put(f"{words[0]}/{words[1]}", None)
        else:
            raise UserError(f"the system call {name} is not modelled")
        return True

    def folders(self):
        folders = [self.top]
        for folder in folders:
            for names in [folder.now, *folder.past]:
                folders += [node for node in names.values()
                            if isinstance(node, Folder) and node not in folders]
        return folders

    def name_states(self):
        """{folder: its names} for each way in which lists of names may lag behind."""
        folders = self.folders()
        for others in (lambda folder: folder.now, lambda folder: folder.past[0]):
            yield {folder: others(folder) for folder in folders}
            for lagging in folders:
                for names in lagging.past + [lagging.now]:
                    yield {folder: names if folder is lagging else others(folder) for folder in folders}

    def content_states(self):
        """{file: its content} of files that may not be what they are now."""
        unsure = {node for folder in self.folders() for names in [folder.now, *folder.past]
                  for node in names.values() if isinstance(node, File) and node.now != node.synced}
        yield {}
        for harm in (lambda new: b"", lambda new: bytes(len(new)), lambda new: new[:len(new) // 2]):
            harmed = {}
            for file in unsure:
                surely = file.synced if file.now.startswith(file.synced) else b""
                harmed[file] = surely + harm(file.now[len(surely):])
            yield harmed
            for file in unsure if len(unsure) > 1 else []:
                yield {file: harmed[file]}
                yield harmed | {file: file.now}

    def states(self):
        """{path: content, or None for a folder} of each state that a crash may leave right now."""
        contents = list(self.content_states())
        for names in self.name_states():
            tree, walk = {}, [(self.top, "")]
            for folder, prefix in walk:
                for name, node in names[folder].items():
                    tree[prefix + name] = node
                    if isinstance(node, Folder):
                        walk.append((node, f"{prefix}{name}/"))
            for harmed in contents:
                yield {path: harmed.get(node, node.now) if isinstance(node, File) else None
                       for path, node in tree.items()}


def parse(line):
    """(name, words, result) of a line of strace -y -xx: paths of handles and strings, as they are."""
    if not (call := re.fullmatch(r"(\w+)\((.*)\) += (-?\d+).*", line)):
        return None
    words = []
    for word in call[2].split(", "):
        if handle := re.fullmatch(r"(?:\d+|AT_FDCWD)<(.*)>", word):
            words.append(re.sub(r"\\x(..)", lambda byte: chr(int(byte[1], 16)), handle[1]))
        elif word.startswith('"'):
            content = bytes.fromhex(word.strip('"').replace("\\x", ""))
            words.append(content if call[1] == "write" else content.decode())
        else:
            words.append(word)
    return call[1], words, int(call[3])


def train(config, last):
    """Train, with each save that returns told to strace; the one of step `last` is the end."""
    save = train_vlm.save_checkpoint

    def save_and_tell(folder, step, *rest):
        save(folder, step, *rest)
        with contextlib.suppress(OSError):
            os.readlink(f"{RETURNED}{step}")
        if step == last:
            raise OSError

    train_vlm.save_checkpoint = save_and_tell
    train_vlm.main(config)


class Builder:
    """Builds states as folders, of links to files that are written once."""

    def __init__(self, folder):
        self.blobs, self.root = folder / "blobs", folder / "root"
        self.blobs.mkdir()
        self.digest = functools.lru_cache(maxsize=None)(self.digest)

    def digest(self, content):
        digest = hashlib.sha256(content).hexdigest()
        (self.blobs / digest).write_bytes(content)
        return digest

    def build(self, state):
        shutil.rmtree(self.root)
        self.root.mkdir()
        for path, digest in state:
            if digest is None:
                (self.root / path).mkdir()
            else:
                os.link(self.blobs / digest, self.root / path)


def violations(config, run, returned, right):
    """What is wrong, in words, when a run goes on in such a state; which step it goes on from."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            newest = open_run(Path(config.run), config, train_vlm.FREE_ON_RESUME)
    except (UserError, OSError) as error:
        return [f"{error}"], None
    step = int(newest.name[5:]) if newest else 0
    if step not in (returned, returned + 1):
        return [f"step {step} is loaded"], step
    if step and contents(run, step) != right[step]:
        return [f"step {step} is loaded, with other bytes than it should have"], step
    wrong = [f"{leftovers(run)} stay"] if leftovers(run) else []
    logged = [number for number, _ in read_losses(run) if number <= step]
    if logged != list(range(1, step + 1)):
        wrong.append(f"step {step} is loaded, while the log has steps {logged}")
    return wrong, step


def crash_states(lines, disk, digest, config):
    """
    Replay the lines of a log. Yields (how many calls there were, a state that a crash may leave then, as
    ((path, digest of its content), ...), how many saves had returned, the call), each state once.
    """
    returned, number, seen = 0, 0, set()
    for name, words, result in filter(None, map(parse, lines)):
        if name == "readlink" and words[0].startswith(RETURNED):
            returned = int(words[0].removeprefix(RETURNED))
        elif not any(f"{word}/".startswith(f"{disk.root}/") for word in words) or result < 0 \
                or not disk.replay(name, words, result):
            continue
        number += 1
        for state in disk.states():
            state = tuple(sorted((path, content if content is None else digest(content))
                                 for path, content in state.items()
                                 if config.unfinished or not UNREAD.search(path)))
            if (state, returned) not in seen:
                seen.add((state, returned))
                yield number, state, returned, f"{name} {words[0]}"


def main(config):
    shrink()
    begin, wrong, loaded = time.perf_counter(), [], Counter()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve()
        shards = config.shards_dir or prepare(folder / "shards")
        root, log, builder = folder / "root", folder / "strace.log", Builder(folder)
        root.mkdir()
        settings = dict(max_steps=STEPS, save_every=1, held_out=0)
        if wait(fork(train_vlm.main, flags(shards, folder / "kept", **settings, keep=STEPS))) != SUCCESS:
            raise UserError("the undisturbed run failed")
        right = {step: contents(folder / "kept", step) for step in range(1, STEPS + 1)}
        flagged = flags(shards, root / "out/run", **settings)
        options = ["-y", "-xx", "-s", "100000000", "-e", f"trace={CALLS}"]
        lines = []
        for last in (STEPS - 1, STEPS):  # the second time it is resumed
            if traced(log, options, train, flagged, last) != OS_ERROR:
                raise UserError("the undisturbed run failed under strace")
            lines += log.read_text().splitlines()
        progress = Progress(0, "states", pause=10)
        for number, state, returned, after in crash_states(lines, Disk(root), builder.digest, config):
            builder.build(state)
            problems, step = violations(flagged, root / "out/run", returned, right)
            loaded["none" if step is None else step - returned] += 1
            wrong += [f"after {returned} saves and {after}: {line}" for line in problems]
            progress.row(f"after {returned} saves and {after}")
            if len(wrong) >= 20:  # enough to know
                break
    print(f"{number} calls of a run with {STEPS} saves change the disk or end a save: {loaded.total()} "
          f"states that a crash may leave, in {time.perf_counter() - begin:.0f} s")
    print(f"the checkpoint that was saved last loads in {loaded[0]}, the next one in {loaded[1]}")
    conclude(wrong)


if __name__ == "__main__":
    run(main, parse_command_line(Config))
