"""
The model card of an export: what a run's own files say, without what concerns nobody else.

Private datasets and places on this machine have no names here; what the run did not record is not known.
"""

import json
from pathlib import Path

from model import CONFIGS
from plumbing.files import read_manifest
from plumbing.pixels import most_tiles
from prepare.datasets import DATASETS
from prepare.weights import WEIGHTS
from tasks.box_tables import SIZES
from tasks.evaluations import find_evaluations, read_evaluation
from tasks.summary import (HEADS, label_of, list_rows, markdown, name_of, sort_evaluations, summary_of,
                           text_cells)
from tasks.vqa import cell_text
from weights import load_vlm
from zoo.gpt_oss import GptOss
from zoo.gpt_oss_files import CONFIGS as GPT_OSSES
from zoo.projectors import kind_of
from zoo.qwen3_files import CONFIGS as QWENS
from zoo.qwen3_vl import Text

# ----------------------------------------------------------------------------- what may be told

def is_public(name):
    """Whether a dataset is one of those that anybody may know to be there."""
    known = DATASETS.get(name)
    return known is not None and known.licence != "private" and known.access not in ("ours", "yours")


def make_public(record):
    """
    What a checkpoint was sealed with, without what concerns nobody else: private datasets are called
    private_1, private_2, ..., those that it was only compared with are not named; of paths the last name
    is left, and the command is not there.
    """
    entries = [entry.strip().partition(":") for entry in record["flags"]["data"].split(",")]
    trained = [name.strip() for name, _, _ in entries]
    private = [name for name in dict.fromkeys(trained) if not is_public(name)]
    alias = {name: f"private_{number}" for number, name in enumerate(private, start=1)}

    def renamed(facts):
        return {alias.get(name, name): fact for name, fact in facts.items()}

    def compared(tests):
        """Test splits by their names; of private ones that did not take part, only that they were there."""
        names = {test: test.partition("/")[0] for test in tests}
        public = {alias.get(name, name) + test[len(name):]: tests[test] for test, name in names.items()
                  if name in trained or is_public(name)}
        more = len(tests) - len(public)
        return public | ({f"{more} private": ""} if more else {})

    flags = {name: Path(value).name if isinstance(value, str) and name not in ("data", "device") else value
             for name, value in record["flags"].items()}
    flags["data"] = ",".join(alias.get(name, name) + colon + weight
                             for name, (_, colon, weight) in zip(trained, entries))
    public = {name: record[name] for name in ("image", "system", "held_out_loss") if name in record}
    return public | {
        "flags": flags, "tests": {name: compared(tests) for name, tests in renamed(record["tests"]).items()},
        "machine": {name: fact for name, fact in record["machine"].items() if name != "command"},
        "inputs": record["inputs"] | {"data": renamed(record["inputs"]["data"])}}


# ----------------------------------------------------------------------------- the card

# Flags that change no number, or name places on a disk
HIDDEN = set("""
    run resume config shards_dir vision_weights language_weights workers recompute compile device log_every
    evaluate_every save_every save_minutes keep shard rank_timeout wandb micro_batch_tokens""".split())
METRICS_A_TABLE = 6
UNITS = {"count error": "count error, boxes", "sensitivity": "a box where there is one", "specificity":
         "none where there is none", **{size: f"IoU of {size} boxes" for size in SIZES}}  # whose names do not say it
LLAVA = """a ViT
of {vision:,} parameters ({per_image}), {projection}
of {projector:,}, a {family} of {language:,} with {pieces:,} pieces."""
PROJECTIONS = {"linear": "one linear projection", "mlp": "a projector of two layers",
               "mlp1": "a projector of a norm and two layers"}
QWEN = """a Qwen3-VL
whose vision tower has {vision:,} parameters ({per_image}), its
mergers {projector:,}, its decoder {language:,} with {pieces:,} pieces."""
CARD = """---
license: unknown
pipeline_tag: visual-question-answering
tags: [medical, nanomedq]
base_model: {bases}
datasets: {datasets}
---

# {name}

A vision-language model for questions about medical images, made by nanoMedQ at commit {commit}: {parts}

**Not for clinical use.** It is meant for research on visual question answering. It answers questions
about images, briefly and in the words of its training data. An answer may be wrong without looking so.
Answers were compared with the references of datasets, if at all, and with nothing else; other kinds of
images, questions and languages than those below are untested.

## Results

{results}

## Training data

| dataset (: weight) | licence | samples | images | samples whose image a test split has |
|---|---|--:|--:|--:|
{data}

Of these samples, about {held_out:,} were held out. Training images were compared with {tests}.
What is not known the run did not record.

## Recipe

{steps:,} steps of AdamW on {objective}. Machine: {device}, {threads} threads, torch {torch}, Python
{python}. The flags of {script} that decide its numbers:

    {flags}

## Licence

None was chosen for these weights. They were trained on the data above, each under its own licence.
{starts}
"""


def training_rows(public):
    """Of each training split a row of the card's table: what the run recorded of it, and nothing newer."""
    for entry in public["flags"]["data"].split(","):
        name = entry.partition(":")[0]
        known, facts = DATASETS.get(name), public["inputs"]["data"][name]
        counts = (str(facts[key]) for key in ("samples", "images", "leaked"))
        cells = entry, known.licence if known else "not known", *counts
        yield f"| {' | '.join(cells)}, {'left out' if facts['leaks'] == 'drop' else 'kept'} |"


def rename(results):
    """The dict of a results.json, in which a private dataset has no name."""
    ((name, tables),) = results["results"].items()
    return results | {"results": {name if is_public(name.partition("/")[0]) else "a private dataset": tables}}


def summary_lines(evaluations):
    """The one table of all evaluations as Markdown; no line where none of them has a row in it."""
    rows = list_rows(sort_evaluations(("", results) for results in evaluations))
    if not rows:
        return []
    return ["", *markdown(HEADS, map(text_cells, rows)), "",
            "*leaks*: questions that are not new to the model, whose words or image it was trained on; ?: not known."]


def table_lines(title, table, unit):
    """One table of an evaluation as Markdown, all of its metrics, so many beside one another."""
    metrics, lines = list(next(iter(table["rows"].values()))), []
    for begin in range(0, len(metrics), METRICS_A_TABLE):
        some = metrics[begin:begin + METRICS_A_TABLE]
        lines += ["", f"| {title}: {table['questions']:,}, over {unit} | "
                  f"{' | '.join(UNITS.get(metric, metric) for metric in some)} |", "|---|" + "--:|" * len(some)]
        for row, cells in table["rows"].items():
            lines.append(f"| {row} | {' | '.join(cell_text(cells[metric]) for metric in some)} |")
    return lines


def describe_results(run, checkpoint):
    """The tables of all evaluations of a run's checkpoint as Markdown, or why there are none."""
    manifest = read_manifest(checkpoint)
    evaluations = [rename(results) for results in map(read_evaluation, sorted(find_evaluations(run)))
                   if results["stands_on"]["checkpoint"] == manifest["checksum"]]
    if not evaluations:
        return f"Unknown: eval_vqa.py has not evaluated {checkpoint.name}."
    machine = evaluations[0]["machine"]
    lines = ["Percent, with 95% intervals by resampling, by eval_vqa.py at commit "
             f"{machine['commit'] or 'unknown'} on {machine['device'].strip()}.",
             "*image shuffled* is this model with the images exchanged among the questions,",
             "*question only* the most frequent training answer to the same words, of boxes the one that is most",
             "like the others; *commonest option*, *longest option* and *constant report* see no question, either.",
             "None of them sees the right image: a score is worth what it has above them.",
             *summary_lines(evaluations)]
    for results in evaluations:
        name, tables = label_of(results), results["results"][name_of(results)]
        for title, table in (("all questions", tables["all"]), ("those new to the run", tables["new"])):
            if isinstance(table, str):  # the reason names places and data
                none = (summary_of(results) or {}).get("leaks") == tables["all"]["questions"]
                lines += ["", f"{name}, {title}: {'none' if none else 'not known'}"]
            else:
                lines += table_lines(f"{name}, {title}", table, tables["drawn"])
    return "\n".join(lines)


def describe_starts(flags):
    """What each part started from, a line each; the hub's names of those that have one."""
    if flags["start"]:
        return [f"It began with {flags['start']}, another run, checkpoint or adapter: what that stands on is not "
                "known here."], []
    paper = {"vision": "biomedclip.safetensors", "language": "pmc_llama_7b"} if flags["model"] == "paper" else {}
    chosen = {"vision model": flags["vision_weights"], "language model": flags["language_weights"]}
    chosen = {part: paper.get(part.split()[0], "none") if start == "auto" else start
              for part, start in chosen.items()}
    if flags["model"] not in CONFIGS | QWENS | GPT_OSSES:  # a folder's name, of all parts
        chosen = {"model": flags["model"]}
    starts, bases = [], []
    for part, start in chosen.items():
        # by its name, one that prepare/all.py has brought
        if entry := next((entry for entry in WEIGHTS.values() if entry.target == start), None):
            bases.append(entry.hub)
        origin = f"{entry.page}, licence: {entry.licence}" if entry else "origin and licence not known"
        starts.append(f"The {part} started from "
                      f"{'random values' if start == 'none' else f'{start} ({origin})'}.")
    return starts, bases


def describe_objective(run, step, flags):
    """What the steps made smaller or larger, and the newest numbers of it in a run's log up to a step, as text."""
    log, last = run / "log.jsonl", {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []:
        try:
            entry = json.loads(line)
            last |= {key: f"{entry[key]:.3f}" for key in ("loss", "held_out_loss", "reward")
                     if key in entry and entry["step"] <= step}
        except (ValueError, TypeError, KeyError, RecursionError):  # torn, or not by train_vlm.py
            continue
    loss, held_out, reward = (last.get(key, "not known") for key in ("loss", "held_out_loss", "reward"))
    if "reward" in flags:
        return (f"GRPO's objective, its answers rewarded by {flags['reward']} of tasks/rewards.py;\n"
                f"the last mean reward logged is {reward}")
    return (f"the cross-entropy of the answers' tokens; the last loss logged is {loss} nats\na token, on held-out "
            f"samples {held_out}")


def write_card(checkpoint, public, path):
    """The card, with the hub's front matter. public: make_public of the checkpoint's record."""
    model, flags, step = load_vlm(checkpoint, device="meta", bits=0), public["flags"], int(checkpoint.name[5:])
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    starts, bases = describe_starts(flags)
    known = [DATASETS.get(entry.partition(":")[0]) for entry in flags["data"].split(",")]
    hub = [dataset.hub for dataset in known if dataset and dataset.hub]
    tests, size = {test for tests in public["tests"].values() for test in tests}, public["image"]["size"]
    per_image = f"{model.vision.tokens(size, size)} tokens for an image of {size} x {size} pixels"
    if public["image"]["resize"] == "smart":
        per_image = f"images in their own shapes, of {size:,} pixels at most"
    if most := most_tiles(public["image"]["resize"]):
        per_image = (f"{model.vision.tokens(size, size)} tokens for each of up to {most} tiles of {size} x {size} "
                     "pixels,\nand as many for the whole image behind several")
    parts = (QWEN if isinstance(model.language, Text) else LLAVA).format(
        **sizes, per_image=per_image, projection=PROJECTIONS.get(kind_of(model.projector.state_dict())),
        pieces=model.language.config.vocab_size,
        family="gpt-oss" if isinstance(model.language, GptOss) else "LLaMA")
    path.write_text(CARD.format(
        objective=describe_objective(checkpoint.parent, step, flags), parts=parts,
        script="train_grpo.py" if "reward" in flags else "train_vlm.py", steps=step,
        name=checkpoint.parent.resolve().name,
        **{key: str(value).strip() or "not known" for key, value in public["machine"].items()},
        flags="\n    ".join(f"--{key}={value}" for key, value in flags.items()
                             if key not in HIDDEN and value != ""),
        held_out=flags["held_out"], data="\n".join(training_rows(public)),
        tests=", ".join(sorted(tests)) or "no test split", bases=json.dumps(bases),
        datasets=json.dumps([*dict.fromkeys(hub)]), starts="\n".join(starts),
        results=describe_results(checkpoint.parent, checkpoint)), encoding="utf-8")
