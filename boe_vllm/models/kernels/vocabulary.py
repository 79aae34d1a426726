"""Rows of logits normalised and summarised, and the gradient of their entropies.

Legend: as `plain`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from boe_vllm.models.kernels.common import exact_type

Tensor = torch.Tensor

_WIDE = 4096
"""Columns of a long row that a program takes at a time."""


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
            EXACT=exact_type(x_RV),
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
            EXACT=exact_type(logp_RV),
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
