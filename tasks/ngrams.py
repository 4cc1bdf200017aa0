"""
Scores of a text by its words: BLEU-1 to 4, ROUGE-L, METEOR with exact matches alone, CIDEr-D.

Each equals a public implementation, to rounding, on the words that it is given. BLEU and CIDEr-D are those of
pycocoevalcap 1.2, which R2Gen and its successors use; ROUGE-L is there three times, for its published figures are
on three scales (plain, pycocoevalcap's, that of the package `rouge` 1.0.1, which MedEvalKit uses); METEOR is that of
nltk, MedEvalKit's, without stems and synonyms. The METEOR 1.5 of pycocoevalcap is another scale: with exact matches
alone it gives 14.1 to the pairs of findings in tests/test_ngrams.py that have 25.1 here.
"""

import math
import re
from collections import Counter, defaultdict

import numpy as np

LONGEST = 4  # words of an n-gram
TINY, SMALL = 1e-15, 1e-9  # that pycocoevalcap adds over and below the line of BLEU
BETA = 1.2  # weight of recall in pycocoevalcap's ROUGE-L
SIGMA = 6.0  # of CIDEr-D's penalty, in words
WORD = re.compile(r"'\w+|\w+(?:[-/.]\w+)*|[^\s\w.,:;?!'\"`-]")


# ----------------------------------------------------------------------------- words

def words_of(text):
    """
    The words of a text in lower case, close to what pycocoevalcap's PTBTokenizer leaves: letters and digits with the
    hyphens, slashes and points within them, a clitic by itself, a bracket or other sign by itself; no punctuation.

    >>> words_of("No X-ray of the patient's 2.5 cm nodule (right).")
    ['no', 'x-ray', 'of', 'the', 'patient', "'s", '2.5', 'cm', 'nodule', '(', 'right', ')']
    """
    return WORD.findall(text.lower())


def count_ngrams(words):
    """How often each n-gram of 1 to 4 words occurs, a Counter of tuples."""
    return Counter(tuple(words[begin:begin + length]) for length in range(1, LONGEST + 1)
                   for begin in range(len(words) - length + 1))


# ----------------------------------------------------------------------------- BLEU

def count_matches(predicted, references):
    """
    What BLEU is made of, 9 whole numbers: the prediction's n-grams of 1 to 4 words that the references have, each at
    most as often as in the reference that has it most often; all its n-grams of 1 to 4 words; the words of the
    reference whose length is the closest, of two as close the shorter. predicted: list of words; references: lists.
    """
    most = Counter()
    for reference in references:
        most |= count_ngrams(reference)
    matches = [0] * LONGEST
    for ngram, count in (count_ngrams(predicted) & most).items():
        matches[len(ngram) - 1] += count
    _, closest = min((abs(len(reference) - len(predicted)), len(reference)) for reference in references)
    return [*matches, *(max(len(predicted) - shorter, 0) for shorter in range(LONGEST)), closest]


def bleu(counts):
    """
    BLEU-1 to 4 in 0..1, (..., 4), of count_matches' numbers, (..., 9) (Papineni et al. 2002): of a corpus from the
    sum of its texts' numbers, of a sentence from its own. Not smoothed but for pycocoevalcap's tiny constants.
    """
    counts = np.asarray(counts, np.float64)
    matches, ngrams, wanted = counts[..., :LONGEST], counts[..., LONGEST:-1], counts[..., -1:]
    precision = np.cumprod((matches + TINY) / (ngrams + SMALL), axis=-1) ** (1 / np.arange(1, LONGEST + 1))
    return precision * np.exp(np.minimum(1 - (wanted + SMALL) / (ngrams[..., :1] + TINY), 0))


# ----------------------------------------------------------------------------- ROUGE-L

def keep_rows(first, second):
    """
    Of the table of longest common subsequences of two lists, a row for each start of the first, len(first) + 1, as
    the bits of a whole number: bit j is 0 where the start of j + 1 of the second has one more in common than that
    of j (Hyyro 2004).
    """
    places = defaultdict(int)
    for number, word in enumerate(second):
        places[word] |= 1 << number
    every = (1 << len(second)) - 1
    rows = [every]
    for word in first:
        here = rows[-1] & places[word]
        rows.append((rows[-1] + here | rows[-1] - here) & every)
    return rows


def longest_common(first, second):
    """The length of a longest common subsequence of two lists."""
    return len(second) - keep_rows(first, second)[-1].bit_count()


def lcs_f1(predicted, wanted):
    """ROUGE-L in 0..1 of two lists of words, F1 over their longest common subsequence (Lin 2004); 0 of two empty."""
    return 2 * longest_common(wanted, predicted) / max(len(predicted) + len(wanted), 1)


def rouge_l_coco(predicted, references):
    """
    pycocoevalcap's ROUGE-L in 0..1: recall weighs BETA squared as much as precision, and each is the best over the
    references, be it of different ones. predicted: list of words; references: lists.
    """
    common = [longest_common(reference, predicted) for reference in references]
    precision = max(common) / max(len(predicted), 1)
    recall = max(count / max(len(reference), 1) for count, reference in zip(common, references))
    return (1 + BETA ** 2) * precision * recall / (recall + BETA ** 2 * precision) if max(common) else 0.0


def common_words(first, second):
    """The words of one longest common subsequence of two lists, a set: of several the one that `rouge` traces."""
    rows, found = keep_rows(first, second), set()
    row, column = len(first), len(second)

    def length(row, column):  # of the common subsequence of the first `row` and `column` words
        return column - (rows[row] & (1 << column) - 1).bit_count()

    while row and column:
        if first[row - 1] == second[column - 1]:
            found.add(first[row - 1])
            row, column = row - 1, column - 1
        elif length(row - 1, column) > length(row, column - 1):
            row -= 1
        else:
            column -= 1
    return found


def rouge_l_sets(prediction, reference):
    """
    The f of "rouge-l" in the package `rouge` 1.0.1, in 0..1, of two texts in lower case: F1 of two sets of words.

    A text is cut at each "." and into words at spaces, other punctuation stays at its word. The words in common are
    those of a longest common subsequence of any sentence of one with any sentence of the other, each counted once
    in the whole text: a report that says a thing twice, or in another order, scores as high.
    """
    predicted, wanted = ([" ".join(part.split()).split(" ") for part in text.lower().split(".") if part]
                         for text in (prediction, reference))
    all_predicted, all_wanted = (set().union(*sentences) for sentences in (predicted, wanted))
    shared = set()
    for sentence in wanted:
        for other in predicted:
            if not set(sentence).intersection(other) <= shared:  # else it adds none
                shared |= common_words(sentence, other)
    if not shared:
        return 0.0
    precision, recall = len(shared) / len(all_predicted), len(shared) / len(all_wanted)
    return 2 * precision * recall / (precision + recall + 1e-8)


# ----------------------------------------------------------------------------- METEOR

def meteor(predicted, references):
    """
    nltk's METEOR in 0..1 with exact matches alone, the best over the references (Banerjee and Lavie 2005): recall
    weighs 9 times as much as precision, and the cube of chunks by matches takes up to half.

    From the last word on, each is matched with the last like one that is free in the reference.
    """
    return max(meteor_of_one(predicted, reference) for reference in references)


def meteor_of_one(predicted, wanted):
    places = defaultdict(list)
    for place, word in enumerate(wanted):
        places[word].append(place)
    pairs = [(place, places[predicted[place]].pop()) for place in reversed(range(len(predicted)))
             if places[predicted[place]]]
    if not pairs:
        return 0.0
    chunks = 1 + sum((later[0] - place, later[1] - other) != (1, 1)
                     for later, (place, other) in zip(pairs, pairs[1:]))
    precision, recall = len(pairs) / len(predicted), len(pairs) / len(wanted)
    return precision * recall / (0.9 * precision + 0.1 * recall) * (1 - 0.5 * (chunks / len(pairs)) ** 3)


# ----------------------------------------------------------------------------- CIDEr-D

def cider_d(rows, references):
    """
    CIDEr-D in 0..10 of each text, {row: (n,)} (Vedantam et al. 2015, with the clipping and the penalty of its server).

    rows: {row: n lists of words}; references: n lists of lists of words. How rare an n-gram is says the number of
    texts whose references have it, of these n: a resample of them, or a part, keeps the weights of all.
    """
    counted = [[count_ngrams(reference) for reference in some] for some in references]
    documents = Counter(ngram for some in counted for ngram in set().union(*some))
    rarest = math.log(max(len(references), 1))
    rarity = {ngram: rarest - math.log(count) for ngram, count in documents.items()}

    def weigh(counts):
        """The weighted n-grams of a text, the length of its vector for each order, and its number of words."""
        vector, squares, words = {}, [0.0] * LONGEST, 0
        for ngram, count in counts.items():
            weight = vector[ngram] = count * rarity.get(ngram, rarest)
            squares[len(ngram) - 1] += weight * weight
            words += count * (len(ngram) == 1)
        return vector, list(map(math.sqrt, squares)), words

    weighed = [list(map(weigh, some)) for some in counted]
    return {row: np.array([10 * sum(similarity(one, other) for other in some) / len(some) for one, some in
                           zip((weigh(count_ngrams(words)) for words in texts), weighed, strict=True)])
            for row, texts in rows.items()}


def similarity(predicted, wanted):
    """The mean over 1 to 4 words of the clipped cosine of two of weigh's vectors, less the longer they differ."""
    vector, lengths, words = predicted
    other, other_lengths, other_words = wanted
    products = [0.0] * LONGEST
    for ngram in vector.keys() & other.keys():
        products[len(ngram) - 1] += min(vector[ngram], other[ngram]) * other[ngram]
    cosines = sum(product / (one * two) if one and two else 0.0
                  for product, one, two in zip(products, lengths, other_lengths))
    return cosines / LONGEST * math.exp(-(words - other_words) ** 2 / (2 * SIGMA ** 2))
