"""Tasks with rule-based scores: generated puzzles, and benchmarks read from files."""

from pathlib import Path

from boe_vllm.lab.tasks.addition import Addition
from boe_vllm.lab.tasks.base import GeneratedTask, Item, Score, Task, split_of
from boe_vllm.lab.tasks.countdown import Countdown
from boe_vllm.lab.tasks.countdown_file import CountdownFile
from boe_vllm.lab.tasks.files import Dialect, FileTask
from boe_vllm.lab.tasks.gsm8k import GSM8K
from boe_vllm.lab.tasks.humaneval import HumanEval
from boe_vllm.lab.tasks.math500 import MATH500
from boe_vllm.lab.tasks.mbpp import MBPP
from boe_vllm.lab.tasks.stories import Stories
from boe_vllm.lab.tasks.sudoku import Sudoku4, Sudoku4Few, Sudoku6, Sudoku6Few
from boe_vllm.lab.tasks.sudoku_file import SudokuFile
from boe_vllm.lab.tasks.text import Text

TASKS: dict[str, GeneratedTask] = {
    task.name: task
    for task in (Sudoku4(), Sudoku4Few(), Sudoku6(), Sudoku6Few(), Countdown(), Addition())
}
TEXT_TASKS: dict[str, GeneratedTask] = {task.name: task for task in (Stories(),)}
"""For the bundled model of text."""
FILE_TASKS: dict[str, type[FileTask]] = {
    task.name: task for task in (GSM8K, MATH500, HumanEval, MBPP, SudokuFile, CountdownFile, Text)
}

__all__ = [
    "FILE_TASKS",
    "TASKS",
    "TEXT_TASKS",
    "Dialect",
    "FileTask",
    "GeneratedTask",
    "Item",
    "Score",
    "Task",
    "get_task",
    "open_task",
    "split_of",
]


def get_task(name: str) -> GeneratedTask:
    """The generated task called `name`."""
    try:
        return TASKS[name]
    except KeyError:
        raise ValueError(f"unknown task {name!r}; expected one of {', '.join(TASKS)}") from None


def open_task(name: str, data: str | Path | None = None, *, dialect: Dialect = "strict") -> Task:
    """The task called `name`; one that reads a file finds it in the folder `data`.

    Args:
        name: of the task.
        data: folder of the benchmark files, or the task's file.
        dialect: whose rules read and judge an answer.

    Raises:
        ValueError: for an unknown name, a missing file, or rules that the task does not have.
    """
    generated = TASKS | TEXT_TASKS
    if name in generated:
        if dialect != "strict":
            raise ValueError(
                f"grader: expected strict for the generated task {name!r}, got {dialect!r}; leave "
                f"it out"
            )
        return generated[name]
    if name not in FILE_TASKS:
        known = ", ".join([*generated, *FILE_TASKS])
        raise ValueError(f"task: expected one of {known}; got {name!r}; choose one of them")
    task = FILE_TASKS[name]
    if data is None:
        raise ValueError(
            f"data: task {name!r} expected a folder with {task.file_name}, got none; name one"
        )
    return task(data, dialect=dialect)
