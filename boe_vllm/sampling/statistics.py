"""From hidden states to what policies see: statistics of the logit rows, tile by tile.

The order of operations from hidden states to the token that is proposed:

1. Logits, one product with the vocabulary; the conditional and the unconditional hidden states of a
   guided sequence have been combined before (`steering.guidance`).
2. The mask token is ruled out.
3. `allowed_token_ids`, then `logit_bias`, then banned tokens (`bad_words`, `min_tokens`,
   `logits_eos_inf`) edit the logits (`sampling.constraints`).
4. Softmax: entropy, confidence and margin of every row are taken here, without temperature.
5. At temperature 0 the argmax is proposed. Above it, `softmax(logits / temperature)` is filtered by
   `min_p`, `top_k` and `top_p`, and one random number per row draws by inversion.
6. Where the request asks for it (`confidence_eos_eot_inf`), the confidences of all tokens but the
   late ones are those of a softmax without them, and those of late tokens become -inf (in the view
   that a policy gets). `eos_eot_last` does the latter alone.

Legend: `R` logit rows, `r` rows of one tile, `V` vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from boe_vllm.base.arrays import BoolArray, FloatArray, IntArray
from boe_vllm.base.transfer import Transfer
from boe_vllm.sampling.log_probs import LogProbabilities

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RowWrites:
    """How each logit row's token is to be proposed (host arrays)."""

    temperature: FloatArray
    """[R] 0 takes the argmax, otherwise a sample from softmax(logits / temperature)."""
    uniform: FloatArray
    """[R] the random number in (0, 1) behind the sample; NaN where none is drawn."""
    top_logprobs: int = 0
    """Most likely tokens to report per row."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RowStatistics:
    """Statistics of the logit rows on the host; entropies in nats."""

    proposal: IntArray
    """[R] token that would be written; never the mask token."""
    confidence: FloatArray
    """[R] untempered probability of the proposal, without discounted tokens where there are any."""
    margin: FloatArray
    """[R] largest less second largest probability."""
    entropy: FloatArray
    """[R] entropy."""
    finite: BoolArray
    """[R] whether the logits were finite."""
    rank: IntArray
    """[R] rank of the proposal among all tokens, 1 is the most likely; 0 if not asked for."""
    top_tokens: IntArray | None
    """[R, k] most likely tokens, if asked for."""
    top_logprobs: FloatArray | None
    """[R, k] their log-probabilities, nats."""

    def part(self, rows: slice) -> RowStatistics:
        """The statistics of some of the rows."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        cut: dict[str, Any] = {n: None if v is None else v[rows] for n, v in values.items()}
        return RowStatistics(**cut)


def read_statistics(
    log_probs: LogProbabilities, writes: RowWrites, *, keep: bool = False
) -> RowStatistics:
    """Statistics of all logit rows, with one transfer to the host.

    Args:
        log_probs: of the pass.
        writes: how tokens are proposed.
        keep: retain the log-probabilities for a later pass over some rows.
    """
    k = writes.top_logprobs
    transfer = Transfer(log_probs.device)
    spans = log_probs.spans(len(log_probs.hidden_RD))
    draws = [_Draws(writes, rows, log_probs, transfer) for rows in spans]
    numbers, constraints = log_probs.constraint_R, log_probs.table
    discounts = [
        [] if constraints is None else constraints.discounts(numbers[rows], transfer)
        for rows in spans
    ]
    columns = []
    summaries = log_probs.summaries(keep, transfer)
    for draw, discounted, (_, logp, found) in zip(draws, discounts, summaries, strict=True):
        proposal = draw.propose(logp, found.argmax)
        chosen = logp.gather(-1, proposal[:, None])
        probability = chosen[:, 0].double().exp()
        for constraint, own in discounted:
            constraint.discount(probability, logp, own.tensor)
        rank = (logp > chosen).sum(-1) + 1 if k else torch.zeros_like(proposal)
        rows = [
            proposal.double(),
            probability,
            found.best.double().exp() - found.second.double().exp(),
            found.entropy.double(),
            torch.isfinite(found.entropy).double(),
            rank.double(),
        ]
        if k:
            values, tokens = logp.topk(k, dim=-1)
            rows += [*tokens.double().unbind(1), *values.double().unbind(1)]
        columns.append(torch.stack(rows))
    table = torch.cat(columns, dim=1).cpu().numpy() if columns else np.zeros((6 + 2 * k, 0))
    confidence, margin, entropy = on_grid(table[1:4], log_probs.score_grid)
    tops = table[6:].reshape(2, k, table.shape[1]).transpose(0, 2, 1)
    return RowStatistics(
        proposal=table[0].astype(np.int64),
        confidence=confidence,
        margin=margin,
        entropy=entropy,
        finite=table[4] > 0,
        rank=table[5].astype(np.int64),
        top_tokens=tops[0].astype(np.int64) if k else None,
        top_logprobs=tops[1] if k else None,
    )


def on_grid(values: FloatArray, grid: float | None) -> FloatArray:
    """The values as multiples of `grid`, so that rounding noise below it decides nothing."""
    return values if grid is None else np.round(values / grid) * grid


class _Draws:
    """What the samples of one tile need, on its way to the device."""

    def __init__(
        self, writes: RowWrites, tile: slice, log_probs: LogProbabilities, transfer: Transfer
    ) -> None:
        temperature = writes.temperature[tile]
        sampled = np.flatnonzero(temperature > 0)
        self.any = len(sampled) > 0
        if not self.any:
            return
        self.rows = transfer.add(sampled)
        self.temperature = transfer.add(temperature[sampled])
        self.uniform = transfer.add(writes.uniform[tile][sampled])
        numbers, table = log_probs.constraint_R[tile][sampled], log_probs.table
        self.filters = [] if table is None else table.filters(numbers, transfer)

    def propose(self, logp_rV: Tensor, argmax_r: Tensor) -> Tensor:
        """[r] argmax, or a sample by inversion of the tempered distribution where temperature > 0.

        One random number per row is enough, and the same number gives the same token in any batch.
        """
        if not self.any:
            return argmax_r
        rows = self.rows.tensor
        p = torch.softmax(logp_rV[rows].double() / self.temperature.tensor[:, None], -1)
        for constraint, filtered in self.filters:
            p[filtered.tensor] = constraint.filter(p[filtered.tensor])
        weights = p.cumsum(-1)
        places = (self.uniform.tensor * weights[:, -1])[:, None]
        tokens = torch.searchsorted(weights, places, right=True)[:, 0]
        proposal = argmax_r.clone()
        proposal[rows] = tokens.clamp_(max=logp_rV.shape[-1] - 1)
        return proposal
