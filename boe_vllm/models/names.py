"""The names that families give their tensors, and what the network asks of a checkpoint's config.

Legend: `{n}` number of a block, `{e}` number of an expert.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol

import torch

from boe_vllm.models.shape import DecoderShape

Tensor = torch.Tensor

Place = tuple[str, Any]
"""A parameter of the network, and the part of a fused one (`layers.Part`, or an expert's)."""

# Our parameter within a block, and the part of a fused one, by what a tensor is for.
_BLOCK: dict[str, Place] = {
    "attention_norm": ("attn_norm", None),
    "q": ("qkv_proj", "q"),
    "k": ("qkv_proj", "k"),
    "v": ("qkv_proj", "v"),
    "attention_out": ("attn_out", None),
    "mlp_norm": ("ff_norm", None),
}
_HEAD_NORMS: dict[str, Place] = {"q_norm": ("q_norm", None), "k_norm": ("k_norm", None)}
_DENSE: dict[str, Place] = {
    "gate": ("mlp.gate_up_proj", 0),
    "up": ("mlp.gate_up_proj", 1),
    "down": ("mlp.ff_out", None),
}
_ROUTED: dict[str, Place] = {"router": ("mlp.router", None)}
_EXPERT_BIAS: dict[str, Place] = {"expert_bias": ("mlp.expert_bias", None)}


class CheckpointConfig(Protocol):
    """What the network and decoding ask of a checkpoint's `config.json`."""

    names: ClassVar[TensorNames]
    shift: ClassVar[Any]
    vocab_size: int
    max_position_embeddings: int
    mask_token_id: Any
    eos_token_id: Any
    eot_token_id: Any
    dtype: Any

    def shape(self) -> DecoderShape:
        """The network's sizes and switches."""
        ...

    def check_supported(self) -> None:
        """Raise ValueError if the network would not compute what this config describes."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TensorNames:
    """A family's names, without the ".weight" that most of them end with."""

    family: str
    """For messages."""
    embedding: str
    final_norm: str
    head: str
    block: str
    """What the names within block `{n}` begin with."""
    within: Mapping[str, str]
    """What a tensor of a block is for -> its name there."""
    experts: str = ""
    """What the names of expert `{e}` of a block begin with; its parts are named as the MLP's."""

    def expected(self, shape: DecoderShape) -> dict[str, Place]:
        """Every tensor that a checkpoint must have -> where it goes."""
        table: dict[str, Place] = {
            f"{self.embedding}.weight": ("wte.weight", None),
            f"{self.final_norm}.weight": ("ln_f", None),
        }
        if not shape.tied:
            table[f"{self.head}.weight"] = ("head.weight", None)
        for n in range(shape.layers):
            table |= self._of_block(self.block.format(n=n), f"blocks.{n}.", shape)
        return table

    def prepare(
        self, tensors: Iterable[tuple[str, Tensor]], shape: DecoderShape
    ) -> Iterable[tuple[str, Tensor]]:
        """The tensors under the names of `expected`, which they have in most families."""
        return tensors

    def _of_block(self, prefix: str, ours: str, shape: DecoderShape) -> dict[str, Place]:
        table: dict[str, Place] = {}
        for use, (owner, part) in _parts(shape).items():
            name, leaf = prefix + self.within[use], _leaf(owner)
            stored = name if use == "expert_bias" else f"{name}.weight"
            table[stored] = (f"{ours}{owner}{leaf}", part)
            if shape.qkv_bias and use in ("q", "k", "v"):
                table[f"{name}.bias"] = (f"{ours}{owner}.bias", part)
        if shape.experts is not None:
            for e in range(shape.experts.count):
                for use in _DENSE:
                    name = prefix + self.experts.format(e=e) + use
                    table[f"{name}_proj.weight"] = (f"{ours}mlp.experts", (use, e))
        return table


def _parts(shape: DecoderShape) -> dict[str, Place]:
    parts = _BLOCK | (_HEAD_NORMS if shape.head_norm else {})
    if shape.experts is None:
        return parts | _DENSE
    return parts | _ROUTED | (_EXPERT_BIAS if shape.experts.biased else {})


def _leaf(owner: str) -> str:
    """Matrices are modules with a weight; the others are parameters themselves."""
    return ".weight" if owner.endswith(("proj", "out")) else ""
