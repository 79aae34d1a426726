"""Commit where the best token leads the second by most (Kim et al. 2025; Dream's `topk_margin`)."""

from boe_vllm.base.arrays import FloatArray
from boe_vllm.policies.base import View
from boe_vllm.policies.local import CertaintyPolicy


class MarginPolicy(CertaintyPolicy):
    """Score: largest minus second largest probability."""

    name = "margin"

    def certainty(self, view: View) -> FloatArray:
        """[M] margins."""
        return view.margin
