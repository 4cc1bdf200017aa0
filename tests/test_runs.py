"""What a training run stands on is sealed: it goes on with the same inputs or not at all, one at a time."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_vlm
from model import LLaMA, LlamaConfig
from plumbing.files import (differences, find_damage, find_run, lock, manifest_checksum, newest_checkpoint, read_manifest,
                            require_writable, write_manifest)
from plumbing.flags import UserError
from plumbing.tensors import hash_weights, tensor_hashes, tensors_of
from run import require_same_inputs
from weights import load_run, load_trained_encoder, load_vlm
from test_train import flags, prepare_sample, shards  # noqa: F401, shards: a prepared part of the sample

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def own_shards(shards, tmp_path):  # noqa: F811
    """A copy of the prepared sample, to be changed."""
    return Path(shutil.copytree(shards, tmp_path / "shards"))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
            and path.name != ".lock"}


def rewrite_manifest(folder, change, name="manifest.json"):
    """Alter a sealed record as if it had been sealed so."""
    manifest = json.loads((folder / name).read_text())
    change(manifest)
    manifest["checksum"] = manifest_checksum(manifest)
    (folder / name).write_text(json.dumps(manifest))


def alter_image_settings(shards_dir, **changes):
    """As if the images had been stored otherwise: manifests and leaks.json say so."""
    folders = {split: shards_dir / "sample" / split for split in ("train", "test")}
    for folder in folders.values():
        rewrite_manifest(folder, lambda manifest: manifest["image"].update(changes))
    checksums = {split: read_manifest(folder)["checksum"] for split, folder in folders.items()}
    rewrite_manifest(folders["train"], lambda leaks: leaks.update(
        train=checksums["train"], tests={"sample/test": checksums["test"]}), "leaks.json")


@pytest.fixture(scope="module")
def fewer(tmp_path_factory):
    """The sample prepared from fewer questions."""
    return prepare_sample(tmp_path_factory.mktemp("fewer"), "--limit=48")


@pytest.mark.parametrize("steps", [2, 4])  # stopped, finished
def test_a_run_does_not_go_on_with_other_data(steps, own_shards, fewer, tmp_path, capsys):
    run = tmp_path / "run"
    train_vlm.main(flags(own_shards, run, max_steps=4, save_every=2))
    if steps == 2:
        shutil.rmtree(run / "step_000004")
    before, resumed = contents(run), dict(max_steps=4, save_every=2, resume=True)
    told = "cannot go on, since it stands on other inputs: "
    with pytest.raises(UserError, match=told + r".*data\.sample\.images was \d+, now \d+.*and \d more"):
        train_vlm.main(flags(fewer, run, **resumed))
    shutil.copytree(own_shards, tmp_path / "padded")
    alter_image_settings(tmp_path / "padded", resize="pad", codec="png")
    with pytest.raises(UserError, match=r"image.codec was jpeg, now png; data.sample.image.resize was squash, now pad"):
        train_vlm.main(flags(tmp_path / "padded", run, **resumed))
    assert contents(run) == before and "finished already" not in capsys.readouterr().out
    train_vlm.main(flags(shutil.copytree(own_shards, tmp_path / "moved"), run, **resumed))  # the same, elsewhere
    assert newest_checkpoint(run).name == "step_000004"
    assert contents(run)[Path("config.json")] == before[Path("config.json")]


def test_a_run_does_not_go_on_where_other_samples_are_left_out(own_shards, tmp_path):
    run, leaks = tmp_path / "run", own_shards / "sample/train/leaks.json"
    train_vlm.main(flags(own_shards, run, max_steps=1))
    rewrite_manifest(leaks.parent, lambda facts: facts.update(found={"sample/test": {"alike": [0, 1, 2]}}), leaks.name)
    with pytest.raises(UserError, match="data.sample.leaked was 0, now 3"):
        train_vlm.main(flags(own_shards, run, max_steps=1, resume=True))


def test_the_record_is_sealed_and_never_rewritten(own_shards, tmp_path):
    run = tmp_path / "run"
    train_vlm.main(flags(own_shards, run, max_steps=4, save_every=2, keep=9))
    records = [read_manifest(run / f"step_00000{step}") for step in (2, 4)] + [read_manifest(run, "config.json")]
    for name in ("flags", "inputs", "tests", "machine"):
        assert records[0][name] == records[1][name] == records[2][name]
    shutil.rmtree(run / "step_000004")
    (run / "config.json").write_text((run / "config.json").read_text().replace("sample", "simple", 1))
    train_vlm.main(flags(own_shards, run, max_steps=4, save_every=2, keep=9, workers=2, resume=True))
    assert read_manifest(run, "config.json") == records[2]  # restored from the checkpoint
    assert read_manifest(run / "step_000004")["flags"] == records[0]["flags"]


def test_a_run_without_a_record_is_refused(shards, tmp_path):  # noqa: F811
    train_vlm.main(flags(shards, tmp_path, max_steps=1))
    rewrite_manifest(tmp_path / "step_000001", lambda manifest: manifest.pop("inputs"))
    with pytest.raises(UserError, match="saved before runs recorded what they were trained on"):
        train_vlm.main(flags(shards, tmp_path, max_steps=1, resume=True))


@pytest.mark.parametrize("name, now", [
    ("data", {"a": {"images_sha256": "4" * 64}}), ("tokenizer", "4" * 64), ("weights", {"vision": "4" * 64})])
def test_other_images_tokenizers_and_weights_are_refused_each(name, now, tmp_path):
    inputs = {"data": {"a": {"images_sha256": "1" * 64}}, "tokenizer": "2" * 64,
              "weights": {"vision": "3" * 64}}
    write_manifest(tmp_path, "manifest.json", {"inputs": inputs, "step": 1})
    assert require_same_inputs(tmp_path, inputs) == {"inputs": inputs}
    with pytest.raises(UserError, match=f"cannot go on, .*: {name}.* was .*, now 444444444444; bring"):
        require_same_inputs(tmp_path, inputs | {name: now})


def test_a_flag_that_the_run_does_not_know_has_its_default(shards, tmp_path):  # noqa: F811
    train_vlm.main(flags(shards, tmp_path, max_steps=1))
    rewrite_manifest(tmp_path / "step_000001", lambda manifest: manifest["flags"].pop("beta2"))
    train_vlm.main(flags(shards, tmp_path, max_steps=1, resume=True))
    with pytest.raises(UserError, match="--beta2=0.5: the run in .* has 0.999"):
        train_vlm.main(flags(shards, tmp_path, max_steps=1, resume=True, beta2=0.5))


# ----------------------------------------------------------------------------- base weights

def write_llama(folder, seed, hashes=True):
    """A LLaMA of the sample's sizes in the hub's layout."""
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2)
    folder.mkdir(parents=True)
    tensors = tensors_of(LLaMA(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"} | (tensor_hashes(tensors) if hashes else {}))
    (folder / "config.json").write_text(json.dumps(vars(config) | {"model_type": "llama", "hidden_act": "silu"}))


@pytest.mark.parametrize("hashes", [True, False])
def test_other_base_weights_of_the_same_sizes_are_refused(hashes, shards, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    write_llama(tmp_path / "base", 0, hashes)
    settings = dict(language="lora", language_weights="base", max_steps=2, save_every=1)
    train_vlm.main(flags(shards, "run", **settings))
    checkpoint = tmp_path / "run/step_000002"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # named from another folder, it finds them
    logits = load_vlm(checkpoint).language(torch.arange(3, 9))
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="base: the run's base weights are not there.* weights/base"):
        load_vlm(checkpoint)
    (tmp_path / "elsewhere/weights").mkdir()
    (tmp_path / "moved").rename(tmp_path / "elsewhere/weights/base")
    assert torch.equal(load_vlm(checkpoint).language(torch.arange(3, 9)), logits)
    write_llama(tmp_path / "base", 1, hashes)
    with pytest.raises(UserError, match="base: not the base weights that the run was trained on"):
        load_vlm(checkpoint)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="base: not the base weights that the run was trained on"):
        train_vlm.main(flags(shards, "run", resume=True, **settings))


def test_weights_are_known_by_every_number_and_setting(tmp_path):
    for number, (seed, hashes) in enumerate([(0, True), (0, True), (1, True), (0, False), (1, False)]):
        write_llama(tmp_path / str(number), seed, hashes)
    known = [hash_weights(tmp_path / str(number)) for number in range(5)]
    assert known[0] == known[1] and len(set(known)) == 4
    orders = set()
    for number in range(5, 15):  # the same, whatever the order in which it was written
        write_llama(tmp_path / str(number), 0)
        orders.add((tmp_path / str(number) / "model.safetensors").read_bytes())
        assert hash_weights(tmp_path / str(number)) == known[0]
    assert len(orders) > 1
    config = tmp_path / "0/config.json"
    config.write_text(config.read_text().replace("1e-06", "1e-05"))
    assert hash_weights(tmp_path / "0") != known[0]
    (tmp_path / "vit.safetensors").write_bytes((tmp_path / "2/model.safetensors").read_bytes())
    alone = hash_weights(tmp_path / "vit.safetensors")
    (tmp_path / "config.json").write_text('{"num_heads": 3}')
    assert hash_weights(tmp_path / "vit.safetensors") != alone
    file = tmp_path / "3/model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] += 1e-6
    save_file(tensors, file)
    assert hash_weights(tmp_path / "3") != known[3]


# ----------------------------------------------------------------------------- places, and two at once

def test_two_at_once_in_one_folder_are_one_too_many(shards, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    run.mkdir()
    code = ("import sys; from pathlib import Path; from plumbing.files import lock\n"
            f"with lock(Path({str(run / '.lock')!r}), 'training'):\n    print('held', flush=True); sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"run: process {other.pid} is training there already"):
            train_vlm.main(flags(shards, run, max_steps=1))
        assert not contents(run)
        other.communicate()  # it ends, and lets go
    train_vlm.main(flags(shards, run, max_steps=1))
    assert find_damage(run / "step_000001") is None


def test_a_lock_that_is_waited_for_is_had_in_the_end(tmp_path):
    order = tmp_path / "order"
    code = ("import sys, time; from pathlib import Path; from plumbing.files import lock\n"
            f"with lock(Path({str(tmp_path / '.lock')!r}), 'preparing x', wait=True):\n"
            f"    file = open({str(order)!r}, 'a'); file.write(sys.argv[1]); file.flush(); time.sleep(0.3)\n"
            "    file.write(sys.argv[1]); file.flush()")
    both = [subprocess.Popen([sys.executable, "-c", code, name], cwd=ROOT, text=True, stdout=subprocess.PIPE)
            for name in "ab"]
    said = "".join(process.communicate(timeout=60)[0] for process in both)
    assert order.read_text() in ("aabb", "bbaa")
    assert said == "" or said.startswith("waiting: process ") and said.endswith(" is preparing x\n")


@pytest.mark.parametrize("make", [
    lambda path: path.symlink_to("nowhere/at/all"), lambda path: path.write_text("a file")])
def test_a_place_that_cannot_be_written_to_is_told_before_the_work(make, shards, tmp_path):  # noqa: F811
    make(tmp_path / "out")
    for run in (tmp_path / "out", tmp_path / "out/x"):
        with pytest.raises(UserError, match="cannot be written to .*; name another place with --run="):
            train_vlm.main(flags(shards, run, max_steps=1))


def test_a_folder_in_which_no_file_can_be_made_is_not_writable():
    with pytest.raises(UserError, match="^/proc/self: cannot be written to"):
        require_writable("/proc/self", "out")


def test_neither_a_checkpoint_nor_a_copy_of_one_is_taken_for_a_run(shards, tmp_path):  # noqa: F811
    train_vlm.main(flags(shards, tmp_path, max_steps=1))
    for name in ("step_backup1", "step_000001.old", "step_"):
        shutil.copytree(tmp_path / "step_000001", tmp_path / name)
    train_vlm.main(flags(shards, tmp_path, max_steps=1, resume=True))
    with pytest.raises(UserError, match="step_000001: this is a checkpoint"):
        train_vlm.main(flags(shards, tmp_path / "step_000001", max_steps=1))
    assert find_damage(tmp_path / "step_000001") is None


@pytest.mark.parametrize("data, told", [
    ("sample:-1", "a weight of -1 for sample: from 0 to 1000"), ("sample:nan", "a weight of nan"),
    ("sample:1e9", "a weight of 1e9"), ("sample:inf", "a weight of inf"), ("sample,sample", "named twice")])
def test_a_weight_is_a_number_that_makes_sense(data, told, shards, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match=told):
        train_vlm.main(flags(shards, tmp_path, data=data))


# ----------------------------------------------------------------------------- records of facts

def test_differences_name_what_was_and_what_is():
    before = {"data": {"a": {"images": 3, "hash": "0" * 64}, "b": {"images": 1}}, "tokenizer": "x"}
    now = {"data": {"a": {"images": 4, "hash": "1" * 64}, "c": {"images": 1}}, "tokenizer": "x"}
    assert differences(before, before) == []
    assert differences(before, now) == [
        "data.a.hash was 000000000000, now 111111111111", "data.a.images was 3, now 4",
        "data.b was there, now not there", "data.c was not there, now there"]


def test_a_written_manifest_is_read_and_a_flipped_bit_is_not(tmp_path):
    write_manifest(tmp_path, "facts.json", {"a": 1, "b": [1, 2]})
    assert {"a": 1, "b": [1, 2]}.items() <= read_manifest(tmp_path, "facts.json").items()
    whole = (tmp_path / "facts.json").read_bytes()
    read = 0
    for bit in range(8 * len(whole)):
        altered = bytearray(whole)
        altered[bit // 8] ^= 1 << bit % 8
        (tmp_path / "facts.json").write_bytes(altered)
        read += (manifest := read_manifest(tmp_path, "facts.json")) is not None and manifest != json.loads(whole)
    assert read == 0


def test_syncing_goes_on_where_the_system_opens_no_folder(tmp_path, monkeypatch):
    """As on Windows: neither a folder nor a file that is open for reading alone can be synced."""
    real_open, real_sync, synced = os.open, os.fsync, []

    def open_file(path, how, *rest):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path, how, *rest)

    def sync_file(handle):
        import fcntl
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        synced.append(handle)
        return real_sync(handle)

    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "fsync", sync_file)
    write_manifest(tmp_path, "facts.json", {"a": 1})
    assert read_manifest(tmp_path, "facts.json")["a"] == 1 and len(synced) == 1


def test_locks_are_not_needed_where_there_are_none(tmp_path, monkeypatch):
    import plumbing.files
    monkeypatch.setattr(plumbing.files, "fcntl", None)
    with lock(tmp_path / ".lock", "training"), lock(tmp_path / ".lock", "training"):
        pass


def test_a_run_that_is_resumed_under_a_wrong_name_is_told_of_the_right_one(shards, tmp_path, capsys):  # noqa: F811
    train_vlm.main(flags(shards, tmp_path / "sample", max_steps=1))
    capsys.readouterr()
    train_vlm.main(flags(shards, tmp_path / "smaple", max_steps=1, resume=True))  # a scheduler's first job
    assert f"smaple: no run here yet, a new one begins; did you mean {tmp_path}/sample?" in capsys.readouterr().out
    for load in (load_run, lambda name: load_trained_encoder(find_run(name)[1])):
        with pytest.raises(UserError, match=f"sampel: no such run; did you mean {tmp_path}/sample?"):
            load(tmp_path / "sampel")
        load(tmp_path / "sample/step_000001")
