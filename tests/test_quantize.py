"""A base in 16, 8 and 4 bits: bitsandbytes' numbers, products that are plain ones, little memory, whole runs."""

import hashlib
import re
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

import eval_vqa
import quantize
import train_vlm
from extras.bench.memory import Ledger
from extras.share import export
from lora import LoRALinear, add_lora, lora_layers
from model import LLaMA, LlamaConfig
from plumbing.files import read_settings
from plumbing.flags import UserError, parse_flags
from plumbing.sources import find_start
from quantize import LowLinear, code_books, from_nf4, nearest, store_low, to_int8, to_nf4
from tasks.evaluations import choose_evaluations, find_evaluations, read_evaluation
from test_lora import SETTINGS
from test_model import LLAMA, TOLERANCE, hub_llama, randomise, relative_error, some_tokens, tiny_vlm
from test_qwen3_vl import TINY, fill, logits_of, make_vlm, names_on_disk, random_images
from test_train import flags, shards, stop_after_saving  # noqa: F401, the fixture: a part of the sample
from weights import build_vlm, load_llama, load_vlm, save_llama, save_module, save_vlm
from zoo.qwen3_files import write_config

BITS = (16, 8, 4)
SIZES = [(4304, 100), (1, 1), (3, 101), (64, 64), (7, 33), (40, 48)]  # some end within a block, and within a byte


def some_weight(shape, seed=0):
    return 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(bits, columns=48, rows=80, bias=False, dtype=torch.float32):
    """A LowLinear, and the plain nn.Linear with the weight that it stands for."""
    with torch.device("meta"):
        low = LowLinear(nn.Linear(columns, rows, bias=bias), bits)
    plain = nn.Linear(columns, rows, bias=bias, dtype=dtype)
    low.store(some_weight((rows, columns)))
    plain.weight.data = low.dequantise(dtype)
    low.bias = plain.bias
    return low, plain.requires_grad_(False)


# ----------------------------------------------------------------------------- the numbers

def test_nf4_s_codes_are_those_of_the_paper():
    """Appendix E: means of neighbouring quantiles' places, 8 up to zero and 9 from it on, which share the zero."""
    tail = 0.9677083  # half of 1 - 1/30 and 1 - 1/32
    above = torch.special.ndtri(torch.linspace(tail, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(tail, 0.5, 8, dtype=torch.float64)[:-1])
    book = torch.cat([above, below, torch.zeros(1)]).sort().values
    assert (torch.tensor(quantize.NF4) - book / book.max()).abs().max() < 1e-6 and len(quantize.NF4) == 16


def test_the_map_of_scales_has_seven_decades():
    _, _, book = code_books(torch.device("cpu"))
    assert len(book) == 256 and (book.diff() > 0).all() and book[[-1]] == 1 and 0 in book
    assert [int(((book.abs() < 10.0 ** (1 - n)) & (book.abs() > 10.0 ** -n)).sum()) for n in range(1, 8)] == [
        128, 64, 32, 16, 8, 4, 2]
    assert book[0].item() == pytest.approx(-0.99296875)


def test_every_code_comes_back():
    book, pairs, scales = code_books(torch.device("cpu"))
    for codes in (book, scales):
        assert torch.equal(nearest(codes, codes), torch.arange(len(codes), dtype=torch.int32))
    bytes_ = torch.arange(256)
    assert torch.equal(pairs, torch.stack([book[bytes_ >> 4], book[bytes_ & 15]], dim=1))  # the first one is high
    weight = pairs.view(8, 64).clone()  # each block of one row, with its largest, 1 or -1
    weight[:, 0] = 1
    codes, scale, step, mean, *_ = to_nf4(weight)
    assert step.tolist() == [0] and mean == 1  # all scales are the mean
    assert torch.equal(from_nf4(*to_nf4(weight), weight.shape), weight)
    assert torch.equal(codes.view(-1)[1:32], torch.arange(1, 32).to(torch.uint8))
    # Every code of a scale, in a group of its own step
    codes = torch.full((512, 32), 255, dtype=torch.uint8)  # 1, 1
    scale = torch.arange(512).to(torch.uint8)
    step, mean = torch.tensor([0.5, 0.25]), torch.tensor(2.0)
    values = from_nf4(codes, scale, step, mean, pairs, scales, torch.Size([512, 64]))
    assert torch.equal(values, (torch.cat([0.5 * scales, 0.25 * scales]) + 2)[:, None].expand(-1, 64))
    eight, scale = to_int8(torch.arange(-127, 128).float()[None] / 4)
    assert torch.equal(eight, torch.arange(-127, 128, dtype=torch.int8)[None]) and scale == 0.25


def sha256(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def test_numbers_are_those_of_bitsandbytes():
    """As bitsandbytes 0.50.2 stores this matrix, whose last block is short, with compress_statistics=True."""
    n = torch.arange(151 * 150)
    weight = ((n * 7907 % 2003 - 1001) * (1 + n // 64 * 37 % 11)).float().view(151, 150) / 8192
    codes, scale, step, mean, *_ = to_nf4(weight)
    codes = codes.view(-1)[:len(n) // 2]  # beyond the matrix theirs ends, ours fills the block
    assert codes[:4].tolist() == [15, 238, 220, 186] and scale[:6].tolist() == [3, 56, 224, 17, 161, 236]
    assert sha256(codes) == "a67815d12758e138e977e5a27759534a20458dddab8bf402b498b22c6fff0398"
    assert sha256(scale) == "8a0e214242f1aa3d49ffc8ef60113993a8e9c82d826255b9237f8896628a79fa"
    assert (step.tolist(), mean.item()) == ([0.6259475946426392, 0.6259475946426392], 0.7181686162948608)
    values = from_nf4(*to_nf4(weight), weight.shape)
    assert values[0, :3].tolist() == [-0.12302941083908081, 0.12302941083908081, 0.08894495666027069]
    assert sha256(values) == "da0e36b144ab36adb20d747251b49d6514ef8be56cba13de377da85c1b74f4ee"


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_those_of_bitsandbytes_here(shape, dtype):
    """
    Its build for CPUs looks the code of a scale up by rounded values, and takes the second nearest one here and
    there; all else is the same, bit for bit.
    """
    functional = pytest.importorskip("bitsandbytes", reason="needs `pip install --no-deps bitsandbytes`").functional
    weight = some_weight(shape).to(dtype)
    weight[0] *= 30
    theirs, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    codes, scale, step, mean, pairs, scales = to_nf4(weight)
    assert torch.equal(codes.view(-1)[:len(theirs)], theirs[:, 0])
    assert torch.equal(step, state.state2.absmax) and torch.equal(mean, state.offset)
    assert torch.equal(scales, state.state2.code)
    other = scale != state.absmax
    assert other.float().mean() < 0.01 or len(scale) == 1  # of which nothing but the mean is left
    exact = from_nf4(codes, state.absmax, step, mean, pairs, scales, weight.shape)
    assert relative_error(exact, functional.dequantize_4bit(theirs, state)) < (1e-6 if dtype.itemsize == 4 else 3e-3)
    largest = torch.cat([part.float().abs().amax()[None] for part in weight.reshape(-1).split(64)]) - mean
    steps = step.repeat_interleave(256)[:len(scale)]
    assert ((scales[scale.int()] * steps - largest).abs() <= (scales[state.absmax.int()] * steps - largest).abs()).all()


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("bits, most", [(16, 2 ** -9), (8, 0.01), (4, 0.11)])
def test_odd_sizes_come_back_as_near_as_the_bits_allow(bits, most, shape):
    weight = some_weight(shape)
    with torch.device("meta"):
        low = LowLinear(nn.Linear(shape[1], shape[0]), bits)
    low.store(weight)
    assert low.dequantise().shape == shape and low.dequantise().is_contiguous()
    assert relative_error(low.dequantise(), weight) < most
    low.store(0 * weight)
    assert torch.equal(low.dequantise(), 0 * weight)


def test_bits_a_weight():
    sizes = [8 * sum(tensor.nbytes for name, tensor in pair(bits, 1024, 1024)[0].named_buffers()
                     if name not in ("pairs", "scales")) / 1024 ** 2 for bits in BITS]
    assert sizes == pytest.approx([16, 8.03125, 4.127], abs=1e-3)


# ----------------------------------------------------------------------------- the product

@pytest.mark.parametrize("threads", [1, 2])  # by two ways, on a CPU with AVX-512
@pytest.mark.parametrize("shape", [(5, 48), (2, 100, 48)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradient_are_those_of_the_plain_matrix(bits, bias, shape, threads, dtype, monkeypatch):
    """Under autocast, in x.dtype without it."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    low, plain = pair(bits, bias=bias)
    x, gradient, results = some_weight(shape), some_weight((*shape[:-1], 80), seed=1), []
    for layer in (low, plain):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = layer(given)
        assert y.dtype == dtype
        y.backward(gradient.to(dtype))
        results.append((y, given.grad))
    most = 1e-6 if dtype == torch.float32 else 2 ** -8  # sums of bfloat16 in another order are rounded otherwise
    for one, other in zip(*results):
        assert one.dtype == other.dtype and relative_error(one, other) < most
    assert low(x.bfloat16()).dtype == torch.bfloat16 and not any(p.requires_grad for p in low.parameters())


def low_llama(folder, bits, dtype=torch.float32, lora=True):
    """A LLaMA of few bits, and a plain one with the same numbers, both with LoRA that does something."""
    hub_llama(folder)
    low = load_llama(folder, dtype, bits=bits)
    plain = load_llama(folder, dtype)
    for name, module in low.named_modules():
        if isinstance(module, LowLinear):
            plain.get_submodule(name).weight.data = module.dequantise(dtype)
    for model in (low, plain):
        if lora:
            torch.manual_seed(0)
            add_lora(model, **{**SETTINGS, "targets": "q_proj,v_proj,down_proj"})
            randomise(model, seed=1)
    return low, plain


@pytest.mark.parametrize("recomputed", [0, 2])
@pytest.mark.parametrize("bits", BITS)
def test_a_llama_with_lora_learns_what_the_plain_one_would(bits, recomputed, tmp_path):
    results = []
    for model in low_llama(tmp_path, bits):
        model.recomputed = recomputed
        logits = model(some_tokens())
        logits.square().mean().backward()
        results.append([logits, *(p.grad for p in model.parameters() if p.requires_grad)])
        assert all((p.grad is not None) == ("lora_" in name) for name, p in model.named_parameters())
    assert len(results[0]) == 13
    for one, other in zip(*results, strict=True):
        assert relative_error(one, other) < TOLERANCE


def test_head_embeddings_and_norms_stay_as_they_are(tmp_path):
    low, plain = low_llama(tmp_path, 4, lora=False)
    names = [name for name, module in low.named_modules() if isinstance(module, LowLinear)]
    assert len(names) == 14 and all(name.startswith("model.layers.") for name in names)
    assert [p.numel() for p in low.parameters()] == [p.numel() for p in plain.parameters()]  # and are all counted
    state = low.state_dict()
    real = {name for name, tensor in state.items() if not tensor.is_meta}
    assert state.keys() == plain.state_dict().keys() and len(real) == 7
    assert all(torch.equal(state[name], plain.state_dict()[name]) for name in real)
    with torch.device("meta"):
        model = LLaMA(LLAMA)
        store_low(model, 0)
    assert not any(isinstance(module, LowLinear) for module in model.modules())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_of_a_weight_s_size_is_kept_for_the_backward_pass(bits, compiled, monkeypatch):
    """Not by torch.compile either, which would merge the two times that a weight is made."""
    monkeypatch.setattr(quantize, "linear", nn.functional.linear)  # a compiler asks no CPU for its threads
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256, bias=False))
        store_low(model, bits)
    model[0].store(some_weight((512, 256)))
    model[2].store(some_weight((256, 512)))
    model[0].bias = nn.Parameter(torch.ones(512), requires_grad=False)
    x, sizes = torch.randn(20, 256, requires_grad=True), []

    def keep(tensor):
        sizes.append(tensor.numel())
        return tensor

    if compiled:
        torch._dynamo.reset()
    run = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True) if compiled else model
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = run(x)
    own = {tensor.numel() for tensor in model.buffers()}  # which are there anyway
    assert sizes and all(size <= 20 * 512 or size in own for size in sizes)
    if not compiled:
        assert max(sizes) == 20 * 512
    y.sum().backward()
    assert relative_error(x.grad, torch.autograd.grad(model(x).sum(), x)[0]) < TOLERANCE


# ----------------------------------------------------------------------------- loading

class RealLedger(Ledger):
    """Counts no tensor of the meta device: they have a size, but take no memory."""

    def enter(self, storage):
        if storage.device.type != "meta":
            super().enter(storage)


WIDE = LlamaConfig(100, hidden_size=256, intermediate_size=704, num_hidden_layers=3, num_attention_heads=4,
                   num_key_value_heads=4)


@pytest.mark.parametrize("bits, share", [(16, 0.5), (8, 0.26), (4, 0.14)])
def test_loading_takes_the_small_model_and_one_tensor(bits, share, tmp_path):
    save_llama(LLaMA(WIDE), tmp_path)
    with RealLedger() as ledger:
        model = load_llama(tmp_path, bits=bits)
        live = ledger.live
    whole = sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())
    small = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta)
    heads = 2 * 4 * 100 * 256  # embeddings and head, float32
    assert small - heads < share * (whole - heads) + 14 * 4 * 3 * 256 + 4 * 7 * 256 + 21 * 3100  # norms, code books
    largest = 4 * 256 * 704
    assert live <= 1.01 * small and ledger.peak - live < 4.2 * largest  # as read, scaled, and its codes in the making


def test_tensors_of_a_few_bits_move_with_the_model(tmp_path):
    model, plain = low_llama(tmp_path, 4)
    wanted = model(some_tokens())
    assert torch.equal(model.to("cpu")(some_tokens()), wanted)
    moved = model.to("meta")
    layer = moved.blocks[0].self_attn.q_proj
    assert isinstance(layer, LoRALinear) and isinstance(layer.base, LowLinear)
    assert {tensor.device.type for tensor in (*moved.buffers(), *moved.parameters())} == {"meta"}
    assert {tensor.device.type for tensor in moved.to_empty(device="cpu").buffers()} == {"cpu"}


def test_a_file_that_does_not_fit_is_refused_as_ever(tmp_path):
    hub_llama(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name][:, 1:].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"{re.escape(name)} is \(48, 31\), not \(48, 32\)"):
        load_llama(tmp_path, bits=4)
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"{re.escape(name)} is missing"):
        load_llama(tmp_path, bits=8)


@pytest.mark.parametrize("tied", [True, False])
def test_a_qwen_in_4_bits_is_the_plain_one_with_its_numbers(tied, tmp_path):
    """Vision, mergers and blocks are small, embeddings and head bfloat16; what trains in full is neither."""
    vision, text = TINY[0], replace(TINY[1], tie_word_embeddings=tied)
    model = make_vlm(vision, text)
    fill(names_on_disk(model))
    save_file({name: tensor.detach().contiguous() for name, tensor in names_on_disk(model).items()},
              tmp_path / "model.safetensors")
    write_config(tmp_path, vision, text)
    low = build_vlm("", 512, str(tmp_path), str(tmp_path), bits=4)
    full = build_vlm("", 512, str(tmp_path), str(tmp_path), trained=["vision", "projector"], bits=4)
    small = {name for name, module in low.named_modules() if isinstance(module, LowLinear)}
    assert {name.split(".")[0] for name in small} == {"vision", "projector", "language"}
    low_parts = {name.split(".")[0] for name, module in full.named_modules() if isinstance(module, LowLinear)}
    assert low_parts == {"language"}
    assert low.language.model.language_model.embed_tokens.weight.dtype == torch.bfloat16
    assert tied or low.language.lm_head.bits == 16
    with torch.no_grad():
        embeddings = model.language.model.language_model.embed_tokens.weight
        embeddings.copy_(embeddings.bfloat16())
        for name in small:
            model.get_submodule(name).weight.copy_(low.get_submodule(name).dequantise())
    tokens, images = [5, -1, 6, 7, -2, 8], random_images([(32, 64), (64, 64)])
    assert relative_error(logits_of(low, tokens, images), logits_of(model, tokens, images)) < TOLERANCE
    add_lora(low.language, "q_proj,down_proj")
    logits_of(low, tokens, images).sum().backward()
    assert all(layer.lora_B.grad.abs().sum() > 0 for layer in lora_layers(low.language).values())


# ----------------------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def base(shards, tmp_path_factory):  # noqa: F811
    """A run whose parts are all trained."""
    run = tmp_path_factory.mktemp("base") / "run"
    train_vlm.main(flags(shards, run))
    return run


def low_flags(shards, base, run, **changes):  # noqa: F811
    return flags(shards, run, **{**dict(language="lora", lora_targets="q_proj,v_proj,down_proj", start=str(base),
                                        base_bits=4, learning_rate=3e-3, lora_dropout=0.1), **changes})


def test_a_run_on_4_bits_is_resumed_bit_for_bit_and_scored_on_16(shards, base, tmp_path, monkeypatch):  # noqa: F811
    run, cut = tmp_path / "whole", tmp_path / "cut"
    train_vlm.main(low_flags(shards, base, run))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after_saving(patch, 1)
        train_vlm.main(low_flags(shards, base, cut))
    with pytest.raises(UserError, match="--base_bits=0: the run in .*cut has 4"):
        train_vlm.main(low_flags(shards, base, cut, base_bits=0, resume=True))
    train_vlm.main(low_flags(shards, base, cut, resume=True))
    for file in ("adapter/adapter_model.safetensors", "projector.safetensors", "optimizer.safetensors"):
        whole, again = (load_file(folder / "step_000006" / file) for folder in (run, cut))
        assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    assert not (run / "step_000006/language").exists()  # a frozen base is not saved: it is the other run's
    language = read_settings(run / "step_000006/config.json")["weights"]["language"]
    assert language == str(base / "step_000006/language")

    models = {bits: load_vlm(run / "step_000006", bits=bits) for bits in ("auto", 0, 8)}
    assert [model.base_bits for model in models.values()] == [4, 0, 8]
    adapters = [{name: layer.lora_B for name, layer in lora_layers(model).items()} for model in models.values()]
    assert all(torch.equal(adapters[0][name], adapter[name]) and adapter[name].abs().sum() > 0
               for adapter in adapters for name in adapter)
    logits = {bits: model.eval().language(some_tokens()) for bits, model in models.items()}
    assert 1e-3 < relative_error(logits["auto"], logits[0]) < 0.3
    assert 1e-5 < relative_error(logits[8], logits[0]) < 0.05

    def score(**changes):
        eval_vqa.main(eval_vqa.Config(run=str(run), shards_dir=str(shards), blind="none", limit=8, **changes))
        return {folder.name: read_evaluation(folder)["stands_on"]["base_bits"] for folder in find_evaluations(run)}

    name = "step_000006_sample_test_first_8_blind_none"
    assert score() == {name: 4}
    assert score(base_bits="0") == {name: 4, f"{name}_base_0_bits": 0}
    assert len(choose_evaluations(str(run))) == 1

    export.main(export.Config(run=str(run), folder=str(tmp_path / "export"), only="language,vlm"))  # as ever
    for layer in lora_layers(models[0].language).values():
        layer.merge()
    exported = load_llama(tmp_path / "export/language")
    assert relative_error(exported(some_tokens()), models[0].language(some_tokens())) < TOLERANCE
    again = load_vlm(tmp_path / "export/vlm/step_000006")
    assert again.base_bits == 4 and torch.equal(again.eval().language(some_tokens()), logits["auto"])

    (base / "step_000006/language/model.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="language: not the base weights that the run was trained on"):
        load_vlm(run / "step_000006")
    (tmp_path / "elsewhere").rename(base / "step_000006/language/model.safetensors")


def test_training_has_nearly_the_losses_of_the_plain_base(shards, base, tmp_path):  # noqa: F811
    losses = {}
    for bits in (0, 16, 8, 4):
        run = tmp_path / str(bits)
        train_vlm.main(low_flags(shards, base, run, base_bits=bits, learning_rate=1e-4, save_every=0))
        lines = (run / "log.jsonl").read_text().splitlines()
        losses[bits] = [float(re.search(r'"loss": ([\d.]+)', line)[1]) for line in lines if '"loss"' in line]
    for bits, most in ((16, 3e-4), (8, 1e-3), (4, 0.02)):
        assert losses[bits] != losses[0] and losses[bits] == pytest.approx(losses[0], rel=most)


@pytest.mark.parametrize("changes, message", [
    (dict(language="full"), "--base_bits=4: for a frozen language model in one piece; leave it out, or"),
    (dict(shard=True), "--base_bits=4: for a frozen language model in one piece; leave it out, or"),
    (dict(), "--base_bits=4: no base; name one with --language_weights or --start")])
def test_few_bits_are_refused_where_there_is_no_frozen_base(changes, message):
    config = train_vlm.Config(base_bits=4, model="sample", **changes)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        find_start(config, None)
        build_vlm("sample", 300, bits=config.base_bits)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("script, value, expected", [
    (train_vlm, "0", 0), (train_vlm, "4", 4), (train_vlm, "5", "invalid choice: 5"), (train_vlm, "x", "invalid int"),
    (train_vlm, "auto", "invalid int"), (eval_vqa, "auto", "auto"), (eval_vqa, "16", "16"), (eval_vqa, "3", "choice")])
def test_the_flag_takes_these_numbers(script, value, expected):
    if isinstance(expected, int) or expected == value:
        assert parse_flags(script.Config, [f"--base_bits={value}"]).base_bits == expected
    else:
        with pytest.raises(UserError, match=f"base_bits.*{expected}"):
            parse_flags(script.Config, [f"--base_bits={value}"])


def test_a_base_of_few_bits_is_neither_saved_nor_merged_into(tmp_path):
    model = tiny_vlm()
    model.language, _ = low_llama(tmp_path, 4)
    before = model.language(some_tokens())
    with pytest.raises(UserError, match="a base of few bits is not saved: load it with --base_bits=0"):
        save_module(model.language, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="a base of few bits is not saved"):
        save_vlm(model, tmp_path / "vlm")
    for layer in lora_layers(model.language).values():
        with pytest.raises(UserError, match="LoRA is not merged into a base of few bits; load that with --base_bits=0"):
            layer.merge()
    assert not (tmp_path / "x.safetensors").exists() and torch.equal(model.language(some_tokens()), before)
