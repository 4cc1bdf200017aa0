"""extras/bench/choices.py: all ways do the same work, what they cost is counted, and a mistake stops the table."""

import numpy as np
import pytest
import torch

from data import Record, Tokenizer
from extras.bench import choices
from extras.bench.peers import make_peer
from plumbing.flags import UserError
from plumbing.shards import Shard
from test_choices import DRUGS, choice
from test_eval import TOKENIZER, write_questions

CONFIG = choices.Config(data="quiz", hidden_size=64, layers=2, image_size=32, studies=5, new_tokens=6, batch_size=2,
                        rounds=1, threads=torch.get_num_threads())
WAYS = ["ours", "one forward an option, batch of 1", "one forward an option, batch of 8", "prompt kept"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A shard of ten questions: nine with letters, of two to four options, one of yes, no and maybe."""
    folder, words = tmp_path_factory.mktemp("choices"), "fever left lung cyst no pain old what".split()
    records = [choice(number, f"which drug for {' '.join(words[:number])}?", DRUGS[:2 + number % 3], number % 2)
               for number in range(9)] + [Record("9", "does it help?", "maybe", choices=("yes", "no", "maybe"))]
    write_questions(folder, "quiz", {"test": records}, "text questions", task="choices")
    (folder / "tokenizer.model").write_bytes(TOKENIZER)
    return folder


@pytest.fixture(scope="module")
def parts(folder):
    """(model, transformers' LLaMA, tokenizer, shard)."""
    tokenizer = Tokenizer(folder / "tokenizer.model")
    model = choices.build(CONFIG, tokenizer.vocab_size, tokenizer.stops)
    return model, choices.make_llama(model).eval(), tokenizer, Shard(folder / "quiz" / "test")


@pytest.fixture()
def alone(monkeypatch):
    """Without lm_eval, which takes long to import."""
    monkeypatch.setattr(choices, "find_spec", lambda name: None)


def test_all_ways_find_the_same_options_equally_likely_and_their_work_is_counted(parts, alone):
    model, llama, tokenizer, shard = parts
    ways = choices.ways_to_rate(model, llama, tokenizer, shard, 10)
    assert list(ways) == WAYS
    seconds, work, rated = choices.measure(ways, (model.language, llama), 2)
    assert choices.require_alike(rated) < 1e-4
    whole = rated["prompt kept"]["whole"]
    assert [len(some) for some in whole] == [2, 3, 4] * 3 + [3]
    assert np.std(np.concatenate(whole)) > 1  # else it would not show which option is which
    asked = list(choices.list_options(shard, tokenizer, 10, {choices.ROW: np.zeros(0, int)}))
    rows = [len(options.prompt) + len(answer) - 1 for options in asked for answer in options.answers]
    answers = [[len(answer) for answer in options.answers] for options in asked]
    assert tuple(work["one forward an option, batch of 1"]) == (sum(rows), sum(rows))
    padded = sum(8 * some[0] if len(some) == 8 else len(some) * some[0] for some in np.split(
        np.sort(rows)[::-1], range(8, len(rows), 8)))
    assert tuple(work["one forward an option, batch of 8"]) == (padded, padded)
    behind = sum(len(lengths) * (max(lengths) - 1) for lengths in answers)
    assert tuple(work["prompt kept"]) == (sum(len(one.prompt) for one in asked) + behind, len(asked) + behind)
    given, logits = work["ours"]
    assert logits == sum(map(sum, answers)) and given < work["one forward an option, batch of 1"][0] / 2
    assert all(some.shape == (2, 2) and (some > 0).all() for some in seconds.values())
    assert not model.language._forward_hooks and not llama._forward_hooks


def test_ours_asks_in_one_order_alone(parts, monkeypatch):
    model, _, tokenizer, shard = parts
    seen, rate = [], choices.rate_options

    def spy(*inputs):
        seen.extend(rate(*inputs)[choices.ROW])
        return {choices.ROW: seen}

    monkeypatch.setattr(choices, "rate_options", spy)
    choices.rate_ours(model, tokenizer, shard, 4)
    assert [list(entry) for entry in seen] == [["as asked"]] * 4 and not any("order" in one["as asked"] for one in seen)


def test_lm_eval_finds_the_same_and_answers_letters_in_one_pass(parts):
    pytest.importorskip("lm_eval")
    model, llama, tokenizer, shard = parts
    ways = choices.ways_to_rate(model, llama, tokenizer, shard, 9)
    _, work, rated = choices.measure(ways, (model.language, llama), 1)
    assert choices.require_alike(rated) < 1e-4
    assert [way for way in rated if "letter" in rated[way]] == ["ours", "lm_eval, letters alone, batch of 1",
                                                               "lm_eval, letters alone, batch of 8"]
    for size in (1, 8):
        assert tuple(work[f"lm_eval, batch of {size}"]) == tuple(work[f"one forward an option, batch of {size}"])
    prompts = sum(len(shard.read_sample(number).prompt()) for number in range(9))
    spent = work["lm_eval, letters alone, batch of 1"][0]
    assert prompts <= spent <= 9 + prompts  # one pass a question; a letter of two tokens has its first in there


def test_a_way_that_differs_stops_the_table():
    ours = {"whole": [[-1.0, -2.0], [-3.0]], "letter": [[-1.0, -1.0], [-2.0]]}
    assert choices.require_alike({"ours": ours, "b": {"letter": [[-1.0, -1.0005], [-2.0]]}}) == pytest.approx(5e-4)
    for other in ({"whole": [[-2.0, -1.0], [-3.0]]}, {"whole": [[-1.0, -2.0], [-3.002]]}):
        with pytest.raises(AssertionError, match="b: a log-probability of a whole option differs by"):
            choices.require_alike({"ours": ours, "b": other})


def test_reports_are_those_of_transformers(parts):
    model, _, tokenizer, _ = parts
    studies = choices.draw_studies(CONFIG, tokenizer)
    shown = [[-1 - token for token in studies.read_sample(number).prompt() if token < 0] for number in range(5)]
    assert shown == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert len({studies.read_image(number).tobytes() for number in range(10)}) == 10
    assert studies.read_image(9).shape == (32, 32, 3)
    assert len({len(studies.read_sample(number).prompt()) for number in range(5)}) > 1  # so that there is padding
    peer = make_peer(model, None, tokenizer.stops, model.encode_images).eval()
    ways = choices.ways_to_report(model, peer, studies, tokenizer.stops, CONFIG)
    assert list(ways) == ["ours", "generate, batch of 8", "generate, batch of 2"]
    _, work, given = choices.measure(ways, (model.language, peer.model), 1)
    assert given["ours"] == given["generate, batch of 8"] == given["generate, batch of 2"]
    assert [len(answer) for answer in given["ours"]] == [6] * 5 and len({*map(tuple, given["ours"])}) > 3
    assert all(logits == 5 * 6 for _, logits in work.values())


def test_the_tables_are_printed_with_their_ratios(capsys):
    seconds = {"ours": np.array([[2.0, 3.0], [4.0, 3.0], [3.0, 5.0]]), "peer": np.array([[9.0, 6.0]] * 3)}
    choices.print_table(seconds, {"ours": (1200, 30), "peer": (5000, 5000)}, 30, "questions")
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| ours | 10.00 | 3.0 (2.0 to 4.0) | 3.0 | 1,200 | 30 | 1.00 | 1.00 |"
    assert lines[3] == "| peer | 3.33 | 9.0 (9.0 to 9.0) | 6.0 | 5,000 | 5,000 | 3.00 | 2.00 |"


def test_main_prints_both_tables_and_refuses_other_data(folder, alone, capsys, monkeypatch):
    monkeypatch.setattr(choices, "FIRST", 4)
    flags = {**vars(CONFIG), "shards_dir": str(folder), "limit": 5}
    choices.main(choices.Config(**flags))
    out = capsys.readouterr().out
    assert "5 questions of quiz, 14 options" in out and "| prompt kept |" in out and "threads" in out
    assert "5 are the same as transformers'" in out and "| generate, batch of 8 |" in out
    with pytest.raises(UserError, match="--hidden_size=65: no multiple of 64"):
        choices.main(choices.Config(**{**flags, "hidden_size": 65}))
    write_questions(folder, "plain", {"test": [Record("1", "what?", "this")]}, "text questions")
    with pytest.raises(UserError, match="--data=plain: not of multiple choice"):
        choices.main(choices.Config(**{**flags, "data": "plain"}))


def test_reports_that_differ_stop_the_table(parts, monkeypatch):
    monkeypatch.setattr(choices, "answer_ours", lambda *inputs: [[5] * 6] * 5)
    with pytest.raises(AssertionError, match="only 0 of 5 reports are the same"):
        choices.compare_reports(CONFIG, parts[2], parts[0])
