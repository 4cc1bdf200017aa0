"""Published pickles to safetensors: bit for bit, loadable by both sides, and never run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

from model import LLaMA, ViT
from prepare.download import hash_file
from test_model import TOLERANCE, VIT, hub_llama, relative_error, some_tokens, tiny_vlm

ROOT = Path(__file__).resolve().parent.parent


def prepare(name, folder):
    return subprocess.run(
        [sys.executable, "prepare/all.py", f"--only={name}", f"--raw_dir={folder}/raw",
         f"--weights_dir={folder}/weights"], cwd=ROOT, text=True, capture_output=True)


def biomedclip_state():
    """A tiny tower in BiomedCLIP's layout, beside what the whole checkpoint holds besides."""
    tower = {f"visual.trunk.{name}": tensor for name, tensor in tiny_vlm().vision.state_dict().items()}
    return {**tower, "visual.head.proj.weight": torch.ones(8, 128), "logit_scale": torch.ones(()),
            "text.transformer.embeddings.position_ids": torch.arange(3)}


@pytest.mark.parametrize("zipped", [True, False])
def test_biomedclip_s_tower_is_kept_bit_for_bit(zipped, tmp_path):
    source = tmp_path / "raw/biomedclip/open_clip_pytorch_model.bin"
    source.parent.mkdir(parents=True)
    torch.save(biomedclip_state(), source, _use_new_zipfile_serialization=zipped)
    done = prepare("biomedclip", tmp_path)
    assert done.returncode == 0 and "ready" in done.stdout, done.stdout + done.stderr
    target = tmp_path / "weights/biomedclip.safetensors"
    loaded = ViT.from_pretrained(target)
    assert loaded.config == VIT
    for name, tensor in tiny_vlm().vision.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    with safe_open(target, "pt") as file:
        assert all(name.startswith("visual.trunk.") for name in file.keys())
        assert file.metadata()["source_sha256"] == hash_file(source)
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert "up to date" in prepare("biomedclip", tmp_path).stdout


def test_pmc_llama_s_shards_load_here_and_in_transformers(tmp_path):
    theirs = hub_llama(tmp_path / "hub", nkv=4, theta=10000.0)
    raw = tmp_path / "raw/pmc_llama_7b"
    raw.mkdir(parents=True)
    config = json.loads((tmp_path / "hub/config.json").read_text())
    config |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}  # as published
    (raw / "config.json").write_text(json.dumps(config))
    tensors = list(theirs.state_dict().items())
    tensors.append(("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4)))
    for number, part in enumerate((tensors[:7], tensors[7:15], tensors[15:]), start=1):
        torch.save(dict(part), raw / f"pytorch_model-{number:05}-of-00003.bin")
    done = prepare("pmc_llama_7b", tmp_path)
    assert done.returncode == 0 and "ready" in done.stdout, done.stdout + done.stderr
    target = tmp_path / "weights/pmc_llama_7b"
    assert sorted(path.name for path in target.iterdir()) == [
        "config.json", *(f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)),
        "model.safetensors.index.json"]
    wanted = theirs(some_tokens()).logits
    assert relative_error(LLaMA.from_pretrained(target)(some_tokens()), wanted) < TOLERANCE
    again = transformers.AutoModelForCausalLM.from_pretrained(target, pad_token_id=0).eval()
    assert relative_error(again(some_tokens()).logits, wanted) < TOLERANCE


class Payload:
    """Unpickled, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "it ran")


@pytest.mark.parametrize("case, message", [
    ("hostile", "damaged, or it holds more than tensors"), ("cut", "damaged, or it holds more than"),
    ("text", "damaged, or it holds more than"), ("other", "no tensor named like visual")])
def test_a_pickle_that_is_no_set_of_weights_is_refused_in_one_line(case, message, tmp_path):
    source = tmp_path / "raw/biomedclip/open_clip_pytorch_model.bin"
    source.parent.mkdir(parents=True)
    state = {"hostile": {**biomedclip_state(), "x": Payload(tmp_path / "ran")},
             "other": {"layer.weight": torch.ones(2)}}.get(case, biomedclip_state())
    torch.save(state, source)
    if case in ("cut", "text"):
        source.write_bytes(source.read_bytes()[:-9000] if case == "cut" else b"<html>not here</html>\n")
    done = prepare("biomedclip", tmp_path)
    line, = [line for line in done.stdout.splitlines() if line.startswith("biomedclip: failed")]
    assert done.returncode == 1 and f"{source}: {message}" in line and "Traceback" not in done.stderr
    assert not (tmp_path / "ran").exists() and not (tmp_path / "weights/biomedclip.safetensors").exists()


def test_weights_that_cannot_be_fetched_say_where_to_put_them(tmp_path):
    done = subprocess.run(
        [sys.executable, "prepare/all.py", "--only=biomedclip", f"--raw_dir={tmp_path}",
         f"--weights_dir={tmp_path}"], cwd=ROOT, text=True, capture_output=True,
        env={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 1 and "biomedclip: missing" in done.stdout
    assert "open_clip_pytorch_model.bin" in done.stdout and f"into {tmp_path}/biomedclip" in done.stdout
