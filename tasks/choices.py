"""
Multiple choice: how options are written and read, and what guesses without a look at the question get.

A question ends with its options, "A. aspirin B. heparin", and the right answer is "B. heparin"; where the options
are words that the question does not list, such as yes, no and maybe, the answer is one of them. An answer is read
in two ways, side by side: as the model writes it, by its letter or the option's text and nothing that is guessed;
and by how likely the model finds each option (asking.py). A model that favours a letter, or goes by the options
alone, shows in the rows where the options are turned and where the question is left out.
"""

import difflib
import math
import re
from collections import Counter

import numpy as np

from plumbing.own import clean
from tasks.vqa import plain, print_cells, print_lacking, report_new, report_types, summarise, summary

MAIN = "accuracy"
READINGS = ("letter", "whole", "by token")  # of likelihoods: of "B", of "B. heparin", and that by its tokens
METRICS = (MAIN, "MedEvalKit's", *READINGS, "unreadable")
LETTERS = "ABCDEFGHIJ"
ANSWER_MARKS = ("**answer**:", "**answer**", "*answer*:", "**answer:**", "answer is", "answer:", "\u7b54\u6848:",
                "final answer")  # behind the last of each MedEvalKit looks, in this order
ROWS_BY_TYPE = ("model", "image shuffled", "the image adds", "commonest option")
TURNS = 3  # other orders in which options are shown


# ----------------------------------------------------------------------------- text

def letter_options(options):
    """["A. first", "B. second", ...] of the texts of options."""
    return [f"{letter}. {option}" for letter, option in zip(LETTERS, options)]


def stem_of(record):
    """The question of a line of records.jsonl without its options, and whether they are lettered in it."""
    stem = record["question"].removesuffix(clean(" ".join(letter_options(record["choices"]))))
    return stem.rstrip(), stem != record["question"]


def answers_of(record):
    """The answer that each of a question's options is, as texts in their order."""
    return list(map(clean, letter_options(record["choices"]))) if stem_of(record)[1] else record["choices"]


def lists_its_answer(record):
    """Whether a question that may have no choices looks as if it had: it lists its answer with a letter."""
    return bool(re.match(r"[A-J]\. ", record["answer"])) and f" {record['answer']}" in record["question"]


def right_of(record):
    """The place of the right option; -1 where the answer is none of them."""
    answers = answers_of(record)
    return answers.index(record["answer"]) if record["answer"] in answers else -1


def bare(text):
    """A text as options are compared: case, the number of spaces and points at its end aside."""
    return plain(text).rstrip(".")


def read(record, text):
    """
    The place of the option that an answer names, or None. "B", "(b)", "B." and "B. heparin" name it by its letter, and
    the text behind that is not compared; "heparin" names it by its text, if one option alone has that, and so does
    "H. pylori" where that is an option. Nothing else is guessed.
    """
    choices, letter = record["choices"], re.match(r"\(?([A-Ja-j])(?:[.):]+(?:\s|$)|$)", text.strip())
    same = [place for place, choice in enumerate(choices) if bare(choice) == bare(text) != ""]
    if letter and stem_of(record)[1] and (place := LETTERS.index(letter[1].upper())) < len(choices):
        by_letter = letter[0] == text.strip() or bare(text) == bare(f"{letter[1]}. {choices[place]}")
        if by_letter or len(same) != 1:
            return place
    return same[0] if len(same) == 1 else None


def read_loosely(record, text):
    """
    The place of the option that MedEvalKit takes an answer for (its judge_multi_choice): the letter or option in what
    stands in <answer> or \\boxed{}, or behind "answer is" and the like, up to the first point; else, whatever the
    answer says, the option whose letters are most like it. It always takes one.
    """
    options = [option.lower() for option in answers_of(record)]
    letters = list(LETTERS.lower()[:len(options)])
    text = (" ".join(re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)).strip() or text).lower()
    first, last = text.split("\n\n")[0], text.split("\n\n")[-1].split(".")[0]
    text = first if first in letters else last if last in letters else text
    text = ([text] + re.findall(r"\\boxed\{([^{}]*)\}", text))[-1]
    for mark in ANSWER_MARKS:
        text = text.split(mark)[-1]
    text = text.strip().replace("\n", "")
    short = text.split(".")[0].split(":")[-1]
    if short in letters:
        return letters.index(short)
    if short in options:
        return options.index(short)
    alike = [difflib.SequenceMatcher(None, option, text).ratio() for option in options]
    return alike.index(max(alike))


# ----------------------------------------------------------------------------- other ways to ask

def ways_of(record, turns=TURNS):
    """
    Other ways to put a question, {name: (its line of records.jsonl, order)}: "no question" leaves question and
    context out, options and images remain; "turned k" lists the options from another one on, as a wheel is turned.
    order: which option stands where. Options that the question does not list are not turned.
    """
    (stem, lettered), choices = stem_of(record), record["choices"]
    options = clean(" ".join(letter_options(choices))) if lettered else ""
    count, own = len(choices), list(range(len(choices)))
    ways = {"no question": ({**record, "question": options, "context": ""}, own)}
    for turn in range(turns if lettered and count > 1 else 0):
        shift = 1 + turn % (count - 1)
        order = own[shift:] + own[:shift]
        turned = [choices[place] for place in order]
        question = clean(f"{stem} {' '.join(letter_options(turned))}")
        ways[f"turned {turn + 1}"] = {**record, "question": question, "choices": turned}, order
    return ways


# ----------------------------------------------------------------------------- score

def choose(likelihoods):
    """{reading: the place of its likeliest option} of an entry of "likelihoods"; of two alike the first."""
    whole = np.array(likelihoods["whole"])
    values = likelihoods["letter"], whole, whole / likelihoods["tokens"]
    return {reading: int(np.argmax(some)) for reading, some in zip(READINGS, values)}


def score(record, prediction):
    """
    One answer's METRICS in percent, as a dict, nan where nothing is known. record: a line of records.jsonl, with
    {way: likelihoods} of its options where the model gave them; likelihoods are of the options in the record's order,
    whatever order they were shown in. "ways" has the same readings of the other ways to ask; "chosen" the option of the
    likeliest letter in each, "shown" its place in the order shown, and "stands" that of the right one.
    """
    right, place = right_of(record), read(record, prediction)
    loosely = read_loosely(record, prediction)
    chosen = {way: choose(likelihoods) for way, likelihoods in record.get("likelihoods", {}).items()}
    ways = {way: {reading: 100.0 * (option == right) for reading, option in some.items()}
            for way, some in chosen.items()}
    orders = {way: some.get("order", range(len(record["choices"])))
              for way, some in record.get("likelihoods", {}).items()}
    return {MAIN: 100.0 * (place == right), "MedEvalKit's": 100.0 * (loosely == right),
            "unreadable": 100.0 * (place is None), **dict.fromkeys(READINGS, math.nan), **ways.pop("as asked", {}),
            "ways": ways, "chosen": {way: some["letter"] for way, some in chosen.items()},
            "shown": {way: orders[way].index(some["letter"]) for way, some in chosen.items()},
            "stands": {way: order.index(right) if right >= 0 else -1 for way, order in orders.items()}}


def blind_rows(train, records):
    """
    Answers without a look at the question: "commonest option", the place that is right most often in these very
    records, so that no constant answer gets more; "longest option", by its characters, of several the first.
    """
    place = Counter(map(right_of, records)).most_common(1)[0][0]
    return {"commonest option": [answers_of(record)[min(place, len(record["choices"]) - 1)] for record in records],
            "longest option": [max(answers_of(record), key=len) for record in records]}


# ----------------------------------------------------------------------------- tables

def columns_of(scored):
    """
    {row: {metric: (n,) scores}} of {row: what `score` gave}: the rows given; of the model the mean of the turned orders
    and the question left out, where their likelihoods are there; and differences, question by question.
    """
    def column(some, metric):
        return np.array([one[metric] for one in some])

    table = {row: {metric: column(some, metric) for metric in METRICS} for row, some in scored.items()}
    nothing = np.full(len(next(iter(scored.values()))), math.nan)

    def mean_of(some, ways):
        return {reading: np.array([np.mean([one["ways"][way][reading] for way in ways(one)] or math.nan)
                                   for one in some]) for reading in READINGS}

    def minus(first, second):
        return {metric: table[first][metric] - table[second][metric] for metric in METRICS}

    model = scored.get("model", ())
    if any(one["ways"] for one in model):
        turned = mean_of(model, lambda one: [way for way in one["ways"] if way.startswith("turned")])
        without = mean_of(model, lambda one: [way for way in one["ways"] if way == "no question"])
        blank = dict.fromkeys(METRICS, nothing)
        table = table | {"no question": blank | without}
        if not np.isnan(turned["letter"]).all():
            table["options turned"] = blank | turned
    if {"model", "image shuffled"} <= table.keys():
        table["the image adds"] = minus("model", "image shuffled")
    if "no question" in table:
        table["question adds"] = minus("model", "no question")
    order = ("model", "image shuffled", "no question", "options turned", "the image adds", "question adds")
    return {row: table[row] for row in dict.fromkeys([*order, *table]) if row in table}


def tabulate(columns, chosen, units, seed):
    """The table of the questions `chosen`, (n,) bool, as a dict: how many they are, and summarise's of them."""
    part = {row: {metric: values[chosen] for metric, values in metrics.items()} for row, metrics in columns.items()}
    rows, lacking = summarise(part, units[chosen], seed)
    return {"questions": int(chosen.sum()), "rows": rows, "resamples_without": lacking}


def print_table(table, unit):
    print_cells("", METRICS)
    for row, cells in table["rows"].items():
        print_cells(row, [cells[metric] for metric in METRICS])
    print_lacking(table, unit)


def report_orders(scored):
    """
    Print what the place of an option does to the model's reading by letter, and return it as a dict, in percent:
    "accuracy" where the right option stands at each letter, over all orders, and their "spread"; how often each letter
    is "chosen"; how often the "same" option is, in all orders; and accuracy "by order". None where no likelihoods in
    several orders are there.
    """
    orders = ["as asked", *(f"turned {turn + 1}" for turn in range(TURNS))]
    turned = [one for one in scored if {*orders} <= {"as asked", *one["ways"]}]
    if not turned:
        return None
    pairs = [(one["stands"][way], one["shown"][way]) for one in turned for way in orders]
    stands, shown = np.array(pairs).T  # (questions x orders,), the letter of the right option, and the one chosen
    accuracy = {LETTERS[place]: 100 * float((shown == stands)[stands == place].mean()) for place in np.unique(stands)}
    chosen = {LETTERS[place]: 100 * float((shown == place).mean()) for place in range(max(*stands, *shown) + 1)}
    same = 100 * float(np.mean([len({one["chosen"][way] for way in orders}) == 1 for one in turned]))
    by_order = dict(zip(orders, (100 * (shown == stands).reshape(-1, len(orders)).mean(axis=0)).tolist()))
    spread = max(accuracy.values()) - min(accuracy.values())
    print(f"by letter, in {len(orders)} orders of the options; where the right one is "
          f"{', '.join(f'{letter}: {share:.1f}' for letter, share in accuracy.items())}, a spread of {spread:.1f}")
    print(f"chosen: {', '.join(f'{letter} {share:.1f}%' for letter, share in chosen.items())}; the same option in all "
          f"orders: {same:.1f}%")
    return {"accuracy": accuracy, "spread": spread, "chosen": chosen, "same": same, "by order": by_order,
            "questions": len(turned)}


def report(name, scored, images, records, seen, units, unit="images", seed=0):
    """
    Print a dataset's tables: all questions, those that are new to the run, what the order of the options does, accuracy
    by type. Returns the same as a dict. Parameters as in tasks/vqa.py.
    """
    columns, count = columns_of(scored), len(records)
    about = f" about {images:,} images" if images else ""
    print(f"\n{name}: {count:,} multiple-choice questions{about}; percent, with 95% intervals over {unit}")
    tables = {"drawn": unit, "all": tabulate(columns, np.full(count, True), units, seed)}
    print_table(tables["all"], unit)
    tables["orders"] = report_orders(scored.get("model", ()))
    tables["new"] = report_new(seen, lambda chosen: tabulate(columns, chosen, units, seed),
                               lambda table: print_table(table, unit))
    few = {row: columns[row] for row in columns if row in ROWS_BY_TYPE}
    tables["types"] = report_types(records, lambda chosen: tabulate(few, chosen, units, seed), MAIN)
    unreadable = tables["all"]["rows"].get("model", {}).get("unreadable", [None])[0]
    metrics = (MAIN, READINGS[0]) if any("as asked" in one["chosen"] for one in scored.get("model", ())) else (MAIN,)
    tables["summary"] = summary(tables, seen, metrics, "commonest option", unreadable=unreadable)
    for line in tables["summary"]["lines"][1:]:  # likelihoods: none is unreadable, and a blind answer is what it is
        line |= {"unreadable": None, "blind": tables["summary"]["lines"][0]["blind"]}
    return tables
