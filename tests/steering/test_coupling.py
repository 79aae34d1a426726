"""Coupling between writes equals the dense network's, and sets are chosen as the rule says."""

import numpy as np
import pytest
import torch
from test_importance import make_pass, setting
from test_policies import make_view, policy_of, run

from boe_vllm.policies.selection import pairwise_set
from boe_vllm.steering.chain import Conditional, Conditioned
from boe_vllm.steering.coupling import Coupling
from boe_vllm.steering.step import solve_together

# ---- estimators ----------------------------------------------------------------------------------


def frozen_logits(dense, rows, places, tokens, read):
    """[M, V] log-probabilities with `tokens` at the live `places`, and the rows at which the
    positions `read` are read; all other rows as they were."""
    before = torch.from_numpy(rows.tokens)
    dense.logits(dense.embed(before))
    old = [(k.detach(), v.detach()) for k, v in dense.kv]
    live = torch.zeros(len(before), dtype=torch.bool)
    live[[*places, *dense.read_at(read)]] = True
    after = before.clone()
    after[places] = torch.as_tensor(tokens)
    layer = iter(old)
    plain = type(dense).attend

    def attend(self, q, k, v):
        was = next(layer)
        keep = live[:, None, None]
        return plain(self, q, torch.where(keep, k, was[0]), torch.where(keep, v, was[1]))

    mixed = type("Mixed", (type(dense),), {"attend": attend})(dense.config, dense.weights)
    return mixed.log_probs(mixed.logits(mixed.embed(after)))[rows.logit_positions]


def oracle(dense, rows, query):
    """[C, C] by definition, one state at a time."""
    mask = dense.config.mask_token_id
    before = dense.log_probs(dense.logits(dense.embed(torch.from_numpy(rows.tokens))))
    before = before[rows.logit_positions]
    many = len(query.pool)
    live = query.pool if query.estimator == "pairs" else np.arange(len(rows.logit_positions))
    directed = np.zeros((many, many))
    for i in range(many):
        places = rows.logit_positions[live]
        tokens = [query.tokens[i] if place == query.pool[i] else mask for place in live]
        after = frozen_logits(dense, rows, places, tokens, rows.logit_positions[query.pool])
        for j in range(many):
            new, old = after[query.pool[j]], before[query.pool[j]]
            if query.measure == "kl":
                directed[i, j] = float((new.exp() * (new - old)).sum())
            else:
                directed[i, j] = -0.5 * float((new - old)[query.tokens[j]])
    matrix = directed + directed.T
    np.fill_diagonal(matrix, 0.0)
    return matrix


def ask_for(rows, **fields):
    pool = np.arange(len(rows.logit_positions))[:4]
    return Coupling(
        pool=pool, tokens=np.array([3, 1, 4, 1]), entropy=np.array([1.0, 0.5, 2.0, 0.1]), **fields
    )


@pytest.mark.parametrize("measure", ["kl", "pmi"])
@pytest.mark.parametrize("estimator", ["exact", "pairs"])
@pytest.mark.parametrize("shift", [0, 1])
def test_measured_coupling_equals_the_dense_network(estimator, measure, shift):
    model, dense = setting(n_kv_heads=2, shift=shift)
    current = make_pass(model, "masked")
    queries = {
        n: ask_for(rows, estimator=estimator, measure=measure)
        for n, rows in enumerate(current.sequences)
    }
    for n, given in solve_together(current, queries).items():
        want = oracle(dense, current.sequences[n], queries[n])
        np.testing.assert_allclose(given.value, want, rtol=1e-8, atol=1e-10)
        assert np.abs(want).max() > 1e-3
        positions = current.sequences[n].logit_positions
        own = positions[:4] if estimator == "pairs" else positions
        run = {*own.tolist(), *dense.read_at(positions[:4])}
        assert (given.forwards, given.rows_forward) == (1, 4 * len(run))


def test_attention_coupling_is_symmetric_normalised_and_free():
    model, _ = setting()
    current = make_pass(model, "masked")
    query = ask_for(current.sequences[1], estimator="attention", measure="kl")
    (given,) = solve_together(current, {1: query}).values()
    kappa = given.value
    np.testing.assert_allclose(kappa, kappa.T)
    assert (np.diag(kappa) == 0).all()
    attention = kappa / np.where(np.eye(4) > 0, 1, np.minimum.outer(query.entropy, query.entropy))
    assert attention[~np.eye(4, dtype=bool)].mean() == pytest.approx(1.0)
    assert (given.forwards, given.backwards) == (0, 0)


@pytest.mark.parametrize("shift", [0, 1])
def test_overlap_coupling_equals_the_dense_network(shift):
    model, dense = setting(n_kv_heads=2, shift=shift)
    current = make_pass(model, "masked", budget_bytes=2048)  # tiles of two rows
    queries = {
        n: ask_for(rows, estimator="overlap", measure="kl")
        for n, rows in enumerate(current.sequences)
    }
    for n, given in solve_together(current, queries).items():
        places = current.sequences[n].logit_positions[queries[n].pool]
        tokens = torch.from_numpy(current.sequences[n].tokens)
        p = dense.log_probs(dense.logits(dense.embed(tokens)))[places].exp()
        attention = np.zeros((4, 4))
        for (q, _), (k, _) in zip(dense.attention, dense.kv, strict=True):
            k = k.repeat_interleave(2, 1)
            weights = torch.einsum("ihp,jhp->hij", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
            attention += weights.sum(0)[dense.read_at(places)][:, places].numpy()
        want = np.zeros((4, 4))
        for i in range(4):
            for j in range(4):
                if i != j:
                    shared = (p[i] * (1 - p[i]) * p[j] * (1 - p[j])).sqrt().sum()
                    want[i, j] = (attention[i, j] + attention[j, i]) * float(shared)
        mean = (attention + attention.T)[~np.eye(4, dtype=bool)].mean()
        np.testing.assert_allclose(given.value, want / mean, rtol=1e-8, atol=1e-12)
        assert want.max() > 1e-3
        (alone,) = solve_together(current, {n: queries[n]}).values()
        np.testing.assert_array_equal(alone.value, given.value)
        assert (given.forwards, given.backwards) == (0, 0)


@pytest.mark.parametrize("shift", [0, 1])
def test_a_conditional_equals_the_dense_network_with_the_rest_frozen(shift):
    model, dense = setting(shift=shift)
    current = make_pass(model, "masked")
    rows = current.sequences[1]
    query = Conditional(
        written=np.array([2]),
        tokens=np.array([5]),
        queried=np.array([0, 3]),
        temperature=0.0,
        uniform=np.full(2, 0.5),
    )
    (given,) = solve_together(current, {1: query}).values()
    places = rows.logit_positions[[2, 0, 3]]
    after = frozen_logits(dense, rows, places, [5, 28, 28], places[1:])[[0, 3]]
    assert given.value.proposal.tolist() == after.argmax(-1).tolist()
    np.testing.assert_allclose(given.value.confidence, after.exp().amax(-1), rtol=1e-8)
    np.testing.assert_allclose(given.value.entropy, -(after.exp() * after).sum(-1), rtol=1e-8)
    assert given.rows_forward == len({*places.tolist(), *dense.read_at(places[1:])})


# ---- choice --------------------------------------------------------------------------------------


def test_pairwise_set_trades_score_for_independence():
    scores = np.array([0.0, -0.1, -0.5, -0.6])
    coupling = np.zeros((4, 4))
    coupling[0, 1] = coupling[1, 0] = 1.0
    assert pairwise_set(scores, coupling, 2).tolist() == [0, 2]
    assert pairwise_set(scores, 0 * coupling, 3).tolist() == [0, 1, 2]
    assert pairwise_set(scores, coupling, 4).tolist() == [0, 2, 3, 1]


def test_pairwise_set_equals_a_slow_transcription_with_ties():
    rng = np.random.default_rng(0)
    for _ in range(200):
        many = int(rng.integers(2, 8))
        scores = rng.integers(-3, 1, many) * 0.5
        scores[rng.random(many) < 0.1] = -np.inf
        coupling = rng.integers(0, 3, (many, many)) * 0.25
        coupling = coupling + coupling.T
        chosen = []
        for _step in range(int(rng.integers(1, many + 1))):
            best = None
            for i in range(many):
                if i in chosen:
                    continue
                value = scores[i] - sum(coupling[j, i] for j in chosen)
                if best is None or value > best[0]:
                    best = (value, i)
            chosen.append(best[1])
        assert pairwise_set(scores, coupling, len(chosen)).tolist() == chosen


def replies_of(table):
    """A denoiser whose confidences depend on what is written: table[frozenset(written)] -> [M]."""

    def reply(query):
        p = np.array(table[frozenset(query.written.tolist())])[query.queried]
        return Conditioned(proposal=query.queried + 90, confidence=p, entropy=1 - p)

    return reply


def test_conditional_set_follows_the_chain_rule():
    view = make_view([0.9, 0.8, 0.7, 0.2], quota=3)
    table = {frozenset({0}): [0, 0.1, 0.6, 0.5], frozenset({0, 2}): [0, 0.3, 0, 0.4]}
    queries, commit = run(policy_of(policy="joint"), view, replies_of(table))
    assert [query.written.tolist() for query in queries] == [[0], [0, 2]]
    assert commit.chosen.tolist() == [0, 2, 3]
    assert commit.tokens.tolist() == [50, 92, 93]  # later tokens as proposed given the earlier


def test_certain_candidates_need_no_round_of_their_own():
    view = make_view([0.999, 0.995, 0.7, 0.2], quota=3)
    table = {frozenset({0, 1}): [0, 0, 0.3, 0.4]}
    policy = policy_of(policy="joint")
    queries, commit = run(policy, view, replies_of(table))
    assert len(queries) == 1 and commit.chosen.tolist() == [0, 1, 3]


def test_the_pool_bounds_the_candidates():
    view = make_view(np.linspace(0.9, 0.2, 8), quota=2)
    table = {frozenset({0}): np.linspace(0.1, 0.9, 8)}
    for pool, last in ((1.0, 1), (1.5, 2), (2.0, 3), (4.0, 7)):
        policy = policy_of(policy="joint", multiple=pool)
        _, commit = run(policy, view, replies_of(table))
        assert commit.chosen.tolist() == [0, last]


def test_pairwise_asks_for_the_coupling_of_the_pool():
    view = make_view([0.9, 0.85, 0.8, 0.2], quota=2)
    coupling = np.zeros((4, 4))
    coupling[0, 1] = coupling[1, 0] = 3.0
    policy = policy_of(policy="pairwise")
    (query,), commit = run(policy, view, lambda query: coupling)
    assert query.estimator == "pairs" and query.pool.tolist() == [0, 1, 2, 3]
    assert commit.chosen.tolist() == [0, 2]


def test_one_token_a_step_needs_no_set():
    for policy in ("joint", "pairwise"):
        queries, commit = run(policy_of(policy=policy), make_view([0.2, 0.9]))
        assert queries == [] and commit.chosen.tolist() == [1]
