"""
Every batch works: whatever a step holds, whatever trains and however many processes share it, the step ends,
and leaves the parameters that one process has.
"""

import contextlib
import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

import model as model_file
import train_vlm
from data import IMAGE, SAMPLE, Mixture
from lora import lora_layers
from model import LlamaConfig, ViTConfig
from plumbing.machine import autocast_to

model_file.CONFIGS["tiny"] = (ViTConfig(image_size=32, width=64, depth=1), LlamaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2))
CPU, VOCABULARY = torch.device("cpu"), 64
STEPS = {  # numbers of samples; 0 to 5 are about images, two of which have two questions, 11 has an empty answer
    "no image": [6, 7, 8, 9, 10], "only images": [0, 1, 2, 3, 4], "one sample": [4], "one supervised token": [11],
    "text and images": [0, 1, 2, 6, 7, 8], "a rank without work": [0, 6]}
IMAGELESS = {"no image", "one supervised token"}
PARTS = [parts.split() for parts in (  # what trains of vision, projector and language
    "full full full", "full full lora", "full full frozen", "full frozen frozen", "lora full lora", "lora frozen full",
    "frozen full frozen", "frozen frozen lora")]
CASES = [(kind, tuple(parts), recompute, shard) for kind, parts, recompute, shard
         in itertools.product(STEPS, PARTS, (0, 1), (False, True))
         if not shard or parts in (PARTS[0], PARTS[4])]


class TinyShard:
    """What Mixture asks of a Shard, in memory: 12 samples, 6 of them about 4 images."""

    def __init__(self):
        random = np.random.default_rng(0)
        self.samples = np.zeros(12, SAMPLE)
        self.samples["image"] = [0, 0, 1, 1, 2, 3, *[-1] * 6]
        self.samples["prompt"], self.samples["answer"] = random.integers(2, 7, (2, 12))
        self.samples["answer"][11] = 0
        self.image_index = np.zeros(4, IMAGE)
        self.words = [random.integers(3, VOCABULARY, 20) for _ in self.samples]
        self.images = random.integers(0, 256, (4, 32, 32, 3), np.uint8)

    def __len__(self):
        return len(self.samples)

    def read_tokens(self, number):
        prompt, answer = (int(self.samples[part][number]) for part in ("prompt", "answer"))
        return self.words[number][:prompt], self.words[number][prompt:prompt + answer]

    def read_image(self, number):
        return self.images[number]


def mixture_of(**settings):
    return Mixture([TinyShard()], image_tokens=5, **{"batch_size": 12, "row_length": 48, **settings})


def pack(mixture, number, samples):
    """The Step of these samples, all questions of an image in one group."""
    images = mixture.shards[0].samples["image"]
    return mixture.pack(number, samples, [int(images[n]) if images[n] >= 0 else 100 + n for n in samples])


def config_of(parts=("full", "full", "full"), **changes):
    vision, projector, language = parts
    return train_vlm.Config(**{**dict(
        model="tiny", vision=vision, projector=projector, language=language, vision_weights="none",
        language_weights="none", lora_dropout=0.5, weight_decay=0.1), **changes})


def make(config):
    torch.manual_seed(0)
    with contextlib.redirect_stdout(None):
        model = train_vlm.make_model(config, SimpleNamespace(vocab_size=VOCABULARY), None, CPU, torch.float32)
        if config.shard:
            model.weights["language"] = "somewhere"  # as where LoRA has a base that is read from a file
            train_vlm.shard_language(model, config)
    for part in (model.vision, model.language):
        for layer in lora_layers(part).values():
            torch.nn.init.normal_(layer.lora_B, std=0.1)  # at 0 the other matrix would get no gradient
    optimizer = train_vlm.make_optimizer(model, config)
    for group in optimizer.param_groups:  # eps: so that no update hangs on the rounding of a gradient that is 0
        group["lr"], group["eps"] = 1e-2, 1e-3
    return model.train(), optimizer


def state_of(model, optimizer):
    """Each trained parameter and its moments, end to end, by name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {}
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        values = [parameter.detach(), *optimizer.state[parameter].values()]
        values = [value.full_tensor() if hasattr(value, "full_tensor") else value for value in values]
        found[names[parameter]] = torch.cat([value.flatten() for value in values])
    return found


def run_case(case, rank, ranks):
    """Three steps, the second of all kinds of samples: their losses and norms, and the states before and behind."""
    kind, parts, recompute, shard = case
    config = config_of(parts, recompute=recompute, shard=shard)
    model, optimizer = make(config)
    mixture = mixture_of(rank=rank, ranks=ranks)
    told, states = [], [state_of(model, optimizer)]
    for number, samples in enumerate((STEPS[kind], list(range(11)), STEPS[kind])):
        told += train_vlm.train_step(model, optimizer, pack(mixture, number, samples), config, CPU,
                                     autocast_to(CPU, torch.float32))
        states.append(state_of(model, optimizer))
    return torch.tensor(told), states


def work(rank, folder):
    """All cases in groups of 1, 2 and 3 processes, of which this is one; the first writes what it found."""
    torch.set_num_threads(1)
    for ranks in range(rank + 1, 4):
        found = {}
        for grouped in (False, True) if ranks == 1 else (True,):  # one process has a group with --shard=true alone
            if grouped:
                dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store_{ranks}", ranks), rank=rank,
                                        world_size=ranks)
            found |= {case: run_case(case, rank, ranks) for case in CASES if ranks > 1 or grouped == case[3]}
        dist.destroy_process_group()
        if rank == 0:
            torch.save(found, f"{folder}/{ranks}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each case gives on 1, 2 and 3 processes: [{case: (losses and norms, states)}, ...]."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(work, (folder,), nprocs=3)
    return [torch.load(folder / f"{ranks}.pt") for ranks in (1, 2, 3)]


@pytest.mark.parametrize("kind", STEPS)
def test_any_step_gives_any_number_of_processes_the_same_parameters(kind, found):
    for case in (case for case in CASES if case[0] == kind):
        one, *others = (results[case] for results in found)
        assert torch.isfinite(one[0]).all()
        for told, states in others:
            assert torch.allclose(told, one[0], rtol=1e-5, atol=1e-6), case
            for ours, theirs in zip(one[1], states):
                assert ours.keys() == theirs.keys()
                for name in ours:
                    assert ours[name].shape == theirs[name].shape, (case, name)
                    assert float((ours[name] - theirs[name]).abs().max()) < 1e-6, (case, name)


@pytest.mark.parametrize("kind", STEPS)
def test_a_step_leaves_what_it_has_not_reached_as_it_was(kind, found):
    for case, results in itertools.product([case for case in CASES if case[0] == kind], found):
        start, first, second, third = results[case][1]
        for name in start:
            reached = name.startswith("language.") or kind not in IMAGELESS
            for before, after in ((start, first), (second, third)):
                assert torch.equal(before[name], after[name]) == (not reached), (case, name)
            assert not torch.equal(first[name], second[name]), (case, name)
