"""extras/bench/plan.py: what it works out, by a second way on paper."""

import pytest
import torch

import train_vlm
from extras.bench import plan
from plumbing.sources import settle


def test_the_papers_run_by_hand(monkeypatch, capsys):
    monkeypatch.setattr(plan, "time_saving", lambda model: (9.0, 1_250_000_000))
    plan.main(plan.Config())
    printed = capsys.readouterr().out.splitlines()
    rows = [[float(cell.replace(",", "").strip(" %")) for cell in line.strip("|").split("|")]
            for line in [line for line in printed if line.startswith("|")][2:]]
    # LLaMA-7B beside LoRA: forward, and backward through frozen weights; the ViT trains: once more
    images = 64 * 2.3 / 3.35
    tokens = 64 * 60 + images * 198
    layer = 4 * 4096 ** 2 + 3 * 4096 * 11008
    head, last = 32000 * 4096 * 64 * 31, 3 * 4096 * 11008 * (tokens - 64 * 31)
    flop = 4 * (32 * layer * tokens + head - last) + 6 * 12 * 12 * 768 ** 2 * 197 * images
    seconds = flop / (0.35 * 989e12)
    assert rows[0][3] == pytest.approx(15 * 3.35e6 / 64 * seconds / 3600, rel=0.01)
    gradients = 4 * (85.8e6 + 768 * 4096 + 32 * 2 * 8 * 8192)  # bytes
    for row in rows:
        gpus, times = row[0], row[1] / 64
        network = 2 * (gpus - 1) / gpus * gradients / 50e9
        assert row[5] == pytest.approx(1e3 * (seconds * times / gpus + network), rel=0.01, abs=0.5)
        assert row[4] == pytest.approx(gpus * row[3], rel=0.1) and row[2] == 3_350_000 * times
        assert row[7] == pytest.approx(images * times * 0.043 / row[5] * 1e3, rel=0.02, abs=0.1)
        assert row[8] == 0.5  # 9 s in half an hour
    assert len(rows) == 6 and "a checkpoint 1.25 GB" in printed[-2]


def test_a_checkpoint_of_what_trains_is_timed(tmp_path, monkeypatch):
    """On the sample's sizes: weights and two moments of the ViT, the projector and LoRA, in float32."""
    monkeypatch.chdir(tmp_path)
    model = plan.make("sample", torch.float32)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    seconds, size = plan.time_saving(model)
    assert seconds > 0 and 12 * trained < size < 12 * trained + 60_000 and not list(tmp_path.iterdir())


def test_what_it_takes_for_the_recipe_is_train_vlm_s():
    flags = settle(train_vlm.Config())
    assert vars(plan.RECIPE) == {part: getattr(flags, part) for part in ("vision", "projector", "language")}
    assert plan.LORA == {"targets": flags.lora_targets, "r": flags.lora_r, "alpha": flags.lora_alpha,
                         "dropout": flags.lora_dropout}
    assert plan.CHECKPOINTS == flags.keep + 2 and plan.Config.batch_size == flags.batch_size
    assert plan.Config.epochs == flags.epochs
