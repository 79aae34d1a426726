"""The differentiable pieces of LLaDA's block, each with its explicit backward.

Weights are frozen, so a backward returns gradients of inputs only. Normalisation, rotation and the
activation are computed in float32, or in float64 for float64 inputs, as LLaDA's own code does.
On the CPU they run operation by operation, in place where they can; on CUDA as kernels of `fused`.

Legend: `N` any rows, `D` width, `H` heads, `P` head size, `p` half of it, `F` MLP width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from boe_vllm.models import fused

Tensor = torch.Tensor


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


def accurate(x: Tensor) -> Tensor:
    """`x` in float32, or unchanged if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`x / rms(x) * weight`, [N, D] in the dtype of `x`."""
    if x_ND.is_cuda:
        return fused.rms_norm(x_ND, weight_D, eps)
    x = accurate(x_ND)
    return (x * _inverse_rms(x, eps)).to(x_ND.dtype).mul_(weight_D)


def rms_norm_backward(dy_ND: Tensor, x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Gradient of `rms_norm` with respect to `x`, [N, D]."""
    if x_ND.is_cuda:
        return fused.rms_norm_backward(dy_ND, x_ND, weight_D, eps)
    x = accurate(x_ND)
    scale = _inverse_rms(x, eps)
    dnormed = accurate(dy_ND) * accurate(weight_D)
    along = (dnormed * x).mean(-1, keepdim=True).mul_(scale).mul_(scale)
    return dnormed.addcmul_(x, along, value=-1).mul_(scale).to(dy_ND.dtype)


def _inverse_rms(x_ND: Tensor, eps: float) -> Tensor:
    """[N, 1]."""
    norm = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True)
    return norm.square_().div_(x_ND.shape[1]).add_(eps).rsqrt_()


def rotary_tables(positions_N: Tensor, head_size: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Cosines and sines of the rotary angles, [2, N, 1, P/2] in float32 (float64 for float64)."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    exponent = torch.arange(0, head_size, 2, device=positions_N.device, dtype=exact) / head_size
    angles = positions_N.to(exact)[:, None] / theta**exponent
    return torch.stack([angles.cos(), angles.sin()])[:, :, None, :]


def rotate(
    x_NHP: Tensor, tables_2N1p: Tensor, *, out: Tensor | None = None, back: bool = False
) -> Tensor:
    """Rotary embedding, halves layout (first half with second half), [N, H, P]; in `out` if it is
    given. `back` turns by the opposite angle, which is also the gradient's way."""
    cos, sin = tables_2N1p
    if x_NHP.is_cuda:
        rotated = fused.rotate(x_NHP, cos, sin, back=back)
        return rotated if out is None else out.copy_(rotated)
    x = accurate(x_NHP)
    turned = out if out is not None and out.dtype == x.dtype else None
    if turned is None:
        turned = torch.empty_like(x, memory_format=torch.contiguous_format)
    (first, second), (left, right) = x.chunk(2, dim=-1), turned.chunk(2, dim=-1)
    sign = -1 if back else 1
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=right).addcmul_(first, sin, value=sign)
    if out is None or turned is out:
        return turned.to(x_NHP.dtype)
    return out.copy_(turned)


def swiglu_(gate_up_N2F: Tensor) -> Tensor:
    """`silu(gate) * up`, [N, F], of the two halves; on the CPU it overwrites the first."""
    if gate_up_N2F.is_cuda:
        return fused.swiglu(gate_up_N2F)
    gate, up = gate_up_N2F.chunk(2, dim=-1)
    return F.silu(gate, inplace=True).mul_(up)


def swiglu_backward(dy_NF: Tensor, gate_up_N2F: Tensor) -> Tensor:
    """Gradient of `swiglu_`, [N, 2F], of which `gate_up` is the argument before it."""
    if dy_NF.is_cuda:
        return fused.swiglu_backward(dy_NF, gate_up_N2F)
    gate, up = (accurate(half) for half in gate_up_N2F.chunk(2, dim=-1))
    dy = accurate(dy_NF)
    gradient = torch.empty_like(gate_up_N2F, dtype=dy.dtype)
    dgate, dup = gradient.chunk(2, dim=-1)
    torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=dgate)
    torch.mul(dy, F.silu(gate), out=dup)
    return gradient.to(dy_NF.dtype)
