"""Log-probabilities of given tokens at masked positions, from the step's own forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from boe_vllm.base.arrays import FloatArray, IntArray
from boe_vllm.base.transfer import Transfer
from boe_vllm.steering.step import DenoisingPass, Query, QueryResult


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Likelihood(Query[FloatArray]):
    """How likely given tokens are: float64 [N], nats. Costs no forward."""

    index: IntArray
    """[N] indices into `View.positions`."""
    tokens: IntArray
    """[N] a token for each."""

    @classmethod
    def solve(
        cls, current: DenoisingPass, queries: Sequence[tuple[int, Likelihood]]
    ) -> list[QueryResult[FloatArray]]:
        """Read the rows of all queries tile by tile."""
        rows = np.concatenate([current.logit_rows(s, query.index) for s, query in queries])
        tokens = np.concatenate([query.tokens for _, query in queries])
        transfer = Transfer(current.device)
        wanted = transfer.add(tokens)
        found = [
            logp.gather(-1, wanted.tensor[places, None])[:, 0]
            for places, logp in current.log_probs.rows(rows, transfer)
        ]
        values = torch.cat(found).double().cpu().numpy() if found else np.empty(0)
        ends = np.cumsum([len(query.index) for _, query in queries])
        return [QueryResult(value=own) for own in np.split(values, ends[:-1])]
