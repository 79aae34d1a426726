"""What the attention functions accept: which implementation runs where, and which shapes fit.

Every error says what was expected, what came and what to do; nothing falls back silently.
"""

import torch

from boe_vllm.attention.layout import AttentionLayout

_HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
_SUPPORT: dict[str, tuple[str | None, tuple[torch.dtype, ...]]] = {
    "reference": (None, (torch.float64, *_HALF_AND_SINGLE)),
    "torch_sdpa": ("cpu", (torch.float32, torch.bfloat16, torch.float64)),
    "xformers": ("cuda", _HALF_AND_SINGLE),
}
"""Per implementation: the device type it needs (None: any) and the dtypes it takes."""

_AUTO = {"cpu": "torch_sdpa", "cuda": "xformers"}
"""What `impl="auto"` means. The device alone decides, so that a dtype cannot change the kernel."""

IMPLS = ("auto", *_SUPPORT)
"""Every value of `impl`."""


def choose_impl(device_type: str, dtype: torch.dtype) -> str:
    """The implementation that `impl="auto"` means.

    Args:
        device_type: `"cpu"` or `"cuda"`.
        dtype: dtype of q, k and v; it is checked, and never changes the choice.

    Returns:
        `"torch_sdpa"` on the CPU, `"xformers"` on CUDA.

    Raises:
        ValueError: another device type, or a dtype that the device's implementation lacks.
    """
    if device_type not in _AUTO:
        raise ValueError(
            f"impl='auto': expected a device type of {', '.join(_AUTO)}, got {device_type!r}; "
            "move the tensors, or name impl='reference'"
        )
    return resolve_impl(_AUTO[device_type], device_type, dtype)


def resolve_impl(impl: str, device_type: str, dtype: torch.dtype) -> str:
    """The name of the implementation to run, after checking device type and dtype.

    Raises:
        ValueError: unknown `impl`, or an implementation that cannot take device type or dtype.
    """
    if impl not in IMPLS:
        raise ValueError(f"unknown impl {impl!r}; expected one of {', '.join(IMPLS)}")
    if impl == "auto":
        return choose_impl(device_type, dtype)
    needed_device, dtypes = _SUPPORT[impl]
    if needed_device not in (None, device_type):
        raise ValueError(
            f"impl={impl!r}: expected {needed_device} tensors, got {device_type}; "
            "move the tensors, or use impl='auto'"
        )
    if dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(
            f"impl={impl!r}: expected a dtype of {names}, got "
            f"{str(dtype).removeprefix('torch.')}; convert q, k and v"
        )
    return impl


def check_inputs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, q_rows: int, layout: AttentionLayout
) -> None:
    """Check q `[q_rows, H, D]` and k, v `[S, K, D]` against each other and the layout.

    Raises:
        ValueError: wrong rank, rows, heads, head width, dtype or device.
    """
    if q.dim() != 3 or k.dim() != 3:
        raise ValueError(
            "q, k: expected packed rows [rows, heads, head width], got shapes "
            f"{tuple(q.shape)} and {tuple(k.shape)}; there is no batch dimension"
        )
    if v.shape != k.shape:
        raise ValueError(
            f"v: expected the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}; "
            "keys and values share rows, heads and head width"
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
            "head h attends to key/value head h // (H // K)"
        )
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"k: expected head width {q.shape[2]} as q has, got {k.shape[2]}; reshape k and v"
        )
    for name, x in (("k", k), ("v", v)):
        check_like_q(name, x, q)


def check_like_q(name: str, x: torch.Tensor, q: torch.Tensor) -> None:
    """Check that x has q's dtype and device.

    Raises:
        ValueError: it has not.
    """
    if x.dtype != q.dtype or x.device != q.device:
        raise ValueError(
            f"{name}: expected {q.dtype} on {q.device} as q has, got {x.dtype} on {x.device}; "
            f"convert {name}"
        )


def check_like_active(
    name: str, x: torch.Tensor, q_AHP: torch.Tensor, shape: tuple[int, ...]
) -> None:
    """Check the shape and device of something that belongs to the active rows.

    Raises:
        ValueError: another shape or device than expected.
    """
    if tuple(x.shape) != shape or x.device != q_AHP.device:
        raise ValueError(
            f"{name}: expected shape {shape} on {q_AHP.device}, got {tuple(x.shape)} on "
            f"{x.device}; give it for the active rows, as q"
        )


def check_no_grad(name: str, *tensors: torch.Tensor) -> None:
    """Refuse to drop a gradient that the caller asked autograd for.

    Raises:
        ValueError: grad mode is on and a tensor requires a gradient.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError(
            f"{name}: expected tensors without gradients, got one with requires_grad=True; "
            "call active_query_attention, or wrap the call in torch.no_grad()"
        )
