"""Choosing a set of positions to write together: the interaction terms of eq. 9.

Legend: `C` candidates, `b` tokens of this step.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np

from boe_vllm.base.arrays import FloatArray, IntArray
from boe_vllm.policies.base import View, top
from boe_vllm.sampling import randomness
from boe_vllm.steering.chain import Conditional, Conditioned
from boe_vllm.steering.step import Query


def pairwise_set(scores: FloatArray, coupling: FloatArray, count: int) -> IntArray:
    """Greedy `argmax_i score_i - sum of coupling_ij over the chosen j`, [b]; ties by position.

    Args:
        scores: [C] scores, -inf for positions that come last.
        coupling: [C, C] nats, already weighted.
        count: b.
    """
    chosen: list[int] = []
    penalty = np.zeros(len(scores))
    left = scores.copy()
    for _ in range(count):
        # Those that come last are still taken, lowest position first, once nothing else is left.
        open_scores = np.where(np.isin(np.arange(len(scores)), chosen), -np.inf, left - penalty)
        order = top(open_scores, len(scores))
        best = next(int(i) for i in order if i not in chosen)
        chosen.append(best)
        penalty += coupling[best]
    return np.array(chosen, dtype=np.int64)


def conditional_set(
    view: View, candidates: IntArray, scores: FloatArray, *, risk: float, certain: float
) -> Generator[Query, Any, tuple[IntArray, IntArray]]:
    """Build the set by the chain rule: indices into `candidates` and their tokens, [b] each.

    The best candidate joins; then the others are predicted again as if it were written, all rows
    but the candidates' frozen, and so on. Their scores change by `risk` times the change of their
    log-probability, and their proposals by what now is likeliest (or sampled, with the same random
    numbers). Candidates whose probability reaches `certain` join without a round of their own.
    """
    confidence = view.confidence[candidates].copy()
    tokens = view.proposal[candidates].copy()
    uniform = view.uniforms(randomness.WRITE)[candidates]
    gains = scores - risk * _log(confidence)
    current = scores.copy()
    chosen: list[int] = []
    left = np.arange(len(candidates))
    while len(chosen) < view.quota:
        order = left[top(current[left], len(left))]
        joining = [int(i) for n, i in enumerate(order) if n == 0 or confidence[i] >= certain]
        chosen += joining[: view.quota - len(chosen)]
        left = np.setdiff1d(left, chosen)
        if len(chosen) == view.quota:
            break
        given: Conditioned = yield Conditional(
            written=candidates[chosen],
            tokens=tokens[chosen],
            queried=candidates[left],
            temperature=view.temperature,
            uniform=uniform[left],
        )
        tokens[left] = given.proposal
        forbidden = np.isneginf(current[left])
        confidence[left] = given.confidence
        fresh = gains[left] + risk * _log(given.confidence)
        current[left] = np.where(forbidden, -np.inf, fresh)
    return np.array(chosen, dtype=np.int64), tokens[chosen]


def _log(p: FloatArray) -> FloatArray:
    return np.log(np.maximum(p, 1e-300))
