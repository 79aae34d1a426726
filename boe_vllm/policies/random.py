"""Commit positions drawn uniformly (`remasking="random"` of ML-GSAI/LLaDA `generate.py`)."""

from boe_vllm.base.arrays import FloatArray
from boe_vllm.policies.base import View
from boe_vllm.policies.local import LocalPolicy, allowed
from boe_vllm.sampling import randomness


class RandomPolicy(LocalPolicy):
    """Score: U(0, 1) per position and step; forbidden early commits come last."""

    name = "random"

    def score(self, view: View) -> FloatArray:
        """[M] uniform numbers."""
        return allowed(view.uniforms(randomness.CHOOSE), view)
