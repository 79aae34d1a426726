"""What becomes of a request's canvas: abort, preemption, stop strings; seen inside the engine."""

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.exceptions import VLLMValidationError

import boe_vllm
from boe_vllm.vllm_plugin import admission
from boe_vllm.vllm_plugin.warm_up import largest_request

PROMPT = "47+85+13="


@pytest.fixture(scope="module")
def llm():
    with pytest.MonkeyPatch.context() as patch:
        # One process: quick to start, and open to look at.
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setattr(torch, "set_num_threads", torch.set_num_threads)  # vLLM replaces it
        llm = LLM(
            boe_vllm.tiny_model_path(),
            sampler="confidence",
            max_num_seqs=8,
            max_num_batched_tokens=1200,
        )
        yield llm
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def params(**fields):
    return SamplingParams(**({"temperature": 0.0, "max_tokens": 24, "ignore_eos": True} | fields))


def texts(outputs):
    return [completion.text for output in outputs for completion in output.outputs]


def core(llm):
    return llm.llm_engine.engine_core.engine_core


def runner(llm):
    return core(llm).model_executor.driver_worker.worker.model_runner


def canvases(llm):
    """The canvases that the model runner holds."""
    return runner(llm).loop.canvases


def run_until_idle(llm):
    outputs = {}
    while llm.llm_engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in llm.llm_engine.step()}
    core(llm).step_fn()  # what an engine process does before it waits
    return outputs


def test_a_finished_request_leaves_nothing_behind(llm):
    llm.generate([PROMPT] * 3, params(), use_tqdm=False)
    run_until_idle(llm)
    assert not canvases(llm)


def test_an_aborted_request_leaves_at_the_next_step(llm):
    engine = llm.llm_engine
    names = [engine.add_request(name, PROMPT, params(max_tokens=200)) for name in ("a", "b")]
    for _ in range(3):
        engine.step()
    assert set(canvases(llm)) == set(names)
    engine.abort_request(names[:1], internal=True)
    engine.step()
    assert set(canvases(llm)) == set(names[1:])
    engine.abort_request(names[1:], internal=True)
    run_until_idle(llm)
    assert not canvases(llm)


def test_a_preempted_request_loses_nothing(llm):
    engine = llm.llm_engine
    engine.add_request("preempted", PROMPT, params())
    for _ in range(9):
        engine.step()
    assert engine.reset_prefix_cache(reset_running_requests=True)
    output = run_until_idle(llm)["preempted"]
    assert texts([output]) == texts(llm.generate([PROMPT], params(), use_tqdm=False))
    assert output.kv_transfer_params["boe"]["denoising_steps"] == 24  # none was done again


def test_a_request_that_ends_at_a_stop_string_keeps_its_report(llm):
    (whole,) = llm.generate([PROMPT], params(), use_tqdm=False)
    stop = whole.outputs[0].text[:2]
    (output,) = llm.generate([PROMPT], params(stop=[stop]), use_tqdm=False)
    assert output.outputs[0].stop_reason == stop
    assert output.kv_transfer_params["boe"]["policy"] == "confidence"
    run_until_idle(llm)
    assert not canvases(llm)


def test_log_probabilities_of_mixed_widths(llm):
    mixed = [params(max_tokens=6, logprobs=count) for count in (3, None, 0)]
    three, none, own = llm.generate([PROMPT] * 3, mixed, use_tqdm=False)
    for token, entry in zip(three.outputs[0].token_ids, three.outputs[0].logprobs, strict=True):
        assert token in entry and 3 <= len(entry) <= 4
    assert none.outputs[0].logprobs is None
    for token, entry in zip(own.outputs[0].token_ids, own.outputs[0].logprobs, strict=True):
        assert list(entry) == [token]


def test_a_refused_request_was_never_in_the_engine(llm):
    with pytest.raises(VLLMValidationError, match="policy: expected one of"):
        llm.llm_engine.add_request("bad", PROMPT, params(extra_args={"policy": "nope"}))
    assert not llm.llm_engine.has_unfinished_requests()


def test_warming_up_runs_the_largest_steps(llm):
    """With the server's policy, and with the one that looks ahead at most rows."""
    run_until_idle(llm)
    steps = []
    loop = runner(llm).loop
    with pytest.MonkeyPatch.context() as patch:
        step = loop.step

        def noting(names):
            canvases = [loop.canvases[name] for name in names]
            steps.append([(c.policy.name, len(c.tokens), len(c.writable())) for c in canvases])
            return step(names)

        patch.setattr(loop, "step", noting)
        runner(llm).warming_up_model()
    config = llm.llm_engine.vllm_config
    longest = config.model_config.max_model_len
    budget = config.scheduler_config.max_num_batched_tokens
    servers, dearest = steps
    assert servers == [("confidence", longest, longest - 1)] * (budget // longest)
    (policy,) = {name for name, _, _ in dearest}
    server = admission.server_settings(config)
    facts = admission.model_facts(config.model_config)
    request = largest_request({"policy": policy}, server, facts, budget)
    assert policy != "confidence" and request.rows_ahead * len(dearest) >= budget
    assert {rows for _, rows, _ in dearest} == {longest}
    assert loop.pool._storage is not None
    assert not canvases(llm) and not loop.counters.read()


def test_an_error_in_the_warm_up_ends_the_start(llm):
    run_until_idle(llm)
    weight = runner(llm).model.wte.weight.data
    kept = weight.clone()
    weight[:] = float("nan")
    try:
        with pytest.raises(RuntimeError, match="warm-up: .*'confidence'.* logits are not finite"):
            runner(llm).warming_up_model()
    finally:
        weight[:] = kept
    assert not canvases(llm)


def test_a_broken_checkpoint_fails_the_requests_that_meet_it(llm):
    """A policy without soft writes, which mix the embeddings of all tokens."""
    run_until_idle(llm)
    weight = runner(llm).model.wte.weight.data
    token = ord("Z")
    kept = weight[token].clone()
    alone = texts(llm.generate([PROMPT], params(extra_args={"policy": "joint"}), use_tqdm=False))
    weight[token] = float("nan")
    try:
        prompts = ["Z+1=", PROMPT, "1Z="]
        fields = [{"policy": "joint"}, {"policy": "joint"}, {"policy": "confidence"}]
        outputs = llm.generate(prompts, [params(extra_args=f) for f in fields], use_tqdm=False)
    finally:
        weight[token] = kept
    reasons = [output.outputs[0].finish_reason for output in outputs]
    assert reasons == ["error", "length", "error"]
    for n in (0, 2):
        assert "logits are not finite in denoising step 0" in outputs[n].outputs[0].stop_reason
    assert texts([outputs[1]]) == alone
    run_until_idle(llm)
    assert not canvases(llm)
