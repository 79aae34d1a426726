"""What clients hear when the server is told to stop.

vLLM ends its engine first and its HTTP server afterwards, which waits for every response to end.
Requests that the engine has not answered by then would wait, and the server with them, for ever:
they are told, and a stop is over after some seconds whatever a client does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from http import HTTPStatus
from types import ModuleType
from typing import Any

from vllm.exceptions import GracefulHTTPError

from boe_vllm.vllm_plugin.wrapping import wrap

GRACE_S = 10
"""Seconds that the HTTP server waits for its last responses."""
_STOPPED = "_boe_vllm_stopped"


def wrap_async_llm(module: ModuleType) -> None:
    """Tell the clients of an engine that is shut down."""
    wrap(module.AsyncLLM, "shutdown", {"self", "timeout"}, _shutdown)


def stopping(engine: Any) -> bool:
    """Whether an engine was told to stop, rather than has died."""
    return getattr(engine, _STOPPED, False)


def refusal() -> GracefulHTTPError:
    """What a client is answered by a server that stops: status 503, or an event in a stream."""
    return GracefulHTTPError(
        "the server is shutting down; ask again later, or another server",
        HTTPStatus.SERVICE_UNAVAILABLE,
    )


def _shutdown(original: Callable[..., None]) -> Callable[..., None]:
    def shutdown(self: Any, timeout: float | None = None) -> None:
        setattr(self, _STOPPED, True)
        if not timeout:  # the engine drops its requests
            _tell_clients(self)
        original(self, timeout)
        _tell_clients(self)  # those whose requests did not end in time

    return shutdown


def _tell_clients(engine: Any) -> None:
    """End what still waits for the engine, from whatever thread."""
    handler, processor = getattr(engine, "output_handler", None), engine.output_processor
    if handler is not None:
        with contextlib.suppress(RuntimeError):  # its event loop is closed: nobody waits
            handler.get_loop().call_soon_threadsafe(processor.propagate_error, refusal())
