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
from boe_vllm.base.transfer import Transfer
from boe_vllm.steering.attention_map import attention_between, read_together
from boe_vllm.steering.step import DenoisingPass, Query, QueryResult
from boe_vllm.steering.supposed import Supposition, run_suppositions, suppose

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
        kinds: dict[bool, list[int]] = {}
        for n, (_, query) in enumerate(queries):
            kinds.setdefault(query.estimator in ("exact", "pairs"), []).append(n)
        results: dict[int, QueryResult[FloatArray]] = {}
        for measured, members in kinds.items():
            own = [queries[n] for n in members]
            solved = _measured(current, own) if measured else _read_off(current, own)
            results.update(zip(members, solved, strict=True))
        return [results[n] for n in range(len(queries))]


# ---- measured on hypothetical states -------------------------------------------------------------


def _measured(
    current: DenoisingPass, queries: Sequence[tuple[int, Coupling]]
) -> list[QueryResult[FloatArray]]:
    """ "exact" and "pairs": one state for each member of a pool, all in one packed pass.

    In "exact" all masked rows of the block are run again, in "pairs" the pool's rows alone.
    """
    supposed = [_supposition(current, s, query) for s, query in queries]
    hidden = run_suppositions(current, supposed, Transfer(current.device))
    changes = _changes(current, hidden, queries)
    results, start = [], 0
    for (s, query), states in zip(queries, supposed, strict=True):
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


def _supposition(current: DenoisingPass, s: int, query: Coupling) -> Supposition:
    """One state for each member of the pool, with its proposal written."""
    own = query.pool
    if query.estimator == "exact":
        own = np.arange(len(current.sequences[s].logit_positions))
    return suppose(
        current,
        s,
        own=own,
        written=_places_in(own, query.pool)[:, None],
        tokens=query.tokens[:, None],
        read=query.pool,
    )


def _places_in(values: IntArray, wanted: IntArray) -> IntArray:
    order = np.argsort(values)
    return order[np.searchsorted(values, wanted, sorter=order)]


def _changes(
    current: DenoisingPass, hidden_ND: Tensor, queries: Sequence[tuple[int, Coupling]]
) -> dict[Measure, FloatArray]:
    """[N] KL(new || old), and half the loss of the proposals' log-probability, nats; for every
    (written, read) pair of every pool, query by query."""
    old_rows = np.concatenate(
        [np.tile(current.logit_rows(s, query.pool), len(query.pool)) for s, query in queries]
    )
    transfer = Transfer(current.device)
    tokens = transfer.add(
        np.concatenate([np.tile(query.tokens, len(query.pool)) for _, query in queries])
    )
    new = current.log_probs.of(hidden_ND, current.log_probs.constraint_R[old_rows])
    kl, pmi = [], []
    for places, logp in new.tiles():
        tiles = current.log_probs.rows(old_rows[places], transfer)
        old = torch.cat([tile for _, tile in tiles])
        kl.append((logp.exp() * (logp - old)).sum(-1))
        token = tokens.tensor[places, None]
        pmi.append((logp.gather(1, token) - old.gather(1, token))[:, 0])
    both = torch.stack([torch.cat(kl), torch.cat(pmi)]).double().cpu().numpy()
    return {"kl": both[0], "pmi": -0.5 * both[1]}


# ---- read off the step's own pass ----------------------------------------------------------------


def _read_off(
    current: DenoisingPass, queries: Sequence[tuple[int, Coupling]]
) -> list[QueryResult[FloatArray]]:
    """ "attention" and "overlap": with one read for all queries."""
    transfer = Transfer(current.device)
    indices = []
    for s, query in queries:
        place = current.place(s)
        read = current.read_saved_rows(place, query.pool)
        indices.append((transfer.add(read), transfer.add(query.pool)))
    found = []
    for (s, query), (rows, columns) in zip(queries, indices, strict=True):
        found.append(attention_between(current, s, rows.tensor, columns.tensor))
        if query.estimator == "overlap":
            found.append(_overlap(current, s, query))
    matrices = iter(read_together(found))
    results = []
    for _, query in queries:
        attention = _in_units_of_its_mean(next(matrices))
        if query.estimator == "overlap":
            factor = next(matrices)
        else:
            factor = np.minimum.outer(query.entropy, query.entropy)
        results.append(QueryResult(value=attention * factor))
    return results


def _in_units_of_its_mean(attention_CC: FloatArray) -> FloatArray:
    """[C, C] attention in both directions over its mean; the diagonal is zero."""
    both = attention_CC + attention_CC.T
    np.fill_diagonal(both, 0.0)
    pairs = len(both) * (len(both) - 1)
    mean = both.sum() / max(1, pairs)
    return both / max(mean, 1e-30)


def _overlap(current: DenoisingPass, s: int, query: Coupling) -> Tensor:
    """[C, C] overlaps; the predictions are read tile by tile, so that memory stays bounded."""
    rows = current.logit_rows(s, query.pool)
    overlap = torch.empty(len(rows), len(rows), dtype=torch.float64, device=current.device)
    for left, logp_rV in current.log_probs.rows(rows):
        spread_rV = _spread(logp_rV)
        for right, other_rV in current.log_probs.rows(rows[: left.stop]):
            tile = (spread_rV @ _spread(other_rV).mT).double()
            overlap[left, right] = tile
            overlap[right, left] = tile.mT
    return overlap


def _spread(logp_rV: Tensor) -> Tensor:
    """[r, V] standard deviations of the tokens' indicators, `sqrt(p (1 - p))`."""
    p = logp_rV.exp()
    return (p * (1 - p)).clamp_(min=0).sqrt_()
