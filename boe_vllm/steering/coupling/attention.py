"""Coupling by attention: a proxy that costs no forward.

`kappa_ij = a_ij min(H_i, H_j)`, where `a` is the attention between the two rows, mean over layers,
heads and both directions, in units of its mean over the pool; the smaller entropy bounds the mutual
information of the two tokens.

Legend: `C` pool of one request, `H` heads, `P` size of a head, `s` key rows of the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from boe_vllm.base.arrays import FloatArray, IntArray
from boe_vllm.models.functional import accurate
from boe_vllm.steering.queries import Coupling
from boe_vllm.steering.step import DenoisingPass, QueryResult


def attention_coupling(
    current: DenoisingPass, queries: Sequence[tuple[int, Coupling]]
) -> list[QueryResult]:
    """[C, C] per query from the step's own queries and keys."""
    return [
        QueryResult(
            value=mutual_attention(current, s, query.pool)
            * np.minimum.outer(query.entropy, query.entropy)
        )
        for s, query in queries
    ]


def mutual_attention(current: DenoisingPass, s: int, pool: IntArray) -> FloatArray:
    """[C, C] attention between rows of a sequence, in units of its mean; the diagonal is zero.

    Mean over layers, heads and both directions.

    Args:
        current: the step's pass, with its saved.
        s: the sequence.
        pool: indices into its masked positions.
    """
    assert current.saved is not None
    layout = current.layout.attention
    span = slice(layout.kv_starts[s], layout.kv_starts[s] + layout.kv_seqlens[s])
    kept = torch.from_numpy(current.saved_rows(s, pool)).to(current.device)
    columns = torch.from_numpy(pool).to(current.device)
    total = torch.zeros(len(pool), len(pool), device=current.device)
    for saved in current.saved.layers:
        q_HCP = saved.queries_AHP[kept].transpose(0, 1)
        group = q_HCP.shape[0] // saved.keys_SGP.shape[1]
        keys_HsP = saved.keys_SGP[span].transpose(0, 1).repeat_interleave(group, 0)
        scores = accurate(q_HCP @ keys_HsP.mT) * q_HCP.shape[-1] ** -0.5
        total = total + scores.softmax(-1)[:, :, columns].sum(0)
    attention = current.model.sum_over_ranks(total).double().cpu().numpy()
    attention = attention + attention.T
    np.fill_diagonal(attention, 0.0)
    pairs = len(pool) * (len(pool) - 1)
    mean = attention.sum() / max(1, pairs)
    return attention / max(mean, 1e-30)
