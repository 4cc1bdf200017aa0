"""Downloads from a server on this machine: whole, cut and resumed, refused; and a stand-in hub."""

import hashlib
import json
import random
import socket
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data import UserError
from prepare.download import fetch

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def serve(monkeypatch):
    """
    serve(*answers) starts a server and returns its url and the list of (path, Range) it was asked.

    An answer is (status, headers, body) or a function of (path, Range) that returns one; None
    hangs up. They are given in turn, the last one from then on.
    """
    monkeypatch.setenv("no_proxy", "*")
    servers = []

    def start(*answers):
        seen, left = [], list(answers)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                seen.append((self.path, self.headers["Range"]))
                answer = left.pop(0) if len(left) > 1 else left[0]
                answer = answer(*seen[-1]) if callable(answer) else answer
                if answer is None:
                    return
                status, headers, body = answer
                self.send_response(status)
                for name, value in ({"Content-Length": len(body)} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *details):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=partial(servers[-1].serve_forever, 0.01), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}", seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def whole(path, asked):
    """A server that knows no ranges."""
    return 200, {}, CONTENT


def ranged(path, asked, end=None):
    """A server that sends the range asked for; cut before byte `end`, if that is given."""
    start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
    if start >= len(CONTENT):
        return 416, {"Content-Range": f"bytes */{len(CONTENT)}"}, b""
    length = {"Content-Length": len(CONTENT) - start}
    place = {"Content-Range": f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"}
    return (206, length | place, CONTENT[start:end]) if asked else (200, length, CONTENT[:end])


def cut(end):
    return partial(ranged, end=end)


def refusal(url, path, sha256=""):
    """The message of the UserError that fetching gives: one line, which names the url."""
    with pytest.raises(UserError) as error:
        fetch(url, path, sha256)
    assert url in str(error.value) and "\n" not in str(error.value)
    assert not path.exists()
    return str(error.value)


# ----------------------------------------------------------------------------- whole files

@pytest.mark.parametrize("content", [CONTENT, b""])
def test_file_arrives_whole_in_a_new_folder_and_leaves_no_partial(content, serve, tmp_path):
    url, seen = serve((200, {}, content))
    path = tmp_path / "new" / "folder" / "file.bin"
    fetch(f"{url}/some/file.bin", path)
    assert path.read_bytes() == content and list(path.parent.iterdir()) == [path]
    assert seen == [("/some/file.bin", None)]


def test_existing_file_is_not_requested_again(serve, tmp_path):
    url, seen = serve(whole)
    path = tmp_path / "file.bin"
    path.write_bytes(b"mine")
    fetch(url, path, SHA256)
    assert path.read_bytes() == b"mine" and seen == []


def test_file_of_unstated_length_arrives_whole(serve, tmp_path):
    halves = [b"%x\r\n%s\r\n" % (len(half), half) for half in (CONTENT[:99], CONTENT[99:], b"")]
    chunked = {"Content-Length": "", "Transfer-Encoding": "chunked"}
    url, seen = serve((200, chunked, b"".join(halves[:2])), (200, chunked, b"".join(halves)))
    path = tmp_path / "file.bin"
    refusal(url, path)  # the chunk that ends the file is missing
    fetch(url, path)
    assert path.read_bytes() == CONTENT and len(seen) == 2


# ----------------------------------------------------------------------------- cut and resumed

def test_cut_download_goes_on_where_it_stopped(serve, tmp_path):
    url, seen = serve(cut(150_000), cut(150_001), (500, {}, b""), None, cut(299_999), ranged)
    path = tmp_path / "file.bin"
    assert "cut after 150000 bytes" in refusal(url, path, SHA256)
    assert "cut after 150001 bytes" in refusal(url, path, SHA256)
    refusal(url, path, SHA256)  # an error page and a hang-up add and remove nothing
    refusal(url, path, SHA256)
    refusal(url, path, SHA256)
    fetch(url, path, SHA256)
    assert path.read_bytes() == CONTENT and list(tmp_path.iterdir()) == [path]
    starts = (150_000, 150_001, 150_001, 150_001, 299_999)
    assert [asked for _, asked in seen] == [None, *[f"bytes={start}-" for start in starts]]


def test_redirected_download_resumes_too(serve, tmp_path):
    url, seen = serve((302, {"Location": "/b"}, b""), cut(1000),
                      (302, {"Location": "/b"}, b""), ranged)
    refusal(f"{url}/a", tmp_path / "file.bin")
    fetch(f"{url}/a", tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert seen == [("/a", None), ("/b", None), ("/a", "bytes=1000-"), ("/b", "bytes=1000-")]


def test_server_that_ignores_range_sends_the_file_from_its_start(serve, tmp_path):
    shorter = 200, {"Content-Length": len(CONTENT)}, CONTENT[:1000]
    url, seen = serve(cut(150_000), shorter, whole)
    path = tmp_path / "file.bin"
    refusal(url, path)
    assert "cut after 1000 bytes" in refusal(url, path)
    fetch(url, path, SHA256)
    assert path.read_bytes() == CONTENT and list(tmp_path.iterdir()) == [path]
    assert [asked for _, asked in seen] == [None, "bytes=150000-", "bytes=1000-"]


@pytest.mark.parametrize("excess", [b"", b"of another file"])
def test_download_with_nothing_left_to_send_starts_again(excess, serve, tmp_path):
    claimed = 200, {"Content-Length": 400_000}, CONTENT + excess
    url, seen = serve(claimed, ranged, (200, {}, CONTENT[::-1]), claimed, ranged)
    path = tmp_path / "file.bin"
    for message in ("cut after", "its sha256 is", "cut after"):
        assert message in refusal(url, path, SHA256)
    fetch(url, path, SHA256)
    assert path.read_bytes() == CONTENT and list(tmp_path.iterdir()) == [path]
    beyond = f"bytes={len(CONTENT + excess)}-"
    assert [asked for _, asked in seen] == [None, beyond, None, None, beyond, None]


# ----------------------------------------------------------------------------- refused

def test_content_of_another_hash_is_refused_and_removed(serve, tmp_path):
    url, seen = serve((200, {}, CONTENT[::-1]), whole)
    path = tmp_path / "file.bin"
    found = hashlib.sha256(CONTENT[::-1]).hexdigest()
    assert f"its sha256 is {found}, not {SHA256}" in refusal(url, path, SHA256)
    assert list(tmp_path.iterdir()) == []
    fetch(url, path, SHA256)
    assert path.read_bytes() == CONTENT and [asked for _, asked in seen] == [None, None]


def test_hash_is_that_of_the_whole_resumed_file(serve, tmp_path):
    other = 206, {}, bytes(100_000)
    url, _ = serve(cut(200_000), other, cut(200_000), ranged)
    refusal(url, tmp_path / "file.bin", SHA256)
    assert "its sha256 is" in refusal(url, tmp_path / "file.bin", SHA256)
    refusal(url, tmp_path / "file.bin", SHA256)
    fetch(url, tmp_path / "file.bin", SHA256)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("status, reason", [
    (401, "the server asks for a login"), (403, "the server refuses access"),
    (404, "the server has no such file"), (500, "the server answers 500 Internal Server Error")])
def test_refusal_is_told_in_one_line(status, reason, serve, tmp_path):
    url, _ = serve((status, {}, b"<html>\nan error page\n</html>"))
    assert refusal(url, tmp_path / "file.bin") == f"{url}: {reason}"
    assert list(tmp_path.iterdir()) == []


def test_missing_connection_is_told_in_one_line_with_the_place_for_the_file(serve, tmp_path):
    url, _ = serve(None)
    message = refusal(url, tmp_path / "file.bin")
    assert "no connection (Remote end closed connection without response)" in message
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # its port is taken, but it does not listen
        message = refusal(f"http://127.0.0.1:{deaf.getsockname()[1]}", tmp_path / "file.bin")
    assert "Connection refused" in message and str(tmp_path / "file.bin") in message


# ----------------------------------------------------------------------------- the hub

FILES = {"data/train-0.parquet": CONTENT, "data/test-0.parquet": b"", "README.md": b"hello",
         "data/notes.txt": b"notes", "extra/data.parquet": b"other"}
WANTED = {name: FILES[name] for name in ("data/train-0.parquet", "data/test-0.parquet")}


def hub(path, asked, absent=()):
    """The part of the hub's interface that a download uses, for one repository of FILES."""
    name = path.removeprefix(f"/datasets/some/questions/resolve/{COMMIT}/")
    if path.startswith("/api/datasets/some/questions/tree/"):
        answer = [{"type": "file", "path": name, "size": len(content), "oid": name}
                  for name, content in FILES.items()]
    elif path.startswith("/api/datasets/some/questions"):
        answer = {"id": "some/questions", "sha": COMMIT,
                  "siblings": [{"rfilename": name} for name in FILES]}
    elif name in FILES and name not in absent:
        headers = {"ETag": hashlib.sha1(FILES[name]).hexdigest(), "X-Repo-Commit": COMMIT}
        return 200, headers, FILES[name]
    else:
        return 404, {"X-Error-Code": "EntryNotFound"}, b""
    return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()


def fetch_hub(url, folder, home="home"):
    """Run fetch_hub in a process of its own: the hub's address is read at import. Its message."""
    command = ("import sys; from data import UserError; from prepare.download import fetch_hub\n"
               "try: fetch_hub('some/questions', ('data/*.parquet',), sys.argv[1])\n"
               "except UserError as error: print(error, end='')")
    process = subprocess.run(
        [sys.executable, "-c", command, folder], cwd=Path(__file__).parent.parent, text=True,
        env={"HF_ENDPOINT": url, "HF_HOME": str(folder.parent / home)}, capture_output=True)
    assert process.returncode == 0, process.stderr
    assert "\n" not in process.stdout
    return process.stdout


def files_below(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


def test_matching_files_of_a_repository_arrive_and_no_others(serve, tmp_path):
    url, seen = serve(hub)
    assert fetch_hub(url, tmp_path / "raw") == ""
    assert files_below(tmp_path / "raw") == WANTED
    assert {path.name for path in tmp_path.iterdir()} - {"home"} == {"raw"}
    assert not [path for path, _ in seen if path.endswith(("README.md", ".txt", "extra/data.parquet"))]


def test_folder_keeps_the_files_that_it_has_of_its_own(serve, tmp_path):
    url, _ = serve(hub)
    (tmp_path / "raw" / "data").mkdir(parents=True)
    (tmp_path / "raw" / "data" / "mine.txt").write_bytes(b"mine")
    (tmp_path / "raw" / "data" / "train-0.parquet").write_bytes(b"damaged")
    assert fetch_hub(url, tmp_path / "raw") == ""
    assert files_below(tmp_path / "raw") == WANTED | {"data/mine.txt": b"mine"}


@pytest.mark.parametrize("then", ["goes on", "is refused", "is refused without a cache"])
def test_cut_repository_is_not_taken_for_whole(then, serve, tmp_path):
    url, seen = serve(partial(hub, absent=["data/train-0.parquet"]))
    assert "some/questions: not fetched" in fetch_hub(url, tmp_path / "raw")
    assert not (tmp_path / "raw").exists()
    url, seen = serve(hub if then == "goes on" else (403, {"X-Error-Code": "GatedRepo"}, b""))
    message = fetch_hub(url, tmp_path / "raw", "new" if then.endswith("cache") else "home")
    if then == "goes on":
        assert message == "" and files_below(tmp_path / "raw") == WANTED
        assert not [path for path, _ in seen if path.endswith("test-0.parquet")]  # it was there
    else:
        assert message.startswith("some/questions: ") and not (tmp_path / "raw").exists()


@pytest.mark.parametrize("answer, message", [
    ((403, {"X-Error-Code": "GatedRepo"}, b""), "some/questions: ask for access on https://"
     "huggingface.co/datasets/some/questions, then run `hf auth login`"),
    ((404, {"X-Error-Code": "RepoNotFound"}, b""), "some/questions: the hub has no such dataset"),
    ((500, {}, b""), "some/questions: not fetched from the hub ("),
    (None, "some/questions: not fetched from the hub (")],
    ids=["gated", "absent", "broken", "hung up"])
def test_repository_that_cannot_be_read_is_told_in_one_line(answer, message, serve, tmp_path):
    url, _ = serve(answer)
    assert fetch_hub(url, tmp_path / "raw").startswith(message)
    assert not (tmp_path / "raw").exists()
