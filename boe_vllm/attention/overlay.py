"""Attention of hypothetical rows over a sequence's own keys and values.

A state supposes other tokens at a few positions of a sequence. Its rows meet the sequence's old
keys and values everywhere, except at the state's own positions, where they meet the state's new
ones. All states of a sequence share its keys: nothing as long as the sequence is copied per state.
Sequences of equal shape are computed together, since there are many and their states are small.

Legend: `Q` packed rows of all states, `S` packed rows of keys and values of all sequences, `n`
sequences of a group, `N` states of one sequence, `m` rows of each of them, `s` key rows of that
sequence, `H`/`G` heads of queries/keys, `P` size of a head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from boe_vllm.base.arrays import IntArray
from boe_vllm.base.transfer import Arrival, Transfer

Tensor = torch.Tensor

_MOST_KEYS = 2**20
"""Elements of keys that are copied together, for sequences of equal shape."""
_MOST_SCORES = 2**18
"""Elements of their scores: larger ones would leave a CPU's cache."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Overlay:
    """The states of one sequence: `N` states of `m` rows each, packed one after another."""

    kv_start: int
    """First key row of the sequence."""
    kv_len: int
    """Key rows of the sequence."""
    columns_Nm: IntArray
    """[N, m] each row's place among the sequence's key rows."""

    @property
    def rows(self) -> int:
        """Packed rows of these states."""
        return self.columns_Nm.size


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OverlayGroup:
    """The states of `n` sequences of equal shape, in int64 on their way to the device."""

    rows: Arrival
    """[n * N * m] their packed rows."""
    keys: Arrival
    """[n * s] their rows among all keys."""
    columns_nNm: Arrival
    """[n, N, m] each row's place among its sequence's key rows."""


def group_overlays(
    overlays: Sequence[Overlay], *, heads: int, row_elements: int, transfer: Transfer
) -> list[OverlayGroup]:
    """Put sequences of equal shape together; the states' rows are packed in the given order.

    Args:
        overlays: of each sequence.
        heads: of the queries.
        row_elements: of one row of keys. Both bound how many sequences are put together.
        transfer: what takes the groups' indices to the device.
    """
    shapes: dict[tuple[int, ...], list[tuple[int, Overlay]]] = {}
    first = 0
    for states in overlays:
        shape = (*states.columns_Nm.shape, states.kv_len)
        if states.rows:
            shapes.setdefault(shape, []).append((first, states))
        first += states.rows
    groups = []
    for (many, each, kv_len), members in shapes.items():
        scores = heads * many * each * kv_len
        most = max(1, min(_MOST_KEYS // (kv_len * row_elements), _MOST_SCORES // scores))
        for start in range(0, len(members), most):
            part = members[start : start + most]
            columns = np.stack([states.columns_Nm for _, states in part])
            groups.append(
                OverlayGroup(
                    rows=transfer.add(_ranges([row for row, _ in part], many * each)),
                    keys=transfer.add(_ranges([states.kv_start for _, states in part], kv_len)),
                    columns_nNm=transfer.add(columns),
                )
            )
    return groups


def overlay_attention(
    q_QHP: Tensor,
    k_QGP: Tensor,
    v_QGP: Tensor,
    keys_SGP: Tensor,
    values_SGP: Tensor,
    *,
    groups: Sequence[OverlayGroup],
    scale: float,
) -> Tensor:
    """Mixed values of the states' rows, [Q, H, P]; softmax in at least float32.

    Args:
        q_QHP, k_QGP, v_QGP: the states' new queries, keys and values.
        keys_SGP, values_SGP: the old keys and values of all sequences.
        groups: the states, from `group_overlays`.
        scale: factor on the products of queries and keys.
    """
    heads_per_key = q_QHP.shape[1] // k_QGP.shape[1]
    mixed = torch.empty_like(q_QHP)
    for group in groups:
        rows, keys, columns = (x.tensor for x in (group.rows, group.keys, group.columns_nNm))
        n, many, each = columns.shape

        def by_head(x: Tensor, rows: Tensor, repeat: int, n: int = n) -> Tensor:
            """[n * H, rows of one sequence, P]."""
            x = x[rows].unflatten(0, (n, -1)).transpose(1, 2)
            return (x if repeat == 1 else x.repeat_interleave(repeat, 1)).flatten(0, 1)

        keys_HsP = by_head(keys_SGP, keys, heads_per_key)
        values_HsP = by_head(values_SGP, keys, heads_per_key)
        q_HRP = by_head(q_QHP, rows, 1)
        k_HRP = by_head(k_QGP, rows, heads_per_key)
        v_HRP = by_head(v_QGP, rows, heads_per_key)
        heads = q_QHP.shape[1]
        columns = columns.repeat_interleave(heads, 0)  # [n * H, N, m]
        wide = columns[:, :, None, :].expand(-1, -1, each, -1)
        scores = (q_HRP @ keys_HsP.mT).unflatten(1, (many, each))
        q_HNmP, k_HNmP, v_HNmP = (x.unflatten(1, (many, each)) for x in (q_HRP, k_HRP, v_HRP))
        scores = scores.scatter_(3, wide, q_HNmP @ k_HNmP.mT).mul_(scale)
        exact = scores.dtype if scores.dtype == torch.float64 else torch.float32
        weights = scores.softmax(-1, dtype=exact).to(scores.dtype)
        places = columns.flatten(1)[:, :, None].expand(-1, -1, values_HsP.shape[2])
        change = v_HNmP - values_HsP.gather(1, places).unflatten(1, (many, each))
        out = (weights.flatten(1, 2) @ values_HsP).unflatten(1, (many, each))
        out = out + weights.gather(3, wide) @ change
        mixed[rows] = out.flatten(1, 2).unflatten(0, (n, heads)).transpose(1, 2).flatten(0, 1)
    return mixed


def _ranges(starts_n: Sequence[int], length: int) -> IntArray:
    """[n * length] the rows `start .. start + length` of each start."""
    return (np.array(starts_n)[:, None] + np.arange(length)).ravel()
