"""Attention as the step's own pass saw it, read off what it saved; costs no forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from boe_vllm.base.arrays import FloatArray, IntArray
from boe_vllm.base.transfer import Transfer
from boe_vllm.models.functional import accurate
from boe_vllm.steering.step import DenoisingPass, Query, QueryResult

Tensor = torch.Tensor

_MOST_SCORES = 2**24
"""Elements of scores, rows x heads x keys, that a map holds at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Attention(Query[FloatArray]):
    """Attention between masked rows: float64 [C, C], row i looking at column j, mean over the heads
    of the last layers. Costs no forward."""

    index: IntArray
    """[C] indices into `View.positions`."""
    layers: float
    """Share of the layers, the last ones; at least one."""

    @classmethod
    def solve(
        cls, current: DenoisingPass, queries: Sequence[tuple[int, Attention]]
    ) -> list[QueryResult[FloatArray]]:
        """Read off the step's own pass."""
        assert current.saved is not None
        transfer, heads = Transfer(current.device), current.model.config.shape().heads
        indices = []
        for s, query in queries:
            place = current.place(s)
            read = current.saved_rows(place, current.read_rows(place, query.index))
            indices.append((transfer.add(read), transfer.add(query.index)))
        means = []
        for (s, query), (rows, columns) in zip(queries, indices, strict=True):
            last = max(1, round(query.layers * len(current.saved.layers)))
            total = attention_between(current, s, rows.tensor, columns.tensor, last)
            means.append(total.double() / (last * heads))
        return [QueryResult(value=own) for own in read_together(means)]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AttentionMap(Query[FloatArray]):
    """Attention of the view's masked positions to all positions: float64 [M + 1, L], mean over the
    heads of the last layers; the last row is the mean over all rows of the sequence. Costs no
    forward.

    Column `j` is position `j`. Under a cache, what the step did not compute is left out: its
    columns are zero, and the mean is over the computed rows.
    """

    layers: int
    """How many, the last ones; all of a network with fewer."""

    @classmethod
    def solve(
        cls, current: DenoisingPass, queries: Sequence[tuple[int, AttentionMap]]
    ) -> list[QueryResult[FloatArray]]:
        """Read off the step's own pass, which has saved all rows, with one read for all queries."""
        found = [_map(current, s, query.layers) for s, query in queries]
        results = []
        for (s, _), own in zip(queries, read_together(found), strict=True):
            value = np.zeros((len(own), len(current.sequences[s].tokens)))
            value[:, current.layout.row_positions[current.place(s)]] = own
            results.append(QueryResult(value=value))
        return results


def read_together(found: Sequence[Tensor]) -> list[FloatArray]:
    """Tensors of any shapes as float64 arrays of theirs, by one copy to the host."""
    host = torch.cat([x.double().flatten() for x in found]).cpu().numpy()
    ends = np.cumsum([x.numel() for x in found])
    parts = np.split(host, ends[:-1])
    return [own.reshape(x.shape) for own, x in zip(parts, found, strict=True)]


def attention_between(
    current: DenoisingPass, s: int, rows_C: Tensor, columns_c: Tensor, last: int = 0
) -> Tensor:
    """[C, c] attention between rows of a sequence, summed over layers and heads.

    Of a CFG pair, the sequence's own.

    Args:
        current: the step's pass, with what it saved.
        s: the sequence.
        rows_C: saved rows that look.
        columns_c: the places among the sequence's key rows of what they look at.
        last: layers that count, from the end; 0 for all.
    """
    assert current.saved is not None
    layout, place = current.layout.attention, current.place(s)
    span = slice(layout.kv_starts[place], layout.kv_starts[place] + layout.kv_seqlens[place])
    total = torch.zeros(len(rows_C), len(columns_c), device=current.device)
    for saved in current.saved.layers[-last:]:
        q_HCP = saved.queries_AHP[rows_C].transpose(0, 1)
        group = q_HCP.shape[0] // saved.keys_SGP.shape[1]
        keys_HsP = saved.keys_SGP[span].transpose(0, 1).repeat_interleave(group, 0)
        scores = accurate(q_HCP @ keys_HsP.mT) * q_HCP.shape[-1] ** -0.5
        total = total + scores.softmax(-1)[:, :, columns_c].sum(0)
    return current.model.sum_over_ranks(total)


def _map(current: DenoisingPass, s: int, layers: int) -> Tensor:
    """[M + 1, live] attention to the computed rows of a sequence, in their packed order."""
    assert current.saved is not None
    place, masked = current.place(s), len(current.sequences[s].logit_positions)
    live, start = current.layout.live_lens[place], current.layout.saved_starts[place]
    assert current.layout.saved_lens[place] == live, "a map needs all rows saved"
    last = min(layers, len(current.saved.layers))
    heads = current.model.config.shape().heads
    rows = torch.arange(start, start + live, device=current.device)
    tile = max(1, _MOST_SCORES // (heads * current.layout.attention.kv_seqlens[place]))
    pieces = [attention_between(current, s, own, rows - start, last) for own in rows.split(tile)]
    seen = torch.cat(pieces) / (last * heads)
    return torch.cat([seen[:masked], seen.mean(0, keepdim=True)])  # whose rows come first
