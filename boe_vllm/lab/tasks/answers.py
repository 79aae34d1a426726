r"""Where a generated text says what its answer is, and LaTeX in plain characters.

An answer stands in the last `\boxed{...}` (or `\fbox{...}`) that holds something, else between
`<answer>` and `</answer>`. A box that is empty or never closed is passed over.
"""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_TAGGED = re.compile(r"<answer>((?:(?!<answer>).)*?)(?:</answer>|\Z)", re.DOTALL)
_OPERATORS = (
    *((sign, "*") for sign in (r"\times", r"\cdot", r"\ast", "×", "·", "∗")),
    *((sign, "/") for sign in (r"\div", "÷")),
    *((sign, "-") for sign in ("−", "–")),
    *((sign, "") for sign in (r"\left", r"\right", r"\(", r"\)", r"\[", r"\]", r"\,", r"\!", "$")),
)
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")


def boxes(text: str) -> list[str]:
    r"""What each `\boxed{...}` holds, with balanced braces; unclosed ones are left out."""
    found = []
    for match in _BOX.finditer(text):
        end = closing_brace(text, match.end())
        if end is not None:
            found.append(text[match.end() : end])
    return found


def closing_brace(text: str, begin: int) -> int | None:
    """Where the brace that was opened just before `begin` is closed; None if it never is."""
    depth = 1
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return None


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` holds that is not empty; None if there is none."""
    held = [box.strip() for box in boxes(text)]
    return next((box for box in reversed(held) if box), None)


def tagged(text: str) -> str | None:
    """What the last `<answer>` holds, up to `</answer>` or the end; None if there is nothing."""
    held = [match.strip() for match in _TAGGED.findall(text)]
    return next((answer for answer in reversed(held) if answer), None)


def marked(text: str) -> str | None:
    """What the text marks as its answer, by a box or else by a tag."""
    boxed = last_boxed(text)
    return boxed if boxed is not None else tagged(text)


def plain_operators(expression: str) -> str:
    r"""An expression with `+ - * /` and parentheses for LaTeX's and Unicode's signs of them."""
    expression = _FRACTION.sub(r"((\1)/(\2))", expression)
    for sign, plain in _OPERATORS:
        expression = expression.replace(sign, plain)
    return expression
