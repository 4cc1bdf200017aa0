"""Tables of questions: encodings, signs, columns, cells, choices, boxes and dates."""

import json

import pytest

from data import View
from plumbing.flags import UserError
from plumbing.tables import (find_roles, list_of, parse_columns, read_items, read_rows, text_of, value_of,
                                without_zeros)
from prepare.own_questions import ROLES, read_questions, roles_of
from test_box_data import real


def read(path, **given):
    """The Own of a table."""
    columns, rows = read_items(path, notes := [])
    own = read_questions(path, [(path, columns, rows, "")], given)
    return own._replace(notes=notes + own.notes)


def write(tmp_path, text, name="q.csv", encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


def told(own):
    return [(*(view.name for view in draft.record.views()), draft.record.question, draft.record.answer)
            for draft in own.drafts]


PLAIN = [("ä.png", "what is shown?", "a fracture; old"), ("b.png", "where?", "left")]


# ----------------------------------------------------------------------------- files

@pytest.mark.parametrize("name, text, encoding", [
    ("q.csv", 'image,question,answer\nä.png,what is shown?,a fracture; old\nb.png,where?,left\n', "utf-8"),
    ("q.csv", '\n\nimage,question,answer\r\nä.png,what is shown?,a fracture; old\r\n\r\nb.png,where?,left',
     "utf-8-sig"),
    ("q.CSV", 'sep=;\r\nImage;Question ;ANSWER\r\nä.png;what is shown?;"a fracture; old"\r\nb.png;where?;left\r\n',
     "cp1252"),
    ("q.tsv", 'Image_Path\tQuery\tResponse\nä.png\twhat is shown?\ta fracture; old\nb.png\twhere?\tleft\n', "utf-16"),
    ("q.txt", 'File Name|Prompt|Ground Truth\nä.png|what is shown?|a fracture; old\nb.png|where?|left\n', "utf-16-le"),
    ("q.csv", 'img,frage,antwort\nä.png,"what is\nshown?",a fracture; old\nb.png,where?,left\n', "utf-8"),
    ("q.json", json.dumps([dict(zip(("image", "question", "answer"), row)) for row in PLAIN]), "utf-8-sig"),
    ("q.json", json.dumps({"version": 1, "data": [dict(zip(("file", "Question", "Answer"), row)) for row in PLAIN]}),
     "utf-8"),
    ("q.json", json.dumps({str(n): dict(zip(("img", "q", "a"), row)) for n, row in enumerate(PLAIN)}), "utf-8"),
    ("q.jsonl", "\n".join(json.dumps({"images": [row[0]], "question": row[1], "answer": row[2]}) for row in PLAIN),
     "utf-8"),
    ("q.json", "\n".join(json.dumps(dict(zip(("image", "question", "answer"), row))) for row in PLAIN), "utf-8")])
def test_a_table_is_read_in_every_form(name, text, encoding, tmp_path):
    own = read(write(tmp_path, text, name, encoding))
    assert told(own) == PLAIN and own.kind == "image questions" and own.task == ""
    assert ("Windows-1252" in str(own.notes)) == (encoding == "cp1252")
    assert [draft.where.split(": ")[0] for draft in own.drafts] == [name, name]


def test_json_by_split_gives_splits(tmp_path):
    own = read(write(tmp_path, json.dumps({"train": [{"question": "a?", "answer": 1}], "val": [
        {"question": "b?", "answer": 2.0}], "Testing": [{"question": "c?", "answer": True}]}), "q.json"))
    assert [(draft.split, draft.record.answer) for draft in own.drafts] == [
        ("train", "1"), ("validation", "2.0"), ("test", "true")] and own.kind == "text questions"


@pytest.mark.parametrize("name, text, wanted", [
    ("q.xlsx", b"PK\3\4", "a workbook, which is not read; save its sheet as csv"),
    ("q.csv", "image,question,Question,answer\n", "2 columns are named 'question'"),
    ("q.csv", b"image,question,answer\n\x81,a,b\n", "not a csv in UTF-8"),
    ("q.csv", "image,question,answer\na,b,c,d\n", "row 2 has 4 cells, but there are 3 columns"),
    ("q.json", "[{]", "not JSON"), ("q.json", '["a"]', "item 1 is str, no object"),
    ("q.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a git-lfs pointer")])
def test_a_file_is_refused_in_one_line(name, text, wanted, tmp_path):
    path = write(tmp_path, text, name)
    with pytest.raises(UserError) as error:
        read_items(path, [])
    assert wanted in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_rows_of_json_are_cells(tmp_path):
    path = write(tmp_path, json.dumps([{"Image": "a.png", "label": ["x", "y"]}, {"Image": "b.png"}]), "l.json")
    assert read_rows(path) == (["image", "label"], [(1, ["a.png", "x|y"]), (2, ["b.png", ""])])


# ----------------------------------------------------------------------------- columns and cells

def test_columns_are_named_by_a_flag(tmp_path):
    path = write(tmp_path, "bild,q1,q,answer\na.png,what?,no,yes\n")
    own = read(path, **parse_columns("image:Bild, question:q1", ROLES))
    assert told(own) == [("a.png", "what?", "yes")] and "columns that are not used: q" in str(own.notes)
    for flag, wanted in (("imag:bild", "no column is 'imag'; did you mean image?"), ("image", "name the column"),
                         ("image:a,image:b", "named twice")):
        with pytest.raises(UserError, match=wanted):
            parse_columns(flag, ROLES)
    with pytest.raises(UserError, match="q.csv has no such column; did you mean bild"):
        read(path, image="bid")
    assert roles_of(path, ["image", "label"], {}) == {} == find_roles(path, [], ROLES, {})


@pytest.mark.parametrize("cell, texts", [
    ('["a.png", "b, c.png"]', ["a.png", "b, c.png"]), ("['a.png', 'b.png']", ["a.png", "b.png"]),
    ("a.png; b.png", ["a.png", "b.png"]), ("a.png|b.png", ["a.png", "b.png"]), (["a.png", None], ["a.png"]), ("", []),
    (None, []), (float("nan"), []), ("[x].png", ["[x].png"]), ("NaN", [])])
def test_a_cell_may_be_a_list(cell, texts):
    assert list_of(cell) == texts


def test_a_cell_runs_nothing():
    assert value_of("[__import__('os').getcwd()]") == "[__import__('os').getcwd()]"
    assert text_of("None") == text_of("#N/A") == text_of(None) == "" and text_of(3) == "3"


def test_pandas_zeros_are_taken_off_beside_empty_cells(tmp_path):
    assert without_zeros(["1.0", "", "2.0"]) == ["1", "", "2"]
    assert without_zeros(["1.0", "2.5", ""]) == ["1.0", "2.5", ""] and without_zeros(["1.0"]) == ["1.0"]
    own = read(write(tmp_path, "question,answer\nhow many?,1.0\nhow much?,NaN\nand here?,2.0\nhow?,\n"))
    assert [answer for _, answer in told(own)] == ["1", "", "2", ""]


def test_what_stands_for_no_image_is_none(tmp_path):
    mixed = "image,question,answer\n" + "{},a?,yes\n{},b?,None\n{},c?,no\n"
    own = read(write(tmp_path, mixed.format("a.png", "NaN", "b.png")))
    assert own.kind == "image questions" and "1 of 3 questions name no image: skipped, as most do" in own.notes
    assert "1 answers are 'None', which is kept as it stands" in own.notes
    own = read(write(tmp_path, mixed.format("a.png", "null", "")))
    assert own.kind == "text questions" and [len(row) for row in told(own)] == [3, 2, 2]
    assert read(write(tmp_path, "question,answer\na?,b\n")).kind == "text questions"


def test_all_that_a_row_may_say(tmp_path):
    row = {"qid": 7, "images": [{"image_path": "a.png"}, {"image_path": "b.png"}], "question": "what?",
           "answer": ["yes"], "references": ["yes", "y"], "content_type": "open", "Patient ID": "P1",
           "study": "S1", "split": "valid", "history": "cough", "rationale": "as is", "role": ["frontal", "lateral"]}
    draft, = read(write(tmp_path, json.dumps([row]), "q.json")).drafts
    record = draft.record
    assert (draft.split, draft.patient, record.id, record.answer) == ("validation", "P1", "7", "yes")
    assert record.parts == (View(None, "a.png", "frontal"), View(None, "b.png", "lateral"))
    assert (record.references, record.study, record.context, record.reasoning, record.type) == (
        ("yes", "y"), "S1", "cough", "as is", "open")


def test_columns_of_several_images(tmp_path):
    own = read(write(tmp_path, "image1,image_2,question,answer\na.png,b.png,what?,x\nc.png,,what?,y\n"))
    assert [[(view.name, view.role) for view in draft.record.views()] for draft in own.drafts] == [
        [("a.png", "image 1"), ("b.png", "image 2")], [("c.png", "")]]


# ----------------------------------------------------------------------------- choices

OPTIONS = ("cyst", "mass", "gas, free")


@pytest.mark.parametrize("answers, way", [
    (("B", "c", "(A)"), "a letter"), (("B. mass", "C) gas, free", "A: cyst"), "a letter"),
    (("Mass", "gas, free.", "cyst"), "the option's text"), (("1", "2", "0"), "a number from 0"),
    (("2", "3", "1"), "a number from 1")])
@pytest.mark.parametrize("columns", [("A", "B", "C"), ("option_a", "option_b", "option_c"), ("opa", "opb", "opc"),
                                     ("option1", "option2", "option3"), ("choices",), ("options",)])
def test_the_right_option_is_found(columns, answers, way, tmp_path):
    cells = {"choices": [json.dumps(OPTIONS)], "options": ["A. cyst B. mass C. gas, free"]}.get(columns[0], OPTIONS)
    rows = [["question", *columns, "answer"], *(["which?", *cells, answer] for answer in answers)]
    path = write(tmp_path, "\n".join("\t".join(row) for row in rows), "q.tsv")
    own = read(path)
    assert own.task == "choices" and any(way in note for note in own.notes)
    assert [draft.record.choices for draft in own.drafts] == [OPTIONS] * 3
    assert told(own) == [("which? A. cyst B. mass C. gas, free", answer)
                         for answer in ("B. mass", "C. gas, free", "A. cyst")]


def test_options_of_objects_and_of_different_numbers(tmp_path):
    rows = [{"question": "which? Answer Choices: (A) x (B) y", "options": [
                {"letter": "A", "content": "x"}, {"letter": "B", "content": "y"}], "label": ["B"]},
            {"question": "which?", "options": {"B": "no", "A": "yes"}, "label": "A"},
            {"question": "which?", "options": ["1", "2", ""], "label": "z"}]
    own = read(write(tmp_path, json.dumps(rows), "q.json"))
    assert told(own) == [("which? A. x B. y", "B. y"), ("which? A. yes B. no", "A. yes"), ("which? A. 1 B. 2", "z")]
    assert "3 questions have 2 options" in str(own.notes)
    with pytest.raises(UserError, match="has both of 0 and 2"):
        read(write(tmp_path, "question,A,B,answer\na?,x,y,0\nb?,x,y,2\n"))
    own = read(write(tmp_path, "question,A,B,answer\na?,x,y,A\nb?,,,free\n"))
    assert own.task == "" and "1 of 2 questions have options" in str(own.notes)


# ----------------------------------------------------------------------------- boxes and dates

def test_boxes_are_lists_or_objects(tmp_path):
    rows = [{"image": "a.png", "question": "detect cyst", "boxes": [[1, 2, 3, 4]]},
            {"image": "a.png", "question": "where is it?", "answer": "mass", "boxes": [1, 2, 3, 4]},
            {"image": "a.png", "question": "all?", "boxes": {"cyst": [[1, 2, 3, 4], [0, 0, 1, 1]], "mass": []}},
            {"image": "a.png", "question": "detect gas", "boxes": []}]
    own = read(write(tmp_path, json.dumps(rows), "q.json"))
    box = (1.0, 2.0, 3.0, 4.0)
    assert own.kind == "boxes" and [draft.record.boxes for draft in own.drafts] == [
        {"cyst": (box,)}, {"mass": (box,)}, {"cyst": (box, (0.0, 0.0, 1.0, 1.0)), "mass": ()}, {"gas": ()}]
    for spoiled, wanted in (([[1, 2, 3]], "are no boxes"), ("left", "are no boxes"), (None, "3 of 4 questions have")):
        with pytest.raises(UserError, match=wanted):
            read(write(tmp_path, json.dumps([{**rows[0], "boxes": spoiled}, *rows[1:]]), "q.json"))


def test_images_of_a_study_are_in_the_order_of_time(tmp_path):
    own = read(write(tmp_path, "image,study,date,view,question,answer\n"
                     "new.png,S1,2020-03-01,frontal,what changed?,less\n"
                     "old.png,S1,2019-12-24,frontal,what changed?,less\n"
                     "a.png,S1,2020-03-01,,is it new?,no\nb.png,S2,2020-03-01,,what changed?,less\n"))
    assert [[(view.name, view.role) for view in draft.record.views()] for draft in own.drafts] == [
        [("old.png", "prior frontal"), ("new.png", "frontal")], [("a.png", "")], [("b.png", "")]]
    assert "1 questions are asked of a study at several dates" in str(own.notes)


@pytest.mark.parametrize("early, late", [
    ("12/05/2019", "13/02/2020"), ("5.12.2019", "13.02.2020"), ("T2", "T10"), ("9", "10"),
    ("2019-12-01 9:00", "2019-12-24")])
def test_dates_are_in_order_however_they_are_written(early, late, tmp_path):
    own = read(write(tmp_path, "image,study,date,question,answer\n"
                     f"new.png,S,{late},what?,less\nold.png,S,{early},what?,less\n"))
    assert [[(view.name, view.role) for view in draft.record.views()] for draft in own.drafts] == [
        [("old.png", "prior"), ("new.png", "")]]


def test_an_order_of_dates_that_is_not_known_is_refused_where_it_matters(tmp_path):
    text = "image,study,date,question,answer\n1.png,S,03/02/2020,what?,less\n2.png,{},04/05/2020,what?,less\n"
    with pytest.raises(UserError, match="whether 03/02/2020 begins with its day or its month is not known"):
        read(write(tmp_path, text.format("S")))
    assert len(read(write(tmp_path, text.format("S2"))).drafts) == 2


def test_a_column_of_files_is_one_of_images_whatever_it_is_called(tmp_path):
    own = read(write(tmp_path, "chemin;question;answer;patient\nct/1.png;what?;this;P1\n;what?;that;P1\n"))
    assert [[view.name for view in draft.record.views()] for draft in own.drafts] == [["ct/1.png"], []]
    assert "image is 'chemin'" in str(own.notes)
    own = read(write(tmp_path, "note;question;answer\nsee 1.png there;what?;this\n"))
    assert own.drafts[0].record.parts == () and "not used: note" in str(own.notes)


# ----------------------------------------------------------------------------- real ones

@pytest.mark.parametrize("name, count, images, task", [
    ("medxpertqa/eval/data/medxpertqa/input/medxpertqa_mm_input.jsonl", 2000, 2852, "choices"),
    ("medxpertqa/eval/data/medxpertqa_sampled/input/medxpertqa_sampled_text_input.jsonl", 244, 0, "choices"),
    ("medqa/data_clean/questions/US/4_options/phrases_no_exclude_test.jsonl", 1273, 0, "choices"),
    ("medmcqa/data/dev.json", 4183, 0, "choices"), ("slake/test.json", 2094, 2094, "")])
def test_real_files_are_read(name, count, images, task):
    folder, _, rest = name.partition("/")
    own = read(real(folder) / rest)
    assert (len(own.drafts), sum(len(draft.record.views()) for draft in own.drafts), own.task) == (count, images, task)
    assert all(draft.record.answer for draft in own.drafts if task)
