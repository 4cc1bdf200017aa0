"""Published pickles to safetensors: bit for bit, loadable by both sides, and never run."""

import contextlib
import io
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

import prepare.all as all_py
from model import ViT
from plumbing.files import hash_file
from plumbing.flags import UserError, parse_flags
from prepare.weights import WEIGHTS, convert_llama, write_llama
from test_encoders import CLIP_VIT, fill
from test_model import TOLERANCE, V, VIT, hub_llama, logits_of, relative_error, some_tokens, tiny_vlm
from weights import load_llama
from zoo.encoders import load_encoder, load_vit
from zoo.resnet import ResNet, ResNetConfig

ROOT = Path(__file__).resolve().parent.parent


def flags(name, folder):
    return [f"--only={name}", f"--raw_dir={folder}/raw", f"--weights_dir={folder}/weights"]


def prepare(name, folder):
    """(exit code, what was printed) of prepare/all.py, in this process."""
    code, printed = 0, io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            all_py.main(parse_flags(all_py.Config, flags(name, folder)))
        except SystemExit as stopped:
            code = stopped.code
    return code, printed.getvalue()


def biomedclip_state():
    """A tiny tower in BiomedCLIP's layout, beside what the whole checkpoint holds besides."""
    tower = {f"visual.trunk.{name}": tensor for name, tensor in tiny_vlm().vision.state_dict().items()}
    return {**tower, "visual.head.proj.weight": torch.ones(8, 128), "logit_scale": torch.ones(()),
            "text.transformer.embeddings.position_ids": torch.arange(3)}


def test_biomedclip_s_tower_is_kept_bit_for_bit(tmp_path):
    source = tmp_path / "raw/biomedclip/open_clip_pytorch_model.bin"
    source.parent.mkdir(parents=True)
    torch.save(biomedclip_state(), source, _use_new_zipfile_serialization=False)  # others below: zipped
    done = subprocess.run([sys.executable, "prepare/all.py", *flags("biomedclip", tmp_path)], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0 and "ready" in done.stdout, done.stdout + done.stderr
    target = tmp_path / "weights/biomedclip.safetensors"
    loaded = load_vit(target)
    assert loaded.config == VIT
    for name, tensor in tiny_vlm().vision.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    with safe_open(target, "pt") as file:
        assert all(name.startswith("visual.trunk.") for name in file.keys())
        assert file.metadata()["source_sha256"] == hash_file(source)
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert "up to date" in prepare("biomedclip", tmp_path)[1]


# timm's names in CLIP's ViT -> the hub's, of transformers, and OpenAI's, as they were published
HUB = [(r"^cls_token$", "embeddings.class_embedding"), (r"^norm_pre", "pre_layrnorm"),
       (r"^pos_embed$", "embeddings.position_embedding.weight"), (r"^norm\.", "post_layernorm."),
       (r"^patch_embed.proj", "embeddings.patch_embedding"), (r"^blocks", "encoder.layers"),
       (r"\.norm(\d)", r".layer_norm\1"), (r"attn.proj", "self_attn.out_proj")]
OPENAI = [(r"^cls_token$", "class_embedding"), (r"^pos_embed$", "positional_embedding"),
          (r"^patch_embed.proj", "conv1"), (r"^blocks", "transformer.resblocks"),
          (r"^norm_pre", "ln_pre"), (r"^norm\.", "ln_post."), (r"\.norm(\d)", r".ln_\1"),
          (r"qkv\.", "in_proj_"), (r"attn.proj", "attn.out_proj"), (r"mlp.fc1", "mlp.c_fc"),
          (r"mlp.fc2", "mlp.c_proj")]


def clip_layout(state, prefix, names):
    """Tensors under timm's names as CLIP's layouts have them: no dimension for the image."""
    published = {}
    for name, tensor in state.items():
        tensor = tensor[0, 0] if name == "cls_token" else tensor[0] if name == "pos_embed" else tensor
        for ours, theirs in names:
            name = re.sub(ours, theirs, name)
        for part, third in zip("kvq", tensor.roll(-len(tensor) // 3, 0).chunk(3)):  # the hub's order
            published[prefix + name.replace("attn.qkv", f"self_attn.{part}_proj")] = (
                third if "qkv" in name else tensor)
    return published


def trained(state):
    """The state of an Adam that has gone one step over tensors like these, under numpy's numbers."""
    parameters = [torch.nn.Parameter(tensor.float()) for tensor in state.values()][:5]
    adam = torch.optim.Adam(parameters, lr=0.1)
    sum(parameter.sum() for parameter in parameters).backward()
    adam.step()
    adam.param_groups[0]["lr"] = 0.5 * (1 + np.cos(np.pi * 0.3))  # so PMC-CLIP's schedule makes it
    return adam.state_dict()


def pubmedclip():
    torch.manual_seed(0)
    return fill(ViT(CLIP_VIT)).state_dict()


def pubmedclip_hub():
    beside = {"logit_scale": torch.ones(()), "text_projection.weight": torch.ones(2, 2),
              "visual_projection.weight": torch.ones(2, 128),
              "text_model.final_layer_norm.bias": torch.ones(2),
              "text_model.embeddings.position_ids": torch.arange(3)[None],
              "vision_model.embeddings.position_ids": torch.arange(5)[None]}
    return pubmedclip(), clip_layout(pubmedclip(), "vision_model.", HUB) | beside


def pubmedclip_original():
    state = {name: tensor if re.search("norm|cls|pos", name) else tensor.half()  # as it was trained
             for name, tensor in pubmedclip().items()}
    beside = {"positional_embedding": torch.ones(2, 2), "text_projection": torch.ones(2, 2).half(),
              "transformer.resblocks.0.ln_1.weight": torch.ones(2), "logit_scale": torch.ones(()),
              "token_embedding.weight": torch.ones(2, 2), "ln_final.bias": torch.ones(2),
              "visual.proj": torch.ones(128, 2).half()}
    published = {"best_epoch": 7, "state_dict": clip_layout(state, "visual.", OPENAI) | beside,
                 "optimizer_state_dict": trained(state), "best_loss": 1.25}
    return {name: tensor.float() for name, tensor in state.items()}, published


def pmc_clip():
    state = fill(ResNet(ResNetConfig(image_size=64, stem=4, layers=(1, 2, 1, 1), width=8))).state_dict()
    return state, state


def pmc_clip_checkpoint():
    state, _ = pmc_clip()
    whole = {"module.logit_scale": torch.ones(()), "module.text_encoder.visual.weight": torch.ones(2),
             "module.fusion_module.resblocks.0.ln_1.bias": torch.ones(2),
             **{f"module.visual.{name}": tensor for name, tensor in state.items()}}
    return state, {"epoch": 100, "name": "RN50_fusion4", "state_dict": whole,
                   "optimizer": trained(state), "scaler": torch.amp.GradScaler("cpu").state_dict()}


def biomedclip():
    state = biomedclip_state()
    return {name: tensor for name, tensor in state.items() if "trunk" in name}, state


@pytest.mark.parametrize("layouts", [
    {"biomedclip": ("open_clip_pytorch_model.bin", biomedclip),
     "pubmedclip": ("pytorch_model.bin", pubmedclip_hub),
     "pmc_clip": ("image_encoder(resnet50).pth", pmc_clip)},
    {"pubmedclip": ("PubMedCLIP_ViT32.pth", pubmedclip_original),
     "pmc_clip": ("checkpoint.pt", pmc_clip_checkpoint)}], ids=["hub", "training"])
def test_encoder_of_each_layout_is_kept_bit_for_bit(layouts, tmp_path, monkeypatch):
    # Saved on a GPU, as they were, and in the days of numpy 1.
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        patch.setattr(np.float64().__reduce__()[0], "__module__", "numpy.core.multiarray")
        for name, (file, layout) in layouts.items():
            (tmp_path / "raw" / name).mkdir(parents=True)
            torch.save(layout()[1], tmp_path / "raw" / name / file)
    code, printed = prepare(",".join(layouts), tmp_path)
    assert code == 0, printed
    for name, (file, layout) in layouts.items():
        wanted, target = layout()[0], tmp_path / "weights" / f"{name}.safetensors"
        loaded = load_encoder(target).state_dict()
        with safe_open(target, "pt") as tensors:
            facts = tensors.metadata()
            assert json.loads(facts.pop("tensors")).keys() == wanted.keys()
            of_the_vit = {} if name == "pmc_clip" else {"heads": "2", "activation": WEIGHTS[name].activation}
            assert facts == {"format": "pt", "source": WEIGHTS[name].page, **of_the_vit,
                             "source_sha256": hash_file(tmp_path / "raw" / name / file)}
            assert set(tensors.keys()) == wanted.keys() and len(loaded) == len(wanted)
            for key, tensor in wanted.items():
                for each in (tensors.get_tensor(key), loaded[key.removeprefix("visual.trunk.")]):
                    assert each.dtype == tensor.dtype and torch.equal(each, tensor), key
    assert {path.name for path in target.parent.iterdir()} == {f"{name}.safetensors" for name in layouts}


def test_hub_s_patterns_fetch_what_the_layouts_look_for_and_no_more(tmp_path):
    from huggingface_hub.utils import filter_repo_objects

    others = ["README.md", "images.zip", "text_encoder.pth", "checkpoint.pt", "tf_model.h5",
              "pytorch_model.bin.index.json", "open_clip_config.json", "trainer_state.json"]
    for weights in WEIGHTS.values():
        wanted = [pattern.replace("*", "-00001-of-00003") for pattern in weights.layouts[0]]
        patterns = list(weights.hub_files)
        assert list(filter_repo_objects(others + wanted, allow_patterns=patterns)) == wanted
        for name in wanted:
            (weights.raw(tmp_path) / name).parent.mkdir(exist_ok=True)
            (weights.raw(tmp_path) / name).touch()
        assert sorted(weights.find(tmp_path)) == sorted(wanted)
    assert [name for name in WEIGHTS if not WEIGHTS[name].only_by_name] == [
        "biomedclip", "pmc_llama_7b", "pubmedclip", "pmc_clip"]
    assert [name for name in WEIGHTS if WEIGHTS[name].hub_type == "dataset"] == ["pmc_clip"]


@pytest.mark.parametrize("name, vocabulary", [("pmc_llama_7b", V), ("pmc_llama_13b", V + 1)])
def test_pmc_llama_s_shards_load_here_and_in_transformers(name, vocabulary, tmp_path):
    theirs = hub_llama(tmp_path / "hub", nkv=4, theta=10000.0)
    raw = tmp_path / "raw" / name
    raw.mkdir(parents=True)
    config = json.loads((tmp_path / "hub/config.json").read_text())
    config |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}  # as published
    if vocabulary > V:  # 13B: a row more for its [PAD]
        theirs.resize_token_embeddings(vocabulary)
        config |= {"vocab_size": vocabulary}
        (raw / "added_tokens.json").write_text(json.dumps({"[PAD]": V}))
    (raw / "config.json").write_text(json.dumps(config))
    tensors = list(theirs.state_dict().items())
    tensors.append(("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4)))
    for number, part in enumerate((tensors[:7], tensors[7:15], tensors[15:]), start=1):
        torch.save(dict(part), raw / f"pytorch_model-{number:05}-of-00003.bin")
    code, printed = prepare(name, tmp_path)
    assert code == 0 and "ready" in printed, printed
    target = tmp_path / "weights" / name
    assert sorted(path.name for path in target.iterdir()) == [
        "config.json", *(f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)),
        "model.safetensors.index.json"]
    wanted = logits_of(theirs, some_tokens())
    assert wanted.shape[1] == vocabulary
    assert relative_error(load_llama(target)(some_tokens()), wanted) < TOLERANCE
    again = transformers.AutoModelForCausalLM.from_pretrained(target, pad_token_id=0).eval()
    assert relative_error(logits_of(again, some_tokens()), wanted) < TOLERANCE


def test_a_number_that_was_altered_in_prepared_weights_is_refused(tmp_path):
    """Each tensor has its hash in the file, and the settings theirs in the index, whatever the dtype."""
    hub_llama(tmp_path / "hub", nkv=2, theta=10000.0)
    raw, target = tmp_path / "raw", tmp_path / "llama"
    raw.mkdir()
    shutil.copy(tmp_path / "hub/config.json", raw)
    tensors = {name: tensor.to(torch.bfloat16 if "mlp" in name else torch.float32) for name, tensor
               in load_file(tmp_path / "hub/model.safetensors").items()}
    torch.save(tensors, raw / "pytorch_model.bin")
    write_llama(WEIGHTS["pmc_llama_7b"], raw, target)
    right = load_llama(target).state_dict()
    path = target / "model.safetensors"
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    draw = random.Random(0)
    for bit in [8 * begin, 8 * len(content) - 1, *draw.sample(range(8 * begin, 8 * len(content)), 60)]:
        spoiled = bytearray(content)
        spoiled[bit // 8] ^= 1 << bit % 8
        path.write_bytes(spoiled)
        with pytest.raises(UserError, match="model.safetensors: .*weight was altered since it was written"):
            load_llama(target)
    path.write_bytes(content)
    assert all(torch.equal(tensor, right[name]) for name, tensor in load_llama(target).state_dict().items())
    settings = json.loads((target / "config.json").read_text()) | {"rms_norm_eps": 1e-3}
    (target / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="config.json: was altered; delete .*llama, and prepare/all.py makes it"):
        load_llama(target)


def half_a_llama(raw):
    """Two pickles of a tiny LLaMA, as the hub names them, and its config.json; the model."""
    theirs = hub_llama(raw / "hub", nkv=2, theta=10000.0)
    tensors = list(theirs.state_dict().items())
    for number, part in enumerate((tensors[:9], tensors[9:]), start=1):
        torch.save(dict(part), raw / f"pytorch_model-{number:05}-of-00002.bin")
    shutil.copy(raw / "hub/config.json", raw)
    return theirs


@pytest.mark.parametrize("change, message", [
    ("missing", "pytorch_model-00002-of-00002.bin is missing, 1 of 2 files; fetch them into it"),
    ("other", "pytorch_model-00001-of-00003.bin is of another download than pytorch_model-00001-of-00002.bin"),
    ("both", "pytorch_model-00001-of-00002.bin is of another download than pytorch_model.bin"),
    ("pointer", "pytorch_model-00002-of-00002.bin: a git-lfs pointer, not the file; run `git lfs pull`"),
    ("short", "does not fit this model: .*is missing"), ("config", "config.json: model_type 'gemma'")])
def test_an_incomplete_set_of_pickles_is_refused_and_nothing_stays(change, message, tmp_path):
    raw, second = tmp_path / "raw", tmp_path / "raw/pytorch_model-00002-of-00002.bin"
    half_a_llama(raw)
    if change == "missing":
        second.unlink()
    elif change in ("other", "both"):
        shutil.copy(second, raw / {"other": "pytorch_model-00001-of-00003.bin", "both": "pytorch_model.bin"}[change])
    elif change == "pointer":
        second.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    elif change == "short":
        torch.save({"model.norm.weight": torch.ones(32)}, second)
    else:
        settings = json.loads((raw / "config.json").read_text()) | {"model_type": "gemma"}
        (raw / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=f"{raw}.*{message}") as caught:
        write_llama(WEIGHTS["pmc_llama_7b"], raw, tmp_path / "llama")
    assert not re.search(r"\n|\.partial", str(caught.value)) and not (tmp_path / "llama").exists()


def test_a_folder_of_one_s_own_pickles_is_converted_with_its_tokenizer(tmp_path):
    theirs = half_a_llama(tmp_path / "mine")
    (tmp_path / "mine/tokenizer.model").write_bytes(b"pieces")
    target = convert_llama(tmp_path / "mine", tmp_path / "weights")
    assert target == tmp_path / "weights/mine" and (target / "tokenizer.model").read_bytes() == b"pieces"
    assert relative_error(load_llama(target)(some_tokens()), logits_of(theirs, some_tokens())) < TOLERANCE
    with pytest.raises(UserError, match="weights/mine: there already; remove it"):
        convert_llama(tmp_path / "mine", tmp_path / "weights")
    with pytest.raises(UserError, match="no config.json in it"):
        convert_llama(tmp_path, tmp_path / "weights")


@pytest.mark.parametrize("vision, gelu, heads, message", [
    ({"hidden_act": "gelu", "num_attention_heads": 4}, "gelu", 4, ""), ({}, "quick_gelu", 2, ""),
    ({"layer_norm_eps": 1e-6}, "", 0, "a norm's eps of 1e-06 not supported here: 1e-05 is")])
def test_a_clip_s_own_config_tells_its_activation_and_heads(vision, gelu, heads, message, tmp_path):
    torch.save(pubmedclip_hub()[1], tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": {
        "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, **vision}}))
    target = tmp_path / "clip.safetensors"
    if message:
        with pytest.raises(UserError, match=message):
            WEIGHTS["pubmedclip"].write(WEIGHTS["pubmedclip"], tmp_path, target)
        return
    WEIGHTS["pubmedclip"].write(WEIGHTS["pubmedclip"], tmp_path, target)
    (tmp_path / "config.json").unlink()  # the file says it by itself
    assert (load_encoder(target).config.gelu, load_encoder(target).config.heads) == (gelu, heads)


class Payload:
    """Unpickled, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "it ran")


LAYOUTS = {"biomedclip": ("open_clip_pytorch_model.bin", "visual.trunk.", biomedclip),
           "pubmedclip": ("PubMedCLIP_ViT32.pth", "visual.", pubmedclip_original),
           "pmc_clip": ("image_encoder(resnet50).pth", "", pmc_clip)}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("case, message", [
    ("cut", "damaged, or it holds more than"), ("text", "damaged, or it holds more than"),
    ("numbers", "no tensors by name in it"), ("list", "no tensors by name in it"),
    ("other", "no ViT in timm's layout"), ("unknown", "fit this model: .*new.weight is unknown"),
    ("lacking", "fit this model: .*norm.* is missing|fit this model: layer4.*bn1.bias is missing")])
def test_a_pickle_that_is_no_set_of_weights_is_refused_in_one_line(case, message, name, tmp_path):
    file, tower, layout = LAYOUTS[name]
    published = layout()[1]
    state = published.get("state_dict", published)
    last_norm = [key for key in state if re.search(r"trunk.norm.bias|ln_post.bias|4.0.bn1.bias", key)]
    if case == "lacking":
        del state[last_norm[0]]
    state.update({"unknown": {f"{tower}new.weight": torch.ones(1)}}.get(case, {}))
    (tmp_path / "raw").mkdir()
    source = tmp_path / "raw" / file
    torch.save({"numbers": {"epoch": 3}, "list": [torch.ones(2)],
                "other": {f"{tower}layer.weight": torch.ones(2)}}.get(case, published), source)
    if case in ("cut", "text"):
        source.write_bytes(source.read_bytes()[:-9000] if case == "cut" else b"<html>not here</html>\n")
    target = tmp_path / WEIGHTS[name].target
    with pytest.raises(UserError, match=f"{re.escape(str(source))}: .*{message}") as caught:
        WEIGHTS[name].write(WEIGHTS[name], tmp_path / "raw", target)
    assert not re.search(r"\n|\.partial", str(caught.value)) and not target.exists()


def test_code_in_a_pickle_is_refused_and_never_run(tmp_path):
    payload = Payload(tmp_path / "ran")
    for name, (file, _, layout) in LAYOUTS.items():
        (tmp_path / "raw" / name).mkdir(parents=True)
        torch.save({**layout()[1], "x": payload}, tmp_path / "raw" / name / file)
    code, printed = prepare(",".join(LAYOUTS), tmp_path)
    for name, (file, _, _) in LAYOUTS.items():
        line, = [line for line in printed.splitlines() if line.startswith(f"{name}: failed")]
        assert f"{tmp_path / 'raw' / name / file}: damaged, or it holds more than tensors" in line
        assert not (tmp_path / "weights" / f"{name}.safetensors").exists()
    assert code == 1 and not (tmp_path / "ran").exists()


def test_tensor_that_comes_under_two_names_is_refused(tmp_path):
    twice = pubmedclip_hub()[1] | {"pre_layrnorm.bias": torch.ones(128)}
    torch.save(twice, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pre_layrnorm.bias comes twice, under another name"):
        WEIGHTS["pubmedclip"].write(WEIGHTS["pubmedclip"], tmp_path, tmp_path / "target")


def test_weights_that_cannot_be_fetched_say_where_to_put_them(tmp_path):
    done = subprocess.run(
        [sys.executable, "prepare/all.py", "--only=biomedclip", f"--raw_dir={tmp_path}",
         f"--weights_dir={tmp_path}"], cwd=ROOT, text=True, capture_output=True,
        env={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 1 and "biomedclip: missing" in done.stdout
    assert "open_clip_pytorch_model.bin" in done.stdout and f"into {tmp_path}/biomedclip" in done.stdout
