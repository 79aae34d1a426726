"""Host arrays on their way to the device: what a pass needs travels together, in one copy.

A plain copy to a GPU waits until the GPU has done all its work so far, and with it the host, which
should be ahead of it. A copy from pinned memory does not. On a CPU nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

Tensor = torch.Tensor

_ALIGNMENT = 16
"""Bytes; arrays begin at multiples of it, whatever their dtypes."""


class Arrival:
    """An array that has been announced to a transfer."""

    __slots__ = ("_host", "_tensor", "_transfer")

    def __init__(self, host: Tensor, transfer: Transfer | None) -> None:
        """Of a host tensor; without a transfer it is already where it is wanted."""
        self._host, self._transfer = host, transfer
        self._tensor = host if transfer is None else None

    @property
    def tensor(self) -> Tensor:
        """The array on the device. The first use sends it, with all that is announced by then."""
        if self._tensor is None:
            assert self._transfer is not None
            self._transfer.send()
        assert self._tensor is not None
        return self._tensor


class Transfer:
    """What goes to one device together: announce every array first, then use the tensors."""

    def __init__(self, device: torch.device) -> None:
        """To a device; on the CPU tensors are views of the arrays."""
        self.device = device
        self._announced: list[Arrival] = []

    def add(self, values: np.ndarray, dtype: torch.dtype | None = None) -> Arrival:
        """Announce an array.

        Args:
            values: of any shape; not to be changed until it is used.
            dtype: on the device; None for the array's own.
        """
        host = torch.from_numpy(values)
        if dtype is not None:
            host = host.to(dtype)
        if self.device.type == "cpu":
            return Arrival(host, None)
        arrival = Arrival(host, self)
        self._announced.append(arrival)
        return arrival

    def send(self) -> None:
        """Send what has been announced and not sent yet: one copy, for which nobody waits."""
        going, self._announced = self._announced, []
        starts, total = [], 0
        for arrival in going:
            starts.append(total)
            total += -(-arrival._host.nbytes // _ALIGNMENT) * _ALIGNMENT
        # The allocator of pinned memory keeps the memory until the copy has been made.
        pinned = torch.empty(total, dtype=torch.uint8, pin_memory=True)
        for arrival, start in zip(going, starts, strict=True):
            _part(pinned, start, arrival._host).copy_(arrival._host)
        arrived = pinned.to(self.device, non_blocking=True)
        for arrival, start in zip(going, starts, strict=True):
            arrival._tensor = _part(arrived, start, arrival._host)
            arrival._transfer = None


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Some arrays on a device, of their own shapes and dtypes, in one copy."""
    transfer = Transfer(device)
    arrivals = [transfer.add(array) for array in arrays]
    return [arrival.tensor for arrival in arrivals]


def _part(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    """The bytes from `start` on as a tensor like another one."""
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)
