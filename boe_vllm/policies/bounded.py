"""Sets whose size a bound decides, with partial passes in the place of whole steps.

EB-Sampler's prefix is written (`eb`): the longest one, surest first, in which all entropies but the
largest sum to at most `gamma`. Then the surest of the rest are predicted again as if it were
written, all other rows frozen, and the prefix of those is written too; and so on for some rounds. A
round stands for the next step's forward and computes a few rows instead of all.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Literal, Protocol

import numpy as np

from boe_vllm.base.arrays import FloatArray, IntArray
from boe_vllm.policies.base import Commit, View, allowed, top
from boe_vllm.policies.eb import bounded_count
from boe_vllm.sampling import randomness
from boe_vllm.steering.chain import Conditional, Conditioned
from boe_vllm.steering.step import Query


Pivot = Literal["entropy", "confidence"]
"""Which position is written where nothing is sure: of least entropy, or the most probable."""


def bounded_set(
    entropy: FloatArray, confidence: FloatArray, gamma: float, pivot: Pivot = "entropy"
) -> IntArray:
    """Indices of what a bound lets be written together, at least one.

    The prefix of `eb`; where that is a single position, nothing is sure, and `pivot` says which.

    Args:
        entropy: [M] nats.
        confidence: [M] probabilities; -inf for what may only come last, and then alone.
        gamma: the bound, nats.
        pivot: how a single position is chosen.
    """
    early = np.isfinite(confidence)
    order = top(np.where(early, -entropy, -np.inf), len(entropy))
    count = min(bounded_count(entropy[order], gamma), int(early.sum()))
    if count <= 1 and pivot == "confidence":
        return top(confidence, 1)
    return order[: max(1, count)]


class Bound(Protocol):
    """The settings that a bound with rounds has, whatever the policy."""

    @property
    def gamma(self) -> float:
        """On what is written from one prediction, nats."""

    @property
    def pool(self) -> int:
        """Most positions that a round predicts again."""

    @property
    def rounds(self) -> int:
        """Most of them."""

    @property
    def trust(self) -> float:
        """Entropy of the surest position up to which a round is worth its rows and may write, nats;
        what is less sure waits for a full prediction."""


def bounded_commit(
    view: View, first: IntArray, scores: FloatArray, bound: Bound, pivot: Pivot = "entropy"
) -> Generator[Query[Any], Any, Commit]:
    """The first set and what the rounds add to it.

    The rounds end when nothing is left that may be written now.

    Args:
        view: of the request.
        first: [b] indices that are written in any case.
        scores: [M] to be reported.
        bound: the policy's settings.
        pivot: how a round's single position is chosen.
    """
    tokens, uniform = view.proposal.copy(), view.uniforms(randomness.WRITE)
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
        more = bounded_set(entropy[asked], confidence, bound.gamma, pivot)
        chosen = np.concatenate([chosen, asked[more]])
    return Commit(chosen=chosen, tokens=tokens[chosen], scores=scores)


def bounded_rows(masks: int, rounds: int) -> int:
    """Most rows that the rounds of one step compute, for so many masks of the block.

    A round computes the rows of all that is written so far in the step and those of its pool, which
    together are at most the masks of the block.
    """
    return rounds * masks
