"""The row-wise pieces as operators of PyTorch, `torch.ops.boe_vllm.*`: on a GPU one launch each.

Their implementation for CUDA is a kernel of Triton, or, where Triton is not installed or not
wanted, a piece that PyTorch compiles, or that of the CPU. For CPU tensors it is `plain`; the
network on a CPU does not come by here (`functional`), but a test device that says CUDA does.

The environment variable `BOE_VLLM_NO_TRITON` switches kernels off: names of operators, separated by
commas, or `all`. It is read when this module is imported.

Legend: as `plain`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from boe_vllm.models import plain

Tensor = torch.Tensor

NO_TRITON = "BOE_VLLM_NO_TRITON"

SCHEMAS = {
    "rms_norm": "(Tensor x, Tensor weight, float eps) -> Tensor",
    "add_rms_norm": "(Tensor x, Tensor add, Tensor weight, float eps) -> (Tensor, Tensor)",
    "rms_norm_backward": (
        "(Tensor dy, Tensor x, Tensor weight, float eps, Tensor? beside) -> Tensor"
    ),
    "split_rotated": "(Tensor qkv, Tensor tables, int heads, int kv_heads) -> (Tensor, Tensor)",
    "join_rotated_back": "(Tensor dq, Tensor dk, Tensor dv, Tensor tables) -> Tensor",
    "swiglu": "(Tensor gate_up) -> Tensor",
    "swiglu_backward": "(Tensor dy, Tensor gate_up) -> Tensor",
    "chosen_rows": (
        "(Tensor keys, Tensor values, Tensor new_keys, Tensor new_values, Tensor index) -> Tensor"
    ),
    "normalise_": "(Tensor(a!) logits) -> (Tensor, Tensor, Tensor, Tensor)",
    "entropy_gradient_": "(Tensor logp, Tensor(a!) out) -> ()",
}
"""Every operator: its arguments are those of the function of its name."""


_PLAIN: Mapping[str, Callable[..., Any]] = {
    "rms_norm": plain.rms_norm,
    "add_rms_norm": lambda x, *others: plain.add_rms_norm_(x.clone(), *others),
    "rms_norm_backward": plain.rms_norm_backward,
    "split_rotated": plain.split_rotated,
    "join_rotated_back": plain.join_rotated_back,
    "swiglu": lambda gate_up: plain.swiglu_(gate_up.clone()),
    "swiglu_backward": plain.swiglu_backward,
    "chosen_rows": plain.chosen_rows,
    "normalise_": plain.normalise_,
    "entropy_gradient_": plain.entropy_gradient_,
}


def _triton() -> Mapping[str, Callable[..., Any]]:
    """Operators by Triton; none where it is not installed."""
    try:
        from boe_vllm.models import kernels
    except ImportError:
        return {}
    names = SCHEMAS.keys() - unwanted(os.environ.get(NO_TRITON, ""))
    return {name: getattr(kernels, name) for name in names}


def unwanted(names: str) -> set[str]:
    """The operators that `BOE_VLLM_NO_TRITON` names.

    Raises:
        ValueError: for one that there is not.
    """
    found = {name.strip() for name in names.split(",")} - {""}
    if found == {"all"}:
        return set(SCHEMAS)
    if not found <= SCHEMAS.keys():
        raise ValueError(
            f"{NO_TRITON}: expected all, or names of {', '.join(SCHEMAS)} separated by commas, got "
            f"{names!r}; leave it unset to use every kernel"
        )
    return found


def _compiled() -> Mapping[str, Callable[..., Any]]:
    """Operators by PyTorch's compiler."""
    from boe_vllm.models import compiled

    return {name: getattr(compiled, name) for name in compiled.PIECES}


def for_cuda() -> dict[str, Callable[..., Any]]:
    """Every operator on CUDA."""
    return {**_PLAIN, **_compiled(), **_triton()}


_library = torch.library.Library("boe_vllm", "FRAGMENT")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, _PLAIN[_name], "CPU")
for _name, _function in for_cuda().items():
    _library.impl(_name, _function, "CUDA")

# The operators as functions.
_operators = torch.ops.boe_vllm
rms_norm = _operators.rms_norm.default
add_rms_norm = _operators.add_rms_norm.default
rms_norm_backward = _operators.rms_norm_backward.default
split_rotated = _operators.split_rotated.default
join_rotated_back = _operators.join_rotated_back.default
swiglu = _operators.swiglu.default
swiglu_backward = _operators.swiglu_backward.default
chosen_rows = _operators.chosen_rows.default
normalise_ = _operators.normalise_.default
entropy_gradient_ = _operators.entropy_gradient_.default
