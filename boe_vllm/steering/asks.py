"""What a policy may ask of the denoiser in the middle of a step."""

from __future__ import annotations

import dataclasses
from typing import Literal

from boe_vllm.arrays import IntArray

Surrogate = Literal["mask", "inject", "kv"]
Context = Literal["frozen", "exact"]


class Ask:
    """Work that a policy wants done before it decides; a policy's step yields it."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokenImportance(Ask):
    """Ask for the Token Importance Scores of candidates; answered with float64 [C], nats."""

    candidates: IntArray
    """[C] indices into `View.positions`."""
    objective: IntArray
    """[O] indices into `View.positions` whose entropies are summed."""
    active: IntArray | None
    """Indices into `View.positions` whose attention passes a gradient; None: every row."""
    surrogate: Surrogate
    """Where the entropy is linearised; see `policies.boe.BoEConfig.surrogate`."""
    context: Context
    """For "inject": rows outside the masked ones frozen, or computed again."""
    sharpen: float
    """Temperature of the soft write, 1 for none."""
