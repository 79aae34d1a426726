"""What a pass leaves behind for its backward, and where it finds keys and values.

Legend: `T` packed live rows, `A` packed saved rows, `S` packed rows of keys and values, `D` width,
`H`/`G` heads of queries/keys, `X` both, `P` head size.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch

from boe_vllm.models.rows import RowLayout

Tensor = torch.Tensor


@dataclasses.dataclass(slots=True)
class SavedLayer:
    """What one block's backward needs of the saved rows, and all rows' keys and values."""

    before_AD: Tensor
    after_attention_AD: Tensor
    queries_AHP: Tensor
    mlp: Any
    """What the block's MLP keeps for its own backward."""
    keys_SGP: Tensor
    values_SGP: Tensor
    heads_AXP: Tensor | None = None
    """Queries and keys before the norm of their heads, where they have one."""


@dataclasses.dataclass(slots=True)
class SavedPass:
    """What the backward of one pass needs, layer by layer."""

    layout: RowLayout
    rotary_2A1p: Tensor
    layers: list[SavedLayer]
    final_AD: Tensor | None = None


class KeyValueContext(Protocol):
    """Where a pass finds keys and values beside its live rows' own."""

    def merge(self, layer: int, keys_TGP: Tensor, values_TGP: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all rows, [S, G, P] each, given those of the live rows."""
        ...
