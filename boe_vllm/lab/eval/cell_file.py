"""Finished cells, one JSON line each, in a file that many runs may read and add to.

A cell that the file has is not run again, whatever else a later run asks for. A line says what it
is of in a digest (`of`); a line without one is taken as it is. Which items are right is one string
of ones and zeros (in older files a list).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from boe_vllm.lab.eval.cells import Cell
from boe_vllm.lab.eval.presets import own_rate
from boe_vllm.lab.eval.settings import Settings
from boe_vllm.lab.eval.statistics import mean
from boe_vllm.request.config import ServerConfig, parse_sampler_config

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FinishedCell:
    """What one policy did with the items of one task at one rate; costs are means per item."""

    task: str
    contestant: str
    """Name of the policy's variant."""
    tokens_per_step: int
    """1 for policies that decide themselves how many tokens they write."""
    valid: list[bool]
    """Per item, whether the answer is right."""
    steps: float
    forwards: float
    backwards: float
    rows: float
    """Of all forwards and backwards."""
    seconds: float
    """Of the whole cell."""
    of: str | None = None
    """Digest of the model and the settings; see `digest_of`."""

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells the cells of a file apart."""
        return self.task, self.contestant, self.tokens_per_step


def key_of(cell: Cell) -> tuple[str, str, int]:
    """The key under which a file has a cell."""
    own = own_rate(cell.fields)
    return cell.task, cell.label, 1 if own else cell.tokens_per_step


def finish(cell: Cell, records: Sequence[Record], seconds: float, of: str) -> FinishedCell:
    """A cell from the records of all its items, in their order."""

    def per_item(*names: str) -> float:
        return mean([sum(record[name] for name in names) for record in records]) or 0.0

    task, contestant, tokens_per_step = key_of(cell)
    return FinishedCell(
        task=task,
        contestant=contestant,
        tokens_per_step=tokens_per_step,
        valid=[record["valid"] for record in records],
        steps=per_item("denoising_steps"),
        forwards=per_item("forwards"),
        backwards=per_item("backwards"),
        rows=per_item("rows_forward", "rows_backward"),
        seconds=seconds,
        of=of,
    )


def digest_of(settings: Settings, checkpoint: str | None, cell: Cell) -> str:
    """16 hexadecimal digits for all that a cell's numbers depend on, the policy's defaults among
    it; `checkpoint` is the digest of the model's folder, if it is one."""
    config = parse_sampler_config(cell.fields, base=settings.server).as_dict()
    server = {field.name for field in dataclasses.fields(ServerConfig)}
    content = {
        "checkpoint": checkpoint or settings.model,
        "gen_length": cell.gen_length,
        "fields": {k: v for k, v in config.items() if k not in server | {"trace"}},
        **{name: getattr(settings, name) for name in ("seed", "temperature", "chat")},
        "whole_canvas": settings.whole_canvas,
    }
    if settings.grader != "strict":
        content["grader"] = settings.grader
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class CellFile:
    """The file; or nothing at all, if there is no path."""

    def __init__(self, path: Path | None) -> None:
        """Read it.

        Raises:
            ValueError: for a line that is no finished cell, by its number.
        """
        self._path = path
        self._cells: list[FinishedCell] = []
        if path is None or not path.exists():
            return
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # half a line, from a run that was killed
            with path.open("r+b") as file:
                file.truncate(whole)
        for number, line in enumerate(content[:whole].decode("utf-8").splitlines(), 1):
            try:
                self._cells.append(_read(line))
            except (json.JSONDecodeError, TypeError):
                raise ValueError(
                    f"--cells: expected a finished cell in {path}:{number}, got {line[:60]!r}; "
                    f"remove the line, and the cell is run again"
                ) from None

    @property
    def cells(self) -> tuple[FinishedCell, ...]:
        """All lines, in their order."""
        return tuple(self._cells)

    def find(self, cell: Cell, of: str, items: int) -> FinishedCell | None:
        """The newest line of a cell with this digest, or with none, and so many items."""
        for found in reversed(self._cells):
            if found.key == key_of(cell) and found.of in (None, of) and len(found.valid) == items:
                return found
        return None

    def append(self, cell: FinishedCell) -> None:
        """Write one; it survives the death of this process from here on."""
        self._cells.append(cell)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_written(cell) + "\n")


def _read(line: str) -> FinishedCell:
    cell = FinishedCell(**json.loads(line))
    return dataclasses.replace(cell, valid=[right in ("1", True) for right in cell.valid])


def _written(cell: FinishedCell) -> str:
    valid = "".join("01"[right] for right in cell.valid)
    return json.dumps(dataclasses.asdict(cell) | {"valid": valid})
