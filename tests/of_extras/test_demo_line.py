"""extras/share/demo_line.py: who is answered next; demo_server.py: passwords. No page and no model."""

import gc
import threading
import time

import pytest

from extras.share import demo_line, demo_server
from extras.share.demo import Config
from plumbing.flags import UserError

LIMIT = 20  # seconds, after which a test that waits for a thread has failed


class Visitor(threading.Thread):
    """One who waits in a line, and keeps the turn until let go."""

    def __init__(self, line, log, name, leaves=None):
        super().__init__(daemon=True)
        self.line, self.log, self.name, self.leaves = line, log, name, leaves
        self.told, self.may_end, self.has_turn = [], threading.Event(), threading.Event()
        self.start()

    def tell(self, place):
        self.told.append(place)
        if self.leaves and self.leaves.is_set():
            raise ConnectionError("the page is closed")

    def run(self):
        try:
            with self.line.turn(self.tell):
                self.log.append(self.name)
                self.has_turn.set()
                assert self.may_end.wait(LIMIT)
        except ConnectionError:
            self.log.append(f"{self.name} left")


def wait_until(true):
    end = time.monotonic() + LIMIT
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def line(monkeypatch):
    monkeypatch.setattr(demo_line, "PAUSE", 0.01)
    return demo_line.Line()


def arrive(line, log, names, **leaves):
    """Visitors who come one after another."""
    visitors = []
    for name in names:
        count = len(line.visitors)
        visitors.append(Visitor(line, log, name, leaves.get(name)))
        wait_until(lambda: len(line.visitors) == count + 1)
    return visitors


def test_turns_come_in_the_order_of_arrival_and_places_are_told(line):
    log, names = [], "abcdefgh"
    visitors = arrive(line, log, names)
    for number, visitor in enumerate(visitors):
        assert visitor.has_turn.wait(LIMIT)
        assert log == list(names[:number + 1])  # one at a time
        for behind, other in enumerate(visitors[number + 1:], 1):
            wait_until(lambda: other.told and other.told[-1] == behind)
        visitor.may_end.set()
    for number, visitor in enumerate(visitors):
        visitor.join(LIMIT)
        assert list(dict.fromkeys(visitor.told)) == list(range(number, 0, -1))
    assert log == list(names) and line.visitors == []


def test_who_has_left_is_dropped_and_those_behind_move_up(line):
    leave = threading.Event()
    log = []
    visitors = arrive(line, log, "abcd", b=leave)
    wait_until(lambda: visitors[3].told[-1:] == [3])
    leave.set()
    wait_until(lambda: "b left" in log and visitors[3].told[-1] == 2)
    for visitor in visitors:
        visitor.may_end.set()
    for visitor in visitors:
        visitor.join(LIMIT)
    assert log == ["a", "b left", "c", "d"] and line.visitors == []


def test_a_turn_that_fails_is_given_up(line):
    with pytest.raises(MemoryError), line.turn(None):
        raise MemoryError
    with line.turn(None):
        assert len(line.visitors) == 1
    assert line.visitors == []


# ----------------------------------------------------------------------------- what is cached

class Cached:
    def __init__(self, size):
        self.size = size

    def cached_bytes(self):
        return self.size

    def forget(self):
        self.size = 0


def test_those_unused_for_longest_forget_first_and_the_one_in_use_never():
    shelf, some = demo_line.Shelf(100), [Cached(40) for _ in range(3)]
    for one in (some[0], some[1], some[0], some[2]):
        shelf.use(one)
    assert [one.size for one in some] == [40, 0, 40]
    large = Cached(500)
    shelf.use(large)
    assert [one.size for one in some] == [0, 0, 0] and large.size == 500
    small = Cached(1)
    shelf.use(small)
    assert (large.size, small.size) == (0, 1)


def test_what_has_ended_is_not_kept():
    shelf, one = demo_line.Shelf(100), Cached(60)
    shelf.use(one)
    del one
    gc.collect()
    another = Cached(60)
    shelf.use(another)
    assert len(shelf.recent) == 1 and another.size == 60


# ----------------------------------------------------------------------------- passwords

@pytest.mark.parametrize("content, typed, right", [
    (b"open sesame\n", "open sesame", True), (b"open sesame", "open sesame", True),
    (b"open sesame\r\n", "open sesame", True), ("geöffnet\n".encode(), "geöffnet", True),
    (b"open sesame\n", "open sesame ", False), (b"open sesame\n", "Open sesame", False), (b"open sesame\n", "", False),
    (b"open sesame\n", "open", False), (b"open sesame\n", "öffne", False)])
def test_the_password_alone_is_admitted_and_a_wrong_one_is_slow(content, typed, right, tmp_path, monkeypatch, capsys):
    slept = []
    monkeypatch.setattr(demo_server.time, "sleep", slept.append)
    (tmp_path / "password").write_bytes(content)
    gate = demo_server.Gate(tmp_path / "password")
    assert gate.admits(typed) == right
    assert slept == [demo_server.SLOW] * (not right) and demo_server.SLOW >= 1
    assert capsys.readouterr() == ("", "")


def test_one_password_is_tried_at_a_time(tmp_path, monkeypatch):
    (tmp_path / "password").write_text("open sesame")
    gate, sleeping, most = demo_server.Gate(tmp_path / "password"), [], []

    def sleep(seconds):
        sleeping.append(1)
        most.append(len(sleeping))
        threading.Event().wait(0.02)
        sleeping.pop()

    monkeypatch.setattr(demo_server.time, "sleep", sleep)
    threads = [threading.Thread(target=gate.admits, args=("x",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert most == [1] * 4


@pytest.mark.parametrize("content", [b"", b"\n", b"  \n", b"one\ntwo\n", None])
def test_a_file_without_one_line_is_no_password(content, tmp_path):
    path = tmp_path / "password"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="--password_file=.*write the password into it"):
        demo_server.Gate(path)


@pytest.mark.parametrize("flags, needed", [
    ({}, False), ({"address": "::1"}, False), ({"address": "localhost"}, False), ({"base_path": "/medq"}, False),
    ({"address": "0.0.0.0"}, True), ({"address": "192.0.2.1"}, True), ({"address": "::"}, True),
    ({"address": "host.example"}, True), ({"public_name": "medq.example"}, True)])
def test_whoever_lets_others_in_needs_a_password(flags, needed, tmp_path):
    if needed:
        with pytest.raises(UserError, match="others reach the page there; write a password"):
            demo_server.require_password(Config(**flags))
    else:
        demo_server.require_password(Config(**flags))
    (tmp_path / "password").write_text("open sesame")
    demo_server.require_password(Config(**flags, password_file=str(tmp_path / "password")))
