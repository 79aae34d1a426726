"""The folder of a run of `boe-vllm eval`, finished or not, as the rows of its tables."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

from boe_vllm.lab.eval import tables
from boe_vllm.lab.eval.cells import Cell
from boe_vllm.lab.eval.ledger import ITEMS, RUN
from boe_vllm.lab.tasks import FILE_TASKS, TASKS

CELLS = "cells.csv"
WORDS = ("task", "policy", "policy_name", "settings")
WHOLE = ("gen_length", "tokens_per_step", "n", "tokens")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """What a run has found so far."""

    rows: list[tables.Row]
    """One per cell that has items, see `boe_vllm.lab.eval.tables`."""
    finished: bool
    one_by_one: bool
    """Cells ran one after the other: their times were measured, not shared out."""

    @property
    def panels(self) -> dict[str, list[tables.Row]]:
        """The rows by task and canvas length, in the order of the run; names for titles."""
        lengths: dict[str, set[int]] = {}
        for row in self.rows:
            lengths.setdefault(row["task"], set()).add(row["gen_length"])
        found: dict[str, list[tables.Row]] = {}
        for row in self.rows:
            name = row["task"]
            if len(lengths[name]) > 1:
                name = f"{name}, {row['gen_length']} tokens"
            found.setdefault(name, []).append(row)
        return found

    @property
    def swept(self) -> bool:
        """Some policy ran at several rates: its points are a curve."""
        return any(
            len(rows) > len({row["policy"] for row in rows}) for rows in self.panels.values()
        )


def read(folder: Path) -> Results:
    """The rows of a run: of its table, or of the items that are done.

    Raises:
        ValueError: for a folder that is no run's, has no finished item, or a line that is none.
    """
    identity = _identity(folder)
    finished = (folder / CELLS).is_file()
    rows = _table(folder / CELLS) if finished else _summary(folder, identity)
    rows = [row for row in rows if row["n"]]
    if not rows:
        raise ValueError(
            f"DIR: expected a run with finished items, got {folder} without one; let it go on, and "
            f"plot it then"
        )
    return Results(rows=rows, finished=finished, one_by_one=bool(identity.get("one_by_one")))


def _identity(folder: Path) -> dict[str, Any]:
    path = folder / RUN
    if not path.is_file():
        raise ValueError(
            f"DIR: expected the --out folder of a run of boe-vllm eval, got {folder} without "
            f"{RUN}; name such a folder"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}; name another folder") from None


def _table(path: Path) -> list[tables.Row]:
    with path.open(encoding="utf-8", newline="") as file:
        rows: list[tables.Row] = list(csv.DictReader(file))
    for number, row in enumerate(rows, 2):
        try:
            for name, text in row.items():
                if name not in WORDS:
                    kind = int if name in WHOLE else float
                    row[name] = kind(text) if text else None
        except (TypeError, ValueError):
            raise ValueError(
                f"{path}:{number}: expected a number for {name}, got {text!r}; repeat the run's "
                f"command, which writes the file again"
            ) from None
    return rows


def _summary(folder: Path, identity: dict[str, Any]) -> list[tables.Row]:
    """The rows that the run's own table would have now."""
    records: dict[tuple[str, int], dict[str, Any]] = {}
    path = folder / ITEMS
    content = path.read_text(encoding="utf-8") if path.is_file() else ""
    # What follows the last line's end is half of what a killed run was writing.
    for number, line in enumerate(content.split("\n")[:-1], 1):
        try:
            record = json.loads(line)
            records[record["cell"], record["index"]] = record
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path}:{number}: expected a record of a finished item, got {line[:60]!r}; remove "
                f"the line"
            ) from None
    names = {record["cell"]: _cell(record["cell"]) for record in records.values()}
    cells = sorted(names.values(), key=lambda cell: _place(cell, identity))
    judged = {cell.task: _judged(cell.task) for cell in cells}
    return tables.summarise(cells, records, judged)


def _cell(key: str) -> Cell:
    """The cell that a record's key names: TASK/LABEL/LENGTH/RATE, where a label may hold "/"."""
    task, rest = key.split("/", 1)
    label, length, rate = rest.rsplit("/", 2)
    fields = {"policy": label, "tokens_per_step": int(rate)}
    return Cell(task=task, label=label, fields=fields, gen_length=int(length))


def _place(cell: Cell, identity: dict[str, Any]) -> tuple[int, ...]:
    """Where the cell stands in the run's own table."""
    labels = [variant["label"] for variant in identity["variants"]]
    order = identity["tasks"].index(cell.task), labels.index(cell.label)
    return order[0], cell.gen_length, cell.tokens_per_step, order[1]


def _judged(task: str) -> bool:
    return TASKS[task].judged if task in TASKS else FILE_TASKS[task].judged
