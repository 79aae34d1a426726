"""What a request lets be written at a position, as edits of logits and filters of a sample.

A pass packs rows of many requests, so each row names its rule by number: 0 for none, `n` for the
`n`-th of the pass's rules.

Legend: `R` rows, `r` those of one rule, `V` vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from boe_vllm.base.arrays import FloatArray, IntArray

Tensor = torch.Tensor

NEVER = -1e30
"""The logit of what may not be written; finite, so that 0 * log 0 stays 0."""


def _no_tokens() -> IntArray:
    return np.empty(0, np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Constraint:
    """Edits of the logits, which every statistic sees, and filters, which only a sample sees."""

    allowed: IntArray | None = None
    """The only tokens that may be written; None for all."""
    banned: IntArray = dataclasses.field(default_factory=_no_tokens)
    """Tokens that may not be written, even if allowed."""
    biased: IntArray = dataclasses.field(default_factory=_no_tokens)
    """Tokens whose logits are changed."""
    bias: FloatArray = dataclasses.field(default_factory=lambda: np.empty(0))
    """By how much, in logits."""
    top_k: int = 0
    """A sample is one of the k most likely tokens; 0 for no limit."""
    top_p: float = 1.0
    """A sample is one of the fewest most likely tokens whose probability reaches this."""
    min_p: float = 0.0
    """A sample's probability is at least this share of the largest."""

    @property
    def edits(self) -> bool:
        """Whether logits change."""
        return self.allowed is not None or len(self.banned) > 0 or len(self.biased) > 0

    @property
    def filters(self) -> bool:
        """Whether samples are restricted."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def permits(self, token: int) -> bool:
        """Whether the token may be written."""
        listed = self.allowed is None or bool((self.allowed == token).any())
        return listed and not (self.banned == token).any()

    def edit(self, logits_RV: Tensor, rows_r: Tensor) -> None:
        """Edit some rows in place."""
        device = logits_RV.device
        logits = logits_RV[rows_r]
        if self.allowed is not None:
            allowed = torch.from_numpy(self.allowed).to(device)
            kept = torch.full_like(logits, NEVER)
            kept[:, allowed] = logits[:, allowed]
            logits = kept
        if len(self.biased):
            tokens = torch.from_numpy(self.biased).to(device)
            logits[:, tokens] += torch.from_numpy(self.bias).to(logits)
        if len(self.banned):
            logits[:, torch.from_numpy(self.banned).to(device)] = NEVER
        logits_RV[rows_r] = logits

    def filter(self, p_rV: Tensor) -> Tensor:
        """[r, V] the (tempered) probabilities with 0 for what a sample may not be.

        In vLLM's order: `min_p`, then `top_k`, then `top_p` of what is left; ties at the limit of
        `top_k` are kept.
        """
        if self.min_p > 0:
            p_rV = p_rV.where(p_rV >= self.min_p * p_rV.amax(-1, keepdim=True), 0.0)
        if 0 < self.top_k < p_rV.shape[-1]:
            p_rV = p_rV.where(p_rV >= p_rV.topk(self.top_k, dim=-1).values[:, -1:], 0.0)
        if self.top_p < 1:
            ordered, index = p_rV.sort(dim=-1, descending=True, stable=True)
            before = ordered.cumsum(-1) - ordered
            limit = self.top_p * ordered.sum(-1, keepdim=True)
            ordered = ordered.where(before < limit, 0.0)
            p_rV = torch.zeros_like(p_rV).scatter(-1, index, ordered)
        return p_rV


def rows_by_constraint(
    constraint_R: IntArray, table: Sequence[Constraint], device: torch.device
) -> Iterator[tuple[Constraint, Tensor]]:
    """Each rule that some rows have, with these rows."""
    for number in np.unique(constraint_R[constraint_R > 0]).tolist():
        yield table[number - 1], torch.from_numpy(np.flatnonzero(constraint_R == number)).to(device)
