"""Damage and malice in short: extras/faults/corrupt.py and hostile.py do the same at length."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import data
from extras.faults import corrupt, hostile
from plumbing.claims import read_adapter_config
from plumbing.files import hash_file, manifest_checksum, read_manifest
from plumbing.flags import UserError
from plumbing.shards import Shard, sample_checksum
from prepare.datasets import read_named_image
from prepare.weights import read_pickle
from test_prepare import picture, toy_records, tokenizer, write_toy  # noqa: F401, tokenizer: a fixture
from weights import load_llama


# ----------------------------------------------------------------------------- damage

@pytest.mark.parametrize("kind, bits", [("dataset", 4), ("checkpoint", 20), ("adapter", 40),
                                        ("weights", 20)])
def test_no_damage_is_missed(kind, bits, capsys):
    corrupt.main(corrupt.Config(kinds=kind, flips=bits, places=3, mixes=20))
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.endswith(" 0 MISSED") and (kind in ("adapter", "weights") or " 0 not told" in told), told


def test_a_split_in_the_place_of_another_is_refused(tokenizer, tmp_path):  # noqa: F811
    shard = write_toy(tmp_path, toy_records(), tokenizer)
    for place in (tmp_path / "toy" / "test", tmp_path / "other" / "train"):
        shutil.copytree(shard.folder, place)
        with pytest.raises(UserError, match=f"{place}: holds toy/train"):
            Shard(place)


def seal_anew(folder, name, content):
    """Change a file of a shard, and its manifest with it, as a faulty writer would."""
    (folder / name).write_bytes(content)
    manifest = read_manifest(folder)
    manifest["files"][name] = {"bytes": len(content), "sha256": hash_file(folder / name)}
    manifest["checksum"] = manifest_checksum(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_tokens_past_the_vocabulary_are_refused(tokenizer, tmp_path, monkeypatch):  # noqa: F811
    """When they are written, and when they are read."""
    shard = write_toy(tmp_path, toy_records(), tokenizer)
    samples, tokens = shard.samples.copy(), np.array(shard.tokens)
    tokens[3] = shard.manifest["vocab_size"]
    parts = shard.parts[:int(samples[0]["images"] + 2 * samples[0]["spans"])]
    samples["checksum"][0] = sample_checksum(samples[0], tokens[:int(samples[0]["length"])], parts)
    seal_anew(shard.folder, "tokens.bin", tokens.tobytes())
    seal_anew(shard.folder, "samples.bin", samples.tobytes())
    shard = Shard(shard.folder)
    shard.read_sample(1)
    with pytest.raises(UserError, match="tokens.bin: sample 0 has tokens past the vocabulary"):
        shard.read_sample(0)
    for wrong in (512, 65536 + 7, 1 << 40):  # a cast to uint16 would make 7 of the second
        monkeypatch.setattr(data.Tokenizer, "encode", lambda self, text: [5, wrong])
        with pytest.raises(AssertionError, match="^1$"):
            write_toy(tmp_path, toy_records(), tokenizer)


# ----------------------------------------------------------------------------- malice

@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("part, count", [("images", 800), ("records", 60), ("tensors", 80),
                                         ("tables", 20), ("pickles", 60), ("archives", 60)])
def test_what_is_hostile_is_refused_or_used(part, count, capfd):
    try:
        hostile.main(hostile.Config(parts=part, images=count, files=count))
    except SystemExit:
        pytest.fail(capfd.readouterr().out)


def test_an_adapter_s_settings_are_plausible(tmp_path):
    good = {"peft_type": "LORA", "target_modules": ["q_proj"], "r": 4, "lora_alpha": 8,
            "lora_dropout": 0.0}
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(good))
    assert read_adapter_config(tmp_path) == {"targets": "q_proj", "r": 4, "alpha": 8, "dropout": 0.0}
    for name, value in [("r", 0), ("r", -1), ("r", "4"), ("r", 1 << 40), ("r", None), ("r", True),
                        ("r", 4.0), ("lora_alpha", "8"), ("lora_alpha", float("nan")),
                        ("lora_alpha", None),
                        ("lora_dropout", 1.5), ("lora_dropout", -0.1), ("lora_dropout", []),
                        ("target_modules", None), ("target_modules", [1]),
                        ("target_modules", {"q_proj": 1})]:
        path.write_text(json.dumps(good | {name: value}))
        with pytest.raises(UserError, match=f"adapter_config.json: .*{name}"):
            read_adapter_config(tmp_path)
    for content in (b"", b"[]", b"{", b"\xff", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(UserError, match="adapter_config.json: (damaged|no JSON object)"):
            read_adapter_config(tmp_path)


@pytest.mark.parametrize("changes", [
    {"num_attention_heads": 0}, {"num_attention_heads": 3}, {"hidden_size": "16"}, {"vocab_size": -64},
    {"num_hidden_layers": 10 ** 6}, {"num_hidden_layers": 10 ** 12}, {"rope_theta": 0},
    {"rms_norm_eps": "x"}, {"num_key_value_heads": 1.0}, {"rope_scaling": "yarn"},
    {"rope_scaling": [7]}])
def test_a_config_s_sizes_are_plausible(changes, tmp_path):
    folder = corrupt.spoil_weights(tmp_path)[1].folder
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match="config.json: "):
        load_llama(folder)


@pytest.mark.parametrize("weight_map", [
    {}, [], None, {"a": 7}, {"a": ["model-00001-of-00002.safetensors"]},
    {"a": "../language/model-00001-of-00002.safetensors"},
    {"a": "/etc/passwd"}])
def test_an_index_names_files_beside_it(weight_map, tmp_path):
    folder = corrupt.spoil_weights(tmp_path)[1].folder
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match="index.json: does not say which files beside it"):
        load_llama(folder)


def test_whole_numbers_are_no_weights(tmp_path):
    (tmp_path / "adapter").mkdir()
    adapter, = corrupt.spoil_adapter(tmp_path / "adapter")
    vision, _ = corrupt.spoil_weights(tmp_path)
    for target, name in ((adapter, "lora_A.weight"), (vision, "norm.bias")):
        file, = target.folder.glob("*.safetensors")
        tensors = load_file(file)
        key = next(key for key in tensors if key.endswith(name))
        tensors[key] = tensors[key].int()
        save_file(tensors, file, {"heads": "1", "activation": "gelu"})
        with pytest.raises(UserError, match=f"{file}: .*{key} .*int32"):
            target.use()


def test_a_dataset_s_text_names_no_file_outside_of_it(tmp_path):
    (tmp_path / "raw").mkdir()
    for path in (tmp_path / "outside.png", tmp_path / "raw" / "inside.png"):
        path.write_bytes(picture(0))
    assert read_named_image(tmp_path / "raw", "inside.png") == picture(0)
    for name in ("../outside.png", "x/../../outside.png", str(tmp_path / "outside.png"), "a\0b", "..",
                 "x" * 9999):
        assert read_named_image(tmp_path / "raw", name) is None


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_s_every_flipped_bit_is_a_user_s_error_or_harmless(tmp_path):
    stream, path = io.BytesIO(), tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(3)}, stream, _use_new_zipfile_serialization=False)
    for bit in range(0, 8 * len(stream.getvalue()), 7):
        path.write_bytes(corrupt.flipped(stream.getvalue(), bit))
        try:
            read_pickle(path)
        except UserError as error:
            assert str(path) in str(error)
