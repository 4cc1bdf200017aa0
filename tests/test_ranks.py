"""Several processes under torchrun train as one does, end together, and save one checkpoint."""

import contextlib
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import eval_vqa
import train_vlm
from data import Tokenizer
from plumbing.files import newest_checkpoint
from plumbing.flags import run
from test_packing import corpus, mix  # noqa: F401, corpus: a fixture
from test_train import flags, read_log, shards  # noqa: F401, shards: a fixture
from weights import build_vlm, save_vlm

ROOT = Path(__file__).resolve().parent.parent


def member(rank, ranks, port, told, main, config):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)  # others would not survive the fork
    with open(told, "a") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        run(main, config)


def start(ranks, config, main=train_vlm.main):
    """A group of forked processes, since torch is imported already. On CPUs alone."""
    told, context = Path(f"{config.run}.told"), multiprocessing.get_context("fork")
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    group = [context.Process(target=member, args=(rank, ranks, port, told, main, config)) for rank in range(ranks)]
    for process in group:
        process.start()
    return group


def fork(ranks, config, main=train_vlm.main):
    """(exit codes, what is told) of such a group."""
    group = start(ranks, config, main)
    for process in group:
        process.join(120)
    return [process.exitcode for process in group], Path(f"{config.run}.told").read_text()


def together(ranks, config, main=train_vlm.main):
    codes, told = fork(ranks, config, main)
    assert codes == [0] * ranks, told
    return told


@pytest.mark.parametrize("ranks", [2, 3, 4, 6])
def test_the_ranks_parts_make_the_step_of_one(ranks, corpus):  # noqa: F811
    for number in range(12):
        whole = mix(corpus, questions_per_image=2).step(number)
        parts = [mix(corpus, questions_per_image=2, rank=rank, ranks=ranks).step(number)
                 for rank in range(ranks)]
        assert all(part.samples == whole.samples for part in parts)
        assert {part.divisor for part in parts} == {whole.divisor}

        def asked(steps):
            return sorted(batch.tokens[batch.group == group].tobytes() for step in steps
                          for batch in step.batches for group in range(batch.group.max() + 1))

        assert asked(parts) == asked([whole])
        assert sum(len(batch.targets) for part in parts for batch in part.batches) == whole.divisor


def test_two_processes_have_the_losses_of_one_and_go_on_as_one(shards, tmp_path):  # noqa: F811
    changes = dict(max_steps=8, save_every=4, evaluate_every=4, batch_size=12)
    train_vlm.main(flags(shards, tmp_path / "one", **changes))
    told = together(2, flags(shards, tmp_path / "two", **changes))
    assert "2 process(es)" in told and told.count("finished") == 1
    one, two = ([entry[key] for entry in read_log(tmp_path / run) for key in ("loss", "held_out_loss")
                 if key in entry] for run in ("one", "two"))
    # Evaluated by two as by one
    config = eval_vqa.Config(run=str(tmp_path / "one"), shards_dir=str(shards))
    texts = []
    for evaluate in (eval_vqa.main, lambda config: together(2, config, eval_vqa.main)):
        evaluate(config)
        texts.append([path.read_text() for path in sorted((tmp_path / "one").glob("eval/*/predictions*"))])
    assert len(texts[0]) == 3 and texts[0] == texts[1]
    assert len(one) == 10 and two == pytest.approx(one, rel=1e-5)
    # As if killed after 4 steps: by two processes again to the same bits, by one to within rounding
    (tmp_path / "two/step_000008").rename(tmp_path / "whole")
    shutil.copytree(tmp_path / "two", tmp_path / "by_one")
    together(2, flags(shards, tmp_path / "two", resume=True, **changes))
    files = [sorted(folder.rglob("*.safetensors"))
             for folder in (tmp_path / "whole", tmp_path / "two/step_000008")]
    assert len(files[0]) > 3 and all(a.read_bytes() == b.read_bytes() for a, b in zip(*files))
    train_vlm.main(flags(shards, tmp_path / "by_one", resume=True, **changes))
    after = [load_file(folder / "projector.safetensors")["weight"]
             for folder in (tmp_path / "whole", tmp_path / "by_one/step_000008")]
    assert float((after[0] - after[1]).abs().max()) < 1e-4


def test_two_processes_train_and_evaluate_one_seed_after_the_other(shards, tmp_path):  # noqa: F811
    changes = dict(max_steps=2, save_every=2, evaluate_every=2, batch_size=12, held_out=0)
    train_vlm.main(flags(shards, tmp_path / "one", seeds=2, **changes))
    told = together(2, flags(shards, tmp_path / "two", seeds=2, **changes))
    assert told.count("seed_0: finished") == told.count("seed_1: finished") == 1
    logs = [[entry["loss"] for seed in range(2) for entry in read_log(tmp_path / f"{run}/seed_{seed}")
             if "loss" in entry] for run in ("one", "two")]
    assert len(logs[0]) == 4 and logs[1] == pytest.approx(logs[0], rel=1e-5) and logs[0][0] != logs[0][2]
    together(2, eval_vqa.Config(run=str(tmp_path / "two"), shards_dir=str(shards), limit=4), eval_vqa.main)
    assert len(list(tmp_path.glob("two/seed_*/eval/*/predictions.jsonl"))) == 2


def test_a_split_language_model_learns_the_same(shards, tmp_path):  # noqa: F811
    """LoRA on a base from a weights file, of which each of three processes keeps a third."""
    torch.manual_seed(0)
    base = build_vlm("sample", Tokenizer(shards / "sample/tokenizer.model").vocab_size)
    save_vlm(base, tmp_path)
    changes = dict(max_steps=6, save_every=6, evaluate_every=6, batch_size=9, max_length=64,
                   micro_batch_tokens=128, language="lora", language_weights=str(tmp_path / "language"))
    train_vlm.main(flags(shards, tmp_path / "1", **changes))
    told = together(3, flags(shards, tmp_path / "3", shard=True, recompute=0.5, **changes))
    assert part_kept(told, 8 * 2 * 4 * (128 + 128)) == pytest.approx(1 / 3, rel=0.01)  # LoRA is whole everywhere
    one, three = ([entry[key] for entry in read_log(tmp_path / ranks) for key in ("loss", "held_out_loss")
                   if key in entry] for ranks in "13")
    assert len(one) == 7 and one[0] > one[5] + 1e-3 and three == pytest.approx(one, rel=1e-5)
    adapters = [load_file(tmp_path / ranks / "step_000006/adapter/adapter_model.safetensors")
                for ranks in "13"]
    for name, tensor in adapters[0].items():
        assert float((adapters[1][name] - tensor).abs().max()) < 1e-4


def part_kept(told, whole=0):
    """The share of the language model that each process of a run has, as the run says, without `whole` parameters."""
    line = re.search(r"language +([\d,]+) parameters, .* trained .*, ([\d,]+) of them in each process", told)
    total, here = (int(number.replace(",", "")) - whole for number in line.groups())
    return here / total


def test_a_split_language_model_that_trains_in_full_learns_the_same(shards, tmp_path):  # noqa: F811
    """Weights, gradients and moments in two parts, then in three, saved as one: the losses of one process."""
    changes = dict(max_steps=6, save_every=3, evaluate_every=3, batch_size=9, max_length=64, micro_batch_tokens=128,
                   clip=0.3)
    train_vlm.main(flags(shards, tmp_path / "1", **changes))
    split = dict(shard=True, recompute=0.5, **changes)
    told = together(2, flags(shards, tmp_path / "2", **split))
    assert part_kept(told) == pytest.approx(1 / 2, rel=0.01)
    for ranks in "3b":  # as if stopped after 3 steps
        shutil.copytree(tmp_path / "2", tmp_path / ranks)
        shutil.rmtree(tmp_path / ranks / "step_000006")
    together(2, flags(shards, tmp_path / "b", resume=True, **split))
    together(3, flags(shards, tmp_path / "3", resume=True, **split))
    names = "loss", "held_out_loss", "gradient_norm"
    one, *others = ([entry[key] for entry in read_log(tmp_path / run) for key in names
                     if key in entry] for run in "123")
    assert len(one) == 14 and one[0] > one[-3] + 0.1
    for other in others:
        assert other == pytest.approx(one, rel=1e-4)
    states = [{path.relative_to(folder): load_file(path) for path in folder.rglob("*.safetensors")}
              for folder in (tmp_path / run / "step_000006" for run in "123b")]
    assert len(states[0]) == 4
    for path, tensors in states[0].items():
        for name, tensor in tensors.items():
            two, three, again = (state[path][name] for state in states[1:])
            assert torch.equal(two, again) and two.shape == tensor.shape
            assert max(float((other - tensor).abs().max()) for other in (two, three)) < 1e-4


def wait_for_steps(running, run):
    """Until a run has logged a few steps. running(): whether it still does."""
    deadline = time.monotonic() + 90
    while not (run / "log.jsonl").exists() or (run / "log.jsonl").stat().st_size < 300:
        assert running() and time.monotonic() < deadline
        time.sleep(0.1)


def test_when_one_rank_is_killed_all_end(shards, tmp_path):  # noqa: F811
    config = flags(shards, tmp_path / "run", max_steps=1_000_000, batch_size=12, save_every=1,
                   evaluate_every=1_000_000, rank_timeout=5)
    group = start(2, config)
    wait_for_steps(group[0].is_alive, tmp_path / "run")
    os.kill(group[1].pid, signal.SIGKILL)
    group[0].join(50)
    assert group[0].exitcode == 1 and newest_checkpoint(tmp_path / "run")


def test_a_signal_stops_all_of_torchrun_s_at_the_same_step(shards, tmp_path):  # noqa: F811
    config = flags(shards, tmp_path, max_steps=1_000_000, batch_size=12, save_every=1_000_000,
                   evaluate_every=1_000_000)
    words = [f"--{item.name}={getattr(config, item.name)}" for item in fields(config)
             if getattr(config, item.name) != item.default]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--shutdown-timeout=2",
         "--", "train_vlm.py", *words], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    wait_for_steps(lambda: process.poll() is None, tmp_path)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[1]), signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # torchrun sends it to both once more
    told, _ = process.communicate(timeout=60)
    step = int(newest_checkpoint(tmp_path).name[5:])
    assert f"stopped by SIGTERM and saved at step {step}" in told and process.returncode != 0


def test_an_unusable_gradient_on_one_rank_stops_all(shards, tmp_path):  # noqa: F811
    codes, told = fork(2, flags(shards, tmp_path / "run", learning_rate=1e30, clip=0.0, warmup=0.0, batch_size=12,
                                max_steps=9, save_every=100))
    assert codes == [2, 2] and "try a lower --learning_rate" in told
    assert not list(tmp_path.glob("run/step_*"))
