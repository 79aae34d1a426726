"""Cells of a sweep: one task under one policy, at one canvas length and one rate."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

from boe_vllm.lab.eval.presets import own_rate, preset_named, published_fields
from boe_vllm.lab.eval.settings import Settings
from boe_vllm.lab.eval.variants import Variant
from boe_vllm.lab.tasks import Item, Task
from boe_vllm.request.config import SamplerConfig, parse_sampler_config

DEFAULT_BLOCK = 32


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One number of a table."""

    task: str
    label: str
    """Name of the policy's variant."""
    fields: dict[str, Any]
    """The request's fields: policy and settings, block length, rate."""
    gen_length: int

    @property
    def tokens_per_step(self) -> int:
        """Tokens committed per denoising step, where the policy leaves that to the schedule."""
        return self.fields["tokens_per_step"]

    @property
    def key(self) -> str:
        """Its name in the ledger."""
        return f"{self.task}/{self.label}/{self.gen_length}/{self.tokens_per_step}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One item in one cell: what becomes one request."""

    cell: Cell
    index: int
    """Of the item, in the task's list."""
    item: Item
    seed: int

    @property
    def key(self) -> tuple[str, int]:
        """Its name in the ledger."""
        return self.cell.key, self.index


def make_cells(settings: Settings, tasks: dict[str, Task]) -> list[Cell]:
    """All cells of a run, in the order of the tables; policies that decide themselves how many
    tokens they write have one cell, at one token a step, whatever the rates.

    Raises:
        ValueError: for an unknown policy or field, by name, or two cells of the same name.
    """
    base = settings.server
    cells = [
        _make_cell(settings, base, task, variant, length, 1 if own_rate(variant.fields) else rate)
        for task in tasks.values()
        for length in settings.gen_lengths or (task.gen_length,)
        for rate in settings.tokens_per_step
        for variant in settings.variants
        if rate == settings.tokens_per_step[0] or not own_rate(variant.fields)
    ]
    seen: set[str] = set()
    for cell in cells:
        if cell.key in seen:
            raise ValueError(f"cells: expected different ones, got {cell.key!r} twice; remove one")
        seen.add(cell.key)
    return cells


def _make_cell(
    settings: Settings,
    base: SamplerConfig,
    task: Task,
    variant: Variant,
    length: int,
    rate: int,
) -> Cell:
    label, own = variant.label, variant.fields
    block = settings.block_length
    if block is None:
        block = task.block_length if length == task.gen_length else min(DEFAULT_BLOCK, length)
    fields = {"block_length": block, "tokens_per_step": rate} | settings.fields
    published = settings.table is not None and preset_named(settings.table).published
    fields |= published_fields(task.name, own) if published else own
    if settings.trace:
        fields["trace"] = True
    try:
        parse_sampler_config(fields, base=base)
    except ValueError as error:
        raise ValueError(f"{label} on {task.name}: {error}") from None
    return Cell(task=task.name, label=label, fields=fields, gen_length=length)


def make_jobs(
    cells: list[Cell], items: dict[str, list[Item]], seed: int, done: set[tuple[str, int]]
) -> Iterator[Job]:
    """What is left to do, cell by cell."""
    for cell in cells:
        for index, item in enumerate(items[cell.task]):
            if (cell.key, index) not in done:
                yield Job(cell=cell, index=index, item=item, seed=item_seed(seed, item))


def item_seed(seed: int, item: Item) -> int:
    """The seed of an item's random numbers: the same in every cell, whatever else is run."""
    draw = f"/{item.draw}" if item.draw else ""
    text = f"{seed}/{item.task}/{item.prompt}{draw}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") >> 1
