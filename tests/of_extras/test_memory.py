"""What extras/bench/memory.py computes is exact where a formula tells it, and is what a process takes."""

import contextlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from extras.bench import memory
from extras.bench.published import QWEN, write_folder
from plumbing.flags import parse_command_line, run

LAYERS = 2  # of each part, instead of the paper's 12 and 32, which take the longest


@pytest.fixture
def thin(monkeypatch):
    """Models of their widths, with fewer layers."""
    for name, (vision, language) in memory.CONFIGS.items():
        monkeypatch.setitem(memory.CONFIGS, name, (replace(vision, depth=LAYERS),
                                                   replace(language, num_hidden_layers=LAYERS)))


@pytest.mark.parametrize("mode", [contextlib.nullcontext, FakeTensorMode])
def test_the_ledger_is_exact(mode):
    with mode(), memory.Ledger() as ledger:
        x, w = torch.zeros(64, 256, requires_grad=True), torch.zeros(256, 512)
        given, wide = (64 * 256 + 256 * 512) * 4, 64 * 512 * 4  # bytes of x and w; of their product
        y = x @ w
        assert ledger.live == ledger.peak == given + wide
        y = y.relu()  # which keeps its result, so that the product dies
        assert (ledger.live, ledger.peak) == (given + wide, given + 2 * wide)
        loss = y.sum()
        del y  # and lives on for the backward pass
        assert ledger.live == given + wide + 4
        loss.backward()  # at its peak: the relu's result and its gradient, the loss and its own
        assert (ledger.live, ledger.peak) == (given + 4 + 64 * 256 * 4, given + 2 * wide + 8)
        x.grad.view(-1)[:7].mul_(2)  # views, and a result in place
        assert ledger.live == given + 4 + 64 * 256 * 4
        del x, w, loss
        assert (ledger.live, ledger.peak) == (0, given + 2 * wide + 8)


def has_peak():
    status = Path("/proc/self/status")
    return torch.cuda.is_available() or status.is_file() and "VmHWM:" in status.read_text()


@pytest.mark.skipif(not has_peak(), reason="no GPU, and no /proc that tells the peak of a process")
def test_a_process_takes_what_was_computed():
    batch = memory.pack("sample", 2048, 1)
    flags = memory.flags_of("sample")
    _, computed = memory.compute(flags, batch, memory.DTYPE, memory.DEVICE.type == "cuda")
    assert memory.measure_afresh("sample", 2048, 0) == pytest.approx(computed, rel=0.05)


@pytest.mark.skipif(not has_peak(), reason="no GPU, and no /proc that tells the peak of a process")
@pytest.mark.parametrize("bits", [0, 4])
def test_a_process_with_a_qwen_takes_what_was_computed(bits, tmp_path):
    folder = write_folder("qwen_small", tmp_path)
    flags = memory.flags_of("qwen_small", folder, base_bits=bits)
    _, computed = memory.compute(flags, memory.pack("qwen_small", 2048, 1), memory.DTYPE, memory.DEVICE.type == "cuda")
    assert memory.measure_afresh("qwen_small", 2048, 0, folder, bits) == pytest.approx(computed, rel=0.05)


@pytest.mark.skipif(not has_peak(), reason="no GPU, and no /proc that tells the peak of a process")
def test_a_process_with_a_gpt_oss_takes_what_was_computed(tmp_path):
    """Whose experts are in MXFP4; their tokens are spread evenly where it is computed."""
    folder = memory.write_small("gpt_oss_small", tmp_path)
    flags = memory.flags_of("gpt_oss_small", folder, base_bits=4)
    batch = memory.pack("gpt_oss_small", 768, 1)
    _, computed = memory.compute(flags, batch, memory.DTYPE, memory.DEVICE.type == "cuda")
    assert memory.measure_afresh("gpt_oss_small", 768, 0, folder, 4) == pytest.approx(computed, rel=0.05)


@pytest.mark.parametrize("bits, of_a_weight", [(0, 2), (16, 2), (8, 1), (4, 0.5 + 1 / 64 + 4 / 64 / 256)])
def test_a_qwens_frozen_matrices_take_their_bits(bits, of_a_weight, tmp_path):
    """And its embedding two bytes a number, the mergers four, since they train."""
    vision, text = QWEN["qwen_small"]
    folder = write_folder("qwen_small", tmp_path, values=False)
    weights, _ = memory.compute(memory.flags_of("qwen_small", folder, base_bits=bits),
                                memory.pack("qwen_small", 512, 1), torch.bfloat16)
    C, hidden, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    D, wide = vision.hidden_size, vision.merged_width
    matrices = layers * (C * 64 * (2 * 4 + 2 * 2) + 3 * C * hidden) + vision.depth * (4 * D * D + 2 * D * 4 * D)
    mergers = (1 + len(vision.deepstack_visual_indexes)) * (wide * wide + wide * C)
    ends = 2 * text.vocab_size * C
    lora = layers * 8 * (4 * C + 256 + 2 * 128 + 256 + 3 * (C + hidden))
    known = of_a_weight * matrices + 2 * ends + 4 * (mergers + lora)
    assert known < weights < 1.01 * known + 4 * 196 * D + 3 * 4 * 256 * D


def test_smaller_micro_batches_and_recomputing_take_less():
    def peak(tokens, recompute):
        flags = memory.flags_of("sample", recompute=recompute)
        return memory.compute(flags, memory.pack("sample", tokens, 1), torch.bfloat16)[1]

    whole = peak(2048, 0)
    assert whole > 1.2 * peak(2048, 0.5) > 1.2 * 1.2 * peak(2048, 1)
    assert whole > 1.5 * peak(1024, 0)


def test_the_papers_frozen_weights_take_two_bytes_each(thin):
    C, hidden, V = 4096, 11008, 32000  # parameters of all parts, by hand
    language = 2 * V * C + C + LAYERS * (4 * C * C + 3 * C * hidden + 2 * C)
    lora = LAYERS * 2 * 8 * 2 * C  # of q_proj and v_proj
    C = 768
    vision = (3 * 16 * 16 + 1) * C + 198 * C + 2 * C + LAYERS * (12 * C * C + 13 * C)
    others = vision + C * 4096 + 4096
    weights, peak = memory.compute(memory.flags_of("paper"), memory.pack("paper", 256, 1), torch.bfloat16)
    assert weights == 2 * language + 4 * (others + lora)
    fixed = 2 * language + 16 * (others + lora)  # with gradients and both moments
    assert fixed < peak < fixed + 2e8


def test_what_fits_lies_between_the_sizes():
    sizes, peaks = [1024, 2048, 4096], [10, 14, 22]
    largest = [memory.fit(sizes, peaks, room) for room in (9, 10, 12, 14, 18.1, 22, 50)]
    assert largest == ["< 1,024", "1,024", "1,536", "2,048", "3,072", ">= 4,096", ">= 4,096"]


def test_tables_have_a_line_for_every_size_and_card(thin, capsys):
    memory.main(memory.Config(model="sample", micro_batch_tokens="512,128", questions="1",
                              recompute="0.5", cards="80,1"))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows[0] == "| tokens | images | weights | recompute 0.5 |"
    assert [row.split(" | ")[:2] for row in rows[2:4]] == [["| 128", "1"], ["| 512", "7"]]
    assert rows[4:] == ["| card | recompute 0.5 |", "| --: | --: |", "| 1 GB | >= 512 |",
                        "| 80 GB | >= 512 |"]


@pytest.mark.parametrize("flag, told", [
    ("--recompute=2", "--recompute=2: numbers from 0 to 1"),
    ("--recompute=0,nan", "--recompute=0,nan: numbers from 0 to 1"),
    ("--cards=24,forty", "--cards=24,forty: numbers from 1 to 1,000"),
    ("--cards=", "--cards=: numbers from 1 to 1,000"),
    ("--micro_batch_tokens=0", "--micro_batch_tokens=0: numbers from 1 to 1,000,000"),
    ("--micro_batch_tokens=100", "--micro_batch_tokens=100: too few for an image's 197"),
    ("--questions=1.5", "--questions=1.5: numbers from 1 to 1,000"),
    ("--base_bits=4", "--base_bits=4: 16, 8 or 4, of a Qwen3-VL and a gpt-oss; 0 of every model"),
    ("--card=24", "unknown flag '--card=24': did you mean --cards?")])
def test_a_mistake_is_told_in_one_line(flag, told, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memory.py", flag])
    with pytest.raises(SystemExit) as stopped:
        run(memory.main, parse_command_line(memory.Config))
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"memory.py: {told}")
