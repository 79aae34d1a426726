"""Drafts verified in one pass: in a network of one layer, where nothing is known at second hand,
every masked view is the dense network's prediction of its own state."""

import numpy as np
import pytest
import torch
from test_guidance import MASK, W, guided_pass
from test_importance import make_pass, setting

from boe_vllm.steering.attention_map import AttentionMap
from boe_vllm.steering.chain import Conditional
from boe_vllm.steering.step import solve_together
from boe_vllm.steering.verification import Verification


def queries_of(current, drafts):
    """The first masks are written, the next are drafted from the right to the left."""
    found = {}
    for s, rows in enumerate(current.sequences):
        many = min(drafts, len(rows.logit_positions) - 1)
        found[s] = Verification(
            written=np.array([0]),
            written_tokens=np.array([3]),
            drafted=np.arange(many, 0, -1),
            drafts=np.array([5, 5, 1, 7])[:many],
        )
    return found


def states_of(rows, query):
    """The tokens of the sequence once the writes and the drafts before each are made."""
    tokens = rows.tokens.copy()
    tokens[rows.logit_positions[query.written]] = query.written_tokens
    for index, draft in zip(query.drafted, query.drafts, strict=True):
        yield tokens.copy()
        tokens[rows.logit_positions[index]] = draft


def dense_log_probs(dense, rows, state, guide):
    logits = dense.logits(dense.embed(torch.from_numpy(state)))
    if guide is not None:
        empty = np.where(guide.given, MASK, state)
        without = dense.logits(dense.embed(torch.from_numpy(empty)))
        logits = without + (guide.scale + 1) * (logits - without)
    return dense.log_probs(logits)


@pytest.mark.parametrize("scales", [(None, None, None), (W, None, 0.5)], ids=["plain", "guided"])
@pytest.mark.parametrize("shift", [0, 1])
def test_one_layer_verifies_every_draft_in_its_own_state(shift, scales):
    model, dense = setting(n_kv_heads=2, shift=shift, n_layers=1)
    current = guided_pass(model, scales=scales)
    queries = queries_of(current, 4)
    for s, result in solve_together(current, queries).items():
        rows, query, guide = current.sequences[s], queries[s], current.guide(s)
        want, agrees = [], []
        for n, state in enumerate(states_of(rows, query)):
            logp = dense_log_probs(dense, rows, state, guide)
            row = logp[rows.logit_positions[query.drafted[n]]]
            want.append(float(row[query.drafts[n]].exp()))
            agrees.append(int(row.argmax()) == query.drafts[n])
        np.testing.assert_allclose(result.value.probability, want, rtol=1e-9)
        assert result.value.agrees.tolist() == agrees
        passes = current.passes(s)
        assert result.forwards == passes
        run = 1 + 2 * len(query.drafted) - 1
        if shift == 0:
            assert result.rows_forward == passes * run
        else:
            assert passes * run <= result.rows_forward <= 2 * passes * run


def test_one_draft_is_a_conditional_prediction():
    model, _ = setting(n_kv_heads=2)
    current = guided_pass(model)
    for s, query in queries_of(current, 1).items():
        (given,) = Verification.solve(current, [(s, query)])
        (known,) = Conditional.solve(
            current,
            [
                (
                    s,
                    Conditional(
                        written=query.written,
                        tokens=query.written_tokens,
                        queried=query.drafted,
                        temperature=0.0,
                        uniform=np.full(1, 0.5),
                    ),
                )
            ],
        )
        draft = Verification(
            written=query.written,
            written_tokens=query.written_tokens,
            drafted=query.drafted,
            drafts=known.value.proposal,
        )
        (likeliest,) = Verification.solve(current, [(s, draft)])
        np.testing.assert_allclose(likeliest.value.probability, known.value.confidence, rtol=1e-12)
        assert likeliest.value.agrees.all()
        assert (given.forwards, given.rows_forward) == (known.forwards, known.rows_forward)


def test_queries_that_are_solved_together_are_solved_as_alone():
    model, _ = setting()
    current = make_pass(model, "masked")
    queries = queries_of(current, 4)
    together = solve_together(current, queries)
    for s, query in queries.items():
        alone = solve_together(current, {s: query})[s]
        assert alone.value.probability.tolist() == together[s].value.probability.tolist()
        assert alone.rows_forward == together[s].rows_forward


@pytest.mark.parametrize("layers", [1, 2, 9])
@pytest.mark.parametrize("most", [1, 2**24])
def test_the_attention_map_is_the_dense_networks(monkeypatch, layers, most):
    monkeypatch.setattr("boe_vllm.steering.attention_map._MOST_SCORES", most)
    model, dense = setting(n_kv_heads=2)
    current = make_pass(model, "all")
    maps = solve_together(
        current, {s: AttentionMap(layers=layers) for s in range(len(current.sequences))}
    )
    for s, result in maps.items():
        rows = current.sequences[s]
        dense.logits(dense.embed(torch.from_numpy(rows.tokens)))
        seen = []
        for (q, _), (k, _) in zip(dense.attention, dense.kv, strict=True):
            k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
            scores = torch.einsum("ihp,jhp->hij", q, k) * q.shape[-1] ** -0.5
            seen.append(scores.softmax(-1).mean(0))
        want = torch.stack(seen[-layers:]).mean(0)
        np.testing.assert_allclose(result.value[:-1], want[rows.logit_positions], rtol=1e-9)
        np.testing.assert_allclose(result.value[-1], want.mean(0), rtol=1e-9)
        assert (result.forwards, result.rows_forward) == (0, 0)
