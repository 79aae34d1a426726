"""The differentiable pieces of a block (norms, rotation, activation), each with its backward.

Weights are frozen, so a backward returns gradients of inputs only. Normalisation, rotation and the
activation are computed in float32, or in float64 for float64 inputs, as LLaDA's own code does.
On the CPU they run operation by operation, in place where they can (`plain`); on CUDA each is one
operator (`fused`).

Legend: as `plain`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import torch
import torch.nn.functional as F

from boe_vllm.models import fused, plain
from boe_vllm.models.shape import DecoderShape, RopeStretch

Tensor = torch.Tensor

accurate = plain.accurate
rotate = plain.rotate


class Scratch:
    """Memory for one large temporary at a time, kept from one use to the next.

    A tensor of tens of megabytes comes fresh from the operating system every time; on a CPU its
    page faults cost more than the arithmetic on it.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def like(self, x_ND: Tensor, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised [N, width] on the device of `x_ND`, in its dtype unless one is given."""
        dtype = dtype or x_ND.dtype
        size = len(x_ND) * width * dtype.itemsize
        if self._memory.numel() < size or self._memory.device != x_ND.device:
            self._memory = torch.empty(0, dtype=torch.uint8)  # before the larger one is made
            self._memory = torch.empty(size, dtype=torch.uint8, device=x_ND.device)
        return self._memory[:size].view(dtype).view(len(x_ND), width)


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`x / rms(x) * weight`, [N, D] in the dtype of `x`."""
    run = fused.rms_norm if x_ND.is_cuda else plain.rms_norm
    return run(x_ND, weight_D, eps)


def add_rms_norm_(
    x_ND: Tensor, add_ND: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`x + add`, on the CPU in the place of `x`, and its `rms_norm`; [N, D] each."""
    run = fused.add_rms_norm if x_ND.is_cuda else plain.add_rms_norm_
    return run(x_ND, add_ND, weight_D, eps)


def rms_norm_backward(
    dy_ND: Tensor, x_ND: Tensor, weight_D: Tensor, eps: float, beside_ND: Tensor | None = None
) -> Tensor:
    """Gradient of `rms_norm` with respect to `x`, [N, D], and `beside` added to it."""
    run = fused.rms_norm_backward if x_ND.is_cuda else plain.rms_norm_backward
    return run(dy_ND, x_ND, weight_D, eps, beside_ND)


def rotary_tables(
    positions_N: Tensor,
    head_size: int,
    theta: float,
    dtype: torch.dtype,
    stretch: RopeStretch | None = None,
) -> Tensor:
    """Cosines and sines of the rotary angles, [2, N, 1, P/2] in float32 (float64 for float64)."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    exponent = torch.arange(0, head_size, 2, device=positions_N.device, dtype=exact) / head_size
    angles = positions_N.to(exact)[:, None] / theta**exponent
    if stretch is not None:
        angles *= _stretched(2 * math.pi * theta**exponent, stretch)
    return torch.stack([angles.cos(), angles.sin()])[:, :, None, :]


def _stretched(wavelengths_p: Tensor, stretch: RopeStretch) -> Tensor:
    """[P/2] what the angles of some wavelengths, in positions, are multiplied by."""
    share = (stretch.context / wavelengths_p - stretch.low) / (stretch.high - stretch.low)
    return (1 - share.clamp(0, 1)) / stretch.factor + share.clamp(0, 1)


def split_rotated(
    qkv_NE: Tensor, tables_2N1p: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor]:
    """Rotated queries [N, H, P]; rotated keys, and values, [2, N, G, P].

    Args:
        qkv_NE: queries, keys and values side by side.
        tables_2N1p: of `rotary_tables`.
        heads, kv_heads: of the queries, and of the keys.
    """
    run = fused.split_rotated if qkv_NE.is_cuda else plain.split_rotated
    return run(qkv_NE, tables_2N1p, heads, kv_heads)


def join_rotated_back(
    dq_NHP: Tensor, dk_NGP: Tensor, dv_NGP: Tensor, tables_2N1p: Tensor
) -> Tensor:
    """Gradient of `split_rotated`, [N, E]."""
    run = fused.join_rotated_back if dq_NHP.is_cuda else plain.join_rotated_back
    return run(dq_NHP, dk_NGP, dv_NGP, tables_2N1p)


def swiglu_(gate_up_N2F: Tensor) -> Tensor:
    """`silu(gate) * up`, [N, F], of the two halves; on the CPU it overwrites the first."""
    return (fused.swiglu if gate_up_N2F.is_cuda else plain.swiglu_)(gate_up_N2F)


def swiglu_backward(dy_NF: Tensor, gate_up_N2F: Tensor) -> Tensor:
    """Gradient of `swiglu_`, [N, 2F], of which `gate_up` is the argument before it."""
    run = fused.swiglu_backward if dy_NF.is_cuda else plain.swiglu_backward
    return run(dy_NF, gate_up_N2F)


def chosen_rows(
    first_KGP: tuple[Tensor, Tensor], second_TGP: tuple[Tensor, Tensor], index_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values [N, G, P]: rows `index` of the first ones followed by the second."""
    if index_N.is_cuda:
        keys, values = fused.chosen_rows(*first_KGP, *second_TGP, index_N).unbind()
    else:
        pairs = zip(first_KGP, second_TGP, strict=True)
        keys, values = (torch.cat(pair)[index_N] for pair in pairs)
    return keys, values


# ---- a network's norm ----------------------------------------------------------------------------


class Norm(Protocol):
    """What blocks ask of their norm, whichever it is.

    Both divide a row by its size and multiply by a weight; LayerNorm takes off the row's mean
    first. A bias of it is not needed: what would be added to a norm is added to the products that
    follow.
    """

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
