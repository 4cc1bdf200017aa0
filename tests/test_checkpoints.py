"""A checkpoint is absent or whole, and nothing that was altered is used."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train_vlm
from plumbing.files import checkpoints, find_damage, newest_checkpoint, seal
from plumbing.flags import UserError
from test_train import flags, read_log, shards  # noqa: F401, shards: a prepared part of the sample

ROOT = Path(__file__).resolve().parent.parent


def write_folder(folder):
    """Two small files, one in a folder of its own, as a checkpoint has them."""
    (folder / "adapter").mkdir(parents=True, exist_ok=True)
    (folder / "vision.safetensors").write_bytes(bytes(range(200)))
    (folder / "adapter" / "config.json").write_text('{"r": 8}\n')


def make_checkpoint(run, step):
    partial = run / f".step_{step:06d}.partial"
    write_folder(partial)
    seal(partial, run / f"step_{step:06d}", step=step)
    return run / f"step_{step:06d}"


def test_every_flipped_bit_is_found(tmp_path):
    folder = make_checkpoint(tmp_path, 1)
    assert find_damage(folder) is None
    flips = 0
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        for bit in range(8 * len(whole)):
            altered = bytearray(whole)
            altered[bit // 8] ^= 1 << bit % 8
            path.write_bytes(altered)
            assert find_damage(folder).startswith(path.relative_to(folder).as_posix()), bit
            flips += 1
        path.write_bytes(whole)
    assert find_damage(folder) is None and flips > 3_000


@pytest.mark.parametrize("harm, told", [
    (lambda folder: (folder / "vision.safetensors").unlink(), "vision.safetensors is missing"),
    (lambda folder: (folder / "vision.safetensors").write_bytes(b""), "has 0 bytes instead of 200"),
    (lambda folder: os.truncate(folder / "vision.safetensors", 199), "has 199 bytes instead of 200"),
    (lambda folder: os.truncate(folder / "vision.safetensors", 201), "has 201 bytes instead of 200"),
    (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    (lambda folder: os.truncate(folder / "manifest.json", 100), "manifest.json is missing or altered"),
    (lambda folder: shutil.copy(folder / "vision.safetensors", folder / "adapter/config.json"),
     "adapter/config.json has 200 bytes"),
    (lambda folder: shutil.rmtree(folder / "adapter"), "adapter/config.json is missing"),
    (lambda folder: (folder / "adapter/more").write_text("x"), "adapter/more was added")])
def test_a_damaged_checkpoint_is_passed_over_again_and_again(harm, told, tmp_path, capsys):
    older, newer = make_checkpoint(tmp_path, 9), make_checkpoint(tmp_path, 10)
    assert newest_checkpoint(tmp_path) == newer and not capsys.readouterr().err
    harm(newer)
    for _ in range(2):
        assert newest_checkpoint(tmp_path) == older
        assert f"{newer}: not used: " in (line := capsys.readouterr().err) and told in line
    harm(older)
    with pytest.raises(UserError, match="none of its 2 checkpoints is whole"):
        newest_checkpoint(tmp_path)


def test_an_older_checkpoint_is_not_the_newest_by_another_name(tmp_path, capsys):
    make_checkpoint(tmp_path, 9).rename(tmp_path / "step_000011")
    newest = make_checkpoint(tmp_path, 10)
    assert newest_checkpoint(tmp_path) == newest
    assert "by its manifest.json it is step_000009" in capsys.readouterr().err


def test_a_name_is_given_once(tmp_path):
    make_checkpoint(tmp_path, 1)
    with pytest.raises(FileExistsError):
        make_checkpoint(tmp_path, 1)


def test_the_newest_few_stay_and_damaged_ones_are_set_aside(shards, tmp_path):  # noqa: F811
    train_vlm.main(flags(shards, tmp_path, save_every=1, keep=3, max_steps=5))
    assert [path.name[-1] for path in checkpoints(tmp_path)] == ["5", "4", "3"]
    undisturbed = (tmp_path / "step_000005/optimizer.safetensors").read_bytes()
    for step in (4, 5):
        os.truncate(tmp_path / f"step_00000{step}/projector.safetensors", 100)
    train_vlm.main(flags(shards, tmp_path, save_every=1, keep=3, max_steps=5, resume=True))
    assert [path.name[-1] for path in checkpoints(tmp_path)] == ["5", "4", "3"]
    assert (tmp_path / "step_000005/optimizer.safetensors").read_bytes() == undisturbed
    assert len(list(tmp_path.glob("damaged_*"))) == 2
    assert [entry["step"] for entry in read_log(tmp_path) if "loss" in entry] == [1, 2, 3, 4, 5]


def test_what_a_killed_run_left_is_swept(shards, tmp_path):  # noqa: F811
    run = flags(shards, tmp_path, max_steps=2, save_every=1)
    train_vlm.main(run)
    for name in (".step_000002.partial", "removed_step_000001"):
        write_folder(tmp_path / name)
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 2, "lo')
    train_vlm.main(flags(shards, tmp_path, max_steps=2, save_every=1, resume=True))
    assert not [path for path in tmp_path.iterdir() if path.name.endswith("partial") or path.name.startswith("removed")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_step_end_saves_and_exits_with_its_code(number, shards, tmp_path):  # noqa: F811
    words = [f"--{name}={value}" for name, value in vars(flags(
        shards, tmp_path, max_steps=100_000, save_every=100_000, evaluate_every=100_000)).items()
        if value != getattr(train_vlm.Config, name)]
    process = subprocess.Popen([sys.executable, "train_vlm.py", *words], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "log.jsonl").exists() or (tmp_path / "log.jsonl").stat().st_size < 500:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    step = int(newest_checkpoint(tmp_path).name[5:])
    assert f"stopped by {number.name} and saved at step {step}" in told
    assert read_log(tmp_path)[-1]["step"] == step


def test_saving_by_minutes(shards, tmp_path, monkeypatch):  # noqa: F811
    saved = []
    monkeypatch.setattr(train_vlm, "save_checkpoint", lambda run, step, *rest: saved.append(step))
    train_vlm.main(flags(shards, tmp_path, max_steps=4, save_every=100, save_minutes=1e-9))
    assert saved == [1, 2, 3, 4]
