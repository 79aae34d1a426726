"""Tests of two contestants on the same items."""

from __future__ import annotations

import math
from collections.abc import Sequence


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int, float]:
    """Items that only the first solves, that only the second solves, and the exact two-sided p.

    McNemar 1947, with the binomial distribution instead of its normal approximation.
    """
    pairs = list(zip(first, second, strict=True))
    wins = sum(a and not b for a, b in pairs)
    losses = sum(b and not a for a, b in pairs)
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n
    return wins, losses, min(1.0, 2 * tail)
