"""Token Importance Scores equal autograd's on the dense network, in float64.

The dense oracle runs eq. 30 literally (`torch.where(active, y, y.detach())`), one request at a
time; the packed passes answer all requests together.
"""

import numpy as np
import pytest
import torch
from oracle import Dense, random_weights, small_config

from boe_vllm.models.build import random_model
from boe_vllm.models.rows import SequenceRows, pack
from boe_vllm.sampling.canvas_constraints import CanvasConstraints
from boe_vllm.sampling.constraints import ConstraintTable, TokenConstraints
from boe_vllm.sampling.log_probs import LogProbabilities
from boe_vllm.sampling.statistics import RowWrites, read_statistics
from boe_vllm.steering.importance import TokenImportance
from boe_vllm.steering.step import DenoisingPass, NextStep

F64 = torch.float64
LENS = (9, 14, 6)


def setting(**changes):
    config = small_config(**changes)
    weights = random_weights(config, dtype=F64)
    model = random_model(config, dtype=F64)
    model.load_weights(weights.items())
    return model, Dense(config, weights)


def next_step(**changes):
    """A next step without constraints."""
    free = CanvasConstraints(TokenConstraints(), 0)
    return NextStep(**(dict(temperature=0.0, seed=0, step=1, constraints=free) | changes))


def make_pass(model, keep, *, budget_bytes=2**28, sizes=LENS, seed=3):
    rng = np.random.default_rng(seed)
    sequences = []
    for length in sizes:
        tokens = rng.integers(0, 27, length)
        masked = rng.permutation(length - model.shift)[: max(4, length // 2)] + model.shift
        masked = np.sort(masked)
        tokens[masked] = model.config.mask_token_id
        sequences.append(
            SequenceRows(tokens=tokens, logit_positions=masked, keep=keep, shift=model.shift)
        )
    layout = pack(sequences, torch.device("cpu"))
    hidden, saved = model.run(model.embed(layout.tokens), layout)
    rows, table = len(hidden), ConstraintTable()
    log_probs = LogProbabilities(
        model,
        hidden,
        mask_token_id=model.config.mask_token_id,
        constraint_R=np.zeros(rows, np.int64),
        table=table,
        budget_bytes=budget_bytes,
    )
    writes = RowWrites(temperature=np.zeros(rows), uniform=np.full(rows, 0.5))
    read_statistics(log_probs, writes, keep=True)
    return DenoisingPass(
        model=model, sequences=tuple(sequences), layout=layout, log_probs=log_probs, saved=saved,
        next_steps=(next_step(),) * len(sequences), table=table,
    )  # fmt: skip


def ask_for(rows, *, surrogate, objective="masked", active="masked", context="frozen", sharpen=1.0):
    masked = len(rows.logit_positions)
    everyone = np.arange(masked)
    candidates = everyone[: max(2, masked // 2)]
    return TokenImportance(
        candidates=candidates,
        objective=everyone if objective == "masked" else np.setdiff1d(everyone, candidates),
        active={"masked": everyone, "candidates": candidates, "all": None}[active],
        surrogate=surrogate,
        context=context,
        sharpen=sharpen,
    )


def soft_embeddings(dense, x_LD, positions, sharpen):
    logp = dense.log_probs(dense.logits(x_LD))[positions]
    return (logp / sharpen).softmax(-1) @ dense.w("wte")[: dense.config.vocab_size]


def active_rows(dense, query, rows):
    if query.active is None:
        return None
    flags = torch.zeros(len(rows.tokens), dtype=torch.bool)
    flags[dense.rows_of(rows.logit_positions[query.active])] = True
    return flags


def oracle(dense, rows, query):
    """[C] scores of one request by the definition, with autograd."""
    x = dense.embed(torch.from_numpy(rows.tokens))
    positions = rows.logit_positions[query.candidates]
    objective = rows.logit_positions[query.objective]
    soft = soft_embeddings(dense, x, positions, query.sharpen)
    mask = dense.w("wte")[dense.config.mask_token_id]
    if query.surrogate in ("response", "rectified"):
        return response_oracle(dense, rows, query, x, soft, positions, objective)
    if query.surrogate == "kv":
        return kv_oracle(dense, rows, query, x, soft, positions, objective)
    at = x.clone()
    if query.surrogate == "inject":
        at[positions] = soft
    at.requires_grad_()
    frozen = None
    if query.surrogate == "inject" and query.context == "frozen":
        return frozen_oracle(dense, rows, query, x, at, soft - mask, positions, objective)
    entropy = dense.entropies(dense.logits(at, active_rows(dense, query, rows), frozen))[
        objective
    ].sum()
    (gradient,) = torch.autograd.grad(entropy, at)
    return -(gradient[positions] * (soft - mask)).sum(-1)


def kv_oracle(dense, rows, query, x, soft, positions, objective):
    """Gradients at every layer's keys and values, and each candidate's row run alone."""
    x = x.clone().requires_grad_()
    entropy = dense.entropies(dense.logits(x, active_rows(dense, query, rows)))[objective].sum()
    kv = dense.kv
    tensors = [t for pair in kv for t in pair]
    gradients = torch.autograd.grad(entropy, tensors, allow_unused=True)
    old = [(k.detach(), v.detach()) for k, v in kv]
    scores = []
    for position, write in zip(positions, soft, strict=True):
        changed = x.detach().clone()
        changed[position] = write
        dense.logits(changed, frozen=(int(position), old))
        total = 0.0
        for gradient, was, now in zip(
            gradients, [t for p in old for t in p], [t for p in dense.kv for t in p], strict=True
        ):
            if gradient is not None:
                total += (gradient[position] * (now[position] - was[position])).sum()
        scores.append(-total)
    return torch.stack(scores)


def response_oracle(dense, rows, query, x, soft, positions, objective):
    """Gradients at every row's attention output, and those outputs computed again one by one."""
    x = x.clone().requires_grad_()
    entropy = dense.entropies(dense.logits(x, active_rows(dense, query, rows)))[objective].sum()
    outputs = [o for _, o in dense.attention]
    gradients = torch.autograd.grad(entropy, outputs, allow_unused=True)
    return response_drops(dense, dense, x.detach(), query, soft, positions, gradients)


def response_drops(dense, network, x, query, soft, positions, gradients):
    """[C] drops of entropy, given what `network` left behind of `x` and the gradients there."""
    layers = [(q.detach(), o.detach()) for q, o in network.attention]
    old = [(k.detach(), v.detach()) for k, v in network.kv]
    scores = []
    for position, write in zip(positions, soft, strict=True):
        changed = x.clone()
        changed[position] = write
        dense.logits(changed, frozen=(int(position), old))
        revealed = [(k[position], v[position]) for k, v in dense.kv]
        total = 0.0
        for (q, was), (k, v), gradient, new in zip(layers, old, gradients, revealed, strict=True):
            if gradient is None:
                continue
            k, v = k.clone(), v.clone()
            k[position], v[position] = new
            now = Dense.attend(dense, q, k, v)
            for row in range(len(x)):
                drop = -float((gradient[row] * (now[row] - was[row])).sum())
                if row != position:
                    total += max(drop, 0.0) if query.surrogate == "rectified" else drop
        scores.append(total)
    return torch.tensor(scores, dtype=F64)


def frozen_oracle(dense, rows, query, x, at, change, positions, objective):
    """All masked rows live, the others' keys and values those of the first forward."""
    dense.logits(x)
    old = [(k.detach(), v.detach()) for k, v in dense.kv]
    live = torch.zeros(len(rows.tokens), dtype=torch.bool)
    live[dense.rows_of(rows.logit_positions)] = True

    class Mixed(Dense):
        layer = 0

        def attend(self, q, k, v):
            was = old[self.layer]
            self.layer += 1
            keep = live[:, None, None]
            return super().attend(q, torch.where(keep, k, was[0]), torch.where(keep, v, was[1]))

    mixed = Mixed(dense.config, dense.weights)
    entropy = mixed.entropies(mixed.logits(at, active_rows(dense, query, rows)))[objective].sum()
    (gradient,) = torch.autograd.grad(entropy, at)
    return -(gradient[positions] * change).sum(-1)


CASES = [
    dict(surrogate="mask", active="all"),
    dict(surrogate="mask", active="masked"),
    dict(surrogate="mask", active="candidates"),
    dict(surrogate="mask", active="masked", objective="remaining"),
    dict(surrogate="mask", active="masked", sharpen=0.5),
    dict(surrogate="kv", active="masked"),
    dict(surrogate="kv", active="candidates"),
    dict(surrogate="kv", active="masked", objective="remaining"),
    dict(surrogate="kv", active="all"),
    dict(surrogate="response", active="masked"),
    dict(surrogate="response", active="all"),
    dict(surrogate="response", active="candidates"),
    dict(surrogate="rectified", active="masked", sharpen=0.5),
    dict(surrogate="rectified", active="masked", objective="remaining"),
    dict(surrogate="rectified", active="all"),
    dict(surrogate="inject", active="masked"),
    dict(surrogate="inject", active="masked", objective="remaining", sharpen=0.5),
    dict(surrogate="inject", active="all", context="exact"),
    dict(surrogate="inject", active="masked", context="exact"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c.values())))
@pytest.mark.parametrize(
    "changes", [{}, {"n_kv_heads": 2}, {"shift": 1}], ids=["heads4", "grouped", "shifted"]
)
def test_scores_equal_autograd(case, changes):
    model, dense = setting(**changes)
    current = make_pass(model, "all" if case["active"] == "all" else "masked")
    queries = [(n, ask_for(rows, **case)) for n, rows in enumerate(current.sequences)]
    for (n, query), got in zip(queries, TokenImportance.solve(current, queries), strict=True):
        want = oracle(dense, current.sequences[n], query).numpy()
        np.testing.assert_allclose(got.value, want, rtol=1e-8, atol=1e-11)
        assert np.abs(want).max() > 1e-3  # the test can fail


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("first", ["mask", "response", "rectified"])
def test_one_backward_gives_each_request_its_own_scores(first, shift):
    model, _ = setting(shift=shift)
    current = make_pass(model, "masked")
    kinds = [
        dict(surrogate=first),
        dict(surrogate="kv", objective="remaining"),
        dict(surrogate="inject"),
    ]
    queries = [(n, ask_for(current.sequences[n], **kind)) for n, kind in enumerate(kinds)]
    together = TokenImportance.solve(current, queries)
    for pair, got in zip(queries, together, strict=True):
        (alone,) = TokenImportance.solve(current, [pair])
        np.testing.assert_allclose(got.value, alone.value, rtol=1e-12)


def test_remaining_objective_with_candidate_rows_only_has_no_gradient():
    model, _ = setting()
    current = make_pass(model, "masked")
    query = ask_for(
        current.sequences[1], surrogate="mask", objective="remaining", active="candidates"
    )
    (got,) = TokenImportance.solve(current, [(1, query)])
    assert (got.value == 0).all()


def test_mask_scores_equal_finite_differences():
    model, dense = setting()
    current = make_pass(model, "all")
    rows = current.sequences[0]
    query = ask_for(rows, surrogate="mask", active="all")
    (got,) = TokenImportance.solve(current, [(0, query)])
    x = dense.embed(torch.from_numpy(rows.tokens))
    positions = rows.logit_positions[query.candidates]
    change = soft_embeddings(dense, x, positions, 1.0) - dense.w("wte")[28]
    for score, position, direction in zip(got.value, positions, change, strict=True):
        values = []
        for alpha in (-1e-5, 1e-5):
            moved = x.clone()
            moved[position] += alpha * direction
            values.append(float(dense.entropies(dense.logits(moved))[rows.logit_positions].sum()))
        assert score == pytest.approx(-(values[1] - values[0]) / 2e-5, rel=1e-5, abs=1e-8)


def test_small_tiles_change_nothing():
    model, _ = setting()
    whole, tiled = make_pass(model, "masked"), make_pass(model, "masked", budget_bytes=2048)
    assert whole.log_probs.keeps and not tiled.log_probs.keeps and tiled.log_probs.tile_rows == 2
    queries = [(n, ask_for(rows, surrogate="kv")) for n, rows in enumerate(whole.sequences)]
    for a, b in zip(
        TokenImportance.solve(whole, queries), TokenImportance.solve(tiled, queries), strict=True
    ):
        np.testing.assert_allclose(a.value, b.value, rtol=1e-12)


def test_cost_is_counted():
    model, _ = setting()
    current = make_pass(model, "masked")
    rows = current.sequences[1]
    masked, candidates = len(rows.logit_positions), max(2, len(rows.logit_positions) // 2)
    length = len(rows.tokens)
    want = {
        ("mask", "frozen"): (0, 1, 0, masked),
        ("kv", "frozen"): (1, 1, candidates, masked),
        ("response", "frozen"): (1, 1, candidates, masked),
        ("rectified", "frozen"): (1, 1, candidates, masked),
        ("inject", "frozen"): (1, 1, masked, masked),
        ("inject", "exact"): (1, 1, length, masked),
    }
    for (surrogate, context), cost in want.items():
        query = ask_for(rows, surrogate=surrogate, context=context)
        (got,) = TokenImportance.solve(current, [(1, query)])
        assert (got.forwards, got.backwards, got.rows_forward, got.rows_backward) == cost
