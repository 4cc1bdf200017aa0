"""Downloads from servers on this machine: whole, cut and resumed, refused; and a stand-in hub."""

import errno
import hashlib
import json
import random
import socket
import threading
from email.utils import formatdate
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from prepare import download
from plumbing.flags import UserError
from prepare.download import (ATTEMPTS, LONGEST_WAIT, PAUSE, SILENT, fetch, fetch_hub, hub_revision,
                              require_inside)

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def serve(monkeypatch):
    """
    serve(*answers) starts a server and returns its url and the list of (path, Range) it was asked.

    An answer is (status, headers, body) or a function of (path, Range) that returns one; None
    hangs up. They are given in turn, the last one from then on. `serve.logins` has the logins
    that all of them were shown.
    """
    monkeypatch.setenv("no_proxy", "*")
    servers = []

    def start(*answers):
        seen, left = [], list(answers)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                seen.append((self.path, self.headers["Range"]))
                start.logins.append(self.headers["Authorization"])
                answer = left.pop(0) if len(left) > 1 else left[0]
                answer = answer(*seen[-1]) if callable(answer) else answer
                if answer is None:
                    return
                status, headers, body = answer
                self.send_response(status)
                for name, value in ({"Content-Length": len(body)} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *details):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=partial(servers[-1].serve_forever, 0.01), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}", seen

    start.logins = []
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """The pauses that a download would have made, in seconds; none is made."""
    made = []
    monkeypatch.setattr(download, "sleep", made.append)
    return made


@pytest.fixture
def once(monkeypatch):
    """A download gives up at the first failure."""
    monkeypatch.setattr(download, "ATTEMPTS", 1)


@pytest.fixture
def silent(monkeypatch):
    """The answer of a server that says nothing; a download does not wait for it long."""
    monkeypatch.setattr(download, "TIMEOUT", 0.05)
    over = threading.Event()
    yield lambda path, asked: over.wait(5) and None
    over.set()


@pytest.fixture
def disk(monkeypatch):
    """disk(free) sets the bytes that are free on every disk."""
    return lambda free: monkeypatch.setattr(
        download.shutil, "disk_usage",
        lambda folder: SimpleNamespace(free=free) if folder.is_dir() else pytest.fail(f"no {folder}"))


def whole(path, asked):
    """A server that knows no ranges."""
    return 200, {}, CONTENT


def ranged(path, asked, end=None, content=CONTENT, **headers):
    """A server that sends the range asked for; cut before byte `end`, if that is given."""
    start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
    if start >= len(content) > 0:
        return 416, {"Content-Range": f"bytes */{len(content)}"}, b""
    headers |= {"Content-Length": len(content) - start}
    place = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
    return (206, headers | place, content[start:end]) if asked else (200, headers, content[:end])


def cut(end, **headers):
    return partial(ranged, end=end, **headers)


def refusal(url, path, sha256=""):
    """The message of the UserError that fetching gives: one line, which names the url."""
    with pytest.raises(UserError) as error:
        fetch(url, path, sha256)
    assert str(error.value).startswith(f"{url}: ") and "\n" not in str(error.value)
    assert not path.exists()
    return str(error.value)


def ranges(seen):
    return [asked for _, asked in seen]


# ----------------------------------------------------------------------------- whole files

@pytest.mark.parametrize("content", [CONTENT, b""])
def test_file_arrives_whole_in_a_new_folder_and_leaves_nothing_beside_it(content, serve, tmp_path):
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
    fetch(url, path)  # the chunk that ends the file is missing from the first answer
    assert path.read_bytes() == CONTENT and len(seen) == 2


# ----------------------------------------------------------------------------- cut and resumed

CUTS = sorted(random.Random(1).sample(range(1, len(CONTENT)), 20))
RESUMED = [None, *[f"bytes={end}-" for end in CUTS]]


def test_file_cut_20_times_arrives_in_one_call(serve, pauses, tmp_path, capsys):
    url, seen = serve(*[cut(end, ETag="a") for end in CUTS], partial(ranged, ETag="a"))
    path = tmp_path / "file.bin"
    fetch(url, path, SHA256)
    assert path.read_bytes() == CONTENT and list(tmp_path.iterdir()) == [path]
    assert ranges(seen) == RESUMED and pauses == [PAUSE] * 20
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{url}: cut after {CUTS[0]} of 300000 bytes; trying again in 2 s"
    assert len(said) == 20


def test_file_cut_20_times_arrives_in_as_many_calls(serve, once, pauses, tmp_path):
    url, seen = serve(*[cut(end, ETag="a") for end in CUTS], partial(ranged, ETag="a"))
    path = tmp_path / "file.bin"
    for end in CUTS:
        assert f"cut after {end} of 300000 bytes); run it again to go on" in refusal(url, path)
    fetch(url, path, SHA256)
    assert path.read_bytes() == CONTENT and list(tmp_path.iterdir()) == [path]
    assert ranges(seen) == RESUMED and pauses == []


def test_attempts_that_bring_nothing_are_counted_and_lose_nothing(serve, pauses, tmp_path):
    broken = 500, {}, b"an error page"
    url, seen = serve(cut(1000), broken, None, cut(2000), *[broken, None] * 3, ranged)
    path = tmp_path / "file.bin"
    refusal(url, path)
    assert pauses == [PAUSE * factor for factor in (1, 2, 4, 1, 2, 4, 8, 16)]
    fetch(url, path, SHA256)
    assert path.read_bytes() == CONTENT
    assert ranges(seen) == [None, *["bytes=1000-"] * 3, *["bytes=2000-"] * 7]


def test_redirected_download_resumes_too(serve, tmp_path):
    url, seen = serve((302, {"Location": "/b"}, b""), cut(1000),
                      (302, {"Location": "/b"}, b""), ranged)
    fetch(f"{url}/a", tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert seen == [("/a", None), ("/b", None), ("/a", "bytes=1000-"), ("/b", "bytes=1000-")]


def test_server_that_ignores_range_sends_the_file_from_its_start(serve, tmp_path):
    shorter = 200, {"Content-Length": len(CONTENT)}, CONTENT[:1000]
    url, seen = serve(cut(150_000), shorter, whole)
    path = tmp_path / "file.bin"
    fetch(url, path, SHA256)
    assert path.read_bytes() == CONTENT and list(tmp_path.iterdir()) == [path]
    assert ranges(seen) == [None, "bytes=150000-", "bytes=1000-"]

    longer = 200, {"Content-Length": len(CONTENT)}, CONTENT[:2000]
    url, seen = serve(longer, *[shorter, longer] * 9)  # the same bytes again and again: no progress
    refusal(url, tmp_path / "other.bin")
    assert len(seen) == ATTEMPTS


def test_server_that_sends_pieces_is_asked_for_all_of_them(serve, tmp_path):
    def piece(path, asked):
        status, headers, body = ranged(path, asked or "bytes=0-")
        return status, headers | {"Content-Length": len(body[:70_000])}, body[:70_000]

    url, seen = serve(cut(70_000), piece)
    fetch(url, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT and len(seen) == 5


def test_resumed_download_need_not_say_the_whole_length_again(serve, tmp_path):
    def short_spoken(path, asked, end=None):
        status, headers, body = ranged(path, asked, end)
        place = headers["Content-Range"].replace("/300000", "/*")
        return status, headers | {"Content-Range": place}, body

    url, seen = serve(cut(1000), partial(short_spoken, end=2000), short_spoken)
    fetch(url, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT and len(seen) == 3


@pytest.mark.parametrize("old, new, content", [
    ({"ETag": "a"}, {"ETag": "b"}, CONTENT[::-1]),
    ({"Last-Modified": formatdate(0)}, {"Last-Modified": formatdate(9)}, CONTENT[::-1]),
    ({}, {}, CONTENT[::-1] + b"longer"), ({}, {}, CONTENT[::-1][:200_000]),
    ({}, {}, CONTENT[::-1][:100_000])], ids=["ETag", "date", "longer", "shorter", "much shorter"])
def test_file_that_changed_since_the_cut_is_not_spliced(old, new, content, serve, tmp_path):
    url, seen = serve(cut(150_000, **old), partial(ranged, content=content, **new))
    path = tmp_path / "file.bin"
    fetch(url, path)
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]
    assert ranges(seen) == [None, "bytes=150000-", None]


def test_part_of_unknown_version_is_not_spliced(serve, tmp_path):
    (tmp_path / ".file.bin.partial").write_bytes(b"of an earlier release of this code")
    (tmp_path / ".other.bin.version").write_text("None 0")  # of a file that was removed since
    url, seen = serve(ranged)
    fetch(url, tmp_path / "file.bin")
    fetch(url, tmp_path / "other.bin")
    assert (tmp_path / "file.bin").read_bytes() == (tmp_path / "other.bin").read_bytes() == CONTENT
    assert ranges(seen) == ["bytes=34-", None, None]


def test_run_killed_before_the_rename_has_nothing_left_to_ask_for(serve, monkeypatch, tmp_path):
    url, seen = serve(ranged)
    path = tmp_path / "file.bin"

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(download, "hash_file", killed)
        fetch(url, path, SHA256)
    assert not path.exists()
    fetch(url, path, SHA256)
    assert path.read_bytes() == CONTENT and len(seen) == 1


# ----------------------------------------------------------------------------- refused

def test_content_of_another_hash_is_refused_and_removed(serve, tmp_path):
    url, seen = serve((200, {}, CONTENT[::-1]), whole)
    path = tmp_path / "file.bin"
    found = hashlib.sha256(CONTENT[::-1]).hexdigest()
    assert f"its sha256 is {found}, not {SHA256}" in refusal(url, path, SHA256)
    assert not (tmp_path / ".file.bin.partial").exists()
    fetch(url, path, SHA256)
    assert path.read_bytes() == CONTENT and ranges(seen) == [None, None]


def test_hash_is_that_of_the_whole_resumed_file(serve, tmp_path):
    spliced = partial(ranged, content=CONTENT[::-1])  # no ETag, no date, and the length is the same
    url, _ = serve(cut(200_000), spliced, cut(200_000), ranged)
    assert "its sha256 is" in refusal(url, tmp_path / "file.bin", SHA256)
    fetch(url, tmp_path / "file.bin", SHA256)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("status, headers, reason", [
    (401, {}, "asks for a login"), (403, {}, "refuses access"), (404, {}, "has no such file"),
    (403, {"X-Error-Code": "GatedRepo"}, "asks you to request access"), (418, {}, "answers 418")])
def test_refusal_is_told_in_one_line_at_once(status, headers, reason, serve, pauses, tmp_path):
    url, seen = serve((status, headers, b"<html>\nan error page\n</html>"))
    path = tmp_path / "file.bin"
    message = refusal(url, path)
    assert message.startswith(f"{url}: the server {reason}")
    assert message.endswith(f"; put the file at {path} yourself")
    assert list(tmp_path.iterdir()) == [] and len(seen) == 1 and pauses == []


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_failure_that_may_pass_is_tried_again_a_few_times(status, serve, pauses, tmp_path):
    url, seen = serve((status, {}, b""), whole)
    fetch(url, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT and len(seen) == 2 and pauses == [PAUSE]

    url, seen = serve((status, {}, b""))  # for ever
    message = refusal(url, tmp_path / "other.bin")
    assert f"the server answers {status} " in message and "; run it again later" in message
    assert len(seen) == ATTEMPTS


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("asked, seconds", [
    (lambda: "77", 77), (lambda: formatdate(download.time.time() + 77, usegmt=True), 77),
    (lambda: str(LONGEST_WAIT), LONGEST_WAIT), (lambda: "1", PAUSE), (lambda: "soon", PAUSE),
    (lambda: formatdate(0, usegmt=True), PAUSE)],
    ids=["seconds", "date", "most", "least", "word", "past"])
def test_pause_is_as_long_as_the_server_asks(status, asked, seconds, serve, pauses, tmp_path):
    url, seen = serve((status, {"Retry-After": asked()}, b""), whole)
    fetch(url, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT and len(seen) == 2
    assert pauses == [pytest.approx(seconds, abs=3 if seconds == 77 else 0)]


@pytest.mark.parametrize("asked", [LONGEST_WAIT + 1, formatdate(4e9, usegmt=True), "9" * 400],
                         ids=["seconds", "date", "absurd"])
def test_server_that_asks_for_hours_is_not_waited_for(asked, serve, pauses, tmp_path):
    url, seen = serve((429, {"Retry-After": asked}, b""))
    message = refusal(url, tmp_path / "file.bin")
    assert "answers 429 and asks to wait " in message and "; run it again after that" in message
    assert (f" {LONGEST_WAIT + 1} s" in message or asked != LONGEST_WAIT + 1) and pauses == []


def test_missing_connection_is_told_in_one_line_with_the_place_for_the_file(serve, pauses, tmp_path):
    path = tmp_path / "file.bin"
    url, seen = serve(None)
    message = refusal(url, path)
    assert "the connection fails (Remote end closed connection without response)" in message
    assert pauses == [PAUSE] and len(seen) == SILENT
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # its port is taken, but it does not listen
        message = refusal(f"http://127.0.0.1:{deaf.getsockname()[1]}", path)
    assert "Connection refused" in message and str(path) in message and len(pauses) == 2 * (SILENT - 1)


def test_silent_server_is_asked_again(serve, silent, tmp_path, capsys):
    url, _ = serve(silent, whole)
    fetch(url, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert "timed out; trying again" in capsys.readouterr().out


def test_login_is_shown_to_the_server_that_it_is_for_and_to_no_other(serve, tmp_path):
    other, _ = serve(whole)
    url, _ = serve((302, {"Location": "/b"}, b""), (307, {"Location": f"{other}/c"}, b""))
    fetch(url, tmp_path / "file.bin", token="secret")
    assert serve.logins == ["Bearer secret", "Bearer secret", None]


# ----------------------------------------------------------------------------- the disk

def test_disk_without_enough_space_is_told_before_the_download(serve, disk, once, tmp_path):
    url, seen = serve(cut(100_000), ranged)
    path = tmp_path / "file.bin"
    disk(299_999)
    message = refusal(url, path)
    assert f"needs 0.3 MB more, and 0.3 MB are free in {tmp_path}; make space" in message
    assert list(tmp_path.iterdir()) == []
    url, seen = serve(cut(100_000), ranged)
    disk(300_000)
    refusal(url, path)  # cut
    disk(199_999)
    assert "needs 0.2 MB more" in refusal(url, path)
    disk(200_000)
    fetch(url, path, SHA256)  # what is there needs no space
    assert path.read_bytes() == CONTENT and ranges(seen) == [None, *["bytes=100000-"] * 2]


def test_full_disk_is_told_in_one_line(serve, pauses, tmp_path):
    url, seen = serve(whole)
    (tmp_path / ".file.bin.partial").symlink_to("/dev/full")
    message = refusal(url, tmp_path / "file.bin")
    assert f"no space is left in {tmp_path}; make space there" in message
    assert len(seen) == 1 and pauses == []


def test_download_that_filled_the_disk_goes_on_once_there_is_space(serve, monkeypatch, tmp_path):
    class Full:
        """Stands in for a file on a disk with room for 100,000 bytes."""
        def __init__(self, path, mode):
            self.file = open(path, mode)

        def __enter__(self):
            return self

        def __exit__(self, *details):
            self.file.close()

        def write(self, content):
            self.file.write(content[:100_000])
            raise OSError(errno.ENOSPC, "No space left on device")

    url, seen = serve(ranged)
    path = tmp_path / "file.bin"
    with monkeypatch.context() as patch:
        patch.setattr(download, "open", Full, raising=False)
        assert "it goes on where it stopped" in refusal(url, path)
    fetch(url, path, SHA256)
    assert path.read_bytes() == CONTENT and ranges(seen) == [None, "bytes=100000-"]


# ----------------------------------------------------------------------------- the hub

FILES = {"data/train 0.parquet": CONTENT, "data/test-0.parquet": b"", "README.md": b"hello",
         "data/notes.txt": b"notes", "extra/data.parquet": bytes(9000)}
OLD, NEW = "a" * 40, "b" * 40
COMMITS = {OLD: FILES, NEW: {name: content[::-1] for name, content in FILES.items()}}


def hub(newest=OLD, commits=COMMITS, file=partial(ranged, ETag="a"), sizes=True):
    """The part of the hub that a download uses, with one repository; `file` sends its files."""
    def answer(path, asked):
        path, _, query = path.partition("?")
        if path.startswith(("/api/datasets/some/questions", "/api/models/some/questions")):
            assert query.lower() == "blobs=true"
            revision = path.partition("/revision/")[2]
            commit = {"": newest, "v1": OLD}.get(revision, revision)
            if commit not in commits:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b""
            siblings = [{"rfilename": name, "size": len(content) if sizes else None} | (
                {"lfs": {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(),
                         "pointerSize": 1}} if "train" in name else {})
                for name, content in commits[commit].items()]
            facts = {"id": "some/questions", "sha": commit, "siblings": siblings}
            return 200, {}, json.dumps(facts).encode()
        commit, name = path.partition("/some/questions/resolve/")[2].split("/", 1)
        return file(path, asked, content=commits[commit][name.replace("%20", " ")])
    return answer


@pytest.fixture
def fetch_from(serve, monkeypatch):
    """fetch_from(hub, folder) downloads "data/*.parquet" of some/questions; returns what was asked."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)  # one request less

    def fetch_from(answer, folder, **named):
        url, seen = serve(*answer) if isinstance(answer, list) else serve(answer)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        try:
            fetch_hub("some/questions", ("data/*.parquet",), folder, **named)
        except UserError as error:
            assert "\n" not in str(error)
            return seen, str(error).replace(url, "")
        return seen, ""

    return fetch_from


def files_below(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


def wanted(commit):
    return {name: COMMITS[commit][name] for name in ("data/train 0.parquet", "data/test-0.parquet")} | {
        "hub_revision.txt": f"some/questions@{commit}\n".encode()}


@pytest.mark.parametrize("kind, place", [("dataset", "/datasets/some/questions/"),
                                         ("model", "/some/questions/")])
def test_matching_files_arrive_with_their_commit_and_no_others(kind, place, fetch_from, serve, tmp_path):
    seen, message = fetch_from(hub(), tmp_path / "raw", repo_type=kind)
    assert message == "" and files_below(tmp_path) == {
        f"raw/{name}": content for name, content in wanted(OLD).items()}
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]
    assert len(seen) == 3 and serve.logins == ["Bearer secret"] * 3
    assert all(path.startswith(place) for path, _ in seen[1:])
    assert hub_revision(tmp_path / "raw") == f"some/questions@{OLD}" and hub_revision(tmp_path) == ""


@pytest.mark.parametrize("name", [
    "data/../../../evil.parquet", "data/..\\..\\evil.parquet", "data//tmp/evil.parquet", "data/./evil.parquet",
    "data/a\nb.parquet", "data/c:evil.parquet", f"data/{'x' * 300}.parquet"])
def test_a_listing_s_name_cannot_leave_the_folder(name, fetch_from, tmp_path):
    home = tmp_path / "a/b/c/raw"
    home.mkdir(parents=True)
    seen, message = fetch_from(hub(commits={OLD: {**FILES, name: b"evil"}}), home)
    assert "some/questions: its listing has the name" in message and "none of a file below" in message
    assert not any("resolve" in path for path, _ in seen)  # nothing is asked for
    assert not [path for path in tmp_path.rglob("*evil*")] and files_below(home) == {}


def test_a_listing_s_name_cannot_lead_through_a_link(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/data").symlink_to(tmp_path)
    for name in ("data/x.parquet", "/etc/x", "../x", ".git/x", "hub_revision.txt", ""):
        with pytest.raises(UserError, match="some/questions: its listing has the name"):
            require_inside("some/questions", tmp_path / "raw", name)
    for name in ("train 0.parquet", "files/train-0.parquet", "image_encoder(resnet50).pth"):
        require_inside("some/questions", tmp_path / "raw", name)


def test_folder_keeps_the_files_that_it_has_of_its_own(fetch_from, tmp_path):
    (tmp_path / "raw" / "data").mkdir(parents=True)
    (tmp_path / "raw" / "data" / "mine.txt").write_bytes(b"mine")
    (tmp_path / "raw" / "data" / "train 0.parquet").write_bytes(b"damaged")
    assert fetch_from(hub(), tmp_path / "raw")[1] == ""
    assert files_below(tmp_path / "raw") == wanted(OLD) | {"data/mine.txt": b"mine"}


def test_folder_that_is_a_link_is_filled_on_the_disk_that_it_leads_to(fetch_from, once, tmp_path):
    (tmp_path / "disk" / "raw").mkdir(parents=True)
    (tmp_path / "raw").symlink_to(tmp_path / "disk" / "raw")
    fetch_from(cut_hub([1000]), tmp_path / "raw")
    assert {path.name for path in (tmp_path / "disk").iterdir()} == {"raw", ".raw.partial"}
    assert fetch_from(hub(), tmp_path / "raw")[1] == "" and files_below(tmp_path / "raw") == wanted(OLD)


def cut_hub(ends, **named):
    """A hub whose large file is cut before each of these bytes in turn."""
    left = list(ends)

    def file(path, asked, content):
        return ranged(path, asked, left.pop(0) if content and left else None, content, ETag="a")

    return hub(file=file, **named)


def test_repository_file_cut_20_times_arrives_in_one_call(fetch_from, pauses, tmp_path):
    seen, message = fetch_from(cut_hub(CUTS), tmp_path / "raw")
    assert message == "" and files_below(tmp_path / "raw") == wanted(OLD)
    assert [asked for path, asked in seen if "train" in path] == RESUMED and pauses == [PAUSE] * 20


def test_repository_file_cut_20_times_arrives_in_as_many_calls(fetch_from, once, tmp_path):
    cut_often, seen = cut_hub(CUTS), []
    for end in CUTS:
        asked, message = fetch_from(cut_often, tmp_path / "raw")
        assert f"cut after {end} of" in message and not (tmp_path / "raw").exists()
        seen += asked
    asked, message = fetch_from(cut_often, tmp_path / "raw")
    assert message == "" and files_below(tmp_path / "raw") == wanted(OLD)
    assert [asked for path, asked in seen + asked if "train" in path] == RESUMED


@pytest.mark.parametrize("named, then, arrives", [
    ({}, hub(NEW), OLD), ({}, hub(NEW, {NEW: COMMITS[NEW]}), NEW), ({"revision": NEW}, hub(NEW), NEW),
    ({"revision": "v1"}, hub(NEW), OLD)], ids=["goes on", "gone", "other pin", "same pin"])
def test_files_of_two_commits_never_mix(named, then, arrives, fetch_from, once, tmp_path):
    raw = tmp_path / "raw"
    assert "cut after 1000 of" in fetch_from(cut_hub([1000]), raw)[1]
    seen, message = fetch_from(then, raw, **named)
    assert message == "" and files_below(raw) == wanted(arrives)
    train, = [asked for path, asked in seen if "train" in path]
    assert train == ("bytes=1000-" if arrives == OLD else None)

    (raw / "data" / "test-0.parquet").unlink()  # lost later: it comes from the same commit again
    assert fetch_from(hub(NEW), raw)[1] == "" and files_below(raw) == wanted(arrives)


def test_part_of_another_repository_is_not_used(fetch_from, tmp_path):
    (tmp_path / ".raw.partial" / "data").mkdir(parents=True)
    (tmp_path / ".raw.partial" / "data" / "test-0.parquet").write_bytes(b"other")
    (tmp_path / ".raw.partial" / "hub_revision.txt").write_text(f"other/answers@{OLD}\n")
    assert fetch_from(hub(NEW), tmp_path / "raw")[1] == ""
    assert files_below(tmp_path / "raw") == wanted(NEW)


@pytest.mark.parametrize("revision", ["v1", OLD])
def test_revision_is_the_one_that_was_named(revision, fetch_from, tmp_path):
    seen, message = fetch_from(hub(NEW), tmp_path / "raw", revision=revision)
    assert message == "" and files_below(tmp_path / "raw") == wanted(OLD)
    assert seen[0][0].startswith(f"/api/datasets/some/questions/revision/{revision}?")
    assert fetch_from(hub(), tmp_path / "no", revision="v9")[1].startswith(
        "some/questions: the hub has no revision v9")


def test_content_that_is_not_the_commit_s_is_refused(fetch_from, tmp_path):
    other = hub(file=lambda path, asked, content: (200, {}, content[::-1]))
    assert "its sha256 is" in fetch_from(other, tmp_path / "raw")[1] and not (tmp_path / "raw").exists()


def test_repository_that_is_refused_halfway_is_not_taken_for_whole(fetch_from, tmp_path):
    def file(path, asked, content):
        return (404, {"X-Error-Code": "EntryNotFound"}, b"") if content else (200, {}, b"")

    assert "the server has no such file" in fetch_from(hub(file=file), tmp_path / "raw")[1]
    assert not (tmp_path / "raw").exists()
    gated = 403, {"X-Error-Code": "GatedRepo"}, b""
    assert fetch_from(gated, tmp_path / "raw")[1] and not (tmp_path / "raw").exists()
    assert fetch_from(hub(), tmp_path / "raw")[1] == "" and files_below(tmp_path / "raw") == wanted(OLD)


@pytest.mark.parametrize("sizes", [True, False])
def test_disk_without_enough_space_for_a_repository_is_told_first(sizes, fetch_from, disk, tmp_path):
    disk(len(CONTENT) - 1000)
    seen, message = fetch_from(hub(sizes=sizes), tmp_path / "raw")
    assert "needs 0.3 MB more, and 0.3 MB are free in" in message and not (tmp_path / "raw").exists()
    assert len(seen) == (1 if sizes else 2)  # without sizes: at the file itself


def test_files_that_are_there_or_not_wanted_need_no_space(fetch_from, disk, once, tmp_path):
    disk(len(CONTENT))
    assert "cut after 100000 of" in fetch_from(cut_hub([100_000]), tmp_path / "raw")[1]
    disk(len(CONTENT) - 100_000)
    assert fetch_from(hub(), tmp_path / "raw")[1] == "" and files_below(tmp_path / "raw") == wanted(OLD)


@pytest.mark.parametrize("answer, message, attempts", [
    ((403, {"X-Error-Code": "GatedRepo"}, b""), "ask for access on https://"
     "huggingface.co/datasets/some/questions, then run `hf auth login`", 1),
    ((401, {"X-Error-Code": "RepoNotFound"}, b""), "the hub has no such dataset", 1),
    ((404, {"X-Error-Code": "RepoNotFound"}, b""), "the hub has no such dataset", 1),
    ((401, {}, b""), "not fetched from the hub (", 1),
    ((429, {}, b""), "not fetched from the hub (429 Too Many Requests", ATTEMPTS),
    ((429, {"Retry-After": "7200"}, b""), "the server answers 429 and asks to wait 7,200 s", 1),
    ((500, {}, b""), "not fetched from the hub (", ATTEMPTS),
    ((200, {}, b"<html>\na login page\n</html>"), "not fetched from the hub (", 1),
    (None, "not fetched from the hub (", SILENT)],
    ids=["gated", "absent or private", "absent", "login", "busy", "busy for hours", "broken", "no hub",
         "hung up"])
def test_hub_that_refuses_is_told_in_one_line(answer, message, attempts, fetch_from, pauses, tmp_path):
    seen, found = fetch_from(answer, tmp_path / "raw")
    assert found.startswith(f"some/questions: {message}") and list(tmp_path.iterdir()) == []
    assert len(seen) == attempts and len(pauses) == attempts - 1


def test_hub_that_is_busy_or_silent_is_asked_again(fetch_from, silent, pauses, tmp_path, capsys):
    busy = 429, {"Retry-After": "77"}, b""
    assert fetch_from([busy, None, silent, hub()], tmp_path / "raw")[1] == ""
    assert files_below(tmp_path / "raw") == wanted(OLD) and pauses == [77, 2 * PAUSE, 4 * PAUSE]
    assert "some/questions: timed out; trying again" in capsys.readouterr().out
