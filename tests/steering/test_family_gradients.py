"""Token Importance Scores of every family equal autograd's through transformers' own class, with
the stops of eq. 30 on its attention outputs, in float64."""

import contextlib

import numpy as np
import pytest
import torch
from families import FAMILIES, MASK, make, network
from test_importance import ask_for, make_pass

from boe_vllm.steering.importance import TokenImportance

F64 = torch.float64
CASES = [
    dict(surrogate="mask", active="all"),
    dict(surrogate="mask", active="candidates"),
    dict(surrogate="mask", active="masked", objective="remaining", sharpen=0.5),
    dict(surrogate="inject", active="masked", context="exact"),
]


@contextlib.contextmanager
def stopping(oracle, open_L):
    """Eq. 30: only rows of `open_L` pass a gradient through their attention."""

    def stop(module, inputs, outputs):
        mixed, *others = outputs
        return torch.where(open_L[:, None], mixed, mixed.detach()), *others

    layers = oracle.model.layers if open_L is not None else ()
    hooks = [layer.self_attn.register_forward_hook(stop) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def log_probs(logits):
    logits = logits.clone()
    logits[:, MASK] = -1e30
    return logits.log_softmax(-1)


def scores_by_autograd(made, rows, query):
    """[C] by the definition, one request at a time."""
    x, positions = made.embed(rows.tokens), rows.logit_positions
    places, mask = positions[query.candidates], made.embed([MASK])[0]
    logp = log_probs(made.logits(x))[places]
    soft = (logp / query.sharpen).softmax(-1) @ made.oracle.get_input_embeddings().weight
    at = x.clone()
    if query.surrogate == "inject":
        at[places] = soft
    at.requires_grad_()
    open_L = None
    if query.active is not None:
        own = positions[query.active]
        open_L = torch.zeros(len(x), dtype=torch.bool)
        open_L[np.concatenate([own, own - made.shift])] = True
    with stopping(made.oracle, open_L):
        logp = log_probs(made.logits(at))[positions[query.objective]]
    entropy = -(logp.exp() * logp).sum()
    (gradient,) = torch.autograd.grad(entropy, at)
    return -(gradient[places] * (soft - mask)).sum(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_autograd_through_transformers(family):
    made = make(family, dtype=F64, num_hidden_layers=2, num_key_value_heads=2)
    model = network(made)
    for case in CASES:
        current = make_pass(model, "all" if case["active"] == "all" else "masked")
        queries = [(n, ask_for(rows, **case)) for n, rows in enumerate(current.sequences)]
        for (n, query), got in zip(queries, TokenImportance.solve(current, queries), strict=True):
            want = scores_by_autograd(made, current.sequences[n], query).numpy()
            np.testing.assert_allclose(got.value, want, rtol=1e-7, atol=1e-10, err_msg=str(case))
            assert np.abs(want).max() > 1e-3
