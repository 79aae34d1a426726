"""How far predictions move once some masks are written: one whole hypothetical state."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from boe_vllm.base.arrays import FloatArray, IntArray
from boe_vllm.base.transfer import Transfer
from boe_vllm.steering.lookahead import (
    Lookahead,
    SoftWrites,
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
        soft, results = SoftWrites(current, ahead), []
        for batch in state_batches(current, states):
            log_probs, layout = state_log_probs(current, batch, soft)
            for n, state in enumerate(batch):
                before = current.logit_rows(state.sequence, state.index)
                after = layout.logit_starts[n] + np.arange(len(state.index))
                transfer, found = Transfer(current.device), []
                for places, new in log_probs.rows(after, transfer):
                    tiles = current.log_probs.rows(before[places], transfer)
                    old = torch.cat([tile for _, tile in tiles])
                    found.append((old.exp() * (old - new)).sum(-1))
                value = np.zeros(len(current.sequences[state.sequence].logit_positions))
                if found:
                    value[state.index] = torch.cat(found).double().cpu().numpy()
                passes = current.passes(state.sequence)
                results.append(
                    QueryResult(
                        value=value, forwards=passes, rows_forward=passes * state.rows.live_rows
                    )
                )
        return results
