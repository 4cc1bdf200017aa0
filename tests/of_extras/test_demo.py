"""
extras/share/demo.py: its page in a browser, without which those tests are skipped; its command line.

The server of the page may write 1,000 bytes to a file, which no image has, and its home stays empty.
"""

import multiprocessing
import os
import re
import resource
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from extras.share import demo, demo_draw, demo_images, demo_page, demo_server, demo_talk
from model import ViT, normalise
from plumbing.files import sealed
from plumbing.flags import UserError, parse_command_line
from plumbing.flags import run as run_script
from plumbing.shards import Shard
from test_browse import chromium  # noqa: F401, the fixture
from test_demo_images import DATE, PATIENT, ct, encoded
from test_demo_talk import HOSTILE, LONG, QUESTIONS, SIZE, model, some_image, tokenizer  # noqa: F401, fixtures
from test_eval import TOKENIZER, write_questions
from test_model import randomise
from weights import load_classifier, save_classifier, save_vlm
from zoo.classifier import Classifier

ROOT = Path(__file__).resolve().parent.parent.parent
CLASSES = ["no *cyst*", "<b>cyst</b>", "a_cyst_"]


# ----------------------------------------------------------------------------- in a browser

@pytest.fixture(scope="module")
def run(model, tokenizer, tmp_path_factory):  # noqa: F811
    """A run that was trained on one image at a time, and the shards with two images to choose from."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "run").mkdir()
    (folder / "run" / "tokenizer.model").write_bytes(TOKENIZER)
    write_questions(folder / "shards", "scans", {
        "test": [("what is this?", "a lung", 1), (HOSTILE, "no", 1), ("is it large?", "yes", 2)],
        "train": [("what is this?", "a kidney", 3), ("is it large?", "no", 4)]})
    trained = Shard(folder / "shards" / "scans" / "train").describe() | {"leaks": "keep"}
    record = {"image": {"size": SIZE, "resize": "squash"}, "flags": {"data": "scans"}, "tests": {"scans": {}},
              "inputs": {"tokenizer": tokenizer.sha256, "data": {"scans": trained}}}
    for step, loss in ((3, 0.5), (7, 0.6)):
        with sealed(folder / "run" / f"step_{step:06d}", step=step, held_out_loss=loss, **record) as partial:
            save_vlm(model, partial)
    torch.manual_seed(1)
    classifier = Classifier(randomise(ViT(model.vision.config)), 3)
    (folder / "password").write_text("open sesame\n")
    (folder / "seed_0").mkdir()
    with sealed(folder / "seed_0" / "model") as partial:
        save_classifier(classifier, partial, {
            "classes": CLASSES, "thresholds": None, "image": {"size": SIZE, "resize": "squash"}})
    return folder


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(server, port, path=""):
    for _ in range(300):
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}{path}/_stcore/health").close()
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


def words(model, tokenizer, image, question):  # noqa: F811
    tokens = list(demo_talk.Conversation(model, tokenizer, [image], torch.float32).ask(question))
    return [word.text for word in demo_talk.words_of(tokens, tokenizer)]


def test_upload_ask_and_follow_up(visit, run, model, tokenizer):  # noqa: F811
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
    [*tokens] = demo_talk.Conversation(model, tokenizer, [some_image(5)], torch.float32).ask("what is this?")
    probabilities = [f"{word.probability:.1%}" for word in demo_talk.words_of(tokens, tokenizer)]
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
    assert alert.inner_text().strip() == ("a.png: This file is not an image that can be read: no image, or of "
                                          "a format that is not read.")
    assert not page.get_by_placeholder("Ask about this image").count()
    large = tmp_path / "large.png"
    with open(large, "wb") as file:
        file.truncate(60 << 20)
    page.set_input_files("input[type=file]", large)
    page.get_by_text("File must be 20.0MB or smaller.").wait_for()
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1200, 3), np.uint8)
    upload(page, "b.png", encoded(noise))  # 3.6 MB, which must not pass through a file either
    page.get_by_alt_text("The image as the model sees it").wait_for()


def test_a_pasted_text_is_asked_or_comes_back(visit, model, tokenizer):  # noqa: F811
    page = visit()
    for text in ("is it " + "very " * 100 + "large?", "x" * 5000):
        page.get_by_placeholder("Ask about this image").focus()
        page.keyboard.insert_text(text)  # as a paste does
        page.keyboard.press("Enter")
        page.get_by_text(text, exact=True).first.wait_for()
        rest(page)
        if len(text) == 5000:
            said = page.get_by_role("alert").inner_text()
            assert "5,000 characters" in said and "512 are the most. Nothing was asked." in said
        assert len(answers(page)) == 1


def test_sessions_are_apart_and_examples_are_as_prepared(visit, run, model, tokenizer):  # noqa: F811
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


def seen(page):
    """Data of the pictures as the model sees them, in their order, once the page is whole."""
    rest(page)
    return [image.get_attribute("src") for image in page.locator('img[alt$="as the model sees it"]').all()]


def drawn(pixels):
    return re.search('src="(.*?)"', demo_draw.picture(pixels, "")).group(1)


def test_slices_windows_and_roles_are_what_the_model_is_asked_about(visit, model, tokenizer):  # noqa: F811
    series, page = [ct(number) for number in range(3)], visit()
    page.get_by_text("Your own").click()
    files = [("a.png", encoded(some_image(6))), *((f"IM{number}", content) for number, content in enumerate(series))]
    page.set_input_files("input[type=file]", [
        {"name": name, "mimeType": "application/octet-stream", "buffer": content} for name, content in files])
    page.get_by_placeholder("Ask about these images").wait_for()
    (plain, scan), _ = demo_images.find_in(files, "auto", SIZE)
    pictures = [np.array(demo_images.read_picture(source, SIZE)) for source in (*plain.sources, *scan.sources)]
    assert seen(page) == [drawn(pictures[0]), drawn(pictures[2])]  # the middle slice
    assert page.get_by_text("trained on questions about one image at a time: what it says of 2 is").count() == 1
    page.get_by_label("Image 1: Role").fill("prior")
    page.keyboard.press("Enter")
    page.get_by_alt_text("Image 1, prior as the model sees it").wait_for()
    page.get_by_label("Image 2: Window").click()
    page.get_by_role("option", name="lung").click()
    page.get_by_text("The run was trained on images in the window auto").wait_for()
    lung = np.array(demo_images.read_picture(demo_images.in_window(scan.sources[1], "lung"), SIZE))
    assert (lung != pictures[2]).any() and seen(page) == [drawn(pictures[0]), drawn(lung)]
    page.get_by_placeholder("Ask about these images").fill("is it large?")
    page.keyboard.press("Enter")
    page.locator(".question").first.wait_for()
    rest(page)
    asked = demo_talk.Conversation(model, tokenizer, [pictures[0], lung], torch.float32, ["prior", ""])
    words = demo_talk.words_of(list(asked.ask("is it large?")), tokenizer)
    assert answers(page) == {"is it large?": [word.text for word in words]}
    assert page.locator('img[alt*="coloured where the model looked"]').count() == 2
    assert not any(word in page.content() for word in ("Mustermann", "Erika", PATIENT, DATE))


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


def connect(port, origin, host, path=""):
    """The status line of an answer to a page of this origin that wants to talk to the server."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(f"GET {path}/_stcore/stream HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\n"
                           "Connection: Upgrade\r\nSec-WebSocket-Key: MDAwMDAwMDAwMDAwMDAwMA==\r\n"
                           f"Sec-WebSocket-Version: 13\r\nOrigin: {origin}\r\n\r\n".encode())
        return connection.recv(100).decode().split("\r\n")[0]


def test_no_other_machine_is_asked_for_anything(run, tmp_path):
    """Listening on all addresses, streamlit would ask a host elsewhere for this machine's own."""
    pytest.importorskip("streamlit", reason="no streamlit here")
    (tmp_path / "sitecustomize.py").write_text(RECORD.format(path=str(tmp_path / "asked")))
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "extras/share/demo.py", f"--run={run / 'run'}", "--address=0.0.0.0", f"--port={port}",
         f"--password_file={run / 'password'}"],
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
    demo_server.stay_here("127.0.0.1")
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
                                  "client.showErrorDetails", "logger.hideWelcomeMessage", "server.baseUrlPath"])
def test_other_settings_are_refused(name, tmp_path, monkeypatch):
    pytest.importorskip("streamlit", reason="no streamlit here")
    config = demo.Config(run=str(tmp_path / "none"))
    settings = demo_server.server_settings(config)
    assert settings["server.address"] == "127.0.0.1" and len(settings) == 7
    monkeypatch.setattr(demo_page.st, "get_option", lambda one: None if one == name else settings[one])
    said = "start it with `python extras/share/demo.py`" if name else "no checkpoint"
    with pytest.raises(UserError, match=said):
        demo_page.show_page(config)


# ----------------------------------------------------------------------------- behind a proxy, with a password

class Proxy(threading.Thread):
    """A reverse proxy: what is asked of it under /medq it passes on to a port, pages and websockets; else 404."""

    def __init__(self, port):
        super().__init__(daemon=True)
        self.to, self.listener = port, socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.start()

    def run(self):
        while True:
            threading.Thread(target=self.serve, args=(self.listener.accept()[0],), daemon=True).start()

    def serve(self, visitor):
        head = b""
        while b"\r\n\r\n" not in head and (more := visitor.recv(65536)):
            head += more
        if not head.split(b" ")[1:2] or not head.split(b" ")[1].startswith(b"/medq"):
            visitor.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return visitor.close()
        if b"upgrade: websocket" not in head.lower():  # one request a connection
            head = re.sub(rb"(?i)\r\nconnection: [^\r]*", b"", head, count=1).replace(
                b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
        server = socket.create_connection(("127.0.0.1", self.to))
        server.sendall(head)
        threading.Thread(target=self.pass_on, args=(visitor, server), daemon=True).start()
        self.pass_on(server, visitor)

    def pass_on(self, one, other):
        try:
            while content := one.recv(65536):
                other.sendall(content)
            other.shutdown(socket.SHUT_WR)
        except OSError:  # either has gone
            pass


@pytest.fixture(scope="module")
def proxy(run, tmp_path_factory):
    """The port of a proxy before a demo with a password; in the end the demo has printed nothing that was typed."""
    pytest.importorskip("streamlit", reason="no streamlit here")
    port, home = free_port(), tmp_path_factory.mktemp("home")
    server = subprocess.Popen(
        [sys.executable, "extras/share/demo.py", f"--run={run / 'run'}", f"--shards_dir={run / 'shards'}",
         f"--port={port}", "--base_path=/medq", "--public_name=medq.example", f"--password_file={run / 'password'}"],
        cwd=ROOT, env={**os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)
    try:
        wait_for(server, port, "/medq")
        yield Proxy(port).port
    finally:
        server.terminate()
        said = server.communicate(timeout=20)[0]
    assert f"the page is at http://127.0.0.1:{port}/medq" in said
    assert "Traceback" not in said and "sesame" not in said and not any(question in said for question in QUESTIONS)


def test_under_a_path_behind_a_proxy_who_knows_the_password_gets_in(proxy, chromium):  # noqa: F811
    page, asked = chromium.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.on("websocket", lambda socket: asked.append(socket.url))
    page.goto(f"http://127.0.0.1:{proxy}/medq/")
    typed = page.get_by_label("Password", exact=True)
    typed.fill("open barley")
    page.keyboard.press("Enter")
    page.get_by_role("alert").get_by_text("This is not the password.").wait_for()
    assert "not for diagnosis or treatment" in page.locator(".notice").inner_text()
    assert not page.get_by_placeholder("Ask").count() and not page.get_by_text("Example").count()
    assert not page.locator("input[type=file]").count() and "step 000007" not in page.content()
    typed.fill("open sesame")
    page.keyboard.press("Enter")
    page.get_by_placeholder("Ask about this image").wait_for()
    ask(page, "what is this?")
    assert len(answers(page)["what is this?"]) > 0
    assert "sesame" not in page.content()
    inside = (f"http://127.0.0.1:{proxy}/medq/", f"ws://127.0.0.1:{proxy}/medq/", "data:", "blob:")
    assert any(url.startswith("ws:") for url in asked) and [url for url in asked if not url.startswith(inside)] == []
    page.reload()
    page.get_by_label("Password", exact=True).wait_for()  # another session, which has to know it, too
    page.close()


PUT = """async (session) => {
    const token = (document.cookie.match(/_streamlit_xsrf=([^;]+)/) || [])[1], form = new FormData();
    form.append("file", new Blob(["a scan"]), "scan.png");
    const url = `/medq/_stcore/upload_file/${session}/of_its_own`, headers = token ? {"X-Xsrftoken": token} : {};
    return (await fetch(url, {method: "PUT", body: form, headers})).status;
}"""


def test_no_file_is_taken_before_the_password(proxy, chromium):  # noqa: F811
    page, frames = chromium.new_page(), []
    page.on("websocket", lambda socket: socket.on("framereceived", lambda frame: frames.append(frame)))
    page.goto(f"http://127.0.0.1:{proxy}/medq/")
    typed = page.get_by_label("Password", exact=True)
    typed.wait_for()
    ids = sorted({name.decode() for frame in frames if isinstance(frame, bytes)
                  for name in re.findall(rb"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", frame)})  # its own among them
    assert ids and {page.evaluate(PUT, name) for name in ids} == {400}
    typed.fill("open sesame")
    page.keyboard.press("Enter")
    page.get_by_placeholder("Ask about this image").wait_for()
    assert sorted(page.evaluate(PUT, name) for name in ids)[0] == 204
    page.close()


def test_a_proxy_s_name_alone_is_let_in_beside_this_machine_s(proxy):
    assert urllib.request.urlopen(f"http://127.0.0.1:{proxy}/medq/_stcore/health").status == 200
    with pytest.raises(OSError, match="404"):
        urllib.request.urlopen(f"http://127.0.0.1:{proxy}/_stcore/health")
    assert " 101 " in connect(proxy, "https://medq.example", "medq.example", "/medq")
    assert " 403 " in connect(proxy, "https://other.example", "medq.example", "/medq")
    assert " 403 " in connect(proxy, "https://other.example", "other.example", "/medq")


def test_twenty_visitors_are_measured(proxy, run):
    done = subprocess.run(
        [sys.executable, "extras/bench/visitors.py", f"--url=http://127.0.0.1:{proxy}/medq/", "--visitors=2",
         "--minutes=0.02", "--pause=0.1", "--pixels=64", f"--password_file={run / 'password'}",
         f"--pid={os.getpid()}"],
        cwd=ROOT, text=True, capture_output=True)
    lines = dict(re.findall(r"^(.{12})  (.*)$", done.stdout, re.M))
    assert done.returncode == 0, done.stderr
    assert lines["image shown "].startswith("2; p50 ") and lines["errors      "] == "0"
    assert int(lines["answers     "].split(";")[0]) >= 2 and lines["server      "].count(" MB at ") == 11


# ----------------------------------------------------------------------------- the command line

@pytest.mark.parametrize("checkpoint, step", [("", 7), ("newest", 7), ("best", 3), ("step_000003", 3)])
def test_the_checkpoint_that_is_named_answers(checkpoint, step, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no classifier
    flags = demo.Config(run=str(run / "run"), checkpoint=checkpoint, shards_dir=str(run / "shards"), device="cpu")
    loaded = demo_talk.load(flags)
    assert f" · step {step:06d} · cpu" in loaded.facts and loaded.classifier is None
    assert [name for name, *_ in loaded.examples] == ["scans/test, image 1", "scans/test, image 2"]



@pytest.mark.parametrize("argument, message", [
    ("--run={}/none", "none: no checkpoint here; run `python train_vlm.py --run="),
    ("--run={}/run --checkpoint=step_000004", "--checkpoint=step_000004: "),
    ("--prot=1", "unknown flag '--prot=1': did you mean --port?"),
    ("--run={}/run --address=host.example --password_file=LICENSE", "--password_file=LICENSE: not one line;"),
    ("--run={}/run --address=host.example", "--address=host.example: others reach the page there; write a password"),
    ("--run={}/run --public_name=host.example", "--public_name=host.example: others reach the page there; write"),
    ("--run={}/run --base_path=medq", "--base_path=medq: a path such as /medq"),
    ("--run={}/run --address=host.example --password_file={}/password",
     "--address=host.example --port=8501: 'host.example' does not"),
    ("--run={}/run --address=192.0.2.1 --password_file={}/password", "Cannot assign requested address"),
    ("--run={}/run --port=99999", "--port"),
    ("", "no streamlit here; run `pip install -r extras/requirements.txt`")])
def test_mistakes_get_one_line(argument, message, run, tmp_path, monkeypatch, capsys):
    arguments = argument.format(*[run if argument.startswith("--run={}/run") else tmp_path] * 2).split()
    monkeypatch.setattr("sys.argv", ["demo.py", *arguments])
    if not argument:
        monkeypatch.setattr(demo_page, "st", None)
    elif demo_page.st is None:
        pytest.skip("no streamlit here")
    with pytest.raises(SystemExit) as stopped:
        run_script(demo.main, parse_command_line(demo.Config))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and said.count("\n") == 1
