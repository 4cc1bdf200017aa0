"""LoRA: exact at the start, exact when merged and unmerged, exchangeable with PEFT."""

import re
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora import add_lora, lora_layers, token_keys
from model import VLM, LLaMA, ViT
from plumbing.claims import read_adapter_config
from plumbing.flags import UserError
from test_model import (LLAMA, TOLERANCE, VIT, edit_json, hub_llama, logits_of, randomise, relative_error,
                        some_tokens)
from weights import load_llama
from zoo.adapters import load_adapter, save_adapter

SETTINGS = {"targets": "q_proj,v_proj", "r": 4, "alpha": 6.0, "dropout": 0.0}


def tiny_llama(dtype=torch.float32):
    torch.manual_seed(0)
    return randomise(LLaMA(LLAMA)).to(dtype)


def with_update(dtype=torch.float32, **changes):
    """A tiny LLaMA whose LoRA layers do something."""
    model = tiny_llama(dtype)
    add_lora(model, **{**SETTINGS, **changes})
    return randomise(model, seed=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_is_bit_equal_at_initialisation(dtype):
    model = tiny_llama(dtype)
    before = model(some_tokens())
    assert len(add_lora(model, **SETTINGS)) == 4
    assert torch.equal(model(some_tokens()), before)
    assert all(layer.lora_A.abs().sum() > 0 for layer in lora_layers(model).values())


def test_only_a_and_b_get_gradients_and_change():
    model = with_update()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model(some_tokens()).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name


def test_update_is_alpha_over_r_times_b_a():
    layer = next(iter(lora_layers(with_update()).values()))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    wanted = x @ (layer.base.weight + 6.0 / 4 * layer.lora_B @ layer.lora_A).T
    assert relative_error(layer(x), wanted) < TOLERANCE
    assert relative_error(layer.base(x), wanted) > 0.01


def test_merged_equals_unmerged_and_both_can_be_repeated():
    model = with_update()
    layers = lora_layers(model).values()
    weights = [layer.base.weight.clone() for layer in layers]
    unmerged = model(some_tokens())
    for times in range(2):
        for layer in layers:
            layer.merge()
        merged = model(some_tokens())
        assert relative_error(merged, unmerged) < TOLERANCE
        assert times == 0 or torch.equal(merged, once)
        once = merged
    for times in range(2):
        for layer in layers:
            layer.unmerge()
        assert all(torch.equal(layer.base.weight, w) for layer, w in zip(layers, weights))
    assert torch.equal(model(some_tokens()), unmerged)


def test_merging_into_bfloat16_rounds_once_and_comes_back():
    model = with_update(torch.bfloat16)
    unmerged = model(some_tokens())
    for layer in lora_layers(model).values():
        weight = layer.base.weight.clone()
        assert (weight.dtype, layer.lora_A.dtype) == (torch.bfloat16, torch.float32)
        layer.merge()
        wanted = (weight.float() + 6.0 / 4 * (layer.lora_B @ layer.lora_A)).bfloat16()
        assert torch.equal(layer.base.weight, wanted) and not torch.equal(wanted, weight)
        layer.unmerge()
        assert torch.equal(layer.base.weight, weight)
        layer.merge()
        assert layer(torch.ones(1, 32).bfloat16()).dtype == torch.bfloat16
    merged = model(some_tokens())
    assert relative_error(merged, unmerged) < 2 ** -5  # a few roundings of 2 ** -9 a layer


def test_dropout_only_in_training_and_only_on_the_update():
    model, plain = with_update(dropout=0.5), with_update()
    model.eval()
    assert torch.equal(model(some_tokens()), plain(some_tokens()))
    model.train()
    assert not torch.equal(model(some_tokens()), model(some_tokens()))
    for layer in lora_layers(model).values():
        torch.nn.init.zeros_(layer.lora_B)
    assert torch.equal(model(some_tokens()), tiny_llama()(some_tokens()))


# ----------------------------------------------------------------------------- PEFT

@pytest.fixture
def doubles():
    """New tensors are float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("shapes, merge", [
    ([(16, 16), (16, 16)], 1), ([(16, 8), (8, 16)], 1), ([(16, 16), (8, 16), (16, 16)], 1),
    ([(16, 16), (32, 16)], 2)])
def test_dropout_in_images_is_the_same_recomputed_and_one_at_a_time(shapes, merge, doubles):
    """
    Images of different shapes run one after the other, and their blocks are run again behind them all. In float64: a
    CPU multiplies a matrix of several images by other kernels than one's, and gradients of these large random weights
    make of that rounding up to 5e-5 in float32, 2e-15 here.
    """
    torch.manual_seed(0)
    model = VLM(ViT(replace(VIT, merge=merge)), LLaMA(LLAMA))
    add_lora(model.vision, "qkv", r=4, dropout=0.5)
    randomise(model)
    images = [torch.randint(256, (*shape, 3), dtype=torch.uint8) for shape in shapes]
    counts = [model.vision.tokens(*shape) for shape in shapes]
    keys = token_keys(torch.tensor(7, dtype=torch.int32), torch.arange(sum(counts)))

    def run(images, keys, recomputed=0):
        model.vision.recomputed = recomputed
        model.zero_grad()
        y = model.encode_images(images, keys)
        y.square().sum().backward()
        return y.detach(), [layer.lora_A.grad.clone() for layer in lora_layers(model).values()]

    whole, again = run(images, keys), run(images, keys, recomputed=VIT.depth)
    alone = [run([image], key) for image, key in zip(images, keys.split(counts))]
    assert torch.equal(whole[0], again[0])
    assert relative_error(torch.cat([y for y, _ in alone]), whole[0]) < TOLERANCE
    for ours, recomputed, *each in zip(whole[1], again[1], *(gradients for _, gradients in alone)):
        assert torch.equal(ours, recomputed) and relative_error(sum(each), ours) < TOLERANCE
    assert relative_error(run(images, keys + 1)[0], whole[0]) > 0.01


def peft_adapter(folder, targets):
    """A PEFT model with a non-zero adapter; its base and adapter are written into the folder."""
    model = peft.get_peft_model(hub_llama(folder / "base"), peft.LoraConfig(
        r=4, lora_alpha=6, lora_dropout=0.1, target_modules=list(targets), task_type="CAUSAL_LM"))
    randomise(model, seed=1).save_pretrained(folder / "adapter")
    return model.eval()


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ALL])
def test_peft_s_adapter_gives_the_same_logits_here(targets, tmp_path):
    theirs = peft_adapter(tmp_path, targets)
    ours = load_llama(tmp_path / "base")
    bare = ours(some_tokens())
    settings = read_adapter_config(tmp_path / "adapter")
    assert (settings["r"], settings["alpha"], settings["dropout"]) == (4, 6, 0.1)
    assert len(add_lora(ours, **settings)) == 2 * len(targets)
    load_adapter(ours, tmp_path / "adapter")
    wanted = logits_of(theirs, some_tokens())
    assert relative_error(ours.eval()(some_tokens()), wanted) < TOLERANCE
    assert relative_error(bare, wanted) > 0.01


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ALL])
def test_our_adapter_gives_the_same_logits_in_peft(targets, tmp_path):
    base = hub_llama(tmp_path / "base")
    ours = load_llama(tmp_path / "base")
    settings = {**SETTINGS, "targets": ",".join(targets)}
    add_lora(ours, **settings)
    save_adapter(randomise(ours, seed=1), tmp_path / "adapter", str(tmp_path / "base"), **settings)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert relative_error(ours(some_tokens()), logits_of(theirs, some_tokens())) < TOLERANCE
    read = read_adapter_config(tmp_path / "adapter")
    assert set(read["targets"].split(",")) == set(targets)
    assert {**read, "targets": settings["targets"]} == settings


@pytest.mark.parametrize("change, message", [
    ({"use_dora": True}, "use_dora"), ({"use_rslora": True}, "use_rslora"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"bias": "all"}, "bias"),
    ({"peft_type": "IA3"}, "peft_type"), ({"target_modules": ".*_proj"}, "target_modules")])
def test_unsupported_adapter_is_refused_by_name(change, message, tmp_path):
    save_adapter(with_update(), tmp_path, "base", **SETTINGS)
    edit_json(tmp_path / "adapter_config.json", **change)
    with pytest.raises(UserError, match=f"adapter_config.json: .*{message}.* not supported"):
        read_adapter_config(tmp_path)


KEY = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"


@pytest.mark.parametrize("damage, message", [
    ("missing", re.escape(KEY)), ("unknown", "base_model.model.lm_head"), ("rank", "lora_A.weight"),
    ("truncated", "adapter_model.safetensors"), ("absent", "adapter_model.safetensors: not there")])
def test_adapter_that_does_not_fit_is_refused_by_name(damage, message, tmp_path):
    save_adapter(with_update(), tmp_path, "base", **SETTINGS)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    if damage == "missing":
        del tensors[KEY]
    if damage == "unknown":
        tensors["base_model.model.lm_head.lora_A.weight"] = torch.ones(4, 32)
    save_file(tensors, file)
    if damage == "rank":
        edit_json(tmp_path / "adapter_config.json", r=8)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
    if damage == "absent":
        file.unlink()
    model = tiny_llama()
    add_lora(model, **read_adapter_config(tmp_path))
    with pytest.raises(UserError, match=message):
        load_adapter(model, tmp_path)


def test_absent_adapter_config_is_refused(tmp_path):
    with pytest.raises(UserError, match="adapter_config.json: not there"):
        read_adapter_config(tmp_path)


@pytest.mark.parametrize("target", ["query", "proj", "q_proj,query"])
def test_unknown_target_is_refused_naming_what_exists(target):
    with pytest.raises(UserError, match="no matrix of the LLaMA; .*o_proj, q_proj, up_proj"):
        add_lora(tiny_llama(), target)


def test_target_may_name_the_end_of_a_path():
    assert add_lora(ViT(VIT), "attn.proj") == ["blocks.0.attn.proj", "blocks.1.attn.proj"]
