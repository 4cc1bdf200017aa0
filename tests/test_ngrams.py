"""
Report metrics: golden numbers of the public implementations, and each metric once more, in another way, on random
pairs.

The golden numbers are of pycocoevalcap 1.2 (Bleu, Rouge, Cider on the words joined by spaces; on the real reports
behind its PTBTokenizer), of rouge 1.0.1 (get_scores, "rouge-l", "f") and of nltk 3.10.4 (meteor_score with a stemmer
that leaves words as they are and a wordnet without synonyms), each run once on the pairs below.
"""

import itertools
import json
import math
import random

import numpy as np
import pytest

from tasks.ngrams import (bleu, cider_d, common_words, count_matches, lcs_f1, longest_common, meteor, rouge_l_coco,
                          rouge_l_sets, words_of)
from test_box_data import real

PAIRS = [  # a text, and what counts as right
    ("the lungs are clear .", ["the lungs are clear . no effusion ."]),
    ("heart size is normal . no pneumothorax or effusion . the lungs are clear .",
     ["no effusion or pneumothorax . the heart is normal in size .",
      "the heart size is normal . the lungs are clear ."]),
    ("stable cardiomegaly with mild edema and small left effusion",
     ["mild edema and stable cardiomegaly . small left pleural effusion is stable"]),
    ("the the the the lungs", ["the lungs of the patient", "lungs"]),
    ("no acute disease", ["no acute cardiopulmonary abnormality"]),
    ("fracture of the left rib", ["normal chest"])]
TEXTS = [text.split() for text, _ in PAIRS]
REFERENCES = [[reference.split() for reference in some] for _, some in PAIRS]


def draw_words(generator, low, high):
    return [generator.choice("abcdefg") for _ in range(generator.randint(low, high))]


def draw_pairs(count, seed=0):
    """[(words, one to three references)]"""
    generator = random.Random(seed)
    return [(draw_words(generator, 0, 12), [draw_words(generator, 1, 12) for _ in range(generator.randint(1, 3))])
            for _ in range(count)]


# ----------------------------------------------------------------------------- words

@pytest.mark.parametrize("text, words", [
    ("Lungs: clear; X-ray 1. The patient's 3.2 cm, (right).",
     "lungs clear x-ray 1 the patient 's 3.2 cm ( right )"),
    ("and/or  T11-T12 \"normal\" `a' - -- ... XXXX ___?!", "and/or t11-t12 normal a xxxx ___"),
    ("", ""), (" .\n,", ""), ("90% <b> ö ß", "90 % < b > ö ß")])
def test_words(text, words):
    assert words_of(text) == words.split()


# ----------------------------------------------------------------------------- golden numbers

def test_bleu_is_pycocoevalcaps():
    counts = np.array([count_matches(*pair) for pair in zip(TEXTS, REFERENCES)])
    assert bleu(counts.sum(0)) == pytest.approx([0.7439784279, 0.6192065607, 0.5158626222, 0.4446693129], abs=1e-9)
    assert bleu(counts)[:, 0] == pytest.approx(
        [0.5488116359, 0.9333333333, 0.6369167204, 0.5999999998, 0.4776875401, 0], abs=1e-9)
    assert bleu(counts)[:, 3] == pytest.approx(
        [0.5488116358, 0.6057224553, 4.08674e-05, 1.26e-08, 3.0616e-06, 0], abs=1e-9)


def test_rouge_l_is_that_of_each_scale():
    assert [rouge_l_coco(*pair) for pair in zip(TEXTS, REFERENCES)] == pytest.approx(
        [0.7384987893, 0.7911802853, 0.5570776256, 0.6192893401, 0.5570776256, 0], abs=1e-9)
    assert [max(rouge_l_sets(text, each) for each in some) for text, some in PAIRS] == pytest.approx(
        [0.7999999952, 0.7999999952, 0.6315789424, 0.6666666622, 0.5714285665, 0], abs=1e-9)
    assert lcs_f1("police kill the gunman".split(), "police killed the gunman".split()) == 0.75  # Lin's example


def test_meteor_is_nltks():
    assert [meteor(*pair) for pair in zip(TEXTS, REFERENCES)] == pytest.approx(
        [0.6285714286, 0.8736842105, 0.6002938034, 0.3571428571, 0.4807692308, 0], abs=1e-9)


def test_cider_d_is_pycocoevalcaps():
    scores = cider_d({"model": TEXTS, "other": TEXTS[::-1]}, REFERENCES)
    assert scores["model"] == pytest.approx(
        [5.3930435063, 3.5713396562, 3.0477137239, 0.6313357817, 2.0958743099, 0], abs=1e-9)
    assert scores["other"].shape == (6,) and scores["other"].max() < 1


def test_real_reports_score_as_with_the_public_tokenizer():
    """MedEvalKit's 296 findings, each against the next one's; 293 of them have exactly the same words."""
    path = real("iu_xray/medevalkit") / "datas/IU_XRAY/test.json"
    texts = [study["findings"] for study in json.loads(path.read_text())]
    words = list(map(words_of, texts))
    predicted, turned = words[1:] + words[:1], texts[1:] + texts[:1]
    counts = np.array([count_matches(one, [other]) for one, other in zip(predicted, words)])
    assert 100 * bleu(counts.sum(0)) == pytest.approx([32.538, 18.335, 10.9827, 6.6635], abs=0.05)
    assert 100 * bleu(counts)[:, 3].mean() == pytest.approx(2.9235, abs=0.05)
    assert 100 * np.mean([rouge_l_coco(one, [other]) for one, other in zip(predicted, words)]) == pytest.approx(
        23.3207, abs=0.05)
    assert 100 * cider_d({"": predicted}, [[each] for each in words])[""].mean() == pytest.approx(15.6666, abs=0.05)
    assert 100 * np.mean([meteor(one, [other]) for one, other in zip(predicted, words)]) == pytest.approx(
        25.1163, abs=0.05)
    assert 100 * np.mean(list(map(rouge_l_sets, turned, texts))) == pytest.approx(30.36811822, abs=1e-6)


# ----------------------------------------------------------------------------- once more, in another way

def table_of(first, second):
    """The table of longest common subsequences, cell by cell."""
    table = np.zeros((len(first) + 1, len(second) + 1), int)
    for row, column in itertools.product(range(len(first)), range(len(second))):
        table[row + 1, column + 1] = table[row, column] + 1 if first[row] == second[column] else max(
            table[row, column + 1], table[row + 1, column])
    return table


def places(words, ngram):
    return sum(tuple(words[begin:begin + len(ngram)]) == ngram for begin in range(len(words) - len(ngram) + 1))


def all_ngrams(words, length):
    return [tuple(words[begin:begin + length]) for begin in range(len(words) - length + 1)]


def slow_bleu(pairs):
    """BLEU-1 to 4 of a corpus as the paper has it, 0 where an order has no match; by logarithms."""
    predicted_length = reference_length = 0
    matched, total = np.zeros(4), np.zeros(4)
    for predicted, references in pairs:
        predicted_length += len(predicted)
        reference_length += sorted(map(len, references), key=lambda size: (abs(size - len(predicted)), size))[0]
        for length in (1, 2, 3, 4):
            some = all_ngrams(predicted, length)
            total[length - 1] += len(some)
            matched[length - 1] += sum(min(some.count(ngram), max(places(each, ngram) for each in references))
                                       for ngram in set(some))
    if not predicted_length:
        return np.zeros(4)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.cumsum(np.log(matched / total)) / np.arange(1, 5)
    return np.nan_to_num(np.exp(logs + min(0, 1 - reference_length / predicted_length)))


def test_bleu_again():
    pairs = draw_pairs(200)
    counts = np.array([count_matches(*pair) for pair in pairs])
    assert bleu(counts.sum(0)) == pytest.approx(slow_bleu(pairs), abs=1e-9)
    slow = np.array([slow_bleu([pair]) for pair in pairs])
    assert bleu(counts) == pytest.approx(slow, abs=0.04)  # the tiny constants where an order has no match or n-gram
    assert (np.abs(bleu(counts) - slow)[slow > 0] < 1e-6).all() and (slow > 0).mean() > 0.3


def test_longest_common_again():
    for predicted, references in draw_pairs(300):
        for wanted in references:
            table = table_of(wanted, predicted)
            assert longest_common(wanted, predicted) == longest_common(predicted, wanted) == table[-1, -1]
            assert lcs_f1(predicted, wanted) == 2 * table[-1, -1] / (len(wanted) + len(predicted))
    assert lcs_f1([], []) == lcs_f1([], ["a"]) == lcs_f1(["a"], []) == 0


def test_rouge_l_coco_again():
    for predicted, references in draw_pairs(300):
        found = [table_of(reference, predicted)[-1, -1] for reference in references]
        precision = max(found) / len(predicted) if predicted else 0
        recall = max(count / len(reference) for count, reference in zip(found, references))
        score = 2.44 / (1.44 / recall + 1 / precision) if precision else 0
        assert rouge_l_coco(predicted, references) == pytest.approx(score)


def trace(first, second):
    """The words of the common subsequence that leaves the table by the left where up is not the longer."""
    table = table_of(first, second)
    if not first or not second:
        return []
    if first[-1] == second[-1]:
        return trace(first[:-1], second[:-1]) + [first[-1]]
    if table[-2, -1] > table[-1, -2]:
        return trace(first[:-1], second)
    return trace(first, second[:-1])


def test_rouge_l_of_sets_again():
    generator = random.Random(1)
    texts = ["".join(generator.choice(["a", "B", "c", "d", "e", " ", " ", ". ", "."]) for _ in range(30))
             for _ in range(200)]
    for prediction, reference in zip(texts, texts[1:]):
        shared, (predicted, wanted) = set(), [
            [" ".join(part.split()).split(" ") for part in text.lower().split(".") if part != ""]
            for text in (prediction, reference)]
        for one, other in itertools.product(wanted, predicted):
            assert common_words(one, other) == set(trace(one, other))
            shared.update(trace(one, other))
        sizes = [len({word for sentence in some for word in sentence}) for some in (predicted, wanted)]
        assert rouge_l_sets(prediction, reference) == pytest.approx(2 * len(shared) / sum(sizes), abs=1e-7)
    assert rouge_l_sets("", "a") == rouge_l_sets("...", "a") == rouge_l_sets("a", "") == 0


def slow_meteor(predicted, wanted):
    """By the numbers of words from the end: the k-th last "a" goes with the k-th last "a"."""
    def ordinal(words, place):
        return words[place], words[place:].count(words[place])

    place_of = {ordinal(wanted, place): place for place in range(len(wanted))}
    pairs = [(place, place_of[ordinal(predicted, place)]) for place in range(len(predicted))
             if ordinal(predicted, place) in place_of]
    if not pairs:
        return 0
    starts = [pair for pair in pairs if (pair[0] - 1, pair[1] - 1) not in pairs]
    precision, recall = len(pairs) / len(predicted), len(pairs) / len(wanted)
    return 10 * precision * recall / (recall + 9 * precision) * (1 - (len(starts) / len(pairs)) ** 3 / 2)


def test_meteor_again():
    for predicted, references in draw_pairs(300):
        assert meteor(predicted, references) == pytest.approx(
            max(slow_meteor(predicted, reference) for reference in references))


def slow_cider_d(pairs):
    """By vectors over all n-grams that occur."""
    scores = []
    for predicted, references in pairs:
        total = 0
        for reference, length in itertools.product(references, (1, 2, 3, 4)):
            ngrams = sorted({*all_ngrams(predicted, length), *all_ngrams(reference, length)})
            documents = [sum(any(places(each, ngram) for each in some) for _, some in pairs) for ngram in ngrams]
            rarity = np.array([math.log(len(pairs) / max(count, 1)) for count in documents])
            one, other = ([places(words, ngram) for ngram in ngrams] * rarity for words in (predicted, reference))
            product = np.linalg.norm(one) * np.linalg.norm(other)
            further = max(len(predicted) - 1, 0) - max(len(reference) - 1, 0)
            total += np.minimum(one, other) @ other / product * math.exp(-further ** 2 / 72) if product else 0
        scores.append(10 * total / 4 / len(references))
    return scores


def test_cider_d_again():
    pairs = draw_pairs(40)
    fast = cider_d({"": [predicted for predicted, _ in pairs]}, [references for _, references in pairs])[""]
    assert fast == pytest.approx(slow_cider_d(pairs)) and fast.max() > 1
    assert cider_d({"": [["a"]]}, [[["a"]]])[""] == 0  # one report: no word is rarer than another


# ----------------------------------------------------------------------------- what they are made of

def test_a_corpus_is_scored_by_sums():
    """A corpus that holds a text twice has the sums of a corpus that counts it twice."""
    counts = np.array([count_matches(*pair) for pair in draw_pairs(20)])
    drawn = np.random.default_rng(0).integers(20, size=20)
    assert bleu(counts[drawn].sum(0)) == pytest.approx(bleu(np.bincount(drawn, minlength=20) @ counts))
    assert bleu(np.stack([counts.sum(0), counts[0]])).shape == (2, 4)


def test_long_texts_take_no_time():
    words = [f"word{number % 97}" for number in range(8000)]
    assert longest_common(words, words[:500]) == 500
    assert rouge_l_sets(" ".join(words), "word3 word5. word96") == pytest.approx(6 / 100)
    assert 0 < meteor(words, [words[:500]]) < 1 and bleu(count_matches(words, [words]))[-1] == pytest.approx(1)
