"""Look-ahead in the engine: states are predicted as by a dense forward, packed within the row
budget, and the state that is chosen needs no other forward."""

import dataclasses

import numpy as np
import pytest
import slow_remasking as slow
import torch
from oracle import Dense, random_weights, small_config
from test_importance import make_pass, next_step
from test_loop import EOS, MASK, finish, make_loop, params_of
from test_policy_rules_lookahead import settings_of
from toy import Driven, Toy, label, steps_by

from boe_vllm.models.build import random_model
from boe_vllm.models.rows import pack
from boe_vllm.policies.base import Commit, Policy, PolicyConfig
from boe_vllm.sampling import randomness
from boe_vllm.sampling.canvas_constraints import CanvasConstraints
from boe_vllm.sampling.constraints import TokenConstraints
from boe_vllm.sampling.statistics import RowWrites, read_statistics
from boe_vllm.steering.lookahead import Lookahead

F64 = torch.float64


@pytest.fixture(scope="module")
def networks():
    return network_pair()


def network_pair(shift=0):
    config = small_config(shift=shift)
    weights = random_weights(config, dtype=F64)
    model = random_model(config, dtype=F64)
    model.load_weights(weights.items())
    return model, Dense(config, weights)


def with_next_steps(current, *, row_budget=8192, temperature=0.0, never=None, bad_words=()):
    demanded = TokenConstraints(bad_words=bad_words)
    step = next_step(
        temperature=temperature, seed=3, constraints=CanvasConstraints(demanded, 0, never=never)
    )
    steps = (step,) * len(current.sequences)
    return dataclasses.replace(current, next_steps=steps, row_budget=row_budget)


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
    queries = []
    for n, rows in enumerate(current.sequences):
        masked = len(rows.logit_positions)
        writes = (np.array([0]), np.array([2, 1]), np.array([masked - 1]))
        tokens = tuple(np.arange(len(w)) + n for w in writes)
        query = Lookahead(
            writes=writes, tokens=None if soft else tokens, observe=observe, sharpen=sharpen
        )
        queries.append((n, query))
    return queries


@pytest.mark.parametrize("observe", ["block", "masked", "all"])
@pytest.mark.parametrize("soft, sharpen", [(True, 1.0), (True, 0.5), (False, 1.0)])
@pytest.mark.parametrize("shift", [0, 1])
def test_states_are_predicted_as_by_a_dense_forward(observe, soft, sharpen, shift):
    model, dense = network_pair(shift)
    current = with_next_steps(make_pass(model, "none"))
    for rows in current.sequences:  # a mask outside the block
        outside = np.setdiff1d(np.arange(len(rows.tokens)), rows.logit_positions)
        rows.tokens[outside[-1]] = MASK
    current = with_next_steps(again(model, current))
    queries = asks_for(current, soft=soft, observe=observe, sharpen=sharpen)
    for (n, query), answer in zip(queries, Lookahead.solve(current, queries), strict=True):
        rows = current.sequences[n]
        assert answer.forwards == 3 and answer.rows_forward == 3 * len(rows.tokens)
        assert answer.backwards == answer.rows_backward == 0
        for k, prospect in enumerate(answer.value):
            written = query.writes[k]
            p = dense_state(dense, rows, written, None if soft else query.tokens[k], sharpen)
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
            masks = np.flatnonzero(rows.tokens == MASK)
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
    layout = pack(current.sequences, torch.device("cpu"))
    hidden, saved = model.run(model.embed(layout.tokens), layout)
    log_probs = current.log_probs.of(hidden, np.zeros(len(hidden), bool))
    rows = len(hidden)
    read_statistics(
        log_probs, RowWrites(temperature=np.zeros(rows), uniform=np.full(rows, 0.5)), keep=True
    )
    return dataclasses.replace(current, layout=layout, log_probs=log_probs, saved=saved)


@pytest.mark.parametrize("row_budget, passes", [(8192, 1), (40, 3), (20, 6), (1, 9)])
def test_the_row_budget_splits_the_states_and_changes_nothing(networks, row_budget, passes):
    """Three states of 9, 14 and 6 rows each: 87 rows."""
    model, _ = networks
    whole = with_next_steps(make_pass(model, "none"))
    split = with_next_steps(make_pass(model, "none"), row_budget=row_budget)
    queries = asks_for(whole, soft=True, observe="block", sharpen=1.0)
    sizes = []
    run_model = model.run
    want = Lookahead.solve(whole, queries)
    try:
        model.run = lambda x, layout, context=None: (
            sizes.append(len(x)),
            run_model(x, layout, context),
        )[1]
        got = Lookahead.solve(split, queries)
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
    current = with_next_steps(make_pass(model, "none"), temperature=2.0, never=EOS)
    ((n, query), *_) = asks_for(current, soft=False, observe="block", sharpen=1.0)
    query = Lookahead(writes=query.writes, tokens=query.tokens, carry=True)
    (answer,) = Lookahead.solve(current, [(n, query)])
    rows = current.sequences[n]
    for k, prospect in enumerate(answer.value):
        p = dense_state(dense, rows, query.writes[k], query.tokens[k], 1.0)
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
@pytest.mark.parametrize("shift", [0, 1])
def test_the_engine_decodes_as_the_transcription_does(fields, shift):
    model, dense = network_pair(shift)
    prompt = np.random.default_rng(8).integers(0, 25, 7).tolist()
    loop = make_loop(model, row_budget=50)
    shape = {"block_length": 8, "tokens_per_step": 2}
    loop.add("x", prompt, params_of(fields | shape, prompt_len=7, max_tokens=16, seed=3))
    tokens, reports = finish(loop)

    def logits(tokens):
        return dense.logits(dense.embed(torch.tensor(tokens))).tolist()

    decoding = slow.Decoding(slow.Model(logits, MASK), prompt, 16, 8, seed=3)
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

    driven = Driven(Toy(0), {"gen_length": 6}, [1], 6, policy=Wrong(PolicyConfig()))
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


def test_wide_states_count_as_one_forward_of_all_their_rows(networks):
    """As many as the passes that they are split into; two for a guided request."""
    model, _ = networks
    current = with_next_steps(make_pass(model, "none"))
    length = len(current.sequences[0].tokens)
    query = Lookahead(
        writes=(np.array([0]), np.array([0, 1]), np.array([2])),
        tokens=(np.array([3]), np.array([3, 4]), np.array([5])),
        wide=True,
    )
    for budget, passes in ((8192, 1), (2 * length, 2), (1, 3)):
        tight = dataclasses.replace(current, row_budget=budget)
        (one,) = Lookahead.solve(tight, [(0, query)])
        assert (one.forwards, one.rows_forward) == (passes, 3 * length)
        assert len(one.value) == 3
    (apart,) = Lookahead.solve(current, [(0, dataclasses.replace(query, wide=False))])
    assert (apart.forwards, apart.rows_forward) == (3, 3 * length)
