"""What a script that takes long says while it works: on stderr, so that results stand alone on stdout."""

import sys
import time


def tell(words):
    """Print a line at once."""
    print(words, file=sys.stderr, flush=True)


def about(seconds):
    """Seconds in words that claim no more than an estimate can, such as "about 12 minutes"."""
    if seconds >= 5400:
        return f"about {seconds / 3600:.1f} hours"
    return f"about {seconds / 60:.0f} minutes" if seconds >= 90 else f"about {max(seconds, 1):.0f} seconds"


class Progress:
    """
    Tells how many of `total` rows are done, and about how long the others will take at their rate.

    total: 0 where nobody knows. pause: seconds between two lines at least, where rows are many.
    """

    def __init__(self, total, what, pause=0):
        self.total, self.what, self.pause = total, what, pause
        self.count, self.begin, self.told = 0, time.perf_counter(), -float("inf")

    def row(self, words=""):
        """One more row is done; words: what came of it."""
        self.count += 1
        now = time.perf_counter()
        if now - self.told < self.pause and self.count != self.total:
            return
        self.told, left = now, (now - self.begin) / self.count * (self.total - self.count)
        of = f" of {self.total:,}" if self.total else ""
        tell(f"{self.count:,}{of} {self.what}{f': {words}' if words else ''}"
             + (f"; {about(left)} to go" if self.count < self.total else ""))
