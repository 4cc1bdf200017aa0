"""
The table and the picture of extras/look/ablate.py: scores of encoders with intervals, and what differs beyond them.

All intervals of a table come from the same resamples of its test split: that of a difference is the middle 95% of the
differences, resample by resample (extras/look/ablation_scores.py).
"""

import itertools
from typing import NamedTuple

import numpy as np

from extras.look.plot import FONT, GREY, RUN_COLOURS, add_legend, new_figure
from plumbing.files import write_whole
from tasks.across import number_text
from tasks.encoders import deviation, write_csv
from tasks.summary import BOUNDS, line_up
from tasks.vqa import cell_text

LABEL = "Random stand-ins: small encoders of these layouts with random weights. They say nothing about the real ones."
LOOKS = ({"fmt": "o", "markersize": 9, "linewidth": 2, "color": RUN_COLOURS[0]},  # the model's, and what sees no image
         {"fmt": "D", "color": GREY, "markerfacecolor": "white"}, {"fmt": "D", "color": GREY})


class Row(NamedTuple):
    """What one encoder is, and has reached on one dataset."""
    encoder: str
    image_size: int
    parameters: int
    tokens: int  # of an image
    draws: dict  # {"model" and rows without the image: draws of the main score}
    seeds: list  # the main score of each
    minutes: float  # that a seed took to train and to answer, the mean


class Table(NamedTuple):
    """What all encoders have reached on one dataset."""
    metric: str
    unit: str  # what the intervals draw
    order: list  # of what was tested: lines of answers, or names of images
    machine: dict  # of the first run
    rows: list


def cell_of(draws):
    """[mean, low, high] of (1 + resamples,), the first as measured: the middle 95% of the others."""
    bounds = np.percentile(draws[1:], (2.5, 97.5)).tolist() if len(draws) > 1 else [None, None]
    return [float(draws[0]), *bounds]


def cells(table):
    """(heads, [values of a Row: texts, numbers and [mean, low, high]]) of a Table."""
    blind = list(table.rows[0].draws)[1:]
    heads = ["encoder", "pixels", "parameters", "tokens", table.metric, "± seeds", *blind, "image adds", "minutes"]
    return heads, [[row.encoder, row.image_size, row.parameters, row.tokens, cell_of(row.draws["model"]),
                    deviation(row.seeds), *(cell_of(row.draws[name]) for name in blind),
                    cell_of(row.draws["model"] - row.draws[blind[0]]), row.minutes] for row in table.rows]


def compare_encoders(table):
    """[(encoder, another, [mean, low, high] of the difference)] of each two, on the same resamples."""
    return [(a.encoder, b.encoder, cell_of(a.draws["model"] - b.draws["model"]))
            for a, b in itertools.combinations(table.rows, 2)]


def verdict(pairs):
    """One line: whether a difference between encoders is beyond its interval."""
    if not pairs or pairs[0][2][1] is None:
        return "Nothing is compared: " + ("one encoder." if not pairs else "all of the test is about one image.")
    beyond = [f"{a} - {b} {cell_text(cell)}" for a, b, cell in pairs if not cell[1] <= 0 <= cell[2]]
    if not beyond:
        return f"No two encoders differ beyond the intervals: 0 is within all {len(pairs)} differences."
    return (f"Beyond the intervals are {len(beyond)} of {len(pairs)} differences: {'; '.join(beyond)}. By chance one "
            "in twenty would be.")


def notes_of(table, pairs, config):
    """The lines below a table."""
    blind, machine = list(table.rows[0].draws)[1], table.machine
    budget, flags = ((f"{config.epochs} epochs", config.cls_flags) if table.metric == "macro-F1" else
                     (f"{config.steps} steps, --model={config.model}", config.vlm_flags))
    return [*[LABEL] * config.stand_ins, verdict(pairs),
            f"percent; [low high]: 95% intervals over the test's {table.unit}, not over seeds; ± seeds: deviation",
            f"image adds: above {blind}, paired; parameters: of the encoder; tokens: of an image",
            f"{' '.join([budget, flags])}; {config.seeds} seed{'s' * (config.seeds > 1)} from 0; commit "
            f"{machine['commit'] or 'unknown'}, {machine['device'].strip()}, {machine['threads']} threads, torch "
            f"{machine['torch']}"]


def write_table(name, table, path, config):
    """Print a dataset's Table; write it as path.txt, path.csv and path.png."""
    def text(value):
        return (value if isinstance(value, str) else cell_text(value) if isinstance(value, list) else
                f"{value:,}" if isinstance(value, int) else number_text(value))

    (heads, rows), pairs = cells(table), compare_encoders(table)
    lines = [*line_up(heads, [list(map(text, row)) for row in rows]), "", *notes_of(table, pairs, config), "",
             *(f"{a} - {b}: {cell_text(cell)}" for a, b, cell in pairs)]
    print("\n".join(["", f"{name}, test:", *lines]))
    write_whole(path.with_name(f"{path.name}.txt"), "\n".join([*lines, ""]).encode())
    columns = [[f"{head}{bound}" for bound in BOUNDS] if isinstance(value, list) else [head]
               for head, value in zip(heads, rows[0])]
    write_csv(path.with_name(f"{path.name}.csv"), ["stand-in", *itertools.chain(*columns)], [
        ["random" * config.stand_ins, *itertools.chain(*(value if isinstance(value, list) else [value]
                                                         for value in row))] for row in rows])
    draw(name, table, config).savefig(path.with_name(f"{path.name}.png"))
    print(f"the table is in {path}.txt and .csv, the picture in {path}.png")


def draw(name, table, config):
    """The figure of a Table: a line an encoder, its score with its interval, and what sees no image."""
    figure, [axes] = new_figure(2.4 + 0.8 * len(table.rows))
    places, handles = np.arange(len(table.rows))[::-1], []
    for number, row in enumerate(table.rows[0].draws):
        points = np.array([cell_of(one.draws[row]) for one in table.rows], float)
        look = LOOKS[number] | {"label": "the encoder's model" if row == "model" else row}
        handles.append(axes.errorbar(points[:, 0], places + 0.16 * (1 - number), capsize=3, **look,
                                     xerr=np.abs(points[:, 1:] - points[:, :1]).T))
    axes.set_yticks(places, [f"{row.encoder}{', random' * config.stand_ins}\n{row.image_size} px, {row.tokens:,} "
                             f"tokens, {row.parameters / 1e6:,.1f} M" for row in table.rows])
    axes.set_ylim(-0.6, len(table.rows) - 0.4)
    axes.set_xlabel(f"{table.metric} on {name}'s test, percent, with 95% intervals", fontsize=FONT)
    axes.grid(axis="x", color="#dddddd")
    axes.set_title("\n".join([f"Encoders at one budget, {config.seeds} seed{'s' * (config.seeds > 1)}",
                              *[LABEL] * config.stand_ins]), fontsize=FONT)
    add_legend(figure, handles)
    return figure
