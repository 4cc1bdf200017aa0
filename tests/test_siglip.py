"""SigLIP's image tower against transformers, layer by layer, in a VLM and under a classifier's head."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import train_cls
from model import VLM, LLaMA
from plumbing.files import read_settings, sealed, write_settings
from plumbing.flags import UserError
from plumbing.tensors import read_metadata
from prepare.weights import WEIGHTS
from tasks.encoders import read_results
from test_clip import (LAYERS, cubic, hub_clip, prepare_from, redraw, serve, shuffle_pixels, some_pixels,  # noqa: F401
                       stand_in_hub)
from test_cls import picture, settings, toy_records, write
from test_model import LLAMA, TOLERANCE, randomise, relative_error
from weights import build_vlm, load_classifier, load_encoder, load_vlm, save_classifier, save_vlm
from zoo.classifier import Classifier
from zoo.clip import gather, timm_names
from zoo.siglip import Siglip, SiglipConfig

# 30 pixels are 4 patches of 7 and 2 that none covers, as 384 are 27 of 14 and 6
SIZES = dict(hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, image_size=30,
             patch_size=7)
TINY = SiglipConfig(30, 7, 32, 3, head_size=8, hidden=80)


def hub_siglip(folder, prefix="vision_model.", **changes):
    """A tiny SigLIP of transformers, its attention pool with it, and the hub folder that it is saved in."""
    config = transformers.SiglipVisionConfig(**SIZES | changes, attn_implementation="eager")
    model = redraw(transformers.SiglipVisionModel(config))
    folder.mkdir(exist_ok=True)
    config.save_pretrained(folder)
    tensors = {f"{prefix}{name.removeprefix('vision_model.')}": tensor for name, tensor in model.state_dict().items()}
    assert f"{prefix}head.probe" in tensors
    text = {"text_model.head.weight": torch.ones(2, 2), "logit_scale": torch.ones(1), "logit_bias": torch.ones(1)}
    save_file(tensors | (text if prefix else {}), folder / "model.safetensors")
    return model, tensors


# ----------------------------------------------------------------------------- against transformers

@torch.no_grad()
@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_each_layer_is_transformers(prefix, tmp_path):
    theirs, _ = hub_siglip(tmp_path, prefix)
    ours, pixels = load_encoder(tmp_path), some_pixels(30, 30)
    assert ours.config == TINY and ours.mean == ours.std == (0.5, 0.5, 0.5)
    assert {module.eps for module in ours.modules() if isinstance(module, torch.nn.LayerNorm)} == {1e-6}
    wanted = theirs(pixels, output_hidden_states=True)
    x = ours.embed(pixels)
    for block, hidden in zip([lambda x: x, *ours.blocks], wanted.hidden_states, strict=True):
        x = block(x)
        assert relative_error(x, hidden) < TOLERANCE
    assert ours.tokens(30, 30) == 16 and relative_error(ours(pixels), wanted.last_hidden_state) < TOLERANCE
    assert relative_error(wanted.last_hidden_state, wanted.hidden_states[-1]) > 0.1  # behind a norm, unlike CLIP's
    pixels[:, :, 28:] = pixels[:, :, :, 28:] = 7
    assert relative_error(ours(pixels), wanted.last_hidden_state) < TOLERANCE  # the last 2 pixels are in no patch


@torch.no_grad()
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("merge", [1, 2])
def test_what_a_vlm_is_given(layer, merge, tmp_path):
    theirs, _ = hub_siglip(tmp_path)
    ours, pixels = load_encoder(tmp_path, layer=layer, merge=merge), some_pixels(30, 30)
    wanted = theirs(pixels, output_hidden_states=True).hidden_states[LAYERS[layer]]
    wanted = theirs.post_layernorm(wanted) if layer == "normed" else wanted
    wanted = shuffle_pixels(wanted, 4, 4) if merge == 2 else wanted
    assert wanted.shape == (2, ours.tokens(30, 30), ours.output_width)
    assert relative_error(ours(pixels), wanted) < TOLERANCE
    assert (len(ours.blocks), "norm.weight" in ours.state_dict()) == (3 - (layer == "-2"), layer == "normed")


@torch.no_grad()
@pytest.mark.parametrize("rows, columns", [(6, 6), (3, 5), (2, 2)])
def test_positions_of_other_sizes_are_bicubic_without_aliases(rows, columns, tmp_path):
    """As CLIP's in test_clip.py, without a class token's."""
    theirs, tensors = hub_siglip(tmp_path)
    ours, table = load_encoder(tmp_path), tensors["vision_model.embeddings.position_embedding.weight"]
    grid = torch.einsum("ry,yxc,sx->rsc", cubic(rows, 4), table.view(4, 4, 32), cubic(columns, 4)).flatten(0, 1)
    assert relative_error(ours.positions(rows, columns)[0], grid) < TOLERANCE
    assert ours(some_pixels(7 * rows, 7 * columns)).shape == (2, rows * columns, 32)
    if rows == columns:
        sized = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES | {"image_size": 7 * rows}))
        sized.load_state_dict(theirs.state_dict() | {
            name: grid for name in sized.state_dict() if name.endswith("position_embedding.weight")})
        pixels = some_pixels(7 * rows, 7 * rows)
        assert relative_error(ours(pixels), sized.eval()(pixels).last_hidden_state) < TOLERANCE


@torch.no_grad()
def test_timm_s_file_is_the_same_tower_once_its_activation_is_told(references, tmp_path):
    theirs = redraw(references[0].create_model(
        "vit_so400m_patch14_siglip_384", num_classes=0, img_size=28, patch_size=7, embed_dim=32, depth=3, num_heads=4,
        mlp_ratio=2.5, act_layer="gelu_tanh"))
    save_file(theirs.state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="no class token, but nothing says that it is a SigLIP"):
        load_encoder(tmp_path / "x.safetensors")
    beside = {"architecture": "vit_so400m_patch14_siglip_384", "model_args": {"embed_dim": 32, "num_heads": 4}}
    (tmp_path / "config.json").write_text(json.dumps(beside))
    with pytest.raises(UserError, match="nothing says that it is a SigLIP"):  # timm computes the exact GELU then
        load_encoder(tmp_path / "x.safetensors")
    beside["model_args"]["act_layer"] = "gelu_tanh"
    (tmp_path / "config.json").write_text(json.dumps(beside))
    ours = load_encoder(tmp_path / "x.safetensors")
    assert ours.config == replace(TINY, image_size=28)
    assert relative_error(ours(some_pixels()), theirs.forward_features(some_pixels())) < TOLERANCE


# ----------------------------------------------------------------------------- sizes and refusals

@pytest.mark.parametrize("size, tokens, parameters", [(384, 729, 412_987_248), (448, 1024, 413_327_088)])
def test_the_sizes_of_so400m_and_medsiglip(size, tokens, parameters):
    config = transformers.SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=size,
        patch_size=14, vision_use_head=False)
    with torch.device("meta"):
        theirs, ours = transformers.SiglipVisionModel(config), Siglip(SiglipConfig(image_size=size))
    tensors = theirs.state_dict()
    renamed = gather("x", timm_names(tensors), tensors.get)
    assert {name: tensor.shape for name, tensor in renamed.items()} == {
        name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert (ours.config.heads, ours.tokens(size, size)) == (16, tokens)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == parameters


IMAGES = np.zeros(1, [("height", "u4"), ("width", "u4")])


@pytest.mark.parametrize("merge, tiled, pixels, refused", [
    (1, False, 384, ""), (1, True, 768, ""), (2, False, 448, ""),
    (2, False, 384, "an image has 384 pixels along a side, no multiple of 28, the model's patches"),
    (1, True, 448, "an image has 448 pixels along a side, no multiple of 384, the model's tiles")])
def test_27_patches_do_not_become_squares_of_2(merge, tiled, pixels, refused):
    with torch.device("meta"):
        model = Siglip(SiglipConfig(depth=1, merge=merge, tiled=tiled))
    IMAGES["height"] = IMAGES["width"] = pixels
    if not refused:
        return model.require_shapes("x", IMAGES)
    with pytest.raises(UserError, match=refused) as caught:
        model.require_shapes("x", IMAGES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config, message", [
    (None, 'no class token, but nothing says that it is a SigLIP, of how many heads; write .*"hidden_size": 32'),
    ({"hidden_act": "gelu"}, "activation 'gelu' not supported here: gelu_tanh, no other"),
    ({"layer_norm_eps": 1e-5}, "a norm's eps of 1e-05 not supported here: 1e-06 is"),
    ({"intermediate_size": 128}, "MLP width is 128 by the config beside it, 80 by"),
    ({"image_size": 384}, "image_size is 384 by the config beside it, 4 patches of 7 pixels by"),
    ({"model_type": "siglip2_vision_model"}, "model_type 'siglip2_vision_model' not supported here"),
    ({"model_type": "vit"}, "siglip is False by the config beside it, True by")])
def test_what_a_config_says_that_is_not_so_is_refused_in_one_line(config, message, tmp_path):
    hub_siglip(tmp_path)
    path = tmp_path / "config.json"
    if config is None:
        path.unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(UserError, match=message) as caught:
        load_encoder(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_that_tells_heads_alone_is_no_siglip_s(tmp_path):
    save_file(Siglip(TINY).state_dict(), tmp_path / "x.safetensors", {"heads": "4"})
    with pytest.raises(UserError, match="no class token, but nothing says that it is a SigLIP"):
        load_encoder(tmp_path / "x.safetensors")


# ----------------------------------------------------------------------------- files, VLM and classifier

@pytest.mark.parametrize("name", ["siglip_so400m", "medsiglip"])
def test_it_comes_from_the_hub_s_safetensors(name, prepare_from, tmp_path):  # noqa: F811
    theirs, tensors = hub_siglip(tmp_path / "hub")
    config = json.loads((tmp_path / "hub/config.json").read_text())
    files = {"config.json": json.dumps({"model_type": "siglip", "vision_config": config}).encode(),
             "model.safetensors": (tmp_path / "hub/model.safetensors").read_bytes()}
    assert WEIGHTS[name].only_by_name
    code, printed = prepare_from(stand_in_hub(WEIGHTS[name].hub, files), name)
    assert code == 0 and "ready" in printed, printed
    target = tmp_path / f"weights/{name}.safetensors"
    said = read_metadata(target)
    assert (said["heads"], said["activation"], said["image_size"]) == ("4", "gelu_tanh", "30")
    assert said["source"] == f"{WEIGHTS[name].hub}@{'a' * 40}"
    ours = load_encoder(target)
    assert ours.config == TINY and "head" not in " ".join(load_file(target))
    with torch.no_grad():
        assert relative_error(ours(some_pixels(30, 30)), theirs(some_pixels(30, 30)).last_hidden_state) < TOLERANCE


def test_medsiglip_without_access_says_where_to_ask(prepare_from, tmp_path):  # noqa: F811
    hub = WEIGHTS["medsiglip"].hub
    code, printed = prepare_from(stand_in_hub(hub, {}, gated=True), "medsiglip")
    assert code == 1 and f"{hub}: ask for access on https://huggingface.co/{hub}, then run `hf auth login`" in printed


@torch.no_grad()
@pytest.mark.parametrize("layer", LAYERS)
def test_a_vlm_of_it_is_saved_and_comes_back(layer, tmp_path):
    hub_siglip(tmp_path / "hub")
    vision = randomise(load_encoder(tmp_path / "hub", layer=layer))
    model = VLM(vision, LLaMA(LLAMA))
    save_vlm(model, tmp_path / "model")
    loaded = load_vlm(tmp_path / "model").vision
    assert loaded.config == replace(TINY, layer=layer, depth=3 - (layer == "-2"))
    assert torch.equal(loaded(some_pixels(30, 30)), vision(some_pixels(30, 30)))
    image = torch.randint(256, (30, 30, 3), dtype=torch.uint8)
    pixels = (image.permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
    assert relative_error(model.encode_images([image]), model.projector(vision(pixels)[0])) < TOLERANCE


@pytest.fixture
def toy(tmp_path):
    """Dark and light images of 30 pixels, and a SigLIP that sees them, as prepare/all.py would leave it."""
    write(tmp_path, "toy", toy_records(("dark", "light")), ("dark", "light"), size=30)
    hub_siglip(tmp_path / "hub")
    save_file(gather("x", timm_names(load_file(tmp_path / "hub/model.safetensors")),
                     load_file(tmp_path / "hub/model.safetensors").get), tmp_path / "siglip_so400m.safetensors",
              {"heads": "4", "activation": "gelu_tanh", "image_size": "30"})
    return tmp_path


def test_a_classifier_reads_the_mean_of_its_patches_and_predicts_again(toy):
    config = settings(toy, encoder="siglip_so400m", epochs=2, layer_decay=0.5)
    train_cls.main(config)
    folder = toy / "cls/toy/siglip_so400m/seed_0"
    assert read_results(config.out)["toy", "siglip_so400m", 0]["test"]["macro_f1"] >= 0
    model, facts = load_classifier(folder)
    assert model.encoder.config == TINY and model.head.weight.shape == (2, 32)
    images = torch.randint(256, (2, 30, 30, 3), dtype=torch.uint8)
    pixels = (images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    with torch.no_grad():
        wanted = model.encoder(pixels).mean(1) @ model.head.weight.T + model.head.bias
    assert relative_error(torch.from_numpy(model.judge(images.numpy(), 2, torch.no_grad())), wanted) < TOLERANCE
    rates = {name: rate for name, _, rate in model.rates(0.5)}
    assert (rates["encoder.pos_embed"], rates["encoder.blocks.0.mlp.fc1.weight"], rates["encoder.norm.bias"]) == (
        0.5 ** 4, 0.5 ** 3, 1)
    (toy / "new").mkdir()
    (toy / "new/a.png").write_bytes(picture(3, 40))
    train_cls.main(replace(config, predict=str(toy / "new")))
    assert len(list(folder.glob("predicted_new_*.csv"))) == 1


@pytest.mark.parametrize("layer", LAYERS)
def test_a_classifier_of_a_run_s_layer_comes_back(layer, toy):
    """As `--encoder=openmedq` makes it; one of before has nothing to say of a layer, and a norm."""
    model = Classifier(load_encoder(toy / "hub", layer=layer), 2)
    (toy / "cls").mkdir()
    (toy / "older").mkdir()
    with sealed(toy / "cls/model") as partial:
        save_classifier(model, partial, {"classes": ["a", "b"], "thresholds": None})
    back, pixels = load_classifier(toy / "cls")[0], some_pixels(30, 30)
    assert back.encoder.config.layer == layer and torch.equal(back(pixels), model(pixels))
    facts = read_settings(toy / "cls/model/config.json")
    with sealed(toy / "older/model") as partial:
        save_classifier(model, partial, {})
        write_settings(partial / "config.json", {name: fact for name, fact in facts.items() if name != "layer"})
    if layer == "normed":
        assert torch.equal(load_classifier(toy / "older")[0](pixels), model(pixels))


def test_training_sees_pixels_by_its_mean_and_deviation(toy, monkeypatch):
    seen = []
    forward = Siglip.forward
    monkeypatch.setattr(Siglip, "forward", lambda self, images: seen.append(images) or forward(self, images))
    train_cls.main(settings(toy, encoder="siglip_so400m", epochs=1, augment="none"))
    values = torch.cat([images.flatten() for images in seen])
    assert len(seen) == 5 and values.abs().max() <= 1  # CLIP's numbers would make of black -1.79
    levels = values * 127.5 + 127.5
    assert (levels - levels.round()).abs().max() < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("hub", [hub_siglip, hub_clip])
def test_a_frozen_tower_stays_in_its_hub_folder(hub, tmp_path):
    hub(tmp_path / "hub")
    features = {"merge": 2, "class_token": False, "layer": "-2", "tiled": False}
    model = build_vlm("sample", 300, str(tmp_path / "hub"), features=features, projector="mlp1")
    model.vision.requires_grad_(False)
    save_vlm(model, tmp_path / "model")
    assert not (tmp_path / "model/vision.safetensors").exists()
    loaded = load_vlm(tmp_path / "model")
    image = torch.randint(256, (model.vision.config.image_size,) * 2 + (3,), dtype=torch.uint8)
    assert loaded.vision.config == model.vision.config and loaded.weights["vision"] == str(tmp_path / "hub")
    assert torch.equal(loaded.encode_images([image]), model.encode_images([image]))
    assert load_vlm(tmp_path / "model", device="meta").vision.pos_embed.is_meta
    config = json.loads((tmp_path / "hub/config.json").read_text()) | {"num_attention_heads": 2}
    (tmp_path / "hub/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="hub: not the base weights that the run was trained on"):
        load_vlm(tmp_path / "model")
