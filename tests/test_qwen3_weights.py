"""Hub folders that are used as they are: downloaded, checked, known again, and refused where they were altered."""

import hashlib
import json
import os
import random
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from plumbing.files import read_manifest
from plumbing.tensors import hash_weights, read_tensor, tensor_shapes, write_hashes
from plumbing.flags import UserError
from prepare import download, weights
from prepare.weights import WEIGHTS
from test_chatml import write_chat_tokenizer
from test_download import OLD, pauses, ranged, serve  # noqa: F401
from test_qwen3_vl import TINY, fill, random_images
from test_weights import prepare
from weights import build_vlm, load_vlm, save_vlm
from zoo.qwen3_files import read_config, write_config

WANTED = {"chat_template.json", "config.json", "generation_config.json", "merges.txt", "preprocessor_config.json",
          "model.safetensors.index.json", "tokenizer.json", "vocab.json"}  # and what holds the tensors
UNWANTED = ("training_args.bin", "pytorch_model-00001-of-00002.bin", "global_step10/model_states.pt", "README.md",
            "optimizer.pt", "trainer_state.json", "rng_state.pth")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The hub's folder of a tiny Qwen3-VL as transformers saves it, in several files, beside a training's."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("published")
    write_config(folder, *TINY)
    config = transformers.Qwen3VLConfig.from_dict(json.loads((folder / "config.json").read_text()))
    model = transformers.Qwen3VLForConditionalGeneration(config)
    fill(dict(model.named_parameters()))
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="300KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    write_chat_tokenizer(folder / "tokenizer.json")
    for name in WANTED - {path.name for path in folder.iterdir()}:
        (folder / name).write_text("{}\n")
    for name in UNWANTED:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\x80\x04no code of this ever runs.")
    return folder


@pytest.fixture
def hub(published, serve, monkeypatch):  # noqa: F811
    """hub(send) starts a server that has the folder as MBZUAI/MedMO-4B, and gives what it was asked for."""
    contents = {path.relative_to(published).as_posix(): path.read_bytes()
                for path in published.rglob("*") if path.is_file()}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)

    def answer(path, asked, send):
        path = path.partition("?")[0]
        if path.startswith("/api/models/MBZUAI/MedMO-4B"):
            siblings = [{"rfilename": name, "size": len(content)} | ({"lfs": {
                "size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 1}}
                if name.endswith("s") else {}) for name, content in contents.items()]
            return 200, {}, json.dumps({"id": "MBZUAI/MedMO-4B", "sha": OLD, "siblings": siblings}).encode()
        return send(path, asked, content=contents[path.removeprefix(f"/MBZUAI/MedMO-4B/resolve/{OLD}/")])

    def start(send=partial(ranged, ETag="a")):
        url, seen = serve(partial(answer, send=send))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        return seen

    return start


def tensors_in(folder):
    files = folder.glob("model-*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.fixture
def prepared(published, tmp_path):
    """The folder in weights/, as a user brings it: a copy of the hub's, prepared where it lies."""
    folder = tmp_path / "weights/medmo_4b"
    shutil.copytree(published, folder)
    code, printed = prepare("medmo_4b", tmp_path)
    assert code == 0 and "ready" in printed, printed
    return folder


# ----------------------------------------------------------------------------- from the hub

def test_medmo_arrives_once_is_checked_and_loads(hub, published, tmp_path, monkeypatch):
    seen = hub()
    code, printed = prepare("medmo_4b", tmp_path)
    assert code == 0 and "ready" in printed, printed
    folder = tmp_path / "weights/medmo_4b"
    shards = {path.name for path in published.glob("model-*.safetensors")}
    assert {path.name for path in folder.iterdir()} == WANTED | shards | {"tensors.json", "hub_revision.txt"}
    for name in WANTED | shards:
        assert (folder / name).read_bytes() == (published / name).read_bytes()
    assert not any(name in path for path, _ in seen for name in UNWANTED)
    assert {path.name for path in folder.parent.iterdir()} == {"medmo_4b"} and not (tmp_path / "raw").exists()
    monkeypatch.chdir(tmp_path)
    model, wanted = build_vlm("medmo_4b", 512, "weights/medmo_4b", "weights/medmo_4b"), tensors_in(published)
    state = {("" if part == "language" else "model.visual.") + name: tensor for part in model.weights
             for name, tensor in getattr(model, part).state_dict().items()}
    assert state.keys() == wanted.keys() and all(torch.equal(state[name], wanted[name].float()) for name in wanted)
    before = len(seen)
    assert "up to date" in prepare("medmo_4b", tmp_path)[1] and len(seen) == before


def test_a_download_that_was_cut_goes_on_where_it_stopped(hub, published, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    largest = max(published.glob("model-*.safetensors"), key=lambda path: path.stat().st_size).read_bytes()

    def cut(path, asked, content):
        return ranged(path, asked, end=len(content) // 2 if content == largest and not asked else None,
                      content=content, ETag="a")

    seen = hub(cut)
    code, printed = prepare("medmo_4b", tmp_path)
    assert code == 1 and "run it again to go on" in printed
    assert not (tmp_path / "weights/medmo_4b").exists()
    code, printed = prepare("medmo_4b", tmp_path)
    assert code == 0 and "ready" in printed, printed
    resolved = [path for path, asked in seen if "resolve" in path]
    assert [asked for _, asked in seen if asked] == [f"bytes={len(largest) // 2}-"]
    assert len(resolved) == len(set(resolved)) + 1  # no other file was asked for twice


def test_a_config_that_is_not_supported_is_told_by_its_field_and_nothing_is_declared_prepared(published, tmp_path):
    folder = tmp_path / "weights/medmo_4b"
    shutil.copytree(published, folder)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "gelu"
    (folder / "config.json").write_text(json.dumps(config))
    code, printed = prepare("medmo_4b", tmp_path)
    assert code == 1 and "failed: " in printed and "config.json" in printed and "hidden_act" in printed
    assert not (folder / "tensors.json").exists()


WORDS = ["".join(random.Random(seed).choices("abcdefgh", k=6)) for seed in range(500)]  # of more than 512 pieces


def second(folder):
    return sorted(folder.glob("model-*.safetensors"))[1]


@pytest.mark.parametrize("spoil, message", [
    (lambda folder: second(folder).unlink(),
     r"model-00002-of-000.*safetensors is missing, 1 of \d files that model.safetensors.index.json names"),
    (lambda folder: os.truncate(second(folder), 5000), "not a whole safetensors file"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json: not a tokenizer.json"),
    (lambda folder: write_chat_tokenizer(folder / "tokenizer.json", WORDS),
     "tokenizer.json has .* tokens and config.json 512")])
def test_a_folder_of_one_s_own_that_is_not_whole_is_refused_in_one_line(spoil, message, published, tmp_path):
    folder = tmp_path / "weights/medmo_4b"
    shutil.copytree(published, folder)
    spoil(folder)
    with pytest.raises(UserError, match=message) as error:
        WEIGHTS["medmo_4b"].write(WEIGHTS["medmo_4b"], folder, folder)
    assert "\n" not in str(error.value) and not (folder / "tensors.json").exists()


# ----------------------------------------------------------------------------- in place

def test_a_link_to_a_folder_elsewhere_is_used_in_place(published, tmp_path):
    shutil.copytree(published, tmp_path / "data/MedMO")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/medmo_8b").symlink_to(tmp_path / "data/MedMO")
    code, printed = prepare("medmo_8b", tmp_path)
    assert code == 0 and "ready" in printed, printed
    assert (tmp_path / "weights/medmo_8b").is_symlink() and (tmp_path / "data/MedMO/tensors.json").is_file()


def test_a_run_s_base_is_known_again_without_reading_it(prepared, monkeypatch, tmp_path):
    """By the same hash as without tensors.json: a run from before that was written goes on."""
    monkeypatch.chdir(tmp_path)
    read = []
    monkeypatch.setattr("plumbing.tensors.hash_file",
                        lambda path, own=weights.hash_file: read.append(path.name) or own(path))
    known = hash_weights(prepared)
    assert set(read) == {"config.json"}
    model = build_vlm("", 512, str(prepared), str(prepared)).requires_grad_(False)
    save_vlm(model, tmp_path / "saved")
    (prepared / "tensors.json").unlink()
    assert hash_weights(prepared) == known and len(read) > 5
    images = random_images([(64, 96)])
    with torch.no_grad():
        assert torch.equal(load_vlm(tmp_path / "saved").encode_images(images), model.encode_images(images))


def test_a_bit_of_any_tensor_that_has_changed_is_noticed_when_it_is_read(prepared):
    names = 0
    for file in sorted(prepared.glob("model-*.safetensors")):
        content = file.read_bytes()
        begin = 8 + int.from_bytes(content[:8], "little")
        places = {key: value["data_offsets"] for key, value in json.loads(content[8:begin]).items()
                  if key != "__metadata__"}
        for key, (first, last) in places.items():
            spoiled = bytearray(content)
            spoiled[begin + (first + last) // 2] ^= 16
            file.write_bytes(spoiled)
            with pytest.raises(UserError, match=f"{key} was altered since tensors.json beside it was written;"):
                read_tensor(file, key)
            names += 1
        file.write_bytes(content)
    assert names == len(tensors_in(prepared)) > 100
    build_vlm("", 512, str(prepared), str(prepared))


@pytest.mark.parametrize("change, message", [
    ("config", "config.json: was altered since tensors.json"), ("hashes", "tensors.json: damaged; delete it"),
    ("names", "is unknown|was altered since tensors.json"), ("swapped", "was altered since tensors.json")])
def test_what_was_altered_beside_the_tensors_is_refused_until_the_hashes_are_gone(change, message, prepared):
    known = hash_weights(prepared)
    file = sorted(prepared.glob("model-*.safetensors"))[0]
    if change == "config":
        (prepared / "config.json").write_text((prepared / "config.json").read_text().replace("1e-06", "1e-05"))
    elif change == "hashes":
        path = prepared / "tensors.json"
        path.write_text(path.read_text().replace("a", "b", 1))
    elif change == "names":
        save_file({f"{name}_": tensor for name, tensor in load_file(file).items()}, file)
    else:  # another checkpoint of the same layout, whose header is the same
        save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match=message):
        build_vlm("", 512, str(prepared), str(prepared))
    if change in ("config", "swapped"):
        (prepared / "tensors.json").unlink()
        build_vlm("", 512, str(prepared), str(prepared))
        assert hash_weights(prepared) != known
        write_hashes(prepared)
        build_vlm("", 512, str(prepared), str(prepared))


def test_every_tensor_has_its_hash_and_every_name_of_the_list_its_entry(prepared):
    hashes = read_manifest(prepared, "tensors.json")
    assert {name: set(facts["tensors"]) for name, facts in hashes["files"].items()} == {
        file.name: set(tensor_shapes(file)) for file in prepared.glob("model-*.safetensors")}
    entries = [entry for entry in WEIGHTS.values() if entry.write is weights.check_qwen]
    assert len(entries) == 7 and all(entry.only_by_name and entry.licence == "Apache-2.0" for entry in entries)
    assert {entry.hub.partition("/")[0] for entry in entries} == {"Qwen", "MBZUAI"}
    assert read_config(prepared)[1].vocab_size == 512
