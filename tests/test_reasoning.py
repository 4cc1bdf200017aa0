"""Answers with their reasoning: written as one text, parted, prepared, rewarded and scored apart."""

import json

import numpy as np
import pytest

import eval_vqa
from data import Record, Tokenizer
from eval_vqa import Config
from plumbing.shards import Shard
from prepare.datasets import multiple_choice
from prepare.leaks import guard
from tasks.evaluations import find_evaluations
from tasks.reasoning import answer_of, part, report, write
from tasks.rewards import parse, reward
from test_eval import write_questions
from test_evaluations import make_run


@pytest.mark.parametrize("place", ["before", "after"])
def test_what_is_written_is_parted_again(place):
    text = write("B. heparin", "it acts at once.", place)
    assert part(text, place) == ("B. heparin", "it acts at once.")
    record = {"reasoning": {"place": place, "text": "it acts at once."}}
    assert answer_of(record, text) == "B. heparin" and answer_of({}, text) == text


@pytest.mark.parametrize("text, place, parted", [
    ("Reasoning: a. Answer: b. Answer: C", "before", ("C", "a. Answer: b.")),  # the last one is what it ends with
    ("Reasoning: it goes on", "before", ("", "it goes on")), ("B", "before", ("B", "")), ("", "before", ("", "")),
    ("B", "after", ("B", "")), ("Reasoning: x", "after", ("", "x")), ("Answer:", "before", ("", ""))])
def test_texts_that_lack_a_part(text, place, parted):
    assert part(text, place) == parted


@pytest.mark.parametrize("text, answer", [
    ("Reasoning: A. no. Answer: B. b", "B. b"), (" Reasoning: it goes on", ""), ("yes Reasoning: it is", "yes"),
    ("the reason: x Answer: y", "the reason: x Answer: y"), ("B", "B")])
def test_a_choice_without_reasoning_in_the_data_is_read_behind_that_of_the_model(text, answer):
    assert answer_of({"choices": ["a", "b"]}, text) == answer and answer_of({}, text) == text


def test_a_reward_sees_the_answer_alone():
    question, answer = multiple_choice("which?", ("one", "two"), 1)
    record = {"question": question, "answer": answer, "choices": ["one", "two"],
              "reasoning": {"place": "before", "text": "x"}}
    assert reward(parse("letter"), record, "Reasoning: B. two. Answer: A", 0) == 0
    assert reward(parse("letter"), record, "Reasoning: A. one. Answer: B. two", 0) == 1
    assert reward(parse("letter"), {**record, "reasoning": None}, "two", 0) == 1


def test_reasoning_is_scored_apart(capsys):
    records = [{"reasoning": {"place": "before", "text": "it acts at once"}}] * 2 + [{}]
    answers = {"model": ["Reasoning: it acts at once Answer: A", "Reasoning: B", "A"]}
    scored = {"model": [{"accuracy": 100.0}, {"accuracy": 0.0}, {"accuracy": 100.0}]}
    table = report(answers, records, scored, "accuracy", np.arange(3))
    assert table["model"]["given"] == 100  # of the second all is reasoning: it never answers
    assert table["model"]["ROUGE-L"][0] == 50 and table["model"]["right with it"] == 50
    assert "in 100.0% of 2 answers" in capsys.readouterr().out
    assert report(answers, [{}] * 3, scored, "accuracy", np.arange(3)) == {} and not capsys.readouterr().out


@pytest.mark.parametrize("place", ["before", "after", "none"])
def test_reasoning_is_trained_on_and_kept_apart(tmp_path, place):
    records = [Record(str(number), *multiple_choice(f"which of {number}?", ("one", "two"), number % 2),
                      choices=("one", "two"), reasoning="for  it is" if number else "") for number in range(4)]
    shards = tmp_path / "shards"
    write_questions(shards, "quiz", {"train": records, "test": records}, "text questions", task="choices",
                    reasoning=place)
    test = Shard(shards / "quiz/test")
    lines = test.read_records()
    assert [line["answer"] for line in lines] == ["A. one", "B. two", "A. one", "B. two"]
    assert [line.get("reasoning") for line in lines][:2] == [
        None, None if place == "none" else {"place": place, "text": "for it is"}]
    (begin, end), sample = test.read_sample(1).spans[0], test.read_sample(1)
    text = Tokenizer(shards / "quiz/tokenizer.model").decode(sample.tokens[begin:end - 1])
    assert text == ("B. two" if place == "none" else write("B. two", "for it is", place))
    guard(shards, "drop")
    run = make_run(tmp_path / "run", shards, "quiz")
    eval_vqa.main(Config(run=str(run), shards_dir=str(shards), data="all", max_new_tokens=4))
    (folder,) = find_evaluations(run)
    tables = json.loads((folder / "results.json").read_text())["results"]["quiz/test"]
    assert bool(tables["reasoning"]) == (place != "none")
    assert tables["all"]["rows"]["commonest option"]["accuracy"][0] == 50  # whatever the data's answers begin with
    assert (run / "eval/table.txt").is_file()
    if place != "none":  # what is right by its answer alone
        lines = [{"dataset": "quiz/test", "id": line["id"], "prediction": write(line["answer"], "A. B.", place)}
                 for line in lines]
        (tmp_path / "theirs.jsonl").write_text("\n".join(map(json.dumps, lines)))
        eval_vqa.main(Config(predictions=str(tmp_path / "theirs.jsonl"), shards_dir=str(shards)))
        (folder,) = find_evaluations(tmp_path / "eval")
        tables = json.loads((folder / "results.json").read_text())["results"]["quiz/test"]
        assert tables["all"]["rows"]["model"]["accuracy"][0] == 100  # that of the first, which has none here, too
        assert tables["reasoning"]["model"]["right with it"] == 100
