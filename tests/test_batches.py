"""
Every batch works: whatever a step holds, whatever trains and however many processes share it, the step ends,
and leaves the parameters that one process has.
"""

import contextlib
import hashlib
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

import model as model_file
import train_vlm
from data import BOS, EOS, Mixture
from generate import generate
from lora import lora_layers, token_keys
from model import LlamaConfig, ViT, ViTConfig
from plumbing import kernels
from plumbing.devices import autocast_to, to_device
from plumbing.flags import UserError
from plumbing.shards import IMAGE, SAMPLE, Sample, Shard
from plumbing.sources import settle
from run import even_out, make_optimizer

model_file.CONFIGS["tiny"] = (ViTConfig(image_size=32, width=64, depth=1), LlamaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2))
CPU, VOCABULARY, RATE = torch.device("cpu"), 64, 1e-2
STEPS = {  # numbers of samples; 0 to 5 are about images, two of which have two questions, 11 has an empty answer
    "no image": [6, 7, 8, 9, 10], "only images": [0, 1, 2, 3, 4], "one sample": [4], "one supervised token": [11],
    "text and images": [0, 1, 2, 6, 7, 8], "a rank without work": [0, 6]}
IMAGELESS = ("no image", "one supervised token")
PARTS = [tuple(parts.split()) for parts in (  # what trains of vision, projector and language
    "full full full", "full full lora", "full full frozen", "full frozen frozen", "lora full lora",
    "lora frozen full", "frozen full frozen", "frozen frozen lora")]
KINDS = [*IMAGELESS, *(kind for kind in STEPS if kind not in IMAGELESS), "all of them", *IMAGELESS]  # of a run
CASES = [(parts, recompute, shard) for parts, recompute, shard in itertools.product(PARTS, (0, 1), (False, True))
         if not shard or parts in (PARTS[0], PARTS[4])]


ORDERS = [  # settings of a Mixture, and the hash of four epochs' order
    (dict(), "62d9299a4d610163"), (dict(questions_per_image=0), "44b4a1f650312070"),
    (dict(questions_per_image=2, seed=5), "3e6d6206cc7f0ff1"),
    (dict(questions_per_image=0, weights=[0.5]), "f6a7a8663cbff42c")]


class TinyShard(Shard):
    """A shard in memory: 12 samples, 6 of them about 4 images."""

    def __init__(self):
        random, self.folder = np.random.default_rng(0), "words/train"
        image = np.array([0, 0, 1, 1, 2, 3, *[-1] * 6])
        prompts, answers = random.integers(2, 7, (2, 12))
        answers[11] = 0
        self.words = [random.integers(3, VOCABULARY, 20) for _ in image]
        self.images = random.integers(0, 256, (4, 32, 32, 3), np.uint8)
        self.image_index, self.samples = np.zeros(4, IMAGE), np.zeros(12, SAMPLE)
        self.image_index["height"] = self.image_index["width"] = 32
        begin = 1 + (image >= 0)  # of the prompt's text, behind <bos> and the image
        columns = {"image": image, "images": image >= 0, "parts": np.minimum(np.arange(12), 6), "head": begin,
                   "prompt": begin + prompts, "length": begin + prompts + answers + 1,
                   "prefix": [0, 0, 2, 2, *range(4, 12)]}
        for name, values in columns.items():
            self.samples[name] = values
        self.parts = image[:6].astype("<i4")

    def read_sample(self, number):
        image, head, prompt, length = self.samples[number][["image", "head", "prompt", "length"]].tolist()
        begin = [BOS] if image < 0 else [BOS, -1 - image]
        tokens = np.array([*begin, *self.words[number][:length - head - 1], EOS])
        return Sample(tokens, np.array([[prompt, length]]), head)

    def read_image(self, number):
        return self.images[number]


def count_tokens(heights, widths):
    return heights // 16 * (widths // 16) + 1


def mixture_of(**settings):
    settings = {"batch_size": 12, "max_length": 48, "micro_batch_tokens": 48, **settings}
    return Mixture([TinyShard()], count_tokens, **settings)


def pack(mixture, number, samples):
    """The Step of these samples, all questions of an image in one group."""
    return mixture.pack(number, samples, mixture.shards[0].samples["prefix"][samples].tolist())


def config_of(parts=("full", "full", "full"), **changes):
    vision, projector, language = parts
    return settle(train_vlm.Config(**{**dict(
        model="tiny", vision=vision, projector=projector, language=language, vision_weights="none",
        language_weights="none", lora_dropout=0.5, weight_decay=0.1), **changes}))


def make(config, dtype=torch.float32):
    """train_vlm.py's model and optimizer; dtype: of a language model that is not trained in full."""
    torch.manual_seed(0)
    with contextlib.redirect_stdout(None):
        model = train_vlm.load_parts(config, SimpleNamespace(vocab_size=VOCABULARY, sha256=""), {"resize": "squash"},
                                     None, CPU, dtype)
        train_vlm.make_trainable(model, config, None)
    for part in (model.vision, model.language):
        for layer in lora_layers(part).values():
            torch.nn.init.normal_(layer.lora_B, std=0.1)  # at 0 the other matrix would get no gradient
    optimizer = make_optimizer(train_vlm.trained_parameters(model, config), config.weight_decay)
    for group in optimizer.param_groups:  # so that no update hangs on the rounding of a gradient that is 0
        group["eps"] = 1e-3
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


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loss_weighted_by_length_is_internvl_s(ranks):
    """sum w ce / sum w over all targets of a step, w = 1 / root of its sample's targets (arXiv 2412.05271, 3.2)."""
    samples = [0, 1, 2, 3, 7, 8, 9]
    steps = [pack(mixture_of(loss_weight="square", rank=rank, ranks=ranks), 0, samples) for rank in range(ranks)]
    total = weights = 0
    for sample in map(TinyShard().read_sample, samples):
        (begin, end), = sample.spans.tolist()
        weight = (end - begin) ** -0.5
        total += weight * sum(map(cross_entropy, sample.tokens[begin:end].tolist()))
        weights += weight * (end - begin)
    here = sum((batch.weights * [*map(cross_entropy, batch.targets.tolist())]).sum() for step in steps
               for batch in step.batches)
    assert here / steps[0].divisor == pytest.approx(total / weights, rel=1e-6)
    assert {step.divisor for step in steps} == {pack(mixture_of(loss_weight="square"), 0, samples).divisor}
    plain = pack(mixture_of(), 0, samples)
    assert plain.divisor == sum(len(batch.targets) for batch in plain.batches) != steps[0].divisor


def cross_entropy(token):
    """A model's at a target, whichever."""
    return 1 + token % 7


def run_case(case, rank, ranks):
    """A step of each of KINDS: the losses and norms, and the states before and behind, as many and one more."""
    parts, recompute, shard = case
    config = config_of(parts, recompute=recompute, shard=shard)
    model, optimizer = make(config)
    mixture = mixture_of(rank=rank, ranks=ranks, micro_batch_tokens=72)
    numbers, states = [], [state_of(model, optimizer)]
    for number, kind in enumerate(KINDS):
        step = pack(mixture, number, STEPS.get(kind, list(range(11))))
        if shard:
            step.batches = even_out(step.batches, CPU)
        numbers.append(train_vlm.train_step(model, optimizer, step, RATE, config, autocast_to(CPU, torch.float32)))
        states.append(state_of(model, optimizer))
    return torch.tensor(numbers), states


def work(rank, folder):
    """Cases on 1, 2 and 3 processes, of which this is one: alone a third of them, then all that need it."""
    torch.set_num_threads(1)
    for ranks in (1, 2, 3):
        if rank >= ranks > 1:
            continue
        mine = CASES[rank::3] if ranks == 1 else CASES
        results = {case: run_case(case, 0, 1) for case in mine if ranks == 1 and not case[2]}
        store = dist.FileStore(f"{folder}/store_{ranks}_{rank if ranks == 1 else 'all'}", ranks)
        dist.init_process_group("gloo", store=store, rank=rank if ranks > 1 else 0, world_size=ranks)
        results |= {case: run_case(case, rank if ranks > 1 else 0, ranks) for case in mine if case not in results}
        dist.destroy_process_group()
        if ranks == 1 or rank == 0:
            torch.save(results, f"{folder}/results_{ranks}_{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each case gives on 1, 2 and 3 processes: [{case: (losses and norms, states)}, ...]."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(work, (folder,), nprocs=3)
    parts = [[torch.load(path) for path in sorted(folder.glob(f"results_{ranks}_*"))] for ranks in (1, 2, 3)]
    results = [{case: result for part in some for case, result in part.items()} for some in parts]
    assert all(some.keys() == set(CASES) for some in results) and len(CASES) * len(KINDS) >= 180
    return results


def places(kind):
    """At which of a run's steps a kind of step comes."""
    return [place for place, other in enumerate(KINDS) if other == kind]


@pytest.mark.parametrize("kind", [*STEPS, "all of them"])
def test_any_step_gives_any_number_of_processes_the_same_parameters(kind, results):
    for case, place in itertools.product(CASES, places(kind)):
        one, *others = (some[case] for some in results)
        assert torch.isfinite(one[0][place]).all()
        for numbers, states in others:
            assert torch.allclose(numbers[place], one[0][place], rtol=1e-5, atol=1e-6), case
            ours, theirs = states[place + 1], one[1][place + 1]
            assert ours.keys() == theirs.keys()
            for name in ours:
                assert ours[name].shape == theirs[name].shape, (case, name)
                assert float((ours[name] - theirs[name]).abs().max()) < 1e-6, (case, name)


@pytest.mark.parametrize("kind", [*STEPS, "all of them"])
def test_a_step_leaves_what_it_has_not_reached_as_it_was(kind, results):
    for case, some, place in itertools.product(CASES, results, places(kind)):
        before, after = some[case][1][place:place + 2]
        for name in before:
            reached = name.startswith("language.") or kind not in IMAGELESS
            assert torch.equal(before[name], after[name]) == (not reached), (case, name)


# ----------------------------------------------------------------------------- dropout

def loss_and_gradients(recompute=0.0, dropout=0.5, number=0, ranks=1, **settings):
    """Those of one step, cut in some way, its parts summed; LoRA everywhere it can be."""
    config = config_of(("lora", "full", "lora"), recompute=recompute, lora_dropout=dropout,
                       lora_vision_targets="qkv,fc1", lora_targets="q_proj,o_proj,down_proj,lm_head")
    model, _ = make(config)
    total = 0
    for rank in range(ranks):
        step = pack(mixture_of(rank=rank, ranks=ranks, **settings), number, list(range(11)))
        for batch in step.batches:
            loss = model.loss(to_device(batch, CPU)) / step.divisor
            loss.backward()
            total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("cut", [
    dict(max_length=34), dict(micro_batch_tokens=200), dict(micro_batch_tokens=20), dict(ranks=2),
    dict(ranks=3, micro_batch_tokens=40), dict(recompute=1), dict(recompute=0.5, ranks=2)])
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
        step = pack(mixture_of(micro_batch_tokens=400, seed=seed), number, list(range(11)))
        batch = to_device(step.batches[0], CPU)
        keys = token_keys(batch.key, batch.positions)[batch.group >= 0]  # no padding
        for layer in layers:
            layer.keys.set(keys)
            raised = layer.drop(torch.ones(len(keys), 512))
            assert set(raised.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.7))}
            masks.append((raised > 0).double())
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
    orders = [np.stack(mixture_of(**settings).epoch_order(epoch)).tolist() for epoch in range(4)]
    assert hashlib.sha256(json.dumps(orders).encode()).hexdigest()[:16] == order


def test_data_without_an_image_and_a_frozen_language_model_are_refused(monkeypatch):
    mixture = mixture_of(leaks=[("drop", np.arange(6))])
    monkeypatch.setattr(train_vlm, "Mixture", lambda **settings: mixture)
    with pytest.raises(UserError, match="--language=frozen: no sample of --data=words has an image"):
        train_vlm.open_data(config_of(("full", "full", "frozen"), data="words"), {}, ViT(ViTConfig(depth=0)), CPU)


# ----------------------------------------------------------------------------- what is compiled, and the cache

def test_no_batch_is_compiled_for_anew_once_each_kind_has_been(monkeypatch):
    """Training and evaluation on sequences of many lengths, and answers, as on a GPU, but for the kernels."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda q, k, v: None)  # no backward
    monkeypatch.setattr(model_file, "compiled_flex_attention", torch.compile(
        kernels.flex_attention, backend="eager", dynamic=True))
    monkeypatch.setattr(model_file, "compiled_create_block_mask", kernels.create_block_mask)
    monkeypatch.setattr(model_file, "packed_mask",
                        lambda group, branch, flex: model_file.block_mask(group, branch))
    monkeypatch.setattr(kernels.Linear, "forward", torch.nn.Linear.forward)  # which asks a CPU for its threads
    config = config_of(("full", "full", "lora"), lora_targets="q_proj")
    model, optimizer = make(config)
    kernels.compile_blocks([*model.vision.blocks, *model.language.blocks], backend="eager")
    stats, plain = torch._dynamo.utils.counters["stats"], contextlib.nullcontext()

    def train(micro_batch_tokens, multiple, samples):
        mixture = mixture_of(micro_batch_tokens=micro_batch_tokens, multiple=multiple)
        step = pack(mixture, 0, samples)
        train_vlm.train_step(model, optimizer, step, RATE, config, plain)
        with torch.no_grad():
            model.eval()(to_device(step.batches[0], CPU))
        list(generate(model, [([mixture.shards[0].images[0]], [[BOS, -1, *[5] * micro_batch_tokens]])], 2))
        model.train()
        return [len(batch.tokens) for batch in step.batches], [len(batch.images) for batch in step.batches]

    for micro_batch_tokens, multiple in ((200, 1), (36, 2), (40, 1)):
        train(micro_batch_tokens, multiple, list(range(11)))
    kinds, lengths, images = stats["unique_graphs"], set(), set()
    for number in range(4):
        some, shown = train(24 + 8 * number, 1 + number % 2, [*range(number, 11), *range(number % 2)])
        lengths, images = lengths | set(some), images | set(shown)
        assert stats["unique_graphs"] == kinds <= 16
    assert len(lengths) > 6 and images == {0, 1, 2, 3}
    assert not torch._dynamo.utils.counters["recompile_limit"] and not torch._dynamo.utils.counters["graph_break"]


def test_flex_attention_is_compiled_when_it_is_called_or_with_the_block_that_calls_it(monkeypatch):
    called, x = [], torch.ones(2)
    monkeypatch.setattr(kernels, "HAS_TRITON", True)
    monkeypatch.setattr(kernels, "compiled", lambda function: called.append(function) or function)
    block = torch.compile(lambda x: kernels.call_compiled(torch.neg, x), backend="eager", fullgraph=True)
    assert torch.equal(block(x), -x) and not called
    assert torch.equal(kernels.call_compiled(torch.neg, x), -x) and called == [torch.neg]


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
