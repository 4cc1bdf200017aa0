"""
The machine that a script runs on: its device, the numbers that compute there, the processes that share it.

torchrun's processes act in step: a mistake that one of them meets ends all, with one line. With --shard=true
each has a part of the language model: its tensors are then DTensors.
"""

import atexit
import os
import platform
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
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


def together(work):
    """
    What work() returns on this process. Where it raises UserError or OSError on any of torchrun's
    processes, it ends all of them: the first process raises the first error, the others leave silently.
    """
    if not dist.is_initialized():
        return work()
    result, error = None, None
    try:
        result = work()
    except (UserError, OSError) as caught:
        error = str(caught)
    errors = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(errors, error)
    except RuntimeError:  # another process has ended, and has said why
        if error is not None:
            raise UserError(error) from None
        sys.exit(2)
    reasons = [text for text in errors if text is not None]
    if reasons and dist.get_rank() == 0:
        raise UserError(reasons[0])
    if reasons:
        sys.exit(2)
    return result


def agree(decide):
    """What decide() returns on the first process, for all of them; an error of it ends all."""
    if not dist.is_initialized():
        return decide()
    decided = [together(lambda: decide() if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(decided)
    return decided[0]


def share_out(things, answer):
    """What answer(things of this rank) gives, one a thing, put together in the order of all things, on all ranks."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    parts = [together(lambda: answer(things[rank::ranks], rank, ranks))] * ranks
    if ranks > 1:
        dist.all_gather_object(parts, parts[rank])
    return [parts[place % ranks][place // ranks] for place in range(len(things))]


def sum_of_ranks(number):
    """The sum of a number of each process, on all of them."""
    if not dist.is_initialized():
        return number
    numbers = [0.0] * dist.get_world_size()
    dist.all_gather_object(numbers, number)
    return sum(numbers)


# ----------------------------------------------------------------------------- tensors of several processes

def to_device(value, device):
    """A numpy array as a tensor on a device; so are those in a list and in a dataclass, such as a data.Batch."""
    if isinstance(value, list):
        return [to_device(item, device) for item in value]
    if is_dataclass(value):
        return replace(value, **{item.name: to_device(getattr(value, item.name), device) for item in fields(value)})
    tensor = torch.from_numpy(value)
    if device.type == "cuda":  # from pinned memory a copy waits for nothing that the GPU has yet to do
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def is_split(tensor):
    """Whether a tensor is a DTensor, of which each process has a part."""
    return hasattr(tensor, "full_tensor")


def whole_and_split(parameters):
    """Two lists: the parameters that are whole on each process, and those of which each has a part."""
    return [[p for p in parameters if is_split(p) == split] for split in (False, True)]


def gather(tensors):
    """
    A dict of tensors with those that the processes have split put together, on the first one's CPU. All
    have to take part; the others get nothing.
    """
    gathered = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if is_split(tensor) else tensor
        if not dist.is_initialized() or dist.get_rank() == 0:
            gathered[name] = whole.cpu() if is_split(tensor) else whole
    return gathered


def fill(parameter, tensor):
    """Copy each process's part of a whole tensor into a parameter that is split."""
    from torch.distributed.tensor import distribute_tensor
    mine = distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements,
                             src_data_rank=None)  # each process has the whole tensor: nothing is sent
    parameter.to_local().copy_(mine.to_local())


def split_among_ranks(language):
    """
    Leave each process a part of a language model (FSDP2), of its gradients and moments. A module's weights
    are gathered when it runs and freed behind it. LoRA, which is small, stays whole everywhere.
    """
    from torch.distributed.fsdp import fully_shard  # whose import takes as long as half of torch's

    lora = {parameter for name, parameter in language.named_parameters() if ".lora_" in name}
    for module in [*language.blocks, language.model.embed_tokens, language.lm_head, language]:
        fully_shard(module, reshard_after_forward=True, ignored_params=lora & {*module.parameters()})
        module.set_force_sum_reduction_for_comms(True)  # by plain sums, as sum_over_ranks sums the others
        module.set_gradient_divide_factor(1.0)


def sum_over_ranks(parameters, loss):
    """
    Sum the gradients of n parameters and the loss of all ranks, in one message: the same bits on every rank.
    Returns the loss and, (n,), how many ranks have reached each parameter; none: its gradient is 0.
    """
    reached = torch.tensor([float(p.grad is not None) for p in parameters], device=loss.device)
    flat = torch.cat([*((torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters),
                      reached, loss[None]])
    dist.all_reduce(flat)
    *gradients, reached, loss = flat.split([*(p.numel() for p in parameters), len(reached), 1])
    for p, gradient in zip(parameters, gradients):
        p.grad = gradient.view_as(p)
    return loss[0], reached
