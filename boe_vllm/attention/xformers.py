"""Attention on CUDA: xformers' memory-efficient kernels with a block-diagonal mask.

The forward runs all query rows against all keys. The backward runs the active query rows against
all keys, under a mask of its own, and keeps the gradients of the active rows' keys and values.
Sequences without rows to run are dropped from the mask, and their keys and values with them.
Shape suffixes: see `layout`; in addition `N` sequences under the mask, `M` the longest of them.

Numbers: bfloat16, float16 and float32 inputs; the kernels sum in float32. Flash's backward adds
with atomics, so that its last bits vary between runs unless
`torch.use_deterministic_algorithms(True)` selects CUTLASS's.

xformers is imported when the first call needs it; the package works without it elsewhere.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from boe_vllm.attention.layout import AttentionLayout, row_index

_LSE_ALIGNMENT = 32
"""CUTLASS reads the lse in lines of this many rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskPlan:
    """A block-diagonal mask over the sequences that have rows, and what must be gathered for it."""

    mask: Any
    """xformers' `BlockDiagonalMask`: these rows of each sequence against all of its keys."""
    q_seqlens: tuple[int, ...]
    """Query rows of each sequence under the mask."""
    kv_index: torch.Tensor | None
    """Packed key rows to gather for the mask, int64; None if it is all of them."""
    active_kv_index: torch.Tensor
    """Rows of the gathered keys that belong to active rows: int64 `[A]`."""


def forward(
    q_THD: torch.Tensor,
    k_SHD: torch.Tensor,
    v_SHD: torch.Tensor,
    *,
    layout: AttentionLayout,
    scale: float,
) -> torch.Tensor:
    """Plain attention of every packed sequence; `[T, H, D]` in q's dtype."""
    if not layout.num_queries:
        return torch.empty_like(q_THD)
    plan = mask_plan(layout, q_THD.device)
    q, k, v = _grouped(q_THD, *_gather(k_SHD, v_SHD, plan))
    o = _fmha().memory_efficient_attention_forward(q, k, v, plan.mask, scale=scale)
    return o.reshape(q_THD.shape)


def forward_with_lse(
    q_THD: torch.Tensor,
    k_SHD: torch.Tensor,
    v_SHD: torch.Tensor,
    *,
    layout: AttentionLayout,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention and the log of the softmax's denominators.

    Returns:
        o `[T, H, D]` in q's dtype; lse float32 `[T, H]`.
    """
    if not layout.num_queries:
        return torch.empty_like(q_THD), q_THD.new_empty(q_THD.shape[:2], dtype=torch.float32)
    plan = mask_plan(layout, q_THD.device)
    q, k, v = _grouped(q_THD, *_gather(k_SHD, v_SHD, plan))
    o, lse = _fmha().memory_efficient_attention_forward_requires_grad(
        q, k, v, plan.mask, scale=scale
    )
    if lse.dim() == 4:  # grouped heads
        lse = lse.flatten(1, 2)
    return o.reshape(q_THD.shape), unpack_lse(lse, plan.q_seqlens)


def backward(
    do_AHD: torch.Tensor,
    q_AHD: torch.Tensor,
    k_SHD: torch.Tensor,
    v_SHD: torch.Tensor,
    *,
    layout: AttentionLayout,
    scale: float,
    o_AHD: torch.Tensor | None = None,
    lse_AH: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the active rows' q, k and v.

    Args:
        o_AHD, lse_AH: the active rows of what `forward_with_lse` returned; unless both are given,
            a forward over the active rows recomputes them.

    Returns:
        dq `[A, H, D]`, dk and dv with k's heads `[A, K, D]`, in q's dtype.

    Raises:
        ValueError: no backward kernel takes these inputs; the message has each one's reasons.
    """
    kv_heads = k_SHD.shape[1]
    if not layout.num_active:
        empty = k_SHD.new_empty((0, *k_SHD.shape[1:]))
        return torch.empty_like(q_AHD), empty, torch.empty_like(empty)
    active = layout.active_only()
    if o_AHD is None or lse_AH is None:
        o_AHD, lse_AH = forward_with_lse(q_AHD, k_SHD, v_SHD, layout=active, scale=scale)
    plan = mask_plan(active, q_AHD.device)
    # The backward kernels know no grouped heads: repeat keys and values, sum over groups after.
    group = q_AHD.shape[1] // kv_heads
    k, v = (x.repeat_interleave(group, dim=1) for x in _gather(k_SHD, v_SHD, plan))
    fmha = _fmha()
    op = backward_operator(fmha, q_AHD, k, v, plan.mask, scale)
    dq, dk, dv = fmha.memory_efficient_attention_backward(
        do_AHD[None],
        o_AHD[None],
        pack_lse(lse_AH, plan.q_seqlens, packed=op.VARLEN_LSE_PACKED),
        q_AHD[None],
        k[None],
        v[None],
        plan.mask,
        scale=scale,
        op=op,
    )
    dk, dv = dk[0][plan.active_kv_index], dv[0][plan.active_kv_index]
    if group > 1:
        dk, dv = (
            x.unflatten(1, (kv_heads, group)).sum(dim=2, dtype=torch.float32).to(x.dtype)
            for x in (dk, dv)
        )
    return dq[0], dk, dv


def mask_plan(layout: AttentionLayout, device: torch.device | str) -> MaskPlan:
    """The mask of a layout's query rows on `device`, made once per layout."""
    device = torch.device(device)
    return layout.memoised(("xformers", device), lambda: _make_mask_plan(layout, device))


def _make_mask_plan(layout: AttentionLayout, device: torch.device) -> MaskPlan:
    kept = [i for i, rows in enumerate(layout.q_seqlens) if rows]
    q_seqlens, kv_seqlens, kv_starts, active_seqlens = (
        tuple(lengths[i] for i in kept)
        for lengths in (
            layout.q_seqlens,
            layout.kv_seqlens,
            layout.kv_starts,
            layout.active_seqlens,
        )
    )
    kept_starts, total = [], 0
    for length in kv_seqlens:
        kept_starts.append(total)
        total += length
    gather = total != layout.num_keys
    return MaskPlan(
        mask=_fmha().BlockDiagonalMask.from_seqlens(
            list(q_seqlens), list(kv_seqlens), device=device
        ),
        q_seqlens=q_seqlens,
        kv_index=row_index(kv_starts, kv_seqlens).to(device) if gather else None,
        active_kv_index=row_index(tuple(kept_starts), active_seqlens).to(device),
    )


def backward_operator(
    fmha: ModuleType,
    q_AHD: torch.Tensor,
    k_SHD: torch.Tensor,
    v_SHD: torch.Tensor,
    mask: Any,
    scale: float,
) -> Any:
    """xformers' first backward operator for these inputs, in xformers' own order of preference.

    Chosen here, not by xformers' dispatch, because the format of the lse has to fit it.

    Raises:
        ValueError: there is none.
    """
    inputs = fmha.Inputs(
        query=q_AHD[None], key=k_SHD[None], value=v_SHD[None], attn_bias=mask, scale=scale
    )
    reasons = []
    for op in (fmha.flash3.BwOp, fmha.flash.BwOp, fmha.cutlass.BwOp):
        against = op.not_supported_reasons(inputs)
        if not against:
            return op
        reasons.append(f"{op.NAME}: {'; '.join(against)}")
    raise ValueError(
        f"impl='xformers': expected inputs that a backward kernel takes, got {q_AHD.dtype} with "
        f"head width {q_AHD.shape[-1]} on {q_AHD.device} ({' | '.join(reasons)}); bfloat16 with a "
        "head width divisible by 8 has the widest support"
    )


def unpack_lse(lse: torch.Tensor, q_seqlens: tuple[int, ...]) -> torch.Tensor:
    """xformers' lse, packed `[1, H, >= T]` or padded `[N, H, >= M]`, as `[T, H]`."""
    total = sum(q_seqlens)
    if lse.shape[0] == 1:
        return lse[0, :, :total].T
    padded = lse.shape[-1]
    starts = tuple(i * padded for i in range(len(q_seqlens)))
    rows = row_index(starts, q_seqlens).to(lse.device)
    return lse.transpose(1, 2).flatten(0, 1)[rows]


def pack_lse(lse_TH: torch.Tensor, q_seqlens: tuple[int, ...], *, packed: bool) -> torch.Tensor:
    """lse `[T, H]` as a kernel wants it: packed `[1, H, T]` (flash) or padded `[N, H, M]`.

    Padding is infinite, so that the probabilities of the rows which are not there vanish.
    """
    if packed:
        return lse_TH.T.contiguous()[None]
    padded = -(-max(q_seqlens) // _LSE_ALIGNMENT) * _LSE_ALIGNMENT
    out = lse_TH.new_full((len(q_seqlens) * padded, lse_TH.shape[1]), float("inf"))
    starts = tuple(i * padded for i in range(len(q_seqlens)))
    out[row_index(starts, q_seqlens).to(lse_TH.device)] = lse_TH
    return out.unflatten(0, (len(q_seqlens), padded)).transpose(1, 2).contiguous()


def _gather(
    k_SHD: torch.Tensor, v_SHD: torch.Tensor, plan: MaskPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    if plan.kv_index is None:
        return k_SHD, v_SHD
    return k_SHD[plan.kv_index], v_SHD[plan.kv_index]


def _grouped(
    q_THD: torch.Tensor, k_SHD: torch.Tensor, v_SHD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views in xformers' formats: `[1, rows, H, D]`, or `[1, rows, K, G, D]` for grouped heads."""
    kv_heads = k_SHD.shape[1]
    group = q_THD.shape[1] // kv_heads
    if group == 1:
        return q_THD[None], k_SHD[None], v_SHD[None]
    q = q_THD.unflatten(1, (kv_heads, group))[None]
    k, v = (x.unsqueeze(2).expand(-1, -1, group, -1)[None] for x in (k_SHD, v_SHD))
    return q, k, v


def _fmha() -> Any:
    try:
        from xformers.ops import fmha
    except ImportError as error:
        raise ImportError(
            "impl='xformers': expected the xformers package, which did not import "
            f"({error}); install it with: pip install 'boe-vllm[cuda]'"
        ) from error
    return fmha
