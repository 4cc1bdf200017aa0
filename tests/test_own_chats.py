"""Conversations: turns, places of images, system messages, data: URLs, and what is left out or refused."""

import base64
import json

import pytest

from data import View
from plumbing.flags import UserError
from plumbing.tables import read_items
from prepare.own_chats import read_chats

SHOWN = View(None, "a.png")


def read(tmp_path, *items, name="chat.json"):
    path = tmp_path / name
    path.write_text(json.dumps(items) if name.endswith("json") else "\n".join(map(json.dumps, items)))
    columns, rows = read_items(path, [])
    return read_chats(path, [(path, columns, rows, "")], {})


def llava(*turns, **more):
    return {"conversations": [{"from": ("human", "gpt")[number % 2], "value": turn}
                              for number, turn in enumerate(turns)], **more}


def messages(*contents, **more):
    return {"messages": [{"role": ("user", "assistant")[number % 2], "content": content}
                         for number, content in enumerate(contents)], **more}


ASKED = ((SHOWN,), "what is shown?", "a fracture", (("where?", "left"), ("since when?", "a week")))
REST = ("a fracture", "where?", "left", "since when?", "a week")


@pytest.mark.parametrize("item", [
    llava("<image>\nwhat is shown?", *REST, image="a.png", id="7"),
    llava("what is shown?\n<image>", *REST, image=["a.png"]),
    llava("what is shown?", *REST, image="a.png"), messages("<image>what is shown?", *REST, images=["a.png"]),
    messages([{"type": "image", "image": "a.png"}, {"type": "text", "text": "what is shown?"}], *REST),
    messages([{"type": "image"}, {"type": "text", "text": "what is shown?"}],
             *([{"type": "text", "text": text}] for text in REST), images=["a.png"]),
    messages([{"type": "text", "text": "what is shown?"},
              {"type": "image_url", "image_url": {"url": "file://a.png"}}], *REST),
    messages([{"type": "image_url", "image_url": "a.png"}, "what is shown?"], *REST)])
def test_a_conversation_is_read_in_every_form(item, tmp_path):
    for name in ("chat.json", "chat.jsonl"):
        own = read(tmp_path, item, name=name)
        record = own.drafts[0].record
        assert (record.parts, record.question, record.answer, record.turns) == ASKED and own.notes == []
        assert own.kind == "image questions" and record.id == item.get("id", "1")


def test_images_stand_where_their_places_are(tmp_path):
    own = read(tmp_path, llava("Before: <image> and now: <image>\nwhat has changed?", "less", image=["a.png", "b.png"]),
               llava("<image><image>what has changed?", "less", image=["a.png", "b.png"]), llava("why?", "so"))
    assert own.drafts[0].record.parts == ("Before:", SHOWN, "and now:", View(None, "b.png"))
    assert [(view.name, view.role) for view in own.drafts[1].record.parts] == [
        ("a.png", "image 1"), ("b.png", "image 2")]
    assert [draft.record.question for draft in own.drafts] == ["what has changed?", "what has changed?", "why?"]
    assert own.drafts[2].record.parts == ()


def test_data_urls_are_images(tmp_path):
    url = "data:image/png;base64," + base64.b64encode(b"a png").decode()
    own = read(tmp_path, *(messages([{"type": "image_url", "image_url": {"url": some}}, "what?"], "x")
                           for some in (url, "data:image/png;base64,?")))
    assert [view.image for view in own.drafts[0].record.parts] == [b"a png"]
    assert own.notes == ["1 conversations are left out, chat.json: item 2 the first: a data: URL that is not base64"]


@pytest.mark.parametrize("item", [llava("what?", "x", image="https://example.org/a.png"), messages(
    [{"type": "image_url", "image_url": {"url": "HTTP://example.org/a.png"}}], "x")])
def test_nothing_is_fetched(item, tmp_path):
    with pytest.raises(UserError, match=r"chat.json: item 1: its image is .*, and nothing is fetched"):
        read(tmp_path, item)


@pytest.mark.parametrize("item, why", [
    (llava("<image><image>what?", "x", image="a.png"), "more places of images than images"),
    (llava("<image>what?", "x", image=["a.png", "b.png"]), "fewer places of images than images"),
    (llava("what?", "x", "<image>and here?", "y", image="a.png"), "an image behind its first question"),
    (llava("what?", "see <image>", image=[]), "an image behind its first question"),
    (llava("<image>", "x", image="a.png"), "no words in its first turn"), (llava("what?"), "turns that are not"),
    ({"conversations": [{"from": "gpt", "value": "x"}, {"from": "human", "value": "y"}]}, "turns that are not"),
    ({"conversations": [{"from": "tool", "value": "x"}]}, "a turn of 'tool'"),
    ({"conversations": "what?"}, "turns that are"), (messages([{"type": "audio"}], "x"), "a part of type 'audio'"),
    (messages([7], "x"), "a part of a turn that is neither text nor image")])
def test_what_is_no_sample_is_left_out_and_counted(item, why, tmp_path):
    own = read(tmp_path, llava("why?", "so"), item, item)
    assert len(own.drafts) == 1 and len(own.notes) == 1
    assert own.notes[0].startswith(f"2 conversations are left out, chat.json: item 2 the first: {why}")
    with pytest.raises(UserError, match="no conversation of it can be read"):
        read(tmp_path, item)


def test_a_last_question_without_an_answer_is_left_out(tmp_path):
    own = read(tmp_path, llava("why?", "so", "and then?"))
    assert own.drafts[0].record.turns == () and own.notes == ["1 conversations end with a question, which is left out"]


def test_system_messages_are_said_or_kept(tmp_path):
    def item(system):
        return {"messages": [{"role": "system", "content": system}, *messages("why?", "so")["messages"]]}

    own = read(tmp_path, item("be brief"), item("be brief"))
    assert [draft.record.context for draft in own.drafts] == ["", ""] and "'be brief'; --system" in own.notes[0]
    own = read(tmp_path, item("be brief"), item("a man of 60"))
    assert [draft.record.context for draft in own.drafts] == ["be brief", "a man of 60"] and len(own.notes) == 1
