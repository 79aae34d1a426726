"""What is counted on the pretended device, and on which line of the package it happened."""

from __future__ import annotations

import collections
import sys
from pathlib import Path

import boe_vllm

PACKAGE = str(Path(boe_vllm.__file__).parent) + "/"

LAUNCH = "kernel launch"
TO_HOST = "copy to the host"
BLOCKING = "blocking copy to the device"
NON_BLOCKING = "non-blocking copy to the device"
READ = "read of a single value"
DATA_SIZE = "size that depends on data"
WAITS = (TO_HOST, READ, DATA_SIZE)
"""The host waits until the device has come to it."""


class Counts:
    """How often each kind of event has happened, by line."""

    def __init__(self) -> None:
        self.of: collections.Counter[tuple[str, str]] = collections.Counter()
        """(kind, line) -> times."""

    def note(self, kind: str, times: int = 1) -> None:
        """It happens now."""
        self.of[kind, line_of_package()] += times

    def total(self, *kinds: str) -> int:
        """How often something of these kinds has happened."""
        return sum(times for (kind, _), times in self.of.items() if kind in kinds)

    def lines(self, *kinds: str, most: int = 20) -> list[str]:
        """The lines where it happens most often."""
        found = [(times, kind, line) for (kind, line), times in self.of.items() if kind in kinds]
        return [f"{times:6d}  {kind:32s} {line}" for times, kind, line in sorted(found)[-most:]]


def line_of_package() -> str:
    """The innermost line of the package that is being run."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(PACKAGE):
            return f"{file.removeprefix(PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"
