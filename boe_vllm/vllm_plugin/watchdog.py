"""Whether the engine still takes requests, asked the way that requests go.

vLLM's `/health` knows an engine process that has died, not one that lives and no longer reads its
input. A question that costs nothing passes the engine's input, its loop and its output every few
seconds; while one has no answer for too long, `/health` is not 200.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import ModuleType
from typing import Any

from vllm.logger import init_logger
from vllm.v1.engine.exceptions import EngineDeadError

from boe_vllm.request.limits import EngineSettings
from boe_vllm.vllm_plugin.wrapping import wrap

logger = init_logger("vllm." + __name__)

_OF_ENGINE = "_boe_vllm_watchdog"


class Watchdog:
    """Asks again and again, and knows whether the last question has been answered in time."""

    def __init__(
        self, ask: Callable[[], Awaitable[Any]], *, interval: float, timeout: float
    ) -> None:
        """Not yet asking; `run` does.

        Args:
            ask: the question, which returns once it is answered.
            interval: seconds from an answer to the next question.
            timeout: seconds after which no answer means that there may never be one.
        """
        self.ask, self.interval, self.timeout = ask, interval, timeout
        self.silent = False
        """The engine owes an answer for longer than the timeout."""

    async def run(self) -> None:
        """Ask until the engine says that it ends."""
        while True:
            question = asyncio.ensure_future(self.ask())
            await asyncio.wait([question], timeout=self.timeout)
            if not question.done():
                logger.error("The engine has not answered for %g seconds.", self.timeout)
                self.silent = True
                await asyncio.wait([question])  # a late answer is one
            if question.exception() is not None:
                return  # vLLM knows by itself that its engine has ended
            self.silent = False
            await asyncio.sleep(self.interval)


def wrap_async_llm(module: ModuleType) -> None:
    """Let vLLM's check of an engine's health ask the watchdog, where there is one."""
    wrap(module.AsyncLLM, "check_health", {"self"}, _check_health)


def start(engine: Any) -> asyncio.Task[None] | None:
    """Watch an engine, on the running event loop; None if the server's settings say not to."""
    settings = EngineSettings.read(engine.vllm_config.additional_config)
    if settings.watchdog_interval_s == 0:
        return None
    watchdog = Watchdog(
        engine.is_paused,
        interval=settings.watchdog_interval_s,
        timeout=settings.watchdog_timeout_s,
    )
    setattr(engine, _OF_ENGINE, watchdog)
    return asyncio.get_running_loop().create_task(watchdog.run())


def _check_health(original: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    async def check_health(self: Any) -> None:
        await original(self)
        watchdog: Watchdog | None = getattr(self, _OF_ENGINE, None)
        if watchdog is not None and watchdog.silent:
            raise EngineDeadError()

    return check_health
