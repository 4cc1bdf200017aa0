"""
Whole evaluations by a tiny model: where they are put, what they stand on, what is known of what the run
has seen, and what happens on a disk that is full, read-only, or fails.
"""

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval_vqa
from data import Record, Tokenizer
from eval_vqa import Config
from generate import Answer, finished_groups, generate
from model import VLM, LlamaConfig, LLaMA, ViT, ViTConfig, init_weights
from plumbing import devices
from plumbing.files import find_run, seal
from plumbing.flags import UserError, parse_flags
from plumbing.leaks import read_leaks
from plumbing.shards import Shard
from prepare.leaks import guard
from tasks import evaluations
from tasks.evaluations import choose_evaluations, find_evaluations, read_evaluation, read_predictions
from tasks.splits import group_questions, read_groups
from test_eval import TOKENIZER, describe, study, write_questions
from weights import load_vlm, save_vlm

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = {"train": [(f"is figure {n} large?", "no" if n % 3 else "yes", n) for n in range(12)],
             "test": [(f"is figure {n} large?", "no", n) for n in range(100, 106)] + [
                 ("is figure 0 large?", "yes", 106), ("which organ?", "a lung", 107)]}


def make_run(folder, shards, data="learn", step=1, seed=0, size=32, **facts):
    """A run as train_vlm.py leaves it, of a tiny model that answers at random."""
    torch.manual_seed(seed)
    train = Shard(shards / data.split(",")[0] / "train")
    model = VLM(ViT(ViTConfig(image_size=size, width=64, depth=1)),
                LLaMA(LlamaConfig(train.manifest["vocab_size"], hidden_size=32, intermediate_size=32,
                                  num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)))
    model.apply(init_weights)
    record = describe(shards, data.split(","))
    record["flags"]["max_length"] = 256
    record["inputs"]["tokenizer"] = train.manifest["tokenizer_sha256"]
    save_vlm(model, folder / "partial")
    seal(folder / "partial", folder / f"step_{step:06d}", step=step, **record, image=train.manifest["image"],
         **facts)
    (folder / "tokenizer.model").write_bytes(TOKENIZER)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(shards, run) that nobody changes."""
    folder = tmp_path_factory.mktemp("evaluations")
    shards = folder / "shards"
    write_questions(shards, "learn", QUESTIONS)
    write_questions(shards, "other", {"train": [("how many?", "two", 50)],
                                      "test": [("how many?", "three", 60), ("is it?", "yes", 61)]})
    guard(shards, "drop")
    return shards, make_run(folder / "run", shards)


@pytest.fixture
def evaluate(made, tmp_path):
    """evaluate(**flags) evaluates a copy of the run and returns its evaluations' folders, newest first."""
    run = shutil.copytree(made[1], tmp_path / "run")

    def evaluate(**flags):
        eval_vqa.main(Config(**{"run": str(run), "shards_dir": str(made[0]), "data": "learn",
                                "max_new_tokens": 2, **flags}))
        return find_evaluations(flags.get("out") or run)

    evaluate.run = run
    return evaluate


def files_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file()}


# ----------------------------------------------------------------------------- places

def test_evaluations_stand_side_by_side(evaluate, capsys):
    (first,) = evaluate()
    assert first == evaluate.run / "eval/step_000001_learn_test_2_tokens"
    assert str(first) in capsys.readouterr().out
    before = files_in(first)
    for flags, name in [({"limit": 3}, "learn_test_first_3_2_tokens"),
                        ({"data": "other"}, "other_test_2_tokens"),
                        ({"split": "train"}, "learn_train_2_tokens"),
                        ({"seed": 1}, "learn_test_2_tokens_seed_1"),
                        ({"blind": "none"}, "learn_test_blind_none_2_tokens"),
                        ({"temperature": 0.5}, "learn_test_2_tokens_temperature_0.5")]:
        newest = evaluate(**flags)[0]
        assert newest.name == f"step_000001_{name}"
        assert files_in(first) == before
    assert len(find_evaluations(evaluate.run)) == 7
    several = evaluate(data="other, learn,other", limit=2)
    assert {folder.name for folder in several[:2]} == {
        f"step_000001_{name}_test_first_2_2_tokens" for name in ("learn", "other")}


def test_the_same_evaluation_takes_the_place_of_the_former(evaluate):
    (first,) = evaluate()
    (first / "answers.html").write_text("a page about the former answers")
    os.utime(first / "results.json", (1, 1))
    before = files_in(first)
    assert evaluate() == [first]
    after = files_in(first)
    assert after.keys() == before.keys() - {"answers.html"}
    assert all(after[name] == before[name] for name in after if name != "results.json")
    assert (first / "results.json").stat().st_mtime > 1


def test_what_only_the_data_or_the_checkpoint_tell_apart_gets_a_number(evaluate, made, tmp_path):
    (first,) = evaluate()
    before = files_in(first)
    shards = tmp_path / "shards"
    shutil.copytree(made[0], shards)
    write_questions(shards, "learn", {**QUESTIONS, "test": QUESTIONS["test"][:5]})
    guard(shards, "")
    second = evaluate(shards_dir=str(shards))[0]
    assert second.name == first.name + "_2" and files_in(first) == before
    shutil.rmtree(evaluate.run / "step_000001")  # the run is started anew under its name
    make_run(evaluate.run, made[0], seed=1)
    third = evaluate()[0]
    assert third.name == first.name + "_3" and files_in(first) == before
    (first / "results.json").write_text("{")  # nobody knows what it was
    assert set(evaluate()) == {third, first, second}
    assert evaluate(limit=1)[0].name.endswith("first_1_2_tokens")


def test_extras_take_the_newest_of_each_dataset(evaluate, made, monkeypatch):
    evaluate(limit=1)
    evaluate(data="other")
    evaluate(blind="shuffle", seed=3)  # without the model's own answers
    chosen = choose_evaluations(evaluate.run)
    assert {name: folder.name for name, (folder, _) in chosen.items()} == {
        "other/test": "step_000001_other_test_2_tokens",
        "learn/test": "step_000001_learn_test_first_1_2_tokens"}
    assert choose_evaluations(chosen["learn/test"][0]).keys() == {"learn/test"}
    newest = evaluate()[0]
    assert choose_evaluations(evaluate.run)["learn/test"][0] == newest
    make_run(evaluate.run, made[0], step=2)
    evaluate(data="other")
    assert choose_evaluations(evaluate.run).keys() == {"other/test"}  # of the newest checkpoint alone
    evaluate.run.parent.joinpath("out").mkdir()
    evaluate.run.rename(evaluate.run.parent / "out/run")
    monkeypatch.chdir(evaluate.run.parent)
    assert choose_evaluations().keys() == {"other/test"}
    with pytest.raises(UserError, match="none: no predictions.jsonl of an evaluation here; make one with"):
        choose_evaluations("none")


# ----------------------------------------------------------------------------- disks

def test_a_place_that_cannot_be_written_to_is_found_before_the_work(evaluate, monkeypatch, tmp_path):
    monkeypatch.setattr(eval_vqa, "load_vlm", lambda *arguments: pytest.fail("the work has begun"))
    (evaluate.run / "eval").symlink_to(tmp_path / "nowhere/at/all")
    with pytest.raises(UserError, match="eval: cannot be written to .*--out="):
        evaluate()
    (evaluate.run / "eval").unlink()
    (evaluate.run / "eval").write_text("a file")
    with pytest.raises(UserError, match="eval: cannot be written to .*--out="):
        evaluate()
    (evaluate.run / "eval").unlink()

    def full(path):
        return shutil._ntuple_diskusage(10 ** 9, 10 ** 9 - 1000, 1000)

    monkeypatch.setattr(evaluations.shutil, "disk_usage", full)
    with pytest.raises(UserError, match="eval: room for 1,000 bytes, while the answers take 3,... .*--out="):
        evaluate()
    monkeypatch.undo()
    assert evaluate(out=str(tmp_path / "deep/place"))[0].parent == tmp_path / "deep/place"
    assert not list((evaluate.run / "eval").glob("*"))


@pytest.mark.parametrize("name", ["write_bytes", "sync", "rename"])
def test_a_disk_that_fails_at_the_end_loses_nothing_old(evaluate, monkeypatch, name):
    (first,) = evaluate()
    before = files_in(evaluate.run / "eval")
    calls = []
    for fails in range(1, 9):  # the first such call, the second, ...
        calls.clear()

        def failing(*arguments, original):
            calls.append(arguments)
            if len(calls) == fails:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*arguments)

        with monkeypatch.context() as patch:
            owner = evaluations if name == "sync" else Path
            original = getattr(owner, name)
            patch.setattr(owner, name, lambda *arguments: failing(*arguments, original=original))
            try:
                evaluate()
            except UserError as error:
                assert "not written (No space left on device)" in str(error) and "\n" not in str(error)
                assert "--out=" in str(error) and len(calls) >= fails
                assert {key: value for key, value in files_in(evaluate.run / "eval").items()
                        if "results.json" not in key} == {key: value for key, value in before.items()
                                                          if "results.json" not in key}
                read_evaluation(first)
            else:
                assert len(calls) < fails
                break
    else:
        pytest.fail("it never came to an end")
    assert fails > 2 and evaluate() == [first]
    assert sorted(path.name for path in (evaluate.run / "eval").iterdir()) == [first.name]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("last", range(6))
def test_a_kill_leaves_the_former_or_the_new_one(evaluate, monkeypatch, last):
    (first,) = evaluate()
    before = files_in(first)
    calls = []

    def counted(original):
        def call(*arguments, **flags):
            calls.append(original)
            if len(calls) > last:
                raise Killed
            return original(*arguments, **flags)
        return call

    with monkeypatch.context() as patch:
        for owner, name in ((Path, "rename"), (evaluations, "sync"), (evaluations.shutil, "rmtree")):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        patch.setattr(evaluations, "tidy", lambda out, original=evaluations.tidy: original(out))
        with pytest.raises(Killed):
            evaluate()
    ((found, results),) = choose_evaluations(evaluate.run).values()
    assert {row: read_predictions(found / row) for row in results["predictions"]} == {
        row: content for row, content in before.items() if row != "results.json"}
    assert evaluate() == [first]
    assert sorted(path.name for path in (evaluate.run / "eval").iterdir()) == [first.name]


def test_every_damage_of_an_evaluation_is_told_in_a_line(evaluate):
    (folder,) = evaluate()
    rows = list(read_evaluation(folder)["predictions"])
    assert rows == [f"predictions{name}.jsonl" for name in ("", "_image_shuffled", "_question_only")]
    right = files_in(folder)
    for name in ("results.json", *rows):
        content = right[name]
        for place in range(0, len(content), max(len(content) // 97, 1)):
            spoiled = content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1:]
            (folder / name).write_bytes(spoiled)
            try:
                read_predictions(folder / rows[0] if name == "results.json" else folder / name)
            except UserError as error:
                assert "\n" not in str(error) and "python eval_vqa.py --run=" in str(error)
            else:  # such as another space, or a digit of a number that has more of them than a float keeps
                assert name == "results.json" and json.loads(spoiled) == json.loads(content)
        (folder / name).write_bytes(content)
    (folder / rows[0]).write_bytes(right[rows[1]])
    with pytest.raises(UserError, match="predictions.jsonl: damaged, or of another evaluation; run"):
        read_predictions(folder / rows[0])
    (folder / "predictions_mine.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="not a part of the evaluation beside it"):
        read_predictions(folder / "predictions_mine.jsonl")
    (folder / "results.json").write_text(json.dumps({"checkpoint": "step_1", "results": {}}))
    with pytest.raises(UserError, match="results.json: damaged, or of another version of this code; delete that "):
        choose_evaluations(evaluate.run)


# ----------------------------------------------------------------------------- what the run has seen

def tables(folder):
    ((_, found),) = read_evaluation(folder)["results"].items()
    return found


def test_another_training_split_tells_nothing_about_the_run(evaluate, made, tmp_path, capsys):
    assert tables(evaluate()[0])["new"]["questions"] == 7
    shards = Path(shutil.copytree(made[0], tmp_path / "shards"))
    write_questions(shards, "learn", {**QUESTIONS, "train": QUESTIONS["train"][3:]})
    guard(shards, "")
    capsys.readouterr()
    newest, former = evaluate(shards_dir=str(shards))
    text = capsys.readouterr().out
    why = "the training split of learn is another one now than the run was trained on"
    assert f"questions new to the run: not known: {why}" in text and "of them new" not in text
    assert f"no row of question only: {why}" in text and tables(newest)["new"] == why
    assert tables(newest)["all"]["rows"].keys() == {"model", "image shuffled", "the image adds"}
    assert "seen" not in json.loads(read_predictions(newest / "predictions.jsonl").splitlines()[0])
    assert tables(former)["new"]["questions"] == 7  # which is not rewritten
    shutil.rmtree(shards / "learn/train")
    evaluate(shards_dir=str(shards))
    assert "learn/train, which the run was trained on, is not here" in capsys.readouterr().out


def test_a_test_split_that_came_later_left_nothing_out(made, tmp_path):
    """The samples about its images were trained on, and so were their words."""
    shards = tmp_path / "shards"
    write_questions(shards, "learn", {"train": QUESTIONS["train"]})
    guard(shards, "drop")
    run = make_run(tmp_path / "run", shards)
    write_questions(shards, "later", {"test": [
        ("is figure 0 large?", "Yes", 0), ("is figure 1 large?", "yes", 1), ("is figure 2 large?", "no", 200),
        ("what is it?", "bone", 201)]})
    guard(shards, "drop")
    assert len(read_leaks(Shard(shards / "learn/train"))[1]) == 2  # would be left out today
    eval_vqa.main(Config(run=str(run), shards_dir=str(shards), max_new_tokens=1))
    ((folder, results),) = choose_evaluations(run).values()
    lines = [json.loads(line) for line in read_predictions(folder / "predictions.jsonl").splitlines()]
    assert [line["seen"] for line in lines] == ["words and image", "image", "words", ""]
    assert results["results"]["later/test"]["new"]["questions"] == 1


def test_question_only_learns_what_the_model_was_allowed_to(tmp_path, capsys):
    shards = tmp_path / "shards"
    leaked = [("which organ?", "the liver", 7)] * 3  # image 7 is in the test split, too
    write_questions(shards, "learn", {
        "train": [("which organ?", "a lung", 1), *leaked],
        "test": [("which organ?", "the liver", 7), ("which organ?", "bone", 8)]})
    write_questions(shards, "never", {"train": [("which organ?", "a kidney", 20)],
                                      "test": [("which organ?", "a kidney", 21), ("why?", "so", 22)]})
    for leaks, answer in (("drop", "a lung"), ("keep", "the liver")):
        guard(shards, leaks)
        run = make_run(tmp_path / leaks, shards)
        for data in ("learn", "never"):  # of which it has seen no training split, so it learns from its own
            eval_vqa.main(Config(run=str(run), shards_dir=str(shards), data=data, max_new_tokens=1))
            folder = find_evaluations(run)[0]
            lines = read_predictions(folder / "predictions_question_only.jsonl").splitlines()
            assert [json.loads(line)["prediction"] for line in lines] == [answer] * 2


def test_training_and_other_splits_are_not_called_new(evaluate, capsys):
    evaluate(split="train")
    assert "not known: the run was trained on this split" in capsys.readouterr().out
    evaluate(data="other", split="train")
    assert "not known: training splits are compared with test splits alone" in capsys.readouterr().out


# ----------------------------------------------------------------------------- what is asked for

@pytest.mark.parametrize("flags, message", [
    ({"data": "learn:2"}, r"--data=learn:2: names with commas between, without weights"),
    ({"data": "learn,,other"}, "--data=learn,,other: names"),
    ({"split": "validation"}, "--split=validation: .*learn has no such split; it has test, train"),
    ({"data": "absent"}, "absent/test: not prepared; run `.*--only=absent`")])
def test_bad_choices_are_refused(evaluate, flags, message):
    with pytest.raises(UserError, match=message):
        evaluate(**flags)


def test_shards_of_another_resize_or_size_are_told(evaluate, made, tmp_path, capsys):
    shards = Path(shutil.copytree(made[0], tmp_path / "shards"))
    asked = {"test": [("how many?", "three", 60), ("is it?", "yes", 61)]}
    write_questions(shards, "other", asked, resize="pad")
    guard(shards, "")
    usual = "--image_size=32 --resize=squash"
    with pytest.raises(UserError, match="other/test: images made by --image_size=32 --resize=pad, the run's by "
                                        f"{usual}; run `python prepare/all.py --only=other {usual}`$"):
        evaluate(shards_dir=str(shards), data="other")
    assert len(evaluate(shards_dir=str(shards), data="")) == 1
    assert "not answered: " in (text := capsys.readouterr().out) and "other/test, images made by" in text
    write_questions(shards, "other", asked, size=48)
    guard(shards, "")
    with pytest.raises(UserError, match="other/test: images made by --image_size=48 --resize=squash, the run's by "
                                        f"{usual}; run `python prepare/all.py --only=other {usual}`$"):
        evaluate(shards_dir=str(shards), data="other")
    capsys.readouterr()
    assert len(evaluate(shards_dir=str(shards), data="")) == 1
    assert "other/test, images made by --image_size=48" in capsys.readouterr().out


def test_a_run_is_found_by_its_folder_or_a_checkpoint(made, tmp_path, monkeypatch, capsys):
    shards, original = made
    run = Path(shutil.copytree(original, tmp_path / "out/sample"))
    make_run(run, shards, step=12, seed=1)
    monkeypatch.chdir(tmp_path)
    assert find_run() == find_run("out/sample") == (Path("out/sample"), Path("out/sample/step_000012"))
    assert find_run("out/sample/step_000001/") == (Path("out/sample"), Path("out/sample/step_000001"))
    eval_vqa.main(Config(run="out/sample/step_000001", shards_dir=str(shards), data="other",
                         max_new_tokens=1))
    assert find_evaluations("out/sample")[0].name == "step_000001_other_test_1_tokens"
    for name, near in [("out/sampel", "out/sample"), ("sample", "out/sample"), ("out/Sample", "out/sample")]:
        with pytest.raises(UserError, match=f"{name}: no such run; did you mean {near}?"):
            find_run(name)
    with pytest.raises(UserError, match="out/elsewhere: no checkpoint here; run `python train_vlm.py"):
        find_run("out/elsewhere")
    (run / "step_000001/projector.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="step_000001: projector.safetensors has 0 .*--run=out/sample takes"):
        find_run("out/sample/step_000001")


def test_a_checkpoint_is_chosen_by_its_name_or_as_the_best(made, tmp_path):
    shards, run = made[0], tmp_path / "run"
    for step, loss in ((3, 2.0), (6, 1.0), (9, 1.5), (12, None)):
        make_run(run, shards, step=step, seed=step, **({} if loss is None else {"held_out_loss": loss}))

    def evaluated(**flags):
        eval_vqa.main(Config(run=str(run), shards_dir=str(shards), data="other", max_new_tokens=2, **flags))
        folder = find_evaluations(run)[0]
        return folder.name, read_evaluation(folder)["checkpoint"], read_predictions(folder / "predictions.jsonl")

    newest, best, third = evaluated(), evaluated(checkpoint="best"), evaluated(checkpoint="step_000003")
    assert [name for name, _, _ in (newest, best, third)] == [
        f"step_{step:06d}_other_test_2_tokens" for step in (12, 6, 3)]
    assert [checkpoint for _, checkpoint, _ in (newest, best, third)] == [
        "step_000012", "step_000006", "step_000003"]
    assert evaluated(checkpoint="step_000012") == newest and len({newest[2], best[2], third[2]}) > 1
    with pytest.raises(UserError, match="--checkpoint=step_4: .*run has step_000012, step_000009, step_000006"):
        evaluated(checkpoint="step_4")
    eval_vqa.main(Config(run=str(run), question="what is it?", checkpoint="best"))
    (run / "step_000006/projector.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="step_000006: projector.safetensors has 0 .*; leave --checkpoint out"):
        eval_vqa.main(Config(run=str(run), question="what is it?", checkpoint="step_000006"))


def test_a_run_that_another_version_saved_is_refused(made, tmp_path):
    run = make_run(tmp_path / "run", made[0])
    (run / "step_000001").rename(run / "partial")
    (run / "partial/manifest.json").unlink()
    seal(run / "partial", run / "step_000001", step=1, flags={"data": "learn"})
    with pytest.raises(UserError, match="step_000001: saved by another version of this code; run `python"):
        eval_vqa.main(Config(run=str(run), shards_dir=str(made[0])))
    (run / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="tokenizer.model: no tokenizer here"):
        eval_vqa.main(Config(run=str(run), shards_dir=str(made[0])))


# ----------------------------------------------------------------------------- several images and turns

@pytest.fixture
def studies(tmp_path):
    """(shards, run): studies of two and three images, one image, none, and conversations among them."""
    shards = tmp_path / "shards"
    rows = [study("a", "where?", "left", 1, 2), study("b", "how large?", "2 cm", 1, 2),
            study("c", "where?", "right", 3, 4, turns=(("how large?", "3 cm"), ("since when?", "2019"))),
            study("d", "is it?", "yes", 5, 6, 7), ("is it round?", "no", 8), ("is it red?", "no", 9),
            Record("e", "what helps?", "rest", context="A study of rest."),
            Record("f", "what harms?", "work", context="A study of rest.", turns=(("why?", "it tires"),))]
    write_questions(shards, "learn", {"train": QUESTIONS["train"], "test": rows}, kind="text questions")
    guard(shards, "drop")
    return shards, make_run(tmp_path / "run", shards)


def test_studies_and_conversations_are_answered_and_scored(studies, capsys):
    shards, run = studies
    eval_vqa.main(Config(run=str(run), shards_dir=str(shards), data="learn", max_new_tokens=3))
    ((folder, results),) = choose_evaluations(run).values()
    assert "8 questions about 9 images" in capsys.readouterr().out
    lines = [json.loads(line) for line in read_predictions(folder / "predictions.jsonl").splitlines()]
    assert [(line["question"], line["answer"]) for line in lines[2:4]] == [
        ("since when?", "2019"), ("is it?", "yes")]
    assert lines[2]["earlier"] == [["where?", "right"], ["how large?", "3 cm"]] and "turns" not in lines[2]
    assert (lines[7]["question"], lines[7]["answer"]) == ("why?", "it tires")
    assert [line["image"] for line in lines] == ["1.png", "1.png", "3.png", "5.png", "8.png", "9.png", "", ""]
    tables = results["results"]["learn/test"]
    assert tables["all"]["closed"] == 3 and tables["all"]["open"] == 5
    model, tokenizer, shard = load_vlm(run / "step_000001").eval(), Tokenizer(run / "tokenizer.model"), Shard(
        shards / "learn/test")
    shown = eval_vqa.show_images(shard, len(shard), Config())
    for row, name in (("model", ""), ("image shuffled", "_image_shuffled")):
        given = [json.loads(line)["prediction"] for line in
                 read_predictions(folder / f"predictions{name}.jsonl").splitlines()]
        alone = []
        for number in range(len(shard)):  # each asked by itself, its prompt written out by hand
            prompt = shard.read_sample(number).prompt().tolist()
            numbers = [int(shown[row][-1 - token]) for token in prompt if token < 0]
            places = iter(range(len(numbers)))
            prompt = [-1 - next(places) if token < 0 else token for token in prompt]
            passes = generate(model, [([shard.read_image(image) for image in numbers], [prompt])], 3)
            ((_, (answer,)),) = finished_groups(passes)
            alone.append(tokenizer.decode(answer.tokens))
        assert given == alone, row
    own, related = np.arange(9), shard.connect()
    sample, image = shard.image_pairs()
    study_of = dict(zip(image.tolist(), related[sample].tolist()))
    assert all(study_of[int(other)] != study_of[one] for one, other in zip(own.tolist(), shown["image shuffled"]))


def test_what_begins_alike_shares_a_row_of_the_cache(studies):
    shards, _ = studies
    shard = Shard(shards / "learn/test")
    own = np.arange(len(shard.image_index))
    swapped = own.copy()
    swapped[:4] = [2, 3, 0, 1]  # the first two studies
    groups = group_questions(shard, len(shard), {"model": own, "swapped": swapped})
    numbers = [sorted((question.row, question.number) for question in group) for group in groups]
    assert sorted(map(len, groups)) == [2, 2, 2, 3, 3, 4]
    assert [("model", 0), ("model", 1), ("swapped", 2)] in numbers  # a study's questions, and another's about it
    assert [("model", 2), ("swapped", 0), ("swapped", 1)] in numbers
    assert [("model", 6), ("model", 7), ("swapped", 6), ("swapped", 7)] in numbers  # an abstract's
    for group, (images, prompts) in zip(groups, read_groups(shard, groups), strict=True):
        for question, prompt in zip(group, prompts, strict=True):
            assert [-1 - token for token in prompt if token < 0] == list(range(len(images)))
            assert [token for token in prompt if token >= 0] == [token for token in question.prompt if token >= 0]
    lengths = [sum(len(question.prompt) for question in group) for group in groups]
    assert lengths == sorted(lengths, reverse=True)
    crowd = group_questions(shard, 1, {f"row {n}": own for n in range(70)})
    assert list(map(len, crowd)) == [32, 32, 6]


@pytest.mark.parametrize("flags, message", [
    ({"question": "what is it " * 400}, r"--question: [\d,]+ tokens; this model was trained on samples of 256"),
    ({"question": "what?", "image": "absent.png"}, "--image=absent.png: no such file"),
    ({"question": "what?", "image": "."}, "--image=.: a folder"),
    ({"question": "what?", "image": str(ROOT / "LICENSE")}, "LICENSE: not an image that can be read"),
    ({"image": "x.png"}, "--image: give a --question about it"),
    ({"image": "x.png", "question": "  "}, "--image: give a --question about it")])
def test_one_question_is_refused_in_a_line(evaluate, made, flags, message):
    with pytest.raises(UserError, match=message) as caught:
        eval_vqa.main(Config(run=str(evaluate.run), **flags))
    assert "\n" not in str(caught.value)


def test_a_flag_given_twice_is_a_mistake():
    for words in (["--image=a.jpg", "--image=b.png"], ["--data=a", "--data=a"]):
        with pytest.raises(UserError, match="given twice"):
            parse_flags(Config, [*words, "--question=x"])


@pytest.mark.parametrize("rank", range(3))
def test_a_mistake_of_one_process_ends_all_with_one_line(rank, monkeypatch):
    def work():
        if rank == 1:
            raise UserError("image 3 is damaged")
        return "done"

    def gather(errors, own):
        errors[:] = [None, "image 3 is damaged", None] if own is None else [None, own, None]

    group = SimpleNamespace(is_initialized=lambda: True, get_world_size=lambda: 3, get_rank=lambda: rank,
                            all_gather_object=gather)
    monkeypatch.setattr(devices, "dist", group)
    with pytest.raises(SystemExit if rank else UserError) as ended:  # the first alone says it
        devices.together(work)
    assert ended.value.code == 2 if rank else str(ended.value) == "image 3 is damaged"
    monkeypatch.setattr(group, "all_gather_object", lambda errors, own: None)
    assert devices.together(lambda: "done") == "done"


# ----------------------------------------------------------------------------- how answers end

def test_answers_that_are_cut_are_counted(evaluate, monkeypatch, capsys):
    def generate(model, groups, max_new_tokens, sampling, rows, log_probabilities):
        for number, (_, prompts) in enumerate(groups):
            yield [Answer(number, place, len(prompts), None, [5] * max_new_tokens if number < 3 else [], done=True)
                   for place, _ in enumerate(prompts)]

    monkeypatch.setattr(eval_vqa, "generate", generate)
    folder = evaluate(max_new_tokens=8, blind="none")[0]
    assert tables(folder)["answers"]["model"] == {"cut": 3, "empty": 5, "repeating": 3}
    assert tables(folder)["answers"]["question only"]["cut"] == 0
    text = capsys.readouterr().out
    assert "cut at 8 tokens" in text and "up to 38% of a row's answers were cut" in text
    assert "--max_new_tokens, such as 32, lets them" in text
    lines = [json.loads(line) for line in read_predictions(folder / "predictions.jsonl").splitlines()]
    assert sum("cut" in line for line in lines) == 3 and all(line.get("cut", True) is True for line in lines)
