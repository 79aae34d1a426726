"""A request that cannot be served is refused before the engine sees it, and says why."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
from engine_config import engine_config
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM

from boe_vllm.vllm_plugin import admission, plugin

PROMPT = list(range(2, 12))  # 10 tokens of a context of 64


@pytest.fixture(scope="module")
def config():
    return engine_config(sampler="boe", sampler_config={"rho": 0.5})


def with_server(config, **fields):
    """The same engine with other defaults of the server."""
    changed = copy.copy(config)
    changed.additional_config = {
        "sampler": "boe",
        "sampler_config": admission.parse_sampler_config({"policy": "boe", **fields}).as_dict(),
    }
    return changed


def admitted(config, prompt=PROMPT, **fields):
    params = SamplingParams(**fields)
    plan = admission.admit(prompt, params, config)
    return plan, params


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 1.5},
        {"prompt_logprobs": 1},
        {"logprob_token_ids": [1]},
        {"prompt_logprob_token_ids": np.zeros((9, 1), np.int64)},
        {"structured_outputs": StructuredOutputsParams(choice=["a"])},
        {"trace_decode_token_ids": [1]},
        {"thinking_token_budget": 5},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_field_without_meaning_here_is_refused_by_name(config, fields):
    (name,) = fields
    with pytest.raises(VLLMValidationError, match=f"{name} is not supported .* remove it") as error:
        admitted(config, **fields)
    assert error.value.parameter == name


BANNED_EOS = {"allowed_token_ids": [1], "min_tokens": 2}


@pytest.mark.parametrize(
    "prompt, fields, extra, message",
    [
        (PROMPT, {"bad_words": ["no"]}, {}, "bad_words: .*no tokenizer"),
        (PROMPT, BANNED_EOS, {}, "allowed_token_ids: expected at least one token"),
        (PROMPT, {"allowed_token_ids": [49]}, {}, "allowed_token_ids: expected at least one"),
        (PROMPT, {"logit_bias": {3: float("nan")}}, {}, "logit_bias: .*finite"),
        (PROMPT, {}, {"choices": [[3, 50]]}, "choices: expected token ids below 50, got 50"),
        (PROMPT, {}, {"choices": ["text"]}, "choices: expected token ids where .* no tokenizer"),
        (PROMPT, {}, {"choices": [[3, 49]]}, "choices: expected no masks"),
        ([2, 49], {}, {"choices": [[3]]}, "choices: expected no masks"),
        (PROMPT, {"min_tokens": 1}, {"choices": [[3]]}, "min_tokens is not supported by choices"),
        (PROMPT, {"logprobs": 1}, {"choices": [[3]]}, "logprobs is not supported by choices"),
        (PROMPT, {}, {"choices": [[3], [3]]}, "choices: expected answers that differ"),
        (PROMPT, {}, {"canvas_template": [[3]]}, "canvas_template: expected a number of masks"),
        (PROMPT, {}, {"canvas_template": [60]}, "canvas_template: .*at most 54"),
    ],
    ids=str,
)
def test_demands_that_cannot_be_met_are_refused(config, prompt, fields, extra, message):
    with pytest.raises(VLLMValidationError, match=message):
        admitted(config, prompt, extra_args=extra, **fields)


def test_content_decides_the_canvas(config):
    plan, params = admitted(config, extra_args={"canvas_template": [[3], 4]}, max_tokens=1)
    assert (plan.gen_length, params.max_tokens) == (5, 5)
    plan, params = admitted(config, extra_args={"choices": [[3, 4], [5]]}, max_tokens=1)
    assert (plan.gen_length, params.max_tokens) == (3, 3)


def test_nothing_ends_before_a_templates_last_text(config):
    _, params = admitted(config, extra_args={"canvas_template": [2, [3], 4]}, min_tokens=1)
    from boe_vllm.vllm_plugin.token_fields import token_constraints_of

    token_constraints = token_constraints_of(
        admission.plan_request(10, params, config)[0], params, 49
    )
    assert (token_constraints.min_tokens, token_constraints.stop_tokens) == (3, (1,))


@pytest.mark.parametrize(
    "limits, extra, message",
    [
        ({"max_gen_length": 8}, {"gen_length": 16}, "gen_length: expected at most 8 tokens"),
        ({"max_steps": 20}, {"gen_length": 32}, "steps: expected at most 20 .*got 32"),
        ({}, {"gen_length": 32, "steps": 10**9}, "steps: expected at most 16384"),
        (
            {"max_lookahead_rows": 100},
            {"policy": "info-gain", "candidates": 50},
            "policy: expected at most 100 rows",
        ),
        ({}, {"policy": "lookum", "paths": 10**9}, "policy: expected at most 65536 rows"),
        ({}, {"policy": "klass", "history": 10**9}, "history: .*1024"),
        ({"max_trace_length": 8}, {"trace": True, "gen_length": 16}, "trace: expected at most 8"),
    ],
    ids=str,
)
def test_a_request_beyond_the_servers_limits_is_refused(config, limits, extra, message):
    changed = copy.copy(config)
    changed.additional_config = config.additional_config | limits
    with pytest.raises(VLLMValidationError, match=message):
        admitted(changed, extra_args=extra)
    assert admitted(changed, extra_args={"gen_length": 8, "block_length": 8})


def test_neutral_values_are_admitted(config):
    neutral = {"top_k": -1, "logit_bias": {}, "bad_words": [], "min_p": 0.0}
    plan, params = admitted(config, max_tokens=8, **neutral, logprobs=3, stop=["x"], n=2)
    assert (plan.gen_length, params.max_tokens) == (8, 8)


@pytest.mark.parametrize(
    "extra, message",
    [
        ({"policy": "nope"}, "policy: expected one of .*'nope'"),
        ({"rho": 2}, "rho: .* got 2"),
        ({"nope": 2}, "unknown field 'nope'"),
        ({"steps": 7, "gen_length": 32, "block_length": 5}, "gen_length: .*block_length"),
        ({"gen_length": 55}, "gen_length: .*at most 54 tokens"),
    ],
    ids=str,
)
def test_a_bad_request_field_is_a_validation_error(config, extra, message):
    with pytest.raises(VLLMValidationError, match=message):
        admitted(config, extra_args=extra)


@pytest.mark.parametrize("token", [-1, 50, 10**9])
def test_a_token_outside_the_vocabulary_is_refused(config, token):
    with pytest.raises(VLLMValidationError, match=f"prompt: .*from 0 to 49, got {token}"):
        admitted(config, prompt=[2, token])


def test_a_mask_in_the_prompt_is_admitted(config):
    assert admitted(config, prompt=[2, 49, 3], max_tokens=4)[0].gen_length == 4


def test_a_canvas_larger_than_the_context_is_refused(config):
    with pytest.raises(VLLMValidationError, match="max_tokens: .*at most 54 tokens.*got 55"):
        admitted(config, max_tokens=55)


def test_a_requests_gen_length_overrides_max_tokens(config):
    assert admitted(config, extra_args={"gen_length": 32})[1].max_tokens == 32
    assert admitted(config, extra_args={"gen_length": 8}, max_tokens=54)[1].max_tokens == 8


def test_a_servers_gen_length_caps_max_tokens(config):
    server = with_server(config, gen_length=32)
    plan, params = admitted(server, max_tokens=54)
    assert (plan.gen_length, params.max_tokens) == (32, 32)
    plan, params = admitted(server, max_tokens=16)
    assert (plan.gen_length, params.max_tokens) == (32, 16)
    assert admitted(server, extra_args={"gen_length": 40})[1].max_tokens == 40


def test_every_request_gets_a_seed_of_its_own(config):
    seeds = {admitted(config)[1].seed for _ in range(8)}
    assert len(seeds) == 8 and None not in seeds
    assert admitted(config, seed=5)[1].seed == 5


def test_the_end_of_text_is_known_without_a_tokenizer(config):
    assert admitted(config)[1].eos_token_id == 1
    assert admitted(config, ignore_eos=True)[1].eos_token_id is None


def test_checking_changes_nothing(config):
    params = SamplingParams(extra_args={"gen_length": 32})
    before = repr(params)
    admission.check(PROMPT, params, config)
    admission.check_early({"type": "token", "prompt_token_ids": PROMPT}, params, config)
    assert repr(params) == before and params.seed is None


def test_a_bad_request_is_known_before_a_stream_begins(config):
    bad = SamplingParams(extra_args={"rho": 2})
    with pytest.raises(VLLMValidationError, match="rho"):
        admission.check_early({"type": "token", "prompt_token_ids": PROMPT}, bad, config)
    admission.check_early("text, whose tokens are not known yet", bad, config)
    admission.check_early({"prompt_token_ids": PROMPT}, SamplingParams(max_tokens=None), config)


def test_the_server_learns_of_it_when_it_makes_the_request(config):
    """Not when it first reads from it: a streaming response has its status by then."""
    plugin.register()
    engine = SimpleNamespace(vllm_config=config)
    bad = SamplingParams(extra_args={"rho": 2})
    with pytest.raises(VLLMValidationError, match="rho"):
        AsyncLLM.generate(engine, {"type": "token", "prompt_token_ids": PROMPT}, bad, "id")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompt_token_ids": None, "prompt_embeds": object()}, "prompt_embeds is not supported"),
        ({"resumable": True}, "a prompt in several parts is not supported"),
    ],
    ids=["embeddings", "in parts"],
)
def test_other_kinds_of_prompts_are_refused(config, changes, message):
    request = {
        "sampling_params": SamplingParams(),
        "prompt_token_ids": PROMPT,
        "prompt_embeds": None,
        "resumable": False,
    }
    with pytest.raises(VLLMValidationError, match=message):
        admission.admit_request(SimpleNamespace(**(request | changes)), config)


def test_every_process_plans_the_same_canvas(config):
    plan, params = admitted(config, extra_args={"gen_length": 32, "block_length": 8, "rho": 0.75})
    again_config, again = admission.plan_request(len(PROMPT), params, config)
    assert again == plan
    assert again_config.settings.rho == 0.75
    assert admission.server_config(config).settings.rho == 0.5
