"""Look-ahead policies: the engine does what a slow transcription of the rule does, state by state,
for as many forwards; the states' predictions are those of a dense forward."""

import itertools
import math

import numpy as np
import pytest
import slow_remasking as slow
import torch
from test_policies import make_view, policy_of, run
from toy import GRID, MASK, Driven, Toy, label, steps_by

from boe_vllm.policies.lookum import importance
from boe_vllm.request.config import parse_sampler_config
from boe_vllm.steering.lookahead import Prospect

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
        decoding = slow.Decoding(
            slow.Model(toy.logits, MASK, grid=GRID), prompt, length, block, seed
        )
        want = rule(decoding, steps_of=steps_by(per_step), **settings_of(fields))
        assert got.canvas.tokens.tolist() == want.x
        assert got.inputs == want.inputs
        if reuse:
            assert got.forwards == want.model.forwards
        else:
            looked = sum(c.carry is not None for c in got.commits)
            assert looked == 0 and got.forwards >= want.model.forwards


# ---- rules on views made by hand -----------------------------------------------------------------


def prospects_of(query, means, masked):
    """Prospects whose mean entropies are given."""
    found = []
    for written, mean in zip(query.writes, means, strict=True):
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

    def reply(query):
        assert sorted(w.tolist() for w in query.writes) == [[0], [1], [2], [3]]
        assert query.writes[0].tolist() == [0]  # the surest comes first
        means = {0: 0.1, 1: 0.8, 2: 2.0, 3: 2.0}
        return prospects_of(query, [means[int(w[0])] for w in query.writes], 4)

    _, commit = run(policy, view, reply)
    assert commit.chosen.tolist() == [1] and commit.scores[1] == pytest.approx(-0.2 - 0.8)
    without = policy_of(policy="info-gain", position_temperature=5.0, candidates=40, cost=False)
    assert run(without, view, reply)[1].chosen.tolist() == [0]


def test_info_gain_of_equal_candidates_takes_the_first():
    view = make_view([0.5, 0.6, 0.3], entropy=[1.0, 1.0, 1.0], quota=1)
    policy = policy_of(policy="info-gain", position_temperature=5.0, candidates=40)
    _, commit = run(policy, view, lambda query: prospects_of(query, [0.5, 0.5, 0.5], 3))
    assert commit.chosen.tolist() == [1]


def test_info_gain_bypasses_only_if_every_mask_is_sure():
    policy = policy_of(policy="info-gain")
    queries, commit = run(policy, make_view([0.8, 0.9, 0.95], quota=1))
    assert queries == [] and sorted(commit.chosen.tolist()) == [0, 1, 2]
    quota = policy_of(policy="info-gain", bypass_writes="quota")
    assert run(quota, make_view([0.8, 0.9, 0.95], quota=1))[1].chosen.tolist() == [2]
    queries, _ = run(
        policy, make_view([0.79, 0.9, 0.95]), lambda a: prospects_of(a, [0] * len(a.writes), 3)
    )
    assert len(queries) == 1
    never = policy_of(policy="info-gain", bypass=0.0)
    queries, _ = run(
        never, make_view([0.9, 0.9, 0.9]), lambda a: prospects_of(a, [0] * len(a.writes), 3)
    )
    assert len(queries) == 1


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
    queries, commit = run(policy, make_view(np.linspace(0.1, 0.9, 9), quota=6))
    assert queries == [] and sorted(commit.chosen.tolist()) == [3, 4, 5, 6, 7, 8]
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
    best = importance(np.array([-1.0, -1.0]), np.array([1, 3]), 0.0)
    assert best.tolist() == [1.0, 0.0]
    policy = policy_of(policy="lookum", tau=0.5, pool_size=2)
    taken = []
    for seed in range(3000):
        view = make_view([0.5, 0.5, 0.1], seed=seed)
        queries, commit = run(
            policy,
            view,
            lambda a: prospects_of(a, [0.2 if w[0] == 0 else 0.7 for w in a.writes], 3),
        )
        if queries:
            taken.append(int(commit.chosen[0]))
    assert np.mean(np.array(taken) == 0) == pytest.approx(1 / (1 + math.exp(-1)), abs=0.04)


def test_lookahead_scores_are_equations_16_and_9():
    view = make_view([0.5, 0.4, 0.3], entropy=[0.5, 1.0, 2.0], quota=1)
    reply = lambda query: prospects_of(query, [0.6, 0.4, 0.5], 3)  # noqa: E731
    _, commit = run(policy_of(policy="lookahead"), view, reply)
    np.testing.assert_allclose(commit.scores, [3.0 - 1.2, 2.5 - 0.8, 1.5 - 1.0])
    assert commit.chosen.tolist() == [0]
    _, commit = run(policy_of(policy="lookahead", score="remaining"), view, reply)
    np.testing.assert_allclose(commit.scores, [-1.2, -0.8, -1.0])
    assert commit.chosen.tolist() == [1]


def test_lookahead_asks_once_for_each_candidate():
    view = make_view([0.1, 0.4, 0.3, 0.2, -np.inf], quota=1)
    (query,), commit = run(
        policy_of(policy="lookahead", rho=0.6, sharpen=0.5),
        view,
        lambda a: prospects_of(a, [1.0] * 3, 5),
    )
    assert [w.tolist() for w in query.writes] == [[1], [2], [3]]
    assert query.tokens is None and query.sharpen == 0.5
    assert commit.scores.tolist()[0] == commit.scores.tolist()[4] == -np.inf
    (query,), commit = run(
        policy_of(policy="lookahead", write="proposal"),
        view,
        lambda a: prospects_of(a, [3.0, 3.0, 3.0, 3.0], 5),
    )
    # What is forbidden as yet is not looked at.
    assert [t.tolist() for t in query.tokens] == [[50], [51], [52], [53]]
    assert commit.scores[4] == -np.inf and commit.chosen.tolist() != [4]


def test_nothing_is_looked_at_when_nothing_is_left_to_choose():
    for name in ("lookahead", "info-gain", "lookum"):
        queries, commit = run(policy_of(policy=name), make_view([0.1, 0.5], quota=2))
        assert queries == [] and sorted(commit.chosen.tolist()) == [0, 1]


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
        (
            {"policy": "lookahead", "sharpen": 0},
            "sharpen: input should be greater than or equal to 0.01",
        ),
    ],
)
def test_errors_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        parse_sampler_config(fields)
