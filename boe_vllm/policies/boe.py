"""Backward-on-Entropy steering (TABES, arXiv 2602.00250, Algorithm 1).

One step: candidates among the masked positions; one backward of the masked entropy from a surrogate
of the next state, with attention passing gradients in active rows only; a score for each candidate;
the best are written. The paper writes the top of the ranking (`sets="top"`). Eq. 9 asks for the
best *set*: by default the best candidate is written first and the set completed by the chain rule
(`selection.chain_set`), which is the rule of `joint`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np

from boe_vllm.base.arrays import FloatArray, IntArray
from boe_vllm.policies.base import Commit, Needs, Policy, View, candidates_of, certainty, log, top
from boe_vllm.policies.boe_config import PRESETS, BoEConfig
from boe_vllm.policies.bounded import bounded_commit, bounded_set
from boe_vllm.policies.composition import allowed_count, composed
from boe_vllm.policies.drafted import drafted_commit
from boe_vllm.policies.selection import chain_rows, chain_set, over_all
from boe_vllm.steering.importance import TokenImportance

if TYPE_CHECKING:
    from boe_vllm.policies.base import Asking

__all__ = ["PRESETS", "BoEConfig", "BoEPolicy"]


class BoEPolicy(Policy[BoEConfig]):
    """Backward-on-Entropy.

    Every step with a choice runs exactly one backward, unless all its tokens are sure (`bypass`).
    There is no choice when there are as many candidates as tokens due, or nothing to explain (an
    empty objective): the gradient can decide nothing then, and probability decides.
    """

    name = "boe"
    Config = BoEConfig
    source = "TABES (arXiv 2602.00250), Algorithm 1; the chain of sets is ours"
    passes = (
        "1 forward and, in a step with a choice, 1 backward over the block's masks; with several "
        'tokens a step and `sets` "chain", partial forwards over the candidates; 1 more forward '
        'for the surrogates but "mask", over the candidates or ("inject") the block'
    )

    def needs(self) -> Needs:
        """Rows that a backward or a partial pass over the step's own forward needs."""
        # The second forward of "inject" saves its own rows, but finds frozen ones in the first.
        everything = self.config.active == "all" and self.config.surrogate != "inject"
        drafts = self.config.commit == "drafts"
        return Needs(rows="all" if everything else "masked", same_draws=drafts)

    def rows_ahead(self, *, masks: int, quota: int, length: int) -> int:
        """A surrogate's forward, the backward, and the chain's rounds."""
        config = self.config
        due = config.most_due(masks, quota)
        candidates = min(masks, candidate_count(masks, due, config))
        forward = {"mask": 0, "inject": masks if config.context == "frozen" else length}
        backward = length if config.active == "all" else masks
        chain = chain_rows(candidates, due) if config.sets == "chain" else 0
        if config.adapts:
            chain = config.bounded_rows(masks=masks, length=length)
        return forward.get(config.surrogate, candidates) + backward + chain

    def step(self, view: View) -> Asking:
        """What the bound allows, or the choice with what the settings put on top."""
        if self.config.adapts:
            return (yield from self.bounded(view))
        ranks = self.config.sets == "top"
        return (yield from composed(self.choose, view, self.config, ranks=ranks))

    def bounded(self, view: View) -> Asking:
        """What the bound allows, or where it is one unsure position the best by score; then rounds
        or drafts."""
        config, bound = self.config, self.config.allowed()
        scores = certainty(view, "confidence" if bound.rule == "threshold" else "entropy")
        first = bounded_set(view.entropy, view.confidence, bound)
        if undecided(view.confidence, first, config):
            pivot = yield from self.choose(dataclasses.replace(view, quota=1))
            assert pivot.scores is not None
            first, scores = pivot.chosen, pivot.scores
        if config.commit != "drafts":
            return (yield from bounded_commit(view, first, scores, bound))
        commit, state = yield from drafted_commit(view, first, scores, bound, config.drafting())
        if state is not None and len(state.index):
            likely = view.committable(state.proposal, state.confidence)
            if undecided(likely, bounded_set(state.entropy, likely, bound), config):
                # A score needs the activations of the step's own forward.
                commit = dataclasses.replace(commit, carry=None)
        return commit

    def choose(self, view: View) -> Asking:
        """Candidates, their scores, and the set."""
        config, everyone = self.config, np.arange(len(view.positions))
        count = candidate_count(len(everyone), view.quota, config)
        order = candidates_of(view, certainty(view, config.prefilter), count)
        candidates = np.sort(order)
        objective = everyone
        if config.objective == "remaining":
            objective = np.setdiff1d(everyone, candidates)
        scores = log(view.confidence[candidates])
        choice = len(candidates) > view.quota and len(objective) > 0
        if choice and not all_sure(view, config):
            importance: FloatArray = yield TokenImportance(
                candidates=candidates,
                objective=objective,
                active={"all": None, "candidates": candidates, "masked": everyone}[config.active],
                surrogate=config.surrogate,
                context=config.context,
                sharpen=config.sharpen,
            )
            weight = 1 / len(objective) if config.gain_scale == "mean" else config.gain_scale
            scores = config.risk * scores + weight * steered(importance, view, candidates, config)
        if config.sets == "chain":
            chosen, tokens = yield from chain_set(view, candidates, scores)
        else:
            chosen, tokens = top(scores, view.quota), None
        scores = over_all(view, candidates, scores)
        return Commit(chosen=candidates[chosen], tokens=tokens, scores=scores)


def candidate_count(masked: int, due: int, config: BoEConfig) -> int:
    """|C|: a fixed number or a share of M, at least the tokens due, twice as many for a chain."""
    wanted = config.candidates or math.ceil(config.rho * masked)
    return max(wanted, due * (2 if config.sets == "chain" else 1))


def all_sure(view: View, config: BoEConfig) -> bool:
    """Whether all tokens that would be written by probability alone reach `bypass`."""
    order = top(view.confidence, len(view.positions))
    if config.sets == "chain":
        order = order[: view.quota]
    return sure(view.confidence[order[: allowed_count(view, order, config)]], config)


def sure(confidence: FloatArray, config: BoEConfig) -> bool:
    """Whether some proposals all reach `bypass`."""
    return config.bypass is not None and bool((confidence >= config.bypass).all())


def undecided(confidence: FloatArray, first: IntArray, config: BoEConfig) -> bool:
    """Whether a bound allows one position that is not sure, of several: its score is asked for."""
    return len(first) == 1 and len(confidence) > 1 and not sure(confidence[first], config)


def gate(view: View, config: BoEConfig) -> FloatArray:
    """[M] factor c_i in [0, 1] (eq. 15 for "entropy")."""
    if config.gate == "none":
        return np.ones(len(view.positions))
    if config.gate == "confidence":
        factor = np.maximum(view.confidence, 0.0)
    else:
        factor = np.clip(1.0 - view.entropy / math.log(view.vocab_size), 0.0, 1.0)
    return factor**config.gate_power


def entropy_floor(view: View, config: BoEConfig) -> float:
    """h_t in nats (eq. 18), high at the start: h_max (masked now / masked at the start)."""
    return config.floor_max * view.masked_now / view.masked_at_start


def steered(
    importance: FloatArray, view: View, candidates: IntArray, config: BoEConfig
) -> FloatArray:
    """[C] gated importance (eq. 15) less the floor's penalty (eq. 19); forbidden commits -inf."""
    scores = importance * gate(view, config)[candidates]
    if config.normalize == "minmax":
        low, high = scores.min(), scores.max()
        scores = (scores - low) / (high - low) if high > low else np.zeros_like(scores)
    shortfall = np.maximum(entropy_floor(view, config) - view.entropy[candidates], 0.0)
    scores = scores - config.floor_weight * shortfall**2
    return np.where(np.isneginf(view.confidence[candidates]), -np.inf, scores)
