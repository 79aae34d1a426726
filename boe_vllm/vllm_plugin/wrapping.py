"""Replacing one of vLLM's callables by ours around it, loudly where it is not what we expect."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from boe_vllm.vllm_plugin import versions

_WRAPPED = "_boe_vllm_wrapped"


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
        f"got {got}; install vLLM {versions.TESTED}"
    )
