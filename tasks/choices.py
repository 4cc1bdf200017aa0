"""
Multiple choice: how options are written behind their question, how an answer is read, what blind guesses get.

A question ends with its options, "A. aspirin B. heparin", and the right answer is "B. heparin"; where the options
are words that the question does not list, such as yes, no and maybe, it is that word.
"""

from plumbing.own import clean

LETTERS = "ABCDEFGHIJ"


# ----------------------------------------------------------------------------- text

def letter_options(options):
    """["A. first", "B. second", ...] of the texts of options."""
    return [f"{letter}. {option}" for letter, option in zip(LETTERS, options)]


def stem_of(record):
    """The question of a line of records.jsonl without its options, and whether they are lettered in it."""
    stem = record["question"].removesuffix(clean(" ".join(letter_options(record["choices"]))))
    return stem.rstrip(), stem != record["question"]
