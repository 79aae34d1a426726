"""Coupling measured on hypothetical states: write one proposal, see what the others become.

Legend: `C` pool of one request, `N` states, `m` rows of a state, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from boe_vllm.base.arrays import FloatArray, IntArray
from boe_vllm.steering.partial import States, run_guided
from boe_vllm.steering.queries import Coupling
from boe_vllm.steering.step import DenoisingPass, QueryResult

Tensor = torch.Tensor


def measured_coupling(
    current: DenoisingPass, queries: Sequence[tuple[int, Coupling]]
) -> list[QueryResult]:
    """[C, C] per query for the estimators "exact" and "pairs": one packed pass for all queries.

    One state per member of the pool. In "exact" all masked rows of the block are run again, in
    "pairs" the pool's rows alone; all other rows keep their old keys and values.
    """
    states, tokens, read = [], [], []
    first = 0
    for s, query in queries:
        many = len(query.pool)
        rows = query.pool
        if query.estimator == "exact":
            rows = np.arange(len(current.sequences[s].logit_positions))
        places = np.tile(rows, (many, 1))
        ids = np.full(places.shape, current.log_probs.mask_token_id)
        own = np.searchsorted(rows, query.pool)
        ids[np.arange(many), own] = query.tokens
        states.append(States(sequence=s, places=places))
        tokens.append(ids.ravel())
        read.append(first + (np.arange(many)[:, None] * len(rows) + own[None, :]).ravel())
        first += places.size
    x = current.model.embed(torch.from_numpy(np.concatenate(tokens)).to(current.device))
    hidden = run_guided(current, states, x)
    index = np.concatenate(read)
    old_rows = np.concatenate(
        [np.tile(current.logit_rows(s, query.pool), len(query.pool)) for s, query in queries]
    )
    wanted = np.concatenate([np.tile(query.tokens, len(query.pool)) for _, query in queries])
    kl, pmi = _changes(current, hidden, index, old_rows, wanted)
    answers, start = [], 0
    for (s, query), given in zip(queries, states, strict=True):
        many = len(query.pool)
        part = slice(start, start + many * many)
        start += many * many
        directed = kl[part] if query.measure == "kl" else -0.5 * pmi[part]
        matrix = directed.reshape(many, many)
        matrix = matrix + matrix.T
        np.fill_diagonal(matrix, 0.0)
        passes = current.passes(s)
        rows_forward = passes * given.places.size
        answers.append(QueryResult(value=matrix, forwards=passes, rows_forward=rows_forward))
    return answers


def _changes(
    current: DenoisingPass, hidden: Tensor, index: IntArray, old_rows: IntArray, wanted: IntArray
) -> tuple[FloatArray, FloatArray]:
    """KL(new || old) and the change of the wanted tokens' log-probability, per read row, nats."""
    rows = torch.from_numpy(index).to(current.device)
    constraint_r = current.log_probs.constraint_R[old_rows]
    new = current.log_probs.of(hidden[rows], constraint_r)
    kl, pmi = [], []
    for places, logp in new.tiles():
        old = torch.cat([tile for _, tile in current.log_probs.rows(old_rows[places])])
        kl.append((logp.exp() * (logp - old)).sum(-1))
        token = torch.from_numpy(wanted[places]).to(logp.device)[:, None]
        pmi.append((logp.gather(1, token) - old.gather(1, token))[:, 0])
    both = torch.stack([torch.cat(kl), torch.cat(pmi)]).double().cpu().numpy()
    return both[0], both[1]
