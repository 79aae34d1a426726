"""Backward-on-Entropy without any of our shortcuts: two dense forwards and autograd.

The naive step: predict, write the candidates' expected embeddings into the state (A.3.1 of the
paper), predict again, and differentiate the masked entropy through the whole network, all rows.
Only the output head is spared the rows that are not masked, in all three passes, so that the ratio
to a plain step shows the network and not a waste in the vocabulary. It computes what our engine
does for `surrogate="inject", context="exact", active="all"`.

Legend: `R` requests of equal length, `L` positions, `M` masked positions (equally many for each
request), `C` candidates, `D` width, `V` vocabulary.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from boe_vllm.lab.bench.baseline import GRID, PlainLLaDA

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class DenseStep:
    """What one step commits, one token per request."""

    positions: list[int]
    tokens: list[int]
    scores: list[float]
    """Score of the committed position; NaN where it was taken by confidence."""


def dense_boe_step(
    network: PlainLLaDA, tokens_RL: Tensor, masked_RM: Tensor, *, rho: float
) -> DenseStep:
    """One token per request by gated importance (eq. 14, 15).

    Args:
        network: the model, dense.
        tokens_RL: the state.
        masked_RM: masked positions of every request, ascending.
        rho: share of the masked positions that are candidates.
    """
    rows = torch.arange(len(tokens_RL), device=tokens_RL.device)[:, None]
    count = math.ceil(rho * masked_RM.shape[1])
    with torch.no_grad():
        x_RLD = network.embed(tokens_RL)
        logp_RMV = _log_probs(network, network.hidden(x_RLD)[rows, masked_RM])
        confidence_RM, proposal_RM = logp_RMV.max(-1)
        confidence_RM = confidence_RM.exp()
        candidates_RC = _best(confidence_RM, count).sort(-1).values
        if count == 1:  # nothing to choose
            chosen = candidates_RC
            scores = torch.full_like(confidence_RM[:, :1], math.nan)
            return _commit(masked_RM, proposal_RM, chosen, scores)
        entropy_RM = -(logp_RMV.exp() * logp_RMV).sum(-1)
        soft_RCD = (
            logp_RMV[rows, candidates_RC].exp().to(x_RLD)
            @ network.weights["wte"][: logp_RMV.shape[-1]]
        )
        places_RC = masked_RM.gather(1, candidates_RC)
        mask = torch.tensor(network.config.mask_token_id, device=tokens_RL.device)
        change_RCD = soft_RCD - network.embed(mask)
        x_RLD[rows, places_RC] = soft_RCD
    x_RLD.requires_grad_()
    logp_RMV = _log_probs(network, network.hidden(x_RLD)[rows, masked_RM])
    objective = -(logp_RMV.exp() * logp_RMV).sum()
    (gradient_RLD,) = torch.autograd.grad(objective, x_RLD)
    importance_RC = -(gradient_RLD[rows, places_RC] * change_RCD).sum(-1)
    gate_RM = (1.0 - entropy_RM / math.log(network.config.vocab_size)).clamp(0.0, 1.0)
    scores_RC = importance_RC * gate_RM.gather(1, candidates_RC)
    best_R1 = _best(scores_RC, 1)
    chosen = candidates_RC.gather(1, best_R1)
    return _commit(masked_RM, proposal_RM, chosen, scores_RC.gather(1, best_R1))


def _log_probs(network: PlainLLaDA, hidden: Tensor) -> Tensor:
    """Log-probabilities without the mask token; finite, so that 0 * log 0 stays 0."""
    logits = network.logits(hidden)
    banned = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    banned[network.config.mask_token_id] = True
    return logits.masked_fill(banned, -1e30).log_softmax(-1)


def _best(scores: Tensor, count: int) -> Tensor:
    """Places of the largest, compared on our engine's grid, ties to the lower place."""
    on_grid = (scores.double() / GRID).round()
    return on_grid.argsort(dim=-1, descending=True, stable=True)[:, :count]


def _commit(masked_RM: Tensor, proposal_RM: Tensor, chosen_R1: Tensor, scores: Tensor) -> DenseStep:
    return DenseStep(
        positions=masked_RM.gather(1, chosen_R1)[:, 0].tolist(),
        tokens=proposal_RM.gather(1, chosen_R1)[:, 0].tolist(),
        scores=scores[:, 0].tolist(),
    )
