"""What docs/models.md says is verified is a test, with a case for the family."""

import re
from pathlib import Path

from families import FAMILIES as CASES

from boe_vllm.models.families import FAMILIES

TESTS = Path(__file__).parents[1]
TEXT = (TESTS.parent / "docs" / "models.md").read_text(encoding="utf-8")


def test_every_family_is_listed():
    assert set(re.findall(r"`(\w+(?:LM|Model|LMHeadModel))` \|", TEXT)) <= set(FAMILIES)
    assert all(f"`{architecture}`" in TEXT for architecture in FAMILIES)


def test_every_test_that_is_named_exists():
    there = "\n".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)", TEXT))
    assert len(named) >= 10
    assert [name for name in named if f"def {name}(" not in there] == []


def test_every_case_that_is_named_exists():
    published = {path.name for path in (TESTS / "published").iterdir()}
    named = set(re.findall(r"`[\w ]*\[([\w.-]+)\]`", TEXT))
    assert named == set(CASES) | published | {"shifted"}


def test_every_file_that_is_named_exists():
    named = re.findall(r"`((?:boe_vllm|tests|docs)/[\w/.]+)`", TEXT)
    assert [path for path in named if not (TESTS.parent / path).exists()] == []
