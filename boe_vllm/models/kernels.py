"""Triton kernels of the row-wise pieces: one launch each, and rows that know nothing of each other.

What sums along a row gives the whole row to one program, so that the order of its sums depends on
the width alone. Widths and strides are constants of a kernel; the number of rows is only that of
its programs. `plain` has the same arithmetic. Triton's interpreter (`TRITON_INTERPRET=1`) runs the
kernels on a CPU, for tests.

Legend: as `plain`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor

_WIDE = 4096
"""Columns of a long row that a program takes at a time."""
_ELEMENTS = 1024
"""Elements of a program where none depends on another."""


def _exact(x: Tensor) -> Any:
    """The type that a kernel computes in."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _warps(columns: int) -> int:
    return min(16, max(1, columns // 512))


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`plain.rms_norm`."""
    return _normed(x_ND.contiguous(), None, weight_D, eps)[1]


def add_rms_norm(
    x_ND: Tensor, add_ND: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`plain.add_rms_norm_`, in memory of its own."""
    return _normed(x_ND.contiguous(), add_ND.contiguous(), weight_D, eps)


def _normed(
    x_ND: Tensor, add_ND: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The rows, with what is added, and their norm."""
    rows, width = x_ND.shape
    normed = torch.empty_like(x_ND)
    total = x_ND if add_ND is None else torch.empty_like(x_ND)
    if rows:
        block = triton.next_power_of_2(width)
        _rms_norm[(rows,)](
            x_ND,
            x_ND if add_ND is None else add_ND,
            weight_D,
            total,
            normed,
            eps,
            D=width,
            BLOCK=block,
            ADD=add_ND is not None,
            EXACT=_exact(x_ND),
            num_warps=_warps(block),
        )
    return total, normed


@triton.jit
def _rms_norm(
    x_ptr,
    add_ptr,
    weight_ptr,
    total_ptr,
    normed_ptr,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    EXACT: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * D
    column = tl.arange(0, BLOCK)
    inside = column < D
    x = tl.load(x_ptr + start + column, mask=inside, other=0.0)
    kind = x.dtype
    if ADD:
        add = tl.load(add_ptr + start + column, mask=inside, other=0.0)
        x = (x.to(EXACT) + add.to(EXACT)).to(kind)
        tl.store(total_ptr + start + column, x, mask=inside)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    exact = x.to(EXACT)
    scale = tl.rsqrt(tl.sum(exact * exact, axis=0) / D + eps)
    normed = (exact * scale).to(kind).to(EXACT) * weight.to(EXACT)
    tl.store(normed_ptr + start + column, normed.to(kind), mask=inside)


def rms_norm_backward(
    dy_ND: Tensor, x_ND: Tensor, weight_D: Tensor, eps: float, beside_ND: Tensor | None
) -> Tensor:
    """`plain.rms_norm_backward`."""
    width, dy_ND, x_ND = x_ND.shape[1], dy_ND.contiguous(), x_ND.contiguous()
    dx_ND = torch.empty_like(dy_ND)
    if len(x_ND):
        block = triton.next_power_of_2(width)
        _rms_norm_backward[(len(x_ND),)](
            dy_ND,
            x_ND,
            weight_D,
            dy_ND if beside_ND is None else beside_ND.contiguous(),
            dx_ND,
            eps,
            D=width,
            BLOCK=block,
            ADD=beside_ND is not None,
            EXACT=_exact(x_ND),
            num_warps=_warps(block),
        )
    return dx_ND


@triton.jit
def _rms_norm_backward(
    dy_ptr,
    x_ptr,
    weight_ptr,
    beside_ptr,
    dx_ptr,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    EXACT: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * D
    column = tl.arange(0, BLOCK)
    inside = column < D
    dy = tl.load(dy_ptr + start + column, mask=inside, other=0.0)
    x = tl.load(x_ptr + start + column, mask=inside, other=0.0).to(EXACT)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(EXACT)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
    dnormed = dy.to(EXACT) * weight
    along = tl.sum(dnormed * x, axis=0) / D * scale * scale
    dx = ((dnormed - x * along) * scale).to(dy.dtype)
    if ADD:
        beside = tl.load(beside_ptr + start + column, mask=inside, other=0.0)
        dx = (dx.to(EXACT) + beside.to(EXACT)).to(dy.dtype)
    tl.store(dx_ptr + start + column, dx, mask=inside)


def split_rotated(
    qkv_NE: Tensor, tables_2N1p: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor]:
    """`plain.split_rotated`."""
    qkv_NE, tables = qkv_NE.contiguous(), tables_2N1p.contiguous()
    rows, size = len(qkv_NE), qkv_NE.shape[1] // (heads + 2 * kv_heads)
    q = qkv_NE.new_empty(rows, heads, size)
    kv = qkv_NE.new_empty(2, rows, kv_heads, size)
    if rows:
        _turn_rows(qkv_NE, (q, *kv.unbind()), tables, back=False)
    return q, kv


def join_rotated_back(
    dq_NHP: Tensor, dk_NGP: Tensor, dv_NGP: Tensor, tables_2N1p: Tensor
) -> Tensor:
    """`plain.join_rotated_back`."""
    parts = (dq_NHP.contiguous(), dk_NGP.contiguous(), dv_NGP.contiguous())
    joined = dq_NHP.new_empty(len(dq_NHP), sum(x.shape[1] * x.shape[2] for x in parts))
    if len(dq_NHP):
        _turn_rows(joined, parts, tables_2N1p.contiguous(), back=True)
    return joined


def _turn_rows(
    joined_NE: Tensor, parts: tuple[Tensor, ...], tables_2N1p: Tensor, *, back: bool
) -> None:
    """Fill the parts from the whole, or, back, the whole from the parts."""
    q, k, v = parts
    half = q.shape[2] // 2
    assert tables_2N1p.shape[1:] == (len(joined_NE), 1, half), tables_2N1p.shape
    _turn[(len(joined_NE), 3)](
        joined_NE,
        q,
        k,
        v,
        tables_2N1p[0],
        tables_2N1p[1],
        H=q.shape[1],
        G=k.shape[1],
        HALF=half,
        HEADS=triton.next_power_of_2(q.shape[1]),
        PAIRS=triton.next_power_of_2(half),
        BACK=back,
        EXACT=_exact(q),
        num_warps=4,
    )


@triton.jit
def _turn(
    joined_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    H: tl.constexpr,
    G: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    BACK: tl.constexpr,
    EXACT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)  # 0 queries, 1 keys, 2 values
    head = tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    parts = part + tl.zeros((HEADS, PAIRS), tl.int32)
    is_q, is_k, is_v = parts == 0, parts == 1, parts == 2
    in_q = (head < H) & (pair < HALF) & is_q
    in_k = (head < G) & (pair < HALF) & is_k
    in_v = (head < G) & (pair < HALF) & is_v
    inside = in_q | in_k | in_v
    before = tl.where(is_q, 0, tl.where(is_k, H, H + G))
    whole = row * ((H + 2 * G) * 2 * HALF) + (before + head) * (2 * HALF) + pair
    own_q = row * (H * 2 * HALF) + head * (2 * HALF) + pair
    own_kv = row * (G * 2 * HALF) + head * (2 * HALF) + pair
    cos = tl.load(cos_ptr + row * HALF + pair, mask=pair < HALF, other=0.0)
    sin = tl.load(sin_ptr + row * HALF + pair, mask=pair < HALF, other=0.0)
    if BACK:
        sin = -sin
        first = tl.load(q_ptr + own_q, mask=in_q, other=0.0).to(EXACT)
        first += tl.load(k_ptr + own_kv, mask=in_k, other=0.0).to(EXACT)
        first += tl.load(v_ptr + own_kv, mask=in_v, other=0.0).to(EXACT)
        second = tl.load(q_ptr + own_q + HALF, mask=in_q, other=0.0).to(EXACT)
        second += tl.load(k_ptr + own_kv + HALF, mask=in_k, other=0.0).to(EXACT)
        second += tl.load(v_ptr + own_kv + HALF, mask=in_v, other=0.0).to(EXACT)
    else:
        first = tl.load(joined_ptr + whole, mask=inside, other=0.0).to(EXACT)
        second = tl.load(joined_ptr + whole + HALF, mask=inside, other=0.0).to(EXACT)
    left = tl.where(is_v, first, first * cos - second * sin)
    right = tl.where(is_v, second, second * cos + first * sin)
    kind = q_ptr.dtype.element_ty
    left, right = left.to(kind), right.to(kind)
    if BACK:
        tl.store(joined_ptr + whole, left, mask=inside)
        tl.store(joined_ptr + whole + HALF, right, mask=inside)
    else:
        tl.store(q_ptr + own_q, left, mask=in_q)
        tl.store(q_ptr + own_q + HALF, right, mask=in_q)
        tl.store(k_ptr + own_kv, left, mask=in_k)
        tl.store(k_ptr + own_kv + HALF, right, mask=in_k)
        tl.store(v_ptr + own_kv, left, mask=in_v)
        tl.store(v_ptr + own_kv + HALF, right, mask=in_v)


def swiglu(gate_up_N2F: Tensor) -> Tensor:
    """`plain.swiglu_`, in memory of its own."""
    gate_up_N2F = gate_up_N2F.contiguous()
    rows, width = len(gate_up_N2F), gate_up_N2F.shape[1] // 2
    out = gate_up_N2F.new_empty(rows, width)
    if rows:
        grid = (rows, triton.cdiv(width, _ELEMENTS))
        _swiglu[grid](gate_up_N2F, out, F=width, BLOCK=_ELEMENTS, EXACT=_exact(out), num_warps=4)
    return out


@triton.jit
def _swiglu(gate_up_ptr, out_ptr, F: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate = tl.load(gate_up_ptr + row * (2 * F) + column, mask=inside, other=0.0)
    up = tl.load(gate_up_ptr + row * (2 * F) + F + column, mask=inside, other=0.0)
    exact = gate.to(EXACT)
    activated = (exact / (1.0 + tl.exp(-exact))).to(gate.dtype)
    tl.store(
        out_ptr + row * F + column, (activated.to(EXACT) * up.to(EXACT)).to(gate.dtype), inside
    )


def swiglu_backward(dy_NF: Tensor, gate_up_N2F: Tensor) -> Tensor:
    """`plain.swiglu_backward`."""
    dy_NF, gate_up_N2F = dy_NF.contiguous(), gate_up_N2F.contiguous()
    rows, width = dy_NF.shape
    out = torch.empty_like(gate_up_N2F, dtype=dy_NF.dtype)
    if rows:
        _swiglu_backward[(rows, triton.cdiv(width, _ELEMENTS))](
            dy_NF, gate_up_N2F, out, F=width, BLOCK=_ELEMENTS, EXACT=_exact(out), num_warps=4
        )
    return out


@triton.jit
def _swiglu_backward(
    dy_ptr, gate_up_ptr, out_ptr, F: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    dy = tl.load(dy_ptr + row * F + column, mask=inside, other=0.0).to(EXACT)
    gate = tl.load(gate_up_ptr + row * (2 * F) + column, mask=inside, other=0.0).to(EXACT)
    up = tl.load(gate_up_ptr + row * (2 * F) + F + column, mask=inside, other=0.0).to(EXACT)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    dup = dy * gate * sigmoid
    kind = out_ptr.dtype.element_ty
    tl.store(out_ptr + row * (2 * F) + column, dgate.to(kind), mask=inside)
    tl.store(out_ptr + row * (2 * F) + F + column, dup.to(kind), mask=inside)


def chosen_rows(
    keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, index_N: Tensor
) -> Tensor:
    """`plain.chosen_rows`."""
    shape = keys.shape[1:]
    width = shape.numel()
    out = keys.new_empty(2, len(index_N), *shape)
    if len(index_N):
        _chosen_rows[(len(index_N), triton.cdiv(width, _ELEMENTS))](
            *(x.contiguous() for x in (keys, values, new_keys, new_values)),
            index_N,
            *out.unbind(),
            len(keys),
            W=width,
            BLOCK=_ELEMENTS,
            num_warps=4,
        )
    return out


@triton.jit
def _chosen_rows(
    keys_ptr,
    values_ptr,
    new_keys_ptr,
    new_values_ptr,
    index_ptr,
    out_keys_ptr,
    out_values_ptr,
    old_rows,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(index_ptr + row).to(tl.int64) + tl.zeros((BLOCK,), tl.int64)
    inside = column < W
    old, new = inside & (source < old_rows), inside & (source >= old_rows)
    at_old, at_new = source * W + column, (source - old_rows) * W + column
    # Only one of two loads happens; the other leaves the value as it is.
    key = tl.load(keys_ptr + at_old, mask=old, other=0.0)
    key = tl.where(old, key, tl.load(new_keys_ptr + at_new, mask=new, other=0.0))
    value = tl.load(values_ptr + at_old, mask=old, other=0.0)
    value = tl.where(old, value, tl.load(new_values_ptr + at_new, mask=new, other=0.0))
    tl.store(out_keys_ptr + row * W + column, key, mask=inside)
    tl.store(out_values_ptr + row * W + column, value, mask=inside)


def normalise_(x_RV: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`plain.normalise_`."""
    assert x_RV.stride(1) == 1
    rows = len(x_RV)
    argmax = x_RV.new_empty(rows, dtype=torch.int64)
    best, second, entropy = x_RV.new_empty(3, rows).unbind()
    if rows:
        _normalise[(rows,)](
            x_RV,
            argmax,
            best,
            second,
            entropy,
            V=x_RV.shape[1],
            STRIDE=x_RV.stride(0),
            BLOCK=_WIDE,
            EXACT=_exact(x_RV),
            num_warps=8,
        )
    return argmax, best, second, entropy


@triton.jit
def _normalise(
    x_ptr,
    argmax_ptr,
    best_ptr,
    second_ptr,
    entropy_ptr,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * STRIDE
    column = tl.arange(0, BLOCK)
    # What each column of the block has seen: largest, where, and second largest.
    largest = tl.full((BLOCK,), float("-inf"), EXACT)
    second = tl.full((BLOCK,), float("-inf"), EXACT)
    place = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, V, BLOCK):
        at = start + column
        x = tl.load(x_ptr + at, mask=at < V, other=float("-inf")).to(EXACT)
        above = x > largest
        second = tl.maximum(second, tl.minimum(x, largest))
        place = tl.where(above, at, place)
        largest = tl.where(above, x, largest)
    top = tl.max(largest, axis=0)
    argmax = tl.min(tl.where(largest == top, place, V - 1), axis=0)
    others = tl.where((largest == top) & (place == argmax), second, largest)
    next_top = tl.max(others, axis=0)
    weights = tl.zeros((BLOCK,), EXACT)
    weighted = tl.zeros((BLOCK,), EXACT)
    for start in range(0, V, BLOCK):
        at = start + column
        x = tl.load(x_ptr + at, mask=at < V, other=0.0).to(EXACT) - top
        weight = tl.where(at < V, tl.exp(x), 0.0)
        weights += weight
        weighted += weight * x
    total = tl.sum(weights, axis=0)
    log_total = tl.log(total)
    tl.store(argmax_ptr + row, argmax.to(tl.int64))
    tl.store(best_ptr + row, -log_total)
    tl.store(second_ptr + row, next_top - top - log_total)
    tl.store(entropy_ptr + row, log_total - tl.sum(weighted, axis=0) / total)
    for start in range(0, V, BLOCK):
        at = start + column
        x = tl.load(x_ptr + at, mask=at < V, other=0.0).to(EXACT)
        tl.store(x_ptr + at, x - top - log_total, mask=at < V)


def entropy_gradient_(logp_RV: Tensor, out_RV: Tensor) -> None:
    """`plain.entropy_gradient_`."""
    assert logp_RV.stride(1) == out_RV.stride(1) == 1
    if len(logp_RV):
        _entropy_gradient[(len(logp_RV),)](
            logp_RV,
            out_RV,
            V=logp_RV.shape[1],
            STRIDE=logp_RV.stride(0),
            OUT_STRIDE=out_RV.stride(0),
            BLOCK=_WIDE,
            EXACT=_exact(logp_RV),
            num_warps=8,
        )


@triton.jit
def _entropy_gradient(
    logp_ptr,
    out_ptr,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logp_ptr += row * STRIDE
    out_ptr += row * OUT_STRIDE
    column = tl.arange(0, BLOCK)
    weighted = tl.zeros((BLOCK,), EXACT)
    for start in range(0, V, BLOCK):
        at = start + column
        logp = tl.load(logp_ptr + at, mask=at < V, other=0.0).to(EXACT)
        weighted += tl.exp(logp) * logp
    mean = tl.sum(weighted, axis=0)
    for start in range(0, V, BLOCK):
        at = start + column
        logp = tl.load(logp_ptr + at, mask=at < V, other=0.0).to(EXACT)
        tl.store(out_ptr + at, tl.exp(logp) * (mean - logp), mask=at < V)
