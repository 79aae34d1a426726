"""A recording as one HTML file that needs nothing else: no network, no other files.

Texts of the model reach the page only as JSON that no HTML parser can end, and are shown as text. A
content security policy lets run what this file wrote, and load nothing.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from pathlib import Path
from string import Template
from typing import Any

from boe_vllm.lab.pictures import figure
from boe_vllm.lab.pictures.trajectory import Recording

ASSETS = Path(__file__).parents[2] / "assets" / "page"


def write(recording: Recording, path: Path) -> None:
    """Write the page; parents are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(recording), encoding="utf-8")


def render(recording: Recording) -> str:
    """The page as text."""
    style, script = (asset(f"page.{kind}") for kind in ("css", "js"))
    policy = (
        f"default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
        f"style-src {digest(style)}; script-src {digest(script)}"
    )
    return Template(asset("page.html")).substitute(
        policy=policy,
        title=html.escape(recording.title),
        prompt=html.escape(recording.prompt),
        style=style,
        script=script,
        data=embedded(data_of(recording)),
    )


def data_of(recording: Recording) -> dict[str, Any]:
    """What the script reads: the recording, its tokens as they are shown, and colours."""
    scale = figure.entropy_scale()
    data = recording.as_dict()
    del data["vocabulary"]
    return data | {
        "glyphs": {token: recording.glyph(token) for token in recording.vocabulary},
        "highest": recording.highest_entropy,
        "scale": scale,
        "inks": [figure.ink(colour) for colour in scale],
        "palette": figure.PALETTE,
    }


def embedded(value: Any) -> str:
    """JSON for a script element: without `<`, no text in it can end the element or open another."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def digest(text: str) -> str:
    """The source expression of a content security policy that allows exactly this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def asset(name: str) -> str:
    """A part of the page."""
    return (ASSETS / name).read_text(encoding="utf-8")
