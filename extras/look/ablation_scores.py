"""
What extras/look/ablate.py's runs have written, as scores and as what they would be on other images.

A score's draws are (1 + resamples,) float64 in percent: first as measured, then of each resample of the test split.
Resamples are of whole patients or images, and the same ones for all encoders, so that a difference between two draws
is a draw of the difference.
"""

import csv
import json

import numpy as np

from extras.look.plot import read_log
from plumbing.flags import UserError
from tasks import reasoning
from tasks.across import TASKS, units_of
from tasks.compare import match_lines
from tasks.evaluations import file_of, read_predictions
from tasks.labels import decide, guess_blindly, macro_f1_of, tally_all
from tasks.stats import bootstrap, resampled_sums
from tasks.summary import summary_of

SHUFFLED = "image shuffled"  # eval_vqa.py's row of the model with the images exchanged


def question_draws(evaluations, first=None):
    """
    ({row: draws of the main score, the mean over seeds}, [the score of each seed], what is drawn, lines of answers) of
    the evaluations of all seeds on one dataset, [(folder, results)]. Rows: the model's, and without the image that
    belongs to a question. first: another encoder's lines, whose order these are brought to.
    """
    main = summary_of(evaluations[0][1])["lines"][0]
    task, scores = TASKS[main["metric"]], {}
    for folder, _ in evaluations:
        for row in ("model", SHUFFLED, *(main["blind"] or ())[:1]):
            lines = [json.loads(line) for line in read_predictions(folder / file_of(row)).splitlines()]
            first = first or lines
            scores.setdefault(row, []).append([
                task.score(line, reasoning.answer_of(line, line["prediction"]))[task.MAIN]
                for line in match_lines(first, lines, f"{folder}/{file_of(row)}")])
    unit, units = units_of(first)
    means = np.stack([np.mean(some, 0) for some in scores.values()], axis=1)  # (n, rows)
    drawn = bootstrap(means, units)[:None if len({*units}) > 1 else 0]  # one image alone says nothing about others
    draws = dict(zip(scores, np.vstack([means.mean(0), drawn]).T))
    return draws, np.mean(scores["model"], axis=1).tolist(), unit, first


def minutes_of(evaluations, batch_size):
    """What a seed took to train, by the speeds in its run's log, and to answer: the mean."""
    minutes = []
    for folder, results in evaluations:
        steps, speeds = read_log(folder.parent.parent)["samples_per_second"]
        minutes.append((batch_size * (np.diff([0, *steps]) / speeds).sum() + results["seconds"]) / 60)
    return float(np.mean(minutes))


def class_draws(runs, learnt, first=None):
    """
    ({row: draws of macro-F1, the mean over seeds}, [the score of each seed], what is drawn, names of images) of
    train_cls.py's runs on one dataset, [(folder, result)]. Rows: the model's, and the most frequent of the training
    labels `learnt`, (images, m) bool. first: another encoder's names of images.
    """
    facts, drawn = runs[0][1]["inputs"], []
    for folder, result in runs:
        with open(folder / "test.csv", encoding="utf-8", newline="") as file:
            images, groups, labels, *columns = zip(*sorted(list(csv.reader(file))[1:]))
        if (first := first or images) != images:
            raise UserError(f"{folder}/test.csv: other images than another run was tested on; choose another --out")
        actual = np.array([[name in text.split("|") for name in facts["classes"]] for text in labels])
        thresholds = np.array(result["test"]["thresholds"]) if facts["multi_label"] else None
        drawn.append(macro_draws(decide(np.array(columns, float).T, thresholds), actual, facts["multi_label"], groups))
    guess = guess_blindly(learnt, len(actual), facts["multi_label"])
    blind = macro_draws(guess, actual, facts["multi_label"], groups)
    draws = {"model": np.mean(drawn, 0), "most frequent class": blind}
    unit = "images" if len({*groups}) == len(groups) else "groups of images"
    return draws, [float(some[0]) for some in drawn], unit, first


def macro_draws(predicted, actual, several, groups):
    """The draws of macro-F1 of (n, m) bool, what was predicted and is there; several: of labels, an image may have."""
    tallies = tally_all(predicted, actual, several)
    sums = resampled_sums(tallies, groups) if len({*groups}) > 1 else tallies[:0]
    return 100 * macro_f1_of(np.vstack([tallies.sum(0), sums]), several)
