"""Coupling by attention and by what two predictions are unsure of; costs no forward.

    kappa_ij = a_ij sum_v sqrt(p_i(v) (1 - p_i(v)) p_j(v) (1 - p_j(v)))

where `a` is the attention between the rows as in `attention`. The sum is the overlap of the
standard deviations of the tokens' indicators, and bounds the sum of their covariances over equal
tokens: it is large where both hesitate over the same tokens and zero where one is decided. Two
positions that compete for a token (or must repeat it) depend on each other; a dependence between
different tokens is missed.

Legend: `C` pool of one request, `r` rows of one tile, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from boe_vllm.base.arrays import FloatArray
from boe_vllm.steering.coupling.attention import mutual_attention
from boe_vllm.steering.queries import Coupling
from boe_vllm.steering.step import DenoisingPass, QueryResult


def overlap_coupling(
    current: DenoisingPass, queries: Sequence[tuple[int, Coupling]]
) -> list[QueryResult]:
    """[C, C] per query from the step's own attention and predictions."""
    return [
        QueryResult(value=mutual_attention(current, s, query.pool) * _overlap(current, s, query))
        for s, query in queries
    ]


def _overlap(current: DenoisingPass, s: int, query: Coupling) -> FloatArray:
    """[C, C] overlaps; the predictions are read tile by tile, so that memory stays bounded."""
    rows = current.logit_rows(s, query.pool)
    overlap = np.empty((len(rows), len(rows)))
    for left, logp_rV in current.log_probs.rows(rows):
        spread_rV = _spread(logp_rV)
        for right, other_rV in current.log_probs.rows(rows[: left.stop]):
            part = spread_rV @ _spread(other_rV).mT
            overlap[left, right] = part.double().cpu().numpy()
            overlap[right, left] = overlap[left, right].T
    return overlap


def _spread(logp_rV: torch.Tensor) -> torch.Tensor:
    """Standard deviations of the tokens' indicators, `sqrt(p (1 - p))`."""
    p = logp_rV.exp()
    return (p * (1 - p)).clamp_(min=0).sqrt_()
