"""The reference has every field that can be set, as the classes declare them."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import pytest

from boe_vllm import cli
from boe_vllm.base.options import options
from boe_vllm.policies import POLICY_NAMES, load_policy
from boe_vllm.request import reference, reference_text
from boe_vllm.request.config import FrameConfig, ServerConfig
from boe_vllm.request.given_text import GivenText
from boe_vllm.request.limits import EngineSettings

DOCUMENT = Path(__file__).parents[2] / "docs" / "reference.md"


@options
class Base:
    shared: bool = True
    """Whether it is shared."""


@options
class Declared(Base):
    some: Annotated[int, pydantic.Field(ge=1, le=2_000_000)] | None = None
    """Tokens, some of them."""
    bound: Annotated[float, pydantic.Field(gt=0)] = 0.5
    """The bound, nats; 0 for
    none."""
    kind: Literal["a", "b"] = "a"
    """Tokens of a kind, which is no number."""


def test_the_document_is_what_the_command_prints(capsys):
    assert cli.main(["fields", "--markdown"]) == 0
    printed = capsys.readouterr().out
    stale = "docs/reference.md is stale: boe-vllm fields --markdown > docs/reference.md"
    assert DOCUMENT.read_text(encoding="utf-8") == printed, stale


@pytest.mark.parametrize("cls", [FrameConfig, ServerConfig, GivenText, EngineSettings])
def test_every_field_of_a_server_and_a_request_is_there(cls):
    named = {field.name for section in reference.sections() for field in section.fields}
    assert {field.name for field in dataclasses.fields(cls)} <= named


@pytest.mark.parametrize("name", sorted(POLICY_NAMES))
def test_every_field_of_a_policy_has_its_meaning(name, capsys):
    entry = reference.policy_entry(name)
    declared = {field.name for field in dataclasses.fields(load_policy(name).Config)}
    assert {field.name for field in entry.fields} == declared
    assert len(entry.fields) == len(declared)
    assert all(field.meaning.endswith(".") for field in entry.fields)
    assert entry.summary and entry.source and entry.passes
    assert cli.main(["fields", name]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{name}: ")
    assert all(f"\n  {field}: " in printed for field in declared)


def test_a_field_is_read_from_its_class():
    fields = {field.name: field for field in reference.fields_of(Declared)}
    assert list(fields) == ["some", "bound", "kind", "shared"]  # inherited ones come last
    some, bound, kind, shared = fields.values()
    assert some.kind == "whole number, at least 1, at most 2,000,000 or null"
    assert (some.unit, some.default, some.meaning) == ("tokens", "-", "Tokens, some of them.")
    assert (bound.kind, bound.unit, bound.default) == ("number, above 0", "nats", "0.5")
    assert bound.meaning == "The bound, nats; 0 for none."
    assert (kind.kind, kind.unit, kind.default) == ("`a`, `b`", "", "a")
    assert (shared.kind, shared.default) == ("true or false", "true")


def test_a_field_without_a_meaning_is_refused():
    @options
    class Bare:
        silent: int = 0

    with pytest.raises(ValueError, match=r"expected a docstring after each field.*\['silent'\]"):
        reference.fields_of(Bare)


def test_an_unknown_policy_is_refused(capsys):
    assert reference_text.main(["nope"]) == 2
    assert "unknown policy 'nope'; expected one of" in capsys.readouterr().err
