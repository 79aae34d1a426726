"""The weights that a benchmark runs on: random ones of chosen sizes, or a checkpoint's."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from boe_vllm.lab.bench.common import DTYPES, UsageError
from boe_vllm.models import build
from boe_vllm.models.decoder import Decoder
from boe_vllm.models.llada import PREFIX, LLaDAConfig

Tensors = dict[str, torch.Tensor]


def read_config(args: argparse.Namespace) -> LLaDAConfig:
    """The checkpoint's config, or that of the random model that the options describe."""
    if args.model is not None:
        try:
            return read_llada(args.model)
        except ValueError as error:
            raise UsageError(f"--model: {error}") from error
    if args.vocab < 8:
        raise UsageError(f"--vocab: expected at least 8, got {args.vocab}")
    return LLaDAConfig(
        architectures=["LLaDAModelLM"],
        d_model=args.d_model,
        n_layers=args.layers,
        n_heads=args.heads,
        mlp_hidden_size=args.mlp or 4 * args.d_model,
        vocab_size=args.vocab,
        mask_token_id=args.vocab - 1,
        eos_token_id=args.vocab - 2,
        pad_token_id=args.vocab - 2,
        max_sequence_length=16384,
    )


def read_llada(folder: str | Path) -> LLaDAConfig:
    """A checkpoint's config, of the family that is measured.

    Raises:
        ValueError: for another family.
    """
    config = build.read_config(folder)
    if not isinstance(config, LLaDAConfig):
        raise ValueError(
            f"expected a checkpoint of LLaDA's architecture, got {type(config).__name__}; the "
            f"measurements know no other"
        )
    return config


def read_tensors(args: argparse.Namespace, config: LLaDAConfig) -> Tensors:
    """All weights by LLaDA's official names, in the benchmark's dtype."""
    dtype = DTYPES[args.dtype]
    if args.model is None:
        return {name: x.to(dtype) for name, x in _random_tensors(config, args.seed)}
    try:
        return {name: x.to(dtype) for name, x in build.read_tensors(args.model)}
    except ValueError as error:
        raise UsageError(f"--model: {error}") from error


def load_model(args: argparse.Namespace, config: LLaDAConfig, tensors: Tensors) -> Decoder:
    """Our network with these weights, outside an engine."""
    model = build.empty_model(config, dtype=DTYPES[args.dtype], device=args.device)
    model.load_weights(tensors.items())
    return model


def write_checkpoint(config: LLaDAConfig, tensors: Tensors, folder: str | Path) -> None:
    """A folder that vLLM can open."""
    folder = Path(folder)
    save_file(tensors, folder / "model.safetensors")
    fields = config.to_dict() | {"architectures": ["LLaDAModelLM"]}
    fields["torch_dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(fields, default=str))


def _random_tensors(config: LLaDAConfig, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Normal weights with a standard deviation of one over the root of their input width."""
    assert config.n_kv_heads and config.mlp_hidden_size and config.embedding_size
    generator = torch.Generator().manual_seed(seed)
    width, inner = config.d_model, config.mlp_hidden_size
    kv = width // config.n_heads * config.n_kv_heads

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn((rows, columns), generator=generator) * columns**-0.5

    yield f"{PREFIX}wte.weight", matrix(config.embedding_size, width)
    yield f"{PREFIX}ln_f.weight", torch.ones(width)
    yield f"{PREFIX}ff_out.weight", matrix(config.embedding_size, width)
    sizes = {
        "q_proj": (width, width),
        "k_proj": (kv, width),
        "v_proj": (kv, width),
        "attn_out": (width, width),
        "ff_proj": (inner, width),
        "up_proj": (inner, width),
        "ff_out": (width, inner),
    }
    for layer in range(config.n_layers):
        block = f"{PREFIX}blocks.{layer}"
        for norm in ("attn_norm", "ff_norm"):
            yield f"{block}.{norm}.weight", torch.ones(width)
        for name, (rows, columns) in sizes.items():
            yield f"{block}.{name}.weight", matrix(rows, columns)
