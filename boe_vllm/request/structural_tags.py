"""Structural tags, which tool parsers of vLLM make of a chat's tools, as trees for the compiler.

A tag is text before and after a content, such as `<tool_call>` around the JSON of a call. The forms
are those of xgrammar's structural tags; those with free text in them are refused, since nothing
bounds where in it a tag would begin.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeAlias

from boe_vllm.base.options import shown

Tree: TypeAlias = list[Any]
"""What `regex_compiler` reads."""


def tree_of(text: str, json_tree: Callable[[str], Tree]) -> Tree:
    """The tree of a structural tag.

    Args:
        text: the tag as JSON.
        json_tree: the tree of a JSON schema, which is given as text.

    Raises:
        ValueError: for a form that cannot be followed.
    """
    try:
        return _tree(json.loads(text)["format"], json_tree)
    except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError):
        raise _refused(f"a tag of xgrammar's, got {shown(text)}") from None


def _tree(form: Any, json_tree: Callable[[str], Tree]) -> Tree:
    kind = form["type"]
    if kind == "const_string":
        return ["text", form["value"]]
    if kind == "regex":
        return ["regex", form["pattern"]]
    if kind == "json_schema" and form.get("style", "json") == "json":
        return json_tree(json.dumps(form["json_schema"]))
    if kind == "tag":
        content = _tree(form["content"], json_tree)
        return ["all", [["text", form["begin"]], content, ["text", form["end"]]]]
    if kind in ("sequence", "or"):
        parts = [_tree(part, json_tree) for part in form["elements"]]
        return ["all" if kind == "sequence" else "any", parts]
    if kind == "tags_with_separator":
        tags = ["any", [_tree({"type": "tag", **tag}, json_tree) for tag in form["tags"]]]
        least = int(form.get("at_least_one", False))
        most = 1 if form.get("stop_after_first", False) else None
        return ["many", tags, ["text", form["separator"]], least, most]
    raise _refused(f"tags, sequences, choices, JSON schemas and regular expressions, got {kind!r}")


def _refused(expected: str) -> ValueError:
    return ValueError(f"structured_outputs: expected a structural_tag of {expected}; send a schema")
