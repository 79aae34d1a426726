"""Look-ahead policies: the engine does what a slow transcription of the rule does, state by state,
for as many forwards; the states' predictions are those of a dense forward."""

import itertools
import math

import numpy as np
import pytest
import slow_remasking as slow
import torch
from oracle import Dense, random_weights, small_config
from test_importance import make_pass
from test_loop import MASK as MODEL_MASK
from test_loop import finish, make_loop, params_of
from test_policies import make_view, policy_of, run
from toy import MASK, Driven, Toy, steps_by

from boe_vllm import randomness
from boe_vllm.config import parse_sampler_config
from boe_vllm.models.standalone import build
from boe_vllm.policies.base import Commit, Policy
from boe_vllm.policies.lookum import importance
from boe_vllm.steering.asks import Lookahead, Prospect
from boe_vllm.steering.lookahead import lookahead
from boe_vllm.steering.step import DenoisingPass, NextStep

F64 = torch.float64
CASES = [
    *[
        ({"policy": "info-gain"} | fields, slow.info_gain)
        for fields in (
            {},
            {"bypass": 0.0},
            {"bypass": 0.2},
            {"bypass": 0.2, "bypass_writes": "quota"},
            {"candidates": 1},
            {"candidates": 3, "position_temperature": 1.0, "observe": "block"},
            {"position_temperature": 0.0},
            {"cost": False, "observe": "all"},
        )
    ],
    *[
        ({"policy": "lookum"} | fields, slow.lookum)
        for fields in (
            {},
            {"paths": 1},
            {"paths": 6, "pool_size": 3, "tau": 0.0},
            {"pool_threshold": 0.5, "certainty": "margin", "observe": "block"},
            {"pool_threshold": -0.3, "certainty": "entropy", "paths": 3},
            {"draw": "certainty", "draw_temperature": 0.5, "tau": 0.01, "observe": "all"},
        )
    ],
    *[
        ({"policy": "lookahead", "write": "proposal"} | fields, slow.lookahead)
        for fields in (
            {},
            {"score": "remaining"},
            {"rho": 0.5},
            {"rho": 0.3, "prefilter": "margin"},
            {"rho": 0.3, "prefilter": "entropy"},
        )
    ],
]
SHAPES = [(10, 5, 1), (8, 8, 2), (9, 9, 4), (7, 7, 5), (3, 1, 1)]
# (generated, block, tokens per step)


def label(case):
    return "-".join(map(str, case.values())) if isinstance(case, dict) else ""


def settings_of(fields):
    return {key: value for key, value in fields.items() if key not in ("policy", "write")}


@pytest.mark.parametrize(
    "fields, rule, reuse",
    [(*case, True) for case in CASES]
    + [(*case, False) for case in CASES if case[0]["policy"] != "lookahead"],
    ids=label,
)
def test_the_policy_does_what_the_transcription_does(fields, rule, reuse):
    own = fields if reuse else fields | {"reuse": False}
    for n, (length, block, per_step) in itertools.product(range(4), SHAPES):
        rng = np.random.default_rng(n)
        prompt = rng.integers(0, MASK, 4).tolist()
        if n % 3 == 2:
            prompt[1] = prompt[2] = MASK  # infilling
        toy, seed = Toy(n), int(rng.integers(1000))
        frame = {"gen_length": length, "block_length": block, "tokens_per_step": per_step}
        got = Driven(toy, own | frame, prompt, length, seed=seed).finish()
        decoding = slow.Decoding(slow.Model(toy.logits, MASK), prompt, length, block, seed)
        want = rule(decoding, steps_of=steps_by(per_step), **settings_of(fields))
        assert got.canvas.tokens.tolist() == want.x
        assert got.inputs == want.inputs
        if reuse:
            assert got.forwards == want.model.forwards
        else:
            looked = sum(c.carry is not None for c in got.commits)
            assert looked == 0 and got.forwards >= want.model.forwards


# ---- the solver against dense forwards -----------------------------------------------------------


def setting(dtype=F64):
    config = small_config()
    weights = random_weights(config, dtype=dtype)
    model = build(config, dtype=dtype)
    model.load_weights(weights.items())
    return model, Dense(config, weights)


@pytest.fixture(scope="module")
def networks():
    return setting()


def with_next_steps(current, *, row_budget=8192, temperature=0.0, forbidden=False):
    steps = [
        NextStep(
            temperature=temperature,
            uniforms=lambda positions: randomness.uniforms(
                3, step=1, positions=positions, stream=0
            ),
            eos_forbidden=forbidden,
        )
    ] * len(current.sequences)
    fields = {name: getattr(current, name) for name in current.__slots__}
    return DenoisingPass(**(fields | {"next_steps": tuple(steps), "row_budget": row_budget}))


def dense_state(dense, rows, written, tokens, sharpen):
    """Probabilities of every position in one hypothetical state, by a dense forward."""
    x = dense.embed(torch.from_numpy(rows.tokens)).clone()
    positions = rows.logit_positions[written]
    if tokens is None:
        logp = dense.log_probs(dense.logits(dense.embed(torch.from_numpy(rows.tokens))))[positions]
        x[positions] = (logp / sharpen).softmax(-1) @ dense.w("wte")[: dense.config.vocab_size]
    else:
        x[positions] = dense.embed(torch.from_numpy(tokens))
    return dense.log_probs(dense.logits(x)).exp().numpy()


def asks_for(current, *, soft, observe, sharpen):
    asks = []
    for n, rows in enumerate(current.sequences):
        masked = len(rows.logit_positions)
        writes = (np.array([0]), np.array([2, 1]), np.array([masked - 1]))
        tokens = tuple(np.arange(len(w)) + n for w in writes)
        ask = Lookahead(
            writes=writes, tokens=None if soft else tokens, observe=observe, sharpen=sharpen
        )
        asks.append((n, ask))
    return asks


@pytest.mark.parametrize("observe", ["block", "masked", "all"])
@pytest.mark.parametrize("soft, sharpen", [(True, 1.0), (True, 0.5), (False, 1.0)])
def test_states_are_predicted_as_by_a_dense_forward(networks, observe, soft, sharpen):
    model, dense = networks
    current = with_next_steps(make_pass(model, "none"))
    for rows in current.sequences:  # a mask outside the block
        outside = np.setdiff1d(np.arange(len(rows.tokens)), rows.logit_positions)
        rows.tokens[outside[-1]] = MODEL_MASK
    current = with_next_steps(again(model, current))
    asks = asks_for(current, soft=soft, observe=observe, sharpen=sharpen)
    for (n, ask), answer in zip(asks, lookahead(current, asks), strict=True):
        rows = current.sequences[n]
        assert answer.forwards == 3 and answer.rows_forward == 3 * len(rows.tokens)
        assert answer.backwards == answer.rows_backward == 0
        for k, prospect in enumerate(answer.value):
            written = ask.writes[k]
            p = dense_state(dense, rows, written, None if soft else ask.tokens[k], sharpen)
            still = [i for i in range(len(rows.logit_positions)) if i not in written]
            assert prospect.index.tolist() == still
            seen = rows.logit_positions[still]
            ordered = np.sort(p[seen], -1)
            np.testing.assert_allclose(prospect.confidence, ordered[:, -1], atol=1e-9)
            np.testing.assert_allclose(prospect.margin, ordered[:, -1] - ordered[:, -2], atol=1e-9)
            assert prospect.proposal.tolist() == p[seen].argmax(-1).tolist()
            np.testing.assert_allclose(
                prospect.entropy, [slow.entropy(row) for row in p[seen]], atol=1e-9
            )
            masks = np.flatnonzero(rows.tokens == MODEL_MASK)
            others = {
                "block": [],
                "masked": [i for i in masks if i not in rows.logit_positions],
                "all": [i for i in range(len(rows.tokens)) if i not in seen],
            }[observe]
            np.testing.assert_allclose(
                prospect.elsewhere, [slow.entropy(p[i]) for i in others], atol=1e-9
            )


def again(model, current):
    """The pass over the same sequences, whose tokens have changed."""
    from boe_vllm.prediction import RowWrites, read_statistics
    from boe_vllm.rows import pack

    layout = pack(current.sequences, torch.device("cpu"))
    hidden, tape = model.run(model.embed(layout.tokens), layout)
    log_probs = current.log_probs.of(hidden, np.zeros(len(hidden), bool))
    rows = len(hidden)
    read_statistics(
        log_probs, RowWrites(temperature=np.zeros(rows), uniform=np.full(rows, 0.5)), keep=True
    )
    return DenoisingPass(
        model=model, sequences=current.sequences, layout=layout, log_probs=log_probs, tape=tape
    )


@pytest.mark.parametrize("row_budget, passes", [(8192, 1), (40, 3), (20, 6), (1, 9)])
def test_the_row_budget_splits_the_states_and_changes_nothing(networks, row_budget, passes):
    """Three states of 9, 14 and 6 rows each: 87 rows."""
    model, _ = networks
    whole = with_next_steps(make_pass(model, "none"))
    split = with_next_steps(make_pass(model, "none"), row_budget=row_budget)
    asks = asks_for(whole, soft=True, observe="block", sharpen=1.0)
    sizes = []
    run_model = model.run
    want = lookahead(whole, asks)
    try:
        model.run = lambda x, layout, context=None: (
            sizes.append(len(x)),
            run_model(x, layout, context),
        )[1]
        got = lookahead(split, asks)
    finally:
        del model.run
    assert len(sizes) == passes and sum(sizes) == 87
    assert all(size <= row_budget for size in sizes) or row_budget < 14
    for a, b in zip(want, got, strict=True):
        assert (a.forwards, a.rows_forward) == (b.forwards, b.rows_forward)
        for x, y in zip(a.value, b.value, strict=True):
            np.testing.assert_allclose(x.entropy, y.entropy, rtol=1e-12)


def test_a_carried_state_proposes_with_the_next_steps_numbers(networks):
    model, dense = networks
    current = with_next_steps(make_pass(model, "none"), temperature=2.0, forbidden=True)
    ((n, ask), *_) = asks_for(current, soft=False, observe="block", sharpen=1.0)
    ask = Lookahead(writes=ask.writes, tokens=ask.tokens, carry=True)
    (answer,) = lookahead(current, [(n, ask)])
    rows = current.sequences[n]
    for k, prospect in enumerate(answer.value):
        p = dense_state(dense, rows, ask.writes[k], ask.tokens[k], 1.0)
        for i, token in zip(prospect.index, prospect.proposal, strict=True):
            position = rows.logit_positions[i]
            q = np.where(np.arange(29) == dense.config.eos_token_id, 0, p[position]) ** 0.5
            u = randomness.uniforms(3, step=1, positions=np.array([position]), stream=0)[0]
            assert token == np.searchsorted(q.cumsum(), u * q.sum(), side="right")
        assert prospect.carry.proposal.tolist() == prospect.proposal.tolist()


# ---- whole requests on a network -----------------------------------------------------------------


def soft_state(dense):
    def state(x, i, p):
        embedded = dense.embed(torch.tensor(x)).clone()
        embedded[i] = torch.tensor(p[i], dtype=F64) @ dense.w("wte")[: dense.config.vocab_size]
        return dense.log_probs(dense.logits(embedded)).exp().tolist()

    return state


@pytest.mark.parametrize(
    "fields",
    [
        {"policy": "lookahead"},
        {"policy": "lookahead", "score": "remaining", "rho": 0.6},
        {"policy": "lookahead", "write": "proposal"},
        {"policy": "info-gain", "position_temperature": 0.5},
        {"policy": "lookum", "pool_size": 6, "paths": 3},
    ],
    ids=label,
)
def test_the_engine_decodes_as_the_transcription_does(networks, fields):
    model, dense = networks
    prompt = np.random.default_rng(8).integers(0, 25, 7).tolist()
    loop = make_loop(model, row_budget=50)
    shape = {"block_length": 8, "tokens_per_step": 2}
    loop.add("x", prompt, params_of(fields | shape, prompt_len=7, max_tokens=16, seed=3))
    tokens, reports = finish(loop)

    def logits(tokens):
        return dense.logits(dense.embed(torch.tensor(tokens))).tolist()

    decoding = slow.Decoding(slow.Model(logits, MODEL_MASK), prompt, 16, 8, seed=3)
    more = {}
    if fields["policy"] == "lookahead" and fields.get("write", "soft") == "soft":
        more["state"] = soft_state(dense)
    name = fields["policy"].replace("-", "_")
    want = getattr(slow, name)(decoding, steps_of=steps_by(2), **settings_of(fields), **more)
    assert tokens["x"] == want.x[7:]
    report = reports["x"]
    if not more:
        assert report["forwards"] == want.model.forwards
    assert report["rows_forward"] == 23 * report["forwards"]
    assert report["backwards"] == 0


@pytest.mark.parametrize("fields", [{"policy": "info-gain"}, {"policy": "lookum"}], ids=label)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "frame", [{}, {"cache": "dual"}, {"cache": "prefix", "cache_refresh": 2}], ids=label
)
def test_the_winners_prediction_is_what_the_next_step_would_compute(
    networks, fields, temperature, frame
):
    """Tokens, trace and log-probabilities are the same; only the forwards are fewer."""
    model, _ = networks
    got = {}
    for reuse in (True, False):
        loop = make_loop(model, cache_rows=200)
        shape = {"block_length": 8, "tokens_per_step": 2, "trace": True, "reuse": reuse}
        params = params_of(
            fields | shape | frame,
            prompt_len=5,
            max_tokens=24,
            temperature=temperature,
            seed=4,
            logprobs=True,
            top_logprobs=2,
        )
        loop.add("x", [1, 2, 3, 4, 5], params)
        given, tokens = [], []
        while not loop.canvases["x"].done:
            result = loop.step(["x"])["x"]
            tokens += result.tokens
            given += result.logprobs
        got[reuse] = tokens, given, result.report
    (tokens, given, report), (other_tokens, other_given, other_report) = got[True], got[False]
    assert tokens == other_tokens and report["trace"] == other_report["trace"]
    for a, b in zip(given, other_given, strict=True):
        assert (a.token_ids, a.rank) == (b.token_ids, b.rank)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-9)
    saved = other_report["forwards"] - report["forwards"]
    assert 0 < saved < report["denoising_steps"]
    # Every look-ahead serves the step after it: three of four in each of three blocks, the last
    # step having nothing to choose. LookUM may draw the same set twice and look at nothing.
    if not frame:
        assert saved == 9 if fields["policy"] == "info-gain" else 3 < saved <= 9


def test_a_crowd_in_which_everybody_carries_still_steps(networks):
    """No request has rows in the step's own pass."""
    model, _ = networks
    loop = make_loop(model)
    fields = {"policy": "info-gain", "bypass": 0.0, "block_length": 8}
    for n in range(3):
        loop.add(str(n), [1, n], params_of(fields, prompt_len=2, max_tokens=8, seed=n))
    loop.step(list(loop.canvases))
    assert all(canvas.carried is not None for canvas in loop.canvases.values())
    loop.step(list(loop.canvases))
    tokens, reports = finish(loop)
    assert all(report["denoising_steps"] == 8 for report in reports.values())


def test_a_carry_of_another_state_is_an_error():
    class Wrong(Policy):
        def step(self, view):
            (prospect, _) = yield Lookahead(
                writes=(np.array([0]), np.array([1])),
                tokens=(view.proposal[:1], view.proposal[1:2]),
                carry=True,
            )
            return Commit(chosen=np.array([1, 2]), carry=prospect.carry)

    driven = Driven(Toy(0), {"gen_length": 6}, [1], 6, policy=Wrong(None))
    with pytest.raises(
        ValueError, match="carried a prediction of another state: expected one of 4"
    ):
        driven.step()


def test_broken_logits_in_a_state_fail_its_request_alone(networks):
    model, _ = networks
    loop = make_loop(model)
    fields = {"policy": "lookahead", "write": "proposal", "block_length": 4}
    for name in ("bad", "good"):
        loop.add(name, [1, 2], params_of(fields, prompt_len=2, max_tokens=4))
    loop.canvases["bad"].policy = Poisoned(loop.canvases["bad"].policy.config)
    weight = model.wte.weight.data[20].clone()
    try:
        model.wte.weight.data[20] = float("nan")
        results = loop.step(["bad", "good"])
    finally:
        model.wte.weight.data[20] = weight
    assert "not finite in a look-ahead state" in results["bad"].error
    assert results["good"].error is None


class Poisoned(Policy):
    def step(self, view):
        (prospect,) = yield Lookahead(writes=(np.array([0]),), tokens=(np.array([20]),))
        prospect.mean_entropy()
        raise AssertionError("the entropies were taken for numbers")


# ---- rules on views made by hand -----------------------------------------------------------------


def prospects_of(ask, means, masked):
    """Prospects whose mean entropies are given."""
    found = []
    for written, mean in zip(ask.writes, means, strict=True):
        index = np.setdiff1d(np.arange(masked), written)
        zero = np.zeros(len(index))
        found.append(
            Prospect(
                index=index, proposal=index, confidence=zero, margin=zero,
                entropy=np.full(len(index), mean), elsewhere=np.empty(0), carry=None,
            )
        )  # fmt: skip
    return found


def test_info_gain_takes_the_cost_as_a_sum_and_the_future_as_a_mean():
    view = make_view([0.5, 0.4, 0.3, 0.2], entropy=[1.0, 0.2, 1.0, 1.0], quota=1)
    policy = policy_of(policy="info-gain", position_temperature=5.0, candidates=40)

    def reply(ask):
        assert sorted(w.tolist() for w in ask.writes) == [[0], [1], [2], [3]]
        assert ask.writes[0].tolist() == [0]  # the surest comes first
        means = {0: 0.1, 1: 0.8, 2: 2.0, 3: 2.0}
        return prospects_of(ask, [means[int(w[0])] for w in ask.writes], 4)

    _, commit = run(policy, view, reply)
    assert commit.chosen.tolist() == [1] and commit.scores[1] == pytest.approx(-0.2 - 0.8)
    without = policy_of(policy="info-gain", position_temperature=5.0, candidates=40, cost=False)
    assert run(without, view, reply)[1].chosen.tolist() == [0]


def test_info_gain_of_equal_candidates_takes_the_first():
    view = make_view([0.5, 0.6, 0.3], entropy=[1.0, 1.0, 1.0], quota=1)
    policy = policy_of(policy="info-gain", position_temperature=5.0, candidates=40)
    _, commit = run(policy, view, lambda ask: prospects_of(ask, [0.5 + 1e-9, 0.5, 0.5], 3))
    assert commit.chosen.tolist() == [1]


def test_info_gain_bypasses_only_if_every_mask_is_sure():
    policy = policy_of(policy="info-gain")
    asks, commit = run(policy, make_view([0.8, 0.9, 0.95], quota=1))
    assert asks == [] and sorted(commit.chosen.tolist()) == [0, 1, 2]
    quota = policy_of(policy="info-gain", bypass_writes="quota")
    assert run(quota, make_view([0.8, 0.9, 0.95], quota=1))[1].chosen.tolist() == [2]
    asks, _ = run(
        policy, make_view([0.79, 0.9, 0.95]), lambda a: prospects_of(a, [0] * len(a.writes), 3)
    )
    assert len(asks) == 1
    never = policy_of(policy="info-gain", bypass=0.0)
    asks, _ = run(
        never, make_view([0.9, 0.9, 0.9]), lambda a: prospects_of(a, [0] * len(a.writes), 3)
    )
    assert len(asks) == 1


def test_info_gain_looks_at_each_set_once_and_at_most_n():
    view = make_view(np.linspace(0.1, 0.7, 9), quota=2)
    policy = policy_of(policy="info-gain", position_temperature=0.01, candidates=8)
    assert policy.candidates(view)[0].tolist() == [8, 7] and len(policy.candidates(view)) == 1
    wide = policy_of(policy="info-gain", position_temperature=100.0, candidates=8)
    sets = [tuple(sorted(s.tolist())) for s in wide.candidates(view)]
    assert len(set(sets)) == len(sets) and 2 < len(sets) <= 8 and sets[0] == (7, 8)


def test_lookum_draws_from_the_pool_and_enlarges_it_to_the_quota():
    policy = policy_of(policy="lookum", paths=200)
    view = make_view(np.linspace(0.1, 0.9, 9), quota=2)
    sets = policy.draw(view, policy.pool(view))
    assert set(itertools.chain(*sets)) == {4, 5, 6, 7, 8}
    counts = np.array([sets.count(s) for s in set(sets)])
    assert len(counts) == 10 and counts.min() > 5  # uniform over the pairs
    asks, commit = run(policy, make_view(np.linspace(0.1, 0.9, 9), quota=6))
    assert asks == [] and sorted(commit.chosen.tolist()) == [3, 4, 5, 6, 7, 8]
    by_threshold = policy_of(policy="lookum", pool_threshold=0.55)
    assert sorted(by_threshold.pool(view).tolist()) == [5, 6, 7, 8]
    assert len(policy_of(policy="lookum", pool_threshold=2.0).pool(view)) == 2


def test_lookum_draws_by_certainty_if_asked():
    policy = policy_of(policy="lookum", paths=4000, draw="certainty", draw_temperature=0.5)
    view = make_view([0.1, 0.5, 0.9])
    drawn = np.bincount([s[0] for s in policy.draw(view, policy.pool(view))]) / 4000
    weights = np.exp(np.array([0.1, 0.5, 0.9]) / 0.5)
    np.testing.assert_allclose(drawn, weights / weights.sum(), atol=0.03)


def test_lookum_resamples_by_importance_and_keeps_the_weight_of_sets_drawn_twice():
    weights = importance(np.array([-1.0, -1.2]), np.array([1, 3]), 0.1)
    assert weights[1] / weights[0] == pytest.approx(3 * math.exp(-2), rel=1e-3)
    best = importance(np.array([-1.0, -1.0 + 1e-9]), np.array([1, 1]), 0.0)
    assert best.tolist() == [1.0, 0.0]
    policy = policy_of(policy="lookum", tau=0.5, pool_size=2)
    taken = []
    for seed in range(3000):
        view = make_view([0.5, 0.5, 0.1], seed=seed)
        asks, commit = run(
            policy,
            view,
            lambda a: prospects_of(a, [0.2 if w[0] == 0 else 0.7 for w in a.writes], 3),
        )
        if asks:
            taken.append(int(commit.chosen[0]))
    assert np.mean(np.array(taken) == 0) == pytest.approx(1 / (1 + math.exp(-1)), abs=0.04)


def test_lookahead_scores_are_equations_16_and_9():
    view = make_view([0.5, 0.4, 0.3], entropy=[0.5, 1.0, 2.0], quota=1)
    reply = lambda ask: prospects_of(ask, [0.6, 0.4, 0.5], 3)  # noqa: E731
    _, commit = run(policy_of(policy="lookahead"), view, reply)
    np.testing.assert_allclose(commit.scores, [3.0 - 1.2, 2.5 - 0.8, 1.5 - 1.0])
    assert commit.chosen.tolist() == [0]
    _, commit = run(policy_of(policy="lookahead", score="remaining"), view, reply)
    np.testing.assert_allclose(commit.scores, [-1.2, -0.8, -1.0])
    assert commit.chosen.tolist() == [1]


def test_lookahead_asks_once_for_each_candidate():
    view = make_view([0.1, 0.4, 0.3, 0.2, -np.inf], quota=1)
    (ask,), commit = run(
        policy_of(policy="lookahead", rho=0.6, sharpen=0.5),
        view,
        lambda a: prospects_of(a, [1.0] * 3, 5),
    )
    assert [w.tolist() for w in ask.writes] == [[1], [2], [3]]
    assert ask.tokens is None and ask.sharpen == 0.5
    assert commit.scores.tolist()[0] == commit.scores.tolist()[4] == -np.inf
    (ask,), commit = run(
        policy_of(policy="lookahead", write="proposal"),
        view,
        lambda a: prospects_of(a, [3.0, 3.0, 3.0, 3.0, 0.0], 5),
    )
    assert [t.tolist() for t in ask.tokens] == [[50], [51], [52], [53], [54]]
    assert commit.scores[4] == -np.inf and commit.chosen.tolist() != [4]  # forbidden as yet


def test_nothing_is_looked_at_when_nothing_is_left_to_choose():
    for name in ("lookahead", "info-gain", "lookum"):
        asks, commit = run(policy_of(policy=name), make_view([0.1, 0.5], quota=2))
        assert asks == [] and sorted(commit.chosen.tolist()) == [0, 1]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"policy": "info-gain", "candidates": 0}, "candidates: input should be greater"),
        ({"policy": "info-gain", "bypass": 1.5}, "bypass: input should be less than or equal to 1"),
        ({"policy": "info-gain", "observe": "x"}, "observe: input should be 'block', 'masked'"),
        ({"policy": "info-gain", "position_temperature": -1}, "position_temperature: input"),
        ({"policy": "info-gain", "bypass_writes": "x"}, "bypass_writes: input should be 'all'"),
        ({"policy": "lookum", "paths": 0}, "paths: input should be greater"),
        ({"policy": "lookum", "pool_size": 0}, "pool_size: input should be greater"),
        ({"policy": "lookum", "tau": -1}, "tau: input should be greater"),
        ({"policy": "lookum", "draw": "x"}, "draw: input should be 'uniform' or 'certainty'"),
        ({"policy": "lookum", "draw_temperature": 0}, "draw_temperature: input should be greater"),
        ({"policy": "lookahead", "rho": 0}, "rho: input should be greater than 0"),
        ({"policy": "lookahead", "write": "x"}, "write: input should be 'soft' or 'proposal'"),
        ({"policy": "lookahead", "score": "x"}, "score: input should be 'drop' or 'remaining'"),
        ({"policy": "lookahead", "sharpen": 0}, "sharpen: input should be greater than 0"),
    ],
)
def test_errors_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        parse_sampler_config(fields)
