r"""The answers that d1's grader reads (dllm-reasoning/d1 `eval/parse_and_get_acc.py`).

Published tables of that family of papers are made by these rules, which read other answers than
ours do and accept others. They are kept as they are, so that shares can be compared: `43,500` in a
box is 43, a text without a box is compared as a whole, and LaTeX is compared as text after the
normalisation of Hendrycks et al. 2021.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable

from boe_vllm.lab.tasks.answers import closing_brace

_FIRST_BRACE = re.compile(r"\\boxed{(.*?)}")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_NUMBER = re.compile(r"-?\d+\.?\d*")
_GRIDS = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"<answer>.*?```\s*([\d\s]+)```",
        r"<answer>(.*?)(?:<\|eot_id\|>|<\|endoftext\|>|</answer>)",
        r"</answer>\s*(.*?)(?:<\|eot_id\|>|<\|endoftext\|>|$)",
        r".*?(\d{16})\s*</answer>",
        r"\b(\d{16})\b",
    )
)
_EQUATION = re.compile(r"([0-9+\-*/() ]+)=[0-9. ]+")
_EXPRESSION = re.compile(r"[\d+\-*/().\s]{1,256}")
_OPERATIONS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def number(text: str) -> str | None:
    """GSM8K: the number of the first box that has one, up to the box's first closing brace; only
    without such a box, the last number of `<answer>`. None if there is none."""
    for box in _FIRST_BRACE.findall(text):
        box = box.strip()
        found = [box] if _is_float(box) else _NUMBER.findall(box)
        if found:
            return found[0]
    answer = _ANSWER.search(text)
    if answer is None:
        return None
    inside = answer.group(1).strip()
    found = [inside] if _is_float(inside) else _NUMBER.findall(inside)
    return found[-1] if found else None


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def boxed(text: str) -> str | None:
    r"""The last `\boxed{...}`, else the last `\fbox{...}`, else the whole text; None for a box that
    is never closed."""
    start = text.rfind("\\boxed")
    if start < 0:
        start = text.rfind("\\fbox")
    if start < 0:
        return text
    brace = text.find("{", start)
    end = None if brace < 0 else closing_brace(text, brace + 1)
    return None if end is None else text[brace + 1 : end]


def mathematics(text: str) -> str:
    """MATH500: the last box, or `<answer>` where it is empty or never closed."""
    found = boxed(text)
    if not found and (answer := _ANSWER.search(text)):
        found = answer.group(1).strip()
    return found or ""


def same_mathematics(first: str, second: str) -> bool:
    """Whether two answers are the same text once normalised; or as they are, if one cannot be."""
    try:
        return normalised(first) == normalised(second)
    except ValueError:
        return first == second


def normalised(text: str) -> str:
    """The normalisation of Hendrycks et al. 2021 (hendrycks/math `math_equivalence.py`).

    Raises:
        ValueError: for a text that its rules cannot be applied to.
    """
    for old, new in (
        ("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"),
        ("\\left", ""), ("\\right", ""), ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""),
    ):  # fmt: skip
        text = text.replace(old, new)
    text, *units = text.split("\\text{ ")
    if len(units) > 1:
        raise ValueError("expected one unit at the end, got several")
    for old, new in (("\\%", ""), (" .", " 0."), ("{.", "{0.")):
        text = text.replace(old, new)
    if not text:
        return text
    if text[0] == ".":
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    if text.endswith("\\sqrt"):
        raise ValueError("expected something under a root, got nothing")
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    text = _with_braces(text)
    return _as_fraction("\\frac{1}{2}" if text == "0.5" else text)


def _with_braces(text: str) -> str:
    r"""`\frac12` as `\frac{1}{2}`."""
    if re.search(r"\\frac(?=\\frac|\Z)", text):
        raise ValueError("expected a numerator, got none")
    if re.search(r"\\frac[^{](?=\\frac|\Z)", text):
        return text
    text = re.sub(r"\\frac([^{])\{", r"\\frac{\1}{", text)
    return re.sub(r"\\frac([^{])(.)", r"\\frac{\1}{\2}", text)


def _as_fraction(text: str) -> str:
    r"""`1/2` as `\frac{1}{2}`."""
    sides = text.split("/")
    if len(sides) != 2:
        return text
    above, below = int(sides[0]), int(sides[1])
    return f"\\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text


def expression(text: str) -> str:
    """Countdown: the last box, or `<answer>` where it is never closed; the left side of an equation
    with the operators of Python."""
    found = boxed(text)
    if found is None:
        answer = _ANSWER.search(text)
        found = text if answer is None else answer.group(1).strip()
    for old, new in (("\\div", "/"), ("\\times", "*"), ("\\cdot", "*")):
        found = found.replace(old, new)
    equation = _EQUATION.search(found)
    return equation.group(1).strip() if equation else found


def reaches(answer: str, numbers: list[int], target: int) -> bool:
    """Whether an expression has exactly the given numbers and is within 1e-5 of the target."""
    try:
        if sorted(int(number) for number in re.findall(r"\d+", answer)) != sorted(numbers):
            return False
        if _EXPRESSION.fullmatch(answer) is None:
            return False
        return abs(_evaluate(ast.parse(answer.strip(), mode="eval").body) - target) < 1e-5
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, TypeError):
        return False


def _evaluate(node: ast.expr) -> float:
    """In floating point, so that no power takes long."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATIONS:
        return float(_OPERATIONS[type(node.op)](_evaluate(node.operand)))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return float(_OPERATIONS[type(node.op)](_evaluate(node.left), _evaluate(node.right)))
    raise ValueError(f"expected numbers and + - * / ( ), got {type(node).__name__}")


def grid(text: str) -> str:
    """Sudoku: 16 characters by the first of five patterns that finds any, cut or filled with zeros;
    empty if none does."""
    for pattern in _GRIDS:
        match = pattern.search(text)
        found = "".join(match.group(1).split()) if match else ""
        if found:
            return found[:16].ljust(16, "0")
    return ""


def cells_right(puzzle: str, solution: str, answer: str) -> float:
    """Share of the puzzle's blanks that an answer of `grid` fills as the solution does."""
    blanks = [place for place, clue in enumerate(puzzle) if clue == "0"]
    return sum(answer[place : place + 1] == solution[place] for place in blanks) / len(blanks)
