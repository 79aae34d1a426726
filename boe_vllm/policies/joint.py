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
from boe_vllm.policies.bounded import Bound, Rule, bounded_commit, bounded_rows, bounded_set
from boe_vllm.policies.composition import CompositionConfig, composed
from boe_vllm.policies.drafted import Drafting, drafted_commit, drafted_rows
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
class JointConfig(CompositionConfig):
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
    bound: Rule = "threshold"
    """What may be written from one prediction under `commit` "rounds" and "drafts": all
    tokens of probability `threshold`, or the most probable one where there is none; or as many as
    `gamma` allows ("entropy", the rule of `eb`)."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.99
    """Least probability of a token that is written together with others."""
    gamma: Annotated[float, Field(ge=0)] = 0.01
    """Bound on `sum H - max H` of the tokens written from one prediction, nats."""
    rounds: Annotated[int, Field(ge=0, le=64)] = 1
    """Partial predictions in a step under `commit` "rounds"."""
    pool: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    """Positions that such a round predicts again, the surest of the block."""
    trust: Annotated[float, Field(ge=0)] = 0.5
    """Entropy of the surest position left up to which a round is run, and then writes, nats; above
    it the next step decides."""
    drafts: Annotated[int, Field(ge=0, le=16)] = 3
    """Next steps that a step drafts under `commit` "drafts". Its wide pass has the rows of `drafts`
    + 1 whole states."""
    slack: Annotated[float, Field(ge=0)] | None = 0.1
    """Entropy by which a draft's least sure position may exceed that of what the bound would write,
    nats; null where it has to be that very set, which gives the tokens of `drafts` 0 in fewer
    steps."""
    multiple: Annotated[float, Field(ge=1, le=1e6)] = 2.0
    """Positions that a chain chooses from, as a multiple of the tokens due; the surest."""
    certain: Annotated[float, Field(gt=0, le=1)] = CERTAIN
    """Probability from which a position joins a chain without a round of its own."""

    def drafting(self) -> Drafting:
        """What `commit` "drafts" is set to."""
        return Drafting(drafts=self.drafts, slack=self.slack)

    def allowed(self) -> Bound:
        """What `commit` "rounds" is set to, whose bound "drafts" has too."""
        limit = self.threshold if self.bound == "threshold" else self.gamma
        return Bound(
            rule=self.bound, limit=limit, pool=self.pool, rounds=self.rounds, trust=self.trust
        )

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
        if self.config.commit == "drafts":
            return drafted_rows(length, self.config.drafts)
        if self.config.adapts:
            return bounded_rows(masks, self.config.rounds)
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
