"""Grammars that are read from left to right, as the canvas needs them.

A context-free grammar has no finite automaton. A parser follows it: of a text so far it knows which
tokens may come next, and no more. Parsers are somebody else's (`vllm_plugin.prefix_grammars`); this
is what is asked of them.

A canvas ends, so it has to be known how a text can be brought to its end within the positions that
are left. `Completions` looks for a short end by trying few tokens, first those that close
something. It may miss the shortest one.

Legend: `V` vocabulary.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from boe_vllm.base.arrays import BoolArray

# Bytes that are tried, in the order of their kinds; where many may come next, as within a string,
# so many of each kind. White space, which most grammars let stand or not, counts as several tokens.
_KINDS: tuple[tuple[bytes, int], ...] = (
    (b"\"}])'>;", 3),
    (b",:", 2),
    (b"0123456789", 1),
    (b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", 1),
    (b".-+*/=|&!?_#%@~^\\`$", 2),
    (b"{[(<", 2),
    (b" \n\t\r", 1),
)
_BLANKS, _BLANK_COST = (b" ", b"\n", b"\t", b"\r"), 6
_FEW = 16
_STATES = 512  # that are tried on the way from one forced run of text to the next
_SUFFIXES = 3  # of the end that was known before, which are tried first


class PrefixMatcher(Protocol):
    """Where a text stands in a grammar. No method raises: a parser that gives up allows nothing."""

    def allowed(self) -> BoolArray:
        """[V] the tokens of text that may come next; the end of text is none of them."""

    def accepting(self) -> bool:
        """Whether the text may end here."""

    def forced(self) -> bytes:
        """What comes next whatever else; empty if there is a choice."""

    def accept(self, token: int) -> bool:
        """Go on by a token if it may come next, and say whether it may."""

    def back(self, count: int) -> None:
        """Take back the last tokens."""

    def copy(self) -> PrefixMatcher:
        """Another one at the same place."""


class PrefixMatchers(Protocol):
    """A parser of grammars, with the vocabulary that they are read with."""

    @property
    def texts(self) -> Sequence[bytes | None]:
        """[V] the bytes of each token; None for one that is no text."""

    def open(self, grammar: str) -> PrefixMatcher:
        """The beginning of a text.

        Raises:
            ValueError: for what is no grammar of this parser's.
        """


class Completions:
    """Looks for short ends of texts."""

    def __init__(self, texts: Sequence[bytes | None], never_V: BoolArray) -> None:
        """Sort the tokens of one byte by their kinds.

        Args:
            texts: [V] the bytes of each token.
            never_V: [V] tokens that may stand nowhere.
        """
        self.texts, self.never_V = texts, never_V
        single = {text: n for n, text in enumerate(texts) if text and len(text) == 1}
        found = [[single.get(bytes([byte])) for byte in kind] for kind, _ in _KINDS]
        self._kinds = [np.array([n for n in kind if n is not None], np.int64) for kind in found]

    def find(
        self, matcher: PrefixMatcher, most: int, before: Sequence[int] = ()
    ) -> tuple[int, ...] | None:
        """Tokens by which the text may end, the end of text left out; None if none were found.

        Args:
            matcher: where the text stands; it is left there.
            most: tokens that there is room for.
            before: an end that was found one token before.
        """
        for first in range(min(len(before), _SUFFIXES)):
            if len(before) - first <= most and self._ends(matcher, before[first:]):
                return tuple(before[first:])
        tokens: list[int] = []
        while len(tokens) <= most:
            if matcher.accepting():
                return tuple(tokens)
            room = most - len(tokens)
            stage = self._stage(matcher, room, wide=False) or self._stage(matcher, room, wide=True)
            if stage is None:
                return None
            added, matcher = stage
            tokens += added
        return None

    def _ends(self, matcher: PrefixMatcher, tokens: Sequence[int]) -> bool:
        own = matcher.copy()
        return all(own.accept(token) for token in tokens) and own.accepting()

    def _stage(
        self, matcher: PrefixMatcher, room: int, *, wide: bool
    ) -> tuple[list[int], PrefixMatcher] | None:
        """A way to an end or to the next text without a choice, by the likelier tokens first."""
        waiting: list[tuple[int, int, bool, list[int], PrefixMatcher]]
        waiting, tried = [(0, 0, False, [], matcher)], 0
        while waiting:
            cost, _, arrived, tokens, state = heapq.heappop(waiting)
            if arrived:
                return tokens, state
            for rank, token in enumerate(self._candidates(state, wide)):
                if len(tokens) >= room or tried >= _STATES:
                    break
                tried += 1
                after = state.copy()
                if not after.accept(token):
                    continue
                dear = cost + 1 + rank + _BLANK_COST * (self.texts[token] in _BLANKS)
                run = self._follow(after)
                arrived = bool(run) or after.accepting()
                heapq.heappush(waiting, (dear, tried, arrived, [*tokens, token, *run], after))
        return None

    def _candidates(self, state: PrefixMatcher, wide: bool) -> list[int]:
        allowed_V = state.allowed() & ~self.never_V
        kinds = [kind[allowed_V[kind]].tolist() for kind in self._kinds]
        if not wide and sum(map(len, kinds)) > _FEW:
            kinds = [kind[:most] for (_, most), kind in zip(_KINDS, kinds, strict=True)]
        found = [token for kind in kinds for token in kind]
        return found or np.flatnonzero(allowed_V)[:1].tolist()

    def _follow(self, state: PrefixMatcher) -> list[int]:
        """Write what has no choice, in the longest tokens; the state goes on by it."""
        run: list[int] = []
        while text := state.forced():
            fitting = [
                n
                for n in np.flatnonzero(state.allowed() & ~self.never_V).tolist()
                if text.startswith(self.texts[n] or b"\xff")
            ]
            token = max(fitting, key=lambda n: len(self.texts[n] or b""), default=None)
            if token is None or not state.accept(token):
                break
            run.append(token)
        return run
