"""
Draw the runs of train_cls.py as bars, a group a dataset and a bar an encoder, beside the paper's means.

    python extras/plot.py

What was not run is left blank. Needs `pip install -r extras/requirements.txt`.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, not extras/

import math
import re
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from data import UserError, run
from train_cls import MEAN, PAPER, measured, read_results

SIZE = (12, 5)  # inches, of 100 pixels
# Okabe and Ito's colours, which those who are colour-blind can tell apart; the encoders keep theirs
# whichever others are drawn beside them.
COLOURS = {"openmedq": "#D55E00", "biomedclip": "#0072B2", "pubmedclip": "#56B4E9",
           "pmc_clip": "#009E73", "scratch": "#999999"}
MORE_COLOURS = ("#E69F00", "#CC79A7", "#F0E442", "#000000")


@dataclass(frozen=True)
class Config:
    out: str = "out/cls"  # where train_cls.py put its runs
    path: str = "out/classification.png"  # of the picture
    start: float = 0.4  # of the y axis, which the picture states; lower where a bar would not be seen


def new_figure():
    """A figure and its axes."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("no matplotlib here; run `pip install -r extras/requirements.txt`") from None
    figure = Figure(SIZE, dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=12)
    return figure, axes


def wrap(name, width):
    """A name in lines of at most so many characters, which end in an underscore where they can."""
    return "\n".join(re.findall(rf".{{1,{width}}}$|.{{1,{width - 1}}}[_ -]|.{{{width}}}", name))


# ----------------------------------------------------------------------------- classification

def draw_classification(config):
    """Macro-F1 of every dataset and encoder, like the paper's figure 1a."""
    results = read_results(config)
    if not results:
        raise UserError(f"{config.out}/results.jsonl: no run yet; make one with `python train_cls.py`")
    bars, names = measured(results)
    figure, axes = new_figure()
    looks = {name: (colour, "") for name, colour in COLOURS.items()}
    for number, name in enumerate(name for name in names if name not in looks):
        again, which = divmod(number, len(MORE_COLOURS))
        looks[name] = MORE_COLOURS[which], again * "//"
    width, handles = 0.84 / len(names), []
    offsets = (np.arange(len(names)) - (len(names) - 1) / 2) * width
    for name, offset in zip(names, offsets):
        at = np.array([group for group, found in enumerate(bars.values()) if name in found])
        heights, deviations = zip(*(found[name] for found in bars.values() if name in found))
        colour, hatch = looks[name]
        handles.append(axes.bar(
            at + offset, heights, 0.9 * width, label=name, color=colour, hatch=hatch, edgecolor="white",
            linewidth=0, yerr=deviations, capsize=2.5, ecolor="#333333", error_kw={"elinewidth": 1.2}))
    lowest = min(height for found in bars.values() for height, _ in found.values())
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
    axes.set_ylabel(f"macro-F1 (axis starts at {start:g})", fontsize=12)
    counts = defaultdict(int)
    for dataset, name, _ in results:
        counts[dataset, name] += 1
    few, many = min(counts.values()), max(counts.values())
    seeds = f"{few} to {many} seeds" if few < many else f"{many} seed" + "s" * (many > 1)
    axes.set_title(f"Macro-F1 on the test images, {seeds}" + (
        ": mean and standard deviation" if many > 1 else ""), fontsize=14)
    columns = max(1, min(6, 110 // (6 + max(map(len, names)))))  # about 110 characters fit in a line
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=12, frameon=False)
    return figure


def main(config):
    figure, path = draw_classification(config), Path(config.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"{path} drawn")


if __name__ == "__main__":
    run(main, Config)
