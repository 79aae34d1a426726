"""Attention of hypothetical rows over a sequence's own keys and values.

A state supposes other tokens at a few positions of a sequence. Its rows meet the sequence's old
keys and values everywhere, except at the state's own positions, where they meet the state's new
ones. All states of a sequence share its keys: nothing as long as the sequence is copied per state.

Legend: `Q` packed rows of all states, `S` packed rows of keys and values of all sequences, `N`
states of one sequence, `m` rows of each of them, `s` key rows of that sequence, `H`/`G` heads of
queries/keys, `P` size of a head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

Tensor = torch.Tensor


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


def overlay_attention(
    q_QHP: Tensor,
    k_QGP: Tensor,
    v_QGP: Tensor,
    keys_SGP: Tensor,
    values_SGP: Tensor,
    *,
    overlays: Sequence[Overlay],
    scale: float,
) -> Tensor:
    """Mixed values of the states' rows, [Q, H, P]; softmax in at least float32.

    Args:
        q_QHP, k_QGP, v_QGP: the states' new queries, keys and values.
        keys_SGP, values_SGP: the old keys and values of all sequences.
        overlays: the states, in the order in which their rows are packed.
        scale: factor on the products of queries and keys.
    """
    group = q_QHP.shape[1] // k_QGP.shape[1]
    mixed = torch.empty_like(q_QHP)
    first = 0
    for states in overlays:
        rows = slice(first, first + states.rows)
        first += states.rows
        if states.rows == 0:
            continue
        many, each = states.columns_Nm.shape
        span = slice(states.kv_start, states.kv_start + states.kv_len)
        keys_HsP = _per_query_head(keys_SGP[span], group)
        values_HsP = _per_query_head(values_SGP[span], group)
        q_HNmP, k_HNmP, v_HNmP = (
            _per_query_head(x[rows], group if x is not q_QHP else 1).unflatten(1, (many, each))
            for x in (q_QHP, k_QGP, v_QGP)
        )
        heads = q_HNmP.shape[0]
        scores = (q_HNmP.flatten(1, 2) @ keys_HsP.mT).unflatten(1, (many, each))
        columns = states.columns_Nm[None, :, None, :].expand(heads, many, each, each)
        scores = scores.scatter(3, columns, q_HNmP @ k_HNmP.mT).mul_(scale)
        exact = scores.dtype if scores.dtype == torch.float64 else torch.float32
        weights = scores.softmax(-1, dtype=exact).to(scores.dtype)
        change = v_HNmP - values_HsP[:, states.columns_Nm]
        out = (weights.flatten(1, 2) @ values_HsP).unflatten(1, (many, each))
        out = out + weights.gather(3, columns) @ change
        mixed[rows] = out.flatten(1, 2).transpose(0, 1)
    return mixed


def _per_query_head(x_NGP: Tensor, group: int) -> Tensor:
    """[H, N, P], each key head repeated for its group of query heads."""
    x = x_NGP.transpose(0, 1)
    return x if group == 1 else x.repeat_interleave(group, 0)
