"""Lines on how far a long transfer or conversion is: bytes, rate and time left."""

import threading
import time
from collections.abc import Callable

from molmo2_nemo.files import readable_size

SECONDS_BETWEEN_LINES = 10.0


class ByteProgress:
    """Says how far it is, not more often than every `seconds`, and at the end. Several threads may add.

    total: bytes. say: gets the lines. what: their beginning; with one there is a line at the start, too.
    """

    def __init__(self, total: int, say: Callable[[str], None], what: str = "", seconds: float = SECONDS_BETWEEN_LINES):
        self.total, self.say, self.seconds, self.done = total, say, seconds, 0
        self.prefix = f"{what}: " if what else ""
        self.begun = self.said = time.monotonic()
        self.guard = threading.Lock()
        if what:
            say(f"{what}: {readable_size(total)}")

    def add(self, size: int, last: str = "") -> None:
        """`size` more bytes are done. last: a word on what they were."""
        with self.guard:
            self.done, now = self.done + size, time.monotonic()
            if now < self.said + self.seconds and self.done < self.total:
                return
            self.said, rate = now, max(1.0, self.done / max(now - self.begun, 1e-3))
            far = f"{readable_size(self.done)} of {readable_size(self.total)}, {readable_size(int(rate))}/s"
            left = max(0, self.total - self.done) / rate
            self.say(f"{self.prefix}{far}, {left:,.0f} s left{f' ({last})' if last else ''}")
