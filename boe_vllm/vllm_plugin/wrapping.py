"""Replacing one of vLLM's callables by ours around it, as soon as its module has been imported, and
loudly where it is not what we expect."""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from boe_vllm.vllm_plugin import versions

_WRAPPED = "_boe_vllm_wrapped"

Callback = Callable[[ModuleType], None]


def wrap(
    owner: type | ModuleType,
    name: str,
    expected: set[str],
    make: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> None:
    """Replace `owner.name` by `make` of it, once.

    Raises:
        RuntimeError: when it does not exist or lacks one of the `expected` parameters.
    """
    place = owner.__name__ if isinstance(owner, ModuleType) else _full_name(owner)
    where = f"{place}.{name}"
    found = inspect.getattr_static(owner, name, None)
    function = getattr(found, "__func__", found)  # of a static or class method
    if is_wrapped(function):
        return
    if not inspect.isfunction(function):
        raise RuntimeError(_unexpected(where, "a function", repr(found)))
    parameters = set(inspect.signature(function).parameters)
    if not expected <= parameters:
        raise RuntimeError(_unexpected(where, f"parameters {sorted(expected)}", str(parameters)))
    wrapped = functools.wraps(function)(make(function))
    setattr(wrapped, _WRAPPED, True)
    method_type = type(found)
    setattr(owner, name, wrapped if method_type is type(function) else method_type(wrapped))


def is_wrapped(function: Any) -> bool:
    """Whether a callable is one of our wrappers."""
    return getattr(function, _WRAPPED, False)


def _full_name(owner: type) -> str:
    return f"{owner.__module__}.{owner.__qualname__}"


def _unexpected(where: str, expected: str, got: str) -> str:
    return (
        f"boe-vllm cannot hook into vLLM {versions.installed()}: expected {where} with {expected}, "
        f"got {got}; install vLLM {versions.EXPECTED}"
    )


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: it lets the other finders work and extends what they found."""

    def __init__(self) -> None:
        self.pending: dict[str, list[Callback]] = {}

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        callbacks = self.pending.pop(fullname, None)
        if callbacks is None:
            return None
        # No longer pending, so this search passes us by.
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            self.pending[fullname] = callbacks
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            try:
                execute(module)
            except BaseException:
                self.pending[fullname] = callbacks  # the import may be tried again
                raise
            for callback in callbacks:
                callback(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_finder = _Finder()


def when_imported(name: str, callback: Callback) -> None:
    """Call `callback(module)` now if module `name` is imported already, else right after it is.

    Args:
        name: absolute name of the module.
        callback: must be safe to run twice; what it raises reaches whoever imports the module.
    """
    module = sys.modules.get(name)
    # A module that is just being executed has no attributes to patch yet.
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        callback(module)
        return
    callbacks = _finder.pending.setdefault(name, [])
    if callback not in callbacks:
        callbacks.append(callback)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
