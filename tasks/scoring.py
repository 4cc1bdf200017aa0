"""
From answers to tables: the scores of a split's answers beside those that look at no image, and what they stand on.

Whoever gave the answers, a run of this code (eval_vqa.py) or anybody else (--predictions), the tables are the same.
"""

from dataclasses import asdict
from pathlib import Path

import numpy as np

from plumbing.devices import describe_machine, find_device
from plumbing.files import find_run, hash_file
from plumbing.flags import UserError
from plumbing.shards import Shard
from tasks import choices, reasoning
from tasks.compare import compare, match_lines, print_comparison, read_answers
from tasks.evaluations import (choose_evaluations, lines_of, name_evaluation, place_of, read_evaluation, require_room,
                               unusual_flags, write_evaluation)
from tasks.foreign import read_foreign, read_objects
from tasks.seen import find_seen, training_answers
from tasks.splits import answer_limit, count_questions, task_of
from tasks.stats import draw_units
from tasks.summary import write_summary
from tasks.vqa import as_asked, report_faults


def list_facts(answerer, shard, splits, config, device="", dtype="", bits=""):
    """
    What an evaluation's numbers stand on, as a dict: two of the same have the same results. answerer: the hash of the
    checkpoint, or of somebody else's file of answers; splits: what tasks.seen.open_trained gives.
    """
    flags = ["limit", "blind", "temperature", "seed"]
    flags += ["batch_size", "top_k", "top_p"] * (config.temperature > 0)
    return {"checkpoint": answerer, "data": shard.manifest["checksum"],
            "trained": splits if isinstance(splits, str) else {
                name: train.manifest["checksum"] for name, (train, _) in splits.items()},
            "flags": {flag: getattr(config, flag) for flag in flags} | {"max_new_tokens": answer_limit(shard, config)},
            "device": device, "dtype": dtype, "base_bits": bits}


def units_of(shard, records):
    """What a bootstrap is to draw of a shard's first questions, and the number of each one's, (n,)."""
    unit, units = draw_units(shard.connect()[:len(records)], [record.get("group", "") for record in records])
    return unit if len(shard.image_index) else "questions", units


def conclude(shard, answers, notes, splits, trained, config):
    """
    Score the answers to a shard's first questions and print the tables. Returns them as a dict, and
    {row: lines for its file of answers}.

    answers: {row: n texts}; notes: {row: n dicts}, what there is to say about each: "cut", "likelihoods"; splits: what
    the answers could be learnt from (tasks/seen.py), or as a str why that is not known; trained: the run's record,
    None of answers that were given elsewhere.
    """
    name, count = f"{shard.folder.parent.name}/{shard.folder.name}", count_questions(shard, config)
    task = task_of(shard)
    records = [as_asked(record) for record in shard.read_records()[:count]]
    if task is not choices and all(map(choices.lists_its_answer, records)):
        print(f"{name}: multiple choice that was prepared without its options, scored as free text; {shard.again}")
    pairs = None if isinstance(splits, str) else training_answers(splits, shard.folder.parent.name)
    blind = task.blind_rows(pairs, records)
    if pairs is None and not blind:
        print(f"no row of question only: {splits}")
    cut = {row: [note.get("cut", False) for note in some] for row, some in notes.items()} if trained else None
    notes, answers = notes | {row: [{}] * count for row in blind}, answers | blind
    scored = {row: [task.score(record | note, reasoning.answer_of(record, text)) for record, note, text in
                    zip(records, notes[row], texts, strict=True)] for row, texts in answers.items()}
    seen = find_seen(shard, splits, trained) if trained else "these answers are of no run of this code"
    seen = seen if isinstance(seen, str) else seen[:count]
    unit, units = units_of(shard, records)
    sample, image = shard.image_pairs()
    tables = task.report(name, scored, len(np.unique(image[sample < count])), records, seen, units, unit, config.seed)
    written = {row: texts for row, texts in answers.items() if row not in blind}
    tables["reasoning"] = reasoning.report(written, records, scored, task.MAIN, units, config.seed)
    tables["answers"] = report_faults(answers, cut, answer_limit(shard, config))
    lines = lines_of(name, records, shard.samples["image"].tolist(), seen, answers, notes)
    return {name: tables | {"manifest": shard.manifest["checksum"]}}, lines


# ----------------------------------------------------------------------------- answers from elsewhere

def open_named(datasets, config):
    """The Shards of names, of the split that the flags say."""
    shards = [Shard(Path(config.shards_dir) / name / config.split) for name in datasets]
    for shard in shards:
        shard.require_questions()
    return shards


def train_of(shard):
    """{dataset: (its training split, nothing left out)} where one is prepared beside a split, or why none is known."""
    folder = shard.folder.parent / "train"
    return {shard.folder.parent.name: (Shard(folder), [])} if folder.is_dir() else f"{folder} is not here"


def score_predictions(config):
    """
    Score the answers of the file --predictions as a run's are, and write an evaluation of each dataset, in eval/ beside
    the file, and the one table. Raises UserError where they are not answers to just the prepared questions.
    """
    path = Path(config.predictions)
    named = [str(line.get("dataset", "")).partition("/")[0] for _, line in read_objects(path)]
    asked = [name.strip() for name in config.data.split(",")] if config.data not in ("", "all") else named
    datasets = list(dict.fromkeys(filter(None, asked)))
    if not datasets:
        raise UserError(f"{path}: its lines name no dataset; say which one they answer, such as --data=vqa_rad")
    shards = open_named(datasets, config)
    records = {f"{shard.folder.parent.name}/{shard.folder.name}": list(map(
        as_asked, shard.read_records()[:count_questions(shard, config)])) for shard in shards}
    given = read_foreign(path, records)
    out, evaluations = Path(config.out) if config.out else path.parent / "eval", []
    require_room(out, 2 * path.stat().st_size)
    for shard, name in zip(shards, records, strict=True):
        texts, notes = given[name]
        splits = train_of(shard)
        results, lines = conclude(shard, {"model": texts}, {"model": notes}, splits, None, config)
        facts = list_facts(hash_file(path), shard, splits, config)
        folder = place_of(out, name_evaluation(Path(path.stem), shard, config), facts)
        write_evaluation(folder, {
            "checkpoint": path.name, "stands_on": facts, "flags": asdict(config),
            "unusual_flags": unusual_flags(config), "seconds": None, "machine": describe_machine(find_device("cpu")),
            "results": results, "training": {}}, lines)
        evaluations.append((folder, read_evaluation(folder)))
    write_summary(out, evaluations)


# ----------------------------------------------------------------------------- two runs

def flags_text(flags):
    return " ".join(f"--{flag}={value}" for flag, value in flags.items()) or "as usual"


def compare_runs(config):
    """
    Compare the newest evaluations of --run with those of --against, by each task's main score, question by question:
    of --data, or of all that both have. Raises UserError where they have none in common, or other questions of it.
    """
    run = config.run or str(find_run()[0])
    first, second = read_answers(run), read_answers(config.against)
    comparisons, metrics, asked = {}, {}, [name.strip() for name in config.data.split(",")]
    for name in [name for name in first if name in second]:
        if config.data not in ("", "all") and name.partition("/")[0] not in asked:
            continue
        shard = Shard(Path(config.shards_dir) / name)
        records = [as_asked(record) for record in shard.read_records()]
        places = {(record["id"], record["question"]): number for number, record in enumerate(records)}
        lines = first[name], match_lines(first[name], second[name], f"{config.against}: {name}")
        unit, units = units_of(shard, records)
        try:
            numbers = [places[line["id"], line["question"]] for line in first[name]]
        except KeyError:
            raise UserError(f"{shard.folder}: other questions than were answered; {shard.again}, and evaluate both "
                            "runs anew") from None
        task = task_of(shard)
        scores = [[task.score(records[number], reasoning.answer_of(line, line["prediction"]))[task.MAIN]
                   for number, line in zip(numbers, some, strict=True)] for some in lines]
        metrics[name], comparisons[name] = task.MAIN, compare(*scores, units[numbers], unit, config.seed)
    if not comparisons:
        raise UserError(f"--against={config.against}: no dataset that both have answered ({', '.join(first)}; "
                        f"{', '.join(second)}); evaluate both on the same --data")
    print_comparison((run, config.against), comparisons, metrics)
    evaluations = list(map(choose_evaluations, (run, config.against)))
    for name in comparisons:
        flags = [some[name][1].get("unusual_flags", {}) for some in evaluations]
        if flags[0] != flags[1]:
            print(f"{name}: answered with other flags: A {flags_text(flags[0])}, B {flags_text(flags[1])}")
