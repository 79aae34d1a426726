"""What asks for a CUDA library, done without one on the pretended device.

`x[...]`, `x[...] = y` and `torch.tensor` go by the same aten operations as PyTorch's own, which
begin with a device guard that a build for the CPU does not have for CUDA.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch

from boe_vllm.attention import xformers
from boe_vllm.attention.api import explain_auto
from boe_vllm.models import products

aten = torch.ops.aten
_tensor = torch.tensor


def _wide_product(
    x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype, *, out: torch.Tensor
) -> torch.Tensor:
    """`torch.mm(x, y, out_dtype=dtype, out=out)`, which the CPU does not have."""
    return torch.mm(x.to(dtype), y.to(dtype), out=out)


STAND_INS = {aten.mm.dtype_out: _wide_product}

_ALIKE = products.RowRange(64, None)
"""What trying out products would find on a GPU; here it would be counted as part of a step."""


def getitem(x: torch.Tensor, index: Any) -> torch.Tensor:
    """`x[index]`."""
    view, tensors = _view(x, index)
    if tensors:
        return aten.index.Tensor(view, tensors)
    return aten.alias.default(view) if view is x else view


def setitem(x: torch.Tensor, index: Any, value: Any) -> None:
    """`x[index] = value`."""
    view, tensors = _view(x, index)
    if not isinstance(value, torch.Tensor):
        if not tensors:
            aten.fill_.Scalar(view, value)
            return
        value = torch.full((), value, dtype=x.dtype, device=x.device)
    if tensors:
        aten.index_put_.default(view, tensors, value)
    else:
        aten.copy_.default(view, value)


def tensor(data: Any, *, dtype: Any = None, device: Any = None, pin_memory: bool = False) -> Any:
    """`torch.tensor`: made on the host, and a blocking copy if it goes elsewhere."""
    if device is None or torch.device(device).type == "cpu":
        made = _tensor(data, dtype=dtype)
        return made.pin_memory() if pin_memory else made
    array = np.asarray(data)
    if dtype is None and array.dtype == np.float64:
        dtype = torch.get_default_dtype()
    made = torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))
    return made.to(device=device, dtype=dtype or made.dtype)


def as_tensor(data: Any, dtype: Any = None, device: Any = None) -> torch.Tensor:
    """`torch.as_tensor`."""
    if isinstance(data, torch.Tensor):
        return data.to(device=device or data.device, dtype=dtype or data.dtype)
    return tensor(data, dtype=dtype, device=device)


@contextlib.contextmanager
def without_cuda_library() -> Iterator[None]:
    """Replace the functions that ask for it; xformers, which needs it, is said not to run."""
    torch._C._ensureCUDADeviceGuardSet()
    explain_auto.cache_clear()
    with (
        mock.patch("torch.cuda._lazy_init", lambda: None),
        mock.patch("torch.cuda.current_device", lambda: 0),
        mock.patch("torch.tensor", tensor),
        mock.patch("torch.as_tensor", as_tensor),
        mock.patch.object(xformers, "refusal", lambda *_: "the device is pretended"),
        mock.patch.object(products, "_cuda_ranges", {}),
        mock.patch.object(products, "probe_range", lambda *_: _ALIKE),
    ):
        yield
    explain_auto.cache_clear()


def _view(x: torch.Tensor, index: Any) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """The view that slices, integers and None give, and the index tensors that are left."""
    index = list(index) if isinstance(index, tuple) else [index]
    used = sum(i is not None and i is not Ellipsis for i in index)
    rest = [slice(None)] * (x.dim() - used)
    dots = next((n for n, i in enumerate(index) if i is Ellipsis), len(index))
    tensors: list[torch.Tensor | None] = []
    dim = 0
    for i in [*index[:dots], *rest, *index[dots + 1 :]]:
        if i is None:
            x = x.unsqueeze(dim)
        elif isinstance(i, slice):
            if i != slice(None):
                start = None if i.start is None else int(i.start)
                stop = None if i.stop is None else int(i.stop)
                x = aten.slice.Tensor(x, dim, start, stop, i.step or 1)
        elif isinstance(i, torch.Tensor):
            tensors.append(i)
            dim += 1
            continue
        else:
            x = aten.select.int(x, dim, int(i))
            continue
        tensors.append(None)
        dim += 1
    while tensors and tensors[-1] is None:
        tensors.pop()
    return x, tensors
