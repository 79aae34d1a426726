"""DAPD: an independent set of the attention graph (arXiv 2603.12996).

Two masked positions depend on each other where the mean of their attention in both directions, over
the heads of the last layers, exceeds `edge`. Positions are taken in the order of their confidence
times their degree, each unless a neighbour has been taken (Welsh and Powell). Once fewer than half
of the masks are left, all sure positions are written too.

The paper's code was not public when this was written. Its threshold on edges is not published: the
default is ours, and so is the reading of "degree-weighted" as a product with the sum of a
position's edges.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from boe_vllm.base.arrays import BoolArray, FloatArray, IntArray
from boe_vllm.base.options import options
from boe_vllm.policies.base import Commit, Needs, Policy, PolicyConfig, View, allowed, top
from boe_vllm.steering.attention_map import Attention

if TYPE_CHECKING:
    from boe_vllm.policies.base import Asking


@options
class DAPDConfig(PolicyConfig):
    """DAPD: write positions together that do not attend to each other."""

    edge: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of a row's attention above which two positions depend on each other (ours)."""
    layers: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of the layers whose attention counts, the last ones."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Probability above which a token is written in the second half."""


class DAPDPolicy(Policy[DAPDConfig]):
    """An independent set by degree and confidence; the number of steps adapts."""

    name = "dapd"
    Config = DAPDConfig
    source = "arXiv 2603.12996; the threshold on edges is ours"
    passes = "1 forward; the number of steps adapts"

    def needs(self) -> Needs:
        """The queries and keys of the masked rows."""
        return Needs(rows="masked")

    def step(self, view: View) -> Asking:
        """Read the attention, take the independent set, and what is sure late in the request."""
        attention: FloatArray = yield Attention(
            index=np.arange(len(view.positions)), layers=self.config.layers
        )
        strength = (attention + attention.T) / 2
        np.fill_diagonal(strength, 0.0)
        edges = strength > self.config.edge
        degree = np.where(edges, strength, 0.0).sum(1)
        # A position without neighbours conflicts with nobody, whatever its place in the order.
        scores = allowed(np.maximum(view.confidence, 0.0) * degree, view)
        written = np.zeros(len(scores), bool)
        written[independent_set(scores, edges)] = True
        if 2 * view.masked_now < view.masked_at_start:
            written |= view.confidence > self.config.threshold
        return Commit(chosen=np.flatnonzero(written), scores=scores)


def independent_set(scores: FloatArray, edges: BoolArray) -> IntArray:
    """Indices taken greedily by score, each without an edge to one before it; at least one.

    Args:
        scores: [M] best first; -inf for what may only come last, which is taken only alone.
        edges: [M, M] symmetric.
    """
    order = top(scores, len(scores))
    chosen = [int(order[0])]
    for i in order[1:].tolist():
        if np.isfinite(scores[i]) and not edges[i, chosen].any():
            chosen.append(i)
    return np.array(chosen, dtype=np.int64)
