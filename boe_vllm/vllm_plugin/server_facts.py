"""What resolving a request needs to know of a server: its settings and its model."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import TYPE_CHECKING

from vllm.tokenizers import cached_tokenizer_from_config

from boe_vllm.request.facts import ModelFacts
from boe_vllm.request.limits import ServerSettings
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
    config, size = model_config.hf_config, model_config.get_vocab_size()
    bare = ModelFacts(
        vocab_size=size,
        max_model_len=model_config.max_model_len,
        mask_token_id=config.mask_token_id,
        eos_token_id=config.eos_token_id,
        shift=config.shift,
    )
    if model_config.skip_tokenizer_init:
        return bare
    tokenizer = cached_tokenizer_from_config(model_config)
    return dataclasses.replace(
        bare,
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
        vocabulary=lambda: vocabulary_of(tokenizer, size),
        parser=lambda: parser_of(tokenizer, size, config.eos_token_id),
    )
