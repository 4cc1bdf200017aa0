"""
The page: one run of it for one session, as streamlit makes it at every click. What a visitor has asked, and about what,
is in that session's state, which ends with it.
"""

import html
import itertools
from collections import deque

import numpy as np
from PIL import Image

from extras.share import demo_images, demo_talk
from extras.share.demo_draw import (BOX_COLOURS, STYLE, SURE, coloured, draw_boxes, figures, heat_map, note, patches_of,
                                    picture, plain, table)
from extras.share.demo_server import ADMITTED, Gate, server_settings
from plumbing.flags import UserError
from plumbing.pixels import enough_pixels, most_tiles
from tasks import boxes

try:
    import streamlit as st
except ImportError:
    st = None  # demo.py says so

KEPT = 100  # older answers of a session that stay on the page
ROLE = 200  # letters of a role
BY_HAND = "centre and width"  # a choice beside the windows that have names


# ----------------------------------------------------------------------------- images

def choose_images(loaded):
    """
    (what tells the chosen images from others, [(image, role)], {suggested question: recorded answer}); None while there
    are none. An image is an RGB one of an example, or one of a Scan's sources.
    """
    sources = ["Example", "Your own"] if loaded.examples else ["Your own"]
    if st.radio("Image", sources, horizontal=True, label_visibility="collapsed") == "Example":
        names = [name for name, *_ in loaded.examples]
        name, images, roles, questions = loaded.examples[names.index(st.selectbox("Example", names))]
        return name, list(zip(map(Image.fromarray, images), roles)), questions
    files = st.file_uploader("Images without names or dates on them", accept_multiple_files=True)
    state, ids = st.session_state, tuple(file.file_id for file in files)
    if state.get("files") != ids:
        state.scans = demo_images.find_in([(file.name, file.getvalue()) for file in files], loaded.window,
                                          enough_pixels(loaded.size, loaded.resize))
        state.files, state.units = ids, {}
    scans, refused = state.scans
    if refused:
        st.warning(plain("; ".join(f"{name}: {why}" for name, why in refused.items())))
    if len(scans) > demo_images.MOST:
        raise UserError(f"{len(scans)} images: {demo_images.MOST} are the most that are asked about at a time.")
    chosen = [choose_picture(number, scan, loaded) for number, scan in enumerate(scans, 1)]
    return chosen and ((ids, *chosen), chosen, loaded.questions)


def choose_picture(number, scan, loaded):
    """(one of a Scan's sources, in the window that the visitor wants, and the role)"""
    state, place, role = st.session_state, len(scan.sources) // 2, ""
    key, of = f"{state.files} {number}", f"Image {number}: " if len(state.scans[0]) > 1 else ""
    if of:
        role = st.text_input(f"{of}Role, such as prior or lateral; or nothing", max_chars=ROLE,
                             key=f"role {key}").strip()
    if len(scan.sources) > 1:
        place = scan.labels.index(st.select_slider(f"{of}Shown", scan.labels, scan.labels[place],
                                                   key=f"place {key}"))
    for warning in scan.warnings:
        st.html(note(f"{of}Its files {warning}."))
    if number not in state.units:  # of one slice for all, so that sliders stay as they are
        state.units[number] = demo_images.units_of(scan.sources[len(scan.sources) // 2])
    source = scan.sources[place]
    if units := state.units[number]:
        source = demo_images.in_window(source, choose_window(of, key, units, loaded.window))
    return source, role


def choose_window(of, key, units, trained):
    """A window of an image's physical numbers, as --window writes it. units: what demo_images.units_of gives."""
    low, high, hounsfield = units
    window = st.selectbox(f"{of}Window", [*demo_images.name_windows(hounsfield, trained), BY_HAND],
                          key=f"window {key}")
    if window == BY_HAND:
        step = max(round((high - low) / 200), 1) if high - low > 20 else (high - low) / 200
        centre = st.slider(f"{of}Centre", low, high, (low + high) / 2, float(step), key=f"centre {key}")
        width = st.slider(f"{of}Width", float(step), high - low, high - low, float(step),
                          key=f"width {key}")
        window = f"{centre:.6g}/{width:.6g}"
    if window != trained:
        st.html(note(f"The run was trained on images in the window {trained}; others look unlike those."))
    return window


def begin(name, chosen, loaded):
    """A new conversation about what the visitor has chosen, in place of the last one."""
    state, stored, shown = st.session_state, isinstance(name, str), []
    for source, role in chosen:
        image = source if stored else demo_images.read_picture(source, enough_pixels(loaded.size, loaded.resize))
        shown.append(demo_images.show(image, role, loaded.size, loaded.resize, stored))
        if loaded.classifier:
            with loaded.line.turn(tell_place(st.empty())):
                shown[-1].classes = demo_talk.classify(loaded, image)
    state.conversation = demo_talk.Conversation(loaded.model, loaded.tokenizer, [one.seen for one in shown],
                                                loaded.dtype, [one.role for one in shown])
    state.name, state.shown, state.drawn = name, shown, draw_images(shown)
    state.newest, state.older = None, deque(maxlen=KEPT)


def title(number, shown):
    """What an image is called where there are several: by its number from 0, and its role."""
    role = f", {shown[number].role}" if shown[number].role else ""
    return f"Image {number + 1}{role}" if len(shown) > 1 or role else "The image"


def draw_images(shown):
    """Each image as the model sees it, and the whole of it beside that, as HTML."""
    pairs = []
    for number, one in enumerate(shown):
        name, (height, width) = title(number, shown), one.seen.shape[:2]
        words = f"As the model sees it: {width} × {height} pixels"
        pairs.append((picture(one.seen, f"{html.escape(name)} as the model sees it"),
                      f"{name}. {words}" if len(shown) > 1 else words))
        if one.whole is not None and not np.array_equal(one.whole, one.seen):
            pairs.append((picture(one.whole, f"{html.escape(name)}, the whole of it"),
                          f"{name}, the whole of it" if len(shown) > 1 else "The whole of it"))
    return figures(pairs)


def show_images(shown, loaded):
    """The images of a conversation, what is to be known of their number, and what the classifier says of each."""
    st.html(st.session_state.drawn)
    if len(shown) > 1 and loaded.most is None:
        st.html(note("Whether this run was trained on several images at a time is not known."))
    elif len(shown) > 1 and len(shown) > loaded.most:
        most = "one image" if loaded.most == 1 else f"at most {loaded.most} images"
        st.html(f'<p class="notice">This run was trained on questions about {most} at a time: what it says of '
                f"{len(shown)} is beyond what it has learnt.</p>")
    for number, one in enumerate(shown):
        if one.classes:
            best = max(one.classes, key=one.classes.get)
            rows = [(html.escape(name), f'<progress value="{share:.3f}"></progress>', f"{share:.1%}")
                    for name, share in one.classes.items()]
            of = f"{title(number, shown)}, classifier" if len(shown) > 1 else "Classifier"
            st.expander(plain(f"{of}: {best} {one.classes[best]:.0%}")).html(
                table(rows, f"{loaded.classifier[2]}, which knows these classes alone"))


# ----------------------------------------------------------------------------- answers

def show_boxes(question, text, recorded, shown):
    """
    The boxes of an answer and the recorded ones over a whole image, if it is one of boxes: ({label: pair of both},
    number of the image).
    """
    found, true = boxes.read(text), boxes.read(recorded or "")
    asked = question.lower().startswith(boxes.ask("")) or true is not None
    if found is None and not asked and not demo_talk.writes_boxes(text):
        return {}, 0
    pairs, number = boxes.pair_up(found or {}, true or {}), len(shown) - 1
    if number and pairs:  # the last is the one that a question is about, as a rule
        number = st.radio("An answer does not say which image its boxes are of. Draw them on", range(len(shown)),
                          number, format_func=lambda one: plain(title(one, shown)), horizontal=True)
    whole = shown[number].whole
    counts = ", ".join(f"{label or 'box'}: {len(some)}" for label, (some, _) in pairs.items()) or "no box"
    said = "This answer cannot be read as boxes." if found is None else f"In the answer: {counts}."
    if true is not None:
        said += f" F-IoU with the recorded boxes: {boxes.score({'boxes': true}, text)[boxes.MAIN]:.0f}%."
    if whole is None:
        said += (" Boxes are of the whole image, of which this example is a cropped or padded copy: upload the image "
                 "itself to see them on it.")
        st.html(note(said))
        return {}, 0
    keys = [f'<span class="word key" style="background:{colour}">{html.escape(label or "box")}</span>'
            for label, colour in zip(pairs, itertools.cycle(BOX_COLOURS))]
    lines = [f'<i class="line {kind}"></i>{words}' for kind, words in (
        ("found", "the answer"), ("recorded", "recorded"))[:1 + (true is not None)]]
    st.html(draw_boxes(picture(whole, f"{html.escape(title(number, shown))} with its boxes"), pairs)
            + f'<p class="note">{" ".join(keys)} {" &nbsp; ".join(lines)}</p>{note(said)}')
    return pairs, number


def draw_maps(looked, shown, pairs, boxed, tile):
    """
    Where the model looked on each image, as HTML. looked: of each (N,); pairs: boxes, which image `boxed` has; tile: as
    patches_of takes it.
    """
    patches = [patches_of(one.seen, some, tile) for one, some in zip(shown, looked)]
    low, high, maps = min(some.min() for some in patches), max(some.max() for some in patches), []
    whole = "the whole image" if len(shown) == 1 else "all images"
    for number, (one, some, all_of_it) in enumerate(zip(shown, patches, looked)):
        name = title(number, shown)
        image = picture(heat_map(one.seen, some, low, high), f"{html.escape(name)}, coloured where the model looked")
        maps.append((draw_boxes(image, pairs if number == boxed else {}, one.part),
                     f"{name}: {all_of_it.sum():.0%} of the attention" if len(shown) > 1 else ""))
    return figures(maps) + (
        f'<div class="ramp"></div><p class="note">{low:.1%} to {high:.1%} of its attention on a patch; '
        f"{sum(some.sum() for some in looked):.0%} on {whole}, the rest on words</p>"
        '<p class="note">Attention is not an explanation of the answer.</p>')


def show_details(tokens, words, pairs, boxed, loaded):
    """Where the model looked for an answer, and what else it might have said."""
    def cell(token, probability):
        text = "(end)" if token in loaded.tokenizer.stops else loaded.tokenizer.decode([token]) or "(space)"
        return f"{html.escape(text)} {probability:.1%}"

    state = st.session_state
    chosen = st.pills("Where it looked, for the whole answer or for the word you choose",
                      range(len(words)), key=f"looked {state.asked}",
                      format_func=lambda n: plain(f"{words[n].text} {words[n].probability:.1%}"))
    looked = np.mean([one.looked for one in (tokens if chosen is None else [words[chosen]])], axis=0)
    left, right = st.columns(2) if len(state.shown) == 1 else (st.container(), st.container())
    tile = loaded.size if most_tiles(loaded.resize) else 0
    left.html(draw_maps(state.conversation.parted(looked), state.shown, pairs, boxed, tile))
    legend = [f'<span class="word key" style="background:{colour}">'
              f'{f"from {least:.0%}" if least else "less"}</span>' for least, colour in SURE]
    right.html("".join(legend) + note("How probable it found each word. It can be sure and wrong."))
    rows = [[cell(token.id, token.probability), *(cell(*other) for other in token.runners_up)]
            for token in tokens]
    right.expander("What else it might have said").html(
        table(rows, "Each token of the answer, and the next likely ones in its place"))


def refuse(question, conversation):
    """Say why a question is not asked; whether there is a reason."""
    if not question:
        st.warning("This question is empty: nothing was asked.")
        return True
    count = conversation.count_tokens(question)
    if count > demo_talk.MAX_QUESTION:
        st.warning(f"This question is too long: {len(question):,} characters, which are {count:,} tokens; "
                   f"{demo_talk.MAX_QUESTION} are the most. Nothing was asked. Copy it from here and shorten it:")
        st.code(question, language=None, wrap_lines=True, height=200)
    return count > demo_talk.MAX_QUESTION


def tell_place(place):
    """A function that shows a visitor's place in the line; streamlit ends it there for one who has left."""
    return lambda number: place.html(f'<p class="notice">Your place in line: {number}</p>')


def answer(question, loaded, config, place):
    """(tokens, words) of an answer, shown word by word in its place on the page once it is this visitor's turn."""
    conversation, tokens, words = st.session_state.conversation, [], []
    with loaded.line.turn(tell_place(place)):
        try:
            for token in demo_talk.within(conversation.ask(question), config.seconds):
                tokens.append(token)
                words = demo_talk.words_of(tokens, loaded.tokenizer)
                ended = token.id in loaded.tokenizer.stops
                place.html(coloured(question, words if ended else words[:-1]))  # it may go on
        finally:
            loaded.shelf.use(conversation)
    return tokens, words


def draw_answer(question, tokens, words, recorded, loaded, config):
    """An answer as HTML, with what is to be known of it."""
    cut, remark = tokens[-1].id not in loaded.tokenizer.stops, loaded.familiar.remark(question)
    drawn = coloured(question, words, " …" if cut else "" if words else "(no answer)")
    if cut:
        drawn += note(f"Cut: {demo_talk.MAX_NEW_TOKENS} tokens are the most, of boxes {demo_talk.MAX_BOX_TOKENS}, and "
                      f"{config.seconds} seconds.")
    if remark:
        drawn += note(f"{remark[0].upper()}{remark[1:]}.")
    return drawn + (note(f"Recorded answer: {recorded}") if recorded else "")


def converse(loaded, config, questions):
    """Questions and answers about the images, the newest first. questions: {suggested: recorded answer}"""
    state = st.session_state

    def take_suggestion():
        state.suggestion, state.suggested = state.suggested, None

    about = "this image" if len(state.shown) == 1 else "these images"
    typed = st.chat_input(f"Ask about {about}")  # the browser would drop a paste past max_chars
    if questions:
        st.pills("Or choose a question", list(questions), format_func=plain, key="suggested",
                 on_change=take_suggestion)
    question, newest = typed or state.pop("suggestion", None), st.empty()
    if question is not None and not refuse(question := question.strip(), state.conversation):
        tokens, words = answer(question, loaded, config, newest)
        if state.newest:
            state.older.appendleft(state.newest[0])
        drawn = draw_answer(question, tokens, words, questions.get(question), loaded, config)
        state.newest, state.asked = (drawn, question, tokens, words), state.get("asked", 0) + 1
    if state.newest:
        drawn, question, tokens, words = state.newest
        newest.html(drawn)
        pairs, boxed = show_boxes(question, demo_talk.text_of(tokens, loaded.tokenizer), questions.get(question),
                                  state.shown)
        show_details(tokens, words, pairs, boxed, loaded)
    for drawn in state.older:
        st.html(drawn)
    if len(state.older) == KEPT:
        st.html(note(f"Answers before these {KEPT + 1} are gone."))


# ----------------------------------------------------------------------------- the page

def let_in(config):
    """Whether the visitor may see the page: has typed the password, where there is one."""
    if not config.password_file or st.session_state.get("knows"):
        return True
    with st.form("password", clear_on_submit=True):
        typed = st.text_input("Password", type="password", max_chars=4096)
        sent = st.form_submit_button("Enter")
    if sent and st.cache_resource(Gate, show_spinner=False)(config.password_file).admits(typed):
        st.session_state.knows = True
        ADMITTED.add(st.runtime.scriptrunner.get_script_run_ctx().session_id)
        st.rerun()
    if sent:
        st.error("This is not the password.")
    return False


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
    head = st.empty()
    notice = ('<p class="notice"><b>Research software: not for diagnosis or treatment, not for clinical '
              "use.</b> Its answers may be wrong. Images stay in memory while this page is open.</p>")
    head.html(f'<p class="name">nanoMedQ</p>{notice}')
    if not let_in(config):
        return
    loaded = st.cache_resource(demo_talk.load, show_spinner="Loading the model")(config)
    head.html(f'<p class="name">nanoMedQ</p>{note(loaded.facts)}{notice}')
    left, right = st.columns([2, 3], gap="medium")
    with left:
        if not (chosen := choose_images(loaded)):
            return
        name, pictures, questions = chosen
        if state.get("name") != name:
            begin(name, pictures, loaded)
        show_images(state.shown, loaded)
    with right:
        converse(loaded, config, questions)
