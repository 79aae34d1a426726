"""PUNT: write together what does not move once the others are written (arXiv 2510.21961).

All masks are ranked by confidence and the ranks numbered in binary. For each bit, the most
significant first, the positions still in the set whose bit is 0 are written in a hypothetical
state, one forward is run, and those whose bit is 1 leave the set if their prediction moves by more
than `epsilon`. Every pair of positions is told apart by some bit, so what stays is independent pair
by pair. The surest position has no 1 among its bits and always stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from boe_vllm.base.arrays import FloatArray
from boe_vllm.base.options import options
from boe_vllm.policies.base import Commit, Needs, Policy, PolicyConfig, View, top
from boe_vllm.steering.shift import Shift

if TYPE_CHECKING:
    from boe_vllm.policies.base import Asking


@options
class PUNTConfig(PolicyConfig):
    """PUNT: write all that keeps its prediction when the others are written, by bisection."""

    epsilon: Annotated[float, Field(ge=0)] = 0.01
    """Largest change of a prediction that still joins, KL(before || after), nats. Default: the
    smallest of the paper, which goes up to 0.32."""


class PUNTPolicy(Policy[PUNTConfig]):
    """Independence by ⌈log2 M⌉ hypothetical states; the number of steps adapts."""

    name = "punt"
    Config = PUNTConfig
    source = "arXiv 2510.21961, Algorithm 1"
    passes = "1 forward and up to ⌈log2 M⌉ more over the whole state; the number of steps adapts"

    def needs(self) -> Needs:
        """The predictions that are compared with."""
        return Needs(distributions=True)

    def rows_ahead(self, *, masks: int, quota: int, length: int) -> int:
        """A whole state for each bit of a rank."""
        return max(masks - 1, 0).bit_length() * length

    def step(self, view: View) -> Asking:
        """Bisect the ranks; forbidden early commits take part only where nothing else is left."""
        order = top(view.confidence, len(view.confidence))
        early = int(np.isfinite(view.confidence).sum())
        order = order[: early or len(order)]
        rank = np.arange(len(order))
        stays = np.ones(len(order), bool)
        for bit in reversed(range(max(len(order) - 1, 0).bit_length())):
            ones = (rank >> bit & 1).astype(bool)
            anchors, others = order[stays & ~ones], stays & ones
            if not others.any():
                continue
            moved: FloatArray = yield Shift(written=anchors, tokens=view.proposal[anchors])
            stays[others] = moved[order[others]] <= self.config.epsilon
        return Commit(chosen=order[stays], scores=view.confidence)
