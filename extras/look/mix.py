"""
The pretraining mix as a Markdown table: what was published, what is prepared, and the paper's sum.

    python extras/look/mix.py

A published count is that of the training split of the version that a plain `python prepare/all.py`
prepares; what is not prepared here stays blank.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

from dataclasses import dataclass

from plumbing.files import read_manifest
from plumbing.flags import UserError, parse_command_line, run
from plumbing.leaks import read_leaks
from plumbing.shards import Shard
from prepare.datasets import DATASETS

PAPER = {"image and text": 2_940_000, "text alone": 410_000}  # arXiv 2606.12953, as it rounds them


@dataclass(frozen=True)
class Config:
    shards_dir: str = "shards"  # where prepare/all.py put them


def prepared_counts(folder):
    """Samples, skipped ones and those that the leak guard found in a training split; or None."""
    manifest = read_manifest(folder)
    if manifest is None or manifest["limit"]:
        return None
    try:
        return manifest["samples"], sum(manifest["skipped"].values()), len(read_leaks(Shard(folder))[1])
    except UserError:  # of another version, or not compared yet
        return None


def read_mix(shards_dir):
    """(kind, dataset, published, prepared, skipped, leaked) of each pretraining dataset; None: not known."""
    return [(title, dataset.name, dataset.counts.get("train"),
             *(prepared_counts(Path(shards_dir) / dataset.name / "train") or (None,) * 3))
            for title in PAPER for dataset in DATASETS.values()
            if dataset.kind != "classification" and not dataset.only_by_name and not dataset.drawn
            and (dataset.kind == "text questions") == (title == "text alone")]


def table(shards_dir):
    """The table's lines."""
    lines = ["| dataset | published, train | prepared | skipped | images also in a test |",
             "|---|--:|--:|--:|--:|"]
    rows = read_mix(shards_dir)
    for title, paper in PAPER.items():
        total = 0
        for kind, name, published, *counts in rows:
            if kind == title:
                total += published or 0
                cells = ("" if count is None else f"{count:,}" for count in counts)
                lines.append(f"| {name} | {f'{published:,}' if published else 'unknown'} | {' | '.join(cells)} |")
        lines.append(f"| **{title}**: sum | {total:,} | | | |")
        lines.append(f"| the paper's | {paper:,} | | | |")
        lines.append(f"| gap | {paper - total:,} | | | |")
    return lines


def main(config):
    print("\n".join(table(config.shards_dir)))


if __name__ == "__main__":
    run(main, parse_command_line(Config))
