"""Every field that a server or a request may set, read from the classes that declare it.

A field's meaning is the docstring literal that follows it. A number's unit is the first word of
that text (tokens, denoising steps, rows, positions, a share, a probability), or stands in it after
a comma ("the bound, nats"). `reference_text` prints what is collected here.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from boe_vllm.policies import POLICY_NAMES, Policy, PolicyConfig, load_policy
from boe_vllm.request.config import DEFAULT_POLICY, FrameConfig, ServerConfig
from boe_vllm.request.given_text import GivenText
from boe_vllm.request.limits import EngineSettings

_FIRST = re.compile(
    r"(?:\w+ length in )?(tokens|denoising steps|rows|positions|share|probability)\b", re.IGNORECASE
)
_AFTER_A_COMMA = re.compile(r", (nats|MiB|seconds)\b")
_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
_BEYOND_WORDS = 2**53  # bounds of a machine's integers, which say nothing to a reader
_LENGTHS = {"min_length": "at least", "max_length": "at most"}
_PLAIN = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    type(None): "null",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """One field as the reference describes it."""

    name: str
    kind: str
    """Its type with its bounds, in words; the values themselves where only a few are allowed."""
    unit: str
    """Of a number; "" where there is none."""
    default: str
    """As JSON; "-" where nothing is set."""
    meaning: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """Fields that are set in the same place."""

    title: str
    text: str
    """Where they are set, and what they are about."""
    fields: tuple[Field, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PolicyEntry:
    """One policy as the reference describes it."""

    name: str
    summary: str
    """What it does, in a sentence."""
    source: str
    """Where the rule comes from."""
    passes: str
    """Forwards and backwards of a step."""
    fields: tuple[Field, ...]
    presets: Mapping[str, Mapping[str, Any]]
    """Name -> the fields that it sets."""


_POLICY = Field(
    name="policy",
    kind="name of a policy",
    unit="",
    default=DEFAULT_POLICY,
    meaning="The rule that decides which tokens are written in each step; see Policies. Default: "
    f"the server's sampler, and `{DEFAULT_POLICY}` where the server has none.",
)
"""The one field that no settings class declares: it says which class the others belong to."""


def sections() -> list[Section]:
    """The fields that do not belong to one policy."""
    return [
        Section(
            title="The canvas and its schedule",
            text="Fields of a request, with any policy. Set in the server's sampler config, they "
            "are the defaults of its requests.",
            fields=(_POLICY, *fields_of(FrameConfig)),
        ),
        Section(
            title="Given text",
            text="Fields of a request alone: text that stands on the canvas from the start, or "
            "the answers to choose from.",
            fields=fields_of(GivenText),
        ),
        Section(
            title="Sampler config of the server alone",
            text="Fields of the server's sampler config that no request may set.",
            fields=fields_of(ServerConfig),
        ),
        Section(
            title="Engine settings",
            text="Keys of vLLM's `additional_config`: memory, and the limits on one request.",
            fields=fields_of(EngineSettings),
        ),
    ]


def policy_entry(name: str) -> PolicyEntry:
    """What is known about a policy.

    Raises:
        ValueError: for a name that no policy has.
    """
    policy = load_policy(name)
    summary = _summary(policy)
    return PolicyEntry(
        name=name,
        summary=summary,
        source=getattr(policy, "source", "") or summary,
        passes=getattr(policy, "passes", "") or "-",
        fields=fields_of(policy.Config),
        presets=_presets(policy),
    )


def policy_entries(*, bundled: bool = False) -> list[PolicyEntry]:
    """All policies by name; without those of other packages if only the `bundled` are wanted."""
    ours = __name__.partition(".")[0] + "."
    return [
        policy_entry(name)
        for name in sorted(POLICY_NAMES)
        if not bundled or load_policy(name).__module__.startswith(ours)
    ]


def fields_of(cls: type) -> tuple[Field, ...]:
    """The fields of a settings class: its own first, then those that it inherits.

    Raises:
        ValueError: for a field that no docstring literal follows.
    """
    by_name = {field.name: field for field in dataclasses.fields(cls)}
    found = []
    for base in cls.__mro__:
        for name, meaning in _docstrings(base).items():
            if name in by_name:
                field = by_name.pop(name)
                kind = _kind(cls.__pydantic_fields__[name])  # type: ignore[attr-defined]
                found.append(
                    Field(
                        name=name,
                        kind=kind,
                        unit=_unit(meaning) if "number" in kind else "",
                        default=_default(field),
                        meaning=meaning,
                    )
                )
    if by_name:
        raise ValueError(
            f"{cls.__name__}: expected a docstring after each field, got none after "
            f"{sorted(by_name)}; write one"
        )
    return tuple(found)


def _summary(policy: type[Policy]) -> str:
    """First sentence of the policy's settings class, or of its module if that says nothing."""
    text = policy.Config.__doc__ or ""
    if not text or policy.Config is PolicyConfig or text.startswith("Settings of"):
        text = sys.modules[policy.__module__].__doc__ or policy.__doc__ or policy.name
    return _first_sentence(text)


def _presets(policy: type[Policy]) -> Mapping[str, Mapping[str, Any]]:
    """`presets` of the settings class, or `PRESETS` of its module."""
    module = sys.modules[policy.Config.__module__]
    return getattr(policy.Config, "presets", None) or getattr(module, "PRESETS", {})


@functools.cache
def _docstrings(cls: type) -> dict[str, str]:
    """Field -> the text that follows it in the source of the class, in their order."""
    if not dataclasses.is_dataclass(cls):
        return {}
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    return dict(_described(node))


def _described(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for first, second in zip(node.body, node.body[1:], strict=False):
        if (
            isinstance(first, ast.AnnAssign)
            and isinstance(first.target, ast.Name)
            and isinstance(second, ast.Expr)
            and isinstance(second.value, ast.Constant)
            and isinstance(second.value.value, str)
        ):
            yield first.target.id, " ".join(second.value.value.split())


def _kind(info: Any) -> str:
    """A pydantic field's type in words."""
    return _words(info.annotation, _in_words(info.metadata))


def _words(kind: Any, bounds: str = "") -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        extras = [entry for info in inner[1:] for entry in getattr(info, "metadata", [info])]
        return _words(inner[0], _in_words(extras))
    if origin in (typing.Union, types.UnionType):
        parts = [_words(part) for part in inner]
        text = " or ".join(part for part in parts if part != "null")
        return f"{text}{bounds} or null" if "null" in parts else f"{text}{bounds}"
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin is list:
        return f"list{bounds}"
    return _PLAIN.get(kind, getattr(kind, "__name__", str(kind))) + bounds


def _in_words(metadata: list[Any]) -> str:
    """Bounds as `, above 0, at most 1`; those of lengths as `, at most 64 long`."""
    text = ""
    for entry in metadata:
        for name, words in _BOUNDS.items():
            bound = getattr(entry, name, None)
            if bound is not None and abs(bound) < _BEYOND_WORDS:
                text += f", {words} {bound:,.9g}"
        for name, words in _LENGTHS.items():
            if (bound := getattr(entry, name, None)) is not None:
                text += f", {words} {bound} long"
    return text


def _unit(meaning: str) -> str:
    if (first := _FIRST.match(meaning)) is not None:
        return first[1].lower()
    later = _AFTER_A_COMMA.search(meaning)
    return later[1] if later is not None else ""


def _default(field: dataclasses.Field[Any]) -> str:
    # pydantic wraps a default in its own FieldInfo where the annotation carries bounds.
    value = getattr(field.default, "default", field.default)
    if value is dataclasses.MISSING or value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value)


def _first_sentence(text: str) -> str:
    joined = " ".join(text.split())
    return re.split(r"(?<=[a-z)\]`])\. (?=[A-Z`])|\.$", joined)[0]
