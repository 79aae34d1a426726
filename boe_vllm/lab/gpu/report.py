"""JSON lines of checks, one each, as soon as it is known."""

from __future__ import annotations

import contextlib
import json
import time
import traceback
from collections.abc import Iterator
from typing import Any


class Report:
    """Prints what checks find and remembers whether all of them passed."""

    def __init__(self, budget: float) -> None:
        """Start the clock.

        Args:
            budget: seconds after which no further check begins.
        """
        self.budget, self.start = budget, time.perf_counter()
        self.passed = True

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.start

    def line(self, check: str, *, ok: bool = True, **found: Any) -> None:
        """One finding; `ok` says whether it is as it should be."""
        self.passed &= ok
        head = {"check": check, "t": round(self.seconds, 1), "ok": ok}
        print(json.dumps({**head, **_short(found)}), flush=True)

    @contextlib.contextmanager
    def guard(self, check: str, **subject: Any) -> Iterator[None]:
        """An error inside becomes a line of its own, with what was looked at."""
        try:
            yield
        except Exception as error:
            text = f"{type(error).__name__}: {str(error)[:400]}"
            self.line(
                check,
                ok=False,
                **subject,
                error=text,
                trace=traceback.format_exc().splitlines()[-6:],
            )

    def time_left(self, check: str, **subject: Any) -> bool:
        """Whether another check may begin; if not, a line says what was left out."""
        if self.seconds < self.budget:
            return True
        self.line(
            check, ok=False, **subject, left_out=f"the budget of {self.budget:.0f} s is spent"
        )
        return False


def _short(value: Any) -> Any:
    """Four significant digits: lines are for reading."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {str(key): _short(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_short(item) for item in value]
    return value
