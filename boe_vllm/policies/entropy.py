"""Commit where the prediction is least uncertain (Koh et al. 2024; `entropy` of Dream)."""

from boe_vllm.base.options import options
from boe_vllm.policies.local import CertaintyConfig, CertaintyPolicy


@options
class EntropyConfig(CertaintyConfig):
    """Write first where the prediction has the lowest entropy."""


class EntropyPolicy(CertaintyPolicy):
    """Score: negative entropy of the prediction, nats."""

    name, by = "entropy", "entropy"
    Config = EntropyConfig
    source = "Koh et al. 2024; HKUNLP/Dream `generation_utils.py`, `entropy`"
