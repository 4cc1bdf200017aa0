"""extras/bench/several.py: what it works out, by hand, and beside what real processes hold and send."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import train_vlm
from data import Tokenizer
from extras.bench import memory, several
from extras.bench.progress import Progress
from plumbing.flags import UserError
from test_packing import corpus, count_tokens, mix  # noqa: F401, corpus: a fixture
from test_ranks import together
from test_train import flags, shards  # noqa: F401, shards: a fixture
from weights import build_vlm, save_vlm

CONFIG = several.Config(within=10.0, across=5.0, latency_within=0.0, latency_across=0.0, hbm=1e9)  # GB/s
# Two blocks, an embedding; a token is a GFLOP
TOY = several.Facts(units=[(100_000_000, 0), (100_000_000, 0), (50_000_000, 0)], trained=1_000_000,
                    message=(4_000_000, 4_000_000), weights=300_000_000, sizes=(128, 8192), kept=(1e8, 64e8),
                    flop=np.array([1e9, 0, 0]))
FULL = replace(TOY, units=[(weights, weights) for weights, _ in TOY.units], trained=63_500_000,
               message=(254_000_000, 4_000_000))


class Sent(TorchDispatchMode):
    """Messages of torch.distributed, by name: the bytes of the larger tensor of each."""

    def __init__(self):
        super().__init__()
        self.sizes = {"allreduce_": [], "_allgather_base_": [], "_reduce_scatter_base_": []}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            tensors = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
            self.sizes[function.name().partition("::")[2].partition(".")[0]].append(max(t.nbytes for t in tensors))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("language", ["lora", "full"])
@pytest.mark.parametrize("split", [False, True])
def test_two_processes_hold_and_send_what_is_counted(language, split, shards, tmp_path, monkeypatch):  # noqa: F811
    took, real = tmp_path / "took", train_vlm.train_step

    def step(model, optimizer, step, *rest):
        with Sent() as sent:
            done = real(model, optimizer, step, *rest)
        held = [getattr(p, "_local_tensor", p).nbytes for p in model.parameters()]
        moments = [getattr(moment, "_local_tensor", moment).nbytes for state in optimizer.state.values()
                   for name, moment in state.items() if name != "step"]
        if dist.get_rank() == 0:
            took.write_text(json.dumps([len(step.batches), sum(held), sum(moments), sent.sizes]))
        return done

    monkeypatch.setattr(train_vlm, "train_step", step)
    vocabulary = Tokenizer(shards / "sample/tokenizer.model").vocab_size
    save_vlm(build_vlm("sample", vocabulary), tmp_path)
    weights = {"language_weights": str(tmp_path / "language")} if language == "lora" else {}
    config = flags(shards, tmp_path / "run", language=language, shard=split, max_steps=1, batch_size=12, max_length=64,
                   micro_batch_tokens=128, recompute=0.5, **weights)
    together(2, config)
    batches, held, moments, sent = json.loads(took.read_text())
    lora = several.memory.train_vlm.lora_settings(config, "q_proj,v_proj") if language == "lora" else None
    model = build_vlm("sample", vocabulary, device="meta", lora=lora)
    if language == "full":
        model.requires_grad_(True)
    facts, away = several.count_parts(model), split / 2
    own, gradients = np.sum(facts.units, axis=0)
    assert sent["allreduce_"] == [facts.message[split]]
    assert sorted(sent["_allgather_base_"]) == sorted([unit[0] for unit in facts.units] * 2 * batches * split)
    assert sorted(sent["_reduce_scatter_base_"]) == sorted(
        [unit[1] for unit in facts.units if unit[1]] * batches * split)
    assert held == sum(p.nbytes for p in model.parameters()) - away * own
    assert moments == 8 * facts.trained - away * 2 * gradients
    assert batches > 1 and len(facts.units) == 7 and (gradients > 0) == (language == "full")


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_samples_are_divided_as_they_are_packed(ranks, corpus):  # noqa: F811
    settings = dict(batch_size=14, questions_per_image=2, micro_batch_tokens=150, max_length=40)
    divided = several.Divided(corpus.shards, count_tokens, **settings)
    for number in range(3):
        divided.step(number)
        for rank, counts in enumerate(several.divide(divided, ranks)):
            packed = mix(corpus, rank=rank, ranks=ranks, **settings).step(number).batches
            assert counts.tolist() == [[len(b.tokens), len(b.image_at), len(b.targets)] for b in packed]


def test_memory_is_that_of_a_computed_step():
    config = several.Config(models="sample", micro_batch_tokens=2048)
    facts = several.study("sample", config, Progress(2, "peaks"))
    settings = memory.flags_of("sample")
    for tokens, error in ((2048, 0), (1024, 0.02)):
        batch = memory.pack("sample", tokens, 1)
        peak = memory.compute(settings, batch, torch.bfloat16)[1]
        assert several.memory_of(facts, len(batch.tokens), 1, False) == pytest.approx(peak, rel=error or 1e-9)
    # A token through frozen blocks twice, through the head once it is asked for
    model = memory.make(settings, torch.device("meta"), torch.bfloat16)
    frozen = sum(p.numel() for key, p in model.language.blocks.named_parameters() if p.dim() > 1 and "lora" not in key)
    last = sum(p.numel() for p in model.language.blocks[-1].mlp.parameters())
    assert facts.flop[0] == 4 * (frozen - last)


def equal_parts(ranks, batches=1, tokens=256):
    return [np.array([[tokens, 0, 0]] * batches, float)] * ranks


def test_messages_by_hand():
    alone = several.time_step(TOY, equal_parts(1), 1e12, False, CONFIG)
    assert alone == pytest.approx((0.256, 0, 0), abs=1e-6)
    for gpus, bandwidth in ((2, 10e9), (8, 10e9), (16, 5e9)):
        seconds, network, waiting = several.time_step(TOY, equal_parts(gpus), 1e12, False, CONFIG)
        assert network == pytest.approx(2 * (gpus - 1) / gpus * 4e6 / bandwidth)
        assert (seconds, waiting) == pytest.approx((0.256 + network, 0), abs=1e-6)
    faster = replace(CONFIG, within=20.0)
    for facts in (TOY, FULL):
        for split in (False, True):  # with products that take no time, nothing hides a message
            slow, fast = (several.time_step(facts, equal_parts(4, 3), 1e30, split, config)[1]
                          for config in (CONFIG, faster))
            assert slow == pytest.approx(2 * fast)
            sent = 3 * (2 * 250e6 + sum(unit[1] for unit in facts.units)) * split + 2 * facts.message[split]
            assert slow == pytest.approx(0.75 * sent / 10e9, rel=1e-4)
    # Where products take longer than messages, the first and the last of these are waited for alone
    _, network, _ = several.time_step(FULL, equal_parts(4, 3), 1e12, True, CONFIG)
    assert network == pytest.approx(0.75 * (3 * 200e6 + 2 * 4e6) / 10e9)
    late = replace(CONFIG, latency_within=1000.0)  # a millisecond for each message
    assert several.time_step(TOY, equal_parts(4), 1e30, True, late)[1] == pytest.approx(
        0.75 * 508e6 / 10e9 + 7e-3, rel=1e-4)


def test_ranks_wait_for_the_slowest():
    divided = [np.array(rows, float) for rows in ([[512, 0, 0], [1, 0, 0]], [[128, 0, 0], [640, 0, 0]])]
    free = replace(CONFIG, within=1e9)
    whole, split = (several.time_step(TOY, divided, 1e12, way, free) for way in (False, True))
    assert whole == pytest.approx((0.768, 0, 0.768 - 0.704), abs=1e-5)  # a micro-batch of 1 token is one of 128
    assert split == pytest.approx((1.152, 0, 1.152 - 0.704), abs=1e-5)  # each micro-batch as long as its longest
    slow = replace(free, hbm=1.0)  # GB/s: weights of 0.3 GB take 0.6 s to read twice
    assert several.time_step(TOY, divided, 1e15, False, slow)[0] == pytest.approx(1.2 + 0.04)


def test_what_is_split_takes_less_memory_on_more_gpus():
    for facts in (TOY, FULL):
        held = [several.memory_of(facts, 128, gpus, True) for gpus in (2, 4, 8, 64, 1 << 30)]
        assert held == sorted(held, reverse=True) and held[0] > held[-1]
        own = sum(unit[1] for unit in facts.units)
        assert held[-1] == pytest.approx(
            50e6 + 12 * facts.trained - 3 * own + 1e8 + 3 * 100e6 + 2 * facts.units[0][1], rel=1e-6)
    assert several.memory_of(TOY, 128, 8, False) == several.memory_of(TOY, 128, 1, False) == 300e6 + 12e6 + 1e8
    # A copy of the gradients counts where it is more than the activations
    assert several.memory_of(FULL, 128, 8, False) == 300e6 + 12 * 63.5e6 + 254e6
    assert several.memory_of(FULL, 8192, 8, False) == 300e6 + 12 * 63.5e6 + 64e8


def test_measured_speed_is_taken_before_an_assumed_one(shards, tmp_path, capsys):  # noqa: F811
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"flags": {"model": "sample", "language": "lora"}, "rows": {
        "nothing recomputed": {"flop": 6e12, "seconds": [2.0, 3.0, 30.0]}}}))
    config = several.Config(models="sample", gpus="1,2", shards_dir=str(shards), data="sample", measured=str(path),
                            steps=2, batch_size=8, micro_batch_tokens=1024)
    assert several.read_speed("sample", config) == (2e12, "measured")
    assert several.read_speed("sample", replace(config, language="full")) == (0.35 * 989e12, "assumed")
    assert several.read_speed("paper", config)[1] == "assumed"
    several.main(replace(config, dollars=2.0))
    told = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in told.splitlines() if "sample |" in line]
    assert [row[:3] for row in rows] == [["sample", "1", "whole"], ["sample", "2", "whole"], ["sample", "2", "split"]]
    assert {row[-1] for row in rows} == {"measured"} and rows[0][6:8] == ["0%", "0%"]
    assert "- `--dollars=2`: given" in told and "- `--card=80`: NVIDIA" in told
    path.write_text('{"rows": {}}')
    with pytest.raises(UserError, match="no json file of extras/bench/training.py"):
        several.main(config)
    with pytest.raises(UserError, match="--models=nothing: paper, small"):
        several.main(replace(config, models="paper,nothing"))


def test_the_model_is_of_train_vlm_s_defaults():
    for name in ("batch_size", "micro_batch_tokens", "questions_per_image", "recompute", "language"):
        assert getattr(several.Config, name) == getattr(train_vlm.Config, name)
    assert several.Config.__dataclass_fields__.keys() > several.SOURCES.keys() and {*several.NAMES} < {
        *memory.Sizes.__args__}
