"""
Draw what was run and what there is to train on, a picture a command.

    python extras/look/plot.py                                         the runs of train_cls.py, as bars
    python extras/look/plot.py --what=training --runs=out/a,out/b      the curves of train_vlm.py's runs, or
                                                                       of train_grpo.py's
    python extras/look/plot.py --what=mix                              extras/look/mix.py's table

Classification has a group of bars a dataset and a bar an encoder, beside the paper's means; what was
not run is left blank. The training loss is a running mean over about a twentieth of the run, with what
was logged faint behind it. Needs `pip install -r extras/requirements.txt`.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import numpy as np

from extras.look import mix
from plumbing.flags import Share, UserError, parse_command_line, run
from tasks.encoders import MEAN, PAPER, measured, read_results

WIDTH = 12  # inches of 100 pixels
FONT = 12  # points of 1.4 pixels
# Okabe and Ito's colours, which those who are colour-blind can tell apart; the encoders keep theirs
# whichever others are drawn beside them.
COLOURS = {"openmedq": "#D55E00", "biomedclip": "#0072B2", "pubmedclip": "#56B4E9",
           "pmc_clip": "#009E73", "scratch": "#999999"}
MORE_COLOURS = ("#E69F00", "#CC79A7", "#F0E442", "#000000")
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")
MIX_COLOURS = {"image and text": "#0072B2", "text alone": "#E69F00"}
GREY = "#333333"
PALE = 0.35  # of 1, which covers
HELD_OUT = {"label": "held out", "linestyle": "--", "marker": "o", "markersize": 4}
ERROR = {"label": "stopped by an error", "linestyle": ":", "linewidth": 2}
LOGGED = ("loss", "held_out_loss", "learning_rate", "samples_per_second", "error")
REWARDED = ("reward", "reward_spread", "dead_groups", "truncated", "clipped", "length", "entropy", "kl")  # GRPO's
STYLES = ("-", "--", ":", "-.")  # of what shares axes


@dataclass(frozen=True)
class Config:
    what: Literal["classification", "training", "mix"] = "classification"  # to draw
    path: str = ""  # of the picture, .png, .svg or .pdf; none: out/<what>.png
    out: str = "out/cls"  # classification: where train_cls.py put its runs
    start: Share = 0.4  # classification: of the y axis, which says so; lower where a bar needs it
    runs: str = ""  # training: folders of runs, with commas, all of one script; none: the newest in out/
    shards_dir: str = "shards"  # mix: where prepare/all.py put the datasets


def new_figure(height, ratios=(1,)):
    """A figure so many inches high, and its axes: one below the other in these heights, x shared."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("no matplotlib here; run `pip install -r extras/requirements.txt`") from None
    figure = Figure((WIDTH, height), dpi=100, layout="constrained")
    rows = figure.subplots(len(ratios), sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    for axes in rows:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=FONT)
        axes.set_axisbelow(True)
    return figure, rows


def wrap(name, width):
    """A name in lines of at most so many characters, which end in an underscore where they can."""
    return "\n".join(re.findall(rf".{{1,{width}}}$|.{{1,{width - 1}}}[_ -]|.{{{width}}}", name))


def add_legend(figure, handles):
    """A legend of labelled artists below a figure, in as many columns as their names leave room for."""
    labels = [wrap(handle.get_label(), 100) for handle in handles]
    widths = [6 + len(label) for label in labels]  # of which about 110 fit in a line
    columns = len(labels) if sum(widths) <= 110 else max(1, 110 // max(widths))
    figure.legend(handles, labels, ncols=columns, loc="outside lower center", fontsize=FONT,
                  frameon=False)
    lines = sum(1 + label.count("\n") for label in labels) / columns
    figure.set_figheight(figure.get_figheight() + 0.25 * max(0, math.ceil(lines) - 2))


# ----------------------------------------------------------------------------- classification

def draw_classification(config):
    """Macro-F1 of every dataset and encoder, like the paper's figure 1a."""
    results = read_results(config.out)
    if not results:
        raise UserError(f"{config.out}: no run yet; make one with `python train_cls.py`")
    bars, names = measured(results)
    figure, [axes] = new_figure(5)
    looks = {name: (colour, "") for name, colour in COLOURS.items()}
    for number, name in enumerate(name for name in names if name not in looks):
        again, which = divmod(number, len(MORE_COLOURS))
        looks[name] = MORE_COLOURS[which], again * "//"
    width, handles = 0.84 / len(names), []
    offsets = (np.arange(len(names)) - (len(names) - 1) / 2) * width
    for name, offset in zip(names, offsets):
        at = np.array([group for group, scores in enumerate(bars.values()) if name in scores])
        heights, deviations = zip(*(scores[name] for scores in bars.values() if name in scores))
        colour, hatch = looks[name]
        handles.append(axes.bar(
            at + offset, heights, 0.9 * width, label=name, color=colour, hatch=hatch, edgecolor="white",
            linewidth=0, yerr=deviations, capsize=2.5, ecolor="#333333", error_kw={"elinewidth": 1.2}))
    lowest = min(height for scores in bars.values() for height, _ in scores.values())
    paper = [PAPER[name] for name in names if name in PAPER]
    if MEAN in bars:
        axes.axvline(len(bars) - 1.5, color="#bbbbbb", linewidth=1)
    if MEAN in bars and paper:
        at = len(bars) - 1 + offsets[[name in PAPER for name in names]]
        handles.append(axes.hlines(paper, at - width / 2, at + width / 2, color="black", linewidth=2,
                                   zorder=3, label="the paper's mean"))
        lowest = min([lowest, *paper])
    start = max(0, min(config.start, math.floor(10 * lowest - 0.5) / 10))
    axes.set_ylim(start, 1)
    span, middle = max(len(bars), 9 / len(names)), (len(bars) - 1) / 2  # no bar as wide as a door
    axes.set_xlim(middle - span / 2, middle + span / 2)
    axes.set_xticks(range(len(bars)), [wrap(group, max(6, int(100 / span))) for group in bars])
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color="#dddddd")
    axes.set_axisbelow(True)
    axes.set_ylabel(f"macro-F1 (axis starts at {start:g})", fontsize=FONT)
    counts = defaultdict(int)
    for dataset, name, _ in results:
        counts[dataset, name] += 1
    few, many = min(counts.values()), max(counts.values())
    seeds = f"{few} to {many} seeds" if few < many else f"{many} seed" + "s" * (many > 1)
    axes.set_title(f"Macro-F1 on the test images, {seeds}" + (
        ": mean and standard deviation" if many > 1 else ""), fontsize=14)
    add_legend(figure, handles)
    return figure


# ----------------------------------------------------------------------------- training

def read_entry(line):
    """
    The entry in a line of a log, a dict, its held-out scores as "held_out <dataset>" each; None where it is not one
    that train_vlm.py or train_grpo.py writes.
    """
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or type(entry.get("step")) is not int or not 0 <= entry["step"] < 1 << 53:
        return None
    scores = entry.pop("held_out", {})
    if not isinstance(scores, dict):
        return None
    entry |= {f"held_out {dataset}": score for dataset, score in scores.items()}
    numbers = [entry[name] for name in entry if name in LOGGED[:-1] + REWARDED or name.startswith("held_out ")]
    finite = all(type(number) in (int, float) and abs(number) < 1e300 for number in numbers)  # NaN is not
    return entry if finite else None


def read_log(folder):
    """
    {name: (steps, values)} for each name of LOGGED and REWARDED and each "held_out <dataset>", from a run's log.jsonl.

    Where the log goes back, as a run does that goes on from a checkpoint, what it had said of later steps
    no longer counts. Lines that are torn, or have a value that is no finite number, are left out, and
    counted on stderr. Raises UserError where there is no log.
    """
    path = Path(folder) / "log.jsonl"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        raise UserError(f"{path}: no log here; --runs takes folders that train_vlm.py or train_grpo.py wrote") from None
    series, last, left_out = {name: {} for name in LOGGED + REWARDED}, 0, 0
    for line in lines:
        entry = read_entry(line)
        if entry is None:
            left_out += 1
            continue
        if entry["step"] < last:
            series = {name: {step: value for step, value in values.items() if step < entry["step"]}
                      for name, values in series.items()}
        last = entry["step"]
        for name in entry:
            if name in series or name.startswith("held_out "):
                series.setdefault(name, {})[last] = entry[name]
    if left_out:
        print(f"{path}: {left_out:,} of {len(lines):,} lines left out: torn, altered or without finite numbers",
              file=sys.stderr)
    return {name: (list(values), list(values.values())) for name, values in series.items()}


def smooth(values):
    """
    The running mean of a list over a twentieth of it: as far ahead as back, so that it does not lag
    where the loss falls; over fewer towards the start, and over those that there are at the end.
    """
    number = np.arange(len(values))
    reach = np.minimum(len(values) // 40, number)
    begin, end = number - reach, np.minimum(number + reach + 1, len(values))
    sums = np.cumsum([0, *values])
    return (sums[end] - sums[begin]) / (end - begin)


def read_logs(config):
    """{folder: what read_log gives} of the runs to draw. Raises UserError where nothing can be drawn."""
    folders = list(dict.fromkeys(filter(None, map(str.strip, config.runs.split(",")))))
    if not folders:
        logs = sorted(Path("out").glob("*/log.jsonl"), key=lambda path: path.stat().st_mtime)
        if not logs:
            raise UserError("no run in out/; make one with `python train_vlm.py` or name it in --runs")
        folders = [str(logs[-1].parent)]
    if len(folders) > len(RUN_COLOURS):
        raise UserError(f"--runs: {len(folders)} runs; only {len(RUN_COLOURS)} can be told apart")
    logs = {folder: read_log(folder) for folder in folders}
    if not any(steps for log in logs.values() for steps, _ in log.values()):
        raise UserError(f"{', '.join(folders)}: nothing logged yet; train_vlm.py logs every "
                        "--log_every steps")
    return logs


def label_runs(logs):
    """{folder: name of its run in the legend}"""
    names = [Path(folder).resolve().name for folder in logs]
    return {folder: (folder if names.count(name) > 1 else name)
            + " (nothing logged yet)" * (not any(steps for steps, _ in log.values()))
            for (folder, log), name in zip(logs.items(), names)}


def draw_training(config):
    """The curves of one or several runs against their steps."""
    logs = read_logs(config)
    rewarded = {folder: any(steps and name not in LOGGED for name, (steps, _) in log.items())
                for folder, log in logs.items() if any(steps for steps, _ in log.values())}
    if len(set(rewarded.values())) > 1:
        raise UserError(f"--runs: {', '.join(folder for folder, yes in rewarded.items() if yes)} by train_grpo.py, the "
                        "others by train_vlm.py, which have no axes in common; draw them apart")
    return draw_rewards(logs) if any(rewarded.values()) else draw_losses(logs)


def draw_losses(logs):
    """Loss, learning rate and speed of train_vlm.py's runs, {folder: what read_log gives}."""
    figure, (loss, rate, speed) = new_figure(8, (2, 1, 1))
    handles = []
    for log, label, colour in zip(logs.values(), label_runs(logs).values(), RUN_COLOURS):
        look = {"color": colour, "linewidth": 2}
        if len(log["loss"][0]) == 1:
            look["marker"] = "o"  # a line of one point would not be seen
        for axes, key in ((loss, "loss"), (speed, "samples_per_second")):
            steps, values = log[key]
            axes.plot(steps, values, color=colour, linewidth=1, alpha=PALE)
            handles += axes.plot(steps, smooth(values), label=label, **look)
        handles.pop()  # the speed's: a run's loss stands for it
        rate.plot(*log["learning_rate"], **look)
        loss.plot(*log["held_out_loss"], **HELD_OUT, color=colour)
        for step in log["error"][0]:
            loss.axvline(step, **ERROR, color=colour)
    for name, look in (("held_out_loss", HELD_OUT), ("error", ERROR)):
        if any(log[name][0] for log in logs.values()):
            handles += loss.plot([], [], **look, color=GREY)
    losses = [value for log in logs.values() for name in ("loss", "held_out_loss")
              for value in log[name][1] if 0 < value < math.inf]
    if losses and max(losses) > 10 * min(losses):  # on a linear axis most of the run would look flat
        loss.set_yscale("log", subs=(2, 5))
        loss.yaxis.set_major_formatter("{x:g}")
        loss.yaxis.set_minor_formatter("{x:g}")
        loss.tick_params(which="minor", labelsize=FONT)
    for axes, key in ((rate, "learning_rate"), (speed, "samples_per_second")):
        highest = max((value for log in logs.values() for value in log[key][1]), default=0)
        axes.set_ylim(0, 1.08 * highest or 1)
    for axes, label in ((loss, "loss, nats a token"), (rate, "learning rate"), (speed, "samples/s")):
        axes.set_ylabel(label, fontsize=FONT)
        axes.grid(color="#dddddd")
    loss.set_title("Training: running mean, with what was logged faint behind it", fontsize=14)
    rate.yaxis.set_major_formatter("{x:g}")
    speed.xaxis.set_major_formatter("{x:,.0f}")
    speed.xaxis.get_major_locator().set_params(integer=True)
    speed.set_xlabel("step", fontsize=FONT)
    figure.align_ylabels()
    add_legend(figure, handles)
    return figure


def draw_rewards(logs):
    """
    What train_grpo.py logged of its runs, {folder: what read_log gives}: the reward, with the mean spread within a
    group above and below it; held-out scores of each dataset; shares; lengths; entropy; and KL where it was computed.
    """
    datasets = list(dict.fromkeys(name for log in logs.values() for name in log if name.startswith("held_out ")))
    shares = ("dead_groups", "truncated", "clipped")
    panels = {"reward": ("reward",), "held out, %": datasets, "share": shares, "length, tokens": ("length",),
              "entropy, nats": ("entropy",), "KL, nats": ("kl",)}
    panels = {label: names for label, names in panels.items() if any(
        log[name][0] for log in logs.values() for name in names if name in log)}
    figure, rows = new_figure(1 + 1.8 * len(panels), [1.6 if number < 2 else 1 for number in range(len(panels))])
    handles = []
    for log, run_label, colour in zip(logs.values(), label_runs(logs).values(), RUN_COLOURS):
        for axes, (label, names) in zip(rows, panels.items()):
            for number, name in enumerate(names):
                steps, values = log.get(name, ([], []))
                look = {"color": colour, "linewidth": 2, "linestyle": STYLES[number % len(STYLES)]}
                if name in datasets:  # few, each the mean of all held-out samples
                    axes.plot(steps, values, marker="o", markersize=4, **look)
                    continue
                axes.plot(steps, values, color=colour, linewidth=1, alpha=PALE, linestyle=look["linestyle"])
                axes.plot(steps, smooth(values), **look, marker="o" if len(steps) == 1 else "")
        steps, spread = log["reward_spread"]
        if steps == log["reward"][0]:
            middle, spread = smooth(log["reward"][1]), smooth(spread)
            rows[0].fill_between(steps, middle - spread, middle + spread, color=colour, alpha=0.15, linewidth=0)
        handles += rows[0].plot([], [], color=colour, linewidth=2, label=run_label)
    for axes, (label, names) in zip(rows, panels.items()):
        axes.set_ylabel(label, fontsize=FONT)
        axes.grid(color="#dddddd")
        if label == "share":
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter("{x:.0%}")
        if len(names) > 1 or names == datasets:
            keys = [axes.plot([], [], color=GREY, linestyle=STYLES[number % len(STYLES)],
                              label=name.removeprefix("held_out ").replace("_", " " if name in shares else "_"))[0]
                    for number, name in enumerate(names)]
            axes.legend(handles=keys, fontsize=FONT - 2, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    rows[0].set_title("Reinforcement: running mean, what was logged faint behind it, mean spread of a group around it",
                      fontsize=14)
    rows[-1].xaxis.set_major_formatter("{x:,.0f}")
    rows[-1].xaxis.get_major_locator().set_params(integer=True)
    rows[-1].set_xlabel("step", fontsize=FONT)
    figure.align_ylabels()
    add_legend(figure, handles)
    return figure


# ----------------------------------------------------------------------------- mix

def draw_mix(config):
    """Samples of each pretraining dataset, published and prepared, and their sums beside the paper's."""
    datasets = sorted((row[:4] for row in mix.read_mix(config.shards_dir)), key=lambda row: row[2] or 0)
    sums = [(kind, f"sum of {kind}", *(sum(row[column] or 0 for row in datasets if row[0] == kind)
                                       for column in (2, 3))) for kind in mix.PAPER]
    rows = [*sums[::-1], *datasets]
    figure, [axes] = new_figure(7.5)
    from matplotlib.patches import Patch  # not before new_figure has found matplotlib
    at = np.arange(len(rows)) - 0.6 * (np.arange(len(rows)) < len(sums))  # the sums stand apart
    colours = [MIX_COLOURS[kind] for kind, *_ in rows]
    for column, height, alpha in ((2, 0.76, PALE), (3, 0.38, 1)):
        axes.barh(at, [row[column] or 0 for row in rows], height, alpha=alpha, color=colours)
    paper = axes.vlines(list(mix.PAPER.values())[::-1], at[:len(sums)] - 0.5, at[:len(sums)] + 0.5,
                        color="black", linewidth=2, label="the paper's sum")
    cells = [("published", "prepared\nhere", "the\npaper's")]
    cells += [("unknown" if published is None else f"{published:,}", f"{prepared:,}" if prepared else "",
               f"{mix.PAPER[kind]:,}" if name.startswith("sum of ") else "")
              for kind, name, published, prepared in rows]
    for words, place in zip(cells, [at[-1] + 1, *at]):
        for word, right in zip(words, (85, 155, 230)):  # points right of the axes
            axes.annotate(word, (1, place), (right, 0), axes.get_yaxis_transform(), "offset points",
                          ha="right", va="center", fontsize=FONT)
    smallest = min(count for row in rows for count in row[2:] if count)
    axes.set_xscale("log")
    axes.set_xlim(10 ** math.floor(math.log10(smallest) - 0.2), 1.15 * max(mix.PAPER.values()))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("training samples (log axis)", fontsize=FONT)
    axes.set_yticks(at, [wrap(name, 28) for _, name, *_ in rows])
    axes.set_ylim(at[0] - 0.7, at[-1] + 0.7)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#dddddd")
    add_legend(figure, [*(Patch(color=colour, label=kind) for kind, colour in MIX_COLOURS.items()),
                        Patch(color=GREY, alpha=PALE, label="published"),
                        Patch(color=GREY, label="prepared here"), paper])
    return figure


def main(config):
    draw = {"classification": draw_classification, "training": draw_training, "mix": draw_mix}
    figure, path = draw[config.what](config), Path(config.path or f"out/{config.what}.png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except (OSError, ValueError) as error:  # the latter at a suffix that matplotlib does not know
        raise UserError(f"--path={path}: {error}") from None
    print(f"{path} drawn")


if __name__ == "__main__":
    run(main, parse_command_line(Config))
