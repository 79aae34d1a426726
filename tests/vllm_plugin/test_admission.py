"""A request that cannot be served is refused before the engine sees it, and says why."""

import copy
import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from engine_config import engine_config
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from boe_vllm.request.config import parse_sampler_config
from boe_vllm.request.resolved import ResolvedRequest
from boe_vllm.vllm_plugin import admission, plugin, transport

PROMPT = list(range(2, 12))  # 10 tokens of a context of 64


@pytest.fixture(scope="module")
def config():
    return engine_config(sampler="boe", sampler_config={"rho": 0.5})


def with_server(config, **fields):
    """The same engine with other defaults of the server."""
    changed = copy.copy(config)
    changed.additional_config = {
        "sampler": "boe",
        "sampler_config": parse_sampler_config({"policy": "boe", **fields}).as_dict(),
    }
    return changed


def admitted(config, prompt=PROMPT, **fields):
    params = SamplingParams(**fields)
    return admission.admit(prompt, params, config).plan, params


def processor(config):
    """What `resolve_early` needs of vLLM's input processing, where there is no tokenizer."""
    return SimpleNamespace(
        vllm_config=config,
        tokenizer=None,
        generation_config_fields={},
        renderer=SimpleNamespace(get_eos_token_id=lambda: None),
    )


def early(config, params, prompt=PROMPT):
    prompt = {"type": "token", "prompt_token_ids": prompt}
    return admission.resolve_early(prompt, params, processor(config))


def request_of(params, prompt=PROMPT, **changes):
    fields = {
        "request_id": "0",
        "prompt_token_ids": prompt,
        "mm_features": None,
        "sampling_params": params,
        "pooling_params": None,
        "arrival_time": 0.0,
        "lora_request": None,
        "cache_salt": None,
        "data_parallel_rank": None,
    }
    return EngineCoreRequest(**(fields | changes))


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 1.5},
        {"prompt_logprobs": 1},
        {"logprob_token_ids": [1]},
        {"prompt_logprob_token_ids": np.zeros((9, 1), np.int64)},
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


CHOICE = {"structured_outputs": StructuredOutputsParams(choice=["a"])}
GRAMMAR = {"structured_outputs": StructuredOutputsParams(grammar='root ::= "a"')}
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
        (PROMPT, {"min_tokens": 1}, {"choices": [[3]]}, "min_tokens: expected none beside choices"),
        (PROMPT, {"logprobs": 1}, {"choices": [[3]]}, "logprobs: expected none beside choices"),
        (PROMPT, {"allowed_token_ids": [50]}, {}, "allowed_token_ids: .*from 0 to 49, got 50"),
        (PROMPT, {"logit_bias": {-1: 1.0}}, {}, "logit_bias: .*from 0 to 49, got -1"),
        (PROMPT, {"seed": 2**63}, {}, "seed: expected an integer of 64 bits"),
        (PROMPT, {"allowed_token_ids": [1]}, {"logits_eos_inf": True}, "allowed_token_ids: "),
        (PROMPT, {}, {"choices": [[3], [3]]}, "choices: expected answers that differ"),
        (PROMPT, {}, {"canvas_template": [[3]]}, "canvas_template: expected a number of masks"),
        (PROMPT, {}, {"canvas_template": [60]}, "canvas_template: .*at most 54"),
        (PROMPT, CHOICE, {}, "structured_outputs: expected a server with a tokenizer"),
        (PROMPT, CHOICE, {"choices": [[3]]}, "choices: expected none beside a grammar"),
        (PROMPT, GRAMMAR, {}, "structured_outputs: expected a server with a tok"),
    ],
    ids=str,
)
def test_demands_that_cannot_be_met_are_refused(config, prompt, fields, extra, message):
    with pytest.raises(VLLMValidationError, match=message) as error:
        admitted(config, prompt, extra_args=extra, **fields)
    assert error.value.parameter == message.partition(":")[0]


def test_given_text_decides_the_canvas(config):
    plan, params = admitted(config, extra_args={"canvas_template": [[3], 4]}, max_tokens=1)
    assert (plan.gen_length, params.max_tokens) == (5, 5)
    plan, params = admitted(config, extra_args={"choices": [[3, 4], [5]]}, max_tokens=1)
    assert (plan.gen_length, params.max_tokens) == (3, 3)


def test_nothing_ends_before_a_templates_last_text(config):
    _, params = admitted(config, extra_args={"canvas_template": [2, [3], 4]}, min_tokens=1)
    constraints = admission.read_resolved(params).constraints
    assert (constraints.min_tokens, constraints.stop_token_ids) == (3, (1,))
    assert params.min_tokens == 3  # of vLLM's stop strings


def test_log_probabilities_end_with_the_vocabulary(config):
    for asked, given in ((3, 3), (50, 50), (60, 50), (-1, 50), (0, 0), (None, None)):
        _, params = admitted(config, logprobs=asked)
        resolved = admission.read_resolved(params)
        assert params.logprobs == given
        assert (resolved.logprobs, resolved.top_logprobs) == (given is not None, given or 0)


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
    with pytest.raises(VLLMValidationError, match=message) as error:
        admitted(changed, extra_args=extra)
    assert error.value.parameter == message.partition(":")[0]
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
    with pytest.raises(VLLMValidationError, match=message) as error:
        admitted(config, extra_args=extra)
    assert error.value.parameter in extra


@pytest.mark.parametrize("token", [-1, 50, 10**9])
def test_a_token_outside_the_vocabulary_is_refused(config, token):
    with pytest.raises(VLLMValidationError, match=f"prompt: .*from 0 to 49, got {token}"):
        admitted(config, prompt=[2, token])


def test_masks_to_write_are_bounded(config):
    changed = copy.copy(config)
    changed.additional_config = config.additional_config | {"max_infill": 2}
    assert admitted(changed, prompt=[2, 49, 49])
    assert admitted(changed, prompt=[2, 49, 49, 49], extra_args={"infill": False})
    with pytest.raises(VLLMValidationError, match="prompt: expected at most 2 masks to write") as e:
        admitted(changed, prompt=[2, 49, 49, 49])
    assert e.value.parameter == "prompt"


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


def test_a_server_may_name_the_seed_of_those_that_name_none(config):
    changed = copy.copy(config)
    changed.additional_config = config.additional_config | {"default_seed": 7}
    assert admitted(changed)[1].seed == 7
    assert admitted(changed, seed=5)[1].seed == 5


# ---- once ----------------------------------------------------------------------------------------


def test_the_resolved_request_survives_the_way_to_the_engine(config):
    for extra, fields in (
        ({"policy": "boe", "rho": 0.75, "gen_length": 32, "block_length": 8}, {"logprobs": 2}),
        ({"canvas_template": [2, [3], 4], "trace": True}, {"min_tokens": 4}),
        ({"choices": [[3, 4], [5]], "cfg_scale": 1.0}, {"temperature": 0.5, "top_p": 0.5}),
        ({}, {"logit_bias": {3: 1.5}, "allowed_token_ids": [3, 2], "stop_token_ids": [4]}),
        ({"policy": "remdm", "schedule": "cosine", "tokens_per_step": 3}, {"temperature": 0.0}),
    ):
        params = SamplingParams(**fields, extra_args=extra)
        request = request_of(params)
        resolved = admission.admit(PROMPT, params, config)
        admission.check_transport(request)
        got = MsgpackDecoder(EngineCoreRequest).decode(MsgpackEncoder().encode(request))
        again = admission.read_resolved(got.sampling_params)
        assert again.to_wire() == resolved.to_wire() == json.loads(json.dumps(resolved.to_wire()))
        assert (again.config, again.plan) == (resolved.config, resolved.plan)
        assert type(again.config.settings) is type(resolved.config.settings)
        assert (resolved.constraints is None) == (again.constraints is None)
        if resolved.constraints is None:
            continue
        before, after = resolved.constraints.everywhere, again.constraints.everywhere
        for field in dataclasses.fields(before):
            values = getattr(before, field.name), getattr(after, field.name)
            assert type(values[0]) is type(values[1]), field.name


def test_a_request_is_resolved_once(config, monkeypatch):
    calls = []
    resolve = admission.resolve
    monkeypatch.setattr(
        admission, "resolve", lambda *args, **kw: calls.append(1) or resolve(*args, **kw)
    )
    params = SamplingParams(extra_args={"gen_length": 32, "session_id": "s"})
    request = request_of(early(config, params).clone())
    admission.admit_request(request, config)
    assert len(calls) == 1 and request.sampling_params.extra_args["session_id"] == "s"
    assert admission.read_resolved(request.sampling_params).plan.gen_length == 32
    monkeypatch.setattr(admission, "parse_sampler_config", None, raising=False)
    assert len(calls) == 1


def test_each_of_several_samples_has_its_own_seed(config):
    _, params = admitted(config, n=2, seed=-2)
    for seed in (-2, -1):  # as vLLM counts them up
        child = params.clone()
        child.n, child.seed = 1, seed
        decoded = MsgpackDecoder(SamplingParams).decode(MsgpackEncoder().encode(child))
        assert admission.read_resolved(decoded).seed == seed


def test_no_client_can_send_a_resolved_request(config):
    _, params = admitted(config)
    forged = SamplingParams(extra_args={admission.KEY: params.extra_args[admission.KEY]})
    with pytest.raises(VLLMValidationError, match=f"unknown field '{admission.KEY}'"):
        admission.admit(PROMPT, forged, config)
    with pytest.raises(VLLMValidationError, match=f"unknown field '{admission.KEY}'"):
        early(config, forged)


def test_a_request_that_went_around_admission_is_told_so():
    with pytest.raises(ValueError, match="input processing"):
        admission.read_resolved(SamplingParams())


def test_the_callers_params_stay_as_they_are(config):
    params = SamplingParams(extra_args={"gen_length": 32})
    before = repr(params)
    assert early(config, params) is not params
    assert repr(params) == before and params.seed is None


def test_a_bad_request_is_known_before_a_stream_begins(config):
    bad = SamplingParams(extra_args={"rho": 2})
    with pytest.raises(VLLMValidationError, match="rho"):
        early(config, bad)
    text = "text, whose tokens are not known yet"
    assert admission.resolve_early(text, bad, processor(config)) is bad
    whole = early(config, SamplingParams(max_tokens=None))
    assert isinstance(whole.extra_args[admission.KEY], ResolvedRequest)
    assert whole.max_tokens == 64 - len(PROMPT)


def test_the_server_learns_of_it_when_it_makes_the_request(config):
    """Not when it first reads from it: a streaming response has its status by then."""
    plugin.register()
    engine = SimpleNamespace(vllm_config=config, input_processor=processor(config))
    bad = SamplingParams(extra_args={"rho": 2})
    with pytest.raises(VLLMValidationError, match="rho"):
        AsyncLLM.generate(engine, {"type": "token", "prompt_token_ids": PROMPT}, bad, "id")


# ---- what the engine checks again ----------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, extra, server, name",
    [
        ({"min_tokens": 10}, {"canvas_template": [[3], 2]}, {}, "min_tokens"),
        ({"min_tokens": 10}, {"gen_length": 8}, {}, "min_tokens"),
        ({"min_tokens": 10}, {}, {"gen_length": 8}, "min_tokens"),
        ({"min_tokens": 20, "max_tokens": 30}, {"canvas_template": [[3], 2]}, {}, "min_tokens"),
        ({"min_tokens": 3}, {"choices": [[3]]}, {}, "min_tokens"),
        ({"top_k": 2**70}, {}, {}, "top_k"),
        ({"min_tokens": 1.5}, {}, {}, "min_tokens"),
        ({"ignore_eos": "no"}, {}, {}, "ignore_eos"),
        ({"stop": ["\ud800"]}, {}, {}, "stop"),
        ({"stop_token_ids": [2**64]}, {}, {}, "stop_token_ids"),
        ({}, {"tokens_per_step": str(10**30)}, {}, "tokens_per_step"),
        ({}, {"session_id": object()}, {}, "extra_args"),
    ],
    ids=str,
)
def test_what_would_end_the_engine_is_refused_by_name(config, fields, extra, server, name):
    changed = with_server(config, **server) if server else config
    for admit in (
        lambda params: early(changed, params),
        lambda params: admission.admit_request(request_of(params), changed),
    ):
        with pytest.raises(VLLMValidationError) as error:
            admit(SamplingParams(**({"max_tokens": 16} | fields), extra_args=extra or None))
        assert error.value.parameter == name, error.value


def test_other_fields_of_the_request_are_tried_too(config):
    for changes, name in (
        ({"priority": 10**30}, "priority"),
        ({"priority": 0.5}, "priority"),
        ({"cache_salt": "\ud800"}, "cache_salt"),
    ):
        with pytest.raises(VLLMValidationError) as error:
            admission.admit_request(request_of(SamplingParams(), **changes), config)
        assert error.value.parameter == name


def test_refusals_name_the_field():
    for text, name in (
        ("rho: expected less, got 2; lower it", "rho"),
        ("canvas_template.0: expected text", "canvas_template"),
        ("unknown field 'nope' for policy", "nope"),
        ("unknown field '-- a' for policy", "-- a"),
        ("unknown field '' for policy", "vllm_xargs"),
        ("steps and tokens_per_step exclude each other", "steps"),
        ("active='candidates' with objective", "active"),
    ):
        assert transport.refusal(ValueError(text)).parameter == name


# ---- text that holds JSON ------------------------------------------------------------------------

DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "extra, message",
    [
        ({"canvas_template": DEEP}, "canvas_template: expected at most 8 levels"),
        ({"choices": '{"a": ' * 5000 + "1" + "}" * 5000}, "choices: expected at most 8 levels"),
        ({"steps": DEEP}, "steps: expected at most 8 levels"),
        ({"canvas_template": [[[[[[[[[[3]]]]]]]]]]}, "canvas_template: expected at most 8"),
        ({"canvas_template": "[" + "9" * 5000 + "]"}, "canvas_template: expected numbers of ord"),
        ({"canvas_template": "[" + " " * (1 << 20) + "2]"}, "canvas_template: .*1048576 char"),
        ({"canvas_template": '["\\ud800", 2]'}, "canvas_template: piece 0: expected text or a l"),
        ({"canvas_template": "[" + "9" * 4000 + "]"}, "canvas_template: .* canvas of at most 54"),
        ({"canvas_template": [[3], {"a": 1}]}, "canvas_template: piece 1: expected text or a list"),
        ({"canvas_template": [0]}, "canvas_template: piece 0: .*number of masks, got 0"),
        ({"canvas_template": [True, 2.5]}, "canvas_template: piece 0: .*, got True"),
        ({"choices": [[3], 4]}, "choices: choice 1: expected text or a list of token ids, got 4"),
        ({"choices": [[3, -1]]}, "choices: choice 0: "),
        ({"choices": "no list"}, "choices: .*list"),
        ({"block_length": "1" * 5000}, "block_length: "),
        ({"x" * 5000: 1}, "unknown field 'xxx"),
        ({"-: ": DEEP}, "unknown field '-: '"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_nested_text_is_bounded_and_named(config, extra, message):
    with pytest.raises(VLLMValidationError, match=message) as error:
        admitted(config, extra_args=extra)
    (name,) = extra
    assert name.startswith(error.value.parameter.partition("...")[0])
    assert len(str(error.value)) < 12_000


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"prompt_token_ids": None, "prompt_embeds": object()}, "prompt_embeds"),
        ({"resumable": True}, "prompt"),
    ],
    ids=["embeddings", "in parts"],
)
def test_other_kinds_of_prompts_are_refused(config, changes, name):
    with pytest.raises(VLLMValidationError, match="not support") as error:
        admission.admit_request(request_of(SamplingParams(), **changes), config)
    assert error.value.parameter == name
