"""HumanEval (Chen et al. 2021): complete a function, 0-shot, pass@1 by its tests."""

from __future__ import annotations

from boe_vllm.lab.tasks.base import Item
from boe_vllm.lab.tasks.code import defines, extract
from boe_vllm.lab.tasks.files import FileTask, Record, fill
from boe_vllm.lab.tasks.sandbox import require_sandbox, runs_to_its_end


class HumanEval(FileTask):
    """`humaneval.jsonl`: `prompt`, `canonical_solution`, `test` and `entry_point`."""

    name = "humaneval"
    file_name = "humaneval.jsonl"
    fields = {"prompt": str, "canonical_solution": str, "test": str, "entry_point": str}
    gen_length, block_length = 256, 32
    stop = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    slow_score = True
    source = (
        "the file's own prompt and the stop strings of lm-eval's task humaneval; for chat models "
        "the words of lm-eval's humaneval_instruct"
    )

    def require(self) -> None:
        require_sandbox()

    def make_item(self, record: Record) -> Item:
        return Item(
            task=self.name,
            prompt=record["prompt"],
            answer=record["canonical_solution"],
            meta={name: record[name] for name in ("test", "entry_point")},
        )

    def messages(self, item: Item) -> list[dict[str, str]]:
        return [{"role": "user", "content": fill("humaneval_chat", prompt=item.prompt)}]

    def parse_strict(self, text: str) -> str:
        """The program: a fenced block, or all of the text."""
        return extract(text)

    def is_valid(self, item: Item, answer: str) -> bool:
        if defines(answer, item.meta["entry_point"]):
            # A chat model repeats the function; the prompt before it has imports and helpers.
            answer = "\n" + answer
        test, name = item.meta["test"], item.meta["entry_point"]
        return runs_to_its_end(f"{item.prompt}{answer}\n{test}\ncheck({name})\n")
