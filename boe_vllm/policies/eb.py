"""EB-Sampler: as many tokens as an entropy bound allows (Ben-Hamu et al. 2025, arXiv 2505.24857;
after `generate_with_eb_sampler` of NEUIR/PC-Sampler).

Written one after another, the chosen tokens would cost their joint entropy; written together, they
risk at most `sum H - max H`. So positions are sorted by an error proxy and the longest prefix with
`cumsum(H) - cummax(H) <= gamma` is written, at least one position.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from boe_vllm.base.arrays import FloatArray
from boe_vllm.base.options import options
from boe_vllm.policies.base import Certainty, Commit, Policy, PolicyConfig, View, certainty, top


@options
class EBConfig(PolicyConfig):
    """EB-Sampler: write as many tokens a step as a bound on their joint entropy allows."""

    gamma: Annotated[float, Field(ge=0)] = 0.1
    """The bound on `sum H - max H` of the tokens written together, nats; 0 writes one token a step
    (and others only at an entropy of exactly 0). Default: that of the re-implementation's code; its
    scripts use 0.01."""
    proxy: Certainty = "entropy"
    """What positions are sorted by, surest first (the paper's three error proxies); the bound is on
    entropies always. Default: the only one of the re-implementation."""


class EBPolicy(Policy[EBConfig]):
    """Entropy-bounded unmasking: the number of steps adapts; the frame's quota plays no part.

    The authors' code runs over the whole canvas at once: set `block_length` to its length.
    """

    name = "eb"
    Config = EBConfig
    source = "Ben-Hamu et al. 2025 (arXiv 2505.24857); NEUIR/PC-Sampler `generate_with_eb_sampler`"
    passes = "1 forward; the number of steps adapts"

    def step(self, view: View) -> Commit:
        """Sort, bound, commit; forbidden early commits come last, and only one at a time."""
        scores = certainty(view, self.config.proxy)
        order = top(scores, len(scores))
        count = bounded_count(view.entropy[order], self.config.gamma)
        count = min(count, max(1, int(np.isfinite(view.confidence).sum())))
        return Commit(chosen=order[:count], scores=scores)


def bounded_count(entropy: FloatArray, gamma: float) -> int:
    """How many leading entries keep `cumsum - cummax`, which never falls, within `gamma`."""
    risk = np.cumsum(entropy) - np.maximum.accumulate(entropy)
    return max(1, int((risk <= gamma).sum()))
