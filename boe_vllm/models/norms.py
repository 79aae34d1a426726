"""The norm that a network's blocks begin with, each with its explicit backward.

Both divide a row by its size and multiply by a weight; LayerNorm takes off the row's mean first. A
bias of it is not needed: what would be added to a norm is added to the products that follow.

Legend: `N` any rows, `D` width.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
import torch.nn.functional as F

from boe_vllm.models.functional import accurate, add_rms_norm_, rms_norm, rms_norm_backward
from boe_vllm.models.shape import DecoderShape

Tensor = torch.Tensor


class Norm(Protocol):
    """What blocks ask of their norm, whichever it is."""

    def run(self, x_ND: Tensor, weight_D: Tensor) -> Tensor:
        """[N, D] the normed rows, in their dtype."""
        ...

    def add_(self, x_ND: Tensor, add_ND: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
        """`x + add`, on the CPU in the place of `x`, and its norm; [N, D] each."""
        ...

    def backward(
        self, dy_ND: Tensor, x_ND: Tensor, weight_D: Tensor, beside_ND: Tensor | None = None
    ) -> Tensor:
        """Gradient of `run` with respect to `x`, [N, D], and `beside` added to it."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class RmsNorm:
    """`x / rms(x) * weight`."""

    eps: float

    def run(self, x_ND: Tensor, weight_D: Tensor) -> Tensor:
        """As `Norm`."""
        return rms_norm(x_ND, weight_D, self.eps)

    def add_(self, x_ND: Tensor, add_ND: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
        """As `Norm`."""
        return add_rms_norm_(x_ND, add_ND, weight_D, self.eps)

    def backward(
        self, dy_ND: Tensor, x_ND: Tensor, weight_D: Tensor, beside_ND: Tensor | None = None
    ) -> Tensor:
        """As `Norm`."""
        return rms_norm_backward(dy_ND, x_ND, weight_D, self.eps, beside_ND)


@dataclasses.dataclass(frozen=True, slots=True)
class LayerNorm:
    """`(x - mean(x)) / std(x) * weight`, in float32 (float64 for float64), as MDLM's."""

    eps: float

    def run(self, x_ND: Tensor, weight_D: Tensor) -> Tensor:
        """As `Norm`."""
        return self._normed(accurate(x_ND)).to(x_ND.dtype).mul_(weight_D)

    def add_(self, x_ND: Tensor, add_ND: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
        """As `Norm`."""
        x_ND = x_ND.add_(add_ND)
        return x_ND, self.run(x_ND, weight_D)

    def backward(
        self, dy_ND: Tensor, x_ND: Tensor, weight_D: Tensor, beside_ND: Tensor | None = None
    ) -> Tensor:
        """As `Norm`."""
        x = accurate(x_ND)
        scale = (x.var(-1, keepdim=True, correction=0) + self.eps).rsqrt()
        normed = self._normed(x)
        dnormed = accurate(dy_ND) * accurate(weight_D)
        along = (dnormed * normed).mean(-1, keepdim=True)
        dx = (dnormed - dnormed.mean(-1, keepdim=True)).addcmul_(normed, along, value=-1)
        dx = dx.mul_(scale).to(dy_ND.dtype)
        return dx if beside_ND is None else dx.add_(beside_ND)

    def _normed(self, x_ND: Tensor) -> Tensor:
        return F.layer_norm(x_ND, x_ND.shape[1:], eps=self.eps)


def norm_of(shape: DecoderShape) -> Norm:
    """The norm of a network's blocks."""
    return LayerNorm(shape.eps) if shape.modulated else RmsNorm(shape.eps)
