"""What a grammar without a finite automaton lets be written: the canvas from left to right.

Only the frontier may be written: the masked positions next to the written beginning of the canvas,
one after the other, as far as each token is one that the parser allows after those before it. With
every token an end of the text is found that fits into the rest of the canvas (`Completions`), and a
token after which none is found is not written. So the text always ends in time: where nothing else
fits, the end that is known is written.

Legend: `n` positions of the canvas, `V` vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from boe_vllm.base.arrays import BoolArray, IntArray
from boe_vllm.sampling.completions import Completions
from boe_vllm.sampling.constraints import Constraint
from boe_vllm.sampling.prefix import PrefixMatcher, PrefixMatchers

_NOTHING: tuple[int, ...] = ()
_MOST_KNOWN = 256  # ends that are remembered


class FrontierGrammar:
    """A parser that stands at the frontier of one canvas."""

    def __init__(
        self,
        matchers: PrefixMatchers,
        grammar: str,
        *,
        length: int,
        end: int,
        eos_token_id: int,
        never_V: BoolArray,
        known: Sequence[int] | None = None,
    ) -> None:
        """Of an empty canvas.

        Args:
            matchers: the parser.
            grammar: as text of the parser's.
            length: positions of the canvas.
            end: positions at its beginning that are sent, in which the text must end.
            eos_token_id: ends a text, and fills what is behind it.
            never_V: [V] tokens that may stand nowhere.
            known: a text that the grammar takes, in at most `end` tokens; None to look for one.

        Raises:
            ValueError: for what is no grammar.
        """
        self.length, self.end, self.eos, self.never_V = length, end, eos_token_id, never_V
        self._matcher: PrefixMatcher = matchers.open(grammar)
        self._completions = Completions(matchers.texts, never_V)
        self._taken: list[int] = []  # the written beginning of the canvas
        first = self._completions.find(self._matcher, end) if known is None else tuple(known)
        self._ends = [first]
        self._rests: dict[tuple[int, ...], tuple[int, ...] | None] = {}
        self._whole = True  # nothing of the written beginning contradicts the grammar
        self._constraints: dict[tuple[int, bytes], Constraint] = {}

    @property
    def possible(self) -> bool:
        """Whether a text is known that fits."""
        return self._ends[0] is not None

    @property
    def frontier(self) -> int:
        """The first position that is not written."""
        return len(self._taken)

    def update(self, tokens_n: IntArray, masked_n: BoolArray) -> None:
        """Take in what stands on the canvas."""
        first = int(masked_n.argmax()) if masked_n.any() else self.length
        written = tokens_n[:first].tolist()
        same = 0
        while same < min(first, len(self._taken)) and written[same] == self._taken[same]:
            same += 1
        self._back(len(self._taken) - same)
        self._whole = all(self.take(token) for token in written[same:])

    def take(self, token: int) -> bool:
        """Write a token at the frontier if it may stand there, and say whether it may."""
        if token == self.eos:
            stands, rest = self._ended or self._matcher.accepting(), _NOTHING
        else:
            stands, rest = self._take_text(token)
        if stands:
            self._taken.append(token)
            self._ends.append(rest)
        return stands

    def _take_text(self, token: int) -> tuple[bool, tuple[int, ...]]:
        room = self.end - self.frontier - 1
        if self._ended or room < 0 or self.never_V[token] or not self._matcher.accept(token):
            return False, ()
        before = self._ends[-1] or ()
        if before and before[0] == token:
            return True, before[1:]
        rest = self._rest(token, room, before)
        if rest is None:
            self._matcher.back(1)
            return False, ()
        return True, rest

    def _rest(self, token: int, room: int, before: tuple[int, ...]) -> tuple[int, ...] | None:
        """The end after a token that the parser has just taken; a step asks for it repeatedly."""
        text = (*self._taken, token)
        if text not in self._rests:
            if len(self._rests) >= _MOST_KNOWN:
                self._rests.clear()
            self._rests[text] = self._completions.find(self._matcher, room, before)
        return self._rests[text]

    @property
    def _ended(self) -> bool:
        return bool(self._taken) and self._taken[-1] == self.eos

    def _back(self, count: int) -> None:
        if count:
            self._matcher.back(sum(token != self.eos for token in self._taken[-count:]))
            del self._taken[-count:], self._ends[-count:]

    # ---- what it says --------------------------------------------------------------------------

    @property
    def sure(self) -> int:
        """A token that may stand at the frontier, whatever is proposed: the next one of the end
        that is known."""
        rest = self._ends[-1]
        return rest[0] if rest else self.eos

    def permits(self, n: int, token: int) -> bool:
        """Whether a token may stand at a position now."""
        stands = self._whole and n == self.frontier and self.take(token)
        if stands:
            self._back(1)
        return stands

    def constraint(self, n: int, base: Constraint) -> Constraint:
        """What may be written at a position; beyond the frontier nothing is known yet.

        Args:
            n: the position.
            base: what else holds there.
        """
        if n != self.frontier or not self._whole:
            return base
        allowed = self._allowed()
        key = (id(base), allowed.tobytes())
        if key not in self._constraints:
            found = dataclasses.replace(base, allowed_token_ids=allowed) if len(allowed) else base
            self._constraints = {key: found}
        return self._constraints[key]

    def certain(self) -> dict[int, int]:
        """Tokens of the positions from the frontier on where only one may stand. The parser goes on
        by them, until the canvas is taken in again."""
        found: dict[int, int] = {}
        while self._whole and self.frontier < self.length:
            allowed = self._allowed()
            if len(allowed) != 1 or not self.take(int(allowed[0])):
                break
            found[self.frontier - 1] = int(allowed[0])
        return found

    def _allowed(self) -> IntArray:
        """Tokens that may stand at the frontier. Where the end that is known fills the canvas, only
        its next token may."""
        rest: Sequence[int] = self._ends[-1] or ()
        room = self.end - self.frontier
        if self._ended or room <= 0:
            return np.array([self.eos])
        if rest and len(rest) >= room:
            return np.array([rest[0]])
        allowed_V = self._matcher.allowed() & ~self.never_V
        allowed_V[self.eos] = self._matcher.accepting()
        return np.flatnonzero(allowed_V)
