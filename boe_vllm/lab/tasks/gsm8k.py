"""GSM8K (Cobbe et al. 2021): word problems, 4-shot, scored by numeric equality."""

from __future__ import annotations

from boe_vllm.lab.tasks.base import Item
from boe_vllm.lab.tasks.files import FileTask, Record, fill
from boe_vllm.lab.tasks.numbers import last_boxed, last_number, value


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

    def make_item(self, record: Record) -> Item:
        answer = self.parse(record["answer"])
        if "####" not in record["answer"] or value(answer or "x") is None:
            raise ValueError("expected an answer that ends in '#### NUMBER'")
        return Item(
            task=self.name,
            prompt=fill("gsm8k", question=record["question"].strip()),
            answer=answer,
            meta={"solution": record["answer"]},
        )

    def parse(self, text: str) -> str:
        """The last number after `####` or in a box, else the last number of all."""
        text = super().parse(text)
        if "####" in text:
            text = text.rpartition("####")[2]
        elif (boxed := last_boxed(text)) is not None:
            text = boxed
        return last_number(text) or ""

    def is_valid(self, item: Item, answer: str) -> bool:
        return bool(answer) and value(answer) is not None and value(answer) == value(item.answer)
