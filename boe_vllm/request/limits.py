"""What only the server may set, in vLLM's `additional_config`: memory, defaults, and limits.

The limits have defaults that every sensible request stays below, so that no single one can take
the machine. vLLM's own limits hold beside them (`max_model_len`, `max_num_batched_tokens`,
`max_logprobs`, the number of bad words, `n`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from boe_vllm.base import options
from boe_vllm.base.options import shown
from boe_vllm.request.config import PositiveInt, SamplerConfig, parse_sampler_config

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]

BUDGET_MB = {"cpu": 256, "cuda": 2048}


@options.options
class EngineSettings:
    """The server's settings; see the module."""

    logits_budget_mb: PositiveInt | None = None
    """Largest temporary of rows x vocabulary, MiB; more rows are computed tile by tile. Default:
    256 on a CPU, 2048 on a GPU."""
    attention_impl: Literal["auto", "torch", "xformers"] = "auto"
    """Kernels of the attention: PyTorch's or xformers'; "auto" takes what suits the device."""
    score_grid: Annotated[float, Field(gt=0)] | None = None
    """Round statistics to multiples of this before policies compare them, for tensor parallelism
    across unlike hardware. Default: no rounding."""
    mask_token_id: Annotated[int, Field(ge=0)] | None = None
    """Token that stands for "not written yet". Default: the one that config.json or the tokenizer
    names."""
    default_max_tokens: PositiveInt = 256
    """Tokens of a canvas where a request gives neither `max_tokens` nor a length of its own."""
    default_seed: Seed | None = None
    """Seed of requests that give none. Default: a fresh one for each."""
    grammar_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 10.0
    """Seconds that the automaton of a request's grammar may take to make."""
    watch: bool = False
    """Serve the page `/watch`, on which one sees canvases fill."""
    max_canvas_rate: Annotated[float, Field(gt=0, le=1000)] = 20.0
    """Most snapshots of a canvas in a second, for requests with `stream_canvas`."""
    watchdog_interval_s: Annotated[float, Field(ge=0, le=3600)] = 10.0
    """Seconds between two questions to the engine whether it still takes requests, which `/health`
    tells; 0 asks none."""
    watchdog_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 60.0
    """Seconds after which an engine that has not answered is not healthy; a step may take long."""
    max_gen_length: PositiveInt | None = None
    """Tokens of a canvas. Default: what the model's context leaves."""
    max_steps: PositiveInt = 16_384
    """Denoising steps of a request."""
    max_lookahead_rows: PositiveInt = 65_536
    """Rows that a request's policy may ask for in one step, beyond the step's own forward."""
    max_infill: PositiveInt = 4_096
    """Masks of a prompt that are written."""
    max_trace_length: PositiveInt = 16_384
    """Tokens of a canvas whose trace may be asked for."""

    @classmethod
    def read(cls, additional_config: Mapping[str, Any]) -> EngineSettings:
        """Our settings among vLLM's `additional_config`.

        Raises:
            ValueError: for an invalid value, by name.
        """
        known = options.names(cls)
        return options.build(cls, {k: v for k, v in additional_config.items() if k in known})

    def budget_bytes(self, device_type: str) -> int:
        """`logits_budget_mb` in bytes, for a kind of device as PyTorch calls it."""
        return (self.logits_budget_mb or BUDGET_MB.get(device_type, BUDGET_MB["cpu"])) * 2**20

    def check(self, field: str, value: int) -> None:
        """Refuse a request that is beyond a limit.

        Args:
            field: of the request, that what is limited follows from; a key of `_LIMITS`.
            value: what it comes to.

        Raises:
            ValueError: naming the field, the limit and what came.
        """
        setting, unit, remedy = _LIMITS[field]
        limit = getattr(self, setting)
        if limit is not None and value > limit:
            raise ValueError(
                f"{field}: expected at most {limit} {unit} (this server's {setting}), got "
                f"{value}; {remedy}"
            )


# Field of a request -> the setting that limits it, what is counted, and what to do.
_LIMITS = {
    "gen_length": ("max_gen_length", "tokens of canvas", "lower it or max_tokens"),
    "steps": ("max_steps", "denoising steps", "lower it, or choose another policy"),
    "policy": (
        "max_lookahead_rows",
        "rows of look-ahead in a step",
        "look ahead less, or lower block_length",
    ),
    "prompt": ("max_infill", "masks to write", "remove some, or set infill to false"),
    "trace": ("max_trace_length", "tokens of canvas with a trace", "remove it or lower gen_length"),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """What the server says about all requests."""

    config: SamplerConfig = dataclasses.field(default_factory=SamplerConfig)
    """Defaults of the requests' fields."""
    limits: EngineSettings = dataclasses.field(default_factory=EngineSettings)

    @classmethod
    def read(cls, additional_config: Mapping[str, Any]) -> ServerSettings:
        """The defaults in `sampler` and `sampler_config`, and our settings beside them.

        Raises:
            ValueError: naming the field, what was expected and what came.
        """
        limits = EngineSettings.read(additional_config)
        sampler = additional_config.get("sampler")
        fields = additional_config.get("sampler_config")
        fields = {} if fields is None else fields
        if not isinstance(fields, Mapping):
            raise ValueError(
                f"sampler_config: expected a mapping such as {{'rho': 0.25}}, got {shown(fields)}"
            )
        if sampler is not None:
            if fields.get("policy", sampler) != sampler:
                raise ValueError(
                    f"sampler: expected the policy of sampler_config ({fields['policy']!r}), got "
                    f"{sampler!r}; remove one of them"
                )
            fields = {**fields, "policy": sampler}
        return cls(config=parse_sampler_config(fields), limits=limits)
