"""Runs one request in a denoising loop of its own and notes what happens on its canvas.

It is the engine's loop; only the canvas is another, which looks at each decision as it is written.
Tokens, forwards and backwards are those of the engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from boe_vllm.decoding.canvas import Canvas
from boe_vllm.denoiser import Denoiser
from boe_vllm.lab.eval.cells import item_seed
from boe_vllm.lab.pictures.influence import Linearised, influence
from boe_vllm.lab.pictures.trajectory import Recording, Step, Trajectory
from boe_vllm.lab.tasks import Item, Task
from boe_vllm.lab.tasks.sudoku import SudokuTask
from boe_vllm.policies.base import Commit, View
from boe_vllm.request.resolve import SamplingFields
from boe_vllm.sampling.log_probs import TokenLikelihood
from boe_vllm.sampling.statistics import RowStatistics

REQUEST = "0"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is decoded, whatever the policy."""

    prompt: str
    gen_length: int
    seed: int
    """As `boe-vllm eval --seed`: an item's random numbers come from it and the item."""
    temperature: float = 0.0
    task: Task | None = None
    """None for a prompt of one's own."""
    item: Item | None = None
    number: int | None = None
    """Of the item, in the task's list."""

    @property
    def draws(self) -> int:
        """The seed of the random numbers."""
        return self.seed if self.item is None else item_seed(self.seed, self.item)

    @property
    def width(self) -> int | None:
        """Columns of the canvas, if it is a grid."""
        return self.task.board.size if isinstance(self.task, SudokuTask) else None


class ObservedCanvas(Canvas):
    """A canvas that keeps the note of its last step."""

    note: Step | None = None

    def apply(
        self,
        commit: Commit,
        view: View,
        rows: slice,
        statistics: RowStatistics,
        likelihoods: Mapping[int, TokenLikelihood] = MappingProxyType({}),
    ) -> None:
        """Write as ever; then note what was seen before and what was written."""
        masked, tokens = self.masked.copy(), self.tokens[self.prompt_len :].tolist()
        super().apply(commit, view, rows, statistics, likelihoods)
        own = statistics.part(slice(rows.start, rows.start + len(view.positions)))
        assert own.top_tokens is not None and own.top_logprobs is not None
        written = np.flatnonzero(masked & ~self.masked)
        ranked = [p for p in view.positions[commit.chosen] if p in written]
        order = [*ranked, *(p for p in written if p not in ranked)]
        self.note = Step(
            tokens=tokens,
            positions=self._places(view.positions),
            entropy=_rounded(view.entropy),
            confidence=_rounded(own.confidence),
            top_tokens=own.top_tokens.tolist(),
            top_probabilities=[_rounded(row) for row in np.exp(own.top_logprobs)],
            scores=None
            if commit.scores is None
            else [_digits(x) if np.isfinite(x) else None for x in commit.scores],
            committed=self._places(order),
            remasked=self._places(np.flatnonzero(~masked & self.masked)),
            forwards=self.account.forwards,
            backwards=self.account.backwards,
        )

    def _places(self, positions: Iterable[int]) -> list[int]:
        return [int(position) - self.prompt_len for position in positions]


class Recorder:
    """One request under one policy."""

    def __init__(
        self,
        denoiser: Denoiser,
        request: Request,
        *,
        label: str,
        fields: Mapping[str, Any],
        top: int = 5,
        surrogate: Linearised | None = None,
    ) -> None:
        """Open the request's canvas.

        Args:
            denoiser: what decodes it.
            request: what is decoded.
            label: the policy's name in pictures.
            fields: the policy and its settings, as a request has them.
            top: most likely tokens that are noted per position.
            surrogate: where influences are linearised; None measures none: they cost a backward
                per masked position and step.

        Raises:
            ValueError: naming a field that does not fit, or a prompt that has masks in it.
        """
        prompt = denoiser.encode(request.prompt)
        self.denoiser, self.request, self.label = denoiser, request, label
        self.steps: list[Step] = []
        self._surrogate = surrogate
        if denoiser.special.mask in prompt:
            raise ValueError(
                "--prompt: expected text without the mask token, got one; leave it out"
            )
        sampling = SamplingFields(
            max_tokens=request.gen_length,
            temperature=request.temperature,
            seed=request.draws,
            logprobs=top,
        )
        resolved = denoiser.resolve(prompt, sampling, fields)
        rows = (len(prompt) + resolved.plan.gen_length) * (resolved.config.frame.cache != "none")
        self.loop = denoiser.open_loop(rows)
        self.canvas = self.loop.canvases[REQUEST] = ObservedCanvas(
            prompt,
            resolved,
            special=self.loop.special,
            vocab_size=denoiser.model.vocab_size,
            pool=self.loop.pool,
        )
        self._sent: list[int] = []

    @property
    def tokens(self) -> list[int]:
        """[N] the canvas now."""
        return self.canvas.tokens[self.canvas.prompt_len :].tolist()

    @property
    def done(self) -> bool:
        """The canvas is full, or the engine would end the request: at EOS or a stop string."""
        return self.canvas.done or self._ended

    def step(self) -> Step:
        """One denoising step.

        Raises:
            ValueError: when the request cannot go on.
        """
        changes = None
        if self._surrogate is not None:
            changes = influence(self.loop, self.canvas, self._surrogate)
        result = self.loop.step([REQUEST])[REQUEST]
        if result.error is not None:
            raise ValueError(f"{self.label}: {result.error}")
        note = self.canvas.note
        assert note is not None
        if changes is not None:
            note = dataclasses.replace(note, influence=[_rounded(row) for row in changes])
        self.steps.append(note)
        self._sent += result.tokens
        return note

    def trajectory(self) -> Trajectory:
        """All steps so far, and the answer, judged once it is complete."""
        text = self._text()
        valid = None
        task, item = self.request.task, self.request.item
        if self.done and task is not None and item is not None and task.judged:
            valid = task.score(item, text).valid
        return Trajectory(
            label=self.label, steps=list(self.steps), tokens=self.tokens, text=text, valid=valid
        )

    @property
    def _ended(self) -> bool:
        if self.loop.special.eos in self._sent:
            return True
        return any(stop in self._decoded() for stop in self._stops())

    def _stops(self) -> tuple[str, ...]:
        return () if self.request.task is None else self.request.task.stop

    def _decoded(self) -> str:
        return self.denoiser.decode(self._sent)

    def _text(self) -> str:
        text = self._decoded()
        for stop in self._stops():
            text = text.split(stop, 1)[0]
        return text


def recording(request: Request, recorders: Iterable[Recorder]) -> Recording:
    """The trajectories of all recorders of one request."""
    recorders = list(recorders)
    denoiser, loop = recorders[0].denoiser, recorders[0].loop
    trajectories = [recorder.trajectory() for recorder in recorders]
    used: set[int] = set()
    for trajectory in trajectories:
        used.update(trajectory.tokens)
        for step in trajectory.steps:
            used.update(step.tokens, *step.top_tokens)
    return Recording(
        model=denoiser.name,
        task=None if request.task is None else request.task.name,
        item=request.number,
        seed=request.seed,
        prompt=request.prompt,
        width=request.width,
        mask_token=loop.special.mask,
        eos_token=loop.special.eos,
        vocabulary={token: denoiser.word(token) for token in sorted(used)},
        trajectories=trajectories,
    )


def _digits(value: float) -> float:
    """Five significant digits: what pictures show, in small files."""
    return float(f"{value:.5g}")


def _rounded(values: Iterable[float]) -> list[float]:
    return [_digits(float(value)) for value in values]
