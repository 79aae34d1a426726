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
from collections.abc import Generator
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from boe_vllm.base.options import options
from boe_vllm.policies.base import Commit, Needs, Policy, PolicyConfig, View, top
from boe_vllm.policies.local import allowed
from boe_vllm.steering.lookahead import Lookahead
from boe_vllm.steering.step import Query


@options
class LookaheadConfig(PolicyConfig):
    """Settings of `lookahead`."""

    rho: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the masked positions that are candidates. Default: all, being exhaustive."""
    prefilter: Literal["confidence", "margin", "entropy"] = "confidence"
    """What candidates are chosen by if rho is below 1 (paper 3.5)."""
    write: Literal["soft", "proposal"] = "soft"
    """What a candidate's state holds: the soft embedding `E^T pi` (eq. 10), or the token that would
    be written (the argmax at temperature 0)."""
    sharpen: Annotated[float, Field(ge=0.01, le=1)] = 1.0
    """Temperature of the soft write: pi^(1/sharpen), renormalised."""
    score: Literal["drop", "remaining"] = "drop"
    """See the module. Default: the quantity that TIS estimates."""


class LookaheadPolicy(Policy):
    """The `b` candidates that explain most, each judged alone.

    When nothing is left to choose (as many candidates as tokens due) they are written unseen.
    """

    name = "lookahead"
    Config = LookaheadConfig

    def __init__(self, config: LookaheadConfig) -> None:
        super().__init__(config)
        self.settings = config

    def needs(self) -> Needs:
        """The distributions behind soft writes."""
        return Needs(distributions=self.settings.write == "soft")

    def rows_ahead(self, *, masks: int, quota: int, length: int) -> int:
        """A forward for each candidate."""
        return max(quota, math.ceil(self.settings.rho * masks)) * length

    def step(self, view: View) -> Generator[Query, Any, Commit]:
        """Prefilter, look ahead once for each candidate, take the best."""
        settings, masked = self.settings, len(view.positions)
        by = {"confidence": view.confidence, "margin": view.margin, "entropy": -view.entropy}
        count = min(masked, max(view.quota, math.ceil(settings.rho * masked)))
        candidates = np.sort(top(allowed(by[settings.prefilter], view), count))
        if count == view.quota:
            return Commit(chosen=candidates, scores=view.confidence)
        writes = tuple(candidates[:, None])
        prospects = yield Lookahead(
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
