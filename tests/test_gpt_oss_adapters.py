"""LoRA of a gpt-oss in files: PEFT's names and layout, of attention and of experts, read and written both ways."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora import add_lora, lora_layers
from plumbing.claims import read_adapter_config
from plumbing.flags import UserError
from test_gpt_oss_files import EXACT, TOKENS, hub, theirs_of, wanted  # noqa: F401, fixtures
from test_model import edit_json, relative_error
from zoo.adapters import load_adapter, read_adapter, save_adapter
from zoo.gpt_oss_files import load_gpt_oss

peft = pytest.importorskip("peft")
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS = [(["q_proj", "k_proj", "v_proj", "o_proj"], []), (["q_proj", "o_proj"], EXPERTS), ([], EXPERTS[::-1]),
         (["v_proj"], EXPERTS[:1]), ([], EXPERTS[1:])]
SETTINGS = {"r": 3, "alpha": 6.0, "dropout": 0.0}


def targets_of(modules, experts):
    return ",".join([*modules, *(name.rpartition(".")[2] for name in experts)])


def move(model, seed=1):
    """An adapter that does something: of another size in each of its tensors."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.1
    return model


@torch.no_grad()
@pytest.mark.parametrize("modules, experts", KINDS)
def test_peft_s_adapter_gives_its_logits_here(modules, experts, hub, wanted, tmp_path):  # noqa: F811
    theirs = move(peft.get_peft_model(theirs_of(hub), peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=modules, target_parameters=experts or None, task_type="CAUSAL_LM")))
    theirs.save_pretrained(tmp_path)
    ours = load_gpt_oss(hub)
    settings = read_adapter_config(tmp_path)
    assert settings == SETTINGS | {"targets": ",".join(sorted(targets_of(modules, experts).split(",")))}
    assert {*read_adapter(tmp_path)["language"].pop("targets").split(",")} == {*settings["targets"].split(",")}
    add_lora(ours, **settings)
    load_adapter(ours, tmp_path)
    logits = theirs(TOKENS[None]).logits[0]
    assert relative_error(ours(TOKENS), logits) < EXACT and relative_error(wanted, logits) > 0.05


@torch.no_grad()
@pytest.mark.parametrize("modules, experts", KINDS)
def test_our_adapter_gives_its_logits_in_peft(modules, experts, hub, wanted, tmp_path):  # noqa: F811
    ours, targets = load_gpt_oss(hub), targets_of(modules, experts)
    add_lora(ours, targets, **SETTINGS)
    save_adapter(move(ours), tmp_path, str(hub), targets, **SETTINGS | {"dropout": 0.1})
    theirs = peft.PeftModel.from_pretrained(theirs_of(hub), tmp_path).eval()
    logits = ours.eval()(TOKENS)
    assert relative_error(theirs(TOKENS[None]).logits[0], logits) < EXACT
    assert relative_error(wanted, logits) > 0.05
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(saved["target_parameters"] or []) == set(experts) and saved["target_modules"] == modules
    again = load_gpt_oss(hub)
    add_lora(again, **read_adapter_config(tmp_path))
    load_adapter(again, tmp_path)
    layers = lora_layers(again)
    assert layers.keys() == lora_layers(ours).keys() and len(layers) == 4 * (len(modules) + 8 * len(experts))
    for name, layer in lora_layers(ours).items():
        assert torch.equal(layer.lora_A, layers[name].lora_A) and torch.equal(layer.lora_B, layers[name].lora_B)


def test_names_and_shapes_are_peft_s(hub, tmp_path):  # noqa: F811
    model, targets = load_gpt_oss(hub), "q_proj,gate_up_proj,down_proj"
    add_lora(model, targets, **SETTINGS)
    save_adapter(model, tmp_path, "", targets, **SETTINGS)
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items()
              if ".layers.2." in name}
    head = "base_model.model.model.layers.2."
    assert shapes == {
        f"{head}self_attn.q_proj.lora_A.weight": (3, 64), f"{head}self_attn.q_proj.lora_B.weight": (128, 3),
        f"{head}mlp.experts.base_layer.lora_A.weight": (24, 64), f"{head}mlp.experts.lora_A.weight": (24, 96),
        f"{head}mlp.experts.base_layer.lora_B.weight": (192, 24), f"{head}mlp.experts.lora_B.weight": (64, 24)}


@pytest.mark.parametrize("change, message", [
    ({"target_parameters": ["1.mlp.experts.gate_up_proj"]}, "target_parameters .* other than those of all layers'"),
    ({"target_parameters": ["mlp.router.weight"]}, "target_parameters .*router.* other than those of all layers'"),
    ({"target_parameters": "mlp.experts.down_proj"}, "target_parameters .* other than those of all layers'"),
    ({"target_modules": None, "target_parameters": None}, "target_modules None cannot be"),
    ({"r": 4}, "do not fit, the first .*layers.0.mlp.experts.base_layer.lora_A"),
    ({"target_parameters": ["mlp.experts.down_proj"]}, "mlp.experts.base_layer.lora_A.weight"),
    ({"target_parameters": None}, "mlp.experts.base_layer.lora_A.weight")], ids=str)
def test_an_adapter_of_experts_that_does_not_fit_is_refused(change, message, hub, tmp_path):  # noqa: F811
    model, targets = load_gpt_oss(hub), "q_proj,gate_up_proj,down_proj"
    add_lora(model, targets, **SETTINGS)
    save_adapter(model, tmp_path, "", targets, **SETTINGS)
    edit_json(tmp_path / "adapter_config.json", **change)
    with pytest.raises(UserError, match=message) as error:
        model = load_gpt_oss(hub)
        add_lora(model, **read_adapter_config(tmp_path))
        load_adapter(model, tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_layer_of_experts_is_named(hub, tmp_path):  # noqa: F811
    model = load_gpt_oss(hub)
    add_lora(model, "down_proj", **SETTINGS)
    save_adapter(model, tmp_path, "", "down_proj", **SETTINGS)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.3.mlp.experts.lora_B.weight"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"layers.3.mlp.experts.lora_B.weight \(here none\)"):
        load_adapter(model, tmp_path)
