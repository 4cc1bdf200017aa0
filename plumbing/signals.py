"""How a long run ends when it is told to: with its step finished and saved."""

import contextlib
import signal
import sys
import time

import torch
import torch.distributed as dist


def catch_signals():
    """
    A list that SIGTERM and SIGINT enter their number into, so that the run can finish its step and save.

    Schedulers and torchrun may send one twice, to a group and to each process of it. So only a SIGINT
    that comes more than two seconds after the first signal, from a person, ends the run at once.
    """
    signals, began = [], time.monotonic()

    def enter(number, frame):
        nonlocal began
        if not signals:
            began = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - began > 2:
            raise KeyboardInterrupt
        signals.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, enter)
    return signals


def agree_on_stop(signals, due, device):
    """(whether a save is due, the number of a signal or 0), as any of the ranks has them: all have the same."""
    stopped = max(signals, default=0)
    if dist.is_initialized():
        agreed = torch.tensor([int(due), stopped], device=device)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        due, stopped = agreed.tolist()
    return bool(due), stopped


def end_stopped(folder, step, number):
    """End a run that a signal has stopped, with that signal's exit code."""
    print(f"{folder}: stopped by {signal.Signals(number).name} and saved at step {step}; the same "
          "command with --resume=true goes on")
    sys.exit(128 + number)


def between_runs(folder, number):
    """Let signals end the process at once again, as before a run; end it where one came in a run's last step."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if number:
        print(f"{folder}: finished; stopped by {signal.Signals(number).name} before the next one, with which the same "
              "command goes on with --resume=true")
        sys.exit(128 + number)


@contextlib.contextmanager
def time_limit(seconds):
    """Raise TimeoutError in a block of Python that takes longer, in a process's main thread."""
    def end(number, frame):
        raise TimeoutError(f"took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
