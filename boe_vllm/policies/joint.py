"""Ours: several tokens a step by the chain rule over sets, without a backward.

The surest position is written first. Then the others of a pool are predicted again as if it were
written, all rows but the pool's frozen, and the likeliest of them joins; and so on until the set is
complete (`selection.chain_set`). Each token is as probable as it looks given those before it, which
is what goes wrong when several are taken from one prediction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from boe_vllm.base.options import options
from boe_vllm.policies.base import Commit, Needs, Policy, View
from boe_vllm.policies.composition import CompositionConfig, composed
from boe_vllm.policies.selection import (
    CERTAIN,
    chain_rows,
    chain_set,
    over_all,
    pool_size,
    surest_pool,
)

if TYPE_CHECKING:
    from boe_vllm.policies.base import Asking

PRESETS: dict[str, dict[str, Any]] = {
    # More to choose from, and a round for every token.
    "thorough": {"pool": 3.0, "certain": 1.0, "remask": "none", "commit": "quota"},
}


@options
class JointConfig(CompositionConfig):
    """Build the step's set by the chain rule: each token by its probability given those before."""

    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS

    preset: Literal["thorough"] | None = None
    """Named settings, which replace the server's; fields given beside it go on top. `thorough` has
    `pool` 3 and `certain` 1."""
    pool: Annotated[float, Field(ge=1, le=1e6)] = 2.0
    """Positions to choose from, as a multiple of the tokens due; the surest."""
    certain: Annotated[float, Field(gt=0, le=1)] = CERTAIN
    """Probability from which a position joins the set without a round of its own."""


class JointPolicy(Policy[JointConfig]):
    """The chain rule over the surest positions; with one token a step it is `confidence`."""

    name = "joint"
    Config = JointConfig
    source = "ours"
    passes = "1 forward, and up to b - 1 partial forwards over 2 b rows for b tokens a step"

    def needs(self) -> Needs:
        """What the partial passes need of the step's own forward."""
        return Needs(rows="masked")

    def rows_ahead(self, *, masks: int, quota: int, length: int) -> int:
        """The chain's rounds over the pool."""
        due = self.config.most_due(masks, quota)
        return chain_rows(pool_size(masks, due, self.config.pool), due)

    def step(self, view: View) -> Asking:
        """The choice, with the remasking or the commit bound that the settings put on top."""
        return (yield from composed(self.choose, view, self.config, ranks=False))

    def choose(self, view: View) -> Asking:
        """A pool and its chain."""
        pool, scores = surest_pool(view, self.config.pool)
        chosen, tokens = yield from chain_set(view, pool, scores, certain=self.config.certain)
        return Commit(chosen=pool[chosen], tokens=tokens, scores=over_all(view, pool, scores))
