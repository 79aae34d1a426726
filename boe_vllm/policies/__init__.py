"""Unmasking policies: one file each, behind the contract in `base`.

`policy name -> module` is the registry. A module defines one subclass of `Policy`; it is imported
when the policy is first used. Installed packages may add policies of their own (entry points in the
group `boe_vllm.policies`, name = module); see `docs/extending.md`.
"""

from __future__ import annotations

import functools
import importlib
from importlib.metadata import entry_points

from boe_vllm.policies.base import Policy, PolicyConfig

_MODULES = {
    "random": "random",
    "confidence": "confidence",
    "margin": "margin",
    "entropy": "entropy",
    "confident-random": "confident_random",
    "origin": "origin",
    "ancestral": "ancestral",
    "eb": "eb",
    "pc": "pc",
    "threshold": "threshold",
    "factor": "factor",
    "klass": "klass",
    "punt": "punt",
    "dapd": "dapd",
    "dawn": "dawn",
    "verify": "verify",
    "credit": "credit",
    "hierarchy": "hierarchy",
    "remdm": "remdm",
    "remdm-llada": "remdm_llada",
    "p2": "p2",
    "info-gain": "info_gain",
    "lookum": "lookum",
    "lookahead": "lookahead",
    "boe": "boe",
    "joint": "joint",
    "pairwise": "pairwise",
}

GROUP = "boe_vllm.policies"
_ADDED = {entry.name: entry.value for entry in entry_points(group=GROUP)}

POLICY_NAMES: frozenset[str] = frozenset({*_MODULES, *_ADDED})

__all__ = ["POLICY_NAMES", "Policy", "PolicyConfig", "load_policy"]


@functools.cache
def load_policy(name: str) -> type[Policy]:
    """The policy class of that name.

    Raises:
        ValueError: `unknown policy`, with the names that exist, or a module without such a policy.
    """
    if name in _MODULES:  # whose names no package can take
        module = importlib.import_module(f"boe_vllm.policies.{_MODULES[name]}")
    elif name in _ADDED:
        module = importlib.import_module(_ADDED[name])
    else:
        raise ValueError(f"unknown policy {name!r}; expected one of {sorted(POLICY_NAMES)}")
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Policy) and value.name == name:
            return value
    raise ValueError(f"module {module.__name__} defines no policy named {name!r}")
