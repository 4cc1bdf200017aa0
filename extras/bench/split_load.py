"""
How much memory the loading of a language model takes where processes split it, as train_vlm.py --shard=true does.

    python extras/bench/split_load.py                 a LLaMA of 0.95 billion random weights, by 1 and by 2 processes

Each process is a fresh one. Its peak is the most that it held at any time, beyond what it held with all its
imports done, before it read the first tensor. Linux, by /proc.

Alone it took 1.951 GB, as one of two 1.102: its half of the weights, and the largest tensor in whole.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import json
import multiprocessing
import os
import socket
import tempfile
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed.fsdp  # noqa: F401, else its import would count
from safetensors.torch import save_file

from model import LLaMA, LlamaConfig
from plumbing.devices import is_split, join_group, split_among_ranks
from plumbing.flags import Count, UserError, parse_command_line, run
from weights import hub_config, load_llama


@dataclass(frozen=True)
class Config:
    processes: Count = 2  # that split the model
    width: Count = 2048  # of the model, a multiple of 128
    layers: Count = 16  # of the model
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of its weights


def write_model(folder, config):
    """A LLaMA's hub folder, of random weights, tensor by tensor."""
    llama = LlamaConfig(hidden_size=config.width, intermediate_size=config.width * 11 // 4,
                        num_hidden_layers=config.layers, num_attention_heads=config.width // 128,
                        num_key_value_heads=config.width // 128)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LLaMA(llama).state_dict().items()}
    dtype = getattr(torch, config.dtype)
    save_file({name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hub_config(llama)))
    return folder


def held(peak=False):
    """Bytes that this process holds, or the most that it ever held."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0]) * 1024


def load(rank, processes, port, folder, dtype, results):
    """Load the model, or this process's part of it; (its peak, bytes of its parameters) go into `results`."""
    if processes > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    join_group(torch.device("cpu"))
    before = held()
    model = load_llama(folder, getattr(torch, dtype), split=split_among_ranks if processes > 1 else None)
    own = [p.to_local() if is_split(p) else p for p in model.parameters()]
    results.put((held(peak=True) - before, sum(p.numel() * p.element_size() for p in own)))


def measure(folder, processes, dtype):
    """[(peak, bytes of parameters) of each process] that loads the model together with the others."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    group = [context.Process(target=load, args=(rank, processes, port, str(folder), dtype, results))
             for rank in range(processes)]
    for process in group:
        process.start()
    for process in group:
        process.join()
    if any(process.exitcode for process in group):
        raise UserError("a process failed, see above")
    return [results.get() for _ in group]


def main(config):
    if not Path("/proc/self/status").is_file():
        raise UserError("split_load.py: needs Linux's /proc")
    with tempfile.TemporaryDirectory() as folder:
        writer = multiprocessing.get_context("spawn").Process(target=write_model, args=(Path(folder), config))
        writer.start()  # in a process of its own, so that this one stays small
        writer.join()
        peaks = {}
        for processes in (1, config.processes):
            rows = measure(folder, processes, config.dtype)
            peaks[processes] = max(peak for peak, _ in rows)
            largest = max(size for _, size in rows)
            print(f"{processes} process(es): at most {largest / 1e9:.3f} GB of parameters in each, peak "
                  f"{peaks[processes] / 1e9:.3f} GB", flush=True)
    print(f"the peak of one of {config.processes} is {peaks[config.processes] / peaks[1]:.3f} of that of one alone")


if __name__ == "__main__":
    run(main, parse_command_line(Config))
