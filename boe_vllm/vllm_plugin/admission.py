"""Whether a request can be served, decided before the engine sees it.

Every check raises where the HTTP server answers 400. What vLLM offers and masked diffusion does not
support is refused rather than ignored. What a request asks for is resolved here, once
(`request.resolve`), and travels in `SamplingParams.extra_args` to the scheduler and the workers.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.tokenizers import cached_tokenizer_from_config

from boe_vllm.base.options import shown
from boe_vllm.request.config import VLLM_EXTRA_ARGS
from boe_vllm.request.facts import ModelFacts
from boe_vllm.request.limits import ServerSettings
from boe_vllm.request.resolve import SamplingFields, resolve
from boe_vllm.request.resolved import ResolvedRequest
from boe_vllm.vllm_plugin.grammars import grammar_of, parser_of, vocabulary_of
from boe_vllm.vllm_plugin.transport import check_transport, refusal

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.input_processor import InputProcessor

KEY = "boe_vllm"
"""Where in `extra_args` the resolved request travels. As a field of a request it is unknown."""

# Fields of SamplingParams that have no meaning here -> the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "repetition_penalty": (1.0,),
    "prompt_logprobs": (None,),
    "prompt_logprob_token_ids": (None,),
    "logprob_token_ids": (None,),
    "trace_decode_token_ids": (None,),
    "thinking_token_budget": (None,),
}
_INSTEAD = {"prompt_logprobs": "; echo asks for it too (in a completion, beside logprobs)"}


# ---- a server ----------------------------------------------------------------------------------


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


# ---- a request ---------------------------------------------------------------------------------


def resolve_early(prompt: Any, params: Any, processor: InputProcessor) -> Any:
    """Resolve a request as the HTTP server hands it over, before its response begins.

    Args:
        prompt: as `AsyncLLM.generate` takes it; where its tokens are not known yet, everything is
            left to `admit_request`, which sees every request.
        params: the caller's, left as they are.
        processor: the engine's.

    Returns:
        The params to go on with: a copy that holds the resolved request, or the caller's.

    Raises:
        VLLMValidationError: naming the field, what was expected and what came.
    """
    token_ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
    if token_ids is None or not isinstance(params, SamplingParams):
        return params
    if not token_ids:
        raise VLLMValidationError(
            "prompt: expected at least one token, got an empty prompt; send some text",
            parameter="prompt",
        )
    config = processor.vllm_config
    _refuse_what_would_be_ignored(params)
    check_transport(params)
    own = params.clone()
    grammar, own.structured_outputs = own.structured_outputs, None  # vLLM's backends see none
    _process_as_vllm_will(own, len(token_ids), processor)
    own.structured_outputs = grammar
    resolved = _resolve(token_ids, own, config)
    if resolved.config.frame.stream_canvas and own.output_kind != RequestOutputKind.DELTA:
        raise VLLMValidationError(
            "stream_canvas: expected a stream beside it, got a request for one response; set "
            "stream to true, or remove it",
            parameter="stream_canvas",
        )
    _complete(own, resolved)
    check_transport(own)
    # The next stage finds the object itself, which no client can send.
    own.extra_args = {**(own.extra_args or {}), KEY: resolved}
    own.skip_clone = True
    return own


def _process_as_vllm_will(
    params: SamplingParams, prompt_len: int, processor: InputProcessor
) -> None:
    """What vLLM's input processing does to params, which doing it twice does not change."""
    config = processor.vllm_config
    try:
        params.verify(
            config.model_config,
            config.speculative_config,
            config.structured_outputs_config,
            processor.tokenizer,
        )
        if params.max_tokens is None:
            params.max_tokens = config.model_config.max_model_len - prompt_len
        params.update_from_generation_config(
            processor.generation_config_fields, processor.renderer.get_eos_token_id()
        )
        if processor.tokenizer is not None:
            params.update_from_tokenizer(processor.tokenizer)
    except (ValueError, VLLMValidationError) as error:
        raise refusal(error) from error


def admit_request(request: EngineCoreRequest, vllm_config: VllmConfig) -> None:
    """Resolve what vLLM's input processing returns, unless that is done, and complete it in place.

    Raises:
        VLLMValidationError: naming the field, what was expected and what came.
    """
    params = request.sampling_params
    if params is None:
        return  # a pooling request, which vLLM refuses by itself
    if request.prompt_token_ids is None or request.prompt_embeds is not None:
        raise VLLMValidationError(
            "prompt_embeds is not supported by masked diffusion decoding: expected token ids; "
            "send the prompt as text or token ids",
            parameter="prompt_embeds",
        )
    if request.resumable:
        raise VLLMValidationError(
            "prompt: expected one complete prompt, got one in several parts, which masked "
            "diffusion decoding does not support; send it as a whole",
            parameter="prompt",
        )
    admit(request.prompt_token_ids, params, vllm_config)
    check_transport(request)


def admit(
    prompt_token_ids: Sequence[int], params: SamplingParams, vllm_config: VllmConfig
) -> ResolvedRequest:
    """Resolve one request, unless that is done, and make its params what the engine needs.

    Args:
        prompt_token_ids: token ids of the prompt.
        params: the engine's private copy, updated in place.
        vllm_config: the engine's configuration.

    Raises:
        VLLMValidationError: naming the field, what was expected and what came.
    """
    resolved = (params.extra_args or {}).get(KEY)
    if not isinstance(resolved, ResolvedRequest):
        _refuse_what_would_be_ignored(params)
        check_transport(params)  # the Python interface takes values of any type
        resolved = _resolve(prompt_token_ids, params, vllm_config)
    _complete(params, resolved)
    return resolved


def read_resolved(params: SamplingParams | None) -> ResolvedRequest:
    """The request that admission has resolved, in the engine or a worker.

    Raises:
        ValueError: for a request that went around admission.
    """
    wire = wire_of(params)
    if params is None or wire is None:
        raise ValueError(
            "prompt: expected a request that vLLM's input processing has seen, got one that was "
            "handed to the engine directly; send the prompt itself"
        )
    # vLLM gives each of a request's `n` copies a seed of its own, and takes -1 for none.
    seed = -1 if params.seed is None else params.seed
    return dataclasses.replace(ResolvedRequest.from_wire(wire), seed=seed)


def wire_of(params: SamplingParams | None) -> Mapping[str, Any] | None:
    """The resolved request as it travels; None for a request that went around admission."""
    return None if params is None else (params.extra_args or {}).get(KEY)


def _refuse_what_would_be_ignored(params: SamplingParams) -> None:
    for name, neutral in NEUTRAL.items():
        value = getattr(params, name)
        # Arrays have no truth value, and none of these is neutral as an array.
        if hasattr(value, "shape") or value not in neutral:
            raise VLLMValidationError(
                f"{name} is not supported by masked diffusion decoding: expected {neutral[0]!r}, "
                f"got {shown(value)}; remove it{_INSTEAD.get(name, '')}",
                parameter=name,
            )


def _resolve(
    prompt_token_ids: Sequence[int], params: SamplingParams, vllm_config: VllmConfig
) -> ResolvedRequest:
    """`request.resolve.resolve` of vLLM's params."""
    model = model_facts(vllm_config.model_config)
    if params.eos_token_id is None:
        # vLLM takes it from the tokenizer, which may have none or not be loaded.
        params.update_from_generation_config({}, model.eos_token_id)
    try:
        return resolve(
            params.extra_args or {},
            prompt=prompt_token_ids,
            sampling=_sampling_fields(params),
            server=server_settings(vllm_config),
            model=model,
        )
    except ValueError as error:
        raise refusal(error) from error


def _sampling_fields(params: SamplingParams) -> SamplingFields:
    if params.bad_words and params.bad_words_token_ids is None:
        raise ValueError(
            f"bad_words: expected none where the server has no tokenizer, got "
            f"{shown(params.bad_words)}; remove it"
        )
    assert params.max_tokens is not None  # vLLM fills it in before us
    asked = params.structured_outputs
    return SamplingFields(
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        temperature=params.temperature,
        seed=params.seed,
        logprobs=params.logprobs,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        logit_bias=params.logit_bias or {},
        allowed_token_ids=params.allowed_token_ids,
        bad_words=params.bad_words_token_ids or (),
        stop_token_ids=params.all_stop_token_ids,
        grammar=None if asked is None else grammar_of(asked),
    )


def _complete(params: SamplingParams, resolved: ResolvedRequest) -> None:
    """Tell vLLM what follows from the resolved request, and let it travel."""
    params.structured_outputs = None  # which vLLM's own engine would follow from left to right
    params.max_tokens = resolved.max_tokens
    # Stop strings that lie within given text end nothing.
    params.min_tokens = max(params.min_tokens, resolved.text_end)
    params.seed = resolved.seed
    if params.logprobs is not None:
        params.logprobs = resolved.top_logprobs
    extra = {k: v for k, v in (params.extra_args or {}).items() if k in VLLM_EXTRA_ARGS}
    params.extra_args = extra | {KEY: resolved.to_wire()}
