"""ReMDM as its authors run it on LLaDA (guanghanwang/ReMDM-LLaDA, `llada_remdm_sample`).

A block of `B` masks and `S` steps takes up to `2S` iterations. Iterations `[7B/8, 7B/8 + S)`
(rounded down) first mask the `n` written tokens again that had the lowest confidence **when they
were revealed**, then reveal the `n` surest; all others reveal the step's quota, the surest first.

Their tokens are sampled at temperature 1. Where their code takes the lowest of all stored
confidences although fewer than `n` tokens are written, it masks the prompt; here fewer are masked.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from boe_vllm.base.options import options
from boe_vllm.policies.base import Commit, Policy, PolicyConfig, View, top
from boe_vllm.policies.remasking import Diary


@options
class ReMDMLLaDAConfig(PolicyConfig):
    """ReMDM on LLaDA: confidence order, with a window in which the least sure tokens are redone."""

    remask_number: Annotated[int, Field(ge=1)] = 1
    """Tokens masked again in a step of the window. Default: that of the authors' Countdown runs
    (`remdm_number`)."""

    @property
    def rewrites(self) -> bool:
        """Always."""
        return True


class ReMDMLLaDAPolicy(Policy[ReMDMLLaDAConfig]):
    """Confidence order with a window in which the least sure tokens are written anew.

    An iteration that would find nothing masked is passed over and costs no forward.
    """

    name = "remdm-llada"
    Config = ReMDMLLaDAConfig
    source = "guanghanwang/ReMDM-LLaDA `llada_remdm_sample`"
    passes = "1 forward; up to twice the planned steps"

    def step_limit(self, masks: int, steps: int) -> int:
        """Twice the planned steps, or one step for each mask if those are more."""
        return max(masks, 2 * steps)

    def step(self, view: View) -> Commit:
        """Reveal for this iteration; what the next one remasks is masked in the same step."""
        diary, number = Diary(view), self.config.remask_number
        k, steps = diary.iteration, view.block_steps
        begin = view.block_masks * 7 // 8
        end = min(begin + steps, 2 * steps)
        due = number if begin <= k < end else self._quota(view, k, begin, end)
        chosen = top(view.confidence, due)
        positions = view.positions[chosen]
        diary.note(positions, view.confidence[chosen])
        written = np.union1d(view.written, positions)
        left = view.block_masks - len(written)
        remask = positions[:0]
        while True:
            k += 1
            if begin <= k < end:
                remask = written[top(-diary.stored(written), number)]
                break
            if k >= 2 * steps or (left and self._quota(view, k, begin, end)):
                break
        diary.iteration = k
        return Commit(
            chosen=chosen,
            remask=remask,
            settled=k + 1 >= end or begin >= end,
            scores=view.confidence,
        )

    def _quota(self, view: View, iteration: int, begin: int, end: int) -> int:
        """Tokens that an iteration outside the window reveals: LLaDA's quota of its turn."""
        if iteration >= 2 * view.block_steps:  # not all of the last turn could be written
            return len(view.positions)
        turn = iteration - max(0, min(iteration, end) - begin)
        masks, steps = view.block_masks, view.block_steps
        return masks // steps + (turn < masks % steps)
