"""Ours: several tokens a step, without a backward, by predicting a few rows again.

By default a bound decides how many are written. What it allows is written, the surest of the rest
are predicted again as if it were, all other rows frozen, and what it allows of these is written too
(`bounded.bounded_commit`). A round of a few rows stands for the next step's forward.

Under a quota (`commit="quota"`) the surest position is written first. Then the others of a pool are
predicted again as if it were written, and the likeliest of them joins; and so on until the set is
complete (`selection.chain_set`). Each token is as probable as it looks given those before it, which
is what goes wrong when several are taken from one prediction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from boe_vllm.base.options import options
from boe_vllm.policies.base import Certainty, Commit, Needs, Policy, View, certainty
from boe_vllm.policies.bounded import bounded_commit, bounded_set
from boe_vllm.policies.bounded_config import BoundedConfig
from boe_vllm.policies.composition import composed
from boe_vllm.policies.drafted import drafted_commit
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
    "thorough": {
        "multiple": 3.0,
        "certain": 1.0,
        "remask": "none",
        "commit": "quota",
        "rounds": 1,
        "pool": 64,
        "trust": 0.5,
        "drafts": 3,
        "slack": 0.1,
        "bound": "threshold",
    },
}


@options
class JointConfig(BoundedConfig):
    """Write what a bound allows, predict a few rows again, and go on; or sets by the chain rule."""

    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS

    preset: Literal["thorough"] | None = None
    """Named settings, which replace the server's; fields given beside it go on top. `thorough` has
    `commit` "quota", `multiple` 3 and `certain` 1."""
    commit: Literal["rounds", "drafts", "quota", "eb", "threshold"] | None = None
    """How many positions are written: what `bound` allows, in the step's own prediction and then in
    `rounds` partial ones ("rounds"), or with what it would allow in the next steps, drafted and
    looked at in one wide pass ("drafts"); as many as the frame's schedule has due, by the
    chain rule ("quota"); or the prefix of such a set within `gamma` ("eb") or of tokens that reach
    `threshold` ("threshold"). Default: "rounds", and "quota" where the request says
    `tokens_per_step` or `steps`, or `remask`."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.99
    """Least probability of a token that is written together with others."""
    multiple: Annotated[float, Field(ge=1, le=1e6)] = 2.0
    """Positions that a chain chooses from, as a multiple of the tokens due; the surest."""
    certain: Annotated[float, Field(gt=0, le=1)] = CERTAIN
    """Probability from which a position joins a chain without a round of its own."""

    @property
    def adapts(self) -> bool:
        """As long as nothing else is asked for."""
        by_default = self.commit is None and self.remask == "none"
        return self.commit in ("rounds", "drafts") or by_default


class JointPolicy(Policy[JointConfig]):
    """A bound with partial rounds; or the chain rule over the surest positions, which with one
    token a step is `confidence`."""

    name = "joint"
    Config = JointConfig
    source = "ours"
    passes = (
        "1 forward and `rounds` partial forwards over `pool` rows; with drafts 1 forward over the "
        "rows of `drafts` + 1 states; under a quota up to b - 1 partial forwards over 2 b rows for "
        "b tokens a step"
    )

    def needs(self) -> Needs:
        """What the partial passes need of the step's own forward; whole states need nothing, but
        the draws of the step."""
        drafts = self.config.commit == "drafts"
        return Needs(rows="none" if drafts else "masked", same_draws=drafts)

    def rows_ahead(self, *, masks: int, quota: int, length: int) -> int:
        """The rounds over the pool, the drafted states, or the chain's."""
        if self.config.adapts:
            return self.config.bounded_rows(masks=masks, length=length)
        due = self.config.most_due(masks, quota)
        return chain_rows(pool_size(masks, due, self.config.multiple), due)

    def step(self, view: View) -> Asking:
        """What the bound allows, or the chain with what the settings put on top."""
        if self.config.adapts:
            return (yield from self.bounded(view))
        return (yield from composed(self.choose, view, self.config, ranks=False))

    def bounded(self, view: View) -> Asking:
        """What the bound allows, and what it allows in each round or draft."""
        bound = self.config.allowed()
        first = bounded_set(view.entropy, view.confidence, bound)
        by: Certainty = "confidence" if bound.rule == "threshold" else "entropy"
        scores = certainty(view, by)
        if self.config.commit == "drafts":
            drafting = self.config.drafting()
            commit, _ = yield from drafted_commit(view, first, scores, bound, drafting)
            return commit
        return (yield from bounded_commit(view, first, scores, bound))

    def choose(self, view: View) -> Asking:
        """A pool and its chain."""
        pool, scores = surest_pool(view, self.config.multiple)
        chosen, tokens = yield from chain_set(view, pool, scores, certain=self.config.certain)
        return Commit(chosen=pool[chosen], tokens=tokens, scores=over_all(view, pool, scores))
