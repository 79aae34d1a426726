"""Info-Gain: of a few candidate writes, the one that costs least and explains most (Yang et al.
2026, arXiv 2602.18176; yks23/Information-Gain-Sampler, `src/samplers/info_gain.py`).

Candidates are sets of `b` positions: the `b` surest, then the top `b` of `p / tau_pos + Gumbel`.
One forward over each next state gives

    J(a) = - sum_{i in a} H_i - mean_{j still masked} H_j(next)

and the best candidate is written. Its forward is the next step's own, so that a step costs as many
forwards as it has candidates, and one more only at the start of a block.

Where the authors draw tokens anew for each candidate at temperature > 0, the step's proposals are
written in all of them here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from boe_vllm.base.arrays import IntArray
from boe_vllm.base.options import options
from boe_vllm.policies.base import Commit, Policy, PolicyConfig, View, top
from boe_vllm.policies.local import scores_of_a_draw
from boe_vllm.sampling import randomness
from boe_vllm.steering.lookahead import Lookahead, Observed, Prospect

if TYPE_CHECKING:
    from boe_vllm.policies.base import Asking


@options
class InfoGainConfig(PolicyConfig):
    """Info-Gain: of a few candidate sets, the one that costs least entropy and explains most.

    Defaults are those of the authors' `InfoGainSampler.sample`.
    """

    candidates: Annotated[int, Field(ge=1)] = 8
    """Candidate sets per step (`candidate_number`); equal ones are looked at once."""
    position_temperature: Annotated[float, Field(ge=0)] = 0.2
    """Randomness in drawing candidate sets (tau_pos); 0 leaves only the surest set."""
    bypass: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Probability (`threshold`) from which, when every mask of the block reaches it, nothing is
    looked at; 0 for never."""
    bypass_writes: Literal["all", "quota"] = "all"
    """What is written then: the whole block, as the authors' `_greedy_unmask` does, or the surest
    tokens that are due."""
    cost: bool = True
    """Whether the entropy of what is written counts; without it, it is the authors' variant
    "lookum"."""
    observe: Observed = "masked"
    """Positions whose mean entropy counts: all masks of the sequence as in the authors' code, those
    of the block, or all positions."""
    reuse: bool = True
    """Whether the winner's prediction serves the next step; tokens are the same without."""


class InfoGainPolicy(Policy[InfoGainConfig]):
    """The best of a few candidate sets by one forward each; of equal ones the first."""

    name = "info-gain"
    Config = InfoGainConfig
    source = (
        "Yang et al. 2026 (arXiv 2602.18176); yks23/Information-Gain-Sampler "
        "`src/samplers/info_gain.py`"
    )
    passes = "up to 8 forwards (`candidates`), one of which serves the next step"

    def rows_ahead(self, *, masks: int, quota: int, length: int) -> int:
        """A forward for each candidate."""
        return self.config.candidates * length

    def step(self, view: View) -> Asking:
        """Draw candidates, look ahead, write the best."""
        settings = self.config
        if settings.bypass > 0 and (view.confidence >= settings.bypass).all():
            count = len(view.positions) if settings.bypass_writes == "all" else view.quota
            return Commit(chosen=top(view.confidence, count), scores=view.confidence)
        sets = self.candidates(view)
        if len(sets) == 1:
            return Commit(chosen=sets[0], scores=view.confidence)
        prospects: list[Prospect] = yield Lookahead(
            writes=tuple(sets),
            tokens=tuple(view.proposal[chosen] for chosen in sets),
            observe=settings.observe,
            carry=settings.reuse,
        )
        gains = np.array([-prospect.mean_entropy() for prospect in prospects])
        if settings.cost:
            gains -= np.array([view.entropy[chosen].sum() for chosen in sets])
        best = int(top(gains, 1)[0])
        scores = np.full(len(view.positions), np.nan)
        scores[sets[best]] = gains[best]
        return Commit(chosen=sets[best], scores=scores, carry=prospects[best].carry)

    def candidates(self, view: View) -> list[IntArray]:
        """Distinct sets of `b` indices, the surest first."""
        settings = self.config
        sets = [top(view.confidence, view.quota)]
        if len(view.positions) <= view.quota or settings.position_temperature == 0:
            return sets
        for n in range(1, settings.candidates):
            uniforms = view.uniforms(randomness.CANDIDATES + n)
            scores = scores_of_a_draw(view.confidence, settings.position_temperature, uniforms)
            sets.append(top(scores, view.quota))
        distinct: dict[tuple[int, ...], IntArray] = {}
        for chosen in sets:
            distinct.setdefault(tuple(sorted(chosen.tolist())), chosen)
        return list(distinct.values())
