"""What the parts of a run took."""

from __future__ import annotations

import time
from collections.abc import Callable


class Stopwatch:
    """Seconds of the parts of a run, in the order in which they were done, and the memory that was needed by their end.

    `peak_gib`: the most memory so far, GiB; set it once it is known what computes.
    """

    def __init__(self) -> None:
        self.seconds_of: dict[str, float] = {}
        self.peak_gib_of: dict[str, float] = {}
        self.peak_gib: Callable[[], float] = lambda: 0.0
        self._began = time.perf_counter()

    def lap(self, part: str, *, without: str | None = None) -> None:
        """Note what has passed since the last lap as `part`; what `without` took of it was noted already."""
        now = time.perf_counter()
        self.seconds_of[part] = now - self._began - self.seconds_of.get(without or "", 0.0)
        self.peak_gib_of[part] = self.peak_gib()
        self._began = now
