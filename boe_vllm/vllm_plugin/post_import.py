"""Run a callback on a module once it has been imported, without importing it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

Callback = Callable[[ModuleType], None]


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: it lets the other finders work and extends what they found."""

    def __init__(self) -> None:
        self.pending: dict[str, Callback] = {}

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        callback = self.pending.pop(fullname, None)
        if callback is None:
            return None
        # No longer pending, so this search passes us by.
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            self.pending[fullname] = callback
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            try:
                execute(module)
            except BaseException:
                self.pending[fullname] = callback  # the import may be tried again
                raise
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
    _finder.pending[name] = callback
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
