"""The command: check everything, decode what is left, write the tables."""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from boe_vllm import TINY
from boe_vllm.lab.eval import arguments, report
from boe_vllm.lab.eval.cells import Cell, Job, make_cells, make_jobs
from boe_vllm.lab.eval.ledger import Ledger, Record
from boe_vllm.lab.eval.prompts import Prompts
from boe_vllm.lab.eval.settings import Settings
from boe_vllm.lab.tasks import TASKS, FileTask, Item, Score, Task, open_task

if TYPE_CHECKING:
    from boe_vllm.lab.eval.engine import Answer

GENERATED_ITEMS = 500
FREQUENCY_ITEMS = 200  # per task, of the bundled checkpoint's table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 2 for arguments that do not fit, with a line that says why."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = arguments.parser().parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="boe-vllm-") as folder:
            settings = _with_frequencies(arguments.read(args), Path(folder))
            evaluate(settings, args.out, arguments.command_line(argv))
    except ValueError as error:
        print(f"boe-vllm eval: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("boe-vllm eval: stopped; the same command continues", file=sys.stderr)
        return 130
    return 0


def evaluate(settings: Settings, out: Path, command: str) -> None:
    """One run, from wherever an earlier one stopped.

    Raises:
        ValueError: for anything wrong with the arguments or the files, before the engine starts.
    """
    tasks = {name: open_task(name, settings.data) for name in settings.tasks}
    for task in tasks.values():
        task.require()
    items = {
        name: task.items(_limit(task, settings.limit), seed=settings.seed)
        for name, task in tasks.items()
    }
    cells = make_cells(settings, tasks)
    files = {name: task.path for name, task in tasks.items() if isinstance(task, FileTask)}
    ledger = Ledger(out, settings.identity(files))
    try:
        _decode(settings, tasks, items, cells, ledger)
        ledger.finish((cell.key, n) for cell in cells for n in range(len(items[cell.task])))
        print(report.write(settings, tasks, items, cells, ledger, command))
    finally:
        ledger.close()


def _decode(
    settings: Settings,
    tasks: dict[str, Task],
    items: dict[str, list[Item]],
    cells: list[Cell],
    ledger: Ledger,
) -> None:
    """Whatever the ledger does not have yet."""
    jobs = list(make_jobs(cells, items, settings.seed, set(ledger.records)))
    if not jobs:
        return
    prompts = Prompts(settings, tasks)
    # Imported only now: vLLM takes seconds, and a wrong argument should be told before.
    from tqdm import tqdm

    from boe_vllm.lab.eval.engine import Engine
    from boe_vllm.lab.eval.scoring import Scorer

    session = 1 + max((r["times"]["session"] for r in ledger.records.values()), default=0)
    engine, scorer = Engine(settings, tasks), Scorer(tasks)
    total = len(jobs) + len(ledger.records)
    bar = tqdm(total=total, initial=len(ledger.records), unit="item", smoothing=0.05)

    def note(answer: Answer, score: Score) -> None:
        ledger.append(_record(answer, score, settings, session))
        bar.update()

    try:
        for batch in batches(settings, cells, jobs):
            for answer in engine.run(batch, prompts):
                for judged in scorer.submit(answer):
                    note(*judged)
        for judged in scorer.rest():
            note(*judged)
    finally:
        scorer.close()
        bar.close()


def batches(settings: Settings, cells: list[Cell], jobs: list[Job]) -> list[list[Job]]:
    """What is in flight together: everything, or cell by cell."""
    if not settings.one_by_one:
        return [jobs]
    parts: dict[str, list[Job]] = {cell.key: [] for cell in cells}
    for job in jobs:
        parts[job.cell.key].append(job)
    return [part for part in parts.values() if part]


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


def _limit(task: Task, limit: int | None) -> int | None:
    return limit if limit is not None or isinstance(task, FileTask) else GENERATED_ITEMS


def _with_frequencies(settings: Settings, folder: Path) -> Settings:
    """For `pc` on the bundled checkpoint, a table counted from the tasks' training items."""
    wanted = any(variant.fields["policy"] == "pc" for variant in settings.variants)
    if not wanted or settings.frequencies is not None or settings.model != TINY:
        return settings
    from tokenizers import Tokenizer

    from boe_vllm.policies import frequencies

    tokenizer = Tokenizer.from_file(str(Path(settings.model_path) / "tokenizer.json"))
    texts = (
        item.prompt + item.answer
        for task in TASKS.values()
        for item in task.items(FREQUENCY_ITEMS, split="train")
    )
    path = folder / "frequencies.json"
    path.write_text(json.dumps(frequencies.count(tokenizer, texts)), encoding="utf-8")
    return dataclasses.replace(settings, frequencies=path)
