"""Sets whose size a bound decides: the prefix of `eb`, then that of every partial prediction."""

import numpy as np
import pytest
from test_policies import make_view, run

from boe_vllm.policies import load_policy
from boe_vllm.policies.bounded import Bound, bounded_set
from boe_vllm.request.config import parse_sampler_config
from boe_vllm.steering.chain import Conditional, Conditioned
from boe_vllm.steering.importance import TokenImportance


def policy(**fields):
    """As a request has it that says nothing else."""
    config = parse_sampler_config(fields)
    return load_policy(config.policy)(config.settings)


def replies_of(*rounds):
    """Each round's entropies, [M]; tokens 90 + index."""
    left = list(rounds)

    def reply(query):
        if isinstance(query, TokenImportance):
            return np.arange(len(query.candidates), dtype=float)
        entropy = np.array(left.pop(0), float)[query.queried]
        return Conditioned(proposal=query.queried + 90, confidence=1 - entropy, entropy=entropy)

    return reply


def view_of(entropy, **changes):
    return make_view(1 - np.array(entropy), entropy=entropy, **changes)


def test_a_round_writes_the_prefix_of_what_it_predicts_again():
    view = view_of([0.008, 0.5, 0.009, 0.4, 0.9])
    again = [0, 0.008, 0, 0.3, 0.009]
    queries, commit = run(policy(policy="joint", bound="entropy"), view, replies_of(again))
    (query,) = queries
    assert query.written.tolist() == [0, 2] and query.tokens.tolist() == [50, 52]
    assert query.queried.tolist() == [1, 3, 4]
    assert commit.chosen.tolist() == [0, 2, 1, 4]
    assert commit.tokens.tolist() == [50, 52, 91, 94]  # as predicted when they were written


def test_rounds_go_on_and_a_pool_bounds_what_they_ask():
    view = view_of([0.1, 0.2, 0.3, 0.4])
    replies = replies_of([0, 0.1, 0.45, 0], [0, 0, 0.05, 0.2])
    own = policy(policy="joint", bound="entropy", rounds=2, pool=2, gamma=0.0)
    queries, commit = run(own, view, replies)
    assert [q.queried.tolist() for q in queries] == [[1, 2], [2, 3]]
    assert [q.written.tolist() for q in queries] == [[0], [0, 1]]
    assert commit.chosen.tolist() == [0, 1, 2]


@pytest.mark.parametrize("entropy, asked", [([0.2, 0.6, 0.7], 0), ([0.2, 0.4, 0.7], 1)])
def test_what_is_not_trusted_waits_for_the_next_step(entropy, asked):
    """Where not even the surest is, no round is run, or nothing of the round is written."""
    queries, commit = run(
        policy(policy="joint", bound="entropy"), view_of(entropy), replies_of([0, 0.55, 0.6])
    )
    assert len(queries) == asked and commit.chosen.tolist() == [0]


def test_without_rounds_it_is_eb():
    rng = np.random.default_rng(3)
    for _ in range(50):
        view = view_of(rng.exponential(0.02, 12).clip(0, 0.9))
        _, ours = run(policy(policy="joint", bound="entropy", rounds=0), view)
        _, theirs = run(policy(policy="eb", gamma=0.01), view)
        assert ours.chosen.tolist() == theirs.chosen.tolist()


def test_the_last_position_needs_no_round():
    queries, commit = run(policy(policy="joint", bound="entropy"), view_of([0.3]))
    assert queries == [] and commit.chosen.tolist() == [0]


def test_boe_asks_for_a_gradient_only_where_the_bound_allows_one_unsure_position():
    sure = view_of([0.001, 0.002, 0.3])
    queries, _ = run(policy(policy="boe", trust=0.0), sure)
    assert queries == []
    unsure = view_of([0.3, 0.32, 0.34, 0.36])
    own = policy(policy="boe", trust=0.0, rho=1.0, gain_scale=10.0, gate="none")
    (query,), commit = run(own, unsure, replies_of())
    assert isinstance(query, TokenImportance)
    assert commit.chosen.tolist() == [3]  # the best score, not the least entropy


def test_a_request_that_says_how_many_gets_as_many():
    view = make_view([0.999, 0.998, 0.997, 0.3], quota=1)
    assert len(run(policy(policy="joint", trust=0.0), view)[1].chosen) > 1
    for name in ("joint", "boe"):
        for pace in ({"tokens_per_step": 1}, {"steps": 8}, {"commit": "quota"}):
            assert len(run(policy(policy=name, **pace), view)[1].chosen) == 1
        server = parse_sampler_config({"policy": name, "tokens_per_step": 1})
        assert parse_sampler_config({}, base=server).settings.commit == "quota"
        assert parse_sampler_config({"policy": name}).settings.commit is None


def test_a_bound_beside_remasking_is_refused():
    with pytest.raises(ValueError, match=r"commit: expected 'quota' beside remask='remdm'"):
        parse_sampler_config({"policy": "joint", "remask": "remdm", "commit": "rounds"})
    assert parse_sampler_config({"policy": "joint", "remask": "remdm"}).settings.commit is None


def bound_of(rule, limit):
    return Bound(rule=rule, limit=limit, pool=64, rounds=1, trust=0.5)


def test_what_comes_last_is_written_only_alone():
    last, entropy = -np.inf, np.zeros(3)
    for bound in (bound_of("entropy", 1.0), bound_of("threshold", 0.0)):
        assert bounded_set(entropy, np.array([last, 0.9, 0.8]), bound).tolist() == [1, 2]
        assert bounded_set(entropy, np.full(3, last), bound).tolist() == [0]


def test_without_rounds_a_threshold_is_that_of_the_policy():
    rng = np.random.default_rng(4)
    for _ in range(50):
        view = make_view(1 - rng.exponential(0.05, 12).clip(0, 0.9))
        _, ours = run(policy(policy="joint", rounds=0), view)
        _, theirs = run(policy(policy="threshold", threshold=0.99), view)
        assert sorted(ours.chosen.tolist()) == theirs.chosen.tolist()


def test_a_round_writes_what_reaches_the_threshold_or_the_most_probable():
    view = make_view([0.995, 0.6, 0.5, 0.4], entropy=[0.1, 0.3, 0.4, 0.5])

    def reply(confidence):
        return lambda query: Conditioned(
            proposal=query.queried + 90,
            confidence=np.array(confidence),
            entropy=np.array([0.3, 0.2, 0.4]),
        )

    for confidence, chosen in (([0.99, 0.7, 0.992], [0, 3, 1]), ([0.7, 0.6, 0.8], [0, 3])):
        queries, commit = run(policy(policy="joint"), view, reply(confidence))
        assert [q.written.tolist() for q in queries] == [[0]]
        assert commit.chosen.tolist() == chosen
        assert commit.tokens.tolist() == [50, *(90 + i for i in chosen[1:])]


def test_rows_are_those_of_the_conditional():
    """The queries are partial passes over written and asked rows, never more than the block's."""
    view = view_of([0.0, 0.1, 0.1, 0.1])
    queries, _ = run(
        policy(policy="joint", bound="entropy", rounds=3, gamma=0.0),
        view,
        replies_of(*[[0.1] * 4] * 3),
    )
    for query in queries:
        assert isinstance(query, Conditional)
        assert len(query.written) + len(query.queried) <= 4
