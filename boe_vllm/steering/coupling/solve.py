"""Answers couplings and conditionals, all asks of one estimator in shared passes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from boe_vllm.prediction import RowWrites, read_statistics
from boe_vllm.steering.asks import Conditional, Conditioned, Coupling
from boe_vllm.steering.coupling.attention import attention_coupling
from boe_vllm.steering.coupling.overlap import overlap_coupling
from boe_vllm.steering.coupling.responses import measured_coupling
from boe_vllm.steering.partial import States, run_guided
from boe_vllm.steering.step import Answer, DenoisingPass

_ESTIMATORS = {
    "exact": measured_coupling,
    "pairs": measured_coupling,
    "attention": attention_coupling,
    "overlap": overlap_coupling,
}


def coupling(current: DenoisingPass, asks: Sequence[tuple[int, Coupling]]) -> list[Answer]:
    """[C, C] per ask; asks that share an estimator share its passes."""
    answers: dict[int, Answer] = {}
    for solve in dict.fromkeys(_ESTIMATORS.values()):
        members = [n for n, (_, ask) in enumerate(asks) if _ESTIMATORS[ask.estimator] is solve]
        if members:
            answers.update(zip(members, solve(current, [asks[n] for n in members]), strict=True))
    return [answers[n] for n in range(len(asks))]


def conditional(current: DenoisingPass, asks: Sequence[tuple[int, Conditional]]) -> list[Answer]:
    """`Conditioned` per ask: written and queried rows are run again, all others frozen."""
    states, tokens, read, rows = [], [], [], []
    first = 0
    for s, ask in asks:
        places = np.concatenate([ask.written, ask.queried])
        masks = np.full(len(ask.queried), current.log_probs.mask_token_id)
        states.append(States(sequence=s, places=places[None, :]))
        tokens.append(np.concatenate([ask.tokens, masks]))
        read.append(first + len(ask.written) + np.arange(len(ask.queried)))
        rows.append(current.logit_rows(s, ask.queried))
        first += len(places)
    x = current.model.embed(torch.from_numpy(np.concatenate(tokens)).to(current.device))
    hidden = run_guided(current, states, x)
    wanted = torch.from_numpy(np.concatenate(read)).to(current.device)
    log_probs = current.log_probs.of(
        hidden[wanted], current.log_probs.rules_R[np.concatenate(rows)]
    )
    counts = [len(ask.queried) for _, ask in asks]
    statistics = read_statistics(
        log_probs,
        RowWrites(
            temperature=np.repeat([ask.temperature for _, ask in asks], counts),
            uniform=np.concatenate([ask.uniform for _, ask in asks]),
        ),
    )
    answers, start = [], 0
    for (s, _ask), count, state in zip(asks, counts, states, strict=True):
        part = slice(start, start + count)
        start += count
        answers.append(
            Answer(
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
