"""Products of rows with frozen weights that give a row the same bits in any batch.

Libraries choose a kernel, and with it the order of summation, by the number of rows. A request
alone and the same request among others would then differ in last bits, and sometimes in a token.
So it is tried out, here and now, from how many rows on a library treats them all alike; fewer are
filled up with zero rows, and where there is no such number, products are made in tiles of fixed
size. vLLM's batch-invariant mode is no substitute: on Hopper it leaves `mm` as it is.

Legend: `N` any rows, `D` depth of the sum, `E` width of the result.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from boe_vllm.models.functional import Scratch

Tensor = torch.Tensor
logger = logging.getLogger(__name__)

TILE = {"cpu": 64, "cuda": 256}
"""Rows of a product of fixed size, by type of device. Smaller ones read the weights more often,
larger ones compute more zero rows where few are asked for."""
_PROBED_ROWS = (0, 1, 24, 48, 49, 84, 176, 284, 496)  # beyond the fewest
_PROBED_WEIGHTS = ((96, 250), (512, 1536), (1536, 512), (4096, 1024))
_CUDA_FEWEST = (64, 128, 256, 384, 512)
_CUDA_MOST = 4096
_CUDA_PROBED_ROWS = (*_PROBED_ROWS, 900, 1500, 2040, 3000)
_CUDA_PROBED_BYTES = 2**29


@dataclasses.dataclass(slots=True)
class ProductSettings:
    """What holds for all products of this process."""

    row_invariant: bool = True
    """Whether a row's product is the same whatever rows are beside it. Without it libraries get
    all rows at once, which saves the filled up ones."""


settings = ProductSettings()


@dataclasses.dataclass(frozen=True, slots=True)
class RowRange:
    """Between which numbers of rows a library's product of one shape treats all rows alike."""

    fewest: int
    most: int | None
    """None for any number."""


def matmul_rows(
    x_ND: Tensor,
    weight_DE: Tensor,
    scratch: Scratch | None = None,
    *,
    out: Tensor | None = None,
    float32: bool = False,
) -> Tensor:
    """`x @ weight`, [N, E]: each row's result is the same whatever the other rows are.

    Args:
        x_ND: the rows.
        weight_DE: a matrix, row-major or transposed.
        scratch: where the result lies, gone with the next product given it.
        out: a place of its own for it.
        float32: whether a result of half precision is wanted as CUDA's kernels have it before they
            round it; the CPU's have no such thing, and theirs stays in x's dtype.
    """
    if not x_ND.is_cuda and _is_slow(x_ND, weight_DE):
        product = _widened(x_ND, weight_DE)
        return product if out is None else out.copy_(product)
    wide = float32 and x_ND.is_cuda and x_ND.dtype.itemsize == 2
    dtype = torch.float32 if wide else x_ND.dtype
    pieces = _pieces(x_ND, weight_DE, dtype)
    rows, size = len(x_ND), sum(pieces)
    if size > rows:
        x_ND = F.pad(x_ND, (0, 0, 0, size - rows))
    if scratch is not None:
        place = scratch.like(x_ND, weight_DE.shape[1], dtype)
    elif out is not None and size == rows:
        place = out
    else:
        place = x_ND.new_empty(size, weight_DE.shape[1], dtype=dtype)
    start = 0
    for piece in pieces:
        part = slice(start, start + piece)
        _multiply(x_ND[part], weight_DE, out=place[part])
        start += piece
    if out is None:
        return place[:rows]
    return out if place is out else out.copy_(place[:rows])


def _multiply(x_ND: Tensor, weight_DE: Tensor, *, out: Tensor) -> Tensor:
    """The library's product, in the dtype of `out`."""
    if out.dtype == x_ND.dtype:
        return torch.mm(x_ND, weight_DE, out=out)
    return torch.mm(x_ND, weight_DE, out_dtype=out.dtype, out=out)


def _pieces(x_ND: Tensor, weight_DE: Tensor, dtype: torch.dtype) -> Sequence[int]:
    """Rows of each of the library's products that make one of ours; zero rows at the end count."""
    rows = len(x_ND)
    if not settings.row_invariant:
        return [rows]
    if x_ND.is_cuda:
        alike = _cuda_range(weight_DE, dtype)
    else:
        least = fewest_rows(x_ND.dtype, torch.get_num_threads())
        alike = None if least is None else RowRange(least, None)
    return split(rows, alike, TILE[x_ND.device.type])


def split(rows: int, alike: RowRange | None, tile: int) -> list[int]:
    """Pieces of so many rows or a few more, all within the range; without one, tiles."""
    if alike is None:
        return [tile] * -(-rows // tile)
    most = alike.most or max(rows, 1)
    whole, rest = divmod(rows, most)
    last = [max(rest, alike.fewest)] if rest else []
    return [max(most, alike.fewest)] * whole + last


@functools.cache
def fewest_rows(dtype: torch.dtype, threads: int) -> int | None:
    """From how many rows on this CPU's whole products treat rows alike; None: from no number.

    Found by trying, since it depends on library, processor and threads. Half precision, where
    kernels change with nearly every number of rows, is not tried.
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
        TILE["cpu"],
    )
    return None


_cuda_ranges: dict[tuple[object, ...], RowRange | None] = {}


def _cuda_range(weight_DE: Tensor, dtype: torch.dtype) -> RowRange | None:
    """The range for a weight on its CUDA device, found when first asked for; None if there is none.

    Args:
        weight_DE: the shape, the layout and the dtype count.
        dtype: of the result.
    """
    key = (weight_DE.device, weight_DE.dtype, dtype, weight_DE.shape, weight_DE.stride())
    if key not in _cuda_ranges:
        _cuda_ranges[key] = found = probe_range(weight_DE, dtype)
        if found is None:
            logger.info(
                "%s products of depth %d and width %d are made %d rows at a time: larger ones "
                "depend on the batch.",
                weight_DE.dtype,
                *weight_DE.shape,
                TILE["cuda"],
            )
    return _cuda_ranges[key]


def probe_range(weight_DE: Tensor, dtype: torch.dtype) -> RowRange | None:
    """Try products with a weight: the range in which rows are treated alike, or None.

    Args:
        weight_DE: any values but zeros.
        dtype: of the result; with the weight's width it bounds the rows that are tried.
    """
    depth, width = weight_DE.shape
    most = min(_CUDA_MOST, _CUDA_PROBED_BYTES // (width * dtype.itemsize))
    generator = torch.Generator(device=weight_DE.device).manual_seed(0)
    x = torch.randn(most, depth, generator=generator, device=weight_DE.device)
    x = x.to(weight_DE.dtype)
    place = torch.empty(most, width, dtype=dtype, device=weight_DE.device)
    whole = _multiply(x, weight_DE, out=place)
    tried = {fewest + more for fewest in _CUDA_FEWEST for more in _CUDA_PROBED_ROWS}
    found = None
    for rows in sorted((n for n in tried if n <= most), reverse=True):
        last = x[most - rows :].clone()  # in other places than before, and aligned as rows are
        part = _multiply(last, weight_DE, out=torch.empty_like(place[:rows]))
        if not torch.equal(part, whole[most - rows :]):
            break
        found = rows if rows in _CUDA_FEWEST else found
    return None if found is None else RowRange(found, most)


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


def _is_slow(x_ND: Tensor, weight_DE: Tensor) -> bool:
    """Whether torch multiplies by this matrix more slowly than its float32 parts together."""
    row_major = weight_DE.stride(1) == 1
    return x_ND.dtype == torch.bfloat16 and row_major and not _has_fast_bfloat16()


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
