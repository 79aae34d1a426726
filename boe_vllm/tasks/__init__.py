"""Small tasks with rule-based scores, for the tiny checkpoint, the demo and the benchmarks."""

from boe_vllm.tasks.addition import Addition
from boe_vllm.tasks.base import Item, Score, Task, split_of
from boe_vllm.tasks.countdown import Countdown
from boe_vllm.tasks.sudoku import Sudoku4, Sudoku4Few, Sudoku6, Sudoku6Few

TASKS: dict[str, Task] = {
    task.name: task
    for task in (Sudoku4(), Sudoku4Few(), Sudoku6(), Sudoku6Few(), Countdown(), Addition())
}

__all__ = ["TASKS", "Item", "Score", "Task", "get_task", "split_of"]


def get_task(name: str) -> Task:
    """The task called `name`."""
    try:
        return TASKS[name]
    except KeyError:
        raise ValueError(f"unknown task {name!r}; expected one of {', '.join(TASKS)}") from None
