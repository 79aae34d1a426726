"""Log-probabilities of given tokens at masked positions, from the step's own forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from boe_vllm.base.arrays import IntArray
from boe_vllm.steering.queries import Query
from boe_vllm.steering.step import DenoisingPass, QueryResult


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Likelihood(Query):
    """Query how likely given tokens are; answered with float64 [N], nats. Costs no forward."""

    index: IntArray
    """[N] indices into `View.positions`."""
    tokens: IntArray
    """[N] a token for each."""


def likelihood(
    current: DenoisingPass, queries: Sequence[tuple[int, Likelihood]]
) -> list[QueryResult]:
    """[N] log-probabilities per query; `queries` are pairs of a sequence of the pass and its query."""
    rows = np.concatenate([current.logit_rows(s, query.index) for s, query in queries])
    tokens = torch.from_numpy(np.concatenate([query.tokens for _, query in queries])).to(
        current.device
    )
    values = np.empty(len(rows))
    for places, logp in current.log_probs.rows(rows):
        found = logp.gather(-1, tokens[places][:, None])[:, 0]
        values[places] = found.double().cpu().numpy()
    ends = np.cumsum([len(query.index) for _, query in queries])
    return [QueryResult(value=own) for own in np.split(values, ends[:-1])]
