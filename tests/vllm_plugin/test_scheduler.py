"""One denoising step per engine step for every running request, within the budget of rows."""

import pickle

import pytest
from engine_config import engine_config
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import FinishReason
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from boe_vllm.decoding.accounting import TokenLogprobs
from boe_vllm.decoding.loop import StepResult
from boe_vllm.vllm_plugin.admission import admit
from boe_vllm.vllm_plugin.output import DiffusionModelRunnerOutput
from boe_vllm.vllm_plugin.runner import to_output
from boe_vllm.vllm_plugin.scheduler import DiffusionScheduler

EOS = 1


def make_scheduler(max_num_batched_tokens=64, **changes) -> DiffusionScheduler:
    config = engine_config(max_num_batched_tokens=max_num_batched_tokens, **changes)
    config.cache_config.num_gpu_blocks = 1
    return DiffusionScheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(num_blocks=1, kv_cache_tensors=[], kv_cache_groups=[]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=16,
        log_stats=True,
    )


@pytest.fixture(scope="module")
def shared_scheduler():
    return make_scheduler()


@pytest.fixture
def scheduler(shared_scheduler):
    """The shared scheduler, emptied of what an earlier test left in it."""
    shared_scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    shared_scheduler.schedule()
    return shared_scheduler


def add(scheduler, name, prompt_len=4, *, priority=0, **fields) -> Request:
    params = SamplingParams(**({"max_tokens": 8, "ignore_eos": False} | fields))
    admit([5] * prompt_len, params, scheduler.vllm_config)
    request = Request(name, [5] * prompt_len, params, None, priority=priority)
    scheduler.add_request(request)
    return request


def step(scheduler, tokens=None, *, done=(), errors=None, reports=None):
    """One engine step in which the runner returns `tokens` by request; (scheduled, outputs)."""
    scheduled = scheduler.schedule()
    tokens, errors = tokens or {}, errors or {}
    results = {
        name: StepResult(
            tokens=list(tokens.get(name, [])),
            logprobs=None,
            done=name in done,
            report=(reports or {}).get(name),
            error=errors.get(name),
        )
        for name in scheduled.num_scheduled_tokens
    }
    output = to_output(list(scheduled.num_scheduled_tokens), results, {})
    outputs = scheduler.update_from_output(scheduled, output)
    return scheduled, [one for client in outputs.values() for one in client.outputs]


def names(scheduled: SchedulerOutput) -> set[str]:
    return set(scheduled.num_scheduled_tokens)


def test_a_request_is_stepped_though_no_token_comes_back(scheduler):
    add(scheduler, "a")
    for _ in range(5):
        scheduled, outputs = step(scheduler)
        assert names(scheduled) == {"a"} and outputs == []


def test_any_number_of_tokens_may_come_back(scheduler):
    request = add(scheduler, "a")
    for tokens in ([], [7, 8, 9], [], [10]):
        scheduled, _ = step(scheduler, {"a": tokens})
        assert names(scheduled) == {"a"}
    assert list(request.output_token_ids) == [7, 8, 9, 10]


def test_requests_join_and_leave_at_any_step(scheduler):
    add(scheduler, "a")
    step(scheduler)
    add(scheduler, "b")
    scheduled, outputs = step(scheduler, {"a": [7, EOS, 9]})
    assert names(scheduled) == {"a", "b"}
    assert [(o.request_id, o.new_token_ids, o.finish_reason) for o in outputs] == [
        ("a", [7, EOS], FinishReason.STOP)
    ]
    scheduled, _ = step(scheduler)
    assert names(scheduled) == {"b"} and scheduled.finished_req_ids == {"a"}


def test_the_end_of_text_may_be_ignored(scheduler):
    add(scheduler, "a", ignore_eos=True)
    _, (output,) = step(scheduler, {"a": [EOS] * 8})
    assert output.finish_reason == FinishReason.LENGTH and len(output.new_token_ids) == 8


def test_max_tokens_cuts_a_canvas_of_whole_blocks(scheduler):
    add(scheduler, "a", max_tokens=6, extra_args={"block_length": 4})
    assert scheduler._rows["a"] == 4 + 8
    _, (output,) = step(scheduler, {"a": [7] * 8})
    assert output.finish_reason == FinishReason.LENGTH and len(output.new_token_ids) == 6


def test_rows_come_from_admission_alone(scheduler):
    add(scheduler, "a", max_tokens=6, extra_args={"block_length": 4, "cfg_scale": 1.0})
    assert scheduler._rows["a"] == 2 * (4 + 8)
    around = Request("b", [5] * 4, SamplingParams(max_tokens=8), None)
    scheduler.add_request(around)
    assert scheduler._rows["b"] == scheduler.max_model_len


def test_given_text_ends_nothing(scheduler):
    """Neither a stop token nor the end of text does so before the last piece of text."""
    template = {"canvas_template": [[7, EOS], 1, [9], 2]}
    request = add(scheduler, "a", extra_args=template, stop_token_ids=[9])
    _, outputs = step(scheduler, {"a": [7, EOS]})
    assert [o.finish_reason for o in outputs] == [None]
    _, outputs = step(scheduler, {"a": [8, 9, 8]})
    assert [o.finish_reason for o in outputs] == [None]
    _, (output,) = step(scheduler, {"a": [9]})
    assert output.finish_reason == FinishReason.STOP
    assert list(request.output_token_ids) == [7, EOS, 8, 9, 8, 9]
    add(scheduler, "b", extra_args={"canvas_template": [1, [EOS, 9]]}, stop_token_ids=[9])
    _, (output,) = step(scheduler, {"b": [8, EOS, 9]})
    assert output.new_token_ids == [8, EOS, 9] and output.finish_reason is not None


def test_requests_are_admitted_by_rows_and_in_order(scheduler):
    add(scheduler, "a", prompt_len=20, max_tokens=20)  # 40 rows of 64
    add(scheduler, "b", prompt_len=20, max_tokens=10)  # 30
    add(scheduler, "c", prompt_len=4, max_tokens=4)  # 8, but behind b
    scheduled, _ = step(scheduler)
    assert names(scheduled) == {"a"}
    scheduled, _ = step(scheduler, {"a": [EOS]})
    assert names(scheduled) == {"a"}
    scheduled, _ = step(scheduler)
    assert names(scheduled) == {"b", "c"}


def test_a_request_of_full_length_always_runs(scheduler):
    add(scheduler, "a", prompt_len=4, max_tokens=60)
    scheduled, _ = step(scheduler)
    assert names(scheduled) == {"a"}


def test_rows_never_exceed_the_budget(scheduler):
    for index in range(8):
        add(scheduler, str(index), prompt_len=3 + 2 * index, max_tokens=1 + 3 * index)
    rows = dict(scheduler._rows)
    served = set()
    for _ in range(200):  # at most the sum of all max_tokens
        scheduled, _ = step(scheduler, {name: [7] for name in rows})
        assert sum(rows[name] for name in names(scheduled)) <= 64
        served |= names(scheduled)
    assert served == set(rows)
    assert not scheduler.has_unfinished_requests() and not scheduler._rows


def test_priority_decides_who_is_admitted_first():
    scheduler = make_scheduler(scheduling_policy="priority")
    add(scheduler, "late", prompt_len=30, max_tokens=20, priority=5)
    add(scheduler, "soon", prompt_len=30, max_tokens=20, priority=1)
    scheduled, _ = step(scheduler)
    assert names(scheduled) == {"soon"}


def test_an_abort_frees_the_rows_at_the_next_step(scheduler):
    add(scheduler, "a", prompt_len=20, max_tokens=20)
    add(scheduler, "b", prompt_len=20, max_tokens=20)
    step(scheduler)
    scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    scheduled, _ = step(scheduler)
    assert names(scheduled) == {"b"} and scheduled.finished_req_ids == {"a"}


def test_a_failed_request_is_finished_and_the_others_go_on(scheduler):
    add(scheduler, "a")
    add(scheduler, "b")
    _, outputs = step(scheduler, {"b": [7]}, errors={"a": "logits are not finite"})
    by_name = {o.request_id: o for o in outputs}
    assert by_name["a"].finish_reason == FinishReason.ERROR
    assert by_name["a"].stop_reason == "logits are not finite"
    assert by_name["b"].finish_reason is None
    scheduled, _ = step(scheduler)
    assert names(scheduled) == {"b"} and "a" in scheduled.finished_req_ids


def test_a_complete_canvas_ends_the_request(scheduler):
    add(scheduler, "a", max_tokens=8)
    _, outputs = step(scheduler, {"a": [7, 8]}, done={"a"})
    assert outputs[-1].finish_reason == FinishReason.STOP
    assert not scheduler.has_unfinished_requests()


def test_the_report_comes_with_the_last_output(scheduler):
    add(scheduler, "a")
    reports = {"a": {"forwards": 3}}
    _, (output,) = step(scheduler, {"a": [7]}, reports=reports)
    assert output.kv_transfer_params is None
    _, (output,) = step(scheduler, {"a": [EOS]})
    assert output.kv_transfer_params == {"boe": {"forwards": 3}}
    assert not scheduler._reports


def test_with_stop_strings_every_output_may_be_the_last(scheduler):
    add(scheduler, "a", stop=["x"])
    _, (output,) = step(scheduler, {"a": [7]}, reports={"a": {"forwards": 1}})
    assert output.kv_transfer_params == {"boe": {"forwards": 1}}


def test_a_preempted_request_goes_on_with_its_canvas(scheduler):
    request = add(scheduler, "a")
    step(scheduler, {"a": [7, 8]})
    assert scheduler.reset_prefix_cache(reset_running_requests=True)
    assert request.status == RequestStatus.PREEMPTED
    scheduled, _ = step(scheduler, {"a": [9]})
    assert names(scheduled) == {"a"}
    assert not scheduled.finished_req_ids  # the runner keeps the canvas
    assert [r.req_id for r in scheduled.scheduled_new_reqs] == []
    assert scheduled.scheduled_cached_reqs.resumed_req_ids == {"a"}
    assert list(request.output_token_ids) == [7, 8, 9]


def test_a_preempted_requests_rows_stay_taken():
    scheduler = make_scheduler(scheduling_policy="priority")
    add(scheduler, "first", prompt_len=30, max_tokens=20, priority=5)
    step(scheduler)
    assert scheduler.reset_prefix_cache(reset_running_requests=True)
    add(scheduler, "small", prompt_len=4, max_tokens=4, priority=1)
    add(scheduler, "large", prompt_len=10, max_tokens=10, priority=2)
    scheduled, _ = step(scheduler)
    assert names(scheduled) == {"small"}  # 8 more rows fit beside 50 of 64, 20 do not
    scheduled, _ = step(scheduler, {"small": [EOS]})
    scheduled, _ = step(scheduler)
    assert names(scheduled) == {"large"}  # nobody runs, so somebody must
    scheduled, _ = step(scheduler, {"large": [EOS]})
    scheduled, _ = step(scheduler)
    assert names(scheduled) == {"first"}


def test_an_idle_engine_schedules_nothing(scheduler):
    scheduled, outputs = step(scheduler)
    assert scheduled.total_num_scheduled_tokens == 0 and outputs == []
    assert not scheduler.has_requests()


def test_log_probabilities_are_sliced_by_request():
    def token(first, *others):
        ids = [first, *others]
        return TokenLogprobs(token_ids=ids, logprobs=[-0.5 * i for i in range(len(ids))], rank=1)

    results = {
        "a": StepResult(tokens=[3, 4], logprobs=[token(3, 9), token(4, 9)], done=False, report={}),
        "b": StepResult(tokens=[5], logprobs=None, done=False, report=None),
        "c": StepResult(tokens=[6], logprobs=[token(6, 7, 8)], done=True, report={"x": 1}),
    }
    output = to_output(["a", "b", "c", "d"], results, {"d": "unknown"})
    assert output.sampled_token_ids == [[3, 4], [5], [6], []]
    assert output.logprobs.slice_request(0, 2).logprob_token_ids[:, 0].tolist() == [3, 4]
    assert output.logprobs.slice_request(0, 1).logprob_token_ids[:, 0].tolist() == [3]
    assert output.logprobs.slice_request(2, 1).logprob_token_ids.tolist() == [[6, 7, 8]]
    assert output.logprobs.slice_request(2, 1).logprobs[0, 1] == -0.5
    assert (output.done, output.errors, output.reports) == (
        {"c"},
        {"d": "unknown"},
        {"a": {}, "c": {"x": 1}},
    )


def test_the_output_survives_the_way_from_the_workers():
    output = DiffusionModelRunnerOutput(
        req_ids=["a"],
        req_id_to_index={"a": 0},
        sampled_token_ids=[[1]],
        reports={"a": {"forwards": 1}},
        errors={"b": "why"},
        done={"a"},
    )
    assert pickle.loads(pickle.dumps(output)) == output
