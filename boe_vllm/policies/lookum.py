"""LookUM, look-ahead unmasking: one of `k` drawn sets, by the certainty of what follows (Lee et al.
2025, arXiv 2511.05563; the authors' code was not public when this was written).

From the paper: a pool of the most certain positions; `k` sets of `b` positions drawn from it; one
forward for each next state; its reward is the mean negative entropy; one of the sets is taken with
importance weights `softmax(reward / tau)`.

**What the paper leaves open, and what we chose** (each is a setting): `tau` (0.1 nats), the draw's
distribution (uniform), which positions the mean runs over (all that are still masked), which
certainty orders the pool (confidence). What is written is the step's proposal: the argmax at
temperature 0, a sample above. A pool smaller than `b` is enlarged to `b`; with one possible set
nothing is looked at. Sets drawn twice are looked at once and keep their double weight. The chosen
state's forward serves the next step: `k` forwards a step, one more at the start of a block.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from boe_vllm.base.arrays import FloatArray, IntArray
from boe_vllm.base.options import options
from boe_vllm.policies.base import (
    Certainty,
    Commit,
    Policy,
    PolicyConfig,
    View,
    candidates_of,
    certainty,
    top,
)
from boe_vllm.policies.local import scores_of_a_draw
from boe_vllm.sampling import randomness
from boe_vllm.steering.lookahead import Lookahead, Observed, Prospect

if TYPE_CHECKING:
    from boe_vllm.policies.base import Asking


@options
class LookUMConfig(PolicyConfig):
    """LookUM: of a few drawn sets, one by how certain the model is of what follows."""

    paths: Annotated[int, Field(ge=1)] = 2
    """Sets drawn per step, k (paper)."""
    pool_size: Annotated[int, Field(ge=1)] = 5
    """Number of the most certain positions, which sets are drawn from (paper)."""
    pool_threshold: float | None = None
    """Least certainty of what sets are drawn from, instead of a number of positions (paper's
    alternative); in nats and negative for `certainty` "entropy"."""
    certainty: Certainty = "confidence"
    """What the pool is ordered by, "entropy" meaning negative entropy (ours)."""
    draw: Literal["uniform", "certainty"] = "uniform"
    """How a set is drawn without replacement: uniformly, or from softmax(certainty /
    draw_temperature) (ours)."""
    draw_temperature: Annotated[float, Field(gt=0)] = 0.2
    """For `draw="certainty"` (ours)."""
    tau: Annotated[float, Field(ge=0)] = 0.1
    """Temperature of the importance weights, nats; 0 takes the best (ours)."""
    observe: Observed = "masked"
    """Positions of the reward's mean: all masks of the sequence, those of the block, or all
    positions (ours)."""
    reuse: bool = True
    """Whether the winner's prediction serves the next step; tokens are the same without."""


class LookUMPolicy(Policy[LookUMConfig]):
    """One of a few drawn sets, resampled by what the model then still doubts."""

    name = "lookum"
    Config = LookUMConfig
    source = "Lee et al. 2025 (arXiv 2511.05563)"
    passes = "2 forwards (`paths`), one of which serves the next step"

    def rows_ahead(self, *, masks: int, quota: int, length: int) -> int:
        """A forward for each path."""
        return self.config.paths * length

    def step(self, view: View) -> Asking:
        """Draw sets from the pool, look ahead, resample one."""
        settings = self.config
        counts = Counter(self.draw(view, self.pool(view)))
        sets = [np.array(chosen) for chosen in counts]
        if len(sets) == 1:
            return Commit(chosen=sets[0], scores=certainty(view, settings.certainty))
        prospects: list[Prospect] = yield Lookahead(
            writes=tuple(sets),
            tokens=tuple(view.proposal[chosen] for chosen in sets),
            observe=settings.observe,
            carry=settings.reuse,
        )
        rewards = np.array([-prospect.mean_entropy() for prospect in prospects])
        weights = importance(rewards, np.array(list(counts.values())), settings.tau)
        (number,) = randomness.uniforms(
            view.seed, step=view.step, positions=np.array([0]), stream=randomness.LOOKAHEAD
        )
        best = int(np.searchsorted(weights.cumsum(), number * weights.sum(), side="right"))
        scores = np.full(len(view.positions), np.nan)
        scores[sets[best]] = rewards[best]
        return Commit(chosen=sets[best], scores=scores, carry=prospects[best].carry)

    def pool(self, view: View) -> IntArray:
        """Indices that sets are drawn from, the most certain first, at least `b`; what may only be
        committed last is among them only where nothing else is left to make up the `b`."""
        scores = certainty(view, self.config.certainty)
        size = self.config.pool_size
        if self.config.pool_threshold is not None:
            size = int((scores >= self.config.pool_threshold).sum())
        return candidates_of(view, scores, size)

    def draw(self, view: View, pool: IntArray) -> list[tuple[int, ...]]:
        """`k` sets of `b` indices, each ascending; a set may come twice."""
        settings = self.config
        if len(pool) == view.quota:
            return [tuple(sorted(pool.tolist()))]
        sets = []
        for n in range(settings.paths):
            scores = view.uniforms(randomness.CANDIDATES + n)
            if settings.draw == "certainty":
                scores = scores_of_a_draw(
                    certainty(view, settings.certainty), settings.draw_temperature, scores
                )
            sets.append(tuple(sorted(pool[top(scores[pool], view.quota)].tolist())))
        return sets


def importance(rewards: FloatArray, counts: IntArray, tau: float) -> FloatArray:
    """Weights `count * exp(reward / tau)`, the largest exponential being 1. With tau 0 only the
    best counts, of equal ones the first."""
    if tau == 0:
        weights = np.zeros(len(rewards))
        weights[top(rewards, 1)] = 1.0
        return weights
    return counts * np.exp((rewards - rewards.max()) / tau)
