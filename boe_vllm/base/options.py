"""Validated, frozen settings: the one way in which outside values become configuration.

Every settings class of the project is declared with `options` and built with `build`, so that a
bad value gives the same kind of error wherever it comes from (command line, `LLM(...)`, HTTP).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar, dataclass_transform

import pydantic
import pydantic.dataclasses

T = TypeVar("T")

MAX_JSON_LENGTH = 1 << 20
MAX_JSON_DEPTH = 8


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


def read_json(name: str, value: Any) -> Any:
    """Read JSON text where a field can neither be nested nor be null (HTTP); leave every other
    value alone.

    Args:
        name: of the field, for errors.
        value: what it holds.

    Raises:
        ValueError: for text that is too long, and for values that are nested too deeply or hold
            numbers of thousands of digits.
    """
    if value == "null":
        return None
    if isinstance(value, str) and value[:1] in ("[", "{"):
        if len(value) > MAX_JSON_LENGTH:
            raise ValueError(
                f"{name}: expected JSON text of at most {MAX_JSON_LENGTH} characters, got "
                f"{len(value)}; shorten it"
            )
        try:
            value = json.loads(value)
        except RecursionError:
            raise _too_deep(name) from None
        except json.JSONDecodeError:
            return value  # a text that only looks like it; its field says what it expects
        except ValueError:
            raise ValueError(
                f"{name}: expected numbers of ordinary size in JSON text, got one of thousands of "
                f"digits; correct it"
            ) from None
    if _deeper_than(MAX_JSON_DEPTH, value):
        raise _too_deep(name)
    return value


def _deeper_than(levels: int, value: Any) -> bool:
    if not isinstance(value, (list, tuple, dict)):
        return False
    parts = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_deeper_than(levels - 1, part) for part in parts)


def _too_deep(name: str) -> ValueError:
    return ValueError(
        f"{name}: expected at most {MAX_JSON_DEPTH} levels of lists and objects, got more; "
        f"flatten it"
    )


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


def must_divide(name: str, value: int, by_name: str, by: int) -> None:
    """Raise ValueError unless `by` divides `value`."""
    if value % by:
        raise ValueError(
            f"{name}: expected a multiple of {by_name} ({by}), got {value}; "
            f"use {value // by * by or by} or {-(-value // by) * by}"
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
