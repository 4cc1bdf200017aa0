"""
Images of one's own: the files below a folder, and the prepared dataset that a folder or a csv stands for.

prepare/folder.py makes that dataset; here it is found, and made by a command of its own where it is missing or
older than the images.
"""

import hmac
import os
import secrets
import subprocess
import sys
from pathlib import Path

from plumbing.files import read_manifest, write_whole
from plumbing.flags import UserError

TABLES = (".csv", ".tsv")
LISTS = (*TABLES, ".json", ".jsonl", ".ndjson")  # files that may list one's own images
SECRET, HASHED = ".patients.key", ".patients.csv"  # files in a folder of one's own: with what its patients are hashed,
# and which hash is whose; neither leaves it
OURS = (SECRET, HASHED)
PREPARE = Path(__file__).resolve().parent.parent / "prepare" / "all.py"


# ----------------------------------------------------------------------------- names and files

def clean(text):
    """Strip a text and collapse its whitespace; halves of surrogate pairs are no UTF-8: a "?"."""
    return " ".join(text.encode("utf-8", "replace").decode("utf-8").split())


def printable(text):
    """A text on one line, whatever it holds; in place of what moves a cursor stands a "?"."""
    text = clean(text)
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def written(name):
    """A file's name as UTF-8, its other bytes as backslashes and digits: no two names become one."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def files_below(folder, above=()):
    """Every file below a folder; links are followed, but not back to a folder that they lie in."""
    real = folder.resolve()
    for path in sorted(folder.iterdir()) if real not in above else ():
        if path.is_dir() and path.name[0] != ".":
            yield from files_below(path, (*above, real))
        else:  # a hidden folder counts as one file
            yield path


# ----------------------------------------------------------------------------- patients

def secret_of(path):
    """
    The secret by which patients of a folder or file are hashed: a file that stays in the folder, or beside the file,
    made where there is none. Raises UserError where it cannot be made.
    """
    place = (path if path.is_dir() else path.parent) / SECRET
    try:
        if not place.exists():
            write_whole(place, (secrets.token_hex(32) + "\n").encode())
        return place.read_bytes().strip()
    except OSError as error:
        raise UserError(f"{place}: patients are hashed with a secret in it, which cannot be read or made "
                        f"({error.strerror}); make the folder writable, or work on a copy") from None


def hash_id(secret, text):
    """What stands for the id of a patient or study, 16 hexadecimal digits: the same for the same, whatever its case."""
    return hmac.new(secret, text.casefold().encode("utf-8", "replace"), "sha256").hexdigest()[:16]


# ----------------------------------------------------------------------------- the dataset of a folder

def own_path(name):
    """The absolute path of a folder or csv, as its dataset's manifests have it after clean()."""
    return Path(os.path.abspath(os.path.expanduser(name)))


def origins(target):
    """Of each split of a dataset the path that it was made of; None: of no folder of one's own; "": damaged."""
    return [(read_manifest(split) or {"path": ""}).get("path") for split in sorted(target.glob("*"))]


def find_prepared(name, shards_dir):
    """
    The prepared dataset that a name means; None where it means a folder or csv of one's own, which is to be
    looked at each time. Says so where it could be either.
    """
    target = Path(shards_dir) / name
    if os.path.basename(name) != name or Path(name).suffix.lower() in LISTS:
        return None
    paths = origins(target)
    if not os.path.isdir(name):
        if any(paths):
            print(f"{name}: as it was prepared from {printable(max(filter(None, paths)))}; there is no folder of "
                  "that name here")
        return name
    if not target.is_dir() or set(paths) - {None}:
        return None
    print(f"{name}: the dataset that prepare/all.py made; write ./{name} for the folder of that name here")
    return name


def datasets_of(path, shards_dir):
    """The names of the datasets that were made of a folder or file, or of a table in the folder."""
    mine = clean(str(own_path(path)))
    made = {target.name: list(filter(None, origins(target))) for target in sorted(Path(shards_dir).glob("[!.]*"))}
    return [name for name, paths in made.items() if mine in paths] or [
        name for name, paths in made.items() if any(path.startswith(f"{mine}/") for path in paths)]


def only_dataset_of(path, shards_dir):
    """The one dataset that was made of a folder or file, "" where there is none. Raises UserError where several are."""
    names = datasets_of(path, shards_dir)
    older = {f"{name}_{mark[-8:]}" for name in names for mark in names}  # with a hash, from when the name was taken
    names = [name for name in names if name not in older] or names
    if len(names) > 1:
        raise UserError(f"{path}: several datasets were made of it, {', '.join(names)}; name one, as "
                        f"--dataset={names[0]}")
    return next(iter(names), "")


def prepare_own(path, shards_dir, image_size):
    """
    Have prepare/all.py bring the dataset of a folder or file up to date, by the flags that made it before, a process
    that says itself what it does. Returns the dataset's name. Raises UserError with the reason that it ends with.
    """
    before = only_dataset_of(path, shards_dir)
    flags = (read_manifest(Path(shards_dir) / before / "train") or {}).get("flags", []) if before else []
    command = [sys.executable, str(PREPARE), f"--own={path}", f"--shards_dir={shards_dir}",
               f"--image_size={image_size}", *flags]
    process, error = subprocess.Popen(command, stderr=subprocess.PIPE), b""
    while words := process.stderr.read1():  # its progress, passed on as it comes, or its last line
        progress, _, reason = (b"", b"", words) if error else words.partition(f"{PREPARE.name}: ".encode())
        error += reason
        sys.stderr.write(progress.decode("utf-8", "backslashreplace"))
        sys.stderr.flush()
    if process.wait():
        raise UserError(error.decode("utf-8", "backslashreplace").strip() or
                        f"{path}: prepare/all.py ended with exit code {process.returncode}")
    name = only_dataset_of(path, shards_dir)
    if not name:
        raise UserError(f"{path}: its dataset in {shards_dir} is gone; run the same command again")
    return name
