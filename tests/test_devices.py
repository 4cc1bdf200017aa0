"""Devices that are there or not, the numbers that they compute in, and memory that is short."""

import errno
import os
import subprocess
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_vlm
from plumbing.flags import UserError, run
from plumbing.devices import (LossScale, autocast_to, describe_machine, join_group, pick_device, to_device,
                              usable_cores)
from test_batches import CPU, STEPS, config_of, make, mixture_of, pack, state_of


def pretend_gpus(monkeypatch, major, minor, count=1):
    """torch.cuda as it is with so many GPUs of a compute capability."""
    facts = SimpleNamespace(major=major, minor=minor)
    for name, value in {"is_available": lambda: True, "current_device": lambda: 0, "device_count": lambda: count,
                        "get_device_properties": lambda *device: facts,
                        "get_device_capability": lambda *device: (major, minor),
                        "_check_bf16_tensor_supported": lambda device: True}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "cuda", "12.8")


@pytest.mark.parametrize("capability, dtype", [
    ((6, 1), "float16"), ((7, 0), "float16"), ((7, 5), "float16"), ((8, 0), "bfloat16"), ((8, 6), "bfloat16"),
    ((9, 0), "bfloat16"), ((12, 0), "bfloat16")])
def test_bfloat16_only_where_the_gpu_has_it(capability, dtype, monkeypatch):
    pretend_gpus(monkeypatch, *capability)
    assert pick_device("auto", "auto") == (torch.device("cuda"), getattr(torch, dtype))
    for wish in ("float32", "bfloat16", "float16"):  # what is asked for is what is computed in
        assert pick_device("cuda", wish)[1] == getattr(torch, wish)
    assert pick_device("cpu", "auto") == (CPU, torch.float32)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7", "mps", "gpu", "tpu", "meta", "cuda:x", "", "xla:0"])
def test_a_device_that_is_not_there_is_named(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"^--device={name}: .*cpu"):
        pick_device(name, "auto")


def test_a_gpu_past_the_last_one_is_named(monkeypatch):
    pretend_gpus(monkeypatch, 8, 0, count=2)
    assert pick_device("cuda:1", "auto")[0].index == 1
    with pytest.raises(UserError, match="^--device=cuda:2: there are 2 GPUs here, the last of them cuda:1$"):
        pick_device("cuda:2", "auto")


def test_more_processes_than_gpus_are_told_so(monkeypatch):
    pretend_gpus(monkeypatch, 8, 0, count=2)
    for name, value in dict(RANK=0, LOCAL_RANK=0, LOCAL_WORLD_SIZE=4, WORLD_SIZE=4).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="nproc_per_node=4: there are 2 GPUs here"):
        join_group(torch.device("cuda"))


@pytest.mark.parametrize("cores, processes, threads", [(8, "", 8), (8, "4", 2), (2, "8", 1), (3, "2", 1)])
def test_threads_are_a_process_s_share_of_the_cores_that_it_may_use(cores, processes, threads, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert usable_cores() == threads


def test_a_machine_without_git_is_described_all_the_same(monkeypatch):
    def none_there(*arguments, **settings):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "git")

    monkeypatch.setattr(subprocess, "run", none_there)
    facts = describe_machine(CPU)
    assert facts["commit"] == "" and facts["torch"] == torch.__version__


# ----------------------------------------------------------------------------- float16

def test_float16_trains_with_a_frozen_half_precision_language_model():
    config = config_of(("full", "full", "lora"), dtype="float16", lora_dropout=0.0)
    model, optimizer = make(config, torch.float16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.language.lm_head.weight.dtype == torch.float16
    scale, step, autocast = LossScale(), pack(mixture_of(), 0, range(11)), autocast_to(CPU, torch.float16)
    losses = [train_vlm.train_step(model, optimizer, step, 1e-2, config, autocast, scale)[0] for _ in range(12)]
    assert losses[-1] < losses[0] - 0.1 and scale.updates >= 10
    exact, _ = make(config, torch.float32)
    with torch.no_grad():
        wanted = sum(exact.loss(to_device(batch, CPU)) for batch in step.batches) / step.divisor
    assert losses[0] == pytest.approx(float(wanted), rel=2e-3)


def test_a_gradient_that_overflows_is_left_out_and_halves_the_scale():
    config = config_of(("full", "full", "lora"), dtype="float16")
    model, optimizer = make(config, torch.float16)
    scale, autocast = LossScale(1024.0, 7), autocast_to(CPU, torch.float16)

    def step(number):
        return train_vlm.train_step(model, optimizer, pack(mixture_of(), number, STEPS["text and images"]), 1e-2,
                                    config, autocast, scale)

    loss, norm = step(0)
    assert norm < 1e3 and vars(scale) == {"scale": 1024.0, "updates": 8}
    before = state_of(model, optimizer)
    planted = model.projector.bias.register_hook(lambda gradient: gradient * torch.inf)
    loss, norm = step(1)
    assert loss < 10 and not np.isfinite(norm) and vars(scale) == {"scale": 512.0, "updates": 0}
    assert all(torch.equal(before[name], now) for name, now in state_of(model, optimizer).items())
    planted.remove()
    assert np.isfinite(step(2)[1]) and scale.updates == 1
    assert not all(torch.equal(before[name], now) for name, now in state_of(model, optimizer).items())


def test_the_scale_grows_after_2000_updates_and_gives_up_where_none_helps():
    scale = LossScale()
    for _ in range(2000):
        scale.note(overflowed=False)
    assert vars(scale) == {"scale": 131072.0, "updates": 0}
    with pytest.raises(FloatingPointError, match="at any scale"):
        for _ in range(40):
            scale.note(overflowed=True)


def test_the_norm_and_the_update_do_not_depend_on_the_scale():
    found = []
    for scale in (None, LossScale(8.0), LossScale(4096.0)):
        config = config_of(("full", "full", "full"), clip=0.1)
        model, optimizer = make(config)
        step = pack(mixture_of(), 0, STEPS["text and images"])
        told = train_vlm.train_step(model, optimizer, step, 1e-2, config, autocast_to(CPU, torch.float32), scale)
        found.append((torch.tensor(told), state_of(model, optimizer)))
    for told, state in found[1:]:  # powers of two: the same bits
        assert torch.equal(told, found[0][0]) and all(torch.equal(state[name], found[0][1][name]) for name in state)


# ----------------------------------------------------------------------------- memory

class OutOfMemoryError(RuntimeError):
    """What torch.OutOfMemoryError is called."""


@dataclass(frozen=True)
class Small:
    batch_size: int = 1  # rows


ANSWER = "out of memory: lower --micro_batch_tokens (it changes no result), or raise --recompute"


@pytest.mark.parametrize("error", [
    OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), MemoryError(),
    np._core._exceptions._ArrayMemoryError((1 << 40,), np.dtype(np.uint8)),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to "
                 "allocate 99 bytes. Error code 12 (Cannot allocate memory)"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported asynchronously"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    OSError(errno.ENOMEM, "Cannot allocate memory")])
@pytest.mark.parametrize("config, answer", [
    (train_vlm.Config(), ANSWER), (Small(), "out of memory: lower --batch_size")])
def test_memory_that_is_short_gets_the_readme_s_line(error, config, answer, capsys):
    def main(config):
        raise error

    with pytest.raises(SystemExit) as ended:
        run(main, config)
    told = capsys.readouterr().err
    assert ended.value.code == 2 and answer in told and told.count("\n") == 1


def test_another_error_keeps_its_traceback():
    def main(config):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        run(main, Small())


def test_memory_that_is_really_short_is_recognised(capsys):
    with pytest.raises(SystemExit):
        run(lambda config: torch.empty(1 << 55, dtype=torch.uint8), Small())
    with pytest.raises(SystemExit):
        run(lambda config: np.empty(1 << 55, np.uint8), Small())
    assert capsys.readouterr().err.count("out of memory: lower --batch_size") == 2
