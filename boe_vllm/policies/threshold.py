"""Fast-dLLM's threshold rule (arXiv 2505.22618, NVlabs/Fast-dLLM `get_transfer_index`): commit
every position that is sure enough, and the surest one in any case."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from boe_vllm.base.options import options
from boe_vllm.policies.base import Commit, Policy, PolicyConfig, View, top


@options
class ThresholdConfig(PolicyConfig):
    """Fast-dLLM's threshold rule: write every token that is sure enough, and always the surest."""

    threshold: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Probability from which a token is written. Default: that of Fast-dLLM."""


class ThresholdPolicy(Policy[ThresholdConfig]):
    """`p >= tau`, compared in float64; the number of steps adapts, the quota plays no part."""

    name = "threshold"
    Config = ThresholdConfig
    source = "arXiv 2505.22618; NVlabs/Fast-dLLM `get_transfer_index`"
    passes = "1 forward; the number of steps adapts"

    def step(self, view: View) -> Commit:
        """Commit the surest position and all that reach the threshold."""
        sure = view.confidence >= self.config.threshold
        sure[top(view.confidence, 1)] = True
        return Commit(chosen=np.flatnonzero(sure), scores=view.confidence)
