"""
Ask a trained model about images in the browser: what it answers, how surely, and where it looked.

    python extras/share/demo.py --run=out/sample

The page is at http://127.0.0.1:8501, for this machine alone. It is research software, not for clinical
use. Images and questions stay in memory while the page is open: nothing is written to the disk or sent
elsewhere, at whatever --address the page is. Boxes in an answer are drawn over the image, beside the recorded
ones where there are any. Where train_cls.py has trained a classifier, its probabilities stand beside the
image. Needs `pip install -r extras/requirements.txt`.

Streamlit shows the page, with the settings of server_settings(); under others the page refuses to work.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import base64
import html
import io
import ipaddress
import itertools
import re
import socket
from collections import Counter, defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated

import numpy as np
import torch
from PIL import Image

from data import Record
from generate import Answer, Cache, Piece, Sampling, count_positions, extend, run_pieces
from plumbing.devices import autocast_to, pick_device
from plumbing.flags import Device, Range, UserError, parse_command_line, run
from plumbing.pixels import TOO_LARGE, Unreadable, load_image, resize_image
from run import open_trained_run
from tasks import boxes
from tasks.splits import QUESTIONS_PER_ROW, open_splits
from weights import load_classifier, load_vlm

try:
    import streamlit as st
except ImportError:
    st = None  # main() says so

MEGABYTES = 20  # of an upload, at most
TYPES = ("png", "jpg", "jpeg", "tif", "tiff", "bmp", "webp")
EXAMPLES = 12  # images to choose from, about
MAX_NEW_TOKENS = 32  # an answer is cut here, as generate()'s is
MAX_BOX_TOKENS = 1024  # and one that has begun to write boxes here
MAX_QUESTION = 512  # tokens of a question; some 2,000 letters
MAX_CACHED = 4096  # tokens of questions and answers beside the image, then it starts another cache
RUNNERS_UP = 3  # tokens listed beside the one that was taken
SURE = (0.9, "#cfe6f2"), (0.7, "#e0efd6"), (0.5, "#fbeec2"), (0, "#f8d3b8")  # probability from, colour
HEAT = (226, 88, 0)  # colour of the map
BOX_COLOURS = ("#56b4e9", "#f0e442", "#f29bc6", "#2fd6a3", "#ff9d5c", "#c9b3ff")  # of labels, in dark letters
NAMED = 8  # boxes of an answer, at most, that bear their labels
SHARP = 704  # pixels of the longer side of a whole image that is drawn: twice what .picture is wide
STYLE = """<style>
.block-container {padding-top: 1.2rem; max-width: 1180px}
.name {font-size: 1.6rem; font-weight: 650; margin: 0}
.note {color: #55656e; font-size: .85rem; margin: .25rem 0; overflow-wrap: anywhere}
.notice {background: #fdf4e3; border-left: 4px solid #c98a12; padding: .5rem .8rem; margin: .4rem 0 0}
.picture, .ramp {width: 100%; max-width: 22rem; border-radius: 4px; display: block}
.ramp {height: .6rem; background: linear-gradient(to right, #eee, rgb(226, 88, 0))}
.framed {position: relative; overflow: hidden; width: 100%; max-width: 22rem; border-radius: 4px}
.box {position: absolute; box-sizing: border-box; border: 2px solid; filter: drop-shadow(0 0 1px #000)}
.box.recorded {border-style: dashed}
.line.recorded {border-top-style: dashed}
.box span {position: absolute; left: -2px; bottom: 100%; font: 600 .7rem/1.3 sans-serif; white-space: nowrap;
  color: #1d2b33; padding: 0 .3em}
.box.top span {bottom: auto; top: 0}
.box.right span {left: auto; right: -2px}
.line {display: inline-block; width: 1.6rem; border-top: 2px solid #1d2b33; margin: 0 .35rem .25rem 0}
.question {font-weight: 600; margin: .3rem 0; overflow-wrap: anywhere}
.answer {font-size: 1.3rem; line-height: 1.7; margin: 0; overflow-wrap: anywhere}
.word {color: #1d2b33; padding: .1em .35em; border-radius: 4px; margin: .1em; display: inline-block}
.key {font-size: .8rem}
.rows {font-size: .9rem; width: 100%}
.rows td {border: 0; border-bottom: 1px solid #e3e9ec; padding: .25rem .5rem .25rem 0}
progress {accent-color: #0b5c7a; width: 100%}
[data-testid=stButtonGroup] [role] {flex-wrap: wrap; overflow: visible; mask: none}
[data-testid=stButtonGroup] :is(button, button *) {white-space: normal; height: auto; max-width: 100%}
@media (max-width: 640px) {.picture, .ramp, .framed {max-width: 13rem} .notice {font-size: .9rem}}
</style>"""


@dataclass(frozen=True)
class Config:
    run: str = ""  # folder of a train_vlm.py run; none: the newest in out/
    checkpoint: str = ""  # of the run: best, by held-out loss, or a name such as step_000500; none: the newest
    shards_dir: str = "shards"  # where prepare/all.py put the data whose test images are the examples
    classifier: str = ""  # folder .../seed_<n> of a train_cls.py run; none: the newest in out/cls
    address: str = "127.0.0.1"  # to listen on; another one may let other machines in
    port: Annotated[int, Range(1, 65535)] = 8501  # to listen on
    device: Device = "auto"  # cuda, mps or cpu


# ----------------------------------------------------------------------------- the conversation

class WatchedCache(Cache):
    """A Cache of one row that notes where the last of the tokens that are run through it looks."""

    def place(self, row, branch):
        super().place(row, branch)
        self.weights = []  # of each layer, (S,)

    def attend(self, layer, q, k, v):
        y = super().attend(layer, q, k, v)
        last, heads = q[-1, :, None].float(), q.shape[1] // k.shape[1]  # (nh, 1, hs)
        keys = self.layers[layer][0][0, :, :self.S].float().repeat_interleave(heads, dim=0)  # (nh, S, hs)
        # No matrix product, which autocast would do in bfloat16
        scores = (last * keys).sum(-1) / q.shape[-1] ** 0.5 + self.mask[0, 0, -1].float()  # (nh, S)
        self.weights.append(scores.softmax(-1).mean(0))
        return y


@dataclass
class Token:
    """A token of an answer."""
    id: int
    probability: float
    runners_up: list  # (id, probability) of the next likely ones
    looked: np.ndarray  # (N,) attention to each token of the image, mean over layers and heads


@dataclass
class Word:
    """The tokens of an answer from one start of a word to the next."""
    text: str
    probability: float  # of all its tokens
    looked: np.ndarray  # (N,) mean over its tokens


class Conversation:
    """Questions about one image (H, W, 3) uint8, which is run through the model once for all of them."""

    def __init__(self, model, tokenizer, image, dtype):
        self.model, self.tokenizer, self.image = model, tokenizer, image
        self.asked, self.cached = QUESTIONS_PER_ROW, 0  # so many, and another cache starts
        self.sampling = Sampling(stops=tokenizer.stops, vocab_size=tokenizer.vocab_size)
        self.autocast = autocast_to(next(model.projector.parameters()).device, dtype)

    def start(self, prefix):
        """Run what every question sees: the prompt's tokens up to the image."""
        weight = next(self.model.language.blocks.parameters())
        cache = WatchedCache(self.model.language.config, 1, weight.dtype, weight.device)
        with self.autocast:
            run_pieces(self.model, cache, [Piece(0, 0, 0, prefix, [self.image])], wanted=False)
        self.cache, self.asked, self.cached = cache, 0, 0

    @torch.no_grad()
    def ask(self, question):
        """
        Yield the Tokens of the answer, what stops it the last unless it is cut: generate()'s greedy ones.
        It may be left at any time: what it put into the cache is in no other question's sight.
        """
        prefix, own = write_prompt(self.tokenizer, question)
        if self.asked == QUESTIONS_PER_ROW or self.cached + len(own) + MAX_BOX_TOKENS > MAX_CACHED:
            self.start(prefix)
        self.asked, self.cached = self.asked + 1, self.cached + len(own)
        begin, end = len(prefix) - 1, len(prefix) - 1 + self.model.vision.tokens(*self.image.shape[:2])
        position = count_positions(self.model, prefix, [self.image])
        answer = Answer(0, 0, 1, Piece(0, self.asked, position, own, []))
        while not answer.done:
            with self.autocast:
                [logits] = extend(self.model, self.cache, [answer], MAX_BOX_TOKENS, self.sampling)  # (V,)
            self.cached += 1
            [token], probabilities = answer.next.tokens, logits.softmax(0)
            best, ids = probabilities.topk(RUNNERS_UP + 1)
            others = [pair for pair in zip(ids.tolist(), best.tolist()) if pair[0] != token]
            looked = torch.stack(self.cache.weights).mean(0)[begin:end].cpu().numpy()
            yield Token(token, float(probabilities[token]), others[:RUNNERS_UP], looked)
            if len(answer.tokens) == MAX_NEW_TOKENS and not writes_boxes(self.tokenizer.decode(answer.tokens)):
                break


def write_prompt(tokenizer, question):
    """The tokens of a question about one image: those up to the image, the last, which is -1, and the others."""
    tokens, [(end, _)], _ = tokenizer.write(Record("", question, image=b""))
    begin = tokens.index(-1) + 1
    return tokens[:begin], tokens[begin:end]


def words_of(tokens, tokenizer):
    """The Words of an answer's Tokens; their texts, joined by spaces, are the answer."""
    groups = []
    for token in tokens:
        if token.id in tokenizer.stops:
            break
        known = token.id < tokenizer.vocab_size
        if not groups or known and (tokenizer.piece(token.id) or "").startswith(tokenizer.word_start):
            groups.append([])
        groups[-1].append(token)
    return [Word(tokenizer.decode([token.id for token in group]),
                 float(np.prod([token.probability for token in group])),
                 np.mean([token.looked for token in group], axis=0)) for group in groups]


def text_of(tokens, tokenizer):
    return tokenizer.decode([token.id for token in tokens if token.id not in tokenizer.stops])


def writes_boxes(text):
    """Whether an answer, perhaps not yet whole, is in one of the forms of boxes."""
    return "<box>" in text or text.lstrip().startswith(("[", "```"))


def part_of(width, height, how):
    """What resize_image leaves of an image: left, top, width and height, in thousandths of the whole one's."""
    side = {"crop": min, "pad": max}.get(how)
    width, height = (1000 * side(width, height) / own if side else 1000 for own in (width, height))
    return 500 - width / 2, 500 - height / 2, width, height


def read_upload(content, at_least):
    """The RGB image in a file's bytes. Raises UserError, in one sentence, where there is none."""
    try:
        return load_image(content, at_least)
    except Unreadable as error:
        if str(error) == TOO_LARGE:
            raise UserError(f"This image has more than {Image.MAX_IMAGE_PIXELS // 10 ** 6} million "
                            "pixels, the most that are read.") from None
        raise UserError(f"This file is not an image that can be read: {error}.") from None


def patches_of(image, looked):
    """(rows, columns) of the attention (N,) to an image's tokens, without that to a class token: it is nowhere."""
    for patches in (looked, looked[1:]):
        rows = round((len(patches) * image.shape[0] / image.shape[1]) ** 0.5)  # they are squares
        if rows and len(patches) % rows == 0 and rows * image.shape[1] == len(patches) // rows * image.shape[0]:
            return patches.reshape(rows, -1)
    raise ValueError(f"{len(looked)} tokens of an image of {image.shape[:2]} are no squares")


def heat_map(image, looked):
    """An image (H, W, 3) uint8 in grey, its patches the more in colour the more was looked at them."""
    patches = patches_of(image, looked)
    share = (patches - patches.min()).astype(np.float32)
    share /= max(share.max(), 1e-12)
    share = Image.fromarray(share).resize(image.shape[1::-1], Image.Resampling.NEAREST)
    share = 0.75 * np.asarray(share)[..., None]  # (H, W, 1)
    grey = np.asarray(Image.fromarray(image).convert("L"), np.float32)[..., None]
    return (grey * (1 - share) + np.array(HEAT) * share).round().astype(np.uint8)


# ----------------------------------------------------------------------------- what is loaded once

def load(config):
    """What all sessions share and none changes. There may be no examples and no classifier."""
    folder, checkpoint, record, tokenizer = open_trained_run(config.run, config.checkpoint)
    device, dtype = pick_device(config.device, "auto")
    model, settings = load_vlm(checkpoint, dtype, device).eval(), record["image"]
    print(f"demo.py: {checkpoint} answers, on {device}", flush=True)
    try:
        shards = open_splits("", "test", config.shards_dir, tokenizer, settings)
    except UserError:
        shards = []  # images of one's own alone
    examples, frequent = [], Counter()
    for shard in shards:
        asked = defaultdict(dict)  # image -> {question: recorded answer}
        for words, sample in zip(shard.read_records(), shard.samples):
            if sample["images"] == sample["spans"] == 1 and not words.get("context"):
                asked[int(sample["image"])][words["question"]] = words["answer"]
                frequent[words["question"]] += 1
        places = np.linspace(0, len(asked) - 1, max(EXAMPLES // len(shards), 1)) if asked else ()
        for image in dict.fromkeys(sorted(asked)[round(place)] for place in places):
            name = f"{shard.folder.relative_to(config.shards_dir)}, image {image + 1}"
            examples.append((name, shard.read_image(image), asked[image]))
    classifiers = Path("out/cls").glob("*/*/seed_*/model")
    newest = max(classifiers, key=lambda path: path.stat().st_mtime, default=Path()).parent
    where = Path(config.classifier) if config.classifier else newest
    return SimpleNamespace(
        model=model, tokenizer=tokenizer, device=device, dtype=dtype, examples=examples,
        size=settings["size"], resize=settings["resize"],
        facts=f"{folder} · {checkpoint.name.replace('_', ' ')} · {device}",
        questions=dict.fromkeys(question for question, _ in frequent.most_common(4)),  # for other images
        classifier=(*load_classifier(where, device), where) if where.name else None)


def classify(loaded, image):
    """{class: probability} of an RGB image by train_cls.py's model."""
    model, facts, _ = loaded.classifier
    pixels = np.array(resize_image(image, facts["image"]["size"], facts["image"]["resize"]))
    autocast = autocast_to(loaded.device, loaded.dtype)
    [shares] = model.predict(pixels[None], 1, autocast)
    return dict(zip(facts["classes"], shares.tolist()))


# ----------------------------------------------------------------------------- the page

def picture(pixels, words):
    """An <img> that holds the pixels itself, so that the server keeps none."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    content = base64.b64encode(stream.getvalue()).decode()
    return f'<img class="picture" alt="{words}" src="data:image/png;base64,{content}">'


def draw_boxes(image, pairs, part=(0, 0, 1000, 1000)):
    """
    An <img> with boxes over it, each label in its colour: those of the answer, the recorded ones in dashed lines.

    pairs: {label: (boxes of the answer, recorded boxes)}, (n, 4) each, in thousandths of the whole image; part: what
    of that the <img> shows, as part_of gives it.
    """
    if not pairs:
        return image
    left, top, *size = part
    named, lines = sum(len(found) for found, _ in pairs.values()) <= NAMED, []
    for (label, (found, recorded)), colour in zip(pairs.items(), itertools.cycle(BOX_COLOURS)):
        name = f'<span style="background:{colour}">{html.escape(label or "box")}</span>' if named else ""
        for some, kind, inner in ((recorded, "recorded", ""), (found, "found", name)):
            for x1, y1, x2, y2 in (np.clip(some, -9999, 9999) - (left, top, left, top)).tolist():
                x, y, width, height = (100 * length / whole for length, whole in zip(
                    (x1, y1, max(x2 - x1, 0), max(y2 - y1, 0)), size * 2))
                sides = " top" * (y < 8) + " right" * (x > 50)
                lines.append(f'<div class="box {kind}{sides}" style="left:{x:.2f}%;top:{y:.2f}%;width:{width:.2f}%;'
                             f'height:{height:.2f}%;border-color:{colour}">{inner}</div>')
    return f'<div class="framed">{image}{"".join(lines)}</div>'


def plain(text):
    """A text that streamlit does not take for Markdown, which could name an image elsewhere."""
    return re.sub(r"([^\w\s])", r"\\\1", text)


def coloured(question, words, more=""):
    """A question, and an answer's words on the colours of their probability."""
    colours = [next(colour for least, colour in SURE if word.probability >= least) for word in words]
    spans = [f'<span class="word" style="background:{colour}" title="{word.probability:.1%}">'
             f"{html.escape(word.text)}</span>" for word, colour in zip(words, colours)]
    return (f'<p class="question">{html.escape(question)}</p>'
            f'<p class="answer">{" ".join(spans)}{more}</p>')


def table(rows, note):
    """Rows of cells that are HTML as a table, and a text under it."""
    lines = "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in rows)
    return f'<table class="rows">{lines}</table><p class="note">{html.escape(note)}</p>'


def choose_image(loaded):
    """(what tells this image from others, a function that gives it, {question: answer}), or None."""
    sources = ["Example", "Your own"] if loaded.examples else ["Your own"]
    if st.radio("Image", sources, horizontal=True, label_visibility="collapsed") == "Example":
        names = [name for name, _, _ in loaded.examples]
        name, pixels, questions = loaded.examples[names.index(st.selectbox("Example image", names))]
        return name, lambda: Image.fromarray(pixels), questions
    file = st.file_uploader("An image without names or dates on it", TYPES)
    return file and (file.file_id, lambda: read_upload(file.getvalue(), 2 * loaded.size),  # as prepare/
                     loaded.questions)


def show_image(pixels, classes, loaded):
    """The image of a conversation, and the classes that the classifier gives it, if there is one."""
    st.html(picture(pixels, "The image as the model sees it")
            + f'<p class="note">As the model sees it: {pixels.shape[1]} × {pixels.shape[0]} pixels</p>')
    if classes:
        best = max(classes, key=classes.get)
        rows = [(html.escape(name), f'<progress value="{share:.3f}"></progress>', f"{share:.1%}")
                for name, share in classes.items()]
        st.expander(plain(f"Classifier: {best} {classes[best]:.0%}")).html(
            table(rows, f"{loaded.classifier[2]}, which knows these classes alone"))


def show_boxes(question, text, recorded):
    """
    The boxes of an answer and the recorded ones over the whole image, if it is one of boxes; {label: pair of both}.
    """
    found, true, whole = boxes.read(text), boxes.read(recorded or ""), st.session_state.whole
    asked = question.lower().startswith(boxes.ask("")) or true is not None
    if found is None and not asked and not writes_boxes(text):
        return {}
    pairs = boxes.pair_up(found or {}, true or {})
    counts = ", ".join(f"{label or 'box'}: {len(some)}" for label, (some, _) in pairs.items()) or "no box"
    said = "This answer cannot be read as boxes." if found is None else f"In the answer: {counts}."
    if true is not None:
        said += f" F-IoU with the recorded boxes: {boxes.score({'boxes': true}, text)[boxes.MAIN]:.0f}%."
    if whole is None:
        said += (" Boxes are of the whole image, of which this example is a cropped or padded copy: upload the image "
                 "itself to see them on it.")
        st.html(f'<p class="note">{html.escape(said)}</p>')
        return {}
    keys = [f'<span class="word key" style="background:{colour}">{html.escape(label or "box")}</span>'
            for label, colour in zip(pairs, itertools.cycle(BOX_COLOURS))]
    lines = [f'<i class="line {kind}"></i>{words}' for kind, words in (
        ("found", "the answer"), ("recorded", "recorded"))[:1 + (true is not None)]]
    st.html(draw_boxes(picture(whole, "The image with its boxes"), pairs)
            + f'<p class="note">{" ".join(keys)} {" &nbsp; ".join(lines)}</p>'
            f'<p class="note">{html.escape(said)}</p>')
    return pairs


def see_whole(image, loaded, name):
    """
    The whole image (H, W, 3) uint8 to draw boxes on, and what of it the model sees, as part_of gives it. (None, None)
    for an example that was stored cropped or padded: where the whole one ended is not known.
    """
    if loaded.resize in ("crop", "pad") and name in (example for example, *_ in loaded.examples):
        return None, None
    part, whole = part_of(*image.size, loaded.resize), image.copy()
    whole.thumbnail((SHARP, SHARP), Image.Resampling.BICUBIC)
    return np.asarray(whole), part


def show_details(tokens, words, image, pairs, tokenizer, key):
    """Where the model looked for an answer, and what else it might have said."""
    def cell(token, probability):
        text = "(end)" if token in tokenizer.stops else tokenizer.decode([token]) or "(space)"
        return f"{html.escape(text)} {probability:.1%}"

    legend = [f'<span class="word key" style="background:{colour}">'
              f'{f"from {least:.0%}" if least else "less"}</span>' for least, colour in SURE]
    chosen = st.pills("Where it looked, for the whole answer or for the word you choose",
                      range(len(words)), key=key,
                      format_func=lambda n: plain(f"{words[n].text} {words[n].probability:.1%}"))
    looked = np.mean([one.looked for one in (tokens if chosen is None else [words[chosen]])], axis=0)
    left, right = st.columns(2)
    left.html(draw_boxes(picture(heat_map(image, looked), "The image, coloured where the model looked"), pairs,
                         st.session_state.part))
    patches = patches_of(image, looked)
    right.html(f'<div class="ramp"></div><p class="note">{patches.min():.1%} to {patches.max():.1%} of its '
               f"attention on a patch; {looked.sum():.0%} on the whole image, the rest on words</p>"
               '<p class="note">Attention is not an explanation of the answer.</p><br>' + "".join(legend)
               + '<p class="note">How probable it found each word. It can be sure and wrong.</p>')
    rows = [[cell(token.id, token.probability), *(cell(*other) for other in token.runners_up)]
            for token in tokens]
    right.expander("What else it might have said").html(
        table(rows, "Each token of the answer, and the next likely ones in its place"))


def converse(conversation, tokenizer, questions):
    """Questions and answers about an image, the newest first. questions: {suggested: recorded answer}"""
    state = st.session_state

    def take_suggestion():
        state.suggestion, state.suggested = state.suggested, None

    typed = st.chat_input("Ask about this image")  # the browser would drop a paste past max_chars
    if questions:
        st.pills("Or choose a question", list(questions), format_func=plain, key="suggested",
                 on_change=take_suggestion)
    question = (typed or state.pop("suggestion", None) or "").strip()
    newest = st.empty()
    count = len(write_prompt(tokenizer, question)[1])
    if count > MAX_QUESTION:
        st.warning(f"This question is too long: {len(question):,} characters, {count:,} tokens, of which "
                   f"{MAX_QUESTION} are read. Nothing was asked. Copy it from here and shorten it:")
        st.code(question, language=None, wrap_lines=True, height=200)
    elif question:
        tokens, words = [], []
        for token in conversation.ask(question):
            tokens.append(token)
            words = words_of(tokens, tokenizer)
            newest.html(coloured(question, words if token.id in tokenizer.stops else words[:-1]))  # it may go on
        state.turns.insert(0, (question, tokens, words))
    for number, (question, tokens, words) in enumerate(state.turns):
        cut = tokens[-1].id not in tokenizer.stops
        shown = coloured(question, words, " …" if cut else "" if words else "(no answer)")
        if recorded := questions.get(question):
            shown += f'<p class="note">Recorded answer: {html.escape(recorded)}</p>'
        if number:
            st.html(shown)
            continue
        newest.html(shown)
        pairs = show_boxes(question, text_of(tokens, tokenizer), recorded)
        show_details(tokens, words, conversation.image, pairs, tokenizer, f"{state.name} {len(state.turns)}")


def show_page(config):
    """One run of the page for one session, as streamlit makes it at every click."""
    state = st.session_state
    st.set_page_config("nanoMedQ", layout="wide")
    st.html(STYLE)
    options = {name: st.get_option(name) for name in server_settings(config)}
    options = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    if options != server_settings(config):
        raise UserError("This server's settings do not keep the page private; start it with `python "
                        "extras/share/demo.py` and the same flags.")
    loaded = st.cache_resource(load, show_spinner="Loading the model")(config)
    st.html(f'<p class="name">nanoMedQ</p><p class="note">{html.escape(loaded.facts)}</p>'
            '<p class="notice"><b>Research software: not for diagnosis or treatment, not for clinical '
            "use.</b> Its answers may be wrong. Images stay in memory while this page is open.</p>")
    left, right = st.columns([2, 3], gap="medium")
    with left:
        if not (chosen := choose_image(loaded)):
            return
        name, read, questions = chosen
        if state.get("name") != name:
            image = read()
            try:
                pixels = np.asarray(resize_image(image, loaded.size, loaded.resize))
            except Unreadable as error:
                raise UserError(f"This image cannot be used: {error}.") from None
            classes = classify(loaded, image) if loaded.classifier else {}
            state.conversation = Conversation(loaded.model, loaded.tokenizer, pixels, loaded.dtype)
            state.name, state.classes, state.turns = name, classes, []
            state.whole, state.part = see_whole(image, loaded, name)
        show_image(state.conversation.image, state.classes, loaded)
    with right:
        converse(state.conversation, loaded.tokenizer, questions)


# ----------------------------------------------------------------------------- the server

def is_loopback(address):
    """Whether an IP address or a name is this machine's own, which no other one reaches."""
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:  # another name
        return False


def server_settings(config):
    """Streamlit's options without which the page would not be private."""
    # Elsewhere a site could give its own name this machine's address, and read the page in a browser here
    hosts = ["localhost", "127.0.0.1", "::1"] if is_loopback(config.address) else []
    return {"server.address": config.address, "server.maxUploadSize": MEGABYTES,
            "server.allowedHosts": hosts, "browser.gatherUsageStats": False,
            "client.showErrorDetails": "none", "logger.hideWelcomeMessage": True}


def stay_here(address):
    """
    Let this process open no connection to another machine, nor ask for one's address. Streamlit would
    ask a host on the internet for this machine's own address, to print it when it listens on all, and
    to compare it with where a page says that it comes from.
    """
    def refuse(event, arguments):
        if event == "socket.getaddrinfo":
            host = arguments[0].decode() if isinstance(arguments[0], bytes) else arguments[0]
        elif event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
            host = arguments[1][0] if isinstance(arguments[1], tuple) else None  # None: within the machine
        elif event in ("socket.gethostbyname", "socket.gethostbyaddr"):
            host = arguments[0]
        else:
            return
        if host not in (None, "", address) and not is_loopback(host):
            raise PermissionError(f"{event} of {host}: the demo asks no other machine")

    from streamlit import net_util
    net_util.get_internal_ip = net_util.get_external_ip = lambda: None  # else it logs each refusal
    sys.addaudithook(refuse)


def require_address(config):
    """Raise UserError unless the page can be at this address and port. A name is not looked up."""
    family = socket.AF_INET6 if ":" in config.address else socket.AF_INET
    try:
        if config.address != "localhost":
            ipaddress.ip_address(config.address)
        socket.create_server((config.address, config.port), family=family).close()
    except (OSError, OverflowError, ValueError) as error:
        raise UserError(f"--address={config.address} --port={config.port}: {error}; choose an IP address of "
                        "this machine and a free port from 1 to 65535") from None


def main(config):
    if st is None:
        raise UserError("no streamlit here; run `pip install -r extras/requirements.txt`")
    if st.runtime.exists():  # it is streamlit that runs this file
        if parser := sys.modules.get("starlette.formparsers"):
            parser.MultiPartParser.spool_max_size = 2 * MEGABYTES << 20  # else through a file on disk
        try:
            return show_page(config)
        except UserError as error:
            return st.error(str(error))
    open_trained_run(config.run, config.checkpoint)  # say now what is wrong
    settings = {**server_settings(config), "server.port": config.port, "server.headless": True,
                "server.fileWatcherType": "none", "client.toolbarMode": "minimal", "theme.base": "light",
                "theme.primaryColor": "#0b5c7a", "theme.secondaryBackgroundColor": "#f2f6f8"}
    flags = [f"--{name}={str(value).lower()}" for name, values in settings.items()
             for value in (values if isinstance(values, list) else [values])]
    require_address(config)
    from streamlit.web import cli
    host = f"[{config.address}]" if ":" in config.address else config.address
    print(f"demo.py: the page is at http://{host}:{config.port}; Ctrl-C ends it", flush=True)
    stay_here(config.address)
    cli.main(["run", __file__, *flags, "--", *sys.argv[1:]])


if __name__ == "__main__":
    run(main, parse_command_line(Config))
