"""Every Llama-shaped family's logits are those of transformers' own class, and its gradients are
autograd's through that class."""

import numpy as np
import pytest
import torch
from families import EOS, FAMILIES, MASK, make, network

from boe_vllm.models.build import load_model
from boe_vllm.models.rows import SequenceRows, pack

F64 = torch.float64
CPU = torch.device("cpu")
VARIANTS = {
    "plain": {},
    "one layer": {"num_hidden_layers": 1},
    "grouped": {"num_key_value_heads": 2, "num_hidden_layers": 4},
    "one key head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 2},
    "wide heads": {"head_dim": 10},
    "stretched": {
        "head_dim": 10,
        "rope": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 96,
        },
    },
}
"""Wavelengths of the stretched variant are short, between and long: 6, 25, 100, 396, 1577."""


def sequences_of(lens, *, shift, seed=0, keep="none"):
    rng = np.random.default_rng(seed)
    made = []
    for length in lens:
        tokens = rng.integers(0, EOS, length)
        masked = 1 + np.flatnonzero(rng.random(length - 1) < 0.5)
        masked = masked if len(masked) else np.array([length - 1])
        tokens[masked] = MASK
        made.append(SequenceRows(tokens=tokens, logit_positions=masked, keep=keep, shift=shift))
    return made


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, variant, tmp_path):
    made = make(family, **VARIANTS[variant])
    model = load_model(made.save(tmp_path))
    assert type(model.config) is type(made.config)
    sequences = sequences_of([2, 9, 30], shift=made.shift)
    layout = pack(sequences, CPU)
    hidden, _ = model.run(model.embed(layout.tokens), layout)
    logits = model.logits(hidden)
    for n, rows in enumerate(sequences):
        start = layout.logit_starts[n]
        own = logits[start : start + len(rows.logit_positions)]
        want = made.logits(made.embed(rows.tokens))[rows.logit_positions]
        torch.testing.assert_close(own, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sequence_has_the_same_bits_alone_and_in_any_batch(family):
    made = make(family, hidden_size=64, head_dim=16, intermediate_size=96)
    model = network(made)
    sequences = sequences_of([5, 64, 2, 33, 100], shift=made.shift, keep="masked")
    layout = pack(sequences, CPU)
    hidden, saved = model.run(model.embed(layout.tokens), layout)
    gradient = model.backward(ones(saved), saved, None)
    for n, rows in enumerate(sequences):
        own = pack([rows], CPU)
        alone, kept = model.run(model.embed(own.tokens), own)
        start = layout.logit_starts[n]
        assert torch.equal(hidden[start : start + len(alone)], alone)
        back = model.backward(ones(kept), kept, None)
        start = layout.saved_starts[n]
        assert torch.equal(gradient[start : start + len(back)], back)


@pytest.mark.parametrize("variant", ["plain", "grouped", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_backward_of_all_rows_equals_autograd(family, variant):
    """Of a random direction of all logits, at every row's embedding."""
    made = make(family, dtype=F64, **VARIANTS[variant])
    model = network(made)
    (rows,) = sequences_of([17], shift=made.shift, keep="all")
    layout = pack([rows], CPU)
    hidden, saved = model.run(model.embed(layout.tokens), layout)
    wanted = len(rows.logit_positions)
    direction = torch.randn(wanted, model.vocab_size, dtype=F64, generator=seeded(1))
    dhidden = torch.zeros(len(rows.tokens), hidden.shape[1], dtype=F64)
    dhidden[layout.logit_index] = model.logits_backward(direction)
    found = model.backward(dhidden, saved, None)
    x = made.embed(rows.tokens).requires_grad_()
    loss = (made.logits(x)[rows.logit_positions] * direction).sum()
    (want,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(found, want[layout.row_positions[0]], atol=1e-10, rtol=1e-9)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def ones(saved):
    return torch.ones_like(saved.final_AD)
