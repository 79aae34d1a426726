"""What may go on top of a policy's own choice: remasking, and a bound that decides how many.

A composed policy says which positions it would write, best first, for a given number of tokens; the
functions here decide that number and what is masked again. TABES offers remasking as "optional"
(its Table 1) without saying how; the rule is ReMDM's, on BoE's choice.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Generator
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from boe_vllm.base.arrays import BoolArray
from boe_vllm.base.options import options
from boe_vllm.policies.base import Commit, View, top
from boe_vllm.policies.eb import bounded_count
from boe_vllm.policies.remasking import Diary, RemaskingConfig, RemaskingRule
from boe_vllm.steering.step import Query

ROUNDING = 1e-9  # a count that is whole must not lose one

Choose = Callable[[View], Generator[Query, Any, Commit]]
"""A policy's own step; it writes `View.quota` positions."""


@options
class CompositionConfig(RemaskingConfig):
    """Settings that any policy may add to its own; the inherited ones belong to `remask`."""

    remask: Literal["none", "remdm"] = "none"
    """Whether written tokens may be masked again: "remdm" draws them by the ReMDM rule."""
    commit: Literal["quota", "eb", "threshold"] = "quota"
    """How many of the policy's ordering are written: the frame's quota; the longest prefix within
    the entropy bound; the longest prefix of sure tokens. At least one. Choices of whole sets
    ("pairwise", "conditional") are cut to that prefix and never grow beyond the quota."""
    gamma: Annotated[float, Field(ge=0)] = 0.1
    """"eb": bound on `cumsum(H) - cummax(H)`, nats. Default: that of `eb`."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.9
    """"threshold": least confidence. Default: that of `threshold`."""

    def __post_init__(self) -> None:
        self.rule()
        if self.remask != "none" and self.commit != "quota":
            raise ValueError(
                f"commit: expected 'quota' beside remask='remdm', whose rates follow the schedule, "
                f"got {self.commit!r}; remove one of them"
            )


def composed(
    choose: Choose, view: View, settings: CompositionConfig, *, ranks: bool
) -> Generator[Query, Any, Commit]:
    """A policy's step with what its settings put on top.

    Args:
        choose: the policy's own step.
        view: of the request.
        settings: what goes on top.
        ranks: the policy scores every candidate, whatever the quota (it does not choose sets).
    """
    if settings.remask == "remdm":
        return (yield from remasked(choose, view, settings.rule()))
    if settings.commit != "quota":
        return (yield from bounded(choose, view, settings, ranks=ranks))
    return (yield from choose(view))


def remasked(choose: Choose, view: View, rule: RemaskingRule) -> Generator[Query, Any, Commit]:
    """The policy's choice, of the tokens that are due and as many as the rule masks again.

    ReMDM reveals at random and keeps the share written at `alpha_s` on average; here the shares are
    those of the frame's schedule, kept exactly: a step in which `r` tokens are masked again writes
    `r` more, chosen by the policy among what was masked before. For "loop" the shares are the
    rule's own, and iterations in which nothing happens are passed over.
    """
    diary, masked, written = Diary(view), len(view.positions), view.written
    due, remask = 0, written[:0]
    while due == 0:
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
        remask = written[drawn][: masked - due]
        due += len(remask)
        diary.iteration = k + 1
    commit = yield from choose(dataclasses.replace(view, quota=due))
    confidence = np.maximum(view.confidence[commit.chosen], 0.0)
    diary.note(view.positions[commit.chosen], confidence)
    return dataclasses.replace(
        commit,
        remask=remask,
        settled=not rule.remasks_later(diary.iteration, view.block_steps),
    )


def bounded(
    choose: Choose, view: View, settings: CompositionConfig, *, ranks: bool
) -> Generator[Query, Any, Commit]:
    """The longest prefix of the policy's ordering that the bound allows, at least one position.

    Forbidden early commits are in no prefix but one of their own.
    """
    commit = yield from choose(dataclasses.replace(view, quota=1) if ranks else view)
    order = commit.chosen
    if ranks:
        assert commit.scores is not None
        order = top(commit.scores, max(1, int(np.isfinite(commit.scores).sum())))
    confidence = view.confidence[order]
    if settings.commit == "eb":
        count = bounded_count(view.entropy[order], settings.gamma)
        count = min(count, leading(np.isfinite(confidence)))
    else:
        count = leading(confidence >= settings.threshold)
    count = max(1, count)
    tokens = commit.tokens if commit.tokens is None else commit.tokens[:count]
    return dataclasses.replace(commit, chosen=order[:count], tokens=tokens)


def leading(true: BoolArray) -> int:
    """How many entries are true before the first that is not."""
    return len(true) if true.all() else int(np.argmin(true))
