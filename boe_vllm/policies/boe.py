"""Backward-on-Entropy steering (TABES, arXiv 2602.00250, Algorithm 1), and its choice of sets.

A candidate's score is `risk ln p_i + gain TIS_i`: how likely its token is right, and how much
revealing it would lower the entropy of the masked positions, estimated by one backward pass (Token
Importance Score, eq. 14), gated by confidence (eq. 15) and less a penalty for entropies below a
floor (eq. 18, 19). The paper writes the top of the ranking (`selection="top"`, risk 0). Eq. 9 queries
for the best *set*: the other selections add the interaction of what is written together.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any

import numpy as np

from boe_vllm.base.arrays import FloatArray, IntArray
from boe_vllm.policies.base import Commit, Needs, Policy, View, top
from boe_vllm.policies.boe_config import PRESETS, BoEConfig
from boe_vllm.policies.composition import composed
from boe_vllm.policies.selection import conditional_set, pairwise_set
from boe_vllm.steering.coupling import Coupling
from boe_vllm.steering.importance import TokenImportance
from boe_vllm.steering.step import Query

__all__ = ["PRESETS", "BoEConfig", "BoEPolicy"]

TINY = 1e-300  # the logarithm of a probability that underflows


class BoEPolicy(Policy):
    """Backward-on-Entropy.

    End game: when the objective is empty, or nothing is left to choose (as many candidates as
    tokens due), the gradient can decide nothing and the candidates are taken by confidence.
    """

    name = "boe"
    Config = BoEConfig

    def __init__(self, config: BoEConfig) -> None:
        super().__init__(config)
        self.settings = config

    def needs(self) -> Needs:
        """Rows that a backward or a partial pass over the step's own forward needs."""
        settings = self.settings
        steers = settings.gain > 0 and not (
            settings.surrogate == "inject" and settings.context == "exact"
        )
        if steers and settings.active == "all":
            return Needs(rows="all")
        return Needs(rows="masked" if steers or settings.selection != "top" else "none")

    def rows_ahead(self, *, masks: int, quota: int, length: int) -> int:
        """A surrogate's forward, and the states that a set's interaction is measured on."""
        settings = self.settings
        pool = min(masks, math.ceil(settings.pool * quota))
        rows = 2 * length if settings.gain > 0 else 0
        if settings.selection == "conditional":
            return rows + quota * pool
        if settings.selection == "pairwise" and settings.coupling in ("exact", "pairs"):
            return rows + pool * (masks if settings.coupling == "exact" else pool)
        return rows

    def step(self, view: View) -> Generator[Query, Any, Commit]:
        """The choice, with the remasking or the commit bound that the settings put on top."""
        ranks = self.settings.selection == "top"
        return (yield from composed(self.choose, view, self.settings, ranks=ranks))

    def choose(self, view: View) -> Generator[Query, Any, Commit]:
        """Prefilter, score by risk and gain, choose the set."""
        settings = self.settings
        chosen_by = prefilter_scores(view, settings.prefilter)
        candidates = np.sort(top(chosen_by, candidate_count(view, settings)))
        everyone = np.arange(len(view.positions))
        objective = everyone
        if settings.objective == "remaining":
            objective = np.setdiff1d(everyone, candidates)
        undecided = len(candidates) > view.quota and len(objective) > 0
        if undecided or settings.gain == 0:
            scores = settings.risk * np.log(np.maximum(view.confidence[candidates], TINY))
        else:
            scores = view.confidence[candidates]
        if settings.gain > 0 and undecided:
            active = {"all": None, "candidates": candidates, "masked": everyone}[settings.active]
            importance = yield TokenImportance(
                candidates=candidates,
                objective=objective,
                active=active,
                surrogate=settings.surrogate,
                context=settings.context,
                sharpen=settings.sharpen,
            )
            weight = settings.gain / (len(objective) if settings.gain_scale == "mean" else 1)
            scores = scores + weight * steered_scores(importance, view, candidates, settings)
        scores = np.where(np.isneginf(view.confidence[candidates]), -np.inf, scores)
        tokens = None
        if settings.selection == "conditional" and view.quota > 1:
            chosen, tokens = yield from conditional_set(
                view, candidates, scores, risk=settings.risk, certain=settings.certain
            )
        elif settings.selection == "pairwise" and len(candidates) > view.quota > 1:
            coupling = yield Coupling(
                pool=candidates,
                tokens=view.proposal[candidates],
                entropy=view.entropy[candidates],
                estimator=settings.coupling,
                measure=settings.coupling_measure,
            )
            chosen = pairwise_set(scores, settings.interaction * coupling, view.quota)
        else:
            chosen = top(scores, view.quota)
        everyones = np.full(len(everyone), -np.inf)
        everyones[candidates] = scores
        return Commit(chosen=candidates[chosen], tokens=tokens, scores=everyones)


def candidate_count(view: View, settings: BoEConfig) -> int:
    """|C|: a fixed number, or a share of M, or a multiple of the tokens due for sets; at least the
    tokens due, at most |M|."""
    masked = len(view.positions)
    share = settings.rho * masked if settings.selection == "top" else settings.pool * view.quota
    wanted = settings.candidates or math.ceil(share)
    return min(masked, max(view.quota, wanted))


def prefilter_scores(view: View, name: str) -> FloatArray:
    """[M] what candidates are chosen by; forbidden early commits come last."""
    scores = {"confidence": view.confidence, "margin": view.margin, "entropy": -view.entropy}[name]
    return np.where(np.isneginf(view.confidence), -np.inf, scores)


def gate(view: View, settings: BoEConfig) -> FloatArray:
    """[M] factor c_i in [0, 1] (eq. 15 for "entropy")."""
    if settings.gate == "none":
        return np.ones(len(view.positions))
    if settings.gate == "confidence":
        factor = np.maximum(view.confidence, 0.0)
    else:
        factor = np.clip(1.0 - view.entropy / math.log(view.vocab_size), 0.0, 1.0)
    return factor**settings.gate_power


def entropy_floor(view: View, settings: BoEConfig) -> float:
    """h_t in nats (eq. 18), high at the start: h_max (masked now / masked at the start)."""
    return settings.floor_max * view.masked_now / view.masked_at_start


def steered_scores(
    importance: FloatArray, view: View, candidates: IntArray, settings: BoEConfig
) -> FloatArray:
    """[C] gated importance (eq. 15) less the floor's penalty (eq. 19); forbidden commits -inf."""
    scores = importance * gate(view, settings)[candidates]
    if settings.normalize == "minmax":
        low, high = scores.min(), scores.max()
        scores = (scores - low) / (high - low) if high > low else np.zeros_like(scores)
    shortfall = np.maximum(entropy_floor(view, settings) - view.entropy[candidates], 0.0)
    scores = scores - settings.floor_weight * shortfall**2
    return np.where(np.isneginf(view.confidence[candidates]), -np.inf, scores)
