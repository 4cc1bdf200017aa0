"""
Questions of one's own in a csv, tsv, JSON or JSON lines, a row each, with any number of images or with none.

    image,question,answer               1.png,what is shown?,a fracture
    question,A,B,C,answer               which drug?,aspirin,heparin,none of them,B
    {"images": ["1.png", "2.png"], "question": "what has changed?", "answer": "less fluid"}

ROLES says which columns there may be, and by which names. Rows of one study of several dates that ask the same and
are answered the same are one sample, whose earlier images are prior ones.
"""

import re
from collections import Counter, defaultdict
from dataclasses import replace

from data import Record, View
from plumbing.flags import UserError
from plumbing.own import printable
from plumbing.tables import (IMAGES, NO_WORDS, NOTHING, QUESTIONS, column_of_files, find_roles, image_columns,
                             image_names, list_of, plain_name, text_of, value_of, without_zeros)
from prepare.datasets import count_from, lettered
from prepare.listing import PEOPLE, SPLITS
from prepare.own import Draft, Own
from prepare.own_studies import days_of
from tasks.boxes import ask
from tasks.choices import LETTERS, letter_options

ROLES = {  # what a column is for -> names that it may have, without capitals, spaces and signs; the first counts
    "image": IMAGES, "question": QUESTIONS,
    "answer": ("answer", "response", "correctanswer", "groundtruth", "gt", "target", "output", "reply", "answertext",
               "correct", "correctoption", "rightanswer", "cop", "answeridx", "answerlabel", "label", "antwort", "a"),
    "choices": ("choices", "options", "candidates"),
    "split": ("split", "partition", "subset", "fold"),
    "patient": PEOPLE,
    "study": ("studyid", "study", "caseid", "case", "examid", "exam", "accession", "accessionnumber", "visit"),
    "date": ("studydate", "date", "acquisitiondate", "examdate", "timepoint", "time"),
    "role": ("role", "roles", "view", "viewposition", "projection"),
    "type": ("type", "questiontype", "contenttype", "answertype", "category"),
    "references": ("references", "reference", "otheranswers", "acceptedanswers", "answers"),
    "boxes": ("boxes", "box", "bbox", "bboxes", "boundingbox", "boundingboxes"),
    "context": ("context", "history", "clinicalhistory", "indication", "passage", "abstract"),
    "reasoning": ("reasoning", "explanation", "rationale", "exp"),
    "id": ("id", "qid", "questionid", "uid"),
}
OPTIONS = [[f"{word}{mark}" for mark in marks] for marks in (LETTERS.lower(), "123456789")
           for word in ("", "option", "choice", "op", "answer")]  # names of columns of one option each
ANSWERS_AS = ("the option's text", "a letter", "a number from 0", "a number from 1")


# ----------------------------------------------------------------------------- columns

def option_columns(columns):
    """The columns that hold one option each, A, B, C or option_1, option_2; [] where there are none."""
    names = {plain_name(name): name for name in columns}
    for known in OPTIONS:
        some = known[1:] if known[0] == "1" else known
        found = [names[name] for name in some if name in names]
        if len(found) > 1 and found == [names[name] for name in some[:len(found)]] and some[0][-1] in "a1":
            return found
    return []


def roles_of(path, columns, given):
    """{role: its column} of a table of questions; {} where it is none. given: {role: column}, by --columns."""
    options = option_columns([name for name in columns if name not in given.values()])
    found = find_roles(path, [name for name in columns if name not in options], ROLES, given)
    return found if "question" in found and found.keys() & {"answer", "boxes"} else {}


# ----------------------------------------------------------------------------- cells

def options_of(where, row, roles, columns):
    """The texts of a row's options, in their order; [] where it has none."""
    value = value_of(row.get(roles.get("choices"))) if "choices" in roles else [row.get(name) for name in columns]
    if isinstance(value, str):
        lettered_ones = re.split(r"(?:^|[\s|;,]+)\(?[A-J][.):]\s*", value)
        value = lettered_ones[1:] if len(lettered_ones) > 2 else re.split(r"[|;\n]", value)
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value)]
    texts = []
    for item in value if isinstance(value, (list, tuple)) else []:
        if isinstance(item, dict):  # {"letter": "A", "content": "..."}
            item = next((item[key] for key in ("content", "text", "option", "value") if key in item), None)
        texts.append(re.sub(rf"^\s*\(?{LETTERS[len(texts) % len(LETTERS)]}[.):]\s+|^\s*{LETTERS[len(texts) % 10]}:", "",
                            text_of(item, NO_WORDS)))
    while texts and not texts[-1]:
        texts.pop()
    if len(texts) > len(LETTERS):
        raise UserError(f"{where}: {len(texts)} options, of which at most {len(LETTERS)} are read")
    return texts


def letter_of(answer):
    """The place of the option that "B", "(b)", "B." or "B. heparin" names; -1 where it names none."""
    match = re.match(r"\(?([A-Ja-j])(?:[.):]+(?:\s|$)|$)", answer)
    return LETTERS.index(match[1].upper()) if match else -1


def read_answers(path, answers, options, notes):
    """
    The place of each question's right option, -1 where its answer is none. Answers are texts of options, letters, or
    numbers from 0 or 1: which, all of them together say.
    """
    asked = [(answer, some) for answer, some in zip(answers, options) if some and answer]
    texts = [[option.casefold().rstrip(".") for option in some] for _, some in asked]
    by_text = [some.index(answer.casefold().rstrip(".")) if answer.casefold().rstrip(".") in some else -1
               for (answer, _), some in zip(asked, texts)]
    by_letter = [place if place < len(some) else -1 for answer, some in asked for place in [letter_of(answer)]]
    if all(re.fullmatch(r"\d{1,2}", answer) for answer, _ in asked) and min(by_text, default=0) < 0:
        size = max(map(len, options))
        first = count_from(f"{path}: its answers", [answer for answer, _ in asked], size)
        places, way = [int(answer) - first for answer, _ in asked], 2 + first
    else:  # the one that more of them are; an answer that is none in that way is perhaps one in the other
        way = int(sum(place >= 0 for place in by_letter) > sum(place >= 0 for place in by_text))
        ways = (by_text, by_letter)
        places = [main if main >= 0 else other for main, other in zip(ways[way], ways[1 - way])]
    sizes = sorted({len(some) for some in texts})
    notes.append(f"{len(asked):,} questions have {' or '.join(map(str, sizes))} options; the right one is named by "
                 f"{ANSWERS_AS[way]}")
    places = iter(places)
    return [next(places) if some and answer else -1 for answer, some in zip(answers, options)]


def boxes_of(where, value, label):
    """{label: ((x1, y1, x2, y2), ...)} of a cell: lists of four numbers, or an object of them by label."""
    value = value_of(value)
    if value is None or value != value or value == "":
        return None
    found = {}
    for name, some in (value if isinstance(value, dict) else {label: value}).items():
        some = [some] if isinstance(some, (list, tuple)) and some and not isinstance(some[0], (list, tuple)) else some
        try:
            boxes = tuple(tuple(float(edge) for edge in box) for box in some)
            if any(len(box) != 4 or not all(abs(edge) < 1e6 for edge in box) for box in boxes):
                raise ValueError
        except (TypeError, ValueError):
            raise UserError(f"{where}: {str(value)!r:.60} are no boxes; write [[x1, y1, x2, y2], ...], or "
                            '{"label": [[x1, y1, x2, y2]]}') from None
        found[name] = boxes
    return found


# ----------------------------------------------------------------------------- rows

def split_of(text):
    """A split as it is written here: of "val", "Training" or "validate" too; what is none of them stays."""
    return SPLITS.get(text.lower(), SPLITS.get(re.sub(r"(ate|ing)$", "", text.lower()), text))


def parts_of(names, roles):
    """The parts of a Record that shows images of these names, which are not read yet."""
    if len(names) > 1 and not any(roles):
        roles = [f"image {number}" for number in range(1, len(names) + 1)]
    return tuple(View(None, name, role) for name, role in zip(names, [*roles, *[""] * len(names)]))


def with_priors(file, rows, notes):
    """
    Rows of one study of several dates that ask and answer the same as one: their images in time, those of earlier
    dates with the role "prior". rows: [(Draft, date)]; their Drafts come back.
    """
    dates = defaultdict(set)
    for draft, date in rows:
        dates[draft.record.study].add(date)
    merged, order = defaultdict(list), []
    for number, (draft, date) in enumerate(rows):
        study = draft.record.study
        series = study and len(dates[study] - {""}) > 1 and date
        key = (study, draft.record.question, draft.record.answer, draft.patient) if series else number
        if key not in merged:
            order.append(key)
        merged[key].append((date, number, draft))
    drafts, count = [], 0
    days = order_of(file, {date for some in merged.values() if len(some) > 1 for date, *_ in some})
    for some in map(merged.get, order):
        if len(some) > 1:
            some.sort(key=lambda row: (days[row[0]], row[1]))
        last, (*before, (_, _, draft)) = some[-1][0], some
        if before:
            count += 1
            parts = tuple(replace(part, role=f"prior {part.role}".strip() if date != last else part.role)
                          for date, _, one in some for part in one.record.parts)
            draft = draft._replace(record=replace(draft.record, parts=parts))
        drafts.append(draft)
    if count:
        notes.append(f"{count:,} questions are asked of a study at several dates: a sample has its images in time, "
                     "earlier ones as \"prior\"")
    return drafts


def order_of(file, dates):
    """{date: what sorts it} of texts: dates and numbers as own_studies.days_of reads them, others as T2 before T10."""
    some, days = sorted(dates), [0.0] * len(dates)
    if any(re.search(r"\d[-./]\d|^\d+$", date) for date in some):
        days = days_of(f"{file}: its dates", some)
    return {date: (day, re.sub(r"\d+", lambda digits: f"{digits[0]:0>9}", date)) for date, day in zip(some, days)}


def read_questions(path, tables, given):
    """
    The Own of tables of questions. tables: [(file, columns, rows as plumbing.tables.read_items gives them, split that
    the file's name says)]; given: {role: column}, by --columns. Raises UserError.
    """
    notes, drafts, counts, grouped_by = [], [], Counter(), ""
    for file, columns, rows, split in tables:
        roles = roles_of(file, columns, given)
        options, several = option_columns([name for name in columns if name not in given.values()]), []
        several = image_columns(columns) if "image" not in roles else []
        if "image" not in roles and not several:
            left = [name for name in columns if name not in (*roles.values(), *options)]
            roles |= {"image": name for name in column_of_files(left, [row for _, row in rows])}
        used = {*roles.values(), *options, *several}
        unused = [printable(name) for name in columns if name not in used]
        notes.append(f"{file.name}: " + ", ".join(f"{role} is {printable(name)!r}" for role, name in roles.items()))
        notes += [f"{file.name}: columns that are not used: {', '.join(unused):.500}"] if unused else []
        some = read_table(file, rows, roles, options, several, split, notes)
        counts["choices"] += sum(bool(draft.record.choices) for draft in some)
        counts["boxes"] += sum(draft.record.boxes is not None for draft in some)
        grouped_by = grouped_by or next((f"column {roles[role]}" for role in ("patient",) if role in roles), "")
        drafts += some
    return Own(*form_of(path, tables, drafts, counts, notes), [file for file, *_ in tables], drafts, grouped_by, notes)


def read_table(file, rows, roles, options, several, split, notes):
    """The Drafts of one table. roles, options and several: its columns, as roles_of and the others find them."""
    def column(role, nothing=NO_WORDS):
        return without_zeros([text_of(row.get(roles[role]), nothing) if role in roles else "" for _, row in rows])

    def answers():
        cells = [value_of(row.get(roles["answer"])) if "answer" in roles else None for _, row in rows]
        one = [cell[0] if isinstance(cell, list) and len(cell) == 1 else cell for cell in cells]
        return without_zeros([text_of(cell, NO_WORDS) for cell in one])

    told, choices = answers(), [options_of(where, row, roles, options) for where, row in rows]
    places = read_answers(file, told, choices, notes) if any(choices) else [-1] * len(rows)
    cells = {role: column(role, NOTHING) for role in ("split", "patient", "study", "date", "id", "type", "context",
                                                      "reasoning")}
    questions, drafts = column("question"), []
    for number, (where, row) in enumerate(rows):
        own = {role: cells[role][number] for role in cells}
        views = parts_of(image_names(row, roles, several), list_of(row.get(roles["role"])) if "role" in roles else [])
        more = {name: own[name] for name in ("type", "study", "context", "reasoning")} | {"parts": views}
        more |= {"references": tuple(list_of(row.get(roles["references"]), "|"))} if "references" in roles else {}
        name, question = own["id"] or str(number + 1), questions[number]
        if choices[number]:
            stem = without_options(question, choices[number])
            record = lettered(name, stem, choices[number], places[number], **more)
            if places[number] < 0 and told[number]:  # said to be what it is, when it is skipped
                record = replace(record, question=f"{stem} {' '.join(letter_options(choices[number]))}",
                                 answer=told[number])
        else:
            label = told[number] or question.removeprefix(ask("")) or "region"
            boxes = boxes_of(where, row.get(roles["boxes"]), label) if "boxes" in roles else None
            record = Record(name, question, "" if boxes is not None else told[number], boxes=boxes, **more)
        drafts.append((Draft(record, split_of(own["split"] or split), own["patient"], where), own["date"]))
    words = Counter(answer for answer in told if answer in ("None", "N/A", "-", "?"))
    notes += [f"{count:,} answers are {answer!r}, which is kept as it stands" for answer, count in words.items()]
    return with_priors(file, drafts, notes)


def without_options(question, options):
    """A question without the options that it was published with, as MedXpertQA's is."""
    stem = re.split(r"\s*(?:Answer Choices|Options|Choices):\s*\(?A[).:]", question)[0]
    return stem if stem != question and all(option in question[len(stem):] for option in options) else question


def form_of(path, tables, drafts, counts, notes):
    """(what it is in words, kind, task) of Drafts, which are of one task all, or plain questions all."""
    imaged, count = sum(bool(draft.record.parts) for draft in drafts), len(drafts)
    words = f"{tables[0][0].suffix.lower()[1:]} of questions"
    if counts["boxes"]:
        if counts["boxes"] < count:
            raise UserError(f"{path}: {counts['boxes']:,} of {count:,} questions have boxes, the others none; put them "
                            "into another table")
        return f"{words} with boxes", "boxes", ""
    if counts["choices"] and counts["choices"] < count:
        notes.append(f"{counts['choices']:,} of {count:,} questions have options: with others among them, answers are "
                     "judged as words")
    if 0 < imaged < count:
        notes.append(f"{count - imaged:,} of {count:,} questions name no image: " + (
            "skipped, as most do" if 2 * imaged >= count else "asked as texts, as most are"))
    kind = "image questions" if imaged and 2 * imaged >= count else "text questions"
    return words, kind, "choices" if counts["choices"] == count > 0 else ""
