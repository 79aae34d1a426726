"""Attention of hypothetical rows to keys and values of their own: every state gets a set of them.

They are its sequence's, with some replaced by those of new rows; all sets are attended in one call
for sequences of any lengths.

A copy costs a GPU less than the many launches that do without (`attention.overlay`, for the CPU,
where a state's own rows are what is replaced). Which rows are copied is the same in every layer.

Legend: `Q` packed rows of all states, `S` packed rows of keys and values of all sequences, `H`/`G`
heads of queries/keys, `P` size of a head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from boe_vllm.attention import AttentionLayout, attention_forward
from boe_vllm.attention.overlay import Overlay
from boe_vllm.base.arrays import IntArray
from boe_vllm.base.transfer import Arrival, Transfer
from boe_vllm.models.functional import chosen_rows

Tensor = torch.Tensor

_MOST_ELEMENTS = 2**26
"""Elements of keys that are copied for one call, unless one state alone has more."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KeySet:
    """What some packed rows attend to: a sequence's keys, with new rows in the place of some."""

    queries: int
    """Packed rows that attend to it; those of one set follow each other, and so do the sets."""
    kv_start: int
    """First key row of the sequence."""
    kv_len: int
    """Key rows of the sequence."""
    columns: IntArray
    """[m] places among the sequence's key rows that are replaced."""
    rows: IntArray
    """[m] packed rows whose new keys and values stand there."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReplacedKeys:
    """Some states that are attended in one call."""

    rows: slice
    """Of the packed rows of all states."""
    index: Arrival
    """Rows of the old keys followed by the new, state by state."""
    layout: AttentionLayout
    """A sequence for each state."""


def key_sets(overlays: Sequence[Overlay]) -> list[KeySet]:
    """A set for every state, whose own rows stand in it; the states are packed in this order."""
    sets, first = [], 0
    for overlay in overlays:
        for columns in overlay.columns_Nm:
            many = len(columns)
            rows = first + np.arange(many)
            sets.append(
                KeySet(
                    queries=many,
                    kv_start=overlay.kv_start,
                    kv_len=overlay.kv_len,
                    columns=columns,
                    rows=rows,
                )
            )
            first += many
    return sets


def replace_keys(
    sets: Sequence[KeySet], *, key_rows: int, row_elements: int, transfer: Transfer
) -> list[ReplacedKeys]:
    """Find every set's keys.

    Args:
        sets: in the order of the rows that attend to them.
        key_rows: of all sequences, `S`.
        row_elements: of one row of keys; bounds how many sets are put together.
        transfer: what takes the indices to the device.
    """
    calls, first, start = [], 0, 0
    states: list[IntArray] = []
    rows: list[int] = []

    def close() -> None:
        if states:
            layout = AttentionLayout(
                q_seqlens=tuple(rows),
                kv_seqlens=tuple(map(len, states)),
                active_seqlens=(0,) * len(rows),
            )
            index = transfer.add(np.concatenate(states))
            calls.append(ReplacedKeys(rows=slice(start, first), index=index, layout=layout))

    for own in sets:
        held = sum(map(len, states))
        if states and (held + own.kv_len) * row_elements > _MOST_ELEMENTS:
            close()
            states, rows, start = [], [], first
        keys = own.kv_start + np.arange(own.kv_len)
        keys[own.columns] = key_rows + own.rows
        states.append(keys)
        rows.append(own.queries)
        first += own.queries
    close()
    return calls


def replaced_attention(
    q_QHP: Tensor,
    k_QGP: Tensor,
    v_QGP: Tensor,
    keys_SGP: Tensor,
    values_SGP: Tensor,
    *,
    calls: Sequence[ReplacedKeys],
    scale: float,
) -> Tensor:
    """Mixed values of the states' rows, [Q, H, P].

    Args:
        q_QHP, k_QGP, v_QGP: the states' new queries, keys and values.
        keys_SGP, values_SGP: the old keys and values of all sequences.
        calls: the states, from `replace_keys`.
        scale: factor on the products of queries and keys.
    """
    mixed = []
    for call in calls:
        k, v = chosen_rows((keys_SGP, values_SGP), (k_QGP, v_QGP), call.index.tensor)
        mixed.append(attention_forward(q_QHP[call.rows], k, v, layout=call.layout, scale=scale))
    return torch.cat(mixed) if len(mixed) != 1 else mixed[0]
