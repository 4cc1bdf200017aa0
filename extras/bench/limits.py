"""
What a machine's matrix products and copies allow: the limits that the other benchmarks are held against.

    python extras/bench/limits.py                   products of a 7B's step, and what brings few bits back

Each is the best of ten. 2 FLOP a multiplication. Bytes are what is read once and what is written: of a product both
factors and the outcome, of a copy its own twice.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import time
from dataclasses import dataclass

import torch
import torch.nn as nn

from plumbing.devices import describe_machine, find_device
from plumbing.flags import Count, Device, parse_command_line, run
from plumbing.kernels import Linear
from quantize import LowLinear
from zoo.mxfp4 import MXLinear

SHAPES = {  # tokens, in, out
    "a 7B's MLP, 8,192 tokens": (8192, 4096, 11008), "its attention": (8192, 4096, 4096),
    "its head, 512 answers": (512, 4096, 32000), "its MLP, 64 tokens at a time": (64, 4096, 11008)}
HALF = torch.bfloat16


@dataclass(frozen=True)
class Config:
    device: Device = "auto"  # cuda, mps or cpu
    smaller: Count = 1  # divides all sizes, to try it


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def best(function, device):
    """The least seconds that it took in ten times, behind a first one that does not count."""
    seconds = []
    for _ in range(11):
        begin = clock(device)
        function()
        seconds.append(clock(device) - begin)
    return min(seconds[1:])


@torch.no_grad()
def measure_limits(device, dtype):
    """(FLOP/s of a matrix product, bytes/s of a copy) of this machine: the best of 10."""
    size = 8192 if device.type == "cuda" else 2048
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    product = Linear(size, size, bias=False).to(device, dtype)
    source = torch.ones(1 << 28, device=device, dtype=torch.uint8)
    return 2 * size ** 3 / best(lambda: product(matrix), device), 2 * source.numel() / best(source.clone, device)


@torch.no_grad()
def main(config):
    device = find_device(config.device)
    print(", ".join(f"{name} {fact}" for name, fact in describe_machine(device).items()), "\n", flush=True)
    print("| what | dtype | ms | TFLOP/s | GB/s |\n|---|---|--:|--:|--:|", flush=True)

    def row(what, dtype, seconds, flop=0, size=0):
        print(f"| {what} | {str(dtype)[6:]} | {1e3 * seconds:.3f} | {f'{flop / seconds / 1e12:.1f}' if flop else ''} | "
              f"{f'{size / seconds / 1e9:.0f}' if size else ''} |", flush=True)

    for what, shape in SHAPES.items():
        T, inner, outer = (max(8, number // config.smaller) for number in shape)
        for dtype in (HALF, torch.float32):
            x, layer = torch.randn(T, inner, device=device, dtype=dtype), nn.Linear(inner, outer, False, device, dtype)
            size = layer.weight.nbytes + x.nbytes + T * outer * x.element_size()
            row(what, dtype, best(lambda: layer(x), device), 2 * T * inner * outer, size)
    size = max(128, 4096 // config.smaller) // 64 * 64
    plain = nn.Linear(size, size, False, device, HALF)
    for name, layer in (("8 bits", LowLinear(plain, 8)), ("4 bits", LowLinear(plain, 4)), ("MXFP4", MXLinear(plain))):
        layer.store(plain.weight.detach())
        held = sum(tensor.nbytes for tensor in layer.buffers())
        row(f"{size} x {size} brought back from {name}", HALF, best(lambda: layer.dequantise(HALF), device),
            size=held + plain.weight.nbytes)
    if config.smaller == 1:
        (flops, bandwidth), size = measure_limits(device, HALF), 8192 if device.type == "cuda" else 2048
        row(f"{size} x {size} x {size}", HALF, 2 * size ** 3 / flops, 2 * size ** 3)
        row("a copy of 2^28 bytes", torch.uint8, 2 * (1 << 28) / bandwidth, size=2 * (1 << 28))


if __name__ == "__main__":
    run(main, parse_command_line(Config))
