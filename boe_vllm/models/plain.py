"""The row-wise pieces operation by operation: for the CPU, and what all others must equal.

Normalisation, rotation and the activation are computed in float32, or in float64 for float64
inputs, as LLaDA's own code does. Pieces work in place where they can.

PyTorch's own SiLU, sigmoid and GELU take the last elements of a thread's share by other
instructions, whose last bit may differ, so that a row would know where it lies in a batch. Its exp
and tanh do not: the activations are made of these.

Legend: `N` any rows, `D` width, `H`/`G` heads of queries/keys, `P` head size, `p` half of it,
`F` MLP width, `E` width of queries, keys and values side by side, `T` packed new rows, `K` packed
older rows of keys, `R` logit rows, `V` vocabulary.
"""

from __future__ import annotations

import math

import torch

Tensor = torch.Tensor

_GELU, _CUBIC = math.sqrt(2 / math.pi), 0.044715


def accurate(x: Tensor) -> Tensor:
    """`x` in float32, or unchanged if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`x / rms(x) * weight`, [N, D] in the dtype of `x`."""
    x = accurate(x_ND)
    return (x * _inverse_rms(x, eps)).to(x_ND.dtype).mul_(weight_D)


def add_rms_norm_(
    x_ND: Tensor, add_ND: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`x + add`, in the place of `x`, and its norm, [N, D] each."""
    x_ND = x_ND.add_(add_ND)
    return x_ND, rms_norm(x_ND, weight_D, eps)


def rms_norm_backward(
    dy_ND: Tensor, x_ND: Tensor, weight_D: Tensor, eps: float, beside_ND: Tensor | None = None
) -> Tensor:
    """Gradient of `rms_norm` with respect to `x`, [N, D], and `beside` added to it."""
    x = accurate(x_ND)
    scale = _inverse_rms(x, eps)
    dnormed = accurate(dy_ND) * accurate(weight_D)
    along = (dnormed * x).mean(-1, keepdim=True).mul_(scale).mul_(scale)
    dx = dnormed.addcmul_(x, along, value=-1).mul_(scale).to(dy_ND.dtype)
    return dx if beside_ND is None else dx.add_(beside_ND)


def rotate(
    x_NHP: Tensor, tables_2N1p: Tensor, *, out: Tensor | None = None, back: bool = False
) -> Tensor:
    """Rotary embedding, halves layout (first half with second half), [N, H, P]; in `out` if it is
    given. `back` turns by the opposite angle, which is also the gradient's way."""
    cos, sin = tables_2N1p.unbind()
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


def split_rotated(
    qkv_NE: Tensor, tables_2N1p: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor]:
    """Rotated queries [N, H, P]; rotated keys, and values, [2, N, G, P]."""
    x_NXP = qkv_NE.unflatten(1, (heads + 2 * kv_heads, -1))
    q, k, v = x_NXP.split([heads, kv_heads, kv_heads], dim=1)
    return rotate(q, tables_2N1p), torch.stack([rotate(k, tables_2N1p), v])


def join_rotated_back(
    dq_NHP: Tensor, dk_NGP: Tensor, dv_NGP: Tensor, tables_2N1p: Tensor
) -> Tensor:
    """Gradient of `split_rotated`, [N, E]."""
    dqk = rotate(torch.cat([dq_NHP, dk_NGP], dim=1), tables_2N1p, back=True)
    return torch.cat([dqk, dv_NGP], dim=1).flatten(1)


def swiglu_(gate_up_N2F: Tensor) -> Tensor:
    """`silu(gate) * up`, [N, F], of the two halves, in the place of the first."""
    gate, up = gate_up_N2F.chunk(2, dim=-1)
    exact = accurate(gate)
    gate.copy_(exact.div_(exact.neg().exp_().add_(1)))
    return gate.mul_(up)


def swiglu_backward(dy_NF: Tensor, gate_up_N2F: Tensor) -> Tensor:
    """Gradient of `swiglu_`, [N, 2F], of which `gate_up` is the argument before it."""
    gate, up = (accurate(half) for half in gate_up_N2F.chunk(2, dim=-1))
    dy = accurate(dy_NF)
    gradient = torch.empty_like(gate_up_N2F, dtype=dy.dtype)
    dgate, dup = gradient.chunk(2, dim=-1)
    sigmoid = gate.neg().exp_().add_(1).reciprocal_()
    silu = torch.mul(gate, sigmoid, out=dup)
    torch.addcmul(silu, silu, sigmoid, value=-1, out=dgate).add_(sigmoid).mul_(up).mul_(dy)
    silu.mul_(dy)
    return gradient.to(dy_NF.dtype)


def gelu(x_NF: Tensor) -> Tensor:
    """The tanh form of GELU, [N, F] in the dtype of `x`."""
    x = accurate(x_NF)
    return (_tanh_of_gelu(x).add_(1).mul_(x).mul_(0.5)).to(x_NF.dtype)


def gelu_backward(dy_NF: Tensor, x_NF: Tensor) -> Tensor:
    """Gradient of `gelu`, [N, F] in the dtype of `dy`."""
    x, dy = accurate(x_NF), accurate(dy_NF)
    tanh = _tanh_of_gelu(x)
    inner = x.square().mul_(3 * _CUBIC).add_(1).mul_(_GELU)
    slope = (1 - tanh.square()).mul_(x).mul_(inner).add_(tanh).add_(1).mul_(0.5)
    return slope.mul_(dy).to(dy_NF.dtype)


def _tanh_of_gelu(x_NF: Tensor) -> Tensor:
    return x_NF.square().mul_(_CUBIC).add_(1).mul_(x_NF).mul_(_GELU).tanh_()


def chosen_rows(
    keys_KGP: Tensor,
    values_KGP: Tensor,
    new_keys_TGP: Tensor,
    new_values_TGP: Tensor,
    index: Tensor,
) -> Tensor:
    """[2, N, G, P] rows `index` of keys and of values, each followed by the new ones."""
    both = ((keys_KGP, new_keys_TGP), (values_KGP, new_values_TGP))
    return torch.stack([torch.cat(pair)[index] for pair in both])


def normalise_(logits_RV: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn logits into log-probabilities, in place: argmax, best, second, entropy, [R] each."""
    largest, argmax = logits_RV.max(-1, keepdim=True)
    second = logits_RV.scatter(-1, argmax, -torch.inf).amax(-1, keepdim=True)
    weights = logits_RV.sub_(largest).exp()
    total = weights.sum(-1, keepdim=True)
    log_total = total.log()
    # Both terms are at least 0, since the logits are less their maximum: nothing cancels.
    entropy = log_total - weights.mul_(logits_RV).sum(-1, keepdim=True) / total
    logits_RV.sub_(log_total)
    found = (argmax, -log_total, second - largest - log_total, entropy)
    return found[0][:, 0], found[1][:, 0], found[2][:, 0], found[3][:, 0]


def entropy_gradient_(logp_RV: Tensor, out_RV: Tensor) -> None:
    """Gradient of each row's entropy with respect to its logits, `-p (ln p + H)`, in `out`."""
    p = torch.exp(logp_RV)
    # The softmax's backward with ln p for its gradient: p (ln p - sum p ln p).
    torch._softmax_backward_data(logp_RV, p, -1, p.dtype, grad_input=out_RV)
    out_RV.neg_()


def _inverse_rms(x_ND: Tensor, eps: float) -> Tensor:
    """[N, 1]."""
    norm = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True)
    return norm.square_().div_(x_ND.shape[1]).add_(eps).rsqrt_()
