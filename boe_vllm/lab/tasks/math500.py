"""MATH500 (Hendrycks et al. 2021, Lightman et al. 2024): 4-shot, scored by math-verify."""

from __future__ import annotations

import importlib.util
import re

from boe_vllm.lab.tasks import d1
from boe_vllm.lab.tasks.answers import marked
from boe_vllm.lab.tasks.base import Item
from boe_vllm.lab.tasks.files import FileTask, Record, fill

# A number with its base, 4210_5 or ABC_{16}; and LaTeX that stands between digits, 1\\,000.
_BASED = re.compile(r"([0-9A-F]+)_(?:\{(?:\\text\{)?(\d+)\}?\}|(\d+))", re.IGNORECASE)
_BETWEEN_DIGITS = re.compile(r"(?<=\d)(?:\{,\}|,?\\[,!;: ])\s*(?=\d{3}(?!\d))")


class MATH500(FileTask):
    """`math500.jsonl`: `problem`, `solution` with a boxed answer, and `answer`."""

    name = "math500"
    file_name = "math500.jsonl"
    fields = {"problem": str, "solution": str, "answer": str}
    gen_length, block_length = 256, 32
    stop = ("Problem:",)
    slow_score = True
    source = (
        "the four examples of Lewkowycz et al. 2022 (Minerva, arXiv 2206.14858), in the form of "
        "lm-eval's task minerva_math"
    )

    dialects = ("strict", "d1")

    def require(self) -> None:
        if self.dialect == "strict" and importlib.util.find_spec("math_verify") is None:
            raise ValueError(
                "task 'math500' expected the package math-verify; pip install 'boe-vllm[eval]'"
            )

    def make_item(self, record: Record) -> Item:
        return Item(
            task=self.name,
            prompt=fill("math500", problem=record["problem"]),
            answer=record["answer"],
            meta={"solution": record["solution"]},
        )

    def parse_strict(self, text: str) -> str:
        """What the last box holds that is not empty, else the `<answer>`, else nothing."""
        return marked(text) or ""

    def parse_d1(self, text: str) -> str:
        return d1.mathematics(text)

    def is_valid(self, item: Item, answer: str) -> bool:
        if not answer:
            return False
        if self.dialect == "d1":
            return d1.same_mathematics(answer, item.answer)
        if "".join(answer.split()) == "".join(item.answer.split()):
            return True
        bases = _base_of(item.answer), _base_of(answer)
        if bases[1] is not None and bases[0] != bases[1]:
            return False
        return _equal(item.answer, answer)


def _base_of(answer: str) -> str | None:
    """The base that an answer names, if it is a number in one."""
    match = _BASED.fullmatch("".join(answer.split()).strip("$"))
    return match and (match[2] or match[3])


def _equal(gold: str, answer: str) -> bool:
    """Mathematical equality by `math-verify`, in a process's main thread (it sets alarms)."""
    from math_verify import parse, verify

    gold, answer = (_BETWEEN_DIGITS.sub("", text) for text in (gold, answer))
    return bool(verify(parse(f"\\boxed{{{gold}}}"), parse(f"\\boxed{{{answer}}}")))
