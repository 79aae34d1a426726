"""What resolving a request needs to know of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from boe_vllm.request.given_text import Encode

if TYPE_CHECKING:
    from boe_vllm.request.grammar import Vocabulary
    from boe_vllm.request.under_grammar import GrammarParser


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """Sizes, ids and tokenizer of the model that will decode a request."""

    vocab_size: int
    max_model_len: int
    """Tokens of prompt and canvas together."""
    mask_token_id: int
    eos_token_id: int
    shift: int = 0
    """Rows by which a position's prediction lies before it."""
    encode: Encode | None = None
    """Token ids of a text, without special tokens; None where there is no tokenizer."""
    vocabulary: Callable[[], Vocabulary] | None = None
    """The tokens as bytes; None where there is no tokenizer."""
    parser: Callable[[], GrammarParser] | None = None
    """The parser of grammars that are read from left to right; None where there is none."""
