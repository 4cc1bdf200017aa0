"""The metrics on worked examples, the baselines on cases small enough to check by eye."""

import numpy as np
import pytest

from eval_vqa import bleu1, exact_match, question_only_answers, score, shuffled_images

PAIRS = [  # prediction, reference, BLEU-1 worked out by hand
    ("yes", "yes", 1), ("no", "yes", 0), ("no", "no", 1),
    ("lung", "left lung", np.exp(1 - 2 / 1)), ("left lung", "lung", 1 / 2),
    ("the left lung", "left lung", 2 / 3), ("x ray", "xr - plain film", 0),
    ("hepatocellular carcinoma", "hepatocellular carcinoma", 1),
    ("adenocarcinoma", "squamous cell carcinoma", 0), ("t2", "t2", 1)]


@pytest.mark.parametrize("prediction, reference, expected", PAIRS)
def test_bleu1_by_hand(prediction, reference, expected):
    assert bleu1(prediction, reference) == pytest.approx(expected, abs=1e-12)


def test_bleu1_edges():
    assert bleu1("", "yes") == 0
    assert bleu1("YES", "yes") == 1
    assert bleu1("lung lung lung", "lung lung") == pytest.approx(2 / 3)  # clipped to two matches
    assert bleu1("no no", "no") == pytest.approx(1 / 2)
    assert exact_match(" Left  Lung", "left lung") == 1 and exact_match("lung", "left lung") == 0


def test_score_counts_what_it_averages():
    records = [{"answer": reference} for _, reference, _ in PAIRS]
    scores = score(records, [prediction for prediction, _, _ in PAIRS])
    assert scores["bleu1"] == pytest.approx(55.35, abs=0.005)
    assert scores["exact_match"] == pytest.approx(40.0)
    assert scores["closed_accuracy"] == pytest.approx(100 * 2 / 3)
    assert (scores["questions"], scores["closed_questions"]) == (10, 3)
    with pytest.raises(ValueError):
        score(records, ["yes"])
    assert score([{"answer": "lung"}], ["lung"])["closed_accuracy"] is None


def test_bleu1_agrees_with_an_independent_statement():
    """Counting by removing matched words from a list, and the penalty from the lengths' ratio."""
    rng = np.random.default_rng(0)
    for _ in range(2000):
        prediction, reference = (list(rng.choice(list("abcd"), rng.integers(1, 7))) for _ in "12")
        left, hits = list(reference), 0
        for word in prediction:
            if word in left:
                left.remove(word)
                hits += 1
        ratio = len(reference) / len(prediction)
        penalty = 1 if ratio < 1 else np.exp(1 - ratio)
        assert bleu1(" ".join(prediction), " ".join(reference)) == pytest.approx(
            penalty * hits / len(prediction), abs=1e-12)


def test_question_only_answers_fall_back_word_by_word():
    train = [{"question": q, "answer": a} for q, a in [
        ("is there a bleed?", "Yes"), ("is there a bleed?", "yes"), ("is there a bleed?", "no"),
        ("is there an effusion?", "no"), ("is there an effusion?", "no"), ("is there an aneurysm?", "no"),
        ("what organ is this?", "brain"), ("how many cells?", "two")]]
    asked = ["is there a bleed?", "is there a tumour?", "is there an air bubble?", "what is it?",
             "why?", "Is There A Bleed?"]
    answers = question_only_answers(train, [{"question": question} for question in asked])
    #        same      "is there a"  "is there an"  "what"   any: no 4 of 8   case aside
    assert answers == ["yes", "yes", "no", "brain", "no", "yes"]


def test_shuffled_images_leave_none_in_place():
    class Shard:
        image_index = np.zeros(50)
    for seed in range(20):
        other = shuffled_images(Shard, seed)
        assert sorted(other) == list(range(50)) and not (other == np.arange(50)).any()
    assert (shuffled_images(Shard, 1) == shuffled_images(Shard, 1)).all()
