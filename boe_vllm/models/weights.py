"""A checkpoint's tensors, by their names, into the network's parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch

from boe_vllm.models.experts import Experts
from boe_vllm.models.layers import Matrix, copy_exactly
from boe_vllm.models.names import Place

if TYPE_CHECKING:
    from boe_vllm.models.decoder import Decoder

Tensor = torch.Tensor


def load(model: Decoder, tensors: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Copy the tensors into the model's parameters; returns the parameters' names.

    A checkpoint of tied weights may store the output matrix again, if it is the embeddings.

    Raises:
        ValueError: for a missing or an unexpected tensor, one of the wrong shape, or an output
            matrix that is not tied where the config says so; by name.
    """
    names, shape = model.config.names, model.shape
    expected = names.expected(shape)
    again = {f"{names.head}.weight", f"{names.embedding}.weight"} if shape.tied else set()
    twice: dict[str, Tensor] = {}
    missing, loaded = set(expected), set()
    for name, tensor in names.prepare(tensors, shape):
        if name in again:
            twice[name] = tensor
            if name not in expected:
                continue
        if name not in expected:
            raise ValueError(
                f"checkpoint: unexpected tensor {name!r} of shape {tuple(tensor.shape)}; expected "
                f"{names.family}'s names for {shape.layers} layers (tied={shape.tied}, "
                f"qkv_bias={shape.qkv_bias}, head_norm={shape.head_norm}, "
                f"experts={shape.experts.count if shape.experts else 0}); check config.json "
                f"against the checkpoint"
            )
        loaded.update(_copy(model, name, tensor, expected[name]))
        missing.discard(name)
    if missing:
        raise ValueError(
            f"checkpoint: missing {len(missing)} tensor(s): {', '.join(sorted(missing)[:8])}; "
            f"expected {names.family}'s official names; download the checkpoint again or check "
            f"config.json"
        )
    if len(twice) == 2 and not torch.equal(*twice.values()):
        raise ValueError(
            f"checkpoint: expected {names.head}.weight to be {names.embedding}.weight, since "
            f"config.json says that they are tied, got another matrix; correct config.json"
        )
    if shape.tied:
        loaded.add("head.weight")
    return loaded


def _copy(model: Decoder, name: str, tensor: Tensor, place: Place) -> list[str]:
    """Copy one tensor to its place; the names of the parameters that it belongs to."""
    target, part = place
    owner, _, leaf = target.rpartition(".")
    try:
        if isinstance(part, tuple):
            cast(Experts, model.get_submodule(target)).load(tensor, *part)
            return [f"{target}.gate_up", f"{target}.down"]
        if leaf in ("weight", "bias"):
            cast(Matrix, model.get_submodule(owner)).load(tensor, part, leaf)
        else:
            copy_exactly(model.get_parameter(target).data, tensor)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"checkpoint: tensor {name!r} of shape {tuple(tensor.shape)} does not fit the "
            f"sizes in config.json ({error or 'shape mismatch'}); check config.json"
        ) from error
    return [target]
