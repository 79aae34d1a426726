"""The row-wise pieces for CUDA where Triton's kernels are not used: each is compiled by PyTorch.

Run operation by operation, sums would change with the number of rows: on an H200 the norm of a row
of eight had other last bits than among 4,096. A compiled piece treats all rows alike. A call costs
the host several times what a kernel of Triton does. `plain` has the same arithmetic.

Legend: as `plain`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

Tensor = torch.Tensor

_FIRST_ROWS = 61
"""Rows of the call for which a piece is compiled: kernels are laid out for the sizes of the first
call, and so they are the same in every process. No other size is 61, for equal ones would count as
one and the same."""
_KNOWN: set[tuple[Any, ...]] = set()
"""Pieces, devices, dtypes and widths that have had their first call."""


PIECES = (
    "rms_norm",
    "add_rms_norm",
    "rms_norm_backward",
    "split_rotated",
    "join_rotated_back",
    "swiglu",
    "swiglu_backward",
)
"""What is here, by the operators' names."""


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`plain.rms_norm`."""
    return _by_rows(_rms_norm, (x_ND,), weight_D, eps)


def add_rms_norm(
    x_ND: Tensor, add_ND: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`plain.add_rms_norm_`, in memory of its own."""
    total = x_ND + add_ND
    return total, rms_norm(total, weight_D, eps)


def rms_norm_backward(
    dy_ND: Tensor, x_ND: Tensor, weight_D: Tensor, eps: float, beside_ND: Tensor | None = None
) -> Tensor:
    """`plain.rms_norm_backward`."""
    dx = _by_rows(_rms_norm_backward, (dy_ND, x_ND), weight_D, eps)
    return dx if beside_ND is None else dx + beside_ND


def split_rotated(
    qkv_NE: Tensor, tables_2N1p: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor]:
    """`plain.split_rotated`."""
    x_NXP = qkv_NE.unflatten(1, (heads + 2 * kv_heads, -1))
    cos, sin = tables_2N1p.unbind()
    turned = _by_rows(_turn, (x_NXP[:, : heads + kv_heads], cos, sin))
    k, v = turned[:, heads:], x_NXP[:, heads + kv_heads :]
    return turned[:, :heads].contiguous(), torch.stack([k, v])


def join_rotated_back(
    dq_NHP: Tensor, dk_NGP: Tensor, dv_NGP: Tensor, tables_2N1p: Tensor
) -> Tensor:
    """`plain.join_rotated_back`."""
    cos, sin = tables_2N1p.unbind()
    dqk = _by_rows(_turn, (torch.cat([dq_NHP, dk_NGP], dim=1), cos, -sin))
    return torch.cat([dqk, dv_NGP], dim=1).flatten(1)


def swiglu(gate_up_N2F: Tensor) -> Tensor:
    """`plain.swiglu_`, in memory of its own."""
    return _by_rows(_swiglu, (gate_up_N2F,))


def swiglu_backward(dy_NF: Tensor, gate_up_N2F: Tensor) -> Tensor:
    """`plain.swiglu_backward`."""
    return _by_rows(_swiglu_backward, (dy_NF, gate_up_N2F))


@torch.no_grad()
def _by_rows(piece: Callable[..., Tensor], rows: tuple[Tensor, ...], *others: Any) -> Tensor:
    """A compiled piece of arguments with equally many rows, and of others.

    None and one alone would be compiled for themselves, so they are filled up to two rows.
    """
    compiled, count = _compiled(piece), len(rows[0])
    key = (piece, *((x.device, x.dtype, x.shape[1:]) for x in rows))
    if key not in _KNOWN:
        compiled(*(x.new_zeros(_FIRST_ROWS, *x.shape[1:]) for x in rows), *others)
        _KNOWN.add(key)
    if count < 2:
        rows = tuple(torch.cat([x, x.new_zeros(2 - count, *x.shape[1:])]) for x in rows)
        return compiled(*rows, *others)[:count]
    # As tensors by themselves: what is part of another would be compiled for each such other.
    return compiled(*(x.data for x in rows), *others)


@functools.cache
def _compiled(piece: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # After many compilations torch runs a function as it is written. To an element-wise piece that
    # makes no difference; sums would then depend on the number of rows, so there it is an error.
    sums = piece in (_rms_norm, _rms_norm_backward)
    return torch.compile(piece, dynamic=True, fullgraph=sums)


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _inverse_rms(x_ND: Tensor, eps: float) -> Tensor:
    return (x_ND.square().mean(-1, keepdim=True) + eps).rsqrt()


def _rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    x = _exact(x_ND)
    return (x * _inverse_rms(x, eps)).to(x_ND.dtype) * weight_D


def _rms_norm_backward(dy_ND: Tensor, x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    x = _exact(x_ND)
    scale = _inverse_rms(x, eps)
    dnormed = _exact(dy_ND) * _exact(weight_D)
    along = (dnormed * x).mean(-1, keepdim=True) * scale * scale
    return ((dnormed - x * along) * scale).to(dy_ND.dtype)


def _turn(x_NHP: Tensor, cos_N1p: Tensor, sin_N1p: Tensor) -> Tensor:
    first, second = _exact(x_NHP).chunk(2, dim=-1)
    left, right = first * cos_N1p - second * sin_N1p, second * cos_N1p + first * sin_N1p
    return torch.cat([left, right], dim=-1).to(x_NHP.dtype)


def _swiglu(gate_up_N2F: Tensor) -> Tensor:
    gate, up = gate_up_N2F.chunk(2, dim=-1)
    exact = _exact(gate)
    return (exact * exact.sigmoid()).to(gate.dtype) * up


def _swiglu_backward(dy_NF: Tensor, gate_up_N2F: Tensor) -> Tensor:
    gate, up = (_exact(half) for half in gate_up_N2F.chunk(2, dim=-1))
    dy, sigmoid = _exact(dy_NF), gate.sigmoid()
    dgate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([dgate, dy * gate * sigmoid], dim=-1).to(dy_NF.dtype)
