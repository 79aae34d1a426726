"""Official LLaDA tensor names and the parameters that they go to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch

from boe_vllm.models.layers import Matrix, Part, copy_exactly

if TYPE_CHECKING:
    from boe_vllm.models.decoder import Decoder

PREFIX = "model.transformer."

# LLaDA's name within a block -> (our parameter, part of a fused one).
_BLOCK_TENSORS: dict[str, tuple[str, Part]] = {
    "attn_norm": ("attn_norm", None),
    "q_proj": ("qkv_proj.weight", "q"),
    "k_proj": ("qkv_proj.weight", "k"),
    "v_proj": ("qkv_proj.weight", "v"),
    "attn_out": ("attn_out.weight", None),
    "ff_norm": ("ff_norm", None),
    "ff_proj": ("gate_up_proj.weight", 0),
    "up_proj": ("gate_up_proj.weight", 1),
    "ff_out": ("ff_out.weight", None),
}


def expected_tensors(n_layers: int, *, weight_tying: bool) -> dict[str, tuple[str, Part]]:
    """Every tensor that a checkpoint must have -> (parameter, part of a fused one)."""
    table: dict[str, tuple[str, Part]] = {
        f"{PREFIX}wte.weight": ("wte.weight", None),
        f"{PREFIX}ln_f.weight": ("ln_f", None),
    }
    if not weight_tying:
        table[f"{PREFIX}ff_out.weight"] = ("head.weight", None)
    for layer in range(n_layers):
        for name, (parameter, part) in _BLOCK_TENSORS.items():
            key = f"{PREFIX}blocks.{layer}.{name}.weight"
            table[key] = (f"blocks.{layer}.{parameter}", part)
    return table


def load(model: Decoder, tensors: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    """Copy the tensors into the model's parameters; returns the parameters' names.

    Raises:
        ValueError: for a missing or an unexpected tensor, or one of the wrong shape, by name.
    """
    config = model.config
    expected = expected_tensors(config.n_layers, weight_tying=config.weight_tying)
    parameters = dict(model.named_parameters())
    missing, loaded = set(expected), set()
    for name, tensor in tensors:
        if name not in expected:
            raise ValueError(
                f"checkpoint: unexpected tensor {name!r} of shape {tuple(tensor.shape)}; expected "
                f"LLaDA's names for {config.n_layers} layers (weight_tying={config.weight_tying}); "
                "check config.json against the checkpoint"
            )
        target, part = expected[name]
        owner, _, leaf = target.rpartition(".")
        try:
            if leaf == "weight":
                cast(Matrix, model.get_submodule(owner)).load(tensor, part)
            else:
                copy_exactly(parameters[target].data, tensor)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"checkpoint: tensor {name!r} of shape {tuple(tensor.shape)} does not fit the "
                f"sizes in config.json ({error or 'shape mismatch'}); check config.json"
            ) from error
        missing.discard(name)
        loaded.add(target)
    if missing:
        raise ValueError(
            f"checkpoint: missing {len(missing)} tensor(s): {', '.join(sorted(missing)[:8])}; "
            "expected LLaDA's official names; download the checkpoint again or check config.json"
        )
    if config.weight_tying:
        loaded.add("head.weight")
    return loaded
