"""
Who is answered next: one model, and a line of those who wait for it, in the order in which they came.

Nothing here knows of a page or of a model: a visitor waits in Line.turn(), which tells each place in the line to a
function; Shelf keeps what conversations have cached within a limit, whoever they belong to.
"""

import contextlib
import threading
import weakref

PAUSE = 0.3  # seconds, after which a visitor who waits is told the place again: one who has left is noticed then


class Line:
    """One turn at a time, each in the order of arrival."""

    def __init__(self):
        self.visitors, self.changed = [], threading.Condition()  # the first one has the turn

    def before(self, visitor):
        """How many come before a visitor, that who has the turn being one."""
        return self.visitors.index(visitor)

    @contextlib.contextmanager
    def turn(self, tell):
        """
        Wait for a turn, and have it until the block ends. tell(place) is called every PAUSE seconds with the place in
        the line, from 1; what it raises, as where the visitor has left, ends the waiting, and those behind move up.
        """
        visitor = object()
        with self.changed:
            self.visitors.append(visitor)
        try:
            while place := self.before(visitor):
                tell(place)
                with self.changed:
                    self.changed.wait_for(lambda: self.before(visitor) != place, PAUSE)
            yield
        finally:
            with self.changed:
                self.visitors.remove(visitor)
                self.changed.notify_all()


class Shelf:
    """
    What conversations have cached, at most `limit` bytes in all. A conversation has cached_bytes(), and forget(), which
    costs it no more than time. One that has ended is forgotten with it: none is kept alive from here.
    """

    def __init__(self, limit):
        self.limit, self.recent = limit, []  # weak references, the one that was used last at the end

    def use(self, conversation):
        """Note that a conversation was used, and let others forget, those first that were not for longest."""
        alive = [reference for reference in self.recent if reference() not in (None, conversation)]
        self.recent = [*alive, weakref.ref(conversation)]
        kept = [one for reference in self.recent if (one := reference()) is not None]
        left = sum(one.cached_bytes() for one in kept)
        for one in kept[:-1]:
            if left <= self.limit:
                break
            left -= one.cached_bytes()
            one.forget()
