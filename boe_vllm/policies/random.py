"""Commit positions drawn uniformly (`remasking="random"` of ML-GSAI/LLaDA `generate.py`)."""

from boe_vllm.base.arrays import FloatArray
from boe_vllm.base.options import options
from boe_vllm.policies.base import PolicyConfig, View, allowed
from boe_vllm.policies.local import LocalPolicy
from boe_vllm.sampling import randomness


@options
class RandomConfig(PolicyConfig):
    """Write positions in random order."""


class RandomPolicy(LocalPolicy[RandomConfig]):
    """Score: U(0, 1) per position and step; forbidden early commits come last."""

    name = "random"
    Config = RandomConfig
    source = 'ML-GSAI/LLaDA `generate.py`, `remasking="random"`'

    def score(self, view: View) -> FloatArray:
        """[M] uniform numbers."""
        return allowed(view.uniforms(randomness.CHOOSE), view)
