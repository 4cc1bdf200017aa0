"""
Is a question like one that a run was trained on? A model answers any question, and says nothing of those that are new
to it in kind: whoever asks should read that beside the answer.

Two questions are alike by the Jaccard index of their character trigrams (Broder 1997), which needs no words of any
language: 1 where they are the same, 0 where they have no three signs in a row in common. LIKE is chosen by what
docs/harness.md measures: one in twenty, at most, of a dataset's own test questions is below, and nine in ten of an
exam's.
"""

import re
from collections import defaultdict

import numpy as np

from tasks.seen import training_answers
from tasks.vqa import plain

LIKE = 0.25  # likeness to the nearest question of training, below which a question is unlike any
LONGEST = 100  # characters of that question that a remark shows


def trigrams(text):
    """The set of a text's runs of three characters, its words alone, a space around each; case aside."""
    text = " ".join(["", *re.findall(r"\w+", text.lower()), ""])
    return {text[begin:begin + 3] for begin in range(max(1, len(text) - 2))}


class Familiar:
    """The questions that a run was trained on, each once, found by their trigrams."""

    def __init__(self, splits):
        """splits: what tasks.seen.open_trained gives, or as a str why that is not known."""
        self.unknown = splits if isinstance(splits, str) else ""
        self.learn(() if self.unknown else [question for question, _ in training_answers(splits, "")])

    def learn(self, questions):
        """Take these for the questions of training."""
        self.questions, numbers, sizes = list(dict.fromkeys(map(plain, questions))), defaultdict(list), []
        for number, question in enumerate(self.questions):
            some = trigrams(question)
            sizes.append(len(some))
            for trigram in some:
                numbers[trigram].append(number)
        self.numbers = {trigram: np.array(some) for trigram, some in numbers.items()}
        self.sizes = np.array(sizes, np.int64)

    def nearest(self, question):
        """(likeness in 0..1, the question of training that is most like this one); (0.0, "") without any."""
        own = trigrams(question)
        shared = np.zeros(len(self.questions), np.int64)
        for trigram in own & self.numbers.keys():
            shared[self.numbers[trigram]] += 1
        if not shared.any():
            return 0.0, ""
        likeness = shared / (len(own) + self.sizes - shared)
        return float(likeness.max()), self.questions[int(likeness.argmax())]

    def remark(self, question):
        """What to say beside an answer to this question; "" where it is like one that was trained on."""
        if self.unknown:
            return f"whether it was trained on such questions is not known: {self.unknown}"
        likeness, nearest = self.nearest(question)
        if likeness >= LIKE:
            return ""
        shown = nearest if len(nearest) <= LONGEST else f"{nearest[:LONGEST - 3]}..."
        return "unlike any question that it was trained on" + f'; the nearest is "{shown}"' * bool(nearest)
