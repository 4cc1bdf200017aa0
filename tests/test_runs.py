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
from data import Mixture
from model import LLaMA, LlamaConfig, ViT, ViTConfig
from plumbing.files import (checkpoints, differences, find_damage, find_run, lock, manifest_checksum,
                            newest_checkpoint, read_manifest, require_writable, write_manifest)
from plumbing.flags import UserError, parse_flags
from plumbing.tensors import hash_weights, tensor_hashes, tensors_of
from plumbing.runs import image_settings, require_same_inputs
from plumbing.sources import open_shards
from run import learning_rate_at
from weights import load_run, load_trained_encoder, load_vlm, save_module
from test_train import flags, prepare_sample, read_log, shards  # noqa: F401, shards: a prepared part of the sample

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


def test_a_run_from_before_a_flag_that_settles_goes_on(shards, tmp_path):  # noqa: F811
    train_vlm.main(flags(shards, tmp_path, max_steps=1))
    rewrite_manifest(tmp_path / "step_000001", lambda manifest: [manifest["flags"].pop(name) for name in (
        "vision_layer", "vision_tokens", "projector_type", "loss_weight")])
    shutil.copy(tmp_path / "step_000001/manifest.json", tmp_path / "config.json")
    with pytest.raises(UserError, match="--projector_type=mlp: the run in .* has linear"):
        train_vlm.main(flags(shards, tmp_path, max_steps=2, resume=True, projector_type="mlp"))
    train_vlm.main(flags(shards, tmp_path, max_steps=2, resume=True))
    assert newest_checkpoint(tmp_path).name == "step_000002"


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


# ----------------------------------------------------------------------------- stages

def parts_of(model):
    """{name: tensor} of a model's parts, in a LoRA's base as without it."""
    return {name.replace(".base.", "."): tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def begun(monkeypatch):
    """The parts of each model before its first step, in the order in which runs begin."""
    models, take_steps = [], train_vlm.take_steps

    def note_and_take_steps(config, folder, model, *rest):
        models.append(parts_of(model))
        take_steps(config, folder, model, *rest)

    monkeypatch.setattr(train_vlm, "take_steps", note_and_take_steps)
    return models


def has_all(parts, model):
    """Whether parts are those of a model, bit for bit, beside what has come to them."""
    return all(torch.equal(parts[name], tensor) for name, tensor in parts_of(model).items())


def differing(model, other):
    """The parts, such as "projector" or "language.lora", in which two models differ."""
    ours, theirs = parts_of(model), parts_of(other)
    return {name.partition(".")[0] + ".lora" * (".lora_" in name) for name in ours.keys() & theirs.keys()
            if not torch.equal(ours[name], theirs[name])}


def test_three_stages_each_begin_with_what_the_one_before_has_trained(
        shards, fewer, tmp_path, begun, capsys):  # noqa: F811
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    write_llama(tmp_path / "base", 0)
    frozen, lora = dict(vision="frozen", language="frozen"), dict(vision="frozen", language="lora")
    train_vlm.main(flags(shards, one, language_weights=str(tmp_path / "base"), max_steps=2, **frozen))
    first = load_run(one)
    train_vlm.main(flags(shards, two, start=str(one), max_steps=3, **lora))
    second, told = load_run(two), capsys.readouterr().out
    train_vlm.main(flags(fewer, three, start=str(two), max_steps=2, seed=1, **lora))
    third = load_run(three)
    assert has_all(begun[1], first) and has_all(begun[2], second) and len(begun) == 3
    assert differing(first, second) == {"projector"} and differing(second, third) == {"projector", "language.lora"}
    assert all(f"{part:9} from {one}/step_000002\n" in told for part in ("vision", "projector", "language"))
    assert f"{two}: steps 0 to 3" in told and read_manifest(two / "step_000003")["inputs"]["weights"]["language"]
    shutil.rmtree(one)  # a run that has begun needs what it began with no more
    train_vlm.main(flags(shards, two, start=str(one), max_steps=4, resume=True, **lora))


def test_a_stage_begins_with_a_run_a_checkpoint_or_somebody_s_adapter(
        shards, tmp_path, begun, capsys):  # noqa: F811
    write_llama(tmp_path / "base", 0)
    base, lora = dict(language_weights=str(tmp_path / "base")), dict(language="lora", max_steps=1)
    train_vlm.main(flags(shards, tmp_path / "one", language="lora", max_steps=4, save_every=2, keep=9, lora_r=3,
                         **base))
    for name in ("one", "one/step_000002"):
        train_vlm.main(flags(shards, tmp_path / f"from {name}".replace("/", " "), start=str(tmp_path / name), **lora))
        assert has_all(begun[-1], load_run(tmp_path / name))
    told = capsys.readouterr().out
    assert "language  goes on with the LoRA of --start, not that of the flags" in told and "'r': 3," in told
    adapter = tmp_path / "one/step_000004/adapter"
    train_vlm.main(flags(shards, tmp_path / "adapter", start=str(adapter), vision="frozen", seed=1, **base, **lora))
    now, then = begun[-1], parts_of(load_run(tmp_path / "one"))
    assert {name for name in now if torch.equal(now[name], then[name])} >= {name for name in now if "language" in name}
    assert not torch.equal(now["projector.weight"], then["projector.weight"])
    assert f"language  from {tmp_path}/base and {adapter}\n" in capsys.readouterr().out


@pytest.mark.parametrize("changes, told", [
    (dict(language="full"), "--language=full: --start has LoRA in it; go on with --language=lora, or merge it first"),
    (dict(merge=2), "--merge=2: .*step_000001 has 1; give that"),
    (dict(vision_weights="none"), "brings all parts; leave out --vision_weights and --language_weights"),
    (dict(start="{}x"), "runx: no such run; did you mean .*/run")])
def test_what_a_start_does_not_fit_is_refused(changes, told, shards, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    train_vlm.main(flags(shards, run, max_steps=1, language="lora"))
    changes = dict(language="lora", start="{}") | changes
    changes["start"] = changes["start"].format(run)
    with pytest.raises(UserError, match=told):
        train_vlm.main(flags(shards, tmp_path / "next", **changes))


def test_a_start_with_another_tokenizer_is_refused(shards, tmp_path):  # noqa: F811
    train_vlm.main(flags(shards, tmp_path / "run", max_steps=1))
    rewrite_manifest(tmp_path / "run/step_000001", lambda manifest: manifest["inputs"].update(tokenizer="4" * 64))
    with pytest.raises(UserError, match="has another tokenizer than the data; prepare them with .*--tokenizer="):
        train_vlm.main(flags(shards, tmp_path / "next", start=str(tmp_path / "run")))


# ----------------------------------------------------------------------------- going on, and once more

def losses_of(run):
    return [entry["loss"] for entry in read_log(run) if "loss" in entry]


def test_the_best_checkpoint_by_held_out_loss_stays_beside_the_newest(shards, tmp_path, monkeypatch):  # noqa: F811
    held_out = iter([3.0, 1.0, 2.0, 2.5, 1.5, 1.7, 0.5])
    monkeypatch.setattr(train_vlm, "held_out_loss", lambda *model: next(held_out))
    changes = dict(save_every=100, evaluate_every=1, keep=1)
    train_vlm.main(flags(shards, tmp_path, max_steps=4, **changes))
    assert [path.name for path in checkpoints(tmp_path)] == ["step_000004", "step_000002"]
    assert find_run(tmp_path, "best") == (tmp_path, tmp_path / "step_000002")
    assert find_run(tmp_path)[1].name == "step_000004"
    train_vlm.main(flags(shards, tmp_path, max_steps=5, resume=True, **changes))  # 1.5 is no better
    assert [path.name for path in checkpoints(tmp_path)] == ["step_000005", "step_000002"]
    train_vlm.main(flags(shards, tmp_path, max_steps=7, resume=True, **changes | {"keep": 2}))
    # Not step 6, whose 1.7 is no better than the 1.0 that the run had before it went on
    assert [path.name for path in checkpoints(tmp_path)] == ["step_000007", "step_000005"]
    assert find_run(tmp_path, "best")[1].name == "step_000007"
    with pytest.raises(UserError, match="--checkpoint=step_000002: .* has step_000007, step_000005"):
        find_run(tmp_path, "step_000002")


def test_no_best_checkpoint_without_held_out_losses(shards, tmp_path):  # noqa: F811
    train_vlm.main(flags(shards, tmp_path, max_steps=1, held_out=0))
    with pytest.raises(UserError, match="--checkpoint=best: .* has step_000001; none was saved with a held-out loss"):
        find_run(tmp_path, "best")


def test_a_finished_run_goes_on_with_more_epochs_and_says_that_its_schedule_is_another(
        shards, tmp_path, capsys):  # noqa: F811
    run, changes = tmp_path / "run", dict(max_steps=0, evaluate_every=100)
    train_vlm.main(flags(shards, run, epochs=0.5, **changes))  # of 56 samples, 8 a step
    capsys.readouterr()
    train_vlm.main(flags(shards, run, epochs=0.5, resume=True, **changes))
    told = capsys.readouterr().out
    assert "finished already; now run `python eval_vqa.py" in told and "more --epochs" in told
    train_vlm.main(flags(shards, run, epochs=1.0, resume=True, **changes))
    assert "--epochs was 0.5, is 1.0 from here on: the schedule is another one" in capsys.readouterr().out
    entries = [entry for entry in read_log(run) if "loss" in entry]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5, 6, 7]
    assert [entry["learning_rate"] for entry in entries] == [
        learning_rate_at(step, 3 if step < 3 else 7, 1e-3, 0.03) for step in range(7)]
    # The record has it: the run alone says how far it goes
    config = parse_flags(train_vlm.Config, ["--resume=true", f"--run={run}"])
    assert config.epochs == 1.0 and config.seed == 0 and config.shards_dir == str(shards)
    for record in (read_manifest(run / "step_000007"), read_manifest(run, "config.json")):
        assert record["flags"]["epochs"] == 1.0


def test_a_run_s_config_repeats_it_bit_for_bit(shards, tmp_path):  # noqa: F811
    run, again = tmp_path / "run", tmp_path / "again"
    train_vlm.main(flags(shards, run, language="lora", lora_dropout=0.2, seed=7))
    config = parse_flags(train_vlm.Config, [f"--config={run}/config.json", f"--run={again}"])
    train_vlm.main(config)
    assert losses_of(again) == losses_of(run) and len(losses_of(run)) == 6
    for path in (run / "step_000006").rglob("*.safetensors"):
        assert (again / path.relative_to(run)).read_bytes() == path.read_bytes()
    config = parse_flags(train_vlm.Config, [f"--config={run}/config.json", "--seed=8", f"--run={tmp_path}/other"])
    assert config.seed == 8 and config.lora_dropout == 0.2 and not config.resume
    (tmp_path / "config.json").write_text('{"flags": {"row_length": 7}}')
    with pytest.raises(UserError, match="config.json: --row_length there is none of this version's; give"):
        parse_flags(train_vlm.Config, [f"--config={tmp_path}/config.json"])
    (tmp_path / "config.json").write_text('{"flags": {"language": "Lora"}}')
    with pytest.raises(UserError, match="--language=Lora: one of lora, full, frozen"):
        parse_flags(train_vlm.Config, [f"--config={tmp_path}/config.json"])


def test_a_run_that_is_resumed_takes_its_flags_from_there(shards, tmp_path, monkeypatch):  # noqa: F811
    run = tmp_path / "out/run"
    train_vlm.main(flags(shards, run))
    whole = losses_of(run)
    shutil.rmtree(run / "step_000006")
    train_vlm.main(parse_flags(train_vlm.Config, ["--resume=true", f"--run={run}"]))
    assert losses_of(run) == whole and newest_checkpoint(run).name == "step_000006"
    monkeypatch.chdir(tmp_path)
    config = parse_flags(train_vlm.Config, ["--resume=true", "--max_steps=7"])  # the newest in out/
    assert config.run == "out/run" and config.max_steps == 7 and config.batch_size == 8
    with pytest.raises(UserError, match="--learning_rate=0.5: the run in .* has 0.001"):
        train_vlm.main(parse_flags(train_vlm.Config, ["--resume=true", "--learning_rate=0.5"]))


def test_vision_and_projector_have_learning_rates_of_their_own(shards, tmp_path, begun):  # noqa: F811
    moved = {}
    for rate in (1.0, 0.25, 0.0):
        run = tmp_path / str(rate)
        train_vlm.main(flags(shards, run, max_steps=1, warmup=0.0, vision_rate=rate, projector_rate=rate / 2))
        moved[rate] = {name: tensor - begun[-1][name] for name, tensor in parts_of(load_run(run)).items()}
    for name, one in moved[1.0].items():  # the first update of AdamW is the rate times a sign, about
        share = 1.0 if name.startswith("language") else 0.25
        assert float((moved[0.25][name] - share * one).abs().max()) < 1e-6, name
        assert name.startswith("language") == bool(moved[0.0][name].any()) or not one.any(), name
    ratio = moved[1.0]["projector.bias"].abs().max() / moved[1.0]["vision.norm.bias"].abs().max()
    assert float(ratio) == pytest.approx(0.5, rel=0.01)


def test_the_held_out_samples_do_not_move_with_the_seed(shards):  # noqa: F811
    mixtures = [Mixture(**open_shards("sample", shards, "train"),
                        count_tokens=lambda height, width: 0 * height + 1, seed=seed,
                        held_out=8) for seed in (0, 1, 2)]
    held_out = [mixture.validation[0].tolist() for mixture in mixtures]
    assert held_out[0] == held_out[1] == held_out[2] and len(held_out[0]) >= 8
    assert len({tuple(mixture.epoch_order(0)[0].tolist()) for mixture in mixtures}) == 3


def test_images_that_were_brought_to_size_in_two_ways_are_not_trained_on_together(tmp_path):
    """A run records one way, by which a new image is brought to size, and test splits are held against it."""
    shards, data = tmp_path / "shards", "sample_captions,sample"  # noqa: F811
    prepare_sample(shards, "--limit=30")
    prepare_sample(shards, "--limit=30", "--image_size=64", "--resize=fit", only="sample_captions")
    usual = "--image_size=224 --resize=squash"
    with pytest.raises(UserError, match=f"--data: .*sample/train has images made by {usual}, .*sample_captions/train "
                                        "by --image_size=64 --resize=fit; prepare one as the other: `python"):
        train_vlm.main(flags(shards, tmp_path / "run", data=data))
    mixture = Mixture(**open_shards(data, shards, "train"), count_tokens=lambda height, width: 0 * height + 1)
    captions, sample = mixture.shards
    captions.image_index = captions.image_index[:0]  # as of texts alone, whose settings count for nothing
    assert image_settings([captions, sample])["size"] == 224 and image_settings([captions])["size"] == 64


def test_no_held_out_loss_where_too_few_are_asked_for_to_hold_any_out(tmp_path, capsys):
    shards = prepare_sample(tmp_path / "shards", "--limit=30", only="sample,sample_captions")  # noqa: F811
    train_vlm.main(flags(shards, tmp_path / "run", data="sample,sample_captions", held_out=1, max_steps=2))
    assert "30 samples to train on, 0 held out" in capsys.readouterr().out
    assert all("held_out_loss" not in entry for entry in read_log(tmp_path / "run"))


# ----------------------------------------------------------------------------- encoders of other sizes

def write_encoder(file, **changes):
    torch.manual_seed(0)
    save_module(ViT(ViTConfig(**{**dict(patch_size=32, width=64, depth=1, clip=True), **changes})), file)
    return str(file)


def test_image_tokens_follow_the_encoder_that_is_loaded(shards, tmp_path):  # noqa: F811
    """A CLIP ViT-B/32 in small: 49 patches and a class token of 64 channels, where --model=sample has 128."""
    encoder = write_encoder(tmp_path / "clip.safetensors")
    train_vlm.main(flags(shards, tmp_path / "run", vision_weights=encoder, vision="lora", max_steps=2))
    model = load_run(tmp_path / "run")
    assert (model.vision.tokens(224, 224), model.vision.config.width, model.vision.config.clip) == (50, 64, True)
    assert model.weights["vision"] == encoder and model.projector.in_features == 64
    sixteen = write_encoder(tmp_path / "sixteen.safetensors", patch_size=16, clip=False)
    train_vlm.main(flags(shards, tmp_path / "merged", vision_weights=sixteen, merge=2, max_length=512, max_steps=1))
    assert load_run(tmp_path / "merged").vision.tokens(224, 224) == 49


@pytest.mark.parametrize("patch_size, merge, side", [(48, 1, 48), (32, 2, 64)])
def test_an_encoder_that_does_not_fit_is_refused_by_what_differs(
        patch_size, merge, side, shards, tmp_path):  # noqa: F811
    encoder = write_encoder(tmp_path / "x.safetensors", patch_size=patch_size, image_size=240)
    with pytest.raises(UserError, match=f"sample/train: an image has 224 pixels along a side, no multiple of {side}"):
        train_vlm.main(flags(shards, tmp_path / "run", vision_weights=encoder, merge=merge))


def test_a_file_of_another_kind_is_no_encoder(shards, tmp_path):  # noqa: F811
    write_llama(tmp_path / "base", 0)
    with pytest.raises(UserError, match="model.safetensors: no ViT in timm's layout"):
        train_vlm.main(flags(shards, tmp_path / "run", vision_weights=str(tmp_path / "base/model.safetensors")))
