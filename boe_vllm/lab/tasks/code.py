"""Programs in generated text."""

from __future__ import annotations

import re

# A fence that names no language may be the end of a block whose start the prompt held.
_FENCED = re.compile(
    r"```(?:[Pp]ython|py)[ \t]*\n(.*?)(?:\n```|\Z)|```[ \t]*\n(.*?)\n```", re.DOTALL
)


def extract(text: str) -> str:
    """The first fenced block; without one, the text up to a closing fence."""
    match = _FENCED.search(text)
    if match is None:
        return text.split("```", 1)[0]
    return match.group(1) or match.group(2) or ""


def defines(code: str, name: str) -> bool:
    """Whether a function of that name is defined at the left margin."""
    return re.search(rf"^(?:async\s+)?def\s+{re.escape(name)}\s*\(", code, re.MULTILINE) is not None
