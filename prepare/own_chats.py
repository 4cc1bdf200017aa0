"""
Conversations of one's own, in JSON or JSON lines, as LLaVA, ShareGPT and programs with OpenAI's messages write them.

    {"image": "1.png", "conversations": [{"from": "human", "value": "<image>\\nwhat is shown?"},
                                         {"from": "gpt", "value": "a fracture"}]}
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "1.png"},
                                               {"type": "text", "text": "where is it?"}]},
                  {"role": "assistant", "content": "on the left"}]}
    {"images": ["1.png"], "messages": [{"role": "user", "content": "<image>where?"}, ...]}

Images stand before the first question, with the texts between them; further turns are words alone. An image may be a
path or a data: URL; nothing is fetched.
"""

import base64
import binascii
import re
from collections import Counter
from dataclasses import replace

from data import Record, View
from plumbing.flags import UserError
from plumbing.own import clean, printable
from plumbing.tables import find_roles, image_names, text_of
from prepare.own import Draft, Own
from prepare.own_questions import ROLES as QUESTION_ROLES
from prepare.own_questions import split_of

ROLES = {role: QUESTION_ROLES[role] for role in ("image", "split", "patient", "study", "type", "id")}
TURNS = ("conversations", "messages", "conversation", "dialog", "dialogue")  # names of the list of turns
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "bot": "assistant",
            "model": "assistant", "system": "system", "developer": "system"}
PLACE = re.compile(r"<image>|<\|image\|>|<image-placeholder>", re.I)  # where an image stands in a text
PLACED = View(None)  # stands for the next of a conversation's images


class Unfit(Exception):
    """Why a conversation cannot be a sample, in words."""


# ----------------------------------------------------------------------------- parts of a turn

def open_url(where, url, number):
    """The View of what a content part names: a path, which is read later, or the image in a data: URL."""
    if re.match(r"(https?|ftp|s3|gs)://", url, re.I):
        raise UserError(f"{where}: its image is {printable(url)!r:.80}, and nothing is fetched; download the images, "
                        "and name their files")
    if not url.lower().startswith("data:"):
        return View(None, re.sub("^file://", "", url, flags=re.I))
    head, _, content = url.partition(",")
    try:
        if not head.lower().endswith(";base64"):
            raise ValueError
        return View(base64.b64decode(content, validate=True), f"image {number} of {where}")
    except (ValueError, binascii.Error):
        raise Unfit("a data: URL that is not base64") from None


def split_text(text):
    """The parts of a text in which images may stand: texts, and PLACED for each image."""
    texts = [clean(part) for part in PLACE.split(text)]
    parts = [part for text in texts for part in (PLACED, text)][1:]
    return [part for part in parts if part != ""]


def parts_of_content(where, content):
    """The parts of a turn's content: a text, or OpenAI's list of parts."""
    if isinstance(content, (str, int, float)):
        return split_text(text_of(content, ("",)))
    parts = []
    for item in content if isinstance(content, list) else [content]:
        kind = item.get("type", "") if isinstance(item, dict) else "text"
        if isinstance(item, str):
            parts += split_text(item)
        elif not isinstance(item, dict) or not isinstance(kind, str):
            raise Unfit("a part of a turn that is neither text nor image")
        elif kind in ("text", "input_text", "output_text") or not kind and "text" in item:
            parts += split_text(text_of(item.get("text"), ("",)))
        elif kind in ("image", "image_url", "input_image") or not kind and "image" in item:
            source = next((item[name] for name in ("image", "image_url", "path", "url") if item.get(name)), None)
            source = source.get("url") or source.get("path") if isinstance(source, dict) else source
            parts.append(PLACED if source is None else open_url(where, str(source), len(parts) + 1))
        else:
            raise Unfit(f"a part of type {printable(kind)!r:.40}")
    return parts


# ----------------------------------------------------------------------------- a conversation

def turns_of(where, item):
    """[(user, assistant or system, parts)] of a conversation, in its order."""
    turns, said = [], item.get(turns_column(item))
    for turn in said if isinstance(said, list) else ():
        turn = turn if isinstance(turn, dict) else {}
        speaker, content = turn.get("from", turn.get("role", "")), turn.get("value", turn.get("content"))
        if str(speaker).lower() not in SPEAKERS:
            raise Unfit(f"a turn of {printable(str(speaker))!r:.40}")
        parts = parts_of_content(where, content if content is not None else "")
        turns.append((SPEAKERS[str(speaker).lower()], parts))
    return turns


def place_images(parts, views):
    """Parts in which the next of the views, which are taken out of their list, stands at each place of an image."""
    if sum(part is PLACED for part in parts) > len(views):
        raise Unfit("more places of images than images")
    return [views.pop(0) if part is PLACED else part for part in parts]


def first_question(parts):
    """(parts before it, the question): the text behind the last image, or where there is none, the last text."""
    places = [place for place, part in enumerate(parts) if isinstance(part, View)]
    texts = [place for place, part in enumerate(parts) if isinstance(part, str)]
    if not places:
        return [], " ".join(parts)
    if parts and isinstance(parts[-1], str):
        return parts[:places[-1] + 1], " ".join(parts[places[-1] + 1:])
    if not texts:
        raise Unfit("no words in its first turn")
    return parts[:texts[-1]] + parts[texts[-1] + 1:], parts[texts[-1]]


def read_conversation(where, item, names):
    """
    (parts, question and answer of each turn, system message, whether it ends with a question) of a conversation.
    Raises Unfit.
    """
    turns, views = turns_of(where, item), [open_url(where, name, number) for number, name in enumerate(names, 1)]
    system = " ".join(part for speaker, some in turns if speaker == "system" for part in some if isinstance(part, str))
    spoken = [turn for turn in turns if turn[0] != "system"]
    if [speaker for speaker, _ in spoken] != (["user", "assistant"] * len(spoken))[:len(spoken)] or len(spoken) < 2:
        raise Unfit("turns that are not a question and an answer in turn")
    (_, first), *behind = spoken[:len(spoken) // 2 * 2]
    if any(isinstance(part, View) for _, some in behind for part in some):
        raise Unfit("an image behind its first question")
    texts = [" ".join(some) for _, some in behind]
    if views and PLACED not in first:
        first = [*views, *first]
    else:
        first = place_images(first, views)
        if views:
            raise Unfit("fewer places of images than images")
    parts, question = first_question(first)
    return tuple(parts), list(zip([question, *texts[1::2]], texts[::2])), system, len(spoken) % 2


def number_roles(parts):
    """Parts of several images that no text tells apart, each with its number as role."""
    views = [part for part in parts if isinstance(part, View)]
    if len(views) < 2 or len(views) < len(parts):
        return parts
    return tuple(View(view.image, view.name, f"image {number}") for number, view in enumerate(views, 1))


# ----------------------------------------------------------------------------- files

def turns_column(columns):
    """The name of the column that holds a conversation's turns; "" where none does."""
    return next((name for known in TURNS for name in columns if name.lower() == known), "")


def read_chats(path, tables, given):
    """
    The Own of files of conversations. tables: as own_questions.read_questions takes them; given: {role: column}, by
    --columns. Raises UserError.
    """
    drafts, systems, unfit, firsts, forms, ending, grouped_by = [], [], Counter(), {}, set(), 0, ""
    for file, columns, rows, split in tables:
        roles = find_roles(file, columns, ROLES, given)
        grouped_by = grouped_by or (f"column {roles['patient']}" if "patient" in roles else "")
        forms.add(turns_column(columns).lower())
        for number, (where, item) in enumerate(rows, 1):
            own = {role: text_of(item.get(roles[role])) if role in roles else "" for role in ROLES}
            try:
                parts, pairs, system, left = read_conversation(where, item, image_names(item, roles, []))
            except Unfit as error:
                unfit[str(error)] += 1
                firsts.setdefault(str(error), where)
                continue
            ending += left
            (question, answer), *turns = pairs
            record = Record(own["id"] or str(number), question, answer, type=own["type"], study=own["study"],
                            parts=number_roles(parts), turns=tuple(turns))
            drafts.append(Draft(record, split_of(own["split"] or split), own["patient"], where))
            systems.append(system)
    drafts, notes = with_systems(drafts, systems)
    notes += [f"{count:,} conversations are left out, {firsts[why]} the first: {why}" for why, count in unfit.items()]
    notes += [f"{ending:,} conversations end with a question, which is left out"] if ending else []
    imaged = sum(bool(draft.record.parts) for draft in drafts)
    if not drafts:
        raise UserError(f"{path}: no conversation of it can be read ({notes[0] if notes else 'there is none'})")
    kind = "image questions" if imaged and 2 * imaged >= len(drafts) else "text questions"
    return Own(f"{tables[0][0].suffix.lower()[1:]} of {' and '.join(sorted(forms))}", kind, "",
               [file for file, *_ in tables], drafts, grouped_by, notes)


def with_systems(drafts, systems):
    """Drafts with their system messages as context, unless all have the same; and what is to be said about that."""
    kinds = set(systems)
    if kinds <= {""}:
        return drafts, []
    if len(kinds) == 1:
        return drafts, [f"the system message of all of them is left out: {printable(systems[0])!r:.120}; --system puts "
                        "one before each sample, with a chat model's tokenizer"]
    return [draft._replace(record=replace(draft.record, context=system))
            for draft, system in zip(drafts, systems)], ["system messages differ: each is kept as the context"]
