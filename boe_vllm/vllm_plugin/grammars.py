"""The grammars of vLLM's clients, and the tokens of a vLLM tokenizer as bytes.

`structured_outputs`, `response_format` and the tools of a chat all arrive as
`SamplingParams.structured_outputs`.
"""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any

from boe_vllm.request.grammar import Grammar, Vocabulary
from boe_vllm.vllm_plugin.prefix_grammars import GuidanceParser

if TYPE_CHECKING:
    from vllm.sampling_params import StructuredOutputsParams


def grammar_of(params: StructuredOutputsParams) -> Grammar:
    """What a request's output must be."""
    whitespace = "" if params.disable_any_whitespace else params.whitespace_pattern
    if params.json is not None:
        schema = params.json if isinstance(params.json, str) else json.dumps(params.json)
        return Grammar(kind="json", text=schema, whitespace=whitespace)
    if params.json_object:
        return Grammar(kind="json_object")
    if params.regex is not None:
        return Grammar(kind="regex", text=params.regex)
    if params.choice is not None:
        return Grammar(kind="choice", text=json.dumps(list(params.choice)))
    if params.structural_tag is not None:
        return Grammar(kind="structural_tag", text=params.structural_tag, whitespace=whitespace)
    return Grammar(kind="grammar", text=params.grammar or "")


@functools.lru_cache(maxsize=4)
def vocabulary_of(tokenizer: Any, vocab_size: int) -> Vocabulary:
    """The tokens as bytes; those with a meaning of their own are no text."""
    from xgrammar import TokenizerInfo

    found = TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size)
    texts: list[bytes | None] = list(found.decoded_vocab)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {token for token, about in added.items() if about.special}
    for token in special.union(tokenizer.all_special_ids):
        if token < vocab_size:
            texts[token] = None
    return Vocabulary(texts=texts)


@functools.lru_cache(maxsize=4)
def parser_of(tokenizer: Any, vocab_size: int, eos_token_id: int) -> GuidanceParser:
    """The parser of grammars that are read from left to right."""
    return GuidanceParser(vocabulary_of(tokenizer, vocab_size), eos_token_id)
