r"""Numbers in text, as people and LaTeX write them: the last one, and its exact value.

Read are `1,234.5`, `10{,}000`, `1\,000`, `3/4`, `1 1/2`, `\frac{6}{3}`, `2^3`, and a time of the
day, `2:30`, as hours. An index (`4210_5`) and the exponent of a unit (`m^2`) are no numbers. A
minus sign belongs to a number unless something stands right before it: `10-7` ends in 7.
"""

from __future__ import annotations

import re
from fractions import Fraction

_DECIMAL = r"(?:\d+(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"
_NUMBER = re.compile(
    r"(?<!\d)(?<!\d\.)(?:"
    r"\d+:\d\d(?![\d:])"  # a time of the day
    r"|\d+\ \d+/\d+(?!\d)"  # a mixed number
    rf"|{_DECIMAL}(?:\^\d{{1,2}}(?!\d)|\s*/\s*\d+(?:\.\d+)?)?"  # 5, a power, a fraction
    r"|\.\d+)"
)
_SIGN = re.compile(r"(?:\A|[^\w)\]}%.])-\Z")
# Text that the number is looked for in, made plain: pattern -> what stands for it.
_PLAIN = (
    (re.compile("−"), "-"),
    (re.compile(r"(?<=\d)(?:\{,\}|,?\\[,!;: ])\s*(?=\d{3}(?!\d))"), ""),  # 10{,}000, 1\,000
    (re.compile(r"-\s*\\?[$€£]\s*"), "-"),
    (re.compile(r"\\[dt]?frac(\d)(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"(?<=\d)\s*\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}"), r" \1/\2"),
    (re.compile(r"\\[dt]?frac\s*\{\s*(-?[\d.]+)\s*\}\s*\{\s*([\d.]+)\s*\}"), r"\1/\2"),
    (re.compile(r"\^\{\s*(\d+)\s*\}"), r"^\1"),
    (re.compile(r"(?<=[^\d\s])\^-?\d+|(?<=[A-Za-z0-9}])_(?:\{\w+\}|\w)"), ""),
)


def last_number(text: str) -> str | None:
    """The last number of a text, in plain characters; None if there is none."""
    for pattern, plain in _PLAIN:
        text = pattern.sub(plain, text)
    found = list(_NUMBER.finditer(text))
    if not found:
        return None
    match = found[-1]
    return ("-" if _SIGN.search(text, 0, match.start()) else "") + match.group()


def value(number: str) -> Fraction | None:
    """The exact value of what `last_number` returns; None for a division by zero."""
    sign, number = (-1, number[1:]) if number.startswith("-") else (1, number)
    try:
        return sign * _value(number.replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def _value(number: str) -> Fraction:
    if ":" in number:
        hours, minutes = number.split(":")
        return Fraction(hours) + Fraction(minutes) / 60
    if "^" in number:
        base, exponent = number.split("^")
        return Fraction(base) ** int(exponent)
    above, _, below = number.partition("/")
    whole, _, above = above.strip().rpartition(" ")
    return Fraction(whole or 0) + Fraction(above) / Fraction(below.strip() or 1)
