"""What a request says about tokens, vLLM's fields and the given_text: checked, made into token_constraints."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.tokenizers import cached_tokenizer_from_config

from boe_vllm.request.config import SamplerConfig, plain
from boe_vllm.request.given_text import Encode, split_given_text
from boe_vllm.sampling.constraints import Constraint, TokenConstraints

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

# Fields of SamplingParams that have no meaning here -> the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "repetition_penalty": (1.0,),
    "prompt_logprobs": (None,),
    "prompt_logprob_token_ids": (None,),
    "logprob_token_ids": (None,),
    "structured_outputs": (None,),
    "trace_decode_token_ids": (None,),
    "thinking_token_budget": (None,),
}
# The same for what means nothing where the answers are given.
NEUTRAL_FOR_CHOICES: dict[str, tuple[Any, ...]] = {
    "logprobs": (None,),
    "min_tokens": (0,),
    "logit_bias": (None, {}),
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
}
_INSTEAD = {
    "structured_outputs": "; no grammar can follow tokens that are written in any order: send "
    "canvas_template or choices in vllm_xargs instead",
    "prompt_logprobs": "; echo together with logprobs asks for it too",
}


def check_neutral(
    sampling_params: SamplingParams, fields: Mapping[str, tuple[Any, ...]], what: str
) -> None:
    """Refuse what would be ignored.

    Raises:
        VLLMValidationError: naming the field, what was expected and what came.
    """
    for name, neutral in fields.items():
        value = getattr(sampling_params, name)
        # Arrays have no truth value, and none of these is neutral as an array.
        if hasattr(value, "shape") or value not in neutral:
            raise VLLMValidationError(
                f"{name} is not supported by {what}: expected {neutral[0]!r}, got "
                f"{' '.join(reprlib.repr(value).split())}; remove it{_INSTEAD.get(name, '')}",
                parameter=name,
            )


def resolve(sampling_params: SamplingParams, vllm_config: VllmConfig) -> None:
    """Make token ids of the given_text's texts, in place.

    Raises:
        VLLMValidationError: for given_text that is invalid.
    """
    fields = {key: plain(value) for key, value in (sampling_params.extra_args or {}).items()}
    try:
        given_text, others = split_given_text(fields)
        if given_text.given():
            encoded = given_text.encoded(_encoder(vllm_config.model_config))
            sampling_params.extra_args = others | encoded
    except ValueError as error:
        raise VLLMValidationError(str(error)) from error


def check_tokens(
    config: SamplerConfig,
    prompt_token_ids: Sequence[int],
    sampling_params: SamplingParams,
    vllm_config: VllmConfig,
) -> None:
    """Check what a resolved request says about tokens.

    Raises:
        ValueError: when no token is left to be written, or the given_text does not fit the rest.
    """
    mask = vllm_config.model_config.hf_config.mask_token_id
    vocab_size = vllm_config.model_config.get_vocab_size()
    given_text = config.given_text
    for name, pieces in given_text.given().items():
        for piece in pieces:
            if isinstance(piece, list) and max(piece) >= vocab_size:
                raise ValueError(
                    f"{name}: expected token ids below {vocab_size}, got {max(piece)}; correct it"
                )
    template = given_text.template(mask)
    if template is not None and mask not in template:
        raise ValueError(
            f"canvas_template: expected a number of masks among its pieces, got "
            f"{given_text.canvas_template!r}; add one"
        )
    answers = given_text.answers()
    if answers is not None:
        check_neutral(sampling_params, NEUTRAL_FOR_CHOICES, "choices")
        if mask in prompt_token_ids or any(mask in answer for answer in answers):
            raise ValueError(
                "choices: expected no masks in the prompt and the answers, got some; remove them"
            )
    if not np.isfinite(list((sampling_params.logit_bias or {}).values())).all():
        raise ValueError(
            f"logit_bias: expected finite numbers, got {sampling_params.logit_bias}; correct them"
        )
    if not token_constraints_of(config, sampling_params, mask).tokens_left(vocab_size, mask):
        raise ValueError(
            "allowed_token_ids: expected at least one token that bad_words and min_tokens leave "
            "over, got none; loosen one of them"
        )


def token_constraints_of(
    config: SamplerConfig, sampling_params: SamplingParams, mask_token_id: int
) -> TokenConstraints:
    """The token_constraints of a resolved request.

    What ends a request may not be written before the last text of its template.
    """
    bias = sampling_params.logit_bias or {}
    words = [tuple(word) for word in sampling_params.bad_words_token_ids or ()]
    allowed = sampling_params.allowed_token_ids
    template = config.given_text.template(mask_token_id) or []
    texts = [place for place, token in enumerate(template, 1) if token != mask_token_id]
    return TokenConstraints(
        everywhere=Constraint(
            allowed_token_ids=None if allowed is None else np.unique(np.array(allowed, np.int64)),
            banned_token_ids=np.array(
                sorted({word[0] for word in words if len(word) == 1}), np.int64
            ),
            biased_token_ids=np.array(list(bias), np.int64),
            logit_bias=np.array(list(bias.values()), np.float64),
            top_k=max(0, sampling_params.top_k),
            top_p=sampling_params.top_p,
            min_p=sampling_params.min_p,
        ),
        min_tokens=max([sampling_params.min_tokens, *texts]),
        stop_token_ids=tuple(sorted(sampling_params.all_stop_token_ids)),
        bad_words=tuple(word for word in words if len(word) > 1),
    )


def _encoder(model_config: ModelConfig) -> Encode | None:
    if model_config.skip_tokenizer_init:
        return None
    tokenizer = cached_tokenizer_from_config(model_config)
    return lambda text: tokenizer.encode(text, add_special_tokens=False)
