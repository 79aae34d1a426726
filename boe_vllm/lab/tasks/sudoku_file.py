"""4x4 Sudoku as PC-Sampler runs it: 16-character strings, 5-shot, scored by validity."""

from __future__ import annotations

from boe_vllm.lab.tasks import d1
from boe_vllm.lab.tasks.base import Item
from boe_vllm.lab.tasks.files import FileTask, Record, fill
from boe_vllm.lab.tasks.sudoku import BOARD4


class SudokuFile(FileTask):
    """`sudoku.csv`: `Puzzle` and one `Solution`, 16 digits each, 0 for a blank.

    A puzzle may have several solutions: any is right. Exact match and cell accuracy are of the
    file's own.
    """

    name = "sudoku-file"
    file_name = "sudoku.csv"
    fields = {"Puzzle": str, "Solution": str}
    gen_length, block_length = 128, 32
    stop = ("</answer>",)
    source = "NEUIR/PC-Sampler, src/template.py, sudoku_prompt (arXiv 2508.13021)"

    dialects = ("strict", "d1")

    def make_item(self, record: Record) -> Item:
        puzzle, solution = record["Puzzle"], record["Solution"]
        if len(puzzle) != 16 or not set(puzzle) <= set("01234") or "0" not in puzzle:
            raise ValueError(f"expected a Puzzle of 16 digits 0 to 4, got {puzzle!r}")
        item = Item(
            task=self.name,
            prompt=fill("sudoku_file", puzzle=_rows(puzzle)),
            answer=solution,
            meta={"puzzle": puzzle},
        )
        if not self.is_valid(item, solution):
            raise ValueError(f"expected a Solution of {puzzle}, got {solution!r}")
        return item

    def shown(self, item: Item) -> bool:
        # Once as the item's own puzzle, and once more among the examples.
        return item.prompt.count(_rows(item.meta["puzzle"])) > 1

    def parse_strict(self, text: str) -> str:
        """The characters of the answer, without white space."""
        text = text.partition("</answer>")[0].rpartition("<answer>")[2]
        return "".join(text.split())

    def parse_d1(self, text: str) -> str:
        # The prompt ends in the tag that the patterns look for.
        return d1.grid(text if "<answer>" in text else "<answer>" + text)

    def is_valid(self, item: Item, answer: str) -> bool:
        return BOARD4.solves(item.meta["puzzle"], answer)

    def cell_accuracy(self, item: Item, answer: str) -> float | None:
        """None for what is no grid; by d1's rules any text is one."""
        if self.dialect == "d1":
            return d1.cells_right(item.meta["puzzle"], item.answer, answer)
        return BOARD4.cell_accuracy(item.meta["puzzle"], item.answer, answer)


def _rows(puzzle: str) -> str:
    return "\n".join(puzzle[start : start + 4] for start in range(0, 16, 4))
