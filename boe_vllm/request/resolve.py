"""From what a request says to what the engine does: resolved once, and refused here if at all.

Nothing here knows vLLM: its standard fields come as plain values, so that a notebook resolves its
requests the same way.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from boe_vllm.base.options import shown
from boe_vllm.request.config import SamplerConfig, parse_sampler_config
from boe_vllm.request.facts import ModelFacts
from boe_vllm.request.given_text import check_choices
from boe_vllm.request.grammar import Grammar
from boe_vllm.request.limits import EngineSettings, ServerSettings
from boe_vllm.request.resolved import (
    CanvasPlan,
    ResolvedRequest,
    most_tokens_due,
    plan_canvas,
)
from boe_vllm.request.under_grammar import under_grammar
from boe_vllm.sampling.constraints import Constraint, TokenConstraints

GREEDY_BELOW = 1e-5  # vLLM's own limit
ALL = -1
"""`logprobs` of the whole vocabulary."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SamplingFields:
    """The standard fields of a request, as vLLM names them and with its defaults."""

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    """Log-probabilities per token beside its own; `ALL` for the whole vocabulary, None for none."""
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[Sequence[int]] = ()
    """Each in tokens."""
    stop_token_ids: Collection[int] = ()
    """Every token that ends the request, the end of text included."""
    grammar: Grammar | None = None
    """What the output must be."""

    def constrains(self, vocab_size: int) -> bool:
        """Whether anything is said of tokens that may be written or drawn."""
        listed = self.allowed_token_ids is not None or self.bad_words or self.logit_bias
        filtered = 0 < self.top_k < vocab_size or self.top_p < 1 or self.min_p > 0
        return bool(listed or filtered or self.min_tokens > 0 or self.grammar is not None)


def resolve(
    fields: Mapping[str, Any],
    *,
    prompt: Sequence[int],
    sampling: SamplingFields,
    server: ServerSettings,
    model: ModelFacts,
) -> ResolvedRequest:
    """Decide everything about a request that can be known before its first step.

    A `gen_length` of the request, a template or answers override `max_tokens`, whose default over
    HTTP (16) would cut the canvas. A server's `gen_length` caps it: a request may still ask for
    less. A request without a seed gets one, so that all workers draw the same random numbers.

    Args:
        fields: the request's own, by name.
        prompt: token ids.
        sampling: the request's standard fields.
        server: its defaults and limits.
        model: what will decode the request.

    Raises:
        ValueError: for whatever cannot be served; the message begins with the name of the field.
    """
    _check_prompt(prompt, model)
    config = parse_sampler_config(fields, base=server.config)
    if config.given_text is not None:
        given = config.given_text.encoded(model.encode, model.vocab_size)
        config = dataclasses.replace(config, given_text=given)
    plan = plan_canvas(
        config,
        prompt_len=len(prompt),
        max_tokens=sampling.max_tokens,
        max_model_len=model.max_model_len,
    )
    server.limits.check("gen_length", plan.gen_length)
    server.limits.check("trace", plan.gen_length * config.frame.trace)
    infill = _masks_to_write(prompt, config, server.limits, model)
    texts = _places_of_text(config, infill, sampling, model)
    text_end = texts[-1] + 1 if texts else 0
    max_tokens = _max_tokens(config, plan, sampling, own=fields.get("gen_length") is not None)
    request = ResolvedRequest(
        config=config,
        plan=plan,
        temperature=0.0 if sampling.temperature < GREEDY_BELOW else float(sampling.temperature),
        seed=_seed(sampling.seed, server.limits.default_seed),
        logprobs=sampling.logprobs is not None,
        top_logprobs=_top_logprobs(sampling.logprobs, model.vocab_size),
        constraints=_constraints(config, sampling, text_end, model),
        prompt_len=len(prompt),
        max_tokens=max_tokens,
        text_end=text_end,
        rows=(len(prompt) + plan.gen_length) * _passes(config),
    )
    ahead = _check_work(request, plan.masks_by_block(texts, infill=infill), server.limits, model)
    request = dataclasses.replace(request, rows_ahead=ahead)
    if sampling.grammar is None:
        return request
    return under_grammar(sampling.grammar, request, model, server.limits.grammar_timeout_s)


def _places_of_text(
    config: SamplerConfig, infill: int, sampling: SamplingFields, model: ModelFacts
) -> list[int]:
    """Positions of the canvas that hold text of its template, which is known to fit."""
    given = config.given_text
    if given is None:
        return []
    if given.choices is not None:
        check_choices(given, infill, sampling, model.mask_token_id)
    return given.places_of_text(model.mask_token_id)


def _masks_to_write(
    prompt: Sequence[int], config: SamplerConfig, limits: EngineSettings, model: ModelFacts
) -> int:
    """Masks of the prompt that the request wants written."""
    masks = list(prompt).count(model.mask_token_id) * config.frame.infill
    limits.check("prompt", masks)
    return masks


def _check_prompt(prompt: Sequence[int], model: ModelFacts) -> None:
    _check_tokens("prompt", prompt, model.vocab_size, "use this model's tokenizer")
    if len(prompt) >= model.max_model_len:
        raise ValueError(
            f"prompt: expected less than the {model.max_model_len} tokens that the context holds, "
            f"got {len(prompt)}; shorten it"
        )
    if model.shift and (not prompt or prompt[0] == model.mask_token_id):
        raise ValueError(
            "prompt: expected a token before the first mask, since this model predicts a position "
            "from the one before it, got none; begin the prompt with some text or the tokenizer's "
            "beginning of text"
        )


def _max_tokens(
    config: SamplerConfig, plan: CanvasPlan, sampling: SamplingFields, own: bool
) -> int:
    """Tokens that are sent at most.

    Args:
        config: the request's.
        plan: its canvas.
        sampling: its standard fields.
        own: whether it gives a `gen_length` itself, rather than the server.

    Raises:
        ValueError: when `min_tokens` asks for more, which vLLM checks again in another process.
    """
    most = sampling.max_tokens
    if own or config.given_text is not None:
        most = plan.gen_length
    elif config.frame.gen_length is not None:
        most = min(most, plan.gen_length)
    if sampling.min_tokens > most:
        raise ValueError(
            f"min_tokens: expected at most {most}, the most tokens that this request can have, got "
            f"{sampling.min_tokens}; lower it"
        )
    return most


def _passes(config: SamplerConfig) -> int:
    """Sequences in a forward: a guided request has an unconditional copy of as many rows."""
    return 1 + (config.frame.cfg_scale > 0)


def _check_work(
    request: ResolvedRequest, masks: Sequence[int], limits: EngineSettings, model: ModelFacts
) -> int:
    """Refuse too many steps and too much look-ahead; most rows of look-ahead in one step.

    Args:
        request: resolved otherwise.
        masks: masked positions of each block before its first step.
        limits: the server's.
        model: what will decode it.
    """
    config, plan = request.config, request.plan
    policy = request.policy(model.eos_token_id)
    limits.check("steps", sum(policy.step_limit(m, plan.steps_for(m)) for m in masks))
    length = request.prompt_len + plan.gen_length
    # A supposition runs the rows at which its positions are read as well: at most one for each.
    ahead = (
        (1 + model.shift)
        * _passes(config)
        * max(
            policy.rows_ahead(masks=m, quota=_most_due(config, plan, m), length=length)
            for m in set(masks)
        )
    )
    limits.check("policy", ahead)
    return ahead


def _most_due(config: SamplerConfig, plan: CanvasPlan, masks: int) -> int:
    return most_tokens_due(config.frame.schedule, masks=masks, steps=plan.steps_for(masks))


def _check_tokens(name: str, tokens: Collection[int], vocab_size: int, remedy: str) -> None:
    wrong = [token for token in tokens if not 0 <= token < vocab_size]
    if wrong:
        raise ValueError(
            f"{name}: expected token ids from 0 to {vocab_size - 1}, got {shown(wrong[0])}; "
            f"{remedy}"
        )


def _seed(seed: int | None, default: int | None) -> int:
    seed = default if seed is None else seed
    if seed is None:
        return secrets.randbits(31)
    if not -(2**63) <= seed < 2**63:
        raise ValueError(
            f"seed: expected an integer of 64 bits, got {shown(seed)}; choose a smaller one"
        )
    return seed


def _top_logprobs(logprobs: int | None, vocab_size: int) -> int:
    if logprobs == ALL:
        return vocab_size
    return min(logprobs or 0, vocab_size)


def _constraints(
    config: SamplerConfig, sampling: SamplingFields, text_end: int, model: ModelFacts
) -> TokenConstraints | None:
    """What the request says about every token; None if it says nothing.

    What ends a request may not be written before the end of its template's last text.

    Raises:
        ValueError: when tokens do not exist, or none is left to be written.
    """
    bias, allowed, size = sampling.logit_bias, sampling.allowed_token_ids, model.vocab_size
    if not (sampling.constrains(size) or text_end):
        return None
    words = [tuple(word) for word in sampling.bad_words]
    _check_tokens("logit_bias", bias, size, "correct it")
    _check_tokens("allowed_token_ids", allowed or (), size, "correct it")
    for word in words:
        _check_tokens("bad_words", word, size, "remove words that the model cannot write")
    if not np.isfinite(list(bias.values())).all():
        raise ValueError(f"logit_bias: expected finite numbers, got {shown(bias)}; correct them")
    constraints = TokenConstraints(
        everywhere=Constraint(
            allowed_token_ids=None if allowed is None else np.unique(np.array(allowed, np.int64)),
            banned_token_ids=np.array(sorted({w[0] for w in words if len(w) == 1}), np.int64),
            biased_token_ids=np.array(list(bias), np.int64),
            logit_bias=np.array(list(bias.values()), np.float64),
            top_k=sampling.top_k if 0 < sampling.top_k < size else 0,
            top_p=float(sampling.top_p),
            min_p=float(sampling.min_p),
        ),
        min_tokens=max(sampling.min_tokens, text_end),
        # A checkpoint may name ends of text that its network has no logits for.
        stop_token_ids=tuple(sorted(t for t in sampling.stop_token_ids if 0 <= t < size)),
        bad_words=tuple(word for word in words if len(word) > 1),
    )
    never = [model.eos_token_id] if config.frame.logits_eos_inf else []
    everywhere = constraints.everywhere.banning(never)
    writable = dataclasses.replace(constraints, everywhere=everywhere)
    if not writable.tokens_left(size, model.mask_token_id):
        raise ValueError(
            "allowed_token_ids: expected at least one token that bad_words, min_tokens and "
            "logits_eos_inf leave over, got none; loosen one of them"
        )
    return constraints
