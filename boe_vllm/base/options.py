"""Validated, frozen settings: the one way in which outside values become configuration.

Every settings class of the project is declared with `options` and built with `build`, so that a
bad value gives the same kind of error wherever it comes from (command line, `LLM(...)`, HTTP).
"""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
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


def restore(cls: type[T], values: Mapping[str, Any]) -> T:
    """An instance from the values of one that was built, which are not checked again.

    Args:
        cls: a settings class.
        values: of every field, as `dataclasses.asdict` gives them.
    """
    made = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made


def shown(value: Any) -> str:
    """A value that came from outside, short enough for an error message."""
    return " ".join(_SHORT.repr(value).split())


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxlong = 4, 160, 160, 60
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 12

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to print integers of more than some thousand digits."""
        return super().repr_int(x, level) if x.bit_length() < 4096 else "an integer too large"


_SHORT = _Short()


def unknown_field(name: str, expected: list[str], context: str) -> ValueError:
    """The error for a field that nobody knows, with the nearest name that somebody does."""
    close = difflib.get_close_matches(str(name)[:64], expected, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "remove it"
    return ValueError(
        f"unknown field {shown(name)}{context}; expected one of {sorted(expected)}; {hint}"
    )


def _explain(detail: Any) -> str:
    name = ".".join(str(part) for part in detail["loc"]) or "settings"
    message = detail["msg"].removeprefix("Value error, ")
    if not detail["loc"]:
        return message
    message = message[0].lower() + message[1:]
    if detail["type"] == "value_error":  # a check of our own, whose message is whole
        return f"{name}: {message}"
    return f"{name}: {message}, got {shown(detail['input'])}; change or remove {name!r}"
