"""Ours: several tokens a step, less what pairs of them would do to each other.

The set is built greedily, `argmax_i ln p_i - interaction sum_j kappa_ij` over the chosen `j`, with
an estimate of the coupling `kappa` between proposals (`steering.coupling`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from boe_vllm.base.arrays import FloatArray
from boe_vllm.base.options import options
from boe_vllm.policies.base import Commit, Needs, Policy, View, top
from boe_vllm.policies.composition import CompositionConfig, composed
from boe_vllm.policies.selection import over_all, pairwise_set, pool_size, surest_pool
from boe_vllm.steering.coupling import Coupling, Estimator, Measure

if TYPE_CHECKING:
    from boe_vllm.policies.base import Asking

PRESETS: dict[str, dict[str, Any]] = {
    # The coupling measured on all masked rows: the oracle of the estimators.
    "exact": {
        "coupling": "exact",
        "coupling_measure": "kl",
        "interaction": 0.3,
        "pool": 2.0,
        "remask": "none",
        "commit": "quota",
    },
}


@options
class PairwiseConfig(CompositionConfig):
    """Write together what is likely and does not depend on each other, pair by pair."""

    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS

    preset: Literal["exact"] | None = None
    """Named settings, which replace the server's; fields given beside it go on top. `exact`
    measures the coupling on all masked rows."""
    commit: Literal["quota", "eb", "threshold"] | None = None
    """How many positions of the policy's order are written: as many as the frame's schedule has
    due ("quota"), the longest prefix within the entropy bound `gamma` ("eb"), or the longest prefix
    of tokens that reach `threshold`; at least one. Choices of whole sets are cut to that prefix and
    never grow beyond what is due. Default: "quota"."""
    coupling: Estimator = "pairs"
    """How the dependence of two proposals is estimated: by writing one and looking at all masked
    rows ("exact") or at the pool's ("pairs"), or from the step's own attention, with the smaller
    entropy ("attention") or the overlap of what is undecided ("overlap")."""
    coupling_measure: Measure = "pmi"
    """What "exact" and "pairs" measure, nats: how far the distributions move ("kl"), or how much
    less likely the proposals themselves become ("pmi")."""
    interaction: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    """Weight of the coupling."""
    pool: Annotated[float, Field(ge=1, le=1e6)] = 2.0
    """Positions to choose from, as a multiple of the tokens due; the surest."""


class PairwisePolicy(Policy[PairwiseConfig]):
    """Likely and independent positions; with one token a step it is `confidence`."""

    name = "pairwise"
    Config = PairwiseConfig
    source = "ours"
    passes = (
        "1 forward and, for b tokens a step, 1 partial forward of (2 b)^2 rows (`coupling` "
        '"pairs"), 2 b M rows ("exact") or none ("attention", "overlap")'
    )

    def needs(self) -> Needs:
        """What the estimators need of the step's own forward."""
        return Needs(rows="masked")

    def rows_ahead(self, *, masks: int, quota: int, length: int) -> int:
        """The states that the coupling is measured on."""
        config = self.config
        pool = pool_size(masks, config.most_due(masks, quota), config.pool)
        return pool * {"exact": masks, "pairs": pool}.get(config.coupling, 0)

    def step(self, view: View) -> Asking:
        """The choice, with the remasking or the commit bound that the settings put on top."""
        return (yield from composed(self.choose, view, self.config, ranks=False))

    def choose(self, view: View) -> Asking:
        """A pool, its couplings, and the set."""
        config = self.config
        pool, scores = surest_pool(view, config.pool)
        chosen = top(scores, view.quota)
        if len(pool) > view.quota > 1:
            coupling: FloatArray = yield Coupling(
                pool=pool,
                tokens=view.proposal[pool],
                entropy=view.entropy[pool],
                estimator=config.coupling,
                measure=config.coupling_measure,
            )
            chosen = pairwise_set(scores, config.interaction * coupling, view.quota)
        return Commit(chosen=pool[chosen], scores=over_all(view, pool, scores))
