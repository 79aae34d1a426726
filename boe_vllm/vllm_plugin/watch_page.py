"""The page `/watch` of a running server: type a prompt, and see canvases fill under some policies.

One static file without outside resources. It asks this very server, as any client would.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from boe_vllm.request.limits import EngineSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

ASSETS = Path(__file__).parents[1] / "assets" / "page"
PATH = "/watch"


def attach(app: FastAPI, additional_config: Mapping[str, Any] | None) -> None:
    """Serve the page, if the server's settings say so."""
    if not EngineSettings.read(additional_config or {}).watch:
        return
    from fastapi.responses import HTMLResponse

    text, policy = render()

    async def watch() -> HTMLResponse:
        return HTMLResponse(text, headers={"Content-Security-Policy": policy})

    app.add_api_route(PATH, watch, methods=["GET"], include_in_schema=False)


def render() -> tuple[str, str]:
    """The page, and the policy that lets run what it has and ask nobody but its server."""
    names = ("page.css", "watch.css", "watch.js")
    page, own, script = ((ASSETS / name).read_text(encoding="utf-8") for name in names)
    style = page + own
    policy = (
        f"default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        f"img-src data:; connect-src 'self'; style-src {_digest(style)}; "
        f"script-src {_digest(script)}"
    )
    page = (ASSETS / "watch.html").read_text(encoding="utf-8")
    return Template(page).substitute(style=style, script=script), policy


def _digest(text: str) -> str:
    """The source of an inline text, as content security policies name it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
