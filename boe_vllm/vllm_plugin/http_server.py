"""What our requests need of vLLM's HTTP server, beyond what `hooks` does for every way in.

Chats do not write masks in their messages unless they ask for it. Fields that older clients send
for grammars are refused, where vLLM would ignore them. A bad request to the Responses endpoint is
known before its stream begins. A server that stops, or whose engine has died, ends, and one whose
engine takes no requests is not healthy.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from types import ModuleType
from typing import Any

from boe_vllm.models.families import FAMILIES
from boe_vllm.vllm_plugin import hooks, versions
from boe_vllm.vllm_plugin.wrapping import when_imported, wrap

_ENTRY = "vllm.entrypoints.launchers.api_server.entry"
_OPENAI = "vllm.entrypoints.openai"

# Fields of older clients -> what vLLM calls them now.
_GRAMMARS = {
    "guided_json": "structured_outputs: {'json': ...}",
    "guided_regex": "structured_outputs: {'regex': ...}",
    "guided_choice": "structured_outputs: {'choice': [...]}",
    "guided_grammar": "structured_outputs: {'grammar': ...}",
    "guided_decoding_backend": "structured_outputs",
    "guided_whitespace_pattern": "structured_outputs: {'whitespace_pattern': ...}",
}


def install() -> None:
    """Wrap what is imported already now, and the rest as soon as it is. Safe to call again."""
    when_imported("vllm.v1.engine.async_llm", _wrap_async_llm)
    when_imported(f"{_OPENAI}.completion.serving", _wrap_completions)
    when_imported(f"{_OPENAI}.chat_completion.serving", _wrap_chat)
    when_imported(f"{_OPENAI}.responses.serving", _wrap_responses)
    when_imported("vllm.entrypoints.llm", _wrap_offline)
    when_imported(_ENTRY, _wrap_entry)


def _wrap_async_llm(module: ModuleType) -> None:
    from boe_vllm.vllm_plugin import shutdown, watchdog

    versions.check()
    shutdown.wrap_async_llm(module)
    watchdog.wrap_async_llm(module)


def _wrap_completions(module: ModuleType) -> None:
    from boe_vllm.vllm_plugin import sample_reports

    versions.check()
    sample_reports.wrap_completions(module)
    expected = {"request", "raw_request"}
    wrap(module.OpenAIServingCompletion, "create_completion", expected, _create_completion)


def _wrap_chat(module: ModuleType) -> None:
    from boe_vllm.vllm_plugin import sample_reports

    versions.check()
    sample_reports.wrap_chat(module)
    expected = {"request", "raw_request"}
    wrap(module.OpenAIServingChat, "create_chat_completion", expected, _create_chat)


def _wrap_responses(module: ModuleType) -> None:
    versions.check()
    serving = module.OpenAIServingResponses
    wrap(serving, "create_responses", {"request", "raw_request"}, _create_chat)
    expected = {"request_id", "engine_input", "sampling_params"}
    wrap(serving, "_generate_with_builtin_tools", expected, _generate_response)


def _wrap_offline(module: ModuleType) -> None:
    versions.check()
    wrap(module.LLM, "chat", {"self", "messages", "sampling_params"}, _chat)


def _wrap_entry(module: ModuleType) -> None:
    versions.check()
    wrap(module, "build_and_serve", {"engine_client", "sock", "args"}, _build_and_serve)
    wrap(module, "build_app", {"args", "model_config"}, _build_app)


# ---- requests ------------------------------------------------------------------------------------


def _create_completion(original: Callable[..., Any]) -> Callable[..., Any]:
    async def create_completion(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if hooks.is_ours(self.engine_client.vllm_config):
            _refuse_old_grammars(request)
            await _compile_grammar(self.engine_client.vllm_config, request)
        return await original(self, request, *args, **kwargs)

    return create_completion


def _create_chat(original: Callable[..., Any]) -> Callable[..., Any]:
    async def create(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if hooks.is_ours(self.engine_client.vllm_config):
            _refuse_old_grammars(request)
            await _compile_grammar(self.engine_client.vllm_config, request)
            request.vllm_xargs = {"infill": False} | (request.vllm_xargs or {})
        return await original(self, request, *args, **kwargs)

    return create


def _refuse_old_grammars(request: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    for name, value in (request.model_extra or {}).items():
        if name in _GRAMMARS and value is not None:
            raise VLLMValidationError(
                f"{name}: expected none, since vLLM has given it up, got some; send "
                f"{_GRAMMARS[name]} instead",
                parameter=name,
            )


async def _compile_grammar(vllm_config: Any, request: Any) -> None:
    """Have a grammar's automaton made outside the server's loop, which others wait for. What is
    wrong with the request is said later, when it is resolved."""
    with contextlib.suppress(Exception):
        params = request.to_sampling_params(1, {})
        if params.structured_outputs is not None:
            await asyncio.to_thread(_compile, params, vllm_config)


def _compile(params: Any, vllm_config: Any) -> None:
    from boe_vllm.request.under_grammar import first_end, made
    from boe_vllm.sampling.constraints import Constraint
    from boe_vllm.vllm_plugin.admission import model_facts, server_settings
    from boe_vllm.vllm_plugin.grammars import grammar_of

    server, grammar = server_settings(vllm_config), grammar_of(params.structured_outputs)
    order = (params.extra_args or {}).get("grammar_order", server.config.frame.grammar_order)
    model = model_facts(vllm_config.model_config)
    text = made(grammar, model, order=order, timeout=server.limits.grammar_timeout_s)
    if isinstance(text, str):
        first_end(text, Constraint(), model)


def _generate_response(original: Callable[..., Any]) -> Callable[..., Any]:
    """A plain function around the async generator: a bad request fails when it is made, before a
    stream has begun."""

    def generate(
        self: Any,
        request_id: str,
        engine_input: Any,
        sampling_params: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if hooks.is_ours(self.engine_client.vllm_config):
            from boe_vllm.vllm_plugin.admission import resolve_early

            resolve_early(engine_input, sampling_params, self.engine_client.input_processor)
        return original(self, request_id, engine_input, sampling_params, *args, **kwargs)

    return generate


def _chat(original: Callable[..., Any]) -> Callable[..., Any]:
    def chat(self: Any, messages: Any, sampling_params: Any = None, *args: Any, **kw: Any) -> Any:
        if hooks.is_ours(self.llm_engine.vllm_config):
            if sampling_params is None:
                sampling_params = self.get_default_sampling_params()
            several = isinstance(sampling_params, (list, tuple))
            chosen = sampling_params if several else [sampling_params]
            chosen = [_without_infill(params) for params in chosen]
            sampling_params = chosen if several else chosen[0]
        return original(self, messages, sampling_params, *args, **kw)

    return chat


def _without_infill(params: Any) -> Any:
    own = params.clone()
    own.extra_args = {"infill": False} | (own.extra_args or {})
    return own


# ---- the server ----------------------------------------------------------------------------------


def _build_and_serve(original: Callable[..., Any]) -> Callable[..., Any]:
    """A server whose engine has died exits with status 1. vLLM's several API servers do so too; its
    single one only stops serving, and exits with 0."""

    async def build_and_serve(engine_client: Any, *args: Any, **kwargs: Any) -> Any:
        if not hooks.is_ours(engine_client.vllm_config):
            return await original(engine_client, *args, **kwargs)
        from boe_vllm.vllm_plugin import shutdown, watchdog

        kwargs.setdefault("timeout_graceful_shutdown", shutdown.GRACE_S)
        watching = watchdog.start(engine_client)
        try:
            closing = await original(engine_client, *args, **kwargs)
        finally:
            if watching is not None:
                watching.cancel()
        if shutdown.stopping(engine_client) or not engine_client.errored:
            return closing
        return _failed(closing)

    return build_and_serve


def _build_app(original: Callable[..., Any]) -> Callable[..., Any]:
    def build_app(args: Any, tasks: Any = None, model_config: Any = None) -> Any:
        app = original(args, tasks, model_config)
        if model_config is not None and model_config.architecture in FAMILIES:
            from boe_vllm.vllm_plugin import watch_page

            watch_page.attach(app, args.additional_config)
        return app

    return build_app


async def _failed(closing: Awaitable[None]) -> None:
    """What vLLM awaits once it has cleaned up."""
    with contextlib.suppress(Exception):
        await closing
    raise SystemExit("boe-vllm: the engine has died, and the server with it; its log says why")
