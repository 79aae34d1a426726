"""MATH500 (Hendrycks et al. 2021, Lightman et al. 2024): 4-shot, scored by math-verify."""

from __future__ import annotations

import importlib.util

from boe_vllm.lab.tasks.base import Item
from boe_vllm.lab.tasks.files import FileTask, Record, fill
from boe_vllm.lab.tasks.numbers import last_boxed


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

    def require(self) -> None:
        if importlib.util.find_spec("math_verify") is None:
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

    def parse(self, text: str) -> str:
        """What the last box holds; nothing where there is no box."""
        return (last_boxed(super().parse(text)) or "").strip()

    def is_valid(self, item: Item, answer: str) -> bool:
        if not answer:
            return False
        return "".join(answer.split()) == "".join(item.answer.split()) or _equal(
            item.answer, answer
        )


def _equal(gold: str, answer: str) -> bool:
    """Mathematical equality by `math-verify`, in a process's main thread (it sets alarms)."""
    from math_verify import parse, verify

    return bool(verify(parse(f"\\boxed{{{gold}}}"), parse(f"\\boxed{{{answer}}}")))
