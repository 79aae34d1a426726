"""The interface through which the network gets its weights, and its plain form on one rank.

The network multiplies by `weight` itself (`products.matmul_rows`), so that a layer is no more than
the home of its weights. Under tensor parallelism a rank holds some heads and some columns of the
MLP, and the vocabulary's rows from `first_row` on; `Layers` knows how the ranks' parts come
together. `vllm_plugin.parallel` makes the same of vLLM's parallel layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

Tensor = torch.Tensor

VOCABULARY_MULTIPLE = 64
"""The vocabulary's matrices have a multiple of so many rows, as vLLM's have: products of equal
shapes give equal bits inside and outside an engine."""

Part = str | int | None
"""Which part of a fused weight a checkpoint's tensor is; None for the whole."""


class Matrix(nn.Module):
    """A frozen weight [rows, columns] of one or several parts, one above the other."""

    bias: nn.Parameter | None

    def __init__(self, rows: dict[Part, int], columns: int, bias: bool = False) -> None:
        """Uninitialised, in torch's default dtype and on its default device.

        Args:
            rows: of each part, in their order.
            columns: of all.
            bias: whether each row has a number that is added to its product.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.empty(sum(rows.values()), columns), requires_grad=False)
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(sum(rows.values())), requires_grad=False)
        self._rows = rows

    def load(self, tensor: Tensor, part: Part = None, leaf: str = "weight") -> None:
        """Copy a checkpoint's tensor to its place.

        Args:
            tensor: the part's weight or bias.
            part: which.
            leaf: "weight" or "bias".

        Raises:
            ValueError: for a part that is not there, or another shape than that of its place.
        """
        names = list(self._rows)
        before = sum(self._rows[name] for name in names[: names.index(part)])
        place = getattr(self, leaf).data[before : before + self._rows[part]]
        copy_exactly(place, tensor)


class QueryKeyValue(Matrix):
    """Projections to queries, keys and values, with the heads of this rank."""

    def __init__(
        self, width: int, head_size: int, heads: int, kv_heads: int, bias: bool = False
    ) -> None:
        rows: dict[Part, int] = {"q": heads, "k": kv_heads, "v": kv_heads}
        super().__init__({name: n * head_size for name, n in rows.items()}, width, bias)
        self.num_heads, self.num_kv_heads = heads, kv_heads


class Vocabulary(Matrix):
    """Embeddings, or the output matrix: a row per token, then rows of zeros."""

    first_row = 0
    """The token of this rank's first row."""

    def __init__(self, tokens: int, width: int) -> None:
        padded = -(-tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        super().__init__({None: tokens, "padding": padded - tokens}, width)
        self._tokens = tokens

    def load(self, tensor: Tensor, part: Part = None, leaf: str = "weight") -> None:
        """As `Matrix`; the rows beyond the tokens become zero."""
        super().load(tensor, part, leaf)
        self.weight.data[self._tokens :] = 0

    def forward(self, tokens_N: Tensor) -> Tensor:
        """Embeddings, [N, D]."""
        return F.embedding(tokens_N, self.weight)


class Layers:
    """Makes the network's layers, whole: the plain form, and the interface of any other.

    Layers are made in torch's default dtype and on its default device.
    """

    rank: int = 0
    """Of this process among the tensor-parallel ones."""
    ranks: int = 1
    """How many there are."""

    def query_key_value(
        self, width: int, head_size: int, heads: int, kv_heads: int, *, bias: bool = False
    ) -> QueryKeyValue:
        """Fused projections; a checkpoint loads its parts "q", "k" and "v"."""
        return QueryKeyValue(width, head_size, heads, kv_heads, bias)

    def merged(self, width: int, sizes: Sequence[int]) -> Matrix:
        """Projections from `width` to each of `sizes`, one above the other: parts 0, 1, ..."""
        return Matrix(dict(enumerate(sizes)), width)

    def output(self, inner: int, width: int) -> Matrix:
        """A projection back to the residual stream; ranks hold columns, and their sum is wanted."""
        return Matrix({None: width}, inner)

    def embedding(self, tokens: int, width: int) -> Vocabulary:
        """Token embeddings."""
        return Vocabulary(tokens, width)

    def head(self, tokens: int, width: int, tied_to: Vocabulary | None = None) -> Vocabulary:
        """The output matrix, which is the embeddings' own where they are given."""
        head = Vocabulary(tokens, width)
        if tied_to is not None:
            head.weight = tied_to.weight
        return head

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """Sum over the tensor-parallel ranks, of which there are several."""
        raise NotImplementedError

    def gather_columns(self, x_NE: Tensor) -> Tensor:
        """The columns of all ranks side by side, on every rank; there are several."""
        raise NotImplementedError


def copy_exactly(place: Tensor, tensor: Tensor) -> None:
    """Copy a tensor, in the dtype and on the device of its place.

    Raises:
        ValueError: for another shape than the place's: nothing is broadcast.
    """
    if place.shape != tensor.shape:
        raise ValueError(f"expected shape {tuple(place.shape)}, got {tuple(tensor.shape)}")
    place.copy_(tensor)
