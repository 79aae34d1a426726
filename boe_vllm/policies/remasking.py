"""ReMDM's remasking rule (Wang et al. 2025, arXiv 2503.00307, section 4; kuleshov-group/remdm,
`_ddpm_caching_update`), as numbers: how probable it is that a token is masked again or revealed.

In iteration `i` of `S`, from time `t = (S - i)/S` to `s = (S - i - 1)/S`, a share `alpha` of the
block's tokens is to be written: `alpha_t = 1 - t`. A written token is masked again with probability
`sigma`, and a mask is revealed with probability `(alpha_s - (1 - sigma) alpha_t)/(1 - alpha_t)`, so
that the expected share written is `alpha_s` whatever `sigma` is. `sigma` may be at most
`sigma_max = min(1, (1 - alpha_s)/alpha_t)`.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from boe_vllm.base.arrays import BoolArray, FloatArray, IntArray
from boe_vllm.base.options import options
from boe_vllm.policies.base import PolicyConfig, View
from boe_vllm.sampling import randomness

Schedule = Literal["cap", "rescale", "conf", "loop"]
Share = Annotated[float, Field(gt=0, lt=1)]

ETA = {"cap": 0.008, "rescale": 0.015, "loop": 0.02}
"""The authors' values for 1024 iterations (`scripts/`); "conf" has none."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """One iteration of the rule."""

    alpha_t: float
    """Share of the block that is to be written before it."""
    alpha_s: float
    """Share that is to be written after it."""
    sigma: float
    """Probability that a written token is masked again; for "conf" its upper bound."""
    reveal: float
    """Probability that a mask is revealed."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RemaskingRule:
    """A schedule of `sigma` with its settings.

    Raises:
        ValueError: for settings that give no probabilities.
    """

    schedule: Schedule
    eta: float | None
    """None takes `ETA`."""
    t_on: float
    """"loop": the time at which remasking begins."""
    t_off: float
    """"loop": the time at which it ends."""
    alpha_on: float
    """"loop": share written while it lasts."""

    def __post_init__(self) -> None:
        if self.schedule == "conf":
            if self.eta is not None:
                raise ValueError(
                    f"eta: expected none with sigma_schedule 'conf', which spreads sigma_max over "
                    f"the written tokens, got {self.eta}; remove it or choose another schedule"
                )
            return
        if self.eta is None:
            object.__setattr__(self, "eta", ETA[self.schedule])
        if self.schedule == "loop":
            if not self.t_off < self.t_on:
                raise ValueError(
                    f"t_off: expected less than t_on ({self.t_on}), got {self.t_off}; time runs "
                    "from 1 to 0 and remasking lasts from t_on to t_off"
                )
            most = (1 - self.alpha_on) / self.alpha_on
            if self.strength > most:
                raise ValueError(
                    f"eta: expected at most (1 - alpha_on)/alpha_on = {most:.6g} with "
                    f"sigma_schedule 'loop', got {self.eta}; lower eta or alpha_on"
                )

    @property
    def strength(self) -> float:
        """`eta` as a number."""
        return 0.0 if self.eta is None else self.eta

    def rates(self, iteration: int, steps: int) -> Rates:
        """The rule's numbers in iteration `i` of `S`; the last one reveals everything."""
        if iteration >= steps - 1:  # later ones come only where not all of it could be written
            return Rates(alpha_t=min(1.0, iteration / steps), alpha_s=1.0, sigma=0.0, reveal=1.0)
        t, s = (steps - iteration) / steps, (steps - iteration - 1) / steps
        if self.schedule != "loop":
            return self.between(iteration / steps, (iteration + 1) / steps)
        if t > self.t_on:
            rise = self.alpha_on / (1 - self.t_on)
            return _rates((1 - t) * rise, min(1.0, (1 - s) * rise), 0.0)
        if t <= self.t_off:
            fall = (1 - self.alpha_on) / self.t_off
            return _rates(1 - t * fall, 1 - s * fall, 0.0)
        return _rates(self.alpha_on, self.alpha_on, self.strength)

    def share(self, iteration: int, steps: int) -> float:
        """Share of the block that is to be written after an iteration, never falling: coarse steps
        overshoot `alpha_on` before "loop" begins."""
        after = self.rates(iteration, steps).alpha_s
        before_loop = (steps - iteration) / steps > self.t_on and iteration < steps - 1
        return min(after, self.alpha_on) if self.schedule == "loop" and before_loop else after

    def between(self, alpha_t: float, alpha_s: float) -> Rates:
        """The numbers of "cap", "rescale" and "conf" between two shares."""
        bound = 1.0 if alpha_t == 0 else min(1.0, (1 - alpha_s) / alpha_t)
        if self.schedule == "conf":  # the rule takes sigma = 0 for the masks themselves
            reveal = _rates(alpha_t, alpha_s, 0.0).reveal
            return Rates(alpha_t=alpha_t, alpha_s=alpha_s, sigma=bound, reveal=reveal)
        capped = min(self.strength, bound)
        return _rates(alpha_t, alpha_s, capped if self.schedule == "cap" else self.strength * bound)

    def remasks_later(self, iteration: int, steps: int) -> bool:
        """Whether the given iteration or one after it may mask a token again."""
        if iteration >= steps - 1 or (self.schedule != "conf" and self.strength == 0):
            return False
        return self.schedule != "loop" or (steps - iteration) / steps > self.t_off

    def drawn(
        self, view: View, iteration: int, sigma: float, positions: IntArray, stored: FloatArray
    ) -> BoolArray:
        """[W] which of the written positions are masked again.

        Args:
            view: of the request; only its seed is used.
            iteration: of the block; it takes the place of the step in the random numbers.
            sigma: see `Rates`.
            positions: [W] written positions.
            stored: [W] their confidences when they were last revealed.
        """
        if self.schedule == "conf" and len(positions):
            weights = np.exp(-stored)
            chance: FloatArray | float = sigma * weights / weights.sum()
        else:
            chance = sigma
        draws = randomness.uniforms(
            view.seed, step=iteration, positions=positions, stream=randomness.REMASK
        )
        return draws < chance


def _rates(alpha_t: float, alpha_s: float, sigma: float) -> Rates:
    reveal = (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)
    return Rates(alpha_t=alpha_t, alpha_s=alpha_s, sigma=sigma, reveal=min(1.0, max(0.0, reveal)))


@options
class RemaskingConfig(PolicyConfig):
    """ReMDM's remasking rule. Defaults are the authors', for 1024 steps."""

    sigma_schedule: Schedule = "cap"
    """How probable it is that a written token is masked again: "cap" min(eta, sigma_max), "rescale"
    eta sigma_max, "conf" sigma_max softmax(-p at its last reveal), "loop" eta from t_on to t_off,
    with the share alpha_on written, and 0 before and after."""
    eta: Annotated[float, Field(ge=0, le=1)] | None = None
    """Strength of the remasking; null takes the authors' 0.008 (cap), 0.015 (rescale), 0.02 (loop),
    and is the only value for "conf"."""
    t_on: Share = 0.55
    """Time at which the loop begins; time runs from 1 to 0."""
    t_off: Share = 0.05
    """Time at which the loop ends; a block of fewer than 1/t_off steps ends in the loop."""
    alpha_on: Share = 0.9
    """Share of the block that is written during the loop."""

    def __post_init__(self) -> None:
        self.rule()

    @property
    def rewrites(self) -> bool:
        """Always."""
        return True

    def rule(self) -> RemaskingRule:
        """The rule with these settings."""
        return RemaskingRule(
            schedule=self.sigma_schedule,
            eta=self.eta,
            t_on=self.t_on,
            t_off=self.t_off,
            alpha_on=self.alpha_on,
        )


class Diary:
    """What a remasking policy remembers of a block: the iteration and confidences at reveal."""

    _KEY = "remasking"

    def __init__(self, view: View) -> None:
        """Open the request's diary; a new block begins a new one."""
        if view.block_step == 0 or self._KEY not in view.memory:
            view.memory[self._KEY] = {"iteration": 0, "stored": {}}
        self._notes = view.memory[self._KEY]

    @property
    def iteration(self) -> int:
        """The iteration of the block that comes next."""
        return self._notes["iteration"]

    @iteration.setter
    def iteration(self, value: int) -> None:
        self._notes["iteration"] = value

    def stored(self, positions: IntArray) -> FloatArray:
        """[W] confidences of written positions when they were last revealed; 1 for those that the
        policy has not chosen itself, which a grammar had written."""
        return np.array([self._notes["stored"].get(int(p), 1.0) for p in positions], float)

    def note(self, positions: IntArray, confidence: FloatArray) -> None:
        """Positions are revealed."""
        self._notes["stored"].update(zip(positions.tolist(), confidence.tolist(), strict=True))
