"""Commit the surest proposals (`remasking="low_confidence"` of ML-GSAI/LLaDA `generate.py`)."""

from boe_vllm.arrays import FloatArray
from boe_vllm.policies.base import LocalPolicy, View


class ConfidencePolicy(LocalPolicy):
    """Score: untempered probability of the proposed token."""

    name = "confidence"

    def score(self, view: View) -> FloatArray:
        """[M] probabilities."""
        return view.confidence
