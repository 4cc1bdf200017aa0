"""
Training, answers and classifying on a GPU that is none: tensors that were made for it are told apart from the others
as they are computed with, forward and backward, and an operation on both kinds is refused, as CUDA refuses it.
"""

import weakref
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import asking
import run
import train_cls
import train_grpo
import train_vlm
from extras.bench import gpu_checks
from generate import Sampling, finished_groups, generate
from grpo import MicroBatch
from model import CONFIGS, ViT
from plumbing import kernels
from plumbing.devices import autocast_to, to_device
from plumbing.kernels import group_masks
from quantize import LowLinear
from tasks.labelled import Split
from test_model import relative_error
from zoo.classifier import Classifier

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Pretended(TorchDispatchMode):
    """Which storages lie on the GPU, and what may be computed with what."""

    def __init__(self):
        super().__init__()
        self.there, self.either = set(), set()  # either: what autograd itself makes, where it is needed

    def holds(self, tensor):
        return tensor.untyped_storage()._cdata in self.there

    def put(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.there:
            self.there.add(storage._cdata)
            weakref.finalize(storage, self.there.discard, storage._cdata)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
                 and leaf.untyped_storage()._cdata not in self.either]
        here, there = ([tensor for tensor in given if self.holds(tensor) == side] for side in (False, True))
        name = function.overloadpacket.__name__
        if name in ("index", "index_put_", "index_put", "_unsafe_index", "_index_put_impl_"):
            here = [tensor for tensor in here if tensor.dtype not in (torch.int64, torch.bool)]  # may index from there
        if there and any(tensor.dim() for tensor in here) and name not in ("copy_", "_to_copy"):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found cuda:0 and cpu")
        outputs = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs) if there and name != "copy_" else ():
            if isinstance(tensor, torch.Tensor):
                self.put(tensor)
        if name == "zeros" and torch._C._current_graph_task_id() >= 0:
            self.either.add(outputs.untyped_storage()._cdata)
            weakref.finalize(outputs.untyped_storage(), self.either.discard, outputs.untyped_storage()._cdata)
        return outputs


class Places(TorchFunctionMode):
    """What asks for a GPU's tensors gets those of the CPU, noted in a Pretended as the GPU's."""

    def __init__(self, pretended):
        super().__init__()
        self.pretended = pretended

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        if name == "__get__" and function in (torch.Tensor.device.__get__, torch.Tensor.is_cuda.__get__):
            there = self.pretended.holds(args[0])
            if function == torch.Tensor.is_cuda.__get__:
                return there
            return GPU if there else function(*args)
        if name == "pin_memory":
            return args[0]
        if function == torch.Tensor.backward:  # so that what is written in Python of a backward pass comes here, too
            with self:
                return torch.autograd.backward(args[0])
        if name in ("numpy", "__array__") and self.pretended.holds(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        def is_place(value):
            return isinstance(value, torch.device) or isinstance(value, str) and value in ("cpu", "cuda", "cuda:0")

        wanted = [torch.device(value) for value in (*args[1:], kwargs.get("device")) if is_place(value)]
        wanted = [torch.device("cpu")] if name == "cpu" else wanted
        if name == "to" and isinstance(args[1], torch.Tensor):
            wanted = [GPU if self.pretended.holds(args[1]) else torch.device("cpu")]
        if name != "_parse_to":  # which tells Module.to what it was asked for
            args = [torch.device("cpu") if is_place(value) else value for value in args]
        if "device" in kwargs and kwargs["device"] is not None:
            kwargs["device"] = torch.device("cpu")
        result = function(*args, **kwargs)
        if wanted and isinstance(result, torch.Tensor):
            if self.pretended.holds(result) and wanted[0].type == "cpu":
                with torch.utils._python_dispatch._disable_current_modes():
                    result = result.clone()
            elif wanted[0].type == "cuda" and not self.pretended.holds(result):
                if any(result is value for value in args):
                    result = result.clone()
                self.pretended.put(result)
        return result


@pytest.fixture
def gpu():
    """GPU, pretended as long as the test runs."""
    pretended = Pretended()
    with Places(pretended), pretended:
        yield GPU


def test_what_lies_on_both_is_refused_forward_and_backward(gpu):
    here, there = torch.ones(3), torch.ones(3, device=gpu)
    assert (here.device.type, there.device.type, (there * 2).device.type) == ("cpu", "cuda", "cuda")
    assert there.is_cuda and not here.is_cuda and there.cpu().numpy().sum() == 3 and not there.cpu().is_cuda
    for mix in (lambda: here + there, lambda: torch.cat([here, there]), lambda: here.to(gpu) @ here,
                there.numpy, lambda: torch.where(there > 0, there, here),
                lambda: there.index_select(0, torch.tensor([1]))):
        with pytest.raises((RuntimeError, TypeError), match="device"):
            mix()
    assert (there + torch.tensor(1.0)).is_cuda and there[torch.tensor([0])].is_cuda  # which CUDA allows

    class Mixed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.ones(3)

    weight = torch.ones(3, device=gpu, requires_grad=True)
    (weight * 2).sum().backward()
    assert weight.grad.is_cuda
    with pytest.raises(RuntimeError, match="same device"):
        Mixed.apply(weight).sum().backward()


def test_how_a_sequence_is_cut_into_pieces_is_worked_out_on_the_cpu(gpu, monkeypatch):
    """Else each group of it would wait for the GPU, some times."""
    compute = Pretended.__torch_dispatch__

    def refuse_to_wait(self, function, types, args=(), kwargs=None):
        waits = function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "unique_consecutive")
        assert not (waits and self.holds(args[0])), function
        return compute(self, function, types, args, kwargs)

    monkeypatch.setattr(Pretended, "__torch_dispatch__", refuse_to_wait)
    group, branch = (torch.tensor(numbers, device=gpu) for numbers in (
        [0] * 9 + [1] * 4, [0] * 5 + [1] * 2 + [2] * 2 + [0] * 4))
    (_, causal, _), (_, seen, back), last = group_masks(group, branch)
    assert (causal, back, last) == (None, 1, (4, None, 0)) and seen.is_cuda and seen.shape == (4, 9)


@pytest.mark.parametrize("name", gpu_checks.FAMILIES.values())
def test_a_vlm_has_the_cpu_s_numbers(name, gpu):
    """Steps of train_vlm.py and train_grpo.py, the rating of options, and answers."""
    model, found = gpu_checks.make_model(name), []
    batches = [gpu_checks.draw_batch(model, seed) for seed in (0, 1)]
    config = SimpleNamespace(temperature=0.7, clip_low=0.2, clip_high=0.2, kl=0.1, clip=1.0)
    for place in (CPU, gpu):
        ours, plain = deepcopy(model).to(place), autocast_to(place, torch.float32)
        losses = gpu_checks.take_steps(ours, batches, place, torch.float32)
        assert {parameter.device.type for parameter in ours.parameters()} == {place.type}
        ones = np.ones(len(batches[0].targets), np.float32)
        micro = MicroBatch(batches[0], ones, -5 * ones, -6 * ones)
        state = SimpleNamespace(model=ours, tokenizer=SimpleNamespace(vocab_size=gpu_checks.WORDS), autocast=plain,
                                scale=None, optimizer=run.make_optimizer(
                                    [(name, p, 1.0) for name, p in ours.named_parameters()], 0.0))
        sums, norm = train_grpo.update_once(state, [micro], 1e-3, config)
        values = asking.rate(ours.eval(), gpu_checks.draw_groups(model, 2), gpu_checks.WORDS)
        found.append([losses, torch.tensor([*sums, norm]), torch.from_numpy(values)])
    for mine, its in zip(*found):
        assert relative_error(mine, its) < 1e-4
    for what, differ, _ in gpu_checks.check_answers(gpu, name):
        assert differ == 0, what


@pytest.mark.parametrize("check", [gpu_checks.check_bits, gpu_checks.check_exact])
def test_few_bits_and_what_is_exact(check, gpu):
    for what, error, bound in check(gpu):
        assert error <= bound, what


def test_a_vlm_on_a_base_of_few_bits(gpu):
    """Matrices of gpt-oss in MXFP4 and all others in 4 bits: made on the device, asked and trained there."""
    model = gpu_checks.build("medgpt_sample", 512, torch.float32, gpu, bits=4).requires_grad_(False)
    layers = [module for module in model.modules() if isinstance(module, LowLinear)]
    assert len(layers) > 60 and all(buffer.is_cuda for layer in layers for buffer in layer.buffers())
    model.projector.requires_grad_(True)
    image = np.zeros((64, 96, 3), np.uint8)
    [(_, [answer])] = finished_groups(generate(model, [([image], [[1, -1, 7, 8]])], 3, Sampling(stops=())))
    assert len(answer.tokens) == 3
    model.loss(to_device(gpu_checks.draw_batch(model, 0), gpu)).backward()
    assert all(parameter.grad.is_cuda for parameter in model.projector.parameters())


def test_a_classifier_has_the_cpu_s_numbers(gpu):
    rng, found = np.random.default_rng(0), []
    pixels = rng.integers(0, 256, (6, 224, 224, 3), np.uint8)
    split = Split(np.eye(3, dtype=bool)[[0, 1, 2, 0, 1, 2]], list("abcdef"), list("abcdef"), np.arange(6), None, pixels)
    config = train_cls.Config(epochs=1, batch_size=4, augment="light")
    for place in (CPU, gpu):
        torch.manual_seed(0)
        model = Classifier(ViT(CONFIGS["sample"][0]), 3, False).to(place)
        optimizer, plain = run.make_optimizer(model.rates(0.9), 0.01), autocast_to(place, torch.float32)
        loss = train_cls.train_epoch(model, optimizer, split, 0, config, plain)
        found.append(torch.tensor([loss, *model.predict(pixels, 4, plain).flatten()]))
    assert relative_error(found[1], found[0]) < 1e-4


@pytest.mark.parametrize("compile, triton, place, compiled", [
    (True, True, GPU, True), (False, True, GPU, False), (True, False, GPU, False), (True, True, CPU, False)])
def test_blocks_are_compiled_on_a_gpu_alone(compile, triton, place, compiled, gpu, monkeypatch):
    asked = []
    monkeypatch.setattr(run, "HAS_TRITON", triton)
    monkeypatch.setattr(run, "compile_blocks", asked.extend)
    model = gpu_checks.build("sample", 512, torch.float32, place)
    run.make_trainable(model, train_vlm.Config(vision="full", lora_targets="q_proj", compile=compile), None)
    assert asked == compiled * [*model.vision.blocks, *model.language.blocks] and model.flex == compile


def test_blocks_that_are_compiled_too_often_are_told(monkeypatch):
    """Else they would go on uncompiled, and give the right numbers."""
    def compile_blocks(blocks, **settings):
        kernels.compile_blocks(blocks, **settings)
        monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)

    monkeypatch.setattr(gpu_checks, "kernels", SimpleNamespace(**vars(kernels) | {"compile_blocks": compile_blocks}))
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        list(gpu_checks.check_family(CPU, "sample", torch.float32))
    torch._dynamo.reset()
