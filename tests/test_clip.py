"""
CLIP's image tower as others name and compute it: transformers layer by layer, OpenAI's names, what a VLM is given of
it, the sizes of ViT-L/14@336, and prepare/all.py from a stand-in hub.
"""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from model import CLIP_MEAN, CONFIGS, ViT, ViTConfig
from plumbing.flags import UserError
from plumbing.tensors import read_metadata, tensor_shapes
from prepare.weights import WEIGHTS
from test_download import ranged, serve  # noqa: F401
from test_model import TOLERANCE, relative_error
from test_weights import prepare
from weights import build_vlm, load_encoder, save_module
from zoo.clip import gather, timm_names
from zoo.encoders import FEATURES

SIZES = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=28,
             patch_size=7)
LAYERS = {"normed": -1, "-1": -1, "-2": -2}  # of transformers' hidden_states


@torch.no_grad()
def redraw(model, seed=0):
    """Weights under which each shows: normal, of deviation 0.3; norms about 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        if "norm" in name and name.endswith("weight") or "layrnorm.weight" in name:
            parameter.add_(1)
    return model.eval()


def hub_clip(folder, prefix="vision_model.", **changes):
    """A tiny CLIP tower of transformers, and the hub folder that it is saved in, with its config beside it."""
    config = transformers.CLIPVisionConfig(**SIZES | changes, attn_implementation="eager")
    model = redraw(transformers.CLIPVisionModel(config))
    folder.mkdir(exist_ok=True)
    config.save_pretrained(folder)
    tensors = {f"{prefix}{name.removeprefix('vision_model.')}": tensor for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    return model, tensors


def some_pixels(height=28, width=28, seed=1):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed))


def shuffle_pixels(x, rows, columns):
    """InternVL's pixel_shuffle with a scale of 1/2, version 2, restated by places: (I, rows * columns, C) -> 4C."""
    grid = x.view(len(x), rows, columns, -1)
    parts = [grid[:, y::2, z::2] for y, z in ((0, 0), (0, 1), (1, 0), (1, 1))]
    return torch.cat(parts, dim=-1).flatten(1, 2)


def cubic(places, size):
    """(places, size) shares by which a row of `size` numbers is resized: Keys' cubic, a = -0.5, without aliases."""
    scale = max(size / places, 1)
    far = abs(np.arange(size)[None] + 0.5 - (np.arange(places)[:, None] + 0.5) * size / places) / scale
    shares = np.where(far <= 1, 1.5 * far ** 3 - 2.5 * far ** 2 + 1,
                      np.where(far < 2, -0.5 * far ** 3 + 2.5 * far ** 2 - 4 * far + 2, 0))
    return torch.from_numpy(shares / shares.sum(1, keepdims=True)).float()


# ----------------------------------------------------------------------------- against transformers

def hub_folder_of(folder, **changes):
    hub_clip(folder, **changes)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_each_layer_is_transformers(prefix, tmp_path):
    theirs, _ = hub_clip(tmp_path, prefix)
    ours = load_encoder(tmp_path)
    assert ours.config == ViTConfig(28, 7, 32, 3, clip=True, head_size=8) and ours.mean == CLIP_MEAN
    assert {module.eps for module in ours.modules() if isinstance(module, torch.nn.LayerNorm)} == {1e-5}
    wanted = theirs(some_pixels(), output_hidden_states=True)
    x = ours.embed(some_pixels())  # behind pre_layrnorm, as hidden_states[0] is
    for block, hidden in zip([lambda x: x, *ours.blocks], wanted.hidden_states, strict=True):
        x = block(x)
        assert relative_error(x, hidden) < TOLERANCE
    assert relative_error(ours(some_pixels()), theirs.post_layernorm(wanted.hidden_states[-1])) < TOLERANCE
    assert relative_error(ours(some_pixels())[:, 0], wanted.pooler_output) < TOLERANCE
    plain = load_encoder(hub_folder_of(tmp_path / "plain", hidden_act="gelu"))
    assert plain.config.gelu == "gelu" and relative_error(plain(some_pixels()), ours(some_pixels())) > 0.003


@torch.no_grad()
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("class_token", [True, False])
def test_what_a_vlm_is_given(layer, class_token, tmp_path):
    theirs, _ = hub_clip(tmp_path)
    ours = load_encoder(tmp_path, layer=layer, class_token=class_token)
    wanted = theirs(some_pixels(), output_hidden_states=True).hidden_states[LAYERS[layer]]
    wanted = theirs.post_layernorm(wanted) if layer == "normed" else wanted
    wanted = wanted if class_token else wanted[:, 1:]
    assert wanted.shape == (2, ours.tokens(28, 28), 32)
    assert relative_error(ours(some_pixels()), wanted) < TOLERANCE
    assert (len(ours.blocks), "norm.weight" in ours.state_dict()) == (3 - (layer == "-2"), layer == "normed")


@torch.no_grad()
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rows, columns", [(4, 4), (2, 6), (8, 2)])
def test_merged_patches_are_pixel_shuffle_s(layer, rows, columns, tmp_path):
    hub_clip(tmp_path)
    merged, plain = (load_encoder(tmp_path, layer=layer, merge=merge, class_token=False) for merge in (2, 1))
    pixels = some_pixels(7 * rows, 7 * columns)
    assert merged.tokens(7 * rows, 7 * columns) == rows * columns // 4 and merged.output_width == 128
    assert torch.equal(merged(pixels), shuffle_pixels(plain(pixels), rows, columns))


@torch.no_grad()
@pytest.mark.parametrize("rows, columns", [(6, 6), (3, 5), (2, 2), (4, 4)])
def test_positions_of_other_sizes_are_bicubic_without_aliases(rows, columns, tmp_path):
    """
    Against the formula restated, and a transformers model that has these positions as its own. transformers' own
    interpolate_pos_encoding is another: a = -0.75, and aliases where the grid becomes smaller; timm's is this one.
    """
    theirs, tensors = hub_clip(tmp_path)
    ours, table = load_encoder(tmp_path), tensors["vision_model.embeddings.position_embedding.weight"]
    grid = torch.einsum("ry,yxc,sx->rsc", cubic(rows, 4), table[1:].view(4, 4, 32), cubic(columns, 4))
    wanted = torch.cat([table[:1], grid.flatten(0, 1)])
    assert relative_error(ours.positions(rows, columns)[0], wanted) < TOLERANCE
    if rows == columns:
        sized = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES | {"image_size": 7 * rows}))
        sized.load_state_dict(theirs.state_dict() | {
            name: wanted for name in sized.state_dict() if name.endswith("position_embedding.weight")})
        hidden = sized.eval()(some_pixels(7 * rows, 7 * rows)).last_hidden_state
        last = load_encoder(tmp_path, layer="-1")
        assert relative_error(last(some_pixels(7 * rows, 7 * rows)), hidden) < TOLERANCE


# ----------------------------------------------------------------------------- files

def openai_names(tensors):
    """{the hub's name without its prefix: tensor} -> OpenAI's state_dict, float16, a text tower beside it."""
    visual = {"class_embedding": tensors["embeddings.class_embedding"],
              "positional_embedding": tensors["embeddings.position_embedding.weight"],
              "conv1.weight": tensors["embeddings.patch_embedding.weight"], "proj": torch.ones(32, 16)}
    for kind in ("weight", "bias"):
        visual |= {f"ln_pre.{kind}": tensors[f"pre_layrnorm.{kind}"],
                   f"ln_post.{kind}": tensors[f"post_layernorm.{kind}"]}
        for n in range(3):
            here, there = f"encoder.layers.{n}", f"transformer.resblocks.{n}"
            attention = [tensors[f"{here}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            visual |= {f"{there}.attn.in_proj_{kind}": torch.cat(attention),
                       f"{there}.attn.out_proj.{kind}": tensors[f"{here}.self_attn.out_proj.{kind}"],
                       f"{there}.ln_1.{kind}": tensors[f"{here}.layer_norm1.{kind}"],
                       f"{there}.ln_2.{kind}": tensors[f"{here}.layer_norm2.{kind}"],
                       f"{there}.mlp.c_fc.{kind}": tensors[f"{here}.mlp.fc1.{kind}"],
                       f"{there}.mlp.c_proj.{kind}": tensors[f"{here}.mlp.fc2.{kind}"]}
    text = {"positional_embedding": torch.ones(7, 8), "text_projection": torch.ones(8, 8), "ln_final.weight":
            torch.ones(8), "transformer.resblocks.0.ln_1.weight": torch.ones(8), "logit_scale": torch.ones(())}
    return {f"visual.{name}": tensor.half() for name, tensor in visual.items()} | text


@torch.no_grad()
def test_the_whole_clip_and_openai_s_names_are_the_same_tower(tmp_path, monkeypatch):
    _, tensors = hub_clip(tmp_path, "")
    tensors = {name: tensor.half().float() for name, tensor in tensors.items()}
    save_file(openai_names(tensors), tmp_path / "openai.safetensors")
    whole = {f"vision_model.{name}": tensor for name, tensor in tensors.items()} | {
        "logit_scale": torch.ones(()), "visual_projection.weight": torch.ones(16, 32), "text_projection.weight":
        torch.ones(16, 8), "text_model.embeddings.position_ids": torch.arange(7)[None],
        "vision_model.embeddings.position_ids": torch.arange(17)[None]}
    save_file(whole, tmp_path / "whole.safetensors")
    save_file(tensors, tmp_path / "model.safetensors")
    wanted = load_encoder(tmp_path).state_dict()
    for file in ("openai.safetensors", "whole.safetensors"):
        state = load_encoder(tmp_path / file).state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in state.items())
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    monkeypatch.delattr("zoo.encoders.read_tensor")  # of which a model without values needs none
    empty = load_encoder(tmp_path / "whole.safetensors", torch.bfloat16, "meta")
    assert {(tensor.is_meta, tensor.dtype) for tensor in empty.state_dict().values()} == {(True, torch.bfloat16)}


def test_the_names_and_bytes_of_vit_l_14_at_336():
    config = transformers.CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14)
    with torch.device("meta"):
        theirs, ours = transformers.CLIPVisionModel(config), ViT(ViTConfig(336, 14, 1024, 24, clip=True))
    tensors = {f"vision_model.{name.removeprefix('vision_model.')}": tensor
               for name, tensor in theirs.state_dict().items()}
    renamed = gather("x", timm_names(tensors), tensors.get)
    assert {name: tensor.shape for name, tensor in renamed.items()} == {
        name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert (ours.config.heads, ours.tokens(336, 336), len(tensors)) == (16, 577, 391)
    assert sum(p.numel() for p in ours.parameters()) == 303_507_456
    offset, header = 0, {"__metadata__": {"format": "pt"}}  # as the published tower lies in a safetensors file
    for name, tensor in sorted(tensors.items()):
        end = offset + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    head = len(json.dumps(header, separators=(",", ":")))
    assert 8 + -(-head // 8) * 8 + offset == 1_214_077_616


@pytest.mark.parametrize("config, tensors, message", [
    (None, {}, "how many heads its 32 channels have is not known; write beside it"),
    ({"num_attention_heads": 5}, {}, "5 heads of 32 channels cannot be"),
    ({"hidden_size": 64}, {}, "width is 64 by the config beside it, 32 by its tensors"),
    ({"num_hidden_layers": 4}, {}, "depth is 4 by the config beside it, 3 by"),
    ({"intermediate_size": 64}, {}, "MLP width is 64 by the config beside it, 128 by"),
    ({"patch_size": 14}, {}, "patch size is 14 by the config beside it, 7 by"),
    ({"image_size": 35}, {}, "image_size is 35 by the config beside it, 4 patches of 7 pixels"),
    ({"layer_norm_eps": 1e-6}, {}, "a norm's eps of 1e-06 not supported here: 1e-05 is"),
    ({"hidden_act": "relu"}, {}, "activation 'relu' not supported here: gelu and quick_gelu"),
    ({"hidden_act": "gelu_pytorch_tanh"}, {}, "activation 'gelu_tanh' not supported here"),
    ({"model_type": "siglip_vision_model", "layer_norm_eps": 1e-6}, {}, "clip is False by the config beside it"),
    ({}, {"pre_layrnorm.bias": torch.ones(32)}, "pre_layrnorm.bias comes twice, under another name"),
    ({}, {"vision_model.new.weight": torch.ones(2)}, 'does not fit this model: Unexpected .*"new.weight"'),
    ({}, {"vision_model.post_layernorm.bias": None}, 'does not fit this model: Missing .*"norm.bias"'),
    ({}, {"vision_model.post_layernorm.bias": torch.ones(3)}, "does not fit this model: size mismatch for norm.bias"),
    ({}, {"vision_model.encoder.layers.1.self_attn.v_proj.bias": None}, "size mismatch for blocks.1.attn.qkv.bias"),
    ({}, {"vision_model.encoder.layers.1.self_attn.v_proj.weight": torch.ones(32, 5)},
     "blocks.1.attn.q.weight does not fit its keys and values"),
    ({}, {"vision_model.post_layernorm.bias": torch.ones(32, dtype=torch.int32)}, "int32, which holds no weights"),
    ({}, {"vision_model.embeddings.class_embedding": torch.ones(())}, "size mismatch for cls_token")])
def test_what_does_not_fit_is_refused_in_one_line(config, tensors, message, tmp_path):
    _, before = hub_clip(tmp_path)
    path = tmp_path / "config.json"
    if config is None:
        path.unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    tensors = {name: tensor for name, tensor in (before | tensors).items() if tensor is not None}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"{tmp_path}/model.safetensors: .*{message}") as caught:
        load_encoder(tmp_path)
    assert "\n" not in str(caught.value)


def test_without_a_config_heads_of_64_are_known_and_the_activation_is_not(tmp_path):
    hub_clip(tmp_path, hidden_size=128, intermediate_size=512, num_attention_heads=2)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="OpenAI's quick GELU or LAION's plain one is not known; write beside it"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({
        "architecture": "vit_base_patch32_clip_quickgelu_224", "model_args": {"embed_dim": 128, "num_heads": 2}}))
    assert load_encoder(tmp_path).config == ViTConfig(28, 7, 128, 3, clip=True)


def write_program(path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)
    return path


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
def test_a_folder_of_pickles_and_a_program_are_refused_by_what_to_take_instead(tmp_path):
    hub_clip(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=f"{tmp_path}: no model.safetensors in it; .*--only=clip_l_336"):
        load_encoder(tmp_path)
    program = write_program(tmp_path / "ViT-L-14-336px.pt")
    for read in (load_encoder, lambda file: WEIGHTS["clip_l_336"].write(WEIGHTS["clip_l_336"], tmp_path / "raw", file)):
        (tmp_path / "raw").mkdir(exist_ok=True)
        shutil.copy(program, tmp_path / "raw")
        with pytest.raises(UserError, match="ViT-L-14-336px.pt: TorchScript, a program, .*pytorch_model.bin of "
                                            "openai/clip-vit-large-patch14-336") as caught:
            read(program)
        assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------- prepare/all.py

def stand_in_hub(repository, files, gated=False):
    """The part of the hub that a download of one model repository uses."""
    def answer(path, asked):
        if path.startswith(f"/api/models/{repository}"):
            if gated:
                return 403, {"X-Error-Code": "GatedRepo"}, b""
            siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
            return 200, {}, json.dumps({"id": repository, "sha": "a" * 40, "siblings": siblings}).encode()
        return ranged(path, asked, content=files[path.rpartition("/")[2]], ETag="a")
    return answer


@pytest.fixture
def prepare_from(serve, monkeypatch, tmp_path):  # noqa: F811
    """prepare_from(answer, name) runs `prepare/all.py --only=name` with a stand-in hub; its exit code and output."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)

    def run(answer, name):
        url, _ = serve(answer)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        return prepare(name, tmp_path)
    return run


@torch.no_grad()
def test_clip_l_336_comes_from_the_hub_s_pickle(prepare_from, tmp_path):
    changes = dict(hidden_size=128, intermediate_size=512, num_attention_heads=2)
    theirs, tensors = hub_clip(tmp_path / "hub", **changes)
    torch.save(tensors | {"logit_scale": torch.ones(()), "text_model.final_layer_norm.bias": torch.ones(3)},
               tmp_path / "hub/pytorch_model.bin")
    facts = WEIGHTS["clip_l_336"]
    assert facts.only_by_name and facts.megabytes == 1711
    answer = stand_in_hub(facts.hub, {"pytorch_model.bin": (tmp_path / "hub/pytorch_model.bin").read_bytes(),
                                      "tf_model.h5": b"other"})
    code, printed = prepare_from(answer, "clip_l_336")
    assert code == 0 and "ready" in printed, printed
    target = tmp_path / "weights/clip_l_336.safetensors"
    said = read_metadata(target)
    assert (said["heads"], said["activation"], said["source"]) == ("2", "quick_gelu", f"{facts.hub}@{'a' * 40}")
    assert "image_size" not in said and json.loads(said["tensors"]).keys() == tensor_shapes(target).keys()
    ours = load_encoder(target, layer="-2")
    wanted = theirs(some_pixels(), output_hidden_states=True).hidden_states[-2]
    assert relative_error(ours(some_pixels()), wanted) < TOLERANCE
    assert "up to date" in prepare("clip_l_336", tmp_path)[1]


def test_the_last_but_one_of_a_single_block_is_refused(tmp_path):
    save_module(ViT(ViTConfig(32, 16, 64, 1)), tmp_path / "one.safetensors")
    assert len(load_encoder(tmp_path / "one.safetensors", layer="-1").blocks) == 1
    with pytest.raises(UserError, match="--vision_layer=-2: the encoder has one block"):
        load_encoder(tmp_path / "one.safetensors", layer="-2")


def test_a_new_encoder_leaves_its_last_block_out_too():
    model = build_vlm("sample", 100, features=FEATURES | {"layer": "-2"})
    assert len(model.vision.blocks) == CONFIGS["sample"][0].depth - 1
    assert isinstance(model.vision.norm, torch.nn.Identity)
