"""The cells of a run: which are known, which are decoded, and where each finished item goes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

from boe_vllm.lab.eval import costs, report
from boe_vllm.lab.eval.answers import Answer, Backend
from boe_vllm.lab.eval.cell_file import CellFile, FinishedCell, digest_of, finish
from boe_vllm.lab.eval.cells import Cell, Job, make_cells, make_jobs
from boe_vllm.lab.eval.ledger import Ledger, Record
from boe_vllm.lab.eval.prompts import Prompts
from boe_vllm.lab.eval.settings import Settings, checkpoint_digest
from boe_vllm.lab.tasks import FileTask, Item, Score, Task, open_task

GENERATED_ITEMS = 500


class Sweep:
    """One run, from wherever an earlier one stopped."""

    def __init__(self, settings: Settings, file: CellFile) -> None:
        """Make the cells, and look up those that the file of finished cells has.

        Raises:
            ValueError: for anything wrong with the arguments or the tasks' files.
        """
        self.settings, self.file = settings, file
        self.tasks = {
            name: open_task(name, settings.data, dialect=settings.grader) for name in settings.tasks
        }
        for task in self.tasks.values():
            task.require()
        self.items: dict[str, list[Item]] = {
            name: task.items(_limit(task, settings.limit), seed=settings.seed)
            for name, task in self.tasks.items()
        }
        self.cells = make_cells(settings, self.tasks)
        checkpoint = checkpoint_digest(Path(settings.model_path))
        self._digests = {cell.key: digest_of(settings, checkpoint, cell) for cell in self.cells}
        self.finished: dict[str, FinishedCell] = {}
        for cell in self.cells:
            found = file.find(cell, self._digests[cell.key], len(self.items[cell.task]))
            if found is not None:
                self.finished[cell.key] = found

    def open(self, folder: Path) -> Ledger:
        """The ledger of this run in a folder; what it has of a cell says more than the file.

        Raises:
            ValueError: for a folder of something else, of another run, or in use.
        """
        paths = {name: t.path for name, t in self.tasks.items() if isinstance(t, FileTask)}
        ledger = Ledger(folder, self.settings.identity(paths))
        for cell in self.cells:
            if all((cell.key, n) in ledger.records for n in range(len(self.items[cell.task]))):
                self.finished.pop(cell.key, None)
        return ledger

    def jobs(self, ledger: Ledger) -> list[Job]:
        """What is left to decode."""
        missing = [cell for cell in self.cells if cell.key not in self.finished]
        return list(make_jobs(missing, self.items, self.settings.seed, set(ledger.records)))

    def decode(self, jobs: list[Job], ledger: Ledger, backend: Backend) -> None:
        """Decode the jobs; every answer is judged and written at once.

        Raises:
            ValueError: for a job that cannot be decoded, by name.
        """
        from tqdm import tqdm

        from boe_vllm.lab.eval.scoring import Scorer

        prompts, scorer = Prompts(self.settings, self.tasks), Scorer(self.tasks)
        session = 1 + max((r["times"]["session"] for r in ledger.records.values()), default=0)
        done = len(ledger.records)
        bar = tqdm(total=done + len(jobs), initial=done, unit="item", smoothing=0.05)
        left = Counter(job.cell.key for job in jobs)

        def note(answer: Answer, score: Score) -> None:
            ledger.append(_record(answer, score, self.settings, session))
            bar.update()
            cell = answer.job.cell
            left[cell.key] -= 1
            if not left[cell.key]:
                self._keep(cell, ledger)

        try:
            for batch in batches(self.settings, self.cells, jobs):
                for answer in backend.run(batch, prompts):
                    for judged in scorer.submit(answer):
                        note(*judged)
            for judged in scorer.rest():
                note(*judged)
        finally:
            scorer.close()
            bar.close()

    def write(self, ledger: Ledger, command: str) -> str:
        """Write the tables of what is known; returns the text of `tables.md`."""
        order = [(c.key, n) for c in self.cells for n in range(len(self.items[c.task]))]
        ledger.finish(key for key in order if key in ledger.records)
        known = {cell for cell, _ in ledger.records} | set(self.finished)
        cells = [cell for cell in self.cells if cell.key in known]
        if not cells:
            raise ValueError("--no-run: expected finished cells or items, got none; run some")
        return report.write(
            self.settings, self.tasks, self.items, cells, ledger, command, self.finished
        )

    def _keep(self, cell: Cell, ledger: Ledger) -> None:
        """Write a cell that is complete to the file of finished cells."""
        records = [ledger.records[cell.key, n] for n in range(len(self.items[cell.task]))]
        seconds = costs.engine_seconds(ledger.records.values()).get(cell.key, 0.0)
        self.file.append(finish(cell, records, round(seconds, 3), self._digests[cell.key]))


def batches(settings: Settings, cells: list[Cell], jobs: list[Job]) -> list[list[Job]]:
    """What is in flight together: everything, or cell by cell."""
    if not settings.one_by_one:
        return [jobs]
    parts: dict[str, list[Job]] = {cell.key: [] for cell in cells}
    for job in jobs:
        parts[job.cell.key].append(job)
    return [part for part in parts.values() if part]


def _limit(task: Task, limit: int | None) -> int | None:
    return limit if limit is not None or isinstance(task, FileTask) else GENERATED_ITEMS


def _record(answer: Answer, score: Score, settings: Settings, session: int) -> Record:
    """One line of the ledger; all but `times` depends on the run's arguments alone."""
    job, report_ = answer.job, dict(answer.report)
    trace = report_.pop("trace", None)
    record: Record = {
        "cell": job.cell.key,
        "index": job.index,
        **dataclasses.asdict(score),
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "tokens": len(answer.token_ids),
        **report_,
    }
    if settings.scorer is not None:
        record["token_ids"] = answer.token_ids
    if trace is not None:
        record |= {"prompt": job.item.prompt, "answer": job.item.answer, "trace": trace}
    record["times"] = {
        "session": session,
        "scheduled": round(answer.scheduled, 6),
        "finished": round(answer.finished, 6),
    }
    return record
