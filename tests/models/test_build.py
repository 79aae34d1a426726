"""A network outside an engine: seeded, or a checkpoint's in the dtype that it names; no vLLM."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import random_weights, small_config
from safetensors.torch import save_file

import boe_vllm
from boe_vllm.models.build import empty_model, load_model, random_model, read_tensors
from boe_vllm.models.layers import VOCABULARY_MULTIPLE, Layers


def write(folder, weights, **changes):
    """A checkpoint's folder, in two files as large ones are."""
    names = sorted(weights)
    for number, some in enumerate((names[::2], names[1::2])):
        tensors = {name: weights[name] for name in some}
        save_file(tensors, folder / f"model-{number}.safetensors")
    fields = small_config().to_dict() | changes
    (folder / "config.json").write_text(json.dumps(fields, default=str))
    return folder


def test_a_checkpoint_is_read_as_it_is_stored(tmp_path):
    weights = random_weights(small_config())
    model = load_model(write(tmp_path, weights, torch_dtype="float32"))
    same = empty_model(small_config(), dtype=torch.float32)
    assert same.load_weights(weights.items()) == set(dict(model.named_parameters()))
    pairs = zip(model.named_parameters(), same.named_parameters(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    assert not any(x.requires_grad for x in model.parameters())


@pytest.mark.parametrize(
    ("named", "asked", "expected"),
    [
        ("bfloat16", None, torch.bfloat16),
        (None, None, torch.float64),
        ("bfloat16", torch.float32, torch.float32),
    ],
    ids=["the config's", "that of the tensors", "asked for"],
)
def test_the_dtype_is_the_one_asked_for_or_named_or_stored(tmp_path, named, asked, expected):
    weights = random_weights(small_config(), dtype=torch.float64)
    model = load_model(write(tmp_path, weights, torch_dtype=named, dtype=named), dtype=asked)
    assert {x.dtype for x in model.parameters()} == {expected}
    assert torch.get_default_dtype() == torch.float32


def test_seeds_and_scales_decide_the_random_weights():
    config = small_config()
    first, again, other = (random_model(config, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.wte.weight, again.wte.weight)
    assert not torch.equal(first.wte.weight, other.wte.weight)
    wide = random_model(small_config(d_model=512, n_heads=8, n_kv_heads=8), scale=0.02)
    deviations = [x.std().item() for x in wide.parameters() if x.ndim == 2]
    assert all(0.018 < deviation < 0.022 for deviation in deviations)


def test_the_vocabulary_is_padded_with_zeros():
    weights = random_weights(small_config())
    model = random_model(small_config())
    model.load_weights(weights.items())
    assert model.wte.weight.shape == (VOCABULARY_MULTIPLE, 24)
    assert torch.equal(model.wte.weight[:32], weights["model.transformer.wte.weight"])
    assert not model.wte.weight[32:].any() and not model.head.weight[32:].any()


@pytest.mark.parametrize("part, shape", [("q", (1, 6)), ("k", (4, 1)), ("v", (1,))])
def test_nothing_is_broadcast_into_a_part(part, shape):
    layer = Layers().query_key_value(6, 2, 4, 2)
    with pytest.raises(ValueError, match=r"expected shape \((8|4), 6\), got"):
        layer.load(torch.ones(shape), part)


def test_a_part_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="'x' is not in list"):
        Layers().query_key_value(6, 2, 4, 2).load(torch.ones(8, 6), "x")


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected a folder with a config\.json, got"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(small_config().to_dict(), default=str))
    with pytest.raises(ValueError, match=r"expected \*\.safetensors in .*, got none"):
        next(read_tensors(tmp_path))


def test_the_bundled_checkpoint_is_read_without_vllm():
    script = """
import sys
sys.modules["vllm"] = None
import boe_vllm
from boe_vllm.models.build import load_model
model = load_model(boe_vllm.tiny_model_path())
print(len(model.blocks), next(model.parameters()).dtype)
"""
    root = Path(boe_vllm.__file__).parents[1]
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, check=True, cwd=root, timeout=120, capture_output=True, text=True
    )
    assert done.stdout.split() == ["8", "torch.float32"]
