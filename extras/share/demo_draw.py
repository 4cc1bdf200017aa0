"""
What the page draws, as HTML: pictures that hold their pixels themselves, boxes and the map of attention over them, an
answer's words on the colours of their probability.
"""

import base64
import html
import io
import itertools
import re

import numpy as np
from PIL import Image

from plumbing.tiles import map_of_tiles

SURE = (0.9, "#cfe6f2"), (0.7, "#e0efd6"), (0.5, "#fbeec2"), (0, "#f8d3b8")  # probability from, colour
HEAT = (226, 88, 0)  # colour of the map
BOX_COLOURS = ("#56b4e9", "#f0e442", "#f29bc6", "#2fd6a3", "#ff9d5c", "#c9b3ff")  # of labels, in dark letters
NAMED = 8  # boxes of an answer, at most, that bear their labels
STYLE = """<style>
.block-container {padding-top: 1.2rem; max-width: 1180px}
.name {font-size: 1.6rem; font-weight: 650; margin: 0}
.note {color: #55656e; font-size: .85rem; margin: .25rem 0; overflow-wrap: anywhere}
.notice {background: #fdf4e3; border-left: 4px solid #c98a12; padding: .5rem .8rem; margin: .4rem 0 0}
.picture, .ramp {width: 100%; max-width: 22rem; border-radius: 4px; display: block}
.ramp {height: .6rem; background: linear-gradient(to right, #eee, rgb(226, 88, 0))}
.row {display: flex; flex-wrap: wrap; gap: .6rem; align-items: flex-start}
.row figure {flex: 0 1 calc(50% - .3rem); max-width: 22rem; min-width: 0; margin: 0}
.row figure:only-child {flex-basis: 22rem}
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


# ----------------------------------------------------------------------------- pictures

def picture(pixels, words):
    """An <img> that holds the pixels itself, so that the server keeps none."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    content = base64.b64encode(stream.getvalue()).decode()
    return f'<img class="picture" alt="{words}" src="data:image/png;base64,{content}">'


def figures(pairs):
    """Several (HTML of a picture, text under it), two in a row."""
    return '<div class="row">' + "".join(
        f'<figure>{image}<p class="note">{html.escape(words)}</p></figure>' for image, words in pairs) + "</div>"


def part_of(width, height, how):
    """What resize_image leaves of an image: left, top, width and height, in thousandths of the whole one's."""
    side = {"crop": min, "pad": max}.get(how)
    width, height = (1000 * side(width, height) / own if side else 1000 for own in (width, height))
    return 500 - width / 2, 500 - height / 2, width, height


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


# ----------------------------------------------------------------------------- the map

def patches_of(image, looked, tile=0):
    """
    (rows, columns) of the attention (N,) to an image's tokens, without that to a class token: it is nowhere. tile:
    pixels along the squares that it was cut into; 0: into none.
    """
    if tile:
        return map_of_tiles(looked, image.shape[0] // tile, image.shape[1] // tile)
    for patches in (looked, looked[1:]):
        rows = round((len(patches) * image.shape[0] / image.shape[1]) ** 0.5)  # they are squares
        if rows and len(patches) % rows == 0 and rows * image.shape[1] == len(patches) // rows * image.shape[0]:
            return patches.reshape(rows, -1)
    raise ValueError(f"{len(looked)} tokens of an image of {image.shape[:2]} are no squares")


def heat_map(image, patches, low, high):
    """
    An image (H, W, 3) uint8 in grey, its patches (rows, columns) the more in colour the more was looked at them, from
    none of it at `low` on; low and high are those of all images of an answer.
    """
    share = (patches - low).astype(np.float32) / max(high - low, 1e-12)
    share = Image.fromarray(share).resize(image.shape[1::-1], Image.Resampling.NEAREST)
    share = 0.75 * np.asarray(share)[..., None]  # (H, W, 1)
    grey = np.asarray(Image.fromarray(image).convert("L"), np.float32)[..., None]
    return (grey * (1 - share) + np.array(HEAT) * share).round().astype(np.uint8)


# ----------------------------------------------------------------------------- words

def plain(text):
    """A text that streamlit does not take for Markdown, which could name an image elsewhere."""
    return re.sub(r"([^\w\s])", r"\\\1", text)


def note(text):
    return f'<p class="note">{html.escape(text)}</p>'


def coloured(question, words, more=""):
    """A question, and an answer's words on the colours of their probability."""
    colours = [next(colour for least, colour in SURE if word.probability >= least) for word in words]
    spans = [f'<span class="word" style="background:{colour}" title="{word.probability:.1%}">'
             f"{html.escape(word.text)}</span>" for word, colour in zip(words, colours)]
    return (f'<p class="question">{html.escape(question)}</p>'
            f'<p class="answer">{" ".join(spans)}{more}</p>')


def table(rows, words):
    """Rows of cells that are HTML as a table, and a text under it."""
    lines = "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in rows)
    return f'<table class="rows">{lines}</table>{note(words)}'
