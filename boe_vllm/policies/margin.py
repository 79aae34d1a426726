"""Commit where the best token leads the second by most (Kim et al. 2025; Dream's `topk_margin`)."""

from boe_vllm.base.options import options
from boe_vllm.policies.local import CertaintyConfig, CertaintyPolicy


@options
class MarginConfig(CertaintyConfig):
    """Write first where the likeliest token leads the second by most."""


class MarginPolicy(CertaintyPolicy):
    """Score: largest minus second largest probability."""

    name, by = "margin", "margin"
    Config = MarginConfig
    source = "Kim et al. 2025; HKUNLP/Dream `generation_utils.py`, `topk_margin`"
