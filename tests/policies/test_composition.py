"""Remasking and commit bounds on top of `boe`: the rule decides how many, BoE decides which."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import slow_remasking as slow
from test_loop import MASK as MODEL_MASK
from test_loop import make_loop, model, params_of  # noqa: F401
from test_policies import make_view, policy_of, run
from toy import GRID, MASK, Driven, Toy, frame, label, steps_by, without_repeats

from boe_vllm.policies.composition import leading
from boe_vllm.request.config import parse_sampler_config
from boe_vllm.sampling import randomness

# Ranks by ln p where nothing is more important than anything else.
PLAIN = {"policy": "boe", "sets": "top", "bypass": None, "rho": 0.5}


def unimportant(query):
    return np.zeros(len(query.candidates))


RULES = [
    {"schedule": "cap", "eta": 0.4},
    {"schedule": "cap", "eta": 1.0},
    {"schedule": "rescale", "eta": 0.6},
    {"schedule": "rescale", "eta": 1.0},
    {"schedule": "conf"},
    {"schedule": "loop", "eta": 0.1},
    {"schedule": "loop", "eta": 0.4, "t_on": 0.7, "t_off": 0.3, "alpha_on": 0.6},
]
SHAPES = [(12, 6, 1, None), (16, 16, 2, None), (10, 5, None, 3), (8, 8, None, 20), (9, 9, 4, None)]


def fields_of(rule):
    named = {"sigma_schedule" if key == "schedule" else key: value for key, value in rule.items()}
    return PLAIN | {"remask": "remdm"} | named


def ranked(confidence, count, rho=0.5):
    """What `PLAIN` writes: the best by ln p among the surest half."""
    candidates = sorted(slow.best(confidence, max(count, math.ceil(rho * len(confidence)))))
    scores = [math.log(confidence[i]) for i in candidates]
    return [candidates[n] for n in slow.best(scores, count)]


def remasked(decoding, *, steps_of, schedule, eta=None, **loop):
    """ReMDM's rule on the shares of the schedule, one token at a time."""
    mask = decoding.model.mask
    for own in decoding.blocks():
        n, steps = len(own), steps_of(len(own))
        quotas, stored, k, step = slow.quotas(n, steps), {}, 0, 0
        while decoding.masked(own):
            masked = decoding.masked(own)
            done = [i for i in own if decoding.x[i] != mask]
            p = decoding.predict(own)
            while True:
                if schedule == "loop":
                    sigma, _ = slow.remdm_numbers("loop", eta, k, steps, **loop)
                    due = max(0, loop_total(n, k, steps, **loop) - len(done))
                else:
                    due = min(len(masked), max(1, quotas[step]))
                    alpha_t, alpha_s = Fraction(len(done), n), Fraction(len(done) + due, n)
                    most = min(1, (1 - alpha_s) / alpha_t) if alpha_t else 1
                    if schedule == "conf":
                        sigma = most
                    elif schedule == "cap":
                        sigma = min(Fraction(str(eta)), most)
                    else:
                        sigma = Fraction(str(eta)) * most
                total = math.fsum(math.exp(-stored[i]) for i in done)
                again = []
                for i in done:
                    chance = sigma * math.exp(-stored[i]) / total if schedule == "conf" else sigma
                    if slow.number(decoding.seed, k, i, randomness.REMASK) < chance:
                        again.append(i)
                again = again[: len(masked) - due]
                k += 1
                if due + len(again) > 0:
                    break
            confidence = [max(p[i]) for i in masked]
            for m in ranked(confidence, due + len(again)):
                decoding.x[masked[m]] = slow.argmax(p[masked[m]])
                stored[masked[m]] = confidence[m]
            for i in again:
                decoding.x[i] = mask
            step += 1
    return decoding


def loop_total(n, k, steps, t_on=0.55, t_off=0.05, alpha_on=0.9):
    """Tokens that are to be written after iteration k of a loop."""
    t, s = Fraction(steps - k, steps), Fraction(steps - k - 1, steps)
    on, off, share = (Fraction(str(v)) for v in (t_on, t_off, alpha_on))
    if s == 0:
        return n
    if t > on:
        return math.floor(n * min(share, (1 - s) * share / (1 - on)))
    return math.floor(n * (1 - s * (1 - share) / off)) if t <= off else math.floor(n * share)


@pytest.mark.parametrize("rule", RULES, ids=label)
def test_remasking_on_boe_does_what_the_transcription_does(rule):
    changed = 0
    for n, shape in itertools.product(range(5), SHAPES):
        rng = np.random.default_rng(n)
        prompt = rng.integers(0, MASK, 4).tolist()
        if n % 3 == 2:
            prompt[1] = prompt[2] = MASK  # infilling
        toy, seed = Toy(n), int(rng.integers(1000))
        got = Driven(toy, fields_of(rule) | frame(shape), prompt, shape[0], seed=seed).finish()
        decoding = slow.Decoding(
            slow.Model(toy.logits, MASK, grid=GRID), prompt, shape[0], shape[1], seed
        )
        want = remasked(decoding, steps_of=steps_by(shape[2], shape[3]), **rule)
        assert got.canvas.tokens.tolist() == want.x, shape
        assert without_repeats(got.inputs) == without_repeats(want.inputs), shape
        assert sum(got.sent, []) == got.tokens and MASK not in got.tokens
        changed += sum(len(commit.remask) for commit in got.commits)
    assert changed > 0


CHOICES = [
    {"policy": "boe"},
    {"policy": "boe", "sets": "top"},
    {"policy": "joint"},
    {"policy": "pairwise"},
]


@pytest.mark.parametrize("choice", CHOICES, ids=label)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_schedule_is_kept_whatever_is_remasked(model, choice, schedule):  # noqa: F811
    fields = choice | {"schedule": schedule, "block_length": 16}
    counts, reports = {}, {}
    for name, more in {
        "plain": {},
        "remdm": {"remask": "remdm", "sigma_schedule": "rescale", "eta": 1.0},
    }.items():
        loop = make_loop(model)
        params = params_of(
            fields | more | {"tokens_per_step": 2}, prompt_len=3, max_tokens=16, seed=1
        )
        loop.add("x", [1, 2, 3], params)
        canvas, counts[name], sent = loop.canvases["x"], [], []
        again = 0
        while not canvas.done:
            before = canvas.masked.copy()
            result = loop.step(["x"])["x"]
            assert result.error is None
            sent += result.tokens
            counts[name].append(int(canvas.masked.sum()))
            again += int((canvas.masked & ~before).sum())
        assert (again > 0) == (name == "remdm")
        assert sent == canvas.tokens[3:].tolist() and MODEL_MASK not in sent
        reports[name] = result.report
    assert counts["plain"] == counts["remdm"]
    assert reports["plain"]["denoising_steps"] == reports["remdm"]["denoising_steps"]


# ---- commit bounds -------------------------------------------------------------------------------


def ordered(confidence, rho=0.5):
    return ranked(confidence, math.ceil(rho * len(confidence)), rho)


@pytest.mark.parametrize("commit", ["eb", "threshold"])
def test_the_bound_takes_the_longest_prefix_of_boes_order(commit):
    rng = np.random.default_rng(4)
    sizes = set()
    for n in range(300):
        masked = int(rng.integers(1, 14))
        confidence = np.round(rng.uniform(0.3, 1.0, masked), 1)
        entropy = rng.uniform(0, 0.3, masked) * (rng.random(masked) < 0.7)
        order = ordered(confidence.tolist())
        view = make_view(confidence, entropy=entropy, quota=min(2, masked), step=n)
        bound = {"gamma": 0.2} if commit == "eb" else {"threshold": 0.7}
        _, got = run(policy_of(**(PLAIN | {"commit": commit} | bound)), view, unimportant)
        count = 1
        for k in range(2, len(order) + 1):
            if commit == "eb":
                chosen = [entropy[i] for i in order[:k]]
                fits = math.fsum(chosen) - max(chosen) <= 0.2
            else:
                fits = all(confidence[i] >= 0.7 for i in order[:k])
            if not fits:
                break
            count = k
        assert got.chosen.tolist() == order[:count]
        sizes.add(count)
    assert len(sizes) > 3


def test_boe_orders_and_the_bound_counts():
    """The surest position is not written first if BoE prefers another."""
    view = make_view([0.95, 0.92, 0.91, 0.2], entropy=[0.1, 0.2, 0.3, 2.0], quota=1)
    fields = {"policy": "boe", "rho": 1.0, "gate": "none", "commit": "threshold"}
    fields |= {"sets": "top", "risk": 0.0}
    importance = lambda query: np.array([0.0, 2.0, 3.0, 1.0])  # noqa: E731
    (query,), commit = run(policy_of(**fields), view, importance)
    assert query.candidates.tolist() == [0, 1, 2, 3]
    assert commit.chosen.tolist() == [2, 1]  # then comes 3, which is not sure enough
    # 0, 0.2, 0.5, 0.6: the largest entropy of a prefix is free wherever it stands.
    _, commit = run(policy_of(**(fields | {"commit": "eb", "gamma": 0.55})), view, importance)
    assert commit.chosen.tolist() == [2, 1, 3]
    _, commit = run(policy_of(**(fields | {"commit": "eb", "gamma": 0.0})), view, importance)
    assert commit.chosen.tolist() == [2]


def test_a_forbidden_commit_is_in_no_prefix_but_its_own():
    view = make_view([-np.inf, 0.99, 0.98], entropy=[0.0, 0.0, 0.0])
    for commit in ("eb", "threshold"):
        _, got = run(policy_of(**(PLAIN | {"rho": 1.0, "commit": commit})), view, unimportant)
        assert got.chosen.tolist() == [1, 2]
        alone = make_view([-np.inf, -np.inf], entropy=[0.0, 0.0])
        _, got = run(policy_of(**(PLAIN | {"rho": 1.0, "commit": commit})), alone, unimportant)
        assert got.chosen.tolist() == [0]


@pytest.mark.parametrize("policy", ["boe", "joint", "pairwise"])
@pytest.mark.parametrize("commit", ["eb", "threshold"])
def test_sets_are_cut_to_the_prefix(model, policy, commit):  # noqa: F811
    """Never more than the quota; the tokens are cut with the positions."""
    fields = {"policy": policy, "commit": commit, "tokens_per_step": 4}
    fields |= {"gamma": 0.5, "threshold": 0.4, "trace": True, "block_length": 16}
    loop = make_loop(model)
    loop.add("x", [1, 2, 3], params_of(fields, prompt_len=3, max_tokens=16, seed=1))
    while not loop.canvases["x"].done:
        result = loop.step(["x"])["x"]
        assert result.error is None
    counts = np.bincount(result.report["trace"]["step"])
    assert counts.max() <= 4 and counts.min() >= 1


def test_leading_counts_to_the_first_that_is_not():
    assert [leading(np.array(v, bool)) for v in ([1, 1, 0, 1], [0, 1], [1, 1], [])] == [2, 0, 2, 0]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"remask": "x"}, "remask: input should be 'none' or 'remdm'"),
        ({"commit": "x"}, "commit: input should be 'rounds', 'drafts', 'quota', 'eb' or 'thresh"),
        (
            {"remask": "remdm", "commit": "eb"},
            "commit: expected 'quota' beside remask='remdm', whose rates follow the schedule, "
            "got 'eb'; remove one of them",
        ),
        ({"gamma": -1}, "gamma: input should be greater than or equal to 0"),
        ({"threshold": 2}, "threshold: input should be less than or equal to 1"),
        ({"sigma_schedule": "conf", "eta": 0.1}, "eta: expected none with sigma_schedule 'conf'"),
        ({"active": "candidates", "objective": "remaining"}, "identically zero"),
    ],
)
def test_errors_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        parse_sampler_config({"policy": "boe"} | fields)
