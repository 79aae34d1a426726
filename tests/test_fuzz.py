"""Whatever a request says, it is refused or served, and the request beside it never notices.

`BOE_VLLM_FUZZ_CASES` sets the number of cases, 2000 for a release.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.exceptions import VLLMValidationError

import boe_vllm
from boe_vllm import options
from boe_vllm.config import FrameConfig
from boe_vllm.content import Content
from boe_vllm.policies import POLICY_NAMES, load_policy

REFUSALS = (ValueError, TypeError, VLLMValidationError)
CASES = int(os.environ.get("BOE_VLLM_FUZZ_CASES", "60"))
CONTEXT, VOCAB, MASK = 64, 262, 261
MOST_STEPS = 2000  # of the engine; the server's limit on steps is below it
CONTROL = SamplingParams(
    temperature=1.0, seed=3, max_tokens=6, ignore_eos=True, extra_args={"policy": "boe"}
)


@pytest.fixture(scope="module")
def llm():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setattr(torch, "set_num_threads", torch.set_num_threads)
        llm = LLM(
            boe_vllm.tiny_model_path(),
            sampler="boe",
            max_model_len=CONTEXT,
            max_num_seqs=4,
            additional_config={"max_steps": 200, "max_lookahead_rows": 4000},
        )
        yield llm
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def run(llm, requests):
    """Outputs by number, or what refused a request."""
    engine, outputs = llm.llm_engine, {}
    names = {}
    for n, (prompt, params) in enumerate(requests):
        try:
            names[engine.add_request(str(n), {"prompt_token_ids": prompt}, params)] = n
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


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([10**9, -(10**9), 10**30]),
    st.floats(),
    st.floats(0, 1),
    st.text(max_size=8),
    st.sampled_from(["{", "[1, 2]", '{"a": 1}', "none", "top", "kl", "mask"]),
    st.lists(st.integers(-1, 300) | st.text(max_size=3), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6)
GOOD = {
    "gen_length": st.integers(1, 40),
    "block_length": st.sampled_from([1, 2, 4, 8, 16, 32]),
    "steps": st.integers(1, 40),
    "tokens_per_step": st.integers(1, 9),
    "schedule": st.sampled_from(["linear", "cosine"]),
    "cfg_scale": st.floats(0, 100),
    "cache": st.sampled_from(["none", "prefix", "dual"]),
    "logits_eos_inf": st.booleans(),
    "confidence_eos_eot_inf": st.booleans(),
    "trace": st.booleans(),
    "canvas_template": st.lists(st.integers(1, 6) | st.text(max_size=4) | TOKENS, max_size=4),
    "choices": st.lists(st.text(max_size=4) | TOKENS, max_size=4),
    "surrogate": st.sampled_from(["mask", "inject", "kv"]),
    "selection": st.sampled_from(["top", "pairwise", "conditional"]),
    "preset": st.sampled_from(["paper", "prototype", "joint", "pairwise"]),
    "coupling": st.sampled_from(["exact", "pairs", "attention"]),
}


@st.composite
def fields(draw):
    """Fields of a request: mostly those of one policy, mostly with values that could be right."""
    given_fields = {}
    policy = draw(st.sampled_from([*sorted(POLICY_NAMES - {"pc"}), None]))
    known = options.names(FrameConfig) + options.names(Content)
    if policy is not None:
        given_fields["policy"] = policy
        known += options.names(load_policy(policy).Config)
    for name in draw(st.lists(st.sampled_from(known), max_size=5, unique=True)):
        number = st.floats(0, 2) | st.integers(0, 5)
        good = GOOD.get(name, number)
        given_fields[name] = draw(good if draw(st.integers(0, 3)) else JUNK)
    if draw(st.integers(0, 19)) == 0:
        given_fields[draw(st.text(max_size=5))] = draw(JUNK)
    return given_fields


SETTINGS = {
    "temperature": st.sampled_from([0.0, 1e-6, 1e-4, 0.7, 1.0, 2.0, 1e6]),
    "top_p": st.floats(1e-9, 1),
    "top_k": st.integers(-1, 300),
    "min_p": st.floats(0, 1),
    "max_tokens": st.integers(1, 50),
    "min_tokens": st.integers(0, 5),
    "seed": st.integers(0, 2**63 - 1),
    "logprobs": st.integers(0, 20),
    "stop": st.lists(st.text(min_size=1, max_size=2), max_size=2),
    "ignore_eos": st.booleans(),
    "logit_bias": st.dictionaries(st.integers(-1, 270), st.floats(-200, 200), max_size=3),
    "allowed_token_ids": st.lists(st.integers(0, 265), max_size=5),
    "bad_words": st.lists(st.text(min_size=1, max_size=3), max_size=3),
    "stop_token_ids": st.lists(st.integers(0, 261), max_size=2),
    "repetition_penalty": st.floats(0.5, 2),
}
PROMPTS = st.lists(
    st.integers(0, 255) | st.sampled_from([MASK, MASK, 256, 260, 262, 10**6, -1]),
    min_size=0,
    max_size=CONTEXT + 2,
) | st.lists(st.integers(32, 126), min_size=1, max_size=20)


@settings(
    max_examples=CASES,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    prompt=PROMPTS,
    extra_args=fields(),
    chosen=st.fixed_dictionaries({}, optional=SETTINGS),
)
def test_any_request_is_refused_or_served_and_harms_nobody(
    llm, control, prompt, extra_args, chosen
):
    try:
        params = SamplingParams(**({"temperature": 1.0} | chosen), extra_args=extra_args)
    except (*REFUSALS, OverflowError):
        return
    outputs = run(llm, [([65, 58, 49], CONTROL), (prompt, params)])
    assert outputs[0].outputs[0].token_ids == control
    if isinstance(outputs[1], Exception):
        assert str(outputs[1])
        return
    (completion,) = outputs[1].outputs
    assert completion.finish_reason in ("stop", "length", "error")
    if completion.finish_reason == "error":  # only what cannot be known before
        assert "expected a token that may be written, found none" in completion.stop_reason
    else:
        assert MASK not in completion.token_ids
