"""Each row of extras/bench/training.py's table learns what samples run one at a time would learn."""

import contextlib
import functools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from extras.bench import answering, grpo, peers, split_load, training
from model import VLM
from plumbing.shards import Shard
from test_model import randomise
from test_packing import VOCABULARY, count_tokens, loss_alone, random_images, tensors, tiny_vlm, write_shard
from test_qwen3_vl import tiny_qwen
from test_train import shards  # noqa: F401, the fixture: a prepared part of the sample

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = 50


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A shard of 40 questions about 9 images, their raw parts, and which of them each step trains on."""
    generator = np.random.default_rng(0)
    images = random_images(generator, 9)
    samples = [(generator.integers(3, VOCABULARY, generator.integers(2, 9)).tolist(),
                generator.integers(3, VOCABULARY, generator.integers(1, 5)).tolist(), image)
               for image in [*range(9), *generator.integers(0, 9, 31).tolist()]]
    shard = write_shard(tmp_path_factory.mktemp("questions") / "a", samples, images)
    raw = [(prompt, answer, images[image]) for prompt, answer, image in samples]
    return shard, raw, [generator.choice(40, 12, replace=False).tolist() for _ in range(STEPS)]


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


@pytest.fixture(scope="module")
def plain(questions):
    """The losses of 50 steps whose samples are run one at a time."""
    _, raw, steps = questions
    model, losses = tiny_vlm("lora"), []
    optimizer = optimizer_of(model)
    for numbers in steps:
        batches = [raw[number] for number in numbers]
        supervised = sum(len(answer) + 1 for _, answer, _ in batches)
        losses.append(training.update(model, optimizer, lambda model, sample: loss_alone(model, *sample),
                                      batches, supervised, contextlib.nullcontext()))
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1  # 1,000 times what rounding may alter
    return losses


@pytest.mark.parametrize("shared, length, everywhere, recomputed", [
    (1, 18, True, 1), (1, 40, True, 1), (1, 40, False, 1), (1, 0, False, 1), (1, 0, False, 0), (2, 0, False, 0),
    (4, 0, False, 0), (0, 0, False, 0)])  # length 0: as train_vlm.py does it
def test_fifty_steps_have_the_losses_of_samples_run_alone(shared, length, everywhere, recomputed, questions, plain):
    shard, _, steps = questions
    model, losses = tiny_vlm("lora"), []
    model.vision.recomputed = model.language.recomputed = recomputed
    optimizer = optimizer_of(model)
    loss_of = training.loss_at_every_position if everywhere else training.dense_loss
    loss_of = functools.partial(loss_of, length=length) if length else VLM.loss
    for numbers in steps:
        batches, padded, supervised = training.pack(shard, numbers, shared, length,
                                                    training.Config(micro_batch_tokens=60), count_tokens)
        assert len(batches) > 1 and bool(padded) == bool(length)
        losses.append(training.update(model, optimizer, loss_of, [tensors(batch) for batch in batches], supervised,
                                      contextlib.nullcontext()))
    assert losses == pytest.approx(plain, rel=1e-4)


def test_recomputing_keeps_less_and_changes_no_gradient(questions):
    shard, _, steps = questions
    batches, *_ = training.pack(shard, steps[0], 1, 0, training.Config(micro_batch_tokens=10_000), count_tokens)
    seen = []
    for recomputed in (0, 1, 2):
        model = tiny_vlm("lora")
        model.vision.recomputed = model.language.recomputed = recomputed
        given = model, None, VLM.loss, [tensors(batches[0])], 1, contextlib.nullcontext()
        kept = training.count_kept(*given)
        model.loss(tensors(batches[0])).backward()
        seen.append((kept, [p.grad for p in model.parameters() if p.grad is not None]))
    assert seen[0][0] > 1.2 * seen[1][0] > 1.2 * seen[2][0]
    for _, gradients in seen[1:]:
        assert all(map(torch.equal, gradients, seen[0][1]))


@pytest.mark.parametrize("model", ["sample", "qwen_sample"])
def test_the_table_is_written_and_the_peer_does_the_same_work(model, shards, tmp_path):  # noqa: F811
    done = subprocess.run(
        [sys.executable, "extras/bench/training.py", f"--model={model}", "--data=sample", "--batch_size=6",
         "--rounds=1", "--questions=6", f"--shards_dir={shards}", f"--out={tmp_path}/table.md"], cwd=ROOT,
        text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "table.md").read_text() in done.stdout
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    losses = [row["loss"] for row in rows.values()]
    assert losses == pytest.approx([losses[0]] * 10, rel=1e-5) and "transformers + PEFT" in rows
    assert "6 of 6 answers are the same" in done.stdout and "loss and gradients are ours" in done.stderr
    recomputed = rows["attention within groups"]
    assert rows["nothing recomputed"]["kept"] > recomputed["kept"]
    assert len(Shard(shards / "sample" / "train")) == 64


def test_each_process_loads_its_part_of_a_split_model_alone(tmp_path):
    config = split_load.Config(width=256, layers=1, dtype="float32")
    split_load.write_model(tmp_path, config)
    whole = sum(tensor.numel() * 4 for tensor in load_file(tmp_path / "model.safetensors").values())
    assert [size for _, size in split_load.measure(tmp_path, 2, "float32")] == [whole / 2] * 2


@pytest.mark.parametrize("place, number", [("cuda", 0), ("cuda:1", 1)])
def test_a_limit_of_memory_is_set_for_the_gpu_that_is_used(place, number, monkeypatch):
    limits = []
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda *inputs: limits.append(inputs), raising=False)
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=96e9))
    training.limit_memory(24, torch.device(place))
    training.limit_memory(200, torch.device(place))
    assert limits == [(0.25, number), (1.0, number)]


# ----------------------------------------------------------------------------- the peers

@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A shard of eight questions about three images of their own shapes."""
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((64, 96), (128, 64), (96, 96))]
    samples = [(rng.integers(3, VOCABULARY, rng.integers(2, 9)).tolist(),
                rng.integers(3, VOCABULARY, rng.integers(1, 5)).tolist(), image)
               for image in (0, 1, 2, 0, 1, 0, 2, 2)]
    shard = write_shard(tmp_path_factory.mktemp("shapes") / "test", samples, images, resize="fit", size=128)
    assert len({(row["height"], row["width"]) for row in shard.image_index}) == 3
    return shard


@pytest.mark.parametrize("lora", ["", "language", "vision,language"])
def test_a_qwen_of_transformers_learns_what_ours_does_and_a_mistake_is_seen(lora, shapes):
    model = tiny_qwen("full")
    for part in filter(None, lora.split(",")):
        model.lora[part] = {"targets": "qkv" if part == "vision" else "q_proj,down_proj", "r": 4, "alpha": 8.0}
        training.add_lora(getattr(model, part), **model.lora[part])
    randomise(model)
    peer = peers.make_peer(model, shapes, (2,)).train()
    rows = [peer.collate(peers.lay_out(shapes, some, model.vision, "cpu")) for some in (range(5), range(5, 8))]
    config = training.Config(micro_batch_tokens=30)
    for shared in (1, 0):
        batches, *_ = training.pack(shapes, range(8), shared, 0, config, model.vision.tokens)
        assert len(batches) > 1
        assert training.require_same(model, peer, [tensors(batch) for batch in batches], rows) < 1e-4
    trained = [p.requires_grad for p in model.parameters()]
    assert [p.requires_grad for _, p, _ in peer.pair(model)].count(True) == trained.count(True) > 0
    assert [p.requires_grad for p in peer.parameters()].count(True) == trained.count(True)
    with torch.no_grad():
        model.projector.merger.linear_fc2.bias += 0.1
    with pytest.raises(AssertionError, match="differs by"):
        training.require_same(model, peer, [tensors(batch) for batch in batches], rows)


@torch.no_grad()
def test_answers_are_those_of_transformers_and_others_are_no_tie(shapes, monkeypatch):
    model, stops = tiny_qwen("full").eval(), (5, 9)
    peer = peers.make_peer(model, shapes, stops).eval()
    config = answering.Config(new_tokens=6, peer_batch_size=3)
    ours = answering.answer(model, shapes, 8, stops, {"model": np.arange(3)}, config)["model"]
    theirs = answering.answer_by_peer(peer, model, shapes, 8, stops, config)
    assert ours == theirs and len({*map(tuple, ours)}) > 1
    same = answering.compare(model, shapes, ours, theirs, 5, torch.float32)
    assert same == "8 of 8 answers are the same as transformers'"
    ours[3] = [*ours[3][:1], (ours[3][1] + 1) % VOCABULARY, *ours[3][2:]]
    with pytest.raises(AssertionError, match="answers differ"):
        answering.compare(model, shapes, ours, theirs, 5, torch.float32)
    other = answering.compare(model, shapes, ours, theirs, 5, torch.bfloat16)
    assert other.startswith("7 of 8 answers are the same")
    monkeypatch.setattr(answering, "FEW", 1)  # of 16 bits no more are looked at
    ours[5] = [(ours[5][0] + 1) % VOCABULARY]
    other = answering.compare(model, shapes, ours, theirs, 5, torch.bfloat16)
    assert other.startswith("6 of 8 answers are the same as transformers'; in 1 of the others two tokens are no more ")


# ----------------------------------------------------------------------------- beside TRL

GRPO = grpo.Config(model="sample", vocab_size=300, prompts=2, answers=4, prompt_tokens=20, new_tokens=6,
                   micro_batch_tokens=30, peer_batch_size=4, threads=torch.get_num_threads(), steps=1)


def test_our_side_of_grpo_learns_from_the_given_answers():
    ours = grpo.run_ours(GRPO)
    assert [step["tokens"] for step in ours["steps"]] == [48]
    language, alone = grpo.make_model(GRPO).language, []
    for prompt, answers in zip(grpo.draw_prompts(GRPO, 0), grpo.draw_answers(GRPO)):
        for answer in answers:
            logits = language(torch.from_numpy(np.append(prompt, answer)))[19:-1]
            alone += logits.log_softmax(-1)[range(6), answer].tolist()
    assert ours["seen"] == pytest.approx(alone, abs=1e-5)
    peer = {**ours, "seen": [*ours["seen"][:-1], ours["seen"][-1] + 1e-3]}
    with pytest.raises(AssertionError, match="log-probability of TRL's differs"):
        grpo.require_same(ours, peer)
    with pytest.raises(AssertionError, match="the gradient's norm is"):
        grpo.require_same(ours, {**ours, "norm": 1.001 * ours["norm"]})


def test_trl_learns_the_same_from_the_same_answers():
    pytest.importorskip("trl")
    flags = [f"--{name}={value}" for name, value in (vars(GRPO) | {"rounds": 1}).items()]
    done = subprocess.run([sys.executable, "extras/bench/grpo.py", *flags], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "log-probabilities of the same answers are TRL's" in done.stdout and "| whole step | " in done.stdout
