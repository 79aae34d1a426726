"""Triton kernels of the row-wise pieces: one launch each, and rows that know nothing of each other.

What sums along a row gives the whole row to one program, so that the order of its sums depends on
the width alone. Widths and strides are constants of a kernel; the number of rows is only that of
its programs. `plain` has the same arithmetic. Triton's interpreter (`TRITON_INTERPRET=1`) runs the
kernels on a CPU, for tests.
"""

from boe_vllm.models.kernels.activation import swiglu, swiglu_backward
from boe_vllm.models.kernels.norm import add_rms_norm, rms_norm, rms_norm_backward
from boe_vllm.models.kernels.rotation import join_rotated_back, split_rotated
from boe_vllm.models.kernels.rows import chosen_rows
from boe_vllm.models.kernels.vocabulary import entropy_gradient_, normalise_

__all__ = [
    "add_rms_norm",
    "chosen_rows",
    "entropy_gradient_",
    "join_rotated_back",
    "normalise_",
    "rms_norm",
    "rms_norm_backward",
    "split_rotated",
    "swiglu",
    "swiglu_backward",
]
