"""
Splits and folds of one's own data by patient, and the hashes that stand for patients in what is written.
"""

import csv
import io
import re
from collections import Counter, defaultdict

from plumbing.files import write_whole
from plumbing.flags import UserError
from plumbing.own import HASHED, hash_id, printable, secret_of
from prepare.classify import split_by_group

SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}
LEAST_ID = 4  # letters of an id that is looked for within a part of a path: a shorter one is in many


# ----------------------------------------------------------------------------- patients

def hash_names(path, names):
    """Of each patient or study the hash, by the secret of this folder or file; "" for "", which is no one."""
    if not any(names):
        return list(names)
    secret = secret_of(path)
    hashes = [name and hash_id(secret, name) for name in names]
    keep_hashes(path, dict(zip(hashes, names)))
    return hashes


def keep_hashes(path, names):
    """Note in a folder, or beside a file, {hash: whose it is}: with it what a model says leads back to a patient."""
    place = (path if path.is_dir() else path.parent) / HASHED
    known = dict(csv.reader(io.StringIO(place.read_text("utf-8"), newline=""))) if place.is_file() else {}
    rows = {"hash": "name"} | known | {hashed: printable(name) for hashed, name in names.items() if hashed}
    if rows != known:
        text = io.StringIO(newline="")
        csv.writer(text).writerows(rows.items())
        write_whole(place, text.getvalue().encode("utf-8", "backslashreplace"))


def group_names(path, patients):
    """Of each patient the name of its group in a shard, "patient <hash>"; "" where none is named."""
    return [hashed and f"patient {hashed}" for hashed in hash_names(path, patients)]


def several_of(names, headers):
    """{patient of headers: its names} of those that have several names in a table or as folders; "" is no name."""
    found = defaultdict(dict)
    for name, header in zip(names, headers):
        if name and header:
            found[header].setdefault(name.casefold(), name)
    return {header: list(some.values()) for header, some in found.items() if len(some) > 1}


def complete_names(names, headers, notes):
    """
    A table's names of patients, and where a cell is empty the name that the same header has in other rows, else the
    header's own. Says where a header has several names, as the table's count, and where zeros alone tell two apart.
    """
    zeros = several_of(names, [re.sub(r"(?<!\d)0+(?=\d)", "", name).casefold() for name in names])
    notes += [f"{len(zeros):,} patients have names that differ in zeros before them alone, "
              f"{' and '.join(map(printable, next(iter(zeros.values()))[:2])):.80} the first: they count as several; "
              "where they are one, give them one name"] if zeros else []
    several, of = several_of(names, headers), {}
    if len(set(headers) - {""}) > 1:  # else it is what programs write that take names out
        of = {header: name for name, header in zip(names, headers) if name and header and header not in several}
        notes += [f"{len(several):,} patients of headers have several names in the table, "
                  f"{' and '.join(map(printable, next(iter(several.values()))[:2])):.80} the first: they count as "
                  "several patients; where they are one, give them one name"] if several else []
    return [name or of.get(header, header) for name, header in zip(names, headers)]


def hide(name, patient, hashed):
    """
    A picture's name or path with the hash in place of the patient's id, where a part of it, between slashes, _ or -, is
    the id, or has it within, if that is of LEAST_ID letters or more.
    """
    if not patient:
        return name
    ending = r"(?=$|[/\\\s_-]|\.[a-z][\w.]*(?:\s|$))"
    within = re.escape(patient) if len(patient) >= LEAST_ID else rf"(?<![^/\\_-]){re.escape(patient)}{ending}"
    return re.sub(within, hashed, name, flags=re.I)


# ----------------------------------------------------------------------------- splits

def require_whole(path, groups, splits):
    """Raise UserError where splits that are given divide a patient or study, or are not given to all."""
    lost = sum(not split for split in splits)
    if lost:
        raise UserError(f"{path}: {lost:,} of {len(splits):,} samples are of none of train, validation and test, "
                        "though others are; give them a split, or give none and one is made")
    odd = next((split for split in splits if split not in SHARES), "")
    if odd:
        raise UserError(f"{path}: split {odd!r:.80} is none of train, validation and test; rename it, or give none "
                        "and one is made")
    places = {}
    for number, (group, split) in enumerate(zip(groups, splits), 1):
        before, first = places.setdefault(group, (split, number))
        if before != split and group.startswith(("patient ", "study ")):
            kind, _, name = group.partition(" ")
            raise UserError(f"{path}: {kind} {printable(name):.80} is in {before} (sample {first:,}) and in {split} "
                            f"(sample {number:,}); keep each to one, or give no split, and one is made by patient")


def divide(path, groups, labels, splits, folds=0, fold=0):
    """
    The split of each sample. groups: a name for each, such as its patient, which is never divided; labels: a tuple
    for each, whose shares are evened out; splits: the given ones, "" where none is, which are kept; else 70 : 10 : 20
    by group, or of `folds` equal parts the one numbered `fold` to test with, the others to train on. Raises UserError.
    """
    if any(splits):
        if folds:
            raise UserError(f"{path}: it gives a split, and --folds makes others; leave one of them out")
        require_whole(path, groups, splits)
        return list(splits)
    if folds:
        parts = split_by_group(groups, labels, {str(part): 1 / folds for part in range(folds)})
        if len(set(parts)) < folds:
            raise UserError(f"{path}: {len(set(groups)):,} patients or groups are too few for --folds={folds}; give "
                            f"--folds={max(len(set(groups)), 2)} or fewer")
        return ["test" if part == str(fold) else "train" for part in parts]
    made = split_by_group(groups, labels, SHARES)
    counts = Counter(made)
    if not counts["train"] or not counts["test"]:
        raise UserError(f"{path}: {len(made):,} samples of {len(set(groups)):,} patients or groups are too few to "
                        "divide; bring more, or give a split")
    return made


def fold_targets(name, folds, fold):
    """[(name of a dataset, number of its fold)] to prepare: all folds, or the one asked for; none: [(name, None)]."""
    if not folds:
        return [(name, None)]
    return [(f"{name}_fold_{number}_of_{folds}", number) for number in range(folds) if fold in (-1, number)]
