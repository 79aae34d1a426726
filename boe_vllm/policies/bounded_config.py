"""Settings of a policy that may let a bound decide how many positions are written."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from boe_vllm.base.options import options
from boe_vllm.policies.bounded import Bound, Rule, bounded_rows
from boe_vllm.policies.composition import CompositionConfig
from boe_vllm.policies.drafted import Drafting, drafted_rows


@options
class BoundedConfig(CompositionConfig):
    """What `commit` "rounds" and "drafts" are set to."""

    bound: Rule = "threshold"
    """What may be written from one prediction under `commit` "rounds" and "drafts": all
    tokens of probability `threshold`, or the most probable one where there is none; or as many as
    `gamma` allows ("entropy", the rule of `eb`)."""
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

    def allowed(self) -> Bound:
        """The bound, and its rounds."""
        limit = self.threshold if self.bound == "threshold" else self.gamma
        return Bound(
            rule=self.bound, limit=limit, pool=self.pool, rounds=self.rounds, trust=self.trust
        )

    def drafting(self) -> Drafting:
        """What `commit` "drafts" is set to."""
        return Drafting(drafts=self.drafts, slack=self.slack)

    def bounded_rows(self, *, masks: int, length: int) -> int:
        """Most rows of a step's rounds or drafts; see `Policy.rows_ahead`."""
        if self.commit == "drafts":
            return drafted_rows(length, self.drafts)
        return bounded_rows(masks, self.rounds)
