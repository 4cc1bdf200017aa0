"""
What is recorded of train_cls.py's runs, what they say of new images, and the table of all.

A run is the folder <out>/<dataset>/<name>/seed_<n>. While it trains it holds checkpoints, step_<epoch>/; once
it is finished, result.json. Both say by which flags it was made and what it stands on, its `inputs`: nested
facts of its images, labels and encoder. Numbers are compared only where they stand on the same.
"""

import csv
import io
import math
import os
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plumbing.files import (checkpoints, differences, hash_json, lock, newest_checkpoint, read_manifest,
                            require_writable, write_whole)
from plumbing.flags import UserError
from plumbing.runs import sweep
from tasks.calibration import FEWEST, are_uncertain
from tasks.labels import decide, sign_flip

EIGHT = ("cxr8", "med_fmc_chest", "med_fmc_colon", "med_fmc_endo", "busi", "chaoyang", "cbis_ddsm",
         "mendeley_cxray")
MEAN = "mean of the eight"
PAPER = {"openmedq": 0.757, "biomedclip": 0.745, "pubmedclip": 0.746, "pmc_clip": 0.745,
         "scratch": 0.616}  # the paper's mean macro-F1 over the eight


# ----------------------------------------------------------------------------- one run

@dataclass
class Run:
    """One dataset, one encoder and one seed: what is asked for, and what there is of it."""
    config: object  # train_cls.Config
    folder: Path
    splits: dict  # {name: Split}
    flags: dict
    inputs: dict  # what it stands on: nested facts of its images, labels and encoder
    shards: dict  # checksums of its shards, and of the test splits that they were compared with; no reason
    # to refuse: one made anew may hold the same images, and another dataset may have none of them
    result: dict | None = None  # of a finished run
    checkpoint: Path | None = None  # of a stopped one


def run_folder(out, dataset, name, seed):
    return Path(out) / dataset / name / f"seed_{seed}"


def read_result(folder):
    """The result.json of a finished run, or None. Raises UserError where it is damaged."""
    path = folder / "result.json"
    if not os.path.lexists(path):
        return None
    result = read_manifest(folder, "result.json")
    if result is None or "inputs" not in result:
        raise UserError(f"{path}: damaged, or of an earlier version; delete {folder} and train again, or "
                        "restore it")
    return result


def newest_state(folder):
    """The newest whole checkpoint of a stopped run, or None without any; what is wrong with newer ones is said."""
    if not checkpoints(folder):
        return None
    try:
        return newest_checkpoint(folder)
    except UserError:
        raise UserError(f"{folder}: none of its {len(checkpoints(folder))} checkpoints is whole, see above; "
                        f"delete {folder} and train again") from None


def require_same(folder, record, flags, inputs, defaults):
    """
    Raise UserError where a run's record, its result or its newest checkpoint's manifest, is not of these flags and
    inputs. defaults: of flags that did not exist when it was written, by name.
    """
    if "inputs" not in record:
        raise UserError(f"{folder}: begun by an earlier version; delete {folder} and train again")
    for key, value in flags.items():
        there = record["flags"].get(key, defaults[key])
        if there != value:
            raise UserError(f"--{key}={value}: the run in {folder} has {there}; choose another --name")
    if changed := differences(record["inputs"], inputs):
        more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(f"{folder}: {', '.join(changed[:3])}{more}; choose another --name, or delete {folder}")


def open_run(run, locks, defaults):
    """
    Find what there is of a Run: its result, or else its newest checkpoint. One that is not finished is locked,
    until the ExitStack `locks` closes, and known to be writable. defaults: of all flags, by name. Raises
    UserError where its record has other flags or inputs than this Run: no record is ever rewritten.
    """
    run.result = read_result(run.folder)
    if run.result is None:
        require_writable(run.folder, "out")
        locks.enter_context(lock(run.folder.with_name(f".{run.folder.name}.lock"),
                                 f"training {run.folder.name}"))
        run.result = read_result(run.folder)  # another process may have ended just now
    if run.result is None:
        run.checkpoint = newest_state(run.folder)
        sweep(run.folder, run.checkpoint)
    if record := run.result or run.checkpoint and read_manifest(run.checkpoint):
        require_same(run.folder, record, run.flags, run.inputs, defaults)


def require_its_model(folder):
    """Raise UserError where the model in a run's folder is not the one that its result is of."""
    result = read_result(folder)
    if result is None or result["model"] != read_manifest(folder / "model")["checksum"]:
        raise UserError(f"{folder}: model/ is not the one that its result.json is of; run the same command "
                        "without --predict first, or restore it")


def write_csv(path, header, rows):
    """Write a csv, whole or not at all."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    write_whole(path, text.getvalue().encode("utf-8", "backslashreplace"))  # a file's name need not be UTF-8


def write_split(path, split, probabilities, classes):
    """
    Write a csv of a Split's images: what each is, and the (n, m) calibrated probabilities, each with all of its digits,
    for a threshold may lie below what six of them tell apart.
    """
    names = np.array(classes, object)
    write_csv(path, ["image", "group", "labels", *classes], [
        [image, group, "|".join(names[labels]), *map(float, row)]
        for image, group, labels, row in zip(split.names, split.groups, split.labels, probabilities)])


def print_run(entry):
    """A run's metrics, its classes, and, where an image has one class, its confusion matrix."""
    test = entry["test"]
    drawn = "images" if test["groups"] == test["images"] else f"{test['groups']:,} groups of them"
    interval = ("no interval: all images are of one group" if test["interval"] is None else
                "{:.3f} to {:.3f}, {} drawn".format(*test["interval"], drawn))
    blind = f"blind {test['blind_macro_f1']:.3f}, " if "blind_macro_f1" in test else ""  # an earlier version's
    print(f"\n{entry['dataset']}, {entry['name']}, seed {entry['seed']}: {test['images']:,} test "
          f"images, epoch {entry['best_epoch']}\n"
          f"  macro-F1 {test['macro_f1']:.3f} ({interval}), {blind}"
          f"accuracy {test['accuracy']:.3f}, balanced {test['balanced_accuracy']:.3f}, "
          f"AUROC {math.nan if test['auroc'] is None else test['auroc']:.3f}")
    if "positive_f1" in test:
        print(f"  at thresholds of 0.5: {test['macro_f1_at_0.5']:.3f}; of having a label alone: "
              f"{test['positive_f1']:.3f}, at 0.5 {test['positive_f1_at_0.5']:.3f}")
    width = max(map(len, test["classes"]))
    confusion = test.get("confusion", [[]] * len(test["classes"]))
    taken_for = "   taken for, in this order" * bool(confusion[0])
    if "calibration" in test:  # no earlier version's
        print_trust(test["calibration"], test["conformal"], test["images"])
    print(f"  {'':{width}}     F1  recall  AUROC  images{taken_for}")
    for (name, scores), counts in zip(test["classes"].items(), confusion):
        row = "  ".join(f"{count:4}" for count in counts)
        area = math.nan if scores["auroc"] is None else scores["auroc"]
        print(f"  {name:{width}}  {scores['f1']:.3f}   {scores['recall']:.3f}  {area:.3f}  "
              f"{scores['images']:6,}   {row}")


def print_trust(calibration, conformal, images):
    """How far a run's probabilities are from what is true, and how right it is where it is uncertain."""
    before, after = calibration["before"], calibration["after"]
    changes = ", ".join(f"{words} {before[name]['value']:.3f} -> {after[name]['value']:.3f}"
                        for name, words in (("ece", "calibration error"), ("nll", "NLL"), ("brier", "Brier")))
    print(f"  {describe_temperature(calibration['temperature'], calibration['validation_images'])}; {changes}; of true "
          f"probabilities the calibration error would be {after['ece_by_chance']:.3f}")
    if conformal["threshold"] is None:
        print(f"  {too_few(conformal)}")
    else:
        said, others = (f"{math.nan if conformal[name] is None else conformal[name]:.3f}"
                        for name in ("accuracy_flagged", "accuracy_others"))
        print(f"  uncertain: {conformal['flagged']:,} of {images:,}, accuracy {said}, of the others {others}; what is "
              f"true conforms in {conformal['covered']:.1%}, wanted {conformal['coverage']:.0%}")


def describe_temperature(temperature, images):
    if temperature is None:
        why = (f"{images:,} validation images are too few" if images < FEWEST else
               f"none of {images:,} validation images is wrong")
        return f"not calibrated: {why}"
    return f"temperature {temperature:.2f}, of {images:,} validation images"


def too_few(conformal):
    return f"uncertain ones cannot be told: {conformal['validation_images']} validation images are too few"


# ----------------------------------------------------------------------------- new images

def prediction_rows(probabilities, facts):
    """(n, m) probabilities as rows of a csv: predicted labels, "yes" where uncertain ("" unknown), and the numbers."""
    thresholds, threshold = facts["thresholds"], facts.get("conformal", {}).get("threshold")
    predicted, names = decide(probabilities, thresholds and np.array(thresholds)), np.array(facts["classes"], object)
    flags = [""] * len(predicted)
    if threshold is not None:
        flagged = are_uncertain(probabilities, predicted, threshold, thresholds is not None)
        flags = ["yes" if flag else "no" for flag in flagged]
    return [["|".join(names[labels]), flag, *(f"{p:.6f}" for p in row)]
            for labels, flag, row in zip(predicted, flags, probabilities)]


def write_predictions(path, pictures, probabilities, facts):
    """
    Write a csv of labelled.Pictures and their (n, m) probabilities, and beside it <name>_studies.csv and
    <name>_patients.csv, of means over the pictures of one, where any has several. Says what it wrote, and how many
    are uncertain. Pictures without a patient are in no patient's mean.
    """
    header = ["predicted", "uncertain", *facts["classes"]]
    rows = prediction_rows(probabilities, facts)
    write_csv(path, ["image", *header], [[picture.name, *row] for picture, row in zip(pictures, rows)])
    told = [f"{path}: {len(rows):,} images{count_uncertain(rows)}"]
    for unit, plural in (("study", "studies"), ("patient", "patients")):
        places = defaultdict(list)
        for place, picture in enumerate(pictures):
            places[getattr(picture, unit)].append(place)
        unknown, table = len(places.pop("", [])), path.with_name(f"{path.stem}_{plural}.csv")
        if all(len(some) == 1 for some in places.values()):
            table.unlink(missing_ok=True)  # of an earlier prediction
            continue
        means = prediction_rows(np.array([probabilities[some].mean(0) for some in places.values()]), facts)
        write_csv(table, [unit, "images", "first image", "predicted", "uncertain images", *facts["classes"]], [
            [name, len(some), pictures[some[0]].name, labels, flags_of(rows, some), *numbers]
            for (name, some), (labels, _, *numbers) in zip(places.items(), means)])
        told.append(f"{table}: {len(means):,} {plural}"
                    + f"; {unknown:,} images are of no known {unit}" * bool(unknown))
    print("\n".join([*told, describe_trust(facts)]))


def flags_of(rows, places):
    """How many of these rows are uncertain; "" where that is not known: of a mean it is not."""
    return sum(rows[place][1] == "yes" for place in places) if rows[0][1] else ""


def count_uncertain(rows):
    return "" if rows[0][1] == "" else f", {sum(row[1] == 'yes' for row in rows):,} uncertain"


def describe_trust(facts):
    """What a model's facts say of its probabilities, in a line."""
    if "conformal" not in facts:
        return "probabilities are not calibrated: the model is of an earlier version; train again for calibrated ones"
    images, more = facts["conformal"]["validation_images"], facts["conformal"]["threshold"] is None
    return "probabilities: " + describe_temperature(facts["temperature"], images) + (
        f"; {too_few(facts['conformal'])}" if more else "")


# ----------------------------------------------------------------------------- all runs

def read_results(out):
    """
    The results of all finished runs that can be compared, {(dataset, name, seed): result}; says which are
    left out: damaged ones, and those that do not stand on the same as most of their name do, or of all folds of one.
    """
    results, others = {}, 0
    for folder in sorted(Path(out).glob("*/*/seed_*")):
        try:
            result = read_result(folder)
        except UserError as error:
            others += 1
            print(f"left out: {error}")
            continue
        key = result and tuple(result[name] for name in ("dataset", "name", "seed"))
        if key and folder != run_folder(out, *key):
            others += 1
            print(f"left out: {folder}: the result in it is that of {run_folder(out, *key)}")
        elif key:
            results[key] = result
    for group_of, facts_of in ((lambda key, result: key[:2], seed_facts),
                               (lambda key, result: (row_of(key[0], result), key[1]), fold_facts)):
        groups = defaultdict(dict)
        for key in sorted(results):
            groups[group_of(key, results[key])][key] = facts_of(results[key])
        for stands in groups.values():
            hashes = {key: hash_json(facts) for key, facts in stands.items()}
            counts = Counter(hashes.values())
            most = max(hashes, key=lambda key: counts[hashes[key]])  # of as many, that of the lowest fold and seed
            for key in [key for key in hashes if hashes[key] != hashes[most]]:
                others += 1
                print(f"left out: {run_folder(out, *key)}: does not stand on the same as "
                      f"{f'seed_{most[2]}' if most[0] == key[0] else run_folder(out, *most)}: "
                      f"{', '.join(differences(stands[most], stands[key]))}")
                del results[key]
    if others:
        print(f"{others} of {others + len(results)} finished runs are left out")
    return results


def seed_facts(result):
    """What all seeds of a name on a dataset have to have in common."""
    return {"flags": result["flags"] | {"seed": 0}, **result["inputs"]}


def fold_facts(result):
    """What all folds of a name have to have in common, beside what their seeds have: how they were trained."""
    return {"flags": result["flags"] | {"seed": 0, "dataset": ""},
            **{name: result["inputs"].get(name) for name in ("classes", "image", "multi_label", "encoder")}}


def folds_of(result):
    """The fact "folds" of a run whose dataset is one part of a cross-validation; else None."""
    return result.get("inputs", {}).get("folds")


def row_of(dataset, result):
    """The row of the table that a run is shown in: its dataset's, or that of all folds of one."""
    folds = folds_of(result)
    return f"{folds['of']} ({folds['folds']} folds)" if folds else dataset


def missing_folds(results):
    """{(row, name): "3 of 5 folds"} of the rows in which an encoder lacks some."""
    there, wanted = defaultdict(set), {}
    for (dataset, name, _), result in results.items():
        if folds := folds_of(result):
            there[row_of(dataset, result), name].add(folds["fold"])
            wanted[row_of(dataset, result), name] = folds["folds"]
    return {key: f"{len(there[key])} of {count} folds" for key, count in wanted.items() if len(there[key]) < count}


def measured(results):
    """
    {group: {encoder: (macro-F1 on test, its standard deviation over seeds)}}, a group being a dataset, all folds of
    one, or the mean of the eight, and the names of the encoders, each in the order in which they are shown.

    What was not run is not among them. The mean of the eight is there for encoders that were run on all
    of them; its deviation is that of the means of the seeds that all of them have. Of folds each is the mean over its
    seeds, and the deviation is over folds. A deviation is NaN where there is one number.
    """
    draws = defaultdict(list)  # (row, encoder, seed or fold) -> macro-F1
    for (dataset, name, seed), entry in results.items():
        folds = folds_of(entry)
        draws[row_of(dataset, entry), name, folds["fold"] if folds else seed].append(entry["test"]["macro_f1"])
    scores = defaultdict(lambda: defaultdict(dict))
    for (row, name, draw), values in draws.items():
        scores[row][name][draw] = np.mean(values)
    names = sorted({name for _, name, _ in results}, key=lambda name: ([*PAPER, name].index(name), name))
    groups = {}
    for dataset in [*filter(scores.get, EIGHT), *sorted(scores.keys() - set(EIGHT))]:
        cells = {name: list(scores[dataset][name].values()) for name in names if name in scores[dataset]}
        groups[dataset] = {name: (np.mean(values), deviation(values)) for name, values in cells.items()}
    whole = [name for name in names if all(name in groups.get(dataset, {}) for dataset in EIGHT)]
    if whole:
        groups[MEAN] = {}
    for name in whole:
        common = set.intersection(*(set(scores[dataset][name]) for dataset in EIGHT))
        means = [np.mean([scores[dataset][name][seed] for dataset in EIGHT]) for seed in common]
        groups[MEAN][name] = np.mean([groups[dataset][name][0] for dataset in EIGHT]), deviation(means)
    return groups, names


def deviation(values):
    return np.std(values, ddof=1) if len(values) > 1 else math.nan


def blind_scores(results):
    """
    {row: macro-F1 of guessing without an image}, of folds their mean, and {MEAN: ...} where all of the eight have one.
    It is the same for all runs on the same images and labels; where they are several, that of the lowest name and seed.
    """
    firsts = {}  # (row, dataset) -> macro-F1
    for (dataset, _, _), result in sorted(results.items()):
        if "blind_macro_f1" in result["test"]:  # not of an earlier version
            firsts.setdefault((row_of(dataset, result), dataset), result["test"]["blind_macro_f1"])
    scores = defaultdict(list)
    for (row, _), value in firsts.items():
        scores[row].append(value)
    scores = {row: np.mean(values) for row, values in scores.items()}
    return scores | ({MEAN: np.mean([scores[name] for name in EIGHT])} if scores.keys() >= set(EIGHT) else {})


def report(out):
    """Print the table of all runs, blind guesses and the paper's means beside them, and what differs reliably."""
    results = read_results(out)
    if not results:
        raise UserError(f"{out}: no run yet; make one with --dataset and --encoder")
    groups, names = measured(results)
    means, blind, missing = groups.pop(MEAN, {}), blind_scores(results), missing_folds(results)
    rows = [["macro-F1 on test", *names]]
    for group, scores in groups.items():
        cells = {name: f"{mean:.3f}" + ("" if math.isnan(spread) else f" ± {spread:.3f}")
                 + (f", {missing[group, name]}" if (group, name) in missing else "")
                 for name, (mean, spread) in scores.items()}
        rows.append([group, *(cells.get(name, "") for name in names)])
    rows += [[MEAN, *(f"{means[name][0]:.3f}" if name in means else "" for name in names)],
             ["the paper's mean", *(f"{PAPER[name]:.3f}" if name in PAPER else "" for name in names)]]
    if blind:
        rows[0].append("blind")
        for row in rows[1:]:
            row.append(f"{blind[row[0]]:.3f}" if row[0] in blind else "")
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())
    print("mean over seeds ± their standard deviation; a mean of the eight where all eight were run")
    if any(map(folds_of, results.values())):
        print("of folds: mean over folds ± their standard deviation; they share training images, so that it is no "
              "standard error")
    if blind:
        print("blind: the most frequent class in training, or of several labels those that most images have")
    for other in names[1:]:
        compare(results, names[0], other)


def data_of(result):
    """What a run stands on but for its encoder."""
    return {name: facts for name, facts in result["inputs"].items() if name != "encoder"}


def compare(results, one, other):
    """
    Print how two encoders differ, a dataset at a time, each the mean over the seeds that both have, and how
    likely that is by chance. Seeds of a dataset share its test images, and folds their training images: they are no
    samples of their own.
    """
    apart, others = defaultdict(list), 0
    for (dataset, name, seed), result in results.items():
        twin = results.get((dataset, other, seed))
        if name == one and twin and data_of(result) == data_of(twin):
            apart[row_of(dataset, result)].append(result["test"]["macro_f1"] - twin["test"]["macro_f1"])
        others += bool(name == one and twin and data_of(result) != data_of(twin))
    if others:
        print(f"{one} - {other}: {others} pairs of runs are left out, whose images or labels differ")
    if apart:
        unit = "seed(s) or fold(s)" if any(map(folds_of, results.values())) else "seed(s)"
        means, counts = [np.mean(values) for values in apart.values()], sorted(set(map(len, apart.values())))
        print(f"{one} - {other}: {np.mean(means):+.3f} over n = {len(means)} dataset(s), each the mean of "
              f"{' or '.join(map(str, counts))} {unit}, higher in {sum(mean > 0 for mean in means)}, "
              + (f"p = {sign_flip(means):.3f} (whole datasets' signs flipped)" if len(means) > 1 else
                 "p not known from one dataset"))
