"""The few vLLM callables that this plugin wraps.

vLLM has no extension point for six things: engine arguments of our own, the dtype of a float32
checkpoint, a request's check against its prompt, refusing a bad streaming request before the
stream has begun, refusing beam search, and a report for each of a request's samples. Each wrapper
here adds one of them and otherwise passes everything through; `http_server` has those of the
server. `patches/` holds most of it as diffs of vLLM itself. A callable that is not what we expect
raises, with vLLM's version.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from boe_vllm.models.families import FAMILIES
from boe_vllm.vllm_plugin import versions
from boe_vllm.vllm_plugin.wrapping import when_imported, wrap

FLAGS = ("sampler", "sampler_config")


class SamplerName(str):
    """The value of `--sampler`.

    A type of its own so that an API server process, which vLLM spawns with the parsed arguments
    pickled, imports this package (and with it these hooks) before it reads them.
    """

    __slots__ = ()


def install() -> None:
    """Wrap what is imported already now, and the rest as soon as it is. Safe to call again."""
    when_imported("vllm.engine.arg_utils", _wrap_engine_args)
    when_imported("vllm.v1.engine.input_processor", _wrap_input_processor)
    when_imported("vllm.v1.engine.output_processor", _wrap_output_processor)
    when_imported("vllm.v1.engine.async_llm", _wrap_async_llm)


def with_sampler(
    additional_config: Mapping[str, Any] | None,
    sampler: str | None,
    sampler_config: Mapping[str, Any] | str | None,
) -> dict[str, Any]:
    """`additional_config` plus the two settings, which is where the engine looks for them.

    Raises:
        ValueError: for a `sampler_config` that is no JSON object, or a setting that is given both
            by its own name and in `additional_config`, with different values.
    """
    merged = dict(additional_config or {})
    if isinstance(sampler_config, str):
        sampler_config = json_object(sampler_config)
    for name, value in zip(FLAGS, (sampler, sampler_config), strict=True):
        if value is None:
            continue
        value = str(value) if isinstance(value, str) else value
        if merged.get(name, value) != value:
            raise ValueError(
                f"{name}: given twice, as {value!r} and in additional_config as "
                f"{merged[name]!r}; remove one of them"
            )
        merged[name] = value
    return merged


def json_object(text: str) -> dict[str, Any]:
    """Parse the value of `--sampler-config`."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        value = error
    if not isinstance(value, dict):
        raise ValueError(
            f"sampler_config: expected a JSON object such as '{{\"rho\": 0.25}}', got {text!r}; "
            f"quote it as one argument"
        )
    return value


def _wrap_engine_args(module: ModuleType) -> None:
    versions.check()
    engine_args = module.EngineArgs
    wrap(engine_args, "create_model_config", {"self"}, _create_model_config)
    if "sampler" in engine_args.__dataclass_fields__:
        return  # this vLLM has the flag itself
    for cls in (engine_args, module.AsyncEngineArgs):
        wrap(cls, "__init__", {"model", "additional_config"}, _init)
    wrap(engine_args, "add_cli_args", {"parser"}, _add_cli_args)
    wrap(engine_args, "from_cli_args", {"cls", "args"}, _from_cli_args)
    wrap(engine_args, "create_engine_config", {"self", "usage_context"}, _create_engine_config)


def _wrap_input_processor(module: ModuleType) -> None:
    versions.check()
    # The one place that every beam search passes: its own requests look like any others.
    wrap(module.InputProcessor, "resolve_watermarking", {"self", "params"}, _resolve_watermarking)
    if _asks_the_model():
        return
    expected = {"request_id", "prompt", "params", "resumable"}
    wrap(module.InputProcessor, "process_inputs", expected, _process_inputs)


def _wrap_output_processor(module: ModuleType) -> None:
    versions.check()
    expected = {"self", "finish_reason", "kv_transfer_params"}
    wrap(module.RequestState, "make_request_output", expected, _make_request_output)


def _wrap_async_llm(module: ModuleType) -> None:
    versions.check()
    if _asks_the_model():
        return
    expected = {"prompt", "sampling_params", "request_id"}
    wrap(module.AsyncLLM, "generate", expected, _generate)


def _init(original: Callable[..., None]) -> Callable[..., None]:
    def __init__(
        self: Any, *args: Any, sampler: Any = None, sampler_config: Any = None, **kwargs: Any
    ) -> None:
        original(self, *args, **kwargs)
        if sampler is not None or sampler_config is not None:
            self.additional_config = with_sampler(self.additional_config, sampler, sampler_config)

    return __init__


def _add_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        group = parser.add_argument_group(
            title="boe-vllm", description="How a masked diffusion model chooses what to write."
        )
        group.add_argument(
            "--sampler",
            type=SamplerName,
            metavar="NAME",
            default=None,
            help="Unmasking policy for requests that name none, such as boe or confidence.",
        )
        group.add_argument(
            "--sampler-config",
            type=_json_argument,
            metavar="JSON",
            default=None,
            help="Its settings as a JSON object, for example '{\"rho\": 0.25}'.",
        )
        return parser

    return add_cli_args


def _json_argument(text: str) -> dict[str, Any]:
    try:
        return json_object(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _from_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_cli_args(cls: type, args: argparse.Namespace) -> Any:
        engine_args = original(cls, args)
        given = [getattr(args, name, None) for name in FLAGS]
        if given != [None, None]:
            engine_args.additional_config = with_sampler(engine_args.additional_config, *given)
        return engine_args

    return from_cli_args


def _create_engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked_for = [name for name in FLAGS if name in self.additional_config]
        if asked_for:
            from boe_vllm.request.limits import ServerSettings

            ServerSettings.read(self.additional_config)  # fail before any file of the model is read
        config = original(self, *args, **kwargs)
        if asked_for and not is_ours(config):
            raise ValueError(
                f"{asked_for[0]}: expected a masked diffusion model ({', '.join(FAMILIES)}), got "
                f"{config.model_config.architecture} ({self.model}); remove the setting or serve "
                f"one of these"
            )
        return config

    return create_engine_config


def _create_model_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """`dtype="auto"` leaves a float32 checkpoint in float32, where vLLM would take bfloat16:
    policies compare probabilities, and bfloat16 makes many of them equal."""

    def create_model_config(self: Any) -> Any:
        config = original(self)
        stored = str(getattr(config.hf_config, "dtype", None)).removeprefix("torch.")
        if config.architecture in FAMILIES and (self.dtype, stored) == ("auto", "float32"):
            import torch

            config.dtype = torch.float32
        return config

    return create_model_config


def _process_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not is_ours(self.vllm_config):
            return original(self, request_id, prompt, params, *args, **kwargs)
        from boe_vllm.vllm_plugin.admission import admit_request

        grammar = getattr(params, "structured_outputs", None)
        if grammar is not None:  # vLLM would make it one of a backend of its own
            params = params.clone()
            params.structured_outputs = None
        request = original(self, request_id, prompt, params, *args, **kwargs)
        if grammar is not None:
            request.sampling_params.structured_outputs = grammar
        admit_request(request, self.vllm_config)
        return request

    return process_inputs


def _resolve_watermarking(original: Callable[..., Any]) -> Callable[..., Any]:
    def resolve_watermarking(self: Any, params: Any) -> Any:
        if type(params).__name__ == "BeamSearchParams" and is_ours(self.vllm_config):
            from vllm.exceptions import VLLMValidationError

            raise VLLMValidationError(
                "use_beam_search is not supported by masked diffusion decoding, which has no "
                "beginnings to extend: expected False, got True; remove it",
                parameter="use_beam_search",
            )
        return original(self, params)

    return resolve_watermarking


def _make_request_output(original: Callable[..., Any]) -> Callable[..., Any]:
    def make_request_output(
        self: Any,
        new_token_ids: Any,
        pooling_output: Any,
        finish_reason: Any,
        stop_reason: Any,
        kv_transfer_params: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        from boe_vllm.vllm_plugin.sample_reports import CANVAS_KEY, CANVASES, joined

        watched = hasattr(self, CANVASES) or CANVAS_KEY in (kv_transfer_params or ())
        if watched or self.parent_req is not None:
            kv_transfer_params = joined(self, kv_transfer_params)
        given = (new_token_ids, pooling_output, finish_reason, stop_reason, kv_transfer_params)
        return original(self, *given, *args, **kwargs)

    return make_request_output


def _generate(original: Callable[..., Any]) -> Callable[..., Any]:
    """A plain function around the async generator, so that a request is resolved, and a bad one
    fails, when it is made: the HTTP server can still answer 400, where inside the generator a
    stream would have begun. A request that fails later says why, where vLLM says "Internal server
    error"."""

    def generate(self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_ours(self.vllm_config):
            return original(self, prompt, sampling_params, *args, **kwargs)
        from boe_vllm.vllm_plugin.admission import resolve_early
        from boe_vllm.vllm_plugin.output import with_reasons
        from boe_vllm.vllm_plugin.shutdown import refusal, stopping

        if stopping(self):
            raise refusal()
        params = resolve_early(prompt, sampling_params, self.input_processor)
        return with_reasons(original(self, prompt, params, *args, **kwargs), self)

    return generate


def _asks_the_model() -> bool:
    """Whether this vLLM asks a model's config hook about requests itself."""
    from vllm.model_executor.models.config import VerifyAndUpdateConfig

    return hasattr(VerifyAndUpdateConfig, "admit_request")


def is_ours(vllm_config: Any) -> bool:
    """Whether an engine's model is a masked diffusion model of ours."""
    model_config = vllm_config.model_config
    return model_config is not None and model_config.architecture in FAMILIES
