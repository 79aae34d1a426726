"""Attention on CUDA by the kernels that come with PyTorch, for packed sequences.

bfloat16 and float16 run FlashAttention 2, which takes grouped heads as they are; float32 runs
CUTLASS's memory-efficient kernels, for which grouped heads are repeated. These are the kernels that
xformers calls where no `flash_attn` is installed.

The forward runs all query rows against all keys. The backward runs the active query rows against
all keys: a forward for the softmax's denominators, then the kernel's backward, of which the active
rows' keys and values are kept. Sequences without rows to run are left out.
Shape suffixes: see `api`.

Numbers: the kernels sum in float32. A sequence's forward is the same alone and in a batch. dq of
Flash's backward is summed with atomics, so that its last bits vary between runs, unless
`torch.use_deterministic_algorithms(True)` is set; dk and dv do not vary.
"""

from dataclasses import dataclass

import numpy as np
import torch

from boe_vllm.attention.layout import AttentionLayout, Occupied
from boe_vllm.base.transfer import to_device

_aten = torch.ops.aten
_FLASH_DTYPES = (torch.bfloat16, torch.float16)
_FLASH_MULTIPLE, _FLASH_MOST = 8, 256
_NO_BIAS, _NO_DROPOUT, _NO_MASK = None, 0.0, 0
_NOT_CAUSAL = _NO_BIAS_GRADIENT = _NO_DEBUG_MASK = False
_WITH_DENOMINATORS = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Where the sequences that have query rows lie, on the device."""

    q_starts: torch.Tensor
    """First query row of each, then their number: int32 `[B + 1]`."""
    k_starts: torch.Tensor
    """First gathered key row of each, then their number: int32 `[B + 1]`."""
    most_q: int
    """Query rows of the longest."""
    most_k: int
    """Key rows of the longest."""
    kv_index: torch.Tensor | None
    """Packed key rows to gather, int64; None if it is all of them."""
    active_kv_index: torch.Tensor
    """Rows of the gathered keys that belong to active rows: int64 `[A]`."""

    @property
    def lengths(self) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """The four in the order in which PyTorch's kernels take them."""
        return self.q_starts, self.k_starts, self.most_q, self.most_k


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
        ValueError: a head size that FlashAttention does not take.
    """
    _check_head_size(q_THP)
    if not layout.num_queries:
        return torch.empty_like(q_THP)
    plan, _ = plans(layout, q_THP.device)
    k, v = _gathered(k_SGP, v_SGP, plan)
    return _forward(q_THP, k, v, plan, scale)[0]


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
        ValueError: a head size that FlashAttention does not take.
    """
    _check_head_size(q_AHP)
    kv_heads = k_SGP.shape[1]
    if not layout.num_active:
        empty = k_SGP.new_empty((0, *k_SGP.shape[1:]))
        return torch.empty_like(q_AHP), empty, torch.empty_like(empty)
    _, plan = plans(layout, q_AHP.device)
    assert plan is not None
    k, v = _gathered(k_SGP, v_SGP, plan)
    if q_AHP.dtype not in _FLASH_DTYPES:
        k, v = (_repeated(x, q_AHP.shape[1]) for x in (k, v))
    o, lse, random_state = _forward(q_AHP, k, v, plan, scale)
    if q_AHP.dtype in _FLASH_DTYPES:
        rows = (do_AHP.contiguous(), q_AHP, k, v, o, lse)
        dq, dk, dv = _aten._flash_attention_backward(
            *rows, *plan.lengths, _NO_DROPOUT, _NOT_CAUSAL, *random_state, scale=scale
        )
    else:
        do, q, k, v, o = (x.unsqueeze(0) for x in (do_AHP, q_AHP, k, v, o))
        known = (*plan.lengths, lse, _NO_DROPOUT, *random_state)
        dq, dk, dv, _ = _aten._efficient_attention_backward(
            do, q, k, v, _NO_BIAS, o, *known, _NO_MASK, _NO_BIAS_GRADIENT, scale=scale
        )
        dq, dk, dv = (x.squeeze(0) for x in (dq, dk, dv))
    dk, dv = (x.index_select(0, plan.active_kv_index) for x in (dk, dv))
    if dk.shape[1] != kv_heads:
        dk, dv = (x.unflatten(1, (kv_heads, -1)).sum(dim=2) for x in (dk, dv))
    return dq, dk, dv


def plans(layout: AttentionLayout, device: torch.device) -> tuple[Plan, Plan | None]:
    """The plans of a layout's forward and, if it has active rows, of its backward.

    Made once per layout, with one transfer to the device, which the host does not wait for.
    """
    return layout.memoised(("torch_cuda", device), lambda: _make_plans(layout, device))


def _make_plans(layout: AttentionLayout, device: torch.device) -> tuple[Plan, Plan | None]:
    parts = [layout.occupied()]
    if layout.num_active:
        parts.append(layout.active_only().occupied())
    moved = iter(to_device([array for part in parts for array in _arrays(part)], device))
    first, *second = (
        Plan(
            q_starts=next(moved),
            k_starts=next(moved),
            active_kv_index=next(moved),
            kv_index=None if part.kv_rows is None else next(moved),
            most_q=max(part.q_seqlens),
            most_k=max(part.kv_seqlens),
        )
        for part in parts
    )
    return first, second[0] if second else None


def _arrays(part: Occupied) -> list[np.ndarray]:
    """What of a plan lies on the device, in its order there."""
    starts = [np.cumsum([0, *lens], dtype=np.int32) for lens in (part.q_seqlens, part.kv_seqlens)]
    gather = [] if part.kv_rows is None else [part.kv_rows]
    return [*starts, part.active_rows, *gather]


def _forward(
    q_THP: torch.Tensor, k_SGP: torch.Tensor, v_SGP: torch.Tensor, plan: Plan, scale: float
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """The output `[T, H, P]`, and what the backward of the same kernel wants of its forward: the
    logarithms of the softmax's denominators in its own format, and the state of random numbers."""
    if q_THP.dtype in _FLASH_DTYPES:
        o, lse, state, unused, _ = _aten._flash_attention_forward(
            q_THP,
            k_SGP,
            v_SGP,
            *plan.lengths,
            _NO_DROPOUT,
            _NOT_CAUSAL,
            _NO_DEBUG_MASK,
            scale=scale,
        )
        return o, lse, (state, unused)
    k, v = (_repeated(x, q_THP.shape[1]) for x in (k_SGP, v_SGP))
    q, k, v = (x.unsqueeze(0) for x in (q_THP, k, v))
    o, lse, seed, offset, *_ = _aten._efficient_attention_forward(
        q, k, v, _NO_BIAS, *plan.lengths, _NO_DROPOUT, _NO_MASK, _WITH_DENOMINATORS, scale=scale
    )
    return o.squeeze(0), lse, (seed, offset)


def _gathered(
    k_SGP: torch.Tensor, v_SGP: torch.Tensor, plan: Plan
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values of the plan's sequences."""
    if plan.kv_index is None:
        return k_SGP, v_SGP
    return k_SGP.index_select(0, plan.kv_index), v_SGP.index_select(0, plan.kv_index)


def _repeated(x_SGP: torch.Tensor, heads: int) -> torch.Tensor:
    """`[S, H, P]`: every key head as often as query heads share it."""
    repeat = heads // x_SGP.shape[1]
    return x_SGP if repeat == 1 else x_SGP.repeat_interleave(repeat, dim=1)


def _check_head_size(q: torch.Tensor) -> None:
    size = q.shape[2]
    if q.dtype in _FLASH_DTYPES and (size % _FLASH_MULTIPLE or size > _FLASH_MOST):
        raise ValueError(
            f"impl='torch': expected a head size divisible by {_FLASH_MULTIPLE} and at most "
            f"{_FLASH_MOST} for {q.dtype} on CUDA, got {size}; use float32 or impl='reference'"
        )
