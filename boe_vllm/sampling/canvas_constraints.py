"""Where a request's constraints hold on a canvas that is written in any order.

vLLM's fields there: `logit_bias`, `allowed_token_ids` and `bad_words` of one token hold at every
masked position; `min_tokens` forbids the tokens that end a request at the canvas positions below
it; a bad word of several tokens forbids, at each position, the token that would complete it there;
`top_k`, `top_p` and `min_p` restrict draws. A grammar allows, at each position, the tokens beside
which the rest of the canvas can still be written (`sampling.grammar`), or, if it can only be read
from left to right, the tokens that may come next at the frontier (`sampling.frontier`).

Legend: `L` positions of prompt and canvas, `M` some masked positions, `b` writes of one step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from boe_vllm.base.arrays import BoolArray, IntArray
from boe_vllm.sampling.constraints import Constraint, TokenConstraints, of_special_tokens
from boe_vllm.sampling.frontier import FrontierGrammar
from boe_vllm.sampling.grammar import CanvasGrammar
from boe_vllm.sampling.prefix import PrefixMatchers


def grammar_on_canvas(constraints: TokenConstraints, length: int, end: int) -> CanvasGrammar:
    """The grammar of a request on an empty canvas.

    Args:
        constraints: the request's, an automaton among them.
        length: tokens of the canvas.
        end: how many of them are sent at most.
    """
    assert constraints.grammar is not None
    return CanvasGrammar(
        constraints.grammar,
        length=length,
        end=end,
        early=constraints.min_tokens,
        ends=constraints.stop_token_ids,
    )


def never_under_grammar(
    everywhere: Constraint,
    texts: Sequence[bytes | None],
    mask_token_id: int,
    eos_token_id: int,
) -> BoolArray:
    """[V] tokens that may stand nowhere on the canvas of a grammar that is read from left to right.

    Args:
        everywhere: what holds at every position.
        texts: [V] the bytes of each token; None for one that is no text.
        mask_token_id: which may stand nowhere.
        eos_token_id: ends a text.
    """
    never_V = np.array([text is None for text in texts])
    never_V[eos_token_id] = False
    never_V |= ~everywhere.permitted(len(texts))
    never_V[mask_token_id] = True
    return never_V


def frontier_on_canvas(
    constraints: TokenConstraints,
    matchers: PrefixMatchers,
    *,
    length: int,
    end: int,
    mask_token_id: int,
    eos_token_id: int,
) -> FrontierGrammar:
    """The grammar of a request that can only be read from left to right, on an empty canvas.

    Args:
        constraints: the request's, such a grammar and a text of it among them.
        matchers: its parser.
        length: tokens of the canvas.
        end: how many of them are sent at most.
        mask_token_id: which may stand nowhere.
        eos_token_id: ends a text.

    Raises:
        ValueError: for what the parser does not take.
    """
    assert constraints.prefix_grammar is not None
    return FrontierGrammar(
        matchers,
        constraints.prefix_grammar,
        length=length,
        end=end,
        eos_token_id=eos_token_id,
        never_V=never_under_grammar(
            constraints.everywhere, matchers.texts, mask_token_id, eos_token_id
        ),
        known=constraints.prefix_end,
    )


class CanvasConstraints:
    """The constraints of one request at the positions of its canvas."""

    def __init__(
        self,
        constraints: TokenConstraints,
        prompt_len: int,
        *,
        never: int | None = None,
        discounted: tuple[int, ...] = (),
        length: int = 0,
        end: int = 0,
        frontier: FrontierGrammar | None = None,
    ) -> None:
        """Work out what follows from the request's constraints.

        Args:
            constraints: the request's.
            prompt_len: where its canvas begins.
            never: a token that is banned everywhere.
            discounted: tokens that are left out of the others' confidences.
            length: tokens of its canvas, for a grammar.
            end: how many of them are sent at most, for a grammar.
            frontier: the request's grammar, if it can only be read from left to right.
        """
        self.prompt_len = prompt_len
        self.frontier = frontier
        self.grammar: CanvasGrammar | FrontierGrammar | None = frontier
        if constraints.grammar is not None:
            self.grammar = grammar_on_canvas(constraints, length, end)
        self.bad_words = tuple(np.array(word) for word in constraints.bad_words)
        self.any = constraints.any or never is not None or bool(discounted)
        assert frontier is None or constraints.prefix_grammar is not None
        if constraints.any:
            self.always = constraints.everywhere.banning([] if never is None else [never])
            if discounted:
                ids = np.array(discounted)
                self.always = dataclasses.replace(self.always, discounted_token_ids=ids)
        else:  # one object for all such requests
            self.always = of_special_tokens(never, discounted)
        self.early = self.always.banning(constraints.stop_token_ids)
        self.early_positions = range(prompt_len, prompt_len + constraints.min_tokens)

    @property
    def depends_on_tokens(self) -> bool:
        """Whether a write changes the constraints of other positions."""
        return bool(self.bad_words) or self.grammar is not None

    def certain(self, tokens: IntArray, masked: BoolArray) -> dict[int, int]:
        """The masked positions where only one token can stand, and that token."""
        if self.grammar is None:
            return {}
        self.take_in(tokens, masked)
        return {self.prompt_len + n: token for n, token in self.grammar.certain().items()}

    def take_in(self, tokens: IntArray, masked: BoolArray) -> None:
        """Tell the grammar what stands on the canvas."""
        if self.grammar is not None:
            self.grammar.update(tokens[self.prompt_len :], masked[self.prompt_len :])

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
        self.take_in(tokens, masked)
        found = []
        for position in positions.tolist():
            constraint = self.early if position in self.early_positions else self.always
            if self.grammar is not None and position >= self.prompt_len:
                # A look-ahead may suppose writes that exclude each other: then nothing is left.
                constraint = self.grammar.constraint(position - self.prompt_len, constraint)
            if position in completing:
                constraint = constraint.banning(completing[position])
            found.append(constraint)
        return found

    def standing(
        self, tokens: IntArray, masked: BoolArray, positions: IntArray, writes: IntArray
    ) -> BoolArray:
        """[b] which writes of one step stand, in their order, so that none completes a bad word, or
        leaves nothing of the grammar, together with those before it. The constraints see to it that
        the first one stands.

        Raises:
            ValueError: for a write that is forbidden, which happens where nothing is permitted.
        """
        stand = np.ones(len(positions), bool)
        constraints = self.at(tokens, masked, positions)
        if constraints is None:
            return stand
        for position, token, constraint in zip(positions, writes, constraints, strict=True):
            if self.grammar is None and not constraint.permits(int(token)):
                raise ValueError(
                    f"position {position}: expected a token that may be written, found none; "
                    f"loosen allowed_token_ids, bad_words or min_tokens"
                )
        if not self.depends_on_tokens:
            return stand
        tokens, masked = tokens.copy(), masked.copy()
        for n, (position, token) in enumerate(zip(positions, writes, strict=True)):
            stand[n] = self._stands(tokens, masked, int(position), int(token))
            if not stand[n]:
                continue
            tokens[position], masked[position] = token, False
        return stand

    def _stands(self, tokens: IntArray, masked: BoolArray, position: int, token: int) -> bool:
        if self.grammar is not None and position >= self.prompt_len:
            self.take_in(tokens, masked)
            return self.grammar.permits(position - self.prompt_len, token)
        return token not in self._completing(tokens, masked).get(position, ())

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
