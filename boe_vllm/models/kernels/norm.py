"""Root mean square normalisation, with what is added before, and its gradient.

Legend: as `plain`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from boe_vllm.models.kernels.common import exact_type

Tensor = torch.Tensor


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`plain.rms_norm`."""
    return _normed(x_ND.contiguous(), None, weight_D, eps)[1]


def add_rms_norm(
    x_ND: Tensor, add_ND: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`plain.add_rms_norm_`, in memory of its own."""
    return _normed(x_ND.contiguous(), add_ND.contiguous(), weight_D, eps)


def _normed(
    x_ND: Tensor, add_ND: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The rows, with what is added, and their norm."""
    rows, width = x_ND.shape
    normed = torch.empty_like(x_ND)
    total = x_ND if add_ND is None else torch.empty_like(x_ND)
    if rows:
        block = triton.next_power_of_2(width)
        _rms_norm[(rows,)](
            x_ND,
            x_ND if add_ND is None else add_ND,
            weight_D,
            total,
            normed,
            eps,
            D=width,
            BLOCK=block,
            ADD=add_ND is not None,
            EXACT=exact_type(x_ND),
            num_warps=_warps(block),
        )
    return total, normed


@triton.jit
def _rms_norm(
    x_ptr,
    add_ptr,
    weight_ptr,
    total_ptr,
    normed_ptr,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    EXACT: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * D
    column = tl.arange(0, BLOCK)
    inside = column < D
    x = tl.load(x_ptr + start + column, mask=inside, other=0.0)
    kind = x.dtype
    if ADD:
        add = tl.load(add_ptr + start + column, mask=inside, other=0.0)
        x = (x.to(EXACT) + add.to(EXACT)).to(kind)
        tl.store(total_ptr + start + column, x, mask=inside)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    exact = x.to(EXACT)
    scale = tl.rsqrt(tl.sum(exact * exact, axis=0) / D + eps)
    normed = (exact * scale).to(kind).to(EXACT) * weight.to(EXACT)
    tl.store(normed_ptr + start + column, normed.to(kind), mask=inside)


def rms_norm_backward(
    dy_ND: Tensor, x_ND: Tensor, weight_D: Tensor, eps: float, beside_ND: Tensor | None
) -> Tensor:
    """`plain.rms_norm_backward`."""
    width, dy_ND, x_ND = x_ND.shape[1], dy_ND.contiguous(), x_ND.contiguous()
    dx_ND = torch.empty_like(dy_ND)
    if len(x_ND):
        block = triton.next_power_of_2(width)
        _rms_norm_backward[(len(x_ND),)](
            dy_ND,
            x_ND,
            weight_D,
            dy_ND if beside_ND is None else beside_ND.contiguous(),
            dx_ND,
            eps,
            D=width,
            BLOCK=block,
            ADD=beside_ND is not None,
            EXACT=exact_type(x_ND),
            num_warps=_warps(block),
        )
    return dx_ND


@triton.jit
def _rms_norm_backward(
    dy_ptr,
    x_ptr,
    weight_ptr,
    beside_ptr,
    dx_ptr,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    EXACT: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * D
    column = tl.arange(0, BLOCK)
    inside = column < D
    dy = tl.load(dy_ptr + start + column, mask=inside, other=0.0)
    x = tl.load(x_ptr + start + column, mask=inside, other=0.0).to(EXACT)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(EXACT)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
    dnormed = dy.to(EXACT) * weight
    along = tl.sum(dnormed * x, axis=0) / D * scale * scale
    dx = ((dnormed - x * along) * scale).to(dy.dtype)
    if ADD:
        beside = tl.load(beside_ptr + start + column, mask=inside, other=0.0)
        dx = (dx.to(EXACT) + beside.to(EXACT)).to(dy.dtype)
    tl.store(dx_ptr + start + column, dx, mask=inside)


def _warps(columns: int) -> int:
    return min(16, max(1, columns // 512))
