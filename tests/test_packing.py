"""The packed loader: gradients equal to samples run one at a time, an order that can be redone."""

import hashlib
import io
import json
import os
import zlib
from collections import Counter
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from data import (BOS, EOS, IMAGE, PROMPT_VERSION, SAMPLE, SHARD_VERSION, Batch, Mixture, Shard,
                  open_mixture, sample_checksum)
import model as model_file
from lora import add_lora
from model import LLaMA, VLM, ViT, attend, block_mask, group_masks
from plumbing.files import manifest_checksum
from plumbing.flags import UserError
from prepare.leaks import fingerprint, guard
from test_model import LLAMA, TOLERANCE, VIT, randomise, relative_error

VOCABULARY = 300
N = VIT.tokens  # 5


def write_shard(folder, samples, images=(), tokenizer="one", kind="image questions"):
    """A shard as prepare/ writes it. samples: (prompt, answer, image number or -1)."""
    files = dict.fromkeys(["tokens.bin", "samples.bin", "images.bin", "images.idx",
                          "fingerprints.bin"], b"")
    for prompt, answer, image in samples:
        tokens = np.array([*prompt, *answer], np.uint16)
        sample = np.zeros((), SAMPLE)
        sample["offset"] = len(files["tokens.bin"]) // 2
        sample["prompt"], sample["answer"], sample["image"] = len(prompt), len(answer), image
        sample["checksum"] = sample_checksum(sample, tokens)
        files["tokens.bin"] += tokens.tobytes()
        files["samples.bin"] += sample.tobytes()
    for image in images:
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "PNG")
        entry = (len(files["images.bin"]), len(stream.getvalue()), zlib.crc32(stream.getvalue()))
        files["images.idx"] += np.array(entry, IMAGE).tobytes()
        files["images.bin"] += stream.getvalue()
        files["fingerprints.bin"] += fingerprint(Image.fromarray(image))
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    manifest = {"shard_version": SHARD_VERSION, "prompt_version": PROMPT_VERSION, "kind": kind,
                "token_dtype": "uint16", "tokenizer_sha256": tokenizer,
                "image": {"size": len(images[0]) if len(images) else 0},
                "files": {name: {"bytes": len(file), "sha256": hashlib.sha256(file).hexdigest()}
                          for name, file in files.items()}}
    (folder / "manifest.json").write_text(
        json.dumps({**manifest, "checksum": manifest_checksum(manifest)}))
    return Shard(folder)


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
    settings = {"batch_size": 7, "row_length": 40, "rows_per_batch": 3, **settings}
    return Mixture(corpus.shards, N, **settings)


def tensors(batch):
    return Batch(*[torch.from_numpy(getattr(batch, item.name)) for item in fields(Batch)])


def tiny_vlm(train="full"):
    torch.manual_seed(0)
    model = VLM(ViT(VIT), LLaMA(replace(LLAMA, vocab_size=VOCABULARY)))
    if train == "lora":
        add_lora(model.language, "q_proj,v_proj", r=4)
    return randomise(model)


# ----------------------------------------------------------------------------- packing is exact

def loss_alone(model, prompt, answer, pixels):
    """Summed cross-entropy of one sample in its own row, written out without data.py."""
    x = model.language.embed(torch.tensor([[BOS, *prompt, *answer]]))
    if pixels is not None:
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
        deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
        image = (torch.tensor(pixels).permute(2, 0, 1) / 255 - mean) / deviation
        x = torch.cat([x[:, :1], model.projector(model.vision(image[None])), x[:, 1:]], dim=1)
    T = x.shape[1]
    mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
    x = model.language.transform(x, torch.arange(T)[None], mask)
    logits = model.language.lm_head(x[0, -len(answer) - 1:])
    return F.cross_entropy(logits, torch.tensor([*answer, EOS]), reduction="sum")


@pytest.fixture
def double(monkeypatch):
    """All of it in float64, even what the model has in float32 whatever its weights are: rounding hides nothing."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize("questions_per_image", [0, 1, 3])
def test_packed_loss_and_gradients_equal_samples_run_alone(questions_per_image, train, corpus, double):
    step = mix(corpus, batch_size=64, questions_per_image=questions_per_image).step(0)
    assert len(step.batches) > 2 and len(step.batches[0].tokens) == 3
    model = tiny_vlm(train)
    total = 0
    for batch in step.batches:
        loss = model.loss(tensors(batch)) / step.supervised
        loss.backward()
        total += loss.detach()
    packed = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    supervised = sum(len(answer) + 1 for _, answer, _ in corpus.raw.values())
    alone = sum(loss_alone(model, *sample) for sample in corpus.raw.values()) / supervised
    alone.backward()
    assert step.supervised == supervised
    assert relative_error(total, alone.detach()) < 1e-10
    for name, parameter in model.named_parameters():
        frozen = train == "lora" and name.startswith("language.") and "lora_" not in name
        assert (packed[name] is None) == (parameter.grad is None) == frozen, name
        assert frozen or relative_error(packed[name], parameter.grad) < 1e-10, name


def seen_by_hand(group, question):
    """The dense (R, 1, T, T) mask of packed rows, from a loop over what each token may see."""
    R, T = group.shape
    seen = torch.zeros(R, 1, T, T, dtype=torch.bool)
    for r in range(R):
        for at in range(T):
            for other in range(at + 1):
                shared_or_own = question[r, other] in (0, question[r, at])
                seen[r, 0, at, other] = bool(group[r, at] == group[r, other] and shared_or_own)
    return seen


@pytest.mark.parametrize("way", ["groups", "flex"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_of_packed_rows_is_the_dense_one_either_way(way, kv_heads, corpus, monkeypatch):
    """FlexAttention as it is without torch.compile, which on a CPU has no backward pass."""
    for name in ("flex_attention", "create_block_mask"):
        monkeypatch.setattr(model_file, f"compiled_{name}", getattr(model_file, name))
    torch.manual_seed(0)
    for batch in mix(corpus, batch_size=64, questions_per_image=3, row_length=43).step(0).batches[:2]:
        group, question = torch.from_numpy(batch.group), torch.from_numpy(batch.question)
        assert (question > 1).any() and (group == -1).any()
        R, T = group.shape
        inputs = [torch.randn(R, heads, T, 16, requires_grad=way == "groups")
                  for heads in (4, kv_heads, kv_heads)]
        masks = (group_masks if way == "groups" else block_mask)(group, question)
        found = attend(*inputs, masks), attend(*inputs, seen_by_hand(group, question))
        assert relative_error(*(y.detach() for y in found)) < TOLERANCE
        if way == "groups":
            upstream = torch.randn(R, 4, T, 16)
            for ours, dense in zip(*(torch.autograd.grad(y, inputs, upstream) for y in found)):
                assert relative_error(ours, dense) < TOLERANCE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_loss_and_gradients_on_a_gpu_are_those_on_a_cpu(corpus):
    """Compiled FlexAttention, and the blocks compiled, in float32."""
    found = []
    for device in ("cpu", "cuda"):
        model = tiny_vlm("lora").to(device)
        if device == "cuda":
            for block in [*model.vision.blocks, *model.language.model.layers]:
                block.compile()
        losses = []
        for batch in mix(corpus, batch_size=64, questions_per_image=3).step(0).batches:
            batch = tensors(batch)
            batch = replace(batch, **{item.name: getattr(batch, item.name).to(device)
                                      for item in fields(Batch)})
            losses.append(model.loss(batch))
        sum(losses).backward()
        found.append([torch.stack(losses).detach().cpu(),
                      *(p.grad.cpu() for p in model.parameters() if p.grad is not None)])
    for ours, theirs in zip(*found):
        assert relative_error(ours, theirs) < 1e-3


@torch.no_grad()
def test_editing_one_question_leaves_its_row_mates_bit_identical(corpus):
    model = tiny_vlm()
    mixture = mix(corpus, batch_size=64, row_length=60, questions_per_image=2)
    for batch in mixture.step(0).batches[:2]:
        R, T = batch.tokens.shape
        everywhere = replace(tensors(batch), answer_at=torch.arange(R * T))
        before = model(everywhere).view(R, T, -1)
        owner = np.stack([np.arange(R)[:, None].repeat(T, 1), batch.group, batch.question], -1)
        questions = np.unique(owner[batch.question > 0], axis=0)
        assert (questions[:, 2] > 1).any() and (questions[:, 1] > 0).any()
        for question in questions:
            own = (owner == question).all(-1)
            tokens = everywhere.tokens.clone()
            tokens[own] = (tokens[own] + 100) % VOCABULARY
            after = model(replace(everywhere, tokens=tokens)).view(R, T, -1)
            same = (after == before).all(-1).numpy()
            assert same[~own].all() and not same[own].any()


def test_supervised_positions_of_a_hand_made_row(tmp_path):
    images = random_images(np.random.default_rng(0), 1)
    shard = write_shard(tmp_path / "s", [([10, 11, 12], [20, 21], 0), ([13], [22], 0),
                                         ([14, 15], [23], -1)], images)
    mixture = Mixture([shard], N, batch_size=3, row_length=19, questions_per_image=0)
    step = mixture.pack(0, [0, 1, 2], [0, 0, 1])  # samples 0 and 1 share their image
    batch, = step.batches
    expected = {
        "tokens": [[1, 0, 0, 0, 0, 0, 10, 11, 12, 20, 21, 13, 22, 1, 14, 15, 23, 0, 0]],
        "positions": [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 6, 7, 0, 1, 2, 3, 0, 0]],
        "group": [[0] * 13 + [1] * 4 + [-1] * 2],
        "question": [[0] * 6 + [1] * 5 + [2] * 2 + [0] + [1] * 3 + [0] * 2],
        "image_at": [1], "images": images,
        "answer_at": [8, 9, 10, 11, 12, 15, 16], "targets": [20, 21, 2, 22, 2, 23, 2]}
    for name, values in expected.items():
        assert np.array_equal(getattr(batch, name), values), name
    assert (step.supervised, step.padded) == (7, 2 / 19)
    assert step.samples == [(shard, 0), (shard, 1), (shard, 2)]


# ----------------------------------------------------------------------------- order

def assert_equal_steps(ours, theirs):
    for item in ("number", "supervised", "padded", "samples"):
        assert getattr(ours, item) == getattr(theirs, item), item
    assert len(ours.batches) == len(theirs.batches)
    for a, b in zip(ours.batches, theirs.batches):
        for item in fields(Batch):
            x, y = getattr(a, item.name), getattr(b, item.name)
            assert x.dtype == y.dtype and np.array_equal(x, y), item.name


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
    shard.image_index = np.array([(0, len(shard.pixels), zlib.crc32(shard.pixels))], IMAGE)
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
        packed = [len(np.unique(np.stack([batch.group[r], batch.question[r]])[:, asked], axis=1).T)
                  for batch in step.batches for r, asked in enumerate(batch.question > 0)]
        assert sum(packed) == sum((batch.targets == EOS).sum() for batch in step.batches) == 7
        assert step.supervised == sum(len(corpus.raw[name][1]) + 1 for name in step.samples)
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
    arrays = (getattr(batch, item.name) for batch in step.batches for item in fields(Batch))
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).digest(), step.samples


def test_any_schedule_of_resumptions_gives_the_same_bytes(corpus):
    """Stopped at random steps, up to six times an epoch, by another number of workers each time."""
    settings = {"held_out": 8, "questions_per_image": 2, "batch_size": 9}
    whole = [digest(step) for step in mix(corpus, **settings).steps(0, 21, workers=1)]  # three epochs
    generator = np.random.default_rng(0)
    for _ in range(SCHEDULES):
        cuts = sorted(generator.integers(0, 22, generator.integers(1, 19)).tolist())
        found = []
        for first, last in zip([0, *cuts], [*cuts, 21]):
            steps = mix(corpus, **settings).steps(first, last, workers=int(generator.integers(1, 4)))
            found += [digest(step) for step in steps]
        assert found == whole


def test_any_chain_of_ranks_gives_the_same_samples_in_order(corpus):
    whole = [step.samples for step in mix(corpus).steps(0, 28, workers=1)]
    generator = np.random.default_rng(0)
    for _ in range(20):
        found = []
        while len(found) < 28:
            ranks, last = int(generator.choice([1, 2, 3, 4, 6])), int(generator.integers(len(found), 29))
            of_each = [[step.samples for step in mix(corpus, rank=rank, ranks=ranks).steps(
                len(found), last, workers=1)] for rank in range(ranks)]
            assert all(samples == of_each[0] for samples in of_each)
            found += of_each[0]
        assert found == whole


def test_any_number_of_workers_gives_the_same_steps_in_order(corpus):
    whole = list(mix(corpus).steps(3, 28, workers=1))
    assert [step.number for step in whole] == list(range(3, 28))
    for step, again in zip(mix(corpus).steps(3, 28, workers=4), whole, strict=True):
        assert_equal_steps(step, again)


@pytest.mark.parametrize("limit", [1, 2, 3, 0])
def test_at_most_questions_per_image_share_one_copy(limit, corpus):
    mixture = mix(corpus, batch_size=128, row_length=200, questions_per_image=limit)
    step = mixture.step(0)  # two epochs at once, which share nothing
    sizes = [len(np.unique(batch.question[r][batch.group[r] == g])) - 1 for batch in step.batches
             for r in range(len(batch.group)) for g in range(batch.group[r].max() + 1)]
    about = Counter(corpus.raw[name][2].tobytes() for name in step.samples[:64]
                    if corpus.raw[name][2] is not None)
    assert max(sizes) == (limit or max(about.values())) and sum(sizes) == 128
    copies = Counter(image.tobytes() for batch in step.batches for image in batch.images)
    assert copies == {image: 2 * -(-count // (limit or count)) for image, count in about.items()}


def test_held_out_samples_share_no_image_with_training(corpus):
    mixture = mix(corpus, held_out=16, questions_per_image=0)
    kept = [name for step in mixture.held_out_steps() for name in step.samples]
    trained = {name for number in range(30) for name in mixture.step(number).samples}
    assert 16 <= len(kept) == len(set(kept)) < 28
    assert not trained & set(kept) and len(trained) + len(kept) == 64
    assert {shard for shard, _ in kept} == set(corpus.shards)
    images = [{corpus.raw[name][2].tobytes() for name in names if corpus.raw[name][2] is not None}
              for names in (trained, kept)]
    assert images[0] and images[1] and not images[0] & images[1]
    again, other = (
        [name for step in mixture.held_out_steps() for name in step.samples]
        for mixture in (mix(corpus, held_out=16), mix(corpus, held_out=16, seed=1)))
    assert kept == again and set(kept) != set(other)
    with pytest.raises(UserError, match="no sample to train on"):
        mix(corpus, held_out=1000)


# ----------------------------------------------------------------------------- short rows

def test_long_prompt_is_cut_at_the_front_and_long_answer_left_out(tmp_path):
    samples = [(range(100, 120), range(50, 53), 0), (range(100, 103), range(50, 59), 0),
               (range(100, 103), range(50, 60), 0), (range(100, 120), range(50, 60), -1),
               (range(100, 105), range(50, 60), -1), (range(100, 103), range(50, 65), -1)]
    shard = write_shard(tmp_path / "s", samples, random_images(np.random.default_rng(0), 1))
    mixture = Mixture([shard], N, batch_size=4, row_length=16)
    assert (mixture.too_long, mixture.cut, mixture.samples_per_epoch) == (2, 3, 4)
    wanted = {0: [*range(113, 120), 50, 51, 52], 1: [102, *range(50, 59)],
              3: [*range(115, 120), *range(50, 60)], 4: [*range(100, 105), *range(50, 60)]}
    step, number = mixture.step(0), {name: n for n, name in enumerate(wanted)}
    assert {name for _, name in step.samples} == set(number)
    rows = [row[6 if 0 in row else 1:].tolist() for batch in step.batches for row in batch.tokens]
    assert sorted(rows) == sorted(wanted.values())
    assert step.supervised == 3 + 9 + 10 + 10 + 4
    with pytest.raises(UserError, match="no sample to train on"):
        Mixture([shard], N, row_length=4)


def test_group_too_large_for_a_row_repeats_its_image(tmp_path):
    images = random_images(np.random.default_rng(0), 2)
    shard = write_shard(tmp_path / "s", [([10 + n, 20], [30, 40], 1) for n in range(5)], images)
    step = Mixture([shard], N, batch_size=5, row_length=16, questions_per_image=0).step(0)
    copies = [image for batch in step.batches for image in batch.images]
    assert len(copies) == 3 and all(np.array_equal(image, images[1]) for image in copies)
    tokens = np.concatenate([batch.tokens for batch in step.batches])
    assert sorted(tokens[(tokens >= 10) & (tokens < 20)]) == [10, 11, 12, 13, 14]


# ----------------------------------------------------------------------------- whole datasets

def test_order_of_3_350_000_samples_is_a_permutation():
    class Fake(SimpleNamespace):
        def __len__(self):
            return len(self.samples)

    n, rng = 3_350_000, np.random.default_rng(0)
    samples = np.zeros(n, SAMPLE)
    samples["prompt"], samples["answer"] = 20, 3
    samples["image"] = rng.integers(-1, 1_000_000, n)
    mixture = Mixture([Fake(samples=samples, image_index=np.zeros(1_000_000, IMAGE))], 197,
                      questions_per_image=2, held_out=512)
    order, groups = mixture.epoch_order(0)
    held = mixture.held_out[0]
    assert 512 <= len(held) < 600
    assert np.array_equal(np.sort(np.concatenate([order, held])), np.arange(n))
    first = np.flatnonzero(np.diff(groups, prepend=-1))  # a group stays together
    sizes = np.diff(first, append=len(groups))
    assert len(first) == len(np.unique(groups)) and sizes.max() == 2
    second = first[sizes == 2] + 1
    assert np.array_equal(samples["image"][order[second]], samples["image"][order[second - 1]])
    assert (samples["image"][order[second]] >= 0).all()
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.01


def test_datasets_are_opened_by_name_and_weight(tmp_path):
    for name, tokenizer in [("one", "x"), ("two", "x"), ("three", "y")]:
        write_shard(tmp_path / name / "train", [([10], [20], -1)] * 4, tokenizer=tokenizer)
    write_shard(tmp_path / "labels" / "train", [([], [], -1)], kind="classification")
    guard(tmp_path, "drop")
    mixture = open_mixture("one, two:0.5", tmp_path, "train", image_tokens=N)
    assert mixture.counts == [4, 2]
    for names, message in [("one,three", "one,three were prepared with different tokenizers"),
                           ("one,four", "four/train: not prepared; .*prepare/all.py --only=four`"),
                           ("one:twice", "'twice' is no weight"), ("labels", "labels has labels but")]:
        with pytest.raises(UserError, match=message):
            open_mixture(names, tmp_path, "train", image_tokens=N)
