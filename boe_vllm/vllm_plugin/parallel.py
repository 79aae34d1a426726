"""The network's layers made of vLLM's parallel ones, which split and load them for each rank.

Of vLLM's layers the network uses the weights and the embedding; it multiplies by itself, so that
rows do not depend on each other and the backward finds the weights as they were loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from boe_vllm.models.layers import Layers, Part

Tensor = torch.Tensor


class _Loaded:
    """What `models.weights` asks of every layer, by way of vLLM's own loaders."""

    def load(self, tensor: Tensor, part: Part = None, leaf: str = "weight") -> None:
        """Copy this rank's share of a checkpoint's tensor to its place."""
        place = getattr(self, leaf)
        place.weight_loader(place, tensor, *(() if part is None else (part,)))


class _QueryKeyValue(_Loaded, QKVParallelLinear):
    pass


class _Merged(_Loaded, MergedColumnParallelLinear):
    pass


class _Output(_Loaded, RowParallelLinear):
    pass


class _Vocabulary(_Loaded):
    shard_indices: Any

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__(tokens, width)  # type: ignore[call-arg]
        self.first_row: int = self.shard_indices.org_vocab_start_index


class _Embedding(_Vocabulary, VocabParallelEmbedding):
    pass


class _Head(_Vocabulary, ParallelLMHead):
    pass


class ParallelLayers(Layers):
    """`Layers` of vLLM's parallel layers, to be made within vLLM's model loader."""

    def __init__(self) -> None:
        self.rank = get_tensor_model_parallel_rank()
        self.ranks = get_tensor_model_parallel_world_size()

    def query_key_value(
        self, width: int, head_size: int, heads: int, kv_heads: int, *, bias: bool = False
    ) -> Any:
        """Heads are split; key heads are repeated where there are fewer than ranks."""
        return _frozen(_QueryKeyValue(width, head_size, heads, kv_heads, bias=bias))

    def merged(self, width: int, sizes: Sequence[int]) -> Any:
        """The columns of each part are split."""
        return _frozen(_Merged(width, list(sizes), bias=False))

    def output(self, inner: int, width: int) -> Any:
        """The inner width is split."""
        return _frozen(_Output(inner, width, bias=False))

    def embedding(self, tokens: int, width: int) -> Any:
        """Tokens are split."""
        return _frozen(_Embedding(tokens, width))

    def head(self, tokens: int, width: int, tied_to: Any = None) -> Any:
        """Tokens are split."""
        head = _frozen(_Head(tokens, width))
        return head if tied_to is None else head.tie_weights(tied_to)

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """An all-reduce."""
        return tensor_model_parallel_all_reduce(x)

    def gather_columns(self, x_NE: Tensor) -> Tensor:
        """An all-gather."""
        return tensor_model_parallel_all_gather(x_NE)


class _FrozenLinearMethod(UnquantizedLinearMethod):
    """vLLM's unquantised linear method, keeping the weight as it is for the backward."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Keep the weight: vLLM's CPU path packs it away and drops the original."""


class _FrozenEmbeddingMethod(UnquantizedEmbeddingMethod):
    """As `_FrozenLinearMethod`, for embeddings and the output matrix."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Keep the weight."""


def _frozen(layer: Any) -> Any:
    """The layer, with its weight left as it was loaded."""
    vocabulary = isinstance(layer, VocabParallelEmbedding)
    layer.quant_method = _FrozenEmbeddingMethod() if vocabulary else _FrozenLinearMethod()
    return layer
