"""The files at the end of a run: `cells.csv`, `quality.csv` and `tables.md`."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

from boe_vllm.lab.eval import costs, pairs, tables
from boe_vllm.lab.eval.cell_file import FinishedCell
from boe_vllm.lab.eval.cells import Cell
from boe_vllm.lab.eval.ledger import Ledger
from boe_vllm.lab.eval.presets import preset_named
from boe_vllm.lab.eval.settings import Settings, versions
from boe_vllm.lab.tasks import FileTask, Item, Task
from boe_vllm.lab.tasks.stories import Stories
from boe_vllm.lab.tasks.story_grammar import END

VIEWS = {
    "table 2": tables.methods_by_task,
    "table 5": tables.ablations,
    "figure 4": tables.curves,
}
NOTES = (
    "Score: share of answers that are right, with the Wilson 95 % interval. Steps, forwards and "
    "backwards are means per item; a forward is one evaluation of the network (NFE). Passes are "
    "forwards and backwards together, rows those of all passes: a pass over few rows counts as one "
    "pass, and as few rows. Engine s: time of the engine; cells that ran together share it in "
    'proportion to the rows that they put through the network. Tokens/step "own": the policy '
    "decides.\n"
)
TOLD = (
    "What the source says of the texts, with 95 % intervals: `possible`, the share of texts that "
    "it can produce; `stories`, the same of their single stories; `first wrong`, words before the "
    "first impossible one; `nats a word`, the exact surprise of the possible stories; `unigram "
    "entropy` of the words within a text, nats; `distinct`, the share of different ones among the "
    "stories that came to their end; `repeated`, the share of phrases of four words that stood in "
    "the same text before. The row `source` is measured on as many texts of the source itself.\n"
)
PAIRS = (
    "Wins and losses: items that the first policy solves and the rival does not, and the other way "
    "round. p: exact McNemar test, two-sided, not corrected for several comparisons. Ratios: of "
    "the first policy's rows and passes over the rival's.\n"
)


def write(
    settings: Settings,
    tasks: dict[str, Task],
    items: dict[str, list[Item]],
    cells: list[Cell],
    ledger: Ledger,
    command: str,
    finished: Mapping[str, FinishedCell] | None = None,
) -> str:
    """Write the files; returns the text of `tables.md`.

    Args:
        settings, tasks, items, cells: of the run; only cells of which something is known.
        ledger: what this run has decoded.
        command: the command line, to be shown.
        finished: by key, the cells that were known before.
    """
    judged = {name: task.judged for name, task in tasks.items()}
    rows = tables.summarise(cells, ledger.records, judged, finished)
    (ledger.folder / "cells.csv").write_text(tables.to_csv(rows), encoding="utf-8")
    title = preset_named(settings.table).title if settings.table else "Evaluation"
    parts = [f"# {title}\n"]
    parts.append(f"    {command}\n")
    if settings.table in VIEWS:
        parts.append(VIEWS[settings.table](rows))
    told = _told(tasks, items, cells, ledger)
    if told:
        parts += [tables.to_markdown(told), TOLD]
    if settings.scorer is not None:
        quality = _quality(settings, tasks, items, cells, ledger)
        (ledger.folder / "quality.csv").write_text(tables.to_csv(quality), encoding="utf-8")
        parts.append(tables.to_markdown(quality))
    if settings.paired is not None:
        outcomes = _outcomes(cells, items, ledger, finished or {})
        compared = pairs.compare(cells, rows, outcomes, settings.paired, settings.against)
        if compared:
            (ledger.folder / "pairs.csv").write_text(tables.to_csv(compared), encoding="utf-8")
            parts.append(f"## {settings.paired} against its rivals, item by item\n")
            parts += [tables.to_markdown(compared), PAIRS]
    parts += ["## Cells\n", tables.overview(rows), NOTES]
    parts.append(_facts(settings, tasks, ledger, len(finished or {})))
    text = "\n".join(parts)
    (ledger.folder / "tables.md").write_text(text, encoding="utf-8")
    return text


def _told(
    tasks: dict[str, Task], items: dict[str, list[Item]], cells: list[Cell], ledger: Ledger
) -> list[tables.Row]:
    """What the source of the stories says of every cell that has all its items, and of its own."""
    rows: list[tables.Row] = []
    for name in (name for name, task in tasks.items() if isinstance(task, Stories)):
        texts = [item.answer.split() for item in items[name]]
        rows.append(tables.told_row("source", None, texts))
        for cell in (cell for cell in cells if cell.task == name):
            keys = [(cell.key, index) for index in range(len(texts))]
            if all(key in ledger.records for key in keys):
                own = [ledger.records[key]["text"].split() for key in keys]
                rows.append(tables.told_row(cell.label, cell.tokens_per_step, own))
    return rows


def _outcomes(
    cells: list[Cell],
    items: dict[str, list[Item]],
    ledger: Ledger,
    finished: Mapping[str, FinishedCell],
) -> dict[str, list[bool]]:
    """Key of a cell -> per item, whether its answer is right; of cells without a gap."""
    outcomes = {key: cell.valid for key, cell in finished.items()}
    for cell in cells:
        keys = [(cell.key, index) for index in range(len(items[cell.task]))]
        if all(key in ledger.records for key in keys):
            outcomes[cell.key] = [ledger.records[key]["valid"] for key in keys]
    return outcomes


def _facts(settings: Settings, tasks: dict[str, Task], ledger: Ledger, known: int) -> str:
    seconds = costs.busy_seconds(ledger.records.values())
    tokens = sum(record["tokens"] for record in ledger.records.values())
    lines = [
        f"model {settings.model}, seed {settings.seed}, temperature {settings.temperature:g}, "
        f"{'chat template' if settings.chat else 'plain prompts'}",
        *_work(len(ledger.records), tokens, seconds),
        "cells one by one" if settings.one_by_one else "all cells in flight together",
        *([f"{known} cells of earlier runs"] if known else []),
        ", ".join(f"{name} {release}" for name, release in versions().items())
        + f", Python {platform.python_version()}, {platform.machine()}",
    ]
    lines += [f"prompt of {n}: {t.source}" for n, t in tasks.items() if isinstance(t, FileTask)]
    return "".join(f"- {line}\n" for line in lines)


def _work(items: int, tokens: int, seconds: float) -> list[str]:
    if not seconds:
        return []
    speed = tokens / seconds
    return [
        f"{items} items, {tokens} tokens in {seconds:.1f} s of engine time ({speed:.1f} tokens/s)"
    ]


def _quality(
    settings: Settings,
    tasks: dict[str, Task],
    items: dict[str, list[Item]],
    cells: list[Cell],
    ledger: Ledger,
) -> list[dict[str, Any]]:
    """MAUVE and the scorer's perplexity of every cell, and of other texts of a known source."""
    import json
    from pathlib import Path

    import numpy as np

    from boe_vllm.lab.eval import quality

    assert settings.scorer is not None
    scorer = quality.Scorer(settings.scorer)
    config = json.loads((Path(settings.model_path) / "config.json").read_text(encoding="utf-8"))
    references: dict[str, Any] = {}
    rows = []

    def add(task: str, label: str, length: int, texts: list[dict[str, Any]]) -> None:
        measured = quality.measure(
            scorer,
            texts,
            references[task],
            end_of_text=[config["eos_token_id"]],
            seed=settings.seed,
        )
        rows.append({"task": task, "policy": label, "L": length} | measured)

    for cell in cells:
        own = items[cell.task]
        if cell.task not in references:
            judged = [scorer.judge(item.prompt, item.answer) for item in own]
            references[cell.task] = np.stack([entry[0] for entry in judged])
            task = tasks[cell.task]
            if isinstance(task, Stories):
                others = task.items(len(own), seed=settings.seed + 1)
                add(cell.task, "source", cell.gen_length, [_as_record(item) for item in others])
        texts = [
            {"prompt": item.prompt, **ledger.records[cell.key, index]}
            for index, item in enumerate(own)
        ]
        add(cell.task, cell.label, cell.gen_length, texts)
    return rows


def _as_record(item: Item) -> dict[str, Any]:
    """A text of the source as if it had been decoded; its words serve as token ids."""
    words = [word for word in item.answer.split() if word != END]
    return {"prompt": item.prompt, "text": item.answer, "token_ids": words}
