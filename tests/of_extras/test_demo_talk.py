"""
extras/share/demo_talk.py: a conversation against generate() and against attention written out, about one image and
about several; examples of a shard.
"""

import numpy as np
import pytest
import torch

from data import BOS, EOS, Record, Tokenizer, View, format_prompt
from extras.share import demo_talk
from generate import finished_groups, generate
from model import VLM, LLaMA, LlamaConfig, ViT, ViTConfig, rotary_angles, rotate
from plumbing.shards import Shard
from test_eval import TOKENIZER, write_questions
from test_harmony import write_tokenizer
from test_leaks import drawing, encoded
from test_model import randomise
from zoo.harmony import HarmonyTokenizer

SIZE, N = 32, 17  # pixels; tokens of an image
HOSTILE = "is ![this](http://192.0.2.1/x.png) <img src=http://192.0.2.1/y.png> *it*, :red[or] $x^2$?"
LONG = "where is the lesion, and on which side of the body?"
QUESTIONS = ["what is this?", "is it large?", LONG, "why?", HOSTILE]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(TOKENIZER)
    return Tokenizer(path)


@pytest.fixture(scope="module")
def model(tokenizer):
    """Random, with two heads of queries to one of keys, and answers of different lengths."""
    torch.manual_seed(0)
    language = LlamaConfig(tokenizer.vocab_size, hidden_size=32, intermediate_size=48,
                           num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    model = VLM(ViT(ViTConfig(SIZE, patch_size=8, width=64, depth=2)), LLaMA(language))
    randomise(model)
    with torch.no_grad():
        model.language.lm_head.weight[EOS] *= 1.5  # so that most answers end
    return model.eval()


def some_image(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def generated(model, tokenizer, image, questions, longest=32):
    """generate()'s answers, {question: token ids}."""
    prompts = [[BOS, -1, *tokenizer.encode(format_prompt(question))] for question in questions]
    [(_, answers)] = finished_groups(generate(model, [([image], prompts)], longest))
    return {question: answer.tokens for question, answer in zip(questions, answers, strict=True)}


def ids(tokens):
    return [token.id for token in tokens if token.id != EOS]


# ----------------------------------------------------------------------------- the conversation

@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 2, 2, 0, 3, 1, 0], [*range(5)] * 7])
def test_answers_are_those_of_generate_in_any_order(order, model, tokenizer, monkeypatch):
    expected = generated(model, tokenizer, some_image(), QUESTIONS)
    lengths = {len(answer) for answer in expected.values()}
    assert len(lengths) > 1 and min(lengths) > 0 and max(lengths) == demo_talk.MAX_NEW_TOKENS
    seen, encode = [], VLM.encode_images
    monkeypatch.setattr(VLM, "encode_images", lambda *arguments: seen.append(1) or encode(*arguments))
    conversation = demo_talk.Conversation(model, tokenizer, [some_image()], torch.float32)
    for number in order:
        tokens = list(conversation.ask(QUESTIONS[number]))
        assert ids(tokens) == expected[QUESTIONS[number]]
        assert tokens[-1].id == EOS or len(tokens) == demo_talk.MAX_NEW_TOKENS
    assert len(seen) == -(-len(order) // 32)  # once for all questions, up to 32


def test_a_question_that_is_left_halfway_or_failed_disturbs_no_other(model, tokenizer, monkeypatch):
    expected = generated(model, tokenizer, some_image(), QUESTIONS)
    conversation = demo_talk.Conversation(model, tokenizer, [some_image()], torch.float32)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(VLM, "encode_images", lambda *arguments: (_ for _ in ()).throw(MemoryError()))
        next(conversation.ask(QUESTIONS[0]))
    for question in QUESTIONS:
        left = conversation.ask(QUESTIONS[2])
        next(left), left.close()
        assert ids(conversation.ask(question)) == expected[question]


def test_conversations_in_turns_do_not_disturb_one_another(model, tokenizer):
    images = [some_image(0), some_image(1)]
    expected = [generated(model, tokenizer, image, QUESTIONS) for image in images]
    both = [demo_talk.Conversation(model, tokenizer, [image], torch.float32) for image in images]
    for question in QUESTIONS:
        answers = [[], []]
        asking = [one.ask(question) for one in both]
        while asking[0] or asking[1]:
            for which in (0, 1):
                token = next(asking[which], None) if asking[which] else None
                if token is None:
                    asking[which] = None
                else:
                    answers[which].append(token)
        assert [ids(tokens) for tokens in answers] == [one[question] for one in expected]
    assert expected[0] != expected[1]


@torch.no_grad()
def dense(model, images, tokens):
    """
    (V,) logits of the last of all tokens, image number k as -1 - k; (layers, nh, T) its attention; (T,) where images
    stand. Nothing is cached.
    """
    language, config = model.language, model.language.config
    flat = [token for one in tokens for token in ([0] * N if one < 0 else [one])]
    where = np.repeat(np.array(tokens) < 0, [N if one < 0 else 1 for one in tokens])
    x = language.embed(torch.tensor(flat))
    x[torch.from_numpy(where)] = model.encode_images([torch.from_numpy(image) for image in images])
    T = len(x)
    cos, sin = rotary_angles(torch.arange(T), config.head_size, config.rope_theta)
    weights = []
    for block in language.model.layers:
        attention, h = block.self_attn, block.input_layernorm(x)
        q, k, v = (proj(h).view(T, -1, config.head_size) for proj in  # (T, nh or nkv, hs)
                   (attention.q_proj, attention.k_proj, attention.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        heads = []
        for head in range(config.num_attention_heads):
            of = head // (config.num_attention_heads // config.num_key_value_heads)
            scores = (q[:, head] @ k[:, of].T / config.head_size ** 0.5).masked_fill(
                torch.ones(T, T).triu(1).bool(), -torch.inf)
            heads.append((scores.softmax(-1), v[:, of]))
        weights.append(torch.stack([weight[-1] for weight, _ in heads]))
        x = x + attention.o_proj(torch.cat([weight @ value for weight, value in heads], dim=-1))
        x = x + block.mlp(block.post_attention_layernorm(x))
    return language.lm_head(language.model.norm(x))[-1], torch.stack(weights), where


def test_long_questions_start_another_cache_and_are_answered_the_same(model, tokenizer, monkeypatch):
    long = [f"{number} " + "is the lesion there? " * 30 for number in range(3)]
    expected = generated(model, tokenizer, some_image(), long)
    seen, encode = [], VLM.encode_images
    monkeypatch.setattr(VLM, "encode_images", lambda *arguments: seen.append(1) or encode(*arguments))
    monkeypatch.setattr(demo_talk, "MAX_CACHED", 600)
    monkeypatch.setattr(demo_talk, "MAX_BOX_TOKENS", demo_talk.MAX_NEW_TOKENS)
    conversation = demo_talk.Conversation(model, tokenizer, [some_image()], torch.float32)
    assert 200 < len(tokenizer.encode(long[0])) < 250
    lengths = []
    for number in (0, 1, 2, 0):
        tokens = list(conversation.ask(long[number]))
        assert ids(tokens) == expected[long[number]]
        lengths.append(len(demo_talk.write_prompt(tokenizer, long[number])[1]) + len(tokens))
    assert len(seen) == 2 and conversation.cached == sum(lengths[2:])


def test_an_answer_that_writes_boxes_goes_on_where_others_are_cut(model, tokenizer, monkeypatch):
    expected = generated(model, tokenizer, some_image(), QUESTIONS, 24)
    assert max(map(len, expected.values())) == 24
    monkeypatch.setattr(demo_talk, "MAX_NEW_TOKENS", 12)
    monkeypatch.setattr(demo_talk, "MAX_BOX_TOKENS", 24)
    for writes in (True, False):
        monkeypatch.setattr(demo_talk, "writes_boxes", lambda text: writes)
        conversation = demo_talk.Conversation(model, tokenizer, [some_image()], torch.float32)
        for question in QUESTIONS:
            assert ids(conversation.ask(question)) == expected[question][:24 if writes else 12]


@pytest.mark.parametrize("roles", [[""], ["prior", "now"], ["", "", "a lateral view"]])
def test_probabilities_and_attention_are_those_of_a_dense_recomputation(roles, model, tokenizer):
    images = [some_image(seed) for seed in range(len(roles))]
    conversation = demo_talk.Conversation(model, tokenizer, images, torch.float32, roles)
    for question in QUESTIONS[:3 if roles == [""] else 1]:
        written = [tokenizer.encode(f"{role}:") if role else [] for role in roles]
        before = [BOS, *(token for number, role in enumerate(written) for token in [*role, -1 - number]),
                  *tokenizer.encode(format_prompt(question))]
        shares = []
        for token in conversation.ask(question):
            logits, weights, where = dense(model, images, before)
            assert np.abs(token.looked - weights.mean((0, 1))[where].numpy()).max() < 1e-5
            best, likely = logits.softmax(0).topk(1 + demo_talk.RUNNERS_UP)
            assert [token.id, *(other for other, _ in token.runners_up)] == likely.tolist()
            assert [token.probability, *(share for _, share in token.runners_up)] == pytest.approx(
                best.tolist(), abs=1e-5)
            before.append(token.id)
            shares.append(token.looked)
        assert np.ptp(shares, axis=0).max() > 1e-3 and np.ptp(shares[0]) > 1e-3  # none is flat
        parts = conversation.parted(shares[0])
        assert [len(part) for part in parts] == [N] * len(roles) and (np.concatenate(parts) == shares[0]).all()


# ----------------------------------------------------------------------------- several images

def test_answers_about_several_images_are_those_of_generate(model, tokenizer, monkeypatch):
    images, roles = [some_image(seed) for seed in range(3)], ["prior", "", "now"]
    prompts = [tokenizer.write(Record("", question, parts=tuple(View(b"", role=role) for role in roles)))
               for question in QUESTIONS]
    prompts = [tokens[:spans[0][0]] for tokens, spans, _ in prompts]
    [(_, expected)] = finished_groups(generate(model, [(images, prompts)]))
    seen, encode = [], VLM.encode_images
    monkeypatch.setattr(VLM, "encode_images", lambda *arguments: seen.append(1) or encode(*arguments))
    conversation = demo_talk.Conversation(model, tokenizer, images, torch.float32, roles)
    for question, answer in zip(QUESTIONS, expected):
        assert ids(conversation.ask(question)) == answer.tokens
    assert len(seen) == 1
    others = [demo_talk.Conversation(model, tokenizer, *other) for other in (
        (images[::-1], torch.float32, roles), (images, torch.float32), (images[:1], torch.float32))]
    answers = [[ids(one.ask(question)) for question in QUESTIONS] for one in (conversation, *others)]
    assert all(one != other for number, one in enumerate(answers) for other in answers[:number])  # all of it counts


def test_what_was_forgotten_is_made_anew_and_answers_stay(model, tokenizer):
    conversation = demo_talk.Conversation(model, tokenizer, [some_image(), some_image(1)], torch.float32)
    assert conversation.cached_bytes() == 0
    before = [ids(conversation.ask(question)) for question in QUESTIONS]
    layers, heads, slots, size = 3, 2, conversation.cache.branch.shape[1], 8
    assert conversation.cached_bytes() == 2 * layers * heads * slots * size * 4
    conversation.forget()
    assert conversation.cached_bytes() == 0
    assert [ids(conversation.ask(question)) for question in QUESTIONS] == before


def test_an_answer_ends_with_its_time(monkeypatch):
    clock = iter([0.0, 1.0, 2.0, 3.5, 9.0])
    monkeypatch.setattr(demo_talk.time, "monotonic", lambda: next(clock))
    assert list(demo_talk.within("abcdef", 3)) == ["a", "b", "c"]
    monkeypatch.setattr(demo_talk.time, "monotonic", lambda: 0.0)
    assert list(demo_talk.within("abc", 3)) == ["a", "b", "c"]


def test_examples_are_records_of_one_turn_with_all_of_their_images(tmp_path):
    films = [encoded(drawing(seed)) for seed in range(3)]
    views = (View(films[0], "a.png", "prior"), View(films[1], "b.png", "now"))
    write_questions(tmp_path, "scans", {"test": [
        Record("1", "what is it?", "a lung", films[2], "c.png"), Record("2", "is it?", "yes", parts=views),
        Record("3", "why?", "no", parts=views), Record("4", "why?", "so", parts=("A film.", *views)),
        Record("5", "why?", "so", films[2], "c.png", context="A film."), Record("6", "why?", "so"),
        Record("7", "why?", "so", films[2], "c.png", turns=(("who?", "he"),))]})
    shard = Shard(tmp_path / "scans" / "test")
    examples, questions = demo_talk.find_examples([shard])
    assert [(name, roles, asked) for name, _, roles, asked in examples] == [
        ("scans/test, image 1", [""], {"what is it?": "a lung"}),
        ("scans/test, images 2 and 3", ["prior", "now"], {"is it?": "yes", "why?": "no"})]
    assert all((image == shard.read_image(number)).all() for number, image in enumerate(
        [image for _, images, *_ in examples for image in images]))
    assert questions == ["what is it?", "is it?", "why?"]


def test_words_join_to_the_answer_and_their_tokens_count(model, tokenizer):
    for seed in range(8):
        conversation = demo_talk.Conversation(model, tokenizer, [some_image(seed)], torch.float32)
        tokens = list(conversation.ask("what is this?"))
        words = demo_talk.words_of(tokens, tokenizer)
        assert " ".join(word.text for word in words).split() == tokenizer.decode(ids(tokens)).split()
    space, e, s = (tokenizer.model.piece_to_id(piece) for piece in ("\u2581", "e", "s"))
    tokens = [demo_talk.Token(number, share, [], np.full(N, share)) for number, share in
              zip([space, e, s, space, e, EOS], (0.5, 0.5, 0.8, 0.9, 0.4, 0.1))]
    words = demo_talk.words_of(tokens, tokenizer)
    assert [word.text for word in words] == ["es", "e"]
    assert [word.probability for word in words] == pytest.approx([0.2, 0.36])
    assert [word.looked[0] for word in words] == pytest.approx([0.6, 0.65])
    assert demo_talk.words_of([demo_talk.Token(EOS, 1.0, [], np.ones(N))], tokenizer) == []


@pytest.mark.parametrize("said, texts", [
    ("<|channel|>final<|message|>a lung<|return|>", ["a", "lung"]), ("a lung", ["a", "lung"]),
    ("<|channel|>analysis<|message|>it is large<|end|><|start|>assistant<|channel|>final<|message|>a lung",
     ["a", "lung"]),
    ("<|channel|>analysis<|message|>it is large", []), ("<|channel|>final", [])])
def test_what_a_gpt_oss_thinks_is_no_word_of_its_answer(said, texts, tmp_path):
    harmony = HarmonyTokenizer(write_tokenizer(tmp_path / "tokenizer.json"))
    harmony.model.encode_special_tokens = False
    tokens = [demo_talk.Token(number, 0.5, [], np.ones(N)) for number in harmony.encode(said)]
    words = demo_talk.words_of(tokens, harmony)
    assert " ".join(word.text for word in words).split() == texts
    assert demo_talk.text_of(tokens, harmony) == " ".join(texts)
