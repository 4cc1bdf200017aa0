"""
Answers with their reasoning, before or behind them: how both are written as one text, and parted again.

    before   Reasoning: heparin acts at once. Answer: B. heparin
    after    B. heparin Reasoning: heparin acts at once.

The answer alone is scored as a record's answer is. The reasoning is scored apart, by its likeness to the one that the
dataset has: it may be right where the answer is wrong, and the other way round. One in gpt-oss's channel "analysis"
(zoo/harmony.py) is no part of the text of an answer, which its tokenizer parts from it: it is not kept, and not scored.
"""

import numpy as np

from tasks.ngrams import lcs_f1, words_of
from tasks.stats import intervals
from tasks.vqa import cell_text

REASONING, ANSWER = "Reasoning:", "Answer:"


def write(answer, reasoning, place):
    """An answer and its reasoning, if it has any, as one text; place: "before", "after", or "none": without it."""
    if place == "none" or not reasoning:
        return answer
    if place == "before":
        return f"{REASONING} {reasoning} {ANSWER} {answer}"
    return f"{answer} {REASONING} {reasoning}"


def part(text, place):
    """
    (answer, reasoning) of a text; the answer is "" where it should come behind a reasoning and never does. A text that
    has neither of the words for them is an answer at once.
    """
    if place == "before" and (ANSWER in text or REASONING in text):
        reasoning, mark, answer = text.rpartition(ANSWER)
        reasoning, answer = (reasoning, answer) if mark else (text, "")
        return answer.strip(), reasoning.strip().removeprefix(REASONING).strip()
    answer, _, reasoning = text.partition(REASONING)
    return answer.strip(), reasoning.strip()


def is_written(record):
    """Whether the text that answers a record is to have a reasoning: "before" or "after" the answer."""
    return bool(record.get("reasoning")) and record["reasoning"]["place"] != "analysis"


def answer_of(record, text):
    """
    The answer in a text given to a question: all of it, but for a reasoning where the record has one, or where the
    text gives one to a multiple choice: whoever was trained to reason does so where the data has no reasoning, too.
    """
    if is_written(record):
        return part(text, record["reasoning"]["place"])[0]
    if record.get("choices") and REASONING in text:
        return part(text, "before" if text.lstrip().startswith(REASONING) else "after")[0]
    return text


def report(answers, records, scored, main, units, seed=0):
    """
    Print how the reasonings of each row's answers compare with those that the records have, and return it as a dict:
    {row: {"given": percent of answers with one, "ROUGE-L": [mean, low, high], "right with it": percent}}; {} where no
    text is to have one. scored, main: the rows' scores of their answers, and which of them says what is right.
    """
    chosen = np.array(list(map(is_written, records)))
    table = {}
    for row, texts in answers.items() if chosen.any() else ():
        alike, given, right = [], [], []
        for record, text, one in zip(records, texts, scored[row], strict=True):
            if is_written(record):
                reasoning = part(text, record["reasoning"]["place"])[1]
                alike.append(100 * lcs_f1(words_of(reasoning), words_of(record["reasoning"]["text"])))
                given.append(bool(reasoning))
                right.append(one[main])
        given, right = np.array(given), np.array(right)
        cell = intervals(np.array(alike)[:, None], units[chosen], seed)[0][0].tolist()
        table[row] = {"given": 100 * float(given.mean()), "ROUGE-L": [None if x != x else x for x in cell],
                      "right with it": float(right[given].mean()) if given.any() else None}
        print(f"reasoning, {row}: in {table[row]['given']:.1f}% of {len(given):,} answers, ROUGE-L "
              f"{cell_text(table[row]['ROUGE-L'])}" + (f", {main} with it {table[row]['right with it']:.1f}" if
                                                       given.any() else ""))
    return table
