"""The local policies decide as their rules say: against slow transcriptions, ties included; and the
traps of policies.md, one test each."""

import json
import math
from pathlib import Path

import local_rules as rules
import numpy as np
import pytest
from test_policies import make_view, policy_of, run
from toy import label

from boe_vllm.policies import origin
from boe_vllm.policies.eb import bounded_count
from boe_vllm.policies.factor import passing_count
from boe_vllm.policies.klass import recent
from boe_vllm.request.config import parse_sampler_config
from boe_vllm.request.resolved import tokens_due
from boe_vllm.sampling import randomness
from boe_vllm.steering.change import PredictionChange

TABLE = Path(__file__).parents[1] / "data" / "frequencies_29.json"
CONTENT = json.loads(TABLE.read_text())
COUNTS = {int(token): count for token, count in CONTENT["p_baseline_dict"].items()}
FREQUENCIES = {"frequencies": str(TABLE)}
PROXIES = ("entropy", "confidence", "margin")

CASES = [
    ({"policy": "random"}, rules.random),
    *[({"policy": name}, lambda m, name=name: rules.certainty(m, name)) for name in PROXIES],
    *[
        (
            {"policy": name, "alg_temp": temp},
            lambda m, name=name, temp=temp: rules.certainty(m, name, temp),
        )
        for name in PROXIES
        for temp in (0.01, 0.5)
    ],
    ({"policy": "confident-random"}, rules.confident_random),
    ({"policy": "confident-random", "rho": 0.2}, lambda m: rules.confident_random(m, 0.2)),
    ({"policy": "origin"}, lambda m: rules.origin(m)[0]),
    ({"policy": "origin", "eps": 0.2}, lambda m: rules.origin(m, 0.2)[0]),
    ({"policy": "ancestral"}, lambda m: rules.ancestral(m)[0]),
    ({"policy": "ancestral", "eps": 0.3}, lambda m: rules.ancestral(m, 0.3)[0]),
    *[
        (
            {"policy": "eb", "proxy": proxy, "gamma": gamma},
            lambda m, proxy=proxy, gamma=gamma: rules.eb(m, gamma, proxy),
        )
        for proxy in PROXIES
        for gamma in (0.0, 0.5, 3.0)
    ],
    ({"policy": "pc"} | FREQUENCIES, lambda m: rules.pc(m, COUNTS, 10000)),
    (
        {"policy": "pc", "lambd": 0, "alpha": 2} | FREQUENCIES,
        lambda m: rules.pc(m, COUNTS, 10000, 0.0, 2.0),
    ),
    ({"policy": "threshold"}, rules.threshold),
    ({"policy": "threshold", "threshold": 0.5}, lambda m: rules.threshold(m, 0.5)),
    ({"policy": "factor"}, rules.factor),
    ({"policy": "factor", "factor": 3}, lambda m: rules.factor(m, 3.0)),
    ({"policy": "klass"}, rules.klass),
    (
        {"policy": "klass", "confidence_threshold": 0.25, "kl_threshold": 0.5, "history": 3},
        lambda m: rules.klass(m, 0.25, 0.5, 3),
    ),
    (
        {"policy": "klass", "confidence_threshold": 0.25, "kl_threshold": 0.5, "history": 1},
        lambda m: rules.klass(m, 0.25, 0.5, 1),
    ),
]


def random_state(rng):
    """A view and the same as `Masks`; half the time many values are equal."""
    many = int(rng.integers(1, 25))
    tied = rng.random() < 0.5
    confidence = rng.integers(0, 5, many) / 4 if tied else rng.random(many) ** 0.3
    entropy = rng.integers(0, 4, many) / 3 if tied else rng.exponential(0.5, many)
    margin = rng.integers(0, 3, many) / 2 if tied else rng.random(many)
    late = rng.random(many) < rng.choice([0.0, 0.3, 1.0], p=[0.6, 0.3, 0.1])
    block_start = 40
    positions = np.sort(rng.choice(60, many, replace=False)) + block_start - 10
    block_steps = int(rng.integers(1, 9))
    view = make_view(
        np.where(late, -np.inf, confidence),
        positions=positions,
        proposal=rng.integers(0, 28, many),
        entropy=entropy,
        margin=margin,
        quota=int(rng.integers(1, many + 1)),
        block_start=block_start,
        step=int(rng.integers(0, 9)),
        block_step=int(rng.integers(0, 3)),
        block_steps=block_steps,
        vocab_size=29,
        seed=int(rng.integers(0, 99)),
    )
    kls = rng.choice([0.0, 0.005, 0.01, 0.4, 0.5, 9.0], (4, many))
    grid_step = int(rng.integers(0, block_steps)) if view.block_step else 0
    view.memory[origin.GRID_STEP] = grid_step
    masks = rules.Masks(
        positions=positions.tolist(),
        tokens=view.proposal.tolist(),
        confidence=confidence.tolist(),
        margin=margin.tolist(),
        entropy=entropy.tolist(),
        late=late.tolist(),
        quota=view.quota,
        uniforms=view.uniforms(randomness.CHOOSE).tolist(),
        block_start=block_start,
        kl=kls.T.tolist(),
        block_step=view.block_step,
        grid_step=grid_step,
        block_steps=block_steps,
    )
    return view, masks, kls


@pytest.mark.parametrize("fields, rule", CASES, ids=lambda v: label(v) if type(v) is dict else "")
def test_a_policy_decides_as_its_transcription(fields, rule):
    rng = np.random.default_rng(3)
    policy = policy_of(**fields)
    sizes = set()
    for _ in range(400):
        view, masks, kls = random_state(rng)
        length = getattr(policy.config, "history", 1)
        view.memory["klass.history"] = (view.positions, kls[3 - length : 3])
        _, commit = run(policy, view, lambda query, kls=kls: kls[-1])
        want = rule(masks)
        assert sorted(commit.chosen.tolist()) == sorted(want)
        assert 1 <= len(commit.chosen) <= len(view.positions) and commit.tokens is None
        sizes.add(len(want))
    assert len(sizes) > 1 or fields.get("gamma") == 0


@pytest.mark.parametrize("fields", [c[0] for c in CASES], ids=label)
def test_what_may_not_be_written_early_is_written_last(fields):
    rng = np.random.default_rng(4)
    policy = policy_of(**fields)
    for _ in range(200):
        view, masks, kls = random_state(rng)
        _, commit = run(policy, view, lambda query, kls=kls: kls[-1])
        chosen = set(commit.chosen.tolist())
        allowed = {i for i, late in enumerate(masks.late) if not late}
        assert allowed <= chosen or chosen <= allowed


# ---- schedules and Dream's options -------------------------------------------------------------


def test_linear_quotas_are_lladas():
    for masks in range(1, 40):
        for steps in range(1, masks + 1):
            written, quotas = 0, []
            for step in range(steps):
                quotas.append(
                    tokens_due("linear", masks=masks, steps=steps, step=step, written=written)
                )
                written += quotas[-1]
            assert quotas == [rules.linear_quota(masks, steps, i) for i in range(steps)]
            assert sum(quotas) == masks


def test_cosine_totals_are_maskgits_and_never_idle():
    for masks in range(1, 40):
        for steps in range(1, masks + 1):
            written = 0
            for step in range(steps):
                if written == masks:
                    break
                due = tokens_due("cosine", masks=masks, steps=steps, step=step, written=written)
                want = rules.cosine_total(masks, steps, step + 1) - written
                assert due == max(1, want)
                written += min(due, masks - written)
            assert written == masks


def test_cosine_does_not_round_whole_counts_up():
    # cos(pi / 3) comes out a little below a half.
    assert tokens_due("cosine", masks=4, steps=3, step=1, written=1) == 1
    assert tokens_due("cosine", masks=32, steps=3, step=1, written=5) == 11


def test_alg_temp_draws_from_the_softmax_of_the_scores():
    score, temp = np.array([0.1, 0.5, 0.9]), 0.4
    p = np.exp(score / temp) / np.exp(score / temp).sum()
    policy = policy_of(policy="confidence", alg_temp=temp)
    first, pairs = np.zeros(3), np.zeros((3, 3))
    for seed in range(4000):
        chosen = run(policy, make_view(score, quota=2, seed=seed))[1].chosen
        first[chosen[0]] += 1
        pairs[tuple(chosen)] += 1
    assert np.abs(first / 4000 - p).max() < 0.03
    # Without replacement: the second is drawn from the softmax over the other two.
    want = p[:, None] * p[None, :] / (1 - p[:, None])
    assert np.abs(pairs / 4000 - want)[~np.eye(3, dtype=bool)].max() < 0.03


@pytest.mark.parametrize(
    ("name", "eps"), [("origin", 1e-3), ("ancestral", 1e-5), ("ancestral", 0.1)]
)
def test_masks_are_revealed_on_the_time_grid(name, eps):
    """Each mask is revealed at grid step j with probability t_j - t_{j+1}, independently; what is
    left at the end of it, in the last step by Dream and in one more by MDLM."""
    steps, many, trials = 4, 3, 4000
    times = np.linspace(1, eps, steps + 1)
    policy = policy_of(policy=name, eps=eps)
    when = np.full((trials, many), -1)
    for seed in range(trials):
        left, memory, step = np.arange(many), {}, 0
        while len(left):
            view = make_view(
                np.full(len(left), 0.5),
                positions=left,
                block_steps=steps,
                block_step=step,
                step=step,
                seed=seed,
                memory=memory,
            )
            chosen = run(policy, view)[1].chosen
            when[seed, left[chosen]] = memory[origin.GRID_STEP] - 1
            left, step = np.delete(left, chosen), step + 1
        assert step <= steps + 1
    share = np.stack([(when == j).mean(0) for j in range(steps + 1)])
    want = np.append(times[:-1] - times[1:], 0.0)
    want[-2 if name == "origin" else -1] += eps
    assert np.abs(share - want[:, None]).max() < 0.03
    both = np.mean((when[:, 0] == 0) & (when[:, 1] == 0))
    assert abs(both - want[0] ** 2) < 0.02


# ---- the traps ---------------------------------------------------------------------------------


def test_eb_bounds_all_but_the_largest_entropy():
    assert bounded_count(np.array([0.1, 0.2, 0.3, 0.4]), 0.3 + 1e-9) == 3  # 0.1 + 0.2, without 0.3
    assert bounded_count(np.array([0.5, 0.6]), 0.0) == 1
    # Sorted by another proxy, the largest need not be the last.
    assert bounded_count(np.array([2.0, 0.1, 0.1]), 0.21) == 3


def test_eb_with_gamma_zero_writes_one_token_a_step():
    view = make_view([0.5] * 4, entropy=[0.4, 1e-7, 0.3, 0.2])
    assert run(policy_of(policy="eb", gamma=0), view)[1].chosen.tolist() == [1]


def test_pc_counts_positions_from_the_start_of_the_block():
    policy = policy_of(policy="pc", lambd=1.0, **FREQUENCIES)
    view = make_view(
        [0.5, 0.5], positions=np.array([70, 71]), block_start=64, proposal=np.array([3, 3]),
        vocab_size=29,
    )  # fmt: skip
    scores = run(policy, view)[1].scores
    calibrated = -0.5 * math.log(COUNTS[3] / 10000 + 1e-9)
    assert scores == pytest.approx([math.log(calibrated) - 6, math.log(calibrated) - 7])


def test_pc_counts_masks_in_the_prompt_as_position_zero():
    policy = policy_of(policy="pc", lambd=1.0, **FREQUENCIES)
    view = make_view(
        [0.5] * 3, positions=np.array([2, 64, 65]), block_start=64, proposal=np.full(3, 3),
        vocab_size=29,
    )  # fmt: skip
    scores = run(policy, view)[1].scores
    assert scores[0] == scores[1] == pytest.approx(scores[2] + 1)


def test_pc_favours_tokens_that_the_table_does_not_have():
    assert 27 not in COUNTS  # EOS
    policy = policy_of(policy="pc", lambd=0, **FREQUENCIES)
    common = max(COUNTS, key=COUNTS.get)
    view = make_view([0.9, 0.5], proposal=np.array([common, 27]), vocab_size=29)
    assert run(policy, view)[1].chosen.tolist() == [1]
    policy = policy_of(policy="pc", lambd=3, **FREQUENCIES)
    view = make_view([0.9, 0.5], proposal=np.array([common, 27]), vocab_size=29, block_start=5)
    assert run(policy, view)[1].chosen.tolist() == [0]


def test_pc_keeps_the_order_where_the_score_underflows():
    policy = policy_of(policy="pc", lambd=1.0, **FREQUENCIES)
    view = make_view(
        [0.1, 0.99], positions=np.array([900, 901]), block_start=0, proposal=np.array([3, 3]),
        vocab_size=29,
    )  # fmt: skip
    assert run(policy, view)[1].chosen.tolist() == [1]


def test_pc_refuses_a_table_of_another_vocabulary():
    policy = policy_of(policy="pc", **FREQUENCIES)
    with pytest.raises(ValueError, match=r"frequencies: expected a table for 20 tokens, got token"):
        run(policy, make_view([0.5], vocab_size=20))


def test_threshold_is_reached_by_equality_and_the_best_is_always_written():
    policy = policy_of(policy="threshold", threshold=0.75)
    assert run(policy, make_view([0.75, 0.7499999, 0.8]))[1].chosen.tolist() == [0, 2]
    assert run(policy, make_view([0.1, 0.3, 0.3]))[1].chosen.tolist() == [1]


def test_factor_stops_before_the_last_candidate_if_only_that_fails():
    assert passing_count(np.array([0.9, 0.9, 0.1]), 1.0) == 2  # a public copy says 3
    assert passing_count(np.array([0.9, 0.1]), 1.0) == 1
    assert passing_count(np.array([0.9]), 1.0) == 1


def test_factor_takes_the_first_whatever_it_is_and_then_the_longest_prefix():
    assert passing_count(np.array([0.01, 0.005]), 0.0) == 1
    # 1 - 1/3, 1 - 1/4, 1 - 1/5 for the second, third and fourth.
    assert passing_count(np.array([0.7, 0.7, 0.75, 0.1]), 1.0) == 2
    assert passing_count(np.array([0.81, 0.81, 0.81, 0.81]), 1.0) == 4


def test_klass_thresholds_are_strict():
    policy = policy_of(policy="klass", history=1, confidence_threshold=0.5, kl_threshold=0.25)
    queries, commit = run(policy, make_view([0.5, 0.6, 0.6]), lambda a: np.array([0.0, 0.25, 0.2]))
    assert isinstance(queries[0], PredictionChange) and queries[0].positions.tolist() == [5, 6, 7]
    assert commit.chosen.tolist() == [2]


def test_klass_waits_for_its_history_in_every_block_but_keeps_what_it_knows():
    policy = policy_of(policy="klass", confidence_threshold=0.1)
    memory = {}

    def chosen(block_step, positions, kl=0.0):
        view = make_view(
            [0.3, 0.2], positions=np.array(positions), block_step=block_step, memory=memory
        )
        return run(policy, view, lambda a: np.full(2, kl))[1].chosen.tolist()

    assert chosen(0, [5, 6]) == [0]
    assert chosen(1, [6, 7]) == [0]  # position 7 has no history yet
    assert chosen(2, [6, 7]) == [0, 1]
    assert chosen(0, [6, 7]) == [0]  # a new block begins
    assert chosen(1, [6, 7]) == [0, 1]


def test_klass_history_follows_positions():
    before = (np.array([2, 5, 9]), np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    got = recent(before, np.array([5, 9, 11]), np.array([7.0, 8.0, 9.0]), 2)
    assert got.tolist() == [[5.0, 6.0, math.inf], [7.0, 8.0, 9.0]]


# ---- errors ------------------------------------------------------------------------------------

BAD = [
    ({"policy": "confidence", "alg_temp": -1}, r"alg_temp: .*greater than or equal to 0, got -1"),
    ({"policy": "random", "alg_temp": 1}, r"unknown field 'alg_temp' for policy 'random'"),
    ({"policy": "confident-random", "rho": 0}, r"rho: .*greater than 0"),
    ({"policy": "origin", "eps": 1}, r"eps: .*less than 1"),
    ({"policy": "eb", "gamma": -0.1}, r"gamma: .*greater than or equal to 0"),
    ({"policy": "eb", "proxy": "kl"}, r"proxy: .*'confidence', 'margin' or 'entropy'"),
    ({"policy": "threshold", "threshold": 1.1}, r"threshold: .*less than or equal to 1"),
    ({"policy": "factor", "factor": -1}, r"factor: .*greater than or equal to 0"),
    ({"policy": "klass", "history": 0}, r"history: .*greater than or equal to 1"),
    ({"policy": "klass", "confidence_threshold": 2}, r"confidence_threshold: .*less than"),
    ({"policy": "klass", "kl_threshold": -1}, r"kl_threshold: .*greater than"),
    ({"policy": "pc", "lambd": -1} | FREQUENCIES, r"lambd: .*greater than or equal to 0"),
    ({"policy": "pc", "alpha": 0} | FREQUENCIES, r"alpha: .*greater than 0"),
    ({"schedule": "quadratic"}, r"schedule: .*'linear' or 'cosine'"),
    ({"cfg_scale": -1}, r"cfg_scale: .*greater than or equal to 0"),
]


@pytest.mark.parametrize("fields, message", BAD, ids=lambda v: str(v)[:40])
def test_a_bad_setting_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        parse_sampler_config(fields)
