"""Policies that rank positions by their own prediction alone and write the `quota` best.

How many are due in a step is the frame's (`steps` or `tokens_per_step`, and `schedule`).
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from boe_vllm.base.arrays import FloatArray
from boe_vllm.base.options import options
from boe_vllm.policies.base import SCORE_GRID, Commit, Policy, PolicyConfig, View, top
from boe_vllm.sampling import randomness
from boe_vllm.steering.step import Query


class LocalPolicy(Policy):
    """A policy that ranks positions by a score of their own prediction: the top `b` are written."""

    def score(self, view: View) -> FloatArray:
        """[M] higher is written earlier."""
        raise NotImplementedError

    def step(self, view: View) -> Generator[Query, Any, Commit]:
        """Commit the `quota` best positions."""
        scores = self.score(view)
        return Commit(chosen=top(scores, view.quota), scores=scores)
        yield  # a generator like every policy's step


@options
class CertaintyConfig(PolicyConfig):
    """Settings of `confidence`, `margin` and `entropy`."""

    alg_temp: Annotated[float, Field(ge=0)] = 0.0
    """Dream's `alg_temp`: above 0, positions are drawn without replacement from
    softmax(score / alg_temp) instead of the best being taken. Default 0, as in Dream
    (HKUNLP/Dream `generation_utils.py`, where it is None)."""


class CertaintyPolicy(LocalPolicy):
    """A local policy whose score is the certainty of the prediction."""

    Config = CertaintyConfig

    def __init__(self, config: CertaintyConfig) -> None:
        super().__init__(config)
        self.alg_temp = config.alg_temp

    def certainty(self, view: View) -> FloatArray:
        """[M] higher is surer."""
        raise NotImplementedError

    def score(self, view: View) -> FloatArray:
        """[M] certainties, perturbed if `alg_temp` is set; forbidden early commits come last."""
        scores = allowed(self.certainty(view), view)
        if self.alg_temp > 0:
            scores = scores_of_a_draw(scores, self.alg_temp, view.uniforms(randomness.CHOOSE))
        return scores


def allowed(scores: FloatArray, view: View) -> FloatArray:
    """[M] the scores, with -inf where the request forbids an early commit."""
    return np.where(np.isneginf(view.confidence), -np.inf, scores)


def scores_of_a_draw(scores: FloatArray, temperature: float, uniforms: FloatArray) -> FloatArray:
    """[M] scores whose top k are a draw of k without replacement from softmax(score / temperature).

    Gumbel-top-k (Kool et al. 2019): `score / temperature - ln(-ln u)`. The scores are put on
    `SCORE_GRID` first, so that a small temperature does not enlarge rounding noise.
    """
    on_grid = np.round(scores / SCORE_GRID) * SCORE_GRID
    return on_grid / temperature - np.log(-np.log(uniforms))
