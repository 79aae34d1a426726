"""The grammar of a request: what it may say, and the automaton that follows from it.

A regular expression, a list of texts or a JSON schema has a finite automaton, which alone can be
followed on a canvas that is written in any order (`sampling.grammar`). `outlines_core` makes it
over bytes, in a process of its own (`regex_compiler`); here it becomes one over the model's tokens.
What of JSON schema `outlines_core` passes over in silence is refused: an output that is promised to
be valid has to be.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from boe_vllm.base.arrays import BoolArray
from boe_vllm.base.options import shown
from boe_vllm.request import structural_tags
from boe_vllm.request.resolved import ResolvedRequest
from boe_vllm.request.structural_tags import Tree
from boe_vllm.sampling.automaton import ByteAutomaton, TokenAutomaton, over_tokens
from boe_vllm.sampling.canvas_constraints import grammar_on_canvas

if TYPE_CHECKING:
    from boe_vllm.request.facts import ModelFacts

MAX_LENGTH = 1 << 18
"""Characters of a schema or an expression."""
MAX_PAIRS = 1 << 28
"""States of the automaton over bytes times tokens, which are walked through one by one."""
MAX_DEPTH = 32
"""Levels of a schema."""
MEMORY_BYTES = 4 << 30

_STRING = r'"([^"\\\x00-\x1F\x7F-\x9F]|\\["\\/bfnrt])*"'
_NUMBER = r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?"
_SCALAR = f"({_STRING}|{_NUMBER}|true|false|null)"

# Keywords that narrow what is valid and that the library would pass over.
_NOT_FOLLOWED = frozenset(
    "minimum maximum exclusiveMinimum exclusiveMaximum multipleOf uniqueItems allOf not if then "
    "else patternProperties propertyNames contains minContains maxContains dependentRequired "
    "dependentSchemas dependencies unevaluatedItems unevaluatedProperties $dynamicRef "
    "contentEncoding contentMediaType".split()
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Grammar:
    """What a request's output must be."""

    kind: Literal["json", "json_object", "regex", "choice", "structural_tag"]
    text: str = ""
    """The regular expression, or the schema, the texts or the tag as JSON."""
    whitespace: str | None = None
    """A regular expression for the white space of JSON; None for at most one blank."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Vocabulary:
    """The tokens of a model as bytes."""

    texts: Sequence[bytes | None]
    """[V] of each token; None for one that is no text."""


def under_grammar(
    grammar: Grammar, request: ResolvedRequest, model: ModelFacts, timeout: float
) -> ResolvedRequest:
    """A request with its grammar's automaton, if some way to fill its canvas satisfies it.

    Args:
        grammar: the request's.
        request: resolved otherwise.
        model: what will decode it.
        timeout: see `compiled`.

    Raises:
        ValueError: if no way does; for a canvas that is too short, with the least length.
    """
    given, constraints = request.config.given_text, request.constraints
    for name, beside in (("choices", given.choices), ("bad_words", constraints.bad_words)):
        if beside:
            raise ValueError(
                f"{name}: expected none beside a grammar (words of one token may be), got "
                f"{shown(beside)}; remove it"
            )
    if model.vocabulary is None:
        raise _refused("a server with a tokenizer, got one without; remove it")
    automaton = compiled(grammar, model.vocabulary(), model.eos_token_id, timeout=timeout)
    automaton = automaton.without(_never(request, model))
    least = automaton.least()
    if least is not None and least > request.max_tokens:
        raise ValueError(
            f"max_tokens: expected at least {least}, the tokens of the shortest output that the "
            f"grammar allows, got {request.max_tokens}; raise it"
        )
    constraints = dataclasses.replace(constraints, grammar=automaton)
    canvas = grammar_on_canvas(constraints, request.plan.gen_length, request.max_tokens)
    template = np.full(request.plan.gen_length, model.mask_token_id)
    text = given.template(model.mask_token_id) or []
    template[: len(text)] = text
    canvas.update(template, template == model.mask_token_id)
    if not canvas.possible:
        raise _refused(
            "a grammar of which the request's other fields (canvas_template, allowed_token_ids, "
            "bad_words, min_tokens, logits_eos_inf) leave something, got one that no canvas can "
            "satisfy; loosen one of them"
        )
    return dataclasses.replace(request, constraints=constraints)


def _never(request: ResolvedRequest, model: ModelFacts) -> BoolArray:
    """[V] tokens that may stand nowhere."""
    everywhere = request.constraints.everywhere
    never = np.full(model.vocab_size, everywhere.allowed_token_ids is not None)
    if everywhere.allowed_token_ids is not None:
        never[everywhere.allowed_token_ids] = False
    never[everywhere.banned_token_ids] = True
    never[model.mask_token_id] = True
    if request.config.frame.logits_eos_inf:
        never[model.eos_token_id] = True
    return never


def compiled(
    grammar: Grammar, vocabulary: Vocabulary, eos_token_id: int, *, timeout: float
) -> TokenAutomaton:
    """The automaton of a grammar over tokens.

    Args:
        grammar: of the request.
        vocabulary: the model's.
        eos_token_id: ends a text.
        timeout: seconds that the automaton over bytes may take.

    Raises:
        ValueError: for a grammar that has no automaton, or too large a one.
    """
    if len(grammar.text) > MAX_LENGTH:
        raise _refused(f"at most {MAX_LENGTH} characters, got {len(grammar.text)}; shorten it")
    automaton = over_bytes(grammar, timeout)
    pairs = len(automaton.next_SB) * len(vocabulary.texts)
    if pairs > MAX_PAIRS:
        raise _refused(
            f"an automaton of at most {MAX_PAIRS // len(vocabulary.texts)} states with a "
            f"vocabulary of this size, got {len(automaton.next_SB)}; make the grammar smaller"
        )
    return _over_tokens(automaton, vocabulary, eos_token_id)


def over_bytes(grammar: Grammar, timeout: float) -> ByteAutomaton:
    """The automaton of a grammar over bytes.

    Raises:
        ValueError: as `compiled`.
    """
    found = _run(json.dumps(_tree(grammar)), grammar.whitespace, timeout)
    if isinstance(found, str):
        raise _refused(
            f"a {grammar.kind} that a finite automaton can follow, got one where {found}"
        )
    return found


def _tree(grammar: Grammar) -> Tree:
    """What the compiler reads."""
    if grammar.kind == "json":
        return _json(grammar.text)
    if grammar.kind == "json_object":
        return ["regex", _object(_value())]
    if grammar.kind == "choice":
        return ["any", [["text", text] for text in json.loads(grammar.text)]]
    if grammar.kind == "structural_tag":
        return structural_tags.tree_of(grammar.text, _json)
    # The whole output has to match, so that anchors say nothing new.
    return ["regex", re.sub(r"(?<!\\)\$$", "", grammar.text.removeprefix("^"))]


def _json(schema: str) -> Tree:
    _check_schema(schema)
    anything = json.loads(schema) in (True, {})
    return ["regex", _value()] if anything else ["json", schema]


def _value() -> str:
    """Any JSON value that is nested once at most."""
    return f"({_SCALAR}|{_object(_SCALAR)}|\\[({_SCALAR}(, ?{_SCALAR})*)?\\])"


def _object(value: str) -> str:
    member = f"{_STRING}: ?{value}"
    return rf"\{{({member}(, ?{member})*)?\}}"


@functools.lru_cache(maxsize=64)
def _run(tree: str, whitespace: str | None, timeout: float) -> ByteAutomaton | str:
    """The compiler's automaton, or why there is none, both remembered."""
    asked = {"tree": json.loads(tree), "whitespace": whitespace, "memory_bytes": MEMORY_BYTES}
    program = Path(__file__).with_name("regex_compiler.py")
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(program)],
            input=json.dumps(asked).encode(),
            capture_output=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return (
            f"it takes more than {timeout:g} seconds (this server's grammar_timeout_s); make it "
            f"smaller, or say which properties an object has"
        )
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "the compiler has failed")
    with np.load(io.BytesIO(done.stdout), allow_pickle=False) as arrays:
        return ByteAutomaton(
            next_SB=arrays["next_SB"].astype(np.int64),
            accepting_S=arrays["accepting_S"],
            start=int(arrays["start"]),
        )


@functools.lru_cache(maxsize=64)
def _over_tokens(
    automaton: ByteAutomaton, vocabulary: Vocabulary, eos_token_id: int
) -> TokenAutomaton:
    return over_tokens(automaton, vocabulary.texts, eos_token_id)


def _check_schema(text: str) -> None:
    try:
        schema = json.loads(text)
        for part, depth in _schemas(schema, 0):
            if depth > MAX_DEPTH:
                raise RecursionError
            _check_one(part)
    except RecursionError:
        raise _refused(f"a schema of at most {MAX_DEPTH} levels, got more; flatten it") from None
    except json.JSONDecodeError as error:
        raise _refused(f"a JSON schema, got {shown(text)} ({error}); correct it") from None


def _schemas(value: Any, depth: int) -> Iterator[tuple[Mapping[str, Any], int]]:
    """A schema and those within it, with their depths."""
    if not isinstance(value, Mapping):
        return
    yield value, depth
    if depth > MAX_DEPTH:
        return
    for name, part in value.items():
        inner: Sequence[Any] = ()
        if name in ("properties", "$defs", "definitions"):
            inner = list(part.values()) if isinstance(part, Mapping) else ()
        elif name in ("anyOf", "oneOf", "prefixItems"):
            inner = part if isinstance(part, list) else ()
        elif name in ("items", "additionalProperties"):
            inner = [part]
        for one in inner:
            yield from _schemas(one, depth + 1)


def _check_one(schema: Mapping[str, Any]) -> None:
    unfollowed = sorted(_NOT_FOLLOWED.intersection(schema))
    if unfollowed:
        raise _refused(
            f"no {unfollowed[0]!r} in a schema, which cannot be followed, got some; remove it and "
            f"check it in the answer"
        )
    if "pattern" in schema and ("minLength" in schema or "maxLength" in schema):
        raise _refused(
            "no length beside the pattern of a string, got both; say the length in the pattern"
        )
    required, properties = schema.get("required"), schema.get("properties")
    if isinstance(required, list) and isinstance(properties, Mapping):
        missing = [name for name in required if name not in properties]
        if missing:
            raise _refused(f"properties of all that is required, got none of {shown(missing[0])}")


def _refused(expected: str) -> ValueError:
    return ValueError(f"structured_outputs: expected {expected}")
