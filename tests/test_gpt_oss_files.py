"""gpt-oss in files: the hub's folder, experts in MXFP4, folders of others, runs that train one, what is refused."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import eval_vqa
import train_vlm
from generate import ask
from lora import lora_layers
from plumbing.flags import UserError
from plumbing.sources import weights_of
from plumbing.tensors import language_files, tensor_shapes
from prepare.weights import WEIGHTS
from test_harmony import SPECIAL, write_tokenizer
from test_model import edit_json, relative_error
from test_qwen3_vl import random_images
from test_train import flags, prepare_sample
from test_weights import prepare
from weights import build_vlm, load_vlm, save_vlm
from zoo.chatml import open_tokenizer
from zoo.gpt_oss import GptOss, GptOssConfig
from zoo.gpt_oss_files import hub_config, load_gpt_oss, read_config

EXACT = 2e-5  # of the logits' standard deviation, in float32
TINY = GptOssConfig(512, 64, 96, 4, 8, 2, 16, num_local_experts=8, num_experts_per_tok=4, sliding_window=8,
                    layer_types=("sliding_attention", "full_attention") * 2)
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": [
    "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]}


def shapes_on_the_hub(config):
    """{key: (shape, dtype)} of OpenAI's folder."""
    C, D, E, nh = (config.hidden_size, config.intermediate_size, config.num_local_experts, config.num_attention_heads)
    q, k = nh * config.head_dim, config.num_key_value_heads * config.head_dim
    ends = {"model.embed_tokens.weight": (config.vocab_size, C), "model.norm.weight": (C,),
            "lm_head.weight": (config.vocab_size, C)}
    block = {"input_layernorm.weight": (C,), "post_attention_layernorm.weight": (C,), "self_attn.sinks": (nh,),
             "mlp.router.weight": (E, C), "mlp.router.bias": (E,), "self_attn.o_proj.weight": (C, q),
             "self_attn.o_proj.bias": (C,), "mlp.experts.gate_up_proj_bias": (E, 2 * D),
             "mlp.experts.down_proj_bias": (E, C)}
    for name, rows in (("q", q), ("k", k), ("v", k)):
        block |= {f"self_attn.{name}_proj.weight": (rows, C), f"self_attn.{name}_proj.bias": (rows,)}
    for name, rows, columns in (("gate_up", 2 * D, C), ("down", C, D)):
        block |= {f"mlp.experts.{name}_proj_blocks": (E, rows, columns // 32, 16),
                  f"mlp.experts.{name}_proj_scales": (E, rows, columns // 32)}
    return ends | {f"model.layers.{layer}.{name}": shape for layer in range(config.num_hidden_layers)
                   for name, shape in block.items()}


def hub_tensors(config, seed=0):
    """Random values under OpenAI's names, such that clamps are reached, and sinks and biases matter."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes_on_the_hub(config).items():
        values = torch.randn(shape, generator=draw)
        scale, mean = ((1, 0) if name.endswith("sinks") else (0.5, 0) if "bias" in name else
                       (0.3, 1) if "norm" in name else (0.3, 0))
        tensors[name] = (values * scale + mean).bfloat16()
        if name.endswith("_blocks"):
            tensors[name] = torch.randint(256, shape, generator=draw, dtype=torch.uint8)
        elif name.endswith("_scales"):
            tensors[name] = torch.randint(121, 126, shape, generator=draw, dtype=torch.uint8)
    return tensors


def write_hub(folder, config=TINY, files=3, **changes):
    """OpenAI's folder: files numbered from 0 although they say "of 2", blocks and scales of a matrix in different."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = hub_tensors(config)
    names = [f"model-{number:05}-of-{files - 1:05}.safetensors" for number in range(files)]
    mixed = sorted(tensors, key=lambda name: name[::-1])
    weight_map = {name: names[number % files] for number, name in enumerate(mixed)}
    for file in names:
        save_file({name: tensors[name] for name in reversed(weight_map) if weight_map[name] == file}, folder / file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {"total_size": size}, "weight_map": weight_map}))
    hub = hub_config(config) | {
        "quantization_config": MXFP4, "initial_context_length": 4096, "attention_dropout": 0.0, "eos_token_id": 200002,
        "experts_per_token": 4, "initializer_range": 0.02, "output_router_logits": False, "pad_token_id": None,
        "router_aux_loss_coef": 0.9, "transformers_version": "4.55.0.dev0", "use_cache": True} | changes
    (folder / "config.json").write_text(json.dumps(hub))
    return folder


def theirs_of(folder):
    """transformers' model of a folder, experts brought to plain numbers."""
    transformers = pytest.importorskip("transformers")
    packed = "quantization_config" in json.loads((folder / "config.json").read_text())
    return transformers.GptOssForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager",
        **{"quantization_config": transformers.Mxfp4Config(dequantize=True)} if packed else {}).eval()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return write_hub(tmp_path_factory.mktemp("hub") / "gpt_oss")


TOKENS = torch.randint(512, (40,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def wanted(hub):
    """transformers' logits, (40, V)."""
    with torch.no_grad():
        return theirs_of(hub)(TOKENS[None]).logits[0]


# ----------------------------------------------------------------------------- layouts

@torch.no_grad()
@pytest.mark.parametrize("rope", ["rope_scaling", "rope_parameters"])
def test_the_hub_s_folder_gives_transformers_logits(rope, hub, wanted, tmp_path):
    shutil.copytree(hub, tmp_path / "hub")
    config = json.loads((hub / "config.json").read_text())
    if rope == "rope_parameters":
        config[rope] = config.pop("rope_scaling") | {"rope_theta": config.pop("rope_theta")}
        (tmp_path / "hub/config.json").write_text(json.dumps(config))
        assert relative_error(theirs_of(tmp_path / "hub")(TOKENS[None]).logits[0], wanted) == 0
    assert wanted.std() > 0.1 and read_config(tmp_path / "hub") == TINY
    assert relative_error(load_gpt_oss(tmp_path / "hub")(TOKENS), wanted) < EXACT


@torch.no_grad()
def test_plain_numbers_as_transformers_saves_them_are_read_too(hub, wanted, tmp_path):
    theirs_of(hub).save_pretrained(tmp_path, max_shard_size="300KB")
    keys = {key for file in language_files(tmp_path) for key in tensor_shapes(file)}
    assert "model.layers.0.mlp.experts.gate_up_proj" in keys and not any("_blocks" in key for key in keys)
    for bits in (0, 16):  # sixteen bits hold MXFP4, and what else is in the folder
        assert relative_error(load_gpt_oss(tmp_path, bits=bits)(TOKENS), wanted) < EXACT
    theirs_of(hub).bfloat16().save_pretrained(tmp_path / "bf16")
    assert relative_error(load_gpt_oss(tmp_path / "bf16")(TOKENS), wanted) < EXACT


@torch.no_grad()
@pytest.mark.parametrize("bits, exact", [(0, True), (16, True), (8, False), (4, True)])
def test_bits_of_a_packed_folder(bits, exact, hub, wanted):
    """Of 16 and 4 no number changes: the latter are what the file holds, whose memory a layer's experts share."""
    model = load_gpt_oss(hub, bits=bits)
    error = relative_error(model(TOKENS), wanted)
    assert error < EXACT if exact else EXACT < error < 0.2
    places = {expert.down_proj.codes.untyped_storage().data_ptr() for expert in model.blocks[1].mlp.experts}
    assert len(places) == (1 if bits in (0, 4) else 8)
    kept = {kind: sum(tensor.nbytes for tensor in tensors() if not tensor.is_meta)
            for kind, tensors in (("parameters", model.parameters), ("buffers", model.buffers))}
    in_file = sum(tensor.nbytes for tensor in hub_tensors(TINY).values())
    if bits == 4:  # biases, norms, routers and sinks are in float32
        assert in_file < sum(kept.values()) < 1.05 * in_file
        assert model.model.embed_tokens.weight.dtype == torch.bfloat16 == model.lm_head.codes.dtype


def test_a_head_in_pieces_has_the_gradient_of_a_whole_one(hub, monkeypatch):
    monkeypatch.setattr("zoo.gpt_oss_files.Head.ROWS", 100)
    head = load_gpt_oss(hub, bits=4).lm_head
    x, gradient = torch.randn(2, 3, 64, requires_grad=True), torch.randn(2, 3, 512)
    y = head(x)
    y.backward(gradient)
    whole = head.codes.float()
    assert relative_error(y, x.detach() @ whole.T) < 1e-6 and relative_error(x.grad, gradient @ whole) < 1e-6
    assert relative_error(head(x.detach().bfloat16()).float(), y.detach()) < 0.02


# ----------------------------------------------------------------------------- what is refused

def rename(change):
    """A way to spoil a folder: its tensors by a function of {key: tensor}, in one file."""
    def spoil(folder):
        tensors = {key: tensor for file in language_files(folder) for key, tensor in load_file(file).items()}
        for file in language_files(folder):
            file.unlink()
        (folder / "model.safetensors.index.json").unlink()
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    return spoil


def unsloth(tensors):
    for key in [key for key in tensors if ".experts." in key]:
        for e, tensor in enumerate(tensors.pop(key)):
            head, name = key.rsplit(".", 1)
            tensors[f"{head}.{name.replace('_proj', f'_projs.{e}.')}"] = tensor.clone()


def wrapped(tensors):
    for key in list(tensors):
        tensors[f"language_model.{key}"] = tensors.pop(key)


def original(tensors):
    tensors["block.0.attn.qkv.weight"] = torch.ones(3)


SCALES = "model.layers.2.mlp.experts.down_proj_scales"


def with_255(tensors):
    tensors[SCALES][3, 5, 1] = 255


@pytest.mark.parametrize("change, message", [
    (unsloth, r"experts.*_projs\..*: the layout is unsloth's, expert by expert; here a gpt-oss is read as openai/"),
    (wrapped, "language_model.*: the layout is InternVL's; here a gpt-oss is read as openai/gpt-oss-20b has it"),
    (original, "block.0.attn.qkv.weight: the layout is OpenAI's own in original/; here a gpt-oss is read as openai/"),
    (with_255, f"model.safetensors: {SCALES} has a scale of 255"),
    (lambda tensors: tensors.pop(SCALES), f"{SCALES} is missing"),
    (lambda tensors: tensors.pop("model.layers.0.self_attn.sinks"), "model.layers.0.self_attn.sinks is missing"),
    (lambda tensors: tensors.update({f"{SCALES}_": torch.ones(2)}), f"{SCALES}_ is unknown"),
    (lambda tensors: tensors.update({SCALES: tensors[SCALES][:, 1:].clone()}),
     rf"{SCALES} is \(8, 63, 3\), not \(8, 64, 3\)"),
    (lambda tensors: tensors.update({SCALES: tensors[SCALES].float()}), f"{SCALES} is torch.float32, which holds no"),
    (lambda tensors: tensors.update({SCALES.replace("scales", "bias"): torch.ones(8, 64, dtype=torch.uint8)}),
     "down_proj_bias is torch.uint8, which holds no"),
    (lambda tensors: tensors.update({SCALES[:-7]: torch.ones(8, 96, 64)}), "down_proj is unknown"),
    (lambda tensors: tensors.update({"lm_head.bias": torch.ones(512)}), "lm_head.bias is unknown"),
    (lambda tensors: tensors.update({"model.layers.4.self_attn.sinks": torch.ones(8)}), "layers.4.*is unknown"),
    (lambda tensors: tensors.update({"model.layers.4.mlp.experts.down_proj_bias": torch.ones(8, 64)}),
     "layers.4.*is unknown")])
def test_a_folder_with_other_tensors_is_refused_in_one_line(change, message, hub, tmp_path):
    shutil.copytree(hub, tmp_path / "hub")
    rename(change)(tmp_path / "hub")
    with pytest.raises(UserError, match=message) as error:
        load_gpt_oss(tmp_path / "hub")
    assert "\n" not in str(error.value) and str(error.value).startswith(str(tmp_path / "hub"))


def test_a_tensor_of_experts_that_comes_twice_and_a_file_that_is_missing(hub, tmp_path):
    shutil.copytree(hub, tmp_path / "hub")
    files = language_files(tmp_path / "hub")
    assert [file.name for file in files] == [f"model-0000{number}-of-00002.safetensors" for number in range(3)]
    key = next(key for key in tensor_shapes(files[0]) if "_blocks" in key)
    other = load_file(files[1])
    save_file({**other, key: load_file(files[0])[key]}, files[1])
    with pytest.raises(UserError, match=f"{key} comes twice"):
        load_gpt_oss(tmp_path / "hub")
    save_file(other, files[1])
    files[2].unlink()
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors is missing, 1 of 3 files"):
        load_gpt_oss(tmp_path / "hub")
    index = tmp_path / "hub/model.safetensors.index.json"
    index.write_text(index.read_text().replace(files[2].name, files[0].name))
    with pytest.raises(UserError, match="2 of 3 files of the weights are in its index"):
        load_gpt_oss(tmp_path / "hub")


YARN = hub_config(TINY)["rope_scaling"]


@pytest.mark.parametrize("changes, message", [
    ({"layer_types": ["sliding_attention"] * 3}, "layer_types not supported"),
    ({"layer_types": ["full_attention", "chunked_attention"] * 2}, "layer_types not supported"),
    ({"layer_types": "full_attention"}, "layer_types 'full_attention' not supported"),
    ({"new_thing": 3}, "new_thing 3 not known here"), ({"attention_bias": False}, "attention_bias false not supp"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings true not supported"),
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
     "quantization_config {'quant_method': 'bitsandbytes'.* not supported here: OpenAI's MXFP4 is"),
    ({"quantization_config": "mxfp4"}, "quantization_config 'mxfp4' not supported"),
    ({"hidden_size": 0}, "hidden_size 0 not supported"), ({"hidden_size": "64"}, "hidden_size '64' not supported"),
    ({"intermediate_size": 100}, "in MXFP4, with sizes in config.json that are no multiples of 32"),
    ({"num_key_value_heads": 3}, "key-value heads do not divide"), ({"head_dim": 15}, "head_dim is odd"),
    ({"num_experts_per_tok": 9}, "more experts per token than there are"),
    ({"num_local_experts": 4}, r"is \(8, .*, not \(4, "), ({"swiglu_limit": None}, "no swiglu_limit|swiglu_limit None"),
    ({"num_hidden_layers": 99, "layer_types": ["full_attention"] * 99}, "more than the tensors beside it"),
    ({"rope_scaling": YARN | {"rope_type": "linear"}}, 'rope_type "linear" not supported'),
    ({"rope_scaling": {name: value for name, value in YARN.items() if name != "rope_type"}}, "no rope_type"),
    ({"rope_scaling": YARN | {"attention_factor": 1.0}}, "attention_factor 1.0 not supported"),
    ({"rope_scaling": YARN | {"rope_theta": 1e4}}, "rope_scaling .* or not what is said beside it"),
    ({"rope_scaling": [1]}, r"rope_scaling \[1\] is no YaRN"), ({"rope_scaling": None}, "no .*factor"),
    ({"model_type": "internvl_chat", "llm_config": {"model_type": "gpt_oss"}},
     "the layout is InternVL's, in which a gpt-oss is a part; here a gpt-oss is read as openai/gpt-oss-20b"),
    ({"model_type": None, "architectures": None, "num_experts": 8, "rope_ntk_alpha": 1.0},
     "the layout is OpenAI's own in original/; here a gpt-oss is read as openai/gpt-oss-20b has it outside")])
def test_a_config_that_says_something_else_is_refused_by_its_field(changes, message, hub, tmp_path):
    shutil.copytree(hub, tmp_path / "hub")
    edit_json(tmp_path / "hub/config.json", **changes)
    if changes.get("architectures", 1) is None:
        config = json.loads((tmp_path / "hub/config.json").read_text())
        (tmp_path / "hub/config.json").write_text(json.dumps(
            {name: value for name, value in config.items() if value is not None}))
    with pytest.raises(UserError, match=message) as error:
        build_vlm("sample", 512, "", str(tmp_path / "hub"))
    assert "\n" not in str(error.value) and str(error.value).startswith(str(tmp_path / "hub"))


@torch.no_grad()
def test_without_a_word_on_it_yarn_s_limits_are_rounded_as_transformers_rounds_them(hub, wanted, tmp_path):
    shutil.copytree(hub, tmp_path / "hub")
    edit_json(tmp_path / "hub/config.json", rope_scaling={name: v for name, v in YARN.items() if name != "truncate"})
    logits = theirs_of(tmp_path / "hub")(TOKENS[None]).logits[0]
    assert relative_error(load_gpt_oss(tmp_path / "hub")(TOKENS), logits) < EXACT < relative_error(logits, wanted)


def test_a_vocabulary_of_fewer_rows_than_the_tokenizer_s_is_refused(hub):
    with pytest.raises(UserError, match="its 512 tokens are fewer than the tokenizer's 513"):
        build_vlm("sample", 513, "", str(hub))


# ----------------------------------------------------------------------------- prepared in weights/

def test_a_folder_in_weights_is_checked_and_gets_its_hashes(hub, tmp_path):
    folder = tmp_path / "weights/gpt_oss_20b"
    shutil.copytree(hub, folder)
    write_tokenizer(folder / "tokenizer.json")
    (folder / "original").mkdir()
    code, printed = prepare("gpt_oss_20b", tmp_path)
    count = sum(parameter.numel() for parameter in GptOss(TINY).parameters())
    assert code == 0 and "ready" in printed and f"{count:,} parameters in place" in printed, printed
    assert (folder / "tensors.json").is_file() and "up to date" in prepare("gpt_oss_20b", tmp_path)[1]
    file = language_files(folder)[1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="was altered since tensors.json beside it was written"):
        load_gpt_oss(folder)


@pytest.mark.parametrize("spoil, message", [
    (lambda folder: write_tokenizer(folder / "tokenizer.json", others=[f"<{n}>" for n in range(512)]),
     "tokenizer.json has .* tokens and config.json 512"),
    (lambda folder: edit_json(folder / "config.json", attention_bias=False), "attention_bias"),
    (rename(lambda tensors: tensors.pop(SCALES)), "is missing")])
def test_a_folder_that_does_not_fit_is_not_declared_prepared(spoil, message, hub, tmp_path):
    shutil.copytree(hub, tmp_path / "gpt_oss_20b")
    write_tokenizer(tmp_path / "gpt_oss_20b/tokenizer.json")
    spoil(tmp_path / "gpt_oss_20b")
    with pytest.raises(UserError, match=message):
        WEIGHTS["gpt_oss_20b"].write(WEIGHTS["gpt_oss_20b"], None, tmp_path / "gpt_oss_20b")
    assert not (tmp_path / "gpt_oss_20b/tensors.json").exists()


def test_the_hub_s_patterns_take_one_layout_of_three():
    from huggingface_hub.utils import filter_repo_objects
    weights = WEIGHTS["gpt_oss_20b"]
    names = {"config.json", "chat_template.jinja", "tokenizer.json", "model.safetensors.index.json",
             *(f"model-0000{number}-of-00002.safetensors" for number in range(3))}
    others = ["original/config.json", "original/model.safetensors", "original/dtypes.json", "metal/model.bin",
              "LICENSE", "README.md", "USAGE_POLICY"]
    assert {*filter_repo_objects([*names, *others], allow_patterns=list(weights.hub_files))} == names
    assert weights.only_by_name and weights.in_place and weights.megabytes > 13_761


# ----------------------------------------------------------------------------- runs

def test_from_scratch_saved_and_read_again_here_and_by_transformers(tmp_path):
    model = build_vlm("gpt_oss_sample", 512)
    with torch.no_grad():
        for parameter in model.language.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_vlm(model, tmp_path / "saved")
    again = load_vlm(tmp_path / "saved")
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        logits = theirs_of(tmp_path / "saved/language")(TOKENS[None]).logits[0]
        assert relative_error(model.language(TOKENS), logits) < EXACT


def test_an_mxfp4_folder_is_trained_in_full_and_comes_back_bit_for_bit(hub, wanted, tmp_path):
    torch.manual_seed(0)
    model = build_vlm("sample", 512, "", str(hub), trained=("language",)).requires_grad_(True)
    with torch.no_grad():
        assert relative_error(model.language(TOKENS), wanted) < EXACT
        for parameter in model.language.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    save_vlm(model, tmp_path / "saved")
    state = load_vlm(tmp_path / "saved").state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        logits = theirs_of(tmp_path / "saved/language")(TOKENS[None]).logits[0]
        assert relative_error(model.language(TOKENS), logits) < EXACT < relative_error(wanted, logits)
    low = load_vlm(tmp_path / "saved", bits=4)  # NF4 now, since these numbers are no MXFP4
    expert, trained = (part.language.blocks[3].mlp.experts[5].down_proj for part in (low, model))
    assert EXACT < relative_error(expert.dequantise(), trained.weight.detach()) < 0.12
    assert low.weights["language"] == str(tmp_path / "saved/language") and low.base_bits == 4


@pytest.mark.parametrize("targets, bits", [("q_proj,v_proj", 0), ("o_proj,down_proj", 16), ("gate_up_proj", 8)])
def test_lora_on_a_folder_comes_back_bit_for_bit(targets, bits, hub, tmp_path):
    lora = {"targets": targets, "r": 2, "alpha": 4, "dropout": 0.0}
    model = build_vlm("sample", 512, "", str(hub), lora=lora, bits=bits)
    with torch.no_grad():
        for layer in lora_layers(model.language).values():
            layer.lora_B.add_(torch.rand_like(layer.lora_B))
        save_vlm(model, tmp_path / "saved")
        again = load_vlm(tmp_path / "saved")
        assert torch.equal(again.language(TOKENS), model.language(TOKENS)) and again.base_bits == bits
    assert not (tmp_path / "saved/language").exists() and again.weights["language"] == str(hub)


@pytest.mark.parametrize("family", ["gpt_oss", "llama"])
def test_a_language_model_named_as_a_whole_one_is_told_its_own_flag(family, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(UserError, match=f"--model={tmp_path}: a {family}, which has no encoder; .* --language_weights"):
        weights_of(train_vlm.Config(model=str(tmp_path)), None)


def test_a_folder_is_trained_goes_on_bit_for_bit_begins_a_stage_and_answers(hub, tmp_path):
    """train_vlm.py --language_weights=<folder>, the base as it is in the file, LoRA on attention and on experts."""
    shutil.copytree(hub, tmp_path / "hub")
    own = write_tokenizer(tmp_path / "hub/tokenizer.json")
    shards = prepare_sample(tmp_path / "shards", "--limit=16", f"--tokenizer={own}")

    def start(name, **changes):
        settings = dict(language_weights=str(tmp_path / "hub"), language="lora", lora_dropout=0.2,
                        lora_targets="q_proj,gate_up_proj,down_proj", base_bits=4, batch_size=4, max_steps=2,
                        save_every=1, evaluate_every=2)
        train_vlm.main(flags(shards, tmp_path / name, **settings | changes))
        return tmp_path / name / "step_000002"

    whole = start("whole")
    assert sorted(path.name for path in whole.iterdir() if path.is_dir() or path.suffix == ".safetensors") == [
        "adapter", "optimizer.safetensors", "projector.safetensors", "vision.safetensors"]
    adapter = load_file(whole / "adapter/adapter_model.safetensors")
    assert len(adapter) == 2 * 3 * TINY.num_hidden_layers and all(tensor.any() for tensor in adapter.values())
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/step_000002")
    again = start("cut", resume=True)
    for name in ("adapter/adapter_model.safetensors", "projector.safetensors", "optimizer.safetensors"):
        assert (again / name).read_bytes() == (whole / name).read_bytes()
    stage = start("stage", start=str(tmp_path / "whole"), language_weights="auto", learning_rate=0.0)
    for name in ("adapter/adapter_model.safetensors", "projector.safetensors"):
        begun, kept = load_file(whole / name), load_file(stage / name)
        assert begun.keys() == kept.keys() and all(torch.equal(begun[key], kept[key]) for key in begun)
    image = tmp_path / "image.png"
    Image.fromarray(random_images([(40, 90)])[0].numpy()).save(image)
    tokenizer = open_tokenizer(tmp_path / "whole")
    models = [load_vlm(step).eval() for step in (whole, again)]
    assert [model.base_bits for model in models] == [4, 4]
    answers = [ask(model, tokenizer, "what is shown?", str(image)) for model in models]
    assert answers[0] == answers[1]
    eval_vqa.main(eval_vqa.Config(run=str(tmp_path / "whole"), data="sample", shards_dir=str(shards), limit=4))
    assert list((tmp_path / "whole").glob("eval*"))
    write_tokenizer(own, special=[*SPECIAL[:-1], "<|other|>"])
    with pytest.raises(UserError, match=rf"{own}: id \d+ is .*--tokenizer={own}`"):
        start("other")
