"""What a step computes: floating-point operations of matrix products, two per multiply-add.

Norms, activations, softmax and statistics are not counted: the share of the machine's peak that a
step reaches is the share that goes into matrix products.

Legend: `A` kept rows, `C` candidates, `M` masked rows, `L` rows of a sequence.
"""

from __future__ import annotations

import dataclasses

from boe_vllm.models.llada import LLaDAConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepRows:
    """Rows of one request in one step."""

    live: int
    """Rows that are computed."""
    keys: int
    """Keys that they attend to, frozen ones included."""
    logits: int
    """Rows whose logits are computed."""
    kept: int = 0
    """Rows that the backward passes through."""
    second: int = 0
    """Rows of a further forward (candidates, or those of an injected state)."""
    candidates: int = 0
    """Soft writes."""
    second_logits: int = 0
    """Rows whose logits are computed a second time."""


class NetworkFlops:
    """Operations of a network of given sizes."""

    def __init__(self, config: LLaDAConfig) -> None:
        assert config.n_kv_heads is not None and config.mlp_hidden_size is not None
        width = config.d_model
        kv = width // config.n_heads * config.n_kv_heads
        weights = 2 * width * width + 2 * width * kv + 3 * width * config.mlp_hidden_size
        self.layers, self.width = config.n_layers, width
        self.row = 2 * weights * config.n_layers
        """One row through all projections and MLPs, forward or backward (inputs only)."""
        assert config.embedding_size is not None
        self.vocabulary = 2 * width * config.embedding_size
        """One row against the whole vocabulary."""

    def attention(self, queries: int, keys: int) -> int:
        """Forward of attention in all layers."""
        return 4 * queries * keys * self.width * self.layers

    def attention_backward(self, active: int, keys: int) -> int:
        """Three products of active rows and keys and two among active rows, in all layers."""
        return 2 * (3 * active * keys + 2 * active * active) * self.width * self.layers

    def step(self, rows: StepRows) -> int:
        """One request's step."""
        forward = rows.live * self.row + self.attention(rows.live, rows.keys)
        forward += rows.logits * self.vocabulary
        if not rows.kept:
            return forward
        steering = rows.kept * self.row + self.attention_backward(rows.kept, rows.keys)
        steering += rows.second * self.row + self.attention(rows.second, rows.keys)
        # Soft writes, logits of the second state, gradient of the entropies at the hidden states.
        vocabulary = rows.candidates + rows.second_logits + rows.logits
        return forward + steering + vocabulary * self.vocabulary

    def full_logits(self, batch: int, length: int) -> int:
        """A padded batch with the logits of every row."""
        per_sequence = length * (self.row + self.vocabulary) + self.attention(length, length)
        return batch * per_sequence
