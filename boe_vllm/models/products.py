"""Products of rows with frozen weights that give a row the same bits in any batch.

Libraries choose a kernel, and with it the order of summation, by the number of rows. A request
alone and the same request among others would then differ in last bits, and sometimes in a token.

Legend: `N` rows, `D` depth of the sum, `E` width of the result.
"""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path

import torch
import torch.nn.functional as F

from boe_vllm.models.functional import Scratch

Tensor = torch.Tensor
logger = logging.getLogger(__name__)

TILE = 64
"""Rows of a product of fixed size. Smaller ones read the weights more often, larger ones compute
more zero rows where few are asked for."""
_PROBED_ROWS = (0, 1, 24, 48, 49, 84, 176, 284, 496)  # beyond the fewest
_PROBED_WEIGHTS = ((96, 250), (512, 1536), (1536, 512), (4096, 1024))


def matmul_rows(
    x_ND: Tensor, weight_DE: Tensor, scratch: Scratch | None = None, *, out: Tensor | None = None
) -> Tensor:
    """`x @ weight`, [N, E]: each row's result is the same whatever the other rows are.

    With `scratch` the result lies in its memory and is gone with the next product given it; `out`
    is a place of its own. On CUDA this is what vLLM's batch-invariant mode is for, which replaces
    `mm` itself.
    """
    if x_ND.device.type != "cpu":
        product = x_ND @ weight_DE
        return product if out is None else out.copy_(product)
    if x_ND.dtype == torch.bfloat16 and weight_DE.stride(1) == 1 and not _has_fast_bfloat16():
        product = _widened(x_ND, weight_DE)
        return product if out is None else out.copy_(product)
    rows, least = len(x_ND), fewest_rows(x_ND.dtype, torch.get_num_threads())
    tile = TILE if least is None else max(rows, least)
    size = -(-rows // tile) * tile
    if size > rows:
        x_ND = F.pad(x_ND, (0, 0, 0, size - rows))
    if scratch is not None:
        place = scratch.like(x_ND, weight_DE.shape[1])
    elif out is not None and size == rows:
        place = out
    else:
        place = x_ND.new_empty(size, weight_DE.shape[1])
    for start in range(0, size, tile):
        part = slice(start, start + tile)
        torch.mm(x_ND[part], weight_DE, out=place[part])
    if out is None:
        return place[:rows]
    return out if place is out else out.copy_(place[:rows])


@functools.cache
def fewest_rows(dtype: torch.dtype, threads: int) -> int | None:
    """From how many rows on this CPU's whole products treat rows alike; None: from no number.

    Fewer are filled up with zero rows. Found by trying, since it depends on library, processor and
    threads. Half precision, where kernels change with nearly every number of rows, is not tried.
    """
    if dtype not in (torch.float32, torch.float64):
        return None
    least = 8 * threads  # below four rows a thread, kernels for vectors come in
    if all(_rows_are_alike(dtype, *shape, least) for shape in _PROBED_WEIGHTS):
        return least
    logger.info(
        "%s products on %d threads are made %d rows at a time: larger ones depend on the batch.",
        dtype,
        threads,
        TILE,
    )
    return None


def ask_for_equal_rows() -> None:
    """Ask Intel's library for its strict reproducible mode, which was seen to treat rows alike.
    What the user set stays.

    On other makers' processors the mode is not defined.
    """
    if _is_intel():
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def _is_intel() -> bool:
    described = Path("/proc/cpuinfo")
    return described.exists() and "GenuineIntel" in described.read_text()


ask_for_equal_rows()  # at import: the library reads it once, at a process's first product


def _rows_are_alike(dtype: torch.dtype, depth: int, width: int, least: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(least + max(_PROBED_ROWS), depth, generator=generator).to(dtype)
    weight = torch.randn(depth, width, generator=generator).to(dtype)
    for matrix in (weight, weight.t().contiguous().t()):
        whole = x @ matrix
        for rows in (least + more for more in _PROBED_ROWS):
            if not torch.equal(x[:rows] @ matrix, whole[:rows]):
                return False
    return True


@functools.cache
def _has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices by itself."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _widened(x_ND: Tensor, weight_DE: Tensor) -> Tensor:
    """The product made in float32, by slices of the weight of at most 64 MiB.

    Without bfloat16 instructions, torch multiplies by a row-major bfloat16 matrix (a backward's) 18
    times slower than this, where by a transposed one (a forward's) it is quick.
    """
    step = max(1, 2**24 // weight_DE.shape[1])
    total = torch.zeros(len(x_ND), weight_DE.shape[1], device=x_ND.device)
    for start in range(0, len(weight_DE), step):
        part = slice(start, start + step)
        total += matmul_rows(x_ND[:, part].float(), weight_DE[part].float())
    return total.to(x_ND.dtype)
