"""How the rows of a batch of sequences are packed: lengths, offsets and indices.

Legend: `T` packed query rows, `S` packed key rows, `A` packed active rows, `B` sequences.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from boe_vllm.base.arrays import IntArray
from boe_vllm.base.transfer import to_device


@dataclass(frozen=True, kw_only=True, slots=True)
class Occupied:
    """The sequences of a layout that have query rows: all that a kernel for packed rows sees."""

    q_seqlens: tuple[int, ...]
    """Query rows of each."""
    kv_seqlens: tuple[int, ...]
    """Key rows of each."""
    kv_rows: IntArray | None
    """Their packed key rows, to be gathered; None if these are all there are."""
    active_rows: IntArray
    """`[A]` rows of the gathered keys that belong to active rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionLayout:
    """Lengths of the packed sequences; each sequence stores its active rows first.

    A sequence's first `active` query rows are its active rows, and they are also the rows of its
    first `active` keys. `active <= q <= kv` holds for every sequence; sequences may be empty.
    Layouts compare and hash by their lengths.

    Raises:
        ValueError: tuples of different lengths, or a sequence without `0 <= active <= q <= kv`.
    """

    q_seqlens: tuple[int, ...]
    """Rows of queries per sequence."""
    kv_seqlens: tuple[int, ...]
    """Rows of keys (and values) per sequence."""
    active_seqlens: tuple[int, ...]
    """Active rows per sequence."""

    q_starts: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """First query row of each sequence, then their number: `n + 1` host integers."""
    kv_starts: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """First key row of each sequence, then their number."""
    active_starts: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """First packed active row of each sequence, then their number."""
    _memo: dict[Hashable, Any] = field(init=False, repr=False, compare=False, default_factory=dict)
    """Device tensors and masks made from these lengths; every layer asks for the same ones."""

    def __post_init__(self) -> None:
        for name in ("q_seqlens", "kv_seqlens", "active_seqlens"):
            object.__setattr__(self, name, tuple(int(n) for n in getattr(self, name)))
        if not len(self.q_seqlens) == len(self.kv_seqlens) == len(self.active_seqlens):
            raise ValueError(
                "q_seqlens, kv_seqlens, active_seqlens: expected one entry per sequence in each, "
                f"got {len(self.q_seqlens)}, {len(self.kv_seqlens)} and "
                f"{len(self.active_seqlens)} entries; give 0 for a sequence that has none"
            )
        lengths = zip(self.active_seqlens, self.q_seqlens, self.kv_seqlens, strict=True)
        for i, (active, q, kv) in enumerate(lengths):
            if not 0 <= active <= q <= kv:
                raise ValueError(
                    f"sequence {i}: expected 0 <= active <= q <= kv, got active={active}, q={q}, "
                    f"kv={kv}; every active row needs a query and every query row a key"
                )
        for name in ("q", "kv", "active"):
            seqlens = getattr(self, f"{name}_seqlens")
            object.__setattr__(self, f"{name}_starts", tuple(accumulate(seqlens, initial=0)))

    @property
    def num_sequences(self) -> int:
        """Sequences in the batch, empty ones included."""
        return len(self.q_seqlens)

    @property
    def num_queries(self) -> int:
        """Packed query rows, `T`."""
        return self.q_starts[-1]

    @property
    def num_keys(self) -> int:
        """Packed key rows, `S`."""
        return self.kv_starts[-1]

    @property
    def num_active(self) -> int:
        """Packed active rows, `A`."""
        return self.active_starts[-1]

    def active_index(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Packed query rows that are active: int64 `[A]` on `device`."""
        return self._first_rows("active_index", self.q_starts, device)

    def active_kv_index(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Packed key rows that belong to active rows: int64 `[A]` on `device`."""
        return self._first_rows("active_kv_index", self.kv_starts, device)

    def active_only(self) -> "AttentionLayout":
        """The layout of the backward: only active rows ask, all keys answer."""
        return self.memoised(
            "active_only",
            lambda: AttentionLayout(
                q_seqlens=self.active_seqlens,
                kv_seqlens=self.kv_seqlens,
                active_seqlens=self.active_seqlens,
            ),
        )

    def occupied(self) -> Occupied:
        """The sequences that have query rows."""
        kept = [i for i, rows in enumerate(self.q_seqlens) if rows]
        q_seqlens, kv_seqlens, kv_starts, active_seqlens = (
            tuple(lengths[i] for i in kept)
            for lengths in (self.q_seqlens, self.kv_seqlens, self.kv_starts, self.active_seqlens)
        )
        starts = tuple(accumulate(kv_seqlens, initial=0))
        gather = starts[-1] != self.num_keys
        return Occupied(
            q_seqlens=q_seqlens,
            kv_seqlens=kv_seqlens,
            kv_rows=row_index(kv_starts, kv_seqlens) if gather else None,
            active_rows=row_index(starts, active_seqlens),
        )

    def memoised(self, key: Hashable, build: Callable[[], Any]) -> Any:
        """What `build()` returned the first time that `key` was asked for."""
        if key not in self._memo:
            # Not an inference tensor, even if the first caller runs in inference mode: a later
            # caller may need autograd to save it.
            with torch.inference_mode(False):
                self._memo[key] = build()
        return self._memo[key]

    def _first_rows(
        self, name: str, starts: tuple[int, ...], device: torch.device | str
    ) -> torch.Tensor:
        device = torch.device(device)
        return self.memoised(
            (name, device),
            lambda: to_device([row_index(starts, self.active_seqlens)], device)[0],
        )


def row_index(starts: tuple[int, ...], counts: tuple[int, ...]) -> IntArray:
    """Rows `start .. start + count - 1` of every sequence, one after the other.

    Args:
        starts: first row of each sequence; a last entry with their total may follow.
        counts: rows to take from each sequence.

    Returns:
        `[sum(counts)]` on the host.
    """
    ranges = [
        np.arange(start, start + count)
        for start, count in zip(starts, counts, strict=False)
        if count
    ]
    return np.concatenate(ranges) if ranges else np.empty(0, np.int64)
