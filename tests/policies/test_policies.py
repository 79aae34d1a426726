"""Policies decide as their rules say, on views made by hand; ties go to the lower position."""

import math

import numpy as np
import pytest
from toy import decided

from boe_vllm.policies import POLICY_NAMES, load_policy
from boe_vllm.policies.base import View, candidates_of, top
from boe_vllm.request.config import parse_sampler_config
from boe_vllm.sampling import randomness
from boe_vllm.steering.chain import Conditional, Conditioned
from boe_vllm.steering.importance import TokenImportance


def make_view(confidence, *, quota=1, entropy=None, margin=None, vocab_size=100, **changes):
    confidence = np.asarray(confidence, float)
    masked = len(confidence)
    fields = dict(
        positions=np.arange(masked) + 5,
        proposal=np.arange(masked) + 50,
        confidence=confidence,
        margin=np.asarray(confidence if margin is None else margin, float),
        entropy=np.asarray(1 - confidence if entropy is None else entropy, float),
        quota=quota,
        masked_at_start=masked,
        masked_now=masked,
        step=0,
        block_step=0,
        block_steps=masked,
        vocab_size=vocab_size,
        seed=7,
        memory={},
    )
    return View(**(fields | changes))


def policy_of(**fields):
    """The policy as a request has it that says how many tokens a step writes."""
    config = parse_sampler_config(fields)
    return load_policy(config.policy)(config.settings.paced())


def run(policy, view, reply=None):
    """Drive a policy's step; returns its queries and its commit."""
    queries = []

    def answered(query):
        queries.append(query)
        return reply(query)

    commit = decided(policy.step(view), answered)
    return queries, commit


def test_every_name_loads_its_policy():
    for name in POLICY_NAMES:
        assert load_policy(name).name == name


def test_every_policy_describes_itself():
    """A reader of the reference learns from the settings what the policy does."""
    texts = set()
    for name in sorted(POLICY_NAMES):
        policy = load_policy(name)
        text = vars(policy.Config)["__doc__"]
        texts.add(text)
        first = " ".join(text.split("\n\n")[0].split())
        assert first.endswith(".") and len(first) < 120
        assert policy.source and "forward" in policy.passes
    assert len(texts) == len(POLICY_NAMES)


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match=r"unknown policy 'x'; expected one of \["):
        load_policy("x")


@pytest.mark.parametrize(
    "name, want", [("confidence", [3, 1]), ("margin", [0, 2]), ("entropy", [2, 4])]
)
def test_local_policies_take_the_best_by_their_score(name, want):
    view = make_view(
        [0.1, 0.8, 0.3, 0.9, 0.2],
        margin=[0.9, 0.1, 0.8, 0.2, 0.3],
        entropy=[2.0, 1.5, 0.1, 1.0, 0.5],
        quota=2,
    )
    queries, commit = run(policy_of(policy=name), view)
    assert queries == [] and commit.chosen.tolist() == want


def test_equal_scores_go_to_the_lower_position():
    _, commit = run(policy_of(policy="confidence"), make_view([0.5, 0.7, 0.7, 0.7], quota=2))
    assert commit.chosen.tolist() == [1, 2]


def test_scores_are_compared_as_they_are():
    scores = np.array([0.5, 1 - 3e-8, 1.0, 1 - 1e-8, 1.0, -np.inf])
    assert top(scores, 6).tolist() == [2, 4, 3, 1, 0, 5]


def test_forbidden_early_commits_come_last():
    for name in ("confidence", "margin", "entropy"):
        _, commit = run(policy_of(policy=name), make_view([-np.inf, 0.2, 0.1], quota=2))
        assert sorted(commit.chosen.tolist()) == [1, 2]


def test_candidates_are_what_may_be_written_now():
    view = make_view([-np.inf, 0.2, 0.1, -np.inf, 0.3], quota=2)
    for count, want in ((1, [4, 1]), (2, [4, 1]), (3, [4, 1, 2]), (5, [4, 1, 2])):
        assert candidates_of(view, view.confidence, count).tolist() == want
    view = make_view([-np.inf, 0.2, -np.inf], quota=2)  # which fills up what is due
    assert candidates_of(view, view.confidence, 3).tolist() == [1, 0]


def test_random_is_a_function_of_seed_step_and_position():
    policy, view = policy_of(policy="random"), make_view(np.full(40, 0.5), quota=10)
    first = run(policy, view)[1].chosen
    assert first.tolist() == run(policy, view)[1].chosen.tolist()
    assert (
        first.tolist()
        != run(policy, make_view(np.full(40, 0.5), quota=10, step=1))[1].chosen.tolist()
    )
    assert (
        first.tolist()
        != run(policy, make_view(np.full(40, 0.5), quota=10, seed=8))[1].chosen.tolist()
    )


def test_random_numbers_are_uniform_and_depend_on_position_alone():
    many = randomness.uniforms(1, step=3, positions=np.arange(100_000), stream=0)
    assert abs(many.mean() - 0.5) < 0.01 and abs(np.mean(many < 0.1) - 0.1) < 0.01
    few = randomness.uniforms(1, step=3, positions=np.array([70, 3]), stream=0)
    assert few.tolist() == many[[70, 3]].tolist()


# ---- boe ---------------------------------------------------------------------------------------

PAPER = {"policy": "boe", "preset": "paper", "floor_weight": 0.0, "gate": "none"}


def test_boe_asks_for_the_surest_share_and_takes_the_most_important():
    view = make_view([0.1, 0.8, 0.3, 0.9, 0.2, 0.4, 0.5, 0.6])
    queries, commit = run(
        policy_of(**PAPER, rho=0.5), view, lambda a: np.array([1.0, 4.0, 2.0, 3.0])
    )
    (query,) = queries
    assert isinstance(query, TokenImportance)
    assert query.candidates.tolist() == [1, 3, 6, 7]
    assert query.objective.tolist() == list(range(8)) and query.active.tolist() == list(range(8))
    assert commit.chosen.tolist() == [3]


@pytest.mark.parametrize("prefilter, want", [("margin", [0, 1]), ("entropy", [2, 3])])
def test_boe_prefilters_by_what_is_named(prefilter, want):
    view = make_view(
        [0.1, 0.2, 0.3, 0.4], margin=[0.9, 0.8, 0.1, 0.1], entropy=[2.0, 2.0, 0.1, 0.2]
    )
    queries, _ = run(
        policy_of(policy="boe", rho=0.5, prefilter=prefilter), view, lambda a: np.zeros(2)
    )
    assert queries[0].candidates.tolist() == want


@pytest.mark.parametrize(
    "candidates, sets, want", [(3, "top", 3), (3, "chain", 4), (5, "chain", 5)]
)
def test_boe_has_at_least_as_many_candidates_as_tokens_due(candidates, sets, want):
    """And twice as many where a set is built."""
    queries, commit = run(
        policy_of(policy="boe", rho=0.1, candidates=candidates, sets=sets),
        make_view(np.linspace(0.1, 0.8, 8), quota=2),
        lambda a: np.zeros(want) if isinstance(a, TokenImportance) else conditioned(a),
    )
    assert len(queries[0].candidates) == want and len(commit.chosen) == 2


def test_boe_objectives_and_active_sets():
    view = make_view(np.linspace(0.1, 0.8, 8))
    remaining = policy_of(policy="boe", rho=0.25, objective="remaining")
    (query,), _ = run(remaining, view, lambda a: np.zeros(2))
    assert query.candidates.tolist() == [6, 7] and query.objective.tolist() == list(range(6))
    (query,), _ = run(policy_of(policy="boe", active="candidates"), view, lambda a: np.zeros(2))
    assert query.active.tolist() == query.candidates.tolist()
    (query,), _ = run(policy_of(policy="boe", active="all"), view, lambda a: np.zeros(2))
    assert query.active is None


def test_boe_runs_no_backward_where_there_is_no_choice():
    for policy, view in (
        (policy_of(policy="boe", rho=1.0, objective="remaining"), make_view([0.2, 0.9, 0.4])),
        (policy_of(**PAPER, rho=0.25), make_view([0.2, 0.9, 0.4])),
        (policy_of(policy="boe"), make_view([0.7], quota=1)),
        # Of three candidates one may be written now, and nothing else is left to choose.
        (policy_of(policy="boe"), make_view([-np.inf, 0.9, -np.inf])),
    ):
        queries, commit = run(policy, view)
        assert queries == []
        assert commit.chosen.tolist() == [int(np.argmax(view.confidence))]


@pytest.mark.parametrize("sets", ["top", "chain"])
def test_boe_bypasses_the_backward_when_all_tokens_of_the_step_are_sure(sets):
    sure, one_less = [0.995, 0.99, 0.5, 0.2], [0.995, 0.98, 0.5, 0.2]
    backwards = lambda queries: sum(isinstance(q, TokenImportance) for q in queries)  # noqa: E731
    reply = lambda a: np.zeros(4) if isinstance(a, TokenImportance) else conditioned(a)  # noqa: E731
    for fields, confidence, want in (
        ({}, sure, 0),
        ({}, one_less, 1),
        ({"bypass": 0.98}, one_less, 0),
        ({"bypass": None}, sure, 1),
        # A bound writes more than the two that are due, if sets are not chosen.
        ({"commit": "threshold", "threshold": 0.4}, sure, 1 if sets == "top" else 0),
    ):
        policy = policy_of(policy="boe", sets=sets, candidates=4, **fields)
        queries, commit = run(policy, make_view(confidence, quota=2), reply)
        assert backwards(queries) == want
        assert commit.chosen.tolist()[:2] == [0, 1]


def test_boe_gate_is_equation_15():
    view = make_view([0.5, 0.5], entropy=[math.log(100), 0.5 * math.log(100)], vocab_size=100)
    fields = PAPER | {"gate": "entropy"}
    _, commit = run(policy_of(**fields, rho=1.0), view, lambda a: np.array([8.0, 4.0]))
    np.testing.assert_allclose(commit.scores, [0.0, 2.0])
    _, commit = run(
        policy_of(**(fields | {"gate": "confidence"}), rho=1.0, gate_power=2.0),
        make_view([0.5, 1.0]),
        lambda a: np.array([8.0, 1.0]),
    )
    np.testing.assert_allclose(commit.scores, [2.0, 1.0])


def test_boe_floor_is_high_at_the_start_and_low_at_the_end():
    policy = policy_of(**(PAPER | {"floor_weight": 2.0}), rho=1.0, floor_max=0.8)
    answers = lambda a: np.array([1.0, 1.0])  # noqa: E731
    view = make_view([0.5, 0.6], entropy=[0.3, 1.0], masked_at_start=4, masked_now=4)
    np.testing.assert_allclose(run(policy, view, answers)[1].scores, [1 - 2 * 0.5**2, 1.0])
    view = make_view([0.5, 0.6], entropy=[0.3, 1.0], masked_at_start=4, masked_now=2)
    np.testing.assert_allclose(run(policy, view, answers)[1].scores, [1 - 2 * 0.1**2, 1.0])


def test_boe_minmax_rescales_before_the_floor():
    policy = policy_of(
        **(PAPER | {"floor_weight": 1.0}), rho=1.0, normalize="minmax", floor_max=1.0
    )
    view = make_view([0.5, 0.6, 0.7], entropy=[0.5, 2.0, 2.0])
    _, commit = run(policy, view, lambda a: np.array([30.0, 10.0, 20.0]))
    np.testing.assert_allclose(commit.scores, [0.75, 0.0, 0.5])
    _, commit = run(policy, make_view([0.5, 0.6], entropy=[9.0, 9.0]), lambda a: np.ones(2))
    np.testing.assert_allclose(commit.scores, [0.0, 0.0])


def test_boe_adds_risk_and_importance():
    view, importance = make_view([0.5, 0.25]), lambda query: np.array([0.1, 0.9])
    _, commit = run(policy_of(policy="boe", gain_scale=2.0, rho=1.0, gate="none"), view, importance)
    np.testing.assert_allclose(commit.scores, [np.log(0.5) + 0.2, np.log(0.25) + 1.8])
    _, commit = run(policy_of(policy="boe", preset="future", risk=3.0), view, importance)
    np.testing.assert_allclose(commit.scores, [3 * np.log(0.5) + 0.05, 3 * np.log(0.25) + 0.45])


def conditioned(query, p=0.5):
    many = len(query.queried)
    return Conditioned(
        proposal=query.queried + 90, confidence=np.full(many, p), entropy=np.zeros(many)
    )


def test_boe_writes_the_best_by_score_first_and_then_by_the_chain_rule():
    """The most important candidate is not the likeliest; what joins it is."""
    view = make_view([0.6, 0.5, 0.4, 0.3], quota=3)
    table = {frozenset({3}): [0.1, 0.2, 0.7, 0], frozenset({2, 3}): [0.4, 0.3, 0, 0]}
    asked = []

    def reply(query):
        asked.append(query)
        if isinstance(query, TokenImportance):
            return np.array([0.0, 0.1, 0.2, 9.0])
        p = np.array(table[frozenset(query.written.tolist())])[query.queried]
        return Conditioned(proposal=query.queried + 90, confidence=p, entropy=1 - p)

    _, commit = run(policy_of(policy="boe", gate="none"), view, reply)
    assert [type(query) for query in asked] == [TokenImportance, Conditional, Conditional]
    assert commit.chosen.tolist() == [3, 2, 0]
    assert commit.tokens.tolist() == [53, 92, 90]
    # The paper writes the top of its ranking.
    _, commit = run(policy_of(policy="boe", preset="kv", rho=1.0), view, reply)
    assert sorted(commit.chosen.tolist()) == [1, 2, 3] and commit.tokens is None
