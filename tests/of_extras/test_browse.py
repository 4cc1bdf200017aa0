"""
extras/look/browse.py: its page in a browser, without which those tests are skipped, and bad input.

What the page counts, orders and draws is compared with what Python finds in the files. Answers are
hostile: they must be shown as they are, and nothing of them may run.
"""

import base64
import functools
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import Record, View
from plumbing.flags import UserError
from plumbing.shards import PROMPT_VERSION, SHARD_VERSION, Shard
from prepare.datasets import Dataset
from prepare.questions import train_sample_tokenizer
from prepare.shards import write_dataset
from tasks import boxes
from tasks.evaluations import write_evaluation
from tasks.vqa import bleu1, exact_match

ROOT = Path(__file__).resolve().parent.parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync").split()
HOSTILE = ("</script><script>window.ran = 1</script>", '<img src=x onerror="window.ran = 1">',
           "<!-- <script>", "\"quoted\" 'twice' &lt;b&gt; \\u003c ${window.ran = 1} `x`",
           "жёлтый \u2028 \u202eabc 肺 \U0001fac1", "pneumono" * 60, "")
# (dataset, image, type, question, references, model, shuffled image, question only, seen in training)
ROWS = [
    ("scans", 0, "organ", "which organ is it?", ("left lung",), "lung", "left lung", "lung", ""),
    ("scans", 1, "yes/no", "is it broken?", ("yes",), "yes", "no", "yes", "words"),
    ("scans", 0, "organ", HOSTILE[0], (HOSTILE[1],), HOSTILE[0], HOSTILE[2], "lung", "image"),
    ("scans", 2, "yes/no", "is it round?", ("no",), "no", "no", "no", "words and image"),
    ("scans", 1, HOSTILE[1], HOSTILE[3], (HOSTILE[4],), HOSTILE[4], HOSTILE[3], "lung", ""),
    ("scans", 0, "yes/no", "is it long?", ("yes", "rather", "a b"), "Rather", HOSTILE[5], "no", "words"),
    ("scans", 2, "organ", "which part?", ("the upper lobe of it",), HOSTILE[6], "upper", "lobe", ""),
    ("slides", 0, "", "what stain?", ("h&e",), HOSTILE[5], "h&e", None, "image"),
    ("slides", 1, "yes/no", "is it a cell?", ("yes",), "yes", "no", None, ""),
    ("slides", 0, "yes/no", "is it green?", ("no",), "yes", "no", None, "words"),
    ("slides", None, "", "does it help?", ("maybe",), "maybe", "yes", None, ""),
    ("slides", 1, "organ", "what tissue is it?", ("liver mass",), "liver", "lung mass", None, "image")]


tokenizer = functools.cache(train_sample_tokenizer)


@functools.cache
def picture(*seed):
    pixels = np.random.default_rng(list(repr(seed).encode())).integers(0, 256, (5, 5, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((300, 300)).save(stream, "PNG")
    return stream.getvalue()


def write_shard(shards_dir, name, rows, resize="squash", task=""):
    """A prepared test split of (image or None, type, question, answer), or of Records."""
    records = []
    for number, row in enumerate(rows):
        if isinstance(row, Record):
            records.append(("test", row))
            continue
        image, kind, question, answer = row
        content = None if image is None else picture(image, name)
        words = (f"{name}{number}.png", "") if content else ("", "We tried <b>it</b>.")
        records.append(("test", Record(f"id{number}", question, answer, content, *words, kind)))
    dataset = Dataset(name=name, read=lambda raw: iter(records), kind="text questions", licence="none",
                      access="open", megabytes=0, page="", layouts=(), counts={}, task=task)
    manifest = {"dataset": name, "task": task, "shard_version": SHARD_VERSION, "prompt_version": PROMPT_VERSION,
                "limit": 0, "licence": "none",
                "image": {"size": 256, "resize": resize, "codec": "png", "quality": 0}}
    write_dataset(shards_dir / name, dataset, shards_dir, {}, tokenizer(), manifest, 1)
    return Shard(shards_dir / name / "test").read_records()


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def browse():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))  # the script replaces the first
        spec = importlib.util.spec_from_file_location("browse", ROOT / "extras" / "look" / "browse.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "browse", module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def made(browse, tmp_path_factory):
    """(folder with out/ and shards/, the lines of predictions.jsonl, of the baselines)"""
    folder = tmp_path_factory.mktemp("browse")
    files = [[], [], []]
    for name in ("scans", "slides"):
        rows = [row for row in ROWS if row[0] == name]
        records = write_shard(folder / "shards", name, [(*row[1:4], row[4][0]) for row in rows])
        for row, record in zip(rows, records, strict=True):
            line = {"dataset": f"{name}/test", "seen": row[8], "references": list(row[4])} | {
                key: record[key] for key in ("id", "image", "question", "answer", "type")}
            if len(row[4]) == 1:
                del line["references"]
            for lines, prediction in zip(files, row[5:8]):
                if prediction is not None:  # eval_vqa.py leaves out a dataset, never single questions
                    lines.append(line | {"prediction": prediction})
    for name, lines in zip(("", "_image_shuffled", "_question_only"), files):
        write_lines(folder / "out" / "mine" / f"predictions{name}.jsonl", lines)
    browse.main(browse.Config(run=str(folder / "out/mine"), shards_dir=str(folder / "shards")))
    return folder, *files


def scores(line):
    references = line.get("references", [line["answer"]])
    return [max(metric(line["prediction"], text) for text in references)
            for metric in (bleu1, exact_match)]


def content_of(page):
    """What is embedded in a page, read as a browser does: up to the first "</script"."""
    return json.loads(re.search(r'id="data">(.*?)</script', page.read_text(encoding="utf-8"), re.S)[1])


# ----------------------------------------------------------------------------- in a browser

@pytest.fixture(scope="module")
def chromium():
    driver = pytest.importorskip("playwright.sync_api", reason="no playwright here")
    if not CHROMIUM:
        pytest.skip("no chromium here")
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """visit(path, width) -> the page. In the end no error was logged, nothing ran or was fetched."""
    said, asked, contexts = [], [], []

    def open_page(path, width=1280, **settings):
        contexts.append(chromium.new_context(viewport={"width": width, "height": 800}, **settings))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url.partition("#")[0]))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        for page in context.pages:
            assert page.evaluate("window.ran") is None
            assert page.locator("script").count() == 2
            assert {url for url in asked if not url.startswith("data:image/jpeg;")} == {
                page.url.partition("#")[0]}
        context.close()
    assert said == []


def shown(page):
    """[(dataset, id)] of the questions that are drawn, in their order."""
    texts = [re.split(r"\s+\u00b7\s+", text) for text in page.locator(".meta").all_text_contents()]
    return [(parts[0], next(part for part in parts if re.fullmatch(r"id\d+", part))) for parts in texts]


def check_view(page, lines, total):
    """The page shows these lines, and the status their number and mean scores."""
    assert sorted(shown(page)) == sorted((line["dataset"], line["id"]) for line in lines)
    status = page.locator("#status").inner_text()
    assert status.startswith(f"{len(lines):,} of {total:,} questions")
    found = re.findall(r"([\d.]+)(?: BLEU-1|% exact)", status)
    wanted = 100 * np.mean([scores(line) for line in lines], axis=0) if lines else []
    assert [float(number) for number in found] == pytest.approx(list(wanted), abs=0.0501)
    assert page.locator("#none").is_visible() == (not lines)


def test_filters_show_what_python_finds(made, visit):
    folder, lines, shuffled, _ = made
    page = visit(folder / "out/mine/answers.html")
    right = {id(line): scores(line)[1] == 1 for line in lines}
    other = {id(line): scores(blind)[1] == 1 for line, blind in zip(lines, shuffled, strict=True)}

    def contains(text):
        return lambda x: any(text.strip().lower() in part.lower() for part in (
            x["question"], x["prediction"], *x.get("references", [x["answer"]])))

    conditions = {
        "show": {"right": lambda x: right[id(x)], "wrong": lambda x: not right[id(x)]},
        "dataset": {name: lambda x, name=name: x["dataset"] == name
                    for name in ("scans/test", "slides/test")},
        "type": {kind or "none": lambda x, kind=kind: x["type"] == kind
                 for kind in ("organ", "yes/no", HOSTILE[1], "")},
        "image": {"helped": lambda x: right[id(x)] and not other[id(x)],
                  "hurt": lambda x: other[id(x)] and not right[id(x)]},
        "seen": {"no": lambda x: not x["seen"], "yes": lambda x: x["seen"],
                 "image": lambda x: x["seen"] == "image",
                 "words and image": lambda x: x["seen"] == "words and image"},
        "text": {text: contains(text) for text in (
            "lung", " IS it ", "<script>", "жёлтый", "a b", "no such words")}}

    def choose(name, value):
        if name == "show":
            page.locator(f"[name=show][value={value}]").check(force=True)
        elif name == "text":
            page.fill("[name=text]", value)
        else:
            page.select_option(f"[name={name}]", value)

    check_view(page, lines, len(lines))
    sizes = set()
    for name, value in ((name, value) for name, values in conditions.items() for value in values):
        choose(name, value)
        found = [line for line in lines if conditions[name][value](line)]
        check_view(page, found, len(lines))
        sizes.add(len(found))
        page.click("#reset")
        check_view(page, lines, len(lines))
    assert sizes >= {0, 1, 2, 3, 5}
    assert {option for option in page.locator("[name=type] option").evaluate_all(
        "all => all.map(one => one.value)")} == {"", *conditions["type"]}
    chosen = {"show": "wrong", "dataset": "slides/test", "seen": "yes", "text": "is"}
    conditions["text"]["is"] = contains("is")
    for name, value in chosen.items():
        choose(name, value)
    found = [x for x in lines if all(conditions[name][value](x) for name, value in chosen.items())]
    assert len(found) == 2
    check_view(page, found, len(lines))


def test_questions_stand_under_their_image_or_the_worst_first(made, visit):
    folder, lines, *_ = made
    page = visit(folder / "out/mine/answers.html")
    names = [[shown.split("  ")[0] for shown in card.locator(".meta").all_text_contents()]
             for card in page.locator(".card").all()]
    assert [len(card) for card in names] == [3, 2, 2, 2, 2, 1]  # in the order of the first question
    assert page.locator(".card img").count() == 5 and page.locator(".card.text details").count() == 1
    order = (0, 2, 5, 1, 4, 3, 6, 0, 2, 1, 4, 3)
    assert [number for _, number in shown(page)] == [f"id{n}" for n in order]
    for image in page.locator(".card img").all():
        assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") == 224
    page.select_option("[name=sort]", "worst")
    of = {(line["dataset"], line["id"]): scores(line)[0] for line in lines}
    found = [of[key] for key in shown(page)]
    assert found == sorted(of.values()) and found[0] < found[-1]


def test_texts_are_shown_as_they_are_and_nothing_runs(made, visit):
    folder, lines, shuffled, question_only = made
    page = visit(folder / "out/mine/answers.html")

    def texts(selector):
        return sorted(page.locator(selector).all_text_contents())

    assert texts("h2") == sorted(line["question"] for line in lines)
    assert texts(".reference .text") == sorted(
        text for line in lines for text in line.get("references", [line["answer"]]))
    assert texts(".model .text") == sorted(line["prediction"] for line in lines if line["prediction"])
    assert texts(".model .empty") == ["no answer"]
    assert texts(".blind .text") == sorted(line["prediction"] for line in shuffled + question_only)
    assert texts("details .text") == ["We tried <b>it</b>."]
    assert texts(".model.right b") == ["right"] * sum(scores(line)[1] == 1 for line in lines)
    assert page.locator("h1").inner_text() == page.title() == "Answers of mine"
    assert "not for clinical use" in page.locator("header").inner_text()
    blind = page.locator("#blind").inner_text()  # of what is shown; the other baseline lacks a dataset
    assert "Shuffled image" in blind and "Question only" not in blind
    page.select_option("[name=dataset]", "scans/test")
    wanted = 100 * np.mean([scores(line)[1] for line in question_only])
    assert f"{wanted:.1f}% exact" in page.locator("#blind").inner_text().partition("Question only")[2]


def test_what_is_no_part_of_the_page_may_neither_load_nor_run(made, chromium):
    page = chromium.new_page()
    page.goto((made[0] / "out/mine/answers.html").as_uri())
    page.evaluate("""() => { document.body.insertAdjacentHTML("beforeend",
        '<img src="data:x" onerror="window.ran = 1"><iframe srcdoc="x"></iframe>');
        const script = document.createElement("script");
        script.text = "window.ran = 1";
        document.body.append(script); }""")
    page.wait_for_timeout(100)
    assert page.evaluate("window.ran") is None
    assert page.evaluate("fetch('data:text/plain,x').then(() => 'came', () => 'refused')") == "refused"
    page.close()


def test_an_image_is_enlarged_and_closed_by_mouse_and_keys(made, visit):
    page = visit(made[0] / "out/mine/answers.html")
    picture, large = page.locator(".picture").nth(1), page.locator("#large")
    picture.click()
    assert large.is_visible()
    assert large.locator("img").get_attribute("src") == picture.locator("img").get_attribute("src")
    assert large.locator("img").bounding_box()["width"] > 2 * picture.bounding_box()["width"]
    assert "scans1.png" in large.inner_text()
    page.keyboard.press("Escape")
    assert not large.is_visible()
    assert picture.evaluate("node => node === document.activeElement")  # back where one was
    for close in (lambda: page.keyboard.press("Enter"), large.locator("img").click,
                  large.locator("button").click, lambda: page.mouse.click(5, 5)):
        picture.focus()
        page.keyboard.press("Enter")
        assert large.is_visible()
        close()
        assert not large.is_visible()


def test_every_control_is_reached_by_keys(made, visit):
    folder, lines, *_ = made
    page = visit(folder / "out/mine/answers.html")
    reached = []
    for _ in range(9):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(
            "(({name, id, className}) => name || id || className)(document.activeElement)"))
    assert reached == ["show", "dataset", "type", "image", "seen", "sort", "text", "reset", "picture"]
    page.locator("[name=show]").first.focus()
    page.keyboard.press("ArrowRight")
    check_view(page, [line for line in lines if scores(line)[1] == 1], len(lines))
    assert all(page.locator(".card img").evaluate_all("all => all.map(one => one.alt !== '')"))


def test_the_address_keeps_the_view(made, visit):
    folder, lines, *_ = made
    page = visit(folder / "out/mine/answers.html")
    page.locator("[name=show][value=wrong]").check(force=True)
    page.select_option("[name=type]", HOSTILE[1])
    page.select_option("[name=sort]", "worst")
    page.fill("[name=text]", "50% & #1=ä")
    view = page.evaluate("location.href")
    page.fill("[name=text]", "")
    page.select_option("[name=type]", "organ")
    before = page.locator("#list").inner_text()
    page.reload()
    assert page.locator("#list").inner_text() == before
    assert page.locator("[name=show]:checked").input_value() == "wrong" and len(shown(page)) == 4
    page.evaluate("view => { location.href = view }", view)
    page.locator("#none").wait_for()
    assert page.input_value("[name=text]") == "50% & #1=ä"
    assert page.input_value("[name=type]") == HOSTILE[1]
    for odd in ("#show=x&type=none%20such&image=&sort=1&length=7&__proto__=1&constructor=x", "#%ff&&="):
        page.evaluate("hash => { location.hash = hash }", odd)
        page.locator(".card").first.wait_for()
        check_view(page, lines, len(lines))
        assert page.locator("select").evaluate_all("all => all.every(one => one.selectedIndex === 0)")


@pytest.mark.parametrize("width", [320, 390, 800, 1280])
def test_no_width_needs_scrolling_sideways(made, visit, width):
    page = visit(made[0] / "out/mine/answers.html", width, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = page.locator("form *, .scores *, .card *").evaluate_all(
        "all => all.map(one => one.getBoundingClientRect()).map(box => [box.left, box.right])")
    assert len(boxes) > 200
    assert min(left for left, _ in boxes) >= 0 and max(right for _, right in boxes) <= width
    page.locator(".picture").first.click()
    box = page.locator("#large").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] + box["height"] <= 800


def test_thousands_of_questions_are_drawn_as_they_are_asked_for(browse, visit, tmp_path):
    rows = [(n % 7 and n % 3, "what", f"question {n}?", "yes") for n in range(4000)]
    records = write_shard(tmp_path / "shards", "many", rows)
    write_lines(tmp_path / "run" / "predictions.jsonl", [
        {key: record[key] for key in ("id", "image", "question", "answer", "type")}
        | {"dataset": "many/test", "prediction": "yes" if n % 4 else "no"}
        for n, record in enumerate(records)])
    browse.main(browse.Config(run=str(tmp_path / "run"), shards_dir=str(tmp_path / "shards")))
    assert len(content_of(tmp_path / "run/answers.html")["images"]) == 3
    page = visit(tmp_path / "run" / "answers.html")
    assert page.locator("#status").inner_text() == "4,000 of 4,000 questions, 75.0 BLEU-1, 75.0% exact"
    assert len(shown(page)) == 60 and page.evaluate("document.querySelectorAll('*').length") < 2000
    for name in ("dataset", "type", "image", "seen"):  # nothing to choose
        assert page.locator(f"[name={name}]").count() == 0
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    page.locator(".question").nth(60).wait_for()
    page.wait_for_timeout(200)
    assert len(shown(page)) == 120  # no more than was asked for
    page.locator("#more").focus()
    assert page.locator(".bar").bounding_box()["y"] == 0  # the filters stay in reach
    drawn = len(shown(page))
    page.keyboard.press("Enter")
    assert len(shown(page)) > drawn and len(set(shown(page))) == len(shown(page))
    page.locator("[name=show][value=wrong]").check(force=True)
    assert len(shown(page)) == 60 and page.locator("#more").inner_text() == "Show more (940 left)"
    bar, first = (page.locator(name).first.bounding_box() for name in (".bar", ".card"))
    assert bar["y"] + bar["height"] <= first["y"] < 800  # the new list from its top, below what sticks


# ----------------------------------------------------------------------------- boxes

TRUE = [((0.1, 0.2, 0.3, 0.4),), (), ((0.5, 0.5, 0.9, 0.7), (0, 0, 0.2, 0.2)), ((0.1, 0.1, 0.2, 0.2),), (),
        ((0.2, 0.2, 0.4, 0.4),)]  # of each question, shares of the image
FOUND = [[[100, 200, 300, 400]], [], [[500, 500, 900, 700]], "a cell", [[1, 2, 3, 4]], [[250, 200, 450, 400]]]
F_IOU = [100, 100, 200 / 3, 0, 0, 60]


@pytest.fixture(scope="module")
def boxed(browse, tmp_path_factory):
    """A page of six questions of boxes, beside one about words, whose images are twice as wide as high."""
    folder, stream = tmp_path_factory.mktemp("boxes"), io.BytesIO()
    Image.open(io.BytesIO(picture("wide"))).resize((400, 200)).save(stream, "PNG")
    rows = [Record(f"id{n}", boxes.ask("<i>cell"), "", stream.getvalue(), "wide.png", type="cell",
                   boxes={"<i>cell": true}) for n, true in enumerate(TRUE)]
    files = [], []
    for name, some in (("cells", rows), ("words", [(0, "", "what is it?", "a cell")])):
        records = write_shard(folder / "shards", name, some, "fit")
        for n, record in enumerate(records):
            answer = FOUND[n] if name == "cells" else "a cell"
            answer = answer if isinstance(answer, str) else boxes.write({"<I>Cell": answer})
            for lines, text in zip(files, (answer, "<i>cell <box>[]</box>")):
                lines.append({"dataset": f"{name}/test", "prediction": text} | record)
    for name, lines in zip(("", "_image_shuffled"), files):
        write_lines(folder / f"run/predictions{name}.jsonl", lines)
    browse.main(browse.Config(run=str(folder / "run"), shards_dir=str(folder / "shards")))
    return folder / "run/answers.html"


def test_f_iou_is_that_of_the_scores_and_filters_and_sorts(boxed, visit):
    page = visit(boxed)
    questions = content_of(boxed)["questions"]
    assert [question["answers"][0].get("f_iou") for question in questions[:6]] == pytest.approx(F_IOU, abs=0.01)
    assert questions[3]["answers"][0]["boxes"] is None and questions[1]["answers"][0]["boxes"] == []
    assert "f_iou" not in questions[6]["answers"][0] and questions[6]["boxes"] is None
    status = page.locator("#status")
    assert status.inner_text() == f"7 of 7 questions, 100.0 BLEU-1, 100.0% exact, {np.mean(F_IOU):.1f} F-IoU"
    for value, wanted in (("0 0", [3, 4]), ("0.01 29.99", []), ("30 70", [2, 5]), ("70.01 100", [0, 1])):
        page.select_option("[name=f_iou]", value)
        assert shown(page) == [("cells/test", f"id{n}") for n in wanted]
    page.click("#reset")
    page.select_option("[name=image]", "helped")
    assert shown(page) == [("cells/test", "id0"), ("cells/test", "id2"), ("cells/test", "id5"), ("words/test", "id0")]
    page.select_option("[name=image]", "hurt")
    assert shown(page) == [("cells/test", "id4")]  # of the shuffled image, that there is none
    page.click("#reset")
    page.select_option("[name=sort]", "worst")
    assert [number for _, number in shown(page)] == ["id3", "id4", "id5", "id2", "id0", "id1", "id0"]
    page.click("#reset")
    page.locator("[name=show][value=right]").check(force=True)
    assert shown(page) == [("words/test", "id0")]  # boxes are neither right nor wrong
    assert page.locator(".verdict").first.inner_text().startswith("BLEU-1")


def test_boxes_are_drawn_where_they_are(boxed, visit):
    page = visit(boxed)
    assert page.locator(".verdict").nth(6).inner_text() == "unreadable, F-IoU 0"
    page.wait_for_function("[...document.querySelectorAll('.boxed')].every(one => one.style.width)")

    def drawn(frame):
        image, kinds = frame.locator("img").bounding_box(), {}
        assert image["width"] == pytest.approx(2 * image["height"], abs=1)  # its own shape, nothing beside it
        for box in frame.locator(".box").all():
            place = box.bounding_box()
            x, y = (1000 * (place[axis] - image[axis]) / image[size]
                    for axis, size in (("x", "width"), ("y", "height")))
            wide, high = (1000 * place[size] / image[size] for size in ("width", "height"))
            kinds.setdefault(box.get_attribute("class").split()[1], []).append([x, y, x + wide, y + high])
        return kinds

    for frame in (page.locator(".card").nth(5).locator(".boxed"), page.locator("#large figure")):
        if frame.count() == 0 or not frame.is_visible():
            page.locator(".picture").nth(5).click()
            page.wait_for_function("document.querySelector('#large figure').style.width")
        kinds = drawn(frame)
        assert kinds["found"] == pytest.approx(np.array([[250, 200, 450, 400]]), abs=1)
        assert kinds["true"] == pytest.approx(np.array([[200, 200, 400, 400]]), abs=1)
    page.locator("#large button").click()
    assert {kind: len(some) for kind, some in drawn(page.locator(".card").nth(2).locator(".boxed")).items()} == {
        "true": 2, "found": 1}
    assert page.locator(".card").nth(3).locator(".box.found").count() == 0
    looks = page.locator(".card").nth(5).locator(".box, .key i").evaluate_all(
        "all => all.map(getComputedStyle).map(style => style.borderTopStyle + ' ' + style.borderTopColor)")
    assert looks[:2] == looks[:1:-1] and len(set(looks)) == 2  # truth and answer, as the key has them
    page.locator(".picture").nth(6).click()  # about words: as ever
    assert page.locator("#large .box").count() == 0 and page.locator("#large .boxed").count() == 0


@pytest.mark.parametrize("how", ["crop", "pad", "squash"])
def test_boxes_of_images_that_are_not_stored_whole_are_not_drawn(how, browse, tmp_path, visit):
    [record] = write_shard(tmp_path, "cells", [
        Record("id0", "detect cell", "", picture(0), "a.png", boxes={"cell": TRUE[0]})], how)
    line = {"dataset": "cells/test", "prediction": record["answer"]} | record
    write_lines(tmp_path / "run/predictions.jsonl", [line])
    browse.main(browse.Config(run=str(tmp_path / "run"), shards_dir=str(tmp_path)))
    page = visit(tmp_path / "run/answers.html")
    assert page.locator(".box").count() == (2 if how == "squash" else 0)
    assert ("not drawn" in page.locator(".figure").inner_text()) == (how != "squash")
    assert page.locator("fieldset").count() == 0  # boxes alone: nothing is right or wrong


# ----------------------------------------------------------------------------- choices and reports

QUESTION = "which <b>drug? A. aspirin B. </ul>heparin C. none"
LIKELY = {"letter": [-1, -2, -3], "whole": [-9, -8, -4.0], "tokens": [9, 4, 1]}  # A; C; A by token
REPORTS = ("The lungs are clear. No effusion.", "the lungs are clear", "no effusion")


@pytest.fixture(scope="module")
def tasks_made(browse, tmp_path_factory):
    """(page of multiple choices, about text alone, and of a report, their lines)."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [Record(f"id{n}", QUESTION, "B. </ul>heparin", choices=("aspirin", "</ul>heparin", "none"))
            for n in range(3)]
    rows.append(Record("id3", "is it?", "maybe", context="We tried.", choices=("yes", "no", "maybe")))
    given = [("(b)", {"likelihoods": {"as asked": LIKELY}}), ("C. none", {"likelihoods": {"as asked": LIKELY}}),
             ("who knows", {}), ("Maybe.", {})]
    files = [], [], []
    for record, (text, note) in zip(write_shard(folder, "exam", rows, task="choices"), given, strict=True):
        line = {"dataset": "exam/test", "image": ""} | record
        files[0].append(line | {"prediction": text} | note)
        files[1].append(line | {"prediction": "A. aspirin" if record["id"] != "id3" else "yes"})
    [record] = write_shard(folder, "films", [(0, "", "describe it", REPORTS[0])], task="reports")
    for lines, text in zip((files[0], files[2]), REPORTS[1:]):
        lines.append({"dataset": "films/test"} | record | {"prediction": text})
    for name, lines in zip(("", "_commonest_option", "_constant_report"), files):
        write_lines(folder / f"run/predictions{name}.jsonl", lines)
    browse.main(browse.Config(run=str(folder / "run"), shards_dir=str(folder)))
    return folder / "run/answers.html", files[0]


def test_choices_and_reports_have_what_their_tasks_say(tasks_made):
    content = content_of(tasks_made[0])
    assert content["rows"] == ["model", "constant report", "commonest option"]
    first, second, third, last, report = content["questions"]
    assert first["choice"] == {"stem": "which <b>drug?", "right": 1,
                               "options": ["A. aspirin", "B. </ul>heparin", "C. none"]}
    assert last["choice"] == {"stem": "is it?", "right": 2, "options": ["yes", "no", "maybe"]}
    readings = {"letter": 0, "whole": 2, "by token": 0}
    assert [question["answers"][0] for question in (first, second, third, last)] == [
        {"text": "(b)", "option": 1, "exact": True, "readings": readings},
        {"text": "C. none", "option": 2, "exact": False, "readings": readings},
        {"text": "who knows", "option": None, "exact": False, "readings": {}},
        {"text": "Maybe.", "option": 2, "exact": True, "readings": {}}]
    assert [one["option"] for one in first["answers"][2:]] == [0] and first["answers"][1] is None
    assert report["choice"] is None and report["answers"][2] is None
    scores = [answer.pop("rouge_l") for answer in report["answers"][:2]]
    assert scores == [pytest.approx(100 * 2 * (words / 6) / (words / 6 + 1), abs=0.01) for words in (4, 2)]
    assert [answer for answer in report["answers"][:2]] == [{"text": text} for text in REPORTS[1:]]


def test_a_choice_is_read_behind_its_reasoning(browse):
    record = {"id": "1", "question": "which? A. a B. b", "answer": "B. b", "choices": ["a", "b"],
              "reasoning": {"place": "before", "text": "it is"}}
    line = record | {"dataset": "quiz/test", "prediction": "Reasoning: A. is not. Answer: B. b"}
    assert browse.scored_choice(line, record) == {"option": 1, "exact": True, "readings": {}}


def test_bad_likelihoods_of_a_choice_are_refused(browse, tasks_made, tmp_path):
    page, lines = tasks_made
    odd = lines[0] | {"likelihoods": {"as asked": LIKELY | {"whole": [1]}}}
    write_lines(tmp_path / "run/predictions.jsonl", [odd, *lines[1:]])
    with pytest.raises(UserError, match="exam/test: line 'id0': the likelihoods have not 3 finite numbers as whole"):
        browse.main(browse.Config(run=str(tmp_path / "run"), shards_dir=str(page.parent.parent)))


def test_options_are_marked_and_reports_stand_beside_their_reference(tasks_made, visit):
    page = visit(tasks_made[0])
    assert page.locator("#status").inner_text() == "5 of 5 questions, 50.0% accuracy, 80.0 ROUGE-L"
    assert page.locator("h2").all_text_contents() == ["which <b>drug?"] * 3 + ["is it?", "describe it"]
    marks = [[entry.locator("span.text, .marks").all_text_contents() for entry in some.locator("li").all()]
             for some in page.locator(".options").all()]
    likeliest = "likeliest by letter \u00b7 likeliest by token"
    assert marks[:2] == [
        [["A. aspirin", likeliest], ["B. </ul>heparin", "right \u00b7 the model's answer"],
         ["C. none", "likeliest by whole"]],
        [["A. aspirin", likeliest], ["B. </ul>heparin", "right"],
         ["C. none", "the model's answer \u00b7 likeliest by whole"]]]
    assert marks[3] == [["yes", ""], ["no", ""], ["maybe", "right \u00b7 the model's answer"]]
    assert page.locator(".options li.right").count() == 4
    assert page.locator(".model .verdict").all_text_contents()[2:] == ["unreadablewrong", "right", "ROUGE-L 80"]
    boxes = [page.locator(f"dl.beside dd.{kind}").bounding_box() for kind in ("reference", "model")]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    assert "Constant report" in page.locator("dl.beside").inner_text()
    assert page.locator("#boxes, [name=f_iou]").count() == 0 and page.locator("#choices, #reports").count() == 2
    page.locator("[name=show][value=right]").check(force=True)
    assert shown(page) == [("exam/test", "id0"), ("exam/test", "id3")]  # a report is neither
    page.click("#reset")
    page.select_option("[name=sort]", "worst")
    assert [number for _, number in shown(page)] == ["id1", "id2", "id0", "id0", "id3"]


@pytest.mark.parametrize("width", [320, 800])
def test_options_and_reports_need_no_scrolling_sideways(tasks_made, visit, width):
    page = visit(tasks_made[0], width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


# ----------------------------------------------------------------------------- without one

def test_every_image_is_embedded_once(made):
    folder, lines, *_ = made
    page = folder / "out/mine/answers.html"
    content = content_of(page)
    assert len(content["images"]) == 5 and len(content["questions"]) == len(lines)
    for question, line in zip(content["questions"], lines, strict=True):
        assert [question[key] for key in ("id", "dataset", "question", "seen")] == [
            line[key] for key in ("id", "dataset", "question", "seen")]
        assert question["answers"][0]["bleu1"] == pytest.approx(scores(line)[0], abs=1e-4)
    question = next(q for q in content["questions"] if q["name"] == "slides0.png")
    image = Image.open(io.BytesIO(base64.b64decode(content["images"][question["image"]])))
    assert image.format == "JPEG" and image.size == (224, 224)
    pixels = Shard(folder / "shards/slides/test").read_image(0)
    assert np.abs(np.asarray(image.resize((256, 256)), float) - pixels).mean() < 8
    assert page.read_text(encoding="utf-8").count("<script") == 2  # none out of an answer
    assert not list(page.parent.glob(".*"))


def test_a_study_is_shown_side_by_side_with_what_came_before_its_question(browse, tmp_path):
    """Of a conversation the last turn was answered."""
    views = [View(picture(n, "study"), f"{n}.png", role) for n, role in enumerate(("frontal", "lateral"))]
    write_shard(tmp_path / "shards", "studies", [
        Record("a", "where?", "left", parts=(views[0], "and", views[1]), turns=(("how large?", "2 cm"),)),
        Record("b", "is it?", "yes", picture(0, "study"), "0.png"),
        Record("c", "is it old?", "no", parts=tuple(views))])
    about = {"dataset": "studies/test", "image": "0.png", "type": "", "prediction": "yes"}
    write_lines(tmp_path / "run/predictions.jsonl", [
        {**about, "id": name, "question": question, "answer": answer} for name, question, answer in (
            ("a", "how large?", "2 cm"), ("b", "is it?", "yes"), ("c", "is it old?", "no"))])
    browse.main(browse.Config(run=str(tmp_path / "run"), shards_dir=str(tmp_path / "shards")))
    content = content_of(tmp_path / "run/answers.html")
    assert [(q["image"], q["context"]) for q in content["questions"]] == [
        (0, "[frontal]\nand\n[lateral]\nwhere? left"), (1, ""), (0, "[frontal]\n[lateral]")]
    both, one = (np.asarray(Image.open(io.BytesIO(base64.b64decode(image))), float) for image in content["images"])
    assert both.shape == (224, 448, 3) and one.shape == (224, 224, 3)
    assert np.abs(both[:, :224] - one).mean() < 3 < np.abs(both[:, 224:] - one).mean()


def test_colours_can_be_told_from_what_is_behind_them():
    """4.5 to 1, WCAG's for texts, and 3 to 1 for the borders of controls; light and dark."""
    style = (ROOT / "extras" / "look" / "browse.html").read_text(encoding="utf-8")
    light, dark = (dict(re.findall(r"--([\w-]+): #(\w+)", block)) for block in re.findall(
        r":root \{(.*?)\}", style, re.S))
    assert light.keys() == dark.keys()

    def luminance(colour):
        colour = "".join(2 * digit for digit in colour) if len(colour) == 3 else colour
        parts = [int(colour[n:n + 2], 16) / 255 for n in (0, 2, 4)]
        return np.dot((0.2126, 0.7152, 0.0722), [
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts])

    for colours in (light, dark):
        pairs = [(front, back, 4.5) for front in ("text", "quiet") for back in ("page", "card")]
        pairs += [("right", "right-back", 4.5), ("wrong", "wrong-back", 4.5),
                  ("text", "right-back", 4.5), ("quiet", "right-back", 4.5), ("wrong", "card", 4.5),
                  ("on-accent", "accent", 4.5), ("control", "card", 3), ("accent", "page", 3),
                  ("accent", "card", 3)]
        for front, back, least in pairs:
            low, high = sorted(luminance(colours[name]) for name in (front, back))
            assert (high + 0.05) / (low + 0.05) >= least, (front, back)


@pytest.fixture
def again(browse, made, tmp_path):
    """again(**flags) writes the page of a copy of the run, in tmp_path/out/mine."""
    shutil.copytree(made[0] / "out", tmp_path / "out")
    (tmp_path / "out/mine/answers.html").write_text("the former page")

    def write(**flags):
        flags = {"run": str(tmp_path / "out/mine"), "shards_dir": str(made[0] / "shards")} | flags
        browse.main(browse.Config(**flags))
        return content_of(Path(flags.get("out") or Path(flags["run"]) / "answers.html"))

    return write


def test_first_questions_and_newest_run(again, tmp_path, monkeypatch, capsys):
    content = again(limit=3, out=str(tmp_path / "deep" / "page.html"))
    assert [question["id"] for question in content["questions"]] == ["id0", "id1", "id2"]
    assert content["rows"] == ["model", "image shuffled", "question only"]
    assert len(content["images"]) == 2
    assert "page.html: 3 questions about 2 images" in capsys.readouterr().out
    for name in ("_image_shuffled", "_question_only"):
        (tmp_path / f"out/mine/predictions{name}.jsonl").unlink()
    assert again()["rows"] == ["model"]
    lines = [json.loads(line) for line in (tmp_path / "out/mine/predictions.jsonl").read_bytes().splitlines()]
    (tmp_path / "out/without").mkdir()
    for number, (run, name, prediction) in enumerate([
            ("newer", "scans", "old"), ("newer", "slides", "b"), ("newer", "scans", "new"), ("older", "scans", "c")]):
        place = tmp_path / "out" / run / "eval" / f"{name}_{number}"
        some = [line | {"prediction": prediction} for line in lines if line["dataset"] == f"{name}/test"]
        write_evaluation(place, {"stands_on": {"checkpoint": "0"}, "results": {f"{name}/test": {}}},
                         {"model": some, "image shuffled": some} if number == 1 else {"model": some})
        os.utime(place / "results.json", (number % 3, number % 3))
    monkeypatch.chdir(tmp_path)
    again(run="", out="page.html")
    content = content_of(tmp_path / "page.html")
    assert content["run"] == "newer" and content["rows"] == ["model", "image shuffled"]
    given = {(question["dataset"], question["answers"][0]["text"]) for question in content["questions"]}
    assert given == {("scans/test", "new"), ("slides/test", "b")} and len(content["questions"]) == len(lines)
    assert {question["answers"][1] is None for question in content["questions"]} == {True, False}
    again(run="out/newer/eval/scans_0", out="page.html")  # one alone
    assert {q["answers"][0]["text"] for q in content_of(tmp_path / "page.html")["questions"]} == {"old"}
    with open(tmp_path / "out/newer/eval/slides_1/predictions_image_shuffled.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(UserError, match="slides_1/predictions_image_shuffled.jsonl: damaged, or of another.*; run"):
        again(run="", out="page.html")


def edit(lines, number, **changes):
    lines[number] = json.dumps(json.loads(lines[number]) | changes)


BAD = [  # how the lines are spoiled, what is said of them
    (lambda lines: lines.clear(), "empty"),
    (lambda lines: lines.append("{"), "line 13: no JSON;"),
    (lambda lines: lines.insert(0, ""), "line 1: no JSON;"),
    (lambda lines: lines.append("[" * 100_000), "line 13: no JSON;"),
    (lambda lines: lines.append("\udcff"), "line 13: no JSON;"),
    (lambda lines: lines.append("[1]"), "line 13: no JSON object"),
    (lambda lines: lines.append('{"id": 1, "image": ""}'), "line 13: without id, dataset, question"),
    (lambda lines: edit(lines, 4, prediction=None), "line 5: without prediction"),
    (lambda lines: edit(lines, 4, seen=True), "line 5: without seen"),
    (lambda lines: edit(lines, 4, references=["a", 1]), "line 5: without references"),
    (lambda lines: edit(lines, 4, references="a"), "line 5: without references"),
    (lambda lines: edit(lines, 4, dataset="../../x"), "is not <name>/<split>"),
    (lambda lines: edit(lines, 4, dataset="a\nb/test"), "is not <name>/<split>"),
    (lambda lines: edit(lines, 1, dataset="other/test"), "other/test: not prepared"),
    (lambda lines: lines.append(lines[3]), "line 13: repeats id 'id3' of scans/test"),
    (lambda lines: edit(lines, 1, id="x\n\ud800"), r"scans/test: lacks 1 (id 'x\n\ud800') of 7 "),
    (lambda lines: [edit(lines, n, question="q") for n in range(5)],
     "scans/test: lacks 5 (id 'id0', 'id1', 'id2', ...) of 7 questions")]


@pytest.mark.parametrize("spoil, message", BAD, ids=range(len(BAD)))
def test_bad_answers_are_refused_in_a_line(again, tmp_path, spoil, message):
    path = tmp_path / "out/mine/predictions.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    spoil(lines)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", errors="surrogateescape")
    for blind in path.parent.glob("predictions_*.jsonl"):
        blind.unlink()
    with pytest.raises(UserError) as caught:
        again()
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert "python " in str(caught.value)  # what to do
    assert (path.parent / "answers.html").read_text() == "the former page"


@pytest.mark.parametrize("name", ["image_shuffled", "question_only"])
@pytest.mark.parametrize("spoil, message", [
    (lambda lines: lines.pop(2), "other questions than in predictions.jsonl, 1 (id 'id2')"),
    (lambda lines: edit(lines, 0, id="id99"), "2 (id 'id0', 'id99')"),
    (lambda lines: edit(lines, 0, question="another?"), "1 (id 'id0')"),
    (lambda lines: edit(lines, 0, dataset="other/test"), "2 (id 'id0', 'id0')"),
    (lambda lines: lines.clear(), "empty")])
def test_baselines_of_other_questions_are_refused(again, tmp_path, name, spoil, message):
    path = tmp_path / f"out/mine/predictions_{name}.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    spoil(lines)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        again()
    assert message in str(caught.value) and path.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_written_leaves_nothing(again, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path, tmp_path / "file" / "page.html"):
        before = sorted(tmp_path.rglob("*")) + sorted(tmp_path.parent.glob(".*"))
        with pytest.raises(UserError, match=str(out)):
            again(out=str(out))
        assert sorted(tmp_path.rglob("*")) + sorted(tmp_path.parent.glob(".*")) == before
    with pytest.raises(UserError, match="--limit=-1"):
        again(limit=-1)
    with pytest.raises(UserError, match="none: no predictions.jsonl of an evaluation here.*eval_vqa.py"):
        again(run=str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path / "out" / "mine")
    with pytest.raises(UserError, match="no predictions.jsonl in a run of out/.*eval_vqa.py"):
        again(run="")


def test_the_command_ends_with_2_and_a_line(tmp_path):
    done = subprocess.run([sys.executable, "extras/look/browse.py", f"--run={tmp_path}"], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "predictions.jsonl" in done.stderr
