"""
The image encoders against other people's code, with the same random values, through the files that
prepare/weights.py makes. transformers is the reference of PubMedCLIP and a loop written out below that
of PMC-CLIP; timm and open_clip are compared with as well where they are installed. CLIP's and SigLIP's own files:
test_clip.py and test_siglip.py. And what is between an encoder and a language model: projectors, and --start.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

import train_vlm
from model import LLaMA, VLM, ViT, ViTConfig
from plumbing.flags import UserError
from prepare.weights import WEIGHTS
from test_model import LLAMA, TOLERANCE, VIT, randomise, relative_error
from weights import load_encoder, load_vlm, save_vlm
from zoo.encoders import require_features
from zoo.projectors import make_projector
from zoo.resnet import ResNet, ResNetConfig
from zoo.siglip import Siglip, SiglipConfig

CLIP_VIT = ViTConfig(image_size=64, patch_size=32, width=128, depth=2, clip=True)  # 5 tokens an image
RESNET = ResNetConfig(image_size=64, layers=(1, 2, 1, 1))  # 5 outputs an image; 32 heads as published


@torch.no_grad()
def fill(module, seed=0):
    """Random values under which every weight, bias, norm and statistic shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            tensor.copy_(noise.abs() + 0.01)
        elif not tensor.is_floating_point():
            tensor.fill_(7)  # batches seen
        elif any(part in name for part in ("patch_embed", "class_embedding", "cls_token", "position")):
            tensor.copy_(0.004 * noise)  # so small that the eps of the norm which follows shows
        elif tensor.dim() > 1:
            tensor.copy_(noise / tensor[0].numel() ** 0.5)
        else:
            tensor.add_(0.3 * noise)
    return module.eval()


def some_pixels(size=64):
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def convert(name, file, published, folder):
    """The file that prepare/all.py makes of a published dict saved under the name `file`."""
    (folder / "raw").mkdir(exist_ok=True)
    torch.save(published, folder / "raw" / file)
    target = folder / WEIGHTS[name].target
    WEIGHTS[name].write(WEIGHTS[name], folder / "raw", target)
    return target


# ----------------------------------------------------------------------------- BiomedCLIP

@torch.no_grad()
def test_biomedclip_s_tower_equals_that_of_open_clip_and_timm(references, tmp_path):
    theirs = fill(references[1].timm_model.TimmModel(
        "vit_base_patch16_224", embed_dim=512, pool="", proj="linear"))
    published = {f"visual.{key}": tensor for key, tensor in theirs.state_dict().items()}
    file = convert("biomedclip", "open_clip_pytorch_model.bin", published, tmp_path)
    ours, pixels = load_encoder(file), some_pixels(224)
    assert ours.config == ViTConfig()
    assert relative_error(ours(pixels), theirs.trunk.forward_features(pixels)) < TOLERANCE
    assert relative_error(theirs.head(ours(pixels)[:, 0]), theirs(pixels)) < TOLERANCE


# ----------------------------------------------------------------------------- PubMedCLIP

def hub_clip():
    """A tiny CLIP of transformers, with a text tower."""
    torch.manual_seed(0)
    sizes = dict(intermediate_size=512, num_hidden_layers=2, num_attention_heads=2)
    return fill(transformers.CLIPModel(transformers.CLIPConfig(
        vision_config=dict(sizes, hidden_size=128, image_size=64, patch_size=32),
        text_config=dict(sizes, hidden_size=32, vocab_size=50, bos_token_id=0, eos_token_id=1),
        projection_dim=16)))


def hub_layout(model):
    """As published: position ids beside the weights."""
    return model.state_dict() | {f"{tower}_model.embeddings.position_ids": torch.arange(5)[None]
                                 for tower in ("vision", "text")}


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_pubmedclip_equals_transformers(prefix, tmp_path):
    whole = hub_clip()
    published = hub_layout(whole) if prefix else whole.vision_model.state_dict()
    assert f"{prefix}embeddings.class_embedding" in published
    ours = load_encoder(convert("pubmedclip", "pytorch_model.bin", published, tmp_path))
    wanted = whole.vision_model(some_pixels())
    tokens = whole.vision_model.post_layernorm(wanted.last_hidden_state)
    assert ours.config == CLIP_VIT and tokens.shape == (3, ours.tokens(64, 64), ours.config.width)
    assert relative_error(ours(some_pixels()), tokens) < TOLERANCE
    assert relative_error(ours(some_pixels())[:, 0], wanted.pooler_output) < TOLERANCE
    assert {m.eps for m in ours.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}


@torch.no_grad()
def test_pubmedclip_s_file_is_timm_s(references, tmp_path):
    file = convert("pubmedclip", "pytorch_model.bin", hub_layout(hub_clip()), tmp_path)
    theirs = references[0].create_model("vit_base_patch32_clip_quickgelu_224", num_classes=0,
                                        img_size=64, embed_dim=128, depth=2, num_heads=2).eval()
    theirs.load_state_dict(load_file(file))
    assert relative_error(load_encoder(file)(some_pixels()),
                          theirs.forward_features(some_pixels())) < TOLERANCE


@torch.no_grad()
def test_pubmedclip_s_original_equals_open_clip(references, tmp_path):
    theirs = fill(references[1].model.CLIP(
        16, vision_cfg=dict(layers=2, width=128, patch_size=32, image_size=64),
        text_cfg=dict(layers=1, width=64, heads=1, context_length=7, vocab_size=50), quick_gelu=True))
    file = convert("pubmedclip", "PubMedCLIP_ViT32.pth",
                   {"best_epoch": 3, "state_dict": theirs.state_dict()}, tmp_path)
    ours = load_encoder(file)
    assert ours.config == CLIP_VIT
    assert relative_error(ours(some_pixels())[:, 0] @ theirs.visual.proj,
                          theirs.visual(some_pixels())) < TOLERANCE


def test_clip_s_vit_in_the_whole_model_is_saved_and_known_again(tmp_path):
    model = VLM(fill(ViT(replace(VIT, clip=True))), LLaMA(LLAMA))
    save_vlm(model, tmp_path)
    loaded = load_vlm(tmp_path).vision
    assert loaded.config == replace(VIT, clip=True)
    assert torch.equal(loaded(some_pixels(16)), model.vision(some_pixels(16)))


# ----------------------------------------------------------------------------- PMC-CLIP

def written_out(state, x, heads):
    """
    All outputs of CLIP's ResNet, in other words than zoo/resnet.py's: strides as averages by a stride-less
    kernel, and torch's own attention, of which PMC-CLIP keeps output 0.
    """
    def convolve(x, conv, bn, padding=0, stride=1):
        x = F.conv2d(x, state[f"{conv}.weight"], stride=stride, padding=padding)
        return F.batch_norm(x, *(state[f"{bn}.{part}"]
                                 for part in ("running_mean", "running_var", "weight", "bias")))

    def halve(x):
        return x.unfold(2, 2, 2).unfold(3, 2, 2).mean((-2, -1))

    x = convolve(x, "conv1", "bn1", padding=1, stride=2).relu()
    x = convolve(x, "conv2", "bn2", padding=1).relu()
    x = halve(convolve(x, "conv3", "bn3", padding=1).relu())
    for name in sorted({key.rpartition(".conv1")[0] for key in state if ".conv1." in key}):
        y = convolve(x, f"{name}.conv1", f"{name}.bn1").relu()
        y = convolve(y, f"{name}.conv2", f"{name}.bn2", padding=1).relu()
        if name.endswith(".0"):
            if name != "layer1.0":
                x, y = halve(x), halve(y)
            x = convolve(x, f"{name}.downsample.0", f"{name}.downsample.1")
        x = (x + convolve(y, f"{name}.conv3", f"{name}.bn3")).relu()
    x = torch.stack([x.mean((2, 3)), *x.flatten(2).unbind(2)])  # (N, I, C)
    x = x + state["attnpool.positional_embedding"][:, None]
    q, k, v, c = ((state[f"attnpool.{part}_proj.weight"], state[f"attnpool.{part}_proj.bias"])
                  for part in "qkvc")
    y, _ = F.multi_head_attention_forward(
        x, x, x, x.shape[2], heads, None, torch.cat([q[1], k[1], v[1]]), None, None, False, 0.0, *c,
        training=False, use_separate_proj_weight=True, q_proj_weight=q[0], k_proj_weight=k[0],
        v_proj_weight=v[0])
    return y.transpose(0, 1)  # (I, N, width)


def both_files(state, folder):
    """The image tower alone, and in a training's checkpoint; each as prepare/all.py converts it."""
    for name, file, published in [
            ("alone", "image_encoder(resnet50).pth", state),
            ("trained", "checkpoint.pt", {"epoch": 100, "name": "pmc", "state_dict": {
                "module.logit_scale": torch.ones(()), "module.text_projection": torch.ones(2, 2),
                **{f"module.visual.{key}": tensor for key, tensor in state.items()}}})]:
        (folder / name).mkdir()
        yield convert("pmc_clip", file, published, folder / name)


@torch.no_grad()
def test_pmc_clip_equals_a_loop_written_out(tmp_path):
    state = fill(ResNet(RESNET)).state_dict()
    wanted = written_out(state, some_pixels(), heads=32)
    assert wanted.shape == (3, RESNET.tokens, RESNET.width)
    for file in both_files(state, tmp_path):
        ours = load_encoder(file)
        assert ours.config == RESNET
        for output in range(5):
            assert relative_error(ours(some_pixels())[:, output], wanted[:, output]) < TOLERANCE
        assert relative_error(ours(some_pixels())[:, 0], wanted.mean(1)) > 0.01  # outputs do differ
    assert relative_error(ours(some_pixels()), written_out(state, some_pixels(), heads=8)) > 0.01


@torch.no_grad()
def test_pmc_clip_s_first_output_equals_open_clip_s(references, tmp_path):
    theirs, eight = (references[1].modified_resnet.ModifiedResNet(
        layers=[1, 2, 1, 1], output_dim=768, heads=heads, image_size=64, width=64) for heads in (32, 8))
    eight.load_state_dict(fill(theirs).state_dict())
    for file in both_files(theirs.state_dict(), tmp_path):
        feature = load_encoder(file)(some_pixels())[:, 0]
        assert relative_error(feature, theirs(some_pixels())) < TOLERANCE
        assert relative_error(feature, eight.eval()(some_pixels())) > 0.01


def test_batch_norm_s_count_stays_a_whole_number_in_any_dtype(tmp_path):
    model = fill(ResNet(ResNetConfig(image_size=32, stem=4, layers=(1, 1, 1, 1), width=8)))
    save_file(model.state_dict(), tmp_path / "resnet.safetensors")
    loaded = load_encoder(tmp_path / "resnet.safetensors", torch.bfloat16)
    assert loaded.config == model.config and not loaded.training
    assert loaded.bn1.num_batches_tracked.dtype == torch.int64 and loaded.bn1.num_batches_tracked == 7
    assert {tensor.dtype for name, tensor in loaded.state_dict().items()
            if "tracked" not in name} == {torch.bfloat16}
    assert relative_error(loaded(some_pixels(32).bfloat16()), model(some_pixels(32))) < 0.05


# ----------------------------------------------------------------------------- sizes and refusals

def test_real_sizes_of_the_encoders():
    with torch.device("meta"):
        vit, resnet = ViT(ViTConfig(patch_size=32, clip=True)), ResNet(ResNetConfig())
    assert (vit.tokens(224, 224), vit.config.heads, vit.config.image_size) == (50, 12, 224)
    assert sum(p.numel() for p in vit.parameters()) == 87_456_000
    assert (resnet.config.tokens, resnet.config.width, resnet.config.image_size) == (50, 768, 224)
    assert sum(p.numel() for p in resnet.parameters()) == 37_792_352
    assert len(resnet.state_dict()) == 339


@pytest.mark.parametrize("damage, message", [
    ({"extra": torch.ones(1)}, "does not fit this model: extra is unknown"),
    ({"layer4.0.bn1.weight": None}, "layer4.0.bn1.weight is missing"),
    ({"attnpool.c_proj.bias": torch.ones(3)}, r"attnpool.c_proj.bias is \(3,\), not \(8,\)"),
    ({"conv3.weight": None}, "no ResNet in CLIP's layout"),
    ({"attnpool.c_proj.weight": None}, "no ViT in timm's layout")])
def test_file_that_is_no_whole_encoder_is_refused_in_one_line(damage, message, tmp_path):
    model = ResNet(ResNetConfig(image_size=32, stem=4, layers=(1, 1, 1, 1), width=8))
    state = model.state_dict() | damage
    save_file({key: tensor for key, tensor in state.items() if tensor is not None}, tmp_path / "x")
    with pytest.raises(UserError, match=f"{tmp_path / 'x'}: .*{message}") as caught:
        load_encoder(tmp_path / "x")
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------- projectors, and what --start has

SIGLIP = SiglipConfig(16, 4, 32, 2, head_size=8, hidden=80)  # 16 tokens an image


@torch.no_grad()
@pytest.mark.parametrize("kind, published, names", [
    ("linear", "", ["bias", "weight"]),
    ("mlp", "mm_projector.", ["0.bias", "0.weight", "2.bias", "2.weight"]),
    ("mlp1", "mlp1.", ["0.bias", "0.weight", "1.bias", "1.weight", "3.bias", "3.weight"])])
def test_projectors_are_llava_s_and_internvl_s_by_names_and_numbers(kind, published, names):
    model = randomise(make_projector(kind, 24, 40))
    state = {f"{published}{name}": tensor for name, tensor in model.state_dict().items()}
    assert sorted(state) == [f"{published}{name}" for name in names]
    x = wanted = 3 + 2 * torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    if kind == "mlp1":
        spread = ((x - x.mean(1, keepdim=True)) ** 2).mean(1, keepdim=True)
        wanted = (x - x.mean(1, keepdim=True)) / (spread + 1e-5).sqrt() * state["mlp1.0.weight"] + state["mlp1.0.bias"]
    first, second = {"linear": ("", ""), "mlp": ("mm_projector.0.", "mm_projector.2."),
                     "mlp1": ("mlp1.1.", "mlp1.3.")}[kind]
    wanted = wanted @ state[f"{first}weight"].T + state[f"{first}bias"]
    if second:
        wanted = wanted * (1 + torch.erf(wanted / 2 ** 0.5)) / 2
        wanted = wanted @ state[f"{second}weight"].T + state[f"{second}bias"]
    assert model(x).shape == (5, 40) and relative_error(model(x), wanted) < TOLERANCE


def some_vlm(encoder, projector, **features):
    vision = (Siglip(replace(SIGLIP, **features)) if encoder == "siglip" else
              ViT(replace(VIT, patch_size=4, clip=encoder == "clip", **features)))
    return randomise(VLM(vision, LLaMA(LLAMA), make_projector(projector, vision.output_width, LLAMA.hidden_size)))


@torch.no_grad()
@pytest.mark.parametrize("encoder", ["timm", "clip", "siglip"])
@pytest.mark.parametrize("projector", ["linear", "mlp", "mlp1"])
@pytest.mark.parametrize("features", [{}, {"merge": 2, "layer": "-1"}, {"layer": "-2", "class_token": False}])
def test_a_vlm_of_each_encoder_and_projector_is_saved_and_loaded_the_same(encoder, projector, features, tmp_path):
    model = some_vlm(encoder, projector, **features)
    save_vlm(model, tmp_path)
    loaded = load_vlm(tmp_path)
    assert loaded.vision.config == model.vision.config and str(loaded.projector) == str(model.projector)
    images = [torch.randint(256, (16, width, 3), dtype=torch.uint8) for width in (16, 32)]
    assert torch.equal(loaded.encode_images(images), model.encode_images(images))
    assert len(model.encode_images(images)) == sum(model.vision.tokens(16, width) for width in (16, 32))


FLAGS = {"merge": 1, "vision_layer": "-1", "vision_tokens": "patches", "projector_type": "mlp1"}


@pytest.mark.parametrize("flag, value, has", [
    ("", "", ""), ("merge", 2, "has 1; give that"), ("vision_layer", "-2", "has -1; give that"),
    ("vision_layer", "normed", "has -1; give that"), ("vision_tokens", "all", "has patches; give that"),
    ("projector_type", "linear", "has mlp1; give that"), ("projector_type", "mlp", "has mlp1; give that")])
@pytest.mark.parametrize("encoder", ["clip", "siglip"])
def test_a_start_that_takes_other_features_is_refused_by_the_flag(flag, value, has, encoder):
    model = some_vlm(encoder, "mlp1", layer="-1", class_token=False)
    config = train_vlm.Config(**FLAGS | ({flag: value} if flag else {}))
    if not flag or (flag, encoder) == ("vision_tokens", "siglip"):  # which has patches alone, whatever is asked for
        return require_features(model, config, {"resize": "squash"}, "out/x")
    with pytest.raises(UserError, match=f"^--{flag}={value}: out/x {has}$"):
        require_features(model, config, {"resize": "squash"}, "out/x")


def test_tiles_whose_patches_do_not_merge_are_refused():
    model = some_vlm("siglip", "linear", merge=3)
    config = train_vlm.Config(merge=3, vision_layer="normed", vision_tokens="all", projector_type="linear")
    require_features(model, config, {"resize": "squash"}, "out/x")
    with pytest.raises(UserError, match="^--merge=3: out/x sees tiles of 4 patches along a side, which that does not"):
        require_features(model, config, {"resize": "tiles:12", "size": model.vision.config.image_size}, "out/x")


def test_tiles_of_another_size_than_the_encoder_s_are_refused():
    model = some_vlm("siglip", "linear")
    config = train_vlm.Config(merge=1, vision_layer="normed", vision_tokens="all", projector_type="linear")
    size = model.vision.config.image_size
    require_features(model, config, {"resize": "tiles:12", "size": size}, "out/x")
    with pytest.raises(UserError, match=f"tiles of 112 pixels; out/x sees tiles of {size}: .* --image_size={size}"):
        require_features(model, config, {"resize": "tiles:12", "size": 112}, "out/x")
