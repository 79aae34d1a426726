"""Backward-on-Entropy steering (TABES, arXiv 2602.00250, Algorithm 1).

Rank the candidates by how much revealing each would lower the entropy of the masked positions,
estimated by one backward pass (Token Importance Score, eq. 14), gated by confidence (eq. 15) and
less a penalty for entropies below a floor (eq. 18, 19).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from boe_vllm.arrays import FloatArray, IntArray
from boe_vllm.options import options
from boe_vllm.policies.base import Commit, Needs, Policy, PolicyConfig, View, top
from boe_vllm.steering.asks import Ask, Context, Surrogate, TokenImportance

PRESETS: dict[str, dict[str, Any]] = {
    # Eq. 13 and 14 to the letter. The paper publishes neither lambda nor h_max ("tuned on a small
    # validation subset"); the values are those of the authors' prototype.
    "paper": {
        "surrogate": "mask",
        "objective": "masked",
        "active": "masked",
        "rho": 0.25,
        "gate": "entropy",
        "floor_weight": 0.2,
        "floor_max": 0.3,
    },
    # The authors' public prototype (toy model, June 2026), as described in `docs/method.md`.
    "prototype": {
        "surrogate": "inject",
        "context": "exact",
        "objective": "remaining",
        "active": "masked",
        "candidates": 3,
        "sharpen": 0.5,
        "gate": "confidence",
        "normalize": "minmax",
        "floor_weight": 0.2,
        "floor_max": 0.3,
    },
}


@options
class BoEConfig(PolicyConfig):
    """Settings of `boe`; entropies in nats."""

    preset: Literal["paper", "prototype"] | None = None
    """Named settings; fields given beside it override its own."""
    rho: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of the masked positions that are candidates (paper 4.1: 0.1, 0.25, 0.5)."""
    candidates: Annotated[int, Field(ge=1)] | None = None
    """A fixed number of candidates instead of a share."""
    prefilter: Literal["confidence", "margin", "entropy"] = "confidence"
    """What candidates are chosen by (paper 3.5)."""
    surrogate: Surrogate = "kv"
    """Where the entropy is linearised: "mask" (eq. 13, 14: at the mask embedding), "inject"
    (A.3.1: at the soft embeddings of all candidates), "kv" (in the keys and values)."""
    objective: Literal["masked", "remaining"] = "masked"
    """Entropies that are summed: of all of M, or of M without the candidates (eq. 11)."""
    active: Literal["masked", "candidates", "all"] = "masked"
    """Rows whose attention passes a gradient (eq. 30): C and the objective's, C alone, or all."""
    context: Context = "frozen"
    """For "inject": whether the rows outside the block keep their old keys and values in the
    second forward (an approximation) or are computed again."""
    gate: Literal["entropy", "confidence", "none"] = "entropy"
    """Factor on the score: eq. 15, the confidence itself, or 1."""
    gate_power: Annotated[float, Field(ge=0)] = 1.0
    """Exponent of the gate."""
    floor_weight: Annotated[float, Field(ge=0)] = 0.0
    """Lambda of the entropy floor (eq. 19)."""
    floor_max: Annotated[float, Field(ge=0)] = 0.0
    """h_max of the entropy floor, nats (eq. 18): high at the start, 0 at the end."""
    sharpen: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Temperature of the soft write: pi^(1/sharpen), renormalised."""
    normalize: Literal["none", "minmax"] = "none"
    """Rescale the scores of the candidates to [0, 1] before the floor's penalty."""

    def __post_init__(self) -> None:
        if self.active == "candidates" and self.objective == "remaining":
            raise ValueError(
                "active='candidates' with objective='remaining' gives an identically zero "
                "gradient: every path from a remaining position to a candidate passes through the "
                "remaining position's attention output, which eq. 30 stops; set active='masked' "
                "or objective='masked'"
            )
        if self.active == "all" and self.context == "frozen" and self.surrogate == "inject":
            raise ValueError(
                "active='all' with surrogate='inject' expected context='exact', got 'frozen': "
                "frozen rows pass no gradient; set context='exact'"
            )

    @classmethod
    def resolve(cls, fields: Mapping[str, Any], base: PolicyConfig | None) -> dict[str, Any]:
        """A preset replaces what the server set; the fields given beside it go on top."""
        if fields.get("preset") in PRESETS:
            return PRESETS[fields["preset"]] | dict(fields)
        return PolicyConfig.resolve.__func__(cls, fields, base)  # type: ignore[attr-defined]


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
        """Rows that the backward of the step's own forward passes through."""
        if self.settings.surrogate == "inject" and self.settings.context == "exact":
            return Needs()
        return Needs(rows="all" if self.settings.active == "all" else "masked")

    def step(self, view: View) -> Generator[Ask, Any, Commit]:
        """Prefilter, ask for importance, gate, penalise, take the best."""
        settings = self.settings
        chosen_by = prefilter_scores(view, settings.prefilter)
        candidates = np.sort(top(chosen_by, candidate_count(view, settings)))
        everyone = np.arange(len(view.positions))
        objective = everyone
        if settings.objective == "remaining":
            objective = np.setdiff1d(everyone, candidates)
        if len(objective) == 0 or len(candidates) == view.quota:
            scores = np.full(len(everyone), -np.inf)
            scores[candidates] = view.confidence[candidates]
            return Commit(chosen=top(scores, view.quota), scores=scores)
        active = {"all": None, "candidates": candidates, "masked": everyone}[settings.active]
        importance = yield TokenImportance(
            candidates=candidates,
            objective=objective,
            active=active,
            surrogate=settings.surrogate,
            context=settings.context,
            sharpen=settings.sharpen,
        )
        scores = np.full(len(everyone), -np.inf)
        scores[candidates] = steered_scores(importance, view, candidates, settings)
        return Commit(chosen=top(scores, view.quota), scores=scores)


def candidate_count(view: View, settings: BoEConfig) -> int:
    """|C|: ceil(rho |M|), or the fixed number; at least the tokens due, at most |M|."""
    masked = len(view.positions)
    wanted = settings.candidates or math.ceil(settings.rho * masked)
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
