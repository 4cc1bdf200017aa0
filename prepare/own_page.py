"""
--dry_run: the first samples of one's own data with their pictures, as they would be stored, on a page that any browser
opens and that loads nothing.

The page has the pictures in it, and no script: what a table says is text, whatever it holds.
"""

import base64
import io
from html import escape
from itertools import islice
from pathlib import Path

from PIL import ImageDraw

from data import View
from formats.frames import decode_picture
from plumbing.files import write_whole
from plumbing.flags import UserError
from plumbing.pixels import Unreadable, resize_flags, resize_image
from prepare.shards import clean_record
from tasks.boxes import plain

FOLDER = "out"
SAMPLES, PICTURES = 10, 8  # on the page; of a sample
QUALITY, COLOURS = 85, ("#ff3b30", "#34c759", "#0a84ff", "#ffcc00")  # of JPEGs; of boxes, a label each
STYLE = """
:root { color-scheme: light dark; --page: #f3f5f8; --card: #fff; --line: #d8dde5; --text: #1a2230; --quiet: #566072; }
@media (prefers-color-scheme: dark) {
  :root { --page: #10151c; --card: #19202a; --line: #303a48; --text: #e6eaf0; --quiet: #a1acbc; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 0 1.25rem 2rem; background: var(--page); color: var(--text);
       font: 16px/1.45 system-ui, sans-serif; }
h1 { margin: 1.5rem 0 .25rem; font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere; }
.quiet, figcaption, dt, li { color: var(--quiet); font-size: .875rem; }
ul { margin: .5rem 0 1rem; padding-left: 1.2rem; overflow-wrap: anywhere; }
article { margin: 0 0 1rem; padding: 1rem; background: var(--card); border: 1px solid var(--line);
          border-radius: 10px; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(11.5rem, 1fr)); gap: .75rem; }
.pictures + dl { margin-top: .75rem; }
figure { margin: 0; max-width: 14rem; }
img { display: block; width: 100%; border-radius: 6px; }
figcaption { margin-top: .3rem; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: 7rem minmax(0, 1fr); gap: .2rem .75rem; margin: 0; align-items: baseline; }
dd { margin: 0; overflow-wrap: anywhere; white-space: pre-line; unicode-bidi: isolate; }
dd.answer { font-weight: 600; }
table { border-collapse: collapse; margin: .5rem 0; font-variant-numeric: tabular-nums; }
td { padding: .1rem 1.25rem .1rem 0; overflow-wrap: anywhere; }
td + td { text-align: right; }
@media (max-width: 40rem) { dl { grid-template-columns: minmax(0, 1fr); }
  .pictures { grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); } }
"""


def picture(source, image, boxes):
    """
    (img element, "") of what a View shows, as it would be stored; ("", why) where it cannot be. image: ImageSettings;
    boxes: {label: (x1, y1, x2, y2)s in shares}, drawn where they are.
    """
    if source is None:
        return "", "missing"
    try:
        shown = decode_picture(source)
        draw = ImageDraw.Draw(shown)
        for number, some in enumerate(boxes.values()):
            for x1, y1, x2, y2 in some:
                draw.rectangle((x1 * shown.width, y1 * shown.height, x2 * shown.width, y2 * shown.height),
                               outline=COLOURS[number % len(COLOURS)], width=max(1, min(shown.size) // 80))
        shown = resize_image(shown, image.size, image.resize)
    except Unreadable as error:
        return "", str(error)
    stream = io.BytesIO()
    shown.save(stream, "JPEG", quality=QUALITY)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}">', ""


def figures(record, image):
    """The pictures of a Record, each with its role and name, up to PICTURES of them."""
    views = record.views() or ([View(None, record.image_name)] if record.image_name else [])
    for view in views[:PICTURES]:
        shown, why = picture(view.image, image, record.boxes or {})
        role = "" if view.name.endswith(view.role) else view.role  # of a slice both say where it is
        words = " · ".join(filter(None, [role, view.name, why]))
        yield f"<figure>{shown}<figcaption>{escape(words)}</figcaption></figure>"
    if len(views) > PICTURES:
        yield f"<figure><figcaption>and {len(views) - PICTURES:,} more</figcaption></figure>"


def article(split, record, image):
    """One sample."""
    words = clean_record(record)
    rows = [("text", part) for part in words.parts if isinstance(part, str)]
    rows += [("context", words.context)]
    for question, answer in ((words.question, words.answer), *words.turns):
        rows += [("question", question), ("answer", answer)]
    rows += [("labels", ", ".join(words.labels) or "none of them")] if words.labels is not None else []
    rows += [("boxes", ", ".join(f"{len(some)} {plain(label)}" for label, some in words.boxes.items()))
             ] if words.boxes else []
    rows += [("reasoning", words.reasoning), ("type", words.type), ("split", split), ("group", words.group),
             ("study", words.study)]
    cells = "".join(f'<dt>{name}</dt><dd class="{name}">{escape(text)}</dd>' for name, text in rows if text)
    return f'<article><div class="pictures">{"".join(figures(record, image))}</div><dl>{cells}</dl></article>'


def write_page(name, path, image, notes, counts, samples):
    """
    Write out/own_<name>.html and return its path. path: of the data; image: ImageSettings; notes: lines about how it
    was understood; counts: {what: number}; samples: (split, Record)s, of which the first ten are shown, their Views
    with pictures. Raises UserError where it cannot be written.
    """
    rows = "".join(f"<tr><td>{escape(what)}</td><td>{count:,}</td></tr>" for what, count in counts.items() if count)
    shown = [article(split, record, image) for split, record in islice(samples, SAMPLES)]
    lines = "".join(f"<li>{escape(note)}</li>" for note in notes)
    stored = resize_flags(image.facts()) + (f" --window={image.window}" if image.window else "")
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<title>{escape(name)}</title><style>{STYLE}</style></head><body>
<h1>{escape(name)}: what would be prepared</h1>
<p class="quiet">Of {escape(str(path))}. Nothing is prepared yet. Pictures are shown as they would be stored
({escape(stored)}). The page has patients' pictures in it: treat it as you treat them.</p>
<table>{rows}</table><ul>{lines}</ul>
{"".join(shown)}
</body></html>
"""
    out = Path(FOLDER) / f"own_{name}.html"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, page.encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}") from None
    return out
