"""Exhaustive one-step look-ahead: every candidate is written alone and a forward says what is still
uncertain then. It is what BoE approximates by one backward (eq. 9 and 16 of the paper), for as many
forwards as there are candidates.

With `H_j` the entropies now and `H_j(i)` those once candidate `i` is written, over the block's
remaining masks `j != i`:

    drop       score_i = sum_j H_j - sum_j H_j(i)    (eq. 16: what the Token Importance Score means)
    remaining  score_i =           - sum_j H_j(i)    (eq. 9: the objective itself)

The two differ by `H_i`: "remaining" also rewards removing the candidate's own entropy from the sum.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from boe_vllm.base.options import options
from boe_vllm.policies.base import (
    Certainty,
    Commit,
    Needs,
    Policy,
    PolicyConfig,
    View,
    allowed,
    candidates_of,
    certainty,
    top,
)
from boe_vllm.steering.lookahead import Lookahead, Prospect

if TYPE_CHECKING:
    from boe_vllm.policies.base import Asking


@options
class LookaheadConfig(PolicyConfig):
    """Exhaustive look-ahead: write each candidate alone and keep what leaves the least entropy."""

    rho: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the masked positions that are candidates. Default: all, being exhaustive."""
    prefilter: Certainty = "confidence"
    """What candidates are chosen by if rho is below 1 (paper 3.5)."""
    write: Literal["soft", "proposal"] = "soft"
    """What a candidate's state holds: the soft embedding `E^T pi` (eq. 10), or the token that would
    be written (the argmax at temperature 0)."""
    sharpen: Annotated[float, Field(ge=0.01, le=1)] = 1.0
    """Temperature of the soft write: pi^(1/sharpen), renormalised."""
    score: Literal["drop", "remaining"] = "drop"
    """What is compared: the entropy that a write takes from the other masks ("drop", what the Token
    Importance Score estimates), or what remains of it ("remaining", eq. 9)."""


class LookaheadPolicy(Policy[LookaheadConfig]):
    """The `b` candidates that explain most, each judged alone.

    When nothing is left to choose (as many candidates as tokens due) they are written unseen.
    """

    name = "lookahead"
    Config = LookaheadConfig
    source = "TABES (arXiv 2602.00250), eq. 9 and 16, computed instead of estimated"
    passes = "1 forward, and 1 for each candidate"

    def needs(self) -> Needs:
        """The distributions behind soft writes."""
        return Needs(distributions=self.config.write == "soft")

    def rows_ahead(self, *, masks: int, quota: int, length: int) -> int:
        """A forward for each candidate."""
        return max(quota, math.ceil(self.config.rho * masks)) * length

    def step(self, view: View) -> Asking:
        """Prefilter, look ahead once for each candidate, take the best."""
        settings, masked = self.config, len(view.positions)
        count = math.ceil(settings.rho * masked)
        candidates = np.sort(candidates_of(view, certainty(view, settings.prefilter), count))
        if len(candidates) == view.quota:
            return Commit(chosen=candidates, scores=view.confidence)
        writes = tuple(candidates[:, None])
        prospects: list[Prospect] = yield Lookahead(
            writes=writes,
            tokens=None if settings.write == "soft" else tuple(view.proposal[i] for i in writes),
            observe="block",
            sharpen=settings.sharpen,
        )
        scores = np.full(masked, -np.inf)
        for i, prospect in zip(candidates, prospects, strict=True):
            scores[i] = -prospect.entropies().sum()
            if settings.score == "drop":
                scores[i] += view.entropy[prospect.index].sum()
        scores = allowed(scores, view)
        return Commit(chosen=top(scores, view.quota), scores=scores)
