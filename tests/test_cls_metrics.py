"""train_cls.py's metrics against scikit-learn's, and the parts of a run that are functions of numbers."""

import json
import math
import warnings
from collections import Counter

import numpy as np
import pytest
import sklearn
import torch
from scipy.stats import permutation_test
from sklearn import metrics as sk

import train_cls
from model import ViT, ViTConfig
from run import learning_rate_at, make_optimizer
from tasks.encoders import Run, print_run
from tasks.labelled import Split, choose_few, hold_out
from tasks.labels import (auroc, decide, f1_of, guess_blindly, macro_f1, macro_f1_of, positive_f1, score, sign_flip,
                          tally, tally_all, tune_thresholds)
from train_cls import Config
from zoo.classifier import Classifier, augment
from zoo.resnet import ResNet, ResNetConfig

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # scikit-learn's, of classes that are absent
CLOSE = 1e-12  # the order of a sum may differ from scikit-learn's, nothing else


@pytest.fixture(autouse=True)
def fast_scikit_learn():
    with sklearn.config_context(skip_parameter_validation=True):
        yield


def silent_score(probabilities, actual, thresholds):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = score(probabilities, actual, thresholds, [f"c{k}" for k in range(actual.shape[1])])
    json.dumps(found, allow_nan=False)  # it is written to results.jsonl, and NaN is no JSON
    return found


def one_class(rng):
    """Probabilities and labels of up to 60 images, at times with ties, absent classes or one alone."""
    n, m = rng.integers(1, 61), rng.integers(2, 8)
    there = rng.permutation(m)[:rng.integers(1, m + 1)]
    labels = rng.choice(there, n)
    probabilities = rng.dirichlet(np.ones(m), n) + 0.5 * np.eye(m)[labels] * rng.integers(0, 2)
    if rng.random() < 0.3:
        probabilities[:, rng.integers(m)] = 0  # never predicted
    return probabilities.round(rng.integers(1, 5)).astype(np.float32), np.arange(m) == labels[:, None]


def many_labels(rng):
    n, m = rng.integers(1, 61), rng.integers(2, 8)
    actual = rng.random((n, m)) < rng.choice([0, 0.1, 0.5, 0.9, 1], m, p=[0.1, 0.3, 0.3, 0.2, 0.1])
    probabilities = 0.7 * rng.random((n, m)) + 0.3 * actual * rng.integers(0, 2)
    return probabilities.round(rng.integers(1, 5)).astype(np.float32), actual


def areas_of(probabilities, actual):
    return [sk.roc_auc_score(truth, column) if 0 < truth.sum() < len(truth) else None
            for column, truth in zip(probabilities.T, actual.T)]


def check_classes(found, f1, recall, areas, actual):
    for key, expected in ("f1", f1), ("recall", recall), ("images", actual.sum(0)):
        assert [c[key] for c in found["classes"].values()] == pytest.approx(list(expected), abs=CLOSE), key
    assert [c["auroc"] is None for c in found["classes"].values()] == [area is None for area in areas]
    there = [area for area in areas if area is not None]
    assert [c["auroc"] for c in found["classes"].values() if c["auroc"] is not None] == pytest.approx(
        there, abs=CLOSE)
    assert found["auroc"] == (pytest.approx(np.mean(there), abs=CLOSE) if there else None)
    assert found["images"] == len(actual)


# ----------------------------------------------------------------------------- scores

def test_one_class_an_image_agrees_with_scikit_learn():
    rng, absent, all_one = np.random.default_rng(0), 0, 0
    for _ in range(150):
        probabilities, actual = one_class(rng)
        found = silent_score(probabilities, actual, None)
        m, labels, said = actual.shape[1], actual.argmax(1), probabilities.argmax(1)
        assert found["macro_f1"] == pytest.approx(sk.f1_score(labels, said, average="macro"), abs=CLOSE)
        assert found["accuracy"] == pytest.approx(sk.accuracy_score(labels, said), abs=CLOSE)
        assert found["balanced_accuracy"] == pytest.approx(
            sk.balanced_accuracy_score(labels, said), abs=CLOSE)
        assert found["confusion"] == sk.confusion_matrix(labels, said, labels=range(m)).tolist()
        _, recall, f1, _ = sk.precision_recall_fscore_support(labels, said, labels=range(m), average=None,
                                                              zero_division=0)
        check_classes(found, f1, recall, areas_of(probabilities, actual), actual)
        absent += len({*labels, *said}) < m
        all_one += len(set(labels)) == 1
    assert absent > 15 and all_one > 15  # the cases are what they are meant to be


def test_several_labels_agree_with_scikit_learn():
    """A label without positives, or without negatives, counts 0 where scikit-learn's zero_division is 0."""
    rng, empty = np.random.default_rng(1), 0
    for _ in range(150):
        probabilities, actual = many_labels(rng)
        thresholds = rng.choice([0.1, 0.3, 0.5, 0.7], actual.shape[1])
        found = silent_score(probabilities, actual, thresholds)
        for suffix, said in ("_at_0.5", probabilities >= 0.5), ("", probabilities >= thresholds):
            (_, recall, f1, _), (_, specificity, without, _) = (
                sk.precision_recall_fscore_support(truth, guess, average=None, zero_division=0)
                for truth, guess in ((actual, said), (~actual, ~said)))
            assert found["macro_f1" + suffix] == pytest.approx((f1 + without).mean() / 2, abs=CLOSE)
            assert found["positive_f1" + suffix] == pytest.approx(
                sk.f1_score(actual, said, average="macro", zero_division=0), abs=CLOSE)
        assert found["accuracy"] == pytest.approx(1 - sk.hamming_loss(actual, said), abs=CLOSE)
        assert found["balanced_accuracy"] == pytest.approx((recall + specificity).mean() / 2, abs=CLOSE)
        check_classes(found, f1, recall, areas_of(probabilities, actual), actual)
        empty += not actual.any(0).all()
    assert empty > 15


def test_one_label_is_a_task_of_two_classes():
    rng = np.random.default_rng(2)
    actual, predicted = rng.random((2, 50, 1)) < 0.4
    assert macro_f1(predicted, actual, True) == pytest.approx(
        sk.f1_score(actual[:, 0], predicted[:, 0], average="macro"), abs=CLOSE)
    assert positive_f1(predicted, actual) == pytest.approx(
        sk.f1_score(actual[:, 0], predicted[:, 0]), abs=CLOSE)


def test_auroc_by_hand():
    actual = np.array([False, False, True, True])
    assert auroc(np.array([0.1, 0.2, 0.3, 0.4]), actual) == 1
    assert auroc(np.array([0.4, 0.3, 0.2, 0.1]), actual) == 0
    assert auroc(np.full(4, 0.3), actual) == 0.5
    assert auroc(np.array([0.1, 0.3, 0.3, 0.2]), actual) == 0.625  # pairs: 1, 1, a half, 0
    assert math.isnan(auroc(np.arange(4), np.ones(4, bool)))
    assert math.isnan(auroc(np.arange(4), np.zeros(4, bool)))


def test_a_run_without_an_area_is_printed(capsys):
    """Of a class without images there is none, and one of 0 is not none."""
    actual = np.array([[True, False, False]] * 2 + [[False, True, False]] * 2)
    found = silent_score(np.array([[0.1, 0.7, 0.2]] * 2 + [[0.8, 0.1, 0.1]] * 2), actual, None)
    assert [c["auroc"] for c in found["classes"].values()] == [0, 0, None] and found["auroc"] == 0
    entry = {"dataset": "d", "name": "n", "seed": 0, "best_epoch": 1, "test": json.loads(json.dumps(found))}
    print_run(entry)
    out = capsys.readouterr().out
    assert "AUROC 0.000" in out and out.count("nan") == 1
    found = silent_score(np.ones((2, 2)), np.array([[True, False]] * 2), None)
    assert found["auroc"] is None
    print_run(entry | {"test": found})
    assert "AUROC nan" in capsys.readouterr().out


def test_a_blind_guess_knows_the_training_labels_alone():
    learnt = np.eye(3, dtype=bool)[[0, 1, 1, 2]]
    guess = guess_blindly(learnt, 5, False)
    assert guess.tolist() == [[False, True, False]] * 5
    actual = np.eye(3, dtype=bool)[[0, 0, 1, 1, 2]]
    assert macro_f1(guess, actual, False) == pytest.approx((2 * 2 / 7) / 3, abs=CLOSE)  # of one class in three
    learnt = np.array([[1, 0, 1], [1, 0, 0], [0, 0, 1], [1, 0, 0]], bool)  # 3/4, none and half have them
    guess = guess_blindly(learnt, 2, True)
    assert guess.tolist() == [[True, False, False]] * 2
    actual = np.array([[1, 0, 0], [1, 1, 0]], bool)
    expected = np.mean([[1, 0], [0, 2 / 3], [0, 1]])  # having it, not having it
    assert macro_f1(guess, actual, True) == pytest.approx(expected, abs=CLOSE)


# ----------------------------------------------------------------------------- thresholds

def test_no_cut_is_better_than_the_tuned_one():
    rng, tied, at_zero = np.random.default_rng(3), 0, 0
    for _ in range(300):
        probabilities, actual = many_labels(rng)
        probabilities = np.maximum(probabilities - rng.choice([0, 0.5]), 0)  # some are 0
        thresholds = tune_thresholds(probabilities, actual)
        predicted = decide(probabilities, thresholds)
        for label in range(actual.shape[1]):
            column, truth = probabilities[:, label], actual[:, label]
            if not truth.any():
                assert thresholds[label] == 0.5
                continue
            cuts = [2 * (truth & (column >= cut)).sum() / (truth.sum() + (column >= cut).sum())
                    for cut in column]
            assert f1_of(tally(predicted, actual).sum(0))[0][label] == pytest.approx(max(cuts), abs=CLOSE)
            assert thresholds[label] not in column  # between two scores, so never between two equal ones
            tied += len(set(column)) < len(column)
            at_zero += bool(predicted[column == 0, label].any())
    assert tied > 100 and at_zero > 10


def test_a_threshold_by_hand():
    """The best cut of the first lies between 0.75 and 0.25, and may not split the two of 0.25."""
    probabilities = np.array([[1, 0.9], [0.75, 0.1], [0.25, 0.4], [0.25, 0.2]], np.float32)
    actual = np.array([[1, 0], [1, 0], [1, 0], [0, 0]], bool)
    # F1 at 1, 0.75, 0.25: 2/4, 4/5, 6/7; cut between the two of 0.25 it would be 1
    assert tune_thresholds(probabilities, actual) == pytest.approx([0.125, 0.5], abs=1e-6)
    actual[2, 0] = False
    assert tune_thresholds(probabilities, actual).tolist() == [0.5, 0.5]


def test_decide():
    probabilities = np.array([[0.5, 0.2, 0.3], [0.4, 0.4, 0.2]], np.float32)
    assert decide(probabilities, None).tolist() == [[True, False, False]] * 2  # the first of the same
    thresholds = np.array([0.5, 0.1, 0.25])  # a label whose probability is its threshold is there
    assert decide(probabilities, thresholds).tolist() == [[True, True, True], [False, True, False]]


def test_score_keeps_to_the_thresholds_it_is_given():
    """Those tuned on validation are far from the test split's own, and stay."""
    rng = np.random.default_rng(4)
    actual = rng.random((80, 3)) < 0.4
    probabilities = 0.4 * rng.random((80, 3)) + 0.2 * actual
    given, own = np.array([0.5, 0.45, 0.55]), tune_thresholds(probabilities, actual)
    found = silent_score(probabilities, actual, given)
    assert found["thresholds"] == given.tolist()
    for key, thresholds in ("macro_f1", given), ("macro_f1_at_0.5", 0.5):
        assert found[key] == pytest.approx(macro_f1(probabilities >= thresholds, actual, True), abs=CLOSE)
        assert found[key] < silent_score(probabilities, actual, own)["macro_f1"] - 0.05


# ----------------------------------------------------------------------------- bootstrap

@pytest.mark.parametrize("multi_label", [False, True])
def test_the_interval_is_that_of_a_plain_bootstrap(multi_label):
    rng, n, m = np.random.default_rng(5), 200, 3
    labels = rng.choice(m, n, p=[0.6, 0.3, 0.1])
    actual = rng.random((n, m)) < 0.3 if multi_label else np.arange(m) == labels[:, None]
    probabilities = rng.random((n, m)) * 0.8 + 0.3 * actual
    found = silent_score(probabilities, actual, np.full(m, 0.5) if multi_label else None)
    predicted = decide(probabilities, 0.5 if multi_label else None)
    pairs = [(actual, predicted), (~actual, ~predicted)] if multi_label else [(actual, predicted)]

    def f1(drawn):  # scikit-learn's takes milliseconds
        return np.mean([2 * (truth & guess)[drawn].sum(0) / (truth[drawn].sum(0) + guess[drawn].sum(0))
                        for truth, guess in pairs])

    assert f1(np.arange(n)) == pytest.approx(
        np.mean([sk.f1_score(truth, guess, average="macro") for truth, guess in pairs]), abs=CLOSE)
    values = [f1(rng.integers(0, n, n)) for _ in range(1000)]
    (low, high), spread = found["interval"], np.std(values)
    assert low < found["macro_f1"] < high
    # Of 1000 draws each end has a standard error of 0.085 spreads, two such ends 0.12; a 90% interval
    # would be narrower by 0.63.
    expected = np.quantile(values, [0.025, 0.975])
    assert np.abs(np.array([low, high]) - expected).max() < 0.3 * spread
    assert high - low == pytest.approx(expected[1] - expected[0], abs=0.3 * spread)


def test_sums_of_a_tally_are_those_of_repeated_rows():
    rng = np.random.default_rng(6)
    for number in range(100):
        probabilities, actual = (one_class, many_labels)[number % 2](rng)
        predicted = decide(probabilities, 0.5 if number % 2 else None)
        draws = rng.multinomial(len(actual), np.full(len(actual), 1 / len(actual)), size=4)
        found = macro_f1_of(draws @ tally_all(predicted, actual, bool(number % 2)), bool(number % 2))
        expected = [macro_f1(np.repeat(predicted, draw, 0), np.repeat(actual, draw, 0), bool(number % 2))
                    for draw in draws]
        assert found == pytest.approx(expected, abs=CLOSE)
    assert found.shape == (4,)


def test_the_same_call_gives_the_same_interval():
    probabilities, actual = one_class(np.random.default_rng(7))
    np.random.seed(1)
    first = silent_score(probabilities, actual, None)
    np.random.seed(2)
    assert silent_score(probabilities, actual, None) == first


# ----------------------------------------------------------------------------- signs

def test_sign_flip():
    assert sign_flip([0.1, 0.2, 0.3]) == 0.25  # all of one sign: 2 of 8
    assert sign_flip([0.1, 0.2, -0.3]) == 1  # a mean of 0
    assert sign_flip([3, 1, -1]) == 0.75  # 3 or more in 6 of 8
    assert sign_flip([0.0] * 5) == 1
    rng = np.random.default_rng(8)
    for n in range(2, 11):
        differences = rng.normal(0.5, 1, n).round(1)
        exact = permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf,
                                 vectorized=True).pvalue
        assert sign_flip(differences) == pytest.approx(exact, abs=CLOSE)
        assert sign_flip(-differences) == sign_flip(differences)


def test_sign_flip_of_many_is_approximate():
    differences = [1] * 13 + [-1] * 5  # 18: a sum of 8
    exact = 2 * sum(math.comb(18, k) for k in range(13, 19)) / 2 ** 18  # 0.0963
    assert sign_flip(differences) != exact
    assert sign_flip(differences) == pytest.approx(exact, abs=4 * math.sqrt(exact / 100_000))
    assert sign_flip(differences) == sign_flip(differences)
    exact = 2 * sum(math.comb(16, k) for k in range(12, 17)) / 2 ** 16
    assert sign_flip([1] * 12 + [-1] * 4) == exact


def test_p_of_many_differences_is_never_0():
    """None of 100,000 draws has all 40 of one sign, but what was found is one of the draws."""
    assert sign_flip([1.0] * 40) == 1 / 100_000


# ----------------------------------------------------------------------------- schedule and splits

def test_learning_rate_at():
    rates = np.array([learning_rate_at(step, 200, 2.0, 0.1) for step in range(200)])
    assert rates[0] == pytest.approx(2 / 21) and rates[19] == pytest.approx(2 * 20 / 21) and rates[20] == 2
    assert (np.diff(rates[:21]) > 0).all() and (np.diff(rates[20:]) < 0).all()
    assert rates[110] == pytest.approx(1)  # halfway down
    assert 0 < rates[-1] < 0.001
    for steps in 1, 2, 3, 7:
        for warmup in 0.0, 0.05, 0.5, 1.0:
            rates = [learning_rate_at(step, steps, 2.0, warmup) for step in range(steps)]
            assert 0 < min(rates) and max(rates) <= 2 and (rates[0] == 2) == (warmup == 0)


def make_split(labels, groups=None):
    """A Split whose images say which number they have, in name and pixels; each is its own group by default."""
    numbers = np.arange(len(labels), dtype=np.uint8)
    return Split(labels, [str(n) for n in numbers], groups or [f"image {n}" for n in numbers], numbers,
                 pixels=np.broadcast_to(numbers[:, None, None, None], (len(labels), 2, 2, 3)))


def check_part(part, whole):
    """Pixels and labels went with the names. Returns the numbers taken."""
    numbers = [int(name) for name in part.names]
    assert (part.pixels[:, 0, 0, 0] == numbers).all() and (part.labels == whole.labels[numbers]).all()
    assert part.images.tolist() == numbers and part.groups == [whole.groups[n] for n in numbers]
    assert len(set(numbers)) == len(numbers)
    return numbers


@pytest.mark.parametrize("seed", range(10))
def test_hold_out(seed):
    rng = np.random.default_rng(seed)
    labels = (rng.random((200, 2)) < [0.3, 0.1] if seed % 2 else
              np.arange(4) == rng.choice(4, 200, p=[0.6, 0.2, 0.12, 0.08])[:, None])
    split = make_split(labels)
    train, held = hold_out(split)
    kept, out = check_part(train, split), check_part(held, split)
    assert sorted(kept + out) == list(range(200)) and 16 <= len(out) <= 24
    of_all, of_held = (Counter(map(tuple, part.labels.tolist())) for part in (split, held))
    for labels, count in of_all.items():
        assert of_held[labels] == (count + 4) // 10, labels
    again = hold_out(split)
    assert [train.names, held.names] == [part.names for part in again]


@pytest.mark.parametrize("patients, each", [(24, 5), (12, 7), (6, 6), (4, 20), (2, 3), (2, 9)])
def test_hold_out_divides_no_group_and_leaves_each_class_on_both_sides(patients, each):
    """So many patients of each of two classes, with so many images each."""
    classes = np.repeat([0, 1], patients * each)
    owners = [f"patient {number // each}" for number in range(len(classes))]
    order = np.random.default_rng(patients).permutation(len(classes))
    split = make_split((np.arange(2) == classes[:, None])[order], [owners[n] for n in order])
    train, held = hold_out(split)
    assert sorted(check_part(train, split) + check_part(held, split)) == list(range(len(classes)))
    assert not set(train.groups) & set(held.groups)
    for label in (0, 1):
        of_held = {group for group, labels in zip(held.groups, held.labels) if labels[label]}
        assert len(of_held) == max(1, (patients + 4) // 10) and train.labels[:, label].any()
    assert hold_out(split)[1].names == held.names


def test_hold_out_of_one_patient_or_of_few_images_is_empty():
    two_classes = np.eye(2, dtype=bool)
    for labels, groups in ((np.repeat(two_classes, 5, axis=0), None),
                           (np.repeat(two_classes, 20, axis=0), ["patient"] * 40)):
        train, held = hold_out(make_split(labels, groups))
        assert held.names == [] and len(train.names) == len(labels)


def test_a_patient_of_two_classes_is_held_out_whole_or_not_at_all():
    labels = np.tile(np.eye(2, dtype=bool), (30, 1))  # each of 30 patients has one image of either class
    train, held = hold_out(make_split(labels, [f"patient {n // 2}" for n in range(60)]))
    assert len(held.names) in (4, 6, 8) and not set(train.groups) & set(held.groups)
    assert held.labels.sum(0).tolist() == [len(held.names) // 2] * 2


def test_choose_few_of_one_class():
    rng = np.random.default_rng(9)
    split = make_split(np.arange(3) == rng.choice(3, 200, p=[0.7, 0.28, 0.02])[:, None])
    there = split.labels.sum(0)
    assert there[2] < 8
    for count in 1, 3, 8:
        parts = [choose_few(split, count, seed) for seed in range(3)]
        for seed, part in enumerate(parts):
            check_part(part, split)
            assert part.labels.sum(0).tolist() == np.minimum(there, count).tolist()
            assert part.names == choose_few(split, count, seed).names
        assert len({tuple(part.names) for part in parts}) == 3


def test_choose_few_of_several_labels():
    rng = np.random.default_rng(10)
    split = make_split(rng.random((200, 4)) < [0.6, 0.2, 0.2, 0.02])
    for seed in range(5):
        part = choose_few(split, 8, seed)
        check_part(part, split)
        assert (part.labels.sum(0) >= np.minimum(split.labels.sum(0), 8)).all() and len(part.names) <= 5 * 8
        none = ~split.labels.any(1)  # images without a label are a class, too
        assert (~part.labels.any(1)).sum() == 8 < none.sum()


# ----------------------------------------------------------------------------- augmentation

def test_the_same_generator_gives_the_same_images():
    images = torch.randn(32, 3, 16, 16)
    first, again, other = (augment(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert (first.shape, first.dtype) == (images.shape, images.dtype)


def test_without_chance_an_image_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.full(shape, 0.5))
    images = torch.randn(2, 3, 32, 32)
    assert (augment(images, None) - images).abs().max() < 1e-5


def test_no_image_is_turned_upside_down():
    images = torch.zeros(200, 3, 32, 32)
    images[:, :, 6:10, 6:10] = 2  # above and left
    place = augment(images, torch.Generator().manual_seed(0)).mean(1).flatten(1).argmax(1)
    assert (place // 32 < 16).all()
    assert 0.4 < (place % 32 >= 16).float().mean() < 0.6  # mirrored


def test_how_far_augmentation_goes():
    """Images whose channels are x, y, 0 and 1 tell which x and y came to their middle, and the brightness."""
    ramp = (torch.arange(32) - 15.5) / 16  # -1 and 1 are the borders
    y, x = torch.meshgrid(ramp, ramp, indexing="ij")
    images = torch.stack([x, y, torch.zeros(32, 32), torch.ones(32, 32)]).expand(400, -1, -1, -1)
    middle = augment(images, torch.Generator().manual_seed(0))[:, :, 14:18, 14:18].double()
    bright = middle[:, 2].mean((1, 2))
    contrast = middle[:, 3].mean((1, 2)) - bright
    x, y = ((middle[:, k] - bright.view(-1, 1, 1)) / contrast.view(-1, 1, 1) for k in (0, 1))
    steps = [(z[:, :, 3] - z[:, :, 0]).mean(1) / (3 / 16) for z in (x, y)]  # of x and y to the right
    down = [(z[:, 3] - z[:, 0]).mean(1) / (3 / 16) for z in (x, y)]  # and downwards
    scale, angle = torch.hypot(*down), torch.atan2(-down[0], down[1]).rad2deg()
    mirrored = steps[0] < 0
    assert torch.allclose(torch.hypot(*steps), scale, atol=1e-4)  # no shear: lengths and right angles stay
    assert (steps[0] * down[0] + steps[1] * down[1]).abs().max() < 1e-4
    assert 0.4 < mirrored.float().mean() < 0.6
    for what, value, most in [
            ("angle", angle, 10), ("scale", scale - 1, 0.1), ("bright", bright, 0.15),
            ("contrast", contrast - 1, 0.15), ("right", x.mean((1, 2)), 0.2), ("down", y.mean((1, 2)), 0.2)]:
        assert value.abs().max() <= most * 1.001, what
        if most != 0.2:  # borders are 2 apart: a tenth of an image is 0.2
            assert value.max() > 0.9 * most and value.min() < -0.9 * most, what
        assert value.std() > 0.25 * most and value.mean().abs() < 0.1 * most, what


# ----------------------------------------------------------------------------- optimiser

def make_groups(encoder, layer_decay=1.0):
    """{name: (multiple of the learning rate, weight decay)} of the parameters of a classifier that are trained."""
    torch.manual_seed(0)
    model = Classifier(encoder, 3)
    return groups_of(model, make_optimizer(model.rates(layer_decay), weight_decay=0.1))


def groups_of(model, optimizer):
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(name_of[id(parameter)], (group["rate"], group["weight_decay"]))
             for group in optimizer.param_groups for parameter in group["params"]]
    assert len(dict(found)) == len(found)  # none twice
    assert set(dict(found)) == {name for name, p in model.named_parameters() if p.requires_grad}
    return dict(found)


def tiny_vit(clip=False):
    return ViT(ViTConfig(image_size=32, patch_size=16, width=64, depth=2, clip=clip))


@pytest.mark.parametrize("clip", [False, True])
def test_rates_and_decay_of_a_vit(clip):
    groups = make_groups(tiny_vit(clip), layer_decay=0.5)
    for name, (rate, decay) in groups.items():
        if name.startswith(("head.", "encoder.norm.")):
            expected = 1
        elif name.startswith("encoder.blocks."):
            expected = {"1": 0.5, "0": 0.25}[name.split(".")[2]]
        else:
            assert name.startswith(("encoder.patch_embed.", "encoder.cls_token", "encoder.pos_embed",
                                    "encoder.norm_pre."))
            expected = 0.125
        assert rate == expected, name
        matrix = name.endswith(".weight") and "norm" not in name
        assert decay == (0.1 if matrix else 0), name
    assert groups["encoder.cls_token"] == groups["encoder.pos_embed"] == (0.125, 0)
    assert {rate for rate, _ in make_groups(tiny_vit(clip)).values()} == {1}


def test_twelve_blocks_are_told_apart():
    """Of "blocks.1" and "blocks.11" each has its own."""
    groups = make_groups(ViT(ViTConfig(32, 16, 64, depth=12)), layer_decay=0.5)
    for block in range(12):
        assert groups[f"encoder.blocks.{block}.mlp.fc1.weight"] == (0.5 ** (12 - block), 0.1)
    assert groups["encoder.cls_token"] == (0.5 ** 13, 0)


def test_rates_and_decay_of_a_resnet():
    groups = make_groups(ResNet(ResNetConfig(32, stem=2, layers=(1, 1, 2, 1), width=8)), layer_decay=0.5)
    expected = {"layer1": 1 / 16, "layer2": 1 / 8, "layer3": 1 / 4, "layer4": 1 / 2, "attnpool": 1}
    for name, (rate, decay) in groups.items():
        part = name.split(".")[1]
        assert rate == (1 if name.startswith("head.") else expected.get(part, 1 / 32)), name
        if "positional_embedding" not in name:
            norm = ".bn" in name or ".downsample.1." in name
            assert decay == (0.1 if name.endswith(".weight") and not norm else 0), name


def test_frozen_leaves_the_head_alone(tmp_path, monkeypatch):
    """As make_run() does it, up to where it has an optimiser."""
    class Stop(Exception):
        pass

    def stop(parameters, weight_decay):
        trained.append({name: parameter for name, parameter, _ in parameters if parameter.requires_grad})
        raise Stop

    monkeypatch.setattr(train_cls, "make_optimizer", stop)
    splits, trained = dict.fromkeys(("train", "validation"), make_split(np.eye(3, dtype=bool))), []
    for frozen in True, False:
        with pytest.raises(Stop):
            train_cls.make_run(
                Run(Config(frozen=frozen), tmp_path, splits, flags={}, shards={},
                    inputs={"classes": ["a", "b", "c"], "multi_label": False}),
                tiny_vit(), torch.device("cpu"), torch.float32)
        assert {"head.weight", "head.bias"} <= trained[-1].keys()
        assert (len(trained[-1]) == 2) == frozen
