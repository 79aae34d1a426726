"""Commit the surest proposals (`remasking="low_confidence"` of ML-GSAI/LLaDA `generate.py`;
`maskgit_plus` of Dream)."""

from boe_vllm.base.arrays import FloatArray
from boe_vllm.policies.base import View
from boe_vllm.policies.local import CertaintyPolicy


class ConfidencePolicy(CertaintyPolicy):
    """Score: untempered probability of the proposed token."""

    name = "confidence"

    def certainty(self, view: View) -> FloatArray:
        """[M] probabilities."""
        return view.confidence
