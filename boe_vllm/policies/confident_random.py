"""Commit positions drawn uniformly from the surest share: the control for every clever score.

Ours: a score that does not beat it has shown nothing, since spreading the commits over the
confident positions already gains much where there are choices to make.
"""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
from pydantic import Field

from boe_vllm.base.arrays import FloatArray
from boe_vllm.base.options import options
from boe_vllm.policies.base import PolicyConfig, View, allowed, top
from boe_vllm.policies.local import LocalPolicy
from boe_vllm.sampling import randomness


@options
class ConfidentRandomConfig(PolicyConfig):
    """Write positions drawn at random from the surest share: the control for every other score."""

    rho: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the masked positions to draw from, by confidence; at least the tokens due."""


class ConfidentRandomPolicy(LocalPolicy[ConfidentRandomConfig]):
    """Score: U(0, 1) for the top `ceil(rho |M|)` by confidence, at least the quota; else -inf."""

    name = "confident-random"
    Config = ConfidentRandomConfig
    source = "ours: a control"

    def score(self, view: View) -> FloatArray:
        """[M] uniform numbers of the candidates; forbidden early commits come last."""
        masked = len(view.positions)
        count = max(view.quota, math.ceil(self.config.rho * masked))
        scores = np.full(masked, -np.inf)
        candidates = top(view.confidence, count)
        scores[candidates] = allowed(view.uniforms(randomness.CHOOSE), view)[candidates]
        return scores
