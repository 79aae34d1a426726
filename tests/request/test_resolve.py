"""A request is resolved once, without vLLM: what it may ask for, what it costs, how it travels."""

import dataclasses
import json

import numpy as np
import pytest

from boe_vllm.policies.base import Policy
from boe_vllm.request import resolved as resolved_module
from boe_vllm.request.facts import ModelFacts
from boe_vllm.request.limits import BUDGET_MB, EngineSettings, ServerSettings
from boe_vllm.request.resolve import SamplingFields, resolve
from boe_vllm.request.resolved import CanvasPlan, ResolvedRequest, most_tokens_due, tokens_due
from boe_vllm.sampling.constraints import Constraint, TokenConstraints

MASK, EOS = 49, 1


def model(**changes):
    facts = {"vocab_size": 50, "max_model_len": 64, "mask_token_id": MASK, "eos_token_id": EOS}
    return ModelFacts(**(facts | changes))


def resolved(fields=(), *, prompt=(2, 3), server=None, facts=None, **sampling):
    return resolve(
        dict(fields),
        prompt=list(prompt),
        sampling=SamplingFields(**sampling),
        server=ServerSettings.read(server or {}),
        model=facts or model(),
    )


# ---- how much is due ---------------------------------------------------------------------------


def drive(schedule, masks, steps):
    """Tokens due in each step of a block that writes exactly what is due."""
    written, due = 0, []
    for step in range(steps):
        if written == masks:
            break
        number = tokens_due(schedule, masks=masks, steps=steps, step=step, written=written)
        due.append(min(number, masks - written))
        written += due[-1]
    assert written == masks
    return due


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_no_step_of_the_schedule_has_more_due_than_most(schedule):
    for masks in (1, 2, 7, 32, 100, 257):
        for steps in (1, 2, 3, 5, 16, 31, 100, 300):
            most = most_tokens_due(schedule, masks=masks, steps=steps)
            assert max(drive(schedule, masks, steps)) <= most <= masks
    assert max(drive("cosine", 4000, 23)) == most_tokens_due("cosine", masks=4000, steps=23) > 250
    assert most_tokens_due("linear", masks=4000, steps=23) == 174


def test_masks_are_counted_block_by_block():
    plan = CanvasPlan(gen_length=10, block_length=4, steps_per_block=None, tokens_per_step=1)
    assert plan.masks_by_block([], infill=0) == [4, 4, 2]
    assert plan.masks_by_block([0, 5, 8, 9], infill=3) == [6, 3]


class Asking(Policy):
    """Notes what it is asked about its look-ahead."""

    asked: list[tuple[int, int, int]] = []

    def rows_ahead(self, *, masks, quota, length):
        self.asked.append((masks, quota, length))
        return quota * length


def test_the_bound_on_look_ahead_is_that_of_the_schedule_that_runs(monkeypatch):
    monkeypatch.setattr(resolved_module, "load_policy", lambda name: Asking)
    facts = model(max_model_len=8000)
    fields = {"block_length": 4000, "tokens_per_step": 180}
    limits = {"max_lookahead_rows": 4100 * 250}
    for schedule, most in (("linear", 174), ("cosine", 272)):
        Asking.asked.clear()
        request = {"schedule": schedule, **fields}
        if schedule == "linear":
            got = resolved(request, prompt=[2] * 100, facts=facts, server=limits, max_tokens=4000)
            assert got.rows_ahead == 4100 * most and got.rows == 4100
        else:
            with pytest.raises(ValueError, match="policy: expected at most 1025000 rows of look-a"):
                resolved(request, prompt=[2] * 100, facts=facts, server=limits, max_tokens=4000)
        assert Asking.asked == [(4000, most, 4100)]


def test_masks_in_the_prompt_and_given_text_count(monkeypatch):
    monkeypatch.setattr(resolved_module, "load_policy", lambda name: Asking)
    Asking.asked.clear()
    template = {"canvas_template": [[3, 4], 2, [5], 3], "block_length": 4, "tokens_per_step": 2}
    got = resolved(template | {"cfg_scale": 1.0}, prompt=[MASK, 2, MASK])
    assert sorted(Asking.asked) == [(3, 2, 11), (4, 2, 11)]
    assert (got.rows, got.rows_ahead, got.text_end) == (22, 44, 5)


# ---- what follows for the engine -----------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, server, sampling, expected",
    [
        ({}, {}, {"max_tokens": 20}, (20, 20)),
        ({"block_length": 8}, {}, {"max_tokens": 20}, (20, 24)),
        ({"gen_length": 32}, {}, {}, (32, 32)),
        ({"gen_length": 32}, {"gen_length": 8}, {}, (32, 32)),
        ({}, {"gen_length": 8}, {}, (8, 8)),
        ({}, {"gen_length": 32}, {}, (16, 32)),
        ({"canvas_template": [[3], 2]}, {"gen_length": 32}, {"max_tokens": 1}, (3, 3)),
        ({"canvas_template": [[3], 2], "gen_length": 8}, {}, {}, (8, 8)),
        ({"choices": [[3], [4, 5]]}, {}, {"temperature": 0.0}, (3, 3)),
    ],
    ids=str,
)
def test_the_canvas_and_what_is_sent_of_it(fields, server, sampling, expected):
    got = resolved(fields, server={"sampler_config": server}, **sampling)
    assert (got.max_tokens, got.plan.gen_length) == expected
    with pytest.raises(ValueError, match="min_tokens: expected (at most|none)"):
        resolved(
            fields,
            server={"sampler_config": server},
            **(sampling | {"min_tokens": expected[0] + 1}),
        )


def test_a_choice_has_no_settings_of_another_policy():
    got = resolved({"choices": [[3], [4, 5]]}, server={"sampler": "boe"})
    assert got.config.policy == "choices"
    assert dataclasses.asdict(got.config.settings) == {}
    assert got.policy(EOS).name == "choices"


def test_a_tokenizer_may_know_more_tokens_than_the_network():
    facts = model(encode=lambda text: [ord(c) for c in text])
    assert resolved({"canvas_template": ["\x07", 2]}, facts=facts).text_end == 1
    with pytest.raises(ValueError, match="canvas_template: expected token ids below 50, got 97"):
        resolved({"canvas_template": ["a", 2]}, facts=facts)
    with pytest.raises(ValueError, match="bad_words: expected token ids from 0 to 49, got 97"):
        resolved(bad_words=[[97]])
    assert resolved(min_tokens=1, stop_token_ids=[97, EOS]).constraints.stop_token_ids == (EOS,)


def test_a_prompt_that_leaves_no_room_is_named():
    with pytest.raises(ValueError, match="prompt: expected less than the 64 tokens"):
        resolved(prompt=[2] * 64)
    assert resolved(prompt=[2] * 63, max_tokens=1).rows == 64


@pytest.mark.parametrize("prompt", [[], [MASK], [MASK, 3]], ids=str)
def test_a_shifted_model_has_nothing_to_predict_a_first_mask_from(prompt):
    facts = model(shift=1)
    with pytest.raises(ValueError, match="prompt: expected a token before the first mask, since"):
        resolved(prompt=prompt, facts=facts)
    assert resolved(prompt=[3, MASK], facts=facts).prompt_len == 2


def test_a_shifted_model_looks_ahead_at_most_twice_as_far():
    fields = {"policy": "joint", "tokens_per_step": 4}
    plain, shifted = (resolved(fields, facts=model(shift=shift)).rows_ahead for shift in (0, 1))
    assert shifted == 2 * plain > 0


def test_huge_numbers_of_masks_are_refused_before_they_are_made():
    with pytest.raises(ValueError, match="canvas_template: expected a canvas of at most 62"):
        resolved({"canvas_template": [10**15, [3]]})


@pytest.mark.parametrize("policy", ["boe", "remdm", "klass", "info-gain", "p2", "confidence"])
def test_what_travels_is_plain_and_complete(policy):
    got = resolved(
        {"policy": policy, "cache": "dual", "trace": True},
        seed=-5,
        logprobs=3,
        logit_bias={4: 0.5},
        bad_words=[[3], [4, 5]],
        stop_token_ids=[EOS],
        min_tokens=2,
        top_k=5,
    )
    wire = json.loads(json.dumps(got.to_wire()))
    assert wire == got.to_wire()
    again = ResolvedRequest.from_wire(wire)
    assert again.to_wire() == wire
    assert (again.config, again.plan) == (got.config, got.plan)
    assert again.constraints.bad_words == ((4, 5),)
    assert again.constraints.everywhere.banned_token_ids.tolist() == [3]
    assert again.constraints.everywhere.logit_bias.dtype == np.float64
    assert again.policy(EOS).config == got.config.settings


def test_reading_checks_nothing_again():
    wire = resolved({"policy": "boe"}).to_wire()
    wire["frame"]["block_length"] = "read, not checked"
    assert ResolvedRequest.from_wire(wire).config.frame.block_length == "read, not checked"


@pytest.mark.parametrize(
    "fields, sampling",
    [
        ({}, {"logit_bias": {4: 0.5}}),
        ({}, {"allowed_token_ids": [4]}),
        ({}, {"bad_words": [[4]]}),
        ({}, {"min_tokens": 1, "stop_token_ids": [EOS]}),
        ({}, {"top_k": 5}),
        ({}, {"top_p": 0.5}),
        ({}, {"min_p": 0.1}),
        ({"canvas_template": [2, [3]]}, {}),
    ],
    ids=str,
)
def test_a_request_that_constrains_nothing_has_no_constraints(fields, sampling):
    neutral = dict(logit_bias={}, allowed_token_ids=None, bad_words=[], min_tokens=0)
    neutral |= dict(top_k=50, top_p=1.0, min_p=0.0, stop_token_ids=[EOS])
    free = resolved(**neutral)
    assert free.constraints is None and not free.constrained
    assert ResolvedRequest.from_wire(free.to_wire()) == free
    one = resolved(fields, **(neutral | sampling))
    assert one.constraints is not None and one.constrained


def test_no_given_text_is_none_however_it_is_said():
    assert resolved().config.given_text is None
    nothing = {"canvas_template": None, "choices": None}
    assert resolved(nothing, seed=0).to_wire() == resolved(seed=0).to_wire()


def test_a_server_may_leave_the_budget_to_the_device():
    assert EngineSettings().budget_bytes("cpu") == BUDGET_MB["cpu"] * 2**20 == 2**28
    assert EngineSettings().budget_bytes("cuda") == 2**31
    assert EngineSettings(logits_budget_mb=3).budget_bytes("cuda") == 3 * 2**20


def test_a_constraint_comes_over_the_wire_as_it_was():
    """Arrays stay arrays, whatever the field: a list would end the engine at the first step."""
    ids = np.array([3, 4])
    everywhere = Constraint(
        allowed_token_ids=ids, banned_token_ids=ids, biased_token_ids=ids,
        logit_bias=np.array([1.0, 2.0]), discounted_token_ids=ids,
    )  # fmt: skip
    for constraint in (everywhere, Constraint()):
        constraints = TokenConstraints(everywhere=constraint)
        sent = dataclasses.replace(resolved(max_tokens=4), constraints=constraints)
        got = ResolvedRequest.from_wire(json.loads(json.dumps(sent.to_wire())))
        for field in dataclasses.fields(Constraint):
            before = getattr(constraint, field.name)
            after = getattr(got.constraints.everywhere, field.name)
            assert type(after) is type(before), field.name
            assert np.array_equal(after, before) if isinstance(before, np.ndarray) else True
