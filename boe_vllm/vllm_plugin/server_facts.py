"""What resolving a request needs to know of a server: its settings and its model."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm.tokenizers import cached_tokenizer_from_config

from boe_vllm.request.facts import ModelFacts
from boe_vllm.request.given_text import Encode
from boe_vllm.request.grammar import Vocabulary
from boe_vllm.request.limits import ServerSettings
from boe_vllm.request.under_grammar import GrammarParser
from boe_vllm.vllm_plugin.grammars import parser_of, vocabulary_of

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


def server_settings(vllm_config: VllmConfig) -> ServerSettings:
    """What the server says about all requests, from `additional_config`."""
    return _read_server_settings(json.dumps(vllm_config.additional_config, default=str))


@functools.lru_cache(maxsize=8)
def _read_server_settings(text: str) -> ServerSettings:
    return ServerSettings.read(json.loads(text))


def model_facts(model_config: ModelConfig) -> ModelFacts:
    """What resolving a request needs to know of the model."""
    return ModelFacts(
        vocab_size=model_config.get_vocab_size(),
        max_model_len=model_config.max_model_len,
        mask_token_id=model_config.hf_config.mask_token_id,
        eos_token_id=model_config.hf_config.eos_token_id,
        shift=model_config.hf_config.shift,
        encode=_encoder(model_config),
        vocabulary=_vocabulary(model_config),
        parser=_parser(model_config),
    )


def _encoder(model_config: ModelConfig) -> Encode | None:
    if model_config.skip_tokenizer_init:
        return None
    tokenizer = cached_tokenizer_from_config(model_config)
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def _vocabulary(model_config: ModelConfig) -> Callable[[], Vocabulary] | None:
    if model_config.skip_tokenizer_init:
        return None
    tokenizer, size = cached_tokenizer_from_config(model_config), model_config.get_vocab_size()
    return lambda: vocabulary_of(tokenizer, size)


def _parser(model_config: ModelConfig) -> Callable[[], GrammarParser] | None:
    if model_config.skip_tokenizer_init:
        return None
    tokenizer, size = cached_tokenizer_from_config(model_config), model_config.get_vocab_size()
    return lambda: parser_of(tokenizer, size, model_config.hf_config.eos_token_id)
