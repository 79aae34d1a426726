"""Commit the surest proposals (`remasking="low_confidence"` of ML-GSAI/LLaDA `generate.py`;
`maskgit_plus` of Dream)."""

from boe_vllm.base.options import options
from boe_vllm.policies.local import CertaintyConfig, CertaintyPolicy


@options
class ConfidenceConfig(CertaintyConfig):
    """Write the proposals of the highest probability first: LLaDA's own rule."""


class ConfidencePolicy(CertaintyPolicy):
    """Score: untempered probability of the proposed token."""

    name, by = "confidence", "confidence"
    Config = ConfidenceConfig
    source = 'ML-GSAI/LLaDA `generate.py`, `remasking="low_confidence"`; Dream `maskgit_plus`'
