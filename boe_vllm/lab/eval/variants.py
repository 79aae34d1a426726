"""Policies with their settings as the command line writes them: `boe:rho=0.25:gate=none`."""

from __future__ import annotations

import dataclasses
import json
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One row of a table."""

    label: str
    """Its name in tables; no two variants of a run share one."""
    fields: dict[str, Any]
    """Fields of a request, `policy` among them."""


def parse(text: str) -> Variant:
    """`POLICY`, `POLICY PRESET` or `POLICY:FIELD=VALUE:FIELD=VALUE`; values are JSON, or plain
    strings.

    Raises:
        ValueError: for a setting that is no `FIELD=VALUE`. Names are checked by `cells`.
    """
    first, *settings = text.split(":")
    policy, _, preset = first.partition(" ")
    fields = {"policy": policy} | ({"preset": preset} if preset else {})
    return Variant(label=text, fields=fields | parse_fields(settings, "--policies"))


def parse_fields(settings: list[str], option: str) -> dict[str, Any]:
    """`FIELD=VALUE` strings as a mapping."""
    fields = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not (name and equals):
            raise ValueError(f"{option}: expected FIELD=VALUE, got {setting!r}; write rho=0.25")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return fields
