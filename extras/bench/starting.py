"""
How long commands take to start: --help, a typo, a list, a report, one answer, and the demo up to its first page.

    python extras/bench/starting.py --run=out/sample
    python extras/bench/starting.py --run=out/sample --before=path/to/an/older/checkout --rounds=7

Every command is a process of its own, in turns with `import torch`, below which no answer can be, and with the same
command of another checkout. Medians of the processor's seconds, of the process and its children, and of the clock's;
the first round, which reads files into memory, is not counted. A command that refuses, as a typo is, counts as well.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[0] = str(ROOT)  # the repository, not this folder

import os
import resource
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from statistics import median

from plumbing.flags import Count, UserError, parse_command_line, run


@dataclass(frozen=True)
class Config:
    run: str = "out/sample"  # folder of a train_vlm.py run, which answers
    image: str = "assets/example.jpg"  # that is asked about
    before: str = ""  # another checkout, to compare with; none: this one alone
    rounds: Count = 7  # of all commands, beside the first


def list_commands(config):
    """{what it is: arguments of Python, from a checkout's folder}"""
    question = ["eval_vqa.py", f"--run={config.run}", "--question=is there a white cell in the image?"]
    scripts = ["train_vlm.py", "train_cls.py", "eval_vqa.py", "train_grpo.py", "prepare/all.py",
               "extras/share/demo.py"]
    return {"import torch": ["-c", "import torch"],
            **{f"{script} --help": [script, "--help"] for script in scripts},
            "train_vlm.py --xyzzy": ["train_vlm.py", "--xyzzy"], "prepare/all.py --list": ["prepare/all.py", "--list"],
            "train_cls.py --report": ["train_cls.py", "--report"], "eval_vqa.py --report": ["eval_vqa.py", "--report"],
            "eval_vqa.py --question": question, "with --image": [*question, f"--image={config.image}"],
            "the demo's first page": ["extras/share/demo.py", f"--run={config.run}"]}


def in_checkout(root, arguments):
    """A command line of Python, whose script is that of a checkout."""
    return [sys.executable, *([] if arguments[0] == "-c" else [str(root / arguments[0])]),
            *(arguments if arguments[0] == "-c" else arguments[1:])]


def wait_for_page(command):
    """Start the demo, and end it once it has sent its page. Raises UserError where it ends by itself."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    demo = subprocess.Popen([*command, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=60) as page:
                    page.sendall(f"GET / HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
                    return page.makefile("rb").read()
            except OSError:
                if demo.poll() is not None:
                    raise UserError("the demo has no page: see `python extras/share/demo.py`") from None
                time.sleep(0.02)
    finally:
        demo.send_signal(signal.SIGKILL)  # what it does to end is not timed
        demo.wait()


def measure(command):
    """(seconds of the processor, seconds of the clock) of a command line."""
    def spent():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    processor, clock = spent(), time.perf_counter()
    if command[1].endswith("demo.py") and "--help" not in command:
        wait_for_page(command)
    else:
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return spent() - processor, time.perf_counter() - clock


def main(config):
    if not Path(config.run).is_dir():
        raise UserError(f"--run={config.run}: no such run; README.md's first line trains one")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # the second start of a checkout is like the hundredth
    roots = [ROOT, *([Path(config.before).resolve()] if config.before else [])]
    commands = list_commands(config)
    seconds = {(name, root): [] for name in commands for root in roots}
    for number in range(config.rounds + 1):
        for name, root in seconds:
            measured = measure(in_checkout(root, commands[name]))
            if number:
                seconds[name, root].append(measured)
    print(f"{'processor, clock in seconds':28}" + "".join(f"{root.name:>16}" for root in roots))
    for name in commands:
        cells = [[median(column) for column in zip(*seconds[name, root])] for root in roots]
        print(f"{name:28}" + "".join(f"{processor:9.2f} {clock:6.2f}" for processor, clock in cells), flush=True)


if __name__ == "__main__":
    run(main, parse_command_line(Config))
