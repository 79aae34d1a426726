"""What a policy may query of the denoiser in the middle of a step."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import numpy as np

from boe_vllm.base.arrays import FloatArray, IntArray

if TYPE_CHECKING:
    from boe_vllm.sampling.statistics import RowStatistics

Surrogate = Literal["mask", "inject", "kv", "response", "rectified"]
Context = Literal["frozen", "exact"]
Observed = Literal["block", "masked", "all"]
Estimator = Literal["exact", "pairs", "attention", "overlap"]


class Query:
    """Work that a policy wants done before it decides; a policy's step yields it."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PredictionChange(Query):
    """Query for KL(prediction now || prediction one step before); answered with float64 [M], nats.

    The first time, a position's KL is that from nothing (`p_0 = 0`), which is large. To be asked in
    every step.
    """

    positions: IntArray
    """[M] the view's positions."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokenImportance(Query):
    """Query for the Token Importance Scores of candidates; answered with float64 [C], nats."""

    candidates: IntArray
    """[C] indices into `View.positions`."""
    objective: IntArray
    """[O] indices into `View.positions` whose entropies are summed."""
    active: IntArray | None
    """Indices into `View.positions` whose attention passes a gradient; None: every row."""
    surrogate: Surrogate
    """Where the entropy is linearised; see `policies.boe.BoEConfig.surrogate`."""
    context: Context
    """For "inject": rows outside the masked ones frozen, or computed again."""
    sharpen: float
    """Temperature of the soft write, 1 for none."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Coupling(Query):
    """Query how strongly proposals depend on each other; answered with float64 [C, C], nats.

    Symmetric with a zero diagonal. With measure "kl", `kappa_ij = KL(p_j given i || p_j) +
    KL(p_i given j || p_i)`, where "given i" means with the proposal of i written. With measure
    "pmi", the loss of log-probability of the proposals themselves, `-(ln p_j(x_j given i) -
    ln p_j(x_j))`, the mean of both directions: negative where they support each other.
    """

    pool: IntArray
    """[C] indices into `View.positions`."""
    tokens: IntArray
    """[C] the proposals."""
    entropy: FloatArray
    """[C] entropies of the predictions, nats."""
    estimator: Estimator
    """See `boe_vllm.steering.coupling`."""
    measure: Literal["kl", "pmi"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Conditional(Query):
    """Query for the predictions of some positions once others are written, all else frozen.

    Answered with `Conditioned`.
    """

    written: IntArray
    """[w] indices into `View.positions` that are supposed written."""
    tokens: IntArray
    """[w] what is written there."""
    queried: IntArray
    """[q] indices whose predictions are wanted; they stay masked."""
    temperature: float
    """How new proposals are drawn, as in the step itself."""
    uniform: FloatArray
    """[q] the random numbers behind them."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Conditioned:
    """Predictions of the queried positions under a supposition."""

    proposal: IntArray
    """[q] tokens."""
    confidence: FloatArray
    """[q] probability of the proposal."""
    entropy: FloatArray
    """[q] nats."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Lookahead(Query):
    """Query what the denoiser predicts in hypothetical states; answered with a `Prospect` for each.

    A state is the current one with some masked positions written. Each counts one forward.
    """

    writes: tuple[IntArray, ...]
    """Per state, indices into `View.positions` that are written."""
    tokens: tuple[IntArray, ...] | None
    """Per state, what is written there; None writes soft embeddings (eq. 10)."""
    observe: Observed = "block"
    """Predictions that are wanted: of the block's remaining masks, of the whole sequence's, or of
    every position. With a cache, only positions that are computed are seen."""
    sharpen: float = 1.0
    """Temperature of soft writes, 1 for none."""
    carry: bool = False
    """Whether the next step may go on with a state's prediction."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Prospect:
    """What the denoiser predicts in one hypothetical state; entropies in nats."""

    index: IntArray
    """[R] indices into `View.positions` of the block's positions that are still masked."""
    proposal: IntArray
    """[R] what the next step would propose there; the argmax unless the prediction is carried."""
    confidence: FloatArray
    """[R] untempered probability of the proposal."""
    margin: FloatArray
    """[R] largest less second largest probability."""
    entropy: FloatArray
    """[R] entropies."""
    elsewhere: FloatArray
    """[E] entropies of the other positions that were observed."""
    carry: RowStatistics | None
    """The prediction, for `Commit.carry`."""

    def entropies(self) -> FloatArray:
        """[R + E] entropies of all observed positions.

        Raises:
            ValueError: when the model's logits are not finite.
        """
        both = np.concatenate([self.entropy, self.elsewhere])
        if not np.isfinite(both).all():
            raise ValueError(
                "the model's logits are not finite in a look-ahead state; check the checkpoint and "
                "the dtype"
            )
        return both

    def mean_entropy(self) -> float:
        """Mean of `entropies`; 0 where nothing is left to observe."""
        both = self.entropies()
        return float(both.mean()) if len(both) else 0.0
