"""Products of rows with the matrix of the group that each row belongs to, for routed MLPs.

On CUDA in half precision all groups are one kernel of PyTorch (`torch.nn.functional.grouped_mm`),
and how many rows each group has stays on the device. Elsewhere the groups are multiplied one by
one. vLLM's fused experts are no substitute: their tiles change with the number of rows, they weigh
and add up in an order of their own, and they keep nothing for a backward.

Legend: `M` rows in the order of their groups, `X` groups, `D` depth of the sum, `E` width of the
result, `N` rows, `K` choices of a row.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from boe_vllm.models.products import matmul_rows

Tensor = torch.Tensor

FEWEST = 256
"""Rows that a grouped kernel gets at least: PyTorch chooses its tiles by whether there are more
than 128, and a row alone is to have the tiles that it has among many."""
ALIGNMENT = 8
"""Channels that a grouped kernel's depth and width must be a multiple of."""


@dataclasses.dataclass(frozen=True, slots=True)
class Groups:
    """Which rows each group has, once every row has been copied to each of its choices."""

    order_M: Tensor
    """The numbers of the N x K choices, int64, those of each group together in their order."""
    ends_X: Tensor
    """Rows of this and all groups before it, int32."""

    @classmethod
    def of(cls, chosen_NK: Tensor, groups: int) -> Groups:
        """By the number of the group that each row chose, without a word to the host."""
        ordered_M, order_M = chosen_NK.flatten().sort(stable=True)
        numbers_X = torch.arange(groups, device=chosen_NK.device, dtype=chosen_NK.dtype)
        ends_X = torch.searchsorted(ordered_M, numbers_X, right=True, out_int32=True)
        return cls(order_M, ends_X)

    def put_back(self, x_ME: Tensor) -> Tensor:
        """The rows in the order of the choices, [M, E]."""
        return torch.empty_like(x_ME).index_copy_(0, self.order_M, x_ME)


def matmul_groups(x_MD: Tensor, weights_XDE: Tensor, groups: Groups) -> Tensor:
    """Each row times its group's matrix, [M, E]: the same whatever the other rows are.

    Args:
        x_MD: the rows in the order of their groups.
        weights_XDE: a matrix for each group, row-major or transposed.
        groups: which rows are whose.
    """
    if _has_kernel(x_MD, weights_XDE):
        missing = max(0, FEWEST - len(x_MD))
        filled = F.pad(x_MD, (0, 0, 0, missing)) if missing else x_MD
        return F.grouped_mm(filled, weights_XDE, offs=groups.ends_X)[: len(x_MD)]
    return matmul_groups_one_by_one(x_MD, weights_XDE, groups)


def matmul_groups_one_by_one(x_MD: Tensor, weights_XDE: Tensor, groups: Groups) -> Tensor:
    """`matmul_groups` by a product for every group that has rows."""
    out = x_MD.new_empty(len(x_MD), weights_XDE.shape[2])
    start = 0
    for group, end in enumerate(groups.ends_X.tolist()):
        if end > start:
            out[start:end] = matmul_rows(x_MD[start:end], weights_XDE[group])
        start = end
    return out


def _has_kernel(x_MD: Tensor, weights_XDE: Tensor) -> bool:
    """Whether PyTorch multiplies all groups in one kernel; other products it makes one by one."""
    aligned = not any(size % ALIGNMENT for size in weights_XDE.shape[1:])
    return x_MD.is_cuda and x_MD.dtype == torch.bfloat16 and aligned
