"""Attention by PyTorch's kernels for CUDA, in the place of xformers' on the pretended device."""

from __future__ import annotations

import torch

import boe_vllm.attention.xformers as place
from boe_vllm.attention.layout import AttentionLayout, row_index

aten = torch.ops.aten
_HALF = (torch.bfloat16, torch.float16)


class Plan:
    def __init__(self, layout: AttentionLayout, device: torch.device) -> None:
        kept = [i for i, rows in enumerate(layout.q_seqlens) if rows]
        self.q = [layout.q_seqlens[i] for i in kept]
        self.kv = [layout.kv_seqlens[i] for i in kept]
        starts, cu_q = [0], [0]
        for n in self.kv:
            starts.append(starts[-1] + n)
        for n in self.q:
            cu_q.append(cu_q[-1] + n)
        host = torch.tensor([*cu_q, *starts], dtype=torch.int32).pin_memory()
        both = host.to(device, non_blocking=True)
        self.cu_q, self.cu_k = both[: len(cu_q)], both[len(cu_q) :]
        self.max_q, self.max_k = max(self.q), max(self.kv)
        self.kv_index = None
        if starts[-1] != layout.num_keys:
            index = row_index(tuple(layout.kv_starts[i] for i in kept), tuple(self.kv))
            self.kv_index = index.pin_memory().to(device, non_blocking=True)
        active = row_index(tuple(starts), tuple(layout.active_seqlens[i] for i in kept))
        self.active = active.pin_memory().to(device, non_blocking=True)


def plan_of(layout, device):
    return layout.memoised(("torch_flash", device), lambda: Plan(layout, device))


def forward(q_THD, k_SHD, v_SHD, *, layout, scale):
    if not layout.num_queries:
        return torch.empty_like(q_THD)
    return _forward(q_THD, k_SHD, v_SHD, plan_of(layout, q_THD.device), scale)[0]


def _keys(k, v, plan, heads, q):
    if plan.kv_index is not None:
        k, v = k.index_select(0, plan.kv_index), v.index_select(0, plan.kv_index)
    if q.dtype not in _HALF and heads != k.shape[1]:
        k, v = (x.repeat_interleave(heads // k.shape[1], 1) for x in (k, v))
    return k, v


def _forward(q, k, v, plan, scale):
    k, v = _keys(k, v, plan, q.shape[1], q)
    lengths = plan.cu_q, plan.cu_k, plan.max_q, plan.max_k
    if q.dtype in _HALF:
        return aten._flash_attention_forward(q, k, v, *lengths, 0.0, False, False, scale=scale)[:2]
    o, lse, *_ = aten._efficient_attention_forward(
        q[None], k[None], v[None], None, *lengths, 0.0, 0, True, scale=scale
    )
    return o[0], lse


def backward(do_AHP, q_AHP, k_SHP, v_SHP, *, layout, scale, o_AHP=None, lse_AH=None):
    kv_heads = k_SHP.shape[1]
    if not layout.num_active:
        empty = k_SHP.new_empty((0, *k_SHP.shape[1:]))
        return torch.empty_like(q_AHP), empty, torch.empty_like(empty)
    plan = plan_of(layout.active_only(), q_AHP.device)
    k, v = _keys(k_SHP, v_SHP, plan, q_AHP.shape[1], q_AHP)
    o, lse = _forward(q_AHP, k_SHP, v_SHP, plan, scale)
    none = torch.empty(0, dtype=torch.int64, device=q_AHP.device)
    lengths = plan.cu_q, plan.cu_k, plan.max_q, plan.max_k
    if q_AHP.dtype in _HALF:
        dq, dk, dv = aten._flash_attention_backward(
            do_AHP.contiguous(), q_AHP, k, v, o, lse, *lengths, 0.0, False, none, none, scale=scale
        )
    else:
        q, k, v, o, do = (x[None] for x in (q_AHP, k, v, o, do_AHP))
        dq, dk, dv, _ = aten._efficient_attention_backward(
            do, q, k, v, None, o, *lengths, lse, 0.0, none, none, 0, False, scale=scale
        )
        dq, dk, dv = dq[0], dk[0], dv[0]
    dk, dv = (x.index_select(0, plan.active) for x in (dk, dv))
    if dk.shape[1] != kv_heads:
        dk, dv = (x.unflatten(1, (kv_heads, -1)).sum(2) for x in (dk, dv))
    return dq, dk, dv


place.forward, place.backward = forward, backward
