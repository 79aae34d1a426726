"""Which keys and values of a request stay frozen, block by block (Fast-dLLM's two caches).

A block's first step computes every row and stores the keys and values of the rows that the block's
later steps leave alone: with "prefix" those before the block, with "dual" those after it too, but
never those at which the block's positions are read. It is an approximation: the stored rows do not
see what the block commits until the next refresh.
"""

from __future__ import annotations

import numpy as np

from boe_vllm.base.arrays import IntArray
from boe_vllm.models.cache import CachePlan, KeyValuePool
from boe_vllm.models.rows import read_at


class RequestCache:
    """The stored rows of one request: which, and where. Its room is taken when it is admitted."""

    def __init__(
        self,
        mode: str,
        refresh_every: int | None,
        pool: KeyValuePool,
        length: int,
        shift: int = 0,
    ) -> None:
        """Take room for `length` rows, of a model that shifts its predictions by so many.

        Raises:
            ValueError: when the pool has none.
        """
        self.mode, self.refresh_every, self.pool = mode, refresh_every, pool
        self.shift = shift
        self.slots = pool.take(length)
        self.block = -1
        self.live: IntArray = np.empty(0, np.int64)
        self.frozen: IntArray = np.empty(0, np.int64)

    def plan(
        self, *, block: int, block_step: int, block_positions: IntArray, length: int
    ) -> CachePlan:
        """What the coming pass over `length` positions does; a new block freezes another set of
        rows."""
        due = self.refresh_every is not None and block_step % self.refresh_every == 0
        refresh = due or block != self.block
        if block != self.block:
            live = np.zeros(length, bool)
            live[block_positions] = True
            live[read_at(block_positions, self.shift)] = True
            if self.mode == "prefix":
                live[block_positions[-1] :] = True
            self.live, self.frozen = np.flatnonzero(live), np.flatnonzero(~live)
            self.block = block
        return CachePlan(
            live_positions=None if refresh else self.live,
            frozen_positions=self.frozen,
            slots=self.slots[: len(self.frozen)],
        )

    def release(self) -> None:
        """Give the room back."""
        self.pool.give_back(self.slots)
        self.slots = np.empty(0, np.int64)
