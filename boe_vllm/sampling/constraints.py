"""What a request lets be written: edits of logits and filters of a draw; a pass's, by number.

Where each of them holds on a canvas is in `sampling.canvas_constraints`; the order of operations is
listed in `sampling.statistics`.

Legend: `R` logit rows, `r` those of one constraint, `V` vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import torch

from boe_vllm.base.arrays import BoolArray, FloatArray, IntArray
from boe_vllm.base.transfer import Arrival, Transfer, to_device
from boe_vllm.sampling.automaton import TokenAutomaton

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

    def permitted(self, vocab_size: int) -> BoolArray:
        """[V] the tokens that may be written."""
        allowed, permitted_V = self.allowed_token_ids, np.ones(vocab_size, bool)
        if allowed is not None:
            permitted_V[:] = False
            permitted_V[allowed] = True
        permitted_V[self.banned_token_ids] = False
        return permitted_V

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
    grammar: TokenAutomaton | None = None
    """What the whole output must be; no bad words of several tokens beside it."""
    prefix_grammar: str | None = None
    """The same, as text of a parser's, where it can only be read from left to right."""
    prefix_end: tuple[int, ...] | None = None
    """Tokens of a text that this grammar takes, without the end of text; None to look for one."""

    @property
    def any(self) -> bool:
        """Whether anything is constrained."""
        edits = self.everywhere.edits or self.everywhere.filters
        ordered = bool(self.bad_words) or self.grammar is not None
        ordered = ordered or self.prefix_grammar is not None
        return edits or self.min_tokens > 0 or ordered

    def tokens_left(self, vocab_size: int, mask_token_id: int) -> int:
        """Tokens left at the position with the fewest, before any bad word of several tokens."""
        left = self.everywhere.permitted(vocab_size)
        left[mask_token_id] = False
        if self.min_tokens:
            left[list(self.stop_token_ids)] = False
        return int(left.sum())

    def to_wire(self) -> dict[str, Any]:
        """The same as values that JSON and MessagePack know."""
        plain = dataclasses.asdict(dataclasses.replace(self, grammar=None))
        grammar = None if self.grammar is None else self.grammar.to_text()
        return _to_plain(plain) | {"grammar": grammar}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> TokenConstraints:
        """Read what `to_wire` wrote."""
        grammar, everywhere = wire["grammar"], dict(wire["everywhere"])
        for name, value in everywhere.items():
            if name.endswith("_token_ids") and value is not None:
                everywhere[name] = np.array(value, np.int64)
        everywhere["logit_bias"] = np.array(everywhere["logit_bias"], np.float64)
        return cls(
            everywhere=Constraint(**everywhere),
            min_tokens=wire["min_tokens"],
            stop_token_ids=tuple(wire["stop_token_ids"]),
            bad_words=tuple(tuple(word) for word in wire["bad_words"]),
            prefix_grammar=wire["prefix_grammar"],
            prefix_end=None if wire["prefix_end"] is None else tuple(wire["prefix_end"]),
            grammar=None if grammar is None else TokenAutomaton.from_text(grammar),
        )


def _to_plain(value: Any) -> Any:
    """Arrays and tuples as lists, at any depth."""
    if isinstance(value, dict):
        return {key: _to_plain(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return [_to_plain(part) for part in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


ConstrainedRows: TypeAlias = tuple[Constraint, Arrival]
"""A constraint with the rows that it holds for."""


class ConstraintTable:
    """The constraints of one pass by number, each once: 0 stands for none.

    A pass packs rows of many requests, so each row names its constraint by number.
    """

    def __init__(self) -> None:
        self.constraints: list[Constraint] = []  # which keeps them alive, and their ids their own
        self._numbers: dict[int, int] = {}

    def numbers(self, constraints: Sequence[Constraint] | None, count: int) -> IntArray:
        """[count] the numbers of some rows' constraints; all 0 for None."""
        if constraints is None:
            return np.zeros(count, np.int64)
        return np.array([self._number(constraint) for constraint in constraints], np.int64)

    def edits(self, constraint_R: IntArray, transfer: Transfer) -> list[ConstrainedRows]:
        """The constraints of some rows that change their logits."""
        return self._rows(constraint_R, transfer, lambda constraint: constraint.edits)

    def filters(self, constraint_R: IntArray, transfer: Transfer) -> list[ConstrainedRows]:
        """The constraints of some rows that restrict their draws."""
        return self._rows(constraint_R, transfer, lambda constraint: constraint.filters)

    def discounts(self, constraint_R: IntArray, transfer: Transfer) -> list[ConstrainedRows]:
        """The constraints of some rows that leave tokens out of their confidences."""
        return self._rows(constraint_R, transfer, lambda constraint: constraint.discounts)

    def _rows(
        self,
        constraint_R: IntArray,
        transfer: Transfer,
        wanted: Callable[[Constraint], bool],
    ) -> list[ConstrainedRows]:
        if not constraint_R.any():
            return []
        return [
            (constraint, transfer.add(np.flatnonzero(constraint_R == number)))
            for number in np.unique(constraint_R[constraint_R > 0]).tolist()
            if wanted(constraint := self.constraints[number - 1])
        ]

    def _number(self, constraint: Constraint) -> int:
        if id(constraint) not in self._numbers:
            self.constraints.append(constraint)
            self._numbers[id(constraint)] = len(self.constraints)
        return self._numbers[id(constraint)]
