"""MDLM's Token Importance Scores equal autograd's through the transcription, in float64."""

import numpy as np
import pytest
import torch
from families import network
from mdlm_oracle import make_mdlm
from test_importance import ask_for, make_pass, oracle

from boe_vllm.steering.importance import TokenImportance

CASES = [
    dict(surrogate="mask", active="all"),
    dict(surrogate="mask", active="candidates"),
    dict(surrogate="inject", active="masked", context="exact", objective="remaining"),
    dict(surrogate="kv", active="masked"),
    dict(surrogate="response", active="masked", sharpen=0.5),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['surrogate']} {case['active']}")
def test_scores_equal_autograd_through_the_transcription(case):
    made = make_mdlm(dtype=torch.float64)
    current = make_pass(network(made), "all" if case["active"] == "all" else "masked")
    queries = [(n, ask_for(rows, **case)) for n, rows in enumerate(current.sequences)]
    for (n, query), got in zip(queries, TokenImportance.solve(current, queries), strict=True):
        want = oracle(made, current.sequences[n], query).detach().numpy()
        np.testing.assert_allclose(got.value, want, rtol=1e-7, atol=1e-10)
        assert np.abs(want).max() > 1e-4
