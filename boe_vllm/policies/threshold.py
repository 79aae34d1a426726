"""Fast-dLLM's threshold rule (arXiv 2505.22618, NVlabs/Fast-dLLM `get_transfer_index`): commit
every position that is sure enough, and the surest one in any case."""

from __future__ import annotations

from collections.abc import Generator
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from boe_vllm.base.options import options
from boe_vllm.policies.base import Commit, Policy, PolicyConfig, View, top
from boe_vllm.steering.step import Query


@options
class ThresholdConfig(PolicyConfig):
    """Settings of `threshold`."""

    threshold: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Tau: positions with confidence >= tau are written. Default: that of Fast-dLLM."""


class ThresholdPolicy(Policy):
    """`p >= tau`, compared in float64; the number of steps adapts, the quota plays no part."""

    name = "threshold"
    Config = ThresholdConfig

    def __init__(self, config: ThresholdConfig) -> None:
        super().__init__(config)
        self.threshold = config.threshold

    def step(self, view: View) -> Generator[Query, Any, Commit]:
        """Commit the surest position and all that reach the threshold."""
        sure = view.confidence >= self.threshold
        sure[top(view.confidence, 1)] = True
        return Commit(chosen=np.flatnonzero(sure), scores=view.confidence)
        yield  # a generator like every policy's step
