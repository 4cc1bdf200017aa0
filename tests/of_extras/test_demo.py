"""
extras/share/demo.py: its conversation against generate() and against attention written out; its page in a
browser, without which those tests are skipped.

The server of the page may write 1,000 bytes to a file, which no image has, and its home stays empty.
"""

import io
import multiprocessing
import os
import re
import resource
import socket
import struct
import subprocess
import sys
import time
import urllib.request
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data import BOS, EOS, Tokenizer, format_prompt
from extras.share import demo
from generate import finished_groups, generate
from model import VLM, LLaMA, LlamaConfig, ViT, ViTConfig, normalise, rotary_angles, rotate
from plumbing.files import sealed
from plumbing.flags import UserError, parse_command_line
from plumbing.flags import run as run_script
from plumbing.pixels import resize_image
from plumbing.shards import Shard
from test_browse import chromium  # noqa: F401, the fixture
from test_eval import TOKENIZER, write_questions
from test_model import randomise
from weights import load_classifier, save_classifier, save_vlm
from zoo.classifier import Classifier

ROOT = Path(__file__).resolve().parent.parent.parent
SIZE, N = 32, 17  # pixels; tokens of an image
CLASSES = ["no *cyst*", "<b>cyst</b>", "a_cyst_"]
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
    assert len(lengths) > 1 and min(lengths) > 0 and max(lengths) == demo.MAX_NEW_TOKENS
    seen, encode = [], VLM.encode_images
    monkeypatch.setattr(VLM, "encode_images", lambda *arguments: seen.append(1) or encode(*arguments))
    conversation = demo.Conversation(model, tokenizer, some_image(), torch.float32)
    for number in order:
        tokens = list(conversation.ask(QUESTIONS[number]))
        assert ids(tokens) == expected[QUESTIONS[number]]
        assert tokens[-1].id == EOS or len(tokens) == demo.MAX_NEW_TOKENS
    assert len(seen) == -(-len(order) // 32)  # once for all questions, up to 32


def test_a_question_that_is_left_halfway_or_failed_disturbs_no_other(model, tokenizer, monkeypatch):
    expected = generated(model, tokenizer, some_image(), QUESTIONS)
    conversation = demo.Conversation(model, tokenizer, some_image(), torch.float32)
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
    both = [demo.Conversation(model, tokenizer, image, torch.float32) for image in images]
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
def dense(model, image, tokens):
    """(V,) logits of the last of all tokens, (layers, nh, T) its attention; nothing is cached."""
    language, config = model.language, model.language.config
    x = language.embed(torch.tensor([BOS] + [0] * N + tokens))
    x[1:1 + N] = model.encode_images([torch.from_numpy(image)])
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
    return language.lm_head(language.model.norm(x))[-1], torch.stack(weights)


def test_long_questions_start_another_cache_and_are_answered_the_same(model, tokenizer, monkeypatch):
    long = [f"{number} " + "is the lesion there? " * 30 for number in range(3)]
    expected = generated(model, tokenizer, some_image(), long)
    seen, encode = [], VLM.encode_images
    monkeypatch.setattr(VLM, "encode_images", lambda *arguments: seen.append(1) or encode(*arguments))
    monkeypatch.setattr(demo, "MAX_CACHED", 600)
    monkeypatch.setattr(demo, "MAX_BOX_TOKENS", demo.MAX_NEW_TOKENS)
    conversation = demo.Conversation(model, tokenizer, some_image(), torch.float32)
    assert 200 < len(tokenizer.encode(long[0])) < 250
    lengths = []
    for number in (0, 1, 2, 0):
        tokens = list(conversation.ask(long[number]))
        assert ids(tokens) == expected[long[number]]
        lengths.append(len(demo.write_prompt(tokenizer, long[number])[1]) + len(tokens))
    assert len(seen) == 2 and conversation.cached == sum(lengths[2:])


def test_an_answer_that_writes_boxes_goes_on_where_others_are_cut(model, tokenizer, monkeypatch):
    expected = generated(model, tokenizer, some_image(), QUESTIONS, 24)
    assert max(map(len, expected.values())) == 24
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", 12)
    monkeypatch.setattr(demo, "MAX_BOX_TOKENS", 24)
    for writes in (True, False):
        monkeypatch.setattr(demo, "writes_boxes", lambda text: writes)
        conversation = demo.Conversation(model, tokenizer, some_image(), torch.float32)
        for question in QUESTIONS:
            assert ids(conversation.ask(question)) == expected[question][:24 if writes else 12]


def test_probabilities_and_attention_are_those_of_a_dense_recomputation(model, tokenizer):
    conversation = demo.Conversation(model, tokenizer, some_image(), torch.float32)
    for question in QUESTIONS[:3]:
        before = tokenizer.encode(format_prompt(question))
        shares = []
        for token in conversation.ask(question):
            logits, weights = dense(model, some_image(), before)
            assert np.abs(token.looked - weights.mean((0, 1))[1:1 + N].numpy()).max() < 1e-5
            best, likely = logits.softmax(0).topk(1 + demo.RUNNERS_UP)
            assert [token.id, *(other for other, _ in token.runners_up)] == likely.tolist()
            assert [token.probability, *(share for _, share in token.runners_up)] == pytest.approx(
                best.tolist(), abs=1e-5)
            before.append(token.id)
            shares.append(token.looked)
        assert np.ptp(shares, axis=0).max() > 1e-3 and np.ptp(shares[0]) > 1e-3  # none is flat


def test_words_join_to_the_answer_and_their_tokens_count(model, tokenizer):
    for seed in range(8):
        conversation = demo.Conversation(model, tokenizer, some_image(seed), torch.float32)
        tokens = list(conversation.ask("what is this?"))
        words = demo.words_of(tokens, tokenizer)
        assert " ".join(word.text for word in words).split() == tokenizer.decode(ids(tokens)).split()
    space, e, s = (tokenizer.model.piece_to_id(piece) for piece in ("\u2581", "e", "s"))
    tokens = [demo.Token(number, share, [], np.full(N, share)) for number, share in
              zip([space, e, s, space, e, EOS], (0.5, 0.5, 0.8, 0.9, 0.4, 0.1))]
    words = demo.words_of(tokens, tokenizer)
    assert [word.text for word in words] == ["es", "e"]
    assert [word.probability for word in words] == pytest.approx([0.2, 0.36])
    assert [word.looked[0] for word in words] == pytest.approx([0.6, 0.65])
    assert demo.words_of([demo.Token(EOS, 1.0, [], np.ones(N))], tokenizer) == []


def test_the_map_colours_what_was_looked_at():
    image = np.full((SIZE, SIZE, 3), (30, 60, 90), np.uint8)
    grey = np.array(Image.fromarray(image).convert("RGB").convert("L"))[0, 0]
    looked = np.full(N, 0.01, np.float32)
    looked[[0, 1 + 6, 1 + 15]] = 0.9, 0.03, 0.02  # class token; row 1, column 2; row 3, column 3
    drawn = demo.heat_map(image, looked).astype(int)
    strong, half = (grey * (1 - share) + np.array(demo.HEAT) * share for share in (0.75, 0.375))
    assert np.abs(drawn[8:16, 16:24] - strong).max() <= 1 and np.abs(drawn[24:, 24:] - half).max() <= 1
    drawn[8:16, 16:24] = drawn[24:, 24:] = grey
    assert (drawn == grey).all()
    assert (demo.heat_map(image, np.ones(N, np.float32)) == grey).all()


@pytest.mark.parametrize("height, width, rows, columns", [(224, 224, 14, 14), (448, 448, 14, 14), (96, 224, 3, 7)])
def test_patches_lie_where_they_are_in_any_shape_with_and_without_a_class_token(height, width, rows, columns):
    image, looked = np.zeros((height, width, 3), np.uint8), np.arange(rows * columns)
    for tokens in (looked, [1000, *looked]):
        assert (demo.patches_of(image, np.array(tokens)) == looked.reshape(rows, columns)).all()


# ----------------------------------------------------------------------------- boxes

PAIRS = {"cyst": (np.array([[100, 200, 300, 400]]), np.array([[0, 0, 1000, 1000]])),
         "<b>x</b>": (np.array([[600, 50, 900, 1e300], [500, 500, 400, 600]]), np.zeros((0, 4)))}


@pytest.mark.parametrize("width, height", [(400, 200), (200, 400), (300, 300)])
@pytest.mark.parametrize("how, size", [("squash", 128), ("crop", 128), ("pad", 128), ("fit", 128), ("smart", 1 << 17)])
def test_boxes_lie_on_what_the_model_sees_of_the_whole_image(how, size, width, height):
    """A box of thousandths of the whole image, and the same rectangle painted on it and seen as the model sees it."""
    box = np.array([400, 300, 600, 550])
    image = Image.new("RGB", (width, height))
    image.paste((255, 255, 255), tuple(np.round(box * [width, height, width, height] / 1000).astype(int)))
    seen = np.asarray(resize_image(image, size, how))[..., 0] > 127
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    [*found] = re.findall(r"(?:left|top|width|height):([-.\d]+)%", demo.draw_boxes(
        "<img>", {"a": (box[None], np.zeros((0, 4)))}, demo.part_of(width, height, how)))
    left, top, wide, high = np.array(found, float) * np.tile(seen.shape[::-1], 2) / 100
    assert [left, left + wide, top, top + high] == pytest.approx(
        [columns[0], columns[-1] + 1, rows[0], rows[-1] + 1], abs=1.01)


def test_boxes_are_drawn_where_they_are_with_their_labels(chromium):  # noqa: F811
    page = chromium.new_page()
    image = demo.picture(some_image(), "it")
    page.set_content(demo.STYLE + demo.draw_boxes(image, PAIRS))
    frame = page.locator(".picture").bounding_box()
    places = page.locator(".box").evaluate_all("all => all.map(one => one.getBoundingClientRect())"
                                               ".map(box => [box.left, box.top, box.width, box.height])")
    places = (np.array(places) - [frame["x"], frame["y"], 0, 0]) * 1000 / frame["width"]
    assert frame["width"] == 352 and places[:2].tolist() == pytest.approx(
        np.array([[0, 0, 1000, 1000], [100, 200, 200, 200]]), abs=0.2)
    assert places[3][2] * 0.352 == pytest.approx(4, abs=0.1)  # an inverted box has but its borders
    assert page.locator(".box span").all_inner_texts() == ["cyst", "<b>x</b>", "<b>x</b>"]
    styles = page.locator(".box").evaluate_all("all => all.map(getComputedStyle)"
                                               ".map(style => [style.borderTopStyle, style.borderTopColor])")
    assert [style for style, _ in styles] == ["dashed", "solid", "solid", "solid"]
    assert styles[0][1] == styles[1][1] != styles[2][1] == styles[3][1]  # a colour a label
    page.close()
    many = {"cell": (np.repeat(PAIRS["cyst"][0], demo.NAMED + 1, axis=0), PAIRS["cyst"][1])}
    assert demo.draw_boxes(image, many).count("<span") == 0 and demo.draw_boxes(image, {}) == image


@pytest.fixture
def shown(monkeypatch):
    """show_boxes(...) -> (its pairs, what it put on the page)."""
    said = []
    state = SimpleNamespace(whole=some_image(), part=(0, 0, 1000, 1000))
    monkeypatch.setattr(demo, "st", SimpleNamespace(session_state=state, html=said.append))

    def show(*arguments, **changes):
        said.clear()
        vars(state).update(changes)
        return demo.show_boxes(*arguments), "".join(said)

    return show


def test_what_is_said_of_boxes(shown):
    assert shown("what is this?", "a lung", "a lung") == ({}, "")
    pairs, said = shown("detect cyst", "<box>[[1, 2, 3, 4]]</box>", "Cyst <box>[[1, 2, 3, 4]]</box>")
    assert list(pairs) == ["cyst"] and said.count('class="box ') == 2 and "recorded</p>" in said
    assert "In the answer: cyst: 1. F-IoU with the recorded boxes: 100%." in said
    pairs, said = shown("where is it?", '[{"bbox_2d": [1, 2, 3, 4], "label": "<i>"}]', None)
    assert "&lt;i&gt;: 1." in said and "F-IoU" not in said and "recorded" not in said and "<i>:" not in said
    for question, answer in (("detect cyst", "a cyst"), ("where is it?", "cyst <box>[[1, 2, 3"), ("Detect it", "")):
        pairs, said = shown(question, answer, "cyst <box>[]</box>")
        assert "This answer cannot be read as boxes. F-IoU with the recorded boxes: 0%." in said
    assert "In the answer: no box." in shown("detect cyst", "[]", None)[1]
    pairs, said = shown("detect cyst", "cyst <box>[[1, 2, 3, 4]]</box>", None, whole=None)
    assert pairs == {} and "<img" not in said and "In the answer: cyst: 1." in said and "upload the image" in said


@pytest.mark.parametrize("how", ["crop", "pad", "squash", "fit"])
def test_the_whole_image_is_that_of_an_upload_and_of_an_example_stored_whole(how):
    loaded = SimpleNamespace(resize=how, examples=[("scans/test, image 1", some_image(), {})])
    whole, part = demo.see_whole(Image.new("RGB", (3000, 1500)), loaded, "an upload")
    assert whole.shape == (352, 704, 3) and part == demo.part_of(3000, 1500, how)
    whole, part = demo.see_whole(Image.fromarray(some_image()), loaded, "scans/test, image 1")
    assert (whole is None and part is None) == (how in ("crop", "pad"))


# ----------------------------------------------------------------------------- bad images

def encoded(image, form="PNG"):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, form)
    return stream.getvalue()


def png_that_claims(width, height):
    content = encoded(some_image())
    header = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


@pytest.mark.parametrize("content, sentence", [
    (b"a text", "not an image"), (b"", "not an image"), (encoded(some_image())[:-600], "not an image"),
    (encoded(some_image(), "JPEG")[:300], "not an image"), (b"%PDF-1.4 not drawn", "not an image"),
    (png_that_claims(10_000, 9_000), "89 million pixels"),
    (png_that_claims(60_000, 60_000), "89 million pixels")])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images_are_answered_by_a_sentence(content, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        demo.read_upload(content, SIZE)
    assert re.fullmatch(r"[A-Z][^.\n]*\.", str(error.value))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "BMP", "WEBP"])
def test_the_types_that_are_offered_are_read(form):
    assert demo.read_upload(encoded(some_image(), form), SIZE).size == (SIZE, SIZE)


# ----------------------------------------------------------------------------- in a browser

@pytest.fixture(scope="module")
def run(model, tokenizer, tmp_path_factory):
    """A run, and the shards with two images to choose from."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "run").mkdir()
    (folder / "run" / "tokenizer.model").write_bytes(TOKENIZER)
    record = {"image": {"size": SIZE, "resize": "squash"}, "inputs": {"tokenizer": tokenizer.sha256}}
    for step, loss in ((3, 0.5), (7, 0.6)):
        with sealed(folder / "run" / f"step_{step:06d}", step=step, held_out_loss=loss, **record) as partial:
            save_vlm(model, partial)
    write_questions(folder / "shards", "scans", {"test": [
        ("what is this?", "a lung", 1), (HOSTILE, "no", 1), ("is it large?", "yes", 2)]})
    torch.manual_seed(1)
    classifier = Classifier(randomise(ViT(model.vision.config)), 3)
    (folder / "seed_0").mkdir()
    with sealed(folder / "seed_0" / "model") as partial:
        save_classifier(classifier, partial, {
            "classes": CLASSES, "thresholds": None, "image": {"size": SIZE, "resize": "squash"}})
    return folder


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(server, port):
    for _ in range(300):
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health").close()
        except OSError:
            assert server.poll() is None, server.stdout.read()
            time.sleep(0.1)
    raise TimeoutError(f"no server on port {port}")


@pytest.fixture(scope="module")
def port(run, chromium):  # noqa: F811
    pytest.importorskip("streamlit", reason="no streamlit here")
    def write_little():  # as torch does when it is imported, to see where it could
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    port, home = free_port(), run / "home"
    home.mkdir()
    flags = {"run": run / "run", "shards_dir": run / "shards", "port": port,
             "classifier": run / "seed_0"}
    environment = {"HOME": str(home), "TMPDIR": str(home), "PATH": os.environ["PATH"],
                   "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    server = subprocess.Popen(
        [sys.executable, "extras/share/demo.py", *(f"--{name}={value}" for name, value in flags.items())],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=write_little)
    try:
        wait_for(server, port)
        yield port
    finally:
        server.terminate()
        said = server.communicate(timeout=20)[0]
    assert "Traceback" not in said and not any(question in said for question in QUESTIONS), said
    assert f"{run / 'run' / 'step_000007'} answers" in said  # which checkpoint it is
    left = [path for path in home.rglob("*") if not path.is_dir()]  # torch makes a folder
    assert left == []


@pytest.fixture
def visit(port, chromium):  # noqa: F811
    """visit() -> a page of its own session. In the end nothing was asked of another machine."""
    asked, contexts = [], []

    def open_page():
        contexts.append(chromium.new_context(viewport={"width": 1280, "height": 900}))
        page = contexts[-1].new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("websocket", lambda socket: asked.append(socket.url))
        page.goto(f"http://127.0.0.1:{port}/")
        page.get_by_placeholder("Ask about this image").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    here = (f"http://127.0.0.1:{port}/", f"ws://127.0.0.1:{port}/", "data:", "blob:")
    assert len(asked) > 10 and [url for url in asked if not url.startswith(here)] == []


def rest(page):
    page.locator("[data-test-script-state=notRunning]").wait_for()


def ask(page, question):
    page.get_by_placeholder("Ask about this image").fill(question)
    page.keyboard.press("Enter")
    page.locator(".question").first.get_by_text(question, exact=True).wait_for()
    rest(page)


def pill(page, text):
    return page.locator("[data-testid=stButtonGroup] button").filter(has_text=text).last


def upload(page, name, content):
    page.set_input_files("input[type=file]", {"name": name, "mimeType": "image/png", "buffer": content})


def answers(page):
    """{question: words of its answer}, as the page shows them."""
    found = [answer.locator(".word").all_text_contents() for answer in page.locator(".answer").all()]
    return dict(zip(page.locator(".question").all_inner_texts(), found, strict=True))


def words(model, tokenizer, image, question):
    tokens = list(demo.Conversation(model, tokenizer, image, torch.float32).ask(question))
    return [word.text for word in demo.words_of(tokens, tokenizer)]


def test_upload_ask_and_follow_up(visit, run, model, tokenizer):
    page = visit()
    assert "not for diagnosis or treatment, not for clinical use" in page.locator(".notice").inner_text()
    assert "step 000007" in page.locator(".note").first.inner_text()
    page.get_by_text("Your own").click()
    upload(page, "a.png", encoded(some_image(5)))
    page.get_by_alt_text("The image as the model sees it").wait_for()
    assert not page.get_by_alt_text("The image, coloured").count()
    classifier, _ = load_classifier(run / "seed_0")
    with torch.no_grad():
        shares = classifier(normalise(torch.from_numpy(some_image(5))[None])).softmax(1)[0].tolist()
    page.get_by_text(f"Classifier: {CLASSES[int(np.argmax(shares))]} {max(shares):.0%}").click()
    page.locator("progress").first.wait_for()
    assert page.locator(".rows tr").all_text_contents() == [
        f"{name}{share:.1%}" for name, share in zip(CLASSES, shares)]
    ask(page, "what is this?")
    expected = {question: words(model, tokenizer, some_image(5), question) for question in QUESTIONS}
    assert answers(page) == {"what is this?": expected["what is this?"]}
    chips = page.locator(".answer").first.locator(".word")
    [*tokens] = demo.Conversation(model, tokenizer, some_image(5), torch.float32).ask("what is this?")
    probabilities = [f"{word.probability:.1%}" for word in demo.words_of(tokens, tokenizer)]
    assert chips.evaluate_all("all => all.map(one => one.title)") == probabilities
    heat = page.get_by_alt_text("The image, coloured")
    whole = heat.get_attribute("src")
    pill(page, probabilities[-1]).click()
    page.locator(f'[alt^="The image, coloured"]:not([src="{whole}"])').wait_for()
    rest(page)
    assert answers(page) == {"what is this?": expected["what is this?"]}
    ask(page, "why?")
    assert answers(page) == {question: expected[question] for question in ("why?", "what is this?")}


def test_bad_uploads_get_one_sentence(visit, tmp_path):
    page = visit()
    page.get_by_text("Your own").click()
    upload(page, "a.png", b"a text")
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert alert.inner_text().strip() == ("This file is not an image that can be read: no image, or of a format "
                                          "that is not read.")
    assert not page.get_by_placeholder("Ask about this image").count()
    large = tmp_path / "large.png"
    with open(large, "wb") as file:
        file.truncate(60 << 20)
    page.set_input_files("input[type=file]", large)
    page.get_by_text("File must be 20.0MB or smaller.").wait_for()
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1200, 3), np.uint8)
    upload(page, "b.png", encoded(noise))  # 3.6 MB, which must not pass through a file either
    page.get_by_alt_text("The image as the model sees it").wait_for()


def test_a_pasted_text_is_asked_or_comes_back(visit, model, tokenizer):
    page = visit()
    for text in ("is it " + "very " * 100 + "large?", "x" * 5000):
        page.get_by_placeholder("Ask about this image").focus()
        page.keyboard.insert_text(text)  # as a paste does
        page.keyboard.press("Enter")
        page.get_by_text(text, exact=True).first.wait_for()
        rest(page)
        if len(text) == 5000:
            said = page.get_by_role("alert").inner_text()
            assert "5,000 characters" in said and "of which 512 are read. Nothing was asked." in said
        assert len(answers(page)) == 1


def test_sessions_are_apart_and_examples_are_as_prepared(visit, run, model, tokenizer):
    shard = Shard(run / "shards" / "scans" / "test")
    pages = [visit(), visit()]
    pages[1].get_by_role("combobox").click()
    pages[1].get_by_role("option", name="scans/test, image 2").click()
    pill(pages[1], "is it large?").wait_for()
    for question in ("where is it?", "why?"):
        for page in pages:  # both at once
            page.get_by_placeholder("Ask about this image").fill(question)
            page.keyboard.press("Enter")
        for number, page in enumerate(pages):
            page.locator(".question").first.get_by_text(question, exact=True).wait_for()
            rest(page)
            assert answers(page)[question] == words(model, tokenizer, shard.read_image(number), question)
    assert pill(pages[0], "192.0.2.1").inner_text() == HOSTILE  # shown as it is, and never loaded
    pill(pages[0], "192.0.2.1").click()
    pages[0].locator(".question").first.get_by_text(HOSTILE, exact=True).wait_for()
    rest(pages[0])
    assert pages[0].get_by_text("Recorded answer: no").count() == 1
    assert len(answers(pages[0])) == 3 and len(answers(pages[1])) == 2
    assert not pages[0].locator("img[src^='http']").count()


def test_no_width_needs_scrolling_sideways(visit):
    page = visit()
    ask(page, LONG)
    for width in (1280, 800, 390):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_function("width => innerWidth === width", arg=width)
        boxes = page.locator(".picture, .word, .notice, .ramp, button p").evaluate_all(
            "all => all.map(one => one.getBoundingClientRect()).map(box => [box.left, box.right])")
        assert len(boxes) >= 20
        assert min(left for left, _ in boxes) >= 0 and max(right for _, right in boxes) <= width


def test_the_server_listens_on_this_machine_alone(port):
    listening = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:] if Path(table).is_file() else []:
            _, local, _, state, *_ = line.split()
            address, _, number = local.partition(":")
            if state == "0A" and int(number, 16) == port:
                listening.append(address)
    if not Path("/proc/net/tcp").is_file():
        pytest.skip("no /proc here")
    assert listening == ["0100007F"]


RECORD = """
import socket
def record(function, place):
    def recorded(*arguments, **named):
        with open({path!r}, "a") as file:
            print(place(arguments), file=file)
        return function(*arguments, **named)
    return recorded
socket.getaddrinfo = record(socket.getaddrinfo, lambda given: given[0])
socket.socket.connect = record(socket.socket.connect, lambda given: given[1])
"""


def connect(port, origin, host):
    """The status line of an answer to a page of this origin that wants to talk to the server."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(f"GET /_stcore/stream HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\n"
                           "Connection: Upgrade\r\nSec-WebSocket-Key: MDAwMDAwMDAwMDAwMDAwMA==\r\n"
                           f"Sec-WebSocket-Version: 13\r\nOrigin: {origin}\r\n\r\n".encode())
        return connection.recv(100).decode().split("\r\n")[0]


def test_no_other_machine_is_asked_for_anything(run, tmp_path):
    """Listening on all addresses, streamlit would ask a host elsewhere for this machine's own."""
    pytest.importorskip("streamlit", reason="no streamlit here")
    (tmp_path / "sitecustomize.py").write_text(RECORD.format(path=str(tmp_path / "asked")))
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "extras/share/demo.py", f"--run={run / 'run'}", "--address=0.0.0.0", f"--port={port}"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path), "HOME": str(tmp_path)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        wait_for(server, port)
        assert " 403 " in connect(port, "http://192.0.2.1", f"127.0.0.1:{port}")  # another site's page
        assert " 101 " in connect(port, f"http://127.0.0.1:{port}", f"127.0.0.1:{port}")
    finally:
        server.terminate()
        said = server.communicate(timeout=20)[0]
    asked = (tmp_path / "asked").read_text().split("\n") if (tmp_path / "asked").is_file() else []
    assert [place for place in asked if place not in ("", "0.0.0.0", "127.0.0.1")] == []
    assert f"the page is at http://0.0.0.0:{port}" in said and "external IP" not in said


def test_a_site_that_takes_this_machines_address_for_its_name_gets_no_page(port):
    assert " 403 " in connect(port, "http://scans.example", "scans.example")
    assert " 101 " in connect(port, f"http://localhost:{port}", f"localhost:{port}")


def attempt_in_vain(said):
    demo.stay_here("127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
    for function, *arguments in (
            (socket.getaddrinfo, "host.example", 80), (socket.gethostbyname, "host.example"),
            (socket.create_connection, ("192.0.2.1", 80), 1),
            (socket.socket(type=socket.SOCK_DGRAM).connect, ("192.0.2.1", 1))):
        try:
            said.put(function(*arguments))
        except PermissionError as error:
            said.put(str(error).split(":")[0])


def test_a_process_that_stays_here_reaches_no_other_machine():
    pytest.importorskip("streamlit", reason="no streamlit here")
    context = multiprocessing.get_context("fork")  # what stay_here sets is for the rest of a process
    said = context.Queue()
    context.Process(target=attempt_in_vain, args=(said,)).start()
    assert [said.get(timeout=20) for _ in range(4)] == [
        "socket.getaddrinfo of host.example", "socket.gethostbyname of host.example",
        "socket.getaddrinfo of 192.0.2.1", "socket.connect of 192.0.2.1"]


@pytest.mark.parametrize("name", [None, "server.address", "server.maxUploadSize",
                                  "server.allowedHosts", "browser.gatherUsageStats",
                                  "client.showErrorDetails", "logger.hideWelcomeMessage"])
def test_other_settings_are_refused(name, tmp_path, monkeypatch):
    pytest.importorskip("streamlit", reason="no streamlit here")
    config = demo.Config(run=str(tmp_path / "none"))
    settings = demo.server_settings(config)
    assert settings["server.address"] == "127.0.0.1" and len(settings) == 6
    monkeypatch.setattr(demo.st, "get_option", lambda one: None if one == name else settings[one])
    said = "start it with `python extras/share/demo.py`" if name else "no checkpoint"
    with pytest.raises(UserError, match=said):
        demo.show_page(config)


# ----------------------------------------------------------------------------- the command line

@pytest.mark.parametrize("checkpoint, step", [("", 7), ("newest", 7), ("best", 3), ("step_000003", 3)])
def test_the_checkpoint_that_is_named_answers(checkpoint, step, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no classifier
    flags = demo.Config(run=str(run / "run"), checkpoint=checkpoint, shards_dir=str(run / "shards"), device="cpu")
    loaded = demo.load(flags)
    assert f" · step {step:06d} · cpu" in loaded.facts and loaded.classifier is None
    assert [name for name, _, _ in loaded.examples] == ["scans/test, image 1", "scans/test, image 2"]



@pytest.mark.parametrize("argument, message", [
    ("--run={}/none", "none: no checkpoint here; run `python train_vlm.py --run="),
    ("--run={}/run --checkpoint=step_000004", "--checkpoint=step_000004: "),
    ("--prot=1", "unknown flag '--prot=1': did you mean --port?"),
    ("--run={}/run --address=host.example", "--address=host.example --port=8501: 'host.example' does not"),
    ("--run={}/run --address=192.0.2.1", "Cannot assign requested address"),
    ("--run={}/run --port=99999", "--port"),
    ("", "no streamlit here; run `pip install -r extras/requirements.txt`")])
def test_mistakes_get_one_line(argument, message, run, tmp_path, monkeypatch, capsys):
    arguments = argument.format(run if argument.startswith("--run={}/run") else tmp_path).split()
    monkeypatch.setattr("sys.argv", ["demo.py", *arguments])
    if not argument:
        monkeypatch.setattr(demo, "st", None)
    elif demo.st is None:
        pytest.skip("no streamlit here")
    with pytest.raises(SystemExit) as stopped:
        run_script(demo.main, parse_command_line(demo.Config))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and said.count("\n") == 1
