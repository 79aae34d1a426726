"""Log-probabilities of given tokens at masked positions, from the step's own forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from boe_vllm.arrays import IntArray
from boe_vllm.steering.asks import Ask
from boe_vllm.steering.step import Answer, DenoisingPass


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Likelihood(Ask):
    """Ask how likely given tokens are; answered with float64 [N], nats. Costs no forward."""

    index: IntArray
    """[N] indices into `View.positions`."""
    tokens: IntArray
    """[N] a token for each."""


def likelihood(current: DenoisingPass, asks: Sequence[tuple[int, Likelihood]]) -> list[Answer]:
    """[N] log-probabilities per ask; `asks` are pairs of a sequence of the pass and its ask."""
    rows = np.concatenate([current.logit_rows(s, ask.index) for s, ask in asks])
    tokens = torch.from_numpy(np.concatenate([ask.tokens for _, ask in asks])).to(current.device)
    values = np.empty(len(rows))
    for places, logp in current.log_probs.rows(rows):
        found = logp.gather(-1, tokens[places][:, None])[:, 0]
        values[places] = found.double().cpu().numpy()
    ends = np.cumsum([len(ask.index) for _, ask in asks])
    return [Answer(value=own) for own in np.split(values, ends[:-1])]
