"""What the kernels share.

Legend: as `plain`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

ELEMENTS = 1024
"""Elements of a program where none depends on another."""


def exact_type(x: torch.Tensor) -> Any:
    """The type that a kernel computes in."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32
