"""Rows of keys and values by index, from two places.

Legend: as `plain`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from boe_vllm.models.kernels.common import ELEMENTS

Tensor = torch.Tensor


def chosen_rows(
    keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, index_N: Tensor
) -> Tensor:
    """`plain.chosen_rows`."""
    shape = keys.shape[1:]
    width = shape.numel()
    out = keys.new_empty(2, len(index_N), *shape)
    if len(index_N):
        _chosen_rows[(len(index_N), triton.cdiv(width, ELEMENTS))](
            *(x.contiguous() for x in (keys, values, new_keys, new_values)),
            index_N,
            *out.unbind(),
            len(keys),
            W=width,
            BLOCK=ELEMENTS,
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
