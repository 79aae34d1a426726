"""Sets whose size a bound decides, with partial passes in the place of whole steps.

What a bound allows is written: all tokens that reach a probability (the rule of `threshold`), or
the longest prefix, surest first, whose entropies but the largest sum to so much (that of `eb`).
Then the surest of the rest are predicted again as if that were written, all other rows frozen, and
what the bound allows of those is written too; and so on for some rounds. A round stands for the
next step's forward and computes a few rows instead of all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from typing import Any, Literal

import numpy as np

from boe_vllm.base.arrays import FloatArray, IntArray
from boe_vllm.policies.base import Commit, View, allowed, top
from boe_vllm.policies.eb import bounded_count
from boe_vllm.steering.chain import Conditional, Conditioned
from boe_vllm.steering.step import Query

Rule = Literal["threshold", "entropy"]
"""Whose bound: that of `threshold` on each probability, or that of `eb` on a set's entropies."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """What may be written from one prediction, and what a round of partial prediction is."""

    rule: Rule
    limit: float
    """For "entropy" the most that the entropies but the largest sum to, nats; for "threshold" the
    least probability."""
    pool: int
    """Most positions that a round predicts again."""
    rounds: int
    """Most of them."""
    trust: float
    """Entropy of the surest position up to which a round is worth its rows and may write, nats;
    what is less sure waits for a full prediction."""


def bounded_set(entropy: FloatArray, confidence: FloatArray, bound: Bound) -> IntArray:
    """Indices of what may be written together, best first, at least one.

    Args:
        entropy: [M] nats.
        confidence: [M] probabilities; -inf for what may only come last, and then alone.
        bound: `rule` and `limit`.
    """
    if bound.rule == "threshold":
        return top(confidence, max(1, int((confidence >= bound.limit).sum())))
    early = np.isfinite(confidence)
    order = top(np.where(early, -entropy, -np.inf), len(entropy))
    return order[: max(1, min(bounded_count(entropy[order], bound.limit), int(early.sum())))]


def bounded_commit(
    view: View, first: IntArray, scores: FloatArray, bound: Bound
) -> Generator[Query[Any], Any, Commit]:
    """The first set and what the rounds add to it.

    The rounds end when nothing is left that may be written now.

    Args:
        view: of the request.
        first: [b] indices that are written in any case.
        scores: [M] to be reported.
        bound: what the policy is set to.
    """
    tokens, uniform = view.proposal.copy(), view.write_uniforms()
    entropy = view.entropy.copy()
    surest = allowed(-entropy, view)
    chosen = first
    for _ in range(bound.rounds):
        left = np.setdiff1d(np.arange(len(tokens)), chosen)
        left = left[np.isfinite(surest[left])]
        if not len(left) or -surest[left].max() > bound.trust:
            break
        asked = np.sort(left[top(surest[left], bound.pool)])
        given: Conditioned = yield Conditional(
            written=chosen,
            tokens=tokens[chosen],
            queried=asked,
            temperature=view.temperature,
            uniform=uniform[asked],
        )
        tokens[asked], entropy[asked] = given.proposal, given.entropy
        may = np.isfinite(view.committable(given.proposal, given.confidence))
        surest[asked] = np.where(may, -entropy[asked], -np.inf)
        if not may.any() or -surest[asked].max() > bound.trust:
            break
        confidence = np.where(may, given.confidence, -np.inf)
        more = bounded_set(entropy[asked], confidence, bound)
        chosen = np.concatenate([chosen, asked[more]])
    return Commit(chosen=chosen, tokens=tokens[chosen], scores=scores)


def bounded_rows(masks: int, rounds: int) -> int:
    """Most rows that the rounds of one step compute, for so many masks of the block.

    A round computes the rows of all that is written so far in the step and those of its pool, which
    together are at most the masks of the block.
    """
    return rounds * masks
