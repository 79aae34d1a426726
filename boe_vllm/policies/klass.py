"""KLASS: commit every position that is sure and whose prediction has come to rest (NeurIPS 2025,
shkim0116/KLASS `stable_confident_decode`).

`KL_i = sum_v p_t ln((p_t + eps) / (p_{t-1} + eps))` between a position's predictions now and one
step before, in float64, with `p_0 = 0`. A position is ready when its last `history` KLs are all
below `kl_threshold` and its confidence is above `confidence_threshold`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from boe_vllm.base.arrays import FloatArray, IntArray
from boe_vllm.base.options import options
from boe_vllm.policies.base import Commit, Needs, Policy, PolicyConfig, View, top
from boe_vllm.steering.change import PredictionChange

if TYPE_CHECKING:
    from boe_vllm.policies.base import Asking

HISTORY = "klass.history"


@options
class KLASSConfig(PolicyConfig):
    """KLASS: write every position that is sure and whose prediction has come to rest.

    Defaults: those of the authors' function, used for HumanEval; with LLaDA they used (confidence,
    KL) thresholds of (0.6, 0.015) for GSM8K, (0.6, 0.01) for MATH and (0.7, 0.01) for MBPP, 256
    tokens, blocks of 64 and 256 steps.
    """

    confidence_threshold: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Probability that a ready position's token exceeds."""
    kl_threshold: Annotated[float, Field(ge=0)] = 0.01
    """What the last KLs of a ready position stay below, nats."""
    history: Annotated[int, Field(ge=1, le=1024)] = 2
    """How many last KLs; no position is ready in the first `history - 1` steps of a block."""


class KLASSPolicy(Policy[KLASSConfig]):
    """All ready positions, else the quota's best by confidence. KLs persist across blocks."""

    name = "klass"
    Config = KLASSConfig
    source = "NeurIPS 2025; shkim0116/KLASS `stable_confident_decode`"
    passes = "1 forward; the number of steps adapts"

    def needs(self) -> Needs:
        """A block's first KLs compare with the predictions in the last step of the block before."""
        return Needs(distributions=True, next_block=True)

    def step(self, view: View) -> Asking:
        """Ask for the KLs, commit what is ready."""
        change: FloatArray = yield PredictionChange(positions=view.positions)
        settings = self.config
        history = recent(view.memory.get(HISTORY), view.positions, change, settings.history)
        view.memory[HISTORY] = (view.positions, history)
        sure = view.confidence > settings.confidence_threshold
        stable = np.all(history < settings.kl_threshold, axis=0)
        chosen = np.flatnonzero(sure & stable)
        if len(chosen) == 0 or view.block_step < settings.history - 1:
            chosen = top(view.confidence, view.quota)
        return Commit(chosen=chosen, scores=view.confidence)


def recent(
    before: tuple[IntArray, FloatArray] | None,
    positions: IntArray,
    change: FloatArray,
    length: int,
) -> FloatArray:
    """[length, M] the last KLs of each position, the newest last; inf where there was none yet.

    Args:
        before: positions and KLs of the step before, if there was one.
        positions: [M] ascending.
        change: [M] the KLs of this step.
        length: how many are kept.
    """
    history = np.full((length, len(positions)), np.inf)
    if before is not None and length > 1:
        _, now, then = np.intersect1d(positions, before[0], return_indices=True)
        history[:-1, now] = before[1][1:, then]
    history[-1] = change
    return history
