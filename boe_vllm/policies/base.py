"""The contract between the engine and an unmasking policy.

In each denoising step the engine shows a policy a `View` of one request: statistics of the masked
positions that may be written now. The policy answers with a `Commit`. It may first ask for more
work of the denoiser by yielding a `Query`; the engine solves the queries of all requests of the
batch in shared, packed passes. A policy never sees a tensor, another request, or vLLM.

Legend: `b` tokens of this step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

import numpy as np

from boe_vllm.base.arrays import FloatArray, IntArray
from boe_vllm.base.options import options
from boe_vllm.sampling import randomness

if TYPE_CHECKING:
    from boe_vllm.sampling.statistics import RowStatistics
    from boe_vllm.steering.step import Query

    Asking = Generator[Query[Any], Any, "Commit"]
    """A step that asks: it yields queries, is sent their results and returns its decision."""

C = TypeVar("C", bound="PolicyConfig")


@options
class PolicyConfig:
    """A policy without settings of its own."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Named settings, for a policy with a field `preset`."""

    @property
    def rewrites(self) -> bool:
        """Whether the policy may mask again what it has written in a block."""
        return False

    def paced(self) -> PolicyConfig:
        """The settings where the request says how many tokens a step writes."""
        return self

    @classmethod
    def resolve(cls, fields: Mapping[str, Any], base: PolicyConfig | None) -> dict[str, Any]:
        """The settings that some fields stand for, to be validated.

        Args:
            fields: what is given, by name.
            base: the server's settings of the same policy, if there are any. A preset replaces
                them; other fields go on top of either.
        """
        preset = fields.get("preset")
        if isinstance(preset, str) and preset in cls.presets:
            return {**cls.presets[preset], **fields}
        return (dataclasses.asdict(base) if base is not None else {}) | dict(fields)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Revision:
    """What the denoiser would write now at positions that are written already: those of the block,
    `View.written`, or all before its end."""

    positions: IntArray
    """[W] absolute positions, ascending."""
    proposal: IntArray
    """[W] the token: argmax, or a sample at temperature > 0; never MASK."""
    confidence: FloatArray
    """[W] untempered probability of that token."""
    entropy: FloatArray
    """[W] entropy of the prediction, nats."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """What a policy may know about one request in one denoising step."""

    positions: IntArray
    """[M] absolute positions, ascending."""
    proposal: IntArray
    """[M] the token that would be written: argmax, or a sample at temperature > 0; never MASK."""
    confidence: FloatArray
    """[M] untempered probability of the proposal; -inf where an early commit is forbidden."""
    margin: FloatArray
    """[M] difference of the two largest probabilities."""
    entropy: FloatArray
    """[M] entropy of the prediction, nats."""
    quota: int
    """Tokens due in this step by the request's schedule, 1 <= quota <= M."""
    masked_at_start: int
    """Masked positions of the whole request before its first step."""
    masked_now: int
    """Masked positions of the whole request now."""
    step: int
    """Denoising steps of the request so far."""
    block_step: int
    """Denoising steps of the current block so far."""
    block_steps: int
    """Denoising steps planned for the current block."""
    block_start: int = 0
    """Where the current block begins on the canvas; masks inside the prompt lie before it."""
    vocab_size: int
    """Number of tokens V."""
    seed: int
    """Seed of the request."""
    temperature: float = 0.0
    """0 if proposals are the argmax."""
    written: IntArray = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))
    """[W] absolute positions of the current block that earlier steps wrote, ascending."""
    revision: Revision | None = None
    """What would be written there now, if the policy needs it; with `Needs.past`, everywhere before
    the block's end."""
    late_tokens: IntArray = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))
    """Tokens that may only be committed last (EOS and EoT under `confidence_eos_eot_inf` or
    `eos_eot_last`); empty where the request does not ask for it. It holds in every round of a step:
    a policy that learns of new proposals passes them through `committable`."""
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The policy's own notes on this request; kept across its steps."""

    @property
    def block_masks(self) -> int:
        """Masked positions of the current block at its start."""
        return len(self.positions) + len(self.written)

    def committable(self, proposal: IntArray, confidence: FloatArray) -> FloatArray:
        """The confidences, with -inf where the proposal may only be committed last."""
        return committable(proposal, confidence, self.late_tokens)

    def uniforms(self, stream: int) -> FloatArray:
        """[M] random numbers in (0, 1): a function of the request's seed, the step and position."""
        return randomness.uniforms(
            self.seed, step=self.step, positions=self.positions, stream=stream
        )

    def write_uniforms(self) -> FloatArray:
        """[M] those behind the tokens of this step; NaN at temperature 0, where none is drawn."""
        if self.temperature == 0:
            return np.full(len(self.positions), np.nan)
        return self.uniforms(randomness.WRITE)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """What a policy decides in one step."""

    chosen: IntArray
    """Indices into `View.positions` of the positions to write; at least one unless remasking."""
    tokens: IntArray | None = None
    """Tokens to write, one per chosen index; None writes the proposals."""
    remask: IntArray = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))
    """Absolute positions of the block to mask again, once the chosen ones are written."""
    settled: bool = True
    """No later step of this block remasks anything, so that what it has written may be sent."""
    idle: bool = False
    """The rule writes and remasks nothing in this step; the block's step limit still holds."""
    carry: RowStatistics | None = None
    """The prediction of the very state that this commit leads to, if a look-ahead made one: the
    next step then needs no forward of its own."""
    scores: FloatArray | None = None
    """[M] the scores that the choice was made by, for traces."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What the step's own forward must keep for a policy's queries."""

    rows: Literal["none", "masked", "all"] = "none"
    """Rows whose activations are kept for a backward: "none", "masked" or "all"."""
    distributions: bool = False
    """Whether queries read the step's log-probabilities again, so that they are worth keeping."""
    next_block: bool = False
    """Whether queries read the final states of the next block's masked positions as well."""
    revision: bool = False
    """Whether predictions at written positions of the block are wanted (`View.revision`)."""
    same_draws: bool = False
    """Whether a position's token is drawn by one random number in all steps, and not by another in
    each, so that predictions that agree propose the same. `View.write_uniforms` knows nothing of
    it."""
    past: bool = False
    """Whether the revision is to cover all that is written before the block's end, the prompt
    included. Under a cache, only what is computed in the step."""


class Policy(Generic[C]):
    """One unmasking policy with its settings; holds no state of any request."""

    name: ClassVar[str] = ""
    """What a request calls it."""
    Config: ClassVar[type[PolicyConfig]] = PolicyConfig
    """Its settings. The docstring describes the policy, those of the fields the settings."""
    source: ClassVar[str] = ""
    """Where the rule comes from: the paper, the repository and the function."""
    passes: ClassVar[str] = "1 forward"
    """What a step costs, in passes over the request's rows."""

    config: C

    def __init__(self, config: C) -> None:
        self.config = config

    def needs(self) -> Needs:
        """What the step's forward must keep for this policy."""
        return Needs()

    def step_limit(self, masks: int, steps: int) -> int:
        """Denoising steps after which the engine itself writes whatever a block still masks.

        Args:
            masks: masked positions of the block at its start.
            steps: steps planned for the block.
        """
        return max(masks, steps)

    def rows_ahead(self, *, masks: int, quota: int, length: int) -> int:
        """Most rows that the queries of one step compute, forward and backward, for the server's
        limit on them.

        Args:
            masks: masked positions of the block at its start.
            quota: most tokens that the frame's schedule has due in a step.
            length: rows of the whole request.
        """
        return 0

    def step(self, view: View) -> Commit | Asking:
        """Decide one denoising step.

        A policy that asks nothing returns its `Commit`. One that asks is a generator: it yields
        queries, is sent their results, and returns its `Commit`.
        """
        raise NotImplementedError


def committable(proposal: IntArray, confidence: FloatArray, late_tokens: IntArray) -> FloatArray:
    """The confidences, with -inf where the proposal is a token that may only be committed last."""
    return np.where(np.isin(proposal, late_tokens), -np.inf, confidence)


def finishing(commit: Commit, view: View) -> Commit:
    """The commit that ends its block: it also writes what the policy would leave masked."""
    tokens = view.proposal[commit.chosen] if commit.tokens is None else commit.tokens
    left = np.setdiff1d(np.arange(len(view.positions)), commit.chosen)
    return Commit(
        chosen=np.concatenate([commit.chosen, left]),
        tokens=np.concatenate([tokens, view.proposal[left]]),
        scores=commit.scores,
    )


def top(scores: FloatArray, count: int) -> IntArray:
    """Indices of the `count` largest scores, best first; equal scores go to the lower index."""
    return np.argsort(-scores, kind="stable")[:count]


def allowed(scores: FloatArray, view: View) -> FloatArray:
    """[M] the scores, with -inf where the request forbids an early commit."""
    return np.where(np.isneginf(view.confidence), -np.inf, scores)


Certainty = Literal["confidence", "margin", "entropy"]


def certainty(view: View, name: Certainty) -> FloatArray:
    """[M] how sure each prediction is, higher is surer ("entropy" meaning the negative entropy);
    -inf where the request forbids an early commit."""
    scores = {"confidence": view.confidence, "margin": view.margin, "entropy": -view.entropy}[name]
    return allowed(scores, view)


def candidates_of(view: View, scores: FloatArray, count: int) -> IntArray:
    """Indices of the `count` best positions that may be written now, best first, at least `b`.

    What may only be committed last is among them only where it has to make up the `b`.
    """
    order = top(allowed(scores, view), len(scores))
    early = int(np.isfinite(view.confidence).sum())
    return order[: max(view.quota, min(count, early))]


def log(confidence: FloatArray) -> FloatArray:
    """Natural logarithms; -inf stays, and a probability that underflows is a large negative one."""
    return np.where(np.isneginf(confidence), -np.inf, np.log(np.maximum(confidence, 1e-300)))
