"""Answers are those of uncached generation, one at a time; the cache; ask()."""

import io
import weakref
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

import generate as generate_file
from data import BOS, EOS, write_plain
from generate import Cache, Sampling, ask, extend, finished_groups, generate, run_pieces
from model import normalise
from plumbing.flags import UserError
from test_model import LLAMA, TOLERANCE, V, relative_error, tiny_vlm
from weights import save_vlm

IMAGE = -1  # the first image of a group, in a prompt
GROUPS = [  # images, prompts about them
    ([0], [[BOS, IMAGE, 5, 6, 7, 8, 9, 10, 11], [BOS, IMAGE, 60, 61, 62, 63, 64]]), ([1], [[BOS, IMAGE, 40]]),
    ([], [[BOS, 50, 51, 52]]), ([], [[BOS, 70, 71], [BOS, 72]]),
    ([1, 2, 0], [[BOS, 20, -1, 21, -2, 22, -3, 30, 31], [BOS, 20, -1, 21, -2, 22, -3, 32]]),  # words between them
    ([0, 1], [[BOS, -1, 33], [BOS, -2, -1, 33]]),  # not of one beginning
    ([2], [[BOS, IMAGE, 80, 81]] * 3), ([0], [[BOS, 90, IMAGE]]), ([3], [[BOS, IMAGE, 34]])]


def some_images(count=4):
    """(H, W, 3) uint8 images; the last is none of the size that the ViT's positions are for."""
    generator = np.random.default_rng(2)
    return [generator.integers(0, 256, (24 if number == 3 else 16, 16, 3), np.uint8) for number in range(count)]


@torch.no_grad()
def inputs_of(model, tokens, images):
    """(T,) tokens, (N, C) image tokens and (N,) where they go, written out."""
    flat, encoded, image_at = [], [], []
    for token in tokens:
        if token >= 0:
            flat.append(token)
            continue
        encoded.append(model.projector(model.vision(normalise(torch.from_numpy(images[-1 - token])[None]))[0]))
        image_at += range(len(flat), len(flat) + len(encoded[-1]))
        flat += [0] * len(encoded[-1])
    return torch.tensor(flat), torch.cat(encoded) if encoded else None, torch.tensor(image_at, dtype=torch.long)


@torch.no_grad()
def logits_alone(model, tokens, images):
    """(V,) logits behind a prompt, without a cache."""
    flat, encoded, image_at = inputs_of(model, tokens, images)
    return model.language(flat, image_tokens=encoded, image_at=image_at)[-1]


@torch.no_grad()
def greedy_uncached(model, prompt, images, max_new_tokens):
    flat, encoded, image_at = inputs_of(model, prompt, images)
    answer = []
    while len(answer) < max_new_tokens:
        tokens = torch.cat([flat, torch.tensor(answer, dtype=torch.long)])
        token = model.language(tokens, image_tokens=encoded, image_at=image_at)[-1].argmax().item()
        if token == EOS:
            break
        answer.append(token)
    return answer


def given(groups):
    images = some_images()
    return [([images[number] for number in numbers], prompts) for numbers, prompts in groups]


def answer_all(model, groups, *settings, **more):
    """The Answers to each group, in the order of the groups."""
    answers = dict(finished_groups(generate(model, given(groups), *settings, **more)))
    assert sorted(answers) == list(range(len(groups)))
    return [answers[number] for number in range(len(groups))]


def tokens_of(answers):
    return [[answer.tokens for answer in some] for some in answers]


@pytest.fixture(scope="module")
def vlm():
    """A VLM that ends its answer to the first prompt early, while others go on."""
    model = tiny_vlm()
    answers = sum(tokens_of(answer_all(model, GROUPS, 12)), [])
    eos = max((t for t in answers[0][1:] if any(t not in answer for answer in answers)),
              key=lambda token: sum(token in answer for answer in answers))
    with torch.no_grad():
        model.language.lm_head.weight[[EOS, eos]] = model.language.lm_head.weight[[eos, EOS]]
    return model.eval()


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_generation_together_equals_uncached_generation_one_at_a_time(rows, vlm):
    answers = tokens_of(answer_all(vlm, GROUPS, 12, rows=rows))
    assert 0 < len(answers[0][0]) < max(map(len, sum(answers, []))) == 12  # some stop, some do not
    for (images, prompts), replies in zip(given(GROUPS), answers):
        assert replies == [greedy_uncached(vlm, prompt, images, 12) for prompt in prompts]
    assert tokens_of(answer_all(vlm, [([1], GROUPS[0][1])], 12)) != answers[:1]  # images matter
    numbers, prompts = GROUPS[4]
    assert tokens_of(answer_all(vlm, [(numbers[::-1], prompts)], 12)) != answers[4:5]  # and their order


def test_log_probabilities_are_those_of_each_token_alone(vlm):
    for (images, prompts), answers in zip(given(GROUPS), answer_all(vlm, GROUPS, 12)):
        for prompt, answer in zip(prompts, answers):
            stopped = len(answer.tokens) < 12
            assert len(answer.log_probabilities) == len(answer.tokens) + stopped
            chosen = answer.tokens + [EOS] * stopped
            for place, (token, value) in enumerate(zip(chosen, answer.log_probabilities)):
                alone = F.log_softmax(logits_alone(vlm, prompt + chosen[:place], images).double(), -1)[token]
                assert value == pytest.approx(alone.item(), abs=1e-4)


def test_tokens_come_as_they_are_made(vlm):
    """Each pass gives one token to those that it yields; who ends it early has those that came till then."""
    whole, length, passes = tokens_of(answer_all(vlm, GROUPS, 12)), Counter(), 0
    for answers in generate(vlm, given(GROUPS), 12):
        passes += 1
        for answer in answers:
            key = answer.group, answer.prompt
            length[key] += 1
            wanted = whole[answer.group][answer.prompt]
            assert len(answer.log_probabilities) == length[key] and answer.tokens == wanted[:length[key]]
            assert answer.done == (length[key] == min(len(wanted) + 1, 12))
        if passes == 12:
            break
    assert len(length) == sum(len(prompts) for _, prompts in GROUPS)
    assert 1 < max(length.values()) < 12


def test_what_stops_an_answer_is_one_s_own(vlm):
    plain = tokens_of(answer_all(vlm, GROUPS, 12))
    stop = plain[1][0][2]
    stopped = tokens_of(answer_all(vlm, GROUPS, 12, Sampling(stops=(EOS, stop))))
    for before, after in zip(sum(plain, []), sum(stopped, [])):
        assert after == (before[:before.index(stop)] if stop in before else before)


def test_groups_are_taken_in_as_others_are_finished(vlm):
    """Sixty groups of one to five questions through eight rows: lazily, and none changes another."""
    generator, images = np.random.default_rng(0), some_images()
    groups, taken, order = [], [], []
    for _ in range(60):
        image = int(generator.integers(-1, 2))
        prefix = [BOS, IMAGE] if image >= 0 else [BOS]
        prompts = [prefix + generator.integers(5, V, generator.integers(1, 9)).tolist()
                   for _ in range(generator.integers(1, 6))]
        groups.append(([images[image]] if image >= 0 else [], prompts))

    def ask_all():
        for number, group in enumerate(groups):
            taken.append(number)
            yield group

    for number, answers in finished_groups(generate(vlm, ask_all(), 6, rows=8)):
        order.append(number)
        assert len(taken) <= len(order) + 8  # under way or finished
        shown, prompts = groups[number]
        for answer, prompt in zip(answers, prompts, strict=True):
            assert answer.tokens == greedy_uncached(vlm, prompt, shown, 6)
    assert sorted(order) == list(range(60)) != order


def test_a_prefix_is_run_once_and_what_is_shared_is_all_but_the_last_token(vlm, monkeypatch):
    """A prompt asked G times, as for samples of which the best is rewarded, is encoded once."""
    passes, images_shown, whole = [], [], vlm.encode_images

    def watched(model, cache, pieces, wanted=True):
        passes.append([len(piece.tokens) for piece in pieces])
        return run_pieces(model, cache, pieces, wanted)

    monkeypatch.setattr(generate_file, "run_pieces", watched)
    monkeypatch.setattr(vlm, "encode_images", lambda images: images_shown.append(len(images)) or whole(images))
    list(generate(vlm, given([([0], [[BOS, IMAGE, 80, 81, 82]] * 5)]), 3, Sampling(stops=())))
    assert passes == [[4], [1] * 5, [1] * 5, [1] * 5] and images_shown == [1]


def test_greedy_generation_equals_that_of_transformers(vlm, tmp_path):
    save_vlm(vlm, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "language").eval()
    for (images, prompts), answers in zip(given(GROUPS), tokens_of(answer_all(vlm, GROUPS, 12))):
        for prompt, answer in zip(prompts, answers):
            with torch.no_grad():
                x = vlm.language.embed(*inputs_of(vlm, prompt, images))[None]
            wanted = theirs.generate(inputs_embeds=x, attention_mask=torch.ones(x.shape[:2]).long(),
                                     do_sample=False, max_new_tokens=12, pad_token_id=0)[0].tolist()
            assert answer == (wanted[:wanted.index(EOS)] if EOS in wanted else wanted)


def test_sampling_follows_torch_s_seed_and_the_temperature(vlm):
    def sample(seed, temperature):
        torch.manual_seed(seed)
        return tokens_of(answer_all(vlm, GROUPS, 12, Sampling(temperature)))

    assert sample(0, 0.5) == sample(0, 0.5) != sample(1, 0.5)
    assert sample(0, 1e-5) == sample(0, 0.0) != sample(0, 0.5)


def test_sampled_frequencies_follow_the_softmax():
    model, rows = tiny_vlm(), 20_000
    torch.manual_seed(0)
    answers = answer_all(model, [([], [[BOS, 5, 6]] * 50)] * (rows // 50), 1, Sampling(1.5))
    counts = torch.bincount(torch.tensor([(row or [EOS])[0] for row in sum(tokens_of(answers), [])]), minlength=V)
    expected = F.softmax(logits_alone(model, [BOS, 5, 6], []) / 1.5, -1) * rows
    chi_square = ((counts - expected)[expected > 5] ** 2 / expected[expected > 5]).sum().item()
    freedom = (expected > 5).sum().item()
    assert freedom > 100
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (20, 0.8), (5, 1.0), (0, 0.3), (1, 0.5), (0, 0.0), (3, 0.9)])
def test_tokens_are_sampled_from_those_that_transformers_leaves(top_k, top_p):
    torch.manual_seed(0)
    logits, temperature = 3 * torch.randn(4, V), 0.7
    scores = logits / temperature
    if top_k:
        scores = transformers.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = transformers.TopPLogitsWarper(top_p)(None, scores)
    wanted, rows = scores.softmax(-1), 4000
    chosen = Sampling(temperature, top_k, top_p).choose(logits.repeat_interleave(rows, 0)).view(4, rows)
    for row in range(4):
        share = torch.bincount(chosen[row], minlength=V) / rows
        assert (share[wanted[row] == 0] == 0).all()
        assert (share - wanted[row]).abs().max() < 5 * (0.25 / rows) ** 0.5


def test_ids_that_no_tokenizer_has_are_never_chosen(vlm):
    for temperature in (0.0, 50.0):
        tokens = tokens_of(answer_all(vlm, GROUPS, 12, Sampling(temperature, stops=(), vocab_size=7)))
        assert max(sum(sum(tokens, []), [])) < 7


# ----------------------------------------------------------------------------- the cache

@torch.no_grad()
def test_logits_out_of_the_cache_are_those_without_it(vlm):
    """As extend() gives them to whoever builds on it, such as the demo."""
    cache = Cache(LLAMA, 3, torch.float32, torch.device("cpu"))
    groups = given(GROUPS[:3])
    begun = [generate_file.begin_group(vlm, cache, row, row, *group) for row, group in enumerate(groups)]
    run_pieces(vlm, cache, [prefix for prefix, _ in begun if prefix.tokens], wanted=False)
    answers = [answer for _, some in begun for answer in some]
    prompts = [(prompt, images) for images, prompts in groups for prompt in prompts]
    for _ in range(5):
        wanted = [logits_alone(vlm, prompt + answer.tokens, images)
                  for (prompt, images), answer in zip(prompts, answers)]
        logits = extend(vlm, cache, answers, 12, Sampling(stops=()))
        assert relative_error(logits, torch.stack(wanted)) < TOLERANCE


def test_the_cache_grows_one_tensor_at_a_time(monkeypatch):
    """While a layer's keys are copied into more slots, no other tensor of the cache is there twice."""
    config = replace(LLAMA, num_hidden_layers=6)
    cache, grown, pad = Cache(config, 4, torch.float32, torch.device("cpu")), [], F.pad

    def watched(tensor, *arguments):
        if tensor.dim() == 4:  # of a layer
            grown.append([other.shape[2] for layer in cache.layers for other in layer])
        return pad(tensor, *arguments)

    monkeypatch.setattr(generate_file.F, "pad", watched)
    for _ in range(3):
        cache.place(np.zeros(70, np.int64), np.zeros(70, np.int64), np.arange(70))
        before = [weakref.ref(tensor) for layer in cache.layers for tensor in layer]
        assert len({layer[0].shape[2] for layer in cache.layers}) == 1  # place() has grown none
        for layer in range(6):
            alive = sum(reference() is not None for reference in before)
            assert alive == 12 - 2 * layer
            k, v = (cache.store(layer, kind, torch.ones(70, 2, 8)) for kind in (0, 1))
            assert k.shape == v.shape and k[0, :, :cache.used[0]].eq(1).all()
    assert len(grown) == 3 * 12


# ----------------------------------------------------------------------------- ask

def test_ask_gives_the_answer_to_one_question_as_text(vlm, tmp_path):
    def encode(text):
        return [50 + len(word) for word in text.split()]

    words = SimpleNamespace(write=lambda record: write_plain(record, encode), stops=(EOS,), vocab_size=V,
                            decode=lambda tokens: " ".join(map(str, tokens)))
    image, stream = some_images()[0], io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    (tmp_path / "a.png").write_bytes(stream.getvalue())
    prompt = [59, 54, 54, 57]  # Question: what here? Answer:
    for path, tokens, images in ((tmp_path / "a.png", [BOS, IMAGE, *prompt], [image]), ("", [BOS, *prompt], [])):
        wanted = greedy_uncached(vlm, tokens, images, 5)
        assert ask(vlm, words, "what were", path, size=16, max_new_tokens=5) == " ".join(map(str, wanted))
    (tmp_path / "a.png").write_bytes(stream.getvalue()[:60])
    with pytest.raises(UserError, match="a.png: not an image that can be read"):
        ask(vlm, words, "what were", tmp_path / "a.png", size=16)
