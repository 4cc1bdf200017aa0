"""extras/plot.py: what its bars show, what it leaves blank, and what it says where it cannot draw."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from test_cls import write_results
from train_cls import EIGHT

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script replaces the first
    spec = importlib.util.spec_from_file_location("plot", ROOT / "extras" / "plot.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "plot", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module.measured


def entries(scores):
    """{(dataset, name, seed): macro-F1} as read_results gives them."""
    return {key: {"dataset": key[0], "name": key[1], "seed": key[2], "test": {"macro_f1": score}}
            for key, score in scores.items()}


def draw(tmp_path, results):
    write_results(tmp_path, results.values())
    return subprocess.run(
        [sys.executable, "extras/plot.py", f"--out={tmp_path}",
         f"--path={tmp_path}/deep/picture.png"], cwd=ROOT, text=True, capture_output=True)


def test_bars_are_means_over_seeds_and_what_was_not_run_is_blank(measured):
    bars, names = measured(entries({("mine", "scratch", 0): 0.5, ("mine", "scratch", 1): 0.7,
                                    ("busi", "other", 0): 0.9, ("busi", "openmedq", 4): 0.8}))
    assert names == ["openmedq", "scratch", "other"] and list(bars) == ["busi", "mine"]
    assert list(bars["mine"]) == ["scratch"]
    assert bars["mine"]["scratch"] == pytest.approx((0.6, 0.02 ** 0.5))
    height, deviation = bars["busi"]["openmedq"]
    assert height == 0.8 and math.isnan(deviation)


def test_only_an_encoder_run_on_all_eight_has_their_mean(measured):
    scores = {(dataset, "biomedclip", seed): 0.1 * place + 0.02 * seed
              for place, dataset in enumerate(EIGHT) for seed in (0, 1)}
    scores |= {(dataset, "scratch", 0): 0.4 for dataset in EIGHT[1:]}
    scores["own", "scratch", 0] = scores["own", "biomedclip", 0] = 1.0
    bars, _ = measured(entries(scores))
    assert list(bars) == [*EIGHT, "own", "mean of the eight"]
    assert bars["mean of the eight"] == {"biomedclip": pytest.approx((0.36, 0.02 / 2 ** 0.5))}
    del scores["chaoyang", "biomedclip", 1]  # one seed that all eight have: no deviation
    height, deviation = measured(entries(scores))[0]["mean of the eight"]["biomedclip"]
    assert height == pytest.approx(0.36 - 0.01 / 8) and math.isnan(deviation)


@pytest.mark.parametrize("datasets", [EIGHT, ("a_name_of_a_dataset_that_is_rather_long",)])
def test_a_picture_is_drawn(datasets, tmp_path):
    pytest.importorskip("matplotlib")
    done = draw(tmp_path, entries({(dataset, name, seed): 0.7 for dataset in datasets for seed in (0, 1)
                                   for name in ("scratch", *map(str, range(6)))}))
    assert done.returncode == 0 and not done.stderr, done.stderr
    with Image.open(tmp_path / "deep" / "picture.png") as image:
        image.load()
        assert image.size == (1200, 500)
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10


def test_what_cannot_be_drawn_is_said_in_a_line(tmp_path):
    done = draw(tmp_path, {})
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no run yet" in done.stderr
