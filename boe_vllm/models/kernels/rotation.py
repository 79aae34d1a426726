"""Rotary embedding of queries and keys in one launch, there and back.

Legend: as `plain`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from boe_vllm.models.kernels.common import exact_type

Tensor = torch.Tensor


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
        EXACT=exact_type(q),
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
