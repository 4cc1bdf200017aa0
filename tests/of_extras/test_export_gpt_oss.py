"""export.py on a gpt-oss: transformers reads what it writes, experts stay as they lie, what is not merged is told."""

import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file

import train_grpo
import train_vlm
from extras.share import export
from lora import lora_layers
from plumbing.flags import UserError
from plumbing.sources import FOUR
from test_gpt_oss_files import EXACT, theirs_of, write_hub
from test_harmony import write_tokenizer
from test_model import relative_error
from test_train import flags, prepare_sample
from weights import load_run


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(hub folder in MXFP4 with its tokenizer, shards)."""
    folder = tmp_path_factory.mktemp("prepared")
    hub = write_hub(folder / "hub", _name_or_path="/home/somebody/hub")
    own = write_tokenizer(hub / "tokenizer.json")
    return hub, prepare_sample(folder / "shards", "--limit=16", f"--tokenizer={own}")


def train(prepared, run, **changes):
    train_vlm.main(flags(prepared[1], run, **dict(max_steps=1, batch_size=4, held_out=0, save_every=1) | changes))


@torch.no_grad()
def error(theirs, model):
    tokens = torch.arange(40)
    return relative_error(theirs(tokens[None]).logits[0], model.language(tokens))


def test_lora_of_attention_is_merged_beside_experts_that_stay_in_mxfp4(prepared, tmp_path, monkeypatch):
    hub, _ = prepared
    train(prepared, tmp_path / "run", language_weights=str(hub), language="lora", base_bits=4, learning_rate=0.1)
    model = load_run(tmp_path / "run").eval()
    assert all(layer.lora_B.abs().max() > 0.01 for layer in lora_layers(model.language).values())
    base = {key: tensor for file in hub.glob("*.safetensors") for key, tensor in load_file(file).items()}
    for dtype, files in (("auto", 1e-6), ("float32", 5.0)):
        folder = tmp_path / dtype
        export.main(export.Config(run=str(tmp_path / "run"), folder=str(folder), only="language,card", dtype=dtype,
                                  shard_gigabytes=files))
        written = {key: tensor for file in (folder / "language").glob("*.safetensors")
                   for key, tensor in load_file(file).items()}
        assert written.keys() == base.keys()
        for key in base:
            if key.endswith(("_blocks", "_scales")):
                assert written[key].dtype == torch.uint8 and torch.equal(written[key], base[key])
        assert written["model.norm.weight"].dtype == (torch.bfloat16 if dtype == "auto" else torch.float32)
    assert "/home/somebody" not in (folder / "language/config.json").read_text()
    theirs = theirs_of(tmp_path / "float32/language")
    assert error(theirs, model) < EXACT
    assert theirs.generation_config.eos_token_id == stops_of(hub)
    assert "a gpt-oss of 767,616 with 512" in (folder / "README.md").read_text()
    room = sum(tensor.nbytes for tensor in written.values())  # in float32
    monkeypatch.setattr(export.shutil, "disk_usage", lambda path: SimpleNamespace(free=room))
    export.main(export.Config(run=str(tmp_path / "run"), folder=str(tmp_path / "tight"), only="language",
                              dtype="float32"))
    room -= 1
    with pytest.raises(UserError, match="GB are to be written"):
        export.main(export.Config(run=str(tmp_path / "run"), folder=str(tmp_path / "full"), only="language",
                                  dtype="float32"))


def stops_of(hub):
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(hub / "tokenizer.json"))
    return tokenizer.convert_tokens_to_ids(["<|return|>", "<|call|>", "<|endoftext|>"])


def test_lora_of_experts_is_not_merged_and_that_is_told(prepared, tmp_path):
    train(prepared, tmp_path / "run", language_weights=str(prepared[0]), language="lora",
          lora_targets="q_proj,gate_up_proj,down_proj")
    with pytest.raises(UserError, match="experts is not merged .* --only=vision,adapter,vlm,card") as caught:
        export.main(export.Config(run=str(tmp_path / "run")))
    assert "\n" not in str(caught.value) and not (tmp_path / "run/export").exists()
    export.main(export.Config(run=str(tmp_path / "run"), only="adapter,vlm,card"))
    assert (tmp_path / "run/export/adapter/adapter_model.safetensors").is_file()


def test_one_that_began_here_is_exported_and_goes_on_by_rewards(prepared, tmp_path):
    _, shards = prepared
    train(prepared, tmp_path / "run", model="gpt_oss_sample")
    export.main(export.Config(run=str(tmp_path / "run"), only="language,card"))
    assert error(theirs_of(tmp_path / "run/export/language"), load_run(tmp_path / "run")) < EXACT
    card = re.sub(r"\s+", " ", (tmp_path / "run/export/README.md").read_text())
    assert card.count("started from random values") == 2 and "not known.\n" not in card
    train_grpo.main(train_grpo.Config(
        start=str(tmp_path / "run"), run=str(tmp_path / "rl"), shards_dir=str(shards), data="sample", reward="exact",
        batch_size=2, answers=2, max_new_tokens=4, max_steps=1, held_out=0))
    assert load_run(tmp_path / "rl").lora["language"]["targets"] == FOUR
