"""The machine that a script runs on: its device, the numbers that compute there, the processes that share it."""

import atexit
import os
import platform
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from plumbing.flags import UserError


def describe_machine(device):
    """Versions, hardware and commit, "" where git does not tell it, so that a run says what made it."""
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                                cwd=Path(__file__).parent).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {"commit": commit, "torch": torch.__version__, "device": f"{device} {name}",
            "threads": torch.get_num_threads(), "python": platform.python_version(),
            "command": " ".join(sys.argv)}


def usable_cores():
    """Cores for this process: those that it may use, divided by torchrun's processes on this machine; 1 or more."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # not on a Mac
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


# ----------------------------------------------------------------------------- devices

def find_device(name):
    """The torch device of a name, or for "auto" a GPU where there is one. UserError where it is not there."""
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available()
                else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")  # which is nobody's choice either
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device={name}: auto, cpu, mps, cuda or cuda:0")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device={name}: torch {torch.__version__} finds no GPU here; see to its driver, or "
                        "add --device=cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device={name}: torch {torch.__version__} finds no Metal GPU here; add --device=cpu")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count() or 1):
        raise UserError(f"--device={name}: there are {count} GPUs here, the last of them cuda:{count - 1}")
    return device


def pick_device(device, dtype):
    """
    The torch device and the dtype to compute in: the names given, or for "auto" the GPU where there is
    one, and there bfloat16 where its own circuits have it (compute capability 8.0 and more), else
    float16. Raises UserError where the device is not there.
    """
    device = find_device(device)
    if dtype == "auto" and device.type == "cuda":
        bf16 = (torch.cuda.is_bf16_supported(including_emulation=False)
                and torch.cuda.get_device_capability(device) >= (8, 0))
        dtype = "bfloat16" if bf16 else "float16"
    return device, getattr(torch, "float32" if dtype == "auto" else dtype)


def autocast_to(device, dtype):
    """The context in which matrix products are computed in dtype; in float32 one that does nothing."""
    half = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(device.type, dtype if half else torch.bfloat16, enabled=half)


class LossScale:
    """
    What the loss is multiplied by before its backward pass in float16, whose smallest numbers would make zeros
    of small gradients. It is halved when a gradient overflows, whose update is left out, and doubled after
    2,000 updates in a row. Its two numbers go into a checkpoint.
    """

    def __init__(self, scale=65536.0, updates=0):
        self.scale, self.updates = scale, updates

    def note(self, overflowed):
        """Choose the next scale. Raises FloatingPointError when none is small enough."""
        self.updates = 0 if overflowed else self.updates + 1
        if overflowed:
            self.scale /= 2
        elif self.updates == 2000:
            self.scale, self.updates = min(2 * self.scale, 2.0 ** 24), 0
        if self.scale < 2 ** -14:
            raise FloatingPointError("the gradient overflows float16 at any scale of the loss")


# ----------------------------------------------------------------------------- torchrun's processes

def join_group(device, timeout=600):
    """
    (rank, ranks, device) of this process in the group that torchrun started; (0, 1, device) without it.
    Each process has a GPU of its own, where there are any, and all but the first are silent. One that
    waits longer than `timeout` seconds for the others ends, and torchrun then ends them all. Raises
    UserError where there are fewer GPUs than processes.
    """
    if "RANK" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        processes, count = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if processes > count:
            raise UserError(f"torchrun --nproc_per_node={processes}: there are {count} GPUs here, one for each "
                            f"process; start {count}")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                            timeout=timedelta(seconds=timeout))
    atexit.register(dist.destroy_process_group)
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")
    return dist.get_rank(), dist.get_world_size(), device
