"""What revealing one masked position does to the entropies of the others, from the gradient.

For masked positions i and j, `influence[i, j]` is the first-order change of the entropy of j, in
nats, when i is revealed: negative where the entropy falls. It is the negative Token Importance
Score (eq. 14) of candidate i for the one objective row j, with one backward per j, and attention
passes the gradient in every row (no eq. 30), so that it is the gradient of the network itself:

    mask      (dH_j / de_i) . (E^T pi_i - e_mask), the derivative at the mask embedding (eq. 13)
    kv        the same in the keys and values of row i, which are computed with the soft write
    response  the gradient at the attention outputs of the other rows, times their exact change when
              row i's keys and values are replaced: the closest of the three (docs/evaluation.md)

Nothing here changes the decode: the passes run on a copy of the canvas between two steps, are
charged to no request, and leave its cache alone (they see every position as it is).
"""

from __future__ import annotations

import copy
from typing import Literal

import numpy as np
import torch

from boe_vllm.base.arrays import FloatArray
from boe_vllm.decoding.accounting import Account
from boe_vllm.decoding.canvas import Canvas
from boe_vllm.decoding.loop import DenoisingLoop
from boe_vllm.policies.base import Needs, Policy, PolicyConfig
from boe_vllm.steering.importance import TokenImportance

Linearised = Literal["mask", "kv", "response"]


class Probe(Policy):
    """Wants what a backward needs, and decides nothing."""

    def needs(self) -> Needs:
        """Every row's activations."""
        return Needs(rows="all", distributions=True)


@torch.no_grad()
def influence(
    loop: DenoisingLoop, canvas: Canvas, surrogate: Linearised = "response"
) -> FloatArray:
    """[M, M] float64, nats: the change of the entropy of column j when row i is revealed.

    Args:
        loop: whose model is asked; between two of its steps.
        canvas: before its next step; `M` are its writable positions, ascending.
        surrogate: where the entropy is linearised, see above. The diagonal is 0: a position that
            is revealed has no entropy left.
    """
    probe = copy.copy(canvas)
    probe.policy, probe.account = Probe(PolicyConfig()), Account()
    probe.cache = probe.carried = None
    _, current, _ = loop.predict([probe])
    everyone = np.arange(len(canvas.writable()))
    changes = np.zeros((len(everyone), len(everyone)))
    for j in everyone:
        others = np.delete(everyone, j)
        if len(others) == 0:
            break
        query = TokenImportance(
            candidates=others,
            objective=np.array([j]),
            active=None,
            surrogate=surrogate,
            context="frozen",
            sharpen=1.0,
        )
        (answer,) = TokenImportance.solve(current, [(0, query)])
        changes[others, j] = -answer.value
    return changes
