"""The packed loader: gradients equal to samples run one at a time, an order that can be redone."""

import functools
import hashlib
import io
import os
import re
import zlib
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import model as model_file
from data import BOS, EOS, Batch, Group, Mixture, Record, View, make_batch, shared_prefix, write_plain
from lora import add_lora
from model import LLaMA, VLM, ViT, attend, block_mask, group_masks
from plumbing import kernels
from plumbing.devices import to_device
from plumbing.flags import UserError
from plumbing.order import in_background
from plumbing.shards import IMAGE, PROMPT_VERSION, SAMPLE, SHARD_VERSION, Shard
from plumbing.sources import open_shards
from prepare.leaks import guard
from prepare.shards import ImageSettings, SplitWriter, encode_image
from test_model import LLAMA, TOLERANCE, VIT, randomise, relative_error

VOCABULARY = 300
N = 5  # tokens of an image of 16 x 16


def count_tokens(heights, widths):
    """Those of VIT, which has patches of 8 x 8."""
    return heights // 8 * (widths // 8) + 1


# ----------------------------------------------------------------------------- shards of numbers

class Numbers:
    """A tokenizer that reads the numbers of a text alone, each the token of that id."""
    vocab_size = VOCABULARY

    @staticmethod
    def encode(text):
        return [int(number) for number in re.findall(r"\d+", text)]

    @staticmethod
    def write(record):
        return write_plain(record, Numbers.encode)


def words(tokens):
    return " ".join(map(str, tokens))


def as_file(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_records(folder, records, resize="squash", size=16, tokenizer="one", kind="image questions"):
    """A shard as prepare/ writes it, whose images are stored without a loss."""
    def encode(content):
        future = Future()
        future.set_result(encode_image(content, ImageSettings(size, resize, "png", 0)))
        return future

    asks = kind != "classification"
    folder.parent.mkdir(parents=True, exist_ok=True)
    writer = SplitWriter(folder, SimpleNamespace(kind=kind, asks=asks, classes=("none",), multi_label=False),
                         Numbers, encode, 4)
    for record in records:
        writer.add(record)
    writer.close({"shard_version": SHARD_VERSION, "prompt_version": PROMPT_VERSION, "tokenizer_sha256": tokenizer,
                  "image": {"size": size, "resize": resize}})
    assert writer.samples == len(records), writer.skipped
    return Shard(folder)


def write_shard(folder, samples, images=(), **settings):
    """A shard of short records. samples: (prompt, answer, image number or -1)."""
    files = [as_file(image) for image in images]
    records = [Record(str(number), words(prompt), words(answer), files[image] if image >= 0 else None)
               for number, (prompt, answer, image) in enumerate(samples)]
    kind = "image questions" if all(image >= 0 for *_, image in samples) else "text questions"
    return write_records(folder, records, **{"kind": kind, **settings})


def random_images(rng, count):
    return list(rng.integers(0, 256, (count, 16, 16, 3), np.uint8))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two shards of 40 + 24 samples, and the raw (prompt, answer, pixels or None) of each."""
    rng, shards, raw = np.random.default_rng(0), [], {}
    for name, with_image, text_only, image_count in [("a", 34, 6, 11), ("b", 14, 10, 5)]:
        images = random_images(rng, image_count)
        about = [*range(image_count), *rng.integers(0, image_count, with_image - image_count)]
        samples = [(rng.integers(3, VOCABULARY, rng.integers(2, 9)).tolist(),
                    rng.integers(3, VOCABULARY, rng.integers(1, 5)).tolist(), int(image))
                   for image in rng.permutation([*about, *[-1] * text_only])]
        shards.append(write_shard(tmp_path_factory.mktemp("shards") / name, samples, images))
        for number, (prompt, answer, image) in enumerate(samples):
            raw[shards[-1], number] = prompt, answer, images[image] if image >= 0 else None
    return SimpleNamespace(shards=shards, raw=raw)


def mix(corpus, **settings):
    settings = {"batch_size": 7, "max_length": 40, "micro_batch_tokens": 120, **settings}
    return Mixture(corpus.shards, count_tokens, **settings)


def tensors(batch):
    return to_device(batch, torch.device("cpu"))


def tiny_vlm(train="full"):
    torch.manual_seed(0)
    model = VLM(ViT(VIT), LLaMA(replace(LLAMA, vocab_size=VOCABULARY)))
    if train == "lora":
        add_lora(model.language, "q_proj,v_proj", r=4)
    return randomise(model)


# ----------------------------------------------------------------------------- samples one at a time

@dataclass
class Raw:
    """A sample as a person would write it down: numbers, pixels, and which numbers are answers."""
    parts: list  # lists of tokens and images, (H, W, 3) uint8, before the first question
    turns: list  # (tokens of a question, tokens of its answer)
    cut: int = 0  # tokens that go at the front of the first question where it is too long
    weight: float = 1.0

    def stream(self):
        """Tokens and images in their order, and whether each is predicted."""
        tokens, predicted = [BOS], [False]
        for part in self.parts:
            tokens += part if isinstance(part, list) else [part]
            predicted += [False] * (len(part) if isinstance(part, list) else 1)
        for number, (question, answer) in enumerate(self.turns):
            question = question[self.cut:] if number == 0 else question
            tokens += [*question, *answer, EOS]
            predicted += [False] * len(question) + [True] * (len(answer) + 1)
        return tokens, predicted


def run_alone(model, raw):
    """Summed cross-entropy of one sample in a sequence of its own, times its weight: without data.py and masks."""
    tokens, encoded, image_at, at, targets = [], [], [], [], []
    for token, predicted in zip(*raw.stream()):
        if predicted:
            at.append(len(tokens) - 1)
            targets.append(token)
        if isinstance(token, int):
            tokens.append(token)
            continue
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
        deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
        pixels = (torch.tensor(token).permute(2, 0, 1) / 255 - mean) / deviation
        encoded.append(model.projector(model.vision(pixels[None]))[0])
        image_at += range(len(tokens), len(tokens) + len(encoded[-1]))
        tokens += [0] * len(encoded[-1])
    shown = (torch.cat(encoded), torch.tensor(image_at)) if encoded else (None, None)
    logits = model.language(torch.tensor(tokens), None, None, None, *shown)[at]
    return raw.weight * F.cross_entropy(logits, torch.tensor(targets), reduction="sum")


def loss_alone(model, prompt, answer, pixels):
    """The same of a prompt and its answer, with an image in front or none."""
    return run_alone(model, Raw([] if pixels is None else [pixels], [(prompt, answer)]))


@pytest.fixture
def double(monkeypatch):
    """All of it in float64, even what is in float32 whatever the weights are: rounding hides nothing."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ----------------------------------------------------------------------------- packing is exact

MAX_LENGTH = 140  # tokens, at which some of the long prompts are cut


def mixed_samples():
    """
    {name: [Raw, ...]} of all that a sample can be, and a Record of each: the samples of a list begin alike.
    Images are 64 pixels along the longest side, 33 or 65 tokens.
    """
    rng = np.random.default_rng(3)

    def text(count):
        return rng.integers(3, VOCABULARY, count).tolist()

    def image(height, width):
        return rng.integers(0, 256, (height, width, 3), np.uint8)

    def turns(count=1):
        return [(text(3), text(2)) for _ in range(count)]

    one, tall, wide, large = image(32, 64), image(64, 32), image(32, 64), image(64, 64)
    study = [[201], one, text(4), [202], tall, [203], wide, text(6)]
    context, history, asked = text(30), text(20), text(5)
    return {
        "one image": [Raw([large], turns(), weight=weight) for weight in (1, 1, 2.5)],
        "three images with roles, text between them": [Raw(study, turns()) for _ in range(3)],
        "the same study with another last image": [Raw([*study[:-2], image(32, 64), study[-1]], turns())],
        "text alone": [Raw([], turns()), Raw([], turns(), weight=-0.5)],
        "one context": [Raw([], [(context + text(count), text(4))]) for count in (3, 7, 2)],
        "one context, some cut": [Raw([], [(history + text(count), text(4))], cut=cut, weight=weight)
                                  for count, cut, weight in ((20, 0, 1), (118, 3, -1), (131, 16, 1), (117, 2, 1))],
        "conversations": [Raw([tall], turns(3)), Raw([tall], turns(3), weight=0.25)],
        "conversations of words": [Raw([], turns(3))],
        "answers to one prompt": [Raw([wide], [(asked, text(count))], weight=weight)
                                  for count, weight in ((3, 1.25), (6, -0.75), (1, 0.0), (2, -0.625))],
        "a prompt cut behind its image": [Raw([one, [204], large], [(text(54), text(3))], cut=17)]}


def record_of(raw):
    """As prepare/ would read it: a number of its own in front of an image is its role, others are text between."""
    parts, role = [], ""
    for part in raw.parts:
        if isinstance(part, list) and len(part) == 1:
            role = words(part)
        else:
            parts.append(words(part) if isinstance(part, list) else View(as_file(part), role=role))
            role = ""
    (question, answer), *more = ((words(question), words(answer)) for question, answer in raw.turns)
    if len(parts) == 1 and not parts[0].role:
        return Record("", question, answer, parts[0].image, turns=tuple(more))
    return Record("", question, answer, parts=tuple(parts), turns=tuple(more))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A shard of these samples, in random order, and the Raw of each, with its weight as its Sample has it."""
    samples = [(name, raw) for name, some in mixed_samples().items() for raw in some]
    samples = [samples[n] for n in np.random.default_rng(0).permutation(len(samples))]
    records = []
    for name, raw in samples:
        record = record_of(raw)
        if name.startswith("one context"):  # which is the question's beginning, kept apart
            tokens, count = Numbers.encode(record.question), 30 if name == "one context" else 20
            record = replace(record, context=words(tokens[:count]), question=words(tokens[count:]))
        records.append(record)
    shard = write_records(tmp_path_factory.mktemp("mixed") / "train", records, "fit", 64, kind="text questions")
    shard.read_sample = lambda number: replace(Shard.read_sample(shard, number), weight=samples[number][1].weight)
    return SimpleNamespace(shards=[shard], raw=[raw for _, raw in samples], names=[name for name, _ in samples])


def gradients_of(model):
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return gradients


def learn(model, step):
    """The loss of a Step and its gradients."""
    total = 0
    for batch in step.batches:
        loss = model.loss(tensors(batch)) / step.divisor
        loss.backward()
        total += loss.detach()
    return total, gradients_of(model)


def require_alike(step, train, raws):
    """Assert that a Step's loss and gradients are those of these samples, run one at a time."""
    model = tiny_vlm(train)
    total, packed = learn(model, step)
    supervised = sum(sum(raw.stream()[1]) for raw in raws)
    alone = sum(run_alone(model, raw) for raw in raws) / supervised
    alone.backward()
    assert step.divisor == supervised and len(step.samples) == len(raws)
    assert relative_error(total, alone.detach()) < 1e-10
    for name, gradient in gradients_of(model).items():
        frozen = train == "lora" and name.startswith("language.") and "lora_" not in name
        assert (packed[name] is None) == (gradient is None) == frozen, name
        assert frozen or relative_error(packed[name], gradient) < 1e-10, name


@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize("questions_per_image", [0, 1, 3])
def test_packed_loss_and_gradients_equal_samples_run_alone(questions_per_image, train, corpus, double):
    step = mix(corpus, batch_size=64, questions_per_image=questions_per_image).step(0)
    assert len(step.batches) > 2 and len(np.unique(step.batches[0].group)) > 2
    require_alike(step, train, [Raw([] if pixels is None else [pixels], [(prompt, answer)])
                                for prompt, answer, pixels in corpus.raw.values()])


@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize("questions_per_image, micro_batch_tokens", [(0, 200), (0, 100_000), (1, 300), (2, 150)])
def test_packing_is_exact_whatever_a_sample_is_made_of(questions_per_image, micro_batch_tokens, train, mixed,
                                                       double):
    mixture = mix(mixed, batch_size=len(mixed.raw), max_length=MAX_LENGTH, micro_batch_tokens=micro_batch_tokens,
                  questions_per_image=questions_per_image, multiple=16)
    assert mixture.cut == sum(raw.cut > 0 for raw in mixed.raw) and not mixture.too_long
    step = mixture.step(0)
    shared = max(batch.branch.max() for batch in step.batches)
    assert (shared == 0) if questions_per_image == 1 else (shared > 1)
    assert (len(step.batches) == 1) == (micro_batch_tokens == 100_000) and step.padded > 0
    require_alike(step, train, mixed.raw)


def test_weights_of_one_are_the_plain_loss_and_others_weigh(mixed, double):
    """So that weights are seen to be there at all: without them the loss is another one."""
    step, model = mix(mixed, batch_size=len(mixed.raw), max_length=MAX_LENGTH).step(0), tiny_vlm()
    plain = [replace(batch, weights=np.ones_like(batch.weights)) for batch in step.batches]
    loss, _ = learn(model, replace(step, batches=plain))
    alone = sum(run_alone(model, replace(raw, weight=1.0)) for raw in mixed.raw).detach()
    assert relative_error(loss * step.divisor, alone) < 1e-10
    assert abs(loss - learn(model, step)[0]) > 0.01
    halved, _ = learn(model, replace(step, batches=plain, divisor=2 * step.divisor))
    assert relative_error(halved, loss / 2) < 1e-10  # the divisor is the step's to name


def test_samples_share_what_they_begin_with_up_to_the_first_difference(mixed):
    """Of each kind: tokens of the prefix that stand there once, and of all branches."""
    numbers = {name: [n for n, other in enumerate(mixed.names) if other == name] for name in mixed_samples()}
    shared = {}
    for name, some in numbers.items():
        mixture = mix(mixed, max_length=MAX_LENGTH)
        samples = [mixture.read(n)[2] for n in some]
        batch = make_batch([Group(samples, shared_prefix(samples), 0, mixture.image_tokens[0],
                                  mixed.shards[0].read_image)])
        assert (batch.group == 0).all() and batch.branch.max() == (len(some) if len(some) > 1 else 0)
        lengths = [sum(1 if isinstance(token, int) else count_tokens(*token.shape[:2])
                       for token in mixed.raw[n].stream()[0][:-1]) for n in some]
        shared[name] = int((batch.branch == 0).sum()) if len(some) > 1 else 0
        assert len(batch.tokens) == sum(lengths) - shared[name] * (len(some) - 1)
        images = {id(part) for n in some for part in mixed.raw[n].parts if not isinstance(part, list)}
        assert len(batch.images) == len(images)
    study = 1 + 1 + 33 + 4 + 1 + 33 + 1 + 33 + 6
    assert shared == {
        "one image": 1 + 65, "three images with roles, text between them": study, "text alone": 1,
        "one context": 1 + 30,
        "the same study with another last image": 0, "one context, some cut": 1, "conversations": 1 + 33,
        "conversations of words": 0, "a prompt cut behind its image": 0,
        "answers to one prompt": 1 + 33 + 4}  # all of the prompt but its last token


def seen_by_hand(group, branch):
    """The dense (T, T) mask of a packed sequence, from a loop over what each token may see."""
    T = len(group)
    seen = torch.zeros(T, T, dtype=torch.bool)
    for at in range(T):
        for other in range(at + 1):
            seen[at, other] = bool(group[at] == group[other] and branch[other] in (0, branch[at]))
    return seen


@pytest.mark.parametrize("way", ["groups", "flex"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_of_packed_groups_is_the_dense_one_either_way(way, kv_heads, corpus, monkeypatch):
    """FlexAttention as it is without torch.compile, which on a CPU has no backward pass."""
    monkeypatch.setattr(kernels, "BUNDLE", 16)
    for name in ("flex_attention", "create_block_mask"):
        monkeypatch.setattr(model_file, f"compiled_{name}", getattr(kernels, name))
    torch.manual_seed(0)
    for batch in mix(corpus, batch_size=64, questions_per_image=3, multiple=43).step(0).batches[:2]:
        group, branch = torch.from_numpy(batch.group), torch.from_numpy(batch.branch)
        assert (branch > 1).any() and (group == -1).any()
        T = len(group)
        inputs = [torch.randn(T, heads, 16, requires_grad=way == "groups") for heads in (4, kv_heads, kv_heads)]
        masks = (group_masks if way == "groups" else block_mask)(group, branch)
        outputs = attend(*inputs, masks), attend(*inputs, [(T, seen_by_hand(group, branch), 0)])
        assert relative_error(*(y.detach() for y in outputs)) < TOLERANCE
        if way == "groups":
            upstream = torch.randn(T, 4, 16)
            for ours, dense in zip(*(torch.autograd.grad(y, inputs, upstream) for y in outputs)):
                assert relative_error(ours, dense) < TOLERANCE


@pytest.mark.parametrize("bundle, prefix, counts, pieces", [
    (20, 5, [8, 9, 3, 30, 4], [5, 20, 30, 4]),  # three that just fit; one that is longer than any bundle
    (20, 60, [8, 9, 3, 11, 4], [60, 20, 15]),  # as long as half of the prefix, but whole branches alone
    (20, 60, [8, 9, 12, 4], [60, 29, 4]), (20, 0, [8, 9, 7], [17, 7]), (20, 5, [8], [13])])
def test_branches_are_computed_in_bundles_behind_their_prefix(bundle, prefix, counts, pieces, monkeypatch):
    """Between a group of one sample and padding; who sees whom is what a loop says, weight by weight."""
    monkeypatch.setattr(kernels, "BUNDLE", bundle)
    branch = torch.tensor([0] * (4 + prefix) + [b for b, n in enumerate(counts, 1) for _ in range(n)] + [0] * 3)
    group = torch.tensor([0] * 4 + [1] * (prefix + sum(counts)) + [-1] * 3)
    masks, T = group_masks(group, branch), len(group)
    assert [length for length, *_ in masks] == [4, *pieces, 3]
    alike = torch.zeros(T, 1, T)  # all that is seen has the same weight
    seen = seen_by_hand(group, branch).float()
    weights = attend(alike, alike, torch.eye(T)[:, None], masks)[:, 0]
    assert torch.allclose(weights, seen / seen.sum(1, keepdim=True), atol=1e-7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_loss_and_gradients_on_a_gpu_are_those_on_a_cpu(corpus):
    """Compiled FlexAttention, and the blocks compiled, in float32."""
    results = []
    for device in ("cpu", "cuda"):
        model = tiny_vlm("lora").to(device)
        if device == "cuda":
            kernels.compile_blocks([*model.vision.blocks, *model.language.blocks])
        losses = []
        for batch in mix(corpus, batch_size=64, questions_per_image=3, multiple=128).step(0).batches:
            losses.append(model.loss(to_device(batch, torch.device(device))))
        sum(losses).backward()
        results.append([torch.stack(losses).detach().cpu(),
                      *(p.grad.cpu() for p in model.parameters() if p.grad is not None)])
    for ours, theirs in zip(*results):
        assert relative_error(ours, theirs) < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("data", ["corpus", "mixed"])
def test_editing_one_branch_leaves_the_others_bit_identical(data, request):
    """Its words or its images: no other branch, and no other group, has another bit in its logits."""
    data, model = request.getfixturevalue(data), tiny_vlm()
    mixture = mix(data, max_length=MAX_LENGTH, micro_batch_tokens=300, questions_per_image=2, multiple=16)
    images_of_their_own = 0
    for batch in mixture.pack(0, *(column.tolist() for column in mixture.epoch_order(0))).batches:
        everywhere = replace(tensors(batch), answer_at=torch.arange(len(batch.tokens)))
        before, owner = model(everywhere), np.stack([batch.group, batch.branch], -1)
        counts = [count_tokens(*image.shape[:2]) for image in batch.images]
        image_at = np.split(batch.image_at, np.cumsum(counts)[:-1])
        alone = [group for group in range(batch.group.max() + 1) if batch.branch[batch.group == group].max() == 0]
        branches = [(group, branch) for group, branch in np.unique(owner, axis=0).tolist()
                    if group >= 0 and (branch > 0 or group in alone)]
        for branch in branches:
            own = (owner == branch).all(-1)
            edited = own.copy()
            edited[batch.image_at] = False
            tokens = everywhere.tokens.clone()
            tokens[edited] = (tokens[edited] + 100) % VOCABULARY
            after = model(replace(everywhere, tokens=tokens))
            same = (after == before).all(-1).numpy()
            assert same[~own].all() and not same[edited].any()
            for number, places in enumerate(image_at if batch.images else ()):
                if own[places[0]]:
                    images_of_their_own += 1
                    images = [255 - image if n == number else image for n, image in enumerate(everywhere.images)]
                    same = (model(replace(everywhere, images=images)) == before).all(-1).numpy()
                    assert same[~own].all() and not same[places].any()
    assert images_of_their_own > 2


def test_supervised_positions_of_a_hand_made_sequence(tmp_path):
    images = random_images(np.random.default_rng(0), 1)
    shard = write_shard(tmp_path / "s", [([10, 11, 12], [20, 21], 0), ([13], [22], 0),
                                         ([14, 15], [23], -1)], images)
    mixture = Mixture([shard], count_tokens, batch_size=3, max_length=40, questions_per_image=0, multiple=19)
    step = mixture.pack(0, [0, 1, 2], [0, 0, 1])  # samples 0 and 1 share their image
    batch, = step.batches
    expected = {
        "tokens": [1, 0, 0, 0, 0, 0, 10, 11, 12, 20, 21, 13, 22, 1, 14, 15, 23, 0, 0],
        "positions": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 6, 7, 0, 1, 2, 3, 0, 0],
        "group": [0] * 13 + [1] * 4 + [-1] * 2,
        "branch": [0] * 6 + [1] * 5 + [2] * 2 + [0] * 6,
        "image_at": [1, 2, 3, 4, 5], "images": images,
        "answer_at": [8, 9, 10, 11, 12, 15, 16], "targets": [20, 21, 2, 22, 2, 23, 2], "weights": [1] * 7}
    for name, values in expected.items():
        assert np.array_equal(getattr(batch, name), values), name
    assert (step.divisor, step.padded) == (7, 2 / 19)
    assert step.samples == [(shard, 0), (shard, 1), (shard, 2)]


def test_a_hand_made_conversation_about_two_images(tmp_path):
    first, second = random_images(np.random.default_rng(0), 2)
    parts = (View(as_file(first), role="7"), "30 31", View(as_file(second), role="8"))
    record = Record("", "10", "20 21", parts=parts, turns=(("11 12", "22"),), context="9")
    shard = write_records(tmp_path / "s", [record])
    sample = shard.read_sample(0)
    assert sample.tokens.tolist() == [1, 7, -1, 30, 31, 8, -2, 9, 10, 20, 21, 2, 11, 12, 22, 2]
    assert sample.spans.tolist() == [[9, 12], [14, 16]] and sample.head == 7
    assert sample.prompt().tolist() == sample.tokens[:14].tolist()
    step = Mixture([shard], count_tokens, batch_size=1).step(0)
    batch, = step.batches
    expected = {
        "tokens": [1, 7, *[0] * 5, 30, 31, 8, *[0] * 5, 9, 10, 20, 21, 2, 11, 12, 22], "positions": range(23),
        "group": [0] * 23, "branch": [0] * 23, "images": [first, second],
        "image_at": [*range(2, 7), *range(10, 15)],
        "answer_at": [16, 17, 18, 21, 22], "targets": [20, 21, 2, 22, 2]}
    for name, values in expected.items():
        assert np.array_equal(getattr(batch, name), values), name
    assert (step.divisor, step.padded) == (5, 0)


# ----------------------------------------------------------------------------- order

def test_an_image_beside_parts_is_not_dropped_in_silence(tmp_path):
    image = as_file(random_images(np.random.default_rng(0), 1)[0])
    with pytest.raises(AssertionError, match="both"):
        write_records(tmp_path / "x" / "train", [Record("both", "5", "6", image, parts=("7",))], kind="text questions")


def assert_equal_steps(ours, theirs):
    for item in ("number", "divisor", "padded", "samples"):
        assert getattr(ours, item) == getattr(theirs, item), item
    assert len(ours.batches) == len(theirs.batches)
    for a, b in zip(ours.batches, theirs.batches):
        for item in fields(Batch):
            x, y = (getattr(batch, item.name) for batch in (a, b))
            assert len(x) == len(y) and all(map(np.array_equal, x, y)), item.name
            assert isinstance(x, list) or x.dtype == y.dtype, item.name


def samples_of_groups(batch):
    """How many samples each group of a Batch has: those behind a prefix are branches 1, 2, ..."""
    return [max(int(batch.branch[batch.group == group].max()), 1) for group in range(batch.group.max() + 1)]


def text_only(corpus, names):
    return [name for name in names if corpus.raw[name][2] is None]


@pytest.mark.parametrize("form, mode, size", [("EPS", "RGB", 16), ("TIFF", "RGB", 16), ("PNG", "RGB", 17),
                                              ("PNG", "L", 16), ("JPEG", "CMYK", 16)])
def test_an_image_that_no_shard_stores_is_refused_whatever_its_checksum(form, mode, size, tmp_path):
    shard = write_shard(tmp_path / "s", [([10], [20], 0)], random_images(np.random.default_rng(0), 1))
    stream = io.BytesIO()
    assert shard.read_image(0).shape == (16, 16, 3)
    Image.new(mode, (size, size)).save(stream, form)
    shard.pixels = np.frombuffer(stream.getvalue(), np.uint8)
    shard.image_index = np.array([(0, len(shard.pixels), zlib.crc32(shard.pixels), 16, 16)], IMAGE)
    with pytest.raises(UserError, match="images.bin: image 0 is none that prepare/ stores .*; delete "):
        shard.read_image(0)


@pytest.mark.parametrize("weights", [(1, 1), (0.5, 1), (2, 1), (0.5, 0), (3, 1.5)])
@pytest.mark.parametrize("questions_per_image", [0, 1])
def test_each_step_is_full_and_each_sample_comes_as_often_as_weighted(
        weights, questions_per_image, corpus):
    mixture = mix(corpus, weights=weights, questions_per_image=questions_per_image)
    size, seen = mixture.samples_per_epoch, []
    assert size == 40 * weights[0] + 24 * weights[1]
    for number in range(2 * size // 7 + 1):
        step = mixture.step(number)
        seen += step.samples
        assert len(step.samples) == 7
        packed = [count for batch in step.batches for count in samples_of_groups(batch)]
        assert sum(packed) == sum((batch.targets == EOS).sum() for batch in step.batches) == 7
        assert step.divisor == sum(len(corpus.raw[name][1]) + 1 for name in step.samples)
    first, second = Counter(seen[:size]), Counter(seen[size:2 * size])
    for shard, weight in zip(corpus.shards, weights):
        for name in [(shard, number) for number in range(len(shard))]:
            assert first[name] + second[name] == 2 * weight and abs(first[name] - weight) < 1
    # Another order of the groups each epoch, too: a text-only sample is a group of its own.
    assert text_only(corpus, seen[:size]) != text_only(corpus, seen[size:2 * size])


def test_half_a_dataset_is_another_half_on_each_lap(corpus):
    mixture = mix(corpus, weights=(0.5, 0))
    halves = [set(mixture.epoch_order(epoch)[0].tolist()) for epoch in range(4)]
    assert halves[0] | halves[1] == halves[2] | halves[3] == set(range(40))
    assert halves[2] not in halves[:2]


def test_no_order_is_worked_out_that_no_step_needs(corpus):
    """Such as that of the epoch behind the last step, for whose end a script would wait."""
    for steps, epochs in ((16, [0]), (17, [0, 1]), (32, [0, 1])):  # of 4 samples, 64 in an epoch
        mixture, asked = mix(corpus, batch_size=4), []
        mixture.order = functools.lru_cache(lambda epoch: asked.append(epoch) or in_background(
            mixture.epoch_order, epoch))
        assert len(list(mixture.steps(0, steps, workers=2))) == steps
        assert asked == epochs


def test_order_depends_on_seed_and_step_alone(corpus):
    whole = list(mix(corpus).steps(0, 28, workers=1))  # three epochs of 64 in steps of 7
    for start in range(28):
        for step, again in zip(mix(corpus).steps(start, 28, workers=1), whole[start:], strict=True):
            assert_equal_steps(step, again)
    order, other = ([name for step in steps for name in step.samples] for steps in
                    (whole, mix(corpus, seed=1).steps(0, 28, workers=1)))
    assert order != other and text_only(corpus, order) != text_only(corpus, other)


SCHEDULES = int(os.environ.get("NANOMEDQ_SCHEDULES", 60))


def digest(step):
    arrays = [array for batch in step.batches for item in fields(Batch) for array in (
        batch.images if item.name == "images" else [getattr(batch, item.name)])]
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).digest(), step.samples


def test_any_schedule_of_resumptions_gives_the_same_bytes(corpus):
    """Stopped at random steps, up to six times an epoch, by another number of workers each time."""
    settings = {"held_out": 8, "questions_per_image": 2, "batch_size": 9}
    whole = [digest(step) for step in mix(corpus, **settings).steps(0, 21, workers=1)]  # three epochs
    generator = np.random.default_rng(0)
    for _ in range(SCHEDULES):
        cuts = sorted(generator.integers(0, 22, generator.integers(1, 19)).tolist())
        digests = []
        for first, last in zip([0, *cuts], [*cuts, 21]):
            steps = mix(corpus, **settings).steps(first, last, workers=int(generator.integers(1, 4)))
            digests += [digest(step) for step in steps]
        assert digests == whole


def test_any_chain_of_ranks_gives_the_same_samples_in_order(corpus):
    whole = [step.samples for step in mix(corpus).steps(0, 28, workers=1)]
    generator = np.random.default_rng(0)
    for _ in range(20):
        samples = []
        while len(samples) < 28:
            ranks, last = int(generator.choice([1, 2, 3, 4, 6])), int(generator.integers(len(samples), 29))
            of_each = [[step.samples for step in mix(corpus, rank=rank, ranks=ranks).steps(
                len(samples), last, workers=1)] for rank in range(ranks)]
            assert all(some == of_each[0] for some in of_each)
            samples += of_each[0]
        assert samples == whole


def test_any_number_of_workers_gives_the_same_steps_in_order(corpus):
    whole = list(mix(corpus).steps(3, 28, workers=1))
    assert [step.number for step in whole] == list(range(3, 28))
    for step, again in zip(mix(corpus).steps(3, 28, workers=4), whole, strict=True):
        assert_equal_steps(step, again)


@pytest.mark.parametrize("limit", [1, 2, 3, 0])
def test_at_most_questions_per_image_share_one_copy(limit, corpus):
    mixture = mix(corpus, batch_size=128, max_length=200, micro_batch_tokens=600, questions_per_image=limit)
    step = mixture.step(0)  # two epochs at once, which share nothing
    sizes = [count for batch in step.batches for count in samples_of_groups(batch)]
    about = Counter(corpus.raw[name][2].tobytes() for name in step.samples[:64]
                    if corpus.raw[name][2] is not None)
    assert max(sizes) == (limit or max(about.values())) and sum(sizes) == 128
    copies = Counter(image.tobytes() for batch in step.batches for image in batch.images)
    assert copies == {image: 2 * -(-count // (limit or count)) for image, count in about.items()}


def test_held_out_samples_share_no_image_with_training(corpus):
    mixture = mix(corpus, held_out=16, questions_per_image=0)
    validation = [name for step in mixture.held_out_steps() for name in step.samples]
    trained = {name for number in range(30) for name in mixture.step(number).samples}
    assert 16 <= len(validation) == len(set(validation)) < 28
    assert not trained & set(validation) and len(trained) + len(validation) == 64
    assert {shard for shard, _ in validation} == set(corpus.shards)
    images = [{corpus.raw[name][2].tobytes() for name in names if corpus.raw[name][2] is not None}
              for names in (trained, validation)]
    assert images[0] and images[1] and not images[0] & images[1]
    again, other = (mix(corpus, held_out=16, seed=seed) for seed in (0, 1))
    for same in (again, other):  # runs of other seeds are judged by the same samples
        assert validation == [name for step in same.held_out_steps() for name in step.samples]
    assert again.step(0).samples != other.step(0).samples
    with pytest.raises(UserError, match="no sample to train on"):
        mix(corpus, held_out=1000)


# ----------------------------------------------------------------------------- what does not fit

def test_long_prompt_is_cut_at_the_front_and_long_answer_left_out(tmp_path):
    samples = [(range(100, 120), range(50, 53), 0), (range(100, 103), range(50, 59), 0),
               (range(100, 103), range(50, 60), 0), (range(100, 120), range(50, 60), -1),
               (range(100, 105), range(50, 60), -1), (range(100, 103), range(50, 65), -1)]
    shard = write_shard(tmp_path / "s", samples, random_images(np.random.default_rng(0), 1))
    mixture = Mixture([shard], count_tokens, batch_size=4, max_length=16)
    assert (mixture.too_long, mixture.cut, mixture.samples_per_epoch) == (2, 3, 4)
    wanted = {0: [*range(113, 120), 50, 51, 52], 1: [102, *range(50, 59)],
              3: [*range(115, 120), *range(50, 60)], 4: [*range(100, 105), *range(50, 60)]}
    step, number = mixture.step(0), {name: n for n, name in enumerate(wanted)}
    assert {name for _, name in step.samples} == set(number)
    batch, = step.batches
    inputs = [batch.tokens[batch.group == group] for group in range(4)]
    assert sorted(tokens[6 if 0 in tokens else 1:].tolist() for tokens in inputs) == sorted(wanted.values())
    assert step.divisor == 3 + 9 + 10 + 10 + 4
    with pytest.raises(UserError, match="no sample to train on"):
        Mixture([shard], count_tokens, max_length=4)


@pytest.mark.parametrize("limit", ["max_length", "micro_batch_tokens"])
def test_a_group_that_is_too_large_repeats_its_image(limit, tmp_path):
    images = random_images(np.random.default_rng(0), 2)
    shard = write_shard(tmp_path / "s", [([10 + n, 20], [30, 40], 1) for n in range(5)], images)
    step = Mixture([shard], count_tokens, batch_size=5, questions_per_image=0, **{limit: 16}).step(0)
    copies = [image for batch in step.batches for image in batch.images]
    assert len(copies) == 3 and all(np.array_equal(image, images[1]) for image in copies)
    tokens = np.concatenate([batch.tokens for batch in step.batches])
    assert sorted(tokens[(tokens >= 10) & (tokens < 20)]) == [10, 11, 12, 13, 14]


# ----------------------------------------------------------------------------- whole datasets

def test_order_of_3_350_000_samples_is_a_permutation():
    n, rng = 3_350_000, np.random.default_rng(0)
    shard, image = Shard.__new__(Shard), rng.integers(-1, 1_000_000, n)
    shard.samples, shard.image_index = np.zeros(n, SAMPLE), np.zeros(1_000_000, IMAGE)
    shard.samples["prompt"], shard.samples["length"], shard.samples["head"] = 22, 26, 2
    shard.samples["image"], shard.samples["images"] = image, image >= 0
    shard.parts = image[image >= 0].astype("<i4")
    shard.samples["parts"] = np.cumsum(image >= 0) - (image >= 0)
    _, first, of_image = np.unique(image, return_index=True, return_inverse=True)
    shard.samples["prefix"] = np.where(image >= 0, first[of_image], np.arange(n))
    mixture = Mixture([shard], count_tokens, questions_per_image=2, held_out=512)
    order, groups = mixture.epoch_order(0)
    validation = mixture.validation[0]
    assert 512 <= len(validation) < 600
    assert np.array_equal(np.sort(np.concatenate([order, validation])), np.arange(n))
    first = np.flatnonzero(np.diff(groups, prepend=-1))  # a group stays together
    sizes = np.diff(first, append=len(groups))
    assert len(first) == len(np.unique(groups)) and sizes.max() == 2
    second = first[sizes == 2] + 1
    assert np.array_equal(image[order[second]], image[order[second - 1]])
    assert (image[order[second]] >= 0).all()
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.01


def test_datasets_are_opened_by_name_and_weight(tmp_path):
    for name, tokenizer in [("one", "x"), ("two", "x"), ("three", "y")]:
        write_shard(tmp_path / name / "train", [([10], [20], -1)] * 4, tokenizer=tokenizer)
    image, = random_images(np.random.default_rng(0), 1)
    write_records(tmp_path / "labels" / "train", [Record("", image=as_file(image), labels=("none",))],
                  kind="classification")
    guard(tmp_path, "drop")
    mixture = Mixture(**open_shards("one, two:0.5", tmp_path, "train"), count_tokens=count_tokens)
    assert mixture.counts == [4, 2]
    for names, message in [("one,three", "one,three were prepared with different tokenizers"),
                           ("one,four", "four/train: not prepared; .*prepare/all.py --only=four`"),
                           ("one:twice", "'twice' is no weight"), ("labels", "labels has labels but")]:
        with pytest.raises(UserError, match=message):
            Mixture(**open_shards(names, tmp_path, "train"), count_tokens=count_tokens)
