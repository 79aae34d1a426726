"""dInfer's hierarchical rule: one token in each run of masks, so that runs are halved (inclusionAI/
dInfer `parallel_strategy.py`, `get_transfer_index_hierarchy_fast_v2`)."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from boe_vllm.base.options import options
from boe_vllm.policies.base import Commit, Policy, PolicyConfig, View, top


@options
class HierarchyConfig(PolicyConfig):
    """dInfer's hierarchy: write the surest token of each run of masks, and all that are sure."""

    low_threshold: Annotated[float, Field(ge=0, le=1)] = 0.4
    """Probability that the surest token of a run exceeds to be written."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Probability above which a token is written wherever it stands."""


class HierarchyPolicy(Policy[HierarchyConfig]):
    """The surest token in any case; both comparisons are strict, as in the authors' code."""

    name = "hierarchy"
    Config = HierarchyConfig
    source = "inclusionAI/dInfer `get_transfer_index_hierarchy_fast_v2`"
    passes = "1 forward; the number of steps adapts"

    def step(self, view: View) -> Commit:
        """The best of each contiguous run, what is sure, and the best of all."""
        p = view.confidence
        runs = np.split(np.arange(len(p)), np.flatnonzero(np.diff(view.positions) > 1) + 1)
        surest = np.array([run[top(p[run], 1)[0]] for run in runs])
        written = p > self.config.threshold
        written[surest[p[surest] > self.config.low_threshold]] = True
        written[top(p, 1)] = True
        return Commit(chosen=np.flatnonzero(written), scores=p)
