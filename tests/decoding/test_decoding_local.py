"""Whole requests under the local policies: the engine commits what the slow transcription commits,
step by step; they end in bounded time, and cost what policies.md says."""

import functools
import json

import local_rules as rules
import numpy as np
import pytest
import slow_decoding
import torch
from oracle import Dense, random_weights, small_config
from test_loop import NEEDED, finish, make_loop, params_of
from test_policy_rules_local import COUNTS
from toy import label

from boe_vllm.decoding.loop import DenoisingLoop
from boe_vllm.lab.tasks import TASKS
from boe_vllm.models import build
from boe_vllm.models.special import SpecialTokens

pc = functools.partial(rules.pc, counts=COUNTS, total=10000)
LOOSE = {"confidence_threshold": 0.2, "kl_threshold": 0.3}
CASES = [
    ({"policy": "random", "tokens_per_step": 3}, rules.random),
    ({"policy": "confidence", "tokens_per_step": 3, "schedule": "cosine"}, None),
    ({"policy": "confidence", "tokens_per_step": 2, "cfg_scale": 1.5}, None),
    ({"policy": "margin", "tokens_per_step": 2, "alg_temp": 0.3}, None),
    ({"policy": "entropy", "tokens_per_step": 2}, None),
    ({"policy": "confident-random", "tokens_per_step": 2}, rules.confident_random),
    ({"policy": "origin", "tokens_per_step": 2}, rules.origin),
    ({"policy": "ancestral", "tokens_per_step": 2}, rules.ancestral),
    ({"policy": "eb", "gamma": 1.0}, functools.partial(rules.eb, gamma=1.0)),
    ({"policy": "eb", "proxy": "margin"}, functools.partial(rules.eb, proxy="margin")),
    ({"policy": "pc", "tokens_per_step": 2} | NEEDED["pc"], pc),
    ({"policy": "threshold", "threshold": 0.4}, functools.partial(rules.threshold, threshold=0.4)),
    ({"policy": "factor", "factor": 1.5}, functools.partial(rules.factor, factor=1.5)),
    ({"policy": "klass"} | LOOSE, functools.partial(rules.klass, **LOOSE)),
    (
        {"policy": "klass", "history": 1, "cfg_scale": 0.5} | LOOSE,
        functools.partial(rules.klass, history=1, **LOOSE),
    ),
]
FRAME = ("tokens_per_step", "schedule", "cfg_scale")


def rule_of(fields, rule):
    if rule is not None:
        return rule
    return functools.partial(
        rules.certainty, name=fields["policy"], alg_temp=fields.get("alg_temp", 0.0)
    )


@pytest.fixture(scope="module")
def random_model():
    config, weights = small_config(), random_weights(small_config(), dtype=torch.float64)
    model = build.random_model(config, dtype=torch.float64)
    model.load_weights(weights.items())
    return model, Dense(config, weights)


@pytest.fixture(scope="module")
def tiny():
    config, weights = slow_decoding.bundled()
    model = build.random_model(config, dtype=torch.float64)
    model.load_weights(weights.items())
    return model, Dense(config, weights)


def run(loop, prompt, fields, max_tokens, seed=3):
    params = params_of(
        fields | {"trace": True}, prompt_len=len(prompt), max_tokens=max_tokens, seed=seed
    )
    loop.add("x", prompt, params)
    tokens, reports = finish(loop)
    return tokens["x"], reports["x"]


@pytest.mark.parametrize("fields, rule", CASES, ids=lambda v: label(v) if type(v) is dict else "")
def test_the_engine_commits_as_the_transcription_does(random_model, fields, rule):
    model, dense = random_model
    prompt = np.random.default_rng(8).integers(0, 25, 9).tolist()
    tokens, report = run(make_loop(model), prompt, fields | {"block_length": 8}, 24)
    frame = {key: fields[key] for key in FRAME if key in fields}
    history = fields.get("history", 2)
    want = slow_decoding.decode(
        dense, prompt, rule_of(fields, rule), gen_length=24, block_length=8, seed=3,
        history=history, **frame,
    )  # fmt: skip
    assert tokens == want.tokens
    assert report["trace"]["step"] == want.step_of
    together = 1 + (fields.get("cfg_scale", 0) > 0)
    assert report["denoising_steps"] == want.steps
    assert report["forwards"] == together * want.steps
    assert report["rows_forward"] == together * want.steps * 33
    assert report["backwards"] == report["rows_backward"] == 0


@pytest.mark.parametrize(
    "fields, rule", [c for c in CASES if c[0]["policy"] != "pc"],
    ids=lambda v: label(v) if type(v) is dict else "",
)  # fmt: skip
def test_the_bundled_model_commits_as_the_transcription_does(tiny, fields, rule):
    model, dense = tiny
    config = model.config
    loop = DenoisingLoop(
        model,
        special=SpecialTokens(mask=config.mask_token_id, eos=config.eos_token_id),
        device=torch.device("cpu"),
    )
    task = TASKS["sudoku4"]
    (item,) = task.items(1)
    prompt = list(item.prompt.encode())
    frame = {key: fields[key] for key in FRAME if key in fields}
    shape = {"gen_length": task.gen_length, "block_length": task.block_length}
    tokens, report = run(loop, prompt, fields | shape, task.gen_length)
    want = slow_decoding.decode(
        dense, prompt, rule_of(fields, rule), seed=3, history=fields.get("history", 2),
        **shape, **frame,
    )  # fmt: skip
    assert tokens == want.tokens
    assert report["trace"]["step"] == want.step_of
    assert report["denoising_steps"] == want.steps


def test_klass_compares_a_blocks_first_step_with_the_block_before(random_model):
    """Without it, no position of a later block could be ready in the block's second step."""
    model, _ = random_model
    prompt = np.random.default_rng(8).integers(0, 25, 9).tolist()
    fields = {"policy": "klass", "block_length": 8} | LOOSE
    _, report = run(make_loop(model), prompt, fields, 24)
    steps = np.array(report["trace"]["step"]).reshape(3, 8)
    assert (np.bincount(steps[0])[:2] == 1).all()  # p_0 = 0: nothing is ready in step 1
    second = [np.sum(block == block.min() + 1) for block in steps[1:]]
    assert max(second) > 1


def test_the_kls_of_klass_are_exact(random_model):
    model, dense = random_model
    prompt = np.random.default_rng(8).integers(0, 25, 9).tolist()
    fields = {"policy": "klass", "block_length": 8} | LOOSE
    loop = make_loop(model)
    loop.add("x", prompt, params_of(fields, prompt_len=9, max_tokens=24, seed=3))
    canvas = loop.canvases["x"]
    decide, seen = canvas.policy.step, []

    def step(view):
        inner = decide(view)
        change = yield next(inner)
        seen.append(dict(zip(view.positions.tolist(), change.tolist(), strict=True)))
        try:
            inner.send(change)
        except StopIteration as stop:
            return stop.value

    canvas.policy.step = step
    finish(loop)
    rule = functools.partial(rules.klass, **LOOSE)
    want = slow_decoding.decode(dense, prompt, rule, gen_length=24, block_length=8).changes
    assert [list(w) for w in want] == [list(s) for s in seen]
    assert min(want[0].values()) > 20  # p_0 = 0
    for got, expected in zip(seen, want, strict=True):
        np.testing.assert_allclose(
            list(got.values()), list(expected.values()), rtol=1e-8, atol=1e-12
        )


@pytest.mark.parametrize("name", ["origin", "ancestral"])
def test_steps_that_reveal_nothing_cost_no_forward(random_model, name):
    model, _ = random_model
    loop = make_loop(model)
    for seed in range(30):
        fields = {"policy": name, "gen_length": 6, "block_length": 3, "steps": 20}
        loop.add(str(seed), [1, 2], params_of(fields, prompt_len=2, seed=seed))
    _, reports = finish(loop)
    steps = [report["denoising_steps"] for report in reports.values()]
    assert max(steps) <= 6 and all(r["forwards"] == r["denoising_steps"] for r in reports.values())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("fields", [c[0] for c in CASES], ids=label)
def test_every_policy_ends_and_leaves_no_mask(random_model, fields, late, temperature):
    model, _ = random_model
    loop = make_loop(model, late=frozenset(range(0, 28, 2)))
    for seed in range(4):
        loop.add(
            str(seed),
            [1, 28, 2],
            params_of(
                fields | {"block_length": 6, "confidence_eos_eot_inf": late},
                prompt_len=3, max_tokens=15, temperature=temperature, seed=seed,
            ),
        )  # fmt: skip
    canvases = dict(loop.canvases)
    tokens, reports = finish(loop)
    for request_id, canvas in canvases.items():
        assert 28 not in tokens[request_id] and not canvas.masked.any()
        assert reports[request_id]["denoising_steps"] <= 19


def test_reports_survive_json(random_model):
    model, _ = random_model
    _, report = run(make_loop(model), [1, 2], {"policy": "confident-random"}, 8)
    assert json.loads(json.dumps(report))["policy"] == "confident-random"
