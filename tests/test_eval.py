"""Metrics and baselines on cases small enough to check by eye; intervals on many simulated ones."""

import json
import math
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data import Record, Tokenizer, View
from generate import ask
from plumbing.files import hash_json, read_manifest
from plumbing.flags import UserError
from plumbing.leaks import read_leaks
from plumbing.shards import PROMPT_VERSION, SHARD_VERSION, Shard
from prepare.datasets import Dataset
from prepare.leaks import guard
from prepare.questions import train_sample_tokenizer
from prepare.shards import write_dataset
from tasks.seen import find_seen, open_trained, training_answers
from tasks.splits import open_splits
from tasks.stats import bootstrap, draw_units, intervals
from tasks.vqa import (METRICS, add_difference, as_asked, bleu1, exact_match, exchange_images, open_recall,
                       guess_blindly, repeats, report, score, summarise, token_f1, turns_of)
from test_leaks import drawing, encoded

PAIRS = [  # prediction, reference, BLEU-1 worked out by hand
    ("yes", "yes", 1), ("no", "yes", 0), ("no", "no", 1),
    ("lung", "left lung", np.exp(1 - 2 / 1)), ("left lung", "lung", 1 / 2),
    ("the left lung", "left lung", 2 / 3), ("x ray", "xr - plain film", 0),
    ("hepatocellular carcinoma", "hepatocellular carcinoma", 1),
    ("adenocarcinoma", "squamous cell carcinoma", 0), ("t2", "t2", 1)]


@pytest.mark.parametrize("prediction, reference, expected", PAIRS)
def test_bleu1_by_hand(prediction, reference, expected):
    assert bleu1(prediction, reference) == pytest.approx(expected, abs=1e-12)


def test_a_question_about_nothing_that_can_be_seen_gets_the_reason(tmp_path):
    Image.new("L", (20, 20), 7).save(tmp_path / "even.png")
    with pytest.raises(UserError, match="even.png: not an image that can be read .even: all pixels alike"):
        ask(None, None, "what is it?", str(tmp_path / "even.png"), size=16)


def test_bleu1_edges():
    assert bleu1("", "yes") == 0
    assert bleu1("YES", "yes") == 1
    assert bleu1("lung lung lung", "lung lung") == pytest.approx(2 / 3)  # clipped to two matches
    assert bleu1("no no", "no") == pytest.approx(1 / 2)
    assert exact_match(" Left  Lung", "left lung") == 1 and exact_match("lung", "left lung") == 0


def test_metrics_of_the_ten_pairs():
    scored = [score({"answer": reference}, prediction) for prediction, reference, _ in PAIRS]
    assert all(tuple(one) == METRICS for one in scored)
    scores = np.array([list(one.values()) for one in scored])
    closed = [True] * 3 + [False] * 7
    assert (np.isnan(scores[:, 3]) != closed).all() and (np.isnan(scores[:, 4]) == closed).all()
    assert np.nanmean(scores, axis=0) == pytest.approx(
        [55.35, 40.0, 61.33, 100 * 2 / 3, 100 * (1 / 2 + 1 + 1 + 0 + 1 + 0 + 1) / 7], abs=0.005)


def test_token_f1_and_recall_by_hand():
    assert open_recall("the left lung", "left lung") == 1 and open_recall("lung", "left lung") == 0.5
    assert open_recall("cell cell cell", "cell cell wall") == pytest.approx(2 / 3)
    assert token_f1("the left lung", "left lung") == pytest.approx(2 * 2 / (3 + 2))
    assert token_f1("heart", "lung") == token_f1("", "lung") == open_recall("", "lung") == 0


def test_the_best_reference_counts():
    record = {"answer": "ct w/contrast (iv)#mri",
              "references": ["ct w/contrast iv", "ct w/contrast", "mri"]}
    assert [score(record, "CT w/contrast")[metric] for metric in METRICS[:3]] == [100, 100, 100]
    assert score(record, "mri")["exact match"] == 100
    assert score(record, "ct w/contrast (iv)#mri")["exact match"] == 0
    half_closed = {"answer": "yes#left", "references": ["yes", "left"]}
    half = score(half_closed, "yes")
    assert math.isnan(half["closed accuracy"]) and half["open recall"] == 100


@pytest.mark.parametrize("answer, prediction, closed", [
    ("ja", "Ja.", 100), ("Ja.", "ja", 100), ("nein", "ja", 0), ("oui", "Oui", 100), ("Sí", "si\u0301.", 100),
    ("não", "NÃO", 100), ("да", "Да.", 100), ("是", "是。", 100), ("是", "否", 0), ("Sì", "sì", 100), ("ja", "yes", 0),
    ("yes", "ja", 0), ("ja", "ja, links", 0), ("Yes", "yes", 100), ("no", "No", 100),
    ("yes", "Yes.", 0), ("no", "no.", 0),  # as ever: English's are compared as published figures are
    ("links", "links.", None), ("ja, links", "ja", None), ("nonsense", "non", None), ("", "", None)])
def test_yes_and_no_of_several_languages(answer, prediction, closed):
    scores = score({"answer": answer}, prediction)
    assert math.isnan(scores["closed accuracy"]) if closed is None else scores["closed accuracy"] == closed
    assert math.isnan(scores["open recall"]) == (closed is not None)
    assert scores["exact match"] == 100 * (answer.lower().split() == prediction.lower().split())  # as it was


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


def test_blind_guesses_fall_back_word_by_word():
    train = [
        ("is there a bleed?", "Yes"), ("is there a bleed?", "yes"), ("is there a bleed?", "no"),
        ("is there an effusion?", "no"), ("is there an effusion?", "no"), ("is there an aneurysm?", "no"),
        ("what organ is this?", "brain"), ("how many cells?", "two")]
    asked = ["is there a bleed?", "is there a tumour?", "is there an air bubble?", "what is it?",
             "why?", "Is There A Bleed?"]
    answers = guess_blindly(train, asked)
    #        same      "is there a"  "is there an"  "what"   any: no 4 of 8   case aside
    assert answers == ["yes", "yes", "no", "brain", "no", "yes"]
    assert guess_blindly([], asked) == [""] * 6


def test_exchanged_images_leave_none_in_place():
    asked = np.random.default_rng(0).choice(60, 40, replace=False).repeat(3)
    for seed in range(20):
        shown = exchange_images(60, asked, asked, seed)
        there = np.isin(np.arange(60), asked)
        assert (shown[there] != np.arange(60)[there]).all() and (shown[~there] == np.arange(60)[~there]).all()
        assert sorted(shown) == list(range(60))  # each is shown once, so an image's questions move together
        first = current = asked[0]
        for length in range(1, 41):
            current = shown[current]
            if current == first:
                break
        assert length == 40  # one cycle
    assert (exchange_images(60, asked, asked, 1) == exchange_images(60, asked, asked, 1)).all()


def test_a_study_gets_the_views_of_another_one():
    """Images 0 and 1 are one study's, 2 and 3 another's, ...; where one has most of all, none keeps its own."""
    images = np.arange(20)
    for seed in range(20):
        shown = exchange_images(20, images, images // 2, seed)
        assert (shown // 2 != images // 2).all() and (shown % 2 == images % 2).all()
        assert (shown[::2] // 2 == shown[1::2] // 2).all()  # both from the same study
        mixed = np.array([0, 0, 0, 1, 1, 2, 3, 4])
        other = exchange_images(8, np.arange(8), mixed, seed)
        assert (mixed[other] != mixed).all() and sorted(other) == list(range(8))
        assert (exchange_images(4, np.arange(4), np.array([0, 0, 0, 1]), seed) != np.arange(4)).all()


def test_a_conversation_is_scored_by_its_last_turn():
    record = {"id": "1", "question": "where?", "answer": "left", "type": "", "image": "a.png",
              "references": ["left", "left side"], "turns": [["how large?", "2 cm"], ["since when?", "2019"]]}
    assert turns_of(record) == [("where?", "left"), ("how large?", "2 cm"), ("since when?", "2019")]
    asked = as_asked(record)
    assert asked == {"id": "1", "question": "since when?", "answer": "2019", "type": "", "image": "a.png",
                     "earlier": [("where?", "left"), ("how large?", "2 cm")]}
    assert score(asked, "2019")["exact match"] == 100 and score(asked, "left")["exact match"] == 0
    assert as_asked(asked) is asked and turns_of({"question": "a", "answer": "b"}) == [("a", "b")]


# ----------------------------------------------------------------------------- intervals

def simulate(generator, images=200):
    """
    Scores of two systems on `images` images with 1 to 12 questions, (n, 2), and the image of each.
    How hard an image is counts for all its questions. The truth is 0.5 for the first, 0.4 for the
    second; every third question is left out of both.
    """
    image_of = np.repeat(np.arange(images), generator.integers(1, 13, images))
    ease = generator.normal(0, 0.25, images)[image_of]
    scores = np.stack([0.5 + ease, 0.4 + ease], axis=1) + generator.normal(0, 0.3, (len(image_of), 2))
    scores[::3] = math.nan
    return scores, image_of


def test_intervals_hold_the_truth_in_95_of_100_trials():
    """A mean and a paired difference, 1,000 trials each. By questions they would be too narrow."""
    generator, trials = np.random.default_rng(0), 1000
    held = Counter()
    for trial in range(trials):
        scores, image_of = simulate(generator)
        columns = np.column_stack([scores[:, 0], scores[:, 0] - scores[:, 1]])
        for name, groups in (("images", image_of), ("questions", np.arange(len(image_of)))):
            if name == "questions" and trial >= 200:
                continue
            low, high = np.percentile(bootstrap(columns, groups, 300, trial), (2.5, 97.5), axis=0)
            for truth, column, at_least, at_most in zip((0.5, 0.1), ("mean", "difference"), low, high):
                held[name, column] += at_least <= truth <= at_most
    assert 930 <= held["images", "mean"] <= 970
    assert 930 <= held["images", "difference"] <= 970
    assert held["questions", "mean"] < 0.85 * 200


def test_bootstrap_is_that_of_resampling_the_questions_themselves():
    generator = np.random.default_rng(1)
    scores, image_of = simulate(generator, images=7)
    means = bootstrap(scores, image_of + 100, resamples=20, seed=3)
    again = np.random.default_rng(3)
    for row in means:
        drawn = again.integers(7, size=7)
        resampled = np.concatenate([scores[image_of == number] for number in drawn])
        assert row == pytest.approx(np.nanmean(resampled, axis=0))


def by_metric(scores):
    """{metric: (n,)} of (n, 5) scores."""
    return dict(zip(METRICS, scores.T, strict=True))


def by_question(metrics):
    """What score gives of each question, of {metric: (n,)}."""
    return [dict(zip(metrics, values)) for values in zip(*metrics.values())]


def of_types(types):
    return [{"type": kind} for kind in types]


def test_a_difference_is_narrower_than_the_scores_it_is_of(capsys):
    generator = np.random.default_rng(2)
    image_of = np.repeat(np.arange(40), 5)
    base = np.repeat(generator.uniform(0, 100, (40, 1)), 5, axis=0)
    base = np.tile(base, (1, 5))
    base[:100, 4], base[100:, 3] = math.nan, math.nan
    rows = {"model": by_metric(base + 10), "image shuffled": by_metric(base), "question only": by_metric(base * 0)}
    table, lacking = summarise(add_difference(rows), image_of, seed=0)
    assert not any(lacking.values())
    for metric in METRICS:
        mean, low, high = table["model"][metric]
        assert low < mean < high and high - low > 5
        assert table["the image adds"][metric] == pytest.approx([10, 10, 10])
        assert table["question only"][metric] == [0, 0, 0]
    seen = ["words"] * 150 + [""] * 50
    scored = {row: by_question(metrics) for row, metrics in rows.items()}
    tables = report("toy/test", scored, 40, of_types("a" * 150 + "b" * 50), seen, image_of)
    assert tables["all"]["rows"] == table and tables["all"]["closed"] == tables["all"]["open"] == 100
    assert tables["new"]["questions"] == 50 and tables["new"]["open"] == 50
    assert tables["new"]["rows"]["model"]["closed accuracy"] == [None] * 3  # none of them is closed
    assert tables["new"]["rows"] == tables["types"]["b"]["rows"]
    text = capsys.readouterr().out
    assert "50 of them new to the run" in text and "10.0 [10.0 10.0]" in text and text.count(" - ") == 4
    assert text.count("closed (100)") == 1 and text.count("closed (0)") == 1
    for seen, said in ((["image"] * 200, "every question's words or image were trained on"),
                       ("no such shard", "no such shard")):
        assert report("toy/test", scored, 40, of_types("a" * 200), seen, image_of)["new"] == said


def test_a_resample_without_a_closed_question_blanks_no_cell(capsys):
    """Of 6 images one has closed questions, so a third of the resamples hold none."""
    generator = np.random.default_rng(0)
    scores, image_of = generator.uniform(0, 100, (24, 5)), np.repeat(np.arange(6), 4)
    scores[4:, 3], scores[:4, 4] = math.nan, math.nan
    cells, lacking = intervals(scores, image_of)
    assert lacking[3] == pytest.approx((5 / 6) ** 6, abs=0.05) and not lacking[:3].any()
    assert cells[3, 0] == pytest.approx(scores[:4, 3].mean())
    assert np.isnan(cells[3, 1:]).all()  # of one image alone: nobody knows how others differ
    scores[4:8, 3] = scores[:4, 3] / 2  # two images of 6
    tables = report("toy/test", {"model": by_question(by_metric(scores))}, 6, of_types("a" * 24), "no shards", image_of)
    mean, low, high = tables["all"]["rows"]["model"]["closed accuracy"]
    means = bootstrap(scores, image_of)[:, 3]
    assert [low, high] == np.percentile(means[~np.isnan(means)], (2.5, 97.5)).tolist() and low < mean < high
    text = capsys.readouterr().out
    assert re.search(r"closed accuracy: (7|8|9|10)% of the resamples of images hold no such", text)
    assert 0.05 < tables["all"]["resamples_without"]["closed accuracy"] < 0.13


def test_one_image_alone_has_no_interval(capsys):
    scores = np.array([[50.0] * 4 + [math.nan]] * 3)
    report("toy/test", {"model": by_question(by_metric(scores))}, 1, of_types("a" * 3), "no shards",
           np.array([4, 4, 4]))
    text = capsys.readouterr().out
    assert text.count("50.0 [- -]") == 4 and text.count(" - ") + text.count(" -\n") == 1


def test_patients_are_drawn_where_they_are_known(capsys):
    images = np.array([0, 0, 1, 2, 7, 8])  # the last two: of questions about none
    assert draw_units(images, [""] * 6)[0] == "images"
    assert draw_units(images, [""] * 6)[1].tolist() == [0, 0, 1, 2, 7, 8]
    unit, units = draw_units(images, ["ann", "ann", "ann", "bob", "ann", "cyd"])
    assert unit == "patients" and len(set(units)) == 3 and units[0] == units[2] == units[4]
    unit, units = draw_units(images, ["ann", "ann", "ann", "", "", ""])
    assert unit == "patients or images" and len(set(units)) == 4 and units[0] == units[1] == units[2]
    scores = np.random.default_rng(0).uniform(0, 100, (6, 5))
    unit, units = draw_units(images, ["a", "a", "b", "b", "c", "c"])
    report("toy/test", {"model": by_question(by_metric(scores))}, 3, of_types("a" * 6), "x", units, unit)
    assert "6 questions about 3 images; percent, with 95% intervals over patients" in capsys.readouterr().out


def test_intervals_over_images_miss_the_truth_where_patients_differ():
    """Four images a patient, right or wrong together: intervals over images hold it too rarely."""
    generator, held = np.random.default_rng(0), Counter()
    for trial in range(200):
        patients = np.repeat(np.arange(60), 4)
        scores = (0.5 + generator.normal(0, 0.3, 60)[patients] + generator.normal(0, 0.1, 240))[:, None]
        for name, units in (("patients", patients), ("images", np.arange(240))):
            low, high = np.percentile(bootstrap(scores, units, 200, trial), (2.5, 97.5))
            held[name] += low <= 0.5 <= high
    assert held["patients"] > 180 and held["images"] < 160


# ----------------------------------------------------------------------------- how answers end

@pytest.mark.parametrize("answer, loops", [
    ("", False), ("yes", False), ("no no", False), ("no no no", True), ("No, no; NO.", True),
    ("left and left", False),
    ("the cell of the cell of the cell of", True), ("a b c a b c a b", False), ("a b c a b c a b c", True),
    ("so it is a b a b a b", True), ("x " * 500, True), ("1,000,000", False), ("hahahahahahahahaha", True),
    ("........", True), ("...", False), (" ".join(map(str, range(300))), False), ("肺" * 9, True)])
def test_loops_are_told(answer, loops):
    assert repeats(answer) is loops


# ----------------------------------------------------------------------------- what a run has seen

TOKENIZER = train_sample_tokenizer()


def write_questions(shards, name, splits, kind="image questions", tokenizer=TOKENIZER, task="", reasoning="none",
                    **image):
    """A dataset of {split: [(question, answer, seed of a drawing), or a Record]}."""
    records = [(split, row if isinstance(row, Record) else
                Record(f"{split}{number}", row[0], row[1], encoded(drawing(row[2])), f"{row[2]}.png"))
               for split, rows in splits.items() for number, row in enumerate(rows)]
    dataset = Dataset(name=name, read=lambda raw: iter(records), kind=kind, licence="none", access="open",
                      megabytes=0, page="", layouts=(), counts={})
    facts = {"dataset": name, "shard_version": SHARD_VERSION, "prompt_version": PROMPT_VERSION,
             "limit": 0, "licence": "none", **({"task": task} if task else {}), "reasoning": reasoning,
             "image": {"size": 32, "resize": "squash", "codec": "png", "quality": 0, **image}}
    write_dataset(shards / name, dataset, shards, {}, tokenizer, facts, 1)


def study(name, question, answer, *seeds, turns=()):
    """A Record of several drawings with their roles and a text between them."""
    views = [View(encoded(drawing(seed)), f"{seed}.png", f"view {place}") for place, seed in enumerate(seeds)]
    return Record(name, question, answer, parts=(views[0], "and then", *views[1:]), turns=turns)


def describe(shards, names, leaks="", tests=None):
    """What a run that was trained on these datasets is sealed with, as far as tasks/seen.py reads it."""
    data, told = {}, {}
    for name in names:
        train = Shard(shards / name / "train")
        file = read_manifest(train.folder, "leaks.json")
        numbers = sorted({number for reasons in file["found"].values() for some in reasons.values()
                          for number in some})
        data[name] = {"checksum": train.manifest["checksum"], "leaks": leaks or file["leaks"],
                      "leaked_sha256": hash_json(numbers)}
        told[name] = file["tests"] if tests is None else tests
    return {"flags": {"data": ",".join(names)}, "inputs": {"data": data}, "tests": told}


@pytest.fixture
def shards(tmp_path):
    """Two datasets to train on, and a test split that shares words and images with them."""
    write_questions(tmp_path, "learn", {"train": [
        ("is it large?", "yes", 1), ("What is  this?", "A lung", 2), ("where is it?", "left", 3)],
        "test": [("is it large?", "Yes", 11), ("what is this?", "a lung", 2),
                 ("what is this?", "bone", 3), ("is it large?", "no", 12), ("where is it?", "left", 13)]})
    write_questions(tmp_path, "more", {"train": [("where is it?", "left", 14)]})
    guard(tmp_path, "keep")
    return tmp_path


def seen_by(shards, data="learn", leaks="", tests=None, split="test"):
    trained = describe(shards, ("learn", "more"), leaks, tests)
    trained["flags"]["data"] = data
    return find_seen(Shard(shards / "learn" / split), open_trained(trained, shards), trained)


def test_what_was_trained_on_is_not_new(shards):
    assert seen_by(shards) == ["words", "words and image", "image", "", "words"]
    assert seen_by(shards, "learn:2, more") == ["words", "words and image", "image", "", "words"]
    assert seen_by(shards, "more") == ["", "", "", "", "words"]


def test_what_the_leak_guard_left_out_is_new(shards):
    guard(shards, "drop")
    # The samples about drawings 2 and 3 were left out, their words with them.
    assert seen_by(shards) == ["words", "", "", "", ""]
    assert seen_by(shards, leaks="keep") == ["words", "words and image", "image", "", "words"]
    # Trained before this test split was there to be compared with: nothing was left out for it.
    assert seen_by(shards, tests={})[2] == "image"


def test_what_was_left_out_is_known_by_its_hash(shards):
    """Where images are compared in another way by now, all of the training split counts as trained on."""
    guard(shards, "drop")
    test, trained = Shard(shards / "learn/test"), describe(shards, ["learn"])
    for numbers, left, seen in (([1, 2], [1, 2], ["words", "", "", "", ""]),
                                ([2], None, ["words", "words and image", "image", "", "words"])):
        trained["inputs"]["data"]["learn"]["leaked_sha256"] = hash_json(numbers)
        splits = open_trained(trained, shards)
        assert splits["learn"][1] == left
        assert find_seen(test, splits, trained) == seen
        assert len(training_answers(splits, "learn")) == (1 if left else 3)


def test_what_is_not_known_is_said(shards):
    assert "learnt/train, which the run was trained on, is not here" in seen_by(shards, "learnt")
    assert "the run was trained on this split" in seen_by(shards, split="train")
    assert "test splits alone" in seen_by(shards, "more", split="train")
    for recorded, said in (({}, "the run does not say which training split of learn"),
                           ({"learn": {"checksum": "0"}}, "the training split of learn is another one now")):
        trained = {"flags": {"data": "learn"}, "inputs": {"data": recorded}, "tests": {}}
        assert said in open_trained(trained, shards)
    guard(shards, "drop")
    trained = describe(shards, ["learn"])
    (shards / "learn/train/leaks.json").write_text("{}")
    with pytest.raises(UserError, match="not compared with the test splits; run `python prepare/all.py"):
        open_trained(trained, shards)
    trained["inputs"]["data"]["learn"]["leaks"] = "keep"
    with pytest.raises(UserError, match="not compared with .*learn/test; run `python prepare/all.py"):
        find_seen(Shard(shards / "learn/test"), open_trained(trained, shards), trained)


def test_words_are_found_by_their_hashes(tmp_path):
    """On the sample, on conversations and on studies of several images, as by comparing the words themselves."""
    def plain(text):
        return " ".join(text.lower().split())

    turns = (("how large?", "2 cm"),)
    write_questions(tmp_path, "learn", {
        "train": [study("a", "where?", "left", 1, 2, turns=turns), study("b", "where?", "left", 3, 4),
                  *[(f"is it {n}?", "Yes" if n % 2 else "no", n) for n in range(10, 20)]],
        "test": [study("c", "Where?", "LEFT", 30, 31, turns=turns), study("d", "where?", "left", 32, 2),
                 study("e", "how large?", "2 cm", 33, 34), study("f", "how  large?", "2 cm", 35, 4, turns=turns),
                 *[(f"is it {n}?", "yes" if n % 4 == 1 else "no", n + 100) for n in range(8, 20)]]})
    guard(tmp_path, "keep")
    trained = describe(tmp_path, ["learn"])
    splits, test = open_trained(trained, tmp_path), Shard(tmp_path / "learn/test")
    train = splits["learn"][0]
    known = {tuple((plain(q), plain(a)) for q, a in turns_of(record)) for record in train.read_records()}
    words = [tuple((plain(q), plain(a)) for q, a in turns_of(record)) in known for record in test.read_records()]
    seen = find_seen(test, splits, trained)
    assert ["words" in reason for reason in seen] == words and 0 < sum(words) < len(words)
    assert seen[:4] == ["words", "words and image", "", "image"]  # any of its images is enough


# ----------------------------------------------------------------------------- which splits

def test_every_split_that_asks_about_images_is_answered(shards, capsys):
    tokenizer = Tokenizer(shards / "learn" / "tokenizer.model")
    write_questions(shards, "abc", {"test": [("why?", "so", 1)]})
    write_questions(shards, "words", {"test": [("why?", "so", 1)]}, kind="text questions")
    other = TOKENIZER.replace(b"yes", b"yex")
    write_questions(shards, "other", {"test": [("why?", "so", 1)]}, tokenizer=other)

    def chosen(**flags):
        return [shard.folder.parent.name for shard in open_splits(
            **{"data": "", "split": "test", "shards_dir": str(shards), "tokenizer": tokenizer, **flags})]

    assert chosen() == ["abc", "learn"]
    assert "other/test, made with another tokenizer than the run; run `python" in capsys.readouterr().out
    assert chosen(data="words, learn,words") == ["words", "learn"]
    for data, message in [("other", r"other/test: made with another tokenizer.*--only=other --token"),
                          ("absent", r"absent/test: not prepared; run `.*--only=absent`"),
                          ("more", r"more has no such split; it has train")]:
        with pytest.raises(UserError, match=message):
            chosen(data=data)
    with pytest.raises(UserError, match="no validation split of questions about images"):
        chosen(split="validation")
    (shards / "abc/test/records.jsonl").write_text(json.dumps({"id": "1"}))
    with pytest.raises(UserError, match="records.jsonl: missing, or not its"):
        chosen()
