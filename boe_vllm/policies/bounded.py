"""Sets whose size a bound decides, with partial passes in the place of whole steps.

EB-Sampler's prefix is written (`eb`): the longest one, surest first, in which all entropies but the
largest sum to at most `gamma`. Then the surest of the rest are predicted again as if it were
written, all other rows frozen, and the prefix of those is written too; and so on for some rounds. A
round stands for the next step's forward and computes a few rows instead of all.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Protocol

import numpy as np

from boe_vllm.base.arrays import FloatArray, IntArray
from boe_vllm.policies.base import Commit, View, allowed, top
from boe_vllm.policies.eb import bounded_count
from boe_vllm.sampling import randomness
from boe_vllm.steering.chain import Conditional, Conditioned
from boe_vllm.steering.step import Query


def bounded_prefix(entropy: FloatArray, scores: FloatArray, gamma: float) -> IntArray:
    """Indices of the prefix within the bound, best first, at least one.

    Args:
        entropy: [M] nats.
        scores: [M] the order, the best first; -inf for what may only come last.
        gamma: the bound, nats.
    """
    order = top(scores, len(scores))
    count = bounded_count(entropy[order], gamma)
    return order[: max(1, min(count, int(np.isfinite(scores).sum())))]


class Bound(Protocol):
    """The settings that a bound with rounds has, whatever the policy."""

    @property
    def gamma(self) -> float:
        """On each round's prefix, nats."""

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
    view: View, first: IntArray, scores: FloatArray, bound: Bound
) -> Generator[Query[Any], Any, Commit]:
    """The first set and what the rounds add to it.

    The rounds end when nothing is left that may be written now.

    Args:
        view: of the request.
        first: [b] indices that are written in any case.
        scores: [M] to be reported.
        bound: the policy's settings.
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
        prefix = bounded_prefix(entropy[asked], surest[asked], bound.gamma)
        chosen = np.concatenate([chosen, asked[prefix]])
    return Commit(chosen=chosen, tokens=tokens[chosen], scores=scores)


def bounded_rows(masks: int, rounds: int) -> int:
    """Most rows that the rounds of one step compute, for so many masks of the block.

    A round computes the rows of all that is written so far in the step and those of its pool, which
    together are at most the masks of the block.
    """
    return rounds * masks
