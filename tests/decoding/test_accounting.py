"""Every policy costs what policies.md says: forwards, backwards and rows, counted per request."""

import pytest
from test_loop import NEEDED, finish, make_loop, model, params_of  # noqa: F401

from boe_vllm.policies import POLICY_NAMES

LENGTH, PROMPT, PER_STEP = 8, 3, 2
STEPS = LENGTH // PER_STEP

# At most: forwards per step, forwards beyond them, backwards per step, steps. Where it is one
# forward per step, it is exactly one.
SINGLE, ADAPTIVE = (1, 0, 0, STEPS), (1, 0, 0, LENGTH)
COST = {
    "random": SINGLE,
    "confidence": SINGLE,
    "margin": SINGLE,
    "entropy": SINGLE,
    "confident-random": SINGLE,
    "pc": SINGLE,
    "p2": SINGLE,
    "remdm": SINGLE,
    "remdm-llada": (1, 0, 0, 2 * STEPS),
    "origin": ADAPTIVE,
    "ancestral": ADAPTIVE,
    "eb": ADAPTIVE,
    "threshold": ADAPTIVE,
    "factor": ADAPTIVE,
    "klass": ADAPTIVE,
    "dapd": ADAPTIVE,
    "dawn": ADAPTIVE,
    "credit": ADAPTIVE,
    "hierarchy": ADAPTIVE,
    "punt": (1 + 3, 0, 0, LENGTH),  # a whole state for each bit of a rank
    "verify": (2, 0, 0, LENGTH),
    "lookum": (2, 1, 0, STEPS),
    "info-gain": (8, 1, 0, STEPS),
    "lookahead": (1 + LENGTH, 0, 0, STEPS),
    "boe": (2, 0, 1, STEPS),
    "joint": (2, 0, 0, STEPS),
    "pairwise": (2, 0, 0, STEPS),
}
PARTIAL = ("boe", "joint", "pairwise", "verify")  # whose further forwards are over some rows
FIXED = ("random", "confidence", "margin", "entropy", "confident-random", "pc", "p2")
SETTINGS = {
    "info-gain": {"bypass": 0.0, "position_temperature": 5.0},
    "boe": {"rho": 1.0},  # enough candidates for every step but the last to steer
}


def cost_of(model, name, **more):  # noqa: F811
    fields = {"policy": name, "block_length": LENGTH, "tokens_per_step": PER_STEP}
    fields |= NEEDED.get(name, {}) | SETTINGS.get(name, {}) | more
    loop = make_loop(model)
    loop.add("x", [1, 2, 3], params_of(fields, prompt_len=PROMPT, max_tokens=LENGTH, seed=2))
    return finish(loop)[1]["x"]


def test_the_table_has_every_policy():
    assert set(COST) == POLICY_NAMES


@pytest.mark.parametrize("name", sorted(COST))
def test_every_policy_costs_what_the_table_says(model, name):  # noqa: F811
    per_step, per_block, backwards, most = COST[name]
    report = cost_of(model, name)
    steps = report["denoising_steps"]
    assert 1 <= steps <= most and (steps == STEPS or name not in FIXED)
    assert steps <= report["forwards"] <= per_step * steps + per_block
    if per_step == 1:
        assert report["forwards"] == steps
    assert report["backwards"] <= backwards * steps
    if backwards == 0:
        assert report["rows_backward"] == 0
    if name in PARTIAL:
        partial = report["rows_forward"] - steps * (PROMPT + LENGTH)
        assert 0 < partial <= (report["forwards"] - steps) * (2 * PER_STEP) ** 2
    else:
        assert report["rows_forward"] == report["forwards"] * (PROMPT + LENGTH)
    if backwards:
        assert report["rows_backward"] <= report["backwards"] * LENGTH


def test_boe_steers_in_every_step_that_has_a_choice(model):  # noqa: F811
    report = cost_of(model, "boe", preset="kv", rho=1.0)
    assert (report["forwards"], report["backwards"]) == (STEPS + 3, 3)
    report = cost_of(model, "boe", preset="paper", rho=1.0)
    assert (report["forwards"], report["backwards"]) == (STEPS, 3)


def test_guidance_doubles_the_forwards(model):  # noqa: F811
    for name in ("confidence", "p2", "lookahead", "info-gain"):
        plain, guided = cost_of(model, name), cost_of(model, name, cfg_scale=0.0)
        assert plain == guided
        guided = cost_of(model, name, cfg_scale=1.0)
        assert guided["forwards"] % 2 == 0
        if name != "info-gain":  # whose candidate sets differ under guidance
            assert guided["forwards"] == 2 * plain["forwards"]
            assert guided["rows_forward"] == 2 * plain["rows_forward"]


def test_look_ahead_states_count_one_forward_each(model):  # noqa: F811
    # Eight, six and four candidates beside the step's own forward; two left are written unseen.
    assert cost_of(model, "lookahead")["forwards"] == (1 + 8) + (1 + 6) + (1 + 4) + 1
    assert cost_of(model, "lookahead", rho=0.5)["forwards"] == (1 + 4) + (1 + 3) + 1 + 1


def test_a_winner_that_is_not_reused_costs_one_forward_more(model):  # noqa: F811
    for name in ("info-gain", "lookum"):
        reused, own = cost_of(model, name), cost_of(model, name, reuse=False)
        assert own["denoising_steps"] == reused["denoising_steps"] == STEPS
        assert 0 < own["forwards"] - reused["forwards"] <= STEPS - 1
