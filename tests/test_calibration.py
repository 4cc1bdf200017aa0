"""tasks/calibration.py: against scikit-learn, SciPy and simulated images of which the truth is known."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import softmax
from scipy.stats import binomtest
from sklearn.metrics import brier_score_loss, log_loss

from tasks import calibration
from tasks.calibration import (are_uncertain, bins_of, choose_point, compare_errors, conform, fit_temperature,
                               measure_errors, operate, probabilities_of, quantile_beyond, reliability, share_of,
                               strangeness, surprise)
from tasks.encoders import describe_temperature
from tasks.labels import decide


def draw(count, classes, multi_label, heat=1.0, seed=0):
    """Logits that are `heat` times those by which the labels were drawn: the best temperature is `heat`."""
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.normal(size=(count, classes))
    if multi_label:
        actual = rng.random(logits.shape) < probabilities_of(logits, None, True)
    else:
        labels = (rng.gumbel(size=logits.shape) + logits).argmax(1)
        actual = np.arange(classes) == labels[:, None]
    return (heat * logits).astype(np.float32), actual


# ----------------------------------------------------------------------------- the temperature

def test_probabilities_are_softmax_and_sigmoid():
    logits = np.array([[1000, -1000, 3.0], [0, 1, 2]])
    assert np.allclose(probabilities_of(logits, 2.0, False), softmax(logits / 2, axis=1), atol=1e-15)
    with np.errstate(over="raise"):
        found = probabilities_of(logits, None, True)
    assert np.allclose(found[1], 1 / (1 + np.exp(-logits[1])), atol=1e-15) and found[0].tolist()[:2] == [1, 0]


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("heat", [0.4, 1.0, 3.0])
def test_the_temperature_is_the_one_that_spoilt_the_logits_and_the_lowest_place(heat, multi_label):
    logits, actual = draw(4000, 4, multi_label, heat)
    found = fit_temperature(logits, actual, multi_label)
    assert found == pytest.approx(heat, rel=0.06)
    wide = logits.astype(np.float64)
    best = minimize_scalar(lambda place: surprise(wide / np.exp(place), actual, multi_label).mean(),
                           bounds=(-3, 3), method="bounded", options={"xatol": 1e-9})
    assert found == pytest.approx(np.exp(best.x), rel=1e-4)


@pytest.mark.parametrize("multi_label", [False, True])
def test_without_a_mistake_there_is_no_best_temperature(multi_label):
    actual = np.eye(3, dtype=bool)[[0, 1, 2, 1] * 5]
    logits = np.where(actual, 0.3, -0.2)
    assert fit_temperature(logits, actual, multi_label) is None
    logits[0] = [-0.2, 0.3, -0.2]
    assert fit_temperature(logits, actual, multi_label) < 20


@pytest.mark.parametrize("multi_label", [False, True])
def test_few_images_choose_no_temperature_which_would_be_chance(multi_label):
    logits, actual = draw(20, 4, multi_label, 1.0)
    assert fit_temperature(logits[:19], actual[:19], multi_label) is None
    assert fit_temperature(logits, actual, multi_label) is not None
    assert describe_temperature(None, 19) == "not calibrated: 19 validation images are too few"
    assert describe_temperature(None, 20) == "not calibrated: none of 20 validation images is wrong"


# ----------------------------------------------------------------------------- errors

def test_surprise_and_brier_are_scikit_learn_s():
    for multi_label in (False, True):
        logits, actual = draw(300, 3, multi_label)
        found = measure_errors(logits, actual, multi_label, list(range(300)))
        probabilities = probabilities_of(logits, None, multi_label)
        if multi_label:
            wanted = (np.mean([log_loss(truth, p) for truth, p in zip(actual.T, probabilities.T)]),
                      np.mean([brier_score_loss(truth, p) for truth, p in zip(actual.T, probabilities.T)]))
        else:
            wanted = log_loss(actual.argmax(1), probabilities), ((probabilities - actual) ** 2).sum(1).mean()
        assert (found["nll"]["value"], found["brier"]["value"]) == pytest.approx(wanted, abs=1e-12)
        for name in ("ece", "nll", "brier"):
            low, high = found[name]["interval"]
            assert low <= high and (name == "ece" or low < found[name]["value"] < high)


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_calibration_error_is_that_of_a_loop_written_out(multi_label):
    logits, actual = draw(400, 3, multi_label, heat=2.0)
    probabilities = probabilities_of(logits, None, multi_label)
    confidences, right = (probabilities.ravel(), actual.ravel()) if multi_label else (
        probabilities.max(1), actual[np.arange(400), probabilities.argmax(1)])
    order = np.argsort(confidences)  # no two are the same: as many in each bin
    parts = np.array_split(order, calibration.BINS)
    wanted = sum(len(part) * abs(confidences[part].mean() - right[part].mean()) for part in parts) / len(order)
    found = measure_errors(logits, actual, multi_label, ["a"] * 400)
    assert found["ece"]["value"] == pytest.approx(wanted, abs=0.01) and found["ece"]["interval"] is None
    bins = reliability(probabilities, actual, multi_label)
    assert sum(count for _, _, count in bins) == len(order) and len(bins) == calibration.BINS
    weighed = sum(count * abs(sure - share) for sure, share, count in bins) / len(order)
    assert weighed == pytest.approx(found["ece"]["value"], abs=1e-12)


def test_the_same_confidences_are_in_one_bin():
    assert len({*bins_of(np.array([0.5] * 100)).tolist()}) == 1
    assert np.bincount(bins_of(np.random.default_rng(0).random(300))).tolist() == [20] * 15


def test_true_probabilities_have_the_error_of_chance_and_spoilt_ones_more():
    logits, actual = draw(300, 3, False, heat=3.0, seed=1)
    errors = compare_errors(logits, actual, 3.0, False, list(range(300)))
    before, after = errors["before"], errors["after"]
    assert after["ece"]["value"] == pytest.approx(after["ece_by_chance"], abs=0.035) and after["ece_by_chance"] > 0.03
    assert before["ece"]["value"] > 0.15 and before["nll"]["value"] > after["nll"]["value"]
    assert compare_errors(logits, actual, None, False, [0] * 300)["after"]["nll"] == {
        "value": before["nll"]["value"], "interval": None}


# ----------------------------------------------------------------------------- uncertain ones

def test_a_quantile_by_hand():
    assert quantile_beyond(np.arange(9.0)[::-1], 0.9) == 8 and quantile_beyond(np.arange(8.0), 0.9) is None
    assert quantile_beyond(np.arange(19.0), 0.95) == 18 and quantile_beyond(np.arange(18.0), 0.95) is None
    assert quantile_beyond(np.arange(99.0), 0.9) == 89


@pytest.mark.parametrize("multi_label", [False, True])
def test_as_many_conform_as_are_wanted_however_few_images_there_are(multi_label):
    """Of 20 validation images the mean coverage of new ones is 19 / 21 exactly: their 19th of 20."""
    covered = []
    for seed in range(300):
        logits, actual = draw(60, 3, multi_label, seed=seed)
        strange = strangeness(probabilities_of(logits, None, multi_label), actual, multi_label)
        covered.append((strange[20:] <= quantile_beyond(strange[:20], 0.9)).mean())
    assert np.mean(covered) == pytest.approx(19 / 21, abs=0.02)


def test_the_strangeness_of_several_labels_is_that_of_the_worst():
    assert strangeness(np.array([[0.9, 0.25, 0.5]]), np.array([[True, True, False]]), True) == [0.75]
    assert strangeness(np.array([[0.5, 0.25, 0.25]]), np.array([[False, True, False]]), False) == [0.75]


def test_an_image_is_certain_where_exactly_what_is_predicted_conforms():
    probabilities = np.array([[0.9, 0.1, 0.0], [0.5, 0.45, 0.05], [0.4, 0.3, 0.3]])
    said = decide(probabilities, None)
    assert are_uncertain(probabilities, said, 0.5, False).tolist() == [False, False, True]  # none conforms
    assert are_uncertain(probabilities, said, 0.6, False).tolist() == [False, True, False]  # 0.45: two do
    probabilities = np.array([[0.9, 0.1], [0.9, 0.5], [0.9, 0.25]])
    said = decide(probabilities, np.array([0.5, 0.2]))
    # The second of the last is predicted, at its tuned threshold, but only "not there" conforms
    assert are_uncertain(probabilities, said, 0.3, True).tolist() == [False, True, True]
    assert are_uncertain(probabilities, said, 0.8, True).tolist() == [False, True, True]  # 0.25 may be there, too


def test_what_is_flagged_is_less_often_right():
    logits, actual = draw(2000, 3, False)
    probabilities = probabilities_of(logits, None, False)
    splits = [(probabilities[part], actual[part]) for part in (slice(0, 1000), slice(1000, 2000))]
    found = conform(*splits[0], (*splits[1], decide(splits[1][0], None)), False)
    assert found["covered"] == pytest.approx(0.9, abs=0.03) and 200 < found["flagged"] < 900
    assert found["accuracy_flagged"] + 0.2 < found["accuracy_others"]
    few = conform(probabilities[:8], actual[:8], None, False)
    assert few == {"coverage": 0.9, "threshold": None, "validation_images": 8}


# ----------------------------------------------------------------------------- operating points

def test_shares_have_wilson_s_interval_or_that_of_their_groups():
    for hits, count in ((0, 7), (5, 9), (30, 30)):
        found = share_of(np.arange(count) < hits, list(range(count)))
        wanted = binomtest(hits, count).proportion_ci(method="wilson")
        assert found["interval"] == pytest.approx([wanted.low, wanted.high], abs=1e-12)
    patients = [name for name in range(20) for _ in range(10)]
    hits = np.repeat(np.random.default_rng(0).random(20) < 0.7, 10)
    grouped, alone = share_of(hits, patients), share_of(hits, list(range(200)))
    assert np.ptp(grouped["interval"]) > 2 * np.ptp(alone["interval"]) and grouped["groups"] == 20
    sure = share_of(np.ones(200, bool), patients)  # whichever are drawn, all are hits: that is no certainty
    assert sure["interval"] == pytest.approx([*binomtest(20, 20).proportion_ci(method="wilson")], abs=1e-12)
    assert share_of(np.zeros(0, bool), [])["value"] is None
    assert share_of(np.array([True, False]), ["a", "a"])["interval"] is None


@pytest.mark.parametrize("of", ["sensitivity", "specificity"])
def test_new_images_reach_the_wanted_share_and_too_few_are_refused(of):
    rng = np.random.default_rng(0)
    reached, other = [], []
    for _ in range(300):
        actual = rng.random(200) < 0.3
        scores = rng.normal(size=200) + 2 * actual
        threshold = choose_point(scores[:100], actual[:100], of, 0.9)
        found = operate(threshold, scores[100:], actual[100:], range(100))
        reached.append(found[of]["value"])
        other.append(found["sensitivity" if of == "specificity" else "specificity"]["value"])
        kind = actual[:100] if of == "sensitivity" else ~actual[:100]
        at = (scores[:100] >= threshold) == actual[:100]
        assert at[kind].mean() >= 0.9  # on validation itself
    assert 0.9 <= np.mean(reached) < 0.95 and np.mean(other) > 0.5
    actual = np.arange(30) < (18 if of == "sensitivity" else 12)
    assert choose_point(rng.random(30), actual, of, 0.95) is None  # 18 of its kind
    assert choose_point(rng.random(31), np.append(actual, of == "sensitivity"), of, 0.95) is not None
