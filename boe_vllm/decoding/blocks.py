"""The blocks of one canvas: which is current, what may be written there, and how much is due.

LLaDA's block-wise decoding (ML-GSAI/LLaDA `generate.py`): the canvas is split into blocks that are
written from left to right. Masks inside the prompt are written with the first block.

Legend: `L` positions of prompt and canvas, `M` masked positions that may be written now, `W`
written positions of the block.
"""

from __future__ import annotations

import numpy as np

from boe_vllm.base.arrays import BoolArray, IntArray
from boe_vllm.policies.base import Policy
from boe_vllm.request.config import Schedule
from boe_vllm.request.resolved import CanvasPlan, tokens_due


class Blocks:
    """Where a canvas stands. It is asked with the canvas's masks, of which it keeps no copy."""

    index: int = -1
    """Of the current block."""
    start: int = 0
    """Its first position; that of the prompt for the first block."""
    end: int = 0
    """The position after its last one."""
    masks_at_start: int = 0
    positions: IntArray
    """Positions of it that did not come with the request, ascending."""
    step: int = 0
    """Denoising steps of it so far."""
    steps: int = 0
    """Denoising steps planned for it."""
    step_limit: int = 0
    """Denoising steps after which the engine writes the rest of it."""

    def __init__(
        self,
        plan: CanvasPlan,
        spread: Schedule,
        policy: Policy,
        *,
        prompt_len: int,
        given: BoolArray,
        masked: BoolArray,
    ) -> None:
        """Open the first block that has masks.

        Args:
            plan: of the canvas.
            spread: how a block's tokens are spread over its steps.
            policy: what decodes it, for its limit on steps.
            prompt_len: where the canvas begins.
            given: [L] what came with the request and not as a mask.
            masked: [L] what is still to be written.
        """
        self.plan, self.spread, self.policy = plan, spread, policy
        self.prompt_len, self.given = prompt_len, given
        self.positions = np.empty(0, np.int64)
        self.advance(masked)

    def advance(self, masked: BoolArray) -> None:
        """Move on to the first block, from the current one, that has masks; stay if none has."""
        while masked.any():
            self.index += 1
            self.start = 0 if self.index == 0 else self.canvas_start
            self.end = min(self.canvas_start + self.plan.block_length, len(masked))
            self.masks_at_start = int(masked[self.start : self.end].sum())
            own = np.arange(self.start, self.end)
            self.positions = own[~self.given[own]]
            self.step = 0
            if self.masks_at_start:
                self.steps = self.plan.steps_for(self.masks_at_start)
                self.step_limit = self.policy.step_limit(self.masks_at_start, self.steps)
                return

    @property
    def canvas_start(self) -> int:
        """Where the current block begins on the canvas; masks inside the prompt lie before it."""
        return self.prompt_len + self.index * self.plan.block_length

    @property
    def overdue(self) -> bool:
        """The current block has had all its steps, and writes of the last one did not stand."""
        return self.step >= self.step_limit

    @property
    def last_step(self) -> bool:
        """The coming step is the last one that the policy has."""
        return self.step + 1 >= self.step_limit

    def complete(self, masked: BoolArray) -> bool:
        """Nothing of the current block is masked."""
        return not masked[self.start : self.end].any()

    def writable(self, masked: BoolArray) -> IntArray:
        """[M] positions of the current block that are masked, ascending."""
        return self.start + np.flatnonzero(masked[self.start : self.end])

    def upcoming(self, masked: BoolArray) -> IntArray:
        """Masked positions of the block after the current one, ascending."""
        return self.end + np.flatnonzero(masked[self.end : self.end + self.plan.block_length])

    def written(self, masked: BoolArray) -> IntArray:
        """[W] positions of the current block that are written, ascending."""
        return self.positions[~masked[self.positions] & ~self.given[self.positions]]

    def past(self, masked: BoolArray) -> IntArray:
        """Written positions before the current block's end, the prompt's included, ascending."""
        return np.flatnonzero(~masked[: self.end])

    def quota(self, masked: BoolArray) -> int:
        """Tokens due in this step."""
        masks = int(masked[self.start : self.end].sum())
        due = tokens_due(
            self.spread,
            masks=self.masks_at_start,
            steps=self.steps,
            step=self.step,
            written=self.masks_at_start - masks,
        )
        return min(masks, due)
