"""What our networks want of vLLM's parallel layers: weights that stay, and sums over the ranks."""

from __future__ import annotations

import torch
from torch import nn
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from boe_vllm.models.products import matmul_rows

Tensor = torch.Tensor


class FrozenLinearMethod(UnquantizedLinearMethod):
    """vLLM's unquantised linear method, keeping the weight as it is for the backward."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Keep the weight: vLLM's CPU path packs it away and drops the original."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ weight.T`, row by row independent of the batch."""
        return matmul_rows(x, layer.get_parameter("weight").t())


class FrozenEmbeddingMethod(UnquantizedEmbeddingMethod):
    """As `FrozenLinearMethod`, for embeddings and the output head."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Keep the weight."""


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum over the tensor-parallel ranks."""
    if get_tensor_model_parallel_world_size() == 1:
        return x
    return tensor_model_parallel_all_reduce(x)
