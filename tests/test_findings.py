"""What reports say of CheXpert's findings: rules by hand, sixty changed words, any text, and MeSH terms of IU X-Ray."""

import time

import numpy as np
import pytest

from tasks.findings import FINDINGS, FIVE, TEMPORAL, collect, compare, f1, read, sides, temporal
from tasks.rewards import REWARDS, parse, reward
from tasks.vqa import bleu1


def said(text):
    """The findings of a text, written short: "+effusion left", "-" for a negative and "?" for an uncertain one."""
    marks = {"positive": "+", "negative": "-", "uncertain": "?"}
    return {f"{marks[status]}{finding.split()[-1].lower()} {side}".strip()
            for finding, (status, side) in collect(text).items() if finding != "No Finding"}


# ----------------------------------------------------------------------------- rules

@pytest.mark.parametrize("text, expected", [
    ("Small left pleural effusion.", {"+effusion left"}),
    ("No pleural effusion, pneumothorax or focal consolidation.", {"-effusion", "-pneumothorax", "-consolidation"}),
    ("There is no effusion or pneumothorax, but mild atelectasis.", {"-effusion", "-pneumothorax", "+atelectasis"}),
    ("No pneumothorax; small effusion.", {"-pneumothorax", "+effusion"}),
    ("No pneumothorax, small effusion.", {"-pneumothorax", "+effusion"}),
    ("No pneumothorax with a small effusion.", {"-pneumothorax", "+effusion"}),
    ("No abnormality other than atelectasis.", {"+atelectasis"}),
    ("Without effusion. Pneumonia.", {"-effusion", "+pneumonia"}),
    ("Lungs are free of infiltrate; heart is enlarged.", {"-opacity", "+cardiomegaly"}),
    ("No effusion and the heart is enlarged.", {"-effusion", "+cardiomegaly"}),
    ("Negative for pneumonia.", {"-pneumonia"}), ("Absence of edema.", {"-edema"}),
    ("The effusion has resolved.", {"-effusion"}), ("Resolution of the effusion.", {"-effusion"}),
    ("Effusion or pneumothorax is not seen.", {"-effusion", "-pneumothorax"}),
    ("The effusion is larger and the pneumothorax has resolved.", {"+effusion", "-pneumothorax"}),
    ("No change in the effusion.", {"+effusion"}), ("Effusion without interval change.", {"+effusion"}),
    ("No definite pneumonia.", {"-pneumonia"}),
    ("The catheter has been removed.", {"-devices"}),
    ("No XXXX effusion. Fracture of XXXX.", {"-effusion", "+fracture"}), ("No ___ effusion.", {"-effusion"})])
def test_what_is_denied(text, expected):
    assert said(text) == expected


@pytest.mark.parametrize("text, expected", [
    ("Possible pneumonia.", {"?pneumonia"}), ("Pneumonia is possible.", {"?pneumonia"}),
    ("Pneumonia cannot be excluded.", {"?pneumonia"}), ("Cannot exclude pneumonia.", {"?pneumonia"}),
    ("Opacity may represent atelectasis or pneumonia.", {"+opacity", "?atelectasis", "?pneumonia"}),
    ("Opacity suggestive of pneumonia.", {"+opacity", "?pneumonia"}),
    ("Atelectasis versus consolidation.", {"?atelectasis", "?consolidation"}),
    ("Atelectasis and consolidation.", {"+atelectasis", "+consolidation"}),
    ("Opacity, likely atelectasis. Edema.", {"+opacity", "?atelectasis", "+edema"}),
    ("No findings to suggest pneumonia.", {"-pneumonia"}),
    ("Fractures may not be demonstrated.", {"?fracture"}),
    ("Borderline cardiomegaly.", {"?cardiomegaly"}), ("Heart size is borderline enlarged.", {"?cardiomegaly"})])
def test_what_is_doubted(text, expected):
    assert said(text) == expected


@pytest.mark.parametrize("text, expected", [
    ("Heart size is normal.", {"-cardiomegaly"}), ("Normal heart size.", {"-cardiomegaly"}),
    ("The heart is not enlarged.", {"-cardiomegaly"}), ("The heart is enlarged.", {"+cardiomegaly"}),
    ("Enlargement of the cardiac silhouette.", {"+cardiomegaly"}),
    ("Heart size upper limits of normal.", {"-cardiomegaly"}), ("The heart is seen.", set()),
    ("Lungs are clear.", {"-opacity", "-consolidation"}), ("Clear lungs.", {"-opacity", "-consolidation"}),
    ("Heart size and mediastinal contours are within normal limits.", {"-cardiomegaly", "-cardiomediastinum"}),
    ("The cardiomediastinal silhouette is unremarkable.", {"-cardiomegaly", "-cardiomediastinum"}),
    ("The mediastinum is widened, the heart is normal.", {"+cardiomediastinum", "-cardiomegaly"}),
    ("Enlarged heart and clear lungs.", {"+cardiomegaly", "-opacity", "-consolidation"}),
    ("The pleural spaces are clear.", {"-effusion", "-pneumothorax"}),
    ("Osseous structures are intact.", {"-fracture"}), ("No acute bony abnormality.", {"-fracture"}),
    ("Prominent pulmonary arteries. Heart stable.", set()), ("Pericardial effusion.", set()),
    ("Thyroid mass.", set()), ("Massive effusion.", {"+effusion"}), ("Portable film.", set())])
def test_organs_that_are_normal_or_large(text, expected):
    assert said(text) == expected


@pytest.mark.parametrize("text, expected", [
    ("Atelectasis in the left lower lobe.", {"+atelectasis left"}),
    ("Left atelectasis and right effusion.", {"+atelectasis left", "+effusion right"}),
    ("Opacity in the right base, left effusion.", {"+opacity right", "+effusion left"}),
    ("Bilateral effusions, left greater than right.", {"+effusion bilateral"}),
    ("Left effusion. Right effusion.", {"+effusion bilateral"}), ("Left and right effusion.", {"+effusion bilateral"}),
    ("Left effusion. No right effusion.", {"+effusion left"}), ("No left effusion.", {"-effusion left"}),
    ("Middle lobe consolidation.", {"+consolidation right"}), ("Lingular atelectasis.", {"+atelectasis left"}),
    ("Pneumothorax on the right has resolved.", {"-pneumothorax right"}),
    ("Right heart border. Effusion.", {"+effusion"}), ("Left ventricle enlarged, effusion.", {"+effusion"}),
    ("Bibasilar atelectasis and cardiomegaly.", {"+atelectasis bilateral", "+cardiomegaly"}),
    ("Effusion and atelectasis in the left base.", {"+effusion left", "+atelectasis left"})])
def test_sides(text, expected):
    assert said(text) == expected


def test_of_several_statuses_the_worst_counts():
    assert read("No effusion. Possible effusion.") == {"Pleural Effusion": "uncertain"}
    assert read("Effusion. No effusion. Possible effusion.") == {"Pleural Effusion": "positive"}
    assert sides("Possible left effusion. Right effusion.") == {"Pleural Effusion": "right"}


def test_no_finding_is_said_of_a_report_without_one_and_not_of_a_text_without_any():
    for text in ("Normal chest.", "No acute cardiopulmonary abnormality.", "No effusion.", "No effusion. A catheter.",
                 "Negative chest."):
        assert read(text)["No Finding"] == "positive"
    for text in ("", "The cat sat on the mat.", "A catheter.", "Possible effusion.", "No edema. Effusion.", "disease"):
        assert "No Finding" not in read(text)


def test_findings_are_in_their_order_and_named_as_chexpert_names_them():
    text = "Fracture. Normal heart. Widened mediastinum. No nodule. Edema. Pleural thickening. A pacemaker."
    assert list(read(text)) == [name for name in FINDINGS if name in read(text)] and len(read(text)) == 7
    assert len(FINDINGS) == len(set(FINDINGS)) == 14 and set(FIVE) < set(FINDINGS)


def test_a_pair_is_counted_by_hand():
    counts = compare("Left effusion. No edema. Worse.", "Right effusion. No edema. Pneumonia. Unchanged, worse.")
    assert counts == {
        "matched": 1, "predicted": 2, "true": 3, "temporal matched": 1, "temporal predicted": 1, "temporal true": 2,
        "by finding": {"Edema": ("negative", "negative"), "Pneumonia": ("", "positive"),
                       "Pleural Effusion": ("positive", "positive")}}
    assert f1(1, 2, 3) == 0.4 and f1(0, 0, 0) == 1 and f1(0, 0, 3) == 0
    assert compare("Effusion.", "Left effusion.")["matched"] == 0  # a side that is left out is a wrong one
    assert temporal("Worse; IMPROVED, not news") == {"worse", "improved"} and len(TEMPORAL) == 44


# ----------------------------------------------------------------------------- one word changed

REPORT = ("Heart size is normal . {} Osseous structures are intact . Degenerative changes of the thoracic spine are "
          "again noted in this examination .")
NEGATION = [  # (sentence, the word that changes, what it becomes)
    ("There is no pleural effusion .", "no", "a"), ("There is no pneumothorax .", "no", "a"),
    ("There is no focal consolidation .", "no", "a"), ("No pulmonary edema is seen .", "No", "Mild"),
    ("The lungs are without nodule .", "without", "with"), ("No acute fracture .", "No", "An"),
    ("Small pleural effusion is present .", "Small", "No"), ("A pneumothorax is seen .", "A", "No"),
    ("There is a new consolidation .", "a", "no"), ("Mild interstitial edema .", "Mild", "No"),
    ("The lungs are negative for pneumonia .", "negative", "positive"),
    ("Absence of atelectasis .", "Absence", "Areas"),
    ("A large mass is present .", "A", "No"), ("The effusion has resolved .", "resolved", "grown"),
    ("Opacity is not seen .", "not", "now"), ("The lungs are free of opacity .", "free", "full"),
    ("A central venous catheter is seen .", "A", "No"), ("Pleural thickening is absent .", "absent", "present"),
    ("The mediastinum is not widened .", "not", "markedly"), ("Pneumonia is excluded .", "excluded", "evident")]
LATERALITY = [(sentence, one, {"left": "right", "right": "left", "bilateral": "left"}[one.lower()])
              for sentence, one in [
    ("Small left pleural effusion .", "left"), ("Small right pleural effusion .", "right"),
    ("A pneumothorax is present on the right .", "right"), ("Consolidation in the left lower lobe .", "left"),
    ("There is left basilar atelectasis .", "left"), ("Patchy opacity at the right base .", "right"),
    ("A nodule is seen in the right upper lobe .", "right"), ("There are bilateral pleural effusions .", "bilateral"),
    ("Fracture of the left clavicle .", "left"), ("A right subclavian catheter is seen .", "right"),
    ("No left pneumothorax .", "left"), ("There is left pleural thickening .", "left"),
    ("Possible right lower lobe pneumonia .", "right"), ("Mass within the left upper lobe .", "left"),
    ("The bilateral opacities are unchanged .", "bilateral"), ("Right lung is clear .", "Right"),
    ("Atelectasis and effusion in the left base .", "left"), ("Loculated effusion along the right chest .", "right"),
    ("Left greater than right effusions and right rib fracture .", "Left"),
    ("Consolidation in the right middle and lower lobes .", "right")]]
CHANGE = [
    ("Possible right pneumonia .", "Possible", "Definite"), ("Opacity may represent pneumonia .", "may", "does"),
    ("Pneumonia is suspected .", "suspected", "present"), ("Probable atelectasis .", "Probable", "Marked"),
    ("Nodule is questioned .", "questioned", "found"), ("Definite fracture .", "Definite", "Questionable"),
    ("Clear consolidation .", "Clear", "Possible"), ("Effusion is likely .", "likely", "present"),
    ("Atelectasis and pneumonia .", "and", "versus"), ("Borderline cardiomegaly .", "Borderline", "Massive"),
    ("The effusion has improved .", "improved", "worsened"), ("The effusion is unchanged .", "unchanged", "larger"),
    ("Edema is stable .", "stable", "worse"), ("Opacity is decreased .", "decreased", "increased"),
    ("Pneumothorax is smaller .", "smaller", "larger"), ("There is a new consolidation .", "new", "small"),
    ("Persistent atelectasis .", "Persistent", "New"), ("Worsening edema .", "Worsening", "Improving"),
    ("The effusion is larger .", "larger", "resolving"), ("Increasing opacity .", "Increasing", "Decreasing")]


def score_change(sentence, old, new):
    """The findings' F1, the temporal F1 and BLEU-1 of a report in which one word was changed."""
    assert sentence.split().count(old) == 1
    changed = " ".join(new if word == old else word for word in sentence.split())
    reference, prediction = REPORT.format(sentence), REPORT.format(changed)
    counts = compare(prediction, reference)
    return (f1(counts["matched"], counts["predicted"], counts["true"]),
            f1(*(counts[f"temporal {name}"] for name in ("matched", "predicted", "true"))),
            bleu1(prediction, reference))


@pytest.mark.parametrize("pairs", [NEGATION, LATERALITY, CHANGE])
def test_one_word_moves_the_score_and_hardly_bleu(pairs):
    scores = np.array([score_change(*pair) for pair in pairs])
    print("\nmeans: findings F1 {:.3f}, temporal F1 {:.3f}, BLEU-1 {:.3f}".format(*scores.mean(0)))
    assert len(pairs) == 20 and np.all(scores[:, 2] >= 0.9)  # BLEU-1
    assert [pair for pair, (findings, words, _) in zip(pairs, scores) if min(findings, words) == 1] == []
    if pairs is not CHANGE:
        assert np.all(scores[:, 0] < 0.9)  # the findings' own score


def test_an_unchanged_report_scores_all():
    for sentence, *_ in NEGATION + LATERALITY + CHANGE:
        counts = compare(REPORT.format(sentence), REPORT.format(sentence))
        assert counts["matched"] == counts["predicted"] == counts["true"] >= 2


# ----------------------------------------------------------------------------- any text

def test_any_text_is_read_in_bounded_time():
    generator = np.random.default_rng(0)
    words = "effusion no or and left in not seen is absent may be heart normal large . , with mild pleural mass".split()
    noise = bytes(generator.integers(0, 256, 100_000, np.uint8))
    texts = [noise.decode("latin-1"), noise.decode("utf-8", "replace"), noise.decode("utf-8", "surrogateescape")]
    texts += [" ".join(generator.choice(words, 20_000)) for _ in range(3)]
    texts += [(word + " ") * 4_000 for word in words]
    texts += ["effusion" + " and" * 12_000 + " mass" + " is absent" * 5_000, "effusion " * 5_000 + "is absent " * 5_000,
              "heart " * 8_000 + "normal " * 8_000, "(" * 100_000, "\n " * 50_000, "a" * 100_000,
              "\ud800 effusion", "\0"]
    for text in texts:
        begin = time.process_time()
        compare(text, text)
        assert time.process_time() - begin < 2  # 0.3 s at most, on a core of its own


def test_a_report_takes_less_than_a_millisecond():
    report = REPORT.format(" ".join(sentence for sentence, *_ in NEGATION[:4]))
    best = min(timed(report) for _ in range(20))
    assert best < 1e-3  # 0.12 ms a report of IU X-Ray


def timed(report):
    begin = time.process_time()
    collect(report)
    return time.process_time() - begin


# ----------------------------------------------------------------------------- reward

def test_the_reward_is_the_findings_f1():
    report = {"question": "?", "type": "", "answer": "The heart is enlarged. Small left effusion. No pneumonia."}
    function = REWARDS["findings"]
    assert function(report, report["answer"], 0) == 1 and function(report, "", 0) == 0
    assert function(report, "Cardiomegaly. Left effusion. Pneumonia.", 0) == pytest.approx(4 / 6)
    assert function(report, "Cardiomegaly.", 0) == pytest.approx(2 / 4)
    everything = "Cardiomegaly, edema, mass, fracture, pneumothorax, left effusion. No pneumonia."
    assert function(report, everything, 0) == pytest.approx(6 / 10)  # one too many costs as much as one too few
    assert function(report | {"references": ["No edema.", report["answer"]]}, "No edema.", 0) == 1
    assert function(report, report["answer"] + " Pneumonia. Is there pneumonia?", 0) < 1  # both is no way to be right
    for answer in ("pleural effusion", "a long answer about the liver and the spleen of a man"):
        assert function(report | {"answer": answer}, answer, 0) is None
    assert function(report | {"boxes": {"mass": []}}, report["answer"], 0) is None
    assert reward(parse("findings,exact"), report, "Cardiomegaly.", 0) == pytest.approx(1 / 4)
