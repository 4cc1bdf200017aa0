"""extras/bench/plan.py: what it works out, by a second way on paper."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_vlm
from extras.bench import plan
from plumbing.flags import UserError
from plumbing.sources import settle
from weights import build_vlm
from zoo.qwen3_files import CONFIGS, write_config
from zoo.qwen3_vl import TextConfig, VisionConfig


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
    (tmp_path / "qwen").mkdir()
    write_config(tmp_path / "qwen", *CONFIGS["qwen_sample"])
    for name in ("sample", "qwen"):
        model, recipe = plan.make(name, "lora", torch.float32)
        for part, how in vars(recipe).items():
            assert {p.requires_grad for p in getattr(model, part).parameters()} == {
                "full": {True}, "lora": {True, False}, "frozen": {False}}[how]
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        seconds, size = plan.time_saving(model)
        assert seconds > 0 and 12 * trained < size < 12 * trained + 90_000
        assert [path.name for path in tmp_path.iterdir()] == ["qwen"]


EIGHT = VisionConfig(), TextConfig(151936, 4096, 12288, 36, 32, 8, head_dim=128, rope_theta=5e6)
FOUR = (VisionConfig(24, 1024, 4096, 16, out_hidden_size=2560, deepstack_visual_indexes=(5, 11, 17)),
        TextConfig(151936, 2560, 9728, 36, 32, 8, head_dim=128, rope_theta=5e6, tie_word_embeddings=True))


@pytest.mark.parametrize("sizes, side, known", [
    (EIGHT, 448, 10.2), (EIGHT, 768, 23.1), (EIGHT, 1280, 61.9), (FOUR, 448, 5.6), (FOUR, 1280, 36.2)])
def test_flop_of_a_step_of_qwens_by_hand(sizes, side, known, tmp_path):
    """
    TFLOP of LoRA on a sample of one image and 128 tokens of text, all of them predicted, worked out elsewhere with
    attention and with the whole of the last block; vision and mergers are frozen.
    """
    write_config(tmp_path, *sizes)
    model, _ = plan.make(str(tmp_path), "lora", torch.bfloat16)
    N = model.vision.tokens(side, side)
    step = SimpleNamespace(group=np.zeros(N + 128), image_at=range(N), targets=range(128))
    flop = plan.count_flop(model, [step], SimpleNamespace(vision="frozen", projector="frozen", language="lora"))
    vision, text = sizes
    flop += 4 * vision.depth * (4 * N) ** 2 * vision.hidden_size  # attention of patches, forward
    flop += 3 * 2 * 36 * (N + 128) ** 2 * 32 * 128  # causal: half of it; and twice that backward
    flop += 2 * 2 * 3 * text.hidden_size * text.intermediate_size * N  # the last block's MLP of images' tokens
    assert flop / 1e12 == pytest.approx(known, rel=0.01)


def test_what_it_takes_for_the_recipe_is_train_vlm_s(tmp_path):
    write_config(tmp_path, *CONFIGS["qwen_sample"])
    for model, recipe, targets in (("paper", plan.RECIPE, plan.LORA["targets"]),
                                   (str(tmp_path), plan.QWEN_RECIPE, plan.SEVEN)):
        flags = settle(train_vlm.Config(model=model))
        assert vars(recipe) == {part: getattr(flags, part) for part in ("vision", "projector", "language")}
        assert plan.LORA | {"targets": targets} == {
            "targets": flags.lora_targets, "r": flags.lora_r, "alpha": flags.lora_alpha,
            "dropout": flags.lora_dropout}
    assert plan.CHECKPOINTS == flags.keep + 2 and plan.Config.batch_size == flags.batch_size
    assert plan.Config.epochs == flags.epochs


def test_of_experts_a_token_counts_those_that_it_has():
    """gpt_oss_small: of 8 experts a token has 4; the last layer's are for the tokens that predict alone."""
    model = build_vlm("gpt_oss_small", 1000, device="meta").requires_grad_(False)
    step = SimpleNamespace(group=np.zeros(50), image_at=np.zeros(0), targets=range(10))
    attention = 256 * (256 + 64 + 64 + 256)
    expert, router = 3 * 256 * 256, 8 * 256
    layer = 4 * expert + router
    by_hand = 2 * (50 * (6 * attention + 5 * layer) + 10 * (layer + 1000 * 256))
    frozen = SimpleNamespace(vision="frozen", projector="frozen", language="frozen")
    assert plan.count_flop(model, [step], frozen) == by_hand
    with pytest.raises(UserError, match="--language=frozen: worked out for gpt_oss_20b alone"):
        plan.make("paper", "frozen", torch.float32)
