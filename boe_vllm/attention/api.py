"""Active-query attention: the public functions. They check their inputs and dispatch.

Attention here is bidirectional, over packed sequences without padding. Each sequence stores its
active rows first. The forward is plain attention; the backward passes a gradient through active
query rows only (eq. 30 of the paper), to the queries, keys and values of active rows.

Keys and values may have fewer heads than queries, a divisor of their number: query head `h` attends
to key head `h // (H // G)`, and gradients of k and v sum over the query heads that share them.

`impl`: `"torch"` (PyTorch's kernels, on the CPU and on CUDA), `"xformers"` (CUDA), `"reference"`
(the slow oracle, on any device), or `"auto"`, which `explain_auto` explains. What a named
implementation cannot do is an error; it never falls back to another.

Legend: `T` packed query rows, `S` packed key rows, `A` packed active rows, `H` query heads, `G` key
and value heads, `P` head size.
"""

import functools
from types import ModuleType

import torch

from boe_vllm.attention.layout import AttentionLayout

_HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
_SUPPORT: dict[str, dict[str, tuple[torch.dtype, ...]]] = {
    "reference": {"any": (torch.float64, *_HALF_AND_SINGLE)},
    "torch": {
        "cpu": (torch.float32, torch.bfloat16, torch.float64),
        "cuda": _HALF_AND_SINGLE,
    },
    "xformers": {"cuda": _HALF_AND_SINGLE},
}
"""The dtypes that an implementation takes on each type of device that it runs on."""

IMPLS = ("auto", *_SUPPORT)
"""Every value of `impl`."""


def attention_forward(
    q_THP: torch.Tensor,
    k_SGP: torch.Tensor,
    v_SGP: torch.Tensor,
    *,
    layout: AttentionLayout,
    scale: float,
    impl: str = "auto",
) -> torch.Tensor:
    """Plain attention of each sequence's query rows to all of its keys.

    Args:
        q_THP: packed queries of all query rows, `[T, H, P]`; float32 or bfloat16, on the CPU also
            float64, on CUDA also float16.
        k_SGP: packed keys, `[S, G, P]`, in q's dtype.
        v_SGP: packed values, shaped as k.
        layout: lengths of the sequences; which rows are active does not matter here.
        scale: factor of `q·k` before the softmax.
        impl: see the module.

    Returns:
        `[T, H, P]` in q's dtype; softmax and sums are float32 or better.

    Raises:
        ValueError: shapes that do not fit the layout or each other, mixed dtypes or devices, an
            unknown `impl`, one that lacks the device or dtype, or a tensor that requires a
            gradient while grad mode is on.
        ImportError: `impl` is xformers, which is not installed.
    """
    module = _checked("attention_forward", q_THP, k_SGP, v_SGP, layout.num_queries, layout, impl)
    return module.forward(q_THP, k_SGP, v_SGP, layout=layout, scale=scale)


def attention_backward(
    do_AHP: torch.Tensor,
    q_AHP: torch.Tensor,
    k_SGP: torch.Tensor,
    v_SGP: torch.Tensor,
    *,
    layout: AttentionLayout,
    scale: float,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the active rows, from the gradients of their outputs; autograd is not used.

    Whatever of the forward is needed is computed again for the active rows.

    Args:
        do_AHP: gradients of the active rows' outputs, `[A, H, P]`, in q's dtype.
        q_AHP: packed queries of the active rows only, `[A, H, P]`.
        k_SGP: packed keys of all rows, `[S, G, P]`.
        v_SGP: packed values of all rows, shaped as k.
        layout: the layout of the forward.
        scale: the forward's.
        impl: see the module.

    Returns:
        dq `[A, H, P]`, and dk, dv `[A, G, P]` for the keys and values of the active rows, in q's
        dtype; sums are float32 or better.

    Raises:
        ValueError, ImportError: as `attention_forward`.
    """
    module = _checked("attention_backward", q_AHP, k_SGP, v_SGP, layout.num_active, layout, impl)
    _check_no_grad("attention_backward", do_AHP)
    _check_like("do", do_AHP, "q", q_AHP)
    return module.backward(do_AHP, q_AHP, k_SGP, v_SGP, layout=layout, scale=scale)


def _checked(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_rows: int,
    layout: AttentionLayout,
    impl: str,
) -> ModuleType:
    """The module that implements `impl`, once everything about the inputs is known to fit."""
    _check_shapes(q, k, q_rows, layout)
    _check_like("k", k, "q", q, shapes=False)
    _check_like("v", v, "k", k)
    _check_no_grad(name, q, k, v)
    device = q.device.type
    return _load(resolve(impl, device, q.dtype, q.shape[2]), device)


@functools.cache
def explain_auto(device_type: str, dtype: torch.dtype, head_size: int) -> tuple[str, str]:
    """What `impl="auto"` means for such queries, and why, for a log.

    On CUDA it is xformers where its library loads and has kernels for them, else PyTorch's own.

    Args:
        device_type: `"cpu"` or `"cuda"`, the current device.
        dtype: of q, k and v.
        head_size: of one head.

    Returns:
        The implementation's name, and a clause that gives the reason.

    Raises:
        ValueError: another device type.
    """
    if device_type == "cpu":
        return "torch", "xformers has no kernels for the CPU"
    if device_type != "cuda":
        raise ValueError(
            f"impl='auto': expected a device type of cpu or cuda, got {device_type!r}; "
            "move the tensors, or name impl='reference'"
        )
    from boe_vllm.attention import xformers

    against = xformers.refusal(dtype, head_size)
    if against is None:
        return "xformers", "its kernels take the model's heads"
    return "torch", f"xformers does not run here: {against}"


def resolve(impl: str, device_type: str, dtype: torch.dtype, head_size: int) -> str:
    """The name of the implementation to run, after checking device type and dtype.

    Raises:
        ValueError: unknown `impl`, or one that cannot take device type or dtype.
    """
    if impl not in IMPLS:
        raise ValueError(f"unknown impl {impl!r}; expected one of {', '.join(IMPLS)}")
    if impl == "auto":
        impl, _ = explain_auto(device_type, dtype, head_size)
    devices = _SUPPORT[impl]
    dtypes = devices.get(device_type, devices.get("any"))
    if dtypes is None:
        raise ValueError(
            f"impl={impl!r}: expected {' or '.join(devices)} tensors, got {device_type}; "
            "move the tensors, or use impl='auto'"
        )
    if dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(
            f"impl={impl!r}: expected a dtype of {names}, got "
            f"{str(dtype).removeprefix('torch.')}; convert q, k and v"
        )
    return impl


def _load(impl: str, device_type: str) -> ModuleType:
    # Literal imports: each implementation stays optional, and unused ones are never loaded.
    if impl == "reference":
        from boe_vllm.attention import reference as module
    elif impl == "torch" and device_type == "cuda":
        from boe_vllm.attention import torch_cuda as module  # type: ignore[no-redef]
    elif impl == "torch":
        from boe_vllm.attention import torch_cpu as module  # type: ignore[no-redef]
    else:
        assert impl == "xformers", f"resolve returned {impl!r}"
        from boe_vllm.attention import xformers as module  # type: ignore[no-redef]
    return module


def _check_shapes(q: torch.Tensor, k: torch.Tensor, q_rows: int, layout: AttentionLayout) -> None:
    """Refuse queries and keys whose rows, heads or head size do not fit."""
    if q.dim() != 3 or k.dim() != 3:
        raise ValueError(
            "q, k: expected packed rows [rows, heads, head size], got shapes "
            f"{tuple(q.shape)} and {tuple(k.shape)}; there is no batch dimension"
        )
    if q.shape[0] != q_rows:
        raise ValueError(
            f"q: expected {q_rows} rows as the layout says, got {q.shape[0]}; "
            "the forward takes all query rows, the backward only the active ones"
        )
    if k.shape[0] != layout.num_keys:
        raise ValueError(
            f"k: expected {layout.num_keys} rows (sum of kv_seqlens), got {k.shape[0]}; "
            "pass the keys and values of every row, in the layout's order"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k: expected a number of heads that divides q's {q.shape[1]}, got {k.shape[1]}; "
            "query head h attends to key head h // (query heads // key heads)"
        )
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"k: expected head size {q.shape[2]} as q has, got {k.shape[2]}; reshape k and v"
        )


def _check_like(
    name: str, x: torch.Tensor, other: str, y: torch.Tensor, *, shapes: bool = True
) -> None:
    """Refuse an `x` of another dtype, device or shape than `y`."""
    if shapes and x.shape != y.shape:
        raise ValueError(
            f"{name}: expected shape {tuple(y.shape)} as {other} has, got {tuple(x.shape)}; "
            f"give {name} for the same rows and heads as {other}"
        )
    if x.dtype != y.dtype or x.device != y.device:
        raise ValueError(
            f"{name}: expected {y.dtype} on {y.device} as {other} has, got {x.dtype} on "
            f"{x.device}; convert {name}"
        )


def _check_no_grad(name: str, *tensors: torch.Tensor) -> None:
    """Refuse to drop a gradient that the caller asked autograd for."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError(
            f"{name}: expected tensors without gradients, got one with requires_grad=True; "
            "detach it, or wrap the call in torch.no_grad()"
        )
