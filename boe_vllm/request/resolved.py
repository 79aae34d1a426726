"""What the engine knows about a request before its first step."""

from __future__ import annotations

import dataclasses

from boe_vllm.request.config import CanvasPlan, SamplerConfig
from boe_vllm.sampling.constraints import TokenConstraints


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedRequest:
    """What a request asked for, resolved and validated."""

    config: SamplerConfig
    plan: CanvasPlan
    temperature: float
    """0 writes the argmax, otherwise samples from softmax(logits / temperature)."""
    seed: int
    top_logprobs: int = 0
    """Log-probabilities to report per token, beside its own."""
    logprobs: bool = False
    """Whether log-probabilities are reported at all."""
    constraints: TokenConstraints = dataclasses.field(default_factory=TokenConstraints)
    """What is demanded of every token."""
