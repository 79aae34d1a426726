"""Whatever a request says, it is refused or served, and the request beside it never notices.

Each case goes through what the engine's input thread does, where an error would end the engine, and
after each the engine serves a request whose tokens never change. `BOE_VLLM_FUZZ_CASES` sets the
number of cases, 2000 for a release.
"""

import json
import os
import re
from collections import Counter

import jsonschema
import numpy as np
import pydantic
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.sampling_params import (
    RepetitionDetectionParams,
    RequestOutputKind,
    StructuredOutputsParams,
)
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

import boe_vllm
from boe_vllm.base import options
from boe_vllm.policies import POLICY_NAMES, load_policy
from boe_vllm.request.config import FrameConfig
from boe_vllm.request.given_text import GivenText
from boe_vllm.vllm_plugin import admission

REFUSALS = (ValueError, TypeError, AttributeError, VLLMValidationError)  # some are vLLM's own
CASES = int(os.environ.get("BOE_VLLM_FUZZ_CASES", "60"))
CONTEXT, VOCAB, EOS, MASK = 64, 264, 257, 261
ENDS: Counter[str] = Counter()
"""How the cases ended; printed at the end, for `-s`."""
MOST_STEPS = 2000  # of the engine; the server's limit on steps is below it
CONTROL = SamplingParams(
    temperature=1.0, seed=3, max_tokens=6, ignore_eos=True, extra_args={"policy": "boe"}
)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    table = tmp_path_factory.mktemp("table") / "frequencies.json"
    table.write_text(json.dumps({"num_token": 100, "p_baseline_dict": {"49": 30, "50": 20}}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setattr(torch, "set_num_threads", torch.set_num_threads)
        torch.set_num_threads(1)  # requests this small do not gain from more
        llm = LLM(
            boe_vllm.tiny_model_path(),
            sampler="boe",
            sampler_config={"frequencies": str(table)},
            max_model_len=CONTEXT,
            max_num_seqs=4,
            additional_config={"max_steps": 200, "max_lookahead_rows": 4000},
        )
        send_as_to_another_process(llm.llm_engine.engine_core)
        yield llm
        print(f"\n{sum(ENDS.values())} cases: {dict(ENDS)}")
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


class InputThreadError(Exception):
    """An engine of its own process would have ended here."""


def send_as_to_another_process(client):
    """Let a client in the engine's own process do what one outside and the engine would do."""
    add = client.add_request

    def add_request(request):
        sent = MsgpackEncoder().encode(request)
        try:
            received = MsgpackDecoder(EngineCoreRequest).decode(sent)
        except Exception as error:
            raise InputThreadError(str(request.sampling_params)) from error
        add(received)

    client.add_request = add_request


def run(llm, requests, *, early=False, priority=0):
    """Outputs by number, or what refused a request.

    Args:
        llm: to run them on.
        requests: prompts in tokens, and their params.
        early: resolve them first as the HTTP server does.
        priority: of the last one.
    """
    engine, outputs = llm.llm_engine, {}
    for n, (prompt, params) in enumerate(requests):
        number = {"priority": priority if n == len(requests) - 1 else 0}
        prompt = {"prompt_token_ids": prompt}
        try:
            if early:
                params = admission.resolve_early(prompt, params, engine.input_processor)
            engine.add_request(str(n), prompt, params, **number)
        except REFUSALS as error:
            outputs[n] = error
    for _ in range(MOST_STEPS):
        if not engine.has_unfinished_requests():
            return outputs
        for output in engine.step():
            if output.finished:
                outputs[int(output.request_id.partition("-")[0])] = output
    raise AssertionError(f"not done after {MOST_STEPS} steps: {requests[-1]}")


@pytest.fixture(scope="module")
def control(llm):
    return run(llm, [([65, 58, 49], CONTROL)])[0].outputs[0].token_ids


def check(llm, control, prompt, params, **how):
    """Run a request beside the control request, and then the control request once more."""
    outputs = run(llm, [([65, 58, 49], CONTROL), (prompt, params)], **how)
    assert outputs[0].outputs[0].token_ids == control
    again = run(llm, [([65, 58, 49], CONTROL)])
    assert again[0].outputs[0].token_ids == control
    refused = outputs[1] if isinstance(outputs[1], Exception) else None
    if refused is not None and how.get("early"):
        assert isinstance(refused, VLLMValidationError) and refused.parameter, refused
    if refused is not None:
        assert str(refused)
        ENDS["refused"] += 1
        return refused
    assert len(outputs[1].outputs) == params.n
    for completion in outputs[1].outputs:
        own = ("repetition",) if params.repetition_detection else ()
        assert completion.finish_reason in ("stop", "length", "error", *own)
        ENDS[completion.finish_reason] += 1
        if completion.finish_reason == "error":  # only what cannot be known before
            assert "expected a token that may be written, found none" in completion.stop_reason
        else:
            assert MASK not in completion.token_ids
    return outputs[1]


TEMPLATE = {"canvas_template": '["abc", 2]'}
NEIGHBOURS = [
    # vLLM's fields, ours, and the field that is at fault; None if the request is served.
    ({"max_tokens": 16, "min_tokens": 10}, TEMPLATE, "min_tokens"),
    ({"max_tokens": 16, "min_tokens": 5}, TEMPLATE, None),
    ({"max_tokens": 1, "min_tokens": 0}, TEMPLATE, None),
    ({"max_tokens": 16, "min_tokens": 10}, {"gen_length": 8}, "min_tokens"),
    ({"max_tokens": 16, "min_tokens": 8}, {"gen_length": 8}, None),
    ({"max_tokens": 16, "min_tokens": 1}, {"choices": '["1", "23"]'}, "min_tokens"),
    ({"n": 3, "temperature": 1.0}, {"choices": '["1", "23"]'}, None),
    ({"n": 3, "temperature": 1.0, "seed": 2**63 - 1}, {}, None),
    ({"n": 3, "temperature": 1.0, "seed": -3}, {}, None),
    ({"logprobs": 20}, {}, None),
    ({"logprobs": 2**40}, {}, "logprobs"),
    ({"allowed_token_ids": [264]}, {}, "allowed_token_ids"),
    ({"allowed_token_ids": [263]}, {}, None),
    ({"logit_bias": {264: 1.0}}, {}, "logit_bias"),
    ({"logit_bias": {2**70: 1.0}}, {}, "logit_bias"),
    ({"stop_token_ids": [2**70]}, {}, "stop_token_ids"),
    ({"stop": ["\ud800"]}, {}, "stop"),
    ({"stop": ["b"], "stop_token_ids": [99], "ignore_eos": True}, TEMPLATE, None),
    ({"bad_words": ["\u2603"]}, {}, None),
    ({"top_k": 2**70, "temperature": 1.0}, {}, "top_k"),
    ({"top_k": 2**63, "temperature": 1.0}, {}, None),
    ({"min_tokens": 2**70, "max_tokens": None}, {}, "min_tokens"),
    ({}, {"canvas_template": "[" * 100_000}, "canvas_template"),
    ({}, {"choices": "[" * 100_000}, "choices"),
    ({}, {"choices": '{"a":' * 500 + "1" + "}" * 500}, "choices"),
    ({}, {"steps": "9" * 5000}, "steps"),
    ({}, {"canvas_template": "[" + "9" * 5000 + "]"}, "canvas_template"),
    ({"max_tokens": 16}, {"block_length": 10**18}, None),
    ({"max_tokens": 16}, {"tokens_per_step": 2**63 - 1}, None),
    ({}, {"rho": 10**400}, None),
]


@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("fields, extra, name", NEIGHBOURS, ids=lambda v: str(v)[:30])
def test_what_once_ended_an_engine_is_refused_or_served(llm, control, fields, extra, name, early):
    fields = {"temperature": 0.0, "max_tokens": 6} | fields
    try:
        params = SamplingParams(
            **fields, extra_args=extra or None, output_kind=RequestOutputKind.FINAL_ONLY
        )
    except VLLMValidationError as error:
        assert "extra_args integers" in str(error)
        return
    found = check(llm, control, [120, 61], params, early=early)
    if name is None:
        assert not isinstance(found, Exception), found
    else:
        assert isinstance(found, VLLMValidationError)
        assert found.parameter == name or str(found).startswith(name), found


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([10**9, -(10**9), 10**18, 10**30]),
    st.floats(),
    st.floats(0, 1),
    st.text(max_size=8),
    st.sampled_from(["{", "[1, 2]", '{"a": 1}', "none", "top", "kl", "mask"]),
    st.sampled_from(["[" * 5000, '{"a":' * 30 + "1" + "}" * 30, "9" * 5000, '["\\ud800"]']),
    st.lists(st.integers(-1, 300) | st.text(max_size=3), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
BLOCKS = st.sampled_from([1, 2, 4, 8, 16, 32])  # lengths that often divide


def values(schema):
    """Values that a JSON schema allows, small ones and the bounds themselves."""
    if "anyOf" in schema:
        return st.one_of([values(option) for option in schema["anyOf"]])
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    kind = schema["type"]
    if kind == "array":
        sizes = {"min_size": schema.get("minItems", 0), "max_size": 4}
        return st.lists(values(schema["items"]), **sizes)
    if kind == "integer":
        least, most = schema.get("minimum", -2), schema.get("maximum", 10**9)
        # Tokens of a list begin at 0; what begins at 1 is a number of something.
        small = st.integers(least, min(most, VOCAB - 2 if least == 0 else 40))
        return st.one_of(small, small, small, st.sampled_from([least, most]))
    if kind == "number":
        least = schema.get("minimum", schema.get("exclusiveMinimum", -1e9))
        most = schema.get("maximum", schema.get("exclusiveMaximum", 1e9))
        ends = {
            "exclude_min": "exclusiveMinimum" in schema,
            "exclude_max": "exclusiveMaximum" in schema and most <= 2,
        }
        usual = st.floats(least, min(most, 2.0), **ends)
        return usual if most <= 2 else st.one_of(usual, usual, st.just(most))
    simple = {
        "boolean": st.booleans(),
        "null": st.none(),
        "string": st.text(min_size=schema.get("minLength", 0), max_size=4),
    }
    return simple[kind]


def fields_of(config):
    """A strategy for each field of a settings class, from the class itself."""
    schema = pydantic.TypeAdapter(config).json_schema()
    assert list(schema["properties"]) == options.names(config)
    return {name: values(field) for name, field in schema["properties"].items()}


FRAME = fields_of(FrameConfig) | {"block_length": BLOCKS} | fields_of(GivenText)
OF_POLICY = {name: fields_of(load_policy(name).Config) for name in sorted(POLICY_NAMES)}


def seldom(draw, times):
    """Once in so many times; not at a bound, which hypothesis likes."""
    return draw(st.integers(0, times - 1)) == times // 2


@st.composite
def fields(draw):
    """Fields of a request: mostly those of one policy, mostly with values that could be right."""
    policy = draw(st.sampled_from([*OF_POLICY, "boe", "boe", "boe", None]))
    given_fields = {} if policy is None else {"policy": policy}
    own = OF_POLICY["boe" if policy is None else policy]
    for known, most in ((FRAME, 3), (own, 4)):
        if known:
            names = st.lists(st.sampled_from(sorted(known)), max_size=most, unique=True)
            for name in draw(names):
                given_fields[name] = draw(JUNK if seldom(draw, 16) else known[name])
    if "choices" in given_fields and not seldom(draw, 4):  # which stand alone
        given_fields = {k: v for k, v in given_fields.items() if k in ("choices", "trace")}
    if seldom(draw, 20):
        given_fields[draw(st.text(max_size=5))] = draw(JUNK)
    return given_fields


SETTINGS = {
    "temperature": st.sampled_from([0.0, 1e-6, 1e-4, 0.7, 1.0, 2.0, 1e6]),
    "top_p": st.floats(1e-9, 1),
    "top_k": st.integers(-1, 300),
    "min_p": st.floats(0, 1),
    "n": st.integers(1, 3),
    "max_tokens": st.integers(1, 50) | st.none(),
    "min_tokens": st.integers(0, 5) | st.integers(0, 50),
    "seed": st.integers(-(2**63), 2**63 - 1) | st.sampled_from([-1, -2, 2**63 - 1]),
    "logprobs": st.integers(-1, 21),
    "stop": st.lists(st.text(min_size=1, max_size=2), max_size=2),
    "ignore_eos": st.booleans(),
    "logit_bias": st.dictionaries(st.integers(-1, 270), st.floats(-200, 200), max_size=3),
    "allowed_token_ids": st.lists(st.integers(-1, 265), max_size=5),
    "bad_words": st.lists(st.text(min_size=1, max_size=3), max_size=3),
    "stop_token_ids": st.lists(st.integers(-1, 265), max_size=2),
    "include_stop_str_in_output": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "detokenize": st.booleans(),
    "spaces_between_special_tokens": st.booleans(),
    "flat_logprobs": st.booleans(),
    "watermarking": st.none() | st.booleans(),
    "stream_interval": st.none() | st.integers(1, 5),
    "skip_reading_prefix_cache": st.none() | st.booleans(),
    "prompt_logprob_start": st.none() | st.integers(0, 3),
    "routed_experts_prompt_start": st.integers(0, 3),
    "repetition_detection": st.none()
    | st.builds(
        RepetitionDetectionParams,
        max_pattern_size=st.integers(1, 4),
        min_pattern_size=st.integers(1, 1),
        min_count=st.integers(2, 4),
    ),
    "structured_outputs": st.sampled_from(
        [
            {"regex": "[ab]{2,}(-[0-9])?"},
            {"choice": ["a", "bc"]},
            {"json": {"properties": {"a": {"type": "integer"}}, "required": ["a"]}},
            {"json": {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}},
            {"json_object": True},
            {"regex": "[ab"},
            {"regex": "\u2603{60}"},
            {"grammar": 'root ::= "a" root "b" | "c"'},
            {"grammar": 'start: "(" start ")" | /[0-9]+/'},
            {"grammar": "start: ("},
            {"json": {"type": "integer", "minimum": 12}},
            {"structural_tag": "{}"},
        ]
    ).map(lambda fields: StructuredOutputsParams(**fields)),
}
# What is vLLM's own, or set beside the cases: no client chooses it.
NOT_ASKED = {"extra_args", "output_kind", "skip_clone", "output_text_buffer_length"}
REFUSED_SETTINGS = {
    "repetition_penalty": st.floats(0.5, 2),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "prompt_logprobs": st.none() | st.integers(0, 5),
    "thinking_token_budget": st.integers(0, 5),
    "logprob_token_ids": st.lists(st.integers(0, 263), max_size=3),
    "prompt_logprob_token_ids": st.just(np.zeros((2, 1), np.int64)),
    "trace_decode_token_ids": st.lists(st.integers(0, 263), max_size=3),
}
# What the HTTP server's own checks leave out, and no caller of the Python interface should send.
WRONG_TYPES = {
    "top_k": st.sampled_from([5.0, 2**64, "5"]),
    "max_tokens": st.sampled_from([5.5, "5", 2**64]),
    "min_tokens": st.sampled_from([1.0, 2**64]),
    "seed": st.sampled_from([1.5, "x", 2**64, 2**63]),
    "logprobs": st.sampled_from([1.0, True]),
    "stop": st.sampled_from([["\ud800"], [3], "x"]),
    "stop_token_ids": st.sampled_from([[2**64], [1.0], ["a"]]),
    "allowed_token_ids": st.sampled_from([[1.0], ["a"], 3]),
    "bad_words": st.sampled_from([["\ud800"], [3]]),
    "ignore_eos": st.sampled_from(["no", 1]),
}


@st.composite
def settings_of_vllm(draw):
    """Some of vLLM's own fields."""
    known = SETTINGS
    for others in (REFUSED_SETTINGS, WRONG_TYPES):
        known = others if seldom(draw, 16) else known
    names = draw(st.lists(st.sampled_from(sorted(known)), max_size=4, unique=True))
    if seldom(draw, 5):
        known, names = SETTINGS | known, [*names, "structured_outputs"]
    return {name: draw(known[name]) for name in names}


def test_every_sampling_field_of_vllm_is_tried():
    fields = {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")}
    assert fields == {*SETTINGS, *REFUSED_SETTINGS, *NOT_ASKED}


BYTES = st.integers(32, 126)
NO_PROMPT = st.lists(st.sampled_from([65, MASK, VOCAB, 10**6, -1]), max_size=4)


@st.composite
def prompts(draw):
    """Text, text to fill in, any tokens, or what is no prompt."""
    if seldom(draw, 12):
        return draw(NO_PROMPT)
    token = draw(st.sampled_from([BYTES, BYTES | st.just(MASK), st.integers(0, VOCAB - 1)]))
    return draw(st.lists(token, min_size=1, max_size=CONTEXT + 2 if seldom(draw, 6) else 20))


@settings(
    max_examples=CASES,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    prompt=prompts(),
    extra_args=fields(),
    chosen=settings_of_vllm(),
    early=st.booleans(),
    priority=st.just(0) | st.sampled_from([-1, 2**31, 10**30]),
)
def test_any_request_is_refused_or_served_and_harms_nobody(
    llm, control, prompt, extra_args, chosen, early, priority
):
    if chosen.get("n", 1) > 1:
        chosen = {"temperature": 1.0} | chosen
    try:
        params = SamplingParams(
            **({"temperature": 1.0} | chosen),
            extra_args=extra_args,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
    except (*REFUSALS, OverflowError):
        ENDS["refused by vLLM's SamplingParams"] += 1
        return
    served = check(llm, control, prompt, params, early=early, priority=priority)
    asked = params.structured_outputs
    cut = params.stop or params.stop_token_ids or params.repetition_detection
    if asked and isinstance(served, RequestOutput) and not cut:
        ENDS["grammar"] += 1
        for completion in served.outputs:
            text = bytes(t for t in completion.token_ids if t != EOS).decode()  # a token is a byte
            assert satisfies(asked, text), (params, completion)


def satisfies(asked, text):
    """Whether a text is what was asked for."""
    if asked.regex is not None:
        return re.fullmatch(asked.regex, text)
    if asked.choice is not None:
        return text in asked.choice
    if asked.json is not None:
        return jsonschema.validate(json.loads(text), asked.json) is None
    if asked.json_object:
        return isinstance(json.loads(text), dict)
    if asked.grammar.startswith("start"):
        inner = text.strip("()")
        return inner.isdigit() and re.fullmatch(r"(\(*)\d+(\)*)", text) and balanced(text)
    return re.fullmatch("a*cb*", text) and text.count("a") == text.count("b")


def balanced(text):
    return text.count("(") == text.count(")")
