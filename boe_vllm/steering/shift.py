"""How far predictions move once some masks are written: one whole hypothetical state."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from boe_vllm.base.arrays import FloatArray, IntArray
from boe_vllm.base.transfer import Transfer
from boe_vllm.models.rows import RowLayout
from boe_vllm.sampling.log_probs import LogProbabilities
from boe_vllm.steering.lookahead import (
    Lookahead,
    SoftWrites,
    State,
    state_batches,
    state_log_probs,
    states_of,
)
from boe_vllm.steering.step import DenoisingPass, Query, QueryResult


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shift(Query[FloatArray]):
    """`KL(p_j || p_j given the writes)` of the step's own prediction and the state's: float64 [M],
    nats; 0 where something is written. Costs one forward of the whole state."""

    written: IntArray
    """[w] indices into `View.positions`."""
    tokens: IntArray
    """[w] what is written there."""

    @classmethod
    def solve(
        cls, current: DenoisingPass, queries: Sequence[tuple[int, Shift]]
    ) -> list[QueryResult[FloatArray]]:
        """Pack the states of all queries."""
        ahead = [
            (s, Lookahead(writes=(query.written,), tokens=(query.tokens,))) for s, query in queries
        ]
        states = [
            state for n, (s, query) in enumerate(ahead) for state in states_of(current, n, s, query)
        ]
        soft, values = SoftWrites(current, ahead), []
        for batch in state_batches(current, states):
            values += _shifts(current, batch, *state_log_probs(current, batch, soft))
        results = []
        for state, value in zip(states, values, strict=True):
            passes = current.passes(state.sequence)
            rows = passes * state.rows.live_rows
            results.append(QueryResult(value=value, forwards=passes, rows_forward=rows))
        return results


def _shifts(
    current: DenoisingPass, states: Sequence[State], log_probs: LogProbabilities, layout: RowLayout
) -> list[FloatArray]:
    """[M] for each state, with one read for all."""
    before = [current.logit_rows(state.sequence, state.index) for state in states]
    after = [layout.logit_starts[n] + np.arange(len(s.index)) for n, s in enumerate(states)]
    old_rows, transfer, found = np.concatenate(before), Transfer(current.device), []
    for places, new in log_probs.rows(np.concatenate(after), transfer):
        old = torch.cat([tile for _, tile in current.log_probs.rows(old_rows[places], transfer)])
        found.append((old.exp() * (old - new)).sum(-1))
    host = torch.cat(found).double().cpu().numpy() if found else np.empty(0)
    values, ends = [], np.cumsum([len(state.index) for state in states])
    for state, moved in zip(states, np.split(host, ends[:-1]), strict=True):
        value = np.zeros(len(current.sequences[state.sequence].logit_positions))
        value[state.index] = moved
        values.append(value)
    return values
