"""How a text under a grammar that is read from left to right can be brought to its end.

A canvas ends, so it has to be known how its text can end within the positions that are left. A
parser says which token may come next, and not how far the end is. Here few tokens are tried, first
those that close something. The shortest end may be missed.

Legend: `V` vocabulary.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from boe_vllm.base.arrays import BoolArray
from boe_vllm.sampling.prefix import PrefixMatcher

# Bytes that are tried, in the order of their kinds; where many may come next, as within a string,
# so many of each kind. What opens something has to be closed, and white space, which most grammars
# let stand or not, brings nothing nearer: they count as several tokens.
_KINDS: tuple[tuple[bytes, int], ...] = (
    (b"\"}])'>;", 3),
    (b",:", 2),
    (b"0123456789", 1),
    (b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", 1),
    (b".-+*/=|&!?_#%@~^\\`$", 2),
    (b"{[(<", 2),
    (b" \n\t\r", 1),
)
_FEW = 16
_DEAR = dict.fromkeys((b"{", b"[", b"(", b"<"), 2) | dict.fromkeys((b" ", b"\n", b"\t", b"\r"), 6)
_NEAR, _FAR = 64, 512  # tokens that are tried for a whole end, and for the next piece of one
_FIRST, _NEXT = 1 << 15, 1 << 9  # for the first end of a text, and after each token of it
_SUFFIXES = 3  # of the end that was known before, at which a new one may go on


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
        self._left = 0

    def find(
        self, matcher: PrefixMatcher, most: int, before: Sequence[int] | None = None
    ) -> tuple[int, ...] | None:
        """Tokens by which the text may end, the end of text left out; None if none were found.

        Args:
            matcher: where the text stands; it is left there.
            most: tokens that there is room for.
            before: an end that was known one token before, at which this one may go on; None for
                the first one, which may take longer.
        """
        self._left = _FIRST if before is None else _NEXT
        end = self._end(matcher, before or ())
        if end is None:
            found = self._search(matcher, most, _NEAR, before=before or ())
            if found is not None:
                end = found[0]
        if end is None or len(end) > most:
            end = self._piece_by_piece(matcher, most)
        return None if end is None else tuple(end)

    def _end(self, matcher: PrefixMatcher, before: Sequence[int]) -> Sequence[int] | None:
        """An end that is known without a search."""
        if matcher.accepting():
            return ()
        for first in range(min(len(before), _SUFFIXES)):
            own, rest = matcher.copy(), before[first:]
            if own.accept(*rest) and own.accepting():
                return rest
        return None

    def _piece_by_piece(self, matcher: PrefixMatcher, most: int) -> list[int] | None:
        """An end that is too long to be found at once: each choice is settled as soon as there is
        none in what comes next."""
        tokens: list[int] = []
        while not matcher.accepting():
            room = most - len(tokens)
            piece = self._search(matcher, room, _FAR) or self._search(
                matcher, room, _FAR, wide=True
            )
            if piece is None or len(piece[0]) > room:
                return None
            added, matcher = piece
            tokens += added
        return tokens

    def _search(
        self,
        matcher: PrefixMatcher,
        room: int,
        budget: int,
        *,
        before: Sequence[int] | None = None,
        wide: bool = False,
    ) -> tuple[list[int], PrefixMatcher] | None:
        """The cheapest way to an end, of those that are tried. What has no choice costs nothing.

        Args:
            matcher: where the text stands; it is left there.
            room: tokens that there is room for.
            budget: tokens that are tried.
            before: an end that was known before; None to go no further than to what has no choice.
            wide: try every byte that is allowed.
        """
        waiting: list[tuple[int, int, bool, list[int], PrefixMatcher]]
        waiting, tried = [(0, 0, False, [], matcher)], 0
        while waiting:
            cost, _, arrived, tokens, state = heapq.heappop(waiting)
            if arrived:
                self._left -= tried
                return tokens, state
            for rank, token in enumerate(self._candidates(state, wide)):
                if len(tokens) >= room or tried >= min(budget, self._left):
                    break
                tried += 1
                after = state.copy()
                if not after.accept(token):
                    continue
                dear = cost + 1 + rank + _DEAR.get(self.texts[token] or b"", 0)
                grown = [*tokens, token, *self._follow(after)]
                end = self._end(after, before or ())
                arrived = end is not None or (before is None and len(grown) > len(tokens) + 1)
                heapq.heappush(waiting, (dear, tried, arrived, [*grown, *(end or ())], after))
        self._left -= tried
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
