"""Host arrays arrive as they were: in one copy on a device, without any on the CPU."""

import numpy as np
import pytest
import torch
from pretended_counts import BLOCKING, LAUNCH, NON_BLOCKING
from pretended_cuda import CUDA, PretendedDevice

from boe_vllm.base.transfer import Transfer, to_device

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
def test_arrays_keep_shape_dtype_and_values(device):
    arrays = [
        np.arange(5, dtype=np.int32),
        np.empty(0, np.int64),
        np.arange(12.0).reshape(3, 4),
        np.arange(12).reshape(3, 4).T,
        np.array([True, False, True]),
        np.arange(3, dtype=np.float32),
    ]
    moved = to_device(arrays, torch.device(device))
    for array, tensor in zip(arrays, moved, strict=True):
        assert tensor.device.type == device
        assert torch.equal(tensor.cpu(), torch.from_numpy(np.ascontiguousarray(array)))
    places = {x.untyped_storage().data_ptr() for x in moved}
    if device == "cpu":
        assert places >= {array.ctypes.data for array in arrays if array.size}
    else:
        assert len(places) == 1


def test_nothing_and_only_empty_arrays_move():
    assert to_device([], torch.device("cpu")) == []
    (only,) = to_device([np.empty((0, 3), np.int64)], torch.device("cpu"))
    assert only.shape == (0, 3) and only.dtype == torch.int64


def test_arrays_that_are_announced_travel_together():
    device = PretendedDevice()
    with device:
        transfer = Transfer(CUDA)
        first, second = transfer.add(np.arange(3)), transfer.add(np.eye(2), torch.bfloat16)
        assert not device.counts.total(NON_BLOCKING)
        assert second.tensor.tolist() == [[1, 0], [0, 1]] and second.tensor.dtype == torch.bfloat16
        assert first.tensor.tolist() == [0, 1, 2] and first.tensor.device == CUDA
        assert device.counts.total(NON_BLOCKING) == 1
        assert transfer.add(np.ones(1)).tensor.tolist() == [1]
    assert device.counts.total(NON_BLOCKING) == 2
    assert device.counts.total(BLOCKING, LAUNCH) == 0
