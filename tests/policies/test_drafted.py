"""Drafted next steps: what holds is written, and without slack the tokens are the bound's own."""

import numpy as np
import pytest
import torch
from test_bounded import policy, view_of
from test_loop import finish, make_loop, model, params_of  # noqa: F401
from test_policies import run
from toy import label

import boe_vllm
from boe_vllm.denoiser import Denoiser
from boe_vllm.lab.tasks import TASKS
from boe_vllm.policies.bounded import Bound, bounded_set
from boe_vllm.policies.drafted import drafts_of
from boe_vllm.steering.importance import TokenImportance
from boe_vllm.steering.lookahead import Prospect

BOUNDS = (
    {"bound": "threshold", "threshold": 0.9},
    {"bound": "threshold", "threshold": 0.99},
    {"bound": "entropy", "gamma": 0.01},
    {"bound": "entropy", "gamma": 0.3},
)


@pytest.fixture(scope="module")
def denoiser():
    return Denoiser.from_pretrained(boe_vllm.tiny_model_path())


def decoded(denoiser, task, fields, many=12, temperature=0.0, seed=0):
    """Tokens, steps and passes of some items, side by side."""
    loop = denoiser.open_loop(4096)  # rows that a cache may hold
    for n, item in enumerate(TASKS[task].items(many, seed=31)):
        prompt = denoiser.encode(item.prompt)
        canvas = len(denoiser.encode(item.answer))
        params = params_of(
            fields | {"block_length": canvas},
            prompt_len=len(prompt),
            max_tokens=canvas,
            temperature=temperature,
            seed=seed + n,
        )
        loop.add(str(n), prompt, params)
    tokens, reports = finish(loop)
    return tokens, reports


@pytest.mark.parametrize("task", ["sudoku4-few", "countdown"])
@pytest.mark.parametrize("bound", BOUNDS, ids=label)
def test_without_slack_the_tokens_are_those_of_the_bound_in_fewer_steps(denoiser, task, bound):
    want, plain = decoded(denoiser, task, {"policy": "joint", "rounds": 0, **bound})
    got, drafted = decoded(
        denoiser, task, {"policy": "joint", "commit": "drafts", "slack": None, **bound}
    )
    assert got == want

    def total(reports, name):
        return sum(report[name] for report in reports.values())

    assert total(drafted, "denoising_steps") < total(plain, "denoising_steps")
    assert total(drafted, "forwards") <= total(plain, "forwards")  # a wide pass is one
    assert total(drafted, "rows_forward") > total(plain, "rows_forward")  # of all its states
    none, plainest = decoded(
        denoiser, task, {"policy": "joint", "commit": "drafts", "drafts": 0, **bound}
    )
    assert none == want and total(plainest, "denoising_steps") == total(plain, "denoising_steps")


@pytest.mark.parametrize("bound", [{"threshold": 0.06}, {"bound": "entropy", "gamma": 9.0}])
def test_a_random_network_gives_the_tokens_of_the_bound_too(model, bound):  # noqa: F811
    """Whose predictions change with every write, so that drafts fall."""
    tokens = []
    for more in ({"rounds": 0}, {"commit": "drafts", "slack": None, "drafts": 5}):
        loop = make_loop(model)
        for n in range(6):
            fields = {"policy": "joint", "block_length": 8, **bound, **more}
            loop.add(str(n), [n, 3], params_of(fields, prompt_len=2, max_tokens=24, seed=n))
        tokens.append(finish(loop)[0])
    assert tokens[0] == tokens[1]


def prospect_of(left, entropy, tokens=None):
    """A state in which `left` are masked; tokens 50 + index unless others are given."""
    left, entropy = np.array(left), np.array(entropy, float)
    return Prospect(
        index=left,
        proposal=left + 50 if tokens is None else np.array(tokens),
        confidence=1 - entropy,
        margin=1 - entropy,
        entropy=entropy,
        elsewhere=np.empty(0),
        carry=object(),  # type: ignore[arg-type]
    )


EB = {"policy": "joint", "commit": "drafts", "bound": "entropy", "gamma": 0.01}
VIEW = [0.001, 0.1, 0.2, 0.3, 0.4]  # drafts: 0 and 1; 2; 3; 4


def test_drafts_are_the_bounds_sets_of_what_is_left():
    query, _ = asked(EB | {"drafts": 2}, [])
    assert [own.tolist() for own in query.writes] == [[0, 1], [0, 1, 2], [0, 1, 2, 3]]
    assert [own.tolist() for own in query.tokens] == [[50, 51], [50, 51, 52], [50, 51, 52, 53]]
    assert query.wide and query.carry


def asked(fields, states):
    """The look-ahead and the commit where its states are these, and then any."""
    states = list(states)

    def reply(query):
        if isinstance(query, TokenImportance):
            return np.arange(len(query.candidates), dtype=float)
        filled = []
        for n, own in enumerate(query.writes):
            left = np.setdiff1d(np.arange(5), own)
            filled.append(
                states[n] if n < len(states) else prospect_of(left, left * 0 + 0.9, left * 0)
            )
        return filled

    queries, commit = run(policy(**fields), view_of(VIEW), reply)
    return queries[-1], commit


@pytest.mark.parametrize(
    "slack, states, written",
    [
        (None, [prospect_of([2, 3, 4], [0.1, 0.2, 0.3])], [0, 1, 2]),
        (None, [prospect_of([2, 3, 4], [0.1, 0.001, 0.3])], [0, 1]),  # it would write 3 as well
        (None, [prospect_of([2, 3, 4], [0.2, 0.1, 0.3])], [0, 1]),  # it would write 3 instead
        (0.05, [prospect_of([2, 3, 4], [0.2, 0.1, 0.3])], [0, 1]),
        (0.2, [prospect_of([2, 3, 4], [0.2, 0.1, 0.3])], [0, 1, 2]),
        (9.0, [prospect_of([2, 3, 4], [0.2, 0.1, 0.3], [99, 53, 54])], [0, 1]),  # another token
        (
            0.0,
            [prospect_of([2, 3, 4], [0.1, 0.2, 0.3]), prospect_of([3, 4], [0.1, 0.1])],
            [0, 1, 2, 3],
        ),
    ],
)
def test_a_draft_holds_if_the_state_before_it_writes_it(slack, states, written):
    _, commit = asked(EB | {"slack": slack, "drafts": 2}, states)
    assert commit.chosen.tolist() == written
    assert commit.carry is not None


def test_a_threshold_lets_no_draft_hold_that_it_would_not_write():
    bound = Bound(rule="threshold", limit=0.9, pool=64, rounds=0, trust=0.0)
    view = view_of([0.01, 0.02, 0.3, 0.4])
    first = bounded_set(view.entropy, view.confidence, bound)
    assert [own.tolist() for own in drafts_of(view, first, bound, 9)] == [[2], [3]]
    fields = {"policy": "joint", "commit": "drafts", "threshold": 0.9, "slack": 9.0}

    def reply(query):  # unsure drafts hold where nothing is sure, and only one at a time
        return [prospect_of(np.setdiff1d(np.arange(4), own), [0.4] * (4 - len(own)))
                for own in query.writes]  # fmt: skip

    _, commit = run(policy(**fields), view, reply)
    assert commit.chosen.tolist() == [0, 1, 2, 3]


def test_the_last_set_is_looked_at_by_nobody():
    queries, commit = run(policy(**EB), view_of([0.001, 0.002]))
    assert queries == [] and sorted(commit.chosen.tolist()) == [0, 1]


def test_a_score_for_the_unsure_position_needs_a_forward_of_its_own():
    """So `boe` carries no prediction into a step that asks for it, and one into any other."""
    fields = {"policy": "boe", "commit": "drafts", "drafts": 0}
    _, unsure = asked(fields, [prospect_of([2, 3, 4], [0.4, 0.3, 0.5])])
    assert unsure.carry is None
    _, sure = asked(fields, [prospect_of([2, 3, 4], [0.001, 0.002, 0.5])])
    assert sure.carry is not None


@pytest.mark.parametrize(
    "bound, rival",
    [
        ({"bound": "entropy"}, {"policy": "eb", "gamma": 0.01}),
        ({"bound": "threshold", "threshold": 0.99}, {"policy": "threshold", "threshold": 0.99}),
    ],
)
def test_boe_lets_the_score_choose_the_unsure_position(denoiser, bound, rival):
    """With a backward in each step that has one; without any where every token is sure enough, and
    then it is the bound's own policy."""
    _, steered = decoded(denoiser, "sudoku4-few", {"policy": "boe", "commit": "drafts", **bound})
    assert sum(report["backwards"] for report in steered.values()) > 0
    fields = {"policy": "boe", "commit": "drafts", "bypass": 1e-9, "slack": None}
    got, plain = decoded(denoiser, "sudoku4-few", fields | bound)
    want, _ = decoded(denoiser, "sudoku4-few", rival)
    assert sum(report["backwards"] for report in plain.values()) == 0
    assert got == want


def test_tokens_of_a_cached_canvas_are_those_of_the_bound(denoiser):
    frame = {"cache": "dual", "bound": "entropy", "policy": "joint"}
    want, _ = decoded(denoiser, "countdown", frame | {"rounds": 0})
    got, _ = decoded(denoiser, "countdown", frame | {"commit": "drafts", "slack": None})
    assert got == want


def test_a_canvas_in_float64_is_the_same(denoiser):
    double = Denoiser.from_pretrained(boe_vllm.tiny_model_path(), dtype=torch.float64)
    fields = {"policy": "joint", "commit": "drafts", "slack": None}
    assert decoded(double, "sudoku4", fields)[0] == decoded(denoiser, "sudoku4", fields)[0]


@pytest.mark.parametrize("bound", BOUNDS[1:3], ids=label)
@pytest.mark.parametrize("task", ["sudoku4-few", "countdown"])
def test_without_slack_drawn_tokens_are_those_of_the_bound_too(denoiser, task, bound):
    """Each position's draw has one random number, whatever is drafted."""
    fields = {"policy": "joint", "commit": "drafts", "slack": None, **bound}
    want, plain = decoded(denoiser, task, fields | {"drafts": 0}, temperature=1.0)
    got, drafted = decoded(denoiser, task, fields, temperature=1.0)
    assert got == want
    if bound["bound"] == "entropy":  # a threshold writes likely draws only, here the same ones
        other, _ = decoded(denoiser, task, fields, temperature=1.0, seed=100)
        assert other != want
    steps = [sum(r["denoising_steps"] for r in own.values()) for own in (drafted, plain)]
    assert steps[0] < steps[1]
