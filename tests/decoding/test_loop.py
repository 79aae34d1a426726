"""The denoising loop: LLaDA's schedule, results that no batch changes, counted cost, errors."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import random_weights, small_config

from boe_vllm.decoding.canvas import Canvas
from boe_vllm.decoding.loop import DenoisingLoop
from boe_vllm.models.build import random_model
from boe_vllm.models.special import SpecialTokens
from boe_vllm.policies import POLICY_NAMES
from boe_vllm.policies.base import Commit
from boe_vllm.request.config import parse_sampler_config
from boe_vllm.request.resolved import ResolvedRequest, plan_canvas
from boe_vllm.steering.importance import TokenImportance

MASK, EOS = 28, 27
TABLE = Path(__file__).parents[1] / "data" / "frequencies_29.json"
NEEDED = {"pc": {"frequencies": str(TABLE)}}
VARIANTS = [{"policy": name} | NEEDED.get(name, {}) for name in sorted(POLICY_NAMES)] + [
    {"policy": "boe", "surrogate": "response"},
    {"policy": "boe", "surrogate": "inject"},
    {"policy": "boe", "surrogate": "inject", "context": "exact", "active": "all"},
    {"policy": "boe", "preset": "paper"},
    {"policy": "boe", "preset": "prototype"},
    {"policy": "margin", "alg_temp": 0.2, "schedule": "cosine"},
    {"policy": "klass", "confidence_threshold": 0.2, "kl_threshold": 0.3},
    {"policy": "boe", "cfg_scale": 0.5},
    {"policy": "boe", "remask": "remdm", "sigma_schedule": "rescale", "eta": 0.8},
    {"policy": "boe", "commit": "eb", "gamma": 1.0},
    {"policy": "boe", "commit": "drafts", "gamma": 3.0, "slack": 1.0},
    {"policy": "joint", "commit": "drafts", "bound": "entropy", "gamma": 3.0, "cfg_scale": 0.5},
    {"policy": "info-gain", "bypass": 0.0, "cfg_scale": 0.5},
    {"policy": "remdm", "sigma_schedule": "rescale", "eta": 0.8},
    {"policy": "p2", "eta": 3.0},
]


@pytest.fixture(scope="module")
def model():
    config = small_config()
    model = random_model(config)
    model.load_weights(random_weights(config).items())
    return model


def make_loop(model, *, eos=EOS, late=frozenset({EOS}), **changes):
    special = SpecialTokens(mask=MASK, eos=eos, late=late)
    return DenoisingLoop(model, special=special, device=torch.device("cpu"), **changes)


def params_of(fields, *, prompt_len=4, max_tokens=16, temperature=0.0, seed=0, **changes):
    server = {name: fields[name] for name in ("frequencies",) if name in fields}
    own = {name: value for name, value in fields.items() if name not in server}
    config = parse_sampler_config(own, base=parse_sampler_config(server))
    plan = plan_canvas(config, prompt_len=prompt_len, max_tokens=max_tokens, max_model_len=128)
    return ResolvedRequest(config=config, plan=plan, temperature=temperature, seed=seed, **changes)


def finish(loop, ids=None):
    """Step until the given requests are done; returns tokens and last reports."""
    ids = list(loop.canvases) if ids is None else ids
    tokens, reports = {i: [] for i in ids}, {}
    for _ in range(500):
        live = list(loop.canvases)
        if not any(i in live for i in ids):
            return tokens, reports
        for request_id, result in loop.step(live).items():
            tokens.setdefault(request_id, []).extend(result.tokens)
            assert result.error is None
            if result.done:
                reports[request_id] = result.report
                loop.remove(request_id)
    raise AssertionError("a request did not end")


def label(fields):
    return "-".join(map(str, fields.values()))[:40]


def check_alone_and_among_16_others(model, fields, temperature):
    rng = np.random.default_rng(5)
    prompt = rng.integers(0, 25, 9).tolist()
    params = params_of(
        fields | {"tokens_per_step": 2, "block_length": 8, "trace": True},
        prompt_len=9,
        max_tokens=24,
        temperature=temperature,
        seed=11,
    )
    alone = make_loop(model)
    alone.add("x", prompt, params)
    want_tokens, want_reports = finish(alone)

    crowd = make_loop(model)
    others = iter(range(16))

    def join(count):
        for _, n in zip(range(count), others, strict=False):
            length = int(rng.integers(1, 60))
            crowd.add(
                f"o{n}",
                rng.integers(0, 25, length).tolist(),
                params_of(
                    VARIANTS[n % len(VARIANTS)] | {"tokens_per_step": int(rng.integers(1, 5))},
                    prompt_len=length,
                    max_tokens=int(rng.integers(1, 40)),
                    temperature=float(n % 2),
                    seed=n,
                ),
            )

    join(10)
    tokens, reports = {}, {}
    for step in range(500):
        if step == 2:
            crowd.add("x", prompt, params)
        if step > 2 and "x" not in crowd.canvases:
            break
        join(1)
        if step == 5:
            crowd.remove("o0")
        for request_id, result in crowd.step(list(crowd.canvases)).items():
            tokens.setdefault(request_id, []).extend(result.tokens)
            if result.done:
                reports[request_id] = result.report
                crowd.remove(request_id)
    assert tokens["x"] == want_tokens["x"]
    assert reports["x"] == want_reports["x"]
    assert MASK not in tokens["x"] and len(tokens["x"]) == 24


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_request_is_the_same_alone_and_in_a_crowd_that_changes(model, temperature):
    rng = np.random.default_rng(5)
    asked = {}
    for n, fields in enumerate(VARIANTS):
        length = int(rng.integers(1, 60))
        more = {"tokens_per_step": int(rng.integers(1, 5)), "block_length": 8, "trace": True}
        params = params_of(
            fields | more,
            prompt_len=length,
            max_tokens=int(rng.integers(8, 33)),
            temperature=temperature,
            seed=n,
        )
        asked[str(n)] = rng.integers(0, 25, length).tolist(), params
    crowd, tokens, reports = make_loop(model), {}, {}
    waiting = list(asked)
    for step in range(500):
        for request_id in [waiting.pop() for _ in range(1 if step else 20) if waiting]:
            crowd.add(request_id, *asked[request_id])
        crowd.add(f"left{step}", [1, 2, 3], asked["0"][1])
        if step > 2:
            crowd.remove(f"left{step - 2}")
        for request_id, result in crowd.step(list(crowd.canvases)).items():
            tokens.setdefault(request_id, []).extend(result.tokens)
            if result.done and request_id in asked:
                reports[request_id] = result.report
                crowd.remove(request_id)
        if len(reports) == len(asked):
            break
    for n, request_id in enumerate(asked):
        alone = make_loop(model)
        alone.add(request_id, *asked[request_id])
        own, report = finish(alone)
        assert (own[request_id], report[request_id]) == (
            tokens[request_id],
            reports[request_id],
        ), VARIANTS[n]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def wide_model(request):
    """Wide enough for libraries to choose their kernels by the number of rows."""
    config = small_config(d_model=512, mlp_hidden_size=1536)
    model = random_model(config, dtype=request.param)
    model.load_weights(random_weights(config).items())
    return model


@pytest.mark.parametrize(
    "fields",
    [
        {"policy": "boe"},
        {"policy": "boe", "surrogate": "mask"},
        {"policy": "boe", "surrogate": "inject", "context": "exact"},
        {"policy": "lookum", "cfg_scale": 0.5},
    ],
    ids=label,
)
def test_that_holds_for_wide_networks_too(wide_model, fields):
    check_alone_and_among_16_others(wide_model, fields, temperature=0.0)


@pytest.mark.parametrize("steps, tokens_per_step", [(6, None), (None, 3), (None, 1), (24, None)])
def test_quotas_follow_llada(model, steps, tokens_per_step):
    fields = {"gen_length": 24, "block_length": 8, "trace": True}
    fields |= {"steps": steps} if steps else {"tokens_per_step": tokens_per_step}
    loop = make_loop(model)
    loop.add("x", [1, 2, 3], params_of(fields, prompt_len=3))
    _, reports = finish(loop)
    trace = reports["x"]["trace"]
    per_block = steps // 3 if steps else -(-8 // tokens_per_step)
    quotas = [8 // per_block + (i < 8 % per_block) for i in range(per_block)]
    counted = np.bincount(trace["step"]).tolist()
    assert counted == quotas * 3
    blocks = np.array(trace["position"]) // 8
    assert (np.diff(np.array(trace["step"])[np.argsort(trace["step"], kind="stable")]) >= 0).all()
    for block in range(3):
        in_block = np.array(trace["step"])[blocks == block]
        assert set(in_block // per_block) == {block}
    assert reports["x"]["denoising_steps"] == reports["x"]["forwards"] == 3 * per_block


def test_the_longest_committed_prefix_is_emitted_as_it_grows(model):
    canvas = Canvas(
        [1, 2],
        params_of({"block_length": 8}, prompt_len=2, max_tokens=8),
        special=SpecialTokens(mask=MASK, eos=EOS),
        vocab_size=29,
    )
    emitted = []
    for position in (3, 2, 9, 4, 5, 6, 7, 8):
        canvas.tokens[position], canvas.masked[position] = position + 10, False
        emitted.append(canvas.emit())
    assert emitted == [[], [12, 13], [], [14], [15], [16], [17], [18, 19]]


def test_masks_in_the_prompt_are_written_with_the_first_block(model):
    loop = make_loop(model)
    loop.add("x", [1, MASK, 3], params_of({"block_length": 4}, prompt_len=3, max_tokens=8))
    canvas = loop.canvases["x"]
    assert canvas.writable().tolist() == [1, 3, 4, 5, 6]
    tokens, _ = finish(loop)
    assert len(tokens["x"]) == 8 and MASK not in canvas.tokens


def test_cost_is_counted_per_request(model):
    loop = make_loop(model)
    for name, fields in {
        "plain": {},
        "kv": {"policy": "boe", "surrogate": "kv", "rho": 1.0},
        "mask": {"policy": "boe", "rho": 1.0},
        "exact": {"policy": "boe", "surrogate": "inject", "context": "exact", "rho": 1.0},
    }.items():
        loop.add(name, [1, 2], params_of(fields | {"block_length": 4}, prompt_len=2, max_tokens=4))
    _, reports = finish(loop)
    cost = {
        name: [
            report[key]
            for key in ("denoising_steps", "forwards", "backwards", "rows_forward", "rows_backward")
        ]
        for name, report in reports.items()
    }
    # Four steps over six rows; the last has one candidate and steers nothing.
    assert cost["plain"] == [4, 4, 0, 24, 0]
    assert cost["mask"] == [4, 4, 3, 24, 4 + 3 + 2]
    assert cost["kv"] == [4, 7, 3, 24 + 9, 9]
    assert cost["exact"] == [4, 7, 3, 24 + 18, 9]


def test_temperature_samples_from_the_model(model):
    """The first committed token's frequencies match softmax(logits / T) of the first forward."""
    loop = make_loop(model)
    for seed in range(800):
        loop.add(
            str(seed), [1, 2], params_of({}, prompt_len=2, max_tokens=1, temperature=2.0, seed=seed)
        )
    tokens, _ = finish(loop)
    got = np.bincount([t[0] for t in tokens.values()], minlength=29) / 800
    layout_tokens = torch.tensor([1, 2, MASK])
    from oracle import Dense

    dense = Dense(small_config(), random_weights(small_config()))
    logits = dense.logits(dense.embed(layout_tokens))[2]
    want = (dense.log_probs(logits[None])[0] / 2.0).softmax(-1).double().numpy()
    assert np.abs(got - want).max() < 4 * np.sqrt(want.max() / 800)
    assert got[MASK] == 0


def test_logprobs_are_those_at_commit(model):
    loop = make_loop(model)
    params = params_of(
        {"block_length": 4, "trace": True},
        prompt_len=2,
        max_tokens=4,
        logprobs=True,
        top_logprobs=3,
    )
    loop.add("x", [1, 2], params)
    given, report = [], None
    while report is None:
        result = loop.step(["x"])["x"]
        given += result.logprobs
        report = result.report if result.done else None
    assert len(given) == 4
    for entry, token, confidence in zip(
        given, report["trace"]["token"], report["trace"]["confidence"], strict=True
    ):
        assert entry.token_ids[0] == token and len(entry.token_ids) == 4
        assert np.exp(entry.logprobs[0]) == pytest.approx(confidence, abs=1e-5)
        assert entry.rank == 1 and entry.token_ids[1] == token
        assert entry.logprobs[1:] == sorted(entry.logprobs[1:], reverse=True)


def test_eos_options_do_what_their_names_say(model):
    eos = EOS

    def tokens_with(fields, temperature=3.0):
        loop = make_loop(model, eos=eos, late=frozenset({eos}))
        for seed in range(20):
            loop.add(
                str(seed),
                [1, 2],
                params_of(
                    fields | {"trace": True}, prompt_len=2, temperature=temperature, seed=seed
                ),
            )
        return finish(loop)

    plain, _ = tokens_with({})
    eos = np.bincount(np.concatenate(list(plain.values()))).argmax()  # make a frequent token EOS
    assert any(eos in t for t in plain.values())
    banned, _ = tokens_with({"logits_eos_inf": True})
    assert not any(eos in t for t in banned.values())
    _, late = tokens_with({"confidence_eos_eot_inf": True, "block_length": 16})
    # Once EOS is committed, nothing but EOS was left to propose in that step.
    for report in late.values():
        trace = report["trace"]
        steps = np.array(trace["step"])
        is_eos = np.array(trace["token"]) == eos
        if is_eos.any() and (~is_eos).any():
            first = steps[is_eos].min()
            assert (~is_eos)[steps < first].all()


def test_broken_logits_fail_one_request_and_no_other(model):
    loop = make_loop(model)
    broken = 17
    weight = model.wte.weight.data[broken].clone()
    try:
        model.wte.weight.data[broken] = float("nan")
        loop.add("bad", [1, broken], params_of({"policy": "joint"}, prompt_len=2, max_tokens=4))
        loop.add("good", [1, 2], params_of({"policy": "joint"}, prompt_len=2, max_tokens=4))
        results = loop.step(["bad", "good"])
    finally:
        model.wte.weight.data[broken] = weight
    assert "logits are not finite" in results["bad"].error
    assert results["good"].error is None
    loop.remove("bad")
    assert len(finish(loop)[0]["good"]) + len(results["good"].tokens) == 4


def test_a_failing_policy_fails_its_own_request(model):
    class Broken:
        name = "broken"

        def needs(self):
            return loop.canvases["good"].policy.needs()

        def step(self, view):
            raise RuntimeError("no idea")
            yield

    class Idle(Broken):
        def step(self, view):
            return Commit(chosen=np.empty(0, np.int64))
            yield

    loop = make_loop(model)
    for name in ("bad", "idle", "good"):
        loop.add(name, [1, 2], params_of({}, prompt_len=2, max_tokens=4))
    loop.canvases["bad"].policy, loop.canvases["idle"].policy = Broken(), Idle()
    results = loop.step(["bad", "idle", "good"])
    assert "policy 'broken' failed: no idea" in results["bad"].error
    assert "decided nothing" in results["idle"].error
    assert results["good"].error is None


def test_an_ask_that_cannot_be_answered_fails_its_own_request(model):
    """All queries share their passes, so the bad one has to be found among them."""
    loop = make_loop(model)
    for name in ("bad", "good", "plain"):
        fields = {"policy": "confidence" if name == "plain" else "boe", "tokens_per_step": 2}
        loop.add(name, [1, 2], params_of(fields, prompt_len=2, max_tokens=8))
    policy = loop.canvases["bad"].policy

    class Asking:
        name, needs, step_limit = "asking", policy.needs, policy.step_limit

        def step(self, view):
            yield TokenImportance(
                candidates=np.array([99]),
                objective=np.array([0]),
                active=np.array([0]),
                surrogate="mask",
                context="frozen",
                sharpen=1.0,
            )

    class Silent(Asking):
        def step(self, view):
            raise RuntimeError("before the first query")

    loop.canvases["bad"].policy = Asking()
    loop.add("silent", [1, 2], params_of({}, prompt_len=2, max_tokens=8))
    loop.canvases["silent"].policy = Silent()
    results = loop.step(list(loop.canvases))
    assert "policy 'asking' failed" in results["bad"].error
    assert "policy 'asking' failed: before the first query" in results["silent"].error
    first = {name: results[name].tokens for name in ("good", "plain")}
    for name in ("bad", "silent"):
        loop.remove(name)
    rest, reports = finish(loop)

    alone = make_loop(model)
    alone.add(
        "good",
        [1, 2],
        params_of({"policy": "boe", "tokens_per_step": 2}, prompt_len=2, max_tokens=8),
    )
    tokens, want = finish(alone)
    assert first["good"] + rest["good"] == tokens["good"]
    assert reports["good"] == want["good"]


def test_the_counters_add_up_to_the_reports(model):
    loop = make_loop(model)
    for n, policy in enumerate(["boe", "confidence", "remdm", "confidence"]):
        fields = {"policy": policy, "tokens_per_step": 2, "cache": "none"}
        loop.add(f"{n}", [1, 2], params_of(fields, prompt_len=2, max_tokens=12, seed=n))
    loop.step(["0", "1"])
    assert loop.read_counters()["boe/active/confidence"] == 2
    loop.remove("1")
    before = dataclasses.asdict(loop.canvases["0"].account)
    _, reports = finish(loop)
    counters = loop.read_counters()
    for name in ("forwards", "backwards", "rows_forward", "rows_backward"):
        assert counters[f"boe/{name}"] == sum(r[name] for r in reports.values()) - before[name]
    steps = sum(r["denoising_steps"] for r in reports.values()) - before["denoising_steps"]
    by_policy = {k: v for k, v in counters.items() if k.startswith("boe/denoising_steps/")}
    assert sum(by_policy.values()) == steps
    assert set(by_policy) == {f"boe/denoising_steps/{p}" for p in ("boe", "confidence", "remdm")}
    per_step = {int(k.rsplit("/")[-1]): v for k, v in counters.items() if "/tokens_per_step/" in k}
    assert sum(per_step.values()) == steps
    assert sum(k * v for k, v in per_step.items()) == counters["boe/committed_tokens"]
    parts = {k.rsplit("/")[-1] for k in counters if k.startswith("boe/seconds/")}
    assert parts == {"forward", "queries", "backward", "policy"}
    assert not [key for key in loop.read_counters() if "cache" not in key]
