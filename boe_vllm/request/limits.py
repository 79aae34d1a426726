"""What only the server may set, in vLLM's `additional_config`: memory, and limits on requests.

The limits have defaults that every sensible request stays below, so that no single one can take
the machine. vLLM's own limits hold beside them (`max_model_len`, `max_num_batched_tokens`,
`max_logprobs`, the number of bad words, `n`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from boe_vllm.base import options

if TYPE_CHECKING:
    from boe_vllm.policies import Policy
    from boe_vllm.request.config import CanvasPlan, SamplerConfig

PositiveInt = Annotated[int, Field(ge=1)]


@options.options
class EngineSettings:
    """The server's settings; see the module."""

    logits_budget_mb: PositiveInt = 256
    """Largest temporary of rows x vocabulary, MiB; more rows are computed tile by tile."""
    max_gen_length: PositiveInt | None = None
    """Tokens of a canvas. Default: what the model's context leaves."""
    max_steps: PositiveInt = 16_384
    """Denoising steps of a request."""
    max_lookahead_rows: PositiveInt = 65_536
    """Rows that a request's policy may ask for in one step, beyond the step's own forward."""
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

    def check(
        self,
        config: SamplerConfig,
        plan: CanvasPlan,
        policy: Policy,
        *,
        prompt_len: int,
        infill: int,
    ) -> None:
        """Refuse a request that is beyond a limit.

        Args:
            config: the request's.
            plan: its canvas.
            policy: what decodes it.
            prompt_len: tokens of its prompt.
            infill: how many of them are masks.

        Raises:
            ValueError: naming the field, the limit and what came.
        """
        length = prompt_len + plan.gen_length
        guided = 1 + (config.frame.cfg_scale > 0)
        block = min(plan.block_length, plan.gen_length)
        steps = plan.steps_for(block)
        blocks = -(-plan.gen_length // plan.block_length)
        # Masks in the prompt are written with the first block, and make it longer.
        masks = block + infill
        total = (blocks - 1) * policy.step_limit(block, steps)
        total += policy.step_limit(masks, plan.steps_for(masks))
        rows = guided * policy.rows_ahead(masks=masks, quota=-(-masks // steps), length=length)
        for name, value, limit, remedy in (
            ("gen_length", plan.gen_length, self.max_gen_length, "lower it or max_tokens"),
            ("steps", total, self.max_steps, "lower it, or choose another policy"),
            ("policy", rows, self.max_lookahead_rows, "look ahead less, or lower block_length"),
            (
                "trace",
                plan.gen_length * config.frame.trace,
                self.max_trace_length,
                "remove it or lower gen_length",
            ),
        ):
            if limit is not None and value > limit:
                what = _UNITS[name]
                raise ValueError(
                    f"{name}: expected at most {limit} {what} (a limit of this server), got "
                    f"{value}; {remedy}"
                )


_UNITS = {
    "gen_length": "tokens of canvas",
    "steps": "denoising steps",
    "policy": "rows of look-ahead in a step",
    "trace": "tokens of canvas with a trace",
}
