"""EB-Sampler: as many tokens as an entropy bound allows (Ben-Hamu et al. 2025, arXiv 2505.24857;
after `generate_with_eb_sampler` of NEUIR/PC-Sampler).

Written one after another, the chosen tokens would cost their joint entropy; written together, they
risk at most `sum H - max H`. So positions are sorted by an error proxy and the longest prefix with
`cumsum(H) - cummax(H) <= gamma` is written, at least one position.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from boe_vllm.base.arrays import FloatArray
from boe_vllm.base.options import options
from boe_vllm.policies.base import Commit, Policy, PolicyConfig, View, top
from boe_vllm.policies.local import allowed
from boe_vllm.steering.step import Query


@options
class EBConfig(PolicyConfig):
    """Settings of `eb`."""

    gamma: Annotated[float, Field(ge=0)] = 0.1
    """The bound, nats; 0 writes one token a step (and others only at an entropy of exactly 0).
    Default: that of the re-implementation's code; its scripts use 0.01."""
    proxy: Literal["entropy", "confidence", "margin"] = "entropy"
    """What positions are sorted by, surest first (the paper's three error proxies); the bound is on
    entropies always. Default: the only one of the re-implementation."""


class EBPolicy(Policy):
    """Entropy-bounded unmasking: the number of steps adapts; the frame's quota plays no part.

    The authors' code runs over the whole canvas at once: set `block_length` to its length.
    """

    name = "eb"
    Config = EBConfig

    def __init__(self, config: EBConfig) -> None:
        super().__init__(config)
        self.settings = config

    def step(self, view: View) -> Generator[Query, Any, Commit]:
        """Sort, bound, commit; forbidden early commits come last, and only one at a time."""
        scores = {
            "entropy": -view.entropy,
            "confidence": view.confidence,
            "margin": view.margin,
        }[self.settings.proxy]
        scores = allowed(scores, view)
        order = top(scores, len(scores))
        count = bounded_count(view.entropy[order], self.settings.gamma)
        count = min(count, max(1, int(np.isfinite(view.confidence).sum())))
        return Commit(chosen=order[:count], scores=scores)
        yield  # a generator like every policy's step


def bounded_count(entropy: FloatArray, gamma: float) -> int:
    """How many leading entries keep `cumsum - cummax`, which never falls, within `gamma`."""
    risk = np.cumsum(entropy) - np.maximum.accumulate(entropy)
    return max(1, int((risk <= gamma).sum()))
