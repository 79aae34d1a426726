"""Whether a request can be served, decided before the engine sees it.

Every check raises where the HTTP server answers 400. What vLLM offers and masked diffusion does not
support is refused rather than ignored.
"""

from __future__ import annotations

import copy
import functools
import json
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from boe_vllm.decoding.canvas import policy_of
from boe_vllm.request.config import CanvasPlan, SamplerConfig, parse_sampler_config, plan_canvas
from boe_vllm.request.limits import EngineSettings
from boe_vllm.sampling.constraints import Constraint
from boe_vllm.vllm_plugin.token_fields import NEUTRAL, check_neutral, check_tokens, resolve

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreRequest

_seeds = random.Random()


def parse_server_config(additional_config: Mapping[str, Any]) -> SamplerConfig:
    """The server's defaults from `additional_config`'s `sampler` and `sampler_config`.

    Raises:
        ValueError: naming the field, what was expected and what came.
    """
    sampler = additional_config.get("sampler")
    fields = additional_config.get("sampler_config")
    if fields is None:
        fields = {}
    if not isinstance(fields, Mapping):
        raise ValueError(
            f"sampler_config: expected a mapping such as {{'rho': 0.25}}, got {fields!r}"
        )
    if sampler is None:
        return parse_sampler_config(fields)
    if fields.get("policy", sampler) != sampler:
        raise ValueError(
            f"sampler: expected the policy of sampler_config ({fields['policy']!r}), "
            f"got {sampler!r}; remove one of them"
        )
    return parse_sampler_config({**fields, "policy": sampler})


def server_config(vllm_config: VllmConfig) -> SamplerConfig:
    """The server's defaults as the engine's wiring left them in `additional_config`."""
    return _read_server_config(json.dumps(vllm_config.additional_config["sampler_config"]))


@functools.lru_cache(maxsize=8)
def _read_server_config(text: str) -> SamplerConfig:
    return parse_sampler_config(json.loads(text))


def plan_request(
    prompt_len: int, sampling_params: SamplingParams, vllm_config: VllmConfig
) -> tuple[SamplerConfig, CanvasPlan]:
    """What one request asks for, over the server's defaults, and the canvas that follows.

    The same in every process: it depends on the arguments alone.

    Raises:
        ValueError: for a field that is unknown or invalid, or a canvas that does not fit.
    """
    assert sampling_params.max_tokens is not None  # vLLM fills it in before us
    config = parse_sampler_config(sampling_params.extra_args or {}, base=server_config(vllm_config))
    plan = plan_canvas(
        config,
        prompt_len=prompt_len,
        max_tokens=sampling_params.max_tokens,
        max_model_len=vllm_config.model_config.max_model_len,
    )
    return config, plan


def check(
    prompt_token_ids: Sequence[int], sampling_params: SamplingParams, vllm_config: VllmConfig
) -> CanvasPlan:
    """Check one request and change nothing.

    Raises:
        VLLMValidationError: naming the field, what was expected and what came.
    """
    check_neutral(sampling_params, NEUTRAL, "masked diffusion decoding")
    vocab_size = vllm_config.model_config.get_vocab_size()
    for token in prompt_token_ids:
        if not 0 <= token < vocab_size:
            raise VLLMValidationError(
                f"prompt: expected token ids from 0 to {vocab_size - 1}, got {token}; "
                f"tokenize the prompt with this model's tokenizer",
                parameter="prompt",
            )
    try:
        config, plan = plan_request(len(prompt_token_ids), sampling_params, vllm_config)
        check_tokens(config, prompt_token_ids, sampling_params, vllm_config)
        policy = policy_of(config, vllm_config.model_config.hf_config.eos_token_id, Constraint())
        settings = EngineSettings.read(vllm_config.additional_config)
        mask = vllm_config.model_config.hf_config.mask_token_id
        infill = list(prompt_token_ids).count(mask)
        settings.check(config, plan, policy, prompt_len=len(prompt_token_ids), infill=infill)
    except ValueError as error:
        raise VLLMValidationError(str(error)) from error
    return plan


def admit(
    prompt_token_ids: Sequence[int], sampling_params: SamplingParams, vllm_config: VllmConfig
) -> CanvasPlan:
    """Check one request and fix what the engine needs of it: `max_tokens`, seed and end of text.

    A `gen_length` of the request overrides `max_tokens`, whose default over HTTP (16) would cut
    the canvas. A server's `gen_length` caps it: a request may still ask for less. A request
    without a seed gets one here, so that all workers draw the same random numbers.

    Args:
        prompt_token_ids: token ids of the prompt.
        sampling_params: the engine's private copy, updated in place.
        vllm_config: the engine's configuration.

    Raises:
        VLLMValidationError: as `check`.
    """
    resolve(sampling_params, vllm_config)
    if sampling_params.eos_token_id is None:
        # vLLM takes it from the tokenizer, which may have none or not be loaded.
        eos_token_id = vllm_config.model_config.hf_config.eos_token_id
        sampling_params.update_from_generation_config({}, eos_token_id)
    if sampling_params.bad_words and sampling_params.bad_words_token_ids is None:
        raise VLLMValidationError(
            "bad_words: expected none where the server has no tokenizer, got "
            f"{sampling_params.bad_words!r}; remove it",
            parameter="bad_words",
        )
    plan = check(prompt_token_ids, sampling_params, vllm_config)
    own = sampling_params.extra_args or {}
    if any(own.get(name) is not None for name in ("gen_length", "canvas_template", "choices")):
        sampling_params.max_tokens = plan.gen_length
    elif server_config(vllm_config).frame.gen_length is not None:
        sampling_params.max_tokens = min(sampling_params.max_tokens, plan.gen_length)
    if sampling_params.seed is None:
        sampling_params.seed = _seeds.getrandbits(31)
    return plan


def admit_request(request: EngineCoreRequest, vllm_config: VllmConfig) -> None:
    """`admit` for what vLLM's input processing returns."""
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
            "a prompt in several parts is not supported by masked diffusion decoding: expected "
            "one complete prompt; send it as a whole"
        )
    admit(request.prompt_token_ids, params, vllm_config)


def check_early(prompt: Any, sampling_params: Any, vllm_config: VllmConfig) -> None:
    """`check` a request as the HTTP server hands it over, where its tokens are known already.

    What cannot be told yet is left to `admit_request`, which sees every request.
    """
    token_ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
    if token_ids is None or not isinstance(sampling_params, SamplingParams):
        return
    if sampling_params.max_tokens is None:
        sampling_params = sampling_params.clone()
        sampling_params.max_tokens = vllm_config.model_config.max_model_len - len(token_ids)
    else:
        sampling_params = copy.copy(sampling_params)
    resolve(sampling_params, vllm_config)
    check(token_ids, sampling_params, vllm_config)
