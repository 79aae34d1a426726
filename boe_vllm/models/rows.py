"""RowLayout: the live rows of all sequences of a pass, packed without padding.

A bidirectional network does not care in which order a sequence's rows are stored, since rotary
positions travel with the rows. So each sequence's rows are stored in two groups:

    [ rows of masked positions that may be written | other live rows ]

A position's prediction is read at its own row or, where the model shifts its predictions by one
(Dream), at the row of the position before it; at the first position of all, at its own. Those rows
are logit rows: those of the masked positions, then those of any further positions whose predictions
are wanted. The rows that are saved for a backward come first: the masked positions' own, then the
others at which these are read; or all live rows. Sequences follow each other; keys that are frozen
(a cache, or the rows outside a partial pass) come after a sequence's live keys.

Legend: `L` positions of a sequence, `B` sequences of a pass, `T` packed live rows, `R` packed logit
rows, `A` packed saved rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from boe_vllm.attention import AttentionLayout
from boe_vllm.base.arrays import IntArray
from boe_vllm.base.transfer import to_device


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SequenceRows:
    """The rows of one sequence in one pass, before packing."""

    tokens: IntArray
    """[L] token ids of the whole sequence."""
    logit_positions: IntArray
    """Masked positions whose predictions are wanted, ascending."""
    extra_positions: IntArray = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))
    """Further positions whose predictions are wanted, ascending."""
    keep: Literal["none", "masked", "all"] = "none"
    """Rows that are saved for a backward: none, those of `logit_positions` and those at which these
    are read, or all live rows."""
    live_positions: IntArray | None = None
    """Positions that are computed; None for all."""
    frozen_rows: int = 0
    """Keys of this sequence that are given, not computed."""
    shift: int = 0
    """Rows by which a position's prediction lies before it: 0 or 1."""

    @property
    def wanted_positions(self) -> IntArray:
        """Positions whose predictions are wanted, in the order of their logit rows."""
        return np.concatenate([self.logit_positions, self.extra_positions])

    @property
    def kept_positions(self) -> IntArray:
        """Positions of the rows that "masked" keeps, in the order of their rows."""
        read = read_at(self.logit_positions, self.shift)
        return np.concatenate([self.logit_positions, np.setdiff1d(read, self.logit_positions)])

    @property
    def live_rows(self) -> int:
        """Rows that are computed."""
        return len(self.tokens if self.live_positions is None else self.live_positions)

    @property
    def saved_rows(self) -> int:
        """Rows that are saved for a backward."""
        return {"none": 0, "masked": len(self.kept_positions), "all": self.live_rows}[self.keep]


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """Where every row of a pass lies. Built by `pack`; everything else consumes it."""

    tokens: torch.Tensor
    """[T] int64 token ids, on the device."""
    positions: torch.Tensor
    """[T] int64 rotary positions, on the device."""
    logit_index: torch.Tensor
    """[R] int64 packed live rows whose predictions are wanted, on the device."""
    saved_index: torch.Tensor
    """[A] int64 packed live rows that are saved, on the device."""
    live_lens: tuple[int, ...]
    """[B] live rows per sequence."""
    logit_lens: tuple[int, ...]
    """[B] logit rows per sequence."""
    saved_lens: tuple[int, ...]
    """[B] saved rows per sequence."""
    frozen_lens: tuple[int, ...]
    """[B] frozen keys per sequence."""
    row_positions: tuple[IntArray, ...]
    """[B] positions of each sequence's live rows in their packed order (host)."""
    read_rows: tuple[IntArray, ...]
    """[B] where the predictions of each sequence's wanted positions are read: rows, counted from
    the sequence's first (host)."""

    @property
    def device(self) -> torch.device:
        """Where the index tensors live."""
        return self.tokens.device

    @functools.cached_property
    def live_starts(self) -> tuple[int, ...]:
        """[B] first packed row of each sequence."""
        return _starts(self.live_lens)

    @functools.cached_property
    def logit_starts(self) -> tuple[int, ...]:
        """[B] first packed logit row of each sequence."""
        return _starts(self.logit_lens)

    @functools.cached_property
    def saved_starts(self) -> tuple[int, ...]:
        """[B] first packed saved row of each sequence."""
        return _starts(self.saved_lens)

    @functools.cached_property
    def attention(self) -> AttentionLayout:
        """Queries: the live rows; keys: the live rows, then the frozen; active: the saved rows."""
        return AttentionLayout(
            q_seqlens=self.live_lens,
            kv_seqlens=tuple(
                live + frozen for live, frozen in zip(self.live_lens, self.frozen_lens, strict=True)
            ),
            active_seqlens=self.saved_lens,
        )


def pack(sequences: Sequence[SequenceRows], device: torch.device) -> RowLayout:
    """Order and concatenate the rows of all sequences; one transfer to the device."""
    positions = [_packed_order(rows) for rows in sequences]
    tokens = [rows.tokens[order] for rows, order in zip(sequences, positions, strict=True)]
    live_lens = tuple(map(len, positions))
    logit_lens = tuple(len(rows.wanted_positions) for rows in sequences)
    saved_lens = tuple(rows.saved_rows for rows in sequences)
    starts = _starts(live_lens)
    read_rows = tuple(map(_read_rows, sequences, positions))
    indices = [
        _joined([start + rows for start, rows in zip(starts, read_rows, strict=False)]),
        _heads(starts, saved_lens),
    ]
    on_device = to_device([_joined(tokens), _joined(positions), *indices], device)
    return RowLayout(
        tokens=on_device[0],
        positions=on_device[1],
        logit_index=on_device[2],
        saved_index=on_device[3],
        live_lens=live_lens,
        logit_lens=logit_lens,
        saved_lens=saved_lens,
        frozen_lens=tuple(rows.frozen_rows for rows in sequences),
        row_positions=tuple(positions),
        read_rows=read_rows,
    )


def read_at(positions: IntArray, shift: int) -> IntArray:
    """Positions at whose rows the predictions of some positions are read.

    Dream's `cat([logits[:, :1], logits[:, :-1]], 1)`: the first position has none before it.
    """
    return np.maximum(positions - shift, 0)


def readable(positions: IntArray, live: IntArray, shift: int) -> IntArray:
    """Those of some positions whose predictions can be read where only some rows are computed."""
    return positions[np.isin(read_at(positions, shift), live)]


def _packed_order(rows: SequenceRows) -> IntArray:
    """[live] positions: the kept ones as they come, the further wanted ones, the others."""
    length, kept = len(rows.tokens), rows.kept_positions
    live = np.arange(length) if rows.live_positions is None else rows.live_positions
    rank = np.full(length, length + 1)
    rank[rows.extra_positions] = length
    rank[kept] = np.arange(len(kept))
    return live[np.argsort(rank[live], kind="stable")]


def _read_rows(rows: SequenceRows, order: IntArray) -> IntArray:
    """[wanted] rows of the sequence, counted from its first."""
    place = np.full(len(rows.tokens), -1)
    place[order] = np.arange(len(order))
    found = place[read_at(rows.wanted_positions, rows.shift)]
    assert (found >= 0).all(), "a wanted position is read at a row that is not computed"
    return found


def _starts(lens: Sequence[int]) -> tuple[int, ...]:
    return (0, *np.cumsum(lens)[:-1].tolist())


def _heads(starts: Sequence[int], lens: Sequence[int]) -> IntArray:
    """Indices of the first `lens[s]` rows from `starts[s]`, for every sequence."""
    return _joined([np.arange(start, start + n) for start, n in zip(starts, lens, strict=False)])


def _joined(pieces: Sequence[IntArray]) -> IntArray:
    return np.concatenate([np.empty(0, np.int64), *pieces])
