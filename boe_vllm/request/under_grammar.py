"""A request under a grammar: by which of two ways it is followed, and whether it fits its canvas.

A grammar with a finite automaton is followed in any order (`sampling.grammar`). Any other is read
from left to right by a parser (`sampling.frontier`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable
from typing import TYPE_CHECKING, Protocol

import numpy as np

from boe_vllm.base.arrays import BoolArray
from boe_vllm.base.options import shown
from boe_vllm.request.grammar import Grammar, compiled, refused
from boe_vllm.request.resolved import ResolvedRequest
from boe_vllm.sampling.automaton import TokenAutomaton
from boe_vllm.sampling.canvas_constraints import grammar_on_canvas, never_under_grammar
from boe_vllm.sampling.completions import Completions
from boe_vllm.sampling.constraints import Constraint
from boe_vllm.sampling.prefix import PrefixMatchers

if TYPE_CHECKING:
    from boe_vllm.request.facts import ModelFacts


class GrammarParser(PrefixMatchers, Hashable, Protocol):
    """A parser, with what it makes of a request's grammar."""

    def read(self, grammar: Grammar, timeout: float) -> str:
        """A grammar as the parser's own text, which it is known to take.

        Args:
            grammar: of the request.
            timeout: seconds that it may take to find that out.

        Raises:
            ValueError: for what is no grammar, and for one that it cannot follow.
        """


def under_grammar(
    grammar: Grammar, request: ResolvedRequest, model: ModelFacts, timeout: float
) -> ResolvedRequest:
    """A request with its grammar, if some way to fill its canvas satisfies it.

    Args:
        grammar: the request's.
        request: resolved otherwise.
        model: what will decode it.
        timeout: see `compiled`.

    Raises:
        ValueError: if no way does; for a canvas that is too short, with the least length.
    """
    given, constraints = request.config.given_text, request.constraints
    assert constraints is not None
    choices = given.choices if given else None
    for name, beside in (("choices", choices), ("bad_words", constraints.bad_words)):
        if beside:
            raise ValueError(
                f"{name}: expected none beside a grammar (words of one token may be), got "
                f"{shown(beside)}; remove it"
            )
    order = request.config.frame.grammar_order
    automaton = made(grammar, model, order=order, timeout=timeout)
    if isinstance(automaton, str):
        return _from_left_to_right(automaton, request, model)
    return _in_any_order(automaton, request, model)


def made(
    grammar: Grammar, model: ModelFacts, *, order: str, timeout: float
) -> TokenAutomaton | str:
    """What a grammar is followed by: its automaton, or its text for the parser; both remembered.

    Args:
        grammar: of the request.
        model: what will decode it, with a vocabulary.
        order: `grammar_order` of the request.
        timeout: see `compiled`.

    Raises:
        ValueError: for a grammar that cannot be followed.
    """
    if model.vocabulary is None:
        raise refused("a server with a tokenizer, got one without; remove it")
    why: ValueError | None = None
    if order == "free" or (order == "auto" and grammar.kind != "grammar"):
        try:
            return compiled(grammar, model.vocabulary(), model.eos_token_id, timeout=timeout)
        except ValueError as error:
            why = error
            if order == "free":
                raise
    try:
        if model.parser is None:
            raise refused(
                f"a schema, an expression or texts, which have a finite automaton, got a "
                f"{grammar.kind} where no parser reads it from left to right; send one of them"
            )
        return model.parser().read(grammar, timeout)
    except ValueError as error:
        raise why or error from None  # what is wrong is said of the way that comes first


def _in_any_order(
    automaton: TokenAutomaton, request: ResolvedRequest, model: ModelFacts
) -> ResolvedRequest:
    given, constraints = request.config.given_text, request.constraints
    assert constraints is not None
    automaton = automaton.without(_never(request, model))
    _check_length(automaton.least(), request, "that the grammar allows")
    constraints = dataclasses.replace(constraints, grammar=automaton)
    canvas = grammar_on_canvas(constraints, request.plan.gen_length, request.max_tokens)
    template = np.full(request.plan.gen_length, model.mask_token_id)
    text = given.template(model.mask_token_id) if given else None
    template[: len(text or [])] = text or []
    canvas.update(template, template == model.mask_token_id)
    if not canvas.possible:
        raise refused(
            "a grammar of which the request's other fields (canvas_template, allowed_token_ids, "
            "bad_words, min_tokens, logits_eos_inf) leave something, got one that no canvas can "
            "satisfy; loosen one of them"
        )
    return dataclasses.replace(request, constraints=constraints)


def _from_left_to_right(text: str, request: ResolvedRequest, model: ModelFacts) -> ResolvedRequest:
    _check_alone(request)
    constraints = request.constraints
    assert constraints is not None
    end = first_end(text, constraints.everywhere, model)
    if end is None:
        raise refused(
            f"a grammar of which some text of at most {model.max_model_len} tokens can be found, "
            f"got one where none was; make it simpler, or loosen allowed_token_ids and bad_words"
        )
    _check_length(len(end), request, "that was found")
    constraints = dataclasses.replace(constraints, prefix_grammar=text, prefix_end=end)
    return dataclasses.replace(request, constraints=constraints)


def first_end(text: str, everywhere: Constraint, model: ModelFacts) -> tuple[int, ...] | None:
    """A short text of a grammar that is read from left to right, in tokens; None if none was found.
    It is remembered.

    Args:
        text: the grammar, as the parser's own.
        everywhere: what holds at every position.
        model: what will decode it, with a parser.
    """
    assert model.parser is not None
    parser = model.parser()
    never_V = never_under_grammar(everywhere, parser.texts, model.mask_token_id, model.eos_token_id)
    return _first_end(parser, text, model.max_model_len, never_V.tobytes())


@functools.lru_cache(maxsize=64)
def _first_end(parser: GrammarParser, text: str, most: int, never: bytes) -> tuple[int, ...] | None:
    never_V = np.frombuffer(never, bool)
    return Completions(parser.texts, never_V).find(parser.open(text), most)


def _check_alone(request: ResolvedRequest) -> None:
    """Refuse what says something about positions that nothing is known of yet."""
    given, constraints = request.config.given_text, request.constraints
    beside = {
        "canvas_template": given.canvas_template if given else None,
        "min_tokens": constraints.min_tokens if constraints else 0,
        "logits_eos_inf": request.config.frame.logits_eos_inf,
    }
    for name, value in beside.items():
        if value:
            raise ValueError(
                f"{name}: expected none beside a grammar that is written from left to right, got "
                f"{shown(value)}; remove it"
            )


def _check_length(least: int | None, request: ResolvedRequest, which: str) -> None:
    if least is not None and least > request.max_tokens:
        raise ValueError(
            f"max_tokens: expected at least {least}, the tokens of the shortest output {which}, "
            f"got {request.max_tokens}; raise it"
        )


def _never(request: ResolvedRequest, model: ModelFacts) -> BoolArray:
    """[V] tokens that may stand nowhere."""
    assert request.constraints is not None
    never = ~request.constraints.everywhere.permitted(model.vocab_size)
    never[model.mask_token_id] = True
    if request.config.frame.logits_eos_inf:
        never[model.eos_token_id] = True
    return never
