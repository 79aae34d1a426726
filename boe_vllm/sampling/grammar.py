"""What a grammar lets be written on a canvas that is filled in any order.

The tokens that stand on the canvas, and the masks between them, leave a set of states in which the
grammar's automaton can be before each position (from the left) and a set from which it can still
come to an end at the end of the canvas (from the right). A token may be written at a position if it
leads from the one into the other: then, and only then, some way to write the rest satisfies the
grammar. This is exact at every masked position, whatever order they are written in.

Legend: `n` positions of the canvas, `T` states, `C` classes of tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from boe_vllm.base.arrays import BoolArray, IntArray
from boe_vllm.sampling.automaton import END, TokenAutomaton
from boe_vllm.sampling.constraints import Constraint

_MASKED = -1
_AFTER = -2  # a mask behind the last token that is sent, where only the end of text may stand


class CanvasGrammar:
    """The automaton's possible states at every position of one canvas.

    Sets of states are numbered as they come up, so that a step that was made once is looked up.
    """

    def __init__(
        self, automaton: TokenAutomaton, *, length: int, end: int, early: int, ends: Sequence[int]
    ) -> None:
        """Of an empty canvas.

        Args:
            automaton: of the grammar, over tokens.
            length: positions of the canvas, n.
            end: positions at its beginning that are sent, in which the text must end.
            early: positions at its beginning where no token that ends the request may stand.
            ends: these tokens.
        """
        self.length, self.end, self.early = length, end, early
        banned = np.isin(np.arange(len(automaton.class_of_V)), list(ends))
        self._late = automaton
        self._early = automaton.without(banned) if early else automaton
        self._edges = {id(a): a.edges() for a in (self._early, self._late)}
        self._sets: list[BoolArray] = []
        self._number: dict[bytes, int] = {}
        self._steps: dict[tuple[int, int, bool, bool], int] = {}
        self._found: dict[tuple[int, int, bool], BoolArray] = {}
        self._constraints: dict[tuple[int, bytes, bool], Constraint] = {}
        start = np.zeros(len(automaton.next_TC), bool)
        start[automaton.start] = True
        self._codes = np.full(length, _MASKED)
        self._codes[end:] = _AFTER
        self._left = [self._intern(start)] * (length + 1)
        self._right = [self._intern(automaton.accepting_T)] * (length + 1)
        self._follow(0, length - 1)

    # ---- the sets ------------------------------------------------------------------------------

    def update(self, tokens_n: IntArray, masked_n: BoolArray) -> None:
        """Take in what stands on the canvas."""
        codes = np.where(masked_n, _MASKED, tokens_n)
        codes[self.end :][masked_n[self.end :]] = _AFTER
        changed = np.flatnonzero(codes != self._codes)
        if len(changed):
            self._codes = codes
            self._follow(int(changed[0]), int(changed[-1]))

    def _follow(self, first: int, last: int) -> None:
        """Work out the sets again that a change between two positions may have changed."""
        codes = self._codes.tolist()
        for n in range(first, self.length):
            found = self._step(self._left[n], codes[n], n, forward=True)
            if n >= last and found == self._left[n + 1]:
                break
            self._left[n + 1] = found
        for n in range(last, -1, -1):
            found = self._step(self._right[n + 1], codes[n], n, forward=False)
            if n <= first and found == self._right[n]:
                break
            self._right[n] = found

    def _step(self, number: int, code: int, n: int, *, forward: bool) -> int:
        early = n < self.early
        key = (number, code, early, forward)
        if key not in self._steps:
            automaton, states = self._automaton(n), self._sets[number]
            found = np.zeros(len(states), bool)
            if code == _MASKED:
                source, target = self._edges[id(automaton)]
                if forward:
                    found[target[states[source]]] = True
                else:
                    found[source[states[target]]] = True
            else:
                kind = END if code == _AFTER else automaton.class_of_V[code]
                led = automaton.next_TC[:, kind]
                if forward:
                    found[led[states]] = True
                else:
                    found = states[led]
            found[automaton.dead] = False
            self._steps[key] = self._intern(found)
        return self._steps[key]

    def _intern(self, states: BoolArray) -> int:
        name = np.packbits(states).tobytes()
        if name not in self._number:
            self._number[name] = len(self._sets)
            self._sets.append(states.copy())
        return self._number[name]

    def _automaton(self, n: int) -> TokenAutomaton:
        return self._early if n < self.early else self._late

    # ---- what they say -------------------------------------------------------------------------

    @property
    def possible(self) -> bool:
        """Whether some way to write the masks satisfies the grammar."""
        return bool(self._sets[self._right[0]][self._late.start])

    def permits(self, n: int, token: int) -> bool:
        """Whether a token may stand at a position, beside what stands at all others."""
        return bool(self._classes(n)[self._automaton(n).class_of_V[token]])

    def constraint(self, n: int, base: Constraint) -> Constraint:
        """What may be written at a position; the same object for the same tokens. Where writes that
        exclude each other are supposed nothing may be, and the grammar says nothing.

        Args:
            n: the position.
            base: what else holds there.
        """
        classes, early = self._classes(n), n < self.early
        key = (id(base), classes.tobytes(), early)
        if key not in self._constraints:
            tokens = np.flatnonzero(classes[self._automaton(n).class_of_V])
            found = dataclasses.replace(base, allowed_token_ids=tokens) if len(tokens) else base
            self._constraints[key] = found
        return self._constraints[key]

    def certain(self) -> dict[int, int]:
        """Tokens of the masked positions where only one may stand."""
        found: dict[int, int] = {}
        for n in np.flatnonzero(self._codes < 0).tolist():
            classes = self._classes(n)
            if classes.sum() != 1:
                continue
            tokens = np.flatnonzero(classes[self._automaton(n).class_of_V])
            if len(tokens) == 1:
                found[n] = int(tokens[0])
        return found

    def _classes(self, n: int) -> BoolArray:
        """[C] classes of tokens that may stand at a position."""
        left, right = self._left[n], self._right[n + 1]
        key = (left, right, n < self.early)
        if self._codes[n] == _AFTER:
            return self._only_the_end()
        if key not in self._found:
            led = self._automaton(n).next_TC[self._sets[left]]
            self._found[key] = np.asarray(self._sets[right][led].any(0))
        return self._found[key]

    def _only_the_end(self) -> BoolArray:
        classes = np.zeros(self._late.next_TC.shape[1], bool)
        classes[END] = True
        return classes
