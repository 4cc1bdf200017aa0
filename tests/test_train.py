"""train_vlm.py and eval_vqa.py from the command line to the files they leave, on the sample."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import eval_vqa
import prepare.all as all_py
import train_vlm
from data import Tokenizer
from generate import ask
from plumbing.files import find_run
from plumbing.flags import UserError, parse_command_line, parse_flags, run
from plumbing.shards import Shard
from tasks.evaluations import choose_evaluations
from weights import build_vlm, load_run

ROOT = Path(__file__).resolve().parent.parent


def command(*words):
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)


def prepare_sample(folder, *words, only="sample"):
    all_py.main(parse_flags(all_py.Config, [f"--only={only}", "--workers=1", f"--shards_dir={folder}", *words]))
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """The first 64 questions of each split of the sample."""
    return prepare_sample(tmp_path_factory.mktemp("shards"), "--limit=64")


def flags(shards, run, **changes):
    return train_vlm.Config(**{**dict(
        shards_dir=str(shards), run=str(run), data="sample", model="sample", language="full",
        batch_size=8, max_steps=6, max_length=256, micro_batch_tokens=512, held_out=8,
        questions_per_image=0, learning_rate=1e-3, save_every=3, log_every=1, workers=1,
        evaluate_every=3), **changes})


def read_log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def stop_after_saving(monkeypatch, times):
    """Stand in for a process that dies right after its n-th checkpoint."""
    save, calls = train_vlm.save_checkpoint, []

    def save_then_die(*arguments):
        save(*arguments)
        calls.append(1)
        if len(calls) == times:
            raise KeyboardInterrupt
    monkeypatch.setattr(train_vlm, "save_checkpoint", save_then_die)


@pytest.mark.parametrize("changes", [
    dict(), dict(language="lora", lora_dropout=0.3, vision="lora", projector="frozen"),
    dict(language="lora", dtype="float16", batch_size=4), dict(model="qwen_sample", lora_dropout=0.3, language="lora")])
def test_resumed_run_equals_undisturbed(shards, tmp_path, monkeypatch, changes):
    train_vlm.main(flags(shards, tmp_path / "whole", **changes))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after_saving(patch, 1)
        train_vlm.main(flags(shards, tmp_path / "cut", **changes))
    assert [path.name for path in (tmp_path / "cut").glob("step_*")] == ["step_000003"]
    train_vlm.main(flags(shards, tmp_path / "cut", resume=True, **changes))
    files = sorted(path.relative_to(tmp_path / "whole") for path
                   in (tmp_path / "whole" / "step_000006").rglob("*.safetensors"))
    assert len(files) >= 4
    for file in files:
        whole, cut = load_file(tmp_path / "whole" / file), load_file(tmp_path / "cut" / file)
        assert whole.keys() == cut.keys()
        for name in whole:
            assert torch.equal(whole[name], cut[name]), (file, name)
    losses = [entry["loss"] for entry in read_log(tmp_path / "whole") if "loss" in entry]
    assert losses == [entry["loss"] for entry in read_log(tmp_path / "cut") if "loss" in entry]


def test_seeds_are_runs_of_their_own_and_go_on_where_they_stopped(shards, tmp_path, monkeypatch, capsys):
    short = dict(max_steps=2, save_every=1, evaluate_every=2, seed=4)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after_saving(patch, 3)  # in the middle of the second
        train_vlm.main(flags(shards, tmp_path / "some", seeds=3, **short))
    assert sorted(path.parent.name for path in tmp_path.glob("some/*/step_*")) == ["seed_0", "seed_0", "seed_1"]
    with pytest.raises(UserError, match="seed_0: holds a run already; add --resume=true"):
        train_vlm.main(flags(shards, tmp_path / "some", seeds=3, **short))
    before = (tmp_path / "some/seed_0/log.jsonl").read_bytes()
    train_vlm.main(flags(shards, tmp_path / "some", seeds=3, resume=True, **short))
    assert "seed_0: steps 2 to 2" in (told := capsys.readouterr().out) and "seed_1: steps 1 to 2" in told
    assert (tmp_path / "some/seed_0/log.jsonl").read_bytes() == before
    train_vlm.main(flags(shards, tmp_path / "one", **short | {"seed": 5}))  # is the second
    files = sorted(path.name for path in tmp_path.glob("one/step_000002/*.safetensors"))
    assert len(files) > 1 and all((tmp_path / "one/step_000002" / name).read_bytes() == (
        tmp_path / "some/seed_1/step_000002" / name).read_bytes() for name in files)
    records = [json.loads((tmp_path / f"some/seed_{seed}/config.json").read_text()) for seed in range(3)]
    assert [record["flags"]["seed"] for record in records] == [4, 5, 6] and records[2]["flags"]["seeds"] == 1
    train_vlm.main(flags(shards, tmp_path / "some/seed_2", resume=True, **short | {"seed": 6, "max_steps": 3}))
    with pytest.raises(UserError, match="some: holds 3 runs of a seed each; add --seeds=3, or name one, such as --run"):
        train_vlm.main(flags(shards, tmp_path / "some", resume=True, **short))
    with pytest.raises(UserError, match="one: holds a run already; leave --seeds out"):
        train_vlm.main(flags(shards, tmp_path / "one", resume=True, seeds=2, **short))
    with pytest.raises(UserError, match="some: holds 3 runs, of a seed each; name one, such as --run=.*some/seed_0"):
        find_run(tmp_path / "some")


@pytest.mark.parametrize("step, left", [(1, ["seed_0/step_000001"]), (2, ["seed_0/step_000001", "seed_0/step_000002"])])
def test_a_signal_ends_all_seeds(shards, tmp_path, monkeypatch, capsys, step, left):
    take = train_vlm.train_step

    def signalled(model, optimizer, now, *arguments):
        if now.number + 1 == step:
            signal.raise_signal(signal.SIGTERM)
        return take(model, optimizer, now, *arguments)

    monkeypatch.setattr(train_vlm, "train_step", signalled)
    with pytest.raises(SystemExit) as ended:
        train_vlm.main(flags(shards, tmp_path / "run", seeds=2, max_steps=2, save_every=1, held_out=0))
    assert ended.value.code == 128 + signal.SIGTERM and "--resume=true" in capsys.readouterr().out
    assert sorted(f"{path.parent.name}/{path.name}" for path in tmp_path.glob("run/*/step_*")) == left
    if step == 2:
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # between two runs one ends the process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_micro_batches_change_rounding_only(shards, tmp_path):
    logs = []
    for tokens in (256, 4096):
        run = tmp_path / str(tokens)
        train_vlm.main(flags(shards, run, micro_batch_tokens=tokens, max_steps=1))
        logs.append(next(entry for entry in read_log(run) if "loss" in entry))
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-5)
    assert logs[0]["gradient_norm"] == pytest.approx(logs[1]["gradient_norm"], rel=1e-5)


def test_micro_batches_may_be_others_when_a_run_is_resumed(shards, tmp_path):
    """What README.md advises when memory is short: the numbers agree to within rounding."""
    changes = dict(language="lora", lora_dropout=0.3, save_every=2, evaluate_every=4)
    train_vlm.main(flags(shards, tmp_path / "whole", max_steps=4, **changes))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/step_000004")
    changes |= dict(resume=True, max_steps=4)
    with pytest.raises(UserError, match="--max_length=60: the run in .*cut has 256"):  # which would cut samples
        train_vlm.main(flags(shards, tmp_path / "cut", max_length=60, **changes))
    train_vlm.main(flags(shards, tmp_path / "cut", micro_batch_tokens=384, recompute=1, **changes))
    logs = [[entry[key] for entry in read_log(tmp_path / run) for key in ("loss", "gradient_norm", "held_out_loss")
             if key in entry] for run in ("whole", "cut")]
    assert len(logs[0]) == 9 and logs[1] == pytest.approx(logs[0], rel=1e-4)
    adapters = [load_file(tmp_path / run / "step_000004/adapter/adapter_model.safetensors") for run in ("whole", "cut")]
    for name, tensor in adapters[0].items():
        assert float((adapters[1][name] - tensor).abs().max()) < 1e-4


def test_learns_by_heart_and_answers(tmp_path, capsys):
    """The whole path: 32 questions learnt until the model answers them with their own words."""
    shards, run = prepare_sample(tmp_path / "shards", "--limit=32"), tmp_path / "run"
    train_vlm.main(flags(shards, run, max_steps=100, batch_size=32, micro_batch_tokens=2048, held_out=0,
                         save_every=1000, log_every=20, learning_rate=3e-3))
    eval_vqa.main(eval_vqa.Config(run=str(run), shards_dir=str(shards), split="train"))
    ((folder, results),) = choose_evaluations(run).values()
    scores = results["results"]["sample/train"]["all"]["rows"]
    exact = {row: cells["exact match"][0] for row, cells in scores.items()}
    assert exact["model"] >= 95 and exact["image shuffled"] < exact["model"] - 20
    assert exact["the image adds"] == pytest.approx(exact["model"] - exact["image shuffled"])
    for row, name in [("model", ""), ("image shuffled", "_image_shuffled"),
                      ("question only", "_question_only")]:
        text = (folder / f"predictions{name}.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        assert len(lines) == 32 and lines[0].keys() == {
            "id", "dataset", "image", "question", "answer", "prediction", "type", "labels"}
        hits = sum(line["prediction"] == line["answer"] for line in lines)
        assert 100 * hits / 32 == pytest.approx(exact[row])
    assert "image shuffled" in capsys.readouterr().out
    assert load_run(run).vision.config.width == 128
    # A question from the shell or from Python gets the answer that it has in the table
    model, tokenizer, shard = load_run(run).eval(), Tokenizer(run / "tokenizer.model"), Shard(shards / "sample/train")
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    for number in (0, 9, 30):
        Image.fromarray(shard.read_image(shard.samples["image"][number])).save(tmp_path / "x.png")
        question = lines[number]["question"]
        assert ask(model, tokenizer, question, tmp_path / "x.png") == lines[number]["prediction"]
    done = command("eval_vqa.py", f"--run={run}", f"--image={tmp_path}/x.png", f"--question={question}")
    assert done.stdout == lines[number]["prediction"] + "\n" and done.returncode == 0
    done = command("extras/look/follow.py", f"--run={run}", "--data=sample", "--split=train",
                   f"--shards_dir={shards}")
    assert done.returncode == 0, done.stderr
    assert re.search(r"VLM.loss +0\.\d+ nats.*Tokenizer.decode '.+'\nbleu1 +[01]\.\d\d\n", done.stdout, re.S)


def test_non_finite_loss_stops_before_it_is_saved(shards, tmp_path):
    with pytest.raises(UserError, match=r"step \d+: loss .*sample/train:\d+.*log.jsonl"):
        train_vlm.main(flags(shards, tmp_path, learning_rate=1e30, clip=0.0, warmup=0.0, max_steps=9,
                             save_every=100))
    assert not list(tmp_path.glob("step_*"))
    last = read_log(tmp_path)[-1]
    assert last["error"] and len(last["samples"]) == 8


def test_a_run_is_neither_overwritten_nor_resumed_with_other_flags(shards, tmp_path):
    train_vlm.main(flags(shards, tmp_path, max_steps=1))
    with pytest.raises(UserError, match="holds a run already; add --resume=true"):
        train_vlm.main(flags(shards, tmp_path, max_steps=1))
    with pytest.raises(UserError, match="--learning_rate=0.5: the run in .* has 0.001"):
        train_vlm.main(flags(shards, tmp_path, max_steps=1, resume=True, learning_rate=0.5))
    with pytest.raises(UserError, match="every part is frozen"):
        train_vlm.main(flags(shards, tmp_path / "frozen", vision="frozen", projector="frozen",
                             language="frozen"))


@pytest.mark.parametrize("content, reason", [
    (b"no image at all", "no image, or of a format that is not read"), (None, "No such file"),
    (b"\x89PNG\r\n\x1a\n", "no image, or of a format that is not read")])
def test_what_is_no_image_gets_no_answer(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "x.png").write_bytes(content)
    model = build_vlm("sample", 100)
    with pytest.raises(UserError, match=f"x.png: not an image that can be read .*{reason}"):
        ask(model, None, "what is shown?", tmp_path / "x.png")


def test_another_tokenizer_is_refused(shards, tmp_path):
    run = tmp_path / "run"
    train_vlm.main(flags(shards, run, max_steps=1))
    model = (run / "tokenizer.model").read_bytes()
    at = model.index(b"yes")
    (run / "tokenizer.model").write_bytes(model[:at] + b"yex" + model[at + 3:])
    with pytest.raises(UserError, match="tokenizer.model: not the one that the run was trained with"):
        eval_vqa.main(eval_vqa.Config(run=str(run), shards_dir=str(shards)))


@pytest.mark.parametrize("words, expected", [
    (["train_vlm.py", "--batchsize=3"], "did you mean --batch_size?"),
    (["train_vlm.py", "--batch_size=many"], "--batch_size"),
    (["train_vlm.py", "--batch_size=0"], "--batch_size=0: from 1 to 1,048,576"),
    (["prepare/all.py", "--only=path_vqq"], "path_vqa"),
])
def test_a_mistake_gets_one_line_and_code_2(words, expected):
    done = command(*words)
    assert done.returncode == 2
    assert expected in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("script, words, expected", [
    (train_vlm, ["--data=nowhere", "--model=sample"], "prepare/all.py --only=nowhere"),
    (train_vlm, ["--data=sample:much"], "'much' is no weight"),
    (eval_vqa, ["--run=out/no_such_run"], "python train_vlm.py --run=out/no_such_run"),
    (eval_vqa, ["--image=x.png"], "--image: give a --question about it"),
])
def test_a_mistake_that_is_seen_later_gets_one_line_and_code_2(script, words, expected, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script.__file__, *words])
    with pytest.raises(SystemExit) as stopped:
        run(script.main, parse_command_line(script.Config))
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and expected in told and len(told.strip().splitlines()) == 1


def test_images_that_are_no_whole_patches_are_refused(shards, tmp_path):
    prepare_sample(tmp_path / "small", "--limit=40", "--image_size=72")
    with pytest.raises(UserError, match="small/sample/train: an image has 72 pixels along a side, no multiple of 32, "
                                        "the model's patches; prepare with --resize=squash and"):
        train_vlm.main(flags(tmp_path / "small", tmp_path / "other", max_steps=1))


def test_missing_weights_name_the_command(shards, tmp_path):
    with pytest.raises(UserError, match="weights/biomedclip.safetensors.*"):
        train_vlm.main(flags(shards, tmp_path, model="paper", device="cpu"))


def test_training_and_evaluating_open_no_connection(shards, tmp_path):
    """What the core does with private images stays on the machine: a socket would end it."""
    run = tmp_path / "run"
    prepare_sample(tmp_path / "more", "--limit=400")  # 11 images a class
    words = [f"--{name}={value}" for name, value in vars(flags(shards, run, max_steps=2)).items()
             if value != getattr(train_vlm.Config, name)]
    commands = [
        ["train_vlm.py", *words], ["eval_vqa.py", f"--run={run}", f"--shards_dir={shards}"],
        ["train_cls.py", "--dataset=sample", "--encoder=openmedq", f"--run={run}", "--epochs=1",
         f"--shards_dir={tmp_path}/more", f"--out={tmp_path}/cls"]]
    code = ("import sys, runpy\n"
            "def refuse(event, arguments):\n"
            "    if event.startswith('socket.') and event != 'socket.__new__':\n"
            "        raise SystemExit(f'{event} {arguments}')\n"
            "sys.addaudithook(refuse)\n"
            f"for sys.argv in {commands}:\n"
            "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "print('all have ended')")
    done = command("-c", code)
    assert done.returncode == 0 and done.stdout.endswith("all have ended\n"), done.stderr
    assert list(run.glob("eval/*")) and list(tmp_path.glob("cls/sample/openmedq/*/result.json"))
    done = command("-c", code.replace("runpy.run_path", "import socket; socket.getaddrinfo('localhost', 80)#"))
    assert done.returncode == 1 and "socket.getaddrinfo" in done.stderr
