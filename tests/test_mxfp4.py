"""MXFP4: transformers' numbers bit for bit, a base that is multiplied as it lies, and a whole folder of it."""

import gc
import json
import weakref

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

from lora import LoRALinear
from plumbing.flags import UserError
from test_gpt_oss import new_peer
from test_model import TOLERANCE, V, logits_of, relative_error, some_tokens
from zoo.gpt_oss import GptOssConfig
from zoo.gpt_oss_files import MATRICES, hub_config, load_gpt_oss
from zoo.mxfp4 import BLOCK, VALUES, MXLinear, decode, encode, powers_of_two

DTYPES = (torch.float32, torch.bfloat16)


def every_byte(scales):
    """Blocks of every byte, 16 of them in a row, under each scale: (scales, 1, 16, 16) and (scales, 1, 16)."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(len(scales), -1, -1, -1)
    return blocks, scales[:, None, None].expand(-1, -1, 16)


def some_codes(rows=48, columns=96, seed=0):
    """Blocks and scales of a random matrix, its values between 2^-7 and 2^3."""
    generator = torch.Generator().manual_seed(seed)
    groups = columns // BLOCK
    return (torch.randint(256, (rows, groups, BLOCK // 2), generator=generator).to(torch.uint8),
            torch.randint(121, 126, (rows, groups), generator=generator).to(torch.uint8))


def pair(bias=True, dtype=torch.float32):
    """An MXLinear, and the plain nn.Linear with the weight that it stands for."""
    plain = nn.Linear(96, 48, bias=bias, dtype=dtype)
    low = MXLinear(plain)
    low.hold(*some_codes())
    plain.weight.data = low.dequantise(dtype)
    return low, plain


# ----------------------------------------------------------------------------- the numbers

@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_under_every_scale_is_transformers_bit_for_bit(dtype):
    reference = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    blocks, scales = every_byte(torch.arange(1, 255, dtype=torch.uint8))
    theirs = reference(blocks, scales, dtype=dtype).transpose(1, 2)  # which gives in before out
    ours = decode(blocks, scales, dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert ours.dtype == dtype and torch.equal(ours.flatten().view(bits), theirs.reshape(-1).view(bits))


def test_a_scale_is_a_power_of_two_down_to_the_last_and_255_is_no_number():
    scales = torch.arange(256, dtype=torch.uint8)
    powers = powers_of_two(scales)
    assert powers[:255].double().tolist() == [2.0 ** (scale - 127) for scale in range(255)] and powers[255].isnan()
    for dtype in DTYPES:
        lowest = decode(*every_byte(scales[:1]), dtype).double()
        assert lowest.abs().max() == 6 * 2.0 ** -127 and len(lowest.unique()) == 15
        assert decode(*every_byte(scales[255:]), dtype).isnan().all()
    with pytest.raises(UserError, match="a scale of 255, which stands for no number"):
        pair()[0].hold(torch.zeros(48, 3, 16, dtype=torch.uint8), torch.full((48, 3), 255, dtype=torch.uint8))


def test_the_low_nibble_comes_first():
    blocks = torch.zeros(1, 1, 16, dtype=torch.uint8)
    blocks[0, 0, 0], blocks[0, 0, 15] = 0x72, 0x1F
    weight = decode(blocks, torch.tensor([[128]], dtype=torch.uint8))
    assert weight[0, :2].tolist() == [2 * 1.0, 2 * 6.0] and weight[0, 30:].tolist() == [2 * -6.0, 2 * 0.5]
    assert not weight[0, 2:30].any()


@pytest.mark.parametrize("shape", [(48, 96), (3, 5, 64)])
def test_what_can_be_written_comes_back(shape):
    """Where a block's largest has the exponent of 4 or 6 its bytes come back, too; else it has a smaller scale."""
    generator = torch.Generator().manual_seed(0)
    groups = (*shape[:-1], shape[-1] // BLOCK)
    codes = torch.randint(256, (*groups, BLOCK // 2), generator=generator).to(torch.uint8)
    codes = torch.where(codes & 15 == 8, codes - 8, codes)  # without a zero that has a sign, which is written without
    codes = torch.where(codes >> 4 == 8, codes - 128, codes)
    scales = torch.randint(1, 252, groups, generator=generator).to(torch.uint8)
    codes[..., 0] = 0x76
    for ours, theirs in zip(encode(decode(codes, scales)), (codes, scales)):
        assert torch.equal(ours, theirs)
    small = decode(codes & 0x33, scales)  # at most 1.5
    assert torch.equal(decode(*encode(small)), small) and not torch.equal(encode(small)[1], scales)
    assert not decode(*encode(torch.zeros(shape))).any()
    weight = torch.randn(shape, generator=generator)
    error = (decode(*encode(weight)) - weight).unflatten(-1, (-1, BLOCK)).abs().amax(-1)
    assert (error <= weight.unflatten(-1, (-1, BLOCK)).abs().amax(-1) / 4).all()  # a largest of 8 becomes 6


def test_values_are_those_of_the_format():
    """e2m1: a sign, two bits of exponent with a bias of 1, one of mantissa."""
    for code, value in enumerate(VALUES):
        sign, exponent, mantissa = -1.0 if code & 8 else 1.0, code >> 1 & 3, code & 1
        assert value == sign * (2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2)


# ----------------------------------------------------------------------------- products

@pytest.mark.parametrize("bias", [True, False])
def test_products_and_gradients_are_those_of_the_plain_matrix(bias):
    low, plain = pair(bias)
    x = torch.randn(7, 96, requires_grad=True)
    outputs = low(x), plain(x)
    assert torch.equal(*outputs)
    upstream = torch.randn(7, 48)
    ours, theirs = (torch.autograd.grad(y, x, upstream)[0] for y in outputs)
    assert relative_error(ours, theirs) < 1e-6 and not [*low.parameters(recurse=False)][0].requires_grad


def test_gradients_are_right_in_double():
    low, _ = pair()
    assert torch.autograd.gradcheck(low.double(), torch.randn(5, 96, dtype=torch.float64, requires_grad=True))


def test_autocast_multiplies_in_its_dtype_and_what_is_moved_stays_codes():
    low, plain = pair()
    x = torch.randn(7, 96)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(low(x), F.linear(x.bfloat16(), plain.weight.bfloat16(), plain.bias.bfloat16()))
    assert low.to(torch.bfloat16).codes.dtype == low.scale.dtype == torch.uint8 and low.weight.is_meta


def test_nothing_of_a_weights_size_is_kept_for_the_backward_pass(monkeypatch):
    low, _ = pair()
    made, own = [], MXLinear.dequantise

    def watched(self, dtype):
        weight = own(self, dtype)
        made.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(MXLinear, "dequantise", watched)
    saved = []
    x = torch.randn(7, 96, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = low(x)
    gc.collect()
    assert [reference() for reference in made] == [None] and all(tensor.numel() < 48 * 96 for tensor in saved)
    y.sum().backward()
    gc.collect()
    assert [reference() for reference in made] == [None, None] and x.grad.any()


def test_slices_of_stacked_experts_take_no_room_of_their_own():
    blocks, scales = (torch.stack([codes, codes]) for codes in some_codes())
    layers = [MXLinear(nn.Linear(96, 48)) for _ in range(2)]
    for number, layer in enumerate(layers):
        layer.hold(blocks[number], scales[number])
    assert {layer.codes.untyped_storage().data_ptr() for layer in layers} == {blocks.untyped_storage().data_ptr()}


def test_lora_beside_it_is_not_merged():
    layer = LoRALinear(pair()[0], 4, 8)
    with pytest.raises(UserError, match="not merged into a base of few bits"):
        layer.merge()


# ----------------------------------------------------------------------------- a folder

SQUARE = GptOssConfig(V, 64, 64, 2, 4, 2, 16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A hub folder as OpenAI publishes them, whose down_proj are square, and transformers' model of it, decoded."""
    transformers = pytest.importorskip("transformers")
    theirs = new_peer(SQUARE, seed=3)
    tensors = {}
    for name, tensor in theirs.state_dict().items():
        if name.endswith(MATRICES):
            blocks, scales = encode(tensor.transpose(1, 2))
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        else:
            tensors[name] = tensor.bfloat16()
    folder = tmp_path_factory.mktemp("mxfp4")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    stored = {"quant_method": "mxfp4", "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]}
    (folder / "config.json").write_text(json.dumps(hub_config(SQUARE) | {"quantization_config": stored}))
    theirs = transformers.GptOssForCausalLM.from_pretrained(
        folder, quantization_config=transformers.Mxfp4Config(dequantize=True), dtype=torch.float32,
        attn_implementation="eager", experts_implementation="eager")
    return folder, theirs.eval()


@torch.no_grad()
def test_a_folder_in_mxfp4_has_transformers_logits_as_it_lies_and_decoded(folder):
    folder, theirs = folder
    wanted = logits_of(theirs, some_tokens())
    for trained in (False, True):
        model = load_gpt_oss(folder, trained=trained)
        kinds = {type(expert.down_proj).__name__ for block in model.blocks for expert in block.mlp.experts}
        assert kinds == {"Linear" if trained else "MXLinear"}
        assert relative_error(model(some_tokens()), wanted) < TOLERANCE
        for number, block in enumerate(model.blocks):
            for e, expert in enumerate(block.mlp.experts):
                for matrix in MATRICES:
                    layer = getattr(expert, matrix)
                    weight = layer.weight if trained else layer.dequantise()
                    assert torch.equal(weight, getattr(theirs.model.layers[number].mlp.experts, matrix)[e].T)


@torch.no_grad()
@pytest.mark.parametrize("mistake", ["not transposed", "high nibble first", "gate and up as halves of the rows"])
def test_what_loads_without_an_error_and_is_wrong_is_seen(mistake, folder):
    """down_proj is square, and so is what its nibbles make: shapes tell nothing of these."""
    folder, theirs = folder
    wanted, model = logits_of(theirs, some_tokens()), load_gpt_oss(folder, trained=True)
    for expert in [expert for block in model.blocks for expert in block.mlp.experts]:
        up, down = expert.gate_up_proj.weight, expert.down_proj.weight
        if mistake == "not transposed":
            down.copy_(down.T.clone())
        elif mistake == "high nibble first":
            down.copy_(down.unflatten(1, (-1, 2)).flip(-1).flatten(1))
        else:
            up.copy_(up.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1).clone())
    assert relative_error(model(some_tokens()), wanted) > 0.1
