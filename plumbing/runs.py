"""
The folder of a training run: config.json (flags, what it stands on, versions), its tokenizer, log.jsonl, and
step_<n>/, its checkpoints. Each is sealed with the run's record, so that going on from it can be refused
where flags or inputs are others by then.
"""

import contextlib
import json
import shutil
import time
from dataclasses import asdict, fields
from pathlib import Path

from plumbing.devices import describe_machine
from plumbing.files import (TOKENIZERS, checkpoints, differences, find_run, hash_json, nearest_run, newest_checkpoint,
                            read_manifest, require_writable, seeds_of, sync, write_manifest, write_whole)
from plumbing.flags import UserError
from plumbing.pixels import resize_flags
from plumbing.sources import AUTO

FREE_ON_RESUME = {"workers", "recompute", "compile", "device", "resume", "run", "config", "log_every",
                  "evaluate_every", "save_every", "save_minutes", "keep", "shard", "rank_timeout", "wandb",
                  "shards_dir", "micro_batch_tokens"}  # flags of train_vlm.py that change no number; the last its
# rounding alone


def choose_folder(run, name, resume):
    """The folder of --run, else out/<name>_<date>; it is there when this returns."""
    folder = Path(run or Path("out") / f"{name}_{time.strftime('%Y%m%d_%H%M%S')}")
    if resume and not run:
        raise UserError("--resume=true: no run in out/; leave it out to start one")
    if (folder / "manifest.json").exists():
        raise UserError(f"--run={folder}: this is a checkpoint or a shard; a run is the folder that it lies in")
    if resume and not folder.exists():  # as when a scheduler gives the same command every time
        near = nearest_run(folder)
        print(f"{folder}: no run here yet, a new one begins" + f"; did you mean {near}?" * bool(near))
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    require_writable(folder, "run")
    for path in {folder, *new}:
        sync(path.absolute().parent)  # else a power cut may take the whole run along
    return folder


def choose_folders(run, name, resume, seeds):
    """
    The folders of as many runs as --seeds says: that of choose_folder, or seed_0, seed_1, ... in it; all of them are
    there when this returns. UserError where a run of the other kind lies there.
    """
    folder = choose_folder(run, name, resume)
    there = seeds_of(folder)
    if seeds == 1 and there:
        raise UserError(f"--run={folder}: holds {len(there)} runs of a seed each; add --seeds={len(there)}, or name "
                        f"one, such as --run={there[0]}")
    if seeds > 1 and checkpoints(folder):
        raise UserError(f"--run={folder}: holds a run already; leave --seeds out, or choose another --run")
    places = [folder / f"seed_{number}" for number in range(seeds)]
    return [choose_folder(place, "", False) for place in places] if seeds > 1 else [folder]


def open_run(folder, config, free=(), restated=()):
    """
    The checkpoint to go on from, or None. Flags have to be those of before, but for the `free`, and for the
    `restated` ones, of which the difference is printed. Raises UserError where a run must not go on.
    """
    if not checkpoints(folder):
        sweep(folder, None)
        return None  # also of a run that was stopped before its first checkpoint
    if not config.resume:
        raise UserError(f"{folder}: holds a run already; add --resume=true to go on with it, or "
                        "choose another --run")
    newest = newest_checkpoint(folder)
    manifest = read_manifest(newest)
    if manifest is None:
        raise UserError(f"{newest}: whole a moment ago, now not to be read; see to the disk, then try again")
    for item in fields(config):  # one that the run does not know came later, with a default that it had
        value, before = getattr(config, item.name), (AUTO | manifest["flags"]).get(item.name, item.default)
        if item.name in restated and before != value:
            print(f"{folder}: --{item.name} was {before}, is {value} from here on: the schedule is another one")
        elif item.name not in free and before != value:
            raise UserError(f"--{item.name}={value}: the run in {folder} has {before}; resume it with "
                            "the flags it was started with")
    sweep(folder, newest)
    return newest


def describe_run(config, mixture, image, tokenizer, model, device):
    """
    What config.json and each checkpoint's manifest say of the run: its flags, its inputs, which are the
    same whenever it goes on, the test splits that its data were compared with, and the machine. image: what
    image_settings says.
    """
    data, tests = {}, {}
    for shard, (leaks, numbers) in zip(mixture.shards, mixture.leaks):
        name = shard.folder.parent.name
        data[name] = {**shard.describe(), "leaks": leaks, "leaked": len(numbers),
                      "leaked_sha256": hash_json(numbers.tolist())}
        tests[name] = read_manifest(shard.folder, "leaks.json")["tests"]
    return {"flags": asdict(config), "tests": tests, "machine": describe_machine(device),
            "image": image, "inputs": {"data": data, "tokenizer": tokenizer.sha256, "weights": model.hashes},
            **({"system": tokenizer.system} if tokenizer.system else {})}


def learnt_before(start):
    """
    {"before": {"data", "tests"}} for the record of a run that begins with another one: what that run, and those
    that it began with, were trained on; {} where `start` names no run.
    """
    if not (start and (checkpoints(start) or read_manifest(start))):  # none, an adapter, or a hub's folder
        return {}
    record = read_manifest(find_run(start)[1])
    earlier = record.get("before", {"data": {}, "tests": {}})
    return {"before": {"data": earlier["data"] | record["inputs"]["data"], "tests": earlier["tests"] | record["tests"]}}


def image_settings(shards):
    """
    How the images of a run's shards were stored. UserError where that differs: nobody could say how a new image is
    to be brought to size, or which test splits are like them. Shards without images count for nothing.
    """
    own = [shard for shard in shards if len(shard.image_index)] or shards[:1]
    settings = [resize_flags(shard.manifest["image"]) for shard in own]
    for shard, flags in zip(own, settings):
        if flags != settings[0]:
            raise UserError(f"--data: {shard.folder} has images made by {flags}, {own[0].folder} by {settings[0]}; "
                            "prepare one as the other: "
                            f"`python prepare/all.py --only={shard.folder.parent.name} {settings[0]}`")
    return own[0].manifest["image"]


def sweep(folder, newest):
    """Remove what a killed run was writing or removing; set aside what is damaged: its step comes again."""
    for leftover in [*folder.glob(".step_*.partial"), *folder.glob("removed_step_*")]:
        shutil.rmtree(leftover)
    for damaged in checkpoints(folder)[:checkpoints(folder).index(newest)] if newest else []:
        damaged.rename(folder / f"damaged_{time.time_ns()}_{damaged.name}")


def require_same_inputs(checkpoint, inputs):
    """The record that a checkpoint was sealed with. Raises UserError where its inputs are others by now."""
    record = read_manifest(checkpoint)
    if "inputs" not in record:
        raise UserError(f"{checkpoint}: saved before runs recorded what they were trained on, so that nobody "
                        "knows whether these are the same data; start another --run")
    if changes := differences(record["inputs"], inputs):
        more = f", and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise UserError(f"{checkpoint.parent}: cannot go on, since it stands on other inputs: "
                        f"{'; '.join(changes[:3])}{more}; bring those back, or start another --run")
    return {name: fact for name, fact in record.items()
            if name not in ("checksum", "files", "name", "step", "held_out_loss")}


def write_run(folder, record, tokenizer, checkpoint):
    """What a run's folder holds beside its checkpoints and its log: as at the start, but for restated flags."""
    for name in TOKENIZERS:  # one of the other kind is of a run that was stopped before its first checkpoint
        if name != tokenizer.path.name:
            (folder / name).unlink(missing_ok=True)
    write_whole(folder / tokenizer.path.name, tokenizer.path.read_bytes())
    if checkpoint is None or (read_manifest(folder, "config.json") or {}).get("flags") != record["flags"]:
        write_manifest(folder, "config.json", record)


def open_log(folder, first, wandb_settings=None):
    """
    A function that appends an entry to log.jsonl and, with wandb_settings, to Weights & Biases. Entries
    behind step `first`, which a killed run left, are dropped: those steps come again.
    """
    path, lines = folder / "log.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # the last line may be torn
            lines += [line + "\n"] if first and json.loads(line)["step"] <= first else []
    write_whole(path, "".join(lines).encode())
    log = open(path, "a", encoding="utf-8")
    if wandb_settings:
        try:
            import wandb
        except ImportError:
            raise UserError("--wandb=true: run `pip install wandb` first") from None
        wandb.init(project="nanomedq", name=folder.name, config=wandb_settings, dir=str(folder), reinit=True)

    def write_log(entry):
        log.write(json.dumps(entry) + "\n")
        log.flush()
        if wandb_settings:
            wandb.log(entry, step=entry["step"])

    return write_log
