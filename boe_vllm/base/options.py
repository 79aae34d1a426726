"""Validated, frozen settings: the one way in which outside values become configuration.

Every settings class of the project is declared with `options` and built with `build`, so that a
bad value gives the same kind of error wherever it comes from (command line, `LLM(...)`, HTTP).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar, dataclass_transform

import pydantic
import pydantic.dataclasses

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def options(cls: type[T]) -> type[T]:
    """Declare a frozen, keyword-only, slotted dataclass whose fields are checked once."""
    made = pydantic.dataclasses.dataclass(
        frozen=True,
        kw_only=True,
        slots=True,
        config=pydantic.ConfigDict(extra="forbid", allow_inf_nan=False),
    )(cls)
    return made  # type: ignore[return-value]


def names(cls: type) -> list[str]:
    """Names of the fields of a settings class, in the order of their declaration."""
    return [field.name for field in dataclasses.fields(cls)]


def build(cls: type[T], fields: Mapping[str, Any]) -> T:
    """Make `cls` from outside values.

    Raises:
        ValueError: naming the field, what was expected, what came, and the remedy.
    """
    try:
        return cls(**fields)
    except pydantic.ValidationError as error:
        raise ValueError("; ".join(map(_explain, error.errors()))) from None


def unknown_field(name: str, expected: list[str], context: str) -> ValueError:
    """The error for a field that nobody knows, with the nearest name that somebody does."""
    close = difflib.get_close_matches(name, expected, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "remove it"
    return ValueError(
        f"unknown field {name!r}{context}; expected one of {sorted(expected)}; {hint}"
    )


def _explain(detail: Any) -> str:
    name = ".".join(str(part) for part in detail["loc"]) or "settings"
    message = detail["msg"].removeprefix("Value error, ")
    if not detail["loc"]:
        return message
    message = message[0].lower() + message[1:]
    return f"{name}: {message}, got {detail['input']!r}; change or remove {name!r}"
