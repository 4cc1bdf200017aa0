"""gpt-oss by hand: transformers' numbers, its formulas written out, packed as alone, out of the cache as without."""

import copy
import json
import math
import re
from collections import defaultdict, namedtuple
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import generate as generate_file
import model as model_file
import test_packing
import zoo.gpt_oss as gpt_oss
from generate import Cache, Sampling, extend, finished_groups, generate, run_pieces
from lora import add_lora, lora_layers, token_keys
from model import VLM, RMSNorm, ViT, attend, block_mask, group_masks, half_split
from plumbing import kernels
from plumbing.flags import UserError
from plumbing.kernels import add_sink
from test_generate import GROUPS, given, greedy_uncached, inputs_of
from test_model import TOLERANCE, V, VIT, logits_of, randomise, relative_error, some_tokens
from test_packing import (MAX_LENGTH, VOCABULARY, double, learn, mix, mixed, require_alike,  # noqa: F401, fixtures
                          seen_by_hand, tensors)
from zoo.gpt_oss import FULL, SLIDING, Expert, Experts, GptOss, GptOssConfig, Norm, Router, near_masks, yarn_speeds
from zoo.gpt_oss_files import expert_shapes, hub_config, load_gpt_oss

EXACT = 1e-10  # relative, float64
TINY = GptOssConfig(V, 64, 96, 4, 8, 2, 16, num_local_experts=8, sliding_window=8)
SHAPES = [  # (width, expert's width, heads, kv heads, head size, experts, of a token), window, layers that slide,
    # (YaRN's factor, fast, slow, trained length, truncate), limit
    ((32, 32, 4, 4, 8, 4, 1), 4, "fs", (4.0, 16.0, 2.0, 512, True), 1.0),
    ((96, 64, 2, 1, 64, 2, 2), 1, "ssf", (32.0, 32.0, 1.0, 4096, True), 3.0),
    ((48, 80, 6, 3, 24, 5, 3), 16, "ffs", (8.0, 4.0, 1.0, 128, False), 7.0),
    ((64, 40, 4, 1, 32, 16, 4), 5, "s", (1.0, 32.0, 1.0, 4096, False), 0.5),
    ((32, 64, 8, 8, 4, 3, 2), 100, "fsfs", (40.0, 32.0, 1.0, 64, True), 2.0),
    ((60, 36, 3, 3, 40, 6, 5), 2, "fff", (2.5, 8.0, 4.0, 2048, False), 7.0),
    ((32, 48, 2, 2, 128, 8, 8), 12, "sss", (16.0, 64.0, 1.0, 8192, True), 20.0),
    ((80, 64, 4, 2, 64, 7, 1), 39, "fsf", (64.0, 32.0, 1.0, 4096, False), 4.0),
    ((40, 52, 5, 5, 6, 4, 3), 3, "sfsfs", (32.0, 2.0, 1.0, 32, False), 1.5),
    ((64, 32, 12, 4, 10, 32, 4), 7, "ssff", (3.0, 1.5, 1.0, 1024, True), 7.0),
    ((48, 96, 2, 1, 20, 9, 2), 40, "fsfs", (32.0, 32.0, 1.0, 4096, True), 7.0),
    ((64, 64, 8, 2, 16, 8, 2), 6, "sf", (32.0, 32.0, 1.0, 4096, False), 0.3)]
TYPES = {"s": SLIDING, "f": FULL}
ALL_LAYERS = "q_proj,k_proj,v_proj,o_proj,gate_up_proj,down_proj"


def config_of(number):
    """TINY, which is like the published ones, or one of SHAPES, from 1 on."""
    if not number:
        return TINY
    (C, D, nh, nkv, hs, E, K), window, types, (factor, fast, slow, length, truncate), limit = SHAPES[number - 1]
    return GptOssConfig(V, C, D, len(types), nh, nkv, hs, num_local_experts=E, num_experts_per_tok=K,
                        sliding_window=window, layer_types=[TYPES[kind] for kind in types], swiglu_limit=limit,
                        factor=factor, beta_fast=fast, beta_slow=slow, original_max_position_embeddings=length,
                        truncate=truncate)


@torch.no_grad()
def fill(parameters, seed=0):
    """Random values by which experts differ, clamps are reached, and no head is without a sink of its own."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(parameters.items()):
        scale = 1 if "sinks" in name else 0.5 if "bias" in name else 0.3
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        parameter.copy_(scale * values + ("norm" in name))


def new_peer(config, seed=0):
    """transformers' model of a config, of random values."""
    transformers = pytest.importorskip("transformers")
    hub = transformers.GptOssConfig.from_dict(json.loads(json.dumps(hub_config(config))) | {"pad_token_id": None})
    peer = transformers.GptOssForCausalLM._from_config(hub, attn_implementation="eager", experts_implementation="eager")
    fill(dict(peer.named_parameters()), seed)
    return peer.eval()


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """number -> transformers' model of config_of(number), and a folder where it saved itself."""
    models = {}

    def make(number):
        if number not in models:
            folder = tmp_path_factory.mktemp("peer")
            models[number] = new_peer(config_of(number), number), folder
            models[number][0].save_pretrained(folder)
        return models[number]
    return make


@contextmanager
def in_float64(*models):
    """Copies of models in float64, and what names float32 in their code is float64, too: sines of both sides."""
    with pytest.MonkeyPatch.context() as patch:
        for target, name, value in ((torch, "float32", torch.float64), (torch, "float", torch.float64),
                                    (torch.Tensor, "float", torch.Tensor.double)):
            patch.setattr(target, name, value)
        copies = [copy.deepcopy(model).double() for model in models]
        for model in copies:
            if hasattr(model.model, "rotary_emb"):  # transformers computes speeds once, where it is made
                model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        yield copies


def gradients_of(model):
    """{the checkpoint's name: gradient} of a GptOss, its experts' stacked, in before out."""
    names, stacked = {}, defaultdict(list)
    for name, parameter in model.named_parameters():
        if ".experts." not in name:
            names[name] = parameter.grad
            continue
        layer, matrix, kind = re.fullmatch(r"(.*\.experts)\.\d+\.(\w+)\.(\w+)", name).groups()
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        stacked[f"{layer}.{matrix}" + "_bias" * (kind == "bias")].append(gradient.t())
    return names | {name: torch.stack(parts) for name, parts in stacked.items()}


# ----------------------------------------------------------------------------- numbers that are known

def test_speeds_and_growth_are_yarns_golden_numbers():
    """Of the published models, from the formulas of arXiv 2309.00071 in float64, equal to transformers' to 1e-8."""
    speeds, config = yarn_speeds(GptOssConfig()), GptOssConfig()
    golden = {0: 1.0, 8: 5.081327e-02, 9: 3.170570e-02, 12: 6.794959e-03, 17: 1.293187e-04, 18: 3.830881e-05,
              31: 3.023511e-07}
    assert speeds.shape == (32,) and speeds.dtype == torch.float32
    for pair, speed in golden.items():
        assert speeds[pair].item() == pytest.approx(speed, rel=1e-6)
    with torch.device("meta"):
        model = GptOss(replace(TINY, head_dim=64))
    cos, sin = model.angles(torch.tensor([0, 3]))
    assert cos.shape == sin.shape == (2, 1, 64) and cos[0].eq(cos[0, 0, 0]).all() and not sin[0].any()
    assert cos[0, 0, 0].item() == pytest.approx(1.3465735903, rel=1e-7)
    assert sin[1, 0, 32].item() == pytest.approx(1.3465735903 * math.sin(3), rel=1e-6)
    # Where the ramp begins and ends: at pairs 8.09 and 17.40, which are not rounded
    ratio = speeds.double() * 150000 ** (torch.arange(32, dtype=torch.float64) / 32)
    slowed = (1 - ratio) / (1 - 1 / 32)
    ends = torch.tensor([8.092779, 17.398025], dtype=torch.float64)
    ramp = ((torch.arange(32, dtype=torch.float64) - ends[0]) / (ends[1] - ends[0])).clamp(0, 1)
    assert (slowed - ramp).abs().max() < 1e-6
    whole = yarn_speeds(replace(config, truncate=True))
    assert whole[8] == speeds[8] * 0 + 150000 ** -0.25 and whole[18] == 150000 ** (-18 / 32) / 32 == speeds[18]


def written_out(state, config, tokens):
    """(T,) tokens -> (T, V) logits, from the formulas: head by head, token by token, with nothing of model.py's."""
    T, hs = len(tokens), config.head_dim
    pair = torch.arange(hs // 2, dtype=torch.float64)
    fast = config.rope_theta ** (-2 * pair / hs)
    low, high = (hs * math.log(config.original_max_position_embeddings / (2 * math.pi * turns))
                 / (2 * math.log(config.rope_theta)) for turns in (config.beta_fast, config.beta_slow))
    low, high = (math.floor(low), math.ceil(high)) if config.truncate else (low, high)
    ramp = ((pair - max(low, 0)) / (min(high, hs - 1) - max(low, 0))).clamp(0, 1)
    angle = torch.arange(T, dtype=torch.float64)[:, None] * (fast * (1 - ramp) + fast / config.factor * ramp)
    turn = torch.polar(torch.full_like(angle, 0.1 * math.log(config.factor) + 1), angle)  # (T, hs / 2)

    def norm(x, name):
        return state[name] * x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

    def heads(x, name):
        y = x @ state[f"{name}.weight"].T + state[f"{name}.bias"]
        return y.split(hs, dim=-1)  # each (T, hs)

    def turned(x):
        y = torch.complex(x[:, :hs // 2], x[:, hs // 2:]) * turn
        return torch.cat([y.real, y.imag], dim=-1)

    at = torch.arange(T)
    before = at[:, None] - at[None]
    h = state["model.embed_tokens.weight"][tokens]
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        x = norm(h, f"{name}.input_layernorm.weight")
        q, k, v = (heads(x, f"{name}.self_attn.{which}_proj") for which in "qkv")
        seen = (before >= 0) & (before < (config.sliding_window if config.layer_types[layer] == SLIDING else T))
        outputs = []
        for head in range(config.num_attention_heads):
            shared = head // (config.num_attention_heads // config.num_key_value_heads)
            scores = (turned(q[head]) @ turned(k[shared]).T / math.sqrt(hs)).masked_fill(~seen, -math.inf)
            sink = state[f"{name}.self_attn.sinks"][head].expand(T, 1)
            outputs.append(torch.cat([scores, sink], dim=-1).softmax(-1)[:, :-1] @ v[shared])
        output = torch.cat(outputs, dim=-1)
        h = h + output @ state[f"{name}.self_attn.o_proj.weight"].T + state[f"{name}.self_attn.o_proj.bias"]
        x, rows = norm(h, f"{name}.post_attention_layernorm.weight"), []
        experts = {key: state[f"{name}.mlp.experts.{key}"] for key in (
            "gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")}
        for token in x:
            scores = state[f"{name}.mlp.router.weight"] @ token + state[f"{name}.mlp.router.bias"]
            best = scores.sort(descending=True).indices[:config.num_experts_per_tok]
            shares, row = scores[best].exp() / scores[best].exp().sum(), 0
            for share, e in zip(shares, best.tolist()):
                both = token @ experts["gate_up_proj"][e] + experts["gate_up_proj_bias"][e]
                gate = both[0::2].clamp(max=config.swiglu_limit)
                up = both[1::2].clamp(-config.swiglu_limit, config.swiglu_limit)
                inner = (up + 1) * gate / (1 + (-1.702 * gate).exp())
                row = row + share * (inner @ experts["down_proj"][e] + experts["down_proj_bias"][e])
            rows.append(row)
        h = h + torch.stack(rows)
    return norm(h, "model.norm.weight") @ state["lm_head.weight"].T


@torch.no_grad()
@pytest.mark.parametrize("number", [0, 3])
def test_logits_are_those_of_the_formulas_written_out(number, peers):
    folder, tokens = peers(number)[1], some_tokens(20)
    state = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    with in_float64(load_gpt_oss(folder)) as (ours,):
        assert relative_error(ours(tokens), written_out(state, config_of(number), tokens)) < EXACT


# ----------------------------------------------------------------------------- transformers

@torch.no_grad()
@pytest.mark.parametrize("number", range(len(SHAPES) + 1))
def test_logits_are_those_of_transformers(number, peers):
    """In float32 and, where rounding hides nothing, in float64."""
    theirs, folder = peers(number)
    ours = load_gpt_oss(folder).eval()
    assert replace(ours.config, layer_types=()) == replace(config_of(number), layer_types=())
    assert relative_error(ours(some_tokens()), logits_of(theirs, some_tokens())) < TOLERANCE
    with in_float64(ours, theirs) as (wide, reference):
        assert relative_error(wide(some_tokens()), logits_of(reference, some_tokens())) < EXACT


@torch.no_grad()
@pytest.mark.parametrize("number", [0, 9])
def test_greedy_answers_are_those_of_transformers(number, peers):
    """Prompts longer and shorter than the window, all under way at once."""
    theirs, folder = peers(number)
    model = VLM(ViT(VIT), load_gpt_oss(folder)).eval()
    prompts = [some_tokens().tolist()[:length] for length in (30, 6, 17, 9)]
    passes = generate(model, [([], [prompt]) for prompt in prompts], 12, Sampling(stops=()))
    answers = {group: answer.tokens for group, (answer,) in finished_groups(passes)}
    for number, prompt in enumerate(prompts):
        reply = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None,
                                pad_token_id=0)
        assert answers[number] == reply[0, -12:].tolist()


def test_every_gradient_is_that_of_transformers(peers):
    """Of the router, sinks and biases, too; of an expert that no token has it is 0."""
    theirs, folder = peers(0)
    ours, tokens = load_gpt_oss(folder, trained=True), some_tokens()
    with in_float64(ours, theirs) as (ours, theirs):
        for logits in (ours(tokens), logits_of(theirs, tokens)):
            F.cross_entropy(logits[:-1], tokens[1:]).backward()
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert gradients_of(ours).keys() == wanted.keys()
    for name, gradient in gradients_of(ours).items():
        assert wanted[name].any() and relative_error(gradient, wanted[name]) < EXACT, name


# ----------------------------------------------------------------------------- each mistake

def packed_row():
    """
    A row of a prefix of 20 tokens, with two branches, a sample by itself and padding: its tokens, positions, groups
    and branches, (T,), and where each sample's own tokens are.
    """
    pieces = [(0, 0, range(20)), (0, 1, range(20, 35)), (0, 2, range(20, 29)), (1, 0, range(12)), (-1, 0, range(4))]
    group, branch, positions = torch.tensor([(group, branch, position) for group, branch, some in pieces
                                             for position in some]).T
    tokens = torch.randint(V, (len(group),), generator=torch.Generator().manual_seed(2))
    samples = [torch.nonzero((group == of) & ((branch == 0) | (branch == own)))[:, 0] for of, own in
               ((0, 1), (0, 2), (1, 0))]
    return tokens, positions, group, branch, samples


def alone_and_packed(ours, theirs):
    """Logits of transformers' model for each sample of packed_row alone, and ours for the row, end to end."""
    tokens, positions, group, branch, samples = packed_row()
    packed = ours(tokens, positions, group_masks(group, branch))
    return torch.cat([packed[at] for at in samples]), torch.cat([logits_of(theirs, tokens[at]) for at in samples])


def whole(ours, theirs):
    return ours(some_tokens()), logits_of(theirs, some_tokens())


def wider_window(patch):
    patch.setattr(gpt_oss, "near_masks", lambda mask, positions, window: near_masks(mask, positions, window + 1))


def window_by_places(patch):
    patch.setattr(gpt_oss, "near_masks", lambda mask, positions, window: near_masks(
        mask, torch.arange(len(positions)), window))


def layers_swapped(patch):
    patch.setattr(GptOssConfig, "slides", lambda self, layer: self.layer_types[layer] == FULL)


def no_sinks(patch):
    patch.setattr(gpt_oss, "attend", lambda q, k, v, mask, sinks: attend(q, k, v, mask))


def sinks_scaled(patch):
    patch.setattr(gpt_oss, "attend", lambda q, k, v, mask, sinks: attend(q, k, v, mask, sinks * q.shape[-1] ** -0.5))


def softmax_before_the_choice(patch):
    patch.setattr(Router, "forward", lambda self, x: F.linear(x, self.weight, self.bias).softmax(-1).topk(self.K))


def no_router_bias(patch):
    def forward(self, x):
        largest, chosen = F.linear(x, self.weight).topk(self.K)
        return largest.softmax(-1), chosen
    patch.setattr(Router, "forward", forward)


def no_growth(patch):
    patch.setattr(GptOss, "angles", lambda self, positions: half_split(positions[:, None] * yarn_speeds(self.config)))


def plain_rotary(patch):
    patch.setattr(gpt_oss, "yarn_speeds", lambda config, device: config.rope_theta ** -(
        torch.arange(config.head_size // 2) * 2 / config.head_size))


def ramp_rounded(patch):
    patch.setattr(gpt_oss, "yarn_speeds", lambda config, device: yarn_speeds(replace(config, truncate=True)))


def expert_with(patch, halves=False, lowest=-math.inf, limit=None, added=1, bias=True, alpha=1.702):
    def forward(self, x):
        both, most = self.gate_up_proj(x), self.limit if limit is None else limit
        gate, up = both.chunk(2, dim=-1) if halves else (both[:, ::2], both[:, 1::2])
        gate, up = gate.clamp(lowest * most, most), up.clamp(-most, most)
        return F.linear((up + added) * gate * torch.sigmoid(alpha * gate), self.down_proj.weight,
                        self.down_proj.bias if bias else None)
    patch.setattr(Expert, "forward", forward)


MISTAKES = {  # what is wrong -> how, in the model of which number, and what shows it
    "a window that is one wider": (wider_window, 0, whole),
    "sliding and full layers swapped": (layers_swapped, 0, whole),
    "no sinks": (no_sinks, 0, whole), "sinks scaled as scores are": (sinks_scaled, 0, whole),
    "softmax before the experts are chosen": (softmax_before_the_choice, 0, whole),
    "no bias of the router": (no_router_bias, 0, whole), "queries and keys that do not grow": (no_growth, 0, whole),
    "plain rotary": (plain_rotary, 0, whole), "a ramp of whole channels": (ramp_rounded, 0, whole),
    "up without one more": (partial(expert_with, added=0), 0, whole),
    "gate and up as halves": (partial(expert_with, halves=True), 0, whole),
    "no clamp": (partial(expert_with, limit=math.inf), 0, whole),
    "gate clamped below, too": (partial(expert_with, lowest=-1.0), len(SHAPES), whole),  # whose limit is low
    "no bias behind an expert": (partial(expert_with, bias=False), 0, whole),
    "the plain SiLU": (partial(expert_with, alpha=1.0), 0, whole),
    "a window by places in the row": (window_by_places, 0, alone_and_packed)}


@torch.no_grad()
@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_that_others_have_made_is_seen(mistake, peers, monkeypatch):
    plant, number, compare = MISTAKES[mistake]
    theirs, folder = peers(number)
    ours = load_gpt_oss(folder)
    assert relative_error(*compare(ours, theirs)) < TOLERANCE
    plant(monkeypatch)
    assert relative_error(*compare(ours, theirs)) > 100 * TOLERANCE


@torch.no_grad()
def test_what_plants_mistakes_into_experts_plants_no_others(peers, monkeypatch):
    theirs, folder = peers(0)
    expert_with(monkeypatch)
    assert relative_error(*whole(load_gpt_oss(folder), theirs)) < TOLERANCE


def test_a_norm_in_bfloat16_rounds_once_behind_its_weight():
    modeling = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    ours, llamas, theirs = (kind(64, eps=1e-5).bfloat16() for kind in (Norm, RMSNorm, modeling.GptOssRMSNorm))
    for norm in (ours, llamas, theirs):
        fill({"norm": norm.weight})
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(ours(x), theirs(x)) and not torch.equal(llamas(x), theirs(x))


def test_an_expert_by_hand():
    """Gates far below are left as they are, those far above, and ups on both sides, are held."""
    expert = Expert(replace(TINY, hidden_size=2, intermediate_size=1, swiglu_limit=7.0))
    with torch.no_grad():
        expert.gate_up_proj.weight.copy_(torch.eye(2))
        expert.gate_up_proj.bias.zero_()
        expert.down_proj.weight.copy_(torch.tensor([[1.0], [0.0]]))
        expert.down_proj.bias.copy_(torch.tensor([0.5, 0.25]))
    rows = [(-9.0, 2.0), (9.0, 2.0), (1.0, 9.0), (1.0, -9.0), (-7.5, -9.0)]  # gate, up
    for (gate, up), y in zip(rows, expert(torch.tensor(rows)).tolist()):
        gate, up = min(gate, 7.0), max(min(up, 7.0), -7.0)
        assert y == pytest.approx([(up + 1) * gate / (1 + math.exp(-1.702 * gate)) + 0.5, 0.25], rel=1e-6)


# ----------------------------------------------------------------------------- packing

@torch.no_grad()
def test_a_packed_row_is_transformers_with_masks_of_ours_and_its_samples_alone(peers):
    theirs, folder = peers(0)
    ours, (tokens, positions, group, branch, samples) = load_gpt_oss(folder), packed_row()
    assert relative_error(*alone_and_packed(ours, theirs)) < TOLERANCE
    full = seen_by_hand(group, branch)
    near = full & (positions[:, None] - positions[None] < TINY.sliding_window)
    masks = {kind: torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
             for kind, seen in ((FULL, full), (SLIDING, near))}
    packed = theirs(tokens[None], attention_mask=masks, position_ids=positions[None]).logits[0]
    real = torch.nonzero(group >= 0)[:, 0]
    assert relative_error(ours(tokens, positions, group_masks(group, branch))[real], packed[real]) < TOLERANCE


def tiny_vlm(train="full"):
    """test_packing's with another language part, of which the window is shorter than any image and most prefixes."""
    torch.manual_seed(0)
    config = replace(TINY, vocab_size=VOCABULARY, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2)
    model = VLM(ViT(VIT), GptOss(config))
    if train == "lora":
        add_lora(model.language, ALL_LAYERS, r=2)
    return randomise(model)


@pytest.mark.parametrize("train, questions_per_image, micro_batch_tokens", [
    ("full", 0, 100_000), ("lora", 2, 150), ("full", 1, 300)])
def test_packed_loss_and_gradients_equal_samples_run_alone(
        train, questions_per_image, micro_batch_tokens, mixed, double, monkeypatch):  # noqa: F811
    """Images, several of them, words alone, conversations, and padding: all kinds of test_packing's."""
    monkeypatch.setattr(test_packing, "tiny_vlm", tiny_vlm)
    monkeypatch.setattr(gpt_oss, "PIECE", 16)
    step = mix(mixed, batch_size=len(mixed.raw), max_length=MAX_LENGTH, micro_batch_tokens=micro_batch_tokens,
               questions_per_image=questions_per_image, multiple=16).step(0)
    assert any(batch.branch.max() > 1 for batch in step.batches) == (questions_per_image != 1) and step.padded > 0
    require_alike(step, train, mixed.raw)


@pytest.mark.parametrize("sinks", [True, False])
@pytest.mark.parametrize("piece, window", [(8, 5), (8, 8), (8, 13), (64, 5), (8, 1), (8, 100)])
def test_attention_within_a_window_in_pieces_is_the_dense_one(piece, window, sinks, double, monkeypatch):  # noqa: F811
    """Groups of one sample that are cut into pieces, between others that are not."""
    monkeypatch.setattr(gpt_oss, "PIECE", piece)
    monkeypatch.setattr(kernels, "BUNDLE", 12)
    torch.manual_seed(0)
    pieces = [(0, 0, range(37)), (1, 0, range(6)), (2, 0, range(9)), (2, 1, range(9, 20)), (2, 2, range(9, 14)),
              (3, 0, range(16)), (-1, 0, range(10))]
    group, branch, positions = torch.tensor([(group, branch, position) for group, branch, some in pieces
                                             for position in some]).T
    T = len(group)
    inputs = [torch.randn(T, heads, 16, requires_grad=True) for heads in (4, 2, 2)]
    inputs += [torch.randn(4, requires_grad=True)] * sinks
    masks = near_masks(group_masks(group, branch), positions, window)
    assert sum(length for length, *_ in masks) == T and (len(masks) > 7) == (window < 37 and piece < 37)
    dense = seen_by_hand(group, branch) & (positions[:, None] - positions[None] < window)
    outputs = [attend(*inputs[:3], mask, *inputs[3:]) for mask in (masks, [(T, dense, 0)])]
    upstream = torch.randn(T, 4, 16)
    gradients = [torch.autograd.grad(y, inputs, upstream) for y in outputs]
    for ours, wanted in zip((outputs[0].detach(), *gradients[0]), (outputs[1].detach(), *gradients[1])):
        assert (ours - wanted).norm() < EXACT * (1 + wanted.norm())  # of one key no score has a gradient


def test_recomputed_blocks_have_the_same_gradients(mixed):  # noqa: F811
    results = []
    for recomputed in (0, 2):
        model = tiny_vlm()
        model.language.recomputed = recomputed
        results.append(learn(model, mix(mixed, batch_size=6, max_length=MAX_LENGTH).step(0))[1])
    for name, gradient in results[0].items():
        assert (gradient is None) == (results[1][name] is None), name
        assert gradient is None or torch.equal(gradient, results[1][name]), name


def test_experts_are_left_out_of_what_is_compiled(monkeypatch):
    asked = []
    monkeypatch.setattr(gpt_oss.Experts, "forward", lambda experts, x: asked.append(
        torch.compiler.is_compiling()) or x)
    torch._dynamo.reset()
    model = tiny_vlm().language
    kernels.compile_blocks(model.blocks, backend="eager")
    model(torch.arange(4))
    assert asked == [False] * len(model.blocks) and torch._dynamo.utils.counters["stats"]["unique_graphs"]


# ----------------------------------------------------------------------------- FlexAttention, of which a CPU has a half

@pytest.fixture
def eager_flex(monkeypatch):
    """FlexAttention as it is without torch.compile, which on a CPU has no backward pass."""
    for name in ("flex_attention", "create_block_mask"):
        monkeypatch.setattr(model_file, f"compiled_{name}", getattr(kernels, name))
    monkeypatch.setattr(gpt_oss, "compiled_create_block_mask", kernels.create_block_mask)


@torch.no_grad()
def test_flex_attention_with_sinks_and_windows_is_that_of_groups(mixed, eager_flex):  # noqa: F811
    model, step = tiny_vlm(), mix(mixed, batch_size=len(mixed.raw), max_length=MAX_LENGTH, micro_batch_tokens=300,
                                  questions_per_image=0, multiple=43).step(0)
    batch = next(tensors(batch) for batch in step.batches if batch.branch.max() > 1 and batch.group.min() < 0)
    packed = [model.language(batch.tokens, batch.positions, masks(batch.group, batch.branch))[batch.group >= 0]
              for masks in (block_mask, group_masks)]
    assert len(batch.tokens) > 2 * 128 and relative_error(*packed) < TOLERANCE


def test_sinks_by_the_log_sum_exp_have_the_gradients_of_a_key_of_nothing(double, eager_flex, monkeypatch):  # noqa: F811
    """attend's own lines, behind a FlexAttention of plain products, which can be differentiated here."""
    def flex(q, k, v, block_mask, enable_gqa, return_aux):
        at = torch.arange(q.shape[2])
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        seen = block_mask.mask_mod(at[0], at[0], at[:, None], at)
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -math.inf)
        return scores.softmax(-1) @ v, namedtuple("Aux", "lse")(scores.logsumexp(-1))

    monkeypatch.setattr(model_file, "compiled_flex_attention", flex)
    torch.manual_seed(0)
    _, positions, group, branch, _ = packed_row()
    inputs = [torch.randn(len(group), heads, 16, requires_grad=True) for heads in (4, 2, 2)]
    inputs.append(torch.randn(4, requires_grad=True))
    outputs = [attend(*inputs[:3], near_masks(masks(group, branch), positions, 8), inputs[3])
               for masks in (block_mask, group_masks)]
    upstream = torch.randn(len(group), 4, 16)
    gradients = [torch.autograd.grad(y, inputs, upstream) for y in outputs]
    for ours, wanted in zip((outputs[0].detach(), *gradients[0]), (outputs[1].detach(), *gradients[1])):
        assert relative_error(ours, wanted) < EXACT


@pytest.mark.parametrize("causal", [True, False])
def test_a_key_of_nothing_is_one_logit_more(causal, double):  # noqa: F811
    """add_sink against a softmax over the scores and the sink, whose column is dropped."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 7, 8, requires_grad=True) for heads in (4, 2, 2))
    sinks, seen = torch.randn(4, requires_grad=True), torch.ones(7, 7, dtype=torch.bool).tril()
    *padded, mask = add_sink(q, k, v, None if causal else seen, sinks)
    ours = F.scaled_dot_product_attention(*padded, attn_mask=mask, is_causal=mask is None, enable_gqa=True,
                                          scale=8 ** -0.5)[:, :, -7:, :8]
    scores = (q @ k.repeat_interleave(2, dim=1).mT * 8 ** -0.5).masked_fill(~seen, -math.inf)
    scores = torch.cat([scores, sinks[:, None, None].expand(2, 4, 7, 1)], dim=-1)
    wanted = scores.softmax(-1)[..., :-1] @ v.repeat_interleave(2, dim=1)
    upstream = torch.randn(2, 4, 7, 8)
    gradients = [torch.autograd.grad(y, (q, k, v, sinks), upstream) for y in (ours, wanted)]
    for a, b in zip((ours.detach(), *gradients[0]), (wanted.detach(), *gradients[1])):
        assert relative_error(a, b) < EXACT


# ----------------------------------------------------------------------------- the cache

LONG = [*range(100, 125)]
PROMPTS = [*GROUPS, ([], [LONG + [5, 6], LONG + [7], LONG[:20] + [8] * 9]), ([0], [[3, *LONG, -1], [3, *LONG, 9, 10]])]


@pytest.fixture(scope="module")
def answering():
    """A VLM whose window, of 6, is shorter than most prompts and many prefixes."""
    torch.manual_seed(0)
    config = replace(TINY, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2, sliding_window=6)
    return randomise(VLM(ViT(VIT), GptOss(config))).eval()


@torch.no_grad()
def test_answers_together_are_those_without_a_cache_one_at_a_time(answering):
    answers = [dict(finished_groups(generate(answering, given(PROMPTS), 8, rows=rows))) for rows in (1, 3, 64)]
    for number, (images, prompts) in enumerate(given(PROMPTS)):
        wanted = [greedy_uncached(answering, prompt, images, 8) for prompt in prompts]
        assert [[answer.tokens for answer in done[number]] for done in answers] == [wanted] * 3


@torch.no_grad()
def test_logits_out_of_the_cache_are_those_without_it(answering):
    groups = given(PROMPTS)
    cache = Cache(answering.language.config, len(groups), torch.float32, torch.device("cpu"))
    begun = [generate_file.begin_group(answering, cache, row, row, *group) for row, group in enumerate(groups)]
    run_pieces(answering, cache, [prefix for prefix, _ in begun if prefix.tokens], wanted=False)
    answers = [answer for _, some in begun for answer in some]
    logits = [extend(answering, cache, answers, 12, Sampling(stops=())) for _ in range(8)]
    prompts = [inputs_of(answering, prompt, images) for images, prompts in groups for prompt in prompts]
    for number, ((flat, encoded, image_at), answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens = torch.cat([flat, torch.tensor(answer.tokens)])
        wanted = answering.language(tokens, image_tokens=encoded, image_at=image_at)[len(flat) - 1:-1]
        assert relative_error(torch.stack(logits)[:, number], wanted) < TOLERANCE


# ----------------------------------------------------------------------------- LoRA

@pytest.mark.parametrize("targets, count", [
    ("q_proj,k_proj,v_proj,o_proj", 4 * 4), ("gate_up_proj,down_proj", 4 * 2 * 8), (ALL_LAYERS, 4 * (4 + 2 * 8))])
def test_lora_is_on_as_many_matrices_as_it_names_and_the_router_is_not_among_them(targets, count, peers):
    model = load_gpt_oss(peers(0)[1], lora={"targets": targets, "r": 2, "alpha": 4, "dropout": 0.0})
    assert len(lora_layers(model)) == count
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * count and all(".lora_" in name for name in trained)
    before = model(some_tokens()).detach()
    randomise(model)(some_tokens()).square().sum().backward()
    assert all(parameter.grad.any() for name, parameter in model.named_parameters() if ".lora_A" in name)
    assert relative_error(model(some_tokens()).detach(), before) > 0.01
    with pytest.raises(UserError, match="LoRA target 'router' names no matrix of the GptOss"):
        add_lora(model, "router")


def test_a_frozen_router_hands_gradients_on(double):  # noqa: F811
    """By what its shares of the experts change by: numeric gradients tell, and what is detached has others."""
    torch.manual_seed(0)
    experts = Experts(replace(TINY, hidden_size=6, intermediate_size=4)).requires_grad_(False)
    fill(dict(experts.named_parameters()))
    x = torch.randn(5, 6, requires_grad=True)
    assert torch.autograd.gradcheck(experts, x)
    weights, chosen = experts.router(x)
    assert weights.requires_grad and relative_error(weights.sum(-1), torch.ones(5)) < EXACT
    assert chosen.shape == (5, 4) and all(len({*row}) == 4 for row in chosen.tolist())


def test_dropout_of_experts_is_by_token_packed_recomputed_and_alone():
    """An expert's rows are some of the tokens, which have each their own keys."""
    torch.manual_seed(0)
    model = GptOss(replace(TINY, num_hidden_layers=2))
    add_lora(model, ALL_LAYERS, r=2, dropout=0.5)
    randomise(model).train()
    tokens, lengths = some_tokens(), [25, 15]
    positions = torch.cat([torch.arange(length) for length in lengths])
    keys = token_keys(torch.tensor(7, dtype=torch.int32), torch.arange(40))

    def run(wanted, keys, recomputed=0):
        model.recomputed = recomputed
        model.zero_grad()
        y = model(tokens, positions, [(length, None, 0) for length in lengths], wanted, keys=keys)
        y.square().sum().backward()
        return y.detach(), [layer.lora_A.grad.clone() for layer in lora_layers(model).values()]

    wanted = torch.tensor([3, 4, 20, 24, 30, 31, 39])
    packed, again = run(wanted, keys), run(wanted, keys, recomputed=2)
    assert torch.equal(packed[0], again[0]) and all(map(torch.equal, packed[1], again[1]))
    alone, begin = [], 0
    for length in lengths:
        own = wanted[(wanted >= begin) & (wanted < begin + length)] - begin
        alone.append(model(tokens[begin:begin + length], None, None, own, keys=keys[begin:begin + length]).detach())
        begin += length
    assert relative_error(torch.cat(alone), packed[0]) < TOLERANCE
    assert relative_error(run(wanted, keys + 1)[0], packed[0]) > 0.01


# ----------------------------------------------------------------------------- the published sizes

def test_parameters_tensors_and_bytes_of_gpt_oss_20b():
    """20,914,757,184 parameters, in 459 tensors of 13,761,264,768 bytes, as the hub's index has them."""
    with torch.device("meta"):
        model = GptOss(GptOssConfig())
    state = model.state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == 20_914_757_184
    tensors = {name: 2 * tensor.numel() for name, tensor in state.items() if ".experts." not in name}  # bfloat16
    for layer in range(model.config.num_hidden_layers):
        for name, shape in expert_shapes(model.config, packed=True).items():
            tensors[f"model.layers.{layer}.mlp.experts.{name}"] = math.prod(shape) * (1 + name.endswith("bias"))
    assert len(tensors) == 459 and sum(tensors.values()) == 13_761_264_768
    experts = sum(tensor.numel() for name, tensor in state.items() if ".experts." in name and tensor.dim() == 2)
    assert experts == 19_110_297_600 and [model.config.slides(layer) for layer in range(24)] == [True, False] * 12
