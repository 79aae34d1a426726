"""Grammars that are read from left to right: what a canvas asks of a parser.

A context-free grammar has no finite automaton. A parser follows it: of a text so far it knows which
tokens may come next, and no more. Parsers are somebody else's (`vllm_plugin.prefix_grammars`).

Legend: `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from boe_vllm.base.arrays import BoolArray


class PrefixMatcher(Protocol):
    """Where a text stands in a grammar. No method raises: a parser that gives up allows nothing."""

    def allowed(self) -> BoolArray:
        """[V] the tokens of text that may come next; the end of text is none of them."""

    def accepting(self) -> bool:
        """Whether the text may end here."""

    def forced(self) -> bytes:
        """What comes next whatever else; empty if there is a choice."""

    def accept(self, *tokens: int) -> bool:
        """Go on by some tokens if they may come next, all or none, and say whether they may."""

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
