"""Flash-Verify: what is nearly sure is drafted, and verified in the same step (Flash-dLLM, arXiv
2609.26796; VILA-Lab/Flash-dLLM `generate_with_Flash_dLLM`).

All positions that reach `threshold` are written, and the surest in any case. The next surest, at
most a share of the block, are drafts. One more pass over both views of them, written and masked,
predicts each draft at its masked position with the drafts before it written
(`steering.verification`), and they are written up to the first that fails.

The paper accepts a draft that is the likeliest token there and has a probability of `gamma`
("each"). The authors' code multiplies: a draft is accepted as long as the product of the
probabilities up to its own reaches `gamma` ("product"). The default is that of the code. In it a
window of so many masked positions slides over the canvas; here it is the block. It also runs again
the positions that were most attended to, as its cache is stale there; here every step's own pass
has just computed them. At a temperature the drafts are samples, where the authors take the
likeliest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from boe_vllm.base.arrays import BoolArray
from boe_vllm.base.options import options
from boe_vllm.policies.base import Commit, Needs, Policy, PolicyConfig, View, top
from boe_vllm.steering.verification import Verification, Verified

if TYPE_CHECKING:
    from boe_vllm.policies.base import Asking


@options
class VerifyConfig(PolicyConfig):
    """Flash-Verify: the threshold rule, and drafts of the next surest, verified in one pass."""

    threshold: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Probability from which a token is written unverified."""
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Probability that a draft, or the product of the drafts, has to reach. Default: that of GSM8K
    and MBPP; 0.85 for MATH and HumanEval."""
    accept: Literal["product", "each"] = "product"
    """What has to reach it: the product over the drafts up to this one, as in the authors' code,
    or each draft, which must then also be the likeliest token, as in the paper."""
    drafts: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the block's masked positions that are drafts at most."""


class VerifyPolicy(Policy[VerifyConfig]):
    """A threshold with verified drafts; the number of steps adapts, the quota plays no part."""

    name = "verify"
    Config = VerifyConfig
    source = "Flash-dLLM (arXiv 2609.26796); VILA-Lab/Flash-dLLM `generate_with_Flash_dLLM`"
    passes = "1 forward, and 1 over two rows for each draft; the number of steps adapts"

    def needs(self) -> Needs:
        """What the partial pass needs of the step's own forward."""
        return Needs(rows="masked")

    def rows_ahead(self, *, masks: int, quota: int, length: int) -> int:
        """What is written once, and each draft twice, but for the last."""
        drafts = min(int(self.config.drafts * masks), masks - 1)
        return masks + drafts - 1 if drafts else 0

    def step(self, view: View) -> Asking:
        """Write what is sure, draft the next, write what is verified."""
        settings = self.config
        order = top(view.confidence, len(view.confidence))
        early = int(np.isfinite(view.confidence).sum())
        sure = max(1, int((view.confidence >= settings.threshold).sum()))
        most = int(settings.drafts * view.block_masks)
        written, drafted = order[:sure], order[sure : min(early, sure + most)]
        if len(drafted) == 0:
            return Commit(chosen=written, scores=view.confidence)
        verified: Verified = yield Verification(
            written=written,
            written_tokens=view.proposal[written],
            drafted=drafted,
            drafts=view.proposal[drafted],
        )
        accepted = np.logical_and.accumulate(self._passes(verified))
        return Commit(chosen=np.concatenate([written, drafted[accepted]]), scores=view.confidence)

    def _passes(self, verified: Verified) -> BoolArray:
        """[S] which drafts would be accepted, were those before them."""
        if self.config.accept == "product":
            return np.cumprod(verified.probability) >= self.config.gamma
        return (verified.probability >= self.config.gamma) & verified.agrees
