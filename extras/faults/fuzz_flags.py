"""
Give every script odd values for its flags, one at a time and in pairs: it works, or says in one line why
not, with exit code 2.

    python extras/faults/fuzz_flags.py --cases=2000

A value is drawn for one or two flags of a command that otherwise runs in a second or two on a tiny
sample. The command is the real main of its script, from the command line on, in a process forked for it
inside a folder of its own. What counts as a violation: a traceback, another exit code than 0 and 2 (1
of prepare/all.py, where a dataset failed, and 128 + 15 where a run was told to stop), more than one
line of error, and a command that is still at work after --patience seconds, unless what it was given
may be long work, such as a million epochs: that is stopped after 20 seconds.

2,000 commands found one fault, ten times: `--limit=--`, for whatever flag, was a traceback (argparse takes
the two dashes away). It is mended.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import functools
import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, fields

import prepare.all
from extras.faults import tiny
from plumbing.flags import Count, UserError, Whole, parse_command_line, run, type_of

ODD = ["", " ", "0", "-1", "1", "2", "3.5", "0.5", "-0.5", "nan", "inf", "-inf", "1e9", "1e-9", "1e400", "1_0", "0x10",
       str(2 ** 31 - 1), str(2 ** 31), str(2 ** 63), str(-2 ** 63), "9" * 5000, "true", "FALSE", "maybe", "none",
       "auto", "x" * 300, "x/" * 3000, "a\nb", "é", "\udcff", "%s%n", "{}", "$(id)", "--", "-", "~", ".",
       "..", "/dev/null", "/proc/self", "file", "dangling", "missing/a/b", "run", "run/step_000001", "own", "own.csv",
       "a,b", ",", "a:", ":1", "sample", "sample:0", "sample:2", "sample,sample", "sample:nan", "sample:1e9",
       "sample:-1", "cpu", "cuda", "cuda:7", "mps", "tpu", "q_proj", "q_proj,", "lm_head", "full", "lora", "frozen",
       "float16", "bfloat16", "float32", "both", "shuffle", "test", "train", "validation"]
PLAIN = {int: ["0", "1", "2", "3", "7"], float: ["0", "1e-3", "0.5", "1", "2"], bool: ["true", "false"],
         str: ["sample", "run", "own", "file", "new/a", "scratch", "test", "none", "q_proj"]}  # more often sound
LONG = {"epochs", "max_steps", "seeds", "image_size", "batch_size", "max_length", "lora_r", "workers", "only",
        "max_new_tokens", "questions_per_image", "patience", "save_every", "model", "encoder", "held_out", "question"}
COMMANDS = {  # script -> its module and the flags of a short run
    "train_vlm.py": (tiny.train_vlm, dict(
        data="sample", shards_dir="shards", model="sample", language="full", max_length=256, micro_batch_tokens=512,
        batch_size=4, held_out=4, max_steps=1, workers=1, device="cpu", run="new")),
    "train_cls.py": (tiny.load_script("train_cls.py"), dict(
        dataset="sample", shards_dir="shards", encoder="scratch", model="sample", epochs=1, device="cpu", out="cls")),
    "eval_vqa.py": (tiny.load_script("eval_vqa.py"), dict(
        run="run", data="sample", shards_dir="shards", limit=4, max_new_tokens=2, device="cpu")),
    "extras/share/export.py": (tiny.load_script("extras/share/export.py"), dict(run="run", folder="exported")),
    "prepare/all.py": (prepare.all, dict(only="sample", limit=2, image_size=32, shards_dir="prepared", workers=1,
                                         raw_dir="raw", weights_dir="weights"))}


@dataclass(frozen=True)
class Config:
    cases: Count = 2000  # commands
    patience: Count = 180  # seconds that one of them may take
    seed: Whole = 0  # of the flags and values
    only: str = ""  # one script, such as train_cls.py; none: all in turn


def draw_command(draw, script):
    """{flag: text} of a short run with one or two odd values in it, and the flags that have them."""
    module, settings = COMMANDS[script]
    items = draw.sample(fields(module.Config), draw.choice((1, 1, 2)))
    words = {name: str(value) for name, value in settings.items()}
    for item in items:
        kind, choices, _ = type_of(item)
        values = draw.choice((ODD, choices or PLAIN[kind]))
        words[item.name] = draw.choice([value for value in values if (item.name, value) not in NEVER])
    return words, [item.name for item in items]


# What would leave the folder, or fetch every dataset there is
NEVER = {(name, value) for name in ("run", "out", "folder", "shards_dir", "raw_dir", "weights_dir")
         for value in ("..", "~")} | {("only", value) for value in ("", " ", ",")}


def call(script, words, folder):
    """Run a script's main as from the command line, in a folder."""
    os.chdir(folder)
    module, sys.argv = COMMANDS[script][0], [script, *(f"--{name}={value}" for name, value in words.items())]
    if module is prepare.all:  # its workers begin with the script that started them: not with this one
        os.execv(sys.executable, [sys.executable, str(tiny.ROOT / script), *sys.argv[1:]])
    run(module.main, parse_command_line(module.Config))


def start(script, words, folder, log):
    """The process id of a command in a folder; the file `log` gets what it says."""
    return tiny.start(functools.partial(call, script, words, folder), log, log)


def try_command(script, words, folder, patience):
    """(exit code or None, what it printed) of a command in a folder, which it may take `patience` seconds for."""
    log = folder / "said"
    child = start(script, words, folder, log)
    deadline, timeout = time.monotonic() + patience, False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return (None if timeout else os.waitstatus_to_exitcode(status)), log.read_text(errors="replace")
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            timeout = True
        time.sleep(0.01)


def find_fault(script, code, text, odd, words):
    """What is wrong with how a command ended, in words, or ""."""
    if code is None:
        return "" if LONG & set(odd) else "still at work"
    if "Traceback" in text:
        return "traceback: " + text.strip().splitlines()[-1]
    if code not in (0, 2) and not (script == "prepare/all.py" and code == 1):
        return f"exit code {code}"
    errors = re.findall(rf"^{Path(script).name}: .*", text, re.M)
    if code == 2 and len(errors) != 1:
        return f"{len(errors)} lines of error"
    return ""


def make_place(folder, **changes):
    """
    Make a folder with a prepared sample, a run trained on it, its flags changed so, and some files and
    folders that flags may name; return it.
    """
    folder.mkdir()
    shards = tiny.prepare(folder / "shards", limit=400)  # 11 images of each class
    settings = dict(COMMANDS["train_vlm.py"][1], run=str(folder / "run"), shards_dir=str(shards)) | changes
    if tiny.wait(tiny.fork(tiny.train_vlm.main, tiny.train_vlm.Config(**settings))):
        raise UserError("the run that the commands are about failed")
    (folder / "file").write_text("a file")
    (folder / "dangling").symlink_to("nowhere/at/all")
    (folder / "own/a").mkdir(parents=True)
    (folder / "own.csv").write_text("path,label\nfile,a\n")
    return folder


def main(config):
    tiny.shrink()
    os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nothing is fetched
    draw, begin, ends, faults = random.Random(config.seed), time.perf_counter(), Counter(), []
    scripts = [config.only] if config.only else list(COMMANDS)
    if not set(scripts) <= COMMANDS.keys():
        raise UserError(f"--only={config.only}: one of {', '.join(COMMANDS)}")
    with tempfile.TemporaryDirectory() as folder:
        place = make_place(Path(folder) / "place")
        for number in range(config.cases):
            script = scripts[number % len(scripts)]
            words, odd = draw_command(draw, script)
            here = Path(shutil.copytree(place, Path(folder) / "here", symlinks=True))
            patience = min(20, config.patience) if LONG & set(odd) else config.patience
            code, text = try_command(script, words, here, patience)
            shutil.rmtree(here)
            ends["at work" if code is None else code] += 1
            if fault := find_fault(script, code, text, odd, words):
                faults.append(f"{script} {' '.join(f'--{name}={words[name]!r:.60}' for name in odd)}: {fault:.200}")
                print(faults[-1], flush=True)
            if (number + 1) % 100 == 0:
                print(f"{number + 1:,} of {config.cases:,} commands, {time.perf_counter() - begin:.0f} s, "
                      f"{len(faults)} violations", flush=True)
    print(f"{config.cases:,} commands in {time.perf_counter() - begin:.0f} s, ended with "
          f"{', '.join(f'{code}: {count:,}' for code, count in ends.most_common())}")
    tiny.conclude(faults)


if __name__ == "__main__":
    run(main, parse_command_line(Config))
