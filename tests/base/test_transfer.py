"""Many host arrays arrive as they were, parts of one allocation."""

import numpy as np
import pytest
import torch

from boe_vllm.base.transfer import to_device

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
    assert len({x.untyped_storage().data_ptr() for x in moved}) == 1


def test_nothing_and_only_empty_arrays_move():
    assert to_device([], torch.device("cpu")) == []
    (only,) = to_device([np.empty((0, 3), np.int64)], torch.device("cpu"))
    assert only.shape == (0, 3) and only.dtype == torch.int64
