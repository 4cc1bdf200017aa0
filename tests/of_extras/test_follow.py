"""look/follow.py, bench/progress.py and what the scripts in extras/ need: what goes wrong is one line."""

import re

import pytest
import torch

import train_vlm
from data import Record, Tokenizer
from extras.bench import progress
from extras.look import follow
from plumbing.flags import UserError, parse_flags, require_packages
from plumbing.shards import Shard
from prepare import sample
from tasks.reasoning import ANSWER, REASONING
from test_eval import TOKENIZER, write_questions
from test_harmony import write_tokenizer
from test_leaks import drawing, encoded
from test_train import flags, prepare_sample
from zoo.harmony import HarmonyTokenizer


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("follow")
    write_questions(folder, "scans", {"test": [("what is this?", "a lung", 1), ("why?", "no", 2)]})
    (folder / "tokenizer.model").write_bytes(TOKENIZER)
    shard = Shard(folder / "scans" / "test")
    shard.samples = shard.samples.copy()
    shard.samples["images"][1] = 0  # as of a question about a text
    return shard, Tokenizer(folder / "tokenizer.model")


@pytest.mark.parametrize("argument, told", [
    ("--number=2", "--number=2: .*scans/test has samples 0 to 1"), ("--number=5000", "has samples 0 to 1"),
    ("--number=-1", "--number=-1: 0 or more"), ("--number=1", "--number=1: not one question about one image in")])
def test_a_number_that_is_not_there_is_told_in_one_line(argument, told, split):
    with pytest.raises(UserError, match=told) as caught:
        follow.require_sample(*split, parse_flags(follow.Config, [argument]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words, told", [
    (["--data=xyzzy"], "--data: no raw files of 'xyzzy' in raw"),
    (["--data=path_vqa", "--raw_dir=nowhere"], "--data: no raw files of 'path_vqa' in nowhere"),
    (["--data=sample", "--split=test"], "raw: no 'xyzzy' in sample's test split")])
def test_a_sample_that_the_raw_files_have_not_is_told_in_one_line(words, told, monkeypatch):
    monkeypatch.setattr(sample, "SPLITS", {"train": 1, "test": 1})  # images a class, each of which is drawn
    with pytest.raises(UserError, match=re.escape(told)):
        follow.find_record("xyzzy", parse_flags(follow.Config, words))


def test_a_sample_is_followed_to_its_loss_and_its_answer(tmp_path, capsys):
    """Its loss in nats is the mean of its tokens'; shapes are the sample's 50 image tokens of 128, then words."""
    shards = prepare_sample(tmp_path / "shards", "--limit=16", only="sample,sample_boxes")
    train_vlm.main(flags(shards, tmp_path / "run", max_steps=1, held_out=0))
    capsys.readouterr()
    follow.main(follow.Config(run=str(tmp_path / "run"), data="sample", number=5, shards_dir=str(shards)))
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:17].strip(): line[17:] for line in lines}
    prompt, answer = (words.split(", ") for words in rows["Tokenizer.encode"].strip("[]").split("] | ["))
    losses = [float(line.split()[-2]) for line in lines if line.startswith("  loss of ")]
    assert len(losses) == len(answer) + 1
    assert float(rows["VLM.loss"].split()[0]) == pytest.approx(sum(losses) / len(losses), abs=1e-3)
    T = 1 + 50 + len(prompt) + len(answer)
    first = T - 1 - len(answer)  # what predicts the answer
    assert rows["Mixture.pack"].startswith(f"tokens ({T},), 50 of them of the image; supervised at [{first}, ")
    assert rows["VLM.projector"] == "(50, 128)" and rows["LLaMA.embed"] == f"({T}, 128)"
    assert list(rows)[-1] == "bleu1" and rows["generate"].startswith("[")
    follow.main(follow.Config(run=str(tmp_path / "run"), data="sample_boxes", number=1, shards_dir=str(shards)))
    *_, last = capsys.readouterr().out.splitlines()
    assert last == "boxes.score      F-IoU 0.0"


@pytest.mark.parametrize("place", ["none", "before", "analysis"])
def test_an_answer_stands_behind_its_channel_and_what_the_split_has_of_its_reasoning(place, tmp_path, capsys,
                                                                                      monkeypatch):
    path = write_tokenizer(tmp_path / "tokenizer.json")
    record = Record("1", "what is shown?", "a lung", image=encoded(drawing(0)), reasoning="it is  large")
    write_questions(tmp_path / "shards", "scans", {"test": [record]}, tokenizer=path.read_bytes(), reasoning=place)
    tokenizer = HarmonyTokenizer(path)
    monkeypatch.setattr(follow, "open_trained_run", lambda run: (None, None, None, tokenizer))
    monkeypatch.setattr(follow, "find_record", lambda name, config: record)
    monkeypatch.setattr(follow, "load_vlm", lambda checkpoint: torch.nn.Identity())
    monkeypatch.setattr(follow, "follow_model", lambda *arguments: None)
    follow.main(follow.Config(data="scans", shards_dir=str(tmp_path / "shards")))
    shown = capsys.readouterr().out
    answer = tokenizer.encode(f"{REASONING} it is large {ANSWER} a lung" if place == "before" else "a lung")
    thought = [tokenizer.channel, *tokenizer.encode("analysis"), tokenizer.message, *tokenizer.encode("it is large"),
               *tokenizer.end, *tokenizer.begin("assistant")] if place == "analysis" else []
    before = len([*tokenizer.end, *tokenizer.begin("assistant"), *thought, *tokenizer.lead])
    assert f"{before} up to the answer, {len(answer)} of answer, 1 that end it" in shown


def test_progress_tells_each_row_and_what_is_left(capsys, monkeypatch):
    clock = iter([0, 60, 120, 180])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    rows = progress.Progress(3, "rows")
    for name in "abc":
        rows.row(name)
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [
        "1 of 3 rows: a; about 2 minutes to go", "2 of 3 rows: b; about 60 seconds to go", "3 of 3 rows: c"]


def test_many_rows_are_told_now_and_then(capsys, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    rows = progress.Progress(0, "states", pause=10)
    for _ in range(25):
        rows.row()
    assert capsys.readouterr().err.splitlines() == ["1 states", "11 states", "21 states"]


def test_a_missing_package_is_told_with_what_to_run(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["training.py"])
    require_packages("tests/requirements.txt", "json")
    with pytest.raises(SystemExit) as stopped:
        require_packages("tests/requirements.txt", "json", "xyzzy")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "training.py: no xyzzy here; run `pip install -r tests/requirements.txt`\n"
