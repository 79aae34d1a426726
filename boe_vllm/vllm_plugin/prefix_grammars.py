"""Grammars that are read from left to right, by the parser of vLLM's `guidance` backend.

vLLM has two backends for such grammars. Of both, llguidance reads any grammar within milliseconds,
so that every worker reads it for itself and nobody waits, it refuses the keywords of a JSON schema
that it does not follow, and it bounds its work (docs/serving.md, Grammars).
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from boe_vllm.base.arrays import BoolArray
from boe_vllm.request.grammar import MAX_LENGTH, Grammar, Vocabulary, refused

if TYPE_CHECKING:
    import llguidance

LIMITS: dict[str, Any] = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 250_000,
    "max_grammar_size": 500_000,
}
"""Of the parser, which gives up beyond them; they are its own defaults, written down."""


MESSAGE = 200
"""Characters of what the parser says of a grammar."""


class GuidanceMatcher:
    """Where a text stands, as llguidance sees it. A parser that has given up allows nothing."""

    def __init__(self, matcher: llguidance.LLMatcher, size: int, eos_token_id: int) -> None:
        self._matcher, self._size, self._eos = matcher, size, eos_token_id

    def allowed(self) -> BoolArray:
        """[V] the tokens of text that may come next."""
        if self._matcher.is_stopped():  # where the mask would be that of the end of text
            return np.zeros(self._size, bool)
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed_V = np.unpackbits(mask, count=self._size, bitorder="little").astype(bool)
        allowed_V[self._eos] = False
        return allowed_V if not self._matcher.is_error() else np.zeros(self._size, bool)

    def accepting(self) -> bool:
        """Whether the text may end here."""
        return bool(self._matcher.is_accepting())

    def forced(self) -> bytes:
        """What comes next whatever else."""
        return b"" if self._matcher.is_stopped() else bytes(self._matcher.compute_ff_bytes())

    def accept(self, *tokens: int) -> bool:
        """Go on by some tokens if they may come next, all or none."""
        if self._eos in tokens or (tokens and self._matcher.is_stopped()):
            return False
        taken = self._matcher.try_consume_tokens(list(tokens))
        if taken < len(tokens):
            self.back(taken)
        return bool(taken == len(tokens))

    def back(self, count: int) -> None:
        """Take back the last tokens."""
        if count:
            self._matcher.rollback(count)

    def copy(self) -> GuidanceMatcher:
        """Another one at the same place."""
        return GuidanceMatcher(self._matcher.deep_copy(), self._size, self._eos)


class GuidanceParser:
    """llguidance with a model's vocabulary."""

    def __init__(self, vocabulary: Vocabulary, eos_token_id: int) -> None:
        """Read the vocabulary.

        Args:
            vocabulary: the model's.
            eos_token_id: ends a text.
        """
        import llguidance

        self._vocabulary, self._eos = vocabulary, eos_token_id
        tokens = _Tokens(vocabulary.texts, eos_token_id)
        self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(tokens))
        self._limits = llguidance.LLParserLimits(**LIMITS)

    @property
    def texts(self) -> Sequence[bytes | None]:
        """[V] the bytes of each token; None for one that is no text."""
        return self._vocabulary.texts

    def read(self, grammar: Grammar, timeout: float) -> str:
        """A grammar as llguidance's own text, tried in a process of its own.

        Raises:
            ValueError: for what is no grammar, and for one that it cannot follow.
        """
        if len(grammar.text) > MAX_LENGTH:
            raise refused(f"at most {MAX_LENGTH} characters, got {len(grammar.text)}; shorten it")
        found = _read(json.dumps(_form(grammar)), timeout)
        if "refused" in found:
            raise refused(f"a {grammar.kind} that can be read, got one where {found['refused']}")
        return found["text"]

    def open(self, grammar: str) -> GuidanceMatcher:
        """The beginning of a text.

        Raises:
            ValueError: for what is no grammar of llguidance's.
        """
        import llguidance

        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise refused(f"a grammar that can be read, got one where {matcher.get_error()}")
        return GuidanceMatcher(matcher, len(self.texts), self._eos)


class _Tokens:
    """A vocabulary as llguidance's `TokenizerWrapper` asks for it."""

    bos_token_id = None

    def __init__(self, texts: Sequence[bytes | None], eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id
        self.special_token_ids = [n for n, text in enumerate(texts) if not text]
        # Names of such tokens, which no text can hold.
        self.tokens = [text or f"<|{n}|>".encode() for n, text in enumerate(texts)]
        self._number = {text: n for n, text in enumerate(texts) if text}
        self._longest = max(map(len, self._number), default=1)

    def __call__(self, text: str | bytes) -> list[int]:
        """A text in tokens, the longest first; what no token begins is left out."""
        rest = text.encode() if isinstance(text, str) else text
        found = []
        while rest:
            size = min(len(rest), self._longest)
            while size and rest[:size] not in self._number:
                size -= 1
            if size:
                found.append(self._number[rest[:size]])
            rest = rest[max(1, size) :]
        return found


def _form(grammar: Grammar) -> dict[str, Any]:
    """What `prefix_trial` reads."""
    form: dict[str, Any] = {"kind": grammar.kind, "text": grammar.text, "limits": LIMITS}
    if grammar.whitespace:
        form["options"] = {"whitespace_flexible": True, "whitespace_pattern": grammar.whitespace}
    else:
        # At most one blank behind a separator, as in any order, unless the request wants none.
        blank = " ?" if grammar.whitespace is None else ""
        form["options"] = {"whitespace_flexible": False}
        form["options"] |= {"item_separator": f",{blank}", "key_separator": f":{blank}"}
    return form


@functools.lru_cache(maxsize=64)
def _read(form: str, timeout: float) -> dict[str, str]:
    """The parser's text or why there is none, both remembered. Some grammars end the process that
    reads them."""
    program = Path(__file__).with_name("prefix_trial.py")
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(program)],
            input=form.encode(),
            capture_output=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        why = f"it takes more than {timeout:g} seconds (this server's grammar_timeout_s)"
        return {"refused": f"{why}; make it smaller"}
    if done.returncode != 0:
        return {"refused": "the parser has failed; make it smaller, with fewer levels"}
    found: dict[str, str] = json.loads(done.stdout)
    if "refused" in found:
        found["refused"] = f"{' '.join(found['refused'].split())[:MESSAGE]}; correct it"
    return found
