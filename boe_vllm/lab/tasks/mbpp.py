"""MBPP, sanitized (Austin et al. 2021): write a function, 3-shot, pass@1 by its tests."""

from __future__ import annotations

from boe_vllm.lab.tasks.base import Item
from boe_vllm.lab.tasks.code import extract
from boe_vllm.lab.tasks.files import FileTask, Record, fill
from boe_vllm.lab.tasks.sandbox import require_sandbox, runs_to_its_end

SHOWN = (2, 3, 4)  # task ids of the examples in the prompt


class MBPP(FileTask):
    """`sanitized-mbpp.json`: `prompt`, `code`, `test_list` and `test_imports`."""

    name = "mbpp"
    file_name = "sanitized-mbpp.json"
    fields = {"task_id": int, "prompt": str, "code": str, "test_list": list, "test_imports": list}
    gen_length, block_length = 256, 32
    stop = ("[DONE]",)
    slow_score = True
    source = "lm-eval's task mbpp, after Austin et al. 2021 (arXiv 2108.07732)"

    def require(self) -> None:
        require_sandbox()

    def make_item(self, record: Record) -> Item:
        for name in ("test_list", "test_imports"):
            if not all(isinstance(line, str) for line in record[name]):
                raise ValueError(f"expected {name} to be a list of strings")
        if not record["test_list"]:
            raise ValueError("expected test_list to hold at least one test")
        tests = "\n".join(record["test_list"])
        return Item(
            task=self.name,
            prompt=fill("mbpp", prompt=record["prompt"], tests=tests),
            answer=record["code"],
            meta={
                "task_id": record["task_id"],
                "imports": "\n".join(record["test_imports"]),
                "tests": tests,
            },
        )

    def shown(self, item: Item) -> bool:
        return item.meta["task_id"] in SHOWN

    def parse_strict(self, text: str) -> str:
        """The program: a fenced block, or all of the text before `[DONE]`."""
        return extract(text.partition("[DONE]")[0])

    def is_valid(self, item: Item, answer: str) -> bool:
        return runs_to_its_end(f"{item.meta['imports']}\n{answer}\n{item.meta['tests']}\n")
