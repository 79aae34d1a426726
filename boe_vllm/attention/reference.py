"""The oracle: dense attention, one sequence after the other, with eq. 30 as the paper writes it.

Slow and obvious on purpose. It shares no code with the fast implementations: it does not import
them, nor they it. Everything is differentiated by autograd. Shape suffixes: see `api`.

Numbers: float64 and float32 are computed as they are, bfloat16 and float16 in float32.
"""

import torch

from boe_vllm.attention.layout import AttentionLayout


def forward(
    q_THP: torch.Tensor,
    k_SGP: torch.Tensor,
    v_SGP: torch.Tensor,
    *,
    layout: AttentionLayout,
    scale: float,
) -> torch.Tensor:
    """Plain attention, differentiable in everything; `[T, H, P]` in q's dtype."""
    dtype = torch.promote_types(q_THP.dtype, torch.float32)
    repeat = q_THP.shape[1] // k_SGP.shape[1]
    outs = []
    for i in range(layout.num_sequences):
        q = q_THP[layout.q_starts[i] : layout.q_starts[i + 1]].to(dtype)
        k = k_SGP[layout.kv_starts[i] : layout.kv_starts[i + 1]].to(dtype)
        v = v_SGP[layout.kv_starts[i] : layout.kv_starts[i + 1]].to(dtype)
        k = k.repeat_interleave(repeat, dim=1)
        v = v.repeat_interleave(repeat, dim=1)
        scores = torch.einsum("qhp,khp->hqk", q, k) * scale
        outs.append(torch.einsum("hqk,khp->qhp", scores.softmax(dim=-1), v))
    return torch.cat(outs).to(q_THP.dtype) if outs else q_THP.clone()


def active_query_attention(
    q_THP: torch.Tensor,
    k_SGP: torch.Tensor,
    v_SGP: torch.Tensor,
    *,
    layout: AttentionLayout,
    scale: float,
) -> torch.Tensor:
    """Eq. 30: `y = where(active, y, stop_gradient(y))`.

    Keys and values of inactive rows are stopped as well. Eq. 30 leaves them open because it does
    not matter in a network: an inactive row's keys come from its residual stream, whose attention
    output is stopped, so their gradient reaches no other row's embedding.
    """
    active_T11 = _mask(q_THP.shape[0], layout.active_index(q_THP.device))
    active_S11 = _mask(k_SGP.shape[0], layout.active_kv_index(k_SGP.device))
    k_SGP = torch.where(active_S11, k_SGP, k_SGP.detach())
    v_SGP = torch.where(active_S11, v_SGP, v_SGP.detach())
    y_THP = forward(q_THP, k_SGP, v_SGP, layout=layout, scale=scale)
    return torch.where(active_T11, y_THP, y_THP.detach())


def backward(
    do_AHP: torch.Tensor,
    q_AHP: torch.Tensor,
    k_SGP: torch.Tensor,
    v_SGP: torch.Tensor,
    *,
    layout: AttentionLayout,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the active rows' q, k and v, by autograd.

    Inactive queries are left out altogether: they receive no gradient and pass none on.
    """
    active = layout.active_only()
    index = layout.active_kv_index(k_SGP.device)
    # Clones made outside inference mode are ordinary tensors, which autograd accepts.
    with torch.inference_mode(False), torch.enable_grad():
        q, k, v = (x.clone().detach().requires_grad_() for x in (q_AHP, k_SGP, v_SGP))
        o = active_query_attention(q, k, v, layout=active, scale=scale)
        if not o.requires_grad or not o.numel():
            return torch.zeros_like(q), torch.zeros_like(k)[index], torch.zeros_like(v)[index]
        dq, dk, dv = torch.autograd.grad(o, (q, k, v), do_AHP.clone())
    return dq, dk[index], dv[index]


def _mask(count: int, index: torch.Tensor) -> torch.Tensor:
    """[count, 1, 1] true at the given rows."""
    mask = torch.zeros(count, 1, 1, dtype=torch.bool, device=index.device)
    mask[index] = True
    return mask
