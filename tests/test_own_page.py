"""The page of --dry_run: what it shows of samples, and that nothing on it is run or loaded."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from data import Record, View
from plumbing.flags import UserError
from prepare.own_page import write_page
from prepare.shards import ImageSettings

IMAGE = ImageSettings(32, "squash", "jpeg", 97)


def film(grey=90, size=(64, 48)):
    stream, pixels = io.BytesIO(), np.full((size[1], size[0], 3), grey, np.uint8)
    pixels[0] = 255 - grey  # not even
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def page_of(tmp_path, monkeypatch):
    """page_of(*records) -> (the page without its pictures, its pictures as (H, W, 3))"""
    monkeypatch.chdir(tmp_path)

    def write(*records, image=IMAGE, notes=(), counts=None):
        path = write_page("mine", tmp_path / "<scans>", image, list(notes), counts or {},
                          (("train", record) for record in records))
        assert str(path) == "out/own_mine.html" and [file.name for file in (tmp_path / "out").iterdir()] == [path.name]
        page = path.read_text(encoding="utf-8")
        found = re.findall('src="data:image/jpeg;base64,([^"]*)"', page)
        return re.sub("base64,[^\"]*", "", page), [np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
                                                  for text in found]

    return write


def test_a_sample_has_its_pictures_with_roles_and_its_words(page_of):
    parts = ("Indication: cough", View(film(10), "a.png", "prior frontal"), View(film(200), "b.png", "frontal"))
    page, shown = page_of(Record("1", "what has changed?", "less fluid", parts=parts, group="patient 0123456789abcdef",
                                 turns=(("where?", "left"),)), notes=["a note"], counts={"patients": 1234, "boxes": 0})
    assert [round(pixels[8:].mean()) for pixels in shown] == [10, 200] and shown[0].shape == (32, 32, 3)
    for words in ("prior frontal · a.png", "frontal · b.png", ">Indication: cough<", ">what has changed?<",
                  ">less fluid<", ">where?<", ">left<", ">train<", ">patient 0123456789abcdef<", "<li>a note</li>",
                  "<td>1,234</td>"):
        assert words in page
    assert "boxes" not in page and "--image_size=32 --resize=squash" in page


def test_the_first_ten_samples_are_shown_and_of_a_volume_eight_pictures(page_of):
    volume = Record("v", "what?", "that", parts=tuple(View(film(), "v", f"slice {n} of 40") for n in range(1, 41)))
    page, shown = page_of(volume, *[Record(f"{n}", "what?", "that", film(), "f.png") for n in range(30)])
    assert page.count("<article>") == 10 and len(shown) == 8 + 9
    assert "slice 8 of 40" in page and "slice 9 of 40" not in page and "and 32 more" in page


def test_labels_boxes_and_what_cannot_be_shown(page_of):
    box = Record("b", "detect cyst", "", film(0), "box.png", boxes={"cyst": ((0.25, 0.25, 0.75, 0.75),), "scar": ()})
    page, shown = page_of(Record("l", image=film(), image_name="l.png", labels=("benign", "mass")),
                          Record("n", image=film(), image_name="n.png", labels=()), box,
                          Record("g", "what?", "that", parts=(View(None, "gone.png"),)),
                          Record("u", "what?", "that", b"no image", "broken.png"))
    for words in (">benign, mass<", ">none of them<", ">1 cyst, 0 scar<", "gone.png · missing",
                  "broken.png · no image"):
        assert words in page
    assert len(shown) == 3
    red = (shown[2].astype(int) @ [2, -1, -1] > 60).nonzero()
    assert all(abs(edge.min() - 8) <= 1 and abs(edge.max() - 24) <= 1 for edge in red)


def test_what_a_table_says_is_text(page_of):
    hostile = '"><script>alert(1)</script><img src=http://x.org/a onerror=alert(1)>'
    page, _ = page_of(Record("1", hostile, hostile, parts=(View(film(), hostile, hostile), hostile), labels=(hostile,),
                             group=hostile), notes=[hostile], counts={hostile: 1})
    tags, parser = [], HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.feed(page)
    named = {tag for tag, _ in tags}
    assert "script" not in named and [about["src"][:5] for tag, about in tags if tag == "img"] == ["data:"]
    assert [about["href"] for _, about in tags if "href" in about] == ["data:,"]
    assert not [name for _, about in tags for name in about if name.startswith("on")]
    assert "default-src 'none'; img-src data:" in page


def test_a_page_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="^out/own_mine.html: "):
        write_page("mine", tmp_path, IMAGE, [], {}, [])
