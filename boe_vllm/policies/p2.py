"""P2, path planning (Peng et al. 2025, arXiv 2502.03540; pengzhangzhi/Path-Planning,
`p2_sampling`), with the denoiser as its own planner.

In step `i` of `T` a token is proposed at every position of the block, written ones included. Its
score is `log p` of that proposal, times `eta` at written positions. The `n (T - i)/T` lowest
(rounded down, of the block's `n` positions) are masked or stay so; masks that are not among them
are written. A written token that is kept stays as it is, whatever is proposed in its place.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from boe_vllm.base.options import options
from boe_vllm.policies.base import Commit, Needs, Policy, PolicyConfig, View, log, top


@options
class P2Config(PolicyConfig):
    """Path planning: written tokens compete with masks for their places and may be masked again."""

    eta: Annotated[float, Field(ge=0)] = 1.0
    """Factor on the log-probabilities of written tokens: 0 never masks one again, more masks more.
    Default: that of `p2_sampling`."""

    @property
    def rewrites(self) -> bool:
        """Always."""
        return True


class P2Policy(Policy[P2Config]):
    """Score written and masked positions together and keep the best.

    Only the steps count, not the quota: at `steps` per block or `tokens_per_step` alike, as many
    positions are written after step `i` as the block's share `i/T`. Of equal scores a written
    position is kept first, then the lower one. The number of masks is counted in integers; the
    authors' `int(n * (1 - i * (1/T)))` loses one to rounding at times.
    """

    name = "p2"
    Config = P2Config
    source = "Peng et al. 2025 (arXiv 2502.03540); pengzhangzhi/Path-Planning `p2_sampling`"

    def needs(self) -> Needs:
        """Predictions at written positions."""
        return Needs(revision=True)

    def step(self, view: View) -> Commit:
        """Keep the best `n - n (T - i)/T` of the block."""
        assert view.revision is not None
        done, steps, written = view.block_step + 1, view.block_steps, len(view.written)
        masked_after = view.block_masks * max(0, steps - done) // steps
        scores = np.concatenate(
            [self.config.eta * log(view.revision.confidence), log(view.confidence)]
        )
        kept = np.zeros(len(scores), bool)
        kept[top(scores, view.block_masks - masked_after)] = True
        chosen, remask = np.flatnonzero(kept[written:]), view.written[~kept[:written]]
        return Commit(
            chosen=chosen,
            remask=remask,
            settled=self.config.eta == 0 or done >= steps,
            idle=len(chosen) == 0 and len(remask) == 0,
            scores=scores[written:],
        )
