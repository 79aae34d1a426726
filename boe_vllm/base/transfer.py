"""One copy to the device for many host arrays, which the host does not wait for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_ALIGNMENT = 8
"""Bytes: every array begins where its elements may lie."""


def to_device(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[torch.Tensor]:
    """The arrays as tensors of the same shapes and dtypes on `device`, parts of one allocation.

    To a CUDA device they go through pinned memory in a single copy; one copy each from pageable
    memory would make the host wait for everything that the device has yet to do.

    Args:
        arrays: of numbers.
        device: where to.
    """
    starts, size = [], 0
    for array in arrays:
        starts.append(size)
        size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    packed = np.zeros(max(size, _ALIGNMENT), np.uint8)
    for array, start in zip(arrays, starts, strict=True):
        packed[start : start + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).ravel()
    host = torch.from_numpy(packed)
    if device.type == "cuda":
        host = host.pin_memory()
    moved = host.to(device, non_blocking=True)
    return [
        moved[start : start + array.nbytes]
        .view(torch.from_numpy(np.empty(0, array.dtype)).dtype)
        .view(array.shape)
        for array, start in zip(arrays, starts, strict=True)
    ]
