"""Answers couplings and conditionals, all queries of one estimator in shared passes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from boe_vllm.sampling.statistics import RowWrites, read_statistics
from boe_vllm.steering.coupling.attention import attention_coupling
from boe_vllm.steering.coupling.overlap import overlap_coupling
from boe_vllm.steering.coupling.responses import measured_coupling
from boe_vllm.steering.partial import States, run_guided
from boe_vllm.steering.queries import Conditional, Conditioned, Coupling
from boe_vllm.steering.step import DenoisingPass, QueryResult

_ESTIMATORS = {
    "exact": measured_coupling,
    "pairs": measured_coupling,
    "attention": attention_coupling,
    "overlap": overlap_coupling,
}


def coupling(current: DenoisingPass, queries: Sequence[tuple[int, Coupling]]) -> list[QueryResult]:
    """[C, C] per query; queries that share an estimator share its passes."""
    answers: dict[int, QueryResult] = {}
    for solve in dict.fromkeys(_ESTIMATORS.values()):
        members = [
            n for n, (_, query) in enumerate(queries) if _ESTIMATORS[query.estimator] is solve
        ]
        if members:
            answers.update(zip(members, solve(current, [queries[n] for n in members]), strict=True))
    return [answers[n] for n in range(len(queries))]


def conditional(
    current: DenoisingPass, queries: Sequence[tuple[int, Conditional]]
) -> list[QueryResult]:
    """`Conditioned` per query: written and queried rows are run again, all others frozen."""
    states, tokens, read, rows = [], [], [], []
    first = 0
    for s, query in queries:
        places = np.concatenate([query.written, query.queried])
        masks = np.full(len(query.queried), current.log_probs.mask_token_id)
        states.append(States(sequence=s, places=places[None, :]))
        tokens.append(np.concatenate([query.tokens, masks]))
        read.append(first + len(query.written) + np.arange(len(query.queried)))
        rows.append(current.logit_rows(s, query.queried))
        first += len(places)
    x = current.model.embed(torch.from_numpy(np.concatenate(tokens)).to(current.device))
    hidden = run_guided(current, states, x)
    wanted = torch.from_numpy(np.concatenate(read)).to(current.device)
    log_probs = current.log_probs.of(
        hidden[wanted], current.log_probs.constraint_R[np.concatenate(rows)]
    )
    counts = [len(query.queried) for _, query in queries]
    statistics = read_statistics(
        log_probs,
        RowWrites(
            temperature=np.repeat([query.temperature for _, query in queries], counts),
            uniform=np.concatenate([query.uniform for _, query in queries]),
        ),
    )
    answers, start = [], 0
    for (s, _ask), count, state in zip(queries, counts, states, strict=True):
        part = slice(start, start + count)
        start += count
        answers.append(
            QueryResult(
                value=Conditioned(
                    proposal=statistics.proposal[part],
                    confidence=statistics.confidence[part],
                    entropy=statistics.entropy[part],
                ),
                forwards=current.passes(s),
                rows_forward=current.passes(s) * state.places.size,
            )
        )
    return answers
