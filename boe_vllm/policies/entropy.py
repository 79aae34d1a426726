"""Commit where the prediction is least uncertain (Koh et al. 2024; `entropy` of Dream)."""

import numpy as np

from boe_vllm.arrays import FloatArray
from boe_vllm.policies.base import LocalPolicy, View


class EntropyPolicy(LocalPolicy):
    """Score: negative entropy of the prediction, nats."""

    name = "entropy"

    def score(self, view: View) -> FloatArray:
        """[M] negative entropies; -inf where an early commit is forbidden."""
        return np.where(np.isneginf(view.confidence), -np.inf, -view.entropy)
