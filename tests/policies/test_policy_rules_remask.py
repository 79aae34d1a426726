"""Policies that mask again: the engine does what a slow transcription of the rule does, every
request ends without a mask, and nothing is sent that can still change."""

import itertools
import math

import numpy as np
import pytest
import slow_remasking as slow
import torch
from oracle import Dense, random_weights, small_config
from test_loop import EOS, finish, make_loop, params_of
from test_loop import MASK as MODEL_MASK
from toy import GRID, MASK, Driven, Toy, frame, label, steps_by, without_repeats

from boe_vllm.decoding.policy_step import view_of
from boe_vllm.models.build import random_model
from boe_vllm.models.rows import SequenceRows
from boe_vllm.policies.base import Commit, Policy, PolicyConfig
from boe_vllm.policies.remasking import RemaskingRule
from boe_vllm.request.config import parse_sampler_config

REMDM = [
    {"schedule": "cap", "eta": 0.3},
    {"schedule": "cap", "eta": 0.008},
    {"schedule": "cap", "eta": 1.0},
    {"schedule": "rescale", "eta": 0.5},
    {"schedule": "rescale", "eta": 1.0},
    {"schedule": "conf"},
    {"schedule": "loop", "eta": 0.1},
    {"schedule": "loop", "eta": 0.2, "t_on": 0.7, "t_off": 0.3, "alpha_on": 0.6},
]
CASES = [
    *[
        (
            {"policy": "remdm", "sigma_schedule": fields["schedule"]}
            | {key: value for key, value in fields.items() if key != "schedule"},
            slow.remdm,
            {"eta": None} | fields,
        )
        for fields in REMDM
    ],
    *[
        ({"policy": "remdm-llada", "remask_number": n}, slow.remdm_llada, {"number": n})
        for n in (1, 2, 50)
    ],
    *[({"policy": "p2", "eta": eta}, slow.p2, {"eta": eta}) for eta in (0.0, 0.5, 1.0, 3.0, 50.0)],
]
SHAPES = [
    # (generated, block, tokens per step or None, steps per block or None)
    (12, 6, 1, None),
    (16, 16, 1, None),
    (12, 12, 3, None),
    (10, 4, None, 2),
    (8, 8, None, 24),
    (3, 1, 1, None),
    (6, 6, None, 1),
    (9, 9, 2, None),
]


@pytest.mark.parametrize("fields, rule, settings", CASES, ids=label)
def test_the_policy_does_what_the_transcription_does(fields, rule, settings):
    changed = 0
    for n, shape in itertools.product(range(6), SHAPES):
        if shape[0] % shape[1]:
            continue
        rng = np.random.default_rng(n)
        prompt = rng.integers(0, MASK, 4).tolist()
        if n % 3 == 2:
            prompt[1] = prompt[2] = MASK  # infilling
        toy, seed = Toy(n), int(rng.integers(1000))
        got = Driven(toy, fields | frame(shape), prompt, shape[0], seed=seed).finish()
        decoding = slow.Decoding(
            slow.Model(toy.logits, MASK, grid=GRID), prompt, shape[0], shape[1], seed
        )
        want = rule(decoding, steps_of=steps_by(shape[2], shape[3]), **settings)
        assert got.canvas.tokens.tolist() == want.x, shape
        assert without_repeats(got.inputs) == without_repeats(want.inputs), shape
        changed += sum(len(commit.remask) for commit in got.commits)
        assert sum(got.sent, []) == got.tokens and MASK not in got.tokens
    never = fields["policy"] == "p2" and fields["eta"] == 0
    assert (changed > 0) != never  # the test can fail


@pytest.fixture(scope="module")
def networks():
    config, weights = small_config(), random_weights(small_config(), dtype=torch.float64)
    model = random_model(config, dtype=torch.float64)
    model.load_weights(weights.items())
    return model, Dense(config, weights)


@pytest.mark.parametrize(
    "fields, rule, settings",
    [CASES[i] for i in (0, 3, 5, 6, 8, 11, 14)],
    ids=label,
)
def test_the_engine_decodes_as_the_transcription_does(networks, fields, rule, settings):
    model, dense = networks
    prompt = np.random.default_rng(8).integers(0, 25, 7).tolist()
    loop = make_loop(model)
    shape = {"block_length": 8, "steps": 32, "trace": True}
    loop.add("x", prompt, params_of(fields | shape, prompt_len=7, max_tokens=16, seed=3))
    canvas, remasked, forwards = loop.canvases["x"], 0, 0
    tokens = []
    while not canvas.done:
        before = canvas.masked.copy()
        result = loop.step(["x"])["x"]
        tokens += result.tokens
        remasked += int((canvas.masked & ~before).sum())
        forwards += 1

    def logits(tokens):
        return dense.logits(dense.embed(torch.tensor(tokens))).tolist()

    decoding = slow.Decoding(slow.Model(logits, MODEL_MASK), prompt, 16, 8, seed=3)
    want = rule(decoding, steps_of=lambda masks: 16, **settings)
    assert tokens == want.x[7:]
    cost = result.report
    assert cost["forwards"] == cost["denoising_steps"] == forwards
    assert cost["rows_forward"] == 23 * forwards and cost["backwards"] == 0
    assert sorted(cost["trace"]["position"]) == list(range(16))


# ---- ReMDM's numbers -----------------------------------------------------------------------------


def rule_of(schedule="cap", eta=None, t_on=0.55, t_off=0.05, alpha_on=0.9):
    return RemaskingRule(schedule=schedule, eta=eta, t_on=t_on, t_off=t_off, alpha_on=alpha_on)


@pytest.mark.parametrize("schedule", ["cap", "rescale", "conf", "loop"])
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 40, 1024])
def test_rates_are_those_of_the_paper(schedule, steps):
    rule = rule_of(schedule)
    eta = {"cap": 0.008, "rescale": 0.015, "loop": 0.02, "conf": None}[schedule]
    for k in range(steps):
        sigma, reveal = slow.remdm_numbers(schedule, eta, k, steps)
        rates = rule.rates(k, steps)
        assert rates.sigma == pytest.approx(float(sigma), abs=1e-12)
        assert rates.reveal == pytest.approx(min(1.0, max(0.0, float(reveal))), abs=1e-12)


@pytest.mark.parametrize("schedule", ["cap", "rescale"])
def test_remasking_keeps_the_expected_share(schedule):
    """(1 - sigma) of what was written stays, `reveal` of the rest is added: alpha_s."""
    rule = rule_of(schedule, eta=0.7)
    for k in range(16):
        rates = rule.rates(k, 16)
        kept = (1 - rates.sigma) * rates.alpha_t + rates.reveal * (1 - rates.alpha_t)
        assert kept == pytest.approx(rates.alpha_s)
        assert 0 <= rates.sigma <= 1 and 0 <= rates.reveal <= 1


def test_sigma_never_exceeds_its_bound():
    assert rule_of("cap", eta=1.0).rates(3, 4).sigma == 0.0  # sigma_max of the last iteration
    assert rule_of("cap", eta=1.0).rates(2, 4).sigma == pytest.approx(0.25 / 0.5)
    assert rule_of("cap", eta=0.1).rates(2, 4).sigma == pytest.approx(0.1)
    assert rule_of("rescale", eta=0.1).rates(2, 4).sigma == pytest.approx(0.05)


def test_defaults_are_the_authors():
    etas = {name: rule_of(name).strength for name in ("cap", "rescale", "loop")}
    assert etas == {"cap": 0.008, "rescale": 0.015, "loop": 0.02}
    settings = parse_sampler_config({"policy": "remdm"}).settings
    assert (settings.t_on, settings.t_off, settings.alpha_on) == (0.55, 0.05, 0.9)


def test_conf_spreads_sigma_by_the_confidence_at_reveal():
    """The chances are softmax(-p stored); what the model thinks now plays no part."""
    canvas = Driven(Toy(0), {"policy": "remdm"}, [1], 4).canvas
    wanted = SequenceRows(tokens=canvas.tokens, logit_positions=np.arange(1, 5))
    view = view_of(canvas, wanted, slice(0, 4), Toy(0).statistics(canvas.tokens, np.arange(1, 5)))
    rule, positions, stored = rule_of("conf"), np.arange(3), np.array([0.9, 0.1, 0.5])
    weights = [math.exp(-p) for p in stored]
    hits = np.mean([rule.drawn(view, k, 0.8, positions, stored) for k in range(4000)], axis=0)
    for hit, weight in zip(hits, weights, strict=True):
        assert hit == pytest.approx(0.8 * weight / sum(weights), abs=0.03)
    assert rule.drawn(view, 0, 1.0, positions[:0], stored[:0]).tolist() == []


def test_the_loop_changes_nothing_on_average_and_ends_with_everything():
    rates = rule_of("loop").rates(50, 100)
    assert (rates.sigma, rates.alpha_t, rates.alpha_s) == (0.02, 0.9, 0.9)
    assert rates.reveal == pytest.approx(0.02 * 0.9 / 0.1)
    assert rule_of("loop").rates(44, 100).sigma == 0.0  # t = 0.56 is before the loop
    assert rule_of("loop").rates(45, 100).sigma == 0.02  # t = 0.55 is in it: plain is t > t_on
    assert rule_of("loop").rates(95, 100).sigma == 0.0  # t = 0.05 is after it
    assert rule_of("loop").rates(99, 100).reveal == 1.0


# ---- traps ---------------------------------------------------------------------------------------


def test_remdm_llada_remasks_what_was_least_sure_at_its_reveal():
    """Not what is least sure now, and never the prompt."""
    toy = Toy(3)
    fields = {"policy": "remdm-llada", "gen_length": 16, "block_length": 16, "remask_number": 1}
    driven = Driven(toy, fields, [1, 2, 3], 16).finish()
    stored = {}
    for view, commit in zip(driven.views, driven.commits, strict=True):
        stored |= dict(
            zip(view.positions[commit.chosen], view.confidence[commit.chosen], strict=True)
        )
        for position in commit.remask:
            written = set(view.written) | set(view.positions[commit.chosen])
            assert stored[position] == min(stored[p] for p in written)
            assert position >= 3
    assert sum(len(c.remask) for c in driven.commits) == 16  # one for each iteration of the window


def test_remdm_llada_never_remasks_the_prompt_when_little_is_written():
    """The authors' top-k over stored confidences reaches the prompt when fewer are written."""
    fields = {"policy": "remdm-llada", "remask_number": 50, "gen_length": 8, "block_length": 8}
    driven = Driven(Toy(1), fields, [1, 2, 3], 8).finish()
    assert driven.canvas.tokens[:3].tolist() == [1, 2, 3]
    assert max(len(c.remask) for c in driven.commits) <= 8


def test_remdm_llada_takes_up_to_twice_the_steps():
    fields = {"policy": "remdm-llada", "gen_length": 32, "block_length": 32}
    driven = Driven(Toy(1), fields, [1], 32).finish()
    assert len(driven.commits) == 64
    few = Driven(Toy(1), fields | {"steps": 8}, [1], 32).finish()  # the window comes too late
    assert len(few.commits) == 8 and all(len(c.remask) == 0 for c in few.commits)
    assert all(c.settled for c in few.commits)


def test_p2_counts_masks_in_integers():
    """10 positions in 10 steps: one more each; `int(10 * (1 - i * 0.1))` loses some to rounding."""
    assert [int(10 * (1 - i * (1 / 10))) for i in range(1, 11)] != list(range(9, -1, -1))
    fields = {"policy": "p2", "gen_length": 10, "block_length": 10}
    driven = Driven(Toy(2), fields, [1], 10)
    for left in range(9, -1, -1):
        driven.step()
        assert int(driven.canvas.masked.sum()) == left


def test_p2_scores_a_written_token_by_what_would_be_proposed_now():
    """And keeps the token itself, whatever the proposal: it is masked first if it is to change."""
    driven = Driven(Toy(5), {"policy": "p2", "gen_length": 12, "block_length": 12}, [1], 12)
    kept_against_proposal = 0
    while not driven.canvas.done:
        before = driven.canvas.tokens.copy()
        driven.step()
        view = driven.views[-1]
        for position, proposal in zip(view.written, view.revision.proposal, strict=True):
            now = driven.canvas.tokens[position]
            assert now in (before[position], MASK)
            kept_against_proposal += now == before[position] != proposal
    assert kept_against_proposal > 0


def test_p2_without_eta_never_remasks_even_where_everything_is_certain():
    class Certain(Toy):
        def logits(self, tokens):
            return [[50.0 * (v == 3) for v in range(8)] + [99.0] for _ in tokens]

    driven = Driven(Certain(0), {"policy": "p2", "eta": 0.0, "gen_length": 8}, [1], 8).finish()
    assert all(len(c.remask) == 0 for c in driven.commits)
    assert [c.chosen.tolist() for c in driven.commits] == [[0]] * 8  # ties: the lower position


def test_late_tokens_are_revealed_last_by_chance_too():
    toy = Toy(4)
    first = int(toy.statistics(np.array([1] + [MASK] * 8), np.arange(1, 9)).proposal[0])
    fields = {"policy": "remdm", "gen_length": 8, "confidence_eos_eot_inf": True, "eta": 1.0}
    for seed in range(20):
        driven = Driven(toy, fields, [1], 8, seed=seed, late=[first]).finish()
        for view, commit in zip(driven.views, driven.commits, strict=True):
            late = np.isneginf(view.confidence)
            last = view.block_step == view.block_steps - 1 or not driven.canvas.masked.any()
            if late[commit.chosen].any() and not late.all() and not last:
                raise AssertionError("a late token was revealed beside others")


# ---- ends and streams ----------------------------------------------------------------------------

WORST = [
    {"policy": "remdm", "sigma_schedule": "rescale", "eta": 1.0},
    {"policy": "remdm", "sigma_schedule": "cap", "eta": 1.0},
    {"policy": "remdm", "sigma_schedule": "loop", "eta": 0.11, "t_on": 0.99, "t_off": 0.01},
    {"policy": "remdm", "sigma_schedule": "loop", "eta": 1.0, "alpha_on": 0.5},
    {"policy": "remdm-llada", "remask_number": 10**6},
    {"policy": "p2", "eta": 1e6},
]


@pytest.mark.parametrize("fields", WORST, ids=label)
@pytest.mark.parametrize("steps", [1, 2, 7, 150])
def test_every_request_ends_within_its_limit_and_without_a_mask(fields, steps):
    for seed in range(10):
        shape = {"gen_length": 14, "block_length": 7, "steps": 2 * steps}
        driven = Driven(Toy(seed), fields | shape, [1, MASK, 2], 14, seed=seed).finish()
        assert MASK not in driven.canvas.tokens
        factor = 2 if fields["policy"] == "remdm-llada" else 1
        assert len(driven.commits) <= 2 * max(8, factor * steps)


@pytest.mark.parametrize("fields", WORST, ids=label)
def test_what_is_sent_never_changes(fields):
    held = 0
    for seed in range(10):
        shape = {"gen_length": 16, "block_length": 8}
        driven = Driven(Toy(seed), fields | shape, [1, 2], 16, seed=seed)
        sent = []
        while not driven.canvas.done:
            driven.step()
            sent += driven.sent[-1]
            canvas = driven.canvas
            assert canvas.tokens[2 : 2 + len(sent)].tolist() == sent
            prefix = int(canvas.masked[2:].argmax()) if canvas.masked.any() else 16
            held += prefix > len(sent)
        assert sent == driven.tokens
    assert held > 0  # something was held back


def test_without_remasking_the_prefix_is_sent_at_once():
    for fields in ({"policy": "remdm", "eta": 0.0}, {"policy": "p2", "eta": 0.0}):
        driven = Driven(Toy(1), fields | {"gen_length": 16, "block_length": 16}, [1], 16)
        sent = 0
        while not driven.canvas.done:
            driven.step()
            sent += len(driven.sent[-1])
            ahead = driven.canvas.masked[1:]
            assert sent == (int(ahead.argmax()) if ahead.any() else 16)


class Stubborn(Policy):
    """Writes one token and takes it back, for ever."""

    def step(self, view):
        return Commit(chosen=np.array([0]), remask=view.positions[:1], settled=False)
        yield


class Idle(Policy):
    """Never does anything."""

    def step(self, view):
        return Commit(chosen=np.empty(0, np.int64), idle=True)
        yield


@pytest.mark.parametrize("kind", [Stubborn, Idle])
def test_the_step_limit_ends_a_policy_that_would_not(kind):
    driven = Driven(
        Toy(0), {"gen_length": 6, "block_length": 3}, [1], 6, policy=kind(PolicyConfig())
    )
    driven.finish(limit=6)
    assert MASK not in driven.tokens and sum(driven.sent, []) == driven.tokens


def test_a_remask_of_what_may_not_change_is_an_error():
    class Rogue(Policy):
        def step(self, view):
            return Commit(chosen=np.array([0]), remask=np.array([self.config]))
            yield

    for position, expected in ((0, "expected some of"), (1, "that are not sent")):
        driven = Driven(Toy(0), {"gen_length": 4}, [1], 4, policy=Rogue(position))
        if position == 1:
            driven.canvas.tokens[1], driven.canvas.masked[1], driven.canvas.emitted = 3, False, 1
        with pytest.raises(ValueError, match=f"remasked positions that may not change.*{expected}"):
            driven.step()


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"policy": "remdm", "sigma_schedule": "x"},
            "sigma_schedule: input should be 'cap', 'rescale'",
        ),
        ({"policy": "remdm", "eta": -1}, "eta: input should be greater than or equal to 0"),
        (
            {"policy": "remdm", "sigma_schedule": "conf", "eta": 0.1},
            "eta: expected none with sigma_schedule",
        ),
        (
            {"policy": "remdm", "sigma_schedule": "loop", "t_on": 0.3, "t_off": 0.4},
            r"t_off: expected less than t_on \(0.3\), got 0.4; time runs",
        ),
        (
            {"policy": "remdm", "sigma_schedule": "loop", "eta": 0.2},
            r"eta: expected at most \(1 - alpha_on\)/alpha_on = 0.111111 .* got 0.2; lower eta",
        ),
        ({"policy": "remdm", "t_on": 1.0}, "t_on: input should be less than 1"),
        ({"policy": "remdm-llada", "remask_number": 0}, "remask_number: input should be greater"),
        ({"policy": "p2", "eta": -0.1}, "eta: input should be greater than or equal to 0"),
    ],
)
def test_errors_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        parse_sampler_config(fields)


def test_remasking_policies_stream_over_the_loop(networks):
    model, _ = networks
    fields = {"policy": "remdm-llada", "block_length": 8, "remask_number": 2}
    loop = make_loop(model, late=frozenset({EOS}))
    loop.add("x", [1, 2], params_of(fields, prompt_len=2, max_tokens=16, temperature=1.0, seed=1))
    canvas = loop.canvases["x"]
    tokens, _ = finish(loop)
    assert tokens["x"] == canvas.tokens[2:].tolist()
