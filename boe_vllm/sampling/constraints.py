"""What a request lets be written: edits of logits, filters of a draw, and where each of them holds.

vLLM's fields on a canvas that is written in any order: `logit_bias`, `allowed_token_ids` and
`bad_words` of one token hold at every masked position; `min_tokens` forbids the tokens that end a
request at the canvas positions below it; a bad word of several tokens forbids, at each position,
the token that would complete it there; `top_k`, `top_p` and `min_p` restrict draws.

The order of operations is listed in `sampling.statistics`.

Legend: `L` positions of prompt and canvas, `M` some masked positions, `R` logit rows, `r` those of
one constraint, `V` vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from weakref import WeakKeyDictionary

import numpy as np
import torch

from boe_vllm.base.arrays import BoolArray, FloatArray, IntArray
from boe_vllm.base.transfer import to_device

Tensor = torch.Tensor

NEVER = -1e30
"""The logit of what may not be written; finite, so that 0 * log 0 stays 0."""


def _no_tokens() -> IntArray:
    return np.empty(0, np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False, weakref_slot=True)
class Constraint:
    """Edits of the logits, which every statistic sees, and filters, which only a draw sees."""

    allowed_token_ids: IntArray | None = None
    """The only tokens that may be written; None for all."""
    banned_token_ids: IntArray = dataclasses.field(default_factory=_no_tokens)
    """Tokens that may not be written, even if allowed."""
    biased_token_ids: IntArray = dataclasses.field(default_factory=_no_tokens)
    """Tokens whose logits are changed."""
    logit_bias: FloatArray = dataclasses.field(default_factory=lambda: np.empty(0))
    """By how much, in logits, one entry for each of them."""
    top_k: int = 0
    """A draw is one of the k most likely tokens; 0 for no limit."""
    top_p: float = 1.0
    """A draw is one of the fewest most likely tokens whose probability reaches this."""
    min_p: float = 0.0
    """A draw's probability is at least this share of the largest."""
    discounted_token_ids: IntArray = dataclasses.field(default_factory=_no_tokens)
    """Tokens that are left out of the softmax behind the others' confidences."""

    @property
    def edits(self) -> bool:
        """Whether logits change."""
        listed = self.allowed_token_ids is not None
        return listed or len(self.banned_token_ids) > 0 or len(self.biased_token_ids) > 0

    @property
    def filters(self) -> bool:
        """Whether draws are restricted."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def discounts(self) -> bool:
        """Whether confidences are those of a softmax without some tokens."""
        return len(self.discounted_token_ids) > 0

    def permits(self, token: int) -> bool:
        """Whether the token may be written."""
        allowed = self.allowed_token_ids
        listed = allowed is None or bool((allowed == token).any())
        return listed and not (self.banned_token_ids == token).any()

    def banning(self, tokens: Iterable[int]) -> Constraint:
        """This constraint with some more tokens banned."""
        more = np.array(sorted(tokens), np.int64)
        if not len(more):
            return self
        banned = np.union1d(self.banned_token_ids, more)
        return dataclasses.replace(self, banned_token_ids=banned)

    def edit(self, logits_RV: Tensor, rows_r: Tensor) -> None:
        """Edit some rows in place."""
        tokens = _tokens_on(self, logits_RV.device)
        logits = logits_RV[rows_r]
        if tokens.allowed is not None:
            edited = torch.full_like(logits, NEVER)
            edited[:, tokens.allowed] = logits[:, tokens.allowed]
            logits = edited
        if len(tokens.biased):
            logits[:, tokens.biased] += tokens.bias.to(logits)
        if len(tokens.banned):
            logits[:, tokens.banned] = NEVER
        logits_RV[rows_r] = logits

    def discount(self, confidence_R: Tensor, logp_RV: Tensor, rows_r: Tensor) -> None:
        """Divide some rows' confidences in place by `1 - p` of all discounted tokens."""
        rest = 1 - logp_RV[rows_r][:, _tokens_on(self, logp_RV.device).discounted].exp().sum(-1)
        # A discounted token that is drawn may leave less than its own probability to the others.
        confidence_R[rows_r] = (confidence_R[rows_r] / rest.clamp_min(1e-12)).clamp_max(1.0)

    def filter(self, p_rV: Tensor) -> Tensor:
        """[r, V] the (tempered) probabilities with 0 for what a draw may not be.

        In vLLM's order: `min_p`, then `top_k`, then `top_p` of what is left; ties at the limit of
        `top_k` stay in.
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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Tokens:
    """A constraint's arrays on a device."""

    allowed: Tensor | None
    banned: Tensor
    biased: Tensor
    bias: Tensor
    discounted: Tensor


_ON_DEVICE: WeakKeyDictionary[Constraint, dict[torch.device, _Tokens]] = WeakKeyDictionary()
"""Constraints hold for many steps: their arrays stay on the device as long as they live."""


def _tokens_on(constraint: Constraint, device: torch.device) -> _Tokens:
    known = _ON_DEVICE.setdefault(constraint, {})
    if device not in known:
        lists = [constraint.banned_token_ids, constraint.biased_token_ids, constraint.logit_bias]
        lists.append(constraint.discounted_token_ids)
        allowed = constraint.allowed_token_ids
        banned, biased, bias, discounted, *rest = to_device(
            [*lists, *([] if allowed is None else [allowed])], device
        )
        known[device] = _Tokens(
            allowed=rest[0] if rest else None,
            banned=banned,
            biased=biased,
            bias=bias,
            discounted=discounted,
        )
    return known[device]


@functools.cache
def of_special_tokens(never: int | None, discounted: tuple[int, ...] = ()) -> Constraint:
    """Bans one token, or discounts some; the same object for every request."""
    banned = _no_tokens() if never is None else np.array([never])
    return Constraint(banned_token_ids=banned, discounted_token_ids=np.array(discounted, np.int64))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokenConstraints:
    """What one request says about its tokens, before any canvas."""

    everywhere: Constraint = dataclasses.field(default_factory=Constraint)
    """What holds at every position."""
    min_tokens: int = 0
    """Canvas positions at which no stop token may be written."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the request."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Sequences of two or more tokens that may not come about."""

    @property
    def any(self) -> bool:
        """Whether anything is constrained."""
        edits = self.everywhere.edits or self.everywhere.filters
        return edits or self.min_tokens > 0 or bool(self.bad_words)

    def tokens_left(self, vocab_size: int, mask_token_id: int) -> int:
        """Tokens left at the position with the fewest, before any bad word of several tokens."""
        left = np.ones(vocab_size, bool)
        if self.everywhere.allowed_token_ids is not None:
            left[:] = False
            left[self.everywhere.allowed_token_ids] = True
        left[self.everywhere.banned_token_ids] = False
        left[mask_token_id] = False
        if self.min_tokens:
            left[list(self.stop_token_ids)] = False
        return int(left.sum())


class CanvasConstraints:
    """The constraints of one request at the positions of its canvas."""

    def __init__(
        self,
        constraints: TokenConstraints,
        prompt_len: int,
        *,
        never: int | None = None,
        discounted: tuple[int, ...] = (),
    ) -> None:
        """Work out what follows from the request's constraints.

        Args:
            constraints: the request's.
            prompt_len: where its canvas begins.
            never: a token that is banned everywhere.
            discounted: tokens that are left out of the others' confidences.
        """
        self.bad_words = tuple(np.array(word) for word in constraints.bad_words)
        self.any = constraints.any or never is not None or bool(discounted)
        self.always = constraints.everywhere
        if never is not None:
            self.always = self.always.banning([never])
        if discounted:
            ids = np.array(discounted)
            self.always = dataclasses.replace(self.always, discounted_token_ids=ids)
        if not constraints.any:
            self.always = of_special_tokens(never, discounted)
        self.early = self.always.banning(constraints.stop_token_ids)
        self.early_positions = range(prompt_len, prompt_len + constraints.min_tokens)

    @property
    def depends_on_tokens(self) -> bool:
        """Whether a write changes the constraints of other positions."""
        return bool(self.bad_words)

    def at(
        self, tokens: IntArray, masked: BoolArray, positions: IntArray
    ) -> list[Constraint] | None:
        """[M] the constraint at each of some positions; None if none holds anywhere.

        Args:
            tokens: [L] of the sequence.
            masked: [L] what is still to be written.
            positions: [M] which are asked about.
        """
        if not self.any:
            return None
        completing = self._completing(tokens, masked)
        found = []
        for position in positions.tolist():
            constraint = self.early if position in self.early_positions else self.always
            if position in completing:
                constraint = constraint.banning(completing[position])
            found.append(constraint)
        return found

    def standing(
        self, tokens: IntArray, masked: BoolArray, positions: IntArray, writes: IntArray
    ) -> BoolArray:
        """[b] which writes of one step stand, in their order, so that none completes a bad word
        together with those before it. The constraints see to it that the first one stands.

        Raises:
            ValueError: for a write that is forbidden, which happens where nothing is permitted.
        """
        stand = np.ones(len(positions), bool)
        constraints = self.at(tokens, masked, positions)
        if constraints is None:
            return stand
        for position, token, constraint in zip(positions, writes, constraints, strict=True):
            if not constraint.permits(int(token)):
                raise ValueError(
                    f"position {position}: expected a token that may be written, found none; "
                    f"loosen allowed_token_ids, bad_words or min_tokens"
                )
        if not self.bad_words:
            return stand
        tokens, masked = tokens.copy(), masked.copy()
        for n, (position, token) in enumerate(zip(positions, writes, strict=True)):
            if int(token) in self._completing(tokens, masked).get(int(position), ()):
                stand[n] = False
                continue
            tokens[position], masked[position] = token, False
        return stand

    def _completing(self, tokens: IntArray, masked: BoolArray) -> dict[int, set[int]]:
        """Tokens that would complete a bad word, by masked position."""
        found: dict[int, set[int]] = {}
        for word in self.bad_words:
            windows = len(tokens) - len(word) + 1
            if windows < 1:
                continue
            places = np.arange(windows)[:, None] + np.arange(len(word))
            differs = masked[places] | (tokens[places] != word)
            for start in np.flatnonzero(differs.sum(-1) == 1).tolist():
                offset = int(differs[start].argmax())
                if masked[start + offset]:
                    found.setdefault(start + offset, set()).add(int(word[offset]))
        return found
