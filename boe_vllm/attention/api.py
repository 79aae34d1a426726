"""Active-query attention: the public functions. They check their inputs and dispatch.

Attention here is bidirectional, over packed sequences without padding. Each sequence stores its
active rows first. The forward is plain attention; the gradient flows only through active query
rows (eq. 30 of the paper), and only to the queries, keys and values of active rows.

Shape suffixes: `T` packed query rows, `S` packed key rows, `A` packed active rows, `H` heads, `D`
head width. Keys and values may have fewer heads than queries, a divisor of their number: query
head `h` attends to key head `h // (H / H of k)`, and gradients of k and v sum over the group.

`impl`: `"auto"` (the CPU gets `"torch_sdpa"`, CUDA `"xformers"`), `"torch_sdpa"`, `"xformers"`, or
`"reference"`, the slow oracle, on any device. What an implementation cannot do is an error.
"""

from types import ModuleType
from typing import Any

import torch

from boe_vllm.attention.layout import AttentionLayout
from boe_vllm.attention.validation import (
    check_inputs,
    check_like_active,
    check_like_q,
    check_no_grad,
    choose_impl,
    resolve_impl,
)

__all__ = [
    "AttentionLayout",
    "active_query_attention",
    "attention_backward",
    "attention_forward",
    "attention_forward_with_lse",
    "choose_impl",
]


def attention_forward(
    q_THP: torch.Tensor,
    k_SHP: torch.Tensor,
    v_SHP: torch.Tensor,
    *,
    layout: AttentionLayout,
    scale: float,
    impl: str = "auto",
) -> torch.Tensor:
    """Plain attention of each sequence's query rows to all of its keys.

    Args:
        q_THP: packed queries of all query rows, `[T, H, D]`; float32 or bfloat16, on the CPU also
            float64, on CUDA also float16.
        k_SHP: packed keys, `[S, H or fewer, D]`, in q's dtype.
        v_SHP: packed values, shaped as k.
        layout: lengths of the sequences; which rows are active does not matter here.
        scale: factor of `q·k` before the softmax.
        impl: see the module.

    Returns:
        `[T, H, D]` in q's dtype; softmax and sums are float32 or better.

    Raises:
        ValueError: shapes that do not fit the layout or each other, mixed dtypes or devices, an
            unknown `impl`, one that lacks the device or dtype, or a tensor that requires a
            gradient while grad mode is on (use `active_query_attention`).
        ImportError: `impl` resolves to xformers, which is not installed.
    """
    module = _checked("attention_forward", q_THP, k_SHP, v_SHP, layout, impl)
    return module.forward(q_THP, k_SHP, v_SHP, layout=layout, scale=scale)


def attention_forward_with_lse(
    q_THP: torch.Tensor,
    k_SHP: torch.Tensor,
    v_SHP: torch.Tensor,
    *,
    layout: AttentionLayout,
    scale: float,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attention_forward`, and the logsumexp of the scores for those backwards that use it.

    Give the active rows of both to `attention_backward` and the xformers backward recomputes
    nothing. Arguments and errors: as `attention_forward`.

    Returns:
        o `[T, H, D]` in q's dtype; lse `[T, H]` in float32 (float64 for float64 inputs), or None
        from `torch_sdpa`, which has no use for it.
    """
    module = _checked("attention_forward_with_lse", q_THP, k_SHP, v_SHP, layout, impl)
    return module.forward_with_lse(q_THP, k_SHP, v_SHP, layout=layout, scale=scale)


def attention_backward(
    do_AHP: torch.Tensor,
    q_AHP: torch.Tensor,
    k_SHP: torch.Tensor,
    v_SHP: torch.Tensor,
    *,
    layout: AttentionLayout,
    scale: float,
    o_AHP: torch.Tensor | None = None,
    lse_AH: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the active rows, from the gradients of their outputs; autograd is not used.

    Args:
        do_AHP: gradients of the active rows' outputs, `[A, H, D]`, in q's dtype.
        q_AHP: packed queries of the active rows only, `[A, H, D]`.
        k_SHP: packed keys of all rows, `[S, H or fewer, D]`.
        v_SHP: packed values of all rows, shaped as k.
        layout: the layout of the forward.
        scale: the forward's.
        o_AHP: outputs of the active rows, `[A, H, D]`, in q's dtype; saves xformers a forward over
            these rows if `lse_AH` is given too. Other implementations recompute what they need.
        lse_AH: logsumexp of the active rows' scores, `[A, H]`, float32 (float64 for float64).
        impl: see the module.

    Returns:
        dq `[A, H, D]`, and dk, dv `[A, H of k, D]` for the keys and values of the active rows, in
        q's dtype; sums are float32 or better.

    Raises:
        ValueError, ImportError: as `attention_forward`.
    """
    module = _checked("attention_backward", q_AHP, k_SHP, v_SHP, layout, impl, active=True)
    check_no_grad("attention_backward", do_AHP)
    for name, x in (("do", do_AHP), ("o", o_AHP)):
        if x is not None:
            check_like_active(name, x, q_AHP, tuple(q_AHP.shape))
            check_like_q(name, x, q_AHP)
    if lse_AH is not None:
        check_like_active("lse", lse_AH, q_AHP, tuple(q_AHP.shape[:2]))
    return module.backward(
        do_AHP, q_AHP, k_SHP, v_SHP, layout=layout, scale=scale, o_AHP=o_AHP, lse_AH=lse_AH
    )


def active_query_attention(
    q_THP: torch.Tensor,
    k_SHP: torch.Tensor,
    v_SHP: torch.Tensor,
    *,
    layout: AttentionLayout,
    scale: float,
    impl: str = "auto",
) -> torch.Tensor:
    """Attention whose gradient flows through active query rows only (eq. 30); differentiable.

    The values are `attention_forward`'s. The gradients of q, k and v are exactly zero outside the
    active rows. `"reference"` leaves the differentiation to autograd, the others keep q of active
    rows, k and v for `attention_backward`. Differentiable once. Arguments and errors: as
    `attention_forward`, except that tensors may require a gradient.

    Returns:
        `[T, H, D]` in q's dtype.
    """
    check_inputs(q_THP, k_SHP, v_SHP, q_rows=layout.num_queries, layout=layout)
    impl = resolve_impl(impl, q_THP.device.type, q_THP.dtype)
    module = _load(impl)
    if impl == "reference":
        return module.active_query_attention(q_THP, k_SHP, v_SHP, layout=layout, scale=scale)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q_THP, k_SHP, v_SHP)):
        return _ActiveQueryAttention.apply(q_THP, k_SHP, v_SHP, layout, scale, module)
    return module.forward(q_THP, k_SHP, v_SHP, layout=layout, scale=scale)


class _ActiveQueryAttention(torch.autograd.Function):
    """Ties an implementation's forward and backward together for autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        q_THP: torch.Tensor,
        k_SHP: torch.Tensor,
        v_SHP: torch.Tensor,
        layout: AttentionLayout,
        scale: float,
        module: ModuleType,
    ) -> torch.Tensor:
        o_THP, lse_TH = module.forward_with_lse(q_THP, k_SHP, v_SHP, layout=layout, scale=scale)
        index = layout.active_index(q_THP.device)
        # Of the queries (and outputs, where the backward wants them) only active rows are kept.
        o_AHP, lse_AH = (None, None) if lse_TH is None else (o_THP[index], lse_TH[index])
        ctx.save_for_backward(q_THP[index], k_SHP, v_SHP, o_AHP, lse_AH)
        ctx.layout, ctx.scale, ctx.module = layout, scale, module
        return o_THP

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do_THP: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_AHP, k_SHP, v_SHP, o_AHP, lse_AH = ctx.saved_tensors
        layout: AttentionLayout = ctx.layout
        index = layout.active_index(do_THP.device)
        kv_index = layout.active_kv_index(do_THP.device)
        dq_AHP, dk_AHP, dv_AHP = ctx.module.backward(
            do_THP[index],
            q_AHP,
            k_SHP,
            v_SHP,
            layout=layout,
            scale=ctx.scale,
            o_AHP=o_AHP,
            lse_AH=lse_AH,
        )
        dq_THP = do_THP.new_zeros(do_THP.shape).index_copy_(0, index, dq_AHP)
        dk_SHP = k_SHP.new_zeros(k_SHP.shape).index_copy_(0, kv_index, dk_AHP)
        dv_SHP = v_SHP.new_zeros(v_SHP.shape).index_copy_(0, kv_index, dv_AHP)
        return dq_THP, dk_SHP, dv_SHP, None, None, None


def _checked(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: AttentionLayout,
    impl: str,
    *,
    active: bool = False,
) -> ModuleType:
    """The module that implements `impl`, once everything about the inputs is known to fit."""
    check_inputs(q, k, v, q_rows=layout.num_active if active else layout.num_queries, layout=layout)
    check_no_grad(name, q, k, v)
    return _load(resolve_impl(impl, q.device.type, q.dtype))


def _load(impl: str) -> ModuleType:
    # Literal imports: each implementation stays optional, and unused ones are never loaded.
    if impl == "reference":
        from boe_vllm.attention import reference as module
    elif impl == "torch_sdpa":
        from boe_vllm.attention import torch_cpu as module  # type: ignore[no-redef]
    else:
        assert impl == "xformers", f"resolve_impl returned {impl!r}"
        from boe_vllm.attention import xformers as module  # type: ignore[no-redef]
    return module
