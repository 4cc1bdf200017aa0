"""
Answers that were not given here, from anybody's file, matched to the questions of prepared data.

One JSON object a line with "id", an answer under the first of KEYS that all lines have, "dataset" where the file
answers several, and "likelihoods" where they are known: {"letter": [...], "whole": [...], "tokens": [...]}, the
log-probability of each option's letter and of its whole text, in nats, and how many tokens that has; or several of them
by the way to ask, as eval_vqa.py writes them. Its predictions.jsonl is such a file.
"""

import difflib
import json

from plumbing.flags import UserError
from tasks.evaluations import read_predictions

READINGS = ("letter", "whole", "tokens")
KEYS = ("prediction", "response", "output", "text")  # "answer" is what a reference is called


def refuse(path, found, what, mend):
    """Raise UserError where there is any of what must not be: how many, what, the first three, what to do."""
    if found:
        first = ", ".join(str(one)[:60] for one in found[:3]) + ", ..." * (len(found) > 3)
        raise UserError(f"{path}: {len(found):,} {what}: {first}; {mend}")


def read_objects(path):
    """[(number of the line, its JSON object)] of a file. Raises UserError for a line that holds none."""
    lines = []
    for number, text in enumerate(read_predictions(path).splitlines(), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict):
            raise UserError(f"{path}: line {number} is no JSON object; write one a line, with id and prediction")
        lines.append((number, line))
    if not lines:
        raise UserError(f"{path}: no answers in it; write one JSON object a line, with id and prediction")
    return lines


def find_key(path, lines):
    """The first of KEYS that all lines have."""
    for key in KEYS:
        lacking = [number for number, line in lines if key not in line]
        if not lacking:
            refuse(path, [number for number, line in lines if not isinstance(line[key], str)],
                   f"lines whose {key} is no text, by number", 'an answer is text; "" counts as wrong')
            return key
    counts = ", ".join(f"{key} in {sum(key in line for _, line in lines):,}" for key in KEYS)
    raise UserError(f"{path}: no key for the answer that all {len(lines):,} lines have ({counts}); name it prediction "
                    "in each")


def name_lines(path, lines, records):
    """{(dataset, id): (number of the line, line)}; where one dataset is asked for, a line need not name it."""
    named, repeated, other = {}, [], []
    names = {short: name for name in records for short in (name, name.partition("/")[0])}
    refuse(path, [number for number, line in lines if not isinstance(line.get("id"), (str, int))],
           "lines without an id, by number", "each needs the id that its question has in records.jsonl")
    for number, line in lines:
        dataset = line.get("dataset") or (next(iter(records)) if len(records) == 1 else "")
        if not isinstance(dataset, str) or dataset not in names:
            other.append(f"line {number}: {dataset!r}")
            continue
        key = names[dataset], str(line["id"])
        repeated += [f"{key[1]!r} in line {number}"] * (key in named)
        named[key] = number, line
    refuse(path, other, f"lines are of no dataset that is asked for ({', '.join(records)})",
           "name others with --data, or leave the lines out")
    refuse(path, repeated, "lines repeat an id", "keep one answer to each question")
    return named


def require_same_questions(path, named, records):
    """Raise UserError unless the lines answer each of the questions, and no other."""
    wanted = {(name, str(record["id"])): record for name, some in records.items() for record in some}
    if (count := sum(map(len, records.values()))) > len(wanted):
        raise UserError(f"{', '.join(records)}: {count - len(wanted):,} questions have another's id, so {path} cannot "
                        "say which of them it answers; prepare the data again, with an id for each")
    unknown, ids = [key for key in named if key not in wanted], [key[1] for key in wanted]
    near = [(one, difflib.get_close_matches(one, ids, 1, 0)) for _, one in unknown[:3]]
    refuse(path, [f"{one!r} (nearest: {some[0]!r})" if some else repr(one) for one, some in near] + unknown[3:],
           "ids are of no question", "take them from records.jsonl of the prepared split")
    refuse(path, [repr(key[1]) for key in wanted if key not in named], f"of {len(wanted):,} questions have no answer",
           'answer each; "" counts as wrong')
    refuse(path, [f"{key[1]!r} in line {number}" for key, (number, line) in named.items()
                  if "question" in line and line["question"] != wanted[key]["question"]],
           "questions are worded otherwise than in the prepared data", "answer those, or leave the questions out")


def find_fault(likelihoods, count):
    """What is wrong with the likelihoods of a question with so many options, in one way to ask it; "": nothing."""
    def finite(value):
        return type(value) in (int, float) and abs(value) < 1e300  # no NaN, and no whole number beyond a float

    if not isinstance(likelihoods, dict) or not set(READINGS) <= likelihoods.keys() <= {*READINGS, "order"}:
        return f"are not {{{', '.join(READINGS)}}}"
    for reading, values in likelihoods.items():
        if not isinstance(values, list) or len(values) != count or not all(map(finite, values)):
            return f"have not {count} finite numbers as {reading}, one of each option"
    if min(likelihoods["tokens"]) < 1:
        return "have an option of no tokens"
    wrong_order = sorted(likelihoods.get("order", range(count))) != list(range(count))
    return f"have an order that is none of {count} options" if wrong_order else ""


def read_note(path, number, line, record):
    """{"likelihoods": {way to ask: the options'}} of a line, as tasks/choices.py takes it; {} where it has none."""
    given = line.get("likelihoods")
    if given is None:
        return {}
    flat = isinstance(given, dict) and "whole" in given
    ways, count = {"as asked": given} if flat else given, len(record.get("choices") or ())
    if not count:
        fault = "belong to no multiple choice"
    elif not isinstance(ways, dict) or "as asked" not in ways:
        fault = f"are neither {{{', '.join(READINGS)}}} nor of each way to ask"
    else:
        fault = next(filter(None, (find_fault(some, count) for some in ways.values())), "")
    if fault:
        raise UserError(f"{path}: line {number}: the likelihoods {fault}; mend them, or leave them out")
    return {"likelihoods": ways}


def read_foreign(path, records):
    """
    {"dataset/split": (answers as text, notes)} of a file, each a list in the order of the records; a note is a dict
    with the "likelihoods" of the options, where the file has them. Prints the key that the answers are from.

    records: {"dataset/split": lines of records.jsonl} of all datasets that the file is to answer. Raises UserError for
    a line that is no JSON object, without an answer, of another dataset or question, or twice there; for likelihoods
    that are not as many finite numbers as there are options, or of a part of a dataset's questions; and for questions
    without an answer.
    """
    lines = read_objects(path)
    key = find_key(path, lines)
    named = name_lines(path, lines, records)
    require_same_questions(path, named, records)
    print(f"{path}: {len(named):,} answers, from {key!r} of each line")
    answers = {}
    for name, some in records.items():
        found = [named[name, str(record["id"])] for record in some]
        notes = [read_note(path, number, line, record) for (number, line), record in zip(found, some, strict=True)]
        if any(notes):
            refuse(path, [number for (number, _), note in zip(found, notes) if not note],
                   f"answers to {name} are without likelihoods, which others have; by number of the line",
                   "give each question's, or none")
        answers[name] = [line[key] for _, line in found], notes
    return answers
