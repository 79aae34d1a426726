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

from collections.abc import Callable
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
    q_THP: torch.Tensor,
    k_SHP: torch.Tensor,
    v_SHP: torch.Tensor,
    *,
    layout: AttentionLayout,
    scale: float,
) -> torch.Tensor:
    """Plain attention of every packed sequence; `[T, H, D]` in q's dtype."""
    if not layout.num_queries:
        return torch.empty_like(q_THP)
    plan = mask_plan(layout, q_THP.device)
    kernel = _fmha().memory_efficient_attention_forward
    return _run_forward(kernel, q_THP, k_SHP, v_SHP, plan, scale).squeeze(0)


def forward_with_lse(
    q_THP: torch.Tensor,
    k_SHP: torch.Tensor,
    v_SHP: torch.Tensor,
    *,
    layout: AttentionLayout,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention and the log of the softmax's denominators.

    Returns:
        o `[T, H, D]` in q's dtype; lse float32 `[T, H]`.

    Raises:
        ValueError: no forward kernel takes these inputs; the message has each one's reasons.
    """
    if not layout.num_queries:
        return torch.empty_like(q_THP), q_THP.new_empty(q_THP.shape[:2], dtype=torch.float32)
    plan = mask_plan(layout, q_THP.device)
    kernel = _fmha().memory_efficient_attention_forward_requires_grad
    o, lse = _run_forward(kernel, q_THP, k_SHP, v_SHP, plan, scale)
    return o.squeeze(0), unpack_lse(lse, plan.q_seqlens)


def backward(
    do_AHP: torch.Tensor,
    q_AHP: torch.Tensor,
    k_SHP: torch.Tensor,
    v_SHP: torch.Tensor,
    *,
    layout: AttentionLayout,
    scale: float,
    o_AHP: torch.Tensor | None = None,
    lse_AH: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the active rows' q, k and v.

    Args:
        o_AHP, lse_AH: the active rows of what `forward_with_lse` returned; unless both are given,
            a forward over the active rows recomputes them.

    Returns:
        dq `[A, H, D]`, dk and dv with k's heads `[A, K, D]`, in q's dtype.

    Raises:
        ValueError: no backward kernel takes these inputs; the message has each one's reasons.
    """
    kv_heads = k_SHP.shape[1]
    if not layout.num_active:
        empty = k_SHP.new_empty((0, *k_SHP.shape[1:]))
        return torch.empty_like(q_AHP), empty, torch.empty_like(empty)
    active = layout.active_only()
    if o_AHP is None or lse_AH is None:
        o_AHP, lse_AH = forward_with_lse(q_AHP, k_SHP, v_SHP, layout=active, scale=scale)
    plan = mask_plan(active, q_AHP.device)
    k, v = _keys_for(k_SHP, v_SHP, plan, q_AHP.shape[1])
    fmha = _fmha()
    op = backward_operator(fmha, q_AHP, k, v, plan.mask, scale)
    dq, dk, dv = fmha.memory_efficient_attention_backward(
        do_AHP.unsqueeze(0),
        o_AHP.unsqueeze(0),
        pack_lse(lse_AH, plan.q_seqlens, packed=op.VARLEN_LSE_PACKED),
        q_AHP.unsqueeze(0),
        k.unsqueeze(0),
        v.unsqueeze(0),
        plan.mask,
        scale=scale,
        op=op,
    )
    dk, dv = (x.squeeze(0).index_select(0, plan.active_kv_index) for x in (dk, dv))
    if kv_heads != q_AHP.shape[1]:
        dk, dv = (
            x.unflatten(1, (kv_heads, -1)).sum(dim=2, dtype=torch.float32).to(x.dtype)
            for x in (dk, dv)
        )
    return dq.squeeze(0), dk, dv


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
    saved_starts, total = [], 0
    for length in kv_seqlens:
        saved_starts.append(total)
        total += length
    gather = total != layout.num_keys
    return MaskPlan(
        mask=_fmha().BlockDiagonalMask.from_seqlens(
            list(q_seqlens), list(kv_seqlens), device=device
        ),
        q_seqlens=q_seqlens,
        kv_index=row_index(kv_starts, kv_seqlens).to(device) if gather else None,
        active_kv_index=row_index(tuple(saved_starts), active_seqlens).to(device),
    )


def backward_operator(
    fmha: ModuleType,
    q_AHP: torch.Tensor,
    k_SHP: torch.Tensor,
    v_SHP: torch.Tensor,
    mask: Any,
    scale: float,
) -> Any:
    """xformers' first backward operator for these inputs, in xformers' own order of preference.

    Chosen here, not by xformers' dispatch, because the format of the lse has to fit it.

    Raises:
        ValueError: there is none.
    """
    q, k, v = (x.unsqueeze(0) for x in (q_AHP, k_SHP, v_SHP))
    inputs = fmha.Inputs(query=q, key=k, value=v, attn_bias=mask, scale=scale)
    reasons = []
    for op in (fmha.flash3.BwOp, fmha.flash.BwOp, fmha.cutlass.BwOp):
        against = op.not_supported_reasons(inputs)
        if not against:
            return op
        reasons.append(f"{op.NAME}: {'; '.join(against)}")
    raise _refusal("backward", q_AHP, " | ".join(reasons))


def unpack_lse(lse: torch.Tensor, q_seqlens: tuple[int, ...]) -> torch.Tensor:
    """xformers' lse, packed `[1, H, >= T]` or padded `[N, H, >= M]`, as `[T, H]`."""
    total = sum(q_seqlens)
    if lse.shape[0] == 1:
        return lse.squeeze(0).narrow(1, 0, total).T
    padded = lse.shape[-1]
    starts = tuple(i * padded for i in range(len(q_seqlens)))
    rows = row_index(starts, q_seqlens).to(lse.device)
    return lse.transpose(1, 2).flatten(0, 1).index_select(0, rows)


def pack_lse(lse_TH: torch.Tensor, q_seqlens: tuple[int, ...], *, packed: bool) -> torch.Tensor:
    """lse `[T, H]` as a kernel wants it: packed `[1, H, T]` (flash) or padded `[N, H, M]`.

    Padding is infinite, so that the probabilities of the rows which are not there vanish.
    """
    if packed:
        return lse_TH.T.contiguous().unsqueeze(0)
    padded = -(-max(q_seqlens) // _LSE_ALIGNMENT) * _LSE_ALIGNMENT
    out = lse_TH.new_full((len(q_seqlens) * padded, lse_TH.shape[1]), float("inf"))
    starts = tuple(i * padded for i in range(len(q_seqlens)))
    out.index_copy_(0, row_index(starts, q_seqlens).to(lse_TH.device), lse_TH)
    out_NMH = out.unflatten(0, (len(q_seqlens), padded))
    return out_NMH.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def _run_forward(
    kernel: Callable[..., Any],
    q_THP: torch.Tensor,
    k_SHP: torch.Tensor,
    v_SHP: torch.Tensor,
    plan: MaskPlan,
    scale: float,
) -> Any:
    """One of xformers' forwards on packed rows; ValueError if it has no kernel for them."""
    qkv = (q_THP, *_keys_for(k_SHP, v_SHP, plan, q_THP.shape[1]))
    try:
        return kernel(*(x.unsqueeze(0) for x in qkv), plan.mask, scale=scale)
    except NotImplementedError as error:  # what xformers' dispatch raises
        raise _refusal("forward", q_THP, str(error)) from error


def _refusal(direction: str, q_THP: torch.Tensor, reasons: str) -> ValueError:
    return ValueError(
        f"impl='xformers': expected inputs that a {direction} kernel takes, got {q_THP.dtype} with "
        f"head width {q_THP.shape[-1]} on {q_THP.device}; bfloat16 with a head width divisible by "
        f"8 has the widest support. xformers says: {reasons}"
    )


def _keys_for(
    k_SHP: torch.Tensor, v_SHP: torch.Tensor, plan: MaskPlan, heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values under the mask, with as many heads as the queries.

    Grouped heads are repeated rather than passed in xformers' 5-d format: its backward kernels do
    not take it, and its CUTLASS forward would run every group on a side stream of its own.
    """
    group = heads // k_SHP.shape[1]
    if plan.kv_index is not None:
        k_SHP, v_SHP = (x.index_select(0, plan.kv_index) for x in (k_SHP, v_SHP))
    if group > 1:
        k_SHP, v_SHP = (x.repeat_interleave(group, dim=1) for x in (k_SHP, v_SHP))
    return k_SHP, v_SHP


def _fmha() -> Any:
    try:
        from xformers.ops import fmha
    except ImportError as error:
        raise ImportError(
            "impl='xformers': expected the xformers package, which did not import "
            f"({error}); install it with: pip install 'boe-vllm[cuda]'"
        ) from error
    return fmha
