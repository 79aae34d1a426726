"""Reveal every mask independently, on Dream's time grid (HKUNLP/Dream `generation_utils.py`,
`alg="origin"`: the ancestral sampler of a masked diffusion with a linear schedule).

A mask that is there at time `t` is revealed by time `s < t` with probability `1 - s/t`; the grid is
`t_i = linspace(1, eps, S + 1)` over the `S` steps of the block, and its last step reveals the rest.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from boe_vllm.base.arrays import FloatArray, IntArray
from boe_vllm.base.options import options
from boe_vllm.policies.base import Commit, Policy, PolicyConfig, View
from boe_vllm.sampling import randomness

GRID_STEP = "origin.grid_step"


@options
class OriginConfig(PolicyConfig):
    """Dream's ancestral sampler: every mask is revealed at its own random time."""

    eps: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    """Time at which the grid of the steps ends. Default: that of `DreamGenerationConfig`."""


class OriginPolicy(Policy[OriginConfig]):
    """Every mask at its own random time; the quota plays no part, only the number of steps.

    A grid step that reveals nothing would be followed by the very same prediction, so it is passed
    over and costs no forward: one uniform number per mask says by which grid step it is revealed,
    and the earliest ones are written now. That draws from the same distribution as trying the grid
    steps one by one, in at most `S` forwards.
    """

    name = "origin"
    Config = OriginConfig
    source = 'HKUNLP/Dream `generation_utils.py`, `alg="origin"`'
    passes = "1 forward; steps that reveal nothing are passed over"

    def times(self, view: View) -> FloatArray:
        """[S + 1] the grid, descending from 1."""
        return np.linspace(1.0, self.config.eps, view.block_steps + 1)

    def step(self, view: View) -> Commit:
        """Commit the masks of the next grid step that reveals any."""
        times = self.times(view)
        now = 0 if view.block_step == 0 else view.memory[GRID_STEP]
        reveal = reveal_steps(view.uniforms(randomness.CHOOSE), times, now)
        late = np.isneginf(view.confidence)
        if not late.all():  # what may not be committed early waits for the last step
            reveal[late] = len(times) - 2
        earliest = reveal.min()
        view.memory[GRID_STEP] = int(earliest) + 1
        return Commit(chosen=np.flatnonzero(reveal == earliest))


def reveal_steps(uniforms: FloatArray, times: FloatArray, now: int) -> IntArray:
    """[M] the grid step in which each mask that is left at step `now` is revealed.

    Args:
        uniforms: one number in (0, 1) per mask.
        times: [S + 1] the grid, descending.
        now: the first grid step still to come.
    """
    revealed_by = 1.0 - times[now + 1 : -1] / times[now]  # the last step takes whatever is left
    return now + np.searchsorted(revealed_by, uniforms, side="right")
