"""Numbers in text: the last one, and whether two are equal."""

from __future__ import annotations

import re
from fractions import Fraction

_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+(?:\.\d+)?)?")


def last_number(text: str) -> str | None:
    """The last number of a text, `1,234.5` or `3/4`; None if there is none."""
    found = _NUMBER.findall(text)
    return found[-1] if found else None


def value(number: str) -> Fraction | None:
    """The exact value of what `last_number` returns; None for a division by zero."""
    above, _, below = re.sub(r"[\s,]", "", number).partition("/")
    try:
        return Fraction(above) / Fraction(below or 1)
    except (ValueError, ZeroDivisionError):
        return None


def last_boxed(text: str) -> str | None:
    r"""What the last `\\boxed{...}` holds, with balanced braces; None if there is none."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    begin = text.index("{", start) + 1
    depth = 1
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place]
    return None
