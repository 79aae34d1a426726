"""A pretended CUDA device for machines without one: tensors say `cuda:0` and compute on the CPU.

Values are real, and with them every decision that follows from them. What fails on a GPU fails
here: operations on tensors of two devices (CPU scalars are allowed, as on CUDA). What costs time on
a GPU whatever its tensors hold is counted, by line of the package: kernel launches and copies.

A launch is one PyTorch operation on the device that is neither a view nor an allocation. A custom
operator of the package (`torch.library.custom_op`, namespace `boe_vllm`) is one launch, and so are
PyTorch's attention kernels (`pretended_attention`), since each is one kernel on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import pretended_attention
import pretended_library as library
import torch
from pretended_counts import (
    BLOCKING,
    DATA_SIZE,
    LAUNCH,
    NON_BLOCKING,
    READ,
    TO_HOST,
    Counts,
    line_of_package,
)
from torch.utils._python_dispatch import TorchDispatchMode

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")

_READS = {"_local_scalar_dense", "item", "equal", "is_nonzero"}
_DATA_SIZES = {
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "unique_consecutive",
    "repeat_interleave.Tensor",
}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
_ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
_VIEWS = {"detach", "alias", "lift_fresh", "_unsafe_view", "_reshape_alias"}
_UNSUPPORTED = {"squeeze_", "unsqueeze_", "t_", "transpose_", "resize_", "set_", "as_strided_"}
"""They change a tensor's sizes in place, which a wrapper's do not follow."""


class DeviceMismatch(RuntimeError):
    """One operation got tensors of two devices."""


class Pretended(torch.Tensor):
    """A tensor that says `cuda:0` and holds one of the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Pretended:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=CUDA,
            requires_grad=False,
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _device.run(func, args, kwargs or {})

    def __repr__(self):
        return f"Pretended({self.held})"

    # PyTorch's own versions of these ask a CUDA library for its current device.

    def __getitem__(self, index):
        return library.getitem(self, index)

    def __setitem__(self, index, value):
        library.setitem(self, index, value)

    def item(self):
        return torch.ops.aten._local_scalar_dense.default(self)

    def __float__(self):
        return float(self.item())

    def __int__(self):
        return int(self.item())

    def __bool__(self):
        return bool(self.item())

    def __index__(self):
        return int(self.item())

    def tolist(self):
        return self.cpu().tolist()

    def __iter__(self):
        return iter(self.unbind(0))


class PretendedDevice(TorchDispatchMode):
    """The device: entered as a context, it runs and counts what is done on it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self._pinned: set[int] = set()
        self._patches = contextlib.ExitStack()

    def __enter__(self):
        global _device
        _device = self
        self._patches.enter_context(library.without_cuda_library())
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    # ---- one operation -------------------------------------------------------------------------

    def run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Do an operation on the tensors held, and count what it is."""
        name, tensors = _name(func), _tensors([*args, *kwargs.values()])
        ours = [x for x in tensors if isinstance(x, Pretended)]
        if ours and name in _UNSUPPORTED:
            raise NotImplementedError(f"the pretended device has no {name}")
        on_device = self._place(name, args, kwargs, tensors, ours)
        if ours:
            self._note_waits(name, func, args)
        result = self._compute(func, args, kwargs)
        if not on_device:
            self._note_pinned(name, kwargs, result)
            return result
        if _launches(func, name, result) and not self._is_copy(name, args, ours):
            self.counts.note(LAUNCH)
        known = {id(x.held): x for x in ours}
        return _mapped(lambda x: _wrapped(x, known), result)

    def _place(
        self,
        name: str,
        args: tuple,
        kwargs: dict[str, Any],
        tensors: list[torch.Tensor],
        ours: list[Pretended],
    ) -> bool:
        """Whether the result lies on the device; notes copies, refuses two devices."""
        wanted = kwargs.get("device")
        target = None if wanted is None else torch.device(wanted)
        if name == "_to_copy":
            here = target.type == "cuda" if target is not None else bool(ours)
            if here != bool(ours):
                self._note_copy(tensors[0], here, bool(kwargs.get("non_blocking")))
            return here
        if name == "copy_":
            into, source = args[:2]
            here = isinstance(into, Pretended)
            if here != isinstance(source, Pretended):
                self._note_copy(source, here, len(args) > 2 and bool(args[2]))
            return here
        plain = [x for x in tensors if not isinstance(x, Pretended)]
        if ours and any(x.dim() for x in plain):
            shapes = [(tuple(x.shape), str(x.device)) for x in tensors]
            raise DeviceMismatch(
                f"{name} at {line_of_package()}: expected one device, got {shapes}"
            )
        return bool(ours) or (target is not None and target.type == "cuda")

    def _compute(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        held_args = _mapped(_held, args)
        held_kwargs = {key: _mapped(_held, value) for key, value in kwargs.items()}
        if held_kwargs.get("pin_memory"):
            held_kwargs["pin_memory"] = False
        if _name(func) == "_pin_memory":
            return held_args[0].clone()
        stand_ins = library.STAND_INS | pretended_attention.STAND_INS
        return stand_ins.get(func, func)(*held_args, **held_kwargs)

    # ---- notes ---------------------------------------------------------------------------------

    def _note_copy(self, source: torch.Tensor, to_device: bool, non_blocking: bool) -> None:
        if not source.numel():
            return
        if not to_device:
            self.counts.note(TO_HOST)
        elif non_blocking and source.untyped_storage().data_ptr() in self._pinned:
            self.counts.note(NON_BLOCKING)
        else:  # from pageable memory the driver may wait, whatever was asked for
            self.counts.note(BLOCKING)

    def _note_pinned(self, name: str, kwargs: dict[str, Any], result: Any) -> None:
        """Remember which memory of the host is pinned; memory that is made anew is not."""
        if not isinstance(result, torch.Tensor) or name not in {*_ALLOCATIONS, "_pin_memory"}:
            return
        place = result.untyped_storage().data_ptr()
        pinned = name == "_pin_memory" or bool(kwargs.get("pin_memory"))
        (self._pinned.add if pinned else self._pinned.discard)(place)

    def _note_waits(self, name: str, func: Any, args: tuple) -> None:
        """What makes the host wait for the device: values that it must know."""
        if name in _READS:
            self.counts.note(READ)
        if name in _DATA_SIZES or f"{name}.{func._overloadname}" in _DATA_SIZES:
            self.counts.note(DATA_SIZE)
        if name in _INDEXING and isinstance(args[1], list | tuple):
            if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
                self.counts.note(DATA_SIZE)

    def _is_copy(self, name: str, args: tuple, ours: list[Pretended]) -> bool:
        """A copy from the host, which has been noted as such."""
        if name == "_to_copy":
            return not ours
        return name == "copy_" and not isinstance(args[1], Pretended)


_device = PretendedDevice()


def move(model: torch.nn.Module) -> torch.nn.Module:
    """Put all parameters and buffers of a network onto the pretended device, in place."""
    seen: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, own in module._parameters.items():
            if own is not None:
                made = torch.nn.Parameter(Pretended(own.data), requires_grad=False)
                module._parameters[name] = seen.setdefault(id(own), made)
        for name, own in module._buffers.items():
            if own is not None:
                module._buffers[name] = Pretended(own)
    return model


def _name(func: Any) -> str:
    return func._schema.name.split("::")[-1]


def _launches(func: Any, name: str, result: Any) -> bool:
    """Whether an operation on the device starts a kernel."""
    if name in _ALLOCATIONS or name in _VIEWS or name in _READS:
        return False
    if any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
        return False  # a view
    made = _tensors([result])
    return not made or any(x.numel() for x in made)


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    """All tensors among some values, and in lists of them."""
    found: list[torch.Tensor] = []
    for x in values:
        if isinstance(x, torch.Tensor):
            found.append(x)
        elif isinstance(x, list | tuple):
            found += _tensors(x)
    return found


def _mapped(change: Callable[[Any], Any], x: Any) -> Any:
    """A value changed, or every entry of a list or tuple."""
    if isinstance(x, list | tuple):
        return type(x)(_mapped(change, entry) for entry in x)
    return change(x)


def _held(x: Any) -> Any:
    if isinstance(x, Pretended):
        return x.held
    return CPU if isinstance(x, torch.device) else x


def _wrapped(x: Any, known: dict[int, Pretended]) -> Any:
    if not isinstance(x, torch.Tensor) or isinstance(x, Pretended):
        return x
    return known[id(x)] if id(x) in known else Pretended(x)
