"""MDLM's logits are those of a transcription of its authors' code, its gradients autograd's."""

import numpy as np
import pytest
import torch
from mdlm_oracle import EOS, MASK, DenseMDLM, mdlm_config, mdlm_weights, save_mdlm

from boe_vllm.models.build import empty_model, load_model
from boe_vllm.models.families.mdlm import MDLMConfig
from boe_vllm.models.rows import SequenceRows, pack

F64 = torch.float64
CPU = torch.device("cpu")
VARIANTS = {
    "plain": {},
    "one block": {"n_blocks": 1},
    "one head": {"n_heads": 1, "n_blocks": 4},
    "narrow condition": {"cond_dim": 1},
}


def sequences_of(lens, keep="none"):
    rng = np.random.default_rng(0)
    made = []
    for length in lens:
        tokens = rng.integers(0, EOS, length)
        masked = rng.permutation(length)[: max(1, length // 2)]
        tokens[masked] = MASK
        made.append(SequenceRows(tokens=tokens, logit_positions=np.sort(masked), keep=keep))
    return made


def network(config, weights, dtype=torch.float32):
    model = empty_model(config, dtype=dtype)
    model.load_weights(weights.items())
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_the_transcription(variant, tmp_path):
    config = mdlm_config(**VARIANTS[variant])
    weights = mdlm_weights(config)
    model = load_model(save_mdlm(tmp_path, config, weights))
    assert type(model.config) is MDLMConfig
    sequences = sequences_of([2, 9, 30])
    layout = pack(sequences, CPU)
    hidden, _ = model.run(model.embed(layout.tokens), layout)
    logits, dense = model.logits(hidden), DenseMDLM(config, weights)
    for n, rows in enumerate(sequences):
        own = logits[layout.logit_starts[n] :][: len(rows.logit_positions)]
        want = dense.logits(dense.embed(rows.tokens))[rows.logit_positions]
        torch.testing.assert_close(own, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_backward_equals_autograd(variant, active):
    """Of a random direction of all logits, at every row's embedding; with eq. 30's stops, at those
    of the active rows."""
    config = mdlm_config(**VARIANTS[variant])
    weights = mdlm_weights(config, dtype=F64)
    model, dense = network(config, weights, F64), DenseMDLM(config, weights)
    (rows,) = sequences_of([17], keep="all")
    layout = pack([rows], CPU)
    hidden, saved = model.run(model.embed(layout.tokens), layout)
    seeded = torch.Generator().manual_seed(1)
    direction = torch.randn(
        len(rows.logit_positions), model.vocab_size, dtype=F64, generator=seeded
    )
    dhidden = torch.zeros(17, config.hidden_dim, dtype=F64)
    dhidden[layout.logit_index] = model.logits_backward(direction)
    order = torch.as_tensor(layout.row_positions[0])
    open_L = torch.zeros(17, dtype=torch.bool)
    open_L[rows.logit_positions] = True
    stops = open_L[order].to(F64)[:, None, None] if active else None
    found = model.backward(dhidden, saved, stops)
    x = dense.embed(rows.tokens).requires_grad_()
    logits = dense.logits(x, open_L if active else None)
    (want,) = torch.autograd.grad((logits[rows.logit_positions] * direction).sum(), x)
    torch.testing.assert_close(found, want[order], atol=1e-10, rtol=1e-9)


def test_a_sequence_has_the_same_bits_alone_and_in_any_batch():
    config = mdlm_config(hidden_dim=64)
    model = network(config, mdlm_weights(config))
    sequences = sequences_of([5, 64, 2, 33, 100], keep="masked")
    layout = pack(sequences, CPU)
    hidden, saved = model.run(model.embed(layout.tokens), layout)
    gradient = model.backward(torch.ones_like(saved.final_AD), saved, None)
    for n, rows in enumerate(sequences):
        own = pack([rows], CPU)
        alone, kept = model.run(model.embed(own.tokens), own)
        start = layout.logit_starts[n]
        assert torch.equal(hidden[start : start + len(alone)], alone)
        back = model.backward(torch.ones_like(kept.final_AD), kept, None)
        start = layout.saved_starts[n]
        assert torch.equal(gradient[start : start + len(back)], back)


def test_names_with_and_without_the_prefix_and_stored_frequencies_load():
    config = mdlm_config()
    weights = mdlm_weights(config)
    plain = {name.removeprefix("backbone."): x for name, x in weights.items()}
    plain["rotary_emb.inv_freq"] = 10000.0 ** (-torch.arange(0, 6, 2) / 6)
    one, other = network(config, weights), network(config, plain)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks.1.mlp.0.bias": None}, r"missing 1 tensor\(s\): blocks.1.mlp.0.bias"),
        ({"blocks.9.norm1.weight": torch.ones(24)}, "unexpected tensor 'blocks.9.norm1.weight'"),
        ({"blocks.0.norm1.weight": torch.ones(23)}, "'blocks.0.norm1.weight' of shape"),
        ({"rotary_emb.inv_freq": torch.ones(3)}, "expected the frequencies of base 10000"),
    ],
)
def test_a_checkpoint_that_is_no_mdlm_is_refused(changes, message):
    config = mdlm_config()
    weights = mdlm_weights(config)
    for name, tensor in changes.items():
        weights[f"backbone.{name}"] = tensor
    weights = {name: x for name, x in weights.items() if x is not None}
    with pytest.raises(ValueError, match=message):
        network(config, weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_conditioning": True}, "time_conditioning: expected False, got True"),
        ({"n_heads": 5}, "hidden_dim: expected a multiple of twice n_heads"),
        ({"mask_token_id": 29}, "mask_token_id: expected a token id below vocab_size"),
    ],
)
def test_a_config_that_the_network_does_not_implement_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        mdlm_config(**changes)


def test_more_ranks_than_one_are_refused():
    from boe_vllm.models.block import GeluMlp
    from boe_vllm.models.layers import Layers

    layers = Layers()
    layers.ranks = 2
    with pytest.raises(ValueError, match="tensor_parallel_size: expected 1"):
        GeluMlp(8, 32, layers)
