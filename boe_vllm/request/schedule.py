"""How many tokens are due in each step of a block."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["linear", "cosine"]

# The cosine of a third of a right angle and the like come out a little off: a count that is whole
# must not be rounded up to the next.
_ROUNDING = 1e-9


def due(schedule: Schedule, *, masks: int, steps: int, step: int, written: int) -> int:
    """Tokens due in a step, at least one.

    "linear" (ML-GSAI/LLaDA `get_num_transfer_tokens`): `masks // steps`, and one more in each of
    the first `masks % steps` steps. "cosine" (MaskGIT, Chang et al. 2022): few at first, many at
    last, `ceil(masks (1 - cos(pi i / (2 steps))))` written after step `i` of the block.

    Args:
        schedule: the kind.
        masks: masked positions at the start of the block.
        steps: steps planned for the block.
        step: steps done so far.
        written: positions written so far.
    """
    if schedule == "linear":
        return max(1, masks // steps + (step < masks % steps))
    share = 1.0 - math.cos(math.pi / 2 * min(step + 1, steps) / steps)
    return max(1, math.ceil(masks * share - _ROUNDING) - written)
