"""The packed network equals a plain dense one, loads official checkpoints, and mixes no rows."""

import numpy as np
import pytest
import torch
from oracle import Dense, random_weights, small_config

from boe_vllm import attention
from boe_vllm.models.build import random_model
from boe_vllm.models.rows import SequenceRows, pack


def load(config, weights, dtype=torch.float32):
    model = random_model(config, dtype=dtype)
    model.load_weights((name, tensor.to(dtype)) for name, tensor in weights.items())
    return model


def sequences_of(config, lens, *, seed=0, keep="none"):
    rng = np.random.default_rng(seed)
    made = []
    for length in lens:
        tokens = rng.integers(0, config.vocab_size - 2, length)
        masked = np.flatnonzero(rng.random(length) < 0.5)
        masked = masked if len(masked) else np.array([length - 1])
        tokens[masked] = config.mask_token_id
        made.append(SequenceRows(tokens=tokens, logit_positions=masked, keep=keep))
    return made


def packed_logits(model, sequences, device="cpu"):
    layout = pack(sequences, torch.device(device))
    hidden, _ = model.run(model.embed(layout.tokens), layout)
    return model.logits(hidden), layout


@pytest.mark.parametrize(
    "changes",
    [{}, {"n_kv_heads": 2}, {"weight_tying": True}, {"n_layers": 1, "n_heads": 2, "n_kv_heads": 1}],
)
def test_logits_of_packed_rows_equal_the_dense_oracle(changes):
    config = small_config(**changes)
    weights = random_weights(config)
    sequences = sequences_of(config, [1, 7, 30, 12])
    logits, layout = packed_logits(load(config, weights), sequences)
    oracle = Dense(config, weights)
    for n, rows in enumerate(sequences):
        want = oracle.logits(oracle.embed(torch.from_numpy(rows.tokens)))[rows.logit_positions]
        start = layout.logit_starts[n]
        got = logits[start : start + len(rows.logit_positions)]
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_the_attention_is_whose_the_server_says(monkeypatch):
    """Forward and backward; what the device lacks is an error at the start."""
    config = small_config()
    model = load(config, random_weights(config))
    layout = pack(sequences_of(config, [7, 12], keep="masked"), torch.device("cpu"))
    hidden, saved = model.run(model.embed(layout.tokens), layout)
    gradient = model.backward(torch.ones_like(saved.final_AD), saved, None)
    used = []
    load_impl = attention.api._load
    monkeypatch.setattr(
        attention.api, "_load", lambda name, device: used.append(name) or load_impl(name, device)
    )
    model.use_attention("reference")
    again, saved = model.run(model.embed(layout.tokens), layout)
    torch.testing.assert_close(again, hidden, atol=1e-5, rtol=0)
    found = model.backward(torch.ones_like(saved.final_AD), saved, None)
    torch.testing.assert_close(found, gradient, atol=1e-4, rtol=1e-4)
    assert used == ["reference"] * 2 * config.n_layers
    with pytest.raises(ValueError, match="impl='xformers': expected cuda tensors, got cpu"):
        model.use_attention("xformers")


def test_bfloat16_stays_near_the_float64_oracle():
    config = small_config()
    weights = random_weights(config, dtype=torch.float64)
    sequences = sequences_of(config, [9])
    logits, _ = packed_logits(load(config, weights, torch.bfloat16), sequences)
    oracle = Dense(config, weights)
    tokens = torch.from_numpy(sequences[0].tokens)
    want = oracle.logits(oracle.embed(tokens))[sequences[0].logit_positions]
    # bfloat16 has 8 significant bits; a few roundings per layer add up to a few percent.
    assert (logits.double() - want).abs().max() < 0.05 * want.abs().max()


@pytest.mark.parametrize("width", [64, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_sequence_has_the_same_bits_alone_and_in_any_batch(dtype, width):
    sizes = {"d_model": width, "mlp_hidden_size": 3 * width}
    config = small_config(**sizes, vocab_size=250, embedding_size=256)
    model = load(config, random_weights(config), dtype)
    sequences = sequences_of(config, [5, 64, 1, 33, 100, 2, 17], keep="masked")
    together, layout = packed_logits(model, sequences)
    for n, rows in enumerate(sequences):
        alone, _ = packed_logits(model, [rows])
        start = layout.logit_starts[n]
        assert torch.equal(together[start : start + len(alone)], alone)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_cuda_too_a_sequence_has_the_same_bits_alone_and_in_a_batch(dtype):
    sizes = {"d_model": 512, "n_heads": 8, "n_kv_heads": 2, "mlp_hidden_size": 1536}
    config = small_config(**sizes, vocab_size=250, embedding_size=256)
    weights = random_weights(config)
    model = load(config, weights, dtype).cuda()
    sequences = sequences_of(config, [5, 64, 1, 33, 700, 2, 17], keep="masked")
    together, layout = packed_logits(model, sequences, "cuda")
    assert together.dtype == torch.float32
    for n, rows in enumerate(sequences):
        alone, _ = packed_logits(model, [rows], "cuda")
        start = layout.logit_starts[n]
        assert torch.equal(together[start : start + len(alone)], alone)
    on_cpu, _ = packed_logits(load(config, weights), sequences)
    assert (together.cpu() - on_cpu).abs().max() < 0.05 * on_cpu.abs().max()


def test_a_neighbour_leaks_nothing():
    config = small_config()
    model = load(config, random_weights(config))
    first, second = sequences_of(config, [11, 13])
    before, _ = packed_logits(model, [first, second])
    changed = SequenceRows(tokens=(second.tokens + 1) % 20, logit_positions=second.logit_positions)
    after, _ = packed_logits(model, [first, changed])
    rows = len(first.logit_positions)
    assert torch.equal(before[:rows], after[:rows])
    assert not torch.equal(before[rows:], after[rows:])


def test_a_missing_tensor_is_named():
    config = small_config()
    weights = random_weights(config)
    del weights["model.transformer.blocks.1.up_proj.weight"]
    with pytest.raises(ValueError, match=r"missing 1 tensor.*blocks\.1\.up_proj\.weight"):
        random_model(config).load_weights(weights.items())


def test_an_unexpected_tensor_is_named():
    config = small_config()
    weights = random_weights(config) | {"model.transformer.blocks.9.q_proj.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"unexpected tensor '.*blocks\.9\.q_proj\.weight'"):
        random_model(config).load_weights(weights.items())


def test_a_tensor_of_the_wrong_shape_is_named():
    config = small_config()
    weights = random_weights(config)
    weights["model.transformer.ln_f.weight"] = torch.ones(5)
    with pytest.raises(
        ValueError, match=r"tensor 'model\.transformer\.ln_f\.weight'.*does not fit"
    ):
        random_model(config).load_weights(weights.items())
