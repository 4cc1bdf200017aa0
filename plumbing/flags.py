"""
The command line of every script: a dataclass of typed flags, and one line for a mistake of the user.

A script parses its flags before it imports torch, so that --help and a typo are answered at once:

    @dataclass(frozen=True)
    class Config:
        batch_size: Count = 64  # samples in an optimiser step

    if __name__ == "__main__":
        CONFIG = parse_command_line(Config)

    import torch
    ...
    if __name__ == "__main__":
        run(main, CONFIG)
"""

import argparse
import atexit
import difflib
import errno
import gc
import importlib.util
import inspect
import json
import os
import re
import sys
import typing
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated

LARGEST = 2 ** 31 - 1  # of a whole number; torch and NumPy take these everywhere
LONGEST_PART, LONGEST_PATH = 255, 4095  # bytes of a file's name and of a path, on Linux and macOS


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: what, where, what to run next."""


# ----------------------------------------------------------------------------- ranges

@dataclass(frozen=True)
class Range:
    """The numbers that a flag may have, from low to high; `below`: high itself is out."""
    low: float
    high: float
    below: bool = False

    def __contains__(self, value):  # NaN is in no range
        return self.low <= value < self.high if self.below else self.low <= value <= self.high

    def __str__(self):
        if self.high == LARGEST:
            return f"{self.low} or more"
        low, high = (f"{end:,}" if isinstance(end, int) else f"{end:g}" for end in (self.low, self.high))
        return f"from {low} to {'below ' * self.below}{high}"


@dataclass(frozen=True)
class Form:
    """The texts that a flag may have: those that the pattern matches whole."""
    pattern: str
    words: str

    def __contains__(self, value):
        return re.fullmatch(self.pattern, value, re.S) is not None

    def __str__(self):
        return self.words


Count = Annotated[int, Range(1, LARGEST)]
Whole = Annotated[int, Range(0, LARGEST)]  # counts from 0, and seeds
BatchSize = Annotated[int, Range(1, 1 << 20)]  # samples, images or rows that are worked on at a time
Threads = Annotated[int, Range(0, 1024)]  # or processes; 0 leaves their number to the script
Seconds = Annotated[int, Range(1, 30 * 24 * 3600)]
Share = Annotated[float, Range(0, 1)]
ShareBelow1 = Annotated[float, Range(0, 1, below=True)]
Scale = Annotated[float, Range(0, 1e30)]  # rates, decays and other numbers that are not negative
Device = Annotated[str, Form(r"auto|cpu|mps|cuda(:\d{1,3})?", "auto, cpu, mps, cuda or cuda:0")]
Text = Annotated[str, Form(r".{0,20000}", "a text of at most 20,000 characters")]  # not a name or a path
Name = Annotated[str, Form(r"(?!\.{1,2}$)[^/]*", "a name without /")]
WINDOW = r"(file|lung|soft|bone|brain|-?\d+(\.\d+)?/\d+(\.\d+)?)"
Window = Annotated[str, Form(rf"auto|{WINDOW}(,{WINDOW},{WINDOW})?",
                             "auto, file, lung, soft, bone, brain, centre/width, or three of these with commas")]
Slices = Annotated[str, Form(r"all|middle|every:[1-9]\d{0,3}|[1-9]\d{0,3}", "all, middle, every:5, or a number")]
Datasets = Annotated[str, Form(  # train_vlm.py's mixture
    r"[^,:]+(:[^,:]*)?(,[^,:]+(:[^,:]*)?)*", "names with commas between, each with an optional weight, as in a,b:2")]


def find_fault(value, kind, limits):
    """What is wrong with a flag's value, as "not one of ...", or ""."""
    for limit in limits:
        if value not in limit:
            return str(limit)
    if limits:
        return ""
    if kind is int and abs(value) > LARGEST:
        return f"from {-LARGEST} to {LARGEST}"
    if kind is float and not abs(value) < float("inf"):
        return "a finite number"
    if kind is str:
        if re.search(r"[\x00-\x1f\x7f]", value):
            return "a text without line breaks or other control characters"
        name = os.fsencode(value)
        if len(name) > LONGEST_PATH or any(len(part) > LONGEST_PART for part in re.split(b"[/,]", name)):
            return f"at most {LONGEST_PART} bytes a name, and {LONGEST_PATH} in all"
    return ""


# ----------------------------------------------------------------------------- parsing

class Once(argparse.Action):
    """Stores a flag's value; a flag that is given twice is a mistake, of which neither value is meant."""

    def __call__(self, parser, namespace, value, option_string=None):
        given = namespace.__dict__.setdefault("given", set())
        if self.dest in given:
            raise argparse.ArgumentError(self, "given twice")
        given.add(self.dest)
        setattr(namespace, self.dest, value)


def boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r:.60} is neither true nor false")
    return text.lower() == "true"


def type_of(item):
    """A field's plain type, its choices, and the Range or Form of its values."""
    if typing.get_origin(item.type) is Annotated:
        kind, *limits = typing.get_args(item.type)
        return kind, None, limits
    choices = typing.get_args(item.type)
    return (type(choices[0]), choices, []) if choices else (item.type, None, [])


def make_parser(Config):
    """An argparse parser of a dataclass, whose help texts are the comments behind its fields."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.M))
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    for item in fields(Config):
        assert item.default is not MISSING, f"{item.name} needs a default"
        kind, choices, limits = type_of(item)
        values = "|".join(map(str, choices)) if choices else kind.__name__
        limit = f"; {limits[0]}" if limits else ""
        parser.add_argument(
            "--" + item.name, action=Once, type=boolean if kind is bool else kind, choices=choices,
            default=item.default, metavar=values, **({"nargs": "?", "const": True} if kind is bool else {}),
            help=f"{comments[item.name]} (default: {str(item.default) or 'none'}{limit})".replace("%", "%%"))
    return parser


def parse_flags(Config, arguments):
    """
    Turn ["--key=value", ...] into the dataclass Config, each value of its field's type; a boolean flag
    alone is true.

    The comment behind a field is its help text. What is not given is as a run recorded it, see
    recorded_flags, or the field's default. Raises UserError on an unknown flag, with the nearest name, on a
    flag given twice, and on a value of the wrong type or out of its range.
    """
    for argument in arguments:
        if argument.partition("=")[2] == "--":  # which argparse takes for the end of all flags, and away
            raise UserError(f"{argument:.80}: -- is no value; see --help")
    try:
        known, unknown = make_parser(Config).parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(f"{one_line(error):.200}; see --help") from None
    if unknown:
        name = unknown[0].split("=")[0].lstrip("-")
        near = difflib.get_close_matches(name, [item.name for item in fields(Config)], n=1)
        hint = f"did you mean --{near[0]}?" if near else "see --help"
        raise UserError(f"unknown flag {unknown[0]!r:.80}: {hint}")
    known, given = {item.name: getattr(known, item.name) for item in fields(Config)}, getattr(known, "given", set())
    known |= {name: value for name, value in recorded_flags(Config, known).items() if name not in given}
    for item in fields(Config):
        kind, choices, limits = type_of(item)
        if choices and known[item.name] not in choices:  # argparse sees those given, not those recorded
            raise UserError(f"--{item.name}={one_line(known[item.name]):.60}: one of {', '.join(map(str, choices))}")
        if fault := find_fault(known[item.name], kind, limits):
            raise UserError(f"--{item.name}={one_line(known[item.name]):.60}: {fault}")
    return Config(**known)


def recorded_flags(Config, known):
    """
    {flag: value} that a run wrote down, for a script with these flags: --config names its config.json, of
    which all but the run's place counts; --resume=true goes on with --run, or else with the newest in out/.
    """
    path, without = Path(known.get("config", "")), {"config", "resume", "run"}
    if not known.get("config"):
        if "config" not in known or not known["resume"]:
            return {}
        runs = [path for path in Path("out").glob("*/config.json") if (path.parent / "log.jsonl").exists()]
        runs.sort(key=lambda path: path.stat().st_mtime)
        path = Path(known["run"]) / "config.json" if known["run"] else runs[-1] if runs else path
        without = {"config", "resume"}
        if not path.is_file():  # as when a scheduler gives the same command every time
            return {}
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))["flags"]
        unknown = recorded.keys() - {item.name for item in fields(Config)}
        kinds = {item.name: (int, float) if type(item.default) is float else (type(item.default),)
                 for item in fields(Config)}
        wrong = [name for name, kind in kinds.items() if name in recorded and type(recorded[name]) not in kind]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no flags of a run in it ({one_line(error):.80})") from None
    if unknown or wrong:
        raise UserError(f"{path}: --{min([*unknown, *wrong])} there is none of this version's; give the flags anew")
    place = {} if "run" in without else {"run": str(path.parent)}
    return {name: value for name, value in recorded.items() if name not in without} | place


# ----------------------------------------------------------------------------- running

def one_line(error):
    return " ".join(str(error).split())


def end(message, code=2):
    """End the script with one line on stderr."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(code)


def flush_or_drop(more=""):
    """Write out what was printed; drop it where nobody reads on, as behind `| head`. Whether it was dropped."""
    try:
        sys.stdout.write(more)
        sys.stdout.flush()
        return False
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True


def require_packages(requirements, *names):
    """End the script with one line where one of these packages is not installed. requirements: what names it."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            end(f"no {name} here; run `pip install -r {requirements}`")


def parse_command_line(Config):
    """The Config of sys.argv; a mistake in it ends the script with one line and exit code 2."""
    atexit.register(flush_or_drop)  # else Python itself would flush, and print a traceback
    for stream in (sys.stdout, sys.stderr):  # a file's name need not be UTF-8
        stream.reconfigure(errors="backslashreplace")
    try:
        config = parse_flags(Config, sys.argv[1:])
    except UserError as error:
        end(one_line(error))
    gc.disable()  # until run(): what is imported in between stays, and to look through it takes a third of a start
    return config


def is_out_of_memory(error):
    """Whether memory was refused: by Python or NumPy, by torch, on a GPU or a CPU, or by the system."""
    return (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            or getattr(error, "errno", None) == errno.ENOMEM
            or isinstance(error, RuntimeError) and re.search(
                r"out of memory|not enough memory|DefaultCPUAllocator|ALLOC_FAILED|bad_alloc", str(error)) is not None)


def less_memory(config):
    """What README.md says to do when memory is short, by the flags that a script has."""
    if hasattr(config, "micro_batch_tokens") and hasattr(config, "recompute"):
        return "lower --micro_batch_tokens (it changes no result), or raise --recompute towards 1"
    for flag in ("batch_size", "workers"):
        if hasattr(config, flag):
            return f"lower --{flag}"
    return "run it where there is more"


def run(main, config):
    """
    Call main with a Config. A UserError, and a file, a disk or memory that the system refuses, end the
    script with one line and exit code 2; Ctrl-C ends it with 130.
    """
    if not gc.isenabled():  # see parse_command_line
        if not gc.get_freeze_count():  # once: streamlit comes here at every click
            gc.freeze()
        gc.enable()
    try:
        return main(config)
    except UserError as error:
        message = one_line(error)
    except KeyboardInterrupt:
        end("stopped", 130)
    except BrokenPipeError:
        if not flush_or_drop("\n"):  # another pipe than the one that is printed into
            raise
        sys.exit(141)  # as of a program that SIGPIPE ends
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message = f"out of memory: {less_memory(config)}"
    except OSError as error:  # without a number or a file's name, it is a mistake of ours
        if is_out_of_memory(error):
            message = f"out of memory: {less_memory(config)}"
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"{one_line(error)}; make space, then run it again"
        elif error.errno and error.filename is not None:
            message = f"{error.filename}: {error.strerror}; see to it, then run it again"
        else:
            raise
    end(message)
