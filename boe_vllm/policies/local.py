"""Policies that rank positions by their own prediction alone and write the `quota` best.

How many are due in a step is the frame's (`steps` or `tokens_per_step`, and `schedule`).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, TypeVar

import numpy as np
from pydantic import Field

from boe_vllm.base.arrays import FloatArray
from boe_vllm.base.options import options
from boe_vllm.policies.base import Commit, Policy, PolicyConfig, View, certainty, top
from boe_vllm.sampling import randomness

C = TypeVar("C", bound=PolicyConfig)


class LocalPolicy(Policy[C]):
    """A policy that ranks positions by a score of their own prediction."""

    def score(self, view: View) -> FloatArray:
        """[M] higher is written earlier."""
        raise NotImplementedError

    def step(self, view: View) -> Commit:
        """Commit the `quota` best positions."""
        scores = self.score(view)
        return Commit(chosen=top(scores, view.quota), scores=scores)


@options
class CertaintyConfig(PolicyConfig):
    """Write the surest positions first."""

    alg_temp: Annotated[float, Field(ge=0)] = 0.0
    """Randomness in the order of positions (Dream's `alg_temp`): above 0, positions are drawn
    without replacement from softmax(score / alg_temp). Default 0: the best are taken, as in Dream
    (HKUNLP/Dream `generation_utils.py`, where it is None)."""


class CertaintyPolicy(LocalPolicy[CertaintyConfig]):
    """A local policy whose score is a certainty of the prediction."""

    by: ClassVar[Literal["confidence", "margin", "entropy"]]
    """Which."""

    def score(self, view: View) -> FloatArray:
        """[M] certainties, perturbed if `alg_temp` is set; forbidden early commits come last."""
        scores, temperature = certainty(view, self.by), self.config.alg_temp
        if temperature > 0:
            scores = scores_of_a_draw(scores, temperature, view.uniforms(randomness.CHOOSE))
        return scores


def scores_of_a_draw(scores: FloatArray, temperature: float, uniforms: FloatArray) -> FloatArray:
    """[M] scores whose top k are a draw of k without replacement from softmax(score / temperature).

    Gumbel-top-k (Kool et al. 2019): `score / temperature - ln(-ln u)`.
    """
    return scores / temperature - np.log(-np.log(uniforms))
