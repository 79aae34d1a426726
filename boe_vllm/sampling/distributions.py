"""Rows of logits turned into log-probabilities, summarised and differentiated.

The work is memory-bound: on a CPU rows are taken a few at a time, so that they stay in its cache,
and large results lie in memory that is used again at the next step.

Legend: `r` rows, `V` vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from boe_vllm.models import fused, plain
from boe_vllm.models.functional import Scratch

Tensor = torch.Tensor

_CACHED_BYTES = 2**21
"""Rows x V that are worked on at a time on a CPU."""


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    """What one look at the logits of some rows tells, on the device."""

    argmax: Tensor
    """[r] most likely token."""
    best: Tensor
    """[r] its log-probability, nats."""
    second: Tensor
    """[r] second largest log-probability, nats."""
    entropy: Tensor
    """[r] nats."""


class VocabularyMemory:
    """Memory that steps reuse for their rows x V: log-probabilities, and a gradient of them."""

    def __init__(self) -> None:
        self.log_probs, self.gradient = Scratch(), Scratch()


def normalise_(logits_rV: Tensor) -> Summary:
    """Turn logits into log-probabilities, in place, and summarise them on the way."""
    if logits_rV.is_cuda:
        return Summary(*fused.normalise_(logits_rV))
    parts = [plain.normalise_(logits_rV[rows]) for rows in _in_cache(logits_rV)]
    return Summary(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def entropy_gradient(logp_rV: Tensor, scratch: Scratch | None = None) -> Tensor:
    """Gradient of each row's entropy with respect to its logits: `-p (ln p + H)`, [r, V].

    With `scratch` it lies in that memory.
    """
    gradient = (scratch or Scratch()).like(logp_rV, logp_rV.shape[1])
    if logp_rV.is_cuda:
        fused.entropy_gradient_(logp_rV, gradient)
        return gradient
    for rows in _in_cache(logp_rV):
        plain.entropy_gradient_(logp_rV[rows], gradient[rows])
    return gradient


def _in_cache(x_rV: Tensor) -> Iterator[slice]:
    """The rows, as many at a time as stay in a CPU's cache."""
    rows = max(len(x_rV), 1)
    step = max(1, _CACHED_BYTES // (x_rV.shape[1] * x_rV.element_size()))
    for start in range(0, rows, step):
        yield slice(start, start + step)
