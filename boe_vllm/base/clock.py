"""Where an engine step's time goes, as a process sees it: each moment counts for one part only.

On a device that works asynchronously, a part lasts until the host has its numbers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Seconds by part since the last reading; an inner part interrupts the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside for `name`."""
        self._pass()
        self._open.append(name)
        try:
            yield
        finally:
            self._pass()
            self._open.pop()

    def read(self) -> dict[str, float]:
        """The seconds so far, which start again from 0."""
        seconds, self.seconds = self.seconds, {}
        return seconds

    def _pass(self) -> None:
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now
