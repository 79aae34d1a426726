"""One of several given answers: the one whose tokens the model finds likeliest.

Not a policy to ask for by name: a request with `choices` is decoded by it. Each answer's
log-likelihood is that of its tokens from left to right, everything after them masked,
`sum_k ln p(c_k | prompt, c_1 .. c_{k-1})`: one forward for each beginning that the answers share or
have alone, and one more where the canvas goes back to a shorter beginning. At temperature 0 the
likeliest answer is written, above it one is drawn from `softmax(log-likelihood / temperature)`.

Legend: `N` next tokens of a beginning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from boe_vllm.base.arrays import FloatArray
from boe_vllm.base.options import options
from boe_vllm.policies.base import Commit, Needs, Policy, PolicyConfig, View, top
from boe_vllm.sampling import randomness
from boe_vllm.sampling.constraints import Constraint
from boe_vllm.steering.likelihood import Likelihood

if TYPE_CHECKING:
    from boe_vllm.policies.base import Asking

Beginning = tuple[int, ...]


@options
class ChoicesConfig(PolicyConfig):
    """One of several given answers: the one whose tokens the model finds likeliest."""


class ChoicesPolicy(Policy[ChoicesConfig]):
    """Scores the answers one beginning at a time, and then writes one of them."""

    name = "choices"
    Config = ChoicesConfig
    source = "ours: the chain rule from left to right"
    passes = "1 forward for each beginning of the answers"

    def __init__(
        self, answers: Sequence[Sequence[int]], eos_token_id: int, rule: Constraint | None = None
    ) -> None:
        """Decode by given answers.

        Args:
            answers: in tokens.
            eos_token_id: what a canvas holds beyond its answer.
            rule: its filters restrict the draw, as they would one of tokens.
        """
        super().__init__(ChoicesConfig())
        self.answers = [tuple(answer) for answer in answers]
        self.eos_token_id = eos_token_id
        self.rule = rule or Constraint()
        self.beginnings = sorted(
            {answer[:k] for answer in self.answers for k in range(len(answer))}
        )

    def needs(self) -> Needs:
        """The step's log-probabilities, again."""
        return Needs(distributions=True)

    def step_limit(self, masks: int, steps: int) -> int:
        """Never reached: a step for each beginning, one to go back from it, and the last."""
        return 2 * len(self.beginnings) + 3

    def step(self, view: View) -> Asking:
        """Score the next tokens of the current beginning and go on to the next one."""
        memory = view.memory
        now: Beginning = memory.setdefault("beginning", ())
        scores: dict[Beginning, float] = memory.setdefault("scores", {(): 0.0})
        following = sorted({a[: len(now) + 1] for a in self.answers if _begins(a, now)})
        if following and following[0] not in scores:
            values: FloatArray = yield Likelihood(
                index=np.zeros(len(following), np.int64),
                tokens=np.array([beginning[-1] for beginning in following]),
            )
            for beginning, value in zip(following, values, strict=True):
                scores[beginning] = scores[now] + float(value)
        # In this order every beginning comes after those that it begins with.
        seen = memory.setdefault("seen", {()})
        left = [beginning for beginning in self.beginnings if beginning not in seen]
        if left:
            return self._towards(left[0], view)
        if "choice" not in memory:
            totals = np.array([scores[answer] for answer in self.answers])
            memory["choice"] = self._choose(totals, view)
            memory["logprobs"] = totals
        return self._towards(self.answers[memory["choice"]], view, last=True)

    def report(self, memory: Mapping[str, Any]) -> dict[str, Any]:
        """The choice, as an index, and the log-likelihood of every answer, nats, once known."""
        if "choice" not in memory:
            return {}
        logprobs = [round(float(value), 4) for value in memory["logprobs"]]
        return {"choices": {"index": memory["choice"], "logprobs": logprobs}}

    def _choose(self, values: FloatArray, view: View) -> int:
        if view.temperature > 0:
            tempered = torch.from_numpy(values / view.temperature).softmax(-1)
            p = self.rule.filter(tempered[None])[0].cumsum(-1).numpy()
            (number,) = randomness.uniforms(
                view.seed, step=0, positions=np.array([0]), stream=randomness.CHOOSE
            )
            return int(np.searchsorted(p, number * p[-1], side="right"))
        return int(top(values, 1)[0])

    def _towards(self, goal: Beginning, view: View, last: bool = False) -> Commit:
        """Write what the goal adds to the canvas, or first go back to where they part."""
        memory, now = view.memory, view.memory["beginning"]
        if not _begins(goal, now, proper=False):
            shared = next(k for k, token in enumerate(now) if goal[k : k + 1] != (token,))
            memory["beginning"] = now[:shared]
            start = view.block_start
            remask = np.arange(start + shared, start + len(now))
            return Commit(chosen=np.empty(0, np.int64), remask=remask, settled=False)
        memory["beginning"] = goal
        memory["seen"].add(goal)
        tokens = list(goal[len(now) :])
        if last:
            tokens += [self.eos_token_id] * (len(view.positions) - len(tokens))
        return Commit(
            chosen=np.arange(len(tokens)), tokens=np.array(tokens, np.int64), settled=last
        )


def _begins(answer: Beginning, beginning: Beginning, proper: bool = True) -> bool:
    """Whether the answer begins so and, if `proper`, goes on."""
    goes_on = len(answer) > len(beginning) or not proper
    return goes_on and answer[: len(beginning)] == beginning
