"""Attention on CUDA: xformers' memory-efficient kernels with a block-diagonal mask.

The forward runs all query rows against all keys. The backward runs the active query rows against
all keys, under a mask of its own: a forward for the softmax's denominators, then xformers'
backward, of which the active rows' keys and values are kept. Forward and backward are taken from
one family of kernels, so that they agree on the format of the denominators.
Sequences without rows to run are dropped from the mask, and their keys and values with them.
Shape suffixes: see `api`.

Numbers: bfloat16, float16 and float32 inputs; the kernels sum in float32. Flash's backward adds
with atomics, so that the last bits of dq vary between runs unless
`torch.use_deterministic_algorithms(True)` selects CUTLASS's.

xformers is imported when the first call needs it; the package works without it elsewhere.
"""

import contextlib
import ctypes
import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from boe_vllm.attention.layout import AttentionLayout
from boe_vllm.base.transfer import to_device


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskPlan:
    """A block-diagonal mask over the sequences that have rows, and what must be gathered for it."""

    mask: Any
    """xformers' `BlockDiagonalMask`: these rows of each sequence against all of its keys."""
    kv_index: torch.Tensor | None
    """Packed key rows to gather for the mask, int64; None if it is all of them."""
    active_kv_index: torch.Tensor
    """Rows of the gathered keys that belong to active rows: int64 `[A]`."""


def forward(
    q_THP: torch.Tensor,
    k_SGP: torch.Tensor,
    v_SGP: torch.Tensor,
    *,
    layout: AttentionLayout,
    scale: float,
) -> torch.Tensor:
    """Plain attention of every packed sequence; `[T, H, P]` in q's dtype.

    Raises:
        ValueError: no forward kernel takes these inputs; the message has each one's reasons.
    """
    if not layout.num_queries:
        return torch.empty_like(q_THP)
    plan = mask_plan(layout, q_THP.device)
    q, k, v = _batched(q_THP, k_SGP, v_SGP, plan)
    op, _ = _operators_of(layout, q, k, v, plan.mask, scale, backward=False)
    kernel = _fmha().memory_efficient_attention_forward
    return kernel(q, k, v, plan.mask, scale=scale, op=op).squeeze(0)


def backward(
    do_AHP: torch.Tensor,
    q_AHP: torch.Tensor,
    k_SGP: torch.Tensor,
    v_SGP: torch.Tensor,
    *,
    layout: AttentionLayout,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the active rows' q, k and v.

    Returns:
        dq `[A, H, P]`, dk and dv with k's heads `[A, G, P]`, in q's dtype.

    Raises:
        ValueError: no family of kernels takes these inputs; the message has each one's reasons.
    """
    kv_heads = k_SGP.shape[1]
    if not layout.num_active:
        empty = k_SGP.new_empty((0, *k_SGP.shape[1:]))
        return torch.empty_like(q_AHP), empty, torch.empty_like(empty)
    active, fmha = layout.active_only(), _fmha()
    plan = mask_plan(active, q_AHP.device)
    q, k, v = _batched(q_AHP, k_SGP, v_SGP, plan)
    ops = _operators_of(active, q, k, v, plan.mask, scale, backward=True)
    o, lse = fmha.memory_efficient_attention_forward_requires_grad(
        q, k, v, plan.mask, scale=scale, op=ops[0]
    )
    dq, dk, dv = fmha.memory_efficient_attention_backward(
        do_AHP.unsqueeze(0), o, lse, q, k, v, plan.mask, scale=scale, op=ops[1]
    )
    dk, dv = (x.squeeze(0).index_select(0, plan.active_kv_index) for x in (dk, dv))
    if kv_heads != q_AHP.shape[1]:
        dk, dv = (
            x.unflatten(1, (kv_heads, -1)).sum(dim=2, dtype=torch.float32).to(x.dtype)
            for x in (dk, dv)
        )
    return dq.squeeze(0), dk, dv


def refusal(dtype: torch.dtype, head_size: int) -> str | None:
    """Why xformers cannot run forward and backward of such heads on this machine's CUDA device.

    Returns:
        None if it can; otherwise xformers' own reasons, or that of its import.
    """
    try:
        fmha = _fmha()
    except ImportError as error:
        return str(error)
    q = torch.empty(1, 8, 1, head_size, dtype=dtype, device="cuda")
    mask = fmha.BlockDiagonalMask.from_seqlens([8], [8], device=q.device)
    try:
        operators(fmha, q, q, q, mask, 1.0)
    except ValueError as error:
        return str(error)
    return None


def mask_plan(layout: AttentionLayout, device: torch.device | str) -> MaskPlan:
    """The mask of a layout's query rows on `device`, made once per layout."""
    device = torch.device(device)
    return layout.memoised(("xformers", device), lambda: _make_mask_plan(layout, device))


def _make_mask_plan(layout: AttentionLayout, device: torch.device) -> MaskPlan:
    rows = layout.occupied()
    gather = [] if rows.kv_rows is None else [rows.kv_rows]
    active_kv_index, *kv_index = to_device([rows.active_rows, *gather], device)
    return MaskPlan(
        mask=_fmha().BlockDiagonalMask.from_seqlens(
            list(rows.q_seqlens), list(rows.kv_seqlens), device=device
        ),
        kv_index=kv_index[0] if kv_index else None,
        active_kv_index=active_kv_index,
    )


def operators(
    fmha: Any,
    q_1THP: torch.Tensor,
    k_1SHP: torch.Tensor,
    v_1SHP: torch.Tensor,
    mask: Any,
    scale: float,
    *,
    backward: bool = True,
) -> tuple[Any, Any]:
    """The first family of kernels for these inputs, in xformers' own order of preference.

    Chosen here, not by xformers' dispatch, because the format of the lse has to fit both.

    Args:
        fmha: xformers' module.
        q_1THP, k_1SHP, v_1SHP, mask, scale: as xformers gets them.
        backward: whether the backward has to run, too.

    Returns:
        Its forward and its backward operator.

    Raises:
        ValueError: there is none.
    """
    inputs = fmha.Inputs(query=q_1THP, key=k_1SHP, value=v_1SHP, attn_bias=mask, scale=scale)
    reasons = []
    for family in (fmha.flash3, fmha.flash, fmha.cutlass):
        needed = (family.FwOp, family.BwOp) if backward else (family.FwOp,)
        against = {op.NAME: op.not_supported_reasons(inputs) for op in needed}
        if not any(against.values()):
            return family.FwOp, family.BwOp
        reasons += [f"{name}: {'; '.join(why)}" for name, why in against.items() if why]
    raise ValueError(
        f"impl='xformers': expected inputs that its kernels take, got {q_1THP.dtype} with head "
        f"size {q_1THP.shape[-1]} on {q_1THP.device}; use impl='torch', or bfloat16 with a head "
        f"size divisible by 8. xformers says: {' | '.join(reasons)}"
    )


def _operators_of(
    layout: AttentionLayout,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Any,
    scale: float,
    *,
    backward: bool,
) -> tuple[Any, Any]:
    """`operators`, asked for once per layout: every layer has the same shapes."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    return layout.memoised(
        ("xformers operators", q.device, q.dtype, q.shape[2:], backward, deterministic),
        lambda: operators(_fmha(), q, k, v, mask, scale, backward=backward),
    )


def _batched(
    q_THP: torch.Tensor, k_SGP: torch.Tensor, v_SGP: torch.Tensor, plan: MaskPlan
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, and the keys and values under the mask, as a batch of one and with equal heads.

    Grouped heads are repeated rather than passed in xformers' 5-d format: its backward kernels do
    not take it, and its CUTLASS forward would run every group on a side stream of its own.
    """
    repeat = q_THP.shape[1] // k_SGP.shape[1]
    if plan.kv_index is not None:
        k_SGP, v_SGP = (x.index_select(0, plan.kv_index) for x in (k_SGP, v_SGP))
    if repeat > 1:
        k_SGP, v_SGP = (x.repeat_interleave(repeat, dim=1) for x in (k_SGP, v_SGP))
    return q_THP.unsqueeze(0), k_SGP.unsqueeze(0), v_SGP.unsqueeze(0)


@functools.cache
def _fmha() -> Any:
    _load_cuda_runtime()
    try:
        from xformers.ops import fmha
    except ImportError as error:
        raise ImportError(
            "impl='xformers': expected the xformers package, which did not import "
            f"({error}); install it with: pip install 'boe-vllm[cuda]'"
        ) from error
    return fmha


def _load_cuda_runtime() -> None:
    """Load CUDA 12's runtime from its wheel, where there is one.

    xformers' library asks for it by name; beside a PyTorch for CUDA 13 nothing else loads it, and
    xformers would then have no operators at all. Without the wheel xformers says so itself.
    """
    try:
        wheel = importlib.util.find_spec("nvidia.cuda_runtime")
    except ModuleNotFoundError:
        return
    for folder in (wheel and wheel.submodule_search_locations) or ():
        library = Path(folder) / "lib" / "libcudart.so.12"
        if library.exists():
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
