"""
One table of all evaluations of a checkpoint: scores, what blind answers get, what the image adds, what had leaked.

    table.txt    as it is printed, but without the seconds: the same answers give the same bytes
    table.csv    a row a dataset and metric, numbers in columns of their own, empty where there is none
    table.tex    a tabular; needs \\usepackage{booktabs}
    seconds.csv, published.csv    what the answers took, and others' published scores of these datasets

Each evaluation is (its folder, the dict of its results.json); what its task says for this table is in
tables["summary"]. Published scores are of other prompts, parsers and splits, so they stand in a block of their own.
"""

import csv
import io
from collections import defaultdict
from pathlib import Path

from plumbing.files import lock, write_whole
from tasks.published import TITLE, Figure, describe, published_for
from tasks.vqa import cell_text

FAULTS = ("cut", "empty", "repeating")  # of the model's answers, as tasks.vqa.report_faults counts them
HEADS = ("dataset", "questions", "metric", "score", "blind answers", "image adds", "unreadable", *FAULTS, "leaks")
LEFT = {"dataset", "run", "run A", "run B", "metric", "blind answers", "published"}  # words; others end right
BOUNDS = ("", " low", " high")  # of a cell's three columns in table.csv
SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
           "<": r"\textless{}", ">": r"\textgreater{}", **{sign: f"\\{sign}" for sign in "_%&#${}"}}


# ----------------------------------------------------------------------------- rows

def name_of(results):
    """The "dataset/split" of an evaluation."""
    (name,) = results["results"]
    return name


def summary_of(results):
    """What an evaluation's task says for the one table, a dict; None of one made before there was any."""
    return results["results"][name_of(results)].get("summary")


def faults_of(results):
    """How many of the model's answers have each of FAULTS, a list; None where that is not known."""
    counts = results["results"][name_of(results)].get("answers", {}).get("model", {})
    return [counts.get(fault) for fault in FAULTS]


def label_of(results):
    """An evaluation's name in the table: "dataset/split", and the flags that are not as usual."""
    return " ".join([name_of(results), *(f"--{flag}={value}" for flag, value in
                                         results.get("unusual_flags", {}).items())])


def sort_evaluations(evaluations):
    """Those that have a summary, by their task's main metric, then by name; of one name by folder."""
    some = [(folder, results) for folder, results in evaluations if summary_of(results)]
    return sorted(some, key=lambda one: (summary_of(one[1])["lines"][0]["metric"], label_of(one[1]), str(one[0])))


def list_rows(evaluations):
    """The table's rows, a dict each, of sorted evaluations: a task's "lines" with what all of them have in common."""
    return [{**line, "first": number == 0, "dataset": label_of(results), "questions": summary_of(results)["n"],
             "faults": faults_of(results), "leaks": summary_of(results)["leaks"]}
            for _, results in evaluations for number, line in enumerate(summary_of(results)["lines"])]


def text_cells(row):
    """A row's texts in the order of HEADS; what all of a dataset's rows share stands in the first alone."""
    blind, percent, leaks = row["blind"], row["unreadable"], row["leaks"]
    own = [row["metric"], cell_text(row["score"]), f"{blind[0]} {cell_text(blind[1])}" if blind else "-",
           cell_text(row["adds"]) if row["adds"] else "-", "-" if percent is None else f"{percent:.1f}%"]
    if not row["first"]:
        return ["", "", *own, *[""] * len(FAULTS), ""]
    faults = ["-" if count is None else f"{count:,}" for count in row["faults"]]
    return [row["dataset"], f"{row['questions']:,}", *own, *faults, "?" if leaks is None else f"{leaks:,}"]


def seconds_of(results, form):
    """How long the answers took, as text; "-" of those that were given elsewhere."""
    return "-" if results["seconds"] is None else form.format(results["seconds"])


def more_cells(evaluations, column):
    """One more column: column(results) of each evaluation in its first row, "" in the others."""
    return [column(results) if number == 0 else "" for _, results in evaluations
            for number, _ in enumerate(summary_of(results)["lines"])]


# ----------------------------------------------------------------------------- what is said below

def facts_of(results):
    """What evaluations of one table should have in common, {what: value}."""
    stands_on, machine = results["stands_on"], results.get("machine", {})
    flags = {name: value for name, value in stands_on.get("flags", {}).items() if name != "max_new_tokens"}
    return {"checkpoint": results.get("checkpoint", ""), "commit": machine.get("commit") or "unknown",
            "device": machine.get("device", "unknown"), "dtype": stands_on.get("dtype", "unknown"),
            "base_bits": stands_on.get("base_bits"), **flags}


def list_differences(evaluations):
    """A line for each fact in which the evaluations of a table differ: which value is whose."""
    facts = [(name_of(results), facts_of(results)) for _, results in evaluations]
    lines = []
    for what in dict.fromkeys(what for _, some in facts for what in some):
        whose = defaultdict(list)
        for name, some in facts:
            whose[str(some.get(what, "not there"))].append(name)
        if len(whose) > 1:
            values = "; ".join(f"{value} ({', '.join(names)})" for value, names in whose.items())
            lines.append(f"not of one {what}: {values}")
    return lines


def list_notes(evaluations):
    """The lines below the table: what its columns are, in what its evaluations differ."""
    drawn = defaultdict(list)
    for _, results in evaluations:
        drawn[summary_of(results)["unit"]].append(name_of(results))
    units = "; ".join(f"{unit} ({', '.join(names)})" if len(drawn) > 1 else unit for unit, names in drawn.items())
    return [f"[low high]: 95% intervals by resampling {units}",
            "blind answers see no image; image adds: the score above that with other images, with --blind=none that of "
            "studies above that without the earlier one",
            "cut, empty, repeating: answers that end at --max_new_tokens, say nothing, or go round in a loop",
            "leaks: questions that are not new to the run, whose words or image it was trained on; ?: not known",
            *list_differences(evaluations)]


def list_published(evaluations):
    """The Figures of a table's datasets, in its order; those of a dataset with several evaluations once."""
    return [figure for name in dict.fromkeys(name_of(results) for _, results in evaluations)
            for figure in published_for(name)]


def published_lines(figures):
    """The block of published scores, a dataset at a time, as lines; none where there are none."""
    if not figures:
        return []
    return ["", f"{TITLE}: no comparison, for their prompts, parsers, judges and splits are others", *describe(figures)]


# ----------------------------------------------------------------------------- texts

def line_up(heads, rows):
    """A table of texts as lines, each column as wide as its widest text."""
    widths = [max(map(len, column)) for column in zip(heads, *rows)]
    return ["  ".join(f"{text:<{width}}" if head in LEFT else f"{text:>{width}}"
                      for head, text, width in zip(heads, cells, widths)).rstrip() for cells in [heads, *rows]]


def write_text(evaluations, again, with_seconds=False):
    """The table, its notes and the published scores as text. again: names of evaluations without a summary."""
    lines = [f"without what this table needs, so evaluate again: {', '.join(again)}"] if again else []
    if not evaluations:
        return "\n".join([*lines, ""])
    heads, rows = [*HEADS, "published"], [text_cells(row) for row in list_rows(evaluations)]
    columns = [more_cells(evaluations, lambda results: "below" if published_for(name_of(results)) else "-")]
    if with_seconds:
        heads.append("seconds")
        columns.append(more_cells(evaluations, lambda results: seconds_of(results, "{:,.1f}")))
    rows = [[*cells, *more] for cells, more in zip(rows, zip(*columns))]
    return "\n".join([*line_up(heads, rows), *list_notes(evaluations), *lines,
                      *published_lines(list_published(evaluations)), ""])


def write_csv(heads, rows):
    """Rows as bytes of a csv; None is an empty field."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([heads, *rows])
    return text.getvalue().encode()


def write_numbers(evaluations):
    """table.csv: every row with its dataset, numbers unrounded, each bound in a column of its own."""
    def row_of(row):
        blind, cells = row["blind"] or (None, None), [None] * 3
        return [row["dataset"], row["questions"], row["metric"], *row["score"], blind[0], *(blind[1] or cells),
                *(row["adds"] or cells), row["unreadable"], *row["faults"], row["leaks"]]

    heads = ["dataset", "questions", "metric", *(f"score{bound}" for bound in BOUNDS), "blind row",
             *(f"blind{bound}" for bound in BOUNDS), *(f"adds{bound}" for bound in BOUNDS), "unreadable percent",
             *FAULTS, "leaks"]
    return write_csv(heads, map(row_of, list_rows(evaluations)))


def escape(text):
    """Text as LaTeX prints it."""
    return "".join(SPECIAL.get(sign, sign) for sign in text)


def tabular(heads, rows, notes):
    """A table of texts as LaTeX's tabular, its notes as comments before it."""
    columns = "".join("l" if head in LEFT else "r" for head in heads)
    lines = [" & ".join(map(escape, cells)) + r" \\" for cells in [heads, *rows]]
    return "\n".join([*(f"% {note}" for note in notes), rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0],
                      r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}", ""])


def markdown(heads, rows):
    """A table of texts as Markdown's lines."""
    lines = [heads, ["---" if head in LEFT else "--:" for head in heads], *rows]
    return ["| " + " | ".join(text.replace("|", r"\|") for text in cells) + " |" for cells in lines]


def write_summary(out, evaluations):
    """
    Print the one table of (folder, dict of results.json) of evaluations of one checkpoint, with the seconds that
    each took, and write its files into the folder `out`, each whole or not at all.
    """
    again = [label_of(results) for _, results in evaluations if not summary_of(results)]
    evaluations, out = sort_evaluations(evaluations), Path(out)
    print("\n" + write_text(evaluations, again, with_seconds=True), end="")
    out.mkdir(parents=True, exist_ok=True)
    seconds = [(label_of(results), seconds_of(results, "{:.1f}")) for _, results in evaluations]
    rows = list(map(text_cells, list_rows(evaluations)))
    files = {"table.txt": write_text(evaluations, again).encode(), "table.csv": write_numbers(evaluations),
             "table.tex": tabular(HEADS, rows, list_notes(evaluations)).encode(),
             "seconds.csv": write_csv(["dataset", "seconds"], seconds),
             "published.csv": write_csv(Figure._fields, list_published(evaluations))}
    with lock(out / ".lock", "writing an evaluation", wait=True):
        for name, content in files.items():
            write_whole(out / name, content)
    print(f"the table is in {out}/table.txt, .csv and .tex")
