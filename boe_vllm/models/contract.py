"""What decoding and steering ask of a network; whatever offers it can be decoded and steered.

`decoder.Decoder` is one. Rows come in any order (`models.rows`), so that positions must travel with
them. Gradients are of inputs only, and a backward is explicit: it runs under inference mode.

Legend: `N` any rows, `T` packed live rows, `A` packed saved rows, `R` packed logit rows, `S` packed
rows of keys and values, `D` width, `H`/`G` heads of queries/keys on this rank, `P` head size, `V`
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from boe_vllm.models.functional import Scratch
from boe_vllm.models.names import CheckpointConfig
from boe_vllm.models.rows import RowLayout
from boe_vllm.models.saved import KeyValueContext, SavedPass

Tensor = torch.Tensor


class DenoisingBlock(Protocol):
    """One block, as far as partial passes go through it by themselves (`steering.hypothetical`)."""

    scale: float
    """Factor on the products of queries and keys."""

    def project(self, normed_ND: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
        """Rotated queries [N, H, P], rotated keys and values [N, G, P], and what is of no interest
        here, of normed rows."""
        ...

    def attend(self, x_ND: Tensor, mixed_NHP: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream after attention, and its norm for the MLP, [N, D] each."""
        ...

    def feed(self, x_ND: Tensor, normed_ND: Tensor, then: Any) -> tuple[Tensor, Tensor | None, Any]:
        """The residual stream after the MLP; its norm as the next block wants it, if `then`, of
        `DenoisingNetwork.norm_after`, is given; and what is of no interest here."""
        ...


class DenoisingNetwork(Protocol):
    """A network that predicts every masked position of a sequence."""

    config: CheckpointConfig
    vocab_size: int
    shift: int
    """Where the logits of a position are read: at the row of the position so many before it, 0 or
    1. Layouts know (`SequenceRows.shift`); the network itself does not look at it."""

    @property
    def layers(self) -> Sequence[DenoisingBlock]:
        """The blocks, first to last."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """The weights."""
        ...

    def embed(self, tokens_N: Tensor) -> Tensor:
        """Token embeddings, [N, D]."""
        ...

    def run(
        self,
        x_TD: Tensor,
        layout: RowLayout,
        context: KeyValueContext | None = None,
        memory: Scratch | None = None,
    ) -> tuple[Tensor, SavedPass | None]:
        """Final normalised hidden states of the logit rows, [R, D], and what the backward needs of
        the saved rows, if the layout has any.

        Args:
            x_TD: embeddings of the live rows.
            layout: where the rows lie.
            context: where stored keys and values come from, if the layout has any.
            memory: for what is gone with the next pass given it.
        """
        ...

    def backward(
        self,
        dhidden_AD: Tensor,
        saved: SavedPass,
        active_A11: Tensor | None,
        observe: Callable[[int, Tensor, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """Gradient of the saved rows' embeddings, [A, D], given that of their final hidden states.

        Args:
            dhidden_AD: gradient of the normalised final states; zero for rows without an objective.
            saved: what the pass left behind.
            active_A11: 1 for rows whose attention passes a gradient, else 0 (eq. 30); None for all.
            observe: called with (layer, dO, dK, dV) for every layer, last one first: gradients of
                the saved rows' attention outputs [A, H, P], keys and values [A, G, P].
        """
        ...

    def norm_first(self, x_ND: Tensor) -> Tensor:
        """What the first block projects of the embeddings, [N, D]."""
        ...

    def norm_after(self, layer: int) -> Any:
        """What tells a block's `feed` the norm that the next block begins with; None at the end."""
        ...

    def norm_last(self, x_ND: Tensor) -> Tensor:
        """What the vocabulary's product takes of the last block's output, [N, D]."""
        ...

    def logits(self, hidden_RD: Tensor, scratch: Scratch | None = None) -> Tensor:
        """Logits [R, V] of final normalised hidden states: linear in them, up to a constant."""
        ...

    def logits_backward(self, dlogits_RV: Tensor) -> Tensor:
        """Gradient of `logits` with respect to the hidden states, [R, D]."""
        ...

    def soft_embed(self, probabilities_RV: Tensor) -> Tensor:
        """Expected embedding `E^T pi` (eq. 10), [R, D]."""
        ...

    def cache_shape(self) -> dict[str, int]:
        """`layers`, `heads` of keys on this rank and `head_size`, for a pool of keys and values."""
        ...

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """The sum of what every tensor-parallel rank has for its own heads."""
        ...

    def use_attention(self, impl: str) -> None:
        """Let the named implementation compute the attention.

        Raises:
            ValueError: when it is unknown, or does not take the weights' device or dtype.
        """
        ...
