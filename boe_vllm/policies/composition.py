"""What may go on top of a policy's own choice: remasking, and a bound that decides how many.

A composed policy says which positions it would write, best first, for a given number of tokens; the
functions here decide that number and what is masked again. TABES offers remasking as "optional"
(its Table 1) without saying how; the rule is ReMDM's, on the policy's choice.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from boe_vllm.base.arrays import BoolArray, IntArray
from boe_vllm.base.options import options
from boe_vllm.policies.base import PolicyConfig, View, top
from boe_vllm.policies.eb import bounded_count
from boe_vllm.policies.remasking import Diary, RemaskingConfig, RemaskingRule

if TYPE_CHECKING:
    from boe_vllm.policies.base import Asking

    Choose = Callable[[View], Asking]
    """A policy's own step; it writes at most `View.quota` positions."""

ROUNDING = 1e-9  # a count that is whole must not lose one


@options
class CompositionConfig(RemaskingConfig):
    """Settings that a policy may add to its own; the inherited ones belong to `remask`."""

    remask: Literal["none", "remdm"] = "none"
    """Whether written tokens may be masked again: "remdm" draws them by the ReMDM rule, whose
    settings are the other fields of this kind."""
    commit: Literal["rounds", "drafts", "quota", "eb", "threshold"] | None = None
    """How many positions are written; each policy says what it offers."""
    gamma: Annotated[float, Field(ge=0)] = 0.1
    """Bound of `commit` "eb" on `sum H - max H` of the tokens written together, nats. Default: that
    of the policy `eb`."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Least probability of a token for `commit` "threshold". Default: that of the policy
    `threshold`."""

    def __post_init__(self) -> None:
        self.rule()
        if self.remask != "none" and self.commit not in (None, "quota"):
            raise ValueError(
                f"commit: expected 'quota' beside remask='remdm', whose rates follow the schedule, "
                f"got {self.commit!r}; remove one of them"
            )

    @property
    def rewrites(self) -> bool:
        """With `remask`."""
        return self.remask != "none"

    @property
    def adapts(self) -> bool:
        """Whether a bound on one prediction decides how many are written, and then rounds or drafts
        how many more."""
        return self.commit in ("rounds", "drafts")

    def paced(self) -> PolicyConfig:
        """A request that says how many tokens a step writes gets as many by default."""
        return dataclasses.replace(self, commit="quota") if self.commit is None else self

    def most_due(self, masks: int, quota: int) -> int:
        """Most tokens that one step may write.

        Args:
            masks: masked positions of the block at its start.
            quota: most tokens that the frame's schedule has due.
        """
        # A step that masks r tokens again writes r more: as many as there are masks, at most.
        return masks if self.remask != "none" else min(masks, quota)


def composed(choose: Choose, view: View, config: CompositionConfig, *, ranks: bool) -> Asking:
    """A policy's step with what its settings put on top.

    Args:
        choose: the policy's own step.
        view: of the request.
        config: what goes on top.
        ranks: the policy scores every candidate, whatever the quota (it does not choose sets).
    """
    if config.remask == "remdm":
        return (yield from remasked(choose, view, config.rule()))
    if config.commit not in (None, "quota"):
        return (yield from bounded(choose, view, config, ranks=ranks))
    return (yield from choose(view))


def remasked(choose: Choose, view: View, rule: RemaskingRule) -> Asking:
    """The policy's choice, of the tokens that are due and as many as the rule masks again.

    ReMDM reveals at random and keeps the share written at `alpha_s` on average; here the shares are
    those of the frame's schedule, kept exactly: a step in which `r` tokens are masked again writes
    `r` more, chosen by the policy among what was masked before. For "loop" the shares are the
    rule's own, and iterations in which nothing happens are passed over. Where the policy writes
    fewer than that, fewer are masked again.
    """
    diary, masked, written = Diary(view), len(view.positions), view.written
    while True:
        k = diary.iteration
        if rule.schedule == "loop":
            rates = rule.rates(k, view.block_steps)
            total = math.floor(view.block_masks * rule.share(k, view.block_steps) + ROUNDING)
            due = max(0, total - len(written))
        else:
            due = view.quota
            rates = rule.between(
                len(written) / view.block_masks, (len(written) + due) / view.block_masks
            )
        drawn = rule.drawn(view, k, rates.sigma, written, diary.stored(written))
        # Where writes did not stand, a block has steps after the last that the schedule plans: what
        # is written by then may be sent.
        drawn &= rule.remasks_later(k, view.block_steps)
        remask = written[drawn][: masked - due]
        diary.iteration = k + 1
        if due + len(remask) > 0:
            break
    commit = yield from choose(dataclasses.replace(view, quota=due + len(remask)))
    remask = remask[: max(0, len(commit.chosen) - due)]
    confidence = np.maximum(view.confidence[commit.chosen], 0.0)
    diary.note(view.positions[commit.chosen], confidence)
    return dataclasses.replace(
        commit,
        remask=remask,
        settled=not rule.remasks_later(diary.iteration, view.block_steps),
    )


def bounded(choose: Choose, view: View, config: CompositionConfig, *, ranks: bool) -> Asking:
    """The longest prefix of the policy's order that the bound allows, at least one position."""
    commit = yield from choose(dataclasses.replace(view, quota=1) if ranks else view)
    order = commit.chosen
    if ranks:
        assert commit.scores is not None
        order = top(commit.scores, max(1, int(np.isfinite(commit.scores).sum())))
    count = allowed_count(view, order, config)
    tokens = commit.tokens if commit.tokens is None else commit.tokens[:count]
    return dataclasses.replace(commit, chosen=order[:count], tokens=tokens)


def allowed_count(view: View, order: IntArray, config: CompositionConfig) -> int:
    """How many leading positions of an order the settings let be written together, at least one.

    Forbidden early commits are in no prefix of a bound but one of their own.
    """
    confidence = view.confidence[order]
    if config.commit in (None, "quota", "rounds"):
        return min(len(order), view.quota)
    if config.commit == "eb":
        count = bounded_count(view.entropy[order], config.gamma)
        return max(1, min(count, leading(np.isfinite(confidence))))
    return max(1, leading(confidence >= config.threshold))


def leading(true: BoolArray) -> int:
    """How many entries are true before the first that is not."""
    return len(true) if true.all() else int(np.argmin(true))
