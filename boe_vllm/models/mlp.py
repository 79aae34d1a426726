"""The dense MLP of a block, SwiGLU or GELU, with its explicit backward.

Legend: `N` any rows, `A` saved rows, `D` width, `F` inner width on this rank.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from boe_vllm.models import plain
from boe_vllm.models.functional import Scratch, swiglu_, swiglu_backward
from boe_vllm.models.layers import Layers
from boe_vllm.models.products import matmul_rows

Tensor = torch.Tensor


class Mlp(Protocol):
    """What a block asks of its MLP, whatever is in it."""

    def run(
        self, normed_ND: Tensor, saved_A: Tensor | None = None, scratch: Scratch | None = None
    ) -> tuple[Tensor, Any]:
        """What is added to the residual stream, [N, D], before the sum over the ranks; and what
        the backward needs of the rows `saved_A`, if they are given."""
        ...

    def backward(self, dy_AD: Tensor, saved: Any) -> Tensor:
        """Gradient of the normed rows, [A, D], before the sum over the ranks."""
        ...


class DenseMlp(nn.Module):
    """`down(silu(gate(x)) * up(x))`, no biases."""

    def __init__(self, width: int, inner: int, layers: Layers) -> None:
        super().__init__()
        self.gate_up_proj = layers.merged(width, [inner, inner])
        self.ff_out = layers.output(inner, width)

    def run(
        self, normed_ND: Tensor, saved_A: Tensor | None = None, scratch: Scratch | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As `Mlp`; what is saved are the pre-activations, [A, 2F]."""
        gate_up = matmul_rows(normed_ND, self.gate_up_proj.weight.t(), scratch)
        saved = None if saved_A is None else gate_up[saved_A]
        return matmul_rows(swiglu_(gate_up), self.ff_out.weight.t()), saved

    def backward(self, dy_AD: Tensor, saved: Tensor) -> Tensor:
        """As `Mlp`."""
        dgate_up = swiglu_backward(matmul_rows(dy_AD, self.ff_out.weight), saved)
        return matmul_rows(dgate_up, self.gate_up_proj.weight)


class GeluMlp(nn.Module):
    """`down(gelu(up(x)))` with biases and the tanh form of GELU, on one rank."""

    def __init__(self, width: int, inner: int, layers: Layers) -> None:
        """Weights that are yet to be loaded.

        Raises:
            ValueError: for more than one tensor-parallel rank.
        """
        super().__init__()
        if layers.ranks > 1:
            raise ValueError(
                f"tensor_parallel_size: expected 1 for a network with a GELU MLP, got "
                f"{layers.ranks}; such networks are small: remove the setting"
            )
        self.up_proj = layers.merged(width, [inner])
        self.up_bias = nn.Parameter(torch.zeros(inner), requires_grad=False)
        self.ff_out = layers.output(inner, width)
        self.out_bias = nn.Parameter(torch.zeros(width), requires_grad=False)

    def run(
        self, normed_ND: Tensor, saved_A: Tensor | None = None, scratch: Scratch | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As `Mlp`; what is saved are the pre-activations, [A, F]."""
        up = matmul_rows(normed_ND, self.up_proj.weight.t(), scratch).add_(self.up_bias)
        saved = None if saved_A is None else up[saved_A]
        active = plain.gelu(up)
        return matmul_rows(active, self.ff_out.weight.t()).add_(self.out_bias), saved

    def backward(self, dy_AD: Tensor, saved: Tensor) -> Tensor:
        """As `Mlp`."""
        dactive = matmul_rows(dy_AD, self.ff_out.weight)
        return matmul_rows(plain.gelu_backward(dactive, saved), self.up_proj.weight)
