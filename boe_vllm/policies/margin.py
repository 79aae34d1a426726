"""Commit where the best token leads the second by most (Kim et al. 2025; `topk_margin` of Dream)."""

import numpy as np

from boe_vllm.arrays import FloatArray
from boe_vllm.policies.base import LocalPolicy, View


class MarginPolicy(LocalPolicy):
    """Score: largest minus second largest probability."""

    name = "margin"

    def score(self, view: View) -> FloatArray:
        """[M] margins; -inf where an early commit is forbidden."""
        return np.where(np.isneginf(view.confidence), -np.inf, view.margin)
