"""What a request token_constraints of every token: vLLM's fields on a canvas that is written in any order.

`logit_bias`, `allowed_token_ids` and `bad_words` of one token hold at every masked position,
`min_tokens` forbids the tokens that end a request at the canvas positions below it, and a bad word
of several tokens forbids, at each position, the token that would complete it there.

Legend: `L` positions of prompt and canvas, `M` masked positions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import numpy as np

from boe_vllm.base.arrays import BoolArray, IntArray
from boe_vllm.sampling.constraints import Constraint


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokenConstraints:
    """The token_constraints of one request, in tokens."""

    rule: Constraint = dataclasses.field(default_factory=Constraint)
    """What holds at every position."""
    min_tokens: int = 0
    """Canvas positions at which no stop token may be written."""
    stop_tokens: tuple[int, ...] = ()
    """Tokens that end the request."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Sequences of two or more tokens that may not come about."""

    @property
    def any(self) -> bool:
        """Whether anything is demanded."""
        return self.rule.edits or self.rule.filters or self.min_tokens > 0 or bool(self.bad_words)

    def candidates(self, vocab_size: int, mask_token_id: int) -> int:
        """Tokens left at the position with the fewest, before any bad word of several tokens."""
        left = np.ones(vocab_size, bool)
        if self.rule.allowed is not None:
            left[:] = False
            left[self.rule.allowed] = True
        left[self.rule.banned] = False
        left[mask_token_id] = False
        if self.min_tokens:
            left[list(self.stop_tokens)] = False
        return int(left.sum())


class CanvasConstraints:
    """The token_constraints of one request at the positions of its canvas."""

    def __init__(
        self, token_constraints: TokenConstraints, prompt_len: int, *, never: int | None = None
    ) -> None:
        """The rules that follow.

        Args:
            token_constraints: the request's.
            prompt_len: where its canvas begins.
            never: a token that is banned everywhere.
        """
        self.bad_words = tuple(np.array(word) for word in token_constraints.bad_words)
        self.any = token_constraints.any or never is not None
        self.always = token_constraints.rule
        if never is not None:
            self.always = (
                _banning(token_constraints.rule, [never])
                if token_constraints.any
                else without_token(never)
            )
        self.early = _banning(self.always, token_constraints.stop_tokens)
        self.early_positions = range(prompt_len, prompt_len + token_constraints.min_tokens)

    @property
    def depends_on_tokens(self) -> bool:
        """Whether a write changes the rules of other positions."""
        return bool(self.bad_words)

    def at(
        self, tokens: IntArray, masked: BoolArray, positions: IntArray
    ) -> list[Constraint | None]:
        """[M] what may be written at each of some masked positions; None for everything.

        Args:
            tokens: [L] token ids, those of the canvas or of a state that is supposed.
            masked: [L] which of them are masked.
            positions: [M] of them.
        """
        if not self.any:
            return [None] * len(positions)
        return list(self._rules(tokens, masked, positions))

    def _rules(self, tokens: IntArray, masked: BoolArray, positions: IntArray) -> list[Constraint]:
        completing = self._completing(tokens, masked)
        rules = []
        for position in positions.tolist():
            rule = self.early if position in self.early_positions else self.always
            if position in completing:
                rule = _banning(rule, completing[position])
            rules.append(rule)
        return rules

    def standing(
        self, tokens: IntArray, masked: BoolArray, positions: IntArray, writes: IntArray
    ) -> BoolArray:
        """[b] which writes of one step stand, in their order, so that none completes a bad word
        together with those before it. The rules see to it that the first one stands.

        Raises:
            ValueError: for a write that the rules forbid, which happens where they permit none.
        """
        rules = self._rules(tokens, masked, positions)
        for position, token, rule in zip(positions, writes, rules, strict=True):
            if not rule.permits(int(token)):
                raise ValueError(
                    f"position {position}: expected a token that may be written, found none; "
                    f"loosen allowed_token_ids, bad_words or min_tokens"
                )
        keep = np.ones(len(positions), bool)
        if not self.bad_words:
            return keep
        tokens, masked = tokens.copy(), masked.copy()
        for n, (position, token) in enumerate(zip(positions, writes, strict=True)):
            if int(token) in self._completing(tokens, masked).get(int(position), ()):
                keep[n] = False
                continue
            tokens[position], masked[position] = token, False
        return keep

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


class ConstraintTable:
    """The rules of one pass by number, each once: 0 stands for none."""

    def __init__(self) -> None:
        self.rules: list[Constraint] = []
        self._numbers: dict[int, int] = {}

    def numbers(self, constraints: Sequence[Constraint | None]) -> IntArray:
        """[M] the number of each constraint."""
        return np.array([0 if c is None else self._number(c) for c in constraints], np.int64)

    def _number(self, rule: Constraint) -> int:
        if id(rule) not in self._numbers:
            self.rules.append(rule)  # which keeps it alive, and its id its own
            self._numbers[id(rule)] = len(self.rules)
        return self._numbers[id(rule)]


@functools.cache
def without_token(token: int) -> Constraint:
    """The rule that bans one token; the same object for every request."""
    return Constraint(banned=np.array([token]))


def _banning(rule: Constraint, tokens: Iterable[int]) -> Constraint:
    """The rule with some more tokens banned."""
    more = np.array(sorted(tokens), np.int64)
    if not len(more):
        return rule
    return dataclasses.replace(rule, banned=np.union1d(rule.banned, more))
