"""`rows_ahead` bounds what one step's queries really compute, for every policy and composition."""

import math

import pytest
from oracle import random_weights, small_config
from test_loop import NEEDED, VARIANTS, make_loop, model, params_of  # noqa: F401
from toy import label

from boe_vllm.models.build import random_model
from boe_vllm.request.resolved import tokens_due

PROMPT, CANVAS, BLOCK = 3, 24, 12
COMPOSED = (
    {"policy": "boe"},
    {"policy": "boe", "preset": "kv", "rho": 0.8},
    {"policy": "boe", "sets": "top", "rho": 0.8},
    {"policy": "boe", "surrogate": "inject", "active": "all", "context": "exact"},
    {"policy": "joint"},
    {"policy": "joint", "preset": "thorough"},
    {"policy": "joint", "multiple": 9.0},
    {"policy": "pairwise"},
    {"policy": "pairwise", "preset": "exact"},
    {"policy": "pairwise", "coupling": "overlap"},
)
COMPOSITIONS = (
    {},
    {"remask": "remdm", "sigma_schedule": "rescale", "eta": 1.0},
    {"remask": "remdm", "sigma_schedule": "conf"},
    {"remask": "remdm", "sigma_schedule": "loop", "eta": 0.4, "alpha_on": 0.6},
    {"commit": "eb", "gamma": 2.0},
    {"commit": "threshold", "threshold": 0.05},
)
ADAPTIVE = (
    {"policy": "joint", "commit": "rounds"},
    {"policy": "joint", "commit": "rounds", "rounds": 3, "trust": 9.0},
    {"policy": "boe", "commit": "rounds", "rounds": 2, "trust": 9.0},
    {"policy": "joint", "commit": "drafts", "threshold": 0.05},
    {"policy": "joint", "commit": "drafts", "drafts": 5, "slack": None, "cfg_scale": 0.5},
    {"policy": "boe", "commit": "drafts", "gamma": 3.0},
)
VERIFY = {"policy": "verify", "threshold": 0.2}
CASES = [f for f in VARIANTS if "remask" not in f and "commit" not in f]
CASES += [fields | more for fields in COMPOSED for more in COMPOSITIONS]
CASES += [*ADAPTIVE, VERIFY, VERIFY | {"drafts": 1.0, "cfg_scale": 1.0}]


def largest_due(kind, masks, steps):
    """Most tokens that a schedule has due in a step of a block, if each step writes them."""
    written, most = 0, 0
    for step in range(steps):
        due = tokens_due(kind, masks=masks, steps=steps, step=step, written=written)
        most, written = max(most, min(due, masks - written)), written + due
    return most


@pytest.mark.parametrize(
    "frame", [{"tokens_per_step": 3}, {"tokens_per_step": 2, "schedule": "cosine"}], ids=label
)
@pytest.mark.parametrize("fields", CASES, ids=label)
def test_no_step_asks_for_more_rows_than_the_bound(model, fields, frame):  # noqa: F811
    check_the_bound(model, fields, frame)


@pytest.mark.parametrize("fields", [*COMPOSED, VERIFY], ids=label)
def test_a_shifted_model_asks_for_at_most_twice_as_many(shifted, fields):
    check_the_bound(shifted, fields, {"tokens_per_step": 3})


@pytest.fixture(scope="module")
def shifted():
    config = small_config(shift=1)
    network = random_model(config)
    network.load_weights(random_weights(config).items())
    return network


def check_the_bound(model, fields, frame):  # noqa: F811
    loop = make_loop(model)
    params = params_of(
        fields | frame | {"block_length": BLOCK}, prompt_len=PROMPT, max_tokens=CANVAS, seed=3
    )
    loop.add("x", [1, 2, 3], params)
    canvas = loop.canvases["x"]
    steps = math.ceil(BLOCK / frame["tokens_per_step"])
    quota = largest_due(frame.get("schedule", "linear"), BLOCK, steps)
    if frame.get("schedule") and fields.get("commit"):
        quota = BLOCK  # what a bound leaves unwritten is due at the end
    guided = 1 + (fields.get("cfg_scale", 0) > 0)
    both = guided * (1 + model.shift)
    bound = both * canvas.policy.rows_ahead(masks=BLOCK, quota=quota, length=PROMPT + CANVAS)
    most = 0
    while not canvas.done:
        before, account = canvas.carried, canvas.account
        rows = account.rows_forward + account.rows_backward
        assert loop.step(["x"])["x"].error is None
        own = 0 if before is not None else guided * (PROMPT + CANVAS)
        most = max(most, account.rows_forward + account.rows_backward - rows - own)
    assert most <= bound
    if most and not fields.get("commit"):
        assert bound <= 20 * most  # it means something
