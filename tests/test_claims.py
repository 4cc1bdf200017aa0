"""What files say of themselves: configs that are not of what is computed here are refused by name."""

import dataclasses
import json
import warnings

import peft
import pytest
import sentencepiece
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import train_vlm
from data import Tokenizer
from lora import add_lora
from model import VLM, LLaMA, LlamaConfig, ViT, ViTConfig
from plumbing.claims import (LORA_HARMLESS, LORA_NEUTRAL, lfs_pointer, llama_refusal, lora_refusal,
                             read_adapter_config, tokenizer_mismatch)
from plumbing.flags import UserError
from plumbing.sources import settle
from test_encoders import fill, some_pixels
from test_model import LLAMA, TOLERANCE, V, edit_json, hub_llama, logits_of, randomise, relative_error, some_tokens
from weights import load_llama, load_vlm, save_vlm
from zoo.encoders import load_encoder, load_vit
from zoo.adapters import load_adapter

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


# ----------------------------------------------------------------------------- LLaMA's config.json

SIZES = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "head_dim": 8}
# Families with all of LLaMA's names, and some more that have others beside them
FAMILIES = ("cwm", "ernie4_5", "exaone", "gemma", "granite", "helium", "internlm3", "iquestcoder",
            "ministral3", "mistral", "smollm3", "qwen2", "qwen3", "olmo", "cohere", "phi3", "stablelm")


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_another_family_with_llama_s_names_is_refused_by_name(family, tmp_path):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**SIZES, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}/config.json: .*{family}.* not supported here") as caught:
        load_llama(tmp_path)
    assert "\n" not in str(caught.value)


@torch.no_grad()
@pytest.mark.parametrize("head_dim", [8, 16])  # of 32 channels in 4 heads, and one of its own
def test_mistral_without_a_window_is_llama(head_dim, tmp_path):
    torch.manual_seed(0)
    theirs = randomise(transformers.MistralForCausalLM(transformers.MistralConfig(
        **SIZES | {"head_dim": head_dim}, sliding_window=None))).eval()
    theirs.save_pretrained(tmp_path)
    assert relative_error(load_llama(tmp_path)(some_tokens()), logits_of(theirs, some_tokens())) < TOLERANCE
    for change in ({"sliding_window": 4096}, {"num_key_value_heads": None}):
        right = (tmp_path / "config.json").read_text()
        edit_json(tmp_path / "config.json", **change)
        with pytest.raises(UserError, match="a mistral whose sliding_window is not null, or without"):
            load_llama(tmp_path)
        (tmp_path / "config.json").write_text(right)


BARE = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **dataclasses.asdict(LLAMA)}


@pytest.mark.parametrize("field, value, neutral", [
    ("mlp_bias", True, False), ("attention_bias", True, False), ("sliding_window", 4096, None),
    ("use_sliding_window", True, False), ("partial_rotary_factor", 0.5, 1.0), ("embedding_multiplier", 12.0, 1.0),
    ("residual_multiplier", 0.2, 1.0), ("logits_scaling", 8.0, 1), ("attention_multiplier", 0.1, 8 ** -0.5),
    ("layer_types", ["full_attention", "sliding_attention"], ["full_attention"] * 2),
    ("no_rope_layers", [1, 0], []), ("quantization_config", {"quant_method": "gptq"}, {}),
    ("tie_word_embeddings", True, False), ("hidden_act", "gelu", "silu"),
    ("attn_logit_softcapping", 50.0, None), ("final_logit_softcapping", 30.0, None), ("qk_norm", True, False),
    ("auto_map", {"AutoModel": "modeling_x.X"}, None), ("is_encoder_decoder", True, False),
    ("rope_scaling", {"type": "linear", "factor": 2.0}, None), ("rope_scaling", {"type": "dynamic"}, {}),
    ("rope_parameters", {"rope_type": "yarn", "rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
    ("rope_parameters", {"rope_theta": 1e4}, {"rope_theta": 5e5}),  # beside another rope_theta
    ("rope_parameters", {"rope_theta": 5e5, "partial_rotary_factor": 0.5},
     {"rope_theta": 5e5, "partial_rotary_factor": 1.0}), ("clip_qkv", 8.0, None),
    ("rope_parameters", {"full_attention": {"rope_theta": 5e5}}, None), ("pretraining_tp", None, 2)])
def test_a_field_that_changes_numbers_is_refused_unless_it_is_neutral(field, value, neutral):
    name = {"hidden_act": "activation", "rope_scaling": "rope", "rope_parameters": "rope"}.get(field, field)
    refused = llama_refusal({**BARE, field: value}, LLAMA.head_size)
    assert value is None or name in refused and "not supported here" in refused and "\n" not in refused
    assert llama_refusal({**BARE, field: neutral}, LLAMA.head_size) == ""


def test_an_unknown_field_is_refused_by_name_unless_it_is_empty(tmp_path):
    hub_llama(tmp_path)
    right = (tmp_path / "config.json").read_text()
    for value in (1.5, 0, False, True, "x", [1], {"a": 1}):
        edit_json(tmp_path / "config.json", foo_scale=value)
        with pytest.raises(UserError, match="config.json: foo_scale .* not known here; a field that changes no"):
            load_llama(tmp_path)
        (tmp_path / "config.json").write_text(right)
    for value in (None, {}, [], ""):
        edit_json(tmp_path / "config.json", foo_scale=value)
        load_llama(tmp_path)


@pytest.mark.parametrize("change, message", [
    ({"model_type": None, "architectures": None}, "neither model_type nor architectures"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ({"model_type": "llava_llama"}, "llava_llama"), ({"model_type": ["llama"]}, "llama"),
    ({"model_type": None, "architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM")])
def test_what_does_not_say_that_it_is_llama_is_refused(change, message):
    assert message in llama_refusal({**BARE, **change}, LLAMA.head_size)


def test_configs_as_llama_s_are_written_are_read():
    pmc = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "bos_token_id": 0,
           "eos_token_id": 1, "pad_token_id": -1, "max_sequence_length": 2048, "tie_word_embeddings": False,
           "torch_dtype": "float32", "use_cache": True, "transformers_version": "4.28.0.dev0",
           "initializer_range": 0.02, "rms_norm_eps": 1e-6, "vocab_size": 32000}
    old = {"architectures": ["LLaMAForCausalLM"], "model_type": "llama"}  # as the first conversions were
    theirs = [transformers.LlamaConfig().to_dict(), transformers.LlamaConfig(pretraining_tp=2).to_diff_dict(),
              {"architectures": ["LlamaForCausalLM"]}]
    for config in (pmc, old, *theirs):
        assert llama_refusal(config, LlamaConfig().head_size) == "", config


def test_two_sets_of_weights_in_a_folder_are_refused_and_pickles_get_their_remedy(tmp_path):
    hub_llama(tmp_path, shard="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="both model.safetensors and the files of model.safetensors.index.json"):
        load_llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != shards[0].name}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"{len(shards) - 1} of {len(shards)} files of the weights"):
        load_llama(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "pytorch_model-00001-of-00001.bin").touch()
    with pytest.raises(UserError, match=f"weights are pickles, .* --convert={tmp_path}` writes them"):
        load_llama(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(UserError, match="model.safetensors: a git-lfs pointer, not the file; run `git lfs pull`"):
        load_llama(tmp_path)
    assert lfs_pointer(POINTER) and not lfs_pointer(b"") and not lfs_pointer(tmp_path / "none")


# ----------------------------------------------------------------------------- adapters

def test_every_field_of_peft_s_lora_is_neutral_harmless_or_refused(tmp_path):
    fields = {field.name: field for field in dataclasses.fields(peft.LoraConfig)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        peft.LoraConfig(r=4, target_modules=["q_proj"]).save_pretrained("adapter")
    saved = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert lora_refusal(saved) == "" and read_adapter_config(tmp_path / "adapter")["r"] == 4
    for name in fields:
        assert (name in LORA_HARMLESS) != (name in LORA_NEUTRAL), name
        if name in LORA_NEUTRAL:
            for value in ({"a": 1}, [7], "other", 3):
                assert f"{name} " in lora_refusal({**saved, name: value}), (name, value)
            for value in LORA_NEUTRAL[name]:
                assert lora_refusal({**saved, name: value}) == "", (name, value)
    assert "use_new_thing true not known here" in lora_refusal({**saved, "use_new_thing": True})


@pytest.mark.parametrize("settings, fits", [
    ({}, True), ({"init_lora_weights": "gaussian"}, True), ({"init_lora_weights": False}, True),
    ({"init_lora_weights": "orthogonal"}, True), ({"init_lora_weights": "pissa"}, False),
    ({"init_lora_weights": "pissa_niter_4"}, False), ({"init_lora_weights": "olora"}, False),
    ({"alora_invocation_tokens": [5, 6]}, False), ({"lora_bias": True}, False),
    ({"trainable_token_indices": [1]}, False), ({"exclude_modules": ["v_proj"]}, False),
    ({"layer_replication": [[0, 2], [1, 2]]}, False)], ids=str)
def test_peft_s_adapters_give_its_logits_or_are_refused(settings, fits, tmp_path):
    base = hub_llama(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(base, peft.LoraConfig(
            r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **settings))
        randomise(theirs, seed=1).save_pretrained(tmp_path / "adapter")
    if not fits:
        with pytest.raises(UserError, match=f"adapter_config.json: .*{next(iter(settings))} .* not supported"):
            read_adapter_config(tmp_path / "adapter")
        return
    ours = load_llama(tmp_path / "base")
    add_lora(ours, **read_adapter_config(tmp_path / "adapter"))
    load_adapter(ours, tmp_path / "adapter")
    assert relative_error(ours(some_tokens()), logits_of(theirs.eval(), some_tokens())) < TOLERANCE


def test_embeddings_that_peft_saved_are_the_base_s_or_refused_by_name(tmp_path):
    base = hub_llama(tmp_path / "base")
    theirs = randomise(peft.get_peft_model(base, peft.LoraConfig(
        r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")), seed=1).eval()
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    whole = sorted(name for name in tensors if ".lora_" not in name)
    assert any("lm_head" in name for name in whole)
    ours = load_llama(tmp_path / "base")
    add_lora(ours, **read_adapter_config(tmp_path / "adapter"))
    load_adapter(ours, tmp_path / "adapter")
    assert relative_error(ours(some_tokens()), logits_of(theirs, some_tokens())) < TOLERANCE
    for name in whole:
        save_file({**tensors, name: tensors[name] + 1}, file)
        with pytest.raises(UserError, match=f"{name} is not the base's .*: trained with it, or on another base"):
            load_adapter(ours, tmp_path / "adapter")
    file.write_bytes(POINTER)
    with pytest.raises(UserError, match="adapter_model.safetensors: a git-lfs pointer"):
        load_adapter(ours, tmp_path / "adapter")


# ----------------------------------------------------------------------------- a ViT's config

def timm_vit(timm, name, folder, **arguments):
    """A small timm model of random values, saved in the folder; its tokens of some pixels."""
    model = fill(timm.create_model(name, num_classes=0, depth=1, img_size=64, **arguments))
    save_file(model.state_dict(), folder / "vit.safetensors")
    return model.forward_features(some_pixels())


@torch.no_grad()
@pytest.mark.parametrize("name, arguments, beside, heads, activation", [
    ("vit_huge_patch14_224", {"embed_dim": 160, "num_heads": 2, "patch_size": 32},
     {"model_args": {"embed_dim": 160, "num_heads": 2}}, 2, "gelu"),
    ("vit_base_patch32_clip_224", {"embed_dim": 192, "num_heads": 3},
     {"model_args": {"embed_dim": 192, "num_heads": 3}}, 3, "gelu"),
    ("vit_base_patch32_clip_quickgelu_224", {"embed_dim": 192, "num_heads": 6},
     {"model_args": {"embed_dim": 192, "num_heads": 6}}, 6, "quick_gelu"),
    ("vit_base_patch32_clip_224", {"embed_dim": 192, "num_heads": 3, "act_layer": "quick_gelu"},
     {"model_args": {"embed_dim": 192, "num_heads": 3, "act_layer": "quick_gelu"}}, 3, "quick_gelu"),
    ("vit_tiny_patch16_224", {"patch_size": 32}, {"pretrained_cfg": {"tag": "augreg"}}, 3, "gelu")])
def test_timm_s_config_beside_a_vit_tells_heads_and_activation(name, arguments, beside, heads, activation, references,
                                                              tmp_path):
    wanted = timm_vit(references[0], name, tmp_path, **arguments)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name, **beside}))
    ours = load_encoder(tmp_path / "vit.safetensors")
    assert (ours.config.heads, ours.config.gelu) == (heads, activation)
    assert relative_error(ours(some_pixels()), wanted) < TOLERANCE
    save_vlm(VLM(ours, LLaMA(LLAMA)), tmp_path / "model")  # its own file says it, too
    again = load_vlm(tmp_path / "model").vision
    assert again.config == ours.config and torch.equal(again(some_pixels()), ours(some_pixels()))


def plain_vit(folder, **changes):
    """The tensors of a small ViT with a norm before its blocks, of 192 channels; with config.json as given."""
    config = ViTConfig(image_size=32, patch_size=16, depth=1, **{"width": 192, "clip": True, **changes})
    save_file(ViT(config).state_dict(), folder / "vit.safetensors")
    return folder / "vit.safetensors"


@pytest.mark.parametrize("changes, config, message", [
    ({}, None, "quick GELU or LAION's plain one is not known; write beside it, as config.json, .*quickgelu"),
    ({"width": 1280, "clip": False}, None, "how many heads its 1280 channels have is not known; write"),
    ({"width": 1152, "clip": False}, None, "how many heads its 1152 channels have is not known; write"),
    ({}, {"architecture": "vit_base_patch32_clip_224"}, "width is 768 by the config beside it, 192 by"),
    ({}, {"architecture": "vit_tiny_patch16_224"}, "clip is False by the config beside it, True by"),
    ({}, {"architecture": "vit_base_patch32_clip_224", "pretrained_cfg": {"tag": "openai"},
          "model_args": {"embed_dim": 192, "num_heads": 3}}, "quick GELU or LAION's"),
    ({"clip": False}, {"architecture": "vit_tiny_patch16_224", "model_args": {"qkv_bias": False}},
     "qkv_bias false not supported"),
    ({"clip": False}, {"architecture": "vit_tiny_patch16_224", "model_args": {"norm_layer": "rmsnorm"}},
     "norm_layer .*not supported"),
    ({"clip": False}, {"architecture": "vit_tiny_patch16_224", "model_args": {"reg_tokens": 4}}, "reg_tokens 4 not"),
    ({"clip": False}, {"architecture": "vit_tiny_patch16_224", "model_args": {"new_thing": 4}},
     "new_thing 4 not known here"),
    ({"clip": False}, {"architecture": "vit_tiny_patch16_224", "model_args": {"act_layer": "gelu_tanh"}},
     "activation 'gelu_tanh' not supported"),
    ({"clip": False}, {"architecture": "vit_tiny_patch16_224", "model_args": {"num_heads": 5}},
     "5 heads of 192 channels cannot be"),
    ({"clip": False}, {"architecture": "eva02_tiny_patch14_224"}, "architecture 'eva02_tiny_patch14_224' not"),
    ({"clip": False}, {"model_type": "vit", "hidden_size": 192, "num_hidden_layers": 1, "num_attention_heads": 3},
     "a norm's eps of 1e-12 not supported here: 1e-06 is"),
    ({"clip": False}, {"model_type": "dinov2"}, "model_type 'dinov2' not supported"),
    ({}, {"model_type": "clip_vision_model", "hidden_size": 192, "num_hidden_layers": 1, "num_attention_heads": 3,
          "layer_norm_eps": 1e-6}, "a norm's eps of 1e-06 not supported here: 1e-05 is"),
    ({}, [], "damaged, or no config of a ViT")])
def test_a_vit_that_says_what_is_not_done_here_is_refused(changes, config, message, tmp_path):
    file = plain_vit(tmp_path, **changes)
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"{file}: .*{message}") as caught:
        load_vit(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, config, heads, activation", [
    ("config.json", {"model_type": "clip", "vision_config": {
        "hidden_size": 192, "num_hidden_layers": 1, "num_attention_heads": 6, "hidden_act": "gelu"}}, 6, "gelu"),
    ("config.json", {"model_type": "clip", "vision_config": {
        "hidden_size": 192, "num_hidden_layers": 1, "num_attention_heads": 3}}, 3, "quick_gelu"),
    ("open_clip_config.json", {"model_cfg": {"quick_gelu": True, "vision_cfg": {
        "width": 192, "layers": 1, "head_width": 32, "patch_size": 16}}}, 6, "quick_gelu"),
    ("open_clip_config.json", {"model_cfg": {"vision_cfg": {"width": 192, "layers": 1}}}, 3, "gelu")])
def test_clip_s_configs_tell_heads_and_activation(name, config, heads, activation, tmp_path):
    file = plain_vit(tmp_path)
    (tmp_path / name).write_text(json.dumps(config))
    ours = load_vit(file).config
    assert (ours.heads, ours.gelu) == (heads, activation)
    other = {"architecture": "vit_tiny_patch16_clip_224", "model_args": {"num_heads": 1, "depth": 1}}
    (tmp_path / ("config.json" if name.startswith("open") else "open_clip_config.json")).write_text(json.dumps(
        other if name.startswith("open") else {"vision_cfg": {"width": 192, "head_width": 192}}))
    with pytest.raises(UserError, match="heads is .* by config.json, .* by open_clip_config.json"):
        load_vit(file)


@torch.no_grad()
@pytest.mark.parametrize("name, arguments, message", [
    ("vit_small_patch14_dinov2", {}, "ls1.gamma is unknown"), ("deit3_small_patch16_224", {}, "ls1.gamma is unknown"),
    ("vit_small_patch14_reg4_dinov2", {}, "unknown"), ("deit_tiny_distilled_patch16_224", {}, "is unknown|not"),
    ("vit_tiny_patch16_224", {"qkv_bias": False}, "attn.qkv.bias is missing"),
    ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": True}, "fc_norm"),
    ("vit_tiny_patch16_224", {"no_embed_class": True}, "pos_embed is|fit"),
    ("vit_giant_patch14_224", {}, "how many heads its 1408 channels have is not known")])
def test_timm_s_other_vits_are_refused_by_what_differs(name, arguments, message, references, tmp_path):
    model = references[0].create_model(name, num_classes=0, depth=1, img_size=56, **arguments)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        load_vit(tmp_path / "vit.safetensors")
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------- tokenizers

def train_tokenizer(path, words):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([words] * 20), model_prefix=str(path.with_suffix("")), model_type="bpe",
        vocab_size=290, hard_vocab_limit=False, byte_fallback=True, minloglevel=2)
    return Tokenizer(path)


def test_a_model_s_own_tokenizer_is_held_against_the_shards(tmp_path, capsys):
    hub_llama(tmp_path / "base")
    ours = train_tokenizer(tmp_path / "tokenizer.model", "chest film shows a lower lobe consolidation")
    pieces = [ours.model.id_to_piece(token) for token in range(ours.vocab_size)]
    base = str(tmp_path / "base")
    config = settle(train_vlm.Config(model="sample", language_weights=base, vision="frozen", language="lora"))
    device = torch.device("cpu")
    train_vlm.load_parts(config, ours, {"resize": "squash"}, None, device, torch.float32)
    assert f"{base}: not known whether its tokenizer is the shards': no tokenizer.model" in capsys.readouterr().out
    (tmp_path / "base/tokenizer.json").write_text(json.dumps(
        {"model": {"vocab": {piece: token for token, piece in enumerate(pieces)}}, "added_tokens": []}))
    assert tokenizer_mismatch(base, pieces) == ("", "")
    theirs = train_tokenizer(tmp_path / "base/tokenizer.model", "retina photographs reveal haemorrhages nearby")
    assert theirs.sha256 != ours.sha256
    with pytest.raises(UserError, match=r"base/tokenizer.model: id \d+ is .* prepare/all.py --only=... "
                                        f"--tokenizer={base}/tokenizer.model`"):
        train_vlm.load_parts(config, ours, {"resize": "squash"}, None, device, torch.float32)
    (tmp_path / "base/tokenizer.model").write_bytes((tmp_path / "tokenizer.model").read_bytes())
    assert tokenizer_mismatch(base, pieces) == ("", "")
    (tmp_path / "base/tokenizer.model").write_bytes(POINTER)
    assert "git-lfs pointer" in tokenizer_mismatch(base, pieces)[1]
