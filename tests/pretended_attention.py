"""PyTorch's attention kernels for CUDA by dense arithmetic, for the pretended device.

Their formats are the kernels'. Variable lengths only: `cum_seq` or `cu_seqlens` give the first row
of each sequence and the total.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

Tensor = torch.Tensor
aten = torch.ops.aten

_LSE_ALIGNMENT = 32
"""The memory-efficient kernels pad each sequence's lse to a multiple of this many rows."""


def _sequences(starts_q: Tensor, starts_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """The rows of queries and of keys of every sequence."""
    q, k = starts_q.tolist(), starts_k.tolist()
    for a, b, c, d in zip(q, q[1:], k, k[1:], strict=False):
        yield slice(a, b), slice(c, d)


def _scores(q_qHP: Tensor, k_kGP: Tensor, scale: float) -> Tensor:
    """[H, q, k] in float32 or better."""
    k = _repeated(k_kGP, q_qHP.shape[1])
    return torch.einsum("qhp,khp->hqk", _exact(q_qHP), k) * scale


def _repeated(x_kGP: Tensor, heads: int) -> Tensor:
    return _exact(x_kGP).repeat_interleave(heads // x_kGP.shape[1], 1)


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _forward(
    q_THP: Tensor, k_SGP: Tensor, v_SGP: Tensor, starts_q: Tensor, starts_k: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs [T, H, P] and the lse [H, T] in float32."""
    out = torch.empty_like(q_THP)
    lse = q_THP.new_empty(q_THP.shape[1], q_THP.shape[0], dtype=torch.float32)
    for rows, keys in _sequences(starts_q, starts_k):
        scores = _scores(q_THP[rows], k_SGP[keys], scale)
        values = _repeated(v_SGP[keys], q_THP.shape[1])
        out[rows] = torch.einsum("hqk,khp->qhp", scores.softmax(-1), values).to(out.dtype)
        lse[:, rows] = scores.logsumexp(-1).float()
    return out, lse


def _backward(
    do_THP: Tensor,
    q_THP: Tensor,
    k_SGP: Tensor,
    v_SGP: Tensor,
    out_THP: Tensor,
    lse_HT: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    dq, dk, dv = (torch.zeros_like(x) for x in (q_THP, k_SGP, v_SGP))
    heads, groups = q_THP.shape[1], k_SGP.shape[1]
    for rows, keys in _sequences(starts_q, starts_k):
        do, q = _exact(do_THP[rows]), _exact(q_THP[rows])
        k, v = (_repeated(x[keys], heads) for x in (k_SGP, v_SGP))
        p_Hqk = torch.exp(_scores(q_THP[rows], k_SGP[keys], scale) - lse_HT[:, rows, None])
        along_Hq1 = (do * _exact(out_THP[rows])).sum(-1).T[..., None]
        ds_Hqk = p_Hqk * (torch.einsum("qhp,khp->hqk", do, v) - along_Hq1) * scale
        dq[rows] = torch.einsum("hqk,khp->qhp", ds_Hqk, k).to(dq.dtype)
        for whole, part in (
            (dk, torch.einsum("hqk,qhp->khp", ds_Hqk, q)),
            (dv, torch.einsum("hqk,qhp->khp", p_Hqk, do)),
        ):
            whole[keys] = part.unflatten(1, (groups, -1)).sum(2).to(whole.dtype)
    return dq, dk, dv


def _flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
) -> tuple[Tensor, ...]:
    """`aten::_flash_attention_forward`: lse [H, T]."""
    assert query.dtype in (torch.bfloat16, torch.float16) and not is_causal and not dropout_p
    _check_lengths(cum_seq_q, cum_seq_k, max_q, max_k)
    out, lse = _forward(query, key, value, cum_seq_q, cum_seq_k, scale)
    none = torch.empty(2, dtype=torch.int64)
    return out, lse, none, none.clone(), query.new_empty(0)


def _flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, ...]:
    """`aten::_flash_attention_backward`."""
    assert query.dtype in (torch.bfloat16, torch.float16) and not is_causal and not dropout_p
    _check_lengths(cum_seq_q, cum_seq_k, max_q, max_k)
    return _backward(grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, scale)


def _efficient_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    custom_mask_type: int,
    compute_log_sumexp: bool = False,
    *,
    scale: float,
) -> tuple[Any, ...]:
    """`aten::_efficient_attention_forward`: packed rows, lse [sequences, H, padded]."""
    assert query.shape[2] == key.shape[2] and bias is None and not custom_mask_type
    _check_lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out, lse_HT = _forward(query[0], key[0], value[0], cu_seqlens_q, cu_seqlens_k, scale)
    padded = -(-max_seqlen_q // _LSE_ALIGNMENT) * _LSE_ALIGNMENT * compute_log_sumexp
    lse = query.new_full((len(cu_seqlens_q) - 1, query.shape[2], padded), torch.inf).float()
    for n, (rows, _) in enumerate(_sequences(cu_seqlens_q, cu_seqlens_k)):
        if compute_log_sumexp:
            lse[n, :, : rows.stop - rows.start] = lse_HT[:, rows]
    none = torch.empty((), dtype=torch.int64)
    return out[None], lse, none, none.clone(), max_seqlen_q, max_seqlen_k


def _efficient_backward(
    grad_out_: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    logsumexp: Tensor,
    dropout_p: float,
    philox_seed: Tensor,
    philox_offset: Tensor,
    custom_mask_type: int,
    bias_requires_grad: bool,
    *,
    scale: float,
) -> tuple[Tensor, ...]:
    """`aten::_efficient_attention_backward`."""
    assert query.shape[2] == key.shape[2] and bias is None and not custom_mask_type
    _check_lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    assert logsumexp.shape[-1] % _LSE_ALIGNMENT == 0
    lse_HT = query.new_empty(query.shape[2], query.shape[1], dtype=torch.float32)
    for n, (rows, _) in enumerate(_sequences(cu_seqlens_q, cu_seqlens_k)):
        lse_HT[:, rows] = logsumexp[n, :, : rows.stop - rows.start]
    grads = _backward(
        grad_out_[0],
        query[0],
        key[0],
        value[0],
        out[0],
        lse_HT,
        cu_seqlens_q,
        cu_seqlens_k,
        scale,
    )
    return *(x[None] for x in grads), query.new_empty(0)


def _check_lengths(starts_q: Tensor, starts_k: Tensor, max_q: int, max_k: int) -> None:
    """The kernels read 32-bit starts, and no further than the longest sequence they are told of."""
    assert starts_q.dtype == starts_k.dtype == torch.int32
    assert len(starts_q) == len(starts_k)
    assert int(starts_q.diff().max()) <= max_q and int(starts_k.diff().max()) <= max_k


STAND_INS: dict[Any, Callable[..., Any]] = {
    aten._flash_attention_forward.default: _flash_forward,
    aten._flash_attention_backward.default: _flash_backward,
    aten._efficient_attention_forward.default: _efficient_forward,
    aten._efficient_attention_backward.default: _efficient_backward,
}
