"""Counts what a step asks of the network: its passes, their rows, and when the host waits.

A step is a list of rounds. A round is what runs until the host reads numbers from the device: the
step's own forward with its statistics, and then one for each time that policies ask. Rounds are
shared by all requests, so that their number does not grow with the requests.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

from boe_vllm.attention import AttentionLayout
from boe_vllm.decoding.accounting import Clock
from boe_vllm.decoding.loop import DenoisingLoop

Kind = Literal[
    "forward",
    "saving",
    "partial",
    "backward",
    "observed",
    "logits",
    "soft writes",
    "gradient",
]
THROUGH_LAYERS = ("forward", "saving", "partial", "backward", "observed")
"""Kinds of pass that read the weights of all layers; the others read the vocabulary's."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """Rows that met the network's weights together."""

    kind: Kind
    """"forward" of rows with their keys and values ("saving" where a backward may follow),
    "partial" of a few rows whose other rows are frozen, "backward" of the saved rows ("observed"
    where every layer's gradients are looked at); or products with the vocabulary: "logits", "soft
    writes", and the "gradient" of the entropies."""
    rows: int
    """Rows that are computed."""
    keys: int = 0
    """Rows of keys and values that they attend to."""
    pairs: int = 0
    """Pairs of a row and a key that it attends to."""


Step = list[list[Pass]]
"""The rounds of one step."""


class Recorder:
    """Notes the passes of a loop's steps."""

    def __init__(self, loop: DenoisingLoop) -> None:
        """For a loop whose model it will listen to."""
        self.loop = loop
        self.steps: list[Step] = []
        self._inside = False
        self._layout: AttentionLayout | None = None

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Step]]:
        """The steps that the loop makes meanwhile; then loop and model are as they were."""
        model = self.loop.model
        wrappers: list[tuple[Any, str, Any]] = [
            (self.loop, "clock", _StepClock(self)),
            (model, "run", self._run(model.run)),
            (model, "backward", self._backward(model.backward)),
            (model, "logits", self._vocabulary("logits", model.logits)),
            (model, "soft_embed", self._vocabulary("soft writes", model.soft_embed)),
            (model, "logits_backward", self._vocabulary("gradient", model.logits_backward)),
            (model.layers[0], "project", self._project(model.layers[0].project)),
        ]
        before = self.loop.clock
        for owner, name, wrapper in wrappers:
            setattr(owner, name, wrapper)
        try:
            yield self.steps
        finally:
            for owner, name, _ in wrappers:
                delattr(owner, name)  # which uncovers the class's own
            self.loop.clock = before

    def begin(self, part: str) -> None:
        """A part of a step begins: its own forward, or the answer to what policies ask."""
        if part == "forward":
            self.steps.append([[]])
        elif part == "queries" and self.steps[-1][-1]:
            self.steps[-1].append([])

    def _note(self, kind: Kind, rows: int, keys: int = 0, pairs: int = 0) -> None:
        if rows:
            self.steps[-1][-1].append(Pass(kind=kind, rows=rows, keys=keys, pairs=pairs))

    def _run(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def noted(x_TD: Any, layout: Any, *args: Any) -> Any:
            attention = layout.attention
            if any(p.kind in ("forward", "saving") for p in self.steps[-1][-1]):
                self.steps[-1].append([])  # a further pass of a long look-ahead
            if len(self.steps[-1]) == 1:
                self._layout = attention
            self._note(
                "saving" if any(layout.saved_lens) else "forward",
                attention.num_queries,
                attention.num_keys,
                _pairs(attention),
            )
            self._inside = True
            try:
                return run(x_TD, layout, *args)
            finally:
                self._inside = False

        return noted

    def _project(self, project: Callable[..., Any]) -> Callable[..., Any]:
        def noted(x_ND: Any, *args: Any) -> Any:
            if not self._inside and self._layout is not None:
                # Few rows of every sequence, against all keys of the step's own forward.
                keys, rows = self._layout.num_keys, len(x_ND)
                self._note("partial", rows, keys, rows * keys // self._layout.num_sequences)
            return project(x_ND, *args)

        return noted

    def _backward(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        def noted(
            dhidden_AD: Any, saved: Any, active_A11: Any, observe: Any = None, **options: Any
        ) -> Any:
            attention = saved.layout.attention
            kind: Kind = "backward" if observe is None else "observed"
            pairs = _pairs(attention.active_only())
            self._note(kind, len(dhidden_AD), attention.num_keys, pairs)
            return backward(dhidden_AD, saved, active_A11, observe, **options)

        return noted

    def _vocabulary(self, kind: Kind, product: Callable[..., Any]) -> Callable[..., Any]:
        def noted(x: Any, *args: Any) -> Any:
            self._note(kind, len(x))
            return product(x, *args)

        return noted


class _StepClock(Clock):
    """Tells the recorder which part of a step begins."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside for `name`."""
        self.recorder.begin(name)
        with super().part(name):
            yield


def layer_passes(step: Step) -> int:
    """Passes of a step that read the weights of all layers."""
    return sum(p.kind in THROUGH_LAYERS for passes in step for p in passes)


def layer_rows(step: Step) -> int:
    """Rows of these passes."""
    return sum(p.rows for passes in step for p in passes if p.kind in THROUGH_LAYERS)


def _pairs(layout: AttentionLayout) -> int:
    return sum(q * kv for q, kv in zip(layout.q_seqlens, layout.kv_seqlens, strict=True))
