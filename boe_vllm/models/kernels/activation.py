"""SwiGLU and its gradient.

Legend: as `plain`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from boe_vllm.models.kernels.common import ELEMENTS, exact_type

Tensor = torch.Tensor


def swiglu(gate_up_N2F: Tensor) -> Tensor:
    """`plain.swiglu_`, in memory of its own."""
    gate_up_N2F = gate_up_N2F.contiguous()
    rows, width = len(gate_up_N2F), gate_up_N2F.shape[1] // 2
    out = gate_up_N2F.new_empty(rows, width)
    if rows:
        grid = (rows, triton.cdiv(width, ELEMENTS))
        _swiglu[grid](gate_up_N2F, out, F=width, BLOCK=ELEMENTS, EXACT=exact_type(out), num_warps=4)
    return out


@triton.jit
def _swiglu(gate_up_ptr, out_ptr, F: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate = tl.load(gate_up_ptr + row * (2 * F) + column, mask=inside, other=0.0)
    up = tl.load(gate_up_ptr + row * (2 * F) + F + column, mask=inside, other=0.0)
    exact = gate.to(EXACT)
    activated = (exact / (1.0 + tl.exp(-exact))).to(gate.dtype)
    tl.store(
        out_ptr + row * F + column, (activated.to(EXACT) * up.to(EXACT)).to(gate.dtype), inside
    )


def swiglu_backward(dy_NF: Tensor, gate_up_N2F: Tensor) -> Tensor:
    """`plain.swiglu_backward`."""
    dy_NF, gate_up_N2F = dy_NF.contiguous(), gate_up_N2F.contiguous()
    rows, width = dy_NF.shape
    out = torch.empty_like(gate_up_N2F, dtype=dy_NF.dtype)
    if rows:
        _swiglu_backward[(rows, triton.cdiv(width, ELEMENTS))](
            dy_NF, gate_up_N2F, out, F=width, BLOCK=ELEMENTS, EXACT=exact_type(out), num_warps=4
        )
    return out


@triton.jit
def _swiglu_backward(
    dy_ptr, gate_up_ptr, out_ptr, F: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    dy = tl.load(dy_ptr + row * F + column, mask=inside, other=0.0).to(EXACT)
    gate = tl.load(gate_up_ptr + row * (2 * F) + column, mask=inside, other=0.0).to(EXACT)
    up = tl.load(gate_up_ptr + row * (2 * F) + F + column, mask=inside, other=0.0).to(EXACT)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    dup = dy * gate * sigmoid
    kind = out_ptr.dtype.element_ty
    tl.store(out_ptr + row * (2 * F) + column, dgate.to(kind), mask=inside)
    tl.store(out_ptr + row * (2 * F) + F + column, dup.to(kind), mask=inside)
