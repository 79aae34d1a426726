"""Where a canvas stands: its current block, what may be written there, and how much is due.

Legend: `L` positions of prompt and canvas, `M` masked positions that may be written now.
"""

from __future__ import annotations

import numpy as np

from boe_vllm.base.arrays import BoolArray, IntArray
from boe_vllm.policies import Policy
from boe_vllm.request import schedule
from boe_vllm.request.config import CanvasPlan, SamplerConfig
from boe_vllm.sampling.statistics import RowStatistics


class Blocks:
    """The part of a canvas that knows its blocks."""

    config: SamplerConfig
    plan: CanvasPlan
    policy: Policy
    prompt_len: int
    tokens: IntArray
    """[L] token ids."""
    masked: BoolArray
    """[L] what is still to be written."""
    given: BoolArray
    """[L] what came with the request and not as a mask."""
    carried: RowStatistics | None = None
    """The coming step's prediction, if the last step's look-ahead has made it already."""
    settled: bool = True
    """Nothing that this block has written can be remasked any more."""
    block: int = -1
    block_step: int = 0
    """Denoising steps of the block so far."""
    block_steps: int
    """Denoising steps planned for it."""
    step_limit: int
    """Denoising steps after which the engine writes the rest of it."""

    @property
    def done(self) -> bool:
        """Nothing is masked any more."""
        return not self.masked.any()

    @property
    def overdue(self) -> bool:
        """The current block has had all its steps, and writes of the last one did not stand."""
        return self.block_step >= self.step_limit

    def writable(self) -> IntArray:
        """[M] positions of the current block that are masked, ascending."""
        return self.block_start + np.flatnonzero(self.masked[self.block_start : self.block_end])

    def upcoming(self) -> IntArray:
        """Masked positions of the block after the current one, ascending."""
        end = self.block_end + self.plan.block_length
        return self.block_end + np.flatnonzero(self.masked[self.block_end : end])

    def written(self) -> IntArray:
        """[W] positions of the current block that are written, ascending."""
        return self.block_positions[~self.masked[self.block_positions]]

    def quota(self) -> int:
        """Tokens due in this step."""
        masks = int(self.masked[self.block_start : self.block_end].sum())
        due = schedule.due(
            self.config.frame.schedule,
            masks=self.block_masks,
            steps=self.block_steps,
            step=self.block_step,
            written=self.block_masks - masks,
        )
        return min(masks, due)

    def _next_block(self) -> None:
        """Move on to the first block, from the current one, that has masks."""
        self.carried, self.settled = None, True
        while not self.done:
            self.block += 1
            start = self.prompt_len + self.block * self.plan.block_length
            self.block_start = 0 if self.block == 0 else start
            self.block_end = min(start + self.plan.block_length, len(self.tokens))
            self.block_masks = int(self.masked[self.block_start : self.block_end].sum())
            own = np.arange(self.block_start, self.block_end)
            self.block_positions = own[~self.given[own]]
            self.block_step = 0
            if self.block_masks:
                self.block_steps = self.plan.steps_for(self.block_masks)
                self.step_limit = self.policy.step_limit(self.block_masks, self.block_steps)
                return
