"""
Files that are whole or not there: syncing, manifests with hashes, sealed folders, and locks.

A checkpoint is a folder that `seal` has given its name: its manifest.json names every file with size and
SHA-256, and bears a checksum of its own. Whoever reads it asks `find_damage` first.
"""

import contextlib
import difflib
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from safetensors import SafetensorError

from plumbing.flags import UserError

TENSOR_HASHES = "tensors.json"  # in a hub folder that is used as it is: what plumbing.tensors.write_hashes wrote
TOKENIZERS = ("tokenizer.model", "tokenizer.json")  # SentencePiece's, as LLaMA's; the tokenizers library's

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


# ----------------------------------------------------------------------------- one file

def sync(path):
    """Bring a file or a folder's list of names to the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        if os.path.isdir(path) and os.access(path, os.R_OK):
            return  # Windows opens no folder, and keeps its names by itself
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EBADF:  # Windows: a file that is open for reading alone
            raise
        with open(path, "r+b") as file:
            os.fsync(file.fileno())
    finally:
        os.close(handle)


def write_whole(path, content):
    """Write bytes to a file that is, whatever happens, as before or as wanted."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def hash_file(path):
    """A file's SHA-256, in hexadecimal digits. path: a text, a Path, or what opens as one."""
    with open(path, "rb") if isinstance(path, (str, os.PathLike)) else path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(value):
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_settings(path):
    """The JSON object in a file that came with weights or an adapter. UserError where it holds none."""
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, or not JSON ({error})") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: no JSON object in it")
    return settings


def write_settings(path, settings):
    """Write a JSON object as read_settings reads it."""
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------- manifests

def manifest_checksum(manifest):
    """Hash of a manifest without its own "checksum" entry."""
    return hash_json({key: value for key, value in manifest.items() if key != "checksum"})


def read_manifest(folder, name="manifest.json"):
    """The manifest in a folder, or another file of that form; None where it is absent, cut short or altered."""
    try:
        manifest = json.loads((Path(folder) / name).read_text(encoding="utf-8"))
        return manifest if manifest["checksum"] == manifest_checksum(manifest) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def write_manifest(folder, name, facts):
    """Write facts, whole, into a file that read_manifest reads."""
    facts = facts | {"checksum": manifest_checksum(facts)}
    write_whole(Path(folder) / name, (json.dumps(facts, indent=2) + "\n").encode())


def differences(before, now, name=""):
    """
    What differs between two records of facts, nested dicts: a list of words such as "data.busi.images was
    20, now 80". Hashes are cut to 12 digits.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        return [words for key in sorted(before.keys() | now.keys(), key=str)
                for words in differences(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))]
    if before == now:
        return []

    def short(value):
        if isinstance(value, dict):
            return "there"
        text = "not there" if value is None else str(value)
        return text[:12] if len(text) == 64 else text[:80]

    return [f"{name} was {short(before)}, now {short(now)}"]


def sort_metadata(path):
    """
    Put the metadata of a safetensors file into order. safetensors writes several entries in any order, so
    that the same tensors would not have the same bytes.
    """
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(text) == size, path
        file.seek(8)
        file.write(text)


# ----------------------------------------------------------------------------- sealed folders

def seal(partial, folder, **facts):
    """
    Make the folder `partial` the checkpoint `folder`, whole or not at all: its manifest names every file
    with size and SHA-256, all of it is on the disk before the folder gets its name, and the name is on
    the disk when this returns. No name is given twice.
    """
    paths = sorted(partial.rglob("*"))
    files = {path.relative_to(partial).as_posix(): {"bytes": path.stat().st_size, "sha256": hash_file(path)}
             for path in paths if path.is_file()}
    manifest = {**facts, "name": folder.name, "files": files}
    manifest["checksum"] = manifest_checksum(manifest)
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    for path in filter(Path.is_file, paths):  # safetensors makes its files unreadable to others
        shutil.copymode(partial / "manifest.json", path)
    for path in [*paths, partial / "manifest.json", partial]:
        sync(path)
    if folder.exists():
        raise FileExistsError(errno.EEXIST, "there already", str(folder))
    partial.rename(folder)
    sync(folder.parent)


@contextlib.contextmanager
def sealed(folder, **facts):
    """A new folder to write into, which gets the name `folder` at the block's end, whole or not at all."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        seal(partial, folder, **facts)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{folder}: not saved: {error}; see to the disk, then the same command goes "
                        "on") from None


def find_damage(folder):
    """What is wrong with a checkpoint, in words; None if it is, byte for byte, what seal() saw."""
    folder, manifest = Path(folder), read_manifest(folder)
    if manifest is None or "name" not in manifest:
        return "manifest.json is missing or altered"
    if manifest["name"] != folder.name:
        return f"by its manifest.json it is {manifest['name']}"
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    if added := there - {"manifest.json", *manifest["files"]}:
        return f"{min(added)} was added"
    for name, facts in manifest["files"].items():
        path = folder / name
        try:
            if not path.is_file() or path.is_symlink():
                return f"{name} is missing"
            if path.stat().st_size != facts["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes instead of {facts['bytes']:,}"
            if hash_file(path) != facts["sha256"]:
                return f"{name} was altered"
        except OSError as error:  # a bad sector
            return f"{name} cannot be read: {error}"
    return None


def checkpoints(run):
    """The checkpoint folders of a run, newest first, whole or not."""
    folders = [path for path in Path(run).glob("step_*") if path.name[5:].isdecimal()]
    return sorted(folders, key=lambda path: int(path.name[5:]), reverse=True)


def seeds_of(folder):
    """The runs of train_vlm.py --seeds in a folder that have a checkpoint, in order of their seeds."""
    folders = [path for path in Path(folder).glob("seed_*") if path.name[5:].isdecimal() and checkpoints(path)]
    return sorted(folders, key=lambda path: int(path.name[5:]))


def newest_checkpoint(run):
    """
    The newest checkpoint of a run that is whole; of newer ones a line on stderr says what is wrong with
    them. Raises UserError when there is none.
    """
    folders = checkpoints(run)
    for folder in folders:
        damage = find_damage(folder)
        if damage is None:
            return folder
        print(f"{folder}: not used: {damage}", file=sys.stderr)
    if folders:
        raise UserError(f"{run}: none of its {len(folders)} checkpoints is whole, see above; start another run")
    raise UserError(f"{run}: no checkpoint here; run `python train_vlm.py --run={run}`")


def held_out_losses(run):
    """{checkpoint of a run: its held-out loss}, newest first, of those that were sealed with one."""
    losses = {folder: (read_manifest(folder) or {}).get("held_out_loss") for folder in checkpoints(run)}
    return {folder: loss for folder, loss in losses.items() if loss is not None}


def lowest_held_out_loss(run):
    return min(held_out_losses(run).values(), default=float("inf"))


def best_checkpoint(run):
    """The checkpoint of a run with the lowest held-out loss, of equals the newest; None where none has one."""
    losses = held_out_losses(run)
    return min(losses, key=losses.get, default=None)


def newest_run():
    """The run in out/, or a seed's, with the newest checkpoint. Raises UserError where there is none."""
    runs = sorted((path for place in ("*", "*/seed_*") for path in Path("out").glob(f"{place}/step_*")
                   if path.name[5:].isdecimal()), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError("no run in out/; run `python train_vlm.py`")
    return runs[-1].parent


def find_run(name="", checkpoint=""):
    """
    (folder of a train_vlm.py run, its newest whole checkpoint), or (folder, the checkpoint itself) where
    `name` is that of a checkpoint; "": the newest run in out/. checkpoint: "best" for that of the lowest
    held-out loss, or a name such as step_000500. Raises UserError, with the nearest name.
    """
    folder = Path(name) if name else newest_run()
    if folder.is_dir() and folder.name.startswith("step_") and folder.name[5:].isdecimal():
        if damage := find_damage(folder):
            raise UserError(f"{folder}: {damage}; --run={folder.parent} takes the newest that is whole")
        return folder.parent, folder
    if not folder.is_dir() and (near := nearest_run(folder)):
        raise UserError(f"{folder}: no such run; did you mean {near}?")
    if seeds := [] if checkpoints(folder) else seeds_of(folder):
        raise UserError(f"{folder}: holds {len(seeds)} runs, of a seed each; name one, such as --run={seeds[0]}")
    if checkpoint in ("", "newest"):
        return folder, newest_checkpoint(folder)
    chosen = best_checkpoint(folder) if checkpoint == "best" else folder / checkpoint
    if chosen is None or chosen not in checkpoints(folder):
        there = ", ".join(path.name for path in checkpoints(folder)) or "none"
        raise UserError(f"--checkpoint={checkpoint}: {folder} has {there}"
                        + "; none was saved with a held-out loss" * (checkpoint == "best"))
    if damage := find_damage(chosen):
        raise UserError(f"{chosen}: {damage}; leave --checkpoint out for the newest that is whole")
    return folder, chosen


def find_tokenizer(path):
    """The tokenizer's file that a path names: itself, or, of a folder's, LLaMA's before a chat model's."""
    path = Path(path)
    files = [path / name for name in TOKENIZERS] if path.is_dir() else [path]
    return next((file for file in files if file.is_file()), files[0])


def nearest_run(folder):
    """The run whose name is most like that of a folder that is not there, beside it or in out/; or None."""
    runs = {path.parent.parent.name: path.parent.parent for place in (Path(folder).parent, Path("out"))
            for path in place.glob("*/step_*/manifest.json")}
    near = difflib.get_close_matches(Path(folder).name, runs, n=1)
    return runs[near[0]] if near else None


# ----------------------------------------------------------------------------- places

def require_writable(folder, flag):
    """
    Make a folder, unless it is there, and raise UserError where no file can be made in it. flag: the
    name of the one that names another place.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror}); name another place with "
                        f"--{flag}=") from None


@contextlib.contextmanager
def lock(path, doing, wait=False):
    """
    Hold the lock file `path`, in a folder that is there, while the block runs. A process that ends,
    however, lets go of it. The file goes with the block; a killed process's stays, and does no harm.

    doing: what is being done, as in "preparing scans". wait: wait for another process that holds it,
    in place of raising UserError.
    """
    while True:
        with open(path, "a+b") as file:
            try:
                hold(file, fcntl.LOCK_EX | fcntl.LOCK_NB if fcntl else 0)
            except BlockingIOError:
                file.seek(0)
                other = file.read(100).decode("ascii", "replace") or "another process"
                if not wait:
                    raise UserError(f"{path.parent}: {other} is {doing} there already; wait for its end, or "
                                    "choose another place") from None
                print(f"waiting: {other} is {doing}", flush=True)
                hold(file, fcntl.LOCK_EX)
            if not is_at(file, path):  # the one that held it has removed it: another file is the lock now
                continue
            file.truncate(0)
            file.write(f"process {os.getpid()}".encode())
            file.flush()
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # Windows removes no file that is open
                    os.unlink(path)
            return


def is_at(file, path):
    """Whether an open file is the one that has this path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def hold(file, how):
    """flock, where there is such a thing."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        raise
    except OSError as error:  # some network file systems have no locks
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
            raise
        print(f"{file.name}: this file system has no locks ({error.strerror}); run one command at a time",
              file=sys.stderr)
