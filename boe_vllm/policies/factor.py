"""Fast-dLLM's factor rule (arXiv 2505.22618, NVlabs/Fast-dLLM `get_transfer_index_dynamic`): the
more tokens are committed together, the surer the least sure of them must be.

With confidences sorted descending, the longest prefix with `c_(n) >= 1 - f / (n + 1)` for all its
`n` is committed; `n = 1` always is. (The authors' code commits one too many when only the last
candidate fails; here the rule holds.)
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from boe_vllm.base.arrays import FloatArray
from boe_vllm.base.options import options
from boe_vllm.policies.base import Commit, Policy, PolicyConfig, View, top
from boe_vllm.steering.step import Query


@options
class FactorConfig(PolicyConfig):
    """Settings of `factor`."""

    factor: Annotated[float, Field(ge=0)] = 1.0
    """f: larger commits more together. Default: that of Fast-dLLM."""


class FactorPolicy(Policy):
    """The longest prefix that passes; the number of steps adapts, the quota plays no part."""

    name = "factor"
    Config = FactorConfig

    def __init__(self, config: FactorConfig) -> None:
        super().__init__(config)
        self.factor = config.factor

    def step(self, view: View) -> Generator[Query, Any, Commit]:
        """Count the prefix, commit the surest positions."""
        count = passing_count(view.confidence, self.factor)
        return Commit(chosen=top(view.confidence, count), scores=view.confidence)
        yield  # a generator like every policy's step


def passing_count(confidence: FloatArray, factor: float) -> int:
    """Length of the longest prefix of the sorted confidences that passes; at least 1."""
    falling = np.sort(confidence)[::-1]
    passes = falling >= 1.0 - factor / (np.arange(len(falling)) + 2.0)
    passes[0] = True
    return len(falling) if passes.all() else int(passes.argmin())
