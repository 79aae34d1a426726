"""The pass that queries are solved on: constraints of supposed states, and who has rows in it."""

import dataclasses

import numpy as np
import pytest
import torch
from test_importance import make_pass
from test_lookahead import dense_state, networks, with_next_steps  # noqa: F401
from test_loop import MASK, make_loop, params_of

from boe_vllm.models.rows import pack
from boe_vllm.policies.base import Commit, Needs, Policy, PolicyConfig
from boe_vllm.steering.chain import Conditional
from boe_vllm.steering.change import PredictionChange
from boe_vllm.steering.coupling import Coupling
from boe_vllm.steering.guidance import Guidance, guided, with_unconditional
from boe_vllm.steering.hypothetical import soft_writes
from boe_vllm.steering.importance import TokenImportance
from boe_vllm.steering.likelihood import Likelihood
from boe_vllm.steering.lookahead import Lookahead
from boe_vllm.steering.step import solve_together


def test_a_sharpened_write_leaves_the_bits_of_the_other_rows(networks):  # noqa: F811
    """They may be another request's."""
    current = make_pass(networks[0], "masked")
    rows = np.arange(5)
    plain = soft_writes(current.log_probs, rows, np.ones(5))
    mixed = soft_writes(current.log_probs, rows, np.array([1.0, 1.0, 0.5, 1.0, 0.25]))
    assert torch.equal(mixed[[0, 1, 3]], plain[[0, 1, 3]])
    assert not torch.isclose(mixed[[2, 4]], plain[[2, 4]]).all(-1).any()


# ---- constraints of supposed states --------------------------------------------------------------


def neighbours(current):
    """Sequences with two masks in a row: (sequence, its rows, index of the first of the two)."""
    for s, rows in enumerate(current.sequences):
        for gap in np.flatnonzero(np.diff(rows.logit_positions) == 1)[:1]:
            yield s, rows, int(gap)


def test_a_states_constraints_are_those_of_its_own_tokens(networks):  # noqa: F811
    """A bad word of two tokens: what a state's write has begun, its neighbour may not complete."""
    model, dense = networks
    plain = with_next_steps(make_pass(model, "masked"))
    found = list(neighbours(plain))
    assert found
    for s, rows, gap in found:
        p = dense_state(dense, rows, np.array([gap]), np.array([4]), 1.0)
        p = p[rows.logit_positions[gap + 1]]
        follows = int(p[:MASK].argmax())
        current = with_next_steps(make_pass(model, "masked"), bad_words=((4, follows),))
        for token in (4, 5):
            query = Lookahead(writes=(np.array([gap]),), tokens=(np.array([token]),), carry=True)
            prospects = [Lookahead.solve(c, [(s, query)])[0].value[0] for c in (plain, current)]
            if token == 5:  # begins no bad word
                assert prospects[0].confidence[gap] == prospects[1].confidence[gap]
                continue
            assert prospects[0].proposal[gap] == follows
            p[follows] = 0
            assert prospects[1].proposal[gap] == p.argmax()
            assert prospects[1].confidence[gap] == pytest.approx(p.max() / p.sum())


def test_a_conditionals_constraints_are_those_of_what_is_supposed(networks):  # noqa: F811
    model, _ = networks
    plain = with_next_steps(make_pass(model, "masked"))
    for s, _rows, gap in neighbours(plain):
        query = Conditional(
            written=np.array([gap]), tokens=np.array([4]), queried=np.array([gap + 1]),
            temperature=0.0, uniform=np.full(1, 0.5),
        )  # fmt: skip
        free = Conditional.solve(plain, [(s, query)])[0].value.proposal[0]
        current = with_next_steps(make_pass(model, "masked"), bad_words=((4, int(free)),))
        assert Conditional.solve(current, [(s, query)])[0].value.proposal[0] != free


# ---- sequences and places ------------------------------------------------------------------------


def test_a_carried_sequence_has_no_rows_although_a_copy_lies_at_its_number(networks):  # noqa: F811
    """Sequence 1 was carried over; place 1 is the unconditional copy of sequence 0."""
    model, dense = networks
    plain = with_next_steps(make_pass(model, "masked"))
    own, carried = plain.sequences[:2]
    guides = [Guidance(scale=0.5, given=rows.tokens != MASK) for rows in (own, carried)]
    packed, unconditional = with_unconditional([own], guides[:1], MASK)
    layout = pack(packed, torch.device("cpu"))
    hidden, saved = model.run(model.embed(layout.tokens), layout)
    hidden = guided(hidden, layout, unconditional, guides)
    current = dataclasses.replace(
        plain, sequences=(own, carried), layout=layout, saved=saved, guides=tuple(guides),
        unconditional=unconditional, next_steps=plain.next_steps[:2],
        log_probs=plain.log_probs.of(hidden, np.zeros(len(hidden), bool)),
    )  # fmt: skip
    assert unconditional == {0: 1} and current.place(0) == 0
    one, two, numbers = np.array([0]), np.array([0, 1]), np.full(1, 0.5)
    queries = [
        TokenImportance(candidates=one, objective=two, active=two, surrogate="kv"),
        TokenImportance(candidates=one, objective=two, active=two, surrogate="inject"),
        Conditional(written=one, tokens=one, queried=one + 1, temperature=0.0, uniform=numbers),
        Coupling(pool=two, tokens=two, entropy=np.ones(2), estimator="pairs", measure="kl"),
        Coupling(pool=two, tokens=two, entropy=np.ones(2), estimator="overlap", measure="kl"),
        Likelihood(index=one, tokens=one),
        PredictionChange(positions=carried.logit_positions),
        Lookahead(writes=(one,), tokens=None),
    ]
    for query in queries:
        with pytest.raises(ValueError, match=r"sequence 1, whose prediction was carried over"):
            solve_together(current, {1: query})
    # What needs no rows of the pass is answered: look-ahead that writes tokens.
    (result,) = solve_together(
        current, {1: Lookahead(writes=(one,), tokens=(np.array([4]),))}
    ).values()
    assert result.forwards == 2 and len(result.value) == 1


class Forgetful(Policy):
    """Carries its prediction over and then asks for gradients of a forward that did not run."""

    def needs(self):
        return Needs(rows="masked")

    def step(self, view):
        if view.step == 1:
            all_of = np.arange(len(view.positions))
            yield TokenImportance(
                candidates=all_of[:1], objective=all_of, active=all_of, surrogate="mask"
            )
        (prospect,) = yield Lookahead(
            writes=(np.array([0]),), tokens=(view.proposal[:1],), carry=True
        )
        return Commit(chosen=np.array([0]), carry=prospect.carry)


def test_asking_a_forward_that_did_not_run_fails_that_request_alone(networks):  # noqa: F811
    model, _ = networks
    loop = make_loop(model)
    for name in ("guided", "forgetful"):
        fields = {"policy": "boe", "block_length": 4}
        fields |= {"cfg_scale": 1.0} if name == "guided" else {}
        loop.add(name, [1, 2], params_of(fields, prompt_len=2, max_tokens=4))
    loop.canvases["forgetful"].policy = Forgetful(PolicyConfig())
    for result in loop.step(["guided", "forgetful"]).values():
        assert result.error is None
    results = loop.step(["guided", "forgetful"])
    assert "sequence 1, whose prediction was carried over" in results["forgetful"].error
    assert results["guided"].error is None
