"""Countdown with 3 numbers: write an expression that uses each once and equals the target.

`C:3,7,12>33=` -> `3*7+12`, or `12+7*3`, or any other expression of the same value.
"""

import ast
import operator
import random
import re
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from itertools import permutations, product

from boe_vllm.lab.tasks.answers import marked, plain_operators
from boe_vllm.lab.tasks.base import GeneratedTask, Item

_ALLOWED = re.compile(r"[0-9+\-*/()]{1,64}")
_OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_SYMBOLS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def evaluate(expression: str) -> tuple[Fraction, list[int]]:
    """The value of an expression of `+ - * /` and parentheses, and the numbers in it.

    Anything else, division by zero included, is a ValueError. Nothing is executed: the
    syntax tree is walked and only the listed node types are accepted.
    """
    if not _ALLOWED.fullmatch(expression):
        raise ValueError(f"not an expression of numbers and + - * / ( ): {expression!r}")
    numbers: list[int] = []

    def walk(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            numbers.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
            return _OPERATIONS[type(node.op)](walk(node.left), walk(node.right))
        raise ValueError(f"{type(node).__name__} is not allowed in {expression!r}")

    try:
        return walk(ast.parse(expression, mode="eval").body), numbers
    except (SyntaxError, ZeroDivisionError) as error:
        raise ValueError(f"cannot evaluate {expression!r}: {error}") from error


@lru_cache(maxsize=4096)
def _expressions(numbers: tuple[int, ...], top: int) -> dict[int, tuple[str, ...]]:
    """Every target in 1..top that three numbers reach, with the expressions that do so."""
    found: dict[int, set[str]] = {}
    for x, y, z in set(permutations(numbers)):
        ways = {}
        for (p, first), (q, second) in product(_SYMBOLS.items(), repeat=2):
            value = first(x, second(y, z)) if q == "*" else second(first(x, y), z)
            ways[f"{x}{p}{y}{q}{z}"] = value
        for p in "+-":
            ways[f"({x}{p}{y})*{z}"] = _SYMBOLS[p](x, y) * z
            ways[f"{x}*({y}{p}{z})"] = x * _SYMBOLS[p](y, z)
        for text, value in ways.items():
            if 1 <= value <= top:
                found.setdefault(value, set()).add(text)
    return {target: tuple(sorted(texts)) for target, texts in sorted(found.items())}


class Countdown(GeneratedTask):
    """Three numbers of 1 to 20, in rising order, and a target of 1 to 99."""

    name = "countdown"
    gen_length = block_length = 12
    largest, top = 20, 99

    def generate(self, rng: random.Random) -> Item:
        while True:
            numbers = tuple(sorted(rng.randint(1, self.largest) for _ in range(3)))
            ways = _expressions(numbers, self.top)
            if ways:
                break
        target = rng.choice(list(ways))
        return Item(
            task=self.name,
            prompt=f"C:{','.join(map(str, numbers))}>{target}=",
            answer=rng.choice(ways[target]),
            meta={"numbers": list(numbers), "target": target},
        )

    def parse(self, text: str) -> str:
        """What the text marks as its answer, in plain characters, else all before EOS."""
        answer = marked(text)
        return super().parse(text) if answer is None else "".join(plain_operators(answer).split())

    def is_valid(self, item: Item, answer: str) -> bool:
        try:
            value, numbers = evaluate(answer)
        except ValueError:
            return False
        return value == item.meta["target"] and Counter(numbers) == Counter(item.meta["numbers"])
