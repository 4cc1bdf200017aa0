"""
Every batch works: whatever a step holds, whatever trains and however many processes share it, the step ends,
and leaves the parameters that one process has.
"""

import contextlib
import hashlib
import itertools
import json
import weakref
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
from plumbing.flags import UserError
from plumbing.devices import autocast_to

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


ORDERS = [  # settings of a Mixture, and the hash of four epochs' order
    (dict(), "62d9299a4d610163"), (dict(questions_per_image=0), "44b4a1f650312070"), (dict(questions_per_image=2, seed=5), "3e6d6206cc7f0ff1"),
    (dict(questions_per_image=0, weights=[0.5]), "f6a7a8663cbff42c")]


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


def make(config, dtype=torch.float32):
    """train_vlm.py's model and optimizer; dtype: of a language model that is not trained in full."""
    torch.manual_seed(0)
    with contextlib.redirect_stdout(None):
        model = train_vlm.make_model(config, SimpleNamespace(vocab_size=VOCABULARY), None, CPU, dtype)
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
    """Cases on 1, 2 and 3 processes, of which this is one: alone its third of them, then all that it is needed for."""
    torch.set_num_threads(1)
    alone = {case: run_case(case, 0, 1) for case in CASES[rank::3] if not case[3]}
    for ranks in (1, 2, 3):
        if rank >= ranks > 1:
            continue
        store = dist.FileStore(f"{folder}/store_{ranks}_{rank if ranks == 1 else 'all'}", ranks)
        dist.init_process_group("gloo", store=store, rank=rank if ranks > 1 else 0, world_size=ranks)
        if ranks == 1:
            found = alone | {case: run_case(case, 0, 1) for case in CASES[rank::3] if case[3]}
        else:
            found = {case: run_case(case, rank, ranks) for case in CASES}
        dist.destroy_process_group()
        if ranks == 1 or rank == 0:
            torch.save(found, f"{folder}/found_{ranks}_{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each case gives on 1, 2 and 3 processes: [{case: (losses and norms, states)}, ...]."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(work, (folder,), nprocs=3)
    parts = [[torch.load(path) for path in sorted(folder.glob(f"found_{ranks}_*"))] for ranks in (1, 2, 3)]
    results = [{case: result for part in some for case, result in part.items()} for some in parts]
    assert 3 * len(CASES) == sum(map(len, results)) >= 300
    return results


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


# ----------------------------------------------------------------------------- dropout

def loss_and_gradients(recompute=0.0, dropout=0.5, number=0, ranks=1, **settings):
    """Those of one step, cut in some way, its parts summed; LoRA everywhere it can be."""
    config = config_of(("lora", "full", "lora"), recompute=recompute, lora_dropout=dropout, lora_vision_targets="qkv,fc1",
                       lora_targets="q_proj,o_proj,down_proj,lm_head")
    model, _ = make(config)
    total = 0
    for rank in range(ranks):
        step = pack(mixture_of(rank=rank, ranks=ranks, **settings), number, range(11))
        for batch in step.batches:
            loss = model.loss(train_vlm.to_device(batch, CPU)) / step.supervised
            loss.backward()
            total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("cut", [dict(row_length=34), dict(row_length=200), dict(rows_per_batch=3), dict(ranks=2),
                                 dict(ranks=3, row_length=40), dict(recompute=1), dict(recompute=0.5, ranks=2)])
def test_dropout_is_the_same_however_a_step_is_cut(cut):
    (loss, gradients), (other, others) = loss_and_gradients(), loss_and_gradients(**cut)
    assert other == pytest.approx(loss, abs=1e-6)
    assert gradients.keys() == others.keys() and len(gradients) > 15
    for name in gradients:
        assert float((gradients[name] - others[name]).abs().max()) < 1e-6, name
    assert abs(loss - loss_and_gradients(dropout=0.0)[0]) > 1e-3 < abs(loss - loss_and_gradients(number=1)[0])


def test_steps_and_layers_drop_different_channels():
    """What is kept is a share of 1 - p, of each token and channel, and as good as independent between them."""
    config = config_of(("lora", "full", "lora"), lora_dropout=0.3)
    model, _ = make(config)
    layers = [*lora_layers(model.vision).values(), *lora_layers(model.language).values()]
    masks = []
    for number, seed in [(0, 0), (1, 0), (0, 1)]:
        batch = train_vlm.to_device(pack(mixture_of(row_length=400, seed=seed), number, range(11)).batches[0], CPU)
        keys = model_file.token_keys(batch.key, batch.positions)[batch.group >= 0]  # no padding
        for layer in layers:
            layer.keys.set(keys[None])
            kept = layer.drop(torch.ones(1, len(keys), 512))[0]
            assert set(kept.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.7))}
            masks.append((kept > 0).double())
    T, C = masks[0].shape
    for mask in masks:
        assert abs(mask.mean() - 0.7) < 4.5 * (0.21 / (T * C)) ** 0.5
        assert (mask.mean(1) - 0.7).abs().max() < 4.5 * (0.21 / C) ** 0.5  # of each token
        assert (mask.mean(0) - 0.7).abs().max() < 5 * (0.21 / T) ** 0.5  # of each channel
    flat = torch.stack([mask.flatten() for mask in masks])
    between = torch.corrcoef(flat) - torch.eye(len(masks))
    assert between.abs().max() < 5 / (T * C) ** 0.5
    tokens = torch.corrcoef(masks[0]) - torch.eye(T)
    assert tokens.abs().max() < 6 / C ** 0.5


def test_without_dropout_no_key_is_computed(monkeypatch):
    monkeypatch.setattr(model_file, "token_keys", None)
    assert np.isfinite(loss_and_gradients(dropout=0.0)[0])


# ----------------------------------------------------------------------------- the loader

def test_a_sample_that_comes_twice_is_in_another_group_each_time():
    for weight, limit in itertools.product((2, 1.5, 3), (0, 2)):
        mixture = mixture_of(weights=[weight], questions_per_image=limit)
        for epoch in range(3):
            samples, groups = mixture.epoch_order(epoch)
            assert len(samples) == round(12 * weight)
            assert len(set(zip(samples.tolist(), groups.tolist()))) == len(samples)
            if weight != 1.5:
                assert set(np.bincount(samples)) == {weight}


@pytest.mark.parametrize("settings, order", ORDERS)
def test_the_order_of_what_comes_once_is_as_it_was(settings, order):
    found = [np.stack(mixture_of(**settings).epoch_order(epoch)).tolist() for epoch in range(4)]
    assert hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16] == order


def test_other_rows_are_free_where_they_change_no_sample():
    mixture = mixture_of(row_length=48)
    longest = int((mixture.shards[0].samples["prompt"] + mixture.shards[0].samples["answer"]).max()) + 6
    assert mixture.fits_alike(4096) and mixture.fits_alike(longest) and not mixture.fits_alike(longest - 6)
    short = mixture_of(row_length=12)
    assert (short.cut or short.too_long) and short.fits_alike(12) and not short.fits_alike(13)


def test_data_without_an_image_and_a_frozen_language_model_are_refused(monkeypatch):
    shard = TinyShard()
    shard.samples["image"], shard.folder = -1, "words/train"
    mixture = Mixture([shard], 5, row_length=48, leaks=[("drop", np.zeros(0, np.int64))])
    monkeypatch.setattr(train_vlm, "open_mixture", lambda *arguments, **settings: mixture)
    with pytest.raises(UserError, match="--language=frozen: no sample of --data=words has an image"):
        train_vlm.open_data(config_of(("full", "full", "frozen"), data="words"))


# ----------------------------------------------------------------------------- what is compiled, and the cache

def test_no_batch_is_compiled_for_anew_once_each_kind_has_been(monkeypatch):
    """Training and evaluation on rows of many lengths, and answers, as on a GPU, but for the kernels."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda q, k, v: None)  # no backward
    monkeypatch.setattr(model_file, "compiled_flex_attention", torch.compile(
        model_file.flex_attention, backend="eager", dynamic=True))
    monkeypatch.setattr(model_file, "compiled_create_block_mask", model_file.create_block_mask)
    monkeypatch.setattr(model_file, "packed_mask", lambda group, question, flex: model_file.block_mask(group, question))
    monkeypatch.setattr(model_file.Linear, "forward", torch.nn.Linear.forward)  # which asks a CPU for its threads
    config = config_of(("full", "full", "lora"), lora_targets="q_proj")
    model, optimizer = make(config)
    model_file.compile_blocks([*model.vision.blocks, *model.language.model.layers], backend="eager")
    stats, plain = torch._dynamo.utils.counters["stats"], contextlib.nullcontext()

    def train(row_length, rows, samples):
        mixture = mixture_of(row_length=row_length, rows_per_batch=rows)
        step = pack(mixture, 0, samples)
        assert {len(batch.tokens) for batch in step.batches} <= {1, rows}
        train_vlm.train_step(model, optimizer, step, config, CPU, plain)
        with torch.no_grad():
            model.eval()(train_vlm.to_device(step.batches[0], CPU))
        list(model.generate([(mixture.shards[0].images[0], [[5] * row_length])], max_new_tokens=2))
        model.train()

    for row_length, rows in ((200, 1), (36, 2), (40, 1)):
        train(row_length, rows, range(11))
    kinds = stats["unique_graphs"]
    for number in range(4):
        train(44 + 8 * number, 1 + number % 2, [*range(number, 11), *range(number % 2)])
        assert stats["unique_graphs"] == kinds <= 16
    assert not torch._dynamo.utils.counters["recompile_limit"] and not torch._dynamo.utils.counters["graph_break"]


def test_without_compile_attention_is_not_compiled_either(monkeypatch):
    model, _ = make(config_of(compile=False))
    asked = []
    monkeypatch.setattr(model_file, "block_mask", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(model_file, "HAS_TRITON", True)
    group = SimpleNamespace(is_cuda=True)
    model_file.packed_mask(group, None, make(config_of(compile=True))[0].flex)
    assert len(asked) == 1
    monkeypatch.setattr(model_file, "group_masks", lambda *arguments: "one by one")
    assert model_file.packed_mask(group, None, model.flex) == "one by one" and len(asked) == 1


def test_the_cache_grows_one_tensor_at_a_time(monkeypatch):
    """While a layer's keys are copied into more slots, no other tensor of the cache is there twice."""
    config = replace(model_file.CONFIGS["tiny"][1], num_hidden_layers=6)
    cache, grown, pad = model_file.Cache(config, 4, torch.float32, CPU), [], model_file.F.pad

    def watched(tensor, *arguments):
        if tensor.dim() == 4:  # of a layer
            lengths = [other.shape[2] for layer in cache.layers for other in layer]
            grown.append(lengths)
        return pad(tensor, *arguments)

    monkeypatch.setattr(model_file.F, "pad", watched)
    for _ in range(3):
        cache.place(np.zeros(70, np.int64), np.zeros(70, np.int64))
        before = [weakref.ref(tensor) for layer in cache.layers for tensor in layer]
        assert len({layer[0].shape[2] for layer in cache.layers}) == 1  # place() has grown none
        for layer in range(6):
            alive = sum(reference() is not None for reference in before)
            assert alive == 12 - 2 * layer
            k, v = cache.store(layer, *torch.ones(2, 1, 2, 70, 16))
            assert k.shape == v.shape and k[0, :, :cache.used[0]].eq(1).all()
    assert len(grown) == 3 * 12
