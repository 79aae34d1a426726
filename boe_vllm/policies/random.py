"""Commit positions drawn uniformly (`remasking="random"` of ML-GSAI/LLaDA `generate.py`)."""

from boe_vllm import randomness
from boe_vllm.arrays import FloatArray
from boe_vllm.policies.base import LocalPolicy, View


class RandomPolicy(LocalPolicy):
    """Score: U(0, 1) per position and step."""

    name = "random"

    def score(self, view: View) -> FloatArray:
        """[M] uniform numbers."""
        return view.uniforms(randomness.CHOOSE)
