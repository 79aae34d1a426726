"""A pool of keys and values that passes store and read instead of computing them again.

Legend: `T` packed live rows, `S` packed rows of keys and values, `G` key heads, `P` head size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from boe_vllm.base.arrays import IntArray
from boe_vllm.base.transfer import to_device
from boe_vllm.models.rows import RowLayout
from boe_vllm.models.saved import KeyValueContext

Tensor = torch.Tensor

_NO_ROWS = np.empty(0, np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CachePlan:
    """What one sequence does with its stored rows in one pass."""

    live_positions: IntArray | None
    """Positions that are computed; None for all of them, which refreshes the stored rows."""
    frozen_positions: IntArray
    """Positions whose keys and values are stored, ascending."""
    slots: IntArray
    """Where in the pool each of them lies."""

    @property
    def refresh(self) -> bool:
        """This pass computes every row and stores; otherwise it reads."""
        return self.live_positions is None


class KeyValuePool:
    """Preallocated storage for the stored rows of all requests."""

    def __init__(
        self,
        rows: int,
        *,
        layers: int,
        heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate `rows` rows of keys and values for every layer; none until first used."""
        self.rows, self.used = rows, 0
        """How many there are, and how many of them are in use."""
        self._shape = (layers, 2, rows, heads, head_size)
        self._dtype, self._device = dtype, device
        self._storage: Tensor | None = None
        self._free = np.arange(rows)

    @property
    def storage(self) -> Tensor:
        """[layers, 2, rows, G, P]."""
        if self._storage is None:
            self._storage = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        return self._storage

    def take(self, count: int) -> IntArray:
        """Slots for `count` rows.

        Raises:
            ValueError: when too few are free; admission keeps running requests within the pool.
        """
        if count > len(self._free):
            raise ValueError(
                f"cache: expected room for {count} rows, got {len(self._free)} of {self.rows}; "
                "raise max_num_batched_tokens or lower max_num_seqs"
            )
        taken, self._free = self._free[:count], self._free[count:]
        self.used += count
        return taken

    def give_back(self, slots: IntArray) -> None:
        """Return slots to the pool."""
        self._free = np.concatenate([self._free, slots])
        self.used -= len(slots)


class CachedRows(KeyValueContext):
    """Keys and values of a pass in which some sequences store rows and some read them."""

    def __init__(
        self, pool: KeyValuePool, layout: RowLayout, plans: Sequence[CachePlan | None]
    ) -> None:
        self.pool = pool
        total = sum(layout.live_lens)
        source: list[IntArray] = []
        store: list[IntArray] = []
        slots: list[IntArray] = []
        read: list[IntArray] = []
        for n, plan in enumerate(plans):
            start, live = layout.live_starts[n], layout.live_lens[n]
            source.append(np.arange(start, start + live))
            if plan is not None and plan.refresh:
                place = np.empty(max(layout.row_positions[n]) + 1, np.int64)
                place[layout.row_positions[n]] = np.arange(start, start + live)
                store.append(place[plan.frozen_positions])
                slots.append(plan.slots)
            elif plan is not None:
                done = sum(map(len, read))
                source.append(total + done + np.arange(len(plan.slots)))
                read.append(plan.slots)

        some = [np.concatenate([_NO_ROWS, *rows]) for rows in (store, slots, read, source)]
        moved = to_device(some, layout.device)
        self.stores = (moved[0], moved[1]) if store else None
        """Live rows that are stored, and where in the pool."""
        self.reads = (moved[2], moved[3]) if read else None
        """Where the stored rows lie in the pool, and the wanted order of [live | stored]."""

    def merge(self, layer: int, keys_TGP: Tensor, values_TGP: Tensor) -> tuple[Tensor, Tensor]:
        """Store what is to be stored; return [live | stored] of every sequence."""
        stored = self.pool.storage[layer]
        if self.stores is not None:
            rows, slots = self.stores
            stored[0, slots] = keys_TGP[rows]
            stored[1, slots] = values_TGP[rows]
        if self.reads is None:
            return keys_TGP, values_TGP
        slots, order = self.reads
        return (
            torch.cat([keys_TGP, stored[0, slots]])[order],
            torch.cat([values_TGP, stored[1, slots]])[order],
        )
