"""Commit where the prediction is least uncertain (Koh et al. 2024; `entropy` of Dream)."""

from boe_vllm.base.arrays import FloatArray
from boe_vllm.policies.base import View
from boe_vllm.policies.local import CertaintyPolicy


class EntropyPolicy(CertaintyPolicy):
    """Score: negative entropy of the prediction, nats."""

    name = "entropy"

    def certainty(self, view: View) -> FloatArray:
        """[M] negative entropies."""
        return -view.entropy
