"""The model against transformers, written-out loops and its own files; helpers of other tests."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

from data import BOS, EOS
from generate import finished_groups, generate
from lora import add_lora, lora_layers
from model import LLaMA, LlamaConfig, RMSNorm, VLM, ViT, ViTConfig, normalise, rotary_angles, rotate
from plumbing.flags import UserError
from plumbing.kernels import Linear
from weights import build_vlm, load_llama, load_vlm, save_vlm
from zoo.encoders import load_vit

TOLERANCE = 1e-5  # relative, float32
V = 307  # odd, as 32001 is
VIT = ViTConfig(image_size=16, patch_size=8, width=128, depth=2)  # 5 tokens an image
LLAMA = LlamaConfig(V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-4, rope_theta=5e5)


def relative_error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@torch.no_grad()
def randomise(model, seed=0):
    """Far enough from the initialisation that every weight, bias and norm matters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def tiny_vlm():
    torch.manual_seed(0)
    return randomise(VLM(ViT(VIT), LLaMA(LLAMA)))


def hub_llama(folder, nkv=2, theta=5e5, shard="1GB", head_dim=8):
    """A random LLaMA of transformers, also written into the folder."""
    sizes = {**asdict(LLAMA), "num_key_value_heads": nkv, "head_dim": head_dim}
    del sizes["rope_theta"]
    config = transformers.LlamaConfig(
        **sizes, rope_parameters={"rope_type": "default", "rope_theta": theta})
    torch.manual_seed(0)
    model = randomise(transformers.LlamaForCausalLM(config)).eval()
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def some_tokens(length=40):
    return torch.randint(V, (length,), generator=torch.Generator().manual_seed(1))


def logits_of(theirs, tokens):
    """(T, V) logits of a model of transformers, which wants (1, T) tokens."""
    return theirs(input_ids=tokens[None]).logits[0]


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ----------------------------------------------------------------------------- against transformers

@pytest.mark.parametrize("shard", ["20KB", "1GB"])
@pytest.mark.parametrize("nkv", [4, 2, 1])
def test_llama_logits_equal_those_of_transformers(nkv, shard, tmp_path):
    theirs = hub_llama(tmp_path, nkv, shard=shard)
    files = len(list(tmp_path.glob("*.safetensors")))
    assert files > 2 if shard == "20KB" else files == 1
    ours = load_llama(tmp_path)
    assert relative_error(ours(some_tokens()), logits_of(theirs, some_tokens())) < TOLERANCE


def test_folder_with_pmc_llama_s_old_config_and_wrong_ids_loads(tmp_path):
    theirs = hub_llama(tmp_path, nkv=4, theta=10000.0)
    old = {key: value for key, value in asdict(LLAMA).items()
           if key not in ("num_key_value_heads", "rope_theta", "head_dim")}
    (tmp_path / "config.json").write_text(json.dumps({
        **old, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1, "max_sequence_length": 2048,
        "tie_word_embeddings": False, "torch_dtype": "float32", "use_cache": True,
        "transformers_version": "4.28.0.dev0"}))
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    ours = VLM(ViT(VIT), load_llama(tmp_path))
    assert relative_error(ours.language(some_tokens()), logits_of(theirs, some_tokens())) < TOLERANCE
    assert (BOS, EOS) == (1, 2)
    for token, answer in [(1, [1, 1, 1]), (2, [])]:  # id 2 alone ends an answer
        always = F.one_hot(torch.tensor(token), V) * 1e6
        hook = ours.language.lm_head.register_forward_hook(lambda module, x, y: y + always)
        ((_, (given,)),) = finished_groups(generate(ours, [([], [[BOS, 5, 6]])], max_new_tokens=3))
        assert given.tokens == answer
        hook.remove()


def test_saved_language_model_is_read_by_transformers(tmp_path):
    model = tiny_vlm()
    save_vlm(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "language").eval()
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (1, 2)
    assert relative_error(model.language(some_tokens()), logits_of(theirs, some_tokens())) < TOLERANCE


def test_vit_tokens_equal_those_of_transformers(tmp_path):
    ours, tensors = tiny_vlm().vision, {}
    renamed = {"attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense",
               "mlp.fc2": "output.dense", "norm1": "layernorm_before", "norm2": "layernorm_after",
               "patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm",
               "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
    for key, tensor in ours.state_dict().items():
        name, _, kind = key.rpartition(".") if "." in key else (key, "", "")
        block, part = "", name
        if name.startswith("blocks."):
            _, number, part = name.split(".", 2)
            block = f"encoder.layer.{number}."
        if part == "attn.qkv":
            for which, third in zip(("query", "key", "value"), tensor.chunk(3)):
                tensors[f"{block}attention.attention.{which}.{kind}"] = third.clone()
        else:
            tensors[f"{block}{renamed[part]}.{kind}".rstrip(".")] = tensor
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=512, layer_norm_eps=1e-6, hidden_act="gelu").save_pretrained(tmp_path)
    theirs, report = transformers.ViTModel.from_pretrained(
        tmp_path, add_pooling_layer=False, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    wanted = theirs.eval()(pixels).last_hidden_state
    assert wanted.shape == (3, 5, 128)
    assert relative_error(ours(pixels), wanted) < TOLERANCE
    assert {m.eps for m in ours.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}


# ----------------------------------------------------------------------------- loading

def test_biomedclip_s_layout_loads_as_plain_timm_s(tmp_path):
    tensors = tiny_vlm().vision.state_dict()
    save_file(tensors, tmp_path / "timm.safetensors")
    layout = {"visual.trunk." + key: tensor for key, tensor in tensors.items()}
    save_file({**layout, "visual.head.proj.weight": torch.ones(8, 128),
               "logit_scale": torch.ones(()), "text.proj.0.weight": torch.ones(2, 2),
               "text.transformer.embeddings.position_ids": torch.arange(3)},
              tmp_path / "biomedclip.safetensors")
    plain, prefixed = (load_vit(tmp_path / f"{name}.safetensors")
                       for name in ("timm", "biomedclip"))
    assert plain.config == prefixed.config == VIT
    for key, tensor in tensors.items():
        assert torch.equal(plain.state_dict()[key], tensor), key
        assert torch.equal(prefixed.state_dict()[key], tensor), key


@pytest.mark.parametrize("damage, message", [
    ("missing", "{norm} is missing"), ("unknown", "blocks.0.extra is unknown"),
    ("misshapen", r"{norm} is \(3,\), not"), ("truncated", "{file}: not a whole safetensors file"),
    ("empty", "{file}: not a whole"), ("absent", "{file}: no such weights file")])
@pytest.mark.parametrize("part", ["vision.safetensors", "language/model.safetensors",
                                  "projector.safetensors"])
def test_weights_that_do_not_fit_are_refused_by_name(part, damage, message, tmp_path):
    save_vlm(tiny_vlm(), tmp_path)
    file = tmp_path / part
    norm = {"vision.safetensors": "norm.weight", "language/model.safetensors": "model.norm.weight",
            "projector.safetensors": "bias"}[part]
    tensors = load_file(file)
    if damage == "missing":
        del tensors[norm]
    tensors.update({"unknown": {"blocks.0.extra": torch.ones(1)},
                    "misshapen": {norm: torch.ones(3)}}.get(damage, {}))
    save_file(tensors, file)
    if damage in ("truncated", "empty"):
        file.write_bytes(file.read_bytes()[:-10] if damage == "truncated" else b"")
    elif damage == "absent":
        file.unlink()
    load = {"vision.safetensors": lambda: load_vit(file),
            "language/model.safetensors": lambda: load_llama(file.parent),
            "projector.safetensors": lambda: load_vlm(tmp_path)}[part]
    with pytest.raises(UserError, match=message.format(norm=norm, file=file.name)):
        load()


def test_absent_shard_and_absent_config_are_refused_by_name(tmp_path):
    hub_llama(tmp_path, shard="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is missing, 1 of "):
        load_llama(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="config.json: not there"):
        load_llama(tmp_path)


@pytest.mark.parametrize("change, message", [
    ({"tie_word_embeddings": True}, "tied embeddings"), ({"attention_bias": True}, "biases"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "llama3 rope"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "linear rope"),
    ({"hidden_act": "gelu"}, "activation gelu")])
def test_unsupported_config_is_refused_by_name(change, message, tmp_path):
    hub_llama(tmp_path)
    edit_json(tmp_path / "config.json", **change)
    with pytest.raises(UserError, match=f"config.json: {message}.* not supported"):
        load_llama(tmp_path)


@pytest.mark.parametrize("change, message", [
    ({"head_dim": 16}, r"does not fit this model: .*q_proj.weight is \(32, 32\), not \(64, 32\)"),
    ({"head_dim": 7}, "config.json: its sizes cannot be"),
    ({"head_dim": -8}, "config.json: head_dim -8 cannot be"),
    ({"head_dim": "8"}, "config.json: head_dim '8' cannot be")])
def test_a_head_size_that_the_tensors_do_not_have_is_refused(change, message, tmp_path):
    hub_llama(tmp_path)
    edit_json(tmp_path / "config.json", **change)
    with pytest.raises(UserError, match=message):
        load_llama(tmp_path)

@pytest.mark.parametrize("head_dim", [16, 6])
def test_a_head_size_of_its_own_is_transformers_too(head_dim, tmp_path):
    theirs = hub_llama(tmp_path / "hub", head_dim=head_dim)
    ours = load_llama(tmp_path / "hub")
    assert ours.config.head_size == head_dim != LLAMA.hidden_size / LLAMA.num_attention_heads
    assert relative_error(ours(some_tokens()), logits_of(theirs, some_tokens())) < TOLERANCE
    save_vlm(VLM(ViT(VIT), ours), tmp_path / "run")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/language").eval()
    assert relative_error(logits_of(again, some_tokens()), logits_of(theirs, some_tokens())) < TOLERANCE


@pytest.mark.parametrize("case", ["scratch", "scratch_lora", "language_lora", "vision_lora"])
def test_save_and_load_keep_every_bit_and_write_nothing_twice(case, tmp_path):
    model = tiny_vlm()
    files = {"projector.safetensors", "config.json", "vision.safetensors",
             "language/model.safetensors", "language/config.json"}
    if not case.startswith("scratch"):
        save_vlm(model, tmp_path / "pretrained")
        model = build_vlm("sample", V, tmp_path / "pretrained/vision.safetensors",
                          tmp_path / "pretrained/language")
        files -= {"language/model.safetensors", "language/config.json"}
    if case == "vision_lora":
        model.language.requires_grad_(False)
        files -= {"vision.safetensors"}
    if case != "scratch":
        part, target = ("vision", "qkv") if case == "vision_lora" else ("language", "q_proj,v_proj")
        model.lora[part] = {"targets": target, "r": 4, "alpha": 6.0, "dropout": 0.1}
        add_lora(getattr(model, part), **model.lora[part])
        folder = "vision_adapter" if case == "vision_lora" else "adapter"
        files |= {f"{folder}/adapter_config.json", f"{folder}/adapter_model.safetensors"}
    save_vlm(randomise(model, seed=1), tmp_path / "run")
    written = {path for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {str(path.relative_to(tmp_path / "run")) for path in written} == files
    loaded = load_vlm(tmp_path / "run")
    assert loaded.lora == model.lora
    assert [layer.scale for layer in lora_layers(loaded).values()] == [1.5] * (
        0 if case == "scratch" else 2 if case == "vision_lora" else 4)
    tensors = loaded.state_dict()
    assert tensors.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensors[key], tensor), key


def test_saving_a_merged_model_does_not_apply_the_update_twice(tmp_path):
    model = tiny_vlm()
    model.lora["language"] = {"targets": "q_proj", "r": 4, "alpha": 6.0, "dropout": 0.0}
    add_lora(model.language, **model.lora["language"])
    before = randomise(model, seed=1).language(some_tokens())
    for layer in lora_layers(model.language).values():
        layer.merge()
    save_vlm(model, tmp_path)
    assert relative_error(load_vlm(tmp_path).language(some_tokens()), before) < TOLERANCE


def test_trained_part_that_is_frozen_after_loading_is_saved_again(tmp_path):
    save_vlm(tiny_vlm(), tmp_path / "pretrained")
    model = build_vlm("sample", V, tmp_path / "pretrained/vision.safetensors",
                      tmp_path / "pretrained/language")
    save_vlm(randomise(model, seed=1), tmp_path / "first")
    save_vlm(load_vlm(tmp_path / "first").requires_grad_(False), tmp_path / "second")
    tensors = load_vlm(tmp_path / "second").state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensors[key], tensor), key


# ----------------------------------------------------------------------------- parts

def test_rms_norm_of_bfloat16_has_float32_statistics():
    x = (torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * 3).bfloat16()
    exact = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-6)
    rounded = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)  # all in bfloat16
    ours = RMSNorm(512, 1e-6)(x)
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours, exact) < 0.9 * relative_error(rounded, exact)
    assert (ours == exact.bfloat16()).float().mean() > 0.999  # nothing but the last rounding


def test_rotary_score_depends_only_on_the_difference_of_positions():
    q, k = torch.randn(2, 1, 3, 16, generator=torch.Generator().manual_seed(0))

    def score(query_at, key_at):
        turned = [rotate(x, *rotary_angles(torch.tensor([at]), 16, 10000.0))
                  for x, at in ((q, query_at), (k, key_at))]
        return (turned[0] * turned[1]).sum(-1)

    for shift in (1, 9, 60):
        assert relative_error(score(12 + shift, 3 + shift), score(12, 3)) < TOLERANCE
    assert relative_error(score(13, 3), score(12, 3)) > 0.01
    assert relative_error(score(3, 12), score(12, 3)) > 0.01


def test_parameter_counts_of_the_paper_s_parts():
    with torch.device("meta"):
        model = VLM(ViT(ViTConfig()), LLaMA(LlamaConfig()))
        sizes = [sum(p.numel() for p in part.parameters())
                 for part in (model.vision, model.language, model.projector)]
        add_lora(model.language, "q_proj,v_proj", r=8)
    assert sizes == [85_798_656, 6_738_415_616, 3_149_824]
    assert sum(p.numel() for p in model.language.parameters() if p.requires_grad) == 4_194_304


@pytest.mark.parametrize("shape", [(3, 100, 48), (1, 500, 48), (7, 48), (2, 3, 40, 48)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_torch_s_by_either_way(shape, bias, monkeypatch):
    """Many rows and few, which a CPU with AVX-512 computes in different ways, and their gradients."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    torch.manual_seed(0)
    ours = Linear(48, 80, bias=bias)
    theirs = torch.nn.Linear(48, 80, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    x, gradient = torch.randn(shape), torch.randn(*shape[:-1], 80)
    found = []
    for module in (ours, theirs):
        given = x.clone().requires_grad_()
        y = module(given)
        y.backward(gradient)
        found.append([y, given.grad, *(parameter.grad for parameter in module.parameters())])
    for one, other in zip(*found, strict=True):
        assert one.shape == other.shape and relative_error(one, other) < TOLERANCE
    # As a part of a row of a larger tensor, whose strides are others
    assert relative_error(ours(x[..., ::2, :]), theirs(x[..., ::2, :])) < TOLERANCE
    ours(x).relu_().sum().backward()  # as nn.ReLU(inplace=True) behind it would


# ----------------------------------------------------------------------------- images of other sizes

@torch.no_grad()
@pytest.mark.parametrize("clip", [False, True])
def test_vit_at_448_and_at_oblongs_is_timm_s(clip, references):
    """At its own size with the positions that it was trained with, bit for bit; elsewhere resampled as by timm."""
    timm = references[0]
    ours = randomise(ViT(ViTConfig(patch_size=16, width=64, depth=1, clip=clip))).eval()
    name = "vit_base_patch16_clip_quickgelu_224" if clip else "vit_base_patch16_224"
    theirs = timm.create_model(name, num_classes=0, depth=1, embed_dim=64, num_heads=1, dynamic_img_size=True)
    theirs.eval().load_state_dict(ours.state_dict())
    assert ours.positions(14, 14) is ours.pos_embed
    for height, width in ((448, 448), (224, 224), (96, 352)):
        rows, columns = height // 16, width // 16
        wanted = timm.layers.resample_abs_pos_embed(ours.pos_embed, (rows, columns), num_prefix_tokens=1)
        assert relative_error(ours.positions(rows, columns), wanted) < TOLERANCE
        pixels = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
        tokens = ours(pixels)
        assert tokens.shape == (2, ours.tokens(height, width), 64) == (2, 1 + rows * columns, 64)
        assert relative_error(tokens, theirs.forward_features(pixels)) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("merge", [2, 3])
def test_merged_patches_are_a_written_out_space_to_depth(merge):
    plain = randomise(ViT(VIT)).eval()
    merged = ViT(replace(VIT, merge=merge)).eval()
    merged.load_state_dict(plain.state_dict())
    rows, columns = 2 * merge, 3 * merge
    pixels = torch.randn(2, 3, 8 * rows, 8 * columns, generator=torch.Generator().manual_seed(0))
    patches = plain(pixels)[:, 1:]  # without the class token
    wanted = [[torch.cat([patches[image, (row + below) * columns + column + right]
                          for below in range(merge) for right in range(merge)])
               for row in range(0, rows, merge) for column in range(0, columns, merge)] for image in range(2)]
    wanted = torch.stack([torch.stack(tokens) for tokens in wanted])
    assert wanted.shape == (2, 6, merge ** 2 * 128)
    assert wanted.shape[1:] == (merged.tokens(8 * rows, 8 * columns), merged.output_width)
    assert torch.equal(merged(pixels), wanted)


def test_tokens_of_an_image_by_its_size():
    plain, merged = (ViT(ViTConfig(width=64, depth=0, merge=merge)) for merge in (1, 2))
    assert [plain.tokens(*size) for size in ((224, 224), (448, 448), (224, 96))] == [197, 785, 85]
    assert [merged.tokens(*size) for size in ((224, 224), (448, 448), (224, 96))] == [49, 196, 21]
    sizes = np.array([(224, 224), (448, 448)], [("height", "<u2"), ("width", "<u2")])
    assert plain.tokens(*(sizes[side].astype(int) for side in sizes.dtype.names)).tolist() == [197, 785]
    plain.require_shapes("a", sizes)
    sizes["width"][1] = 440
    with pytest.raises(UserError, match="^a: an image has 440 pixels along a side, no multiple of 16"):
        plain.require_shapes("a", sizes)


@torch.no_grad()
def test_images_of_different_sizes_are_encoded_as_one_by_one():
    model, generator = tiny_vlm(), torch.Generator().manual_seed(2)
    sizes = [(16, 16), (8, 24), (16, 16), (24, 8), (8, 24)]
    images = [torch.randint(256, (*size, 3), generator=generator, dtype=torch.uint8) for size in sizes]
    alone = [model.projector(model.vision(normalise(image[None]))[0]) for image in images]
    assert [len(tokens) for tokens in alone] == [5, 4, 5, 4, 4]
    assert relative_error(model.encode_images(images), torch.cat(alone)) < TOLERANCE


def test_a_merging_model_is_saved_with_how_it_merges(tmp_path):
    torch.manual_seed(0)
    model = randomise(VLM(ViT(replace(VIT, merge=2)), LLaMA(LLAMA)))
    save_vlm(model, tmp_path)
    loaded = load_vlm(tmp_path)
    assert loaded.vision.config == model.vision.config and loaded.projector.in_features == 512
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
