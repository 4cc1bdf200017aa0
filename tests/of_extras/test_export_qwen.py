"""
extras/share/export.py on a Qwen3-VL: transformers and PEFT load what it writes, and what they write begins a run
here, bit for bit.
"""

import json
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import train_vlm
from data import Record
from extras.share import export, hub
from lora import add_lora, lora_layers
from plumbing.files import seal
from plumbing.flags import UserError
from plumbing.tensors import plain_names
from plumbing.sources import settle
from prepare.questions import train_sample_tokenizer
from test_chatml import write_chat_tokenizer
from test_model import randomise
from test_qwen3_vl import (EXACT, SEQUENCES, SIZES, logits_of, names_on_disk, peers, random_images,  # noqa: F401
                           shown_to_peer)
from weights import build_vlm, load_run, save_vlm
from zoo.adapters import load_adapters, read_adapter
from zoo.chatml import open_tokenizer

IMAGE = {"size": 1 << 16, "resize": "smart"}
ALL = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return open_tokenizer(write_chat_tokenizer(tmp_path_factory.mktemp("words") / "tokenizer.json"))


@pytest.fixture(scope="module")
def base(peers, tokenizer, tmp_path_factory):  # noqa: F811
    """The folder of a tied tiny model in bfloat16, and of an untied one in float32, with files beside it."""
    folders = {}
    for kind, number in (("bfloat16", 3), ("float32", 0)):
        folder = tmp_path_factory.mktemp("base") / f"tiny_of_{kind}"
        shutil.copytree(peers(number)[1], folder)
        state = load_file(folder / "model.safetensors")
        save_file({name: tensor.to(getattr(torch, kind)) for name, tensor in state.items()},
                  folder / "model.safetensors", metadata={"format": "pt"})
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | {"_name_or_path": "/home/maria/tiny"}))
        (folder / "chat_template.jinja").write_text("of the base")
        (folder / "generation_config.json").write_text('{"top_k": 20}')
        (folder / "README.md").write_text("not ours")
        folders[kind] = folder
    return folders


def make_run(folder, model, tokenizer):
    """A run's folder with a checkpoint of this model."""
    save_vlm(model, folder / "partial")
    shutil.copyfile(tokenizer.path, folder / tokenizer.path.name)
    seal(folder / "partial", folder / "step_000001", step=1, flags={"data": "sample"}, image=IMAGE, tests={},
         inputs={"tokenizer": tokenizer.sha256, "data": {}}, machine={})
    return folder


def adapted(folder, **targets):
    """A model of a hub folder with random LoRA, {part: targets}, all else frozen."""
    model = build_vlm("", 512, str(folder), str(folder)).eval().requires_grad_(False)
    for part, names in targets.items():
        model.lora[part] = {"targets": names, "r": 3, "alpha": 6, "dropout": 0.0}
        add_lora(getattr(model, part), **model.lora[part])
        for layer in lora_layers(getattr(model, part)).values():
            torch.nn.init.normal_(layer.lora_B, std=0.05)
    return model


def exported(run, tmp_path, only, **flags):
    export.main(export.Config(run=str(run), folder=str(tmp_path / "export"), only=only, **flags))
    return tmp_path / "export"


def peer_of(folder):
    peer, loading = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values())
    return peer.eval()


@torch.no_grad()
def farthest(model, peer):
    """The largest difference of logits, in their standard deviations."""
    images, differences = random_images(SIZES), []
    for tokens in SEQUENCES:
        theirs = peer(**shown_to_peer(tokens, images, model.vision)).logits[0]
        differences.append((logits_of(model, tokens, images) - theirs).abs().max() / theirs.std())
    return max(differences)


def saved(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


# ----------------------------------------------------------------------------- the whole

@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_what_did_not_train_comes_out_bit_for_bit(kind, base, tokenizer, tmp_path):
    model = build_vlm("", 512, str(base[kind]), str(base[kind])).requires_grad_(False)
    run = make_run(tmp_path / "run", model, tokenizer)
    folder = exported(run, tmp_path, "model", shard_gigabytes=1e-4) / "model"
    theirs, ours = saved(base[kind]), saved(folder)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {tensor.dtype for tensor in ours.values()} == {getattr(torch, kind)}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == ours.keys() and len({*index["weight_map"].values()}) > 2
    peer_of(folder)
    names = {path.name for path in folder.glob("[!m]*")}
    assert names == {"config.json", "preprocessor_config.json", "chat_template.jinja", "generation_config.json",
                     "tokenizer.json", export.SOURCE}
    assert (folder / "chat_template.jinja").read_text() == "of the base"
    assert (folder / "tokenizer.json").read_bytes() == tokenizer.path.read_bytes()
    config, before = (json.loads((place / "config.json").read_text()) for place in (folder, base[kind]))
    assert "maria" not in json.dumps(config) and config["image_token_id"] == 500 and config["dtype"] == kind
    assert config["text_config"]["rope_parameters"] == before["text_config"]["rope_parameters"]


def test_lora_of_both_parts_and_mergers_that_trained_are_in_it(base, tokenizer, tmp_path):
    model = adapted(base["float32"], language=ALL, vision="qkv,proj")
    randomise(model.projector.requires_grad_(True))
    folder = exported(make_run(tmp_path / "run", model, tokenizer), tmp_path, "model")
    assert farthest(model, peer_of(folder / "model")) < EXACT
    assert farthest(model, peer_of(base["float32"])) > 0.01


def test_merged_matrices_are_rounded_once_and_no_head_stands_beside_tied_embeddings(base, tokenizer, tmp_path):
    model = adapted(base["bfloat16"], language="q_proj,down_proj")
    folder = exported(make_run(tmp_path / "run", model, tokenizer), tmp_path, "model") / "model"
    ours = saved(folder)
    for part in (model.vision, model.language):
        for layer in lora_layers(part).values():
            layer.merge()
    merged = {"model.visual." * (part != "language") + name: getattr(model, part).state_dict()[inside]
              for part in ("vision", "projector", "language")
              for name, inside in plain_names(getattr(model, part).state_dict()).items()}
    assert ours.keys() == merged.keys() == saved(base["bfloat16"]).keys() and "lm_head.weight" not in ours
    assert all(torch.equal(ours[name], merged[name].bfloat16()) for name in ours)


def test_a_model_that_began_here_has_what_others_want_beside_it(tokenizer, tmp_path):
    model = randomise(build_vlm("qwen_sample", tokenizer.vocab_size)).eval()
    folder = exported(make_run(tmp_path / "run", model, tokenizer), tmp_path, "model,vlm")
    peer = transformers.Qwen3VLForConditionalGeneration.from_pretrained(folder / "model")
    assert peer.dtype == torch.float32 and peer.generation_config.eos_token_id == list(tokenizer.stops)
    ours = names_on_disk(model)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in peer.state_dict().items())
    assert tokenizer.piece(peer.config.image_token_id) == "<|image_pad|>"
    assert tokenizer.piece(peer.config.vision_start_token_id) == "<|vision_start|>"
    again = load_run(folder / "vlm").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_the_template_that_is_written_is_ours(tokenizer, tmp_path):
    model = build_vlm("qwen_sample", tokenizer.vocab_size)
    hub.describe(tokenizer, model, tmp_path)
    shutil.copyfile(tokenizer.path, tmp_path / "tokenizer.json")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
             {"role": "assistant", "content": "a lesion"}, {"role": "user", "content": "Is there a fracture?"}]
    tokens, spans, _ = tokenizer.write(Record("", "What is this?", "a lesion", image=b"",
                                              turns=(("Is there a fracture?", ""),)))
    tokens = [theirs.convert_tokens_to_ids("<|image_pad|>") if token < 0 else token for token in tokens]
    assert theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False) == tokens[:spans[1][0]]


def test_the_whole_run_stands_alone(base, tokenizer, tmp_path):
    """What it reads from its base, LoRA aside, goes along once."""
    model = adapted(base["bfloat16"], language="q_proj", vision="qkv")
    folder = exported(make_run(tmp_path / "run", model, tokenizer), tmp_path, "vlm")
    again = load_run(folder / "vlm")
    assert again.weights == dict.fromkeys(again.weights, "") and again.lora == model.lora
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert not [path for path in folder.rglob("*") if path.is_file() and b"maria" in path.read_bytes()]


def test_a_tokenizer_without_a_place_for_images_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train_sample_tokenizer())
    run = make_run(tmp_path / "run", build_vlm("qwen_sample", 512), open_tokenizer(tmp_path / "tokenizer.model"))
    for only in ("", "model"):
        with pytest.raises(UserError, match="has no <|image_pad|>.*leave out model, as with --only=vlm,card"):
            exported(run, tmp_path, only)
    with pytest.raises(UserError, match="--only=vision: no such part; there are model, adapter, vlm, card"):
        exported(run, tmp_path, "vision")


# ----------------------------------------------------------------------------- PEFT

@pytest.mark.parametrize("targets", [{"language": "q_proj,v_proj"}, {"language": ALL, "vision": "qkv,proj,linear_fc1"},
                                     {"vision": "linear_fc2"}])
def test_peft_reads_the_adapter_and_writes_it_as_it_was(targets, base, tokenizer, tmp_path):
    model = adapted(base["float32"], **targets)
    folder = exported(make_run(tmp_path / "run", model, tokenizer), tmp_path, "adapter") / "adapter"
    theirs = peft.PeftModel.from_pretrained(peer_of(base["float32"]), folder).eval()
    assert farthest(model, theirs) < EXACT and farthest(model, peer_of(base["float32"])) > 0.01
    adapted_there = {name.removeprefix("base_model.model.") for name, module in theirs.named_modules()
                     if hasattr(module, "lora_A")}
    assert len(adapted_there) == sum(len(lora_layers(getattr(model, part))) for part in targets)
    theirs.save_pretrained(tmp_path / "again")
    ours, again = (load_file(place / "adapter_model.safetensors") for place in (folder, tmp_path / "again"))
    assert ours.keys() == again.keys() and all(torch.equal(ours[name], again[name]) for name in ours)
    assert all(name.startswith(("base_model.model.model.language_model.", "base_model.model.model.visual."))
               for name in ours)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny_of_float32"


def write_theirs(base, folder, targets, **changes):
    """An adapter of random values that PEFT has written for a base, and the model that it makes."""
    theirs = peft.get_peft_model(peer_of(base), peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM", **changes))
    for name, parameter in theirs.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05)
    theirs.save_pretrained(folder)
    return theirs.eval()


@pytest.mark.parametrize("targets, parts", [(["q_proj", "up_proj"], {"language"}),
                                            (["v_proj", "qkv", "attn.proj"], {"language", "vision"})])
def test_a_run_begins_with_an_adapter_of_peft_s(targets, parts, base, tokenizer, tmp_path):
    theirs = write_theirs(base["float32"], tmp_path / "theirs", targets)
    config = settle(train_vlm.Config(model=str(base["float32"]), start=str(tmp_path / "theirs"), language="lora",
                                     vision="frozen", lora_targets=ALL))
    model = train_vlm.load_parts(config, tokenizer_of(512, tokenizer), {"resize": "squash"}, None,
                                 torch.device("cpu"), torch.float32)
    assert model.lora.keys() == parts and model.lora["language"]["r"] == 4
    assert farthest(model.eval(), theirs) < EXACT
    run = make_run(tmp_path / "run", model.requires_grad_(False), tokenizer)
    folder = exported(run, tmp_path, "adapter") / "adapter"
    ours, before = (load_file(place / "adapter_model.safetensors") for place in (folder, tmp_path / "theirs"))
    assert ours.keys() == before.keys() and all(torch.equal(ours[name], before[name]) for name in ours)


def tokenizer_of(vocab_size, tokenizer):
    """A tokenizer that says it has as many ids as a model of the tests."""
    small = open_tokenizer(tokenizer.path)
    small.vocab_size = vocab_size
    return small


def rename(folder, old, new):
    path = folder / "adapter_model.safetensors"
    save_file({name.replace(old, new): tensor for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize("change, message", [
    ("sglang", r"base_model.model.language_model.model.layers.0.* than this model's, as base_model.model.model.lang"),
    ("comfy", r"base_model.model.model.layers.0.*another library"), ("mergers", "merger.* has no LoRA here"),
    ("saved", "modules_to_save.* not supported here"), ("missing", "1 tensors do not fit, the first .*lora_B")])
def test_other_adapters_are_refused_in_a_line(change, message, base, tmp_path):
    targets, changes = ["q_proj"], {}
    if change == "mergers":
        targets = ["q_proj", "linear_fc1"]
    if change == "saved":
        changes = {"modules_to_save": ["merger"]}
    write_theirs(base["float32"], tmp_path / "theirs", targets, **changes)
    if change == "sglang":
        rename(tmp_path / "theirs", "model.model.language_model.layers", "model.language_model.model.layers")
    if change == "comfy":
        rename(tmp_path / "theirs", "model.model.language_model.layers", "model.model.layers")
    if change == "missing":
        path = tmp_path / "theirs/adapter_model.safetensors"
        tensors = load_file(path)
        tensors.pop("base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_B.weight")
        save_file(tensors, path)
    model = build_vlm("", 512, str(base["float32"]), str(base["float32"]))
    with pytest.raises(UserError, match=message) as error:
        load_adapters(model, tmp_path / "theirs")
    assert "\n" not in str(error.value)


def test_an_adapter_s_parts_are_known_by_its_names(base, tmp_path):
    write_theirs(base["float32"], tmp_path, ["q_proj", "qkv"])
    settings = {"r": 4, "alpha": 12, "dropout": 0.0}
    assert read_adapter(tmp_path) == {"vision": settings | {"targets": "qkv"},
                                      "language": settings | {"targets": "q_proj"}}
