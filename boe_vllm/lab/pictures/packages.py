"""Packages that pictures need and the core does not."""

from __future__ import annotations

import importlib.util


def require(*names: str) -> None:
    """Refuse to go on without some packages.

    Raises:
        ValueError: naming those that are missing and how to install them.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"pictures: expected the packages {', '.join(names)}, got no {', '.join(missing)}; "
            f"pip install 'boe-vllm[eval]'"
        )
