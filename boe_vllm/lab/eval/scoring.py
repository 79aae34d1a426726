"""Answers judged beside the decoding loop: those that run programs, in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import TYPE_CHECKING, Any

from boe_vllm.lab.tasks import Item, Score, Task

if TYPE_CHECKING:
    # The processes import this module, and shall not wait for vLLM.
    from boe_vllm.lab.eval.engine import Answer

PROCESSES = 8


class Scorer:
    """Takes answers and gives them back with their scores, the slow ones later."""

    def __init__(self, tasks: dict[str, Task]) -> None:
        """Of the tasks of a run."""
        self._tasks = tasks
        self._pool: ProcessPoolExecutor | None = None
        self._pending: dict[Future[Score], Answer] = {}

    def submit(self, answer: Answer) -> Iterator[tuple[Answer, Score]]:
        """Take one answer; give what is judged by now."""
        task = self._tasks[answer.job.cell.task]
        if task.slow_score:
            work = self._processes().submit(judge, task, answer.job.item, answer.text)
            self._pending[work] = answer
        else:
            yield answer, judge(task, answer.job.item, answer.text)
        yield from self._collect(timeout=0)

    def rest(self) -> Iterator[tuple[Answer, Score]]:
        """Wait for all others."""
        while self._pending:
            yield from self._collect(timeout=None)

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _collect(self, timeout: float | None) -> Iterator[tuple[Answer, Score]]:
        if not self._pending:
            return
        done, _ = wait(self._pending, timeout=timeout, return_when=FIRST_COMPLETED)
        for work in done:
            yield self._pending.pop(work), work.result()

    def _processes(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # Not forked: this process has an engine, and perhaps a GPU.
            context: Any = multiprocessing.get_context("spawn")
            count = min(PROCESSES, os.cpu_count() or 1)
            self._pool = ProcessPoolExecutor(count, mp_context=context)
        return self._pool


def judge(task: Task, item: Item, text: str) -> Score:
    """The task's own score."""
    return task.score(item, text)
