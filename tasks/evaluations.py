"""
Evaluations on the disk: a folder each, in <run>/eval/ or where --out says, whole or not there at all.

    results.json             scores, what they stand on, the hash of each file of answers, a checksum
    predictions.jsonl        the model's answers, a line of JSON a question
    predictions_<row>.jsonl  those of the other rows of the table

Its name says checkpoint, dataset, split, and the flags that are not the usual ones. The same evaluation
again, of the same checkpoint, data and flags, takes the place of the former one, once it is whole; any
other gets a folder beside it, with a number behind its name where only the data or the run are others.
"""

import contextlib
import hashlib
import itertools
import json
import shutil
from dataclasses import fields, replace
from pathlib import Path

from plumbing.files import (checkpoints, hash_file, lock, manifest_checksum, read_manifest, require_writable, seeds_of,
                            sync)
from plumbing.flags import UserError
from tasks.splits import count_questions, show_images
from tasks.vqa import as_asked

RESULTS, REPLACED, PARTIAL = "results.json", ".replaced_", ".partial_"
IN_NAMES = {"limit": "first_{}", "blind": "blind_{}", "max_new_tokens": "{}_tokens",  # eval_vqa.py's flags, where
            "temperature": "temperature_{}", "top_k": "top_{}", "top_p": "p_{}", "seed": "seed_{}",  # they are not
            "dtype": "{}", "base_bits": "base_{}_bits"}  # as usual


def file_of(row):
    """The name of the file with the answers of a row of the table."""
    return "predictions.jsonl" if row == "model" else f"predictions_{row.replace(' ', '_')}.jsonl"


def encode(lines):
    """Lines of JSON, as bytes; half of a pair of surrogates, which is no text, stays as \\udxxx."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return text.encode(errors="backslashreplace")


def each_seed(config):
    """eval_vqa.py's Config itself, or one for each seed of train_vlm.py --seeds that its --run holds."""
    seeds = [] if checkpoints(config.run) else seeds_of(config.run)
    return [replace(config, run=str(seed), out=config.out and str(Path(config.out) / seed.name))
            for seed in seeds] or [config]


# ----------------------------------------------------------------------------- writing

def unusual_flags(config):
    """Those of eval_vqa.py's flags that change the numbers and are not as usual, {flag: value}."""
    usual = {item.name: item.default for item in fields(config)}
    return {flag: getattr(config, flag) for flag in IN_NAMES if getattr(config, flag) != usual[flag]}


def name_evaluation(checkpoint, shard, config):
    """The name of its folder: checkpoint, dataset, split, and each flag that is not as usual."""
    return "_".join([checkpoint.name, shard.folder.parent.name, shard.folder.name,
                     *(IN_NAMES[flag].format(value) for flag, value in unusual_flags(config).items())])


def lines_of(dataset, records, images, seen, answers, notes):
    """
    {row of the table: lines for its file}, dicts, one a question: its record, why it is not new to the run,
    where that is known, the answer, and what else there is to say about that.

    images: of each question the number of its first image, -1 for none; seen: as find_seen gives it; answers:
    {row: n texts}; notes: {row: n dicts}.
    """
    lines, first_name = {row: [] for row in answers}, {}
    for number, (record, image) in enumerate(zip(records, images)):
        line = {"dataset": dataset, **record}
        if image >= 0:
            line["image"] = first_name.setdefault(image, record["image"])  # one name for each image
        if not isinstance(seen, str):
            line["seen"] = seen[number]
        for row, texts in answers.items():
            lines[row].append({**line, "prediction": texts[number], **notes[row][number]})
    return lines


def place_of(out, name, stands_on):
    """
    The folder for an evaluation of this name: that of the same one, which it will replace, or the first
    that is free. stands_on: a dict of all that its numbers depend on.
    """
    for number in itertools.count(1):
        folder = Path(out) / (f"{name}_{number}" if number > 1 else name)
        former = folder if folder.exists() else folder.with_name(REPLACED + folder.name)
        if not former.exists() or (read_manifest(former, RESULTS) or {}).get("stands_on") == stands_on:
            return folder


def is_done(folder, stands_on, machine):
    """Whether a folder holds the whole evaluation of these facts, by this very code."""
    facts = read_manifest(folder, RESULTS) or {}
    return (facts.get("stands_on") == stands_on and facts["machine"]["commit"] == machine["commit"]
            and all((folder / name).is_file() and hash_file(folder / name) == file["sha256"]
                    for name, file in facts["predictions"].items()))


def require_room(out, needed):
    """Raise UserError unless so many bytes can be written to a folder, as far as can be known before."""
    require_writable(out, "out")
    if (free := shutil.disk_usage(out).free) < needed:
        raise UserError(f"{out}: room for {free:,} bytes, while the answers take {needed:,} and more; make "
                        "space, or name another place with --out=")


def require_answerable(shards, out, config):
    """Raise UserError where the lines of all answers do not fit into their place, were all answers empty."""
    needed = 0
    for shard in shards:
        count = count_questions(shard, config)
        rows = len(show_images(shard, count, config)) + 1
        needed += rows * len(encode({"dataset": shard.folder.parent.name, **as_asked(record), "prediction": ""}
                                    for record in shard.read_records()[:count]))
    require_room(out, needed)


def write_evaluation(folder, facts, lines):
    """
    Write an evaluation's folder whole or not at all: a former one stays until this one is on the disk.

    facts: a dict for results.json; lines: {row of the table: list of dicts}, one a question. Raises
    UserError where it cannot be written; all that was there stays.
    """
    out, partial = folder.parent, folder.with_name(PARTIAL + folder.name)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with lock(out / ".lock", "writing an evaluation", wait=True):
            tidy(out)
            partial.mkdir()
            contents = {file_of(row): encode(some) for row, some in lines.items()}
            facts = facts | {"predictions": {
                name: {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
                for name, text in contents.items()}}
            facts["checksum"] = manifest_checksum(facts)
            contents[RESULTS] = (json.dumps(facts, indent=2) + "\n").encode()
            for name, text in contents.items():
                (partial / name).write_bytes(text)
                sync(partial / name)
            sync(partial)
            if folder.exists():
                folder.rename(folder.with_name(REPLACED + folder.name))
            partial.rename(folder)
            sync(out)
            tidy(out)
    except OSError as error:
        with contextlib.suppress(OSError):  # else the next evaluation does it
            tidy(out)
        raise UserError(f"{folder}: not written ({error.strerror}), and these answers are lost, while former "
                        "evaluations stay; see to the disk, or name another place with --out=, then run it "
                        "again") from None


def tidy(out):
    """Remove what a killed process was writing or replacing; give a former evaluation its name back."""
    for former in out.glob(REPLACED + "*"):
        folder = out / former.name.removeprefix(REPLACED)
        if folder.exists():
            shutil.rmtree(former)
        else:
            former.rename(folder)
    for partial in out.glob(PARTIAL + "*"):
        shutil.rmtree(partial)


# ----------------------------------------------------------------------------- reading

def again(folder):
    """What to run where an evaluation cannot be used."""
    run = f" --run={folder.parent.parent}" if folder.parent.name == "eval" else ""
    return f"run `python eval_vqa.py{run}` again"


def read_evaluation(folder):
    """The dict of an evaluation's results.json. Raises UserError where it is damaged."""
    results = read_manifest(folder, RESULTS)
    if results is None or "predictions" not in results:
        raise UserError(f"{folder}/{RESULTS}: damaged, or of another version of this code; delete that folder and "
                        f"{again(folder)}")
    return results


def read_predictions(path):
    """
    The bytes of a file of answers. Raises UserError where it cannot be read and, beside a results.json,
    where it is not the file that is meant there.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a predictions.jsonl, or a run that eval_vqa.py "
                        "has evaluated") from None
    if (path.parent / RESULTS).exists():
        facts = read_evaluation(path.parent)["predictions"].get(path.name)
        if facts is None:
            raise UserError(f"{path}: not a part of the evaluation beside it; {again(path.parent)}")
        if facts["sha256"] != hashlib.sha256(content).hexdigest():
            raise UserError(f"{path}: damaged, or of another evaluation; {again(path.parent)}")
    return content


def find_evaluations(place):
    """
    The folders of the evaluations of a run, in a place that --out named, or one evaluation's own folder;
    newest first. Those that are damaged are among them.
    """
    place, folders = Path(place), []
    for path in [*place.glob("eval/*"), *place.glob("*")]:
        name = path.name.removeprefix(REPLACED)  # that a killed process was about to replace
        if (path / RESULTS).is_file() and (path.name[0] != "." or name != path.name
                                           and not path.with_name(name).exists()):
            folders.append(path)
    if not folders and (place / RESULTS).is_file():
        folders.append(place)
    return sorted(folders, key=lambda folder: (folder / RESULTS).stat().st_mtime_ns, reverse=True)


def choose_evaluations(place=""):
    """
    {"dataset/split": (folder, the dict of its results.json)} of the newest evaluation of each that has
    the model's own answers, all of the checkpoint that was evaluated last. place: as find_evaluations
    takes it; "": the run in out/ that was evaluated last. Raises UserError where there is none, and where
    one is damaged.
    """
    folders = find_evaluations(place) if place else sorted(
        (folder for run in Path("out").glob("*") for folder in find_evaluations(run)),
        key=lambda folder: (folder / RESULTS).stat().st_mtime_ns, reverse=True)
    chosen, checkpoint = {}, None
    for folder in folders:
        if not place and folder.parent != folders[0].parent:
            continue
        results = read_evaluation(folder)
        checkpoint = checkpoint or results["stands_on"]["checkpoint"]
        if results["stands_on"]["checkpoint"] == checkpoint and file_of("model") in results["predictions"]:
            chosen.setdefault(*results["results"], (folder, results))
    if not chosen:
        if place and (seeds := seeds_of(place)):
            raise UserError(f"{place}: runs of a seed each; name one, such as {seeds[0]}, or take all of them with "
                            f"`python eval_vqa.py --report=true --run={place}`")
        where = f"{place}: no predictions.jsonl of an evaluation here" if place else \
            "no predictions.jsonl in a run of out/"
        raise UserError(f"{where}; make one with `python eval_vqa.py{f' --run={place}' if place else ''}`")
    return chosen
