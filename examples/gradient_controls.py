"""Does the gradient choose better than chance? Rules that let it, each beside its control.

A policy of its own, `choice`, writes what EB-Sampler's bound allows, with partial rounds as `joint`
has them, and leaves three choices open (`docs/method.md` has what came of it):

    order    in what order a quarter of the positions, the most probable ones, may be written
             ("tis", the Token Importance Score; "random", "confidence"; "entropy" is eb's own)
    context  by what `pool` further positions are predicted again beside the `pool` surest
             ("tis", by its size; "random"; "none")
    trigger  what ends the partial rounds when it has grown beyond `most`: the sum over what was
             written since the last full pass of the score's size ("tis") or of 1 ("count")

    python examples/gradient_controls.py --tasks sudoku6 --limit 500 --seed 778 --policies \
        choice,choice:order=tis,choice:order=random --cells docs/results/gradient-controls.jsonl

takes all options of `boe-vllm eval`; `--model tiny --whole-canvas --in-process` are set. The file
has what was run: these, `choice:rounds=1:pool=8:context=tis` and `=random`, `choice:rounds=64` with
`trigger=tis:most=0.3`, `=1`, `trigger=count:most=4`, `=8`, and the orders on `countdown`
(the same items' number and seed).
"""

from __future__ import annotations

import math
import sys
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

import boe_vllm.policies as registry
from boe_vllm.base.arrays import FloatArray, IntArray
from boe_vllm.base.options import options
from boe_vllm.policies.base import Commit, Needs, Policy, PolicyConfig, View, top
from boe_vllm.policies.bounded import Bound, bounded_rows, bounded_set
from boe_vllm.sampling import randomness
from boe_vllm.steering.chain import Conditional
from boe_vllm.steering.importance import Surrogate, TokenImportance

GAMMA = 0.01
SHARE = 0.25
BOUND = Bound(rule="entropy", limit=GAMMA, pool=64, rounds=0, trust=math.inf)


@options
class ChoiceConfig(PolicyConfig):
    """A bound with rounds, and what the gradient or a control chooses in it."""

    order: Literal["entropy", "confidence", "tis", "random"] = "entropy"
    """Order in which the most probable quarter may be written."""
    context: Literal["none", "tis", "random"] = "none"
    """What further positions a round predicts again."""
    trigger: Literal["none", "tis", "count"] = "none"
    """What ends the rounds of a step."""
    surrogate: Surrogate = "mask"
    """Of the score."""
    rounds: Annotated[int, Field(ge=0)] = 0
    """Most partial rounds in a step."""
    pool: Annotated[int, Field(ge=1)] = 64
    """Positions that a round predicts again, the surest."""
    most: Annotated[float, Field(ge=0)] = 0.0
    """What the trigger lets pass."""


class ChoicePolicy(Policy[ChoiceConfig]):
    """See the module."""

    name = "choice"
    Config = ChoiceConfig
    source = "an experiment"
    passes = "1 forward, `rounds` partial ones, and 1 backward where the score is asked for"

    def needs(self) -> Needs:
        """Masked rows, for rounds and backward."""
        return Needs(rows="masked")

    def rows_ahead(self, *, masks: int, quota: int, length: int) -> int:
        """The rounds and the score."""
        return bounded_rows(masks, self.config.rounds) + 2 * length

    def step(self, view: View):
        """The first set by the order, then rounds until the trigger."""
        config, everyone = self.config, np.arange(len(view.positions))
        uniform = view.uniforms(randomness.CHOOSE)
        score = np.zeros(len(everyone))
        if len(everyone) > 1 and "tis" in (config.order, config.context, config.trigger):
            score = yield TokenImportance(
                candidates=everyone,
                objective=everyone,
                active=everyone,
                surrogate=config.surrogate,
            )
        first = {"tis": score, "random": uniform, "confidence": view.confidence}
        if config.order == "entropy":
            chosen = bounded_set(view.entropy, view.confidence, BOUND)
        else:
            chosen = walked(view, first[config.order])
        weight = {"tis": abs(score), "count": np.ones(len(everyone))}.get(config.trigger)
        tokens, entropy = view.proposal.copy(), view.entropy.copy()
        for _ in range(config.rounds):
            left = np.setdiff1d(everyone, chosen)
            if not len(left) or (weight is not None and weight[chosen].sum() > config.most):
                break
            asked = left[top(-entropy[left], config.pool)]
            if config.context != "none":
                rest = np.setdiff1d(left, asked)
                by = abs(score) if config.context == "tis" else uniform
                asked = np.concatenate([asked, rest[top(by[rest], config.pool)]])
            asked = np.sort(asked)
            given = yield Conditional(
                written=chosen,
                tokens=tokens[chosen],
                queried=asked,
                temperature=view.temperature,
                uniform=view.uniforms(randomness.WRITE)[asked],
            )
            tokens[asked], entropy[asked] = given.proposal, given.entropy
            more = bounded_set(given.entropy, given.confidence, BOUND)
            chosen = np.concatenate([chosen, asked[more]])
        return Commit(chosen=chosen, tokens=tokens[chosen])


def walked(view: View, score: FloatArray) -> IntArray:
    """Positions taken in order while the bound holds, those that would break it passed over: the
    most probable ones by score, then the others by entropy."""
    count = math.ceil(SHARE * len(score))
    probable = top(view.confidence, count)
    others = np.setdiff1d(np.arange(len(score)), probable)
    chosen: list[int] = []
    total = largest = 0.0
    order = [probable[top(score[probable], count)], others[top(-view.entropy[others], len(score))]]
    for i in np.concatenate(order):
        added, most = total + view.entropy[i], max(largest, view.entropy[i])
        if not chosen or added - most <= GAMMA:
            chosen.append(int(i))
            total, largest = added, most
    return np.array(chosen)


def main() -> int:
    """Make the policy known to this process, and evaluate."""
    registry._ADDED["choice"] = __name__
    registry.POLICY_NAMES = registry.POLICY_NAMES | {"choice"}
    from boe_vllm.lab.eval import presets
    from boe_vllm.lab.eval.run import main as evaluate

    presets.OWN_RATE = presets.OWN_RATE | {"choice"}
    return evaluate(["--model", "tiny", "--whole-canvas", "--in-process", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
