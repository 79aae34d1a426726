"""Estimators of the interaction between writes: the pair terms of eq. 9.

    exact      every candidate's write, the response of all masked rows; the oracle
    pairs      the same, but only the pool's own rows respond
    attention  `a_ij min(H_i, H_j)`; costs no forward
    overlap    `a_ij sum_v sqrt(p_i(v) (1 - p_i(v)) p_j(v) (1 - p_j(v)))`; costs no forward

The first two write one proposal and see what the others become, all other rows frozen. `a` is the
attention between the two rows, mean over layers, heads and both directions, in units of its mean
over the pool. The smaller entropy bounds the mutual information of two tokens. The sum in "overlap"
is the overlap of the standard deviations of the tokens' indicators, and bounds the sum of their
covariances over equal tokens: it is large where both hesitate over the same tokens and zero where
one is decided. Two positions that compete for a token (or must repeat it) depend on each other; a
dependence between different tokens is missed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from boe_vllm.base.arrays import FloatArray, IntArray
from boe_vllm.models.functional import accurate
from boe_vllm.steering.hypothetical import run_guided
from boe_vllm.steering.step import DenoisingPass, Query, QueryResult

Tensor = torch.Tensor
Estimator = Literal["exact", "pairs", "attention", "overlap"]
Measure = Literal["kl", "pmi"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Coupling(Query[FloatArray]):
    """How strongly proposals depend on each other: float64 [C, C], nats.

    Symmetric with a zero diagonal. With measure "kl", `kappa_ij = KL(p_j given i || p_j) +
    KL(p_i given j || p_i)`, where "given i" means with the proposal of i written. With measure
    "pmi", the loss of log-probability of the proposals themselves, `-(ln p_j(x_j given i) -
    ln p_j(x_j))`, the mean of both directions: negative where they support each other.
    """

    pool: IntArray
    """[C] indices into `View.positions`."""
    tokens: IntArray
    """[C] the proposals."""
    entropy: FloatArray
    """[C] entropies of the predictions, nats."""
    estimator: Estimator
    """See the module."""
    measure: Measure
    """What "exact" and "pairs" measure; the other estimators do not depend on it."""

    @classmethod
    def solve(
        cls, current: DenoisingPass, queries: Sequence[tuple[int, Coupling]]
    ) -> list[QueryResult[FloatArray]]:
        """All that are measured share one packed pass."""
        kinds = {"attention": _by_attention, "overlap": _by_overlap}
        results: dict[int, QueryResult[FloatArray]] = {}
        measured = [n for n, (_, query) in enumerate(queries) if query.estimator not in kinds]
        if measured:
            solved = _measured(current, [queries[n] for n in measured])
            results.update(zip(measured, solved, strict=True))
        for n, (s, query) in enumerate(queries):
            if n not in results:
                results[n] = QueryResult(value=kinds[query.estimator](current, s, query))
        return [results[n] for n in range(len(queries))]


# ---- measured on hypothetical states -------------------------------------------------------------


def _measured(
    current: DenoisingPass, queries: Sequence[tuple[int, Coupling]]
) -> list[QueryResult[FloatArray]]:
    """ "exact" and "pairs": one state for each member of a pool, all in one packed pass.

    In "exact" all masked rows of the block are run again, in "pairs" the pool's rows alone.
    """
    rows, tokens, read = [], [], []
    first = 0
    for s, query in queries:
        many, own = len(query.pool), query.pool
        if query.estimator == "exact":
            own = np.arange(len(current.sequences[s].logit_positions))
        states = np.tile(own, (many, 1))
        ids = np.full(states.shape, current.log_probs.mask_token_id)
        columns = np.searchsorted(own, query.pool)
        ids[np.arange(many), columns] = query.tokens
        rows.append(states)
        tokens.append(ids.ravel())
        read.append(first + (np.arange(many)[:, None] * len(own) + columns[None, :]).ravel())
        first += states.size
    x = current.model.embed(torch.from_numpy(np.concatenate(tokens)).to(current.device))
    hidden = run_guided(current, [s for s, _ in queries], rows, x)
    wanted = torch.from_numpy(np.concatenate(read)).to(current.device)
    changes = _changes(current, hidden[wanted], queries)
    results, start = [], 0
    for (s, query), states in zip(queries, rows, strict=True):
        many = len(query.pool)
        directed = changes[query.measure][start : start + many * many].reshape(many, many)
        start += many * many
        matrix = directed + directed.T
        np.fill_diagonal(matrix, 0.0)
        passes = current.passes(s)
        results.append(
            QueryResult(value=matrix, forwards=passes, rows_forward=passes * states.size)
        )
    return results


def _changes(
    current: DenoisingPass, hidden_ND: Tensor, queries: Sequence[tuple[int, Coupling]]
) -> dict[Measure, FloatArray]:
    """[N] KL(new || old), and half the loss of the proposals' log-probability, nats; for every
    (written, read) pair of every pool, query by query."""
    old_rows = np.concatenate(
        [np.tile(current.logit_rows(s, query.pool), len(query.pool)) for s, query in queries]
    )
    tokens = np.concatenate([np.tile(query.tokens, len(query.pool)) for _, query in queries])
    new = current.log_probs.of(hidden_ND, current.log_probs.constraint_R[old_rows])
    kl, pmi = [], []
    for places, logp in new.tiles():
        old = torch.cat([tile for _, tile in current.log_probs.rows(old_rows[places])])
        kl.append((logp.exp() * (logp - old)).sum(-1))
        token = torch.from_numpy(tokens[places]).to(logp.device)[:, None]
        pmi.append((logp.gather(1, token) - old.gather(1, token))[:, 0])
    both = torch.stack([torch.cat(kl), torch.cat(pmi)]).double().cpu().numpy()
    return {"kl": both[0], "pmi": -0.5 * both[1]}


# ---- read off the step's own pass ----------------------------------------------------------------


def _by_attention(current: DenoisingPass, s: int, query: Coupling) -> FloatArray:
    smaller = np.minimum.outer(query.entropy, query.entropy)
    return _mutual_attention(current, s, query.pool) * smaller


def _by_overlap(current: DenoisingPass, s: int, query: Coupling) -> FloatArray:
    return _mutual_attention(current, s, query.pool) * _overlap(current, s, query)


def _mutual_attention(current: DenoisingPass, s: int, pool: IntArray) -> FloatArray:
    """[C, C] attention between rows of a sequence, in units of its mean; the diagonal is zero.

    Mean over layers, heads and both directions; of a CFG pair, the sequence's own.

    Args:
        current: the step's pass, with what it saved.
        s: the sequence.
        pool: [C] indices into its masked positions.
    """
    assert current.saved is not None
    layout, place = current.layout.attention, current.place(s)
    span = slice(layout.kv_starts[place], layout.kv_starts[place] + layout.kv_seqlens[place])
    rows = torch.from_numpy(current.saved_rows(place, pool)).to(current.device)
    columns = torch.from_numpy(pool).to(current.device)
    total = torch.zeros(len(pool), len(pool), device=current.device)
    for saved in current.saved.layers:
        q_HCP = saved.queries_AHP[rows].transpose(0, 1)
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


def _overlap(current: DenoisingPass, s: int, query: Coupling) -> FloatArray:
    """[C, C] overlaps; the predictions are read tile by tile, so that memory stays bounded."""
    rows = current.logit_rows(s, query.pool)
    overlap = np.empty((len(rows), len(rows)))
    for left, logp_rV in current.log_probs.rows(rows):
        spread_rV = _spread(logp_rV)
        for right, other_rV in current.log_probs.rows(rows[: left.stop]):
            tile = spread_rV @ _spread(other_rV).mT
            overlap[left, right] = tile.double().cpu().numpy()
            overlap[right, left] = overlap[left, right].T
    return overlap


def _spread(logp_rV: Tensor) -> Tensor:
    """[r, V] standard deviations of the tokens' indicators, `sqrt(p (1 - p))`."""
    p = logp_rV.exp()
    return (p * (1 - p)).clamp_(min=0).sqrt_()
