"""Multiple choice: how options are written and read, how likely a model finds them, and what its tables show."""

import json
import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
import transformers

import asking
import eval_vqa
from asking import Options, group_options, likelihoods_of, list_options, rate, rate_options, write_prompt
from data import Record, Tokenizer, View, make_batch
from eval_vqa import Config
from model import VLM, LlamaConfig, LLaMA, ViT, ViTConfig, init_weights
from plumbing.flags import UserError
from plumbing.shards import Shard
from prepare.datasets import multiple_choice
from prepare.leaks import guard
from tasks.choices import (LETTERS, TURNS, answers_of, blind_rows, choose, read, read_loosely, report, right_of, score,
                           stem_of, ways_of)
from tasks.evaluations import find_evaluations
from tasks.vqa import as_asked
from test_eval import TOKENIZER, drawing, encoded, write_questions
from test_evaluations import make_run

DRUGS = ("aspirin", "heparin", "warfarin sodium", "no treatment")


def choice(number, stem, options, right, **more):
    question, answer = multiple_choice(stem, options, right)
    return Record(str(number), question, answer, choices=tuple(options), **more)


def line(stem="which drug?", options=DRUGS, right=1):
    question, answer = multiple_choice(stem, options, right)
    return {"id": "0", "question": question, "answer": answer, "choices": list(options), "type": "", "image": ""}


WORDS = {"id": "1", "question": "does it help?", "answer": "no", "choices": ["yes", "no", "maybe"], "type": ""}


# ----------------------------------------------------------------------------- text

@pytest.mark.parametrize("text, place", [
    ("B", 1), ("b", 1), ("(B)", 1), ("B.", 1), ("B:", 1), ("b) heparin", 1), ("B. heparin", 1), ("B. aspirin", 1),
    (" C ", 2), ("heparin", 1), ("Heparin.", 1), ("WARFARIN  sodium", 2), ("no treatment", 3), ("", None),
    ("E. none", None), ("J", None),
    ("a drug", None), ("B12", None), ("aspirin or heparin", None), ("the answer is B", None), ("Bheparin", None),
    ("none", None), ("warfarin", None), ("I", None), ("B heparin", None)])
def test_strict_reading_guesses_nothing(text, place):
    assert read(line(), text) == place


def test_strict_reading_of_words_and_of_options_that_are_alike():
    assert [read(WORDS, text) for text in ("yes", "No.", "MAYBE")] == [0, 1, 2]
    assert [read(WORDS, text) for text in ("B", "A. yes", "no, it does")] == [None] * 3
    twice = line(options=("lung", "Lung", "liver"), right=2)
    assert [read(twice, text) for text in ("lung", "liver", "B")] == [None, 2, 1]


GERMS = ("H. pylori", "C. difficile", "B. cereus", "E")


@pytest.mark.parametrize("text, place", [
    ("H. pylori", 0), ("C. difficile", 1), ("b. cereus.", 2), ("E", 3), ("C. B. cereus", 2), ("B. C. difficile", 1),
    ("B", 1), ("C.", 2), ("B. fragilis", 1), ("E. coli", None), ("H", None)])
def test_an_option_that_looks_like_a_letter_is_read_by_its_text(text, place):
    assert read(line(options=GERMS), text) == place


def test_nothing_names_no_option():
    assert [read({**WORDS, "choices": ["", "no"]}, text) for text in ("", ".", " ", "no")] == [None, None, None, 1]


@pytest.mark.parametrize("text, place", [  # as MedEvalKit's judge_multi_choice (commit 9b12e3b3) reads them, run once
    ("B", 1), ("b.", 1), ("B. heparin", 1), ("(B)", 1), ("heparin", 1), ("the answer is C", 2),
    ("The answer is: D. no treatment", 3), ("Answer: b", 1), ("I think it is warfarin", 2), ("none", 3), ("", 0),
    ("A\n\nbecause aspirin helps", 0), ("because\n\nD. yes", 3), ("C: warfarin", 2), ("**Answer**: C", 2),
    ("final answer: a", 0), ("no treatment.", 3), ("aspirin or heparin", 1), ("heparine", 1), ("B) heparin", 1),
    ("the answer is obvious", 1), ("a", 0), ("x" * 400, 0), ("Answer: the answer is b", 1), ("e", 1),
    ("*answer*: d", 3), ("**answer:** b", 1), ("D, no treatment", 3),
    ("warfarin sodium", 2), ("option C", 2), ("C\nwarfarin", 2),
    ("The final answer is D", 3), ("Final answer: it is B. The final answer is C.", 2), ("bcd", 2), ("abcd. ", 0),
    ("<think>A</think><answer>D</answer>", 3), ("so \\boxed{C} is right", 2)])
def test_loose_reading_is_medevalkits(text, place):
    assert read_loosely(line(), text) == place


def test_a_question_is_its_stem_and_its_options():
    record = line("which  drug?".replace("  ", " "))
    assert stem_of(record) == ("which drug?", True)
    assert answers_of(record) == ["A. aspirin", "B. heparin", "C. warfarin sodium", "D. no treatment"]
    assert right_of(record) == 1
    assert stem_of(WORDS) == ("does it help?", False)
    assert answers_of(WORDS) == ["yes", "no", "maybe"] and right_of(WORDS) == 1
    assert right_of({**record, "answer": "E. other"}) == -1


def test_ways_turn_the_options_and_leave_the_question_out():
    ways = ways_of(line())
    assert list(ways) == ["no question", "turned 1", "turned 2", "turned 3"]
    assert ways["no question"][0]["question"] == "A. aspirin B. heparin C. warfarin sodium D. no treatment"
    turned, order = ways["turned 1"]
    assert turned["question"] == "which drug? A. heparin B. warfarin sodium C. no treatment D. aspirin"
    assert order == [1, 2, 3, 0] and turned["choices"] == [DRUGS[place] for place in order]
    assert {order[0] for name, (_, order) in ways.items() if name != "no question"} == {1, 2, 3}  # each is first once
    assert list(ways_of(WORDS)) == ["no question"] and ways_of(WORDS)["no question"][0]["question"] == ""
    two = ways_of(line(options=("yes", "no")))
    assert [order for _, order in two.values()] == [[0, 1], [1, 0], [1, 0], [1, 0]]


def test_blind_rows_are_the_best_constant_and_the_longest():
    records = [line(right=1), line(right=1), line(right=1), line(options=("a", "bb"), right=0)]
    rows = blind_rows(None, records)
    assert rows["commonest option"] == ["B. heparin"] * 3 + ["B. bb"]
    assert rows["longest option"] == ["C. warfarin sodium"] * 3 + ["B. bb"]
    assert blind_rows(None, [WORDS] * 3)["commonest option"] == ["no"] * 3


# ----------------------------------------------------------------------------- score and tables

def likelihoods(letter, whole=None, tokens=None, **order):
    return {"letter": list(letter), "whole": list(whole or letter), "tokens": tokens or [1] * len(letter), **order}


def test_each_reading_takes_its_own_option():
    entry = likelihoods([-1, -2, -3, -4], [-9, -2, -3, -4], [9, 1, 2, 5])
    assert choose(entry) == {"letter": 0, "whole": 1, "by token": 3}
    one = score({**line(), "likelihoods": {"as asked": entry}}, "A. aspirin")
    assert (one["accuracy"], one["letter"], one["whole"], one["by token"]) == (0, 0, 100, 0)
    assert math.isnan(score(line(), "B")["letter"]) and score(line(), "B")["accuracy"] == 100


def test_a_likelihood_belongs_to_its_option_in_whatever_order():
    record, (order, best) = line(right=1), ([1, 2, 3, 0], [-5.0, -1.0, -6.0, -7.0])
    options = Options(0, "model", "turned 1", order, [1, 5], [[10, 1], [11], [12, 2, 3], [13]], 1)
    values = np.array([-1.0, -0.5, -2.0, -3.0, -0.25, -0.25, -4.0])  # in the order of their places
    entry = likelihoods_of(options, [0, 1, 2, 3], values)
    assert entry == {"letter": [-4.0, -1.0, -2.0, -3.0], "whole": [-4.0, -1.5, -2.0, -3.5], "tokens": [1, 2, 1, 3],
                     "order": order}
    one = score({**record, "likelihoods": {"as asked": likelihoods(best), "turned 1": entry}}, "B")
    assert one["chosen"] == {"as asked": 1, "turned 1": 1}
    assert one["shown"] == {"as asked": 1, "turned 1": 0}
    assert one["ways"]["turned 1"]["letter"] == 100


def tables_of(records, entries, texts, capsys):
    scored = {"model": [score({**record, "likelihoods": ways}, text)
                        for record, ways, text in zip(records, entries, texts, strict=True)]}
    scored |= {row: [score(record, text) for record, text in zip(records, blind)]
               for row, blind in blind_rows(None, records).items()}
    count = len(records)
    tables = report("toy/test", scored, 0, records, [""] * count, np.arange(count), "questions")
    return tables, capsys.readouterr().out


def test_a_model_that_favours_a_letter_is_shown_up(capsys):
    generator = random.Random(0)
    records = [line(right=generator.randrange(4)) for _ in range(200)]

    def favours(record):  # A, wherever it stands
        ways = {"as asked": list(range(4))} | {way: order for way, (_, order) in ways_of(record).items()}
        return {way: likelihoods([0.0 if order.index(place) == 0 else -5.0 for place in range(4)], order=order)
                for way, order in ways.items()}

    tables, text = tables_of(records, [favours(record) for record in records], ["A"] * 200, capsys)
    orders = tables["orders"]
    assert orders["chosen"] == {"A": 100, "B": 0, "C": 0, "D": 0} and orders["same"] == 0
    assert orders["accuracy"] == {"A": 100, "B": 0, "C": 0, "D": 0} and orders["spread"] == 100
    assert sum(orders["by order"].values()) == pytest.approx(100)  # each option is first in one of the orders
    assert "a spread of 100.0" in text and "A 100.0%" in text and "the same option in all orders: 0.0%" in text
    assert tables["all"]["rows"]["options turned"]["letter"][0] == pytest.approx(
        (100 - orders["by order"]["as asked"]) / 3)

    def knows(record):  # the right one, wherever it stands
        right = right_of(record)
        return {way: likelihoods([0.0 if place == right else -5.0 for place in range(4)], order=order)
                for way, (_, order) in {"as asked": (0, [0, 1, 2, 3]), **ways_of(record)}.items()}

    tables, text = tables_of(records, [knows(record) for record in records], ["?"] * 200, capsys)
    assert tables["orders"]["spread"] == 0 and tables["orders"]["same"] == 100
    rows = tables["all"]["rows"]
    assert [rows["model"][metric][0] for metric in ("letter", "accuracy", "unreadable")] == [100, 0, 100]
    assert rows["no question"]["accuracy"] == [None] * 3 and rows["question adds"]["letter"][0] == 0
    first, second = tables["summary"]["lines"]
    assert (first["metric"], first["score"][0], first["unreadable"]) == ("accuracy", 0, 100)
    assert second["metric"] == "letter" and second["score"][0] == 100 and second["blind"][0] == "commonest option"
    assert second["unreadable"] is None
    json.dumps(tables)


@pytest.mark.parametrize("ways, rows", [
    (["turned 1"], ["options turned"]), (["no question"], ["no question", "question adds"]), (["my way"], []),
    (["no question", "turned 1", "turned 2", "turned 3"], ["no question", "options turned", "question adds"])])
def test_tables_of_some_ways_to_ask(ways, rows, capsys):
    records = [line(right=number % 4) for number in range(12)]
    entries = [{"as asked": likelihoods([-1, -2, -3, -4]), **({way: likelihoods([-1, -2, -3, -4]) for way in ways}
                                                              if number % 2 else {})} for number in range(12)]
    tables, _ = tables_of(records, entries, ["B"] * 12, capsys)
    known = {row for row, cells in tables["all"]["rows"].items() if cells["letter"][0] is not None}
    assert known == {"model", *rows} and bool(tables["orders"]) == (len(ways) == 4)


def test_tables_of_answers_alone_have_no_likelihoods(capsys):
    records = [line(right=number % 4) for number in range(12)]
    tables, text = tables_of(records, [{}] * 12, ["B"] * 12, capsys)
    assert tables["orders"] is None and tables["all"]["rows"]["model"]["letter"] == [None] * 3
    assert [one["metric"] for one in tables["summary"]["lines"]] == ["accuracy"]
    assert tables["all"]["rows"]["model"]["accuracy"][0] == 25 and "options turned" not in tables["all"]["rows"]


# ----------------------------------------------------------------------------- likelihoods

def words(generator, count):
    return " ".join(generator.choices(("fever", "left", "lung", "cyst", "no", "pain", "A", "old", "what"), k=count))


@pytest.fixture(scope="module")
def text_shards(tmp_path_factory):
    """500 questions of one to six options, with and without letters, some behind a context."""
    folder, generator = tmp_path_factory.mktemp("choices"), random.Random(0)
    records = []
    for number in range(500):
        options = [f"{words(generator, generator.randint(1, 6))} {place}" for place in range(generator.randint(2, 6))]
        if number % 5 == 0:
            records.append(Record(str(number), words(generator, 8), "maybe", choices=("yes", "no", "maybe"),
                                  context=words(generator, 30)))
        else:
            stem, right = words(generator, generator.randint(3, 40)), generator.randrange(len(options))
            records.append(choice(number, stem, options, right))
    write_questions(folder, "text", {"train": records[:3], "test": records}, "text questions", task="choices")
    return folder


def build():
    """A model of the test tokenizer's vocabulary that answers at random."""
    torch.manual_seed(0)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=TOKENIZER).get_piece_size()
    model = VLM(ViT(ViTConfig(image_size=32, width=64, depth=1)), LLaMA(LlamaConfig(
        pieces, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2)))
    model.apply(init_weights)
    for parameter in model.language.parameters():  # so that likelihoods differ by more than noise
        parameter.data *= 3 if parameter.ndim > 1 else 1
    return model.eval()


def open_text(folder, tmp_path, name="text"):
    (tmp_path / "tokenizer.model").write_bytes(TOKENIZER)
    return Shard(folder / name / "test"), Tokenizer(tmp_path / "tokenizer.model")


def test_likelihoods_are_those_of_transformers_one_option_at_a_time(text_shards, tmp_path):
    shard, tokenizer = open_text(text_shards, tmp_path)
    model = build()
    config = model.language.config
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta})).eval()
    theirs.load_state_dict(model.language.state_dict())
    rated = rate_options(model, tokenizer, shard, len(shard), {"model": np.zeros(0, int)})["model"]
    worst = 0.0
    with torch.no_grad():
        for number, record in enumerate(shard.read_records()):
            prompt = shard.read_sample(number).prompt().tolist()
            for place, answer in enumerate(answers_of(record)):
                tokens = tokenizer.encode(answer)
                logits = theirs(input_ids=torch.tensor([prompt + tokens])).logits[0].float()
                values = F.log_softmax(logits, -1)[len(prompt) - 1:-1].gather(1, torch.tensor(tokens)[:, None])[:, 0]
                entry = rated[number]["as asked"]
                assert entry["tokens"][place] == len(tokens)
                letter = values[:len(tokenizer.encode("A"))].sum() if stem_of(record)[1] else values.sum()
                worst = max(worst, abs(entry["whole"][place] - values.sum().item()),
                            abs(entry["letter"][place] - letter.item()))
    assert worst < 1e-4


def test_a_letter_is_as_many_tokens_as_tell_the_options_apart():
    assert asking.count_letter([[5, 1], [6, 1]]) == 1 and asking.count_letter([[3, 5, 1], [3, 6, 1], [3, 7]]) == 2
    assert asking.count_letter([[3, 5], [3, 5, 1]]) == 0


def test_shared_prompts_are_unshared_ones_and_the_order_of_options_changes_no_bit(text_shards, tmp_path):
    shard, tokenizer = open_text(text_shards, tmp_path)
    model, tokens = build(), np.zeros(0, np.int64)
    for options in list(list_options(shard, tokenizer, 40, {"model": tokens})):
        group, places = group_options(shard, options, tokens)
        values = rate(model, [group], tokenizer.vocab_size)
        alone = np.concatenate([rate(model, [group_options(shard, replace(
            options, answers=[options.answers[place]]), tokens)[0]], tokenizer.vocab_size) for place in places])
        assert np.abs(values - alone).max() < 1e-5
        entry = likelihoods_of(options, places, values)
        order = random.Random(options.number).sample(range(len(places)), len(places))
        moved = replace(options, answers=[options.answers[place] for place in order],
                        order=[options.order[place] for place in order])
        group, places = group_options(shard, moved, tokens)
        again = likelihoods_of(moved, places, rate(model, [group], tokenizer.vocab_size))
        assert {**again, "order": 0} == {**entry, "order": 0}  # to the last bit that is written


def test_a_prompt_in_its_own_words_is_the_stored_one(tmp_path):
    image = encoded(drawing(1))
    records = [choice(0, "what is it?", DRUGS, 0, image=image, image_name="a.png"),
               choice(1, "which of the two?", DRUGS, 1, context="old man", parts=(
                   "Two films.", View(image, "a.png", "before"), View(encoded(drawing(2)), "b.png", "now"))),
               choice(2, "and without?", DRUGS, 2, image=image, image_name="a.png")]
    write_questions(tmp_path, "mixed", {"train": records, "test": records}, task="choices")
    shard, tokenizer = open_text(tmp_path, tmp_path, "mixed")
    for number, record in enumerate(shard.read_records()):
        prompt = shard.read_sample(number).prompt()
        assert write_prompt(tokenizer, record, (-1 - prompt[prompt < 0]).tolist()) == prompt.tolist()
    rated = rate_options(build(), tokenizer, shard, 3, {"model": np.arange(2), "image shuffled": np.array([1, 0])})
    assert list(rated["model"][0]) == ["as asked", "no question", *(f"turned {turn + 1}" for turn in range(TURNS))]
    assert list(rated["image shuffled"][0]) == ["as asked"]
    assert rated["model"][0]["as asked"]["whole"] != rated["image shuffled"][0]["as asked"]["whole"]


def test_micro_batches_change_nothing(text_shards, tmp_path, monkeypatch):
    shard, tokenizer = open_text(text_shards, tmp_path)
    model, shown = build(), {"model": np.zeros(0, int)}
    whole = rate_options(model, tokenizer, shard, 30, shown)["model"]
    monkeypatch.setattr(asking, "MICRO_BATCH_TOKENS", 1)
    single = rate_options(model, tokenizer, shard, 30, shown)["model"]
    for first, second in zip(whole, single, strict=True):
        assert first.keys() == second.keys()
        for way in first:
            assert np.allclose(first[way]["whole"], second[way]["whole"], atol=2e-5)
            assert first[way]["tokens"] == second[way]["tokens"] and first[way].get("order") == second[way].get("order")


def test_padding_to_whole_blocks_changes_nothing(text_shards, tmp_path, monkeypatch):
    """As on a GPU, where FlexAttention sees blocks of 128 tokens."""
    shard, tokenizer = open_text(text_shards, tmp_path)
    model, shown = build(), {"model": np.zeros(0, int)}
    whole = rate_options(model, tokenizer, shard, 10, shown)["model"]
    monkeypatch.setattr(asking, "make_batch", lambda groups, multiple: make_batch(groups, 128))
    for first, second in zip(whole, rate_options(model, tokenizer, shard, 10, shown)["model"], strict=True):
        assert all(np.allclose(first[way]["whole"], second[way]["whole"], atol=2e-5) for way in first)


def test_likelihoods_that_are_no_numbers_choose_nothing(text_shards, tmp_path):
    shard, tokenizer = open_text(text_shards, tmp_path)
    model = build()
    model.language.lm_head.weight.data[5] = math.nan
    with pytest.raises(UserError, match="by no number"):
        rate_options(model, tokenizer, shard, 2, {"model": np.zeros(0, int)})


def test_options_are_of_no_conversation(tmp_path):
    record = choice(0, "which?", DRUGS, 1, turns=(("and now?", "none"),))
    with pytest.raises(AssertionError):
        write_questions(tmp_path, "quiz", {"test": [record]}, "text questions", task="choices")


class FavoursA(VLM):
    """A model that says "A" whatever it is asked."""

    def forward(self, batch):
        logits = super().forward(batch)
        logits[batch.targets == self.letter, self.letter] += 100
        return logits


def test_the_permutation_spread_shows_a_model_that_favours_a(text_shards, tmp_path, capsys):
    shard, tokenizer = open_text(text_shards, tmp_path)
    model = build()
    model.__class__, model.letter = FavoursA, tokenizer.encode("A")[-1]
    records = [as_asked(record) for record in shard.read_records()[:200]]
    entries = rate_options(model, tokenizer, shard, 200, {"model": np.zeros(0, int)})["model"]
    tables, text = tables_of(records, entries, ["A"] * 200, capsys)
    orders = tables["orders"]
    assert orders["chosen"]["A"] == 100 and orders["same"] == 0 and orders["spread"] == 100
    assert orders["questions"] == 160 and "chosen: A 100.0%" in text


# ----------------------------------------------------------------------------- from the command line

def test_an_evaluation_of_choices_has_every_row(tmp_path, capsys):
    records = [choice(number, f"which drug for figure {number}?", DRUGS, number % 4, image=encoded(drawing(number)),
                      image_name=f"{number}.png", type="drug" if number % 2 else "dose") for number in range(8)]
    shards = tmp_path / "shards"
    write_questions(shards, "quiz", {"train": records[:4], "test": records[4:]}, task="choices")
    guard(shards, "drop")
    run = make_run(tmp_path / "run", shards, "quiz")
    eval_vqa.main(Config(run=str(run), shards_dir=str(shards), data="quiz", max_new_tokens=4))
    text = capsys.readouterr().out
    assert "quiz/test: 4 multiple-choice questions about 4 images" in text
    assert "by letter, in 4 orders of the options" in text
    (folder,) = find_evaluations(run)
    lines = [json.loads(row) for row in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [list(one["likelihoods"]) for one in lines] == [
        ["as asked", "no question", "turned 1", "turned 2", "turned 3"]] * 4
    assert all(one["choices"] == list(DRUGS) for one in lines)
    rows = json.loads((folder / "results.json").read_text())["results"]["quiz/test"]["all"]["rows"]
    assert list(rows) == ["model", "image shuffled", "no question", "options turned", "the image adds", "question adds",
                          "commonest option", "longest option"]
    assert rows["commonest option"]["accuracy"][0] == 25 and rows["longest option"]["accuracy"][0] == 25
    assert Counter(one["answer"][0] for one in lines) == Counter(LETTERS[:4])
