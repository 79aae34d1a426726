"""MDLM's ancestral sampler (Sahoo et al. 2024, arXiv 2406.07524; kuleshov-group/mdlm
`diffusion.py`, `_sample` with `ddpm_cache`): every mask is revealed at its own random time.

A mask that is there at time `t` is revealed by time `s < t` with probability `(t - s)/t`, and takes
a sample of its prediction. The grid of the `S` steps is `t_i = linspace(1, 1e-5, S + 1)`. The few
masks that are left at its end, one in 100,000, are written in a further step (the authors' noise
removal; they take the likeliest token there, here it is a sample as before). At time 0 nothing is
masked, so that step is one more interval of the grid.

The authors sample at temperature 1, the whole canvas as one block, from nothing but masks or after
one end of text: `temperature` 1 and `block_length` = `gen_length` of a request.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from boe_vllm.base.arrays import FloatArray
from boe_vllm.base.options import options
from boe_vllm.policies.base import View
from boe_vllm.policies.origin import OriginConfig, OriginPolicy


@options
class AncestralConfig(OriginConfig):
    """MDLM's ancestral sampler: every mask is revealed at its own random time."""

    eps: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """Time at which the grid of the steps ends. Default: that of MDLM's `_sample`."""


class AncestralPolicy(OriginPolicy):
    """`origin` on MDLM's grid, with a last step after it; the quota plays no part.

    A step that reveals nothing would be followed by the very same prediction, so it is passed over
    and costs no forward; the authors keep the prediction for the same reason.
    """

    name = "ancestral"
    Config = AncestralConfig
    source = "Sahoo et al. 2024 (arXiv 2406.07524); kuleshov-group/mdlm `_ddpm_caching_update`"
    passes = "1 forward; steps that reveal nothing are passed over"

    def times(self, view: View) -> FloatArray:
        """[S + 2] the grid, descending from 1, and the end."""
        return np.append(super().times(view), 0.0)
