"""Finite automata: of a grammar over bytes, and the same over the tokens of a vocabulary.

A grammar's automaton reads bytes. A token is a string of bytes, so that it takes the automaton from
a state to a state, or nowhere. Tokens that do the same in every state are of one class, and there
are few classes: what may be written somewhere is decided class by class, and not token by token.

The end of text belongs to the automaton over tokens: it may follow whatever the grammar accepts,
and nothing else may follow it.

Legend: `S` states of bytes, `T` states of tokens, `C` classes, `V` vocabulary, `N` nodes of a tree
of the tokens' beginnings, `r` some states.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
import zlib
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from boe_vllm.base.arrays import BoolArray, IntArray

SignArray: TypeAlias = npt.NDArray[np.uint64]

NOWHERE = 0
"""The class of tokens that lead nowhere from any state."""
END = 1
"""The class of the end of text."""

_ROWS = 64  # states that are followed through all tokens at a time


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ByteAutomaton:
    """A deterministic automaton over bytes, whose last state is dead: nothing leads out of it."""

    next_SB: IntArray
    """[S, 256] where each byte leads."""
    accepting_S: BoolArray
    """[S] in which states a text may end."""
    start: int
    """The state before the first byte."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False, weakref_slot=True)
class TokenAutomaton:
    """A deterministic automaton over tokens; its last state is dead, the one before it the end."""

    class_of_V: IntArray
    """[V] the class of each token."""
    next_TC: IntArray
    """[T, C] where the tokens of a class lead."""
    accepting_T: BoolArray
    """[T] in which states a text may end."""
    start: int
    """The state before the first token."""

    @property
    def dead(self) -> int:
        """The state that nothing leads out of."""
        return len(self.next_TC) - 1

    def edges(self) -> tuple[IntArray, IntArray]:
        """The pairs of states that some token leads from and to, each once."""
        states, classes = np.nonzero(self.next_TC != self.dead)
        pairs = np.unique(states * len(self.next_TC) + self.next_TC[states, classes])
        return pairs // len(self.next_TC), pairs % len(self.next_TC)

    def least(self) -> int | None:
        """Tokens of the shortest text that is accepted; None if there is none."""
        source, target = self.edges()
        seen = np.zeros(len(self.next_TC), bool)
        seen[self.start] = True
        for length in range(len(seen)):
            if (seen & self.accepting_T).any():
                return length
            before = int(seen.sum())
            seen[target[seen[source]]] = True
            if int(seen.sum()) == before:
                break
        return None

    def without(self, banned_V: BoolArray) -> TokenAutomaton:
        """The same without some tokens."""
        class_of_V = np.where(banned_V, NOWHERE, self.class_of_V)
        left = np.isin(np.arange(self.next_TC.shape[1]), class_of_V)
        next_TC = np.where(left, self.next_TC, self.dead)
        return dataclasses.replace(self, class_of_V=class_of_V, next_TC=next_TC)

    def to_text(self) -> str:
        """All of it as text that can be sent."""
        file = io.BytesIO()
        small = {
            "class_of_V": self.class_of_V.astype(np.uint32),
            "next_TC": self.next_TC.astype(np.uint32),
            "accepting_T": self.accepting_T,
            "start": np.array(self.start),
        }
        np.savez(file, **small)  # type: ignore[arg-type]
        return base64.b85encode(zlib.compress(file.getvalue(), 1)).decode()

    @staticmethod
    @functools.lru_cache(maxsize=16)
    def from_text(text: str) -> TokenAutomaton:
        """Read what `to_text` wrote; the same object for the same text, while it is remembered."""
        file = io.BytesIO(zlib.decompress(base64.b85decode(text)))
        with np.load(file, allow_pickle=False) as arrays:
            return TokenAutomaton(
                class_of_V=arrays["class_of_V"].astype(np.int64),
                next_TC=arrays["next_TC"].astype(np.int64),
                accepting_T=arrays["accepting_T"],
                start=int(arrays["start"]),
            )


def over_tokens(
    automaton: ByteAutomaton, vocabulary: Sequence[bytes | None], eos_token_id: int
) -> TokenAutomaton:
    """The automaton over the tokens of a vocabulary.

    Args:
        automaton: of the grammar.
        vocabulary: [V] the bytes of each token; None or nothing for tokens that are no text.
        eos_token_id: the token that ends a text.
    """
    texts = [b"" if n == eos_token_id else text or b"" for n, text in enumerate(vocabulary)]
    tree = _Tree(texts)
    signs_V = np.zeros((len(texts), 2), np.uint64)
    states = len(automaton.next_SB) - 1
    for first in range(0, states, _ROWS):
        tree.sign(automaton, np.arange(first, min(first + _ROWS, states)), signs_V)
    kinds, examples, kind_of_V = np.unique(signs_V, axis=0, return_index=True, return_inverse=True)
    text_kinds = np.flatnonzero(kinds.any(-1))
    class_of_kind = np.full(len(kinds), NOWHERE)
    class_of_kind[text_kinds] = END + 1 + np.arange(len(text_kinds))
    class_of_V = class_of_kind[kind_of_V.reshape(-1)]
    class_of_V[eos_token_id] = END
    # States of bytes, then the end, then the dead state.
    end, dead = states, states + 1
    next_TC = np.full((states + 2, END + 1 + len(text_kinds)), dead)
    for number, example in enumerate(examples[text_kinds].tolist(), END + 1):
        led = _led(automaton, np.arange(states), texts[example])
        next_TC[:states, number] = np.where(led == states, dead, led)
    accepting = np.append(automaton.accepting_S[:states], [True, False])
    next_TC[accepting, END] = end
    return TokenAutomaton(
        class_of_V=class_of_V, next_TC=next_TC, accepting_T=accepting, start=automaton.start
    )


def _led(automaton: ByteAutomaton, states_r: IntArray, text: bytes) -> IntArray:
    """[r] where a text leads from some states."""
    for byte in text:
        states_r = automaton.next_SB[states_r, byte]
    return states_r


class _Tree:
    """The beginnings of a vocabulary's tokens, length by length, each once."""

    def __init__(self, texts: Sequence[bytes]) -> None:
        self.parents: list[IntArray] = []  # [N] of each node, its place one length before
        self.bytes: list[IntArray] = []  # [N] what it adds
        self.ends: list[tuple[IntArray, IntArray]] = []  # tokens of that length, and their nodes
        lengths = np.array([len(text) for text in texts])
        tokens = np.flatnonzero(lengths > 0)
        nodes = np.zeros(len(tokens), np.int64)
        for length in range(1, int(lengths.max(initial=0)) + 1):
            added = np.array([texts[token][length - 1] for token in tokens.tolist()])
            kinds, nodes = np.unique(nodes * 256 + added, return_inverse=True)
            self.parents.append(kinds // 256)
            self.bytes.append(kinds % 256)
            whole = lengths[tokens] == length
            self.ends.append((tokens[whole], nodes[whole]))
            tokens, nodes = tokens[~whole], nodes[~whole]

    def sign(self, automaton: ByteAutomaton, states_r: IntArray, signs_V: SignArray) -> None:
        """Add to each token's sign where it leads from some states: tokens of one sign lead to the
        same state from every state. A sign has 128 bits, so that no two others are ever equal."""
        dead, narrow = len(automaton.next_SB) - 1, automaton.next_SB.astype(np.int32)
        pairs = (states_r[:, None] * (dead + 1) + np.arange(dead + 1)).astype(np.uint64)
        numbers = [_mixed(pairs, half) for half in range(2)]
        for numbers_rS in numbers:
            numbers_rS[:, dead] = 0
        reached_rN, place_N = states_r[:, None].astype(np.int32), np.zeros(1, np.int64)
        for parents, added, (tokens, nodes) in zip(
            self.parents, self.bytes, self.ends, strict=True
        ):
            alive = np.flatnonzero(place_N[parents] >= 0)
            reached_rN = narrow[reached_rN[:, place_N[parents[alive]]], added[alive]]
            living = (reached_rN != dead).any(0)
            reached_rN, alive = reached_rN[:, living], alive[living]
            place_N = np.full(len(parents), -1)
            place_N[alive] = np.arange(len(alive))
            here = place_N[nodes] >= 0
            led_rN = reached_rN[:, place_N[nodes[here]]]
            for half, numbers_rS in enumerate(numbers):
                mixed = np.take_along_axis(numbers_rS, led_rN, 1)
                signs_V[tokens[here], half] += mixed.sum(0, dtype=np.uint64)


def _mixed(values: SignArray, half: int) -> SignArray:
    """Numbers of 64 bits that look random (splitmix64), another function for each half."""
    mixed = values * np.uint64(2) + np.uint64(half) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
