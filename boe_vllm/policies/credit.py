"""dInfer's credit: tokens that were proposed before are believed sooner (inclusionAI/dInfer
`parallel_strategy.py`, `CreditThresholdParallelDecoder`).

In each step of a block every credit decays, `C <- decay C`, and the likeliest token of each masked
position gains `p^boost`. The rule of `threshold` is then applied to `softmax(logits + weight ln(1 +
C))`. Only tokens with a credit differ from the plain softmax, so their probabilities are all that
is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from boe_vllm.base.arrays import FloatArray
from boe_vllm.base.options import options
from boe_vllm.policies.base import Commit, Needs, Policy, PolicyConfig, View
from boe_vllm.steering.likelihood import Likelihood

if TYPE_CHECKING:
    from boe_vllm.policies.base import Asking

CREDITS = "credit"
NEAR = 1e-5
"""Whatever comes so close to the surest token is written with it."""


@options
class CreditConfig(PolicyConfig):
    """dInfer's credit: the threshold rule, with a bonus for tokens that were proposed before."""

    threshold: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Probability, with the bonus, from which a token is written."""
    weight: Annotated[float, Field(ge=0, le=100)] = 0.7
    """Factor on ln(1 + credit), which is added to the logit (`credit_alpha`)."""
    boost: Annotated[float, Field(ge=0, le=100)] = 0.2
    """Exponent on the probability that is credited (`boost_gamma`)."""
    decay: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Factor on all credits from step to step (`decay_beta`)."""


class CreditPolicy(Policy[CreditConfig]):
    """The threshold rule on credited probabilities; at a temperature, the sample is credited."""

    name = "credit"
    Config = CreditConfig
    source = "inclusionAI/dInfer `CreditThresholdParallelDecoder`"
    passes = "1 forward; the number of steps adapts"

    def needs(self) -> Needs:
        """The step's log-probabilities, again."""
        return Needs(distributions=True)

    def step(self, view: View) -> Asking:
        """Update the credits, read the credited tokens' probabilities, apply the threshold."""
        credits = self._updated(view)
        index = [i for i, own in enumerate(credits) for _ in own]
        tokens = np.array([token for own in credits for token in own])
        bonus = np.array(
            [(1 + value) ** self.config.weight for own in credits for value in own.values()]
        )
        logs: FloatArray = yield Likelihood(index=np.array(index), tokens=tokens)
        raised = np.exp(logs) * bonus
        proposal, confidence = view.proposal.copy(), np.empty(len(credits))
        start = 0
        for i, own in enumerate(credits):
            part = slice(start, start + len(own))
            start = part.stop
            total = 1 + (raised[part] - np.exp(logs[part])).sum()
            best = int(np.argmax(raised[part])) if view.temperature == 0 else len(own) - 1
            proposal[i], confidence[i] = tokens[part][best], raised[part][best] / total
        confidence = view.committable(proposal, confidence)
        written = confidence >= min(self.config.threshold, confidence.max() - NEAR)
        if not written.any():  # nothing but what may only come last
            written[0] = True
        chosen = np.flatnonzero(written)
        return Commit(chosen=chosen, tokens=proposal[chosen], scores=confidence)

    def _updated(self, view: View) -> list[dict[int, float]]:
        """Each position's tokens with their credits; the token proposed now is the last."""
        if view.block_step == 0:
            view.memory[CREDITS] = {}
        known: dict[int, dict[int, float]] = view.memory[CREDITS]
        likeliest = np.where(np.isneginf(view.confidence), 0.0, view.confidence)
        for place, token, p in zip(
            view.positions.tolist(), view.proposal.tolist(), likeliest.tolist(), strict=True
        ):
            own = {t: self.config.decay * value for t, value in known.get(place, {}).items()}
            own[token] = own.pop(token, 0.0) + p**self.config.boost
            known[place] = own
        return [known[place] for place in view.positions.tolist()]
