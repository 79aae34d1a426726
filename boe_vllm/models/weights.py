"""Official LLaDA tensor names and the parameters that they go to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

if TYPE_CHECKING:
    from boe_vllm.models.decoder import LLaDAForDiffusion

PREFIX = "model.transformer."

# LLaDA's name within a block -> (our parameter, shard within a merged parameter).
_BLOCK_TENSORS: dict[str, tuple[str, str | int | None]] = {
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


def expected_tensors(
    n_layers: int, *, weight_tying: bool
) -> dict[str, tuple[str, str | int | None]]:
    """Every tensor that a checkpoint must have -> (parameter, shard)."""
    table: dict[str, tuple[str, str | int | None]] = {
        f"{PREFIX}wte.weight": ("wte.weight", None),
        f"{PREFIX}ln_f.weight": ("ln_f", None),
    }
    if not weight_tying:
        table[f"{PREFIX}ff_out.weight"] = ("head.weight", None)
    for layer in range(n_layers):
        for name, (parameter, shard) in _BLOCK_TENSORS.items():
            key = f"{PREFIX}blocks.{layer}.{name}.weight"
            table[key] = (f"blocks.{layer}.{parameter}", shard)
    return table


def load(model: LLaDAForDiffusion, tensors: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
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
        target, shard = expected[name]
        parameter = parameters[target]
        loader = getattr(parameter, "weight_loader", default_weight_loader)
        try:
            if shard is None:
                loader(parameter, tensor)
            else:
                loader(parameter, tensor, shard)
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
