"""Countdown as PC-Sampler runs it: a chain of operations, 3-shot, scored by its rules."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction

from boe_vllm.lab.tasks import d1
from boe_vllm.lab.tasks.answers import marked, plain_operators
from boe_vllm.lab.tasks.base import Item
from boe_vllm.lab.tasks.countdown import evaluate
from boe_vllm.lab.tasks.files import FileTask, Record, fill

TOLERANCE = Fraction(1, 100_000)
_NUMBER = r"(\d{1,12}(?:\.\d{1,12})?)"
_STEP = re.compile(rf"{_NUMBER}([-+*/]){_NUMBER}={_NUMBER}", re.ASCII)
_MARK = re.compile(r"answer is:?", re.IGNORECASE)


class CountdownFile(FileTask):
    """`countdown.jsonl`: `input`, numbers and then the target, and one `output`.

    The answer is a chain of operations (`44-15=29,79-29=50`) or one expression. It must use each
    number exactly once and give the target, within 1e-5.
    """

    name = "countdown-file"
    file_name = "countdown.jsonl"
    fields = {"input": str, "output": str}
    gen_length, block_length = 128, 32
    stop = ("\nquestion:", "\nNew Question:")
    source = "NEUIR/PC-Sampler, src/template.py, countdown_prompt (arXiv 2508.13021)"

    dialects = ("strict", "d1")

    def make_item(self, record: Record) -> Item:
        parts = record["input"].split(",")
        if len(parts) < 3 or not all(part.strip().isdecimal() for part in parts):
            raise ValueError(f"expected an input of numbers and a target, got {record['input']!r}")
        *numbers, target = map(int, parts)
        item = Item(
            task=self.name,
            prompt=fill("countdown_file", question=record["input"]),
            answer=record["output"],
            meta={"numbers": numbers, "target": target, "input": record["input"]},
        )
        if self.dialect == "strict" and not self.is_valid(item, record["output"]):
            raise ValueError(f"expected an output that solves the input, got {record['output']!r}")
        return item

    def shown(self, item: Item) -> bool:
        # Three items of the published file are the examples of the published prompt.
        return item.prompt.count(f"question: {item.meta['input']}\n") > 0

    def parse_strict(self, text: str) -> str:
        """What the text marks as its answer, else what follows the last `answer is:`, or the last
        line that has text. Lines of a marked chain are its operations."""
        text = text.strip()
        answer, marks = marked(text), list(_MARK.finditer(text))
        if answer is not None:
            answer = ",".join(line.strip(" ,") for line in answer.splitlines() if line.strip())
        elif marks:
            answer = text[marks[-1].end() :].strip().partition("\n")[0]
        else:
            answer = text.rpartition("\n")[2]
        return plain_operators(answer).strip("[]$. \t").replace(" ", "")

    def parse_d1(self, text: str) -> str:
        return d1.expression(text)

    def is_valid(self, item: Item, answer: str) -> bool:
        numbers, target = item.meta["numbers"], item.meta["target"]
        if self.dialect == "d1":
            return d1.reaches(answer, numbers, target)
        return _chain_is_right(numbers, target, answer) or _expression_is_right(
            numbers, target, answer
        )


def _chain_is_right(numbers: list[int], target: int, answer: str) -> bool:
    left = [Fraction(number) for number in numbers]
    for step in answer.split(","):
        match = _STEP.fullmatch(step)
        if match is None:
            return False
        first, operation, second, result = match.groups()
        for operand in (Fraction(first), Fraction(second)):
            near = [number for number in left if abs(number - operand) <= TOLERANCE]
            if not near:
                return False
            left.remove(near[0])
        value = _apply(Fraction(first), operation, Fraction(second))
        if value is None or abs(value - Fraction(result)) > TOLERANCE:
            return False
        left.append(value)
    return len(left) == 1 and abs(left[0] - target) <= TOLERANCE


def _apply(first: Fraction, operation: str, second: Fraction) -> Fraction | None:
    if operation == "/":
        return first / second if second else None
    return {"+": first + second, "-": first - second, "*": first * second}[operation]


def _expression_is_right(numbers: list[int], target: int, answer: str) -> bool:
    expression, _, claimed = answer.partition("=")
    try:
        value, used = evaluate(expression)
        if claimed and abs(Fraction(claimed) - value) > TOLERANCE:
            return False
    except (ValueError, ZeroDivisionError):
        return False
    return abs(value - target) <= TOLERANCE and Counter(used) == Counter(numbers)
