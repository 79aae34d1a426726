"""Attention of hypothetical rows on a GPU: every state gets the keys and values of its sequence anew,
its own rows' replaced, and all states are attended in one call for sequences of any lengths.

A copy costs a GPU less than the many launches that do without (`attention.overlay`, for the CPU).
Which rows are copied is the same in every layer.

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
class ReplacedKeys:
    """Some states that are attended in one call."""

    rows: slice
    """Of the packed rows of all states."""
    index: Arrival
    """Rows of the old keys followed by the new, state by state."""
    layout: AttentionLayout
    """A sequence for each state."""


def replace_keys(
    overlays: Sequence[Overlay], *, key_rows: int, row_elements: int, transfer: Transfer
) -> list[ReplacedKeys]:
    """Find every state's keys; the states' rows are packed in the given order.

    Args:
        overlays: of each sequence.
        key_rows: of all sequences, `S`.
        row_elements: of one row of keys; bounds how many states are put together.
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

    for overlay in overlays:
        for columns in overlay.columns_Nm:
            held = sum(map(len, states))
            if states and (held + overlay.kv_len) * row_elements > _MOST_ELEMENTS:
                close()
                states, rows, start = [], [], first
            keys = overlay.kv_start + np.arange(overlay.kv_len)
            keys[columns] = key_rows + first + np.arange(len(columns))
            states.append(keys)
            rows.append(len(columns))
            first += len(columns)
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
