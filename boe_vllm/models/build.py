"""Networks outside an engine: random ones of chosen sizes, and a checkpoint's, on one device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoTokenizer, PretrainedConfig

from boe_vllm.models.decoder import Decoder
from boe_vllm.models.families import config_class, config_classes, tell_transformers
from boe_vllm.models.layers import Layers
from boe_vllm.models.names import CheckpointConfig

Tensor = torch.Tensor


def random_model(
    config: CheckpointConfig,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    scale: float | None = None,
) -> Decoder:
    """A network with seeded normal weights.

    Args:
        config: sizes.
        dtype: of all weights.
        device: where it lives; a seed gives other weights on another device.
        seed: of the weights.
        scale: standard deviation of the matrices; default 1/sqrt of their input width.
    """
    model = empty_model(config, dtype=dtype, device=device)
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith(".bias"):
            std = scale or parameter.shape[-1] ** -0.5
            parameter.data.normal_(0.0, std, generator=generator)
    return model


def load_model(
    folder: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Decoder:
    """The network of a checkpoint, read tensor by tensor.

    Args:
        folder: with `config.json` and `*.safetensors`.
        dtype: of all weights; default: the one that the config names, else that of the first
            stored tensor.
        device: where the network lives.

    Raises:
        ValueError: for a folder without these files, a model or a variant of it that is not
            supported, or tensors that do not fit the config.
    """
    config = read_config(folder)
    if dtype is None:
        stored = config.dtype or next(read_tensors(folder))[1].dtype
        dtype = getattr(torch, stored) if isinstance(stored, str) else stored
    model = empty_model(config, dtype=dtype, device=device)
    model.load_weights(read_tensors(folder))
    return model


def empty_model(
    config: CheckpointConfig, *, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> Decoder:
    """A network whose weights are yet to be loaded: whatever lay in its memory.

    Args:
        config: sizes.
        dtype: of all weights.
        device: where it lives.
    """
    with torch.device(device), _default_dtype(dtype):
        return Decoder(config, Layers()).eval()


def read_config(folder: str | Path) -> CheckpointConfig:
    """A checkpoint's `config.json`.

    Raises:
        ValueError: for a folder without one, or a model or a variant of it that is not supported.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"checkpoint: expected a folder with a config.json, got {str(folder)!r}; "
            "name a folder on this machine"
        )
    said = PretrainedConfig.get_config_dict(str(folder))[0]
    kind = said.get("model_type")
    by_type = [known.architecture for known in config_classes() if known.model_type == kind]
    named = said.get("architectures") or by_type or [f"none, of model_type {kind}"]
    return config_class(named[0]).from_pretrained(str(folder))


def load_tokenizer(folder: str | Path, config: CheckpointConfig) -> Any:
    """Transformers' tokenizer for a checkpoint; no code of its repository is run.

    Args:
        folder: with the tokenizer's files.
        config: the checkpoint's.
    """
    tell_transformers()
    return AutoTokenizer.from_pretrained(str(folder), config=config, trust_remote_code=False)


def read_tensors(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's tensors by name, one at a time, on the CPU, in the dtype they are stored in.

    Raises:
        ValueError: for a folder without `*.safetensors`.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"checkpoint: expected *.safetensors in {str(folder)!r}, got none; name another folder"
        )
    for path in files:
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():
                yield name, opened.get_tensor(name)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
