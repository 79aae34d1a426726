"""`confidence_eos_eot_inf` holds in every round of every policy: on the bundled model's additions,
at four tokens a step, nobody commits EOS while something else of the block could be written."""

import numpy as np
import pytest
import slow_decoding
import torch
from test_loop import NEEDED, params_of
from test_policies import make_view, policy_of, run
from toy import label

from boe_vllm.decoding.loop import DenoisingLoop
from boe_vllm.lab.tasks import TASKS
from boe_vllm.models.build import random_model
from boe_vllm.models.special import SpecialTokens
from boe_vllm.policies import POLICY_NAMES
from boe_vllm.policies.base import Commit
from boe_vllm.steering.chain import Conditional, Conditioned

ITEMS = {"lookahead": 2, "info-gain": 4}
"""Fewer where a step costs many forwards."""
CASES = [{"policy": name} for name in sorted(POLICY_NAMES - set(NEEDED))] + [
    {"policy": "boe", "preset": "paper"},
    {"policy": "boe", "surrogate": "response", "candidates": 12},
    {"policy": "joint", "preset": "thorough"},
    {
        "policy": "joint",
        "commit": "rounds",
        "bound": "entropy",
        "rounds": 3,
        "trust": 9.0,
        "gamma": 1.0,
    },
    {"policy": "joint", "commit": "rounds", "rounds": 3, "trust": 9.0, "threshold": 0.2},
    {"policy": "joint", "commit": "drafts", "threshold": 0.2, "slack": 9.0},
    {"policy": "joint", "remask": "remdm", "sigma_schedule": "rescale", "eta": 0.9},
    {"policy": "joint", "commit": "eb", "gamma": 1.0},
    {"policy": "joint", "schedule": "cosine"},
    {"policy": "boe", "commit": "threshold", "threshold": 0.5},
    {"policy": "pairwise", "coupling": "attention"},
    {"policy": "eb", "gamma": 3.0},
    {"policy": "lookum", "pool_size": 20, "paths": 3},
]


class Watched:
    """A policy whose proposals are followed through the rounds of a step."""

    def __init__(self, policy, late):
        self.policy, self.late, self.rounds = policy, late, 0

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def step(self, view):
        step = self.policy.step(view)
        known, written = view.proposal.copy(), {}

        def write(indices, tokens):
            """Nothing else could have been written instead of what only comes last."""
            new = [i for i in indices if i not in written]
            written.update(zip(indices, tokens, strict=True))
            others = [i for i in range(len(known)) if i not in written]
            if any(written[i] in self.late for i in new):
                assert all(known[i] in self.late for i in others)

        if not isinstance(step, Commit):
            reply = None
            while True:
                try:
                    query = step.send(reply)
                except StopIteration as stop:
                    step = stop.value
                    break
                if isinstance(query, Conditional):
                    write(query.written.tolist(), query.tokens.tolist())
                reply = yield query
                if isinstance(query, Conditional):
                    known[query.queried] = reply.proposal
                    self.rounds += 1
        tokens = view.proposal[step.chosen] if step.tokens is None else step.tokens
        write(step.chosen.tolist(), tokens.tolist())
        return step


@pytest.fixture(scope="module")
def tiny():
    config, weights = slow_decoding.bundled()
    model = random_model(config)
    model.load_weights({name: weight.float() for name, weight in weights.items()}.items())
    return model


@pytest.mark.parametrize("fields", CASES, ids=label)
def test_nobody_commits_eos_early(tiny, fields):
    config = tiny.config
    loop = DenoisingLoop(
        tiny,
        special=SpecialTokens(
            mask=config.mask_token_id,
            eos=config.eos_token_id,
            late=frozenset({config.eos_token_id}),
        ),
        device=torch.device("cpu"),
    )
    task = TASKS["addition"]
    shape = {"tokens_per_step": 4, "confidence_eos_eot_inf": True}
    shape |= {"gen_length": task.gen_length, "block_length": task.block_length}
    for n, item in enumerate(task.items(ITEMS.get(fields["policy"], 8))):
        prompt = list(item.prompt.encode())
        loop.add(str(n), prompt, params_of(fields | shape, prompt_len=len(prompt), seed=n))
        loop.canvases[str(n)].policy = Watched(loop.canvases[str(n)].policy, {config.eos_token_id})
    canvases = list(loop.canvases.values())
    for _ in range(80):
        running = [r for r, canvas in loop.canvases.items() if not canvas.done]
        if not running:
            break
        for result in loop.step(running).values():
            assert result.error is None
    assert all(canvas.done for canvas in canvases)
    ends = [int((c.tokens[c.prompt_len :] == config.eos_token_id).sum()) for c in canvases]
    assert min(ends) > 0  # the test can fail


def test_a_proposal_that_becomes_eos_joins_no_set_while_the_block_has_others():
    """Candidates 0 and 1; once 0 is written, 1 turns into EOS; 2 and 3 are no candidates."""
    eos = 7
    late = np.array([eos])

    def reply(query):
        return Conditioned(
            proposal=np.full(len(query.queried), eos),
            confidence=np.full(len(query.queried), 0.9999),
            entropy=np.zeros(len(query.queried)),
        )

    policy = policy_of(policy="joint", multiple=1.0)
    view = make_view([0.8, 0.7, 0.3, 0.2], quota=2, late_tokens=late)
    _, commit = run(policy, view, reply)
    assert commit.chosen.tolist() == [0]  # one token less than is due
    # Nothing but EOS is left elsewhere: then EOS fills up, without further rounds.
    view = make_view([0.8, 0.7, 0.6, -np.inf], quota=3, late_tokens=late)
    queries, commit = run(policy, view, reply)
    assert commit.chosen.tolist() == [0, 1, 2] and commit.tokens.tolist() == [50, eos, eos]
    assert len(queries) == 1
    # Where everything comes last, positions decide and nothing is asked.
    view = make_view([-np.inf] * 4, quota=3, late_tokens=late)
    queries, commit = run(policy, view, reply)
    assert queries == [] and commit.chosen.tolist() == [0, 1, 2]


def test_remasking_takes_back_no_more_than_a_short_set_allows():
    """A set that ends early writes less than is due, so less is masked again."""
    eos = 7
    policy = policy_of(
        policy="joint", remask="remdm", sigma_schedule="rescale", eta=1.0, multiple=1.0
    )
    short = 0
    for seed in range(40):
        memory = {"remasking": {"iteration": 3, "stored": dict.fromkeys(range(40, 46), 0.5)}}
        view = make_view(
            [0.8, 0.7, 0.6, 0.5, 0.4, 0.3], quota=2, late_tokens=np.array([eos]), seed=seed,
            written=np.arange(40, 46), block_step=3, block_steps=8, memory=memory,
        )  # fmt: skip

        def reply(query):
            many = len(query.queried)
            return Conditioned(
                proposal=np.full(many, eos), confidence=np.ones(many), entropy=np.zeros(many)
            )

        _, commit = run(policy, view, reply)
        assert len(commit.remask) <= max(0, len(commit.chosen) - 2)
        short += len(commit.chosen) < 2
    assert short > 0


def test_lookum_draws_no_set_that_may_only_come_last():
    policy = policy_of(policy="lookum", paths=50, pool_size=20)
    view = make_view([0.9, -np.inf, 0.8, -np.inf, 0.7], quota=2)
    assert policy.pool(view).tolist() == [0, 2, 4]
    assert {i for chosen in policy.draw(view, policy.pool(view)) for i in chosen} == {0, 2, 4}
    few = make_view([-np.inf, 0.8, -np.inf], quota=2)  # EOS makes up what is due
    assert policy.pool(few).tolist() == [1, 0]
