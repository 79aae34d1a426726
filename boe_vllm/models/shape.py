"""What tells one checkpoint's decoder from another's: its sizes and its switches."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsShape:
    """The experts of a routed MLP."""

    count: int
    """Experts of a layer."""
    chosen: int
    """Experts that see a row."""
    inner: int
    """Inner width of each."""
    biased: bool = False
    """Whether a constant is added to each expert's probability before the choice."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RopeStretch:
    """Llama 3.1's scaling of the rotary embedding: long wavelengths are `factor` times as long,
    short ones are as they were, and those between go over (transformers'
    `_compute_llama3_parameters`)."""

    factor: float
    low: float
    """Wavelengths above `context / low` positions are long."""
    high: float
    """Wavelengths below `context / high` positions are short."""
    context: float
    """Positions that the model was first trained on."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DecoderShape:
    """Sizes of the bidirectional pre-norm decoder, and the switches of its families."""

    vocab_size: int
    """Tokens."""
    embedding_rows: int
    """Rows of the embedding and of the output matrix."""
    width: int
    """Of the residual stream."""
    layers: int
    """Blocks."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key/value heads."""
    head_size: int
    """Width of a head."""
    inner: int
    """Inner width of a dense MLP."""
    eps: float
    """Added to the mean square in every norm."""
    rope_theta: float
    """Base of the rotary embedding."""
    rope_stretch: RopeStretch | None = None
    """How its angles are scaled."""
    qkv_bias: bool = False
    """Biases on the projections to queries, keys and values."""
    head_norm: bool = False
    """An RMSNorm on each head of the queries and of the keys, before the rotation."""
    tied: bool = False
    """The output matrix is the embedding matrix."""
    experts: ExpertsShape | None = None
    """Routed MLPs in the place of dense ones."""
    modulated: bool = False
    """MDLM's network, with its modulation folded in: LayerNorm in the place of RMSNorm, a GELU MLP
    with biases in that of SwiGLU, and a bias on the logits."""
    shift: Literal[0, 1] = 0
    """Rows by which a position's prediction lies before it (`models.rows`)."""
