"""ReMDM: every mask is revealed and every written token masked again at random (Wang et al. 2025,
arXiv 2503.00307; kuleshov-group/remdm, `_ddpm_caching_update`). See `remasking` for the rule.

The authors decode the canvas as one block (`block_length` = `gen_length`) in 1024 steps and sample
tokens at temperature 1 from a nucleus of 0.9: `temperature` 1 and `top_p` 0.9 of a request.
"""

from __future__ import annotations

import numpy as np

from boe_vllm.base.arrays import IntArray
from boe_vllm.base.options import options
from boe_vllm.policies.base import Commit, Policy, View
from boe_vllm.policies.remasking import Diary, RemaskingConfig
from boe_vllm.sampling import randomness


@options
class ReMDMConfig(RemaskingConfig):
    """ReMDM: masks are revealed, and written tokens masked again, at random by a schedule."""


class ReMDMPolicy(Policy[ReMDMConfig]):
    """One iteration after the other, in at most as many steps as the block has.

    The quota plays no part, only the number of steps. An iteration that changes nothing is followed
    by the very same prediction, so it is passed over and costs no forward (the authors keep the
    last prediction for the same reason). A proposal that the request commits last (EOS, EoT) is
    revealed only when nothing else is masked, or in the last iteration.
    """

    name = "remdm"
    Config = ReMDMConfig
    source = "Wang et al. 2025 (arXiv 2503.00307); kuleshov-group/remdm `_ddpm_caching_update`"
    passes = "1 forward; steps that change nothing are passed over"

    def __init__(self, config: ReMDMConfig) -> None:
        super().__init__(config)
        self.rule = config.rule()

    def step(self, view: View) -> Commit:
        """Reveal and remask by the next iteration that does either."""
        diary, steps = Diary(view), view.block_steps
        late = np.isneginf(view.confidence)
        held = late if not late.all() else np.zeros(len(late), bool)
        chosen = remask = np.empty(0, np.int64)
        while len(chosen) == 0 and len(remask) == 0:
            k = diary.iteration
            rates = self.rule.rates(k, steps)
            draws = randomness.uniforms(
                view.seed, step=k, positions=view.positions, stream=randomness.CHOOSE
            )
            revealed = (draws < rates.reveal) & ~held
            chosen = np.flatnonzero(revealed | (k >= steps - 1))
            remask = self._remask(view, diary, view.written)
            diary.iteration = k + 1
        written = view.positions[chosen]
        diary.note(written, np.maximum(view.confidence[chosen], 0.0))
        if len(chosen) == len(view.positions):  # nothing is masked: only remasking can follow
            everything = np.union1d(view.written, written)
            while len(remask) == 0 and diary.iteration < steps:
                remask = self._remask(view, diary, everything)
                diary.iteration += 1
        return Commit(
            chosen=chosen,
            remask=remask,
            settled=not self.rule.remasks_later(diary.iteration, steps),
        )

    def _remask(self, view: View, diary: Diary, written: IntArray) -> IntArray:
        """Positions that the diary's iteration masks again."""
        rates = self.rule.rates(diary.iteration, view.block_steps)
        stored = diary.stored(written)
        return written[self.rule.drawn(view, diary.iteration, rates.sigma, written, stored)]
