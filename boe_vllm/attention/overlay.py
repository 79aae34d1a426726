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

import torch

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
    columns_Nm: Tensor
    """[N, m] int64, each row's place among the sequence's key rows."""

    @property
    def rows(self) -> int:
        """Packed rows of these states."""
        return self.columns_Nm.numel()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OverlayGroup:
    """The states of `n` sequences of equal shape."""

    rows: Tensor
    """[n * N * m] their packed rows."""
    keys: Tensor
    """[n * s] their rows among all keys."""
    columns_nNm: Tensor
    """[n, N, m] int64, each row's place among its sequence's key rows."""


def group_overlays(
    overlays: Sequence[Overlay], *, heads: int, row_elements: int, device: torch.device
) -> list[OverlayGroup]:
    """Put sequences of equal shape together; the states' rows are packed in the given order.

    Args:
        overlays: of each sequence.
        heads: of the queries.
        row_elements: of one row of keys. Both bound how many sequences are put together.
        device: of the result.
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
            firsts = torch.tensor([row for row, _ in part], device=device)
            starts = torch.tensor([states.kv_start for _, states in part], device=device)
            groups.append(
                OverlayGroup(
                    rows=_ranges(firsts, many * each),
                    keys=_ranges(starts, kv_len),
                    columns_nNm=torch.stack([states.columns_Nm for _, states in part]),
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
        n, many, each = group.columns_nNm.shape

        def by_head(x: Tensor, rows: Tensor, repeat: int, n: int = n) -> Tensor:
            """[n * H, rows of one sequence, P]."""
            x = x[rows].unflatten(0, (n, -1)).transpose(1, 2)
            return (x if repeat == 1 else x.repeat_interleave(repeat, 1)).flatten(0, 1)

        keys_HsP = by_head(keys_SGP, group.keys, heads_per_key)
        values_HsP = by_head(values_SGP, group.keys, heads_per_key)
        q_HRP = by_head(q_QHP, group.rows, 1)
        k_HRP = by_head(k_QGP, group.rows, heads_per_key)
        v_HRP = by_head(v_QGP, group.rows, heads_per_key)
        heads = q_QHP.shape[1]
        columns = group.columns_nNm.repeat_interleave(heads, 0)  # [n * H, N, m]
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
        mixed[group.rows] = out.flatten(1, 2).unflatten(0, (n, heads)).transpose(1, 2).flatten(0, 1)
    return mixed


def _ranges(starts_n: Tensor, length: int) -> Tensor:
    """[n * length] the rows `start .. start + length` of each start."""
    steps = torch.arange(length, device=starts_n.device)
    return (starts_n[:, None] + steps).flatten()
