"""Commit positions drawn uniformly from the surest share: the control for every clever score.

Ours (design.md, section 1): a score that does not beat it has shown nothing, since spreading the
commits over the confident positions already gains much where there are choices to make.
"""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
from pydantic import Field

from boe_vllm.base.arrays import FloatArray
from boe_vllm.base.options import options
from boe_vllm.policies.base import PolicyConfig, View, top
from boe_vllm.policies.local import LocalPolicy, allowed
from boe_vllm.sampling import randomness


@options
class ConfidentRandomConfig(PolicyConfig):
    """Settings of `confident-random`."""

    rho: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the masked positions to draw from, by confidence; at least the tokens due. Default:
    the top half, the control of our own measurements (design.md)."""


class ConfidentRandomPolicy(LocalPolicy):
    """Score: U(0, 1) for the top `ceil(rho |M|)` by confidence, at least the quota; else -inf."""

    name = "confident-random"
    Config = ConfidentRandomConfig

    def __init__(self, config: ConfidentRandomConfig) -> None:
        super().__init__(config)
        self.rho = config.rho

    def score(self, view: View) -> FloatArray:
        """[M] uniform numbers of the candidates; forbidden early commits come last."""
        masked = len(view.positions)
        count = max(view.quota, math.ceil(self.rho * masked))
        scores = np.full(masked, -np.inf)
        candidates = top(view.confidence, count)
        scores[candidates] = allowed(view.uniforms(randomness.CHOOSE), view)[candidates]
        return scores
