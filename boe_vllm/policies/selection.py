"""Choosing a set of positions to write together: the interaction that eq. 9 asks for."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any

import numpy as np

from boe_vllm.base.arrays import FloatArray, IntArray
from boe_vllm.policies.base import View, candidates_of, log, top
from boe_vllm.steering.chain import Conditional, Conditioned
from boe_vllm.steering.step import Query

CERTAIN = 0.99
"""Probability from which a candidate joins a set without a round of its own."""


def surest_pool(view: View, multiple: float) -> tuple[IntArray, FloatArray]:
    """The surest positions, so many times the tokens due: indices, ascending, and ln p, [C] each.

    What may only be committed last is among them only where it has to make up the `b`; its ln p is
    -inf.
    """
    count = math.ceil(multiple * view.quota)
    pool = np.sort(candidates_of(view, view.confidence, count))
    return pool, log(view.confidence[pool])


def pool_size(masks: int, due: int, multiple: float) -> int:
    """Most positions in a `surest_pool` of so many masks, for so many tokens due."""
    return min(masks, math.ceil(multiple * due))


def chain_set(
    view: View, candidates: IntArray, scores: FloatArray, *, certain: float = CERTAIN
) -> Generator[Query[Any], Any, tuple[IntArray, IntArray]]:
    """Build the set by the chain rule: indices into `candidates` and their tokens, [b] each.

    The best candidate by the given scores joins; then the others are predicted again as if it were
    written, all rows but the candidates' frozen, and the likeliest of them joins; and so on. What
    they propose is what now is likeliest (or sampled, with the same random numbers). Candidates
    whose probability reaches `certain` join without a round of their own.

    What may only be committed last joins when no other position of the block is left; the set is
    smaller than `b` when that leaves nothing of the candidates.

    Args:
        view: of the request.
        candidates: [C] indices into `View.positions`, at least `b`.
        scores: [C] what the first is chosen by; -inf where the proposal may only come last.
        certain: see above.
    """
    confidence, tokens = view.confidence[candidates], view.proposal[candidates]
    uniform = view.write_uniforms()[candidates]
    others_left = np.isfinite(np.delete(view.confidence, candidates)).any()
    current = scores.copy()
    chosen: list[int] = []
    left = np.arange(len(candidates))
    while len(chosen) < view.quota:
        order = left[top(current[left], len(left))]
        room = view.quota - len(chosen)
        if np.isneginf(current[order[0]]):
            chosen += [] if others_left else order[:room].tolist()
            break
        joining = [int(i) for n, i in enumerate(order) if n == 0 or confidence[i] >= certain]
        chosen += joining[:room]
        if len(chosen) == view.quota:
            break
        left = np.setdiff1d(left, chosen)
        given: Conditioned = yield Conditional(
            written=candidates[chosen],
            tokens=tokens[chosen],
            queried=candidates[left],
            temperature=view.temperature,
            uniform=uniform[left],
        )
        tokens[left] = given.proposal
        confidence[left] = view.committable(given.proposal, given.confidence)
        current[left] = log(confidence[left])
    return np.array(chosen, dtype=np.int64), tokens[chosen]


def chain_rows(candidates: int, due: int) -> int:
    """Most rows that `chain_set` computes for so many candidates and tokens due."""
    return max(0, due - 1) * candidates


def pairwise_set(scores: FloatArray, coupling: FloatArray, count: int) -> IntArray:
    """Greedy `argmax_i score_i - sum of coupling_ij over the chosen j`, [b]; ties by position.

    Args:
        scores: [C] scores, -inf for positions that come last: they are taken, lowest position
            first, once nothing else is left.
        coupling: [C, C] nats, already weighted.
        count: b.
    """
    chosen: list[int] = []
    penalty = np.zeros(len(scores))
    left = np.arange(len(scores))
    for _ in range(count):
        best = int(left[top((scores - penalty)[left], 1)[0]])
        chosen.append(best)
        left = left[left != best]
        penalty += coupling[best]
    return np.array(chosen, dtype=np.int64)


def over_all(view: View, candidates: IntArray, scores: FloatArray) -> FloatArray:
    """[M] the candidates' scores, -inf elsewhere."""
    everyones = np.full(len(view.positions), -np.inf)
    everyones[candidates] = scores
    return everyones
