"""GSM8K (Cobbe et al. 2021): word problems, 4-shot, scored by numeric equality."""

from __future__ import annotations

from boe_vllm.lab.tasks import d1
from boe_vllm.lab.tasks.answers import boxes, tagged
from boe_vllm.lab.tasks.base import Item
from boe_vllm.lab.tasks.files import FileTask, Record, fill
from boe_vllm.lab.tasks.numbers import last_number, value


class GSM8K(FileTask):
    """`gsm8k.jsonl`: `question`, and `answer` ending in `#### NUMBER`."""

    name = "gsm8k"
    file_name = "gsm8k.jsonl"
    fields = {"question": str, "answer": str}
    gen_length, block_length = 256, 32
    stop = ("Q:",)
    source = (
        "the first four examples of Wei et al. 2022 (arXiv 2201.11903), in the form of lm-eval's "
        "task gsm8k_cot"
    )

    dialects = ("strict", "d1")

    def make_item(self, record: Record) -> Item:
        answer = self.parse_strict(record["answer"])
        if "####" not in record["answer"] or value(answer or "x") is None:
            raise ValueError("expected an answer that ends in '#### NUMBER'")
        return Item(
            task=self.name,
            prompt=fill("gsm8k", question=record["question"].strip()),
            answer=answer,
            meta={"solution": record["answer"]},
        )

    def parse_strict(self, text: str) -> str:
        """The last number of the first of these that has one: what follows `####`, the boxes from
        the last to the first, the `<answer>`, all of the text."""
        after = text.rpartition("####")[2] if "####" in text else ""
        for place in (after, *reversed(boxes(text)), tagged(text) or "", text):
            number = last_number(place)
            if number is not None:
                return number
        return ""

    def parse_d1(self, text: str) -> str:
        return d1.number(text) or ""

    def is_valid(self, item: Item, answer: str) -> bool:
        if not answer:
            return False
        if self.dialect == "d1":
            return float(answer) == float(item.answer.replace(",", ""))
        return value(answer) is not None and value(answer) == value(item.answer)
