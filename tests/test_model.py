"""The model against transformers, written-out loops and its own files; helpers of other tests."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

from data import BOS, EOS
from lora import add_lora, lora_layers
from model import Linear, LLaMA, LlamaConfig, RMSNorm, VLM, ViT, ViTConfig, rotary_angles, rotate
from plumbing.flags import UserError

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


def hub_llama(folder, nkv=2, theta=5e5, shard="1GB"):
    """A random LLaMA of transformers, also written into the folder."""
    sizes = {**asdict(LLAMA), "num_key_value_heads": nkv}
    del sizes["rope_theta"]
    config = transformers.LlamaConfig(
        **sizes, rope_parameters={"rope_type": "default", "rope_theta": theta})
    torch.manual_seed(0)
    model = randomise(transformers.LlamaForCausalLM(config)).eval()
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def some_tokens(rows=3, length=40):
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(1))


def some_images(count):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(256, (count, 16, 16, 3), generator=generator, dtype=torch.uint8)


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ----------------------------------------------------------------------------- against transformers

@pytest.mark.parametrize("shard", ["20KB", "1GB"])
@pytest.mark.parametrize("nkv", [4, 2, 1])
def test_llama_logits_equal_those_of_transformers(nkv, shard, tmp_path):
    theirs = hub_llama(tmp_path, nkv, shard=shard)
    files = len(list(tmp_path.glob("*.safetensors")))
    assert files > 2 if shard == "20KB" else files == 1
    ours = LLaMA.from_pretrained(tmp_path)
    assert relative_error(ours(some_tokens()), theirs(some_tokens()).logits) < TOLERANCE


def test_folder_with_pmc_llama_s_old_config_and_wrong_ids_loads(tmp_path):
    theirs = hub_llama(tmp_path, nkv=4, theta=10000.0)
    old = {key: value for key, value in asdict(LLAMA).items()
           if key not in ("num_key_value_heads", "rope_theta")}
    (tmp_path / "config.json").write_text(json.dumps({
        **old, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1, "max_sequence_length": 2048,
        "tie_word_embeddings": False, "torch_dtype": "float32", "use_cache": True,
        "transformers_version": "4.28.0.dev0"}))
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    ours = VLM(ViT(VIT), LLaMA.from_pretrained(tmp_path))
    assert relative_error(ours.language(some_tokens()), theirs(some_tokens()).logits) < TOLERANCE
    assert (BOS, EOS) == (1, 2)
    for token, answer in [(1, [1, 1, 1]), (2, [])]:  # id 2 alone ends an answer
        always = F.one_hot(torch.tensor(token), V) * 1e6
        hook = ours.language.lm_head.register_forward_hook(lambda module, x, y: y + always)
        assert list(ours.generate([(None, [[5, 6]])], max_new_tokens=3)) == [(0, [answer])]
        hook.remove()


def test_saved_language_model_is_read_by_transformers(tmp_path):
    model = tiny_vlm()
    model.save(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "language").eval()
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (1, 2)
    assert relative_error(model.language(some_tokens()), theirs(some_tokens()).logits) < TOLERANCE


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
    plain, prefixed = (ViT.from_pretrained(tmp_path / f"{name}.safetensors")
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
    tiny_vlm().save(tmp_path)
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
    load = {"vision.safetensors": lambda: ViT.from_pretrained(file),
            "language/model.safetensors": lambda: LLaMA.from_pretrained(file.parent),
            "projector.safetensors": lambda: VLM.load(tmp_path)}[part]
    with pytest.raises(UserError, match=message.format(norm=norm, file=file.name)):
        load()


def test_absent_shard_and_absent_config_are_refused_by_name(tmp_path):
    hub_llama(tmp_path, shard="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: no such weights file"):
        LLaMA.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="config.json: not there"):
        LLaMA.from_pretrained(tmp_path)


@pytest.mark.parametrize("change, message", [
    ({"tie_word_embeddings": True}, "tied embeddings"), ({"attention_bias": True}, "biases"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "llama3 rope"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "linear rope"),
    ({"hidden_act": "gelu"}, "activation gelu"), ({"head_dim": 16}, "head_dim")])
def test_unsupported_config_is_refused_by_name(change, message, tmp_path):
    hub_llama(tmp_path)
    edit_json(tmp_path / "config.json", **change)
    with pytest.raises(UserError, match=f"config.json: {message}.* not supported"):
        LLaMA.from_pretrained(tmp_path)


@pytest.mark.parametrize("case", ["scratch", "scratch_lora", "language_lora", "vision_lora"])
def test_save_and_load_keep_every_bit_and_write_nothing_twice(case, tmp_path):
    model = tiny_vlm()
    files = {"projector.safetensors", "config.json", "vision.safetensors",
             "language/model.safetensors", "language/config.json"}
    if not case.startswith("scratch"):
        model.save(tmp_path / "pretrained")
        model = VLM.build("sample", V, tmp_path / "pretrained/vision.safetensors",
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
    randomise(model, seed=1).save(tmp_path / "run")
    written = {path for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {str(path.relative_to(tmp_path / "run")) for path in written} == files
    loaded = VLM.load(tmp_path / "run")
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
    model.save(tmp_path)
    assert relative_error(VLM.load(tmp_path).language(some_tokens()), before) < TOLERANCE


def test_trained_part_that_is_frozen_after_loading_is_saved_again(tmp_path):
    tiny_vlm().save(tmp_path / "pretrained")
    model = VLM.build("sample", V, tmp_path / "pretrained/vision.safetensors",
                      tmp_path / "pretrained/language")
    randomise(model, seed=1).save(tmp_path / "first")
    VLM.load(tmp_path / "first").requires_grad_(False).save(tmp_path / "second")
    tensors = VLM.load(tmp_path / "second").state_dict()
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
    q, k = torch.randn(2, 1, 3, 1, 16, generator=torch.Generator().manual_seed(0))

    def score(query_at, key_at):
        turned = [rotate(x, *rotary_angles(torch.tensor([[at]]), 16, 10000.0))
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


# ----------------------------------------------------------------------------- generation

GROUPS = [(0, [[5, 6, 7, 8, 9, 10, 11], [60, 61, 62, 63, 64]]), (1, [[40]]),  # image, prompts about it
          (-1, [[50, 51, 52]]), (-1, [[70, 71], [72]])]


@torch.no_grad()
def embed_alone(model, tokens, image):
    """(1, T, C): <bos>, the image where there is one (image: number or -1), tokens."""
    x = model.language.embed(torch.tensor([[BOS, *tokens]]))
    if image < 0:
        return x
    return torch.cat([x[:, :1], model.encode_images(some_images(2)[image:image + 1]), x[:, 1:]], 1)


@torch.no_grad()
def greedy_uncached(model, prompt, image, max_new_tokens):
    answer = []
    while len(answer) < max_new_tokens:
        x = embed_alone(model, prompt + answer, image)
        T = x.shape[1]
        mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
        x = model.language.transform(x, torch.arange(T)[None], mask)
        token = model.language.lm_head(x[0, -1]).argmax().item()
        if token == EOS:
            break
        answer.append(token)
    return answer


def generate(model, groups, *settings, **more):
    """The answers to each group, in the order of the groups."""
    images = some_images(2).numpy()
    given = [(images[image] if image >= 0 else None, prompts) for image, prompts in groups]
    answers = dict(model.generate(given, *settings, **more))
    assert sorted(answers) == list(range(len(groups)))
    return [answers[number] for number in range(len(groups))]


def vlm_that_stops_early():
    """A VLM that ends its answer to the first prompt early, while others go on."""
    model = tiny_vlm()
    answers = sum(generate(model, GROUPS, 12), [])
    eos = next(t for t in answers[0][1:] if any(t not in answer for answer in answers))
    with torch.no_grad():
        model.language.lm_head.weight[[EOS, eos]] = model.language.lm_head.weight[[eos, EOS]]
    return model


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_generation_together_equals_uncached_generation_one_at_a_time(rows):
    model = vlm_that_stops_early()
    answers = generate(model, GROUPS, 12, rows=rows)
    assert 0 < len(answers[0][0]) < max(map(len, sum(answers, []))) == 12  # some stop, some do not
    for (image, prompts), replies in zip(GROUPS, answers):
        assert replies == [greedy_uncached(model, prompt, image, 12) for prompt in prompts]
    assert generate(model, [(1, GROUPS[0][1])], 12) != [answers[0]]  # images matter


def test_groups_are_taken_in_as_others_are_finished():
    """Sixty groups of one to five questions through eight rows: lazily, and none changes another."""
    model, generator = vlm_that_stops_early(), np.random.default_rng(0)
    groups = [(int(generator.integers(-1, 2)),
               [generator.integers(5, V, generator.integers(1, 9)).tolist()
                for _ in range(generator.integers(1, 6))]) for _ in range(60)]
    images, taken = some_images(2).numpy(), []

    def given():
        for number, (image, prompts) in enumerate(groups):
            taken.append(number)
            yield images[image] if image >= 0 else None, prompts

    order = []
    for number, answers in model.generate(given(), 6, rows=8):
        order.append(number)
        assert len(taken) <= len(order) + 8  # under way or finished
        image, prompts = groups[number]
        assert answers == [greedy_uncached(model, prompt, image, 6) for prompt in prompts]
    assert sorted(order) == list(range(60)) != order


def test_greedy_generation_equals_that_of_transformers(tmp_path):
    model = vlm_that_stops_early()
    model.save(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "language").eval()
    for (image, prompts), answers in zip(GROUPS, generate(model, GROUPS, 12)):
        for prompt, answer in zip(prompts, answers):
            if image >= 0:
                x = embed_alone(model, prompt, image)
                given = {"inputs_embeds": x, "attention_mask": torch.ones(x.shape[:2]).long()}
            else:
                x = torch.tensor([[BOS, *prompt]])
                given = {"input_ids": x, "attention_mask": torch.ones_like(x)}
            wanted = theirs.generate(**given, do_sample=False, max_new_tokens=12, pad_token_id=0)[0]
            wanted = wanted.tolist()[0 if image >= 0 else 1 + len(prompt):]
            assert answer == (wanted[:wanted.index(EOS)] if EOS in wanted else wanted)


def test_sampling_follows_torch_s_seed_and_the_temperature():
    model = vlm_that_stops_early()

    def sample(seed, temperature):
        torch.manual_seed(seed)
        return generate(model, GROUPS, 12, temperature)

    assert sample(0, 0.5) == sample(0, 0.5) != sample(1, 0.5)
    assert sample(0, 1e-5) == sample(0, 0.0) != sample(0, 0.5)


def test_sampled_frequencies_follow_the_softmax():
    model, rows = tiny_vlm(), 20_000
    torch.manual_seed(0)
    answers = generate(model, [(-1, [[5, 6]] * 50)] * (rows // 50), 1, 1.5)
    counts = torch.bincount(torch.tensor([(row or [EOS])[0] for row in sum(answers, [])]), minlength=V)
    with torch.no_grad():
        expected = F.softmax(model.language(torch.tensor([[BOS, 5, 6]]))[0, -1] / 1.5, -1) * rows
    chi_square = ((counts - expected)[expected > 5] ** 2 / expected[expected > 5]).sum().item()
    freedom = (expected > 5).sum().item()
    assert freedom > 100
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5
