"""The bidirectional decoder on packed rows, with a backward that only the saved rows pass through.

Attention is bidirectional, so a pass works on a `RowLayout`: any rows of any sequences. Saved rows
leave behind what the backward needs; the other rows leave only their keys and values. The backward
is explicit: no autograd graph, no weight gradients, and it runs under inference mode.

Legend: `N` any rows, `T` packed live rows, `A` packed saved rows, `R` packed logit rows, `S` packed
rows of keys and values, `D` width, `H`/`G` heads of queries/keys on this rank, `P` head size,
`V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from boe_vllm.attention import attention_forward
from boe_vllm.attention.api import resolve
from boe_vllm.models import weights
from boe_vllm.models.block import Block
from boe_vllm.models.functional import Scratch, norm_of, rotary_tables
from boe_vllm.models.layers import Layers, Vocabulary
from boe_vllm.models.names import CheckpointConfig
from boe_vllm.models.products import matmul_rows
from boe_vllm.models.rows import RowLayout
from boe_vllm.models.saved import KeyValueContext, SavedLayer, SavedPass

Tensor = torch.Tensor


class Decoder(nn.Module):
    """The network of every family; `DecoderShape` has its switches. It is a
    `contract.DenoisingNetwork`."""

    def __init__(self, config: CheckpointConfig, layers: Layers) -> None:
        """Weights that are yet to be loaded, in torch's default dtype and on its default device.

        Args:
            config: the checkpoint's.
            layers: makes the weights and knows the ranks.
        """
        super().__init__()
        shape = config.shape()
        self.config, self.shape = config, shape
        self.vocab_size = shape.vocab_size
        self.shift: int = shape.shift
        self.wte = layers.embedding(shape.embedding_rows, shape.width)
        self.blocks = nn.ModuleList(Block(shape, layers) for _ in range(shape.layers))
        self.norm = norm_of(shape)
        self.ln_f = nn.Parameter(torch.ones(shape.width), requires_grad=False)
        tied_to = self.wte if shape.tied else None
        self.head = layers.head(shape.embedding_rows, shape.width, tied_to)
        self.head_bias: nn.Parameter | None = None
        if shape.modulated:
            self.head_bias = nn.Parameter(torch.zeros(shape.vocab_size), requires_grad=False)
        self.scratch = Scratch()
        self._ranks = layers

    @property
    def layers(self) -> list[Block]:
        """The blocks, first to last."""
        return cast(list[Block], list(self.blocks))

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """The sum of what every tensor-parallel rank has for its own heads."""
        return x if self._ranks.ranks == 1 else self._ranks.sum_over_ranks(x)

    def use_attention(self, impl: str) -> None:
        """Let the named implementation compute the attention.

        Raises:
            ValueError: when it is unknown, or does not take the weights' device or dtype.
        """
        weight = self.ln_f
        resolve(impl, weight.device.type, weight.dtype, self.layers[0].head_size)
        for block in self.layers:
            block.attention_impl = impl

    # ---- the pass ------------------------------------------------------------------------------

    def norm_first(self, x_ND: Tensor) -> Tensor:
        """What the first block projects of the embeddings, [N, D]."""
        return self.norm.run(x_ND, self.layers[0].attn_norm)

    def norm_after(self, layer: int) -> Tensor | None:
        """[D] the weight of the norm that the block after this one begins with, if there is one."""
        return self.layers[layer + 1].attn_norm if layer + 1 < len(self.blocks) else None

    def norm_last(self, x_ND: Tensor) -> Tensor:
        """What the vocabulary's product takes of the last block's output, [N, D]."""
        return self.norm.run(x_ND, self.ln_f)

    def embed(self, tokens_N: Tensor) -> Tensor:
        """Token embeddings, [N, D]."""
        return self.wte(tokens_N)

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
            memory: for the keys and values of a pass with saved rows, which are gone with the next
                pass given it; without it, or on CUDA, they are allocated.
        """
        block = self.layers[0]
        rotary = rotary_tables(
            layout.positions,
            block.head_size,
            self.shape.rope_theta,
            x_TD.dtype,
            self.shape.rope_stretch,
        )
        normed: Tensor | None = self.norm_first(x_TD)
        keep = any(layout.saved_lens)
        index_A = layout.saved_index
        saved = SavedPass(layout, rotary.index_select(1, index_A), []) if keep else None
        places: list[tuple[Tensor, Tensor] | None] = [None] * len(self.blocks)
        if keep and memory and x_TD.device.type == "cpu":
            places = [*self._key_value_memory(x_TD, memory)]
        for index, block in enumerate(self.layers):
            assert normed is not None
            q, k, v, heads = block.project(
                normed, rotary, self.scratch, places[index], index_A if keep else None
            )
            if context is not None:
                k, v = context.merge(index, k, v)
            impl = block.attention_impl
            mixed = attention_forward(
                q, k, v, layout=layout.attention, scale=block.scale, impl=impl
            )
            after, normed = block.attend(x_TD, mixed)
            out, normed, mlp = block.feed(
                after, normed, self.norm_after(index), index_A if keep else None, self.scratch
            )
            if saved is not None:
                before, after, q = (x.index_select(0, index_A) for x in (x_TD, after, q))
                saved.layers.append(SavedLayer(before, after, q, mlp, k, v, heads))
            x_TD = out
        if saved is not None:
            saved.final_AD = x_TD.index_select(0, index_A)
        return self.norm_last(x_TD[layout.logit_index]), saved

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
                the saved rows' attention outputs [A, H, P] (zero where they pass none), and of
                their keys and values [A, G, P].
        """
        assert saved.final_AD is not None
        dx = self.norm.backward(dhidden_AD, saved.final_AD, self.ln_f)
        for index in reversed(range(len(self.blocks))):
            dx, dmixed, dk, dv = self.layers[index].backward(
                dx, saved.layers[index], saved.layout, saved.rotary_2A1p, active_A11
            )
            if observe is not None:
                observe(index, dmixed, dk, dv)
        return dx

    def _key_value_memory(self, x_TD: Tensor, memory: Scratch) -> list[tuple[Tensor, Tensor]]:
        """Uninitialised keys and values of every layer, [T, G, P] each, one after another.

        They are megabytes per layer; taken from the heap they would push a step's temporaries to
        memory that is not in the processor's cache, or not mapped at all.
        """
        shape = self.cache_shape()
        layers, heads, size = shape["layers"], shape["heads"], shape["head_size"]
        flat = memory.like(x_TD, layers * 2 * heads * size)
        pairs = flat.view(layers, 2, len(x_TD), heads, size)
        return [(keys, values) for keys, values in pairs]

    def cache_shape(self) -> dict[str, int]:
        """Layers, key heads on this rank and head size, for a pool of keys and values."""
        block = self.layers[0]
        return dict(layers=len(self.blocks), heads=block.kv_heads, head_size=block.head_size)

    # ---- vocabulary ----------------------------------------------------------------------------

    def logits(self, hidden_RD: Tensor, scratch: Scratch | None = None) -> Tensor:
        """Logits [R, V] of normalised hidden states, on every rank; in `scratch` if it is given.

        In the dtype of the network; on CUDA in float32 where that is half precision.
        """
        logits = matmul_rows(hidden_RD, self.head.weight.t(), scratch, float32=True)
        if self._ranks.ranks > 1:
            logits = self._ranks.gather_columns(logits)
        logits = logits[:, : self.vocab_size]
        return logits if self.head_bias is None else logits.add_(self.head_bias)

    def logits_backward(self, dlogits_RV: Tensor) -> Tensor:
        """Gradient of `logits` with respect to the hidden states, [R, D]."""
        local = self._shard(dlogits_RV, self.head)
        return self.sum_over_ranks(matmul_rows(local, self.head.weight))

    def soft_embed(self, probabilities_RV: Tensor) -> Tensor:
        """Expected embedding `E^T pi` (eq. 10), [R, D]."""
        local = self._shard(probabilities_RV, self.wte)
        return self.sum_over_ranks(matmul_rows(local, self.wte.weight))

    def _shard(self, x_RV: Tensor, layer: Vocabulary) -> Tensor:
        """The columns of this rank, padded to the rows of the layer's weight."""
        rows, start = len(layer.weight), layer.first_row
        piece = x_RV[:, start : start + rows].to(layer.weight.dtype)
        missing = rows - piece.shape[1]
        return F.pad(piece, (0, missing)) if missing else piece

    # ---- weights -------------------------------------------------------------------------------

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint's tensors, by its family's names; returns our parameters' names.

        Raises:
            ValueError: naming every missing or unexpected tensor.
        """
        return weights.load(self, tensors)
