"""Settings: every field is checked once, and an error says field, expectation, value and remedy."""

import pytest

from boe_vllm.request.config import SamplerConfig, parse_sampler_config
from boe_vllm.request.limits import EngineSettings
from boe_vllm.request.resolved import plan_canvas

BAD = [
    ({"policy": "nope"}, r"policy: expected one of \[.*\], got 'nope'; choose"),
    ({"policy": 3}, r"policy: expected one of .* got 3"),
    ({"policy": "boe", "rho": 2}, r"rho: .*less than or equal to 1, got 2; change or remove 'rho'"),
    ({"policy": "boe", "rho": 0}, r"rho: .*greater than 0"),
    ({"policy": "boe", "rho": "much"}, r"rho: .*valid number.*'much'"),
    ({"policy": "boe", "rho": float("nan")}, r"rho: .*finite"),
    ({"policy": "boe", "surrogate": "gumbel"}, r"surrogate: .*'mask', 'inject'"),
    ({"policy": "boe", "preset": "nope"}, r"preset: .*'paper', 'prototype'"),
    ({"policy": "boe", "surogate": "kv"}, r"unknown field 'surogate'.*did you mean 'surrogate'"),
    ({"rho": 0.5}, r"unknown field 'rho' for policy 'confidence'"),
    ({"steps": 0}, r"steps: .*greater than or equal to 1, got 0"),
    ({"steps": 7.5}, r"steps: .*valid integer"),
    ({"steps": 4, "tokens_per_step": 2}, r"steps and tokens_per_step exclude each other"),
    (
        {"steps": 7, "gen_length": 32, "block_length": 5},
        r"gen_length: .*block_length \(5\), got 32",
    ),
    ({"trace": "perhaps"}, r"trace: .*boolean"),
    (
        {"policy": "boe", "active": "candidates", "objective": "remaining"},
        r"identically zero gradient.*eq\. 30.*set active='masked'",
    ),
    (
        {"policy": "boe", "surrogate": "inject", "active": "all"},
        r"expected context='exact', got 'frozen'",
    ),
]


@pytest.mark.parametrize("fields, message", BAD, ids=lambda v: str(v)[:40])
def test_a_bad_field_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        parse_sampler_config(fields)


def test_values_as_http_delivers_them():
    config = parse_sampler_config({"policy": "boe", "rho": "0.5", "trace": 1, "steps": "8"})
    assert (config.settings.rho, config.frame.trace, config.frame.steps) == (0.5, True, 8)


def test_a_request_goes_over_the_server():
    server = parse_sampler_config({"policy": "boe", "rho": 0.5, "block_length": 8, "steps": 4})
    same = parse_sampler_config({"floor_weight": 1.0}, base=server)
    assert (same.settings.rho, same.settings.floor_weight) == (0.5, 1.0)
    assert (same.frame.block_length, same.frame.steps) == (8, 4)
    other = parse_sampler_config({"policy": "entropy", "tokens_per_step": 2}, base=server)
    assert (other.policy, other.frame.block_length) == ("entropy", 8)
    assert (other.frame.steps, other.frame.tokens_per_step) == (None, 2)


def test_a_request_that_sets_nothing_is_the_servers_own():
    server = parse_sampler_config({"policy": "boe", "preset": "kv", "rho": 0.5, "steps": 4})
    assert parse_sampler_config({}, base=server) == server
    said = {name: value for name, value in server.as_dict().items() if name != "frequencies"}
    assert parse_sampler_config(said, base=server) == server


def test_a_preset_goes_under_the_fields_beside_it():
    paper = parse_sampler_config({"policy": "boe", "preset": "paper", "rho": 0.1}).settings
    assert (paper.surrogate, paper.objective, paper.active) == ("mask", "masked", "masked")
    assert (paper.rho, paper.floor_weight, paper.gate) == (0.1, 0.2, "entropy")
    prototype = parse_sampler_config({"policy": "boe", "preset": "prototype"}).settings
    assert (prototype.candidates, prototype.sharpen, prototype.normalize) == (3, 0.5, "minmax")


def test_a_config_survives_as_flat_fields():
    for fields in ({}, {"policy": "boe", "preset": "prototype", "steps": 8}):
        config = parse_sampler_config(fields)
        assert parse_sampler_config(config.as_dict()) == config


def test_a_request_with_answers_carries_its_own_settings():
    config = parse_sampler_config({"choices": [[1], [2]]}, base=SamplerConfig())
    assert config.policy == "choices" and type(config.settings).__name__ == "ChoicesConfig"


def test_vllms_own_extra_args_are_left_alone():
    assert parse_sampler_config({"kv_transfer_params": {}}) == SamplerConfig()


def plan(fields, *, prompt_len=10, max_tokens=16, max_model_len=128):
    return plan_canvas(
        parse_sampler_config(fields),
        prompt_len=prompt_len,
        max_tokens=max_tokens,
        max_model_len=max_model_len,
    )


def test_max_tokens_is_rounded_up_to_whole_blocks():
    assert plan({"block_length": 8}, max_tokens=20).gen_length == 24
    assert plan({}, max_tokens=20).gen_length == 20
    assert plan({}, max_tokens=40).gen_length == 64


def test_gen_length_overrides_max_tokens():
    assert plan({"gen_length": 48, "block_length": 16}, max_tokens=16).gen_length == 48


def test_rounding_up_never_leaves_the_context():
    got = plan({"block_length": 32}, prompt_len=90, max_tokens=36)
    assert (got.gen_length, got.block_length) == (38, 32)


def test_a_block_is_never_longer_than_the_canvas_asked_for():
    for fields, max_tokens in (({"block_length": 10**18}, 16), ({"block_length": 32}, 20)):
        got = plan(fields, max_tokens=max_tokens)
        assert (got.gen_length, got.block_length) == (max_tokens, max_tokens)
    with pytest.raises(ValueError, match="block_length: "):
        plan({"block_length": 2**63})


def test_steps_are_shared_out_over_blocks():
    got = plan({"gen_length": 32, "block_length": 8, "steps": 12})
    assert got.steps_per_block == 3
    assert plan({"tokens_per_step": 3}).steps_for(16) == 6


@pytest.mark.parametrize(
    "fields, changes, message",
    [
        ({"gen_length": 120}, {}, r"gen_length: .*at most 118 tokens.*got 120"),
        ({}, {"max_tokens": 119}, r"max_tokens: .*at most 118 tokens"),
        ({"steps": 5, "gen_length": 32, "block_length": 8}, {}, r"steps: .*number of blocks \(4\)"),
    ],
)
def test_a_canvas_that_does_not_fit_is_refused(fields, changes, message):
    with pytest.raises(ValueError, match=message):
        plan(fields, **changes)


def test_engine_settings_are_read_from_additional_config():
    assert EngineSettings.read({"logits_budget_mb": 64, "sampler": "boe"}).logits_budget_mb == 64
    with pytest.raises(ValueError, match=r"logits_budget_mb: .*greater than or equal to 1, got 0"):
        EngineSettings.read({"logits_budget_mb": 0})
