"""
extras/look/plot.py: what its bars and lines show, what it leaves blank, and what it says where it cannot
draw; and that assets/architecture.svg, drawn by hand, shows what the code does.
"""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_vlm
from extras.look import mix, plot
from lora import add_lora
from model import attend, packed_mask
from plumbing.flags import UserError, parse_command_line, run
from plumbing.sources import settle
from tasks.encoders import EIGHT, measured
from prepare.datasets import DATASETS
from test_cls import write_results
from weights import build_vlm

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # matplotlib's, where labels do not fit
drawing = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="no matplotlib here")


# ----------------------------------------------------------------------------- classification

def entries(scores):
    """{(dataset, name, seed): macro-F1} as read_results gives them."""
    return {key: {"dataset": key[0], "name": key[1], "seed": key[2], "test": {"macro_f1": score}}
            for key, score in scores.items()}


def write_lines(path, items):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


def test_bars_are_means_over_seeds_and_what_was_not_run_is_blank():
    bars, names = measured(entries({("mine", "scratch", 0): 0.5, ("mine", "scratch", 1): 0.7,
                                    ("busi", "other", 0): 0.9, ("busi", "openmedq", 4): 0.8}))
    assert names == ["openmedq", "scratch", "other"] and list(bars) == ["busi", "mine"]
    assert list(bars["mine"]) == ["scratch"]
    assert bars["mine"]["scratch"] == pytest.approx((0.6, 0.02 ** 0.5))
    height, deviation = bars["busi"]["openmedq"]
    assert height == 0.8 and math.isnan(deviation)


def test_only_an_encoder_run_on_all_eight_has_their_mean():
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


@drawing
def test_bars_are_as_high_as_measured_and_lie_in_their_group(tmp_path):
    write_results(tmp_path, entries({
        ("busi", "scratch", 0): 0.5, ("busi", "scratch", 1): 0.7, ("busi", "mine", 0): 0.3,
        ("chaoyang", "scratch", 0): 0.9}).values())
    figure = plot.draw_classification(plot.Config(out=str(tmp_path)))
    axes, = figure.axes
    bars = {str(handle.get_label()): [(round(bar.get_x() + bar.get_width() / 2), bar.get_height())
                                      for bar in handle] for handle in axes.containers if len(handle)
            and hasattr(handle, "patches")}
    assert bars == {"scratch": [(0, pytest.approx(0.6)), (1, 0.9)], "mine": [(0, 0.3)]}
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["busi", "chaoyang"]
    assert axes.get_ylim() == (0.2, 1) and axes.get_ylabel() == "macro-F1 (axis starts at 0.2)"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["scratch", "mine"]
    assert axes.get_title() == "Macro-F1 on the test images, 1 to 2 seeds: mean and standard deviation"


@drawing
@pytest.mark.parametrize("datasets", [EIGHT, ("a_name_of_a_dataset_that_is_rather_long",)])
def test_a_picture_is_drawn(datasets, tmp_path):
    write_results(tmp_path, entries({
        (dataset, name, seed): 0.7 for dataset in datasets for seed in (0, 1)
        for name in ("scratch", *map(str, range(6)))}).values())
    plot.main(plot.Config(out=str(tmp_path), path=f"{tmp_path}/deep/picture.png"))
    with Image.open(tmp_path / "deep" / "picture.png") as image:
        image.load()
        assert image.size == (1200, 500)
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10


# ----------------------------------------------------------------------------- training

def step(number, loss=2.0, rate=1e-3, speed=100.0):
    return {"step": number, "loss": loss, "learning_rate": rate, "gradient_norm": 1.0,
            "samples_per_second": speed, "padded": 0.1}


def held_out(number, loss):
    return {"step": number, "held_out_loss": loss}


def curves(axes):
    """[(steps, values)] of the lines, without those that only the legend has."""
    return [tuple(np.asarray(data).tolist() for data in line.get_data()) for line in axes.lines
            if len(line.get_xdata())]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


@drawing
def test_curves_are_those_of_the_logs(tmp_path):
    losses = {"one": [6.0, 4.0, 3.0], "two": [5.0, 2.5]}
    for name, values in losses.items():
        steps = [step(10 * number, loss, number * 1e-4, 90.5 + loss)
                 for number, loss in enumerate(values, 1)]
        write_lines(tmp_path / name / "log.jsonl", [*steps, held_out(10 * len(values), 3.5)])
    figure = plot.draw_training(plot.Config(runs=f"{tmp_path}/one, {tmp_path}/two,{tmp_path}/one"))
    loss, rate, speed = figure.axes
    x = {"one": [10, 20, 30], "two": [10, 20]}
    assert curves(loss) == [drawn for name, values in losses.items() for drawn in (
        [(x[name], values)] * 2 + [(x[name][-1:], [3.5])])]  # raw, smoothed (alike: so few), held out
    assert curves(rate) == [([10, 20, 30], [1e-4, 2e-4, 3 * 1e-4]), ([10, 20], [1e-4, 2e-4])]
    assert curves(speed) == [drawn for name, values in losses.items() for drawn in (
        [(x[name], [90.5 + loss for loss in values])] * 2)]
    assert legend(figure) == ["one", "two", "held out"]
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == ["loss, nats a token", "learning rate", "samples/s"]
    assert speed.get_xlabel() == "step" and loss.get_xlim() == rate.get_xlim() == speed.get_xlim()
    assert rate.get_ylim()[0] == speed.get_ylim()[0] == 0
    assert [loss.lines[0].get_alpha(), loss.lines[1].get_alpha()] == [plot.PALE, None]
    colours = [line.get_color() for line in loss.lines[:6]]
    assert colours == [plot.RUN_COLOURS[0]] * 3 + [plot.RUN_COLOURS[1]] * 3


@drawing
def test_a_loss_that_spans_more_than_a_decade_has_a_log_axis(tmp_path):
    for least, scale in [(0.5, "linear"), (0.49, "log")]:
        write_lines(tmp_path / "log.jsonl", [step(10, 5.0), held_out(10, least), step(20, 0.0)])
        loss, rate, speed = plot.draw_training(plot.Config(runs=str(tmp_path))).axes
        assert [axes.get_yscale() for axes in (loss, rate, speed)] == [scale, "linear", "linear"]


@drawing
def test_an_error_is_marked_where_the_run_ended(tmp_path):
    write_lines(tmp_path / "log.jsonl", [step(10), {"step": 13, "error": "loss nan", "samples": []}])
    figure = plot.draw_training(plot.Config(runs=str(tmp_path)))
    assert figure.axes[0].lines[-2].get_xdata() == [13, 13]
    assert legend(figure) == [tmp_path.name, "stopped by an error"]
    loss, rate, speed = figure.axes  # each line of one point is a dot
    assert [line.get_marker() for line in (loss.lines[1], rate.lines[0], speed.lines[1])] == ["o"] * 3


def rewarded(number, reward, **more):
    return {"step": number, "reward": reward, "reward_spread": 0.1 * number, "dead_groups": 0.25, "length": 20 + number,
            "truncated": 0.5, "entropy": 0.3, "loss": -1e-3, "gradient_norm": None, "learning_rate": 1e-5,
            "clipped": 0.125, "sampled_tokens_per_second": 9.0, "trained_tokens_per_second": 9.0} | more


@drawing
def test_rewards_are_drawn_with_what_is_forgotten(tmp_path):
    scores = [{"boxes": 50.0, "words": 90.0}, {"boxes": 60.0, "words": 40.0}]
    write_lines(tmp_path / "one/log.jsonl", [
        {"step": 0, "held_out": scores[0]}, rewarded(1, 0.5), rewarded(2, 0.75), {"step": 2, "held_out": scores[1]}])
    write_lines(tmp_path / "two/log.jsonl", [{"step": 0, "held_out": {"other": 10.0}}, rewarded(1, 0.25, kl=0.01)])
    figure = plot.draw_training(plot.Config(runs=f"{tmp_path}/one,{tmp_path}/two"))
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "reward", "held out, %", "share", "length, tokens", "entropy, nats", "KL, nats"]
    reward, held_out, share, length, entropy, kl = figure.axes
    assert curves(reward) == [([1, 2], [0.5, 0.75])] * 2 + [([1], [0.25])] * 2
    assert [line.get_marker() for line in reward.lines if len(line.get_xdata()) == 1][-1] == "o"  # else not seen
    bands = [band.get_paths()[0].vertices for band in reward.collections]
    assert [(band[:, 0].max(), band[:, 1].min(), band[:, 1].max()) for band in bands] == [
        (2, pytest.approx(0.4), pytest.approx(0.95)), (1, pytest.approx(0.15), pytest.approx(0.35))]
    assert curves(held_out) == [([0, 2], [50, 60]), ([0, 2], [90, 40]), ([0], [10])]
    assert [text.get_text() for text in held_out.get_legend().get_texts()] == ["boxes", "words", "other"]
    looks = [(line.get_linestyle(), line.get_color()) for line in held_out.lines if len(line.get_xdata())]
    assert looks == list(zip(("-", "--", ":"), np.array(plot.RUN_COLOURS)[[0, 0, 1]]))  # of the dataset, of the run
    assert [text.get_text() for text in share.get_legend().get_texts()] == ["dead groups", "truncated", "clipped"]
    assert [values[0] for _, values in curves(share)[:6]] == [0.25] * 2 + [0.5] * 2 + [0.125] * 2
    assert curves(length)[0] == ([1, 2], [21, 22]) and curves(entropy)[0] == ([1, 2], [0.3, 0.3])
    assert [curve for curve in curves(kl) if curve[0]] == [([1], [0.01])] * 2
    assert legend(figure) == ["one", "two"]


@drawing
def test_of_a_run_that_has_just_begun_the_first_scores_are_drawn(tmp_path):
    write_lines(tmp_path / "log.jsonl", [{"step": 0, "held_out": {"boxes": 50.0}}])
    figure = plot.draw_training(plot.Config(runs=str(tmp_path)))
    assert [axes.get_ylabel() for axes in figure.axes] == ["held out, %"]
    assert curves(figure.axes[0]) == [([0], [50])]


def test_losses_and_rewards_have_no_axes_in_common(tmp_path):
    for name, line in (("a", step(10)), ("b", rewarded(1, 0.5))):
        write_lines(tmp_path / name / "log.jsonl", [line])
    with pytest.raises(UserError, match="b by train_grpo.py, the others by train_vlm.py"):
        plot.draw_training(plot.Config(runs=f"{tmp_path}/a,{tmp_path}/b"))


@drawing
def test_runs_are_told_apart_and_one_that_logged_nothing_is_named(tmp_path):
    for name, lines in {"a/run": [step(10)], "b/run": [step(10)], "new": []}.items():
        write_lines(tmp_path / name / "log.jsonl", lines)
    folders = [f"{tmp_path}/{name}" for name in ("a/run", "b/run", "new")]
    names = legend(plot.draw_training(plot.Config(runs=",".join(folders))))
    assert [name.replace("\n", "") for name in names] == [*folders[:2], "new (nothing logged yet)"]


@drawing
def test_without_runs_the_newest_is_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, age in (("new", 1), ("old", 2)):
        write_lines(Path("out", name, "log.jsonl"), [step(10)])
        os.utime(Path("out", name, "log.jsonl"), (1e9 - age, 1e9 - age))
    assert legend(plot.draw_training(plot.Config())) == ["new"]


def test_a_torn_line_is_passed_over_and_what_came_again_counts_once(tmp_path):
    lines = [json.dumps(entry) for entry in (
        step(10, 5.0), step(20, 4.0), held_out(20, 4.5), step(30, 3.0), held_out(30, 3.5),
        {"step": 33, "error": "loss nan"}, step(25, 3.8), step(35, 2.8), held_out(35, 2.9))]
    lines = [*lines[:4], "[1]", "1", "\0\0", *lines[4:], lines[0][:30]]
    (tmp_path / "log.jsonl").write_bytes("\n".join(lines).encode() + b"\xff")
    log = plot.read_log(tmp_path)
    assert log["loss"] == ([10, 20, 25, 35], [5.0, 4.0, 3.8, 2.8])
    assert log["held_out_loss"] == ([20, 35], [4.5, 2.9]) and log["error"] == ([], [])


@pytest.mark.parametrize("line", [
    '{"step": "20", "loss": 1.0}', '{"step": null, "loss": 1.0}', '{"step": -1, "loss": 1.0}', '{"loss": 1.0}',
    '{"step": 20, "loss": NaN}', '{"step": 20, "loss": Infinity}', '{"step": 20, "loss": "1"}', '{"step": true}',
    '{"step": 20, "held_out": {"boxes": "90"}}', '{"step": 20, "held_out": 90}', '{"step": 20, "reward": null}',
    '{"step": 20, "learning_rate": [1]}', '{"step": 1e400, "loss": 1}', "[" * 100_000, "null", ""])
def test_an_altered_line_is_left_out_and_counted(line, tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text("\n".join([json.dumps(step(10, 5.0)), line, json.dumps(step(30, 3.0))]))
    log = plot.read_log(tmp_path)
    assert log["loss"] == ([10, 30], [5.0, 3.0]) and log["held_out_loss"] == ([], [])
    assert capsys.readouterr().err == (f"{tmp_path}/log.jsonl: 1 of 3 lines left out: torn, altered or without "
                                       "finite numbers\n")


@pytest.mark.parametrize("count", [0, 1, 3, 39, 40, 1000])
def test_the_running_mean_is_that_of_its_window(count):
    values = np.random.default_rng(0).normal(size=count).tolist()
    expected = []
    for at in range(count):
        reach = min(count // 40, at)
        expected.append(np.mean(values[at - reach:at + reach + 1]))
    assert plot.smooth(values).tolist() == pytest.approx(expected)


# ----------------------------------------------------------------------------- mix

@drawing
@pytest.mark.parametrize("prepared", [{}, {"path_vqa": 19_000, "med_qa": 7, "ubench": 120}])
def test_the_mix_is_that_of_the_table(prepared, monkeypatch):
    prepared = dict(prepared)
    monkeypatch.setattr(mix, "prepared_counts", lambda folder: (prepared[folder.parent.name], 3, 1)
                        if folder.parent.name in prepared else None)
    figure = plot.draw_mix(plot.Config(shards_dir="nowhere"))
    axes, = figure.axes
    names = [tick.get_text() for tick in axes.get_yticklabels()]
    table = "\n".join(mix.table("nowhere"))
    assert names[:2] == ["sum of text alone", "sum of image and text"]
    listed = set(re.findall(r"^\| (\w+) \|", table, re.M)) - {"dataset", "gap"}
    assert listed == set(names[2:]) and len(names) == 2 + len(listed)
    published = {name: DATASETS[name].counts.get("train", 0) for name in names[2:]}
    for kind, ours in [("image and text", ("path_vqa", "ubench")), ("text alone", ("med_qa",))]:
        found = re.search(rf"{kind}\*\*: sum \| ([\d,]+)", table)
        published[f"sum of {kind}"] = int(found[1].replace(",", ""))
        if prepared:
            prepared |= {f"sum of {kind}": sum(prepared[name] for name in ours)}
    pale, solid = ([bar.get_width() for bar in bars] for bars in axes.containers)
    assert dict(zip(names, pale)) == published and pale[2:] == sorted(pale[2:])
    assert dict(zip(names, solid)) == dict.fromkeys(names, 0) | prepared
    words = [text.get_text() for text in axes.texts]
    assert words[:3] == ["published", "prepared\nhere", "the\npaper's"]
    cells = dict(zip(names, zip(words[3::3], words[4::3], words[5::3])))
    assert cells["ubench"] == ("unknown", "120" if prepared else "", "")
    assert cells["path_vqa"] == ("19,654", "19,000" if prepared else "", "")
    assert cells["sum of image and text"] == ("2,393,551", "19,120" if prepared else "", "2,940,000")
    marks, = axes.collections
    assert [segment[0][0] for segment in marks.get_segments()] == [410_000, 2_940_000]
    colours = dict(zip(names, (bar.get_facecolor()[:3] for bar in axes.containers[1])))
    kinds = {colour: {name for name in names if colours[name] == colour} for colour in colours.values()}
    text_alone = {"med_qa", "med_mcqa", "pubmed_qa", "pubmed_qa_artificial", "sum of text alone"}
    assert text_alone in kinds.values() and len(kinds) == 2 and axes.get_xscale() == "log"
    assert axes.get_xlim()[0] < min(count for count in (*pale, *solid) if count)
    assert legend(figure) == ["image and text", "text alone", "published", "prepared here",
                              "the paper's sum"]


# ----------------------------------------------------------------------------- mistakes

def test_the_command_says_in_a_line_what_it_cannot_draw(tmp_path):
    done = subprocess.run([sys.executable, "extras/look/plot.py", f"--out={tmp_path}"], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no run yet" in done.stderr


@pytest.mark.parametrize("flags, told", [
    (["--what=curves"], "argument --what: invalid choice: 'curves'"),
    (["--out=none"], "none: no run yet; make one with `python train_cls.py`"),
    (["--what=training"], "no run in out/; make one with `python train_vlm.py` or name it in --runs"),
    (["--what=training", "--runs=a"], "a/log.jsonl: no log here; --runs takes folders that"),
    (["--what=training", "--runs=empty"], "empty: nothing logged yet"),
    (["--what=training", "--runs=" + ",".join("abcdefgh")], "--runs: 8 runs; only 7 can be told apart"),
    pytest.param(["--what=mix", "--path=mix.doc"], "--path=mix.doc: Format 'doc' is not", marks=drawing),
    pytest.param(["--what=mix", "--path=file/mix.png"], "--path=file/mix.png: [Errno", marks=drawing)])
def test_a_mistake_is_told_in_one_line(flags, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "empty" / "log.jsonl", [])
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["plot.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        run(plot.main, parse_command_line(plot.Config))
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"plot.py: {told}")


def test_a_missing_matplotlib_is_told_with_what_to_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="run `pip install -r extras/requirements.txt`$"):
        plot.draw_mix(plot.Config(shards_dir="nowhere"))


# ----------------------------------------------------------------------------- architecture.svg

QUESTIONS = [[(5, 3), (5, 2)], [(5, 2)]]  # (prompt, answer) tokens in the figure, a list an image
IMAGE = 5  # squares that stand for an image's 197 tokens


@pytest.fixture(scope="module")
def svg():
    content = (ROOT / "assets" / "architecture.svg").read_bytes()
    assert len(content) < 120_000
    tree = ElementTree.fromstring(content)
    for element in tree.iter():
        element.tag = element.tag.split("}")[-1]
    return tree


def area(d, size):
    """(size, size) bool: the squares inside a path of horizontal and vertical lines."""
    inside, x, y, begin = np.zeros((size, size), bool), 0, 0, 0
    for command, numbers in re.findall("([a-zA-Z])([^a-zA-Z]*)", d):
        numbers = list(map(int, numbers.split()))
        assert command in "MhHvVz"
        if command == "M":
            x, y = numbers
            begin = y
        elif command in "hH":
            x = numbers[0] + (x if command == "h" else 0)
        else:
            after = begin if command == "z" else numbers[0] + (y if command == "v" else 0)
            inside[min(y, after):max(y, after), x:] ^= True  # inside: right of an odd number of lines
            y = after
    return inside


def test_its_mask_is_the_models(svg):
    group, branch, kinds = [], [], []
    for number, questions in enumerate(QUESTIONS):
        kinds += ["bos"] + ["image"] * IMAGE
        branch += [0] * (1 + IMAGE)
        for q, (prompt, answer) in enumerate(questions, 1):
            kinds += ["prompt"] * prompt + ["answer"] * answer
            branch += [q] * (prompt + answer)
        group += [number] * (len(branch) - len(group))
    size = len(kinds)
    masks, alike = packed_mask(torch.tensor(group), torch.tensor(branch)), torch.zeros(size, 1, size)
    sees = (attend(alike, alike, torch.eye(size)[:, None], masks)[:, 0] > 0).numpy()
    drawn = {kind: np.zeros((size, size), bool) for kind in set(kinds)}
    for path in svg.find(".//g[@id='mask']").findall("path"):
        if (kind := path.get("class")) in drawn:
            squares = area(path.get("d"), size)
            assert not (drawn[kind] & squares).any()
            drawn[kind] |= squares
    for kind, squares in drawn.items():
        assert squares.tolist() == (sees & [other == kind for other in kinds]).tolist(), kind

    cells = {}  # height in the figure -> (x, kind) of the tokens
    for path in svg.findall("path"):
        for x, y in re.findall(r"M([\d.]+) ([\d.]+)", path.get("d")):
            cells.setdefault(float(y), []).append((float(x), path.get("class")))
    row = sorted(next(line for line in cells.values() if len(line) == size))
    assert [kind for _, kind in row] == kinds
    arrows = sorted(x for line in cells.values() for x, kind in line if kind == "line gold")
    ends = [at + 1 == size or (group[at], branch[at]) != (group[at + 1], branch[at + 1])
            for at in range(size)]
    supervised = [x for at, (x, kind) in enumerate(row)
                  if kind == "answer" or not ends[at] and kinds[at + 1] == "answer"]
    assert len({arrow - x for arrow, x in zip(arrows, supervised, strict=True)}) == 1


def test_its_numbers_are_the_models(svg):
    flags, vlm = settle(train_vlm.Config()), build_vlm("paper", 32_000, device="meta")
    vision, language = vlm.vision.config, vlm.language.config
    millions = [sum(p.numel() for p in part.parameters()) / 1e6
                for part in (vlm.vision, vlm.projector, vlm.language)]
    add_lora(vlm.language, flags.lora_targets, flags.lora_r)
    trained = sum(p.numel() for p in vlm.language.parameters() if p.requires_grad) / 1e6
    size, N = vision.image_size, vlm.vision.tokens(vision.image_size, vision.image_size)
    assert (flags.vision, flags.projector, flags.language) == ("full", "full", "lora")
    assert flags.lora_targets == "q_proj,v_proj"
    words = ["".join(text.itertext()) for text in svg.iter("text")]
    for told in (f"{size} × {size} × 3", f"{N} × {vision.width}", f"{N} × {language.hidden_size}",
                 f"{N} tokens", f"1 … {N}", f"{N + 1} …", f"ViT-B/{vision.patch_size}",
                 f"{millions[0]:.0f}M, trained", f"{millions[1]:.1f}M, trained",
                 f"{trained:.1f}M, trained",
                 f"{language.num_hidden_layers} layers, {language.hidden_size} wide, "
                 f"{millions[2] / 1000:.1f}B frozen", f"LoRA, r = {flags.lora_r}"):
        assert told in words
    assert min(map(int, re.findall(r"font(?:-size)?: (\d+)px", svg.find("style").text))) >= 18
    assert not [value for element in svg.iter() for value in element.attrib.values()
                if "//" in value or value.startswith("data:")]
