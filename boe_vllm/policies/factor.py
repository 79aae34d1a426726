"""Fast-dLLM's factor rule (arXiv 2505.22618, NVlabs/Fast-dLLM `get_transfer_index_dynamic`): the
more tokens are committed together, the surer the least sure of them must be.

With confidences sorted descending, the longest prefix with `c_(n) >= 1 - f / (n + 1)` for all its
`n` is committed; `n = 1` always is. (The authors' code commits one too many when only the last
candidate fails; here the rule holds.)
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from boe_vllm.base.arrays import FloatArray
from boe_vllm.base.options import options
from boe_vllm.policies.base import Commit, Policy, PolicyConfig, View, top


@options
class FactorConfig(PolicyConfig):
    """Fast-dLLM's factor rule: the more tokens are written together, the surer each must be."""

    factor: Annotated[float, Field(ge=0)] = 1.0
    """f of `p_n >= 1 - f / (n + 1)`, for the n-th surest token of a step: larger writes more
    together. Default: that of Fast-dLLM."""


class FactorPolicy(Policy[FactorConfig]):
    """The longest prefix that passes; the number of steps adapts, the quota plays no part."""

    name = "factor"
    Config = FactorConfig
    source = "arXiv 2505.22618; NVlabs/Fast-dLLM `get_transfer_index_dynamic`"
    passes = "1 forward; the number of steps adapts"

    def step(self, view: View) -> Commit:
        """Count the prefix, commit the surest positions."""
        count = passing_count(view.confidence, self.config.factor)
        return Commit(chosen=top(view.confidence, count), scores=view.confidence)


def passing_count(confidence: FloatArray, factor: float) -> int:
    """Length of the longest prefix of the sorted confidences that passes; at least 1."""
    falling = np.sort(confidence)[::-1]
    passes = falling >= 1.0 - factor / (np.arange(len(falling)) + 2.0)
    passes[0] = True
    return len(falling) if passes.all() else int(passes.argmin())
